"""The ledger of a batch: which jobs there are and what became of each, in an SQLite file beside the outputs.

    queued -> started -> done | failed | cancelled        `retry` and a takeover make them queued again
                 ^  |
                 +--+  progress; a dead process's job is queued again by whoever looks next

A job may come after another one, whose video it goes on with: it is not given before that is done, and when that fails
or is cancelled it does, too.

Any number of processes of one machine may use it at once: one writes at a time, and every change of a job names the
process that holds it, so that one which lost its job changes nothing. A holder is (host, boot, process, start time):
whether it lives can be told on its own machine only; one of another machine is believed to live.

Knows no models, videos or manifests: a job's `spec` is text to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Self

from packforcing_cli import durable
from packforcing_cli.errors import DiskFullError, LockedError, PackforcingError, RunFolderError, UsageError

SCHEMA = 2
NAME = "ledger.sqlite3"
BUSY_SECONDS = 60.0
STATUSES = ("queued", "started", "done", "failed", "cancelled")
MAX_DEATHS = 5
"""So many processes in a row may die over a job without a new block before it is given up."""
SOURCE_FAILED = "SourceFailed"
"""Kind of the error of a job that comes after one which failed or was cancelled."""
_ORPHAN = "orphan "  # and a job's id: a note in meta
_SENDER = "sender "  # and a holder
_NETWORK = ("nfs", "cifs", "smb", "fuse", "9p", "afs", "ceph", "lustre", "gpfs", "glusterfs", "beegfs")

_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE jobs (
    id TEXT PRIMARY KEY,
    key TEXT NOT NULL,
    position INTEGER NOT NULL,
    line INTEGER NOT NULL,
    shown TEXT NOT NULL,
    output TEXT NOT NULL,
    spec TEXT NOT NULL,
    load_key TEXT NOT NULL,
    layout_key TEXT NOT NULL,
    weight REAL NOT NULL,
    after TEXT NOT NULL DEFAULT '',
    status TEXT NOT NULL DEFAULT 'queued',
    attempt INTEGER NOT NULL DEFAULT 0,
    retries INTEGER NOT NULL DEFAULT 0,
    deaths INTEGER NOT NULL DEFAULT 0,
    not_before REAL NOT NULL DEFAULT 0,
    holder TEXT NOT NULL DEFAULT '',
    wants_cancel INTEGER NOT NULL DEFAULT 0,
    blocks INTEGER NOT NULL DEFAULT 0,
    total INTEGER NOT NULL DEFAULT 0,
    fit TEXT NOT NULL DEFAULT '{}',
    error TEXT NOT NULL DEFAULT '{}',
    result TEXT NOT NULL DEFAULT '{}',
    started REAL,
    ended REAL
);
CREATE INDEX jobs_by_status ON jobs (status, position);
CREATE INDEX jobs_by_key ON jobs (key);
CREATE INDEX jobs_by_after ON jobs (after);
CREATE TABLE events (
    at REAL NOT NULL, job TEXT NOT NULL, event TEXT NOT NULL, attempt INTEGER NOT NULL,
    holder TEXT NOT NULL, said TEXT NOT NULL
);
CREATE INDEX events_by_job ON events (job);
"""
_FROM_1 = (
    "ALTER TABLE jobs ADD COLUMN after TEXT NOT NULL DEFAULT ''",
    "CREATE INDEX jobs_by_after ON jobs (after)",
    "UPDATE meta SET value = '2' WHERE name = 'schema'",
)
_ELSEWHERE = (
    "WITH RECURSIVE elsewhere(id) AS (SELECT id FROM jobs WHERE status = 'started'"
    " AND substr(holder, 1, length(?)) != ?"
    " UNION SELECT jobs.id FROM jobs JOIN elsewhere ON jobs.after = elsewhere.id WHERE jobs.status = 'queued')"
)
"""Jobs that processes of other machines hold, and queued ones that come after them. Values: `_this_host` twice."""
_IS_READY = "NOT EXISTS (SELECT 1 FROM jobs AS first WHERE first.id = jobs.after AND first.status != 'done')"


@dataclass(frozen=True)
class Entry:
    """A job to be queued.

    id:       hash of what it will do, the contents of its inputs included.
    key:      hash of what was asked for: the same after an input has changed.
    position: in the manifest, from 1.
    output:   the file, relative to the folder.
    spec:     all that is needed to do it.
    load_key, layout_key: jobs with equal ones share a loaded model, and the sizes of its memory. No load_key: it could
              not be planned, and goes when a manifest does not have it any more.
    weight:   how much work it is, in any unit.
    problem:  why it cannot be done; it is queued as failed then.
    after:    id of the job whose video it goes on with; "" = of none.
    """

    id: str
    key: str
    position: int
    line: int
    shown: str
    output: str
    spec: Mapping[str, Any]
    load_key: str
    layout_key: str
    weight: float
    problem: PackforcingError | None = None
    after: str = ""


