"""Blocks that are finished while the next one is denoised: the same videos, in another order of work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import recorded
import torch
from test_runfolder import folder_of, latents, packets
from test_runfolder import make as to_file
from tiny import embeds, video_model

from packforcing_cli import rollout
from packforcing_cli.beside import ORDER, RUN, Beside, Faster, Stopwatch, memory_allows
from packforcing_cli.config import GenerateRequest, MemoryOptions
from packforcing_cli.errors import DiskFullError, GenerationError, UnhealthyError, UsageError
from packforcing_cli.past import PastBlock
from packforcing_cli.prompts import Prompt, Story
from packforcing_cli.reader import VideoReader
from packforcing_cli.registry import VideoModel
from packforcing_cli.rollout import Block, stream_generate
from packforcing_cli.runfolder import RunFolder
from packforcing_cli.timeline import Script
from packforcing_cli.video import VideoWriter, part_path

torch.set_num_threads(1)

BLOCKS = 8
USUAL = {"mid_span": "block", "top_k": 2, "bank": 3}


@pytest.fixture(scope="module")
def model() -> VideoModel:
    return video_model()


def story(model: VideoModel, **options: Any) -> Story:
    script = Script(("a", "b"), starts=(0, 5), blends=(0, 0), **options)
    return Story(script, tuple(Prompt(text, embeds(n, model.dtype)) for n, text in enumerate(script.prompts)))


def make(model: VideoModel, memory: dict[str, Any], *, overlap: bool, **options: Any) -> list[Block]:
    told = options.pop("story", None) or story(model)
    chosen = MemoryOptions(**{**USUAL, **memory})
    return list(
        stream_generate(model, told, num_blocks=BLOCKS, seed=1, memory=chosen, overlap=overlap, **options)
    )


def require_equal(some: list[Block], others: list[Block]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.index == other.index
        assert torch.equal(one.frames, other.frames)
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.selected, other.selected)
        assert (one.cache, one.replayed, one.recalled) == (other.cache, other.replayed, other.recalled)
        records = [{**block.record.to_json(), "seconds": {}, "memory": {}} for block in (one, other)]
        assert records[0] == records[1]


@pytest.mark.parametrize(
    "memory",
    [
        {},
        {"select": "affinity"},
        {"compressor": "lr", "recent_blocks": 2},
        {"compressor": "pool"},
        {"compressed_context": "history"},
        {"rope_adjustment": False},
        {"policy": "window"},
    ],
    ids=lambda memory: " ".join(f"{name}={value}" for name, value in memory.items()) or "usual",
)
def test_a_block_finished_late_is_the_same(model: VideoModel, memory: dict[str, Any]) -> None:
    require_equal(make(model, memory, overlap=True), make(model, memory, overlap=False))


def test_cuts_and_pins_are_the_same(model: VideoModel) -> None:
    """The block before a cut is remembered at once: the next one's context needs it in the bank."""
    told = story(model, cuts=(4, 6), pins=frozenset({2}))
    require_equal(make(model, {}, overlap=True, story=told), make(model, {}, overlap=False, story=told))


def test_recorded_passes_of_late_blocks_give_the_same_video(model: VideoModel) -> None:
    """Between the passes over a block the one over the compressed tokens of the block before is replayed."""
    late = video_model()
    late.transformer.record_passes(recorded.record)
    require_equal(make(late, {}, overlap=True), make(model, {}, overlap=False))
    assert late.transformer._recordings is not None
    assert late.transformer._recordings.replays > 0


