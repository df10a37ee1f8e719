"""A CLIP model of a few kilobytes with random weights, saved as transformers saves one."""

from __future__ import annotations

import json
from pathlib import Path

import torch

SIZE = 32  # px of a picture
LENGTH = 16  # tokens of a prompt
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def save(folder: Path, *, seed: int = 0) -> Path:
    """Write config, weights, tokenizer and preparation into a folder."""
    from transformers import CLIPConfig, CLIPModel

    folder.mkdir(parents=True, exist_ok=True)
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH}), "utf-8"
    )
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "do_resize": True,
                "size": {"shortest_edge": SIZE},
                "resample": 3,
                "do_center_crop": True,
                "crop_size": {"height": SIZE, "width": SIZE},
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "image_mean": MEAN,
                "image_std": STD,
                "do_convert_rgb": True,
            }
        ),
        "utf-8",
    )
    end = vocabulary["<|endoftext|>"]
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **common,
            "vocab_size": len(words),
            "max_position_embeddings": LENGTH,
            "bos_token_id": end - 1,
            "eos_token_id": end,
            "pad_token_id": end,
        },
        vision_config={**common, "image_size": SIZE, "patch_size": 8},
        projection_dim=12,
    )
    torch.manual_seed(seed)
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():  # as initialised, all pictures look alike to it
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder, safe_serialization=True)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, for a Hub."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
