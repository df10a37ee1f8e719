"""Causal consistency distillation of the demo: levels, targets, roles, the run and its package."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from packforcing_cli import packages
from packforcing_cli.errors import UsageError
from packforcing_cli.sampler import Schedule, euler_sigmas
from packforcing_cli.training import demo_distill, demo_flow, demo_package, demo_text, loop, recipes
from packforcing_cli.training.demo_distill import Trainer
from packforcing_cli.training.demo_flow import Alone, Batch, Models, Pool
from packforcing_cli.training.recipes import DemoDistill

torch.set_num_threads(1)

TINY = [
    "precision=fp32", "model.layers=2", "model.heads=2", "model.head_dim=12", "model.ffn_dim=48",
    "model.compressor_widths=[4,4,6,8]", "data.first_scenes=4", "data.short_scenes=2", "data.long_scenes=2",
    "data.long_blocks=12", "data.first_clips=2", "data.long_clips=1", "data.long_draws=1", "data.short_blocks=6",
    "train.steps=3", "train.warmup=1", "train.seed=5",
]  # fmt: skip


def recipe(*settings: str) -> DemoDistill:
    found = recipes.load("demo-distill", [*TINY, *settings])
    assert isinstance(found, DemoDistill)
    return found


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of a tiny, untrained demo."""
    folder = tmp_path_factory.mktemp("teacher")
    settings = recipe()
    codec = demo_flow.load_codec(settings)
    demo_text.build_demo_tokenizer(folder / "tokenizer")
    models = demo_flow.build(settings, folder / "tokenizer", codec.facts.latent_channels)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in models.modules().values():
            for p in module.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    demo_package.write(
        folder / "package", models, codec, folder / "tokenizer",
        schedule=demo_package.schedule(5.0), provenance={"recipe": "demo-flow"},
    )  # fmt: skip
    return folder / "package"


@pytest.fixture(scope="module")
def student(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    settings = recipe(f"init={teacher}")
    folder = tmp_path_factory.mktemp("tokenizer")
    demo_text.build_demo_tokenizer(folder)
    models = demo_flow.build(settings, folder, 16)
    demo_flow.start_from(settings, models.modules())
    return models


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pool]:
    settings = recipe()
    return demo_flow.build_pools(
        settings,
        tmp_path_factory.mktemp("pools"),
        demo_flow.load_codec(settings),
        loop.Workers(),
        lambda: False,
    )


def test_a_student_has_no_fresh_parts_and_nothing_is_fresh_beside_nothing() -> None:
    with pytest.raises(UsageError, match="a student begins as its teacher"):
        recipe('fresh=["compressor"]')
    with pytest.raises(UsageError, match="without init all parts start from nothing"):
        recipes.load("demo-flow", ['fresh=["compressor"]'])


def test_the_teacher_walks_its_own_levels_between_those_of_the_student() -> None:
    walks = demo_distill.levels(recipe())
    assert [walk[0] for walk in walks] == pytest.approx([1, 0.9375, 5 / 6, 0.625])
    assert [walk[-1] for walk in walks] == pytest.approx([0.9375, 5 / 6, 0.625, 0])
    visited = [*(sigma for walk in walks for sigma in walk[:-1]), 0.0]
    assert visited == pytest.approx(euler_sigmas(8, 5.0))  # together the schedule of the package


def test_roles_share_no_storage_but_the_text_encoder(student: Models) -> None:
    trainer = Trainer(recipe(), student)
    places = [
        {p.data_ptr() for name in demo_distill.ROLES for p in models.modules()[name].parameters()}
        for models in (trainer.student, trainer.target, trainer.teacher)
    ]
    assert not places[0] & places[1] and not places[0] & places[2] and not places[1] & places[2]
    for models in (trainer.target, trainer.teacher):
        assert models.text is trainer.student.text
        assert not any(p.requires_grad for n in demo_distill.ROLES for p in models.modules()[n].parameters())


class Line:
    """Clips whose velocity is a known function: v = a x, or b x for the empty prompt, by role."""

    def __init__(self, x0: Tensor, rates: dict[int, tuple[float, float]]) -> None:
        self.x0, self.rates = x0, rates
        self.calls: list[tuple[int, Tensor]] = []

    def velocity(self, models: Models, batch: Batch, x: Tensor, sigma: Tensor, dropped: Tensor) -> Tensor:
        self.calls.append((id(models), sigma))
        told, untold = self.rates[id(models)]
        return torch.where(dropped[..., None, None, None, None], untold, told) * x


