"""The demo world: captions, held-out combinations, frames that depend on scene and number alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from packforcing_cli.training import world
from packforcing_cli.training.world import Combination, Scene, render, render_batch, sample_scene, scene_for

DIMENSIONS = range(4)


def scene_of(shape: str, direction: str, *, seed: int = 0) -> Scene:
    return scene_for(seed, combination=Combination(shape, "red", "blue", direction))


def test_caption_follows_the_grammar_and_reads_back() -> None:
    words = Combination("circle", "red", "blue", "right")
    assert words.caption == "a red circle moving right on a blue background"
    for combination in world.COMBINATIONS:
        assert world.parse_caption(combination.caption) == combination


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red circle",
        "a red circle moving right on a red background",
        "a red dog moving right on a blue background",
    ],
)
def test_caption_of_another_world_is_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="demo world"):
        world.parse_caption(caption)


def test_at_least_54_captions_are_held_out_and_no_training_scene_has_one() -> None:
    training, held_out = set(world.training_captions()), set(world.held_out_captions())
    assert len(held_out) >= 54
    assert not training & held_out
    assert len(training | held_out) == len(world.COMBINATIONS) == 3 * 4 * (6 * 6 - 4)
    generator = torch.Generator().manual_seed(0)
    assert {sample_scene(generator).caption for _ in range(2000)} <= training
    assert {sample_scene(generator, held_out=True).caption for _ in range(500)} <= held_out
    either = {sample_scene(generator, held_out=None).caption for _ in range(500)}
    assert either & training and either & held_out


def test_every_word_and_every_pair_of_words_stays_in_training() -> None:
    training = [c for c in world.COMBINATIONS if c not in world.HELD_OUT]
    for i, j in itertools.combinations(DIMENSIONS, 2):
        assert {(c[i], c[j]) for c in training} == {(c[i], c[j]) for c in world.COMBINATIONS}
    for i in DIMENSIONS:
        assert {c[i] for c in world.HELD_OUT} == {c[i] for c in world.COMBINATIONS}


def test_a_seed_gives_one_scene_and_uncaptioned_details_differ_between_seeds() -> None:
    assert scene_for(7) == scene_for(7)
    words = Combination("square", "white", "gray", "up")
    one, two = scene_for(1, combination=words), scene_for(2, combination=words)
    assert one.caption == two.caption == words.caption
    for detail in [
        "radius",
        "speed",
        "x",
        "y",
        "subject_rgb",
        "background_rgb",
        "gradient_angle",
        "gradient_strength",
        "bar_x",
        "bar_width",
    ]:
        assert getattr(one, detail) != getattr(two, detail)


def test_one_caption_holds_for_every_block() -> None:
    scene = scene_for(3)
    assert scene.block_captions(3) == (scene.caption,) * 3


def test_windows_of_a_long_scene_agree_frame_by_frame() -> None:
    scene = scene_for(11)
    whole = render(scene, 5000, 40)
    assert whole.shape == (40, world.HEIGHT, world.WIDTH, 3) and whole.dtype == torch.uint8
    assert torch.equal(
        torch.cat([render(scene, 5000, 1), render(scene, 5001, 28), render(scene, 5029, 11)]), whole
    )
    other = scene_for(12)
    batch = render_batch([scene, other], [5003, 0], 5)
    assert torch.equal(batch[0], whole[3:8]) and torch.equal(batch[1], render(other, 0, 5))


@pytest.mark.parametrize("direction", world.DIRECTIONS)
def test_subject_moves_by_its_speed_and_wraps_around(direction: str) -> None:
    scene = scene_of("circle", direction)
    axis, size = (2, world.WIDTH) if direction in ("left", "right") else (1, world.HEIGHT)
    sign = 1 if direction in ("right", "down") else -1
    # Six whole pixels in four frames (1.5 px a frame), then one lap of the picture.
    steady = Scene(**{**vars(scene), "speed": 1.5, "gradient_strength": 0.0, "bar_brightness": 0.0})
    background = world.render_background(steady)
    start, moved = ((render(steady, frame, 1).float() - background).abs().sum(-1) > 128 for frame in (1, 5))
    assert 0.9 < start.sum() / (math.pi * scene.radius**2) < 1.1
    assert torch.equal(torch.roll(start, 6 * sign, axis), moved)
    lap = Scene(**{**vars(scene), "speed": size / 64})
    assert torch.equal(render(lap, 0, 2), render(lap, 64, 2))


@pytest.mark.parametrize("shape", world.SHAPES)
def test_shapes_have_their_exact_area_and_alike_ones(shape: str) -> None:
    offset = torch.arange(-32, 32) + 0.5
    drawn = float(world.coverage(shape, offset - 0.3, offset + 0.2, 16.0).sum())
    exact = {
        "circle": math.pi * 16**2,
        "square": (2 * 0.88 * 16) ** 2,
        "triangle": 1.28 * 2 * 1.18 * 16**2,
    }[shape]
    assert drawn == pytest.approx(exact, rel=5e-3)
    assert exact == pytest.approx(math.pi * 16**2, rel=0.05)


def test_shape_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="circle, square, triangle"):
        world.coverage("star", torch.zeros(4), torch.zeros(4), 1.0)


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("direction", world.DIRECTIONS)
def test_subject_is_cut_only_by_the_edges_it_moves_to(shape: str, direction: str) -> None:
    for seed in range(20):
        scene = scene_of(shape, direction, seed=seed)
        changed = (render(scene, 0, 1)[0].float() - world.render_background(scene)).abs().sum(-1) > 40
        border = changed[[0, -1]].any() if direction in ("left", "right") else changed[:, [0, -1]].any()
        assert not border


def test_background_has_gradient_and_a_bar_of_full_height() -> None:
    for seed in range(30):
        scene = scene_for(seed)
        picture = world.render_background(scene)
        plain = world.render_background(Scene(**{**vars(scene), "bar_brightness": 0.0}))
        light = (picture - plain).mean(-1)  # [H, W]; a channel at 0 or 255 cannot follow all the way
        assert torch.equal(light.abs() > 4, (light.abs() > 4)[:1].expand_as(light))
        assert 2 <= int((light[0].abs() > 4).sum()) <= 7
        assert light.abs().max() > 8
        assert plain.amax((0, 1)).sub(plain.amin((0, 1))).max() > 2 * 5 * 0.9


def test_empty_and_unequal_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="num_frames"):
        render(scene_for(0), 0, 0)
    with pytest.raises(ValueError):
        render_batch([scene_for(0)], [0, 1], 5)
