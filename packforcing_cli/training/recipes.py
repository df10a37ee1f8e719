"""Recipes: TOML files that say what is trained, on what, for how long.

A recipe is validated strictly: an unknown key is an error that names the nearest known one. Recipes ship with the
package; `packforcing train NAME` finds them, `packforcing train FILE.toml` reads a file.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, field_validator, model_validator

from packforcing_cli.errors import UsageError
from packforcing_cli.training.recipe_kinds import (
    CompressorDistill,
    Finetune,
    FinetuneLora,
    Quantized,
    Samples,
    Train,
    span_of,
)
from packforcing_cli.training.recipe_kinds import Strict as _Strict

__all__ = [
    "CompressorDistill",
    "DemoDistill",
    "DemoFlow",
    "DemoVae",
    "Finetune",
    "FinetuneLora",
    "FlowData",
    "Train",
    "find",
    "load",
    "names",
]


class VaeData(_Strict):
    clips: int = Field(gt=0, description="clips in a batch")
    frames: int = Field(gt=0, description="pixel frames of a clip, 1 + 4k")
    shrunken_clips: int = Field(
        ge=0, description="clips in a batch that are pooled 4x, as the LR branch encodes them"
    )


class DemoVae(_Strict):
    kind: Literal["demo-vae"]
    model: dict[str, Any] = Field(description="fields of vae.TinyAutoencoderConfig")
    data: VaeData
    train: Train
    latent_noise: float = 0.1
    latent_penalty: float = 1e-3
    motion_weight: float = Field(default=1.0, ge=0, description="weight of the error of frame differences")
    shrunken_weight: float = Field(default=1.0, ge=0, description="weight of the shrunken clips' loss")


class FlowModel(_Strict):
    layers: int
    heads: int
    head_dim: int
    ffn_dim: int
    compressor_widths: tuple[int, int, int, int]


class FlowData(_Strict):
    """The latent pool (rendered and encoded once) and what a step draws from it.

    first_scenes scenes of one block, short_scenes of `short_blocks`, long_scenes of `long_blocks` blocks.
    A step has `packed_clips` strict items (consecutive blocks), `long_clips` items with far mids, each with
    `long_probability`, and `first_clips` items of block 0 alone.
    """

    first_scenes: int = Field(gt=0)
    short_scenes: int = Field(gt=0)
    long_scenes: int = Field(ge=0)
    short_blocks: int = Field(default=7, ge=3)
    long_blocks: int = Field(default=24, ge=10)
    visitor_share: float = Field(default=0.0, ge=0, le=1, description="scenes with a visitor")
    switch_share: float = Field(
        default=0.0, ge=0, le=1, description="scenes whose words change in the middle"
    )
    visitor_weight: float = Field(
        default=1.0, ge=1, description="weight of the error in the latent cells where a visitor stands"
    )
    return_weight: float = Field(
        default=1.0,
        ge=1,
        description="the same where it is back and only older blocks than the last one have it",
    )
    recall_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="items with far mids in which the visitor returns in a trained block",
    )
    recall_blocks: int = Field(
        default=1,
        ge=1,
        le=4,
        description="of such an item, far blocks that have seen the visitor, if so many have",
    )
    packed_clips: int = Field(ge=0)
    packed_blocks: int = Field(ge=2)
    packed_draws: int = Field(default=1, ge=1, description="noise draws that share a clip's clean pass")
    long_clips: int = Field(ge=0)
    long_draws: int = Field(default=2, ge=1, description="noise draws of the trained blocks of such an item")
    long_probability: float = Field(default=1.0, ge=0, le=1)
    far_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="items with far mids whose trained blocks see no recent block, and half of them no sinks",
    )
    whole_probability: float = Field(
        default=0.0, ge=0, le=1, description="steps with whole clips, in which every frame sees all others"
    )
    whole_clips: int = Field(default=1, ge=1)
    first_clips: int = Field(ge=0)
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)
    context_noise: float = Field(default=0.15, ge=0, lt=1)
    seed: int = 1

    @model_validator(mode="after")
    def _items_fit_scenes(self) -> FlowData:
        if self.packed_blocks > self.short_blocks:
            raise ValueError(f"packed_blocks {self.packed_blocks} exceeds short_blocks {self.short_blocks}")
        if self.whole_probability and self.short_blocks < 5:
            raise ValueError("whole clips need short_blocks of at least 5")
        if self.long_clips and (self.long_scenes == 0 or self.long_blocks < 10):
            raise ValueError("long_clips need long_scenes of at least 10 long_blocks")
        return self


class FlowTrain(Train):
    """As `Train`, with a rate and decay of the compressor's own."""

    compressor_learning_rate: float | None = Field(
        default=None, gt=0, description="of the compressor; None = learning_rate, and no decay"
    )
    compressor_weight_decay: float = Field(default=1.0, ge=0)


