"""What making a video longer decides before a model is loaded: where it goes on, how long it gets, what it shows.

    source: a run, or a video of one         -> its blocks up to some time are taken over: `branch`
            any other video                  -> its pictures become the history: `request_for_file`

`extend` and `batch` do the same with it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packforcing_cli import jobs, packages, provenance, runfolder
from packforcing_cli.config import GenerateRequest, PlanRequest, SourceVideo
from packforcing_cli.errors import RunFolderError, UsageError
from packforcing_cli.jobs import Job
from packforcing_cli.manifest import ExtendRequest
from packforcing_cli.reader import VideoReader
from packforcing_cli.runfolder import Record, RunFolder
from packforcing_cli.source import Source
from packforcing_cli.tasks import file_sha256
from packforcing_cli.timeline import Scene, Timeline, clock, parse_time

if TYPE_CHECKING:
    from packforcing_cli.registry import VideoModel


def find(source: str) -> Path | None:
    """The run folder of a source: a run's id or folder, or a video that a run here made; None for any other video.

    Raises: UsageError if there is no such thing; VideoError if a video cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return run_of(VideoReader(path))
    if path.suffix and not path.is_dir():
        raise UsageError(
            f"there is no file {source}", hint="Check the name; runs are in `packforcing runs list`."
        )
    return runfolder.find(source)


def run_of(video: VideoReader) -> Path | None:
    """The folder of the run here that made a video: the one it names, else the one that wrote this very file.

    A file without metadata names none; it is known by its path and its number of frames.
    """
    run_id = video.metadata.get("run")
    if run_id is not None:
        return runfolder.folder_of(run_id)
    known = (str(video.path.absolute()), video.num_frames)
    for run in reversed(runfolder.all_runs()):  # the newest of those that wrote to this path
        if run.record is not None and (run.record.output, run.record.frames) == known:
            return run.folder
    return None


def _shown(seconds: float) -> str:
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def request_of(
    record: Record,
    *,
    seconds: float,
    timeline: Timeline,
    has_new_prompts: bool,
    output: Path | None,
    overwrite: bool,
    frames: Path | None,
    changes: Mapping[str, Any],
) -> GenerateRequest:
    """What a branch of a run asks for: as before, but for what is said here.

    Args:
        seconds, timeline: of the whole new video.
        frames:  folder for PNGs; those of the source stay as they are.
        changes: name -> value, None = as before.
    """
    return GenerateRequest.from_values(
        {
            **record.request,
            "image": None,  # it is in the first block
            "frames": frames,
            **({"embeddings": None} if has_new_prompts else {}),  # not for new prompts
            **{name: value for name, value in changes.items() if value is not None},
            "seconds": seconds,
            "timeline": timeline,
            "output": output,
            "overwrite": overwrite,
            "keep_run": True,
        }
    )


FILE_CHANGES = ("guard", "codec", "crf", "preset", "metadata", "snapshot_every")
ELSEWHERE = ("model", "size", "fit", "from_time", "to_time", "only_new")
"""Options for videos made elsewhere: a branch keeps those of its run."""


def request_of_branch(
    old: RunFolder, request: ExtendRequest, timeline: Timeline
) -> tuple[GenerateRequest, int]:
    """What a line of a batch that goes on with a run asks for, and how many blocks are taken over.

    Raises: as `lengths` and `timeline_of`.
    """
    blocks, total = lengths(old, request.seconds, request.start)
    changes = {"seed": request.seed, "device": request.device}
    changes |= {name: getattr(request, name) for name in FILE_CHANGES}
    whole = request_of(
        old.record,
        seconds=total,
        timeline=timeline_of(old.record, blocks, total, request.prompt, timeline),
        has_new_prompts=request.prompt is not None or bool(timeline.scenes),
        output=None,
        overwrite=request.overwrite,
        frames=request.frames,
        changes=changes,
    )
    return whole, blocks


def lengths(old: RunFolder, seconds: float, start: str | None) -> tuple[int, float]:
    """(blocks that are kept, seconds of the whole new video).

    Raises: UsageError; RunFolderError if a block of the kept part is missing.
    """

    record, lengths, parts = old.record, old.record.lengths, old.record.shown
    blocks, late = old.blocks, Fraction(old.record.shown.shift, old.record.fps)
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
        whole = clock(there)
        raise RunFolderError(
            f"{old.missing} of {record.id} is missing, and {whole} before it is whole",
            hint=f"Branch off before it, at the latest with --from {whole}."
            if old.blocks
            else "Restore the file.",
        )
    if not 0 < blocks <= old.blocks:
        raise UsageError(
            f"{record.id} has {_shown(float(there)) if there else 'nothing'}"
            + (f", so there is nothing at {start}" if start else ""),
            hint=f"To finish it first: packforcing resume {record.id}",
        )
    new = lengths.blocks_more(PlanRequest(seconds=seconds).seconds, record.fps)
    return blocks, lengths.frames_for(blocks + new) / record.fps


