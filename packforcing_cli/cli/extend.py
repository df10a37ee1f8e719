"""packforcing extend SOURCE: make a finished or interrupted video longer, or branch off it."""

from __future__ import annotations

import shlex
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
    from packforcing_cli.jobs import Job
    from packforcing_cli.registry import VideoModel
    from packforcing_cli.runfolder import Record, RunFolder
    from packforcing_cli.timeline import Timeline


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
    from packforcing_cli import rollout
    from packforcing_cli.cli import progress as display
    from packforcing_cli.config import GenerateRequest
    from packforcing_cli.errors import PackforcingError, UsageError
    from packforcing_cli.runfolder import RunFolder, check_new

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
    try:
        if foreign.is_foreign(source, shown):
            for name, given in (("--from", start), ("--force", force)):
                if given:
                    raise UsageError(
                        f"{name} is for videos whose run is here; {source} is read as pictures",
                        hint="To use a part of it: --from-time and --to-time.",
                    )
            code = foreign.extend_file(
                Path(source), options, seconds, prompt, at, pin, changes, frames, output, run,
                keep_run=not no_run, overwrite=overwrite, as_json=as_json, shown=shown, verbose=verbose,
            )  # fmt: skip
            if code:
                raise typer.Exit(code)
            return
        found = resuming.find_run(source)
        options.refuse(source)
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
            blocks, total = _lengths(old, seconds, start)
            before = GenerateRequest.from_values(old.record.request)
            timeline = _timeline(old.record, blocks, total, prompt, at, pin)
            request = GenerateRequest.from_values(
                {
                    **old.record.request,
                    "image": None,  # it is in the first block
                    "frames": frames,  # those of the source stay as they are
                    **({"embeddings": None} if prompt is not None or at else {}),  # not for new prompts
                    **{name: value for name, value in changes.items() if value is not None},
                    "seconds": total,
                    "timeline": timeline,
                    "output": output,
                    "overwrite": overwrite,
                    "keep_run": True,
                }
            )
            job = runner.prepare(request, blocks=blocks, why=resuming.as_before(device))
            job.plan.require_fit()
            runner.say_model(job, shown)
            kept = (job.plan.layout.frames_for(blocks) + old.record.shown.late) / job.plan.fps
            shown.note(
                f"{old.record.id}: {runner.count(job.plan.blocks - blocks, 'new block')} after"
                f" {display.clock(kept)} (block {blocks} of {old.blocks})"
            )

            def branch(model: VideoModel) -> RunFolder:
                now = rollout.must_be_same(model, before, made=old.blocks)
                resuming.check_same(old, now, shown, force=force)
                resuming.announce(old, model, shown, keep=blocks, blocks=job.plan.blocks)
                other = blocks if rollout.is_other_memory(old.record.must, now) else old.record.other_memory
                return _branch(old, blocks, job, model, run, other_memory=min(other, blocks))

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


def _lengths(old: RunFolder, seconds: float, start: str | None) -> tuple[int, float]:
    """(blocks that are kept, seconds of the whole new video).

    Raises: UsageError; RunFolderError if a block of the kept part is missing.
    """
    from fractions import Fraction

    from packforcing_cli.cli.progress import clock
    from packforcing_cli.config import GenerateRequest, PlanRequest
    from packforcing_cli.errors import RunFolderError, UsageError
    from packforcing_cli.timeline import clock as exact_clock
    from packforcing_cli.timeline import parse_time

    record, lengths, parts = old.record, old.record.lengths, old.record.shown
    blocks, late = old.blocks, Fraction(old.record.shown.late, old.record.fps)
    if start is not None:
        try:
            wanted = parse_time(start.strip())
        except ValueError as error:
            raise UsageError(f"--from: {error}", hint="Write it as 0:40, or in seconds as 12.5.") from error
        blocks = max(1, lengths.nearest_block(max(wanted - late, Fraction(0)), record.fps))
    there = Fraction(lengths.frames_for(old.blocks), record.fps) + (late if old.blocks else 0)
    if blocks < parts.history:
        source = GenerateRequest.from_values(record.request).source
        assert source is not None
        if start is None:
            raise UsageError(
                f"{record.id} was stopped within {source.path}, which it goes on with",
                hint=f"To finish it first: packforcing resume {record.id}",
            )
        raise UsageError(
            f"--from {start}: that is a part of {source.path}, which {record.id} goes on with",
            hint=f"packforcing extend {shlex.quote(str(source.path))} --to-time {start} --seconds N",
        )
    if old.missing and (start is None or not 0 < blocks <= old.blocks):
        whole = exact_clock(there)
        raise RunFolderError(
            f"{old.missing} of {record.id} is missing, and {whole} before it is whole",
            hint=f"Branch off before it, at the latest with --from {whole}."
            if old.blocks
            else "Restore the file.",
        )
    if not 0 < blocks <= old.blocks:
        raise UsageError(
            f"{record.id} has {clock(float(there)) if there else 'nothing'}"
            + (f", so there is nothing at {start}" if start else ""),
            hint=f"To finish it first: packforcing resume {record.id}",
        )
    new = lengths.blocks_more(PlanRequest(seconds=seconds).seconds, record.fps)
    return blocks, lengths.frames_for(blocks + new) / record.fps


