"""Frozen parts of a training in less memory: the linears of their layers in 8 bits, by torchao.

    int8   8-bit weights, one scale a row
    fp8    e4m3 weights, one scale a row

Both are weights only: products run in the model's dtype, on any device. The gradient goes through such a linear to what
came before it; the backward pass makes the weight wide again for a moment instead of keeping a wide copy of every
layer's, which is what would happen otherwise and would take more memory than was saved. Knows no model and no recipe.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packforcing_cli.quantize import quantizer

MODES = {"int8": "int8", "fp8": "fp8-weight"}
"""Name in a recipe -> mode of `quantize`."""
ROW_BYTES = {"int8": 5, "fp8": 4}  # of a row's scale in float32, and of its zero point in int8


class _Product(torch.autograd.Function):
    """x [..., in] @ weight [out, in]^T + bias, for a weight and a bias that are not trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        wide: Tensor = ctx.weight.dequantize()
        return (grads[0] @ wide.to(grads[0].dtype)).to(ctx.dtype), None, None


class FrozenLinear(nn.Linear):
    """A linear whose weight is a quantized tensor; nothing of it is trained."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):  # which does not see into a quantized product
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if x.requires_grad and torch.is_grad_enabled():
            return _Product.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return F.linear(x, self.weight, self.bias)


@torch.no_grad()
def shrink(module: nn.Module, mode: str, prefix: str) -> None:
    """Quantize, in place and one after another, the frozen linears of a module whose name starts with a prefix.

    A linear that is trained stays as it is.
    Args:
        mode: "int8", "fp8", or "none", which changes nothing.
    """
    if mode == "none":
        return
    for name, child in [*module.named_modules()]:
        if type(child) is not nn.Linear or child.weight.requires_grad or not name.startswith(prefix):
            continue
        small = FrozenLinear(child.in_features, child.out_features, bias=False, device="meta")
        quantize = quantizer(MODES[mode], child.weight.device, child.weight.dtype)
        small.weight = nn.Parameter(quantize(child.weight.detach()), requires_grad=False)
        small.bias = child.bias
        small.train(child.training)
        owner, _, last = name.rpartition(".")
        parent = module.get_submodule(owner)
        if isinstance(parent, nn.ModuleList):
            parent[int(last)] = small
        else:
            setattr(parent, last, small)


def stored_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters as they lie in memory, quantized ones as their parts."""
    return sum(part.untyped_storage().nbytes() for p in module.parameters() for part in plain(p))


def plain(tensor: Tensor) -> list[Tensor]:
    """The tensors with storage that a tensor is made of: itself, or the parts of a quantized one."""
    flatten = getattr(tensor.detach(), "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    return [part for name in flatten()[0] for part in plain(getattr(tensor, name))]


def linear_bytes(linear: nn.Linear, mode: str, dtype: torch.dtype) -> int:
    """Bytes of a linear's weight in a mode; its bias is not counted."""
    if mode == "none":
        return linear.weight.numel() * dtype.itemsize
    return linear.weight.numel() + linear.out_features * ROW_BYTES[mode]
