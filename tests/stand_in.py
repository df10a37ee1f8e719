"""Stand-ins of the released Wan 2.1 weights: the true files, names and classes, at the smallest sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from packforcing_cli import text
from packforcing_cli.quiet import known_import_noise_dropped
from packforcing_cli.training.demo_text import build_demo_tokenizer, tiny_umt5_config

SHARDS = 5  # of the text encoder


def files_of(folder: Path, under: str = "") -> dict[str, bytes]:
    """Path -> content of every file of a folder."""
    prefix = f"{under}/" if under else ""
    return {
        prefix + path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def transformer(folder: Path, seed: int = 0) -> dict[str, bytes]:
    """transformer/ as diffusers writes it, one layer."""
    with known_import_noise_dropped():
        from diffusers import WanTransformer3DModel
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_layers=1, num_attention_heads=1, attention_head_dim=16, ffn_dim=16, text_dim=64, freq_dim=16
    )
    model.save_pretrained(folder / "transformer")
    return files_of(folder / "transformer", "transformer")


def vae(folder: Path) -> dict[str, bytes]:
    """vae/ as diffusers writes it."""
    with known_import_noise_dropped():
        from diffusers import AutoencoderKLWan
    torch.manual_seed(1)
    AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1).save_pretrained(folder / "vae")
    return files_of(folder / "vae", "vae")


def text_encoder() -> dict[str, bytes]:
    """text_encoder/ as transformers writes it: five shards and their index."""
    torch.manual_seed(2)
    config, tensors = text.encoder_parts(text.build_encoder(tiny_umt5_config().to_dict()))
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    files = {"text_encoder/config.json": json.dumps(config).encode()}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        chosen = {name: tensors[name].contiguous() for name in names[shard::SHARDS]}
        weight_map |= dict.fromkeys(chosen, file)
        files[f"text_encoder/{file}"] = save(chosen, metadata={"format": "pt"})
    index: dict[str, Any] = {"metadata": {}, "weight_map": weight_map}
    files["text_encoder/model.safetensors.index.json"] = json.dumps(index).encode()
    return files


def tokenizer(folder: Path) -> dict[str, bytes]:
    """tokenizer/ with the names of the released one."""
    build_demo_tokenizer(folder / "tokenizer")
    extra = {"tokenizer/special_tokens_map.json": b"{}", "tokenizer/spiece.model": b"not read" * 200}
    return files_of(folder / "tokenizer", "tokenizer") | extra


def wan_base(folder: Path) -> dict[str, bytes]:
    """The files of Wan-AI/Wan2.1-T2V-1.3B-Diffusers that packforcing reads, and some that it does not."""
    rest = {"model_index.json": b"{}", "README.md": b"# Wan", "vae/notes.bin": b"x" * 5000}
    return vae(folder) | text_encoder() | tokenizer(folder) | rest
