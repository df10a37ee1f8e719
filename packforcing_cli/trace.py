"""What the memory did: one record a block, appended to the run folder as it is generated, and read back from it.

    {"schema": 1, "block": 17, "partitions": {...}, "slots": {...}, "bytes": {...}, "selected": [...], ...}

A line of trace.jsonl is one `Record`; its numbers are those of the live cache while that block was made. Nothing a
video depends on is in it: a run goes on without its trace. Reading needs no torch, may happen while the run is being
made, and never fails on a damaged line: what was left out is said in `Trace.notes`.

Health of a block, measured on its frames in levels of 255 (a strided sample of at most about 64 rows):

    luma     mean brightness                       spread  standard deviation of brightness inside a frame
    motion   mean change from frame to frame       jump    largest change from frame to frame, the one from the
    clipped  share of colour values at 0 or 255            block before included

    nan        latents or pixels hold NaN or infinity; the measures are not there then
    frozen     no change from frame to frame within the block is FROZEN or more
    black      luma < BLACK and spread < BLACK
    saturated  clipped > CLIPPED, not black, and either flat (spread < BLACK) or CLIPPED_RISE above the least that the
               scene had: pure white on pure black from the start is a style
    jump       jump > JUMP and jump > JUMP_RATIO * (motion here, or in the block before if that is more)

Where the prompt changes, or a [cut] is, a jump is wanted and not flagged, nor in the block behind. Knows neither the
model nor the cache nor a display: it is handed plain values.

Source of the statistics: PackForcing's attention study, docs/method.md 9.7; the definitions are given at each function.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packforcing_cli.errors import RunFolderError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SCHEMA = 1
FILE = "trace.jsonl"
FLAGS = ("nan", "frozen", "black", "saturated", "jump")
TOKENS = ("sink", "mid", "recent", "current")
BYTES = ("stored", "current", "raw_keys", "backups", "bank", "live")
LARGEST = 2**63
"""No whole number of a trace is larger; a line with one is damaged."""

SAMPLED_ROWS = 64
FROZEN = 0.02
"""Levels. Frames that are shown again differ by 0; blocks of the demo change by 0.5 and more on average."""
BLACK = 6.0
"""Levels. Video black with noise stays below it; a night scene has lights, which spread."""
CLIPPED = 0.8
"""Share. Flat drawings in pure colours reach two thirds; all three channels at their ends everywhere is burnt out."""
CLIPPED_RISE = 0.3
"""Share. Contrast that comes and goes with what moves stays far below it."""
JUMP = 25.0
"""Levels, mean over the picture: a tenth of the range, as when another scene begins. Joins of blocks stay below it."""
JUMP_RATIO = 6.0
"""A reset stands out against the motion around it; steady fast motion does not."""


# ------------------------------------------------------------------------------------------------- one record


@dataclass(frozen=True)
class Partitions:
    """Block numbers, oldest first. `active`: how many of the bank each layer attends."""

    sink: tuple[int, ...]
    bank: tuple[int, ...]
    recent: tuple[int, ...]
    current: int
    active: int


@dataclass(frozen=True)
class Slots:
    """First slot of each attended block, in latent frames; `mid` by active position, each `span` wide.

    max_distance: largest slot distance of a query.  trained: the range the model was trained on; distances stay below.
    """

    sink: tuple[float, ...]
    mid: tuple[float, ...]
    recent: tuple[float, ...]
    current: float
    span: float
    max_distance: float
    trained: int


@dataclass(frozen=True)
class Health:
    """Measures of a block's frames, see the module docstring; None where they cannot be taken."""

    flags: tuple[str, ...] = ()
    luma: float | None = None
    spread: float | None = None
    motion: float | None = None
    jump: float | None = None
    clipped: float | None = None