@dataclass(frozen=True)
class Row:
    """A job as the ledger has it; times in seconds since 1970.

    attempt: how often it was started.  retries: how often because it failed.
    deaths:  processes that died over it in a row.
    holder:  who is at work on it, "" if nobody.  fit: options that were changed so that it fits in memory.
    error:   kind, message, hint and exit_code of the last failure.  result: hashes and figures.
    """

    id: str
    key: str
    position: int
    line: int
    shown: str
    output: str
    spec: dict[str, Any]
    load_key: str
    layout_key: str
    weight: float
    after: str
    status: str
    attempt: int
    retries: int
    deaths: int
    not_before: float
    holder: str
    wants_cancel: bool
    blocks: int
    total: int
    fit: dict[str, Any]
    error: dict[str, Any]
    result: dict[str, Any]
    started: float | None
    ended: float | None

    @property
    def is_open(self) -> bool:
        """Whether another job may take its place: nothing was made of it, and nobody is at work on it."""
        return self.status not in ("done", "started") and not self.result


@dataclass
class Added:
    """What `Ledger.add` found. changed: jobs whose inputs are others now; elsewhere: jobs of another manifest."""

    new: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    elsewhere: int = 0


# ------------------------------------------------------------------------------------------------------- processes


@cache
def boot_id() -> str:
    """What changes when this machine starts again; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()[:8]
    except OSError:
        return ""


def process_start(pid: int) -> str | None:
    """When a process of this machine began, in whatever unit the system has; "" if there is none.

    Returns: None where the system does not tell.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = text.rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]  # a zombie works no more
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return ""
    except (OSError, IndexError):
        return None
    if os.name == "nt":
        return None
    try:
        done = subprocess.run(
            ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return "-".join(done.stdout.split())


def this_process(pid: int | None = None) -> str:
    """The holder this process, or another one of this machine, is."""
    pid = os.getpid() if pid is None else pid
    return f"{socket.gethostname()} {boot_id() or '-'} {pid} {process_start(pid) or '-'}"


def is_alive(holder: str) -> bool:
    """Whether a holder may still be at work: only one of this machine is known to be gone."""
    host, boot, pid, start = holder.split()
    if host != socket.gethostname():
        return True
    if boot != (boot_id() or "-"):
        return False
    now = process_start(int(pid))
    return now is None or (now != "" and start in ("-", now))


def host_of(holder: str) -> str:
    """The machine of a holder."""
    return holder.split()[0]


def same_name(name: str) -> str:
    """What two names have in common that are one file on some file system."""
    return unicodedata.normalize("NFC", PurePosixPath(name).as_posix()).casefold()


def ledgers(folder: Path) -> list[Path]:
    """The ledgers of a folder: one, or one for each shard that was begun."""
    return sorted(path for path in folder.glob("ledger*.sqlite3") if path.is_file())


def name_for(shard: tuple[int, int] | None) -> str:
    """Name of the ledger's file; each shard has its own, so that machines never write to the same one."""
    return NAME if shard is None else f"ledger-{shard[0]}-of-{shard[1]}.sqlite3"


# ---------------------------------------------------------------------------------------------------------- the ledger


class Ledger:
    """One ledger file, open. Methods may be called from any thread.

    A file of schema 1, in which no job comes after another, is read as it is; the first write changes it to schema 2.

    Raises, from every method: DiskFullError; LockedError if another process wrote for a minute; RunFolderError if the
        file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._is_old = False
        with self._errors():
            # Python's own transactions are off: _write begins them.
            self._base = sqlite3.connect(path, BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            self._base.row_factory = sqlite3.Row
            self._base.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
            if not is_on_network(path):
                self._base.execute("PRAGMA journal_mode = WAL").fetchone()
                self._base.execute("PRAGMA synchronous = NORMAL")

    @classmethod
    def create(cls, path: Path, *, meta: Mapping[str, str]) -> Self:
        """Open a ledger, made if it is not there: under its name it is whole from the first moment on.

        Raises: UsageError if it cannot be made, or is of another version; as every method.
        """
        if not path.exists():
            _build(path, {"schema": str(SCHEMA), **meta})
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a ledger that is there. Raises: UsageError if it is not, or is of another version."""
        if not path.is_file():
            raise UsageError(f"{path.parent} is no folder of a batch: it has no {path.name}")
        opened = cls(path)
        try:
            opened._check_schema()
        except PackforcingError:
            opened.close()
            raise
        return opened

    def close(self) -> None:
        """Close the file; calling it again does no harm."""
        with self._lock:
            self._base.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def meta(self, name: str) -> str | None:
        """A note of the whole batch."""
        found = self._one("SELECT value FROM meta WHERE name = ?", name)
        return None if found is None else str(found[0])

    def set_meta(self, name: str, value: str | None) -> None:
        """Write a note of the whole batch, or remove it."""
        with self._write() as base:
            base.execute("DELETE FROM meta WHERE name = ?", (name,))
            if value is not None:
                base.execute("INSERT INTO meta VALUES (?, ?)", (name, value))

    # -- jobs come in

    def add(self, entries: Sequence[Entry], *, only_look: bool = False) -> Added:
        """Queue the jobs that are not there yet, in one transaction.

        A job that is there keeps what became of it, and its output. One whose inputs have changed takes the place of
        what it was, unless that is done: then it is a new job and the old one stays.
        Args:
            only_look: change nothing.
        Raises: UsageError if a new job's output is that of another job, which another process may have put there;
            nothing is queued then.
        """
        added = Added()
        with self._write() as base:
            rows = {row["id"]: row for row in base.execute("SELECT * FROM jobs")}
            by_key: dict[str, list[sqlite3.Row]] = {}
            for row in rows.values():
                by_key.setdefault(row["key"], []).append(row)
            keys = {entry.key for entry in entries}
            ids = {entry.id for entry in entries}
            unplanned = [row for row in rows.values() if not row["load_key"] and _row(row).is_open]
            obsolete = {row["id"] for row in unplanned if row["key"] not in keys}
            added.elsewhere = sum(
                row["key"] not in keys and row["id"] not in obsolete for row in rows.values()
            )
            replaced = {
                row["id"]: entry.id
                for entry in entries
                if entry.id not in rows
                for row in by_key.get(entry.key, ())
                if _row(row).is_open and row["id"] not in ids
            } | dict.fromkeys(obsolete, "")
            taken = {same_name(row["output"]) for name, row in rows.items() if name not in replaced}
            for job, other in replaced.items():
                if only_look:
                    break
                base.execute("DELETE FROM jobs WHERE id = ?", (job,))
                self._event(base, job, "replaced", 0, "", other)
            for entry in entries:
                if entry.id in rows:
                    added.known.append(entry.id)
                    continue
                name = same_name(entry.output)
                if name in taken:
                    raise UsageError(
                        f"output {entry.output!r} is that of another job in {self.path.parent}",
                        hint="Run it again: another batch may have been begun there at this moment.",
                    )
                taken.add(name)
                (added.changed if entry.key in by_key else added.new).append(entry.id)
                if only_look:
                    continue
                base.execute(
                    "INSERT INTO jobs (id, key, position, line, shown, output, spec, load_key, layout_key, weight,"
                    " after) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        entry.id,
                        entry.key,
                        entry.position,
                        entry.line,
                        entry.shown,
                        entry.output,
                        json.dumps(entry.spec, ensure_ascii=False),
                        entry.load_key,
                        entry.layout_key,
                        entry.weight,
                        entry.after,
                    ),
                )
                self._event(base, entry.id, "queued", 0, "", "")
                if entry.problem is not None:
                    self._fail(base, entry.id, 0, "", entry.problem)
            if not only_look:
                self._fail_with_sources(base)
        return added

    # -- a worker's side

    def claim(
        self,
        holder: str,
        *,
        load_key: str = "",
        layout_key: str = "",
        ids: Iterable[str] = (),
        not_of: Iterable[str] = (),
    ) -> Row | None:
        """Take the next job that may begin: of the same model and layout if there is one, else in the manifest's order.

        Jobs of processes that died are queued first. None if there is nothing to take now, or the batch is paused.
        Args:
            load_key, layout_key: of the job the holder did before.
            ids: if given, only one of these.
            not_of: load keys of jobs that the holder cannot do.
        """
        with self._write() as base:
            self._take_over(base)
            row = self._next(base, load_key, layout_key, 1, 0, ids, not_of)
            if not row:
                return None
            base.execute(
                "UPDATE jobs SET status = 'started', attempt = attempt + 1, holder = ?, started = ?, ended = NULL,"
                " wants_cancel = 0 WHERE id = ?",
                (holder, time.time(), row[0]["id"]),
            )
            taken = base.execute("SELECT * FROM jobs WHERE id = ?", (row[0]["id"],)).fetchone()
            self._event(base, taken["id"], "started", taken["attempt"], holder, "")
        return _row(taken)

    def upcoming(
        self,
        *,
        load_key: str = "",
        layout_key: str = "",
        limit: int = 1,
        skip: int = 0,
        ids: Iterable[str] = (),
    ) -> list[Row]:
        """Jobs that `claim` would give next, in that order; nothing is claimed."""
        with self._errors(), self._lock:
            return [_row(row) for row in self._next(self._base, load_key, layout_key, limit, skip, ids)]

    def progress(self, job: str, holder: str, blocks: int, total: int) -> str:
        """Note how many blocks a job has. Returns: "" to go on, else why not: cancelled, or lost to somebody else."""
        with self._write() as base:
            row = self._held(base, job, holder)
            if row is None:
                return "lost"
            base.execute(
                "UPDATE jobs SET deaths = CASE WHEN ? > blocks THEN 0 ELSE deaths END, blocks = ?, total = ?"
                " WHERE id = ?",
                (blocks, blocks, total, job),
            )
            self._orphan(base, job, None)
            return "cancelled" if row["wants_cancel"] else ""

    def done(self, job: str, holder: str, result: Mapping[str, Any]) -> bool:
        """Note what a job made. Returns: False if the holder had lost it; nothing is noted then."""
        with self._write() as base:
            row = self._held(base, job, holder)
            if row is None:
                return False
            base.execute(
                "UPDATE jobs SET status = 'done', holder = '', result = ?, error = '{}', deaths = 0, ended = ?,"
                " blocks = ?, total = ? WHERE id = ?",
                (json.dumps(result), time.time(), result["blocks"], result["blocks"], job),
            )
            self._orphan(base, job, None)
            self._event(base, job, "done", row["attempt"], holder, "")
        return True

    def fail(
        self,
        job: str,
        holder: str,
        error: BaseException,
        *,
        retry_in: float | None = None,
        fit: Mapping[str, Any] | None = None,
    ) -> bool:
        """Note a failure; a job that is to be cancelled is not tried again.

        Args:
            retry_in: seconds after which it is tried again; None = it stays failed.
            fit:      options to change in the next attempt.
        Returns: False if the holder had lost the job.
        """
        with self._write() as base:
            row = self._held(base, job, holder)
            if row is None:
                return False
            if retry_in is None:
                self._fail(base, job, row["attempt"], holder, error)
                return True
            if row["wants_cancel"]:
                self._give_back(base, row, "cancelled", str(error))
                return True
            base.execute(
                "UPDATE jobs SET status = 'queued', holder = '', not_before = ?, error = ?, fit = ?,"
                " retries = retries + 1 WHERE id = ?",
                (time.time() + retry_in, _error_text(error), json.dumps(fit or json.loads(row["fit"])), job),
            )
            self._event(base, job, "retry", row["attempt"], holder, str(error))
            self._fail_with_sources(base, job)
        return True

    def release(self, job: str, holder: str, *, cancelled: bool = False, why: str = "") -> bool:
        """Give a job back: queued, or cancelled if that was asked for. Returns: False if the holder had lost it."""
        with self._write() as base:
            row = self._held(base, job, holder)
            if row is None:
                return False
            self._give_back(base, row, "cancelled" if cancelled or row["wants_cancel"] else "queued", why)
        return True

    def set_sender(self, holder: str, *, is_one: bool) -> None:
        """Note that a holder has its jobs done by processes of other machines, or that it has ended.

        When it dies, so do those; they leave locks on run folders, and its jobs are orphans then.
        """
        self.set_meta(_SENDER + holder, "1" if is_one else None)

    def orphan(self, job: str, holder: str) -> None:
        """Note that the process, perhaps of another machine, that was at work on a held job is known to be gone."""
        with self._write() as base:
            if self._held(base, job, holder) is not None:
                self._orphan(base, job, holder)

    def lost(self, job: str, holder: str, *, said: str = "") -> bool:
        """Give a job back whose worker died. said: which one. Returns: False if the holder had lost it."""
        with self._write() as base:
            row = self._held(base, job, holder)
            if row is not None:
                self._queue_after_death(base, row, said)
        return row is not None

    # -- a person's side

    def cancel(self, jobs: Sequence[str] | None = None) -> tuple[int, int]:
        """Cancel jobs that are queued or started; None = all. Returns: how many are cancelled, and are asked to end."""
        with self._write() as base:
            self._take_over(base)
            cancelled = asked = 0
            for row in self._chosen(base, jobs):
                if row["status"] == "queued":
                    base.execute("UPDATE jobs SET status = 'cancelled' WHERE id = ?", (row["id"],))
                    self._event(base, row["id"], "cancelled", row["attempt"], "", "")
                    cancelled += 1
                    if jobs is not None:
                        self._fail_those_after(base, row["id"])
                elif row["status"] == "started":
                    base.execute("UPDATE jobs SET wants_cancel = 1 WHERE id = ?", (row["id"],))
                    asked += 1
        return cancelled, asked

    def retry(self, jobs: Sequence[str] | None = None, *, lost: bool = False) -> int:
        """Queue failed jobs again; with `jobs` also cancelled ones.

        With a job those go that it comes after, as it could not begin without them, and those that failed with it.
        Args:
            lost: also jobs that processes of other machines hold: a person knows that those are gone.
        Returns: how many.
        """
        queued = set[str]()
        with self._write() as base:
            self._take_over(base)
            chosen = None if jobs is None else self._with_their_own(base, jobs)
            for row in self._chosen(base, chosen):
                wanted = row["status"] == "failed" or (jobs is not None and row["status"] == "cancelled")
                if lost and row["status"] == "started":
                    wanted = host_of(row["holder"]) != socket.gethostname()
                if wanted:
                    if row["status"] == "started":
                        self._orphan(base, row["id"], row["holder"])
                    base.execute(
                        "UPDATE jobs SET status = 'queued', holder = '', not_before = 0, deaths = 0,"
                        " retries = 0"
                        " WHERE id = ?",
                        (row["id"],),
                    )
                    self._event(base, row["id"], "requeued", row["attempt"], "", "by a person")
                    queued.add(row["id"])
            queued -= self._fail_with_sources(base)
        return len(queued)

    def again(self, job: str, why: str) -> None:
        """Queue a job that is done once more: what it made is gone. One that is not done any more stays as it is."""
        with self._write() as base:
            changed = base.execute(
                "UPDATE jobs SET status = 'queued', not_before = 0, retries = 0 WHERE id = ? AND status = 'done'",
                (job,),
            )
            if changed.rowcount:
                self._event(base, job, "requeued", 0, "", why)
                self._fail_with_sources(base, job)

    def spoiled(self, job: str, error: PackforcingError) -> None:
        """Note that what a done job made is not what it was. One that is not done any more stays as it is."""
        with self._write() as base:
            if base.execute("SELECT 1 FROM jobs WHERE id = ? AND status = 'done'", (job,)).fetchone():
                self._fail(base, job, 0, "", error)

    def is_orphan(self, job: str) -> bool:
        """Whether the process of another machine that was at work on a job is known to be gone, and nothing was made
        of it since: a person said so, or who had sent the job there.
        """
        return self.meta(f"{_ORPHAN}{job}") is not None

    def take_over(self) -> int:
        """Queue the jobs of processes that died. Returns: how many."""
        if all(is_alive(holder) for holder in self.holders()):
            return 0  # as nearly always, without the right to write
        with self._write() as base:
            return self._take_over(base)

    def rows(self, status: str | None = None) -> list[Row]:
        """All jobs in the manifest's order, or those of a status."""
        where = "" if status is None else " WHERE status = ?"
        values = () if status is None else (status,)
        return [
            _row(row) for row in self._all(f"SELECT * FROM jobs{where} ORDER BY position, rowid", *values)
        ]

    def row(self, job: str) -> Row:
        """One job. Raises: KeyError."""
        found = self._one("SELECT * FROM jobs WHERE id = ?", job)
        if found is None:
            raise KeyError(job)
        return _row(found)

    def counts(self) -> dict[str, int]:
        """status -> number of jobs, every status."""
        found = {row[0]: row[1] for row in self._all("SELECT status, COUNT(*) FROM jobs GROUP BY status")}
        return {status: found.get(status, 0) for status in STATUSES}

    def failures(self) -> int:
        """How many jobs failed by themselves, and not only with the one whose video they go on with."""
        found = self._one(
            "SELECT COUNT(*) FROM jobs WHERE status = 'failed' AND json_extract(error, '$.kind') IS NOT ?",
            SOURCE_FAILED,
        )
        return int(found[0])

    def holders(self, ids: Iterable[str] = ()) -> set[str]:
        """Who holds jobs; if `ids` are given, one of these."""
        only, values = _only(ids)
        sql = f"SELECT DISTINCT holder FROM jobs WHERE status = 'started'{only}"
        return {row[0] for row in self._all(sql, *values)}

    def ready(self, not_of: Iterable[str] = ()) -> int:
        """How many queued jobs wait for no other one, those of some load keys left out."""
        sql = f"SELECT COUNT(*) FROM jobs WHERE status = 'queued' AND {_IS_READY}"
        found = self._one(
            f"{sql} AND load_key NOT IN (SELECT value FROM json_each(?))", json.dumps(sorted(not_of))
        )
        return int(found[0])

    def next_start(self, ids: Iterable[str] = ()) -> float | None:
        """When the next queued job, or the next of `ids`, may begin, in seconds since 1970; None if there is none.

        Jobs that come after one which another machine holds are left out: nobody here knows when that ends.
        """
        only, values = _only(ids)
        found = self._one(
            f"{_ELSEWHERE} SELECT MIN(not_before) FROM jobs WHERE status = 'queued'"
            f" AND id NOT IN (SELECT id FROM elsewhere){only}",
            *_this_host(),
            *values,
        )
        return None if found is None or found[0] is None else float(found[0])

    def waiting_elsewhere(self) -> list[Row]:
        """Queued jobs that come after one which a process of another machine holds."""
        found = self._all(
            f"{_ELSEWHERE} SELECT * FROM jobs WHERE status = 'queued' AND id IN (SELECT id FROM elsewhere)"
            " ORDER BY position, rowid",
            *_this_host(),
        )
        return [_row(row) for row in found]

    def work(self) -> tuple[float, float]:
        """Weight of what is done, parts of started jobs included, and of all that is to be done."""
        found = self._one(
            "SELECT TOTAL(CASE WHEN status = 'done' THEN weight WHEN total > 0 THEN weight * blocks / total END),"
            " TOTAL(weight) FROM jobs WHERE status IN ('queued', 'started', 'done')"
        )
        assert found is not None
        return float(found[0]), float(found[1])

    def events(self, job: str | None = None) -> list[dict[str, Any]]:
        """What happened, in order: at, job, event, attempt, holder, said."""
        where, values = ("", ()) if job is None else (" WHERE job = ?", (job,))
        return [dict(row) for row in self._all(f"SELECT * FROM events{where} ORDER BY rowid", *values)]

    # -- inside

    def _check_schema(self) -> None:
        try:
            found = self.meta("schema")
        except RunFolderError as error:
            if "no such table" in error.message:
                raise UsageError(f"{self.path} is no ledger of a batch") from error
            raise
        if found == "1":
            names = ", ".join(row["name"] for row in self._all("PRAGMA main.table_info(jobs)"))
            # A temporary view of this connection alone: the file stays as it is.
            self._all(f"CREATE TEMP VIEW jobs AS SELECT {names}, '' AS after FROM main.jobs")
            self._is_old = True
        elif found != str(SCHEMA):
            raise UsageError(
                f"{self.path} has schema {found}; this version of packforcing reads {SCHEMA}",
                hint="Use the version that made it.",
            )

    def _migrate(self, base: sqlite3.Connection) -> None:
        """Change a file of schema 1 to this version's, unless another process did meanwhile."""
        base.execute("DROP VIEW temp.jobs")
        if base.execute("SELECT value FROM meta WHERE name = 'schema'").fetchone()[0] == "1":
            for statement in _FROM_1:
                base.execute(statement)

    def _next(
        self,
        base: sqlite3.Connection,
        load_key: str,
        layout_key: str,
        limit: int,
        skip: int,
        ids: Iterable[str],
        not_of: Iterable[str] = (),
    ) -> list[sqlite3.Row]:
        """Jobs that may begin; a worker without a model takes one that no other works with first."""
        if base.execute("SELECT 1 FROM meta WHERE name = 'paused'").fetchone() is not None:
            return []
        only, values = _only(ids)
        return base.execute(
            f"SELECT * FROM jobs WHERE status = 'queued' AND not_before <= ? AND {_IS_READY}"
            f" AND load_key NOT IN (SELECT value FROM json_each(?)){only}"
            " ORDER BY load_key = ? DESC, load_key = ? AND layout_key = ? DESC,"
            " load_key IN (SELECT load_key FROM jobs WHERE status = 'started'),"
            " MIN(position) OVER (PARTITION BY load_key),"
            " MIN(position) OVER (PARTITION BY load_key, layout_key), position LIMIT ? OFFSET ?",
            (time.time(), json.dumps(sorted(not_of)), *values, load_key, load_key, layout_key, limit, skip),
        ).fetchall()

    def _take_over(self, base: sqlite3.Connection) -> int:
        count = 0
        held = base.execute("SELECT * FROM jobs WHERE status = 'started'").fetchall()
        dead = {holder for holder in {row["holder"] for row in held} if not is_alive(holder)}
        for row in held:
            if row["holder"] not in dead:
                continue
            count += 1
            if base.execute("SELECT 1 FROM meta WHERE name = ?", (_SENDER + row["holder"],)).fetchone():
                self._orphan(base, row["id"], row["holder"])
            self._queue_after_death(base, row)
        base.executemany("DELETE FROM meta WHERE name = ?", [(_SENDER + holder,) for holder in dead])
        return count

    def _queue_after_death(self, base: sqlite3.Connection, row: sqlite3.Row, said: str = "") -> None:
        self._event(base, row["id"], "died", row["attempt"], row["holder"], said)
        if row["wants_cancel"]:
            base.execute("UPDATE jobs SET status = 'cancelled', holder = '' WHERE id = ?", (row["id"],))
            self._fail_those_after(base, row["id"])
        elif row["deaths"] + 1 >= MAX_DEATHS:
            error = RunFolderError(
                f"{MAX_DEATHS} processes in a row died over this job",
                hint="The logs are in the folder .packforcing; memory may have run out.",
            )
            self._fail(base, row["id"], row["attempt"], row["holder"], error)
        else:
            base.execute(
                "UPDATE jobs SET status = 'queued', holder = '', deaths = deaths + 1 WHERE id = ?",
                (row["id"],),
            )
            self._fail_with_sources(base, row["id"])

    def _held(self, base: sqlite3.Connection, job: str, holder: str) -> sqlite3.Row | None:
        found: sqlite3.Row | None = base.execute(
            "SELECT * FROM jobs WHERE id = ? AND status = 'started' AND holder = ?", (job, holder)
        ).fetchone()
        return found

    def _give_back(self, base: sqlite3.Connection, row: sqlite3.Row, status: str, why: str) -> None:
        base.execute("UPDATE jobs SET status = ?, holder = '' WHERE id = ?", (status, row["id"]))
        event = "released" if status == "queued" else status
        self._event(base, row["id"], event, row["attempt"], row["holder"], why)
        if status == "cancelled":
            self._fail_those_after(base, row["id"])
        else:
            self._fail_with_sources(base, row["id"])

    def _orphan(self, base: sqlite3.Connection, job: str, holder: str | None) -> None:
        """Remember that the holder of a job is known to be gone, or with None that it does not matter any more."""
        base.execute("DELETE FROM meta WHERE name = ?", (_ORPHAN + job,))
        if holder is not None:
            base.execute("INSERT INTO meta VALUES (?, ?)", (_ORPHAN + job, holder))

    def _chosen(self, base: sqlite3.Connection, jobs: Sequence[str] | None) -> list[sqlite3.Row]:
        rows = base.execute("SELECT * FROM jobs ORDER BY position").fetchall()
        return rows if jobs is None else [row for row in rows if row["id"] in set(jobs)]

    def _fail(
        self, base: sqlite3.Connection, job: str, attempt: int, holder: str, error: BaseException
    ) -> None:
        self._note_failure(base, job, attempt, holder, error)
        self._fail_those_after(base, job)

    def _note_failure(
        self, base: sqlite3.Connection, job: str, attempt: int, holder: str, error: BaseException
    ) -> None:
        base.execute(
            "UPDATE jobs SET status = 'failed', holder = '', error = ?, ended = ? WHERE id = ?",
            (_error_text(error), time.time(), job),
        )
        self._event(base, job, "failed", attempt, holder, str(error))

    def _fail_those_after(self, base: sqlite3.Connection, job: str) -> set[str]:
        """Fail the queued jobs that go on with one which failed or was cancelled, and those after them.

        Returns: their ids.
        """
        found = set[str]()
        first = _row(base.execute("SELECT * FROM jobs WHERE id = ?", (job,)).fetchone())
        root = self._root(base, first)
        sources = deque([first])
        while sources:
            source = sources.popleft()
            for row in base.execute(
                "SELECT * FROM jobs WHERE after = ? AND status = 'queued'", (source.id,)
            ).fetchall():
                self._note_failure(base, row["id"], 0, "", _source_failed(source, root))
                found.add(row["id"])
                sources.append(_row(row))
        return found

    def _fail_with_sources(self, base: sqlite3.Connection, job: str | None = None) -> set[str]:
        """Fail a queued job if the one it comes after failed or was cancelled; None = all such jobs. Returns: which.

        A job may come to be queued after its source failed: its source is looked at whenever it is queued.
        """
        only, values = ("", ()) if job is None else (" AND jobs.id = ?", (job,))
        found = set[str]()
        for (source,) in base.execute(
            "SELECT DISTINCT first.id FROM jobs JOIN jobs AS first ON first.id = jobs.after"
            f" WHERE jobs.status = 'queued' AND first.status IN ('failed', 'cancelled'){only}",
            values,
        ).fetchall():
            found |= self._fail_those_after(base, source)
        return found

    def _root(self, base: sqlite3.Connection, job: Row) -> Row:
        """The job that is to blame for the end of one: itself, or the source that it failed with."""
        while job.status == "failed" and job.error.get("kind") == SOURCE_FAILED:
            row = base.execute(
                "SELECT * FROM jobs WHERE id = ? AND status IN ('failed', 'cancelled')", (job.after,)
            ).fetchone()
            if row is None:
                break
            job = _row(row)
        return job

    def _with_their_own(self, base: sqlite3.Connection, jobs: Iterable[str]) -> list[str]:
        """Jobs, all that they come after, and all that failed because one of these did."""
        rows = {row["id"]: row for row in base.execute("SELECT id, after, status, error FROM jobs")}
        failed_with: dict[str, list[str]] = {}
        for name, row in rows.items():
            if row["status"] == "failed" and json.loads(row["error"]).get("kind") == SOURCE_FAILED:
                failed_with.setdefault(row["after"], []).append(name)
        found: dict[str, None] = {}
        for job in jobs:
            while job in rows and job not in found:
                found[job] = None
                job = rows[job]["after"]
        waiting = deque(found)
        while waiting:
            for name in failed_with.get(waiting.popleft(), ()):
                if name not in found:
                    found[name] = None
                    waiting.append(name)
        return list(found)

    def _event(
        self, base: sqlite3.Connection, job: str, event: str, attempt: int, holder: str, said: str
    ) -> None:
        base.execute(
            "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", (time.time(), job, event, attempt, holder, said)
        )

    def _one(self, sql: str, *values: Any) -> Any:
        with self._errors(), self._lock:
            return self._base.execute(sql, values).fetchone()

    def _all(self, sql: str, *values: Any) -> list[Any]:
        with self._errors(), self._lock:
            return self._base.execute(sql, values).fetchall()

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """A transaction that has the right to write from its beginning on; undone if anything fails."""
        with self._errors(), self._lock:
            self._base.execute("BEGIN IMMEDIATE")
            try:
                if self._is_old:
                    self._migrate(self._base)
                yield self._base
                self._base.execute("COMMIT")
                self._is_old = False
            except BaseException:
                if self._base.in_transaction:
                    self._base.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise _failure(error, self.path) from error


