"""The self-forcing recipe on the demo, for a few iterations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from packforcing_cli import registry, resolve
from packforcing_cli.errors import UsageError
from packforcing_cli.training import loop, recipes, self_forcing

SMALL = [
    "rollout.timesteps=[1000, 500]",
    "rollout.blocks=4",
    "rollout.max_prefix=1",
    "rollout.sink_blocks=[1]",
    "critic_updates=2",
    "train.compressor_alone=1",
    "train.average_start=2",
    "train.learning_rate=1e-3",
    "samples.every=0",
]


def load(*settings: str) -> recipes.SelfForcing:
    recipe = recipes.load("self-forcing-demo", [*SMALL, *settings])
    assert isinstance(recipe, recipes.SelfForcing)
    return recipe


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(sorted((folder / "checkpoints").glob("*.safetensors"))[-1])


def test_a_resumed_run_equals_an_unbroken_one_and_its_package_generates(tmp_path: Path) -> None:
    self_forcing.train(load("train.steps=4"), tmp_path / "whole")
    broken = tmp_path / "broken"
    stops = iter([False, True])
    figures = self_forcing.train(load("train.steps=4"), broken, should_stop=lambda: next(stops))
    assert figures == {"steps": 2}
    result = self_forcing.train(load("train.steps=4"), broken)
    assert result["steps"] == 4
    once, again = tensors(tmp_path / "whole"), tensors(broken)
    assert once.keys() == again.keys()
    assert all(torch.equal(once[name], again[name]) for name in once)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "student" in line] == [1, 3]

    model = registry.load_model(result["result"])
    assert model.manifest.schedule.kind == "renoise"
    assert model.manifest.schedule.timesteps == (1000, 500)
    assert model.manifest.provenance["iterations"] == 4
    demo = registry.load_model("demo")
    assert not torch.equal(
        model.transformer.blocks[0].attn1.to_q.weight,  # type: ignore[union-attr, union-attr]
        demo.transformer.blocks[0].attn1.to_q.weight,  # type: ignore[union-attr, union-attr]
    )
    assert model.hashes["vae"] == demo.hashes["vae"]


def test_the_first_updates_move_the_transformer_too_but_its_mids_stop_at_the_compressor() -> None:
    """Without learning rates of the transformer nothing but compressor and critic changes."""
    model = registry.load_model("demo", dtype="fp32")
    roles = self_forcing.Roles.of(model)
    recipe = load("train.steps=1", "critic_updates=1")
    embeds, unconditional = self_forcing.encode_prompts(
        model, ["a red circle moving right on a blue background"]
    )
    trainer = self_forcing.Trainer(
        recipe,
        roles,
        resolve.grid_for(model, model.manifest.size),
        embeds,
        unconditional,
        trained_frames=model.manifest.trained_frames,
        workers=loop.Workers(),
    )
    before = {name: p.clone() for name, p in roles.teacher.named_parameters()}
    figures = trainer.iteration(0)
    assert set(figures) >= {"critic", "student", "exit"}
    for name, parameter in roles.teacher.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    moved = [not torch.equal(p, before[name]) for name, p in roles.student.transformer.named_parameters()]
    assert any(moved)


def test_roles_share_no_storage() -> None:
    model = registry.load_model("demo", dtype="fp32")
    roles = self_forcing.Roles.of(model)
    with pytest.raises(ValueError, match="share storage"):
        self_forcing.Roles(roles.student, roles.teacher, roles.teacher)
    with pytest.raises(ValueError, match="student and critic share storage"):
        self_forcing.Roles(roles.student, roles.teacher, roles.student.transformer)


def test_prompts_come_from_a_file_a_line_each(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# mine\na fox\n\n  two birds \n", encoding="utf-8")
    assert self_forcing.read_prompts(str(file)) == ["a fox", "two birds"]
    assert len(self_forcing.read_prompts("demo")) > 100
    file.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(UsageError, match="has no prompts"):
        self_forcing.read_prompts(str(file))
    with pytest.raises(UsageError, match="cannot be read"):
        self_forcing.read_prompts(str(tmp_path / "none.txt"))


def test_another_recipe_cannot_go_on_with_a_run(tmp_path: Path) -> None:
    self_forcing.train(load("train.steps=1"), tmp_path)
    with pytest.raises(UsageError, match="another recipe"):
        self_forcing.train(load("train.steps=2", "guidance=2.0"), tmp_path)
