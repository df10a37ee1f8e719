"""The benchmark of this project: memories compared on the demo world, by exact detectors, over a minute or two.

    rows (a memory each) x held-out prompts x seeds --> videos --> one JSON line a video --> suite_report

Two kinds of video:

    follow   one caption from beginning to end; every 10 seconds the detectors say what is still right
    recall   a visitor comes after the sinks, goes, and is called back after 2, 5, 10 and 20 s out of sight. Captions
             say that it is here or away, never how it looks: its colour and shape can only come from the memory

             block   0      5      10             10 + d    14 + d
             caption | away | here | away ........ | here    |
             read           |   ===|          ==== |   ====  |     = frames the detector reads

A block depends on nothing behind it, so the first 60 s of a video of 120 s are the video of 60 s, and the four recalls
of a prompt share what comes before them: each goes on from the state that was there when the visitor was called.

A run may stop at any moment: a video that is done has its line in `videos.jsonl`, and the same command does the rest.
A line counts for the model, version and memory it was made with; others are left alone.

This module makes and measures videos; what comes of them is `suite_report`. It shows nothing.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from packforcing_cli import __version__, durable, metrics, resolve, rollout
from packforcing_cli.config import MemoryOptions
from packforcing_cli.errors import GenerationError, PackforcingError, UsageError, WeightsError
from packforcing_cli.layout import Grid, Layout
from packforcing_cli.prompts import Story, encode_script
from packforcing_cli.registry import MANIFEST, VideoModel, load_model, read_manifest
from packforcing_cli.rollout import Block, stream_generate
from packforcing_cli.timeline import Script
from packforcing_cli.training import detectors, world

SCHEMA = 1
NAME = "demo"
VIDEOS = "videos.jsonl"
SEGMENT_SECONDS = 10
WORDS = ("background", "colour", "shape", "direction", "present", "all")
REFERENCE = "packforcing"
FULL_PROMPTS, FULL_SEEDS, FULL_SECONDS = 32, 2, (60.0, 120.0)
QUICK_ROWS = (REFERENCE, "window", "sink+recent", "full")
QUICK_PROMPTS, QUICK_SEEDS, QUICK_SECONDS = 4, 1, (20.0,)
MAX_SECONDS = 3600.0

DELAYS = (2, 5, 10, 20)  # s out of sight
VISIT_BEGINS, VISIT_SECONDS, READ_SECONDS = 5, 5, 3  # s; the longest sink among the rows is over before
BACK_SECONDS = 4
VISITOR_WORDS = frozenset({"visitor", "here", "away"})

CALIBRATION_BLOCKS = 12


@dataclass(frozen=True)
class Row:
    """One line of the tables: a memory and what it is there for.

    memory:  options that differ from the model's own.
    recall:  whether the recall test is made with it.
    same_as: the row that is the same memory for this model; reason: why it cannot be made with this model. Such rows
        make no videos.
    """

    name: str
    group: str
    said: str
    memory: Mapping[str, Any] = field(default_factory=dict)
    recall: bool = False
    same_as: str = ""
    reason: str = ""

    @property
    def runs(self) -> bool:
        return not (self.same_as or self.reason)


def all_rows(window_blocks: int) -> tuple[Row, ...]:
    """Every row of the suite.

    Args:
        window_blocks: full-resolution blocks that take as much memory as the reference stores.
    """
    window = {"policy": "window", "sink_blocks": 0, "recent_blocks": window_blocks}
    return (
        Row(REFERENCE, "policy", "the model's own memory: sink, compressed mids, recent", recall=True),
        Row("full", "policy", "everything at full resolution", {"policy": "full"}, recall=True),
        Row(
            "window",
            "policy",
            f"the newest {window_blocks} blocks: the memory packforcing stores",
            window,
            recall=True,
        ),
        Row("sink+recent", "policy", "no compressed memory", {"policy": "sink"}, recall=True),
        Row("fifo", "selection", "recalls the newest", {"select": "fifo"}, recall=True),
        Row("random", "selection", "recalls by chance", {"select": "random"}, recall=True),
        Row(
            "affinity",
            "selection",
            "scored in the first pass, as in the paper",
            {"select": "affinity"},
            recall=True,
        ),
        Row(
            "affinity-recent",
            "selection",
            "scored by the last block's clean queries",
            {"select": "affinity-recent"},
            recall=True,
        ),
        Row(
            "rope-off",
            "positions",
            "no RoPE adjustment: every block keeps the slots of its own time",
            {"rope_adjustment": False},
            recall=True,
        ),
        Row("hr", "compressor", "the high-resolution branch alone", {"compressor": "hr"}),
        Row("lr", "compressor", "the low-resolution branch alone", {"compressor": "lr"}),
        Row("hr+lr", "compressor", "both branches", {"compressor": "hr+lr"}),
        Row("context-sinks", "compressor", "compressed beside the sinks", {"compressed_context": "sinks"}),
        Row(
            "context-history",
            "compressor",
            "compressed beside the block's history",
            {"compressed_context": "history"},
        ),
        *(
            Row(f"sink-{n}", "sinks", f"{n} sink block{'' if n == 1 else 's'}", {"sink_blocks": n})
            for n in (0, 1, 2, 4)
        ),
        *(
            Row(
                f"span-{n.replace('/', '-')}",
                "positions",
                f"a compressed block takes {said}",
                {"mid_span": n},
            )
            for n, said in (
                ("1/4", "a quarter slot"),
                ("1", "1 slot"),
                ("2", "2 slots"),
                ("block", "all slots of its frames"),
                ("fit", "what is left of the trained range"),
            )
        ),
    )


def rows_for(model: VideoModel, *, num_blocks: int) -> tuple[Row, ...]:
    """The rows as they are for a model: which of them are one and the same, and which it cannot do."""
    grid = resolve.grid_for(model, model.manifest.size)
    own = memory_of(model, {})
    layout = resolve.layout_for(model, own, grid, num_blocks=num_blocks)
    stored = layout.tokens(layout.view(num_blocks)).stored
    found: dict[str, str] = {}
    rows = []
    for row in all_rows(math.ceil(stored / grid.block_tokens)):
        try:
            same = _sameness(model, memory_of(model, row.memory), grid, num_blocks)
        except PackforcingError as error:
            rows.append(replace(row, reason=error.message))
            continue
        rows.append(replace(row, same_as=found.get(same, "")))
        found.setdefault(same, row.name)
    return tuple(rows)


def memory_of(model: VideoModel, options: Mapping[str, Any]) -> MemoryOptions:
    """Memory options with the model's own where nothing is said."""
    return MemoryOptions(**options).with_defaults(model.manifest.cache.model_dump())


