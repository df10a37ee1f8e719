"""Stand-ins of the released Wan 2.1 weights: the true files, names and classes, at the smallest sizes."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hub_server import sha256 as sha256
from safetensors.torch import load, save

from packforcing_cli import text
from packforcing_cli.catalog import ModelFacts
from packforcing_cli.convert import original_name
from packforcing_cli.quiet import known_import_noise_dropped
from packforcing_cli.training.demo_text import build_demo_tokenizer, tiny_umt5_config
from packforcing_cli.transformer import TransformerConfig, WanTransformer
from packforcing_cli.vae import TinyAutoencoder, TinyAutoencoderConfig

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


def network(seed: int = 4) -> WanTransformer:
    """One layer, one head of Wan's width."""
    torch.manual_seed(seed)
    config = TransformerConfig(
        num_layers=1, num_attention_heads=1, attention_head_dim=128, ffn_dim=16, text_dim=64, freq_dim=16
    )
    return WanTransformer(config)


def checkpoint(seed: int = 4, *, averaged: bool = True) -> bytes:
    """A .pt as Self-Forcing's code family writes it: a tiny network with original Wan names, last and averaged."""
    last = {f"model.{original_name(k)}": v for k, v in network(seed).state_dict().items()}
    groups = {"generator": last}
    if averaged:
        groups["generator_ema"] = {name: tensor * 0.5 for name, tensor in last.items()}
    return pickled({**groups, "critic": {}})


def lora_pairs(rank: int = 2) -> dict[str, torch.Tensor]:
    """An adapter over the linears of the tiny network's layer, with PEFT's names."""
    generator = torch.Generator().manual_seed(5)
    found: dict[str, torch.Tensor] = {}
    for name, weight in network().state_dict().items():
        if name.startswith("blocks.") and name.endswith(".weight") and weight.ndim == 2:
            module = "base_model.model." + original_name(name).removesuffix(".weight")
            found[f"{module}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator)
            found[f"{module}.lora_B.weight"] = 0.01 * torch.randn(weight.shape[0], rank, generator=generator)
    return found


def lora() -> bytes:
    """lora.pt as LongLive's training writes it."""
    return pickled({"generator_lora": lora_pairs(), "critic_lora": {}, "step": 3000})


def pickled(values: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getvalue()


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


def changed(files: dict[str, bytes], path: str) -> dict[str, bytes]:
    """The same files, of which one has another last byte or, as JSON, another text."""
    content = files[path]
    other = b" " + content if path.endswith(".json") else content[:-1] + bytes([content[-1] ^ 1])
    return files | {path: other}


def poisoned(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same files, the transformer with a NaN in it."""
    path = "transformer/diffusion_pytorch_model.safetensors"
    tensors = load(files[path])
    tensors["proj_out.weight"][0, 0] = float("nan")
    return files | {path: save(tensors, metadata={"format": "pt"})}


def tiny_vae() -> bytes:
    """taew2_1.safetensors, at its true size, with random weights."""
    torch.manual_seed(3)
    return save({k: v.half() for k, v in TinyAutoencoder(TinyAutoencoderConfig()).state_dict().items()})


def tiny_vae_facts(facts: ModelFacts) -> ModelFacts:
    """The catalog's facts without the hash of the true file."""
    return replace(facts, parts={"vae": replace(facts.parts["vae"], sha256={})})
