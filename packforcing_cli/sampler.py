"""Flow-matching schedules, block noise and the denoising loop of one block.

Knows nothing of the cache: it is given a function that predicts a velocity. Two schedules, named by the package:

    renoise  few-step students (Self-Forcing family): predict x0, re-noise it with fresh noise to the next sigma.
    euler    ordinary flow matching: integrate dx/dsigma = v from sigma 1 to 0, optionally with guidance.

x_sigma = (1 - sigma) x0 + sigma eps, the network predicts v = eps - x0, its timestep is 1000 sigma.
Source: Self-Forcing (utils/scheduler.py, pipeline/causal_inference.py), docs/method.md 1.4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from packforcing_cli import staging
from packforcing_cli.errors import UsageError

NUM_TRAIN_TIMESTEPS = 1000
Velocity = Callable[[Tensor, float], Tensor]
"""(x [B,C,F,h,w], sigma) -> velocity of the same shape; under guidance [2B,C,F,h,w], the unconditional ones last."""


def shifted(s: float, shift: float) -> float:
    """Flow-matching time shift: shift*s / (1 + (shift-1)*s), s and result in 0..1."""
    return shift * s / (1 + (shift - 1) * s)


def renoise_sigmas(steps: Sequence[int], shift: float, *, warp: bool = True) -> tuple[float, ...]:
    """Sigmas of a few-step student.

    [1000, 750, 500, 250] with shift 5 and warp -> 1, .9375, .8333, .625: step s reads entry 1000 - s of the table
    sigma_i = shifted(1 - i/1000). Without warp sigma is s/1000. A trailing 0 is dropped.
    Source: Self-Forcing `denoising_step_list` with `warp_denoising_step`.
    """
    kept = [s for s in steps if s > 0]
    if (
        not kept
        or any(s > NUM_TRAIN_TIMESTEPS for s in kept)
        or list(kept) != sorted(set(kept), reverse=True)
    ):
        raise UsageError(
            f"denoising steps {list(steps)} must fall from at most {NUM_TRAIN_TIMESTEPS} towards 0"
        )
    return tuple(shifted(s / NUM_TRAIN_TIMESTEPS, shift) if warp else s / NUM_TRAIN_TIMESTEPS for s in kept)


def euler_sigmas(steps: int, shift: float) -> tuple[float, ...]:
    """`steps` + 1 sigmas from 1 to 0, evenly spaced in 1 - i/steps and shifted."""
    if steps < 1:
        raise UsageError(f"steps must be at least 1, got {steps}")
    return tuple(shifted(1 - i / steps, shift) for i in range(steps + 1))


@dataclass(frozen=True)
class Schedule:
    """How a package's model is sampled.

    kind:     "renoise" or "euler".
    sigmas:   renoise: the sigmas visited, the last one leads to x0. euler: steps + 1 sigmas ending in 0.
    guidance: classifier-free guidance scale; 1 means none. Always 1 for renoise.
    """

    kind: str
    sigmas: tuple[float, ...]
    guidance: float = 1.0

    @classmethod
    def build(
        cls, kind: str, *, steps: int | Sequence[int], shift: float, guidance: float = 1.0, warp: bool = True
    ) -> Schedule:
        """Raises: UsageError for an unknown kind, or guidance with `renoise` (it is distilled into the student)."""
        if kind == "euler":
            if not isinstance(steps, int):
                raise UsageError("an euler schedule takes a number of steps")
            return cls(kind, euler_sigmas(steps, shift), guidance)
        if kind == "renoise":
            if guidance != 1.0:
                raise UsageError(
                    f"guidance {guidance:g} does not work with this model: it is a few-step student, guidance is "
                    "distilled into its weights",
                    hint="Leave --guidance away.",
                )
            if isinstance(steps, int):
                raise UsageError("a renoise schedule takes the trained steps, such as [1000, 750, 500, 250]")
            return cls(kind, renoise_sigmas(steps, shift, warp=warp))
        raise UsageError(f"unknown schedule {kind!r}: use renoise or euler")

    @property
    def passes(self) -> int:
        """Transformer passes a block takes before it is clean."""
        steps = len(self.sigmas) - (self.kind == "euler")
        return steps * (2 if self.guidance != 1.0 else 1)


def block_noise(seed: int, block: int, step: int, shape: Sequence[int], *, retry: int = 0) -> Tensor:
    """Gaussian noise that depends on (seed, block, step, retry) and the shape alone: float32 on the CPU.

    The numbers are hashed into the seed of a CPU generator, so neither the order of jobs nor what was drawn before
    matters. `retry` counts the attempts at a block, from 0.
    """
    again = f" retry {retry}" if retry else ""
    digest = hashlib.sha256(f"packforcing noise {seed} {block} {step}{again}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)


def denoise_block(
    velocity: Velocity,
    schedule: Schedule,
    *,
    seed: int,
    block: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str,
    held: Tensor | None = None,
    retry: int = 0,
) -> Tensor:
    """Noise -> clean latents of one block.

    Args:
        velocity: prediction; called with x in `dtype`. When guidance is not 1 it answers for the prompt and for the
                  empty prompt at once, see `Velocity`.
        shape:    [B,C,F,h,w].
        held:     [B,C,n,h,w] clean latents of the first n frames, which are given: `velocity` meets them in every
                  call (at timestep 0, which is its business), and they come out as they are.
        retry:    which attempt at the block this is: each has noise of its own.
    Returns: x0 [B,C,F,h,w] in `dtype`. The state between steps is float32 (float64 for float64 models).
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def noise(step: int) -> Tensor:
        return staging.to_device(block_noise(seed, block, step, shape, retry=retry).to(wide), device)

    def predict(x: Tensor, sigma: float) -> Tensor:
        v = velocity(x.to(dtype), sigma).to(wide)
        if schedule.guidance != 1.0:
            assert v.shape[0] == 2 * x.shape[0], "guidance needs an unconditional prediction"
            v, u = v.chunk(2)
            v = u + schedule.guidance * (v - u)
        return v

    def hold(x: Tensor) -> Tensor:
        return x if held is None else torch.cat((held.to(x), x[:, :, held.shape[2] :]), dim=2)

    x = hold(noise(0))
    if schedule.kind == "euler":
        for sigma, following in zip(schedule.sigmas, schedule.sigmas[1:], strict=False):
            x = hold(x + (following - sigma) * predict(x, sigma))
        return x.to(dtype)
    for step, sigma in enumerate(schedule.sigmas):
        x0 = x - sigma * predict(x, sigma)
        if step + 1 < len(schedule.sigmas):
            following = schedule.sigmas[step + 1]
            x = hold((1 - following) * x0 + following * noise(step + 1))
    return hold(x0).to(dtype)
