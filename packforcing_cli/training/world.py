r"""The demo world: one coloured shape moves over a coloured background, drawn from a seed, at any length.

A scene is a handful of numbers (`Scene`), so frame n of it is the same whichever window it is drawn in.
The caption names four things; the rest is seen but never said, and only a memory can keep it:

    captioned      shape, colour, background colour, direction
    uncaptioned    shades of both, background gradient, landmark bar, size, speed, start

            0                      x                     128
          0 +-------------------------------------------+
            | darker          |##|          ____        |     |##| landmark bar: 3-6 px wide, all of
          y |                 |##|         /    \  -->   |          the height, 32 brighter or darker
            |                 |##|         \____/        |     subject: wraps around the edge it moves to
         64 +-------------------------------------------+

Some combinations are held out of training (`HELD_OUT`); every word and every pair of words stays in it.
A scene has one caption for all of its blocks; `Scene.block_captions` is where a timeline of captions belongs.
This module knows neither codec nor model. It imports torch and the standard library only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

HEIGHT, WIDTH, FPS = 64, 128, 16

SHAPES = ("circle", "square", "triangle")
DIRECTIONS = ("left", "right", "up", "down")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (210, 40, 40),
    "green": (35, 155, 65),
    "blue": (35, 70, 215),
    "yellow": (235, 210, 45),
    "purple": (165, 50, 200),
    "white": (232, 232, 232),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (28, 28, 28),
    "gray": (125, 125, 125),
    "white": (225, 225, 225),
    "red": (200, 45, 45),
    "green": (40, 145, 65),
    "blue": (40, 70, 200),
}

RADIUS = (14.0, 18.0)  # px
SPEED = (1.0, 2.0)  # px a frame
SQUARE_HALF_SIDE = 0.88  # of the radius: 3.10 r^2 against the circle's 3.14 r^2
TRIANGLE_HALF_BASE, TRIANGLE_HALF_HEIGHT = 1.28, 1.18  # of the radius, upright: 3.02 r^2
GRADIENT = (5.0, 20.0)  # levels of 255 from the middle of the picture to a corner
BAR_WIDTH, BAR_BRIGHTNESS = (3.0, 6.0), 32.0  # px, levels

_STEPS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}


class Combination(NamedTuple):
    """The four captioned words."""

    shape: str
    colour: str
    background: str
    direction: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.direction} on a {self.background} background"


def _is_held_out(shape: int, colour: int, background: int, direction: int) -> bool:
    # A diagonal plane through the table of combinations: one in seven goes, spread evenly over the words.
    # No pair of words goes with it: the two words left free always meet more than one remainder.
    return (shape + 2 * colour + 3 * background + 4 * direction) % 7 == 0


COMBINATIONS = tuple(
    Combination(*words)
    for words in itertools.product(SHAPES, COLOURS, BACKGROUNDS, DIRECTIONS)
    if words[1] != words[2]
)
HELD_OUT = frozenset(
    combination
    for combination in COMBINATIONS
    if _is_held_out(
        SHAPES.index(combination.shape),
        list(COLOURS).index(combination.colour),
        list(BACKGROUNDS).index(combination.background),
        DIRECTIONS.index(combination.direction),
    )
)
_TRAINING = tuple(combination for combination in COMBINATIONS if combination not in HELD_OUT)
_HELD_OUT = tuple(combination for combination in COMBINATIONS if combination in HELD_OUT)


def training_captions() -> tuple[str, ...]:
    """Every caption that training may see, in a fixed order."""
    return tuple(combination.caption for combination in _TRAINING)


def held_out_captions() -> tuple[str, ...]:
    """Every caption kept for evaluation, in a fixed order."""
    return tuple(combination.caption for combination in _HELD_OUT)


def parse_caption(caption: str) -> Combination:
    """Read the four words of a caption of this world.

    Raises: ValueError if the caption does not follow the grammar or its words are not of this world.
    """
    words = caption.lower().replace(".", " ").replace(",", " ").split()
    fits = len(words) == 9 and (words[0], words[3], *words[5:7], words[8]) == (
        "a", "moving", "on", "a", "background",
    )  # fmt: skip
    if not fits:
        raise ValueError(f"not a caption of the demo world: {caption!r}")
    combination = Combination(shape=words[2], colour=words[1], background=words[7], direction=words[4])
    if combination not in COMBINATIONS:
        raise ValueError(f"words or a combination unknown to the demo world: {caption!r}")
    return combination


@dataclass(frozen=True, kw_only=True)
class Scene:
    """All parameters of one scene; pixel coordinates, x to the right, y down, (0, 0) the top left corner.

    Attributes:
        radius: size of the subject in px (`SHAPES` are built on it so that their areas are alike).
        speed: px a frame.
        x, y: centre of the subject's bounding box at frame 0, in px.
        subject_rgb, background_rgb: the shades really painted, 0..255.
        gradient_angle, gradient_strength: direction in radians; levels from middle to farthest corner.
        bar_x, bar_width, bar_brightness: left edge and width in px; signed levels.
    """

    shape: str
    colour: str
    background: str
    direction: str
    radius: float
    speed: float
    x: float
    y: float
    subject_rgb: tuple[float, float, float]
    background_rgb: tuple[float, float, float]
    gradient_angle: float
    gradient_strength: float
    bar_x: float
    bar_width: float
    bar_brightness: float

    @property
    def combination(self) -> Combination:
        return Combination(self.shape, self.colour, self.background, self.direction)

    @property
    def caption(self) -> str:
        return self.combination.caption

    def block_captions(self, num_blocks: int) -> tuple[str, ...]:
        """The caption of each of the first `num_blocks` blocks."""
        return (self.caption,) * num_blocks


def sample_scene(
    generator: torch.Generator,
    *,
    held_out: bool | None = False,
    combination: Combination | None = None,
) -> Scene:
    """Draw a scene; always the same number of draws from the generator (a CPU one).

    Args:
        held_out: False = combinations of training, True = held-out ones, None = all of them.
        combination: these four words instead of drawn ones.
    """
    u = torch.rand(20, generator=generator, dtype=torch.float64).tolist()

    def between(i: int, low: float, high: float) -> float:
        return low + (high - low) * float(u[i])

    pool = COMBINATIONS if held_out is None else _HELD_OUT if held_out else _TRAINING
    words = combination or pool[int(u[0] * len(pool))]

    def shade(base: tuple[int, int, int], i: int) -> tuple[float, float, float]:
        gain = between(i, 0.88, 1.08)
        r, g, b = (min(max(c * gain + between(i + 1 + n, -6, 6), 0.0), 255.0) for n, c in enumerate(base))
        return r, g, b

    background_rgb = shade(BACKGROUNDS[words.background], 10)
    level = sum(background_rgb) / 3
    sign = 1.0 if level < 64 else -1.0 if level > 180 else 1.0 if u[9] < 0.5 else -1.0  # never clipped away
    bar_width = between(8, *BAR_WIDTH)
    radius = between(1, *RADIUS)
    sideways = words.direction in ("left", "right")
    margin = TRIANGLE_HALF_BASE * radius + 1  # only the edges it moves towards ever cut the subject
    return Scene(
        **words._asdict(),
        radius=radius,
        speed=between(2, *SPEED),
        x=between(3, 0, WIDTH) if sideways else between(3, margin, WIDTH - margin),
        y=between(4, margin, HEIGHT - margin) if sideways else between(4, 0, HEIGHT),
        gradient_angle=between(5, 0, 2 * math.pi),
        gradient_strength=between(6, *GRADIENT),
        bar_x=between(7, 0, WIDTH - bar_width),
        bar_width=bar_width,
        bar_brightness=sign * BAR_BRIGHTNESS,
        background_rgb=background_rgb,
        subject_rgb=shade(COLOURS[words.colour], 14),
    )


def scene_for(seed: int, *, held_out: bool | None = False, combination: Combination | None = None) -> Scene:
    """The scene of a seed (see `sample_scene`)."""
    return sample_scene(torch.Generator().manual_seed(seed), held_out=held_out, combination=combination)


def render(scene: Scene, start_frame: int, num_frames: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw frames `start_frame` ... `start_frame + num_frames - 1` of a scene.

    Returns: uint8 [T, H, W, 3]; a frame depends on the scene and its number alone.
    Raises: ValueError if `num_frames` is not positive.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be positive, got {num_frames}")
    # Sub-pixel positions in float64 on the CPU: exact after hours, and the same on every device.
    travel = torch.arange(start_frame, start_frame + num_frames, dtype=torch.float64) * scene.speed
    step_x, step_y = _STEPS[scene.direction]
    dx = _distances(WIDTH, scene.x + step_x * travel).to(device)  # [T, W]
    dy = _distances(HEIGHT, scene.y + step_y * travel).to(device)  # [T, H]
    alpha = coverage(scene.shape, dx, dy, scene.radius)  # [T, H, W]
    background = render_background(scene, device)
    planes = []
    for channel, level in enumerate(scene.subject_rgb):
        behind = background[..., channel]
        levels = torch.addcmul(behind + 0.5, alpha, level - behind)
        planes.append(levels.to(torch.uint8))  # cuts off, so the 0.5 makes it round
    return torch.stack(planes, -1)


def render_batch(
    scenes: Sequence[Scene],
    start_frames: Sequence[int],
    num_frames: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw `num_frames` frames of each scene, each from its own first frame.

    Returns: uint8 [B, T, H, W, 3].
    Raises: ValueError if `num_frames` is not positive or the two lists differ in length.
    """
    windows = zip(scenes, start_frames, strict=True)
    return torch.stack([render(scene, start, num_frames, device) for scene, start in windows])


