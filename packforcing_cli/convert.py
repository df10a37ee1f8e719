"""Published checkpoints -> model packages: names, shapes, a merged LoRA. Nothing of a checkpoint is run here.

    .pt ──(unpickle, a subprocess)──┐
    .safetensors, sharded or not ───┴─> names -> shapes -> finite -> + LoRA -> package (other parts from a base)

Understood are Self-Forcing, Causal-Forcing and LongLive checkpoints (`generator`, `generator_ema` or `model`, with or
without the fragments that wrappers, FSDP, activation checkpointing and torch.compile leave in names), the
original Wan 2.1 names and those of diffusers. Everything is checked before the output folder is touched.
Sources: Wan 2.1 (wan/modules/model.py), diffusers (scripts/convert_wan_to_diffusers.py), Self-Forcing
(utils/wan_wrapper.py), LongLive 1.0 (utils/lora_utils.py, a PEFT adapter over all linears of the layers);
docs/method.md 1.5.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from packforcing_cli import __version__, catalog, packages, unpickle, weights
from packforcing_cli.catalog import ModelFacts
from packforcing_cli.errors import DiskFullError, UsageError, WeightsError
from packforcing_cli.registry import (
    CacheDefaults,
    CodecFactsRecord,
    Manifest,
    Part,
    Schedule,
    find_package,
    part_folder,
    read_manifest,
    write_package,
)
from packforcing_cli.transformer import TransformerConfig, WanTransformer

Kind = Literal["student", "full"]

HEAD_DIM = 128  # of every Wan 2.1 model; names and shapes of a checkpoint do not tell it
FULL_STEPS, FULL_GUIDANCE = (
    50,
    5.0,
)  # Wan 2.1's own sampler, where docs/method.md 1.4's few steps do not apply
PICKLED = (".pt", ".pth", ".ckpt", ".bin")

_HINT = "Is it the checkpoint of a Wan 2.1 text-to-video transformer?"


# ----------------------------------------------------------------------------------------------------------- names

_TOP = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
_LAYER = {
    **{
        f"{ours}.{mine}": f"{theirs}.{original}"
        for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for mine, original in (
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "o"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    },
    "norm2": "norm3",  # the affine one, before cross-attention; the other two have no weights
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
}
_NAME = re.compile(r"(?P<layer>blocks\.\d+\.)?(?P<module>.+?)(?P<kind>\.weight|\.bias)?")
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"})
_OUTER = frozenset({"model", "diffusion_model", "base_model", "transformer"})


def original_name(name: str) -> str:
    """The name Wan 2.1 itself gives a tensor of diffusers' WanTransformer3DModel."""
    match = _NAME.fullmatch(name)
    assert match is not None
    layer, module, kind = match["layer"] or "", match["module"], match["kind"] or ""
    return layer + (_LAYER if layer else _TOP).get(module, module) + kind


