"""The video file: whole after a kill, exact in colour and count; independent blocks; safe names."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from PIL import Image

from packforcing_cli import durable, video
from packforcing_cli.errors import DiskFullError, EnvironmentProblem, LockedError, UsageError, VideoError
from packforcing_cli.reader import VideoReader
from packforcing_cli.video import (
    FrameFolder,
    PipeWriter,
    VideoWriter,
    check_encoder,
    check_frames,
    check_output,
    safe_name,
)

WIDTH, HEIGHT, FPS = 128, 64, 16
Pixels = NDArray[np.uint8]


def make_frames(seed: int, count: int) -> Pixels:
    """[count, 64, 128, 3]: coloured cells that move two pixels a frame."""
    cells = np.random.default_rng(seed).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    picture = cells.repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(picture, 2 * index, 1) for index in range(count)])


def open_writer(path: Path, **options: object) -> VideoWriter:
    merged = {"fps": FPS, "width": WIDTH, "height": HEIGHT, **options}
    return VideoWriter(path, **merged)  # type: ignore[arg-type]


def write_video(path: Path, blocks: list[Pixels], **options: object) -> Path:
    with open_writer(path, **options) as writer:
        for block in blocks:
            writer.write(block)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def packets(path: Path) -> list[tuple[bytes, int, bool]]:
    """(bytes, frame number, is key frame) of every packet."""
    with av.open(str(path)) as container:
        return [
            (bytes(packet), round(float(packet.pts * packet.time_base) * FPS), packet.is_keyframe)
            for packet in container.demux(video=0)
            if packet.pts is not None and packet.time_base is not None
        ]


def boxes(data: bytes) -> Iterator[tuple[str, int, int]]:
    start = 0
    while start < len(data):
        size, kind = struct.unpack_from(">I4s", data, start)
        yield kind.decode(), start, start + size
        start += size


def lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIE Lab (D65) of sRGB values 0..255, the textbook formulas."""
    value = rgb / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array(
        [
            [0.4124564, 0.2126729, 0.0193339],
            [0.3575761, 0.7151522, 0.1191920],
            [0.1804375, 0.0721750, 0.9503041],
        ]
    )
    ratio = xyz / np.array([0.95047, 1.0, 1.08883])
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


# ------------------------------------------------------------------------------------------ the finished file


def test_finished_file_has_all_frames_tags_and_metadata(tmp_path: Path) -> None:
    metadata = {
        "prompt": 'a "red" circle\nöö 日本 🎈',
        "seed": "7",
        "model": "demo",
        "version": "0.1",
        "any-key": "x",
    }
    blocks = [make_frames(0, 13), make_frames(1, 16), make_frames(2, 16)]
    path = write_video(tmp_path / "a.mp4", blocks, metadata=metadata)

    assert names(tmp_path) == ["a.mp4"]
    reader = VideoReader(path)
    assert (reader.num_frames, reader.width, reader.height, reader.fps) == (45, WIDTH, HEIGHT, Fraction(FPS))
    assert reader.duration == pytest.approx(45 / 16)
    assert {key: reader.metadata.get(key) for key in metadata} == metadata
    frames = list(reader)
    assert len(frames) == 45
    error = np.abs(np.stack(frames).astype(int) - np.concatenate(blocks))
    assert error[:, 4::8, 4::8].mean() < 6  # cell centres, away from chroma edges
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (
            1,
            1,
            1,
            1,
        )
        assert context.pix_fmt == "yuv420p"
    kinds = [kind for kind, _, _ in boxes(path.read_bytes())]
    assert kinds.index("moov") < kinds.index("mdat")  # index in front
    assert "moof" not in kinds


