"""Low-rank adapters while they are trained, by peft; what `packforcing_cli.lora` reads is written here.

The transformer's linears become peft's layers in place: the frozen weight and beside it A and B, B zero at first, so
that training starts from the model as it is. Source: LoRA (arXiv 2106.09685); the file format is peft's.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from packforcing_cli import durable
from packforcing_cli.errors import EnvironmentProblem, UsageError
from packforcing_cli.lora import CONFIG, PREFIXES, WEIGHTS
from packforcing_cli.quiet import known_import_noise_dropped
from packforcing_cli.training.recipe_kinds import FinetuneLora
from packforcing_cli.transformer import WanTransformer

NAME = "default"  # of the adapter inside peft's layers


def _peft() -> Any:
    try:
        with known_import_noise_dropped():
            import peft
    except ImportError as error:
        raise EnvironmentProblem(
            f"finetune-lora needs peft, which cannot be imported: {error}",
            hint='Install it: pip install "packforcing[lora]" or pip install peft',
        ) from error
    return peft


def insert(transformer: WanTransformer, recipe: FinetuneLora) -> None:
    """Give the target linears adapters with weights drawn from the recipe's seed; they alone are trained.

    Raises: EnvironmentProblem without peft; UsageError if no linear ends with one of the targets.
    """
    peft = _peft()
    linears = [name for name, child in transformer.named_modules() if isinstance(child, nn.Linear)]
    for target in recipe.targets:
        if not any(name.endswith(f".{target}") for name in linears):
            raise UsageError(
                f"recipe targets: no linear of the transformer ends with {target}",
                hint="For example attn1.to_q, attn2.to_out.0 or ffn.net.2.",
            )
    config = peft.LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, target_modules=list(recipe.targets), lora_dropout=0.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)
        peft.inject_adapter_in_model(config, transformer, adapter_name=NAME)
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(".lora_" in name)


class Adapters(nn.Module):
    """The adapters' parameters as a module of their own: what is saved, averaged and trained."""

    def __init__(self, transformer: WanTransformer) -> None:
        super().__init__()
        for name, parameter in transformer.named_parameters():
            if ".lora_" in name:
                self.register_parameter(name.replace(".", "/"), parameter)


def write(folder: Path, transformer: WanTransformer, recipe: FinetuneLora) -> None:
    """Write the adapters as peft does: adapter_config.json and adapter_model.safetensors."""
    tensors = {
        PREFIXES[0] + name.replace(f".{NAME}.", "."): parameter.detach().cpu().contiguous()
        for name, parameter in transformer.named_parameters()
        if ".lora_" in name
    }
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": recipe.model,
        "r": recipe.rank,
        "lora_alpha": recipe.alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "target_modules": list(recipe.targets),
        "bias": "none",
    }
    durable.make_folder(folder)
    with durable.replacing(folder / WEIGHTS) as part:
        save_file(tensors, part, {"format": "pt"})
    durable.write(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def merged(transformer: WanTransformer) -> WanTransformer:
    """A copy without peft's layers, the adapters added to the weights."""
    _peft()
    result = copy.deepcopy(transformer)
    for name, child in list(result.named_modules()):
        if hasattr(child, "base_layer"):
            layer: Any = child
            layer.merge()
            owner, _, last = name.rpartition(".")
            parent = result.get_submodule(owner)
            if isinstance(parent, nn.ModuleList):
                parent[int(last)] = layer.base_layer
            else:
                setattr(parent, last, layer.base_layer)
    return result
