"""The plan: the paper's figures through a request, what fits, and what would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from packforcing_cli import catalog
from packforcing_cli.config import GenerateRequest, MemoryOptions, PlanRequest
from packforcing_cli.errors import DiskFullError, LayoutError, MemoryFitError, UsageError
from packforcing_cli.planner import Machine, Plan, host_machine, plan

GB = 10**9


def paper(**values: Any) -> PlanRequest:
    given: dict[str, Any] = {"model": "wan2.1-1.3b", "frames_per_block": 4, "size": "832x480", "seconds": 120}
    return PlanRequest(**{**given, **values})


def test_the_papers_figures_come_out() -> None:
    made = plan(paper())
    values = made.to_json()
    assert values["tokens"] == {
        "block": 6240,
        "compressed_block": 182,
        "sink": 12480,
        "mid": 2912,
        "recent": 6240,
        "current": 6240,
        "active": 27872,
    }
    assert values["bytes_per_token"] == 184320
    assert values["full_history_bytes"] == 138018816000
    assert values["stored_bytes"] == 3987210240
    assert (made.blocks, made.frames, made.latent_frames) == (120, 1917, 480)


def test_the_plans_figures_are_the_layouts() -> None:
    made = plan(paper(seconds=33, memory=MemoryOptions(top_k=3, bank=7, mid_span="1")))
    assert made.tokens == made.layout.tokens(made.blocks - 1)
    assert made.memory == made.layout.bytes(made.blocks - 1)
    assert made.capacity == made.layout.capacity_bytes(made.blocks)
    assert made.layout.bank == 7
    assert made.slots.total == made.layout.slots(made.blocks - 1).total


def test_size_and_block_come_from_the_model_unless_given() -> None:
    made = plan(PlanRequest(model="wan2.1-1.3b"))
    assert (made.size, made.frames_per_block) == ((832, 480), 3)
    assert made.layout.mid_span == "fit"
    assert made.slots.within_trained_range
    demo = plan(PlanRequest())
    assert (demo.size, demo.frames_per_block, demo.layout.mid_span) == ((128, 64), 4, 1)
    assert (demo.blocks, demo.frames) == (10, 157)


def test_a_generate_request_is_planned_as_it_is() -> None:
    request = GenerateRequest(prompt="a red circle", seconds=10)
    assert plan(request).blocks == 10


def test_fp32_doubles_the_cache() -> None:
    assert plan(paper(dtype="fp32")).memory.live > 1.9 * plan(paper()).memory.live
    assert plan(paper(dtype="fp32")).memory.stored == 2 * plan(paper()).memory.stored


def test_growth_shows_a_full_cache_growing_and_this_one_flat() -> None:
    points = plan(paper(seconds=600, memory=MemoryOptions(bank=64))).growth
    assert [point.seconds for point in points] == [5, 10, 30, 60, 120, 300, 600]
    last, before = points[-1], points[-2]
    assert last.full_bytes > 1.9 * before.full_bytes
    assert (last.stored_bytes, last.bank_bytes, last.window_bytes) == (
        before.stored_bytes,
        before.bank_bytes,
        before.window_bytes,
    )
    assert points[4].full_bytes == 138018816000


# ------------------------------------------------------------------------------------------------------------- fits


def followed(made: Plan, request: PlanRequest, machine: Machine) -> Plan:
    """The plan after doing what the suggestion says."""
    option, value = made.suggestion.split()
    name = option.removeprefix("--").replace("-", "_")
    if name in MemoryOptions.model_fields:
        memory = MemoryOptions(**{**request.memory.model_dump(exclude_unset=True), name: value})
        return plan(PlanRequest(**{**request.model_dump(exclude={"memory"}), "memory": memory}), machine)
    return plan(
        PlanRequest(**{**request.model_dump(exclude={"memory"}), name: value, "memory": request.memory}),
        machine,
    )


@pytest.mark.parametrize(
    ("request_", "memory_gb", "option"),
    [
        (paper(memory=MemoryOptions(policy="full")), 80, "--policy packforcing"),
        (paper(seconds=1200, memory=MemoryOptions(bank=None)), 24, "--bank "),
        (paper(), 12, "--size "),
    ],
)
def test_a_plan_that_does_not_fit_names_an_option_that_does(
    request_: PlanRequest, memory_gb: int, option: str
) -> None:
    machine = Machine(memory_bytes=memory_gb * GB, device="cuda:0")
    made = plan(request_, machine)
    assert not made.fits
    assert made.suggestion.startswith(option)
    assert followed(made, request_, machine).fits
    with pytest.raises(MemoryFitError, match=f"cuda:0 has {memory_gb}.0 GB free") as error:
        made.require_fit()
    assert made.suggestion in error.value.hint


def test_what_fits_is_not_refused() -> None:
    for machine in (None, Machine(80 * GB), Machine(80 * GB, disk_free_bytes=GB)):
        made = plan(paper(), machine)
        assert made.fits
        assert made.suggestion == ""
        made.require_fit()


def test_a_full_disk_is_refused_before_anything_is_made() -> None:
    made = plan(paper(), Machine(80 * GB, disk_free_bytes=1000))
    assert not made.fits
    with pytest.raises(DiskFullError, match="of disk are needed"):
        made.require_fit()


def test_nothing_fits_a_machine_without_memory() -> None:
    made = plan(paper(), Machine(1))
    assert (made.fits, made.suggestion) == (False, "")
    with pytest.raises(MemoryFitError):
        made.require_fit()


def test_the_peak_contains_weights_and_cache() -> None:
    made = plan(paper())
    assert made.weights.transformer == 2 * catalog.get("wan2.1-1.3b").transformer_params
    assert (
        made.peak_bytes
        == made.weights.transformer + made.weights.vae + made.capacity.live + made.working_bytes
    )


def test_this_machine_has_memory_and_disk(tmp_path: Path) -> None:
    machine = host_machine(tmp_path / "not" / "yet")
    assert machine.memory_bytes > 0
    assert machine.disk_free_bytes
    assert machine.disk_free_bytes > 0


# --------------------------------------------------------------------------------------------------- odd requests


def test_slots_beyond_the_trained_range_are_warned_about() -> None:
    assert any("80 slots and the model was trained on 20" in text for text in plan(paper()).warnings)
    assert plan(paper(memory=MemoryOptions(mid_span="fit"))).warnings == ()


def test_a_bank_that_leaves_nothing_to_select_is_warned_about() -> None:
    memory = MemoryOptions(top_k=16, bank=16, mid_span="fit")
    assert any("nothing to select from" in text for text in plan(paper(memory=memory)).warnings)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"model": "wan3"}, UsageError),
        ({"size": "830x480"}, UsageError),
        ({"size": "16x16"}, LayoutError),
        ({"frames_per_block": 5}, UsageError),
        ({"memory": MemoryOptions(mid_span="fit", sink_blocks=9)}, LayoutError),
        ({"memory": MemoryOptions(mid_span="7")}, LayoutError),
    ],
)
def test_impossible_requests_are_usage_errors_with_a_next_step(
    values: dict[str, Any], kind: type[UsageError]
) -> None:
    with pytest.raises(kind) as error:
        plan(paper(**values))
    assert error.value.exit_code == 2
    assert error.value.hint


def test_a_day_of_video_is_planned_at_once() -> None:
    made = plan(paper(seconds=86400, memory=MemoryOptions(bank=None)))
    assert made.blocks == 86400
    assert made.fits
