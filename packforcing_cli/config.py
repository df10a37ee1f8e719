"""What a user may set: frozen requests with checked values, read from flags, environment and TOML files.

    PlanRequest                 what decides size, length and memory; `planner.plan` reads it
      └── GenerateRequest       the rest of `packforcing generate`
    MemoryOptions               the memory: a part of both

Every wrong value is a ConfigError with one message and a next step, whether it came from Python, a flag, a variable
or a file. `resolve` merges the sources: flags > PACKFORCING_* > project file > user file > default.
A default exists in one place, here; a value that was not set explicitly may be replaced by a model package's own
(`MemoryOptions.with_defaults`). Knows no models and no machines.
"""

from __future__ import annotations

import difflib
import json
import math
import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    InstanceOf,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
)

from packforcing_cli import catalog
from packforcing_cli.errors import ConfigError, UsageError
from packforcing_cli.layout import KV_BYTES, POLICIES, Grid, Layout, Lengths, Shown, Span
from packforcing_cli.timeline import Timeline

SELECTIONS = ("affinity-recent", "affinity", "fifo", "random", "none")
COMPRESSORS = ("auto", "none", "hr+lr", "hr", "lr", "pool", "identity")
COMPRESSED_CONTEXTS = ("sinks", "history")
KV_DTYPES = ("auto", *KV_BYTES)
BANK_DEVICES = ("auto", "device", "host")
QUANTIZATIONS = ("none", "int8", "int8-dynamic", "fp8", "fp8-weight")
TEXT_QUANTIZATIONS = ("none", "int8")
FROZEN_QUANTIZATIONS = ("none", "int8", "fp8")  # of what a training does not train
OFFLOADS = ("none", "text", "all")
ATTENTIONS = ("auto", "cudnn", "flash", "efficient", "math", "fa3", "sage")
CODECS = ("h264", "hevc", "h264_nvenc", "hevc_nvenc")
FITS = ("crop", "pad", "stretch")
GUARDS = ("warn", "retry", "stop")
OVERLAPS = ("auto", "on", "off")
DTYPES = ("auto", "bf16", "fp16", "fp32")
DTYPE_BYTES = {"auto": 2, "bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of one number; "auto" is planned as bf16, which it is on every GPU the models are meant for."""
MAX_SECONDS = 24 * 3600
MAX_BLOCKS = 1_000_000
UNLIMITED = "unlimited"
ENV_PREFIX = "PACKFORCING_"
OTHER_VARIABLES = ("PACKFORCING_DEBUG",)
"""Variables with that prefix that are no settings."""

_EXAMPLES = {
    "quantize_skip": "For example --quantize-skip 0,28-29.",
    "size": "Write it as WIDTHxHEIGHT, for example --size 832x480.",
    "seconds": "For example --seconds 60.",
    "mid_span": "For example --mid-span 1, --mid-span 9/16, --mid-span block or --mid-span fit.",
    "bank": f"For example --bank 256, or --bank {UNLIMITED}.",
    "bank_memory": "For example --bank-memory 8GB, or --bank-memory 500MB.",
    "prompt": 'For example packforcing generate "a red circle moving right on a blue background".',
    "crf": "0 is lossless, 18 looks lossless, 51 is the smallest file.",
    "device": "Use auto, cpu, cuda or cuda:1.",
}


class Options(BaseModel):
    """Base of what a user sets: frozen, unknown names are errors.

    Raises: ConfigError, from the constructor, if a value is not allowed or a name is unknown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _config_error(error, tuple(type(self).model_fields)) from error


class MemoryOptions(Options):
    """The memory of a video; the terms are layout.py's.

    policy:             packforcing, sink, window or full: presets of the numbers below.
    sink_blocks:        first blocks, at full resolution for ever.
    recent_blocks:      newest blocks at full resolution.
    top_k:              compressed blocks that attend.
    bank:               compressed blocks kept; None ("unlimited") = all.
    select:             how the active blocks are chosen; none = sink and recent only.
    mid_span:           slots a compressed block takes: a number, a fraction, "block" (frames_per_block), "fit" (what
                        is left of the trained range), or None = as the model was trained.
    compressor:         hr+lr, hr, lr, the baselines pool and identity, none = old blocks are forgotten, auto = the
                        package's own; or other weights: an installed package's name, a package or a part's folder.
    compressed_context: what a compressed block saw when its keys were made: the sinks, or the block's history.
    rope_adjustment:    what attends takes contiguous temporal slots; False = every block keeps those of its own time,
                        so distances grow with the video (an ablation: docs/method.md 9.6).
    kv_dtype:           how compressed blocks are kept: auto as the model computes, bf16, fp8 or int8. What attention
                        reads is of the model's dtype in any case.
    bank_memory:        bytes the bank may take ("8GB"); it has fewer blocks then, never more. None = as `bank` says.
    bank_device:        where the bank is: device, where the model runs; host memory; or auto: host memory where it does
                        not fit on the device. The video is the same.
    """

    policy: str = "packforcing"
    sink_blocks: int = Field(2, ge=0, le=10_000)
    recent_blocks: int = Field(1, ge=0, le=10_000)
    top_k: int = Field(16, ge=0, le=10_000)
    bank: int | None = Field(256, ge=1, le=MAX_BLOCKS)
    select: str = "affinity-recent"
    mid_span: str | None = None
    compressor: str = "auto"
    compressed_context: str = "sinks"
    rope_adjustment: bool = True
    kv_dtype: str = "auto"
    bank_memory: int | None = Field(None, ge=1)
    bank_device: str = "auto"

    @field_validator("kv_dtype")
    @classmethod
    def _kv_dtype(cls, value: str) -> str:
        return _one_of(value, KV_DTYPES)

    @field_validator("bank_device")
    @classmethod
    def _bank_device(cls, value: str) -> str:
        return _one_of(value, BANK_DEVICES)

    @field_validator("bank_memory", mode="before")
    @classmethod
    def _bank_memory(cls, value: object) -> object:
        return _size_bytes(value) if isinstance(value, str) else value

    @field_validator("policy")
    @classmethod
    def _policy(cls, value: str) -> str:
        return _one_of(value, POLICIES)

    @field_validator("select")
    @classmethod
    def _select(cls, value: str) -> str:
        return _one_of(value, SELECTIONS)

    @field_validator("compressor")
    @classmethod
    def _compressor(cls, value: str) -> str:
        value = value.strip()
        return value if catalog.names_weights(value) else _one_of(value, COMPRESSORS)

    @field_validator("compressed_context")
    @classmethod
    def _compressed_context(cls, value: str) -> str:
        return _one_of(value, COMPRESSED_CONTEXTS)

    @field_validator("bank", mode="before")
    @classmethod
    def _bank(cls, value: object) -> object:
        return None if isinstance(value, str) and value.strip().lower() == UNLIMITED else value

    @field_validator("mid_span", mode="before")
    @classmethod
    def _mid_span(cls, value: object) -> object:
        if value is None or value in ("fit", "block"):
            return value
        try:
            span = Fraction(str(value))
        except (ValueError, ZeroDivisionError):
            span = Fraction(0)
        if span <= 0:
            raise ValueError("must be a number above 0, block or fit")
        return str(span)

    def span(self, frames_per_block: int, default: Span) -> Span:
        """Slots a mid block takes.

        Args:
            default: the model's own, taken when nothing was set. Without RoPE adjustment it is frames_per_block.
        """
        if self.mid_span is None:
            return default if self.rope_adjustment else Fraction(frames_per_block)
        if self.mid_span == "fit":
            return "fit"
        return Fraction(frames_per_block if self.mid_span == "block" else self.mid_span)

    def layout(self, grid: Grid, *, num_blocks: int, trained_frames: int, default_span: Span) -> Layout:
        """The layout these options mean for a model.

        Args:
            num_blocks:     length of the video, which the policy `full` needs.
            trained_frames: latent frames the model was trained on.
            default_span:   the model's own mid_span.
        Raises: LayoutError if the numbers describe no possible context.
        """
        layout = Layout.from_policy(
            self.policy,
            grid=replace(grid, identity=self.compressor == "identity"),
            num_blocks=num_blocks,
            sink_blocks=self.sink_blocks,
            recent_blocks=self.recent_blocks,
            top_k=0 if "none" in (self.select, self.compressor) else self.top_k,
            bank=self.bank,
            mid_span=self.span(grid.frames_per_block, default_span),
            trained_frames=trained_frames,
            rope_adjustment=self.rope_adjustment,
            kv_dtype=self.kv_dtype,
        )
        if self.bank_memory is None or not layout.top_k:
            return layout
        most = layout.bank_within(self.bank_memory)
        return replace(layout, bank=most if layout.bank is None else min(most, layout.bank))

    def with_defaults(self, defaults: Mapping[str, Any]) -> MemoryOptions:
        """Take a package's values for everything that was not set explicitly, and for the compressor "auto".

        Names unknown here are left out; without RoPE adjustment a package's mid_span means nothing.
        """
        known = {name: value for name, value in defaults.items() if name in MemoryOptions.model_fields}
        own = self.model_dump(include=self.model_fields_set)
        if not self.rope_adjustment:
            known.pop("mid_span", None)
        if own.get("compressor") == "auto" and "compressor" in known:
            del own["compressor"]
        return MemoryOptions(**{**known, **own})

    def paper_parity(self) -> MemoryOptions:
        """As in the paper: every layer selects in the first pass over a block, a mid block keeps its full span.

        What was set explicitly stays.
        """
        return self.with_defaults({"select": "affinity", "mid_span": "block"})


class SourceVideo(Options):
    """Somebody's video that a new one goes on with.

    path, sha256: the file, and what was in it.
    from_time, to_time: the part that is used, as `timeline.parse_time` reads it; None = from its start, to its end.
    only_new:     leave it, and its sound, out of the new file.
    blocks, lead, padded: how its frames fall into blocks, see layout.Shown.
    """

    path: Path
    sha256: str
    from_time: str | None = None
    to_time: str | None = None
    only_new: bool = False
    blocks: int = Field(ge=1)
    lead: int = Field(ge=0)
    padded: int = Field(ge=0)

    def shown(self, lengths: Lengths) -> Shown:
        """What of it is in the file."""
        return Shown(lengths, self.blocks, self.lead, self.padded, self.only_new)


class PlanRequest(Options):
    """What decides size, length and memory.

    model:            a name of the catalog, or a folder.
    seconds:          wanted length; the video has whole blocks.
    size:             (width, height) in pixels; None = the model's own.
    frames_per_block: latent frames a block; None = the model's own.
    dtype:            of weights and cache; auto is bf16 for planning.
    quantize:         of the linears of the transformer's layers.
    quantize_skip:    layers whose linears stay as they are, as `parse_layers` reads them: "0,28-29".
    quantize_text:    of those of the text encoder.
    offload:          what stays in host memory while a GPU runs the model: none; text = the text encoder, which then
                      runs on the CPU; all = also the transformer's layers, each copied to the GPU while it runs.
    vae:              None = the package's, tiny, wan, a VAE of the catalog by name, or a folder with one of the
                      same latents.
    vae_latents:      latent frames the Wan VAE decodes at a time; more take more memory.
    timeline:         prompts after the first one, and pins.
    source:           somebody's video whose blocks come first; None = none.
    """

    model: str = "demo"
    seconds: float = 10.0
    size: tuple[int, int] | None = None
    frames_per_block: int | None = Field(None, ge=1, le=64)
    dtype: str = "auto"
    quantize: str = "none"
    quantize_skip: str = ""
    quantize_text: str = "none"
    offload: str = "none"
    vae: str | None = None
    vae_latents: int = Field(1, ge=1, le=64)
    memory: MemoryOptions = MemoryOptions()
    timeline: InstanceOf[Timeline] = Timeline()
    source: SourceVideo | None = None

    @field_validator("model")
    @classmethod
    def _model(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("is empty")
        return value.strip()

    @field_validator("seconds")
    @classmethod
    def _seconds(cls, value: float) -> float:
        if not (math.isfinite(value) and 0 < value <= MAX_SECONDS):
            raise ValueError(f"must be above 0 and at most {MAX_SECONDS} ({MAX_SECONDS // 3600} hours)")
        return value

    @field_validator("size", mode="before")
    @classmethod
    def _size(cls, value: object) -> object:
        if isinstance(value, str):
            sides = value.lower().replace("×", "x").split("x")
            if len(sides) != 2 or not all(
                side.strip().isascii() and side.strip().isdigit() for side in sides
            ):
                raise ValueError("is not WIDTHxHEIGHT in pixels")
            return tuple(int(side) for side in sides)
        return value

    @field_validator("timeline", mode="before")
    @classmethod
    def _timeline(cls, value: object) -> object:
        return Timeline.from_json(value) if isinstance(value, dict) else value

    @field_serializer("timeline")
    def _plain_timeline(self, value: Timeline) -> dict[str, Any]:
        return value.to_json()

    @field_validator("size")
    @classmethod
    def _size_range(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not all(1 <= side <= 8192 for side in value):
            raise ValueError("width and height must be 1 to 8192 pixels")
        return value

    @field_validator("dtype")
    @classmethod
    def _dtype(cls, value: str) -> str:
        return _one_of(value, DTYPES)

    @field_validator("quantize")
    @classmethod
    def _quantize(cls, value: str) -> str:
        return _one_of(value, QUANTIZATIONS)

    @field_validator("quantize_skip")
    @classmethod
    def _quantize_skip(cls, value: str, info: ValidationInfo) -> str:
        layers = parse_layers(value)
        if layers and info.data.get("quantize") == "none":
            raise ValueError("nothing is quantized; give --quantize, too")
        return ",".join(str(layer) for layer in layers)

    @field_validator("quantize_text")
    @classmethod
    def _quantize_text(cls, value: str) -> str:
        return _one_of(value, TEXT_QUANTIZATIONS)

    @field_validator("offload")
    @classmethod
    def _offload(cls, value: str) -> str:
        return _one_of(value, OFFLOADS)

    def changed(self, **values: Any) -> Self:
        """The same request with other values; the memory options among them go where they belong."""
        memory = {name: values.pop(name) for name in tuple(values) if name in MemoryOptions.model_fields}
        new_memory = MemoryOptions(**{**self.memory.model_dump(exclude_unset=True), **memory})
        kept = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**kept, "memory": new_memory, **values})

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]


class GenerateRequest(PlanRequest):
    """Everything `packforcing generate` needs to know.

    prompt:    what the video shows.
    model:     auto = an installed real model on a GPU that it fits, else the demo.
    image:     picture the video begins with.
    pin_images: pictures held for a block each, which the video begins with and always remembers.
    fit:       how pictures come to the size of the video: crop, pad or stretch.
    output:    the MP4 file; None = a name made from the prompt in the current folder.
    seed:      None = random, and printed.
    steps:     denoising steps; None = the package's.
    guidance:  classifier-free guidance scale, 1 = none; None = the package's.
    device:    auto (the GPU with most free memory, else the CPU), cpu, cuda or cuda:N.
    attention: the kernel of attention: auto, or a name of `attention.choose`.
    compile:   compile parts of the transformer's layers, and the Wan VAE's decoder; the first block waits for it.
    cuda_graphs: record the passes of a full memory and replay them, on a GPU.
    embeddings: a file with the prompts' embeddings; None = they are encoded.
    loras:     folders of adapters as PATH or PATH:WEIGHT, added to the model's weights.
    auto_fit:  make the smallest change that lets a request fit, and say so.
    codec:     h264 or hevc, or with NVIDIA's hardware h264_nvenc or hevc_nvenc.
    crf:       quality, 0 (lossless) to 51.
    preset:    of the encoder; None = its usual one.
    frames:    folder that gets every frame as a PNG, too.
    metadata:  write into the file how it was made.
    overwrite: replace an existing output.
    keep_run:  keep a run folder, from which the video can be resumed and extended.
    snapshot_every: blocks between two exact snapshots in it, which make resuming instant; None = none.
    guard:     what happens to a block that is frozen, black, saturated, jumps or is NaN: warn, retry it with other
               noise, or stop the video before it.
    overlap:   on: decode and compress a block while the next one is denoised; auto: on a GPU, where that is faster and
               as much memory is free as is taken; off: in order. The video is the same.
    """

    prompt: str
    model: str = "auto"
    image: Path | None = None
    pin_images: tuple[Path, ...] = ()
    fit: str = "crop"
    output: Path | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    steps: int | None = Field(None, ge=1, le=1000)
    guidance: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    device: str = "auto"
    attention: str = "auto"
    compile: bool = False
    cuda_graphs: bool = False
    embeddings: Path | None = None
    loras: tuple[str, ...] = ()
    auto_fit: bool = False
    codec: str = "h264"
    crf: int = Field(18, ge=0, le=51)
    preset: str | None = None
    frames: Path | None = None
    metadata: bool = True
    overwrite: bool = False
    keep_run: bool = True
    snapshot_every: int | None = Field(None, ge=1, le=MAX_BLOCKS)
    guard: str = "warn"
    overlap: str = "auto"

    @field_validator("overlap")
    @classmethod
    def _overlap(cls, value: str, info: ValidationInfo) -> str:
        value = _one_of(value, OVERLAPS)
        if value == "on" and info.data.get("guard", "warn") != "warn":
            raise ValueError(f"guard {info.data['guard']} must see a block before the next one begins")
        return value

    @field_validator("attention")
    @classmethod
    def _attention(cls, value: str) -> str:
        return _one_of(value, ATTENTIONS)

    @field_validator("guard")
    @classmethod
    def _guard(cls, value: str) -> str:
        return _one_of(value, GUARDS)

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, value: str, info: ValidationInfo) -> str:
        if not value.strip() and info.data.get("source") is None:
            raise ValueError("is empty")
        return value.strip()

    @field_validator("codec")
    @classmethod
    def _codec(cls, value: str) -> str:
        return _one_of(value, CODECS)

    @field_validator("fit")
    @classmethod
    def _fit(cls, value: str) -> str:
        return _one_of(value, FITS)

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        kind, colon, index = value.strip().lower().partition(":")
        if kind in ("auto", "cpu", "cuda") and (not colon or (kind == "cuda" and index.isdecimal())):
            return value.strip().lower()
        raise ValueError("is unknown")

    def to_values(self) -> dict[str, Any]:
        """JSON values that make an equal request: what was not set among the memory options stays open."""
        values = self.model_dump(mode="json")
        return {**values, "memory": self.memory.model_dump(mode="json", exclude_unset=True)}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> GenerateRequest:
        """The inverse of `to_values`. Raises: ConfigError as the constructor."""
        memory = values.get("memory") or {}
        if not isinstance(memory, Mapping) or not all(isinstance(name, str) for name in values):
            raise ConfigError("memory: must be a table of options")
        return cls(**{**values, "memory": MemoryOptions(**memory)})


def parse_layers(text: str) -> tuple[int, ...]:
    """Numbers of layers as they are written on the command line: "0,28-29" -> (0, 28, 29), ascending, each once.

    Raises: ValueError for anything else.
    """
    found: set[int] = set()
    for part in text.replace(" ", "").split(",") if text.strip() else []:
        first, _, last = part.partition("-")
        if not (first.isascii() and first.isdigit() and (last or first).isdigit()) or len(part) > 9:
            raise ValueError("must be numbers of layers, from 0")
        found.update(range(int(first), int(last or first) + 1))
        if int(last or first) < int(first):
            raise ValueError(f"{part} is an empty range")
    return tuple(sorted(found))


def parse_lora(text: str) -> tuple[Path, float]:
    """PATH or PATH:WEIGHT as it is written on the command line. Raises: UsageError for a weight that is no number."""
    path, colon, weight = text.rpartition(":")
    if not colon or not path or Path(text).exists():
        return Path(text), 1.0
    try:
        strength = float(weight)
    except ValueError:
        if "/" in weight or "\\" in weight:  # C:\folder
            return Path(text), 1.0
        raise UsageError(
            f"--lora {text}: {weight!r} is no weight", hint="Write it as PATH or PATH:0.8."
        ) from None
    if not math.isfinite(strength):
        raise UsageError(f"--lora {text}: {weight!r} is no weight", hint="Write it as PATH or PATH:0.8.")
    return Path(path), strength


def random_seed() -> int:
    """A seed for somebody who gave none: short enough to type."""
    return random.SystemRandom().randrange(2**31)


# ---------------------------------------------------------------------------------------------- where values come from

_NOT_SETTINGS = ("memory", "prompt", "image", "pin_images", "loras", "output", "frames", "timeline", "source")
SETTINGS = (
    *(name for name in GenerateRequest.model_fields if name not in _NOT_SETTINGS),
    *MemoryOptions.model_fields,
)
"""Names that flags, variables and files may set. In a file the memory options may also stand in a [memory] table."""


@dataclass(frozen=True)
class Settings:
    """Merged values.

    values:  name -> value, only what some source has set.
    sources: name -> where it came from: "flag", the variable's name or the file's path.
    """

    values: Mapping[str, Any]
    sources: Mapping[str, str]

    def request_values(self, names: Sequence[str] = SETTINGS) -> dict[str, Any]:
        """Keyword arguments of a request, the memory options nested; only the given names."""
        chosen = {name: value for name, value in self.values.items() if name in names}
        memory = {name: chosen.pop(name) for name in tuple(chosen) if name in MemoryOptions.model_fields}
        return {**chosen, "memory": MemoryOptions(**memory)}

    def plan_request(self) -> PlanRequest:
        """The part of the settings that a plan needs. Raises: ConfigError as PlanRequest."""
        names = (*PlanRequest.model_fields, *MemoryOptions.model_fields)
        return PlanRequest(**self.request_values(names))

    def generate_request(self, prompt: str, output: Path | None, **more: Any) -> GenerateRequest:
        """All settings, for one video, and `more` that is no setting. Raises: ConfigError as GenerateRequest."""
        return GenerateRequest(prompt=prompt, output=output, **self.request_values(), **more)


def resolve(flags: Mapping[str, Any], *, env: Mapping[str, str], files: Sequence[Path] = ()) -> Settings:
    """Merge what was set: flags > PACKFORCING_* > files, the first file strongest.

    Args:
        flags: name -> value; None = not given.
        env:   the process's variables; PACKFORCING_TOP_K sets top_k. Those without the prefix are not looked at.
        files: TOML files; one that does not exist is skipped.
    Raises: ConfigError if a file is not valid TOML, or a file or a PACKFORCING_* variable has an unknown name. Values
        are checked by the requests.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}

    def put(found: Mapping[str, Any], source: str) -> None:
        values.update(found)
        sources.update(dict.fromkeys(found, source))

    known = {ENV_PREFIX + name.upper(): name for name in SETTINGS}
    for variable in env:
        if variable.startswith(ENV_PREFIX) and variable not in (*known, *OTHER_VARIABLES):
            near = difflib.get_close_matches(variable, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown variable {variable}; the nearest known one is {near}")
    for path in reversed(files):
        put(read_file(path), str(path))
    for variable, name in known.items():
        if env.get(variable):
            put({name: env[variable]}, variable)
    put({name: value for name, value in flags.items() if value is not None}, "flag")
    return Settings(values, sources)


def read_file(path: Path) -> dict[str, Any]:
    """Settings of one TOML file, flat; empty if there is no such file.

    Raises: ConfigError if it cannot be read, is not TOML, or has an unknown name.
    """
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", hint="Repair the file, or remove it.") from error
    memory = table.pop("memory", {})
    if not isinstance(memory, dict):
        raise ConfigError(f"{path}: memory must be a table", hint="Write [memory], and the options under it.")
    for names, found in ((SETTINGS, table), (tuple(MemoryOptions.model_fields), memory)):
        for name in found:
            if name not in names:
                raise ConfigError(f"{path}: {_unknown(name, names)}")
    return {**table, **memory}


def to_toml(values: Mapping[str, Any]) -> str:
    """Settings as TOML that `read_file` reads back. None becomes "unlimited" for bank and is left out elsewhere."""
    lines = []
    for name, value in values.items():
        if value is None and name == "bank":
            value = UNLIMITED
        if value is None:
            continue
        if isinstance(value, tuple | list):
            text = "[" + ", ".join(str(part) for part in value) + "]"
        elif isinstance(value, bool | int | float):
            text = str(value).lower()
        else:
            text = json.dumps(str(value), ensure_ascii=False)
        lines.append(f"{name} = {text}\n")
    return "".join(lines)


# -------------------------------------------------------------------------------------------------------- messages


_SIZE_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def _size_bytes(text: str) -> int:
    """Bytes of "8GB", "500 MB", "1.5GiB" or "8000000000". Raises: ValueError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(?:([KMGT]?)(i?)B?)", text.strip(), re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise ValueError("must be a size such as 8GB, 500MB or 2GiB")
    unit = _SIZE_UNITS[found[2].upper()]
    if found[3]:
        unit = 1 << (10 * "KMGT".index(found[2].upper()) + 10)
    return int(Fraction(found[1]) * unit)


def _one_of(value: str, choices: Sequence[str]) -> str:
    if value in choices:
        return value
    near = difflib.get_close_matches(value, choices, n=1)
    raise ValueError(f"must be one of {', '.join(choices)}" + (f"; did you mean {near[0]}?" if near else ""))


def _unknown(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return f"unknown setting {name!r}; the nearest known one is {near[0]!r}"


def _config_error(error: ValidationError, names: Sequence[str]) -> ConfigError:
    """One message for the first problem: the setting, the value, what is allowed."""
    problem = error.errors(include_url=False)[0]
    name = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "extra_forbidden":
        return ConfigError(_unknown(name, names))
    if problem["type"] == "missing":
        return ConfigError(f"{name} is missing", hint=_EXAMPLES.get(name, ""))
    said = problem["msg"].removeprefix("Value error, ")
    said = said[:1].lower() + said[1:]
    value = problem["input"]
    flag = "--" + name.replace("_", "-")
    shown = "PROMPT" if name == "prompt" else f"{flag} {value}"
    return ConfigError(f"{shown}: {said}", hint=_EXAMPLES.get(name, f"See {flag} in --help."))
