"""The ledger: what became of each job, with many processes at it and any of them dying."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from packforcing_cli import ledger
from packforcing_cli.errors import DiskFullError, GenerationError, RunFolderError, UsageError
from packforcing_cli.ledger import MAX_DEATHS, Entry, Ledger, is_alive, this_process

ME = this_process()


def entry(number: int, **changes: Any) -> Entry:
    values: dict[str, Any] = {
        "id": f"id-{number}",
        "key": f"key-{number}",
        "position": number,
        "line": number,
        "shown": f"job {number}",
        "output": f"{number}.mp4",
        "spec": {"kind": "generate", "request": {"prompt": "ü"}},
        "load_key": "model",
        "layout_key": "layout",
        "weight": 1.0,
    }
    return Entry(**(values | changes))


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.create(tmp_path / ledger.NAME, meta={}) as opened:
        yield opened


def dead_process() -> str:
    """A process of this machine that ended."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    holder = this_process(process.pid)
    assert is_alive(holder)
    assert process.stdin is not None
    process.stdin.close()
    process.wait()
    return holder


RESULT = {"blocks": 2, "sha256": "x"}


def test_a_job_goes_from_queued_to_done(base: Ledger) -> None:
    added = base.add([entry(1), entry(2)])
    assert (added.new, added.known, added.elsewhere) == (["id-1", "id-2"], [], 0)
    row = base.claim(ME)
    assert row is not None
    assert (row.id, row.status, row.attempt, row.holder) == ("id-1", "started", 1, ME)
    assert row.spec["request"] == {"prompt": "ü"}
    assert base.progress("id-1", ME, 1, 2) == ""
    assert base.work() == (0.5, 2.0)
    assert base.done("id-1", ME, RESULT)
    assert base.row("id-1").result == RESULT
    assert base.counts() == {"queued": 1, "started": 0, "done": 1, "failed": 0, "cancelled": 0}
    assert [event["event"] for event in base.events("id-1")] == ["queued", "started", "done"]


def test_jobs_that_share_model_and_layout_follow_each_other(base: Ledger) -> None:
    keys = [("a", "x"), ("b", "x"), ("a", "y"), ("a", "x"), ("b", "y"), ("b", "x")]
    base.add([entry(n, load_key=load, layout_key=layout) for n, (load, layout) in enumerate(keys, 1)])
    order, last = [], ("", "")
    while (row := base.claim(ME, load_key=last[0], layout_key=last[1])) is not None:
        last = (row.load_key, row.layout_key)
        assert base.done(row.id, ME, RESULT)
        order.append(row.position)
    assert order == [1, 4, 3, 2, 6, 5]


def test_another_worker_begins_with_another_model(base: Ledger) -> None:
    base.add([entry(1, load_key="a"), entry(2, load_key="a"), entry(3, load_key="b")])
    first, second = base.claim(ME), base.claim(ME)
    assert first is not None and second is not None
    assert (first.load_key, second.load_key) == ("a", "b")


def test_looking_ahead_claims_nothing(base: Ledger) -> None:
    base.add([entry(n) for n in (1, 2, 3)])
    assert [row.position for row in base.upcoming(limit=2)] == [1, 2]
    assert [row.position for row in base.upcoming(limit=1, skip=1)] == [2]
    assert base.counts()["queued"] == 3


def test_a_dead_process_loses_its_job_to_the_next_one(base: Ledger) -> None:
    base.add([entry(1)])
    dead = dead_process()
    assert base.claim(dead) is not None
    base.progress("id-1", ME, 1, 3)
    row = base.claim(ME)
    assert row is not None
    assert (row.id, row.attempt, row.deaths) == ("id-1", 2, 1)
    assert [event["event"] for event in base.events()] == ["queued", "started", "died", "started"]
    assert base.progress("id-1", dead, 1, 3) == "lost"
    assert not base.done("id-1", dead, RESULT)
    assert not base.fail("id-1", dead, GenerationError("NaN"))
    assert not base.release("id-1", dead)
    assert base.done("id-1", ME, RESULT)


