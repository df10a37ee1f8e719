"""The run folder: nothing that was reported done is lost, and going on equals never having stopped."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import re
import runpy
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import embeds, video_model
from torch import Tensor

from packforcing_cli import __version__, continuation, durable, finishing, rollout, runfolder, sameness
from packforcing_cli.cli import resume as resuming
from packforcing_cli.cli.progress import Display
from packforcing_cli.config import GenerateRequest, MemoryOptions
from packforcing_cli.errors import LockedError, PackforcingError, RunFolderError, UsageError, VideoError
from packforcing_cli.layout import Lengths
from packforcing_cli.past import PastBlock
from packforcing_cli.prompts import Prompt, Story
from packforcing_cli.reader import VideoReader
from packforcing_cli.registry import VideoModel
from packforcing_cli.rollout import stream_generate
from packforcing_cli.runfolder import Record, RunFolder
from packforcing_cli.timeline import Script, Timeline, parse_at, parse_pins
from packforcing_cli.video import VideoWriter, part_path

torch.set_num_threads(1)

BLOCKS = 7
MEMORY = MemoryOptions(top_k=2, bank=3, mid_span="1")


@pytest.fixture(scope="module")
def model() -> VideoModel:
    return video_model()


def record(**changes: Any) -> Record:
    changes = {"id": runfolder.new_id("a red circle"), **changes}
    values: dict[str, Any] = {
        "schema": 1,
        "version": __version__,
        "created": datetime.now(UTC),
        "prompt": "made up",
        "output": "/nowhere/a.mp4",
        "blocks": BLOCKS,
        "fps": 16,
        "size": (64, 64),
        "frames_per_block": 4,
        "request": GenerateRequest(prompt="made up", seed=3).to_values(),
        "tags": {"run": changes["id"], "prompt": "made up"},
        "must": {"model": "tiny", "torch": "2"},
        "numerics": {"device": "cpu"},
    }
    return Record(**(values | changes))


def prompt(seed: int = 0) -> Prompt:
    return Prompt("made up", embeds(seed))


def folder_of(path: Path, output: Path, **changes: Any) -> RunFolder:
    return RunFolder.create(path, record(output=str(output), **changes))


def make(
    model: VideoModel,
    output: Path,
    run: RunFolder | None,
    *,
    stop_after: int | None = None,
    fail_at: int | None = None,
    memory: MemoryOptions = MEMORY,
    blocks: int = BLOCKS,
    seed: int = 3,
    **options: Any,
) -> tuple[list[Tensor], rollout.Result | None]:
    """Frames of every block that went by, by block, and the result; None if it was broken off."""
    frames: list[Tensor] = []

    def on_block(block: rollout.Block, _: float) -> None:
        frames.append(block.frames)
        if block.index == fail_at:
            raise KeyboardInterrupt

    try:
        result = rollout.generate(
            model,
            options.pop("prompt", prompt()),
            output,
            seconds=(16 * blocks - 3) / 16,
            seed=seed,
            memory=memory,
            run=run,
            on_block=on_block,
            should_stop=lambda: stop_after is not None and len(frames) >= stop_after,
            **options,
        )
    except KeyboardInterrupt:
        return frames, None
    return frames, result


def packets(path: Path) -> list[tuple[bytes, int | None]]:
    with av.open(str(path)) as container:
        return [(bytes(p), p.pts) for p in container.demux(video=0) if p.size]


def latents(run: Path) -> Tensor:
    with RunFolder.open(run) as opened:
        return torch.cat([entry.latents for entry in opened.entries()])


@pytest.fixture(scope="module")
def unbroken(model: VideoModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run and the video of a generation nothing happened to."""
    folder = tmp_path_factory.mktemp("unbroken")
    with folder_of(folder / "run", folder / "a.mp4") as run:
        make(model, folder / "a.mp4", run)
        assert run.record.status == "finished"
    return folder


# -- going on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["affinity-recent", "affinity", "random", "fifo"])
def test_replayed_blocks_leave_the_same_memory_bit_for_bit(model: VideoModel, select: str) -> None:
    options: dict[str, Any] = {
        "num_blocks": BLOCKS,
        "seed": 3,
        "memory": MEMORY.model_copy(update={"select": select}),
    }
    whole, states = [], []
    for block in stream_generate(model, prompt(), **options):
        whole.append(block)
        states.append(block.state())
    past = [PastBlock(block.latents, block.selected) for block in whole[:4]]
    again = list(stream_generate(model, prompt(), past=past, **options))
    from_state = list(stream_generate(model, prompt(), past=past[3:], state=states[2], **options))
    assert [block.replayed for block in again] == [True] * 4 + [False] * 3
    assert [block.index for block in from_state] == [3, 4, 5, 6]
    for made in (again, from_state):
        for block in made:
            first = whole[block.index]
            assert torch.equal(block.latents, first.latents)
            assert torch.equal(block.frames, first.frames)
            assert torch.equal(block.selected, first.selected)
    last = again[-1].state()
    assert last.keys() == states[-1].keys() == from_state[-1].state().keys()
    assert all(torch.equal(last[name], states[-1][name]) for name in last)
    assert all(torch.equal(last[name], value) for name, value in from_state[-1].state().items())


def test_past_blocks_may_bring_their_own_pixels(model: VideoModel) -> None:
    options: dict[str, Any] = {"num_blocks": 4, "seed": 3, "memory": MEMORY}
    first = next(stream_generate(model, prompt(), **options))
    pixels = torch.zeros(1, 3, 13, 64, 64)
    past = [PastBlock(first.latents, pixels=pixels)]
    black = next(stream_generate(model, prompt(), past=past, **options))
    assert black.frames.shape == (13, 64, 64, 3) and not black.frames.any()
    assert torch.equal(black.latents, first.latents)


