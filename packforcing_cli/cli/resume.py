"""packforcing resume RUN: finish a video that was stopped, killed or ran out of something."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from packforcing_cli.cli import extend_file as foreign
from packforcing_cli.cli import generate as runner
from packforcing_cli.cli import memory_options as memory

if TYPE_CHECKING:
    from packforcing_cli.cli.progress import Display
    from packforcing_cli.config import GenerateRequest
    from packforcing_cli.registry import VideoModel
    from packforcing_cli.runfolder import RunFolder


def resume(
    run: Annotated[
        str | None,
        typer.Argument(help="A run's id or the beginning of it, its folder, or its unfinished video."),
    ] = None,
    last: Annotated[bool, typer.Option("--last", help="The newest run that is not finished.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE.mp4", help="Write the whole video there instead."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N. Default: as before."),
    ] = None,
    guard: memory.Guard = None,
    force: Annotated[
        bool, typer.Option("--force", help="Go on although model, layout or libraries are not as they were.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON instead of the path.")
    ] = False,
    progress: Annotated[str, typer.Option("--progress", help="auto, rich, plain, json or none.")] = "auto",
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but errors.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Say more; show tracebacks.")] = False,
) -> None:
    """Go on with a video where it ended: after Ctrl-C, a kill, a power cut, a full disk.

    Nothing that was made is made again: the blocks are read from the run folder and go through the memory once
    more. With equal numerics the result is the same, bit for bit, as if it had never ended. Resuming a finished
    video does nothing.

    Example: packforcing resume --last

    Exit codes: as generate; 2 also if model, layout or libraries changed.
    """
    from packforcing_cli import finishing, jobs
    from packforcing_cli.cli import console
    from packforcing_cli.cli import progress as display
    from packforcing_cli.config import GenerateRequest
    from packforcing_cli.errors import PackforcingError
    from packforcing_cli.runfolder import RunFolder

    shown = display.choose(progress, quiet=quiet, verbose=verbose)
    try:
        with RunFolder.open(_folder(run, last=last)) as opened:
            if opened.dropped:
                shown.warn(f"{opened.dropped} was torn when the run ended; that block is made again")
            path = Path(opened.record.output)
            if output is not None:
                path = jobs.checked_output(output).absolute()
            given = {} if guard is None else {"guard": guard}
            request = GenerateRequest.from_values({**opened.record.request, **given})
            request = request.model_copy(update={"output": path})
            if device is not None:
                request = request.model_copy(update={"device": device})
            if opened.blocks:  # the start image is in the first of them
                request = request.model_copy(update={"image": None})
            was_finished = opened.record.status == "finished"
            if output is None and finishing.finish(opened):
                done = (
                    "was already finished" if was_finished else "is finished now: only the file was missing"
                )
                shown.note(f"{opened.record.id} {done}, {opened.record.frames} frames.")
                if as_json:
                    console.result_json(_finished(opened))
                else:
                    console.result(str(path))
                return
            job = runner.prepare(request, path=path, blocks=opened.blocks, why=as_before(device))
            job.plan.require_fit()
            runner.say_model(job, shown)

            def go_on(model: VideoModel) -> RunFolder:
                return _go_on(opened, model, request, shown, force=force)

            if job.history is not None:
                code = foreign.run_job(
                    job, shown, as_json=as_json, verbose=verbose, open_run=go_on, run=opened
                )
                if code:
                    raise typer.Exit(code)
                return
            outcome = runner.run_job(job, shown, verbose=verbose, open_run=go_on, run=opened)
    except PackforcingError as error:
        if shown.error(error):
            raise typer.Exit(error.exit_code) from error
        raise
    if outcome.result is not None:
        command = runner.repeat_command(GenerateRequest.from_values(opened.record.request))
        runner.report(job, outcome, outcome.result, shown, as_json=as_json, more={"command": command})
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)


def as_before(device: str | None) -> dict[str, str]:
    """Why a run that goes on takes its model, device (unless one is asked for) and precision."""
    same = dict.fromkeys(("model", "device", "precision"), "as before")
    return same if device is None else {**same, "device": "asked for"}


def _folder(run: str | None, *, last: bool) -> Path:
    """The run folder that is meant. Raises: UsageError."""
    from packforcing_cli import runfolder
    from packforcing_cli.errors import UsageError

    if (run is None) is not last:
        raise UsageError("give a run, or --last", hint="See `packforcing runs list`.")
    if run is not None:
        return find_run(run)
    open_ends = [known for known in runfolder.all_runs() if known.status in ("interrupted", "stopped")]
    if not open_ends:
        raise UsageError("there is no run that is not finished", hint="See `packforcing runs list`.")
    return open_ends[-1].folder


def find_run(name: str) -> Path:
    """The run folder of a folder, an id, or a video file that a run here made. Raises: UsageError, VideoError."""
    from packforcing_cli import runfolder
    from packforcing_cli.continuation import run_of
    from packforcing_cli.errors import UsageError
    from packforcing_cli.reader import VideoReader

    if not os.path.isfile(name):  # noqa: PTH113  (Path's raises for a name too long)
        return runfolder.find(name)
    video = VideoReader(name)
    folder, run_id = run_of(video), video.metadata.get("run", "")
    if folder is None:
        what = f"its run {run_id} is not here any more" if run_id else "it names no run"
        raise UsageError(f"{name} cannot be continued: {what}", hint="See `packforcing runs list`.")
    return folder


def _go_on(
    run: RunFolder, model: VideoModel, request: GenerateRequest, shown: Display, *, force: bool
) -> RunFolder:
    """Compare with what it was, say what is ahead, and note that it is being worked on.

    Raises: UsageError if results would differ; as `RunFolder.update`.
    """

    from packforcing_cli import sameness

    now = sameness.must_be_same(model, request, made=run.blocks)
    check_same(run, now, shown, force=force)
    if sameness.is_other_memory(run.record.must, now):
        run.update(other_memory=run.blocks)
    announce(run, model, shown)
    is_same = run.record.output == str(request.output)
    frames, closing = (run.record.frames, run.record.closing) if is_same else (0, 0)
    changes = {"output": str(request.output), "frames": frames, "closing": closing}
    asked = {**run.record.request, "guard": request.guard}
    run.update(status="running", **changes, must={**run.record.must, **now}, request=asked)
    return run


def announce(
    run: RunFolder, model: VideoModel, shown: Display, *, keep: int | None = None, blocks: int | None = None
) -> None:
    """Say what going on with a run takes, and whether this machine makes the same bits.

    keep, blocks: of a branch: how many blocks it takes over, and its length; None = the run itself goes on.
    """
    from packforcing_cli import finishing, runfolder, sameness

    changed = runfolder.differences(run.record.numerics, sameness.numerics(model))
    if changed:
        shown.warn(
            f"this is not the machine it was ({'; '.join(changed)}): the result is not guaranteed to be the same,"
            " bit for bit"
        )
    cost = finishing.replay_cost(run, keep=keep, blocks=blocks)
    if run.snapshot_problem:
        shown.warn(f"{run.snapshot_problem}; it is not used, the blocks are enough")
    there, length = keep or run.blocks, blocks or run.record.blocks
    shown.note(
        f"{run.record.id}: {there} of {length} blocks are there; {cost.blocks} to go through again"
        f" ({_about(cost.seconds)}), {length - there} to make ({_about(cost.rest_seconds)})"
    )


def check_same(run: RunFolder, now: dict[str, object], shown: Display, *, force: bool) -> None:
    """Raises: UsageError naming what differs from when the run was made; with `force` it is a warning."""
    from packforcing_cli import runfolder, sameness
    from packforcing_cli.errors import UsageError

    made = {sameness.PICTURE.format(block) for block in range(run.blocks)}
    then = {name: value for name, value in run.record.must.items() if name not in made}
    changed = runfolder.differences(then, now)
    if changed and not force:
        shown_first = "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if len(changed) > 4 else "")
        raise UsageError(
            f"{run.record.id} was made with something else: {shown_first}",
            hint="Bring back what it was made with, or go on all the same with --force.",
        )
    if changed:
        shown.warn(f"not as it was: {'; '.join(changed)}. The video may change where it goes on.")


def _about(seconds: float | None) -> str:
    from packforcing_cli.cli import console

    if seconds is None:
        return "unknown time"
    return f"about {console.duration(round(seconds, 1) if seconds < 10 else round(seconds))}"


def _finished(run: RunFolder) -> dict[str, object]:
    record = run.record
    return {
        "schema": runner.SCHEMA,
        "path": record.output,
        "run": record.id,
        "frames": record.frames,
        "blocks": record.blocks,
        "seconds": record.frames / record.fps,
        "interrupted": False,
    }
