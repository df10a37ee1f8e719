"""The formula of the context against the paper's figures, the published tables and a slow obvious model of a cache."""

from __future__ import annotations

import time
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from packforcing_cli.errors import LayoutError, UsageError
from packforcing_cli.layout import Grid, Layout, Lengths

WAN = Grid(frames_per_block=4, rows=30, cols=52, layers=30, kv_dim=1536, heads=12, dtype_bytes=2)
DEMO = Grid(frames_per_block=4, rows=4, cols=8, layers=6, kv_dim=192, heads=3, dtype_bytes=4)
PAPER = Layout(
    WAN, sink_blocks=2, recent_blocks=1, top_k=16, bank=256, mid_span=Fraction(4), trained_frames=20
)


# ------------------------------------------------------------------------------------------------- published figures


def test_the_papers_token_and_byte_counts_come_out() -> None:
    """docs/method.md 2.2, 120 s at 832x480 and 16 fps."""
    blocks = WAN.blocks_for(120, 16)
    tokens = PAPER.tokens(blocks - 1)
    assert blocks == 120
    assert (WAN.block_tokens, WAN.compressed_tokens) == (6240, 182)
    assert (tokens.sink, tokens.mid, tokens.recent, tokens.current) == (12480, 2912, 6240, 6240)
    assert (tokens.active, tokens.stored) == (27872, 21632)
    assert WAN.bytes_per_token == 184320
    assert PAPER.bytes(blocks - 1).stored == 3987210240
    full = Layout.from_policy("full", grid=WAN, num_blocks=blocks)
    assert full.bytes(blocks).stored == 138018816000
    assert WAN.compressed_tokens * WAN.bytes_per_token == 33546240


def test_blocks_of_three_frames_have_the_published_counts() -> None:
    """docs/method.md 2.2, last row: 21,632 attended in blocks of 3."""
    grid = replace(WAN, frames_per_block=3)
    layout = Layout(grid, mid_span="fit", trained_frames=21)
    tokens = layout.tokens(100)
    assert (grid.block_tokens, grid.compressed_tokens) == (4680, 182)
    assert (tokens.sink, tokens.mid, tokens.recent, tokens.current, tokens.active) == (
        9360,
        2912,
        4680,
        4680,
        21632,
    )


@pytest.mark.parametrize(
    ("frames", "sink", "recent", "span", "distances"),
    [
        (4, 2, 1, 4, (19, 31, 47, 79)),
        (4, 2, 1, 2, (17, 23, 31, 47)),
        (4, 2, 1, 1, (16, 19, 23, 31)),
        (3, 3, 2, 3, (20, 29, 41, 65)),
        (3, 2, 1, 1, (12, 15, 19, 27)),
    ],
)
def test_the_largest_distance_is_that_of_the_published_table(
    frames: int, sink: int, recent: int, span: int, distances: tuple[int, ...]
) -> None:
    """docs/method.md 5.5, for 1, 4, 8 and 16 active mid blocks."""
    for top_k, distance in zip((1, 4, 8, 16), distances, strict=True):
        grid = replace(WAN, frames_per_block=frames)
        layout = Layout(grid, sink, recent, top_k, mid_span=Fraction(span), trained_frames=21)
        assert layout.slots(1000).max_distance == distance


@pytest.mark.parametrize(
    ("seconds", "blocks", "frames"),
    [(10, 10, 157), (120, 120, 1917), (0.1, 1, 13), (5, 5, 77), (60, 60, 957)],
)
def test_length_is_whole_blocks(seconds: float, blocks: int, frames: int) -> None:
    assert WAN.blocks_for(seconds, 16) == blocks
    assert WAN.frames_for(blocks) == frames
    assert sum(WAN.block_frames(block) for block in range(blocks)) == frames


def test_half_a_block_rounds_up() -> None:
    half = Fraction(16 * 2 + 8 - 3, 16)  # exactly 2.5 blocks of 16 frames
    assert WAN.blocks_for(half, 16) == 3
    assert WAN.blocks_for(half - Fraction(1, 10**9), 16) == 2


