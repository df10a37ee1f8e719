"""Batches on a Ray cluster of this machine: the same bytes, whoever dies in between."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from batch_chaos import workers_of

from packforcing_cli import batch, generate_many, ledger, ray_engine
from packforcing_cli.errors import EnvironmentProblem, GenerationError
from packforcing_cli.ledger import Ledger, Row
from packforcing_cli.tasks import Options, Task

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None or sys.platform != "linux",
    reason='needs Ray (pip install "packforcing[ray]") and /proc',
)
ENVIRONMENT = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
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


def test_an_actor_refuses_another_version_and_a_folder_it_cannot_see(tmp_path: Path) -> None:
    token = tmp_path / "v/.packforcing/seen"
    with pytest.raises(EnvironmentProblem, match="cannot be seen on"):
        ray_engine.BatchActor({}, str(token), ray_engine.__version__, {})
    token.parent.mkdir(parents=True)
    token.write_text("seen")
    with pytest.raises(EnvironmentProblem, match=r"and the driver 0\.0"):
        ray_engine.BatchActor({}, str(token), "0.0", {})


def test_an_actor_works_without_ray_around_it(tmp_path: Path) -> None:
    token = tmp_path / "seen"
    token.write_text("seen")
    actor = ray_engine.BatchActor(vars(Options()), str(token), ray_engine.__version__, {})
    bad = {**vars(task("one")), "spec": {"kind": "generate", "request": {}, "model": "x"}}
    actor.give(bad | {"output": str(tmp_path / "x.mp4"), "run": str(tmp_path / ".packforcing/runs/x")})
    told: list[dict[str, Any]] = []
    deadline = time.monotonic() + 60
    while not any(event["event"] == "failed" for event in told):
        assert time.monotonic() < deadline
        told += actor.events()[0]
    assert "prompt is missing" in told[-1]["error"]["message"]
    actor.end("stop")
    while not actor.events()[1]:
        assert time.monotonic() < deadline


def test_without_ray_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    folder = batch.Folder.open(tmp_path / "v")
    with folder.ledger, pytest.raises(EnvironmentProblem) as caught:
        next(ray_engine.Ray(folder, Options()).run())
    assert caught.value.exit_code == 4 and "packforcing[ray]" in caught.value.hint


# -- with a cluster ---------------------------------------------------------------------------------------------------


def some_jobs(tmp_path: Path) -> Path:
    common = {"model": "demo", "size": "64x64"}
    jobs = [{"prompt": "a red circle", "seconds": 12, "seed": 0, **common}]
    jobs += [{"prompt": "a blue square", "seconds": 1, "seed": n, **common} for n in (1, 2, 3)]
    path = tmp_path / "jobs.jsonl"
    path.write_text("\n".join(map(json.dumps, jobs)), encoding="utf-8")
    return path


def start(manifest: Path, out: str, *options: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "packforcing_cli", "batch", manifest.name, "--out", out, "-q", *options]
    return subprocess.Popen(words, cwd=manifest.parent, env=ENVIRONMENT, stdout=subprocess.DEVNULL)


def rows_of(manifest: Path, out: str) -> list[Row]:
    with Ledger.open(manifest.parent / out / ledger.NAME) as base:
        return base.rows()


def hashes(rows: list[Row]) -> list[tuple[str, str]]:
    return [(row.result["latents_sha256"], row.result["packets_sha256"]) for row in rows]


def wait_for_blocks(manifest: Path, out: str, process: subprocess.Popen[bytes]) -> None:
    """Until the first job has blocks and others are left."""
    deadline = time.monotonic() + 180
    path = manifest.parent / out / ledger.NAME
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and any(row.blocks for row in rows_of(manifest, out)[:1]):
            return
        time.sleep(0.05)
    raise AssertionError("no block was made")


@needs_ray
def test_actors_and_the_driver_may_be_killed_and_the_bytes_are_those_of_the_local_engine(
    tmp_path: Path,
) -> None:
    manifest = some_jobs(tmp_path)
    lines = manifest.read_text("utf-8").splitlines()
    assert all(made.path for made in generate_many([json.loads(line) for line in lines], tmp_path / "local"))
    calm = rows_of(manifest, "local")

    driver = start(manifest, "ray", *RAY)
    wait_for_blocks(manifest, "ray", driver)
    with Ledger.open(tmp_path / "ray" / ledger.NAME) as base:
        assert base.holders() == {ledger.this_process(driver.pid)}  # the driver alone writes
    deadline = time.monotonic() + 120
    while len(actors := workers_of(driver.pid)) < 2:  # one may begin later than the other
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    for actor in actors:
        os.kill(actor, signal.SIGKILL)
    deadline = time.monotonic() + 120
    while rows_of(manifest, "ray")[0].attempt < 2:  # on another actor now
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    driver.kill()
    driver.wait()

    assert start(manifest, "ray", *RAY).wait(timeout=300) == 0
    rows = rows_of(manifest, "ray")
    assert [row.status for row in rows] == ["done"] * 4
    assert hashes(rows) == hashes(calm)
    assert rows[0].result["figures"]["replayed"] >= 1
    with Ledger.open(tmp_path / "ray" / ledger.NAME) as base:
        finished = [event["job"] for event in base.events() if event["event"] == "done"]
    assert len(finished) == len(set(finished)) == 4
