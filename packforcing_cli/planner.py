"""plan(request, machine) -> Plan: what a video will be and cost, before anything is loaded.

Size, blocks, tokens and cache bytes are exact: they are layout.py's, the same the live cache has. Weights follow from
the model's shape. Working memory, peak and disk are estimates, and are called so. Knows no tensors: who has an
accelerator passes its free memory in a Machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from packforcing_cli import catalog
from packforcing_cli.catalog import ModelFacts
from packforcing_cli.config import MemoryOptions, PlanRequest
from packforcing_cli.errors import DiskFullError, MemoryFitError
from packforcing_cli.layout import TEMPORAL_STRIDE, Layout, MemoryBytes, TokenCount
from packforcing_cli.machine import Machine, host_machine
from packforcing_cli.timeline import Script

__all__ = ["Machine", "Plan", "host_machine", "plan"]

SCHEMA = 1
GROWTH_SECONDS = (5, 10, 30, 60, 120, 300, 600, 1800, 3600)

# Estimates. Widths of the activations alive at once in one transformer layer, in units of the model's width.
LAYER_WIDTHS = 12
# Channels of the widest feature map of a VAE decoder at full resolution, in one group of TEMPORAL_STRIDE frames (Wan).
DECODER_CHANNELS = 96
DECODER_MAPS = 4
# H.264 at the default quality; the part file and the finished file exist together for a moment.
VIDEO_BITS_PER_PIXEL = 0.15
VIDEO_COPIES = 2
HEADROOM = 0.95  # share of the free memory a plan may take


@dataclass(frozen=True)
class GrowthPoint:
    """Cache bytes after some time: everything kept, a window of the same size, and this plan's memory."""

    seconds: float
    blocks: int
    full_bytes: int
    window_bytes: int
    stored_bytes: int
    bank_bytes: int