def test_the_demo_grid_keeps_the_papers_proportions() -> None:
    assert (DEMO.tokens_per_frame, DEMO.block_tokens, DEMO.compressed_tokens) == (32, 128, 4)
    assert (DEMO.latent_rows, DEMO.latent_cols) == (8, 16)


# ------------------------------------------------------------------------------------------------------ partitions


def simulated(layout: Layout, num_blocks: int) -> list[tuple[list[int], list[int], list[int]]]:
    """The life of blocks, played out step by step: what each block finds in sink, bank and recent."""
    sink: list[int] = []
    bank: list[int] = []
    recent: list[int] = []
    seen = []
    for block in range(num_blocks):
        if block in layout.cuts:
            bank += recent if layout.top_k else []
            recent.clear()
            shrink(layout, bank)
        seen.append((list(sink), list(bank), list(recent)))
        if len(sink) < layout.sink_blocks:
            sink.append(block)
            continue
        recent.append(block)
        while len(recent) > layout.recent_blocks:
            old = recent.pop(0)
            if layout.top_k:
                bank.append(old)
        shrink(layout, bank)
    return seen


def shrink(layout: Layout, bank: list[int]) -> None:
    while layout.bank is not None and len(bank) > layout.bank:
        bank.remove(min(block for block in bank if block not in layout.pins))


@pytest.mark.parametrize(
    "layout",
    [
        PAPER,
        Layout(DEMO, 2, 1, 3, 5, Fraction(2), 28),
        Layout(DEMO, 0, 2, 4, 4, Fraction(1), 28),
        Layout(DEMO, 1, 3, 2, None, Fraction(1, 3), 28),
        Layout(DEMO, 3, 1, 0, 8),
        Layout(DEMO, 0, 0, 0),
        Layout(DEMO, 2, 3, 2, 6, Fraction(1), 28, cuts=(1, 2, 9, 20, 21, 39)),
        Layout(DEMO, 1, 2, 4, 5, Fraction(1), 28, pins=frozenset({0, 3, 4, 17, 30})),
        Layout(DEMO, 1, 2, 4, 5, Fraction(1), 28, cuts=(7, 25), pins=frozenset({5, 6, 7})),
        Layout(DEMO, 0, 4, 0, 5, cuts=(3, 30)),
    ],
)
def test_partitions_equal_a_played_out_cache(layout: Layout) -> None:
    for view, (sink, bank, recent) in zip(layout.views(40), simulated(layout, 40), strict=True):
        assert (list(view.sink), list(view.mid), list(view.recent)) == (sink, bank, recent)
        assert view.active == min(layout.top_k, len(bank))


def test_a_block_never_sees_itself_or_the_future() -> None:
    for view in Layout(DEMO, 2, 1, 4, 8, Fraction(1), 28).views(60):
        seen = [*view.sink, *view.mid, *view.recent]
        assert seen == sorted(set(seen))
        assert all(block < view.current for block in seen)


def test_policies_are_presets_of_the_same_numbers() -> None:
    def tokens(policy: str, block: int) -> tuple[int, int, int]:
        layout = Layout.from_policy(policy, grid=DEMO, num_blocks=100, mid_span=1, trained_frames=28)
        counted = layout.tokens(block)
        return (counted.sink, counted.mid, counted.recent)

    assert tokens("packforcing", 99) == (256, 64, 128)
    assert tokens("sink", 99) == (256, 0, 128)
    assert tokens("window", 99) == (0, 0, 384)
    assert tokens("full", 99) == (99 * 128, 0, 0)
    with pytest.raises(UsageError, match="unknown policy 'all'"):
        Layout.from_policy("all", grid=DEMO, num_blocks=1)


# ----------------------------------------------------------------------------------------------------------- slots