def render_background(scene: Scene, device: torch.device | str = "cpu") -> Tensor:
    """What is behind the subject: shade, gradient, bar.

    Returns: float32 [H, W, 3] in 0..255, not rounded.
    """
    x = torch.arange(WIDTH, device=device).float()
    y = torch.arange(HEIGHT, device=device).float()[:, None]
    cos, sin = math.cos(scene.gradient_angle), math.sin(scene.gradient_angle)
    along = cos * (x + 0.5 - WIDTH / 2) + sin * (y + 0.5 - HEIGHT / 2)  # px along the gradient
    corner = (abs(cos) * WIDTH + abs(sin) * HEIGHT) / 2
    covered = (x + 1).clamp(max=scene.bar_x + scene.bar_width) - x.clamp(min=scene.bar_x)
    light = along * (scene.gradient_strength / corner) + covered.clamp(0, 1) * scene.bar_brightness  # [H, W]
    base = torch.tensor(scene.background_rgb, dtype=torch.float32, device=device)
    return (base + light[..., None]).clamp(0, 255)


def _distances(size: int, centre: Tensor) -> Tensor:
    # [T] -> float32 [T, size]: signed px from each pixel's centre to the nearest copy of `centre`.
    distance = torch.arange(size, dtype=torch.float64) + 0.5 - centre[:, None]
    return ((distance + size / 2) % size - size / 2).float()


