"""Distil the demo into a student of a few steps without guidance: causal consistency distillation.

A student predicts in one pass where the teacher's trajectory ends. For a noisy block x_s at one of the student's few
levels s, in the packed context of teacher forcing:

    teacher     x_s -> x_r   some Euler steps of the guided velocity, to the student's next level r (or to 0)
    target      x_r -> x0    one pass of the averaged student; at r = 0 it is x_r itself
    student     x_s -> x0    one pass: moved towards the target

So the last level learns the end of the teacher's trajectory, and every other one what the next one says. All three
read the same history, each through its own weights. The text encoder is the teacher's and stays as it is.
Source: docs/method.md 7.3; Causal Forcing (causal consistency distillation after teacher forcing).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from packforcing_cli.errors import UsageError
from packforcing_cli.packages import Manifest, Part, read_manifest
from packforcing_cli.registry import LAYERS, Schedule
from packforcing_cli.sampler import renoise_sigmas, shifted
from packforcing_cli.training import demo_flow, demo_package, demo_text, frozen, loop
from packforcing_cli.training.demo_flow import Alone, Batch, Models, Packed, Pool
from packforcing_cli.training.recipes import DemoDistill

PARTS: tuple[Part, ...] = ("transformer", "compressor", "text_encoder")
"""What makes a teacher."""
ROLES = ("transformer", "compressor")
"""What student, target and teacher have of their own."""


def levels(recipe: DemoDistill) -> list[tuple[float, ...]]:
    """For each of the student's steps the sigmas that the teacher walks, from its own to the next one's, or to 0."""
    steps = (*recipe.timesteps, 0)
    return [
        tuple(
            shifted((high + (low - high) * n / recipe.teacher_steps) / 1000, recipe.shift)
            for n in range(recipe.teacher_steps + 1)
        )
        for high, low in itertools.pairwise(steps)
    ]


def frozen_copy(models: Models) -> Models:
    """The same with a transformer and compressor of its own that do not learn; the text encoder is shared."""
    other = Models(
        copy.deepcopy(models.transformer), copy.deepcopy(models.compressor), models.text, models.grid
    )
    for name in ROLES:
        other.modules()[name].requires_grad_(False).eval()
    return other


class Trainer:
    """The three roles and the loss of a step.

    Attributes:
        student: learns.  target: its moving average, see `follow`.  teacher: as it began.
    """

    def __init__(self, recipe: DemoDistill, student: Models) -> None:
        student.text.model.requires_grad_(False).eval()
        self.recipe, self.student = recipe, student
        self.teacher, self.target = frozen_copy(student), frozen_copy(student)
        frozen.shrink(self.teacher.transformer, recipe.quantize_frozen, LAYERS)
        self.sigmas = torch.tensor(levels(recipe))  # [levels, teacher steps + 1]

    def learning(self) -> dict[str, nn.Module]:
        """The modules of a checkpoint."""
        return {name: self.student.modules()[name] for name in ROLES}

    def follow(self, average: loop.MovingAverage) -> None:
        """Give the target the averaged weights of the student."""
        for name in ROLES:
            self.target.modules()[name].load_state_dict(average.state_of(name))

    def loss(self, pools: dict[str, Pool], generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss of one step and its parts by kind of item; whole clips keep their flow-matching loss."""
        recipe = self.recipe
        batch = Batch(generator, next(self.student.transformer.parameters()).device)

        def errors(clips: Alone | Packed, draws: int) -> Tensor:
            return self.errors(batch, clips, draws)

        def flow(clips: Alone | Packed, draws: int) -> Tensor:
            return demo_flow.flow_errors(self.student, batch, clips, recipe, draws)

        with torch.autocast(batch.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            return demo_flow.mixed_loss(self.student, batch, pools, recipe.data, errors, whole=flow)

    def errors(self, batch: Batch, clips: Alone | Packed, draws: int) -> Tensor:
        """Squared differences of velocity [B,n*J,C,F,h,w] between student and target, at levels drawn evenly."""
        x0 = clips.x0.repeat(1, draws, 1, 1, 1, 1)
        B, D = x0.shape[:2]
        order = torch.randperm(B * D, generator=batch.generator).view(B, D)
        level = (order + int(torch.randint(len(self.sigmas), (), generator=batch.generator))) % len(
            self.sigmas
        )
        walk = self.sigmas[level].to(batch.device)  # [B,D,steps+1]
        sigma = walk[..., 0]
        x = _noised(x0, batch.randn(x0.shape), sigma)
        with torch.no_grad():
            end = self.walked(batch, clips, x, walk)
            known = torch.zeros(B, D, dtype=torch.bool)
            v = clips.velocity(self.target, batch, end, walk[..., -1], known)
            target = end - _wide(walk[..., -1]) * v  # at level 0 it is `end`
        v = clips.velocity(self.student, batch, x, sigma, known)
        return (v - (x - target) / _wide(sigma)).square()

    def walked(self, batch: Batch, clips: Alone | Packed, x: Tensor, walk: Tensor) -> Tensor:
        """x [B,D,C,F,h,w] after the teacher's guided Euler steps along the levels `walk` [B,D,steps+1]."""
        D = x.shape[1]
        empty = torch.cat((torch.zeros(len(x), D), torch.ones(len(x), D)), 1).bool()
        for here, there in zip(walk.unbind(-1), walk.unbind(-1)[1:], strict=False):
            both = clips.velocity(self.teacher, batch, x.repeat(1, 2, 1, 1, 1, 1), here.repeat(1, 2), empty)
            told, untold = both[:, :D], both[:, D:]
            x = x + _wide(there - here) * (untold + self.recipe.guidance * (told - untold))
        return x


def _wide(sigma: Tensor) -> Tensor:
    return sigma[..., None, None, None, None]


def _noised(x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    return (1 - _wide(sigma)) * x0 + _wide(sigma) * eps


def teacher_of(recipe: DemoDistill) -> Manifest:
    """Manifest of a recipe's teacher. Raises: UsageError if there is none, or if it is a few-step student itself."""
    give = "Give the package of a demo-flow or demo-stories run: --set init=runs/demo-stories/package"
    if not recipe.init:
        raise UsageError("demo-distill has no teacher", hint=give)
    folder = demo_flow.package_folder(recipe.init)
    own = read_manifest(folder)
    if own.schedule.kind != "euler":
        raise UsageError(
            f"the teacher {own.name} in {folder} is a student of {own.schedule.steps} steps itself", hint=give
        )
    return own


def train(
    recipe: DemoDistill,
    out: Path,
    *,
    accept: bool = False,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Run or resume the recipe in `out`; the result is the model package `out/package/`.

    Args:
        accept:      go on from checkpoints of another recipe or teacher, and say so in log and package.
        on_log:      told every line of the log.
        should_stop: asked after every step; True ends with a checkpoint.
    Returns: the figures; without "result" when it was stopped.
    Raises: UsageError without a teacher, and for one that is a few-step student itself.
    """
    settings = recipe.train
    if settings.threads:
        torch.set_num_threads(settings.threads)
    own = teacher_of(recipe)
    workers = loop.Workers.start()
    codec = demo_flow.load_codec(recipe)
    tokenizer_dir = out / f"tokenizer{workers.rank}"
    demo_text.build_demo_tokenizer(tokenizer_dir)
    student = demo_flow.build(recipe, tokenizer_dir, codec.facts.latent_channels)
    modules = {name: module.to(workers.device).train() for name, module in student.modules().items()}
    demo_flow.start_from(recipe, modules)
    trainer = Trainer(recipe, student)
    learning = trainer.learning()
    state = loop.TrainingState(
        learning,
        loop.MovingAverage(learning, settings.average),
        demo_flow.optimizers_of(learning, settings),
    )
    judges = {f"teacher.{part}": own.part_hash(part) for part in PARTS}
    facts = demo_flow.facts_of(recipe, codec, workers) | judges
    if recipe.quantize_frozen == "none":
        del facts["quantize_frozen"]
    loop.check_facts(out / "checkpoints", facts, accept=accept)

    def loss(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        trainer.follow(state.average)
        return trainer.loss(pools, generator)

    with loop.Log(out / f"metrics{workers.rank or ''}.jsonl", on_log) as log:
        log.write(event="pool")
        pools = demo_flow.build_pools(recipe, out, codec, workers, should_stop or (lambda: False))
        finished = loop.run(
            state,
            settings,
            loss,
            out=out,
            facts=facts,
            accept=accept,
            workers=workers,
            log=log,
            should_stop=should_stop,
        )
        figures: dict[str, Any] = {"steps": state.step}
        if finished and workers.rank == 0:
            figures |= write_result(recipe, state, student, out, tokenizer_dir)
            log.write(event="done", **figures)
    workers.stop()
    return figures


def write_result(
    recipe: DemoDistill, state: loop.TrainingState, student: Models, out: Path, tokenizer_dir: Path
) -> dict[str, Any]:
    """Write `out/package/`: the averaged student with its few-step schedule."""
    for name in ROLES:
        student.modules()[name].load_state_dict(state.average.state_of(name))
    steps = recipe.timesteps
    renoise_sigmas(steps, recipe.shift)  # refuses steps that do not fall
    teacher = read_manifest(demo_flow.package_folder(recipe.init))
    facts = {
        "recipe": recipe.kind,
        "steps": state.step,
        "weights": "averaged",
        "settings": recipe.model_dump(mode="json", exclude={"vae", "init"}),
        "data": "packforcing_cli.training.world, rendered; no other data",
        "teacher": teacher.provenance,
        **({"changed on the way": state.changes} if state.changes else {}),
    }
    codec = demo_flow.load_codec(recipe)
    schedule = Schedule(kind="renoise", steps=len(steps), shift=recipe.shift, guidance=1.0, timesteps=steps)
    demo_package.write(
        out / "package", student, codec, tokenizer_dir,
        schedule=schedule, flow_schedule=teacher.schedule, provenance=facts,
    )  # fmt: skip
    return {"result": str(out / "package")}
