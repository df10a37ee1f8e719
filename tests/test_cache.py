"""The three-partition memory against a slow simulation made of Python lists."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from functools import cache as remember
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from packforcing_cli import rope
from packforcing_cli.cache import CacheContext, KVCache
from packforcing_cli.errors import LayoutError, UsageError
from packforcing_cli.layout import Grid, Layout
from packforcing_cli.transformer import BlockKV

LAYERS, HEADS, DIM, ROWS, COLS, FRAMES = 3, 2, 12, 4, 8, 4
BLOCK, COMPRESSED = FRAMES * ROWS * COLS, 4
NUM_BLOCKS = 12

SETTINGS = {  # sink_blocks, recent_blocks, top_k, bank, mid_span
    "default-like": (2, 1, 3, 5, FRAMES),
    "two recent, unlimited bank": (1, 2, 2, None, 1),
    "no sink, bank as small as top-k": (0, 1, 2, 2, 2),
    "fit": (2, 1, 4, 8, "fit"),
    "window": (0, 3, 0, None, FRAMES),
    "sink": (2, 1, 0, None, FRAMES),
    "full": (NUM_BLOCKS, 1, 0, None, FRAMES),
}
MODES = ("affinity-recent", "affinity", "fifo", "random")
CASES = [pytest.param(setting, "affinity-recent", id=name) for name, setting in SETTINGS.items()]
CASES += [pytest.param(SETTINGS["default-like"], mode, id=mode) for mode in MODES[1:]]
every_case = pytest.mark.parametrize(("setting", "mode"), CASES)


def make_layout(setting: Any, dtype: torch.dtype = torch.float64, *, identity: bool = False) -> Layout:
    sink, recent, top_k, bank, span = setting
    grid = Grid(
        frames_per_block=FRAMES,
        rows=ROWS,
        cols=COLS,
        layers=LAYERS,
        kv_dim=HEADS * DIM,
        heads=HEADS,
        dtype_bytes=dtype.itemsize,
        identity=identity,
    )
    return Layout(
        grid=grid,
        sink_blocks=sink,
        recent_blocks=recent,
        top_k=top_k,
        bank=bank,
        mid_span=span if span == "fit" else Fraction(span),
        trained_frames=20,
    )


def make_cache(
    setting: Any,
    dtype: torch.dtype = torch.float64,
    *,
    pins: frozenset[int] = frozenset(),
    cuts: tuple[int, ...] = (),
    rope_adjustment: bool = True,
    kv_dtype: str = "auto",
    **options: Any,
) -> KVCache:
    layout = replace(
        make_layout(setting, dtype),
        pins=pins,
        cuts=cuts,
        rope_adjustment=rope_adjustment,
        kv_dtype=kv_dtype,
    )
    return KVCache(layout, **{"num_blocks": NUM_BLOCKS, "dtype": dtype, **options})


@remember
def random_kv(block: int, tokens: int, dtype: torch.dtype = torch.float64, batch: int = 1) -> BlockKV:
    """Keys, values and query sums that depend on the block's number alone."""
    generator = torch.Generator().manual_seed(1000 * tokens + block)
    k, v = torch.randn(2, LAYERS, batch, tokens, HEADS, DIM, generator=generator).to(dtype)
    return BlockKV(k, v, torch.randn(LAYERS, batch, HEADS, DIM, generator=generator))


