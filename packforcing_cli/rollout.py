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

import hashlib
import importlib.metadata
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from fractions import Fraction
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from packforcing_cli import __version__, catalog, config, provenance, runfolder, trace
from packforcing_cli.cache import CacheContext, CacheStats, KVCache
from packforcing_cli.compressor import Compressor, CompressorConfig, pooled_kv
from packforcing_cli.config import COMPRESSORS, GenerateRequest, MemoryOptions, PlanRequest
from packforcing_cli.embeddings import UNCONDITIONAL, EmbeddingCache, EmbeddingFile, encode
from packforcing_cli.errors import GenerationError, UnhealthyError, UsageError, VideoError
from packforcing_cli.layout import Grid, Layout, Lengths, Shown
from packforcing_cli.machine import resident_bytes
from packforcing_cli.provenance import ModelRecord, Provenance
from packforcing_cli.registry import ModelSource, VideoModel
from packforcing_cli.runfolder import Record, RunFolder
from packforcing_cli.sampler import NUM_TRAIN_TIMESTEPS, Schedule, denoise_block
from packforcing_cli.source import History, Source
from packforcing_cli.timeline import Script, parse_time
from packforcing_cli.transformer import BlockKV, TextKV, WanTransformer
from packforcing_cli.vae import Codec, StreamingDecoder, WanCodec, encode_lr, lr_pixels
from packforcing_cli.video import FrameFolder, PipeWriter, Sound, VideoReader, VideoWriter, part_path


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
class PastBlock:
    """A block that is there already: it is committed to the memory, not made.

    latents:  [1,C,F,h,w] as the commit pass reads them.
    selected: [L,K] the compressed blocks each layer recalled for it; None = chosen as for a new block.
    pixels:   [1,3,T,H,W] in [0, 1], its frames; None = what the latents decode to.
    """

    latents: Tensor
    selected: Tensor | None = None
    pixels: Tensor | None = None


@dataclass(frozen=True)
class Prompt:
    """An encoded prompt: embeddings [1,T,C], and what the person should know of it.

    unconditional: embeddings of the empty prompt; None when there is no guidance.
    unknown:       words the model was not trained on.  dropped: tokens at the end that did not fit.
    """

    text: str
    conditional: Tensor
    unconditional: Tensor | None = None
    unknown: tuple[str, ...] = ()
    dropped: int = 0