@dataclass(frozen=True)
class Record:
    """What the memory was while one block was made. What a line of an older version lacks is None or empty.

    retry:      which attempt at the block was kept, from 0.
    frames:     its first pixel frame and one past its last, in the count of the memory's own blocks.
    scene:      index of its prompt.
    tokens:     sink, mid, recent, current: what a layer attends.
    bytes:      stored, current, raw_keys, backups, bank, live: of the cache's tensors, the part in use.
    full_bytes: keys and values of all blocks up to this one, had they all been kept at full resolution.
    selected:   [L][K] block numbers each layer recalled, ascending.
    scores:     [L][M] of the bank, oldest first, None for NaN; None where nothing is scored.
    degenerate: layers whose scores said nothing, which took the newest blocks.
    pins:       pinned blocks in the memory.
    seconds:    of the stages: denoise, clean, decode, compress, commit, journal, trace (making this record), stall
                (waiting for the video encoder since the block before).
    encode_seconds: spent by the video encoder, which runs beside, since the block before.
    memory:     device, resident: bytes of the whole process, device 0 on a CPU.
    """

    block: int
    schema: int | None = SCHEMA
    retry: int = 0
    frames: tuple[int, int] | None = None
    scene: int | None = None
    partitions: Partitions | None = None
    slots: Slots | None = None
    tokens: Mapping[str, int] = field(default_factory=dict)
    bytes: Mapping[str, int] = field(default_factory=dict)
    full_bytes: int | None = None
    selected: tuple[tuple[int, ...], ...] = ()
    scores: tuple[tuple[float | None, ...], ...] | None = None
    degenerate: tuple[int, ...] = ()
    pins: tuple[int, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    encode_seconds: float | None = None
    memory: Mapping[str, int] = field(default_factory=dict)
    health: Health | None = None

    @property
    def recalled(self) -> tuple[int, ...]:
        """Blocks that any layer recalled, ascending."""
        return tuple(sorted({block for layer in self.selected for block in layer}))

    @property
    def made_seconds(self) -> float:
        """Of all stages together, without waiting for the encoder."""
        return sum(value for name, value in self.seconds.items() if name != "stall")

    def to_json(self) -> dict[str, Any]:
        """The values of a line of trace.jsonl."""
        values: dict[str, Any] = {"schema": self.schema}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if name != "schema":
                values[name] = dict(vars(value)) if isinstance(value, _PARTS) else value
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Record:
        """The inverse of `to_json`; also reads lines of versions before the schema.

        Raises: ValueError, TypeError or KeyError if it is no record; UsageError if it is of a newer version.
        """
        schema = values.get("schema")
        if schema is not None and (not isinstance(schema, int) or isinstance(schema, bool)):
            raise ValueError("schema is not a number")
        if schema is not None and schema > SCHEMA:
            raise UsageError(
                f"the trace has schema {schema}; this version of packforcing reads up to {SCHEMA}",
                hint="Use the version that made it, or a newer one.",
            )
        block = _whole(values["block"])
        if block < 0:
            raise ValueError(f"block {block} is below 0")
        if schema is None:
            active = dict(values.get("cache") or {}).get("active") or ()
            return cls(
                block, schema=None, selected=_table(active), seconds=_numbers(values.get("seconds") or {})
            )
        parts, slots, health = values["partitions"], values["slots"], values["health"]
        scores = values["scores"]
        first, end = values["frames"]
        record = cls(
            block=block,
            schema=schema,
            retry=_whole(values["retry"]),
            frames=(_whole(first), _whole(end)),
            scene=_whole(values["scene"]),
            partitions=Partitions(
                sink=_ids(parts["sink"]),
                bank=_ids(parts["bank"]),
                recent=_ids(parts["recent"]),
                current=_whole(parts["current"]),
                active=_whole(parts["active"]),
            ),
            slots=Slots(
                sink=_floats(slots["sink"]),
                mid=_floats(slots["mid"]),
                recent=_floats(slots["recent"]),
                current=_finite(slots["current"]),
                span=_finite(slots["span"]),
                max_distance=_finite(slots["max_distance"]),
                trained=_whole(slots["trained"]),
            ),
            tokens={name: _whole(count) for name, count in values["tokens"].items()},
            bytes={name: _whole(size) for name, size in values["bytes"].items()},
            full_bytes=_whole(values["full_bytes"]),
            selected=_table(values["selected"]),
            scores=None if scores is None else tuple(tuple(_maybe(s) for s in layer) for layer in scores),
            degenerate=_ids(values["degenerate"]),
            pins=_ids(values["pins"]),
            seconds=_numbers(values["seconds"]),
            encode_seconds=_maybe(values["encode_seconds"]),
            memory={name: _whole(size) for name, size in values["memory"].items()},
            health=Health(
                tuple(str(flag) for flag in health["flags"]),
                *(_maybe(health.get(name)) for name in ("luma", "spread", "motion", "jump", "clipped")),
            ),
        )
        _require_consistent(record)
        return record


_PARTS = (Partitions, Slots, Health)


def _require_consistent(record: Record) -> None:
    """Raises: ValueError if its parts do not fit each other, so that what reads a record can rely on them."""
    parts, slots, block = record.partitions, record.slots, record.block
    assert parts is not None
    assert slots is not None
    assert record.frames is not None
    assert record.scene is not None
    assert record.full_bytes is not None
    past = {*parts.sink, *parts.bank, *parts.recent}
    layers = len(record.selected)
    scores = record.scores
    wrong = {
        "retry": record.retry < 0,
        "frames": not 0 <= record.frames[0] < record.frames[1],
        "scene": record.scene < 0,
        "partitions": not all(0 <= old < block for old in past)
        or parts.current != block
        or not 0 <= parts.active <= len(parts.bank)
        or len(set(parts.bank)) != len(parts.bank),
        "slots": (len(slots.sink), len(slots.mid), len(slots.recent))
        != (len(parts.sink), parts.active, len(parts.recent)),
        "tokens": any(record.tokens.get(name, -1) < 0 for name in TOKENS) or not record.tokens.get("current"),
        "bytes": any(record.bytes.get(name, -1) < 0 for name in BYTES) or not record.bytes.get("live"),
        "full_bytes": record.full_bytes < 0,
        "selected": not {old for layer in record.selected for old in layer} <= set(parts.bank),
        "scores": scores is not None
        and (len(scores) != layers or any(len(layer) != len(parts.bank) for layer in scores)),
        "degenerate": not all(0 <= layer < layers for layer in record.degenerate),
    }
    if any(wrong.values()):
        raise ValueError(f"{next(name for name, is_so in wrong.items() if is_so)} cannot be")


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > LARGEST:
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _ids(values: Any) -> tuple[int, ...]:
    return tuple(_whole(value) for value in values)


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(_finite(value) for value in values)


def _table(rows: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(_ids(row) for row in rows)


def _maybe(value: Any) -> float | None:
    return None if value is None else _finite(value)


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not finite")
    return number


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): _finite(value) for name, value in values.items()}


