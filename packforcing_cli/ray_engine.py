"""A batch on the machines of a Ray cluster: an actor for each GPU, or for some CPU cores, loads a model once.

    driver: ledger --claim--> actor.give       at most two jobs an actor: one at work, one looked ahead to
            ledger <--events-- actor.events    ready, begun, progress, done, failed, refused …

Ray places actors, sends messages and notices what is gone; the driver alone writes the ledger. Outputs and run folders
lie on storage that all machines see under the same path, so that a lost machine's job is gone on with elsewhere. When
the driver is gone Ray ends its actors; the same command goes on.

Messages may be lost while a machine cannot be reached: events are numbered and kept until the driver has seen them, and
what an actor was told is told again. An actor that cannot begin, or not with some model, says so; its jobs go back and
others do them.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import shutil
import signal
import socket
import tempfile
import threading
import time
import uuid
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from packforcing_cli import __version__, catalog, durable, ledger, packages
from packforcing_cli.batch import HIDDEN, POLL_SECONDS, Engine, Folder, State
from packforcing_cli.errors import EnvironmentProblem, PackforcingError, UsageError, WeightsError
from packforcing_cli.tasks import Options, Task, failure_of, model_hash

INSTALL = 'pip install "packforcing[ray]"'
LONG_POLL_SECONDS = 0.5
OBJECT_STORE_BYTES = 100_000_000  # of a cluster started here: only messages go through it
CHUNK_BYTES = 64 << 20  # of a model that is sent
CONNECT_SECONDS = 10.0
WAIT_SECONDS = 60.0  # after which a person is told that no actor is ready
MAX_DEATHS = 3  # of actors in a row that began no job
INSTALL_THERE = "Install packforcing with the same Python on every machine of the cluster."
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
        self._tell(
            "failed", task, error=failure_of(error), retry_in=retry_in, fit=None if fit is None else dict(fit)
        )

    def release(self, task: Task, *, cancelled: bool = False, why: str = "") -> None:
        self._tell("released", task, cancelled=cancelled, why=why)

    def refuse(self, task: Task, error: BaseException) -> bool:
        self._tell("refused", task, error=failure_of(error))
        return True

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
    """A worker on some machine of the cluster; Ray makes an actor of it. All that may go wrong is told as an event.

    setup: options, token, version, and models: name -> hash of those to be sent if they are not here.
    """

    def __init__(self, setup: dict[str, Any]) -> None:
        self._board = _QueueBoard()
        self._given: set[tuple[str, int]] = set()
        self._kept: deque[tuple[int, dict[str, Any]]] = deque()
        self._number, self._lock = 0, threading.Lock()
        self._parcels: queue.SimpleQueue[dict[str, list[Any]]] = queue.SimpleQueue()
        self._ended = threading.Event()
        threading.Thread(target=self._work, args=(setup,), daemon=True).start()

    def _work(self, setup: Mapping[str, Any]) -> None:
        where = f"{socket.gethostname()} {os.getpid()}"
        try:
            options = self._begun(setup)
            from packforcing_cli.worker import Worker
        except Exception as error:
            self._board.events.put({"event": "refused", "error": failure_of(error), "where": where})
            self._ended.set()
            return
        self._board.events.put({"event": "ready", "where": where})
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

    def _begun(self, setup: Mapping[str, Any]) -> Options:
        """Look at what is here, have models sent that are not. Raises: PackforcingError if this machine cannot work."""
        if setup["version"] != __version__:
            raise EnvironmentProblem(
                f"packforcing is {__version__} there, and the driver's is {setup['version']}",
                hint="Install the same version on every machine.",
            )
        token = Path(setup["token"])
        if not token.is_file():
            raise EnvironmentProblem(
                f"the folder {token.parents[1]} cannot be seen there",
                hint="--out must lie on storage that all machines have under the same path.",
            )
        options = Options(**setup["options"])
        lacking = {name: wanted for name, wanted in setup["models"].items() if not _has(name, wanted)}
        places = {name: shipped_folder(wanted) for name, wanted in lacking.items()}
        absent = [name for name, place in places.items() if not _has(str(place), lacking[name])]
        if absent:
            where = f"{socket.gethostname()} {os.getpid()}"
            self._board.events.put({"event": "lacks", "models": absent, "where": where})
            for name, chunks in self._parcels.get().items():
                _install(places[name], lacking[name], chunks)
        return replace(options, places={name: str(place) for name, place in places.items()})

    def bring(self, parcels: dict[str, list[Any]]) -> None:
        """Models that were asked for: name -> the pieces of a bundle in Ray's object store."""
        self._parcels.put(parcels)

    def give(self, task: dict[str, Any]) -> None:
        """Take one more job; the same attempt once only."""
        if (name := (task["id"], task["attempt"])) not in self._given:
            self._given.add(name)
            self._board.give(Task(**task))

    def order(self, job: str, why: str) -> None:
        """End a job after the block it is at."""
        self._board.orders[job] = why

    def end(self, why: str) -> None:
        """Begin no more jobs; anything but "drain" also ends the one at work after its block."""
        self._board.why = why

    def events(self, seen: int) -> tuple[list[tuple[int, dict[str, Any]]], bool]:
        """Numbered events after those that were seen, waited for a moment; and whether nothing will follow."""
        with self._lock:  # a call whose answer got lost may still be waiting
            while self._kept and self._kept[0][0] <= seen:
                self._kept.popleft()
            ended = self._ended.is_set()
            with contextlib.suppress(queue.Empty):
                wait = 0 if ended or self._kept else LONG_POLL_SECONDS
                self._keep(self._board.events.get(timeout=wait))
                while True:
                    self._keep(self._board.events.get_nowait())
            return list(self._kept), ended and self._board.events.empty()

    def _keep(self, event: dict[str, Any]) -> None:
        self._number += 1
        self._kept.append((self._number, event))


