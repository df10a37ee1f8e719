"""The dual-branch compressor: a block of latents (and its pooled pixels, re-encoded) -> a few tokens.

    HR: latents [B,C,F,h,w] -> strided convolutions -> 1x1x1 projection (zero-initialised)      \\
                                                                                                  sum -> [B,N_c,d]
    LR: pixels / 4 in space, / 2 in time -> VAE encoder -> 2 latents -> the model's patch embedding /

The tokens live in patch-embedding space; a full forward of the transformer at timestep 0 turns them into keys and
values (docs/method.md 2.4, A). N_c = 2 * (h//8) * (w//8), order time row, row, column. Because the HR branch ends in a
zero-initialised projection, an untrained compressor is exactly the training-free LR path.

Knows neither the VAE (it is given LR latents) nor the cache. Source: PackForcing (arXiv 2603.25730) 3.3; kernel,
padding and initialisation are not in the paper, see docs/method.md 3.1 and 3.6.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packforcing_cli.errors import WeightsError

BRANCHES = ("hr+lr", "hr", "lr")


@dataclass(frozen=True)
class CompressorConfig:
    """Sizes of the compressor.

    dim:         width of the transformer the tokens go into.
    in_channels: latent channels.
    widths:      channels of the HR branch: after the temporal stage, then after each of three spatial stages.
    branches:    "hr+lr" (the method), "hr" or "lr" (ablations; "lr" needs no weights).
    """

    dim: int
    in_channels: int = 16
    widths: tuple[int, int, int, int] = (32, 128, 512, 2048)  # the paper's figure, panel d
    branches: str = "hr+lr"

    def __post_init__(self) -> None:
        if self.branches not in BRANCHES:
            raise WeightsError(
                f"compressor branches {self.branches!r} unknown: use one of {', '.join(BRANCHES)}"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CompressorConfig:
        known = {f.name for f in dataclasses.fields(cls)}
        chosen: dict[str, Any] = {
            k: tuple(v) if k == "widths" else v for k, v in values.items() if k in known
        }
        return cls(**chosen)

    def to_dict(self) -> dict[str, Any]:
        return {"_class_name": "Compressor", **dataclasses.asdict(self), "widths": list(self.widths)}


class HRBranch(nn.Module):
    """Strided convolutions over the block's latents, [B,C,F,h,w] -> [B,d,2,h//8,w//8], F = 3 or 4.

    Kernels (1,4,4), stride 2, padding 1 give the exact floors 60 -> 30 -> 15 -> 7 and put output row r at latent row
    8r + 3.5, the centre of the cell it stands for (docs/method.md 3.1, executed table).
    """

    def __init__(self, config: CompressorConfig) -> None:
        super().__init__()
        first, *rest = config.widths
        self.time = nn.Conv3d(config.in_channels, first, (3, 1, 1), (2, 1, 1), (1, 0, 0))
        self.space = nn.ModuleList()
        width = first
        for out in rest:
            self.space.append(nn.Conv3d(width, out, (1, 4, 4), (1, 2, 2), (0, 1, 1)))
            width = out
        self.project = nn.Conv3d(width, config.dim, 1)
        nn.init.zeros_(self.project.weight)
        assert self.project.bias is not None
        nn.init.zeros_(self.project.bias)

    def forward(self, latents: Tensor) -> Tensor:
        x = F.silu(self.time(latents))
        for conv in self.space:
            x = F.silu(conv(x))
        out: Tensor = self.project(x)
        return out


class Compressor(nn.Module):
    """HR and LR branches, summed. Weights only; the patch embedding is the transformer's and is passed in."""

    def __init__(self, config: CompressorConfig) -> None:
        super().__init__()
        self.config = config
        self.hr = HRBranch(config) if "hr" in config.branches else None

    @property
    def needs_pixels(self) -> bool:
        """Whether the LR branch runs, so that pooled pixels have to be re-encoded."""
        return "lr" in self.config.branches

    def forward(self, latents: Tensor, lr_tokens: Tensor | None) -> Tensor:
        """Compressed tokens of one block.

        Args:
            latents:   [B,C,F,h,w] clean latents of the block.
            lr_tokens: [B,N_c,d] patch embedding of the block's two LR latents; None if `needs_pixels` is false.
        Returns: [B,N_c,d] tokens in patch-embedding space, N_c = 2*(h//8)*(w//8).
        """
        tokens = None
        if self.hr is not None:
            tokens = self.hr(latents).flatten(2).transpose(1, 2)
        if self.needs_pixels:
            assert lr_tokens is not None, "the LR branch needs the block's LR latents"
            tokens = lr_tokens if tokens is None else lr_tokens + tokens
        assert tokens is not None
        return tokens


def pooled_kv(kv: Tensor, frames: int, rows: int, cols: int) -> Tensor:
    """Baseline without a network: average un-rotated keys or values over 2x4x4 cells.

    Args:
        kv: [L,B,S,N,D] of a full-resolution block, S = frames*rows*cols.
    Returns: [L,B,2*(rows//4)*(cols//4),N,D]; rows and columns that do not fill a cell are dropped.
    Source: docs/method.md 8.1, baseline 5 (keys must be averaged before RoPE).
    """
    L, B, _, N, D = kv.shape
    grid = kv.unflatten(2, (frames, rows, cols))[:, :, :, : rows // 4 * 4, : cols // 4 * 4]
    grid = grid.unflatten(4, (-1, 4)).unflatten(3, (-1, 4)).mean((4, 6))  # [L,B,F,r,c,N,D]
    first = (frames + 1) // 2
    halves = torch.stack((grid[:, :, :first].mean(2), grid[:, :, first:].mean(2)), dim=2)
    return halves.reshape(L, B, -1, N, D)
