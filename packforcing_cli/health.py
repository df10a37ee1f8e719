"""The health of a video's blocks, one after the other (trace.py measures it), and which of it is an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from packforcing_cli import trace
from packforcing_cli.errors import GenerationError, UnhealthyError
from packforcing_cli.timeline import Script

ATTEMPTS = 3  # at a block under guard "retry", the first one included


class Monitor:
    """The health of a video's blocks, one after the other."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._kept: trace.Seen | None = None
        self._newest: trace.Seen | None = None

    def look(self, block: int, x0: Tensor, pixels: Tensor, frames: Tensor, *, given: bool) -> trace.Health:
        """Health of a block against the last one that was kept.

        Args:
            x0:     latents [1,C,F,h,w].  pixels: [1,3,T,H,W].  frames: [T,H,W,3], of these pixels.
            given:  the block was not made by the model now: its frames are as they should be, whatever they show.
        """
        finite = bool(x0.isfinite().all() & pixels.sum().isfinite())  # of values in [0, 1] a sum says as much
        return self.judge(block, frames, finite=finite, given=given)

    def judge(self, block: int, frames: Tensor, *, finite: bool, given: bool) -> trace.Health:
        """As `look`, for a block of which is known whether its latents and pixels are finite."""
        if not finite:
            return trace.Health(("nan",))
        may_jump = jump_expected(self._script, block)
        health, self._newest = trace.measure(frames.numpy(), self._kept, jump_expected=may_jump)
        return replace(health, flags=()) if given else health

    def keep(self) -> None:
        """The block looked at last belongs to the video."""
        self._kept = self._newest

    def state_dict(self) -> dict[str, Tensor]:
        """What the next block is compared with."""
        if self._kept is None:
            return {}
        measures = torch.tensor([self._kept.motion, self._kept.clipped], dtype=torch.float64)
        return {"last": torch.from_numpy(self._kept.last), "measures": measures}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state_dict`."""
        self._kept = trace.Seen(state["last"].numpy(), *state["measures"].tolist()) if state else None


def jump_expected(script: Script, block: int) -> bool:
    """Whether the picture may change at once in a block: it, or the one before, is cut to or changes the prompt.

    The block behind a change is the first that sees what the change made, and often completes it.
    """

    def changes(n: int) -> bool:
        return n in script.cuts or script.scene(n) != script.scene(n - 1) or script.weight(n) < 1

    return any(changes(n) for n in (block, block - 1) if n > 0)


def require_finite(x0: Tensor, block: int) -> None:
    """Raises: GenerationError if a block holds NaN or infinity."""
    if not bool(x0.isfinite().all()):
        raise GenerationError(
            f"block {block} came out as NaN: the model's numbers overflowed",
            hint="Try --dtype fp32, a lower --guidance, or another --seed.",
        )


def require_healthy(block: int, x0: Tensor, health: trace.Health, *, guard: str) -> None:
    """Raises: UnhealthyError for any flag under guard "stop"; GenerationError for NaN under any other."""
    if guard == "stop" and health.flags:
        raise UnhealthyError(
            f"block {block} is not healthy: {', '.join(health.flags)}",
            hint="Try another --seed, or --guard retry.",
        )
    require_finite(x0, block)
    if "nan" in health.flags:
        raise GenerationError(
            f"the frames of block {block} came out as NaN: the decoder's numbers overflowed",
            hint="Try --dtype fp32, another --vae, or another --seed.",
        )
