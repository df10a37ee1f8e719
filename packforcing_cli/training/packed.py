"""Packed teacher forcing: every block of a clip trained in one pass, each in exactly the context it meets at inference.

The layers run once over [clean | compressed | noisy] tokens of all blocks. In every layer each piece (the clean tokens
of a block, its compressed tokens, its noisy tokens) attends the keys of its view, rotated to the slots of that view,
and its own tokens; no masks. Pieces that share a view are one attention call over a common, once rotated context.

    tokens      c0 c1 c2 c3 c4 | m2 m3 | x0 x1 x2 x3 x4          cI clean, mI compressed, xI noisy
    noisy x4    sees c0 c1 (sinks)  m2 (mid)  c3 (recent)  x4     at the slots layout.py gives block 4
    clean c4    sees the same and itself: the commit pass
    compressed m2 sees c0 c1 and itself: the compressed forward

One mask over absolutely rotated keys would be wrong as soon as a mid takes fewer slots than it has frames, or is
dropped. Every piece reads its own block's caption, so a clip may have a timeline of
them. Knows no data, loss or optimiser. Source: docs/method.md 2.4, 5 and 7.6; teacher forcing as in Self-Forcing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from packforcing_cli import rope
from packforcing_cli.layout import Grid, Slots
from packforcing_cli.transformer import TextKV, WanTransformer, attention


@dataclass(frozen=True)
class PackedView:
    """What one full-resolution block sees, and at which slots; numbers are blocks of the item."""

    block: int
    sink: tuple[int, ...]
    mid: tuple[int, ...]
    recent: tuple[int, ...]
    slots: Slots


@dataclass(frozen=True)
class PackedItem:
    """Which blocks of an item have which tokens, and what each sees.

    full:       blocks with clean and noisy tokens, ascending; `views` has one entry for each.
    compressed: blocks with compressed tokens, ascending.
    sinks:      blocks the compressed forward sees ("sinks"), or None for "history": a compressed block then sees what
                its own clean block sees, and must be in `full`.
    """

    full: tuple[int, ...]
    compressed: tuple[int, ...]
    views: tuple[PackedView, ...]
    sinks: tuple[int, ...] | None


@dataclass(frozen=True)
class _Group:
    """Pieces of equal length that see one context at the same slots: a clean block and its noisy draws, say."""

    pieces: tuple[int, ...]
    context: tuple[int, ...]
    angles: tuple[Tensor, Tensor]
    context_angles: tuple[Tensor, Tensor] | None  # None without a context


def _cell_centres(grid: Grid, start: Fraction, span: Fraction) -> Tensor:
    cells = [[float(x) for x in cell] for cell in grid.compressed_positions(start, span)]
    return torch.tensor(cells, dtype=torch.float64)


def _groups(
    item: PackedItem, grid: Grid, head_dim: int, targets: tuple[int, ...], num_noisy: int
) -> list[_Group]:
    """Query groups in token order: clean, compressed, noisy. Pieces are numbered in the same order."""
    frames = grid.frames_per_block
    clean = {b: n for n, b in enumerate(item.full)}
    packed = {b: len(item.full) + n for n, b in enumerate(item.compressed)}
    first_noisy = len(item.full) + len(item.compressed)

    def block_at(start: Fraction) -> Tensor:
        return rope.grid_positions(float(start), frames, grid.rows, grid.cols)

    def angles(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return rope.angles(torch.cat(list(parts)), head_dim)

    contexts: list[tuple[tuple[int, ...], list[Tensor]]] = []
    for view in item.views:
        keys = (
            *(clean[b] for b in view.sink),
            *(packed[b] for b in view.mid),
            *(clean[b] for b in view.recent),
        )
        places = [block_at(start) for start in view.slots.sink_starts]
        places += [_cell_centres(grid, start, view.slots.span) for start in view.slots.mid_starts]
        places += [block_at(start) for start in view.slots.recent_starts]
        contexts.append((keys, places))

    def group(pieces: tuple[int, ...], keys: tuple[int, ...], places: list[Tensor], own: Tensor) -> _Group:
        return _Group(pieces, keys, angles([own]), angles(places) if places else None)

    groups = []
    for n, (view, (keys, places)) in enumerate(zip(item.views, contexts, strict=True)):
        noisy: tuple[int, ...] = ()
        if view.block in targets:
            place = first_noisy + targets.index(view.block)
            noisy = tuple(range(place, first_noisy + num_noisy, len(targets)))
        groups.append(group((n, *noisy), keys, places, block_at(view.slots.current_start)))
    if item.sinks is None:
        for block in item.compressed:
            keys, places = contexts[clean[block]]
            start = item.views[clean[block]].slots.current_start
            own = _cell_centres(grid, start, Fraction(frames))
            groups.append(group((packed[block],), keys, places, own))
    elif item.compressed:
        keys = tuple(clean[b] for b in item.sinks)
        places = [block_at(Fraction(n * frames)) for n in range(len(item.sinks))]
        own = _cell_centres(grid, Fraction(len(item.sinks) * frames), Fraction(frames))
        groups.append(group(tuple(packed[b] for b in item.compressed), keys, places, own))
    return groups


def _cast(angles: tuple[Tensor, Tensor], like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return angles[0].to(like.device, dtype), angles[1].to(like.device, dtype)


def _attend_text(sizes: Sequence[int], prompts: Tensor | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Cross-attention in which every piece reads its own prompt: `prompts` [B,pieces] are rows of keys and values."""
    if prompts is None:
        return attention
    runs: list[tuple[int, int, int]] = []  # first piece, pieces, tokens a piece
    for n, size in enumerate(sizes):
        if runs and runs[-1][2] == size:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, size)
        else:
            runs.append((n, 1, size))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = q.split([count * size for _, count, size in runs], 1)
        out = []
        for part, (first, count, _) in zip(parts, runs, strict=True):
            rows = prompts[:, first : first + count].flatten()
            pieces = part.unflatten(1, (count, -1)).flatten(0, 1)  # [B*count,S,N,D]
            out.append(attention(pieces, k[rows], v[rows]).unflatten(0, (-1, count)).flatten(1, 2))
        return torch.cat(out, 1)

    return attend