@dataclass(frozen=True)
class Story:
    """A script and its encoded prompts, one for each scene."""

    script: Script
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class Result:
    """What `generate` made.

    blocks: of the memory; `replayed` blocks of them were there before.
    frames: of the whole file, 0 if it was not finished; `new_frames` were made now.
    stopped: whether it was asked to stop before the whole length was there, or `ended`.
    unhealthy, retries: of the blocks made now: what is wrong with those that are kept, and how many attempts at a block
        were rejected, by block.
    ended: why the guard ended the video; empty if it did not.
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


def schedule_for(
    model: VideoModel | ModelSource, *, steps: int | None = None, guidance: float | None = None
) -> Schedule:
    """The package's schedule with the person's changes.

    Raises: UsageError for guidance, or another number of steps, on a few-step student.
    """
    own = model.manifest.schedule
    catalog.check_sampling(model.name, own.kind, own.steps, steps=steps, guidance=guidance)
    return Schedule.build(
        own.kind,
        steps=own.timesteps if own.kind == "renoise" else steps or own.steps,
        shift=own.shift,
        guidance=own.guidance if guidance is None else guidance,
    )


def grid_for(model: VideoModel, size: tuple[int, int]) -> Grid:
    """Token grid of a block. Raises: UsageError for a size (width, height) that does not fit the patches."""
    config = model.transformer.config
    multiple = model.codec.facts.spatial_stride * config.patch_size[1]
    catalog.check_size(size, multiple, name=model.name, default_size=model.manifest.size)
    return Grid(
        frames_per_block=model.manifest.cache.frames_per_block,
        rows=size[1] // multiple,
        cols=size[0] // multiple,
        layers=config.num_layers,
        kv_dim=config.dim,
        heads=config.num_attention_heads,
        dtype_bytes=model.dtype.itemsize,
    )


def encode_prompt(model: VideoModel | ModelSource, text: str, *, guided: bool) -> Prompt:
    """Encode a prompt, as `encode_script` does."""
    return encode_script(model, Script((text,)), guided=guided).prompts[0]


def encode_script(
    model: VideoModel | ModelSource,
    script: Script,
    *,
    guided: bool,
    given: EmbeddingFile | None = None,
    cache: EmbeddingCache | None = None,
) -> Story:
    """Encode the prompts of a script, equal ones once.

    The text encoder is loaded only for prompts the cache does not have, and is gone from memory when this returns. With
    a `ModelSource` that is before the transformer is loaded.

    Args:
        given: embeddings from a file; the encoder is then never loaded.
        cache: None = the user's.
    Raises: WeightsError or UsageError if `given` is of another model or lacks a prompt.
    """
    texts = [*script.prompts, *([UNCONDITIONAL] if guided else [])]
    if given is not None:
        given.require_fit(model.text, model=model.name)
        found = given.choose(texts)
    else:
        found = encode(texts, model.text, model.load_text_encoder, cache=cache or EmbeddingCache.of_user())
    embeds = {text: entry.embeds.to(model.device, model.dtype) for text, entry in found.items()}
    prompts = tuple(
        Prompt(
            text=text,
            conditional=embeds[text],
            unconditional=embeds[UNCONDITIONAL] if guided else None,
            unknown=found[text].unknown,
            dropped=found[text].dropped,
        )
        for text in script.prompts
    )
    return Story(script, prompts)


def encode_image(model: VideoModel, pixels: NDArray[np.uint8]) -> Tensor:
    """The latent frame of an image, as the first of a video.

    Args:
        pixels: [H,W,3] uint8 RGB, in the size of the video.
    Returns: [1,C,1,h,w] in the model's dtype.
    """
    encoder = model.codec.encoder()
    latents = encoder.encode(to_pixels(pixels[None], model.device))
    last = encoder.flush()
    return (latents if last is None else torch.cat((latents, last), dim=2)).to(model.dtype)


class HasCodec(Protocol):
    """What encoding needs of a model: a `VideoModel`, or its codec alone."""

    @property
    def codec(self) -> Codec: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...


def encode_blocks(
    model: HasCodec, pieces: Iterable[NDArray[np.uint8]], *, frames_per_block: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Encode the blocks of a video as one stream, reading no further than the encoder looks ahead.

    Args:
        pieces: frames of each block, [T,H,W,3] uint8.
    Yields: latents [1,C,F,h,w] in the model's dtype and pixels [1,3,T,H,W] in [0, 1] of each block.
    """
    encoder = model.codec.encoder()
    waiting: deque[Tensor] = deque()  # pixels of blocks whose last latent needs the frames after them
    parts: list[Tensor] = []

    def ready() -> Iterator[tuple[Tensor, Tensor]]:
        while waiting and sum(part.shape[2] for part in parts) >= frames_per_block:
            latents = torch.cat(parts, dim=2)
            parts[:] = [latents[:, :, frames_per_block:]]
            yield latents[:, :, :frames_per_block].to(model.dtype), waiting.popleft()

    for frames in pieces:
        waiting.append(to_pixels(frames, model.device))
        parts.append(encoder.encode(waiting[-1]))
        yield from ready()
    last = encoder.flush() if parts else None
    parts += [] if last is None else [last]
    yield from ready()


def still_blocks(model: VideoModel, stills: Sequence[NDArray[np.uint8]], grid: Grid) -> Iterator[PastBlock]:
    """Pictures [H,W,3] as the first blocks of a video, each held for one block; shown as the model decodes them."""
    held = (
        np.broadcast_to(picture, (grid.block_frames(n), *picture.shape)).copy()
        for n, picture in enumerate(stills)
    )
    for latents, _ in encode_blocks(model, held, frames_per_block=grid.frames_per_block):
        yield PastBlock(latents)


def history_blocks(
    model: VideoModel,
    history: History,
    known: Iterator[PastBlock],
    *,
    kept: int = 0,
    on_lead: Callable[[NDArray[np.uint8]], None],
) -> Iterator[PastBlock]:
    """The blocks of somebody's video, read as a stream.

    Args:
        known:   the first `kept` blocks as they were committed before; only their pixels are read again. Blocks behind
                 the history follow from there.
        on_lead: gets the frames before the first block in pieces, [T,H,W,3].
    Yields: every block with its pixels, then what is left of `known`.
    """

    def blocks() -> Iterator[NDArray[np.uint8]]:
        for frames, is_block in history.pieces():
            if is_block:
                yield frames
            else:
                on_lead(frames)

    if kept >= history.blocks:
        for frames, past in zip(blocks(), known, strict=False):
            yield replace(past, pixels=to_pixels(frames, model.device))
    else:
        frames_per_block = history.shown.lengths.frames_per_block
        encoded = encode_blocks(model, blocks(), frames_per_block=frames_per_block)
        for n, (latents, pixels) in enumerate(encoded):
            yield replace(next(known), pixels=pixels) if n < kept else PastBlock(latents, pixels=pixels)
    yield from known