def rounded(value: float) -> float | None:
    """A float32 without the digits it does not have, as scores are written; None for NaN and infinity.

    All nine that tell two float32 apart: scores are large and differ little, and their order is what counts.
    """
    return float(f"{value:.9g}") if math.isfinite(value) else None


# ---------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Trace:
    """The records of a run, one a block, by number; `notes` are sentences about what was left out."""

    records: tuple[Record, ...]
    notes: tuple[str, ...] = ()


class Tail:
    """Reads a trace that may still grow: `update` takes in what was appended since.

    Args of the constructor: a run folder, or its trace.jsonl.
    """

    def __init__(self, path: Path) -> None:
        self.path = path / FILE if path.is_dir() else path
        self._start_anew()

    def _start_anew(self) -> None:
        self._at, self._line = 0, 0
        self._rest = b""
        self._records: dict[int, Record] = {}
        self._unreadable: list[int] = []

    def update(self) -> bool:
        """Take in new lines. Returns: whether there were any.

        Raises: UsageError if a line is of a newer version; RunFolderError if the file cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                if file.seek(0, 2) < self._at:  # a new process has cut off a torn end
                    self._start_anew()
                file.seek(self._at)
                data = file.read()
        except FileNotFoundError:
            self._start_anew()
            return False
        except OSError as error:
            raise RunFolderError(
                f"{self.path} cannot be read: {error.strerror}", hint="Check its permissions."
            ) from error
        self._at += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._line += 1
            record = _parsed(line)
            if record is not None:
                self._records[record.block] = record
            elif line.strip():
                self._unreadable.append(self._line)
        return bool(lines)

    def trace(self, *, blocks: int | None = None) -> Trace:
        """What was read so far.

        blocks: of the run; records of later ones are left out, and a note says so. None = as many as there are.
        """
        records, notes = dict(self._records), list[str]()
        if self._rest:
            last = _parsed(self._rest)
            if last is not None:  # only the end of the line is missing
                records[last.block] = last
            else:
                notes.append("The last line of the trace is cut off and was left out.")
        if self._unreadable:
            shown = ", ".join(str(line) for line in self._unreadable[:5])
            more = "" if len(self._unreadable) <= 5 else f" and {len(self._unreadable) - 5} more"
            notes.append(f"Of the trace, line {shown}{more} cannot be read and was left out.")
        beyond = sorted(block for block in records if blocks is not None and block >= blocks)
        if beyond:
            notes.append(
                f"{_blocks(beyond)} in the trace cannot be of this run, which has {blocks} blocks, and was left out."
                if len(beyond) == 1
                else f"{_blocks(beyond)} in the trace cannot be of this run, which has {blocks} blocks,"
                " and were left out."
            )
        found = tuple(records[block] for block in sorted(records) if block not in set(beyond))
        old = [record.block for record in found if record.schema is None]
        if old:
            notes.append(
                f"{_blocks(old)} came from an older version: only what was recalled and the timings are known."
            )
        gaps = [(a + 1, b - 1) for a, b in pairwise([-1, *(r.block for r in found)]) if b > a + 1]
        if gaps:
            notes.append(f"The trace has no line of {_runs(gaps, capital=False)}.")
        return Trace(found, tuple(notes))


def read(path: Path, *, blocks: int | None = None) -> Trace:
    """The trace of a run folder, or of a trace.jsonl; of a block with several lines the newest. Empty if there is none.

    blocks: of the run, see `Tail.trace`.
    Raises: UsageError if it is of a newer version; RunFolderError if it cannot be read.
    """
    tail = Tail(path)
    tail.update()
    return tail.trace(blocks=blocks)


def _parsed(line: bytes) -> Record | None:
    try:
        values = json.loads(line)
        return Record.from_json(values) if isinstance(values, dict) else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return None


def _blocks(numbers: Sequence[int], *, capital: bool = True) -> str:
    """Numbers as words: "Blocks 0-8 and 12"."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return _runs(runs, capital=capital)


