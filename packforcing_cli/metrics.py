"""What can be measured of a long video without any weights: motion, flicker, drift, loops, jumps.

    file --> frames --+--> small picture, 64 px on the short side --> change of every frame --> jumps, flicker
                      |                                           --> every 1/8 s: block matching --> motion
                      +--> thumbnail, 32 px on the long side, every 1/8 s --> repetition
                      |                                       every 1/2 s --> brightness, contrast, saturation, colour
                      +--> full picture, every 1/2 s --> sharpness, noise

Frames are read once, as a stream; what is kept of hours are numbers and at most MAX_THUMBS thumbnails. Everything is a
curve over time, a mean over each ten-second segment, and where it makes sense a row of a matrix over the distance
between frames: neighbouring frames cannot show drift, frames a minute apart do.

The docstrings of MEASURES are the definitions that `packforcing eval --explain` prints. Motion is found by block
matching in numpy: FFmpeg's mestimate gives vectors without any confidence, and an optical-flow library would be one
more dependency for a figure that only needs whole pixels. Knows files and pixels; neither models nor any display.
"""

from __future__ import annotations

import inspect
import math
import shlex
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packforcing_cli import provenance, runfolder
from packforcing_cli.errors import PackforcingError, UsageError
from packforcing_cli.layout import Lengths, Shown
from packforcing_cli.reader import VideoReader
from packforcing_cli.runfolder import Record
from packforcing_cli.source import Pixels, Seam, lab, measure_seam
from packforcing_cli.timeline import Timeline, clock
from packforcing_cli.video import part_path

Floats = NDArray[np.float64]

SHORT_SIDE = 64  # px of the small picture
LONG_SIDE = 32  # px of a thumbnail
STEP = Fraction(
    1, 8
)  # seconds between thumbnails and over which motion is measured; VBench samples 8 frames a second
STATE_STEP = Fraction(1, 2)  # seconds between looks at colours and sharpness
MAX_THUMBS, MAX_STATES = 32768, 14400  # of one video: a longer one is sampled more thinly
REFERENCE_SECONDS = 2  # what colours are compared with
SEGMENT_SECONDS = 10
SEAM_FRAMES = 16  # frames before a seam whose motion its jump is compared with

TILE, REACH = 8, 12  # px of the small picture: side of a matched block, farthest displacement
MATCH_GAIN, MATCH_LEVELS = (
    0.6,
    2.0,
)  # a block has moved if its match leaves less than this share, and levels less
PULL = 0.5  # levels a px of displacement costs: of equal matches, as along an edge, the nearest is taken
TOP_SHARE = 0.05  # of the blocks: the ones that move most (VBench)
DYNAMIC_SPEED = 100 * 6 / 256 * 8  # % of the short side a second: VBench's 6 of 256 px in 1/8 s
STILL_SPEED = (
    6.0  # % of the short side a second: half a pixel of the small picture a step, the least that is seen
)
DYNAMIC_SHARE, DYNAMIC_WINDOW = 4 / 16, 2.0  # VBench: 4 of 16 steps; VBench-Long: clips of 2 s
QUANTILES = 32
SHORTEST_LOOP, LOOP_WINDOW = 1.0, 20.0  # seconds
LOOPS_FROM = 0.7  # strength of a repetition that is called a loop
STILL = 1.0  # levels (RMS): pictures that differ less do not differ
JUMP_SCORE, JUMP_WINDOW, JUMP_MERGE = 8.0, 1.0, 0.25  # robust deviations; seconds on each side; seconds
JUMP_FLOOR, JUMP_SHARE = 0.3, 0.25  # the least deviation: levels, and share of the usual change
JUMP_PERIODS = (2, 3, 4, 5)  # frames: of a codec's rhythm
JUMP_OVER = 2.0  # times the larger changes around it
VISIBLE_DELTA_E = 2.3  # just noticeable (Mahy, van Eycken, Oosterlinck 1994)
LUMA = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)  # ITU-R BT.709
DISTANCES = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400)  # seconds
NEARLY_ALL = 0.98  # of the frames that a file announces: some containers count a few too many
MAX_POINTS = 600  # of a curve in a result; more are averaged
MAX_SIMILARITY = 160  # rows of the picture of self-similarity


# --------------------------------------------------------------------------------------------------- definitions


def motion(before: Pixels, after: Pixels, seconds: float) -> float:
    """How fast the fastest twentieth of the picture moves.

    Formula: mean length of the 5 % longest displacements d of 8x8 blocks of the small picture in 1/8 s, divided by its
        short side and the time; d = argmin mean |RGB(t, x) - RGB(t - 1/8 s, x - d)| + |d| / 2, |d| <= 12 px; 0 unless
        the match leaves less than 0.6 of the unmatched difference and at least 2 levels less.
    Unit: % of the short side a second. Range: 0 to 150; below about 6 (half a pixel a step) it reads 0.
    Read it as: 0 is a still picture. It falls over time when a video freezes slowly.
    Source: the top 5 % of VBench's dynamic degree (vbench/dynamic_degree.py), with block matching instead of RAFT.
    """
    lengths = np.sort(np.hypot(*displacements(before, after)).ravel())
    if not lengths.size:
        return math.nan
    fastest = lengths[-max(1, math.ceil(TOP_SHARE * lengths.size)) :]
    return float(100 * fastest.mean() / min(before.shape[:2]) / seconds)


