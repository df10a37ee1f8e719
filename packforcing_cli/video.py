"""Video files being made: a writer that survives a kill, pipes, folders of frames, safe file names.

Knows files, codecs and colours; nothing of models, latents or prompts. Frames are uint8 RGB [T, H, W, 3].

What a file goes through; after every single write the bytes on disk play up to the last whole block:

    open    NAME.part.mp4   [ftyp moov]                                    a fragmented MP4 without frames
    write   NAME.part.mp4   [ftyp moov][free......block 0]                 one box, which players skip,
                            [ftyp moov][free][moof mdat]                   opened by changing one byte
    write   NAME.part.mp4   [ftyp moov][free][moof mdat][free][moof mdat]  block 1
    resume  NAME.part.mp4   what is whole stays as it is, a torn end is cut off
    close   a hidden file   [ftyp moov mdat]                               stream copy, index in front, fsync
            NAME.mp4                                                       rename, folder fsync, part removed

A block is encoded by a fresh encoder with fixed options and one thread, and flushed: a closed group whose
packets depend on its frames alone, so a block can be copied from one file into another. Without B-frames
packets are in display order. Each block is muxed in memory into a fragmented MP4 of its own; the header
must equal the file's, the fragment is appended once its number and start time are set.

Two things rule out one muxer kept open for the whole file (`movflags=hybrid_fragmented`, `flush_packets=1`).
It writes a fragment only when the next key frame arrives, so a kill takes the newest block along. And FFmpeg
refuses a whole file whose last moof is torn, which a kill within a write can leave.

Colour: RGB is converted to BT.709 limited range, chroma in the centre of its 2x2 pixels; the stream says so.
"""

from __future__ import annotations

import contextlib
import heapq
import io
import itertools
import os
import queue
import shlex
import struct
import threading
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from packforcing_cli import durable, mp4
from packforcing_cli.errors import EnvironmentProblem, LockedError, PackforcingError, UsageError, VideoError
from packforcing_cli.ffmpeg import BT709, IO_ERRORS, TO_YUV, file_url, write_error
from packforcing_cli.sound import Sound, sound_packets

try:  # advisory locks; Windows has none, and its own sharing rules protect an open file there
    import fcntl
except ImportError:  # pragma: no cover
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from av.packet import Packet
    from torch import Tensor

MAX_NAME_BYTES = 255  # of one file name on every common file system
MAX_SAFE_NAME_BYTES = 200  # what safe_name uses of it: ".part" and a copy's number still fit behind

CONTAINERS = {".mp4": "mp4", ".mkv": "matroska", ".mov": "mov"}
"""Endings a finished video may have -> FFmpeg's muxers. The unfinished one is an MP4 whatever it becomes."""
CODECS = {
    # name -> FFmpeg's encoder, default preset, tag in an MP4
    "h264": ("libx264", "veryfast", "avc1"),
    "hevc": ("libx265", "veryfast", "hvc1"),
    "h264_nvenc": ("h264_nvenc", "p4", "avc1"),
    "hevc_nvenc": ("hevc_nvenc", "p4", "hvc1"),
}

_FRAGMENTED = "empty_moov+default_base_moof+frag_custom+skip_trailer+use_metadata_tags"  # movflags of a block
_FORBIDDEN = frozenset("<>:\"/\\|?*'`$&;!#%(){}[]^~=+,@")  # for Windows, a shell or a URL
_RESERVED = frozenset(
    {"con", "prn", "aux", "nul", "conin$", "conout$"}
    | {f"{port}{number}" for port in ("com", "lpt") for number in "0123456789¹²³"}
)  # device names of Windows, with any extension


# -------------------------------------------------------------------------------------------- names and paths


