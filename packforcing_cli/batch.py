"""Hundreds of videos: from the lines of a manifest to finished files, each exactly once.

    lines -> planned (`batch_plan`) -> the ledger -> workers, each with a model -> files

    FOLDER/0001-a-red-circle-7.mp4      outputs, named by a template
    FOLDER/ledger.sqlite3               what became of each job
    FOLDER/.packforcing/runs/ID         a run folder for each job
    FOLDER/.packforcing/logs            what workers said

Here are the folder with its ledger, what all engines have, and a batch in this process (`generate_many`). Workers are
processes of their own, on this machine with `local_engine`, on others with `ray_engine`.
"""

from __future__ import annotations

import abc
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packforcing_cli import durable, ledger, manifest
from packforcing_cli.batch_plan import TEMPLATE, Template, plan_jobs
from packforcing_cli.errors import PackforcingError, UsageError
from packforcing_cli.ledger import Added, Entry, Ledger, Row
from packforcing_cli.tasks import Options, Task, file_sha256, run_folder

HIDDEN = manifest.HIDDEN
POLL_SECONDS = 0.2


# --------------------------------------------------------------------------------------------------------- the folder


@dataclass
class Folder:
    """The folder of a batch, its ledger open.

    Raises: UsageError, LockedError, DiskFullError.
    """

    path: Path
    ledger: Ledger

    @classmethod
    def open(cls, path: Path, *, shard: tuple[int, int] | None = None) -> Folder:
        """Open the folder, made if it is not there."""
        path = path.absolute()
        name = ledger.name_for(shard)
        others = [there.name for there in ledger.ledgers(path) if _shards(there.name) != _shards(name)]
        if others:
            raise UsageError(
                f"{path} was begun with {_said_shards(others[0])}",
                hint="Go on with the same --shard of so many, or choose another --out.",
            )
        try:
            durable.make_folder(path / HIDDEN / "runs")
            durable.make_folder(path / HIDDEN / "logs")
        except OSError as error:
            raise durable.failure(
                error, path, kind=UsageError, hint="Choose another folder with --out."
            ) from error
        return cls(path, Ledger.create(path / name, meta={"created": repr(time.time())}))

    @classmethod
    def rows_of(cls, path: Path, *, shard: tuple[int, int] | None = None) -> list[Row]:
        """The jobs of a folder; nothing is made if it is not there. Raises: UsageError, RunFolderError."""
        place = path.absolute() / ledger.name_for(shard)
        if not place.is_file():
            return []
        with Ledger.open(place) as base:
            return base.rows()

    def add(self, entries: Sequence[Entry], *, source: str, add: bool = False) -> Added:
        """Queue what is not there yet.

        Args:
            source: the manifest's name.
            add:    whether it may be another manifest than before.
        Raises: UsageError if the folder has jobs that are not among these.
        """
        found = self.ledger.add(entries, only_look=True)
        if found.elsewhere and not add:
            name = self.ledger.meta("source") or "another manifest"
            raise UsageError(
                f"{self.path} belongs to another manifest: {found.elsewhere} of its jobs (from {name}) are not in"
                f" {source}",
                hint="Choose another --out, or put these jobs beside those with --add.",
            )
        self.ledger.set_meta("source", source)
        return self.ledger.add(entries)

    def check_done(self, on_file: Callable[[int, int], None] = lambda n, total: None) -> list[str]:
        """Compare what done jobs made with its hash: what is gone is queued again, what is another file fails.

        Returns: what a person should be told.
        """
        notes = []
        rows = self.ledger.rows("done")
        for number, row in enumerate(rows, 1):
            path = self.path / row.output
            on_file(number, len(rows))
            try:
                same = (
                    path.stat().st_size == row.result["size_bytes"]
                    and file_sha256(path) == row.result["sha256"]
                )
            except FileNotFoundError:
                notes.append(f"{row.output} is gone: it is made again")
                self.ledger.again(row.id, "its file is gone")
                continue
            except OSError as error:
                self.ledger.spoiled(row.id, UsageError(f"{path} cannot be read: {error.strerror}"))
                continue
            if not same:
                self.ledger.spoiled(
                    row.id,
                    UsageError(
                        f"{row.output} is not what was made: {path.stat().st_size:,} bytes, and"
                        f" {row.result['size_bytes']:,} were written",
                        hint="packforcing batch retry makes it again, and keeps this file under another name.",
                    ),
                )
        return notes

    def task(self, row: Row, *, is_orphan: bool = False) -> Task:
        """A job as a worker gets it."""
        return Task(
            id=row.id,
            spec=row.spec,
            output=str(self.path / row.output),
            run=str(run_folder(self.path, row.id)),
            load_key=row.load_key,
            layout_key=row.layout_key,
            attempt=row.attempt,
            retries=row.retries,
            fit=row.fit,
            result=row.result,
            is_orphan=is_orphan,
        )


def _shards(name: str) -> str:
    return name.rpartition("-of-")[2] if "-of-" in name else ""


def _said_shards(name: str) -> str:
    count = _shards(name).partition(".")[0]
    return f"--shard I/{count}" if count else "no --shard"


