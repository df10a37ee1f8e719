"""Plots and the HTML page of a run: the numbers, what is written, what is refused. See test_report_browser.py, too."""

from __future__ import annotations

import base64
import dataclasses
import errno
import hashlib
import html.parser
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CommandResult
from PIL import Image
from traces import FPS, GRID, layout_of, synthetic_run

from packforcing_cli import durable, runfolder, trace
from packforcing_cli.errors import DiskFullError, UsageError
from packforcing_cli.report import page, plots, study
from packforcing_cli.trace import Health
from packforcing_cli.video import VideoWriter

NASTY = 'a "red" </script><img src=x onerror="bad()"> <!--@data--> & <!-- \u2028 \u202eשלום 🦊 {{x}}'


class Reader(html.parser.HTMLParser):
    """Elements with their attributes, and the text of those that were closed: [tag, attributes, text]."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[list[str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))
        if tag not in ("meta", "link", "input", "img", "br"):
            self.open.append(self.found[-1][2])

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open:
            self.open[-1].append(data)

    def texts(self, tag: str, **attributes: str) -> list[str]:
        return [
            "".join(text)
            for name, values, text in self.found
            if name == tag and attributes.items() <= values.items()
        ]


def data_of(text: str) -> dict[str, Any]:
    (inside,) = Reader(text).texts("script", id="data")
    values: dict[str, Any] = json.loads(inside, parse_constant=pytest.fail)
    return values


def drawn(found: study.Study) -> set[str]:
    """Names of the plots there is something for."""
    return {name for name, draw in plots.PLOTS.items() if draw(found) is not None}


def video_of(
    path: Path, blocks: int, *, run: str, finish: bool = True, size: tuple[int, int] = (128, 128)
) -> Path:
    """A video whose blocks have a grey of their own, as a run would write it."""
    writer = VideoWriter(path, fps=FPS, width=size[0], height=size[1], metadata={"run": run})
    for block in range(blocks):
        writer.write(np.full((GRID.block_frames(block), size[1], size[0], 3), 40 + 5 * block, np.uint8))
    if not finish:
        writer.abort()
        return writer.part_path
    return writer.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty blocks with a video, a flag, a retry and a block whose scores said nothing."""
    folder = tmp_path_factory.mktemp("report")
    changes = {
        7: {"health": Health(("jump",), 120.0, 40.0, 2.0, 60.0, 0.01)},
        9: {"retry": 2},
        12: {"degenerate": (0, 2)},
    }
    made = synthetic_run(folder / "run", 30, changes=changes, output=folder / "a.mp4")
    video_of(folder / "a.mp4", 30, run="20260102-150405-a-red-circle-1f3c2a")
    return made


@pytest.fixture(scope="module")
def seen(run: Path) -> study.Study:
    return study.collect(run)


# ------------------------------------------------------------------------------------------------------- numbers


def test_partitions_add_up_to_the_live_cache(seen: study.Study) -> None:
    layout = layout_of()
    for block in range(seen.blocks):
        parts = sum(seen.curves[name][block] for name in study.PARTS)
        assert parts == seen.curves["live"][block] == layout.bytes(block).live
        kept = min(block, layout.sink_blocks + layout.recent_blocks) + 1
        assert seen.curves["window"][block] == kept * GRID.block_tokens * GRID.bytes_per_token
        assert seen.curves["full"][block] == (block + 1) * GRID.block_tokens * GRID.bytes_per_token


def test_slots_add_up_to_the_largest_distance(seen: study.Study) -> None:
    taken = sum(seen.curves[f"at_{name}"] for name in ("sink", "mid", "recent", "current"))
    assert np.allclose(taken, seen.curves["distance"] + 1)
    assert seen.trained == 20


def test_statistics_are_those_of_the_trace(run: Path, seen: study.Study) -> None:
    records = trace.read(run).records
    assert np.allclose(seen.importance.mean(0), np.array(trace.importance(records), float))
    churn = np.array([np.nan if value is None else value for value in trace.churn(records)])
    assert np.array_equal(seen.curves["churn"], churn, equal_nan=True)
    assert seen.curves["never"][-1] == seen.never == trace.share_never_selected(records)
    assert seen.ages.tolist() == np.bincount(trace.recall_ages(records)).tolist()


