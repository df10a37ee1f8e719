"""Items of training: their blocks, and that packed teacher forcing over them equals the cached rollout."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from test_packed import (
    BATCH,
    LAYERS,
    CachedRun,
    ListContext,
    assert_equal_to_the_cache,
    back_from_current,
    clip,
    full_places,
    grid,
    layout,
    packed,
    small_places,
)
from tiny import transformer
from torch import Tensor

from packforcing_cli.cache import KVCache
from packforcing_cli.training.items import Item, Shape, kept_evenly
from packforcing_cli.transformer import BlockKV, Context, WanTransformer

torch.set_num_threads(1)

SPANS = (Fraction(1), Fraction(2), Fraction(4))
STRICT = Shape("strict", 5, (1, 2), 16, SPANS, 0.2)
LONG = Shape("long-memory", 5, (1, 2), 16, SPANS, 0.2)


@pytest.fixture(scope="module")
def model() -> WanTransformer:
    return transformer(1)


def drawn(shape: Shape, blocks: int, count: int = 300) -> list[Item]:
    return [shape.item(grid(), blocks, torch.Generator().manual_seed(n)) for n in range(count)]


def test_strict_items_are_consecutive_and_their_layouts_vary() -> None:
    items = drawn(STRICT, 9)
    assert all(item.scene == item.targets == item.packed.full == (0, 1, 2, 3, 4) for item in items)
    assert {len(item.packed.sinks or ()) for item in items} == {1, 2}
    assert {view.mid for item in items for view in item.packed.views} >= {(), (1,), (2,), (1, 2)}
    assert {view.slots.span for item in items for view in item.packed.views if view.mid} == set(SPANS)
    assert all(item.scene == (0, 1, 2) for item in drawn(STRICT, 3, 20))


@pytest.mark.parametrize("blocks", [4, 5, 12, 24])
def test_long_items_follow_their_rule(blocks: int) -> None:
    items = drawn(LONG, blocks)
    for item in items:
        sinks = len(item.packed.sinks or ())
        near = len(item.packed.full) - sinks
        first = len(item.scene) - near  # of the neighbours, in the item
        assert near in (2, 3) and sinks in (1, 2)
        assert len(item.packed.full) * 4 <= 20  # latent frames at full resolution
        assert item.scene == tuple(sorted(set(item.scene))) and item.scene[:sinks] == tuple(range(sinks))
        last = item.scene[first]
        assert item.scene[first:] == tuple(range(last, last + near)) and item.scene[-1] < blocks
        far = set(item.packed.compressed) - set(item.packed.full)
        assert far == set(range(sinks, first)) and len(far) <= 16
        # A loss stands only where the block before in the item is the block before in the scene.
        true = [n for n, b in enumerate(item.scene) if n == 0 or item.scene[n - 1] == b - 1]
        assert set(item.targets) <= set(true) and set(item.targets) <= set(item.packed.full)
        assert set(item.targets) == set(true) & set(item.packed.full) - (
            {first} if far else set()
        )  # after far blocks the first neighbour has no full-resolution predecessor
        for view in item.packed.views:
            assert len(view.mid) <= 16 and list(view.mid) == sorted(view.mid)
            assert (*view.sink, *view.mid, *view.recent) == tuple(
                sorted({*view.sink, *view.mid, *view.recent})
            )
    counts = {len(set(item.packed.compressed) - set(item.packed.full)) for item in items}
    most = min(16, blocks - 3)
    assert 0 in counts and most - 1 <= max(counts) <= most


def test_the_context_met_is_that_of_the_widest_views() -> None:
    for shape, blocks in ((STRICT, 5), (STRICT, 4), (LONG, 24), (LONG, 6), (LONG, 4)):
        context = shape.context(grid(), blocks)
        met = {1: 0, 2: 0}
        slots = Fraction(0)
        for item in drawn(shape, blocks, 600):
            sinks = len(item.packed.sinks or ())
            for view in item.packed.views:
                met[sinks] = max(met[sinks], len(view.mid))
                slots = max(slots, view.slots.total)
        assert context.mids == met
        assert context.slots == slots


def test_a_context_that_inference_leaves_is_said() -> None:
    context = STRICT.context(grid(), 5)
    fits = {"sink_blocks": 2, "recent_blocks": 1, "top_k": 1, "mid_span": "1"}
    assert context.mismatches(**fits) == ()  # type: ignore[arg-type]
    assert context.mismatches(**(fits | {"mid_span": "fit"})) == ()  # type: ignore[arg-type]
    for change, said in (
        ({"recent_blocks": 2}, "2 recent blocks: training has 1"),
        ({"sink_blocks": 3}, "3 sink blocks: training has 1 and 2"),
        ({"top_k": 16}, "16 mids: training meets at most 1 beside 2 sinks"),
        ({"mid_span": "1/2"}, "mids of 1/2 slots: training has 1 to 4"),
        ({"sink_blocks": 1, "top_k": 2, "mid_span": "5"}, ""),
    ):
        found = context.mismatches(**(fits | change))  # type: ignore[arg-type]
        assert (found == ()) if not said else any(said in text for text in found)
    wide = LONG.context(grid(), 24)
    assert wide.mismatches(**(fits | {"top_k": 16})) == ()  # type: ignore[arg-type]
    assert wide.slots == 16 + 16 * 4


@pytest.mark.parametrize("seed", range(4))
def test_strict_items_equal_the_cached_rollout(model: WanTransformer, seed: int) -> None:
    item = STRICT.item(grid(), 5, torch.Generator().manual_seed(seed)).packed
    span = next((view.slots.span for view in item.views if view.mid), Fraction(4))
    assert_equal_to_the_cache(model, item, span, len(item.sinks or ()), seed)


@pytest.mark.parametrize("seed", range(4))
def test_long_items_equal_raw_keys_and_the_cached_rollout(model: WanTransformer, seed: int) -> None:
    item = LONG.item(grid(), 24, torch.Generator().manual_seed(seed))
    sinks, views = len(item.packed.sinks or ()), {view.block: view for view in item.packed.views}
    seen = clip(model, len(item.scene), seed)
    fast = packed(model, item.packed, seen, grid())
    span = max((view.slots.span for view in item.packed.views if view.mid), default=Fraction(4))
    kv: dict[int, BlockKV] = {}
    backups: dict[int, BlockKV] = {}

    def velocity(block: int, context: Context) -> Tensor:
        timesteps = seen.timesteps[block][:, None].expand(-1, 4)
        return model(seen.noisy[block], timesteps, seen.text, context)

    for block, view in views.items():
        if block == sinks + len(item.scene) - len(views):  # all sinks are there: the far blocks
            behind = [(kv[sink], full_places(4.0 * sink)) for sink in range(sinks)]
            for far in item.packed.compressed:
                own = ListContext(behind, small_places(4.0 * sinks, 4.0))
                backups[far] = model.commit_tokens(seen.compressed[far], seen.text, own)
        context = back_from_current(kv, backups, view, float(span))
        kv[block] = model.commit(seen.clean[block], seen.text, context)
        torch.testing.assert_close(fast[block], velocity(block, context), rtol=1e-10, atol=1e-10)

    # The blocks with a recent one before them, in the cache; of a far block nothing but its backup is ever read.
    cached_blocks = 0
    for block in item.targets:
        view = views[block]
        if not view.recent or not view.mid:
            continue
        cache = KVCache(
            layout(span, sinks=sinks, top_k=len(view.mid)), num_blocks=40, dtype=torch.float64, batch=2
        )
        for before in range(block):
            cache.commit(before, kv.get(before, kv[0]))
            if cache.needs_backup(before):
                cache.add_backup(before, backups.get(before, next(iter(backups.values()))))
        context = cache.context(block, selected=torch.tensor([view.mid] * LAYERS))
        torch.testing.assert_close(fast[block], velocity(block, context), rtol=1e-10, atol=1e-10)
        cached_blocks += 1
    assert cached_blocks or not item.packed.compressed


def test_clips_held_out_stay_so_when_data_grows() -> None:
    names = [f"clip{n}.mp4" for n in range(40)]
    trained, held = kept_evenly(names, 0.1)
    assert len(held) == 4 and sorted([*trained, *held]) == list(range(40))
    _, more = kept_evenly([*names, "another.mp4"], 0.1)
    assert len({names[n] for n in held} & {[*names, "another.mp4"][n] for n in more}) >= 3
    assert kept_evenly(["one.mp4"], 0.5) == ([0], [])
    assert kept_evenly([], 0.5) == ([], [])


class CutRun(CachedRun):
    """A cached run with cuts."""

    cuts: tuple[int, ...] = ()

    def cache(self, top_k: int, compressed_context: str = "sinks") -> KVCache:
        shape = layout(self.span, sinks=self.sinks, top_k=top_k)
        cache = KVCache(replace(shape, cuts=self.cuts), num_blocks=40, dtype=torch.float64, batch=BATCH)
        for i, kv in enumerate(self.kv):
            cache.commit(i, kv)
            if cache.needs_backup(i):
                cache.add_backup(i, self.backups[i])
        return cache


def test_items_with_a_cut_and_captions_of_their_blocks_equal_the_cached_rollout(
    model: WanTransformer,
) -> None:
    shape = Shape("strict", 5, (1,), 16, (Fraction(1),), 0.0)
    item = shape.item(grid(), 5, torch.Generator().manual_seed(0), cuts=(3,)).packed
    assert [view.recent for view in item.views] == [(), (), (1,), (), (3,)]
    assert [view.mid for view in item.views] == [(), (), (), (1, 2), (1, 2)]
    seen = clip(model, 5, 0)
    texts = tuple(clip(model, 1, 40 + (block >= 3)).text for block in range(5))
    run = CutRun(model, seen, Fraction(1), 1, texts=texts)
    run.cuts = (3,)
    fast = packed(model, item, seen, grid(), texts)
    uncut = packed(model, shape.item(grid(), 5, torch.Generator().manual_seed(0)).packed, seen, grid(), texts)
    for view in item.views:
        slow = run.block(view.mid, "sinks")
        torch.testing.assert_close(fast[view.block], slow, rtol=1e-10, atol=1e-10)
    assert (fast[3] - uncut[3]).norm() > 1e-3 * uncut[3].norm()


def test_neighbours_of_long_items_see_a_cut_too() -> None:
    for item in (LONG.item(grid(), 12, torch.Generator().manual_seed(n), cuts=(7,)) for n in range(300)):
        for view in item.packed.views:
            block = item.scene[view.block]
            recent = [item.scene[b] for b in view.recent]
            assert recent in ([], [block - 1])
            if block == 7:
                assert not recent
            elif block - 1 in item.scene and view.block - 1 in item.packed.full and view.block > 2:
                assert recent == [block - 1]
            if block == 7 and 6 in item.scene and view.block - 1 in item.packed.full and view.mid:
                assert item.scene[view.mid[-1]] == 6