def parse_shard(text: str) -> tuple[int, int]:
    """ "2/8" -> (2, 8). Raises: UsageError."""
    first, slash, last = text.partition("/")
    if slash and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= 100_000:
        return int(first), int(last)
    raise UsageError(f"--shard {text}: must be I/N with I from 1 to N", hint="For example --shard 3/8.")


def of_shard(entries: Sequence[Entry], shard: tuple[int, int] | None) -> list[Entry]:
    """Every N-th job, beginning with the I-th; one that goes on with another one's video stays with that."""
    if shard is None:
        return list(entries)
    part_of: dict[str, int] = {}
    for number, entry in enumerate(entries):
        part_of[entry.id] = part_of.get(entry.after, number % shard[1])
    return [entry for entry in entries if part_of[entry.id] == shard[0] - 1]


# ------------------------------------------------------------------------------------ the ledger as a worker's board


_AT_WORK: set[tuple[Path, str]] = set()
"""Ledgers and jobs in them that this process claimed and that did not come to an end."""


class LedgerBoard:
    """Jobs straight from the ledger, for workers of this machine.

    only: ids of the jobs to do; None = all.
    """

    def __init__(self, folder: Folder, *, slot: int = 0, only: Sequence[str] | None = None) -> None:
        self._folder, self._slot = folder, slot
        self._holder = ledger.this_process()
        self._only = tuple(only or ())

    def release_stale(self) -> None:
        """Give back what this process claimed before and nobody in it is at work on any more."""
        base = self._folder.ledger
        for row in base.rows("started"):
            if row.holder == self._holder and (base.path, row.id) not in _AT_WORK:
                base.release(row.id, self._holder, why="left behind")

    def claim(self, load_key: str, layout_key: str) -> Task | None:
        row = self._folder.ledger.claim(
            self._holder, load_key=load_key, layout_key=layout_key, ids=self._only
        )
        if row is None:
            return None
        _AT_WORK.add((self._folder.ledger.path, row.id))
        return self._folder.task(row, is_orphan=self._folder.ledger.is_orphan(row.id))

    def upcoming(self, load_key: str, layout_key: str, limit: int) -> list[Task]:
        skip = self._slot if limit == 1 else 0  # workers that look ahead look at different jobs
        rows = self._folder.ledger.upcoming(
            load_key=load_key, layout_key=layout_key, limit=limit, skip=skip, ids=self._only
        )
        return [self._folder.task(row) for row in rows]

    def idle(self) -> float | None:
        """Waits for jobs that may be tried again, and for those of other processes of this machine.

        Not for jobs of other machines, nor for what comes after them: `batch retry --lost` is for those.
        """
        base = self._folder.ledger
        if base.meta("paused") is not None:
            return None
        later = base.next_start(self._only)
        if later is not None:
            return max(POLL_SECONDS, min(1.0, later - time.time()))
        here = [
            holder
            for holder in base.holders(self._only)
            if holder != self._holder and ledger.host_of(holder) == ledger.host_of(self._holder)
        ]
        return 2 * POLL_SECONDS if here else None

    def progress(self, task: Task, blocks: int, total: int) -> str:
        return self._folder.ledger.progress(task.id, self._holder, blocks, total)

    def done(self, task: Task, result: Mapping[str, Any]) -> None:
        with self._ends(task):
            self._folder.ledger.done(task.id, self._holder, result)

    def fail(
        self,
        task: Task,
        error: BaseException,
        *,
        retry_in: float | None = None,
        fit: Mapping[str, Any] | None = None,
    ) -> None:
        with self._ends(task):
            self._folder.ledger.fail(task.id, self._holder, error, retry_in=retry_in, fit=fit)

    def release(self, task: Task, *, cancelled: bool = False, why: str = "") -> None:
        with self._ends(task):
            self._folder.ledger.release(task.id, self._holder, cancelled=cancelled, why=why)

    @contextlib.contextmanager
    def _ends(self, task: Task) -> Iterator[None]:
        try:
            yield
        finally:
            _AT_WORK.discard((self._folder.ledger.path, task.id))

    def refuse(self, task: Task, error: BaseException) -> bool:
        return False  # all workers of a machine are alike

    def pause(self, why: str) -> None:
        self._folder.ledger.set_meta("paused", why)


# ----------------------------------------------------------------------------------------------- what all engines have


@dataclass(frozen=True)
class State:
    """How a batch stands.

    counts: of jobs by status.  work: done and whole, in the ledger's units.  started: jobs that are being made.
    new_failures: since this process began, but for jobs that failed only with their source.
    notes: what a person should be told now.
    """

    counts: Mapping[str, int]
    work: tuple[float, float]
    started: Sequence[Row]
    workers: int
    new_failures: int
    notes: Sequence[str] = ()


