"""Models of true shape with random weights: nothing is downloaded, and they say what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from packforcing_cli import catalog, packages, planner, prompts, registry, resolve
from packforcing_cli.config import PlanRequest
from packforcing_cli.embeddings import EmbeddingCache
from packforcing_cli.errors import UsageError
from packforcing_cli.rope import grid_positions
from packforcing_cli.timeline import Script
from packforcing_cli.transformer import AloneContext
from packforcing_cli.vae import TinyAutoencoderConfig, WanCodec


def test_the_facts_are_those_of_the_model_without_its_weights() -> None:
    real, random = catalog.get("wan2.1-1.3b"), packages.facts("random:WAN2.1-1.3b")
    assert random.transformer_params == real.transformer_params
    assert (random.name, random.kind, random.is_random) == ("random:wan2.1-1.3b", "package", True)
    assert (random.text_params, random.parts, real.is_random) == (0, {}, False)
    two = packages.facts("random:wan2.1-1.3b?layers=2")
    assert (two.name, two.layers, two.dim) == ("random:wan2.1-1.3b?layers=2", 2, real.dim)
    four = packages.facts("random:wan2.1-1.3b?layers=2&frames-per-block=4")
    assert (four.frames_per_block, four.layers, four.span_for(4)) == (4, 2, real.span_for(4))
    for facts in catalog.all_models():
        assert packages.facts(f"random:{facts.name}").layers == facts.layers


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("random:wan2.1-1.3", "did you mean wan2.1-1.3b"),
        ("random:", "no model is named"),
        ("random:demo?layers=0", "stands layers=N"),
        ("random:wan2.1-1.3b?frames-per-block=5", "or frames-per-block=3 or 4"),
        ("random:demo?layers=2&", "stands layers=N"),
        ("random:demo?layers=1000", "stands layers=N"),
        ("random:demo?layers=two", "stands layers=N"),
        ("random:demo?depth=2", "stands layers=N"),
        ("random:demo?", "stands layers=N"),
        ("random:taew2_1", "is a VAE"),
    ],
)
def test_a_wrong_name_or_option_is_a_usage_error(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        packages.facts(name)
    with pytest.raises(UsageError, match=message):
        registry.open_model(name)


def test_a_plan_counts_no_text_encoder() -> None:
    made = planner.plan(PlanRequest(model="random:wan2.1-1.3b"), facts=packages.facts("random:wan2.1-1.3b"))
    assert made.weights.text_encoder == 0
    assert made.weights.transformer == 2 * catalog.get("wan2.1-1.3b").transformer_params


def test_one_denoising_pass_runs_at_the_full_width_of_the_1_3b_model(tmp_path: Path) -> None:
    """Two of its thirty layers, at 32x32 pixels and with the tiny VAE, so that a CPU can do it."""
    cache = EmbeddingCache(tmp_path / "cache")
    source = registry.open_model("random:wan2.1-1.3b?layers=2", device="cpu", vae="tiny")
    schedule = resolve.schedule_for(source)
    assert (schedule.kind, schedule.guidance) == ("renoise", 1.0)
    story = prompts.encode_script(source, Script(("a red circle",)), guided=False, cache=cache)
    assert not cache.folder.exists()
    embeds = story.prompts[0].conditional
    assert embeds.shape == (1, 512, 4096)
    assert bool((embeds[:, 4:] == 0).all()) and bool((embeds[:, :4] != 0).any(-1).all())
    model = source.load()
    config = model.transformer.config
    assert (config.num_layers, config.dim, config.ffn_dim) == (2, 1536, 8960)
    weight = model.transformer.blocks[1].ffn.net[0].proj.weight  # type: ignore[union-attr, index]
    assert weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert weight.mean().abs() < 1e-3
    assert model.codec.facts.latent_channels == TinyAutoencoderConfig().latent_channels
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 3, 4, 4, generator=generator)
    with torch.no_grad():
        text = model.transformer.embed_text(embeds)
        alone = AloneContext(grid_positions(0.0, 3, 2, 2))
        velocity = model.transformer(latents, torch.full((1, 3), 937.5), text, alone)
    assert velocity.shape == latents.shape
    assert bool(velocity.isfinite().all())
    assert velocity.std() > 0


def test_the_same_name_gives_the_same_weights_and_other_prompts_other_embeddings() -> None:
    first, again = (registry.load_model("random:demo?layers=1", device="cpu") for _ in range(2))
    a, b = first.transformer.state_dict(), again.transformer.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    encoder = first.load_text_encoder()
    assert torch.equal(encoder.encode("a b"), encoder.encode("a  b"))
    assert not torch.equal(encoder.encode("a b"), encoder.encode("a c"))


def test_random_weights_can_be_quantized() -> None:
    model = registry.load_model("random:demo?layers=1", device="cpu", quantize="int8")
    kinds = {type(value).__name__ for value in model.transformer.state_dict().values()}
    assert any(kind != "Tensor" for kind in kinds)
    assert model.quantize == "int8"


def test_generate_says_that_the_weights_are_random(run_command: Callable[..., Any], tmp_path: Path) -> None:
    done = run_command("generate", "a", "--model", "random:demo", "--seconds", "0.1", "-o", "v.mp4", "--json")
    assert done.code == 0, done.err
    assert "has random weights and random text embeddings, for bench and tests" in done.err
    assert "toy world" not in done.err
    found = json.loads(done.out)
    assert found["model"] == "random:demo"
    assert "--model random:demo" in found["command"]
    refused = run_command("models", "embed", "a", "-o", "e.safetensors", "--model", "random:demo")
    assert (refused.code, "has no text encoder" in refused.err) == (2, True)
    plan = run_command("inspect-cache", "--model", "random:wan2.1-14b?layers=3", "--json")
    assert json.loads(plan.out)["model"] == "random:wan2.1-14b?layers=3"


@pytest.mark.slow
def test_a_block_is_made_with_the_wan_vae_at_full_width(
    run_command: Callable[..., Any], tmp_path: Path
) -> None:
    """pytest -m slow tests/test_random_models.py: about a minute on one core, 2 GB."""
    model = registry.open_model("random:wan2.1-1.3b?layers=2", device="cpu").load()
    assert isinstance(model.codec, WanCodec)
    words = ("generate", "a", "--model", "random:wan2.1-1.3b?layers=2", "--size", "64x64", "--seconds", "0.5")
    assert run_command(*words, "-o", "v.mp4", "--device", "cpu").code == 0
