"""Short clips of a square that moves over a plain background, and folders of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from packforcing_cli.video import VideoWriter

WIDTH, HEIGHT, FPS = 128, 64, 16


def write_clip(
    path: Path,
    *,
    frames: int = 45,
    seed: int = 0,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    fps: int = FPS,
    caption: str | None = "a red square moving right on a blue background",
) -> Path:
    """Write a video and, beside it, its caption; None = no caption."""
    dice = np.random.default_rng(seed)
    width, height = size
    pixels = np.empty((frames, height, width, 3), dtype=np.uint8)
    pixels[:] = dice.integers(0, 256, 3, dtype=np.uint8)
    colour = dice.integers(0, 256, 3, dtype=np.uint8)
    side = height // 3
    for n in range(frames):
        left = (n * 2 + seed * 7) % (width - side)
        pixels[n, side : 2 * side, left : left + side] = colour
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, fps=fps, width=width, height=height, crf=10) as writer:
        writer.write(pixels)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption + "\n", "utf-8")
    return path


def damage(path: Path) -> None:
    """Overwrite the middle of a file."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 600] = bytes((37 * n + 11) % 256 for n in range(600))
    path.write_bytes(data)
