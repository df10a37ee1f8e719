"""Exact detectors of the demo world: what a clip shows, read from its pixels alone.

No learned weights. They use what is known of the world (`world.py`): one subject of another colour than its
background, a background that stands still, three shapes, movement along one axis with wrap-around, and at most one
visitor: small, standing still, of a third colour. What is the visitor is taken out before the subject is read.

    frames --> colour of most pixels --> picture of the background --+
                     |                                               +--> cover of the subject (0..1 a pixel)
                     +--> what differs --> colour of the subject ----+       |--> area, direction
                                                                             +--> shape, outline

The background is averaged over the times at which a pixel is not covered: a large subject that moves up and
down covers the middle of its columns more than half of the time, and there a temporal median is the subject.
A visitor is where, for some frames, the same few pixels have a third named colour. The soft edges of a subject may look
like one, too, but they are two pixels thick at most and are eroded away.
This module imports torch, the standard library and the world.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from packforcing_cli.training.world import (
    BACKGROUNDS,
    COLOURS,
    RADIUS,
    SHAPES,
    SPEED,
    SQUARE_HALF_SIDE,
    TRIANGLE_HALF_BASE,
    TRIANGLE_HALF_HEIGHT,
    VISITOR_SIZES,
    Combination,
    Scene,
    coverage,
    parse_caption,
)

NONE = "none"

_SHADING = 32.0  # levels: a difference in brightness up to here may be gradient or bar
_NEAR = 25.0  # levels: farther from the background's colour than this is left out of the background picture
_FAINT = 20.0  # levels: a subject that differs less than this is no subject
_SMALLEST_AREA = 0.4 * 2 * TRIANGLE_HALF_BASE * 2 * TRIANGLE_HALF_HEIGHT / 2 * RADIUS[0] ** 2  # px
_COLOURED = 45.0  # levels: a pixel that differs more from the background has a colour of its own
_VISITOR_AREA = 180.0  # px
_VISITOR_WINDOW = 32  # px: a visitor fits in twice over
_VISITOR_FRAMES = 10  # frames a pixel has a third colour, at least; a block has 13 or 16
_STANDSTILL = 0.3 * SPEED[0]  # px a frame
_BASELINE = 4  # frames over which a movement is measured: at most 8 px of the 64 after which it would wrap
_SHAPE_FRAMES = 24  # frames of a clip that the shape is read from
_CROP = 64  # px: window around the subject
_GAINS = (0.75, 1.2)  # how much darker or lighter a shade of a named colour may be
_AREA_OF_RADIUS = {  # area / radius^2
    "circle": math.pi,
    "square": 4 * SQUARE_HALF_SIDE**2,
    "triangle": 2 * TRIANGLE_HALF_BASE * TRIANGLE_HALF_HEIGHT,
}


@dataclass(frozen=True)
class Detection:
    """What a clip shows; a word is "none" where nothing could be told.

    Attributes:
        present: whether a subject large enough is there in at least half of the frames.
        area: median area of the subject in px.
        speed: mean px a frame along the direction, jumps left out (0 when it stands still).
        outline: 0..1, how well the subject's outline fits the best shape (mean IoU; rendered: 0.97 and more).
        presence: share of the frames in which the subject is there.
        subject_rgb, background_rgb: median shades, 0..255.
    """

    background: str
    colour: str
    shape: str
    direction: str
    present: bool
    area: float
    speed: float
    outline: float
    presence: float
    subject_rgb: tuple[float, float, float]
    background_rgb: tuple[float, float, float]


def detect(frames: Tensor) -> Detection:
    """Read the four captioned words and the measures of `Detection` from a clip.

    Args:
        frames: uint8 [T, H, W, 3], two frames or more; some seconds, so that the background shows everywhere.
    Raises: ValueError on any other shape or dtype.
    """
    planes = _planes(frames)
    centre = _most_common(planes)
    distance = _distance(planes, centre)
    visitor = _find_visitor(planes, distance)
    if visitor is not None:
        # Where it stands the background is what is left and right of it, up to the gradient and the bar.
        plain = centre[:, None, None, None].expand_as(planes)
        planes = torch.where(visitor.mask, plain, planes)
        distance = torch.where(visitor.mask, 0.0, distance)
    background = _background(planes, distance)  # [3, H, W]
    background_rgb = background.flatten(1).median(1).values
    absent = Detection(
        background=_name(background_rgb, BACKGROUNDS),
        colour=NONE,
        shape=NONE,
        direction=NONE,
        present=False,
        area=0.0,
        speed=0.0,
        outline=0.0,
        presence=0.0,
        subject_rgb=(0.0, 0.0, 0.0),
        background_rgb=_triple(background_rgb),
    )
    contrast = _contrast(distance)
    if contrast < _FAINT:
        return absent
    subject_rgb = planes[:, ::3][:, distance[::3] > contrast / 2].median(1).values
    cover = _cover(planes, background, subject_rgb)  # [T, H, W]
    areas = cover.sum((1, 2))
    visible = areas >= _SMALLEST_AREA
    area = float(areas.median())
    presence = float(visible.float().mean())
    if presence < 0.5:
        return absent
    centres = _centres(cover)  # [T, 2]
    direction, speed = _direction(centres, visible, frames.shape[2], frames.shape[1])
    shown = visible.nonzero().flatten()
    shown = shown[:: max(1, math.ceil(len(shown) / _SHAPE_FRAMES))]
    shape, outline = _shape(cover[shown], centres[shown])
    return Detection(
        background=absent.background,
        colour=_name(subject_rgb, COLOURS),
        shape=shape,
        direction=direction,
        present=True,
        area=area,
        speed=speed,
        outline=outline,
        presence=presence,
        subject_rgb=_triple(subject_rgb),
        background_rgb=absent.background_rgb,
    )


@dataclass(frozen=True)
class VisitorDetection:
    """What there is of a visitor; a word is "none" where nothing could be told.

    Attributes:
        present: whether it is there in at least half of the frames.
        shape: one of `world.VISITOR_SHAPES`.
        presence: share of the frames in which it is there.
        area: median area in px, over the frames in which it is there.
        x, y: its centre in px.
    """

    present: bool
    colour: str
    shape: str
    presence: float = 0.0
    area: float = 0.0
    x: float = 0.0
    y: float = 0.0


def detect_visitor(frames: Tensor) -> VisitorDetection:
    """Whether a visitor is there, and which colour and shape it has.

    Args:
        frames: uint8 [T, H, W, 3], at least ten frames: those of a block, or of some blocks with one caption.
    Raises: ValueError on any other shape or dtype.
    """
    planes = _planes(frames)
    found = _find_visitor(planes, _distance(planes, _most_common(planes)))
    if found is None:
        return VisitorDetection(False, NONE, NONE)
    shown = found.area > _VISITOR_AREA / 3
    presence = float(shown.float().mean())
    if presence < 0.5:
        return VisitorDetection(False, NONE, NONE, presence)
    area = float(found.area[shown].median())
    width, height = (math.sqrt(12 * spread) for spread in found.spread)
    best = min(VISITOR_SIZES, key=lambda shape: abs(math.log(width / height) - _log_aspect(shape)))
    return VisitorDetection(True, found.colour, best, presence, area, *found.centre)


def _log_aspect(shape: str) -> float:
    width, height = VISITOR_SIZES[shape]
    return math.log(width / height)


def count_subjects(frames: Tensor) -> int:
    """How many separate objects there are besides the visitor: median over frames of the connected areas.

    Args:
        frames: uint8 [T, H, W, 3], two frames or more.
    """
    planes = _planes(frames)
    distance = _distance(planes, _most_common(planes))
    visitor = _find_visitor(planes, distance)
    if visitor is not None:
        distance = torch.where(visitor.mask, 0.0, distance)
    contrast = _contrast(distance)
    if contrast < _FAINT:
        return 0
    step = max(1, len(distance) // 8)
    covered = distance[::step] > max(contrast / 2, _FAINT)  # [T, H, W]
    counts = [sum(size >= _SMALLEST_AREA / 2 for size in _areas(picture)) for picture in covered]
    return int(torch.tensor(counts).median())


def _areas(covered: Tensor) -> list[int]:
    # Pixels of each connected area of a mask [H, W] whose edges meet: every pixel takes the largest number around
    # it until nothing changes.
    numbers = torch.arange(1, covered.numel() + 1, device=covered.device).view(covered.shape).float()
    label = numbers * covered
    while True:
        grown = F.max_pool2d(F.pad(label[None, None], (1, 1, 1, 1), mode="circular"), 3, 1)[0, 0] * covered
        if torch.equal(grown, label):
            break
        label = grown
    return label[covered].unique(return_counts=True)[1].tolist()


@dataclass(frozen=True)
class _Found:
    """A visitor: mask [T, H, W] of what to leave out; area [T] px; centre and variance in px, (x, y)."""

    mask: Tensor
    colour: str
    area: Tensor
    centre: tuple[float, float]
    spread: tuple[float, float]


def _find_visitor(planes: Tensor, distance: Tensor) -> _Found | None:
    coloured = distance > _COLOURED
    pixels = planes[:, coloured].T  # [P, 3]
    if len(pixels) < _VISITOR_AREA:
        return None
    names = _nearest(pixels, tuple(COLOURS))  # [P]
    counts = names.bincount(minlength=len(COLOURS))
    subject = int(counts.argmax())
    best: _Found | None = None
    for number in counts.argsort(descending=True).tolist():
        if number == subject or int(counts[number]) < _VISITOR_FRAMES * _VISITOR_AREA / 3:
            continue
        own = torch.zeros_like(coloured)
        own[coloured] = names == number
        found = _standing(planes, own, coloured, list(COLOURS)[number])
        if found is not None and (best is None or found.area.sum() > best.area.sum()):
            best = found
    return best


def _standing(planes: Tensor, own: Tensor, coloured: Tensor, colour: str) -> _Found | None:
    # own [T, H, W]: pixels of one colour. What is thick enough and stays, if it is small and all in one place.
    core = 1 - F.max_pool2d(1 - own.float()[:, None], 3, 1, 1)[:, 0]  # eroded by a pixel all around
    stays = core.sum(0) >= min(_VISITOR_FRAMES, 0.8 * len(core))  # [H, W]
    if int(stays.sum()) < _VISITOR_AREA / 8:
        return None
    rows, cols = stays.nonzero().T
    top, left = (int(n.float().median()) - _VISITOR_WINDOW // 2 for n in (rows, cols))
    inside = (rows >= top) & (rows < top + _VISITOR_WINDOW) & (cols >= left) & (cols < left + _VISITOR_WINDOW)
    if float(inside.float().mean()) < 0.9 or int(stays.sum()) > 2 * _VISITOR_AREA:
        return None
    near = (
        F.max_pool2d(stays.float()[None, None], 7, 1, 3)[0, 0] > 0
    )  # [H, W] the visitor and what is around it
    area = (own & near).flatten(1).sum(1).float()
    shown = area > _VISITOR_AREA / 3
    if not bool(shown.any()):
        return None
    usual = (own & near)[shown].float().mean(0)  # [H, W] share of the time
    usual = usual * (usual > 0.5)
    if float(usual.sum()) == 0:
        return None
    y = torch.arange(usual.shape[0], device=usual.device) + 0.5
    x = torch.arange(usual.shape[1], device=usual.device) + 0.5
    across, down = usual.sum(0) / usual.sum(), usual.sum(1) / usual.sum()
    centre_x, centre_y = float(across @ x), float(down @ y)
    spread = float(across @ (x - centre_x).square()), float(down @ (y - centre_y).square())
    mask = near & shown[:, None, None]
    return _Found(mask, colour, area, (centre_x, centre_y), spread)


def _nearest(pixels: Tensor, names: tuple[str, ...]) -> Tensor:
    # [P, 3] -> [P] number of the named colour of which a pixel is nearest to being a darker or lighter shade.
    errors = []
    for name in names:
        b = torch.tensor(COLOURS[name], dtype=pixels.dtype, device=pixels.device)
        gain = ((pixels @ b) / (b @ b)).clamp(*_GAINS)
        errors.append((pixels - gain[:, None] * b).square().sum(1))
    return torch.stack(errors).argmin(0)


def score(detection: Detection, truth: Scene | Combination | str) -> dict[str, bool]:
    """Which words a clip shows rightly: background, colour, shape, direction, present, and all of them.

    Raises: ValueError if a caption is not one of the demo world.
    """
    words = (
        parse_caption(truth)
        if isinstance(truth, str)
        else truth.combination
        if isinstance(truth, Scene)
        else truth
    )
    right = {
        "background": detection.background == words.background,
        "colour": detection.colour == words.colour,
        "shape": detection.shape == words.shape,
        "direction": detection.direction == words.direction,
        "present": detection.present,
    }
    return {**right, "all": all(right.values())}


def background_picture(frames: Tensor) -> Tensor:
    """The picture behind the subject, each pixel over the times at which the subject is elsewhere.

    Args:
        frames: uint8 [T, H, W, 3], some seconds of them.
    Returns: float32 [H, W, 3] in 0..255.
    """
    planes = _planes(frames)
    return _background(planes, _distance(planes, _most_common(planes))).permute(1, 2, 0)


def background_correlation(first: Tensor, later: Tensor) -> float:
    """How much of gradient and landmark bar is kept: correlation of two background pictures.

    Args:
        first, later: [H, W, 3] of `background_picture`; usually seconds 0-5 and a later window.
    Returns: -1..1; Pearson's, after each channel's mean is taken off; 0 if one picture is flat.
    """
    a, b = ((picture - picture.mean((0, 1))).flatten().double() for picture in (first, later))
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 1e-6 else 0.0


def background_drift(first: Tensor, later: Tensor) -> float:
    """How far the colour of the background moved: mean over RGB of the means' difference, in levels of 255.

    Args:
        first, later: [H, W, 3] of `background_picture`.
    """
    return float((first.mean((0, 1)) - later.mean((0, 1))).abs().mean())


def _planes(frames: Tensor) -> Tensor:
    # uint8 [T, H, W, 3] -> float32 [3, T, H, W]
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) < 2:
        raise ValueError(
            f"frames must be uint8 [T, H, W, 3] with T >= 2, got {frames.dtype} {tuple(frames.shape)}"
        )
    planes = torch.empty(3, *frames.shape[:3], device=frames.device)
    return planes.copy_(frames.permute(3, 0, 1, 2))


def _most_common(planes: Tensor) -> Tensor:
    # The subject is an eighth of the picture at most, so the median is of the background. [3]
    return planes[:, ::4, ::2, ::2].flatten(1).median(1).values


def _distance(planes: Tensor, centre: Tensor) -> Tensor:
    # [T, H, W] levels between each pixel and the background's colour; shading of it does not count.
    difference = planes - centre[:, None, None, None]
    light = difference.mean(0).clamp_(-_SHADING, _SHADING)
    return difference.sub_(light).square_().sum(0).sqrt_()


def _background(planes: Tensor, distance: Tensor) -> Tensor:
    # [3, H, W]: mean over the times at which a pixel has about the background's colour.
    free = (distance < _NEAR).float()
    times = free.sum(0)
    picture = torch.stack([(plane * free).sum(0) for plane in planes]) / times.clamp(min=1)
    rare = times < 0.15 * len(distance)
    if bool(rare.any()):
        # A bar of strong contrast is always there and looks like itself. A subject that hardly moves hides
        # what is behind it, and the rest of the column (gradient and bar) tells best.
        column = (picture * times).sum(1) / times.sum(0).clamp(min=1)  # [3, W]
        hidden = rare & (distance.mean(0) > max(_contrast(distance) / 2, _FAINT)) & (times.sum(0) > 0)
        picture[:, rare] = planes[:, :, rare].median(1).values
        picture = torch.where(hidden, column[:, None], picture)
    return picture


def _contrast(distance: Tensor) -> float:
    # Levels between subject and background: the smallest subject takes 7 % of the picture, so the farthest
    # 3 % of all pixels are its own.
    return float(distance[::3, ::2, ::2].flatten().quantile(0.97))


def _cover(planes: Tensor, background: Tensor, subject_rgb: Tensor) -> Tensor:
    # [T, H, W] in 0..1: where a pixel lies between the background behind it and the subject's colour.
    contrast = subject_rgb[:, None, None] - background
    weight = contrast / contrast.square().sum(0).clamp(min=40.0**2)
    cover = -(weight * background).sum(0).expand(planes.shape[1:])
    for plane, w in zip(planes, weight, strict=True):
        cover = torch.addcmul(cover, plane, w)
    return ((cover - 0.2) / 0.6).clamp_(0, 1)  # noise of either colour is cut off; half stays half


def _centres(cover: Tensor) -> Tensor:
    # [T, 2] px (x, y): phase of the cover's first Fourier term along each axis. It moves exactly with the
    # subject, and across an edge without a jump.
    centres = []
    for profile in (cover.sum(1), cover.sum(2)):  # [T, W], [T, H]
        size = profile.shape[1]
        angle = (torch.arange(size, device=cover.device) + 0.5) * (2 * math.pi / size)
        phase = torch.atan2(profile @ angle.sin(), profile @ angle.cos())
        centres.append(phase * (size / (2 * math.pi)))
    return torch.stack(centres, 1)


def _direction(centres: Tensor, visible: Tensor, width: int, height: int) -> tuple[str, float]:
    # Over a few frames, because a codec may show a movement in fewer steps than there are frames.
    baseline = min(_BASELINE, len(centres) - 1)
    both = visible[baseline:] & visible[:-baseline]
    if not bool(both.any()):
        return NONE, 0.0
    size = torch.tensor([width, height], dtype=centres.dtype, device=centres.device)
    steps = (centres[baseline:] - centres[:-baseline])[both]
    steps = ((steps + size / 2) % size - size / 2) / baseline
    usual = steps.median(0).values
    steady = ((steps - usual).abs() < 1).all(1)  # a jump is no speed
    x, y = (steps[steady].mean(0) if bool(steady.any()) else usual).tolist()
    if max(abs(x), abs(y)) < _STANDSTILL:
        return NONE, 0.0
    if abs(x) > abs(y):
        return ("right" if x > 0 else "left"), abs(x)
    return ("down" if y > 0 else "up"), abs(y)


def _shape(cover: Tensor, centres: Tensor) -> tuple[str, float]:
    # Each shape is drawn with the subject's own area at its centre of mass; the best overlap names it.
    num_frames, height, width = cover.shape
    crop = min(_CROP, height, width)
    offset = torch.arange(crop, device=cover.device) - crop // 2
    cols = (centres[:, :1].floor().long() + offset) % width  # [T, P]
    rows = (centres[:, 1:].floor().long() + offset) % height
    frame = torch.arange(num_frames, device=cover.device)[:, None, None]
    window = cover[frame, rows[:, :, None], cols[:, None, :]]  # [T, P, P]
    areas = window.sum((1, 2))
    x = (window.sum(1) @ offset.float() / areas)[:, None]
    y = (window.sum(2) @ offset.float() / areas)[:, None]
    overlap: dict[str, float] = {}
    for shape in SHAPES:
        radii = (areas / _AREA_OF_RADIUS[shape]).sqrt()[:, None]  # [T, 1]
        below = (
            radii * (TRIANGLE_HALF_HEIGHT / 3) if shape == "triangle" else 0.0
        )  # centre of mass under the box's
        template = coverage(shape, offset - x, offset - (y - below), radii[:, None])
        both = torch.minimum(window, template).sum((1, 2))
        overlap[shape] = float((both / torch.maximum(window, template).sum((1, 2))).mean())
    best = max(overlap, key=lambda shape: overlap[shape])
    return best, overlap[best]


def _name(rgb: Tensor, palette: Mapping[str, tuple[int, int, int]]) -> str:
    # The named colour of which `rgb` is nearest to being a darker or lighter shade.
    def error(base: tuple[int, int, int]) -> float:
        b = torch.tensor(base, dtype=rgb.dtype, device=rgb.device)
        gain = float((rgb @ b) / (b @ b))
        return float((rgb - b * min(max(gain, _GAINS[0]), _GAINS[1])).norm())

    return min(palette, key=lambda name: error(palette[name]))


def _triple(rgb: Tensor) -> tuple[float, float, float]:
    r, g, b = rgb.tolist()
    return r, g, b
