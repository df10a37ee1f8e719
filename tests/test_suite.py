"""The benchmark: which rows there are, that it goes on where it stopped, and that its numbers are right."""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CommandResult
from PIL import Image

from packforcing_cli import runfolder
from packforcing_cli.errors import GenerationError, UsageError
from packforcing_cli.layout import Grid, Layout
from packforcing_cli.prompts import encode_script
from packforcing_cli.registry import VideoModel, load_model
from packforcing_cli.resolve import layout_for
from packforcing_cli.rollout import stream_generate
from packforcing_cli.timeline import Script
from packforcing_cli.training import detectors, suite, suite_report, world

torch.set_num_threads(1)

QUICK = ("eval", "--suite", "demo", "--out", "out", "--seconds", "2", "--prompts", "1", "--seeds", "1")
SMALL = (*QUICK, "--rows", "packforcing,window", "-q")


@pytest.fixture(scope="module")
def model() -> VideoModel:
    return load_model("demo", device="cpu")


@pytest.fixture
def no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "calibrate", lambda *_: suite.Pace(0.1, 0.0, 0.0, 0.0))


@pytest.fixture
def no_visitor(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the model did not know the visitor's words: no recall test."""
    monkeypatch.setattr(suite, "VISITOR_WORDS", suite.VISITOR_WORDS | {"unicorn"})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# -- rows -----------------------------------------------------------------------------------------------------


def test_every_row_is_another_memory_or_says_which_it_is_the_same_as(model: VideoModel) -> None:
    rows = {row.name: row for row in suite.rows_for(model, num_blocks=60)}
    assert len(rows) == len(suite.rows_for(model, num_blocks=60))
    assert {name: row.same_as for name, row in rows.items() if row.same_as} == {
        "affinity-recent": "packforcing",
        "hr+lr": "packforcing",
        "context-sinks": "packforcing",
        "sink-2": "packforcing",
        "span-1": "packforcing",
        "span-fit": "span-block",  # 16 mids of 4 slots are just what is left of 80
    }
    assert not any(row.reason for row in rows.values())
    memories = [suite.memory_of(model, row.memory).model_dump_json() for row in rows.values() if row.runs]
    assert len({*memories}) == len(memories)


def test_the_window_takes_the_memory_that_packforcing_stores_and_less_than_a_block_more(
    model: VideoModel,
) -> None:
    rows = {row.name: row for row in suite.rows_for(model, num_blocks=60)}
    grid = Grid(frames_per_block=4, rows=4, cols=8, layers=6, kv_dim=192, heads=3, dtype_bytes=4)
    stored = {}
    for name in ("packforcing", "window"):
        memory = suite.memory_of(model, rows[name].memory)
        stored[name] = layout_for(model, memory, grid, num_blocks=60).bytes(59).stored
    block = grid.block_tokens * grid.bytes_per_token
    assert stored["packforcing"] <= stored["window"] < stored["packforcing"] + block


def test_a_row_the_model_cannot_do_is_named_with_the_reason(model: VideoModel) -> None:
    rows = suite.rows_for(replace(model, compressor=None), num_blocks=60)
    reasons = {row.name: row.reason for row in rows if row.reason}
    assert {"hr", "packforcing", "fifo"} <= set(reasons)
    assert not {"lr", "window", "full", "sink+recent"} & set(reasons)
    assert "HR" in reasons["hr"]


def test_a_row_that_is_another_one_stands_for_it_and_one_that_cannot_be_is_refused(model: VideoModel) -> None:
    assert suite.plan(model, rows=["window", "sink-2", "hr+lr"]).wanted == ("window", "packforcing")
    with pytest.raises(UsageError, match="no row is left to run: demo cannot do hr: "):
        suite.plan(replace(model, compressor=None), rows=["hr"])


def test_a_model_of_another_world_is_refused(model: VideoModel) -> None:
    other = replace(model, manifest=model.manifest.model_copy(update={"vocabulary": ("cat",)}))
    with pytest.raises(UsageError, match="does not know the words of the demo world"):
        suite.plan(other)


def test_prompts_are_held_out_of_training_and_spread_over_all_of_them(model: VideoModel) -> None:
    full = suite.plan(model)
    assert len({*full.prompts}) == 32
    assert not {*full.prompts} & {*world.training_captions()}
    words = [world.parse_caption(prompt) for prompt in full.prompts]
    for place, known in enumerate((world.SHAPES, world.COLOURS, world.BACKGROUNDS, world.DIRECTIONS)):
        assert {combination[place] for combination in words} == {*known}
    assert suite.held_out_prompts(5) == full.prompts[:5]  # a larger run goes on with what a smaller one made
    assert len({*suite.held_out_prompts(len(world.held_out_captions()))}) == len(world.held_out_captions())
    assert full.supports_claims
    assert not suite.plan(model, quick=True).supports_claims
    assert not suite.plan(model, prompts=31).supports_claims
    assert not suite.plan(model, seeds=1).supports_claims
    assert not suite.plan(model, rows=["packforcing", "window"]).supports_claims
    assert not suite.plan(model, seconds=(60,)).supports_claims
    assert suite.plan(model, seconds=(30, 60, 120)).supports_claims


def test_a_length_that_is_the_beginning_of_a_longer_one_makes_no_video_of_its_own(model: VideoModel) -> None:
    def blocks(*seconds: float) -> set[int]:
        plan = suite.plan(model, rows=["window"], seconds=seconds, prompts=1, seeds=1)
        return {video.blocks for video in plan.videos() if video.kind == "follow"}

    assert blocks(60, 120) == {120}
    assert blocks(25, 120) == {25, 120}


# -- measures -------------------------------------------------------------------------------------------------


def test_the_first_segments_of_a_longer_video_are_the_shorter_video(model: VideoModel) -> None:
    video = suite.Video("follow", "sink-0", {"sink_blocks": 0}, suite.plan(model).prompts[0], 5, 4)
    longer = suite.follow(model, video, segment_blocks=1)
    shorter = suite.follow(model, replace(video, blocks=2), segment_blocks=1)
    assert len(longer) == 4
    assert longer[:2] == shorter


def test_segments_are_ten_seconds_and_a_short_rest_joins_the_last() -> None:
    assert suite.segments_of(6, 2) == [0, 0, 1, 1, 2, 2]
    assert suite.segments_of(14, 10) == [0] * 14
    assert suite.segments_of(15, 10) == [0] * 10 + [1] * 5
    assert suite.segments_of(3, 10) == [0] * 3


def test_a_segment_of_rendered_truth_is_all_right_and_a_damaged_one_is_not() -> None:
    scene = world.scene_for(3, held_out=True)
    clip = world.render(scene, 0, 160)
    picture = detectors.background_picture(clip)
    right = suite.read_segment(clip, scene.caption, picture, picture)
    assert all(right[word] for word in (*suite.WORDS, "count"))
    assert right["moves"]
    assert right["background_correlation"] == 1
    assert right["speed"] == pytest.approx(scene.speed, rel=0.05)
    still = clip[:1].expand(160, -1, -1, -1)
    frozen = suite.read_segment(still.contiguous(), scene.caption, picture, picture)
    assert not frozen["moves"]
    assert not frozen["direction"]
    shifted = clip.roll(1, dims=-1)  # red becomes green
    recoloured = suite.read_segment(shifted, scene.caption, detectors.background_picture(shifted), picture)
    assert not recoloured["colour"]
    darker = detectors.background_picture(clip // 2)
    faded = suite.read_segment(clip // 2, scene.caption, darker, picture)
    assert faded["background_drift"] == pytest.approx(float(picture.mean()) / 2, abs=1)


def test_a_picture_set_anew_is_a_jump_and_movement_is_none() -> None:
    """Of several scenes, also across the wrap-around; then one of them goes on as another scene."""
    for seed in range(6):
        frames = world.render(world.scene_for(seed), 0, 13 + 16 * 29)
        found = suite.moved(steps_of(frames), 0)
        assert found["jumps"] == 0
        assert found["motion"] == pytest.approx(100 * 16 * world.scene_for(seed).speed / 64, rel=0.35)
        assert found["dynamic_degree"] == 100
        other = world.render(world.scene_for(seed + 50), 0, 13 + 16 * 29)
        reset = steps_of(torch.cat((frames[:269], other[269:])))
        assert [suite.moved(reset[:n], max(0, n - 1))["jumps"] for n in (66, 72)] == [0, 0]
        assert json.loads(json.dumps(suite.moved(reset, 60)))["jumps"] == 1
        assert suite.moved(reset, 72)["jumps"] == 0


def test_a_still_video_has_no_dynamic_degree() -> None:
    frames = world.render(world.scene_for(1), 0, 1).expand(13 + 16 * 9, -1, -1, -1)
    assert suite.moved(steps_of(frames), 0) == {"steps": 39, "motion": 0, "dynamic_degree": 0, "jumps": 0}


def steps_of(frames: torch.Tensor) -> list[suite.Step]:
    """Block by block, as the suite reads a stream; one entry a latent frame after the first."""
    steps, before, start = list[suite.Step](), None, 0
    for end in range(13, len(frames) + 1, 16):
        steps += suite.steps_of(frames[start:end], before, len(steps))
        before, start = frames[end - 1], end
    return steps


# -- recall ---------------------------------------------------------------------------------------------------


@pytest.fixture
def short_recall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "DELAYS", (1, 2))
    for name in ("VISIT_BEGINS", "VISIT_SECONDS", "READ_SECONDS", "BACK_SECONDS"):
        monkeypatch.setattr(suite, name, 1)


def test_each_recall_is_the_video_of_its_own_timeline(
    model: VideoModel, monkeypatch: pytest.MonkeyPatch, short_recall: None
) -> None:
    """The branches go on from a state; what the detector gets is what one long video shows."""
    seen: list[torch.Tensor] = []

    def look(clip: torch.Tensor) -> dict[str, Any]:
        seen.append(clip)
        return {"present": len(seen) in (1, 3), "colour": "red", "shape": "tall"}

    monkeypatch.setattr(suite, "see_visitor", look)
    caption = suite.plan(model).prompts[0]
    grid = suite.plan(model).grid
    video = suite.Video("recall", "packforcing", {"sink_blocks": 1}, caption, 3, 6)
    result = suite.recall(model, video, grid=grid, fps=16)
    assert result == {
        "first": {"present": True, "colour": "red", "shape": "tall"},
        "delays": {
            "1": {"hidden": True, "again": {"present": True, "colour": "red", "shape": "tall"}},
            "2": {"hidden": True, "again": {"present": False, "colour": "red", "shape": "tall"}},
        },
    }
    here, away = (world.caption_of(world.parse_caption(caption), visitor=value) for value in (True, False))
    assert here.endswith(", the visitor is here")
    guided = model.manifest.schedule.guidance != 1
    story = encode_script(model, Script((away, here, away, here), (0, 1, 2, 4), (0,) * 4), guided=guided)
    memory = suite.memory_of(model, {"sink_blocks": 1})
    whole = [b.frames for b in stream_generate(model, story, num_blocks=5, seed=3, memory=memory)]
    assert torch.equal(seen[0], whole[1])
    assert torch.equal(seen[3], whole[3])
    assert torch.equal(seen[4], whole[4])


def recall_line(first: str, again: dict[int, str], *, hidden: bool = True) -> dict[str, Any]:
    def look(text: str) -> dict[str, Any]:
        colour, _, shape = text.partition(" ")
        return {"present": bool(text), "colour": colour or "none", "shape": shape or "none"}

    return {
        "first": look(first),
        "delays": {
            str(delay): {"hidden": hidden, "again": look(again.get(delay, ""))} for delay in suite.DELAYS
        },
    }


def recall_report(plan: suite.Suite, tmp_path: Path, answers: list[dict[str, Any]]) -> dict[str, Any]:
    journal = suite.Journal(tmp_path / "videos.jsonl", plan)
    videos = [video for video in plan.videos() if video.kind == "recall"]
    for video, answer in zip(videos, answers, strict=True):
        journal.add({**suite.line_key(plan, video), **answer})
    return suite_report._recall(plan, journal)


def knowing(model: VideoModel, **options: Any) -> suite.Suite:
    plan = suite.plan(model, rows=["packforcing"], seeds=1, **options)
    return replace(plan, knows_visitor=True)


def test_recall_counts_what_is_the_same_as_at_the_first_visit(model: VideoModel, tmp_path: Path) -> None:
    answers = [
        recall_line("red tall", {2: "red tall", 5: "red wide", 10: "blue wide"}),
        recall_line("blue wide", {2: "blue wide", 5: "green wide"}),
        recall_line("", {2: "red tall"}),  # never came: says nothing
        recall_line("red tall", {2: "red tall"}, hidden=False),  # never went: says nothing
    ]
    found = recall_report(knowing(model, prompts=4), tmp_path, answers)
    row = found["rows"]["packforcing"]
    assert found["learned"]
    assert row["obeys"] == 0.5
    assert row["delays"]["2"]["videos"] == 2
    means = {
        d: (e["colour"]["mean"], e["shape"]["mean"], e["present"]["mean"]) for d, e in row["delays"].items()
    }
    assert means == {"2": (1, 1, 1), "5": (0.5, 0.5, 1), "10": (0, 0, 0.5), "20": (0, 0, 0)}
    assert row["delays"]["2"]["colour"]["shuffled"] == 0  # the other video's was never this one's
    assert row["delays"]["5"]["shape"]["shuffled"] == row["delays"]["5"]["shape"]["chance"] == 0.5
    assert row["delays"]["2"]["shape"]["chance"] == pytest.approx(1 / 3, abs=1e-3)
    assert 1 / 5 < row["delays"]["2"]["colour"]["guess"] < 1 / 3


def test_a_visitor_that_does_not_obey_is_not_learned_and_gives_no_numbers(
    model: VideoModel, tmp_path: Path
) -> None:
    answers = [recall_line("", {}), recall_line("", {}), recall_line("red tall", {2: "red tall"})]
    found = recall_report(knowing(model, prompts=3), tmp_path, answers)
    assert found["learned"] is False
    assert "has not learned it" in found["said"]
    assert "rows" not in found


def test_a_model_without_the_visitors_words_has_not_learned_it(model: VideoModel, tmp_path: Path) -> None:
    plan = replace(suite.plan(model, rows=["packforcing"], seeds=1, prompts=1), knows_visitor=False)
    assert {video.kind for video in plan.videos()} == {"follow"}
    found = suite_report._recall(plan, suite.Journal(tmp_path / "videos.jsonl", plan))
    assert found["learned"] is None
    assert "has not learned it" in found["said"]


# -- the journal ----------------------------------------------------------------------------------------------


def small_plan(model: VideoModel, **options: Any) -> suite.Suite:
    plan = suite.plan(model, rows=["window"], prompts=2, seeds=1, seconds=(60,), **options)
    return replace(plan, knows_visitor=False)


def test_a_line_counts_for_its_model_version_and_memory_only(model: VideoModel, tmp_path: Path) -> None:
    plan, path = small_plan(model), tmp_path / "videos.jsonl"
    first, second = plan.videos()
    suite.Journal(path, plan).add({**suite.line_key(plan, first), "segments": []})
    assert suite.to_do(plan, suite.Journal(path, plan)) == [second]
    for changed in (
        replace(plan, model="another"),
        replace(plan, rows=tuple(replace(r, memory={**r.memory, "recent_blocks": 9}) for r in plan.rows)),
    ):
        again = suite.Journal(path, changed)
        assert len(suite.to_do(changed, again)) == 2
    assert "another model or version" in suite.Journal(path, replace(plan, model="another")).dropped[0]


def test_the_hash_of_a_model_depends_on_its_weights_and_schedule(model: VideoModel) -> None:
    own = suite.model_hash(model)
    assert own == suite.model_hash(load_model("demo", device="cpu"))
    weights = replace(model, hashes={**model.hashes, "transformer": "0" * 64})
    schedule = model.manifest.schedule.model_copy(update={"guidance": 3.0})
    other = replace(model, manifest=model.manifest.model_copy(update={"schedule": schedule}))
    cache = model.manifest.cache.model_copy(update={"mid_span": "2"})
    memory = replace(model, manifest=model.manifest.model_copy(update={"cache": cache}))
    assert len({own, *map(suite.model_hash, (weights, other, memory))}) == 4


def test_a_line_cut_by_a_kill_is_made_again_and_overwritten(model: VideoModel, tmp_path: Path) -> None:
    plan, path = small_plan(model), tmp_path / "videos.jsonl"
    first, second = plan.videos()
    suite.Journal(path, plan).add({**suite.line_key(plan, first), "segments": []})
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:100])
    journal = suite.Journal(path, plan)
    assert "cut off" in journal.dropped[0]
    assert suite.to_do(plan, journal) == [second]
    journal.add({**suite.line_key(plan, second), "segments": []})
    assert path.read_bytes().startswith(whole)
    assert len(lines(path)) == 2
    assert suite.to_do(plan, suite.Journal(path, plan)) == []


