"""Model packages: write one, check one, load one.

A package is a folder in diffusers layout with a manifest; `demo` is the one inside this Python package.

    packforcing.json   what the model is, how it is to be run, sha256 and size of every file of every part
    transformer/  vae/  text_encoder/  tokenizer/  compressor/      config.json + *.safetensors

    name or folder -> manifest -> every file verified -> modules on meta -> tensors assigned -> VideoModel

Where a package and its parts are, and whether they are whole, is `packages`' business. No tensor is read before all
files are verified. Only safetensors are read. Knows nothing of prompts, rollouts or caches; the numbers in
`CacheDefaults` and `Schedule` are for others to read.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from packforcing_cli import attention as kernels
from packforcing_cli import catalog, compiling, durable, lora, packages, weights
from packforcing_cli.attention import Kernel
from packforcing_cli.catalog import DEMO_FOLDER, ModelFacts
from packforcing_cli.compressor import Compressor, CompressorConfig
from packforcing_cli.config import COMPRESSORS
from packforcing_cli.errors import (
    REINSTALL,
    DiskFullError,
    EnvironmentProblem,
    OfflineError,
    UsageError,
    WeightsError,
)
from packforcing_cli.graphs import CudaRecorder, require_graphs
from packforcing_cli.packages import (
    MANIFEST,
    REQUIRED_PARTS,
    SCHEMA,
    CacheDefaults,
    CodecFactsRecord,
    CompressorPlace,
    FileRecord,
    HubReference,
    Manifest,
    Part,
    Schedule,
    find_package,
    part_folder,
    read_manifest,
    verify_package,
)
from packforcing_cli.packages import record_of as _record
from packforcing_cli.quantize import linear_weights, quantizer, require_support
from packforcing_cli.quiet import known_import_noise_dropped
from packforcing_cli.text import (
    TIED,
    Encoder,
    RandomTextEncoder,
    TextEncoder,
    TextIdentity,
    build_encoder,
    encoder_parts,
)
from packforcing_cli.transformer import TransformerConfig, WanTransformer
from packforcing_cli.vae import (
    Codec,
    TinyAutoencoder,
    TinyAutoencoderConfig,
    TinyCodec,
    WanCodec,
    put_channels_last,
)

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

__all__ = [
    "DEMO_FOLDER",
    "MANIFEST",
    "REQUIRED_PARTS",
    "SCHEMA",
    "CacheDefaults",
    "CodecFactsRecord",
    "FileRecord",
    "HubReference",
    "Manifest",
    "ModelSource",
    "Part",
    "Schedule",
    "VideoModel",
    "check_tensors",
    "find_package",
    "load_codec",
    "load_compressor",
    "load_model",
    "load_transformer",
    "open_model",
    "part_folder",
    "read_manifest",
    "resolve_device",
    "resolve_dtype",
    "verify_package",
    "write_merged",
    "write_package",
]

LAYERS = "blocks."  # of a transformer, in its state dict

M = TypeVar("M", bound=nn.Module)
_AGAIN = f"Get the package again; for the demo, {REINSTALL}."


# -------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class VideoModel:
    """A loaded model: weights only, shared by any number of videos.

    compressor: None when the package has none.
    load_text_encoder: reads the text encoder each time it is called; the caller drops it after encoding.
    text: what its embeddings depend on.
    quantize: of the transformer's linears, "none" or a mode of `quantize`; but for those of layers `quantize_skip`.
    hashes: part -> sha256 over the files it was loaded from.
    attention: the kernel, and which one it really is.
    compiled: whether parts of the transformer's layers, and the Wan VAE's decoder, are.
    graphs: whether its passes are recorded.
    """

    name: str
    manifest: Manifest
    folder: Path
    transformer: WanTransformer
    compressor: Compressor | None
    codec: Codec
    load_text_encoder: Callable[[], Encoder]
    text: TextIdentity
    device: torch.device
    dtype: torch.dtype
    quantize: str = "none"
    quantize_skip: tuple[int, ...] = ()
    attention: Kernel = field(default_factory=Kernel)
    compiled: bool = False
    graphs: bool = False
    hashes: Mapping[str, str] = field(default_factory=dict)


def _unwatched() -> None:
    """A check that always passes."""


class Loader(Protocol):
    """Reads the model of a package."""

    def __call__(self, *, check: Callable[[], None] = _unwatched) -> VideoModel:
        """Read it all.

        Args:
            check: called between tensors; what it raises ends the loading.
        """
        ...


@dataclass(frozen=True)
class ModelSource:
    """A model package that was verified and is not loaded.

    Its prompts can be encoded before the transformer takes memory; `load` gives the model.

    read_ahead: reads the files that `load` will, and keeps nothing: they are then in the system's file cache, from
        where memory is taken back when it is needed. It is given a check, as `load` is.
    device, dtype: what was asked for, resolved.
    """

    name: str
    manifest: Manifest
    folder: Path
    load_text_encoder: Callable[[], Encoder]
    text: TextIdentity
    load: Loader
    read_ahead: Callable[[Callable[[], None]], None]
    device: torch.device
    dtype: torch.dtype


def load_model(
    name_or_folder: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    vae: str | Path | None = None,
    quantize: str = "none",
    quantize_skip: Collection[int] = (),
    quantize_text: str = "none",
    offload: str = "none",
    compressor: str = "auto",
    loras: Sequence[str] = (),
    attention: str = "auto",
    compile_layers: bool = False,
    cuda_graphs: bool = False,
    vae_latents: int = 1,
    fuse: bool = True,
) -> VideoModel:
    """Verify a package and load it: `open_model(...).load()`."""
    return open_model(
        name_or_folder,
        device=device,
        dtype=dtype,
        vae=vae,
        quantize=quantize,
        quantize_skip=quantize_skip,
        quantize_text=quantize_text,
        offload=offload,
        compressor=compressor,
        loras=loras,
        attention=attention,
        compile_layers=compile_layers,
        cuda_graphs=cuda_graphs,
        vae_latents=vae_latents,
        fuse=fuse,
    ).load()


def open_model(
    name_or_folder: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    vae: str | Path | None = None,
    quantize: str = "none",
    quantize_skip: Collection[int] = (),
    quantize_text: str = "none",
    offload: str = "none",
    compressor: str = "auto",
    loras: Sequence[str] = (),
    attention: str = "auto",
    compile_layers: bool = False,
    cuda_graphs: bool = False,
    vae_latents: int = 1,
    fuse: bool = True,
) -> ModelSource:
    """Verify a package and decide how it will be loaded; no tensor is read.

    Args:
        device:        "auto", "cpu", "cuda", "cuda:N"; a GPU becomes the thread's current one.
        dtype:         "auto", "bf16", "fp16", "fp32"; of transformer, compressor, codec and text encoder.
        vae:           None or the package's own kind ("tiny", "wan"), or a folder with a VAE of the same latents.
        quantize:      "none", or a mode of `quantize` for the linears of the transformer's layers.
        quantize_skip: layers whose linears stay as they are.
        quantize_text: "none" or "int8", for those of the text encoder.
        offload:       "none"; "text" runs the text encoder on the CPU; "all" also keeps the transformer's layers in
                       host memory and copies each to the GPU while it runs.
        compressor:    a kind, which loads the package's own weights where it has any, or the weights to use instead:
                       an installed package's name, a package's folder or a part's folder.
        loras:         folders of adapters as PATH or PATH:WEIGHT, added to the transformer's weights one after another.
        attention:     "auto", or a kernel of `attention.choose`.
        compile_layers: compile parts of the transformer's layers, and the steady calls of the Wan VAE's decoder.
        cuda_graphs:   record passes and replay them.
        vae_latents:   latent frames the Wan VAE decodes at a time; a tiny VAE takes what it is given.
        fuse:          make q, k and v of a layer one product; not for a model that will be trained.
    Raises: UsageError, EnvironmentProblem (no such device, or it cannot run what is asked for), WeightsError (a
        file that is not what the manifest says).
    """
    facts = catalog.of_random(str(name_or_folder))
    folder = Path() if facts is not None else find_package(name_or_folder)
    chosen_device = resolve_device(device)
    if chosen_device.type == "cuda":
        torch.cuda.set_device(chosen_device)  # where libraries that are not told the device work
    chosen_dtype = resolve_dtype(dtype, chosen_device)
    if chosen_device.type == "cpu":
        catalog.check_cpu(quantize, offload)
    require_support(quantize, chosen_device)
    if compile_layers:
        compiling.require_compiler(chosen_device)
    if cuda_graphs:
        require_graphs(chosen_device, offload=offload)
    kernel = kernels.choose(attention, device=chosen_device, dtype=chosen_dtype)
    speed = _Speed(kernel, compile_layers, cuda_graphs, vae_latents, fuse)
    text_device = chosen_device if offload == "none" else torch.device("cpu")
    other = None if compressor in COMPRESSORS else packages.find_compressor(compressor)
    adapters = [lora.read(*lora.parse(text)) for text in loras]
    if facts is not None:
        if adapters:
            raise UsageError(
                f"{facts.name} has random weights: a LoRA means nothing to it", hint="Leave --lora away."
            )
        return _open_random(
            facts,
            chosen_device,
            chosen_dtype,
            vae=vae,
            quantize=quantize,
            quantize_skip=quantize_skip,
            stream_layers=offload == "all",
            compressor=other,
            speed=speed,
        )
    manifest = read_manifest(folder)
    packages.require_complete(folder, manifest)
    vae_folder = _vae_folder(folder, manifest, vae)
    if vae_latents > 1:
        catalog.check_vae_latents(catalog.vae_kind(str(vae_folder)), vae_latents)
    verify_package(folder, manifest, trust=True)
    hashes = _part_hashes(manifest, vae_folder, own_vae=part_folder(folder, manifest, "vae"))
    if other is not None:
        hashes["compressor"] = other.verify()
    for number, adapter in enumerate(adapters, 1):
        hashes[f"lora {number}"] = f"{adapter.sha256} x {adapter.strength:g}"
    text = TextIdentity(
        encoder=_combined(manifest.part_hash("text_encoder"), manifest.part_hash("tokenizer")),
        length=manifest.text_length,
        width=_transformer_config(part_folder(folder, manifest, "transformer")).text_dim,
        numerics=f"{dtype_name(chosen_dtype)} {text_device.type} {quantize_text}",
        vocabulary=manifest.vocabulary,
    )

    def load_text_encoder() -> TextEncoder:
        return TextEncoder.load(
            part_folder(folder, manifest, "text_encoder"),
            part_folder(folder, manifest, "tokenizer"),
            max_length=manifest.text_length,
            device=text_device,
            dtype=chosen_dtype,
            quantize=None if quantize_text == "none" else quantizer(quantize_text, text_device, chosen_dtype),
        )

    def read_ahead(check: Callable[[], None]) -> None:
        for part in (part_folder(folder, manifest, "transformer"), vae_folder):
            weights.read_ahead(part, check)

    def load(*, check: Callable[[], None] = _unwatched) -> VideoModel:
        check()
        # The VAE is read beside the transformer: the Wan VAE's code takes seconds to import.
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="load vae") as beside:
            reading = beside.submit(
                load_codec,
                vae_folder,
                device=chosen_device,
                dtype=chosen_dtype,
                latents_per_call=vae_latents,
                compiled=compile_layers,
            )
            transformer = load_transformer(
                part_folder(folder, manifest, "transformer"),
                device=chosen_device,
                dtype=chosen_dtype,
                quantize=quantize,
                quantize_skip=quantize_skip,
                stream_layers=offload == "all",
                loras=adapters,
                check=check,
            )
            codec = reading.result()
        check()
        speed.apply(transformer, chosen_device)
        network = None
        if other is not None:
            network = _other_compressor(other, transformer.config, chosen_device, chosen_dtype)
        elif "compressor" in manifest.parts or "compressor" in manifest.references:
            network = load_compressor(
                part_folder(folder, manifest, "compressor"), device=chosen_device, dtype=chosen_dtype
            )
            if network.config.dim != transformer.config.dim:
                raise WeightsError(
                    f"the compressor of {folder} makes tokens of width {network.config.dim}, "
                    f"its transformer has {transformer.config.dim}",
                    hint=_AGAIN,
                )
        own = vae_folder == part_folder(folder, manifest, "vae")
        _check_codec(manifest, codec, transformer.config.in_channels, own=own)
        return VideoModel(
            name=manifest.name,
            manifest=manifest,
            folder=folder,
            transformer=transformer,
            compressor=network,
            codec=codec,
            load_text_encoder=load_text_encoder,
            text=text,
            device=chosen_device,
            dtype=chosen_dtype,
            quantize=quantize,
            quantize_skip=tuple(quantize_skip),
            attention=kernel,
            compiled=compile_layers,
            graphs=cuda_graphs,
            hashes=hashes,
        )

    return ModelSource(
        name=manifest.name,
        manifest=manifest,
        folder=folder,
        load_text_encoder=load_text_encoder,
        text=text,
        load=load,
        read_ahead=read_ahead,
        device=chosen_device,
        dtype=chosen_dtype,
    )


@dataclass(frozen=True)
class _Speed:
    """How a model computes, beside what it computes.

    vae_latents: latent frames the Wan VAE decodes at a time.
    """

    kernel: Kernel
    compiled: bool
    graphs: bool
    vae_latents: int
    fuse: bool

    def apply(self, transformer: WanTransformer, device: torch.device) -> None:
        if self.fuse:
            transformer.fuse_projections()
        transformer.use_attention(self.kernel)
        if self.compiled:
            transformer.compile_layers()
        if self.graphs:
            transformer.record_passes(CudaRecorder(device))


def _open_random(
    facts: ModelFacts,
    device: torch.device,
    dtype: torch.dtype,
    *,
    vae: str | Path | None,
    quantize: str,
    quantize_skip: Collection[int],
    stream_layers: bool,
    compressor: CompressorPlace | None,
    speed: _Speed,
) -> ModelSource:
    """A model of true shape with random weights made on the device, and random embeddings: for bench and tests."""
    if vae is not None:
        catalog.check_vae(facts.name, facts.codec, str(vae))
    kind = facts.codec if vae is None else str(vae)
    other = None if kind in ("tiny", "wan") else catalog.stand_in(facts.codec, kind)
    if other is not None:
        kind = str(_installed_vae(other, asked=kind))
    catalog.check_vae_latents(kind if kind in ("tiny", "wan") else catalog.vae_kind(kind), speed.vae_latents)
    manifest = Manifest(name=facts.name, version="0", **packages.records_of(facts))
    config = TransformerConfig(
        num_layers=facts.layers,
        num_attention_heads=facts.heads,
        attention_head_dim=facts.head_dim,
        ffn_dim=facts.ffn_dim,
        in_channels=facts.latent_channels,
        out_channels=facts.latent_channels,
        text_dim=facts.text_dim,
        freq_dim=catalog.TIME_EMBEDDING,
        patch_size=facts.patch,
    )
    hashes = {} if compressor is None else {"compressor": compressor.verify()}
    encoder = RandomTextEncoder(length=facts.text_length, width=facts.text_dim, device=device, dtype=dtype)
    text = TextIdentity(encoder="", length=facts.text_length, width=facts.text_dim, numerics="")

    def load(*, check: Callable[[], None] = _unwatched) -> VideoModel:
        with torch.device("meta"):
            transformer = WanTransformer(config)
        change = _changes(
            transformer, device, dtype, quantize, skip=quantize_skip, stream_layers=stream_layers
        )
        weights.randomise(transformer, device=device, dtype=dtype, change=_checked(check, change))
        if stream_layers:
            transformer.stream_layers(device)
        speed.apply(transformer, device)
        network = None if compressor is None else _other_compressor(compressor, config, device, dtype)
        codec: Codec
        if kind not in ("tiny", "wan"):
            codec = load_codec(
                Path(kind),
                device=device,
                dtype=dtype,
                latents_per_call=speed.vae_latents,
                compiled=speed.compiled,
            )
        elif kind == "tiny":
            shape = TinyAutoencoderConfig.demo() if facts.codec == "tiny" else TinyAutoencoderConfig()
            with torch.device("meta"):
                tiny = TinyAutoencoder(shape)
            weights.randomise(tiny, device=device, dtype=dtype)
            codec = _tiny_codec(tiny, device)
        else:
            with torch.device("meta"):
                wan = _wan_class()()
            weights.randomise(wan, device=device, dtype=dtype)
            codec = _wan_codec(wan, device, speed.vae_latents, compiled=speed.compiled)
        _check_codec(manifest, codec, facts.latent_channels, own=kind == facts.codec)
        return VideoModel(
            name=facts.name,
            manifest=manifest,
            folder=Path(),
            transformer=transformer,
            compressor=network,
            codec=codec,
            load_text_encoder=lambda: encoder,
            text=text,
            device=device,
            dtype=dtype,
            quantize=quantize,
            quantize_skip=tuple(quantize_skip),
            attention=speed.kernel,
            compiled=speed.compiled,
            graphs=speed.graphs,
            hashes=hashes,
        )

    return ModelSource(
        name=facts.name,
        manifest=manifest,
        folder=Path(),
        load_text_encoder=lambda: encoder,
        text=text,
        load=load,
        read_ahead=lambda _: None,  # there are no files
        device=device,
        dtype=dtype,
    )


def _combined(*hashes: str) -> str:
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def _part_hashes(manifest: Manifest, vae: Path, *, own_vae: Path) -> dict[str, str]:
    hashes = {str(part): manifest.part_hash(part) for part in (*manifest.parts, *manifest.references)}
    if vae != own_vae:
        files = sorted(path for path in vae.iterdir() if path.is_file())
        hashes["vae"] = _combined(*(_record(path).sha256 for path in files))
    return hashes


def _vae_folder(folder: Path, manifest: Manifest, vae: str | Path | None) -> Path:
    """Where the VAE to use is: in the package, among the installed ones (`catalog.stand_in`), or a folder."""
    if vae is None or str(vae) == manifest.codec.kind:
        return part_folder(folder, manifest, "vae")
    catalog.check_vae(manifest.name, manifest.codec.kind, str(vae))
    name = catalog.stand_in(manifest.codec.kind, str(vae))
    return Path(vae) if name is None else _installed_vae(name, asked=str(vae))


def _installed_vae(name: str, *, asked: str) -> Path:
    """The part of an installed VAE, verified. Raises: OfflineError if it is not installed; WeightsError."""
    folder = packages.install_folder(name)
    if not (folder / MANIFEST).is_file():
        raise OfflineError(
            f"--vae {asked}: the tiny VAE {name} is not installed", hint=f"packforcing models pull {name}"
        )
    manifest = read_manifest(folder)
    verify_package(folder, manifest, trust=True)
    return part_folder(folder, manifest, "vae")


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
    quantize_skip: Collection[int] = (),
    stream_layers: bool = False,
    loras: Sequence[lora.Lora] = (),
    check: Callable[[], None] = _unwatched,
) -> WanTransformer:
    """Read a transformer from its folder.

    Args:
        quantize:      a mode of `quantize` for the linears of its layers.
        quantize_skip: layers whose linears stay as they are.
        stream_layers: keep the layers in host memory, to be copied to the device one at a time.
        loras:         adapters that are added to the weights, before these are quantized.
        check:         called between tensors; what it raises ends the reading.
    Raises: WeightsError for another architecture or wrong tensors, or adapters of another model.
    """
    module = _empty_transformer(folder)
    change = _changes(module, device, dtype, quantize, skip=quantize_skip, stream_layers=stream_layers)
    if loras:
        add, rest = lora.merger(loras, module.state_dict()), change

        def change(name: str, tensor: Tensor) -> Tensor:
            return rest(name, add(name, tensor))

    source = torch.device("cpu") if stream_layers else device
    module = _filled(module, folder, source, dtype, _checked(check, change))
    if stream_layers:
        module.stream_layers(device)
    return module


def _checked(
    check: Callable[[], None], change: Callable[[str, Tensor], Tensor]
) -> Callable[[str, Tensor], Tensor]:
    """A change of tensors, with a check before each."""

    def run(name: str, tensor: Tensor) -> Tensor:
        check()
        return change(name, tensor)

    return run


def _changes(
    module: WanTransformer,
    device: torch.device,
    dtype: torch.dtype,
    quantize: str,
    *,
    skip: Collection[int],
    stream_layers: bool,
) -> Callable[[str, Tensor], Tensor]:
    """What is done with each tensor of a transformer while it is read: quantized, or left in host memory."""
    unknown = [layer for layer in skip if not 0 <= layer < len(module.blocks)]
    if unknown:
        raise UsageError(
            f"--quantize-skip: there is no layer {unknown[0]}",
            hint=f"The layers are 0 to {len(module.blocks) - 1}.",
        )
    whole = tuple(f"{LAYERS}{layer}." for layer in skip)
    linears = {name for name in linear_weights(module, LAYERS) if not name.startswith(whole)}
    shrink = None if quantize == "none" else quantizer(quantize, device, dtype)

    def change(name: str, tensor: Tensor) -> Tensor:
        stays = stream_layers and name.startswith(LAYERS)
        if not stays:
            tensor = tensor.to(device)
        if shrink is not None and name in linears:
            tensor = shrink(tensor.to(device))
        if stays:
            tensor = tensor.to("cpu")
            # Pinned memory is copied to the GPU by itself, without a stop at the driver's own buffer.
            tensor = tensor.pin_memory() if device.type == "cuda" else tensor
        return tensor

    return change


def _empty_transformer(folder: Path) -> WanTransformer:
    with torch.device("meta"):
        return WanTransformer(_transformer_config(folder))


def _transformer_config(folder: Path) -> TransformerConfig:
    # The second name is FastVideo's for the same network run block by block.
    values = _config_of(folder, "WanTransformer3DModel", "CausalWanTransformer3DModel")
    return TransformerConfig.from_dict(values)


def load_compressor(folder: Path, *, device: torch.device, dtype: torch.dtype) -> Compressor:
    """Read a compressor from its folder. Raises: WeightsError for another architecture or wrong tensors."""
    return _filled(_empty_compressor(folder), folder, device, dtype)


def _other_compressor(
    place: CompressorPlace, model: TransformerConfig, device: torch.device, dtype: torch.dtype
) -> Compressor:
    """A compressor that is not the model's own. Raises: WeightsError if it is for another width or other latents."""
    network = load_compressor(place.folder, device=device, dtype=dtype)
    found = (network.config.dim, network.config.in_channels)
    if found != (model.dim, model.in_channels):
        raise WeightsError(
            f"the compressor in {place.folder} is for a model of width {found[0]} with {found[1]} latent channels,"
            f" this one has width {model.dim} and {model.in_channels}",
            hint="Use a compressor that was trained for this model, or --compressor lr.",
        )
    return network


