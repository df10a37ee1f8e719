"""What reading and writing video files share of FFmpeg: how it takes a path, its errors, its numbers for colours.

Knows nothing of what is read or written.
"""

from __future__ import annotations

from pathlib import Path

import av

from packforcing_cli import durable
from packforcing_cli.errors import DiskFullError, PackforcingError, VideoError

IO_ERRORS = (OSError, av.FFmpegError)
# Flags of libswscale/swscale.h: ACCURATE_RND, BITEXACT, FULL_CHR_H_INT and FULL_CHR_H_INP give the same pixels
# on every processor; AREA averages the 2x2 pixels of a chroma sample, BILINEAR interpolates between samples.
_EXACT = 0x40000 | 0x80000 | 0x2000 | 0x4000
TO_YUV = 0x20 | _EXACT
TO_RGB = 0x2 | _EXACT
BT709 = 1  # in AVColorPrimaries, AVColorTransferCharacteristic and AVColorSpace alike (libavutil/pixfmt.h)


def file_url(path: Path) -> str:
    """A path as FFmpeg takes it: without "file:" a name like a:b.mp4 is taken for a protocol."""
    return f"file:{path}"


def write_error(error: OSError | av.FFmpegError, path: Path, *, plays: Path | None) -> PackforcingError:
    """What is raised when `path` could not be written; `plays` is a file to be named that does play."""
    kept = f"What was made so far plays: {plays}" if plays is not None else ""
    if error.errno in durable.FULL_DISK:
        hint = f"Free some space. {kept}".strip()
        return DiskFullError(f"the disk is full: {path} could not be written", hint=hint)
    return VideoError(f"{path} could not be written: {error.strerror or error}", hint=kept)