def bare_name(name: str) -> str:
    """A name without what wrappers, FSDP, activation checkpointing and torch.compile put into it."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] in _OUTER:
        parts = parts[1:]
    return ".".join(parts)


def _bare(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        bare = bare_name(name)
        if bare in found:
            raise WeightsError(f"{source} holds two tensors for {bare}, one is {name}", hint=_HINT)
        found[bare] = tensor
    return found


# ---------------------------------------------------------------------------------------------------------- convert


@dataclass(frozen=True)
class Converted:
    """A written package and what a person should know of it, one sentence each."""

    folder: Path
    manifest: Manifest
    notes: tuple[str, ...]


def convert(
    source: Path,
    output: Path,
    *,
    base: str | Path | None = None,
    ema: bool | None = None,
    lora: Path | None = None,
    lora_alpha: float | None = None,
    kind: Kind | None = None,
    frames_per_block: int | None = None,
    dtype: torch.dtype | None = None,
    name: str | None = None,
    license: str | None = None,  # noqa: A002 (the manifest's word)
    overwrite: bool = False,
) -> Converted:
    """Write a model package from a published transformer.

    Args:
        source:     a checkpoint (.pt), a safetensors file, or a folder of (sharded) safetensors.
        base:       a package, by folder or name, whose other parts are taken over; None leaves them out.
        ema:        take the averaged weights, or the last ones; None = averaged where there are any.
        lora:       a PEFT adapter (.pt or .safetensors) to merge: W + alpha/rank * B @ A.
        lora_alpha: None = the adapter's rank, a scale of 1, as LongLive trains.
        kind:       student = four steps and no guidance, full = 50 steps with guidance; None = by the source.
        frames_per_block: None = 3, as in all released students.
        dtype:      of the stored weights; None keeps that of the source.
    Raises: UsageError; WeightsError (the output folder is then as it was); DiskFullError.
    """
    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists", hint="Choose another folder, or use --overwrite.")
    for path in (source, lora):
        if path is not None and not path.exists():
            raise UsageError(f"there is no file or folder {path}", hint="Check the path.")
    if lora is None and lora_alpha is not None:
        raise UsageError("--lora-alpha needs --lora", hint="Give the adapter to merge: --lora lora.pt")
    place = None if base is None else find_package(base)
    below = None if place is None else read_manifest(place)
    near = next(folder for folder in output.absolute().parents if folder.is_dir())
    _check_disk(near, [path for path in (source, lora, place) if path is not None])
    with tempfile.TemporaryDirectory(prefix=".packforcing-", dir=near) as folder:
        return _convert(
            source,
            output,
            Path(folder),
            place=place,
            below=below,
            ema=ema,
            lora=lora,
            lora_alpha=lora_alpha,
            kind=kind,
            frames_per_block=frames_per_block,
            dtype=dtype,
            name=name,
            license=license,
            overwrite=overwrite,
        )


def _convert(
    source: Path,
    output: Path,
    scratch: Path,
    *,
    place: Path | None,
    below: Manifest | None,
    ema: bool | None,
    lora: Path | None,
    lora_alpha: float | None,
    kind: Kind | None,
    frames_per_block: int | None,
    dtype: torch.dtype | None,
    name: str | None,
    license: str | None,  # noqa: A002
    overwrite: bool,
) -> Converted:
    wanted = {None: ("generator_ema", "generator", "model", ""), True: ("generator_ema",)}.get(
        ema, ("generator", "model", "")
    )
    found = _read(source, scratch / "source.safetensors", wanted)
    notes = [found.note] if found.note else []
    tensors = _bare(found.tensors, source)
    config = _config(source, tensors, _config_beside(source), _base_config(place, below, "transformer"))
    transformer = _named(source, tensors, config)
    text_dim = _base_config(place, below, "text_encoder").get("d_model", config.text_dim)
    if text_dim != config.text_dim:
        raise WeightsError(
            f"the transformer takes text of width {config.text_dim}, the text encoder of {place} makes {text_dim}",
            hint="Use a --base of the same family of models.",
        )
    if lora is not None:
        adapter = _read(lora, scratch / "lora.safetensors", ("generator_lora", ""))
        count, scale = _merge(lora, transformer, adapter.tensors, lora_alpha)
        notes.append(f"merged the adapter {lora.name} into {count} linears, scale {scale:g}")
    stored = {key: tensor if dtype is None else tensor.to(dtype) for key, tensor in transformer.items()}
    _require_finite(source, stored, transformer)

    facts = _family(config)
    kind = kind or ("student" if found.group else "full")
    manifest = _manifest(
        config,
        kind=kind,
        frames_per_block=frames_per_block,
        below=below,
        facts=facts,
        name=name or output.name,
        title=f"{'Wan 2.1' if facts is None else facts.title.split(' and ')[0]}, converted from {source.name}",
        license=license or "not recorded; ask where the weights were published",
        provenance={
            "converted_by": f"packforcing {__version__}",
            "source": source.name,
            "source_sha256": _sha256(source),
            **({"group": found.group} if found.group else {}),
            **({"lora": lora.name, "lora_sha256": _sha256(lora), "lora_scale": scale} if lora else {}),
        },
    )
    with torch.device("meta"):
        module = WanTransformer(config)
    weights.assign(module, stored, source=str(source))
    written = write_package(
        output, manifest, transformer=module, base=place, leave_out=("compressor",), overwrite=overwrite
    )
    kinds = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in stored.values()}))
    notes.insert(
        0,
        f"{'an unnamed size' if facts is None else facts.name}: {config.num_layers} layers of width {config.dim},"
        f" {sum(t.numel() for t in stored.values()):,} parameters, {kinds}",
    )
    notes.append(
        f"a few-step student: {manifest.schedule.steps} steps, no guidance"
        if kind == "student"
        else f"not a few-step student: {FULL_STEPS} steps with guidance {FULL_GUIDANCE:g} (--kind student if it is one)"
    )
    missing = written.missing_parts
    if missing:
        notes.append(
            f"the package is incomplete and makes no videos yet: it has no {', no '.join(missing)}; "
            "convert with --base a package that has them"
        )
    return Converted(output, written, tuple(notes))


def _check_disk(folder: Path, sources: Iterable[Path]) -> None:
    needed = sum(
        file.stat().st_size * (2 if path.is_file() and path.suffix in PICKLED else 1)
        for path in sources
        for file in ([path] if path.is_file() else path.rglob("*"))
        if file.is_file()
    )
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskFullError(
            f"about {needed / 1e9:.1f} GB are needed in {folder} and {free / 1e9:.1f} GB are free",
            hint="Free some space, or choose another output folder.",
        )


# ------------------------------------------------------------------------------------------------------ the source


@dataclass(frozen=True)
class _Found:
    """Tensors of a source as it names them; group: the dictionary they were in, "" if none."""

    tensors: dict[str, Tensor]
    group: str
    note: str


def _read(source: Path, scratch: Path, wanted: tuple[str, ...]) -> _Found:
    """Read a checkpoint; pickled ones through `scratch`. Raises: WeightsError."""
    cpu = torch.device("cpu")
    if source.is_dir():
        return _Found(weights.read_tensors(source, device=cpu), "", "")
    with source.open("rb") as file:
        head = file.read(512)
    packages.refuse_stand_in(source, head)
    if source.suffix == ".safetensors":
        return _Found(weights.read_tensors(source, device=cpu), "", "")
    if source.suffix not in PICKLED:
        raise UsageError(
            f"{source} is neither a .safetensors file nor a checkpoint ({', '.join(PICKLED)})",
            hint="Give the file with the weights, or the folder of a sharded model.",
        )
    taken = unpickle.extract(source, scratch, wanted=wanted)
    note = f"took {taken.group}" if taken.group else ""
    if taken.left_out:
        note += f"; left out: {', '.join(taken.left_out)}"
    return _Found(weights.read_tensors(scratch, device=cpu), taken.group, note)


def _config_beside(source: Path) -> dict[str, Any]:
    """config.json in the folder of a safetensors source; Wan's and diffusers' are understood, {} if there is none."""
    folder = source if source.is_dir() else source.parent
    if source.suffix in PICKLED or not (folder / weights.CONFIG).is_file():
        return {}
    values = weights.read_config(folder)
    kind = values.get("_class_name", "WanModel")
    if kind not in ("WanModel", "CausalWanModel", "WanTransformer3DModel", "CausalWanTransformer3DModel"):
        raise WeightsError(f"{folder / weights.CONFIG} is that of a {kind}", hint=_HINT)
    if values.get("model_type", "t2v") != "t2v":
        raise WeightsError(
            f"{folder / weights.CONFIG} is that of a {values['model_type']} model; text-to-video is supported",
            hint="Use a Wan2.1 text-to-video model.",
        )
    return values


def _base_config(place: Path | None, below: Manifest | None, part: Part) -> dict[str, Any]:
    if place is None or below is None or part not in (*below.parts, *below.references):
        return {}
    return weights.read_config(part_folder(place, below, part))


def _config(
    source: Path, tensors: Mapping[str, Tensor], beside: Mapping[str, Any], base: Mapping[str, Any]
) -> TransformerConfig:
    """The sizes of a transformer from its shapes; heads and epsilon from a config.json, else those of Wan 2.1."""

    def shape(ours: str, ndim: int) -> tuple[int, ...]:
        name = ours if ours in tensors else original_name(ours)
        if name not in tensors:
            raise WeightsError(f"{source} lacks {name}{_nearest(name, tensors)}", hint=_HINT)
        if tensors[name].ndim != ndim:
            raise WeightsError(
                f"{source}: {name} has the shape {list(tensors[name].shape)} instead of {ndim} dimensions",
                hint=_HINT,
            )
        return tuple(tensors[name].shape)

    dim, in_channels, *patch = shape("patch_embedding.weight", 5)
    ffn_dim = shape("blocks.0.ffn.net.0.proj.weight", 2)[0]
    text_dim = shape("condition_embedder.text_embedder.linear_1.weight", 2)[1]
    freq_dim = shape("condition_embedder.time_embedder.linear_1.weight", 2)[1]
    out = shape("proj_out.weight", 2)[0]
    found = [int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))]
    family = _family_of(dim, ffn_dim)
    layers = beside.get("num_layers") or (family.layers if family else max(found) + 1)
    same_base = base.get("num_attention_heads", 0) * base.get("attention_head_dim", 0) == dim
    heads = beside.get("num_heads") or beside.get("num_attention_heads")
    heads = heads or (base["num_attention_heads"] if same_base else dim // HEAD_DIM)
    if heads < 1 or dim % heads:
        raise WeightsError(f"{source}: a width of {dim} does not divide into {heads} heads", hint=_HINT)
    return TransformerConfig.from_dict(
        {
            "num_layers": layers,
            "num_attention_heads": heads,
            "attention_head_dim": dim // heads,
            "ffn_dim": ffn_dim,
            "in_channels": in_channels,
            "out_channels": out // (patch[1] * patch[2]),
            "text_dim": text_dim,
            "freq_dim": freq_dim,
            "patch_size": patch,
            "eps": beside.get("eps", 1e-6),
        }
    )


def _named(source: Path, tensors: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """The tensors under diffusers' names. Raises: WeightsError for missing and unknown names and wrong shapes."""
    with torch.device("meta"):
        expected = WanTransformer(config).state_dict()
    is_original = original_name("proj_out.weight") in tensors
    theirs = {name: original_name(name) if is_original else name for name in expected}
    missing = [name for name in theirs.values() if name not in tensors]
    unknown = sorted(tensors.keys() - set(theirs.values()))
    shapes = [
        f"{theirs[name]} {list(tensors[theirs[name]].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if theirs[name] in tensors and tensors[theirs[name]].shape != value.shape
    ]
    if unknown:
        first = f"{unknown[0]}{_nearest(unknown[0], theirs.values())}"
        raise WeightsError(f"{source} has unknown {_list([first, *unknown[1:]])}", hint=_HINT)
    for what, names in (("lacks", missing), ("has the wrong shape:", shapes)):
        if names:
            raise WeightsError(f"{source} {what} {_list(names)}", hint=_HINT)
    return {name: tensors[theirs[name]] for name in expected}