def dynamic_degree(times: Floats, speeds: Floats) -> float:
    """Share of the video that is in motion at all.

    Formula: share of 2-second windows in which at least a quarter of the 1/8 s steps have a motion above 18.75 % of the
        short side a second (6 of 256 px in 1/8 s).
    Unit: %. Range: 0 to 100.
    Read it as: 100 is a video that moves throughout, 0 one that stands still. Not comparable with published numbers,
        which are shares of videos and measured with RAFT.
    Source: the thresholds of VBench's dynamic degree, the 2-second clips of VBench-Long.
    """
    if not speeds.size:
        return math.nan
    windows = np.floor((times - times[0]) / DYNAMIC_WINDOW).astype(int)
    last = windows[-1]
    if last > 0 and (windows == last).sum() < (windows == 0).sum() / 2:
        windows[windows == last] = last - 1
    moving = [
        bool((speeds[windows == w] > DYNAMIC_SPEED).mean() >= DYNAMIC_SHARE) for w in np.unique(windows)
    ]
    return float(100 * np.mean(moving))


def flicker(light: Floats) -> Floats:
    """How much the brightness of the whole picture trembles from frame to frame.

    Formula: |m(t) - (m(t-1) + m(t+1)) / 2|, m = mean luma of a frame; the mean of it over time.
    Unit: levels of 255. Range: 0 to 255.
    Read it as: below 0.3 nothing is seen. Slow changes of light do not count, they are brightness.
    Source: second differences, so that neither trends nor moving subjects count (VBench's temporal flickering,
        the mean change between frames, counts motion).
    """
    return np.abs(light[1:-1] - (light[:-2] + light[2:]) / 2)


def noise(before: Pixels, frame: Pixels, after: Pixels) -> float:
    """Grain that is new in every frame.

    Formula: median over all pixels of |e - median(e)| / 0.826, e = Y(t) - (Y(t-1) + Y(t+1)) / 2, Y = luma at full size;
        for independent Gaussian noise that is its standard deviation.
    Unit: levels of 255. Range: 0 to 255.
    Read it as: 1 is a clean video, 5 visible grain. The median leaves moving subjects and flicker out; a moving
        camera counts a little.
    Source: the median absolute deviation, 0.826 = 0.6745 * sqrt(3/2).
    """
    step = _stride(frame)
    a, b, c = (luma(picture[::step, ::step]) for picture in (before, frame, after))
    new = b - (a + c) / 2
    return float(np.median(np.abs(new - np.median(new))) / (0.67449 * math.sqrt(1.5)))


def sharpness(frame: Pixels) -> float:
    """How steep the sharpest edges are.

    Formula: 2 * P99(|Sobel(Y)| / 8) / (P99(Y) - P1(Y)), Y = luma at full size, P = percentile over the picture.
    Unit: share of the picture's contrast that is crossed within a pixel. Range: 0 to about 1; none below a contrast of
        8 levels.
    Read it as: a blur that grows over time lowers it; a loss of contrast or colour does not. Compare videos of the
        same size and subject only.
    Source: Sobel's operator; relative to the contrast so that fading is not taken for blurring.
    """
    y = luma(frame)
    if min(y.shape) < 3:
        return math.nan
    step = _stride(frame)
    low, high = np.percentile(y[::step, ::step], (1, 99))
    if high - low < 8:
        return math.nan
    across, down = y[:, 2:] - y[:, :-2], y[2:] - y[:-2]
    gx = across[:-2] + 2 * across[1:-1] + across[2:]
    gy = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    steep = np.percentile(np.hypot(gx, gy)[::step, ::step], 99)
    return float(2 * steep / 8 / (high - low))


def contrast(colours: Floats) -> float:
    """How far light and dark parts are apart.

    Formula: standard deviation of CIE L* over the thumbnail.
    Unit: L*. Range: 0 to 50.
    Read it as: falls when a video fades or washes out, rises when it burns in.
    Source: RMS contrast (Peli 1990), in L*.
    """
    return float(colours[:, 0].std())


def saturation(colours: Floats) -> float:
    """How colourful the picture is.

    Formula: mean over the thumbnail of the chroma C* = sqrt(a*^2 + b*^2) of CIE Lab.
    Unit: C*. Range: 0 (gray) to about 134 (pure sRGB blue).
    Read it as: over-saturation, the common drift of long videos, raises it; fading lowers it.
    Source: CIE 1976 L*a*b* (CIE 15), white D65.
    """
    return float(np.hypot(colours[:, 1], colours[:, 2]).mean())


def brightness(colours: Floats) -> float:
    """How light the picture is.

    Formula: mean of CIE L* over the thumbnail.
    Unit: L*. Range: 0 (black) to 100 (white).
    Read it as: a slow rise or fall is drift; trembling is flicker.
    Source: CIE 1976 L*a*b* (CIE 15), white D65.
    """
    return float(colours[:, 0].mean())


def colour_drift(palette_now: Floats, palette_then: Floats) -> float:
    """How far the colours have gone from those of the first two seconds.

    Formula: mean over q of |p(q) - p0(q)|, p(q) = the q-quantiles of L*, a* and b* over the thumbnail (32 of each), p0
        = their mean over the first two seconds; |.| is the CIE 1976 colour difference dE.
    Unit: dE. Range: 0 to 259 (pure green against pure blue).
    Read it as: 2.3 is just noticeable, 10 another colour. Where things are does not count. A change of the prompt or of
        the subject counts, too: it may be wanted.
    Source: CIE 1976 dE; 2.3 from Mahy, van Eycken and Oosterlinck (1994). Quantiles are the optimal transport of each
        channel, so a shift that leaves the mean colour alone is seen.
    """
    return float(np.sqrt(np.square(palette_now - palette_then).sum(0)).mean())