def shipped_folder(wanted: str) -> Path:
    """Where a model is kept that was sent to this machine: in the user's cache, under the hash of its files."""
    return packages.models_folder().parent / "shipped" / wanted[:32]


def _has(name: str, wanted: str) -> bool:
    """Whether a model is here with just these files, each as long as its manifest says; loading it hashes them."""
    try:
        return model_hash(name) == wanted and (catalog.of_random(name) is not None or _is_whole(name))
    except (PackforcingError, OSError):
        return False


def _is_whole(name: str) -> bool:
    folder = packages.find_package(name)
    known = packages.read_manifest(folder)
    sizes = ((folder / file).stat().st_size == record.size for file, record in known.files.items())
    return all(sizes) and not packages.absent_files(known)


def _install(place: Path, wanted: str, chunks: Sequence[Any]) -> None:
    """Install a model that was sent, unless another actor of this machine did meanwhile.

    One that is there and is not whole is replaced.
    Raises: WeightsError if it is not the wanted one; DiskFullError; OSError if what is there cannot be removed.
    """
    from huggingface_hub import utils as hub_utils

    from packforcing_cli import bundle

    place.parent.mkdir(parents=True, exist_ok=True)
    lock = place.with_name(f".{place.name}.lock")
    with hub_utils.WeakFileLock(lock):  # type: ignore[attr-defined]
        if _has(str(place), wanted):
            return
        if place.exists():  # damaged
            shutil.rmtree(place)
        with io.BufferedReader(_Chunks(chunks)) as stream:
            bundle.unpack_stream(stream, place)
        if not _has(str(place), wanted):
            shutil.rmtree(place, ignore_errors=True)
            raise WeightsError("the model that was sent is not the one the jobs were planned with")


