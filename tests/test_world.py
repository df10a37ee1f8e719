"""The demo world: captions, held-out combinations, frames that depend on scene and number alone."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from packforcing_cli.layout import Grid
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


# -- stories ----------------------------------------------------------------------------------------------------


def story(
    seed: int, *, num_blocks: int = 12, visitor: bool = True, switch: bool = False, **more: object
) -> Scene:
    generator = torch.Generator().manual_seed(seed)
    return world.sample_story(generator, num_blocks=num_blocks, visitor=visitor, switch=switch, **more)  # type: ignore[arg-type]


def test_captions_name_a_visitors_presence_and_nothing_else_of_it() -> None:
    words = Combination("circle", "red", "blue", "right")
    assert world.caption_of(words) == words.caption
    for visitor, says in ((True, "here"), (False, "away")):
        caption = world.caption_of(words, visitor)
        assert caption == f"{words.caption}, the visitor is {says}"
        assert world.parse_caption(caption) == words and world.parse_visitor(caption) is visitor
    assert world.parse_visitor(words.caption) is None
    with pytest.raises(ValueError, match="demo world"):
        world.parse_visitor(f"{words.caption}, the visitor is blue")
    training = set(world.training_captions())
    assert {caption.split(",")[0] for caption in world.story_captions()} == training
    assert len(set(world.story_captions())) == 3 * len(training)


def test_every_block_of_a_story_has_its_own_caption() -> None:
    scene = story(6, switch=True)
    assert scene.visitor is not None and scene.switch is not None
    captions = scene.block_captions(12)
    assert scene.caption == captions[0]
    for block, caption in enumerate(captions):
        words = scene.switch.combination if block >= scene.switch.block else scene.combination
        assert caption == world.caption_of(words, scene.visitor.here[block])
    assert len(set(captions)) >= 3
    assert scene.block_captions(40)[12:] == (captions[-1],) * 28
    assert set(captions) <= set(world.story_captions())
    held_out = story(6, switch=True, held_out=True).block_captions(12)
    assert {caption.split(",")[0] for caption in held_out} <= set(world.held_out_captions())


def test_blocks_have_the_frames_the_layout_gives_them() -> None:
    grid = Grid(frames_per_block=4, rows=4, cols=8, layers=1, kv_dim=6, heads=1)
    for block in range(5):
        assert world.first_frame(block) == (grid.frames_for(block) if block else 0)
        frames = range(world.first_frame(block), world.first_frame(block + 1))
        assert {world.block_of(frame) for frame in frames} == {block}


def test_a_visitor_is_seen_when_it_is_here_and_only_where_it_stands() -> None:
    for seed in range(12):
        scene = story(seed)
        assert scene.visitor is not None
        alone = replace(scene, visitor=None)
        box = world.visitor_coverage(scene.visitor) > 0
        width, height = world.VISITOR_SIZES[scene.visitor.shape]
        assert float(world.visitor_coverage(scene.visitor).sum()) == pytest.approx(width * height, rel=0.01)
        for block in range(0, 12, 3):
            start = world.first_frame(block) + 5
            frame, without = render(scene, start, 1)[0], render(alone, start, 1)[0]
            changed = (frame != without).any(-1)
            assert not (changed & ~box).any()
            assert bool(changed.any()) == scene.visitor.here[block]


def test_the_subject_keeps_out_of_its_visitors_place() -> None:
    for seed in range(12):
        scene = story(seed)
        assert scene.visitor is not None
        lap = render(replace(scene, visitor=None, gradient_strength=0.0, bar_brightness=0.0), 0, 128)
        inside = world.visitor_coverage(scene.visitor) == 1
        background = torch.tensor(scene.background_rgb).round()
        apart = (lap[:, inside].float() - background).abs().amax(-1) > 12
        assert float(apart.float().mean()) < 0.02


def test_a_visitor_has_a_third_colour_and_all_looks_occur() -> None:
    looks, first = set(), []
    for seed in range(300):
        scene = story(seed, switch=seed % 4 == 0)
        assert scene.visitor is not None
        words = [scene.combination, *([scene.switch.combination] if scene.switch else [])]
        assert scene.visitor.colour in world.visitor_colours(*words)
        assert not any(scene.visitor.colour in (w.colour, w.background) for w in words)
        looks.add((scene.visitor.shape, scene.visitor.colour))
        first.append(scene.visitor.here.index(True) if any(scene.visitor.here) else 12)
    assert len(looks) == len(world.VISITOR_SHAPES) * len(world.COLOURS)
    assert 0.6 < sum(n >= 2 for n in first) / 300 < 0.9  # behind the sinks in most


def test_quick_visitors_return_within_a_short_clip() -> None:
    def returns(here: tuple[bool, ...]) -> bool:
        first = here.index(True) if any(here) else len(here)
        return any(here[n] and not here[n - 1] for n in range(first + 1, len(here)))

    visitors = [story(seed, num_blocks=6, quick=True).visitor for seed in range(100)]
    assert sum(returns(visitor.here) for visitor in visitors if visitor is not None) > 60


def test_after_a_switch_the_scene_goes_on_under_other_words() -> None:
    for seed in range(20):
        scene = story(seed, visitor=False, switch=True)
        assert scene.switch is not None and scene.switch.combination != scene.combination
        at = world.first_frame(scene.switch.block)
        later = scene.switched()
        assert later.combination == scene.switch.combination
        assert torch.equal(render(scene, 0, at), render(replace(scene, switch=None), 0, at))
        assert torch.equal(render(scene, at, 3), render(later, at, 3))
        # The subject is where it was, up to a frame's step along the one axis or the other.
        before, after = (
            world.subject_centre(part, frame)
            for part, frame in ((replace(scene, switch=None), at), (later, at))
        )
        assert after == pytest.approx(before, abs=1e-6)
        assert (later.bar_x, later.gradient_angle, later.radius) == (
            scene.bar_x, scene.gradient_angle, scene.radius,
        )  # fmt: skip
        if later.background == scene.background:
            assert later.background_rgb == scene.background_rgb


def test_windows_of_a_story_agree_frame_by_frame() -> None:
    scene = story(5, switch=True)
    assert scene.switch is not None
    start = world.first_frame(scene.switch.block) - 20
    whole = render(scene, start, 60)
    parts = [render(scene, start, 19), render(scene, start + 19, 2), render(scene, start + 21, 39)]
    assert torch.equal(torch.cat(parts), whole)
