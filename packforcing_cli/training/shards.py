"""Weights shared out among processes (FSDP2), and their checkpoints (torch.distributed.checkpoint).

    every process   1/N of each weight, gradient, moment and average, as DTensors
    a layer runs    its weights are gathered, used and let go; in the backward pass again, then its gradient is averaged
                    and shared out
    the rest        (embeddings, head, compressor) is gathered as one group while `Whole` runs

The processes must gather in the same order, so every one of them runs the same modules the same number of times,
whatever its items are. A checkpoint is a folder of safetensors files, one a process, which any number of processes
can read:

    .step-0000100.tmp/   written by all, each file synced
    step-0000100/        the same, renamed by the first process: it is there whole or not at all
        shard-….safetensors     parts of tensors, with their offsets
        checkpoint.json         step, facts, names and sizes of the files; written last

Knows modules and tensors; no data, no loss. Source: torch.distributed.fsdp.fully_shard, torch.distributed.checkpoint.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from packforcing_cli import durable
from packforcing_cli.errors import EnvironmentProblem, UsageError, WeightsError
from packforcing_cli.transformer import WanTransformer

if TYPE_CHECKING:  # most trainings share nothing out, and some builds of PyTorch cannot
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.device_mesh import DeviceMesh

DESCRIPTION = "checkpoint.json"
LAYER_METHODS = ("text_keys_values", "inputs_alone")
T = TypeVar("T")


class Whole(nn.Module):
    """A network and what is gathered with it: call it with what is to run while the weights are there."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, call: Callable[[], T]) -> T:
        with warnings.catch_warnings():
            # What layers return are views; nothing is done to them in place.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
            return call()


def whole(mesh: DeviceMesh, transformer: WanTransformer, *others: nn.Module) -> Whole:
    """Share a transformer out, layer by layer, and other modules with what is not in a layer; in place.

    Weights that lie in host memory go to the mesh's device a layer at a time, so that they need not fit there whole.
    Optimisers and averages must be made afterwards.

    Raises: EnvironmentProblem if this PyTorch cannot.
    """
    with _needed():
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
    for layer in transformer.blocks:
        fully_shard(layer, mesh=mesh)
        for method in LAYER_METHODS:
            register_fsdp_forward_method(layer, method)
    root = Whole(transformer, *others)
    fully_shard(root, mesh=mesh, reshard_after_forward=True)
    if mesh.device_type == "cpu":  # gloo has no mean
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    return root


def mesh_of(device: torch.device, count: int) -> DeviceMesh:
    """All processes in a row. Raises: UsageError if there is one; EnvironmentProblem if this PyTorch cannot."""
    if not dist.is_available() or not dist.is_initialized():
        raise UsageError(
            "weights are shared out among several processes, and there is one",
            hint="Start it with torchrun --nproc-per-node N -m packforcing_cli train …",
        )
    with _needed():
        from torch.distributed.device_mesh import init_device_mesh
    return init_device_mesh(device.type, (count,))