@pytest.mark.parametrize("snapshot_every", [None, 2])
@pytest.mark.parametrize("end", ["stopped", "broken off", "without its video"])
def test_a_resumed_run_equals_an_unbroken_one(
    end: str, snapshot_every: int | None, model: VideoModel, unbroken: Path, tmp_path: Path
) -> None:
    output = tmp_path / "a.mp4"
    with folder_of(tmp_path / "run", output) as run:
        how = {"stop_after": 5} if end == "stopped" else {"fail_at": 4}
        make(model, output, run, snapshot_every=snapshot_every, **how)
        assert run.blocks == 5
        assert run.record.status == ("stopped" if end == "stopped" else "running")
    if end == "without its video":
        part_path(output).unlink()
    with RunFolder.open(tmp_path / "run") as run:
        assert not finishing.finish(run)
        frames, result = make(model, output, run)
        assert result is not None
        assert (result.blocks, result.frames, result.replayed, result.stopped) == (7, 109, 5, False)
        instant = snapshot_every and end != "without its video"
        assert len(frames) == (3 if instant else 7)  # blocks 4, 5, 6 after a snapshot of 4
        assert run.record.status == "finished"
        assert finishing.finish(run)
    assert torch.equal(latents(tmp_path / "run"), latents(unbroken / "run"))
    assert packets(output) == packets(unbroken / "a.mp4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "run"]


def test_stopping_again_and_again_makes_every_frame_once(
    model: VideoModel, unbroken: Path, tmp_path: Path
) -> None:
    output = tmp_path / "a.mp4"
    folder_of(tmp_path / "run", output).close()
    for stop_after in (2, 3, 4, 6, None):
        with RunFolder.open(tmp_path / "run") as run:
            make(model, output, run, stop_after=stop_after)
        assert VideoReader(output).num_frames == 16 * (stop_after or BLOCKS) - 3
    assert packets(output) == packets(unbroken / "a.mp4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "run"]


@pytest.mark.parametrize("name", ["a.mkv", "a.mov"])
def test_other_containers_are_continued_packet_by_packet(
    name: str, model: VideoModel, tmp_path: Path
) -> None:
    for folder, stops in (("whole", (None,)), ("parts", (2, 4, None))):
        (tmp_path / folder).mkdir()
        folder_of(tmp_path / folder / "run", tmp_path / folder / name).close()
        for stop_after in stops:
            with RunFolder.open(tmp_path / folder / "run") as run:
                make(model, tmp_path / folder / name, run, stop_after=stop_after)
    assert len(packets(tmp_path / "whole" / name)) == 109
    assert packets(tmp_path / "parts" / name) == packets(tmp_path / "whole" / name)


def test_stopping_while_it_replays_keeps_what_the_video_has(model: VideoModel, tmp_path: Path) -> None:
    output = tmp_path / "a.mp4"
    with folder_of(tmp_path / "run", output) as run:
        make(model, output, run, fail_at=4)
    with RunFolder.open(tmp_path / "run") as run:
        _, result = make(model, output, run, stop_after=2)
        assert result is not None
        assert (result.blocks, result.frames, result.stopped) == (5, 77, True)
    assert VideoReader(output).num_frames == 77


def test_a_video_of_somebody_else_is_never_replaced(model: VideoModel, tmp_path: Path) -> None:
    output = tmp_path / "a.mp4"
    with folder_of(tmp_path / "run", output) as run:
        make(model, output, run, stop_after=3)
    with folder_of(tmp_path / "other", tmp_path / "b.mp4") as run:
        make(model, tmp_path / "b.mp4", run, fail_at=2)
    (tmp_path / "b.mp4").write_bytes(b"mine")
    with RunFolder.open(tmp_path / "other") as run, pytest.raises(UsageError, match="exists"):
        make(model, tmp_path / "b.mp4", run)
    assert (tmp_path / "b.mp4").read_bytes() == b"mine"
    (tmp_path / "b.mp4").unlink()
    part_path(tmp_path / "b.mp4").rename(part_path(output))
    with RunFolder.open(tmp_path / "run") as run, pytest.raises(UsageError, match="interrupted run left it"):
        make(model, output, run)
    assert VideoReader(output).num_frames == 45
    assert VideoReader(part_path(output)).num_frames == 45


def test_a_part_of_another_encoder_is_refused_and_kept(model: VideoModel, tmp_path: Path) -> None:
    output = tmp_path / "a.mp4"
    with folder_of(tmp_path / "run", output) as run:
        make(model, output, run, fail_at=3)
        before = part_path(output).read_bytes()
        with pytest.raises(VideoError, match="another version of the encoder") as caught:
            make(model, output, run, crf=30)
        assert "-o" in caught.value.hint
        assert part_path(output).read_bytes() == before
        make(model, output, run, stop_after=4)
        before = output.read_bytes()
        with pytest.raises(VideoError, match="another version of the encoder"):
            make(model, output, run, crf=30)
    assert output.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "run"]


def test_a_finished_run_whose_file_was_not_yet_noted_needs_no_model(
    model: VideoModel, unbroken: Path, tmp_path: Path
) -> None:
    output = tmp_path / "a.mp4"
    with folder_of(tmp_path / "run", output) as run:
        make(model, output, run, fail_at=BLOCKS - 1)  # all blocks are there, the file is not finished
        assert run.record.status == "running"
    with RunFolder.open(tmp_path / "run") as run:
        assert finishing.finish(run)
        run.update(status="running", frames=0)
    with RunFolder.open(tmp_path / "run") as run:
        assert finishing.finish(run)
        assert (run.record.status, run.record.frames) == ("finished", 109)
    assert packets(output) == packets(unbroken / "a.mp4")


# -- extending ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopped_before", [False, True])
@pytest.mark.parametrize("where", ["before", "behind"])
def test_a_file_that_does_not_say_whose_it_is_is_known_when_it_has_its_name(
    where: str, stopped_before: bool, model: VideoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without tags a kill right before or right behind the last rename must not lock the run out of its own file."""

    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "a.mp4"
    with folder_of(tmp_path / "run", output, tags={}) as run:
        if stopped_before:
            make(model, output, run, stop_after=3, metadata={})
            assert (run.record.frames, run.record.closing) == (45, 0)
        with monkeypatch.context() as patch:
            if where == "before":
                patch.setattr(VideoWriter, "close", lambda writer: kill(writer.abort()))
            else:
                patch.setattr(finishing, "close_run", kill)
            assert make(model, output, run)[1] is None
    assert output.exists() is (stopped_before or where == "behind")
    with RunFolder.open(tmp_path / "run") as run:
        assert (run.record.status, run.record.closing) == (
            "running" if not stopped_before else "stopped",
            109,
        )
        assert finishing.finish(run)
        assert (run.record.status, run.record.frames, run.record.closing) == ("finished", 109, 0)
        assert finishing.finish(run)
    assert VideoReader(output).num_frames == 109
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "run"]


@pytest.mark.parametrize("policy", ["packforcing", "full", "window"])
def test_continuing_a_run_equals_the_same_seconds_of_a_longer_one(
    policy: str, model: VideoModel, tmp_path: Path
) -> None:
    memory = MEMORY.model_copy(update={"policy": policy})
    with folder_of(tmp_path / "long", tmp_path / "long.mp4", blocks=10) as run:
        make(model, tmp_path / "long.mp4", run, blocks=10, memory=memory)
    with folder_of(tmp_path / "short", tmp_path / "short.mp4", blocks=5) as run:
        make(model, tmp_path / "short.mp4", run, blocks=5, memory=memory)
        before = {p.name: p.read_bytes() for p in (tmp_path / "short" / "latents").iterdir()}
        new = RunFolder.create(tmp_path / "new", record(blocks=10), source=run, blocks=5)
    with new:
        make(model, tmp_path / "new.mp4", new, blocks=10, memory=memory)
    assert torch.equal(latents(tmp_path / "new"), latents(tmp_path / "long"))
    assert packets(tmp_path / "new.mp4") == packets(tmp_path / "long.mp4")
    assert {p.name: p.read_bytes() for p in (tmp_path / "short" / "latents").iterdir()} == before
    one = "latents/000002.safetensors"
    assert (tmp_path / "new" / one).samefile(tmp_path / "short" / one)  # not copied


def test_a_branch_keeps_the_past_for_the_past(model: VideoModel, tmp_path: Path) -> None:
    with folder_of(tmp_path / "run", tmp_path / "a.mp4") as run:
        make(model, tmp_path / "a.mp4", run, blocks=5)
        new = RunFolder.create(tmp_path / "new", record(blocks=6), source=run, blocks=3)
    script = Script(("made up", "other"), (0, 3), (0, 0))
    options: dict[str, Any] = {"blocks": 6, "prompt": Story(script, (prompt(), prompt(9))), "seed": 8}
    with new:
        make(model, tmp_path / "b.mp4", new, fail_at=4, **options)
    with RunFolder.open(tmp_path / "new") as new:
        make(model, tmp_path / "b.mp4", new, **options)
    joined, source = latents(tmp_path / "new"), latents(tmp_path / "run")
    assert torch.equal(joined[:3], source[:3]) and not torch.equal(joined[3:5], source[3:5])
    assert packets(tmp_path / "b.mp4")[:45] == packets(tmp_path / "a.mp4")[:45]


# -- damage ------------------------------------------------------------------------------------------------------


@pytest.fixture
def five(tmp_path: Path) -> Path:
    """A run folder with five blocks of numbers."""
    with RunFolder.create(tmp_path / "run", record()) as run:
        for n in range(5):
            run.append(
                torch.full((1, 4, 4, 8, 8), float(n)), torch.zeros(2, n, dtype=torch.int64), trace={"n": n}
            )
    return tmp_path / "run"


def test_blocks_come_back_as_they_were(five: Path) -> None:
    with RunFolder.open(five) as run:
        assert [int(entry.latents[0, 0, 0, 0, 0]) for entry in run.entries()] == [0, 1, 2, 3, 4]
        assert run.entry(3).selected.shape == (2, 3)
        assert [line["block"] for line in run.trace()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_torn_last_block_is_dropped_and_an_inner_one_refused_by_name(five: Path, damage: str) -> None:
    def hurt(index: int) -> None:
        path = five / "latents" / f"{index:06d}.safetensors"
        data = bytearray(path.read_bytes())
        data[-9] ^= 1
        path.write_bytes({"cut": bytes(data[:-100]), "flip": bytes(data), "empty": b""}[damage])

    hurt(4)
    with RunFolder.open(five) as run:
        assert (run.blocks, run.dropped) == (4, "000004.safetensors")
        assert (five / "latents" / "000004.safetensors.torn").is_file()  # put aside, until it is made again
        run.append(torch.zeros(1, 4, 4, 8, 8), torch.zeros(2, 4, dtype=torch.int64), trace={})
        assert not list(five.rglob("*.torn"))
        hurt(1)
        with pytest.raises(RunFolderError, match=r"000001.safetensors is damaged") as caught:
            list(run.entries())
        assert "--from" in caught.value.hint
    (five / "latents" / "000002.safetensors").unlink()
    with pytest.raises(RunFolderError, match=r"000002.safetensors is missing"):
        RunFolder.open(five)
    assert not runfolder.look(five).is_live


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_block_that_cannot_be_read_now_is_not_taken_for_torn(
    five: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, real = contents(five), Path.read_bytes

    def fail(path: Path) -> bytes:
        if path.name == "000004.safetensors":
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path)

    for open_run in (RunFolder.open, RunFolder.open_to_read):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", fail)
            with pytest.raises(
                RunFolderError, match=r"000004.safetensors cannot be read: Too many open files"
            ):
                open_run(five)
        assert contents(five) == before
    with RunFolder.open(five) as run:
        assert run.blocks == 5


def test_opened_to_read_nothing_changes_and_what_is_whole_is_there(five: Path) -> None:
    last = five / "latents" / "000004.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    durable.temporary_path(five / "run.json").write_bytes(b"{")
    before = contents(five)
    with RunFolder.open_to_read(five) as run, RunFolder.open_to_read(five) as other:
        assert (run.blocks, run.dropped, run.missing) == (4, "000004.safetensors", "")
        assert other.blocks == 4
        if os.name != "nt":
            with pytest.raises(LockedError):  # nobody may change it meanwhile
                RunFolder.open(five)
    assert contents(five) == before
    (five / "latents" / "000002.safetensors").unlink()
    (five / "lock").unlink()
    with RunFolder.open_to_read(five) as run:
        assert (run.blocks, run.missing) == (2, "000002.safetensors")
    assert not (five / "lock").exists()


def test_files_are_opened_as_bytes_where_the_system_has_text_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "O_BINARY", 0x8000, raising=False)
    assert runpy.run_path(durable.__file__)["BINARY"] == 0x8000


def test_a_torn_line_of_the_trace_and_temporary_files_are_removed(five: Path) -> None:
    with (five / "trace.jsonl").open("a") as file:
        file.write('{"block": 5, "sec')
    durable.temporary_path(five / "run.json").write_bytes(b"{")
    durable.temporary_path(five / "latents" / "000005.safetensors").write_bytes(b"x")
    with RunFolder.open(five) as run:
        run.append(torch.zeros(1, 4, 4, 8, 8), torch.zeros(2, 2, dtype=torch.int64), trace={})
        assert [line["block"] for line in run.trace()] == [0, 1, 2, 3, 4, 5]
    assert not list(five.rglob(".*"))


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        (None, UsageError, "is not a run folder"),
        (b"", RunFolderError, "is damaged"),
        (b"[]", RunFolderError, "no schema number"),
        (b'{"schema": 2, "version": "9.9"}', UsageError, "has schema 2; this version of packforcing reads 1"),
        (b'{"schema": 1}', RunFolderError, "is damaged: id: Field required"),
    ],
)
def test_a_folder_of_another_kind_or_version_is_refused(
    text: bytes | None, kind: type[PackforcingError], said: str, five: Path
) -> None:
    (five / "run.json").unlink()
    if text is not None:
        (five / "run.json").write_bytes(text)
    with pytest.raises(kind, match=said) as caught:
        RunFolder.open(five)
    assert type(caught.value) is kind and caught.value.hint
    assert runfolder.look(five).status == "damaged"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=3,
)
FIELDS = st.sampled_from(sorted(json.loads(record().to_json())))


@settings(max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(st.binary(max_size=40), st.dictionaries(FIELDS, JSON, max_size=2), JSON), st.booleans())
def test_any_header_is_read_or_refused_with_our_error(found: Any, repaired: bool) -> None:
    text = found if isinstance(found, bytes) else json.dumps(found).encode()
    if isinstance(found, dict) and repaired:  # everything else as it should be
        text = json.dumps({**json.loads(record().to_json()), **found}).encode()
    try:
        read = runfolder.parse(text)
    except PackforcingError:  # and no other
        return
    assert runfolder.parse(read.to_json().encode()) == read


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot sync folders")
def test_new_folders_and_files_are_entered_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    real = durable.sync_folder

    def note(folder: Path) -> None:
        synced.append(Path(folder))
        real(folder)

    monkeypatch.setattr(durable, "sync_folder", note)
    durable.make_folder(tmp_path / "a" / "b")
    assert sorted(synced) == [tmp_path, tmp_path / "a"]
    durable.make_folder(tmp_path / "a" / "b")
    assert len(synced) == 2
    RunFolder.create(tmp_path / "runs" / "one", record()).close()
    assert {tmp_path, tmp_path / "runs", tmp_path / "runs" / "one"} <= set(synced)
    synced.clear()
    (tmp_path / "out").mkdir()
    writer = VideoWriter(tmp_path / "out" / "a.mp4", fps=16, width=64, height=64)
    assert synced == [tmp_path / "out"]
    writer.abort()


# -- what a branch shows -----------------------------------------------------------------------------------------


def branch_of(
    *,
    prompt: str | None = None,
    at: tuple[str, ...] = (),
    scenes: tuple[str, ...] = (),
    pins: tuple[str, ...] = (),
) -> Timeline:
    """The timeline of a branch after block 3 (0:02.8125), six blocks long, of a run that had `scenes` and `pins`."""
    had = Timeline(parse_at([text.split(" ", 1) for text in scenes]), parse_pins(pins))
    request = GenerateRequest(prompt="made up", seed=3, seconds=9.0, timeline=had)
    asked = Timeline(parse_at([text.split(" ", 1) for text in at]))
    return continuation.timeline_of(record(request=request.to_values()), 3, 93 / 16, prompt, asked)


def test_what_is_made_already_cannot_be_told_otherwise() -> None:
    for text in ("0:00 red", "0:01 red", "0:02.3 red"):
        with pytest.raises(UsageError, match="the old part is made already") as caught:
            branch_of(at=(text,), scenes=("0:01 blue",))
        assert "0:02.8125" in caught.value.hint
    assert [scene.prompt for scene in branch_of(at=("0:02.8 red",), scenes=("0:01 blue",)).scenes] == [
        "blue",
        "red",
    ]


def test_a_pin_over_the_branch_point_ends_there() -> None:
    pins = ("0:01-0:04", "0:02-0:08", "0:03-0:04")
    cut = [span.text for span in branch_of(prompt="red", pins=pins).pins]
    assert cut == ["0:01-0:02.8125", "0:02-0:02.8125"]
    assert [span.text for span in branch_of(pins=pins).pins] == ["0:01-0:04", "0:02-0:05.8125", "0:03-0:04"]


def test_a_pinned_scene_over_the_branch_point_is_pinned_up_to_there() -> None:
    """Blocks begin at 0, 0.8125, 1.8125 and 2.8125 s, where the branch is."""
    pinned = {
        "0:01 blue [pin 4s]": "2",
        "0:01 blue [pin]": "0",
        "0:01 blue [pin 1s]": "1",
        "0:02 blue [pin 2s]": "1",
    }
    for text, seconds in pinned.items():
        branch = branch_of(prompt="red", scenes=(text,))
        assert branch.scenes[0].pin == Fraction(seconds)
        script = branch.script("a", Lengths(4), fps=16, num_blocks=6, start=0)
        assert script.pins <= {1, 2} and script.starts[-1] == 3
    assert branch_of(scenes=("0:01 blue [pin 8s]",)).scenes[0].pin == 5  # to the end, 0:05.8125
    within_its_blend = branch_of(at=("0:04 red",), scenes=("0:02 blue [blend 1s] [pin 3s]",)).scenes[0]
    assert (within_its_blend.blend, within_its_blend.pin) == (1, None)


@pytest.mark.parametrize("fps", [15, 16, 24, 30])
def test_a_cut_timeline_has_no_frame_more_when_it_is_read_again(fps: int) -> None:
    had = Timeline(parse_at([("0:00.9", "b [pin 3600s]")]), parse_pins(["0:00-1:00:00"]))
    lengths = Lengths(4)
    for blocks in range(3, 12):
        end = Fraction(lengths.frames_for(blocks), fps)
        cut = Timeline.from_json(had.until(end, lengths, fps=fps).to_json())
        assert cut.script("a", lengths, fps=fps, num_blocks=blocks).pins == set(range(blocks))


@pytest.mark.parametrize("more", [(), ("--prompt", "a square"), ("--at", "0:03 a square")])
def test_files_of_the_source_are_not_used_for_what_is_new(
    more: tuple[str, ...], five: Path, run_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunFolder.open(five) as run:
        run.update(request={**run.record.request, "frames": "pictures", "embeddings": "texts"})
    asked: list[GenerateRequest] = []

    def stop(request: GenerateRequest, **_: Any) -> None:
        asked.append(request)
        raise UsageError("far enough")

    monkeypatch.setattr("packforcing_cli.cli.generate.prepare", stop)
    arguments = ("extend", str(five), "--from", "0:02.8125", "--seconds", "2", *more)
    assert "far enough" in run_command(*arguments).err
    assert asked[0].frames is None
    assert asked[0].embeddings == (None if more else Path("texts"))


# -- what resume notes -------------------------------------------------------------------------------------------


def request_of(**changes: Any) -> GenerateRequest:
    """A request for the video that `make` makes with the tiny model."""
    values = {"prompt": "made up", "seed": 3, "seconds": (16 * BLOCKS - 3) / 16, "memory": MEMORY, **changes}
    return GenerateRequest(**values)


def test_resume_notes_nothing_before_it_knows_that_it_goes_on(
    model: VideoModel, tmp_path: Path, run_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of(output=tmp_path / "a.mp4")
    made = sameness.new_record(model, request, tags={})
    made = made.model_copy(update={"status": "stopped", "frames": 29, "must": {"model": "other"}})
    run = RunFolder.create(tmp_path / "run", made)
    elsewhere = request.model_copy(update={"output": tmp_path / "b.mp4"})
    before = contents(run.folder)
    with pytest.raises(UsageError, match="was made with something else"):
        resuming._go_on(run, model, elsewhere, Display(quiet=True), force=False)
    assert contents(run.folder) == before
    run.close()
    before = contents(run.folder)

    def stop(*_: Any, **__: Any) -> None:
        raise UsageError("far enough")

    monkeypatch.setattr("packforcing_cli.cli.generate.prepare", stop)
    assert "far enough" in run_command("resume", str(run.folder), "-o", "b.mp4").err
    assert contents(run.folder) == before
    with RunFolder.open(run.folder) as run:
        run.update(must=sameness.must_be_same(model, request))
        for output, frames in ((tmp_path / "a.mp4", 29), (tmp_path / "b.mp4", 0)):
            now = request.model_copy(update={"output": output})
            resuming._go_on(run, model, now, Display(quiet=True), force=False)
            noted = runfolder.read(run.folder)
            assert (noted.status, noted.output, noted.frames) == ("running", str(output), frames)


def test_a_branch_says_what_it_takes_and_whether_the_machine_is_another(
    model: VideoModel, five: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Display, "note", lambda _, text: said.append(text))
    monkeypatch.setattr(Display, "warn", lambda _, text: said.append(text))
    (five / runfolder.TRACE).unlink()  # the times of the blocks it took over
    with RunFolder.open(five) as run:
        run.append(
            torch.zeros(1, 4, 4, 8, 8),
            torch.zeros(2, 0),
            trace={"seconds": {"denoise": 30.0, "decode": 10.0}},
        )
        run.save_snapshot({"a": torch.zeros(1)})
        resuming.announce(run, model, Display(quiet=False), keep=4, blocks=9)
        assert "not the machine it was (cpu: null then, " in said[0]
        blocks = "4 of 9 blocks are there; 4 to go through again (about 40 s), 5 to make (about 3 min 20 s)"
        assert said[1:] == [f"{run.record.id}: {blocks}"]
        run.update(numerics=sameness.numerics(model))
        resuming.announce(run, model, Display(quiet=False))
        blocks = "6 of 7 blocks are there; 0 to go through again (about 0 s), 1 to make (about 40 s)"
        assert said[2:] == [f"{run.record.id}: {blocks}"]


def test_another_memory_goes_on_when_forced(model: VideoModel, tmp_path: Path) -> None:
    nine: dict[str, Any] = {"output": tmp_path / "a.mp4", "seconds": (16 * 9 - 3) / 16}
    request = request_of(**nine)
    with RunFolder.create(tmp_path / "run", sameness.new_record(model, request, tags={})) as run:
        make(model, tmp_path / "a.mp4", run, stop_after=7, snapshot_every=2, blocks=9)
    smaller = MEMORY.model_copy(update={"top_k": 1})
    now = request_of(**nine, memory=smaller)
    with RunFolder.open(tmp_path / "run") as run:
        assert run.entry(6).selected.shape[1] == 2
        with pytest.raises(UsageError, match="layout top_k: 2 then, 1 now"):
            resuming._go_on(run, model, now, Display(quiet=True), force=False)
        resuming._go_on(run, model, now, Display(quiet=True), force=True)
        assert finishing.replay_cost(run).blocks == 7  # not from the snapshot
        make(model, tmp_path / "a.mp4", run, stop_after=8, memory=smaller, snapshot_every=1, blocks=9)
    with RunFolder.open(tmp_path / "run") as run:
        resuming._go_on(run, model, now, Display(quiet=True), force=False)  # it is as it was, by now
        assert finishing.replay_cost(run).blocks == 0
        frames, result = make(model, tmp_path / "a.mp4", run, memory=smaller, blocks=9)
        assert result is not None and (len(frames), result.blocks) == (1, 9)
        assert run.entry(8).selected.shape[1] == 1
    with RunFolder.open_to_read(tmp_path / "run") as old:
        job = SimpleNamespace(
            request=now.model_copy(update={"metadata": False}), path=tmp_path / "b.mp4", place="x", facts=None
        )
        job.facts = SimpleNamespace(name="x")
        branch = continuation.branch(old, 8, job, model, tmp_path / "branch", other_memory=7)
        make(model, tmp_path / "b.mp4", branch, memory=smaller, blocks=9)
        branch.close()


# -- the lock ----------------------------------------------------------------------------------------------------


def test_two_processes_never_work_on_one_folder(five: Path) -> None:
    with RunFolder.open(five) as run:
        assert runfolder.look(five).is_live
        with pytest.raises(LockedError, match=f"process {os.getpid()} on .* is working on") as caught:
            RunFolder.open(five)
        assert caught.value.exit_code == 9
        with pytest.raises(LockedError):
            runfolder.remove(runfolder.look(five))
        assert run.blocks == 5
    RunFolder.open(five).close()


def test_a_stale_lock_is_taken_over_here_and_named_when_it_is_of_another_machine(five: Path) -> None:
    lock = five / "lock"
    for text in (json.dumps({"pid": 1, "host": socket.gethostname()}), '{"pi', ""):
        lock.write_text(text)
        assert not runfolder.look(five).is_live
        RunFolder.open(five).close()
    lock.write_text(json.dumps({"pid": 7, "host": "elsewhere"}))
    with pytest.raises(LockedError, match="locked by process 7 on elsewhere") as caught:
        RunFolder.open(five)
    assert caught.value.hint.endswith(f"rm {lock}")
    lock.unlink()
    RunFolder.open(five).close()


# -- where they are ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["elsewhere", socket.gethostname()])
def test_of_a_process_that_is_known_to_be_gone_the_lock_of_elsewhere_goes(host: str, tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    runfolder.remove_lock_of_elsewhere(tmp_path)  # there is none
    lock.write_text(json.dumps({"pid": 7, "host": host}), encoding="utf-8")
    runfolder.remove_lock_of_elsewhere(tmp_path)
    assert lock.exists() == (host != "elsewhere")
    with runfolder.hold(tmp_path):  # a process that lives keeps it
        runfolder.remove_lock_of_elsewhere(tmp_path)
        with pytest.raises(LockedError), runfolder.hold(tmp_path):
            pass


def test_runs_are_found_by_id_beginning_and_folder_also_elsewhere(tmp_path: Path) -> None:
    root = runfolder.default_root()
    assert runfolder.all_runs() == []
    a, b = record(id="20260101-000000-a"), record(id="20260102-000000-b")
    RunFolder.create(root / a.id, a).close()
    RunFolder.create(tmp_path / "b", b).close()
    assert [run.name for run in runfolder.all_runs()] == [a.id, b.id]
    assert runfolder.find(b.id) == runfolder.find("20260102") == runfolder.find(str(tmp_path / "b"))
    with pytest.raises(UsageError, match="several runs begin with '2026'"):
        runfolder.find("2026")
    for name in ("x", str(tmp_path)):
        with pytest.raises(UsageError) as caught:
            runfolder.find(name)
        assert "runs list" in caught.value.hint
    for run in runfolder.all_runs():
        runfolder.remove(run)
    assert list(root.iterdir()) == []
    assert not (tmp_path / "b").exists()


def test_a_run_is_found_without_looking_through_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, a, b = runfolder.default_root(), record(id="a-1"), record(id="b-1")
    RunFolder.create(root / a.id, a).close()
    RunFolder.create(tmp_path / "b", b).close()
    (root / "old.where").write_text(str(tmp_path / "b"))  # another run has taken its place
    (root / "renamed").mkdir()
    RunFolder.create(root / "renamed", record(id="c-1")).close()

    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(runfolder, "look", fail)
    assert runfolder.folder_of("a-1") == runfolder.find("a-") == root / "a-1"
    assert runfolder.folder_of("b-1") == runfolder.find("b") == tmp_path / "b"
    assert runfolder.find("c-1") == root / "renamed"
    for name in ("old", "a", "", "../runs/a-1", "none"):
        assert runfolder.folder_of(name) is None


def test_a_run_at_work_is_looked_at_while_its_files_come_and_go(
    five: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = Path.stat, set()

    def stat(path: Path, **options: Any) -> os.stat_result:
        found = real(path, **options)
        if path.name in ("trace.jsonl", "000001.safetensors") and path not in left:
            left.add(path)
            path.unlink()
        return found

    monkeypatch.setattr(Path, "stat", stat)
    assert runfolder.look(five).size_bytes > 0
    assert len(left) == 2


def test_what_a_kill_left_of_a_run_it_was_making_is_swept_up() -> None:
    root = runfolder.default_root()
    fresh, old, there = root / "fresh", root / "old", record()
    for folder in (fresh, old):
        (folder / "latents").mkdir(parents=True)
    RunFolder.create(root / there.id, there).close()
    hour = time.time() - 3700
    for folder in (old, root / there.id):
        os.utime(folder, (hour, hour))
    assert [run.name for run in runfolder.all_runs()] == [there.id]
    assert runfolder.remove_leftovers() == 1
    assert sorted(p.name for p in root.iterdir()) == sorted(["fresh", there.id])


@pytest.mark.parametrize("text", ["a red circle " * 400, "…/…", "", "球" * 300, "../../etc", "CON"])
def test_an_id_is_short_and_safe_whatever_the_prompt(text: str) -> None:
    name = runfolder.new_id(text)
    assert record(id=name).id == name
    assert len(name) <= 60


def test_a_run_folder_needs_an_empty_place(five: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(UsageError, match="another run") as caught:
        RunFolder.create(five, record())
    assert "packforcing resume" in caught.value.hint
    for name in ("full", "full/mine"):
        with pytest.raises(UsageError, match="not an empty folder"):
            RunFolder.create(tmp_path / name, record())


@pytest.mark.skipif(os.name == "nt", reason="names are text on Windows")
def test_names_that_are_no_text_are_refused_before_anything_is_made(tmp_path: Path, run_command: Any) -> None:
    odd = os.fsdecode(b"caf\xe9")
    request = GenerateRequest(prompt="x", image=tmp_path / odd).to_values()
    for folder, made in ((tmp_path / odd, record()), (tmp_path / "run", record(request=request))):
        with pytest.raises(UsageError, match="not UTF-8"):
            RunFolder.create(folder, made)
    result = run_command("generate", "x", "-o", f"{odd}.mp4", "--model", "demo")
    assert (result.code, result.out) == (2, "")
    assert r"the output name 'caf\udce9.mp4' is not UTF-8 text" in result.err
    assert list(tmp_path.iterdir()) == []
    assert not runfolder.default_root().exists()


def test_what_changed_is_named(model: VideoModel) -> None:
    request = GenerateRequest(prompt="x", output=Path("a.mp4"), seed=1, seconds=5.0)
    then = sameness.must_be_same(model, request)
    assert json.loads(json.dumps(then)) == then
    longer = request.model_copy(update={"memory": MemoryOptions(top_k=3)})
    assert runfolder.differences(then, sameness.must_be_same(model, longer)) == [
        "layout top_k: 16 then, 3 now"
    ]
    other = replace(model, hashes={"transformer": "ab"})
    assert runfolder.differences(then, sameness.must_be_same(other, request)) == [
        "weights of transformer: null then, ab now"
    ]
    assert runfolder.differences(then, then) == []


def test_a_snapshot_is_a_file_of_the_safetensors_library(tmp_path: Path) -> None:
    """Written through this process's own calls, its bytes are those the library itself would write."""
    from safetensors.torch import load, save

    state = {
        "a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "b": torch.tensor(7),
        "c": torch.randn(3, 4).T,
        "d": torch.empty(0, 4),
        "e": torch.tensor([True, False]),
        "f": torch.tensor([-128, 127], dtype=torch.int8),
    }
    data = b"".join(runfolder._safetensors(state, {"blocks": "3"}))
    assert len(data) == len(
        save({name: tensor.contiguous() for name, tensor in state.items()}, {"blocks": "3"})
    )
    found = load(data)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a number": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "the header": lambda data: data.replace(b'"cache.', b'"cachf.', 1),
    "the count": lambda data: data.replace(b'"blocks":"2"', b'"blocks":"1"', 1),
    "the end": lambda data: data[:-1],
    "all but the beginning": lambda data: data[:20],
    "everything": lambda _: b"",
    "more": lambda data: data + b"0",
    "the hash": lambda data: re.sub(rb'"sha256":"\w{64}"', b'"sha256":' + b"1" * 66, data),
}


@pytest.fixture(scope="module")
def with_snapshot(model: VideoModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was stopped after 3 blocks, with a snapshot after 2."""
    folder = tmp_path_factory.mktemp("snapshot")
    with folder_of(folder / "run", folder / "a.mp4") as run:
        make(model, folder / "a.mp4", run, fail_at=2, snapshot_every=2)
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_snapshot_is_noticed_whatever_is_wrong_with_it(
    damage: str, with_snapshot: Path, tmp_path: Path
) -> None:
    shutil.copytree(with_snapshot / "run", tmp_path / "run")
    path = tmp_path / "run" / "snapshot.safetensors"
    with RunFolder.open(tmp_path / "run") as run:
        assert (run.snapshot_blocks(), run.snapshot_problem) == (2, "")
        data = path.read_bytes()
        broken = DAMAGE[damage](data)
        assert broken != data
        path.write_bytes(broken)
        os.utime(path, (1, 1))
        assert run.snapshot_blocks() == 0
        assert run.snapshot_problem == f"{path} is damaged: its contents are not what was written"


def test_without_its_snapshot_a_run_goes_on_from_its_blocks(
    model: VideoModel, with_snapshot: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot is as good as the blocks; a damaged one, and one of an older version, is left alone, and said."""
    sound, old = (shutil.copytree(with_snapshot, tmp_path / name) for name in ("sound", "old"))
    told: list[str] = []
    for name in ("note", "warn"):
        monkeypatch.setattr(Display, name, lambda _, text: told.append(text))
    state = safetensors.torch.load_file(old / "run" / "snapshot.safetensors")
    safetensors.torch.save_file(state, old / "run" / "snapshot.safetensors", {"blocks": "2"})
    for folder, replayed, said in ((sound, 1, ""), (old, 3, "is of an older version; it is not used")):
        with RunFolder.open(folder / "run") as run:
            run.update(output=str(folder / "a.mp4"))
            told.clear()
            resuming.announce(run, model, Display(quiet=False))
            assert said in " ".join(told) and f"; {replayed} to go through again" in told[-1]
            frames, _ = make(model, folder / "a.mp4", run)
        assert len(frames) == BLOCKS - 3 + replayed
        assert torch.equal(latents(folder / "run"), latents(unbroken / "run"))
        assert packets(folder / "a.mp4") == packets(unbroken / "a.mp4")


def test_a_pointer_to_a_run_that_is_gone_is_ignored_and_swept_up(tmp_path: Path) -> None:
    """--run DIR twice, the first run deleted by hand: DIR is the second one's; a disk that is away comes back."""
    place, root = tmp_path / "kept", runfolder.default_root()
    first, second = record(id="first"), record(id="second")
    RunFolder.create(place, first).close()
    away = tmp_path / "usb" / "runs" / "third"
    RunFolder.create(away, record(id="third")).close()
    shutil.rmtree(place)
    assert [run.name for run in runfolder.all_runs()] == ["third"]
    RunFolder.create(place, second).close()
    (tmp_path / "usb").rename(tmp_path / "unplugged")
    assert [run.name for run in runfolder.all_runs()] == ["second"]
    assert (runfolder.folder_of("first"), runfolder.folder_of("second")) == (None, place)
    with pytest.raises(UsageError, match="there is no run"):
        runfolder.find("first")
    assert runfolder.remove_leftovers() == 1
    assert sorted(path.name for path in root.glob("*.where")) == ["second.where", "third.where"]
    (tmp_path / "unplugged").rename(tmp_path / "usb")
    assert [run.name for run in runfolder.all_runs()] == ["second", "third"]
    (root / "fourth.where").write_bytes(b"\xff")
    assert runfolder.remove_leftovers() == 1


def test_changed_files_and_torchao_are_named(
    model: VideoModel, five: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first.png", "last.png", "texts"):
        (tmp_path / name).write_bytes(name.encode())
    pictures = (tmp_path / "first.png",) * 5 + (tmp_path / "last.png",)
    request = request_of(pin_images=pictures, embeddings=tmp_path / "texts", quantize_text="int8")
    quiet = Display(quiet=True)
    with RunFolder.open(five) as run:
        run.update(must=sameness.must_be_same(model, request))
        resuming._go_on(run, model, request, quiet, force=False)
        (tmp_path / "first.png").unlink()  # block 4 and those before it are in the journal
        resuming._go_on(run, model, request, quiet, force=False)
        for name, said in (("last.png", "picture of block 5"), ("texts", "embeddings")):
            (tmp_path / name).write_bytes(b"other")
            with pytest.raises(UsageError, match=f"something else: {said}: "):
                resuming._go_on(run, model, request, quiet, force=False)
            (tmp_path / name).write_bytes(name.encode())
        real = importlib.metadata.version
        monkeypatch.setattr(
            "importlib.metadata.version", lambda name: "0" if name == "torchao" else real(name)
        )
        with pytest.raises(UsageError, match="something else: torchao: "):
            resuming._go_on(run, model, request, quiet, force=False)
    start = request_of(image=tmp_path / "last.png")
    assert "picture of block 0" in sameness.must_be_same(model, start)
    assert "picture of block 0" not in sameness.must_be_same(model, start, made=1)
