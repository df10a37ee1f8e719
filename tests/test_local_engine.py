"""What the engine of this machine waits for, counts as failures and gives back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from test_batch_plan import chain, planned

from packforcing_cli import batch, ledger, local_engine
from packforcing_cli.batch import Folder
from packforcing_cli.cli import batch as display
from packforcing_cli.errors import GenerationError
from packforcing_cli.tasks import Options


def test_an_engine_that_begins_no_more_does_not_wait_for_another_batch(tmp_path: Path) -> None:
    folder = Folder.open(tmp_path / "v")
    with folder.ledger as base:
        folder.add(planned(["a", "b"]), source="x")
        assert base.claim(ledger.this_process()) is not None  # the other batch's worker
        engine = local_engine.Local(folder, Options())
        assert engine.has_work()
        engine.stop("interrupted")
        assert [state.workers for state in engine.run()] == [0]


def test_nothing_here_waits_for_a_source_that_another_machine_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Folder.open(tmp_path / "v")
    with folder.ledger as base:
        folder.add(planned(chain(), root=tmp_path / "v"), source="x")
        engine, board = local_engine.Local(folder, Options()), batch.LedgerBoard(folder)
        assert engine.has_work() and board.idle() is not None
        host, *rest = ledger.this_process().split()
        assert base.claim(" ".join([f"{host}-2", *rest])) is not None
        assert board.claim("", "") is None
        assert (engine.has_work(), board.idle()) == (False, None)
        assert [state.workers for state in engine.run()] == [0]
        display.Display(quiet=False).end(folder, base.rows(), engine, 3)
        said = " ".join(capsys.readouterr().err.split())
        assert f"held by processes on {host}-2, and 2 jobs that wait for them; if those are gone:" in said
        assert said.endswith("--lost")
        assert base.retry(lost=True) == 1
        assert engine.has_work() and board.idle() is not None


def test_jobs_that_fail_with_their_source_are_one_failure(tmp_path: Path) -> None:
    folder = Folder.open(tmp_path / "v")
    with folder.ledger as base:
        folder.add(planned(["z", *chain()], root=tmp_path / "v"), source="x")
        engine = local_engine.Local(folder, Options(), max_failures=2)
        for failed in (1, 2):
            row = base.claim(ledger.this_process(), ids=[base.rows()[2 - failed].id])
            assert row is not None
            base.fail(row.id, ledger.this_process(), GenerationError("NaN"))
            state = engine.state(0)
            assert (state.new_failures, engine.too_many(state)) == (failed, failed == 2)
        assert state.counts["failed"] == 4
        assert local_engine.Local(folder, Options()).state(0).new_failures == 0


def test_what_a_worker_held_that_was_ended_at_once_is_queued(tmp_path: Path) -> None:
    folder = Folder.open(tmp_path / "v")
    with folder.ledger as base:
        folder.add(planned(["a"]), source="x")
        process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        assert base.claim(ledger.this_process(process.pid)) is not None
        engine = local_engine.Local(folder, Options())
        engine._processes.append(local_engine._Process(process, 0, tmp_path / "log"))
        engine.kill()
        assert base.counts()["queued"] == 1
