"""The self-forcing recipe on the demo, for a few iterations."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from packforcing_cli import registry, resolve
from packforcing_cli.errors import UsageError, WeightsError
from packforcing_cli.training import estimate, loop, recipes, self_forcing
from packforcing_cli.training.items import Context

PROMPT = "a red circle moving right on a blue background"

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


@pytest.fixture(scope="module", autouse=True)
def few_prompts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The demo world has thousands of captions."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text(f"{PROMPT}\na blue square moving down on a green background\n", encoding="utf-8")
    SMALL.append(f"prompts={file}")
    yield
    SMALL.pop()


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


def trainer_of(recipe: recipes.SelfForcing, *prompts: str, **options: Any) -> self_forcing.Trainer:
    model = registry.load_model("demo", dtype="fp32", fuse=False)
    encoded, negative, _ = self_forcing.encode_prompts(model, prompts or (PROMPT,), recipe.negative_prompt)
    return self_forcing.Trainer(
        recipe,
        self_forcing.Roles.of(model),
        resolve.grid_for(model, model.manifest.size),
        encoded,
        negative,
        trained_frames=model.manifest.trained_frames,
        workers=loop.Workers(),
        **options,
    )


def test_an_iteration_moves_student_compressor_and_critic_and_never_the_teacher() -> None:
    trainer = trainer_of(load("train.steps=1", "critic_updates=1", "train.compressor_alone=0"))
    roles = trainer.roles
    before = copy.deepcopy((roles.teacher, roles.critic, roles.student.transformer, roles.student.compressor))
    figures = trainer.iteration(0)
    assert set(figures) == {"critic", "student", "exit", "gradient", "distance"}
    after = (roles.teacher, roles.critic, roles.student.transformer, roles.student.compressor)
    for network, old, moves in zip(after, before, (False, True, True, True), strict=True):
        known = dict(old.named_parameters())
        changed = [not torch.equal(p, known[name]) for name, p in network.named_parameters()]
        assert any(changed) is moves
        assert all(p.grad is None for p in network.parameters())


def gradients(through: str, *, again: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the student's transformer and compressor, of a clip whose last block sees a mid."""
    trainer = trainer_of(load("train.steps=1"))
    if again:
        trainer.roles.recompute_layers()
    draws = self_forcing.Draws(0, 0, trainer._draws(torch.Generator().manual_seed(0)).layout)
    clip = trainer._clip(draws, 0, torch.Generator().manual_seed(1), graph=True, through=through)
    last = clip[:, :, -trainer.grid.frames_per_block :]
    (last * torch.linspace(-1, 1, last.numel()).view_as(last)).sum().backward()
    return tuple(  # type: ignore[return-value]
        {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in part.named_parameters()}
        for part in (trainer.roles.student.transformer, trainer.roles.student.compressor)
    )