def _timeline(
    record: Record, blocks: int, total: float, prompt: str | None, at: list[str] | None, pin: list[str] | None
) -> Timeline:
    """What the old part had, and what is asked for from there on.

    Scenes and pins of the source behind the branch stay as far as they fit, unless new prompts are given.
    Raises: UsageError for mistakes in `at` and `pin`, also one in the old part, which is made already.
    """
    from fractions import Fraction

    from packforcing_cli import timeline as timelines
    from packforcing_cli.config import GenerateRequest
    from packforcing_cli.errors import UsageError

    before = GenerateRequest.from_values(record.request).timeline
    begins = Fraction(record.lengths.frames_for(blocks), record.fps)
    half_a_block = Fraction(record.lengths.block_frames(blocks), 2 * record.fps)
    ends = Fraction(round(total * record.fps), record.fps) if prompt is None and not at else begins
    late = Fraction(record.shown.late, record.fps)  # times are those of the file
    given = timelines.Timeline(
        timelines.parse_at(value.strip().partition(" ")[::2] for value in at or ()),
        timelines.parse_pins(pin or ()),
    )
    early = [span.text for span in given.pins if span.start - late < begins]
    if early:
        raise UsageError(
            f"--pin {early[0]}: the memory of the old part is made already",
            hint=f"Pin from {timelines.clock(begins + late)} on.",
        )
    given = given.moved(-late)
    new = given.scenes
    if prompt is not None:
        new = (timelines.Scene(begins, prompt), *new)
    for scene in new:
        if scene.seconds < begins - half_a_block:
            raise UsageError(
                f"--at {timelines.clock(scene.seconds + late)}: the old part is made already",
                hint=f"The first possible time is {timelines.clock(begins + late)}; to branch off earlier: --from.",
            )
    kept = before.until(ends, record.lengths, fps=record.fps)
    return timelines.Timeline((*kept.scenes, *new), (*kept.pins, *given.pins))


def _made_by(before: Record, blocks: int, job: Job, *, is_other: bool) -> str | None:
    """The command of a branch that one longer run would not make: after another seed, a start image or another memory,
    or off such a branch. None for a plain continuation.
    """
    from packforcing_cli import jobs, provenance
    from packforcing_cli.errors import UsageError

    try:
        was_branch = provenance.from_tags(before.tags, source=before.id).extends is not None
    except UsageError:  # made with --no-metadata
        was_branch = False
    request = job.request
    if not (
        was_branch or is_other or before.request.get("image") or before.request.get("seed") != request.seed
    ):
        return None
    lengths = before.lengths
    kept = (lengths.frames_for(blocks) + before.shown.late) / before.fps
    new = (lengths.frames_for(job.plan.blocks) - lengths.frames_for(blocks)) / before.fps
    words = ["extend", before.id, "--from", f"{kept:g}", "--seconds", f"{new:g}"]
    words += ["--seed", str(request.seed), "--prompt", job.plan.script.prompts[-1]]
    for name in jobs.FILE_SETTINGS:
        value = getattr(request, name)
        words += [] if before.request.get(name) == value else [f"--{name}", str(value)]
    return shlex.join(["packforcing", *words])


def _branch(
    old: RunFolder, blocks: int, job: Job, model: VideoModel, folder: Path | None, *, other_memory: int
) -> RunFolder:
    """The new run folder, with the first blocks of the old one in it; the old one is let go."""
    from packforcing_cli import jobs, rollout, runfolder

    is_other = bool(other_memory)
    extends = _made_by(old.record, blocks, job, is_other=is_other) if job.request.metadata else None
    tags = jobs.tags_of(job, model, extends=extends)
    record = rollout.new_record(model, jobs.recorded(job), tags=tags, parent=old.record.id)
    record = record.model_copy(update={"other_memory": other_memory})
    where = folder or runfolder.default_root() / record.id
    new = runfolder.RunFolder.create(where, record, source=old, blocks=blocks)
    old.close()
    return new
