"""packforcing resume, extend and runs, as a person sees them, with a tiny package of random weights."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from PIL import Image
from test_generate import PROMPT, assert_one_message, num_frames, send_in_block, whole_blocks, write_tiny

from packforcing_cli import durable, registry, runfolder
from packforcing_cli.runfolder import RunFolder


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("resume") / "tiny")


@pytest.fixture
def generate(run_command: Any, package: Path) -> Callable[..., Any]:
    """Run `packforcing generate` with the tiny package, six blocks long, seed 5, unless said otherwise."""

    def run(*arguments: str) -> Any:
        options = ("--model", str(package), "--seconds", "6", "--seed", "5", *arguments)
        return run_command("generate", PROMPT, *options)

    return run


def latents(folder: Path) -> torch.Tensor:
    with RunFolder.open(folder) as run:
        return torch.cat([entry.latents for entry in run.entries()])


def packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def only_run() -> runfolder.Run:
    (run,) = runfolder.all_runs()
    return run


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_prints_the_command_that_goes_on_and_it_does(
    number: signal.Signals,
    code: int,
    generate: Any,
    run_command: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        send_in_block(patch, 2, number)
        result = generate("-o", "a.mp4")
    assert (result.code, result.out) == (code, "a.mp4\n")
    run = only_run()
    assert run.status == "stopped"
    said = result.err.splitlines()[-1]
    assert said == f"Stopped after 3 of 6 blocks. To go on: packforcing resume {run.name}"
    again = run_command(*said.split("packforcing ")[1].split())
    assert (again.code, again.out) == (0, f"{tmp_path / 'a.mp4'}\n")
    assert f"{run.name}: 3 of 6 blocks are there; 3 to go through again (about " in again.err
    assert "), 3 to make (about " in again.err
    assert "tiny on cpu (fp32); model: as before; device: as before; precision: as before" in again.err
    assert num_frames(tmp_path / "a.mp4") == 93
    generate("-o", "whole.mp4", "--run", "whole")
    assert torch.equal(latents(run.folder), latents(tmp_path / "whole"))
    third = run_command("resume", run.name, "--json")
    assert third.code == 0
    assert json.loads(third.out)["frames"] == 93
    assert f"{run.name} was already finished, 93 frames." in third.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "whole", "whole.mp4"]


def test_the_second_ctrl_c_leaves_a_part_that_is_continued(
    generate: Any, run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        send_in_block(patch, 2, signal.SIGINT, times=2)
        result = generate("-o", "a.mp4", "--run", "kept")
    assert (result.code, result.out) == (130, "")
    said = result.err.splitlines()[-2:]
    assert said[0] == "Stopped at once. What was made so far plays: a.part.mp4"
    assert said[1] == f"To go on: packforcing resume {only_run().name}"
    assert whole_blocks(tmp_path / "a.part.mp4") == 2
    assert run_command("resume", "a.part.mp4", "-q").out == f"{tmp_path / 'a.mp4'}\n"
    assert num_frames(tmp_path / "a.mp4") == 93
    assert not (tmp_path / "a.part.mp4").exists()


def test_last_is_the_newest_run_that_is_not_finished(
    generate: Any, run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_one_message(run_command("resume", "--last"), 2, "no run that is not finished", "runs list")
    assert_one_message(run_command("resume"), 2, "give a run, or --last", "runs list")
    with monkeypatch.context() as patch:
        send_in_block(patch, 0, signal.SIGINT)
        generate("-o", "a.mp4")
    generate("-o", "b.mp4", "--seconds", "1")
    assert run_command("resume", "--last", "-q", "-o", "c").out == f"{tmp_path / 'c.mp4'}\n"
    assert [num_frames(tmp_path / name) for name in ("a.mp4", "b.mp4", "c.mp4")] == [13, 13, 93]


def test_other_weights_or_memory_are_refused_unless_forced(
    generate: Any, run_command: Any, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(package, tmp_path / "model")
    with monkeypatch.context() as patch:
        send_in_block(patch, 1, signal.SIGINT)
        generate("-o", "a.mp4", "--model", "model")
    before = (tmp_path / "a.mp4").read_bytes()
    other = write_tiny(tmp_path / "other" / "tiny")
    weights = registry.load_model(other)
    torch.nn.init.constant_(weights.transformer.proj_out.bias, 0.1)
    registry.write_package(
        tmp_path / "model", weights.manifest, transformer=weights.transformer, base=other, overwrite=True
    )
    result = run_command("resume", only_run().name)
    assert_one_message(result, 2, "was made with something else: weights of transformer: ", "--force")
    assert (tmp_path / "a.mp4").read_bytes() == before
    forced = run_command("resume", only_run().name, "--force")
    assert forced.code == 0
    assert "not as it was: weights of transformer: " in forced.err
    assert num_frames(tmp_path / "a.mp4") == 93


def test_another_machine_is_a_warning(
    generate: Any, run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        send_in_block(patch, 1, signal.SIGINT)
        generate("-o", "a.mp4", "--run", "kept")
    with RunFolder.open(tmp_path / "kept") as run:
        run.update(numerics={**run.record.numerics, "threads": 99})
    result = run_command("resume", "kept")
    assert result.code == 0
    now = torch.get_num_threads()
    assert f"threads: 99 then, {now} now" in result.err and "not guaranteed" in result.err


def test_a_file_without_a_run_cannot_be_resumed(generate: Any, run_command: Any) -> None:
    generate("-o", "a.mp4", "--no-run", "--seconds", "1")
    assert_one_message(run_command("resume", "a.mp4"), 2, "it names no run", "runs list")
    generate("-o", "b.mp4", "--seconds", "1")
    runfolder.remove(only_run())
    assert_one_message(run_command("resume", "b.mp4"), 2, "is not here any more", "runs list")


def test_a_run_in_use_is_exit_9(generate: Any, run_command: Any, tmp_path: Path) -> None:
    generate("-o", "a.mp4", "--run", "kept", "--seconds", "1")
    with RunFolder.open(tmp_path / "kept"):
        for command in (["resume", "kept"], ["extend", "kept", "--seconds", "1"]):
            assert_one_message(run_command(*command), 9, f"process {os.getpid()} on", "Wait for it.")
        listed = json.loads(run_command("runs", "list", "--json").out)["runs"]
        assert [run["status"] for run in listed] == ["running"]


def test_a_full_disk_says_how_to_go_on_and_it_works(
    generate: Any, run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from packforcing_cli import durable

    real, calls = durable.write_all, []

    def fill(fd: int, data: bytes) -> None:
        calls.append(len(data))
        if len(calls) > 12:
            raise OSError(28, "No space left on device")
        real(fd, data)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "write_all", fill)
        result = generate("-o", "a.mp4")
    name = only_run().name
    assert_one_message(result, 6, "the disk is full", f"To go on: packforcing resume {name}")
    assert run_command("resume", name, "-q").code == 0
    assert num_frames(tmp_path / "a.mp4") == 93


def test_a_run_without_a_block_leaves_no_folder(generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    send_in_block(monkeypatch, 0, signal.SIGINT, times=2)
    result = generate("-o", "a.mp4")
    assert result.code == 130
    assert "The whole video: packforcing generate" in result.err.splitlines()[-1]
    assert runfolder.all_runs() == []
    assert list(runfolder.default_root().iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--run", "full"], "full is there and not an empty folder"),
        (["--run", "x", "--no-run"], "--run needs a run folder, and --no-run forbids it"),
        (["--snapshot-every", "2", "--no-run"], "--snapshot-every needs a run folder"),
        (["-o", "-", "--run", "x"], "--run needs a run folder, and a video to standard output has none"),
        (["--snapshot-every", "0"], "--snapshot-every 0"),
    ],
)
def test_wrong_run_options_are_refused_before_anything_is_made(
    options: list[str], said: str, generate: Any, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    result = generate("-o", "a.mp4", *options)
    assert result.code == 2
    assert said in result.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


def test_a_dry_run_tells_at_least_the_disk_that_is_taken(generate: Any, tmp_path: Path) -> None:
    for more in ((), ("--snapshot-every", "2")):
        options = ("-o", f"{len(more)}.mp4", "--run", f"run{len(more)}", *more)
        said = next(
            line for line in generate(*options, "--dry-run").out.splitlines() if line.startswith("disk")
        )
        number, unit = re.search(r"run folder ([\d.]+) (\w+)$", said).groups()  # type: ignore[union-attr]
        planned = float(number) * {"kB": 1e3, "MB": 1e6}[unit]
        assert generate(*options).code == 0
        taken = sum(
            p.stat().st_size for p in (tmp_path / f"run{len(more)}").rglob("*") if p.name != "run.json"
        )
        assert taken < planned < (20 if more else 5) * taken
    said = generate("--no-run", "--dry-run").out
    assert re.search(r"disk +at most about .*: the video alone", said)


def test_snapshots_make_resuming_instant(
    generate: Any, run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        send_in_block(patch, 4, signal.SIGINT)
        generate("-o", "a.mp4", "--run", "kept", "--snapshot-every", "2")
    result = run_command("resume", "kept")
    assert "5 of 6 blocks are there; 1 to go through again" in result.err
    assert "1 block, 16 frames (1.00 s) in " in result.err
    generate("-o", "b.mp4", "--run", "whole")
    assert torch.equal(latents(tmp_path / "kept"), latents(tmp_path / "whole"))


def test_pictures_are_whole_and_complete_after_a_kill_and_a_resume(
    generate: Any, run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the pictures of a block, with a snapshot before it; and a picture lost afterwards."""
    options = ("--seconds", "3", "--snapshot-every", "1")
    assert generate("-o", "whole.mp4", "--frames", "whole", *options).code == 0
    write = durable.write

    def stop(path: Path, data: bytes) -> None:
        if path.name == "frame-000020.png":
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "write", stop)
        assert generate("-o", "a.mp4", "--frames", "made", "--run", "kept", *options).code == 130

    def pictures(name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    assert len(pictures("made")) == 20
    (tmp_path / "made" / "frame-000003.png").unlink()  # of a block before the snapshot
    assert run_command("resume", "kept", "-q").code == 0
    assert pictures("made") == pictures("whole")
    (tmp_path / "made" / "frame-000044.png").unlink()
    before = packets(tmp_path / "a.mp4")
    assert run_command("resume", "kept", "-q").code == 0
    assert pictures("made") == pictures("whole") and packets(tmp_path / "a.mp4") == before
    assert "was already finished" in run_command("resume", "kept").err


def test_a_pinned_picture_is_not_needed_once_its_block_is_there(
    generate: Any, run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (80, 80), "red").save(picture)
    with monkeypatch.context() as patch:
        send_in_block(patch, 2, signal.SIGINT)
        stopped = generate("--pin-image", "a.png", "-o", "a.mp4", "--run", "kept", "--seconds", "4")
    assert stopped.code == 130
    picture.unlink()
    assert run_command("resume", "kept", "-q").code == 0
    assert num_frames(tmp_path / "a.mp4") == 61
    assert run_command("extend", "kept", "--seconds", "1", "-o", "b.mp4", "-q").code == 0


# -- extend ------------------------------------------------------------------------------------------------------


def test_extending_equals_one_longer_run(generate: Any, run_command: Any, tmp_path: Path) -> None:
    generate("-o", "a.mp4", "--seconds", "3")
    before = (tmp_path / "a.mp4").read_bytes()
    result = run_command("extend", "a.mp4", "--seconds", "3", "-o", "b.mp4", "--run", "longer")
    assert (result.code, result.out) == (0, "b.mp4\n")
    assert "3 new blocks after 0:03 (block 3 of 3)" in result.err
    assert "3 of 6 blocks are there; 3 to go through again (about " in result.err
    assert "tiny on cpu (fp32); model: as before; device: as before; precision: as before" in result.err
    generate("-o", "c.mp4", "--run", "whole")
    assert torch.equal(latents(tmp_path / "longer"), latents(tmp_path / "whole"))
    assert num_frames(tmp_path / "b.mp4") == 93
    assert (tmp_path / "a.mp4").read_bytes() == before
    assert run_command("extend", "b.mp4", "--seconds", "1", "-o", "d.mp4", "-q").code == 0
    assert num_frames(tmp_path / "d.mp4") == 109


def test_a_file_without_metadata_is_continued_from_its_run(
    generate: Any, run_command: Any, tmp_path: Path
) -> None:
    generate("-o", "a.mp4", "--seconds", "1", "--no-metadata")
    made = run_command("extend", "a.mp4", "--seconds", "1", "-o", "b.mp4")
    assert made.code == 0 and "1 new block after 0:01 (block 1 of 1)" in made.err, made.err
    (tmp_path / "a.mp4").rename(tmp_path / "c.mp4")  # nothing says now which run it is
    assert_one_message(run_command("resume", "c.mp4"), 2, "it names no run", "runs list")


def test_a_timeline_is_resumed_and_goes_on_in_a_branch(
    generate: Any, run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = ["--at", "0:02 a circle moving [blend 1s]", "--at", "0:05 red", "--pin", "0:01-0:02"]
    generate("-o", "whole.mp4", "--run", "whole", *story)
    with monkeypatch.context() as patch:
        send_in_block(patch, 2, signal.SIGINT)
        generate("-o", "a.mp4", "--run", "run", *story)
    assert run_command("resume", "run", "-q").code == 0
    assert torch.equal(latents(tmp_path / "run"), latents(tmp_path / "whole"))
    same = ["extend", "run", "--from", "0:04", "--seconds", "2"]
    assert run_command(*same, "-o", "b.mp4", "--run", "same", "-q").code == 0
    assert torch.equal(latents(tmp_path / "same"), latents(tmp_path / "whole"))
    assert run_command(*same, "--at", "0:05 blue", "-o", "c.mp4", "--run", "other", "-q").code == 0
    assert runfolder.read(tmp_path / "other").request["timeline"]["at"][-1] == {
        "time": "0:05",
        "prompt": "blue",
    }


def test_a_branch_has_the_old_blocks_and_new_ones(
    generate: Any, run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate("-o", "a.mp4", "--run", "source", "--seconds", "4")
    branch = ["extend", "source", "--from", "0:02", "--seconds", "2", "--prompt", "a circle", "--seed", "9"]
    with monkeypatch.context() as patch:
        send_in_block(patch, 2, signal.SIGINT)
        result = run_command(*branch, "-o", "b.mp4", "--run", "branch")
    assert result.code == 130
    assert run_command("resume", "branch", "-q").code == 0
    assert run_command(*branch, "-o", "c.mp4", "--run", "unbroken", "-q").code == 0
    source, made = latents(tmp_path / "source"), latents(tmp_path / "branch")
    assert torch.equal(made, latents(tmp_path / "unbroken"))
    assert torch.equal(made[:2], source[:2]) and not torch.equal(made[2:4], source[2:4])
    assert num_frames(tmp_path / "b.mp4") == 61
    record = runfolder.read(tmp_path / "branch")
    assert (record.prompt, record.request["seed"]) == (PROMPT, 9)
    assert record.request["timeline"]["at"] == [{"time": "0:01.8125", "prompt": "a circle"}]
    assert record.parent == runfolder.read(tmp_path / "source").id
    command = run_command("show", "b.mp4", "--json").out
    assert f"packforcing extend {record.parent} --from 1.8125 --seconds 2 --seed 9" in command
    refused = run_command("generate", "--from", "b.mp4", "-o", "x.mp4")
    assert_one_message(refused, 2, "goes on with another one", f"packforcing extend {record.parent}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["kept", "--seconds", "0"], "--seconds 0.0: must be above 0"),
        (["kept", "--seconds", "1", "--from", "9:00"], "there is nothing at 9:00"),
        (["kept", "--seconds", "1", "--from", "soon"], "--from: 'soon' is no time"),
        (["kept", "--seconds", "2", "--pin", "0:00-0:01"], "the memory of the old part is made already"),
        (["nothing", "--seconds", "1"], "there is no run 'nothing'"),
        (["kept", "--seconds", "1", "-o", "a.mp4"], "a.mp4 exists"),
    ],
)
def test_what_cannot_be_extended_is_one_message(
    options: list[str], said: str, generate: Any, run_command: Any
) -> None:
    generate("-o", "a.mp4", "--run", "kept", "--seconds", "1")
    result = run_command("extend", *options)
    assert (result.code, result.out) == (2, "")
    assert said in result.err
    assert len(runfolder.all_runs()) == 1


def test_a_run_with_a_missing_block_is_branched_before_it(
    generate: Any, run_command: Any, tmp_path: Path
) -> None:
    generate("-o", "a.mp4", "--run", "kept", "--seconds", "4")
    (tmp_path / "kept" / "latents" / "000002.safetensors").unlink()
    refused = run_command("resume", "kept")
    assert_one_message(refused, 1, "000002.safetensors is missing", "--from T` can branch off before it")
    for where in ([], ["--from", "0:03"]):
        said = "000002.safetensors of "
        assert_one_message(
            run_command("extend", "kept", "--seconds", "1", *where), 1, said, "--from 0:01.8125."
        )
    made = run_command("extend", "kept", "--seconds", "1", "--from", "0:01.8125", "-o", "b.mp4", "-q")
    assert (made.code, num_frames(tmp_path / "b.mp4")) == (0, 45)


# -- runs --------------------------------------------------------------------------------------------------------


def test_runs_are_listed_shown_removed_and_pruned(
    generate: Any, run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_command("runs", "list").out == ""
    generate("-o", "a.mp4", "--seconds", "1")
    with monkeypatch.context() as patch:
        send_in_block(patch, 1, signal.SIGINT)
        generate("-o", "b.mp4", "--run", "kept")
    done, open_end = runfolder.all_runs()
    listed = run_command("runs", "list")
    assert [line.split()[:3] for line in listed.out.splitlines()[1:]] == [
        [done.name, "finished", "1/1"],
        [open_end.name, "stopped", "2/6"],
    ]
    values = json.loads(run_command("runs", "list", "--json").out)
    assert (values["schema"], len(values["runs"])) == (1, 2)
    assert set(values["runs"][0]) == {
        "id",
        "status",
        "blocks",
        "blocks_wanted",
        "prompt",
        "model",
        "created",
        "changed",
        "size_bytes",
        "video",
        "parent",
        "source",
        "folder",
        "problem",
    }
    shown = run_command("runs", "show", "kept").out
    assert "go on     packforcing resume " in shown and "seed      5" in shown and "model     tiny" in shown
    assert json.loads(run_command("runs", "show", "b.mp4", "--json").out)["record"]["blocks"] == 6
    assert_one_message(run_command("runs", "prune"), 2, "say what to remove", "--older-than 30d")
    assert "Nothing to remove." in run_command("runs", "prune", "--older-than", "1h", "-y").err
    assert_one_message(run_command("runs", "prune", "--older-than", "soon"), 2, "is not an age", "30d")
    assert_one_message(run_command("runs", "prune", "--finished"), 2, "nobody to ask", "--yes")
    assert run_command("runs", "prune", "--finished", "--yes").code == 0
    assert [run.name for run in runfolder.all_runs()] == [open_end.name]
    assert run_command("runs", "remove", open_end.name[:20], "-y").code == 0
    assert runfolder.all_runs() == [] and not (tmp_path / "kept").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


# -- real kills --------------------------------------------------------------------------------------------------


def killed_and_resumed(package: Path, folder: Path, seconds_to_live: list[float]) -> None:
    """Kill `packforcing generate` and then every `resume` so many seconds after its first block; then finish it."""
    options = ["--model", str(package), "--seconds", "20", "--seed", "5", "-o", "v.mp4", "--run", "run"]
    command = ["generate", PROMPT, *options]
    for seconds in seconds_to_live:
        process = subprocess.Popen(
            [sys.executable, "-m", "packforcing_cli", *command, "--progress", "json"],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        for line in process.stderr:
            if '"event": "block"' in line and '"replayed": false' in line:
                break
        time.sleep(seconds)
        process.kill()
        rest = process.communicate(timeout=300)[1]
        assert "Traceback" not in rest
        done = [json.loads(x)["index"] for x in [line, *rest.splitlines()] if '"replayed": false' in x]
        kept = len(list((folder / "run" / "latents").glob("*.safetensors")))
        assert done and kept > done[-1]  # nothing that was reported is lost
        part = folder / "v.part.mp4"
        if part.exists() and not (folder / "v.mp4").exists() and part.stat().st_size > 5000:
            frames = num_frames(part)
            assert frames == 0 or frames % 16 == 13  # whole blocks
        command = ["resume", "run"]
        if kept == 20:
            break
    for said in ("", "already finished"):
        last = subprocess.run(
            [sys.executable, "-m", "packforcing_cli", "resume", "run"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert last.returncode == 0, last.stderr
        assert said in last.stderr
    assert num_frames(folder / "v.mp4") == 317
    assert sorted(p.name for p in folder.iterdir()) == ["run", "v.mp4"]


@pytest.fixture(scope="module")
def whole(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of the video nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    options = ["--model", str(package), "--seconds", "20", "--seed", "5", "-o", "v.mp4", "--run", "run"]
    subprocess.run(
        [sys.executable, "-m", "packforcing_cli", "generate", PROMPT, *options],
        cwd=folder,
        check=True,
        capture_output=True,
        timeout=600,
    )
    return folder / "run"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
@pytest.mark.parametrize("first", [0.0, 0.01, 0.03])
def test_after_six_kills_it_is_as_if_there_had_been_none(
    first: float, package: Path, whole: Path, tmp_path: Path
) -> None:
    """Processes of their own: pytest -m slow tests/e2e/test_resume.py. Many more: tests/fault_matrix.py generate."""
    killed_and_resumed(package, tmp_path, [first, 0.0, 0.02, 0.004, 0.05, 0.0])
    assert torch.equal(latents(tmp_path / "run"), latents(whole))


def test_the_command_in_the_result_is_that_of_the_whole_video(
    generate: Any, run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed video needs its start picture no more; making it again does."""
    Image.new("RGB", (80, 80), "red").save(tmp_path / "p.png")
    with monkeypatch.context() as patch:
        send_in_block(patch, 1, signal.SIGINT)
        assert generate("--image", "p.png", "-o", "a.mp4", "--run", "kept", "--seconds", "3").code == 130
    values = json.loads(run_command("resume", "kept", "--json", "-q").out)
    assert "--image" in values["command"]
