"""plan(request, machine) -> Plan: what a video will be and cost, before anything is loaded.

Size, blocks, tokens and cache bytes are exact: they are layout.py's, the same the live cache has. Weights follow from
the model's shape. Working memory, peak and disk are estimates, and are called so. Knows no tensors: who has an
accelerator passes its free memory in a Machine.

Memory is predicted by stage; what each one holds where the model runs:

    text      text encoder                                        freed before the next stage
    denoise   transformer, VAE and its streams, cache, text K/V   + activations of one layer, K/V of the clean block
    decode    the same                                            + the decoder's feature maps

Recorded passes (--cuda-graphs) hold their memory in the last two: what they return, what they work in, their own text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from packforcing_cli import catalog
from packforcing_cli.catalog import ModelFacts
from packforcing_cli.config import MemoryOptions, PlanRequest, parse_layers
from packforcing_cli.errors import DiskFullError, MemoryFitError, UsageError
from packforcing_cli.layout import TEMPORAL_STRIDE, Layout, MemoryBytes, TokenCount
from packforcing_cli.machine import Machine, host_machine
from packforcing_cli.timeline import Script

__all__ = ["Machine", "Plan", "host_machine", "plan"]

SCHEMA = 1
GROWTH_SECONDS = (5, 10, 30, 60, 120, 300, 600, 1800, 3600)

# Working memory in numbers of the model's dtype. Measured by running the modules at full size on the meta device and
# counting live tensors (tests/test_planner.py does it again).
LAYER_WIDTHS = (
    12  # of a token in one transformer layer, in units of the model's width; beside the FFN's width
)
# A pixel of one frame: what the decoder keeps between blocks, and the most it has at one time, that included.
DECODER_STATE = {"wan": 2_365, "tiny": 84}
DECODER_PEAK = {"wan": 7_464, "tiny": 2_790}
DECODER_MORE = 2_100  # for each further latent frame that the Wan VAE decodes at a time
TEXT_WIDTHS = 40  # of a text token in the encoder, in units of its width
TINY_VAE_PARAMS = 11_315_539  # taew2_1
MOST_STORED_BYTES = 4  # of a number in a file: fp32
ROW_BYTES = 5  # of a quantized matrix: a float32 scale and an 8-bit zero point
# An accelerator's host process: interpreter, libraries, driver, frames on their way to the video encoder. A guess.
HOST_BYTES = 2 * 10**9
# H.264 at the default quality; the part file and the finished file exist together for a moment.
VIDEO_BITS_PER_PIXEL = 0.15
VIDEO_COPIES = 2
# A run folder: a block's file beside its numbers (header, the rest of a disk block), and its line of figures.
BLOCK_FILE_BYTES = 4_500
ID_BYTES = 8  # of a recalled block, for each layer
TRACE_BYTES = 3_000
TRACE_ID_BYTES, TRACE_SCORE_BYTES = 6, 14  # an id and a score in JSON
SNAPSHOT_COPIES = 2  # the old one and the one that takes its place
HEADROOM = 0.95  # share of the free memory a plan may take
STAGE_TEXT = {
    "text": "to encode the prompt",
    "denoise": "to denoise a block",
    "decode": "to decode a block",
}


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
    """Bytes of the weights, quantized as asked. The text encoder is freed before the first block is made."""

    transformer: int
    text_encoder: int
    vae: int
    compressor: int


@dataclass(frozen=True)
class StageMemory:
    """Estimate of the most memory of one stage.

    device_bytes: where the model runs.
    host_bytes:   beside it, in host memory; 0 when the model runs there.
    """

    name: str
    device_bytes: int
    host_bytes: int


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
    bank_device:        where the bank is: device or host.
    stages:             estimate of the memory of text, denoise and decode.
    peak_bytes:         the most of them where the model runs.
    working_bytes:      the part of it that is neither weights nor cache.
    disk_bytes:         estimate of the disk space while the video is made, the run folder included.
    run_bytes:          the run folder's part of it; 0 when none is kept.
    fits:               whether peak and disk fit the machine; True when no machine was given.
    change:             the smallest change of the request that would make it fit; empty if none is needed or known.
    suggestion:         the same as options.
    loading:            what is done with the model while the text encoder works: "beside" = it is loaded, since both
                        together take no more than a later stage; "read" = its files are read into the system's file
                        cache, in host memory; "after" = nothing.
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
    bank_device: str
    layout: Layout
    script: Script
    tokens: TokenCount
    memory: MemoryBytes
    capacity: MemoryBytes
    full_history_bytes: int
    slots: SlotPlan
    growth: tuple[GrowthPoint, ...]
    weights: WeightBytes
    quantize: str
    quantize_text: str
    offload: str
    vae: str
    working_bytes: int
    stages: tuple[StageMemory, ...]
    peak_bytes: int
    disk_bytes: int
    run_bytes: int
    machine: Machine | None
    fits: bool
    change: Mapping[str, Any]
    warnings: tuple[str, ...]
    loading: str = "after"

    @property
    def suggestion(self) -> str:
        return " ".join(_option(name.replace("_", "-"), value) for name, value in self.change.items())

    def require_fit(self) -> None:
        """Raises: MemoryFitError or DiskFullError, naming the option that would fit, if the plan does not fit."""
        if self.fits or self.machine is None:
            return
        hint = f"Try {self.suggestion}." if self.suggestion else "Use a smaller --size, or another machine."
        worst = max(self.stages, key=lambda stage: stage.device_bytes)
        if not _memory_fits(worst.device_bytes, self.machine.memory_bytes):
            raise MemoryFitError(
                f"about {gb(worst.device_bytes)} of memory are needed and {self.machine.device} has"
                f" {gb(self.machine.memory_bytes)} free; the most is {STAGE_TEXT[worst.name]}",
                hint=hint,
            )
        worst = max(self.stages, key=lambda stage: stage.host_bytes)
        free = self.machine.host_bytes
        if free is not None and not _memory_fits(worst.host_bytes, free):
            raise MemoryFitError(
                f"about {gb(worst.host_bytes)} of host memory are needed and {gb(free)} are free; the most is"
                f" {STAGE_TEXT[worst.name]}",
                hint=hint,
            )
        assert self.machine.disk_free_bytes is not None
        raise DiskFullError(
            f"about {gb(self.disk_bytes)} of disk are needed and {gb(self.machine.disk_free_bytes)} are free",
            hint=f"Free some space, choose another --output, or make a shorter video.{self._without_run}",
        )

    @property
    def _without_run(self) -> str:
        """What to do where the video alone would fit."""
        assert self.machine is not None
        alone = _disk_fits(self.disk_bytes - self.run_bytes, self.machine)
        return f" {gb(self.run_bytes)} of it are the run folder: --no-run keeps none." if alone else ""

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
                "bank": self.layout.bank,
                "bank_device": self.bank_device,
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
            "quantize": self.quantize,
            "quantize_text": self.quantize_text,
            "offload": self.offload,
            "vae": self.vae,
            "stages": [asdict(stage) for stage in self.stages],
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
    # "auto", when nobody has looked at the machine, is what it is without a GPU.
    facts = facts or catalog.of("demo" if request.model == "auto" else request.model)
    own_memory = request.memory.with_defaults(facts.cache)
    parts = _Parts(request.model_copy(update={"memory": own_memory}), facts, machine)
    fits = machine is None or (parts.fits_memory() and _disk_fits(parts.disk_bytes, machine))
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
        bank_device=parts.bank_device,
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
        quantize=request.quantize,
        quantize_text=request.quantize_text,
        offload=request.offload,
        vae=parts.vae,
        working_bytes=max(
            0, parts.peak_bytes - parts.resident_bytes - parts.cache_bytes(parts.bank_device)[0]
        ),
        stages=parts.stages,
        peak_bytes=parts.peak_bytes,
        disk_bytes=parts.disk_bytes,
        run_bytes=parts.run_bytes,
        machine=machine,
        fits=fits,
        change={} if fits or machine is None else _smallest_change(parts, machine),
        warnings=_warnings(parts, slot_plan),
        loading=parts.loading,
    )


class _Parts:
    """The pieces of a plan that a suggestion has to work out again with other numbers."""

    def __init__(self, request: PlanRequest, facts: ModelFacts, machine: Machine | None) -> None:
        self.request, self.facts, self.machine = request, facts, machine
        self.on_gpu = machine is not None and machine.host_bytes is not None
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
        source = request.source
        self.late = Fraction(0 if source is None else source.shown(grid).late, facts.fps)
        script = request.timeline.script(
            prompt,
            grid,
            fps=facts.fps,
            num_blocks=self.blocks,
            start=0 if source is None else source.blocks,
            late=self.late,
        )
        stills = range(len(getattr(request, "pin_images", ())))
        self.script = replace(script, pins=script.pins | {*stills})
        self.layout = replace(layout, cuts=self.script.cuts, pins=self.script.pins)

    @property
    def vae(self) -> str:
        """Kind of the VAE."""
        vae = self.request.vae
        if vae is None:
            return self.facts.codec
        return vae if vae in DECODER_PEAK else catalog.vae_kind(vae)

    @property
    def decoder_bytes(self) -> int:
        """What the decoder works in, beside what it keeps between blocks.

        Raises: UsageError if latent frames are to be decoded in portions by a VAE that takes whole blocks.
        """
        kind, request = self.vae, self.request
        catalog.check_vae_latents(kind, request.vae_latents)
        numbers = DECODER_PEAK[kind] - DECODER_STATE[kind]
        numbers += DECODER_MORE * (min(request.vae_latents, self.layout.grid.frames_per_block) - 1)
        if kind == "wan" and getattr(request, "compile", False):
            numbers += DECODER_STATE[kind]  # compiled code keeps what it was given until it is through
        width, height = self.size
        return width * height * numbers * request.dtype_bytes

    @property
    def weights(self) -> WeightBytes:
        facts, per = self.facts, self.request.dtype_bytes
        text = facts.text_params * per if self.encodes_text else 0
        if text and self.request.quantize_text != "none":
            text -= (facts.text_params - facts.text_embedding_params) * (per - 1)
        vae = facts.vae_params if self.vae == facts.codec else TINY_VAE_PARAMS
        others = facts.transformer_params - facts.layers * facts.layer_params
        return WeightBytes(
            transformer=others * per + self.layers_bytes,
            text_encoder=text,
            vae=vae * per,
            compressor=facts.compressor_params * per,
        )

    @property
    def encodes_text(self) -> bool:
        """Whether a text encoder is loaded: embeddings from a file need none."""
        return getattr(self.request, "embeddings", None) is None

    @property
    def layer_bytes(self) -> int:
        """Weights of one transformer layer, the largest."""
        size = self.facts.layer_params * self.request.dtype_bytes
        is_small = self.request.quantize != "none" and not self.whole_layers
        return size - self.saved_bytes if is_small else size

    @property
    def layers_bytes(self) -> int:
        """Weights of all transformer layers."""
        facts = self.facts
        size = facts.layers * facts.layer_params * self.request.dtype_bytes
        small = facts.layers - len(self.whole_layers) if self.request.quantize != "none" else 0
        return size - small * self.saved_bytes

    @property
    def saved_bytes(self) -> int:
        """What a layer is smaller when it is quantized."""
        per = self.request.dtype_bytes
        return sum(rows * cols * (per - 1) - rows * ROW_BYTES for rows, cols in self.facts.layer_matrices)

    @property
    def whole_layers(self) -> tuple[int, ...]:
        """Layers that are not quantized. Raises: UsageError for one the model does not have."""
        layers = parse_layers(self.request.quantize_skip)
        if layers and layers[-1] >= self.facts.layers:
            raise UsageError(
                f"--quantize-skip: {self.facts.name} has no layer {layers[-1]}",
                hint=f"Its layers are 0 to {self.facts.layers - 1}.",
            )
        return layers

    @property
    def resident_bytes(self) -> int:
        """Weights that stay where the model runs once the text is encoded."""
        weights = self.weights
        resident = weights.transformer + weights.vae + weights.compressor
        if self.request.offload == "all":  # one layer, and the first of the next one's tensors
            largest = max(rows * cols for rows, cols in self.facts.layer_matrices) * self.request.dtype_bytes
            resident += self.layer_bytes + largest - self.layers_bytes
        return resident

    @property
    def loading(self) -> str:
        """What is done with the model while the text encoder works; see Plan."""
        machine, request = self.machine, self.request
        if machine is None or not self.encodes_text or self.facts.is_random or request.offload == "all":
            return "after"
        text, host = self.stages[0], machine.host_bytes
        both = text.device_bytes + self.resident_bytes
        # No more than the video takes later in any case: the peak stays what the plan says.
        if both <= self.peak_bytes and self.fits_memory():
            return "beside"
        facts = self.facts
        files = MOST_STORED_BYTES * (facts.transformer_params + facts.vae_params)
        return "read" if host is not None and _memory_fits(text.host_bytes + files, host) else "after"

    @property
    def bank_device(self) -> str:
        """Where the bank is: of "auto" in host memory only if it fits there and not beside the model."""
        asked = self.request.memory.bank_device
        if asked != "auto":
            return asked
        if (
            not self.on_gpu
            or not self.layout.top_k
            or self._fits_with("device")
            or not self._fits_with("host")
        ):
            return "device"
        return "host"

    def cache_bytes(self, bank_device: str) -> tuple[int, int]:
        """Of the preallocated cache: where the model runs, and in host memory beside it."""
        live = self.layout.capacity_bytes(self.blocks).live
        if bank_device == "device":
            return live, 0
        far, near = self.layout.far_bytes(self.blocks)
        return (live - far + near, far) if self.on_gpu else (live + near, 0)

    @property
    def records(self) -> bool:
        """Whether passes are recorded: asked for, and the video is long enough to fill its memory."""
        layout = self.layout
        mids = layout.top_k if layout.bank is None else min(layout.top_k, layout.bank)
        return self.asks_to_record and self.blocks > layout.sink_blocks + layout.recent_blocks + mids

    @property
    def asks_to_record(self) -> bool:
        return bool(getattr(self.request, "cuda_graphs", False))

    @property
    def is_possible(self) -> bool:
        """Whether its options go together: layers that come and go cannot be recorded."""
        return not (self.asks_to_record and self.request.offload == "all")

    @property
    def stages(self) -> tuple[StageMemory, ...]:
        """Estimates of text, denoise and decode."""
        return self._stages_with(self.bank_device)

    def _stages_with(self, bank_device: str) -> tuple[StageMemory, ...]:
        facts, request, per = self.facts, self.request, self.request.dtype_bytes
        grid, weights = self.layout.grid, self.weights
        text = 0
        if self.encodes_text:
            text = weights.text_encoder + facts.text_length * facts.text_dim * TEXT_WIDTHS * per
        if facts.is_random or getattr(request, "embeddings", None) is not None:
            text = 0  # no prompt is encoded
        width, height = self.size
        state = width * height * DECODER_STATE[self.vae] * per
        text_kv = facts.layers * 2 * facts.text_length * facts.dim * per
        cache, bank = self.cache_bytes(bank_device)
        layer = grid.block_tokens * (LAYER_WIDTHS * facts.dim + facts.ffn_dim) * per
        clean_kv = grid.block_tokens * grid.bytes_per_token
        guidance = getattr(request, "guidance", None)
        passes = 1 if (facts.schedule.guidance if guidance is None else guidance) == 1.0 else 2
        held = self.resident_bytes + cache + state + text_kv
        if self.records:
            # One denoising, one clean and one compressed pass: copies of the text's keys and values for each, what the
            # latter two return, and the work of the largest, since they share a pool.
            compressed_kv = grid.compressed_tokens * grid.bytes_per_token if self.layout.top_k else 0
            kinds = passes + (2 if compressed_kv else 1)
            held += kinds * text_kv + clean_kv + compressed_kv + passes * layer
        decoder = self.decoder_bytes
        streamed = facts.layers * self.layer_bytes if request.offload == "all" else 0
        text_on_host = request.offload != "none"
        host = HOST_BYTES if self.on_gpu or text_on_host else 0
        return (
            StageMemory("text", 0 if text_on_host else text, host + (text if text_on_host else 0)),
            # The clean pass has each layer's keys and values and, for a moment, a copy of all of them.
            StageMemory(
                "denoise",
                held + max(passes * (layer + text_kv), layer + 2 * clean_kv),
                host + streamed + bank,
            ),
            StageMemory("decode", held + clean_kv + decoder, host + streamed + bank),
        )

    @property
    def peak_bytes(self) -> int:
        return max(stage.device_bytes for stage in self.stages)

    def fits_memory(self) -> bool:
        """Whether every stage fits the machine, where the model runs and in host memory."""
        return self._fits_with(self.bank_device)

    def _fits_with(self, bank_device: str) -> bool:
        machine = self.machine
        assert machine is not None
        return all(
            _memory_fits(stage.device_bytes, machine.memory_bytes)
            and (machine.host_bytes is None or _memory_fits(stage.host_bytes, machine.host_bytes))
            for stage in self._stages_with(bank_device)
        )

    @property
    def disk_bytes(self) -> int:
        width, height = self.size
        pixels = self.layout.grid.frames_for(self.blocks) * width * height
        return math.ceil(pixels * VIDEO_BITS_PER_PIXEL / 8) * VIDEO_COPIES + self.run_bytes

    @property
    def run_bytes(self) -> int:
        """Latents, recalled ids and figures of every block, and the snapshots; 0 when no run folder is kept."""
        request, layout, per = self.request, self.layout, self.request.dtype_bytes
        if not getattr(request, "keep_run", False):
            return 0
        grid, view = layout.grid, layout.largest_view(self.blocks)
        latent = self.facts.latent_channels * grid.latent_rows * grid.latent_cols * per
        ids, scores = grid.layers * view.active, grid.layers * len(view.mid)
        a_block = BLOCK_FILE_BYTES + grid.frames_per_block * latent + ids * ID_BYTES
        figures = TRACE_BYTES + ids * TRACE_ID_BYTES + scores * TRACE_SCORE_BYTES
        snapshot = 0
        if getattr(request, "snapshot_every", None) is not None:
            width, height = self.size
            state = width * height * DECODER_STATE[self.vae] * per
            snapshot = (layout.capacity_bytes(self.blocks).live + state) * SNAPSHOT_COPIES
        return self.blocks * (a_block + figures) + snapshot

    def changed(self, **values: Any) -> _Parts:
        return _Parts(self.request.changed(**values), self.facts, self.machine)


def _smallest_change(parts: _Parts, machine: Machine) -> dict[str, Any]:
    """The mildest change of a request that fits, by name; empty if none does.

    First what leaves the video as it is or nearly so, then a smaller memory, smaller weights, at last a smaller size:
    one option if one is enough, else as few as possible.
    """
    if not _disk_fits(parts.disk_bytes, machine):
        return {}

    def fits(change: Mapping[str, Any]) -> bool:
        changed = parts.changed(**change)
        return changed.is_possible and changed.fits_memory()

    levers = _levers(parts, machine)
    for lever in levers:
        for change in lever:
            if fits(change):
                return change
    together: dict[str, Any] = {}
    for lever in levers:
        for change in lever:
            if fits(together | change):
                together |= change
                for name in reversed(tuple(together)):  # what was taken on the way and is not needed
                    less = {key: value for key, value in together.items() if key != name}
                    together = less if fits(less) else together
                return together
        together |= lever[-1]
    return {}


def _levers(parts: _Parts, machine: Machine) -> list[list[dict[str, Any]]]:
    """Options that need less memory, the mildest first; the values of each from mild to strong."""
    request, levers = parts.request, list[list[dict[str, Any]]]()
    on_gpu = machine.host_bytes is not None
    if request.memory.policy == "full":
        levers.append([{"policy": "packforcing"}])
    if on_gpu:
        levers.append([{"offload": "text" if request.offload == "none" else "none"}])
    if on_gpu and request.memory.bank_device == "device" and parts.layout.top_k:
        levers.append([{"bank_device": "host"}])
    if request.vae_latents > 1:
        levers.append([{"vae_latents": 1}])
    if parts.vae == "wan" and getattr(request, "compile", False):
        levers.append([{"compile": False}])
    without = {"cuda_graphs": False} if parts.asks_to_record else {}
    if without:
        levers.append([without])
    if request.memory.policy == "packforcing":
        kept = len(parts.layout.view(parts.blocks).mid)
        sizes = [n for n in _smaller_powers_of_two(kept) if n >= max(1, parts.layout.top_k)]
        levers.append([{"bank": n} for n in sizes])
    if request.dtype == "fp32":
        levers.append([{"dtype": "bf16"}])
    if request.quantize_text == "none":
        levers.append([{"quantize_text": "int8"}])
    if request.quantize == "none":
        levers.append([{"quantize": "int8"}])
    if on_gpu and request.offload != "all":
        levers.append([{"offload": "all", **without}])
    width, height = parts.size
    multiple = parts.facts.pixel_multiple
    smaller = [
        (
            max(64, round(width * share / multiple) * multiple),
            max(64, round(height * share / multiple) * multiple),
        )
        for share in (3 / 4, 1 / 2, 1 / 4)
    ]
    levers.append([{"size": size} for size in smaller if size != parts.size])
    return [lever for lever in levers if lever]


def _warnings(parts: _Parts, slots: SlotPlan) -> tuple[str, ...]:
    found = []
    layout = parts.layout
    if not slots.within_trained_range:
        step = "use --mid-span fit or a smaller --top-k" if layout.top_k else "use --policy packforcing"
        if not layout.rope_adjustment:
            step = "it grows with the video; use --rope-adjustment"
        found.append(
            f"the context spans {_number(slots.total)} slots and the model was trained on {slots.trained_frames};"
            f" {step}"
        )
    if layout.top_k and layout.bank is not None and layout.bank <= layout.top_k < parts.blocks:
        memory = parts.request.memory
        capped = memory.bank_memory is not None and layout.bank != memory.bank
        step = "a larger --bank-memory" if capped else "--bank above --top-k"
        if capped and layout.kv_dtype == "auto":
            step += ", or --kv-dtype int8"
        found.append(f"a bank of {layout.bank} blocks leaves nothing to select from; use {step}")
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


def _memory_fits(needed: int, free: int) -> bool:
    return needed <= free * HEADROOM


def _disk_fits(needed: int, machine: Machine) -> bool:
    return machine.disk_free_bytes is None or needed <= machine.disk_free_bytes


def gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _option(name: str, value: object) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} " + (f"{value[0]}x{value[1]}" if isinstance(value, tuple) else str(value))


def _number(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else f"{float(value):.2f}"