def repetition(thumbs: NDArray[Any], rate: float) -> Repetition | None:
    """Whether the video loops: how much nearer pictures come again a period later.

    Formula: max over d of 1 - D(d) / max over d' < d of D(d'), D(d) = mean over t of |x(t) - x(t + d)|^2, x =
        thumbnail, d from 1 s to half the length; the period is the smallest d with 0.9 of the maximum. For the whole
        video and for windows of 20 s, every 10 s; the strongest is told.
    Unit: share. Range: 0 (pictures only go farther apart) to 1 (each comes back exactly); from 0.7 on it is called a
        loop. None for a still video and for less than 4 s.
    Read it as: a loop may be right: a subject that crosses the picture again and again loops by itself.
    Source: the recurrence of a time series; D at every distance at once by the Fourier transform.
    """
    count = len(thumbs)
    first, last = math.ceil(SHORTEST_LOOP * rate), count // 2
    if last < 2 * first:
        return None
    apart = _squared_distances(thumbs)[: last + 1]
    farthest = np.maximum.accumulate(apart)
    if farthest[-1] < STILL**2:
        return None
    back = np.where(farthest > STILL**2, 1 - apart / np.maximum(farthest, STILL**2), 0.0)[first:]
    enough = back >= 0.9 * back.max()
    begin = int(enough.argmax())
    end = begin + int((~enough[begin:]).argmax()) if (~enough[begin:]).any() else len(back)
    best = begin + int(back[begin:end].argmax())
    return Repetition(float(back[best]), (first + best) / rate, 0.0, count / rate)


def jumps(times: Floats, changes: Floats) -> tuple[Jump, ...]:
    """Moments at which the picture changes far more than it usually does there: cuts and frame resets.

    Formula: c(t) = mean |RGB(t) - RGB(t-1)| over the small picture; a jump where (c - median) / s > 8 and c > 2 * P90,
        of the other frames in the second on each side, s = max(1.4826 * MAD, 0.25 * median, 0.3 levels); within 1/4 s
        the largest counts. P90 keeps frames that are shown twice or more from making the others jumps. Where every
        second to fifth frame changes more than twice as much as usual (a codec's rhythm), a jump also has to stand out
        in the same way from the others of its beat.
    Unit: number, and the times; the score is (c - median) / s. Range: 0 and more.
    Read it as: each is a visible break. A wanted cut is one, too.
    Source: outliers by the median absolute deviation (Leys et al. 2013); frame resets of PackForcing's ablations
        (arXiv 2603.25730).
    """
    found: list[Jump] = []
    for n, (time, size) in enumerate(zip(times, changes, strict=True)):
        low = int(np.searchsorted(times, time - JUMP_WINDOW))
        high = int(np.searchsorted(times, time + JUMP_WINDOW, side="right"))
        others = np.concatenate([changes[low:n], changes[n + 1 : high]])
        if len(others) < 4:
            continue
        score, stands_out = _stands_out(float(size), others)
        if not stands_out:
            continue
        beats = [
            np.concatenate([changes[low:n][::-1][p - 1 :: p], changes[n + 1 : high][p - 1 :: p]])
            for p in JUMP_PERIODS
        ]
        loud = [b for b in beats if len(b) >= 4 and np.median(b) > JUMP_OVER * np.median(others)]
        if not all(_stands_out(float(size), beat)[1] for beat in loud):
            continue
        jump = Jump(float(time), float(size), score)
        if found and time - found[-1].seconds <= JUMP_MERGE:
            if jump.score > found[-1].score:
                found[-1] = jump
        else:
            found.append(jump)
    return tuple(found)


def _stands_out(size: float, others: Floats) -> tuple[float, bool]:
    """The score of a change among others, and whether it is a jump; see `jumps`."""
    usual = float(np.median(others))
    spread = max(1.4826 * float(np.median(np.abs(others - usual))), JUMP_SHARE * usual, JUMP_FLOOR)
    score = (size - usual) / spread
    return score, score > JUMP_SCORE and size > JUMP_OVER * float(np.quantile(others, 0.9))


def seam(before: Pixels, after: Pixels) -> Seam:
    """How visible the join of an extension is: where the file says that it begins, or at --seam.

    Formula: dE between the mean colours of the 4 frames on each side; mean |RGB| change across the join, and the mean
        of the same from frame to frame in the 16 frames before it.
    Unit: dE; levels of 255. Range: 0 and more.
    Read it as: invisible when the colour shift is below 2.3 dE and the jump about as large as the motion before it.
    Source: `source.measure_seam`, as `packforcing extend` reports it.
    """
    return measure_seam(before, after)


def clip_score(images: NDArray[Any], texts: NDArray[Any]) -> Floats:
    """How well the pictures show what the prompt says (with --clip).

    Formula: 100 * cos(CLIP embedding of a frame, CLIP embedding of the prompt that is valid then), a frame a second;
        mean over each 10-second segment and over all frames; the drop is the first segment less the last.
    Unit: hundredths of a cosine. Range: -100 to 100; 25 to 37 for pictures that fit, with OpenAI's models.
    Read it as: a drop means that the video leaves its prompt. Compare scores of the same CLIP model only.
    Source: Radford et al. 2021 (arXiv 2103.00020); segments and scale as in PackForcing (arXiv 2603.25730), Table 2,
        which tells neither its CLIP model nor how many frames it looks at.
    """
    images, texts = images.astype(np.float64), texts.astype(np.float64)
    norms = np.linalg.norm(images, axis=-1) * np.linalg.norm(texts, axis=-1)
    return np.asarray(100 * (images * texts).sum(-1) / norms)


