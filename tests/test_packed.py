"""Packed teacher forcing equals what the rollout computes: the cache block by block, and a slow list of raw keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, cast

import pytest
import torch
from tiny import randomise, transformer
from torch import Tensor

from packforcing_cli.cache import KVCache
from packforcing_cli.compressor import Compressor, CompressorConfig
from packforcing_cli.layout import Grid, Layout
from packforcing_cli.text import TextEncoder
from packforcing_cli.training import demo_flow
from packforcing_cli.training.packed import PackedItem, PackedView, packed_forward
from packforcing_cli.transformer import AloneContext, BlockKV, Context, TextKV, WanTransformer

torch.set_num_threads(1)

LAYERS, HEADS, HEAD_DIM, CHANNELS, ROWS, COLS, BATCH = 2, 2, 12, 4, 4, 8, 2
Span = Fraction | Literal["fit"]
SPANS: dict[str, Span] = {"block": Fraction(4), "1": Fraction(1), "fit": "fit"}
every_span = pytest.mark.parametrize("span", SPANS.values(), ids=SPANS.keys())


@pytest.fixture(scope="module")
def model() -> WanTransformer:
    return transformer(1)


def grid(frames: int = 4) -> Grid:
    return Grid(
        frames_per_block=frames,
        rows=ROWS,
        cols=COLS,
        layers=LAYERS,
        kv_dim=HEADS * HEAD_DIM,
        heads=HEADS,
        dtype_bytes=8,
    )


def layout(span: Span, *, sinks: int, top_k: int, frames: int = 4) -> Layout:
    return Layout(grid(frames), sinks, 1, top_k, None, span, trained_frames=21)


@dataclass(frozen=True)
class Clip:
    """Random contents of an item's blocks, indexed by block number."""

    clean: Tensor  # [T,B,C,F,h,w]
    noisy: Tensor  # [T,B,C,F,h,w]
    compressed: Tensor  # [T,B,N_c,d]
    timesteps: Tensor  # [T,B]
    text: TextKV


def clip(model: WanTransformer, blocks: int, seed: int, frames: int = 4) -> Clip:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(blocks, BATCH, *shape, generator=generator, dtype=torch.float64)

    return Clip(
        clean=normal(CHANNELS, frames, 2 * ROWS, 2 * COLS),
        noisy=normal(CHANNELS, frames, 2 * ROWS, 2 * COLS),
        compressed=normal(grid(frames).compressed_tokens, model.config.dim),
        timesteps=1000 * torch.rand(blocks, BATCH, generator=generator, dtype=torch.float64),
        text=model.embed_text(torch.randn(BATCH, 5, 8, generator=generator, dtype=torch.float64)),
    )


def packed(
    model: WanTransformer, item: PackedItem, seen: Clip, shape: Grid, texts: tuple[TextKV, ...] | None = None
) -> dict[int, Tensor]:
    """Velocity of every full block from one packed pass; `texts` are those of each block, one for all by default."""
    text, prompts = seen.text, None
    if texts is not None:
        text = TextKV(tuple(_rows(texts, layer) for layer in range(LAYERS)))
        blocks = torch.tensor([*item.full, *item.compressed, *item.full])
        prompts = BATCH * blocks + torch.arange(BATCH)[:, None]
    out = packed_forward(
        model,
        item,
        shape,
        clean=seen.clean[list(item.full)].transpose(0, 1),
        compressed=seen.compressed[list(item.compressed)].transpose(0, 1),
        noisy=seen.noisy[list(item.full)].transpose(0, 1),
        timesteps=seen.timesteps[list(item.full)].T,
        text=text,
        prompts=prompts,
    )
    return {block: out[:, n] for n, block in enumerate(item.full)}


def _rows(texts: tuple[TextKV, ...], layer: int) -> tuple[Tensor, Tensor]:
    k, v = zip(*(text.layers[layer] for text in texts), strict=True)
    return torch.cat(k), torch.cat(v)


# -- the rollout's own code: cache and block-by-block passes --------------------------------------------------


