"""The same engine on CUDA; run with `pytest -m gpu` on a machine that has a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_vae import wan_module

from packforcing_cli import attention, quantize, registry, rollout
from packforcing_cli.cache import KVCache
from packforcing_cli.config import MemoryOptions
from packforcing_cli.errors import EnvironmentProblem
from packforcing_cli.layout import Grid, Layout
from packforcing_cli.past import PastBlock
from packforcing_cli.rollout import Block
from packforcing_cli.transformer import BlockKV
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


# -- what the host waits for --------------------------------------------------------------------------------------

FULL = 2 + 1 + 16 + 1
"""The first block whose memory is full."""


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Operators that stop the host raise; waiting for an event, which is asked for by name, does not."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Synchronization debug mode", UserWarning
        )  # is a prototype, it says
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_for_a_copy_would_be_seen() -> None:
    x = torch.zeros(8)
    y = x.cuda()
    for wait in (lambda: x.cuda(), lambda: torch.tensor([1], device="cuda"), lambda: y.sum().item()):
        with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
            wait()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "memory",
    [
        {},
        {"select": "affinity"},
        {"select": "random"},
        {"bank_device": "host"},
        {"bank_device": "host", "kv_dtype": "int8"},
        {"bank_device": "host", "select": "affinity"},
        {"bank": None},
        {"bank_device": "host", "bank": None},
        {"rope_adjustment": False},
    ],
    ids=str,
)
def test_a_steady_block_waits_for_no_operator(memory: dict[str, Any], overlap: bool) -> None:
    model = registry.load_model("demo", device="cuda", dtype="bf16")
    blocks = rollout.stream_generate(
        model, PROMPT, num_blocks=FULL + 12, seed=3, memory=MemoryOptions(**memory), overlap=overlap
    )
    for _ in range(FULL + 4):  # each kind of pass was made, and kernels were looked for
        next(blocks)
    with waiting_is_an_error():
        made = [next(blocks) for _ in range(3)]
    assert all(block.latents.isfinite().all() for block in made)


@pytest.mark.parametrize("memory", [{}, {"bank_device": "host"}], ids=str)
def test_a_steady_block_of_recorded_passes_waits_for_no_operator(memory: dict[str, Any]) -> None:
    model = registry.load_model("demo", device="cuda", dtype="bf16", cuda_graphs=True)
    blocks = rollout.stream_generate(
        model, PROMPT, num_blocks=FULL + 12, seed=3, memory=MemoryOptions(**memory)
    )
    for _ in range(FULL + 6):
        next(blocks)
    with waiting_is_an_error():
        made = [next(blocks) for _ in range(3)]
    assert all(block.latents.isfinite().all() for block in made)


# -- the bank in host memory --------------------------------------------------------------------------------------


def _made(
    model: registry.VideoModel, memory: dict[str, Any], num_blocks: int = FULL + 4, **options: Any
) -> list[Block]:
    chosen = MemoryOptions(**memory)
    return list(
        rollout.stream_generate(model, PROMPT, num_blocks=num_blocks, seed=3, memory=chosen, **options)
    )


def require_equal(some: list[Block], others: list[Block]) -> None:
    assert len(some) == len(others) > 0
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one.selected, other.selected)
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.frames, other.frames)


@pytest.mark.parametrize("bank", [20, None])
@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8"])
@pytest.mark.parametrize("select", ["affinity-recent", "affinity"])
def test_a_bank_in_host_memory_gives_the_video_of_one_on_the_gpu(
    select: str, kv_dtype: str, bank: int | None
) -> None:
    model = registry.load_model("demo", device="cuda", dtype="bf16")
    memory = {"select": select, "kv_dtype": kv_dtype, "bank": bank, "top_k": 4}
    near, far = (_made(model, {**memory, "bank_device": place}, FULL + 8) for place in ("device", "host"))
    require_equal(near, far)
    assert far[-1].cache.near > 0 == near[-1].cache.near


def test_blocks_fetched_from_the_host_are_those_of_the_gpu_however_long_the_copies_take() -> None:
    """Keys and values far larger than the demo's, places used again, and no pause between blocks."""
    grid = Grid(frames_per_block=4, rows=16, cols=16, layers=6, kv_dim=1024, heads=8, dtype_bytes=2)
    layout = Layout(grid, sink_blocks=1, recent_blocks=1, top_k=6, bank=9, mid_span="fit", trained_frames=28)
    kind: dict[str, Any] = {"num_blocks": 40, "dtype": torch.bfloat16, "device": "cuda"}
    caches = KVCache(layout, **kind), KVCache(layout, **kind, bank_device="cpu")
    generator = torch.Generator("cuda").manual_seed(0)

    def kv(tokens: int) -> BlockKV:
        size = (2, grid.layers, 1, tokens, grid.heads, 128)
        k, v = torch.randn(size, generator=generator, device="cuda").bfloat16()
        q_sum = torch.randn(size[1:3] + size[4:], generator=generator, device="cuda")
        return BlockKV(k, v, q_sum)

    differ = torch.zeros((), dtype=torch.int64, device="cuda")  # read once, at the end
    for block in range(40):
        own, small = kv(grid.block_tokens), kv(grid.compressed_tokens)
        contexts = [cache.context(block) for cache in caches]
        for _ in range(2):
            for layer in range(grid.layers):
                mine = own.k[layer], own.v[layer], own.q_sum[layer]
                near, far = (context.layer(layer, *mine) for context in contexts)
                for a, b in zip(near, far, strict=True):
                    differ += (a != b).sum()
        for cache in caches:
            cache.commit(block, own)
            if cache.needs_backup(block):
                cache.add_backup(block, small)
    assert differ.item() == 0
    assert caches[1].stats().near > 0


