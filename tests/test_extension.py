"""Going on with somebody's video: which blocks are remembered, what is in the file, what is measured."""

from __future__ import annotations

from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_source import RAMP, levels_of, write
from tiny import embeds, video_model

from packforcing_cli import extension, finishing, past, resolve, rollout
from packforcing_cli.config import GenerateRequest, MemoryOptions, SourceVideo
from packforcing_cli.errors import UsageError
from packforcing_cli.extension import SeamMeter
from packforcing_cli.layout import Lengths, Shown
from packforcing_cli.past import PastBlock
from packforcing_cli.prompts import Prompt, Story
from packforcing_cli.reader import VideoReader
from packforcing_cli.registry import VideoModel
from packforcing_cli.rollout import Result
from packforcing_cli.runfolder import Record, RunFolder
from packforcing_cli.source import History, Source
from packforcing_cli.timeline import Script, Timeline, parse_at, parse_pins
from packforcing_cli.video import FrameFolder, VideoWriter, part_path

torch.set_num_threads(1)
FPS, SIZE = 16, (64, 64)
MEMORY = MemoryOptions(top_k=2, bank=4, mid_span="1", sink_blocks=1)


@pytest.fixture(scope="module")
def model() -> VideoModel:
    return video_model(torch.float32)


def history_of(path: Path, model: VideoModel, *, only_new: bool = False, **options: Any) -> History:
    grid = resolve.grid_for(model, SIZE)
    return Source(path, fps=FPS, size=SIZE, fit="stretch", **options).history(grid, only_new=only_new)


def story(*prompts: str, **script: Any) -> Story:
    texts = prompts or ("a",)
    return Story(
        Script(texts, **script), tuple(Prompt(text, embeds(len(text), torch.float32)) for text in texts)
    )


def extend(model: VideoModel, history: History, output: Path, **options: Any) -> Result:
    """The new video, in whole blocks of memory; `on_block` gets every block."""
    new_blocks, on_block = options.pop("new_blocks", 2), options.pop("on_block", lambda block: None)
    seconds = history.shown.lengths.frames_for(history.blocks + new_blocks) / FPS
    options = {"seed": 0, "memory": MEMORY, "size": SIZE, "seconds": seconds, **options}
    told = options.pop("story", story())
    return rollout.generate(
        model, told, output, history=history, on_block=lambda block, _: on_block(block), **options
    )


def past_blocks(model: VideoModel, history: History) -> list[PastBlock]:
    return [*past.history_blocks(model, history, iter(()), on_lead=lambda frames: None)]


def as_pixels(path: Path) -> list[NDArray[np.uint8]]:
    return list(VideoReader(path))


def test_the_file_has_the_source_then_the_new_part(model: VideoModel, tmp_path: Path) -> None:
    """90 frames of 30 a second are 48: 3 of them the lead, 45 in three blocks."""
    history = history_of(write(tmp_path / "a.mp4", RAMP), model)
    assert (history.blocks, history.shown.lead) == (3, 3)
    seen: list[Any] = []
    made = extend(model, history, tmp_path / "b.mp4", on_block=seen.append)
    assert (history.source.num_frames, made.blocks, made.frames, made.stopped) == (48, 5, 80, False)
    assert (made.replayed, made.new_frames) == (3, 32)
    assert [block.replayed for block in seen] == [True] * 3 + [False] * 2
    assert (seen[4].cache.sink, seen[4].cache.bank, seen[4].cache.recent) == ((0,), (1, 2, 3), (4,))
    frames = as_pixels(made.path)
    source = levels_of(list(history.source.frames()))
    assert len(frames) == 80 and levels_of(frames[:48]) == pytest.approx(source, abs=3)
    together = np.concatenate([block.frames.numpy() for block in seen])
    wrong = np.abs(np.stack(frames[3:]).astype(int) - together).mean((1, 2, 3))
    assert wrong[:45].max() < 4 < wrong[45:].min()  # the new part is noise, which no codec keeps
    only = extend(model, history_of(tmp_path / "a.mp4", model, only_new=True), tmp_path / "c.mp4")
    assert only.frames == 32
    assert np.array_equal(np.stack(as_pixels(only.path)), np.stack(frames[48:]))