def _empty_compressor(folder: Path) -> Compressor:
    values = _config_of(folder, "Compressor")
    with torch.device("meta"):
        return Compressor(CompressorConfig.from_dict(values))


def load_codec(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    latents_per_call: int = 1,
    compiled: bool = False,
) -> Codec:
    """Read the VAE of a part folder, whichever of the two kinds it is.

    Args:
        latents_per_call, compiled: of the Wan VAE, as `WanCodec` takes them.
    Raises: WeightsError for another architecture or wrong tensors.
    """
    module = _filled(_empty_vae(folder), folder, device, dtype)
    if isinstance(module, TinyAutoencoder):
        return _tiny_codec(module, device)
    wan: Any = module  # diffusers gives its models no types
    try:
        return _wan_codec(wan, device, latents_per_call, compiled=compiled)
    except ValueError as e:
        raise WeightsError(f"{folder}: {e}", hint="Use the VAE of a Wan2.1 model.") from e


def _wan_class() -> Any:
    """diffusers' class of the Wan VAE. Raises: EnvironmentProblem where diffusers is not installed."""
    with known_import_noise_dropped():
        try:
            from diffusers import AutoencoderKLWan
        except ImportError as error:
            raise EnvironmentProblem(
                f"the Wan VAE needs diffusers: {error}", hint="pip install diffusers, or use --vae tiny."
            ) from error
    return AutoencoderKLWan


