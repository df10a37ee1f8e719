"""What is traced equals the live cache, the layout and the plan; what is told of a run is what its trace says."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_runfolder import folder_of, latents, prompt
from tiny import video_model
from torch import Tensor
from traces import layout_of, synthetic_record, synthetic_run
from typer.testing import CliRunner

from packforcing_cli import inspection, planner, prompts, registry, resolve, rollout, runfolder, trace
from packforcing_cli.cache import CacheContext
from packforcing_cli.cli import build_app
from packforcing_cli.config import GenerateRequest, MemoryOptions
from packforcing_cli.errors import RunFolderError, UsageError
from packforcing_cli.prompts import Story
from packforcing_cli.registry import VideoModel
from packforcing_cli.rollout import stream_generate
from packforcing_cli.runfolder import RunFolder
from packforcing_cli.timeline import Timeline, parse_at, parse_pins

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> VideoModel:
    return video_model()


@pytest.fixture(scope="module")
def demo() -> VideoModel:
    return registry.load_model("demo")


# -- the trace against the live memory ----------------------------------------------------------------------------

MEMORIES: dict[str, dict[str, Any]] = {
    "small bank": {"top_k": 3, "bank": 5, "mid_span": "1"},
    "no mid": {"policy": "sink"},
    "window": {"policy": "window"},
    "full": {"policy": "full"},
    "unlimited": {"top_k": 2, "bank": None, "mid_span": "1", "select": "affinity"},
    "identity": {"top_k": 2, "bank": 4, "mid_span": "block", "compressor": "identity", "select": "fifo"},
}


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("story", ["plain", "pins and a cut"])
def test_traced_bytes_are_those_of_the_tensors_in_use_of_the_layout_and_of_the_plan(
    name: str, story: str, demo: VideoModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    attended = dict[int, list[int]]()
    read = CacheContext.layer

    def spy(self: CacheContext, *args: Any) -> tuple[Tensor, Tensor]:
        k, v = read(self, *args)
        attended.setdefault(self.block, []).append(k.nbytes + v.nbytes)
        return k, v

    monkeypatch.setattr(CacheContext, "layer", spy)
    timeline = Timeline()
    if story != "plain":
        pins = parse_pins(["0:03-0:03.5"] if "top_k" in MEMORIES[name] else [])
        timeline = Timeline(parse_at([("0:05", "[cut] a red circle")]), pins)
    memory = MemoryOptions(**MEMORIES[name])
    seconds = 9.0
    request = GenerateRequest(
        prompt="a red circle", model="demo", seconds=seconds, memory=memory, timeline=timeline, dtype="fp32"
    )
    planned = planner.plan(request)
    quick = replace(resolve.schedule_for(demo), sigmas=(1.0, 0.0), guidance=1.0)
    text = prompts.encode_prompt(demo, "a red circle", guided=False)
    told = Story(planned.script, (text,) * len(planned.script.prompts))
    blocks = list(
        stream_generate(demo, told, num_blocks=planned.blocks, seed=1, memory=memory, schedule=quick)
    )
    assert planned.blocks == len(blocks) == 9
    for block in blocks:
        record, layout = block.record, planned.layout
        size = layout.bytes(block.index)
        assert record.bytes == {**asdict(size), "live": size.live}
        assert record.tokens == asdict(layout.tokens(block.index))
        assert record.bytes["stored"] + record.bytes["current"] == sum(
            attended[block.index][: block.selected.shape[0]]
        )
        assert record.partitions is not None
        assert record.partitions.bank == tuple(layout.view(block.index).mid)
        assert record.full_bytes == (block.index + 1) * layout.grid.block_tokens * layout.grid.bytes_per_token
        assert record.frames == (max(0, 16 * block.index - 3), 16 * block.index + 13)
    for length in range(1, 9) if story == "plain" else ():
        shorter = planner.plan(request.changed(seconds=float(length)))
        assert shorter.blocks == length
        assert blocks[length - 1].record.bytes == {**asdict(shorter.memory), "live": shorter.memory.live}
    last = blocks[-1].record
    assert last.bytes == {**asdict(planned.memory), "live": planned.memory.live}
    assert last.full_bytes == planned.growth[-1].full_bytes
    assert last.slots is not None
    assert last.slots.max_distance == float(planned.slots.max_distance)
    if planned.layout.pins:
        assert last.pins == (3,)
        assert all(3 in layer for layer in last.selected)
    if story != "plain":
        assert [block.record.scene for block in blocks] == [0] * 5 + [1] * 4
    assert all(not block.flags for block in blocks)


@pytest.mark.parametrize(("value", "said"), [(0.0, (0,)), (float("nan"), (0,)), (None, ())])
def test_scores_that_say_nothing_are_told_and_the_newest_blocks_recalled(
    model: VideoModel, monkeypatch: pytest.MonkeyPatch, value: float | None, said: tuple[int, ...]
) -> None:
    commit = model.transformer.commit

    def without_queries(*args: Any) -> Any:
        kv = commit(*args)
        q_sum = kv.q_sum.clone()
        if value is not None:
            q_sum[0] = value
        return replace(kv, q_sum=q_sum)

    monkeypatch.setattr(model.transformer, "commit", without_queries)
    memory = MemoryOptions(top_k=2, bank=4, mid_span="1")
    *_, last = stream_generate(model, prompt(), num_blocks=9, seed=0, memory=memory)
    assert last.record.degenerate == said
    assert last.record.partitions is not None
    if said:
        assert last.record.selected[0] == last.record.partitions.bank[-2:]
    assert last.record.scores is not None
    assert last.record.scores[1][0] is not None
    assert (last.record.scores[0][0] is None) == (value is not None and value != 0)
    assert trace.Record.from_json(json.loads(json.dumps(last.record.to_json()))) == last.record


def test_an_extended_run_has_the_trace_of_the_blocks_it_took_over(model: VideoModel, tmp_path: Path) -> None:
    memory = MemoryOptions(top_k=2, bank=3, mid_span="1")
    with folder_of(tmp_path / "run", tmp_path / "a.mp4") as run:
        rollout.generate(
            model, prompt(), tmp_path / "a.mp4", seconds=109 / 16, seed=3, memory=memory, run=run
        )
    with (
        RunFolder.open_to_read(tmp_path / "run") as source,
        RunFolder.create(
            tmp_path / "longer",
            source.record.model_copy(update={"id": runfolder.new_id("b"), "blocks": 6, "output": "b.mp4"}),
            source=source,
            blocks=4,
        ) as run,
    ):
        rollout.generate(model, prompt(), tmp_path / "b.mp4", seconds=93 / 16, seed=4, memory=memory, run=run)
    first, longer = trace.read(tmp_path / "run"), trace.read(tmp_path / "longer")
    assert [record.block for record in longer.records] == [*range(6)]
    assert longer.records[:4] == first.records[:4]
    assert longer.records[4].scores == first.records[4].scores  # of the clean block before
    assert longer.records[5].scores != first.records[5].scores
    for record in longer.records:
        assert set(record.seconds) == {
            *("denoise", "clean", "decode", "trace", "compress", "commit", "journal", "stall")
        }
        assert record.encode_seconds is not None


def test_pictures_a_video_begins_with_are_kept_and_traced_and_are_never_called_frozen(
    model: VideoModel, tmp_path: Path
) -> None:
    stills = [np.full((64, 64, 3), level, np.uint8) for level in (20, 200)]
    memory = MemoryOptions(top_k=2, bank=3, mid_span="1")
    options: dict[str, Any] = {"seconds": 61 / 16, "seed": 3, "memory": memory, "stills": stills}

    def start(name: str, stop_after: int) -> None:
        seen: list[rollout.Block] = []
        with folder_of(tmp_path / name, tmp_path / f"{name}.mp4", blocks=4) as run:
            rollout.generate(
                model,
                prompt(),
                tmp_path / f"{name}.mp4",
                run=run,
                on_block=lambda block, _: seen.append(block),
                should_stop=lambda: len(seen) == stop_after,
                **options,
            )
            assert run.blocks == min(4, stop_after)

    start("whole", 9)
    start("broken", 1)
    with RunFolder.open(tmp_path / "broken") as run:
        rollout.generate(model, prompt(), tmp_path / "broken.mp4", run=run, **options)
    records = trace.read(tmp_path / "broken").records
    assert [record.block for record in records] == [0, 1, 2, 3]
    assert [record.health and record.health.flags for record in records[:2]] == [(), ()]
    assert torch.equal(latents(tmp_path / "broken"), latents(tmp_path / "whole"))


# -- what is told of a run ------------------------------------------------------------------------------------------


def run_cli(*arguments: str) -> Any:
    return CliRunner().invoke(build_app(), ["inspect-cache", *arguments])


def ok(*arguments: str) -> str:
    done = run_cli(*arguments)
    assert done.exit_code == 0, done.output
    return str(done.stdout)


def keys(values: Any) -> Any:
    """The shape of JSON values: names, one example of each list."""
    if isinstance(values, dict):
        return {name: keys(value) for name, value in values.items()}
    return [keys(values[0])] if isinstance(values, list) and values and isinstance(values[0], dict) else None


@pytest.fixture
def run(tmp_path: Path) -> Path:
    sick = trace.Health(("frozen",), 100.0, 40.0, 0.0, 0.0, 0.0)
    changes: dict[int, dict[str, Any]] = {12: {"health": sick, "retry": 2}, 20: {"degenerate": (1,)}}
    return synthetic_run(tmp_path / "run", 40, layout=layout_of(pins=frozenset({4})), changes=changes)


MEMORY_KEYS = {
    "block": None,
    "partitions": [dict.fromkeys(("name", "blocks", "tokens", "bytes"))],
    "bank_blocks": None,
    "bytes": dict.fromkeys(("stored", "current", "raw_keys", "backups", "bank", "live")),
    "full_bytes": None,
}


def test_the_summary_as_json_is_frozen(run: Path) -> None:
    found = json.loads(ok(str(run), "--json"))
    stage = dict.fromkeys(("seconds", "share"))
    names = ("denoise", "clean", "decode", "compress", "commit", "journal", "stall", "trace")
    assert keys(found) == {
        **dict.fromkeys(("schema", "kind", "run", "folder", "output", "status", "prompt", "model", "select")),
        **dict.fromkeys(("blocks", "length_blocks", "seconds", "length_seconds", "notes")),
        "memory": MEMORY_KEYS,
        "recall": {
            "most": [dict.fromkeys(("block", "start", "end", "by_blocks", "by_layers"))],
            "age_seconds": dict.fromkeys(("least", "p25", "median", "p75", "most")),
            **dict.fromkeys(
                ("churn", "position_diversity", "share_never_selected", "never_selected", "importance")
            ),
        },
        "slots": dict.fromkeys(("span", "max_distance", "trained", "within_trained_range")),
        "degenerate": [dict.fromkeys(("block", "start", "layers"))],
        "retries": [dict.fromkeys(("block", "start", "attempts"))],
        "health": [dict.fromkeys(("block", "start", "flags"))],
        "stages": {"block_seconds": None, "stages": dict.fromkeys(names, stage), "encode_seconds": None},
        "peak_memory": dict.fromkeys(("device", "resident")),
    }
    assert (found["schema"], found["kind"], found["status"], found["blocks"]) == (1, "run", "finished", 40)
    assert found["seconds"] == round((16 * 40 - 3) / 16, 3)
    assert found["health"] == [{"block": 12, "start": round(189 / 16, 3), "flags": ["frozen"]}]
    assert found["retries"] == [{"block": 12, "start": round(189 / 16, 3), "attempts": 3}]
    assert found["degenerate"] == [{"block": 20, "start": round(317 / 16, 3), "layers": [1]}]
    assert found["recall"]["most"][0]["block"] == 4  # pinned: by every layer of every later block
    assert found["recall"]["most"][0]["by_blocks"] == 40 - 6
    assert found["memory"]["bytes"]["live"] == layout_of(pins=frozenset({4})).bytes(39).live


def test_one_block_is_explained_by_time_by_number_and_by_layer(run: Path) -> None:
    found = json.loads(ok(str(run), "--at", "0:30.5", "--json"))
    assert (found["kind"], found["block"], found["start"], found["end"]) == ("block", 30, 29.812, 30.812)
    assert json.loads(ok(str(run), "--block", "30", "--json")) == found
    assert keys(found["recalled"]) == [
        dict.fromkeys(
            [
                *("block", "start", "end", "age_seconds", "layers", "of_layers", "pinned"),
                *("score", "relative_score", "best_rank"),
            ]
        )
    ]
    assert set(found) == {
        *("schema", "kind", "run", "block", "start", "end", "prompt", "scene", "retry", "sees", "recalled"),
        *("runners_up", "layers", "why", "pins", "bank_blocks", "slots", "memory", "health", "seconds"),
    }
    assert [(one["partition"], one["block"]) for one in found["sees"]] == [
        ("sink", 0),
        ("sink", 1),
        ("recent", 29),
        ("current", 30),
    ]
    assert [one["layers"] for one in found["recalled"] if one["pinned"]] == [3]
    record = trace.read(run).records[30]
    assert [one["block"] for one in found["recalled"]] == [*record.recalled]
    alone = json.loads(ok(str(run), "--block", "30", "--layer", "1", "--json"))
    assert [one["block"] for one in alone["recalled"]] == [*record.selected[1]]
    assert record.scores is not None
    assert record.partitions is not None
    bank = record.partitions.bank
    by_score = sorted(bank, key=lambda old: (-(record.scores or ())[1][bank.index(old)], -old))  # type: ignore[operator]
    for one in alone["recalled"]:
        assert by_score[one["best_rank"] - 1] == one["block"]
        assert one["score"] == record.scores[1][bank.index(one["block"])]
    assert not {one["block"] for one in alone["runners_up"]} & {*record.selected[1]}


def test_people_read_the_same_as_tables(run: Path) -> None:
    said = ok(str(run))
    for part in (
        "most recalled",
        "block 12 (0:12) frozen",
        "attempt 3 kept",
        "block 20 (0:20) layers 1",
        "denoise",
    ):
        assert part in said
    said = ok(str(run), "--block", "30")
    assert (
        "Of 24 blocks in the bank each layer took the 4 whose keys fit the queries of block 29 best." in said
    )
    assert "pinned" in said
    assert "Recalled by layer 2" in ok(str(run), "--block", "30", "--layer", "2")
    assert "Nothing was recalled" in ok(str(run), "--block", "0")


def test_two_runs_are_compared_where_they_part(run: Path, tmp_path: Path) -> None:
    same = json.loads(ok(str(run), "--compare", str(run), "--json"))
    assert set(same) == {
        *("schema", "kind", "runs", "settings", "blocks", "common_blocks"),
        *("selection", "memory", "timings", "health", "notes"),
    }
    assert same["selection"] == {"first_difference": None, "overlap": 1.0}
    assert same["memory"]["first_difference"] is None
    assert same["timings"]["denoise"]["ratio"] == 1.0
    changes = {9: {"selected": ((2, 3, 4, 5), (2, 3, 4, 5), (2, 3, 4, 5))}}
    other = synthetic_run(
        tmp_path / "other", 30, layout=layout_of(pins=frozenset({4}), bank=20), changes=changes, seed=0
    )
    found = json.loads(ok(str(run), "--compare", str(other), "--json"))
    assert found["selection"]["first_difference"]["block"] == 9
    assert found["selection"]["first_difference"]["selected"][1] == [2, 3, 4, 5]
    assert found["common_blocks"] == 30
    assert same["settings"] == found["settings"] == []
    assert found["memory"]["first_difference"]["block"] == 24  # 2 sinks, 1 recent, 20 in the bank until then
    assert found["health"]["unhealthy"] == [1, 0]
    assert found["health"]["first_difference"]["block"] == 12
    assert "from block 9 (0:09) on, layer" in ok(str(run), "--compare", str(other))


def test_a_run_that_ended_is_followed_to_its_end(run: Path) -> None:
    lines = ok(str(run), "--follow").splitlines()
    assert len(lines) == 40
    assert lines[12].startswith("block 12 0:12 | recalled ")
    assert lines[12].endswith("attempt 3 | FROZEN")
    events = [json.loads(line) for line in ok(str(run), "--follow", "--json").splitlines()]
    assert [event["event"] for event in events] == ["block"] * 40 + ["end"]
    assert events[-1] == {"event": "end", "status": "finished", "blocks": 40, "length": 40}
    assert events[7]["block"] == 7


def test_a_growing_run_is_followed_live_until_ctrl_c(run: Path) -> None:
    whole = (run / trace.FILE).read_bytes().splitlines(keepends=True)
    (run / trace.FILE).write_bytes(b"".join(whole[:3]))
    with RunFolder.open(run):  # somebody is at work
        follower = subprocess.Popen(
            [sys.executable, "-m", "packforcing_cli", "inspect-cache", str(run), "--follow"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert follower.stdout is not None
        assert [follower.stdout.readline().split(" | ")[0] for _ in range(3)] == [
            f"block {n} 0:0{n}" for n in range(3)
        ]
        with (run / trace.FILE).open("ab") as file:
            file.write(whole[3][:50])
            file.flush()
            time.sleep(0.5)
            file.write(whole[3][50:])
        assert follower.stdout.readline().startswith("block 3 0:03 | ")
        follower.send_signal(signal.SIGINT)
        _, errors = follower.communicate(timeout=60)
    assert (follower.returncode, errors) == (130, "")


# -- mistakes -------------------------------------------------------------------------------------------------------


def refuse(*arguments: str) -> str:
    done = run_cli(*arguments)
    assert isinstance(done.exception, UsageError), done.output
    return f"{done.exception.message} {done.exception.hint}"


def test_questions_that_make_no_sense_are_refused_with_the_next_step(run: Path) -> None:
    assert "0 to 39" in refuse(str(run), "--block", "40")
    assert "ends at 39.81 s" in refuse(str(run), "--at", "1:00")
    assert "0:43" in refuse(str(run), "--at", "soon")
    assert "--block 42" in refuse(str(run), "--layer", "1")
    assert "Use 0 to 2" in refuse(str(run), "--block", "5", "--layer", "3")
    assert "Leave --size away" in refuse(str(run), "--size", "64x64")
    assert "exclude" in refuse(str(run), "--follow", "--compare", str(run))
    assert "none is given" in refuse("--follow")
    assert "--fps 0" in refuse("--fps", "0")


def test_runs_without_blocks_or_trace_and_of_newer_versions_say_so(tmp_path: Path) -> None:
    empty = synthetic_run(tmp_path / "empty", 0, length=4, status="running")
    assert "no block yet" in refuse(str(empty))
    bare = synthetic_run(tmp_path / "bare", 3)
    (bare / trace.FILE).unlink()
    with pytest.raises(RunFolderError, match="3 blocks and no trace"):
        inspection.load(bare)
    (bare / trace.FILE).write_text('{"schema": 9, "block": 0}\n')
    assert "schema 9" in refuse(str(bare))


def test_a_truncated_trace_is_read_as_far_as_it_goes_and_says_so(run: Path) -> None:
    path = run / trace.FILE
    path.write_bytes(path.read_bytes()[:-30])
    assert json.loads(ok(str(run), "--json"))["notes"] == [
        "The last line of the trace is cut off and was left out."
    ]
    assert "cut off" in run_cli(str(run)).stderr


INCONSISTENT: dict[str, Any] = {
    "scene": -1,
    "retry": -1,
    "frames": [5, 5],
    "partitions": {"active": 1000},
    "slots": {"sink": [0.0]},
    "tokens": {"current": 0},
    "bytes": {"live": 0},
    "full_bytes": 10**400,
    "selected": [[39]],
    "scores": [[1.0]],
    "degenerate": [99],
    "encode_seconds": float("inf"),
}


@pytest.mark.parametrize("name", [*INCONSISTENT, "tokens without names", "bytes without names"])
def test_a_line_that_contradicts_itself_is_left_out_and_said(run: Path, name: str) -> None:
    path = run / trace.FILE
    lines = path.read_text().splitlines()
    line = json.loads(lines[30])
    if name in INCONSISTENT:
        new = INCONSISTENT[name]
        line[name] = {**line[name], **new} if isinstance(new, dict) else new
    else:
        line[name.split()[0]] = {}
    lines[30] = json.dumps(line)
    path.write_text("\n".join(lines) + "\n")
    notes = json.loads(ok(str(run), "--json"))["notes"]
    assert notes == [
        "Of the trace, line 31 cannot be read and was left out.",
        "The trace has no line of block 30.",
    ]
    said = "block 30 .* was made, but its line in the trace is missing"
    assert re.search(said, refuse(str(run), "--block", "30"))
    assert re.search(said, refuse(str(run), "--at", "30.0"))


def test_a_scene_beyond_the_prompts_and_a_block_beyond_the_run_break_nothing(run: Path) -> None:
    path = run / trace.FILE
    lines = path.read_text().splitlines()
    lines[30] = json.dumps({**json.loads(lines[30]), "scene": 99})
    path.write_text("\n".join([*lines, '{"block": 100000000, "seconds": {}}']) + "\n")
    assert "red circle" in ok(str(run), "--block", "30")
    found = json.loads(ok(str(run), "--json"))
    assert found["blocks"] == 40
    assert len(found["notes"]) == 1 and "Block 100000000 in the trace cannot be" in found["notes"][0]
    assert len(ok(str(run), "--follow").splitlines()) == 40


def test_why_nothing_is_recalled_names_what_decided_it() -> None:
    first, later = synthetic_record(0, layout_of()), synthetic_record(2, layout_of(), selected=())
    assert "the policy window keeps no" in inspection.why(later, {"policy": "window"})
    assert "the policy sink keeps no" in inspection.why(first, {"policy": "sink"})
    assert "--select none" in inspection.why(later, {"policy": "packforcing", "select": "none"})
    assert "--top-k 0" in inspection.why(later, {"policy": "packforcing", "top_k": 0})
    assert "first block" in inspection.why(first, {"policy": "packforcing", "top_k": 16})
    assert "had left the recent" in inspection.why(later, {"policy": "packforcing", "top_k": 16})


def test_a_trace_of_an_older_version_shows_what_it_has(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "run", 4)
    old = [
        {"block": n, "seconds": {"denoise": 0.5}, "cache": {"active": [[2]] if n == 3 else [[]]}}
        for n in range(4)
    ]
    (run / trace.FILE).write_text("".join(json.dumps(line) + "\n" for line in old))
    found = json.loads(ok(str(run), "--json"))
    assert (found["memory"], found["slots"], found["blocks"]) == (None, None, 4)
    assert found["stages"]["stages"] == {"denoise": {"seconds": 0.5, "share": 1.0}}
    assert "older version" in found["notes"][0]
    assert "0:01.8–0:02.8" in ok(str(run), "--block", "3")


def test_a_run_that_is_being_made_can_be_looked_at(run: Path) -> None:
    with RunFolder.open(run):
        assert "running" in ok(str(run))
        assert json.loads(ok(str(run), "--json"))["status"] == "running"


def test_the_plan_takes_another_rate_and_prints_the_papers_figures() -> None:
    paper = ("--model", "wan2.1-1.3b", "--frames-per-block", "4", "--size", "832x480", "--seconds", "120")
    said = ok(*paper)
    for figure in ("6,240", "182", "27,872", "184,320 bytes a token", "138.0 GB", "3.99 GB"):
        assert figure in said
    slow, fast = (json.loads(ok(*paper, "--fps", fps, "--json")) for fps in ("16", "24"))
    assert (slow["fps"], fast["fps"]) == (16, 24)
    assert fast["blocks"] == 180 == slow["blocks"] * 3 // 2


def test_looking_at_a_run_loads_no_torch(run: Path) -> None:
    code = (
        "import sys\nfrom packforcing_cli.cli import main\n"
        f"try:\n    main(['inspect-cache', {str(run)!r}])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'torch', 'av', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
