"""The numbers behind a run's plots: curves over blocks, the map of recalls, pictures.

All of it comes from the trace, run.json and the first frame of each block in the video; nothing is measured twice.
Knows no display: plots.py and page.py draw what is here.

Letters: T blocks of the run so far, L layers, n columns of the map (T, or fewer where several blocks share one).
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from packforcing_cli import runfolder, trace
from packforcing_cli.config import GenerateRequest
from packforcing_cli.errors import PackforcingError, UsageError
from packforcing_cli.reader import VideoReader, fitted
from packforcing_cli.timeline import Script
from packforcing_cli.trace import Record
from packforcing_cli.video import part_path

Curve = NDArray[np.float64]

PARTS = ("sink", "recent", "mid", "current", "reserve", "bank")
"""Of the cache's bytes, in the order they are stacked. `reserve` is raw keys and backups."""
STAGES = ("denoise", "clean", "decode", "compress", "commit", "journal", "trace", "stall")
BINS = 10
"""Of the relative position in the bank, as in `trace.importance`."""

PAPER_IMPORTANCE = 0.499
PAPER_CHURN = 0.75
PAPER_DIVERSITY = 0.85
"""What the paper's attention study reports over 30 s; the diversity is above this. Source: docs/method.md 9.7."""

PICTURE_WIDTH = 320
NOT_STORED = 255
"""In a map: the block was not in the bank. Other values are shares of FULL."""
FULL = 250


@dataclass(frozen=True)
class RecallMap:
    """Which past blocks were recalled, as a lower triangle of columns.

    Column c stands for the blocks [c * per_column, (c + 1) * per_column). Of row c and entry p <= c:

    share: [L + 1, n, n] uint8 in 0..FULL: share of c's blocks, among those that had a block of p in their bank, for
           which the layer recalled one of p. NOT_STORED where none had. Plane 0 is the mean over layers.
    score: the same shape: mean normalised score (a layer's least at a block is 0, its largest 1). NOT_STORED where
           nothing was scored.
    """

    per_column: int
    share: NDArray[np.uint8]
    score: NDArray[np.uint8]

    @property
    def columns(self) -> int:
        return int(self.share.shape[1])

    @property
    def layers(self) -> int:
        return int(self.share.shape[0]) - 1


@dataclass(frozen=True)
class Pictures:
    """First frames of blocks, and what is measured on them.

    frames: block -> [h, w, 3] uint8, at most PICTURE_WIDTH wide; of the blocks that were wanted.
    luma, saturation, sharpness: [T], NaN where the video has no frame of the block. See `look`.
    """

    frames: Mapping[int, NDArray[np.uint8]]
    luma: Curve
    saturation: Curve
    sharpness: Curve


@dataclass(frozen=True)
class Event:
    """Something that stands out at a block.

    kind: scene, cut, pin, retry, degenerate, or a health flag of trace.FLAGS.
    text: what to say of it.
    """

    block: int
    kind: str
    text: str


@dataclass(frozen=True)
class Study:
    """A run in numbers.

    records:    [T] by block, None where the trace has no line.
    times:      [T + 1] seconds at which each block begins, and the last one ends.
    curves:     [T] each, NaN where unknown; see `_curves`.
    importance: [L, BINS] mean normalised score by relative position in the bank; NaN where nothing was scored.
    ages:       how many blocks back recalls went: ages[a] recalls, counted once a layer and block.
    is_live:    whether a process is at work on the run.
    notes:      sentences about what is not there.
    """

    run: runfolder.Record
    folder: Path
    is_live: bool
    records: tuple[Record | None, ...]
    script: Script
    times: Curve
    curves: Mapping[str, Curve]
    importance: Curve
    ages: NDArray[np.int64]
    never: float | None
    events: tuple[Event, ...]
    pictures: Pictures | None
    notes: tuple[str, ...]

    @property
    def blocks(self) -> int:
        """T."""
        return len(self.records)

    @property
    def layers(self) -> int:
        """L; 0 if no block recalled anything."""
        return max((len(record.selected) for record in self.records if record is not None), default=0)

    @property
    def is_complete(self) -> bool:
        return self.blocks >= self.run.blocks

    @property
    def trained(self) -> int | None:
        """Slots the model was trained on, in latent frames; None if the trace does not say."""
        return next((record.slots.trained for record in self.records if record and record.slots), None)

    def known(self, *names: str) -> bool:
        """Whether one of these curves has a value."""
        return any(bool(np.isfinite(self.curves[name]).any()) for name in names)


