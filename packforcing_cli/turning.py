"""One launch for what the memory does with keys on a GPU: pick, dequantize, turn and store, each number read once.

The same as `rope.rotate_into` and `bank.recall_into` do with PyTorch's operators, to the bit: products and sums are
rounded one by one, in float32. Without Triton, on another kind of device, or for float64, those operators do it.
Triton comes with PyTorch's CUDA builds; it needs a C compiler when it is first used on a machine.

Layout of what is moved: rows of tokens, heads and head dim, where each row, and each place of a bank in it, may lie
anywhere, but a head's numbers lie together.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)


def can_turn(x: Tensor, out: Tensor) -> bool:
    """Whether `turn` takes these; asks the device the first time, and warns if it says no."""
    fits = x.dtype in _DTYPES and out.dtype in _DTYPES[:3] and x.stride(-1) == out.stride(-1) == 1
    return fits and x.device.type == "cuda" and _works(x.device.index or 0, x.dtype)


def turn(
    x: Tensor,
    out: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    places: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """Write x, picked, scaled and turned, into out.

    Args:
        x:        [B,S,N,D]; with places [B,P,N_c,N,D], of which [K] places follow one another.
        out:      [B,S,N,D]; S = K*N_c with places.
        cos, sin: [S,D/2] float32; None = not turned.
        scale:    [B,P,N_c,N] float32, with places; None = 1.
    """
    batch, tokens, heads, head_dim = out.shape
    if not out.numel():
        return
    per_place = tokens if places is None else x.shape[2]
    of_place = 0 if places is None else x.stride(1)
    half = head_dim // 2
    given = (x, out, cos, sin, places, scale)
    from packforcing_cli.turning_kernel import turn_kernel

    # Triton launches on the current GPU, wherever the tensors are.
    with torch.cuda.device_of(x):
        turn_kernel[tokens, batch](
            *(x if tensor is None else tensor for tensor in given),
            per_place,
            heads,
            half,
            x.stride(0),
            of_place,
            x.stride(-3),
            x.stride(-2),
            out.stride(0),
            out.stride(1),
            out.stride(2),
            *((0, 0, 0) if scale is None else scale.stride()[:3]),
            TURNS=cos is not None,
            PICKS=places is not None,
            SCALES=scale is not None,
            HEADS=1 << (heads - 1).bit_length(),
            HALF=1 << (half - 1).bit_length(),
            enable_fp_fusion=False,  # as PyTorch's own operators: every product is rounded
        )


@cache
def _works(index: int, dtype: torch.dtype) -> bool:
    """Whether the kernel runs on a GPU and gives what the operators give."""
    if importlib.util.find_spec("triton") is None:
        return False
    device = torch.device("cuda", index)
    if dtype is torch.float8_e4m3fn and torch.cuda.get_device_capability(device) < (8, 9):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 5, 2, 12, generator=generator).to(device).to(dtype)
    angle = torch.rand(10, 6, generator=generator).to(device)
    places, scale = (
        torch.tensor([2, 0], device=device),
        torch.rand(1, 3, 5, 2, generator=generator).to(device),
    )
    cos, sin, out = angle.cos(), angle.sin(), torch.zeros(1, 10, 2, 12, device=device)
    try:
        turn(x, out, cos=cos, sin=sin, places=places, scale=scale)
    except Exception as error:  # Triton's own errors have no common base: compiler, driver, launcher
        said = " ".join(str(error).split())[:200]
        warnings.warn(
            f"Triton does not run on this GPU ({type(error).__name__}: {said}); the memory's keys are turned by"
            " PyTorch's operators, which takes longer",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    picked = (x.float() * scale[..., None])[:, places].flatten(1, 2).unflatten(-1, (-1, 2))
    even, odd = picked.unbind(-1)
    c, s = cos[:, None], sin[:, None]
    same = torch.stack((even * c - odd * s, even * s + odd * c), -1).flatten(-2)
    if not torch.equal(out, same):
        warnings.warn(
            "Triton turns keys otherwise than PyTorch's operators on this GPU; they are turned by the operators",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
