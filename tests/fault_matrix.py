"""Break the writers and the command on purpose, in forked children of one warmed process, and see that nothing is lost.

    python tests/fault_matrix.py writers                every write, fsync, rename, close … x every fault (minutes)
    python tests/fault_matrix.py writers --every 13     a sample, as the tests take it; also with --no-metadata,
                                                        and of a video that goes on with another one: --source
    python tests/fault_matrix.py generate 1000          so many SIGKILLs of `packforcing generate` and its resumes

`writers` runs run folder, video, snapshot and run.json for real, fed by a made-up block source whose frames are a
function of the latents. A fault strikes at the n-th call; afterwards, in a child of its own, the run is resumed:

    the file that is there plays and has whole blocks; no block that was reported done is missing; latents, frames
    before encoding and packets equal those of an unbroken run; nothing is left lying around; resuming again does
    nothing.

Each prints JSON: how many points and cases there were, and what went wrong in which.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path[:0] = [
    str(Path(__file__).parent),
    str(Path(__file__).parent / "e2e"),
    str(Path(__file__).parent.parent),
]

import av  # noqa: E402
import torch  # noqa: E402
from test_source import RAMP, write  # noqa: E402
from tiny import embeds, video_model  # noqa: E402

from packforcing_cli import __version__, cli, finishing, past, rollout, sameness, trace  # noqa: E402
from packforcing_cli.cache import CacheStats  # noqa: E402
from packforcing_cli.cli import generate as generate_command  # noqa: E402
from packforcing_cli.cli.progress import Display  # noqa: E402
from packforcing_cli.config import GenerateRequest, SourceVideo  # noqa: E402
from packforcing_cli.errors import PackforcingError  # noqa: E402
from packforcing_cli.layout import MemoryBytes  # noqa: E402
from packforcing_cli.prompts import Prompt  # noqa: E402
from packforcing_cli.reader import VideoReader  # noqa: E402
from packforcing_cli.rollout import Block  # noqa: E402
from packforcing_cli.runfolder import Record, RunFolder  # noqa: E402
from packforcing_cli.video import VideoWriter  # noqa: E402

BLOCKS = 6
SNAPSHOT_EVERY = 2
TAGGED = True  # whether the file says whose it is
SOURCE: SourceVideo | None = None  # the video that the made-up one goes on with: 3 frames and 3 blocks
FAULTS = ("SIGKILL", "SIGTERM", "ENOSPC", "EIO", "short write")
CALLS = ("write", "fsync", "rename", "replace", "link", "unlink", "close", "ftruncate")
NOISE = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


# -- what is broken ----------------------------------------------------------------------------------------------


def made_up_blocks(
    _model: Any, _prompt: Any, *, num_blocks: int, past: Any, state: Any, **_: Any
) -> Iterator[Block]:
    """Stands in for stream_generate: latents are numbers, frames follow from them."""
    history, start = iter(past), 0 if state is None else int(state["n"])
    for n in range(start, num_blocks):
        old = next(history, None)
        latents = torch.full((1, 4, 4, 8, 8), n + 0.5) if old is None else old.latents
        value = int(latents.flatten()[0] * 16)
        frames = torch.stack([(NOISE + value + t).to(torch.uint8) for t in range(13 if n == 0 else 16)])
        if old is not None and old.pixels is not None:
            frames = rollout.to_uint8(old.pixels)
        empty = MemoryBytes(0, 0, 0, 0, 0)
        yield Block(
            index=n,
            frames=frames,
            latents=latents,
            selected=torch.full((1, 1), n) if old is None or old.selected is None else old.selected,
            recalled=(n,),
            cache=CacheStats(empty, (), (), (), ()),
            seconds={"denoise": 0.1},
            replayed=old is not None,
            record=trace.Record(n),
            state=lambda n=n: {"n": torch.tensor(n + 1), "more": torch.zeros(1000)},
        )


def work(folder: Path, tell: Callable[[dict[str, Any]], None]) -> int:
    """Make the video of a folder, or go on with it. Returns: an exit code, as the command's."""
    output, model = folder / "v.mp4", video_model(torch.float32)
    with generate_command.Stop(Display(quiet=True)) as stop:
        stop.making_blocks = True
        try:
            if (folder / "run" / "run.json").exists():
                run = RunFolder.open(folder / "run")
            else:
                shutil.rmtree(folder / "run", ignore_errors=True)
                run = RunFolder.create(folder / "run", a_record(output))
            with run:
                if finishing.finish(run):
                    return 0
                request = GenerateRequest.from_values(run.record.request)
                result = rollout.generate(
                    model,
                    Prompt("made up", embeds(0)),
                    output,
                    seconds=(16 * BLOCKS - 3) / 16,
                    seed=3,
                    run=run,
                    history=past.open_history(request, run.record.lengths, fps=16, size=(64, 64)),
                    snapshot_every=SNAPSHOT_EVERY,
                    on_block=lambda block, _: tell(
                        {
                            "block": block.index,
                            "frames": hashlib.sha256(block.frames.numpy().data).hexdigest(),
                        }
                    ),
                    should_stop=lambda: stop.code != 0,
                )
                return stop.code if result.stopped else 0
        except KeyboardInterrupt:
            return stop.code
        except PackforcingError as error:
            tell({"error": error.message})
            return error.exit_code


