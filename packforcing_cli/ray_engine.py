"""A batch on the machines of a Ray cluster: an actor for each GPU, or for some CPU cores, loads a model once.

    driver: ledger --claim--> actor.give       at most two jobs an actor: one at work, one looked ahead to
            ledger <--events-- actor.events    progress, done, failed …

Ray places actors, sends messages and notices what is gone; the driver alone writes the ledger. Outputs and run folders
lie on storage that all machines see under the same path, so that a lost machine's job is gone on with elsewhere. When
the driver is gone Ray ends its actors; the same command goes on.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from packforcing_cli import __version__, catalog, ledger, packages
from packforcing_cli.batch import HIDDEN, POLL_SECONDS, Engine, Folder, State
from packforcing_cli.errors import EnvironmentProblem, PackforcingError, UsageError
from packforcing_cli.tasks import Options, Task

INSTALL = 'pip install "packforcing[ray]"'
LONG_POLL_SECONDS = 0.5
OBJECT_STORE_BYTES = 100_000_000  # of a cluster started here: only messages go through it
START_SECONDS = 300.0
_HUNG_FACTOR, _HUNG_MORE = 2.0, 30.0  # a job that does not end at --timeout has its actor killed after this


class RemoteError(PackforcingError):
    """A failure on another machine, as it was told. kind: the name of its class there."""

    def __init__(self, message: str, *, hint: str = "", kind: str = "", exit_code: int = 1) -> None:
        super().__init__(message, hint=hint)
        self.kind, self.exit_code = kind, exit_code


# ---------------------------------------------------------------------------------------------------------- the actor


class _QueueBoard:
    """Jobs that the driver gave, and events that it will be told."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.orders: dict[str, str] = {}
        self.why = ""
        self._tasks: deque[Task] = deque()
        self._lock = threading.Lock()

    def give(self, task: Task) -> None:
        with self._lock:
            self._tasks.append(task)

    def claim(self, load_key: str, layout_key: str) -> Task | None:
        with self._lock:
            task = self._tasks.popleft() if self._tasks else None
        if task is not None:
            self._tell("begun", task)
        return task

    def upcoming(self, load_key: str, layout_key: str, limit: int) -> list[Task]:
        with self._lock:
            return list(self._tasks)[:limit]

    def idle(self) -> float | None:
        return None if self.why else POLL_SECONDS / 4

    def progress(self, task: Task, blocks: int, total: int) -> str:
        self._tell("progress", task, blocks=blocks, total=total)
        return self.orders.get(task.id, "")

    def done(self, task: Task, result: Mapping[str, Any]) -> None:
        self._tell("done", task, result=dict(result))

    def fail(
        self,
        task: Task,
        error: BaseException,
        *,
        retry_in: float | None = None,
        fit: Mapping[str, Any] | None = None,
    ) -> None:
        said = {
            "message": getattr(error, "message", "") or " ".join(str(error).split()) or "no message",
            "hint": getattr(error, "hint", ""),
            "kind": type(error).__name__,
            "exit_code": getattr(error, "exit_code", 1),
        }
        self._tell("failed", task, error=said, retry_in=retry_in, fit=None if fit is None else dict(fit))

    def release(self, task: Task, *, cancelled: bool = False, why: str = "") -> None:
        self._tell("released", task, cancelled=cancelled, why=why)

    def pause(self, why: str) -> None:
        self.events.put({"event": "paused", "why": why})

    def rest(self) -> list[Task]:
        """Jobs that were not begun."""
        with self._lock:
            tasks, self._tasks = list(self._tasks), deque()
        return tasks

    def _tell(self, event: str, task: Task, **values: Any) -> None:
        self.events.put({"event": event, "job": task.id, **values})