def test_a_living_process_keeps_its_job(base: Ledger) -> None:
    base.add([entry(1)])
    assert base.claim(ME) is not None
    assert base.take_over() == 0
    assert base.claim(ME) is None


def test_a_process_number_that_was_given_again_is_another_process() -> None:
    host, boot, pid, start = ME.split()
    assert is_alive(ME)
    assert not is_alive(f"{host} {boot} {pid} 1{start}")
    assert not is_alive(f"{host} 00000000 {pid} {start}")
    assert is_alive(f"elsewhere {boot} {pid} {start}")


def test_a_job_over_which_processes_die_is_given_up_unless_it_gets_on(base: Ledger) -> None:
    base.add([entry(1)])
    dead = dead_process()
    for n in range(MAX_DEATHS):
        row = base.claim(dead)
        assert row is not None
        if n == 0:
            base.progress("id-1", dead, 1, 9)
    assert base.claim(ME) is None
    failed = base.row("id-1")
    assert (failed.status, failed.error["kind"]) == ("failed", "RunFolderError")
    assert base.retry() == 1
    for blocks in range(2, 2 * MAX_DEATHS):
        assert base.claim(dead) is not None
        base.progress("id-1", dead, blocks, 99)
    assert base.claim(ME) is not None


def test_jobs_of_another_machine_wait_for_a_person(base: Ledger) -> None:
    base.add([entry(1)])
    assert base.claim("elsewhere 1 2 3") is not None
    assert base.claim(ME) is None
    assert base.retry() == 0
    assert base.retry(lost=True) == 1
    assert base.claim(ME) is not None


def test_failed_jobs_wait_until_they_are_asked_for(base: Ledger) -> None:
    base.add([entry(1), entry(2)])
    assert base.claim(ME) is not None
    assert base.fail("id-1", ME, GenerationError("block 3 came out as NaN", hint="Try --dtype fp32."))
    row = base.row("id-1")
    assert row.error == {
        "kind": "GenerationError",
        "message": "block 3 came out as NaN",
        "hint": "Try --dtype fp32.",
        "exit_code": 1,
    }
    second = base.claim(ME)
    assert second is not None and second.id == "id-2"
    assert base.claim(ME) is None
    assert base.retry() == 1
    again = base.claim(ME)
    assert again is not None and (again.id, again.attempt) == ("id-1", 2)


def test_a_retry_waits_for_its_time_and_keeps_what_is_to_change(base: Ledger) -> None:
    base.add([entry(1)])
    assert base.claim(ME) is not None
    assert base.fail("id-1", ME, MemoryError("out"), retry_in=3600, fit={"bank": 8})
    row = base.row("id-1")
    assert (row.status, row.retries, row.fit) == ("queued", 1, {"bank": 8})
    assert base.claim(ME) is None
    later = base.next_start()
    assert later is not None and 3500 < later - time.time() < 3700


def test_a_job_whose_machine_a_person_says_is_gone_is_an_orphan_until_it_gets_on(base: Ledger) -> None:
    base.add([entry(1), entry(2)])
    for _ in range(2):
        assert base.claim("elsewhere 1 2 3") is not None
    assert base.retry(lost=True) == 2
    assert base.is_orphan("id-1") and base.is_orphan("id-2")
    assert base.claim(ME) is not None and base.is_orphan("id-1")
    base.progress("id-1", ME, 1, 4)
    assert not base.is_orphan("id-1")
    assert base.claim(ME) is not None
    base.done("id-2", ME, RESULT)
    assert not base.is_orphan("id-2")


def test_what_is_to_be_cancelled_is_cancelled_however_it_comes_back(base: Ledger) -> None:
    base.add([entry(1), entry(2)])
    for _ in range(2):
        assert base.claim(ME) is not None
    assert base.cancel() == (0, 2)
    base.fail("id-1", ME, OSError("busy"), retry_in=0.0)
    base.release("id-2", ME, why="stop")
    assert [row.status for row in base.rows()] == ["cancelled"] * 2
    assert base.claim(ME) is None


