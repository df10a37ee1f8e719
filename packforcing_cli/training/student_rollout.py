"""The student's own rollout, with gradients: the real cache, and one pass of every block through which they flow.

Self-forcing generates a clip with the cache of inference. Of the denoising steps of a block one, the exit step, has a
graph; its x0 is the block. Everything before it, the clean pass and the cache have none, so the memory of a graph does
not grow with what was seen:

    block i    step 0 .. exit-1       no graph, in the cache's context
               exit step              graph: own tokens, and the active mids through the compressor once more
               clean pass, backup     no graph, into the cache

The gradient reaches the compressor (and the transformer, if wanted) through the active mids: their compressed tokens
are made and run through all layers again, all of a block's in one pass, with a graph; everything else in the context
stands still. A pass with a graph reads no buffer of the cache, which will have moved on when a layer is run again in
the backward pass: it reads the raw keys and values that the clean passes left, shared by all blocks that see them, and
turns them to their slots as it goes. Source: docs/method.md 7.2, 7.5; Self-Forcing
(pipeline/self_forcing_training.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from packforcing_cli import rope
from packforcing_cli.cache import CacheContext, KVCache
from packforcing_cli.compressor import Compressor
from packforcing_cli.layout import Layout, Position
from packforcing_cli.sampler import NUM_TRAIN_TIMESTEPS
from packforcing_cli.transformer import BlockKV, TextKV, WanTransformer, weights_fixed
from packforcing_cli.vae import Codec, encode_lr, lr_pixels


@dataclass(frozen=True)
class Rollout:
    """What was generated.

    latents: [B,C,F,h,w] of the graded blocks, one after another, with their graph.
    prefix:  blocks before them, which have none.
    mids:    most mids a graded block attended in any layer.
    start:   [B,C,1,h,w] the last picture of the first graded latent frame, as a video that begins with it has it;
             None without a prefix, where the first latent frame is such a one already.
    """

    latents: Tensor
    prefix: int
    mids: int
    start: Tensor | None = None


@dataclass(frozen=True)
class _Part:
    """Keys before RoPE and values of some tokens, one pair a layer, each [B,S,N,D] or [1,S,N,D]; their rotation."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    cos: Tensor
    sin: Tensor

    def read(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Turned keys and values of a layer, with as many rows as `like`."""
        keys = rope.rotate(self.keys[layer], self.cos, self.sin)
        rows = like.shape[0]
        return keys.expand(rows, -1, -1, -1), self.values[layer].expand(rows, -1, -1, -1)


class StandingContext:
    """A context that stays as it was, for passes with a graph. Satisfies `transformer.Context`.

    positions: [S,3] of the own tokens.
    """

    def __init__(self, positions: Tensor, parts: Sequence[_Part], *, dtype: torch.dtype) -> None:
        """`dtype`: of the keys and values that are given."""
        self.positions = positions
        self._parts, self._dtype = parts, dtype

    def layer(self, layer: int, k: Tensor, v: Tensor, q_sum: Tensor) -> tuple[Tensor, Tensor]:
        """As `transformer.Context.layer`; the gradient reaches the own tokens and the parts that have a graph."""
        pairs = [(k, v), *(part.read(layer, k) for part in self._parts)]
        keys, values = zip(*pairs, strict=True)
        return torch.cat([t.to(self._dtype) for t in keys], 1), torch.cat(
            [t.to(self._dtype) for t in values], 1
        )


@dataclass
class Student:
    """What a rollout runs: the network, the compressor, the frozen codec."""

    transformer: WanTransformer
    compressor: Compressor
    codec: Codec


@dataclass(frozen=True)
class _Past:
    """What the compressor reads of a block, latents [B,C,F,h,w] and LR latents [B,C,2,h//4,w//4]; what it made."""

    latents: Tensor
    lr: Tensor | None
    kv: BlockKV


def rollout(
    student: Student,
    text: TextKV,
    layout: Layout,
    *,
    noise: Sequence[Sequence[Tensor]],
    sigmas: Sequence[float],
    exit_step: int,
    graded: int,
    select: str = "affinity-recent",
    gradient: str = "all",
    products: torch.dtype | None = None,
) -> Rollout:
    """Generate a clip; the last `graded` blocks have a graph.

    Args:
        text:      of the prompt; with its graph if the text projections are to learn.
        layout:    its grid has the bytes of a number in the cache.
        noise:     for every block its noise at every step, [B,C,F,h,w] each.
        sigmas:    of a few-step student; the last leads to x0.
        exit_step: which step of the graded blocks has the graph and is the last, shared by all of them.
        gradient:  through the active mids to "all" weights, to the "compressor" alone, or "none".
        products:  dtype of matrix products and of the cache; weights and latents keep theirs. None = the noise's.
    Raises: ValueError for an exit step that does not exist, or more graded blocks than there are.
    """
    if not 0 <= exit_step < len(sigmas):
        raise ValueError(f"exit step {exit_step} of {len(sigmas)}")
    if not 0 < graded <= len(noise):
        raise ValueError(f"{graded} graded blocks of {len(noise)}")
    if gradient not in ("all", "compressor", "none"):
        raise ValueError(f"gradient {gradient!r}: all, compressor or none")
    num_blocks, first = len(noise), noise[0][0]
    dtype = products or first.dtype
    cache = KVCache(
        layout,
        num_blocks=num_blocks,
        dtype=dtype,
        device=first.device,
        batch=first.shape[0],
        select=select,
    )
    net = _Net(student, dtype, narrow=dtype != first.dtype)
    fixed = TextKV(tuple((k.detach(), v.detach()) for k, v in text.layers))
    decoder, pooled = student.codec.decoder(), None
    whole: dict[int, BlockKV] = {}
    past: dict[int, _Past] = {}
    clips: list[Tensor] = []
    most, prefix = 0, num_blocks - graded
    start: Tensor | None = None
    for i in range(num_blocks):
        is_graded = i >= prefix
        context = cache.context(i)
        last = exit_step if is_graded else len(sigmas) - 1
        x = noise[i][0]
        with torch.no_grad():
            for step in range(last):
                x0 = net.x0(fixed, context, x, sigmas[step])
                x = (1 - sigmas[step + 1]) * x0 + sigmas[step + 1] * noise[i][step + 1]
        if is_graded:
            if not last and select == "affinity":  # a layer chooses in the first pass over the block
                with torch.no_grad():
                    net.x0(fixed, context, x, sigmas[0])
            most = max(most, context.selected.shape[1])
            standing = _standing(net, fixed, layout, context, whole, past, gradient)
            x0 = net.x0(text, standing, x, sigmas[last])
            clips.append(x0)
        else:
            with torch.no_grad():
                x0 = net.x0(fixed, context, x, sigmas[last])
        x0 = x0.detach()
        # Nothing reads what the last block would leave, and no later block recalls the one before it.
        recalled = cache.needs_backup(i) and i + 2 < num_blocks
        pixels = None
        with torch.no_grad():
            if (student.compressor.needs_pixels and i + 2 < num_blocks) or 0 < prefix >= i:
                pixels = decoder.decode(x0)
                if prefix and i == prefix:
                    start = _as_first(student.codec, pixels).to(x0)
            if i + 1 == num_blocks:
                break
            kv = net.commit(x0, fixed, context)
            backup, pooled = _backup(net, fixed, cache, i, x0, pixels, pooled, recalled=recalled)
            cache.commit(i, kv)
            if backup is not None:
                cache.add_backup(i, backup.kv)
                past[i] = backup
            whole[i] = kv
            seen = layout.view(i + 1)
            whole = {n: kv for n, kv in whole.items() if n in seen.sink or n in seen.recent}
    return Rollout(torch.cat(clips, 2), prefix, most, start)


class _Net:
    """Passes of the student, their products in a dtype of their own."""

    def __init__(self, student: Student, dtype: torch.dtype, *, narrow: bool) -> None:
        self.student, self.dtype, self._narrow = student, dtype, narrow

    def _products(self, device: torch.device) -> torch.autocast:
        # Entered anew for every pass: what it keeps of a pass without a graph would be used in one with a graph.
        return torch.autocast(device.type, self.dtype if self._narrow else None, enabled=self._narrow)

    def x0(self, text: TextKV, context: CacheContext | StandingContext, x: Tensor, sigma: float) -> Tensor:
        """The clean block a noisy one [B,C,F,h,w] seems to be."""
        timesteps = torch.full(
            (x.shape[0], x.shape[2]), NUM_TRAIN_TIMESTEPS * sigma, dtype=torch.float64, device=x.device
        )
        with self._products(x.device):
            velocity: Tensor = self.student.transformer(x, timesteps, text, context)
        return x - sigma * velocity.to(x.dtype)

    def commit(self, x0: Tensor, text: TextKV, context: CacheContext) -> BlockKV:
        """Keys and values of a clean block."""
        with self._products(x0.device):
            return self._stored(self.student.transformer.commit(x0, text, context))

    def compressed(self, tokens: Tensor, text: TextKV, context: Any) -> BlockKV:
        """Keys and values of compressed tokens [B,N_c,d]."""
        with self._products(tokens.device):
            return self._stored(self.student.transformer.commit_tokens(tokens, text, context))

    def tokens(self, latents: Tensor, lr: Tensor | None) -> Tensor:
        """Compressed tokens [B,N_c,d] of a block."""
        with self._products(latents.device):
            lr_tokens = None if lr is None else self.student.transformer.patch(lr)
            made: Tensor = self.student.compressor(latents, lr_tokens)
        return made.to(latents.dtype)

    def _stored(self, kv: BlockKV) -> BlockKV:
        return BlockKV(kv.k.to(self.dtype), kv.v.to(self.dtype), kv.q_sum)


def _as_first(codec: Codec, pixels: Tensor) -> Tensor:
    """Latents [B,C,1,h,w] of a video that begins with the last picture of a block's first latent frame.

    Args:
        pixels: [B,3,T,H,W] of a block that is not the first.
    """
    encoder, at = codec.encoder(), codec.facts.temporal_stride
    found = encoder.encode(pixels[:, :, at - 1 : at])
    tail = encoder.flush()
    return found if tail is None else torch.cat((found, tail), 2)


def _backup(
    net: _Net,
    text: TextKV,
    cache: KVCache,
    i: int,
    x0: Tensor,
    pixels: Tensor | None,
    pooled: Tensor | None,
    *,
    recalled: bool,
) -> tuple[_Past | None, Tensor | None]:
    """The compressed form of a block that will be recalled, and its last pooled frame."""
    lr = None
    if net.student.compressor.needs_pixels and pixels is not None:
        small, pooled = lr_pixels(pixels, pooled)
        if recalled:
            lr = encode_lr(net.student.codec, small.to(x0.dtype)).to(x0.dtype)
    if not recalled:
        return None, pooled
    kv = net.compressed(net.tokens(x0, lr), text, cache.compressed_context(i))
    return _Past(x0, lr, kv), pooled


def _standing(
    net: _Net,
    text: TextKV,
    layout: Layout,
    context: CacheContext,
    whole: Mapping[int, BlockKV],
    past: Mapping[int, _Past],
    gradient: str,
) -> StandingContext:
    """The context of a block; its active mids made again with a graph.

    Args:
        whole: raw keys and values of the sink and recent blocks.
        past:  what can be recalled.
    """
    i, positions = context.block, context.positions
    view, slots = layout.view(i), layout.slots(i)
    starts = [
        *zip(view.sink, slots.sink_starts, strict=True),
        *zip(view.recent, slots.recent_starts, strict=True),
    ]
    parts = [_part(whole[block], _block_positions(layout, start, positions)) for block, start in starts]
    if not context.selected.shape[1]:
        return StandingContext(positions, parts, dtype=net.dtype)
    chosen = context.selected.tolist()
    blocks = sorted(set(chain.from_iterable(chosen)))
    made = {block: past[block].kv for block in blocks}
    if gradient != "none":
        made = _made_again(net, text, layout, i, positions, whole, past, blocks, gradient)
    cells = [cell for at in slots.mid_starts for cell in layout.compressed_positions(at, slots.span)]
    keys = tuple(torch.cat([made[m].k[layer] for m in ids], 1) for layer, ids in enumerate(chosen))
    values = tuple(torch.cat([made[m].v[layer] for m in ids], 1) for layer, ids in enumerate(chosen))
    mids = _Part(keys, values, *rope.angles(_tensor(cells, positions), keys[0].shape[-1]))
    return StandingContext(positions, [*parts, mids], dtype=net.dtype)


def _made_again(
    net: _Net,
    text: TextKV,
    layout: Layout,
    i: int,
    positions: Tensor,
    whole: Mapping[int, BlockKV],
    past: Mapping[int, _Past],
    blocks: Sequence[int],
    gradient: str,
) -> dict[int, BlockKV]:
    """Keys and values of compressed blocks, with a graph, for block i.

    All in one pass: layers must run equally often in all processes, whatever is selected in each.
    """
    network, batch = net.student.transformer, past[blocks[0]].latents.shape[0]
    sinks = zip(layout.view(i).sink, layout.slots(i).sink_starts, strict=True)
    cells = layout.compressed_positions(layout.context_start, layout.grid.frames_per_block)
    seen = StandingContext(
        _tensor(cells, positions),
        [
            _part(_rows_of(whole[block], len(blocks)), _block_positions(layout, start, positions))
            for block, start in sinks
        ],
        dtype=net.dtype,
    )
    texts = TextKV(tuple((_rows(k, len(blocks)), _rows(v, len(blocks))) for k, v in text.layers))
    with weights_fixed(network if gradient == "compressor" else None):
        tokens = torch.cat([net.tokens(past[block].latents, past[block].lr) for block in blocks])
        together = net.compressed(tokens, texts, seen)
    parts = zip(*(t.split(batch, 1) for t in (together.k, together.v, together.q_sum)), strict=True)
    return {block: BlockKV(*part) for block, part in zip(blocks, parts, strict=True)}


def _part(kv: BlockKV, positions: Tensor) -> _Part:
    return _Part(tuple(kv.k), tuple(kv.v), *rope.angles(positions, kv.k.shape[-1]))


def _block_positions(layout: Layout, start: Fraction, like: Tensor) -> Tensor:
    grid = layout.grid
    return rope.grid_positions(float(start), grid.frames_per_block, grid.rows, grid.cols, device=like.device)


def _rows_of(kv: BlockKV, count: int) -> BlockKV:
    """[L,B,...] -> [L,count*B,...]; nothing is copied where B is 1, which every row then reads."""
    if kv.k.shape[1] == 1:
        return kv
    return BlockKV(*(t.repeat(1, count, *(1 for _ in t.shape[2:])) for t in (kv.k, kv.v, kv.q_sum)))


def _rows(tensor: Tensor, count: int) -> Tensor:
    """[B,...] -> [count*B,...]."""
    if tensor.shape[0] == 1:
        return tensor.expand(count, *tensor.shape[1:])
    return tensor.repeat(count, *(1 for _ in tensor.shape[1:]))


def _tensor(cells: Sequence[Position], like: Tensor) -> Tensor:
    rows = [[float(axis) for axis in cell] for cell in cells]
    return torch.tensor(rows, dtype=torch.float64, device=like.device)
