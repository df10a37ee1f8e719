"""The algorithm: a prompt becomes a video, block by block, in a memory that does not grow.

`stream_generate` is the whole of it, top to bottom; `generate` writes what it yields into a file. State (cache,
decoder, pooled pixels) lives in local variables here; the model holds weights only.

    context -> denoise -> clean pass -> decode -> compress -> commit -> yield
       ^          |                                             |
       |       or a block that is there already                 |
       +------------------- the next block ---------------------+

A block is looked at before it is committed: frozen, black, saturated, jumping or NaN (trace.py). `guard` says what
happens to such a block; an attempt that is not kept leaves nothing behind.

A block that is there already, from a run folder or a video, goes through all of it but the denoising, so what is
remembered of it and every frame comes out as it did the first time. Resuming and extending are nothing else.

Source: PackForcing (arXiv 2603.25730); docs/method.md 2.3, 2.5.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from packforcing_cli import __version__, config, staging, trace
from packforcing_cli.beside import Beside, Faster, Stopwatch, memory_allows
from packforcing_cli.cache import CacheContext, CacheStats, KVCache
from packforcing_cli.compressor import pooled_kv
from packforcing_cli.config import MemoryOptions
from packforcing_cli.errors import UnhealthyError
from packforcing_cli.health import ATTEMPTS, Monitor, require_healthy
from packforcing_cli.layout import Shown
from packforcing_cli.machine import process_seconds, resident_bytes
from packforcing_cli.past import PastBlock, history_blocks, still_blocks
from packforcing_cli.prompts import Prompt, Story, StoryText, as_story
from packforcing_cli.registry import VideoModel
from packforcing_cli.resolve import (
    branches,
    compressor_kind,
    grid_for,
    latent_shape,
    layout_for,
    schedule_for,
)
from packforcing_cli.runfolder import RunFolder
from packforcing_cli.sampler import NUM_TRAIN_TIMESTEPS, Schedule, denoise_block
from packforcing_cli.staging import Mark
from packforcing_cli.timeline import Script
from packforcing_cli.transformer import BlockKV, TextKV
from packforcing_cli.vae import encode_lr, lr_pixels

if TYPE_CHECKING:
    from packforcing_cli.source import History
    from packforcing_cli.video import FrameFolder


@dataclass(frozen=True)
class Block:
    """One finished block.

    frames:   [T,H,W,3] uint8 RGB on the CPU.
    latents:  [1,C,F,h,w] clean latents, in the dtype the commit pass read.
    selected: [L,K] the compressed blocks each layer recalled, ascending.
    recalled: those of any layer, ascending.
    seconds:  of each stage: denoise, clean, decode, trace, compress, commit; of all attempts together.
    replayed: whether it was there already.
    record:   what the memory was while it was made, and its health; see trace.py.
    state:    gives all that is needed to go on after it, flat, on the CPU; good until the next block is asked for.
    """

    index: int
    frames: Tensor
    latents: Tensor
    selected: Tensor
    recalled: tuple[int, ...]
    cache: CacheStats
    seconds: dict[str, float]
    replayed: bool
    record: trace.Record = field(repr=False)
    state: Callable[[], dict[str, Tensor]] = field(repr=False)

    @property
    def retry(self) -> int:
        """Which attempt at it was kept, from 0."""
        return self.record.retry

    @property
    def flags(self) -> tuple[str, ...]:
        """What is wrong with its frames."""
        return () if self.record.health is None else self.record.health.flags


@dataclass(frozen=True)
class Result:
    """What `generate` made.

    blocks: of the memory; `replayed` blocks of them were there before.
    frames: of the whole file, 0 if it was not finished; `new_frames` were made now.
    stopped: whether it was asked to stop before the whole length was there, or `ended`.
    unhealthy, retries: of the blocks made now: what is wrong with those that are kept, and how many attempts at a block
        were rejected, by block.
    ended: why the guard ended the video; empty if it did not.
    first_frame_seconds: until the first frames that were made now were in the file, and played; 0 if none were.
    process_first_frame_seconds: the same from the start of the process; None where the system does not say.
    stall_seconds: waiting for the encoder.  block_seconds: of every block made now, in order.
    """

    path: Path
    frames: int
    new_frames: int
    blocks: int
    replayed: int
    fps: int
    seed: int
    stopped: bool
    first_frame_seconds: float
    total_seconds: float
    stall_seconds: float
    block_seconds: tuple[float, ...]
    cache: CacheStats
    peak_memory_bytes: int
    unhealthy: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    retries: Mapping[int, int] = field(default_factory=dict)
    ended: str = ""
    process_first_frame_seconds: float | None = None

    def block_percentile(self, percent: float) -> float:
        """The least of `block_seconds` that so many percent of them do not exceed; 0 if none was made."""
        ordered = sorted(self.block_seconds)
        return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] if ordered else 0.0

    @property
    def timing(self) -> dict[str, float]:
        """How soon and how steadily frames came, as it stands in every account of a video; seconds."""
        return {
            "first_frame_seconds": round(self.first_frame_seconds, 3),
            "block_seconds_p50": round(self.block_percentile(50), 4),
            "block_seconds_p95": round(self.block_percentile(95), 4),
            "stall_seconds": round(self.stall_seconds, 3),
        }

    @property
    def process_timing(self) -> dict[str, float | None]:
        """`timing` of a process that makes one video: from its start, None where the system does not say when."""
        seconds = self.process_first_frame_seconds
        return {"process_first_frame_seconds": None if seconds is None else round(seconds, 3)}


@torch.no_grad()
def stream_generate(
    model: VideoModel,
    prompt: str | Prompt | Script | Story,
    *,
    num_blocks: int,
    seed: int,
    size: tuple[int, int] | None = None,
    schedule: Schedule | None = None,
    memory: MemoryOptions | None = None,
    first_latent: Tensor | None = None,
    past: Iterable[PastBlock] = (),
    state: Mapping[str, Tensor] | None = None,
    guard: str = "warn",
    overlap: bool | None = None,
) -> Iterator[Block]:
    """Generate a video block by block; every block is yielded as soon as its frames and its memory are there.

    Args:
        num_blocks: length; `Layout.blocks_for` turns seconds into blocks.
        seed:       noise is a function of (seed, block, step, attempt).
        size:       (width, height) in pixels; None = the package's.
        first_latent: [1,C,1,h,w] what the video begins with, from `encode_image`: held while block 0 is denoised.
        past:       blocks that are there already, from the first one, or from the one after `state`.
        state:      `Block.state()` of an earlier block, of the same video settings.
        guard:      of a new block with health flags: "warn" keeps it, "retry" makes it ATTEMPTS times, "stop" raises.
        overlap:    decode and compress a block while the next one is denoised; it is yielded then. The results are
                    the same. None = on a GPU with room for it, where it is faster. Only guard "warn" can wait.
    Raises: UsageError or LayoutError before the first block; GenerationError if a block is not finite; UnhealthyError.
    """
    schedule = schedule or schedule_for(model)
    memory = (memory or MemoryOptions()).with_defaults(model.manifest.cache.model_dump())
    grid = grid_for(model, size or model.manifest.size)
    layout = layout_for(model, memory, grid, num_blocks=num_blocks)
    story = as_story(model, prompt, guided=schedule.guidance != 1.0)
    layout = replace(layout, cuts=story.script.cuts, pins=story.script.pins)
    cache = KVCache(
        layout,
        num_blocks=num_blocks,
        dtype=model.dtype,
        device=model.device,
        select=memory.select,
        seed=seed,
        compressed_context=memory.compressed_context,
        bank_device="cpu" if memory.bank_device == "host" else None,
    )
    video = Video(model, story.script, cache, compressor_kind(model, memory.compressor), guard, overlap)
    if state is not None:
        video.load_state(state)
    texts, history, waiting = StoryText(model.transformer, story), iter(past), None
    try:
        for i in range(cache.blocks, num_blocks):
            old, watch, late = next(history, None), Stopwatch(model.device), False
            attempts = ATTEMPTS if guard == "retry" and old is None else 1
            with watch.stage("denoise"):
                text, guided = texts.at(i)
            for retry in range(attempts):
                before = video.decoder.state_dict() if attempts > 1 else {}
                with watch.stage("denoise"):
                    context = cache.context(i, selected=None if old is None else old.selected)
                    if old is not None:
                        x0 = staging.to_device(old.latents, model.device).to(model.dtype)
                    else:
                        x0 = new_latents(
                            model, schedule, guided, context, first_latent, seed=seed, retry=retry
                        )
                clean = video.beside.mark()
                if waiting is not None:  # the block before; its frames were made meanwhile
                    yield video.finish(waiting, watch)
                    waiting = None
                with watch.stage("clean"):
                    kv = model.transformer.commit(x0, text, context)
                if old is not None and old.selected is None:
                    context.settle(kv.q_sum)
                    clean = video.beside.mark()  # `affinity` chose in this pass, and its choice is shown, too
                made = video.show(i, x0, context, old, watch, since=clean, retry=retry)
                late = video.may_wait(i, replayed=old is not None)
                if late or not video.health_of(made).flags or retry + 1 == attempts:
                    break
                video.decoder.load_state_dict(before)
            video.commit(made, kv, text, late=late)
            del kv  # the memory has it; on a GPU this is more than a gigabyte
            if late:
                waiting = made
            else:
                yield video.finish(made, watch)
    finally:
        cache.close()  # a stop may come while a block is open, which would keep all of the memory


@dataclass
class Made:
    """A clean block and what follows from it; what is made beside the model is there when `done` has passed.

    pixels: [1,3,T,H,W].  frames, latents: as in `Block`.  finite: whether latents and pixels are; one bool.
    recall: the context's ids, scores and degenerate layers.  note: makes the record of its memory, see `record_of`.
    tokens: [1,N_c,d] its compressed tokens, None if it takes none.  text: that its compressed tokens read.
    health: of its frames, once they were looked at.  backed_up: whether the memory has its compressed form.
    """

    index: int
    x0: Tensor
    pixels: Tensor
    frames: Tensor
    latents: Tensor
    finite: Tensor
    recall: Recall
    note: Callable[[Recall, trace.Health], trace.Record]
    done: Mark
    watch: Stopwatch
    replayed: bool
    tokens: Tensor | None = None
    text: TextKV | None = None
    stats: CacheStats | None = None
    health: trace.Health | None = None
    backed_up: bool = False


class Video:
    """All that a video carries from block to block, and what happens to a block once it is clean.

    compressor, guard, overlap: as `BlockCompressor` and `stream_generate` take them.
    """

    def __init__(
        self,
        model: VideoModel,
        script: Script,
        cache: KVCache,
        compressor: str,
        guard: str,
        overlap: bool | None,
    ) -> None:
        self._model, self._script, self._cache, self._guard = model, script, cache, guard
        if overlap is None and not (model.device.type == "cuda" and memory_allows(model.device)):
            overlap = False
        self._faster = Faster(overlap)
        self.beside = Beside(model.device, used=overlap is not False and guard == "warn")
        self._compress = BlockCompressor(model, compressor) if cache.layout.top_k else None
        self._has_compressed = self._compress is None  # a block, in this process; or none ever will be
        self._monitor = Monitor(script)
        self.decoder = model.codec.decoder()
        self._first: int | None = None

    def show(
        self,
        i: int,
        x0: Tensor,
        context: CacheContext,
        old: PastBlock | None,
        watch: Stopwatch,
        *,
        since: Mark,
        retry: int,
    ) -> Made:
        """Decode a clean block, beside the model; its frames are those of `old` if that has any."""
        recall, to_host = Recall.of(context), staging.to_host
        given = None if old is None else old.pixels
        with self.beside.work(x0, given, *recall, since=since), watch.stage("decode"):
            pixels = self.decoder.decode(x0)
            if given is not None:
                pixels = staging.to_device(given, pixels.device).to(pixels)
            return Made(
                index=i,
                x0=x0,
                pixels=pixels,
                frames=to_uint8(pixels, to_host),
                latents=to_host(x0),
                # Of values in [0, 1] a sum says as much.
                finite=to_host(x0.isfinite().all() & pixels.sum().isfinite()),
                recall=recall.on(to_host),
                note=noted(self._cache, context, self._script, retry=retry),
                done=self.beside.mark(),
                watch=watch,
                replayed=old is not None,
            )

    def may_wait(self, i: int, *, replayed: bool) -> bool:
        """Whether block i is finished while the next one is denoised.

        Not the first one, whose frames somebody waits for, nor one before a cut, whose backup the next one needs.
        """
        self._first = i if self._first is None else self._first
        cache = self._cache
        if (
            self._guard != "warn"
            or i == self._first
            or i + 1 == cache.num_blocks
            or i + 1 in cache.layout.cuts
        ):
            return False
        if replayed:
            return bool(self._faster.wanted)
        return self._faster.choose(i, settled=self._is_settled(i))

    def _is_settled(self, i: int) -> bool:
        """Whether block i took as long as later ones: each kind of pass was made, and is recorded where it will be."""
        if not self._model.graphs:
            return self._has_compressed
        layout, view = self._cache.layout, self._cache.layout.view(max(0, i - 1))
        had = (len(view.sink), view.active, len(view.recent))
        return self._has_compressed and had == (layout.sink_blocks, layout.top_k, layout.recent_blocks)

    def health_of(self, made: Made) -> trace.Health:
        """Look at its frames, once."""
        if made.health is None:
            made.done.wait()  # the one wait of a block that is finished late; what it shows is on the host then
            with made.watch.stage("trace", on_host=True):
                made.health = self._monitor.judge(
                    made.index, made.frames, finite=bool(made.finite), given=made.replayed
                )
        return made.health

    def commit(self, made: Made, kv: BlockKV, text: TextKV, *, late: bool) -> None:
        """Take a clean block into the memory; in time also its compressed form, unless that comes later.

        Raises: as `require_healthy`, unless late.
        """
        if not late:
            require_healthy(made.index, made.latents, self.health_of(made), guard=self._guard)
        cache, watch, compress = self._cache, made.watch, self._compress
        backup = None
        if compress is not None:
            with self.beside.work(made.x0), watch.stage("compress"):
                made.tokens = compress.tokens(cache, made.index, made.x0, made.pixels)
                made.done = self.beside.mark()
            made.text = text
            if not (late and compress.can_wait(cache)):
                with watch.stage("compress"):
                    backup = self._backup(made, kv)
        with watch.stage("commit"):
            cache.commit(made.index, kv)
            if backup is not None:
                cache.add_backup(made.index, backup)
        made.stats = cache.stats()

    def _backup(self, made: Made, kv: BlockKV | None) -> BlockKV | None:
        assert self._compress is not None
        assert made.text is not None
        self.beside.hand_over(made.done, made.tokens)
        made.backed_up = True
        backup = self._compress.backup(self._cache, made.index, made.tokens, kv, made.text)
        self._has_compressed |= backup is not None
        return backup

    def finish(self, made: Made, watch: Stopwatch) -> Block:
        """The whole block, its compressed form in the memory.

        watch: of the block that is being made, if it is another one: it is charged for what is left to do.
        Raises: GenerationError if it is not finite.
        """
        if made.health is None:
            require_healthy(made.index, made.latents, self.health_of(made), guard=self._guard)
        assert made.health is not None
        assert made.stats is not None
        self._monitor.keep()
        if self._compress is not None and not made.backed_up:
            with watch.stage("compress"):
                backup = self._backup(made, None)
                if backup is not None:
                    self._cache.add_backup(made.index, backup)
        made.done.wait()  # passed, unless the block was finished in order: `state` may read what lives beside
        with made.watch.stage("trace", on_host=True):
            record = made.note(made.recall, made.health)
        return Block(
            index=made.index,
            frames=made.frames,
            latents=made.latents,
            selected=made.recall.selected,
            recalled=record.recalled,
            cache=replace(made.stats, active=record.selected),
            seconds=made.watch.seconds,
            replayed=made.replayed,
            record=replace(record, seconds=made.watch.rounded),
            state=self.state,
        )

    def state(self) -> dict[str, Tensor]:
        """All that the video carries from block to block, as safetensors takes it: flat, on the CPU."""
        parts = {
            "cache": self._cache.state_dict(),
            "decoder": self.decoder.state_dict(),
            "monitor": self._monitor.state_dict(),
        }
        if self._compress is not None:
            parts["compressor"] = self._compress.state_dict()
        return {
            f"{part}.{name}": value.to("cpu", copy=True).contiguous()
            for part, values in parts.items()
            for name, value in values.items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`. Raises: LayoutError or ValueError if it is the state of another kind of video."""
        parts: dict[str, dict[str, Tensor]] = {"cache": {}, "decoder": {}, "compressor": {}, "monitor": {}}
        for name, value in state.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        self._cache.load_state_dict(parts["cache"])
        self._monitor.load_state_dict(parts["monitor"])
        with self.beside.work():  # what lives there is made there
            self.decoder.load_state_dict(parts["decoder"])
            if self._compress is not None:
                self._compress.load_state_dict(parts["compressor"])