def test_scores_that_say_nothing_have_no_importance(run: Path) -> None:
    record = trace.read(run).records[20]
    assert record.scores is not None
    equal, lacking = (1.0,) * len(record.scores[1]), (None, *record.scores[2][1:])
    found = study.normalised(dataclasses.replace(record, scores=(record.scores[0], equal, lacking)))
    assert found is not None
    assert found[0].min() == 0 and found[0].max() == 1
    assert np.isnan(found[1:]).all()


@pytest.mark.parametrize("columns", [480, 11], ids=["a column a block", "three blocks a column"])
def test_the_map_equals_counting(seen: study.Study, columns: int) -> None:
    cells = study.recall_map(seen, columns=columns)
    step = cells.per_column
    assert (step, cells.columns, cells.layers) == ((1, 30, 3) if columns == 480 else (3, 10, 3))
    for c in range(cells.columns):
        for p in range(cells.columns):
            rows = [r for r in seen.records[c * step : (c + 1) * step] if r is not None]
            past = set(range(p * step, (p + 1) * step))
            had = [r for r in rows if r.partitions and past & set(r.partitions.bank)]
            for layer in range(3):
                value = cells.share[layer + 1, c, p]
                if not had:
                    assert value == study.NOT_STORED
                    continue
                hits = sum(bool(past & set(r.selected[layer])) for r in had)
                assert value == round(hits / len(had) * study.FULL)
    assert (cells.share[0] == study.NOT_STORED).any() and (cells.share[0] == study.FULL).any()


def test_events_tell_flags_retries_and_empty_scores(seen: study.Study) -> None:
    assert [(event.block, event.kind) for event in seen.events] == [
        (7, "jump"),
        (9, "retry"),
        (12, "degenerate"),
    ]
    assert "2 of 3 layers" in seen.events[2].text
    assert "2 times" in seen.events[1].text


def test_prompts_cuts_and_pins_are_events(tmp_path: Path) -> None:
    asked = {
        "seconds": 10.0,
        "timeline": {"at": [{"time": "0:04", "prompt": "a blue square", "cut": True}], "pins": ["0:06-0:07"]},
    }
    try:
        folder = synthetic_run(tmp_path / "run", 10, request=asked)
    except Exception as error:  # the builder refuses what the request does not know
        pytest.fail(str(error))
    found = study.collect(folder)
    kinds = {event.kind for event in found.events}
    assert kinds == {"scene", "cut", "pin"}
    assert next(event for event in found.events if event.kind == "scene").text == "prompt: a blue square"
    assert data_of(page.render(found, command="x"))["scenes"] == [0] * 4 + [1] * 6


# ------------------------------------------------------------------------------------------------------ pictures


def test_every_block_shows_its_own_first_frame(seen: study.Study) -> None:
    assert seen.pictures is not None
    assert sorted(seen.pictures.frames) == list(range(30))
    for block, frame in seen.pictures.frames.items():
        assert abs(float(frame.mean()) - (40 + 5 * block)) < 3
    assert np.allclose(seen.pictures.luma, 40 + 5 * np.arange(30), atol=3)
    assert seen.pictures.saturation.max() < 0.05 and seen.pictures.sharpness.max() < 1


def test_pictures_of_an_unfinished_video_come_from_its_part(tmp_path: Path) -> None:
    name = "20260102-150405-a-red-circle-1f3c2a"
    folder = synthetic_run(tmp_path / "run", 6, length=20, status="running", output=tmp_path / "a.mp4")
    assert video_of(tmp_path / "a.mp4", 4, run=name, finish=False).name == "a.part.mp4"
    found = study.collect(folder)
    assert not found.is_complete and found.pictures is not None
    assert sorted(found.pictures.frames) == [0, 1, 2, 3]
    assert found.notes[1:] == ("The video has no picture of 2 of the 6 blocks.",)
    text = page.render(found, command="x")
    assert "The run is not complete: 6 of 20 blocks are here." in text
    assert "not finished: 6 of 20 blocks" in text
    assert [bool(uri) for uri in data_of(text)["pictures"]] == [True] * 4 + [False] * 2