class _Chunks(io.RawIOBase):
    """The bytes of a bundle, fetched piece by piece from Ray's object store."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        self._left, self._now = deque(chunks), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._now and self._left:
            self._now = memoryview(_ray().get(self._left.popleft()))
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self._now))
        view[:count], self._now = self._now[:count], self._now[count:]
        return count


# ---------------------------------------------------------------------------------------------------------- the driver


@dataclass
class _Member:
    """An actor as the driver knows it.

    poll:  its next events; None until `poll_at`, after it could not be reached.
    seen:  number of its last event.  where: machine and process, "" until it is ready.
    jobs:  given and not ended, with the moment each began.  tasks: what it was given for them.
    refused: load keys of jobs that it cannot do.  lacks: models it asked for and is waiting for.  asked: from where.
    """

    actor: Any
    slot: int
    poll: Any = None
    poll_at: float = 0.0
    seen: int = 0
    where: str = ""
    load_key: str = ""
    layout_key: str = ""
    jobs: dict[str, float | None] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    lacks: list[str] = field(default_factory=list)
    asked: str = ""


class Ray(Engine):
    """Actors of a Ray cluster.

    address:  of a cluster, "auto" or ray://…; None starts one on this machine.
    cpus:     cores of an actor; None = a GPU each, or one core where the cluster has none.
    workers:  how many; None = as many as fit.
    threads:  CPU threads of each.
    ship:     names of models to send to machines that lack them, with the hashes of their files. Not needed for a
              cluster that is started here.
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
        ship: Mapping[str, str] | None = None,
        max_failures: int | None = None,
    ) -> None:
        super().__init__(folder, max_failures=max_failures)
        self._options, self._address, self._cpus = options, address, cpus
        self._wanted, self._threads, self._ship = workers, threads, dict(ship or {})
        self._members: list[_Member] = []
        self._holder = ledger.this_process()
        self._ordered: dict[str, str] = {}
        self._retired: dict[int, PackforcingError] = {}
        self._refusals: dict[str, PackforcingError] = {}
        self._deaths: dict[int, int] = {}
        self._parcels: dict[str, list[Any]] = {}
        self._not_sent: dict[str, PackforcingError] = {}
        self._token = self.folder.path / HIDDEN / f"seen-{uuid.uuid4().hex[:12]}"
        self._gpus = 0.0
        self._said: set[str] = set()

    def run(self) -> Iterator[State]:
        """Do all jobs; yields how it stands, a few times a second."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if self._address is None or _is_on_loopback(self._address):  # read when Ray is imported
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        ray = _ray()
        count = self._connect(ray)
        began = time.monotonic()
        try:
            self.folder.ledger.set_sender(self._holder, is_one=True)
            self._token.write_text("seen\n", encoding="ascii")
            setup = {
                "options": asdict(replace(self._options, slot=0, may_exit=False)),
                "token": str(self._token),
                "version": __version__,
                "models": {} if self._address is None else self._ship,
            }
            while True:
                self.folder.ledger.take_over()
                self._staff(ray, count, setup)
                self._hand_out()
                self._hear(ray)
                self._look_after()
                if (
                    not any(member.where for member in self._members)
                    and time.monotonic() - began > WAIT_SECONDS
                ):
                    self._say(
                        f"no worker is ready after {WAIT_SECONDS:g} s: the cluster may have no room for one"
                    )
                self._find_problem(count)
                state = self.state(len(self._members))
                yield state
                if self.too_many(state):
                    self.drain("too many failures")
                if self.problem is not None:
                    return
                if not any(member.jobs for member in self._members) and not self.has_work():
                    return
        except ConnectionError as error:
            raise EnvironmentProblem(
                f"the Ray cluster is gone: {_first_line(error)}", hint="The same command goes on."
            ) from error
        finally:
            self.kill()
            self._token.unlink(missing_ok=True)
            ray.shutdown()
            with contextlib.suppress(PackforcingError):  # a note that harms nobody
                self.folder.ledger.set_sender(self._holder, is_one=False)

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
                self.folder.ledger.orphan(job, self._holder)
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
            with _own_signals(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the error says what there is to say
                ray.init(**options)
            there = ray.cluster_resources()
        except Exception as error:
            raise EnvironmentProblem(
                f"no Ray cluster at {self._address or 'this machine'}: {_first_line(error)}",
                hint="If the cluster wants a token, set RAY_AUTH_MODE=token; without --address one is started here.",
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

    def _staff(self, ray: Any, count: int, setup: Mapping[str, Any]) -> None:
        """Have as many actors as there is work for; all of them once one cannot do some of it."""
        base = self.folder.ledger
        if self.why or base.meta("paused") is not None:
            return
        busy = sum(bool(member.jobs) for member in self._members)
        needed = count if self._refusals or self._retired else min(count, base.ready() + busy)
        taken = {member.slot for member in self._members} | set(self._retired)
        slots = [n for n in range(count) if n not in taken]
        for slot in slots[: max(0, needed - len(taken))]:
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
                .remote(dict(setup))
            )
            self._members.append(_Member(actor, slot))

    def _hand_out(self) -> None:
        """Give jobs to actors that are ready: one to each, and one to look ahead to if no other would wait for it."""
        base = self.folder.ledger
        for depth in (1, 2):
            for member in self._members:
                if self.why or not member.where or len(member.jobs) >= depth:
                    continue
                if depth == 2 and base.ready() <= len(self._members):
                    return
                row = base.claim(
                    self._holder,
                    load_key=member.load_key,
                    layout_key=member.layout_key,
                    not_of=member.refused,
                )
                if row is None:
                    continue
                task = self.folder.task(row, is_orphan=base.is_orphan(row.id))
                member.jobs[row.id], member.tasks[row.id] = None, task
                member.load_key, member.layout_key = row.load_key, row.layout_key
                member.actor.give.remote(asdict(task))

    def _hear(self, ray: Any) -> None:
        """Write what actors tell into the ledger, and notice those that are gone."""
        for member in self._members:
            if member.poll is None and time.monotonic() >= member.poll_at:
                member.poll = member.actor.events.remote(member.seen)
        polls = {member.poll: member for member in self._members if member.poll is not None}
        if not polls:
            time.sleep(POLL_SECONDS)
            return
        ready, _ = ray.wait(list(polls), num_returns=len(polls), timeout=POLL_SECONDS)
        for ref in ready:
            member = polls[ref]
            if member not in self._members:
                continue
            try:
                events, ended = ray.get(ref)
            except ray.exceptions.ActorUnavailableError:  # Ray says later whether it is gone
                self._tell_again(ray, member)
                continue
            except ray.exceptions.RayError as error:
                self._gone(member, error)
                continue
            for number, event in events:
                if member in self._members and number > member.seen:
                    member.seen = number
                    self._note(ray, member, event)
            if member not in self._members:
                continue
            member.poll = None
            if ended:
                self._members.remove(member)
                for job in member.jobs:
                    self.folder.ledger.release(job, self._holder)
                with contextlib.suppress(Exception):
                    ray.kill(member.actor)

    def _bring(self, ray: Any, member: _Member) -> None:
        """Send an actor the models that it lacks; it is done without if one of them cannot be sent."""
        for name in member.lacks:
            if name not in self._parcels and name not in self._not_sent:
                try:
                    self._parcels[name] = self._parcel(ray, name)
                except PackforcingError as error:
                    self._not_sent[name] = error
            if name in self._not_sent:
                self._retire(member, self._not_sent[name], member.asked)
                return
        member.actor.bring.remote({name: self._parcels[name] for name in member.lacks})

    def _tell_again(self, ray: Any, member: _Member) -> None:
        """Repeat what an actor was told that could not be reached: it may have got lost."""
        member.poll, member.poll_at = None, time.monotonic() + LONG_POLL_SECONDS
        if member.lacks:
            self._bring(ray, member)
        for job in member.jobs:
            member.actor.give.remote(asdict(member.tasks[job]))
            if job in self._ordered:
                member.actor.order.remote(job, self._ordered[job])
        if self.why:
            member.actor.end.remote("drain" if self.why == "too many failures" else "stop")

    def _note(self, ray: Any, member: _Member, event: Mapping[str, Any]) -> None:
        base, kind, job = self.folder.ledger, event["event"], event.get("job", "")
        if kind == "ready":
            member.where, member.lacks = event["where"], []
        elif kind == "lacks":
            member.lacks, member.asked = event["models"], event["where"]
            self._bring(ray, member)
        elif kind == "paused":
            base.set_meta("paused", event["why"])
        elif kind == "note":
            self._say(event["text"])
        elif kind == "broken":
            self._gone(member, RuntimeError(event["text"]))
        elif kind == "refused" and not job:
            self._retire(member, RemoteError(**event["error"]), event["where"])
        if job not in member.jobs:
            return
        self._deaths.pop(member.slot, None)
        if kind == "begun":
            member.jobs[job] = time.monotonic()
            return
        if kind == "progress":
            why = base.progress(job, self._holder, event["blocks"], event["total"])
            if why and job not in self._ordered:
                self._ordered[job] = why
                member.actor.order.remote(job, why)
            return
        del member.jobs[job]
        task = member.tasks.pop(job)
        self._ordered.pop(job, None)
        if kind == "done":
            base.done(job, self._holder, event["result"])
        elif kind == "failed":
            error = RemoteError(**event["error"])
            base.fail(job, self._holder, error, retry_in=event["retry_in"], fit=event["fit"])
            if "CUDA error" in error.message:  # the GPU's context is spoiled: another process takes over
                self._gone(member, error)
        elif kind == "refused":
            error = RemoteError(**event["error"])
            member.refused.add(task.load_key)
            self._refusals.setdefault(task.load_key, error)
            base.release(job, self._holder, why=f"{_host(member.where)} cannot: {error.message}")
            model = task.spec["request"]["model"]
            self._say(f"{_host(member.where)} makes no videos with {model}: {error.message}")
        else:
            base.release(job, self._holder, cancelled=event["cancelled"], why=event["why"])

    def _say(self, text: str) -> None:
        """Have a person told, once."""
        if text not in self._said:
            self._said.add(text)
            self._notes.append(text)

    def _parcel(self, ray: Any, name: str) -> list[Any]:
        """A model as a bundle with all its parts, in pieces in Ray's object store.

        Raises: WeightsError, OfflineError if it is not whole here; DiskFullError; EnvironmentProblem.
        """
        from packforcing_cli import bundle

        beside = packages.models_folder().parent
        try:
            beside.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".shipping-", dir=beside) as place:
                tar = Path(place) / "model.tar"
                bundle.pack(packages.find_package(name), tar, with_parts=True)
                with tar.open("rb") as content:
                    return [ray.put(chunk) for chunk in iter(lambda: content.read(CHUNK_BYTES), b"")]
        except OSError as error:
            raise durable.failure(error, beside, kind=EnvironmentProblem) from error
        except ray.exceptions.RayError as error:
            raise EnvironmentProblem(
                f"{name} cannot be sent: {_first_line(error)}",
                hint=f"Install it on every machine: packforcing models pull {name}",
            ) from error

    def _retire(self, member: _Member, error: PackforcingError, where: str) -> None:
        """Do without an actor that cannot begin, and another in its place."""
        self._drop(member)
        self._retired[member.slot] = error
        self._say(f"a worker on {_host(where)} cannot begin: {error.message}")

    def _drop(self, member: _Member) -> None:
        if member in self._members:
            self._members.remove(member)
        with contextlib.suppress(Exception):
            _ray().kill(member.actor)

    def _gone(self, member: _Member, error: BaseException) -> None:
        """An actor is lost: its jobs are gone on with by others."""
        self._drop(member)
        where = member.where or "an actor that did not begin"
        for job, began in member.jobs.items():
            self.folder.ledger.orphan(job, self._holder)
            if began is None:
                self.folder.ledger.release(job, self._holder, why=f"{where} is gone")
            else:
                self.folder.ledger.lost(job, self._holder, said=where)
        if getattr(error, "actor_init_failed", False):  # its class cannot be made there
            said = str(error).strip().splitlines()[-1]
            self._retire(member, EnvironmentProblem(f"its process fails: {said}", hint=INSTALL_THERE), "")
            return
        if any(member.jobs.values()):
            return
        deaths = self._deaths[member.slot] = self._deaths.get(member.slot, 0) + 1
        if deaths >= MAX_DEATHS:
            said = f"{deaths} times in a row its process ended before it began a job: {_first_line(error)}"
            self._retire(member, EnvironmentProblem(said, hint="See the logs of Ray."), member.where)

    def _find_problem(self, count: int) -> None:
        """Notice that jobs are left which no actor can do: they stay queued."""
        base = self.folder.ledger
        if self.why or base.meta("paused") is not None or any(member.jobs for member in self._members):
            return
        if len(self._members) + len(self._retired) < count or not all(one.where for one in self._members):
            return
        shared = set.intersection(*(one.refused for one in self._members)) if self._members else set[str]()
        if not base.ready() or (self._members and base.ready(shared)):
            return
        left = dict.fromkeys(row.load_key for row in base.rows("queued"))
        errors = [self._refusals[key] for key in left if key in shared] or list(self._retired.values())
        found = RemoteError(
            f"no worker can do the jobs that are left: {errors[0].message}",
            hint=f"{errors[0].hint} They stay queued: the same command goes on.".strip(),
            exit_code=errors[0].exit_code,
        )
        self.problem = found

    def _look_after(self) -> None:
        """Kill the actor of a job that does not end at its timeout."""
        limit = self._options.timeout
        if limit is None:
            return
        for member in list(self._members):
            for job, began in list(member.jobs.items()):
                if began is not None and time.monotonic() - began > _HUNG_FACTOR * limit + _HUNG_MORE:
                    error = TimeoutError(f"took longer than {limit:g} s and did not end")
                    self.folder.ledger.orphan(job, self._holder)
                    self.folder.ledger.fail(job, self._holder, error)
                    del member.jobs[job]
                    self._gone(member, error)
                    break


def _ray() -> Any:
    """Ray itself. Raises: EnvironmentProblem if it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise EnvironmentProblem("--engine ray needs Ray, which is not installed", hint=INSTALL) from error
    return ray