def _tiny_codec(module: TinyAutoencoder, device: torch.device) -> TinyCodec:
    """A tiny VAE as this kind of device runs it: channels innermost, as cuDNN takes them, on a GPU."""
    if device.type == "cuda":
        put_channels_last(module)
    return TinyCodec(module)


def _wan_codec(module: Any, device: torch.device, latents_per_call: int, *, compiled: bool) -> WanCodec:
    """The Wan VAE as this kind of device runs it: the layout cuDNN's convolutions take, on a GPU."""
    return WanCodec(
        module,
        latents_per_call=latents_per_call,
        channels_last=device.type == "cuda",
        compiled=compiled,
    )


def _empty_vae(folder: Path) -> nn.Module:
    values = _config_of(folder, "TinyAutoencoder", "AutoencoderKLWan")
    if values["_class_name"] == "TinyAutoencoder":
        try:
            config = TinyAutoencoderConfig.from_dict(_public(values))
        except (TypeError, ValueError) as e:
            raise WeightsError(f"{folder / weights.CONFIG} is not valid: {e}", hint=_AGAIN) from e
        with torch.device("meta"):
            return TinyAutoencoder(config)
    own = _wan_class()
    with torch.device("meta"):
        wan: nn.Module = own.from_config(values)
        return wan


def check_tensors(folder: Path, manifest: Manifest) -> int:
    """Read every tensor of a package, one at a time, and compare names and shapes with its configurations.

    Returns: how many there are.
    Raises: WeightsError for an unknown architecture, wrong names or shapes, NaN or infinity.
    """
    empty: dict[Part, Callable[[Path], nn.Module]] = {
        "transformer": _empty_transformer,
        "compressor": _empty_compressor,
        "vae": _empty_vae,
        "text_encoder": lambda place: build_encoder(weights.read_config(place), on_meta=True),
    }
    count = 0
    for part, build in empty.items():
        if part not in manifest.parts and part not in manifest.references:
            continue
        place = part_folder(folder, manifest, part)
        found = {}
        for name, tensor in weights.each_tensor(place):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise WeightsError(f"{name} in {place} is not finite", hint=_AGAIN)
            found[name] = tensor.to("meta")
        count += len(found)
        if part == "text_encoder":
            stored = next((found[name] for name in TIED if name in found), None)
            found |= {} if stored is None else dict.fromkeys(TIED, stored)
        weights.assign(build(place), found, source=str(place))
    return count


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
        manifest: its `parts` and `files` are ignored and computed; its `references` stay for parts not given here.
        vae:      a TinyAutoencoder or diffusers' AutoencoderKLWan.
        dtype:    of the stored floating-point tensors; None keeps the modules' own.
        base:     a package whose parts are copied, and whose references are kept, where none is given here.
        leave_out: parts of the base not to take over.
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
        references = dict(manifest.references)
        if base is not None:
            old = read_manifest(base)
            kept = {part: there for part, there in old.references.items() if part not in leave_out}
            references = kept | references
            for part, place in old.parts.items():
                if part not in parts and part not in manifest.references and part not in leave_out:
                    shutil.copytree(base / place, unfinished / part)
                    parts[part] = part
        references = {part: there for part, there in references.items() if part not in parts}
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
            manifest.model_dump(by_alias=True)
            | {"schema": SCHEMA, "parts": parts, "references": references, "files": files}
        )
        (unfinished / MANIFEST).write_text(written.to_json(), "utf-8")
        for path in unfinished.rglob("*"):
            (durable.sync_folder if path.is_dir() else durable.sync_file)(path)
        _move_into_place(unfinished, folder)
        durable.sync_folder(folder.parent)
    except OSError as e:
        if durable.is_full_disk(e):
            raise DiskFullError(
                f"no space left to write {folder}", hint="Free some space and try again."
            ) from e
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return written


def write_merged(base: Path, loras: Sequence[str], folder: Path) -> Manifest:
    """Write the package `base` with adapters, PATH or PATH:WEIGHT, merged into its transformer.

    The weights keep the precision they are stored in. Raises: as `lora.read`, `write_package`, `verify_package`.
    """
    manifest = read_manifest(base)
    adapters = [lora.read(*lora.parse(text)) for text in loras]
    verify_package(base, manifest)
    place = part_folder(base, manifest, "transformer")
    _, first = next(weights.each_tensor(place))
    transformer = load_transformer(place, device=torch.device("cpu"), dtype=first.dtype, loras=adapters)
    merged = [{"sha256": adapter.sha256, "weight": adapter.strength} for adapter in adapters]
    return write_package(
        folder,
        manifest.model_copy(
            update={
                "base_model": manifest.base_model or manifest.name,
                "provenance": {**manifest.provenance, "merged_loras": merged},
                "references": {},
            }
        ),
        transformer=transformer,
        base=base,
    )


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