def _runs(runs: Sequence[tuple[int, int]], *, capital: bool = True) -> str:
    """The same of (first, last) of each stretch; a long one costs no memory."""
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in runs[:6]] + (["…"] if len(runs) > 6 else [])
    word = "block" if len(runs) == 1 and runs[0][0] == runs[0][1] else "blocks"
    listed = shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + " and " + shown[-1]
    return f"{word.capitalize() if capital else word} {listed}"


# --------------------------------------------------------------------------------------------- what they show


def churn(records: Sequence[Record]) -> list[float | None]:
    """How much of what is recalled changes from block to block: 0 nothing, 1 everything.

    For each record the mean over layers of the Jaccard distance 1 - |A n B| / |A u B| between what the layer recalled
    for it and for the block before. None where one of the two recalled nothing, or the block before is not there.
    Source: docs/method.md 9.7; the paper reports 0.75.
    """
    found: list[float | None] = []
    before: Record | None = None
    for record in records:
        pairs: list[tuple[set[int], set[int]]] = []
        if before is not None and before.block == record.block - 1:
            pairs = [
                (set(old), set(new))
                for old, new in zip(before.selected, record.selected, strict=False)
                if old and new
            ]
        found.append(sum(1 - len(a & b) / len(a | b) for a, b in pairs) / len(pairs) if pairs else None)
        before = record
    return found


def chooses(record: Record) -> bool:
    """Whether the bank held more than was recalled; a block that recalls all of it has no choice to change."""
    return record.partitions is None or record.partitions.active < len(record.partitions.bank)


def relative_positions(record: Record) -> list[float]:
    """Where in the bank each recalled block lay, one entry a layer and block: 0 the oldest, 1 the newest."""
    bank = () if record.partitions is None else record.partitions.bank
    place = {block: at / max(1, len(bank) - 1) for at, block in enumerate(bank)}
    return [place[block] for layer in record.selected for block in layer if block in place]


def position_diversity(record: Record, *, bins: int = 10) -> float | None:
    """How evenly recall draws on the whole bank: 1 = from everywhere alike, 0 = from one place.

    The entropy of `relative_positions` over equal bins (as many as blocks if they are fewer), divided by the largest
    entropy so many recalls can have. None with fewer than two blocks in the bank.
    Source: docs/method.md 9.7 reports above 0.85 without giving a formula; this one is ours.
    """
    bank = 0 if record.partitions is None else len(record.partitions.bank)
    positions = relative_positions(record)
    bins = min(bins, bank)
    if bins < 2 or not positions:
        return None
    counts = Counter(min(int(position * bins), bins - 1) for position in positions)
    total = len(positions)
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    return entropy / math.log(min(bins, total)) if min(bins, total) > 1 else None


def importance(records: Sequence[Record], *, bins: int = 10) -> list[float | None]:
    """Mean normalised score over the relative position in the bank, from the oldest to the newest tenth.

    Scores of a layer are brought to 0..1 (its least and largest at that block), then averaged over layers and blocks.
    Source: docs/method.md 9.7; the paper's mean is 0.499 and nearly flat.
    """
    sums, counts = [0.0] * bins, [0] * bins
    for record in records:
        for layer in record.scores or ():
            known = [score for score in layer if score is not None]
            if len(known) < 2 or len(known) != len(layer) or max(known) == min(known):
                continue
            low, high = min(known), max(known)
            for at, score in enumerate(known):
                place = min(int(at / (len(known) - 1) * bins), bins - 1)
                sums[place] += (score - low) / (high - low)
                counts[place] += 1
    return [total / count if count else None for total, count in zip(sums, counts, strict=True)]