def packed_forward(
    model: WanTransformer,
    item: PackedItem,
    grid: Grid,
    *,
    clean: Tensor,
    compressed: Tensor,
    noisy: Tensor,
    timesteps: Tensor,
    text: TextKV,
    prompts: Tensor | None = None,
    targets: Sequence[int] | None = None,
) -> Tensor:
    """Velocities of all noisy blocks of an item in one pass; differentiable in everything.

    J is the number of blocks with noisy tokens: len(targets), or M.

    Args:
        clean:      [B,M,C,F,h,w] clean latents of the full blocks (M = len(item.full)), as the commit pass reads them.
        compressed: [B,K,N_c,d] compressor output of the compressed blocks (K = len(item.compressed), may be 0).
        noisy:      [B,D*J,C,F,h,w] noisy latents of the targets, D draws of all of them one after another; the
                    draws share the clean and compressed tokens and do not see each other.
        timesteps:  [B,D*J] 1000*sigma of each noisy block.
        text:       of B prompts, one a clip; with `prompts` of any number.
        prompts:    [B,M+K+D*J] row of `text` that each clean, compressed and noisy block reads; None = clip b reads
                    row b.
        targets:    which of the full blocks have noisy tokens; None = all.
    Returns: [B,D*J,C,F,h,w] velocities eps - x0.
    """
    B, M, _, frames, h, w = clean.shape
    targets = item.full if targets is None else tuple(targets)
    tokens = [model.patch(clean[:, n]) for n in range(M)]
    tokens += [compressed[:, n] for n in range(len(item.compressed))]
    tokens += [model.patch(noisy[:, n]) for n in range(noisy.shape[1])]
    sizes = [t.shape[1] for t in tokens]
    x = torch.cat(tokens, dim=1).to(noisy.dtype)  # under autocast the residual stream keeps its width

    still = torch.zeros(B, 1, dtype=timesteps.dtype, device=timesteps.device)
    group_of_piece = [0] * (M + len(item.compressed)) + list(range(1, noisy.shape[1] + 1))
    index = torch.repeat_interleave(torch.tensor(group_of_piece), torch.tensor(sizes)).to(x.device)
    modulation = model.modulation(torch.cat((still, timesteps), dim=1), index)

    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    groups = [
        replace(
            g,
            angles=_cast(g.angles, x, wide),
            context_angles=None if g.context_angles is None else _cast(g.context_angles, x, wide),
        )
        for g in _groups(item, grid, model.config.attention_head_dim, targets, noisy.shape[1])
    ]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        qs, ks, vs = q.split(sizes, 1), k.split(sizes, 1), v.split(sizes, 1)
        attended: dict[int, Tensor] = {}
        for g in groups:
            P = len(g.pieces)
            own_q, own_k, own_v = (
                torch.stack([t[n] for n in g.pieces], 1).flatten(0, 1) for t in (qs, ks, vs)
            )  # [B*P,S,N,D]
            keys, values = rope.rotate(own_k, *g.angles), own_v
            if g.context_angles is not None:
                past = rope.rotate(torch.cat([ks[n] for n in g.context], 1), *g.context_angles)
                keys = torch.cat((past.repeat_interleave(P, 0), keys), 1)
                past = torch.cat([vs[n] for n in g.context], 1)
                values = torch.cat((past.repeat_interleave(P, 0), values), 1)
            out = attention(rope.rotate(own_q, *g.angles), keys, values).unflatten(0, (B, P))
            attended |= {n: out[:, i] for i, n in enumerate(g.pieces)}
        return torch.cat([attended[n] for n in range(len(sizes))], dim=1)

    x = model.run_layers(x, modulation, text, attend, _attend_text(sizes, prompts))
    start = sum(sizes[: M + len(item.compressed)])
    tail = model.modulation(timesteps)
    _, ph, pw = model.config.patch_size
    cells = model.head(x[:, start:], tail).unflatten(1, (noisy.shape[1], -1)).flatten(0, 1)
    return model.unpatch(cells, frames, h // ph, w // pw).unflatten(0, (B, noisy.shape[1]))
