"""The part of `packforcing extend` that goes on with any video file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from packforcing_cli.cli import generate as runner
from packforcing_cli.cli import story_options as story

if TYPE_CHECKING:
    from packforcing_cli.cli.progress import Display
    from packforcing_cli.config import GenerateRequest
    from packforcing_cli.jobs import Job
    from packforcing_cli.registry import VideoModel
    from packforcing_cli.runfolder import RunFolder

PANEL = "Videos made elsewhere"

Model = Annotated[
    str | None,
    typer.Option("--model", rich_help_panel=PANEL, help="A model's name or a package folder. Default auto."),
]
Size = Annotated[
    str | None,
    typer.Option(
        "--size", metavar="WxH", rich_help_panel=PANEL, help="Pixels. Default: the model's own size."
    ),
]
Fit = Annotated[
    str | None,
    typer.Option(
        "--fit",
        metavar="NAME",
        rich_help_panel=PANEL,
        help="How the pictures come to that size: crop (default), pad or stretch.",
    ),
]
FromTime = Annotated[
    str | None,
    typer.Option(
        "--from-time", metavar="TIME", rich_help_panel=PANEL, help="Use the source from there. Default: 0:00."
    ),
]
ToTime = Annotated[
    str | None,
    typer.Option(
        "--to-time",
        metavar="TIME",
        rich_help_panel=PANEL,
        help="Use the source up to there. Default: its end.",
    ),
]
OnlyNew = Annotated[
    bool, typer.Option("--only-new", rich_help_panel=PANEL, help="Write the new part without the source.")
]


@dataclass(frozen=True)
class Options:
    """What only a video made elsewhere takes."""

    model: str | None
    size: str | None
    fit: str | None
    from_time: str | None
    to_time: str | None
    only_new: bool

    def refuse(self, source: str) -> None:
        """Raises: UsageError if one was given for a video that goes on from its run."""
        from packforcing_cli.errors import UsageError

        given = [name for name, value in vars(self).items() if value]
        if given:
            name = "--" + given[0].replace("_", "-")
            raise UsageError(
                f"{name} is for videos made elsewhere; {source} goes on from its run, as it was made",
                hint=f"Leave {name} away.",
            )


def is_foreign(source: str, shown: Display) -> bool:
    """Whether a source is a video file of which there is no run here.

    Raises: UsageError if it is a missing file's name; VideoError if it cannot be read.
    """
    from packforcing_cli.continuation import run_of
    from packforcing_cli.errors import UsageError
    from packforcing_cli.reader import VideoReader

    if not os.path.isfile(source):  # noqa: PTH113  (Path's raises for a name too long)
        if Path(source).suffix and not os.path.isdir(source):  # noqa: PTH112
            raise UsageError(
                f"there is no file {source}", hint="Check the name; runs are in `packforcing runs list`."
            )
        return False
    video = VideoReader(source)
    if run_of(video) is not None:
        return False
    run_id = video.metadata.get("run")
    if run_id:
        shown.note(f"The run of {source} ({run_id}) is not here: going on from its pictures.")
    return True


def extend_file(
    source: Path,
    options: Options,
    seconds: float,
    prompt: str | None,
    at: list[str] | None,
    pin: list[str] | None,
    changes: Mapping[str, Any],
    frames: Path | None,
    output: Path | None,
    run: Path | None,
    *,
    keep_run: bool,
    overwrite: bool,
    as_json: bool,
    shown: Display,
    verbose: bool,
) -> int:
    """Go on with a video file; prints the path of the new one. Returns: the exit code.

    Args:
        changes: settings by name, None = not given.
        frames:  folder for PNGs.
    Raises: PackforcingError, saying what plays.
    """
    from packforcing_cli import jobs, timeline
    from packforcing_cli.reader import VideoReader

    said = prompt if prompt is not None else VideoReader(source).metadata.get("prompt", "")
    if not said.strip():
        shown.warn("there is no --prompt, and the source does not name one: going on with an empty prompt")
    flags: dict[str, Any] = {
        "model": options.model,
        "size": options.size,
        "fit": options.fit,
        "seconds": seconds,
        **changes,
        "overwrite": overwrite or None,
        "keep_run": None if keep_run else False,
    }
    request, why_model = _request(source, options, said, at, pin, flags, frames, output)
    folder = runner.check_run_options(request, run)
    job = runner.prepare(request, why={"model": why_model})
    job.plan.require_fit()
    history = job.history
    assert history is not None
    runner.say_model(job, shown)
    (width, height), fps = job.plan.size, job.plan.fps
    shown.note(
        f"{source}: {timeline.clock(Fraction(history.source.num_frames, fps))} at {width}x{height},"
        f" {fps} fps; {history.blocks} blocks of it are remembered, {job.plan.blocks - history.blocks} follow,"
        f" seed {job.request.seed}"
    )
    for warning in (*history.source.warnings, *job.plan.warnings):
        shown.warn(warning)

    def new_run(model: VideoModel) -> RunFolder | None:
        return jobs.new_run(job, model, folder)

    return run_job(job, shown, as_json=as_json, verbose=verbose, open_run=new_run)


def _request(
    source: Path,
    options: Options,
    said: str,
    at: list[str] | None,
    pin: list[str] | None,
    flags: dict[str, Any],
    frames: Path | None,
    output: Path | None,
) -> tuple[GenerateRequest, str]:
    """The request for a video that goes on with a file, and why it takes the model it does."""
    from packforcing_cli import continuation
    from packforcing_cli.cli import choose, settings

    _, wanted = story.gather(said, at, None, pin)
    request = settings.gather(flags).generate_request(
        said.strip() or f"more of {source.stem}", output, frames=frames
    )
    output_folder = (request.output or Path()).absolute().parent
    request, _, why_model = choose.resolve_model(request, output_folder)
    for name, text in (("--from-time", options.from_time), ("--to-time", options.to_time)):
        time_of(text, name)
    if request.output is None:  # its name is made before the prompt may be empty
        from packforcing_cli import jobs

        request = request.model_copy(update={"output": jobs.output_path(request)})
    request = continuation.request_for_file(
        request,
        source,
        prompt=said,
        asked=wanted,
        from_time=options.from_time,
        to_time=options.to_time,
        only_new=options.only_new,
    )
    return request, why_model


def time_of(text: str | None, option: str) -> Fraction | None:
    """The value of an option that is a time. Raises: UsageError."""
    from packforcing_cli.errors import UsageError
    from packforcing_cli.timeline import parse_time

    try:
        return None if text is None else parse_time(text.strip())
    except ValueError as error:
        raise UsageError(f"{option}: {error}", hint="Write it as 0:40, or in seconds as 12.5.") from error


def run_job(
    job: Job,
    shown: Display,
    *,
    as_json: bool,
    verbose: bool,
    open_run: Callable[[VideoModel], RunFolder | None],
    run: RunFolder | None = None,
) -> int:
    """Make or finish a video that goes on with a file; prints its path. Returns: the exit code.

    Args and raises: as `generate.run_job`.
    """
    from packforcing_cli.extension import SeamMeter

    history = job.history
    assert history is not None
    known = len(history.source.warnings)
    meter = SeamMeter(history.shown)
    outcome = runner.run_job(job, shown, verbose=verbose, open_run=open_run, run=run, watch=meter)
    for warning in history.source.warnings[known:]:
        shown.warn(warning)
    result = outcome.result
    if result is None:
        return outcome.exit_code
    if not result.frames:
        rest = f"To go on: packforcing resume {outcome.run_id}" if outcome.run_id else "Nothing was written."
        if result.ended:
            shown.warn(f"--guard stop: {result.ended}. {runner.OTHER_NOISE}")
        shown.note(f"Stopped before there was a new block. {rest}")
        return outcome.exit_code
    new = result.blocks - history.blocks
    shown.note(f"{runner.count(new, 'new block')} behind {history.source.num_frames} frames of the source.")
    if meter.seam is not None:
        shown.note(f"The seam: {meter.seam}.")
    more: dict[str, Any] = {
        "source": str(history.source.path),
        "source_frames": history.source.num_frames,
        "history_blocks": history.blocks,
        "new_blocks": new,
        "seam": None if meter.seam is None else asdict(meter.seam),
    }
    warnings = [*history.source.warnings, *job.plan.warnings]
    runner.report(job, outcome, result, shown, as_json=as_json, more={**more, "warnings": warnings})
    return outcome.exit_code