@pytest.mark.parametrize(("only_new", "lead", "padded"), [(False, 20, 0), (False, 0, 3), (True, 20, 0)])
def test_pictures_of_a_continued_video_are_those_of_their_blocks(
    tmp_path: Path, only_new: bool, lead: int, padded: int
) -> None:
    source = {
        "path": "b.mp4",
        "sha256": "0" * 64,
        "only_new": only_new,
        "blocks": 3,
        "lead": lead,
        "padded": padded,
    }
    asked = {"seconds": 8.0, "source": source}
    folder = synthetic_run(tmp_path / "run", 8, output=tmp_path / "a.mp4", request=asked)
    writer = VideoWriter(tmp_path / "a.mp4", fps=FPS, width=128, height=128)
    shown = runfolder.read(folder).shown
    for size in shown.lead_pieces:
        writer.write(np.full((size, 128, 128, 3), 250, np.uint8))
    for block in range(shown.first, 8):
        writer.write(np.full((shown.block_frames(block), 128, 128, 3), 40 + 10 * block, np.uint8))
    writer.close()
    found = study.collect(folder)
    assert found.pictures is not None
    assert sorted(found.pictures.frames) == list(range(3 if only_new else 0, 8))
    for block, frame in found.pictures.frames.items():
        assert abs(float(frame.mean()) - (40 + 10 * block)) < 3
    said = (
        "the new part alone"
        if only_new
        else "before the beginning"
        if padded
        else "1.25 s after the beginning"
    )
    assert said in found.notes[0]


@pytest.mark.parametrize("other", ["gone", "another run", "another size", "damaged"])
def test_without_its_video_a_run_has_no_pictures_and_says_so(tmp_path: Path, other: str) -> None:
    folder = synthetic_run(tmp_path / "run", 6, output=tmp_path / "a.mp4")
    if other == "another run":
        video_of(tmp_path / "a.mp4", 2, run="20250102-150405-else-1f3c2a")
    elif other == "another size":
        video_of(tmp_path / "a.mp4", 2, run="20260102-150405-a-red-circle-1f3c2a", size=(64, 64))
    elif other == "damaged":
        (tmp_path / "a.mp4").write_bytes(b"no video" * 100)
    found = study.collect(folder)
    assert found.pictures is None
    (note,) = found.notes
    assert note.startswith("There are no pictures: ") and "a.mp4" in note
    text = page.render(found, command="x")
    assert note in "".join(Reader(text).texts("p", **{"class": "note"}))
    assert not any(data_of(text)["pictures"])


def test_look_measures_what_it_says() -> None:
    flat = np.zeros((8, 8, 3), np.uint8)
    assert study.look(flat) == (0, 0, 0)
    flat[:] = (200, 100, 0)
    luma, saturation, sharpness = study.look(flat)
    assert luma == pytest.approx(0.299 * 200 + 0.587 * 100, rel=1e-5)
    assert (saturation, sharpness) == (1, pytest.approx(0, abs=1e-3))
    board = np.zeros((8, 8, 3), np.uint8)
    board[::2, ::2] = board[1::2, 1::2] = 100
    assert study.look(board)[2] == pytest.approx(400, rel=1e-5)  # every neighbour differs by 100


# ---------------------------------------------------------------------------------------------------------- page


