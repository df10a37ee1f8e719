"""packforcing extend with videos that were made elsewhere, with a tiny package of random weights."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from test_generate import assert_one_message, write_tiny
from test_source import RAMP, write

from packforcing_cli.video import VideoReader


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("extend") / "tiny")


@pytest.fixture
def extend(run_command: Any, package: Path) -> Callable[..., Any]:
    def run(*arguments: str) -> Any:
        return run_command("extend", *arguments, "--model", str(package), "--seconds", "2")

    return run


def test_a_video_from_elsewhere_is_continued_and_its_seam_told(
    extend: Any, run_command: Any, tmp_path: Path
) -> None:
    write(tmp_path / "phone.mp4", RAMP, size=(160, 90), audio=True)
    made = extend(
        "phone.mp4",
        "--prompt",
        "a red circle",
        "--at",
        "0:04",
        "red",
        "-o",
        "b.mp4",
        "--fit",
        "pad",
        "--no-run",
    )
    assert made.code == 0, made.err
    assert made.out == "b.mp4\n"
    assert "3 blocks of it are remembered, 2 follow" in made.err
    assert (
        "tiny on cpu (fp32); model: asked for; device: there is no NVIDIA driver; precision: as" in made.err
    )
    assert "The seam: colour shift" in made.err
    reader = VideoReader(tmp_path / "b.mp4")
    assert (reader.num_frames, reader.has_audio) == (80, True)
    command = json.loads(run_command("show", "b.mp4", "--json").out)["command"]
    assert command.startswith("packforcing extend phone.mp4 --seconds 2 --prompt 'a red circle' --seed ")
    repeated = shlex.split(command)[1:-1]
    assert run_command(*repeated, "repeated.mp4").code == 0
    both = (VideoReader(tmp_path / name) for name in ("b.mp4", "repeated.mp4"))
    assert all(np.array_equal(*pair) for pair in zip(*both, strict=True))
    refused = run_command("generate", "--from", "b.mp4")
    assert_one_message(refused, 2, "the video goes on with another one", "packforcing extend phone.mp4")
    again = extend("b.mp4", "-o", "c.mp4", "--from-time", "0:01", "--to-time", "0:03", "--only-new", "--json")
    values = json.loads(again.out)  # the prompt is the file's own
    assert (values["source_frames"], values["frames"], values["new_blocks"]) == (32, 32, 2)
    assert set(values["seam"]) == {"delta_e", "jump", "own_motion"}
    assert "empty prompt" not in again.err
    assert VideoReader(tmp_path / "c.mp4").metadata["prompt"] == "red"


def test_without_any_prompt_an_empty_one_is_taken_and_said(extend: Any, tmp_path: Path) -> None:
    write(tmp_path / "short.mkv", RAMP[:4], rate=16)
    made = extend("short.mkv")
    assert made.code == 0, made.err
    assert "going on with an empty prompt" in made.err and "shorter than one block" in made.err
    assert made.out == "more-of-short.mp4\n"


def test_without_a_model_it_is_chosen_as_for_generate(
    run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.mp4", RAMP[:16], rate=16)
    monkeypatch.setattr(
        "packforcing_cli.cli.extend_file.run_job", lambda job, *_, **__: job.facts.name != "demo"
    )
    assert run_command("extend", "a.mp4", "--seconds", "1", "--prompt", "red", "-o", "b.mp4").code == 0


@pytest.mark.parametrize("name", ["円 🎬.mp4", "con.mp4", "a:b.mp4"])
def test_names_of_all_kinds_are_read_and_written(name: str, extend: Any, tmp_path: Path) -> None:
    write(tmp_path / "plain.mp4", RAMP[:13], rate=16).rename(tmp_path / name)
    made = extend(name, "--prompt", f"{name}/with/slashes " + "long " * 100)
    assert made.code == 0, made.err
    out = made.out.rstrip("\n")
    assert (tmp_path / out).is_file() and len(os.fsencode(out)) <= 255


@pytest.mark.parametrize(
    ("arguments", "code", "said", "next_step"),
    [
        (("missing.mp4",), 2, "there is no file missing.mp4", "runs list"),
        (("a" * 300 + ".mp4",), 2, "there is no file aaaa", "runs list"),
        (("no-such-run",), 2, "there is no run 'no-such-run'", "runs list"),
        (("empty.mp4",), 1, "empty.mp4 cannot be read as a video", ""),
        (("text.mp4",), 1, "text.mp4 cannot be read as a video", ""),
        (("sound.mp4",), 1, "sound.mp4 has no video in it", ""),
        (("good.mp4", "-o", "good.mp4"), 2, "good.mp4 exists", "--overwrite"),
        (("good.mp4", "-o", "no/b.mp4"), 2, "no does not exist", "mkdir"),
        (("good.mp4", "--from-time", "0:09"), 2, "nothing between", "--from-time"),
        (("good.mp4", "--to-time", "x"), 2, "--to-time: 'x' is no time", "0:40"),
        (("good.mp4", "--from", "0:01"), 2, "--from is for videos whose run is here", "--from-time"),
        (("good.mp4", "--fit", "tile"), 2, "--fit tile: must be one of", "--fit"),
        (("good.mp4", "--at", "0:00.5", "red"), 2, "0:00", "--at"),
        (("good.mp4", "-o", "a" * 260 + ".mp4"), 2, "too long", "-o"),
    ],
)  # fmt: skip
def test_bad_input_is_one_message_and_nothing_is_written(
    arguments: tuple[str, ...], code: int, said: str, next_step: str, extend: Any, tmp_path: Path
) -> None:
    write(tmp_path / "good.mp4", RAMP[:16], rate=16)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video", encoding="utf-8")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        sound: Any = container.add_stream("aac", rate=44100, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate = 44100
        container.mux([*sound.encode(silence), *sound.encode(None)])
    before = sorted((path.name, path.stat().st_size) for path in tmp_path.iterdir())
    assert_one_message(extend(*arguments, "--prompt", "red"), code, said, next_step)
    assert sorted((path.name, path.stat().st_size) for path in tmp_path.iterdir()) == before