def _require_finite(source: Path, stored: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    for name, tensor in stored.items():
        if not bool(tensor.isfinite().all()):
            if bool(before[name].isfinite().all()):
                raise WeightsError(
                    f"{source}: {name} overflows in {str(tensor.dtype).removeprefix('torch.')}",
                    hint="Use --dtype bf16 or keep.",
                )
            raise WeightsError(f"{source}: {name} holds NaN or infinity", hint="Download the file again.")


# ------------------------------------------------------------------------------------------------------------ LoRA

_LORA = re.compile(
    r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[A-Za-z]\w*)?\.weight"
)  # PEFT may name the adapter


def _merge(
    source: Path, transformer: dict[str, Tensor], adapter: Mapping[str, Tensor], alpha: float | None
) -> tuple[int, float]:
    """Add alpha/rank * B @ A to the weights, in float32, in place. Returns (linears changed, scale).

    Raises: WeightsError naming a tensor that is unknown, alone, not finite, or of the wrong shape.
    """
    ours = {original_name(name): name for name in transformer} | {name: name for name in transformer}
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.items():
        match = _LORA.fullmatch(name)
        if match is None:
            raise WeightsError(
                f"{source} is not an adapter to merge: {name} is neither a lora_A nor a lora_B",
                hint="Use a PEFT adapter, as LongLive's lora.pt.",
            )
        weight = bare_name(match["module"]) + ".weight"
        if weight not in ours:
            raise WeightsError(
                f"{source}: {name} has nothing to change in this model{_nearest(weight, ours)}",
                hint="The adapter and the checkpoint belong to different models.",
            )
        if not bool(tensor.isfinite().all()):
            raise WeightsError(f"{source}: {name} holds NaN or infinity", hint="Download the file again.")
        pairs.setdefault(ours[weight], {})[match["side"]] = tensor
    scales = set()
    for name, pair in pairs.items():
        if len(pair) != 2:
            raise WeightsError(f"{source}: {name} has a lora_{next(iter(pair))} alone", hint=_HINT)
        a, b, before = pair["A"], pair["B"], transformer[name]
        rank = a.shape[0]
        if (
            a.ndim != 2
            or before.ndim != 2
            or (b.shape, a.shape[1:]) != ((len(before), rank), before.shape[1:])
        ):
            raise WeightsError(
                f"{source}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit {name} {list(before.shape)}",
                hint="The adapter and the checkpoint belong to different models.",
            )
        scale = (rank if alpha is None else alpha) / rank
        scales.add(scale)
        transformer[name] = (before.float() + scale * (b.float() @ a.float())).to(before.dtype)
    if len(scales) != 1:
        raise WeightsError(
            f"{source} holds no one scale for its {len(pairs)} pairs: ranks differ"
            if scales
            else f"{source} is empty",
            hint="Leave --lora-alpha away, or use an adapter of one rank.",
        )
    return len(pairs), scales.pop()


