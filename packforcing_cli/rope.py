"""Three-axis rotary position embedding at explicit, real-valued positions.

Knows nothing of blocks, partitions or caches: it takes positions, it gives rotations.
Positions are real numbers, so compressed tokens can sit at the centres of the cells they stand for and slots can
be fractions; there is no table and therefore no 1024-position limit.

Follows Wan 2.1 (`rope_params`, `rope_apply`) and diffusers' `WanRotaryPosEmbed`: adjacent channel pairs (2i, 2i+1),
channel order [time | row | column], theta 10000 per axis with the axis' own width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from packforcing_cli import turning
from packforcing_cli.errors import LayoutError

THETA = 10_000.0  # Wan 2.1, wan/modules/model.py: rope_params
PIECE = {"cpu": 1 << 19}
"""Numbers that are turned at a time, by kind of device: their temporaries stay in the processor's cache."""
PIECE_OF_OTHERS = 1 << 23


def split(head_dim: int) -> tuple[int, int, int]:
    """Channels of one head given to (time, row, column); time takes the remainder.

    128 -> (44, 42, 42).
    Raises: LayoutError if head_dim is odd or under 6.
    Source: Wan 2.1 `rope_apply`, diffusers `WanRotaryPosEmbed`.
    """
    if head_dim % 2 or head_dim < 6:
        raise LayoutError(
            f"head dim {head_dim} cannot be split over three rotary axes: it must be even and >= 6"
        )
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def angles(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's rotation.

    Args:
        positions: [S, 3] (slot, row, column) of each token; latent frames and patch cells, any real number.
        head_dim:  D, channels of one head.
    Returns: (cos, sin), each [S, D/2] float64, one entry per channel pair.
    Raises: LayoutError if the shape is another.
    """
    if positions.ndim != 2 or positions.shape[1] != 3:
        raise LayoutError(f"positions must be [S, 3] (slot, row, column), got {list(positions.shape)}")
    positions = positions.to(torch.float64)
    parts = []
    for axis, width in enumerate(split(head_dim)):
        index = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device)
        frequencies = THETA ** (-index / width)
        parts.append(positions[:, axis, None] * frequencies)
    angle = torch.cat(parts, dim=1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys to their positions.

    Args:
        x:        [B, S, N, D] un-rotated queries or keys (after QK-norm).
        cos, sin: [S, D/2] (or anything that broadcasts to [B, S, N, D/2] once a head axis is added), from `angles`.
    Returns: [B, S, N, D], same dtype. Computed in float32, or in float64 if x is float64; rounded once.
    Source: Wan 2.1 `rope_apply`; docs/method.md 1.2: values are never rotated.
    """
    compute = compute_dtype(x.dtype)
    if _is_large(x, cos):
        out = torch.empty_like(x)
        rotate_into(x, cos, sin, out)
        return out
    cos, sin = cos.to(compute).unsqueeze(-2), sin.to(compute).unsqueeze(-2)
    return turned(x.to(compute), cos, sin).to(x.dtype)


def _is_large(x: Tensor, cos: Tensor) -> bool:
    """Whether pieces are several times faster: on a CPU, when x is larger than its cache; not for what is learned."""
    learns = torch.is_grad_enabled() and x.requires_grad
    large = x.device.type == "cpu" and x.numel() > PIECE["cpu"] and cos.ndim == 2
    return large and not learns and not torch.compiler.is_compiling()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What numbers of a dtype are turned in; cosines and sines may be kept in it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rotate_into(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Write `rotate(x, cos, sin)`, the same bits, into `out`, which may be x itself; x is read once, out written once.

    One operator (`packforcing::rotate_into`) without temporaries of x's size.
    Args:
        x, out:   [B, S, N, D], of any strides, each with its own dtype.
        cos, sin: [S, D/2].
    """
    compute = compute_dtype(x.dtype)
    torch.ops.packforcing.rotate_into(x, cos.to(compute), sin.to(compute), out)


def _rotate_into(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    if turning.can_turn(x, out):
        turning.turn(x, out, cos=cos, sin=sin)
        return
    rows, tokens, heads, head_dim = x.shape
    cos, sin, compute = cos.unsqueeze(-2), sin.unsqueeze(-2), cos.dtype
    row, token = tokens * heads * head_dim, heads * head_dim
    piece = PIECE.get(x.device.type, PIECE_OF_OTHERS)
    some_rows, some_tokens = max(1, piece // max(1, row)), min(tokens, max(1, piece // token))
    for r in range(0, rows, some_rows):
        for t in range(0, tokens, some_tokens):
            part = slice(t, t + some_tokens)
            pairs = x[r : r + some_rows, part].to(compute)
            out[r : r + some_rows, part].copy_(turned(pairs, cos[part], sin[part]))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B,S,N,D] turned by cos and sin [S,1,D/2], all of one dtype."""
    as_complex = x.device.type == "cpu" and not torch.compiler.is_compiling()
    turn = turn_complex if as_complex else turn_real
    return turn(x.unflatten(-1, (-1, 2)), cos, sin).flatten(-2)


def turn_complex(pairs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs [..., D/2, 2] as complex numbers: 11x faster on a CPU than four strided products."""
    return torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin))


def turn_real(pairs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same without complex numbers, which compilers for GPUs do not take."""
    even, odd = pairs.unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)


def grid_positions(
    start: float, frames: int, rows: int, cols: int, *, device: torch.device | str = "cpu"
) -> Tensor:
    """Positions of a block of full-resolution tokens whose first frame is at slot `start`.

    Returns: [frames*rows*cols, 3] float64, order frame, row, column.
    """
    t = torch.arange(frames, dtype=torch.float64, device=device) + start
    h = torch.arange(rows, dtype=torch.float64, device=device)
    w = torch.arange(cols, dtype=torch.float64, device=device)
    return torch.stack(torch.meshgrid(t, h, w, indexing="ij"), dim=-1).reshape(-1, 3)


_OPERATORS = torch.library.Library("packforcing", "FRAGMENT")
_OPERATORS.define("rotate_into(Tensor x, Tensor cos, Tensor sin, Tensor(a!) out) -> ()")
_OPERATORS.impl("rotate_into", _rotate_into, "CompositeExplicitAutograd")
_OPERATORS.impl("rotate_into", lambda x, cos, sin, out: None, "Meta")
