"""What the parts of a pass reach on this machine, and what smaller numbers cost in accuracy; for `packforcing bench`.

    kernels    the machine's ceilings, every attention kernel that runs here, projections apart and as one product,
               a layer as it is and compiled
    precision  how far each quantization moves a pass's output from that of the model's own dtype

Times are figures of one run, as in `bench`; errors are counted, not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packforcing_cli import attention, bench, compiling, counting, quantize, registry, resolve, rollout, rope
from packforcing_cli.attention import Kernel
from packforcing_cli.config import QUANTIZATIONS, MemoryOptions
from packforcing_cli.errors import EnvironmentProblem, UsageError
from packforcing_cli.layout import Layout
from packforcing_cli.prompts import Prompt
from packforcing_cli.registry import LAYERS, VideoModel
from packforcing_cli.transformer import Layer, Modulation, after_attention, before_attention

COPIED_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
COMPARED_QUERIES = 512  # of which the error of an attention kernel is taken
SIMULATED = "simulated"


def _steady(model: VideoModel, size: tuple[int, int] | None) -> tuple[Layout, int]:
    """Layout and block of a full memory."""
    options = MemoryOptions().with_defaults(model.manifest.cache.model_dump())
    grid = resolve.grid_for(model, size or model.manifest.size)
    layout = resolve.layout_for(model, options, grid, num_blocks=bench.EARLY)
    return layout, layout.sink_blocks + layout.recent_blocks + layout.top_k + 1


@torch.no_grad()
def kernels(
    model: VideoModel,
    *,
    size: tuple[int, int] | None = None,
    repeats: int = bench.REPEATS,
    compiled: bool = False,
) -> dict[str, Any]:
    """Rates of the machine and of a layer's parts, at the shapes of a block in a full memory.

    Args:
        compiled: also time a compiled layer, which takes a compiler and its time.
    Returns: `ceilings` (bytes or operations a second), `attention` (a row a kernel: seconds, operations a second, error
        to float32), `projections` (q, k and v apart and as one), `layer` (without self-attention).
    """
    layout, block = _steady(model, size)
    grid, dtype, device = layout.grid, model.dtype, model.device
    tokens, attended = grid.block_tokens, layout.tokens(block).active
    return {
        "model": model.name,
        "dtype": registry.dtype_name(dtype),
        "tokens": tokens,
        "attended_tokens": attended,
        "ceilings": ceilings(dtype, device, repeats=repeats),
        "attention": _attention_rows(
            tokens, attended, grid.heads, grid.kv_dim // grid.heads, dtype, device, repeats=repeats
        ),
        "projections": _projections(model, tokens, repeats=repeats),
        "layer": _layer(model, tokens, repeats=repeats, compiled=compiled),
    }


def ceilings(dtype: torch.dtype, device: torch.device, *, repeats: int) -> dict[str, float]:
    """What the machine itself reaches: bytes a second read and written by a copy, operations of matrix products."""
    source = torch.empty(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    took = bench.measure({"copy": partial(target.copy_, source)}, device, repeats=repeats)["copy"]
    found = {"copy_bytes_per_second": 2 * source.nbytes / took.median}
    del source, target
    found["matmul_flops_per_second"] = bench.matmul_rate(dtype, device, repeats=repeats)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= quantize.ROWWISE_CAPABILITY:
        found["fp8_matmul_flops_per_second"] = _fp8_rate(device, repeats=repeats)
    return found


def _fp8_rate(device: torch.device, *, repeats: int) -> float:
    side = 8192
    a, b = (torch.randn(side, side, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    scale_a = torch.ones(side, 1, device=device)
    scale_b = torch.ones(1, side, device=device)

    def product() -> Tensor:
        return torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16)

    took = bench.measure({"product": product}, device, repeats=repeats)["product"]
    return 2 * side**3 / took.median


def _attention_rows(
    tokens: int,
    attended: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    repeats: int,
) -> list[dict[str, Any]]:
    """Every kernel that runs here, on one layer's queries and keys; what `auto` takes comes first."""
    q = torch.randn(1, tokens, heads, head_dim, device=device).to(dtype)
    k, v = (torch.randn(1, attended, heads, head_dim, device=device).to(dtype) for _ in range(2))
    some = q[:, :COMPARED_QUERIES]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = Kernel("math")(some.float(), k.float(), v.float())
    chosen: dict[str, Kernel] = {}
    rows: list[dict[str, Any]] = []
    for name in attention.runnable(device=device, dtype=dtype, heads=heads, head_dim=head_dim):
        try:
            kernel = attention.choose(name, device=device, dtype=dtype, heads=heads, head_dim=head_dim)
        except EnvironmentProblem as problem:
            rows.append({"kernel": name, "not measured": problem.message})
            continue
        chosen[name] = kernel

    def call(kernel: Kernel) -> Tensor:
        with kernel.active():
            return kernel(q, k, v)

    calls: dict[str, Callable[[], object]] = {
        name: (lambda kernel=kernel: call(kernel))  # type: ignore[misc]
        for name, kernel in chosen.items()
    }
    flops = 4 * tokens * attended * heads * head_dim
    for name, times in bench.measure(calls, device, repeats=repeats).items():
        out = call(chosen[name])[:, :COMPARED_QUERIES].float()
        rows.append(
            {
                "kernel": name,
                "taken": chosen[name].taken,
                "seconds": times.to_json(),
                "flops_per_second": flops / times.median,
                "error": float((out - exact).norm() / exact.norm()),
            }
        )
    return rows


