"""Kill workers and the driver of a batch at random; at the end every job must be done exactly once, and be right.

    python tests/batch_chaos.py --jobs 40                  jobs of one second, two workers, kills every few seconds
    python tests/batch_chaos.py --jobs 300 --seed 7        the whole proof
    python tests/batch_chaos.py --jobs 40 --engine ray     the same with Ray's actors
    python tests/batch_chaos.py --jobs 40 --throughput 4   afterwards: one calm batch against a loop of `generate`

Everything happens in a temporary folder (--keep DIR for one that stays). Prints one JSON object; exit code 1 if
anything is wrong: a job that is not done, or twice; a file that does not play, has other frames or other bytes than in
a calm run by one process. "taken_over" are jobs that were begun more than once, "resumed" those of them whose blocks
were there already. A run is described by --seed: who is killed when. What a kill hits depends on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from packforcing_cli.ledger import Ledger, ledgers
from packforcing_cli.tasks import file_sha256

COLOURS = ("red", "green", "blue", "yellow", "white", "purple")
SHAPES = ("circle", "square", "triangle")
WAYS = ("left", "right", "up", "down")
FRAMES = 13  # one block of the demo
MAX_RESTARTS = 10_000


def write_manifest(path: Path, jobs: int, size: str) -> None:
    chosen = random.Random(0)
    lines = []
    for number in range(jobs):
        prompt = f"a {chosen.choice(COLOURS)} {chosen.choice(SHAPES)} moving {chosen.choice(WAYS)}"
        lines.append(
            json.dumps({"prompt": prompt, "seconds": 1, "size": size, "model": "demo", "seed": number})
        )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def command(manifest: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "packforcing_cli", "batch", str(manifest), "--out", str(out), *more]


def environment() -> dict[str, str]:
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def workers_of(driver: int) -> list[int]:
    """Processes that do jobs for a driver: its children, or Ray's actors below it."""
    parents: dict[int, int] = {}
    words: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            words[int(entry.name)] = (
                (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            )
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue

    def is_below(pid: int) -> bool:
        while pid in parents and pid != driver:
            pid = parents[pid]
        return pid == driver

    kinds = ("ray::BatchActor", "packforcing_cli.local_engine")
    return sorted(
        pid
        for pid, text in words.items()
        if pid != driver and any(kind in text for kind in kinds) and is_below(pid)
    )


def outlive(driver: subprocess.Popen[bytes], wait: float, out: Path, *, any_time: bool) -> int | None:
    """Let the driver work for so many seconds, and unless `any_time` until a job more is done.

    On a machine so slow that a model is not loaded between two kills the batch would never end.
    Returns: its exit code if it ended.
    """
    until, before = time.monotonic() + wait, count_done(out)
    while driver.poll() is None:
        time.sleep(0.05)
        if time.monotonic() >= until and (any_time or count_done(out) > before):
            return None
    return driver.returncode


def count_done(out: Path) -> int:
    paths = ledgers(out) if out.is_dir() else []
    if not paths:
        return 0
    with Ledger.open(paths[0]) as base:
        return base.counts()["done"]


def torment(
    manifest: Path, out: Path, seed: int, pause: tuple[float, float], options: list[str]
) -> dict[str, int]:
    """Run a batch to its end, killing a random worker or the driver again and again."""
    chosen = random.Random(seed)
    kills = {"worker": 0, "driver": 0, "starts": 0}
    log = (out.parent / "driver.log").open("ab")
    while kills["starts"] < MAX_RESTARTS:
        kills["starts"] += 1
        driver = subprocess.Popen(
            command(manifest, out, "--progress", "plain", *options),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
        while True:
            wait = chosen.uniform(*pause)
            hits_driver = chosen.random() < 0.25
            code = outlive(driver, wait, out, any_time=chosen.random() < 0.25)
            if code is not None:
                if code == 0:
                    return kills
                raise SystemExit(f"the batch ended with exit code {code}; see {out.parent / 'driver.log'}")
            workers = workers_of(driver.pid)
            if hits_driver:
                os.kill(driver.pid, signal.SIGKILL)
                driver.wait()
                kills["driver"] += 1
                break
            if workers:
                try:
                    os.kill(chosen.choice(workers), signal.SIGKILL)
                    kills["worker"] += 1
                except ProcessLookupError:
                    pass
    raise SystemExit("it never ends")


def look(out: Path, jobs: int) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """What is wrong with a finished folder, and job -> result."""
    from packforcing_cli.reader import VideoReader

    wrong: list[str] = []
    (path,) = ledgers(out)
    with Ledger.open(path) as base:
        rows, events = base.rows(), base.events()
    if len(rows) != jobs:
        wrong.append(f"{len(rows)} jobs, not {jobs}")
    finished = [event["job"] for event in events if event["event"] == "done"]
    if sorted(finished) != sorted({row.id for row in rows}):
        wrong.append(f"{len(finished)} times done, {len(set(finished))} different jobs")
    for row in rows:
        if row.status != "done":
            wrong.append(f"job {row.position} is {row.status}: {row.error}")
            continue
        file = out / row.output
        frames = sum(1 for _ in VideoReader(file))
        if frames != FRAMES or row.result["frames"] != FRAMES:
            wrong.append(f"{row.output}: {frames} frames play")
        if file_sha256(file) != row.result["sha256"]:
            wrong.append(f"{row.output} is not the file that was noted")
    strays = {str(p.relative_to(out)) for p in out.glob("*.mp4")} - {row.output for row in rows}
    wrong += [f"{name} is nobody's" for name in sorted(strays)]
    return wrong, {row.id: row.result for row in rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="who is killed when")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--size", default="64x64")
    parser.add_argument("--pause", type=float, nargs=2, default=(4.0, 12.0), help="seconds between kills")
    parser.add_argument("--engine", default="local", choices=("local", "ray"))
    parser.add_argument(
        "--throughput", type=int, default=0, metavar="N", help="compare with N single commands"
    )
    parser.add_argument("--keep", type=Path, default=None)
    given = parser.parse_args()
    folder = given.keep or Path(tempfile.mkdtemp(prefix="packforcing-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        values = run(folder, given)
    finally:
        if given.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(values, indent=2))
    return 1 if values["wrong"] else 0


def run(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    manifest = folder / "jobs.jsonl"
    write_manifest(manifest, given.jobs, given.size)
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        os.environ[name] = str(folder / name)
    engine = ["--workers", str(given.workers)]
    if given.engine == "ray":
        engine += ["--engine", "ray", "--cpus-per-worker", "1"]
    values: dict[str, Any] = {"jobs": given.jobs, "seed": given.seed, "engine": given.engine}
    began = time.monotonic()
    calm = folder / "calm"
    done = subprocess.run(
        command(manifest, calm, "--workers", "1", "-q", "--json"), env=environment(), stdout=subprocess.PIPE
    )
    values["calm_seconds"] = round(time.monotonic() - began, 1)
    wrong, expected = look(calm, given.jobs)
    if done.returncode:
        wrong.append(f"the calm run ended with exit code {done.returncode}")
    began = time.monotonic()
    kills = torment(manifest, folder / "chaos", given.seed, tuple(given.pause), engine)
    values |= {"kills": kills, "chaos_seconds": round(time.monotonic() - began, 1)}
    more, found = look(folder / "chaos", given.jobs)
    wrong += more
    taken_over = resumed = 0
    for job, result in expected.items():
        other = found.get(job, {})
        taken_over += other.get("attempt", 1) > 1
        resumed += other.get("attempt", 1) > 1 and other["figures"]["replayed"] > 0
        for name in ("latents_sha256", "packets_sha256"):
            if result.get(name) != other.get(name):
                wrong.append(f"job {job[:12]}: {name} is not that of the calm run")
    values |= {"taken_over": taken_over, "resumed": resumed}
    if given.throughput:
        values["throughput"] = throughput(folder, calm, given)
    return {**values, "wrong": wrong}


def throughput(folder: Path, calm: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Seconds a video: one batch of N jobs with one worker, and N single commands, in turn on this machine."""
    count = given.throughput
    manifest = folder / "few.jsonl"
    write_manifest(manifest, count, given.size)
    began = time.monotonic()
    subprocess.run(
        command(manifest, folder / "few", "--workers", "1", "-q"), env=environment(), check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    together = (time.monotonic() - began) / count
    began = time.monotonic()
    for number, line in enumerate(manifest.read_text("utf-8").splitlines()):
        job = json.loads(line)
        words = [
            "generate",
            job["prompt"],
            "--seconds",
            "1",
            "--size",
            job["size"],
            "--seed",
            str(job["seed"]),
        ]
        words += ["--model", "demo", "-q", "-o", str(folder / f"single-{number}.mp4")]
        subprocess.run(
            [sys.executable, "-m", "packforcing_cli", *words], env=environment(), check=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
    alone = (time.monotonic() - began) / count
    return {
        "jobs": count,
        "batch_seconds_a_job": round(together, 3),
        "loop_seconds_a_job": round(alone, 3),
        "times_as_fast": round(alone / together, 2),
    }


if __name__ == "__main__":
    sys.exit(main())