@dataclass(frozen=True)
class SlotPlan:
    """Slots of the last block against the trained range.

    mid_span:       slots of one active compressed block.
    total:          slots taken in all.
    max_distance:   largest slot distance of a query.
    trained_frames: latent frames seen in training; distances stayed below it.
    """

    mid_span: Fraction
    total: Fraction
    max_distance: Fraction
    trained_frames: int

    @property
    def within_trained_range(self) -> bool:
        return self.total <= self.trained_frames


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the weights. The text encoder leaves the accelerator before the first block."""

    transformer: int
    text_encoder: int
    vae: int


@dataclass(frozen=True)
class Plan:
    """What a video will be and cost.

    frames, blocks, latent_frames: of the video as it will be; `seconds` was asked for, `exact_seconds` is made.
    script:             the timeline in blocks; its prompts say "" for the first one when it was not given.
    tokens:             at the last block.
    memory:             bytes in use at the last block.
    capacity:           bytes of the preallocated cache.
    full_history_bytes: keys and values of everything that was asked for, at full resolution, nothing dropped.
    growth:             the same over time.
    options:            the memory options, with the model's own where nothing was set.
    peak_bytes:         estimate of the most memory at one time: weights, cache, working memory.
    disk_bytes:         estimate of the disk space while the video is made.
    fits:               whether peak and disk fit the machine; True when no machine was given.
    suggestion:         the option that would make it fit, empty if none is needed or known.
    warnings:           what is allowed but unlikely to be wanted.
    """

    model: ModelFacts
    size: tuple[int, int]
    fps: int
    frames_per_block: int
    dtype: str
    seconds: float
    exact_seconds: float
    frames: int
    blocks: int
    latent_frames: int
    options: MemoryOptions
    layout: Layout
    script: Script
    tokens: TokenCount
    memory: MemoryBytes
    capacity: MemoryBytes
    full_history_bytes: int
    slots: SlotPlan
    growth: tuple[GrowthPoint, ...]
    weights: WeightBytes
    working_bytes: int
    peak_bytes: int
    disk_bytes: int
    machine: Machine | None
    fits: bool
    suggestion: str
    warnings: tuple[str, ...]

    def require_fit(self) -> None:
        """Raises: MemoryFitError or DiskFullError, naming the option that would fit, if the plan does not fit."""
        if self.fits or self.machine is None:
            return
        hint = f"Try {self.suggestion}." if self.suggestion else "Use a smaller --size, or another machine."
        if not _memory_fits(self.peak_bytes, self.machine):
            raise MemoryFitError(
                f"about {_gb(self.peak_bytes)} of memory are needed and {self.machine.device} has"
                f" {_gb(self.machine.memory_bytes)} free",
                hint=hint,
            )
        assert self.machine.disk_free_bytes is not None
        raise DiskFullError(
            f"about {_gb(self.disk_bytes)} of disk are needed and {_gb(self.machine.disk_free_bytes)} are free",
            hint="Free some space, choose another --output, or make a shorter video.",
        )

    def to_json(self) -> dict[str, Any]:
        """The plan as plain numbers and strings, in the frozen shape of `inspect-cache --json`."""
        bytes_per_token = self.layout.grid.bytes_per_token
        tokens = self.tokens
        return {
            "schema": SCHEMA,
            "model": self.model.name,
            "size": list(self.size),
            "fps": self.fps,
            "dtype": self.dtype,
            "seconds": self.seconds,
            "exact_seconds": self.exact_seconds,
            "frames": self.frames,
            "blocks": self.blocks,
            "frames_per_block": self.frames_per_block,
            "latent_frames": self.latent_frames,
            "memory": {
                **self.options.model_dump(),
                "mid_span": str(self.layout.mid_span),
            },
            "tokens": {
                "block": self.layout.grid.block_tokens,
                "compressed_block": self.layout.grid.compressed_tokens,
                "sink": tokens.sink,
                "mid": tokens.mid,
                "recent": tokens.recent,
                "current": tokens.current,
                "active": tokens.active,
            },
            "bytes_per_token": bytes_per_token,
            "full_history_bytes": self.full_history_bytes,
            "stored_bytes": self.memory.stored,
            "bytes": {**asdict(self.memory), "live": self.memory.live},
            "capacity_bytes": {**asdict(self.capacity), "live": self.capacity.live},
            "partition_bytes": {
                name: getattr(tokens, name) * bytes_per_token for name in ("sink", "mid", "recent", "current")
            },
            "slots": {
                "mid_span": float(self.slots.mid_span),
                "total": float(self.slots.total),
                "max_distance": float(self.slots.max_distance),
                "trained_frames": self.slots.trained_frames,
                "within_trained_range": self.slots.within_trained_range,
            },
            "growth": [asdict(point) for point in self.growth],
            "weight_bytes": asdict(self.weights),
            "working_bytes_estimate": self.working_bytes,
            "peak_bytes_estimate": self.peak_bytes,
            "disk_bytes_estimate": self.disk_bytes,
            "fits": self.fits,
            "suggestion": self.suggestion,
            "warnings": list(self.warnings),
        }


def plan(request: PlanRequest, machine: Machine | None = None, *, facts: ModelFacts | None = None) -> Plan:
    """Work out a request.

    Args:
        machine: what there is; None = do not ask whether it fits.
        facts:   of the model, when it is a folder; default: the catalog's.
    Raises: UsageError or LayoutError if the request describes no possible video.
    """
    facts = facts or catalog.of(request.model)
    own_memory = request.memory.with_defaults(facts.cache)
    parts = _Parts(request.model_copy(update={"memory": own_memory}), facts)
    peak, disk = parts.peak_bytes, parts.disk_bytes
    fits = machine is None or (_memory_fits(peak, machine) and _disk_fits(disk, machine))
    grid, last = parts.layout.grid, parts.layout.view(parts.blocks - 1)
    slots = parts.layout.slots(last)
    slot_plan = SlotPlan(
        parts.layout.span(last), slots.total, slots.max_distance, parts.layout.trained_frames
    )
    return Plan(
        model=facts,
        size=parts.size,
        fps=facts.fps,
        frames_per_block=grid.frames_per_block,
        dtype="bf16" if request.dtype == "auto" else request.dtype,
        seconds=request.seconds,
        exact_seconds=grid.frames_for(parts.blocks) / facts.fps,
        frames=grid.frames_for(parts.blocks),
        blocks=parts.blocks,
        latent_frames=parts.blocks * grid.frames_per_block,
        options=own_memory,
        layout=parts.layout,
        script=parts.script,
        tokens=parts.layout.tokens(last),
        memory=parts.layout.bytes(last),
        capacity=parts.layout.capacity_bytes(parts.blocks),
        full_history_bytes=_asked_latent_frames(request.seconds, facts.fps)
        * grid.tokens_per_frame
        * grid.bytes_per_token,
        slots=slot_plan,
        growth=_growth(parts),
        weights=parts.weights,
        working_bytes=parts.working_bytes,
        peak_bytes=peak,
        disk_bytes=disk,
        machine=machine,
        fits=fits,
        suggestion="" if fits or machine is None else _suggestion(parts, machine),
        warnings=_warnings(parts, slot_plan),
    )


class _Parts:
    """The pieces of a plan that a suggestion has to work out again with other numbers."""

    def __init__(self, request: PlanRequest, facts: ModelFacts) -> None:
        self.request, self.facts = request, facts
        self.size = request.size or facts.default_size
        frames_per_block = request.frames_per_block or facts.frames_per_block
        default_span = facts.span_for(frames_per_block)
        grid = facts.grid(self.size, frames_per_block, dtype_bytes=request.dtype_bytes)
        self.blocks = grid.blocks_for(request.seconds, facts.fps)
        layout = request.memory.layout(
            grid,
            num_blocks=self.blocks,
            trained_frames=facts.trained_for(frames_per_block),
            default_span=default_span,
        )
        prompt = getattr(request, "prompt", "")
        self.script = request.timeline.script(prompt, grid, fps=facts.fps, num_blocks=self.blocks)
        self.layout = replace(layout, cuts=self.script.cuts, pins=self.script.pins)

    @property
    def weights(self) -> WeightBytes:
        per = self.request.dtype_bytes
        facts = self.facts
        return WeightBytes(facts.transformer_params * per, facts.text_params * per, facts.vae_params * per)

    @property
    def working_bytes(self) -> int:
        """Estimate: activations of one layer over a block, cross-attention keys and values, the VAE's decoding."""
        facts, per = self.facts, self.request.dtype_bytes
        layer = self.layout.grid.block_tokens * (LAYER_WIDTHS * facts.dim + facts.ffn_dim) * per
        text = facts.layers * 2 * facts.text_length * facts.dim * per
        width, height = self.size
        decoder = width * height * TEMPORAL_STRIDE * DECODER_CHANNELS * DECODER_MAPS * per
        return text + max(layer, decoder)

    @property
    def peak_bytes(self) -> int:
        weights = self.weights
        running = weights.transformer + weights.vae + self.working_bytes
        running += self.layout.capacity_bytes(self.blocks).live
        return max(weights.text_encoder, running)

    @property
    def disk_bytes(self) -> int:
        width, height = self.size
        pixels = self.layout.grid.frames_for(self.blocks) * width * height
        return math.ceil(pixels * VIDEO_BITS_PER_PIXEL / 8) * VIDEO_COPIES

    def changed(self, **values: Any) -> _Parts:
        """The same request with other values; the memory options among them go where they belong."""
        memory = {name: values.pop(name) for name in tuple(values) if name in MemoryOptions.model_fields}
        new_memory = MemoryOptions(**{**self.request.memory.model_dump(exclude_unset=True), **memory})
        kept = {name: getattr(self.request, name) for name in PlanRequest.model_fields}
        return _Parts(PlanRequest(**{**kept, "memory": new_memory, **values}), self.facts)


