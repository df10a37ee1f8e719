"""The guard: a block that is not healthy is told, made again or not made; a rejected attempt leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_runfolder import MEMORY, folder_of, latents, packets, prompt
from tiny import video_model
from torch import Tensor

from packforcing_cli import rollout, sampler, trace
from packforcing_cli.errors import GenerationError, UnhealthyError
from packforcing_cli.health import jump_expected
from packforcing_cli.reader import VideoReader
from packforcing_cli.registry import VideoModel
from packforcing_cli.rollout import Block, Result, stream_generate
from packforcing_cli.runfolder import RunFolder
from packforcing_cli.sampler import block_noise
from packforcing_cli.timeline import Script

torch.set_num_threads(1)

BAD = 4  # the block that goes wrong
BLOCKS = 7

Damage = Callable[[Tensor], Tensor]
denoise = sampler.denoise_block


def burnt(x0: Tensor) -> Tensor:
    """Latents that decode to pixels at the ends of the range."""
    return x0 * 1e4


def nan(x0: Tensor) -> Tensor:
    return x0 * torch.nan


@pytest.fixture(scope="module")
def model() -> VideoModel:
    return video_model()


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """spoil(damage, attempts): the first so many attempts at block BAD come out damaged."""

    def arrange(damage: Damage, attempts: int = 1) -> None:
        def spoilt(*args: Any, **options: Any) -> Tensor:
            x0 = denoise(*args, **options)
            return damage(x0) if options["block"] == BAD and options["retry"] < attempts else x0

        monkeypatch.setattr(rollout, "denoise_block", spoilt)

    return arrange


def stream(model: VideoModel, guard: str) -> Iterator[Block]:
    return stream_generate(model, prompt(), num_blocks=BLOCKS, seed=3, memory=MEMORY, guard=guard)


def make(model: VideoModel, output: Path, run: RunFolder | None, guard: str, **options: Any) -> Result:
    seconds = (16 * BLOCKS - 3) / 16
    return rollout.generate(
        model, prompt(), output, seconds=seconds, seed=3, memory=MEMORY, run=run, guard=guard, **options
    )


def test_the_noise_of_a_first_attempt_is_what_it_always_was_and_others_have_their_own() -> None:
    shape = (1, 2, 2, 4, 4)
    first = block_noise(7, 5, 1, shape)
    assert torch.equal(first, block_noise(7, 5, 1, shape, retry=0))
    others = [block_noise(7, 5, 1, shape, retry=n) for n in (1, 2)]
    assert not torch.equal(first, others[0])
    assert not torch.equal(*others)


@pytest.mark.parametrize("damage", [burnt, nan])
def test_a_rejected_attempt_leaves_nothing_behind(
    model: VideoModel, spoil: Callable[..., None], damage: Damage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second_at_once(*args: Any, **options: Any) -> Tensor:
        return denoise(*args, **(options | {"retry": 1 if options["block"] == BAD else 0}))

    monkeypatch.setattr(rollout, "denoise_block", second_at_once)
    expected = list(stream(model, "warn"))
    spoil(damage)
    retried = list(stream(model, "retry"))
    assert [block.retry for block in retried] == [0, 0, 0, 0, 1, 0, 0]
    assert [block.flags for block in retried] == [()] * BLOCKS
    for a, b in zip(expected, retried, strict=True):
        assert torch.equal(a.latents, b.latents)
        assert torch.equal(a.frames, b.frames)
        assert torch.equal(a.selected, b.selected)
    ends = [blocks[-1].state() for blocks in (expected, retried)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_healthy_video_is_the_same_under_every_guard(model: VideoModel) -> None:
    made = [torch.cat([b.frames for b in stream(model, guard)]) for guard in ("warn", "retry", "stop")]
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


def test_warn_keeps_the_block_and_says_so(
    model: VideoModel, spoil: Callable[..., None], tmp_path: Path
) -> None:
    spoil(burnt, 9)
    with folder_of(tmp_path / "run", tmp_path / "a.mp4") as run:
        result = make(model, tmp_path / "a.mp4", run, "warn")
    assert "saturated" in result.unhealthy[BAD]
    assert (result.retries, result.ended, result.stopped) == ({}, "", False)
    kept = trace.read(tmp_path / "run").records[BAD]
    assert kept.health is not None
    assert kept.health.flags == result.unhealthy[BAD]


def test_the_last_of_three_attempts_is_kept(model: VideoModel, spoil: Callable[..., None]) -> None:
    spoil(burnt, 9)
    blocks = list(stream(model, "retry"))
    assert blocks[BAD].retry == 2
    assert "saturated" in blocks[BAD].flags
    spoil(nan, 9)
    with pytest.raises(GenerationError, match=f"block {BAD} came out as NaN") as error:
        list(stream(model, "retry"))
    assert not isinstance(error.value, UnhealthyError)


def test_stop_ends_the_video_before_the_block_finished_and_playable_and_retry_goes_on(
    model: VideoModel, spoil: Callable[..., None], tmp_path: Path
) -> None:
    output = tmp_path / "a.mp4"
    spoil(burnt)
    with folder_of(tmp_path / "run", output) as run:
        result = make(model, output, run, "stop")
        assert result.stopped
        assert result.ended == f"block {BAD} is not healthy: saturated"
        assert (run.blocks, run.record.status) == (BAD, "stopped")
    assert VideoReader(output).num_frames == result.frames == 16 * BAD - 3
    with RunFolder.open(tmp_path / "run") as run:
        whole = make(model, output, run, "retry")
    assert (whole.stopped, whole.retries, whole.frames) == (False, {BAD: 1}, 16 * BLOCKS - 3)


def test_stop_at_the_first_block_leaves_no_file(
    model: VideoModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(rollout, "denoise_block", lambda *a, **o: nan(denoise(*a, **o)))
    with pytest.raises(UnhealthyError, match="block 0"):
        make(model, tmp_path / "a.mp4", None, "stop")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("snapshot_every", [None, 2])
@pytest.mark.parametrize("stop_after", [BAD, BAD + 1])
def test_a_resumed_run_retries_as_an_unbroken_one_bit_for_bit(
    model: VideoModel,
    spoil: Callable[..., None],
    tmp_path: Path,
    snapshot_every: int | None,
    stop_after: int,
) -> None:
    spoil(burnt)
    with folder_of(tmp_path / "whole", tmp_path / "whole.mp4") as run:
        make(model, tmp_path / "whole.mp4", run, "retry")
        assert [entry.retry for entry in run.entries()] == [0, 0, 0, 0, 1, 0, 0]
    output, seen = tmp_path / "a.mp4", list[int]()
    with folder_of(tmp_path / "run", output) as run:
        make(
            model,
            output,
            run,
            "retry",
            snapshot_every=snapshot_every,
            on_block=lambda block, _: seen.append(block.index),
            should_stop=lambda: len(seen) == stop_after,
        )
    with RunFolder.open(tmp_path / "run") as run:
        make(model, output, run, "retry", snapshot_every=snapshot_every)
        assert [entry.retry for entry in run.entries()] == [0, 0, 0, 0, 1, 0, 0]
    assert torch.equal(latents(tmp_path / "run"), latents(tmp_path / "whole"))
    assert packets(output) == packets(tmp_path / "whole.mp4")
    broken, whole = trace.read(tmp_path / "run"), trace.read(tmp_path / "whole")
    assert broken.notes == whole.notes == ()
    for a, b in zip(broken.records, whole.records, strict=True):
        same = ("block", "retry", "partitions", "slots", "bytes", "selected", "scores", "health")
        assert all(getattr(a, name) == getattr(b, name) for name in same)
    lines = (tmp_path / "run" / trace.FILE).read_text().splitlines()
    assert [json.loads(line)["block"] for line in lines] == [*range(BLOCKS)]


def test_a_jump_is_expected_where_the_prompt_changes_and_in_the_block_behind() -> None:
    script = Script(("a", "b", "b"), starts=(0, 3, 10), blends=(0, 0, 2), cuts=(7,))
    expected = [n for n in range(20) if jump_expected(script, n)]
    assert expected == [3, 4, 7, 8, 10, 11, 12]


# -- the health of frames ---------------------------------------------------------------------------------------


def moving(blocks: int = 4, seed: int = 0) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Blocks of a bright square that moves over a shaded, slightly noisy background."""
    draw = np.random.default_rng(seed)
    shade = np.linspace(40, 160, 96)[None, :, None] * np.array([0.6, 0.8, 1.0])
    frames = np.repeat(np.broadcast_to(shade, (64, 96, 3))[None], 16 * blocks, axis=0).copy()
    for t in range(16 * blocks):
        x = 2 * t % 76
        frames[t, 20:40, x : x + 20] = (220, 60, 50)
    frames += draw.normal(0, 2, frames.shape)
    pixels = frames.clip(0, 255).astype(np.uint8)
    return [pixels[16 * n : 16 * n + 16] for n in range(blocks)]