def new_latents(
    model: VideoModel,
    schedule: Schedule,
    text: TextKV,
    context: CacheContext,
    first_latent: Tensor | None,
    *,
    seed: int,
    retry: int,
) -> Tensor:
    """Denoise the block a context is open for; the arguments are those of `stream_generate` and `denoise_block`."""
    held = first_latent if context.block == 0 else None
    return denoise_block(
        partial(velocity, model, text, context, held=held is not None),
        schedule,
        held=held,
        seed=seed,
        block=context.block,
        shape=latent_shape(model, context.layout),
        dtype=model.dtype,
        device=model.device,
        retry=retry,
    )


def velocity(
    model: VideoModel, text: TextKV, context: CacheContext, x: Tensor, sigma: float, *, held: bool = False
) -> Tensor:
    """The transformer's prediction for each prompt in `text`, the block's frames all at one noise level.

    held: the first latent frame is clean: its own timestep is 0.
    """
    timesteps = torch.full((1, x.shape[2]), NUM_TRAIN_TIMESTEPS * sigma, dtype=torch.float64, device=x.device)
    if held:
        timesteps[:, 0] = 0
    out: Tensor = model.transformer(x, timesteps, text, context)
    return out


class BlockCompressor:
    """Turns a clean block into the keys and values of its compressed form; remembers the last pooled frame.

    kind: "hr+lr", "hr", "lr" (the compressor's branches), "pool" (averaged keys and values), "identity" (a copy).
    Raises: UsageError if the package has no weights for the branch.
    """

    def __init__(self, model: VideoModel, kind: str) -> None:
        self._model, self._kind = model, kind
        self._pooled: Tensor | None = None
        self._network = branches(model, kind) if kind in ("hr+lr", "hr", "lr") else None

    def __call__(
        self, cache: KVCache, i: int, x0: Tensor, pixels: Tensor, kv: BlockKV, text: TextKV
    ) -> BlockKV | None:
        """Compressed keys and values of block i, or None if it takes no backup. Call it for every block, in order."""
        return self.backup(cache, i, self.tokens(cache, i, x0, pixels), kv, text)

    def can_wait(self, cache: KVCache) -> bool:
        """Whether `backup` needs neither the block's own keys and values nor its open context."""
        return self._network is not None and cache.backup_may_wait

    def tokens(self, cache: KVCache, i: int, x0: Tensor, pixels: Tensor) -> Tensor | None:
        """Compressed tokens [1,N_c,d] of block i, None if the kind or the block has none; for every block, in order."""
        if self._network is None:
            return None
        pooled = None
        if self._network.needs_pixels:
            pooled, self._pooled = lr_pixels(pixels, self._pooled)
        if not cache.needs_backup(i):
            return None
        tokens = None
        if pooled is not None:
            latents = encode_lr(self._model.codec, pooled.to(self._model.dtype))
            tokens = self._model.transformer.patch(latents.to(self._model.dtype))
        made: Tensor = self._network(x0, tokens)
        return made

    def backup(
        self, cache: KVCache, i: int, tokens: Tensor | None, kv: BlockKV | None, text: TextKV
    ) -> BlockKV | None:
        """Compressed keys and values of block i from its `tokens`, None if it takes none.

        kv: the block's own; for what `can_wait` it may be None.
        """
        if not cache.needs_backup(i):
            return None
        if tokens is not None:
            return self._model.transformer.commit_tokens(tokens, text, cache.compressed_context(i))
        assert kv is not None
        if self._kind == "identity":
            return kv
        grid = cache.layout.grid
        shape = (grid.frames_per_block, grid.rows, grid.cols)
        return replace(kv, k=pooled_kv(kv.k, *shape), v=pooled_kv(kv.v, *shape))

    def state_dict(self) -> dict[str, Tensor]:
        """What it remembers of the block before."""
        return {} if self._pooled is None else {"pooled": self._pooled}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state_dict`."""
        self._pooled = state["pooled"].to(self._model.device) if "pooled" in state else None


def to_uint8(pixels: Tensor, to_host: Callable[[Tensor], Tensor] = Tensor.cpu) -> Tensor:
    """[1,3,T,H,W] in [0, 1] -> [T,H,W,3] uint8 on the CPU."""
    return to_host(pixels[0].permute(1, 2, 3, 0).mul(255).round().clamp(0, 255).to(torch.uint8))


class UntilUnhealthy:
    """Blocks up to one that the guard stopped at; what it says of the health of those made now.

    unhealthy, retries, ended: as `Result`.
    Raises, while iterating: UnhealthyError if there is no block before the unhealthy one.
    """

    def __init__(self, blocks: Iterator[Block]) -> None:
        self._blocks = blocks
        self.unhealthy: dict[int, tuple[str, ...]] = {}
        self.retries: dict[int, int] = {}
        self.ended = ""

    def __iter__(self) -> Iterator[Block]:
        some = False
        try:
            for block in self._blocks:
                if block.flags:
                    self.unhealthy[block.index] = block.flags
                if block.retry:
                    self.retries[block.index] = block.retry
                some = True
                yield block
        except UnhealthyError as error:
            if not some:
                raise
            self.ended = error.message


class Recall(NamedTuple):
    """What a context recalls: `CacheContext`'s ids [L,K], scores [L,M] or None, and degenerate layers [L]."""

    selected: Tensor
    scores: Tensor | None
    degenerate: Tensor

    @classmethod
    def of(cls, context: CacheContext) -> Recall:
        """That of a context of which all layers were read."""
        return cls(context.selected, context.scores, context.degenerate)

    def on(self, place: Callable[[Tensor], Tensor]) -> Recall:
        """The same, brought elsewhere."""
        scores = None if self.scores is None else place(self.scores)
        return Recall(place(self.selected), scores, place(self.degenerate))


def record_of(
    cache: KVCache, context: CacheContext, script: Script, health: trace.Health, *, retry: int
) -> trace.Record:
    """What the memory is for the block whose context is open, all layers having read it; without the timings."""
    return noted(cache, context, script, retry=retry)(Recall.of(context), health)


def noted(
    cache: KVCache, context: CacheContext, script: Script, *, retry: int
) -> Callable[[Recall, trace.Health], trace.Record]:
    """What the memory is for the block whose context is open, as far as the host knows without asking the GPU.

    Returns: what makes the record of it, given what was recalled.
    """
    layout, block = cache.layout, context.block
    view, slots, size = layout.view(block), layout.slots(block), cache.in_use()
    bank, pins = cache.bank_blocks, layout.pins
    memory = {
        "device": torch.cuda.memory_allocated(cache.device) if cache.device.type == "cuda" else 0,
        "resident": resident_bytes(),
    }

    def floats(starts: Iterable[Fraction]) -> tuple[float, ...]:
        return tuple(float(start) for start in starts)

    def record(recall: Recall, health: trace.Health) -> trace.Record:
        scores = None if recall.scores is None else recall.scores.tolist()
        return trace.Record(
            block=block,
            retry=retry,
            frames=(layout.frames_for(block), layout.frames_for(block + 1)),
            scene=script.scene(block),
            partitions=trace.Partitions(
                tuple(view.sink), tuple(bank), tuple(view.recent), current=block, active=view.active
            ),
            slots=trace.Slots(
                sink=floats(slots.sink_starts),
                mid=floats(slots.mid_starts),
                recent=floats(slots.recent_starts),
                current=float(slots.current_start),
                span=float(slots.span),
                max_distance=float(slots.max_distance),
                trained=layout.trained_frames,
            ),
            tokens=asdict(layout.tokens(view)),
            bytes={**asdict(size), "live": size.live},
            full_bytes=(block + 1) * layout.grid.block_tokens * layout.grid.bytes_per_token,
            selected=tuple(tuple(ids) for ids in recall.selected.tolist()),
            scores=None if scores is None else tuple(tuple(trace.rounded(s) for s in row) for row in scores),
            degenerate=tuple(recall.degenerate.nonzero().flatten().tolist()),
            pins=tuple(old for old in bank if old in pins),
            memory=memory,
            health=health,
        )

    return record


def generate(
    model: VideoModel,
    prompt: str | Prompt | Script | Story,
    output: Path | str | BinaryIO,
    *,
    seconds: float = 10.0,
    seed: int | None = None,
    size: tuple[int, int] | None = None,
    schedule: Schedule | None = None,
    memory: MemoryOptions | None = None,
    first_latent: Tensor | None = None,
    stills: Sequence[NDArray[np.uint8]] = (),
    history: History | None = None,
    codec: str = "h264",
    crf: int = 18,
    preset: str | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    run: RunFolder | None = None,
    snapshot_every: int | None = None,
    frames: FrameFolder | None = None,
    guard: str = "warn",
    overlap: bool | None = None,
    on_block: Callable[[Block, float], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Result:
    """Generate a video into a file, beside which encoding runs, or into a stream.

    Args:
        output:       a file name, see `video.VideoWriter`, or a stream, see `video.PipeWriter`.
        seconds:      wanted length; the video has whole blocks.
        seed:         None = random.
        first_latent: as `stream_generate`.
        stills:       [H,W,3] pictures that are the first blocks, see `still_blocks`.
        history:      somebody's video whose blocks come first; `seconds` counts them, and the file has it in front,
                      with its sound, unless it says otherwise. Not with stills.
        metadata:     tags of the file; None = prompt, seed, model and version. A run folder's own are preferred.
        run:          where every block is kept before it is written; the blocks it has already are not made again,
                      and what its video has of them is not encoded again. Not with a stream. Stopped within the
                      history, only the run has what was done.
        snapshot_every: blocks between two exact snapshots in the run folder; None = none.
        frames:       gets every frame as a picture, too, before its block is kept; of blocks that are there already
                      those that are missing.
        guard:        as `stream_generate`; under "stop" the video ends before an unhealthy block, finished and
                      playable.
        overlap:      as `stream_generate`.
        on_block:     called after every block with it and its wall-clock seconds.
        should_stop:  asked after every block; True ends the video there, finished and playable.
    Returns: what was made. Raises: as `stream_generate`, `video.VideoWriter` and `RunFolder`; what was written
        still plays. UnhealthyError only if there is no block before the unhealthy one.
    """
    # Files need PyAV; whoever only streams blocks does not.
    from packforcing_cli import finishing
    from packforcing_cli.video import VideoWriter, part_path

    width, height = size or model.manifest.size
    grid = grid_for(model, (width, height))
    num_blocks, fps = grid.blocks_for(seconds, model.manifest.fps), model.manifest.fps
    seed = config.random_seed() if seed is None else seed
    schedule = schedule or schedule_for(model)
    story = as_story(model, prompt, guided=schedule.guidance != 1.0)
    if run is not None:
        metadata = run.record.tags
    if metadata is None:
        said = story.prompts[0].text
        metadata = {"prompt": said, "seed": str(seed), "model": model.name, "version": __version__}
    started = clock = time.perf_counter()
    age, stalled, spent, replayed, made = process_seconds(), 0.0, list[float](), 0, 0
    last: Block | None = None
    shown = Shown(grid) if history is None else history.shown
    encoding = finishing.Encoding.of(
        fps, (width, height), codec, crf, preset, metadata, story.script, shown, history
    )
    with finishing.open_writer(output, run, encoding, overwrite=overwrite) as writer:
        groups = writer.blocks_written
        written, start = shown.blocks_in(groups), 0
        known: Iterator[PastBlock] = iter(())
        if run is not None:
            snapshot, other = run.snapshot_blocks(), run.record.other_memory
            start = snapshot if other < snapshot <= min(written, num_blocks - 1) else 0
            lacking = frames is not None and frames.lacks(shown.frames_for(start))
            if lacking or start < shown.history or (guard == "stop" and start == run.blocks):
                start = 0  # also so that there is a block before one that the guard stops at
            known = (
                PastBlock(entry.latents, None if entry.index < other else entry.selected)
                for entry in run.entries(start, run.blocks)  # not those to come
            )
        there = 0 if run is None else run.blocks
        past: Iterable[PastBlock] = known
        if history is not None and not start:
            lead = finishing.Lead(writer, frames, groups=groups, is_new=run is None or not there, shown=shown)
            past = history_blocks(model, history, known, kept=min(there, history.blocks), on_lead=lead)
        elif len(stills):
            past = chain(known, islice(still_blocks(model, stills, grid), there, None))
        stream = UntilUnhealthy(
            stream_generate(
                model,
                story,
                num_blocks=num_blocks,
                seed=seed,
                size=(width, height),
                schedule=schedule,
                memory=memory,
                first_latent=first_latent,
                past=past,
                state=run.load_snapshot() if run is not None and start else None,
                guard=guard,
                overlap=overlap,
            )
        )
        stalled_before, encoded = 0.0, writer.encode_seconds
        for block in stream:
            pixels = block.frames[shown.lengths.block_frames(block.index) - shown.block_frames(block.index) :]
            if frames is not None and block.index >= shown.first:
                begins = shown.frame_of(block.index)
                frames.write(pixels, first=begins, only_missing=block.index < there)
            if run is not None and block.index >= run.blocks:
                record = replace(
                    block.record,
                    seconds={**block.record.seconds, "stall": round(stalled - stalled_before, 6)},
                    encode_seconds=round(writer.encode_seconds - encoded, 6),
                )
                stalled_before, encoded = stalled, writer.encode_seconds
                run.append(block.latents, block.selected, retry=block.retry, trace=record.to_json())
            waiting = time.perf_counter()
            if block.index >= written:
                writer.write(pixels)
            stalled += time.perf_counter() - waiting
            if run is not None and snapshot_every and not block.replayed and run.blocks % snapshot_every == 0:
                writer.flush()
                run.save_snapshot(block.state())
            replayed, last, now = replayed + block.replayed, block, time.perf_counter()
            spent += [] if block.replayed else [now - clock]
            made += 0 if block.replayed else len(block.frames)
            if on_block is not None:
                on_block(block, now - clock)
            clock = now
            if should_stop is not None and should_stop():
                break
        assert last is not None
        unfinished = last.index < shown.history
        if unfinished and isinstance(writer, VideoWriter):  # there is nothing new in the file yet
            writer.abort()
            if run is None:
                part_path(writer.path).unlink(missing_ok=True)
        elif run is not None:
            finishing.note_end(run, writer)
        blocks = last.index + 1 if unfinished else max(last.index + 1, shown.blocks_in(writer.blocks_written))
    if run is not None and not unfinished:
        finishing.close_run(run, writer)
    first = 0.0 if writer.first_at is None else writer.first_at - started
    return Result(
        path=writer.path,
        frames=0 if unfinished else writer.frames_written,
        new_frames=made,
        blocks=blocks,
        replayed=start + replayed,
        fps=fps,
        seed=seed,
        stopped=blocks < num_blocks,
        first_frame_seconds=first,
        total_seconds=time.perf_counter() - started,
        stall_seconds=stalled,
        block_seconds=tuple(spent),
        cache=last.cache,
        peak_memory_bytes=peak_memory_bytes(model.device),
        unhealthy=stream.unhealthy,
        retries=stream.retries,
        ended=stream.ended,
        process_first_frame_seconds=None if age is None or not first else age + first,
    )


# -- the run folder ---------------------------------------------------------------------------------------------


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory so far: of the GPU if there is one, else of this process; 0 where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