def test_each_block_is_finished_while_the_next_is_denoised(
    model: VideoModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the first, whose frames somebody waits for, and the last."""
    order: list[str] = []
    denoise = rollout.denoise_block

    def spy(*args: Any, **options: Any) -> Any:
        order.append(f"denoise {options['block']}")
        return denoise(*args, **options)

    monkeypatch.setattr(rollout, "denoise_block", spy)
    for late in (False, True):
        order.clear()
        for block in stream_generate(
            model, story(model), num_blocks=4, seed=1, memory=MemoryOptions(**USUAL), overlap=late
        ):
            order.append(f"block {block.index}")
        expected = [f"{what} {n}" for n in range(4) for what in ("denoise", "block")]
        if late:
            expected = ["denoise 0", "block 0", "denoise 1", "denoise 2", "block 1", "denoise 3", "block 2"]
            expected += ["block 3"]
        assert order == expected


def test_the_state_of_a_late_block_goes_on_to_the_same_video(model: VideoModel) -> None:
    whole, state = [], None
    for block in stream_generate(
        model, story(model), num_blocks=BLOCKS, seed=1, memory=MemoryOptions(**USUAL), overlap=True
    ):
        whole.append(block)
        if block.index == 4:
            state = block.state()
    assert state is not None
    rest = make(model, {}, overlap=True, state=state)
    assert [block.index for block in rest] == [5, 6, 7]
    require_equal(rest, whole[5:])
    require_equal(make(model, {}, overlap=False, state=state), whole[5:])


def test_blocks_that_are_there_already_are_the_same(model: VideoModel) -> None:
    made = make(model, {}, overlap=False)
    past = [PastBlock(block.latents, block.selected) for block in made[:5]]
    again = make(model, {}, overlap=True, past=past)
    assert [block.replayed for block in again] == [True] * 5 + [False] * 3
    for one, other in zip(again, made, strict=True):
        assert torch.equal(one.frames, other.frames)
        assert torch.equal(one.latents, other.latents)


@pytest.mark.parametrize("select", ["affinity", "affinity-recent"])
def test_what_a_block_recalls_is_shown_after_the_pass_that_chose_it(
    model: VideoModel, monkeypatch: pytest.MonkeyPatch, select: str
) -> None:
    """Of a block that was not denoised here and has no recorded ids that is the clean pass."""
    said: list[str] = []
    commit = model.transformer.commit

    class Marking(Beside):
        def mark(self) -> Any:
            made = super().mark()
            made.after_clean = sum(line == "clean" for line in said)  # type: ignore[attr-defined]
            return made

        @contextmanager
        def work(self, *reads: Any, since: Any = None) -> Iterator[None]:
            if since is not None:
                said.append(f"shown since {since.after_clean}")
            with super().work(*reads, since=since):
                yield

    def spy(*args: Any) -> Any:
        said.append("clean")
        return commit(*args)

    made = make(model, {"select": select}, overlap=False)
    past = [PastBlock(block.latents, None if n != 5 else block.selected) for n, block in enumerate(made[:6])]
    monkeypatch.setattr(rollout, "Beside", Marking)
    monkeypatch.setattr(model.transformer, "commit", spy)
    again = make(model, {"select": select}, overlap=True, past=past)
    since = [line.removeprefix("shown since ") for line in said if line != "clean"]
    assert since == ["1", "2", "3", "4", "5", "5", "6", "7"]
    assert all((block.selected >= 0).all() for block in again)
    known = [PastBlock(block.latents, block.selected) for block in again[:6]]
    require_equal(make(model, {"select": select}, overlap=False, past=known)[6:], again[6:])


def test_a_late_block_of_nan_ends_the_video_before_it(
    model: VideoModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoise = rollout.denoise_block

    def spoilt(*args: Any, **options: Any) -> Any:
        return denoise(*args, **options) / (0 if options["block"] == 3 else 1)

    monkeypatch.setattr(rollout, "denoise_block", spoilt)
    seen: list[int] = []
    blocks = stream_generate(
        model, story(model), num_blocks=BLOCKS, seed=1, memory=MemoryOptions(**USUAL), overlap=True
    )
    with pytest.raises(GenerationError, match="block 3"):
        seen.extend(block.index for block in blocks)
    assert seen == [0, 1, 2]


def test_a_guard_that_rejects_blocks_never_waits(model: VideoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    denoise = rollout.denoise_block
    begun = []

    def frozen(*args: Any, **options: Any) -> Any:
        begun.append(options["block"])
        made = denoise(*args, **options)
        return made / 0 if options["block"] == 3 else made

    monkeypatch.setattr(rollout, "denoise_block", frozen)
    with pytest.raises(UnhealthyError):
        make(model, {}, overlap=True, guard="stop")
    assert begun == [0, 1, 2, 3]


class FakeGpu:
    """torch.cuda's streams and events, which write down who waits for whom."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.stream = "model"

    def install(self, patch: pytest.MonkeyPatch) -> None:
        gpu = self

        class Stream:
            def __init__(self, device: Any = None, name: str = "beside") -> None:
                self.name = name

            def wait_event(self, event: Any) -> None:
                gpu.said.append(f"{self.name} waits for {event.at}")

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                self.at = ""

            def record(self, stream: Any) -> None:
                self.at = f"{stream.name} {len(gpu.said)}"
                gpu.said.append(f"mark {self.at}")

            def synchronize(self) -> None:
                gpu.said.append(f"host waits for {self.at}")

            def elapsed_time(self, other: Any) -> float:
                return 5.0

        @contextmanager
        def stream(chosen: Any) -> Iterator[None]:
            before, gpu.stream = gpu.stream, chosen.name
            yield
            gpu.stream = before

        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "stream", stream)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: Stream(name=gpu.stream))