def test_only_what_is_done_is_queued_once_more_or_spoiled(base: Ledger) -> None:
    base.add([entry(1)])
    assert base.claim(ME) is not None
    base.again("id-1", "its file is gone")
    base.spoiled("id-1", UsageError("it is another file"))
    (row,) = base.rows()
    assert (row.status, row.holder) == ("started", ME)
    assert base.claim(ME) is None
    base.done("id-1", ME, RESULT)
    base.again("id-1", "its file is gone")
    assert base.rows()[0].status == "queued"


@pytest.mark.parametrize("output", ["1.mp4", "./1.MP4", ".//1.mp4"])
def test_an_output_that_another_batch_took_meanwhile_is_refused(base: Ledger, output: str) -> None:
    base.add([entry(1)])
    with pytest.raises(UsageError, match="is that of another job"):
        base.add([entry(2), entry(3, output=output)])
    assert [row.id for row in base.rows()] == ["id-1"]


def test_what_could_not_be_planned_goes_when_nobody_asks_for_it(base: Ledger) -> None:
    base.add([entry(1, load_key="", problem=UsageError("cannot be planned")), entry(2)])
    added = base.add([entry(2), entry(3, output="1.mp4")])
    assert added.elsewhere == 0
    assert [row.id for row in base.rows()] == ["id-2", "id-3"]


def test_questions_about_some_jobs_leave_the_others_out(base: Ledger) -> None:
    base.add([entry(1), entry(2)])
    assert base.next_start(["id-1"]) is not None
    assert base.claim(ME, ids=["id-1"]) is not None
    assert base.next_start(["id-1"]) is None and base.next_start() is not None
    assert base.holders(["id-2"]) == set() and base.holders(["id-1"]) == base.holders() == {ME}
    assert base.upcoming(ids=["id-1"]) == []
    assert [row.id for row in base.upcoming(ids=["id-2"])] == ["id-2"]


def test_cancelling_ends_what_is_queued_and_asks_what_is_at_work(base: Ledger) -> None:
    base.add([entry(1), entry(2), entry(3)])
    assert base.claim(ME) is not None
    assert base.cancel(["id-1", "id-2"]) == (1, 1)
    assert base.progress("id-1", ME, 1, 4) == "cancelled"
    assert base.release("id-1", ME, cancelled=True)
    assert base.counts()["cancelled"] == 2
    assert base.retry() == 0
    assert base.retry(["id-1"]) == 1
    row = base.claim(ME)
    assert row is not None and not row.wants_cancel


def test_a_job_to_be_cancelled_whose_process_died_is_cancelled(base: Ledger) -> None:
    base.add([entry(1)])
    assert base.claim(dead_process()) is not None
    assert base.cancel() == (1, 0) or base.counts()["cancelled"] == 1


def test_nothing_begins_while_it_is_paused(base: Ledger) -> None:
    base.add([entry(1)])
    base.set_meta("paused", "disk full")
    assert base.claim(ME) is None
    base.set_meta("paused", None)
    assert base.claim(ME) is not None


def test_adding_again_keeps_what_there_is(base: Ledger) -> None:
    base.add([entry(1), entry(2)])
    assert base.claim(ME) is not None
    base.done("id-1", ME, RESULT)
    added = base.add([entry(1), entry(2), entry(3)])
    assert (added.new, added.known, added.elsewhere) == (["id-3"], ["id-1", "id-2"], 0)
    assert base.row("id-1").status == "done"
    looked = base.add([entry(4)], only_look=True)
    assert (looked.new, looked.elsewhere) == (["id-4"], 3)
    assert len(base.rows()) == 3


def test_changed_inputs_replace_what_is_not_done(base: Ledger) -> None:
    base.add([entry(1), entry(2, problem=UsageError("there is no file x.png"))])
    assert base.counts()["failed"] == 1
    assert base.claim(ME) is not None
    base.done("id-1", ME, RESULT)
    changed = [entry(1, id="new-1", key="key-1", output="1-2.mp4"), entry(2, id="new-2", key="key-2")]
    added = base.add(changed)
    assert (added.changed, added.elsewhere) == (["new-1", "new-2"], 0)
    assert {row.id: row.status for row in base.rows()} == {
        "id-1": "done",
        "new-1": "queued",
        "new-2": "queued",
    }