class DemoFlow(_Strict):
    kind: Literal["demo-flow"]
    vae: str = Field(description="folder of a trained demo-vae run, or 'package' for the packaged one")
    init: str = Field(
        default="",
        description="a package folder to start from, 'package' for the packaged one; '' = from nothing",
    )
    fresh: tuple[Literal["transformer", "compressor", "text_encoder"], ...] = Field(
        default=(), description="parts that are not taken from there, but start from nothing"
    )
    model: FlowModel
    data: FlowData
    train: FlowTrain
    shift: float = 5.0
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="bf16: products in bfloat16; weights, optimiser and residual stream in float32",
    )

    @model_validator(mode="after")
    def _fresh_beside_others(self) -> DemoFlow:
        if self.fresh and not self.init:
            raise ValueError("fresh: without init all parts start from nothing; leave it out")
        return self


class DemoDistill(DemoFlow):
    """As `DemoFlow`; `init` is the teacher, and what the student begins as, so it must be given."""

    kind: Literal["demo-distill"]  # type: ignore[assignment]
    timesteps: tuple[int, ...] = Field(
        default=(1000, 750, 500, 250), description="steps of the student, before the shift"
    )
    teacher_steps: int = Field(
        default=2, ge=1, description="the teacher's Euler steps in one of the student's"
    )
    guidance: float = Field(default=2.0, ge=0, description="of the teacher: u + g (c - u)")
    quantize_frozen: Quantized = Field(default="none", description="linears of the teacher in 8 bits")

    @model_validator(mode="after")
    def _fresh_beside_others(self) -> DemoDistill:
        if self.fresh:
            raise ValueError("fresh: a student begins as its teacher; leave it out")
        return self


class StudentRollout(_Strict):
    """What a rollout in training is: `blocks` graded ones after up to `max_prefix` others; drawn anew each time."""

    timesteps: tuple[int, ...] = Field(default=(1000, 750, 500, 250), description="steps of the student")
    blocks: int = Field(default=5, ge=2)
    max_prefix: int = Field(default=0, ge=0, le=1000)
    sink_blocks: tuple[int, ...] = Field(default=(1, 2), min_length=1)
    mid_spans: tuple[str, ...] = Field(
        default=("1",),
        min_length=1,
        description='slots a mid takes; "fit" shares what is left of the trained range',
    )
    top_k: int = Field(default=16, ge=1)

    @field_validator("timesteps")
    @classmethod
    def _falling(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if (
            not value
            or list(value) != sorted({*value}, reverse=True)
            or not 0 < value[-1] <= value[0] <= 1000
        ):
            raise ValueError("timesteps fall from 1000 to above 0, for example [1000, 750, 500, 250]")
        return value

    @field_validator("sink_blocks")
    @classmethod
    def _some_sinks(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value, default=1) < 1:
            raise ValueError("at least 1 block is sink: a compressed block is made beside them")
        return value

    @field_validator("mid_spans")
    @classmethod
    def _spans(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for span in value:
            if span != "fit":
                span_of(span)
        return value


class StudentTrain(_Strict):
    """How long and how fast; the rates of Self-Forcing and the paper, the compressor's own is larger."""

    steps: int = Field(gt=0, description="iterations: critic updates")
    seed: int = 0
    learning_rate: float = Field(default=2e-6, gt=0)
    critic_learning_rate: float = Field(default=1e-6, gt=0)
    compressor_learning_rate: float = Field(default=5e-5, gt=0)
    compressor_alone: int = Field(
        default=200, ge=0, description="student updates in which the mids' gradient stops at the compressor"
    )
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=10.0, gt=0)
    average: float = Field(default=0.99, ge=0, lt=1, description="a student update")
    average_start: int = Field(default=200, ge=0, description="iterations without averaging")
    checkpointing: bool = Field(
        default=False,
        description="run each layer again in the backward pass instead of keeping what is in it",
    )
    checkpoint_minutes: float = Field(default=5.0, gt=0)
    threads: int | None = Field(default=None, gt=0)


class SelfForcing(_Strict):
    kind: Literal["self-forcing"]
    student: str = Field(
        description="model to start from: a name, a package folder, or 'package' for the demo"
    )
    teacher: str = Field(description="model that judges; must take whole clips at once")
    prompts: str = Field(description="text file with a prompt a line, or 'demo'")
    negative_prompt: str = Field(default="", description="what the teacher's guidance leads away from")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="bf16: products, cache and teacher in bfloat16, all that is trained in float32; auto: on a GPU",
    )
    shift: float = 5.0
    guidance: float = Field(default=3.0, ge=0, description="of the teacher: c + w (c - u)")
    critic_updates: int = Field(default=5, ge=1, description="critic updates for one of the student")
    batch: int = Field(default=1, ge=1, description="rollouts a step, over all processes together")
    quantize_frozen: Quantized = Field(
        default="none", description="linears of the teacher and of the text encoder in 8 bits"
    )
    rollout: StudentRollout = StudentRollout()
    samples: Samples = Samples()
    train: StudentTrain


