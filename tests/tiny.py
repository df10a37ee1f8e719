"""Models of the smallest sizes, with random weights that leave nothing at zero or one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from packforcing_cli.compressor import Compressor, CompressorConfig
from packforcing_cli.registry import CodecFactsRecord, Manifest, VideoModel
from packforcing_cli.text import TextEncoder, TextIdentity
from packforcing_cli.transformer import TransformerConfig, WanTransformer
from packforcing_cli.vae import TinyAutoencoder, TinyAutoencoderConfig, TinyCodec


def randomise(module: nn.Module, seed: int) -> None:
    """Every parameter drawn anew: matrices keep the scale of their input, norm weights stay around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if "norm" in name and name.endswith("weight"):
                noise = 1 + 0.3 * noise
            elif "scale_shift_table" in name or parameter.ndim < 2:
                noise = 0.5 * noise
            else:
                noise = noise * parameter[0].numel() ** -0.5
            parameter.copy_(noise)


def transformer(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> WanTransformer:
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "ffn_dim": 32,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 8,
        "freq_dim": 16,
    }
    model = WanTransformer(TransformerConfig(**(sizes | changes))).to(dtype)
    randomise(model, seed)
    return model.eval().requires_grad_(False)


CODEC = TinyAutoencoderConfig(
    latent_channels=4,
    encoder_widths=(4, 4),
    encoder_depths=(1,),
    encoder_pools=(2,),
    decoder_widths=(4, 4),
    decoder_depths=(1,),
    decoder_grows=(2,),
    block_convs=1,
    patch_size=4,
    patch_frames=2,
    activation="silu",
    resample="fold",
    latent_clamp=False,
    front_aligned=True,
)


def embeds(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Text embeddings [1,5,8] of a made-up prompt."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 5, 8, generator=generator, dtype=torch.float64).to(dtype)


def no_text_encoder() -> TextEncoder:
    raise AssertionError("prompts are given as embeddings here")


def video_model(
    dtype: torch.dtype = torch.float64,
    *,
    schedule: dict[str, Any] | None = None,
    cache: dict[str, Any] | None = None,
    trained_compressor: bool = True,
    load_text_encoder: Callable[[], TextEncoder] = no_text_encoder,
    **sizes: Any,
) -> VideoModel:
    """A whole model of 64x64 pixels: 16 tokens a latent frame, 2 compressed tokens a block."""
    network = transformer(1, dtype, **sizes)
    compressor = Compressor(CompressorConfig(dim=network.config.dim, in_channels=4, widths=(4, 4, 6, 8)))
    compressor.to(dtype).requires_grad_(False)
    if trained_compressor:
        randomise(compressor, 2)
    autoencoder = TinyAutoencoder(CODEC)
    randomise(autoencoder, 3)
    codec = TinyCodec(autoencoder)
    manifest = Manifest(
        name="tiny",
        version="0",
        title="Random weights",
        license="Apache-2.0",
        size=(64, 64),
        fps=16,
        trained_frames=20,
        text_length=5,
        cache={"frames_per_block": 4} | (cache or {}),
        schedule=schedule or {"kind": "euler", "steps": 2, "shift": 5.0},
        codec=CodecFactsRecord.of(codec),
    )
    return VideoModel(
        name="tiny",
        manifest=manifest,
        folder=Path(),
        transformer=network,
        compressor=compressor.eval(),
        codec=codec,
        load_text_encoder=load_text_encoder,
        text=TextIdentity(encoder="", length=5, width=network.config.text_dim, numerics=""),
        device=torch.device("cpu"),
        dtype=dtype,
    )
