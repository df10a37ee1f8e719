"""What workers of a batch are given, how they are to work, and whom they tell: plain values, no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from packforcing_cli import catalog, packages


@dataclass(frozen=True)
class Task:
    """A job as a worker gets it; plain values, so that it can be sent.

    spec:    kind and request, see `batch_plan`.
    output, run: the file and its run folder, absolute.
    result:  what it made, if it was done before.
    is_orphan: whether whoever worked on it on another machine is known to be gone.
    """

    id: str
    spec: Mapping[str, Any]
    output: str
    run: str
    load_key: str
    layout_key: str
    attempt: int = 1
    retries: int = 0
    fit: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    is_orphan: bool = False


class Board(Protocol):
    """Where jobs come from and what became of them is said."""

    def claim(self, load_key: str, layout_key: str) -> Task | None:
        """The next job, best of these keys; None if there is nothing now."""

    def upcoming(self, load_key: str, layout_key: str, limit: int) -> Sequence[Task]:
        """Jobs that `claim` may give next."""

    def idle(self) -> float | None:
        """Seconds to wait before `claim` is asked again; None if nothing will come any more."""

    def progress(self, task: Task, blocks: int, total: int) -> str:
        """Blocks are there. Returns: why the job is to end, or ""."""

    def done(self, task: Task, result: Mapping[str, Any]) -> None:
        """The file is there."""

    def fail(
        self,
        task: Task,
        error: BaseException,
        *,
        retry_in: float | None = None,
        fit: Mapping[str, Any] | None = None,
    ) -> None:
        """It went wrong, for good or until it is tried again."""

    def release(self, task: Task, *, cancelled: bool = False, why: str = "") -> None:
        """It is given back, unfinished."""

    def refuse(self, task: Task, error: BaseException) -> bool:
        """This worker cannot have the job's model on its device. Returns: whether another one may; it is given back."""

    def pause(self, why: str) -> None:
        """Nobody should begin another job."""


@dataclass(frozen=True)
class Options:
    """How jobs are done.

    timeout:  seconds a job may take; None = any.
    retries:  how often a job is tried again after a failure that may pass.
    auto_fit: make the smallest change that lets a job fit in memory, before and after memory ran out.
    may_exit: whether the process may end itself when a job hangs or spoiled the GPU.
    slot:     number of this worker among its like, from 0.
    places:   model -> the folder where it is on this machine, of models that are not where a job says.
    """

    timeout: float | None = None
    retries: int = 2
    auto_fit: bool = False
    may_exit: bool = False
    slot: int = 0
    places: Mapping[str, str] = field(default_factory=dict)


def failure_of(error: BaseException) -> dict[str, Any]:
    """What is kept of a failure: kind, message, hint and exit code."""
    return {
        "kind": getattr(error, "kind", "") or type(error).__name__,
        "message": getattr(error, "message", "") or " ".join(str(error).split()) or "no message",
        "hint": getattr(error, "hint", ""),
        "exit_code": getattr(error, "exit_code", 1),
    }


def run_folder(folder: Path, job: str) -> Path:
    """Where the journal of a job is, in the folder of a batch."""
    return folder / ".packforcing" / "runs" / job[:32]


def file_sha256(path: Path) -> str:
    """Hash of a file, read as a stream. Raises: OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_hash(name: str) -> str:
    """Hash of all files of a model package; of a random model its name. Raises: PackforcingError if it is not here."""
    if catalog.of_random(name) is not None:
        return f"random {name.lower()}"
    folder = packages.find_package(name)
    known = packages.read_manifest(folder)
    packages.require_complete(folder, known)
    parts = sorted({*known.parts, *known.references})
    lines = [known.name, known.version, *(f"{part} {known.part_hash(part)}" for part in parts)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
