"""Check that a video plays, has the right number of frames, is not blank and moves: check_video.py FILE FRAMES"""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np

from packforcing_cli.reader import VideoReader


def main(path: str, wanted: str) -> None:
    frames = [frame.astype(np.float32) for frame in VideoReader(path)]
    assert len(frames) == int(wanted), f"{len(frames)} frames instead of {wanted}"
    contrast = [float(frame.std()) for frame in frames]
    assert min(contrast) > 5, f"a frame is blank: contrast {min(contrast):.1f} of 255"
    changes = [float(np.abs(a - b).mean()) for a, b in pairwise(frames)]
    assert np.median(changes) > 0.2, f"nothing moves: median change {np.median(changes):.2f} of 255"
    print(
        f"{path}: {len(frames)} frames, contrast {min(contrast):.0f}+, median change {np.median(changes):.2f}"
    )


main(*sys.argv[1:])
