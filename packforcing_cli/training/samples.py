"""Sample videos of a training: made on the way, measured, and at the end before and after side by side.

    samples/0000000-0.mp4     prompt 0 with the weights from before the first step
    samples/0000250-0.mp4     on the way, the same prompt and seed
    samples/0001000-0.mp4     the end
    samples/before-after-0.mp4    the first and the last, side by side

Figures are those of `packforcing eval`; where a prompt is a caption of the demo world, also which of its words the clip
shows, by the exact detectors. Knows a model that can generate; nothing of how it is trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from packforcing_cli import metrics, resolve, rollout
from packforcing_cli.prompts import Story
from packforcing_cli.reader import VideoReader
from packforcing_cli.registry import VideoModel
from packforcing_cli.training import detectors, world
from packforcing_cli.training.recipe_kinds import Samples
from packforcing_cli.video import VideoWriter

GAP = 8  # px between the two pictures of a pair
READ_SECONDS = 10  # the end of a clip, of which the detectors read the words of its last caption
GROUP = 16  # frames that are encoded together
WORDS = ("background", "colour", "shape", "direction")
MEASURED = ("motion", "flicker", "noise", "sharpness", "colour drift")


class Sampler:
    """Makes and measures the sample videos of one run."""

    def __init__(self, settings: Samples, stories: Sequence[Story], folder: Path) -> None:
        self._settings, self._stories, self._folder = settings, stories, folder

    def path(self, step: int, number: int) -> Path:
        """Where the video of a step and a prompt is."""
        return self._folder / f"{step:07d}-{number}.mp4"

    def make(self, step: int, model: VideoModel) -> dict[str, float]:
        """Write a video for every prompt, replacing those that are there. Returns: figures, means over the videos."""
        self._folder.mkdir(parents=True, exist_ok=True)
        found: list[dict[str, float]] = []
        for number, story in enumerate(self._stories):
            path = self.path(step, number)
            rollout.generate(
                model,
                story,
                path,
                seconds=self._settings.seconds,
                seed=self._settings.seed + number,
                metadata={"title": story.script.prompts[0], "comment": f"step {step}"},
                overwrite=True,
            )
            shown = list(zip(story.script.starts, story.script.prompts, strict=True))
            found.append(figures(path, *_last_shown(path, shown, model)))
        names = dict.fromkeys(chain.from_iterable(found))
        return {
            name: round(sum(values) / len(values), 4)
            for name in names
            if (values := [f[name] for f in found if name in f])
        }

    def pairs(self, step: int) -> list[Path]:
        """Write before-after-N.mp4 for every prompt of which there is a video of step 0 and one of this step."""
        made = []
        for number, story in enumerate(self._stories):
            before, after = self.path(0, number), self.path(step, number)
            if step and before.is_file() and after.is_file():
                made.append(self._folder / f"before-after-{number}.mp4")
                title = f"before (left) and after {step} steps (right): {story.script.prompts[0]}"
                side_by_side(before, after, made[-1], title=title)
        return made


def _last_shown(path: Path, shown: Sequence[tuple[int, str]], model: VideoModel) -> tuple[float, str]:
    """(seconds from which on, caption) of the last caption that a video came to; READ_SECONDS of it at most."""
    reader = VideoReader(path)
    timing = reader.timing()
    length = float(timing.end - timing.start)
    grid = resolve.grid_for(model, (reader.width, reader.height))
    begun = [(grid.frames_for(block) / model.manifest.fps, text) for block, text in shown]
    start, text = [(at, text) for at, text in begun if at < length][-1]
    return max(start, length - READ_SECONDS), text


def figures(path: Path, start: float, caption: str) -> dict[str, float]:
    """What is measured of a video; names without a value where nothing can be are left out.

    Args:
        start: seconds from which on the caption holds.
    """
    measured = metrics.measure(path)
    found = {name: measured.mean(name) for name in MEASURED}
    found |= {"dynamic degree": measured.dynamic_degree, "jumps": float(len(measured.jumps))}
    found |= words_shown(path, start, caption)
    return {name: value for name, value in found.items() if math.isfinite(value)}


def words_shown(path: Path, start: float, caption: str) -> dict[str, float]:
    """Which words of a caption of the demo world a video shows from a time on, 1 or 0; "words": the share of them.

    Empty for another caption, another picture size and less than two frames.
    """
    reader = VideoReader(path)
    try:
        world.parse_caption(caption)
    except ValueError:
        return {}
    if (reader.width, reader.height) != (world.WIDTH, world.HEIGHT):
        return {}
    first = reader.timing().start
    frames = [frame for time, frame in reader.upright() if float(time - first) >= start - 1e-6]
    if len(frames) < 2:
        return {}
    right = detectors.score(detectors.detect(torch.from_numpy(np.stack(frames))), caption)
    words = {name: float(right[name]) for name in WORDS}
    return {"words": sum(words.values()) / len(words), **words}


def side_by_side(left: Path, right: Path, path: Path, *, title: str) -> None:
    """Write two videos of one size and rate beside each other, as long as the shorter one."""
    first, second = VideoReader(left), VideoReader(right)
    width, height = first.width + GAP + second.width, first.height
    frames: list[NDArray[np.uint8]] = []
    with VideoWriter(
        path, fps=first.fps, width=width, height=height, metadata={"title": title}, overwrite=True
    ) as writer:
        for (_, a), (_, b) in zip(first.upright(), second.upright(), strict=False):
            gap = np.full((height, GAP, 3), 255, dtype=np.uint8)
            frames.append(np.concatenate([a, gap, b], 1))
            if len(frames) == GROUP:
                writer.write(np.stack(frames))
                frames.clear()
        if frames:
            writer.write(np.stack(frames))