def _projections(model: VideoModel, tokens: int, *, repeats: int) -> dict[str, Any]:
    """Seconds of q, k and v of one layer: three products, and one."""
    layer = model.transformer.blocks[0]
    assert isinstance(layer, Layer)
    own, device = layer.attn1, model.device
    if own.joined is None or own.to_q.weight.device != device:
        return {"not measured": "the projections of this model are not joined, or not on the device"}
    x = torch.randn(1, tokens, own.to_q.in_features, device=device).to(model.dtype)
    weight, bias = own.joined
    apart = own.to_q, own.to_k, own.to_v
    took = bench.measure(
        {"apart": lambda: [one(x) for one in apart], "together": lambda: F.linear(x, weight, bias)},
        device,
        repeats=repeats,
    )
    return {name: times.to_json() for name, times in took.items()}


def _layer(model: VideoModel, tokens: int, *, repeats: int, compiled: bool) -> dict[str, Any]:
    """Seconds of one layer without self-attention, in two parts: as it is, and compiled."""
    network, device, dtype = model.transformer, model.device, model.dtype
    layer, config = network.blocks[0], network.config
    assert isinstance(layer, Layer)
    if layer.norm2.weight.device != device:
        return {"not measured": "the layers are not on the device"}
    frames = model.manifest.cache.frames_per_block
    x = torch.randn(1, tokens, config.dim, device=device).to(dtype)
    heads = torch.randn(1, tokens, config.num_attention_heads, config.attention_head_dim, device=device).to(
        dtype
    )
    text = torch.randn(1, model.text.length, config.text_dim, device=device).to(dtype)
    times = torch.full((1, frames), 500.0, dtype=torch.float64, device=device)
    modulation: Modulation = network.modulation(times)
    pair = layer.attn2.keys_values(network.condition_embedder.text_embedder(text))
    positions = torch.zeros(tokens, 3, dtype=torch.float64, device=device)
    angles = tuple(part.float() for part in rope.angles(positions, config.attention_head_dim))

    def run(before: Callable[..., Any], after: Callable[..., Any]) -> None:
        before(layer, x, modulation, *angles)
        after(layer, x, heads, modulation, pair, model.attention)

    calls: dict[str, Callable[[], object]] = {"eager": lambda: run(before_attention, after_attention)}
    if compiled:
        fast = compiling.compiled(before_attention), compiling.compiled(after_attention)
        calls["compiled"] = lambda: run(*fast)
    took = bench.measure(calls, device, repeats=repeats)
    with counting.moved_bytes() as moved:
        run(before_attention, after_attention)
    return {
        **{name: value.to_json() for name, value in took.items()},
        "eager_bytes": moved.bytes,
        "eager_operators": moved.operators,
    }


# -- precision ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def precision(
    place: str,
    prompt: Prompt,
    *,
    device: torch.device,
    dtype: str = "auto",
    size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Relative error of one denoising pass's output, for each quantization of the linears.

    Every mode reads the same random memory and the same noise; the reference is the model in its own dtype. Where the
    device has no products in fp8 their rounding is simulated, and the row says so.
    Returns: `dtype`, and a row a mode: error, worst (largest difference in units of the output's standard deviation),
        weight bytes, or why it was not measured.
    """
    whole = registry.open_model(place, device=device, dtype=dtype, fuse=False).load()
    _, block = _steady(whole, size)
    torch.manual_seed(0)
    stage = bench.prepare(whole, prompt, block=block, size=size, extra_blocks=2)
    context, noisy = stage.cache.context(block), stage.noisy()

    def output(model: VideoModel) -> Tensor:
        text = model.transformer.embed_text(prompt.conditional.to(model.dtype))
        return rollout.velocity(model, text, context, noisy, 0.8).float()

    reference = output(whole)
    found: dict[str, Any] = {"model": whole.name, "dtype": registry.dtype_name(whole.dtype), "rows": []}
    found["rows"].append({"mode": "none", "weight_bytes": _weight_bytes(whole), "error": 0.0, "worst": 0.0})
    for mode in QUANTIZATIONS[1:]:
        row: dict[str, Any] = {"mode": mode}
        found["rows"].append(row)
        try:
            if mode == "fp8" and not quantize.has_fp8(device):
                row["how"] = SIMULATED
                small = replace(whole, transformer=_simulated_fp8(whole))
            else:
                small = registry.open_model(
                    place, device=device, dtype=registry.dtype_name(whole.dtype), quantize=mode
                ).load()
                row["weight_bytes"] = _weight_bytes(small)
        except (UsageError, EnvironmentProblem, ImportError) as problem:
            row["not measured"] = getattr(problem, "message", "torchao is not installed")
            continue
        off = output(small) - reference
        row["error"] = float(off.norm() / reference.norm())
        row["worst"] = float(off.abs().max() / reference.std())
        del small
    return found


def _simulated_fp8(model: VideoModel) -> Any:
    import copy

    network = copy.deepcopy(model.transformer)
    quantize.simulate_fp8(network, LAYERS)
    return network


def _weight_bytes(model: VideoModel) -> int:
    """Bytes of the transformer's weights, scales of quantized ones included."""
    total = 0
    for value in model.transformer.state_dict().values():
        parts = [getattr(value, name, None) for name in ("qdata", "scale", "zero_point")]
        held = [part for part in parts if isinstance(part, Tensor)]
        total += sum(part.nbytes for part in held) if held else value.nbytes
    return total
