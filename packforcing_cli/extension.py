"""Going on with somebody's video: its frames become history blocks, then new blocks follow in the same memory.

    source -> resample -> streaming VAE encoder -> clean pass, compression, commit, block by block -> generate on

The output is the source at the model's size and rate, followed by the new part, or the new part alone; the source's
sound stays with its pictures. No run folder is kept: the command makes the same video again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from packforcing_cli import rollout
from packforcing_cli.cache import CacheStats
from packforcing_cli.config import MemoryOptions
from packforcing_cli.registry import VideoModel
from packforcing_cli.rollout import Block, PastBlock, Story
from packforcing_cli.sampler import Schedule
from packforcing_cli.source import History, Pixels, Seam, measure_seam
from packforcing_cli.timeline import Timeline
from packforcing_cli.video import Sound, VideoWriter

SEAM_FRAMES = 16  # source frames whose motion the jump is compared with


@dataclass(frozen=True)
class Extension:
    """What was made.

    source_frames, frames: of the source part, and of the whole file.
    new_blocks: made, fewer than asked for if it was stopped.
    seam:       how visible the join is; None if no new block was made.
    """

    path: Path
    source_frames: int
    frames: int
    new_blocks: int
    stopped: bool
    seam: Seam | None
    cache: CacheStats


def on_blocks(timeline: Timeline, history: History, *, fps: int) -> Timeline:
    """A timeline of source and new part together, counted from the first block of the memory instead."""
    late = Fraction(history.lead - history.padded, fps)
    return Timeline(
        tuple(replace(scene, seconds=scene.seconds - late) for scene in timeline.scenes),
        tuple(
            replace(span, start=max(Fraction(0), span.start - late), end=span.end - late)
            for span in timeline.pins
        ),
    )


def past_blocks(
    model: VideoModel, history: History, on_lead: Callable[[Pixels], None] = lambda frames: None
) -> Iterator[PastBlock]:
    """Encode a history block by block, reading the source as it goes.

    Args:
        on_lead: gets the frames before the first block, [T, H, W, 3].
    """

    def blocks() -> Iterator[Pixels]:
        for frames, is_block in history.pieces():
            if is_block:
                yield frames
            else:
                on_lead(frames)

    per_block = history.grid.frames_per_block
    for latents, pixels in rollout.encode_blocks(model, blocks(), frames_per_block=per_block):
        yield PastBlock(latents, pixels=pixels)


def extend_video(
    model: VideoModel,
    history: History,
    story: Story,
    output: Path,
    *,
    new_blocks: int,
    seed: int,
    schedule: Schedule | None = None,
    memory: MemoryOptions | None = None,
    only_new: bool = False,
    codec: str = "h264",
    crf: int = 18,
    preset: str | None = None,
    metadata: dict[str, str] | None = None,
    overwrite: bool = False,
    on_block: Callable[[Block], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Extension:
    """Write a source and its continuation into one file.

    Args:
        history:  of the source, at the size of the video.
        story:    prompts of all blocks, the source's included.
        only_new: leave the source's part, and its sound, out of the file.
        on_block, should_stop: as `rollout.generate`; blocks of the source have `replayed` set. Stopped within them,
            nothing is left of the file.
    Raises: as `rollout.stream_generate`, `video.VideoWriter` and `source.Source`.
    """
    source = history.source
    shift = history.lead - history.padded
    sound = None
    if source.reader.has_audio and not only_new:
        sound = Sound(source.path, source.start, source.end)
    chapters = [(max(0, frame + shift), title) for frame, title in story.script.chapters(history.grid)]
    seen: deque[Pixels] = deque(maxlen=SEAM_FRAMES)
    seam: Seam | None = None
    made, last = 0, None
    with VideoWriter(
        output,
        fps=source.fps,
        width=source.size[0],
        height=source.size[1],
        codec=codec,
        crf=crf,
        preset=preset,
        metadata=metadata,
        chapters=() if only_new else chapters,
        sound=sound,
        overwrite=overwrite,
    ) as writer:
        for block in rollout.stream_generate(
            model,
            story,
            num_blocks=history.blocks + new_blocks,
            seed=seed,
            size=source.size,
            schedule=schedule,
            memory=memory,
            past=past_blocks(model, history, (lambda frames: None) if only_new else writer.write),
        ):
            frames = block.frames.numpy()
            if block.replayed:
                frames = frames[history.padded if block.index == 0 else 0 :]
                seen.extend(frames)
            else:
                seam = seam or measure_seam(np.stack(seen), frames)
                made += 1
            if not (block.replayed and only_new):
                writer.write(frames)
            last = block
            if on_block is not None:
                on_block(block)
            if should_stop is not None and should_stop():
                break
        if not made:  # stopped within the source: there is nothing that it is not
            writer.abort()
            writer.part_path.unlink(missing_ok=True)
    assert last is not None
    return Extension(
        path=writer.path,
        source_frames=source.num_frames,
        frames=writer.frames_written,
        new_blocks=made,
        stopped=made < new_blocks,
        seam=seam,
        cache=last.cache,
    )
