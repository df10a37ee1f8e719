"""The trace: what is written of a block is read back, whatever a kill left of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from traces import layout_of, synthetic_record, synthetic_run

from packforcing_cli import trace
from packforcing_cli.errors import UsageError
from packforcing_cli.trace import Record


def test_a_record_comes_back_from_its_line_as_it_was() -> None:
    record = synthetic_record(30, layout_of(pins=frozenset({9})))
    line = json.loads(json.dumps(record.to_json()))
    assert Record.from_json(line) == record
    assert (line["schema"], [*line]) == (  # frozen: a changed or lost name needs a new schema number
        1,
        [
            *(
                "schema",
                "block",
                "retry",
                "frames",
                "scene",
                "partitions",
                "slots",
                "tokens",
                "bytes",
                "full_bytes",
            ),
            *("selected", "scores", "degenerate", "pins", "seconds", "encode_seconds", "memory", "health"),
        ],
    )
    assert [*line["partitions"]] == ["sink", "bank", "recent", "current", "active"]
    assert [*line["slots"]] == ["sink", "mid", "recent", "current", "span", "max_distance", "trained"]
    assert [*line["health"]] == ["flags", "luma", "spread", "motion", "jump", "clipped"]
    assert record.pins == (9,) and all(9 in layer for layer in record.selected)


def test_a_line_cut_by_a_kill_is_left_out_and_said(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "run", 12)
    path = run / trace.FILE
    path.write_bytes(path.read_bytes()[:-40])
    found = trace.read(run)
    assert [record.block for record in found.records] == [*range(11)]
    assert "cut off" in found.notes[0] and len(found.notes) == 1
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b"\n")])  # only the end of the line is missing
    assert [record.block for record in trace.read(path).records] == [*range(11)]
    assert trace.read(path).notes == ()


def test_damaged_lines_and_missing_blocks_are_named_and_the_newest_line_of_a_block_wins(
    tmp_path: Path,
) -> None:
    run = synthetic_run(tmp_path / "run", 6)
    path = run / trace.FILE
    lines = path.read_text().splitlines()
    lines[3] = '{"schema": 1, "block": 3}'
    again = json.dumps(synthetic_record(5, layout_of(), retry=2).to_json())
    path.write_text("\n".join([*lines, "[]", again]) + "\n")
    found = trace.read(run)
    assert [record.block for record in found.records] == [0, 1, 2, 4, 5]
    assert found.records[-1].retry == 2
    assert found.notes == (
        "Of the trace, line 4, 7 cannot be read and was left out.",
        "The trace has no line of block 3.",
    )


def test_lines_of_older_versions_give_what_they_have(tmp_path: Path) -> None:
    path = tmp_path / trace.FILE
    old = {
        "block": 0,
        "seconds": {"denoise": 0.5},
        "cache": {"active": [[2, 3], [2, 5]]},
        "recalled": [2, 3, 5],
    }
    path.write_text(json.dumps(old) + "\n")
    found = trace.read(path)
    assert found.records[0].seconds == {"denoise": 0.5}
    assert found.records[0].recalled == (2, 3, 5)
    assert found.records[0].bytes == {} and found.records[0].partitions is None
    assert found.notes == (
        "Block 0 came from an older version: only what was recalled and the timings are known.",
    )


def test_a_newer_trace_is_refused_and_a_missing_one_is_empty(tmp_path: Path) -> None:
    path = tmp_path / trace.FILE
    assert trace.read(path) == trace.Trace(())
    path.write_text('{"schema": 2, "block": 0}\n')
    with pytest.raises(UsageError, match="schema 2"):
        trace.read(path)


def test_a_growing_trace_is_read_piece_by_piece_and_anew_when_it_was_cut(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "run", 4)
    path = run / trace.FILE
    whole = path.read_bytes()
    path.write_bytes(b"")
    tail = trace.Tail(run)
    assert not tail.update() and not tail.trace().records
    for end in range(100, len(whole) + 100, 100):
        path.write_bytes(whole[:end])
        tail.update()
    assert [record.block for record in tail.trace().records] == [0, 1, 2, 3]
    assert tail.trace().notes == () and not tail.update()
    path.write_bytes(whole[: whole.index(b"\n") + 1])
    assert tail.update() and len(tail.trace().records) == 1


def test_gaps_before_a_far_block_are_named_without_counting_them(tmp_path: Path) -> None:
    path = tmp_path / trace.FILE
    lines = [{"block": 1, "seconds": {}}, {"block": 10**17, "seconds": {}}, {"block": -1, "seconds": {}}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = trace.read(path)
    assert [record.block for record in found.records] == [1, 10**17]
    assert found.notes[0] == "Of the trace, line 3 cannot be read and was left out."
    assert found.notes[-1] == f"The trace has no line of blocks 0 and 2-{10**17 - 1}."
    of_run = trace.read(path, blocks=4)
    assert [record.block for record in of_run.records] == [1]
    assert "cannot be of this run, which has 4 blocks" in " ".join(of_run.notes)
    assert of_run.notes[-1] == "The trace has no line of block 0."


def test_churn_is_told_of_blocks_that_had_a_choice() -> None:
    layout = layout_of()
    assert not trace.chooses(synthetic_record(5, layout))
    assert trace.chooses(synthetic_record(39, layout))
