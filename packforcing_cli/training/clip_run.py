"""What finetuning and compressor distillation on encoded clips share: a run from the first step to the package.

    Split -> steps (loop.run) -> evaluations, samples and a curve of the averaged weights -> pairs, package

What a step's loss is, what is evaluated and what is written are the recipes' own.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from packforcing_cli import durable, embeddings, packages, registry, weights
from packforcing_cli.compressor import Compressor
from packforcing_cli.embeddings import UNCONDITIONAL, EmbeddingCache
from packforcing_cli.errors import UsageError
from packforcing_cli.packages import Manifest
from packforcing_cli.prompts import Prompt, Story
from packforcing_cli.registry import ModelSource, VideoModel
from packforcing_cli.timeline import Script
from packforcing_cli.training import loop
from packforcing_cli.training.data import EncodedData, Scene
from packforcing_cli.training.items import Shape, kept_evenly
from packforcing_cli.training.recipe_kinds import CompressorDistill, Finetune, ItemData
from packforcing_cli.training.samples import Sampler
from packforcing_cli.transformer import WanTransformer
from packforcing_cli.vae import Codec


@dataclass(frozen=True)
class Split:
    """Scenes that are trained on and scenes that are only evaluated; `is_held_out` is False if there are none such."""

    trained: tuple[Scene, ...]
    evaluated: tuple[Scene, ...]
    is_held_out: bool

    @classmethod
    def of(cls, data: EncodedData, shape: Shape, held_out: float) -> Split:
        """Split by the contents of clips, so that no scene of a held-out one is trained on, whatever it is named.

        Raises: UsageError if no scene is long enough for the shape.
        """
        long_enough = [scene for scene in data.scenes if scene.blocks >= shape.least_blocks]
        if not long_enough:
            most = max((scene.blocks for scene in data.scenes), default=0)
            raise UsageError(
                f"{shape.name} items need scenes of {shape.least_blocks} blocks; the longest of"
                f" {len(data.scenes)} in {data.folder} has {most}",
                hint="Use longer clips, or encode them with a larger --scene-seconds.",
            )
        clips = sorted({scene.content for scene in long_enough})
        trained, held = kept_evenly(clips, held_out)
        kept = {clips[n] for n in trained}
        inside = tuple(scene for scene in long_enough if scene.content in kept)
        outside = tuple(scene for scene in long_enough if scene.content not in kept)
        return cls(inside, outside or inside, bool(held))


def unseen_share(split: Split, settings: ItemData) -> float:
    """Share of the trained scenes' blocks that no item ever takes: strict ones begin at a scene's start."""
    blocks = [scene.blocks for scene in split.trained]
    taken = [min(n, settings.blocks) if settings.shape == "strict" else n for n in blocks]
    return 1 - sum(taken) / sum(blocks)


# -- the run ------------------------------------------------------------------------------------------------------


class Sampled(Protocol):
    """What sample videos are made with."""

    @property
    def transformer(self) -> WanTransformer: ...

    @property
    def compressor(self) -> Compressor: ...

    @property
    def device(self) -> torch.device: ...


M = TypeVar("M", bound=Sampled)


@dataclass
class ClipRun(Generic[M]):
    """A run of steps on scenes drawn evenly, with what is looked at on the way and made at the end.

    Attributes:
        facts:     what its checkpoints can only be continued with.
        current:   a `with` that gives the models with their averaged weights, in the first process; None in the others,
                   which must ask, too, where weights are shared out.
        item_loss: a step's loss of one scene, and parts of it to log.
        evaluated: figures of the models.
        write:     puts the result into the folder `out`, with metrics; returns figures to tell.
        measure:   what the curve's upright axis shows.
        at_zero:   evaluate before the first step, too.
    """

    recipe: Finetune | CompressorDistill
    out: Path
    workers: loop.Workers
    state: loop.TrainingState
    facts: dict[str, Any]
    split: Split
    maker: Maker | None
    current: Callable[[], AbstractContextManager[M | None]]
    item_loss: Callable[[Scene, torch.Generator], tuple[Tensor, dict[str, float]]]
    evaluated: Callable[[M], dict[str, Any]]
    write: Callable[[M, dict[str, Any]], dict[str, Any]]
    measure: str = "squared velocity error"
    at_zero: bool = False
    _bad: list[str] = field(default_factory=list, init=False)
    _last: dict[str, Any] = field(default_factory=dict, init=False)
    """Of the newest evaluation."""

    def train(
        self,
        *,
        accept: bool = False,
        on_log: Callable[[dict[str, Any]], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        log_every: int = loop.LOG_EVERY,
    ) -> dict[str, Any]:
        """Begin or resume it; see the `train` of the recipes."""
        recipe, state = self.recipe, self.state
        with loop.Log(self._log_path, on_log) as log:
            if not loop.checkpoints_of(self.out / "checkpoints") and (self.at_zero or self.maker):
                with self.current() as models:
                    if models is not None:
                        self._look_before(models, log)
            finished = loop.run(
                state,
                recipe.train,
                self._loss,
                out=self.out,
                facts=self.facts,
                accept=accept,
                workers=self.workers,
                log=log,
                evaluate=self._evaluate,
                should_stop=should_stop,
                blame=lambda: "; ".join(self._bad),
                items=recipe.items,
                log_every=log_every,
            )
            figures: dict[str, Any] = {"steps": state.step}
            if finished:
                with self.current() as models:
                    if models is not None:
                        figures |= self._finish(models, log)
                        log.write(event="done", **figures)
        self.workers.stop()
        return figures

    @property
    def _log_path(self) -> Path:
        return self.out / f"metrics{self.workers.rank or ''}.jsonl"

    def _loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        trained = self.split.trained
        scene = trained[int(torch.randint(len(trained), (), generator=generator))]
        value, parts = self.item_loss(scene, generator)
        if not math.isfinite(float(value.detach())):
            self._bad.append(f"scene {scene.index} of {scene.clip}")
        return value, parts

    def _look_before(self, models: M, log: loop.Log) -> None:
        if self.at_zero:
            log.write(event="evaluate", step=0, **self.evaluated(models))
        if self.maker is not None:
            log.write(event="samples", step=0, samples=self.maker.make(0, models))

    def _evaluate(self) -> dict[str, Any]:
        """Figures of the averaged weights, in the first process; the others give what it gathers."""
        errors: dict[str, Any] = {}
        with self.current() as models:
            if models is not None:
                errors = self.evaluated(models)
                self._last = dict(errors)
                if self.maker is not None and self.state.step % self.recipe.samples.every == 0:
                    self._last["samples"] = errors["samples"] = self.maker.make(self.state.step, models)
        if self.workers.rank == 0:
            self._draw()
        return errors

    def _finish(self, models: M, log: loop.Log) -> dict[str, Any]:
        """Measure, make the pairs and the package. Returns: figures."""
        step, figures = self.state.step, dict[str, Any]()
        if not self._last or step % self.recipe.train.evaluate_every:
            self._last = self.evaluated(models)
        if self.maker is not None:
            if "samples" not in self._last:
                self._last["samples"] = self.maker.make(step, models)
                log.write(event="samples", step=step, samples=self._last["samples"])
            figures["pairs"] = [str(path) for path in self.maker.pairs(step)]
            if figures["pairs"]:
                self._last["before and after"] = [f"samples/{Path(path).name}" for path in figures["pairs"]]
        figures |= self.write(models, self._last)
        self._draw()
        return figures | {"result": str(self.out / "package")}

    def _draw(self) -> None:
        draw_curve(self._log_path, self.out / "curve.png", measure=self.measure)


@contextmanager
def averaged(state: loop.TrainingState) -> Iterator[None]:
    """The modules with their averaged weights."""
    kept = {
        name: {k: v.detach().clone() for k, v in module.state_dict().items()}
        for name, module in state.modules.items()
    }
    try:
        for name, module in state.modules.items():
            module.load_state_dict(state.average.state_of(name))
        yield
    finally:
        for name, module in state.modules.items():
            module.load_state_dict(kept[name])


def draw_curve(log: Path, path: Path, *, measure: str) -> None:
    """Draw the losses and evaluations of a log as a PNG. Nothing is drawn before the second line."""
    from matplotlib.figure import Figure

    losses: dict[int, float] = {}
    errors: dict[str, dict[int, float]] = {}
    for line in log.read_text("utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "loss" in record:
            losses[int(record["step"])] = float(record["loss"])
        elif record.get("event") == "evaluate":
            for group, values in record.items():
                if isinstance(values, dict) and group != "samples":
                    for name, value in values.items():
                        errors.setdefault(f"{group}, {name}", {})[int(record["step"])] = float(value)
    if len(losses) < 2:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(list(losses), list(losses.values()), linewidth=0.8, color="0.6", label="loss of a step")
    for name, values in errors.items():
        axes.plot(list(values), list(values.values()), marker=".", label=name)
    axes.set_xlabel("step")
    axes.set_ylabel(measure)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with durable.replacing(path) as part:
        figure.savefig(part, format="png", dpi=110)


# -- the result ---------------------------------------------------------------------------------------------------


def write_result(
    folder: Path,
    source: ModelSource,
    manifest: Manifest,
    transformer: WanTransformer | None,
    compressor: Compressor | None,
    *,
    steps: int,
    metrics: dict[str, Any],
    changes: Sequence[dict[str, Any]] = (),
) -> Manifest:
    """Write the package, its weights in the precision they came in; parts that were not trained are the base's."""
    place = packages.part_folder(source.folder, source.manifest, "transformer")
    _, first = next(weights.each_tensor(place))
    provenance = {**manifest.provenance, "steps": steps, "weights": "averaged", "metrics": metrics}
    if changes:
        provenance["changed on the way"] = list(changes)
    return registry.write_package(
        folder,
        manifest.model_copy(update={"provenance": provenance, "references": {}}),
        transformer=transformer,
        compressor=compressor,
        dtype=first.dtype,
        base=source.folder,
        overwrite=True,
    )