def over_distance(values: Floats, step: float, lags: Sequence[float]) -> list[float]:
    """How much a measure differs between moments that far apart: from half a second to the whole length.

    Formula: mean over t of |v(t) - v(t + d)|; for colour the dE of `colour drift`, for picture the RMS difference of
        thumbnails; the last column is the longest distance, the whole length less a second.
    Unit: that of the measure; picture: levels of 255. Range: 0 and more.
    Read it as: a measure that rises with the distance drifts; one that stays the same only varies.
    Source: the structure function of a time series (Kolmogorov 1941).
    """
    rows = np.atleast_2d(values.T).T if values.ndim == 1 else values
    found = []
    for lag in lags:
        shift = round(lag / step)
        if not 0 < shift < len(rows):
            found.append(math.nan)
            continue
        difference = rows[shift:] - rows[:-shift]
        apart = _palette_distance(difference) if rows.ndim == 3 else np.abs(difference[:, 0])
        apart = apart[np.isfinite(apart)]
        found.append(float(apart.mean()) if apart.size else math.nan)
    return found


MEASURES: dict[str, Callable[..., Any]] = {
    "motion": motion,
    "dynamic degree": dynamic_degree,
    "flicker": flicker,
    "noise": noise,
    "sharpness": sharpness,
    "contrast": contrast,
    "saturation": saturation,
    "brightness": brightness,
    "colour drift": colour_drift,
    "repetition": repetition,
    "jumps": jumps,
    "seam": seam,
    "CLIP": clip_score,
    "over distance": over_distance,
}
"""What is measured -> the function whose docstring defines it."""

CURVES = {
    "motion": "% of short side / s",
    "flicker": "levels",
    "noise": "levels",
    "sharpness": "share",
    "contrast": "L*",
    "saturation": "C*",
    "brightness": "L*",
    "colour drift": "dE",
    "change": "levels",
}
"""What is a curve over time -> its unit. change is what `jumps` looks at."""

DISTANCE_ROWS = ("colour", "brightness", "contrast", "saturation", "sharpness", "picture")


def definition(measure: Callable[..., Any]) -> str:
    """The definition of a measure: the docstring of its function."""
    return inspect.getdoc(measure) or ""


# ------------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Jump:
    """seconds: of the first frame behind it.  levels: mean change of a colour value.  score: see `jumps`."""

    seconds: float
    levels: float
    score: float


@dataclass(frozen=True)
class Repetition:
    """strength: 0 to 1.  period: seconds.  start, end: of the part that repeats, in seconds."""

    strength: float
    period: float
    start: float
    end: float

    @property
    def is_loop(self) -> bool:
        return self.strength >= LOOPS_FROM


@dataclass(frozen=True)
class Curve:
    """times: [n] seconds from the first frame.  values: [n], NaN where there is nothing to measure."""

    times: Floats
    values: Floats

    def between(self, start: float, end: float) -> float:
        """Mean over a stretch; NaN without a value in it."""
        inside = self.values[(self.times >= start) & (self.times < end)]
        inside = inside[np.isfinite(inside)]
        return float(inside.mean()) if inside.size else math.nan

    def thinned(self, most: int = MAX_POINTS) -> Curve:
        """The same curve with fewer points, each the mean of its neighbours."""
        size = math.ceil(len(self.times) / most)
        if size <= 1:
            return self
        pieces = [slice(n, n + size) for n in range(0, len(self.times), size)]
        kept = [self.values[p][np.isfinite(self.values[p])] for p in pieces]
        values = [float(k.mean()) if k.size else math.nan for k in kept]
        return Curve(np.array([self.times[p].mean() for p in pieces]), np.array(values))


