"""What is known about a model without loading it: shapes, sizes, licences, where its parts are, from models.toml.

A `package` can generate; a `family` has the facts that planning and bench need; a `vae` can stand in for another
one. Knows no weights, no tensors, and not what is installed (`packages` does).
"""

from __future__ import annotations

import difflib
import json
import math
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from packforcing_cli.errors import EnvironmentProblem, UsageError, WeightsError
from packforcing_cli.layout import Grid, Span

TIME_EMBEDDING = 256  # channels of the sinusoidal timestep embedding (Wan 2.1)
WEIGHT_BYTES = 2  # packages hold 16-bit weights
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file, as its own library allows
RANDOM = "random:"  # before the name of a model: its shape with random weights
MAX_RANDOM_LAYERS = 100
DEMO_FOLDER = Path(__file__).parent / "demo"
RECOMMENDED = "wan2.1-1.3b-self-forcing"  # what --model auto offers: safetensors, no conversion


@dataclass(frozen=True)
class ScheduleFacts:
    """How a model is sampled by default.

    kind:     "renoise" (few-step students) or "euler".
    steps:    renoise: the training timesteps visited, falling. euler: a single number, how many steps.
    shift:    flow-matching time shift.
    guidance: classifier-free guidance scale, 1 = none.
    """

    kind: Literal["renoise", "euler"]
    steps: tuple[int, ...]
    shift: float
    guidance: float

    @property
    def num_steps(self) -> int:
        return len(self.steps) if self.kind == "renoise" else self.steps[0]