def flags_of(
    blocks: list[np.ndarray[Any, np.dtype[np.uint8]]], *, expected: int = -1
) -> list[tuple[str, ...]]:
    seen, found = None, []
    for n, frames in enumerate(blocks):
        health, seen = trace.measure(frames, seen, jump_expected=n == expected)
        found.append(health.flags)
    return found


def test_moving_frames_are_healthy() -> None:
    assert flags_of(moving(8)) == [()] * 8


@pytest.mark.parametrize("level", [0, 3])
def test_black_frames_are_black_also_with_noise(level: int) -> None:
    blocks = moving()
    noise = np.random.default_rng(1).integers(0, level + 1, blocks[2].shape)
    blocks[2] = noise.astype(np.uint8)
    found = flags_of(blocks)
    assert set(found[2]) == {"black", "jump"} | ({"frozen"} if level == 0 else set())
    assert found[0] == found[1] == ()


def test_a_frame_that_is_shown_again_is_frozen() -> None:
    blocks = moving()
    blocks[2] = np.repeat(blocks[1][-1:], 16, axis=0)
    assert flags_of(blocks) == [(), (), ("frozen",), ()]


def test_burnt_out_and_posterised_frames_are_saturated_and_a_dark_scene_is_not_black() -> None:
    blocks = moving()
    for n in range(1, 4):
        blocks[n] = np.where(blocks[n] > 90, 255, 0).astype(np.uint8)
    assert [set(flags) for flags in flags_of(blocks)] == [
        set(),
        {"saturated", "jump"},
        {"saturated"},
        {"saturated"},
    ]
    assert flags_of(blocks[1:]) == [()] * 3  # a style: it was so from the start
    white = [np.full_like(frames, 255) for frames in blocks]
    assert flags_of(white) == [("frozen", "saturated")] * 4
    dark = [(frames // 6).astype(np.uint8) for frames in moving()]
    assert flags_of(dark) == [()] * 4


def test_another_scene_is_a_jump_unless_it_is_expected() -> None:
    blocks = moving()
    blocks[2:] = [255 - frames for frames in blocks[2:]]
    assert flags_of(blocks) == [(), (), ("jump",), ()]
    assert flags_of(blocks, expected=2) == [()] * 4
    inside = moving()
    inside[2][5:] = 255 - inside[2][5:]  # a reset in the middle of a block
    inside[3] = 255 - inside[3]
    assert flags_of(inside) == [(), (), ("jump",), ()]


def test_one_frame_alone_has_no_motion() -> None:
    health, seen = trace.measure(moving()[0][:1])
    assert (health.motion, health.jump, health.flags) == (None, None, ())
    assert trace.measure(255 - moving()[0][:1], seen)[0].flags == ("jump",)