@dataclass(frozen=True)
class Measurement:
    """Everything about one video.

    size, fps, frames, seconds: of the file; frames are those that could be decoded.
    segments:   (start, end) in seconds: of ten seconds each, the last takes the rest.
    curves:     name of CURVES -> Curve.
    dynamic_degree: %.
    repetition: the strongest, None if there is nothing to repeat.
    seam:       (its time in seconds, Seam), None where none is known.
    lags:       seconds, the columns of `distances`; the last is the whole length.
    distances:  name of DISTANCE_ROWS -> mean difference at each lag.
    similarity: [n, n] RMS difference of thumbnails, levels, evenly spaced over the video.
    notes:      sentences about what was not measured, and why.
    """

    path: Path
    size: tuple[int, int]
    fps: float
    frames: int
    seconds: float
    segments: tuple[tuple[float, float], ...]
    curves: Mapping[str, Curve]
    dynamic_degree: float
    repetition: Repetition | None
    jumps: tuple[Jump, ...]
    seam: tuple[float, Seam] | None
    lags: tuple[float, ...]
    distances: Mapping[str, tuple[float, ...]]
    similarity: Floats
    notes: tuple[str, ...] = ()

    def mean(self, name: str) -> float:
        """Mean of a curve over the whole video."""
        return self.curves[name].between(-math.inf, math.inf)

    def by_segment(self, name: str) -> list[float]:
        """Mean of a curve in each segment."""
        return [self.curves[name].between(start, end) for start, end in self.segments]

    def findings(self) -> list[str]:
        """What stands out, as sentences."""
        said = []
        drift = self.curves["colour drift"].between(max(self.segments[-1][0], self.seconds / 2), math.inf)
        if drift >= VISIBLE_DELTA_E:
            strong = "clearly visible" if drift >= 2 * VISIBLE_DELTA_E else "just visible"
            said.append(f"its colours drift: {drift:.1f} dE at the end, {strong}")
        if len(self.segments) > 1:
            for name in ("motion", "sharpness", "contrast", "saturation"):
                segments = self.by_segment(name)
                first, last = segments[0], segments[-1]
                if first > 0 and last / first < 2 / 3:
                    said.append(f"its {name} falls to {last / first:.0%} of the beginning's")
                elif first > 0 and last / first > 3 / 2:
                    said.append(f"its {name} rises to {last / first:.0%} of the beginning's")
        if not self.dynamic_degree > 0 and self.frames > 1:
            said.append("it stands still" if self.mean("motion") < STILL_SPEED else "it moves little")
        if self.repetition is not None and self.repetition.is_loop:
            part = ""
            if (self.repetition.start, self.repetition.end) != (0.0, self.seconds):
                part = f" between {_clock(self.repetition.start)} and {_clock(self.repetition.end)}"
            said.append(f"it repeats every {self.repetition.period:.1f} s{part}")
        if self.jumps:
            times = ", ".join(_clock(jump.seconds) for jump in self.jumps[:8])
            more = f" and {len(self.jumps) - 8} more" if len(self.jumps) > 8 else ""
            said.append(f"it jumps at {times}{more}")
        return said

    def values(self) -> dict[str, Any]:
        """As JSON values; what could not be measured is None."""
        repeats, join = self.repetition, self.seam
        found: dict[str, Any] = {
            "path": str(self.path),
            "size": list(self.size),
            "fps": self.fps,
            "frames": self.frames,
            "seconds": self.seconds,
            "segments": [list(segment) for segment in self.segments],
            "mean": {name: self.mean(name) for name in CURVES},
            "by_segment": {name: self.by_segment(name) for name in CURVES},
            "dynamic_degree": self.dynamic_degree,
            "repetition": repeats
            and {
                "strength": repeats.strength,
                "period": repeats.period,
                "start": repeats.start,
                "end": repeats.end,
                "loops": repeats.is_loop,
            },
            "jumps": [{"seconds": j.seconds, "levels": j.levels, "score": j.score} for j in self.jumps],
            "seam": join
            and {
                "seconds": join[0],
                "delta_e": join[1].delta_e,
                "jump": join[1].jump,
                "own_motion": join[1].own_motion,
            },
            "over_distance": {"seconds": list(self.lags), **{k: list(v) for k, v in self.distances.items()}},
            "curves": {},
            "findings": self.findings(),
            "notes": list(self.notes),
        }
        for name, curve in self.curves.items():
            thin = curve.thinned()
            found["curves"][name] = {"seconds": thin.times.tolist(), "values": thin.values.tolist()}
        return _finite(found)


def _finite(value: Any) -> Any:
    """Numbers to five digits; NaN, which JSON has not, becomes None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def _clock(seconds: float) -> str:
    return clock(Fraction(round(seconds * 10), 10))


# -------------------------------------------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class Subject:
    """A video to be measured, and what is known of it.

    prompts: (seconds from which on, prompt), rising from 0; empty if it is not known.
    seam:    seconds at which an extension begins; None if there is none.
    notes:   sentences about what is not known.
    """

    name: str
    path: Path
    prompts: tuple[tuple[float, str], ...] = ()
    seam: float | None = None
    notes: tuple[str, ...] = field(default=())

    def prompt_at(self, seconds: float) -> str:
        """The prompt that is valid at a time."""
        return self.prompts[max(0, bisect_right([start for start, _ in self.prompts], seconds) - 1)][1]


def find(name: str) -> Subject:
    """What is meant by a video file, a run folder or the id of a run; the prompt comes from its metadata.

    Raises: UsageError if there is no such thing, or the run has no video; as `reader.VideoReader`.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return _of_file(name, path)
    if not path.is_dir() and (path.suffix or len(path.parts) > 1):
        raise UsageError(
            f"there is no file {name}", hint="Give a video file, or a run of `packforcing runs list`."
        )
    folder = runfolder.find(name)
    record = runfolder.read(folder)
    output = Path(record.output)
    video = next((place for place in (output, part_path(output)) if place.is_file()), None)
    if video is None:
        raise UsageError(
            f"the run {record.id} has no video: {output} is not there",
            hint=f"Make it again from its blocks: packforcing resume {shlex.quote(str(folder))}",
        )
    notes = () if video == output else (f"{record.id} is unfinished: what there is of it is measured",)
    return _of_run(name, video, record, notes)


def _of_run(name: str, video: Path, record: Record, notes: tuple[str, ...] = ()) -> Subject:
    shown = record.shown
    made = provenance.from_tags(record.tags, source=record.id) if provenance.TAG in record.tags else None
    join = _option(made.extends, "--from") if made is not None else None
    if join is None and shown.history and not shown.only_new:
        join = shown.frame_of(shown.history) / record.fps
    timing = VideoReader(video).timing()
    if join is not None and not 0 < join < timing.end - timing.start:
        join = None  # the new part has not begun
    return Subject(name, video, _prompts(record.request, shown, record.fps), join, notes)


