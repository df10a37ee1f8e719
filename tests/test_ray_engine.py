"""Batches on a Ray cluster of this machine: the same bytes, whoever dies in between."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from batch_chaos import workers_of

from packforcing_cli import (
    batch,
    batch_plan,
    bundle,
    catalog,
    generate_many,
    ledger,
    manifest,
    packages,
    ray_engine,
    runfolder,
    worker,
)
from packforcing_cli.errors import EnvironmentProblem, GenerationError, LockedError, UsageError, WeightsError
from packforcing_cli.ledger import Ledger, Row
from packforcing_cli.tasks import Options, Task, model_hash, run_folder

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None or sys.platform != "linux",
    reason='needs Ray (pip install "packforcing[ray]") and /proc',
)
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0"}
RAY = ("--engine", "ray", "--cpus-per-worker", "1", "--workers", "2")


def task(name: str) -> Task:
    return Task(
        id=name, spec={}, output=f"/v/{name}.mp4", run="/v/.packforcing/runs/x", load_key="a", layout_key="b"
    )


def test_a_board_under_ray_hands_out_jobs_and_keeps_what_is_told() -> None:
    board = ray_engine._QueueBoard()
    assert board.claim("", "") is None
    board.give(task("one"))
    board.give(task("two"))
    first = board.claim("", "")
    assert first is not None and first.id == "one"
    assert [one.id for one in board.upcoming("", "", 5)] == ["two"]
    assert board.progress(first, 1, 2) == ""
    board.orders["one"] = "cancelled"
    assert board.progress(first, 2, 2) == "cancelled"
    board.fail(first, GenerationError("NaN", hint="Try fp32."), retry_in=2.0)
    assert board.idle() is not None
    board.why = "stop"
    assert board.idle() is None
    assert [one.id for one in board.rest()] == ["two"]
    events = []
    while not board.events.empty():
        events.append(board.events.get())
    assert [event["event"] for event in events] == ["begun", "progress", "progress", "failed"]
    error = ray_engine.RemoteError(**events[-1]["error"])
    assert (error.kind, error.message, error.hint) == ("GenerationError", "NaN", "Try fp32.")


def setup_of(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """What the driver tells an actor."""
    token = tmp_path / "v/.packforcing/seen"
    token.parent.mkdir(parents=True, exist_ok=True)
    token.write_text("seen", encoding="ascii")
    values = {
        "options": vars(Options()),
        "token": str(token),
        "version": ray_engine.__version__,
        "models": {},
    }
    return values | changes


def told(actor: ray_engine.BatchActor, kind: str, seen: int = 0) -> list[dict[str, Any]]:
    """What an actor tells, up to an event of a kind."""
    deadline = time.monotonic() + 120
    while True:
        found = [event for _, event in actor.events(seen)[0]]
        if any(event["event"] == kind for event in found):
            return found
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"token": "/nowhere/v/.packforcing/seen"}, "the folder /nowhere/v cannot be seen there"),
        ({"version": "0.0"}, "and the driver's is 0.0"),
        ({"options": {"nothing": 1}}, "unexpected keyword argument 'nothing'"),
    ],
)
def test_an_actor_that_cannot_begin_says_why_and_ends(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    actor = ray_engine.BatchActor(setup_of(tmp_path, **changes))
    (event,) = told(actor, "refused")
    assert said in event["error"]["message"] and event["where"]
    deadline = time.monotonic() + 60
    while not actor.events(1)[1]:
        assert time.monotonic() < deadline


def test_an_actor_works_without_ray_around_it_and_tells_again_what_got_lost(tmp_path: Path) -> None:
    actor = ray_engine.BatchActor(setup_of(tmp_path))
    bad = {**vars(task("one")), "spec": {"kind": "generate", "request": {}, "model": "x"}}
    bad |= {"output": str(tmp_path / "x.mp4"), "run": str(tmp_path / ".packforcing/runs/x")}
    for _ in range(2):  # the second time as when the first got lost
        actor.give(bad)
    found = told(actor, "failed")
    assert [event["event"] for event in found] == ["ready", "begun", "failed"]
    assert "prompt is missing" in found[-1]["error"]["message"]
    assert [number for number, _ in actor.events(0)[0]] == [1, 2, 3]
    assert actor.events(2)[0] == [(3, found[-1])]
    assert actor.events(3)[0] == []
    actor.end("stop")
    deadline = time.monotonic() + 60
    while not actor.events(3)[1]:
        assert time.monotonic() < deadline


def test_a_model_that_is_not_on_a_machine_is_refused_and_not_the_job_failed(tmp_path: Path) -> None:
    actor = ray_engine.BatchActor(setup_of(tmp_path))
    request = {"prompt": "a", "model": str(tmp_path / "gone")}
    job = {**vars(task("one")), "spec": {"kind": "generate", "request": request, "model": "hash"}}
    job |= {"output": str(tmp_path / "v/x.mp4"), "run": str(tmp_path / "v/.packforcing/runs/x")}
    actor.give(job)
    found = told(actor, "refused")
    assert (found[-1]["job"], found[-1]["error"]["exit_code"]) == ("one", 2)
    assert "there is no model folder" in found[-1]["error"]["message"]
    actor.end("stop")


def copy_of_the_demo(folder: Path) -> Path:
    """A package that is not the one which comes along."""
    shutil.copytree(catalog.DEMO_FOLDER, folder)
    values = json.loads((folder / packages.MANIFEST).read_text("utf-8"))
    (folder / packages.MANIFEST).write_text(json.dumps({**values, "name": "copy"}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("how", ["whole", "cut off", "another one"])
def test_a_model_that_is_sent_is_checked_and_kept(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(ray_engine, "_ray", lambda: SimpleNamespace(get=lambda chunk: chunk))
    package = copy_of_the_demo(tmp_path / "copy")
    bundle.pack(package, tmp_path / "copy.tar")
    wanted = model_hash(str(package))
    data = (tmp_path / "copy.tar").read_bytes()
    if how == "cut off":
        data = data[: len(data) // 2]
    chunks = [data[at : at + 1_000_000] for at in range(0, len(data), 1_000_000)]
    actor = ray_engine.BatchActor(
        setup_of(
            tmp_path,
            models={"elsewhere": "0" * 64 if how == "another one" else wanted, "demo": model_hash("demo")},
        )
    )
    (event,) = told(actor, "lacks")
    assert (event["models"], event["where"]) == (["elsewhere"], f"{socket.gethostname()} {os.getpid()}")
    actor.bring({"elsewhere": chunks})
    if how != "whole":
        error = told(actor, "refused", 1)[-1]["error"]
        assert error["kind"] == "WeightsError" and error["exit_code"] == 7
        assert not list((tmp_path / "cache").rglob("*.safetensors"))
        return
    told(actor, "ready", 1)
    place = ray_engine.shipped_folder(wanted)
    assert place.is_relative_to(tmp_path / "cache") and model_hash(str(place)) == wanted
    actor.end("stop")
    another = ray_engine.BatchActor(setup_of(tmp_path, models={"elsewhere": wanted}))
    assert told(another, "ready")[0]["event"] == "ready"  # it is here now: nothing is sent
    another.end("stop")
    weights = next(place.rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    third = ray_engine.BatchActor(setup_of(tmp_path, models={"elsewhere": wanted}))
    told(third, "lacks")
    third.bring({"elsewhere": chunks})
    told(third, "ready", 1)
    assert ray_engine._has(str(place), wanted)
    third.end("stop")


@pytest.mark.parametrize("how", ["whole", "gone", "cut off", "reference"])
def test_a_model_is_here_if_all_its_files_are(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    package = copy_of_the_demo(tmp_path / "copy")
    weights = next(package.glob("transformer/*.safetensors"))
    if how == "gone":
        weights.unlink()
    elif how == "cut off":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif how == "reference":
        values = json.loads((package / packages.MANIFEST).read_text("utf-8"))
        files = {name: one for name, one in values["files"].items() if name.startswith("transformer/")}
        values["files"] = {name: one for name, one in values["files"].items() if name not in files}
        files = {name.removeprefix("transformer/"): one for name, one in files.items()}
        values["references"] = {"transformer": {"repo": "a/b", "revision": "0" * 40, "files": files}}
        del values["parts"]["transformer"]
        (package / packages.MANIFEST).write_text(json.dumps(values), encoding="utf-8")
    assert ray_engine._has(str(package), model_hash(str(package))) == (how == "whole")
    assert not ray_engine._has(str(package), "0" * 64)


# -- the driver, with actors that play a part --------------------------------------------------------------------------


class Died(Exception):
    actor_init_failed = False


class InitFailed(Died):
    actor_init_failed = True


class Unavailable(Exception):
    pass


@dataclass
class Part:
    """What an actor does. no_model: load keys it refuses. lost: so many answers that do not arrive, and till then no
    message. lacks: a model that has to be sent. fails: "dies", "import" as it begins; "at work", "hangs" over a job."""

    fails: str = ""
    refuses: str = ""
    no_model: tuple[str, ...] = ()
    lost: int = 0
    lacks: str = ""


class PlayedActor:
    def __init__(self, part: Part, number: int) -> None:
        self.part, self.given, self.dead = part, list[str](), part.fails == "dies"
        self.orphans = set[str]()
        self.log: list[dict[str, Any]] = [{"event": "ready", "where": f"host{number} {number}"}]
        if part.lacks:
            lacks = {"event": "lacks", "models": [part.lacks], "where": f"host{number} {number}"}
            self.log, self.held = [lacks], self.log
        if part.refuses:
            error = {"kind": "X", "message": part.refuses, "hint": "Mend it.", "exit_code": 7}
            self.log = [{"event": "refused", "error": error, "where": f"host{number} {number}"}]

    def give(self, values: dict[str, Any]) -> None:
        job = values["id"]
        if self.part.lost or job in self.given:  # lost, or told again
            return
        self.given.append(job)
        if values["is_orphan"]:
            self.orphans.add(job)
        self.log.append({"event": "begun", "job": job})
        if self.part.fails in ("at work", "hangs"):
            self.dead = self.part.fails == "at work"
            return
        if values["load_key"] in self.part.no_model:
            error = {"kind": "WeightsError", "message": "no weights", "hint": "", "exit_code": 7}
            self.log.append({"event": "refused", "job": job, "error": error})
        else:
            self.log.append({"event": "done", "job": job, "result": {"blocks": 1, "by": id(self)}})

    def bring(self, parcels: dict[str, list[Any]]) -> None:
        assert parcels == {self.part.lacks: ["a piece"]}
        if not self.part.lost:
            self.log, self.held = self.log + self.held, []

    def events(self, seen: int) -> Any:
        if seen and self.part.lacks and self.part.lost:
            self.part.lost -= 1
            raise Unavailable
        if self.part.fails == "import":
            raise InitFailed("the actor died\nModuleNotFoundError: No module named 'packforcing_cli'")
        if self.dead:
            raise Died("the process ended")
        if self.part.lost and not self.part.lacks:
            self.part.lost -= 1
            raise Unavailable
        return list(enumerate(self.log, 1))[seen:], bool(self.part.refuses)

    def end(self, why: str) -> None:
        self.log.append({"event": "note", "text": f"told to {why}"})


class PlayedRay:
    """As much of Ray as the driver uses, one call after the other."""

    def __init__(self, *parts: Part) -> None:
        self.parts, self.made = list(parts), list[PlayedActor]()
        self.exceptions = SimpleNamespace(ActorUnavailableError=Unavailable, RayError=Died)

    def init(self, **_: Any) -> None:
        signal.signal(signal.SIGTERM, lambda *_: pytest.fail("Ray's own end"))

    def shutdown(self) -> None: ...

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def remote(self, _: Any) -> Any:
        def make(setup: dict[str, Any]) -> Any:
            part = self.parts[min(len(self.made), len(self.parts) - 1)]
            actor = PlayedActor(part, len(self.made))
            self.made.append(actor)
            return Handle(actor)

        made = SimpleNamespace(remote=make)
        return SimpleNamespace(options=lambda **_: made)

    def wait(self, refs: list[Any], **_: Any) -> Any:
        return refs, []

    def get(self, ref: Any) -> Any:
        return ref.call()

    def kill(self, handle: Any) -> None:
        handle.actor.dead = True


@dataclass(eq=False)
class Call:
    call: Callable[[], Any]


@dataclass(eq=False)
class Handle:
    actor: PlayedActor

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> Call:
            call = partial(getattr(self.actor, name), *arguments)
            if name != "events":
                call()
            return Call(call)

        return SimpleNamespace(remote=remote)


@pytest.fixture
def drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Let the driver do four jobs of two models with actors that play a part."""
    monkeypatch.setattr(ray_engine, "LONG_POLL_SECONDS", 0.01)
    wanted = [{"prompt": "a", "seed": n} for n in range(3)] + [{"prompt": "b", "dtype": "bf16"}]
    entries, _ = batch_plan.plan_jobs(manifest.of_values(wanted, defaults={"model": "demo"}))
    entries = [replace(entry, load_key=entry.spec["request"]["dtype"]) for entry in entries]
    folder = batch.Folder.open(tmp_path / "v")
    folder.add(entries, source="test")

    def run(*parts: Part) -> Any:
        played = PlayedRay(*parts)
        monkeypatch.setattr(ray_engine, "_ray", lambda: played)
        engine = ray_engine.Ray(folder, Options())
        notes = [note for state in engine.run() for note in state.notes]
        return SimpleNamespace(
            played=played, problem=engine.problem, notes=notes, base=folder.ledger, rows=folder.ledger.rows()
        )

    with folder.ledger:
        yield run


