"""Train the demo's transformer, text encoder and compressor by packed teacher forcing on rendered scenes.

A pool of scenes is rendered and encoded once. A step then draws three kinds of items:

    first    block 0 alone: where the one object goes is decided out of noise, so it gets most samples
    packed   consecutive blocks after block 0, random layouts: sinks, mids (random drops, random span), recent
    long     sinks, then up to 16 far blocks as compressed tokens only, then true neighbours, as at minute one

Scenes are stories (`world.sample_story`): every block has its own caption, visitors come and go, words change. In most
long items a visitor is back in a trained block that was away in the one before and was seen in far blocks: what it
looks like is then in the compressed tokens alone.

The loss is the plain flow-matching error of the velocity, with more weight on the few cells where a visitor stands; it
reaches the compressor through the keys and values of the mids.
Needs torch and transformers only.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from packforcing_cli import durable, rope, weights
from packforcing_cli.compressor import Compressor, CompressorConfig
from packforcing_cli.errors import UsageError
from packforcing_cli.layout import BlockView, Grid, Layout
from packforcing_cli.sampler import NUM_TRAIN_TIMESTEPS, shifted
from packforcing_cli.text import TextEncoder, build_encoder, load_tokenizer
from packforcing_cli.training import demo_text, loop, world
from packforcing_cli.training.muon import Muon
from packforcing_cli.training.packed import PackedItem, PackedView, packed_forward
from packforcing_cli.training.recipes import DemoFlow, FlowData, FlowTrain
from packforcing_cli.transformer import AloneContext, TextKV, TransformerConfig, WanTransformer
from packforcing_cli.vae import TinyAutoencoder, TinyAutoencoderConfig, TinyCodec, encode_lr, lr_pixels

FRAMES_PER_BLOCK = 4
MAX_MIDS = 16
EVALUATED_SIGMAS = (0.6, 0.9, 1.0)
EVALUATED_SCENES = {"first": 64, "short": 16, "long": 32}
_EVALUATED_SEED = 999  # of no process
DEFAULT_SPAN = Fraction(1)
SPANS = (DEFAULT_SPAN, DEFAULT_SPAN, DEFAULT_SPAN, Fraction(2), Fraction(4), Fraction(1, 4))
"""Slots a mid takes in training, drawn uniformly: the package's default half of the time."""
LONG_SINKS = 2
WHOLE_BLOCKS = 5
"""Blocks of a clip that is denoised at once: 20 latent frames, five seconds, as Self-Forcing's."""
TRAINED_FRAMES = int((LONG_SINKS + 2) * FRAMES_PER_BLOCK + MAX_MIDS * max(SPANS))
"""Slots of the widest context met in training: sinks, 16 mids at their full span, recent, current."""


@dataclass
class Models:
    """The modules that train together, and what they need around them."""

    transformer: WanTransformer
    compressor: Compressor
    text: TextEncoder
    grid: Grid

    def modules(self) -> dict[str, nn.Module]:
        return {
            "transformer": self.transformer,
            "compressor": self.compressor,
            "text_encoder": self.text.model,
        }


def build(recipe: DemoFlow, tokenizer_dir: Path, latent_channels: int) -> Models:
    """Fresh models of the recipe's sizes, initialised from its seed."""
    torch.manual_seed(recipe.train.seed)
    size = recipe.model
    text_config = demo_text.tiny_umt5_config()
    transformer = WanTransformer(
        TransformerConfig(
            num_layers=size.layers,
            num_attention_heads=size.heads,
            attention_head_dim=size.head_dim,
            ffn_dim=size.ffn_dim,
            in_channels=latent_channels,
            out_channels=latent_channels,
            text_dim=text_config.d_model,
        )
    )
    initialise(transformer)
    compressor = Compressor(
        CompressorConfig(
            dim=transformer.config.dim, in_channels=latent_channels, widths=size.compressor_widths
        )
    )
    encoder = build_encoder({"model_type": "umt5", **text_config.to_dict()})
    text = TextEncoder(encoder, load_tokenizer(tokenizer_dir), max_length=demo_text.DEMO_TEXT_LENGTH)
    return Models(
        transformer,
        compressor,
        text,
        Grid(
            frames_per_block=FRAMES_PER_BLOCK,
            rows=world.HEIGHT // 16,
            cols=world.WIDTH // 16,
            layers=size.layers,
            kv_dim=size.heads * size.head_dim,
            heads=size.heads,
            dtype_bytes=4,
        ),
    )


def initialise(transformer: WanTransformer) -> None:
    """Start as a near pass-through: head after patch embedding gives v = x_t; cross-attention adds nothing yet."""
    config = transformer.config
    _, ph, pw = config.patch_size
    cell = config.in_channels * ph * pw
    basis = nn.init.orthogonal_(torch.empty(config.dim, cell))  # [d, C*ph*pw]
    head = (
        basis.t()
        .reshape(config.in_channels, ph, pw, config.dim)
        .permute(1, 2, 0, 3)
        .reshape(cell, config.dim)
    )
    with torch.no_grad():
        transformer.patch_embedding.weight.copy_(basis.view_as(transformer.patch_embedding.weight))
        nn.init.zeros_(transformer.patch_embedding.bias)  # type: ignore[arg-type]
        # The final layer norm divides a token of norm sqrt(cell) by sqrt(cell / d); the head undoes it.
        transformer.proj_out.weight.copy_(head * (cell / config.dim) ** 0.5)
        nn.init.zeros_(transformer.proj_out.bias)
        for name, parameter in transformer.named_parameters():
            if ".attn2.to_out.0." in name:
                parameter.zero_()
            elif name.endswith(
                (".to_q.weight", ".to_k.weight", ".to_v.weight", ".proj.weight", ".net.2.weight")
            ):
                nn.init.xavier_uniform_(parameter)