class CachedRun:
    """Consecutive blocks through `KVCache`, with a chosen set of mids for each.

    How many mids a cache keeps active is fixed, so every block gets a cache of its own that the blocks
    before it are committed to; their keys and values come from the passes over them.
    """

    def __init__(
        self,
        model: WanTransformer,
        seen: Clip,
        span: Span,
        sinks: int,
        frames: int = 4,
        texts: tuple[TextKV, ...] | None = None,
    ) -> None:
        self.model, self.clip, self.span, self.sinks, self.frames = model, seen, span, sinks, frames
        self.texts = texts
        self.kv: list[BlockKV] = []
        self.backups: dict[int, BlockKV] = {}

    def cache(self, top_k: int, compressed_context: str = "sinks") -> KVCache:
        """A cache that the blocks so far were committed to."""
        cache = KVCache(
            layout(self.span, sinks=self.sinks, top_k=top_k, frames=self.frames),
            num_blocks=40,
            dtype=torch.float64,
            batch=BATCH,
            compressed_context=compressed_context,
        )
        for i, kv in enumerate(self.kv):
            cache.commit(i, kv)
            if cache.needs_backup(i):
                cache.add_backup(i, self.backups[i])
        return cache

    def block(self, kept: tuple[int, ...], compressed_context: str) -> Tensor:
        """Denoise the next block once, then its clean and compressed passes. Returns: its velocity."""
        i, model, seen = len(self.kv), self.model, self.clip
        text = seen.text if self.texts is None else self.texts[i]
        # History needs a bank in the same cache even when it has no block yet.
        cache = self.cache(max(len(kept), compressed_context == "history"), compressed_context)
        context = cache.context(i, selected=torch.tensor([kept] * LAYERS, dtype=torch.int64))
        timesteps = seen.timesteps[i][:, None].expand(-1, self.frames)
        velocity = model(seen.noisy[i], timesteps, text, context)
        kv = model.commit(seen.clean[i], text, context)
        if i >= self.sinks:
            if compressed_context == "sinks":
                cache = self.cache(1)
            self.backups[i] = model.commit_tokens(seen.compressed[i], text, cache.compressed_context(i))
        self.kv.append(kv)
        return velocity


def drawn_item(
    span: Span, seed: int, *, sinks: int, blocks: int, history: bool, frames: int = 4
) -> PackedItem:
    """Consecutive blocks, a random set of mids for each; with history at least one is kept where there is one."""
    generator = torch.Generator().manual_seed(seed)
    shape, views = layout(span, sinks=sinks, top_k=16, frames=frames), []
    for i in range(blocks):
        seen = shape.view(i)
        kept = [m for m in seen.mid if torch.rand((), generator=generator) < 0.6]
        if history and not kept:
            kept = list(seen.mid[:1])
        views.append(demo_flow.packed_view(shape, i, tuple(seen.sink), tuple(kept), tuple(seen.recent)))
    used = sorted({m for view in views for m in view.mid})
    return PackedItem(
        tuple(range(blocks)), tuple(used), tuple(views), None if history else tuple(range(sinks))
    )