def is_shared(tensor: Tensor) -> bool:
    """Whether a tensor is one of those that are shared out."""
    known: Any = sys.modules.get("torch.distributed.tensor")  # without it nothing is
    return known is not None and isinstance(tensor, known.DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, of the same storage; all of it if it is not shared out."""
    shared: Any = tensor
    return shared.to_local() if is_shared(tensor) else tensor


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of every tensor, on the CPU; all processes must ask, and the first one alone gets them."""
    keep = not dist.is_initialized() or dist.get_rank() == 0
    found: dict[str, Tensor] = {}
    value: Any
    for name, value in tensors.items():
        all_of_it = value.full_tensor() if is_shared(value) else value
        if keep:
            found[name] = all_of_it.detach().cpu()
    return found


def anchored(loss: Tensor, modules: Sequence[nn.Module]) -> Tensor:
    """The loss, with a gradient of zero to every trained weight: a weight that one process has no gradient of and
    another has would be waited for for ever. Ask inside of `Whole`."""
    for module in modules:
        for parameter in module.parameters():
            if parameter.requires_grad and not is_shared(parameter):
                loss = loss + 0.0 * parameter.reshape(-1)[:1].sum()
    return loss


def clip_gradients(gradients: Sequence[Tensor], limit: float) -> float:
    """As `nn.utils.clip_grad_norm_`, over the parts of all processes; returns the norm before."""
    parts = [own_part(gradient) for gradient in gradients]
    total = torch.stack([part.double().square().sum() for part in parts]).sum()
    dist.all_reduce(total)
    norm = float(total.sqrt())
    scale = limit / (norm + 1e-6)
    if scale < 1:
        for part in parts:
            part.mul_(scale)
    return norm


# -- checkpoints --------------------------------------------------------------------------------------------------


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def save(path: Path, tensors: Mapping[str, Tensor], step: int, facts: Mapping[str, Any]) -> None:
    """Write a checkpoint folder; all processes must ask. A kill or a full disk leaves no part of it under `path`.

    Raises: OSError, in every process if in one; what torch.distributed raises if another process is gone.
    """
    with _needed():
        from torch.distributed.checkpoint import state_dict_saver
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    temporary, is_first = _temporary(path), dist.get_rank() == 0
    with _failing_together():
        if is_first:
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(".step-*"):  # by a kill
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir()
    try:
        # A number without dimensions has no slices, and so no parts.
        values = {name: value.reshape(1) if value.ndim == 0 else value for name, value in tensors.items()}
        with _quiet():
            state_dict_saver.save(
                values, storage_writer=HuggingFaceStorageWriter(path=str(temporary), save_distributed=True)
            )
        with _failing_together():
            if is_first:
                files = sorted(temporary.glob("*.safetensors"))
                for file in files:
                    durable.sync_file(file)
                said = {
                    "step": step,
                    "facts": dict(facts),
                    "files": {file.name: file.stat().st_size for file in files},
                }
                durable.write(temporary / DESCRIPTION, json.dumps(said).encode())
                durable.sync_folder(temporary)
                remove(path)
                temporary.rename(path)
                durable.sync_folder(path.parent)
    except CheckpointException as error:
        raise _cause(error) from error
    finally:
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a checkpoint folder; a kill leaves no half of it under its name."""
    if path.is_dir():
        temporary = path.with_name(f".{path.name}.old")
        shutil.rmtree(temporary, ignore_errors=True)
        path.rename(temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def describe(path: Path) -> dict[str, Any]:
    """Step and facts of a checkpoint folder. Raises: OSError or ValueError if it is not whole."""
    said: dict[str, Any] = json.loads((path / DESCRIPTION).read_text("utf-8"))
    if not {"step", "facts", "files"} <= said.keys():
        raise ValueError(f"{DESCRIPTION} lacks entries")
    for name, size in said["files"].items():
        if (path / name).stat().st_size != size:
            raise ValueError(f"{name} was cut short")
    return said


def stored(path: Path) -> dict[str, torch.Size]:
    """Names and whole shapes of the tensors of a checkpoint folder."""
    with _needed():
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    metadata = HuggingFaceStorageReader(path=str(path)).read_metadata()
    return {name: torch.Size(entry.size) for name, entry in metadata.state_dict_metadata.items()}  # type: ignore[union-attr]


def load(path: Path, into: Mapping[str, Tensor]) -> None:
    """Fill tensors, shared out or not, from a checkpoint folder of any number of processes, in place.

    Raises: WeightsError if a tensor is not there or cannot be read, in every process if in one.
    """
    with _needed():
        from torch.distributed.checkpoint import state_dict_loader
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    values = {name: value.reshape(1) if value.ndim == 0 else value for name, value in into.items()}
    try:
        with _quiet():
            state_dict_loader.load(
                dict(values),
                storage_reader=HuggingFaceStorageReader(path=str(path)),
                no_dist=not dist.is_initialized(),
            )
    except CheckpointException as error:
        raise WeightsError(
            f"{path} cannot be read: {_cause(error)}", hint="Use another --out folder."
        ) from error


def placed_like(value: Tensor, example: Tensor) -> Tensor:
    """A whole tensor that every process has, shared out as another is."""
    if not is_shared(example):
        return value.to(example.device)
    from torch.distributed.tensor import distribute_tensor

    like: Any = example
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def _needed() -> Iterator[None]:
    """An import of what an old PyTorch has not. Raises: EnvironmentProblem."""
    try:
        yield
    except ImportError as error:
        raise EnvironmentProblem(
            f"PyTorch {torch.__version__} cannot share weights out among processes: {error}",
            hint="Install a newer one, or leave --fsdp away.",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its own use of what it deprecates
        yield


@contextmanager
def _failing_together() -> Iterator[None]:
    """An OSError of one process becomes one of all."""
    found: OSError | None = None
    try:
        yield
    except OSError as error:
        found = error
    said: list[tuple[int | None, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, None if found is None else (found.errno, str(found)))
    first = next((entry for entry in said if entry is not None), None)
    if found is not None:
        raise found
    if first is not None:
        raise OSError(first[0] or 0, f"another process: {first[1]}")


def _cause(error: CheckpointException) -> Exception:
    """The first failure of torch's checkpointing, a full disk as an OSError with its number."""
    cause, _ = next(iter(error.failures.values()))
    if durable.is_full_disk(cause):
        return OSError(28, f"no space left: {cause}")
    return cause if isinstance(cause, Exception) else OSError(5, f"{type(cause).__name__}: {cause}")
