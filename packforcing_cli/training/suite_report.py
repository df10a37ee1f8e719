"""What comes of the suite's videos: shares with intervals, differences with intervals, tables and plots.

    videos.jsonl --> suite.json (every number) --> suite.md (tables), *.png (plots)

Everything is a mean over prompts of the mean over seeds. Intervals are 95 % percentile intervals of a bootstrap that
draws prompts, seeds with them: a prompt's two seeds are not two independent observations. A difference against the
reference is paired: of the same prompt, seed and noise.

Knows no model: it reads lines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packforcing_cli import __version__, durable
from packforcing_cli.layout import Layout
from packforcing_cli.training import world
from packforcing_cli.training.suite import (
    DELAYS,
    FULL_PROMPTS,
    FULL_SECONDS,
    FULL_SEEDS,
    NAME,
    REFERENCE,
    SCHEMA,
    SEGMENT_SECONDS,
    WORDS,
    Journal,
    Row,
    Suite,
    Video,
    segments_of,
)

RESAMPLES = 2000
JSON, MARKDOWN = "suite.json", "suite.md"
Values = NDArray[np.float64]
"""[P, S] of each prompt and each of its seeds; NaN where there is none."""

MEASURES = (
    *WORDS,
    "count",
    "moves",
    "background_correlation",
    "background_drift",
    "outline",
    "speed",
    "motion",
    "dynamic_degree",
)
TABLE = (  # column, measure of the last segment or of the whole video
    ("colour", "colour"),
    ("shape", "shape"),
    ("background", "background"),
    ("direction", "direction"),
    ("there", "present"),
    ("one", "count"),
    ("all", "all"),
    ("background kept", "background_correlation"),
    ("dynamic degree", "dynamic_degree"),
    ("at the start", "start"),
    ("speed, end : start", "speed_ratio"),
    ("jumps a minute", "jumps"),
)
COMPARED = ("all", "shape", "direction", "background_correlation", "jumps")


def mean_interval(values: Values, *, seed: int = 0) -> tuple[float, float, float]:
    """Mean over prompts of the mean over seeds, and its 95 % bootstrap interval (prompts are drawn).

    Args:
        values: [P, S]; prompts without any value are left out.
    Returns: (mean, low, high); NaN if there is nothing.
    """
    there = values[~np.isnan(values).all(1)]
    if not len(there):
        return float("nan"), float("nan"), float("nan")
    means = np.nanmean(there, axis=1)
    draws = np.random.default_rng(seed).integers(len(means), size=(RESAMPLES, len(means)))
    low, high = np.quantile(means[draws].mean(1), (0.025, 0.975))
    return float(means.mean()), float(low), float(high)


def build(
    suite: Suite, journal: Journal, layouts: Callable[[Row, int], Layout], *, command: str
) -> dict[str, Any]:
    """The report as JSON values.

    Args:
        layouts: the memory of a row at a number of blocks.
        command: that makes it again.
    """
    lengths = {}
    for seconds in suite.seconds:
        blocks = suite.blocks(seconds)
        lengths[f"{seconds:g}"] = {
            row.name: _row(suite, journal, row, blocks, layouts(row, blocks)) for row in suite.running
        }
    for rows in lengths.values():
        reference = rows.get(REFERENCE)
        for name, entry in rows.items():
            if reference is not None and name != REFERENCE:
                entry["against_reference"] = _differences(entry["values"], reference["values"])
    for rows in lengths.values():
        for entry in rows.values():
            del entry["values"]
    done = [video for video in suite.videos() if journal.find(suite, video) is not None]
    total = sum(1 for _ in suite.videos())
    return {
        "schema": SCHEMA,
        "suite": NAME,
        "version": __version__,
        "command": command,
        "model": {"name": suite.model_name, "hash": suite.model},
        "prompts": list(suite.prompts),
        "seeds": suite.seeds,
        "segment_seconds": SEGMENT_SECONDS,
        "videos": {"done": len(done), "wanted": total},
        "supports_claims": suite.supports_claims and len(done) == total,
        "reference": REFERENCE,
        "rows": [
            {"name": row.name, "group": row.group, "said": row.said, "memory": dict(row.memory)}
            for row in suite.running
        ],
        "not_run": [{"name": row.name, "why": why} for row, why in not_run(suite)],
        "chance": chance(),
        "lengths": lengths,
        "recall": _recall(suite, journal),
    }


def chance() -> dict[str, float]:
    """Share of right words of a video that knows nothing of its prompt."""
    return {
        "background": 1 / len(world.BACKGROUNDS),
        "colour": 1 / len(world.COLOURS),
        "shape": 1 / len(world.SHAPES),
        "direction": 1 / len(world.DIRECTIONS),
    }


def not_run(suite: Suite) -> list[tuple[Row, str]]:
    """Rows without videos of their own, and why."""
    found = []
    for row in suite.rows:
        if row.reason:
            found.append((row, f"{suite.model_name} cannot do it: {row.reason}"))
        elif row.same_as:
            found.append((row, f"is the same memory as {row.same_as}"))
        elif row.name not in suite.wanted:
            found.append((row, "not asked for"))
    return found


def _row(suite: Suite, journal: Journal, row: Row, blocks: int, layout: Layout) -> dict[str, Any]:
    """One row at one length: every measure of every segment, and of the whole video."""
    count = len({*segments_of(blocks, suite.segment_blocks)})
    shape = (len(suite.prompts), suite.seeds)
    segments = {name: np.full((count, *shape), np.nan) for name in MEASURES}
    whole = {name: np.full(shape, np.nan) for name in ("jumps", "speed_ratio")}
    minutes = suite.grid.frames_for(blocks) / suite.fps / 60
    failed, videos = list[str](), 0
    for number, prompt in enumerate(suite.prompts):
        for seed in range(suite.seeds):
            video = Video("follow", row.name, row.memory, prompt, suite.seed(number, seed), blocks)
            line = journal.find(suite, video)
            if line is None:
                continue
            if "failed" in line:
                failed.append(f"{prompt}, seed {video.seed}: {line['failed']}")
                for name in (*WORDS, "count"):
                    segments[name][:, number, seed] = 0.0
                continue
            videos += 1
            found = line["segments"][:count]
            for name, values in segments.items():
                values[:, number, seed] = [segment[name] for segment in found]
            whole["jumps"][number, seed] = sum(segment["jumps"] for segment in found) / minutes
            if found[0]["speed"] > 0:
                whole["speed_ratio"][number, seed] = found[-1]["speed"] / found[0]["speed"]
    view = layout.view(blocks - 1)
    size = layout.bytes(view)
    return {
        "videos": videos,
        "failed": failed,
        "stored_bytes": size.stored,
        "live_bytes": size.live,
        "max_distance": float(layout.slots(view).max_distance),
        "segments": [{name: _summary(values[n]) for name, values in segments.items()} for n in range(count)],
        "whole": {name: _summary(values) for name, values in whole.items()},
        "values": {**{name: values[-1] for name, values in segments.items()}, **whole},
    }


def _summary(values: Values) -> dict[str, Any]:
    """Mean, interval, and the mean of each seed: their spread."""
    mean, low, high = mean_interval(values)
    by_seed = [
        _number(float(of_seed[~np.isnan(of_seed)].mean())) if (~np.isnan(of_seed)).any() else None
        for of_seed in values.T
    ]
    return {"mean": _number(mean), "interval": [_number(low), _number(high)], "by_seed": by_seed}


def _number(value: float) -> float | None:
    return None if value != value else round(value, 4)


def _differences(mine: Mapping[str, Values], others: Mapping[str, Values]) -> dict[str, Any]:
    """Row minus reference for the last segment and the whole video, over pairs of the same prompt and seed."""
    found = {}
    for name, values in mine.items():
        pairs = values - others[name]
        mean, low, high = mean_interval(pairs)
        found[name] = {
            "difference": _number(mean),
            "interval": [_number(low), _number(high)],
            "prompts": int((~np.isnan(pairs)).any(1).sum()),
        }
    return found


# ------------------------------------------------------------------------------------------------------- recall


def _recall(suite: Suite, journal: Journal) -> dict[str, Any]:
    """The recall test: accuracy of the visitor's colour and shape after each delay, against chance."""
    if not suite.knows_visitor:
        return {
            "learned": None,
            "said": f"{suite.model_name} has not learned it: its vocabulary lacks the visitor's words",
        }
    rows = [row for row in suite.running if row.recall]
    if suite.quick or not rows:
        why = "not part of --quick" if suite.quick else "no row of it was asked for"
        return {"learned": None, "said": f"the recall test was not made: {why}"}
    found = {row.name: _recall_row(suite, journal, row) for row in rows}
    reference = found.get(REFERENCE) or next(iter(found.values()))
    learned = reference["obeys"] is not None and reference["obeys"] >= OBEYS
    if learned:
        return {"learned": True, "said": "", "rows": found}
    share = "no video" if reference["obeys"] is None else f"{reference['obeys']:.2f} of the videos"
    return {
        "learned": False,
        "said": f"{suite.model_name} has not learned it: in {share} a visitor comes when the caption says so and is"
        f" gone when it says so ({OBEYS:.2f} are needed); how it looks when it comes back means nothing then",
    }


