"""Run folders with made-up traces: what a run of some blocks would have written, without a model."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from packforcing_cli import __version__, trace
from packforcing_cli.config import GenerateRequest
from packforcing_cli.layout import Grid, Layout
from packforcing_cli.runfolder import HEADER, LATENTS
from packforcing_cli.runfolder import Record as RunRecord
from packforcing_cli.trace import Health, Partitions, Record, Slots

GRID = Grid(frames_per_block=4, rows=8, cols=8, layers=3, kv_dim=16, heads=2, dtype_bytes=4)
FPS = 16


def layout_of(**changes: Any) -> Layout:
    """The default memory of a small model; `changes` are fields of Layout."""
    values: dict[str, Any] = {"grid": GRID, "top_k": 4, "bank": 24} | changes
    return Layout(**values)


def synthetic_record(block: int, layout: Layout, *, seed: int = 0, **changes: Any) -> Record:
    """What a block would have traced; its scores favour an age that wanders with time. `changes` replace fields."""
    draw = random.Random(f"{seed} {block}")
    view, slots, tokens = layout.view(block), layout.slots(block), layout.tokens(block)
    size, bank = layout.bytes(block), [*view.mid]
    scores: list[tuple[float, ...]] = []
    selected: list[tuple[int, ...]] = []
    for layer in range(layout.grid.layers):
        favoured = 6 + 5 * layer + block // 20
        row = tuple(
            round(1 / (1 + abs(block - old - favoured)) + 0.3 * draw.random(), 5) if old else 0.5
            for old in bank
        )
        best = sorted(bank, key=lambda old, row=row: (old in layout.pins, row[bank.index(old)], old))  # type: ignore[misc]
        scores.append(row)
        selected.append(tuple(sorted(best[len(best) - view.active :])))
    values: dict[str, Any] = {
        "block": block,
        "frames": (layout.frames_for(block) if block else 0, layout.frames_for(block + 1)),
        "scene": 0,
        "partitions": Partitions(
            tuple(view.sink), tuple(bank), tuple(view.recent), current=block, active=view.active
        ),
        "slots": Slots(
            tuple(float(slot) for slot in slots.sink_starts),
            tuple(float(slot) for slot in slots.mid_starts),
            tuple(float(slot) for slot in slots.recent_starts),
            current=float(slots.current_start),
            span=float(slots.span),
            max_distance=float(slots.max_distance),
            trained=layout.trained_frames,
        ),
        "tokens": asdict(tokens),
        "bytes": {**asdict(size), "live": size.live},
        "full_bytes": (block + 1) * layout.grid.block_tokens * layout.grid.bytes_per_token,
        "selected": tuple(selected),
        "scores": tuple(scores) if view.active else None,
        "pins": tuple(old for old in bank if old in layout.pins),
        "seconds": {
            "denoise": 0.2 + 0.01 * draw.random(),
            "clean": 0.05,
            "decode": 0.06,
            "compress": 0.03,
            "commit": 0.001,
            "journal": 0.002,
            "stall": 0.0,
            "trace": 0.0005,
        },
        "encode_seconds": 0.02,
        "memory": {"device": 0, "resident": 600_000_000 + 1000 * block},
        "health": Health((), 110.0 + draw.random(), 42.0, 2.5, 4.0, 0.01),
    }
    return Record(**(values | changes))


def synthetic_run(
    folder: Path,
    blocks: int,
    *,
    layout: Layout | None = None,
    changes: Mapping[int, Mapping[str, Any]] | None = None,
    length: int | None = None,
    output: Path | str = "/nowhere/a.mp4",
    status: str = "finished",
    prompt: str = "a red circle moving right on a blue background",
    seed: int = 0,
    run_id: str = "20260102-150405-a-red-circle-1f3c2a",
    request: Mapping[str, Any] | None = None,
    with_blocks: bool = True,
) -> Path:
    """Write a run folder of so many blocks: run.json, empty block files, and their trace.

    Args:
        changes: block -> fields of its record to replace, such as `health` or `degenerate`.
        length:  blocks of the whole video; default: all are there.
        request: more values of the request, such as seconds or a timeline.
    Returns: the folder.
    """
    layout = layout or layout_of()
    length = length or blocks
    (folder / LATENTS).mkdir(parents=True)
    asked = GenerateRequest(prompt=prompt, seed=seed, output=Path(output), **(request or {}))
    record = RunRecord(
        **{
            "schema": 1,
            "id": run_id,
            "version": __version__,
            "created": datetime(2026, 1, 2, 15, 4, 5, tzinfo=UTC),
            "status": status,
            "prompt": prompt,
            "output": str(output),
            "frames": layout.frames_for(blocks) if status != "running" else 0,
            "blocks": length,
            "fps": FPS,
            "size": (128, 128),
            "frames_per_block": layout.grid.frames_per_block,
            "request": asked.to_values(),
            "tags": {"run": run_id, "prompt": prompt},
            "must": {"model": "demo", "select": "affinity-recent"},
            "numerics": {"device": "cpu"},
        }
    )
    (folder / HEADER).write_text(record.to_json(), "utf-8")
    with (folder / trace.FILE).open("w", encoding="utf-8") as file:
        for block in range(blocks):
            made = synthetic_record(block, layout, seed=seed, **(changes or {}).get(block, {}))
            file.write(json.dumps(made.to_json()) + "\n")
            if with_blocks:
                (folder / LATENTS / f"{block:06d}.safetensors").touch()
    return folder