def recall_counts(records: Sequence[Record]) -> dict[int, int]:
    """How often each block was recalled, counted once a layer and block."""
    return dict(Counter(block for record in records for layer in record.selected for block in layer))


def never_selected(records: Sequence[Record]) -> tuple[int, ...]:
    """Blocks that were in the bank of some block and that no layer ever recalled, ascending."""
    stored = {block for record in records if record.partitions for block in record.partitions.bank}
    return tuple(sorted(stored - set(recall_counts(records))))


def share_never_selected(records: Sequence[Record]) -> float | None:
    """Share of the blocks that were ever in the bank that no layer ever recalled. None if the bank was empty."""
    stored = {block for record in records if record.partitions for block in record.partitions.bank}
    return len(never_selected(records)) / len(stored) if stored else None


def recall_ages(records: Sequence[Record]) -> list[int]:
    """How old, in blocks, each recalled block was, one entry a layer and block."""
    return [record.block - block for record in records for layer in record.selected for block in layer]


def rank(record: Record, layer: int, block: int) -> int | None:
    """Place of a bank block in a layer's scores, 1 the best; of equal ones the newer. None where it is not scored."""
    bank = () if record.partitions is None else record.partitions.bank
    scores = None if record.scores is None else record.scores[layer]
    if scores is None or block not in bank or len(scores) != len(bank) or None in scores:
        return None
    own = (scores[bank.index(block)], block)
    return 1 + sum((score, other) > own for score, other in zip(scores, bank, strict=True))


# ----------------------------------------------------------------------------------------------------- health


@dataclass(frozen=True)
class Seen:
    """What the health of the next block is compared with: the last frame, sampled, and the block's motion.

    last:    [h,w,3] uint8.
    clipped: the least share of the scene so far.
    """

    last: NDArray[np.uint8]
    motion: float
    clipped: float


def measure(
    frames: NDArray[np.uint8], before: Seen | None = None, *, jump_expected: bool = False
) -> tuple[Health, Seen]:
    """Health of a block's frames, and what to compare the next block with.

    Args:
        frames: [T,H,W,3] uint8 RGB.
        before: of the block before, None for the first one.
        jump_expected: the picture may change at once: another prompt, or a cut.
    """
    import numpy as np

    step = max(1, min(frames.shape[1:3]) // SAMPLED_ROWS)
    small = frames[:, ::step, ::step]
    wide = small.astype(np.float32)
    luma = wide @ np.array([0.299, 0.587, 0.114], dtype=np.float32)  # [T,h,w]
    steps = np.abs(np.diff(wide, axis=0)).mean((1, 2, 3))
    motion = float(steps.mean()) if len(steps) else None
    largest = [float(steps.max())] if len(steps) else []
    frozen = len(steps) > 0 and float(steps.max()) < FROZEN
    if before is not None and before.last.shape == small.shape[1:]:
        largest.append(float(np.abs(wide[0] - before.last).mean()))
    jump = max(largest) if largest else None
    health = Health(
        luma=float(luma.mean()),
        spread=float(luma.std((1, 2)).mean()),
        motion=motion,
        jump=jump,
        clipped=float(((small == 0) | (small == 255)).mean()),
    )
    assert health.clipped is not None
    usual = max(motion or 0.0, before.motion if before else 0.0)
    least = health.clipped if before is None or jump_expected else min(before.clipped, health.clipped)
    found = _flags(health, usual, least, jump_expected=jump_expected)
    flags = tuple(name for name in FLAGS if name in found or (name == "frozen" and frozen))
    shown = {name: round(value, 3) for name, value in vars(health).items() if isinstance(value, float)}
    return Health(**{**vars(health), **shown, "flags": flags}), Seen(small[-1].copy(), motion or 0.0, least)


def _flags(health: Health, usual: float, least: float, *, jump_expected: bool) -> set[str]:
    """`usual`: motion to hold a jump against.  `least`: clipped share of the scene."""
    assert health.luma is not None
    assert health.spread is not None
    assert health.clipped is not None
    flat = health.spread < BLACK
    black = health.luma < BLACK and flat
    jumped = health.jump is not None and health.jump > max(JUMP, JUMP_RATIO * usual)
    found = {
        "black": black,
        "saturated": health.clipped > CLIPPED
        and not black
        and (flat or health.clipped > least + CLIPPED_RISE),
        "jump": jumped and not jump_expected,
    }
    return {name for name, is_so in found.items() if is_so}