def _sameness(model: VideoModel, memory: MemoryOptions, grid: Grid, num_blocks: int) -> str:
    """What makes two memories one, as text. Raises: PackforcingError if the model cannot do it."""
    layout = resolve.layout_for(model, memory, grid, num_blocks=num_blocks)
    facts: list[object] = [layout.sink_blocks, layout.recent_blocks, layout.top_k]
    if layout.top_k:
        kind = resolve.compressor_kind(model, memory.compressor)
        rollout.BlockCompressor(model, kind)
        spans = [str(layout.span(block)) for block in range(num_blocks)]
        facts += [
            layout.bank,
            layout.rope_adjustment,
            spans,
            memory.select,
            kind,
            memory.compressed_context,
        ]
    elif not layout.rope_adjustment and layout.sink_blocks:
        facts.append("rope off")
    return json.dumps(facts)


# -------------------------------------------------------------------------------------------------- what is to do


@dataclass(frozen=True)
class Video:
    """One video to make: of the kind "follow" or "recall"."""

    kind: str
    row: str
    memory: Mapping[str, Any]
    prompt: str
    seed: int
    blocks: int


@dataclass(frozen=True)
class Suite:
    """What was asked for, for a model.

    rows:      all of them, also those that were not asked for; `wanted` names those that were.
    model:     its `model_hash`.
    knows_visitor: whether the recall test can be made.
    """

    rows: tuple[Row, ...]
    wanted: tuple[str, ...]
    prompts: tuple[str, ...]
    seeds: int
    seconds: tuple[float, ...]
    grid: Grid
    fps: int
    model: str
    model_name: str
    knows_visitor: bool
    quick: bool = False

    @property
    def supports_claims(self) -> bool:
        """Whether there are all rows the model can make, the full lengths, and enough prompts and seeds."""
        return (
            not self.quick
            and len(self.prompts) >= FULL_PROMPTS
            and self.seeds >= FULL_SEEDS
            and {row.name for row in self.rows if row.runs} <= {*self.wanted}
            and {*FULL_SECONDS} <= {*self.seconds}
        )

    @property
    def running(self) -> tuple[Row, ...]:
        """Rows that make videos."""
        return tuple(row for row in self.rows if row.name in self.wanted and row.runs)

    @property
    def segment_blocks(self) -> int:
        return self.grid.blocks_for(SEGMENT_SECONDS, self.fps)

    def blocks(self, seconds: float) -> int:
        return self.grid.blocks_for(seconds, self.fps)

    def seed(self, prompt: int, seed: int) -> int:
        """Every prompt has noise of its own, the same for every row."""
        return 1000 * (seed + 1) + prompt

    def videos(self) -> Iterator[Video]:
        """Everything that has to be there for the report, prompt by prompt, so that a part of it compares all rows."""
        lengths = sorted({self.blocks(seconds) for seconds in self.seconds}, reverse=True)
        needed = [n for n in lengths if n == lengths[0] or n % self.segment_blocks]
        for seed in range(self.seeds):
            for number, prompt in enumerate(self.prompts):
                for row in self.running:
                    noise = self.seed(number, seed)
                    for blocks in needed:
                        yield Video("follow", row.name, row.memory, prompt, noise, blocks)
                    if row.recall and self.knows_visitor and not self.quick:
                        yield Video("recall", row.name, row.memory, prompt, noise, self.recall_blocks)

    @property
    def recall_blocks(self) -> int:
        """Blocks that a recall takes: what comes before the last call, and every visit after one."""
        blocks = self.blocks
        return (
            blocks(VISIT_BEGINS)
            + blocks(VISIT_SECONDS)
            + blocks(DELAYS[-1])
            + len(DELAYS) * blocks(BACK_SECONDS)
        )


