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

A story (`sample_story`) adds what a timeline of captions can say, block by block (`Scene.block_captions`):

    visitor   a small second object that stands beside the subject's way in some blocks and is away in others. The
              caption says "…, the visitor is here" or "…, the visitor is away" and never its colour, shape or place:
              these are the same whenever it is back, and only a memory can tell them.
    switch    from some block on other captioned words; the rest of the scene stays as it was.

Some combinations are held out of training (`HELD_OUT`); every word and every pair of words stays in it.
This module knows neither codec nor model, only how many frames a block has. It imports torch and the standard
library only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

HEIGHT, WIDTH, FPS = 64, 128, 16
FIRST_BLOCK_FRAMES, BLOCK_FRAMES = 13, 16
"""Pixel frames of block 0 and of every later one: 4 latent frames, of which the very first holds one pixel frame."""

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

VISITOR_SHAPES = ("tall", "wide", "square")
VISITOR_SIZES = {"tall": (9.0, 20.0), "wide": (20.0, 9.0), "square": (13.4, 13.4)}
"""Width and height in px of boxes of one area, which differ in their outline even when they are blurred."""
VISITOR_EDGE = 1.0  # px between a visitor and the edge of the picture, at least

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


def caption_of(combination: Combination, visitor: bool | None = None) -> str:
    """The caption of a block.

    Args:
        visitor: whether it is there; None = the scene has none, and nothing is said of it.
    """
    if visitor is None:
        return combination.caption
    return f"{combination.caption}, the visitor is {'here' if visitor else 'away'}"


def visitor_colours(*combinations: Combination) -> tuple[str, ...]:
    """Colours a visitor may have beside these subjects and backgrounds: one in so many is chance."""
    taken = {word for c in combinations for word in (c.colour, c.background)}
    return tuple(colour for colour in COLOURS if colour not in taken)


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


def story_captions() -> tuple[str, ...]:
    """Every caption a block of a training story may have: all training captions without a visitor, here, away."""
    return tuple(
        caption_of(combination, visitor) for visitor in (None, True, False) for combination in _TRAINING
    )


def parse_caption(caption: str) -> Combination:
    """Read the four words of a caption of this world; what it says of a visitor is read by `parse_visitor`.

    Raises: ValueError if the caption does not follow the grammar or its words are not of this world.
    """
    return _parse(caption)[0]


def parse_visitor(caption: str) -> bool | None:
    """Whether a caption says that the visitor is here; None if it does not speak of one.

    Raises: ValueError as `parse_caption`.
    """
    return _parse(caption)[1]


def _parse(caption: str) -> tuple[Combination, bool | None]:
    words = caption.lower().replace(".", " ").replace(",", " ").split()
    visitor = None
    if len(words) == 13 and words[9:12] == ["the", "visitor", "is"] and words[12] in ("here", "away"):
        visitor, words = words[12] == "here", words[:9]
    fits = len(words) == 9 and (words[0], words[3], *words[5:7], words[8]) == (
        "a", "moving", "on", "a", "background",
    )  # fmt: skip
    if not fits:
        raise ValueError(f"not a caption of the demo world: {caption!r}")
    combination = Combination(shape=words[2], colour=words[1], background=words[7], direction=words[4])
    if combination not in COMBINATIONS:
        raise ValueError(f"words or a combination unknown to the demo world: {caption!r}")
    return combination, visitor


def first_frame(block: int) -> int:
    """Pixel frames before a block."""
    return FIRST_BLOCK_FRAMES + (block - 1) * BLOCK_FRAMES if block else 0


def block_of(frame: int) -> int:
    """The block a pixel frame is in."""
    return (frame + BLOCK_FRAMES - FIRST_BLOCK_FRAMES) // BLOCK_FRAMES


@dataclass(frozen=True, kw_only=True)
class Visitor:
    """The second object of a scene; it stands still, in front of everything, in some blocks.

    Attributes:
        x, y: centre in px.
        here: whether it is there, for each block; later blocks are as the last one.
    """

    shape: str
    colour: str
    rgb: tuple[float, float, float]
    x: float
    y: float
    here: tuple[bool, ...]

    def is_here(self, block: int) -> bool:
        return self.here[min(block, len(self.here) - 1)]