def test_an_unlimited_bank_on_the_gpu_makes_the_video_of_a_large_one() -> None:
    model = registry.load_model("demo", device="cuda", dtype="bf16")
    require_equal(_made(model, {"bank": 64, "top_k": 4}), _made(model, {"bank": None, "top_k": 4}))


# -- going on, and other devices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["affinity", "affinity-recent"])
def test_a_video_that_is_gone_on_with_is_the_same_with_and_without_a_second_stream(select: str) -> None:
    """Blocks that are there already choose in their clean pass; what they recall is shown from the second stream."""
    model = registry.load_model("demo", device="cuda", dtype="fp32")
    memory = {"select": select, "top_k": 4}
    first = _made(model, memory, 12, overlap=False)
    past = [PastBlock(block.latents) for block in first]
    made = [_made(model, memory, 24, overlap=overlap, past=past) for overlap in (False, True)]
    require_equal(*made)
    assert [block.replayed for block in made[1]] == [True] * 12 + [False] * 12
    assert all(int(block.selected.min()) >= 0 for block in made[1] if block.selected.numel())
    recorded = [replace(old, selected=block.selected) for old, block in zip(past, made[0], strict=False)]
    require_equal(_made(model, memory, 24, overlap=True, past=recorded)[12:], made[0][12:])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("memory", [{}, {"bank_device": "host"}, {"bank": None}], ids=str)
def test_a_model_on_a_second_gpu_makes_the_same_video(memory: dict[str, Any]) -> None:
    if torch.cuda.get_device_name(0) != torch.cuda.get_device_name(1):
        pytest.skip("needs two GPUs of one kind")
    assert torch.cuda.current_device() == 0
    first, second = (registry.load_model("demo", device=f"cuda:{n}", dtype="bf16") for n in range(2))
    usual = _made(first, memory, overlap=True)
    torch.cuda.reset_peak_memory_stats(0)
    before = torch.cuda.max_memory_allocated(0)
    require_equal(_made(second, memory, overlap=True), usual)
    assert torch.cuda.max_memory_allocated(0) == before  # nothing of it was on the first one