# -- the latent pool --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """Encoded scenes of one length.

    latents: [n, T, C, F, h, w] float16, T blocks of F latent frames.
    lr:      [n, T, C, 2, h//4, w//4] float16 LR latents of each block.
    caption: [n, T] index of each block's caption in `world.story_captions()`.
    place:   [n, h, w] float16, share of each latent cell that the scene's visitor takes when it is there.
    here:    [n, T] 1 = the visitor is there, 0 = it is away or the scene has none.
    """

    latents: Tensor
    lr: Tensor
    caption: Tensor
    place: Tensor
    here: Tensor


def build_pool(
    path: Path,
    codec: TinyCodec,
    *,
    scenes: int,
    blocks: int,
    seed: int,
    visitor_share: float,
    switch_share: float,
    quick: bool,
    should_stop: Callable[[], bool] = lambda: False,
) -> Pool:
    """Render and encode `scenes` scenes of `blocks` blocks, or read them from `path` if it holds them already.

    Args:
        visitor_share, switch_share: of the scenes with a visitor, and of those with a switch of words.
        quick: of the visitors, see `world.sample_story`.
        should_stop: asked after every few scenes; True raises loop.Stopped.
    """
    wanted = {
        "scenes": str(scenes), "blocks": str(blocks), "seed": str(seed), "vae": fingerprint(codec),
        "story": f"{visitor_share:g} {switch_share:g} {quick}",
    }  # fmt: skip
    if path.is_file():
        with safe_open(path, framework="pt") as handle:
            if handle.metadata() == wanted:
                return Pool(**load_file(path))
    captions = {caption: n for n, caption in enumerate(world.story_captions())}
    generator = loop.step_generator(seed, blocks)
    kept: dict[str, list[Tensor]] = {name: [] for name in ("latents", "lr", "caption", "place", "here")}
    batch, done = max(1, 32 // blocks), 0
    while done < scenes:
        drawn = [
            draw_scene(generator, blocks, visitor_share, switch_share, quick)
            for _ in range(min(batch, scenes - done))
        ]
        pixels = world.render_batch(drawn, [0] * len(drawn), world.first_frame(blocks))
        z, small = encode_scene(codec, pixels.permute(0, 4, 1, 2, 3).float() / 255)
        kept["latents"].append(z.half())
        kept["lr"].append(small.half())
        said = [[captions[caption] for caption in scene.block_captions(blocks)] for scene in drawn]
        kept["caption"].append(torch.tensor(said))
        kept["place"].append(torch.stack([_place(scene) for scene in drawn]).half())
        here = [[bool(scene.visitor_at(n)) for n in range(blocks)] for scene in drawn]
        kept["here"].append(torch.tensor(here, dtype=torch.uint8))
        done += len(drawn)
        if should_stop():
            raise loop.Stopped
    tensors = {name: torch.cat(parts) for name, parts in kept.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable.replacing(path) as part:
        save_file(tensors, part, wanted)
    return Pool(**tensors)


def build_pools(
    recipe: DemoFlow, out: Path, codec: TinyCodec, workers: loop.Workers, should_stop: Callable[[], bool]
) -> dict[str, Pool]:
    """A recipe's pools by name, in `out/pool/`; every process has scenes of its own.

    Raises: loop.Stopped if `should_stop` says so; pools that are whole are kept.
    """
    share = {name: max(1, scenes // workers.count) for name, scenes in _scenes(recipe.data).items() if scenes}
    return _build_pools(recipe.data, out, codec, share, str(workers.rank), workers.rank, should_stop)


def build_evaluated(
    recipe: DemoFlow, out: Path, codec: TinyCodec, should_stop: Callable[[], bool]
) -> dict[str, Pool]:
    """Scenes for evaluation by name, as `build_pools` and beside them; no process trains on them.

    Errors on scenes that were trained on say little: where a visitor returned, such a scene had 0.4 and others 1.1.
    """
    share = {name: min(EVALUATED_SCENES[name], n) for name, n in _scenes(recipe.data).items() if n}
    return _build_pools(recipe.data, out, codec, share, "evaluated", _EVALUATED_SEED, should_stop)


def _scenes(data: FlowData) -> dict[str, int]:
    return {"first": data.first_scenes, "short": data.short_scenes, "long": data.long_scenes}


def _build_pools(
    data: FlowData,
    out: Path,
    codec: TinyCodec,
    scenes: Mapping[str, int],
    suffix: str,
    seed: int,
    should_stop: Callable[[], bool],
) -> dict[str, Pool]:
    blocks = {"first": 1, "short": data.short_blocks, "long": data.long_blocks}
    return {
        name: build_pool(
            out / "pool" / f"{name}-{suffix}.safetensors",
            codec,
            scenes=count,
            blocks=blocks[name],
            seed=data.seed * 1000 + seed,
            visitor_share=data.visitor_share,
            switch_share=data.switch_share,
            quick=name == "short",
            should_stop=should_stop,
        )
        for name, count in scenes.items()
    }


def draw_scene(
    generator: torch.Generator, blocks: int, visitor_share: float, switch_share: float, quick: bool
) -> world.Scene:
    """A scene of training: plain, with a visitor, with a switch of words, or both."""
    visitor, switch = (
        torch.rand(2, generator=generator) < torch.tensor((visitor_share, switch_share))
    ).tolist()
    return world.sample_story(
        generator, num_blocks=blocks, visitor=visitor, switch=switch and blocks > 1, quick=quick
    )


def _place(scene: world.Scene) -> Tensor:
    """[h, w] share of each latent cell that the scene's visitor takes."""
    if scene.visitor is None:
        return torch.zeros(world.HEIGHT // 8, world.WIDTH // 8)
    return nn.functional.avg_pool2d(world.visitor_coverage(scene.visitor)[None, None], 8)[0, 0]


def fingerprint(codec: TinyCodec) -> str:
    """Hash of an autoencoder's weights and latent statistics: latents of different ones must not be mixed."""
    digest = hashlib.sha256(
        repr((codec.module.config.latents_mean, codec.module.config.latents_std)).encode()
    )
    for name, value in sorted(codec.module.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def encode_scene(codec: TinyCodec, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and LR latents of whole clips, block by block.

    The LR latents are of the rendered pixels. A rollout pools decoded ones: its LR latents differ from these by 2.4 to
    2.7 % (RMS).

    Args:
        pixels: [B,3,T,H,W] in [0, 1], T = 16*blocks - 3.
    Returns: ([B,blocks,C,F,h,w], [B,blocks,C,2,h//4,w//4]), normalised.
    """
    encoder = codec.encoder()
    latents, lr, start, previous = [], [], 0, None
    for length in _block_lengths(pixels.shape[2]):
        block = pixels[:, :, start : start + length]
        latents.append(encoder.encode(block))
        pooled, previous = lr_pixels(block, previous)
        lr.append(encode_lr(codec, pooled))
        start += length
    return torch.stack(latents, 1), torch.stack(lr, 1)


def _block_lengths(frames: int) -> Iterator[int]:
    """Pixel frames of each block: 13, then 16 each."""
    first = 4 * FRAMES_PER_BLOCK - 3
    yield first
    yield from itertools.repeat(4 * FRAMES_PER_BLOCK, (frames - first) // (4 * FRAMES_PER_BLOCK))


# -- items ------------------------------------------------------------------------------------------------------


def _layout(models: Models, sinks: int, span: Fraction) -> Layout:
    return Layout(
        grid=models.grid,
        sink_blocks=sinks,
        recent_blocks=1,
        top_k=MAX_MIDS,
        bank=None,
        mid_span=span,
        trained_frames=TRAINED_FRAMES,
    )


def strict_item(models: Models, blocks: int, generator: torch.Generator) -> PackedItem:
    """Consecutive blocks 0 .. blocks-1 under a random layout; every mid is dropped with probability 0.2."""
    sinks = 1 + int(torch.rand((), generator=generator) < 0.7)
    layout = _layout(models, sinks, _draw(SPANS, generator))
    views = []
    for i in range(blocks):
        seen = layout.view(i)
        kept = tuple(m for m in seen.mid if torch.rand((), generator=generator) >= 0.2)
        views.append(packed_view(layout, i, tuple(seen.sink), kept, tuple(seen.recent)))
    # All mids are there, also dropped ones: on a CPU products of ever new sizes cost more than a few tokens.
    return PackedItem(
        tuple(range(blocks)), tuple(range(sinks, blocks - 2)), tuple(views), tuple(range(sinks))
    )


def long_item(models: Models, mids: int, generator: torch.Generator, *, far_share: float = 0.0) -> PackedItem:
    """Two sinks, `mids` far blocks as compressed tokens only, then three true neighbours, of which two are trained.

    Args:
        far_share: how often the trained blocks see no recent block, and in half of these no sinks either: all that no
                   caption tells is then in the compressed tokens alone.
    """
    sinks = LONG_SINKS
    layout = _layout(models, sinks, _draw(SPANS, generator))
    far, bare = torch.rand(2, generator=generator).tolist()
    seen = tuple(range(sinks)) if far >= far_share or bare < 0.5 else ()
    compressed = tuple(range(sinks, sinks + mids))
    near = (sinks + mids, sinks + mids + 1, sinks + mids + 2)
    views = [packed_view(layout, b, tuple(range(b)), (), ()) for b in range(sinks)]
    views.append(packed_view(layout, near[0], tuple(range(sinks)), compressed, ()))
    views.append(packed_view(layout, near[1], seen, compressed, () if far < far_share else (near[0],)))
    later = (*compressed, near[0])[-MAX_MIDS:]
    views.append(packed_view(layout, near[2], seen, later, () if far < far_share else (near[1],)))
    full = (*range(sinks), *near)
    return PackedItem(full, (*compressed, near[0]), tuple(views), tuple(range(sinks)))


def long_scene(
    mids: int,
    blocks: int,
    generator: torch.Generator,
    *,
    here: Sequence[int] = (),
    recall: float = 0.0,
    close: int = 1,
) -> tuple[int, ...]:
    """Which blocks of a scene of `blocks` the blocks of a `long_item` are, in order.

    Args:
        here:   for each block of the scene, whether its visitor is there.
        recall: how often, where the scene allows it, one of the last two neighbours is a block to which the visitor
                returns, having been away in the one before and seen in one of the mids.
        close:  so many of the last blocks that saw it are among the mids then.
    Of the neighbours the first is only context: its own predecessor is not in the item.
    """
    sinks = LONG_SINKS
    first_last = sinks + mids + 2
    last = first_last + int(torch.randint(blocks - first_last, (), generator=generator))
    returns = [(back, seen) for back, seen in _returns(here, sinks) if back + 1 >= first_last]
    wanted, which, late = torch.rand(3, generator=generator).tolist()
    seen: tuple[int, ...] = ()
    if returns and wanted < recall:
        back, seen = returns[int(which * len(returns))]
        last = min(max(back + int(late < 0.5), first_last), blocks - 1)
    candidates = range(sinks, last - 2)
    order = [candidates[n] for n in torch.randperm(len(candidates), generator=generator).tolist()]
    order.sort(
        key=lambda block: block not in seen[-close:]
    )  # the visitor's last blocks before are among them
    return (*range(sinks), *sorted(order[:mids]), last - 2, last - 1, last)


def _returns(here: Sequence[int], sinks: int) -> list[tuple[int, tuple[int, ...]]]:
    """Blocks a visitor returns to, each with the blocks after the sinks it was there in and that can be far by then."""
    found = []
    for block in range(sinks + 2, len(here)):
        seen = tuple(n for n in range(sinks, block - 1) if here[n])
        if here[block] and not here[block - 1] and seen:
            found.append((block, seen))
    return found


def packed_view(
    layout: Layout, block: int, sink: tuple[int, ...], mid: tuple[int, ...], recent: tuple[int, ...]
) -> PackedView:
    """A view with the slots the layout gives to that many sinks, active mids and recent blocks."""
    seen = BlockView(block, range(len(sink)), range(len(mid)), range(len(recent)), len(mid))
    return PackedView(block, sink, mid, recent, layout.slots(seen))


def _draw(choices: tuple[Fraction, ...], generator: torch.Generator) -> Fraction:
    return choices[int(torch.randint(len(choices), (), generator=generator))]


# -- the loss ---------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """One step's randomness in order: a generator and the pools it draws from."""

    generator: torch.Generator
    device: torch.device

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator).to(self.device)

    def randn(self, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)

    def choose(self, pool: Pool, count: int) -> Tensor:
        """Numbers of `count` random scenes."""
        return torch.randint(len(pool.caption), (count,), generator=self.generator)

    def sigmas(self, count: int, shift: float) -> Tensor:
        """Stratified, shifted noise levels [count]."""
        s = (
            torch.randperm(count, generator=self.generator) + torch.rand(count, generator=self.generator)
        ) / count
        return torch.tensor([shifted(float(x), shift) for x in s]).to(self.device)


def embed(models: Models, batch: Batch, captions: Tensor, dropped: Tensor) -> tuple[TextKV, Tensor]:
    """Keys and values of the captions that occur, and the row of each.

    Args:
        captions: [...] indices into `world.story_captions()`.
        dropped:  [...] bool, where the empty prompt is read instead.
    Returns: the text of U prompts, and rows [...] in it.
    """
    used, rows = torch.where(dropped, -1, captions).unique(return_inverse=True)
    texts = world.story_captions()
    prompts = ["" if n < 0 else texts[n] for n in used.tolist()]
    prompts += [""] * (-len(prompts) % 8)  # few different sizes
    tokens = models.text.tokenize(prompts)
    embeds = models.text.encode_tokens(tokens.ids.to(batch.device), tokens.mask.to(batch.device))
    return models.transformer.embed_text(embeds), rows.to(batch.device)


def visitor_cells(pool: Pool, chosen: Tensor, device: torch.device) -> Tensor:
    """[B,h,w] 1 in the latent cells where the visitor of a scene stands, 0 elsewhere."""
    return (pool.place[chosen] > 0.05).float().to(device)


@dataclass(frozen=True)
class Remembered:
    """What the view of each target knows of its visitor, each [B,J] bool.

    known:   it is in the view, or away in the target: how its cells look can be known.
    returns: it is here in the target, in the view, and not in its newest block: only a memory has it.
    """

    known: Tensor
    returns: Tensor


def remembered(here: Tensor, item: PackedItem, targets: Sequence[int]) -> Remembered:
    """See `Remembered`; `here` is [B,blocks of the item]."""
    known, returns = [], []
    for target in targets:
        view = item.views[item.full.index(target)]
        now = here[:, target] > 0
        seen = (here[:, [*view.sink, *view.mid, *view.recent]] > 0).any(1)
        newest = (here[:, list(view.recent or view.sink[-1:])] > 0).any(1)
        known.append(seen | ~now)
        returns.append(now & seen & ~newest)
    return Remembered(torch.stack(known, 1), torch.stack(returns, 1))


@dataclass(frozen=True)
class Alone:
    """Clips that see nothing but themselves.

    x0: [B,1,C,F,h,w].  captions: [B] indices into `world.story_captions()`.
    """

    x0: Tensor
    captions: Tensor

    def velocity(self, models: Models, batch: Batch, x: Tensor, sigma: Tensor, dropped: Tensor) -> Tensor:
        """Velocities [B,D,C,F,h,w] of noisy x [B,D,C,F,h,w] at levels sigma [B,D].

        dropped: [B,D] bool, which of them read the empty prompt.
        """
        B, D, _, frames = x.shape[:4]
        text, rows = embed(models, batch, self.captions[:, None].expand(-1, D), dropped)
        own = TextKV(tuple((k[rows.flatten()], v[rows.flatten()]) for k, v in text.layers))
        g = models.grid
        alone = AloneContext(rope.grid_positions(0.0, frames, g.rows, g.cols, device=batch.device))
        timesteps = (NUM_TRAIN_TIMESTEPS * sigma).flatten()[:, None].expand(-1, frames)
        v: Tensor = models.transformer(x.flatten(0, 1), timesteps, own, alone)
        return v.unflatten(0, (B, D))


@dataclass(frozen=True)
class Packed:
    """Blocks of clips in packed contexts: the `targets` of one item, of B scenes.

    x0:       [B,J,C,F,h,w] clean latents of the targets.
    clean:    [B,M,C,F,h,w] the history, some of it slightly noisy, as past errors will make it.
    latents:  [B,T,C,F,h,w] of all blocks of the item, and lr: [B,T,C,2,h//4,w//4], which the compressor reads.
    captions: [B,T] of all blocks.
    known, returns: [B,J], see `Remembered`.
    cells:    [B,h,w] where the visitor of a scene stands.
    """

    item: PackedItem
    targets: tuple[int, ...]
    x0: Tensor
    clean: Tensor
    latents: Tensor
    lr: Tensor
    captions: Tensor
    known: Tensor
    returns: Tensor
    cells: Tensor

    def velocity(self, models: Models, batch: Batch, x: Tensor, sigma: Tensor, dropped: Tensor) -> Tensor:
        """As `Alone.velocity`; x has D = n*J blocks, n draws of all targets one after another.

        Its history never loses a caption: so is guidance at inference, where the two passes share one history.
        """
        pieces = (*self.item.full, *self.item.compressed)
        draws = x.shape[1] // len(self.targets)
        captions = self.captions[:, [*pieces, *(self.targets * draws)]]
        lost = torch.cat((torch.zeros(len(dropped), len(pieces), dtype=torch.bool), dropped), 1)
        text, rows = embed(models, batch, captions, lost)
        return packed_forward(
            models.transformer,
            self.item,
            models.grid,
            clean=self.clean,
            compressed=compress(models, self.latents, self.lr, self.item.compressed),
            noisy=x,
            timesteps=NUM_TRAIN_TIMESTEPS * sigma,
            text=text,
            prompts=rows,
            targets=self.targets,
        )

    def weighted(self, error: Tensor, data: FlowData) -> Tensor:
        """Means [B,n,J] of squared errors [B,n*J,C,F,h,w].

        Where a visitor stands errors count `visitor_weight` times, `return_weight` times when it returns, and once
        when it comes for the first time: its look is a guess then.
        """
        error = error.mean((2, 3)).unflatten(1, (-1, len(self.targets)))  # [B,n,J,h,w]
        weights = torch.where(self.known, data.visitor_weight, 1.0)
        weights = torch.where(self.returns, data.return_weight, weights).to(error.device)
        extra = (weights - 1)[:, :, None, None] * self.cells[:, None]
        return (error * (1 + extra[:, None])).mean((3, 4))

    def recall(self, error: Tensor) -> float | None:
        """Mean of squared errors [B,n*J,C,F,h,w] where a visitor returns; None if none does."""
        error = error.detach().mean((2, 3)).unflatten(1, (-1, len(self.targets)))
        back = self.returns.to(error.device)[:, :, None, None] * self.cells[:, None]
        back = back[:, None].expand_as(error)
        return float((error * back).sum() / back.sum()) if bool(back.any()) else None


def first_clips(batch: Batch, pool: Pool, count: int) -> Alone:
    """Block 0 of `count` scenes."""
    chosen = batch.choose(pool, count)
    return Alone(pool.latents[chosen, :1].float().to(batch.device), pool.caption[chosen, 0])


def whole_clips(batch: Batch, pool: Pool, count: int) -> Alone | None:
    """The first `WHOLE_BLOCKS` blocks of scenes in which one caption says what is seen in all of them, as one clip.

    Every latent frame sees all others, so the same weights judge whole clips, as a teacher of `self-forcing` does.
    Returns: None if the pool has no such scene.
    """
    captions = pool.caption[:, :WHOLE_BLOCKS]
    constant = (captions == captions[:, :1]).all(1).nonzero()[:, 0]
    if not len(constant):
        return None
    chosen = constant[torch.randint(len(constant), (count,), generator=batch.generator)]
    blocks = pool.latents[chosen, :WHOLE_BLOCKS].float().to(batch.device)
    return Alone(blocks.transpose(1, 2).flatten(2, 3)[:, None], captions[chosen, 0])


def packed_clips(
    batch: Batch,
    pool: Pool,
    item: PackedItem,
    scenes: Sequence[Sequence[int]],
    chosen: Tensor,
    *,
    targets: tuple[int, ...],
    context_noise: float,
) -> Packed:
    """`targets` of an item, of B chosen scenes.

    Args:
        scenes:        for each of the B, which of its blocks the blocks of the item are.
        context_noise: most noise on the history, of half of the clips; its timestep stays 0.
    """
    rows, here = chosen[:, None], torch.tensor(scenes)  # [B,1], [B,T]
    latents, lr = (t[rows, here].float().to(batch.device) for t in (pool.latents, pool.lr))
    history, B = latents[:, list(item.full)], len(chosen)
    level = batch.rand(B, 1, 1, 1, 1, 1) * context_noise * (batch.rand(B, 1, 1, 1, 1, 1) < 0.5)
    seen = remembered(pool.here[rows, here], item, targets)
    return Packed(
        item,
        targets,
        x0=latents[:, list(targets)],
        clean=(1 - level) * history + level * batch.randn(history.shape),
        latents=latents,
        lr=lr,
        captions=pool.caption[rows, here],
        known=seen.known,
        returns=seen.returns,
        cells=visitor_cells(pool, chosen, batch.device),
    )


def flow_errors(models: Models, batch: Batch, clips: Alone | Packed, recipe: DemoFlow, draws: int) -> Tensor:
    """Squared velocity errors [B,n*J,C,F,h,w] of `draws` noise draws n of all blocks J."""
    x0 = clips.x0.repeat(1, draws, 1, 1, 1, 1)
    sigma = batch.sigmas(x0.shape[0] * x0.shape[1], recipe.shift).view(x0.shape[:2])
    eps = batch.randn(x0.shape)
    wide = sigma[:, :, None, None, None, None]
    dropped = torch.rand(x0.shape[:2], generator=batch.generator) < recipe.data.caption_dropout
    v = clips.velocity(models, batch, (1 - wide) * x0 + wide * eps, sigma, dropped)
    return (v - (eps - x0)).square()


def compress(models: Models, latents: Tensor, lr: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """Compressed tokens [B,K,N_c,d] of some blocks of [B,T,C,F,h,w] latents and [B,T,C,2,h',w'] LR latents."""
    B = latents.shape[0]
    if not blocks:
        return latents.new_zeros(B, 0, models.grid.compressed_tokens, models.transformer.config.dim)
    chosen = list(blocks)
    tokens = models.transformer.patch(lr[:, chosen].flatten(0, 1))
    return models.compressor(latents[:, chosen].flatten(0, 1), tokens).unflatten(0, (B, len(chosen)))


Errors = Callable[["Alone | Packed", int], Tensor]
"""(clips, noise draws of each block) -> squared errors [B,draws*J,C,F,h,w]."""


def step_loss(
    models: Models, pools: dict[str, Pool], recipe: DemoFlow, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """Loss of one step and its parts by kind of item; every noisy block counts the same."""
    batch = Batch(generator, next(models.transformer.parameters()).device)

    def errors(clips: Alone | Packed, draws: int) -> Tensor:
        return flow_errors(models, batch, clips, recipe, draws)

    with torch.autocast(batch.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        return mixed_loss(models, batch, pools, recipe.data, errors, whole=errors)


def mixed_loss(
    models: Models, batch: Batch, pools: dict[str, Pool], data: FlowData, errors: Errors, *, whole: Errors
) -> tuple[Tensor, dict[str, float]]:
    """Draw the items of a step and take their errors; `whole` those of whole clips.

    Returns: the mean over all noisy blocks, and the parts by kind of item.
    """
    losses: list[Tensor] = []
    parts: dict[str, float] = {}
    for name, clips, draws in items_of_step(models, batch, pools, data):
        error = (whole if name == "whole" else errors)(clips, draws)
        recall = None
        if isinstance(clips, Packed):
            loss, recall = clips.weighted(error, data), clips.recall(error)
        else:
            loss = error.mean((2, 3, 4, 5))
        losses.append(loss.flatten())
        parts[name] = round(float(loss.detach().mean()), 4)
        if recall is not None:
            parts[f"{name} recall"] = round(recall, 4)
    return torch.cat(losses).mean(), parts


def items_of_step(
    models: Models, batch: Batch, pools: dict[str, Pool], data: FlowData, *, mids: int | None = None
) -> Iterator[tuple[str, Alone | Packed, int]]:
    """Draw the items of a step one after another: their kind, the clips, and how many noise draws each block gets.

    Args:
        mids: far blocks of an item with such; None = drawn.
    """
    generator = batch.generator
    if data.first_clips:
        yield "first", first_clips(batch, pools["first"], data.first_clips), 1
    if data.packed_clips:
        item = strict_item(models, data.packed_blocks, generator)
        blocks = tuple(range(data.packed_blocks))
        chosen = batch.choose(pools["short"], data.packed_clips)
        clips = packed_clips(
            batch, pools["short"], item, [blocks] * len(chosen), chosen,
            targets=blocks[1:], context_noise=data.context_noise,
        )  # fmt: skip
        yield "packed", clips, data.packed_draws
    if data.long_clips and float(torch.rand((), generator=generator)) < data.long_probability:
        drawn = 4 * (1 + int(torch.randint(MAX_MIDS // 4, (), generator=generator)))
        far = min(drawn if mids is None else mids, (data.long_blocks - LONG_SINKS - 3) // 4 * 4)
        item = long_item(models, far, generator, far_share=data.far_share)
        clips = long_clips(batch, pools["long"], item, far, data, data.long_clips, recall=data.recall_share)
        yield "long", clips, data.long_draws
    if data.whole_probability and float(torch.rand((), generator=generator)) < data.whole_probability:
        found = whole_clips(batch, pools["short"], data.whole_clips)
        if found is not None:
            yield "whole", found, 1


def long_clips(
    batch: Batch, pool: Pool, item: PackedItem, mids: int, data: FlowData, count: int, *, recall: float
) -> Packed:
    """The last two neighbours of a `long_item` with `mids` far blocks, of `count` scenes."""
    chosen = batch.choose(pool, count)
    scenes = [
        long_scene(
            mids, data.long_blocks, batch.generator, here=here, recall=recall, close=data.recall_blocks
        )
        for here in pool.here[chosen].tolist()
    ]
    return packed_clips(
        batch, pool, item, scenes, chosen, targets=item.full[-2:], context_noise=data.context_noise
    )


# -- the run ----------------------------------------------------------------------------------------------------


def optimizers_of(modules: Mapping[str, nn.Module], settings: FlowTrain) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside layers, AdamW for everything else.

    What reads compressed tokens begins with a norm, so nothing keeps them small: at the rate of the rest, and without
    decay, convolutions grew until their tokens were hundreds of times those of the LR path and all alike.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    compressor = list(modules["compressor"].parameters()) if settings.compressor_learning_rate else []
    apart = {id(parameter) for parameter in compressor}
    for module in modules.values():
        for name, parameter in module.named_parameters():
            if id(parameter) in apart:
                continue
            inside = parameter.ndim == 2 and ("blocks." in name or ".block." in name)
            (matrices if inside and "relative_attention_bias" not in name else others).append(parameter)
    adam = torch.optim.AdamW(others, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    if compressor:
        adam.add_param_group(
            {
                "params": compressor,
                "lr": settings.compressor_learning_rate,
                "weight_decay": settings.compressor_weight_decay,
            }
        )
    if settings.muon_learning_rate is None:
        adam.add_param_group({"params": matrices, "weight_decay": settings.weight_decay})
        return [adam]
    muon = Muon(matrices, lr=settings.muon_learning_rate, weight_decay=settings.weight_decay)
    return [adam, muon]


def package_folder(name: str) -> Path:
    """Folder of a package a recipe names; "package" is the demo's own."""
    return Path(__file__).resolve().parent.parent / "demo" if name == "package" else Path(name)


def load_codec(recipe: DemoFlow) -> TinyCodec:
    """The trained autoencoder the recipe names. Raises: UsageError if there is none."""
    folder = package_folder(recipe.vae) / "vae"
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"no trained autoencoder in {folder}", hint="Run: packforcing train demo-vae --out runs/demo-vae"
        )
    values = weights.read_config(folder)
    values.pop("_class_name", None)
    model = TinyAutoencoder(TinyAutoencoderConfig.from_dict(values))
    model.load_state_dict(weights.read_tensors(folder, device=torch.device("cpu"), dtype=torch.float32))
    return TinyCodec(model)


def facts_of(recipe: DemoFlow, codec: TinyCodec, workers: loop.Workers) -> dict[str, Any]:
    """What a checkpoint can only be continued with; `init` and `fresh` count before the first step alone."""
    values = recipe.model_dump(mode="json", exclude={"init", "fresh"})
    if recipe.data.recall_blocks == 1:  # what older checkpoints do not name
        del values["data"]["recall_blocks"]
    if recipe.train.compressor_learning_rate is None:
        del values["train"]["compressor_weight_decay"]
    own = {"workers": workers.count, "vae": fingerprint(codec)}  # each process has scenes of its own
    return loop.facts_of(values) | own


def train(
    recipe: DemoFlow,
    out: Path,
    *,
    accept: bool = False,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Run or resume the recipe in `out`; the result is the model package `out/package/`.

    Args:
        accept:      go on from checkpoints of another recipe, such as one with another mix of items, and say so in log
                     and package.
        on_log:      told every line of the log.
        should_stop: asked after every step; True ends with a checkpoint.
    Returns: the figures; without "result" when it was stopped.
    """
    settings = recipe.train
    if settings.threads:
        torch.set_num_threads(settings.threads)
    workers = loop.Workers.start()
    device = workers.device
    codec = load_codec(recipe)
    tokenizer_dir = out / f"tokenizer{workers.rank}"
    demo_text.build_demo_tokenizer(tokenizer_dir)
    models = build(recipe, tokenizer_dir, codec.facts.latent_channels)
    modules = {name: module.to(device).train() for name, module in models.modules().items()}
    if recipe.init:
        start_from(recipe, modules)
    state = loop.TrainingState(
        modules, loop.MovingAverage(modules, settings.average), optimizers_of(modules, recipe.train)
    )
    facts = facts_of(recipe, codec, workers)
    loop.check_facts(out / "checkpoints", facts, accept=accept)
    with loop.Log(out / f"metrics{workers.rank or ''}.jsonl", on_log) as log:
        log.write(event="pool")
        pools = build_pools(recipe, out, codec, workers, should_stop or (lambda: False))
        evaluated, stopped = dict[str, Pool](), False
        if workers.rank == 0:
            try:
                evaluated = build_evaluated(recipe, out, codec, should_stop or (lambda: False))
            except loop.Stopped:
                stopped = True
        if workers.any_wants(stopped):
            raise loop.Stopped
        finished = loop.run(
            state,
            settings,
            lambda generator: step_loss(models, pools, recipe, generator),
            out=out,
            facts=facts,
            accept=accept,
            workers=workers,
            log=log,
            evaluate=lambda: {
                f"sigma {sigma:g}": mean_error(models, evaluated, recipe, sigma) for sigma in EVALUATED_SIGMAS
            },
            should_stop=should_stop,
        )
        figures: dict[str, Any] = {"steps": state.step}
        if finished and workers.rank == 0:
            figures |= write_result(recipe, state, models, codec, tokenizer_dir, out)
            log.write(event="done", **figures)
    workers.stop()
    return figures


def write_result(
    recipe: DemoFlow,
    state: loop.TrainingState,
    models: Models,
    codec: TinyCodec,
    tokenizer_dir: Path,
    out: Path,
    *,
    averaged: bool = True,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `out/package/` from the averaged weights, or from the last ones."""
    from packforcing_cli.training import demo_package

    for name, module in models.modules().items():
        if averaged:
            module.load_state_dict(state.average.state_of(name))
        module.eval()
    facts = {
        "recipe": recipe.kind,
        "steps": state.step,
        "weights": "averaged" if averaged else "last",
        "settings": recipe.model_dump(mode="json", exclude={"vae"}),
        "data": "packforcing_cli.training.world, rendered; no other data",
        "vae": fingerprint(codec),
        **({"changed on the way": state.changes} if state.changes else {}),
        **(provenance or {}),
    }
    demo_package.write(
        out / "package", models, codec, tokenizer_dir,
        schedule=demo_package.schedule(recipe.shift), provenance=facts,
    )  # fmt: skip
    return {"result": str(out / "package")}


def pack_checkpoint(
    recipe: DemoFlow, out: Path, *, averaged: bool = True, provenance: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write `out/package/` from the newest checkpoint of a run, finished or not.

    Args:
        averaged:   take the moving average; False = the last weights, better soon after the data mix was changed.
        provenance: entries that replace those of the recipe, such as the phases of a run.
    Raises: UsageError if the run has no checkpoint.
    """
    codec = load_codec(recipe)
    tokenizer_dir = out / "tokenizer0"
    demo_text.build_demo_tokenizer(tokenizer_dir)
    models = build(recipe, tokenizer_dir, codec.facts.latent_channels)
    modules = models.modules()
    state = loop.TrainingState(
        modules, loop.MovingAverage(modules, recipe.train.average), optimizers_of(modules, recipe.train)
    )
    if not loop.load_checkpoint(out / "checkpoints", state, None):
        raise UsageError(
            f"{out} has no checkpoint to pack", hint="Train first: packforcing train demo-flow --out DIR"
        )
    figures = write_result(
        recipe, state, models, codec, tokenizer_dir, out, averaged=averaged, provenance=provenance
    )
    return {"steps": state.step, **figures}


def start_from(recipe: DemoFlow, modules: dict[str, nn.Module]) -> None:
    """Load the weights of a package into fresh modules; words it does not know keep their fresh embeddings.

    Modules of `recipe.fresh` stay as they are.

    Raises: UsageError if it lacks a part.
    """
    folder = package_folder(recipe.init)
    for name, module in modules.items():
        if not (folder / name).is_dir():
            raise UsageError(
                f"{folder} has no {name} weights to start from", hint="Use init = '' or another package."
            )
        if name in recipe.fresh:
            continue
        values = weights.read_tensors(folder / name, device=torch.device("cpu"), dtype=torch.float32)
        if name == "text_encoder":
            assert isinstance(module.shared, nn.Embedding)
            rows = known_words(values["shared.weight"], module.shared.weight.detach(), folder / "tokenizer")
            values |= {"shared.weight": rows, "encoder.embed_tokens.weight": rows}
        module.load_state_dict(values)


def known_words(old: Tensor, fresh: Tensor, tokenizer_dir: Path) -> Tensor:
    """Embeddings [V,C] of the vocabulary of today: those of a package for the words its tokenizer has, else fresh ones.

    Raises: UsageError if the tokenizer cannot be read.
    """
    path = tokenizer_dir / "tokenizer.json"
    try:
        vocabulary: dict[str, int] = json.loads(path.read_text("utf-8"))["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} has no words to start from: {error}", hint="Use init = '' or another package."
        ) from error
    rows = fresh.clone()
    for word, number in demo_text.demo_vocabulary().items():
        if word in vocabulary:
            rows[number] = old[vocabulary[word]]
    return rows


def mean_error(
    models: Models, pools: dict[str, Pool], recipe: DemoFlow, sigma: float, *, count: int = 32
) -> dict[str, float]:
    """Velocity error at one noise level with fixed noise: block 0 alone and the later blocks of a strict item.

    The pools are those of `build_evaluated`, and `count` clips of one block are taken, a quarter as many strict items
    and half as many long ones.

    "recall" is the error where a visitor returns, and "far recall" the same where far, compressed blocks have seen it
    (and in some scenes the sinks); they are there if the pools have visitors. "other memory" is "far recall" with the
    compressed tokens of another scene: as long as the two are alike compressed blocks tell nothing. "token scale" is
    how large compressed tokens are, as a multiple of the LR path's.
    """
    batch = _FixedSigma(
        loop.step_generator(recipe.train.seed, -3), next(models.transformer.parameters()).device
    )
    batch.level = sigma
    data, far, other = recipe.data, None, None
    with (
        torch.no_grad(),
        torch.autocast(batch.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"),
    ):
        first = flow_errors(models, batch, first_clips(batch, pools["first"], count), recipe, 1)
        item = strict_item(models, data.packed_blocks, batch.generator)
        blocks = tuple(range(data.packed_blocks))
        chosen = batch.choose(pools["short"], max(1, count // 4))
        later = packed_clips(
            batch, pools["short"], item, [blocks] * len(chosen), chosen,
            targets=blocks[1:], context_noise=data.context_noise,
        )  # fmt: skip
        error = flow_errors(models, batch, later, recipe, 1)
        tokens = compress(models, later.latents, later.lr, blocks)
        plain = models.transformer.patch(later.lr.flatten(0, 1))
        if data.long_clips:
            item, mids = long_item(models, 4, batch.generator), 4
            clips = long_clips(batch, pools["long"], item, mids, data, max(1, count // 2), recall=1.0)
            noise = batch.generator.get_state()
            far = clips.recall(flow_errors(models, batch, clips, recipe, 1))
            batch.generator.set_state(noise)
            mixed = replace(clips, latents=clips.latents.roll(1, 0), lr=clips.lr.roll(1, 0))
            other = clips.recall(flow_errors(models, batch, mixed, recipe, 1))
    figures = {"first": float(first.mean()), "later": float(later.weighted(error, data).mean())}
    found = {"recall": later.recall(error), "far recall": far, "other memory": other}
    figures |= {name: value for name, value in found.items() if value is not None}
    figures["token scale"] = float(tokens.float().std() / plain.float().std())
    return {name: round(value, 4) for name, value in figures.items()}


class _FixedSigma(Batch):
    level: float = 1.0

    def sigmas(self, count: int, shift: float) -> Tensor:
        return torch.full((count,), self.level, device=self.device)