def test_a_full_disk_is_told_as_such(base: Ledger) -> None:
    base.add([entry(1)])
    pages = base._base.execute("PRAGMA page_count").fetchone()[0]
    base._base.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(DiskFullError, match="the disk is full"):
        base.add([entry(n) for n in range(2, 500)])
    base._base.execute("PRAGMA max_page_count = 1073741823")
    assert len(base.rows()) == 1
    assert len(base.add([entry(2)]).new) == 1


def test_what_is_no_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / ledger.NAME
    with pytest.raises(UsageError, match=r"has no ledger\.sqlite3"):
        Ledger.open(path)
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(RunFolderError, match="damaged"):
        Ledger.open(path)
    path.unlink()
    sqlite3.connect(path).close()
    with pytest.raises(UsageError, match="no ledger"):
        Ledger.open(path)
    path.unlink()
    with Ledger.create(path, meta={}) as made:
        made.set_meta("schema", "99")
    with pytest.raises(UsageError, match="has schema 99"):
        Ledger.open(path)


def test_each_job_is_claimed_once_by_many_processes(tmp_path: Path) -> None:
    path = tmp_path / ledger.NAME
    with Ledger.create(path, meta={}) as base:
        base.add([entry(n) for n in range(1, 61)])
    program = textwrap.dedent(
        f"""
        import sys
        from pathlib import Path
        from packforcing_cli.ledger import Ledger, this_process
        me = this_process()
        with Ledger.open(Path({str(path)!r})) as base:
            while (row := base.claim(me)) is not None:
                base.progress(row.id, me, 1, 2)
                assert base.done(row.id, me, {{"blocks": 2}})
        """
    )
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(4)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0, 0]
    with Ledger.open(path) as base:
        assert base.counts()["done"] == 60
        finished = [event["job"] for event in base.events() if event["event"] == "done"]
        assert sorted(finished) == sorted(f"id-{n}" for n in range(1, 61))


def test_a_ledger_is_whole_as_soon_as_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / ledger.NAME
    program = textwrap.dedent(
        f"""
        from pathlib import Path
        from packforcing_cli.ledger import Ledger
        with Ledger.create(Path({str(path)!r}), meta={{}}) as base:
            assert base.meta("schema") == "2"
        """
    )
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(6)]
    while any(process.poll() is None for process in processes):
        if path.exists():
            with Ledger.open(path) as base:
                assert base.counts()["done"] == 0
    assert [process.wait() for process in processes] == [0] * 6
    assert [name.name for name in tmp_path.glob(".ledger*.tmp*")] == []


def test_a_ledger_from_before_jobs_could_follow_each_other_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / ledger.NAME
    with Ledger.create(path, meta={}) as base:
        base.add([entry(1)])
    make_old(path)
    for _ in range(2):
        with Ledger.open(path) as base:
            base.add([entry(1), entry(2, after="id-1")])
            assert [row.after for row in base.rows()] == ["", "id-1"]
            assert base.meta("schema") == "2"


def make_old(path: Path) -> None:
    """Change a ledger to schema 1."""
    with sqlite3.connect(path) as old:
        old.execute("DROP INDEX jobs_by_after")
        old.execute("ALTER TABLE jobs DROP COLUMN after")
        old.execute("UPDATE meta SET value = '1' WHERE name = 'schema'")
    old.close()


