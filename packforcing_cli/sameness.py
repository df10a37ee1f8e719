"""What a video depends on: the facts that its file, its run folder and a later run compare."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from packforcing_cli import __version__, provenance, runfolder
from packforcing_cli.config import GenerateRequest
from packforcing_cli.layout import Layout
from packforcing_cli.provenance import ModelRecord, Provenance
from packforcing_cli.registry import VideoModel
from packforcing_cli.resolve import compressor_kind, grid_for, layout_for, schedule_for
from packforcing_cli.runfolder import Record
from packforcing_cli.vae import WanCodec


def provenance_of(model: VideoModel, request: GenerateRequest, layout: Layout) -> Provenance:
    """What the file of a request is to say of itself."""
    manifest = model.manifest
    files = {name: record.sha256 for name, record in manifest.files.items()}
    for part, name in (("vae", "VAE"), ("compressor", "compressor")):
        own = manifest.part_hash(part) if part in manifest.parts else None
        used = model.hashes.get(part)
        if used not in (None, own) and part not in manifest.references:
            files[f"another {name}"] = used
    return Provenance(
        version=__version__,
        request={k: v for k, v in request.to_values().items() if k not in provenance.NOT_REPEATED},
        model=ModelRecord(
            name=manifest.name,
            version=manifest.version,
            files=files,
        ),
        layout=provenance.layout_values(layout),
        image_sha256=None if request.image is None else _file_hash(request.image),
        files_sha256={name: _file_hash(path) for name, path in provenance.files_of(request).items()},
        libraries=libraries(model, request),
    )


def libraries(model: VideoModel, request: GenerateRequest) -> dict[str, str]:
    """Versions of the libraries that results depend on."""
    names = ["torch", "transformers"] + (["diffusers"] if isinstance(model.codec, WanCodec) else [])
    if (model.quantize, request.quantize_text) != ("none", "none"):
        names.append("torchao")
    return {name: importlib.metadata.version(name) for name in names}


def new_record(
    model: VideoModel, request: GenerateRequest, *, tags: Mapping[str, str], parent: str | None = None
) -> Record:
    """run.json of a new run.

    Args:
        request: with seed and output decided.
        tags:    of the video file; if there are any the run's id joins them.
        parent:  id of the run it takes blocks over from.
    """
    assert request.output is not None
    size = request.size or model.manifest.size
    name = runfolder.new_id(request.prompt)
    return Record(
        schema=runfolder.SCHEMA,
        id=name,
        version=__version__,
        created=datetime.now(UTC),
        prompt=request.prompt,
        output=str(request.output.absolute()),
        blocks=grid_for(model, size).blocks_for(request.seconds, model.manifest.fps),
        fps=model.manifest.fps,
        size=size,
        frames_per_block=model.manifest.cache.frames_per_block,
        request=request.to_values(),
        tags={**tags, "run": name} if tags else {},
        must=must_be_same(model, request),
        numerics=numerics(model),
        parent=parent,
    )


PICTURE = "picture of block {}"


def must_be_same(model: VideoModel, request: GenerateRequest, *, made: int = 0) -> dict[str, Any]:
    """What a block of this video depends on beside the numerics, as JSON values.

    made: blocks that are there already; the pictures they began as are not looked at.
    """
    grid = grid_for(model, request.size or model.manifest.size)
    memory = request.memory.with_defaults(model.manifest.cache.model_dump())
    blocks = grid.blocks_for(request.seconds, model.manifest.fps)
    layout = asdict(layout_for(model, memory, grid, num_blocks=blocks))
    if layout["rope_adjustment"]:
        del layout["rope_adjustment"]  # older runs do not name it and are equal
    if layout["kv_dtype"] == "auto":
        del layout["kv_dtype"]
    pictures = request.pin_images if request.image is None else (request.image,)
    files = {PICTURE.format(n): path for n, path in enumerate(pictures) if n >= made}
    if request.embeddings is not None:
        files["embeddings"] = request.embeddings
    if request.source is not None:
        files["source video"] = request.source.path
    facts = {
        "packforcing": __version__,
        **libraries(model, request),
        "model": model.name,
        **{f"weights of {part}": sha256 for part, sha256 in model.hashes.items()},
        **{f"layout {name}": value for name, value in layout.items()},
        **{name: getattr(memory, name) for name in ("select", "compressed_context")},
        "compressor": compressor_kind(model, memory.compressor),
        "schedule": asdict(schedule_for(model, steps=request.steps, guidance=request.guidance)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.attention.taken,
        "quantization": model.quantize + "".join(f", not layer {layer}" for layer in model.quantize_skip),
        "quantization of text": request.quantize_text,
        **_ways_to_compute(model),
        **{name: _file_hash(path) for name, path in files.items()},
    }
    values: dict[str, Any] = json.loads(json.dumps(facts, default=str))
    return values


def _ways_to_compute(model: VideoModel) -> dict[str, Any]:
    """What is compiled, and in what portions the VAE decodes; results differ by rounding."""
    compiled, codec = ["layers"] * model.compiled, model.codec
    if not isinstance(codec, WanCodec):
        return {"compile": ", ".join(compiled) or "none"}
    compiled += ["VAE"] * codec.compiled
    # Older runs decoded one at a time and do not say so.
    portions = {"latents a VAE call": codec.latents_per_call} if codec.latents_per_call > 1 else {}
    return {"compile": ", ".join(compiled) or "none", **portions}


def file_hash(path: Path) -> str:
    """sha256 of a file. Raises: OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_hash(path: Path) -> str:
    """sha256 of a file; a word for one that is gone, which is a difference, too."""
    try:
        return file_hash(path)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def is_other_memory(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two `must_be_same` have different memories: ids and snapshots of one mean nothing in the other."""
    names = {name for name in {*then, *now} if name.startswith("layout ")}
    return any(
        then.get(name) != now.get(name) for name in names | {"select", "compressor", "compressed_context"}
    )


def numerics(model: VideoModel) -> dict[str, Any]:
    """What equal bits depend on besides: the machine."""
    is_cuda = model.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(model.device) if is_cuda else "cpu",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if is_cuda else None,
        "cudnn": torch.backends.cudnn.version() if is_cuda else None,  # attention on Hopper, and the VAE
        "matmul precision": torch.get_float32_matmul_precision(),
    }
