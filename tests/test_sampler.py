"""Schedules against arithmetic by hand, the loops against their definitions."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from packforcing_cli.errors import UsageError
from packforcing_cli.sampler import (
    Schedule,
    Velocity,
    block_noise,
    denoise_block,
    euler_sigmas,
    renoise_sigmas,
    shifted,
)

torch.set_num_threads(1)

SHAPE = (1, 4, 4, 2, 2)


def run(
    velocity: Velocity, schedule: Schedule, *, dtype: torch.dtype = torch.float64, **options: Any
) -> Tensor:
    values: dict[str, Any] = {"seed": 5, "block": 2, "shape": SHAPE, "dtype": dtype, "device": "cpu"}
    return denoise_block(velocity, schedule, **(values | options))


def noise(step: int, seed: int = 5, block: int = 2) -> Tensor:
    return block_noise(seed, block, step, SHAPE).double()


# -- schedules ------------------------------------------------------------------------------------------------


def test_few_step_timesteps_are_the_published_ones() -> None:
    """Self-Forcing: entry 1000 - s of the table sigma_i = 5 s_i / (1 + 4 s_i), s_i = 1 - i/1000."""
    table = [5 * (1 - i / 1000) / (1 + 4 * (1 - i / 1000)) for i in range(1000)]
    steps = [1000, 750, 500, 250]
    found = [1000 * sigma for sigma in renoise_sigmas(steps, 5.0)]
    assert found == pytest.approx([1000 * table[1000 - step] for step in steps], rel=1e-12)
    assert found == pytest.approx([1000, 937.5, 833.3333333, 625])
    assert renoise_sigmas([*steps, 0], 5.0) == renoise_sigmas(steps, 5.0)  # a trailing 0 is x0 itself
    assert renoise_sigmas(steps, 5.0, warp=False) == (1, 0.75, 0.5, 0.25)


@pytest.mark.parametrize("steps", [[], [0], [250, 500], [500, 500], [1001, 500]])
def test_steps_that_do_not_fall_are_refused(steps: list[int]) -> None:
    with pytest.raises(UsageError):
        renoise_sigmas(steps, 5.0)


def test_euler_runs_from_1_to_0_evenly_before_the_shift() -> None:
    assert euler_sigmas(4, 1.0) == (1, 0.75, 0.5, 0.25, 0)
    assert euler_sigmas(4, 3.0) == pytest.approx((1, 0.9, 0.75, 0.5, 0))
    assert shifted(0.5, 5.0) == pytest.approx(5 / 6)
    with pytest.raises(UsageError):
        euler_sigmas(0, 5.0)


def test_guidance_is_refused_for_few_step_students_and_nonsense_for_all() -> None:
    with pytest.raises(UsageError, match="distilled") as caught:
        Schedule.build("renoise", steps=[1000, 500], shift=5.0, guidance=3.0)
    assert "--guidance" in caught.value.hint
    with pytest.raises(UsageError, match="renoise or euler"):
        Schedule.build("ddim", steps=4, shift=5.0)
    with pytest.raises(UsageError, match="number of steps"):
        Schedule.build("euler", steps=[1000], shift=5.0)
    with pytest.raises(UsageError, match="trained steps"):
        Schedule.build("renoise", steps=4, shift=5.0)


def test_passes_count_the_unconditional_ones() -> None:
    assert Schedule.build("euler", steps=8, shift=5.0).passes == 8
    assert Schedule.build("euler", steps=8, shift=5.0, guidance=3.0).passes == 16
    assert Schedule.build("renoise", steps=[1000, 750, 500, 250], shift=5.0).passes == 4


# -- loops ----------------------------------------------------------------------------------------------------


def test_euler_integrates_a_constant_velocity_exactly() -> None:
    """With v = eps - x0, constant along the straight path, any number of steps arrives at x0."""
    x0 = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for steps in (1, 3, 8):
        schedule = Schedule.build("euler", steps=steps, shift=5.0)
        torch.testing.assert_close(run(lambda x, sigma: noise(0) - x0, schedule), x0)


def test_euler_equals_a_hand_integration_of_a_linear_field() -> None:
    """dx/dsigma = a x: each step multiplies by 1 + a (following - sigma); in the limit e^-a."""
    schedule = Schedule.build("euler", steps=5, shift=3.0)
    factor = 1.0
    sigmas = [3 * s / (1 + 2 * s) for s in (1, 0.8, 0.6, 0.4, 0.2, 0)]
    for sigma, following in pairwise(sigmas):
        factor *= 1 + 0.7 * (following - sigma)
    torch.testing.assert_close(run(lambda x, sigma: 0.7 * x, schedule), factor * noise(0))
    fine = run(lambda x, sigma: 0.7 * x, Schedule.build("euler", steps=2000, shift=3.0))
    torch.testing.assert_close(fine, math.exp(-0.7) * noise(0), rtol=1e-3, atol=1e-3)


def test_renoise_predicts_x0_and_noises_it_afresh_for_the_next_step() -> None:
    seen: list[tuple[Tensor, float]] = []

    def velocity(x: Tensor, sigma: float) -> Tensor:
        seen.append((x, sigma))
        return 0.3 * x + sigma

    found = run(velocity, Schedule.build("renoise", steps=[1000, 750, 500, 250], shift=5.0))
    x = noise(0)
    for step, sigma in enumerate((1, 15 / 16, 5 / 6, 5 / 8)):
        torch.testing.assert_close(seen[step][0], x)
        assert seen[step][1] == pytest.approx(sigma)
        x0 = x - sigma * (0.3 * x + sigma)
        following = (15 / 16, 5 / 6, 5 / 8, 0)[step]
        x = (1 - following) * x0 + following * noise(step + 1)
    assert len(seen) == 4
    torch.testing.assert_close(found, x0)


def test_a_perfect_student_arrives_in_any_number_of_steps() -> None:
    x0 = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = run(
        lambda x, sigma: (x - x0) / sigma, Schedule.build("renoise", steps=[1000, 500, 250], shift=5.0)
    )
    torch.testing.assert_close(found, x0)


def test_guidance_extrapolates_from_the_unconditional_prediction() -> None:
    schedule = Schedule.build("euler", steps=3, shift=2.0, guidance=2.5)
    guided = run(lambda x, s: torch.cat((0.4 * x + s, 0.1 * x - s)), schedule)
    plain = Schedule.build("euler", steps=3, shift=2.0)
    expected = run(lambda x, s: (0.1 * x - s) + 2.5 * ((0.4 * x + s) - (0.1 * x - s)), plain)
    torch.testing.assert_close(guided, expected)


def test_models_get_their_dtype_and_the_state_stays_wider() -> None:
    """In bfloat16 only predictions are rounded: a hundred steps too small for it add up all the same."""
    schedule = Schedule.build("euler", steps=100, shift=5.0)
    seen: set[torch.dtype] = set()

    def velocity(x: Tensor, sigma: float) -> Tensor:
        seen.add(x.dtype)
        return torch.full_like(x, 2.0**-9)

    found = run(velocity, schedule, dtype=torch.bfloat16)
    assert seen == {torch.bfloat16} and found.dtype == torch.bfloat16
    torch.testing.assert_close(found, (noise(0) - 2.0**-9).bfloat16())


# -- noise ----------------------------------------------------------------------------------------------------


def test_noise_depends_on_seed_block_and_step_alone() -> None:
    first = noise(0)
    torch.manual_seed(99)
    for other in (noise(1), noise(0, block=3), noise(0, seed=6), noise(2, seed=0, block=5)):
        assert not torch.equal(other, first)
    torch.randn(1000)
    assert torch.equal(noise(0), first)


def test_drawing_noise_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    block_noise(1, 2, 3, (100,))
    assert torch.equal(torch.rand(4), expected)


def test_noise_is_standard_normal_and_uncorrelated_between_neighbours() -> None:
    draws = torch.stack([block_noise(0, block, step, (20_000,)) for block in range(3) for step in range(3)])
    assert draws.mean(1).abs().max() < 0.03
    assert (draws.std(1) - 1).abs().max() < 0.03
    assert (torch.corrcoef(draws) - torch.eye(9)).abs().max() < 0.03


def test_large_and_negative_seeds_are_taken() -> None:
    assert not torch.equal(block_noise(-1, 0, 0, (4,)), block_noise(2**70, 0, 0, (4,)))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("kind", ["euler", "renoise"])
def test_held_frames_are_met_clean_in_every_pass_and_come_out_as_they_are(kind: str, guidance: float) -> None:
    if kind == "renoise":
        schedule = replace(Schedule.build(kind, steps=[1000, 500], shift=5.0), guidance=guidance)
    else:
        schedule = Schedule.build(kind, steps=3, shift=5.0, guidance=guidance)
    held = torch.randn(1, 2, 1, 3, 3, dtype=torch.float64)
    met: list[Tensor] = []

    def velocity(x: Tensor, sigma: float) -> Tensor:
        met.append(x)
        v = torch.sin(3 * x) + sigma
        return v if guidance == 1.0 else torch.cat((v, 0.5 * v))

    options: dict[str, Any] = {
        "seed": 1, "block": 0, "shape": (1, 2, 4, 3, 3), "dtype": torch.float64, "device": "cpu",
    }  # fmt: skip
    x0 = denoise_block(velocity, schedule, held=held, **options)
    assert len(met) == schedule.passes // (1 if guidance == 1.0 else 2)
    assert all(torch.equal(x[:, :, :1], held) for x in [*met, x0])
    free = denoise_block(velocity, schedule, **options)
    assert torch.equal(x0[:, :, 1:], free[:, :, 1:])  # this velocity mixes no frames