def test_an_actor_that_cannot_begin_is_done_without(drive: Any) -> None:
    found = drive(Part(refuses="no such device"), Part())
    assert found.notes == ["a worker on host0 cannot begin: no such device"]
    assert (found.problem, {row.status for row in found.rows}) == (None, {"done"})
    assert len(found.played.made) == 2
    assert all(row.attempt == 1 and row.deaths == 0 for row in found.rows)


@pytest.mark.parametrize(
    ("part", "made", "code", "said"),
    [
        (Part(refuses="no such device"), 2, 7, "no such device"),
        (Part(fails="import"), 2, 4, "No module named 'packforcing_cli'"),
        (
            Part(fails="dies"),
            6,
            4,
            "3 times in a row its process ended before it began a job: the process ended",
        ),
        (Part(no_model=("auto", "bf16")), 2, 7, "no weights"),
    ],
)
def test_where_no_actor_can_begin_the_jobs_stay_queued(
    part: Part, made: int, code: int, said: str, drive: Any
) -> None:
    found = drive(part)
    assert found.problem.exit_code == code
    assert found.problem.message.endswith(said) and "the same command goes on" in found.problem.hint
    assert {(row.status, row.deaths) for row in found.rows} == {("queued", 0)}
    assert len(found.played.made) == made
    assert {row.status for row in drive(Part()).rows} == {"done"}


