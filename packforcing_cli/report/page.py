"""A study as one HTML page: no framework, no network, opened from disk.

    page.html  the frame, with places <!--@name-->
    page.css, page.js   put into it; a policy in the page allows exactly these, by hash, and pictures that are in it
    Study -> JSON in the page, which page.js draws

All text of a user (prompts, file names) is escaped: for HTML in the head, and in the JSON so that nothing in it ends
the script it stands in. The page's size is bounded by LIMIT_BYTES however long the run is: blocks share columns, and
pictures get smaller, then fewer.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import itertools
import json
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packforcing_cli import __version__, durable, runfolder, trace
from packforcing_cli.errors import PackforcingError, UsageError
from packforcing_cli.reader import fitted
from packforcing_cli.report.study import (
    PAPER_CHURN,
    PAPER_DIVERSITY,
    PAPER_IMPORTANCE,
    PARTS,
    Curve,
    RecallMap,
    Study,
    per_column,
    recall_map,
)

SCHEMA = 1
LIMIT_BYTES = 8_000_000
MAP_BYTES = 2_400_000  # of both maps, before base64
MAX_COLUMNS = 480
ENDINGS = (".html", ".htm")
PICTURE_BYTES = 4_000_000  # at most, as data URIs
PICTURE_STEPS = ((320, 82), (240, 78), (192, 74), (160, 68), (128, 62), (96, 55), (64, 45))
"""Widths and WebP qualities, tried in this order until all pictures fit."""


def write(study: Study, path: Path, *, overwrite: bool = False) -> Path:
    """Write the page.

    Raises: UsageError if `path` exists and `overwrite` is False, or cannot be written; DiskFullError.
    """
    check(path, overwrite=overwrite, run=study.folder)
    text = render(study, command=f"packforcing inspect-cache {study.run.id} --html {path.name}")
    try:
        durable.write(path, text.encode())
    except OSError as error:
        raise _not_written(error, path) from error
    return path


def check(path: Path, *, overwrite: bool, run: Path | None = None) -> None:
    """Refuse a place where the page cannot be written, before any work is done.

    run: the folder of the run that is drawn; its files and its video are not written over.
    Raises: UsageError; RunFolderError if the run cannot be read.
    """
    if path.suffix.lower() not in ENDINGS:
        raise UsageError(
            f"--html {path}: a page is written, whose name ends in .html or .htm",
            hint=f"For example --html {path.stem or 'report'}.html.",
        )
    try:
        if run is not None and run.resolve() in path.resolve().parents:
            raise UsageError(
                f"--html {path} is inside the run's own folder", hint="Give a place outside of it."
            )
        if run is not None and path.resolve() == Path(runfolder.read(run).output).resolve():
            raise UsageError(f"--html {path} is the run's video", hint="Give another name.")
        if path.is_dir():
            raise UsageError(f"{path} is a folder", hint="Give the name of a file, for example report.html.")
        if path.exists() and not overwrite:
            raise UsageError(f"{path} exists", hint="Give another name, or --overwrite.")
        if not path.absolute().parent.is_dir():
            raise UsageError(
                f"{path} cannot be written: there is no folder {path.parent}", hint="Make the folder first."
            )
    except OSError as error:
        raise _not_written(error, path) from error


def _not_written(error: OSError, path: Path) -> PackforcingError:
    return durable.failure(error, path, kind=UsageError, hint="Give a place that can be written.")


def render(study: Study, *, command: str) -> str:
    """The page as text; `command` is how it was made."""
    css, js = _part("page.css"), _part("page.js")
    cells = recall_map(study, columns=map_columns(study))
    data = values(study, cells)
    left = LIMIT_BYTES - len(_json(data)) - len(css) - len(js) - 100_000
    data["pictures"] = _pictures(study, cells.per_column, budget=min(PICTURE_BYTES, left))
    words = {
        "policy": "; ".join(
            (
                "default-src 'none'",
                f"script-src {_hash(js)}",
                f"style-src {_hash(css)}",
                "img-src data:",
                "base-uri 'none'",
                "form-action 'none'",
            )
        ),
        "version": html.escape(__version__),
        "title": html.escape(f"{_cut(study.script.prompts[0], 80)} · packforcing memory report"),
        "badge": _badge(study),
        "prompt": html.escape(study.script.prompts[0]),
        "facts": _facts(study),
        "tiles": "".join(_tile(*tile) for tile in tiles(study)),
        "notes": "".join(f'<p class="note">{html.escape(note)}</p>' for note in _notes(study, cells)),
        "command": html.escape(command),
        "css": css,
        "data": _json(data),
        "js": js,
    }
    pieces = _part("page.html").split("<!--@")
    text = [pieces[0]]
    for piece in pieces[1:]:  # one pass: what was put in is not looked at again
        name, rest = piece.split("-->", 1)
        text += (words[name], rest)
    return "".join(text)


def map_columns(study: Study) -> int:
    """Columns of the map: as many as there are blocks, fewer where two planes a layer would take too much."""
    return max(1, min(MAX_COLUMNS, math.isqrt(MAP_BYTES // (study.layers + 1))))


def values(study: Study, cells: RecallMap) -> dict[str, Any]:
    """What page.js draws, as JSON values; all but the pictures."""
    step, n = cells.per_column, cells.columns
    edges = [min(column * step, study.blocks) for column in range(n + 1)]
    last = [_last_known(study, a, b) for a, b in itertools.pairwise(edges)]
    ages = _age_bins(study)
    drift = {}
    if study.pictures is not None:
        shown = study.pictures
        drift = {"luma": shown.luma, "saturation": shown.saturation, "sharpness": shown.sharpness}
    lower = np.tril_indices(n)
    return {
        "schema": SCHEMA,
        "blocks": study.blocks,
        "length": study.run.blocks,
        "step": step,
        "layers": cells.layers,
        "times": [round(float(study.times[edge]), 4) for edge in edges],
        "size": list(study.run.size),
        "prompts": list(study.script.prompts),
        "scenes": [study.script.scene(edge) for edge in edges[:-1]],
        "sinks": [[] if r is None or r.partitions is None else list(r.partitions.sink) for r in last],
        "recent": [[] if r is None or r.partitions is None else list(r.partitions.recent) for r in last],
        "active": [None if r is None or r.partitions is None else r.partitions.active for r in last],
        "pins": [[] if r is None else list(r.pins) for r in last],
        "share": _base64(cells.share[:, lower[0], lower[1]]),
        "score": _base64(cells.score[:, lower[0], lower[1]]),
        "scored": bool((cells.score != 255).any()),
        "curves": {
            name: _thinned(curve, step)
            for name, curve in {**study.curves, **{f"seen_{k}": v for k, v in drift.items()}}.items()
            if np.isfinite(curve).any()
        },
        "parts": list(PARTS),
        "importance": [[_number(v) for v in row] for row in study.importance],
        "ages": ages,
        "never": study.never,
        "trained": study.trained,
        "events": _events(study, step),
        "paper": {"importance": PAPER_IMPORTANCE, "churn": PAPER_CHURN, "diversity": PAPER_DIVERSITY},
        "ramp": _base64(_viridis()),
        "pictures": [],
    }


def _last_known(study: Study, first: int, end: int) -> Any:
    return next((r for r in reversed(study.records[first:end]) if r is not None), None)


def _age_bins(study: Study) -> list[list[float]]:
    """How far back recalls went: [seconds from, seconds to, share of all recalls], at most 40 bars."""
    total = int(study.ages.sum())
    if not total:
        return []
    end = int(np.flatnonzero(study.ages)[-1]) + 1
    wide = per_column(end, 40)
    length = (
        float(study.times[-1] - study.times[0]) / study.blocks
        if study.blocks < 2
        else float(np.diff(study.times)[-1])
    )
    return [
        [
            round(a * length, 3),
            round(min(a + wide, end) * length, 3),
            round(int(study.ages[a : a + wide].sum()) / total, 5),
        ]
        for a in range(0, end, wide)
    ]


def _thinned(curve: Curve, step: int) -> list[float | None]:
    """A curve with one value a column: the mean of its blocks that are known."""
    found = []
    for at in range(0, len(curve), step):
        known = curve[at : at + step]
        known = known[np.isfinite(known)]
        found.append(_number(float(known.mean())) if len(known) else None)
    return found


def _number(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.6g}")
    return int(rounded) if rounded.is_integer() else rounded


def _events(study: Study, step: int) -> list[list[Any]]:
    """[column, kind, text, how many]: one a column and kind, the first of them told."""
    found: dict[tuple[int, str], list[Any]] = {}
    for event in study.events:
        key = (event.block // step, event.kind)
        if key in found:
            found[key][3] += 1
        else:
            found[key] = [event.block // step, event.kind, event.text, 1]
    return [found[key] for key in sorted(found)]


def _viridis() -> NDArray[np.uint8]:
    """[256, 3] of matplotlib's viridis, which reads the same to the colour-blind and in grey."""
    from matplotlib import colormaps

    return np.round(colormaps["viridis"](np.arange(256))[:, :3] * 255).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------- pictures