def parse_address(text: str) -> tuple[str, int] | None:
    """Host and port of HOST:PORT or ray://HOST:PORT; None for auto. Raises: UsageError."""
    if text == "auto":
        return None
    host, colon, port = text.removeprefix("ray://").rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536 or "/" in host:
        raise UsageError(
            f"--address {text}: must be auto, HOST:PORT or ray://HOST:PORT",
            hint="ray start --head prints the address; without --address a cluster is started on this machine.",
        )
    return host.strip("[]"), int(port)


def _is_on_loopback(address: str) -> bool:
    """Whether a cluster is of this machine alone: Ray would look for it on the network.

    Raises: EnvironmentProblem if nobody listens there: Ray would try for minutes.
    """
    place = parse_address(address)
    if place is None:
        return False
    host, port = place
    with contextlib.suppress(OSError):
        if host in ("localhost", "127.0.0.1", "::1") and not address.startswith("ray://"):
            for other in socket.gethostbyname_ex(socket.gethostname())[2]:
                with contextlib.suppress(OSError), socket.create_connection((other, port), CONNECT_SECONDS):
                    return other.startswith("127.")
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except OSError as error:
        raise EnvironmentProblem(
            f"no Ray cluster at {address}: {error.strerror or error}",
            hint="ray start --head starts one and prints its address; without --address one is started here.",
        ) from error
    return host in ("localhost", "127.0.0.1", "::1") and not address.startswith("ray://")


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep what is to happen on SIGINT and SIGTERM: Ray puts in an end of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _host(where: str) -> str:
    return where.partition(" ")[0] or "some machine"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