def _suggestion(parts: _Parts, machine: Machine) -> str:
    """The mildest change that fits: another policy than full, a smaller bank, then a smaller size; empty if none."""
    if not _disk_fits(parts.disk_bytes, machine):
        return ""
    memory = parts.request.memory
    tries: list[tuple[str, dict[str, Any]]] = []
    if memory.policy == "full":
        tries.append(("--policy packforcing", {"policy": "packforcing"}))
    else:
        kept = len(parts.layout.view(parts.blocks).mid)
        tries += [
            (f"--bank {n}", {"bank": n})
            for n in _smaller_powers_of_two(kept)
            if n >= max(1, parts.layout.top_k)
        ]
    width, height = parts.size
    multiple = parts.facts.pixel_multiple
    for share in (3 / 4, 1 / 2, 1 / 4):
        size = tuple(max(64, round(side * share / multiple) * multiple) for side in (width, height))
        if size != parts.size:
            tries.append((f"--size {size[0]}x{size[1]}", {"size": size}))
    for text, change in tries:
        if _memory_fits(parts.changed(**change).peak_bytes, machine):
            return text
    return ""


def _warnings(parts: _Parts, slots: SlotPlan) -> tuple[str, ...]:
    found = []
    layout = parts.layout
    if not slots.within_trained_range:
        step = "use --mid-span fit or a smaller --top-k" if layout.top_k else "use --policy packforcing"
        found.append(
            f"the context spans {_number(slots.total)} slots and the model was trained on {slots.trained_frames};"
            f" {step}"
        )
    if layout.top_k and layout.bank is not None and layout.bank <= layout.top_k < parts.blocks:
        found.append(
            f"a bank of {layout.bank} blocks leaves nothing to select from; use --bank above --top-k"
        )
    pins = len(layout.mid_pins)
    if pins and parts.blocks > layout.top_k + layout.sink_blocks:
        found.append(
            f"{pins} pinned blocks take {pins} of the {layout.top_k} places for recalled blocks;"
            f" {layout.top_k - pins} are left to be chosen"
        )
    if layout.cuts and not layout.recent_blocks:
        found.append("[cut] changes nothing here: this memory has no recent blocks")
    return tuple(found)


