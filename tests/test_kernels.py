"""Fused projections, attention kernels, compiled regions, recorded passes: each gives the numbers of the plain pass."""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import recorded
import tiny
import torch
from test_vae import wan_module
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from packforcing_cli import (
    attention,
    bench,
    bench_kernels,
    bench_peer,
    catalog,
    compiling,
    config,
    counting,
    graphs,
    planner,
    quantize,
    registry,
    resolve,
    rollout,
    runfolder,
    sameness,
    transformer,
)
from packforcing_cli.cache import KVCache
from packforcing_cli.cli import generate
from packforcing_cli.config import MemoryOptions
from packforcing_cli.errors import ConfigError, EnvironmentProblem, UsageError
from packforcing_cli.prompts import Prompt, Story
from packforcing_cli.sampler import Schedule
from packforcing_cli.timeline import Script
from packforcing_cli.transformer import Attention, TextKV, TransformerConfig, WanTransformer
from packforcing_cli.vae import WanCodec

CPU = torch.device("cpu")
MEMORY = MemoryOptions(sink_blocks=1, top_k=2, bank=3, mid_span="1")
STEADY = 1 + 1 + 3 + 1


def fresh(dtype: torch.dtype = torch.float32) -> registry.VideoModel:
    """A tiny model with fused projections."""
    model = tiny.video_model(dtype)
    model.transformer.fuse_projections()
    return model


def prompt(model: registry.VideoModel) -> Prompt:
    return Prompt("a", tiny.embeds(0, model.dtype), tiny.embeds(1, model.dtype))


def stage_of(model: registry.VideoModel, block: int = STEADY, more: int = 4) -> bench.Stage:
    return bench.prepare(model, prompt(model), block=block, memory=MEMORY, extra_blocks=more)


def passes(model: registry.VideoModel, stage: bench.Stage) -> tuple[Tensor, ...]:
    """A guided denoising pass, a clean and a compressed one over the same block."""
    context = stage.cache.context(stage.block)
    noisy = stage.noisy()
    with torch.no_grad():
        velocity = rollout.velocity(model, stage.guided, context, noisy, 0.7)
        kv = model.transformer.commit(noisy, stage.text, context)
        tokens = model.transformer.patch(noisy)[:, : stage.grid.compressed_tokens]
        small = model.transformer.commit_tokens(
            tokens, stage.text, stage.cache.compressed_context(stage.block)
        )
    return velocity, kv.k, kv.v, kv.q_sum, small.k, small.v


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def projections(network: WanTransformer) -> list[Attention]:
    found = [layer.attn1 for layer in network.blocks]
    assert all(isinstance(one, Attention) for one in found)
    return found  # type: ignore[return-value]


# -- fused projections --------------------------------------------------------------------------------------------


def unfused(model: registry.VideoModel) -> registry.VideoModel:
    network = copy.deepcopy(model.transformer)
    assert all(one.joined is None for one in projections(network))
    return replace(model, transformer=network)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_product_gives_what_three_give(dtype: torch.dtype) -> None:
    model = fresh(dtype)
    assert all(one.joined is not None for one in projections(model.transformer))
    apart = unfused(model)
    stage = stage_of(model)
    together, separate = passes(model, stage), passes(apart, stage)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(together, separate, strict=True):
        assert relative_error(a, b) < bound


def test_models_are_loaded_fused_but_for_training() -> None:
    for fuse in (True, False):
        loaded = registry.load_model("demo", device="cpu", fuse=fuse).transformer
        assert {one.joined is not None for one in projections(loaded)} == {fuse}
    made = registry.load_model("random:demo", device="cpu").transformer
    assert all(one.joined is not None for one in projections(made))


def test_in_double_precision_every_number_is_the_same_to_the_last_bits() -> None:
    network = tiny.transformer(3)
    x = torch.randn(1, 24, network.config.dim, dtype=torch.float64)
    with torch.no_grad():
        apart = [one.own(x) for one in projections(network)]
        network.fuse_projections()
        for one, parts in zip(projections(network), apart, strict=True):
            assert one.joined is not None
            for a, b in zip(one.own(x), parts, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_names_and_values_of_the_weights_stay_and_they_take_no_more_memory(tmp_path: Path) -> None:
    network = tiny.transformer(4, torch.float32)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.fuse_projections()
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in after.values()
    }
    assert sum(storages.values()) == sum(value.nbytes for value in before.values())
    from packforcing_cli import weights

    weights.save(tmp_path / "transformer", network.config.to_dict(), after)
    loaded = registry.load_transformer(tmp_path / "transformer", device=CPU, dtype=torch.float32)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in before.items())


