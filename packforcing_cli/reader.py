"""Video files and pictures as pixels: a reader that keeps colours, pictures in a size, contact sheets.

Knows files, codecs and colours; nothing of models, latents or prompts. Frames are uint8 RGB [H, W, 3].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from packforcing_cli import durable
from packforcing_cli.config import FITS
from packforcing_cli.errors import UsageError, VideoError
from packforcing_cli.ffmpeg import BT709, IO_ERRORS, TO_RGB, file_url, write_error

if TYPE_CHECKING:
    from av.packet import Packet
    from PIL import Image

_BT601 = 5  # the number of libswscale (SWS_CS_ITU601); BT709 has the same number there
_MATRICES = {BT709: BT709, 4: 4, 5: _BT601, 6: _BT601, 7: 7, 9: 9, 10: 9}  # AVColorSpace -> SWS_CS_*


@dataclass(frozen=True)
class Timing:
    """Seconds at which the first frame of a stream begins and its last one ends.

    stamped: whether the frames carry times; otherwise they follow each other at the stream's rate.
    """

    start: Fraction
    end: Fraction
    stamped: bool


class VideoReader:
    """Reads any video PyAV can, as RGB, with the stream's own matrix and range; again on every iteration.

    Untagged streams are read as BT.709 from 720 lines up and as BT.601 below, limited range. A file whose
    writer was killed gives all whole frames it has.

    Attributes: path; width and height in pixels; fps, an exact fraction; has_audio; metadata
        (its names in lower case, which containers change) and chapters, (seconds, title), of the container.
    Raises: UsageError if the file is missing; VideoError if it is no video or is damaged.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UsageError(f"there is no file {self.path}")
        with self._open() as container:
            stream = self._stream(container)
            self.width: int = stream.codec_context.width
            self.height: int = stream.codec_context.height
            rate = stream.average_rate or stream.guessed_rate
            if not rate or not self.width or not self.height:
                raise VideoError(f"{self.path} has no picture size or frame rate")
            self.fps: Fraction = Fraction(rate)
            self._pixel_aspect = Fraction(stream.sample_aspect_ratio or 1)
            self.has_audio = bool(container.streams.audio)
            self.damaged_after: Fraction | None = (
                None  # set by `upright`: frames behind it could not be decoded
            )
            self.metadata: dict[str, str] = {name.lower(): text for name, text in container.metadata.items()}
            self.chapters: tuple[tuple[float, str], ...] = tuple(
                (float(c["start"] * (c["time_base"] or 1)), c["metadata"].get("title", ""))
                for c in container.chapters()
            )
            self._num_frames: int | None = stream.frames or None  # 0: the container does not say
            self._duration: float | None = None
            if stream.duration is not None and stream.time_base is not None:
                self._duration = float(stream.duration * stream.time_base)
            elif container.duration is not None:
                self._duration = container.duration / av.time_base

    @property
    def num_frames(self) -> int:
        """Number of frames; counted, without decoding, if the container does not say."""
        if self._num_frames is None:
            with self._open() as container:
                self._num_frames = sum(1 for _ in self._whole_packets(container))
        return self._num_frames

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return float(self.num_frames / self.fps) if self._duration is None else self._duration

    def __len__(self) -> int:
        return self.num_frames

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        """Yield frames [H, W, 3] uint8 in display order."""
        with self._open() as container:
            stream = self._stream(container)
            context = stream.codec_context
            reformatter = VideoReformatter()
            count = 0
            try:
                for packet in self._whole_packets(container, flush=True):
                    for frame in context.decode(packet):
                        yield self._to_rgb(reformatter, frame)
                        count += 1
            except IO_ERRORS as error:
                raise VideoError(f"{self.path} is damaged after frame {count}: {error}") from error

    def key_frames(self) -> Iterator[tuple[Fraction, NDArray[np.uint8]]]:
        """Yield (seconds, frame [H, W, 3] uint8) of the frames that stand alone, nothing else is decoded.

        In a video of ours every block begins with one. Frames without a time are left out.
        Raises: VideoError if one cannot be decoded.
        """
        with self._open() as container:
            stream = self._stream(container)
            stream.codec_context.skip_frame = "NONKEY"
            reformatter = VideoReformatter()
            try:
                for packet in self._whole_packets(container, flush=True):
                    for frame in stream.codec_context.decode(packet):
                        if frame.pts is not None and frame.time_base is not None:
                            yield frame.pts * frame.time_base, self._to_rgb(reformatter, frame)
            except IO_ERRORS as error:
                raise VideoError(f"{self.path} is damaged: {error}") from error

    def timing(self) -> Timing:
        """When the first frame begins and the last one ends, read without decoding.

        Raises: VideoError if there is no frame.
        """
        first: Fraction | None = None
        last, length, count = Fraction(0), 1 / self.fps, 0
        with self._open() as container:
            base = self._stream(container).time_base
            for packet in self._whole_packets(container):
                if packet.is_discard:
                    continue
                count += 1
                if packet.pts is None or base is None:
                    continue
                time = packet.pts * base
                first = time if first is None else min(first, time)
                if time >= last:
                    last, length = time, packet.duration * base if packet.duration else 1 / self.fps
        if not count:
            raise VideoError(f"{self.path} has no frames", hint="Give a file with pictures.")
        if first is None or (last <= first and count > 1):  # no timestamps, as in a bare H.264 stream
            return Timing(Fraction(0), count / self.fps, stamped=False)
        return Timing(first, last + length, stamped=True)

    def upright(self) -> Iterator[tuple[Fraction, NDArray[np.uint8]]]:
        """Yield (seconds, frame [h, w, 3] uint8) in display order: turned as the display matrix says, with square
        pixels, times rising. Frames without a time follow at the stream's rate."""
        timing = self.timing()
        time = timing.start - 1 / self.fps
        with self._open() as container:
            stream = self._stream(container)
            reformatter = VideoReformatter()
            count = 0
            try:
                for packet in self._whole_packets(container, flush=True):
                    for frame in stream.codec_context.decode(packet):
                        stamp = frame.pts if timing.stamped else None
                        following = time + 1 / self.fps
                        if stamp is not None and frame.time_base is not None:
                            following = max(time, stamp * frame.time_base)
                        time, count = following, count + 1
                        yield time, self._upright(self._to_rgb(reformatter, frame), frame)
            except IO_ERRORS as error:
                if count == 0:
                    raise VideoError(
                        f"{self.path} cannot be decoded: {error}",
                        hint="It may be encrypted or damaged: give a file that players can play.",
                    ) from error
                self.damaged_after = time
        if not count:
            raise VideoError(f"{self.path} has no frame that can be decoded", hint="Give another file.")

    def _upright(self, pixels: NDArray[np.uint8], frame: VideoFrame) -> NDArray[np.uint8]:
        aspect = self._pixel_aspect
        if aspect != 1:
            wide = max(1, round(pixels.shape[1] * aspect))
            pixels = fitted(pixels, (wide, pixels.shape[0]), "stretch")
        return np.rot90(pixels, round(frame.rotation / 90) % 4)

    def _open(self) -> InputContainer:
        try:
            container: InputContainer = av.open(file_url(self.path))
        except IO_ERRORS as error:
            raise VideoError(
                f"{self.path} cannot be read as a video: {error}", hint="Give a file that players can play."
            ) from error
        return container

    def _stream(self, container: InputContainer) -> VideoStream:
        if not container.streams.video:
            raise VideoError(f"{self.path} has no video in it", hint="Give a file with pictures.")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise VideoError(
                f"{self.path} cannot be decoded: its codec is unknown here",
                hint="Convert it to H.264 first, or give another file.",
            )
        return stream

    def _whole_packets(
        self, container: InputContainer, *, flush: bool = False
    ) -> Iterator[Packet[VideoStream]]:
        for packet in container.demux(self._stream(container)):
            is_flush = packet.dts is None and not packet.size
            if not packet.is_corrupt and (flush or not is_flush):
                yield packet

    def _to_rgb(self, reformatter: VideoReformatter, frame: VideoFrame) -> NDArray[np.uint8]:
        matrix: int | None = None
        limits: ColorRange | None = None
        if not frame.format.is_rgb:
            untagged = BT709 if frame.height >= 720 else _BT601
            matrix = _MATRICES.get(frame.colorspace, untagged)
            is_full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
            limits = ColorRange.JPEG if is_full else ColorRange.MPEG
        converted = reformatter.reformat(
            frame,
            width=self.width,
            height=self.height,
            format="rgb24",
            src_colorspace=matrix,
            dst_colorspace=BT709,
            src_color_range=limits,
            dst_color_range=ColorRange.JPEG,
            interpolation=TO_RGB,
            threads=1,
        )
        return np.asarray(converted.to_ndarray(), dtype=np.uint8)


