"""The student's own rollout, with gradients: the real cache, and one pass of every block through which they flow.

Self-forcing generates a clip with the cache of inference. Of the denoising steps of a block one, the exit step, has a
graph; its x0 is the block. Everything before it, the clean pass and the cache have none, so the memory of a graph does
not grow with what was seen:

    block i    step 0 .. exit-1       no graph, in the cache's context
               exit step              graph: own tokens, and the active mids through the compressor once more
               clean pass, backup     no graph, into the cache

The gradient reaches the compressor (and the transformer, if wanted) through the active mids: their compressed tokens
are made and run through all layers again, with a graph; everything else in the context stands still. What a pass reads
is copied out of the cache first, because a checkpointed pass reads it again in the backward pass, when the cache has
moved on. Source: docs/method.md 7.2, 7.5; Self-Forcing (pipeline/self_forcing_training.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from packforcing_cli import rope
from packforcing_cli.cache import CacheContext, KVCache
from packforcing_cli.compressor import Compressor
from packforcing_cli.layout import Layout
from packforcing_cli.sampler import NUM_TRAIN_TIMESTEPS
from packforcing_cli.transformer import BlockKV, TextKV, WanTransformer
from packforcing_cli.vae import Codec, encode_lr, lr_pixels


@dataclass(frozen=True)
class Rollout:
    """What was generated.

    latents: [B,C,F,h,w] of the graded blocks, one after another, with their graph.
    prefix:  blocks before them, which have none.
    mids:    most mids a graded block attended in any layer.
    """

    latents: Tensor
    prefix: int
    mids: int


@dataclass(frozen=True)
class _Snapshot:
    """A context's keys and values, copied, one pair a layer; [B,S,N,D]: sink, recent, mids, in this order."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class StandingContext:
    """A context that stays as it was, for passes with a graph. Satisfies `transformer.Context`.

    positions: [S,3] of the own tokens.
    """

    def __init__(self, positions: Tensor, past: _Snapshot, mids: _Snapshot | None = None) -> None:
        """`mids` take the place of the last tokens of `past`, as many as they have."""
        self.positions = positions
        self._past, self._mids = past, mids

    def layer(self, layer: int, k: Tensor, v: Tensor, q_sum: Tensor) -> tuple[Tensor, Tensor]:
        """As `transformer.Context.layer`; the gradient reaches the own tokens and the mids."""
        keys, values = self._past.keys[layer], self._past.values[layer]
        if self._mids is None:
            return torch.cat((k, keys), 1), torch.cat((v, values), 1)
        mid_k, mid_v = self._mids.keys[layer], self._mids.values[layer]
        kept = keys.shape[1] - mid_k.shape[1]
        return torch.cat((k, keys[:, :kept], mid_k), 1), torch.cat((v, values[:, :kept], mid_v), 1)


@dataclass
class Student:
    """What a rollout runs: the network, the compressor, the frozen codec."""

    transformer: WanTransformer
    compressor: Compressor
    codec: Codec


