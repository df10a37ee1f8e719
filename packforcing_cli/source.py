"""Somebody's video as history: read as a stream, at the model's frame rate and size, cut into blocks from its end.

    source frames, resampled   [ lead ][ 13 ][ 16 ][ 16 ] ... [ 16 ] | new blocks
    blocks of the memory               [  0 ][  1 ][  2 ] ... [  M-1] |  M, M+1 …

The history ends where the source ends, in whole blocks; up to one block of frames at its beginning (the lead) stays
out of the memory but in the output. A source shorter than a block is preceded by copies of its first frame, in memory
only. Knows frames and numbers, neither latents nor models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from packforcing_cli.errors import UsageError
from packforcing_cli.layout import Lengths, Shown
from packforcing_cli.reader import VideoReader, fitted
from packforcing_cli.timeline import clock

Pixels = NDArray[np.uint8]
_ROUNDING = Fraction(1, 500)  # seconds: containers round times to a millisecond


class Source:
    """A part of a video file, resampled.

    Args:
        fps, size, fit: of the result; fit as `reader.fitted`.
        start, end:     the part that is used, in seconds from its first frame; end None = all.
    Attributes: path; num_frames of the result; start and end in seconds of the file's clock; reader; warnings, which
        may grow while frames are read.
    Raises: UsageError or VideoError if it cannot be read, or there is nothing between start and end.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        fps: int,
        size: tuple[int, int],
        fit: str = "crop",
        start: Fraction = Fraction(0),
        end: Fraction | None = None,
    ) -> None:
        self.reader = VideoReader(path)
        self.path, self.fps, self.size, self.fit = self.reader.path, fps, size, fit
        timing = self.reader.timing()
        length = timing.end - timing.start
        stop = length if end is None else min(end, length)
        if start >= stop:
            raise UsageError(
                f"there is nothing between {clock(start)} and {clock(stop)}: {path} is {clock(length)} long",
                hint="Choose other times with --from-time and --to-time.",
            )
        self.start, self.end = timing.start + start, timing.start + stop
        self.num_frames = max(1, math.floor((stop - start) * fps + Fraction(1, 2)))
        self.warnings: list[str] = []

    def frames(self) -> Iterator[Pixels]:
        """Yield `num_frames` frames [H, W, 3] uint8: at each of their times the one that is shown then.

        Where the file is damaged the last whole frame is held, with a warning.
        """
        wanted = (self.start + Fraction(n, self.fps) for n in range(self.num_frames))
        shown: Pixels | None = None
        fits: Pixels | None = None
        time = next(wanted)
        for stamp, frame in self.reader.upright():
            while stamp > time + _ROUNDING and shown is not None:
                if fits is None:
                    fits = fitted(shown, self.size, self.fit)
                yield fits
                following = next(wanted, None)
                if following is None:
                    return
                time = following
            shown, fits = frame, None
        assert shown is not None, "VideoReader.upright yields a frame or raises"
        if self.reader.damaged_after is not None:
            good = clock(max(Fraction(0), self.reader.damaged_after - self.start))
            self.warnings.append(
                f"{self.path} is damaged after {good}: its last whole frame is held from there"
            )
        fits = fitted(shown, self.size, self.fit)
        yield fits
        for _ in wanted:
            yield fits

    def history(self, grid: Lengths, *, only_new: bool = False) -> History:
        """How the frames fall into blocks.

        Args:
            only_new: leave them out of the new file.
        """
        blocks = grid.whole_blocks(self.num_frames)
        if blocks == 0:
            padded = grid.block_frames(0) - self.num_frames
            self.warnings.append(
                f"{self.path} is shorter than one block: its first frame stands for {padded} more in the memory"
            )
            return History(self, Shown(grid, 1, 0, padded, only_new))
        lead = self.num_frames - grid.frames_for(blocks)
        return History(self, Shown(grid, blocks, lead, 0, only_new))


@dataclass(frozen=True)
class History:
    """The blocks of a source, and what of it will be in the new file."""

    source: Source
    shown: Shown

    @property
    def blocks(self) -> int:
        """Whole blocks of memory."""
        return self.shown.history

    def pieces(self) -> Iterator[tuple[Pixels, bool]]:
        """Yield ([T, H, W, 3], whether it is a block): the lead in pieces of at most a block, then every block.

        Block 0 begins with the `padded` copies.
        """
        frames, lengths = self.source.frames(), self.shown.lengths
        for count in replace(self.shown, only_new=False).lead_pieces:
            yield np.stack([next(frames) for _ in range(count)]), False
        for block in range(self.blocks):
            missing = self.shown.padded if block == 0 else 0
            taken = [next(frames) for _ in range(lengths.block_frames(block) - missing)]
            yield np.stack([taken[0]] * missing + taken), True


# -- the seam ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seam:
    """How visible a join is.

    delta_e:    distance of the mean colours on both sides in CIE Lab (about 2 is just noticeable).
    jump:       mean change of a colour value, 0 to 255, from the last old to the first new frame.
    own_motion: the same from frame to frame before the join.
    """

    delta_e: float
    jump: float
    own_motion: float

    def __str__(self) -> str:
        motion = (
            f"{self.jump / self.own_motion:.1f} times the source's own motion" if self.own_motion else "still"
        )
        return f"colour shift {self.delta_e:.1f} dE, jump {self.jump:.1f} of 255 ({motion})"


def measure_seam(before: Pixels, after: Pixels) -> Seam:
    """Compare the frames on both sides of a join. before, after: [T, H, W, 3] uint8, at least one frame each."""
    colours = [lab(side.reshape(-1, 3).astype(np.float64)).mean(0) for side in (before[-4:], after[:4])]
    steps = [_change(a, b) for a, b in pairwise(before)]
    return Seam(
        delta_e=float(np.linalg.norm(colours[0] - colours[1])),
        jump=_change(before[-1], after[0]),
        own_motion=float(np.mean(steps)) if steps else 0.0,
    )


def _change(a: Pixels, b: Pixels) -> float:
    return float(np.abs(a.astype(np.int16) - b.astype(np.int16)).mean())


def lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """sRGB 0..255 [n, 3] -> CIE 1976 L*a*b* with white D65 (IEC 61966-2-1, CIE 15)."""
    value = rgb / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    matrix = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    xyz = linear @ matrix.T / matrix.sum(1)
    cube = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = cube.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