class Engine(abc.ABC):
    """What all engines have: the ledger is looked at again and again until nothing is left to do.

    Attributes: why: the reason why no more jobs are begun, "" while they are.
        problem: why jobs are left that nobody can do, None while there are none.
    """

    def __init__(self, folder: Folder, *, max_failures: int | None = None) -> None:
        self.folder = folder
        self.max_failures = max_failures
        self.why = ""
        self.problem: PackforcingError | None = None
        self._notes = list[str]()
        self._failed_before = folder.ledger.failures()

    @abc.abstractmethod
    def run(self) -> Iterator[State]:
        """Do all jobs; yields how it stands, a few times a second."""

    @abc.abstractmethod
    def stop(self, why: str) -> None:
        """Let workers end after the block they are at."""

    @abc.abstractmethod
    def kill(self) -> None:
        """End all workers at once; calling it again does no harm."""

    def state(self, workers: int) -> State:
        """How it stands now."""
        base = self.folder.ledger
        counts = base.counts()
        notes, self._notes = self._notes, []
        return State(
            counts=counts,
            work=base.work(),
            started=base.rows("started"),
            workers=workers,
            new_failures=max(0, base.failures() - self._failed_before),
            notes=notes,
        )

    def has_work(self) -> bool:
        """Whether jobs are left that somebody of this machine does or will do, and this engine waits for."""
        if self.why:
            return False
        base = self.folder.ledger
        host = ledger.host_of(ledger.this_process())
        held_here = any(ledger.host_of(holder) == host for holder in base.holders())
        return held_here or (base.next_start() is not None and base.meta("paused") is None)

    def too_many(self, state: State) -> bool:
        """Whether --max-failures is reached."""
        return self.max_failures is not None and state.new_failures >= self.max_failures


def threads_of(folder: Folder, workers: int, wanted: int | None, *, usual: int | None = None) -> int:
    """Threads a worker has, the same for all that ever work on a folder: results may depend on them.

    Args:
        wanted: what a person asked for; None = nothing.
        usual:  for a folder that was not begun; None = OMP_NUM_THREADS, or a share of this machine's cores.
    Raises: UsageError if others are wanted than before.
    """
    there = folder.ledger.meta("threads")
    if there is not None:
        if wanted is not None and wanted != int(there):
            raise UsageError(
                f"{folder.path} was begun with {there} threads a worker, and results may depend on them",
                hint=f"Leave --threads away, or give --threads {there}.",
            )
        return int(there)
    given = os.environ.get("OMP_NUM_THREADS", "")
    count = wanted or usual or (int(given) if given.isdecimal() and int(given) else 0)
    count = count or max(1, (os.cpu_count() or 1) // workers)
    folder.ledger.set_meta("threads", str(count))
    return count


# ---------------------------------------------------------------------------------------------------------- the library


@dataclass(frozen=True)
class Made:
    """What became of a job of `generate_many`.

    number: of the job, from 0.  path: the file; None if it failed.  error: why.  result: hashes and figures.
    """

    number: int
    path: Path | None
    error: str
    result: Mapping[str, Any]


def generate_many(
    jobs: Sequence[Mapping[str, Any] | str],
    folder: Path | str,
    *,
    defaults: Mapping[str, Any] | None = None,
    name: str = TEMPLATE,
    seed: int = 0,
    timeout: float | None = None,
    retries: int = 2,
    auto_fit: bool = False,
) -> Iterator[Made]:
    """Make many videos in this process with models that are loaded once; yields each as it is done or fails.

    The same folder and jobs go on where they ended: what is done is verified and yielded again, not made again; what
    failed is tried again. What a job may say is what a line of `packforcing batch` may; a model must be named, there or
    in `defaults`, unless it is the demo.
    Args:
        jobs:     prompts, or keys and values like {"prompt": "a red circle", "seconds": 5, "seed": 7}.
        defaults: key -> value for jobs that do not say otherwise.
        name:     how files are called, see `batch_plan.Template`.
        seed:     of jobs without one.
        timeout, retries, auto_fit: as `worker.Options`; a job that takes too long ends after its block.
    Raises: UsageError with all mistakes in the jobs; DiskFullError; LockedError. Other failures are the job's.
    """
    from packforcing_cli.worker import Worker

    lines = manifest.of_values(jobs, defaults={"model": "demo", **(defaults or {})})
    place = Path(folder).absolute()
    entries, _ = plan_jobs(lines, template=Template(name), seed=seed, there=Folder.rows_of(place), root=place)
    opened = Folder.open(place)
    with opened.ledger as base:
        number_of = {entry.id: entry.position - 1 for entry in entries}
        board = LedgerBoard(opened, only=list(number_of))
        board.release_stale()
        base.retry(list(number_of))  # what failed or was cancelled before
        opened.add(entries, source="generate_many", add=True)
        opened.check_done()
        base.set_meta("paused", None)
        told = set[str]()
        options = Options(timeout=timeout, retries=retries, auto_fit=auto_fit)

        def ended() -> Iterator[Made]:
            for row in base.rows():
                if (
                    row.id in number_of
                    and row.id not in told
                    and row.status in ("done", "failed", "cancelled")
                ):
                    told.add(row.id)
                    path = opened.path / row.output if row.status == "done" else None
                    yield Made(number_of[row.id], path, row.error.get("message", ""), row.result)

        yield from ended()
        for _ in Worker(board, options).run():
            yield from ended()
        yield from ended()