def _of_file(name: str, path: Path) -> Subject:
    reader = VideoReader(path)
    timing = reader.timing()
    length = float(timing.end - timing.start)
    if provenance.TAG not in reader.metadata:
        return Subject(name, path, notes=("it does not say how it was made: only its pixels are measured",))
    try:
        folder = runfolder.folder_of(reader.metadata.get("run", ""))
        if folder is not None:
            return _of_run(name, path, runfolder.read(folder))
        made = provenance.from_tags(reader.metadata, source=str(path))
        shown = Shown(Lengths(int(made.layout["frames_per_block"])))
        prompts = _prompts(made.request, shown, max(1, round(reader.fps)))
    except (PackforcingError, KeyError, TypeError, ValueError) as error:
        said = error.message if isinstance(error, PackforcingError) else "its metadata is damaged"
        return Subject(name, path, notes=(f"{said}: only its pixels are measured",))
    notes: tuple[str, ...] = ()
    if reader.chapters:
        prompts = tuple(reader.chapters)
    elif made.extends is not None and len(prompts) > 1:  # the times of the request are not the file's
        prompts, notes = ((0.0, prompts[-1][1]),), ("of its prompts only the last is known",)
    join = _option(made.extends, "--from")
    if join is None and made.extends is not None and "--only-new" not in shlex.split(made.extends):
        new = _option(made.extends, "--seconds")
        join = None if new is None else length - new
    return Subject(name, path, prompts, join if join is not None and 0 < join < length else None, notes)


def _prompts(request: Mapping[str, Any], shown: Shown, fps: int) -> tuple[tuple[float, str], ...]:
    """(seconds of the file, prompt) of a request: a prompt begins with the block nearest to its time."""
    found = [(0.0, str(request["prompt"]))]
    for scene in sorted(Timeline.from_json(request.get("timeline") or {}).scenes, key=lambda s: s.seconds):
        frame = shown.frame_of(shown.lengths.nearest_block(scene.seconds, fps))
        found = [*(found if frame > 0 else []), (max(0, frame) / fps, scene.prompt)]
    return tuple(found)


def _option(command: str | None, name: str) -> float | None:
    """The number that a command gives an option, in seconds; None without a command, the option, or a number."""
    words = shlex.split(command) if command else []
    try:
        return float(words[words.index(name) + 1])
    except (ValueError, IndexError):
        return None


# ------------------------------------------------------------------------------------------------------ measuring


def measure(
    path: Path,
    *,
    seam_at: float | None = None,
    notes: Sequence[str] = (),
    progress: Callable[[float], None] = lambda share: None,
) -> Measurement:
    """Measure a video file, reading it once.

    Args:
        seam_at:  seconds at which an extension begins.
        notes:    go in front of the result's.
        progress: is told the share that is done, 0 to 1.
    Raises: as `reader.VideoReader`; UsageError if the seam is not within the video.
    """
    reader = VideoReader(path)
    timing = reader.timing()
    length = float(timing.end - timing.start)
    if seam_at is not None and not 0 < seam_at < length:
        raise UsageError(
            f"the seam at {_clock(seam_at)} is not within {path}, which is {_clock(length)} long",
            hint="Give --seam the time at which the new part begins, for example --seam 0:10.",
        )
    said = list(notes)
    collected = _Collected(length, seam_at)
    for time, frame in reader.upright():
        at = float(time - timing.start)
        collected.add(at, frame)
        progress(min(1.0, at / length))
    if reader.damaged_after is not None:
        good = _clock(float(reader.damaged_after - timing.start))
        said.append(f"it is damaged after {good}: only what is before is measured")
        length = collected.times[-1] + float(1 / reader.fps)
    elif len(collected.times) < NEARLY_ALL * reader.num_frames:
        said.append(f"it is cut off: {len(collected.times)} of its {reader.num_frames} frames are there")
    if len(collected.times) < 3:
        said.append(f"it has {len(collected.times)} frame(s): there is no motion to measure")
    return collected.result(path, reader, length, said)