def collect(folder: Path, *, pictures: int = 480) -> Study:
    """Read a run folder.

    Args:
        pictures: at most so many frames are kept; more blocks than that share one.
    Raises: UsageError if there is no run, no trace yet, or one of a newer version; RunFolderError if it is damaged.
    """
    seen = runfolder.look(folder)
    run = runfolder.read(folder)
    read = trace.read(folder, blocks=run.blocks)
    known = read.records
    if not known:
        raise UsageError(
            f"run {run.id} has no trace yet: nothing is known of its memory",
            hint="A run has a line of trace as soon as its first block is made.",
        )
    found = {record.block: record for record in known}
    records = tuple(found.get(block) for block in range(known[-1].block + 1))
    lengths, shown = run.lengths, run.shown
    request = GenerateRequest.from_values(run.request)
    script = request.timeline.script(
        request.prompt, lengths, fps=run.fps, num_blocks=run.blocks, start=shown.history
    )
    frames = [lengths.frames_for(block) for block in range(len(records) + 1)]
    wanted = range(0, len(records), per_column(len(records), pictures))
    seen_frames, why = read_pictures(run, blocks=len(records), wanted=wanted)
    return Study(
        run=run,
        folder=folder,
        is_live=seen.is_live,
        records=records,
        script=script,
        times=np.array(frames, np.float64) / run.fps,
        curves=_curves(records),
        importance=importance_by_layer(known),
        ages=_counted(trace.recall_ages(known)),
        never=trace.share_never_selected(known),
        events=_events(records, script),
        pictures=seen_frames,
        notes=(*_incomplete(run, len(records)), *_begins(run), *read.notes, *([why] if why else [])),
    )


def _incomplete(run: runfolder.Record, blocks: int) -> list[str]:
    return (
        []
        if blocks >= run.blocks
        else [f"The run is not complete: {blocks} of {run.blocks} blocks are here."]
    )


def _begins(run: runfolder.Record) -> list[str]:
    """Where the memory's time 0 lies in the file, if it is not its beginning."""
    shown = run.shown
    if shown.only_new:
        return [
            f"The file has the new part alone: the first {shown.history} blocks are of the video before it."
        ]
    if not shown.late:
        return []
    side = "after" if shown.late > 0 else "before"
    seconds = abs(shown.late) / run.fps
    return [
        f"Times count from the first block of the memory, {seconds:.2f} s {side} the beginning of the file."
    ]


def _counted(ages: Sequence[int]) -> NDArray[np.int64]:
    found = np.array(ages, np.int64)
    return np.bincount(found[found > 0], minlength=1)


