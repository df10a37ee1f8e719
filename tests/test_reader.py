"""Video files and pictures that are read: exact in colour, upright, one clear error; contact sheets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from test_video import HEIGHT, WIDTH, lab, names, write_video

from packforcing_cli.errors import UsageError, VideoError
from packforcing_cli.reader import VideoReader, contact_sheet, fitted, read_image


@pytest.mark.parametrize(
    ("matrix", "full", "tagged"), [(5, False, True), (1, True, True), (5, False, False), (5, True, True)]
)
def test_reader_uses_the_streams_own_matrix_and_range(
    tmp_path: Path, matrix: int, full: bool, tagged: bool
) -> None:
    colour = np.array([200, 40, 60], dtype=np.uint8)
    path = tmp_path / "other.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16, width=WIDTH, height=HEIGHT, options={"crf": "4"})
        stream.pix_fmt = "yuv420p"
        if tagged:
            stream.codec_context.colorspace = 6 if matrix == 5 else 1
            stream.codec_context.color_range = 2 if full else 1
        frame = av.VideoFrame.from_ndarray(np.broadcast_to(colour, (HEIGHT, WIDTH, 3)).copy(), format="rgb24")
        converted = frame.reformat(
            format="yuv420p",
            src_colorspace=matrix,
            dst_colorspace=matrix,
            src_color_range=2,
            dst_color_range=2 if full else 1,
        )
        container.mux(stream.encode(converted))
        container.mux(stream.encode(None))
    (read,) = VideoReader(path)
    assert np.linalg.norm(lab(read.astype(float)) - lab(colour.astype(float)), axis=-1).max() < 2


def test_unreadable_files_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file"):
        VideoReader(tmp_path / "none.mp4")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("hello")
    for name in ("empty.mp4", "text.mp4"):
        with pytest.raises(VideoError, match="cannot be read"):
            VideoReader(tmp_path / name)


# ---------------------------------------------------------------------------------------------- contact sheet


def test_contact_sheet_shows_evenly_spaced_frames(tmp_path: Path) -> None:
    blocks = [np.full((16, HEIGHT, WIDTH, 3), level, np.uint8) for level in (40, 120, 200)]
    path = write_video(tmp_path / "a.mp4", blocks)
    sheet = contact_sheet(VideoReader(path), tmp_path / "sheet.png", columns=3, rows=1, width=600)
    assert names(tmp_path) == ["a.mp4", "sheet.png"]
    with av.open(str(sheet)) as container:
        (frame,) = container.decode(video=0)
        picture = frame.to_ndarray(format="rgb24")
    assert picture.shape[1] == 600
    for column, level in enumerate((40, 120, 200)):
        assert abs(int(picture[40, 100 + 198 * column, 0]) - level) < 6
    label = picture[102:]
    assert (label < 100).any()  # dark text
    assert (label > 250).mean() > 0.8  # on white
    contact_sheet(path, tmp_path / "long.png", columns=20, rows=4, width=1200)  # more cells than frames
    with pytest.raises(UsageError, match="do not fit"):
        contact_sheet(path, tmp_path / "no.png", columns=0)


# ------------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize(
    ("fit", "corner", "middle"), [("crop", (0, 255, 0), (0, 255, 0)), ("pad", (0, 0, 0), (0, 255, 0))]
)
def test_a_picture_fills_the_size_or_is_padded(
    fit: str, corner: tuple[int, ...], middle: tuple[int, ...]
) -> None:
    picture = np.zeros((40, 120, 3), np.uint8)
    picture[:, :] = (255, 0, 0)
    picture[:, 40:80] = (0, 255, 0)
    result = fitted(picture, (64, 64), fit)
    assert result.shape == (64, 64, 3)
    assert tuple(result[0, 5]) == corner and tuple(result[32, 32]) == middle
    assert tuple(fitted(picture, (64, 64), "stretch")[32, 5]) == (255, 0, 0)
    with pytest.raises(UsageError, match="crop, pad, stretch"):
        fitted(picture, (64, 64), "tile")


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_pictures_are_read_upright_and_opaque(kind: str, tmp_path: Path) -> None:
    image = Image.new("RGBA", (64, 32), (0, 0, 255, 255))
    image.paste((255, 0, 0, 0 if kind != "jpg" else 255), (0, 0, 32, 32))
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was turned: show it a quarter clockwise
    path = tmp_path / f"a.{kind}"
    options: dict[str, Any] = {"webp": {"lossless": True}, "jpg": {"quality": 100}}.get(kind, {})
    (image.convert("RGB") if kind == "jpg" else image).save(path, exif=turned, **options)
    result = read_image(path, (32, 64)).astype(int)
    assert np.abs(result[5, 16] - ((255, 0, 0) if kind == "jpg" else (0, 0, 0))).max() < 4
    assert np.abs(result[60, 16] - (0, 0, 255)).max() < 4


def test_what_is_no_picture_is_a_usage_error(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    (tmp_path / "empty.png").touch()
    for name in ("cut.png", "empty.png", "missing.png", "."):
        with pytest.raises(UsageError):
            read_image(tmp_path / name, (64, 64))