def plan(
    model: VideoModel,
    *,
    rows: Sequence[str] | None = None,
    prompts: int | None = None,
    seeds: int | None = None,
    seconds: Sequence[float] | None = None,
    quick: bool = False,
) -> Suite:
    """What is to be made.

    Args:
        rows, prompts, seeds, seconds: None = all of the suite, or what `quick` has. A row that is the same memory as
            another one stands for that.
    Raises: UsageError if the model is not one of the demo world, or a value is not possible.
    """
    known = {word for caption in world.held_out_captions() for word in caption.split()}
    vocabulary = {*model.manifest.vocabulary}
    if not known <= vocabulary:
        raise UsageError(
            f"{model.name} does not know the words of the demo world, for example {min(known - vocabulary)!r}",
            hint="The suite takes the packaged demo, or a package that packforcing train demo-flow wrote.",
        )
    count = (QUICK_PROMPTS if quick else FULL_PROMPTS) if prompts is None else prompts
    captions = world.held_out_captions()
    if not 1 <= count <= len(captions):
        raise UsageError(
            f"--prompts {count}: must be 1 to {len(captions)}, the captions held out of training"
        )
    usual = QUICK_SECONDS if quick else FULL_SECONDS
    lengths = tuple(sorted({float(s) for s in (usual if seconds is None else seconds)}))
    for length in lengths:
        if not (math.isfinite(length) and 1 <= length <= MAX_SECONDS):
            raise UsageError(
                f"--seconds {length:g}: must be 1 to {MAX_SECONDS:g}", hint="For example --seconds 60,120."
            )
    grid, fps = resolve.grid_for(model, model.manifest.size), model.manifest.fps
    there = rows_for(model, num_blocks=max(grid.blocks_for(length, fps) for length in lengths))
    names = [row.name for row in there]
    wanted = tuple(rows if rows is not None else QUICK_ROWS if quick else names)
    for name in wanted:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            raise UsageError(
                f"there is no row {name!r}; the nearest is {near!r}", hint=f"Rows: {', '.join(names)}."
            )
    if seeds is not None and not 1 <= seeds <= 100:
        raise UsageError(f"--seeds {seeds}: must be 1 to 100")
    if not wanted:
        raise UsageError("--rows is empty", hint=f"Rows: {', '.join(names)}.")
    by_name = {row.name: row for row in there}
    wanted = tuple(dict.fromkeys(by_name[name].same_as or name for name in wanted))
    if not any(by_name[name].runs for name in wanted):
        row = by_name[wanted[0]]
        raise UsageError(f"no row is left to run: {model.name} cannot do {row.name}: {row.reason}")
    return Suite(
        rows=there,
        wanted=wanted,
        prompts=held_out_prompts(count),
        seeds=(QUICK_SEEDS if quick else FULL_SEEDS) if seeds is None else seeds,
        seconds=lengths,
        grid=grid,
        fps=fps,
        model=model_hash(model),
        model_name=model.name,
        knows_visitor=vocabulary >= VISITOR_WORDS,
        quick=quick,
    )