@pytest.mark.parametrize("span", [Fraction(4), Fraction(2), Fraction(1), Fraction(9, 16), "fit"])
def test_slots_are_contiguous_walking_back_from_the_current_block(span: Any) -> None:
    layout = Layout(DEMO, 2, 1, 5, 8, span, 28)
    for view in layout.views(30):
        slots = layout.slots(view)
        width = slots.span
        walked = slots.current_start
        for start in reversed(slots.recent_starts):
            walked -= 4
            assert start == walked
        for start in reversed(slots.mid_starts):
            walked -= width
            assert start == walked
        for start in reversed(slots.sink_starts):
            walked -= 4
            assert start == walked
        assert walked == 0 == slots.sink_start
        assert (len(slots.sink_starts), len(slots.mid_starts)) == (len(view.sink), view.active)
        assert all(isinstance(start, Fraction) for start in (*slots.mid_starts, slots.current_start))
        assert slots.max_distance == slots.current_start + 3


def test_without_rope_adjustment_every_block_keeps_the_slots_of_its_own_time() -> None:
    """docs/method.md 5.1 without the repair: block b at 4 b, whatever was dropped; distances grow."""
    layout = Layout(DEMO, 2, 1, 3, bank=6, mid_span=Fraction(4), trained_frames=20, rope_adjustment=False)
    slots = layout.slots(20, (13, 15, 18))
    assert slots.sink_starts == (0, 4)
    assert slots.mid_starts == (52, 60, 72)
    assert slots.recent_starts == (76,)
    assert (slots.current_start, slots.span, slots.oldest) == (80, 4, 0)
    assert slots.max_distance == 83
    assert [layout.slots(n).max_distance for n in (0, 1, 9)] == [3, 7, 39]
    assert layout.slots(20).mid_starts == (64, 68, 72)  # of the newest, when no choice is given
    with pytest.raises(LayoutError, match="not 3 of the mids of block 20"):
        layout.slots(20, (2, 15, 18))


def test_without_rope_adjustment_and_sinks_the_distance_is_that_to_the_oldest_a_layer_may_choose() -> None:
    layout = Layout(DEMO, 0, 1, 3, bank=6, mid_span=Fraction(4), trained_frames=20, rope_adjustment=False)
    assert [*layout.view(20).mid] == [13, 14, 15, 16, 17, 18]
    assert layout.slots(20).max_distance == 4 * 20 + 3 - 4 * 13
    assert layout.slots(20, (16, 17, 18)).max_distance == 4 * 20 + 3 - 4 * 16
    windows = [
        Layout.from_policy("window", grid=DEMO, num_blocks=30, rope_adjustment=adjusted)
        for adjusted in (False, True)
    ]
    assert {window.slots(20).max_distance for window in windows} == {15}


@pytest.mark.parametrize("span", ["fit", Fraction(1)])
def test_a_span_contradicts_no_rope_adjustment(span: Any) -> None:
    with pytest.raises(LayoutError, match="contradicts no RoPE adjustment") as caught:
        Layout(DEMO, mid_span=span, trained_frames=80, rope_adjustment=False)
    assert "--mid-span block" in caught.value.hint


def test_fit_fills_the_trained_range_exactly() -> None:
    layout = Layout(WAN, 2, 1, 16, None, "fit", 20)
    assert layout.span(3) == 4  # no mid block yet
    assert layout.span(4) == 4  # one: 4 slots are free
    assert layout.span(5) == 2
    assert layout.span(100) == Fraction(1, 4)
    for block in range(4, 40):
        assert layout.slots(block).total == 20
    three = Layout(replace(WAN, frames_per_block=3), 2, 1, 16, None, "fit", 21)
    assert three.span(100) == Fraction(9, 16)
    assert max(three.slots(block).total for block in range(100)) == 21


def test_slots_stop_changing_once_the_context_is_full() -> None:
    assert PAPER.slots(19) == PAPER.slots(20) == PAPER.slots(9999)


