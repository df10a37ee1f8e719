"""Batches as they run: each job exactly once, the same pixels whatever happens in between."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_generate import PROMPT, num_frames, write_tiny

from packforcing_cli import batch, batch_plan, durable, generate_many, jobs, ledger, manifest, rollout, worker
from packforcing_cli.batch import Folder, LedgerBoard
from packforcing_cli.errors import DiskFullError, LockedError
from packforcing_cli.ledger import Ledger, Row
from packforcing_cli.runfolder import RunFolder
from packforcing_cli.tasks import Options
from packforcing_cli.video import VideoWriter, remux
from packforcing_cli.worker import Worker

pytestmark = pytest.mark.skipif(os.name == "nt", reason="kills")
HASHES = ("latents_sha256", "packets_sha256")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("batch") / "tiny")


def some_jobs(package: Path, count: int = 4, **more: Any) -> list[dict[str, Any]]:
    """Jobs of three blocks."""
    common = {"model": str(package), "seconds": 3, **more}
    return [{"prompt": f"{PROMPT} {n}", "seed": n, **common} for n in range(count)]


def open_folder(place: Path, wanted: list[dict[str, Any]]) -> Folder:
    entries, _ = batch_plan.plan_jobs(manifest.of_values(wanted), root=place)
    folder = Folder.open(place)
    folder.add(entries, source="test")
    return folder


def run_worker(folder: Folder, stop: Callable[[], str] = lambda: "", **options: Any) -> None:
    for _ in Worker(LedgerBoard(folder), Options(**options), stop=stop).run():
        pass


def rows_of(place: Path) -> list[Row]:
    with Ledger.open(place / ledger.NAME) as base:
        return base.rows()


def hashes(place: Path) -> dict[int, tuple[str, ...]]:
    """seed -> hashes of what was made."""
    return {row.result["seed"]: tuple(row.result[name] for name in HASHES) for row in rows_of(place)}


@pytest.fixture(scope="module")
def calm(package: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, tuple[str, ...]]]:
    """Four jobs made without any trouble."""
    place = tmp_path_factory.mktemp("calm") / "videos"
    made = list(generate_many(some_jobs(package), place))
    assert [(one.number, one.error) for one in made] == [(n, "") for n in range(4)]
    return place, hashes(place)


def test_every_job_is_a_file_that_plays(calm: Any) -> None:
    place, found = calm
    rows = rows_of(place)
    assert [row.status for row in rows] == ["done"] * 4
    assert len(set(found.values())) == 4
    for row in rows:
        assert num_frames(place / row.output) == row.result["frames"] == 45
        assert row.result["sha256"] == batch.file_sha256(place / row.output)
        assert row.result["attempt"] == 1


def test_a_single_generate_makes_the_same_pixels(calm: Any, package: Path, run_command: Any) -> None:
    done = run_command(
        "generate",
        f"{PROMPT} 2",
        "--model",
        package,
        "--seconds",
        "3",
        "--seed",
        "2",
        "-o",
        "single.mp4",
        "-q",
    )
    assert done.code == 0
    assert worker.packets_sha256(Path("single.mp4")) == (calm[1][2][1], 45)


def test_order_does_not_change_pixels(calm: Any, package: Path, tmp_path: Path) -> None:
    other = {"prompt": "x", "seconds": 1, "size": "64x80", "model": str(package), "seed": 9}
    list(generate_many([other, *reversed(some_jobs(package))], tmp_path / "v"))
    assert {seed: found for seed, found in hashes(tmp_path / "v").items() if seed != 9} == calm[1]


def test_an_interruption_does_not_change_pixels_and_nothing_is_made_twice(
    calm: Any, package: Path, tmp_path: Path
) -> None:
    with open_folder(tmp_path / "v", some_jobs(package)).ledger as base:
        folder = Folder(tmp_path / "v", base)
        blocks = 0

        def stop() -> str:
            return "stop" if blocks >= 5 else ""

        board = LedgerBoard(folder)
        told = board.progress

        def progress(task: Any, number: int, total: int) -> str:
            nonlocal blocks
            blocks += 1
            return told(task, number, total) or stop()

        board.progress = progress  # type: ignore[method-assign]
        for _ in Worker(board, Options(), stop=stop).run():
            pass
        counts = base.counts()
        assert counts["queued"] >= 1 and counts["started"] == 0
        (half,) = (row for row in base.rows("queued") if row.attempt)
        assert half.blocks in (1, 2)
        assert not (folder.path / half.output).exists()
        run_worker(folder)
        assert base.counts()["done"] == 4
        assert base.row(half.id).result["figures"]["replayed"] == half.blocks
        finished = [event["job"] for event in base.events() if event["event"] == "done"]
        assert len(finished) == len(set(finished)) == 4
    assert hashes(tmp_path / "v") == calm[1]


def test_the_same_again_makes_nothing_and_finds_what_is_gone_or_changed(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, wanted = tmp_path / "v", some_jobs(package, 3, seconds=1)
    before = [one.path for one in generate_many(wanted, place)]
    known = hashes(place)
    with monkeypatch.context() as patch:
        patch.setattr(worker, "Worker", None)  # would be an error if it were used
        patch.setattr(batch.LedgerBoard, "claim", lambda *_: pytest.fail("there is nothing to do"))
        folder = Folder.open(place)
        with folder.ledger:
            assert folder.check_done() == []
    assert before[0] is not None and before[1] is not None
    before[0].unlink()
    before[1].write_bytes(before[1].read_bytes()[:-100])
    folder = Folder.open(place)
    with folder.ledger as base:
        assert folder.check_done() == [f"{before[0].name} is gone: it is made again"]
        rows = base.rows()
        assert [row.status for row in rows] == ["queued", "failed", "done"]
        assert "is not what was made" in rows[1].error["message"]
        run_worker(folder)
        assert [row.status for row in base.rows()] == ["done", "failed", "done"]
        base.retry()
        run_worker(folder)
        assert [row.status for row in base.rows()] == ["done", "done", "done"]
    assert hashes(place) == known
    assert [path.name for path in place.glob("*.changed.mp4")] == [f"{before[1].stem}.changed.mp4"]


def test_a_kill_between_the_file_and_the_ledger_makes_nothing_again(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_folder(tmp_path / "v", some_jobs(package, 1, seconds=1))
    with folder.ledger as base:
        with monkeypatch.context() as patch:
            patch.setattr(LedgerBoard, "done", lambda *_: None)
            run_worker(folder)
        (row,) = base.rows("started")
        base.release(row.id, row.holder)  # as a takeover does
        with monkeypatch.context() as patch:
            patch.setattr(jobs, "make", lambda *_, **__: pytest.fail("it is made already"))
            run_worker(folder)
        assert base.counts()["done"] == 1


def test_bad_jobs_fail_alone(package: Path, tmp_path: Path) -> None:
    wanted = [
        {"prompt": "a", "image": str(tmp_path / "none.png"), "model": str(package)},
        {"prompt": "b", "size": "65x65", "model": str(package)},
        {"prompt": "c", "seconds": 1, "seed": 1, "model": str(package)},
        {"prompt": "d", "seconds": 1, "model": str(package), "output": "there.mp4"},
        {"source": str(tmp_path / "none.mp4"), "seconds": 1},
    ]
    (tmp_path / "v").mkdir()
    (tmp_path / "v/there.mp4").write_bytes(b"mine")
    made = {one.number: one for one in generate_many(wanted, tmp_path / "v")}
    assert made[2].error == "" and made[2].path is not None
    said = [made[n].error for n in (0, 1, 3, 4)]
    assert "there is no file" in said[0]
    assert "does not fit" in said[1]
    assert "exists" in said[2]
    assert "there is no file" in said[3]
    assert (tmp_path / "v/there.mp4").read_bytes() == b"mine"


def test_a_link_that_appears_later_fails_its_job(package: Path, tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "v", some_jobs(package, 1, output="sub/x.mp4"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "v/sub").symlink_to(tmp_path / "elsewhere")
    with folder.ledger as base:
        run_worker(folder)
        assert "leads out of" in base.rows()[0].error["message"]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_video_that_is_not_finite_fails_alone(package: Path, tmp_path: Path) -> None:
    bad = write_tiny(tmp_path / "bad", nan=True)
    wanted = [{"prompt": "a", "model": str(bad)}, {"prompt": "b", "seconds": 1, "model": str(package)}]
    made = sorted(generate_many(wanted, tmp_path / "v"), key=lambda one: one.number)
    assert "NaN" in made[0].error and made[1].error == ""


def time_out(folder: Folder) -> None:
    """Let a job end at its timeout, after its first block, however fast or slow it is."""
    works: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        watch, progress = Worker._watch, LedgerBoard.progress

        def watching(self: Worker, work: Any, making: Any) -> None:
            works.append(work)
            watch(self, work, making)

        def noting(self: LedgerBoard, task: Any, blocks: int, total: int) -> str:
            deadline = time.monotonic() + 120
            while not (works and works[-1].why):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            return progress(self, task, blocks, total)

        patch.setattr(Worker, "_watch", watching)
        patch.setattr(LedgerBoard, "progress", noting)
        run_worker(folder, timeout=1e-6)


def test_a_job_that_takes_too_long_keeps_its_blocks(calm: Any, package: Path, tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "v", some_jobs(package, 1))
    with folder.ledger as base:
        time_out(folder)
        (row,) = base.rows()
        assert (row.status, row.error["kind"]) == ("failed", "TimeoutError")
        base.retry()
        run_worker(folder)
        assert base.rows()[0].result["figures"]["replayed"] >= 1
    assert hashes(tmp_path / "v")[0] == calm[1][0]


def test_a_job_that_hangs_has_its_process_ended(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, codes = threading.Event(), list[int]()

    def exits(code: int) -> None:
        codes.append(code)
        ended.set()

    monkeypatch.setattr(worker, "HANG_SECONDS", 0.0)
    monkeypatch.setattr(os, "_exit", exits)

    def hang(*_: Any, **__: Any) -> None:
        assert ended.wait(60)
        raise ValueError("too late")

    monkeypatch.setattr(jobs, "make", hang)
    folder = open_folder(tmp_path / "v", some_jobs(package, 1))
    with folder.ledger as base:
        run_worker(folder, timeout=0.01, may_exit=True)
        assert codes[0] == worker.HUNG_EXIT
        assert base.rows()[0].error["kind"] == "TimeoutError"


def test_jobs_that_others_queued_are_not_waited_for(package: Path, tmp_path: Path) -> None:
    with open_folder(tmp_path / "v", some_jobs(package, 1, seconds=2)).ledger as base:
        (made,) = generate_many(some_jobs(package, 1, seconds=1), tmp_path / "v")
        assert made.error == ""
        assert [row.status for row in base.rows()] == ["queued", "done"]


@pytest.mark.parametrize("where", ["load", "done"])
def test_what_ends_a_worker_early_gives_its_jobs_back(
    where: str, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = KeyboardInterrupt() if where == "load" else LockedError("the ledger is locked")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        if where == "load":
            patch.setattr(jobs, "encode", fail)
        else:
            patch.setattr(LedgerBoard, "done", fail)
        with pytest.raises(type(error)):
            list(generate_many(some_jobs(package, 2, seconds=1), tmp_path / "v"))
    assert {row.status for row in rows_of(tmp_path / "v")} == {"queued"}
    made = list(generate_many(some_jobs(package, 2, seconds=1), tmp_path / "v"))
    assert [one.error for one in made] == ["", ""]


def test_a_job_of_a_machine_that_is_gone_is_gone_on_with(package: Path, tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "v", some_jobs(package, 1))
    with folder.ledger as base:
        time_out(folder)
        base.retry()
        assert base.claim("elsewhere 1 2 3") is not None
        (run,) = (tmp_path / "v/.packforcing/runs").iterdir()
        (run / "lock").write_text(json.dumps({"pid": 1, "host": "elsewhere"}), encoding="utf-8")
        assert base.retry(lost=True) == 1
        run_worker(folder)
        (row,) = base.rows()
        assert row.status == "done", row.error
        assert row.result["figures"]["replayed"] >= 1


def test_status_and_dry_run_leave_a_ledger_of_an_earlier_version_as_it_is(
    package: Path, run_command: Any, tmp_path: Path
) -> None:
    (tmp_path / "j.jsonl").write_text(json.dumps(some_jobs(package, 1)[0]), encoding="utf-8")
    folder = open_folder(tmp_path / "v", some_jobs(package, 1))
    folder.ledger.close()
    path = tmp_path / "v" / ledger.NAME
    with sqlite3.connect(path) as old:
        old.execute("DROP INDEX jobs_by_after")
        old.execute("ALTER TABLE jobs DROP COLUMN after")
        old.execute("UPDATE meta SET value = '1' WHERE name = 'schema'")
    old.close()
    before = path.read_bytes()
    done = run_command("batch", "status", "v")
    assert (done.code, done.out.strip()) == (0, "1 job: 0 done, 1 queued"), done.err
    done = run_command("batch", "j.jsonl", "--out", "v", "--dry-run")
    assert done.code == 0 and done.out.strip().endswith(".mp4"), done.err
    assert path.read_bytes() == before
    with Ledger.open(path) as base:
        assert base.cancel() == (1, 0) and base.meta("schema") == "2"


def test_a_bundle_that_is_damaged_is_the_problem_of_its_line(
    package: Path, run_command: Any, tmp_path: Path
) -> None:
    (tmp_path / "bad.tar").write_bytes(b"no bundle")
    lines = [{"prompt": "a", "model": "bad.tar"}, *some_jobs(package, 1, seconds=1)]
    (tmp_path / "j.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    done = run_command("batch", "j.jsonl", "--out", "v", "--json", "-q")
    assert done.code == 3, done.err
    values = json.loads(done.out)
    assert (values["counts"]["done"], values["counts"]["failed"]) == (1, 1)
    assert "bad.tar" in values["failures"][0]["error"]["message"]
    (tmp_path / "j.jsonl").write_text(json.dumps(lines[1]), encoding="utf-8")
    assert run_command("batch", "j.jsonl", "--out", "v", "-q").code == 0


def fail_once(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> list[int]:
    """Let the first video that is made end with an error. Returns: the number of calls so far, in a list."""
    make, calls = jobs.make, [0]

    def made(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 1:
            raise error
        return make(*arguments, **options)

    monkeypatch.setattr(jobs, "make", made)
    return calls


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OSError(errno.EIO, "Input/output error"), RuntimeError("CUDA error: an illegal access")],
)
def test_what_may_pass_is_tried_again(
    error: BaseException, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_BACKOFF_SECONDS", 0.0)
    calls = fail_once(monkeypatch, error)
    (made,) = generate_many(some_jobs(package, 1, seconds=1), tmp_path / "v")
    assert (made.error, calls[0]) == ("", 2)
    assert [event["event"] for event in events(tmp_path / "v")] == [
        "queued",
        "started",
        "retry",
        "started",
        "done",
    ]


def events(place: Path) -> list[dict[str, Any]]:
    with Ledger.open(place / ledger.NAME) as base:
        return base.events()


def test_a_run_folder_that_is_locked_is_waited_for(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a worker that a killed driver of a cluster left behind, though nothing else is to be tried again."""
    monkeypatch.setattr(worker, "_LOCKED_SECONDS", 0.1)
    monkeypatch.setattr(worker, "_BACKOFF_SECONDS", 0.0)
    folder = open_folder(tmp_path / "v", some_jobs(package, 1))
    with folder.ledger as base:
        time_out(folder)
        (run,) = (tmp_path / "v/.packforcing/runs").iterdir()
        held = RunFolder.open(run)
        base.retry()
        told = LedgerBoard.fail

        def fail(board: LedgerBoard, task: Any, error: BaseException, **more: Any) -> None:
            told(board, task, error, **more)
            if task.retries == 3:
                held.close()

        monkeypatch.setattr(LedgerBoard, "fail", fail)
        run_worker(folder, retries=0)
        (row,) = base.rows()
        assert (row.status, row.retries) == ("done", 4)