def test_a_longer_video_serves_and_a_shorter_one_does_not(model: VideoModel, tmp_path: Path) -> None:
    plan, journal = small_plan(model), suite.Journal(tmp_path / "videos.jsonl", small_plan(model))
    first = next(plan.videos())
    journal.add({**suite.line_key(plan, replace(first, blocks=120)), "segments": []})
    assert journal.find(plan, first) is not None
    assert journal.find(plan, replace(first, blocks=55)) is None  # ends inside a segment
    assert journal.find(plan, replace(first, blocks=130)) is None


def test_a_file_of_something_else_is_refused(model: VideoModel, tmp_path: Path) -> None:
    path = tmp_path / "videos.jsonl"
    path.write_text('{"hello": 1}\n', encoding="utf-8")
    with pytest.raises(UsageError, match="line 1, is not a line of the suite"):
        suite.Journal(path, small_plan(model))


def test_a_video_that_breaks_down_is_a_result_and_is_named(
    model: VideoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small_plan(model)
    monkeypatch.setattr(suite, "stream_generate", broken)
    line = suite.make(model, plan, next(plan.videos()))
    assert line["failed"] == "block 3 is not finite"
    journal = suite.Journal(tmp_path / "videos.jsonl", plan)
    journal.add(line)
    report = suite_report.build(plan, journal, layouts(model, plan), command="again")
    window = report["lengths"]["60"]["window"]
    assert window["videos"] == 0
    assert [window["segments"][-1][name]["mean"] for name in ("all", "shape")] == [0, 0]  # missing is wrong
    assert window["segments"][-1]["speed"]["mean"] is None
    assert "block 3 is not finite" in suite_report.markdown(report).split("## Videos that broke down")[1]


def broken(*_: Any, **__: Any) -> Any:
    raise GenerationError("block 3 is not finite")


# -- statistics -----------------------------------------------------------------------------------------------


def layouts(model: VideoModel, plan: suite.Suite) -> Callable[[suite.Row, int], Layout]:
    return lambda row, blocks: layout_for(
        model, suite.memory_of(model, row.memory), plan.grid, num_blocks=blocks
    )


def test_intervals_are_those_of_the_mean_over_prompts() -> None:
    """Against the normal approximation; two equal seeds of a prompt are one observation."""
    values = np.random.default_rng(1).normal(3.0, 2.0, (64, 1))
    mean, low, high = suite_report.mean_interval(values)
    half = 1.96 * values.std() / 8
    assert mean == pytest.approx(values.mean())
    assert (low, high) == (pytest.approx(mean - half, abs=0.15), pytest.approx(mean + half, abs=0.15))
    assert suite_report.mean_interval(np.repeat(values, 2, axis=1)) == pytest.approx((mean, low, high))
    missing = np.concatenate((values, np.full((9, 1), np.nan)))
    assert suite_report.mean_interval(missing) == pytest.approx((mean, low, high), abs=0.1)
    assert all(math.isnan(number) for number in suite_report.mean_interval(np.full((3, 2), np.nan)))


def made_up(plan: suite.Suite, tmp_path: Path, right: Callable[[str, int, int], float]) -> suite.Journal:
    """A journal in which right(row, prompt, segment) says what every share is."""
    journal = suite.Journal(tmp_path / "videos.jsonl", plan)
    for video in plan.videos():
        segments = []
        for n in range(video.blocks // 10):
            value = right(video.row, plan.prompts.index(video.prompt), n)
            segments.append(
                {**dict.fromkeys(suite_report.MEASURES, value), "speed": 2.0 - n / 10, "jumps": n == 1}
            )
        journal.add({**suite.line_key(plan, video), "segments": segments})
    return journal


def test_the_report_has_shares_paired_differences_and_a_table_and_plots(
    model: VideoModel, tmp_path: Path
) -> None:
    """Half the prompts fail in the last segment with the window; all else is right."""
    plan = suite.plan(model, rows=["packforcing", "window"], prompts=32, seeds=2, seconds=(60, 120))
    plan = replace(plan, knows_visitor=False)

    def right(row: str, prompt: int, segment: int) -> float:
        return float(row == "packforcing" or prompt % 2 == 0 or segment < 11)

    report = suite_report.build(plan, made_up(plan, tmp_path, right), layouts(model, plan), command="again")
    assert not report["supports_claims"]  # two rows of all
    assert report["videos"] == {"done": 128, "wanted": 128}
    window = report["lengths"]["120"]["window"]
    share = window["segments"][11]["shape"]
    assert share["mean"] == 0.5
    assert share["by_seed"] == [0.5, 0.5]
    assert 0.25 < share["interval"][0] < 0.4 < 0.6 < share["interval"][1] < 0.75
    assert window["segments"][10]["shape"]["interval"] == [1, 1]
    assert window["against_reference"]["shape"]["difference"] == -0.5
    assert window["against_reference"]["jumps"] == {"difference": 0, "interval": [0, 0], "prompts": 32}
    assert report["lengths"]["60"]["window"]["against_reference"]["shape"]["difference"] == 0
    assert window["whole"]["jumps"]["mean"] == pytest.approx(16 * 60 / 1917, abs=1e-4)
    assert window["whole"]["speed_ratio"]["mean"] == pytest.approx(0.9 / 2)
    assert {entry["name"] for entry in report["not_run"]} == {row.name for row in plan.rows} - {
        "packforcing",
        "window",
    }
    report["lengths"].pop("60")
    written = suite_report.write(report, tmp_path)
    assert json.loads((tmp_path / "suite.json").read_text("utf-8")) == report
    text = (tmp_path / "suite.md").read_text("utf-8")
    assert "supports no claim" in text
    assert "supports no claim" not in suite_report.markdown({**report, "supports_claims": True})
    row = next(line for line in text.split("## 120 s")[1].splitlines() if line.startswith("| window |"))
    assert row.split(" | ")[1] == "64"
    assert row.split(" | ")[3].startswith("0.50 (")
    pictures = [path for path in written if path.suffix == ".png"]
    assert {path.name for path in pictures} >= {"over-time-policy-120s.png", "differences-120s.png"}
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.width > 600
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24) or []) > 20