# ----------------------------------------------------------------------------------------------- fitting, images


def fitted(
    pixels: NDArray[np.uint8] | Image.Image, size: tuple[int, int], fit: str = "crop"
) -> NDArray[np.uint8]:
    """A picture in another size.

    Args:
        pixels: [H, W, 3] uint8 RGB, or an image; square pixels.
        size:   (width, height).
        fit:    crop (fill the size, cut what is over), pad (all of it, black around) or stretch.
    Returns: [height, width, 3] uint8 RGB.
    Raises: UsageError for another `fit`.
    """
    from PIL import Image, ImageOps

    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    if fit == "crop":
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    elif fit == "pad":
        image = ImageOps.pad(image, size, Image.Resampling.LANCZOS)
    elif fit == "stretch":
        image = image.resize(size, Image.Resampling.LANCZOS)
    else:
        raise UsageError(f"--fit {fit}: must be one of {', '.join(FITS)}", hint="For example --fit crop.")
    return np.array(image, dtype=np.uint8)


def read_image(path: Path | str, size: tuple[int, int], fit: str = "crop") -> NDArray[np.uint8]:
    """Read a PNG, JPEG or WebP, upright, in a size; what is transparent becomes black.

    Returns: [height, width, 3] uint8 RGB.
    Raises: UsageError if there is no such file, it is no such picture or is damaged; as `fitted`.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as opened:
            upright = ImageOps.exif_transpose(opened).convert("RGBA")
    except FileNotFoundError as error:
        raise UsageError(f"there is no image {path}", hint="Check the path.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(
            f"{path} cannot be read as an image: {error}", hint="Give a PNG, JPEG or WebP file."
        ) from error
    black = Image.new("RGBA", upright.size, (0, 0, 0, 255))
    return fitted(Image.alpha_composite(black, upright).convert("RGB"), size, fit)


# ---------------------------------------------------------------------------------------------- contact sheet


def contact_sheet(
    source: VideoReader | Path | str,
    output: Path | str,
    *,
    columns: int = 6,
    rows: int = 2,
    width: int = 1200,
) -> Path:
    """Draw evenly spaced frames, first and last included, with their times as one PNG.

    Args:
        source: a video; shorter ones than columns * rows frames fill the beginning of the grid.
        output: the PNG; replaced if it exists.
        width:  of the whole sheet in pixels.
    Returns: the path of the PNG.
    Raises: UsageError for a grid that is not possible; as VideoReader.
    """
    from PIL import Image, ImageDraw, ImageFont

    gap = 4
    reader = source if isinstance(source, VideoReader) else VideoReader(source)
    cell_width = (width - gap * (columns + 1)) // columns if columns > 0 else 0
    cell_height = round(cell_width * reader.height / reader.width)
    if rows < 1 or cell_width < 8 or cell_height < 8:
        raise UsageError(f"{columns} x {rows} pictures do not fit on a sheet {width} pixels wide")
    label_height = max(12, cell_width // 12)
    font = ImageFont.load_default(size=round(label_height * 0.8))
    sheet = Image.new("RGB", (width, gap + rows * (cell_height + label_height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    num_frames = reader.num_frames
    num_cells = min(columns * rows, num_frames)
    wanted = {round(cell * (num_frames - 1) / max(1, num_cells - 1)): cell for cell in range(num_cells)}
    tenths = num_frames / reader.fps < 2 * num_cells
    for index, frame in enumerate(reader):
        if index not in wanted:
            continue
        row, column = divmod(wanted[index], columns)
        left = gap + column * (cell_width + gap)
        top = gap + row * (cell_height + label_height + gap)
        picture = Image.fromarray(frame).resize((cell_width, cell_height), Image.Resampling.LANCZOS)
        sheet.paste(picture, (left, top))
        minutes, seconds = divmod(float(index / reader.fps), 60)
        label = f"{int(minutes)}:{seconds:04.1f}" if tenths else f"{int(minutes)}:{int(seconds):02d}"
        draw.text((left + cell_width // 2, top + cell_height), label, fill="black", font=font, anchor="ma")
    path = Path(output)
    try:
        with durable.replacing(path) as temporary:
            sheet.save(temporary, format="PNG", optimize=True)
    except OSError as error:
        raise write_error(error, path, plays=None) from error
    return path
