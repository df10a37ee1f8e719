"""Model packages on disk: their manifest, where their parts lie, whether every file is what it should be.

    name, hf:owner/repo[@revision] or folder -> the package's folder -> manifest -> the folder of each part

    NAME/packforcing.json   what the model is, how it is run, sha256 and size of every file of every part
    NAME/transformer/ ...   parts the package holds itself
    the Hub's own cache     parts it refers to: repository, commit, subfolder and the files' hashes

Installed packages are folders in the user's cache (platformdirs). One that was pulled from the Hub is a manifest and
nothing else. Reads no tensors and asks no network.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from packforcing_cli import catalog, hub
from packforcing_cli.catalog import ModelFacts
from packforcing_cli.config import COMPRESSORS
from packforcing_cli.errors import REINSTALL, OfflineError, UsageError, WeightsError

MANIFEST = "packforcing.json"
SCHEMA = 1

Part = Literal["transformer", "vae", "text_encoder", "tokenizer", "compressor"]
REQUIRED_PARTS: tuple[Part, ...] = ("transformer", "vae", "text_encoder", "tokenizer")

_AGAIN = f"Get the package again; for the demo, {REINSTALL}."
REMEMBERED_FROM = 16 << 20  # bytes; smaller files are hashed every time


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


class _HasFacts(Protocol):
    """A codec of `vae`, which this file does not import: it would load torch."""

    @property
    def facts(self) -> Any: ...


class CodecFactsRecord(_Frozen):
    """What the latents of this model are; must agree with the VAE in the package."""

    kind: Literal["tiny", "wan"]
    latent_channels: int = Field(ge=1)
    spatial_stride: int = Field(ge=1)
    temporal_stride: int = Field(ge=1)
    pixel_range: tuple[float, float]
    encode_lookahead: int = Field(0, ge=0)

    @classmethod
    def of(cls, codec: _HasFacts) -> CodecFactsRecord:
        """The facts of a codec, as the manifest stores them."""
        facts = codec.facts
        return cls(
            kind=facts.kind,
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


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    if not path.isprintable():
        raise ValueError(f"{path!r} has a character that cannot be printed")
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or ":" in path or str(pure) in ("", "."):
        raise ValueError(f"{path!r} is not a path inside the package")
    return path


class HubReference(_Frozen):
    """A part that lies in a Hub repository, and in the Hub's cache once it was pulled.

    revision:  a commit, so that the files cannot change.
    subfolder: the part's folder there; empty = the repository itself.
    files:     path below `subfolder` -> size and hash, for every file of the part.
    """

    repo: str
    revision: str = Field(pattern=r"^[0-9a-f]{40}$")
    subfolder: str = ""
    files: dict[str, FileRecord] = Field(min_length=1)

    @field_validator("repo")
    @classmethod
    def _a_repo(cls, value: str) -> str:
        try:
            hub.check_repo(value)
        except UsageError as error:
            raise ValueError(error.message) from error
        return value

    @model_validator(mode="after")
    def _paths_stay_inside(self) -> HubReference:
        for path in (*self.files, *([self.subfolder] if self.subfolder else [])):
            _inside(path)
        return self

    def path_in_repo(self, name: str) -> str:
        """The path in the repository of one of `files`."""
        return f"{self.subfolder}/{name}" if self.subfolder else name


class Manifest(_Frozen):
    """packforcing.json. `parts` and `files` are filled in by `registry.write_package`.

    size:           (width, height) in pixels.
    trained_frames: latent frames of the longest distance seen in training (the range of temporal slots).
    text_length:    tokens of a prompt, padding included.
    vocabulary:     words the model was trained on; empty when it is open.
    limits:         what it cannot do, one sentence each.
    start_image:    whether it was trained with the first latent frame of a video given.
    flow_schedule:  of a few-step student, how its teacher is sampled, and what flow matching makes of the student.
    provenance:     recipe, data, steps, measured figures.
    parts:          part -> folder inside the package.
    references:     part -> where it is on the Hub; a part is either here or in `parts`.
    files:          path inside the package -> size and hash, for every file of every part in `parts`.
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
    flow_schedule: Schedule | None = None
    codec: CodecFactsRecord
    vocabulary: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    start_image: bool = False
    provenance: dict[str, Any] = Field(default_factory=dict)
    parts: dict[Part, str] = Field(default_factory=dict)
    references: dict[Part, HubReference] = Field(default_factory=dict)
    files: dict[str, FileRecord] = Field(default_factory=dict)

    @field_validator("parts", "files")
    @classmethod
    def _inside_the_package(cls, value: dict[str, Any]) -> dict[str, Any]:
        for path in [*value, *(v for v in value.values() if isinstance(v, str))]:
            if PurePosixPath(_inside(path)).parts[0].casefold() == MANIFEST:
                raise ValueError(f"{path!r} is the manifest itself")
        return value

    @model_validator(mode="after")
    def _each_part_once(self) -> Manifest:
        twice = self.parts.keys() & self.references.keys()
        if twice:
            raise ValueError(f"{sorted(twice)[0]} is both in the package and on the Hub")
        return self

    @property
    def missing_parts(self) -> tuple[Part, ...]:
        """Parts without which no video can be made."""
        return tuple(p for p in REQUIRED_PARTS if p not in self.parts and p not in self.references)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, wherever they lie."""
        referred = (record for ref in self.references.values() for record in ref.files.values())
        return sum(record.size for record in (*self.files.values(), *referred))

    def part_files(self, part: Part) -> dict[str, FileRecord]:
        """Name below the part's folder -> size and hash."""
        if part in self.references:
            return self.references[part].files
        place = PurePosixPath(self.parts[part])
        inside = {name: record for name, record in self.files.items() if place in PurePosixPath(name).parents}
        return {str(PurePosixPath(name).relative_to(place)): record for name, record in inside.items()}

    def part_hash(self, part: Part) -> str:
        """One hash that changes with any file of a part."""
        return hash_of(self.part_files(part))

    def to_json(self) -> str:
        """The text of packforcing.json. What a package does not use is left out."""
        values = self.model_dump(mode="json", by_alias=True)
        if not self.references:
            del values["references"]
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def hash_of(files: Mapping[str, FileRecord]) -> str:
    """One hash that changes with any of some files: name -> size and hash."""
    lines = [f"{name} {record.sha256}" for name, record in sorted(files.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def records_of(facts: ModelFacts) -> dict[str, Any]:
    """What a manifest says of a model that only the catalog describes: all but its name, version and origin."""
    schedule = facts.schedule
    return {
        "title": facts.title,
        "license": facts.license,
        "size": facts.default_size,
        "fps": facts.fps,
        "trained_frames": facts.trained_frames,
        "text_length": facts.text_length,
        "cache": CacheDefaults(
            frames_per_block=facts.frames_per_block,
            mid_span=str(facts.span_for(facts.frames_per_block)),
            compressor="lr",  # no trained compressor was published for these weights
        ),
        "schedule": Schedule(
            kind=schedule.kind,
            steps=schedule.num_steps,
            shift=schedule.shift,
            guidance=schedule.guidance,
            timesteps=schedule.steps if schedule.kind == "renoise" else (),
        ),
        "codec": CodecFactsRecord(
            kind=facts.codec,
            latent_channels=facts.latent_channels,
            spatial_stride=facts.spatial_stride,
            temporal_stride=facts.temporal_stride,
            pixel_range=(0.0, 1.0) if facts.codec == "tiny" else (-1.0, 1.0),
            # A VAE of its own is TAEHV, which looks ahead; the demo's tiny one does not.
            encode_lookahead=facts.temporal_stride - 1 if facts.kind == "vae" else 0,
        ),
    }


def read_manifest(folder: Path) -> Manifest:
    """Read and validate packforcing.json of a package folder.

    Raises: WeightsError when it is missing, not valid, or of a newer schema than this program knows.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError as e:
        raise WeightsError(
            f"{folder} is not a model package: it has no {MANIFEST}",
            hint="Check the path, or use --model demo.",
        ) from e
    except (OSError, ValueError) as e:
        raise WeightsError(f"{path} cannot be read: {e}", hint=_AGAIN) from e
    return parse_manifest(text, str(path))


def parse_manifest(text: str, path: str) -> Manifest:
    """The manifest in a text. Raises: WeightsError as `read_manifest`, naming `path`."""
    try:
        values = json.loads(text)
    except ValueError as e:
        raise WeightsError(f"{path} cannot be read: {e}", hint=_AGAIN) from e
    schema = values.get("schema") if isinstance(values, dict) else None
    if not isinstance(schema, int):
        raise WeightsError(f"{path} is not a packforcing manifest: it has no schema number", hint=_AGAIN)
    if schema > SCHEMA:
        raise WeightsError(
            f"{path} has schema {schema}; this program reads up to {SCHEMA}",
            hint=f"{REINSTALL.capitalize()}.",
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
    models: list[type[BaseModel]] = [Manifest, CacheDefaults, Schedule, CodecFactsRecord, HubReference]
    known = [field.alias or name for model in models for name, field in model.model_fields.items()]
    near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
    return f"unknown key {where}" + (f"; did you mean {near[0]}?" if near else "")


# --------------------------------------------------------------------------------------------------- places


@dataclass(frozen=True)
class HubSource:
    """hf:owner/repo[@revision]."""

    repo: str
    revision: str = "main"

    @classmethod
    def parse(cls, text: str) -> HubSource | None:
        """None if this is no hf: source. Raises: UsageError if it is a wrong one."""
        if not text.startswith("hf:"):
            return None
        repo, at, revision = text.removeprefix("hf:").partition("@")
        hub.check_repo(repo)
        if at and not re.fullmatch(r"[\w.-]+", revision):
            raise UsageError(
                f"{text} has no commit, tag or branch after the @", hint="Leave the @ out for the newest one."
            )
        return cls(repo, revision or "main")

    def __str__(self) -> str:
        return f"hf:{self.repo}" + ("" if self.revision == "main" else f"@{self.revision}")

    @property
    def folder_name(self) -> str:
        """The name it is installed under: distinct, and a folder name on every platform."""
        return re.sub(r"[^\w.-]", "--", str(self))


def models_folder() -> Path:
    """Where installed packages are: a folder each, in the user's cache."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("packforcing", appauthor=False)) / "models"


def install_folder(name: str) -> Path:
    """Where a package of this name (or hf: source) is installed, whether it is there or not.

    Raises: UsageError for a name that cannot be a folder.
    """
    source = HubSource.parse(name)
    if source is not None:
        facts = catalog.of_repo(source.repo)
        known = facts is not None and source.revision == "main"
        return models_folder() / (facts.name if facts is not None and known else source.folder_name)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UsageError(f"{name!r} is not a model's name", hint="packforcing models list shows all of them.")
    return models_folder() / name


def installed() -> Iterator[Path]:
    """Folders of installed packages, complete or not, by name."""
    with suppress(FileNotFoundError):
        for folder in sorted(models_folder().iterdir()):
            if not folder.name.startswith(".") and (folder / MANIFEST).is_file():
                yield folder


def name_of(folder: Path) -> str:
    """What a person calls the package in a folder: the name it is installed under, or the path."""
    if folder.parent != models_folder():
        return str(folder)
    return re.sub(
        r"^hf--(.+?)--(.+?)(?:--(.+))?$",
        lambda m: f"hf:{m[1]}/{m[2]}" + (f"@{m[3]}" if m[3] else ""),
        folder.name,
    )


def find_package(name_or_folder: str | Path) -> Path:
    """The folder of a model given by name, hf: source or path. A name wins over a folder of that name (use ./NAME).

    Raises: UsageError for a family (facts without weights), an unknown name, or a folder that does not exist;
        OfflineError for a known model that is not installed.
    """
    name = str(name_or_folder)
    if name_or_folder == "demo":  # a Path of that name is a folder
        return catalog.DEMO_FOLDER
    folder = Path(name).expanduser()
    if isinstance(name_or_folder, Path) and not name.startswith("hf:"):
        return _existing(folder, name)
    source = HubSource.parse(name)
    known = None if source else catalog.find(name)
    if known is not None:
        name = known.name
    if source is None and known is None:
        if folder.is_file() and folder.suffix == ".tar":
            raise UsageError(
                f"{name} is a bundle, which is not installed",
                hint=f"Install it: packforcing models pull {name}",
            )
        if folder.is_dir() or os.sep in name or name.startswith((".", "~")):
            return _existing(folder, name)
        at = models_folder() / name
        if (at / MANIFEST).is_file():
            return at
        known = catalog.get(name, also=[p.name for p in installed()])  # UsageError with the nearest names
    if known is not None:
        known.require_weights()
        if known.name == "demo":
            return catalog.DEMO_FOLDER
    at = install_folder(name)
    if not (at / MANIFEST).is_file():
        about = f" ({known.download_bytes / 1e9:.1f} GB to download, {known.license})" if known else ""
        raise OfflineError(f"{name} is not installed{about}", hint=f"packforcing models pull {name}")
    return at


def _existing(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise UsageError(f"there is no model folder {name}", hint="Check the path, or use --model demo.")
    return folder


def part_folder(folder: Path, manifest: Manifest, part: Part) -> Path:
    """Where a part lies: in the package, or in the Hub's cache.

    Raises: WeightsError if the package has no such part.
    """
    if part in manifest.parts:
        return folder / manifest.parts[part]
    if part not in manifest.references:
        raise WeightsError(f"{folder} has no {part}", hint=_unfinished_hint(manifest))
    reference = manifest.references[part]
    return hub.snapshot_folder(reference.repo, reference.revision) / reference.subfolder


@dataclass(frozen=True)
class CompressorPlace:
    """Compressor weights that belong to no model, or to another one.

    folder:   of the part.
    package:  the folder of the package it is a part of, and its manifest; None for a part's folder alone.
    """

    folder: Path
    package: tuple[Path, Manifest] | None

    def verify(self) -> str:
        """Check every file against the manifest where there is one. Returns: one hash over the files.

        Raises: WeightsError, OfflineError as `verify_package`.
        """
        if self.package is None:
            files = sorted(path for path in self.folder.iterdir() if path.is_file())
            return hash_of({path.name: record_of(path) for path in files})
        folder, manifest = self.package
        own = manifest.part_files("compressor")
        place = manifest.parts.get("compressor")
        changes = {
            "parts": {} if place is None else {"compressor": place},
            "references": {p: ref for p, ref in manifest.references.items() if p == "compressor"},
            "files": {} if place is None else {f"{place}/{name}": record for name, record in own.items()},
        }
        verify_package(folder, manifest.model_copy(update=changes), trust=True)
        return manifest.part_hash("compressor")


def find_compressor(name_or_folder: str) -> CompressorPlace:
    """Compressor weights by an installed package's name, a package's folder, or the folder of the part itself.

    Raises: UsageError for an unknown name or folder; WeightsError if there is no compressor; OfflineError for a known
        model that is not installed.
    """
    folder = find_package(name_or_folder)
    if not (folder / MANIFEST).is_file():
        return CompressorPlace(folder, None)
    manifest = read_manifest(folder)
    if "compressor" not in manifest.parts and "compressor" not in manifest.references:
        raise WeightsError(
            f"{name_or_folder} has no trained compressor", hint="Use --compressor lr, which needs no weights."
        )
    return CompressorPlace(part_folder(folder, manifest, "compressor"), (folder, manifest))


def with_compressor(facts: ModelFacts, wanted: str) -> ModelFacts:
    """The facts of a model with the compressor that is asked for; the same ones for a compressor by kind.

    Raises: as `find_compressor`, and WeightsError if it does not fit the model.
    """
    if wanted in COMPRESSORS:
        return facts
    return catalog.with_compressor(facts, find_compressor(wanted).folder)


def require_complete(folder: Path, manifest: Manifest) -> None:
    """Raises: WeightsError if a part is missing without which no video can be made."""
    if manifest.missing_parts:
        raise WeightsError(
            f"{folder} has no {', no '.join(manifest.missing_parts)}: it cannot make a video",
            hint=_unfinished_hint(manifest),
        )


def _unfinished_hint(manifest: Manifest) -> str:
    if "pickled" in manifest.provenance:
        return f"Its weights are pickles and have to be converted: packforcing models convert {manifest.name}"
    return "Finish its training first."


def facts(model: str) -> ModelFacts:
    """Facts of a model by name, hf: source or folder: those of the package where one is there, else the catalog's.

    Raises: UsageError for an unknown name, naming the nearest; WeightsError for a folder that is not a package;
        OfflineError for an hf: source that was not pulled.
    """
    random = catalog.of_random(model)
    if random is not None:
        return random
    known = catalog.find(model)
    if known is not None and (
        known.name == "demo"
        or known.kind == "family"
        or not (install_folder(known.name) / MANIFEST).is_file()
    ):
        return catalog.of(known.name)
    folder = find_package(model)
    manifest = read_manifest(folder)
    if known is not None and manifest.missing_parts:
        return known
    require_complete(folder, manifest)
    everything: tuple[Part, ...] = (*manifest.parts, *manifest.references)
    return catalog.of_package(folder, {part: part_folder(folder, manifest, part) for part in everything})


def absent_files(manifest: Manifest) -> list[tuple[HubReference, str]]:
    """Files of referenced parts that are not in the Hub's cache, or not whole."""
    absent = []
    for reference in manifest.references.values():
        for name, record in reference.files.items():
            path = hub.cached(reference.repo, reference.revision, reference.path_in_repo(name))
            if path is None or path.stat().st_size != record.size:
                absent.append((reference, name))
    return absent


@dataclass(frozen=True)
class Download:
    """A part that is not on this machine. part: "pickled" for weights that are to be converted."""

    part: str
    repo: str
    size_bytes: int


def downloads(model: str) -> list[Download]:
    """What would have to be fetched to use a model or VAE, by what is known without a network.

    Raises: as `find_package`, but not for a known model that is not installed.
    """
    known = catalog.find(model)
    if known is None or known.name == "demo" or (install_folder(known.name) / MANIFEST).is_file():
        folder = (
            install_folder(known.name) if known is not None and known.kind == "vae" else find_package(model)
        )
        manifest = read_manifest(folder)
        absent = absent_files(manifest)
        return [
            Download(
                part,
                reference.repo,
                sum(reference.files[name].size for at, name in absent if at is reference),
            )
            for part, reference in manifest.references.items()
            if any(at is reference for at, _ in absent)
        ]
    known_parts = [*known.parts.items(), *(("pickled", source) for source in known.pickled)]
    here = {
        (reference.repo, reference.revision, reference.subfolder)
        for folder in installed()
        for reference in _whole_references(folder)
    }
    return [
        Download(part, source.repo, source.size_bytes)
        for part, source in known_parts
        if (source.repo, source.revision, source.subfolder) not in here
    ]


def _whole_references(folder: Path) -> list[HubReference]:
    """Referenced parts of an installed package of which every file is here; none of a package that cannot be read."""
    try:
        manifest = read_manifest(folder)
    except WeightsError:
        return []
    absent = absent_files(manifest)
    return [
        reference
        for reference in manifest.references.values()
        if not any(at is reference for at, _ in absent)
    ]


# --------------------------------------------------------------------------------------------- verification


def verify_package(folder: Path, manifest: Manifest, *, trust: bool = False) -> None:
    """Check presence, size and sha256 of every file, and that no part holds unlisted weights or configs.

    Args:
        trust: do not hash a large file again that was found good and has kept its size and time since. Loading
            does so; bytes that rot on the disk are found by `models verify`.
    Raises: WeightsError naming the first bad file and what is wrong with it; OfflineError if a file of a
        referenced part is not in the Hub's cache.
    """
    known = Verified.read()
    for path, record in _package_files(folder, manifest):
        verify_file(path, record, known if trust else None)
        known.add(path, record)
    known.write()


def _package_files(folder: Path, manifest: Manifest) -> Iterator[tuple[Path, FileRecord]]:
    for part, place in manifest.parts.items():
        if not manifest.part_files(part):
            raise WeightsError(f"the manifest of {folder} lists no file of its part {part}", hint=_AGAIN)
        _refuse_unlisted(folder / place, set(manifest.part_files(part)))
    for name, record in manifest.files.items():
        yield folder / name, record
    for part, reference in manifest.references.items():
        place_there = hub.snapshot_folder(reference.repo, reference.revision) / reference.subfolder
        for name, record in reference.files.items():
            if not (place_there / name).is_file():
                raise OfflineError(
                    f"{reference.path_in_repo(name)} of {reference.repo}, which {manifest.name} needs, is not"
                    f" on this machine",
                    hint=f"packforcing models pull {name_of(folder)}",
                )
            yield place_there / name, record
        if reference.subfolder:
            _refuse_unlisted(part_folder(folder, manifest, part), set(reference.files))


def _refuse_unlisted(folder: Path, listed: set[str]) -> None:
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".json") and path.relative_to(folder).as_posix() not in listed:
            raise WeightsError(f"{path} is not listed in the manifest", hint="Remove it. " + _AGAIN)


def refuse_stand_in(path: Path, head: bytes) -> None:
    """Refuse what is often found in place of weights, by the first bytes of a file.

    Raises: WeightsError for a Git LFS pointer or a web page.
    """
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise WeightsError(
            f"{path} is a Git LFS pointer, not the file it stands for",
            hint="Run `git lfs pull` where it was cloned, or download the file itself.",
        )
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise WeightsError(
            f"{path} is a web page (an error page saved under that name)", hint="Download the file again."
        )


def verify_file(path: Path, record: FileRecord, known: Verified | None = None) -> None:
    """Check one file against its size and hash.

    Args:
        known: files that need not be hashed again.
    Raises: WeightsError: missing, a Git LFS pointer, a web page, truncated, too long, or other bytes.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
            refuse_stand_in(path, head)
            if size < record.size:
                raise WeightsError(f"{path} is truncated: {size} of {record.size} bytes", hint=_AGAIN)
            if size > record.size:
                raise WeightsError(f"{path} has {size} bytes instead of {record.size}", hint=_AGAIN)
            if known is not None and known.holds(path, record):
                return
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


class Verified:
    """Large files that were found good: path -> size, time of change, sha256. A note in the user's cache."""

    def __init__(self, entries: dict[str, list[Any]]) -> None:
        self._entries = entries
        self._changed = False

    @classmethod
    def read(cls) -> Verified:
        try:
            entries = json.loads(_note_path().read_text("utf-8"))
        except (OSError, ValueError):  # not there, or not ours: everything is hashed again
            entries = {}
        return cls(entries if isinstance(entries, dict) else {})

    def holds(self, path: Path, record: FileRecord) -> bool:
        return self._entries.get(str(path)) == self._entry(path, record)

    def add(self, path: Path, record: FileRecord) -> None:
        if record.size >= REMEMBERED_FROM and not self.holds(path, record):
            self._entries[str(path)] = self._entry(path, record)
            self._changed = True

    def write(self) -> None:
        if not self._changed:
            return
        with suppress(OSError):  # a cache that cannot be written costs time only
            here = {path: entry for path, entry in self._entries.items() if Path(path).exists()}
            write_text(_note_path(), json.dumps(here))

    @staticmethod
    def _entry(path: Path, record: FileRecord) -> list[Any]:
        found = path.stat()
        return [found.st_size, found.st_mtime_ns, record.sha256]


def _note_path() -> Path:
    return models_folder().parent / "verified.json"


def record_of(path: Path) -> FileRecord:
    """Size and hash of a file."""
    with path.open("rb") as file:
        return FileRecord(sha256=hashlib.file_digest(file, "sha256").hexdigest(), size=path.stat().st_size)


def write_text(path: Path, text: str) -> None:
    """Write a small file as a whole: a reader sees the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