def test_looking_at_a_ledger_from_before_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / ledger.NAME
    with Ledger.create(path, meta={}) as base:
        base.add([entry(1), entry(2)])
        assert base.claim(ME) is not None
    make_old(path)
    before = path.read_bytes()
    with Ledger.open(path) as one, Ledger.open(path) as other:
        for base in (one, other):
            assert [row.after for row in base.rows()] == ["", ""] and base.row("id-1").after == ""
            assert (base.ready(), base.counts()["queued"], base.holders()) == (1, 1, {ME})
            assert base.next_start() is not None and base.waiting_elsewhere() == []
            assert [row.id for row in base.upcoming(limit=5)] == ["id-2"]
            assert (base.take_over(), base.meta("schema")) == (0, "1")
        assert path.read_bytes() == before
        with pytest.raises(RuntimeError), one._write():
            raise RuntimeError
        assert one.meta("schema") == "1" and [row.after for row in one.rows()] == ["", ""]
        for base, number in ((one, 3), (other, 4)):  # the second one finds it changed
            base.add([entry(number, after="id-2")])
            assert base.meta("schema") == "2"
        assert (
            [row.after for row in other.rows()]
            == [row.after for row in one.rows()]
            == ["", "", "id-2", "id-2"]
        )


def chain(base: Ledger) -> None:
    """Three jobs, each with the video of the one before, and one alone."""
    base.add([entry(1), entry(2, after="id-1"), entry(3, after="id-2"), entry(4)])


def test_a_job_waits_for_the_one_whose_video_it_goes_on_with(base: Ledger) -> None:
    chain(base)
    assert base.ready() == 2
    order = []
    first, other = base.claim(ME), base.claim(ME)
    assert first is not None and other is not None and base.claim(ME) is None
    assert [row.position for row in base.upcoming(limit=9)] == []
    for row in (first, other):
        assert base.done(row.id, ME, RESULT)
    while (following := base.claim(ME)) is not None:
        assert base.claim(ME) is None
        assert base.done(following.id, ME, RESULT)
        order.append(following.position)
    assert ([first.position, other.position], order) == ([1, 4], [2, 3])


@pytest.mark.parametrize("how", ["fails", "is cancelled", "is ended", "dies", "was there"])
def test_with_a_job_those_fail_that_go_on_with_its_video(how: str, base: Ledger) -> None:
    if how == "was there":
        base.add([entry(1, problem=UsageError("no image"))])
    chain(base)
    if how in ("fails", "is ended", "dies"):
        assert base.claim(dead_process() if how == "dies" else ME) is not None
    if how == "fails":
        base.fail("id-1", ME, GenerationError("NaN"))
    elif how != "was there":
        base.cancel(["id-1"])
    if how == "is ended":
        base.release("id-1", ME)
    elif how == "dies":
        base.take_over()
    rows = base.rows()
    first = "failed" if how in ("fails", "was there") else "cancelled"
    assert [row.status for row in rows] == [first, "failed", "failed", "queued"]
    why = {"fails": "failed: NaN", "was there": "failed: no image"}.get(how, "was cancelled")
    assert rows[1].error["message"] == f"job 1 (1.mp4), whose video it goes on with, {why}"
    after = "job 2 (2.mp4), whose video it goes on with, comes after job 1 (1.mp4), which"
    assert rows[2].error["message"] == f"{after} {why}"
    assert base.retry(["id-1"]) == 3
    assert base.counts()["queued"] == 4


def test_a_job_is_not_tried_again_without_what_it_goes_on_with(base: Ledger) -> None:
    chain(base)
    assert base.claim(ME) is not None
    base.fail("id-1", ME, GenerationError("NaN"))
    assert base.retry(["id-3"]) == 3
    base.cancel(["id-1"])
    assert base.counts()["cancelled"] == 1
    assert base.retry() == 0  # what was cancelled waits for its name
    assert [row.status for row in base.rows()] == ["cancelled", "failed", "failed", "queued"]


