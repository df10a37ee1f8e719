"""Train a few-step student on its own rollouts by distribution matching (the paper's second stage).

Three networks of one shape: the student learns, the frozen teacher says what real clips look like, the critic learns
what the student's clips look like. All start from the same weights and share no storage. An iteration:

    every      a rollout without graph -> the critic's flow-matching step
    one in N   a rollout with graph (one exit step for all blocks and processes) -> the student's DMD step, with its
               compressor

No data: prompts are all it takes, and rollouts go through the real cache. With a prefix, blocks without graph come
first, so that training meets as many mids, choices and slot shifts as inference does; the first graded block then only
serves as context for teacher and critic, which take the clip's first latent frame for a still picture.

Every draw is a function of (seed, iteration, number of the rollout), whichever process it falls to, so a resumed run
goes on as the unbroken one would and several processes follow the curve of one.
Source: PackForcing (arXiv 2603.25730) 4.1; Self-Forcing (model/dmd.py, pipeline/self_forcing_training.py).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from packforcing_cli import packages, registry, resolve, rope
from packforcing_cli.compressor import Compressor
from packforcing_cli.embeddings import UNCONDITIONAL, EmbeddingCache, encode
from packforcing_cli.errors import UsageError
from packforcing_cli.layout import Grid, Layout
from packforcing_cli.prompts import Prompt, Story
from packforcing_cli.registry import LAYERS, VideoModel, load_model, write_package
from packforcing_cli.registry import Schedule as ScheduleRecord
from packforcing_cli.sampler import NUM_TRAIN_TIMESTEPS, renoise_sigmas
from packforcing_cli.timeline import Script
from packforcing_cli.training import dmd, frozen, loop, shards, world
from packforcing_cli.training.recipes import SelfForcing
from packforcing_cli.training.samples import Sampler
from packforcing_cli.training.student_rollout import Student, rollout
from packforcing_cli.transformer import AloneContext, WanTransformer

M = TypeVar("M", bound=nn.Module)
BLOCKS_MASKED = 1  # blocks at the start of a clip with a prefix that get no gradient


@dataclass
class Roles:
    """The networks of a run.

    wholes: role -> what gathers its weights, where they are shared out among processes.
    Raises: ValueError if two of them share storage: what one learns would leak into the other.
    """

    student: Student
    teacher: WanTransformer
    critic: WanTransformer
    wholes: dict[str, shards.Whole] = field(default_factory=dict)

    def __post_init__(self) -> None:
        places: dict[int, str] = {}
        for name, network in (
            ("student", self.student.transformer),
            ("teacher", self.teacher),
            ("critic", self.critic),
        ):
            for parameter in network.parameters():
                for part in frozen.plain(parameter):
                    owner = places.setdefault(part.untyped_storage().data_ptr(), name)
                    if owner != name:
                        raise ValueError(f"{owner} and {name} share storage")

    @classmethod
    def of(cls, model: VideoModel, teacher: VideoModel | None = None, *, quantize: str = "none") -> Roles:
        """Student and critic from a model, the teacher from another or from the same; copies all.

        Args:
            quantize: of the teacher, which is frozen: "none", "int8" or "fp8".
        Raises: UsageError if the model has no trained compressor to learn, or the two differ in shape.
        """
        if model.compressor is None:
            raise UsageError(
                f"{model.name} has no compressor weights to train",
                hint="Use a package with a compressor, or train one: compressor-distill.",
            )
        source = teacher or model
        if source.transformer.config != model.transformer.config:
            raise UsageError(
                f"teacher {source.name} and student {model.name} differ in shape",
                hint="Both need the same transformer config.",
            )
        student = Student(
            _copy(model.transformer, learns=True), _copy(model.compressor, learns=True), model.codec
        )
        judge = _copy(source.transformer, learns=False)
        frozen.shrink(judge, quantize, LAYERS)
        return cls(student, judge, _copy(source.transformer, learns=True))

    def share_out(self, workers: loop.Workers, *, checkpointing: bool) -> None:
        """Share the weights of all networks out among the processes, on their devices.

        Args:
            checkpointing: run each layer again in the backward pass: a whole pass would gather all of its layers.
        """
        mesh = shards.mesh_of(workers.device, workers.count)
        self.wholes = {
            "student": shards.whole(mesh, self.student.transformer, self.student.compressor),
            "teacher": shards.whole(mesh, self.teacher),
            "critic": shards.whole(mesh, self.critic),
        }
        if checkpointing:
            self.student.transformer.recompute_layers()
            self.critic.recompute_layers()

    def gathering(self, role: str, call: Callable[[], Tensor]) -> Tensor:
        """What `call` returns while the weights of a role are there."""
        found: Tensor = self.wholes[role](call) if role in self.wholes else call()
        return found

    def learning(self) -> dict[str, nn.Module]:
        """The modules of a checkpoint."""
        return {
            "transformer": self.student.transformer,
            "compressor": self.student.compressor,
            "critic": self.critic,
        }


def _copy(module: M, *, learns: bool) -> M:
    copied = copy.deepcopy(module)
    copied.float().requires_grad_(learns)
    return copied


@dataclass(frozen=True)
class Draws:
    """What the rollouts of a step share, in all processes: everything but noise and prompts."""

    exit_step: int
    prefix: int
    layout: Layout


class Trainer:
    """One run: roles, optimisers, prompts."""

    def __init__(
        self,
        recipe: SelfForcing,
        roles: Roles,
        grid: Grid,
        embeds: Tensor,
        unconditional: Tensor,
        *,
        trained_frames: int,
        workers: loop.Workers,
    ) -> None:
        """
        Args:
            embeds:        [P,T,C] of the prompts.
            unconditional: [1,T,C] of the empty prompt, for the teacher's guidance.
        """
        self.recipe, self.roles, self.grid, self.workers = recipe, roles, grid, workers
        self._embeds, self._unconditional = embeds, unconditional
        self._trained_frames = trained_frames
        self.sigmas = renoise_sigmas(recipe.rollout.timesteps, recipe.shift)
        settings = recipe.train
        self.student_optimizer = torch.optim.AdamW(
            [
                {"params": [*roles.student.transformer.parameters()], "lr": settings.learning_rate},
                {"params": [*roles.student.compressor.parameters()], "lr": settings.compressor_learning_rate},
            ],
            betas=(0.0, 0.999),
            weight_decay=settings.weight_decay,
        )
        self.critic_optimizer = torch.optim.AdamW(
            roles.critic.parameters(),
            lr=settings.critic_learning_rate,
            betas=(0.0, 0.999),
            weight_decay=settings.weight_decay,
        )

    def iteration(self, number: int) -> dict[str, float]:
        """One iteration: the critic's step, and where it is due the student's.

        Returns: figures for the log, means over all processes; all of them must ask.
        """
        shared = loop.step_generator(self.recipe.train.seed, number)
        figures = {"critic": self._critic_step(shared, number)}
        if number % self.recipe.critic_updates == 0:
            figures |= self._student_step(shared, number)
        return {name: self.workers.mean(value) for name, value in figures.items()}

    def _mine(self, number: int, *, student: bool) -> list[torch.Generator]:
        """A generator for each rollout of a step that falls to this process."""
        return [
            loop.step_generator(self.recipe.train.seed, number, 1 + 2 * n + student)
            for n in range(self.workers.rank, self.recipe.batch, self.workers.count)
        ]

    def _critic_step(self, shared: torch.Generator, number: int) -> float:
        losses = []
        self.critic_optimizer.zero_grad(set_to_none=True)
        draws, mine = self._draws(shared), self._mine(number, student=False)
        for own in mine:
            chosen = self._prompt(own)
            with torch.no_grad():
                clip = self._clip(draws, chosen, own, graph=False).detach()
            sigma, noise = dmd.draw_sigma(own, shift=self.recipe.shift), self._noise(own, clip.shape)
            loss = dmd.critic_loss(clip, noise, sigma, self._predictor("critic", chosen))
            (loss / len(mine)).backward()
            losses.append(float(loss.detach()))
        self._step(self.critic_optimizer, self.roles.critic.parameters())
        return sum(losses) / len(losses)

    def _student_step(self, shared: torch.Generator, number: int) -> dict[str, float]:
        figures: list[dict[str, float]] = []
        updates = number // self.recipe.critic_updates
        through = "all" if updates >= self.recipe.train.compressor_alone else "compressor"
        self.student_optimizer.zero_grad(set_to_none=True)
        draws, mine = self._draws(shared), self._mine(number, student=True)
        for own in mine:
            chosen = self._prompt(own)
            clip = self._clip(draws, chosen, own, graph=True, through=through)
            loss, parts = dmd.student_loss(
                clip,
                self._noise(own, clip.shape),
                dmd.draw_sigma(own, shift=self.recipe.shift),
                teacher=self._predictor("teacher", chosen),
                teacher_unconditional=self._predictor("teacher", None),
                critic=self._predictor("critic", chosen),
                guidance=self.recipe.guidance,
                mask=self._mask(clip, draws),
            )
            (loss / len(mine)).backward()
            figures.append({"student": float(loss.detach()), "exit": draws.exit_step, **parts})
        parameters = [p for group in self.student_optimizer.param_groups for p in group["params"]]
        self._step(self.student_optimizer, parameters)
        return {name: sum(f[name] for f in figures) / len(figures) for name in figures[0]}

    def _step(self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        known = [*parameters]
        self.workers.average_gradients(known)
        loop.clip_gradients(known, self.recipe.train.clip)
        optimizer.step()

    def _draws(self, shared: torch.Generator) -> Draws:
        plan = self.recipe.rollout

        def pick(choices: int) -> int:
            return int(torch.randint(choices, (), generator=shared))

        exit_step, prefix = pick(len(self.sigmas)), pick(plan.max_prefix + 1)
        sinks = plan.sink_blocks[pick(len(plan.sink_blocks))]
        span = Fraction(plan.mid_spans[pick(len(plan.mid_spans))])
        layout = Layout(
            grid=self.grid,
            sink_blocks=sinks,
            recent_blocks=1,
            top_k=plan.top_k,
            bank=None,
            mid_span=span,
            trained_frames=self._trained_frames,
        )
        return Draws(exit_step, prefix, layout)

    def _prompt(self, own: torch.Generator) -> Tensor:
        index = int(torch.randint(len(self._embeds), (), generator=own))
        return self._embeds[index : index + 1]

    def _noise(self, own: torch.Generator, shape: torch.Size | tuple[int, ...]) -> Tensor:
        return torch.randn(tuple(shape), generator=own).to(self.workers.device)

    def _clip(
        self, draws: Draws, embeds: Tensor, own: torch.Generator, *, graph: bool, through: str = "none"
    ) -> Tensor:
        grid, network = self.grid, self.roles.student.transformer
        channels = network.config.in_channels
        shape = (1, channels, grid.frames_per_block, grid.latent_rows, grid.latent_cols)
        blocks = draws.prefix + self.recipe.rollout.blocks
        noise = [[self._noise(own, shape) for _ in self.sigmas] for _ in range(blocks)]

        def run() -> Tensor:
            return rollout(
                self.roles.student,
                network.embed_text(embeds),
                draws.layout,
                noise=noise,
                sigmas=self.sigmas,
                exit_step=draws.exit_step,
                graded=self.recipe.rollout.blocks,
                gradient=through if graph else "none",
                checkpointing=graph and self.recipe.train.checkpointing and not self.roles.wholes,
            ).latents

        return self.roles.gathering("student", run)

    def _predictor(self, role: str, embeds: Tensor | None) -> dmd.Predictor:
        """Teacher or critic over a whole clip at once, each latent frame seeing all others."""
        network = self.roles.teacher if role == "teacher" else self.roles.critic
        given, grid = self._unconditional if embeds is None else embeds, self.grid

        def predict(x_t: Tensor, sigma: float) -> Tensor:
            frames = x_t.shape[2]
            positions = rope.grid_positions(0.0, frames, grid.rows, grid.cols, device=x_t.device)
            timesteps = torch.full(
                (x_t.shape[0], frames), NUM_TRAIN_TIMESTEPS * sigma, dtype=torch.float64, device=x_t.device
            )

            def run() -> Tensor:
                velocity: Tensor = network(x_t, timesteps, network.embed_text(given), AloneContext(positions))
                return velocity

            return self.roles.gathering(role, run)

        return predict

    def _mask(self, clip: Tensor, draws: Draws) -> Tensor | None:
        if not draws.prefix:
            return None
        frames = torch.arange(clip.shape[2], device=clip.device)
        return (frames >= BLOCKS_MASKED * self.grid.frames_per_block).double().view(1, 1, -1, 1, 1)


def train(
    recipe: SelfForcing,
    out: Path,
    *,
    share: bool = False,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Run or resume the recipe in `out`; the result is the model package `out/package/`.

    Args:
        share:       share the weights out among the processes (FSDP2) instead of keeping all of them in each.
        on_log:      told every line of the log.
        should_stop: asked after every iteration; True ends with a checkpoint.
    Returns: the figures; without "result" when it was stopped.
    Raises: UsageError for models that do not fit each other; WeightsError if a loss is not finite.
    """
    settings = recipe.train
    if settings.threads:
        torch.set_num_threads(settings.threads)
    workers = loop.Workers.start()
    if recipe.batch % workers.count:
        raise UsageError(
            f"{recipe.batch} rollouts a step cannot be shared by {workers.count} processes",
            hint=f"Use a multiple of {workers.count}, for example --set batch={workers.count}.",
        )
    # Three copies are made of what is loaded; those that will be shared out need not fit on the device.
    place = torch.device("cpu") if share else workers.device
    small_text = "none" if recipe.quantize_frozen == "none" else "int8"
    model = load_model(
        _place(recipe.student), device=place, dtype="fp32", quantize_text=small_text, fuse=False
    )
    teacher = None if recipe.teacher == recipe.student else _other(recipe.teacher, place)
    roles = Roles.of(model, teacher, quantize=recipe.quantize_frozen)
    prompts = read_prompts(recipe.prompts)
    embeds, unconditional = (t.to(workers.device) for t in encode_prompts(model, prompts))
    if share:
        vae = packages.part_folder(model.folder, model.manifest, "vae")
        codec = registry.load_codec(vae, device=workers.device, dtype=torch.float32)
        roles.student.codec = codec
        model = replace(model, codec=codec, device=workers.device)  # its own weights stay where they are
        roles.share_out(workers, checkpointing=settings.checkpointing)
    trainer = Trainer(
        recipe,
        roles,
        resolve.grid_for(model, model.manifest.size),
        embeds,
        unconditional,
        trained_frames=model.manifest.trained_frames,
        workers=workers,
    )
    modules = roles.learning()
    state = loop.TrainingState(
        modules,
        loop.MovingAverage(_averaged(modules), settings.average),
        [trainer.student_optimizer, trainer.critic_optimizer],
    )
    free: dict[str, Any] = {"samples": True, "train": {"steps", "checkpoint_minutes", "threads"}}
    if recipe.quantize_frozen == "none":
        free["quantize_frozen"] = True
    facts = {
        "kind": recipe.kind,
        "recipe": recipe.model_dump_json(exclude=free),
        "student": model.hashes["transformer"],
        "teacher": (teacher or model).hashes["transformer"],
        "prompts": str(len(prompts)),
    }
    checkpoints, saved = out / "checkpoints", time.monotonic()
    loop.load_checkpoint(checkpoints, state, facts)
    log_path = out / f"metrics{workers.rank or ''}.jsonl"
    loop.forget_lost_steps(log_path, state.step)
    every = recipe.samples.every
    sampler = (
        Sampler(recipe.samples, stories(recipe, prompts, model), out / "samples")
        if every and workers.rank == 0
        else None
    )
    figures: dict[str, Any] = {}
    measured: dict[str, Any] = {}

    def student() -> VideoModel | None:
        """The averaged student in the first process; the others give what it gathers."""
        values = shards.gathered(state.average.values) if share else state.average.values
        return averaged_student(values, model, recipe) if workers.rank == 0 else None

    def sample(log: loop.Log) -> None:
        made = student()
        if sampler is not None and made is not None:
            measured["samples"] = sampler.make(state.step, made)
            log.write(event="samples", step=state.step, **measured)

    with loop.Log(log_path, on_log) as log:
        parameters = sum(p.numel() for module in modules.values() for p in module.parameters())
        log.write(event="start", step=state.step, parameters=parameters, workers=workers.count)
        if every and not state.step:
            sample(log)
        while state.step < settings.steps:
            parts = trainer.iteration(state.step)
            for value in parts.values():
                loop.require_finite(value, state.step, checkpoints)
            state.step += 1
            _average(state, settings.average_start)
            if state.step % loop.LOG_EVERY == 0 or "student" in parts:
                log.write(step=state.step, **{name: float(f"{value:.9g}") for name, value in parts.items()})
            if every and state.step % every == 0 and state.step < settings.steps:
                sample(log)
            stop = should_stop is not None and workers.any_wants(should_stop())
            minutes = settings.checkpoint_minutes
            if loop.save_if_due(workers, checkpoints, state, facts, saved, minutes, now=stop):
                saved = time.monotonic()
            if stop:
                break
        figures["steps"] = state.step
        if state.step >= settings.steps:
            loop.save_if_due(workers, checkpoints, state, facts, saved, settings.checkpoint_minutes, now=True)
            if every:
                sample(log)
            result = student()
            if result is not None:
                if sampler is not None:
                    pairs = sampler.pairs(state.step)
                    figures["pairs"] = [str(path) for path in pairs]
                    measured["before and after"] = [f"samples/{path.name}" for path in pairs]
                figures |= write_result(recipe, state.step, result, measured, out)
                log.write(event="done", **figures)
    workers.stop()
    return figures