OBEYS = 0.5
"""Share of the videos in which the visitor must come and go as told before its look is compared."""
Look = tuple[int, int, Mapping[str, Any], Mapping[str, Any]]
"""(prompt, seed, first visit, after the call)."""


def _recall_row(suite: Suite, journal: Journal, row: Row) -> dict[str, Any]:
    """One row of the recall test. A video counts for a delay if the visitor came and was gone before the call."""
    looks: dict[int, list[Look]] = {delay: [] for delay in DELAYS}
    told, obeyed = 0, 0
    for number, prompt in enumerate(suite.prompts):
        for seed in range(suite.seeds):
            blocks = suite.recall_blocks
            video = Video("recall", row.name, row.memory, prompt, suite.seed(number, seed), blocks)
            line = journal.find(suite, video)
            if line is None or "failed" in line:
                continue
            for delay in DELAYS:
                call = line["delays"][str(delay)]
                told += 1
                if line["first"]["present"] and call["hidden"]:
                    obeyed += 1
                    looks[delay].append((number, seed, line["first"], call["again"]))
    delays = {}
    for delay, mine in looks.items():
        entry: dict[str, Any] = {"videos": len(mine)}
        for name in ("colour", "shape", "both", "present"):
            values = np.full((len(suite.prompts), suite.seeds), np.nan)
            for number, seed, first, again in mine:
                values[number, seed] = _same(name, first, again)
            mean, low, high = mean_interval(values)
            guess, shuffled = _guessed(suite, name, mine), _shuffled(name, mine)
            entry[name] = {
                "mean": _number(mean),
                "interval": [_number(low), _number(high)],
                "guess": _number(guess),
                "shuffled": _number(shuffled),
                "chance": _number(max(guess, shuffled) if shuffled == shuffled else guess),
            }
        delays[str(delay)] = entry
    return {"obeys": obeyed / told if told else None, "videos": told // len(DELAYS), "delays": delays}


def _same(name: str, first: Mapping[str, Any], again: Mapping[str, Any]) -> bool:
    if name == "present":
        return bool(again["present"])
    words = ("colour", "shape") if name == "both" else (name,)
    return bool(again["present"]) and all(first[word] == again[word] for word in words)


def _guessed(suite: Suite, name: str, looks: Sequence[Look]) -> float:
    """Chance: one of the looks that a visitor may have in the scene of a prompt; it is always there."""
    shares = []
    for number, *_ in looks:
        colours = len(world.visitor_colours(world.parse_caption(suite.prompts[number])))
        shapes = len(world.VISITOR_SHAPES)
        shares.append(
            {"colour": 1 / colours, "shape": 1 / shapes, "both": 1 / colours / shapes, "present": 1.0}[name]
        )
    return sum(shares) / len(shares) if shares else float("nan")


def _shuffled(name: str, looks: Sequence[Look]) -> float:
    """Chance: how often the look after the call is that of another video's first visit."""
    right = [
        _same(name, first, again)
        for n, (_, _, first, _) in enumerate(looks)
        for m, (_, _, _, again) in enumerate(looks)
        if n != m
    ]
    return sum(right) / len(right) if right else float("nan")


# -------------------------------------------------------------------------------------------------------- tables


def markdown(report: Mapping[str, Any]) -> str:
    """The report for people."""
    done, wanted = report["videos"]["done"], report["videos"]["wanted"]
    lines = [
        "# Benchmark: the demo suite",
        "",
        f"Model {report['model']['name']} ({report['model']['hash']}), packforcing {report['version']};"
        f" {len(report['prompts'])} held-out prompts, {report['seeds']} {_plural('seed', report['seeds'])};"
        f" {done} of {wanted} videos.",
        "",
        "```sh",
        report["command"],
        "```",
        "",
    ]
    if not report["supports_claims"]:
        lines += [
            f"**This supports no claim**: a conclusion takes all rows, {FULL_PROMPTS} prompts, {FULL_SEEDS} seeds"
            f" and {' and '.join(f'{seconds:g}' for seconds in FULL_SECONDS)} seconds."
            " It shows that the suite runs.",
            "",
        ]
    lines += [
        f"Shares and means of the last {SEGMENT_SECONDS} seconds, with 95 % bootstrap intervals over prompts."
        " *there*, *one*: a subject, and no second one. *background kept*: correlation of the background with that of"
        " the first seconds. *dynamic degree* (%), and that of the first seconds; *jumps*, pictures set anew in"
        " the whole video: as `packforcing eval --explain` defines them. *speed, end : start*: of the subject.",
        "An interval without width says that these prompts agree, not that others would: when n prompts are all right,"
        " a share of 3/n may still be wrong.",
        "",
    ]
    for seconds, rows in report["lengths"].items():
        lines += [f"## {seconds} s", "", *_main_table(rows, report["chance"]), ""]
        lines += _difference_table(rows, report["reference"])
        lines += _segment_table(rows)
    lines += ["## Recall", "", *_recall_table(report["recall"]), ""]
    if report["not_run"]:
        lines += ["## Rows not run", ""]
        lines += [f"- {entry['name']}: {entry['why']}" for entry in report["not_run"]]
        lines.append("")
    failures = [
        f"- {name}, {seconds} s: {said}"
        for seconds, rows in report["lengths"].items()
        for name, entry in rows.items()
        for said in entry["failed"]
    ]
    if failures:
        counted = "All their words count as wrong; of the other measures they have none."
        lines += ["## Videos that broke down", "", counted, "", *failures, ""]
    return "\n".join(lines)


def _main_table(rows: Mapping[str, Any], guess: Mapping[str, float]) -> list[str]:
    names = [name for name, _ in TABLE]
    lines = [
        "| row | videos | " + " | ".join(names) + " | stored | live |",
        "|" + "---|" * (len(names) + 4),
    ]
    for name, entry in rows.items():
        cells = [_cell(_measure(entry, measure)) for _, measure in TABLE]
        stored, live = (f"{entry[part] / 1e6:.2f} MB" for part in ("stored_bytes", "live_bytes"))
        lines.append(f"| {name} | {entry['videos']} | " + " | ".join(cells) + f" | {stored} | {live} |")
    lines.append(
        "| chance | | " + " | ".join(f"{guess[m]:.2f}" if m in guess else "" for _, m in TABLE) + " | | |"
    )
    return lines


def _measure(entry: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if name == "start":
        first: Mapping[str, Any] = entry["segments"][0]["dynamic_degree"]
        return first
    found: Mapping[str, Any] = entry["whole"].get(name) or entry["segments"][-1][name]
    return found


def _cell(summary: Mapping[str, Any], key: str = "mean") -> str:
    if summary[key] is None:
        return "–"
    low, high = summary["interval"]
    sign = "+" if key == "difference" else ""
    return f"{summary[key]:{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f})"


def _difference_table(rows: Mapping[str, Any], reference: str) -> list[str]:
    compared = {name: entry for name, entry in rows.items() if "against_reference" in entry}
    if not compared:
        return []
    lines = [
        f"Difference against {reference}, same prompts, seeds and noise:",
        "",
        "| row | " + " | ".join(name.replace("_", " ") for name in COMPARED) + " |",
        "|" + "---|" * (len(COMPARED) + 1),
    ]
    for name, entry in compared.items():
        cells = [_cell(entry["against_reference"][measure], "difference") for measure in COMPARED]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _segment_table(rows: Mapping[str, Any]) -> list[str]:
    count = len(next(iter(rows.values()))["segments"])
    ends = [f"{SEGMENT_SECONDS * n}–{SEGMENT_SECONDS * (n + 1)} s" for n in range(count)]
    lines = [
        "All words right, by segment (smallest and largest mean of a seed):",
        "",
        "| row | " + " | ".join(ends) + " |",
        "|" + "---|" * (count + 1),
    ]
    for name, entry in rows.items():
        cells = []
        for segment in entry["segments"]:
            summary = segment["all"]
            seeds = [mean for mean in summary["by_seed"] if mean is not None]
            cells.append(f"{summary['mean']:.2f} ({min(seeds):.2f}, {max(seeds):.2f})" if seeds else "–")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _recall_table(recall: Mapping[str, Any]) -> list[str]:
    if not recall["learned"]:
        return [f"{recall['said'][:1].upper()}{recall['said'][1:]}."]
    lines = [
        "The visitor is called back; its colour and shape are those of its first visit. Chance: a guess among"
        " its possible looks, or the look after the call in another video, whichever is right more often.",
        "",
        "| row | comes and goes as told | "
        + " | ".join(f"{name} after {delay} s" for delay in DELAYS for name in ("colour", "shape"))
        + " |",
        "|" + "---|" * (2 * len(DELAYS) + 2),
    ]
    for name, entry in recall["rows"].items():
        cells = [
            f"{_cell(entry['delays'][str(delay)][word])}, chance {_plain(entry['delays'][str(delay)][word]['chance'])}"
            for delay in DELAYS
            for word in ("colour", "shape")
        ]
        lines.append(f"| {name} | {_plain(entry['obeys'])} | " + " | ".join(cells) + " |")
    return lines


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


# --------------------------------------------------------------------------------------------------------- plots

CURVES = (
    ("all", "all words right (share)", (0, 1)),
    ("shape", "shape right (share)", (0, 1)),
    ("direction", "direction right (share)", (0, 1)),
    ("background_correlation", "background kept (correlation)", (0, 1)),
    ("background_drift", "background drift (levels of 255)", None),
    ("dynamic_degree", "dynamic degree (%)", (0, 100)),
)
CURVE_GROUPS = ("policy", "selection", "positions", "compressor", "sinks")


def plots(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw curves over time and differences for every length, and recall over the time out of sight."""
    written = []
    for seconds, rows in report["lengths"].items():
        for group in CURVE_GROUPS:
            names = [row["name"] for row in report["rows"] if row["group"] == group]
            shown = [*dict.fromkeys([report["reference"], *names])]
            shown = [name for name in shown if name in rows and rows[name]["videos"]]
            if [name for name in shown if name != report["reference"]]:
                path = folder / f"over-time-{group}-{seconds}s.png"
                _save(_curves(rows, shown, f"{group}, {seconds} s"), path)
                written.append(path)
        compared = [name for name, entry in rows.items() if "against_reference" in entry and entry["videos"]]
        if compared:
            path = folder / f"differences-{seconds}s.png"
            _save(_forest(rows, compared, report["reference"], seconds), path)
            written.append(path)
    if report["recall"]["learned"]:
        path = folder / "recall.png"
        _save(_recall_curves(report["recall"]["rows"]), path)
        written.append(path)
    return written


def _figure(rows: int, cols: int, *, width: float, height: float) -> tuple[Any, NDArray[Any]]:
    """A figure that belongs to nobody's session: no window, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, np.asarray(figure.subplots(rows, cols, squeeze=False))


def _save(figure: Any, path: Path) -> None:
    with durable.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _curves(rows: Mapping[str, Any], names: Sequence[str], title: str) -> Any:
    figure, axes = _figure(2, 3, width=13, height=7)
    for axis, (measure, said, limits) in zip(axes.flat, CURVES, strict=True):
        for number, name in enumerate(names):
            found = [segment[measure] for segment in rows[name]["segments"]]
            aside = 0.4 * (number - (len(names) - 1) / 2)  # rows with equal values stay visible side by side
            kept = [
                (SEGMENT_SECONDS * (n + 0.5) + aside, s) for n, s in enumerate(found) if s["mean"] is not None
            ]
            x, means = [at for at, _ in kept], [s["mean"] for _, s in kept]
            bounds = [(s["mean"] - s["interval"][0], s["interval"][1] - s["mean"]) for _, s in kept]
            axis.errorbar(
                x,
                means,
                yerr=np.clip(np.array(bounds, dtype=np.float64).reshape(-1, 2).T, 0, None),
                label=name,
                color=f"C{number}",
                linewidth=2.4 if number == 0 else 1.3,
                elinewidth=1,
                marker="o",
                markersize=4,
                capsize=2,
            )
        axis.set_title(said, fontsize=10)
        axis.set_xlabel("seconds", fontsize=9)
        axis.set_xlim(0, SEGMENT_SECONDS * max(1, len(rows[names[0]]["segments"])))
        axis.grid(alpha=0.3)
        if limits is not None:
            axis.set_ylim(limits[0] - 0.03 * limits[1], 1.03 * limits[1])
    axes.flat[0].legend(fontsize=8)
    figure.suptitle(f"{title}: mean and 95 % interval by segment")
    return figure


def _forest(rows: Mapping[str, Any], names: Sequence[str], reference: str, seconds: str) -> Any:
    figure, axes = _figure(1, len(COMPARED), width=3.2 * len(COMPARED), height=1.6 + 0.32 * len(names))
    for axis, measure in zip(axes.flat, COMPARED, strict=True):
        for place, name in enumerate(reversed(names)):
            found = rows[name]["against_reference"][measure]
            if found["difference"] is not None:
                axis.plot(found["interval"], [place, place], color="C0", linewidth=2)
                axis.plot([found["difference"]], [place], "o", color="C0", markersize=5)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_ylim(-0.6, len(names) - 0.4)
        axis.set_yticks(range(len(names)), [*reversed(names)] if axis is axes.flat[0] else [""] * len(names))
        axis.set_title(measure.replace("_", " "), fontsize=10)
        axis.grid(alpha=0.3)
    figure.suptitle(
        f"Last {SEGMENT_SECONDS} of {seconds} s, difference against {reference} with 95 % interval"
    )
    return figure


def _recall_curves(rows: Mapping[str, Any]) -> Any:
    figure, axes = _figure(1, 3, width=13, height=4)
    for axis, word in zip(axes.flat, ("present", "colour", "shape"), strict=True):
        for number, (name, entry) in enumerate(rows.items()):
            found = [(delay, entry["delays"][str(delay)][word]) for delay in DELAYS]
            kept = [(delay, s) for delay, s in found if s["mean"] is not None]
            x = [delay for delay, _ in kept]
            axis.plot(x, [s["mean"] for _, s in kept], "o-", color=f"C{number}", label=name)
            if word != "present":
                axis.plot(x, [s["chance"] for _, s in kept], ":", color=f"C{number}", linewidth=1)
        axis.set_title(
            {"present": "comes back", "colour": "same colour", "shape": "same shape"}[word], fontsize=10
        )
        axis.set_xlabel("seconds out of sight", fontsize=9)
        axis.set_xticks(DELAYS)
        axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    figure.suptitle("Recall of the visitor (dotted: chance)")
    return figure


def scores(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a package's manifest is to say of its own memory: the reference's first and last seconds of every length."""
    found: dict[str, Any] = {
        "suite": NAME,
        "version": report["version"],
        "prompts": len(report["prompts"]),
        "seeds": report["seeds"],
        "segment_seconds": report["segment_seconds"],
    }
    for seconds, rows in report["lengths"].items():
        segments = rows[report["reference"]]["segments"]
        found[f"of {seconds} seconds"] = {
            end: {name: {part: segment[name][part] for part in ("mean", "interval")} for name in MEASURES}
            for end, segment in (("first segment", segments[0]), ("last segment", segments[-1]))
        }
    return found


def write(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write JSON, Markdown and plots, each whole or not at all. Returns: their paths."""
    json_path, markdown_path = folder / JSON, folder / MARKDOWN
    durable.write(json_path, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    durable.write(markdown_path, markdown(report).encode())
    return [json_path, markdown_path, *plots(report, folder)]