def safe_name(prompt: str, suffix: str) -> str:
    """Make a file name out of any text: words joined by "-", then `suffix`.

    Args:
        prompt: any text; letters of all scripts and emoji stay.
        suffix: the end of the name, for example "-7.mp4"; must itself be safe.
    Returns: a name of 1 to 200 UTF-8 bytes, possible on every platform: no separators, control or shell
        characters, no device name of Windows, no dot or dash in front. "video" stands for a prompt of which
        nothing is left.
    Raises: UsageError if the suffix leaves no room or has characters a file name cannot have.
    """
    if any(c in _FORBIDDEN or unicodedata.category(c)[0] in "CZ" for c in suffix):
        raise UsageError(f"{suffix!r} cannot end a file name")
    room = MAX_SAFE_NAME_BYTES - len(suffix.encode())
    if room < 16:
        raise UsageError(f"{suffix!r} leaves no room for a file name of {MAX_SAFE_NAME_BYTES} bytes")
    kept = []
    for character in prompt:
        category = unicodedata.category(character)
        if character in _FORBIDDEN or category[0] == "Z" or character in "\t\n\v\f\r":
            kept.append(" ")
        elif category[0] != "C":  # control, format, surrogate, private use, unassigned
            kept.append(character)
    words = unicodedata.normalize("NFC", " ".join("".join(kept).split()))
    stem = words.replace(" ", "-").strip("-.")
    if stem.split(".")[0].lower() in _RESERVED:
        stem = f"video-{stem}"
    # Cutting bytes may split the last character: "ignore" drops its remains.
    stem = stem.encode()[:room].decode(errors="ignore").rstrip("-.")
    return (stem or "video") + suffix


def part_path(path: Path) -> Path:
    """Where the unfinished video of `path` is: NAME.part.mp4 beside NAME.mp4, NAME.mkv or NAME.mov."""
    return path.with_name(f"{path.stem}.part.mp4")