def timeline_of(record: Record, blocks: int, total: float, prompt: str | None, asked: Timeline) -> Timeline:
    """What the old part had, and what is asked for from there on.

    Scenes and pins of the source behind the branch stay as far as they fit, unless new prompts are given.
    Raises: UsageError for a scene or a pin in the old part, which is made already.
    """

    before = GenerateRequest.from_values(record.request).timeline
    begins = Fraction(record.lengths.frames_for(blocks), record.fps)
    half_a_block = Fraction(record.lengths.block_frames(blocks), 2 * record.fps)
    ends = Fraction(round(total * record.fps), record.fps) if prompt is None and not asked.scenes else begins
    late = Fraction(record.shown.shift, record.fps)  # times are those of the file
    early = [span.text for span in asked.pins if span.start - late < begins]
    if early:
        raise UsageError(
            f"--pin {early[0]}: the memory of the old part is made already",
            hint=f"Pin from {clock(begins + late)} on.",
        )
    given = asked.moved(-late)
    new = given.scenes
    if prompt is not None:
        new = (Scene(begins, prompt), *new)
    for scene in new:
        if scene.seconds < begins - half_a_block:
            raise UsageError(
                f"--at {clock(scene.seconds + late)}: the old part is made already",
                hint=f"The first possible time is {clock(begins + late)}; to branch off earlier: --from.",
            )
    kept = before.until(ends, record.lengths, fps=record.fps)
    return Timeline((*kept.scenes, *new), (*kept.pins, *given.pins))


def made_by(before: Record, blocks: int, job: Job, *, is_other: bool) -> str | None:
    """The command of a branch that one longer run would not make: after another seed, a start image or another memory,
    or off such a branch. None for a plain continuation.
    """
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
    kept = (lengths.frames_for(blocks) + before.shown.shift) / before.fps
    new = (lengths.frames_for(job.plan.blocks) - lengths.frames_for(blocks)) / before.fps
    words = ["extend", before.id, "--from", f"{kept:g}", "--seconds", f"{new:g}"]
    words += ["--seed", str(request.seed), "--prompt", job.plan.script.prompts[-1]]
    for name in jobs.FILE_SETTINGS:
        value = getattr(request, name)
        words += [] if before.request.get(name) == value else [f"--{name}", str(value)]
    return shlex.join(["packforcing", *words])


def branch(
    old: RunFolder, blocks: int, job: Job, model: VideoModel, folder: Path | None, *, other_memory: int
) -> RunFolder:
    """The new run folder, with the first blocks of the old one in it; the old one is let go."""
    from packforcing_cli import sameness

    is_other = bool(other_memory)
    extends = made_by(old.record, blocks, job, is_other=is_other) if job.request.metadata else None
    tags = jobs.tags_of(job, model, extends=extends)
    record = sameness.new_record(model, jobs.recorded(job), tags=tags, parent=old.record.id)
    record = record.model_copy(update={"other_memory": other_memory})
    where = folder or runfolder.default_root() / record.id
    new = runfolder.RunFolder.create(where, record, source=old, blocks=blocks)
    old.close()
    return new


# ----------------------------------------------------------------------------------------- a video from elsewhere


def request_for_file(
    request: GenerateRequest,
    source: Path,
    *,
    prompt: str,
    asked: Timeline,
    from_time: str | None,
    to_time: str | None,
    only_new: bool,
) -> GenerateRequest:
    """What going on with a video file asks for.

    Args:
        request: its `seconds` are those of the new part; its model is decided.
        prompt:  of the source's part, and of the new one unless `asked` says otherwise; may be empty.
        asked:   prompts and pins, times counted from the file's beginning.
        from_time, to_time: the part of the file that is used.
        only_new: write the new part alone.
    Raises: UsageError or VideoError if the file cannot be read, or there is nothing between these times.
    """
    from packforcing_cli import extension

    facts = packages.facts(request.model)
    size = request.size or facts.default_size
    grid = facts.grid(size, request.frames_per_block or facts.frames_per_block)
    start = Fraction(0) if from_time is None else parse_time(from_time)
    end = None if to_time is None else parse_time(to_time)
    opened = Source(source, fps=facts.fps, size=size, fit=request.fit, start=start, end=end)
    parts = opened.history(grid, only_new=only_new).shown
    blocks = parts.history + grid.blocks_more(request.seconds, facts.fps)
    changes: dict[str, Any] = {
        "prompt": prompt.strip(),
        "seconds": grid.frames_for(blocks) / facts.fps,
        "timeline": extension.on_blocks(asked, parts, fps=facts.fps),
        "source": SourceVideo(
            path=source,
            sha256=file_sha256(source),
            from_time=from_time,
            to_time=to_time,
            only_new=only_new,
            blocks=parts.history,
            lead=parts.lead,
            padded=parts.padded,
        ),
    }
    return request.model_copy(update=changes)
