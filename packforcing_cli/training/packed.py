"""Packed teacher forcing: every block of a clip trained in one pass, each in exactly the context it meets at inference.

The layers run once over [clean | compressed | noisy] tokens of all blocks. In every layer each query group (the clean
tokens of a block, its compressed tokens, its noisy tokens) attends the keys of its view, rotated to the slots of that
view, and its own tokens; no masks.

    tokens      c0 c1 c2 c3 c4 | m2 m3 | x0 x1 x2 x3 x4          cI clean, mI compressed, xI noisy
    noisy x4    sees c0 c1 (sinks)  m2 (mid)  c3 (recent)  x4     at the slots layout.py gives block 4
    clean c4    sees the same and itself: the commit pass
    compressed m2 sees c0 c1 and itself: the compressed forward

One mask over absolutely rotated keys would be wrong as soon as a mid takes fewer slots than it has frames, or is
dropped. Knows no data, loss or optimiser. Source: METHOD 2.4, 5 and 7.6; teacher forcing as in Self-Forcing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    query: int
    keys: tuple[int, ...]
    query_angles: tuple[Tensor, Tensor]
    key_angles: tuple[Tensor, Tensor]


def _cell_centres(grid: Grid, start: Fraction, span: Fraction) -> Tensor:
    cells = [[float(x) for x in cell] for cell in grid.compressed_positions(start, span)]
    return torch.tensor(cells, dtype=torch.float64)


def _groups(item: PackedItem, grid: Grid, head_dim: int, draws: int) -> list[_Group]:
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

    def own(piece: int, n: int) -> _Group:
        keys, places = contexts[n]
        place = block_at(item.views[n].slots.current_start)
        return _Group(piece, (*keys, piece), angles([place]), angles([*places, place]))

    def compressed(block: int) -> _Group:
        if item.sinks is None:
            n = clean[block]
            keys, places = contexts[n]
            start = item.views[n].slots.current_start
        else:
            keys = tuple(clean[b] for b in item.sinks)
            places = [block_at(Fraction(n * frames)) for n in range(len(item.sinks))]
            start = Fraction(len(item.sinks) * frames)
        place = _cell_centres(grid, start, Fraction(frames))
        return _Group(packed[block], (*keys, packed[block]), angles([place]), angles([*places, place]))

    groups = [own(n, n) for n in range(len(item.full))]
    groups += [compressed(block) for block in item.compressed]
    groups += [own(first_noisy + n, n % len(item.full)) for n in range(draws * len(item.full))]
    return groups


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
) -> Tensor:
    """Velocities of all noisy blocks of an item in one pass; differentiable in everything.

    Args:
        clean:      [B,M,C,F,h,w] clean latents of the full blocks (M = len(item.full)), as the commit pass reads them.
        compressed: [B,K,N_c,d] compressor output of the compressed blocks (K = len(item.compressed), may be 0).
        noisy:      [B,K*M,C,F,h,w] noisy latents of the full blocks, K draws of all of them one after another; the
                    draws share the clean and compressed tokens and do not see each other.
        timesteps:  [B,K*M] 1000*sigma of each noisy block.
    Returns: [B,K*M,C,F,h,w] velocities eps - x0.
    """
    B, M, _, frames, h, w = clean.shape
    tokens = [model.patch(clean[:, n]) for n in range(M)]
    tokens += [compressed[:, n] for n in range(len(item.compressed))]
    tokens += [model.patch(noisy[:, n]) for n in range(noisy.shape[1])]
    sizes = [t.shape[1] for t in tokens]
    x = torch.cat(tokens, dim=1)

    still = torch.zeros(B, 1, dtype=timesteps.dtype, device=timesteps.device)
    group_of_piece = [0] * (M + len(item.compressed)) + list(range(1, noisy.shape[1] + 1))
    index = torch.repeat_interleave(torch.tensor(group_of_piece), torch.tensor(sizes)).to(x.device)
    modulation = model.modulation(torch.cat((still, timesteps), dim=1), index)

    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    groups = [
        _Group(
            g.query,
            g.keys,
            (g.query_angles[0].to(x.device, wide), g.query_angles[1].to(x.device, wide)),
            (g.key_angles[0].to(x.device, wide), g.key_angles[1].to(x.device, wide)),
        )
        for g in _groups(item, grid, model.config.attention_head_dim, noisy.shape[1] // M)
    ]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        qs, ks, vs = q.split(sizes, 1), k.split(sizes, 1), v.split(sizes, 1)
        return torch.cat(
            [
                attention(
                    rope.rotate(qs[g.query], *g.query_angles),
                    rope.rotate(torch.cat([ks[n] for n in g.keys], 1), *g.key_angles),
                    torch.cat([vs[n] for n in g.keys], 1),
                )
                for g in groups
            ],
            dim=1,
        )

    x = model.run_layers(x, modulation, text, attend)
    start = sum(sizes[: M + len(item.compressed)])
    tail = model.modulation(timesteps)
    _, ph, pw = model.config.patch_size
    cells = model.head(x[:, start:], tail).unflatten(1, (noisy.shape[1], -1)).flatten(0, 1)
    return model.unpatch(cells, frames, h // ph, w // pw).unflatten(0, (B, noisy.shape[1]))
