"""The video file of a run: how it is encoded, what an earlier attempt left of it, how it is finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from packforcing_cli.config import GenerateRequest
from packforcing_cli.errors import VideoError
from packforcing_cli.layout import Shown
from packforcing_cli.past import open_history
from packforcing_cli.reader import VideoReader
from packforcing_cli.runfolder import RunFolder
from packforcing_cli.sound import Sound
from packforcing_cli.source import History
from packforcing_cli.timeline import Script
from packforcing_cli.video import FrameFolder, PipeWriter, VideoWriter, part_path


@dataclass(frozen=True)
class Encoding:
    """How a video is encoded and what its file says; see `video.VideoWriter`."""

    fps: int
    size: tuple[int, int]
    codec: str
    crf: int
    preset: str | None
    metadata: Mapping[str, str]
    chapters: Sequence[tuple[int, str]]
    sound: Sound | None = None

    @classmethod
    def of(
        cls,
        fps: int,
        size: tuple[int, int],
        codec: str,
        crf: int,
        preset: str | None,
        metadata: Mapping[str, str],
        script: Script,
        shown: Shown,
        history: History | None,
    ) -> Encoding:
        """With the chapters and the sound that belong into the file."""
        placed = [
            (shown.frame_of(start) if start else 0, title)
            for start, title in script.changes
            if start >= shown.first
        ]
        if placed and placed[0][0]:  # what the file begins with began before it
            before = [title for start, title in script.changes if start < shown.first]
            placed = [(0, title) for title in before[-1:]] + placed
        chapters = placed if len(placed) > 1 else []
        sound = None
        if history is not None and history.source.reader.has_audio and not shown.only_new:
            sound = Sound(history.source.path, history.source.start, history.source.end)
        return cls(fps, size, codec, crf, preset, metadata, chapters, sound)


class Lead:
    """Puts the frames before a history's first block into the file, and into the folder of pictures.

    groups: of the file that are there already.
    """

    def __init__(
        self,
        writer: VideoWriter | PipeWriter,
        frames: FrameFolder | None,
        *,
        groups: int,
        is_new: bool,
        shown: Shown,
    ) -> None:
        self._writer, self._frames, self._groups, self._is_new = writer, frames, groups, is_new
        self._skipped = shown.only_new
        self._pieces, self._count = 0, 0

    def __call__(self, pixels: NDArray[np.uint8]) -> None:
        if self._skipped:
            return
        if self._frames is not None:
            self._frames.write(pixels, first=self._count, only_missing=not self._is_new)
        if self._pieces >= self._groups:
            self._writer.write(pixels)
        self._pieces, self._count = self._pieces + 1, self._count + len(pixels)


def open_writer(
    output: Path | str | BinaryIO, run: RunFolder | None, encoding: Encoding, *, overwrite: bool
) -> VideoWriter | PipeWriter:
    """A writer of `output` that has all whole blocks an earlier one left of this run's video, unchanged.

    They are in NAME.part.mp4; after Ctrl-C in NAME.mp4, whose packets are copied and which is replaced at the end.
    """
    options: dict[str, Any] = {
        "fps": encoding.fps,
        "width": encoding.size[0],
        "height": encoding.size[1],
        "codec": encoding.codec,
        "crf": encoding.crf,
        "preset": encoding.preset,
    }
    if not isinstance(output, Path | str):
        assert run is None, "a stream cannot be resumed"
        return PipeWriter(output, metadata=encoding.metadata, **options)
    output = Path(output)
    had = 0 if run is None else finished_blocks(run, output)
    writer = VideoWriter(
        output,
        **options,
        metadata=encoding.metadata,
        chapters=encoding.chapters,
        sound=encoding.sound,
        overwrite=overwrite or bool(had),
        owner="" if run is None else f"packforcing run {run.record.id}",
        resume=None if run is None else len(run.record.shown.groups(run.blocks)),
    )
    if run is not None and had and not writer.blocks_written:
        try:
            writer.copy(output, run.record.shown.groups(min(had, run.blocks)))
        except VideoError:
            writer.abort()
            raise
    return writer


def finished_blocks(run: RunFolder, output: Path) -> int:
    """How many blocks of this run the finished file `output` has; 0 if there is none or it is another's."""
    if not output.is_file():
        return 0
    try:
        video = VideoReader(output)
        frames, owner = video.num_frames, video.metadata.get("run")
    except VideoError:
        return 0
    record = run.record
    is_known = record.output == str(output.absolute()) and frames in (record.frames, record.closing)
    blocks = record.shown.blocks_of(frames) or 0
    return blocks if owner == record.id or (owner is None and is_known) else 0


@dataclass(frozen=True)
class Remaining:
    """What resuming a run takes: blocks to replay, and estimates from its trace; None where it has none."""

    blocks: int
    seconds: float | None
    rest_seconds: float | None


def replay_cost(run: RunFolder, *, keep: int | None = None, blocks: int | None = None) -> Remaining:
    """What is ahead when a run is resumed; or a branch of `blocks` blocks is made, of which it has `keep`."""
    snapshot = run.snapshot_blocks() if keep is None else 0  # a branch takes none over
    there, length = keep or run.blocks, blocks or run.record.blocks
    again = there - (snapshot if snapshot > run.record.other_memory else 0)
    stages = [record["seconds"] for record in run.trace() if isinstance(record.get("seconds"), dict)][-20:]
    if not stages:
        return Remaining(again, None, None)
    whole = sum(sum(stage.values()) for stage in stages) / len(stages)
    denoise = sum(stage.get("denoise", 0.0) for stage in stages) / len(stages)
    return Remaining(again, again * (whole - denoise), (length - there) * whole)


def finish(run: RunFolder) -> bool:
    """Finish the file of a run whose blocks are all made and encoded, its pictures too; needs no model.

    Returns: whether the file is finished now. Raises: as `video.VideoWriter`.
    """
    record, output = run.record, Path(run.record.output)
    if run.blocks < record.blocks:
        return False
    request = GenerateRequest.from_values(record.request)
    shown = record.shown
    frames = shown.frames_for(record.blocks)
    if request.frames is not None and FrameFolder(request.frames).lacks(frames):
        return False
    if finished_blocks(run, output) == record.blocks and not part_path(output).exists():
        if record.status != "finished":
            run.update(status="finished", frames=frames, closing=0)
        return True
    history = open_history(request, record.lengths, fps=record.fps, size=record.size)
    encoding = Encoding.of(
        record.fps,
        record.size,
        request.codec,
        request.crf,
        request.preset,
        record.tags,
        request.timeline.script(
            request.prompt, record.lengths, fps=record.fps, num_blocks=record.blocks, start=shown.history
        ),
        shown,
        history,
    )
    writer = open_writer(output, run, encoding, overwrite=request.overwrite)
    assert isinstance(writer, VideoWriter)
    if shown.blocks_in(writer.blocks_written) < record.blocks:
        writer.abort()
        return False
    note_end(run, writer)
    writer.close()
    close_run(run, writer)
    return True


def note_end(run: RunFolder, writer: VideoWriter | PipeWriter) -> None:
    """Before a file without tags gets its name, note in run.json what it will be: nothing else says whose it is."""
    if not run.record.tags:
        writer.flush()
        run.update(closing=writer.frames_written)


def close_run(run: RunFolder, writer: VideoWriter | PipeWriter) -> None:
    """Note in run.json how far the finished file goes."""
    blocks = run.record.shown.blocks_in(writer.blocks_written)
    status = "finished" if blocks == run.record.blocks else "stopped"
    run.update(status=status, output=str(writer.path.absolute()), frames=writer.frames_written, closing=0)