def held_out_prompts(count: int) -> tuple[str, ...]:
    """The first `count` of all held-out captions, in an order in which any number of them has every word alike often.

    The first ones are the same whatever the count, so a run with more prompts takes over what a smaller one made.
    """
    captions = world.held_out_captions()
    total = len(captions)
    stride = next(n for n in range(total // 2 + 2, 2 * total) if math.gcd(n, total) == 1)
    return tuple(captions[n * stride % total] for n in range(count))


def model_hash(model: VideoModel) -> str:
    """16 hex digits over all a video depends on beside a row: weights, schedule, the model's own memory, precision."""
    manifest = model.manifest
    facts = [
        sorted(model.hashes.items()),
        manifest.schedule.model_dump(mode="json"),
        manifest.cache.model_dump(mode="json"),
        manifest.trained_frames,
        str(model.dtype),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ what is measured


def segments_of(blocks: int, segment_blocks: int) -> list[int]:
    """Which segment each block belongs to; a rest shorter than half a segment belongs to the one before."""
    count = max(1, math.floor(blocks / segment_blocks + 0.5))
    return [min(block // segment_blocks, count - 1) for block in range(blocks)]


def follow(model: VideoModel, video: Video, *, segment_blocks: int) -> list[dict[str, Any]]:
    """Make one video and read every segment of it.

    Returns: for each segment: which words are right; outline (0..1), area (px) and speed (px a frame) of the subject;
        correlation and drift (levels of 255) of its background against the first segment's; count, whether there is one
        subject; motion, dynamic degree and jumps as `metrics` defines them.
    """
    memory = MemoryOptions(**video.memory)
    place = segments_of(video.blocks, segment_blocks)
    segments: list[dict[str, Any]] = []
    steps: list[Step] = []
    first: Tensor | None = None
    held: list[Tensor] = []
    before: Tensor | None = None
    for block in stream_generate(
        model, video.prompt, num_blocks=video.blocks, seed=video.seed, memory=memory
    ):
        held.append(block.frames)
        steps += steps_of(block.frames, before, len(steps))
        before = block.frames[-1]
        if block.index + 1 == video.blocks or place[block.index + 1] != place[block.index]:
            clip, held = torch.cat(held), []
            picture = detectors.background_picture(clip)
            first = picture if first is None else first
            read = read_segment(clip, video.prompt, picture, first)
            segments.append({**read, **moved(steps, sum(segment["steps"] for segment in segments))})
    return segments


@dataclass(frozen=True)
class Step:
    """From one latent frame's last picture to the next's.

    latent: number of the later one, which tells the time.  change: mean |RGB| difference, levels of 255.
    speed: `metrics.motion`; measured once a block, NaN elsewhere.
    """

    latent: int
    change: float
    speed: float


def steps_of(frames: Tensor, before: Tensor | None, done: int) -> list[Step]:
    """The steps of a block.

    The tiny codec shows most of a movement at the first of a latent frame's four pictures, so neighbouring pictures
    would compare codec phases.

    Args:
        frames: uint8 [T,H,W,3]: 4 pictures a latent frame, and one for the first of a video.
        before: the last picture before it; None at the beginning.  done: steps before it.
    """
    ends = [*range(0, len(frames), 4)] if before is None else [*range(3, len(frames), 4)]
    pictures = [picture.numpy() for picture in ([] if before is None else [before])]
    pictures += [frames[n].numpy() for n in ends]
    found = []
    for n, (a, b) in enumerate(pairwise(pictures), start=1):
        is_last = n == len(pictures) - 1
        speed = metrics.motion(a, b, STEP_SECONDS) if is_last else math.nan
        found.append(Step(done + n, float(np.abs(b.astype(np.float64) - a).mean()), speed))
    return found


STEP_SECONDS = 4 / world.FPS


def moved(steps: Sequence[Step], start: int) -> dict[str, Any]:
    """Motion, dynamic degree and jumps of the steps from `start` on.

    Jumps are looked for among all steps so far and counted from `start`: what comes later changes nothing, so that the
    beginning of a longer video has the numbers of the shorter one.
    """
    mine = steps[start:]
    times = np.array([step.latent * STEP_SECONDS for step in steps])
    sampled = [step for step in mine if not math.isnan(step.speed)]
    at = np.array([step.latent * STEP_SECONDS for step in sampled])
    speeds = np.array([step.speed for step in sampled])
    begin = float(times[start - 1]) if start else 0.0
    found = metrics.jumps(times, np.array([step.change for step in steps]))
    return {
        "steps": len(mine),
        "motion": round(float(speeds.mean()), 3) if len(speeds) else 0.0,
        "dynamic_degree": round(metrics.dynamic_degree(at, speeds), 1) if len(speeds) else 0.0,
        "jumps": sum(jump.seconds > begin for jump in found),
    }


def read_segment(clip: Tensor, prompt: str, picture: Tensor, first: Tensor) -> dict[str, Any]:
    """What the detectors say of some seconds [T,H,W,3].

    Args:
        picture, first: `background_picture` of them, and of the video's first segment.
    """
    seen = detectors.detect(clip)
    return {
        **detectors.score(seen, prompt),
        "count": detectors.count_subjects(clip) == 1,
        "moves": seen.direction != detectors.NONE,
        "speed": round(seen.speed, 3),
        "outline": round(seen.outline, 3),
        "area": round(seen.area),
        "background_correlation": round(detectors.background_correlation(first, picture), 4),
        "background_drift": round(detectors.background_drift(first, picture), 2),
    }


def recall(model: VideoModel, video: Video, *, grid: Grid, fps: int) -> dict[str, Any]:
    """Make the recalls of a prompt: one video up to the last call, and a branch of it for each delay.

    Returns: "first": what the detector saw in the first visit; for each delay "hidden": whether no visitor was seen
        while it was away, right before the call, and "again": what was seen after it.
    """

    def blocks(seconds: int) -> int:
        return grid.blocks_for(seconds, fps)

    come, visit, back, read = (blocks(s) for s in (VISIT_BEGINS, VISIT_SECONDS, BACK_SECONDS, READ_SECONDS))
    gone = come + visit
    combination = world.parse_caption(video.prompt)
    here, away = (world.caption_of(combination, visitor=is_here) for is_here in (True, False))
    calls = {gone + blocks(delay): delay for delay in DELAYS}
    last = max(calls)
    whole = encode_script(model, Script((away, here)), guided=resolve.schedule_for(model).guidance != 1.0)

    def story(call: int | None) -> Story:
        starts = (0, come, gone) if call is None else (0, come, gone, call)
        prompts = tuple(whole.prompts[n % 2] for n in range(len(starts)))
        return Story(Script(tuple(p.text for p in prompts), starts, (0,) * len(starts)), prompts)

    def stream(call: int | None, end: int, state: Mapping[str, Tensor] | None = None) -> Iterator[Block]:
        memory = MemoryOptions(**video.memory)
        return stream_generate(
            model, story(call), num_blocks=end, seed=video.seed, memory=memory, state=state
        )

    newest: list[Tensor] = []  # of the newest `read` blocks
    result: dict[str, Any] = {"delays": {}}
    for block in stream(None, last):
        newest = [*newest, block.frames][-read:]
        done = block.index + 1
        if done == gone:
            result["first"] = see_visitor(torch.cat(newest))
        if done in calls:
            hidden = torch.cat(newest[-min(read, blocks(calls[done])) :])
            again = [b.frames for b in stream(done, done + back, block.state())]
            result["delays"][str(calls[done])] = {
                "hidden": not see_visitor(hidden)["present"],
                "again": see_visitor(torch.cat(again[-read:])),
            }
    return result


def see_visitor(clip: Tensor) -> dict[str, Any]:
    """Whether a visitor is there, and its look."""
    seen = detectors.detect_visitor(clip)
    return {"present": bool(seen.present), "colour": seen.colour, "shape": seen.shape}


def make(model: VideoModel, suite: Suite, video: Video) -> dict[str, Any]:
    """Make and measure one video.

    Returns: its line. A video that broke down (not finite) has "failed" instead of measures: it is a result, too.
    """
    started = time.perf_counter()
    try:
        if video.kind == "recall":
            measured = recall(model, video, grid=suite.grid, fps=suite.fps)
        else:
            measured = {"segments": follow(model, video, segment_blocks=suite.segment_blocks)}
    except GenerationError as error:
        measured = {"failed": error.message}
    return {**line_key(suite, video), **measured, "wall_seconds": round(time.perf_counter() - started, 2)}


# ---------------------------------------------------------------------------------------------------- the journal


def line_key(suite: Suite, video: Video) -> dict[str, Any]:
    """What a line is of."""
    return {
        "schema": SCHEMA,
        "kind": video.kind,
        "row": video.row,
        "memory": dict(video.memory),
        "prompt": video.prompt,
        "seed": video.seed,
        "blocks": video.blocks,
        "model": suite.model,
        "version": __version__,
    }


class Journal:
    """`videos.jsonl`: a line for every video that is done. One process writes it.

    lines:   of this suite's model and version.
    dropped: sentences about what was left out.
    """

    def __init__(self, path: Path, suite: Suite) -> None:
        """Raises: UsageError if the file is not one of the suite's."""
        self.path, self.lines = path, list[dict[str, Any]]()
        self._by_key: dict[str, list[dict[str, Any]]] = {}
        self.dropped: list[str] = []
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            self.dropped.append(f"the last line of {path} was cut off and is made again")
        other = 0
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                mine = entry["schema"], entry["model"], entry["version"]
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(
                    f"{path}, line {number}, is not a line of the suite", hint="Use another --out."
                ) from error
            if mine == (SCHEMA, suite.model, __version__):
                self._keep(entry)
            else:
                other += 1
        if other:
            self.dropped.append(f"{other} videos in {path} are of another model or version and do not count")
        self._size = len(whole)

    def find(self, suite: Suite, video: Video) -> dict[str, Any] | None:
        """The line of a video, or of a longer one that begins with it."""
        for line in self._by_key.get(_without_length(line_key(suite, video)), ()):
            longer = line["blocks"] > video.blocks and video.blocks % suite.segment_blocks == 0
            if line["blocks"] == video.blocks or (video.kind == "follow" and longer):
                return line
        return None

    def _keep(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        self._by_key.setdefault(_without_length(line), []).append(line)

    def add(self, line: dict[str, Any]) -> None:
        """Append a line, whole or not at all. Raises: DiskFullError, or PackforcingError."""
        data = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | durable.BINARY, 0o666)
            try:
                os.ftruncate(fd, self._size)
                durable.append(fd, data, size_bytes=self._size, sync=True)
            finally:
                os.close(fd)
        except OSError as error:
            hint = "The same command goes on where it stopped."
            raise durable.failure(error, self.path, kind=PackforcingError, hint=hint) from error
        self._size += len(data)
        self._keep(line)


def _without_length(line: Mapping[str, Any]) -> str:
    """What a line is of, its number of blocks left out, as text."""
    return json.dumps(
        [line.get(name) for name in ("kind", "row", "memory", "prompt", "seed")], sort_keys=True
    )


def to_do(suite: Suite, journal: Journal) -> list[Video]:
    """Videos that have no line yet."""
    return [video for video in suite.videos() if journal.find(suite, video) is None]


# ------------------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class Pace:
    """Seconds of a block: fixed + per_token * tokens attended, and what compressing and reading a block take."""

    fixed: float
    per_token: float
    compress: float
    read: float

    def seconds(self, layout: Layout, blocks: range) -> float:
        """Of some blocks of a video with this memory."""
        tokens = sum(layout.tokens(block).active for block in blocks)
        each = self.fixed + self.read + (self.compress if layout.top_k else 0.0)
        return len(blocks) * each + self.per_token * tokens


def calibrate(model: VideoModel, suite: Suite) -> Pace:
    """Measure a short run: blocks of a growing full memory, a few of the reference, and the detectors."""
    prompt, seconds, tokens = suite.prompts[0], list[float](), list[int]()
    layouts = {
        policy: resolve.layout_for(
            model, memory_of(model, {"policy": policy}), suite.grid, num_blocks=CALIBRATION_BLOCKS
        )
        for policy in ("full", "packforcing")
    }
    frames, compress = [], [0.0]
    for policy, count in (("full", CALIBRATION_BLOCKS), ("packforcing", CALIBRATION_BLOCKS // 2)):
        memory = MemoryOptions(policy=policy)
        for block in stream_generate(model, prompt, num_blocks=count, seed=0, memory=memory):
            if policy == "full":
                frames.append(block.frames)
                if block.index:  # the first one warms everything up
                    seconds.append(sum(block.seconds.values()))
                    tokens.append(layouts[policy].tokens(block.index).active)
            else:
                compress.append(block.seconds["compress"])
    started = time.perf_counter()
    clip = torch.cat(frames)
    read_segment(clip, prompt, picture := detectors.background_picture(clip), picture)
    read = (time.perf_counter() - started) / len(frames)
    middle, usual = sum(tokens) / len(tokens), sum(seconds) / len(seconds)
    spread = sum((n - middle) ** 2 for n in tokens)
    slope = sum((n - middle) * (s - usual) for n, s in zip(tokens, seconds, strict=True)) / spread
    slope = max(0.0, slope)
    return Pace(max(0.0, usual - slope * middle), slope, max(compress), read)


def estimate(model: VideoModel, suite: Suite, videos: Iterable[Video], pace: Pace) -> list[float]:
    """Seconds each video takes in one process."""
    known: dict[tuple[str, str, int], float] = {}
    found = []
    for video in videos:
        same = (video.kind, video.row, video.blocks)
        if same not in known:
            memory = memory_of(model, video.memory)
            layout = resolve.layout_for(model, memory, suite.grid, num_blocks=video.blocks)
            known[same] = pace.seconds(layout, range(video.blocks))
        found.append(known[same])
    return found


# ----------------------------------------------------------------------------------------------------- making


def run(
    model: VideoModel, source: str, suite: Suite, videos: Sequence[Video], *, jobs: int
) -> Iterator[dict[str, Any]]:
    """Make videos, in this process or in several.

    Args:
        source: what `load_model` takes, for other processes.
    Yields: the line of each as it is done, in any order.
    Raises: PackforcingError as `make`; GenerationError if a process ended by itself.
    """
    if jobs == 1:
        for video in videos:
            yield make(model, suite, video)
        return
    yield from _run_beside(source, str(model.device), suite, videos, jobs=jobs)


def _run_beside(
    source: str, device: str, suite: Suite, videos: Sequence[Video], *, jobs: int
) -> Iterator[dict[str, Any]]:
    """`run` in processes of their own, each with its share of the threads.

    A worker gets one video after the other through its pipe. It ends with this process, however that ends.
    """
    threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(videos))
    workers: dict[Connection, SpawnProcess] = {}
    try:
        for _ in range(min(jobs, len(videos))):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(theirs, source, device, suite, threads), daemon=True)
            worker.start()
            theirs.close()
            workers[ours] = worker
            ours.send(waiting.pop())
        while workers:
            for ready in wait([*workers]):
                connection = cast(Connection, ready)
                try:
                    answer = connection.recv()
                except (EOFError, ConnectionResetError) as error:
                    raise GenerationError(
                        f"a process of the suite ended by itself (exit code {_code(workers[connection])})",
                        hint="The same command goes on where it stopped; with fewer --jobs it needs less memory.",
                    ) from error
                if isinstance(answer, PackforcingError):
                    raise answer
                if waiting:
                    connection.send(waiting.pop())
                else:
                    connection.close()
                    workers.pop(connection).join()
                yield answer
    finally:
        for connection, worker in workers.items():
            connection.close()
            worker.terminate()
            worker.join()


def _code(worker: SpawnProcess) -> int | None:
    worker.join(5)
    return worker.exitcode


def _work(connection: Connection, source: str, device: str, suite: Suite, threads: int) -> None:
    """A worker: load the model, then make what comes through the pipe until it is closed."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        try:
            model = load_model(source, device=device)
            if model_hash(model) != suite.model:
                raise WeightsError(f"{source} changed while the suite ran", hint="Start it again.")
            while True:
                connection.send(make(model, suite, connection.recv()))
        except PackforcingError as error:
            connection.send(error)


def _end_with_parent() -> None:
    """End a worker at once when the process that started it is gone, in the middle of a video, too."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def record_in_package(folder: Path, scores: Mapping[str, Any]) -> None:
    """Put measured figures into the manifest of a package, as `provenance.scores`; nothing else in it changes."""
    manifest = read_manifest(folder)
    changed = manifest.model_copy(update={"provenance": {**manifest.provenance, "scores": dict(scores)}})
    durable.write(folder / MANIFEST, changed.to_json().encode())