def _averaged(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {name: modules[name] for name in ("transformer", "compressor")}


def _average(state: loop.TrainingState, start: int) -> None:
    """Follow the student until `start`, average from there."""
    averaged = _averaged(state.modules)
    if state.step > start:
        state.average.update(averaged, state.step)
        return
    for name, module in averaged.items():
        for key, value in module.state_dict().items():
            state.average.values[f"{name}/{key}"].copy_(value)


def _place(name: str) -> str:
    return "demo" if name == "package" else name


def _other(name: str, device: torch.device) -> VideoModel:
    return load_model(_place(name), device=device, dtype="fp32", fuse=False)


def read_prompts(source: str) -> list[str]:
    """Prompts of a text file, one a line, `#` begins a comment; "demo" = the captions of the demo world.

    Raises: UsageError if there is no such file, it is no text, or it has none.
    """
    if source == "demo":
        return list(world.training_captions())
    try:
        lines = Path(source).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"prompts {source} cannot be read: {error}", hint="Give a text file, a prompt a line."
        ) from error
    found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise UsageError(f"{source} has no prompts", hint="Write one a line.")
    return found


def encode_prompts(model: VideoModel, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """[P,T,C] of the prompts, equal ones once, and [1,T,C] of the empty one, in float32 on the model's device."""
    texts = [*dict.fromkeys(prompts), UNCONDITIONAL]
    found = encode(texts, model.text, model.load_text_encoder, cache=EmbeddingCache.of_user())
    embeds = [found[text].embeds.to(model.device, torch.float32) for text in texts]
    return torch.cat(embeds[:-1]), embeds[-1]


def averaged_student(values: Mapping[str, Tensor], model: VideoModel, recipe: SelfForcing) -> VideoModel:
    """The student with its averaged weights and its few-step schedule; all else is that of the model it began as.

    Args:
        values: the averaged weights, whole: "transformer/NAME" and "compressor/NAME"; not copied where they are on the
            model's device.
    """
    assert model.compressor is not None
    with torch.device("meta"):
        transformer = WanTransformer(model.transformer.config)
        compressor = Compressor(model.compressor.config)
    for name, module in (("transformer", transformer), ("compressor", compressor)):
        own = {k.removeprefix(f"{name}/"): v for k, v in values.items() if k.startswith(f"{name}/")}
        module.load_state_dict(own, assign=True)
        module.requires_grad_(False).to(model.device)
    steps = recipe.rollout.timesteps
    schedule = ScheduleRecord(
        kind="renoise", steps=len(steps), shift=recipe.shift, guidance=1.0, timesteps=steps
    )
    manifest = model.manifest.model_copy(update={"schedule": schedule})
    return replace(model, transformer=transformer, compressor=compressor, manifest=manifest)


def stories(recipe: SelfForcing, prompts: Sequence[str], model: VideoModel) -> list[Story]:
    """What samples are made of: the recipe's own prompts, or the first ones of the training."""
    chosen = list(dict.fromkeys(recipe.samples.prompts or prompts[: recipe.samples.count]))
    embeds, _ = encode_prompts(model, chosen)
    return [Story(Script((text,)), (Prompt(text, embeds[n : n + 1], None),)) for n, text in enumerate(chosen)]


def write_result(
    recipe: SelfForcing, iterations: int, student: VideoModel, metrics: Mapping[str, Any], out: Path
) -> dict[str, Any]:
    """Write `out/package/`: the averaged student, all else as in the model it began as."""
    provenance = {
        "recipe": recipe.kind,
        "iterations": iterations,
        "student": student.manifest.provenance,
        "settings": recipe.model_dump(mode="json"),
        "data": "none: the student's own rollouts; prompts only",
        **({"metrics": dict(metrics)} if metrics else {}),
    }
    write_package(
        out / "package",
        student.manifest.model_copy(update={"provenance": provenance}),
        transformer=student.transformer,
        compressor=student.compressor,
        base=student.folder,
        dtype=torch.float16 if student.name == "demo" else torch.bfloat16,
        overwrite=True,
    )
    return {"result": str(out / "package")}
