"""What recipes are made of: settings every training shares, and the fields of finetuning.

Knows TOML values and nothing else: no torch, no model, no data. `recipes` reads the files.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Strict(BaseModel):
    """Base of everything in a recipe: frozen, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Train(Strict):
    """How long and how fast. Learning rates are peak values; see `loop.learning_rate_factor`."""

    steps: int = Field(gt=0)
    seed: int = 0
    learning_rate: float = Field(gt=0)
    muon_learning_rate: float | None = None
    weight_decay: float = 0.0
    warmup: int = Field(default=50, ge=0)
    decay_fraction: float = Field(default=0.4, ge=0, le=1)
    floor: float = Field(default=0.02, ge=0, le=1)
    clip: float = Field(default=1.0, gt=0)
    average: float = Field(default=0.998, ge=0, lt=1)
    checkpoint_minutes: float = Field(default=3.0, gt=0)
    evaluate_every: int = Field(default=500, gt=0)
    threads: int | None = Field(default=None, gt=0)


Quantized = Literal["none", "int8", "fp8"]
"""Weights of frozen parts: as they are, or their linears in 8 bits; see `frozen`."""


def span_of(value: str) -> Fraction:
    """Slots of a mid block as a number. Raises: ValueError for anything but a positive number or fraction."""
    try:
        span = Fraction(value)
    except (ValueError, ZeroDivisionError):
        span = Fraction(0)
    if span <= 0:
        raise ValueError(f'{value!r} is no number of slots: use for example "1", "4" or "1/2"')
    return span


def _check_spans(value: tuple[str, ...]) -> tuple[str, ...]:
    for span in value:
        span_of(span)
    return value