@dataclass(frozen=True, kw_only=True)
class Switch:
    """Other captioned words from a block on, with the shades that go with them."""

    block: int
    combination: Combination
    subject_rgb: tuple[float, float, float]
    background_rgb: tuple[float, float, float]
    bar_brightness: float


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
        visitor: a second object, or None.
        switch: other words from some block on, or None.
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
    visitor: Visitor | None = None
    switch: Switch | None = None

    @property
    def combination(self) -> Combination:
        return Combination(self.shape, self.colour, self.background, self.direction)

    @property
    def caption(self) -> str:
        """The caption of the first block."""
        return self.block_captions(1)[0]

    def combination_at(self, block: int) -> Combination:
        """The captioned words of a block."""
        switched = self.switch is not None and block >= self.switch.block
        return self.switch.combination if self.switch is not None and switched else self.combination

    def visitor_at(self, block: int) -> bool | None:
        """Whether the visitor is there in a block; None if the scene has none."""
        return None if self.visitor is None else self.visitor.is_here(block)

    def block_captions(self, num_blocks: int) -> tuple[str, ...]:
        """The caption of each of the first `num_blocks` blocks."""
        return tuple(caption_of(self.combination_at(n), self.visitor_at(n)) for n in range(num_blocks))

    def switched(self) -> Scene:
        """The scene as it is from its switch on, without a switch; the subject goes on from where it is then."""
        assert self.switch is not None
        travel = self.speed * first_frame(self.switch.block)
        before, after = _STEPS[self.direction], _STEPS[self.switch.combination.direction]
        return replace(
            self,
            **self.switch.combination._asdict(),
            x=(self.x + (before[0] - after[0]) * travel) % WIDTH,
            y=(self.y + (before[1] - after[1]) * travel) % HEIGHT,
            subject_rgb=self.switch.subject_rgb,
            background_rgb=self.switch.background_rgb,
            bar_brightness=self.switch.bar_brightness,
            switch=None,
        )


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

    background_rgb = _shade(BACKGROUNDS[words.background], u[10:14])
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
        bar_brightness=_bar_brightness(background_rgb, u[9] < 0.5),
        background_rgb=background_rgb,
        subject_rgb=_shade(COLOURS[words.colour], u[14:18]),
    )


def _shade(base: tuple[int, int, int], u: Sequence[float]) -> tuple[float, float, float]:
    # A named colour, darker or lighter and a little off; u are four numbers in 0..1.
    gain = 0.88 + 0.2 * u[0]
    r, g, b = (min(max(c * gain + 12 * x - 6, 0.0), 255.0) for c, x in zip(base, u[1:4], strict=True))
    return r, g, b


def _bar_brightness(background_rgb: tuple[float, float, float], brighter: bool) -> float:
    level = sum(background_rgb) / 3
    sign = 1.0 if level < 64 else -1.0 if level > 180 else 1.0 if brighter else -1.0  # never clipped away
    return sign * BAR_BRIGHTNESS


def sample_story(
    generator: torch.Generator,
    *,
    num_blocks: int,
    visitor: bool,
    switch: bool,
    quick: bool = False,
    held_out: bool | None = False,
    combination: Combination | None = None,
) -> Scene:
    """Draw a scene with a visitor that comes and goes, with a switch of words, or both; always as many draws.

    In three of four scenes the visitor first comes in block 2 or later, behind the usual sinks. It then stays for one
    to three blocks and is away for one to eight. A story of one block has it in half of the cases.

    Args:
        num_blocks: blocks of the timeline; the switch is in one of them after the first.
        quick: the visitor first comes in block 1 or 2, and stays and absences are of one or two blocks.
        held_out, combination: as for `sample_scene`; a switch leads to combinations of the same kind.
    """
    scene = sample_scene(generator, held_out=held_out, combination=combination)
    u = torch.rand(14 + num_blocks, generator=generator, dtype=torch.float64).tolist()
    if switch:
        pool = COMBINATIONS if held_out is None else _HELD_OUT if held_out else _TRAINING
        scene = replace(scene, switch=_switch(scene, pool, u[:10], num_blocks))
    if visitor:
        scene = _with_visitor(scene, u[10:14], _comings_and_goings(u[14:], quick))
    return scene


def _switch(scene: Scene, pool: Sequence[Combination], u: Sequence[float], num_blocks: int) -> Switch:
    # Every number of changed words is alike, so that small changes and wholly new captions are both met.
    wanted = 1 + int(u[0] * 4)
    differing = [c for c in pool if sum(a != b for a, b in zip(c, scene.combination, strict=True)) == wanted]
    words = differing[int(u[1] * len(differing))]
    same = words.background == scene.background
    background_rgb = scene.background_rgb if same else _shade(BACKGROUNDS[words.background], u[2:6])
    return Switch(
        block=1 + int((num_blocks - 1) * u[9]),
        combination=words,
        background_rgb=background_rgb,
        subject_rgb=scene.subject_rgb
        if words.colour == scene.colour
        else _shade(COLOURS[words.colour], u[5:9]),
        bar_brightness=_bar_brightness(background_rgb, scene.bar_brightness > 0),
    )