def test_history_is_encoded_as_one_stream_and_goes_through_the_same_commit_path(
    model: VideoModel, tmp_path: Path
) -> None:
    """Latents are those of the whole part encoded at once; the new blocks equal those after any such latents."""
    history = history_of(write(tmp_path / "a.mp4", RAMP[:29], rate=16), model)
    there = past_blocks(model, history)
    frames = np.stack(list(history.source.frames()))
    encoder = model.codec.encoder()
    whole = [encoder.encode(past.to_pixels(frames, model.device)), encoder.flush()]
    expected = torch.cat([part for part in whole if part is not None], dim=2)
    torch.testing.assert_close(torch.cat([block.latents for block in there], dim=2), expected)
    given = list(
        rollout.stream_generate(
            model, story(), num_blocks=4, seed=0, memory=MEMORY, size=SIZE, past=iter(there)
        )
    )
    made: list[Any] = []
    extend(model, history_of(tmp_path / "a.mp4", model), tmp_path / "b.mp4", on_block=made.append)
    for one, other in zip(given, made, strict=True):
        assert torch.equal(one.latents, other.latents)
    fresh = list(rollout.stream_generate(model, story(), num_blocks=4, seed=0, memory=MEMORY, size=SIZE))
    assert not torch.allclose(fresh[2].latents, made[2].latents)


def test_a_source_shorter_than_a_block_is_remembered_with_its_first_frame_held(
    model: VideoModel, tmp_path: Path
) -> None:
    history = history_of(write(tmp_path / "a.mp4", RAMP[:5], rate=16), model)
    assert history.shown.padded == 8 and "shorter than one block" in history.source.warnings[0]
    made = extend(model, history, tmp_path / "b.mp4", new_blocks=1)
    assert made.frames == 21
    assert levels_of(as_pixels(made.path)[:5]) == pytest.approx(RAMP[:5], abs=3)


@pytest.mark.parametrize(("source", "ending", "codec"), [("a.mp4", ".mp4", "aac"), ("a.mkv", ".mov", "aac")])
def test_the_sources_sound_stays_with_its_pictures(
    source: str, ending: str, codec: str, model: VideoModel, tmp_path: Path
) -> None:
    path = write(tmp_path / source, RAMP, audio=True)
    history = history_of(path, model, start=Fraction(1))
    made = extend(model, history, tmp_path / f"b{ending}", new_blocks=1)
    with av.open(str(made.path)) as container:
        sound = container.streams.audio[0]
        assert sound.codec_context.name == codec
        frames = list(container.decode(sound))
        heard = sum(frame.samples for frame in frames) / frames[0].sample_rate
        assert abs(float(frames[0].time or 0)) < 0.05
    assert heard == pytest.approx(2, abs=0.1)
    assert VideoReader(made.path).num_frames == 48
    silent = extend(model, history_of(path, model, only_new=True), tmp_path / "c.mp4")
    assert not VideoReader(silent.path).has_audio


