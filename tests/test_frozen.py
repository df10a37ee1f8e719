"""Frozen parts in 8 bits: what they take, the gradient through them, and the trainings that have them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from packforcing_cli import registry
from packforcing_cli.catalog import DEMO_FOLDER
from packforcing_cli.errors import UsageError
from packforcing_cli.training import (
    adapters,
    demo_distill,
    demo_flow,
    demo_text,
    estimate,
    frozen,
    recipes,
    self_forcing,
)
from packforcing_cli.training.recipe_kinds import FinetuneLora
from packforcing_cli.transformer import AloneContext, WanTransformer

torch.set_num_threads(1)
MODES = ("int8", "fp8")
SIZES: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 96, "num_layers": 3}


def network() -> WanTransformer:
    return tiny.transformer(1, torch.float32, **SIZES)


def velocity(model: WanTransformer, latents: Tensor) -> Tensor:
    positions = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in (4, 4, 4)))
    text = model.embed_text(tiny.embeds(1, torch.float32))
    out: Tensor = model(latents, torch.full((1, 4), 700.0), text, AloneContext(positions))
    return out


def latents() -> Tensor:
    return torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_is_that_of_the_widened_weights_and_no_wide_weight_is_kept(mode: str) -> None:
    small, wide = network(), network()
    frozen.shrink(small, mode, registry.LAYERS)
    with torch.no_grad():
        for name, child in small.named_modules():
            if isinstance(child, frozen.FrozenLinear):
                widened: Any = child.weight
                wide.get_submodule(name).weight.copy_(widened.dequantize())  # type: ignore[operator]
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    gradients = []
    for model in (small, wide):
        x = latents()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = velocity(model, x)
        gradients.append((out.detach(), torch.autograd.grad(out.square().sum(), x)[0]))
        matrices = {48 * 48, 48 * 96}
        assert bool(matrices & {*kept}) == (
            model is wide
        )  # a usual linear keeps its matrix, here a wide copy
        kept.clear()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5)
    exact = velocity(network(), latents()).detach()
    assert 0 < float((gradients[0][0] - exact).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_the_bytes_fall_as_planned_and_only_layers_change(mode: str, dtype: torch.dtype) -> None:
    model = network().to(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    whole = frozen.stored_bytes(model)
    assert whole == sum(p.numel() for p in model.parameters()) * dtype.itemsize
    planned = estimate.saved_bytes(model, mode, dtype)
    frozen.shrink(model, mode, registry.LAYERS)
    assert whole - frozen.stored_bytes(model) == planned > 0.3 * whole
    for name, parameter in model.named_parameters():
        if type(parameter.detach()) is Tensor:
            assert torch.equal(parameter, before[name])
    linears = [name for name, child in model.named_modules() if isinstance(child, frozen.FrozenLinear)]
    assert len(linears) == 3 * 10 and all(name.startswith("blocks.") for name in linears)


def test_what_is_trained_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    frozen.shrink(model, "int8", "")
    assert [type(child) for child in model] == [frozen.FrozenLinear, nn.Linear]
    frozen.shrink(model, "none", "")
    assert type(model[1]) is nn.Linear


@pytest.mark.parametrize("mode", MODES)
def test_adapters_learn_on_a_small_base_under_bfloat16_products(mode: str) -> None:
    pytest.importorskip("peft")
    recipe = recipes.load("finetune-lora", ["rank=2", f"quantize_frozen={mode}"])
    assert isinstance(recipe, FinetuneLora)
    model = network()
    adapters.insert(model, recipe)
    whole = frozen.stored_bytes(model)
    frozen.shrink(model, mode, registry.LAYERS)
    assert frozen.stored_bytes(model) < 0.6 * whole
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    assert learning and all(".lora_" in name for name in learning)
    with torch.autocast("cpu", torch.bfloat16):
        velocity(model, latents()).float().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name)
        assert "lora_B" not in name or bool((parameter.grad != 0).any())  # type: ignore[union-attr]


def test_a_small_teacher_judges_nearly_as_the_whole_one() -> None:
    model = registry.load_model(DEMO_FOLDER, device="cpu", dtype="fp32")
    roles = self_forcing.Roles.of(model, quantize="int8")
    assert frozen.stored_bytes(roles.teacher) < 0.4 * frozen.stored_bytes(roles.critic)
    with torch.no_grad():
        positions = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in (4, 4, 8)))
        x = torch.randn(1, 16, 4, 8, 16, generator=torch.Generator().manual_seed(0))
        text = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(1))
        outs = [
            net(x, torch.full((1, 4), 700.0), net.embed_text(text), AloneContext(positions))
            for net in (roles.teacher, model.transformer)
        ]
    assert 0 < float((outs[0] - outs[1]).norm() / outs[1].norm()) < 0.03


def test_the_estimate_counts_what_is_saved() -> None:
    cpu = torch.device("cpu")
    for name in ("self-forcing-demo", "demo-distill", "compressor-distill", "finetune-lora"):
        weights = [
            estimate.estimate(recipes.load(name, [f"quantize_frozen={mode}"]), cpu).memory.weights
            for mode in ("none", *MODES)
        ]
        assert weights[0] > weights[1] > 0 and weights[2] < weights[0]


def test_the_teacher_of_the_demos_student_is_small_and_the_target_is_not() -> None:
    recipe = recipes.load("demo-distill", ["quantize_frozen=int8"])
    assert isinstance(recipe, recipes.DemoDistill)
    with tempfile.TemporaryDirectory() as folder:
        demo_text.build_demo_tokenizer(Path(folder))
        models = demo_flow.build(recipe, Path(folder), 16)
    trainer = demo_distill.Trainer(recipe, models)
    sizes = [frozen.stored_bytes(m.transformer) for m in (trainer.teacher, trainer.target, models)]
    assert sizes[0] < 0.5 * sizes[1] and sizes[1] == sizes[2]


def test_recipes_without_a_frozen_part_refuse_it(run_command: Any, tmp_path: Path) -> None:
    for name in ("demo-vae", "demo-flow", "finetune"):
        result = run_command("train", name, "--quantize-frozen", "int8")
        assert result.code == 2
        assert "trains every weight, nothing is frozen" in result.err
    other = run_command("train", "compressor-distill", "--quantize-frozen", "int4")
    assert other.code == 2 and "Use one of none, int8, fp8." in other.err
    with pytest.raises(UsageError, match="every weight is trained, nothing is frozen"):
        recipes.load("finetune", ["quantize_frozen=fp8"])
    recipes.load("finetune", ["quantize_frozen=fp8", "train_transformer=false"])
    assert json.loads(run_command("recipes", "validate", "finetune", "--json").out)["trained"] > 0
