"""packforcing extend with videos that were made elsewhere, with a tiny package of random weights."""

from __future__ import annotations

import json
import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from test_generate import assert_one_message, send_in_block, write_tiny
from test_source import RAMP, write

from packforcing_cli import runfolder
from packforcing_cli.config import GenerateRequest
from packforcing_cli.reader import VideoReader
from packforcing_cli.runfolder import RunFolder


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


def test_options_of_the_file_hold_for_both_kinds_of_source(
    extend: Any, run_command: Any, tmp_path: Path
) -> None:
    """What is not given for a run's continuation is as it was; --frames is of one video only."""
    write(tmp_path / "phone.mp4", RAMP, size=(160, 90))  # 48 frames
    options = ("--codec", "hevc", "--crf", "40", "--preset", "ultrafast", "--snapshot-every", "2")
    made = extend("phone.mp4", "--prompt", "red", *options, "--frames", "a", "--no-metadata", "-o", "a.mp4")
    assert made.code == 0, made.err
    assert sorted(path.name for path in (tmp_path / "a").iterdir())[-1] == "frame-000079.png"
    more = run_command("extend", "a.mp4", "--seconds", "1", "-o", "b.mp4")
    assert more.code == 0, more.err
    other = ("--codec", "h264", "--crf", "20", "--frames", "c", "--metadata", "--snapshot-every", "1")
    last = run_command("extend", "b.mp4", "--seconds", "1", *other, "-o", "c.mp4")
    assert last.code == 0, last.err
    assert len(list((tmp_path / "c").iterdir())) == VideoReader(tmp_path / "c.mp4").num_frames == 112
    codecs, tagged, snapshots = [], [], []
    for name in "abc":
        with av.open(str(tmp_path / f"{name}.mp4")) as container:
            codecs.append(container.streams.video[0].codec_context.name)
            tagged.append("packforcing" in container.metadata)
    for run in runfolder.all_runs():
        assert run.record is not None
        with RunFolder.open(run.folder) as opened:
            snapshots.append(opened.snapshot_blocks())
        command = run_command("runs", "show", run.name).out
        assert f"source    {tmp_path / 'phone.mp4'}, 3 blocks" in command
    assert (codecs, tagged, snapshots) == (["hevc", "hevc", "h264"], [False, False, True], [4, 6, 7])
    crf = [GenerateRequest.from_values(run.record.request).crf for run in runfolder.all_runs() if run.record]
    assert crf == [40, 40, 20]
    said = json.loads(run_command("show", "c.mp4", "--json").out)["command"]
    assert "--codec" not in said  # h264, as always
    twice = run_command("extend", "b.mp4", "--seconds", "1", "--frames", "a", "-o", "d.mp4")
    assert_one_message(twice, 2, "there are frames in a", "--overwrite")
    streamed = extend("phone.mp4", "--prompt", "red", "--no-run", "--snapshot-every", "1", "-o", "e.mp4")
    assert_one_message(streamed, 2, "--snapshot-every needs a run folder", "Leave one away")


def test_stopped_within_the_source_it_is_finished_by_resume(
    extend: Any, run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "phone.mp4", RAMP, size=(160, 90), audio=True)
    asked = ("phone.mp4", "--prompt", "red", "--seed", "5")
    assert extend(*asked, "-o", "whole.mp4").code == 0
    with monkeypatch.context() as patch:
        send_in_block(patch, 1, signal.SIGINT)
        stopped = extend(*asked, "-o", "a.mp4")
    assert stopped.code == 130
    assert "Stopped before there was a new block. To go on: packforcing resume 2" in stopped.err
    assert not (tmp_path / "a.mp4").exists()
    (tmp_path / "phone.mp4").rename(tmp_path / "moved.mp4")
    lost = run_command("resume", "--last")
    assert_one_message(lost, 2, f"there is no file {tmp_path / 'phone.mp4'}", "Bring it back")
    write(tmp_path / "phone.mp4", RAMP[::-1], size=(160, 90), audio=True)
    assert_one_message(run_command("resume", "--last"), 2, "source video", "")
    (tmp_path / "moved.mp4").replace(tmp_path / "phone.mp4")
    done = run_command("resume", "--last")
    assert done.code == 0, done.err
    assert done.out == f"{tmp_path / 'a.mp4'}\n"
    both = [VideoReader(tmp_path / name) for name in ("a.mp4", "whole.mp4")]
    assert all(np.array_equal(*pair) for pair in zip(*both, strict=True)) and both[0].has_audio


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


def test_the_source_is_never_replaced_by_what_goes_on_with_it(extend: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", RAMP[:16], rate=16)
    before = path.read_bytes()
    refused = extend("a.mp4", "--prompt", "red", "-o", "a.mp4", "--overwrite")
    assert_one_message(refused, 2, "is the video that the new one goes on with", "-o")
    assert path.read_bytes() == before


def test_a_pipe_gets_the_video_alone(extend: Any, run_command: Any, package: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", RAMP[:16], rate=16)
    both = extend("a.mp4", "--prompt", "red", "-o", "-", "--json")
    assert_one_message(both, 2, "cannot both go to standard output", "--json")
    kept = extend("a.mp4", "--prompt", "red", "-o", "-", "--run", "kept")
    assert_one_message(kept, 2, "needs a run folder", "Leave one away")
    assert extend("a.mp4", "--prompt", "red", "-o", "b.mp4").code == 0
    own = run_command("extend", "b.mp4", "--seconds", "1", "-o", "-")
    assert_one_message(own, 2, "is kept in one", "-o")


def test_messages_and_show_name_times_of_the_file(extend: Any, run_command: Any, tmp_path: Path) -> None:
    """48 frames at 16 a second: 3 of lead, so the memory's times are 0.1875 s behind the file's."""
    write(tmp_path / "a.mp4", RAMP)
    early = extend("a.mp4", "--prompt", "red", "--at", "0:01", "blue", "-o", "b.mp4")
    assert early.code == 2
    assert "0:01 overlaps" in early.err
    assert "here at 0:03 at the earliest" in early.err
    made = extend("a.mp4", "--prompt", "red", "--at", "0:04", "a red circle", "-o", "b.mp4")
    assert made.code == 0, made.err
    values = json.loads(run_command("show", "b.mp4", "--json").out)
    (scene,) = values["request"]["timeline"]["at"]
    assert "0:04" in scene.values()


def test_of_a_file_with_the_new_part_alone_times_are_the_files_own(
    extend: Any, run_command: Any, tmp_path: Path
) -> None:
    write(tmp_path / "a.mp4", RAMP)
    made = extend("a.mp4", "--prompt", "red", "--only-new", "--seconds", "3", "-o", "new.mp4")
    assert made.code == 0, made.err
    assert VideoReader(tmp_path / "new.mp4").num_frames == 32  # the fixture's --seconds 2 is the last one
    early = run_command("extend", "new.mp4", "--seconds", "1", "--at", "0:01", "blue", "-o", "b.mp4")
    assert_one_message(early, 2, "--at 0:01: the old part is made already", "0:02")
    branch = run_command(
        "extend", "new.mp4", "--seconds", "1", "--from", "1", "--at", "0:01", "blue", "-o", "b.mp4"
    )
    assert branch.code == 0, branch.err
    assert VideoReader(tmp_path / "b.mp4").num_frames == 32
    again = run_command("resume", "new.mp4", "--json")
    assert again.code == 0
