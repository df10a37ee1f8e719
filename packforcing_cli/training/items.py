"""Items of training: which blocks of a scene are taken, at which resolution, and what each of them sees.

    strict        0 1 2 3 4          consecutive blocks from the scene's start, every one with a loss
    long-memory   0 1 | 4 9 15 | 20 21 22
                  sinks, far blocks as compressed tokens only, true neighbours; the loss is on blocks whose predecessor
                  in the item is the true one: 0 and 1, 21 and 22 here, and 20 where it follows the sinks at once

Also says what of the context (sinks, mids, slots) such items meet, to be compared with what inference will use.
Integers and random draws only; knows no data, no model. Source: docs/method.md 7.4, 7.5, 7.7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch

from packforcing_cli.layout import BlockView, Grid, Layout
from packforcing_cli.training.packed import PackedItem, PackedView

RECENT = 1  # blocks at full resolution before the current one, in training as in every package's defaults
NEIGHBOURS = (2, 3)
SHOWN_SPANS = 4


@dataclass(frozen=True)
class Item:
    """One item and where its blocks come from.

    scene:   number in the scene of each of the item's blocks.
    targets: blocks of the item with noisy tokens, and so with a loss.
    """

    packed: PackedItem
    scene: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """How items are drawn: the settings of `recipe_kinds.ItemData` as numbers."""

    name: str
    blocks: int
    sinks: tuple[int, ...]
    max_mids: int
    spans: tuple[Fraction, ...]
    drop: float

    @property
    def least_blocks(self) -> int:
        """Blocks a scene must have."""
        return 2 if self.name == "strict" else max(self.sinks) + min(NEIGHBOURS)

    def item(
        self, grid: Grid, scene_blocks: int, generator: torch.Generator, *, cuts: tuple[int, ...] = ()
    ) -> Item:
        """Draw an item of a scene of `scene_blocks` blocks, at least `least_blocks`.

        Args:
            cuts: blocks of the scene that see no recent block: what was recent is compressed there already.
        """
        sinks = self.sinks[_below(len(self.sinks), generator)]
        span = self.spans[_below(len(self.spans), generator)]
        layout = Layout(
            grid=grid,
            sink_blocks=sinks,
            recent_blocks=RECENT,
            top_k=self.max_mids,
            bank=None,
            mid_span=min(span, Fraction(grid.frames_per_block)),
            trained_frames=1_000_000,  # the layout's own limit is for inference; here the range is being trained
        )
        if self.name == "strict":
            return self._strict(replace(layout, cuts=cuts), min(self.blocks, scene_blocks), generator)
        return self._long(layout, scene_blocks, generator, cuts)

    def _strict(self, layout: Layout, blocks: int, generator: torch.Generator) -> Item:
        views = []
        for block in range(blocks):
            seen = layout.view(block)
            kept = [m for m in seen.mid if float(torch.rand((), generator=generator)) >= self.drop]
            kept = kept[len(kept) - min(len(kept), self.max_mids) :]
            views.append(_view(layout, block, tuple(seen.sink), tuple(kept), tuple(seen.recent)))
        used = tuple(sorted({m for view in views for m in view.mid}))
        numbers = tuple(range(blocks))
        sinks = tuple(range(min(blocks, layout.sink_blocks)))
        return Item(PackedItem(numbers, used, tuple(views), sinks), numbers, numbers)

    def _long(
        self, layout: Layout, scene_blocks: int, generator: torch.Generator, cuts: tuple[int, ...]
    ) -> Item:
        sinks = layout.sink_blocks
        possible = [n for n in NEIGHBOURS if sinks + n <= scene_blocks]
        near = possible[_below(len(possible), generator)]
        first = sinks + _below(scene_blocks - near - sinks + 1, generator)  # of the neighbours, in the scene
        far = range(sinks, first)
        count = _below(min(self.max_mids, len(far)) + 1, generator)
        order = torch.randperm(len(far), generator=generator)[:count].sort().values.tolist()
        chosen = [far[n] for n in order]
        scene = (*range(sinks), *chosen, *range(first, first + near))
        head, mids = tuple(range(sinks)), tuple(range(sinks, sinks + count))
        start = sinks + count
        views = [_view(layout, b, head[:b], (), ()) for b in head]
        for n in range(near):
            recent = (start + n - 1,) if n and scene[start + n] not in cuts else ()
            older = tuple(
                range(start, start + n - len(recent))
            )  # neighbours that left recent: compressed by now
            kept = (*mids, *older)[-self.max_mids :] if self.max_mids else ()
            views.append(_view(layout, start + n, head, kept, recent))
        full = (*head, *range(start, start + near))
        compressed = tuple(sorted({m for view in views for m in view.mid}))
        true_start = first == sinks  # nothing lies between the sinks and the neighbours
        targets = (*head, *range(start if true_start else start + 1, start + near))
        return Item(PackedItem(full, compressed, tuple(views), head), scene, targets)

    def mids_met(self, grid: Grid, scene_blocks: Sequence[int], *, draws: int = 400) -> list[int]:
        """The most mids that a trained block sees, of each of so many items drawn from scenes of these lengths."""
        generator, found = torch.Generator().manual_seed(0), []
        for _ in range(draws):
            item = self.item(grid, scene_blocks[_below(len(scene_blocks), generator)], generator)
            views = {view.block: view for view in item.packed.views}
            found.append(max(len(views[target].mid) for target in item.targets))
        return found

    def context(self, grid: Grid, scene_blocks: int) -> Context:
        """The widest contexts such items meet, in scenes of at most `scene_blocks` blocks."""
        mids = {}
        for sinks in sorted(set(self.sinks)):
            if self.name == "strict":
                count = min(self.blocks, scene_blocks) - sinks - RECENT - 1
            else:
                count = (
                    scene_blocks - sinks - min(NEIGHBOURS)
                )  # three neighbours: one far less, but the first is a mid
            mids[sinks] = max(0, min(self.max_mids, count))
        frames = grid.frames_per_block
        spans = tuple(sorted({min(span, Fraction(frames)) for span in self.spans}))
        return Context(frames, mids, spans)


@dataclass(frozen=True)
class Context:
    """What of the context a training meets.

    mids:  number of sinks -> most compressed blocks seen beside them.
    spans: slots a compressed block takes, ascending.
    limit: slots at most, where many mids take fewer slots each; None = each may take the most.
    """

    frames_per_block: int
    mids: dict[int, int]
    spans: tuple[Fraction, ...]
    limit: int | None = None

    @property
    def slots(self) -> int:
        """Slots of the widest context: sinks, mids at their full span, recent, current; rounded up."""
        frames = self.frames_per_block
        widest = max((s + RECENT + 1) * frames + mids * max(self.spans) for s, mids in self.mids.items())
        slots = -(-widest.numerator // widest.denominator)
        return slots if self.limit is None else min(slots, self.limit)

    def __str__(self) -> str:
        each = ", ".join(f"{_count(s, 'sink')} with 0 to {_count(m, 'mid')}" for s, m in self.mids.items())
        few = len(self.spans) <= SHOWN_SPANS
        spans = ", ".join(map(str, self.spans)) if few else _range(self.spans[0], self.spans[-1])
        return f"{each}; {RECENT} recent; slots a mid {spans}; {self.slots} slots at most"

    def mismatches(
        self, *, sink_blocks: int, recent_blocks: int, top_k: int, mid_span: str
    ) -> tuple[str, ...]:
        """Where a setting of inference leaves what training met, a sentence each; empty if nowhere."""
        found = []
        if recent_blocks != RECENT:
            found.append(f"{recent_blocks} recent blocks: training has {RECENT}")
        if sink_blocks not in self.mids:
            met = " and ".join(str(n) for n in self.mids)
            found.append(f"{_count(sink_blocks, 'sink block')}: training has {met}")
        most = self.mids.get(sink_blocks, max(self.mids.values()))
        if top_k > most:
            found.append(f"{_count(top_k, 'mid')}: training meets at most {most} beside {sink_blocks} sinks")
        frames = self.frames_per_block
        if mid_span != "fit" and top_k:
            span = min(Fraction(mid_span), Fraction(frames))
            if not min(self.spans) <= span <= max(self.spans):
                found.append(
                    f"mids of {span} slots: training has {min(self.spans)} to {max(self.spans)} a compressed block"
                )
            slots = (sink_blocks + recent_blocks + 1) * frames + top_k * span
            if slots > self.slots:
                found.append(f"{float(slots):g} slots: training has at most {self.slots}")
        elif top_k:
            room = self.slots - (sink_blocks + recent_blocks + 1) * frames
            if room <= 0:
                found.append(f"no slots for mids: training has {self.slots} in all")
                return tuple(found)
            fitted = [min(Fraction(frames), Fraction(room, count)) for count in range(1, top_k + 1)]
            if fitted[-1] < min(self.spans) or fitted[0] > max(self.spans):
                found.append(
                    f"mids of {_range(fitted[-1], fitted[0])} slots where 1 to {top_k} share {room}: training has"
                    f" {_range(min(self.spans), max(self.spans))} a compressed block"
                )
        return tuple(found)


def _range(least: Fraction, most: Fraction) -> str:
    return str(least) if least == most else f"{least} to {most}"


def _view(
    layout: Layout, block: int, sink: tuple[int, ...], mid: tuple[int, ...], recent: tuple[int, ...]
) -> PackedView:
    """A view with the slots the layout gives to that many sinks, active mids and recent blocks."""
    seen = BlockView(block, range(len(sink)), range(len(mid)), range(len(recent)), len(mid))
    return PackedView(block, sink, mid, recent, layout.slots(seen))


def _below(count: int, generator: torch.Generator) -> int:
    """A random number 0 .. count-1."""
    return int(torch.randint(count, (), generator=generator))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def kept_evenly(items: Sequence[str], share: float) -> tuple[list[int], list[int]]:
    """Split into (trained, held out) by key, such as a hash of contents: those with the lowest hashes are held out.

    Adding one moves at most one other, so an evaluation stays comparable when data grows.
    """
    import hashlib

    order = sorted(range(len(items)), key=lambda n: hashlib.sha256(items[n].encode()).digest())
    count = min(len(items) - 1, round(share * len(items))) if items else 0
    held = set(order[:count])
    return [n for n in range(len(items)) if n not in held], sorted(held)