class BatchActor:
    """A worker on some machine of the cluster; Ray makes an actor of it."""

    def __init__(self, options: dict[str, Any], token: str, version: str, bundles: dict[str, bytes]) -> None:
        if version != __version__:
            raise EnvironmentProblem(
                f"{socket.gethostname()} has packforcing {__version__}, and the driver {version}"
            )
        if not Path(token).is_file():
            raise EnvironmentProblem(
                f"{Path(token).parents[1]} cannot be seen on {socket.gethostname()}",
                hint="--out must lie on storage that all machines have under the same path.",
            )
        for name, content in bundles.items():
            _install(name, content)
        self._board = _QueueBoard()
        self._ended = threading.Event()
        threading.Thread(target=self._work, args=(Options(**options),), daemon=True).start()

    def _work(self, options: Options) -> None:
        from packforcing_cli.worker import Worker

        try:
            for _ in Worker(self._board, options, stop=lambda: self._board.why).run():
                pass
        except PackforcingError as error:  # the disk is full: the board was told
            self._board.events.put({"event": "note", "text": error.message})
        except Exception as error:
            self._board.events.put({"event": "broken", "text": f"{type(error).__name__}: {error}"})
        finally:
            for task in self._board.rest():
                self._board.release(task)
            self._ended.set()

    def where(self) -> tuple[str, int]:
        """Machine and process."""
        return socket.gethostname(), os.getpid()

    def give(self, task: dict[str, Any]) -> None:
        """Take one more job."""
        self._board.give(Task(**task))

    def order(self, job: str, why: str) -> None:
        """End a job after the block it is at."""
        self._board.orders[job] = why

    def end(self, why: str) -> None:
        """Begin no more jobs; anything but "drain" also ends the one at work after its block."""
        self._board.why = why

    def events(self) -> tuple[list[dict[str, Any]], bool]:
        """What happened since the last call, waited for a moment; and whether nothing will follow."""
        ended = self._ended.is_set()
        found: list[dict[str, Any]] = []
        with contextlib.suppress(queue.Empty):
            found.append(self._board.events.get(timeout=0 if ended else LONG_POLL_SECONDS))
            while True:
                found.append(self._board.events.get_nowait())
        return found, ended and self._board.events.empty()


def _install(name: str, content: bytes) -> None:
    """Install a shipped model where it is not here yet."""
    from packforcing_cli import bundle

    with contextlib.suppress(PackforcingError):
        folder = packages.find_package(name)
        packages.require_complete(folder, packages.read_manifest(folder))
        return
    with tempfile.TemporaryDirectory() as place:
        tar = Path(place) / "model.tar"
        tar.write_bytes(content)
        bundle.unpack(tar)


# ---------------------------------------------------------------------------------------------------------- the driver


@dataclass
class _Member:
    """An actor as the driver knows it. jobs: given and not ended, with the moment each began."""

    actor: Any
    poll: Any
    slot: int
    load_key: str = ""
    layout_key: str = ""
    where: str = ""
    jobs: dict[str, float | None] = field(default_factory=dict)