def test_weights_that_are_replaced_moved_or_adapted_are_the_ones_that_count() -> None:
    x = torch.randn(1, 5, 24, dtype=torch.float64)

    def q_of(one: Attention) -> Tensor:
        return one.own(x.to(one.to_q.weight.dtype))[0].double()

    with torch.no_grad():
        for change in ("replaced", "in place", "cast", "wrapped", "copied"):
            network = tiny.transformer(5)
            network.fuse_projections()
            one = projections(network)[0]
            old = q_of(one)
            if change == "replaced":
                one.to_q.weight = torch.nn.Parameter(one.to_q.weight * 2 + 1)
            elif change == "in place":
                one.to_q.weight.mul_(2).add_(1)
            elif change == "cast":
                network.half().double()
                one.to_q.weight.mul_(2).add_(1)
            elif change == "wrapped":
                inner = one.to_q

                class Wrapped(torch.nn.Module):
                    weight = inner.weight

                    def forward(self, y: Tensor) -> Tensor:
                        return inner(y) + y  # noqa: B023

                one.to_q = Wrapped()  # type: ignore[assignment]
            else:
                network = copy.deepcopy(network)
                one = projections(network)[0]
                one.to_q.weight.mul_(2).add_(1)
            assert relative_error(q_of(one), old) > 0.1, change
            q = one.to_q(x.to(one.to_q.weight.dtype))
            torch.testing.assert_close(
                q_of(one), one.norm_q(q).unflatten(2, (one.heads, -1)).double(), rtol=1e-6, atol=1e-6
            )


def test_gradients_flow_through_the_separate_projections() -> None:
    network = tiny.transformer(6)
    network.fuse_projections()
    one = projections(network)[0]
    one.requires_grad_(True)
    one.own(torch.randn(1, 5, 24, dtype=torch.float64))[0].sum().backward()
    assert one.to_q.weight.grad is not None
    assert one.to_q.weight.grad.abs().sum() > 0


def test_layers_that_are_copied_to_the_device_arrive_fused_with_the_same_numbers() -> None:
    model = fresh()
    stage = stage_of(model)
    there = passes(model, stage)
    model.transformer.stream_layers(CPU)
    assert model.transformer._seat is not None
    streamed = passes(model, stage)
    assert model.transformer._seat._layer.attn1.joined is not None
    assert all(torch.equal(a, b) for a, b in zip(there, streamed, strict=True))


