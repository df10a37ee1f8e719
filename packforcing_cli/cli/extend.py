"""packforcing extend SOURCE: make a finished or interrupted video longer, or branch off it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from packforcing_cli.cli import extend_file as foreign
from packforcing_cli.cli import file_options as files
from packforcing_cli.cli import generate as runner
from packforcing_cli.cli import memory_options as memory
from packforcing_cli.cli import resume as resuming
from packforcing_cli.cli import story_options as story

if TYPE_CHECKING:
    from packforcing_cli.registry import VideoModel
    from packforcing_cli.runfolder import RunFolder


def extend(
    source: Annotated[
        str, typer.Argument(help="A run's id or folder, a video made here, or any other video file.")
    ],
    seconds: Annotated[float, typer.Option("--seconds", help="Length of the new part, in whole blocks.")],
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="TIME", help="Branch off there, 12.5 or 0:40. Default: the end."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="What the new part shows. Default: as before.")
    ] = None,
    at: story.At = None,
    pin: story.Pin = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the new part. Default: as before.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE.mp4", help="Default: a name made from the prompt."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N. Default: as before."),
    ] = None,
    codec: files.Codec = None,
    crf: files.Crf = None,
    preset: files.Preset = None,
    frames: files.Frames = None,
    metadata: files.Metadata = None,
    run: files.RunPlace = None,
    no_run: files.NoRun = False,
    snapshot_every: files.SnapshotEvery = None,
    model: foreign.Model = None,
    size: foreign.Size = None,
    fit: foreign.Fit = None,
    from_time: foreign.FromTime = None,
    to_time: foreign.ToTime = None,
    only_new: foreign.OnlyNew = False,
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
    """Make a video longer, from its latents and its memory: no join can be seen. Prints the path of the new file.

    The new file has the old part and the new one; the source and its run stay as they are. With the same prompt
    and seed the result is what one longer run would have made. A video that was made elsewhere is read, brought to
    the model's size and rate, and remembered in the same bounded memory; how visible the join is will be printed.
    Options of the file that are not given are those of the run.

    Example: packforcing extend a-red-circle.mp4 --seconds 30 --from 0:40 --prompt "a blue square" -o branch.mp4

    Exit codes: as resume.
    """
    from packforcing_cli import continuation, sameness
    from packforcing_cli.cli import progress as display
    from packforcing_cli.config import GenerateRequest
    from packforcing_cli.errors import PackforcingError, UsageError
    from packforcing_cli.runfolder import RunFolder, check_new
    from packforcing_cli.timeline import Timeline, parse_at, parse_pins

    shown = display.choose(progress, quiet=quiet, verbose=verbose)
    options = foreign.Options(model, size, fit, from_time, to_time, only_new)
    changes: dict[str, Any] = {
        "seed": seed,
        "device": device,
        "codec": codec,
        "crf": crf,
        "preset": preset,
        "metadata": metadata,
        "snapshot_every": snapshot_every,
        "guard": guard,
    }
    to_pipe = str(output) == "-"
    try:
        if to_pipe and as_json:
            raise UsageError("video and JSON cannot both go to standard output", hint="Leave --json away.")
        if foreign.is_foreign(source, shown):
            if to_pipe and run is not None:
                raise UsageError(
                    "--run needs a run folder, and a video to standard output has none",
                    hint="Leave one away.",
                )
            for name, given in (("--from", start), ("--force", force)):
                if given:
                    raise UsageError(
                        f"{name} is for videos whose run is here; {source} is read as pictures",
                        hint="To use a part of it: --from-time and --to-time.",
                    )
            code = foreign.extend_file(
                Path(source), options, seconds, prompt, at, pin, changes, frames, output, run,
                keep_run=not (no_run or to_pipe), overwrite=overwrite, as_json=as_json, shown=shown, verbose=verbose,
            )  # fmt: skip
            if code:
                raise typer.Exit(code)
            return
        found = resuming.find_run(source)
        options.refuse(source)
        if to_pipe:
            raise UsageError(
                f"a video that goes on from a run is kept in one, and so in a file; {source} has a run",
                hint="Give a file with -o.",
            )
        if no_run:
            raise UsageError(
                f"--no-run is for videos made elsewhere: {source} goes on in a run folder of its own",
                hint="Leave it away; packforcing runs remove deletes a run.",
            )
        if run is not None:
            check_new(run)
        with RunFolder.open_to_read(found) as old:
            if old.dropped:
                shown.warn(f"{old.dropped} of {old.record.id} is torn and left out")
            blocks, total = continuation.lengths(old, seconds, start)
            before = GenerateRequest.from_values(old.record.request)
            asked = Timeline(
                parse_at(value.strip().partition(" ")[::2] for value in at or ()), parse_pins(pin or ())
            )
            timeline = continuation.timeline_of(old.record, blocks, total, prompt, asked)
            request = continuation.request_of(
                old.record,
                seconds=total,
                timeline=timeline,
                has_new_prompts=prompt is not None or bool(at),
                output=output,
                overwrite=overwrite,
                frames=frames,
                changes=changes,
            )
            job = runner.prepare(request, blocks=blocks, why=resuming.as_before(device))
            job.plan.require_fit()
            runner.say_model(job, shown)
            kept = (job.plan.layout.frames_for(blocks) + old.record.shown.shift) / job.plan.fps
            shown.note(
                f"{old.record.id}: {runner.count(job.plan.blocks - blocks, 'new block')} after"
                f" {display.clock(kept)} (block {blocks} of {old.blocks})"
            )

            def branch(model: VideoModel) -> RunFolder:
                now = sameness.must_be_same(model, before, made=old.blocks)
                resuming.check_same(old, now, shown, force=force)
                resuming.announce(old, model, shown, keep=blocks, blocks=job.plan.blocks)
                other = blocks if sameness.is_other_memory(old.record.must, now) else old.record.other_memory
                return continuation.branch(old, blocks, job, model, run, other_memory=min(other, blocks))

            if job.history is not None:
                code = foreign.run_job(job, shown, as_json=as_json, verbose=verbose, open_run=branch)
                if code:
                    raise typer.Exit(code)
                return
            outcome = runner.run_job(job, shown, verbose=verbose, open_run=branch)
    except PackforcingError as error:
        if shown.error(error):
            raise typer.Exit(error.exit_code) from error
        raise
    if outcome.result is not None:
        runner.report(job, outcome, outcome.result, shown, as_json=as_json)
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)
