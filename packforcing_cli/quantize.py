"""Smaller weights: each linear's matrix quantized by torchao while it is loaded, so it is never there twice.

    int8          8-bit weights, one scale a row; the product runs in the model's dtype
    int8-dynamic  8-bit weights and activations, scaled a row and a token; an 8-bit product
    fp8-weight    e4m3 weights; the product runs in the model's dtype
    fp8           e4m3 weights and activations; an fp8 product, which needs CUDA capability 8.9

Only the linears of the layers are quantized; embeddings, norms, modulation and the head stay. Knows no model: it is
given a tensor and returns one that `torch.nn.functional.linear` understands.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from packforcing_cli import catalog
from packforcing_cli.errors import EnvironmentProblem, UsageError
from packforcing_cli.quiet import known_import_noise_dropped

FP8_CAPABILITY = (8, 9)  # Ada; the first with fp8 tensor cores
ROWWISE_CAPABILITY = (9, 0)  # Hopper; below it fp8 products have one scale a tensor
FP8_MULTIPLE = 16  # sides of a matrix in an fp8 product


def linear_weights(module: nn.Module, prefix: str) -> frozenset[str]:
    """Names, in the state dict, of the weights of all linears whose name starts with a prefix."""
    return frozenset(
        f"{name}.weight"
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and name.startswith(prefix)
    )


def require_support(mode: str, device: torch.device) -> None:
    """Raises: EnvironmentProblem if a device cannot run a mode."""
    if device.type == "cpu":
        catalog.check_cpu(mode, "none")
    if mode != "fp8" or device.type == "cpu":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        raise EnvironmentProblem(
            f"--quantize fp8 needs CUDA capability 8.9, and {torch.cuda.get_device_name(device)} has"
            f" {capability[0]}.{capability[1]}",
            hint="Use --quantize int8-dynamic, or --quantize fp8-weight.",
        )


def has_fp8(device: torch.device) -> bool:
    """Whether a device has products in fp8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def fp8_rounded(x: Tensor) -> Tensor:
    """To e4m3 and back, one scale a row, in x's own dtype: what a rowwise fp8 product reads of x [...,C]."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / largest
    return ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


def simulate_fp8(module: nn.Module, prefix: str) -> None:
    """Let linears compute with what rowwise fp8 products would read, on any device; sums stay in the dtype's own."""
    for name in linear_weights(module, prefix):
        linear = module.get_submodule(name.removesuffix(".weight"))
        assert isinstance(linear, nn.Linear)
        linear.weight = nn.Parameter(fp8_rounded(linear.weight.detach()), requires_grad=False)
        linear.register_forward_pre_hook(lambda _, given: (fp8_rounded(given[0]), *given[1:]))


def quantizer(mode: str, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A function that quantizes the weight [out, in] of a linear.

    Args:
        mode:   int8, int8-dynamic, fp8 or fp8-weight.
        device: where the products will run.
        dtype:  of the model.
    Raises: EnvironmentProblem as `require_support`; the function: UsageError for a matrix the mode cannot take.
    """
    require_support(mode, device)
    with known_import_noise_dropped():
        from torchao import quantization as ao
        from torchao.utils import should_reduce_range

    if mode == "int8":
        config = ao.Int8WeightOnlyConfig(set_inductor_config=False)
    elif mode == "int8-dynamic":
        # Without VNNI a CPU's 8-bit sums of pairs overflow; 7 bits do not.
        config = ao.Int8DynamicActivationInt8WeightConfig(
            set_inductor_config=False, reduce_range=should_reduce_range(device)
        )
    elif mode == "fp8-weight":
        config = ao.Float8WeightOnlyConfig(set_inductor_config=False)
    else:
        rowwise = dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= ROWWISE_CAPABILITY
        config = ao.Float8DynamicActivationFloat8WeightConfig(
            set_inductor_config=False, granularity=ao.PerRow() if rowwise else ao.PerTensor()
        )

    def quantize(weight: Tensor) -> Tensor:
        if mode == "fp8" and any(side % FP8_MULTIPLE for side in weight.shape):
            raise UsageError(
                f"--quantize fp8: a matrix of {weight.shape[0]}x{weight.shape[1]} is no multiple of {FP8_MULTIPLE}",
                hint="Use --quantize int8.",
            )
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        ao.quantize_(nn.Sequential(linear), config)
        return linear.weight.detach()

    return quantize