class Ray(Engine):
    """Actors of a Ray cluster.

    address:  of a cluster, "auto" or ray://…; None starts one on this machine.
    cpus:     cores of an actor; None = a GPU each, or one core where the cluster has none.
    workers:  how many; None = as many as fit.
    threads:  CPU threads of each.
    ship:     names of models to send along for machines that lack them.
    Raises: EnvironmentProblem, from `run`, if Ray is not installed, or the cluster has no room or is gone.
    """

    def __init__(
        self,
        folder: Folder,
        options: Options,
        *,
        address: str | None = None,
        cpus: float | None = None,
        workers: int | None = None,
        threads: int = 1,
        ship: Sequence[str] = (),
        max_failures: int | None = None,
    ) -> None:
        super().__init__(folder, max_failures=max_failures)
        self._options, self._address, self._cpus = options, address, cpus
        self._wanted, self._threads, self._ship = workers, threads, ship
        self._members: list[_Member] = []
        self._holder = ledger.this_process()
        self._orphans: set[str] = set()
        self._ordered: set[str] = set()
        self._lost_idle = 0
        self._bundles: Any = None
        self._token = self.folder.path / HIDDEN / f"seen-{uuid.uuid4().hex[:12]}"
        self._gpus = 0.0

    def run(self) -> Iterator[State]:
        """Do all jobs; yields how it stands, a few times a second."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if (
            self._address is None
        ):  # read when Ray is imported: a cluster of this machine alone is not on the network
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        ray = _ray()
        count = self._connect(ray)
        try:
            self._token.write_text("seen\n", encoding="ascii")
            self._bundles = ray.put({name: _packed(name) for name in self._ship})
            while True:
                self._staff(ray, count)
                self._hand_out()
                self._hear(ray)
                self._look_after(ray)
                state = self.state(len(self._members))
                yield state
                if self.too_many(state):
                    self.drain("too many failures")
                if not any(member.jobs for member in self._members) and not self.has_work():
                    return
        finally:
            self.kill()
            self._token.unlink(missing_ok=True)
            ray.shutdown()

    def drain(self, why: str) -> None:
        """Let actors finish the jobs they were given, and give them no more."""
        if not self.why:
            self.why = why
            for member in self._members:
                member.actor.end.remote("drain")

    def stop(self, why: str) -> None:
        """Let actors end after the block they are at."""
        self.why = why
        for member in self._members:
            member.actor.end.remote("stop")

    def kill(self) -> None:
        """End all actors at once, and give their jobs back."""
        ray = _ray()
        for member in self._members:
            with contextlib.suppress(Exception):
                ray.kill(member.actor)
            for job in member.jobs:
                self.folder.ledger.release(job, self._holder)
        self._members.clear()

    def _connect(self, ray: Any) -> int:
        """Join or start a cluster. Returns: how many actors it has room for, as many as were wanted at most."""
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if self._address is None:
            cores = os.cpu_count() or 1
            each = self._cpus or 1
            options |= {
                "address": "local",
                "num_cpus": max(cores, int(each * (self._wanted or 1) + 0.999)),
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
                "_node_ip_address": "127.0.0.1",
            }
        else:
            options["address"] = self._address
        try:
            ray.init(**options)
            there = ray.cluster_resources()
        except Exception as error:
            raise EnvironmentProblem(
                f"no Ray cluster at {self._address or 'this machine'}: {error}",
                hint="ray start --head starts one; without --address one is started here.",
            ) from error
        self._gpus = 1.0 if self._cpus is None and there.get("GPU", 0) >= 1 else 0.0
        each = self._cpus or 1.0
        room = int(there.get("GPU", 0)) if self._gpus else int(there.get("CPU", 0) // each)
        if room < 1:
            raise EnvironmentProblem(
                f"the Ray cluster has {there.get('CPU', 0):g} CPU cores, {there.get('GPU', 0):g} GPUs: no worker fits",
                hint="Use a smaller --cpus-per-worker, or more machines.",
            )
        return min(room, self._wanted or room)

    def _staff(self, ray: Any, count: int) -> None:
        """Have as many actors as there is work for."""
        base = self.folder.ledger
        if self.why or base.meta("paused") is not None:
            return
        needed = min(count, base.counts()["queued"] + sum(bool(member.jobs) for member in self._members))
        slots = [n for n in range(count) if n not in {member.slot for member in self._members}]
        for slot in slots[: max(0, needed - len(self._members))]:
            options = asdict(replace(self._options, slot=0, may_exit=False))
            actor = (
                ray.remote(BatchActor)
                .options(
                    num_cpus=self._cpus or 1,
                    num_gpus=self._gpus,
                    max_concurrency=4,
                    max_restarts=0,
                    runtime_env={
                        "env_vars": {
                            "OMP_NUM_THREADS": str(self._threads),
                            "MKL_NUM_THREADS": str(self._threads),
                        }
                    },
                )
                .remote(options, str(self._token), __version__, self._bundles)
            )
            self._members.append(_Member(actor, actor.events.remote(), slot))

    def _hand_out(self) -> None:
        """Give jobs: one to each, and one to look ahead to where others would not wait for it."""
        base = self.folder.ledger
        for depth in (1, 2):
            for member in self._members:
                if self.why or len(member.jobs) >= depth:
                    continue
                if depth == 2 and base.counts()["queued"] <= len(self._members):
                    return
                row = base.claim(self._holder, load_key=member.load_key, layout_key=member.layout_key)
                if row is None:
                    return
                task = self.folder.task(row, is_orphan=row.id in self._orphans or base.is_orphan(row.id))
                member.jobs[row.id] = None
                member.load_key, member.layout_key = row.load_key, row.layout_key
                member.actor.give.remote(asdict(task))

    def _hear(self, ray: Any) -> None:
        """Write what actors tell into the ledger, and notice those that are gone."""
        polls = {member.poll: member for member in self._members}
        if not polls:
            time.sleep(POLL_SECONDS)
            return
        ready, _ = ray.wait(list(polls), num_returns=len(polls), timeout=POLL_SECONDS)
        for ref in ready:
            member = polls[ref]
            try:
                events, ended = ray.get(ref)
            except ray.exceptions.RayError as error:
                self._gone(member, error)
                continue
            for event in events:
                self._note(member, event)
            if ended:
                self._members.remove(member)
                for job in member.jobs:
                    self.folder.ledger.release(job, self._holder)
                with contextlib.suppress(Exception):
                    ray.kill(member.actor)
            else:
                member.poll = member.actor.events.remote()

    def _note(self, member: _Member, event: Mapping[str, Any]) -> None:
        base, kind, job = self.folder.ledger, event["event"], event.get("job", "")
        if kind == "paused":
            base.set_meta("paused", event["why"])
            return
        if kind == "broken":
            raise EnvironmentProblem(f"a worker cannot work: {event['text']}")
        if job not in member.jobs:
            return
        self._lost_idle = 0
        if kind == "begun":
            member.jobs[job] = time.monotonic()
            return
        if kind == "progress":
            why = base.progress(job, self._holder, event["blocks"], event["total"])
            if why and job not in self._ordered:
                self._ordered.add(job)
                member.actor.order.remote(job, why)
            return
        del member.jobs[job]
        self._ordered.discard(job)
        if kind == "done":
            self._orphans.discard(job)
            base.done(job, self._holder, event["result"])
        elif kind == "failed":
            error = RemoteError(**event["error"])
            base.fail(job, self._holder, error, retry_in=event["retry_in"], fit=event["fit"])
            if "CUDA error" in error.message:  # the GPU's context is spoiled: another process takes over
                self._gone(member, error)
        else:
            base.release(job, self._holder, cancelled=event["cancelled"], why=event["why"])

    def _gone(self, member: _Member, error: BaseException) -> None:
        """An actor is lost: its jobs are gone on with by others. Raises: EnvironmentProblem if all are lost at once."""
        ray = _ray()
        if member in self._members:
            self._members.remove(member)
        with contextlib.suppress(Exception):
            ray.kill(member.actor)
        cause = getattr(error, "cause", None)
        if isinstance(cause, PackforcingError):  # it refused to begin
            raise cause
        for job, began in member.jobs.items():
            self._orphans.add(job)
            if began is None:
                self.folder.ledger.release(job, self._holder, why="its actor is gone")
            else:
                self.folder.ledger.lost(job, self._holder)
        self._lost_idle += not any(member.jobs.values())
        if self._lost_idle > 5:
            said = " ".join(str(error).split())[:300]
            raise EnvironmentProblem(f"Ray's actors end before they begin a job: {said}")

    def _look_after(self, ray: Any) -> None:
        """Kill the actor of a job that does not end at its timeout."""
        limit = self._options.timeout
        if limit is None:
            return
        for member in list(self._members):
            for job, began in list(member.jobs.items()):
                if began is not None and time.monotonic() - began > _HUNG_FACTOR * limit + _HUNG_MORE:
                    error = TimeoutError(f"took longer than {limit:g} s and did not end")
                    self.folder.ledger.fail(job, self._holder, error)
                    del member.jobs[job]
                    self._gone(member, error)


def _ray() -> Any:
    """Ray itself. Raises: EnvironmentProblem if it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise EnvironmentProblem("--engine ray needs Ray, which is not installed", hint=INSTALL) from error
    return ray


def _packed(name: str) -> bytes:
    """A model as a bundle with all its parts."""
    from packforcing_cli import bundle

    if catalog.of_random(name) is not None:
        raise UsageError(f"{name} has no files to ship")
    place = Path(tempfile.mkdtemp())
    try:
        bundle.pack(packages.find_package(name), place / "model.tar", with_parts=True)
        return (place / "model.tar").read_bytes()
    finally:
        shutil.rmtree(place, ignore_errors=True)