def to_pixels(frames: NDArray[np.uint8], device: torch.device) -> Tensor:
    """[T,H,W,3] uint8 -> [1,3,T,H,W] float32 in [0, 1]; `to_uint8` is the inverse."""
    return torch.from_numpy(frames).to(device).permute(3, 0, 1, 2)[None].float() / 255


class StoryText:
    """Cross-attention keys and values for each block of a story.

    Those of a prompt are kept as long as a later scene may come back to it; those of a blend belong to one block.
    """

    def __init__(self, transformer: WanTransformer, story: Story) -> None:
        self._transformer, self._story = transformer, story
        self._kept: dict[str, tuple[TextKV, TextKV]] = {}

    def at(self, block: int) -> tuple[TextKV, TextKV]:
        """Keys and values of a block's text; a blend is as timeline.py says. Ask once a block, in order.

        Returns: those of the text alone, and those of both passes of classifier-free guidance, which run as one
            (the same if there is no guidance).
        """
        script, prompts = self._story.script, self._story.prompts
        scene, weight = script.scene(block), float(script.weight(block))
        prompt = prompts[scene]
        if weight < 1:
            before = prompts[scene - 1].conditional
            return self._embed((1 - weight) * before + weight * prompt.conditional)
        if prompt.text not in self._kept:
            later = {prompt.text for prompt in prompts[scene:]}
            self._kept = {text: kv for text, kv in self._kept.items() if text in later}
            self._kept[prompt.text] = self._embed(prompt.conditional)
        return self._kept[prompt.text]

    def _embed(self, embeds: Tensor) -> tuple[TextKV, TextKV]:
        text = self._transformer.embed_text(embeds)
        empty = self._story.prompts[0].unconditional
        return text, text if empty is None else self._transformer.embed_text(torch.cat((embeds, empty)))


def as_story(model: VideoModel, prompt: str | Prompt | Script | Story, *, guided: bool) -> Story:
    """A story of whatever says what the video shows; text is encoded."""
    if isinstance(prompt, Story):
        return prompt
    if isinstance(prompt, Prompt):
        return Story(Script((prompt.text,)), (prompt,))
    return encode_script(model, Script((prompt,)) if isinstance(prompt, str) else prompt, guided=guided)


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
    )
    compress = BlockCompressor(model, compressor_kind(model, memory.compressor)) if layout.top_k else None
    decoder, transformer = model.codec.decoder(), model.transformer
    texts, history, monitor = StoryText(transformer, story), iter(past), Monitor(story.script)
    if state is not None:
        load_state(state, cache, decoder, compress, monitor)
    for i in range(cache.blocks, num_blocks):
        old, watch = next(history, None), Stopwatch(model.device)
        attempts = ATTEMPTS if guard == "retry" and old is None else 1
        with watch.stage("denoise"):
            text, guided = texts.at(i)
        for retry in range(attempts):
            before = decoder.state_dict() if attempts > 1 else {}
            with watch.stage("denoise"):
                context = cache.context(i, selected=None if old is None else old.selected)
                if old is not None:
                    x0 = old.latents.to(model.device, model.dtype)
                else:
                    x0 = new_latents(model, schedule, guided, context, first_latent, seed=seed, retry=retry)
            with watch.stage("clean"):
                kv = transformer.commit(x0, text, context)
            with watch.stage("decode"):
                pixels = decoder.decode(x0)
                if old is not None and old.pixels is not None:
                    pixels = old.pixels.to(pixels)
                frames = to_uint8(pixels)
            with watch.stage("trace"):
                health = monitor.look(i, x0, pixels, frames, given=old is not None)
            if not health.flags or retry + 1 == attempts:
                break
            decoder.load_state_dict(before)
        require_healthy(i, x0, health, guard=guard)
        with watch.stage("trace"):
            monitor.keep()
            record = record_of(cache, context, story.script, health, retry=retry)
        with watch.stage("compress"):
            backup = None if compress is None else compress(cache, i, x0, pixels, kv, text)
        with watch.stage("commit"):
            cache.commit(i, kv)
            if backup is not None:
                cache.add_backup(i, backup)
        yield Block(
            index=i,
            frames=frames,
            latents=x0,
            selected=context.selected.cpu(),
            recalled=record.recalled,
            cache=replace(cache.stats(), active=record.selected),
            seconds=watch.seconds,
            replayed=old is not None,
            record=replace(record, seconds=watch.rounded),
            state=partial(state_of, cache, decoder, compress, monitor),
        )


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