def test_jobs_of_a_model_go_to_the_actor_that_has_it(drive: Any) -> None:
    found = drive(Part(no_model=("auto",)), Part(no_model=("bf16",)))
    assert found.problem is None
    first, second = (id(actor) for actor in found.played.made)
    assert [row.result["by"] for row in found.rows] == [second] * 3 + [first]


def test_jobs_of_a_model_that_no_actor_has_stay_queued_and_the_others_are_done(drive: Any) -> None:
    found = drive(Part(no_model=("bf16",)))
    assert [row.status for row in found.rows] == ["done", "done", "done", "queued"]
    assert (found.problem.exit_code, len(found.played.made)) == (7, 2)


def test_the_last_job_of_a_driver_that_was_killed_is_gone_on_with(drive: Any) -> None:
    first = drive(Part(no_model=("auto",)))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        dead = ledger.this_process(other.pid)
        while first.base.claim(dead) is not None:
            pass
    assert first.base.ready() == 0
    assert {row.status for row in drive(Part()).rows} == {"done"}


@pytest.mark.parametrize("how", ["its driver is killed", "its driver ends it", "it dies", "it hangs"])
def test_of_the_job_of_an_actor_that_is_gone_the_lock_is_known_to_be_nobodys(
    how: str, drive: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = batch.Folder.open(tmp_path / "v")
    with folder.ledger as base:
        job, dead = base.rows()[0].id, ""
        if how == "its driver is killed":
            with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
                dead = ledger.this_process(other.pid)
                base.set_sender(dead, is_one=True)
                assert base.claim(dead, ids=[job]) is not None
        elif how == "its driver ends it":
            played = PlayedRay(Part(fails="hangs"))
            monkeypatch.setattr(ray_engine, "_ray", lambda: played)
            engine = ray_engine.Ray(folder, Options(), workers=1)
            running = engine.run()
            while base.row(job).status != "started":
                next(running)
            assert not base.is_orphan(job)
            running.close()
            assert base.row(job).status == "queued" and base.is_orphan(job)
        elif how == "it hangs":
            monkeypatch.setattr(ray_engine, "_HUNG_MORE", 0.0)
            monkeypatch.setattr(ray_engine, "POLL_SECONDS", 0.01)
            played = PlayedRay(Part(fails="hangs"), Part())
            monkeypatch.setattr(ray_engine, "_ray", lambda: played)
            list(ray_engine.Ray(folder, Options(timeout=0.001), workers=1).run())
            assert base.row(job).status == "failed" and base.is_orphan(job)
            assert base.retry([job]) == 1
        found = drive(*[Part(fails="at work")] * (how == "it dies"), Part())
        assert {row.status for row in found.rows} == {"done"}
        assert job in set.union(*(actor.orphans for actor in found.played.made))
        assert not base.is_orphan(job)
        assert {base.meta(f"{ledger._SENDER}{one}") for one in (ledger.this_process(), dead)} == {None}


def test_a_job_sent_to_an_actor_whose_driver_died_takes_away_its_lock(tmp_path: Path) -> None:
    place = run_folder(tmp_path, "one")
    place.mkdir(parents=True)
    (place / "lock").write_text(json.dumps({"pid": 77, "host": "node-b"}), encoding="utf-8")
    values = {**vars(task("one")), "run": str(place)}
    worker._let_go(Task(**values))
    with pytest.raises(LockedError, match="process 77 on node-b"), runfolder.hold(place):
        pass
    worker._let_go(Task(**{**values, "is_orphan": True}))
    with runfolder.hold(place):
        pass


def test_what_a_signal_does_is_not_left_to_ray(drive: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    drive(Part())
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_got_lost_on_the_way_is_told_again(drive: Any) -> None:
    found = drive(Part(lost=3))
    assert {row.status for row in found.rows} == {"done"}
    assert all(row.attempt == 1 for row in found.rows)


def test_a_model_that_got_lost_on_the_way_is_sent_again(drive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_engine.Ray, "_parcel", lambda *_: ["a piece"])
    found = drive(Part(lacks="copy", lost=2))
    assert {row.status for row in found.rows} == {"done"}


@pytest.mark.parametrize("error", [WeightsError("it is damaged"), OSError(errno.ENOSPC, "full")])
def test_a_model_that_cannot_be_sent_ends_the_actors_that_lack_it_and_not_the_batch(
    error: Exception, drive: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fails(*_: Any, **__: Any) -> None:
        asked.append(1)
        raise error

    monkeypatch.setattr(bundle, "pack", fails)
    said = "it is damaged" if isinstance(error, WeightsError) else "the disk is full"
    found = drive(Part(lacks="demo"), Part(lacks="demo"))
    assert found.problem.exit_code == (7 if isinstance(error, WeightsError) else 6)
    assert said in found.problem.message and "the same command goes on" in found.problem.hint
    assert {row.status for row in found.rows} == {"queued"} and len(asked) == 1
    found = drive(Part(lacks="demo"), Part())
    assert found.problem is None and {row.status for row in found.rows} == {"done"}
    assert len(found.notes) == 1 and found.notes[0].startswith("a worker on host0 cannot begin: ")


def test_an_address_where_nobody_listens_is_told_at_once(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    folder = batch.Folder.open(tmp_path / "v")
    with folder.ledger:
        for text in (address, f"ray://{address}"):
            with pytest.raises(EnvironmentProblem, match=f"no Ray cluster at {text}: Connection refused"):
                next(ray_engine.Ray(folder, Options(), address=text).run())
    for bad in ("nowhere", "ray://x", "host:0", "http://x:1", "local"):
        with pytest.raises(UsageError, match="must be auto, HOST:PORT or"):
            ray_engine.parse_address(bad)


def test_without_ray_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    folder = batch.Folder.open(tmp_path / "v")
    with folder.ledger, pytest.raises(EnvironmentProblem) as caught:
        next(ray_engine.Ray(folder, Options()).run())
    assert caught.value.exit_code == 4 and "packforcing[ray]" in caught.value.hint


# -- with a cluster ---------------------------------------------------------------------------------------------------


def some_jobs(folder: Path, seconds: float, model: str = "demo") -> Path:
    """A long job and a short one, which is not done either when the first block of the long one is there."""
    common = {"model": model, "size": "64x64"}
    jobs = [
        {"prompt": "a red circle", "seconds": seconds, "seed": 0, **common},
        {"prompt": "a blue square", "seconds": 5, "seed": 1, **common},
    ]
    path = folder / "jobs.jsonl"
    path.write_text("\n".join(map(json.dumps, jobs)), encoding="utf-8")
    return path


Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Begin a batch in a process of its own, which does not outlive the test."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(manifest: Path, out: str, *options: str) -> subprocess.Popen[bytes]:
        words = [
            sys.executable,
            "-m",
            "packforcing_cli",
            "batch",
            manifest.name,
            "--out",
            out,
            "-q",
            *options,
        ]
        environment = {**os.environ, **ENVIRONMENT}
        process = subprocess.Popen(words, cwd=manifest.parent, env=environment, stdout=subprocess.DEVNULL)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()


def rows_of(manifest: Path, out: str) -> list[Row]:
    with Ledger.open(manifest.parent / out / ledger.NAME) as base:
        return base.rows()


def events_of(manifest: Path, out: str, event: str) -> list[dict[str, Any]]:
    with Ledger.open(manifest.parent / out / ledger.NAME) as base:
        return [found for found in base.events() if found["event"] == event]


def hashes(rows: list[Row]) -> list[tuple[str, str]]:
    return [(row.result["latents_sha256"], row.result["packets_sha256"]) for row in rows]


def calm(manifest: Path) -> list[tuple[str, str]]:
    """What one process makes of it."""
    lines = manifest.read_text("utf-8").splitlines()
    assert all(
        made.path for made in generate_many([json.loads(line) for line in lines], manifest.parent / "calm")
    )
    return hashes(rows_of(manifest, "calm"))


def wait_for(
    manifest: Path, out: str, process: subprocess.Popen[bytes], is_so: Callable[[list[Row]], bool]
) -> list[Row]:
    """Until something is so in the ledger, while the driver works."""
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if (
            (manifest.parent / out / ledger.NAME).exists()
            and (rows := rows_of(manifest, out))
            and is_so(rows)
        ):
            return rows
        time.sleep(0.05)
    raise AssertionError(f"{process.poll()}: it did not come to that")


def process_at_work(manifest: Path, out: str, row: Row) -> int:
    """Which process has a job's run folder."""
    lock = run_folder(manifest.parent / out, row.id) / "lock"
    return int(json.loads(lock.read_text("utf-8"))["pid"])


def halted_at_the_long_job(manifest: Path, out: str, driver: subprocess.Popen[bytes], blocks: int) -> int:
    """The process that has the first job and has gone past `blocks`, halted there, once the second job is done.

    However slow or late the other process is, the first job is not done by then.
    """
    rows = wait_for(manifest, out, driver, lambda rows: rows[0].blocks > blocks)
    found = process_at_work(manifest, out, rows[0])
    os.kill(found, signal.SIGSTOP)
    try:
        wait_for(manifest, out, driver, lambda rows: rows[1].status == "done")
    except BaseException:
        os.kill(found, signal.SIGKILL)
        raise
    return found


def assert_it_went_on_elsewhere(manifest: Path, out: str, lost: int) -> None:
    """The ledger says which process was lost over the first job, and that another one finished it, and once."""
    first, _ = rows_of(manifest, out)
    died = [event for event in events_of(manifest, out, "died") if event["job"] == first.id]
    assert died[-1]["said"].split()[-1] == str(lost)
    assert first.result["worker"].split()[-1] != str(lost)
    assert first.result["figures"]["replayed"] >= 1
    done = [event["job"] for event in events_of(manifest, out, "done")]
    assert len(done) == len(set(done)) == 2


@needs_ray
def test_after_a_kill_of_the_driver_and_of_an_actor_the_other_one_finishes_its_job(
    tmp_path: Path, start: Start
) -> None:
    manifest = some_jobs(tmp_path, 20)
    driver = start(manifest, "ray", *RAY)
    (before, _) = wait_for(manifest, "ray", driver, lambda rows: rows[0].blocks > 0)
    with Ledger.open(tmp_path / "ray" / ledger.NAME) as base:
        assert base.holders() == {ledger.this_process(driver.pid)}  # the driver alone writes
    driver.kill()
    driver.wait()

    driver = start(manifest, "ray", *RAY)
    lost = halted_at_the_long_job(manifest, "ray", driver, before.blocks)
    (other,) = set(workers_of(driver.pid)) - {lost}
    os.kill(lost, signal.SIGKILL)
    assert driver.wait(timeout=300) == 0
    assert_it_went_on_elsewhere(manifest, "ray", lost)
    assert rows_of(manifest, "ray")[0].result["worker"].split()[-1] == str(other)
    assert hashes(rows_of(manifest, "ray")) == calm(manifest)


@contextlib.contextmanager
def cluster(*caches: Path) -> Iterator[tuple[str, Callable[[str], None]]]:
    """The address of a cluster with a node for each cache, and what tells it something."""
    words = [sys.executable, str(Path(__file__).parent / "ray_cluster.py"), *map(str, caches)]
    process = subprocess.Popen(
        words, env={**os.environ, **ENVIRONMENT}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None

    def tell(text: str) -> None:
        process.stdin.write(f"{text}\n")
        process.stdin.flush()

    try:
        address = next(line for line in process.stdout if line[:4] == "127.").strip()
        yield address, tell
    finally:
        with contextlib.suppress(OSError):
            tell("end")
            process.stdin.close()
        process.stdout.read()
        process.stdout.close()
        process.wait(timeout=60)


@pytest.mark.slow
@needs_ray
def test_on_a_cluster_models_are_sent_and_a_killed_driver_and_a_lost_node_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Start
) -> None:
    caches = [tmp_path / name for name in ("driver", "first", "second")]
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches[0]))
    copy_of_the_demo(packages.install_folder("copy"))
    manifest = some_jobs(tmp_path, 24, model="copy")
    with cluster(*caches[1:]) as (address, tell):
        options = ("--engine", "ray", "--address", address, "--cpus-per-worker", "1", "--ship-models")
        driver = start(manifest, "ray", *options)
        wait_for(manifest, "ray", driver, lambda rows: rows[0].blocks > 1)
        driver.kill()
        driver.wait()
        driver = start(manifest, "ray", *options)
        before = rows_of(manifest, "ray")[0]
        lost = halted_at_the_long_job(manifest, "ray", driver, before.blocks)
        environment = Path(f"/proc/{lost}/environ").read_bytes().decode().split("\0")
        node = [f"XDG_CACHE_HOME={cache}" in environment for cache in caches[1:]].index(True)
        tell(f"lose {node}")
        with contextlib.suppress(ProcessLookupError):
            os.kill(lost, signal.SIGKILL)  # halted, it does not notice that its node is gone
        assert driver.wait(timeout=300) == 0
    assert_it_went_on_elsewhere(manifest, "ray", lost)
    for cache in caches[1:]:  # each machine got the model, and none of the other's
        assert len(list(cache.glob("packforcing/shipped/*/packforcing.json"))) == 1
    assert hashes(rows_of(manifest, "ray")) == calm(manifest)