def per_column(blocks: int, columns: int) -> int:
    """Blocks that share a column, so that there are at most so many columns."""
    return max(1, -(-blocks // columns))


def _curves(records: Sequence[Record | None]) -> dict[str, Curve]:
    """Curves over blocks, by name:

    PARTS, live, full, window: bytes. `live` is the cache's tensors in use, `window` keys and values of as many of the
        newest blocks as sink and recent hold, and of the current one; `full` those of all blocks so far.
    at_sink, at_mid, at_recent, at_current, distance: slots taken by each partition, largest distance (latent frames).
    bank_blocks, union: blocks in the bank, and of them those that at least one layer recalled.
    churn, diversity: as trace.churn and trace.position_diversity.
    never:    of the blocks that were in the bank so far the share that no layer recalled so far.
    STAGES, encode: seconds.   resident, device: bytes of the process.
    luma, spread, motion, jump: health measures, levels of 255.
    """
    names = (
        *(*PARTS, "live", "full", "window", "distance"),
        *(f"at_{name}" for name in ("sink", "mid", "recent", "current")),
        *("bank_blocks", "union", "churn", "diversity", "never"),
        *(*STAGES, "encode", "resident", "device"),
        *("luma", "spread", "motion", "jump"),
    )
    curves = {name: np.full(len(records), np.nan) for name in names}
    known = [record for record in records if record is not None]
    for record, value in zip(known, trace.churn(known), strict=True):
        curves["churn"][record.block] = np.nan if value is None else value
    whole = max((len(r.partitions.sink) + len(r.partitions.recent) for r in known if r.partitions), default=0)
    stored, recalled = set[int](), set[int]()
    for record in known:
        for name, value in _values(record, window_blocks=whole).items():
            curves[name][record.block] = np.nan if value is None else value
        stored.update(() if record.partitions is None else record.partitions.bank)
        recalled.update(record.recalled)
        if stored:
            curves["never"][record.block] = len(stored - recalled) / len(stored)
    return curves


_SIZES = {"current", "bank", "live", "raw_keys", "backups"}
_TOKENS = {"sink", "mid", "recent", "current"}


def _values(record: Record, *, window_blocks: int) -> dict[str, float | None]:
    """The curves' values at one block, but for those that need its neighbours."""
    values: dict[str, float | None] = {}
    size, tokens = record.bytes, record.tokens
    if _SIZES.issubset(size) and _TOKENS.issubset(tokens) and tokens["current"]:
        per_token = size["current"] / tokens["current"]
        values |= {name: tokens[name] * per_token for name in ("sink", "mid", "recent")}
        values |= {name: size[name] for name in ("current", "bank", "live")}
        values["reserve"] = size["raw_keys"] + size["backups"]
        values["window"] = (min(record.block, window_blocks) + 1) * size["current"]
        values["full"] = record.full_bytes
    if record.slots is not None and record.partitions is not None:
        slots, parts = record.slots, record.partitions
        block = slots.max_distance + 1 - slots.current
        values |= {
            "at_sink": len(slots.sink) * block,
            "at_mid": len(slots.mid) * slots.span,
            "at_recent": len(slots.recent) * block,
            "at_current": block,
            "distance": slots.max_distance,
            "bank_blocks": len(parts.bank),
        }
    values["union"] = len(record.recalled)
    values["diversity"] = trace.position_diversity(record)
    values |= {name: record.seconds.get(name) for name in STAGES}
    values["encode"] = record.encode_seconds
    values |= {name: record.memory.get(name) for name in ("resident", "device")}
    if record.health is not None:
        health = record.health
        values |= {name: getattr(health, name) for name in ("luma", "spread", "motion", "jump")}
    return values


def _events(records: Sequence[Record | None], script: Script) -> tuple[Event, ...]:
    said = {
        "nan": "numbers that are not finite",
        "frozen": "the picture stands still",
        "black": "the picture is black",
        "saturated": "the picture is burnt out",
        "jump": "the picture jumps",
    }
    events = [
        Event(start, "scene", f"prompt: {prompt}")
        for start, prompt in zip(script.starts, script.prompts, strict=True)
        if 0 < start < len(records)
    ]
    events += [
        Event(cut, "cut", "cut: it did not see the recent blocks before it")
        for cut in script.cuts
        if cut < len(records)
    ]
    events += [
        Event(pin, "pin", "pinned: recalled by every later block")
        for pin in script.pins
        if pin < len(records)
    ]
    for record in records:
        if record is None:
            continue
        flags = () if record.health is None else record.health.flags
        events += [Event(record.block, flag, said.get(flag, flag)) for flag in flags]
        if record.retry:
            times = "once" if record.retry == 1 else f"{record.retry} times"
            events.append(
                Event(record.block, "retry", f"made again {times}: the guard refused what came before")
            )
        if record.degenerate:
            layers, all_layers = len(record.degenerate), len(record.selected)
            events.append(
                Event(
                    record.block,
                    "degenerate",
                    f"scores said nothing in {layers} of {all_layers} layers, which took the newest blocks",
                )
            )
    return tuple(sorted(events, key=lambda event: (event.block, event.kind)))


# ------------------------------------------------------------------------------------------------------- recall


def normalised(record: Record) -> Curve | None:
    """Scores [L, M] of a record, each layer's brought to 0..1; rows of NaN where they say nothing. None if unscored.

    What `trace.importance` does, for the whole record at once.
    """
    bank = () if record.partitions is None else record.partitions.bank
    if not record.scores or not bank or any(len(layer) != len(bank) for layer in record.scores):
        return None
    scores = np.array([[np.nan if s is None else s for s in layer] for layer in record.scores], np.float64)
    low, high = scores.min(1, keepdims=True), scores.max(1, keepdims=True)  # NaN if one of them is
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(high > low, (scores - low) / (high - low), np.nan)


def importance_by_layer(records: Sequence[Record], *, bins: int = BINS) -> Curve:
    """[L, bins] mean normalised score by relative position in the bank, oldest first; as `trace.importance`."""
    layers = max((len(record.scores or ()) for record in records), default=0)
    sums, counts = np.zeros((layers, bins)), np.zeros((layers, bins))
    for record in records:
        scores = normalised(record)
        if scores is None or scores.shape[1] < 2 or len(scores) != layers:
            continue
        size = scores.shape[1]
        place = np.minimum((np.arange(size) / (size - 1) * bins).astype(int), bins - 1)
        fine = np.isfinite(scores)
        for layer in range(layers):
            here = fine[layer]
            np.add.at(sums[layer], place[here], scores[layer][here])
            np.add.at(counts[layer], place[here], 1)
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def recall_map(study: Study, *, columns: int) -> RecallMap:
    """The map of recalls with at most so many columns."""
    step = per_column(study.blocks, columns)
    n, layers = -(-study.blocks // step), study.layers
    hits, seen = np.zeros((layers, n, n), np.float32), np.zeros((n, n), np.float32)
    scores, scored = np.zeros((layers, n, n), np.float32), np.zeros((layers, n, n), np.float32)
    for record in study.records:
        if record is None or len(record.selected) != layers:
            continue
        row = record.block // step
        bank = record.recalled if record.partitions is None else record.partitions.bank
        seen[row, _columns(bank, step, row)] += 1
        for layer, blocks in enumerate(record.selected):
            hits[layer, row, _columns(blocks, step, row)] += 1
        marks = normalised(record)
        if marks is not None and len(marks) == layers and max(bank) < record.block:
            place = np.array(bank) // step
            fine = np.isfinite(marks)
            for layer in range(layers):
                here = fine[layer]
                np.add.at(scores[layer, row], place[here], marks[layer][here])
                np.add.at(scored[layer, row], place[here], 1)
    share = np.where(seen > 0, hits / np.maximum(seen, 1), np.nan)
    mark = np.where(scored > 0, scores / np.maximum(scored, 1), np.nan)
    return RecallMap(step, _packed(share), _packed(mark))


def _columns(blocks: Sequence[int], step: int, row: int) -> list[int]:
    """Columns that have one of these blocks, none behind the row's own."""
    return sorted({block // step for block in blocks if 0 <= block // step <= row})


def _packed(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """[L, n, n] in 0..1 with NaN -> [L + 1, n, n] as RecallMap has them."""
    fine = np.isfinite(values)
    counts = fine.sum(0)
    mean = np.where(counts > 0, np.where(fine, values, 0).sum(0) / np.maximum(counts, 1), np.nan)
    planes = np.concatenate((mean[None], values))
    return np.where(np.isfinite(planes), np.round(np.nan_to_num(planes) * FULL), NOT_STORED).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------- pictures


def read_pictures(
    run: runfolder.Record, *, blocks: int, wanted: Sequence[int]
) -> tuple[Pictures | None, str]:
    """The first frame of each block, of the unfinished file if there is one.

    Returns: pictures, None if there is no video; and what to say if there are none, or not all.
    """
    output = Path(run.output)
    path = next((path for path in (part_path(output), output) if path.is_file()), None)
    if path is None:
        return None, f"There are no pictures: the video {output} is not there any more."
    try:
        video = VideoReader(path)
        if video.metadata.get("run", run.id) != run.id or (video.width, video.height) != run.size:
            return None, f"There are no pictures: {path} is another video."
        curves = [np.full(blocks, np.nan) for _ in range(3)]
        frames: dict[int, NDArray[np.uint8]] = {}
        scale = min(1.0, PICTURE_WIDTH / video.width)
        small = (max(1, round(video.width * scale)), max(1, round(video.height * scale)))
        keep, seen, shown = set(wanted), set[int](), run.shown
        begins = [shown.frame_of(block) for block in range(blocks)]  # in the file
        for seconds, pixels in video.key_frames():
            frame = round(seconds * Fraction(run.fps))
            block = bisect.bisect_right(begins, frame) - 1
            if block in seen or block < 0 or frame >= begins[block] + shown.block_frames(block):
                continue
            seen.add(block)
            for curve, value in zip(curves, look(pixels), strict=True):
                curve[block] = value
            if block in keep:
                frames[block] = pixels if scale == 1 else fitted(pixels, small, "stretch")
    except PackforcingError as error:
        return None, f"There are no pictures: {error.message}."
    lacking = blocks - len(seen)
    note = f"The video has no picture of {lacking} of the {blocks} blocks." if lacking else ""
    return Pictures(frames, *curves), note


def look(pixels: NDArray[np.uint8]) -> tuple[float, float, float]:
    """Luma, saturation and sharpness of a frame [H, W, 3].

    luma:       mean of 0.299 R + 0.587 G + 0.114 B, levels of 255.
    saturation: mean of (max - min) / max over the three channels, 0..1; black counts as 0.
    sharpness:  mean absolute Laplacian of luma (four neighbours), levels of 255.
    """
    wide = pixels.astype(np.float32)
    luma = wide @ np.array([0.299, 0.587, 0.114], np.float32)
    high, low = wide.max(2), wide.min(2)
    saturation = np.where(high > 0, (high - low) / np.maximum(high, 1), 0)
    inner = luma[1:-1, 1:-1]
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    sharpness = float(np.abs(4 * inner - around).mean()) if inner.size else 0.0
    return float(luma.mean()), float(saturation.mean()), sharpness
