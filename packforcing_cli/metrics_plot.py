"""Measurements as one picture: curves over time, differences over distance, who resembles whom.

    +---------------------+----------------------+
    | motion              | differences over     |
    | colour drift        | the distance between |
    | brightness ...      | frames, a table each |
    | change, with jumps  +----------------------+
    | CLIP                | self-similarity each |
    +---------------------+----------------------+

Each video has one colour in all curves. Knows matplotlib and `metrics`, and no files but the one it writes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from packforcing_cli import durable
from packforcing_cli.errors import PackforcingError
from packforcing_cli.metrics import CURVES, DISTANCE_ROWS, Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from packforcing_cli.clip_score import ClipScores

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # Okabe and Ito: colour-blind safe
TITLES = {"change": "change from frame to frame (crosses: jumps)"}


def plot(
    path: Path, names: Sequence[str], found: Sequence[Measurement], clips: Sequence[ClipScores | None]
) -> None:
    """Draw measurements of one or more videos into a PNG, replacing it.

    Args:
        names: a label for each.
        clips: CLIP scores of each, None where there are none.
    Raises: PackforcingError if the file cannot be written.
    """
    from matplotlib.figure import Figure

    rows = [*CURVES, *(["CLIP"] if any(clips) else [])]
    beside = 2 * len(found)
    figure = Figure(figsize=(15, max(1.35 * len(rows), 3.4 * beside) + 0.8), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.5, 1))[0]
    left.suptitle("over time (points: means of the segments; dotted: a seam)", fontsize=10)
    curves = left.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(curves, rows, strict=True):
        for number, (measured, clip) in enumerate(zip(found, clips, strict=True)):
            colour = COLOURS[number % len(COLOURS)]
            if name == "CLIP":
                _draw_clip(axes, clip, measured, colour)
            else:
                _draw_curve(axes, measured, name, colour)
            if measured.seam is not None:
                axes.axvline(measured.seam[0], color=colour, linewidth=0.9, linestyle=":")
        axes.set_title(TITLES.get(name, name), fontsize=8, loc="left", pad=2)
        axes.set_ylabel("100 cos" if name == "CLIP" else CURVES[name], fontsize=7)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        low, high = axes.get_ylim()
        if name not in ("CLIP", "brightness"):
            axes.set_ylim(0, max(high, 1e-3))
        elif high - low < 4:
            axes.set_ylim((high + low) / 2 - 2, (high + low) / 2 + 2)
    curves[-1].set_xlabel("seconds", fontsize=8)
    for number, name in enumerate(names):
        curves[0].plot([], [], color=COLOURS[number % len(COLOURS)], label=name)
    curves[0].legend(fontsize=7, loc="upper right", ncols=min(3, len(names)))
    panels = right.subplots(beside, 1, squeeze=False)[:, 0]
    for number, (name, measured) in enumerate(zip(names, found, strict=True)):
        _draw_distances(panels[2 * number], name, measured)
        _draw_similarity(panels[2 * number + 1], name, measured)
    try:
        with durable.replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
    except OSError as error:
        raise durable.failure(error, path, kind=PackforcingError) from error


def _draw_curve(axes: Axes, measured: Measurement, name: str, colour: str) -> None:
    curve = measured.curves[name]
    thin = curve if name == "change" else curve.thinned()
    axes.plot(thin.times, thin.values, color=colour, linewidth=0.7, alpha=0.55)
    if name == "change":
        axes.plot(
            [jump.seconds for jump in measured.jumps],
            [jump.levels for jump in measured.jumps],
            "x",
            color=colour,
            markersize=5,
        )
        return
    middles = [(start + end) / 2 for start, end in measured.segments]
    axes.plot(middles, measured.by_segment(name), "o-", color=colour, markersize=3.5, linewidth=1.3)


def _draw_clip(axes: Axes, clip: ClipScores | None, measured: Measurement, colour: str) -> None:
    if clip is None:
        return
    axes.plot(clip.times, clip.values, color=colour, linewidth=0.7, alpha=0.55)
    middles = [(start + end) / 2 for start, end in measured.segments]
    axes.plot(middles, clip.by_segment, "o-", color=colour, markersize=3.5, linewidth=1.3)


def _draw_distances(axes: Axes, name: str, measured: Measurement) -> None:
    axes.set_title(f"{name}: difference between frames that far apart", fontsize=8, loc="left")
    if not measured.lags:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "too short", ha="center", va="center", transform=axes.transAxes)
        return
    values = np.array([measured.distances[row] for row in DISTANCE_ROWS])
    top = np.nanmax(np.where(np.isfinite(values), values, 0), axis=1, keepdims=True)
    axes.imshow(values / np.maximum(top, 1e-9), aspect="auto", cmap="Blues", vmin=0, vmax=1.4)
    for row, column in np.ndindex(*values.shape):
        if math.isfinite(values[row, column]):
            axes.text(column, row, f"{values[row, column]:.3g}", ha="center", va="center", fontsize=7)
    axes.set_xticks(range(len(measured.lags)), [f"{lag:.4g} s" for lag in measured.lags], fontsize=7)
    axes.set_yticks(range(len(DISTANCE_ROWS)), DISTANCE_ROWS, fontsize=7)


def _draw_similarity(axes: Axes, name: str, measured: Measurement) -> None:
    end = measured.seconds
    shown = axes.imshow(
        measured.similarity, extent=(0, end, end, 0), cmap="viridis", interpolation="nearest", vmin=0
    )
    axes.set_title(f"{name}: RMS difference of any two moments, levels", fontsize=8, loc="left")
    axes.set_xlabel("seconds", fontsize=7)
    axes.tick_params(labelsize=7)
    axes.figure.colorbar(shown, ax=axes, shrink=0.8).ax.tick_params(labelsize=7)
