"""The part of `packforcing extend` that goes on with any video file."""

from __future__ import annotations

import os
import shlex
import time
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from packforcing_cli.cli import generate as runner
from packforcing_cli.cli import story_options as story

if TYPE_CHECKING:
    from packforcing_cli.cli.progress import Display
    from packforcing_cli.extension import Extension
    from packforcing_cli.jobs import Job
    from packforcing_cli.rollout import Block
    from packforcing_cli.source import History
    from packforcing_cli.timeline import Script
    from packforcing_cli.video import VideoReader

SCHEMA = 1
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
    from packforcing_cli.errors import UsageError
    from packforcing_cli.video import VideoReader

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


def run_of(video: VideoReader) -> Path | None:
    """The folder of the run here that made a video: the one it names, else the one that wrote this very file.

    A file without metadata names none; it is known by its path and its number of frames.
    """
    from packforcing_cli import runfolder

    run_id = video.metadata.get("run")
    if run_id is not None:
        return runfolder.folder_of(run_id)
    known = (str(video.path.absolute()), video.num_frames)
    for run in reversed(runfolder.all_runs()):  # the newest of those that wrote to this path
        if run.record is not None and (run.record.output, run.record.frames) == known:
            return run.folder
    return None


def extend_file(
    source: Path,
    options: Options,
    seconds: float,
    prompt: str | None,
    at: list[str] | None,
    pin: list[str] | None,
    seed: int | None,
    device: str | None,
    output: Path | None,
    *,
    overwrite: bool,
    as_json: bool,
    shown: Display,
    verbose: bool,
) -> int:
    """Go on with a video file; prints the path of the new one. Returns: the exit code.

    Raises: PackforcingError, saying what plays.
    """
    from packforcing_cli import extension, packages, timeline
    from packforcing_cli.cli import choose, settings
    from packforcing_cli.source import Source
    from packforcing_cli.video import VideoReader

    said = prompt if prompt is not None else VideoReader(source).metadata.get("prompt", "")
    if not said.strip():
        shown.warn("there is no --prompt, and the source does not name one: going on with an empty prompt")
    flags: dict[str, Any] = {
        "model": options.model,
        "size": options.size,
        "fit": options.fit,
        "seconds": seconds,
        "seed": seed,
        "device": device,
        "overwrite": overwrite or None,
    }
    _, wanted = story.gather(said, at, None, pin)
    request = settings.gather(flags).generate_request(said.strip() or f"more of {source.stem}", output)
    output_folder = (request.output or Path()).absolute().parent
    request, _, why_model = choose.resolve_model(request, output_folder)
    facts = packages.facts(request.model)
    size = request.size or facts.default_size
    grid = facts.grid(size, request.frames_per_block or facts.frames_per_block)
    start, end = _time(options.from_time, "--from-time"), _time(options.to_time, "--to-time")
    history = Source(
        source, fps=facts.fps, size=size, fit=request.fit, start=start or Fraction(0), end=end
    ).history(grid)
    blocks = history.blocks + grid.blocks_more(request.seconds, facts.fps)
    scenes = extension.on_blocks(wanted, history, fps=facts.fps)
    script = scenes.script(said, grid, fps=facts.fps, num_blocks=blocks, start=history.blocks)
    changes = {"seconds": grid.frames_for(blocks) / facts.fps, "timeline": scenes, "keep_run": False}
    job = runner.prepare(request.model_copy(update=changes), why={"model": why_model})
    job.plan.require_fit()
    runner.say_model(job, shown)
    shown.note(
        f"{source}: {timeline.clock(Fraction(history.source.num_frames, facts.fps))} at {size[0]}x{size[1]},"
        f" {facts.fps} fps; {history.blocks} blocks of it are remembered, {blocks - history.blocks} follow,"
        f" seed {job.request.seed}"
    )
    for warning in (*history.source.warnings, *job.plan.warnings):
        shown.warn(warning)
    return _run(job, history, script, blocks, options, as_json=as_json, shown=shown, verbose=verbose)


def _time(text: str | None, option: str) -> Fraction | None:
    from packforcing_cli.errors import UsageError
    from packforcing_cli.timeline import parse_time

    try:
        return None if text is None else parse_time(text.strip())
    except ValueError as error:
        raise UsageError(f"{option}: {error}", hint="Write it as 0:40, or in seconds as 12.5.") from error


