"""What a run's trace says, in answers to questions: all of it, one block, one run against another.

    load(folder) -> Inspected -> summary | explain | compare -> plain values, which are printed or go out as JSON

Takes no lock and changes nothing, so a run may be looked at while it is made. Times are seconds in the video's file;
where it has only what is new of somebody's video, what was there before has times below 0. Knows no display and needs
no torch; what the words mean is said in trace.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from packforcing_cli import runfolder, trace
from packforcing_cli.config import GenerateRequest
from packforcing_cli.errors import RunFolderError, UsageError
from packforcing_cli.layout import Shown
from packforcing_cli.timeline import Script
from packforcing_cli.trace import Record, Trace

SCHEMA = 1
MOST_RECALLED = 5
RUNNERS_UP = 3
PARTITIONS = ("sink", "mid", "recent", "current")


@dataclass(frozen=True)
class Inspected:
    """A run and its trace, as they are at one moment.

    status: as runfolder.Run.  script: the prompts in blocks.
    """

    folder: Path
    status: str
    run: runfolder.Record
    script: Script
    trace: Trace

    @property
    def records(self) -> tuple[Record, ...]:
        return self.trace.records

    @cached_property
    def shown(self) -> Shown:
        """Which blocks are in the file."""
        return self.run.shown

    @cached_property
    def _missing(self) -> tuple[int, ...]:
        """Blocks before the last one that the trace has no line of."""
        there = {record.block for record in self.records}
        return tuple(block for block in range(self.records[-1].block) if block not in there)

    def start(self, block: int) -> float:
        """When a block begins, in seconds; the end of the one before."""
        return self.shown.frame_of(block) / self.run.fps

    def record(self, block: int) -> Record:
        """The record of a block. Raises: UsageError if it has none."""
        for record in self.records:
            if record.block == block:
                return record
        if block in self._missing:
            raise UsageError(
                f"block {block} of {self.run.id} was made, but its line in the trace is missing",
                hint="What its memory was is not known; another block can be asked for.",
            )
        known = f"0 to {self.records[-1].block}"
        raise UsageError(f"the trace of {self.run.id} has no block {block}", hint=f"It has blocks {known}.")

    def block_at(self, seconds: float) -> int:
        """The block that shows a moment, traced or not. Raises: UsageError if the run has none there."""
        frame = math.floor(seconds * self.run.fps)
        shown = self.shown
        for record in self.records:
            if shown.frame_of(record.block) <= frame < shown.frame_of(record.block + 1):
                return record.block
        for block in self._missing:
            if shown.frame_of(block) <= frame < shown.frame_of(block + 1):
                return block
        end = self.start(self.records[-1].block + 1)
        raise UsageError(
            f"{self.run.id} has nothing at {seconds:g} s", hint=f"What is made so far ends at {end:.2f} s."
        )


def load(folder: Path) -> Inspected:
    """Look at a run.

    Raises: UsageError for a run without a block, or of a newer version; RunFolderError for one without a trace, or that
        is damaged.
    """
    record = runfolder.read(folder)
    found = trace.read(folder, blocks=record.blocks)
    known = runfolder.look(folder)
    if not found.records:
        if known.blocks:
            raise RunFolderError(
                f"{record.id} has {known.blocks} blocks and no trace that can be read: {folder / trace.FILE}",
                hint="Its memory cannot be shown; the video can still be resumed and extended.",
            )
        follow = f"To watch it: packforcing inspect-cache {record.id} --follow"
        resume = f"To make it: packforcing resume {record.id}"
        raise UsageError(f"{record.id} has no block yet", hint=follow if known.is_live else resume)
    return Inspected(folder, known.status, record, script_of(record), found)


def script_of(record: runfolder.Record) -> Script:
    """The prompts of a run, in blocks."""
    request = GenerateRequest.from_values(record.request)
    start = record.shown.history
    return request.timeline.script(
        request.prompt, record.lengths, fps=record.fps, num_blocks=record.blocks, start=start
    )


# ---------------------------------------------------------------------------------------------------- the whole run


def summary(seen: Inspected) -> dict[str, Any]:
    """What a run remembered, in numbers; JSON values."""
    records = seen.records
    traced = [record for record in records if record.partitions]
    last = traced[-1] if traced else None
    return {
        "schema": SCHEMA,
        "kind": "run",
        "run": seen.run.id,
        "folder": str(seen.folder),
        "output": seen.run.output,
        "status": seen.status,
        "prompt": seen.run.prompt,
        "model": seen.run.model,
        "select": str(seen.run.must.get("select", "")),
        "blocks": len(records),
        "length_blocks": seen.run.blocks,
        "seconds": round(seen.start(records[-1].block + 1), 3),
        "length_seconds": round(seen.start(seen.run.blocks), 3),
        "memory": None if last is None else memory_of(last),
        "recall": recall(seen),
        "slots": None if last is None else slots_of(traced),
        "degenerate": [
            {"block": r.block, "start": _time(seen, r.block), "layers": list(r.degenerate)}
            for r in records
            if r.degenerate
        ],
        "retries": [
            {"block": r.block, "start": _time(seen, r.block), "attempts": r.retry + 1}
            for r in records
            if r.retry
        ],
        "health": [
            {"block": r.block, "start": _time(seen, r.block), "flags": list(r.health.flags)}
            for r in records
            if r.health and r.health.flags
        ],
        "stages": stages(records),
        "peak_memory": {
            name: max((r.memory.get(name, 0) for r in records), default=0) for name in ("device", "resident")
        },
        "notes": list(seen.trace.notes),
    }


def memory_of(record: Record) -> dict[str, Any]:
    """The memory while a block was made, by partition, against a full cache."""
    assert record.partitions is not None
    parts = record.partitions
    per_token = record.bytes["current"] // record.tokens["current"]
    blocks = {"sink": len(parts.sink), "mid": parts.active, "recent": len(parts.recent), "current": 1}
    return {
        "block": record.block,
        "partitions": [
            {
                "name": name,
                "blocks": blocks[name],
                "tokens": record.tokens[name],
                "bytes": record.tokens[name] * per_token,
            }
            for name in PARTITIONS
        ],
        "bank_blocks": len(parts.bank),
        "bytes": dict(record.bytes),
        "full_bytes": record.full_bytes,
    }


def recall(seen: Inspected) -> dict[str, Any]:
    """What was recalled, from when, how steadily."""
    records = seen.records
    counts = trace.recall_counts(records)
    times = Counter(block for record in records for block in record.recalled)
    most = sorted(counts, key=lambda block: (-times[block], -counts[block], block))[:MOST_RECALLED]
    ages = sorted(
        seen.start(record.block) - seen.start(block)
        for record in records
        for layer in record.selected
        for block in layer
    )
    changes = [
        change
        for record, change in zip(records, trace.churn(records), strict=True)
        if change is not None and trace.chooses(record)
    ]
    spread = [one for one in map(trace.position_diversity, records) if one is not None]
    share = trace.share_never_selected(records)
    return {
        "most": [
            {
                "block": block,
                "start": _time(seen, block),
                "end": _time(seen, block + 1),
                "by_blocks": times[block],
                "by_layers": counts[block],
            }
            for block in most
        ],
        "age_seconds": {
            name: round(_quantile(ages, at), 3) if ages else None
            for name, at in (("least", 0.0), ("p25", 0.25), ("median", 0.5), ("p75", 0.75), ("most", 1.0))
        },
        "churn": _mean(changes),
        "position_diversity": _mean(spread),
        "share_never_selected": None if share is None else round(share, 4),
        "never_selected": list(trace.never_selected(records)),
        "importance": [None if value is None else round(value, 4) for value in trace.importance(records)],
    }


def slots_of(records: Sequence[Record]) -> dict[str, Any]:
    """The widest context against the trained range."""
    slots = max((record.slots for record in records if record.slots), key=lambda slots: slots.max_distance)
    return {
        "span": slots.span,
        "max_distance": slots.max_distance,
        "trained": slots.trained,
        "within_trained_range": slots.max_distance < slots.trained,
    }


def stages(records: Sequence[Record]) -> dict[str, Any]:
    """Mean seconds of every stage, their share of a block, and what ran beside."""
    names = list(dict.fromkeys(name for record in records for name in record.seconds))
    means = {name: sum(r.seconds.get(name, 0.0) for r in records) / len(records) for name in names}
    whole = sum(means.values())
    encode = [record.encode_seconds for record in records if record.encode_seconds is not None]
    return {
        "block_seconds": round(whole, 6),
        "stages": {
            name: {"seconds": round(value, 6), "share": round(value / whole, 5) if whole else 0.0}
            for name, value in means.items()
        },
        "encode_seconds": round(sum(encode) / len(encode), 6) if encode else None,
    }


# ---------------------------------------------------------------------------------------------------- one block


def explain(seen: Inspected, block: int, *, layer: int | None = None) -> dict[str, Any]:
    """What one block saw, what it recalled, from when and why; JSON values.

    layer: tell of this layer alone.
    Raises: UsageError if there is no such block or layer.
    """
    record = seen.record(block)
    layers = range(len(record.selected)) if layer is None else (layer,)
    if layer is not None and not 0 <= layer < len(record.selected):
        raise UsageError(
            f"--layer {layer}: block {block} has {len(record.selected)} layers, from 0",
            hint=f"Use 0 to {len(record.selected) - 1}.",
        )
    chosen = Counter(old for number in layers for old in record.selected[number])
    return {
        "schema": SCHEMA,
        "kind": "block",
        "run": seen.run.id,
        "block": block,
        "start": _time(seen, block),
        "end": _time(seen, block + 1),
        "prompt": _prompt(seen, record),
        "scene": record.scene,
        "retry": record.retry,
        "sees": _seen_blocks(seen, record),
        "recalled": [
            {
                "block": old,
                "start": _time(seen, old),
                "end": _time(seen, old + 1),
                "age_seconds": round(seen.start(block) - seen.start(old), 3),
                "layers": chosen[old],
                "of_layers": len(layers),
                "pinned": old in record.pins,
                **_scores(record, layers, old),
            }
            for old in sorted(chosen)
        ],
        "runners_up": [
            {
                "block": old,
                "start": _time(seen, old),
                "end": _time(seen, old + 1),
                **_scores(record, layers, old),
            }
            for old in _runners_up(record, layers, chosen)
        ],
        "layers": [_layer(record, number) for number in layers],
        "why": why(record, _memory_options(seen.run)),
        "pins": list(record.pins),
        "bank_blocks": 0 if record.partitions is None else len(record.partitions.bank),
        "slots": None if record.slots is None else dict(vars(record.slots)),
        "memory": None if record.partitions is None else memory_of(record),
        "health": None if record.health is None else dict(vars(record.health)),
        "seconds": dict(record.seconds),
    }


def _prompt(seen: Inspected, record: Record) -> str:
    prompts, scene = seen.script.prompts, record.scene
    if scene is None or scene >= len(prompts):  # of an older version, or damaged
        scene = seen.script.scene(record.block)
    return prompts[scene]


def _memory_options(run: runfolder.Record) -> dict[str, Any]:
    asked = GenerateRequest.from_values(run.request).memory
    return {"policy": asked.policy, "select": run.must.get("select"), "top_k": run.must.get("layout top_k")}


def why(record: Record, memory: Mapping[str, Any]) -> str:
    """How what a block recalled was chosen, in one sentence.

    memory: what the run was made with: `policy`, `select` and `top_k`, where they are known.
    """
    parts, select = record.partitions, str(memory.get("select", ""))
    if not record.recalled:
        return f"Nothing was recalled: {_why_nothing(record, memory)}."
    if parts is not None and len(parts.bank) == parts.active:
        return "Everything in the bank was recalled: there was room for all of it."
    if record.scores is None:
        unscored = {
            "fifo": "The newest blocks of the bank were taken (fifo).",
            "random": "The blocks were drawn at random, from seed and block number.",
        }
        return unscored.get(select, "How they were chosen is not recorded: there are no scores.")
    scored = {
        "affinity": f"the queries of block {record.block - 1} and of the block itself at its first step",
        "affinity-recent": f"the queries of block {record.block - 1}",
    }
    bank, took = len(parts.bank) if parts else len(record.scores[0]), len(record.selected[0])
    said = (
        f"Of {bank} blocks in the bank each layer took the {took} whose keys fit"
        f" {scored.get(select, 'the queries')} best."
    )
    if record.degenerate:
        layers = ", ".join(map(str, record.degenerate))
        said += f" In layers {layers} the scores said nothing, and the newest blocks were taken."
    return said


def _why_nothing(record: Record, memory: Mapping[str, Any]) -> str:
    policy, parts = str(memory.get("policy", "")), record.partitions
    if policy in ("sink", "window", "full"):
        return f"the policy {policy} keeps no compressed blocks"
    if memory.get("select") == "none":
        return "--select none recalls nothing"
    if memory.get("top_k") == 0:
        return "--top-k 0 recalls nothing"
    if not record.block:
        return "it is the first block"
    if parts is not None and parts.bank:
        return "no block of the bank was taken"
    return "nothing had left the recent blocks yet"


def _seen_blocks(seen: Inspected, record: Record) -> list[dict[str, Any]]:
    parts, slots = record.partitions, record.slots
    if parts is None or slots is None:
        return []
    rows = [("sink", block, slot) for block, slot in zip(parts.sink, slots.sink, strict=True)]
    rows += [("recent", block, slot) for block, slot in zip(parts.recent, slots.recent, strict=True)]
    rows.append(("current", parts.current, slots.current))
    return [
        {
            "partition": name,
            "block": block,
            "start": _time(seen, block),
            "end": _time(seen, block + 1),
            "slot": slot,
        }
        for name, block, slot in rows
    ]


def _scores(record: Record, layers: Sequence[int], block: int) -> dict[str, Any]:
    """Score of a bank block: the plain one of a single layer; over several its place between each layer's least (0) and
    largest (1), which can be averaged. And the best rank, from 1."""
    parts = record.partitions
    if record.scores is None or parts is None or block not in parts.bank:
        return {"score": None, "relative_score": None, "best_rank": None}
    at, relative = parts.bank.index(block), list[float]()
    for number in layers:
        row = record.scores[number]
        known = [value for value in row if value is not None]
        own = row[at]
        if own is not None and len(known) == len(row) and max(known) > min(known):
            relative.append((own - min(known)) / (max(known) - min(known)))
    ranks = [rank for number in layers if (rank := trace.rank(record, number, block)) is not None]
    return {
        "score": record.scores[layers[0]][at] if len(layers) == 1 else None,
        "relative_score": _mean(relative),
        "best_rank": min(ranks, default=None),
    }


def _runners_up(record: Record, layers: Sequence[int], chosen: Mapping[int, int]) -> list[int]:
    """The blocks that scored best of those no layer recalled."""
    parts = record.partitions
    if record.scores is None or parts is None:
        return []
    scored = {old: _scores(record, layers, old)["relative_score"] for old in parts.bank if old not in chosen}
    known = {old: score for old, score in scored.items() if score is not None}
    return sorted(known, key=lambda old: (-known[old], -old))[:RUNNERS_UP]


def _layer(record: Record, number: int) -> dict[str, Any]:
    return {
        "layer": number,
        "selected": list(record.selected[number]),
        "scores": None if record.scores is None else list(record.scores[number]),
        "degenerate": number in record.degenerate,
    }


# ------------------------------------------------------------------------------------------------------ two runs


def compare(a: Inspected, b: Inspected) -> dict[str, Any]:
    """Where two runs part, and by how much; JSON values. Ratios are of the second to the first."""
    pairs = [
        (x, {record.block: record for record in b.records}[x.block])
        for x in a.records
        if x.block in {record.block for record in b.records}
    ]
    overlap = [
        len(set(p) & set(q)) / len(set(p) | set(q))
        for x, y in pairs
        for p, q in zip(x.selected, y.selected, strict=False)
        if p or q
    ]
    first = [stages([x for x, _ in pairs]), stages([y for _, y in pairs])] if pairs else [{}, {}]
    times = [{name: one["seconds"] for name, one in part.get("stages", {}).items()} for part in first]
    live = [[r.bytes.get("live", 0) for r in run] for run in zip(*pairs, strict=True)] if pairs else [[], []]
    asked = [_asked(run.run) for run in (a, b)]
    settings = [
        {"name": name, "values": [one.get(name) for one in asked]}
        for name in {**asked[0], **asked[1]}
        if asked[0].get(name) != asked[1].get(name)
    ]
    return {
        "schema": SCHEMA,
        "kind": "compare",
        "runs": [a.run.id, b.run.id],
        "settings": settings,
        "blocks": [len(a.records), len(b.records)],
        "common_blocks": len(pairs),
        "selection": {
            "first_difference": _first_selection(a, pairs),
            "overlap": _mean(overlap),
        },
        "memory": {
            "first_difference": _first(a, pairs, lambda x: (x.partitions, dict(x.bytes))),
            "live_bytes": [max(values, default=0) for values in live],
        },
        "timings": {
            name: {
                "seconds": [times[0][name], times[1][name]],
                "ratio": _ratio(times[1][name], times[0][name]),
            }
            for name in times[0]
            if name in times[1]
        },
        "health": {
            "first_difference": _first(a, pairs, lambda x: x.health and x.health.flags),
            "unhealthy": [sum(bool(r.health and r.health.flags) for r in run.records) for run in (a, b)],
            "retries": [sum(r.retry for r in run.records) for run in (a, b)],
            "degenerate": [sum(bool(r.degenerate) for r in run.records) for run in (a, b)],
        },
        "notes": [f"{run.run.id}: {note}" for run in (a, b) for note in run.trace.notes],
    }


def _asked(record: runfolder.Record) -> dict[str, Any]:
    """What a run was made with, where files went left out."""
    left_out = ("output", "frames", "overwrite", "keep_run", "snapshot_every")
    return {**{k: v for k, v in record.request.items() if k not in left_out}, **record.must}


def _first_selection(seen: Inspected, pairs: Sequence[tuple[Record, Record]]) -> dict[str, Any] | None:
    for x, y in pairs:
        for layer, (p, q) in enumerate(zip(x.selected, y.selected, strict=False)):
            if p != q:
                start = _time(seen, x.block)
                return {"block": x.block, "start": start, "layer": layer, "selected": [list(p), list(q)]}
        if len(x.selected) != len(y.selected):
            return {"block": x.block, "start": _time(seen, x.block), "layer": None, "selected": None}
    return None


def _first(seen: Inspected, pairs: Sequence[tuple[Record, Record]], look: Any) -> dict[str, Any] | None:
    for x, y in pairs:
        if look(x) != look(y):
            return {"block": x.block, "start": _time(seen, x.block)}
    return None


# --------------------------------------------------------------------------------------------------------- numbers


def _time(seen: Inspected, block: int) -> float:
    return round(seen.start(block), 3)


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def _ratio(value: float, base: float) -> float | None:
    return round(value / base, 3) if base else None


def _quantile(ordered: Sequence[float], at: float) -> float:
    return ordered[round(at * (len(ordered) - 1))]