# -------------------------------------------------------------------------------------------------------- manifest


def _family_of(dim: int, ffn_dim: int) -> ModelFacts | None:
    families = [facts for facts in catalog.all_models() if facts.kind == "family"]
    return next((facts for facts in families if (facts.dim, facts.ffn_dim) == (dim, ffn_dim)), None)


def _family(config: TransformerConfig) -> ModelFacts | None:
    facts = _family_of(config.dim, config.ffn_dim)
    return facts if facts is not None and facts.layers == config.num_layers else None


def _manifest(
    config: TransformerConfig,
    *,
    kind: Kind,
    frames_per_block: int | None,
    below: Manifest | None,
    facts: ModelFacts | None,
    name: str,
    title: str,
    license: str,  # noqa: A002
    provenance: dict[str, Any],
) -> Manifest:
    """The manifest of a converted model: what its VAE and text encoder decide from the base, the rest Wan 2.1's."""
    wan = facts or catalog.get("wan2.1-1.3b")
    frames = frames_per_block or wan.frames_per_block
    span = wan.span_by_block.get(frames, "fit")
    steps = wan.schedule.steps
    if kind == "student":
        schedule = Schedule(kind="renoise", steps=len(steps), timesteps=steps, shift=wan.schedule.shift)
    else:
        schedule = Schedule(kind="euler", steps=FULL_STEPS, shift=wan.schedule.shift, guidance=FULL_GUIDANCE)
    codec = CodecFactsRecord(
        kind="wan",
        latent_channels=wan.latent_channels,
        spatial_stride=wan.spatial_stride,
        temporal_stride=wan.temporal_stride,
        pixel_range=(-1.0, 1.0),
    )
    if below is not None:
        codec = below.codec
    if codec.latent_channels != config.in_channels:
        raise WeightsError(
            f"the transformer takes {config.in_channels} latent channels, the VAE of the base has"
            f" {codec.latent_channels}",
            hint="Use a --base of the same family of models.",
        )
    return Manifest(
        name=name,
        version="1",
        title=title,
        license=license,
        size=wan.default_size if below is None else below.size,
        fps=wan.fps if below is None else below.fps,
        trained_frames=wan.trained_by_block.get(frames, 7 * frames),  # seven blocks, as Self-Forcing trains
        text_length=wan.text_length if below is None else below.text_length,
        cache=CacheDefaults(
            frames_per_block=frames, mid_span=str(frames) if span == "block" else span, compressor="lr"
        ),
        schedule=schedule,
        codec=codec,
        provenance=provenance,
    )


# -------------------------------------------------------------------------------------------------------- messages


def _nearest(name: str, known: Iterable[str]) -> str:
    # The last parts tell two names apart; whole names are too alike.
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (the nearest name is {near[0]})" if near else ""


def _list(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _sha256(path: Path) -> str:
    """Of a file; of a folder: of its weights' names and hashes."""
    if path.is_dir():
        listed = {file.name: _sha256(file) for file in weights.weight_files(path)}
        return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