class ItemData(Strict):
    """Which clips are taken, and what an item of training is made of.

    folder:          clips, or what `packforcing data encode` made of them; --data sets it.
    shape:           strict = consecutive blocks from a scene's start; long-memory = sinks, then far blocks as
                     compressed tokens only, then two or three true neighbours.
    scene_seconds:   clips are cut into scenes of at most this length.
    blocks:          blocks of a strict item.
    sinks:           sink blocks, one of these numbers an item.
    max_mids:        compressed blocks that a block sees at most.
    spans:           slots a compressed block takes, one of these an item.
    drop:            strict items: how often a block does not see one of its mids.
    draws:           noise draws that share an item's clean pass.
    caption_dropout: items whose noisy blocks read the empty prompt; their history keeps its caption.
    context_noise:   most noise on the history, of half of the items; their timestep stays 0.
    held_out:        share of the clips that is evaluated on and not trained on.
    enlarge:         take clips that are smaller than the model's pictures, too.
    max_bad:         share of bad clips above which nothing is started.
    """

    folder: str = ""
    shape: Literal["strict", "long-memory"]
    scene_seconds: float = Field(gt=0, le=24)
    blocks: int = Field(default=5, ge=2, le=5)
    sinks: tuple[int, ...] = Field(default=(1, 2), min_length=1)
    max_mids: int = Field(default=16, ge=0)
    spans: tuple[str, ...] = Field(default=("1", "1", "2", "4"), min_length=1)
    drop: float = Field(default=0.2, ge=0, lt=1)
    draws: int = Field(default=1, ge=1)
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)
    context_noise: float = Field(default=0.15, ge=0, lt=1)
    held_out: float = Field(default=0.05, ge=0, le=0.5)
    enlarge: bool = False
    max_bad: float = Field(default=0.1, ge=0, le=1)

    @field_validator("sinks")
    @classmethod
    def _some_sinks(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(n < 1 or n > 2 for n in value):
            raise ValueError("sinks are 1 or 2 blocks: with three neighbours more do not fit in 5 blocks")
        return value

    @field_validator("spans")
    @classmethod
    def _spans(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for span in value:
            span_of(span)
        return value

    @property
    def slot_spans(self) -> tuple[Fraction, ...]:
        """`spans` as numbers."""
        return tuple(Fraction(span) for span in self.spans)


def _check_sinks(value: tuple[int, ...]) -> tuple[int, ...]:
    if any(n < 1 or n > 2 for n in value):
        raise ValueError("sinks are 1 or 2 blocks")
    return value


class DistillData(Strict):
    """What a compressor is distilled on.

    folder:          clips, or what `packforcing data encode` made of them; --data sets it. Empty = the model's own
                     videos, made once with the real rollout and kept in the run's folder.
    prompts:         of these videos: a text file with one a line, or "demo" for captions of the demo's world.
    rollouts:        how many of them.  rollout_blocks: length of each.  rollout_seed: of their noise.
    scene_seconds:   clips are cut into scenes of at most this length.
    sinks:           sink blocks, one of these numbers an item.
    max_mids:        compressed blocks that a block sees at most.
    spans:           slots a compressed block takes, one of these an item.
    caption_dropout: asking blocks that read the empty prompt.
    clean:           asking blocks without noise, as in the clean pass.
    held_out:        share of the clips or videos that is evaluated on and not trained on.
    enlarge:         take clips that are smaller than the model's pictures, too.
    max_bad:         share of bad clips above which nothing is started.
    """

    folder: str = ""
    prompts: str = "demo"
    rollouts: int = Field(default=8, ge=2)
    rollout_blocks: int = Field(default=20, ge=4)
    rollout_seed: int = Field(default=0, ge=0)
    scene_seconds: float = Field(default=24.0, gt=0, le=24)
    sinks: tuple[int, ...] = Field(default=(2,), min_length=1)
    max_mids: int = Field(default=16, ge=1)
    spans: tuple[str, ...] = Field(default=("1", "1", "2", "4"), min_length=1)
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)
    clean: float = Field(default=0.2, ge=0, le=1)
    held_out: float = Field(default=0.25, ge=0, le=0.5)
    enlarge: bool = False
    max_bad: float = Field(default=0.1, ge=0, le=1)

    _sinks = field_validator("sinks")(_check_sinks)
    _spans = field_validator("spans")(_check_spans)

    @property
    def slot_spans(self) -> tuple[Fraction, ...]:
        """`spans` as numbers."""
        return tuple(Fraction(span) for span in self.spans)


class Queries(Strict):
    """Where attention is compared.

    blocks:    of a scene that ask, an item.
    layers:    of the transformer, drawn for each asking block.
    tokens:    of each asking block.
    stand_ins: older blocks that are replaced together, at most; one to this many an item.
    """

    blocks: int = Field(default=4, ge=1)
    layers: int = Field(default=4, ge=1)
    tokens: int = Field(default=64, ge=1)
    stand_ins: int = Field(default=4, ge=1)


class Preset(Strict):
    """Memory settings that the package of the result is run with; left out = those of the model it starts from."""

    sink_blocks: int | None = Field(default=None, ge=0)
    top_k: int | None = Field(default=None, ge=0)
    mid_span: str | None = None

    @field_validator("mid_span")
    @classmethod
    def _span(cls, value: str | None) -> str | None:
        if value is not None and value != "fit":
            span_of(value)
        return value


class Samples(Strict):
    """Videos made on the way: before the first step, every `every` steps and at the end.

    every:   0 = none, and no VAE is loaded.
    prompts: empty = the captions of the first clips.
    """

    every: int = Field(default=0, ge=0)
    prompts: tuple[str, ...] = ()
    count: int = Field(default=2, ge=1, le=16)
    seconds: float = Field(default=10.0, gt=0)
    seed: int = 0


class Sampling(Strict):
    """How the result is sampled; left out = as the model it starts from, a student as its teacher, if that is known, or
    in 40 steps at guidance 3.

    Flow matching on clips trains a model for all noise levels: a few-step student becomes a many-step model, unless its
    compressor alone is trained.
    """

    steps: int | None = Field(default=None, ge=1)
    guidance: float | None = Field(default=None, ge=0)


class Finetune(Strict):
    """Every weight of a model's transformer and compressor, trained on clips by packed teacher forcing.

    model:                    a model's name or package folder.
    items:                    items a step, over all processes together.
    compressor_learning_rate: of the HR branch, which starts from nothing where the model has none.
    train_transformer:        false = the compressor alone.
    precision:                bf16 = products in bfloat16, everything that is kept in float32; auto = bf16 on a GPU.
    checkpointing:            run each layer again in the backward pass instead of keeping what is in it.
    quantize_frozen:          of a transformer that is not trained; --quantize-frozen sets it.
    """

    kind: Literal["finetune"]
    model: str = "demo"
    items: int = Field(default=4, ge=1)
    compressor_learning_rate: float = Field(default=1e-4, gt=0)
    train_transformer: bool = True
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    checkpointing: bool = False
    quantize_frozen: Quantized = "none"
    data: ItemData
    preset: Preset = Preset()
    samples: Samples = Samples()
    sampling: Sampling = Sampling()
    train: Train

    @model_validator(mode="after")
    def _what_belongs_together(self) -> Finetune:
        if self.train.muon_learning_rate is not None:
            raise ValueError("train.muon_learning_rate: finetuning uses AdamW alone; leave it out")
        if self.quantize_frozen != "none" and self.trains_all:
            raise ValueError(
                f"quantize_frozen {self.quantize_frozen}: every weight is trained, nothing is frozen; leave it out,"
                " or use finetune-lora or train_transformer=false"
            )
        if self.samples.every % self.train.evaluate_every:
            raise ValueError(
                f"samples.every {self.samples.every} must be a multiple of train.evaluate_every"
                f" {self.train.evaluate_every}"
            )
        return self

    @property
    def trains_all(self) -> bool:
        """Whether no weight of transformer and compressor is frozen."""
        return self.train_transformer


class FinetuneLora(Finetune):
    """Low-rank adapters of the transformer's layers; everything else stays, the compressor too.

    rank:    of the adapters.  alpha: their output is scaled by alpha / rank.
    targets: ends of the names of the linears that get one.
    """

    kind: Literal["finetune-lora"]  # type: ignore[assignment]
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    targets: tuple[str, ...] = Field(
        default=(
            *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
            *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
            *("ffn.net.0.proj", "ffn.net.2"),
        ),
        min_length=1,
    )

    @model_validator(mode="after")
    def _what_a_lora_has_not(self) -> FinetuneLora:
        for name in ("compressor_learning_rate", "train_transformer"):
            if name in self.model_fields_set:
                raise ValueError(
                    f"{name} has no meaning here: adapters of the transformer are all that is trained"
                )
        return self

    @property
    def trains_all(self) -> bool:
        """False: the base is frozen."""
        return False


class CompressorDistill(Strict):
    """The compressor of a model whose transformer is frozen, by what attention over its tokens gives.

    model:           a model's name or package folder.
    start:           model = from its trained compressor where it has one; lr = from the training-free LR branch, the
                     HR branch's projection zero. A model without a trained compressor starts from LR in any case.
    items:           items a step, over all processes together.
    pool_weight:     of the match with pooled keys and values, beside 1 for attention.
    precision:       bf16 = the frozen transformer and products in bfloat16; auto = bf16 on a GPU.
    checkpointing:   run the compressed forward again in the backward pass instead of keeping what is in it.
    quantize_frozen: of the transformer, and of the text encoder that reads prompts; --quantize-frozen sets it.
    """

    kind: Literal["compressor-distill"]
    model: str = "demo"
    start: Literal["model", "lr"] = "model"
    items: int = Field(default=2, ge=1)
    pool_weight: float = Field(default=0.02, ge=0)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    checkpointing: bool = False
    quantize_frozen: Quantized = "none"
    data: DistillData = DistillData()
    queries: Queries = Queries()
    preset: Preset = Preset()
    samples: Samples = Samples()
    train: Train

    @model_validator(mode="after")
    def _what_belongs_together(self) -> CompressorDistill:
        if self.train.muon_learning_rate is not None:
            raise ValueError("train.muon_learning_rate: the compressor uses AdamW alone; leave it out")
        if self.samples.every % self.train.evaluate_every:
            raise ValueError(
                f"samples.every {self.samples.every} must be a multiple of train.evaluate_every"
                f" {self.train.evaluate_every}"
            )
        least = max(self.data.sinks) + 3
        if not self.data.folder and self.data.rollout_blocks < least:
            raise ValueError(
                f"data.rollout_blocks {self.data.rollout_blocks}: with {max(self.data.sinks)} sinks no block asks"
                f" for a compressed one in fewer than {least} blocks"
            )
        return self
