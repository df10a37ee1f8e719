"""Train a few-step student on its own rollouts by distribution matching (the paper's second stage).

Three networks of one shape: the student learns, the frozen teacher says what real clips look like, the critic learns
what the student's clips look like. All start from the same weights and share no storage. An iteration:

    every      a rollout without graph -> the critic's flow-matching step
    one in N   a rollout with graph (one exit step for all blocks and processes) -> the student's DMD step, with its
               compressor

No data: prompts are all it takes, and rollouts go through the real cache. With a prefix, blocks without graph come
first. The longer it may be, the more often a graded block meets as many mids as inference has, and with a prefix of
more than about top_k blocks there are more to recall than are recalled, so that something is chosen. Teacher and critic
take a clip's first latent frame for a still picture: after a prefix they are given the encoding of the picture that
the first graded latent frame ends with in its place, and the first graded block only serves as context.

Every draw is a function of (seed, iteration, number of the rollout), whichever process it falls to, so a resumed run
goes on as the unbroken one would and several processes follow the curve of one.
Source: PackForcing (arXiv 2603.25730) 4.1; Self-Forcing (model/dmd.py, pipeline/self_forcing_training.py).
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from packforcing_cli import durable, packages, registry, resolve, rope, weights
from packforcing_cli.compressor import Compressor
from packforcing_cli.embeddings import UNCONDITIONAL, EmbeddingCache, encode
from packforcing_cli.errors import UsageError
from packforcing_cli.layout import Grid, Layout, Span
from packforcing_cli.packages import Manifest, Part
from packforcing_cli.prompts import Prompt, Story
from packforcing_cli.registry import LAYERS, ModelSource, VideoModel, write_package
from packforcing_cli.registry import Schedule as ScheduleRecord
from packforcing_cli.sampler import NUM_TRAIN_TIMESTEPS, renoise_sigmas
from packforcing_cli.timeline import Script
from packforcing_cli.training import dmd, estimate, frozen, loop, shards, world
from packforcing_cli.training.recipes import SelfForcing
from packforcing_cli.training.samples import Sampler
from packforcing_cli.training.student_rollout import Student, rollout
from packforcing_cli.transformer import AloneContext, WanTransformer

M = TypeVar("M", bound=nn.Module)
BLOCKS_MASKED = 1  # blocks at the start of a clip with a prefix that get no gradient
COMPRESSOR_SEED = 0x5EED
SAME_PARTS: tuple[Part, ...] = ("text_encoder", "tokenizer", "vae")
FREE = frozenset({"student", "teacher", "prompts", "samples"})
SHOWN = 80  # characters of a prompt in an error


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
    def of(
        cls,
        model: VideoModel,
        teacher: VideoModel | None = None,
        *,
        frozen_dtype: torch.dtype = torch.float32,
        quantize: str = "none",
    ) -> Roles:
        """Student and critic from a model, the teacher from another or from the same.

        The models' own networks are taken where they can be, so that there are three and no more.

        Args:
            frozen_dtype: of the teacher's weights; what learns is float32.
            quantize:     the teacher's linears: "none", "int8" or "fp8".
        Raises: UsageError if the two do not fit each other.
        """
        source = teacher or model
        if source.transformer.config != model.transformer.config:
            raise UsageError(
                f"teacher {source.name} and student {model.name} differ in shape",
                hint="Both need the same transformer config.",
            )
        critic = _copy(source.transformer).float().requires_grad_(True)
        judge = teacher.transformer if teacher is not None else _copy(model.transformer)
        frozen.shrink(judge.requires_grad_(False).to(frozen_dtype), quantize, LAYERS)
        learner = model.transformer.float().requires_grad_(True)
        student = Student(learner, _compressor_of(model).float().requires_grad_(True), model.codec)
        return cls(student, judge, critic)

    def recompute_layers(self) -> None:
        """Keep only the inputs of layers for the backward pass, which runs them again."""
        self.student.transformer.recompute_layers()
        self.critic.recompute_layers()

    def share_out(self, workers: loop.Workers) -> None:
        """Share the weights of all networks out among the processes, on their devices."""
        mesh = shards.mesh_of(workers.device, workers.count)
        self.wholes = {
            "student": shards.whole(mesh, self.student.transformer, self.student.compressor),
            "teacher": shards.whole(mesh, self.teacher),
            "critic": shards.whole(mesh, self.critic),
        }

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


def _copy(module: M) -> M:
    return copy.deepcopy(module)


def _compressor_of(model: VideoModel) -> Compressor:
    """The model's compressor; one that starts as its LR branch if it has no HR branch to train."""
    own = model.compressor
    if own is not None and own.hr is not None:
        return own
    config = estimate.compressor_config(model.manifest, model.transformer.config, model.folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(COMPRESSOR_SEED)
        return Compressor(replace(config, branches="hr+lr")).to(model.device)


def require_alike(student: Manifest, teacher: Manifest) -> None:
    """Refuse a teacher that would be given what it cannot read: the student's latents and prompts.

    Raises: UsageError if their VAEs, text encoders or picture sizes differ.
    """
    differing: list[str] = [part for part in SAME_PARTS if student.part_hash(part) != teacher.part_hash(part)]
    if student.size != teacher.size:
        differing.append(f"size, {_size(student)} and {_size(teacher)}")
    if student.text_length != teacher.text_length:
        differing.append(f"text length, {student.text_length} and {teacher.text_length}")
    if differing:
        raise UsageError(
            f"teacher {teacher.name} cannot judge {student.name}: they differ in {', '.join(differing)}",
            hint="The teacher is given the student's latents and prompts. Start the student from the teacher, or choose"
            " a teacher with the same VAE and text encoder.",
        )


def _size(manifest: Manifest) -> str:
    return f"{manifest.size[0]}x{manifest.size[1]}"


@dataclass(frozen=True)
class Prompts:
    """Encoded prompts, on the CPU, each without the zeros at its end.

    embeds: [n,C] of every text.  length: T, to which zeros are added when one is used.
    """

    texts: tuple[str, ...]
    embeds: tuple[Tensor, ...]
    length: int

    def row(self, index: int, device: torch.device) -> Tensor:
        """[1,T,C] float32 of a prompt."""
        used = self.embeds[index].to(device, torch.float32)
        whole = used.new_zeros(1, self.length, used.shape[1])
        whole[0, : len(used)] = used
        return whole


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
        prompts: Prompts,
        negative: Tensor,
        *,
        trained_frames: int,
        workers: loop.Workers,
        select: str = "affinity-recent",
        products: torch.dtype = torch.float32,
        checkpoints: Path = Path("checkpoints"),
    ) -> None:
        """
        Args:
            negative:    [1,T,C] of what the teacher's guidance leads away from.
            select:      how a block's mids are chosen, as in the cache of the result.
            products:    dtype of matrix products and of the cache.
            checkpoints: named where a loss is not finite.
        """
        self.recipe, self.roles, self.workers = recipe, roles, workers
        self.grid = replace(grid, dtype_bytes=products.itemsize)
        self._prompts, self._negative = prompts, negative
        self._trained_frames, self._select, self._checkpoints = trained_frames, select, checkpoints
        self._products = products
        self.sigmas = renoise_sigmas(recipe.rollout.timesteps, recipe.shift)
        settings = recipe.train
        # Without a fused kernel a step on a GPU has the updates of all weights in hand at once.
        fused = workers.device.type == "cuda"
        self.student_optimizer = torch.optim.AdamW(
            [
                {"params": [*roles.student.transformer.parameters()], "lr": settings.learning_rate},
                {"params": [*roles.student.compressor.parameters()], "lr": settings.compressor_learning_rate},
            ],
            betas=(0.0, 0.999),
            weight_decay=settings.weight_decay,
            fused=fused,
        )
        self.critic_optimizer = torch.optim.AdamW(
            roles.critic.parameters(),
            lr=settings.critic_learning_rate,
            betas=(0.0, 0.999),
            weight_decay=settings.weight_decay,
            fused=fused,
        )

    def iteration(self, number: int) -> dict[str, float]:
        """One iteration: the critic's step, and where it is due the student's.

        Returns: figures for the log, means over all processes; all of them must ask.
        Raises: WeightsError in all of them, before any weight changes, if a figure or gradient is not finite.
        """
        shared = loop.step_generator(self.recipe.train.seed, number)
        figures = self._critic_step(shared, number)
        if self.is_due(number):
            figures |= self._student_step(shared, number)
        return figures

    def is_due(self, number: int) -> bool:
        """Whether the student learns in this iteration."""
        return number % self.recipe.critic_updates == 0

    def _mine(self, number: int, *, student: bool) -> list[torch.Generator]:
        """A generator for each rollout of a step that falls to this process."""
        return [
            loop.step_generator(self.recipe.train.seed, number, 1 + 2 * n + student)
            for n in range(self.workers.rank, self.recipe.batch, self.workers.count)
        ]

    def _critic_step(self, shared: torch.Generator, number: int) -> dict[str, float]:
        figures: list[dict[str, float]] = []
        draws, mine, used = self._draws(shared), self._mine(number, student=False), []
        for own in mine:
            index = self._prompt(own)
            used.append(index)
            with torch.no_grad():
                clip = self._clip(draws, index, own, graph=False).detach()
            sigma, noise = dmd.draw_sigma(own, shift=self.recipe.shift), self._noise(own, clip.shape)
            loss = dmd.critic_loss(clip, noise, sigma, self._predictor("critic", index))
            (loss / len(mine)).backward()
            figures.append({"critic": float(loss.detach())})
        return self._step(number, self.critic_optimizer, figures, used)

    def _student_step(self, shared: torch.Generator, number: int) -> dict[str, float]:
        figures: list[dict[str, float]] = []
        updates = number // self.recipe.critic_updates
        through = "all" if updates >= self.recipe.train.compressor_alone else "compressor"
        draws, mine, used = self._draws(shared), self._mine(number, student=True), []
        for own in mine:
            index = self._prompt(own)
            used.append(index)
            clip = self._clip(draws, index, own, graph=True, through=through)
            loss, parts = dmd.student_loss(
                clip,
                self._noise(own, clip.shape),
                dmd.draw_sigma(own, shift=self.recipe.shift),
                teacher=self._predictor("teacher", index),
                teacher_unconditional=self._predictor("teacher", None),
                critic=self._predictor("critic", index),
                guidance=self.recipe.guidance,
                mask=self._mask(clip, draws),
            )
            (loss / len(mine)).backward()
            figures.append({"student": float(loss.detach()), "exit": draws.exit_step, **parts})
        return self._step(number, self.student_optimizer, figures, used)

    def _step(
        self,
        number: int,
        optimizer: torch.optim.Optimizer,
        figures: Sequence[Mapping[str, float]],
        used: Sequence[int],
    ) -> dict[str, float]:
        """Let an optimiser follow the mean gradient of all processes, and forget it; the means of their figures.

        Raises: WeightsError, naming the prompts of this process's rollouts, before a weight changes.
        """
        known = [p for group in optimizer.param_groups for p in group["params"]]
        names = list(figures[0])
        means = {name: self.workers.mean(sum(f[name] for f in figures) / len(figures)) for name in names}
        for name, value in means.items():
            if not math.isfinite(value):
                self._stop(value, number, name, self._blamed(figures, used))
        self.workers.average_gradients(known)
        norm = loop.clip_gradients(known, self.recipe.train.clip)
        if not math.isfinite(norm):
            self._stop(norm, number, "gradient", [self._prompts.texts[index] for index in used])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return means

    def _blamed(self, figures: Sequence[Mapping[str, float]], used: Sequence[int]) -> list[str]:
        """The prompts of the rollouts of this process that have a figure that is not finite."""
        return [
            self._prompts.texts[index]
            for values, index in zip(figures, used, strict=True)
            if not all(map(math.isfinite, values.values()))
        ]

    def _stop(self, value: float, number: int, what: str, blamed: Sequence[str]) -> None:
        here = "; ".join(repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}…") for text in blamed)
        said = "; ".join(filter(None, self.workers.gather(here)))
        names = {"critic": "critic's loss", "student": "student's loss", "distance": "teacher's distance"}
        cause = f"the prompt {said}" if said else ""
        loop.require_finite(value, number, self._checkpoints, what=names.get(what, what), cause=cause)

    def _draws(self, shared: torch.Generator) -> Draws:
        plan = self.recipe.rollout

        def pick(choices: int) -> int:
            return int(torch.randint(choices, (), generator=shared))

        exit_step, prefix = pick(len(self.sigmas)), pick(plan.max_prefix + 1)
        sinks = plan.sink_blocks[pick(len(plan.sink_blocks))]
        chosen = plan.mid_spans[pick(len(plan.mid_spans))]
        most = Fraction(self.grid.frames_per_block)
        span: Span = "fit" if chosen == "fit" else min(Fraction(chosen), most)
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

    def _prompt(self, own: torch.Generator) -> int:
        return int(torch.randint(len(self._prompts.texts), (), generator=own))

    def _noise(self, own: torch.Generator, shape: torch.Size | tuple[int, ...]) -> Tensor:
        return torch.randn(tuple(shape), generator=own).to(self.workers.device)

    def _clip(
        self, draws: Draws, index: int, own: torch.Generator, *, graph: bool, through: str = "none"
    ) -> Tensor:
        """A rollout as teacher and critic are given it, [B,C,F,h,w]."""
        grid, network = self.grid, self.roles.student.transformer
        channels = network.config.in_channels
        shape = (1, channels, grid.frames_per_block, grid.latent_rows, grid.latent_cols)
        blocks = draws.prefix + self.recipe.rollout.blocks
        noise = [[self._noise(own, shape) for _ in self.sigmas] for _ in range(blocks)]
        embeds = self._prompts.row(index, self.workers.device)
        starts: list[Tensor] = []

        def run() -> Tensor:
            with self._narrow():
                text = network.embed_text(embeds)
            made = rollout(
                self.roles.student,
                text,
                draws.layout,
                noise=noise,
                sigmas=self.sigmas,
                exit_step=draws.exit_step,
                graded=self.recipe.rollout.blocks,
                select=self._select,
                gradient=through if graph else "none",
                products=self._products,
            )
            starts.extend(() if made.start is None else (made.start,))
            return made.latents

        latents = self.roles.gathering("student", run)
        return torch.cat((*starts, latents[:, :, len(starts) :]), 2)

    def _narrow(self) -> torch.autocast:
        narrow = self._products != torch.float32
        return torch.autocast(self.workers.device.type, self._products if narrow else None, enabled=narrow)

    def _predictor(self, role: str, index: int | None) -> dmd.Predictor:
        """Teacher or critic over a whole clip at once, each latent frame seeing all others.

        Args:
            index: of the prompt; None = the negative one.
        """
        network = self.roles.teacher if role == "teacher" else self.roles.critic
        device, grid = self.workers.device, self.grid
        given = self._negative if index is None else self._prompts.row(index, device)

        def predict(x_t: Tensor, sigma: float) -> Tensor:
            frames = x_t.shape[2]
            positions = rope.grid_positions(0.0, frames, grid.rows, grid.cols, device=x_t.device)
            timesteps = torch.full(
                (x_t.shape[0], frames), NUM_TRAIN_TIMESTEPS * sigma, dtype=torch.float64, device=x_t.device
            )

            def run() -> Tensor:
                with self._narrow():
                    velocity: Tensor = network(
                        x_t, timesteps, network.embed_text(given), AloneContext(positions)
                    )
                return velocity.to(x_t.dtype)

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
    accept: bool = False,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Run or resume the recipe in `out`; the result is the model package `out/package/`.

    Args:
        share:       share the weights out among the processes (FSDP2) instead of keeping all of them in each.
        accept:      go on from checkpoints of another recipe, and say so in log and package.
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
    texts = read_prompts(recipe.prompts)
    products = estimate.precision(recipe, workers.device)
    small_text = "none" if recipe.quantize_frozen == "none" else "int8"
    source = registry.open_model(
        _place(recipe.student), device=workers.device, dtype=products, quantize_text=small_text, fuse=False
    )
    judge = None
    if recipe.teacher != recipe.student:
        judge = registry.open_model(_place(recipe.teacher), device=workers.device, dtype=products)
    if source.manifest.cache.compressed_context != "sinks":
        raise UsageError(
            f"{source.name} compresses blocks in the context {source.manifest.cache.compressed_context!r}:"
            " self-forcing is made for 'sinks'",
            hint="Choose another student.",
        )
    if judge is not None:
        require_alike(source.manifest, judge.manifest)
    facts = facts_of(recipe, texts, source.manifest, (judge or source).manifest)
    checkpoints = out / "checkpoints"
    loop.check_facts(checkpoints, facts, accept=accept)
    shown = sample_prompts(recipe, texts)
    # Before the networks: the text encoder may be larger than all of them, and is gone when this returns.
    prompts, negative, stories = encode_prompts(source, texts, recipe.negative_prompt, shown)
    # Networks that will be shared out need not fit on the device.
    place = torch.device("cpu") if share else workers.device
    model = registry.load_model(_place(recipe.student), device=place, dtype="fp32", fuse=False)
    teacher = None
    if judge is not None:
        teacher = registry.load_model(_place(recipe.teacher), device=place, dtype="fp32", fuse=False)
    roles = Roles.of(model, teacher, frozen_dtype=products, quantize=recipe.quantize_frozen)
    roles.student.codec.to(workers.device, products)
    if settings.checkpointing:
        roles.recompute_layers()
    if share:
        roles.share_out(workers)
    trainer = Trainer(
        recipe,
        roles,
        resolve.grid_for(model, model.manifest.size),
        prompts,
        negative.to(workers.device),
        trained_frames=model.manifest.trained_frames,
        workers=workers,
        select=model.manifest.cache.select,
        products=products,
        checkpoints=checkpoints,
    )
    modules = roles.learning()
    state = loop.TrainingState(
        modules,
        loop.MovingAverage(_averaged(modules), settings.average),
        [trainer.student_optimizer, trainer.critic_optimizer],
    )
    saved = time.monotonic()
    loop.load_checkpoint(checkpoints, state, facts, accept=accept)
    log_path = out / f"metrics{workers.rank or ''}.jsonl"
    maker = _Maker(recipe, source, roles, model, stories, out / "samples")
    figures: dict[str, Any] = {}
    measured: dict[str, float] = {}
    with loop.Log(log_path, on_log) as log:

        def sample() -> None:
            values = shards.gathered(state.average.values) if share else state.average.values
            if workers.rank:
                return
            measured.clear()
            measured.update(maker.make(state.step, values))
            log.write(event="samples" if not state.step else "evaluate", step=state.step, samples=measured)

        parameters = sum(p.numel() for module in modules.values() for p in module.parameters())
        log.go_back(state.step)
        if state.changed:
            log.write(event="changed", step=state.step, facts=state.changed)
        log.write(event="start", step=state.step, parameters=parameters, workers=workers.count)
        every = recipe.samples.every
        if every and not state.step:
            sample()
        while state.step < settings.steps:
            parts = trainer.iteration(state.step)
            is_due = trainer.is_due(state.step)
            state.step += 1
            if is_due:
                follow(state, settings.average_start)
            if state.step % loop.LOG_EVERY == 0 or is_due:
                log.write(step=state.step, **{name: float(f"{value:.9g}") for name, value in parts.items()})
            if every and (state.step % every == 0 or state.step == settings.steps):
                sample()
                if workers.rank == 0:
                    draw_curve(log_path, out / "curve.png")
            stop = should_stop is not None and workers.any_wants(should_stop())
            minutes = settings.checkpoint_minutes
            if loop.save_if_due(workers, checkpoints, state, facts, saved, minutes, now=stop):
                saved = time.monotonic()
            if stop:
                break
        figures["steps"] = state.step
        if state.step >= settings.steps:
            loop.save_if_due(workers, checkpoints, state, facts, saved, settings.checkpoint_minutes, now=True)
            values = shards.gathered(state.average.values) if share else state.average.values
            if workers.rank == 0:
                if every:
                    figures["pairs"] = [str(path) for path in maker.pairs(state.step)]
                figures |= write_result(
                    recipe, state.step, values, roles, model, out, metrics=measured, changes=state.changes
                )
                draw_curve(log_path, out / "curve.png")
                log.write(event="done", **figures)
    workers.stop()
    return figures


