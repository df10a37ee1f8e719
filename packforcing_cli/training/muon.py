"""Muon: momentum, orthogonalised by Newton-Schulz iterations, for the weight matrices inside layers.

The same update as `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"` (a test compares them), but matrices of one
shape are iterated together and in their own precision: on a CPU without fast bfloat16 that is several times cheaper,
and it also runs on torch 2.8, which has no Muon.
Source: Keller Jordan, "Muon: an optimizer for hidden layers"; step size of Moonshot's "Muon is scalable".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-7


def orthogonalise(matrices: Tensor) -> Tensor:
    """Approximate U V^T of each matrix = U S V^T. matrices [n, rows, cols] -> the same shape."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.flatten(1).norm(dim=1).clamp(min=EPS)[:, None, None]
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Optimiser for two-dimensional parameters.

    Args:
        lr:           step size; updates have the root mean square AdamW's would have at this rate (0.2 sqrt(max side)).
        weight_decay: decoupled, times lr.
        momentum:     Nesterov momentum.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], *, lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(list(params), {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure: gradients are there
        """Apply one update; parameters without a gradient stay as they are."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, parameters in shapes.items():
                updates = orthogonalise(
                    torch.stack([self._momentum(p, group["momentum"]) for p in parameters])
                )
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                for p, update in zip(parameters, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=rate)

    def _momentum(self, p: nn.Parameter, momentum: float) -> Tensor:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(buffer, momentum)