def a_record(output: Path) -> Record:
    return Record(
        schema=1,
        id="20260101-000000-faults",
        version=__version__,
        created=datetime.now(UTC),
        prompt="made up",
        output=str(output),
        blocks=BLOCKS,
        fps=16,
        size=(64, 64),
        frames_per_block=4,
        request=GenerateRequest(prompt="made up", seed=3, source=SOURCE).to_values(),
        tags={"run": "20260101-000000-faults"} if TAGGED else {},
        must={"model": "tiny"},
        numerics={},
    )


# -- how it is broken --------------------------------------------------------------------------------------------


class Saboteur:
    """Counts the calls that change files, and strikes at one of them."""

    def __init__(self, fault: str = "", at: int = -1) -> None:
        self.fault, self.at, self.calls = fault, at, list[str]()
        self.real = {name: getattr(os, name) for name in CALLS}
        for name in CALLS:
            setattr(os, name, self.wrapped(name))

    def wrapped(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append(name)
            number, real = len(self.calls) - 1, self.real[name]
            if self.fault == "ENOSPC" and number >= self.at and (name == "write" or number == self.at):
                if name == "close":
                    real(*arguments)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if number == self.at:
                if self.fault == "SIGKILL":
                    if name == "write":  # a part of it arrives
                        real(arguments[0], memoryview(arguments[1])[: len(arguments[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                if self.fault == "SIGTERM":
                    os.kill(os.getpid(), signal.SIGTERM)
                if self.fault == "EIO":
                    if name == "close":
                        real(*arguments)
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                if self.fault == "short write" and name == "write":
                    return real(arguments[0], memoryview(arguments[1])[: max(1, len(arguments[1]) // 3)])
            return real(*arguments, **options)

        return call


def in_child(work_: Callable[[Callable[[dict[str, Any]], None]], int]) -> tuple[int, list[dict[str, Any]]]:
    """Run something in a forked child. Returns: its exit code, negative for a signal, and what it told."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        write = os.write  # as it is before a saboteur comes

        def tell(value: dict[str, Any]) -> None:
            write(writing, json.dumps(value).encode() + b"\n")

        try:
            code = work_(tell)
        except BaseException as error:  # a test harness: whatever it is, the parent shall see it
            tell({"crash": repr(error)})
            code = 99
        os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        lines = pipe.read().splitlines()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), [json.loads(line) for line in lines]


def packets(path: Path) -> list[tuple[bytes, int | None]]:
    with av.open(str(path)) as container:
        return [(bytes(p), p.pts) for p in container.demux(video=0) if p.size]


def facts(folder: Path) -> dict[str, Any]:
    """What must be the same after all."""
    with RunFolder.open(folder / "run") as run:
        assert run.record.status == "finished", run.record.status
        entries = [(e.latents.tolist(), e.selected.tolist(), e.retry) for e in run.entries()]
        traced = [line["block"] for line in run.trace()]
    assert traced == sorted(set(traced)), traced
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    return {"latents": entries, "packets": packets(folder / "v.mp4"), "files": names}


def resume_twice(folder: Path, tell: Callable[[dict[str, Any]], None]) -> int:
    """Finish a run, then resume it once more, which may touch nothing but the lock."""
    code = work(folder, tell)
    if code == 0:
        saboteur = Saboteur()
        before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files_of(folder)}
        work(folder, lambda told: tell({**told, "again": True}))
        after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files_of(folder)}
        allowed = {"write", "ftruncate", "close"}  # the lock's
        tell({"no-op": before == after and set(saboteur.calls) <= allowed})
    return code


def frames_of(blocks: int) -> int:
    """Frames of a file of so many blocks."""
    return 16 * blocks - 3 + lead() if blocks > 0 else 0


def lead() -> int:
    """Frames before the first block."""
    return 0 if SOURCE is None else SOURCE.lead


def is_whole(frames: int) -> bool:
    """Whether a file of so many frames has whole blocks, or what is before them."""
    return frames in (0, lead()) or (frames - lead()) % 16 == 13


def a_source(folder: Path) -> SourceVideo:
    """90 frames of 30 a second, with sound: 48 of 16 a second, of which 3 are before the first of 3 blocks."""
    path = write(folder / "source.mp4", RAMP, audio=True)
    return SourceVideo(path=path, sha256=sameness.file_hash(path), blocks=3, lead=3, padded=0)


def plays(path: Path) -> int:
    """How many frames of a file can be decoded; 0 if there is not more than a header."""
    return sum(1 for _ in VideoReader(path)) if path.stat().st_size > 1500 else 0


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "lock")


def check(folder: Path, code: int, told: list[dict[str, Any]], fault: str, expected: dict[str, Any]) -> str:
    """What is wrong after a fault and a resume; empty if nothing is."""
    crash = [line["crash"] for line in told if "crash" in line]
    if crash:
        return f"crashed: {crash}"
    fine = {
        "SIGKILL": (-9,),
        "SIGTERM": (0, 143),
        "ENOSPC": (0, 6),  # 0 where it does no harm, as when a file is closed that was synced
        "EIO": (0, 1, 2),
        "short write": (0,),
    }
    if code not in fine[fault]:
        return f"exit code {code}, told {told[-1:]}"
    reported = [line["block"] for line in told if "block" in line]
    kept = len(list((folder / "run" / "latents").glob("*.safetensors")))
    if reported and kept <= max(reported):
        return f"block {max(reported)} was reported and {kept} are there"
    there = [plays(path) for path in (folder / "v.part.mp4", folder / "v.mp4") if path.exists()]
    wanted = frames_of(max(reported) + 1) if reported else 0
    if not all(map(is_whole, there)) or max(there, default=0) < wanted:
        return f"the files have {there} frames, {wanted} were reported"
    code, more = in_child(lambda tell: resume_twice(folder, tell))
    if code or not any(line.get("no-op") for line in more):
        return f"resume ended with {code}: {more[-1:]}"
    seen = [(line["block"], line["frames"]) for line in told + more if "frames" in line]
    if any(expected["frames"][index] != value for index, value in seen):
        return "other frames before encoding"
    found = facts(folder)
    return ", ".join(f"other {name}" for name in found if found[name] != expected[name])


def writers(every: int, faults: tuple[str, ...] = FAULTS, *, goes_on: bool = False) -> dict[str, Any]:
    """Strike at every n-th call with every fault (`every` 1), or at a sample that moves on from fault to fault.

    goes_on: the made-up video goes on with somebody else's.
    """
    global SOURCE
    rollout.stream_generate = made_up_blocks  # type: ignore[assignment]
    write = VideoWriter.write

    def write_and_wait(self: VideoWriter, frames: Any) -> None:
        write(self, frames)
        self.flush()  # the calls of the two threads come in one order

    VideoWriter.write = write_and_wait  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as top:
        os.environ["XDG_STATE_HOME"] = f"{top}/state"
        SOURCE = a_source(Path(top)) if goes_on else None
        whole = Path(top) / "whole"
        whole.mkdir()

        def unbroken(tell: Callable[[dict[str, Any]], None]) -> int:
            saboteur = Saboteur()
            code = work(whole, tell)
            tell({"calls": list(saboteur.calls)})
            return code

        code, told = in_child(unbroken)
        assert code == 0, told
        calls = told.pop()["calls"]
        expected = {**facts(whole), "frames": {line["block"]: line["frames"] for line in told}}
        assert len(expected["packets"]) == frames_of(BLOCKS)
        wrong, cases = [], 0
        for shift, fault in enumerate(faults):
            for at in range(shift * every // len(faults), len(calls), every):
                if fault == "short write" and calls[at] != "write":
                    continue
                folder = Path(top) / "broken"
                folder.mkdir()

                def broken(tell: Callable[[dict[str, Any]], None], fault: str = fault, at: int = at) -> int:
                    Saboteur(fault, at)
                    return work(Path(top) / "broken", tell)

                code, told = in_child(broken)
                problem = check(folder, code, told, fault, expected)
                if problem:
                    wrong.append({"fault": fault, "at": at, "call": calls[at], "problem": problem})
                shutil.rmtree(folder)
                shutil.rmtree(Path(top) / "state", ignore_errors=True)
                cases += 1
    return {"points": len(calls), "cases": cases, "wrong": wrong}


# -- the real command --------------------------------------------------------------------------------------------


QUEUED = 5  # blocks that may wait for the encoder, the one at work on included


def generate(kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill `packforcing generate` and every `packforcing resume` after it at random moments, until so many died.

    A moment is some time after some event of --progress json. Returns: beside kills and videos how many of the kills
    came when some blocks, and not all, were in the run folder.
    """
    from test_generate import PROMPT, write_tiny

    random_ = random.Random(seed)
    with tempfile.TemporaryDirectory() as top:
        os.environ["XDG_STATE_HOME"] = f"{top}/state"
        package = write_tiny(Path(top) / "tiny")
        first = ["generate", PROMPT, "--model", str(package), "--seconds", "12", "--seed", "5", "-o", "v.mp4"]
        first += ["--run", "run", "--snapshot-every", "5", "--progress", "json"]
        again = ["resume", "run", "--progress", "json"]

        def command(folder: Path, words: list[str]) -> int:
            os.chdir(folder)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            sys.stderr = open("said", "w")  # noqa: SIM115, PTH123 (until the child ends)
            try:
                cli.main(words)
            except SystemExit as stop:
                return int(stop.code or 0)
            return 0

        def events(folder: Path) -> list[dict[str, Any]]:
            text = (folder / "said").read_text() if (folder / "said").exists() else ""
            lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
            return [json.loads(line) for line in lines if line.startswith("{")]

        def reported(folder: Path) -> list[int]:
            return [event["index"] for event in events(folder) if event["event"] == "block"]

        whole = Path(top) / "whole"
        whole.mkdir()
        started = time.monotonic()
        assert in_child(lambda _: command(whole, first))[0] == 0, (whole / "said").read_text()
        longest = time.monotonic() - started
        total = len(reported(whole))
        assert total == 12
        (whole / "said").unlink()
        expected = facts(whole)
        died, inside, videos, wrong = 0, 0, 0, []
        while died < kills:
            folder = Path(top) / "broken"
            folder.mkdir()
            words, mine = first, 0
            while died < kills and mine < 6:
                (folder / "said").unlink(missing_ok=True)
                target = random_.randint(-1, total - 2)
                child = os.fork()
                if child == 0:
                    os._exit(command(folder, words))
                for _ in range(20_000):
                    if max(reported(folder), default=-1) >= target or os.waitid(
                        os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT
                    ):
                        break
                    time.sleep(0.002)
                time.sleep(random_.uniform(0, longest / total))
                os.kill(child, signal.SIGKILL)
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                died, mine = died + (code == -9), mine + 1
                if code not in (0, -9):
                    wrong.append({"command": words[0], "code": code, "said": (folder / "said").read_text()})
                told = max(reported(folder), default=-1) + 1
                kept = len(list((folder / "run" / "latents").glob("*.safetensors")))
                inside += code == -9 and 0 < kept < total
                if kept < told:
                    wrong.append({"reported": told, "kept": kept})
                if (folder / "run" / "run.json").exists():
                    words = again
                    with RunFolder.open(folder / "run"):
                        pass  # readable at any moment
                else:  # killed before there was a run
                    shutil.rmtree(folder / "run", ignore_errors=True)
                there = [plays(path) for path in (folder / "v.part.mp4", folder / "v.mp4") if path.exists()]
                least = frames_of(told - QUEUED)
                if not all(map(is_whole, there)) or max(there, default=0) < least:
                    wrong.append({"frames": there, "at least": least})
            for _ in range(2):
                code, _told = in_child(lambda _, folder=folder, words=words: command(folder, words))  # type: ignore[misc]
                words = again
                if code:
                    wrong.append({"last": words[0], "code": code, "said": (folder / "said").read_text()})
            (folder / "said").unlink()
            if not wrong:
                found = facts(folder)
                wrong += [{"other": name} for name in found if found[name] != expected[name]]
            shutil.rmtree(folder)
            videos += 1
            if wrong:
                break
    return {"kills": died, "inside": inside, "videos": videos, "wrong": wrong}


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    some = commands.add_parser("writers")
    some.add_argument("--every", type=int, default=1)
    some.add_argument("--source", action="store_true", help="the video goes on with another one")
    some.add_argument("--no-metadata", action="store_true", help="the file does not say whose it is")
    killed = commands.add_parser("generate")
    killed.add_argument("kills", type=int)
    killed.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    global TAGGED
    TAGGED = not getattr(arguments, "no_metadata", False)
    torch.set_num_threads(1)
    if arguments.command == "writers":
        result = writers(arguments.every, goes_on=arguments.source)
    else:
        result = generate(arguments.kills, arguments.seed)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(result["wrong"]))


if __name__ == "__main__":
    main()