def test_scores_for_a_manifest_are_those_of_the_models_own_memory(model: VideoModel, tmp_path: Path) -> None:
    plan = replace(
        suite.plan(model, rows=["packforcing"], prompts=4, seeds=1, seconds=(60,)), knows_visitor=False
    )
    journal = made_up(plan, tmp_path, lambda row, prompt, segment: float(segment == 0 or prompt == 0))
    report = suite_report.build(plan, journal, layouts(model, plan), command="again")
    found = suite_report.scores(report)["of 60 seconds"]
    assert found["first segment"]["shape"]["mean"] == 1
    assert found["last segment"]["shape"]["mean"] == 0.25


# -- the command ----------------------------------------------------------------------------------------------


def test_the_command_makes_what_is_missing_and_nothing_twice(
    run_command: Callable[..., CommandResult], tmp_path: Path, no_calibration: None, no_visitor: None
) -> None:
    done = run_command(*SMALL)
    assert (done.code, done.err) == (0, "")
    assert "supports no claim" in done.out
    assert "| packforcing | 1 |" in done.out
    path = tmp_path / "out" / "videos.jsonl"
    before = path.read_bytes()
    assert [line["row"] for line in lines(path)] == ["packforcing", "window"]
    path.write_bytes(before[: before.index(b"\n") + 30])  # as a kill leaves it
    again = run_command(*SMALL[:-1])
    assert again.code == 0
    assert "was cut off and is made again" in again.err
    assert "Videos: 2, 1 to make." in again.err
    assert "measured on this machine" in again.err
    assert "1/1 window" in again.err
    assert "No recall test: demo does not know the visitor's words" in again.err
    assert without_time(path.read_bytes()) == without_time(before)
    report = json.loads(run_command(*SMALL, "--json").out)
    assert report["videos"] == {"done": 2, "wanted": 2}
    assert path.read_bytes().count(b"\n") == 2
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"suite.json", "suite.md", "differences-2s.png"}