def test_who_waits_for_whom_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work beside begins at the mark, not behind what the model was given since; the host waits only when asked to."""
    gpu, device, x = FakeGpu(), torch.device("cuda", 0), torch.zeros(1)
    gpu.install(monkeypatch)
    beside, watch = Beside(device, used=True), Stopwatch(device)
    clean = beside.mark()
    gpu.said.append("the model goes on")
    with beside.work(x, None, since=clean), watch.stage("decode"):
        assert gpu.stream == "beside"
        done = beside.mark()
    assert gpu.stream == "model"
    beside.hand_over(done, x, None)
    with watch.stage("trace", on_host=True):
        done.wait()
    with beside.work():
        pass
    assert gpu.said == [
        "mark model 0",
        "the model goes on",
        "beside waits for model 0",
        "mark beside 3",
        "mark beside 4",
        "mark beside 5",
        "model waits for beside 4",
        "host waits for beside 4",
        "mark model 8",
        "beside waits for model 8",
    ]
    assert watch.seconds["decode"] == 0.005
    assert gpu.said[-1] == "host waits for beside 5"
    assert watch.seconds["decode"] == 0.005  # once


def test_in_order_a_gpu_has_one_line_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, device = FakeGpu(), torch.device("cuda", 0)
    gpu.install(monkeypatch)
    beside = Beside(device, used=False)
    with beside.work(torch.zeros(1), since=beside.mark()):
        assert gpu.stream == "model"
        done = beside.mark()
    beside.hand_over(done)
    assert gpu.said == ["mark model 0", "mark model 1"]


def test_a_second_line_is_taken_only_where_as_much_memory_is_free_as_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
    for free, wanted in ((9, False), (10, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 100))
        assert memory_allows(torch.device("cuda", 0)) is wanted


# -- into a file --------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> tuple[list[tuple[bytes, int | None]], torch.Tensor]:
    return packets(folder / "a.mp4"), latents(folder / "run")


@pytest.fixture(scope="module")
def in_order(model: VideoModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("in_order")
    with folder_of(folder / "run", folder / "a.mp4") as run:
        to_file(model, folder / "a.mp4", run, overlap=False)
    return files_of(folder)


def test_a_late_video_stopped_killed_and_resumed_has_the_same_file(
    model: VideoModel, in_order: Any, tmp_path: Path
) -> None:
    """Stopped after block 2, killed (nothing is closed) after block 4, then made to its end."""
    output = tmp_path / "a.mp4"
    with folder_of(tmp_path / "run", output) as run:
        _, result = to_file(model, output, run, overlap=True, stop_after=3)
        assert result is not None
        assert (result.blocks, run.blocks) == (3, 3)
    with RunFolder.open(tmp_path / "run") as run:
        assert to_file(model, output, run, overlap=True, fail_at=4)[1] is None
        assert run.blocks == 5
    with RunFolder.open(tmp_path / "run") as run:
        _, result = to_file(model, output, run, overlap=True)
        assert result is not None
    ours, theirs = files_of(tmp_path), in_order
    assert ours[0] == theirs[0]
    assert torch.equal(ours[1], theirs[1])


def test_a_full_disk_ends_a_late_video_as_such_and_loses_nothing_that_was_made(
    model: VideoModel, in_order: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that encodes meets it; the error comes out of `generate`, and the run goes on later."""
    output, append, written = tmp_path / "a.mp4", VideoWriter._append, []

    def full(self: VideoWriter, data: bytes, **options: Any) -> None:
        written.append(len(data))
        if len(written) == 4:  # the header and two blocks before
            raise DiskFullError("no space left")
        append(self, data, **options)

    with monkeypatch.context() as patch, folder_of(tmp_path / "run", output) as run:
        patch.setattr(VideoWriter, "_append", full)
        with pytest.raises(DiskFullError):
            to_file(model, output, run, overlap=True)
        assert run.blocks >= 3
    assert VideoReader(part_path(output)).num_frames == 13 + 16
    with RunFolder.open(tmp_path / "run") as run:
        to_file(model, output, run, overlap=True)
    ours, theirs = files_of(tmp_path), in_order
    assert ours[0] == theirs[0]
    assert torch.equal(ours[1], theirs[1])


