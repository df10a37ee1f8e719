"""packforcing eval: what can be said of a video by measuring it, and which memory makes better ones."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from packforcing_cli.cli import measure as measuring
from packforcing_cli.cli import suite as benchmark


def evaluate(
    videos: measuring.Videos = None,
    prompt: measuring.Prompt = None,
    clip: measuring.Clip = None,
    seam: measuring.Seam = None,
    plot: measuring.Plot = None,
    overwrite: measuring.Overwrite = False,
    explain: measuring.Explain = False,
    offline: measuring.Offline = False,
    suite: benchmark.Name = None,
    quick: benchmark.Quick = False,
    model: benchmark.Model = None,
    out: benchmark.Out = None,
    rows: benchmark.Rows = None,
    prompts: benchmark.Prompts = None,
    seeds: benchmark.Seeds = None,
    seconds: benchmark.Seconds = None,
    jobs: benchmark.Jobs = None,
    device: benchmark.Device = None,
    record: benchmark.Record = False,
    dry_run: benchmark.DryRun = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but errors.")] = False,
) -> None:
    """Measure videos: motion, flicker, drift over time and distance, loops, jumps, seams; with --clip the prompt, too.

    Example: packforcing eval circle.mp4 other.mp4 --plot compared.png

    With --suite it makes videos of the demo world with different memories, and compares them by exact detectors.

    Example: packforcing eval --suite demo --quick --out quick

    Exit codes: 0 done, 1 no video or damaged, 2 usage, 6 disk full, 7 bad weights, 8 offline and missing, 9 another
    process writes there, 130 interrupted (with --suite the same command goes on).
    """
    of_videos: dict[str, Any] = {
        "prompt": prompt,
        "clip": clip,
        "seam": seam,
        "plot": plot,
        "overwrite": overwrite,
        "explain": explain,
        "offline": offline,
    }
    of_suite: dict[str, Any] = {
        "quick": quick,
        "model": model,
        "out": out,
        "rows": rows,
        "prompts": prompts,
        "seeds": seeds,
        "seconds": seconds,
        "jobs": jobs,
        "device": device,
        "record": record,
        "dry_run": dry_run,
    }
    if suite is None:
        benchmark.require_none(of_suite, "needs --suite demo")
        measuring.run(videos or [], **of_videos, as_json=as_json, quiet=quiet)
        return
    benchmark.require_none(
        {"VIDEO": videos, **of_videos}, "does not go with --suite, which makes its own videos"
    )
    benchmark.run(suite, **of_suite, as_json=as_json, quiet=quiet)