def layout_for(model: VideoModel, memory: MemoryOptions, grid: Grid, *, num_blocks: int) -> Layout:
    """The layout of a video without cuts and pins. Raises: LayoutError for a memory that is not possible."""
    trained = model.manifest.trained_frames
    return memory.layout(grid, num_blocks=num_blocks, trained_frames=trained, default_span="fit")


def latent_shape(model: VideoModel, layout: Layout) -> tuple[int, ...]:
    """[1,C,F,h,w] of a block."""
    grid = layout.grid
    channels = model.transformer.config.in_channels
    return (1, channels, grid.frames_per_block, grid.latent_rows, grid.latent_cols)


def state_of(
    cache: KVCache, decoder: StreamingDecoder, compress: BlockCompressor | None, monitor: Monitor
) -> dict[str, Tensor]:
    """All that a video carries from block to block, as safetensors takes it."""
    parts = {"cache": cache.state_dict(), "decoder": decoder.state_dict(), "monitor": monitor.state_dict()}
    if compress is not None:
        parts["compressor"] = compress.state_dict()
    return {
        f"{part}.{name}": value.to("cpu", copy=True).contiguous()
        for part, values in parts.items()
        for name, value in values.items()
    }


def load_state(
    state: Mapping[str, Tensor],
    cache: KVCache,
    decoder: StreamingDecoder,
    compress: BlockCompressor | None,
    monitor: Monitor,
) -> None:
    """The inverse of `state_of`. Raises: LayoutError or ValueError if it is the state of another kind of video."""
    parts: dict[str, dict[str, Tensor]] = {"cache": {}, "decoder": {}, "compressor": {}, "monitor": {}}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    cache.load_state_dict(parts["cache"])
    decoder.load_state_dict(parts["decoder"])
    monitor.load_state_dict(parts["monitor"])
    if compress is not None:
        compress.load_state_dict(parts["compressor"])


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
        pooled = None
        if self._network is not None and self._network.needs_pixels:
            pooled, self._pooled = lr_pixels(pixels, self._pooled)
        if not cache.needs_backup(i):
            return None
        if self._kind == "identity":
            return kv
        grid = cache.layout.grid
        if self._network is None:
            shape = (grid.frames_per_block, grid.rows, grid.cols)
            return replace(kv, k=pooled_kv(kv.k, *shape), v=pooled_kv(kv.v, *shape))
        tokens = None
        if pooled is not None:
            latents = encode_lr(self._model.codec, pooled.to(self._model.dtype))
            tokens = self._model.transformer.patch(latents.to(self._model.dtype))
        return self._model.transformer.commit_tokens(
            self._network(x0, tokens), text, cache.compressed_context(i)
        )

    def state_dict(self) -> dict[str, Tensor]:
        """What it remembers of the block before."""
        return {} if self._pooled is None else {"pooled": self._pooled}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state_dict`."""
        self._pooled = state["pooled"].to(self._model.device) if "pooled" in state else None


def compressor_kind(model: VideoModel, wanted: str) -> str:
    """The kind of compressor an option means: of weights given by name or folder, the branches they have.

    Raises: UsageError if the model was loaded without them.
    """
    if wanted in COMPRESSORS:
        return wanted
    if model.compressor is None:
        raise UsageError(
            f"{model.name} was loaded without the compressor {wanted}",
            hint="Give it to load_model(compressor=…), too.",
        )
    return model.compressor.config.branches


def branches(model: VideoModel, kind: str) -> Compressor:
    """The package's compressor with the wanted branches. LR alone needs no weights."""
    if model.compressor is not None and model.compressor.config.branches == kind:
        return model.compressor
    config = CompressorConfig(dim=model.transformer.config.dim, branches=kind)
    if model.compressor is not None:
        config = replace(model.compressor.config, branches=kind)
    with torch.device("meta"):
        network = Compressor(config)
    if network.hr is not None:
        trained = model.compressor.hr if model.compressor is not None else None
        catalog.check_compressor(model.name, "lr" if trained is None else "hr", kind)
        network.hr = trained
    return network.eval()


def to_uint8(pixels: Tensor) -> Tensor:
    """[1,3,T,H,W] in [0, 1] -> [T,H,W,3] uint8 on the CPU."""
    return pixels[0].permute(1, 2, 3, 0).mul(255).round().clamp(0, 255).to("cpu", torch.uint8)


ATTEMPTS = 3  # at a block under guard "retry", the first one included


class Monitor:
    """The health of a video's blocks, one after the other."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._kept: trace.Seen | None = None
        self._newest: trace.Seen | None = None

    def look(self, block: int, x0: Tensor, pixels: Tensor, frames: Tensor, *, given: bool) -> trace.Health:
        """Health of a block against the last one that was kept.

        Args:
            x0:     latents [1,C,F,h,w].  pixels: [1,3,T,H,W].  frames: [T,H,W,3], of these pixels.
            given:  the block was not made by the model now: its frames are as they should be, whatever they show.
        """
        if not bool(x0.isfinite().all() & pixels.sum().isfinite()):  # of values in [0, 1] a sum says as much
            return trace.Health(("nan",))
        may_jump = jump_expected(self._script, block)
        health, self._newest = trace.measure(frames.numpy(), self._kept, jump_expected=may_jump)
        return replace(health, flags=()) if given else health

    def keep(self) -> None:
        """The block looked at last belongs to the video."""
        self._kept = self._newest

    def state_dict(self) -> dict[str, Tensor]:
        """What the next block is compared with."""
        if self._kept is None:
            return {}
        measures = torch.tensor([self._kept.motion, self._kept.clipped], dtype=torch.float64)
        return {"last": torch.from_numpy(self._kept.last), "measures": measures}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state_dict`."""
        self._kept = trace.Seen(state["last"].numpy(), *state["measures"].tolist()) if state else None


def jump_expected(script: Script, block: int) -> bool:
    """Whether the picture may change at once in a block: it, or the one before, is cut to or changes the prompt.

    The block behind a change is the first that sees what the change made, and often completes it.
    """

    def changes(n: int) -> bool:
        return n in script.cuts or script.scene(n) != script.scene(n - 1) or script.weight(n) < 1

    return any(changes(n) for n in (block, block - 1) if n > 0)


def require_finite(x0: Tensor, block: int) -> None:
    """Raises: GenerationError if a block holds NaN or infinity."""
    if not bool(x0.isfinite().all()):
        raise GenerationError(
            f"block {block} came out as NaN: the model's numbers overflowed",
            hint="Try --dtype fp32, a lower --guidance, or another --seed.",
        )


def require_healthy(block: int, x0: Tensor, health: trace.Health, *, guard: str) -> None:
    """Raises: UnhealthyError for any flag under guard "stop"; GenerationError for NaN under any other."""
    if guard == "stop" and health.flags:
        raise UnhealthyError(
            f"block {block} is not healthy: {', '.join(health.flags)}",
            hint="Try another --seed, or --guard retry.",
        )
    require_finite(x0, block)
    if "nan" in health.flags:
        raise GenerationError(
            f"the frames of block {block} came out as NaN: the decoder's numbers overflowed",
            hint="Try --dtype fp32, another --vae, or another --seed.",
        )


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


def record_of(
    cache: KVCache, context: CacheContext, script: Script, health: trace.Health, *, retry: int
) -> trace.Record:
    """What the memory is for the block whose context is open, all layers having read it; without the timings."""
    layout, block = cache.layout, context.block
    view, slots, size = layout.view(block), layout.slots(block), cache.in_use()
    scores = None if context.scores is None else context.scores.tolist()
    bank, pins = cache.bank_blocks, layout.pins

    def floats(starts: Iterable[Fraction]) -> tuple[float, ...]:
        return tuple(float(start) for start in starts)

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
        selected=tuple(tuple(ids) for ids in context.selected.tolist()),
        scores=None if scores is None else tuple(tuple(trace.rounded(s) for s in row) for row in scores),
        degenerate=tuple(context.degenerate.nonzero().flatten().tolist()),
        pins=tuple(old for old in bank if old in pins),
        memory={
            "device": torch.cuda.memory_allocated(cache.device) if cache.device.type == "cuda" else 0,
            "resident": resident_bytes(),
        },
        health=health,
    )


@dataclass
class Stopwatch:
    """Wall-clock seconds of named stages; waits for the GPU so that a stage is charged for its own work."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @property
    def rounded(self) -> dict[str, float]:
        """Seconds to the microsecond, as they are written down."""
        return {name: round(value, 6) for name, value in self.seconds.items()}


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
        on_block:     called after every block with it and its wall-clock seconds.
        should_stop:  asked after every block; True ends the video there, finished and playable.
    Returns: what was made. Raises: as `stream_generate`, `video.VideoWriter` and `RunFolder`; what was written
        still plays. UnhealthyError only if there is no block before the unhealthy one.
    """
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
    first, stalled, spent, replayed, made = 0.0, 0.0, list[float](), 0, 0
    last: Block | None = None
    shown = Shown(grid) if history is None else history.shown
    encoding = Encoding.of(fps, (width, height), codec, crf, preset, metadata, story.script, shown, history)
    with open_writer(output, run, encoding, overwrite=overwrite) as writer:
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
            lead = Lead(writer, frames, groups=groups, is_new=run is None or not there, shown=shown)
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
            first = first or time.perf_counter() - started
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
            note_end(run, writer)
        blocks = last.index + 1 if unfinished else max(last.index + 1, shown.blocks_in(writer.blocks_written))
    if run is not None and not unfinished:
        close_run(run, writer)
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
    )


def open_history(
    request: PlanRequest, lengths: Lengths, *, fps: int, size: tuple[int, int], fit: str = "crop"
) -> History | None:
    """The video a request goes on with, opened; None if it goes on with none.

    Raises: UsageError or VideoError if it cannot be read, or is no longer as it was.
    """
    wanted = request.source
    if wanted is None:
        return None
    if not wanted.path.is_file():
        raise UsageError(
            f"there is no file {wanted.path}, and the video goes on with it",
            hint="Bring it back to that place.",
        )
    source = Source(
        wanted.path,
        fps=fps,
        size=size,
        fit=getattr(request, "fit", fit),
        start=parse_time(wanted.from_time or "0"),
        end=None if wanted.to_time is None else parse_time(wanted.to_time),
    )
    history = source.history(lengths, only_new=wanted.only_new)
    if history.shown != wanted.shown(lengths):
        raise UsageError(
            f"{wanted.path} is not the video it was: it has another length",
            hint="Bring back the file that was used.",
        )
    return history


def provenance_of(model: VideoModel, request: GenerateRequest, layout: Layout) -> Provenance:
    """What the file of a request is to say of itself."""
    manifest = model.manifest
    files = {name: record.sha256 for name, record in manifest.files.items()}
    for part, name in (("vae", "VAE"), ("compressor", "compressor")):
        own = manifest.part_hash(part) if part in manifest.parts else None
        used = model.hashes.get(part)
        if used not in (None, own) and part not in manifest.references:
            files[f"another {name}"] = used
    return Provenance(
        version=__version__,
        request={k: v for k, v in request.to_values().items() if k not in provenance.NOT_REPEATED},
        model=ModelRecord(
            name=manifest.name,
            version=manifest.version,
            files=files,
        ),
        layout=provenance.layout_values(layout),
        image_sha256=None if request.image is None else _file_hash(request.image),
        files_sha256={name: _file_hash(path) for name, path in provenance.files_of(request).items()},
        libraries=libraries(model, request),
    )


def libraries(model: VideoModel, request: GenerateRequest) -> dict[str, str]:
    """Versions of the libraries that results depend on."""
    names = ["torch", "transformers"] + (["diffusers"] if isinstance(model.codec, WanCodec) else [])
    if (model.quantize, request.quantize_text) != ("none", "none"):
        names.append("torchao")
    return {name: importlib.metadata.version(name) for name in names}


# -- the run folder ---------------------------------------------------------------------------------------------


def new_record(
    model: VideoModel, request: GenerateRequest, *, tags: Mapping[str, str], parent: str | None = None
) -> Record:
    """run.json of a new run.

    Args:
        request: with seed and output decided.
        tags:    of the video file; if there are any the run's id joins them.
        parent:  id of the run it takes blocks over from.
    """
    assert request.output is not None
    size = request.size or model.manifest.size
    name = runfolder.new_id(request.prompt)
    return Record(
        schema=runfolder.SCHEMA,
        id=name,
        version=__version__,
        created=datetime.now(UTC),
        prompt=request.prompt,
        output=str(request.output.absolute()),
        blocks=grid_for(model, size).blocks_for(request.seconds, model.manifest.fps),
        fps=model.manifest.fps,
        size=size,
        frames_per_block=model.manifest.cache.frames_per_block,
        request=request.to_values(),
        tags={**tags, "run": name} if tags else {},
        must=must_be_same(model, request),
        numerics=numerics(model),
        parent=parent,
    )


PICTURE = "picture of block {}"


def must_be_same(model: VideoModel, request: GenerateRequest, *, made: int = 0) -> dict[str, Any]:
    """What a block of this video depends on beside the numerics, as JSON values.

    made: blocks that are there already; the pictures they began as are not looked at.
    """
    grid = grid_for(model, request.size or model.manifest.size)
    memory = request.memory.with_defaults(model.manifest.cache.model_dump())
    blocks = grid.blocks_for(request.seconds, model.manifest.fps)
    layout = asdict(layout_for(model, memory, grid, num_blocks=blocks))
    if layout["rope_adjustment"]:
        del layout["rope_adjustment"]  # older runs do not name it and are equal
    pictures = request.pin_images if request.image is None else (request.image,)
    files = {PICTURE.format(n): path for n, path in enumerate(pictures) if n >= made}
    if request.embeddings is not None:
        files["embeddings"] = request.embeddings
    if request.source is not None:
        files["source video"] = request.source.path
    facts = {
        "packforcing": __version__,
        **libraries(model, request),
        "model": model.name,
        **{f"weights of {part}": sha256 for part, sha256 in model.hashes.items()},
        **{f"layout {name}": value for name, value in layout.items()},
        **{name: getattr(memory, name) for name in ("select", "compressed_context")},
        "compressor": compressor_kind(model, memory.compressor),
        "schedule": asdict(schedule_for(model, steps=request.steps, guidance=request.guidance)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": "torch scaled_dot_product_attention",
        "quantization": model.quantize,
        "quantization of text": request.quantize_text,
        "compile": "none",
        **{name: _file_hash(path) for name, path in files.items()},
    }
    values: dict[str, Any] = json.loads(json.dumps(facts, default=str))
    return values


def file_hash(path: Path) -> str:
    """sha256 of a file. Raises: OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_hash(path: Path) -> str:
    """sha256 of a file; a word for one that is gone, which is a difference, too."""
    try:
        return file_hash(path)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def is_other_memory(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two `must_be_same` have different memories: ids and snapshots of one mean nothing in the other."""
    names = {name for name in {*then, *now} if name.startswith("layout ")}
    return any(
        then.get(name) != now.get(name) for name in names | {"select", "compressor", "compressed_context"}
    )


def numerics(model: VideoModel) -> dict[str, Any]:
    """What equal bits depend on besides: the machine."""
    is_cuda = model.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(model.device) if is_cuda else "cpu",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if is_cuda else None,
        "matmul precision": torch.get_float32_matmul_precision(),
    }


@dataclass(frozen=True)
class Encoding:
    """How a video is encoded and what its file says; see `video.VideoWriter`."""

    fps: int
    size: tuple[int, int]
    codec: str
    crf: int
    preset: str | None
    metadata: Mapping[str, str]
    chapters: Sequence[tuple[int, str]]
    sound: Sound | None = None

    @classmethod
    def of(
        cls,
        fps: int,
        size: tuple[int, int],
        codec: str,
        crf: int,
        preset: str | None,
        metadata: Mapping[str, str],
        script: Script,
        shown: Shown,
        history: History | None,
    ) -> Encoding:
        """With the chapters and the sound that belong into the file."""
        placed = [
            (shown.frame_of(start) if start else 0, title)
            for start, title in script.changes
            if start >= shown.first
        ]
        if placed and placed[0][0]:  # what the file begins with began before it
            before = [title for start, title in script.changes if start < shown.first]
            placed = [(0, title) for title in before[-1:]] + placed
        chapters = placed if len(placed) > 1 else []
        sound = None
        if history is not None and history.source.reader.has_audio and not shown.only_new:
            sound = Sound(history.source.path, history.source.start, history.source.end)
        return cls(fps, size, codec, crf, preset, metadata, chapters, sound)


class Lead:
    """Puts the frames before a history's first block into the file, and into the folder of pictures.

    groups: of the file that are there already.
    """

    def __init__(
        self,
        writer: VideoWriter | PipeWriter,
        frames: FrameFolder | None,
        *,
        groups: int,
        is_new: bool,
        shown: Shown,
    ) -> None:
        self._writer, self._frames, self._groups, self._is_new = writer, frames, groups, is_new
        self._skipped = shown.only_new
        self._pieces, self._count = 0, 0

    def __call__(self, pixels: NDArray[np.uint8]) -> None:
        if self._skipped:
            return
        if self._frames is not None:
            self._frames.write(pixels, first=self._count, only_missing=not self._is_new)
        if self._pieces >= self._groups:
            self._writer.write(pixels)
        self._pieces, self._count = self._pieces + 1, self._count + len(pixels)


def open_writer(
    output: Path | str | BinaryIO, run: RunFolder | None, encoding: Encoding, *, overwrite: bool
) -> VideoWriter | PipeWriter:
    """A writer of `output` that has all whole blocks an earlier one left of this run's video, unchanged.

    They are in NAME.part.mp4; after Ctrl-C in NAME.mp4, whose packets are copied and which is replaced at the end.
    """
    options: dict[str, Any] = {
        "fps": encoding.fps,
        "width": encoding.size[0],
        "height": encoding.size[1],
        "codec": encoding.codec,
        "crf": encoding.crf,
        "preset": encoding.preset,
    }
    if not isinstance(output, Path | str):
        assert run is None, "a stream cannot be resumed"
        return PipeWriter(output, metadata=encoding.metadata, **options)
    output = Path(output)
    had = 0 if run is None else finished_blocks(run, output)
    writer = VideoWriter(
        output,
        **options,
        metadata=encoding.metadata,
        chapters=encoding.chapters,
        sound=encoding.sound,
        overwrite=overwrite or bool(had),
        owner="" if run is None else f"packforcing run {run.record.id}",
        resume=None if run is None else len(run.record.shown.groups(run.blocks)),
    )
    if run is not None and had and not writer.blocks_written:
        try:
            writer.copy(output, run.record.shown.groups(min(had, run.blocks)))
        except VideoError:
            writer.abort()
            raise
    return writer


def finished_blocks(run: RunFolder, output: Path) -> int:
    """How many blocks of this run the finished file `output` has; 0 if there is none or it is another's."""
    if not output.is_file():
        return 0
    try:
        video = VideoReader(output)
        frames, owner = video.num_frames, video.metadata.get("run")
    except VideoError:
        return 0
    record = run.record
    is_known = record.output == str(output.absolute()) and frames in (record.frames, record.closing)
    blocks = record.shown.blocks_of(frames) or 0
    return blocks if owner == record.id or (owner is None and is_known) else 0


@dataclass(frozen=True)
class Remaining:
    """What resuming a run takes: blocks to replay, and estimates from its trace; None where it has none."""

    blocks: int
    seconds: float | None
    rest_seconds: float | None


def replay_cost(run: RunFolder, *, keep: int | None = None, blocks: int | None = None) -> Remaining:
    """What is ahead when a run is resumed; or a branch of `blocks` blocks is made, of which it has `keep`."""
    snapshot = run.snapshot_blocks() if keep is None else 0  # a branch takes none over
    there, length = keep or run.blocks, blocks or run.record.blocks
    again = there - (snapshot if snapshot > run.record.other_memory else 0)
    stages = [record["seconds"] for record in run.trace() if isinstance(record.get("seconds"), dict)][-20:]
    if not stages:
        return Remaining(again, None, None)
    whole = sum(sum(stage.values()) for stage in stages) / len(stages)
    denoise = sum(stage.get("denoise", 0.0) for stage in stages) / len(stages)
    return Remaining(again, again * (whole - denoise), (length - there) * whole)


def finish(run: RunFolder) -> bool:
    """Finish the file of a run whose blocks are all made and encoded, its pictures too; needs no model.

    Returns: whether the file is finished now. Raises: as `video.VideoWriter`.
    """
    record, output = run.record, Path(run.record.output)
    if run.blocks < record.blocks:
        return False
    request = GenerateRequest.from_values(record.request)
    shown = record.shown
    frames = shown.frames_for(record.blocks)
    if request.frames is not None and FrameFolder(request.frames).lacks(frames):
        return False
    if finished_blocks(run, output) == record.blocks and not part_path(output).exists():
        if record.status != "finished":
            run.update(status="finished", frames=frames, closing=0)
        return True
    history = open_history(request, record.lengths, fps=record.fps, size=record.size)
    encoding = Encoding.of(
        record.fps,
        record.size,
        request.codec,
        request.crf,
        request.preset,
        record.tags,
        request.timeline.script(
            request.prompt, record.lengths, fps=record.fps, num_blocks=record.blocks, start=shown.history
        ),
        shown,
        history,
    )
    writer = open_writer(output, run, encoding, overwrite=request.overwrite)
    assert isinstance(writer, VideoWriter)
    if shown.blocks_in(writer.blocks_written) < record.blocks:
        writer.abort()
        return False
    note_end(run, writer)
    writer.close()
    close_run(run, writer)
    return True


def note_end(run: RunFolder, writer: VideoWriter | PipeWriter) -> None:
    """Before a file without tags gets its name, note in run.json what it will be: nothing else says whose it is."""
    if not run.record.tags:
        writer.flush()
        run.update(closing=writer.frames_written)


def close_run(run: RunFolder, writer: VideoWriter | PipeWriter) -> None:
    """Note in run.json how far the finished file goes."""
    blocks = run.record.shown.blocks_in(writer.blocks_written)
    status = "finished" if blocks == run.record.blocks else "stopped"
    run.update(status=status, output=str(writer.path.absolute()), frames=writer.frames_written, closing=0)


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