def test_compressed_tokens_sit_at_cell_centres() -> None:
    """docs/method.md 5.4, with exact fractions."""
    positions = WAN.compressed_positions(8, 4)
    half = Fraction(1, 2)
    assert len(positions) == 182
    assert positions[0] == (8 + half, 1 + half, 1 + half)
    assert positions[1] == (8 + half, 1 + half, 5 + half)
    assert positions[13] == (8 + half, 5 + half, 1 + half)
    assert positions[91] == (8 + 2 + half, 1 + half, 1 + half)
    assert positions[-1] == (8 + 2 + half, 25 + half, 49 + half)
    narrow = [t for t, _, _ in WAN.compressed_positions(Fraction(10), Fraction(1, 2))[::91]]
    assert narrow == [10 + Fraction(1, 8) - half, 10 + Fraction(3, 8) - half]


def test_a_cell_centre_is_the_mean_of_what_the_cell_covers() -> None:
    covered = [(8 + f, r, c) for f in (0, 1) for r in range(4) for c in range(4)]
    means = tuple(Fraction(sum(axis), len(covered)) for axis in zip(*covered, strict=True))
    assert WAN.compressed_positions(8, 4)[0] == means


def test_identity_keeps_every_token_at_its_own_place() -> None:
    grid = replace(DEMO, identity=True)
    assert grid.compressed_tokens == grid.block_tokens
    expected = [(12 + f, r, c) for f in range(4) for r in range(4) for c in range(8)]
    assert list(grid.compressed_positions(12, 4)) == expected


def test_the_compressed_forward_sits_right_behind_the_sinks() -> None:
    assert PAPER.context_start == 8


# ----------------------------------------------------------------------------------------------------------- bytes


def test_bytes_are_tokens_times_bytes_of_their_tensors() -> None:
    layout = Layout(DEMO, 2, 1, 3, 5, Fraction(1), 28)
    used = layout.bytes(20)
    one = 6 * 192 * 4  # one tensor, one token: layers * kv_dim * 4 bytes
    assert used.stored == 2 * one * (256 + 3 * 4 + 128)
    assert used.current == 2 * one * 128
    assert used.raw_keys == 0  # a block is at one slot as long as it is kept in full
    assert used.backups == 2 * one * 4 + one
    assert used.bank == 5 * (2 * one * 4 + one) + one  # key sums and the query sum are fp32 as well
    assert used.live == used.stored + used.current + used.raw_keys + used.backups + used.bank


def test_no_block_of_a_video_with_cuts_needs_more_than_the_buffers_have() -> None:
    layout = Layout(DEMO, 2, 3, 5, 9, Fraction(1), 28, cuts=(4, 11, 29))
    size, most = layout.capacity_bytes(30), layout.largest_view(30)
    for view in layout.views(31):
        used = layout.bytes(view)
        assert all(getattr(used, n) <= getattr(size, n) for n in ("stored", "raw_keys", "backups", "bank"))
        assert len(view.mid) <= len(most.mid) and len(view.recent) <= len(most.recent)


@pytest.mark.parametrize("changes", [{"top_k": 2}, {"bank": 3}, {"top_k": 0}])
def test_more_pins_than_the_bound_has_room_for_are_refused(changes: dict[str, int]) -> None:
    settings = {"sink_blocks": 1, "top_k": 3, "bank": 4, "trained_frames": 40} | changes
    with pytest.raises(LayoutError, match="3 blocks are pinned") as caught:
        Layout(DEMO, pins=frozenset({0, 4, 5, 6}), **settings)
    assert "--top-k 3" in caught.value.hint
    Layout(DEMO, 1, 1, 3, 4, trained_frames=40, pins=frozenset({0, 4, 5, 6}))


@pytest.mark.parametrize("policy", ["sink", "window", "full"])
def test_without_compressed_memory_there_is_no_bank(policy: str) -> None:
    layout = Layout.from_policy(policy, grid=DEMO, num_blocks=30, mid_span=1, trained_frames=28)
    assert (layout.bytes(29).bank, layout.bytes(29).backups) == (0, 0)