def without_time(text: bytes) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in json.loads(line).items() if name != "wall_seconds"}
        for line in text.splitlines()
    ]


def test_another_process_makes_the_same_videos(model: VideoModel) -> None:
    plan = suite.plan(model, rows=["packforcing", "window"], prompts=1, seeds=1, seconds=(1,))
    videos = [video for video in plan.videos() if video.kind == "follow"]
    beside = list(suite._run_beside("demo", "cpu", plan, videos, jobs=1))
    alone = [suite.make(model, plan, video) for video in videos]
    assert len(alone) == 2
    for one, other in zip(beside, alone, strict=True):
        assert {**one, "wall_seconds": 0} == {**other, "wall_seconds": 0}


def test_a_worker_hands_its_error_over_whole(model: VideoModel) -> None:
    plan = suite.plan(model, rows=["window"], prompts=1, seeds=1, seconds=(1,))
    ours, theirs = multiprocessing.Pipe()
    suite._work(theirs, "nowhere", "cpu", plan, 1)
    error = ours.recv()
    assert isinstance(error, UsageError)
    assert "nowhere" in error.message
    assert error.hint


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(
    run_command: Callable[..., CommandResult],
    tmp_path: Path,
    no_calibration: None,
    no_visitor: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = suite.make

    def interrupted(model: VideoModel, plan: suite.Suite, video: suite.Video) -> dict[str, Any]:
        if video.row == "window":
            raise KeyboardInterrupt
        return make(model, plan, video)

    monkeypatch.setattr(suite, "make", interrupted)
    done = run_command(*SMALL)
    assert done.code == 130
    assert "To go on: packforcing eval --suite demo" in done.err
    assert [line["row"] for line in lines(tmp_path / "out" / "videos.jsonl")] == ["packforcing"]
    assert "1 of 2 videos" in done.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "other"], "there is no suite 'other'"),
        (["--rows", "windw"], "the nearest is 'window'"),
        (["--prompts", "0"], "--prompts 0: must be 1 to"),
        (["--seeds", "0"], "--seeds 0: must be 1 to 100"),
        (["--seconds", "nan"], "--seconds nan: must be"),
        (["--seconds", "ten"], "must be numbers with commas"),
        (["--rows", ","], "--rows is empty"),
        (["--record"], "--record needs the folder of a package"),
        (["--model", "nowhere"], "nowhere"),
        (["--clip", "some/model"], "--clip does not go with --suite"),
        (["a.mp4"], "VIDEO does not go with --suite"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_message(
    arguments: list[str], said: str, run_command: Callable[..., CommandResult], tmp_path: Path
) -> None:
    given = ["--suite", "demo", *arguments] if "--suite" not in arguments else arguments
    done = run_command("eval", *given, "--out", "out")
    assert done.code == 2
    assert said in done.err
    assert done.err.count("error:") == 1
    assert not (tmp_path / "out").exists()


def test_options_of_the_suite_need_it(run_command: Callable[..., CommandResult]) -> None:
    done = run_command("eval", "a.mp4", "--rows", "window")
    assert done.code == 2
    assert "--rows needs --suite demo" in done.err


def test_a_folder_of_other_things_is_left_alone(
    run_command: Callable[..., CommandResult], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine", encoding="utf-8")
    done = run_command(*SMALL)
    assert done.code == 2
    assert "holds no results of the suite" in done.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_two_processes_do_not_write_one_folder(
    run_command: Callable[..., CommandResult], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    with runfolder.hold(tmp_path / "out"):
        done = run_command(*SMALL)
    assert done.code == 9
    assert "is working on" in done.err


def test_a_dry_run_says_how_long_and_makes_nothing(
    run_command: Callable[..., CommandResult], tmp_path: Path, no_calibration: None
) -> None:
    done = run_command("eval", "--suite", "demo", "--dry-run", "--out", "out")
    assert done.code == 0
    assert "About 2 h" in done.err or "About" in done.err
    assert "full: everything at full resolution" in done.out
    assert "sink-2: is the same memory as packforcing" in done.err
    assert not (tmp_path / "out").exists()


def test_the_time_is_the_sum_of_the_blocks_and_falls_with_the_tokens(model: VideoModel) -> None:
    plan = suite.plan(model, rows=["packforcing", "full"], prompts=1, seeds=1, seconds=(60,))
    videos = [video for video in plan.videos() if video.kind == "follow"]
    flat = suite.estimate(model, plan, videos, suite.Pace(0.5, 0.0, 0.0, 0.25))
    assert flat == [45.0, 45.0]
    packed, full = suite.estimate(model, plan, videos, suite.Pace(0.0, 1.0, 0.0, 0.0))
    assert full == 128 * 60 * 61 / 2
    assert packed < full / 5