def coverage(shape: str, dx: Tensor, dy: Tensor, radius: float | Tensor) -> Tensor:
    """How much of each pixel a shape covers; its edge is one pixel soft.

    Args:
        dx, dy: [..., W], [..., H] px from the centre of the shape's bounding box to the pixels' centres.
        radius: px; a number, or a tensor that broadcasts with [..., 1, 1].
    Returns: float32 [..., H, W] in 0..1.
    Raises: ValueError if the shape is unknown.
    """
    dx, dy = dx[..., None, :], dy[..., :, None]
    if shape == "circle":
        return (radius + 0.5 - (dx.square() + dy.square()).sqrt_()).clamp_(0, 1)
    if shape == "square":
        half = SQUARE_HALF_SIDE * radius + 0.5
        return (half - dx.abs()).clamp(0, 1) * (half - dy.abs()).clamp(0, 1)
    if shape == "triangle":
        half_base, half_height = TRIANGLE_HALF_BASE * radius, TRIANGLE_HALF_HEIGHT * radius
        slant = math.hypot(2 * TRIANGLE_HALF_HEIGHT, TRIANGLE_HALF_BASE)
        across, down = (
            2 * TRIANGLE_HALF_HEIGHT / slant,
            TRIANGLE_HALF_BASE / slant,
        )  # normal of a slanted side
        inside = across * (half_base - dx.abs()) + down * (dy - half_height)
        return (half_height + 0.5 - dy).clamp(0, 1) * (inside + 0.5).clamp_(0, 1)
    raise ValueError(f"unknown shape {shape!r}; one of {', '.join(SHAPES)}")