def test_the_page_needs_nothing_but_itself(seen: study.Study) -> None:
    text = page.render(seen, command="packforcing inspect-cache x")
    found = Reader(text)
    for tag, attributes, _ in found.found:
        assert tag not in ("iframe", "object", "embed", "base", "form")
        assert tag != "link" or attributes == {"rel": "icon", "href": "data:,"}
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        for name in ("src", "href", "action", "poster", "srcset", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    css, js = page._part("page.css"), page._part("page.js")
    assert not re.search(r"@import|url\((?!#)", css)
    assert set(re.findall(r"https?://[^\"' ]+", js)) == {
        "http://www.w3.org/2000/svg"
    }  # a name, not an address
    assert not re.search(
        r"\b(fetch|XMLHttpRequest|WebSocket|EventSource|sendBeacon|import)\s*\(|innerHTML", js
    )


def test_the_policy_allows_exactly_the_pages_own_script_and_style(seen: study.Study) -> None:
    found = Reader(page.render(seen, command="x"))
    (policy,) = [
        a["content"] for tag, a, _ in found.found if a.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.split(" ", 1) for rule in (policy or "").split("; "))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"

    def hashed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert rules["style-src"] == hashed(*found.texts("style"))
    (script,) = ["".join(t) for tag, a, t in found.found if tag == "script" and not a]
    assert rules["script-src"] == hashed(script)


def test_what_people_wrote_stays_text(tmp_path: Path) -> None:
    folder = synthetic_run(tmp_path / "run", 5, prompt=NASTY, output=tmp_path / "</script>.mp4")
    text = page.render(study.collect(folder), command='x --html "</code><b>.html"')
    found = Reader(text)
    assert found.texts("h1") == [NASTY]
    assert data_of(text)["prompts"] == [NASTY]
    assert not found.texts("img") and not found.texts("b", onclick="")
    assert found.texts("code") == ['x --html "</code><b>.html"']
    assert len(found.texts("script")) == 2 and text.count("</script>") == 2
    assert not re.search(r"<!--(?! )@", text.replace("&lt;", ""))


def test_the_pages_data_is_what_the_study_has(seen: study.Study) -> None:
    data = data_of(page.render(seen, command="x"))
    cells = study.recall_map(seen, columns=480)
    n = data["blocks"]
    assert (n, data["layers"], data["step"], data["schema"]) == (30, 3, 1, 1)
    share = np.frombuffer(base64.b64decode(data["share"]), np.uint8).reshape(4, n * (n + 1) // 2)
    for plane in range(4):
        for c in (5, 17, 29):
            row = share[plane, c * (c + 1) // 2 : (c + 1) * (c + 2) // 2]
            assert np.array_equal(row, cells.share[plane, c, : c + 1])
    assert data["curves"]["live"] == [int(v) for v in seen.curves["live"]]
    assert data["curves"]["churn"][0] is None
    assert data["times"][-1] == pytest.approx(GRID.frames_for(30) / FPS, abs=1e-3)
    assert data["paper"] == {"importance": 0.499, "churn": 0.75, "diversity": 0.85}
    assert all(uri.startswith("data:image/webp;base64,") for uri in data["pictures"])
    tiles = {name: (value, more) for name, value, more in page.tiles(seen)}
    assert tiles["memory at the end"][0] == page.size(layout_of().bytes(29).live)
    assert tiles["flagged blocks"][0] == "3"


def test_an_hour_stays_within_the_limit(tmp_path: Path) -> None:
    blocks = 3600
    found = study.collect(synthetic_run(tmp_path / "run", blocks, with_blocks=False))
    rng = np.random.default_rng(0)  # noise: no picture compresses worse
    frames = {
        b: rng.integers(0, 256, (54, 96, 3), np.uint8)
        for b in range(0, blocks, study.per_column(blocks, 480))
    }
    nothing = np.full(blocks, np.nan)
    found = dataclasses.replace(found, pictures=study.Pictures(frames, nothing, nothing, nothing))
    text = page.render(found, command="x")
    assert len(text.encode()) <= page.LIMIT_BYTES
    data = data_of(text)
    assert data["step"] == 8 and len(data["times"]) == 451
    assert sum(map(bool, data["pictures"])) >= 200
    assert "8 blocks share a column" in text


@pytest.mark.parametrize("layers", [1, 6, 30, 40, 96])
def test_the_map_has_room_for_every_layer(seen: study.Study, layers: int) -> None:
    record = dataclasses.replace(seen.records[-1], selected=((2,),) * layers)  # type: ignore[type-var]
    n = page.map_columns(dataclasses.replace(seen, records=(record,)))
    assert 60 <= n <= 480
    assert (layers + 1) * n * (n + 1) <= page.MAP_BYTES * 1.02


def test_a_memory_without_a_bank_has_no_map_but_a_page(tmp_path: Path) -> None:
    found = study.collect(synthetic_run(tmp_path / "run", 8, layout=layout_of(top_k=0)))
    text = page.render(found, command="x")
    assert data_of(text)["scored"] is False and "churn" not in data_of(text)["curves"]
    assert drawn(found) == set(plots.PLOTS) - {"selection.png", "importance.png"}


def test_lines_of_an_old_version_are_shown_as_far_as_they_go(tmp_path: Path) -> None:
    folder = synthetic_run(tmp_path / "run", 5)
    lines = [
        {"block": n, "seconds": {"denoise": 0.1}, "cache": {"active": [[2], [2]] if n == 4 else []}}
        for n in range(5)
    ]
    (folder / trace.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    found = study.collect(folder)
    assert any("older version" in note for note in found.notes)
    data = data_of(page.render(found, command="x"))
    assert "live" not in data["curves"] and data["curves"]["denoise"] == [0.1] * 5
    assert {"time.png", "recalls.png"} <= drawn(found)
    assert not {"memory.png", "slots.png"} & drawn(found)


# ----------------------------------------------------------------------------------------------------- bad input


def test_a_page_never_replaces_a_video_or_a_file_of_the_run(
    run_command: Callable[..., CommandResult], tmp_path: Path
) -> None:
    output = tmp_path / "video.html"
    run = synthetic_run(tmp_path / "run", 3, output=output)
    output.write_bytes(b"a video")
    before = {path: path.read_bytes() for path in (output, run / "run.json")}
    for target, said in (
        (run / "run.json", "ends in .html or .htm"),
        (tmp_path / "a.mp4", "ends in .html or .htm"),
        (run / "page.html", "inside the run's own folder"),
        (output, "is the run's video"),
    ):
        done = run_command("inspect-cache", str(run), "--html", str(target), "--overwrite")
        assert done.code == 2 and said in done.err
    assert {path: path.read_bytes() for path in before} == before
    assert not (run / "page.html").exists()


def test_nothing_is_overwritten_unasked(seen: study.Study, tmp_path: Path) -> None:
    target = tmp_path / "a.html"
    page.write(seen, target)
    before = target.read_bytes()
    with pytest.raises(UsageError, match=r"a\.html exists"):
        page.write(seen, target)
    target.write_text("mine")
    page.write(seen, target, overwrite=True)
    assert target.read_bytes() == before
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "slots.png").write_text("mine")
    with pytest.raises(UsageError, match=r"slots\.png exists"):
        plots.write(seen, tmp_path / "p")
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["slots.png"]


@pytest.mark.parametrize("target", ["missing/a.html", "folder", "file/a.html"])
def test_a_page_that_cannot_be_written_is_one_message(seen: study.Study, tmp_path: Path, target: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError) as raised:
        page.write(seen, tmp_path / target)
    assert raised.value.hint


@pytest.mark.parametrize("target", ["file", "file/plots"])
def test_a_folder_that_cannot_be_made_is_one_message(seen: study.Study, tmp_path: Path, target: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError) as raised:
        plots.write(seen, tmp_path / target)
    assert raised.value.hint


@pytest.mark.parametrize("kind", ["page", "plots"])
def test_a_full_disk_has_its_own_error(
    seen: study.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(durable, "write", full)
    write: Callable[..., object] = page.write if kind == "page" else plots.write
    with pytest.raises(DiskFullError):
        write(seen, tmp_path / ("new.html" if kind == "page" else "new"))


def test_a_run_without_a_trace_is_refused(tmp_path: Path) -> None:
    folder = synthetic_run(tmp_path / "run", 3)
    (folder / trace.FILE).unlink()
    with pytest.raises(UsageError, match="no trace yet"):
        study.collect(folder)


def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    folder = synthetic_run(tmp_path / "run", 6)
    path = folder / trace.FILE
    path.write_bytes(path.read_bytes()[:-40])
    found = study.collect(folder)
    assert found.blocks == 5
    assert any("cut off" in note for note in found.notes)
    assert "cut off" in page.render(found, command="x")


# -------------------------------------------------------------------------------------------------- command line


def test_the_command_writes_page_and_plots_and_prints_their_paths(
    run: Path, run_command: Callable[..., CommandResult], tmp_path: Path
) -> None:
    done = run_command("inspect-cache", str(run), "--html", "a.html", "--plot", "p")
    assert done.code == 0, done.err
    assert done.out.splitlines() == [*(str(Path("p") / name) for name in plots.PLOTS), "a.html"]
    assert (tmp_path / "a.html").is_file()
    for line in done.out.splitlines()[:-1]:
        with Image.open(tmp_path / line) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        assert pixels.shape[1] == plots.WIDTH_INCHES * plots.DPI
        assert (pixels.max(2).astype(int) - pixels.min(2) > 40).mean() > 0.0002, line  # something coloured
    again = run_command("inspect-cache", str(run), "--html", "a.html")
    assert again.code == 2 and again.out == ""
    assert "a.html exists" in again.err and "--overwrite" in again.err
    assert run_command("inspect-cache", str(run), "--html", "a.html", "--overwrite").code == 0
    code = "".join(Reader((tmp_path / "a.html").read_text("utf-8")).texts("code"))
    assert code == "packforcing inspect-cache 20260102-150405-a-red-circle-1f3c2a --html a.html"


def test_the_commands_json_names_what_was_written(
    run: Path, run_command: Callable[..., CommandResult]
) -> None:
    done = run_command("inspect-cache", str(run), "--html", "a.html", "--json")
    assert json.loads(done.out) == {
        "schema": 1,
        "run": "20260102-150405-a-red-circle-1f3c2a",
        "blocks": 30,
        "complete": True,
        "html": "a.html",
        "plots": [],
        "notes": [],
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--html", "a.html"], "--html asks about a run"),
        (["RUN", "--html", "a.html", "--at", "0:03"], "exclude each other"),
        (["RUN", "--overwrite"], "--overwrite is for --html and --plot"),
        (["RUN", "--html", "no/a.html"], "no folder no"),
        (["RUN", "--plot", "a.txt"], "a.txt is a file"),
        (["NEWER", "--html", "a.html"], "schema 99"),
    ],
)
def test_what_cannot_be_drawn_is_one_message(
    run: Path, run_command: Callable[..., CommandResult], tmp_path: Path, arguments: list[str], said: str
) -> None:
    (tmp_path / "a.txt").touch()
    newer = synthetic_run(tmp_path / "newer", 2)
    (newer / trace.FILE).write_text('{"schema": 99, "block": 0}\n', "utf-8")
    places = {"RUN": str(run), "NEWER": str(newer)}
    done = run_command("inspect-cache", *(places.get(word, word) for word in arguments))
    assert done.code == 2 and done.out == ""
    assert said in done.err and "→" in done.err
    assert not (tmp_path / "a.html").exists()


def test_what_is_not_there_is_said_and_the_page_still_written(
    run_command: Callable[..., CommandResult], tmp_path: Path
) -> None:
    folder = synthetic_run(tmp_path / "run", 4, length=9, status="running")
    done = run_command("inspect-cache", str(folder), "--html", "a.html")
    assert done.code == 0 and (tmp_path / "a.html").is_file()
    assert "There are no pictures: the video /nowhere/a.mp4 is not there any more." in done.err
    assert "warning: The run is not complete: 4 of 9 blocks are here." in done.err


def test_drawing_loads_no_torch(run: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from packforcing_cli.report import page, plots, study\n"
        f"found = study.collect(__import__('pathlib').Path({str(run)!r}))\n"
        "page.render(found, command='x')\n"
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def test_lines_that_make_no_sense_spoil_nothing(tmp_path: Path) -> None:
    bank = len(layout_of().view(12).mid)
    changes: dict[int, dict[str, Any]] = {
        8: {"selected": ((8, 90),) * 3},  # itself, and a block that is not there
        9: {"scores": ((0.5,),) * 3},  # fewer than the bank has
        10: {"selected": ((2,),)},  # of one layer
        11: {"bytes": {"live": 5}, "tokens": {}},
        12: {"scores": ((None,) * bank,) * 3},
    }
    folder = synthetic_run(tmp_path / "run", 14, changes=changes)
    with (folder / trace.FILE).open("a", encoding="utf-8") as file:
        for number in (5000, -3):  # no blocks of this run
            file.write(json.dumps({"block": number, "seconds": {}, "cache": {"active": []}}) + "\n")
    found = study.collect(folder)
    assert data_of(page.render(found, command="x"))["blocks"] == 14
    assert np.isnan(found.curves["live"][11]) and np.isfinite(found.curves["live"][13])
    assert drawn(found) == set(plots.PLOTS)
