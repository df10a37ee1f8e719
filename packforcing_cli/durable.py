"""Durable writes: a file is there whole or not at all, after a kill and after a power cut.

    a temporary file in the same folder -> fsync -> rename -> fsync of the folder

The temporary name is a function of the target's, so a kill leaves at most one behind, and the next write takes
its place. Two processes must not write one target at a time; run folders and part files have locks for that.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from packforcing_cli.errors import DiskFullError, PackforcingError

FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})
BINARY = getattr(os, "O_BINARY", 0)


def is_full_disk(error: BaseException) -> bool:
    """Whether an error says that no room is left; safetensors wraps the system's own in one of text."""
    text = str(error)
    return getattr(error, "errno", None) in FULL_DISK or any(f"os error {n})" in text for n in FULL_DISK)


def temporary_path(path: Path) -> Path:
    """The hidden file beside `path` that becomes it; short whatever the name of `path` is."""
    return path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.tmp")


@contextmanager
def replacing(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Give a file written inside the `with` the name `path`; if anything fails nothing is left of it.

    Yields: the temporary path to write to.
    Raises: OSError; FileExistsError if `path` is there and `overwrite` is False.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        sync_file(temporary)
        if overwrite:
            temporary.replace(path)
        else:
            rename_new(temporary, path)
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write(path: Path, data: bytes) -> None:
    """Write a whole file, replacing what is there. Raises: OSError; the old file is untouched then."""
    with replacing(path) as temporary:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | BINARY, 0o666)
        try:
            write_all(fd, data)
        finally:
            os.close(fd)


def write_all(fd: int, data: bytes | bytearray) -> None:
    """Write all of `data`; a short write is continued."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def append(fd: int, data: bytes, *, size_bytes: int, sync: bool = False) -> None:
    """Write `data` at the end of a file of `size_bytes`, all or nothing. Raises: OSError."""
    try:
        os.lseek(fd, size_bytes, os.SEEK_SET)
        write_all(fd, data)
        if sync:
            os.fsync(fd)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, size_bytes)
        raise


def sync_file(path: Path) -> None:
    """Make the contents of a file last."""
    fd = os.open(path, os.O_RDWR | BINARY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing, so that they last. Raises: OSError."""
    new = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last. Windows cannot and needs not."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(fd)


def failure(error: OSError, path: Path, *, kind: type[PackforcingError], hint: str = "") -> PackforcingError:
    """The error to raise for a write that failed: DiskFullError if the disk is full, else `kind`."""
    if error.errno in FULL_DISK:
        said = f"Free some space. {hint}".strip()
        return DiskFullError(f"the disk is full: {path} could not be written", hint=said)
    return kind(f"{path} could not be written: {error.strerror or error}", hint=hint)


def rename_new(temporary: Path, target: Path) -> None:
    """Rename, never over a file that appeared meanwhile. Raises: FileExistsError."""
    try:
        os.link(temporary, target)  # unlike rename, fails if the target exists
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if target.exists():
            raise FileExistsError(errno.EEXIST, "appeared meanwhile", str(target)) from None
        temporary.replace(target)
    else:
        temporary.unlink()