def facts_of(
    recipe: SelfForcing, texts: Sequence[str], student: Manifest, teacher: Manifest
) -> dict[str, Any]:
    """What a checkpoint can only be continued with: all that the sequence of losses depends on."""
    free: dict[str, Any] = dict.fromkeys(FREE, True)
    facts = loop.facts_of(recipe.model_dump(mode="json", exclude=free | {"train": {"checkpointing"}}))
    facts["prompts"] = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    facts |= {f"student.{part}": student.part_hash(part) for part in (*student.parts, *student.references)}
    facts["teacher.transformer"] = teacher.part_hash("transformer")
    return facts


def _averaged(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {name: modules[name] for name in ("transformer", "compressor")}


@torch.no_grad()
def follow(state: loop.TrainingState, start: int) -> None:
    """Let the average follow an update of the student: equal to it until `start` iterations, a mean from there."""
    rate = 1.0 if state.step <= start else 1 - state.average.decay
    for name, module in _averaged(state.modules).items():
        for key, value in module.state_dict().items():
            average = shards.own_part(state.average.values[f"{name}/{key}"])
            average.lerp_(shards.own_part(value.detach()), rate)


def _place(name: str) -> str:
    return "demo" if name == "package" else name


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


def sample_prompts(recipe: SelfForcing, texts: Sequence[str]) -> list[str]:
    """Of which prompts sample videos are made: those of the recipe, or some of all, spread evenly."""
    if not recipe.samples.every:
        return []
    if recipe.samples.prompts:
        return list(recipe.samples.prompts)
    distinct = list(dict.fromkeys(texts))
    count = min(recipe.samples.count, len(distinct))
    return [distinct[n * len(distinct) // count] for n in range(count)]


def encode_prompts(
    model: VideoModel | ModelSource, texts: Sequence[str], negative: str = "", shown: Sequence[str] = ()
) -> tuple[Prompts, Tensor, list[Story]]:
    """The prompts, equal ones once; [1,T,C] float32 of the negative one; those of the sample videos. On the CPU."""
    distinct = list(dict.fromkeys(texts))
    wanted = [*distinct, negative or UNCONDITIONAL, *shown]
    found = encode(wanted, model.text, model.load_text_encoder, cache=EmbeddingCache.of_user())
    trimmed = []
    for text in distinct:
        embeds = found[text].embeds[0]
        used = embeds.ne(0).any(-1).nonzero()
        trimmed.append(embeds[: int(used.max()) + 1 if len(used) else 0].clone())
    stories = [Story(Script((text,)), (Prompt(text, found[text].embeds),)) for text in shown]
    prompts = Prompts(tuple(distinct), tuple(trimmed), model.text.length)
    return prompts, found[negative or UNCONDITIONAL].embeds.float(), stories


# -- the result ---------------------------------------------------------------------------------------------------


def result_manifest(recipe: SelfForcing, model: VideoModel) -> Manifest:
    """The manifest of the result, but for its figures."""
    base, plan = model.manifest, recipe.rollout
    context = estimate.student_context(recipe, base)
    schedule = ScheduleRecord(
        kind="renoise",
        steps=len(plan.timesteps),
        shift=recipe.shift,
        guidance=1.0,
        timesteps=plan.timesteps,
    )
    provenance = {
        "recipe": recipe.kind,
        "settings": recipe.model_dump(mode="json", exclude={"prompts"}),
        "context": str(context),
        "data": "none: the student's own rollouts; prompts only",
        "from": {"model": base.name, "version": base.version, "provenance": base.provenance},
    }
    return base.model_copy(
        update={
            "schedule": schedule,
            "name": f"{base.name}-student",
            "title": f"{base.title} - student trained on its own rollouts",
            "base_model": base.base_model or base.name,
            "cache": base.cache.model_copy(update={"compressor": "hr+lr"}),
            "trained_frames": context.slots,
            "provenance": provenance,
        }
    )


def networks_of(
    values: Mapping[str, Tensor], roles: Roles, *, device: torch.device, dtype: torch.dtype
) -> tuple[WanTransformer, Compressor]:
    """Networks that have these weights, frozen; weights that are so already are not copied.

    Args:
        values: whole: "transformer/NAME" and "compressor/NAME".
    """
    with torch.device("meta"):
        transformer = WanTransformer(roles.student.transformer.config)
        compressor = Compressor(roles.student.compressor.config)
    for name, module in (("transformer", transformer), ("compressor", compressor)):
        own = {k.removeprefix(f"{name}/"): v for k, v in values.items() if k.startswith(f"{name}/")}
        module.load_state_dict({k: v.to(device, dtype) for k, v in own.items()}, assign=True)
        module.eval().requires_grad_(False)
    return transformer, compressor


def write_result(
    recipe: SelfForcing,
    iterations: int,
    values: Mapping[str, Tensor],
    roles: Roles,
    model: VideoModel,
    out: Path,
    *,
    metrics: Mapping[str, float] | None = None,
    changes: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Write `out/package/`: the averaged student with its few-step schedule, all else as in the model it began as.

    Args:
        values:  the averaged weights, whole: "transformer/NAME" and "compressor/NAME".
        changes: see `loop.TrainingState.changes`.
    """
    transformer, compressor = networks_of(values, roles, device=torch.device("cpu"), dtype=torch.float32)
    manifest = result_manifest(recipe, model)
    provenance = {**manifest.provenance, "iterations": iterations, "weights": "averaged"}
    if changes:
        provenance["changed on the way"] = list(changes)
    if metrics:
        provenance["metrics"] = dict(metrics)
    if changes:
        provenance["changed on the way"] = list(changes)
    place = packages.part_folder(model.folder, model.manifest, "transformer")
    _, first = next(weights.each_tensor(place))
    write_package(
        out / "package",
        manifest.model_copy(update={"provenance": provenance}),
        transformer=transformer,
        compressor=compressor,
        base=model.folder,
        dtype=first.dtype,
        overwrite=True,
    )
    return {"result": str(out / "package")}


class _Maker:
    """Sample videos of this run, by the averaged student."""

    def __init__(
        self,
        recipe: SelfForcing,
        source: ModelSource,
        roles: Roles,
        model: VideoModel,
        stories: Sequence[Story],
        folder: Path,
    ) -> None:
        self._roles, self._source = roles, source
        self._manifest = result_manifest(recipe, model)
        placed = [
            Story(
                story.script,
                tuple(
                    replace(p, conditional=p.conditional.to(source.device, source.dtype))
                    for p in story.prompts
                ),
            )
            for story in stories
        ]
        self._sampler = Sampler(recipe.samples, placed, folder)

    def make(self, step: int, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Make and measure the videos of a step with these weights. Returns: figures, means over them."""
        source = self._source
        transformer, compressor = networks_of(values, self._roles, device=source.device, dtype=source.dtype)
        model = VideoModel(
            name=self._manifest.name,
            manifest=self._manifest,
            folder=source.folder,
            transformer=transformer,
            compressor=compressor,
            codec=self._roles.student.codec,
            load_text_encoder=source.load_text_encoder,
            text=source.text,
            device=source.device,
            dtype=source.dtype,
        )
        return self._sampler.make(step, model)

    def pairs(self, step: int) -> list[Path]:
        """Put the videos from before the first step and from this one side by side."""
        return self._sampler.pairs(step)


def draw_curve(log: Path, path: Path) -> None:
    """Draw the critic's loss and the student's figures of a log as a PNG. Nothing is drawn before the second line."""
    from matplotlib.figure import Figure

    known: dict[str, dict[int, float]] = {"critic": {}, "distance": {}, "gradient": {}}
    for line in log.read_text("utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "event" not in record:
            for name, values in known.items():
                if name in record:
                    values[int(record["step"])] = float(record[name])
    if len(known["critic"]) < 2:
        return
    labels = {
        "critic": "critic: squared velocity error",
        "distance": "student to teacher: mean |x - real|",
        "gradient": "mean |DMD gradient|",
    }
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, values in known.items():
        axes.plot(list(values), list(values.values()), linewidth=0.9, label=labels[name])
    axes.set_xlabel("iteration")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with durable.replacing(path) as part:
        figure.savefig(part, format="png", dpi=110)