def test_every_block_starts_decodable_at_its_exact_time(tmp_path: Path) -> None:
    lengths = [13, 1, 1, 16, 2]
    path = write_video(tmp_path / "a.mp4", [make_frames(seed, n) for seed, n in enumerate(lengths)])
    listed = packets(path)
    starts = np.cumsum([0, *lengths])
    assert [number for _, number, _ in listed] == list(range(33))
    assert [number for _, number, is_key in listed if is_key] == list(starts[:-1])
    everything = list(VideoReader(path))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        for block, start in enumerate(starts[:-1]):
            context = av.CodecContext.create("h264", "r")
            context.extradata = stream.codec_context.extradata
            container.seek(0)
            chosen = [p for p in container.demux(stream) if p.pts is not None][start : starts[block + 1]]
            decoded = [frame for packet in [*chosen, None] for frame in context.decode(packet)]
            assert len(decoded) == lengths[block]
            alone = VideoReader(path)._to_rgb(VideoReformatter(), decoded[-1])
            assert np.array_equal(alone, everything[starts[block + 1] - 1])


def test_packets_of_a_block_depend_on_its_frames_alone(tmp_path: Path) -> None:
    same = make_frames(5, 16)
    first = packets(write_video(tmp_path / "a.mp4", [make_frames(0, 13), make_frames(1, 16), same]))
    second = packets(
        write_video(tmp_path / "b.mp4", [make_frames(8, 5), same, make_frames(9, 16)], queue_blocks=1)
    )
    assert [data for data, _, _ in first[29:45]] == [data for data, _, _ in second[5:21]]


@pytest.mark.parametrize("fps", [Fraction(30000, 1001), Fraction(25, 2), 24])
def test_frame_rates_are_exact(tmp_path: Path, fps: Fraction) -> None:
    path = write_video(tmp_path / "a.mp4", [make_frames(0, 5), make_frames(1, 8)], fps=fps)
    assert VideoReader(path).fps == fps
    assert VideoReader(path).duration == pytest.approx(float(13 / fps), abs=1e-3)


