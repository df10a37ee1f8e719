"""The same engine on CUDA; run with `pytest -m gpu` on a machine that has a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_vae import wan_module

from packforcing_cli import attention, quantize, registry, rollout
from packforcing_cli.errors import EnvironmentProblem
from packforcing_cli.vae import WanCodec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPT = "a red circle moving right on a blue background"


def _latents(device: str, dtype: str, num_blocks: int) -> torch.Tensor:
    model = registry.load_model("demo", device=device, dtype=dtype)
    blocks = rollout.stream_generate(model, PROMPT, num_blocks=num_blocks, seed=3)
    return torch.cat([block.latents.float().cpu() for block in blocks], dim=2)


def test_cuda_in_fp32_equals_the_cpu_to_rounding() -> None:
    torch.testing.assert_close(_latents("cuda", "fp32", 6), _latents("cpu", "fp32", 6), rtol=1e-2, atol=1e-2)


def test_cuda_in_bf16_makes_a_finite_video_close_to_fp32() -> None:
    half, full = _latents("cuda", "bf16", 6), _latents("cuda", "fp32", 6)
    assert half.isfinite().all()
    assert (half - full).abs().mean() < 0.25 * full.abs().mean()


def test_cache_bytes_stay_flat_on_cuda() -> None:
    model = registry.load_model("demo", device="cuda", dtype="bf16")
    allocated = []
    for _ in rollout.stream_generate(model, PROMPT, num_blocks=60, seed=1):
        allocated.append(torch.cuda.memory_allocated())
    assert max(allocated[30:]) <= allocated[25] * 1.02


def test_a_second_stream_changes_nothing_on_cuda() -> None:
    model = registry.load_model("demo", device="cuda", dtype="fp32")
    made = [
        list(rollout.stream_generate(model, PROMPT, num_blocks=12, seed=3, overlap=overlap))
        for overlap in (False, True, None)
    ]
    for one, *others in zip(*made, strict=True):
        for other in others:
            assert torch.equal(one.latents.cpu(), other.latents.cpu())
            assert torch.equal(one.frames, other.frames)
            assert torch.equal(one.selected.cpu(), other.selected.cpu())


def _blocks(num_blocks: int = 24, **how: Any) -> list[torch.Tensor]:
    """Latents of a video whose memory is full from block 20 on."""
    model = registry.load_model("demo", device="cuda", dtype="bf16", **how)
    blocks = rollout.stream_generate(model, PROMPT, num_blocks=num_blocks, seed=3)
    return [block.latents.float().cpu() for block in blocks]


def test_recorded_passes_make_the_same_video_to_the_bit() -> None:
    plain, recorded = _blocks(), _blocks(cuda_graphs=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))


def test_compiled_layers_make_a_close_video_also_recorded() -> None:
    plain = _blocks()
    for how in ({"compile_layers": True}, {"compile_layers": True, "cuda_graphs": True}):
        fast = _blocks(**how)
        assert all(latents.isfinite().all() for latents in fast)
        assert (fast[0] - plain[0]).abs().mean() < 0.25 * plain[0].abs().mean()


def test_a_wan_decoder_shows_the_same_frames_compiled_and_in_larger_portions() -> None:
    frames = []
    ways: tuple[dict[str, Any], ...] = (
        {},
        {"latents_per_call": 4},
        {"latents_per_call": 4, "compiled": True},
    )
    for how in ways:
        codec = WanCodec(wan_module(), channels_last=True, **how).to("cuda", torch.bfloat16)
        decoder = codec.decoder()
        latents = torch.randn(1, 4, 12, 16, 16, generator=torch.Generator().manual_seed(0)).cuda()
        frames.append(torch.cat([decoder.decode(part) for part in latents.split(4, dim=2)], dim=2))
    for other in frames[1:]:
        assert (other - frames[0]).abs().mean() < 0.01


def test_recorded_passes_take_no_memory_block_after_block() -> None:
    model = registry.load_model("demo", device="cuda", dtype="bf16", cuda_graphs=True)
    reserved = []
    for _ in rollout.stream_generate(model, PROMPT, num_blocks=60, seed=1):
        reserved.append(torch.cuda.memory_reserved())
    assert max(reserved[30:]) <= reserved[25] * 1.02
    assert model.transformer._recordings is not None
    assert model.transformer._recordings.replays > 100


@pytest.mark.parametrize("name", [*attention.BACKENDS, *attention.PACKAGES])
def test_every_attention_kernel_runs_right_or_is_refused(name: str) -> None:
    device = torch.device("cuda")
    there = attention.runnable(device=device, dtype=torch.bfloat16)
    if name not in there:
        with pytest.raises(EnvironmentProblem):
            attention.choose(name, device=device, dtype=torch.bfloat16)
        return
    kernel = attention.choose(name, device=device, dtype=torch.bfloat16)
    assert kernel.taken == name
    found = attention.kind(attention.profiled(kernel, device))
    assert found == {
        "cudnn": "cuDNN",
        "flash": "FlashAttention 2",
        "efficient": "memory-efficient attention",
        "math": "plain matrix products",
        "fa3": "FlashAttention 3",
        "sage": "SageAttention",
    }.get(name)


def test_auto_takes_cudnn_on_a_hopper_gpu_or_says_what_helps() -> None:
    if torch.cuda.get_device_capability()[0] != attention.HOPPER:
        pytest.skip("needs a Hopper GPU")
    kernel = attention.choose("auto", device=torch.device("cuda"), dtype=torch.bfloat16)
    if torch.backends.cudnn.version() >= attention.CUDNN_VERSION:
        assert (kernel.taken, kernel.warning) == ("cudnn", "")
        assert attention.kind(attention.profiled(kernel, torch.device("cuda"))) == "cuDNN"
    else:
        assert "cuDNN 9.15.1" in kernel.warning


def test_fp8_products_are_as_exact_as_simulated_ones() -> None:
    device = torch.device("cuda")
    if not quantize.has_fp8(device):
        pytest.skip("needs fp8 products")
    x = torch.randn(64, 512, device=device, dtype=torch.bfloat16)
    weight = torch.randn(256, 512, device=device, dtype=torch.bfloat16)
    product = torch.nn.functional.linear(x, quantize.quantizer("fp8", device, torch.bfloat16)(weight))
    simulated = torch.nn.functional.linear(quantize.fp8_rounded(x), quantize.fp8_rounded(weight))
    assert (product - simulated).norm() < 0.02 * simulated.norm()
