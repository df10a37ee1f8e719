"""packforcing eval: what can be said of a video by measuring it."""

from __future__ import annotations

from typing import Annotated

import typer

from packforcing_cli.cli import measure as measuring


def evaluate(
    videos: measuring.Videos = None,
    prompt: measuring.Prompt = None,
    clip: measuring.Clip = None,
    seam: measuring.Seam = None,
    plot: measuring.Plot = None,
    overwrite: measuring.Overwrite = False,
    explain: measuring.Explain = False,
    offline: measuring.Offline = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but errors.")] = False,
) -> None:
    """Measure videos: motion, flicker, drift over time and distance, loops, jumps, seams; with --clip the prompt, too.

    Example: packforcing eval circle.mp4 other.mp4 --plot compared.png

    Exit codes: 0 done, 1 no video or damaged, 2 usage, 6 disk full, 7 bad weights, 8 offline and missing.
    """
    measuring.run(
        videos or [],
        prompt=prompt,
        clip=clip,
        seam=seam,
        plot=plot,
        overwrite=overwrite,
        explain=explain,
        offline=offline,
        as_json=as_json,
        quiet=quiet,
    )