def check_output(path: Path, *, overwrite: bool = False) -> None:
    """Refuse an output that cannot be written, before any work is done for it. Writes nothing.

    Raises: UsageError, with the next step, if the ending is not in CONTAINERS, the name is too long or no text,
        the folder is missing or read-only, the file exists, or an interrupted run left its unfinished video there.
    """
    if "\0" in str(path):
        raise UsageError(f"the output name {str(path)!r} has a NUL character in it")
    try:
        os.fsencode(path.absolute()).decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the output name {str(path)!r} is not UTF-8 text", hint="Choose another output with -o."
        ) from error
    if path.suffix.lower() not in CONTAINERS or not path.stem.strip(". "):
        raise UsageError(
            f"cannot write a video to {path}",
            hint=f"Give a file name that ends in {' or '.join(CONTAINERS)}.",
        )
    size = len(os.fsencode(part_path(path).name))
    if size > MAX_NAME_BYTES:
        raise UsageError(
            f"the output name is too long: {size} bytes with '.part', at most {MAX_NAME_BYTES} are possible",
            hint=f"For example: -o {shlex.quote(safe_name(path.stem, path.suffix.lower()))}",
        )
    folder = path.parent
    if not folder.is_dir():
        if folder.exists():
            raise UsageError(f"{folder} is not a folder", hint="Choose another output with -o.")
        raise UsageError(f"the folder {folder} does not exist", hint=f"mkdir -p {shlex.quote(str(folder))}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"the folder {folder} is not writable", hint="Choose another output with -o.")
    if path.is_dir():
        raise UsageError(f"{path} is a folder", hint="Choose another output with -o.")
    if not overwrite:
        if path.exists():
            raise UsageError(f"{path} exists", hint="Choose another output with -o, or pass --overwrite.")
        if part_path(path).exists():
            raise _leftover(path)


def _leftover(path: Path) -> UsageError:
    part = part_path(path)
    return UsageError(
        f"{part} exists: an interrupted run left it, and it plays",
        hint=f"Rename it to keep it (mv {shlex.quote(str(part))} …), or pass --overwrite to replace it.",
    )


def _other_encoder(path: Path) -> VideoError:
    return VideoError(
        f"{path} was made by another version of the encoder, or with other settings: it cannot be continued",
        hint="Write the whole video to another file with -o.",
    )


# ----------------------------------------------------------------------------------------------------- writer


class VideoWriter:
    """Writes blocks of frames to a video file on a thread of its own.

    Use as a context manager: leaving it normally closes, leaving it by an exception aborts. An error on the
    thread surfaces at the next `write`, `flush` or `close`; every block written before it stays playable.

    Args:
        path:         the finished file, an MP4, MKV or MOV. Until `close` there is only NAME.part.mp4.
        fps:          frames a second, an integer or an exact fraction.
        width:        of a frame, even (4:2:0).
        height:       of a frame, even.
        codec:        one of CODECS.
        crf:          0 (lossless) to 51, the constant rate factor of x264 and x265; NVENC's quantiser.
        preset:       the encoder's preset; None = the one of CODECS.
        metadata:     written into both files under these very keys.
        chapters:     (first frame, title) of each, rising; in the finished file.
        sound:        of another file, for the finished one.
        queue_blocks: how many blocks may wait for the encoder before `write` blocks.
        overwrite:    replace NAME.mp4 at the end and an abandoned NAME.part.mp4 at the start.
        owner:        a name for this video, kept in the part (where players skip it) and not in NAME.mp4.
        resume:       how many blocks of an earlier writer's NAME.part.mp4 are wanted back: whole ones among
                      them stay, `blocks_written` says how many; what follows is cut off. A part of another
                      `owner` or encoder is refused. None = start anew.
    Raises: UsageError as `check_output`; LockedError if another process is writing this very file;
        DiskFullError; as `check_encoder`.

    encode_seconds: spent by the thread so far, encoding and writing.
    first_at:       `time.perf_counter()` when the first block that was encoded here was in the file; None before.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        fps: int | Fraction,
        width: int,
        height: int,
        codec: str = "h264",
        crf: int = 18,
        preset: str | None = None,
        metadata: Mapping[str, str] | None = None,
        chapters: Sequence[tuple[int, str]] = (),
        sound: Sound | None = None,
        queue_blocks: int = 4,
        overwrite: bool = False,
        owner: str = "",
        resume: int | None = None,
    ) -> None:
        self.path = Path(path)
        has_part = resume is not None and part_path(self.path).exists()
        check_output(self.path, overwrite=overwrite or (has_part and not self.path.exists()))
        self._overwrite, self._sound = overwrite, sound
        self._chapters = [(frame, _clean(title)) for frame, title in chapters]
        self._encoder = _BlockEncoder(
            codec, fps=fps, width=width, height=height, crf=crf, preset=preset, metadata=metadata
        )
        self._blocks = 0
        self._frames = 0
        self._size_bytes = 0
        self.encode_seconds = 0.0
        self.first_at: float | None = None
        self._error: PackforcingError | None = None
        self._finished = False  # the thread has ended and the file is where it stays
        self._fd = _open_part(self.path, exists=overwrite or has_part)
        header = self._encoder.header + mp4.owner_box(owner)
        try:
            if not (has_part and self._continue(header, mp4.owner_box(owner), blocks=resume or 0)):
                os.ftruncate(self._fd, 0)
                self._append(header)
        except OSError as error:
            self._release(remove=not has_part)
            raise write_error(error, self.part_path, plays=None) from error
        except PackforcingError:
            self._release(remove=not has_part)
            raise
        self._queue: queue.Queue[NDArray[np.uint8] | None] = queue.Queue(maxsize=max(1, queue_blocks))
        self._thread = threading.Thread(target=self._work, name=f"video {self.path.name}", daemon=True)
        self._thread.start()

    @property
    def part_path(self) -> Path:
        """The file that plays while the video is being made."""
        return part_path(self.path)

    @property
    def blocks_written(self) -> int:
        """Whole blocks on disk: they play even if the process is killed now."""
        return self._blocks

    @property
    def frames_written(self) -> int:
        """Frames of those blocks."""
        return self._frames

    def write(self, frames: Tensor | NDArray[np.uint8]) -> None:
        """Queue one block; blocks while the queue is full. The frames are copied.

        Args:
            frames: [T, H, W, 3] uint8 RGB, T >= 1; a tensor on any device or an array.
        Raises: VideoError for other shapes or types and after `close`; what the thread met.
        """
        self._raise_error()
        if self._finished:
            raise VideoError(f"{self.path} is already closed")
        self._queue.put(self._encoder.checked(frames))

    def copy(self, source: Path, lengths: Iterable[int]) -> None:
        """Append the first blocks of a finished file of equal settings, packet by packet, without re-encoding.

        Args:
            source:  a file this class finished.
            lengths: frames of each block.
        Raises: VideoError if the source has fewer frames, cannot be read or is another encoder's; DiskFullError.
        """
        self.flush()
        for fragment, count in self._encoder.copied(source, lengths):
            self._append_block(fragment, count)

    def flush(self) -> None:
        """Wait until every queued block is on disk. Raises: as `write`."""
        self._queue.join()
        self._raise_error()

    def close(self) -> Path:
        """Write what is queued and turn NAME.part.mp4 into NAME.mp4; calling it again does no harm.

        Returns: the path of NAME.mp4.
        Raises: VideoError or DiskFullError, of the thread or of the copy; the part file stays, plays, and has
            all blocks written so far. VideoError if no block was written.
        """
        if not self._finished:
            self._stop()
            self._finished = True
            self._finish_file()
        self._raise_error()
        return self.path

    def abort(self, *, finish: bool = False) -> Path | None:
        """End early; all blocks given to `write` before stay playable. Never raises.

        Args:
            finish: also turn the part into NAME.mp4. Off by default, so that NAME.mp4 means a whole video.
        Returns: the file that plays, NAME.part.mp4 or NAME.mp4; None, and no file, without a whole block.
        """
        if not self._finished:
            self._stop()
            self._finished = True
            if finish and self._blocks:
                self._finish_file()
            else:
                self._release(remove=not self._blocks)
        if self.part_path.exists() and self._blocks:
            return self.part_path
        return self.path if self._blocks and self.path.exists() else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _work(self) -> None:
        while True:
            frames = self._queue.get()
            try:
                if frames is None:
                    return
                if self._error is None:  # after an error blocks are dropped: `write` must not wait forever
                    self._write_block(frames)
            except PackforcingError as error:
                self._error = error
            except BaseException as error:
                self._error = VideoError(f"block {self._blocks} could not be encoded: {error!r}")
                self._error.__cause__ = error
            finally:
                self._queue.task_done()

    def _write_block(self, frames: NDArray[np.uint8]) -> None:
        start = time.perf_counter()
        self._append_block(self._encoder.encode(frames), len(frames))
        end = time.perf_counter()
        self.encode_seconds += end - start
        self.first_at = self.first_at or end

    def _append_block(self, fragment: bytearray, num_frames: int) -> None:
        mp4.place_fragment(fragment, number=self._blocks + 1, start=self._frames * self._encoder.frame_ticks)
        # A free box with a 64-bit size (1 in the 32-bit field says so) hides the fragment from players.
        # With 16 in that field it is an empty box before the fragment.
        hidden = struct.pack(">I4sQ", 1, b"free", 16 + len(fragment))
        self._append(hidden + fragment, opened_by=(3, b"\x10"))
        self._frames += num_frames
        self._blocks += 1

    def _continue(self, header: bytes, owner: bytes, *, blocks: int) -> bool:
        """Take over the whole blocks of the open part, at most so many; False if it has not even a header.

        Raises: UsageError if the part is another video's; VideoError if another encoder made it.
        """
        os.lseek(self._fd, 0, os.SEEK_SET)
        found = os.read(self._fd, 2 * len(header))
        if header.startswith(found) and found != header:
            return False
        if not found.startswith(header):
            raise _other_encoder(self.part_path) if owner and owner in found else _leftover(self.path)
        self._size_bytes = len(header)
        for end, frames in mp4.whole_blocks(self._fd, len(header), frame_ticks=self._encoder.frame_ticks):
            if self._blocks == blocks:
                break
            self._size_bytes, self._blocks, self._frames = end, self._blocks + 1, self._frames + frames
        os.ftruncate(self._fd, self._size_bytes)
        return True

    def _append(self, data: bytes, *, opened_by: tuple[int, bytes] | None = None) -> None:
        """Append all of `data` or nothing, then, once it is safe on disk, change the byte at an offset in it."""
        try:
            durable.append(self._fd, data, size_bytes=self._size_bytes, sync=opened_by is not None)
            if opened_by is not None:
                os.lseek(self._fd, self._size_bytes + opened_by[0], os.SEEK_SET)
                durable.write_all(self._fd, opened_by[1])
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size_bytes)
            plays = self.part_path if self._blocks else None
            raise write_error(error, self.part_path, plays=plays) from error
        self._size_bytes += len(data)

    def _stop(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _finish_file(self) -> None:
        if not self._blocks:
            self._error = self._error or VideoError(f"no frames were written, so there is no {self.path}")
            self._release(remove=True)
            return
        if self._error is None:
            try:
                remux(
                    self.part_path,
                    self.path,
                    metadata=self._encoder.metadata,
                    chapters=self._chapters,
                    sound=self._sound,
                    num_frames=self._frames,
                    overwrite=self._overwrite,
                )
            except PackforcingError as error:
                self._error = error
        self._release(remove=self._error is None)

    def _release(self, *, remove: bool) -> None:
        with contextlib.suppress(OSError):  # what matters was synced before
            os.close(self._fd)
        if remove:
            with contextlib.suppress(OSError):
                self.part_path.unlink()
                durable.sync_folder(self.path.parent)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


class _BlockEncoder:
    """Turns the frames of one block into one MP4 fragment, always with the same options and a fresh encoder.

    header:      ftyp and moov, equal for all blocks.
    frame_ticks: duration of a frame in the track's time scale.
    """

    def __init__(
        self,
        codec: str,
        *,
        fps: int | Fraction,
        width: int,
        height: int,
        crf: int,
        preset: str | None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        if width < 2 or height < 2 or width % 2 or height % 2:
            raise UsageError(f"a video of {width}x{height} is not possible: both must be even")
        if fps <= 0:
            raise UsageError(f"a video of {fps} frames a second is not possible")
        if not 0 <= crf <= 51:
            raise UsageError(f"crf {crf} is out of range", hint="Choose 0 (lossless) to 51 (smallest).")
        if codec not in CODECS:
            raise UsageError(f"unknown codec {codec!r}", hint=f"Choose one of {', '.join(CODECS)}.")
        self.fps = Fraction(fps)
        self.width = width
        self.height = height
        self.metadata = {_clean(key): _clean(value) for key, value in (metadata or {}).items()}
        self._encoder, usual, self._tag = CODECS[codec]
        is_hardware = self._encoder.endswith("_nvenc")
        self._options = {"preset": preset or usual, "chroma_sample_location": "center"}
        self._options |= {"rc": "constqp", "qp": str(crf)} if is_hardware else {"crf": str(crf)}
        if self._encoder == "libx265":  # its output, like x264's, depends on the number of threads
            self._options["x265-params"] = "log-level=error:bframes=0:pools=none:frame-threads=1"
        self._reformatter = VideoReformatter()
        self.frame_ticks = 0
        try:
            self.header, _ = self._mux(())
            if is_hardware:  # whether there is such hardware shows when it works
                self.encode(np.zeros((2, height, width, 3), dtype=np.uint8))
        except av.codec.codec.UnknownCodecError as error:
            raise EnvironmentProblem(
                f"this PyAV cannot encode {codec}: it was built without {self._encoder}",
                hint="python -m pip install --force-reinstall --only-binary :all: av",
            ) from error
        except IO_ERRORS as error:
            if is_hardware:
                raise EnvironmentProblem(
                    f"this machine cannot encode with {self._encoder}: {error}",
                    hint=f"Use --codec {codec.partition('_')[0]}.",
                ) from error
            raise VideoError(
                f"{self._encoder} refuses {width}x{height}, {self.fps} frames/s, crf {crf},"
                f" preset {preset or usual!r}: {error}",
                hint="Leave --preset away.",
            ) from error

    def checked(self, frames: Tensor | NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A copy of a block's frames as an array. Raises: VideoError if they are not [T, H, W, 3] uint8."""
        array = np.array(frames.cpu().numpy() if hasattr(frames, "cpu") else frames, order="C")
        expected = (self.height, self.width, 3)
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != expected or not len(array):
            raise VideoError(
                f"a block must be uint8 [T >= 1, {expected[0]}, {expected[1]}, 3], "
                f"not {array.dtype} {list(array.shape)}"
            )
        return array

    def encode(self, frames: NDArray[np.uint8]) -> bytearray:
        """Encode [T, H, W, 3]; returns moof and mdat, number and start time not set yet."""
        header, fragment = self._mux(frames)
        if header != self.header:
            raise VideoError("the encoder changed its parameter sets between blocks")
        return bytearray(fragment)

    def copied(self, source: Path, lengths: Iterable[int]) -> Iterator[tuple[bytearray, int]]:
        """Fragments made of the packets of a finished file, as `encode` gives them, and their frames."""
        try:
            with av.open(file_url(source)) as reader:
                stream = reader.streams.video[0]
                packets = (p for p in reader.demux(stream) if p.dts is not None and not p.is_corrupt)
                for length in lengths:
                    block = list(itertools.islice(packets, length))
                    if len(block) < length:
                        raise VideoError(f"{source} has fewer frames than it should")
                    yield self._copy(stream, block), length
        except (*IO_ERRORS, IndexError) as error:
            raise VideoError(f"{source} cannot be continued: {error}") from error

    def _copy(self, stream: VideoStream, packets: list[Packet[VideoStream]]) -> bytearray:
        file = io.BytesIO()
        with av.open(file, "w", format="mp4", container_options={"movflags": _FRAGMENTED}) as container:
            copy = container.add_stream_from_template(stream)
            copy.time_base = 1 / (self.fps * self.frame_ticks)
            container.start_encoding()
            for n, packet in enumerate(packets):  # in display order, and a Matroska file's times are rounded
                packet.stream = copy
                packet.time_base = 1 / self.fps
                packet.pts = packet.dts = n
                packet.duration = 1
                container.mux(packet)
            if self.frame_ticks * (copy.time_base or 0) != 1 / self.fps:
                raise VideoError(f"the time base {copy.time_base} is not that of this video")
        header, fragment = mp4.split(file.getvalue())
        if mp4.parameter_sets(header) != mp4.parameter_sets(self.header):
            raise _other_encoder(Path(stream.container.name))
        return bytearray(fragment)

    def _mux(self, frames: Iterable[NDArray[np.uint8]]) -> tuple[bytes, bytes]:
        file = io.BytesIO()
        with av.open(file, "w", format="mp4", container_options={"movflags": _FRAGMENTED}) as container:
            container.metadata.update(self.metadata)
            stream = container.add_stream(
                self._encoder, rate=self.fps, options=self._options, width=self.width, height=self.height
            )
            assert isinstance(stream, VideoStream)
            time_base = 1 / self.fps
            context = stream.codec_context
            context.time_base = time_base
            context.pix_fmt = "yuv420p"
            context.codec_tag = self._tag
            context.max_b_frames = 0
            context.thread_count = 1  # x264's output depends on the number of threads
            context.color_primaries = BT709
            context.color_trc = BT709
            context.colorspace = BT709
            context.color_range = ColorRange.MPEG
            container.start_encoding()
            assert stream.time_base is not None
            ticks = time_base / stream.time_base
            assert ticks.denominator == 1, (time_base, stream.time_base)
            self.frame_ticks = ticks.numerator
            for packet in self._packets(stream, frames, time_base):
                packet.duration = 1  # of time_base; x264 leaves it open, and the last frame has no successor
                container.mux(packet)
        return mp4.split(file.getvalue())

    def _packets(
        self, stream: VideoStream, frames: Iterable[NDArray[np.uint8]], time_base: Fraction
    ) -> Iterator[Packet[VideoStream]]:
        count = 0
        for pixels in frames:
            frame = self._reformatter.reformat(
                VideoFrame.from_ndarray(pixels, format="rgb24"),
                format="yuv420p",
                src_colorspace=BT709,
                dst_colorspace=BT709,
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
                interpolation=TO_YUV,
                threads=1,
            )
            frame.pts = count
            frame.time_base = time_base
            count += 1
            yield from stream.encode(frame)
        if count:
            yield from stream.encode(None)


class PipeWriter:
    """Writes blocks as a fragmented MP4 into a stream that cannot go back, such as a pipe.

    What has gone out plays up to the last whole block. Use it as a context manager, like VideoWriter.

    Args:
        file: open for binary writing; it stays open.
        the others as VideoWriter.
    Raises: as `check_encoder`; VideoError if nobody reads any more.
    """

    path = Path("-")

    def __init__(
        self,
        file: BinaryIO,
        *,
        fps: int | Fraction,
        width: int,
        height: int,
        codec: str = "h264",
        crf: int = 18,
        preset: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._file, self.blocks_written, self.frames_written = file, 0, 0
        self.encode_seconds = 0.0  # nothing runs beside: writing waits for it
        self.first_at: float | None = None  # as VideoWriter's
        self._encoder = _BlockEncoder(
            codec, fps=fps, width=width, height=height, crf=crf, preset=preset, metadata=metadata
        )
        self._send(self._encoder.header)

    def write(self, frames: Tensor | NDArray[np.uint8]) -> None:
        """Encode one block [T, H, W, 3] uint8 RGB and send it. Raises: VideoError, DiskFullError."""
        array = self._encoder.checked(frames)
        fragment = self._encoder.encode(array)
        mp4.place_fragment(
            fragment, number=self.blocks_written + 1, start=self.frames_written * self._encoder.frame_ticks
        )
        self._send(fragment)
        self.first_at = self.first_at or time.perf_counter()
        self.blocks_written, self.frames_written = self.blocks_written + 1, self.frames_written + len(array)

    def flush(self) -> None:
        """Nothing waits: `write` returns when the block has gone out."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def _send(self, data: bytes | bytearray) -> None:
        try:
            self._file.write(data)
            self._file.flush()
        except BrokenPipeError as error:
            raise VideoError(
                f"nobody reads the video any more, after {self.blocks_written} blocks"
            ) from error
        except OSError as error:
            raise write_error(error, self.path, plays=None) from error


def check_frames(folder: Path, *, overwrite: bool = False) -> None:
    """Refuse a folder for frames that cannot be written or, without `overwrite`, has some. Writes nothing.

    Raises: UsageError.
    """
    said = ""
    if folder.exists() and not folder.is_dir():
        said = f"{folder} is not a folder"
    elif not folder.exists() and not folder.parent.is_dir():
        said = f"the folder {folder.parent} does not exist"
    elif not os.access(folder if folder.exists() else folder.parent, os.W_OK | os.X_OK):
        said = f"the folder {folder} is not writable"
    if said:
        raise UsageError(said, hint="Choose another folder for --frames.")
    if not overwrite and next(folder.glob("frame-*.png"), None) is not None:
        raise UsageError(
            f"there are frames in {folder}", hint="Choose another folder for --frames, or pass --overwrite."
        )


class FrameFolder:
    """A folder of numbered PNG files, frame-000000.png and on; see `check_frames` for what it may have in it.

    Every file is there whole or not at all, also after a kill.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def lacks(self, count: int) -> bool:
        """Whether one of the first `count` files is missing."""
        return not all(self._path(number).exists() for number in range(count))

    def write(self, frames: Tensor | NDArray[np.uint8], *, first: int, only_missing: bool = False) -> None:
        """Write [T, H, W, 3] uint8 RGB, numbered from `first`; they are safe on disk when this returns.

        Args:
            only_missing: leave the files that are there.
        Raises: DiskFullError, VideoError.
        """
        from PIL import Image

        try:
            self.folder.mkdir(exist_ok=True)
            for number, pixels in enumerate(np.asarray(frames), start=first):
                if only_missing and self._path(number).exists():
                    continue
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, format="PNG")
                durable.write(self._path(number), file.getvalue())
        except OSError as error:
            raise write_error(error, self.folder, plays=None) from error

    def _path(self, number: int) -> Path:
        return self.folder / f"frame-{number:06}.png"


def check_encoder(
    codec: str, *, fps: int | Fraction, width: int, height: int, crf: int = 18, preset: str | None = None
) -> None:
    """Try whether videos like this can be encoded here.

    Raises: UsageError for numbers or names that are not possible; EnvironmentProblem if PyAV or the machine has no
        such encoder; VideoError if it refuses the settings.
    """
    _BlockEncoder(codec, fps=fps, width=width, height=height, crf=crf, preset=preset)


def remux(
    source: Path,
    target: Path,
    *,
    metadata: Mapping[str, str],
    chapters: Sequence[tuple[int, str]] = (),
    sound: Sound | None = None,
    num_frames: int | None = None,
    overwrite: bool = False,
) -> int:
    """Copy the video stream of `source` into an ordinary file, without re-encoding, whole or not at all.

    The copy is made beside `target` (a hidden file, index in front), fsynced and renamed; `source` stays.

    Args:
        metadata:   keys and values of the new file.
        chapters:   (first frame, title) of each, rising; those behind the last frame are left out.
        sound:      of another file, copied as it is where the container can hold it, else encoded as AAC.
        num_frames: how many frames must arrive.
        overwrite:  replace an existing `target`.
    Returns: the number of frames copied.
    Raises: DiskFullError; VideoError if `source` cannot be read or lacks frames, or `target` has appeared.
    """
    count = 0
    errors: list[OSError] = []
    try:
        with durable.replacing(target, overwrite=overwrite) as temporary:
            with (
                contextlib.ExitStack() as opened,
                av.open(file_url(source)) as reader,
                _RawFile(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, errors) as file,
                av.open(
                    file,
                    "w",
                    io_open=lambda *_: _RawFile(
                        temporary, os.O_RDONLY, errors
                    ),  # to move what is behind the index
                    format=CONTAINERS[target.suffix.lower()],
                    container_options=_index_in_front(target),
                ) as writer,
            ):
                writer.metadata.update(metadata)
                stream = reader.streams.video[0]
                copy = writer.add_stream_from_template(stream)
                _set_chapters(writer, chapters, stream, num_frames)
                heard = () if sound is None else opened.enter_context(sound_packets(sound, writer))
                for packet in _by_time(_picture_packets(reader, stream, copy), heard):
                    count += packet.stream is copy
                    writer.mux(packet)
            if num_frames is not None and count != num_frames:
                raise VideoError(
                    f"only {count} of {num_frames} frames could be copied",
                    hint=f"What is there plays: {source}",
                )
    except FileExistsError as error:
        raise VideoError(
            f"{target} appeared while the video was being made", hint=f"The new one plays: {source}"
        ) from error
    except IO_ERRORS as error:
        raise write_error(errors[0] if errors else error, target, plays=source) from error
    except IndexError as error:
        raise VideoError(f"there is no video in {source}") from error
    return count


class _RawFile(io.RawIOBase):
    """A file for FFmpeg's muxers, every write of which is one of this process, whole or an OSError.

    Args:
        errors: gets every OSError of a write: FFmpeg goes on to its trailer and tells of another one then.
    """

    def __init__(self, path: Path, flags: int, errors: list[OSError]) -> None:
        super().__init__()
        self.name, self._errors = str(path), errors
        self._fd: int | None = os.open(path, flags | durable.BINARY, 0o666)

    def write(self, data: Any) -> int:
        assert self._fd is not None
        try:
            durable.write_all(self._fd, bytes(data))
        except OSError as error:
            self._errors.append(error)
            raise
        return len(data)

    def readinto(self, buffer: Any) -> int:
        assert self._fd is not None
        data = os.read(self._fd, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert self._fd is not None
        return os.lseek(self._fd, offset, whence)

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        fd, self._fd = self._fd, None
        super().close()
        if fd is not None:
            os.close(fd)


def _index_in_front(target: Path) -> dict[str, str]:
    """Muxer options with which a file can be played while it is still being loaded."""
    if CONTAINERS[target.suffix.lower()] == "matroska":
        return {"cues_to_front": "1"}
    return {"movflags": "faststart+use_metadata_tags"}


def _set_chapters(
    writer: OutputContainer,
    chapters: Sequence[tuple[int, str]],
    stream: VideoStream,
    num_frames: int | None,
) -> None:
    """Put chapters into a file that is not begun yet; each lasts until the next one, the last to the end."""
    if not chapters or not stream.average_rate or num_frames is None:
        return
    there = [(frame, title) for frame, title in chapters if frame < num_frames]
    ends = [*(frame for frame, _ in there[1:]), num_frames]
    writer.set_chapters(
        [
            {
                "id": number,
                "start": frame,
                "end": end,
                "time_base": 1 / stream.average_rate,
                "metadata": {"title": title},
            }
            for number, ((frame, title), end) in enumerate(zip(there, ends, strict=True))
        ]
    )


def _picture_packets(
    reader: InputContainer, stream: VideoStream, copy: VideoStream
) -> Iterator[Packet[VideoStream]]:
    for packet in reader.demux(stream):
        if packet.dts is None or packet.is_corrupt:  # the flush packet; the torn end of a killed run
            continue
        packet.stream = copy
        yield packet


def _by_time(*streams: Iterable[Packet[Any]]) -> Iterator[Packet[Any]]:
    """Packets of several streams in the order in which they are needed."""
    return heapq.merge(*streams, key=lambda packet: (packet.dts or 0) * (packet.time_base or 0))


def _open_part(path: Path, *, exists: bool) -> int:
    """Open and lock NAME.part.mp4, whether it `exists` or must be new; the lock goes with the process."""
    part = part_path(path)
    flags = os.O_RDWR | os.O_CREAT | durable.BINARY | getattr(os, "O_CLOEXEC", 0)
    try:
        fd = os.open(part, flags if exists else flags | os.O_EXCL, 0o666)
    except FileExistsError as error:
        raise _leftover(path) from error
    except OSError as error:
        if error.errno in durable.FULL_DISK:
            raise write_error(error, part, plays=None) from error
        raise UsageError(
            f"cannot write {part}: {error.strerror}", hint="Choose another output with -o."
        ) from error
    if fcntl is not None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise LockedError(
                f"another process is writing {part}", hint="Wait for it, or choose another output with -o."
            ) from error
        except OSError:  # a file system without locks
            pass
    try:
        durable.sync_folder(part.parent)  # the file's name lasts from here on
    except OSError as error:
        os.close(fd)
        if not exists:
            part.unlink(missing_ok=True)
        raise write_error(error, part, plays=None) from error
    return fd


def _clean(text: str) -> str:
    """What a metadata field can hold: UTF-8 without NUL."""
    return str(text).replace("\0", "").encode(errors="replace").decode()