def _growth(parts: _Parts) -> tuple[GrowthPoint, ...]:
    grid, layout = parts.layout.grid, parts.layout
    memory = parts.request.memory
    window = (memory.sink_blocks + memory.recent_blocks) * grid.block_tokens
    points = []
    asked = parts.request.seconds
    for seconds in (*(s for s in GROWTH_SECONDS if s < asked), asked):
        blocks = grid.blocks_for(seconds, parts.facts.fps)
        used = layout.bytes(layout.view(blocks))
        history = blocks * grid.block_tokens
        points.append(
            GrowthPoint(
                seconds=float(seconds),
                blocks=blocks,
                full_bytes=history * grid.bytes_per_token,
                window_bytes=min(history, window) * grid.bytes_per_token,
                stored_bytes=used.stored,
                bank_bytes=used.bank,
            )
        )
    return tuple(points)


def _asked_latent_frames(seconds: float, fps: int) -> int:
    """Latent frames of the asked length, to the nearest; 120 s at 16 fps are 480, as the paper counts."""
    return max(1, math.floor(Fraction(seconds) * fps / TEMPORAL_STRIDE + Fraction(1, 2)))


def _smaller_powers_of_two(number: int) -> Sequence[int]:
    """Powers of two below a number, the largest first."""
    return [1 << bit for bit in reversed(range(max(0, number - 1).bit_length()))]


def _memory_fits(peak: int, machine: Machine) -> bool:
    return peak <= machine.memory_bytes * HEADROOM


def _disk_fits(needed: int, machine: Machine) -> bool:
    return machine.disk_free_bytes is None or needed <= machine.disk_free_bytes


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _number(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else f"{float(value):.2f}"