class _Collected:
    """What is kept of the frames that went by."""

    def __init__(self, length: float, seam_at: float | None) -> None:
        self.thumb_step = max(float(STEP), length / MAX_THUMBS)
        self.state_step = max(float(STATE_STEP), length / MAX_STATES)
        self.seam_at = seam_at
        self.times: list[float] = []
        self.light: list[float] = []
        self.changes: list[float] = []
        self.thumbs: list[Pixels] = []
        self.motion: list[tuple[float, float]] = []
        self.states: list[tuple[float, dict[str, float], Floats]] = []
        self.noise: list[tuple[float, float]] = []
        self.seam: Seam | None = None
        self._last_small: Pixels | None = None
        self._matched: tuple[float, Pixels] | None = None
        self._last_two: deque[Pixels] = deque(maxlen=2)
        self._noise_due = False
        self._before: deque[Pixels] = deque(maxlen=SEAM_FRAMES)
        self._after: list[Pixels] = []

    def add(self, at: float, frame: Pixels) -> None:
        small = shrunk(frame, short=SHORT_SIDE)
        if self._last_small is not None:
            self.changes.append(float(np.abs(small.astype(np.int16) - self._last_small).mean()))
        self.times.append(at)
        self.light.append(float(luma(small).mean()))
        self._last_small = small
        if self._matched is None:
            self._matched = at, small
        elif at >= self._matched[0] + float(STEP) - 1e-3:
            elapsed = at - self._matched[0]
            self.motion.append((at, motion(self._matched[1], small, elapsed)))
            self._matched = at, small
        if at >= len(self.thumbs) * self.thumb_step - 1e-3:
            thumb = shrunk(frame, long=LONG_SIDE)
            while at >= len(self.thumbs) * self.thumb_step - 1e-3:  # a frame that is shown for long
                self.thumbs.append(thumb)
        if self._noise_due and len(self._last_two) == 2:
            self.noise.append((self.times[-2], noise(self._last_two[0], self._last_two[1], frame)))
            self._noise_due = False
        if at >= len(self.states) * self.state_step - 1e-3:
            state = _state(frame)
            while at >= len(self.states) * self.state_step - 1e-3:
                self.states.append((len(self.states) * self.state_step, *state))
            self._noise_due = True
        self._last_two.append(frame)
        self._at_seam(at, frame)

    def _at_seam(self, at: float, frame: Pixels) -> None:
        if self.seam_at is None or self.seam is not None:
            return
        if at < self.seam_at - 1e-3:
            self._before.append(frame)
            return
        self._after.append(frame)
        if len(self._after) == 4:
            self._close_seam()

    def _close_seam(self) -> None:
        if self._before and self._after:
            self.seam = seam(np.stack(self._before), np.stack(self._after))
        self._before.clear()

    def result(self, path: Path, reader: VideoReader, length: float, notes: list[str]) -> Measurement:
        if self.seam is None:
            self._close_seam()
        times = np.array(self.times)
        palettes = np.stack([palette for _, _, palette in self.states])  # [n, 3, Q]
        at = np.array([time for time, _, _ in self.states])
        first = palettes[at < REFERENCE_SECONDS].mean(0)
        curves = {
            "motion": _curve(self.motion),
            "flicker": Curve(times[1:-1], flicker(np.array(self.light))),
            "noise": _curve(self.noise),
            **{
                name: Curve(at, np.array([state[name] for _, state, _ in self.states]))
                for name in ("sharpness", "contrast", "saturation", "brightness")
            },
            "colour drift": Curve(at, np.array([colour_drift(palette, first) for palette in palettes])),
            "change": Curve(times[1:], np.array(self.changes)),
        }
        thumbs = np.stack(self.thumbs).reshape(len(self.thumbs), -1)
        lags = tuple(float(d) for d in DISTANCES if d < length - 1)
        lags = (*lags, length - 1) if length - 1 >= 1 else lags
        distances = {"colour": tuple(over_distance(palettes, self.state_step, lags))}
        for name in ("brightness", "contrast", "saturation", "sharpness"):
            distances[name] = tuple(over_distance(curves[name].values, self.state_step, lags))
        apart = np.sqrt(_squared_distances(thumbs))
        picked = [round(lag / self.thumb_step) for lag in lags]
        distances["picture"] = tuple(float(apart[n]) if n < len(apart) else math.nan for n in picked)
        return Measurement(
            path=path,
            size=(reader.width, reader.height),
            fps=float(reader.fps),
            frames=len(times),
            seconds=length,
            segments=segments(length),
            curves=curves,
            dynamic_degree=dynamic_degree(curves["motion"].times, curves["motion"].values),
            repetition=strongest_repetition(thumbs, 1 / self.thumb_step, length),
            jumps=jumps(times[1:], np.array(self.changes)),
            seam=None if self.seam is None or self.seam_at is None else (self.seam_at, self.seam),
            lags=lags,
            distances=distances,
            similarity=_similarity(thumbs),
            notes=tuple(notes),
        )


def segments(length: float, seconds: float = SEGMENT_SECONDS) -> tuple[tuple[float, float], ...]:
    """(start, end) of ten seconds each; the last one takes up to five more, or is up to five shorter."""
    count = max(1, math.floor(length / seconds + 0.5))
    return tuple((n * seconds, length if n == count - 1 else (n + 1) * seconds) for n in range(count))


def strongest_repetition(thumbs: NDArray[Any], rate: float, length: float) -> Repetition | None:
    """Of the whole video and of windows of it: the strongest; the whole wins where it is nearly as strong."""
    whole = repetition(thumbs, rate)
    if whole is not None:
        whole = Repetition(whole.strength, whole.period, 0.0, length)
    size, hop = round(LOOP_WINDOW * rate), round(LOOP_WINDOW * rate / 2)
    found = []
    for start in range(0, max(0, len(thumbs) - size) + 1, max(1, hop)) if len(thumbs) > size else ():
        part = repetition(thumbs[start : start + size], rate)
        if part is not None:
            found.append(Repetition(part.strength, part.period, start / rate, (start + size) / rate))
    best = max(found, key=lambda part: part.strength, default=None)
    if whole is None or (best is not None and whole.strength < 0.9 * best.strength):
        return best
    return whole


def sampled(path: Path, every: float) -> Iterator[tuple[float, Pixels]]:
    """Yield (seconds, frame [H, W, 3] uint8) every so often, in the middle of each interval.

    Raises: as `reader.VideoReader`.
    """
    reader = VideoReader(path)
    start = reader.timing().start
    wanted, last = every / 2, None
    for time, frame in reader.upright():
        at, last = float(time - start), frame
        if at >= wanted - 1e-3:
            yield at, frame
            wanted += every * (1 + math.floor((at - wanted) / every + 1e-6))
    if wanted == every / 2 and last is not None:
        yield 0.0, last