@dataclass(frozen=True)
class _Past:
    """What the compressor reads of a block: latents [B,C,F,h,w] and LR latents [B,C,2,h//4,w//4]."""

    latents: Tensor
    lr: Tensor | None


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
    checkpointing: bool = False,
) -> Rollout:
    """Generate a clip; the last `graded` blocks have a graph.

    Args:
        text:      of the prompt; with its graph if the text projections are to learn.
        noise:     for every block its noise at every step, [B,C,F,h,w] each.
        sigmas:    of a few-step student; the last leads to x0.
        exit_step: which step of the graded blocks has the graph and is the last, shared by all of them.
        gradient:  through the active mids to "all" weights, to the "compressor" alone, or "none".
        checkpointing: run every graded pass again in the backward pass instead of keeping it.
    Raises: ValueError for an exit step that does not exist, or more graded blocks than there are.
    """
    if not 0 <= exit_step < len(sigmas):
        raise ValueError(f"exit step {exit_step} of {len(sigmas)}")
    if not 0 < graded <= len(noise):
        raise ValueError(f"{graded} graded blocks of {len(noise)}")
    if gradient not in ("all", "compressor", "none"):
        raise ValueError(f"gradient {gradient!r}: all, compressor or none")
    network, num_blocks = student.transformer, len(noise)
    first = noise[0][0]
    cache = KVCache(
        layout,
        num_blocks=num_blocks,
        dtype=first.dtype,
        device=first.device,
        batch=first.shape[0],
        select=select,
    )
    fixed = TextKV(tuple((k.detach(), v.detach()) for k, v in text.layers))
    decoder, pooled = student.codec.decoder(), None
    past: dict[int, _Past] = {}
    clips: list[Tensor] = []
    most = 0
    for i in range(num_blocks):
        is_graded = i >= num_blocks - graded
        context = cache.context(i)
        last = exit_step if is_graded else len(sigmas) - 1
        x = noise[i][0]
        with torch.no_grad():
            for step in range(last):
                x0 = _x0(network, fixed, context, x, sigmas[step])
                x = (1 - sigmas[step + 1]) * x0 + sigmas[step + 1] * noise[i][step + 1]
        if is_graded:
            if not last and select == "affinity":  # a layer chooses in the first pass over the block
                with torch.no_grad():
                    _x0(network, fixed, context, x, sigmas[0])
            most = max(most, context.selected.shape[1])
            standing = _standing(student, fixed, cache, layout, context, x.shape[0], past, gradient)
            if checkpointing:
                x0 = checkpoint(
                    _x0,
                    network,
                    text,
                    standing,
                    x,
                    sigmas[last],
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                x0 = _x0(network, text, standing, x, sigmas[last])
            clips.append(x0)
        else:
            with torch.no_grad():
                x0 = _x0(network, fixed, context, x, sigmas[last])
        x0 = x0.detach()
        if i + 1 == num_blocks:
            break  # nothing reads what it would leave
        with torch.no_grad():
            kv = network.commit(x0, fixed, context)
            backup, pooled = _backup(student, fixed, cache, i, x0, decoder.decode(x0), pooled, past, kv)
            cache.commit(i, kv)
            if backup is not None:
                cache.add_backup(i, backup)
    return Rollout(torch.cat(clips, 2), num_blocks - graded, most)


def _x0(
    network: WanTransformer, text: TextKV, context: CacheContext | StandingContext, x: Tensor, sigma: float
) -> Tensor:
    timesteps = torch.full(
        (x.shape[0], x.shape[2]), NUM_TRAIN_TIMESTEPS * sigma, dtype=torch.float64, device=x.device
    )
    velocity: Tensor = network(x, timesteps, text, context)
    return x - sigma * velocity


def _backup(
    student: Student,
    text: TextKV,
    cache: KVCache,
    i: int,
    x0: Tensor,
    pixels: Tensor,
    pooled: Tensor | None,
    past: dict[int, _Past],
    kv: BlockKV,
) -> tuple[BlockKV | None, Tensor | None]:
    """The compressed keys and values of a block, and its last pooled frame; remembers what the compressor read."""
    lr = None
    if student.compressor.needs_pixels:
        small, pooled = lr_pixels(pixels, pooled)
        if cache.needs_backup(i):
            lr = encode_lr(student.codec, small.to(x0.dtype)).to(x0.dtype)
    if not cache.needs_backup(i):
        return None, pooled
    past[i] = _Past(x0, lr)
    tokens = _tokens(student, past[i])
    return student.transformer.commit_tokens(tokens, text, cache.compressed_context(i)), pooled


def _tokens(student: Student, block: _Past) -> Tensor:
    lr_tokens = None if block.lr is None else student.transformer.patch(block.lr)
    tokens: Tensor = student.compressor(block.latents, lr_tokens)
    return tokens


def _standing(
    student: Student,
    text: TextKV,
    cache: KVCache,
    layout: Layout,
    context: CacheContext,
    batch: int,
    past: Mapping[int, _Past],
    gradient: str,
) -> StandingContext:
    """The context of a block, copied; its active mids made again with a graph."""
    i = context.block
    snapshot = _copied(cache, layout, context, batch)
    active = context.selected.shape[1]
    if not active or gradient == "none":
        return StandingContext(context.positions, snapshot)
    grid = layout.grid
    sinks = layout.tokens(i).sink
    sink_only = _Snapshot(
        tuple(k[:, :sinks] for k in snapshot.keys), tuple(v[:, :sinks] for v in snapshot.values)
    )
    cells = _cells(
        layout.compressed_positions(layout.context_start, grid.frames_per_block), context.positions
    )
    blocks = sorted(set(context.selected.flatten().tolist()))
    # All in one pass: layers must run equally often in all processes, whatever is selected in each.
    seen = StandingContext(cells, _repeated(sink_only, len(blocks)))
    texts = TextKV(tuple((_rows(k, len(blocks)), _rows(v, len(blocks))) for k, v in text.layers))
    with _weights_fixed(student.transformer, gradient == "compressor"):
        tokens = torch.cat([_tokens(student, past[block]) for block in blocks])
        together = student.transformer.commit_tokens(tokens, texts, seen)
    parts = zip(*(t.split(batch, 1) for t in (together.k, together.v, together.q_sum)), strict=True)
    made = {block: BlockKV(*part) for block, part in zip(blocks, parts, strict=True)}
    slots = layout.slots(i)
    places = [cell for start in slots.mid_starts for cell in layout.compressed_positions(start, slots.span)]
    cos, sin = rope.angles(_cells(places, context.positions), grid.kv_dim // grid.heads)
    keys, values = [], []
    for layer, ids in enumerate(context.selected.tolist()):
        keys.append(rope.rotate(torch.cat([made[m].k[layer] for m in ids], 1), cos, sin))
        values.append(torch.cat([made[m].v[layer] for m in ids], 1))
    return StandingContext(context.positions, snapshot, _Snapshot(tuple(keys), tuple(values)))


def _rows(tensor: Tensor, count: int) -> Tensor:
    """[B,...] -> [count*B,...]."""
    return tensor.repeat(count, *(1 for _ in tensor.shape[1:]))


def _repeated(snapshot: _Snapshot, count: int) -> _Snapshot:
    keys, values = (tuple(_rows(t, count) for t in side) for side in (snapshot.keys, snapshot.values))
    return _Snapshot(keys, values)


def _cells(cells: Sequence[Sequence[object]], like: Tensor) -> Tensor:
    rows = [[float(axis) for axis in cell] for cell in cells]  # type: ignore[arg-type]
    return torch.tensor(rows, dtype=torch.float64, device=like.device)


@torch.no_grad()
def _copied(cache: KVCache, layout: Layout, context: CacheContext, batch: int) -> _Snapshot:
    """Keys and values of all layers, without the block's own. With `affinity` a layer must have been read before."""
    grid = layout.grid
    shape = (batch, grid.block_tokens, grid.heads, grid.kv_dim // grid.heads)
    own = torch.zeros(shape, dtype=cache.dtype, device=cache.device)
    q_sum = torch.zeros(shape[0], *shape[2:], device=cache.device)
    pairs = [context.layer(layer, own, own, q_sum) for layer in range(grid.layers)]
    n = grid.block_tokens
    return _Snapshot(tuple(k[:, n:].clone() for k, _ in pairs), tuple(v[:, n:].clone() for _, v in pairs))


@contextmanager
def _weights_fixed(network: WanTransformer, wanted: bool) -> Iterator[None]:
    """Build no graph to the network's weights inside; what flows through it still does."""
    learning = [p for p in network.parameters() if p.requires_grad] if wanted else []
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