def test_torch_tensors_are_written_and_copied(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    frames = torch.from_numpy(make_frames(3, 4))
    with open_writer(tmp_path / "a.mp4") as writer:
        writer.write(frames)
        frames.zero_()
    assert np.stack(list(VideoReader(tmp_path / "a.mp4"))).mean() > 60


# ----------------------------------------------------------------------------------------------------- colour


def test_primary_colours_survive_writer_and_reader(tmp_path: Path) -> None:
    colours = np.array(
        [
            *[(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)],
            *[(255, 255, 255), (0, 0, 0), (128, 128, 128), (200, 30, 40), (12, 90, 180), (250, 160, 20)],
        ],
        dtype=np.uint8,
    )
    block = np.broadcast_to(colours[:, None, None], (len(colours), HEIGHT, WIDTH, 3))
    path = write_video(tmp_path / "a.mp4", [block[i : i + 1].repeat(4, 0) for i in range(len(colours))])
    read = np.stack(list(VideoReader(path)))[::4].astype(float)
    distance = np.linalg.norm(lab(read) - lab(block.astype(float)), axis=-1)  # CIE76
    assert distance.max() < 2, dict(zip(map(tuple, colours.tolist()), distance.max((1, 2)), strict=True))


def test_conversion_is_the_bt709_limited_range_formula(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (20, 3), dtype=np.uint8)
    path = write_video(
        tmp_path / "a.mp4", [np.broadcast_to(c, (1, HEIGHT, WIDTH, 3)).copy() for c in colours], crf=0
    )
    red, green, blue = (colours / 255).T
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    expected = np.stack(
        [16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748], 1
    )
    with av.open(str(path)) as container:
        for frame, wanted in zip(container.decode(video=0), expected, strict=True):
            planes = [
                np.frombuffer(p, np.uint8).reshape(p.height, -1)[:, : p.width].mean() for p in frame.planes
            ]
            assert np.abs(planes - wanted).max() < 0.52


def test_a_chroma_gradient_is_not_shifted(tmp_path: Path) -> None:
    ramp = np.zeros((4, HEIGHT, WIDTH, 3), np.uint8)
    ramp[..., 0] = np.arange(WIDTH) * 2
    read = np.stack(list(VideoReader(write_video(tmp_path / "a.mp4", [ramp], crf=0)))).astype(float)
    inner = (read - ramp)[:, 8:-8, 8:-8, 0]
    assert abs(inner.mean()) < 0.35  # half a pixel of shift would be 1.0


# ------------------------------------------------------------------------------------------- kill and failure

_KILLED = """
import sys, numpy as np
sys.path.insert(0, {tests!r})
from test_video import make_frames, open_writer
from pathlib import Path
writer = open_writer(Path({path!r}))
for index in range(10_000):
    writer.write(make_frames(index, 13 if index == 0 else 16))
    if index % 3 == 0:
        writer.flush()
        print(writer.blocks_written, flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
@pytest.mark.parametrize("delay", [0.0, 0.013, 0.031])
def test_after_kill_9_all_whole_blocks_reported_written_decode(tmp_path: Path, delay: float) -> None:
    path = tmp_path / "k.mp4"
    root = Path(__file__).parents[1]
    script = _KILLED.format(tests=str(root / "tests"), path=str(path))
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    reported = 0
    for _ in range(4):
        reported = int(process.stdout.readline())
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().split()
    process.stdout.close()
    process.wait()
    reported = max([reported, *map(int, rest)])
    assert process.returncode == -signal.SIGKILL
    assert not path.exists()

    part = tmp_path / "k.part.mp4"
    frames = list(VideoReader(part))
    assert len(frames) >= 13 + 16 * (reported - 1) >= 13 + 16 * 9
    assert (len(frames) - 13) % 16 == 0
    assert VideoReader(part).num_frames == len(frames)
    for block in (0, 1, reported - 1):  # the right pictures, in the right place
        start = 0 if block == 0 else 13 + 16 * (block - 1)
        assert np.abs(frames[start].astype(int) - make_frames(block, 1)[0])[4::8, 4::8].mean() < 6
    assert video.remux(part, path, metadata={}) == len(frames) == len(list(VideoReader(path)))


def test_a_write_torn_at_any_byte_leaves_a_file_that_plays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_write = os.write
    writer = open_writer(tmp_path / "t.mp4")
    states: list[bytes] = []  # of the file, after every write

    def record(fd: int, data: bytes) -> int:
        written = real_write(fd, data)
        if fd == writer._fd:
            states.append(writer.part_path.read_bytes())
        return written

    monkeypatch.setattr(os, "write", record)
    lengths = [5, 8, 3]
    for seed, count in enumerate(lengths):
        writer.write(make_frames(seed, count))
    writer.abort()
    monkeypatch.undo()
    torn = tmp_path / "torn.mp4"
    for block, count in enumerate(np.cumsum(lengths)):
        hidden, opened = states[2 * block : 2 * block + 2]
        torn.write_bytes(opened)
        assert len(list(VideoReader(torn))) == count
        if block:
            start = len(states[2 * block - 1])
            before = count - lengths[block]
            for cut in [*range(start, start + 20), *range(start + 20, start + 220, 9), len(hidden)]:
                torn.write_bytes(hidden[:cut])
                reader = VideoReader(torn)
                assert reader.num_frames == before, cut - start
                assert cut % 16 or len(list(reader)) == before, cut - start


def test_blocks_are_on_disk_after_flush_without_any_later_block(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "a.mp4", metadata={"prompt": "p"})
    total = 0
    for index, count in enumerate((13, 16, 16)):
        writer.write(make_frames(index, count))
        writer.flush()
        total += count
        reader = VideoReader(writer.part_path)
        assert len(list(reader)) == reader.num_frames == writer.frames_written == total
        assert reader.metadata["prompt"] == "p"
        assert reader.duration == pytest.approx(total / FPS)
    assert writer.close() == tmp_path / "a.mp4" == writer.close()


def test_the_time_of_the_first_frames_is_that_of_the_first_block_in_the_file(tmp_path: Path) -> None:
    """Not of what was copied or taken over; None as long as there is none."""
    source = write_video(tmp_path / "a.mp4", [make_frames(0, 5), make_frames(1, 4)])
    begin = time.perf_counter()
    with open_writer(tmp_path / "b.mp4") as writer:
        writer.copy(source, [5])
        assert (writer.blocks_written, writer.first_at) == (1, None)
        writer.write(make_frames(1, 4))
        writer.flush()
        first = writer.first_at
        assert first is not None
        assert begin < first <= time.perf_counter()
        writer.write(make_frames(2, 4))
        writer.flush()
        assert writer.first_at == first


def test_disk_full_is_reported_and_loses_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = open_writer(tmp_path / "a.mp4")
    writer.write(make_frames(0, 13))
    writer.flush()
    real_write = os.write

    def write_some(fd: int, data: bytes) -> int:
        if fd != writer._fd:
            return real_write(fd, data)
        if len(data) > 500:
            return real_write(fd, bytes(data)[:500])  # a short write, then nothing more
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", write_some)
    writer.write(make_frames(1, 16))
    with pytest.raises(DiskFullError, match="disk is full") as caught:
        writer.flush()
    assert str(writer.part_path) in caught.value.hint
    assert caught.value.exit_code == 6
    for call in (lambda: writer.write(make_frames(2, 16)), writer.close):
        with pytest.raises(DiskFullError):
            call()
    assert not (tmp_path / "a.mp4").exists()
    assert len(list(VideoReader(writer.part_path))) == 13
    assert writer.abort() == writer.part_path


def test_disk_full_while_finishing_keeps_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = open_writer(tmp_path / "a.mp4")
    writer.write(make_frames(0, 13))

    def fail(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable, "sync_file", fail)
    with pytest.raises(DiskFullError):
        writer.close()
    assert names(tmp_path) == ["a.part.mp4"]
    assert len(list(VideoReader(tmp_path / "a.part.mp4"))) == 13


def test_an_error_of_the_encoder_surfaces_and_never_blocks_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = open_writer(tmp_path / "a.mp4", queue_blocks=1)
    writer.write(make_frames(0, 13))
    writer.flush()

    def fail(_: Pixels) -> bytearray:
        raise RuntimeError("broken")

    monkeypatch.setattr(writer._encoder, "encode", fail)

    def write_many() -> None:
        for _ in range(50):
            writer.write(make_frames(1, 16))
        writer.flush()

    with pytest.raises(VideoError, match="broken"):
        write_many()
    assert writer.abort(finish=True) == writer.part_path
    assert len(list(VideoReader(writer.part_path))) == 13


def test_leaving_by_an_exception_keeps_a_part_that_plays(tmp_path: Path) -> None:
    def interrupted() -> None:
        with open_writer(tmp_path / "a.mp4") as writer:
            writer.write(make_frames(0, 13))
            writer.write(make_frames(1, 16))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == ["a.part.mp4"]
    assert len(list(VideoReader(tmp_path / "a.part.mp4"))) == 29
    assert not any(thread.name.startswith("video ") for thread in threading.enumerate())


def test_abort_can_finish_the_file_and_leaves_nothing_without_a_block(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "a.mp4")
    writer.write(make_frames(0, 13))
    assert writer.abort(finish=True) == tmp_path / "a.mp4"
    assert names(tmp_path) == ["a.mp4"]
    assert VideoReader(tmp_path / "a.mp4").num_frames == 13
    assert open_writer(tmp_path / "b.mp4").abort() is None
    with pytest.raises(VideoError, match="no frames"):
        open_writer(tmp_path / "b.mp4").close()
    assert names(tmp_path) == ["a.mp4"]
    with pytest.raises(VideoError, match="already closed"):
        writer.write(make_frames(0, 1))


# ----------------------------------------------------------------------------------------- refusals and input


def test_existing_output_is_refused_and_replaced_only_at_the_end(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [make_frames(0, 3)])
    before = path.read_bytes()
    with pytest.raises(UsageError, match="exists") as caught:
        open_writer(path)
    assert "--overwrite" in caught.value.hint
    assert caught.value.exit_code == 2
    writer = open_writer(path, overwrite=True)
    writer.write(make_frames(1, 5))
    writer.flush()
    assert path.read_bytes() == before
    writer.close()
    assert VideoReader(path).num_frames == 5
    assert names(tmp_path) == ["a.mp4"]


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "a.mp4")
    writer.write(make_frames(0, 3))
    (tmp_path / "a.mp4").write_bytes(b"somebody else's")
    with pytest.raises(VideoError, match="appeared"):
        writer.close()
    assert (tmp_path / "a.mp4").read_bytes() == b"somebody else's"
    assert names(tmp_path) == ["a.mp4", "a.part.mp4"]
    assert VideoReader(tmp_path / "a.part.mp4").num_frames == 3


def test_a_leftover_part_is_refused_kept_and_replaced_on_request(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "a.mp4")
    writer.write(make_frames(0, 3))
    writer.abort()
    with pytest.raises(UsageError, match="interrupted run"):
        open_writer(tmp_path / "a.mp4")
    assert VideoReader(tmp_path / "a.part.mp4").num_frames == 3
    assert VideoReader(write_video(tmp_path / "a.mp4", [make_frames(0, 2)], overwrite=True)).num_frames == 2


@pytest.mark.skipif(os.name == "nt", reason="flock")
def test_two_writers_never_share_a_file(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "a.mp4")
    writer.write(make_frames(0, 3))
    with pytest.raises(LockedError):
        open_writer(tmp_path / "a.mp4", overwrite=True)
    writer.close()
    assert VideoReader(tmp_path / "a.mp4").num_frames == 3


def test_outputs_that_cannot_be_written_are_usage_errors(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    for name, message in {
        "missing/a.mp4": "does not exist",
        "file/a.mp4": "not a folder",
        "folder.mp4": "is a folder",
        "a.avi": "cannot write a video",
        "a": "cannot write a video",
        ".mp4": "cannot write a video",
        "é" * 125 + ".mp4": "too long",
        "a\0.mp4": "NUL",
    }.items():
        with pytest.raises(UsageError, match=message):
            check_output(tmp_path / name)
    check_output(tmp_path / "fine.mp4")
    assert names(tmp_path) == ["file", "folder.mp4"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_a_usage_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="not writable"):
        check_output(tmp_path / "a.mp4")


def test_wrong_sizes_and_settings_are_refused(tmp_path: Path) -> None:
    for options in ({"width": 127}, {"height": 0}, {"fps": 0}, {"crf": 52}):
        with pytest.raises(UsageError):
            open_writer(tmp_path / "a.mp4", **options)
    with pytest.raises(VideoError, match="preset 'fastest'"):
        open_writer(tmp_path / "a.mp4", preset="fastest")
    assert names(tmp_path) == []
    writer = open_writer(tmp_path / "a.mp4")
    wrong_blocks: list[Any] = [
        make_frames(0, 2)[:, 1:],
        make_frames(0, 2).astype(np.float32),
        make_frames(0, 2)[0],
        make_frames(0, 1)[:0],
    ]
    for wrong in wrong_blocks:
        with pytest.raises(VideoError, match="a block must be uint8"):
            writer.write(wrong)
    writer.abort()


# ------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        (
            "a red circle moving right on a blue background",
            "a-red-circle-moving-right-on-a-blue-background.mp4",
        ),
        ("CON", "video-CON.mp4"),
        ("nul.txt", "video-nul.txt.mp4"),
        ("com¹", "video-com¹.mp4"),
        ("console", "console.mp4"),
        ("..", "video.mp4"),
        ("", "video.mp4"),
        (" \t\n\0 ", "video.mp4"),
        ("../../etc/passwd", "etc-passwd.mp4"),
        ('a/b\\c:d*e?f"g<h>i|j', "a-b-c-d-e-f-g-h-i-j.mp4"),
        ("--rf . ", "rf.mp4"),
        ("ein Hund läuft", "ein-Hund-läuft.mp4"),
        ("一只红色的猫", "一只红色的猫.mp4"),
        ("party 🎉\u202etxt", "party-🎉txt.mp4"),
        ("\ud800", "video.mp4"),
        ("e\u0301", "é.mp4"),
    ],
)
def test_safe_name_of_known_prompts(prompt: str, name: str) -> None:
    assert safe_name(prompt, ".mp4") == name


def test_safe_names_are_possible_everywhere(tmp_path: Path) -> None:
    rng = random.Random(0)
    alphabets = [
        "ab .-",
        "漢字かな",
        "🎈👩‍👩‍👧🏽",
        "e\u0301\u0302",
        '/\\:*?"<>|\0\n',
        "CONAUXnul.",
        "\u202e\u200b\ufeff\ud800",
    ]
    prompts = [c * 1000 for c in ("a", "é", "漢", "🎈", ".", "-", "/", "a.")]
    for _ in range(300):
        pool = "".join(rng.sample(alphabets, rng.randint(1, 3)))
        prompts.append("".join(rng.choices(pool, k=rng.randint(0, 400))))
    reserved = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))}
    for prompt in prompts:
        for suffix in (".mp4", "-1234567890.part.mp4"):
            name = safe_name(prompt, suffix)
            stem = name.removesuffix(suffix)
            assert name.endswith(suffix), prompt
            assert len(name.encode()) <= 200, prompt
            assert not set(name) & set('/\\:*?"<>|'), prompt
            assert name[0] not in ".-", prompt
            assert not any(unicodedata.category(c)[0] in "CZ" for c in name), prompt
            assert name.split(".")[0].lower() not in reserved, prompt
            assert stem[-1] not in ". ", prompt
            assert safe_name(stem, suffix) == name, prompt  # stable
    check_output(tmp_path / safe_name("漢" * 1000, ".mp4"))
    (tmp_path / safe_name("🎈" * 1000, ".part.mp4")).touch()
    for suffix in ("/a.mp4", "\0", "x" * 190):
        with pytest.raises(UsageError):
            safe_name("a", suffix)


# --------------------------------------------------------------------------------- codecs, containers, other sinks


@pytest.mark.parametrize("codec", ["h264", "hevc"])
@pytest.mark.parametrize("ending", [".mp4", ".mkv", ".mov", ".MKV"])
def test_every_container_has_all_frames_tags_and_chapters(codec: str, ending: str, tmp_path: Path) -> None:
    blocks = [make_frames(1, 13), make_frames(2, 16)]
    path = tmp_path / f"a{ending}"
    options = {"codec": codec, "chapters": [(0, "one"), (13, "two ÿ"), (40, "behind the end")]}
    with open_writer(path, metadata={"prompt": "café"}, **options) as writer:
        for block in blocks:
            writer.write(block)
        writer.flush()
        assert sum(1 for _ in VideoReader(writer.part_path)) == 29  # plays before it is finished
    assert names(tmp_path) == [path.name]
    reader = VideoReader(path)
    assert np.abs(np.stack(list(reader)).astype(int) - np.concatenate(blocks)).mean() < 12
    assert {key.lower(): value for key, value in reader.metadata.items()}["prompt"] == "café"
    assert [title for _, title in reader.chapters] == ["one", "two ÿ"]
    assert [start for start, _ in reader.chapters] == pytest.approx([0, 13 / 16], abs=1e-3)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.colorspace, context.color_range) == (codec, 1, 1)
        times = [
            p.pts * p.time_base for p in container.demux(container.streams.video[0]) if p.pts is not None
        ]
    assert times == pytest.approx([Fraction(n, FPS) for n in range(29)], abs=1e-3)


def test_packets_of_an_hevc_block_depend_on_its_frames_alone(tmp_path: Path) -> None:
    a, b, c = make_frames(1, 13), make_frames(2, 16), make_frames(3, 16)
    one = packets(write_video(tmp_path / "one.mp4", [a, b], codec="hevc"))
    other = packets(write_video(tmp_path / "other.mkv", [c[:13], b], codec="hevc"))
    assert [len(data) for data, *_ in one[13:]] == [len(data) for data, *_ in other[13:]]
    assert one[13][2] and other[13][2]


def test_nvenc_is_refused_where_it_does_not_work() -> None:
    with contextlib.suppress(EnvironmentProblem):
        check_encoder("hevc_nvenc", fps=FPS, width=256, height=256)
        pytest.skip("this machine has a GPU with NVENC")
    with pytest.raises(EnvironmentProblem) as caught:
        check_encoder("h264_nvenc", fps=FPS, width=256, height=256)
    assert caught.value.hint == "Use --codec h264."


@pytest.mark.parametrize("options", [{"codec": "av1"}, {"crf": 60}, {"width": 63}])
def test_impossible_encoders_are_usage_errors(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        check_encoder(**{"codec": "h264", "fps": FPS, "width": 64, "height": 64} | options)
    with pytest.raises(VideoError, match="preset 'warp'"):
        check_encoder("hevc", fps=FPS, width=64, height=64, preset="warp")


def test_a_pipe_gets_whole_blocks_one_by_one() -> None:
    pipe, blocks = io.BytesIO(), [make_frames(1, 13), make_frames(2, 16), make_frames(3, 16)]
    with PipeWriter(pipe, fps=FPS, width=WIDTH, height=HEIGHT, metadata={"prompt": "a"}) as writer:
        for n, block in enumerate(blocks):
            writer.write(block)
            with av.open(io.BytesIO(pipe.getvalue())) as container:
                assert container.metadata["prompt"] == "a"
                assert sum(1 for _ in container.decode(video=0)) == (13, 29, 45)[n]
    assert not pipe.closed


def test_a_pipe_that_nobody_reads_is_one_error() -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "wb", buffering=0) as pipe, pytest.raises(VideoError, match="nobody reads"):
        PipeWriter(pipe, fps=FPS, width=WIDTH, height=HEIGHT)


def test_frames_are_numbered_pictures_and_never_overwritten_by_accident(tmp_path: Path) -> None:
    frames, folder = make_frames(1, 13), tmp_path / "frames"
    check_frames(folder)
    assert not folder.exists()
    FrameFolder(folder).write(frames[:5], first=0)
    FrameFolder(folder).write(torch.from_numpy(frames[5:]), first=5)
    files = sorted(folder.iterdir())
    assert [files[0].name, files[-1].name, len(files)] == ["frame-000000.png", "frame-000012.png", 13]
    assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in files]), frames)
    for wrong in (folder, tmp_path / "no" / "parent", files[0]):
        with pytest.raises(UsageError):
            check_frames(wrong)
    check_frames(folder, overwrite=True)


@pytest.mark.parametrize("ending", [".mkv", ".mov"])
@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_a_finished_file_of_any_kind_can_be_gone_on_with(codec: str, ending: str, tmp_path: Path) -> None:
    blocks = [make_frames(n, 13 if n == 0 else 16) for n in range(3)]
    first = write_video(tmp_path / f"first{ending}", blocks[:2], codec=codec)
    with open_writer(tmp_path / f"second{ending}", codec=codec) as writer:
        writer.copy(first, [13, 16])
        writer.write(blocks[2])
    whole = write_video(tmp_path / f"whole{ending}", blocks, codec=codec)
    assert packets(tmp_path / f"second{ending}") == packets(whole)


@pytest.mark.parametrize("ending", [".mp4", ".mkv", ".mov"])
def test_a_copy_through_this_process_is_what_ffmpeg_itself_would_write(ending: str, tmp_path: Path) -> None:
    """Byte for byte; also every byte of it goes through os.write, where a full disk is an OSError."""
    with open_writer(tmp_path / "a.mp4") as writer:
        writer.write(make_frames(0, 13))
        writer.flush()
        part = tmp_path / "part.mp4"
        shutil.copy(writer.part_path, part)
    target, direct = tmp_path / f"b{ending}", tmp_path / f"direct{ending}"
    assert video.remux(part, target, metadata={"a": "b"}) == 13
    with (
        av.open(str(part)) as reader,
        av.open(
            str(direct),
            "w",
            format=video.CONTAINERS[ending],
            container_options=video._index_in_front(target),
        ) as writer_,
    ):
        writer_.metadata.update({"a": "b"})
        stream = reader.streams.video[0]
        copy = writer_.add_stream_from_template(stream)
        for packet in video._picture_packets(reader, stream, copy):
            writer_.mux(packet)
    ours, theirs = target.read_bytes(), direct.read_bytes()
    if ending == ".mkv":  # its track has a random number
        assert len(ours) == len(theirs) and packets(target) == packets(direct)
    else:
        assert ours == theirs
