"""Low-rank adapters of a transformer: read them in peft's format, and add them to weights while these are read.

    FOLDER/adapter_config.json         r, lora_alpha, use_rslora
           adapter_model.safetensors   base_model.model.blocks.0.attn1.to_q.lora_A.weight [r,in], …lora_B.weight [out,r]

    weight [out,in]  ->  weight + strength * scale * B @ A,   scale = lora_alpha / r, with use_rslora / sqrt(r)

What comes out is an ordinary model: nothing is slower, and it can be quantized or offloaded. Needs no peft.
Source: LoRA (arXiv 2106.09685); rsLoRA (arXiv 2312.03732); peft's checkpoint format.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from packforcing_cli.config import parse_lora
from packforcing_cli.errors import UsageError, WeightsError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIXES = ("base_model.model.", "transformer.")  # peft's own, and that of diffusers' pipelines
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Lora:
    """Adapters of some weights.

    pairs:    name of a weight in the transformer's state dict -> (A [r,in], B [out,r]) on the CPU.
    scale:    of B @ A.  strength: a factor the person chose.
    sha256:   over both files.
    """

    path: Path
    pairs: dict[str, tuple[Tensor, Tensor]]
    scale: float
    strength: float
    sha256: str


parse = parse_lora


def read(path: Path, strength: float = 1.0) -> Lora:
    """Read the adapters in a folder.

    Raises: UsageError if there is no such folder; WeightsError if it holds no LoRA, or one of another kind.
    """
    folder = path.parent if path.name in (WEIGHTS, CONFIG) else path
    if not folder.is_dir():
        raise UsageError(
            f"there is no LoRA folder {folder}", hint="Give the folder that train wrote: RUN/lora."
        )
    try:
        config_bytes = (folder / CONFIG).read_bytes()
        data = (folder / WEIGHTS).read_bytes()
        config = json.loads(config_bytes)
        tensors = load(data)
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except FileNotFoundError as error:
        raise WeightsError(
            f"{folder} is no LoRA: it has no {Path(str(error.filename)).name}",
            hint="Give the folder that train wrote.",
        ) from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"the LoRA in {folder} cannot be read: {error}", hint="Copy it again.") from error
    if config.get("use_dora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise WeightsError(
            f"the LoRA in {folder} is of a kind that is not known here (DoRA, or ranks that differ)",
            hint="Merge it with the tool that made it.",
        )
    pairs = _pairs(folder, tensors)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    digest = hashlib.sha256(config_bytes + data).hexdigest()
    return Lora(folder, pairs, scale, strength, digest)


def _pairs(folder: Path, tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, a in tensors.items():
        if not name.endswith(_A):
            if not name.endswith(_B):
                raise WeightsError(
                    f"{name} in {folder} is no part of a LoRA", hint="Give adapters of linear layers alone."
                )
            continue
        b = tensors.get(name.removesuffix(_A) + _B)
        if b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise WeightsError(f"{name} in {folder} has no partner that fits", hint="Copy it again.")
        target = name.removesuffix(_A)
        for prefix in PREFIXES:
            target = target.removeprefix(prefix)
        pairs[f"{target}.weight"] = (a, b)
    if not pairs:
        raise WeightsError(f"{folder} holds no adapters", hint="Give the folder that train wrote.")
    return pairs


def merger(loras: Sequence[Lora], names: Collection[str]) -> Callable[[str, Tensor], Tensor]:
    """A function that adds adapters to a weight by its name.

    Args:
        names: of the weights there are.
    Raises: WeightsError for adapters of a weight that is not there; the function: of one of another shape.
    """
    for lora in loras:
        unknown = sorted(set(lora.pairs) - set(names))
        if unknown:
            raise WeightsError(
                f"the LoRA in {lora.path} is for another model: there is no {unknown[0]}",
                hint="Use it with the model it was trained on.",
            )

    def add(name: str, weight: Tensor) -> Tensor:
        for lora in loras:
            if name not in lora.pairs:
                continue
            a, b = (t.to(weight.device, torch.float32) for t in lora.pairs[name])
            if (b.shape[0], a.shape[1]) != tuple(weight.shape):
                raise WeightsError(
                    f"the LoRA in {lora.path} is for another model: {name} is {tuple(weight.shape)} here and"
                    f" {(b.shape[0], a.shape[1])} there",
                    hint="Use it with the model it was trained on.",
                )
            weight = (weight.float() + lora.strength * lora.scale * (b @ a)).to(weight.dtype)
        return weight

    return add
