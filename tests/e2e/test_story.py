"""Prompts over time and pins on the command line, with a tiny package of random weights."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_generate import assert_one_message, write_tiny

from packforcing_cli.reader import VideoReader


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("story") / "tiny")


@pytest.fixture
def generate(run_command: Any, package: Path) -> Callable[..., Any]:
    def run(*arguments: str) -> Any:
        return run_command("generate", *arguments, "--model", str(package), "--seed", "1")

    return run


def test_scenes_of_options_and_file_become_chapters_and_pins_are_shown(generate: Any, tmp_path: Path) -> None:
    (tmp_path / "scenes.txt").write_text("0:00 a red circle\n0:03 a circle [blend 1s]\n", encoding="utf-8")
    made = generate(
        "--timeline", "scenes.txt", "--at", "0:06", "red moving right [cut]", "--seconds", "8", "--pin", "0:02-0:03",
        "--progress", "json", "-o", "a.mp4", "--sink-blocks", "1",
    )  # fmt: skip
    assert made.code == 0, made.err
    chapters = VideoReader(tmp_path / "a.mp4").chapters
    assert [title for _, title in chapters] == ["a red circle", "a circle", "red moving right"]
    events = [json.loads(line) for line in made.err.splitlines()]
    blocks = [event for event in events if event["event"] == "block"]
    assert [block["pinned"] for block in blocks][5:] == [[2, 3]] * 3
    assert all({2, 3} <= set(block["recalled"]) for block in blocks[5:])


def test_the_plan_says_what_happens_when_and_its_command_repeats_it(generate: Any, run_command: Any) -> None:
    arguments = (
        "a red circle",
        "--at",
        "0:03.5",
        "a circle [blend 1s] [pin 2s]",
        "--at=0:12 red",
        "--seconds",
        "40",
    )
    plan = generate(*arguments, "--pin", "0:20-0:21", "--top-k", "5", "--dry-run")
    assert plan.code == 0, plan.err
    assert "from 0:03.8125, block 4, blended over 1: a circle" in plan.out
    assert "blocks 5, 6, 20, 21: 4 of 5 recalled, the rest is chosen" in plan.out
    assert "4 pinned blocks take 4 of the 5 places for recalled blocks; 1 are left to be chosen" in plan.err
    (command,) = [line for line in plan.out.splitlines() if line.startswith("command")]
    words = shlex.split(command)[2:]
    assert words[:8] == [
        "generate", "a red circle", "--at", "0:03.5", "a circle [blend 0:01] [pin 0:02]", "--at", "0:12", "red",
    ]  # fmt: skip
    again = run_command(*words, "--dry-run")
    assert again.out == plan.out


@pytest.mark.parametrize(
    ("arguments", "said", "next_step"),
    [
        (("--seconds", "3"), "there is no prompt", "packforcing generate"),
        (("a", "--at", "0:0x", "b"), "--at '0:0x', line 1, column 1: '0:0x' is no time", "--at 0:12"),
        (("a", "--at", "0:12", "--seed", "3"), "there is no prompt", "--at 0:12"),
        (("a", "--at", "0:12", "b"), "0:12 is past the end", "--at 0:12"),
        (("a", "--at", "0:00", "b"), "0:00 overlaps", "--at 0:12"),
        (("a", "--pin", "0:12"), "a pin is a stretch", "--pin 0:03-0:05"),
        (("a", "--pin", "0:06-0:09", "--top-k", "2"), "are pinned and the memory has room for 2", "--top-k"),
        (("a", "--timeline", "missing.srt"), "missing.srt cannot be read", "path"),
    ],
)  # fmt: skip
def test_mistakes_end_before_anything_is_made(
    arguments: tuple[str, ...], said: str, next_step: str, generate: Any, tmp_path: Path
) -> None:
    assert_one_message(generate(*arguments), 2, said, next_step)
    assert not list(tmp_path.glob("*.mp4"))


def test_a_video_begins_with_a_picture_and_says_when_the_model_does_not_know_how(
    generate: Any, tmp_path: Path
) -> None:
    Image.new("RGBA", (90, 40), (255, 0, 0, 255)).save(tmp_path / "first.png")
    for fit in ("crop", "pad", "stretch"):
        made = generate(
            "a red circle", "--image", "first.png", "--fit", fit, "--seconds", "1", "-o", f"{fit}.mp4"
        )
        assert made.code == 0, made.err
        assert "not trained to begin with a given picture" in made.err
    plan = generate("a red circle", "--image", "first.png", "--fit", "pad", "--dry-run")
    assert "--image first.png --fit pad" in plan.out
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    for name, said in (("missing.png", "there is no image missing.png"), ("text.png", "cannot be read")):
        assert_one_message(generate("a", "--image", name), 2, said, "")


# -- files that say how they were made ----------------------------------------------------------------------------


def frames(path: Path) -> bytes:
    return b"".join(frame.tobytes() for frame in VideoReader(path))


def test_a_file_says_how_it_was_made_and_is_made_again(
    generate: Any, run_command: Any, tmp_path: Path
) -> None:
    made = generate(
        "a red circle", "--at", "0:02", "a circle [cut]", "--top-k", "3", "--seconds", "3", "-o", "a.mp4"
    )
    assert made.code == 0, made.err
    again = run_command("generate", "--from", "a.mp4", "-o", "b.mp4")
    assert again.code == 0, again.err
    assert "not as it was" not in again.err
    assert frames(tmp_path / "b.mp4") == frames(tmp_path / "a.mp4")
    other = run_command("generate", "--from", "a.mp4", "--seed", "2", "--select", "fifo", "-o", "c.mp4")
    assert other.code == 0 and frames(tmp_path / "c.mp4") != frames(tmp_path / "a.mp4")
    values = json.loads(run_command("show", "c.mp4", "--json").out)
    assert (values["request"]["seed"], values["request"]["memory"]["select"]) == (2, "fifo")
    assert values["request"]["timeline"] == {
        "at": [{"time": "0:02", "prompt": "a circle", "cut": True}],
        "pins": [],
    }
    assert values["layout"]["top_k"] == 3 and values["layout"]["cuts"] == [2]
    assert len(values["model"]["files"]) > 4 and [c["title"] for c in values["chapters"]] == [
        "a red circle",
        "a circle",
    ]
    shown = run_command("show", "a.mp4").out
    assert "prompt       a red circle" in shown and "at           0:02 a circle [cut]" in shown
    assert "packforcing generate --from a.mp4" in shown


def test_changed_files_and_libraries_are_said(
    generate: Any, run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, colour in (("one.png", "red"), ("two.png", "blue")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / name)
    pins = ("--pin-image", "one.png", "--pin-image", "two.png")
    assert generate("a red circle", *pins, "--seconds", "3", "-o", "a.mp4").code == 0
    values = json.loads(run_command("show", "a.mp4", "--json").out)
    assert values["libraries"]["torch"] == metadata.version("torch")
    assert (
        values["files_sha256"]["pinned picture 2"]
        == hashlib.sha256((tmp_path / "two.png").read_bytes()).hexdigest()
    )
    assert "pinned picture 2" in run_command("show", "a.mp4").out
    assert "not as it was" not in run_command("generate", "--from", "a.mp4", "-o", "b.mp4").err
    Image.new("RGB", (64, 64), "green").save(tmp_path / "two.png")
    monkeypatch.setattr("packforcing_cli.sameness.libraries", lambda *_: {"torch": "0.1"})
    again = run_command("generate", "--from", "a.mp4", "-o", "c.mp4")
    assert again.code == 0
    said = f"not as it was when the file was made: the pinned picture 2, torch {metadata.version('torch')}, here 0.1; "
    assert said in " ".join(again.err.split())


def test_a_changed_model_is_said_and_no_metadata_leaves_nothing(
    generate: Any, run_command: Any, package: Path, tmp_path: Path
) -> None:
    assert generate("a red circle", "--seconds", "1", "-o", "a.mp4").code == 0
    other = tmp_path / "other"
    shutil.copytree(package, other)
    manifest = json.loads((other / "packforcing.json").read_text("utf-8"))
    config = other / "transformer" / "config.json"
    config.write_bytes(config.read_bytes() + b"\n")
    changed = {"sha256": hashlib.sha256(config.read_bytes()).hexdigest(), "size": config.stat().st_size}
    manifest["files"]["transformer/config.json"] = changed
    (other / "packforcing.json").write_text(json.dumps(manifest), encoding="utf-8")
    again = run_command("generate", "--from", "a.mp4", "--model", str(other), "-o", "b.mp4")
    assert "not as it was when the file was made: the weights of tiny 0.1" in again.err
    assert generate("a red circle", "--seconds", "1", "-o", "n.mp4", "--no-metadata").code == 0
    tags = VideoReader(tmp_path / "n.mp4").metadata
    assert not {"prompt", "seed", "model", "packforcing"} & set(tags)
    for arguments in (("show", "n.mp4"), ("generate", "--from", "n.mp4")):
        assert_one_message(run_command(*arguments), 2, "n.mp4 does not say how it was made", "--no-metadata")


# -- files --------------------------------------------------------------------------------------------------------


def test_the_file_can_be_another_kind_and_its_frames_pictures(
    generate: Any, run_command: Any, tmp_path: Path
) -> None:
    arguments = ("a red circle", "--seconds", "2", "--codec", "hevc", "--crf", "30", "--preset", "ultrafast")
    made = generate(*arguments, "-o", "a.mkv", "--frames", "pictures")
    assert made.code == 0, made.err
    assert made.out == "a.mkv\n"
    assert (
        len(list((tmp_path / "pictures").glob("frame-*.png")))
        == len(list(VideoReader(tmp_path / "a.mkv")))
        == 29
    )
    values = json.loads(run_command("show", "a.mkv", "--json").out)
    assert (values["request"]["codec"], values["request"]["preset"], values["frames"]) == (
        "hevc",
        "ultrafast",
        29,
    )
    again = generate(*arguments, "-o", "b.mkv", "--frames", "pictures")
    assert_one_message(again, 2, "there are frames in pictures", "--overwrite")
    plan = generate(*arguments, "-o", "b.mov", "--frames", "p", "--dry-run").out
    assert all(said in plan for said in ("--preset ultrafast", "--codec hevc", "--frames p"))
    assert not (tmp_path / "p").exists()


def test_a_video_goes_to_standard_output(package: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "packforcing_cli", "generate", "a red circle", "--model", str(package)]
    done = subprocess.run(
        [*command, "--seconds", "2", "-o", "-"], capture_output=True, timeout=300, cwd=tmp_path, check=True
    )
    (tmp_path / "a.mp4").write_bytes(done.stdout)
    reader = VideoReader(tmp_path / "a.mp4")
    assert sum(1 for _ in reader) == 29 and reader.metadata["prompt"] == "a red circle"


@pytest.mark.parametrize(
    ("arguments", "said", "next_step"),
    [
        (("-o", "-", "--json"), "cannot both go to standard output", "--json"),
        (("-o", "a.avi"), "cannot write a video to a.avi", ".mkv"),
        (("--codec", "h265"), "--codec h265: must be one of h264, hevc", "--codec"),
        (("--preset", "warp"), "preset 'warp'", "--preset"),
    ],
)
def test_other_kinds_are_refused_before_the_model_is_loaded(
    arguments: tuple[str, ...], said: str, next_step: str, generate: Any
) -> None:
    code = 1 if "warp" in arguments else 2
    assert_one_message(generate("a red circle", "--seconds", "2", *arguments), code, said, next_step)


def test_a_terminal_gets_no_video(generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    made = generate("a red circle", "-o", "-")
    assert made.code == 2 and "cannot go to a terminal" in made.err


def test_pictures_can_be_pinned(generate: Any, run_command: Any, tmp_path: Path) -> None:
    for name, colour in (("a.png", "red"), ("b.webp", "blue")):
        Image.new("RGB", (80, 80), colour).save(tmp_path / name)
    arguments = ("a red circle", "--pin-image", "a.png", "--pin-image", "b.webp", "--seconds", "4")
    plan = generate(*arguments, "--dry-run").out
    assert "pinned       blocks 0, 1: 1 of 16 recalled" in plan
    assert "--pin-image a.png --pin-image b.webp" in plan
    made = generate(*arguments, "-o", "a.mp4", "--progress", "json")
    assert made.code == 0, made.err
    blocks = [event for line in made.err.splitlines() if (event := json.loads(line))["event"] == "block"]
    assert [block["replayed"] for block in blocks] == [True, True, False, False]
    again = run_command("generate", "--from", "a.mp4", "-o", "b.mp4")
    assert again.code == 0 and frames(tmp_path / "a.mp4") == frames(tmp_path / "b.mp4")
    both = generate(*arguments, "--image", "a.png")
    assert_one_message(both, 2, "--image and --pin-image both say what block 0 is", "Leave one")
    assert_one_message(generate(*arguments[:5], "--seconds", "1"), 2, "take a block each", "--seconds")
