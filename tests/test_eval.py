"""packforcing eval VIDEO|RUN…, as a person and as a program sees it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import tiny_clip
from conftest import CommandResult
from hub_server import HubServer
from numpy.typing import NDArray

from packforcing_cli import __version__, metrics, runfolder
from packforcing_cli.config import GenerateRequest
from packforcing_cli.provenance import ModelRecord, Provenance
from packforcing_cli.quiet import known_import_noise_dropped
from packforcing_cli.runfolder import Record
from packforcing_cli.timeline import Timeline, parse_at
from packforcing_cli.training.world import FPS, render, scene_for
from packforcing_cli.video import VideoWriter, part_path

Run = Callable[..., CommandResult]
PROMPT = "a red circle moving right on a blue background"

# The frozen shape of `eval --json`, schema 1, of each video. A changed or lost key needs a new schema number.
CURVES = [
    "motion",
    "flicker",
    "noise",
    "sharpness",
    "contrast",
    "saturation",
    "brightness",
    "colour drift",
    "change",
]
SHAPE: dict[str, Any] = {
    "name": str,
    "path": str,
    "size": list,
    "fps": float,
    "frames": int,
    "seconds": float,
    "segments": list,
    "mean": dict.fromkeys(CURVES, float),
    "by_segment": dict.fromkeys(CURVES, list),
    "dynamic_degree": float,
    "repetition": {"strength": float, "period": float, "start": float, "end": float, "loops": bool},
    "jumps": list,
    "seam": {"seconds": float, "delta_e": float, "jump": float, "own_motion": float},
    "over_distance": dict.fromkeys(
        ["seconds", "colour", "brightness", "contrast", "saturation", "sharpness", "picture"], list
    ),
    "curves": {name: {"seconds": list, "values": list} for name in CURVES},
    "findings": list,
    "notes": list,
    "prompts": list,
    "clip": {"model": str, "mean": float, "by_segment": list, "drop": float, "seconds": list, "values": list,
             "notes": list},
}  # fmt: skip


def shape_of(values: Any, like: Any) -> Any:
    if isinstance(like, dict):
        return {key: shape_of(value, like.get(key)) for key, value in values.items()}
    return type(values)


def frames_of(seconds: float = 4, seed: int = 3) -> NDArray[np.uint8]:
    frames: NDArray[np.uint8] = render(scene_for(seed), 0, round(seconds * FPS)).numpy()
    return frames


def video(
    path: Path,
    frames: NDArray[np.uint8] | None = None,
    *,
    tags: dict[str, str] | None = None,
    chapters: tuple[tuple[int, str], ...] = (),
    finish: bool = True,
) -> Path:
    frames = frames_of() if frames is None else frames
    writer = VideoWriter(
        path, fps=FPS, width=frames.shape[2], height=frames.shape[1], metadata=tags or {}, chapters=chapters
    )
    writer.write(frames)
    if finish:
        writer.close()
    else:
        writer.abort()
    return path


def request(**changes: Any) -> GenerateRequest:
    return GenerateRequest(prompt=PROMPT, seed=3, **changes)


def tags(extends: str | None = None, **changes: Any) -> dict[str, str]:
    return Provenance(
        version=__version__,
        request=request(**changes).to_values(),
        model=ModelRecord(name="demo", version="1"),
        layout={"frames_per_block": 4},
        extends=extends,
    ).tags()


def run_of(folder: Path, output: Path, **changes: Any) -> Path:
    """A run folder with what eval reads of it."""
    values: dict[str, Any] = {
        "schema": 1,
        "id": "a-run-1",
        "version": __version__,
        "created": datetime.now(UTC),
        "status": "finished",
        "prompt": PROMPT,
        "output": str(output),
        "blocks": 5,
        "fps": FPS,
        "size": (128, 64),
        "frames_per_block": 4,
        "request": request().to_values(),
        "tags": {},
        "must": {"model": "demo"},
        "numerics": {},
    }
    folder.mkdir(parents=True)
    (folder / runfolder.HEADER).write_text(Record(**(values | changes)).to_json(), "utf-8")
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with known_import_noise_dropped():
        return tiny_clip.save(tmp_path_factory.mktemp("clip"))


# ------------------------------------------------------------------------------------------------- what is measured


def test_a_table_says_what_was_measured_and_what_stands_out(run_command: Run, tmp_path: Path) -> None:
    dark = (frames_of() * np.linspace(1, 0.3, 4 * FPS)[:, None, None, None]).astype(np.uint8)
    video(tmp_path / "good.mp4")
    video(tmp_path / "dark.mp4", dark)
    done = run_command("eval", "good.mp4", "dark.mp4")
    assert done.code == 0, done.err
    for name in metrics.MEASURES:
        assert name in done.out or name in ("seam", "CLIP", "over distance"), name
    assert "good.mp4" in done.out and "dark.mp4" in done.out and "--explain" in done.out
    assert "dark.mp4: its colours drift" in done.out
    assert "good.mp4: its colours drift" not in done.out
    assert "only its pixels are measured" in done.out
    assert done.err.splitlines() == ["measuring good.mp4 …", "measuring dark.mp4 …"]
    assert run_command("eval", "good.mp4", "-q").err == ""


def test_json_has_the_frozen_shape(run_command: Run, tmp_path: Path, clip_folder: Path) -> None:
    video(tmp_path / "a.mp4", frames_of(5), tags=tags(extends="packforcing extend old.mp4 --seconds 2"))
    done = run_command("eval", "a.mp4", "--json", "--clip", str(clip_folder))
    assert done.code == 0, done.err
    values = json.loads(done.out)
    assert values["schema"] == 1 and list(values) == ["schema", "videos", "plot"]
    (found,) = values["videos"]
    assert shape_of(found, SHAPE) == SHAPE
    assert found["seam"]["seconds"] == 3.0
    assert found["prompts"] == [{"seconds": 0.0, "prompt": PROMPT}]
    assert found["notes"] == [] and found["clip"]["model"] == str(clip_folder)
    assert found["clip"]["seconds"] == [0.5, 1.5, 2.5, 3.5, 4.5]


def test_a_plot_is_a_png_and_never_replaces_one_unasked(run_command: Run, tmp_path: Path) -> None:
    from PIL import Image

    video(tmp_path / "a.mp4")
    video(tmp_path / "short.mp4", frames_of(0.1))
    done = run_command("eval", "a.mp4", "short.mp4", "--plot", "p.png", "-q")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "p.png"
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 500
        assert np.asarray(picture.convert("L")).std() > 10
    before = (tmp_path / "p.png").read_bytes()
    refused = run_command("eval", "a.mp4", "--plot", "p.png")
    assert refused.code == 2 and "p.png exists" in refused.err
    assert (tmp_path / "p.png").read_bytes() == before
    assert run_command("eval", "a.mp4", "--plot", "p.png", "--overwrite", "-q").code == 0
    assert (tmp_path / "p.png").read_bytes() != before


def test_explain_prints_the_docstrings(run_command: Run) -> None:
    done = run_command("eval", "--explain")
    assert done.code == 0 and done.err == ""
    for measure in metrics.MEASURES.values():
        for line in metrics.definition(measure).splitlines():
            assert line.rstrip() in done.out
    values = json.loads(run_command("eval", "--explain", "--json").out)
    assert values["definitions"]["jumps"] == metrics.definition(metrics.jumps)


# ------------------------------------------------------------------------------------------------- whose video it is


def test_a_run_is_its_video_and_its_prompts_are_on_its_blocks(run_command: Run, tmp_path: Path) -> None:
    timeline = Timeline(parse_at([("0:02", "a blue square"), ("0:03.9", "night [blend 1s]")]))
    video(tmp_path / "a.mp4", frames_of(5))
    folder = run_of(tmp_path / "run", tmp_path / "a.mp4", request=request(timeline=timeline).to_values())
    (found,) = json.loads(run_command("eval", str(folder), "--json").out)["videos"]
    assert found["path"] == str(tmp_path / "a.mp4") and found["name"] == str(folder)
    # Blocks begin at frames 0, 13, 29, 45, 61, 77.
    assert found["prompts"] == [
        {"seconds": 0.0, "prompt": PROMPT},
        {"seconds": pytest.approx(29 / FPS, rel=1e-4), "prompt": "a blue square"},
        {"seconds": pytest.approx(61 / FPS, rel=1e-4), "prompt": "night"},
    ]
    assert "its prompt changes at 0:01.8, 0:03.8" in run_command("eval", str(folder)).out


def test_a_run_is_found_by_its_id_and_may_be_unfinished_or_without_video(
    run_command: Run, tmp_path: Path
) -> None:
    output = tmp_path / "a.mp4"
    run_of(runfolder.default_root() / "a-run-1", output, status="running")
    gone = run_command("eval", "a-run-1")
    assert gone.code == 2 and "has no video" in gone.err and "packforcing resume" in gone.err
    video(output, finish=False)
    assert part_path(output).exists() and not output.exists()
    (found,) = json.loads(run_command("eval", "a-run", "--json").out)["videos"]
    assert found["path"] == str(part_path(output)) and "unfinished" in found["notes"][0]


def test_a_files_prompts_are_its_chapters_or_its_timeline(tmp_path: Path) -> None:
    plain = metrics.find(str(video(tmp_path / "plain.mp4", tags=tags())))
    assert plain.prompts == ((0.0, PROMPT),) and plain.seam is None and plain.notes == ()
    chapters = ((0, "one"), (29, "two"))
    ours = metrics.find(str(video(tmp_path / "ours.mp4", tags=tags(), chapters=chapters)))
    assert [text for _, text in ours.prompts] == ["one", "two"]
    assert ours.prompts[1][0] == pytest.approx(29 / FPS, abs=0.01)
    assert ours.prompt_at(0) == ours.prompt_at(1.8) == "one" and ours.prompt_at(1.82) == "two"
    theirs = metrics.find(str(video(tmp_path / "theirs.mp4", chapters=chapters)))
    assert theirs.prompts == () and "only its pixels" in theirs.notes[0]
    timeline = Timeline(parse_at([("0:02", "a blue square")]))
    timed = metrics.find(str(video(tmp_path / "timed.mp4", tags=tags(timeline=timeline))))
    assert [text for _, text in timed.prompts] == [PROMPT, "a blue square"]


@pytest.mark.parametrize(
    ("extends", "expected"),
    [
        ("packforcing extend 'my clip.mp4' --seconds 1.5 --prompt x", 2.5),
        ("packforcing extend clip.mp4 --seconds 1.5 --only-new", None),
        ("packforcing extend run --from 2 --seconds 99", 2.0),
        ("packforcing extend clip.mp4 --seconds 99", None),
        ("packforcing extend run --seconds soon", None),
        ("packforcing extend run --seconds", None),
    ],
)
def test_a_seam_is_where_the_command_says_that_the_new_part_begins(
    extends: str, expected: float | None, tmp_path: Path
) -> None:
    assert metrics.find(str(video(tmp_path / "a.mp4", tags=tags(extends)))).seam == expected
    assert shlex.split(extends)[0] == "packforcing"


def test_a_run_that_goes_on_with_a_file_knows_its_seam_and_its_prompts(tmp_path: Path) -> None:
    timeline = Timeline(parse_at([("0:00.8", "one"), ("0:04", "two")]))  # seconds of the memory
    for only_new, seam, prompts in (
        (False, (5 + 29) / FPS, [(0.0, PROMPT), ((5 + 13) / FPS, "one"), ((5 + 61) / FPS, "two")]),
        (True, None, [(0.0, "one"), ((61 - 29) / FPS, "two")]),
    ):
        source = {"path": "clip.mp4", "sha256": "0" * 64, "blocks": 2, "lead": 5, "padded": 0}
        values = request(timeline=timeline, source={**source, "only_new": only_new}).to_values()
        folder = run_of(tmp_path / f"run-{only_new}", video(tmp_path / f"{only_new}.mp4"), request=values)
        found = metrics.find(str(folder))
        assert found.seam == seam and list(found.prompts) == prompts


def test_a_file_whose_run_is_here_asks_the_run(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", tags={**tags(), "run": "a-run-1"})
    timeline = Timeline(parse_at([("0:02", "from the run")]))
    run_of(runfolder.default_root() / "a-run-1", path, request=request(timeline=timeline).to_values())
    assert [text for _, text in metrics.find(str(path)).prompts] == [PROMPT, "from the run"]


def test_a_seam_can_be_given(run_command: Run, tmp_path: Path) -> None:
    joined = np.concatenate([frames_of(2), 255 - frames_of(2)])
    video(tmp_path / "a.mp4", joined)
    (found,) = json.loads(run_command("eval", "a.mp4", "--seam", "0:02", "--json").out)["videos"]
    assert found["seam"]["seconds"] == 2.0 and found["seam"]["delta_e"] > 20
    assert [jump["seconds"] for jump in found["jumps"]] == [2.0]
    assert "seam" in run_command("eval", "a.mp4", "--seam", "2s").out


def test_damaged_or_newer_metadata_leave_the_pixels(run_command: Run, tmp_path: Path) -> None:
    newer = {"packforcing": json.dumps({"schema": 99})}
    video(tmp_path / "newer.mp4", tags=newer)
    video(tmp_path / "odd.mp4", tags={"packforcing": "{"})
    done = run_command("eval", "newer.mp4", "odd.mp4", "--json")
    assert done.code == 0
    notes = [found["notes"][0] for found in json.loads(done.out)["videos"]]
    assert "newer packforcing" in notes[0] and "damaged" in notes[1]
    assert all("only its pixels are measured" in note for note in notes)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompts", "0"], "--prompts needs --suite demo"),
        (["--rows", ""], "--rows needs --suite demo"),
        (["--suite", "demo", "--prompt", ""], "--prompt does not go with --suite"),
        (["--explain", "a.mp4"], "VIDEO does not go with --explain"),
        (["--explain", "--plot", "p.png"], "--plot does not go with --explain"),
        (["--explain", "--seam", ""], "--seam does not go with --explain"),
    ],
)
def test_options_that_would_be_ignored_are_refused(run_command: Run, arguments: list[str], said: str) -> None:
    done = run_command("eval", *arguments)
    assert done.code == 2 and said in done.err


# ------------------------------------------------------------------------------------------------------------ CLIP


def test_clip_scores_come_from_the_hub_and_need_a_prompt(
    run_command: Run,
    tmp_path: Path,
    hub_server: HubServer,
    clip_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    # What HF_ENDPOINT does when huggingface_hub is imported.
    monkeypatch.setattr(constants, "ENDPOINT", hub_server.endpoint)
    template = hub_server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    commit = hub_server.add("somebody/clip", tiny_clip.files(clip_folder))
    video(tmp_path / "ours.mp4", tags=tags())
    video(tmp_path / "theirs.mp4")
    missing = run_command("eval", "ours.mp4", "--clip", "somebody/clip", "--offline")
    assert missing.code == 8 and "is not on this machine" in missing.err and "--clip a folder" in missing.err
    done = run_command("eval", "ours.mp4", "theirs.mp4", "--clip", "somebody/clip", "--json")
    assert done.code == 0, done.err
    ours, theirs = json.loads(done.out)["videos"]
    assert ours["clip"]["model"] == f"hf:somebody/clip@{commit}"
    assert theirs["clip"] is None and "its prompt is not known" in theirs["notes"][1]
    table = run_command("eval", "ours.mp4", "--clip", "somebody/clip", "--offline", "--plot", "p.png")
    assert table.code == 0 and "CLIP by segment" in table.out
    assert f"{ours['clip']['mean']:.2f}" in table.out
    given = run_command("eval", "theirs.mp4", "--clip", str(clip_folder), "--prompt", PROMPT, "--json")
    (same,) = json.loads(given.out)["videos"]
    assert same["clip"]["values"] == ours["clip"]["values"]
    refused = run_command("eval", "theirs.mp4", "--clip", str(clip_folder))
    assert refused.code == 2 and "needs a prompt" in refused.err


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to measure"),
        (["missing.mp4"], "there is no file missing.mp4"),
        (["no-such-run"], "there is no run"),
        (["a.mp4", "missing.mp4"], "there is no file missing.mp4"),
        (["."], "not a run folder"),
        (["a.mp4", "b.mp4", "--prompt", "x", "--clip", "c"], "--prompt is of one video"),
        (["a.mp4", "b.mp4", "--seam", "2"], "--seam is of one video"),
        (["a.mp4", "--prompt", "x"], "--prompt is for --clip"),
        (["a.mp4", "--offline"], "--offline is for --clip"),
        (["a.mp4", "--prompt", " ", "--clip", "c"], "--prompt is empty"),
        (["a.mp4", "--seam", "soon"], "no time"),
        (["a.mp4", "--seam", "1:00"], "not within"),
        (["a.mp4", "--plot", "p.jpg"], "a PNG is drawn"),
        (["a.mp4", "--plot", "no/p.png"], "no such folder"),
        (["a.mp4", "--overwrite"], "--overwrite is for --plot"),
        (["a.mp4", "--clip", "nowhere", "--prompt", "x"], "no such folder"),
    ],
)
def test_wrong_usage_is_refused_with_one_message(
    arguments: list[str], said: str, run_command: Run, tmp_path: Path
) -> None:
    for name in ("a.mp4", "b.mp4"):
        video(tmp_path / name, frames_of(0.5))
    done = run_command("eval", *arguments)
    assert done.code == 2 and done.out == ""
    assert said in " ".join(done.err.split()) and "Traceback" not in done.err
    assert done.err.count("error:") == 1 and "→" in done.err


def test_files_that_are_no_videos_are_exit_1(run_command: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("hello", "utf-8")
    with av.open(str(tmp_path / "sound.m4a"), "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=44100, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        sound.sample_rate, sound.time_base = 44100, Fraction(1, 44100)
        for packet in (*stream.encode(sound), *stream.encode(None)):
            container.mux(packet)
    for name, said in (
        ("empty.mp4", "cannot be read"),
        ("text.mp4", "cannot be read"),
        ("sound.m4a", "no video"),
    ):
        done = run_command("eval", name)
        assert done.code == 1 and said in done.err and done.out == "", name


def test_a_single_frame_and_a_cut_file_are_measured_as_far_as_they_go(
    run_command: Run, tmp_path: Path
) -> None:
    video(tmp_path / "one.mp4", frames_of()[:1])
    done = run_command("eval", "one.mp4")
    assert done.code == 0 and "there is no motion to measure" in done.out and "nan" not in done.out
    whole = video(tmp_path / "whole.mp4", frames_of(4)).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    cut = run_command("eval", "cut.mp4", "--json")
    (found,) = json.loads(cut.out)["videos"]
    assert cut.code == 0 and 16 < found["frames"] < 64
    assert f"it is cut off: {found['frames']} of its 64 frames are there" in found["notes"]
