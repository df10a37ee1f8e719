"""Going on with somebody's video: which blocks are remembered, what is in the file, what is measured."""

from __future__ import annotations

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

from packforcing_cli import extension, rollout
from packforcing_cli.config import MemoryOptions
from packforcing_cli.errors import UsageError
from packforcing_cli.extension import Extension
from packforcing_cli.registry import VideoModel
from packforcing_cli.rollout import Prompt, Story
from packforcing_cli.source import History, Source
from packforcing_cli.timeline import Script, Timeline, parse_at, parse_pins
from packforcing_cli.video import VideoReader

torch.set_num_threads(1)
FPS, SIZE = 16, (64, 64)
MEMORY = MemoryOptions(top_k=2, bank=4, mid_span="1", sink_blocks=1)


@pytest.fixture(scope="module")
def model() -> VideoModel:
    return video_model(torch.float32)


def history_of(path: Path, model: VideoModel, **options: Any) -> History:
    grid = rollout.grid_for(model, SIZE)
    return Source(path, fps=FPS, size=SIZE, fit="stretch", **options).history(grid)


def story(*prompts: str, **script: Any) -> Story:
    texts = prompts or ("a",)
    return Story(
        Script(texts, **script), tuple(Prompt(text, embeds(len(text), torch.float32)) for text in texts)
    )


def extend(model: VideoModel, history: History, output: Path, **options: Any) -> Extension:
    options = {"new_blocks": 2, "seed": 0, "memory": MEMORY, **options}
    return extension.extend_video(model, history, options.pop("story", story()), output, **options)


def as_pixels(path: Path) -> list[NDArray[np.uint8]]:
    return list(VideoReader(path))


def test_the_file_has_the_source_then_the_new_part(model: VideoModel, tmp_path: Path) -> None:
    """90 frames of 30 a second are 48: 3 of them the lead, 45 in three blocks."""
    history = history_of(write(tmp_path / "a.mp4", RAMP), model)
    assert (history.blocks, history.lead) == (3, 3)
    seen: list[Any] = []
    made = extend(model, history, tmp_path / "b.mp4", on_block=seen.append)
    assert (made.source_frames, made.new_blocks, made.frames, made.stopped) == (48, 2, 80, False)
    assert [block.replayed for block in seen] == [True] * 3 + [False] * 2
    assert (seen[4].cache.sink, seen[4].cache.bank, seen[4].cache.recent) == ((0,), (1, 2, 3), (4,))
    frames = as_pixels(made.path)
    source = levels_of(list(history.source.frames()))
    assert len(frames) == 80 and levels_of(frames[:48]) == pytest.approx(source, abs=3)
    together = np.concatenate([block.frames.numpy() for block in seen])
    wrong = np.abs(np.stack(frames[3:]).astype(int) - together).mean((1, 2, 3))
    assert wrong[:45].max() < 4 < wrong[45:].min()  # the new part is noise, which no codec keeps
    only = extend(model, history_of(tmp_path / "a.mp4", model), tmp_path / "c.mp4", only_new=True)
    assert only.frames == 32
    assert np.array_equal(np.stack(as_pixels(only.path)), np.stack(frames[48:]))


def test_history_is_encoded_as_one_stream_and_goes_through_the_same_commit_path(
    model: VideoModel, tmp_path: Path
) -> None:
    """Latents are those of the whole part encoded at once; the new blocks equal those after any such latents."""
    history = history_of(write(tmp_path / "a.mp4", RAMP[:29], rate=16), model)
    past = list(extension.past_blocks(model, history))
    frames = np.stack(list(history.source.frames()))
    encoder = model.codec.encoder()
    whole = [encoder.encode(rollout.to_pixels(frames, model.device)), encoder.flush()]
    expected = torch.cat([part for part in whole if part is not None], dim=2)
    torch.testing.assert_close(torch.cat([block.latents for block in past], dim=2), expected)
    given = list(
        rollout.stream_generate(
            model, story(), num_blocks=4, seed=0, memory=MEMORY, size=SIZE, past=iter(past)
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
    assert history.padded == 8 and "shorter than one block" in history.source.warnings[0]
    made = extend(model, history, tmp_path / "b.mp4", new_blocks=1)
    assert (made.source_frames, made.frames) == (5, 21)
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
    silent = extend(model, history_of(path, model), tmp_path / "c.mp4", only_new=True)
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
    made = extend(model, history, tmp_path / "b.mp4", on_block=blocks.append)
    assert made.seam is not None
    before, after = (blocks[n].frames[m].numpy().astype(int) for n, m in ((1, -1), (2, 0)))
    assert made.seam.jump == pytest.approx(np.abs(before - after).mean())
    assert made.seam.own_motion == pytest.approx(
        1, abs=0.6
    )  # a quarter of the grey of 2 levels a frame stays


def test_scenes_and_pins_count_from_the_beginning_of_the_source(model: VideoModel, tmp_path: Path) -> None:
    history = history_of(write(tmp_path / "a.mp4", RAMP), model)  # 3 s, 3 frames of lead
    asked = Timeline(parse_at([("0:04", "bb")]), parse_pins(["0:01-0:02"]))
    moved = extension.on_blocks(asked, history, fps=FPS)
    script = moved.script("a", history.grid, fps=FPS, num_blocks=5, start=3)
    assert script.starts == (0, 4)  # blocks 3 and 4 begin at 3.0 and 4.0 s
    assert script.pins == {1}
    early = extension.on_blocks(Timeline(parse_at([("0:01", "bb")])), history, fps=FPS)
    with pytest.raises(UsageError, match="overlaps"):
        early.script("a", history.grid, fps=FPS, num_blocks=5, start=3)
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
    assert (made.new_blocks, made.stopped, made.frames) == (1, True, 45)


@pytest.mark.parametrize("only_new", [True, False])
def test_it_stops_within_a_long_source_and_leaves_nothing(
    only_new: bool, model: VideoModel, tmp_path: Path
) -> None:
    history = history_of(write(tmp_path / "a.mp4", RAMP), model)
    seen: list[Any] = []
    made = extend(
        model,
        history,
        tmp_path / "b.mp4",
        only_new=only_new,
        on_block=seen.append,
        should_stop=lambda: True,
    )
    assert (len(seen), made.new_blocks, made.stopped, made.seam) == (1, 0, True, None)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
