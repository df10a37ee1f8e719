"""Model packages: write one, check one, load one.

A package is a folder in diffusers layout with a manifest; `demo` is the one inside this Python package.

    packforcing.json   what the model is, how it is to be run, sha256 and size of every file of every part
    transformer/  vae/  text_encoder/  tokenizer/  compressor/      config.json + *.safetensors

    name or folder -> manifest -> every file verified -> modules on meta -> tensors assigned -> VideoModel

No tensor is read before all files are verified. Only safetensors are read. Knows nothing of prompts,
rollouts or caches; the numbers in `CacheDefaults` and `Schedule` are for others to read.
Source: DESIGN 7.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor, nn

from packforcing_cli import catalog, weights
from packforcing_cli.compressor import Compressor, CompressorConfig
from packforcing_cli.errors import DiskFullError, EnvironmentProblem, UsageError, WeightsError
from packforcing_cli.quantize import linear_weights, quantizer, require_support
from packforcing_cli.quiet import known_import_noise_dropped
from packforcing_cli.text import TextEncoder, TextIdentity, encoder_parts
from packforcing_cli.transformer import TransformerConfig, WanTransformer
from packforcing_cli.vae import Codec, TinyAutoencoder, TinyAutoencoderConfig, TinyCodec, WanCodec

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

MANIFEST = "packforcing.json"
SCHEMA = 1
LAYERS = "blocks."  # of a transformer, in its state dict

M = TypeVar("M", bound=nn.Module)
Part = Literal["transformer", "vae", "text_encoder", "tokenizer", "compressor"]
REQUIRED_PARTS: tuple[Part, ...] = ("transformer", "vae", "text_encoder", "tokenizer")

_AGAIN = "Get the package again; for the demo, install packforcing again from a fresh checkout."


# ------------------------------------------------------------------------------------------------- manifest


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class CacheDefaults(_Frozen):
    """Memory settings the model was trained with; each can be overridden by the option of the same name."""

    frames_per_block: int = Field(ge=1)
    sink_blocks: int = Field(2, ge=0)
    recent_blocks: int = Field(1, ge=0)
    top_k: int = Field(16, ge=0)
    bank: int | None = Field(256, ge=1, description="blocks; null = unlimited")
    select: str = "affinity-recent"
    mid_span: str = Field(
        "fit", description='slots of a mid block: "fit" or a positive fraction such as "4" or "3/2"'
    )
    compressor: str = "hr+lr"
    compressed_context: Literal["sinks", "history"] = "sinks"

    @field_validator("mid_span", mode="before")
    @classmethod
    def _a_span(cls, value: object) -> str:
        text = str(value)
        try:
            positive = text == "fit" or Fraction(text) > 0
        except (ValueError, ZeroDivisionError):
            positive = False
        if not positive:
            raise ValueError(f'must be "fit" or a positive fraction, not {text!r}')
        return text


class Schedule(_Frozen):
    """How a block is denoised. `renoise`: few-step students, guidance 1. `euler`: any model and guidance.

    timesteps: renoise only, the training timesteps visited, falling; `steps` is their number.
    """

    kind: Literal["renoise", "euler"]
    steps: int = Field(ge=1)
    shift: float = Field(gt=0)
    guidance: float = Field(1.0, ge=0)
    timesteps: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Schedule:
        if self.kind == "renoise" and len(self.timesteps) != self.steps:
            raise ValueError(f"a renoise schedule of {self.steps} steps needs as many timesteps")
        return self


class CodecFactsRecord(_Frozen):
    """What the latents of this model are; must agree with the VAE in the package."""

    kind: Literal["tiny", "wan"]
    latent_channels: int = Field(ge=1)
    spatial_stride: int = Field(ge=1)
    temporal_stride: int = Field(ge=1)
    pixel_range: tuple[float, float]
    encode_lookahead: int = Field(0, ge=0)

    @classmethod
    def of(cls, codec: Codec) -> CodecFactsRecord:
        """The facts of a codec, as the manifest stores them."""
        facts = codec.facts
        return cls(
            kind="tiny" if isinstance(codec, TinyCodec) else "wan",
            latent_channels=facts.latent_channels,
            spatial_stride=facts.spatial_stride,
            temporal_stride=facts.temporal_stride,
            pixel_range=facts.pixel_range,
            encode_lookahead=facts.encode_lookahead,
        )


class FileRecord(_Frozen):
    """Size and hash of one file."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Manifest(_Frozen):
    """packforcing.json. `parts` and `files` are filled in by `write_package`.

    size:           (width, height) in pixels.
    trained_frames: latent frames of the longest distance seen in training (the range of temporal slots).
    text_length:    tokens of a prompt, padding included.
    vocabulary:     words the model was trained on; empty when it is open.
    limits:         what it cannot do, one sentence each.
    provenance:     recipe, data, steps, measured figures.
    parts:          part -> folder inside the package.
    files:          path inside the package -> size and hash, for every file of every part.
    """

    schema_version: int = Field(SCHEMA, alias="schema", ge=1)
    name: str = Field(min_length=1)
    version: str
    title: str
    license: str
    base_model: str | None = None
    size: tuple[int, int]
    fps: int = Field(ge=1)
    trained_frames: int = Field(ge=1)
    text_length: int = Field(ge=1)
    cache: CacheDefaults
    schedule: Schedule
    codec: CodecFactsRecord
    vocabulary: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    provenance: dict[str, Any] = Field(default_factory=dict)
    parts: dict[Part, str] = Field(default_factory=dict)
    files: dict[str, FileRecord] = Field(default_factory=dict)

    @field_validator("parts", "files")
    @classmethod
    def _inside_the_package(cls, value: dict[str, Any]) -> dict[str, Any]:
        for path in [*value, *(v for v in value.values() if isinstance(v, str))]:
            pure = PurePosixPath(path)
            if (
                pure.is_absolute()
                or ".." in pure.parts
                or "\\" in path
                or ":" in path
                or str(pure) in ("", ".")
            ):
                raise ValueError(f"{path!r} is not a path inside the package")
        return value

    def part_files(self, part: Part) -> dict[str, FileRecord]:
        """Name below the part's folder -> size and hash."""
        place = PurePosixPath(self.parts[part])
        inside = {name: record for name, record in self.files.items() if place in PurePosixPath(name).parents}
        return {str(PurePosixPath(name).relative_to(place)): record for name, record in inside.items()}

    def part_hash(self, part: Part) -> str:
        """One hash that changes with any file of a part."""
        lines = [f"{name} {record.sha256}" for name, record in sorted(self.part_files(part).items())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of packforcing.json."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read and validate packforcing.json of a package folder.

    Raises: WeightsError when it is missing, not valid, or of a newer schema than this program knows.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as e:
        raise WeightsError(f"{folder} is not a model package: it has no {MANIFEST}", hint=_AGAIN) from e
    except (OSError, ValueError) as e:
        raise WeightsError(f"{path} cannot be read: {e}", hint=_AGAIN) from e
    schema = values.get("schema") if isinstance(values, dict) else None
    if not isinstance(schema, int):
        raise WeightsError(f"{path} is not a packforcing manifest: it has no schema number", hint=_AGAIN)
    if schema > SCHEMA:
        raise WeightsError(
            f"{path} has schema {schema}; this program reads up to {SCHEMA}",
            hint="pip install --upgrade packforcing",
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as e:
        raise WeightsError(f"{path} is not valid: {_first_problem(e)}", hint=_AGAIN) from e


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(p) for p in problem["loc"])
    if problem["type"] != "extra_forbidden":
        return f"{where}: {problem['msg']}"
    models: list[type[BaseModel]] = [Manifest, CacheDefaults, Schedule, CodecFactsRecord]
    known = [field.alias or name for model in models for name, field in model.model_fields.items()]
    near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
    return f"unknown key {where}" + (f"; did you mean {near[0]}?" if near else "")


# --------------------------------------------------------------------------------------------- verification


def verify_package(folder: Path, manifest: Manifest) -> None:
    """Check presence, size and sha256 of every file, and that no part holds unlisted weights or configs.

    Raises: WeightsError naming the first bad file and what is wrong with it.
    """
    for part, place in manifest.parts.items():
        listed = [name for name in manifest.files if PurePosixPath(place) in PurePosixPath(name).parents]
        if not listed:
            raise WeightsError(f"the manifest of {folder} lists no file of its part {part}", hint=_AGAIN)
        for path in sorted((folder / place).rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.suffix in (".safetensors", ".json") and name not in manifest.files:
                raise WeightsError(f"{path} is not listed in the manifest", hint="Remove it. " + _AGAIN)
    for name, record in manifest.files.items():
        _verify_file(folder / name, record)


def _verify_file(path: Path, record: FileRecord) -> None:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
            if head.startswith(b"version https://git-lfs.github.com/spec/"):
                raise WeightsError(
                    f"{path} is a Git LFS pointer, not the file it stands for",
                    hint="Run `git lfs pull` where it was cloned, or download the file itself.",
                )
            if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
                raise WeightsError(
                    f"{path} is a web page (an error page saved under that name)",
                    hint="Download the file again.",
                )
            if size < record.size:
                raise WeightsError(f"{path} is truncated: {size} of {record.size} bytes", hint=_AGAIN)
            if size > record.size:
                raise WeightsError(f"{path} has {size} bytes instead of {record.size}", hint=_AGAIN)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as e:
        raise WeightsError(f"{path} is missing", hint=_AGAIN) from e
    except OSError as e:
        raise WeightsError(
            f"{path} cannot be read: {e}", hint="Check the permissions of the model folder."
        ) from e
    if digest != record.sha256:
        raise WeightsError(
            f"{path} is damaged: its sha256 is {digest[:12]}…, the manifest says {record.sha256[:12]}…",
            hint=_AGAIN,
        )


# -------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class VideoModel:
    """A loaded model: weights only, shared by any number of videos.

    compressor: None when the package has none.
    load_text_encoder: reads the text encoder each time it is called; the caller drops it after encoding.
    text: what its embeddings depend on.
    quantize: of the transformer's linears, "none" or a mode of `quantize`.
    """

    name: str
    manifest: Manifest
    folder: Path
    transformer: WanTransformer
    compressor: Compressor | None
    codec: Codec
    load_text_encoder: Callable[[], TextEncoder]
    text: TextIdentity
    device: torch.device
    dtype: torch.dtype
    quantize: str = "none"


@dataclass(frozen=True)
class ModelSource:
    """A model package that was verified and is not loaded.

    Its prompts can be encoded before the transformer takes memory; `load` gives the model.

    device, dtype: what was asked for, resolved.
    """

    name: str
    manifest: Manifest
    folder: Path
    load_text_encoder: Callable[[], TextEncoder]
    text: TextIdentity
    load: Callable[[], VideoModel]
    device: torch.device
    dtype: torch.dtype


def find_package(name_or_folder: str | Path) -> Path:
    """The folder of a model given by name or path. A name wins over a folder of that name (use ./NAME).

    Raises: UsageError for a family (facts without weights), an unknown name, or a folder that does not exist.
    """
    name = str(name_or_folder)
    if name_or_folder == "demo":  # a Path of that name is a folder
        return catalog.DEMO_FOLDER
    folder = Path(name).expanduser()
    if isinstance(name_or_folder, Path) or folder.is_dir() or os.sep in name or name.startswith((".", "~")):
        if not folder.is_dir():
            raise UsageError(f"there is no model folder {name}", hint="Check the path, or use --model demo.")
        return folder
    facts = catalog.get(name)  # UsageError with the nearest names
    facts.require_weights()
    if facts.name == "demo":
        return catalog.DEMO_FOLDER
    raise UsageError(
        f"{facts.name} is not installed", hint="Use --model demo, or the folder of a model package."
    )


def load_model(
    name_or_folder: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    vae: str | Path | None = None,
    quantize: str = "none",
    quantize_text: str = "none",
    offload: str = "none",
) -> VideoModel:
    """Verify a package and load it: `open_model(...).load()`."""
    return open_model(
        name_or_folder,
        device=device,
        dtype=dtype,
        vae=vae,
        quantize=quantize,
        quantize_text=quantize_text,
        offload=offload,
    ).load()


def open_model(
    name_or_folder: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    vae: str | Path | None = None,
    quantize: str = "none",
    quantize_text: str = "none",
    offload: str = "none",
) -> ModelSource:
    """Verify a package and decide how it will be loaded; no tensor is read.

    Args:
        device:        "auto", "cpu", "cuda", "cuda:N".
        dtype:         "auto", "bf16", "fp16", "fp32"; of transformer, compressor, codec and text encoder.
        vae:           None or the package's own kind ("tiny", "wan"), or a folder with a VAE of the same latents.
        quantize:      "none", or a mode of `quantize` for the linears of the transformer's layers.
        quantize_text: "none" or "int8", for those of the text encoder.
        offload:       "none"; "text" runs the text encoder on the CPU; "all" also keeps the transformer's layers in
                       host memory and copies each to the GPU while it runs.
    Raises: UsageError, EnvironmentProblem (no such device, or it cannot run what is asked for), WeightsError (a
        file that is not what the manifest says).
    """
    folder = find_package(name_or_folder)
    chosen_device = resolve_device(device)
    chosen_dtype = resolve_dtype(dtype, chosen_device)
    catalog.check_offload(offload, chosen_device.type)
    text_device = chosen_device if offload == "none" else torch.device("cpu")
    if quantize != "none":
        require_support(quantize, chosen_device)
    manifest = read_manifest(folder)
    missing = [part for part in REQUIRED_PARTS if part not in manifest.parts]
    if missing:
        raise WeightsError(
            f"{folder} has no {', no '.join(missing)}: it cannot make a video",
            hint="Finish its training first.",
        )
    vae_folder = _vae_folder(folder, manifest, vae)
    verify_package(folder, manifest)
    transformer_config = TransformerConfig.from_dict(
        _config_of(folder / manifest.parts["transformer"], "WanTransformer3DModel")
    )
    text = TextIdentity(
        encoder=_combined(manifest.part_hash("text_encoder"), manifest.part_hash("tokenizer")),
        length=manifest.text_length,
        width=transformer_config.text_dim,
        numerics=f"{dtype_name(chosen_dtype)} {text_device.type} {quantize_text}",
        vocabulary=manifest.vocabulary,
    )

    def load_text_encoder() -> TextEncoder:
        return TextEncoder.load(
            folder / manifest.parts["text_encoder"],
            folder / manifest.parts["tokenizer"],
            max_length=manifest.text_length,
            device=text_device,
            dtype=chosen_dtype,
            quantize=None if quantize_text == "none" else quantizer(quantize_text, text_device, chosen_dtype),
        )

    def load() -> VideoModel:
        transformer = load_transformer(
            folder / manifest.parts["transformer"],
            device=chosen_device,
            dtype=chosen_dtype,
            quantize=quantize,
            stream_layers=offload == "all",
        )
        compressor = None
        if "compressor" in manifest.parts:
            compressor = load_compressor(
                folder / manifest.parts["compressor"], device=chosen_device, dtype=chosen_dtype
            )
            if compressor.config.dim != transformer.config.dim:
                raise WeightsError(
                    f"the compressor of {folder} makes tokens of width {compressor.config.dim}, "
                    f"its transformer has {transformer.config.dim}",
                    hint=_AGAIN,
                )
        codec = load_codec(vae_folder, device=chosen_device, dtype=chosen_dtype)
        _check_codec(manifest, codec, transformer.config.in_channels, own=vae_folder.parent == folder)
        return VideoModel(
            name=manifest.name,
            manifest=manifest,
            folder=folder,
            transformer=transformer,
            compressor=compressor,
            codec=codec,
            load_text_encoder=load_text_encoder,
            text=text,
            device=chosen_device,
            dtype=chosen_dtype,
            quantize=quantize,
        )

    return ModelSource(
        name=manifest.name,
        manifest=manifest,
        folder=folder,
        load_text_encoder=load_text_encoder,
        text=text,
        load=load,
        device=chosen_device,
        dtype=chosen_dtype,
    )


def _combined(*hashes: str) -> str:
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def _vae_folder(folder: Path, manifest: Manifest, vae: str | Path | None) -> Path:
    if vae is None or str(vae) == manifest.codec.kind:
        return folder / manifest.parts["vae"]
    catalog.check_vae(manifest.name, manifest.codec.kind, str(vae))
    return Path(vae)


def _check_codec(manifest: Manifest, codec: Codec, in_channels: int, *, own: bool) -> None:
    found = CodecFactsRecord.of(codec).model_dump()
    said = manifest.codec.model_dump()
    keys = list(said) if own else ["latent_channels", "spatial_stride", "temporal_stride"]
    wrong = [f"{key} {found[key]} instead of {said[key]}" for key in keys if found[key] != said[key]]
    if said["latent_channels"] != in_channels:
        wrong.append(f"{said['latent_channels']} latent channels, while the transformer takes {in_channels}")
    if wrong:
        raise WeightsError(
            f"the VAE does not fit model {manifest.name}: {', '.join(wrong)}",
            hint="The VAE and the model belong to different packages.",
        )


def load_transformer(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantize: str = "none",
    stream_layers: bool = False,
) -> WanTransformer:
    """Read a transformer from its folder.

    Args:
        quantize:      a mode of `quantize` for the linears of its layers.
        stream_layers: keep the layers in host memory, to be copied to the device one at a time.
    Raises: WeightsError for another architecture or wrong tensors.
    """
    values = _config_of(folder, "WanTransformer3DModel")
    with torch.device("meta"):
        module = WanTransformer(TransformerConfig.from_dict(values))
    linears = linear_weights(module, LAYERS)
    shrink = None if quantize == "none" else quantizer(quantize, device, dtype)

    def change(name: str, tensor: Tensor) -> Tensor:
        if shrink is not None and name in linears:
            tensor = shrink(tensor)
        if stream_layers and name.startswith(LAYERS):
            tensor = tensor.to("cpu")
            # Pinned memory is copied to the GPU by itself, without a stop at the driver's own buffer.
            tensor = tensor.pin_memory() if device.type == "cuda" else tensor
        return tensor

    module = _filled(module, folder, device, dtype, change)
    if stream_layers:
        module.stream_layers(device)
    return module


def load_compressor(folder: Path, *, device: torch.device, dtype: torch.dtype) -> Compressor:
    """Read a compressor from its folder. Raises: WeightsError for another architecture or wrong tensors."""
    values = _config_of(folder, "Compressor")
    with torch.device("meta"):
        module = Compressor(CompressorConfig.from_dict(values))
    return _filled(module, folder, device, dtype)


def load_codec(folder: Path, *, device: torch.device, dtype: torch.dtype) -> Codec:
    """Read the VAE of a part folder, whichever of the two kinds it is.

    Raises: WeightsError for another architecture or wrong tensors.
    """
    values = _config_of(folder, "TinyAutoencoder", "AutoencoderKLWan")
    if values["_class_name"] == "TinyAutoencoder":
        try:
            config = TinyAutoencoderConfig.from_dict(_public(values))
        except (TypeError, ValueError) as e:
            raise WeightsError(f"{folder / weights.CONFIG} is not valid: {e}", hint=_AGAIN) from e
        with torch.device("meta"):
            tiny = TinyAutoencoder(config)
        return TinyCodec(_filled(tiny, folder, device, dtype))
    with known_import_noise_dropped():
        from diffusers import AutoencoderKLWan
    with torch.device("meta"):
        wan = AutoencoderKLWan.from_config(values)
    try:
        return WanCodec(_filled(wan, folder, device, dtype))
    except ValueError as e:
        raise WeightsError(f"{folder}: {e}", hint="Use the VAE of a Wan2.1 model.") from e


def _config_of(folder: Path, *supported: str) -> dict[str, Any]:
    values = weights.read_config(folder)
    if values.get("_class_name") not in supported:
        raise WeightsError(
            f"{folder} holds {values.get('_class_name') or 'an unnamed architecture'}; supported: "
            f"{', '.join(supported)}",
            hint="Use a Wan2.1 text-to-video model.",
        )
    return values


def _public(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not key.startswith("_")}


def _filled(
    module: M,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    change: Callable[[str, Tensor], Tensor] | None = None,
) -> M:
    tensors = weights.read_tensors(folder, device=device, dtype=dtype, change=change)
    weights.assign(module, tensors, source=str(folder))
    return module


# ----------------------------------------------------------------------------------------- device and dtype

_DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


def resolve_device(device: str | torch.device) -> torch.device:
    """Take a device by name: "auto" is the GPU with most free memory, else the CPU; "cuda" demands that GPU.

    Raises: UsageError for another kind of device, EnvironmentProblem when the GPU asked for is not there.
    """
    name = str(device)
    kind, _, index = name.partition(":")
    if name not in ("auto", "cpu", "cuda") and not (kind == "cuda" and index.isdecimal()):
        raise UsageError(f"unknown device {name!r}", hint="Use auto, cpu, cuda or cuda:N.")
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto" and count == 0:
        return torch.device("cpu")
    if count == 0:
        raise EnvironmentProblem(
            f"--device {name}: PyTorch {torch.__version__} sees no CUDA GPU",
            hint="Use --device cpu, or install a PyTorch build and a driver that match the GPU.",
        )
    if index:
        if int(index) >= count:
            raise EnvironmentProblem(
                f"--device {name}: there {'is' if count == 1 else 'are'} {count} CUDA GPU{'s'[: count - 1]}",
                hint=f"Use a number from 0 to {count - 1}, or --device auto.",
            )
        return torch.device("cuda", int(index))
    free = [torch.cuda.mem_get_info(i)[0] for i in range(count)]
    return torch.device("cuda", free.index(max(free)))


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Take a dtype by name; "auto" is bf16 on a GPU that has it, else fp32. Raises: UsageError if unknown."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bf16 else torch.float32
    if dtype not in _DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}", hint="Use auto, bf16, fp16 or fp32.")
    return _DTYPES[dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """The name `resolve_dtype` takes: bf16, fp16, fp32."""
    return next(name for name, known in _DTYPES.items() if known == dtype)


# -------------------------------------------------------------------------------------------------- writing


def write_package(
    folder: Path,
    manifest: Manifest,
    *,
    transformer: WanTransformer | None = None,
    compressor: Compressor | None = None,
    vae: nn.Module | None = None,
    text_encoder: TextEncoder | UMT5EncoderModel | None = None,
    tokenizer_dir: Path | None = None,
    dtype: torch.dtype | None = None,
    base: Path | None = None,
    leave_out: Collection[str] = (),
    overwrite: bool = False,
) -> Manifest:
    """Write a package: config.json and safetensors of each part, then packforcing.json with all hashes.

    Everything goes into a new folder beside the target, which then takes the target's name: a reader never
    sees half a package. Replacing an existing one takes two renames; a crash between
    them leaves the old one as `.NAME.old-*`.

    Args:
        manifest: its `parts` and `files` are ignored and computed.
        vae:      a TinyAutoencoder or diffusers' AutoencoderKLWan.
        dtype:    of the stored floating-point tensors; None keeps the modules' own.
        base:     a package whose parts are copied where none is given here.
        leave_out: parts of the base not to copy.
        overwrite: replace the folder; files beside its manifest (a README) are kept.
    Returns: the manifest as written.
    Raises: UsageError when the folder exists and overwrite is False; DiskFullError.
    """
    folder = folder.absolute()
    if folder.exists() and not overwrite:
        raise UsageError(f"{folder} exists", hint="Choose another folder, or allow it to be replaced.")
    unfinished = folder.parent / f".{folder.name}.new-{secrets.token_hex(4)}"
    try:
        unfinished.mkdir(parents=True)
        parts: dict[Part, str] = {}
        modules: list[tuple[Part, dict[str, Any], nn.Module]] = []
        if transformer is not None:
            modules.append(("transformer", transformer.config.to_dict(), transformer))
        if compressor is not None:
            modules.append(("compressor", compressor.config.to_dict(), compressor))
        if vae is not None:
            modules.append(("vae", _vae_config(vae), vae))
        for part, values, module in modules:
            weights.save(
                unfinished / part, values, module.state_dict(), dtype=dtype, file_name=_FILE_NAMES[part]
            )
            parts[part] = part
        if text_encoder is not None:
            model = text_encoder.model if isinstance(text_encoder, TextEncoder) else text_encoder
            weights.save(unfinished / "text_encoder", *encoder_parts(model), dtype=dtype)
            parts["text_encoder"] = "text_encoder"
        if tokenizer_dir is not None:
            shutil.copytree(tokenizer_dir, unfinished / "tokenizer")
            parts["tokenizer"] = "tokenizer"
        if base is not None:
            for part, place in read_manifest(base).parts.items():
                if part not in parts and part not in leave_out:
                    shutil.copytree(base / place, unfinished / part)
                    parts[part] = part
        if folder.is_dir():
            for note in folder.iterdir():
                if note.is_file() and note.name != MANIFEST:
                    shutil.copy2(note, unfinished / note.name)
        files = {
            path.relative_to(unfinished).as_posix(): _record(path)
            for part in parts.values()
            for path in sorted((unfinished / part).rglob("*"))
            if path.is_file()
        }
        written = Manifest.model_validate(
            manifest.model_dump(by_alias=True) | {"schema": SCHEMA, "parts": parts, "files": files}
        )
        (unfinished / MANIFEST).write_text(written.to_json(), "utf-8")
        for path in unfinished.rglob("*"):
            _sync(path)
        _move_into_place(unfinished, folder)
    except OSError as e:
        if e.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            raise DiskFullError(
                f"no space left to write {folder}", hint="Free some space and try again."
            ) from e
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return written


_FILE_NAMES = {
    "transformer": "diffusion_pytorch_model.safetensors",  # diffusers' name
    "vae": "diffusion_pytorch_model.safetensors",
    "compressor": "model.safetensors",
}


def _vae_config(vae: nn.Module) -> dict[str, Any]:
    if isinstance(vae, TinyAutoencoder):
        return {"_class_name": "TinyAutoencoder", **vae.config.to_dict()}
    config: Any = vae.config
    return {"_class_name": type(vae).__name__, **_public(dict(config))}


def _record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        return FileRecord(sha256=hashlib.file_digest(file, "sha256").hexdigest(), size=path.stat().st_size)


def _sync(path: Path) -> None:
    if path.is_file():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _move_into_place(new: Path, folder: Path) -> None:
    if not folder.exists():
        new.rename(folder)
        return
    old = folder.parent / f".{folder.name}.old-{secrets.token_hex(4)}"
    folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old)
