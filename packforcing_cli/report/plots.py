"""A study as PNG files, by matplotlib: the same numbers as the page's.

    memory.png      what was held, against a full cache and a window; by partition
    recalls.png     which past second each block recalled
    selection.png   churn, diversity, share never recalled
    importance.png  mean normalised score by place in the bank; age of what was recalled
    slots.png       slots taken against the trained range
    drift.png       luma, saturation, sharpness, motion
    time.png        seconds a block by stage
    events.png      health flags, retries and empty scores on the time axis, under frames of the video

A plot whose numbers the trace does not have is not written. Lines differ in their dashes, areas are labelled.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from packforcing_cli import durable
from packforcing_cli.errors import PackforcingError, UsageError
from packforcing_cli.report.study import (
    BINS,
    FULL,
    NOT_STORED,
    PAPER_CHURN,
    PAPER_DIVERSITY,
    PAPER_IMPORTANCE,
    PARTS,
    Curve,
    Study,
    recall_map,
)
from packforcing_cli.trace import FLAGS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES, DPI = 10.0, 130
MAP_COLUMNS = 480
NAMES = {"mid": "recalled", "reserve": "raw keys, backups"}
STAGES = ("denoise", "clean", "decode", "compress", "bookkeeping", "stall")
"""As they are drawn: bookkeeping is commit, journal and trace."""
COLORS = {
    **{"sink": "#3b528b", "recent": "#0e7c86", "mid": "#35a853"},
    **{"current": "#8a8580", "reserve": "#c9c3bb", "bank": "#d0a000"},
}
A, B, C = "#0b5cad", "#b45309", "#6b7280"
STAGE_COLORS = ("#3b528b", "#21918c", "#5ec962", "#d0a000", "#8a8580", "#b45309")
PAPER: dict[str, Any] = {"color": "#57534e", "linestyle": (0, (5, 4)), "linewidth": 1}


def write(study: Study, folder: Path, *, overwrite: bool = False) -> list[Path]:
    """Write the plots into a folder, which is made if it is not there.

    Returns: the files written.
    Raises: UsageError if one of them exists and `overwrite` is False, or the folder cannot be written; DiskFullError.
    """
    check(folder, overwrite=overwrite)
    written = []
    try:
        durable.make_folder(folder)
        for name, draw in PLOTS.items():
            figure = draw(study)
            if figure is None:
                continue
            file = io.BytesIO()
            figure.savefig(file, format="png", dpi=DPI)
            durable.write(folder / name, file.getvalue())
            written.append(folder / name)
    except OSError as error:
        raise _not_written(error, folder) from error
    return written


def check(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder the plots cannot be written to, before any work is done. Raises: UsageError."""
    try:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file", hint="Give the name of a folder.")
        there = [name for name in PLOTS if (folder / name).exists()]
        if there and not overwrite:
            raise UsageError(
                f"{folder / there[0]} exists",
                hint="Give another folder, or --overwrite to replace the plots in it.",
            )
        above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not os.access(above, os.W_OK | os.X_OK):
            raise UsageError(
                f"{folder} cannot be written: {above} is not writable", hint="Give another folder."
            )
    except OSError as error:
        raise _not_written(error, folder) from error


def _not_written(error: OSError, folder: Path) -> PackforcingError:
    return durable.failure(error, folder, kind=UsageError, hint="Give a folder that can be written.")


# -------------------------------------------------------------------------------------------------------- pieces