class _SourceFailedError(PackforcingError):
    """The reason why a job that goes on with another one's video cannot be done."""

    kind = SOURCE_FAILED


def _source_failed(source: Row, root: Row) -> PackforcingError:
    """The error of a job whose source failed or was cancelled. root: the job that is to blame, perhaps another one."""
    how = "was cancelled" if root.status == "cancelled" else f"failed: {root.error.get('message', '')}"
    said = f"job {source.position} ({source.output}), whose video it goes on with, "
    if root.id != source.id:
        said += f"comes after job {root.position} ({root.output}), which "
    error = _SourceFailedError(
        f"{said}{how}",
        hint=f"packforcing batch retry DIR --job {root.position} queues all of them again.",
    )
    error.exit_code = 1 if root.status == "cancelled" else int(root.error.get("exit_code", 1))
    return error


def _this_host() -> tuple[str, str]:
    """How holders of this machine begin, twice."""
    return f"{socket.gethostname()} ", f"{socket.gethostname()} "


def _only(ids: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    """A condition of SQL, and its values, that holds for these jobs; for all if there are none."""
    chosen = list(ids)
    if not chosen:
        return "", ()
    return " AND id IN (SELECT value FROM json_each(?))", (json.dumps(chosen),)


def _build(path: Path, meta: Mapping[str, str]) -> None:
    """Make an empty ledger; one that appears meanwhile stays."""
    new = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        base = sqlite3.connect(new)
        try:
            base.executescript(_TABLES)
            base.executemany("INSERT INTO meta VALUES (?, ?)", list(meta.items()))
            base.commit()
        finally:
            base.close()
        durable.sync_file(new)
        with contextlib.suppress(FileExistsError):
            durable.rename_new(new, path)
        durable.sync_folder(path.parent)
    except sqlite3.Error as error:
        raise _failure(error, path) from error
    except OSError as error:
        raise durable.failure(error, path, kind=UsageError) from error
    finally:
        new.unlink(missing_ok=True)


def _failure(error: sqlite3.Error, path: Path) -> PackforcingError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return DiskFullError(
            f"the disk is full: {path} could not be written", hint="Free some space and run it again."
        )
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return LockedError(f"another process has been writing to {path} for a minute", hint="Wait for it.")
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return RunFolderError(
            f"{path} is damaged: {error}",
            hint="The videos are whole. Move the ledger away, and give a new --out to make what is missing.",
        )
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        return UsageError(f"{path} cannot be written: {error}", hint="Check the folder's permissions.")
    return RunFolderError(f"{path}: {error}")


def _error_text(error: BaseException) -> str:
    message = getattr(error, "message", None) or " ".join(str(error).split()) or "no message"
    values = {
        "kind": getattr(error, "kind", "") or type(error).__name__,
        "message": message,
        "hint": getattr(error, "hint", ""),
        "exit_code": getattr(error, "exit_code", 1),
    }
    return json.dumps(values, ensure_ascii=False)


def _row(row: sqlite3.Row) -> Row:
    values = dict(row)
    for name in ("spec", "fit", "error", "result"):
        values[name] = json.loads(values[name])
    values["wants_cancel"] = bool(values["wants_cancel"])
    return Row(**values)


def is_on_network(path: Path) -> bool:
    """Whether a file lies on a network file system, where SQLite's write-ahead log does not work; False if unknown."""
    if sys.platform != "linux":
        return False
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    place, best, kind = str(path.absolute()), "", ""
    for mount in mounts:
        fields, _, rest = mount.partition(" - ")
        point = fields.split()[4].replace("\\040", " ")
        if (place == point or place.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, rest.split()[0]
    return kind.startswith(_NETWORK)
