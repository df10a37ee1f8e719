"""What one item of compressor distillation looks at: which later blocks ask, and which older ones are replaced.

    blocks      0 1 | 2 3 4 5 6 7 | 8 | 9          sinks, mids, recent, the block that asks
    stand-ins         3   5                        full resolution for the target, compressed for the student

Everything else of the context (sinks, recent, the other mids as compressed tokens, the slots) is the same for both.
Integers and random draws only; knows no data, no model. Source: docs/method.md 7.7 (T1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from packforcing_cli.layout import Grid, Layout
from packforcing_cli.training.items import RECENT, Context, Shape
from packforcing_cli.training.recipe_kinds import DistillData, Queries

UNLIMITED = 1_000_000  # slots: the layout's own limit is for inference, and the spans here are numbers


@dataclass(frozen=True)
class Query:
    """A block that asks.

    block:  its number in the scene.
    layers: in which its attention is compared, ascending.
    tokens: which of its queries, ascending.
    dice:   for its noise level: two numbers in [0, 1).
    """

    block: int
    layers: tuple[int, ...]
    tokens: tuple[int, ...]
    dice: tuple[float, float]


@dataclass(frozen=True)
class Plan:
    """One item: the layout of its context, who asks, and the blocks that are replaced, ascending."""

    layout: Layout
    queries: tuple[Query, ...]
    stand_ins: tuple[int, ...]

    @property
    def blocks(self) -> int:
        """Blocks of the scene that are needed, from its start."""
        return self.queries[-1].block + 1


@dataclass(frozen=True)
class DistillShape(Shape):
    """How such items are drawn; `blocks` is the longest scene that is used whole."""

    @classmethod
    def by(cls, data: DistillData, blocks: int) -> DistillShape:
        """As a recipe says, for scenes of at most `blocks` blocks."""
        return cls("compressor-distill", blocks, data.sinks, data.max_mids, data.slot_spans, 0.0)

    @property
    def least_blocks(self) -> int:
        """Blocks a scene must have: sinks, a mid, recent, and one that asks."""
        return max(self.sinks) + RECENT + 2

    def plan(
        self,
        grid: Grid,
        queries: Queries,
        scene_blocks: int,
        generator: torch.Generator,
        *,
        cuts: tuple[int, ...] = (),
    ) -> Plan:
        """Draw an item of a scene of at least `least_blocks` blocks, with `cuts` at blocks that see no recent one."""
        sinks = self.sinks[_below(len(self.sinks), generator)]
        span = self.spans[_below(len(self.spans), generator)]
        layout = replace(self.layout(grid, sinks, span), cuts=cuts)
        asking = range(sinks + RECENT + 1, min(scene_blocks, self.blocks))
        blocks = sorted(asking[n] for n in _some(queries.blocks, len(asking), generator))
        # One of them is a mid for the first block that asks; the others for the last at least.
        early, late = layout.view(blocks[0]).mid, layout.view(blocks[-1]).mid
        first = early[_below(len(early), generator)]
        others = [m for m in late if m != first]
        more = _below(min(queries.stand_ins, len(others) + 1), generator)
        chosen = sorted([first, *(others[n] for n in _some(more, len(others), generator))])
        asked = []
        for block in blocks:
            layers = tuple(sorted(_some(queries.layers, grid.layers, generator)))
            tokens = tuple(sorted(_some(queries.tokens, grid.block_tokens, generator)))
            level, clean = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
            asked.append(Query(block, layers, tokens, (level, clean)))
        return Plan(layout, tuple(asked), tuple(chosen))

    def layout(self, grid: Grid, sinks: int, span: Fraction) -> Layout:
        """The context of an item with so many sinks, its mids `span` slots wide or as wide as they are long."""
        return Layout(
            grid=grid,
            sink_blocks=sinks,
            recent_blocks=RECENT,
            top_k=self.max_mids,
            bank=None,
            mid_span=min(span, Fraction(grid.frames_per_block)),
            trained_frames=UNLIMITED,
        )

    def context(self, grid: Grid, scene_blocks: int) -> Context:
        """The widest contexts such items meet, in scenes of at most `scene_blocks` blocks."""
        longest, frames = min(scene_blocks, self.blocks), grid.frames_per_block
        mids = {
            sinks: max(0, min(self.max_mids, longest - sinks - RECENT - 1))
            for sinks in sorted(set(self.sinks))
        }
        spans = tuple(sorted({min(span, Fraction(frames)) for span in self.spans}))
        return Context(frames, mids, spans)


@dataclass(frozen=True)
class AppendedContext:
    """A context of given keys (rotated) and values, one pair [1,S,N,D] a layer. Satisfies `transformer.Context`.

    positions: [n,3] of the own tokens, which come first.
    """

    positions: Tensor
    keys: Sequence[Tensor]
    values: Sequence[Tensor]

    def layer(self, layer: int, k: Tensor, v: Tensor, q_sum: Tensor) -> tuple[Tensor, Tensor]:
        """As `transformer.Context.layer`; the gradient reaches the own tokens."""
        return torch.cat((k, self.keys[layer]), 1), torch.cat((v, self.values[layer]), 1)


def with_bytes(grid: Grid, dtype: torch.dtype) -> Grid:
    """The grid for keys and values of a dtype."""
    return replace(grid, dtype_bytes=dtype.itemsize)


def _below(count: int, generator: torch.Generator) -> int:
    """A random number 0 .. count-1."""
    return int(torch.randint(count, (), generator=generator))


def _some(number: int, count: int, generator: torch.Generator) -> list[int]:
    """At most `number` different numbers of 0 .. count-1, in random order."""
    found: list[int] = torch.randperm(count, generator=generator)[:number].tolist()
    return found