def denoise(cache: KVCache, context: CacheContext, passes: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Some passes over a block, each with other keys and values; what the layers attended in the last."""
    seen = []
    for step in range(passes):
        own = random_kv(100 * context.block + step, BLOCK, cache.dtype)
        seen = [context.layer(layer, own.k[layer], own.v[layer], own.q_sum[layer]) for layer in range(LAYERS)]
    return seen


def roll(cache: KVCache, blocks: range) -> list[CacheContext]:
    """Denoise, commit and back up some blocks; their contexts."""
    contexts = []
    for i in blocks:
        contexts.append(cache.context(i))
        denoise(cache, contexts[-1])
        cache.commit(i, random_kv(i, BLOCK, cache.dtype))
        if cache.needs_backup(i):
            cache.add_backup(i, random_kv(i, COMPRESSED, cache.dtype))
    return contexts


def tensors(cache: KVCache) -> dict[str, Tensor]:
    return cache.tensors()


# -- the slow simulation: lists, complex numbers, no buffers ------------------------------------------------


def turn(k: Tensor, positions: list[tuple[float, float, float]]) -> Tensor:
    """Rotate [S, N, D] by complex numbers; Wan's split of 12 channels is 4 / 4 / 4."""
    pairs = torch.view_as_complex(k.reshape(*k.shape[:-1], DIM // 2, 2).contiguous())
    phase = [[p[axis] * 10_000.0 ** (-2 * i / 4) for axis in range(3) for i in range(2)] for p in positions]
    angle = torch.tensor(phase, dtype=torch.float64)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(-2)


def block_cells(start: float) -> list[tuple[float, float, float]]:
    return [(start + f, r, c) for f in range(FRAMES) for r in range(ROWS) for c in range(COLS)]


def compressed_cells(start: float, span: float) -> list[tuple[float, float, float]]:
    return [(start + (j + 0.5) * span / 2 - 0.5, 1.5, 4 * c + 1.5) for j in range(2) for c in range(2)]


def float64(positions: list[tuple[float, float, float]]) -> Tensor:
    return torch.tensor(positions, dtype=torch.float64)


def assert_equal(fast: Tensor, slow: Tensor) -> None:
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("snd,tnd->nst", q, k) / math.sqrt(DIM)
    return torch.einsum("nst,tnd->snd", weights.softmax(-1), v)


class Simulation:
    """Block numbers in lists, as in docs/method.md 2.5."""

    def __init__(self, setting: Any) -> None:
        self.sink_blocks, self.recent_blocks, self.top_k, self.bank_blocks, self.span = setting
        self.sink: list[int] = []
        self.recent: list[int] = []
        self.bank: list[int] = []
        self.last: int | None = None

    def commit(self, i: int) -> None:
        self.last = i
        if len(self.sink) < self.sink_blocks:
            self.sink.append(i)
            return
        self.recent.append(i)
        while len(self.recent) > self.recent_blocks:
            self.bank.append(self.recent.pop(0))
        while self.bank_blocks is not None and len(self.bank) > self.bank_blocks:
            self.bank.pop(0)
        if self.top_k == 0:
            self.bank = []

    def active(self, mode: str, layer: int, first_pass: BlockKV) -> list[int]:
        if mode == "fifo":
            return self.bank[-self.top_k :]
        if not self.bank or self.last is None:
            return []
        q = random_kv(self.last, BLOCK).q_sum[layer, 0].double()
        if mode == "affinity":
            q = q + first_pass.q_sum[layer, 0]
        scores = {m: (random_kv(m, COMPRESSED).k[layer, 0] * q).sum().item() for m in self.bank}
        return sorted(sorted(self.bank, key=scores.__getitem__)[-self.top_k :])

    def slots(self, active: int) -> tuple[list[float], list[float], list[float], float, float]:
        """Starts of sinks, mids, recents and the current block, walking back from it; span of a mid."""
        span = float(FRAMES)
        if self.span == "fit":
            span = min(4.0, (20 - 4 * (self.sink_blocks + self.recent_blocks) - 4) / max(active, 1))
        elif self.span != FRAMES:
            span = float(self.span)
        widths = [4.0] * len(self.recent) + [span] * active + [4.0] * len(self.sink)
        back = [-sum(widths[: j + 1]) for j in range(len(widths))]
        shift = -back[-1] if back else 0.0
        starts = [b + shift for b in reversed(back)]
        s, m = len(self.sink), len(self.sink) + active
        return starts[:s], starts[s:m], starts[m:], shift, span

    def attended(self, layer: int, active: list[int], own_k: Tensor, own_v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (rotated, by concatenation in chronological order) and values [S, N, D]."""
        sinks, mids, recents, _, span = self.slots(len(active))
        keys, values = [], []
        for blocks, starts in ((self.sink, sinks), (active, mids), (self.recent, recents)):
            for block, start in zip(blocks, starts, strict=True):
                compressed = blocks is active
                kv = random_kv(block, COMPRESSED if compressed else BLOCK)
                cells = compressed_cells(start, span) if compressed else block_cells(start)
                keys.append(turn(kv.k[layer, 0], cells))
                values.append(kv.v[layer, 0])
        return torch.cat([*keys, own_k]), torch.cat([*values, own_v])


# -- visibility, slots, rotation ----------------------------------------------------------------------------


@every_case
def test_every_layer_sees_what_the_simulation_sees(setting: Any, mode: str) -> None:
    cache, simulation = make_cache(setting, select=mode, seed=3), Simulation(setting)
    query = torch.randn(5, HEADS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for i in range(NUM_BLOCKS):
        context = cache.context(i)
        seen = denoise(cache, context)
        stats = cache.stats()
        assert [list(stats.sink), list(stats.bank), list(stats.recent)] == [
            simulation.sink,
            simulation.bank,
            simulation.recent,
        ]
        first, last = random_kv(100 * i, BLOCK), random_kv(100 * i + 1, BLOCK)
        for layer in range(LAYERS):
            active = context.selected[layer].tolist()
            if mode != "random":
                assert active == simulation.active(mode, layer, first), (i, layer)
            assert active == sorted(set(active))
            assert set(active) <= set(simulation.bank)
            assert tuple(active) == stats.active[layer]
            k, v = (t[0] for t in seen[layer])
            slow_k, slow_v = simulation.attended(layer, active, last.k[layer, 0], last.v[layer, 0])
            assert k.shape == slow_k.shape
            assert_equal(attend(query, k, v), attend(query, slow_k, slow_v))
        current_start = simulation.slots(context.selected.shape[1])[3]
        assert torch.equal(context.positions, float64(block_cells(current_start)))
        cache.commit(i, random_kv(i, BLOCK))
        if cache.needs_backup(i):
            cache.add_backup(i, random_kv(i, COMPRESSED))
        simulation.commit(i)


@pytest.mark.parametrize("mode", MODES)
def test_without_rope_adjustment_keys_are_turned_to_the_time_of_their_block(mode: str) -> None:
    """Brute force: every key at 4 times its block's number, from whichever blocks each layer recalled."""
    setting = (2, 1, 3, 6, FRAMES)
    cache = make_cache(setting, select=mode, seed=3, rope_adjustment=False)
    query = torch.randn(5, HEADS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    choices = set()
    for i in range(NUM_BLOCKS):
        context = cache.context(i)
        seen, own = denoise(cache, context), random_kv(100 * i + 1, BLOCK)
        assert torch.equal(context.positions, float64(block_cells(4.0 * i)))
        stats = cache.stats()
        for layer in range(LAYERS):
            mids = context.selected[layer].tolist()
            choices.add(tuple(mids))
            keys, values = [own.k[layer, 0]], [own.v[layer, 0]]
            for block in (*stats.sink, *stats.recent):
                keys.append(turn(random_kv(block, BLOCK).k[layer, 0], block_cells(4.0 * block)))
                values.append(random_kv(block, BLOCK).v[layer, 0])
            for block in mids:
                keys.append(
                    turn(random_kv(block, COMPRESSED).k[layer, 0], compressed_cells(4.0 * block, 4.0))
                )
                values.append(random_kv(block, COMPRESSED).v[layer, 0])
            k, v = (t[0] for t in seen[layer])
            assert_equal(attend(query, k, v), attend(query, torch.cat(keys), torch.cat(values)))
        cache.commit(i, random_kv(i, BLOCK))
        if cache.needs_backup(i):
            cache.add_backup(i, random_kv(i, COMPRESSED))
    assert any(b - a > 1 for ids in choices for a, b in pairwise(ids)) or mode == "fifo"  # with gaps


def test_visibility_table_of_twelve_blocks() -> None:
    cache, rows = make_cache(SETTINGS["default-like"], select="fifo"), []
    for i in range(NUM_BLOCKS):
        roll(cache, range(i, i + 1))
        stats = cache.stats()
        rows.append((list(stats.sink), list(stats.bank), list(stats.recent)))
    assert rows[0] == ([0], [], [])
    assert rows[1] == ([0, 1], [], [])
    assert rows[2] == ([0, 1], [], [2])
    assert rows[3] == ([0, 1], [2], [3])  # block 2 is read compressed by block 4 first
    assert rows[7] == ([0, 1], [2, 3, 4, 5, 6], [7])
    assert rows[8] == ([0, 1], [3, 4, 5, 6, 7], [8])  # the bank of 5 dropped its oldest
    assert rows[11] == ([0, 1], [6, 7, 8, 9, 10], [11])


def test_116_slot_moves_leave_no_drift() -> None:
    """Sinks stay, recents and mids are turned again and again: always as if turned once from the raw keys."""
    setting = (2, 1, 3, None, "fit")
    cache = make_cache(setting, torch.bfloat16, num_blocks=120, pins=frozenset({2}))
    for i in range(119):
        roll(cache, range(i, i + 1))
    context = cache.context(119)
    assert context.selected[:, 0].tolist() == [2] * LAYERS
    k, _ = denoise(cache, context)[0]
    span = (20 - 16) / 3
    cos, sin = rope.angles(float64(compressed_cells(8.0, span)), DIM)
    fresh = rope.rotate(random_kv(2, COMPRESSED, torch.bfloat16).k[0], cos, sin)
    start = BLOCK + 3 * BLOCK  # scratch, two sinks, one recent
    assert torch.equal(k[:, start : start + COMPRESSED], fresh)


def test_with_identity_compression_and_full_budget_everything_is_attended_in_full() -> None:
    """Uncompressed backups at their own positions: the context equals one long window."""
    layout = make_layout((1, 1, NUM_BLOCKS, None, FRAMES), identity=True)
    cache = KVCache(layout, num_blocks=6, dtype=torch.float64)
    for i in range(6):
        context = cache.context(i)
        k, v = denoise(cache, context)[1]
        blocks = [random_kv(b, BLOCK) for b in range(i)]
        own = random_kv(100 * i + 1, BLOCK)
        turned = [turn(kv.k[1, 0], block_cells(4.0 * n)) for n, kv in enumerate(blocks)]
        long_k = torch.cat([*turned, own.k[1, 0]])
        long_v = torch.cat([*(kv.v[1, 0] for kv in blocks), own.v[1, 0]])
        query = own.q_sum[1].double()
        assert_equal(attend(query, k[0], v[0]), attend(query, long_k, long_v))
        cache.commit(i, random_kv(i, BLOCK))
        if cache.needs_backup(i):
            cache.add_backup(i, random_kv(i, BLOCK))


# -- read, then commit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_denoising_never_changes_the_cache(mode: str) -> None:
    cache = make_cache(SETTINGS["default-like"], select=mode)
    roll(cache, range(NUM_BLOCKS - 1))
    kept = cache.state_dict()
    context = cache.context(NUM_BLOCKS - 1)
    denoise(cache, context, passes=1)  # `affinity` brings its mids into the buffer here
    before = {name: tensor.clone() for name, tensor in tensors(cache).items()}
    selected = context.selected.clone()
    denoise(cache, context, passes=5)
    for name, tensor in tensors(cache).items():
        skip = BLOCK if name in ("k", "v") else 0  # the scratch
        assert torch.equal(tensor[:, :, skip:], before[name][:, :, skip:]), name
    assert not torch.equal(tensors(cache)["k"], before["k"])
    assert torch.equal(context.selected, selected)
    after = cache.state_dict()
    assert all(torch.equal(after[name], kept[name]) for name in kept)


def test_later_passes_return_the_same_tensors() -> None:
    cache = make_cache(SETTINGS["default-like"], select="affinity")
    roll(cache, range(8))
    context = cache.context(8)
    first = [(k.clone(), v.clone()) for k, v in denoise(cache, context, passes=1)]
    second = denoise(cache, context, passes=3)
    for layer in range(LAYERS):
        for a, b in zip(first[layer], second[layer], strict=True):
            assert torch.equal(a[:, BLOCK:], b[:, BLOCK:])


def test_a_context_is_closed_by_commit_and_by_a_newer_one() -> None:
    cache = make_cache(SETTINGS["default-like"])
    old = cache.context(0)
    new = cache.context(0)
    with pytest.raises(ValueError, match="closed"):
        denoise(cache, old)
    denoise(cache, new)
    cache.commit(0, random_kv(0, BLOCK))
    with pytest.raises(ValueError, match="closed"):
        denoise(cache, new)


def test_order_and_existence_are_checked_before_anything_changes() -> None:
    cache = make_cache(SETTINGS["default-like"])
    with pytest.raises(ValueError, match="next block is 0"):
        cache.context(1)
    with pytest.raises(ValueError, match="next block is 0"):
        cache.commit(1, random_kv(1, BLOCK))
    with pytest.raises(ValueError, match="128"):
        cache.commit(0, random_kv(0, COMPRESSED))
    roll(cache, range(2))
    with pytest.raises(ValueError, match="recent is"):
        cache.add_backup(1, random_kv(1, COMPRESSED))  # a sink
    cache.commit(2, random_kv(2, BLOCK))
    before = cache.state_dict()
    with pytest.raises(ValueError, match=r"add_backup\(2\)"):
        cache.commit(3, random_kv(3, BLOCK))
    with pytest.raises(ValueError, match="takes"):
        cache.add_backup(2, random_kv(2, BLOCK))
    after = cache.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    cache.add_backup(2, random_kv(2, COMPRESSED))
    with pytest.raises(ValueError, match="with backups of"):
        cache.add_backup(2, random_kv(2, COMPRESSED))
    cache.commit(3, random_kv(3, BLOCK))
    with pytest.raises(ValueError, match="recent is"):
        cache.add_backup(2, random_kv(2, COMPRESSED))


def test_no_more_blocks_than_planned() -> None:
    cache = make_cache(SETTINGS["default-like"], num_blocks=3)
    roll(cache, range(3))
    with pytest.raises(ValueError, match="of 3"):
        cache.commit(3, random_kv(3, BLOCK))


def test_a_backup_may_come_as_late_as_its_block_is_recent() -> None:
    cache = make_cache((1, 2, 2, None, 1))
    for i in range(3):
        cache.commit(i, random_kv(i, BLOCK))
    cache.add_backup(2, random_kv(2, COMPRESSED))
    cache.add_backup(1, random_kv(1, COMPRESSED))
    cache.commit(3, random_kv(3, BLOCK))
    assert cache.bank_blocks == [1]


@pytest.mark.parametrize("bank", [5, None])
def test_what_is_chosen_does_not_depend_on_when_a_backup_comes(bank: int | None) -> None:
    """Also to the last bit of the scores, which the trace keeps: a block's backup may come while the next is made."""
    soon, late = (make_cache((2, 1, 3, bank, 1), torch.float32) for _ in range(2))
    for i in range(NUM_BLOCKS):
        contexts = [soon.context(i), late.context(i)]
        if i and late.needs_backup(i - 1):
            late.add_backup(i - 1, random_kv(i - 1, COMPRESSED, torch.float32))
        for one, two in zip(
            *(denoise(c, x) for c, x in zip((soon, late), contexts, strict=True)), strict=True
        ):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        if contexts[0].scores is not None:
            assert torch.equal(contexts[0].scores, contexts[1].scores)  # type: ignore[arg-type]
        for cache in (soon, late):
            cache.commit(i, random_kv(i, BLOCK, torch.float32))
        if soon.needs_backup(i):
            soon.add_backup(i, random_kv(i, COMPRESSED, torch.float32))
    late.add_backup(NUM_BLOCKS - 1, random_kv(NUM_BLOCKS - 1, COMPRESSED, torch.float32))
    states = soon.state_dict(), late.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_gradients_stay_outside() -> None:
    cache = make_cache(SETTINGS["default-like"])
    kv = random_kv(0, BLOCK)
    own = kv.k[0].clone().requires_grad_()
    k, _ = cache.context(0).layer(0, own, kv.v[0], kv.q_sum[0])
    cache.commit(0, BlockKV(kv.k.clone().requires_grad_(), kv.v, kv.q_sum))
    assert not k.requires_grad
    assert not any(t.requires_grad for t in tensors(cache).values())


# -- bank and selection -------------------------------------------------------------------------------------


def test_the_oldest_unpinned_block_leaves_a_full_bank() -> None:
    cache = make_cache((1, 1, 2, 3, FRAMES), select="fifo", pins=frozenset({1, 3}))
    roll(cache, range(NUM_BLOCKS))
    assert cache.bank_blocks == [1, 3, 10]
    assert make_pinned_context(cache, NUM_BLOCKS - 1) == [[1, 3]] * LAYERS


@pytest.mark.parametrize("recent", [1, 2, 3])
def test_a_cut_leaves_recent_behind_and_keeps_what_was_in_it_compressed(recent: int) -> None:
    """From block 7 on: the same keys and values as from a cache in which the order of events was played out."""
    setting, cuts = (2, recent, 16, 8, 1), (3, 7, 8)
    cache = make_cache(setting, cuts=cuts)
    for i, context in enumerate(roll(cache, range(6))):
        assert context.block == i
    for i in range(6, NUM_BLOCKS):
        context = cache.context(i)
        last_cut = max(cut for cut in cuts if cut <= i)
        full = [0, 1, *range(max(last_cut, i - recent), i)]
        mids = [b for b in range(2, i) if b not in full]
        slots = cache.layout.slots(i)
        starts = [*slots.sink_starts, *slots.recent_starts]
        k, v = denoise(cache, context)[0]
        ring = sorted(full, key=cache._place)
        expected_v = torch.cat([random_kv(b, BLOCK).v[0] for b in ring], 1)
        assert torch.equal(v[:, BLOCK : BLOCK + expected_v.shape[1]], expected_v)
        for place, block in enumerate(ring):
            at = [
                (float(starts[full.index(block)]) + f, r, c)
                for f in range(4)
                for r in range(4)
                for c in range(8)
            ]
            cos, sin = rope.angles(float64(at), DIM)
            turned = rope.rotate(random_kv(block, BLOCK).k[0], cos, sin)
            assert torch.equal(k[:, BLOCK * (place + 1) : BLOCK * (place + 2)], turned)
        compressed = torch.cat([random_kv(b, COMPRESSED).v[0] for b in mids[-8:]], 1)
        assert torch.equal(v[:, BLOCK * (len(full) + 1) :], compressed)
        cache.commit(i, random_kv(i, BLOCK))
        cache.add_backup(i, random_kv(i, COMPRESSED))
    with pytest.raises(ValueError, match="the next block"):
        cache.commit(NUM_BLOCKS, random_kv(0, BLOCK))


def test_a_cut_needs_the_backup_of_the_block_before_it() -> None:
    cache = make_cache((1, 1, 4, 8, 1), cuts=(5,))
    roll(cache, range(4))
    cache.context(4)
    cache.commit(4, random_kv(4, BLOCK))
    with pytest.raises(ValueError, match="backup"):
        cache.context(5)
    cache.add_backup(4, random_kv(4, COMPRESSED))
    assert cache.context(5).selected.tolist() == [[1, 2, 3, 4]] * LAYERS


def test_a_cache_with_a_cut_is_saved_and_loaded_behind_it() -> None:
    setting, cuts = (1, 3, 4, 4, 1), (6,)
    one, other = make_cache(setting, cuts=cuts), make_cache(setting, cuts=cuts)
    roll(one, range(8))
    other.load_state_dict(one.state_dict())
    for cache in (one, other):
        roll(cache, range(8, 10))
    seen = [denoise(cache, cache.context(10)) for cache in (one, other)]
    for (k, v), (same_k, same_v) in zip(*seen, strict=True):
        assert torch.equal(k, same_k) and torch.equal(v, same_v)


def make_pinned_context(cache: KVCache, block: int) -> list[list[int]]:
    """The choice of a fresh cache of the same kind that has come as far as `block`."""
    fresh = make_cache((1, 1, 2, 3, FRAMES), select=cache.select, pins=cache.layout.pins)
    chosen: list[list[int]] = roll(fresh, range(block + 1))[-1].selected.tolist()
    return chosen


def test_random_choice_is_reproducible() -> None:
    chosen = [
        [c.selected.tolist() for c in roll(make_cache((1, 1, 2, 8, 1), select="random", seed=s), range(12))]
        for s in (5, 5, 6)
    ]
    assert chosen[0] == chosen[1] != chosen[2]


def test_scores_are_reported_and_degenerate_ones_fall_back_to_the_newest() -> None:
    cache = make_cache((1, 1, 2, 8, 1))
    roll(cache, range(7))
    clean = random_kv(7, BLOCK)
    broken = BlockKV(clean.k, clean.v, clean.q_sum * torch.tensor([1.0, 0.0, 1.0])[:, None, None, None])
    cache.context(7)
    cache.commit(7, broken)
    cache.add_backup(7, random_kv(7, COMPRESSED))
    context = cache.context(8)
    assert context.scores is not None
    assert context.scores.shape == (LAYERS, 6)
    assert context.degenerate.tolist() == [False, True, False]
    assert context.selected[1].tolist() == [5, 6]
    best = context.scores[0].topk(2).indices.sort().values + 1  # the bank holds 1 .. 6
    assert context.selected[0].tolist() == best.tolist()


def test_a_recorded_choice_can_be_forced() -> None:
    cache = make_cache((1, 1, 2, 8, 1), select="affinity")
    roll(cache, range(6))
    context = cache.context(6)
    denoise(cache, context)
    choice = context.selected.clone()
    wanted = torch.tensor([[1, 4], [2, 3], [1, 2]])
    forced = cache.context(6, selected=wanted)
    k, v = denoise(cache, forced)[1]
    assert torch.equal(forced.selected, wanted)
    assert torch.equal(v[0, -2 * COMPRESSED :], torch.cat([random_kv(b, COMPRESSED).v[1, 0] for b in (2, 3)]))
    replayed = denoise(cache, cache.context(6, selected=choice))
    assert replayed[0][0].shape == k.shape
    for wrong in ([[1, 9]] * 3, [[4, 1]] * 3, [[1]] * 3, [[1, 4]]):
        with pytest.raises(ValueError, match="ascending"):
            cache.context(6, selected=torch.tensor(wrong))


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="clever"):
        make_cache(SETTINGS["default-like"], select="clever")
    with pytest.raises(LayoutError, match="none"):
        make_cache(SETTINGS["default-like"], select="none")
    with pytest.raises(LayoutError, match="bytes a number"):
        KVCache(make_layout(SETTINGS["sink"], torch.float32), num_blocks=2, dtype=torch.bfloat16)
    with pytest.raises(LayoutError, match="compressed context"):
        make_cache(SETTINGS["default-like"], compressed_context="all")


# -- the context of the compressed forward ------------------------------------------------------------------


def test_compressed_tokens_see_the_sinks_and_themselves() -> None:
    cache = make_cache(SETTINGS["default-like"])
    roll(cache, range(6))
    denoise(cache, cache.context(6))
    own = random_kv(55, COMPRESSED)
    cache.commit(6, random_kv(6, BLOCK))
    context = cache.compressed_context(6)
    assert torch.equal(context.positions, float64(compressed_cells(8.0, 4.0)))
    seen = [t.clone() for t in context.layer(1, own.k[1], own.v[1], own.q_sum[1])]
    sinks = [random_kv(b, BLOCK) for b in (0, 1)]
    slow_k = torch.cat([own.k[1, 0], *(turn(kv.k[1, 0], block_cells(4.0 * b)) for b, kv in enumerate(sinks))])
    assert_equal(seen[0][0], slow_k)
    assert torch.equal(seen[1][0], torch.cat([own.v[1, 0], *(kv.v[1, 0] for kv in sinks)]))

    # It may as well be asked for between two passes over the next block, which does not notice.
    following = cache.context(7)
    first = [k.clone() for k, _ in denoise(cache, following, passes=1)]
    late = cache.compressed_context(6)
    for a, b in zip(seen, late.layer(1, own.k[1], own.v[1], own.q_sum[1]), strict=True):
        assert torch.equal(a, b)
    second = [k.clone() for k, _ in denoise(cache, following, passes=1)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_with_history_compressed_tokens_see_what_their_block_saw() -> None:
    cache = make_cache(SETTINGS["fit"], select="affinity", compressed_context="history")
    roll(cache, range(8))
    context = cache.context(8)
    own = random_kv(55, COMPRESSED)
    compressed = cache.compressed_context(8)
    with pytest.raises(ValueError, match="no mids yet"):
        compressed.layer(2, own.k[2], own.v[2], own.q_sum[2])
    block_k, block_v = (t.clone() for t in denoise(cache, context)[2])
    k, v = compressed.layer(2, own.k[2], own.v[2], own.q_sum[2])
    assert torch.equal(k, torch.cat([own.k[2], block_k[:, BLOCK:]], dim=1))
    assert torch.equal(v, torch.cat([own.v[2], block_v[:, BLOCK:]], dim=1))
    start = context.positions[0, 0].item()
    assert torch.equal(compressed.positions, float64(compressed_cells(start, 4.0)))
    cache.commit(8, random_kv(8, BLOCK))
    with pytest.raises(ValueError, match="closed"):
        compressed.layer(2, own.k[2], own.v[2], own.q_sum[2])
    with pytest.raises(ValueError, match="history of block 8"):
        cache.compressed_context(8)


def test_sinks_and_settings_without_mids_take_no_backup() -> None:
    cache = make_cache(SETTINGS["default-like"])
    assert [cache.needs_backup(i) for i in range(4)] == [False, False, True, True]
    assert not any(make_cache(SETTINGS["window"]).needs_backup(i) for i in range(NUM_BLOCKS))
    with pytest.raises(ValueError, match="takes no backup"):
        cache.compressed_context(1)


# -- memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("num_blocks", [1, 2, 4, NUM_BLOCKS])
def test_live_tensor_bytes_equal_the_layouts(setting: Any, num_blocks: int) -> None:
    for batch, dtype in ((1, torch.bfloat16), (2, torch.float32)):
        cache = make_cache(setting, dtype, num_blocks=num_blocks, batch=batch)
        for i in range(num_blocks):
            cache.commit(i, random_kv(i, BLOCK, dtype, batch))
            if cache.needs_backup(i):
                cache.add_backup(i, random_kv(i, COMPRESSED, dtype, batch))
        live, planned = cache.stats().bytes, cache.layout.capacity_bytes(num_blocks)
        assert live.live == sum(tensor.nbytes for tensor in tensors(cache).values()) == batch * planned.live
        for part in ("stored", "current", "raw_keys", "backups", "bank"):
            assert getattr(live, part) == batch * getattr(planned, part), part


def test_storage_is_fixed() -> None:
    cache = make_cache(SETTINGS["default-like"], num_blocks=30)
    before = {name: (t.data_ptr(), t.nbytes) for name, t in tensors(cache).items()}
    roll(cache, range(30))
    assert {name: (t.data_ptr(), t.nbytes) for name, t in tensors(cache).items()} == before


def test_an_unlimited_bank_grows_by_one_compressed_block_a_block() -> None:
    """By its keys and values; the key sums of all blocks to come are there from the start."""
    cache = make_cache((2, 1, 3, None, 1), torch.bfloat16, num_blocks=30)
    live, places = [], {}
    for i in range(30):
        roll(cache, range(i, i + 1))
        found = tensors(cache)
        live.append(sum(tensor.nbytes for tensor in found.values()))
        now = {name: tensor.data_ptr() for name, tensor in found.items()}
        assert places.items() <= now.items()  # what is there does not move
        places = now
    one_block, sums = LAYERS * HEADS * DIM * 2 * 2 * COMPRESSED, LAYERS * HEADS * DIM * 4
    assert {after - before for before, after in pairwise(live[2:])} == {one_block}
    assert live[0] == live[2]
    assert live[-1] == cache.stats().bytes.live == cache.layout.capacity_bytes(30).live
    assert tensors(cache)["bank_key_sums"].nbytes == (27 + 1) * sums


def test_over_an_hour_an_unlimited_bank_copies_nothing_to_grow() -> None:
    """What a block moves grows by one key sum and a few numbers for each block there is to choose from, as it must."""
    from packforcing_cli import counting

    hour, each = 3600, 450
    grid = Grid(frames_per_block=1, rows=4, cols=4, layers=1, kv_dim=12, heads=1, dtype_bytes=4)
    layout = Layout(grid, sink_blocks=1, recent_blocks=1, top_k=2, bank=None, mid_span=Fraction(1))
    cache = KVCache(layout, num_blocks=hour, dtype=torch.float32)
    own, small = (torch.ones(1, 1, n, 1, 12) for n in (grid.block_tokens, grid.compressed_tokens))
    sums = torch.randn(hour, 1, 1, 1, 12, generator=torch.Generator().manual_seed(0))

    def remember(block: int) -> None:
        cache.commit(block, BlockKV(own, own, sums[block]))
        if cache.needs_backup(block):
            cache.add_backup(block, BlockKV(small, small, sums[block]))

    stored, chosen = [], []
    for block in range(hour):
        if block % each:
            remember(block)
            continue
        cache.context(block)  # angles are remembered from block to block
        with counting.moved_bytes() as moved:
            cache.context(block)
        chosen.append((moved.bytes, moved.operators))
        with counting.moved_bytes() as moved:
            remember(block)
        stored.append((moved.bytes, moved.operators))
    assert len(cache.bank_blocks) == hour - 2
    assert len(stored) == 8
    assert len({*stored[1:]}) == 1  # block 0 is the sink
    of_bank = {after[0] - before[0] for before, after in pairwise(chosen[1:])}
    assert len({operators for _, operators in chosen[1:]}) == 1
    (more,) = of_bank
    assert each * 12 * 4 < more < each * (12 * 4 + 200)  # a key sum; numbers, places and scores of a block


def bank_of(cache: KVCache) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors(cache).items() if name.startswith("bank_")}


FAR = ("default-like", "two recent, unlimited bank")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "kv_dtype"), [(name, kind) for name in FAR for kind in ("auto", "int8")])
def test_a_bank_that_is_far_gives_the_same_bits(mode: str, name: str, kv_dtype: str) -> None:
    """The path of a bank in host memory: fetched ahead, layer by layer, from places that are used again."""
    setting = SETTINGS[name]
    near = make_cache(setting, torch.bfloat16, select=mode, kv_dtype=kv_dtype)
    far = make_cache(setting, torch.bfloat16, select=mode, kv_dtype=kv_dtype, bank_device="cpu")
    for i in range(NUM_BLOCKS):
        contexts = [cache.context(i) for cache in (near, far)]
        seen = [denoise(cache, context) for cache, context in zip((near, far), contexts, strict=True)]
        assert torch.equal(contexts[0].selected, contexts[1].selected)
        for one, two in zip(*seen, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        for cache in (near, far):
            cache.commit(i, random_kv(i, BLOCK, torch.bfloat16))
            if cache.needs_backup(i):
                cache.add_backup(i, random_kv(i, COMPRESSED, torch.bfloat16))
    assert far.stats().bytes == near.stats().bytes
    assert far.stats().near == far.layout.far_bytes(NUM_BLOCKS)[1] > 0
    everything = sum(tensor.nbytes for tensor in tensors(far).values())
    assert everything == far.stats().bytes.live + far.stats().near
    one, other = near.state_dict(), far.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)  # either loads the other's


def test_layers_of_a_far_bank_may_be_read_in_any_order_and_again() -> None:
    caches = [make_cache(SETTINGS["default-like"], bank_device=place) for place in (None, "cpu")]
    for cache in caches:
        roll(cache, range(9))
    own = random_kv(900, BLOCK)
    for _ in range(2):  # the second context as after a retry
        contexts = [cache.context(9) for cache in caches]
        for layer in (2, 0, 1, 2):
            seen = [
                context.layer(layer, own.k[layer], own.v[layer], own.q_sum[layer]) for context in contexts
            ]
            assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize(
    ("kv_dtype", "per_number", "error"), [("bf16", 2, 2**-8), ("int8", 1, 0.5 / 127), ("fp8", 1, 2**-4)]
)
@pytest.mark.parametrize("far", [None, "cpu"])
def test_a_smaller_kind_of_bank_takes_fewer_bytes_and_errs_within_its_rounding(
    kv_dtype: str, per_number: int, error: float, far: str | None
) -> None:
    cache = make_cache((1, 1, 3, 5, 1), torch.float32, select="fifo", kv_dtype=kv_dtype, bank_device=far)
    plain = make_cache((1, 1, 3, 5, 1), torch.float32, select="fifo")
    for one in (cache, plain):
        roll(one, range(9))
    places, scale = 5 + 1, 4 if per_number == 1 else 0
    kept = LAYERS * 2 * COMPRESSED * HEADS * (DIM * per_number + scale)
    sums = LAYERS * HEADS * DIM * 4
    live, planned = cache.stats().bytes, cache.layout.capacity_bytes(NUM_BLOCKS)
    assert live == planned
    assert live.bank + live.backups == places * (kept + sums) + sums < plain.stats().bytes.bank
    assert {t.dtype for n, t in bank_of(cache).items() if n in ("bank_k", "bank_v")} == {
        {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[kv_dtype]
    }
    seen, exact = (denoise(one, one.context(9)) for one in (cache, plain))
    start = 3 * BLOCK  # scratch, sink, recent
    for (k, v), (exact_k, exact_v) in zip(seen, exact, strict=True):
        assert torch.equal(k[:, :start], exact_k[:, :start]) and torch.equal(v[:, :start], exact_v[:, :start])
        off, most = (v - exact_v)[:, start:].abs(), exact_v[:, start:].abs()
        bound = most if per_number == 2 or kv_dtype == "fp8" else most.amax(-1, keepdim=True)
        assert off.max() > 0 and bool((off <= error * bound + 1e-6).all())
        # Turning keeps lengths: the keys' error is that of their pairs.
        pairs, ones = (k - exact_k)[:, start:].norm(dim=-1), exact_k[:, start:].norm(dim=-1)
        assert pairs.max() > 0 and bool((pairs <= (error * 2) * DIM**0.5 * ones).all())


def test_a_quantized_head_of_zeros_stays_zero() -> None:
    from packforcing_cli.bank import dequantize, quantize

    for kept in (torch.int8, torch.float8_e4m3fn):
        x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
        x[0, 1] = 0
        back = dequantize(*quantize(x, kept))
        assert torch.equal(back[0, 1], x[0, 1])
        largest = x.abs().amax(-1, keepdim=True)
        torch.testing.assert_close(back[x.abs() == largest], x[x.abs() == largest])


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_a_saved_quantized_bank_continues_identically(kv_dtype: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"kv_dtype": kv_dtype, "num_blocks": NUM_BLOCKS}
    one = make_cache(SETTINGS["default-like"], torch.bfloat16, **options)
    roll(one, range(9))
    save_file(one.state_dict(), tmp_path / "cache.safetensors")
    other = make_cache(SETTINGS["default-like"], torch.bfloat16, bank_device="cpu", **options)
    other.load_state_dict(load_file(tmp_path / "cache.safetensors"))
    for mine, its in zip(roll(one, range(9, 11)), roll(other, range(9, 11)), strict=True):
        assert torch.equal(mine.selected, its.selected)
    for (k, v), (same_k, same_v) in zip(
        *(denoise(cache, cache.context(11)) for cache in (one, other)), strict=True
    ):
        assert torch.equal(k, same_k) and torch.equal(v, same_v)
    with pytest.raises(LayoutError, match="not a cache's state"):
        make_cache(SETTINGS["default-like"], torch.bfloat16).load_state_dict(one.state_dict())


# -- what is moved ------------------------------------------------------------------------------------------


def test_keys_are_turned_again_only_where_their_slot_has_changed() -> None:
    """One recent block: its keys are turned at the commit. Two: those that moved, and a retry turns nothing."""
    from packforcing_cli import counting

    def turned(cache: KVCache, block: int) -> int:
        with counting.moved_bytes() as moved:
            cache.context(block)
        return moved.by_operator.get("rotate_into", 0)

    one, two = make_cache((2, 1, 3, 5, 1)), make_cache((2, 2, 3, 5, 1))
    plain = make_cache((2, 2, 3, 5, FRAMES), rope_adjustment=False)
    for cache in (one, two, plain):
        roll(cache, range(11))
    a_block = 2 * random_kv(0, BLOCK).k.nbytes + 2 * BLOCK * DIM // 2 * 8  # read, written; cosines and sines
    assert (turned(one, 11), turned(two, 11), turned(plain, 11)) == (0, 2 * a_block, 0)
    assert turned(two, 11) == 0
    assert tensors(plain)["raw_k"].nbytes == tensors(one)["raw_k"].nbytes == 0 < tensors(two)["raw_k"].nbytes


# -- state --------------------------------------------------------------------------------------------------


@every_case
def test_a_saved_cache_continues_identically(setting: Any, mode: str, tmp_path: Path) -> None:
    cache = make_cache(setting, torch.bfloat16, select=mode, num_blocks=NUM_BLOCKS)
    for stop in (0, 1, 3, 9):
        roll(cache, range(cache.blocks, stop))
        save_file(cache.state_dict(), tmp_path / "cache.safetensors")
        other = make_cache(setting, torch.bfloat16, select=mode, num_blocks=NUM_BLOCKS)
        other.load_state_dict(load_file(tmp_path / "cache.safetensors"))
        assert other.stats() == cache.stats()
        ours, others = cache.context(stop), other.context(stop)
        for one, two in zip(denoise(cache, ours), denoise(other, others), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        assert torch.equal(ours.selected, others.selected)
        roll(other, range(stop, stop + 2))


def test_a_saved_cache_can_go_on_longer_than_it_was_planned() -> None:
    setting = (2, 2, 3, 5, 1)
    short, long = make_cache(setting, num_blocks=3), make_cache(setting, num_blocks=NUM_BLOCKS)
    roll(short, range(3))
    roll(long, range(3))
    longer = make_cache(setting, num_blocks=NUM_BLOCKS)
    longer.load_state_dict(short.state_dict())
    for one, two in zip(roll(long, range(3, 12)), roll(longer, range(3, 12)), strict=True):
        assert torch.equal(one.selected, two.selected)
    states = (long.state_dict(), longer.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_state_of_other_settings_is_refused() -> None:
    cache = make_cache(SETTINGS["default-like"])
    roll(cache, range(5))
    state = cache.state_dict()
    with pytest.raises(LayoutError, match="5 blocks, sinks and recent"):
        make_cache((1, 1, 3, 5, FRAMES)).load_state_dict(state)
    with pytest.raises(LayoutError, match="bank_k"):
        make_cache((2, 1, 1, 1, FRAMES)).load_state_dict(state)
    with pytest.raises(LayoutError, match="5 blocks"):
        make_cache(SETTINGS["default-like"], num_blocks=4).load_state_dict(state)
    with pytest.raises(LayoutError, match="bfloat16"):
        make_cache(SETTINGS["default-like"], torch.bfloat16).load_state_dict(state)
    with pytest.raises(LayoutError, match="q_sum"):
        cache.load_state_dict({name: tensor for name, tensor in state.items() if name != "q_sum"})