def test_what_does_not_pass_is_not_tried_again(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fail_once(monkeypatch, ValueError("a mistake"))
    (made,) = generate_many(some_jobs(package, 1, seconds=1), tmp_path / "v")
    assert (made.error, calls[0]) == ("a mistake", 1)
    (made,) = generate_many(some_jobs(package, 1, seconds=1), tmp_path / "v")
    assert made.error == ""


def test_memory_that_ran_out_takes_the_next_smaller_plan(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_BACKOFF_SECONDS", 0.0)
    fail_once(monkeypatch, MemoryError())
    wanted = [{"prompt": "a", "seconds": 4, "policy": "full", "model": str(package), "seed": 1}]
    (made,) = generate_many(wanted, tmp_path / "v", auto_fit=True)
    assert made.error == ""
    assert made.result["fit"], "a change was made"
    assert rows_of(tmp_path / "v")[0].retries == 1


def test_a_job_with_other_weights_than_the_last_one_has_them_loaded(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Auto-fit may quantize one job; the next one is made as it would be alone."""
    monkeypatch.setattr(worker, "_BACKOFF_SECONDS", 0.0)
    monkeypatch.setattr(worker, "_smaller", lambda *_: {"quantize_text": "int8"})
    opened: list[str] = []
    open_source = jobs.open_source
    monkeypatch.setattr(
        jobs, "open_source", lambda job: opened.append(job.request.quantize_text) or open_source(job)
    )
    fail_once(monkeypatch, MemoryError())
    made = list(generate_many(some_jobs(package, 2, seconds=1), tmp_path / "v", auto_fit=True))
    assert [one.error for one in made] == ["", ""]
    assert opened == ["none", "int8", "none"] or opened == ["none", "int8"]
    assert {one.number: one.result["fit"] for one in made} == {0: {"quantize_text": "int8"}, 1: {}}


def test_a_full_disk_ends_the_batch_and_the_same_command_goes_on(
    calm: Any, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, count = durable.write, 0

    def full(path: Path, data: bytes) -> None:
        nonlocal count
        count += "latents" in str(path)
        if count >= 5:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "write", full)
        with pytest.raises(DiskFullError):
            list(generate_many(some_jobs(package), tmp_path / "v"))
    rows = rows_of(tmp_path / "v")
    assert [row.status for row in rows].count("done") == 1
    assert {row.status for row in rows} == {"done", "queued"}
    assert len(list(generate_many(some_jobs(package), tmp_path / "v"))) == 4
    assert hashes(tmp_path / "v") == calm[1]


def test_the_model_is_loaded_once_for_all_jobs_that_share_it(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_tiny(tmp_path / "other", student=True)
    opened: list[Any] = []
    open_source = jobs.open_source
    monkeypatch.setattr(jobs, "open_source", lambda job: opened.append(job.place) or open_source(job))
    first, second = (some_jobs(place, 2, seconds=1) for place in (package, other))
    mixed = [first[0], second[0], first[1], second[1]]
    made = [one.number for one in generate_many(mixed, tmp_path / "v")]
    assert opened == [str(package), str(other)]
    assert made == [0, 2, 1, 3]


def test_the_next_prompt_is_encoded_and_the_last_file_finished_beside_the_denoising(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them waits for the other: without the overlap neither would happen."""
    encoded, denoised = threading.Event(), threading.Event()
    calls = 0
    encode, finish, generate = jobs.encode, VideoWriter._finish_file, rollout.stream_generate
    waited: list[bool] = []

    def encoding(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            encoded.set()
        return encode(*arguments)

    def making(*arguments: Any, **options: Any) -> Iterator[Any]:
        for block in generate(*arguments, **options):
            if options["seed"] == 0 and block.index == 0:
                waited.append(encoded.wait(30))
            if options["seed"] == 1:
                denoised.set()
            yield block

    def finishing(self: VideoWriter) -> None:
        if "-0.mp4" in self.path.name:
            waited.append(denoised.wait(30))
        finish(self)

    monkeypatch.setattr(jobs, "encode", encoding)
    monkeypatch.setattr(rollout, "stream_generate", making)
    monkeypatch.setattr(VideoWriter, "_finish_file", finishing)
    made = list(generate_many(some_jobs(package, 2), tmp_path / "v"))
    assert [one.error for one in made] == ["", ""]
    assert waited == [True, True]
    figures = made[1].result["figures"]
    assert figures["text_ahead_seconds"] > 0 and "text_wait_seconds" in figures
    assert 0 < figures["first_frame_seconds"] <= figures["total_seconds"]
    assert 0 < figures["block_seconds_p50"] <= figures["block_seconds_p95"]
    assert figures["stall_seconds"] >= 0


def test_a_run_folder_that_is_not_wanted_is_gone_afterwards(package: Path, tmp_path: Path) -> None:
    list(generate_many(some_jobs(package, 1, seconds=1, keep_run=False), tmp_path / "v"))
    assert list((tmp_path / "v/.packforcing/runs").iterdir()) == []


def test_a_damaged_run_folder_is_begun_again(calm: Any, package: Path, tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "v", some_jobs(package, 1))
    with folder.ledger as base:
        time_out(folder)
        (run,) = (tmp_path / "v/.packforcing/runs").iterdir()
        (run / "run.json").write_text("{", encoding="utf-8")
        base.retry()
        run_worker(folder)
        assert base.counts()["done"] == 1
    assert hashes(tmp_path / "v")[0] == calm[1][0]


def test_jobs_make_videos_longer(package: Path, tmp_path: Path) -> None:
    (first,) = generate_many(some_jobs(package, 1), tmp_path / "first")
    source, foreign = first.path, tmp_path / "foreign.mkv"
    assert source is not None
    remux(source, foreign, metadata={})
    wanted = [
        {"source": str(source), "seconds": 1},
        {"source": str(source), "seconds": 2, "from": "0:01", "prompt": "a blue square", "seed": 5},
        {"source": str(foreign), "seconds": 1, "model": str(package), "prompt": "a red circle", "seed": 1},
        {"source": str(foreign), "seconds": 1, "model": str(package), "from": "0:01"},
    ]
    made = sorted(generate_many(wanted, tmp_path / "v"), key=lambda one: one.number)
    assert "from is for videos whose run is here" in made.pop().error
    assert [one.error for one in made] == ["", "", ""]
    assert [one.result["frames"] for one in made] == [61, 45, 61]
    for one in made:
        assert one.path is not None
        assert num_frames(one.path) == one.result["frames"]
    again = list(generate_many(wanted[:3], tmp_path / "w"))
    assert {one.number: one.result["packets_sha256"] for one in again} == {
        one.number: one.result["packets_sha256"] for one in made
    }


def test_a_job_goes_on_with_the_video_of_an_earlier_one(package: Path, tmp_path: Path) -> None:
    (first,) = some_jobs(package, 1)
    more = {"seconds": 1, "prompt": "a blue square"}
    chain = [
        {"source": "two.mp4", "seconds": 1, "at": "0:03.9 a red circle"},
        {"source": "one.mp4", "output": "two.mp4", **more},
        {**first, "output": "one.mp4"},
    ]
    made = {one.number: one for one in generate_many(list(reversed(chain)), tmp_path / "v")}
    assert [made[number].error for number in range(3)] == [""] * 3
    assert [made[number].result["frames"] for number in range(3)] == [45, 61, 77]
    for one in made.values():
        assert one.path is not None and num_frames(one.path) == one.result["frames"]
    (again,) = generate_many([{"source": str(tmp_path / "v/one.mp4"), **more}], tmp_path / "w")
    for name in HASHES:
        assert again.result[name] == made[1].result[name]
    with Ledger.open(tmp_path / "v" / ledger.NAME) as base:
        finished = [event["job"] for event in base.events() if event["event"] == "done"]
        assert finished == [row.id for row in base.rows()]


def test_a_chain_is_cut_off_where_it_breaks(package: Path, tmp_path: Path) -> None:
    (first,) = some_jobs(package, 1, seconds=1)
    wanted = [
        {**first, "size": "65x65", "output": "one.mp4"},
        {"source": "one.mp4", "seconds": 1, "output": "two.mp4"},
        {"source": "two.mp4", "seconds": 1},
        first,
    ]
    made = {one.number: one for one in generate_many(wanted, tmp_path / "v")}
    assert "does not fit" in made[0].error and made[3].error == ""
    assert made[1].error.startswith("job 1 (one.mp4), whose video it goes on with, failed: ")
    why = made[1].error.removeprefix("job 1 (one.mp4), whose video it goes on with, ")
    after = "job 2 (two.mp4), whose video it goes on with, comes after job 1 (one.mp4), which"
    assert made[2].error == f"{after} {why}"


def test_a_video_whose_run_folder_is_gone_is_not_gone_on_with(package: Path, tmp_path: Path) -> None:
    (first,) = some_jobs(package, 1, seconds=1, output="one.mp4")
    list(generate_many([first], tmp_path / "v"))
    shutil.rmtree(tmp_path / "v/.packforcing/runs")
    made = {
        one.number: one for one in generate_many([first, {"source": "one.mp4", "seconds": 1}], tmp_path / "v")
    }
    assert made[0].error == "" and "the run folder of the video it goes on with" in made[1].error


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def four(package: Path, tmp_path: Path) -> Path:
    path = tmp_path / "jobs.jsonl"
    path.write_text("\n".join(json.dumps(job) for job in some_jobs(package)), encoding="utf-8")
    return path


SUMMARY = {
    "schema",
    "folder",
    "counts",
    "frames",
    "video_seconds",
    "stopped",
    "exit_code",
    "failures",
    "videos",
}


def test_the_command_shares_work_and_tells_how_it_went(
    calm: Any, four: Path, run_command: Any, tmp_path: Path
) -> None:
    done = run_command("batch", four, "--out", "v", "--workers", "2", "--json", "--progress", "json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert set(said) == SUMMARY
    assert said["counts"] == {"queued": 0, "started": 0, "done": 4, "failed": 0, "cancelled": 0}
    assert said["frames"] == 180 and len(said["videos"]) == 4
    told = [json.loads(line) for line in done.err.splitlines()]
    assert told[0]["event"] == "start"
    assert sum(event["event"] == "job" for event in told) == 4
    assert told[-1] == {"event": "end", "counts": said["counts"], "exit_code": 0, "stopped": ""}
    assert hashes(tmp_path / "v") == calm[1]
    again = run_command("batch", four, "--out", "v")
    assert again.code == 0 and len(again.out.splitlines()) == 4
    with Ledger.open(tmp_path / "v" / ledger.NAME) as base:
        assert sum(event["event"] == "started" for event in base.events()) == 4


def test_what_failed_waits_to_be_asked_for(package: Path, run_command: Any, tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    lines = [{"prompt": "a", "image": str(image), "model": str(package), "seconds": 1, "seed": 1}]
    Path("jobs.jsonl").write_text(json.dumps(lines[0]), encoding="utf-8")
    failed = run_command("batch", "jobs.jsonl", "--progress", "plain")
    assert failed.code == 3
    assert "there is no file" in failed.err and "--retry-failed" in failed.err
    assert run_command("batch", "jobs.jsonl").code == 3
    status = run_command("batch", "status", "jobs-videos", "--json")
    values = json.loads(status.out)
    assert values["jobs"][0]["error"]["kind"] == "UsageError"
    assert "1 job: 0 done, 1 failed" in run_command("batch", "status", "jobs-videos").out
    cancelled = run_command("batch", "cancel", "jobs-videos")
    assert "0 jobs cancelled" in cancelled.err
    assert "1 job queued again" in run_command("batch", "retry", "jobs-videos", "--job", "1").err
    assert "1 job cancelled" in run_command("batch", "cancel", "jobs-videos").err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("none.jsonl",), "cannot be read"),
        (("bad.jsonl", "--out", "v"), "bad.jsonl, line 1, column 2: unknown key 'promt'"),
        (("-",), "needs --out"),
        (("good.txt", "--set", "nothing=1"), "--set nothing=1"),
        (("good.txt", "--set", "crf=99"), "crf 99"),
        (("good.txt", "--shard", "3/2"), "must be I/N"),
        (("good.txt", "--engine", "rey"), "did you mean ray?"),
        (("good.txt", "--address", "auto"), "--address is for --engine ray"),
        (
            ("good.txt", "--engine", "ray", "--address", "nowhere"),
            "must be auto, HOST:PORT or ray://HOST:PORT",
        ),
        (("good.txt", "--out", "{slog}"), "the nearest is {slug}"),
        (("good.txt", "--format", "xml"), "must be one of"),
        (("good.txt", "--progress", "loud"), "--progress loud"),
        (("good.txt", "--out", "good.txt"), "is a file"),
        (("good.txt", "--out", "clip.mp4"), "template, --out 'clip-{index}.mp4'"),
        (("good.txt", "--out", "v/{slug}.avi"), "must end in .mp4, .mkv or .mov"),
        (("status", "nowhere"), "is no folder of a batch"),
        (("retry", "nowhere"), "is no folder of a batch"),
    ],
)
def test_usage_errors_start_nothing(
    arguments: tuple[str, ...], said: str, run_command: Any, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"promt": "x"}', encoding="utf-8")
    (tmp_path / "good.txt").write_text("a red circle\n", encoding="utf-8")
    done = run_command("batch", *arguments)
    assert done.code == 2
    assert said in done.err.replace("\n", " "), done.err
    assert "Traceback" not in done.err
    assert {path.name for path in tmp_path.iterdir()} == {"bad.jsonl", "good.txt"}


def test_a_dry_run_lists_files_and_makes_nothing(four: Path, run_command: Any, tmp_path: Path) -> None:
    done = run_command("batch", four, "--out", "v/{seed}.mp4", "--dry-run")
    assert (done.code, done.out) == (0, "0.mp4\n1.mp4\n2.mp4\n3.mp4\n")
    assert not (tmp_path / "v").exists()


def test_settings_and_flags_are_defaults_of_lines(
    run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_text("a red circle\n", encoding="utf-8")
    plan = ("batch", "p.txt", "--dry-run", "--json", "--model", "demo")
    ids = {run_command(*plan).out}
    for more in (
        ("--seed", "1"),
        ("--seconds", "3"),
        ("--size", "64x64"),
        ("--set", "top-k=2"),
        ("--set", 'at=["0:05 x"]'),
    ):
        ids.add(run_command(*plan, *more).out)
    (tmp_path / "packforcing.toml").write_text("crf = 30\n", encoding="utf-8")
    ids.add(run_command(*plan).out)
    monkeypatch.setenv("PACKFORCING_SEED", "2")
    ids.add(run_command(*plan).out)
    found = [json.loads(text)["jobs"][0] for text in ids]
    assert len({job["id"] for job in found}) == 8
    assert all(job["problem"] is None for job in found)


def test_planning_a_batch_loads_no_torch(four: Path) -> None:
    program = (
        "import sys; from packforcing_cli.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    words = ["batch", str(four), "--dry-run", "--out", "v"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_the_problem_of_its_line(run_command: Any, tmp_path: Path) -> None:
    lines = [{"prompt": "a", "device": "cuda"}, {"prompt": "b"}]
    (tmp_path / "j.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    done = run_command("batch", "j.jsonl", "--dry-run", "--json")
    assert done.code == 0, done.err
    first, second = json.loads(done.out)["jobs"]
    assert "sees no CUDA GPU" in first["problem"] and second["problem"] is None
    (tmp_path / "j.jsonl").write_text(json.dumps(lines[0]), encoding="utf-8")
    assert run_command("batch", "j.jsonl", "--dry-run").code == 4


def test_the_schema_is_json(run_command: Any) -> None:
    assert json.loads(run_command("batch", "schema").out)["oneOf"]


def test_after_too_many_failures_no_job_is_begun(run_command: Any, tmp_path: Path, package: Path) -> None:
    wanted: list[Mapping[str, Any]] = [
        {"prompt": "x", "size": "65x65", "model": str(package)},
        *some_jobs(package, 30, seconds=6),
    ]
    (tmp_path / "j.jsonl").write_text("\n".join(map(json.dumps, wanted)), encoding="utf-8")
    done = run_command("batch", "j.jsonl", "--max-failures", "1", "--json", "-q")
    assert done.code == 3
    values = json.loads(done.out)
    assert values["stopped"] == "too many failures"
    assert values["counts"]["failed"] == 1
    assert values["counts"]["queued"] >= 1 and values["counts"]["started"] == 0


@pytest.mark.parametrize("who", ["driver", "worker"])
def test_a_killed_process_changes_nothing(who: str, calm: Any, package: Path, tmp_path: Path) -> None:
    lines = some_jobs(package)
    lines[0] |= {"seconds": 30}  # is at work when the kill comes
    (tmp_path / "j.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    words = [sys.executable, "-m", "packforcing_cli", "batch", "j.jsonl", "--out", "v", "-q"]
    driver = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL)
    path = tmp_path / "v" / ledger.NAME
    holder = wait_for_block(path)
    if who == "driver":
        driver.kill()
        driver.wait()
        deadline = time.monotonic() + 60
        while ledger.is_alive(holder):  # ends after its block
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert subprocess.run(words, cwd=tmp_path, stdout=subprocess.DEVNULL, timeout=300).returncode == 0
    else:
        os.kill(int(holder.split()[2]), signal.SIGKILL)
        assert driver.wait(timeout=300) == 0
    rows = rows_of(tmp_path / "v")
    assert [row.status for row in rows] == ["done"] * 4
    assert rows[0].attempt == 2
    assert rows[0].result["figures"]["replayed"] >= 1
    found = hashes(tmp_path / "v")
    assert {n: found[n] for n in (1, 2, 3)} == {n: calm[1][n] for n in (1, 2, 3)}


def wait_for_block(path: Path) -> str:
    """Who holds the first job when it has a block."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if path.exists():
            with Ledger.open(path) as base:
                found = [row for row in base.rows("started") if row.blocks]
                if found:
                    return found[0].holder
        time.sleep(0.02)
    raise AssertionError("no block was made")


def test_shards_make_all_of_it(calm: Any, four: Path, run_command: Any, tmp_path: Path) -> None:
    for part in ("1/2", "2/2"):
        assert run_command("batch", four, "--out", "v", "--shard", part, "-q").code == 0
    found: dict[int, tuple[str, ...]] = {}
    for path in ledger.ledgers(tmp_path / "v"):
        with Ledger.open(path) as base:
            found |= {row.result["seed"]: tuple(row.result[name] for name in HASHES) for row in base.rows()}
    assert found == calm[1]
    assert "4 jobs: 4 done" in run_command("batch", "status", "v").out