def assert_equal_to_the_cache(
    model: WanTransformer, item: PackedItem, span: Span, sinks: int, seed: int, frames: int = 4
) -> None:
    seen = clip(model, len(item.full), seed, frames)
    run = CachedRun(model, seen, span, sinks, frames)
    fast = packed(model, item, seen, grid(frames))
    for view in item.views:
        slow = run.block(view.mid, "sinks" if item.sinks is not None else "history")
        torch.testing.assert_close(fast[view.block], slow, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("context", ["sinks", "history"])
def test_every_block_reads_its_own_caption_as_in_the_rollout(model: WanTransformer, context: str) -> None:
    item = drawn_item(Fraction(1), 0, sinks=2, blocks=7, history=context == "history")
    seen = clip(model, 7, 0)
    texts = tuple(clip(model, 1, 40 + block).text for block in range(7))
    run = CachedRun(model, seen, Fraction(1), 2, texts=texts)
    fast, one_text = packed(model, item, seen, grid(), texts), packed(model, item, seen, grid())
    for view in item.views:
        slow = run.block(view.mid, context)
        torch.testing.assert_close(fast[view.block], slow, rtol=1e-10, atol=1e-10)
        assert (fast[view.block] - one_text[view.block]).norm() > 1e-3 * slow.norm()


def test_blocks_without_noisy_tokens_change_nothing_for_the_others(model: WanTransformer) -> None:
    item, seen = drawn_item(Fraction(1), 0, sinks=2, blocks=7, history=False), clip(model, 7, 0)
    targets = (3, 6)
    out = packed_forward(
        model,
        item,
        grid(),
        clean=seen.clean.transpose(0, 1),
        compressed=seen.compressed[list(item.compressed)].transpose(0, 1),
        noisy=seen.noisy[[*targets, *targets]].transpose(0, 1),  # two draws
        timesteps=seen.timesteps[[*targets, *targets]].T,
        text=seen.text,
        targets=targets,
    )
    whole = packed(model, item, seen, grid())
    for n, block in enumerate((*targets, *targets)):
        torch.testing.assert_close(out[:, n], whole[block], rtol=1e-10, atol=1e-10)


@every_span
@pytest.mark.parametrize("context", ["sinks", "history"])
def test_packed_blocks_equal_the_cached_rollout_with_random_drops(
    model: WanTransformer, span: Span, context: str
) -> None:
    for seed, sinks in ((0, 2), (1, 1)):
        item = drawn_item(span, seed, sinks=sinks, blocks=7, history=context == "history")
        assert any(set(view.mid) != set(range(sinks, view.block - 1)) for view in item.views[sinks + 1 :])
        assert_equal_to_the_cache(model, item, span, sinks, seed)


def test_blocks_of_three_frames_are_packed_alike(model: WanTransformer) -> None:
    item = drawn_item("fit", 2, sinks=2, blocks=7, history=False, frames=3)
    assert_equal_to_the_cache(model, item, "fit", 2, 2, frames=3)


def test_what_is_dropped_and_what_it_spans_matters(model: WanTransformer) -> None:
    """The equalities above would hold for nothing if mids had no weight in the result."""
    seen = clip(model, 7, 0)
    item = drawn_item(Fraction(4), 0, sinks=2, blocks=7, history=False)
    narrow = drawn_item(Fraction(1), 0, sinks=2, blocks=7, history=False)
    assert [view.mid for view in narrow.views] == [view.mid for view in item.views]
    dropped = replace(item, views=(*item.views[:-1], _without_oldest_mid(item.views[-1])))
    result = packed(model, item, seen, grid())[6]
    for other in (narrow, dropped):
        assert (packed(model, other, seen, grid())[6] - result).norm() > 1e-4 * result.norm()


def _without_oldest_mid(view: PackedView) -> PackedView:
    shape = layout(Fraction(4), sinks=2, top_k=16)
    return demo_flow.packed_view(shape, view.block, view.sink, view.mid[1:], view.recent)


# -- the recipe's items ---------------------------------------------------------------------------------------


@pytest.fixture
def models(model: WanTransformer) -> demo_flow.Models:
    """Items are drawn from the grid alone: the text encoder stays away."""
    compressor = Compressor(CompressorConfig(dim=model.config.dim, in_channels=CHANNELS, branches="lr"))
    return demo_flow.Models(model, compressor, cast(TextEncoder, None), grid())


@pytest.mark.parametrize("seed", range(3))
def test_strict_items_of_the_recipe_equal_the_cached_rollout(
    model: WanTransformer, models: demo_flow.Models, seed: int
) -> None:
    item = demo_flow.strict_item(models, 6, torch.Generator().manual_seed(seed))
    assert item.sinks is not None
    span = next((view.slots.span for view in item.views if view.mid), Fraction(4))
    assert_equal_to_the_cache(model, item, span, len(item.sinks), seed)


class ListContext:
    """Raw keys in a list, turned by complex numbers; positions counted back from the current block by hand."""

    def __init__(self, seen: list[tuple[BlockKV, Tensor]], own: Tensor) -> None:
        self.seen, self.positions = seen, own

    def layer(self, layer: int, k: Tensor, v: Tensor, q_sum: Tensor) -> tuple[Tensor, Tensor]:
        keys = [turn(kv.k[layer], places) for kv, places in self.seen]
        return torch.cat([*keys, k], 1), torch.cat([*(kv.v[layer] for kv, _ in self.seen), v], 1)


def turn(k: Tensor, positions: Tensor) -> Tensor:
    """Rotate [B,S,N,12] by complex numbers; Wan's split of 12 channels is 4 / 4 / 4."""
    pairs = torch.view_as_complex(k.reshape(*k.shape[:-1], 6, 2).contiguous())
    frequencies = torch.tensor([10_000.0 ** (-2 * i / 4) for i in range(2)], dtype=torch.float64)
    angle = (positions[:, :, None] * frequencies).flatten(1)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(-2)


def full_places(start: float) -> Tensor:
    cells = [(start + f, r, c) for f in range(4) for r in range(ROWS) for c in range(COLS)]
    return torch.tensor(cells, dtype=torch.float64)


def small_places(start: float, span: float) -> Tensor:
    cells = [(start + (j + 0.5) * span / 2 - 0.5, 1.5, 4 * c + 1.5) for j in range(2) for c in range(2)]
    return torch.tensor(cells, dtype=torch.float64)


def back_from_current(
    kv: dict[int, BlockKV], backups: dict[int, BlockKV], view: PackedView, span: float
) -> ListContext:
    """The context of a view: every block takes the slots right before those of its successor."""
    place, seen = 0.0, []
    for block in reversed(view.recent):
        place -= 4
        seen.append((kv[block], full_places(place)))
    for block in reversed(view.mid):
        place -= span
        seen.append((backups[block], small_places(place, span)))
    for block in reversed(view.sink):
        place -= 4
        seen.append((kv[block], full_places(place)))
    return ListContext(seen, full_places(0))


@pytest.mark.parametrize(("seed", "mids", "far_share"), [(0, 4, 0.0), (1, 16, 0.0), (2, 8, 1.0), (3, 4, 1.0)])
def test_long_items_equal_a_slow_list_of_raw_keys_and_the_cache(
    model: WanTransformer, models: demo_flow.Models, seed: int, mids: int, far_share: float
) -> None:
    item = demo_flow.long_item(models, mids, torch.Generator().manual_seed(seed), far_share=far_share)
    scene = demo_flow.long_scene(mids, 24, torch.Generator().manual_seed(seed))
    first_near = item.full[2]
    assert all((view.recent == ()) == (far_share == 1) for view in item.views[-2:])
    assert item.full == (0, 1, first_near, first_near + 1, first_near + 2)
    assert item.compressed == tuple(range(2, first_near + 1))
    assert list(scene) == sorted(set(scene)) and len(scene) == first_near + 3
    seen = clip(model, first_near + 3, seed)
    fast = packed(model, item, seen, grid())
    span = float(item.views[-1].slots.span)
    kv: dict[int, BlockKV] = {}
    backups: dict[int, BlockKV] = {}

    def velocity(block: int, context: Context) -> Tensor:
        timesteps = seen.timesteps[block][:, None].expand(-1, 4)
        return model(seen.noisy[block], timesteps, seen.text, context)

    for view in item.views:
        if view.block == first_near:  # the sinks are there: far blocks, as compressed tokens only
            behind = [(kv[sink], full_places(4.0 * sink)) for sink in (0, 1)]
            for block in item.compressed:
                context = ListContext(behind, small_places(8.0, 4.0))
                backups[block] = model.commit_tokens(seen.compressed[block], seen.text, context)
        context = back_from_current(kv, backups, view, span)
        kv[view.block] = model.commit(seen.clean[view.block], seen.text, context)
        slow = velocity(view.block, context)
        torch.testing.assert_close(fast[view.block], slow, rtol=1e-10, atol=1e-10)

    if far_share:  # no cache leaves out recent blocks
        return
    # The last two in the cache. Of a far block nothing but its backup is ever read there.
    cache = KVCache(
        layout(Fraction(span), sinks=2, top_k=16), num_blocks=40, dtype=torch.float64, batch=BATCH
    )
    for block in range(first_near + 2):
        if block > first_near:
            cached = cache.context(block, selected=torch.tensor([item.views[3].mid] * LAYERS))
            torch.testing.assert_close(fast[block], velocity(block, cached), rtol=1e-10, atol=1e-10)
        cache.commit(block, kv.get(block, kv[0]))
        if block in backups:
            cache.add_backup(block, backups[block])
    last = item.full[-1]
    cached = cache.context(last, selected=torch.tensor([item.views[4].mid] * LAYERS))
    torch.testing.assert_close(fast[last], velocity(last, cached), rtol=1e-10, atol=1e-10)


def test_in_long_items_a_visitor_returns_whose_look_only_the_far_blocks_have(
    models: demo_flow.Models,
) -> None:
    """Here in blocks 5 and 14; 14 is trained with 13 as its predecessor and 5 among the mids; sinks never had it."""
    here = [block in (5, 14) for block in range(24)]
    trained = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        item = demo_flow.long_item(models, 8, generator)
        scene = demo_flow.long_scene(8, 24, generator, here=here, recall=1.0)
        number = scene.index(14)
        assert number in item.full[-2:] and scene[number - 1] == 13
        view = item.views[item.full.index(number)]
        assert (
            view.recent == (number - 1,) and scene.index(5) in view.mid and scene[: len(view.sink)] == (0, 1)
        )
        assert not any(here[scene[block]] for block in (*view.sink, *view.recent))
        trained += number == item.full[-1]
    assert 2 < trained < 18  # the last and the one before
    lasts = set()
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        lasts.add(demo_flow.long_scene(8, 24, generator, here=here, recall=0.0)[-1])
    assert len(lasts) > 5


def test_more_of_the_blocks_that_saw_a_visitor_can_be_asked_for() -> None:
    here = [block in (5, 6, 7, 14) for block in range(24)]
    for close, seen in ((1, {7}), (2, {6, 7}), (3, {5, 6, 7})):
        for seed in range(10):
            generator = torch.Generator().manual_seed(seed)
            assert seen <= {*demo_flow.long_scene(4, 24, generator, here=here, recall=1.0, close=close)}
    rare = [
        demo_flow.long_scene(4, 24, torch.Generator().manual_seed(seed), here=here, recall=1.0)
        for seed in range(20)
    ]
    assert any(not {5, 6, 7} <= {*scene} for scene in rare)


def test_some_long_items_see_far_blocks_alone(models: demo_flow.Models) -> None:
    items = [
        demo_flow.long_item(models, 8, torch.Generator().manual_seed(seed), far_share=0.5)
        for seed in range(60)
    ]
    seen = [{(bool(view.sink), bool(view.recent)) for view in item.views[-2:]} for item in items]
    assert all(len(kinds) == 1 for kinds in seen)  # both trained blocks alike
    counts = {
        kind: sum(kind in kinds for kinds in seen) for kind in ((True, True), (True, False), (False, False))
    }
    assert sum(counts.values()) == 60 and counts[True, True] > 20
    assert counts[True, False] > 7 and counts[False, False] > 7


def test_what_a_view_can_know_of_a_visitor(models: demo_flow.Models) -> None:
    shape = layout(Fraction(1), sinks=1, top_k=16)
    views = tuple(
        demo_flow.packed_view(shape, block, sink, mid, recent)
        for block, sink, mid, recent in (
            (0, (), (), ()),
            (1, (0,), (), ()),
            (2, (0,), (), (1,)),
            (3, (0,), (1,), (2,)),
            (4, (0,), (), (3,)),  # block 1 was dropped
        )
    )
    item = PackedItem(tuple(range(5)), (1, 2), views, (0,))
    here = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 0, 0, 1]])
    seen = demo_flow.remembered(here, item, (0, 1, 2, 3, 4))
    assert seen.known.int().tolist() == [[1, 0, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert seen.returns.int().tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    # Without block 1 among the mids, the visitor of the first scene is new in block 3.
    forgetful = replace(item, views=(*views[:3], replace(views[3], mid=()), views[4]))
    assert not bool(demo_flow.remembered(here, forgetful, (3,)).known[0, 0])


def test_block_0_alone_is_the_bidirectional_model(model: WanTransformer) -> None:
    item = drawn_item(Fraction(1), 0, sinks=2, blocks=3, history=False)
    seen = clip(model, 3, 5)
    alone = model(
        seen.noisy[0], seen.timesteps[0][:, None].expand(-1, 4), seen.text, AloneContext(full_places(0))
    )
    torch.testing.assert_close(packed(model, item, seen, grid())[0], alone, rtol=1e-10, atol=1e-10)


# -- gradients ------------------------------------------------------------------------------------------------


def test_gradients_reach_the_compressor_and_equal_finite_differences(model: WanTransformer) -> None:
    item = drawn_item(Fraction(1), 3, sinks=2, blocks=6, history=False)
    seen = clip(model, 6, 3)
    compressor = Compressor(
        CompressorConfig(dim=model.config.dim, in_channels=CHANNELS, widths=(4, 4, 6, 8), branches="hr")
    ).double()
    randomise(compressor, 4)
    direction = torch.randn(BATCH, 6, CHANNELS, 4, 2 * ROWS, 2 * COLS, dtype=torch.float64)

    def loss() -> Tensor:
        tokens = [compressor(seen.clean[block], None) for block in item.compressed]
        out = packed_forward(
            model,
            item,
            grid(),
            clean=seen.clean.transpose(0, 1),
            compressed=torch.stack(tokens, 1),
            noisy=seen.noisy.transpose(0, 1),
            timesteps=seen.timesteps.T,
            text=seen.text,
        )
        return (out * direction).sum()

    loss().backward()
    assert compressor.hr is not None
    step = 1e-5
    for weight in (compressor.hr.time.weight, compressor.hr.project.weight):
        assert weight.grad is not None and bool((weight.grad != 0).any())
        flat, n = weight.data.view(-1), int(weight.grad.abs().argmax())
        original, ends = float(flat[n]), []
        for sign in (1, -1):
            flat[n] = original + sign * step
            with torch.no_grad():
                ends.append(float(loss()))
        flat[n] = original
        expected = (ends[0] - ends[1]) / (2 * step)
        assert float(weight.grad.view(-1)[n]) == pytest.approx(expected, rel=1e-5)
