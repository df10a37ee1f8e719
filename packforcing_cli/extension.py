"""Going on with somebody's video: where its times lie in the memory, and how visible the join is.

    source -> resample -> streaming VAE encoder -> clean pass, compression, commit, block by block -> generate on

The blocks of the source go the way of all blocks (`rollout.generate`), into the run folder too. The output is the
source at the model's size and rate, followed by the new part, or the new part alone; its sound stays with its pictures.
"""

from __future__ import annotations

from collections import deque
from fractions import Fraction

import numpy as np

from packforcing_cli.layout import Shown
from packforcing_cli.rollout import Block
from packforcing_cli.source import Pixels, Seam, measure_seam
from packforcing_cli.timeline import Timeline

SEAM_FRAMES = 16  # source frames whose motion the jump is compared with


def on_blocks(timeline: Timeline, shown: Shown, *, fps: int) -> Timeline:
    """A timeline of source and new part together, counted from the first block of the memory instead."""
    return timeline.moved(Fraction(-shown.late, fps))


class SeamMeter:
    """Told every block, it measures the join: from the last frames of the source to the first new block.

    seam: None until there is a new block, and where the source's blocks were not read again.
    """

    def __init__(self, shown: Shown) -> None:
        self._shown = shown
        self._before: deque[Pixels] = deque(maxlen=SEAM_FRAMES)
        self.seam: Seam | None = None

    def __call__(self, block: Block) -> None:
        frames = block.frames.numpy()
        if block.index < self._shown.history:
            self._before.extend(frames[self._shown.padded if block.index == 0 else 0 :])
        elif self._before and self.seam is None:
            self.seam = measure_seam(np.stack(self._before), frames)
