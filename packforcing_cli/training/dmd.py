"""Distribution matching distillation (DMD): the student's gradient and the critic's loss.

    x       clip of the student's own rollout
    x_t     the same, noised to one level for all frames
    real    the teacher's x0 of x_t, guided;  fake  the critic's x0 of x_t, not guided
    g       (fake - real) / mean |x - real|: away from what the critic expects of the student, towards the teacher

The student descends g; the critic learns flow matching on the student's clips, so that it keeps knowing them. Knows
neither rollouts nor caches: teacher and critic are functions of a noised clip.
Source: Self-Forcing (model/dmd.py), whose guidance convention c + w (c - u) and clamped noise levels are kept; DMD2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from packforcing_cli.sampler import NUM_TRAIN_TIMESTEPS, shifted

MIN_TIMESTEP, MAX_TIMESTEP = 20.0, 980.0
"""Self-Forcing: 2 % at either end say nothing."""
Predictor = Callable[[Tensor, float], Tensor]
"""(x_t [B,C,F,h,w], sigma) -> velocity eps - x0 of the same shape."""


def draw_sigma(generator: torch.Generator, *, shift: float) -> float:
    """One noise level for all frames: a timestep uniform in 0..999, shifted, clamped to 20..980; as sigma."""
    step = int(torch.randint(NUM_TRAIN_TIMESTEPS, (), generator=generator))
    timestep = NUM_TRAIN_TIMESTEPS * shifted(step / NUM_TRAIN_TIMESTEPS, shift)
    return min(max(timestep, MIN_TIMESTEP), MAX_TIMESTEP) / NUM_TRAIN_TIMESTEPS


def noised(x: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """(1 - sigma) x + sigma noise."""
    return (1 - sigma) * x + sigma * noise


def clean(x_t: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """x0 of a velocity, in float64 as Self-Forcing does."""
    return x_t.double() - sigma * velocity.double()


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """c + w (c - u); w = 3 is 4 in the other common convention u + w' (c - u)."""
    return conditional + scale * (conditional - unconditional)


def gradient(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """(fake - real) / mean |x - real|, the mean over all of a sample; where that is 0 / 0 it is 0. float64."""
    real, fake = real.double(), fake.double()
    scale = (x.double() - real).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
    return torch.nan_to_num((fake - real) / scale, nan=0.0, posinf=0.0, neginf=0.0)


def student_loss(
    x: Tensor,
    noise: Tensor,
    sigma: float,
    *,
    teacher: Predictor,
    teacher_unconditional: Predictor,
    critic: Predictor,
    guidance: float = 3.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """A loss whose gradient in x is the DMD gradient over the number of elements.

    Args:
        x:     [B,C,F,h,w] the student's clip, with its graph.
        noise: [B,C,F,h,w].
        mask:  broadcasts to x; 0 = these latents only serve as context.
    Returns: 0.5 * mean((x - (x - g))^2), g detached; figures for the log.
    """
    with torch.no_grad():
        x_t = noised(x, noise, sigma)
        real = guided(
            clean(x_t, teacher(x_t, sigma), sigma),
            clean(x_t, teacher_unconditional(x_t, sigma), sigma),
            guidance,
        )
        fake = clean(x_t, critic(x_t, sigma), sigma)
        g = gradient(x, real, fake)
        target = x.double() - g
    error = (x.double() - target).square()
    if mask is not None:
        error = error * mask
    figures = {
        "gradient": float(g.abs().mean()),
        "distance": float((x.detach().double() - real).abs().mean()),
    }
    return 0.5 * error.mean(), figures


def critic_loss(x: Tensor, noise: Tensor, sigma: float, critic: Predictor) -> Tensor:
    """Flow matching on the student's clip: mean((v - (noise - x))^2)."""
    return (critic(noised(x, noise, sigma), sigma) - (noise - x)).square().mean()
