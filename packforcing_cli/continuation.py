"""What making a video longer decides before a model is loaded: where it goes on, how long it gets, what it shows.

    source: a run, or a video of one         -> its blocks up to some time are taken over: `branch`
            any other video                  -> its pictures become the history: `OfFile`

`extend` and `batch` do the same with it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packforcing_cli import jobs, packages, provenance, runfolder
from packforcing_cli.config import GenerateRequest, PlanRequest
from packforcing_cli.errors import RunFolderError, UsageError
from packforcing_cli.jobs import Job
from packforcing_cli.layout import TEMPORAL_STRIDE, Grid
from packforcing_cli.runfolder import Record, RunFolder
from packforcing_cli.source import History, Source
from packforcing_cli.timeline import Scene, Script, Timeline, clock, parse_time
from packforcing_cli.video import VideoReader

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
    changes: Mapping[str, Any],
) -> GenerateRequest:
    """What a branch of a run asks for: as before, but for what is said here.

    Args:
        seconds, timeline: of the whole new video.
        changes: name -> value, None = as before.
    """
    return GenerateRequest.from_values(
        {
            **record.request,
            "image": None,  # it is in the first block
            "frames": None,  # those of the source stay as they are
            **({"embeddings": None} if has_new_prompts else {}),  # not for new prompts
            **{name: value for name, value in changes.items() if value is not None},
            "seconds": seconds,
            "timeline": timeline,
            "output": output,
            "overwrite": overwrite,
            "keep_run": True,
        }
    )


def lengths(old: RunFolder, seconds: float, start: str | None) -> tuple[int, float]:
    """(blocks that are kept, seconds of the whole new video).

    Raises: UsageError; RunFolderError if a block of the kept part is missing.
    """
    record = old.record
    frames = TEMPORAL_STRIDE * record.frames_per_block
    blocks = old.blocks
    if start is not None:
        try:
            wanted = parse_time(start.strip())
        except ValueError as error:
            raise UsageError(f"--from: {error}", hint="Write it as 0:40, or in seconds as 12.5.") from error
        blocks = max(1, round((wanted * record.fps + TEMPORAL_STRIDE - 1) / frames))
    length = _shown((frames * old.blocks - TEMPORAL_STRIDE + 1) / record.fps) if old.blocks else "nothing"
    if old.missing and (start is None or not 0 < blocks <= old.blocks):
        whole = clock(Fraction(max(0, frames * old.blocks - TEMPORAL_STRIDE + 1), record.fps))
        raise RunFolderError(
            f"{old.missing} of {record.id} is missing, and {whole} before it is whole",
            hint=f"Branch off before it, at the latest with --from {whole}."
            if old.blocks
            else "Restore the file.",
        )
    if not 0 < blocks <= old.blocks:
        raise UsageError(
            f"{record.id} has {length}" + (f", so there is nothing at {start}" if start else ""),
            hint=f"To finish it first: packforcing resume {record.id}",
        )
    new = max(1, round(PlanRequest(seconds=seconds).seconds * record.fps / frames))
    return blocks, (frames * (blocks + new) - TEMPORAL_STRIDE + 1) / record.fps


def timeline_of(record: Record, blocks: int, total: float, prompt: str | None, asked: Timeline) -> Timeline:
    """What the old part had, and what is asked for from there on.

    Scenes and pins of the source behind the branch stay as far as they fit, unless new prompts are given.
    Raises: UsageError for a scene or a pin in the old part, which is made already.
    """
    before = GenerateRequest.from_values(record.request).timeline
    begins = Fraction(TEMPORAL_STRIDE * (record.frames_per_block * blocks - 1) + 1, record.fps)
    half_a_block = Fraction(TEMPORAL_STRIDE * record.frames_per_block, 2 * record.fps)
    ends = Fraction(round(total * record.fps), record.fps) if prompt is None and not asked.scenes else begins
    new = asked.scenes
    if prompt is not None:
        new = (Scene(begins, prompt), *new)
    for scene in new:
        if scene.seconds < begins - half_a_block:
            raise UsageError(
                f"--at {clock(scene.seconds)}: the old part is made already",
                hint=f"The first possible time is {clock(begins)}; to branch off earlier: --from.",
            )
    early = [span.text for span in asked.pins if span.start < begins]
    if early:
        raise UsageError(
            f"--pin {early[0]}: the memory of the old part is made already",
            hint=f"Pin from {clock(begins)} on.",
        )
    return Timeline(
        (*(scene for scene in before.scenes if scene.seconds < ends - half_a_block), *new),
        (*(replace(span, end=min(span.end, ends)) for span in before.pins if span.start < ends), *asked.pins),
    )


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
    kept = job.plan.layout.frames_for(blocks) / job.plan.fps
    words = ["extend", before.id, "--from", f"{kept:g}", "--seconds", f"{job.plan.exact_seconds - kept:g}"]
    words += ["--seed", str(request.seed), "--prompt", job.plan.script.prompts[-1]]
    return shlex.join(["packforcing", *words])


def branch(
    old: RunFolder, blocks: int, job: Job, model: VideoModel, folder: Path | None, *, other_memory: int
) -> RunFolder:
    """The new run folder, with the first blocks of the old one in it; the old one is let go."""
    from packforcing_cli import rollout

    is_other = bool(other_memory)
    extends = made_by(old.record, blocks, job, is_other=is_other) if job.request.metadata else None
    tags = jobs.tags_of(job, model, extends=extends)
    record = rollout.new_record(model, jobs.recorded(job), tags=tags, parent=old.record.id)
    record = record.model_copy(update={"other_memory": other_memory})
    where = folder or runfolder.default_root() / record.id
    new = runfolder.RunFolder.create(where, record, source=old, blocks=blocks)
    old.close()
    return new


# ----------------------------------------------------------------------------------------- a video from elsewhere


@dataclass(frozen=True)
class OfFile:
    """Going on with a video file: what a request for the new video does not say.

    prompt:  of the source's part, and of the new one unless the timeline says otherwise; may be empty.
    start, end: the part of the source that is used, in seconds; end None = all.
    new_blocks: that follow.
    """

    source: str
    prompt: str
    start: str | None
    end: str | None
    new_blocks: int
    only_new: bool

    def history(self, request: GenerateRequest, *, fps: int, grid: Grid) -> History:
        """The source as blocks. Raises: as `source.Source`."""
        size = request.size
        assert size is not None, "plan_file decides it"
        start = Fraction(0) if self.start is None else parse_time(self.start)
        end = None if self.end is None else parse_time(self.end)
        return Source(self.source, fps=fps, size=size, fit=request.fit, start=start, end=end).history(grid)

    def script(self, request: GenerateRequest, history: History) -> Script:
        """The prompts of all blocks, the source's included."""
        return request.timeline.script(
            self.prompt,
            history.grid,
            fps=history.source.fps,
            num_blocks=history.blocks + self.new_blocks,
            start=history.blocks,
        )

    def command(self, job: Job) -> str:
        """The command that makes the same video again."""
        assert job.plan.layout is not None
        grid = job.plan.layout.grid
        seconds = self.new_blocks * grid.block_frames(1) / job.plan.fps
        values = {
            "seconds": f"{seconds:g}",
            "prompt": self.prompt or None,
            "seed": job.request.seed,
            "model": job.request.model,
            "size": "x".join(map(str, job.plan.size)),
            "fit": job.request.fit,
            "from-time": self.start,
            "to-time": self.end,
        }
        words = [
            word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))
        ]
        words += ["--only-new"] if self.only_new else []
        return shlex.join(["packforcing", "extend", self.source, *words])


def plan_file(
    request: GenerateRequest, path: Path, *, asked: Timeline, wanted: OfFile
) -> tuple[GenerateRequest, OfFile]:
    """The request for source and new part together, and how many blocks are new.

    Args:
        request: its `seconds` are those of the new part; its model is decided.
        asked:   prompts and pins, times counted from the file's beginning.
    Raises: UsageError, VideoError; UsageError for prompts and pins that do not fit.
    """
    from packforcing_cli import extension

    facts = packages.facts(request.model)
    size = request.size or facts.default_size
    grid = facts.grid(size, request.frames_per_block or facts.frames_per_block)
    request = request.model_copy(update={"size": size})
    history = wanted.history(request, fps=facts.fps, grid=grid)
    new = extension.new_blocks_for(grid, request.seconds, facts.fps)
    wanted = replace(wanted, source=str(path.absolute()), new_blocks=new)
    scenes = extension.on_blocks(asked, history, fps=facts.fps)
    seconds = grid.frames_for(history.blocks + new) / facts.fps
    request = request.model_copy(update={"seconds": seconds, "timeline": scenes})
    wanted.script(request, history)
    return request, wanted
