"""Pickled checkpoints -> safetensors: the one place that unpickles, in a process of its own.

    parent: extract() ──> child: limited, sealed, torch.load ──> safetensors ──> parent

A pickle is a program. The child first reads its opcodes without running them and refuses every name that plain tensors
do not need; then PyTorch's restricted unpickler runs it, with a few times the file's size of address space at most.
What comes out must be a dictionary of plain tensors. Knows no model: names and shapes are `convert`'s.

    zip format (PyTorch 1.6 and later)   mapped into memory, never read as a whole
    older format                         read; its storages count against the limit too
"""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from packforcing_cli import durable
from packforcing_cli.errors import DiskFullError, PackforcingError, WeightsError

MEMORY_FACTOR = 4  # address space in sizes of the file: the map, one copy to write, slack
MEMORY_SLACK = 512 * 2**20

PLAIN_NAMES = frozenset(
    {"collections.OrderedDict", "torch.Size"}
    | {f"torch._utils.{name}" for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")}
    | {
        f"torch.{kind}Storage"
        for kind in ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")
    }
)
"""What the pickle of plain tensors refers to."""

_TRUSTED = "Get a file of plain tensors (safetensors is best) from who published it."
_AGAIN = "Download the file again."


@dataclass(frozen=True)
class Extracted:
    """What was taken out of a checkpoint.

    group:    the key of the dictionary that was taken, "" when the file is that dictionary.
    left_out: what else the file holds, its keys.
    """

    group: str
    left_out: tuple[str, ...]


def extract(source: Path, target: Path, *, wanted: Sequence[str]) -> Extracted:
    """Write one dictionary of tensors of a pickled checkpoint as safetensors; the unpickling runs in a subprocess.

    Args:
        target: the file to write.
        wanted: keys in order of preference, "" for a file that is itself the dictionary.
    Raises: WeightsError when the file is damaged, holds anything but plain tensors, none of the wanted keys, or needs
        more memory than its size explains; DiskFullError.
    """
    request = {"source": str(source.absolute()), "target": str(target.absolute()), "wanted": list(wanted)}
    done = subprocess.run(
        [sys.executable, "-P", "-m", __name__, json.dumps(request)],
        capture_output=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    lines = done.stdout.decode(errors="replace").splitlines()
    try:
        answer = json.loads(lines[-1])
    except (ValueError, IndexError):
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [
            f"the process that read it ended with {done.returncode}"
        ]
        raise WeightsError(f"{source} cannot be read as a checkpoint: {said[0]}", hint=_AGAIN) from None
    if "error" in answer:
        kind = DiskFullError if answer["disk_full"] else WeightsError
        raise kind(answer["error"], hint=answer["hint"])
    return Extracted(answer["group"], tuple(answer["left_out"]))


# ---------------------------------------------------------------------------------------------------- in the child


def _main(request: Mapping[str, Any]) -> dict[str, Any]:
    source, target = Path(request["source"]), Path(request["target"])
    _limit_memory(source.stat().st_size)
    _seal()
    try:
        group, tensors, left_out = read_group(source, request["wanted"])
        write(tensors, target)
    except PackforcingError as e:
        return {"error": e.message, "hint": e.hint, "disk_full": isinstance(e, DiskFullError)}
    except MemoryError:
        error = _too_large(source)
        return {"error": error.message, "hint": error.hint, "disk_full": False}
    return {"group": group, "left_out": left_out}


def _limit_memory(size: int) -> None:
    """Bound the address space to what this process has and a few times the file; Windows has no such limit."""
    try:
        import resource
    except ImportError:
        return
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        now = pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no /proc: macOS
        now = 64 * 2**30
    limit = now + MEMORY_FACTOR * size + MEMORY_SLACK
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _seal() -> None:
    """No sockets, no processes, no files written or changed by Python code, for the rest of this process."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def check(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(_REFUSED) or (event == "open" and int(arguments[2] or 0) & writing):
            raise PermissionError(f"a checkpoint may not do this: {event}")

    sys.addaudithook(check)


_REFUSED = (
    *("socket.", "subprocess.", "shutil.", "ctypes.dlopen", "pty.spawn", "webbrowser."),
    *(f"os.{name}" for name in ("system", "exec", "fork", "posix_spawn", "spawn", "startfile", "kill")),
    *(f"os.{name}" for name in ("remove", "rename", "rmdir", "mkdir", "chmod", "chown", "link", "symlink")),
    *("os.truncate", "os.putenv", "os.unsetenv"),
)
"""Beginnings of audit events (docs.python.org/3/library/audit_events.html) that reading a file never raises."""


def read_group(source: Path, wanted: Sequence[str]) -> tuple[str, dict[str, Tensor], list[str]]:
    """(key, tensors, other keys) of the first wanted dictionary of a checkpoint. Meant for the subprocess.

    Raises: WeightsError naming what is wrong.
    """
    _check_names(source)
    zipped = _is_zip(source)
    try:
        content = torch.load(source, map_location="cpu", weights_only=True, mmap=zipped)
    except MemoryError:
        raise
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, EOFError, LookupError) as e:
        if any(said in str(e) for said in ("allocate memory", "unable to mmap")):
            raise _too_large(source) from e
        said = str(e).strip() or type(e).__name__
        if said.startswith("Weights only load failed"):  # and goes on with how to switch the protection off
            reason = re.search(r"(?:WeightsUnpickler error: \S|[Uu]nsupported ).*", said)
            said = reason[0] if reason else "it holds more than plain tensors"
        said = said.splitlines()[0]
        raise WeightsError(f"{source} cannot be read as a checkpoint: {said}", hint=_AGAIN) from e
    except (AttributeError, OSError, RecursionError, AssertionError) as e:
        raise WeightsError(f"{source} cannot be read as a checkpoint: {e}", hint=_AGAIN) from e
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"{source} holds a {type(content).__name__}, not a dictionary of tensors", hint=_TRUSTED
        )
    for group in wanted:
        if group == "" and content and any(isinstance(value, Tensor) for value in content.values()):
            return "", _plain(source, "", content), []
        if group and isinstance(content.get(group), Mapping):
            tensors = _plain(source, group, content[group])
            return group, tensors, sorted(str(key) for key in content if key != group)
    found = ", ".join(f"{key} ({type(value).__name__})" for key, value in content.items()) or "nothing"
    names = " or ".join(name for name in wanted if name)
    raise WeightsError(
        f"{source} has no {names}; it holds {_short(found)}", hint="Is it the checkpoint of a video model?"
    )


def _plain(source: Path, group: str, values: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a dictionary of plain float tensors. Raises: WeightsError naming the first thing that is none."""
    if not values:
        raise WeightsError(f"{source}: {group or 'the checkpoint'} is empty", hint=_AGAIN)
    tensors: dict[str, Tensor] = {}
    for key, value in values.items():
        place = f"{group}[{key!r}]" if group else repr(key)
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise WeightsError(
                f"{source} holds more than tensors: {place} is of type {type(value).__name__}", hint=_TRUSTED
            )
        value = value.detach()
        if value.layout != torch.strided or value.is_quantized or value.dtype not in _DTYPES:
            kind = str(value.dtype if value.layout == torch.strided else value.layout).removeprefix("torch.")
            raise WeightsError(
                f"{source}: {place} is a tensor of {kind}; weights must be plain float tensors", hint=_TRUSTED
            )
        if value.nbytes > value.untyped_storage().nbytes():
            raise WeightsError(
                f"{source}: {place} claims {value.nbytes:,} bytes and has {value.untyped_storage().nbytes():,}",
                hint=_TRUSTED,
            )
        tensors[key] = value
    return tensors


_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def write(tensors: Mapping[str, Tensor], target: Path) -> None:
    """Write tensors as safetensors; those that share memory are separated. Raises: DiskFullError."""
    seen: set[int] = set()
    alone: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        shares = storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen
        seen.add(storage.data_ptr())
        alone[name] = tensor.clone() if shares else tensor.contiguous()
    try:
        save_file(alone, target, metadata={"format": "pt"})
    except (SafetensorError, OSError) as e:
        if durable.is_full_disk(e):
            raise DiskFullError(
                f"no space left to write {target.parent}", hint="Free some space and try again."
            ) from e
        raise WeightsError(f"{target} cannot be written: {e}", hint="Check the output folder.") from e


def _check_names(source: Path) -> None:
    """Refuse a pickle that refers to anything but what plain tensors need, without running it.

    Raises: WeightsError naming the key and the type; also for an archive that is not what PyTorch writes.
    """
    try:
        for stream, count in _pickles(source):
            with stream:
                for _ in range(count):
                    for name, key in _names(stream):
                        if name not in PLAIN_NAMES:
                            raise WeightsError(
                                f"{source} holds more than tensors: {key} refers to {name}; nothing was run",
                                hint=_TRUSTED,
                            )
    except (ValueError, EOFError, IndexError, zipfile.BadZipFile, OSError) as e:
        raise WeightsError(f"{source} cannot be read as a checkpoint: {e}", hint=_AGAIN) from e


def _pickles(source: Path) -> Iterator[tuple[IO[bytes], int]]:
    """The streams of a checkpoint that hold pickles, each with how many follow one another."""
    if not _is_zip(source):
        yield source.open("rb"), 5  # magic number, version, machine, the object, keys of its storages
        return
    with zipfile.ZipFile(source) as archive:
        entries = archive.infolist()
        packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
        if packed or sum(entry.file_size for entry in entries) > source.stat().st_size:
            raise WeightsError(
                f"{source} is not an archive PyTorch writes: "
                + (f"its entry {packed[0]} is compressed" if packed else "its entries overlap"),
                hint=_TRUSTED,
            )
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                yield archive.open(entry), 1


def _is_zip(source: Path) -> bool:
    """Whether a checkpoint has the zip format. Raises: WeightsError when it begins as one and has no end."""
    with source.open("rb") as file:
        begins = file.read(4) == b"PK\x03\x04"
    if begins and not zipfile.is_zipfile(source):
        raise WeightsError(f"{source} is truncated: the end of its archive is missing", hint=_AGAIN)
    return begins


def _names(stream: IO[bytes]) -> Iterator[tuple[str, str]]:
    """(name, the last text before it) of everything the next pickle of a stream refers to."""
    texts: list[str] = []
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".", 1), repr(texts[-1]) if texts else "it"
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(texts[-2:]), repr(texts[-3]) if len(texts) > 2 else "it"
        elif isinstance(argument, str):
            texts = [*texts[-2:], argument]


def _too_large(source: Path) -> WeightsError:
    return WeightsError(
        f"{source} needs more than {MEMORY_FACTOR} times its size in memory: it is not a plain checkpoint",
        hint=_TRUSTED,
    )


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "…"


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(_main(json.loads(sys.argv[1]))) + "\n")