def _run(
    job: Job,
    history: History,
    script: Script,
    blocks: int,
    options: Options,
    *,
    as_json: bool,
    shown: Display,
    verbose: bool,
) -> int:
    from packforcing_cli import extension, jobs, rollout
    from packforcing_cli.errors import PackforcingError

    request = job.request
    known = len(history.source.warnings)
    clock = time.perf_counter()

    def on_block(block: Block) -> None:
        nonlocal clock
        now = time.perf_counter()
        shown.block(block, now - clock)
        clock = now

    with runner.Stop(shown) as stop:
        try:
            shown.stage(f"loading {job.facts.name} …")
            source = jobs.open_source(job)
            schedule = rollout.schedule_for(source, steps=request.steps, guidance=request.guidance)
            # The text encoder is gone before the transformer takes memory.
            prompts = rollout.encode_script(source, script, guided=schedule.guidance != 1.0)
            for prompt in {prompt.text: prompt for prompt in prompts.prompts if prompt.text}.values():
                runner.warn_about_words(prompt, source.manifest.vocabulary, shown)
            model = source.load()
            if verbose:
                runner.describe(model, schedule, time.perf_counter() - clock, shown)
            shown.start(job.plan, runner.memory_reader(job.device))
            stop.making_blocks = True
            said = rollout.provenance_of(model, request, job.plan.layout)
            said = said.model_copy(
                update={
                    "extends": _command(job, history, script, options),
                    "request": {**said.request, "prompt": script.prompts[-1]},
                }
            )
            made = extension.extend_video(
                model,
                history,
                prompts,
                job.path,
                new_blocks=blocks - history.blocks,
                seed=request.seed or 0,
                schedule=schedule,
                memory=request.memory,
                only_new=options.only_new,
                codec=request.codec,
                crf=request.crf,
                preset=request.preset,
                metadata=said.tags() if request.metadata else {},
                overwrite=request.overwrite,
                on_block=on_block,
                should_stop=lambda: stop.code != 0,
            )
        except KeyboardInterrupt:
            shown.stop()
            shown.note(f"Stopped at once. {jobs.kept_part(job) or 'Nothing was written.'}")
            return stop.code or 130
        except PackforcingError as error:
            shown.stop()
            if "plays" not in error.hint:
                error.hint = f"{error.hint} {jobs.kept_part(job)}".strip()
            raise
        except Exception as error:
            shown.stop()
            if jobs.is_out_of_memory(error):
                raise jobs.memory_ran_out(job, jobs.kept_part(job)) from error
            raise
        finally:
            shown.stop()
    for warning in history.source.warnings[known:]:
        shown.warn(warning)
    if not made.new_blocks:
        shown.note("Stopped before there was a new block. Nothing was written.")
        return stop.code
    _report(job, history, made, shown, as_json=as_json)
    return stop.code if made.stopped else 0


def _command(job: Job, history: History, script: Script, options: Options) -> str:
    """The command that makes the same video again."""
    from packforcing_cli.timeline import Timeline

    request, late = job.request, Fraction(history.lead - history.padded, history.source.fps)
    new = round((job.plan.blocks - history.blocks) * history.grid.block_frames(1) / job.plan.fps, 6)
    asked = Timeline(
        tuple(replace(scene, seconds=scene.seconds + late) for scene in request.timeline.scenes),
        tuple(replace(span, start=span.start + late, end=span.end + late) for span in request.timeline.pins),
    )
    values = {
        "seconds": f"{new:g}",
        "prompt": script.prompts[0],
        "seed": request.seed,
        "model": request.model,
        "size": "x".join(str(side) for side in history.source.size),
        "fit": request.fit,
        "from-time": options.from_time,
        "to-time": options.to_time,
    }
    words = [
        word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))
    ]
    words += ["--only-new"] if options.only_new else []
    return shlex.join(
        [
            "packforcing",
            "extend",
            str(history.source.path),
            *words,
            *story.arguments(asked),
            "-o",
            str(job.path),
        ]
    )


def _report(job: Job, history: History, made: Extension, shown: Display, *, as_json: bool) -> None:
    from packforcing_cli.cli import console

    blocks = "1 new block" if made.new_blocks == 1 else f"{made.new_blocks} new blocks"
    shown.note(f"{blocks} behind {made.source_frames} frames of the source.")
    if made.seam is not None:
        shown.note(f"The seam: {made.seam}.")
    if not as_json:
        console.result(str(made.path))
        return
    seam = made.seam
    console.result_json(
        {
            "schema": SCHEMA,
            "path": str(made.path),
            "source": str(history.source.path),
            "seed": job.request.seed,
            "model": job.plan.model.name,
            "size": list(history.source.size),
            "fps": history.source.fps,
            "frames": made.frames,
            "source_frames": made.source_frames,
            "history_blocks": history.blocks,
            "new_blocks": made.new_blocks,
            "interrupted": made.stopped,
            "warnings": [*history.source.warnings, *job.plan.warnings],
            "seam": None
            if seam is None
            else {"delta_e": seam.delta_e, "jump": seam.jump, "own_motion": seam.own_motion},
        }
    )