@pytest.mark.parametrize("mode", ["int8", "int8-dynamic", "fp8-weight"])
def test_quantized_projections_give_the_same_together_or_apart(mode: str) -> None:
    one = registry.load_model("demo", device="cpu", dtype="bf16", quantize=mode).transformer.blocks[0].attn1
    assert isinstance(one, Attention)
    assert (one.joined is not None) == (mode == "fp8-weight")  # torchao joins no int8 matrices
    x = torch.randn(1, 32, one.to_q.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        for a, b in zip(one.own(x), (one.queries(x), *one.keys_values(x)), strict=True):
            torch.testing.assert_close(a, b)


def test_layers_that_are_skipped_stay_whole_and_the_plan_counts_them() -> None:
    skip = config.parse_layers("0, 2-3")
    model = registry.load_model("demo", device="cpu", dtype="bf16", quantize="int8", quantize_skip=skip)
    whole = [type(one.to_k.weight) is torch.nn.Parameter for one in projections(model.transformer)]
    assert [n for n, is_whole in enumerate(whole) if is_whole] == [0, 2, 3]
    request = config.PlanRequest(model="demo", dtype="bf16", quantize="int8", quantize_skip="0,2-3")
    assert request.quantize_skip == "0,2,3"
    planned = planner.plan(request).weights.transformer
    assert bench_kernels._weight_bytes(model) == pytest.approx(planned, rel=0.01)
    facts = sameness.must_be_same(model, config.GenerateRequest(prompt="a", seed=0))
    assert facts["quantization"] == "int8, not layer 0, not layer 2, not layer 3"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"quantize": "int8", "quantize_skip": "a"}, "must be numbers of layers"),
        ({"quantize": "int8", "quantize_skip": "5-2"}, "is an empty range"),
        ({"quantize": "int8", "quantize_skip": "-1"}, "must be numbers of layers"),
        ({"quantize_skip": "1"}, "nothing is quantized"),
        ({"quantize": "int8", "quantize_skip": "99"}, "demo has no layer 99"),
    ],
)
def test_layers_that_cannot_be_skipped_are_named(values: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        planner.plan(config.PlanRequest(model="demo", **values))
    with pytest.raises(UsageError, match="there is no layer 99"):
        registry.load_model("demo", device="cpu", quantize="int8", quantize_skip=(99,))


# -- attention kernels --------------------------------------------------------------------------------------------


def test_the_kernel_that_is_asked_for_runs_and_is_named() -> None:
    found = {
        name: attention.choose(name, device=CPU, dtype=torch.float32) for name in ("auto", "flash", "math")
    }
    assert {name: kernel.taken for name, kernel in found.items()} == {
        "auto": "flash (CPU)",
        "flash": "flash (CPU)",
        "math": "math",
    }
    assert attention.kind(attention.profiled(found["flash"], CPU)) == "PyTorch's CPU kernel"
    assert attention.kind(attention.profiled(found["math"], CPU)) == "plain matrix products"


@pytest.mark.parametrize("name", ["cudnn", "efficient", "fa3", "sage"])
def test_a_kernel_of_gpus_is_refused_on_a_cpu_with_those_that_can(name: str) -> None:
    with pytest.raises(EnvironmentProblem, match=f"--attention {name} needs an NVIDIA GPU") as caught:
        attention.choose(name, device=CPU, dtype=torch.float32)
    assert caught.value.hint == "What can run here: auto, flash, math."
    assert attention.runnable(device=CPU, dtype=torch.float32) == catalog.CPU_ATTENTIONS


def test_a_kernel_that_pytorch_refuses_is_refused_with_those_that_can() -> None:
    there: dict[str, Any] = {"device": CPU, "dtype": torch.float32, "heads": 2, "head_dim": 24}
    kernel = attention.Kernel("cudnn", backends=(attention.BACKENDS["cudnn"],))
    with pytest.raises(EnvironmentProblem, match="--attention cudnn cannot run here, on the CPU") as caught:
        attention._tried(kernel, **there)
    assert caught.value.hint == "What can: auto, flash, math."


@pytest.mark.parametrize("name", ["fa3", "sage"])
def test_a_kernel_of_a_library_is_refused_without_it_naming_the_command(name: str) -> None:
    with pytest.raises(EnvironmentProblem, match="which is not installed") as caught:
        attention._require_package(name, torch.device("cuda"))
    assert caught.value.hint.startswith("pip install ")


def test_names_of_kernels_are_those_of_the_option() -> None:
    assert ("auto", *attention.BACKENDS, *attention.PACKAGES) == config.ATTENTIONS
    with pytest.raises(UsageError, match="--attention fast: there is no such kernel"):
        attention.choose("fast", device=torch.device("meta"), dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"--attention flsh: must be one of .* did you mean flash"):
        config.GenerateRequest(prompt="a", attention="flsh")


def test_a_kernel_with_wrong_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = attention.Kernel.__call__

    def wrong(self: attention.Kernel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = real(self, q, k, v)
        return out.roll(1, 1) if self.asked == "flash" else out

    monkeypatch.setattr(attention.Kernel, "__call__", wrong)
    with pytest.raises(EnvironmentProblem, match="--attention flash gives wrong numbers here") as caught:
        attention.choose("flash", device=CPU, dtype=torch.float32)
    assert caught.value.hint == "What can: auto, math."


def test_hopper_prefers_cudnn_where_it_is_right_and_says_what_helps_where_it_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    assert attention.prefers_cudnn(gpu)
    assert attention._warning("cudnn", gpu) == ""
    assert "leave --attention away" in attention._warning("flash", gpu)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    assert not attention.prefers_cudnn(gpu)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/lib")
    said = attention._warning("flash", gpu)
    assert "about half as fast on a Hopper GPU" in said
    assert "cuDNN 9.15.1 or newer (here: 9.10.2, and no other cuDNN on LD_LIBRARY_PATH)" in said
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert not attention.prefers_cudnn(gpu)
    assert attention._warning("flash", gpu) == ""


def test_passes_take_the_chosen_kernel_for_self_and_cross_attention() -> None:
    model = fresh()
    stage = stage_of(model)
    context, noisy = stage.cache.context(STEADY), stage.noisy()

    def operators() -> set[str]:
        with torch.no_grad(), counting.moved_bytes() as moved:
            rollout.velocity(model, stage.text, context, noisy, 0.5)
        return set(moved.by_operator)

    plain = passes(model, stage)
    context = stage.cache.context(STEADY)
    assert "_scaled_dot_product_flash_attention_for_cpu" in operators()
    model.transformer.use_attention(attention.choose("math", device=CPU, dtype=torch.float32))
    assert "_scaled_dot_product_flash_attention_for_cpu" not in operators()
    for a, b in zip(passes(model, stage), plain, strict=True):
        assert relative_error(a, b) < 1e-5
    q = torch.randn(1, 2, 8, 16)
    with counting.moved_bytes() as moved:  # nothing is left switched off
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert "_scaled_dot_product_flash_attention_for_cpu" in moved.by_operator


def test_bench_measures_attention_with_the_models_own_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the memory's shares, and of a layer's cross-attention."""
    model = fresh()
    kernel = attention.choose("math", device=CPU, dtype=torch.float32)
    model.transformer.use_attention(kernel)
    ran: dict[str, set[str]] = {}

    def counted(calls: dict[str, Any], *_: Any, **__: Any) -> dict[str, bench.Times]:
        for name, call in calls.items():
            with counting.moved_bytes() as moved:
                call()
            ran[name] = set(moved.by_operator)
        return {name: bench.Times((1.0,)) for name in calls}

    monkeypatch.setattr(bench, "measure", counted)
    monkeypatch.setattr(bench, "kv_dtype_errors", lambda *_, **__: {})
    model = replace(model, attention=kernel)
    found = bench.cache(model, prompt(model), memory=MEMORY)
    bench_kernels._layer(model, 8, repeats=1, compiled=False)
    assert found["attention"] == "math"
    for name in ("attend", "eager"):
        assert "bmm" in ran[name]
        assert "_scaled_dot_product_flash_attention_for_cpu" not in ran[name]


# -- recorded passes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["affinity-recent", "affinity"])
def test_a_video_of_recorded_passes_is_the_same_video(select: str) -> None:
    """The prompt changes on the way; the memory fills up in the first blocks."""
    plain, model = fresh(torch.float64), fresh(torch.float64)
    model.transformer.record_passes(recorded.record)
    recordings = model.transformer._recordings
    assert recordings is not None
    script = Script(("a", "b"), starts=(0, 8), blends=(0, 2))
    one = prompt(plain)
    story = Story(script, (one, replace(one, text="b", conditional=one.conditional.flip(1))))
    options: dict[str, Any] = {
        "num_blocks": 12,
        "seed": 0,
        "schedule": Schedule.build("euler", steps=2, shift=5.0, guidance=2.0),
        "memory": MEMORY.model_copy(update={"select": select}),
    }
    blocks = list(rollout.stream_generate(plain, story, **options))
    counts = []
    for block, expected in zip(rollout.stream_generate(model, story, **options), blocks, strict=True):
        assert torch.equal(block.latents, expected.latents), block.index
        assert torch.equal(block.selected, expected.selected)
        counts.append(recordings.replays)
    new = [b - a for a, b in zip([0, *counts], counts)]
    # Until block 4 every block meets a length for the first time. Then the two denoising passes, the clean and the
    # compressed one are replayed; `affinity` chooses in the first of them, which stays eager.
    steady = 4 if select == "affinity-recent" else 3
    assert sum(new[:5]) <= 5 * 1  # the compressed pass sees the sinks alone, whose length stays
    assert new[6:] == [steady] * 6


def test_a_context_at_other_addresses_is_not_replayed() -> None:
    model = fresh()
    model.transformer.record_passes(recorded.record)
    recordings = model.transformer._recordings
    assert recordings is not None
    one = stage_of(model)
    other = stage_of(model)
    for _ in range(3):
        passes(model, one)
    assert recordings.replays == 2 * 3
    expected, replayed = passes(fresh(), other), passes(model, other)
    assert recordings.replays == 2 * 3
    assert all(torch.equal(a, b) for a, b in zip(expected, replayed, strict=True))
    context = one.cache.context(STEADY)
    one.cache.context(STEADY)
    with pytest.raises(ValueError, match="is closed"), torch.no_grad():
        rollout.velocity(model, one.text, context, one.noisy(), 0.5)


def test_cuda_graphs_are_refused_on_a_cpu_and_with_layers_that_come_and_go() -> None:
    with pytest.raises(EnvironmentProblem, match="needs an NVIDIA GPU"):
        graphs.require_graphs(CPU, offload="none")
    with pytest.raises(EnvironmentProblem, match="--offload all"):
        graphs.require_graphs(torch.device("cuda"), offload="all")


# -- compiled regions ---------------------------------------------------------------------------------------------


def test_without_a_compiler_it_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.shutil, "which", lambda *_: None)
    with pytest.raises(EnvironmentProblem, match="needs a C\\+\\+ compiler"):
        compiling.require_compiler(CPU)


@pytest.fixture
def compiler_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for compiled code, and counters at zero."""
    compiling.require_compiler(CPU)
    monkeypatch.setenv(compiling.CACHE_VARIABLE, str(tmp_path))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return tmp_path


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # torch's own, of its jit, when the compiler is imported
def test_compiled_layers_give_the_eager_numbers_without_breaks_or_recompiles(compiler_cache: Path) -> None:
    """Regions are compiled once for all layers, and for all lengths of the context."""
    model = tiny.video_model(torch.float32, num_layers=3)
    model.transformer.fuse_projections()

    def velocities() -> list[Tensor]:
        found = []
        for block in (0, 2, STEADY):
            torch.manual_seed(block)
            stage = stage_of(model, block=block)
            with torch.no_grad():
                context = stage.cache.context(block)
                found.append(rollout.velocity(model, stage.text, context, stage.noisy(), 0.7))
        return found

    eager = velocities()
    model.transformer.compile_layers()
    compiled = velocities()
    for a, b in zip(compiled, eager, strict=True):
        assert 0 < relative_error(a, b) < 2e-6
    once = compiling.compilations()
    assert (once.graphs, once.graph_breaks) == (2, 0)
    velocities()
    assert compiling.compilations() == once
    assert any(compiler_cache.rglob("*.so"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scaling_counts_and_times_a_model_that_is_compiled_and_recorded(
    compiler_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts are those of the plain model; timed are compiled passes that are all launched, none replayed."""
    plain, model = tiny.video_model(torch.float32), tiny.video_model(torch.float32)
    model.transformer.compile_layers()
    model.transformer.record_passes(recorded.record)
    recordings = model.transformer._recordings
    assert recordings is not None
    same: dict[str, Any] = {"blocks": (STEADY, STEADY + 2), "policies": ("packforcing",), "repeats": 3}
    drawn: list[int] = []
    noise = bench.block_noise
    monkeypatch.setattr(bench, "block_noise", lambda *values: drawn.append(1) or noise(*values))
    rows = bench.scaling(model, prompt(model), **same)
    assert len(drawn) == 2  # once a block, and not while a pass is timed
    assert compiling.compilations().graphs == 2
    assert recordings.replays == 0
    for row, expected in zip(rows, bench.scaling(plain, prompt(plain), **same), strict=True):
        assert row["pass_flops"] == expected["pass_flops"] > 0
        assert row["seconds"]["n"] == 3
    passes(model, stage_of(model))
    assert model.transformer._recordings is recordings  # the model is as it was


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_layers_attend_to_the_text_with_the_kernel_that_is_chosen(
    compiler_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where code of another kernel is there already, in memory or on disk."""
    model, plain = tiny.video_model(torch.float32), transformer.attention
    stage = stage_of(model, block=0)

    def in_one_layout(*given: Tensor) -> Tensor:  # by which code of two kernels could be told apart
        return plain(*given).contiguous()

    monkeypatch.setattr(transformer, "attention", in_one_layout)

    def fused(name: str) -> int:
        model.transformer.use_attention(attention.choose(name, device=CPU, dtype=torch.float32))
        given = (model, stage.text, stage.cache.context(0), stage.noisy(), 0.7)
        with torch.no_grad(), attention._native_talk_dropped():
            rollout.velocity(*given)
            with torch.profiler.profile() as profiler:
                rollout.velocity(*given)
        found = {event.key: event.count for event in profiler.key_averages()}
        return found.get("aten::_scaled_dot_product_flash_attention_for_cpu", 0)

    both = 2 * len(model.transformer.blocks)  # self-attention and that to the text
    model.transformer.compile_layers()
    assert [fused(name) for name in ("flash", "math", "flash")] == [both, 0, both]
    torch._dynamo.reset()  # as in another process: what is on disk is left
    assert fused("math") == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiler_that_fails_is_one_error_with_the_next_step(
    compiler_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(EnvironmentProblem, match="--compile: the compiler failed") as caught:
        compiling.compiled(breaks)(torch.ones(2))
    assert caught.value.hint.startswith("Leave --compile away")


def test_compiled_code_is_kept_in_the_users_cache_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(compiling.CACHE_VARIABLE, raising=False)
    assert compiling.cache_folder().parts[-2:] == ("packforcing", "compiled")
    monkeypatch.setenv(compiling.CACHE_VARIABLE, f"{tempfile.gettempdir()}/torchinductor_me")  # PyTorch's own
    assert compiling.cache_folder().parts[-2:] == ("packforcing", "compiled")
    monkeypatch.setenv(compiling.CACHE_VARIABLE, "/elsewhere")
    assert compiling.cache_folder() == Path("/elsewhere")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_results_depend_on_is_in_the_record_of_a_run() -> None:
    request = config.GenerateRequest(prompt="a", model="demo", seed=0, attention="math")
    model = registry.load_model("demo", device="cpu", attention="math")
    facts = sameness.must_be_same(model, request)
    assert (facts["attention"], facts["compile"]) == ("math", "none")
    facts = sameness.must_be_same(replace(model, compiled=True), request)
    assert facts["compile"] == "layers"
    assert "latents a VAE call" not in facts
    wan = replace(model, compiled=True, codec=WanCodec(wan_module(), latents_per_call=3, compiled=True))
    facts = sameness.must_be_same(wan, request)
    assert (facts["compile"], facts["latents a VAE call"]) == ("layers, VAE", 3)
    facts = sameness.must_be_same(replace(wan, codec=WanCodec(wan_module()), compiled=False), request)
    assert facts["compile"] == "none"
    assert "latents a VAE call" not in facts  # older runs do not say it and are equal


def test_on_a_gpu_a_run_says_which_cudnn_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attention on Hopper, and the VAE's convolutions, differ from version to version."""
    model = tiny.video_model()
    assert sameness.numerics(model)["cudnn"] is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    on_gpu = replace(model, device=torch.device("cuda", 0))
    assert sameness.numerics(on_gpu)["cudnn"] == 91501
    then = {name: value for name, value in sameness.numerics(model).items() if name != "cudnn"}
    assert runfolder.differences(then, sameness.numerics(model)) == []  # an older run's record


# -- precision ----------------------------------------------------------------------------------------------------


def test_rounding_to_fp8_keeps_three_bits_and_the_largest_number_of_a_row() -> None:
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 6)[:, None]
    rounded = quantize.fp8_rounded(x)
    top = x.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(rounded.gather(1, top), x.gather(1, top))
    normal = x.abs() > x.abs().amax(-1, keepdim=True) * 2**-6 / 448 * 2
    assert ((rounded - x).abs() <= x.abs() * 2**-4 * 1.001)[normal].all()
    assert not torch.equal(rounded, x)
    assert torch.equal(quantize.fp8_rounded(torch.zeros(2, 8)), torch.zeros(2, 8))


def test_simulated_fp8_rounds_inputs_and_weights_of_the_layers_alone() -> None:
    network, x = tiny.transformer(7, torch.float32), torch.randn(1, 5, 24)
    linear, head = network.blocks[0].attn1.to_q, network.proj_out.weight.clone()  # type: ignore[union-attr]
    assert isinstance(linear, torch.nn.Linear)
    weight = linear.weight.clone()
    quantize.simulate_fp8(network, "blocks.")
    expected = torch.nn.functional.linear(quantize.fp8_rounded(x), quantize.fp8_rounded(weight), linear.bias)
    assert torch.equal(linear(x), expected)
    assert torch.equal(network.proj_out.weight, head)
    assert not network.proj_out._forward_pre_hooks


def test_bench_tells_the_error_of_every_quantization_and_kernel(
    run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "load_average", lambda: 0.0)
    file = tmp_path / "f.json"
    shown = run_command("bench", "precision", "--json", str(file))
    assert shown.code == 0, shown.err
    assert "fp8 (simulated)" in shown.out
    found = json.loads(file.read_text())["precision"]
    errors = {row["mode"]: row["error"] for row in found["rows"]}
    assert set(errors) == set(config.QUANTIZATIONS)
    assert errors["none"] == 0
    assert 0 < errors["int8"] < errors["fp8"] < 0.1
    assert 0 < errors["fp8-weight"] < errors["fp8"]  # its activations are not rounded
    shown = run_command("bench", "kernels", "--repeats", "1", "--json", str(file))
    assert shown.code == 0, shown.err
    found = json.loads(file.read_text())
    assert found["conditions"]["attention"] == "PyTorch's CPU kernel"
    rows = {row["kernel"]: row for row in found["kernels"]["attention"]}
    assert list(rows) == ["auto", "flash", "math"]
    assert all(row["error"] < 1e-5 and row["flops_per_second"] > 0 for row in rows.values())


# -- against another's code ---------------------------------------------------------------------------------------

CHECKOUT = os.environ.get("PACKFORCING_SELF_FORCING")


@pytest.mark.skipif(CHECKOUT is None, reason="needs PACKFORCING_SELF_FORCING=a checkout of Self-Forcing")
def test_the_official_network_gives_our_numbers_at_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CHECKOUT is not None
    monkeypatch.delenv("PACKFORCING_SELF_FORCING")
    sizes = TransformerConfig(
        num_layers=2, num_attention_heads=2, attention_head_dim=64, ffn_dim=256, text_dim=64
    )
    shape = bench_peer.Shape(sizes, frames=2, rows=4, cols=5, past=70, text_tokens=32)
    found = bench_peer.self_forcing(Path(CHECKOUT), device=CPU, shape=shape, repeats=1)
    assert found["error"] < 0.01
    assert set(found["ratios"]) == {"theirs"}
    assert not [name for name in sys.modules if name.partition(".")[0] == "wan"]


def test_the_small_comparison_has_the_papers_proportions() -> None:
    full, small = bench_peer.FULL, bench_peer.SMALL
    assert (full.tokens, full.past + full.tokens) == (6_240, 27_872)
    assert (small.tokens, small.past + small.tokens) == (6_240 / 4, 27_872 / 4)
    assert small.config.attention_head_dim == full.config.attention_head_dim


def test_what_is_no_checkout_or_cannot_be_imported_is_refused(run_command: Any, tmp_path: Path) -> None:
    told = run_command("bench", "peer")
    assert (told.code, "git clone https://github.com/guandeh17/Self-Forcing" in told.err) == (2, True)
    told = run_command("bench", "peer", "--self-forcing", str(tmp_path))
    assert (told.code, "is no checkout of Self-Forcing" in told.err) == (2, True)
    (tmp_path / bench_peer.NETWORK).parent.mkdir(parents=True)
    (tmp_path / bench_peer.NETWORK).write_text("import a_library_that_is_not_there")
    told = run_command("bench", "peer", "--self-forcing", str(tmp_path), "--device", "cpu", "--force")
    assert (told.code, "cannot be imported: No module named" in told.err) == (4, True)
    assert not [name for name in sys.modules if name.partition(".")[0] == "wan"]


def test_another_network_is_no_comparison() -> None:
    out = torch.randn(4, 4)
    assert bench_peer._compare(out, out) == 0
    with pytest.raises(EnvironmentProblem, match="gives other numbers"):
        bench_peer._compare(out, out.flip(0))
    with pytest.raises(EnvironmentProblem, match="where ours gives"):
        bench_peer._compare(out, out[:2])


# -- on the command line ------------------------------------------------------------------------------------------


def test_generate_takes_the_kernel_records_it_and_repeats_it(run_command: Any, tmp_path: Path) -> None:
    words = ["a red circle", "--model", "demo", "--seconds", "1", "--steps", "4", "--seed", "1"]
    made = run_command(
        "generate", *words, "--attention", "math", "--json", "-v", "-o", str(tmp_path / "v.mp4")
    )
    assert made.code == 0, made.err
    assert "attention: math" in made.err
    said = json.loads(made.out)
    assert "--attention math" in said["command"]
    record = json.loads((runfolder.default_root() / said["run"] / "run.json").read_text())
    assert record["must"]["attention"] == "math"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--attention", "cudnn"], 4, "--attention cudnn needs an NVIDIA GPU"),
        (["--attention", "fast"], 2, "--attention fast: must be one of"),
        (["--cuda-graphs"], 4, "--cuda-graphs needs an NVIDIA GPU"),
    ],
)
def test_what_cannot_run_here_is_refused_in_the_plan(
    run_command: Any, words: list[str], code: int, said: str
) -> None:
    told = run_command("generate", "a fox", "--model", "demo", "--dry-run", "--device", "cpu", *words)
    assert (told.code, said in told.err) == (code, True), told.err


def test_a_run_is_expected_to_take_its_operations_at_half_the_machines_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = fresh()
    stage = stage_of(model)
    context = stage.cache.context(STEADY)
    guided = counting.flops_of(lambda: velocity_of(model, stage, context, stage.guided))
    with torch.no_grad():
        clean = counting.flops_of(lambda: model.transformer.commit(stage.noisy(), stage.text, context))
    monkeypatch.setattr(bench, "matmul_rate", lambda *_, **__: 2.0 * (2 * guided + clean))
    schedule = Schedule.build("euler", steps=2, shift=5.0, guidance=2.0)
    blocks = STEADY + 1
    assert bench.expected_seconds(model, stage.layout, schedule, blocks=blocks) == pytest.approx(blocks)


def velocity_of(model: registry.VideoModel, stage: bench.Stage, context: Any, text: TextKV) -> Tensor:
    with torch.no_grad():
        return rollout.velocity(model, text, context, stage.noisy(), 0.5)


def test_auto_goes_without_cudnn_where_its_numbers_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        attention, "usual", lambda _: attention.Kernel("auto", backends=tuple(attention.BACKENDS.values()))
    )
    found = attention.choose("auto", device=CPU, dtype=torch.float32)
    assert (found.taken, len(found.backends), found.warning) == ("flash (CPU)", 4, "")
    real = attention.Kernel.__call__

    def wrong(self: attention.Kernel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return real(self, q, k, v).roll(1 if self.backends else 0, 1)

    monkeypatch.setattr(attention.Kernel, "__call__", wrong)
    found = attention.choose("auto", device=CPU, dtype=torch.float32)
    assert (found.taken, found.backends) == ("flash (CPU)", ())
    assert "gives wrong numbers here" in found.warning
    assert "PyTorch's own choice is taken" in found.warning


def test_a_long_run_on_a_gpu_is_told_of_compile_and_never_switched() -> None:
    assert generate.compile_tip(30) == ""
    assert "--compile --cuda-graphs" in generate.compile_tip(1200)
    assert "20 minutes" in generate.compile_tip(1200)


# -- exact counts -------------------------------------------------------------------------------------------------


class _Waits(TorchDispatchMode):
    """Notes operators that read a number back, for which a GPU would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.startswith(
            ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "is_nonzero")
        ):
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_no_pass_reads_a_number_back() -> None:
    model = fresh()
    stage = stage_of(model)
    context, noisy = stage.cache.context(STEADY), stage.noisy()
    tokens = model.transformer.patch(noisy)[:, : stage.grid.compressed_tokens]
    with torch.no_grad(), _Waits() as waits:
        torch.ones(1).item()
        assert waits.seen == ["_local_scalar_dense.default"]  # it would be seen
        waits.seen.clear()
        rollout.velocity(model, stage.guided, context, noisy, 0.5)
        kv = model.transformer.commit(noisy, stage.text, context)
        small = model.transformer.commit_tokens(tokens, stage.text, stage.cache.compressed_context(STEADY))
        stage.cache.commit(STEADY, kv)
        stage.cache.add_backup(STEADY, small)
        stage.cache.context(STEADY + 1)
    assert waits.seen == []


@torch.no_grad()
def test_a_whole_block_runs_on_tensors_without_values() -> None:
    """On the meta device nothing can be read back: neither .item() nor .tolist(), nor a decision in Python."""
    model, meta, blocks = fresh(), torch.device("meta"), STEADY + 3
    grid = resolve.grid_for(model, model.manifest.size)
    layout = resolve.layout_for(model, MEMORY, grid, num_blocks=blocks)
    with meta:
        network = WanTransformer(model.transformer.config)
    network.fuse_projections()
    held = KVCache(layout, num_blocks=blocks, dtype=torch.float32, device=meta)
    guided = network.embed_text(torch.empty(2, model.text.length, model.text.width, device=meta))
    text = TextKV(tuple((k[:1], v[:1]) for k, v in guided.layers))
    noisy = torch.empty(resolve.latent_shape(model, layout), device=meta)
    times = torch.empty(1, grid.frames_per_block, dtype=torch.float64, device=meta)
    for block in range(blocks):
        context = held.context(block)
        assert network(noisy, times, guided, context).shape == (2, *noisy.shape[1:])
        held.commit(block, network.commit(noisy, text, context))
        if held.needs_backup(block):
            tokens = network.patch(noisy)[:, : grid.compressed_tokens]
            held.add_backup(block, network.commit_tokens(tokens, text, held.compressed_context(block)))


@torch.no_grad()
def test_operations_of_a_pass_are_constant_once_the_memory_is_full() -> None:
    model = fresh()
    stage = stage_of(model, block=STEADY - 4, more=16)
    counted = []
    for block in range(STEADY - 4, STEADY + 6):
        context, noisy = stage.cache.context(block), stage.noisy()
        counted.append(
            counting.flops_of(
                lambda context=context, noisy=noisy: rollout.velocity(  # type: ignore[misc]
                    model, stage.text, context, noisy, 0.5
                )
            )
        )
        bench.fill(stage.cache, block + 1)
    assert len(set(counted[4:])) == 1
    assert counted[0] < counted[4]