def test_sound_that_no_container_holds_is_encoded(model: VideoModel, tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    write(tmp_path / "silent.mkv", RAMP[:32], rate=16)
    with av.open(str(tmp_path / "silent.mkv")) as reader, av.open(str(path), "w") as writer:
        copy = writer.add_stream_from_template(reader.streams.video[0])
        sound: Any = writer.add_stream("pcm_s16le", rate=22050, layout="mono")
        for packet in reader.demux(reader.streams.video[0]):
            if packet.size:
                packet.stream = copy
                writer.mux(packet)
        for n in range(20):
            block = av.AudioFrame.from_ndarray(np.full((1, 2205), 1000 * n, np.int16), "s16", "mono")
            block.sample_rate, block.pts = 22050, n * 2205
            writer.mux(sound.encode(block))
        writer.mux(sound.encode(None))
    made = extend(model, history_of(path, model), tmp_path / "b.mp4", new_blocks=1)
    with av.open(str(made.path)) as container:
        assert container.streams.audio[0].codec_context.name == "aac"
        heard = sum(frame.samples for frame in container.decode(container.streams.audio[0]))
        assert heard / container.streams.audio[0].codec_context.sample_rate == pytest.approx(2, abs=0.1)


def test_the_seam_is_between_the_last_old_and_the_first_new_frame(model: VideoModel, tmp_path: Path) -> None:
    history = history_of(write(tmp_path / "a.mp4", RAMP[:29], rate=16), model)
    blocks: list[Any] = []
    meter = SeamMeter(history.shown)
    extend(model, history, tmp_path / "b.mp4", on_block=lambda block: (blocks.append(block), meter(block)))
    assert meter.seam is not None
    before, after = (blocks[n].frames[m].numpy().astype(int) for n, m in ((1, -1), (2, 0)))
    assert meter.seam.jump == pytest.approx(np.abs(before - after).mean())
    assert meter.seam.own_motion == pytest.approx(
        1, abs=0.6
    )  # a quarter of the grey of 2 levels a frame stays


def test_scenes_and_pins_count_from_the_beginning_of_the_source(model: VideoModel, tmp_path: Path) -> None:
    history = history_of(write(tmp_path / "a.mp4", RAMP), model)  # 3 s, 3 frames of lead
    asked = Timeline(parse_at([("0:04", "bb")]), parse_pins(["0:01-0:02"]))
    moved = extension.on_blocks(asked, history.shown, fps=FPS)
    script = moved.script("a", history.shown.lengths, fps=FPS, num_blocks=5, start=3)
    assert script.starts == (0, 4)  # blocks 3 and 4 begin at 3.0 and 4.0 s
    assert script.pins == {1}
    early = extension.on_blocks(Timeline(parse_at([("0:01", "bb")])), history.shown, fps=FPS)
    with pytest.raises(UsageError, match="overlaps"):
        early.script("a", history.shown.lengths, fps=FPS, num_blocks=5, start=3)
    both = Story(script, story("a", "bb").prompts)
    made = extend(model, history, tmp_path / "b.mp4", story=both)
    chapters = VideoReader(made.path).chapters
    assert [title for _, title in chapters] == ["a", "bb"] and chapters[1][0] == pytest.approx(4, abs=0.01)


def test_it_stops_behind_a_new_block_when_asked(model: VideoModel, tmp_path: Path) -> None:
    history = history_of(write(tmp_path / "a.mp4", RAMP[:29], rate=16), model)
    seen: list[Any] = []
    made = extend(
        model,
        history,
        tmp_path / "b.mp4",
        new_blocks=5,
        on_block=seen.append,
        should_stop=lambda: len(seen) == 3,
    )
    assert (made.blocks, made.stopped, made.frames) == (3, True, 45)


@pytest.mark.parametrize("only_new", [True, False])
def test_it_stops_within_a_long_source_and_leaves_nothing(
    only_new: bool, model: VideoModel, tmp_path: Path
) -> None:
    history = history_of(write(tmp_path / "a.mp4", RAMP), model, only_new=only_new)
    seen: list[Any] = []
    made = extend(model, history, tmp_path / "b.mp4", on_block=seen.append, should_stop=lambda: True)
    assert (len(seen), made.blocks, made.stopped, made.frames) == (1, 1, True, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


# -- in a run folder ----------------------------------------------------------------------------------------------


def run_of(folder: Path, history: History, output: Path, *, new_blocks: int = 2, **changes: Any) -> RunFolder:
    parts = history.shown
    source = SourceVideo(
        path=history.source.path,
        sha256="",
        only_new=parts.only_new,
        blocks=parts.history,
        lead=parts.lead,
        padded=parts.padded,
    )
    blocks = parts.history + new_blocks
    request = GenerateRequest(
        prompt="a",
        seed=0,
        seconds=parts.lengths.frames_for(blocks) / FPS,
        source=source,
        fit="stretch",
        **changes,
    )
    record = Record(
        schema=1,
        id=f"run-{folder.name}",
        version="1",
        created=datetime.now(UTC),
        prompt="a",
        output=str(output),
        blocks=blocks,
        fps=FPS,
        size=SIZE,
        frames_per_block=4,
        request=request.to_values(),
        tags={"run": f"run-{folder.name}"},
        must={"model": "tiny"},
        numerics={},
    )
    return RunFolder.create(folder, record)


def packets(path: Path) -> list[tuple[bytes, int | None]]:
    with av.open(str(path)) as container:
        return [(bytes(p), p.pts) for p in container.demux(video=0) if p.size]


def journal(folder: Path) -> list[torch.Tensor]:
    with RunFolder.open_to_read(folder) as run:
        return [tensor for entry in run.entries() for tensor in (entry.latents, entry.selected)]


class _Killed(Exception):
    """Nothing is tidied up behind it."""


@pytest.mark.parametrize("count", [53, 48, 5])
@pytest.mark.parametrize("only_new", [False, True])
def test_broken_off_anywhere_it_goes_on_as_if_it_had_not_been(
    count: int, only_new: bool, model: VideoModel, tmp_path: Path
) -> None:
    """Within the source and behind it, with and without the part file: latents, choices, packets, exact frames."""
    path = write(tmp_path / "a.mp4", RAMP[:count], rate=16, audio=True)

    def history() -> History:
        return history_of(path, model, only_new=only_new)

    whole = history()
    with run_of(tmp_path / "whole", whole, tmp_path / "whole.mp4") as run:
        made = extend(model, whole, tmp_path / "whole.mp4", run=run)
        assert (run.record.status, run.record.frames) == ("finished", made.frames)
    wanted = whole.shown.frames_for(whole.blocks + 2)
    assert wanted == (32 if only_new else count + 32) == VideoReader(tmp_path / "whole.mp4").num_frames
    for broken in range(whole.blocks + 2):
        for lose_part in (False, True):
            name = f"{broken}-{lose_part:d}"
            output = tmp_path / f"{name}.mp4"

            def kill(block: Any, broken: int = broken) -> None:
                if block.index == broken:
                    raise _Killed

            with (
                pytest.raises(_Killed),
                run_of(tmp_path / name, whole, output, snapshot_every=1 if broken % 2 else None) as run,
            ):
                extend(
                    model, history(), output, run=run, on_block=kill, snapshot_every=1 if broken % 2 else None
                )
            if lose_part:
                part_path(output).unlink(missing_ok=True)
            with RunFolder.open(tmp_path / name) as run:
                assert run.blocks == broken + 1
                extend(model, history(), output, run=run)
                assert run.record.status == "finished"
                assert finishing.finish(run)  # once more: nothing to do
            assert packets(output) == packets(tmp_path / "whole.mp4")
            assert VideoReader(output).has_audio is not only_new
            for one, other in zip(journal(tmp_path / name), journal(tmp_path / "whole"), strict=True):
                assert torch.equal(one, other)


def test_stopped_within_the_source_the_run_goes_on(model: VideoModel, tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", RAMP[:48], rate=16)
    output = tmp_path / "b.mp4"
    with run_of(tmp_path / "run", history_of(path, model), output) as run:
        made = extend(model, history_of(path, model), output, run=run, should_stop=lambda: True)
        assert (made.frames, made.blocks, made.stopped, run.record.status) == (0, 1, True, "running")
    assert not output.exists()
    with RunFolder.open(tmp_path / "run") as run:
        assert extend(model, history_of(path, model), output, run=run).frames == 48 + 32


def test_a_file_that_was_all_encoded_is_finished_without_the_model(model: VideoModel, tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", RAMP[:53], rate=16, audio=True)
    output = tmp_path / "b.mp4"
    history = history_of(path, model)

    def killed(self: VideoWriter) -> None:
        self._release(remove=False)  # as the system does behind a process
        raise _Killed

    with run_of(tmp_path / "run", history, output) as run:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(VideoWriter, "_finish_file", killed)
            with pytest.raises(_Killed):
                extend(model, history, output, run=run)
        assert not output.exists()
        assert finishing.finish(run)
    reader = VideoReader(output)
    assert (reader.num_frames, reader.has_audio) == (53 + 32, True)


def test_pictures_of_source_and_new_part_are_numbered_as_in_the_file(
    model: VideoModel, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.mp4", RAMP[:48], rate=16)
    extend(model, history_of(path, model), tmp_path / "b.mp4", frames=FrameFolder(tmp_path / "all"))
    assert len(list((tmp_path / "all").iterdir())) == 80
    new = history_of(path, model, only_new=True)
    extend(model, new, tmp_path / "c.mp4", frames=FrameFolder(tmp_path / "new"))
    assert [p.name for p in sorted((tmp_path / "new").iterdir())][0::31] == [
        "frame-000000.png",
        "frame-000031.png",
    ]
    assert (tmp_path / "all" / "frame-000048.png").read_bytes() == (
        tmp_path / "new" / "frame-000000.png"
    ).read_bytes()


def test_a_file_of_another_length_is_refused(model: VideoModel, tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", RAMP[:48], rate=16)
    with run_of(tmp_path / "run", history_of(path, model), tmp_path / "b.mp4") as run:
        request = GenerateRequest.from_values(run.record.request)
        write(tmp_path / "a.mp4", RAMP[:40], rate=16)
        with pytest.raises(UsageError, match="is not the video it was"):
            past.open_history(request, run.record.lengths, fps=FPS, size=SIZE)


def test_chapters_begin_where_their_blocks_are_in_the_file() -> None:
    lengths = Lengths(4)
    script = Script(("a", "b", "c"), starts=(0, 3, 5), blends=(0, 0, 0))

    def chapters(shown: Shown, told: Script = script) -> list[tuple[int, str]]:
        return [*finishing.Encoding.of(FPS, SIZE, "h264", 18, None, {}, told, shown, None).chapters]

    assert chapters(Shown(lengths)) == [(0, "a"), (45, "b"), (77, "c")]
    assert chapters(Shown(lengths, 3, lead=5)) == [(0, "a"), (50, "b"), (82, "c")]
    assert chapters(Shown(lengths, 1, padded=8)) == [(0, "a"), (37, "b"), (69, "c")]
    assert chapters(Shown(lengths, 3, lead=5, only_new=True)) == [(0, "b"), (32, "c")]
    assert chapters(Shown(lengths, 4, lead=5, only_new=True)) == [(0, "b"), (16, "c")]
    assert chapters(Shown(lengths, 5, only_new=True)) == []
    assert chapters(Shown(lengths), Script(("a",))) == []
