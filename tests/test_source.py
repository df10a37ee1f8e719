"""Other people's videos as history: made here with PyAV, as awkward as they come."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, VideoReformatter
from numpy.typing import NDArray

from packforcing_cli.errors import UsageError, VideoError
from packforcing_cli.layout import Grid
from packforcing_cli.source import Source, measure_seam

GRID = Grid(frames_per_block=4, rows=4, cols=4, layers=1, kv_dim=16, heads=1)
SIZE, FPS = (64, 64), 16


def picture(level: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Grey of a level, with a red left and a blue upper edge."""
    width, height = size
    pixels = np.full((height, width, 3), level, np.uint8)
    pixels[:, : width // 4] = (200, 20, 20)
    pixels[: height // 4] = (20, 20, 200)
    return pixels


def write(
    path: Path,
    levels: Sequence[int],
    *,
    size: tuple[int, int] = (128, 128),
    rate: Fraction | int = 30,
    times: Sequence[int] | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    matrix: int = 1,
    full: bool = False,
    audio: bool = False,
    aspect: Fraction | None = None,
) -> Path:
    """A video whose frames have these grey levels. times: of each frame in milliseconds, instead of the rate."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(
            codec, rate=rate, options={"crf": "4"} if codec == "libx264" else {}
        )
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        context = stream.codec_context
        context.colorspace, context.color_range = matrix, ColorRange.JPEG if full else ColorRange.MPEG
        if aspect:
            context.sample_aspect_ratio = aspect
        if times:
            context.time_base = Fraction(1, 1000)
        if audio:
            sound: Any = container.add_stream("aac", rate=44100, layout="stereo")
        container.start_encoding()
        for n, level in enumerate(levels):
            frame = VideoReformatter().reformat(
                av.VideoFrame.from_ndarray(picture(level, size), format="rgb24"),
                format=pix_fmt, src_colorspace=1, dst_colorspace=5 if matrix == 5 else matrix,
                src_color_range=ColorRange.JPEG, dst_color_range=context.color_range,
            )  # fmt: skip
            frame.pts = times[n] if times else n
            frame.time_base = Fraction(1, 1000) if times else 1 / Fraction(rate)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
        if audio:
            tone = (np.sin(np.arange(44100 * len(levels) // int(rate)) / 20) * 0.5).astype(np.float32)
            for n in range(0, len(tone), 1024):
                block = av.AudioFrame.from_ndarray(np.stack([tone[n : n + 1024]] * 2), "fltp", "stereo")
                block.sample_rate, block.pts = 44100, n
                for packet in sound.encode(block):
                    container.mux(packet)
            for packet in sound.encode(None):
                container.mux(packet)
    return path


def levels_of(frames: Sequence[NDArray[np.uint8]]) -> list[int]:
    return [round(float(frame[40:56, 40:56].mean())) for frame in frames]


def read(path: Path, **options: Any) -> list[NDArray[np.uint8]]:
    source = Source(path, fps=FPS, size=SIZE, **options)
    frames = list(source.frames())
    assert len(frames) == source.num_frames
    assert all(frame.shape == (64, 64, 3) for frame in frames)
    return frames


RAMP = [16 + 2 * n for n in range(90)]  # 3 s at 30 frames a second


def test_a_phone_video_with_sound_is_resampled_to_what_is_shown_at_each_time(tmp_path: Path) -> None:
    frames = read(write(tmp_path / "phone.mp4", RAMP, size=(192, 108), audio=True), fit="stretch")
    assert len(frames) == 48
    expected = [RAMP[int(n / FPS * 30 + 0.06)] for n in range(48)]
    assert np.abs(np.array(levels_of(frames)) - expected).max() <= 1


@pytest.mark.parametrize("name", ["vfr.mkv", "vfr.mp4"])
def test_frames_of_varying_length_are_held_as_long_as_they_are_shown(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, [20, 60, 100, 140, 180], times=[0, 500, 510, 1250, 2000])
    levels = levels_of(read(path))
    assert len(levels) in (32, 33, 34)
    assert [levels[int(t * FPS)] for t in (0.1, 0.45, 0.6, 1.2, 1.3, 1.95)] == pytest.approx(
        [20, 20, 100, 100, 140, 140], abs=2
    )
    assert levels[32:] == pytest.approx([180] * (len(levels) - 32), abs=2)


def test_a_source_of_the_models_rate_keeps_every_frame_once(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.mkv"):
        levels = levels_of(read(write(tmp_path / name, RAMP[:40], rate=16)))
        assert levels == pytest.approx(RAMP[:40], abs=2)


def test_a_stream_without_timestamps_runs_at_its_rate(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h264", RAMP[:30], rate=25)
    assert len(read(path)) == round(30 / 25 * 16)
    assert all(b >= a for a, b in pairwise(levels_of(read(path))))


@pytest.mark.parametrize("turned", [90, 180, 270])
def test_a_rotated_video_is_read_upright(turned: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", [128] * 16, rate=16)
    matrices = {  # clockwise, ISO 14496-12 track header: a b u c d v x y w
        90: (0, 1, 0, -1, 0, 0, 128, 0, 0x4000),
        180: (-1, 0, 0, 0, -1, 0, 128, 128, 0x4000),
        270: (0, -1, 0, 1, 0, 0, 0, 128, 0x4000),
    }
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    struct.pack_into(">9i", data, at, *(0x10000 * value for value in matrices[turned]))
    path.write_bytes(data)
    frame = read(path)[0].astype(int)
    plain = picture(128, (64, 64)).astype(int)
    expected = np.rot90(plain, -turned // 90)
    assert np.abs(frame - expected).mean() < 4
    assert np.abs(frame - plain).mean() > 20


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "matrix", "full", "size"),
    [
        ("libx264", "yuv420p10le", 1, False, (128, 128)),
        ("libx264", "yuv422p", 5, False, (128, 128)),
        ("libx264", "yuvj420p", 5, True, (128, 128)),
        ("libx264", "yuv444p", 9, False, (128, 128)),
        ("libx264", "yuv444p", 1, True, (101, 77)),
        ("ffv1", "yuv420p", 1, False, (99, 131)),
        ("mpeg4", "yuv420p", 5, False, (128, 96)),
    ],
)
def test_depth_subsampling_matrix_range_and_odd_sizes(
    codec: str, pix_fmt: str, matrix: int, full: bool, size: tuple[int, int], tmp_path: Path
) -> None:
    path = write(
        tmp_path / "a.mkv",
        [60, 120],
        rate=16,
        codec=codec,
        pix_fmt=pix_fmt,
        matrix=matrix,
        full=full,
        size=size,
    )
    first, second = read(path, fit="stretch")
    assert levels_of([first, second]) == pytest.approx([60, 120], abs=4)
    assert first[50, 5].astype(int) == pytest.approx([200, 20, 20], abs=14)
    assert first[4, 50].astype(int) == pytest.approx([20, 20, 200], abs=14)


def test_wide_pixels_are_made_square(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", [128] * 2, rate=16, size=(64, 128), aspect=Fraction(2))
    assert np.abs(read(path)[0].astype(int) - picture(128, (64, 64))).mean() < 4


def test_a_part_is_chosen_by_time(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", RAMP)
    levels = levels_of(read(path, start=Fraction(1), end=Fraction(2)))
    assert len(levels) == 16
    assert (levels[0], levels[-1]) == pytest.approx((RAMP[30], RAMP[58]), abs=2)
    assert len(read(path, start=Fraction(2), end=Fraction(9))) == 16
    with pytest.raises(UsageError, match="nothing between 0:04 and 0:03"):
        Source(path, fps=FPS, size=SIZE, start=Fraction(4))


def test_a_truncated_file_holds_its_last_whole_frame(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", RAMP, size=(256, 256))
    whole = Source(path, fps=FPS, size=SIZE).num_frames
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    frames = read(path)
    assert 0 < len(frames) <= whole


@pytest.mark.parametrize("content", [b"", b"no video", bytes(5000)])
def test_files_that_are_no_video_are_one_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"a\.mp4"):
        Source(path, fps=FPS, size=SIZE)
    with pytest.raises(UsageError):
        Source(tmp_path / "missing.mp4", fps=FPS, size=SIZE)


def test_a_file_with_sound_alone_and_one_without_frames_are_one_error(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.m4a"), "w", format="mp4") as container:
        sound: Any = container.add_stream("aac", rate=44100, layout="mono")
        block = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        block.sample_rate = 44100
        for packet in [*sound.encode(block), *sound.encode(None)]:
            container.mux(packet)
    write(tmp_path / "none.mkv", [])
    for name in ("sound.m4a", "none.mkv"):
        with pytest.raises(VideoError):
            Source(tmp_path / name, fps=FPS, size=SIZE)


# -- blocks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "blocks", "lead", "padded"),
    [(13, 1, 0, 0), (29, 2, 0, 0), (40, 2, 11, 0), (5, 1, 0, 8), (28, 1, 15, 0)],
)
def test_blocks_end_where_the_source_ends(
    count: int, blocks: int, lead: int, padded: int, tmp_path: Path
) -> None:
    levels = [20 + 4 * n for n in range(count)]
    source = Source(write(tmp_path / "a.mp4", levels, rate=16), fps=FPS, size=SIZE)
    history = source.history(GRID)
    found = history.shown
    assert (history.blocks, found.lead, found.padded) == (blocks, lead, padded)
    pieces = list(history.pieces())
    assert [len(frames) for frames, is_block in pieces if is_block] == [13, 16, 16][:blocks]
    assert sum(len(frames) for frames, is_block in pieces if not is_block) == lead
    together = levels_of([frame for frames, _ in pieces for frame in frames])
    assert together == pytest.approx([levels[0]] * padded + levels, abs=2)
    assert bool(source.warnings) == bool(padded)


def test_the_seam_is_measured_against_known_values() -> None:
    grey = np.full((3, 8, 8, 3), 119, np.uint8)
    white, red = np.full_like(grey, 255), np.zeros_like(grey)
    red[..., 0] = 255
    assert measure_seam(grey, grey).delta_e == 0
    assert measure_seam(white, np.zeros_like(grey)).delta_e == pytest.approx(100, abs=0.01)
    assert measure_seam(red, white).delta_e == pytest.approx(114.5, abs=0.1)  # L 53.2, a 80.1, b 67.2
    moving = np.stack([np.full((8, 8, 3), 100 + 2 * n, np.uint8) for n in range(5)])
    seam = measure_seam(moving, moving[-1:] + np.uint8(6))
    assert (seam.jump, seam.own_motion) == (6, 2)
    assert "3.0 times the source's own motion" in str(seam)
