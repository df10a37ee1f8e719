"""Rotations: diffusers' at whole numbers, and what makes moving slots exact."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from packforcing_cli import rope
from packforcing_cli.errors import LayoutError
from packforcing_cli.quiet import known_import_noise_dropped

torch.set_num_threads(1)

HEAD_DIM = 128


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def turned(x: Tensor, positions: Tensor) -> Tensor:
    return rope.rotate(x, *rope.angles(positions, x.shape[-1]))


def in_time(slots: Tensor | list[float]) -> Tensor:
    """Positions at these slots, at one place of the frame for all."""
    slots = torch.as_tensor(slots, dtype=torch.float64)
    return torch.stack((slots, torch.full_like(slots, 5.0), torch.full_like(slots, 11.0)), dim=1)


def only_time(delta: float, tokens: int) -> Tensor:
    return torch.tensor([[delta, 0.0, 0.0]] * tokens, dtype=torch.float64)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bsnd,btnd->bnst", q, k)


# -- against others -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [128, 64, 20, 12])
def test_angles_at_whole_numbers_equal_diffusers(head_dim: int) -> None:
    with known_import_noise_dropped():
        from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
    frames, rows, cols = 21, 5, 7
    latents = torch.zeros(1, 16, frames, 2 * rows, 2 * cols)
    expected = WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)(latents)
    found = rope.angles(rope.grid_positions(0.0, frames, rows, cols), head_dim)
    for mine, theirs in zip(found, expected, strict=True):
        interleaved = mine.repeat_interleave(2, dim=1)  # they hold every angle twice, once a channel
        torch.testing.assert_close(interleaved, theirs[0, :, 0].double(), rtol=0, atol=1e-6)


def test_the_head_is_split_as_wan_does() -> None:
    assert rope.split(128) == (44, 42, 42)
    assert [sum(rope.split(n)) for n in range(6, 200, 2)] == list(range(6, 200, 2))
    for wrong in (127, 4):
        with pytest.raises(LayoutError, match=str(wrong)):
            rope.split(wrong)


def test_one_token_equals_arithmetic_by_hand() -> None:
    """Channels 2i and 2i+1 of each axis turn by position * 10000^(-2i/width), also at 3333.75 and below zero."""
    position, x = (3333.75, -1.5, 41.25), random(1, 1, 1, 20)
    found = turned(x, torch.tensor([position], dtype=torch.float64))[0, 0, 0].tolist()
    values, channel = x[0, 0, 0].tolist(), 0
    for place, width in zip(position, (8, 6, 6), strict=True):
        for i in range(width // 2):
            angle = place * 10_000.0 ** (-2 * i / width)
            even, odd = values[channel : channel + 2]
            assert found[channel] == pytest.approx(even * math.cos(angle) - odd * math.sin(angle), abs=1e-11)
            assert found[channel + 1] == pytest.approx(
                even * math.sin(angle) + odd * math.cos(angle), abs=1e-11
            )
            channel += 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_complex_and_real_formula_agree(dtype: torch.dtype) -> None:
    cos, sin = rope.angles(rope.grid_positions(17.25, 2, 3, 4), HEAD_DIM)
    cos, sin = cos.to(dtype).unsqueeze(-2), sin.to(dtype).unsqueeze(-2)
    pairs = random(2, 24, 3, HEAD_DIM // 2, 2, dtype=dtype)
    found, expected = rope.turn_complex(pairs, cos, sin), rope.turn_real(pairs, cos, sin)
    torch.testing.assert_close(found, expected)


# -- moving slots ---------------------------------------------------------------------------------------------


def test_three_ways_to_move_slots_attend_alike() -> None:
    """docs/method.md 5.3: turn stored turned keys on; turn raw keys when read; shift all slots and the query too."""
    k, q = random(1, 6, 2, HEAD_DIM, seed=1), random(1, 3, 2, HEAD_DIM, seed=2)
    old, move, query = torch.arange(6.0), 28.0, torch.tensor([40.0, 41.0, 42.0])
    at_query = turned(q, in_time(query))
    incremental = scores(at_query, turned(turned(k, in_time(old)), only_time(move, 6)))
    at_read = scores(at_query, turned(k, in_time(old + move)))
    shift = old[0] + move
    canonical = scores(turned(q, in_time(query - shift)), turned(k, in_time(old + move - shift)))
    torch.testing.assert_close(incremental, at_read, rtol=0, atol=1e-10)
    torch.testing.assert_close(canonical, at_read, rtol=0, atol=1e-10)
    assert (scores(at_query, turned(k, in_time(old))) - at_read).abs().max() > 1  # moving does matter


def test_116_slot_moves_leave_no_drift_from_raw_keys_but_do_from_turned_ones() -> None:
    raw = random(1, 64, 4, HEAD_DIM, dtype=torch.bfloat16)
    on = rope.angles(only_time(4.0, 64), HEAD_DIM)
    stored = turned(raw, in_time(torch.zeros(64)))
    for _ in range(116):
        stored = rope.rotate(stored, *on)
    exact = turned(raw.double(), in_time(torch.full((64,), 464.0)))
    fresh = turned(raw, in_time(torch.full((64,), 464.0)))

    def error(keys: Tensor) -> float:
        return float((keys.double() - exact).norm() / exact.norm())

    assert error(fresh) < 0.003  # one rounding to bfloat16
    assert error(stored) > 0.01


def test_scores_depend_on_distances_alone_far_beyond_1024() -> None:
    k, q = random(1, 4, 2, HEAD_DIM, seed=3), random(1, 4, 2, HEAD_DIM, seed=4)
    slots = torch.tensor([0.25, 3.5, 7.0, 9.75])
    near = scores(turned(q, in_time(slots + 12)), turned(k, in_time(slots)))
    for far in (1024.0, 5000.5, 250_000.0):
        moved = scores(turned(q, in_time(slots + 12 + far)), turned(k, in_time(slots + far)))
        torch.testing.assert_close(moved, near, rtol=0, atol=1e-7)


def test_angles_run_through_fractions_smoothly() -> None:
    x = random(1, 1, 1, HEAD_DIM)
    halves = [turned(x, in_time([slot])) for slot in (7.0, 7.5, 8.0)]
    half_step = turned(turned(x, in_time([7.0])), only_time(0.5, 1))
    torch.testing.assert_close(halves[1], half_step)
    assert (halves[1] - halves[0]).norm() > 0.1
    torch.testing.assert_close(turned(halves[1], only_time(0.5, 1)), halves[2])


def test_rotation_keeps_dtype_and_length() -> None:
    positions = rope.grid_positions(0.0, 1, 2, 2)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        x = random(2, 4, 3, HEAD_DIM, dtype=dtype)
        found = turned(x, positions)
        assert found.dtype == dtype and found.shape == x.shape
        torch.testing.assert_close(
            found.double().norm(dim=-1), x.double().norm(dim=-1), rtol=tolerance, atol=0
        )


def test_positions_of_a_grid_run_frame_row_column() -> None:
    found = rope.grid_positions(2.5, 2, 2, 3).tolist()
    assert found == [[2.5 + f, r, c] for f in range(2) for r in range(2) for c in range(3)]


def test_positions_that_are_not_triples_are_refused() -> None:
    with pytest.raises(LayoutError, match="3, 2"):
        rope.angles(torch.zeros(3, 2), HEAD_DIM)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_turning_in_pieces_gives_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 50, 2, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    cos, sin = rope.angles(torch.rand(50, 3, dtype=torch.float64) * 40, 24)
    whole = rope.rotate(x, cos, sin)
    room = torch.zeros(3, 60, 2, 24, dtype=dtype)
    for piece in (
        1,
        100,
        7 * 48,
        2 * 50 * 48,
        1 << 20,
    ):  # less than a token, than a row; more than a row, than all
        monkeypatch.setitem(rope.PIECE, "cpu", piece)
        rope.rotate_into(x, cos, sin, room[:, 5:55])
        assert torch.equal(room[:, 5:55], whole), piece
        assert torch.equal(rope.rotate(x, cos, sin), whole)
        copy = x.clone()
        rope.rotate_into(copy, cos, sin, copy)
        assert torch.equal(copy, whole)
    assert not room[:, :5].any() and not room[:, 55:].any()
    learned = x.clone().requires_grad_()
    rope.rotate(learned, cos, sin).sum().backward()
    assert learned.grad is not None