@dataclass(frozen=True)
class PartSource:
    """Where one part of a model is on the Hub; models.toml explains the entries.

    revision: a commit, or a branch where no commit is known.
    files:    names or patterns below `subfolder`.
    """

    repo: str
    revision: str
    subfolder: str
    files: tuple[str, ...]
    size_bytes: int
    license: str
    sha256: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelFacts:
    """Facts of one model; models.toml explains the entries.

    default_size:     (width, height) in pixels.
    trained_by_block: latent frames seen in training, by frames_per_block.
    span_by_block:    default slots of a mid block, by frames_per_block, as written in models.toml.
    codec:            kind of the VAE, "wan" or "tiny".
    cache:            memory options the model was trained with, by name; empty = the general defaults.
    compressor_params, text_embedding_params: parameters of the HR branch, and of the text encoder's embedding.
    branches:         trained branches of its compressor, "hr+lr" or "hr"; "lr" without one: LR needs no weights.
    parts:            part -> where it is on the Hub; empty for a model that is not fetched from there.
    pickled:          pickled checkpoints that `models convert` makes the transformer of: the network, then a LoRA.
    ema:              whether their averaged weights are meant; None = averaged where there are any.
    """

    name: str
    kind: Literal["package", "family", "vae"]
    title: str
    license: str
    frames_per_block: int
    layers: int
    heads: int
    head_dim: int
    ffn_dim: int
    latent_channels: int
    text_dim: int
    text_length: int
    default_size: tuple[int, int]
    fps: int
    trained_by_block: Mapping[int, int]
    span_by_block: Mapping[int, str]
    schedule: ScheduleFacts
    text_params: int
    vae_params: int
    install: str
    codec: Literal["wan", "tiny"] = "wan"
    cache: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    branches: str = "lr"
    compressor_params: int = 0
    text_embedding_params: int = 0
    patch: tuple[int, int, int] = (1, 2, 2)
    spatial_stride: int = 8
    temporal_stride: int = 4
    parts: Mapping[str, PartSource] = field(default_factory=dict)
    pickled: tuple[PartSource, ...] = ()
    ema: bool | None = None
    license_note: str = ""

    @property
    def is_random(self) -> bool:
        """Whether its weights are random, made on the device when it is loaded."""
        return self.name.startswith(RANDOM)

    @property
    def download_bytes(self) -> int:
        """Bytes that installing it fetches when nothing of it is there; 0 when it is not fetched from the Hub."""
        return sum(source.size_bytes for source in (*self.parts.values(), *self.pickled))

    @property
    def dim(self) -> int:
        """Width of the transformer."""
        return self.heads * self.head_dim

    @property
    def trained_frames(self) -> int:
        """Latent frames seen in training, at the model's own frames_per_block."""
        return self.trained_for(self.frames_per_block)

    @property
    def pixel_multiple(self) -> int:
        """Width and height must be multiples of this many pixels."""
        return self.spatial_stride * self.patch[1]

    @property
    def transformer_params(self) -> int:
        """Parameters of the diffusion transformer, counted from its shape (docs/method.md 1.1)."""
        d, patch_values = self.dim, self.latent_channels * self.patch[0] * self.patch[1] * self.patch[2]

        def linear(inputs: int, outputs: int) -> int:
            return inputs * outputs + outputs

        text = linear(self.text_dim, d) + linear(d, d)
        time = linear(TIME_EMBEDDING, d) + linear(d, d) + linear(d, 6 * d)
        head = 2 * d + linear(d, patch_values)
        return linear(patch_values, d) + text + time + self.layers * self.layer_params + head

    @property
    def layer_matrices(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of the weights of one layer's linears: what quantization makes smaller."""
        d = self.dim
        return (*(((d, d),) * 8), (self.ffn_dim, d), (d, self.ffn_dim))

    @property
    def layer_params(self) -> int:
        """Parameters of one layer."""
        d = self.dim
        return sum(rows * cols + rows for rows, cols in self.layer_matrices) + 4 * d + 2 * d + 6 * d

    @property
    def params(self) -> int:
        """Parameters of transformer, text encoder and VAE."""
        return self.transformer_params + self.text_params + self.vae_params

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights at 16 bit, without the compressor."""
        return self.params * WEIGHT_BYTES

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """The frames_per_block this model is known with."""
        return tuple(self.trained_by_block)

    def _known_block(self, frames_per_block: int) -> int:
        if frames_per_block not in self.trained_by_block:
            known = ", ".join(str(n) for n in self.block_sizes)
            raise UsageError(
                f"{self.name} is not known with {frames_per_block} frames per block",
                hint=f"Use --frames-per-block {known}."
                if len(self.block_sizes) == 1
                else f"Use one of {known}.",
            )
        return frames_per_block

    def trained_for(self, frames_per_block: int) -> int:
        """Latent frames seen in training. Raises: UsageError for a block size the model is not known with."""
        return self.trained_by_block[self._known_block(frames_per_block)]

    def span_for(self, frames_per_block: int) -> Span:
        """Default slots of a mid block. Raises: UsageError for a block size the model is not known with."""
        text = self.span_by_block[self._known_block(frames_per_block)]
        if text == "fit":
            return "fit"
        return Fraction(frames_per_block) if text == "block" else Fraction(text)

    def grid(
        self, size: tuple[int, int], frames_per_block: int, *, dtype_bytes: int = 2, identity: bool = False
    ) -> Grid:
        """Token grid of a block at a size (width, height) in pixels.

        Raises: UsageError if the size does not fit the model's token grid; LayoutError if it is too small.
        """
        multiple = self.pixel_multiple
        check_size(size, multiple, name=self.name, default_size=self.default_size)
        width, height = size
        return Grid(
            frames_per_block=frames_per_block,
            rows=height // multiple,
            cols=width // multiple,
            layers=self.layers,
            kv_dim=self.dim,
            heads=self.heads,
            dtype_bytes=dtype_bytes,
            identity=identity,
        )

    @property
    def default_size_text(self) -> str:
        return f"{self.default_size[0]}x{self.default_size[1]}"

    def require_weights(self) -> None:
        """Raises: UsageError for a family, which has no weights to generate with, and for a VAE."""
        if self.kind == "vae":
            raise UsageError(
                f"{self.name} is a VAE, not a model", hint="Use it with a Wan model: --vae tiny."
            )
        if self.kind == "family":
            names = [m.name for m in all_models() if m.kind == "package"]
            member = next((name for name in names if name.startswith(f"{self.name}-")), "demo")
            raise UsageError(
                f"{self.name} is a family of models, known for planning and bench; it has no weights to generate"
                " with",
                hint=f"Use --model {member}, or --model demo, which needs no download.",
            )


def check_size(size: tuple[int, int], multiple: int, *, name: str, default_size: tuple[int, int]) -> None:
    """Raises: UsageError if a size (width, height) in pixels does not fit a model's token grid."""
    width, height = size
    if width < multiple or height < multiple or width % multiple or height % multiple:
        near = "x".join(str(max(multiple, round(side / multiple) * multiple)) for side in size)
        raise UsageError(
            f"size {width}x{height} does not fit: width and height must be multiples of {multiple} pixels",
            hint=f"The nearest size is {near}; {name} was made for {default_size[0]}x{default_size[1]}.",
        )


def check_sampling(
    name: str, kind: str, num_steps: int, *, steps: int | None, guidance: float | None
) -> None:
    """Refuse what a model's schedule cannot do; None = the model's own.

    Args:
        kind:      "renoise" or "euler".
        num_steps: the model's own number of steps.
    Raises: UsageError for guidance, or another number of steps, on a few-step student.
    """
    if kind != "renoise":
        return
    if steps is not None and steps != num_steps:
        raise UsageError(
            f"{name} is a few-step student: it was trained for {num_steps} steps, not {steps}",
            hint="Leave --steps away.",
        )
    if guidance is not None and guidance != 1.0:
        raise UsageError(
            f"guidance {guidance:g} does not work with {name}: it is a few-step student, guidance is distilled"
            " into its weights",
            hint="Leave --guidance away.",
        )


def names_weights(text: str) -> bool:
    """Whether a text can be a place of weights: a path, an hf: source, a known model. Others `packages` may know."""
    known = find(text)
    is_path = text.startswith((".", "~", "hf:")) or os.sep in text or Path(text).is_dir()
    return is_path or (known is not None and known.kind == "package")


def check_compressor(name: str, branches: str, wanted: str) -> None:
    """Raises: UsageError if a compressor needs the HR branch (`wanted`) and the model has none (`branches`)."""
    if wanted in ("hr", "hr+lr") and "hr" not in branches:
        raise UsageError(
            f"{name} has no trained HR branch, which --compressor {wanted} needs",
            hint="Use --compressor lr.",
        )


def vae_kind(vae: str) -> str:
    """Kind of a VAE by its name or its folder, "wan" or "tiny". Raises: WeightsError if there is none."""
    facts = find(vae)
    if facts is not None and facts.kind == "vae":
        return facts.codec
    path = Path(vae) / "config.json"
    kinds = {"AutoencoderKLWan": "wan", "TinyAutoencoder": "tiny"}
    try:
        return kinds[json.loads(path.read_text("utf-8"))["_class_name"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{vae} holds no VAE: {type(error).__name__}: {error}",
            hint="Leave --vae away, or check the folder.",
        ) from error


TINY_VAE = "taew2_1"  # which `--vae tiny` takes
CPU_ATTENTIONS = ("auto", "flash", "math")


def check_cpu(quantize: str, offload: str, attention: str = "auto", *, cuda_graphs: bool = False) -> None:
    """Refuse what makes no sense, or does not work, where the model runs on the CPU.

    Raises: UsageError if weights shall be kept off a GPU; EnvironmentProblem for products in fp8, for a GPU's attention
        and for graphs.
    """
    if attention not in CPU_ATTENTIONS:
        raise EnvironmentProblem(
            f"--attention {attention} needs an NVIDIA GPU, and the model runs on the CPU",
            hint=f"What can run here: {', '.join(CPU_ATTENTIONS)}.",
        )
    if cuda_graphs:
        raise EnvironmentProblem(
            "--cuda-graphs needs an NVIDIA GPU, and the model runs on the CPU", hint="Leave it away."
        )
    if offload != "none":
        raise UsageError(
            f"--offload {offload} keeps weights off a GPU, and the model runs on the CPU",
            hint="Leave --offload away; --quantize int8 makes the weights smaller.",
        )
    if quantize == "fp8":
        raise EnvironmentProblem(
            "--quantize fp8 needs an NVIDIA GPU with fp8 products, and the model runs on the CPU",
            hint="Use --quantize int8 or --quantize fp8-weight, which run everywhere.",
        )


def stand_in(own: str, wanted: str) -> str | None:
    """Name of the VAE of this catalog that stands in for a model's own kind; None = it is another one.

    `tiny` is taew2_1 for a model with the Wan VAE.
    """
    if own != "wan":
        return None
    facts = find(TINY_VAE if wanted == "tiny" else wanted)
    return facts.name if facts is not None and facts.kind == "vae" else None


def check_vae(name: str, own: str, wanted: str) -> None:
    """Raises: UsageError if a VAE (`wanted`) is not the model's own kind, a folder, or a stand-in for a Wan model's."""
    fits = wanted == own or stand_in(own, wanted) is not None
    known = find(wanted)
    is_named = wanted in ("tiny", "wan") or (known is not None and known.kind == "vae")
    if not fits and (is_named or not Path(wanted).is_dir()):
        raise UsageError(
            f"model {name} has the VAE {own!r}; there is no {wanted!r}",
            hint=f"Leave --vae out, or use --vae {own}.",
        )


def check_vae_latents(kind: str, number: int) -> None:
    """Raises: UsageError if a VAE of this kind cannot be told how many latent frames it decodes at a time."""
    if number > 1 and kind != "wan":
        raise UsageError(
            f"--vae-latents {number}: only the Wan VAE decodes in portions; the {kind} VAE takes a block at once",
            hint="Leave --vae-latents away.",
        )


def all_models() -> tuple[ModelFacts, ...]:
    """Every model known by name: packages first. VAEs, which are no models, are left out."""
    models = (facts for facts in _load().values() if facts.kind != "vae")
    return tuple(sorted(models, key=lambda facts: facts.kind != "package"))


def all_vaes() -> tuple[ModelFacts, ...]:
    """Every VAE known by name."""
    return tuple(facts for facts in _load().values() if facts.kind == "vae")


def of_repo(repo: str) -> ModelFacts | None:
    """The model whose transformer (or whose VAE, for a `vae`) lies in a Hub repository; None if there is none."""
    for facts in _load().values():
        own = facts.parts.get("transformer" if facts.kind == "package" else "vae")
        if facts.kind != "family" and own is not None and own.repo.lower() == repo.lower():
            return facts
    return None


def find(name: str) -> ModelFacts | None:
    """Facts of a model or VAE by name, in any case; None if the catalog does not know it."""
    return _load().get(name.lower())


def get(name: str, *, also: Iterable[str] = ()) -> ModelFacts:
    """Facts of a model by name, in any case.

    Args:
        also: further names that may be offered for a wrong one.
    Raises: UsageError naming the nearest known models.
    """
    facts = find(name)
    if facts is not None:
        return facts
    names = dict.fromkeys((*_load(), *also))
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)
    said = f"did you mean {' or '.join(near)}?" if near else f"known models: {', '.join(names)}."
    raise UsageError(f"no model is named {name!r}; {said}", hint="packforcing models list shows all of them.")


def of_random(model: str) -> ModelFacts | None:
    """Facts of `random:NAME`, a model of NAME's shape; None if it is no such name.

    `random:NAME?layers=N&frames-per-block=N` has other sizes; one of the two may be left away.
    Raises: UsageError for an unknown name or option.
    """
    if not model.lower().startswith(RANDOM):
        return None
    name, asked, options = model.lower().removeprefix(RANDOM).partition("?")
    facts = get(name)
    if facts.kind == "vae":
        raise UsageError(f"{facts.name} is a VAE, not a model", hint="Use --model random:wan2.1-1.3b.")
    sizes = {"layers": facts.layers, "frames-per-block": facts.frames_per_block}
    possible = {"layers": range(1, MAX_RANDOM_LAYERS + 1), "frames-per-block": sorted(facts.trained_by_block)}
    for option in options.split("&") if asked else ():
        key, _, number = option.partition("=")
        if not (number.isdecimal() and int(number) in possible.get(key, ())):
            frames = " or ".join(map(str, possible["frames-per-block"]))
            raise UsageError(
                f"{model}: after the ? stands layers=N, N from 1 to {MAX_RANDOM_LAYERS}, or frames-per-block={frames}",
                hint=f"For example --model {RANDOM}{facts.name}?layers=2",
            )
        sizes[key] = int(number)
    return replace(
        facts,
        name=f"{RANDOM}{facts.name}" + (f"?{options}" if asked else ""),
        kind="package",
        title=f"Random weights in the shape of {facts.name}, for bench and tests",
        license="none",
        layers=sizes["layers"],
        frames_per_block=sizes["frames-per-block"],
        text_params=0,
        text_embedding_params=0,
        compressor_params=0,
        branches="lr",
        cache=MappingProxyType({"compressor": "lr"}),
        install="made when it is used",
        parts=MappingProxyType({}),
        pickled=(),
        license_note="",
    )


def of(model: str) -> ModelFacts:
    """Facts of a model by name, or of the package in a folder; of an installed model what its manifest says.

    Raises: UsageError for an unknown name, naming the nearest; WeightsError for a folder that is not a package.
    """
    random = of_random(model)
    if random is not None:
        return random
    folder = Path(model).expanduser()
    if model.lower() not in _load() and folder.is_dir():
        return of_package(folder)
    facts = get(model)
    return of_package(DEMO_FOLDER) if is_installed(facts) else facts


def of_package(folder: Path, places: Mapping[str, Path] | None = None) -> ModelFacts:
    """Facts of a model package, read from its manifest and configurations; no weights are read.

    Args:
        places: part -> the folder it lies in, for a package with parts elsewhere (`packages.facts` knows them);
            None = every part is in the package's folder.
    Raises: WeightsError if the folder is not a complete package.
    """
    try:
        manifest = json.loads((folder / "packforcing.json").read_text("utf-8"))
        if places is None:
            places = {name: folder / place for name, place in manifest["parts"].items()}
        network = json.loads((places["transformer"] / "config.json").read_text("utf-8"))
        cache_, schedule, codec = manifest["cache"], manifest["schedule"], manifest["codec"]
        frames = cache_["frames_per_block"]
        steps = tuple(schedule["timesteps"]) if schedule["kind"] == "renoise" else (schedule["steps"],)
        return ModelFacts(
            name=manifest["name"],
            kind="package",
            title=manifest["title"],
            license=manifest["license"],
            frames_per_block=frames,
            layers=network["num_layers"],
            heads=network["num_attention_heads"],
            head_dim=network["attention_head_dim"],
            ffn_dim=network["ffn_dim"],
            latent_channels=codec["latent_channels"],
            text_dim=network["text_dim"],
            text_length=manifest["text_length"],
            default_size=(manifest["size"][0], manifest["size"][1]),
            fps=manifest["fps"],
            trained_by_block=MappingProxyType({frames: manifest["trained_frames"]}),
            span_by_block=MappingProxyType({frames: str(cache_["mid_span"])}),
            schedule=ScheduleFacts(schedule["kind"], steps, schedule["shift"], schedule["guidance"]),
            text_params=_stored_params(places["text_encoder"]),
            vae_params=_stored_params(places["vae"]),
            install="installed",
            codec=codec["kind"],
            cache=MappingProxyType({k: v for k, v in cache_.items() if k != "frames_per_block"}),
            branches=_branches(places["compressor"]) if "compressor" in places else "lr",
            compressor_params=_stored_params(places["compressor"]) if "compressor" in places else 0,
            text_embedding_params=_text_embedding_params(places["text_encoder"]),
            spatial_stride=codec["spatial_stride"],
            temporal_stride=codec["temporal_stride"],
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise WeightsError(
            f"{folder} is not a complete model package: {type(error).__name__}: {error}",
            hint="Use a folder with packforcing.json, or --model demo.",
        ) from error


def _branches(folder: Path) -> str:
    branches: str = json.loads((folder / "config.json").read_text("utf-8"))["branches"]
    return branches


def with_compressor(facts: ModelFacts, folder: Path) -> ModelFacts:
    """The facts of a model with the compressor of a part's folder.

    Raises: WeightsError if the folder holds none, or one for another width or other latents.
    """
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        if config["_class_name"] != "Compressor":
            raise ValueError(f"it holds {config['_class_name']}")
        found = replace(facts, branches=config["branches"], compressor_params=_stored_params(folder))
        sizes = (config["dim"], config["in_channels"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{folder} is no compressor: {type(error).__name__}: {error}",
            hint="Give --compressor a package that has one, or a folder with its config.json and safetensors.",
        ) from error
    if sizes != (facts.dim, facts.latent_channels):
        raise WeightsError(
            f"the compressor in {folder} is for a model of width {sizes[0]} with {sizes[1]} latent channels;"
            f" {facts.name} has width {facts.dim} and {facts.latent_channels}",
            hint="Use a compressor that was trained for this model, or --compressor lr.",
        )
    return found


def _text_embedding_params(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return int(config["vocab_size"] * config["d_model"])


def _stored_params(folder: Path) -> int:
    """Parameters of a part, counted in the headers of its files.

    A file that is damaged counts by its size at 16 bit; verification says what is wrong with it.
    """
    found = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            found += _params_in(path)
        except (ValueError, KeyError, TypeError, AttributeError):
            found += path.stat().st_size // WEIGHT_BYTES
    return found


def _params_in(path: Path) -> int:
    """Parameters in a safetensors file: eight bytes with the length of a JSON header, then that."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path} has no safetensors header")
        header = json.loads(file.read(length))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def is_installed(facts: ModelFacts) -> bool:
    """Whether the model comes with this program and is there; `packages` knows the others."""
    return facts.name == "demo" and (DEMO_FOLDER / "packforcing.json").is_file()


@cache
def _load() -> Mapping[str, ModelFacts]:
    text = (Path(__file__).parent / "models.toml").read_text(encoding="utf-8")
    tables = tomllib.loads(text)
    sources = {name: _source(entry) for name, entry in tables.pop("parts").items()}
    return MappingProxyType({name: _facts(name, tables, sources) for name in tables})


def _source(entry: Mapping[str, Any]) -> PartSource:
    return PartSource(**{**entry, "files": tuple(entry["files"])})


def _facts(
    name: str, tables: Mapping[str, Mapping[str, Any]], sources: Mapping[str, PartSource]
) -> ModelFacts:
    own = dict(tables[name])
    values = {**tables[own.pop("family")], **own} if "family" in own else own
    schedule = dict(values.pop("schedule"))
    steps = schedule.pop("steps")
    width, height = values.pop("size")
    cache_options = MappingProxyType(values.pop("cache", {}))
    return ModelFacts(
        name=name,
        default_size=(width, height),
        trained_by_block=MappingProxyType(
            {int(n): frames for n, frames in values.pop("trained_frames").items()}
        ),
        span_by_block=MappingProxyType({int(n): span for n, span in values.pop("mid_span").items()}),
        cache=cache_options,
        schedule=ScheduleFacts(steps=(steps,) if isinstance(steps, int) else tuple(steps), **schedule),
        parts=MappingProxyType({part: sources[at] for part, at in values.pop("parts", {}).items()}),
        pickled=tuple(sources[at] for at in values.pop("pickled", ())),
        **values,
    )