@pytest.mark.parametrize("again", [False, True])
def test_through_the_compressor_the_transformer_gets_no_gradient_of_its_mids(again: bool) -> None:
    """With the gradient through the mids stopped at the compressor, the transformer learns as if they stood still."""
    still, nothing = gradients("none", again=again)
    alone, reached = gradients("compressor", again=again)
    both, _ = gradients("all", again=again)
    assert not any(value.any() for value in nothing.values())
    assert all(value.any() for value in reached.values())

    def apart(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
        norm = sum(float(value.square().sum()) for value in one.values()) ** 0.5
        return sum(float((one[name] - two[name]).square().sum()) for name in one) ** 0.5 / norm

    assert apart(still, alone) < 2e-5
    assert apart(still, both) > 50 * apart(still, alone)


def test_a_prompt_that_gives_no_number_is_named_and_no_weight_changes(tmp_path: Path) -> None:
    trainer = trainer_of(load("train.steps=1"), PROMPT, checkpoints=tmp_path)
    before = copy.deepcopy(trainer.roles.critic)
    trainer._prompts.embeds[0].fill_(float("nan"))
    with pytest.raises(
        WeightsError, match=r"critic's loss became nan at step 0, on the prompt 'a red circle"
    ):
        trainer.iteration(0)
    assert all(
        torch.equal(p, q) for p, q in zip(trainer.roles.critic.parameters(), before.parameters(), strict=True)
    )


def test_a_gradient_that_is_no_number_stops_before_a_weight_changes(tmp_path: Path) -> None:
    trainer = trainer_of(load("train.steps=1"), PROMPT, checkpoints=tmp_path)
    before = copy.deepcopy(trainer.roles.critic)
    trainer.roles.critic.blocks[0].attn1.to_q.weight.register_hook(lambda g: g * float("inf"))  # type: ignore[union-attr, operator]
    with pytest.raises(
        WeightsError, match=r"the gradient became (nan|inf) at step 0, on the prompt 'a red"
    ) as error:
        trainer.iteration(0)
    assert str(tmp_path) in str(error.value.hint)
    assert all(
        torch.equal(p, q) for p, q in zip(trainer.roles.critic.parameters(), before.parameters(), strict=True)
    )


def test_the_average_follows_the_student_s_updates_alone() -> None:
    module, other = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1)
    modules = {"transformer": module, "compressor": other, "critic": other}
    average = loop.MovingAverage(self_forcing._averaged(modules), 0.75)
    state = loop.TrainingState(modules, average, [])
    values = []
    for step, value in ((1, 4.0), (6, 8.0), (11, 0.0)):
        torch.nn.init.constant_(module.weight, value)
        state.step = step
        self_forcing.follow(state, 5)
        values.append(float(average.values["transformer/weight"]))
    assert values == [4, 5, 3.75]


def test_after_a_prefix_the_clip_begins_with_the_picture_its_first_frame_ends_with() -> None:
    """What teacher and critic get is what the VAE makes of the video from there on, not a latent of four frames."""
    trainer = trainer_of(load("train.steps=1"))
    layout = trainer._draws(torch.Generator().manual_seed(0)).layout
    with torch.no_grad():
        clip = trainer._clip(
            self_forcing.Draws(1, 1, layout), 0, torch.Generator().manual_seed(1), graph=False
        )
        codec = trainer.roles.student.codec
        whole = []
        for prefix in (0, 1):
            trainer.recipe = load("train.steps=1", f"rollout.blocks={5 - prefix}")
            draws = self_forcing.Draws(1, prefix, layout)
            whole.append(trainer._clip(draws, 0, torch.Generator().manual_seed(1), graph=False))
        pixels = codec.decoder().decode(whole[0])
    assert torch.equal(clip, whole[1])
    torch.testing.assert_close(clip[:, :, 1:], whole[0][:, :, 5:])
    # Latent frame 4, the first of the second block, ends with picture 16.
    assert torch.allclose(clip[:, :, :1], codec.encoder().encode(pixels[:, :, 16:17]), atol=1e-4)
    assert not torch.allclose(clip[:, :, :1], whole[0][:, :, 4:5], atol=0.1)


