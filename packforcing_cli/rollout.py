"""The algorithm: a prompt becomes a video, block by block, in a memory that does not grow.

`stream_generate` is the whole of it, top to bottom; `generate` writes what it yields into a file. State (cache,
decoder, pooled pixels) lives in local variables here; the model holds weights only.

    context -> denoise -> clean pass -> decode -> compress -> commit -> yield
       ^                                                        |
       +------------------- the next block ---------------------+

Source: PackForcing (arXiv 2603.25730); METHOD 2.3, 2.5.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from packforcing_cli import __version__, catalog, config, provenance
from packforcing_cli.cache import CacheContext, CacheStats, KVCache
from packforcing_cli.compressor import Compressor, CompressorConfig, pooled_kv
from packforcing_cli.config import GenerateRequest, MemoryOptions
from packforcing_cli.embeddings import UNCONDITIONAL, EmbeddingCache, EmbeddingFile, encode
from packforcing_cli.errors import GenerationError
from packforcing_cli.layout import Grid, Layout
from packforcing_cli.provenance import ModelRecord, Provenance
from packforcing_cli.registry import ModelSource, VideoModel
from packforcing_cli.sampler import NUM_TRAIN_TIMESTEPS, Schedule, denoise_block
from packforcing_cli.timeline import Script
from packforcing_cli.transformer import BlockKV, TextKV, WanTransformer
from packforcing_cli.vae import encode_lr, lr_pixels
from packforcing_cli.video import VideoWriter


@dataclass(frozen=True)
class Block:
    """One finished block.

    frames:   [T,H,W,3] uint8 RGB on the CPU.
    latents:  [1,C,F,h,w] clean latents, in the dtype the commit pass read.
    selected: [L,K] the compressed blocks each layer recalled, ascending.
    recalled: those of any layer, ascending.
    seconds:  of each stage: denoise, clean, decode, compress, commit.
    """

    index: int
    frames: Tensor
    latents: Tensor
    selected: Tensor
    recalled: tuple[int, ...]
    cache: CacheStats
    seconds: dict[str, float]


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

    stopped: whether it was asked to stop before the whole length was there.
    stall_seconds: waiting for the encoder.  block_seconds: of every block, in order.
    """

    path: Path
    frames: int
    blocks: int
    fps: int
    seed: int
    stopped: bool
    first_frame_seconds: float
    total_seconds: float
    stall_seconds: float
    block_seconds: tuple[float, ...]
    cache: CacheStats
    peak_memory_bytes: int


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
) -> Iterator[Block]:
    """Generate a video block by block; every block is yielded as soon as its frames and its memory are there.

    Args:
        num_blocks: length; `Layout.blocks_for` turns seconds into blocks.
        seed:       noise is a function of (seed, block, step).
        size:       (width, height) in pixels; None = the package's.
        first_latent: [1,C,1,h,w] what the video begins with, from `encode_image`: held while block 0 is denoised.
    Raises: UsageError or LayoutError before the first block; GenerationError if a block is not finite.
    """
    schedule = schedule or schedule_for(model)
    memory = (memory or MemoryOptions()).with_defaults(model.manifest.cache.model_dump())
    layout = memory.layout(
        grid_for(model, size or model.manifest.size),
        num_blocks=num_blocks,
        trained_frames=model.manifest.trained_frames,
        default_span="fit",
    )
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
    compress = BlockCompressor(model, memory.compressor) if layout.top_k else None
    decoder, transformer = model.codec.decoder(), model.transformer
    texts = StoryText(transformer, story)
    shape = (
        1,
        transformer.config.in_channels,
        layout.grid.frames_per_block,
        layout.grid.latent_rows,
        layout.grid.latent_cols,
    )
    for i in range(num_blocks):
        watch = Stopwatch(model.device)
        with watch.stage("denoise"):
            context, (text, guided) = cache.context(i), texts.at(i)
            held = first_latent if i == 0 else None
            x0 = denoise_block(
                partial(velocity, model, guided, context, held=held is not None),
                schedule,
                held=held,
                seed=seed,
                block=i,
                shape=shape,
                dtype=model.dtype,
                device=model.device,
            )
            require_finite(x0, i)
        with watch.stage("clean"):
            kv = transformer.commit(x0, text, context)
        with watch.stage("decode"):
            pixels = decoder.decode(x0)
        with watch.stage("compress"):
            backup = None if compress is None else compress(cache, i, x0, pixels, kv, text)
        with watch.stage("commit"):
            selected = context.selected.cpu()
            cache.commit(i, kv)
            if backup is not None:
                cache.add_backup(i, backup)
        yield Block(
            index=i,
            frames=to_uint8(pixels),
            latents=x0,
            selected=selected,
            recalled=tuple(sorted(set(selected.flatten().tolist()))),
            cache=cache.stats(),
            seconds=watch.seconds,
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


def require_finite(x0: Tensor, block: int) -> None:
    """Raises: GenerationError if a block holds NaN or infinity."""
    if not bool(x0.isfinite().all()):
        raise GenerationError(
            f"block {block} came out as NaN: the model's numbers overflowed",
            hint="Try --dtype fp32, a lower --guidance, or another --seed.",
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


def generate(
    model: VideoModel,
    prompt: str | Prompt | Script | Story,
    output: Path | str,
    *,
    seconds: float = 10.0,
    seed: int | None = None,
    size: tuple[int, int] | None = None,
    schedule: Schedule | None = None,
    memory: MemoryOptions | None = None,
    first_latent: Tensor | None = None,
    crf: int = 18,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    on_block: Callable[[Block, float], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Result:
    """Generate a video into an MP4 file; encoding runs beside generation.

    Args:
        seconds:     wanted length; the video has whole blocks (DESIGN 5).
        seed:        None = random.
        metadata:    tags of the file; None = prompt, seed, model and version.
        on_block:    called after every block with it and its wall-clock seconds.
        should_stop: asked after every block; True ends the video there, finished and playable.
    Returns: what was made. Raises: as `stream_generate` and `video.VideoWriter`; what was written still plays.
    """
    width, height = size or model.manifest.size
    grid = grid_for(model, (width, height))
    num_blocks, fps = grid.blocks_for(seconds, model.manifest.fps), model.manifest.fps
    seed = config.random_seed() if seed is None else seed
    schedule = schedule or schedule_for(model)
    story = as_story(model, prompt, guided=schedule.guidance != 1.0)
    if metadata is None:
        said = story.prompts[0].text
        metadata = {"prompt": said, "seed": str(seed), "model": model.name, "version": __version__}
    started = clock = time.perf_counter()
    first, stalled, spent, blocks, last = 0.0, 0.0, [], 0, None
    stream = stream_generate(
        model,
        story,
        num_blocks=num_blocks,
        seed=seed,
        size=(width, height),
        schedule=schedule,
        memory=memory,
        first_latent=first_latent,
    )
    with VideoWriter(
        Path(output),
        fps=fps,
        width=width,
        height=height,
        crf=crf,
        metadata=metadata,
        chapters=story.script.chapters(grid),
        overwrite=overwrite,
    ) as writer:
        for block in stream:
            first = first or time.perf_counter() - started
            waiting = time.perf_counter()
            writer.write(block.frames)
            stalled += time.perf_counter() - waiting
            blocks, last = blocks + 1, block
            now = time.perf_counter()
            spent.append(now - clock)
            clock = now
            if on_block is not None:
                on_block(block, spent[-1])
            if should_stop is not None and should_stop():
                break
    assert last is not None
    return Result(
        path=writer.path,
        frames=grid.frames_for(blocks),
        blocks=blocks,
        fps=fps,
        seed=seed,
        stopped=blocks < num_blocks,
        first_frame_seconds=first,
        total_seconds=time.perf_counter() - started,
        stall_seconds=stalled,
        block_seconds=tuple(spent),
        cache=last.cache,
        peak_memory_bytes=peak_memory_bytes(model.device),
    )


def provenance_of(model: VideoModel | ModelSource, request: GenerateRequest, layout: Layout) -> Provenance:
    """What the file of a request is to say of itself."""
    manifest = model.manifest
    return Provenance(
        version=__version__,
        request={k: v for k, v in request.to_values().items() if k not in provenance.NOT_REPEATED},
        model=ModelRecord(
            name=manifest.name,
            version=manifest.version,
            files={name: record.sha256 for name, record in manifest.files.items()},
        ),
        layout=provenance.layout_values(layout),
        image_sha256=None
        if request.image is None
        else hashlib.sha256(request.image.read_bytes()).hexdigest(),
    )


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
