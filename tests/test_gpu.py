"""The same engine on CUDA; run with `pytest -m gpu` on a machine that has a GPU."""

from __future__ import annotations

import pytest
import torch

from packforcing_cli import registry, rollout

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