# -- samples ------------------------------------------------------------------------------------------------------


class Maker:
    """Sample videos of this run: the model they are made with, and its prompts."""

    def __init__(
        self,
        recipe: Finetune | CompressorDistill,
        source: ModelSource,
        manifest: Manifest,
        data: EncodedData,
        split: Split,
        folder: Path,
    ) -> None:
        self._recipe, self._source, self._manifest = recipe, source, manifest
        self._data, self._folder = data, folder
        asked = [Script((text,)) for text in recipe.samples.prompts]
        shown = list(dict.fromkeys(scene.script for scene in (*split.evaluated, *split.trained)))
        self._scripts = asked or shown[: recipe.samples.count]
        self._codec: Codec | None = None
        self._sampler: Sampler | None = None

    def make(self, step: int, models: Sampled) -> dict[str, float]:
        """Make and measure the videos of a step. Returns: figures, means over them."""
        network, compressor = models.transformer, models.compressor
        dtype = network.patch_embedding.weight.dtype
        if next(compressor.parameters()).dtype != dtype:
            compressor = copy.deepcopy(compressor).to(dtype)
        if self._codec is None:
            place = packages.part_folder(self._source.folder, self._source.manifest, "vae")
            self._codec = registry.load_codec(place, device=models.device, dtype=dtype)
        model = VideoModel(
            name=self._manifest.name,
            manifest=self._manifest,
            folder=self._source.folder,
            transformer=network,
            compressor=compressor,
            codec=self._codec,
            load_text_encoder=self._source.load_text_encoder,
            text=self._source.text,
            device=models.device,
            dtype=dtype,
        )
        if self._sampler is None:
            self._sampler = Sampler(self._recipe.samples, self._encoded(models.device, dtype), self._folder)
        return self._sampler.make(step, model)

    def pairs(self, step: int) -> list[Path]:
        """Put the videos from before the first step and from this one side by side."""
        return [] if self._sampler is None else self._sampler.pairs(step)

    def _encoded(self, device: torch.device, dtype: torch.dtype) -> list[Story]:
        guided = self._manifest.schedule.guidance != 1.0
        texts = list(
            dict.fromkeys(text for script in self._scripts for text in (*script.prompts, UNCONDITIONAL))
        )
        if self._recipe.samples.prompts:
            found = embeddings.encode(
                texts, self._source.text, self._source.load_text_encoder, cache=EmbeddingCache.of_user()
            )
            embeds = {text: entry.embeds for text, entry in found.items()}
        else:
            embeds = {text: self._data.embedding(text) for text in texts}
        empty = embeds[UNCONDITIONAL].to(device, dtype) if guided else None
        return [
            Story(
                script,
                tuple(Prompt(text, embeds[text].to(device, dtype), empty) for text in script.prompts),
            )
            for script in self._scripts
        ]