def _comings_and_goings(u: Sequence[float], quick: bool) -> tuple[bool, ...]:
    # One number a block: at the first block of a stay or an absence it says how long it is.
    if len(u) == 1:
        return (u[0] < 0.5,)
    present = u[0] < 0.25
    here = [] if present else [False] * (2 - int(quick) + int(u[0] >= 0.75))
    present = True
    while len(here) < len(u):
        x = u[len(here)]
        if quick:
            blocks = 1 + int(1.4 * x)
        else:
            blocks = 1 + int(3 * x) if present else min(8, 1 + int(12 * x * x))
        here += [present] * blocks
        present = not present
    return tuple(here[: len(u)])


def _with_visitor(scene: Scene, u: Sequence[float], here: tuple[bool, ...]) -> Scene:
    words = [scene.combination] + ([scene.switch.combination] if scene.switch else [])
    colours = visitor_colours(*words)
    colour, shape = colours[int(u[0] * len(colours))], VISITOR_SHAPES[int(u[1] * len(VISITOR_SHAPES))]
    width, height = VISITOR_SIZES[shape]
    margin = TRIANGLE_HALF_BASE * scene.radius + 1
    if scene.direction in ("left", "right"):
        # The subject's way is moved to one side of the picture, and the visitor stands on the other.
        above = scene.y < HEIGHT / 2
        scene = replace(scene, y=margin if above else HEIGHT - margin)
        edge = height / 2 + VISITOR_EDGE
        y = HEIGHT - edge if above else edge
        x = edge + u[2] * (WIDTH - 2 * edge)
    else:
        free = width / 2 + VISITOR_EDGE
        left, right = scene.x - margin - 2 * free, WIDTH - scene.x - margin - 2 * free
        place = u[2] * (max(left, 0) + max(right, 0))
        x = free + place if place < max(left, 0) else WIDTH - free - (place - max(left, 0))
        edge = height / 2 + VISITOR_EDGE
        y = edge + u[3] * (HEIGHT - 2 * edge)
    rgb = tuple(float(level) for level in COLOURS[colour])
    return replace(
        scene,
        visitor=Visitor(shape=shape, colour=colour, rgb=(rgb[0], rgb[1], rgb[2]), x=x, y=y, here=here),
    )


def scene_for(seed: int, *, held_out: bool | None = False, combination: Combination | None = None) -> Scene:
    """The scene of a seed (see `sample_scene`)."""
    return sample_scene(torch.Generator().manual_seed(seed), held_out=held_out, combination=combination)


def subject_centre(scene: Scene, frame: int) -> tuple[float, float]:
    """Centre of the subject's bounding box in a frame, in px: (x, y), wrapped into the picture."""
    if scene.switch is not None:
        late = frame >= first_frame(scene.switch.block)
        return subject_centre(scene.switched() if late else replace(scene, switch=None), frame)
    step_x, step_y = _STEPS[scene.direction]
    return (scene.x + step_x * frame * scene.speed) % WIDTH, (scene.y + step_y * frame * scene.speed) % HEIGHT


def render(scene: Scene, start_frame: int, num_frames: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw frames `start_frame` ... `start_frame + num_frames - 1` of a scene.

    Returns: uint8 [T, H, W, 3]; a frame depends on the scene and its number alone.
    Raises: ValueError if `num_frames` is not positive.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be positive, got {num_frames}")
    if scene.switch is not None:
        split = min(max(first_frame(scene.switch.block) - start_frame, 0), num_frames)
        parts = (
            (replace(scene, switch=None), start_frame, split),
            (scene.switched(), start_frame + split, num_frames - split),
        )
        return torch.cat([render(part, start, count, device) for part, start, count in parts if count])
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
    frames = torch.stack(planes, -1)
    if scene.visitor is not None:
        present = [scene.visitor.is_here(block_of(start_frame + n)) for n in range(num_frames)]
        cover = visitor_coverage(scene.visitor, device)[..., None]
        rgb = torch.tensor(scene.visitor.rgb, device=device)
        behind = frames[present].float()
        frames[present] = (behind + 0.5 + cover * (rgb - behind)).to(torch.uint8)
    return frames


def visitor_coverage(visitor: Visitor, device: torch.device | str = "cpu") -> Tensor:
    """How much of each pixel a visitor covers when it is there: float32 [H, W] in 0..1."""
    x = torch.arange(WIDTH, device=device).float() + 0.5 - visitor.x
    y = torch.arange(HEIGHT, device=device).float() + 0.5 - visitor.y
    width, height = VISITOR_SIZES[visitor.shape]
    across, down = (size / 2 + 0.5 - d.abs() for size, d in ((width, x), (height, y)))
    return down.clamp(0, 1)[:, None] * across.clamp(0, 1)


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