def test_memory_is_flat_once_the_bank_is_full_and_grows_by_one_compressed_block_without_a_limit() -> None:
    flat = Layout(DEMO, 2, 1, 4, 32, Fraction(1), 28)
    assert len({flat.bytes(block).live for block in range(36, 300)}) == 1
    growing = Layout(DEMO, 2, 1, 4, None, Fraction(1), 28)
    one = DEMO.compressed_tokens * DEMO.bytes_per_token + DEMO.summary_bytes
    for block in range(10, 300):
        assert growing.bytes(block + 1).live - growing.bytes(block).live == one


def test_capacity_is_what_a_whole_video_fills() -> None:
    layout = Layout(DEMO, 2, 1, 4, 32, Fraction(1), 28)
    for num_blocks in (1, 2, 3, 4, 10, 300):
        most = max(layout.bytes(block).live for block in range(num_blocks + 1))
        assert layout.capacity_bytes(num_blocks).live == most


def test_ten_thousand_blocks_take_well_under_a_second() -> None:
    layout = Layout(WAN, 2, 1, 16, None, "fit", 21)
    times = []
    for _ in range(3):
        start = time.process_time()
        for view in layout.views(10_000):
            layout.slots(view)
            layout.bytes(view)
        times.append(time.process_time() - start)
    assert min(times) < 0.8


# ----------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"sink_blocks": -1}, "sink_blocks must not be negative, got -1"),
        ({"top_k": -1}, "top_k must not be negative"),
        ({"recent_blocks": 0}, "recent_blocks must be at least 1"),
        ({"bank": 0}, "bank must be at least 1 block, got 0"),
        ({"mid_span": Fraction(5)}, "mid_span must be above 0 and at most frames_per_block 4, got 5"),
        ({"mid_span": Fraction(0)}, "mid_span must be above 0"),
        ({"mid_span": "fit", "trained_frames": 16}, "take 16 slots and the model was trained on 16"),
        ({"trained_frames": 0}, "trained_frames must be at least 1"),
    ],
)
def test_impossible_numbers_are_refused_with_the_value(numbers: dict[str, Any], said: str) -> None:
    with pytest.raises(LayoutError, match=said):
        replace(PAPER, **numbers)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_length_must_be_a_positive_number(seconds: float) -> None:
    with pytest.raises(UsageError, match="seconds must be a positive number"):
        WAN.blocks_for(seconds, 16)


def test_a_frame_too_small_to_compress_is_refused() -> None:
    with pytest.raises(LayoutError, match="48x64 pixels has no room"):
        Grid(4, rows=4, cols=3, layers=1, kv_dim=4, heads=1)


def test_negative_blocks_are_refused() -> None:
    with pytest.raises(LayoutError, match="block must not be negative, got -1"):
        PAPER.view(-1)


@pytest.mark.parametrize("frames_per_block", [1, 3, 4])
def test_lengths_agree_with_counting_frame_by_frame(frames_per_block: int) -> None:
    lengths = Lengths(frames_per_block)
    owner: list[int] = []  # of every pixel frame
    for latent in range(frames_per_block * 12):
        owner += [latent // frames_per_block] * (1 if latent == 0 else 4)
    for block in range(12):
        assert lengths.block_frames(block) == owner.count(block)
        assert lengths.frames_for(block) == owner.index(block)
    for frame, block in enumerate(owner):
        assert lengths.block_at(frame) == block
        whole = sum(lengths.frames_for(n) <= frame for n in range(1, 12))
        assert lengths.whole_blocks(frame) == whole
    for tenths in range(1, 60):
        seconds = Fraction(tenths, 10)
        starts = [abs(Fraction(lengths.frames_for(n), 16) - seconds) for n in range(40)]
        nearest = max(n for n in range(40) if starts[n] == min(starts))
        assert lengths.nearest_block(seconds, 16) == nearest
        wholes = {n: abs(Fraction(lengths.frames_for(n), 16) - seconds) for n in range(1, 40)}
        assert wholes[lengths.blocks_for(seconds, 16)] == min(wholes.values())
        more = {n: abs(Fraction(n * lengths.block_frames(1), 16) - seconds) for n in range(1, 40)}
        assert more[lengths.blocks_more(seconds, 16)] == min(more.values())