def displacements(before: Pixels, after: Pixels) -> tuple[Floats, Floats]:
    """How far each 8x8 block came since the picture before, by exhaustive search.

    Args:
        before, after: [h, w, 3] uint8.
    Returns: x and y, [h // 8, w // 8] whole pixels each; 0 where nothing matches clearly better than standing still.
    """
    rows, cols = after.shape[0] // TILE, after.shape[1] // TILE
    x, y = np.zeros((rows, cols)), np.zeros((rows, cols))
    if not rows or not cols:
        return x, y
    now = _tiles(after[: rows * TILE, : cols * TILE].astype(np.float32))
    still = np.abs(now - _tiles(before[: rows * TILE, : cols * TILE].astype(np.float32))).mean((2, 3, 4))
    where = still >= MATCH_LEVELS  # the others cannot have moved
    if not where.any():
        return x, y
    around = np.pad(before, ((REACH, REACH), (REACH, REACH), (0, 0)), mode="edge").astype(np.float32)
    side = TILE + 2 * REACH
    windows = np.lib.stride_tricks.sliding_window_view(around, (side, side), axis=(0, 1))[::TILE, ::TILE]
    near = np.moveaxis(windows[where], 1, -1)  # [n, side, side, 3]
    now, stayed = now[where], still[where]
    best, cost = stayed.copy(), stayed.copy()
    found_x, found_y = np.zeros(len(now)), np.zeros(len(now))
    for dy, dx in _REACHED:
        candidate = near[:, REACH - dy : REACH - dy + TILE, REACH - dx : REACH - dx + TILE]
        left = np.abs(now - candidate).mean((1, 2, 3))
        better = left + PULL * math.hypot(dx, dy) < cost
        best[better], cost[better] = left[better], left[better] + PULL * math.hypot(dx, dy)
        found_x[better], found_y[better] = dx, dy
    clear = (best < MATCH_GAIN * stayed) & (stayed - best >= MATCH_LEVELS)
    x[where], y[where] = found_x * clear, found_y * clear
    return x, y


_REACHED = [
    (dy, dx)
    for dy in range(-REACH, REACH + 1)
    for dx in range(-REACH, REACH + 1)
    if dx * dx + dy * dy <= REACH * REACH
]


def _tiles(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """[h, w, 3] -> [h / 8, w / 8, 8, 8, 3]."""
    height, width, _ = pixels.shape
    return pixels.reshape(height // TILE, TILE, width // TILE, TILE, 3).swapaxes(1, 2)


def luma(pixels: Pixels) -> NDArray[np.float32]:
    """BT.709 luma of RGB, [..., 3] -> [...], 0 to 255."""
    return np.asarray(pixels.astype(np.float32) @ LUMA)


def shrunk(frame: Pixels, *, short: int | None = None, long: int | None = None) -> Pixels:
    """A picture reduced to a short or long side by area means; never enlarged.

    Args:
        frame: [H, W, 3] uint8.
    """
    from PIL import Image

    height, width = frame.shape[:2]
    side, wanted = (min(height, width), short) if short else (max(height, width), long or 1)
    if side <= (wanted or 1):
        return frame
    scale = Fraction(wanted or 1, side)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX))


def palette_of(colours: Floats) -> Floats:
    """Quantiles of each channel of Lab colours [n, 3]: [3, 32]."""
    return np.quantile(colours, (np.arange(QUANTILES) + 0.5) / QUANTILES, axis=0).T


def _state(frame: Pixels) -> tuple[dict[str, float], Floats]:
    colours = lab(shrunk(frame, long=LONG_SIDE).reshape(-1, 3).astype(np.float64))
    values = {
        "sharpness": sharpness(frame),
        "contrast": contrast(colours),
        "saturation": saturation(colours),
        "brightness": brightness(colours),
    }
    return values, palette_of(colours)


def _stride(frame: Pixels) -> int:
    """Every how many-th pixel gives about half a million of them."""
    return max(1, math.isqrt(frame.shape[0] * frame.shape[1] // 500_000))


def _curve(points: Sequence[tuple[float, float]]) -> Curve:
    return Curve(np.array([time for time, _ in points]), np.array([value for _, value in points]))


def _palette_distance(difference: Floats) -> Floats:
    return np.asarray(np.sqrt(np.square(difference).sum(-2)).mean(-1))


def _squared_distances(thumbs: NDArray[Any]) -> Floats:
    """Mean over t and pixels of (x(t) - x(t + d))^2 for every d. thumbs: [n, p] -> [n]."""
    count, width = thumbs.shape
    size = 1 << (2 * count - 1).bit_length()
    products, energy = np.zeros(count), np.zeros(count)
    for start in range(0, width, 64):  # a few pixels at a time: an hour of them would not fit
        x = thumbs[:, start : start + 64].astype(np.float64)
        x -= x.mean(0)
        spectrum = np.fft.rfft(x, size, axis=0)
        products += np.fft.irfft(np.square(np.abs(spectrum)).sum(1), size)[:count]
        energy += np.square(x).sum(1)
    sums = np.concatenate([[0.0], np.cumsum(energy)])
    lags = np.arange(count)
    total = sums[count - lags] + sums[count] - sums[lags] - 2 * products
    return np.maximum(total, 0) / ((count - lags) * width)


def _similarity(thumbs: NDArray[Any]) -> Floats:
    picked = np.unique(np.linspace(0, len(thumbs) - 1, min(MAX_SIMILARITY, len(thumbs))).round().astype(int))
    x = thumbs[picked].astype(np.float64)
    energy = np.square(x).sum(1)
    squared = energy[:, None] + energy - 2 * (x @ x.T)
    return np.asarray(np.sqrt(np.maximum(squared, 0) / x.shape[1]))