AnyRecipe = DemoVae | DemoFlow | DemoDistill | Finetune | FinetuneLora | CompressorDistill | SelfForcing
KINDS: dict[str, type[BaseModel]] = {
    "demo-vae": DemoVae,
    "demo-flow": DemoFlow,
    "demo-distill": DemoDistill,
    "finetune": Finetune,
    "finetune-lora": FinetuneLora,
    "compressor-distill": CompressorDistill,
    "self-forcing": SelfForcing,
}
Recipe = Annotated[AnyRecipe, Field(discriminator="kind")]
_ADAPTER: TypeAdapter[AnyRecipe] = TypeAdapter(Recipe)


def folders() -> list[Path]:
    """Where shipped recipes are: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    return [f for f in (package / "recipes", package.parent / "recipes") if f.is_dir()]


def names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted({p.stem for folder in folders() for p in folder.glob("*.toml")})


def find(name: str) -> Path:
    """Path of a recipe by name or file. Raises: UsageError naming the nearest recipes."""
    path = Path(name)
    if path.suffix == ".toml" or path.is_file():
        if not path.is_file():
            raise UsageError(
                f"recipe file {name} does not exist", hint=f"Shipped recipes: {', '.join(names())}."
            )
        return path
    for folder in folders():
        if (folder / f"{name}.toml").is_file():
            return folder / f"{name}.toml"
    near = difflib.get_close_matches(name, names(), 3, 0.4) or names()
    raise UsageError(f"no recipe named {name!r}", hint=f"Did you mean: {', '.join(near)}?")


def load(name: str, settings: Sequence[str] = ()) -> AnyRecipe:
    """Read and validate a recipe; `settings` are key.path=value overrides, values in JSON or plain text.

    Raises: UsageError for a missing file, broken TOML, an unknown key (nearest named) or a bad value.
    """
    path = find(name)
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
    for setting in settings:
        _apply(values, setting)
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        raise UsageError(_explain(path, values, error)) from error


def _apply(values: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise UsageError(f"--set takes key=value, got {setting!r}", hint="For example --set train.steps=100")
    try:
        value: Any = json.loads(text)
    except json.JSONDecodeError:
        value = text
    *parents, last = key.split(".")
    target = values
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise UsageError(f"--set {key}: {parent} is not a table in this recipe")
    target[last] = value


def _explain(path: Path, values: Mapping[str, Any], error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        where = [str(part) for part in problem["loc"] if part not in KINDS]
        text = f"{'.'.join(where) or 'recipe'}: {problem['msg']}"
        if problem["type"] == "extra_forbidden":
            known = _known_keys(str(values.get("kind")), where[:-1])
            near = difflib.get_close_matches(where[-1], known, 1, 0.0)
            text = f"{'.'.join(where)}: unknown key" + (f"; nearest known: {near[0]}" if near else "")
        elif problem["type"] == "union_tag_invalid":
            near = difflib.get_close_matches(str(values.get("kind")), KINDS, 1, 0.0)
            text = f"kind: {values.get('kind')!r} is unknown; nearest known: {near[0]}"
        lines.append(text)
    return f"{path.name}: " + "; ".join(lines)


def _known_keys(kind: str, where: Sequence[str]) -> list[str]:
    model: Any = KINDS.get(kind)
    for part in where:
        field = model.model_fields.get(part) if model is not None else None
        model = field.annotation if field is not None else None
    return list(model.model_fields) if model is not None and hasattr(model, "model_fields") else []