def _figure(
    study: Study,
    title: str,
    *,
    rows: int = 1,
    columns: int = 1,
    height: float = 3.6,
    ratios: Sequence[float] | None = None,
) -> tuple[Figure, list[Axes]]:
    """A figure without pyplot, so that no window system and no global state is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    found = figure.subplots(rows, columns, squeeze=False, height_ratios=ratios).ravel().tolist()
    part = "" if study.is_complete else f"   ({study.blocks} of {study.run.blocks} blocks)"
    figure.suptitle(f"{title}{part}", x=0.01, ha="left", fontweight="bold", fontsize=12, parse_math=False)
    return figure, found


def _over_time(axes: Axes, study: Study, *, title: str) -> Curve:
    """Prepare axes over the video's time. Returns: where each block's value stands, seconds."""
    from matplotlib.ticker import FuncFormatter

    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlim(float(study.times[0]), float(study.times[-1]))
    axes.xaxis.set_major_formatter(FuncFormatter(_clock))
    axes.grid(axis="y", alpha=0.35, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    for event in study.events:
        if event.kind == "scene":
            axes.axvline(float(study.times[event.block]), color="#57534e", linewidth=0.7, linestyle=":")
    return (study.times[:-1] + study.times[1:]) / 2


def _clock(seconds: float, _: object = None) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _bytes(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter

    from packforcing_cli.report.page import size

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value) if value else "0"))
    axes.set_ylim(bottom=0)


def _stack(
    axes: Axes, x: Curve, names: Sequence[str], values: Sequence[Curve], colors: Sequence[str]
) -> None:
    known = [np.nan_to_num(curve) for curve in values]
    axes.stackplot(x, *known, labels=names, colors=colors, edgecolor="white", linewidth=0.5)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], loc="upper left", fontsize=8, frameon=False, bbox_to_anchor=(1.0, 1.0)
    )


def _legend(axes: Axes) -> None:
    axes.legend(loc="upper left", fontsize=8, frameon=False, bbox_to_anchor=(1.0, 1.0))


# --------------------------------------------------------------------------------------------------------- plots


def _memory(study: Study) -> Figure | None:
    if not study.known("live"):
        return None
    figure, (first, second) = _figure(study, "Keys and values in memory", rows=2, height=3.2)
    x = _over_time(first, study, title="held here, against a full cache and a window")
    for name, label, color, dash in (
        ("live", "held here", A, "-"),
        ("full", "full cache", B, "--"),
        ("window", "window", C, ":"),
    ):
        first.plot(x, study.curves[name], dash, color=color, label=label)
    _bytes(first)
    _legend(first)
    _over_time(second, study, title="by partition")
    _stack(
        second,
        x,
        [NAMES.get(p, p) for p in PARTS],
        [study.curves[p] for p in PARTS],
        [COLORS[p] for p in PARTS],
    )
    _bytes(second)
    return figure


def _recalls(study: Study) -> Figure | None:
    if not study.layers:
        return None
    from matplotlib.ticker import FuncFormatter

    cells = recall_map(study, columns=MAP_COLUMNS)
    share = np.where(cells.share[0] == NOT_STORED, np.nan, cells.share[0] / FULL)
    figure, (axes,) = _figure(study, "Which past second each block recalled", height=6.4)
    end = float(study.times[-1])
    shown = np.ma.masked_invalid(share.T)
    place: dict[str, Any] = {"origin": "lower", "extent": (0, end, 0, end), "aspect": "auto"}
    image = axes.imshow(shown, cmap="viridis_r", vmin=0, vmax=1, interpolation="none", **place)
    axes.set_xlabel("time of the video")
    axes.set_ylabel("time that was recalled")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(_clock))
    for event in study.events:
        if event.kind == "scene":
            axes.axvline(float(study.times[event.block]), color="#57534e", linewidth=0.8, linestyle="--")
    axes.spines[["top", "right"]].set_visible(False)
    figure.colorbar(image, ax=axes, label="share of layers; white: not in the bank", shrink=0.7)
    return figure


def _selection(study: Study) -> Figure | None:
    if not study.known("churn", "diversity", "never"):
        return None
    figure, axes = _figure(study, "Selection", rows=3, height=2.3)
    for one, name, title, paper in (
        (axes[0], "churn", "churn: Jaccard distance to the block before", PAPER_CHURN),
        (axes[1], "diversity", "position diversity", PAPER_DIVERSITY),
        (axes[2], "never", "share of the bank's blocks never recalled so far", None),
    ):
        x = _over_time(one, study, title=title)
        one.plot(x, study.curves[name], color=A, label="this run")
        if paper is not None:
            above = "above " if name == "diversity" else ""
            one.axhline(paper, label=f"paper: {above}{paper}", **PAPER)
        one.set_ylim(0, 1.02)
        _legend(one)
    return figure


def _importance(study: Study) -> Figure | None:
    if not study.layers or not study.ages.any():
        return None
    figure, (first, second) = _figure(study, "Importance and age of what was recalled", columns=2, height=3.8)
    known = (
        study.importance[np.isfinite(study.importance).all(1)] if study.importance.size else study.importance
    )
    if len(known):
        x = (np.arange(BINS) + 0.5) / BINS
        low, high = known.min(0), known.max(0)
        first.fill_between(x, low, high, color=A, alpha=0.2, linewidth=0, label="least to largest layer")
        first.plot(x, known.mean(0), "-o", color=A, markersize=4, label="mean of layers")
        first.axhline(PAPER_IMPORTANCE, label=f"paper: mean {PAPER_IMPORTANCE}, nearly flat", **PAPER)
        first.set_ylim(0, 1.02)
        first.legend(fontsize=8, frameon=False, loc="upper right")
    else:
        first.text(0.5, 0.5, "nothing was scored", ha="center", va="center", transform=first.transAxes)
    first.set_title("normalised score", loc="left", fontsize=10)
    first.set_xlabel("place in the bank: 0 oldest, 1 newest")
    length = float(study.times[-1]) / study.blocks
    ages = np.arange(len(study.ages)) * length
    second.bar(ages, study.ages / study.ages.sum() * 100, width=length, color=A)
    second.set_title("share of recalls by age (%)", loc="left", fontsize=10)
    second.set_xlabel("age of what was recalled (s)")
    for axes in (first, second):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.35, linewidth=0.6)
    return figure


def _slots(study: Study) -> Figure | None:
    if not study.known("distance"):
        return None
    figure, (axes,) = _figure(study, "Slots taken in the context, latent frames")
    x = _over_time(axes, study, title="")
    names = ("sink", "mid", "recent", "current")
    if study.trained:
        axes.axhline(study.trained, label=f"trained range: {study.trained}", **PAPER)
    _stack(
        axes,
        x,
        [NAMES.get(n, n) for n in names],
        [study.curves[f"at_{n}"] for n in names],
        [COLORS[n] for n in names],
    )
    axes.set_ylim(bottom=0)
    return figure


def _drift(study: Study) -> Figure | None:
    shown = study.pictures
    curves = [("luma (levels of 255)", study.curves["luma"] if shown is None else shown.luma)]
    if shown is not None:
        curves += [
            ("saturation (0 to 1)", shown.saturation),
            ("sharpness (mean Laplacian, levels)", shown.sharpness),
        ]
    curves.append(("motion (levels from frame to frame)", study.curves["motion"]))
    curves = [(title, curve) for title, curve in curves if np.isfinite(curve).any()]
    if not curves:
        return None
    figure, axes = _figure(study, "Drift of the picture", rows=len(curves), height=1.9)
    for one, (title, curve) in zip(axes, curves, strict=True):
        x = _over_time(one, study, title=title)
        one.plot(x, curve, color=A)
        one.set_ylim(0, float(np.nanmax(curve)) * 1.1 or 1)
    return figure


def _time(study: Study) -> Figure | None:
    if not study.known("denoise"):
        return None
    figure, (axes,) = _figure(study, "Seconds a block, by stage")
    x = _over_time(axes, study, title="")
    book = sum(np.nan_to_num(study.curves[name]) for name in ("commit", "journal", "trace"))
    values = [book if name == "bookkeeping" else study.curves[name] for name in STAGES]
    axes.axhline(float(np.diff(study.times)[-1]), label="real time", **PAPER)
    _stack(axes, x, STAGES, [np.asarray(v, np.float64) for v in values], STAGE_COLORS)
    axes.set_ylim(bottom=0)
    return figure


def _stand_out(study: Study) -> Figure | None:
    kinds = [*FLAGS, "retry", "degenerate", "pin", "cut"]
    frames = {} if study.pictures is None else study.pictures.frames
    rows = 2 if frames else 1
    figure, axes = _figure(study, "What stood out", rows=rows, height=2.0, ratios=(1, 2.2)[-rows:])
    _over_time(axes[-1], study, title="")
    axes[-1].set_yticks(range(len(kinds)), kinds)
    axes[-1].set_ylim(len(kinds) - 0.5, -0.5)
    for row, kind in enumerate(kinds):
        at = [float(study.times[event.block]) for event in study.events if event.kind == kind]
        axes[-1].plot(at, [row] * len(at), "|", color="#b3261e", markersize=10, markeredgewidth=2)
    if frames:
        film = axes[0]
        film.set_axis_off()
        blocks = sorted(frames)
        picked = [blocks[round(k * (len(blocks) - 1) / 9)] for k in range(min(10, len(blocks)))]
        film.imshow(
            np.concatenate([frames[block] for block in dict.fromkeys(picked)], axis=1), aspect="equal"
        )
        film.set_title("first frames, evenly spaced", loc="left", fontsize=10)
    return figure


PLOTS: dict[str, Callable[[Study], Figure | None]] = {
    "memory.png": _memory,
    "recalls.png": _recalls,
    "selection.png": _selection,
    "importance.png": _importance,
    "slots.png": _slots,
    "drift.png": _drift,
    "time.png": _time,
    "events.png": _stand_out,
}
