"""The demo world's detectors against rendered truth, codec-like damage, and videos that must fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from packforcing_cli.training import demo_flow, recipes
from packforcing_cli.training.detectors import (
    NONE,
    background_correlation,
    background_drift,
    background_picture,
    count_subjects,
    detect,
    detect_visitor,
    score,
)
from packforcing_cli.training.world import (
    COMBINATIONS,
    Combination,
    Scene,
    first_frame,
    render,
    render_background,
    sample_story,
    scene_for,
)

FIVE_SECONDS = 77
WORDS = ("background", "colour", "shape", "direction", "present", "all")


def as_a_codec_leaves_it(frames: Tensor, *, seed: int) -> Tensor:
    """A 3x3 blur and noise of sigma 6 levels on uint8 [T, H, W, 3]."""
    kernel = torch.tensor([0.25, 0.5, 0.25])
    pixels = F.pad(frames.permute(0, 3, 1, 2).float(), (1, 1, 1, 1), mode="replicate")
    blurred = F.conv2d(pixels.flatten(0, 1)[:, None], (kernel[:, None] * kernel)[None, None])[:, 0]
    noisy = blurred + 6 * torch.randn(blurred.shape, generator=torch.Generator().manual_seed(seed))
    return noisy.clamp(0, 255).to(torch.uint8).view(len(frames), 3, *noisy.shape[1:]).permute(0, 2, 3, 1)


def accuracy(num_scenes: int, *, damaged: bool) -> dict[str, float]:
    right = dict.fromkeys(WORDS, 0)
    for seed in range(num_scenes):
        # All combinations before any comes twice: the stride shares no factor with their number.
        words = COMBINATIONS[(seed * 61) % len(COMBINATIONS)]
        scene = scene_for(seed, combination=words)
        frames = render(scene, 13 * seed, FIVE_SECONDS)
        if damaged:
            frames = as_a_codec_leaves_it(frames, seed=seed)
        for word, is_right in score(detect(frames), scene).items():
            right[word] += is_right
    return {word: count / num_scenes for word, count in right.items()}


def moving(shape: str = "square", direction: str = "right", **changes: object) -> Scene:
    scene = scene_for(4, combination=Combination(shape, "yellow", "blue", direction))
    return Scene(**{**vars(scene), **changes})


def test_words_of_rendered_scenes_are_read_at_99_percent() -> None:
    assert min(accuracy(48, damaged=False).values()) >= 0.99


def test_words_survive_blur_and_noise_at_98_percent() -> None:
    assert min(accuracy(24, damaged=True).values()) >= 0.98


@pytest.mark.slow
@pytest.mark.parametrize(("damaged", "share"), [(False, 0.99), (True, 0.98)])
def test_words_of_400_scenes(damaged: bool, share: float) -> None:
    figures = accuracy(400, damaged=damaged)
    print(f"damaged={damaged}: {figures}")
    assert min(figures.values()) >= share


def test_frames_and_captions_score_alike() -> None:
    scene = moving()
    detection = detect(render(scene, 0, FIVE_SECONDS))
    assert score(detection, scene) == score(detection, scene.caption) == score(detection, scene.combination)
    assert all(score(detection, scene).values())
    wrong = score(detection, "a yellow circle moving right on a green background")
    assert wrong == {
        "background": False,
        "colour": True,
        "shape": False,
        "direction": True,
        "present": True,
        "all": False,
    }


def test_area_speed_and_outline_are_measured() -> None:
    scene = moving("triangle", "up")
    detection = detect(render(scene, 0, FIVE_SECONDS))
    assert detection.area == pytest.approx(1.28 * 2 * 1.18 * scene.radius**2, rel=0.03)
    assert detection.speed == pytest.approx(scene.speed, rel=0.02)
    assert detection.outline > 0.97 and detection.presence == 1.0
    assert detection.subject_rgb == pytest.approx(scene.subject_rgb, abs=1)


def test_a_frozen_video_has_no_direction_and_keeps_the_rest() -> None:
    scene = moving()
    frozen = render(scene, 0, 1).repeat(FIVE_SECONDS, 1, 1, 1)
    result = score(detect(frozen), scene)
    assert (background_picture(frozen) - render_background(scene)).abs().mean() < 1
    assert [word for word, right in result.items() if not right] == ["direction", "all"]


def test_a_reversed_video_moves_the_other_way() -> None:
    scene = moving(direction="down")
    assert detect(render(scene, 0, FIVE_SECONDS).flip(0)).direction == "up"


def test_a_hue_shift_changes_the_colours_and_nothing_else() -> None:
    scene = moving()
    result = score(detect(render(scene, 0, FIVE_SECONDS).roll(1, -1)), scene)
    assert [word for word, right in result.items() if not right] == ["background", "colour", "all"]


def test_a_subject_that_lost_its_corners_is_no_square_and_a_ragged_one_has_a_worse_outline() -> None:
    square = moving("square", radius=16.0)
    assert detect(render(moving("circle", radius=16.0), 0, FIVE_SECONDS)).shape == "circle"
    clean = render(square, 0, FIVE_SECONDS)
    holes = torch.rand(64, 128, generator=torch.Generator().manual_seed(0)) < 0.3
    background = render_background(square).round().to(torch.uint8)
    ragged = torch.where(holes[None, :, :, None], background, clean)
    assert detect(ragged).outline < detect(clean).outline - 0.15


def test_an_empty_background_has_no_subject() -> None:
    picture = render_background(moving()).round().to(torch.uint8)
    detection = detect(as_a_codec_leaves_it(picture.repeat(FIVE_SECONDS, 1, 1, 1), seed=0))
    assert not detection.present
    assert (detection.colour, detection.shape, detection.direction) == (NONE, NONE, NONE)
    assert detection.background == "blue"


def test_noise_alone_shows_nothing_right() -> None:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (FIVE_SECONDS, 64, 128, 3), generator=generator, dtype=torch.uint8)
    detection = detect(frames)
    assert not detection.present or detection.outline < 0.5


def test_background_picture_is_the_background_even_where_the_subject_often_is() -> None:
    scene = moving("triangle", "up", radius=18.0, speed=1.0)  # covers its middle column for 60 % of the time
    picture = background_picture(render(scene, 0, FIVE_SECONDS))
    assert (picture - render_background(scene)).abs().max() < 4


def test_background_correlation_and_drift_tell_a_kept_scene_from_a_lost_one() -> None:
    scene = moving()
    first = background_picture(render(scene, 0, FIVE_SECONDS))
    kept = background_picture(as_a_codec_leaves_it(render(scene, 400, FIVE_SECONDS), seed=1))
    assert background_correlation(first, kept) > 0.95
    assert background_drift(first, kept) < 1.5
    other_bar = moving(bar_x=(scene.bar_x + 40) % 120, gradient_angle=scene.gradient_angle + 2)
    lost = background_picture(render(other_bar, 0, FIVE_SECONDS))
    assert background_correlation(first, lost) < 0.5
    brighter = background_picture((render(scene, 0, FIVE_SECONDS).int() + 12).clamp(max=255).to(torch.uint8))
    assert background_correlation(first, brighter) > 0.98
    assert 10 < background_drift(first, brighter) <= 12.5
    assert background_correlation(first, torch.full_like(first, 7.0)) == 0.0


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(1, 8, 8, 3, dtype=torch.uint8),
        torch.zeros(4, 8, 8, 3),
        torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
    ],
)
def test_frames_of_another_form_are_refused(frames: Tensor) -> None:
    with pytest.raises(ValueError, match="uint8"):
        detect(frames)


# -- visitors ---------------------------------------------------------------------------------------------------

BLOCKS = 6


def visited(seed: int, here: tuple[bool, ...] | None = None) -> Scene:
    """A scene with a visitor; every combination before any comes twice."""
    words = COMBINATIONS[(seed * 61) % len(COMBINATIONS)]
    generator = torch.Generator().manual_seed(seed)
    scene = sample_story(generator, num_blocks=BLOCKS, visitor=True, switch=False, combination=words)
    assert scene.visitor is not None
    return replace(scene, visitor=replace(scene.visitor, here=here)) if here else scene


def through_the_packaged_codec(frames: Tensor, *, seed: int) -> Tensor:
    """Encode and decode uint8 [T, H, W, 3] block by block, as a rollout does."""
    recipe = recipes.load("demo-flow", ["vae=package"])
    assert isinstance(recipe, recipes.DemoFlow)
    codec = demo_flow.load_codec(recipe)
    with torch.no_grad():
        latents, _ = demo_flow.encode_scene(codec, frames.permute(3, 0, 1, 2)[None].float() / 255)
        decoder = codec.decoder()
        pixels = torch.cat([decoder.decode(latents[:, n])[0] for n in range(latents.shape[1])], 1)
    return (pixels.permute(1, 2, 3, 0).clamp(0, 1) * 255).round().to(torch.uint8)


def visitor_accuracy(
    seeds: range, damage: Callable[..., Tensor] | None = None, *, blocks: tuple[int, ...] = (0, 3, 5)
) -> dict[str, float]:
    """Shares of right answers about blocks and whole clips of scenes with a visitor."""
    right: dict[str, list[bool]] = {}
    for seed in seeds:
        scene = visited(seed, here=tuple((seed + n) % 2 == 0 for n in range(BLOCKS)))
        assert scene.visitor is not None
        frames = render(scene, 0, first_frame(BLOCKS))
        if damage is not None:
            frames = damage(frames, seed=seed)
        for block in blocks:
            clip = frames[first_frame(block) : first_frame(block + 1)]
            seen, here = detect_visitor(clip), scene.visitor.is_here(block)
            right.setdefault("visitor present", []).append(seen.present == here)
            if here:
                right.setdefault("visitor colour", []).append(seen.colour == scene.visitor.colour)
                right.setdefault("visitor shape", []).append(seen.shape == scene.visitor.shape)
            right.setdefault("count", []).append(count_subjects(clip) == 1)
        for word, is_right in score(detect(frames), scene).items():
            right.setdefault(word, []).append(is_right)
    return {word: sum(answers) / len(answers) for word, answers in right.items()}


def test_visitors_and_the_words_beside_them_are_read_at_99_percent() -> None:
    figures = visitor_accuracy(range(16))
    assert len(figures) == 10 and min(figures.values()) >= 0.99, figures


@pytest.mark.parametrize("damage", [as_a_codec_leaves_it, through_the_packaged_codec])
def test_visitors_survive_blur_noise_and_the_packaged_codec(damage: Callable[..., Tensor]) -> None:
    figures = visitor_accuracy(range(50, 56), damage, blocks=(2, 5))
    assert min(figures.values()) >= 0.98, figures


@pytest.mark.slow
@pytest.mark.parametrize("damage", [None, as_a_codec_leaves_it, through_the_packaged_codec])
def test_visitors_of_150_scenes(damage: Callable[..., Tensor] | None) -> None:
    figures = visitor_accuracy(range(100, 250), damage)
    print(damage, figures)
    assert min(figures.values()) >= 0.99


def test_a_scene_without_a_visitor_has_none() -> None:
    for seed in range(8):
        scene = scene_for(seed, combination=COMBINATIONS[(seed * 67) % len(COMBINATIONS)])
        frames = as_a_codec_leaves_it(render(scene, 40, 32), seed=seed)
        assert not detect_visitor(frames).present
        assert count_subjects(frames) == 1


def test_place_and_area_of_a_visitor_are_measured() -> None:
    scene = visited(3, here=(True,))
    assert scene.visitor is not None
    seen = detect_visitor(render(scene, 0, 32))
    assert (seen.x, seen.y) == pytest.approx((scene.visitor.x, scene.visitor.y), abs=0.5)
    assert seen.area == pytest.approx(180, rel=0.2) and seen.presence == 1.0


def test_subjects_are_counted_across_the_edges_and_a_visitor_is_none_of_them() -> None:
    empty = render_background(moving()).round().to(torch.uint8).repeat(16, 1, 1, 1)
    assert count_subjects(empty) == 0
    assert count_subjects(render(moving(x=0.0, speed=0.01), 0, 16)) == 1
    one, other = (render(moving("circle", x=x, y=30.0, radius=14.0), 0, 16) for x in (30.0, 90.0))
    both = torch.where((other != empty).any(-1, keepdim=True), other, one)
    assert count_subjects(both) == 2
    visitor = visited(0, here=(True,))
    assert count_subjects(render(visitor, 0, 16)) == 1


def test_a_moving_object_of_a_third_colour_is_no_visitor() -> None:
    """A subject that changes its colour half way must not vanish from the picture."""
    scene = moving("circle")
    frames = render(scene, 0, FIVE_SECONDS)
    late = render(replace(scene, subject_rgb=(210.0, 40.0, 40.0)), 0, FIVE_SECONDS)
    frames[40:] = late[40:]
    assert not detect_visitor(frames).present
    assert detect(frames).present