def test_the_target_is_the_averaged_students_answer_at_the_end_of_the_teachers_walk(student: Models) -> None:
    """By hand: guided Euler steps x <- x + (r - s)(u + g (c - u)), then x0 = x - r v; the student is compared at s."""
    settings = recipe("guidance=3", "teacher_steps=2")
    trainer = Trainer(settings, student)
    x0 = torch.randn(1, 8, 1, 1, 1, 1, generator=torch.Generator().manual_seed(1)).double()
    rates = {id(trainer.student): (0.3, 0.0), id(trainer.target): (0.7, 0.0), id(trainer.teacher): (0.5, 0.2)}
    clips = Line(x0, rates)
    batch = Batch(torch.Generator().manual_seed(2), torch.device("cpu"))
    found = trainer.errors(batch, clips, 1)  # type: ignore[arg-type]

    again = torch.Generator().manual_seed(2)
    level = (torch.randperm(8, generator=again) + torch.randint(4, (), generator=again)) % 4
    assert sorted(level.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]  # drawn evenly
    eps = torch.randn(x0.shape, generator=again)
    rate = 0.2 + 3 * (0.5 - 0.2)  # the teacher's, guided
    for n in range(8):
        start, middle, end = demo_distill.levels(settings)[int(level[n])]
        x = (1 - start) * float(x0[0, n]) + start * float(eps[0, n])
        walked = x
        for here, there in ((start, middle), (middle, end)):
            walked += (there - here) * rate * walked
        target = walked - end * 0.7 * walked
        wanted = (0.3 * x - (x - target) / start) ** 2
        assert float(found[0, n]) == pytest.approx(wanted, rel=1e-5)


def test_a_step_trains_the_student_alone(student: Models, pools: dict[str, Pool]) -> None:
    settings = recipe("data.whole_probability=1")
    trainer = Trainer(settings, student)
    kept = {k: v.clone() for k, v in trainer.teacher.transformer.state_dict().items()}
    loss, parts = trainer.loss(pools, loop.step_generator(5, 0))
    loss.backward()
    assert {"first", "packed", "long"} <= parts.keys()
    for module in trainer.learning().values():
        assert sum(float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None) > 0
    assert all(p.grad is None for p in student.text.model.parameters())
    assert all(torch.equal(v, kept[k]) for k, v in trainer.teacher.transformer.state_dict().items())


def test_the_target_follows_the_average(student: Models) -> None:
    trainer = Trainer(recipe(), student)
    average = loop.MovingAverage(trainer.learning(), 0.5)
    with torch.no_grad():
        for p in trainer.student.transformer.parameters():
            p.add_(1.0)
    average.update(trainer.learning(), 1000)
    trainer.follow(average)
    name, value = next(iter(trainer.target.transformer.state_dict().items()))
    began = trainer.teacher.transformer.state_dict()[name]
    torch.testing.assert_close(value, began + 0.5)
    with torch.no_grad():
        for p in trainer.student.transformer.parameters():
            p.sub_(1.0)


def test_a_run_is_resumed_bit_for_bit_and_ends_in_a_student_that_runs(teacher: Path, tmp_path: Path) -> None:
    settings = recipe(f"init={teacher}", "train.checkpoint_minutes=1e-9")

    def losses(out: Path) -> list[float]:
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines if "loss" in line]

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "run", functools.partial(loop.run, log_every=1))
        done = demo_distill.train(settings, whole)
        logged: list[dict[str, Any]] = []

        def stop() -> bool:
            return sum("loss" in record for record in logged) == 2

        stopped = demo_distill.train(settings, broken, on_log=logged.append, should_stop=stop)
        assert stopped == {"steps": 2}
        demo_distill.train(settings, broken)
    assert losses(whole) == losses(broken) and len(losses(whole)) == 3
    manifest = packages.read_manifest(Path(done["result"]))
    assert (manifest.schedule.kind, manifest.schedule.timesteps) == ("renoise", (1000, 750, 500, 250))
    assert manifest.schedule.guidance == 1
    assert manifest.flow_schedule == packages.read_manifest(teacher).schedule
    assert Schedule.build("renoise", steps=manifest.schedule.timesteps, shift=5.0).passes == 4
    assert manifest.provenance["teacher"] == {"recipe": "demo-flow"}
    with pytest.raises(UsageError, match="demo-distill has no teacher") as caught:
        demo_distill.train(recipe(), tmp_path / "none")
    assert "--set init=" in (caught.value.hint or "") and not (tmp_path / "none").exists()
    with pytest.raises(UsageError, match="is a student of 4 steps itself"):
        demo_distill.train(recipe(f"init={done['result']}"), tmp_path / "again")


def test_first_blocks_are_clips_alone(student: Models, pools: dict[str, Pool]) -> None:
    clips = demo_flow.first_clips(
        Batch(torch.Generator().manual_seed(0), torch.device("cpu")), pools["first"], 3
    )
    assert isinstance(clips, Alone) and clips.x0.shape == (3, 1, 16, 4, 8, 16)


def test_going_on_with_another_teacher_is_refused_before_scenes_are_made(
    teacher: Path, tmp_path: Path
) -> None:
    settings = recipe(f"init={teacher}", "train.steps=1")
    demo_distill.train(settings, tmp_path / "run")
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    values = json.loads((other / "packforcing.json").read_text("utf-8"))
    name = next(name for name in values["files"] if name.startswith("compressor/"))
    values["files"][name]["sha256"] = "0" * 64
    (other / "packforcing.json").write_text(json.dumps(values), "utf-8")
    pools = sorted((tmp_path / "run/pool").iterdir())
    before = [path.stat().st_mtime_ns for path in pools]
    changed = recipe(f"init={other}", "train.steps=2", "guidance=1.5", "data.short_scenes=3")
    with pytest.raises(UsageError, match=r"guidance: 2\.0 then, 1\.5 now; teacher\.compressor: "):
        demo_distill.train(changed, tmp_path / "run")
    assert [path.stat().st_mtime_ns for path in pools] == before
