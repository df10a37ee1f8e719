"""The folder of a batch: whose it is, its shards, its threads, and its ledger as a worker's board."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_batch_plan import chain, planned

from packforcing_cli import batch, ledger
from packforcing_cli.batch import Folder
from packforcing_cli.errors import UsageError


def test_only_what_nobody_is_at_work_on_is_left_behind(tmp_path: Path) -> None:
    folder = Folder.open(tmp_path / "v")
    with folder.ledger as base:
        folder.add(planned(["a", "b"]), source="x")
        held = batch.LedgerBoard(folder).claim("", "")
        left = base.claim(ledger.this_process())
        assert held is not None and left is not None
        batch.LedgerBoard(folder).release_stale()
        assert [row.status for row in base.rows()] == ["started", "queued"]
        batch.LedgerBoard(folder).release(held)
        assert base.counts()["queued"] == 2


def test_an_actor_has_as_many_threads_as_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    for number, usual in enumerate((1, 4)):
        folder = Folder.open(tmp_path / str(number))
        with folder.ledger:
            assert batch.threads_of(folder, 1, None, usual=usual) == usual
            assert batch.threads_of(folder, 1, None, usual=9) == usual


def test_a_folder_of_another_manifest_is_refused(tmp_path: Path) -> None:
    folder = Folder.open(tmp_path / "videos")
    with folder.ledger:
        folder.add(planned(["a", "b"]), source="first.txt")
        with pytest.raises(
            UsageError, match=r"belongs to another manifest: 1 of its jobs \(from first\.txt\)"
        ):
            folder.add(planned(["a", "c"]), source="second.txt")
        assert len(folder.ledger.rows()) == 2
        folder.add(planned(["a", "b", "c"]), source="longer.txt")
        folder.add(planned(["d"]), source="more.txt", add=True)
        assert len(folder.ledger.rows()) == 4


def test_jobs_that_follow_each_other_are_in_one_shard(tmp_path: Path) -> None:
    entries = planned([{"prompt": "z", "seed": 0}, *chain(), {"prompt": "y", "seed": 0}], root=tmp_path)
    assert [[entry.line for entry in batch.of_shard(entries, (n, 2))] for n in (1, 2)] == [[1, 5], [2, 3, 4]]


def test_shards_are_parts_that_nothing_is_missing_from() -> None:
    entries = planned([{"prompt": "a", "seed": n} for n in range(7)])
    parts = [batch.of_shard(entries, (n, 3)) for n in (1, 2, 3)]
    assert [len(part) for part in parts] == [3, 2, 2]
    assert sorted(entry.id for part in parts for entry in part) == sorted(entry.id for entry in entries)
    assert batch.parse_shard("2/8") == (2, 8)
    for text in ("0/3", "4/3", "1", "a/b", "1/0", "-1/2"):
        with pytest.raises(UsageError, match="must be I/N"):
            batch.parse_shard(text)


def test_a_folder_is_begun_with_shards_or_without(tmp_path: Path) -> None:
    Folder.open(tmp_path / "v", shard=(1, 2)).ledger.close()
    Folder.open(tmp_path / "v", shard=(2, 2)).ledger.close()
    for shard in (None, (1, 3)):
        with pytest.raises(UsageError, match="was begun with --shard I/2"):
            Folder.open(tmp_path / "v", shard=shard)
    assert len(ledger.ledgers(tmp_path / "v")) == 2


def test_the_number_of_threads_is_fixed_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    folder = Folder.open(tmp_path / "v")
    with folder.ledger:
        assert batch.threads_of(folder, 2, None) == 3
        monkeypatch.setenv("OMP_NUM_THREADS", "8")
        assert batch.threads_of(folder, 1, None) == 3
        with pytest.raises(UsageError, match="begun with 3 threads"):
            batch.threads_of(folder, 1, 2)


def test_a_job_can_be_sent_as_plain_values(tmp_path: Path) -> None:
    folder = Folder.open(tmp_path / "v")
    with folder.ledger as base:
        folder.add(planned([{"prompt": "a", "at": "0:05 x", "seconds": 9}]), source="x")
        row = base.claim(ledger.this_process())
        assert row is not None
        task = folder.task(row)
        assert json.loads(json.dumps(task.spec)) == task.spec
        assert task.output == str(tmp_path / "v" / row.output)