def test_waiting_contradicts_a_guard_that_rejects_blocks() -> None:
    for guard in ("retry", "stop"):
        with pytest.raises(
            UsageError, match=f"--overlap on: guard {guard} must see a block before the next one begins"
        ):
            GenerateRequest(prompt="x", overlap="on", guard=guard)
    assert GenerateRequest(prompt="x", overlap="on").overlap == "on"
    with pytest.raises(UsageError, match="auto, on"):
        GenerateRequest(prompt="x", overlap="yes")


def chosen(times: dict[bool, float], *, slower: float = 0.0, disturbed: int = -1, left_out: int = 0) -> bool:
    """What is found of blocks of these seconds, one of them with a disturbance of ten seconds."""
    now = [0.0]
    chooser = Faster(None, clock=lambda: now[0])
    ways: list[bool] = []
    for block in range(60):
        if left_out and block % left_out == left_out - 1:
            now[0] += 5.0  # finished in order, and nobody asked
            continue
        ways.append(chooser.choose(block))
        now[0] += times[ways[-1]] * (1 + block * slower) + (10.0 if block == disturbed else 0.0)
        if len(ways) > 1 and ways[-1] != ways[-2]:
            now[0] += 0.3  # a block of one way beside one of the other is no measure of either
    assert chooser.wanted is ways[-1]
    assert {True, False} == set(ways[:-3]) | {False}
    return ways[-1]


@pytest.mark.parametrize("late", [0.9, 1.1], ids=["late is faster", "in order is faster"])
def test_the_faster_way_is_found(late: float) -> None:
    times = {False: 1.0, True: late}
    assert chosen(times, slower=0.02) is (late < 1)
    for block in range(RUN * len(ORDER)):
        assert chosen(times, disturbed=block) is (late < 1)
    for often in (4, 5, 7):  # as cuts do: the time over the block that is left out is no block's
        assert chosen(times, left_out=often) is (late < 1)
    assert [Faster(way).choose(0) for way in (True, False)] == [True, False]


def test_blocks_are_not_timed_before_they_take_what_they_will_take() -> None:
    """The compiler and recording fall into blocks before."""
    now = [0.0]
    chooser = Faster(None, clock=lambda: now[0])
    for block in range(7):
        assert not chooser.choose(block, settled=False)
        now[0] += 100.0
    ways = []
    for block in range(7, 7 + RUN * len(ORDER)):
        ways.append(chooser.choose(block))
        assert chooser.wanted is None
        now[0] += 0.9 if ways[-1] else 1.0
    assert ways == [way for way in ORDER for _ in range(RUN)]
    assert chooser.choose(7 + len(ways)) is True


@pytest.mark.parametrize("graphs", [False, True])
def test_the_first_blocks_are_not_timed(
    model: VideoModel, monkeypatch: pytest.MonkeyPatch, graphs: bool
) -> None:
    """Until compressed tokens were passed through the model, and with recordings until a full context was met twice."""
    told: dict[int, bool] = {}
    choose = Faster.choose

    def spy(self: Faster, block: int, *, settled: bool = True) -> bool:
        told[block] = settled
        return choose(self, block, settled=settled)

    monkeypatch.setattr(Faster, "choose", spy)
    make(replace(model, graphs=graphs), {"sink_blocks": 1, "recent_blocks": 1}, overlap=False)
    # Block 1 is the first that is compressed; block 4 has a sink, two compressed blocks and a recent one.
    first = 5 if graphs else 2
    assert told == {block: block >= first for block in range(1, BLOCKS - 1)}
