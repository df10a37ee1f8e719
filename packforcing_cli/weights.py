"""Weights of one module as a folder: config.json beside *.safetensors, sharded or not.

A module is built on the meta device and the tensors are assigned to it, straight from the file to the
device, one at a time: weights are in memory once, also when their dtype changes or they are quantized on the way.
Knows no module class, no model names and no hashes (`registry` verifies files before this reads them).
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from packforcing_cli.errors import WeightsError

CONFIG = "config.json"
INDEX = ".safetensors.index.json"
RANDOM_STD = 0.02  # of random weights, as transformers are commonly initialised
MAPPED_BYTES = 64 << 20  # of a file, read before it is mapped anew
AHEAD_BYTES = 8 << 20  # of a file, read ahead between two checks


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a part. Raises: WeightsError when it is missing or not a JSON object."""
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as e:
        raise WeightsError(f"{path} is missing", hint="Check the model folder, or download it again.") from e
    except (OSError, ValueError) as e:
        raise WeightsError(f"{path} cannot be read: {e}", hint="Download or write the model again.") from e
    if not isinstance(values, dict):
        raise WeightsError(f"{path} is not a JSON object", hint="Download or write the model again.")
    return values


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a part: those its index names, else every one in the folder. A file is itself.

    Raises: WeightsError when there is none, or a shard is missing.
    """
    if folder.is_file():
        return [folder]
    indices = sorted(folder.glob("*" + INDEX))
    if len(indices) > 1:
        names = ", ".join(p.name for p in indices)
        raise WeightsError(f"{folder} holds several sets of weights ({names})", hint="Keep one of them.")
    if indices:
        try:
            names_in_index = set(json.loads(indices[0].read_text("utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
            raise WeightsError(f"{indices[0]} cannot be read: {e}", hint="Download the model again.") from e
        if not all(isinstance(n, str) and Path(n).name == n for n in names_in_index):
            raise WeightsError(
                f"{indices[0]} names files outside its folder", hint="Download the model again."
            )
        files = [folder / name for name in sorted(names_in_index)]
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [p.name for p in files if not p.is_file()]
    if missing or not files:
        what = f"lacks {', '.join(missing)}" if missing else "holds no *.safetensors"
        raise WeightsError(f"{folder} {what}", hint="Download the model again.")
    return files


def read_ahead(folder: Path, check: Callable[[], None]) -> None:
    """Read the files of a part and keep nothing: the next reader finds them in the system's file cache.

    Args:
        check: called between pieces; what it raises ends the reading.
    Raises: WeightsError, as `weight_files`, and for a file that cannot be read.
    """
    buffer = bytearray(AHEAD_BYTES)
    for path in weight_files(folder):
        try:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    check()
        except OSError as e:
            raise WeightsError(f"{path} cannot be read: {e}", hint="Download the model again.") from e


def read_tensors(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    change: Callable[[str, Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """All tensors of a part on `device`; floating-point ones in `dtype` (None keeps that of the file).

    Args:
        change: called with the name of each tensor and the tensor; what it returns is kept instead.
    Raises: WeightsError on a file that is not safetensors.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in each_tensor(folder, device=device):
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        tensors[name] = tensor if change is None else change(name, tensor)
    return tensors


def each_tensor(folder: Path, *, device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a part one after the other, as they are stored.

    Raises: WeightsError on a file that is not safetensors.
    """
    for path in weight_files(folder):
        yield from _each_of(path, device=device)


def read_file(path: Path, *, device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All tensors of one safetensors file, as `read_tensors`. Raises: WeightsError if it is none."""
    return {
        name: tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        for name, tensor in _each_of(path, device=device)
    }


def _each_of(path: Path, *, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
    try:
        yield from _stream(path, device)
    except (SafetensorError, OSError) as e:
        raise WeightsError(
            f"{path} is not a readable safetensors file: {e}", hint="Download the model again."
        ) from e


def _stream(path: Path, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file, one after the other.

    The pages of a mapped file that were read stay in memory until it is unmapped, so it is mapped anew now and then.
    What was freed on the way is given back at the same time: small tensors that stay, between large ones that went,
    keep glibc from doing so by itself (quantizing 200 MB of 2 MB matrices left 0.6 GB behind).
    """
    with safe_open(path, framework="pt", device=str(device)) as file:
        names = list(file.keys())
    while names:
        read = 0
        with safe_open(path, framework="pt", device=str(device)) as file:
            while names and read < MAPPED_BYTES:
                tensor = file.get_tensor(names[0])
                read += tensor.nbytes
                yield names.pop(0), tensor
                del tensor
        _give_back_freed_memory()


def _give_back_freed_memory() -> None:
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)


def assign(module: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Give a module built on the meta device its tensors, by name, without copying; it is left in eval mode.

    Raises: WeightsError naming the first tensors that are missing, unknown or of another shape.
    """
    expected = module.state_dict()
    missing = sorted(expected.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - expected.keys())
    shapes = [
        f"{name} {list(tensors[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    for what, names in (("lacks", missing), ("has unknown", unknown), ("has the wrong shape:", shapes)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise WeightsError(
                f"{source} does not match {type(module).__name__}: it {what} {', '.join(names[:3])}{more}",
                hint="The config.json and the weights of this part belong to different models.",
            )
    module.load_state_dict(dict(tensors), assign=True)
    module.eval()
    module.requires_grad_(False)


def randomise(
    module: nn.Module,
    *,
    device: torch.device,
    dtype: torch.dtype,
    change: Callable[[str, Tensor], Tensor] | None = None,
    seed: int = 0,
) -> None:
    """Give a module built on the meta device random weights, made on `device`: N(0, 0.02), norms one more.

    Args:
        change: as for `read_tensors`.
    """
    generator = torch.Generator(device).manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        tensor = torch.empty(value.shape, device=device, dtype=dtype)
        scales = "norm" in name and name.endswith(("weight", "gamma"))
        tensor.normal_(1.0 if scales else 0.0, RANDOM_STD, generator=generator)
        tensors[name] = tensor if change is None else change(name, tensor)
    assign(module, tensors, source="random weights")


def save(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    file_name: str = "model.safetensors",
) -> None:
    """Write config.json and one safetensors file into a new folder; dtype None keeps that of each tensor."""
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n", "utf-8")
    save_file(
        {
            name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
            for name, tensor in tensors.items()
        },
        folder / file_name,
        metadata={"format": "pt"},
    )
    (folder / file_name).chmod(
        (folder / CONFIG).stat().st_mode
    )  # safetensors makes files for their owner alone