def test_narrow_products_give_nearly_the_same_rollout() -> None:
    clips = []
    for products in (torch.float32, torch.bfloat16):
        trainer = trainer_of(load("train.steps=1"), products=products)
        layout = trainer._draws(torch.Generator().manual_seed(0)).layout
        assert layout.grid.dtype_bytes == products.itemsize
        clips.append(
            trainer._clip(self_forcing.Draws(0, 0, layout), 0, torch.Generator().manual_seed(1), graph=True)
        )
    wide, narrow = clips
    assert narrow.dtype == torch.float32
    assert not torch.equal(wide, narrow)
    assert float((wide - narrow).detach().abs().mean()) < 0.05 * float(wide.detach().abs().mean())
    narrow.sum().backward()
    grads = [p.grad for p in trainer.roles.student.transformer.parameters()]
    assert all(grad is not None and grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


def test_a_teacher_that_reads_other_prompts_or_latents_is_refused() -> None:
    manifest = registry.read_manifest(registry.DEMO_FOLDER)
    self_forcing.require_alike(manifest, manifest)
    files = dict(manifest.files)
    name = next(key for key in files if key.startswith("text_encoder/"))
    files[name] = files[name].model_copy(update={"sha256": "0" * 64})
    other = manifest.model_copy(update={"files": files, "name": "other", "size": (64, 64)})
    with pytest.raises(UsageError, match=r"teacher other .* differ in text_encoder, size, 128x64 and 64x64"):
        self_forcing.require_alike(manifest, other)


def test_roles_share_no_storage() -> None:
    model = registry.load_model("demo", dtype="fp32", fuse=False)
    roles = self_forcing.Roles.of(model)
    assert roles.student.transformer is model.transformer  # no fourth network stays in memory
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
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n", encoding="utf-8")
    same = f"prompts={prompts}"
    self_forcing.train(load("train.steps=1", same), tmp_path)
    with pytest.raises(UsageError, match=r"another recipe \(guidance: 1.0 then, 2.0 now\)"):
        self_forcing.train(load("train.steps=2", "guidance=2.0", same), tmp_path)
    prompts.write_text("a blue circle\n", encoding="utf-8")  # as many as before
    with pytest.raises(UsageError, match=r"another recipe \(prompts: "):
        self_forcing.train(load("train.steps=2", same), tmp_path)
    result = self_forcing.train(load("train.steps=2", same), tmp_path, accept=True)
    (changed,) = registry.read_manifest(Path(result["result"])).provenance["changed on the way"]
    assert (changed["step"], [*changed["facts"]]) == (1, ["prompts"])


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ('rollout.mid_spans=["wide"]', "'wide' is no number of slots"),
        ("rollout.timesteps=[500, 1000]", "timesteps fall"),
        ("rollout.sink_blocks=[0]", "at least 1 block is sink"),
    ],
)
def test_rollouts_that_cannot_be_are_refused(setting: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load("train.steps=1", setting)


def test_spans_that_share_the_trained_range_are_compared_with_those_of_training() -> None:
    """16 mids beside 2 sinks of 4 frames share 16 of 32 slots, one has 4 of them alone."""
    memory: dict[str, Any] = {"sink_blocks": 2, "recent_blocks": 1, "mid_span": "fit"}
    narrow = Context(4, {2: 16}, (Fraction(1),))
    assert narrow.slots == 32
    assert narrow.mismatches(**memory, top_k=16) == (
        "mids of 1 to 4 slots where 1 to 16 share 16: training has 1 a compressed block",
    )
    wide = Context(4, {2: 16}, (Fraction(1), Fraction(4)), 32)
    assert wide.mismatches(**memory, top_k=16) == ()
    assert wide.mismatches(**memory | {"mid_span": "2"}, top_k=16) == ("48 slots: training has at most 32",)


def test_wan_fits_one_gpu_by_the_estimate() -> None:
    """Counted at the true shape on the meta device, without the weights being there."""
    recipe = recipes.load("self-forcing")
    assert isinstance(recipe, recipes.SelfForcing)
    gpu, h200 = torch.device("cuda"), 141 * 10**9
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "free_memory", lambda device: (h200, "H200"))
        found = estimate.estimate(recipe, gpu)
        # Weights in float32 but for the teacher's in bfloat16, moments, average and the larger gradient.
        network, trained = 1_418_996_800, 2 * 1_418_996_800
        assert found.memory.weights == pytest.approx(4 * trained + 2 * network, rel=0.02)
        assert found.memory.training == pytest.approx(8 * trained + 8 * network, rel=0.02)
        assert 80e9 < found.memory.total < estimate.HEADROOM * h200
        assert not found.mismatches
        assert found.context is not None
        assert found.context.slots == 21
        train = recipe.train.model_copy(update={"checkpointing": False})
        kept = estimate.estimate(recipe.model_copy(update={"train": train}), gpu)
        assert kept.memory.activations > 10 * found.memory.activations


def test_samples_are_made_on_the_way_and_before_and_after(tmp_path: Path) -> None:
    samples = ["samples.every=1", "samples.count=1", "samples.seconds=1", "samples.seed=1"]
    result = self_forcing.train(load("train.steps=2", *samples), tmp_path)
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["0000000-0.mp4", "0000001-0.mp4", "0000002-0.mp4", "before-after-0.mp4"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["event"], line["step"]) for line in lines if "samples" in line] == [
        ("samples", 0),
        ("evaluate", 1),
        ("evaluate", 2),
    ]
    manifest = registry.read_manifest(Path(result["result"]))
    assert set(manifest.provenance["metrics"]) >= {"motion", "words"}