@pytest.mark.parametrize("how", ["dies", "is given back", "is tried again", "is gone"])
@pytest.mark.parametrize("first", ["spoiled", "cancelled"])
def test_a_job_is_not_queued_behind_one_that_failed_meanwhile(first: str, how: str, base: Ledger) -> None:
    chain(base)
    assert base.claim(ME) is not None and base.done("id-1", ME, RESULT)
    holder = dead_process() if how == "dies" else ME
    assert base.claim(holder, ids=["id-2"]) is not None
    if how == "is gone":
        assert base.done("id-2", ME, RESULT)
    if first == "spoiled":
        base.spoiled("id-1", UsageError("another file"))
    else:
        base.again("id-1", "its file is gone")
        assert base.cancel(["id-1"]) == (1, 0)
    if how == "dies":
        base.take_over()
        assert [event["event"] for event in base.events("id-2")][-2:] == ["died", "failed"]
    elif how == "is given back":
        base.release("id-2", ME)
    elif how == "is tried again":
        base.fail("id-2", ME, OSError("busy"), retry_in=0.0)
    else:
        base.again("id-2", "its file is gone")
    status = "failed" if first == "spoiled" else "cancelled"
    assert [row.status for row in base.rows()] == [status, "failed", "failed", "queued"]
    assert base.row("id-2").error["kind"] == ledger.SOURCE_FAILED
    assert base.retry(["id-1"]) == 3


def test_a_ledger_with_a_job_behind_one_that_failed_is_mended(base: Ledger) -> None:
    chain(base)
    base._base.execute("UPDATE jobs SET status = 'failed' WHERE id = 'id-1'")
    base.add([entry(1)])
    assert [row.status for row in base.rows()] == ["failed", "failed", "failed", "queued"]


def test_what_waits_for_another_machine_is_no_work_of_this_one(base: Ledger) -> None:
    chain(base)
    assert base.claim("elsewhere 1 2 3") is not None
    assert [row.position for row in base.waiting_elsewhere()] == [2, 3]
    assert base.next_start(["id-2", "id-3"]) is None and base.next_start() is not None
    assert base.claim(ME) is not None and base.done("id-4", ME, RESULT)
    assert (base.counts()["queued"], base.next_start()) == (2, None)
    assert base.retry(lost=True) == 1
    assert base.waiting_elsewhere() == [] and base.next_start(["id-3"]) is not None
    assert base.claim(ME) is not None
    assert base.waiting_elsewhere() == [] and base.next_start() is not None


def test_a_long_chain_fails_and_is_queued_again_as_a_whole(base: Ledger) -> None:
    count = 1200
    base.add([entry(n, after=f"id-{n - 1}" if n > 1 else "") for n in range(1, count + 1)])
    assert base.claim(ME) is not None
    assert base.fail("id-1", ME, GenerationError("NaN"))
    last = base.rows()[-1]
    said = f"job {count - 1} ({count - 1}.mp4), whose video it goes on with, comes after job 1 (1.mp4), which"
    assert (base.counts()["failed"], last.error["message"]) == (count, f"{said} failed: NaN")
    assert "--job 1 " in last.error["hint"]
    assert [event["event"] for event in base.events(last.id)] == ["queued", "failed"]
    assert base.retry([last.id]) == base.counts()["queued"] == count


def test_jobs_of_some_models_can_be_left_to_others(base: Ledger) -> None:
    base.add([entry(1, load_key="a"), entry(2, load_key="b")])
    assert (base.ready(), base.ready(["a"]), base.ready(["a", "b"])) == (2, 1, 0)
    row = base.claim(ME, not_of=["a"])
    assert row is not None and row.position == 2
    assert base.claim(ME, not_of=["a"]) is None


def test_shards_have_ledgers_of_their_own(tmp_path: Path) -> None:
    assert ledger.name_for((2, 8)) == "ledger-2-of-8.sqlite3"
    for shard in ((1, 2), (2, 2)):
        Ledger.create(tmp_path / ledger.name_for(shard), meta={}).close()
    assert [path.name for path in ledger.ledgers(tmp_path)] == [
        "ledger-1-of-2.sqlite3",
        "ledger-2-of-2.sqlite3",
    ]


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="Linux")
def test_the_kind_of_file_system_is_read_from_the_mounts(tmp_path: Path) -> None:
    assert not ledger.is_on_network(tmp_path / "x")
    assert os.getpid() == int(ME.split()[2])