def _pictures(study: Study, step: int, *, budget: int) -> list[str | None]:
    """A data URI a column, None where there is no picture; together at most `budget` characters."""
    columns = -(-study.blocks // step)
    none: list[str | None] = [None] * columns
    if study.pictures is None or not study.pictures.frames:
        return none
    frames = [_nearest(study.pictures.frames, column * step, step) for column in range(columns)]
    width = max(frame.shape[1] for frame in frames if frame is not None)
    found = none
    steps = {
        min(width, wide): quality for wide, quality in reversed(PICTURE_STEPS)
    }  # the best of equal widths
    for wide, quality in sorted(steps.items(), reverse=True):
        found = [None if frame is None else _webp(frame, wide, quality) for frame in frames]
        if sum(len(uri) for uri in found if uri) <= budget:
            return found
    keep = 2
    while keep <= columns:  # pictures of noise: every second, every fourth ...
        thin = [uri if column % keep == 0 else None for column, uri in enumerate(found)]
        if sum(len(uri) for uri in thin if uri) <= budget:
            return thin
        keep *= 2
    return none


def _nearest(frames: Mapping[int, NDArray[np.uint8]], first: int, step: int) -> NDArray[np.uint8] | None:
    return next((frames[block] for block in range(first, first + step) if block in frames), None)


def _webp(frame: NDArray[np.uint8], width: int, quality: int) -> str:
    from PIL import Image

    height = max(1, round(frame.shape[0] * width / frame.shape[1]))
    small = frame if frame.shape[1] == width else fitted(frame, (width, height), "stretch")
    file = io.BytesIO()
    Image.fromarray(small).save(file, "WEBP", quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


# ---------------------------------------------------------------------------------------------------- the head


def tiles(study: Study) -> list[tuple[str, str, str]]:
    """The figures at the top: (name, value, what it means)."""
    curves, end = study.curves, "at the end" if study.is_complete else "now"
    found: list[tuple[str, str, str]] = []
    live, full = _last(curves["live"]), _last(curves["full"])
    if live is not None and full is not None:
        times = f"a full cache: {size(full)}, {full / live:.1f} times as much"
        found.append((f"memory {end}", size(live), times))
    bank, union = _last(curves["bank_blocks"]), _last(curves["union"])
    active = next((r.partitions.active for r in reversed(study.records) if r and r.partitions), None)
    if bank is not None and active is not None:
        more = f"blocks in each layer, {union:.0f} in any" if union else "nothing is recalled here"
        found.append((f"recalled {end}", f"{active} of {bank:.0f}", more))
    oldest = int(np.flatnonzero(study.ages)[-1]) if study.ages.any() else 0
    if oldest:
        back = oldest * float(study.times[-1]) / study.blocks
        found.append(("furthest look back", _clock(back), f"{oldest} blocks"))
    chose = np.array([record is not None and trace.chooses(record) for record in study.records])
    mean = _mean(curves["churn"][chose])
    if mean is not None:
        found.append(("churn", f"{mean:.2f}", f"paper: {PAPER_CHURN}, another model"))
    if study.never is not None:
        found.append(("never recalled", f"{study.never:.0%}", "of the blocks that were in the bank"))
    distance = float(np.nanmax(curves["distance"])) if study.known("distance") else None
    if distance is not None and study.trained:
        inside = "within" if distance < study.trained else "beyond"
        found.append(("largest slot distance", f"{distance:.4g}", f"{inside} the trained {study.trained}"))
    flagged = {event.block for event in study.events if event.kind not in ("scene", "cut", "pin")}
    if any(record and record.health for record in study.records):
        more = "flagged, made again, or empty scores" if flagged else "no flag, retry or empty scores"
        found.append(("flagged blocks", str(len(flagged)), more))
    return found


def _tile(name: str, value: str, more: str) -> str:
    name, value, more = (html.escape(text) for text in (name, value, more))
    return f'<li><span class="name">{name}</span><b>{value}</b><span class="more">{more}</span></li>'


def _badge(study: Study) -> str:
    if study.is_complete:
        return ""
    word = "being made" if study.is_live else "not finished"
    return f'<span class="badge">{word}: {study.blocks} of {study.run.blocks} blocks</span>'


def _facts(study: Study) -> str:
    run = study.run
    must = {name.removeprefix("layout "): value for name, value in run.must.items()}
    memory = [
        f"{must[key]} {word}"
        for key, word in (("sink_blocks", "sink"), ("recent_blocks", "recent"))
        if key in must
    ]
    if must.get("top_k"):
        memory.append(f"top {must['top_k']} of a bank of {must.get('bank') or 'all'}")
    if "select" in must:
        memory.append(str(must["select"]))
    facts = [
        run.model,
        f"{run.size[0]}×{run.size[1]}, {run.fps} fps",
        f"{_clock(float(study.times[-1]))} in {study.blocks} blocks",
        *([", ".join(memory)] if memory else []),
        f"seed {run.request.get('seed')}",
        f"{run.created:%Y-%m-%d}",
        f"run {run.id}",
    ]
    return " · ".join(html.escape(fact) for fact in facts)


def _notes(study: Study, cells: RecallMap) -> list[str]:
    notes = list(study.notes)
    if cells.per_column > 1:
        notes.append(
            f"The run is long: {cells.per_column} blocks share a column, whose values are their means."
        )
    if not study.layers:
        notes.append("The trace has no recalls: this memory has no bank, or it is of an older version.")
    elif not any(record and record.scores for record in study.records):
        notes.append(
            "Nothing was scored: this selection does not look at contents, so there is no importance."
        )
    return notes


def size(size_bytes: float) -> str:
    """Bytes for people, decimal units: 9.44 MB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            value = size_bytes / scale
            return f"{value:.2f} {unit}" if value < 10 else f"{value:.1f} {unit}"
    return f"{size_bytes:.0f} B"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _last(curve: Curve) -> float | None:
    known = curve[np.isfinite(curve)]
    return float(known[-1]) if len(known) else None


def _mean(curve: Curve) -> float | None:
    known = curve[np.isfinite(curve)]
    return float(known.mean()) if len(known) else None


def _cut(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _base64(values: NDArray[np.uint8]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _json(data: Any) -> str:
    """JSON that may stand in a script: no tag or comment can begin or end in it."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
