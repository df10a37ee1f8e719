"""Measures of videos against rendered truth of the demo world, and against damage of one kind at a time."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from packforcing_cli import metrics
from packforcing_cli.errors import UsageError
from packforcing_cli.metrics import Measurement
from packforcing_cli.source import lab
from packforcing_cli.training.world import FPS, WIDTH, Combination, Scene, render, scene_for
from packforcing_cli.video import VideoWriter

Frames = NDArray[np.uint8]
SECONDS = 12


def scene(**changes: object) -> Scene:
    base = scene_for(4, combination=Combination("square", "purple", "gray", "right"))
    return dataclasses.replace(base, speed=1.5, **changes)  # type: ignore[arg-type]


def rendered(of: Scene, seconds: float = SECONDS, start: int = 0) -> Frames:
    frames: Frames = render(of, start, round(seconds * FPS)).numpy()
    return frames


def wandering(seconds: float = SECONDS) -> Frames:
    """The demo world with a subject that never takes the same way twice."""
    rng = np.random.default_rng(5)
    angle, x, y, frames = 0.3, 64.0, 32.0, []
    for _ in range(round(seconds * FPS)):
        angle += rng.normal(0, 0.12)
        x, y = x + 1.5 * math.cos(angle), y + 1.5 * math.sin(angle)
        frames.append(render(scene(x=x % WIDTH, y=y % 64), 0, 1).numpy()[0])
    return np.stack(frames)


def write(path: Path, frames: Frames) -> Path:
    with VideoWriter(path, fps=FPS, width=frames.shape[2], height=frames.shape[1], crf=10) as writer:
        for start in range(0, len(frames), FPS):
            writer.write(frames[start : start + FPS])
    return path


# ------------------------------------------------------------------------------------------ damage, of one kind each


def growing(frames: Frames) -> NDArray[np.float32]:
    """0 in the first three seconds, then rising to 1. [T, 1, 1, 1]"""
    time = np.arange(len(frames), dtype=np.float32) / FPS
    return np.clip((time - 3) / (SECONDS - 4), 0, 1)[:, None, None, None]


def as_pixels(values: NDArray[np.floating]) -> Frames:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def hue(frames: Frames) -> Frames:
    """Turns the colours in the plane of constant luma (I and Q of YIQ), up to 40 degrees."""
    to_yiq = np.array([[0.2126, 0.7152, 0.0722], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    yiq = frames.astype(np.float64) @ to_yiq.T
    angle = np.deg2rad(40) * growing(frames)[..., 0]
    i, q = yiq[..., 1], yiq[..., 2]
    turned = np.stack(
        [yiq[..., 0], i * np.cos(angle) - q * np.sin(angle), i * np.sin(angle) + q * np.cos(angle)], -1
    )
    return as_pixels(turned @ np.linalg.inv(to_yiq).T)


def freeze(frames: Frames) -> Frames:
    frozen = frames.copy()
    frozen[6 * FPS :] = frozen[6 * FPS]
    return frozen


def loop(frames: Frames) -> Frames:
    """Two seconds forwards, then backwards, again and again: no jump where they meet."""
    there = np.arange(2 * FPS)
    turn = np.concatenate([there, there[::-1]])
    return frames[turn[np.arange(len(frames)) % len(turn)]]


def grain(frames: Frames) -> Frames:
    return as_pixels(frames + np.random.default_rng(0).normal(0, 8, frames.shape))


def reset(frames: Frames) -> Frames:
    """At 0:10 the subject is elsewhere."""
    damaged = frames.copy()
    damaged[10 * FPS :] = np.roll(frames[10 * FPS :], 64, axis=2)
    return damaged


def blur(frames: Frames) -> Frames:
    wide = frames.astype(np.float32)
    for axis in (1, 2):
        wide = sum(np.roll(wide, n, axis) for n in range(-3, 4)) / 7  # type: ignore[assignment]
    share = growing(frames)
    return as_pixels(frames * (1 - share) + wide * share)


def fade(frames: Frames) -> Frames:
    """Towards a gray of the same lightness: contrast and colour go, brightness stays."""
    mean = frames[:1].astype(np.float32) @ np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)
    share = 0.7 * growing(frames)
    return as_pixels(frames * (1 - share) + mean.mean() * share)


def flickering(frames: Frames) -> Frames:
    signs = np.where(np.arange(len(frames)) % 2, 3, -3)[:, None, None, None]
    return as_pixels(frames.astype(np.int16) + signs)


def darkening(frames: Frames) -> Frames:
    return as_pixels(frames.astype(np.float32) - 40 * growing(frames))


DAMAGES: dict[str, Callable[[Frames], Frames]] = {
    "none": lambda frames: frames,
    "hue": hue,
    "freeze": freeze,
    "loop": loop,
    "grain": grain,
    "reset": reset,
    "blur": blur,
    "fade": fade,
    "flicker": flickering,
    "darkening": darkening,
}


def figures(measured: Measurement) -> dict[str, float]:
    """How far a video is from a good one, in each respect: relative to its first three seconds where it drifts."""

    def end_to_start(name: str) -> float:
        curve = measured.curves[name]
        return curve.between(measured.seconds - 4, math.inf) / curve.between(0, 3)

    return {
        "motion lost": 1 - end_to_start("motion"),
        "time still": 100 - measured.dynamic_degree,
        "flicker": measured.mean("flicker"),
        "noise": measured.mean("noise"),
        "sharpness lost": 1 - end_to_start("sharpness"),
        "contrast lost": 1 - end_to_start("contrast"),
        "saturation lost": 1 - end_to_start("saturation"),
        "brightness lost": 1 - end_to_start("brightness"),
        "colour drift": measured.curves["colour drift"].between(measured.seconds - 4, math.inf),
        "repetition": measured.repetition.strength if measured.repetition else 0.0,
        "jumps": float(len(measured.jumps)),
    }


# figure -> (quiet while its size is at most this, reacts from this on). Measured: an undamaged video and other damage
# stay within about half of the first; the damage itself is over the second by a third, or at what is possible.
LIMITS = {
    "motion lost": (0.25, 0.8),
    "time still": (10, 45),
    "flicker": (0.5, 3),
    "noise": (1, 4),
    "sharpness lost": (0.1, 0.33),
    "contrast lost": (0.2, 0.33),
    "saturation lost": (0.2, 0.4),
    "brightness lost": (0.05, 0.2),
    "colour drift": (3, 5),
    "repetition": (0.6, 0.9),
    "jumps": (0, 1),
}
REACTS = {
    "none": set(),
    "hue": {"colour drift"},
    "freeze": {"motion lost", "time still"},
    "loop": {"repetition"},
    "grain": {"noise"},
    "reset": {"jumps"},
    "blur": {"sharpness lost"},
    "fade": {"contrast lost", "saturation lost", "colour drift"},
    "flicker": {"flicker"},
    "darkening": {"brightness lost", "colour drift"},
}


@pytest.fixture(scope="module")
def truth() -> Frames:
    return wandering()


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_measure_reacts_to_its_damage_and_the_others_stay_quiet(
    damage: str, truth: Frames, tmp_path: Path
) -> None:
    measured = metrics.measure(write(tmp_path / "v.mp4", DAMAGES[damage](truth)))
    found = figures(measured)
    wrong = {}
    for name, (quiet, loud) in LIMITS.items():
        if name in REACTS[damage]:
            if not found[name] >= loud:
                wrong[name] = f"{found[name]:.2f} < {loud}"
        elif not abs(found[name]) <= quiet:
            wrong[name] = f"{found[name]:.2f} > {quiet}"
    assert not wrong


# ------------------------------------------------------------------------------------------- figures against truth


@pytest.mark.parametrize("direction", ["left", "down"])
def test_motion_is_the_speed_of_the_subject_and_repetition_its_way_round(
    direction: str, tmp_path: Path
) -> None:
    words = Combination("circle", "white", "blue", direction)
    moving = dataclasses.replace(scene_for(7, combination=words), speed=1.5)
    measured = metrics.measure(write(tmp_path / "v.mp4", rendered(moving)))
    assert measured.mean("motion") == pytest.approx(100 * 1.5 * FPS / 64, rel=0.15)
    assert measured.dynamic_degree == 100
    around = (WIDTH if direction == "left" else 64) / 1.5 / FPS
    assert measured.repetition is not None and measured.repetition.is_loop
    assert measured.repetition.period == pytest.approx(around, abs=0.07)
    assert not measured.jumps


def test_a_jump_is_told_at_its_frame(truth: Frames) -> None:
    small = reset(truth)
    changes = np.abs(np.diff(small.astype(np.int16), axis=0)).mean((1, 2, 3))
    times = np.arange(1, len(small)) / FPS
    (jump,) = metrics.jumps(times, changes)
    assert jump.seconds == 10.0
    assert jump.levels == pytest.approx(changes[10 * FPS - 1])
    twice = np.concatenate([truth[:100], truth[:1] * 0, truth[101:]])  # there and back within a frame is one
    changes = np.abs(np.diff(twice.astype(np.int16), axis=0)).mean((1, 2, 3))
    assert len(metrics.jumps(times, changes)) == 1


def test_steady_changes_doubled_frames_and_stillness_are_no_jumps() -> None:
    times = np.arange(200) / 16
    rng = np.random.default_rng(0)
    assert metrics.jumps(times, 3 + rng.normal(0, 0.5, 200)) == ()
    for held in (2, 3, 5):  # frames shown more than once
        assert metrics.jumps(times, np.where(np.arange(200) % held, 0.0, 4.0)) == ()
    assert metrics.jumps(times, np.where(np.arange(200) % 50 == 0, 1.0, 0.0)) == ()


def test_the_rhythm_of_a_codec_makes_no_jumps_and_hides_no_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loud beats of a decoded clip of the demo, four frames apart; then a reset on each frame of the bar."""
    loud = [3.5, 4.6, 4.3, 5.3, 9.1, 5.7, 3.0, 2.7, 2.5]
    changes = np.array([value for beat in loud for value in (beat, 0.8, 1.4, 0.8)])
    times = np.arange(len(changes)) / 16
    with monkeypatch.context() as without_beats:
        without_beats.setattr(metrics, "JUMP_PERIODS", ())
        assert times[16] in [jump.seconds for jump in metrics.jumps(times, changes)]
    assert metrics.jumps(times, changes) == ()
    for at in (16, 17, 18, 19):
        changed = changes.copy()
        changed[at] = 30.0
        (jump,) = metrics.jumps(times, changed)
        assert jump.seconds == times[at]


def test_displacements_find_a_shift_of_everything_and_none_in_noise() -> None:
    rng = np.random.default_rng(1)
    texture = rng.integers(0, 256, (90, 90, 3), dtype=np.uint8)
    before, after = texture[12:76, 12:76], texture[12 - 3 : 76 - 3, 12 + 5 : 76 + 5]
    x, y = metrics.displacements(before, after)
    inside = np.s_[1:-1, 1:-1]  # what comes in at the edge was not there before
    assert (x[inside] == -5).all() and (y[inside] == 3).all()
    flat = np.full((64, 64, 3), 120)
    grainy = [as_pixels(flat + rng.normal(0, 12, flat.shape)) for _ in range(2)]
    x, y = metrics.displacements(*grainy)
    assert not x.any() and not y.any()
    assert metrics.displacements(before[:5], after[:5])[0].size == 0


def test_flicker_leaves_trends_out_and_noise_is_the_standard_deviation() -> None:
    assert metrics.flicker(np.arange(50.0)).max() < 1e-9
    assert metrics.flicker(np.tile([10.0, 14.0], 20)) == pytest.approx(np.full(38, 4.0))
    rng = np.random.default_rng(2)
    gray = 120 + rng.normal(0, 7, (3, 80, 120, 1)) * np.ones(3)
    assert metrics.noise(*(as_pixels(frame) for frame in gray)) == pytest.approx(7, rel=0.05)
    brighter = np.array([0, 9, 0]).reshape(3, 1, 1, 1) + gray
    assert metrics.noise(*(as_pixels(frame) for frame in brighter)) == pytest.approx(7, rel=0.05)


def test_sharpness_is_the_inverse_width_of_edges_whatever_their_contrast() -> None:
    def edges(width: int, contrast: float) -> float:
        ramp = np.clip((np.arange(30) - 12) / width, 0, 1)
        row = 60 + contrast * np.tile(np.concatenate([ramp, ramp[::-1]]), 3)
        return metrics.sharpness(as_pixels(np.tile(row[None, :, None], (48, 1, 3))))

    # A window of Sobel's operator is three pixels wide: a step and an edge of two pixels look alike.
    assert edges(2, 150) == pytest.approx(1, abs=0.03)
    assert edges(8, 150) == pytest.approx(2 / 8, rel=0.1)
    assert edges(8, 60) == pytest.approx(edges(8, 150), rel=0.1)
    assert math.isnan(edges(4, 5))
    assert math.isnan(metrics.sharpness(np.zeros((2, 9, 3), dtype=np.uint8)))


def test_colour_measures_are_those_of_known_colours() -> None:
    def colours(*rgb: tuple[int, int, int]) -> NDArray[np.float64]:
        return lab(np.array(rgb, dtype=np.float64))

    assert metrics.brightness(colours((255, 255, 255), (0, 0, 0))) == pytest.approx(50, abs=0.01)
    assert metrics.contrast(colours((255, 255, 255), (0, 0, 0))) == pytest.approx(50, abs=0.01)
    assert metrics.saturation(colours((0, 0, 255))) == pytest.approx(133.8, abs=0.1)
    assert metrics.saturation(colours((90, 90, 90))) == pytest.approx(0, abs=0.02)
    red, darker = colours((210, 40, 40)), colours((180, 40, 40))
    apart = float(np.linalg.norm(red - darker))
    drift = metrics.colour_drift(metrics.palette_of(np.tile(red, (9, 1))), metrics.palette_of(darker))
    assert drift == pytest.approx(apart)
    mixed = colours((210, 40, 40), (40, 200, 40), (40, 40, 220), (128, 128, 128))
    assert metrics.colour_drift(metrics.palette_of(mixed), metrics.palette_of(mixed[::-1])) == 0


def test_differences_over_distance_are_those_of_all_pairs() -> None:
    rng = np.random.default_rng(3)
    values, palettes = rng.normal(size=40), rng.normal(size=(40, 3, 8))
    thumbs = rng.integers(0, 256, (40, 70)).astype(np.uint8)
    lags = [0.5, 3.0, 19.5, 30.0]
    for found, apart in (
        (metrics.over_distance(values, 0.5, lags), lambda a, b: abs(values[a] - values[b])),
        (
            metrics.over_distance(palettes, 0.5, lags),
            lambda a, b: np.sqrt(((palettes[a] - palettes[b]) ** 2).sum(0)).mean(),
        ),
    ):
        for lag, value in zip(lags[:3], found[:3], strict=True):
            n = round(2 * lag)
            assert value == pytest.approx(np.mean([apart(t, t + n) for t in range(40 - n)]))
        assert math.isnan(found[3])
    squared = metrics._squared_distances(thumbs)
    wide = thumbs.astype(np.float64)
    for n in (0, 1, 7, 39):
        assert squared[n] == pytest.approx(((wide[n:] - wide[: 40 - n]) ** 2).mean(), abs=1e-6)


def test_drift_grows_with_the_distance_and_a_good_video_does_not(truth: Frames, tmp_path: Path) -> None:
    good = metrics.measure(write(tmp_path / "good.mp4", truth))
    bad = metrics.measure(write(tmp_path / "bad.mp4", darkening(truth)))
    assert bad.lags == (0.5, 1, 2, 5, 10, 11)
    near, far = bad.distances["brightness"][0], bad.distances["brightness"][-1]
    assert far > 8 * near
    assert good.distances["brightness"][-1] < 0.5
    assert bad.distances["colour"][-1] > 10 > 3 > good.distances["colour"][-1]
    assert any("colours drift" in said for said in bad.findings())
    assert good.findings() == []
    for speed, said in ((0.0, "it stands still"), (10.0, "it moves little")):
        times = good.curves["motion"].times
        curves = {**good.curves, "motion": metrics.Curve(times, np.full(len(times), speed))}
        assert dataclasses.replace(good, curves=curves, dynamic_degree=0.0).findings() == [said]


def test_a_video_that_loops_in_one_part_only_is_told_with_the_part(truth: Frames) -> None:
    thumbs = np.stack([metrics.shrunk(frame, long=32) for frame in truth[::2]]).reshape(len(truth) // 2, -1)
    rng = np.random.default_rng(0)
    looping = np.tile(thumbs[:24], (10, 1))  # 3 s, ten times
    other = [np.clip(thumbs + rng.integers(-60, 60, thumbs.shape[1]), 0, 255) for _ in range(4)]
    found = metrics.strongest_repetition(np.concatenate([*other, looping]), 8.0, 78.0)
    assert found is not None and found.is_loop
    assert found.period == pytest.approx(3.0)
    assert 48 <= found.start < found.end <= 78
    assert metrics.repetition(np.tile(thumbs[:1], (200, 1)), 8.0) is None
    assert metrics.repetition(thumbs[:24], 8.0) is None


def test_dynamic_degree_is_the_share_of_windows_that_move() -> None:
    times = np.arange(1, 81) / 8
    speeds = np.where(times <= 4, 40.0, 2.0)
    assert metrics.dynamic_degree(times, speeds) == pytest.approx(40)
    rare = np.where(np.arange(80) % 16 < 3, 40.0, 0.0)
    assert metrics.dynamic_degree(times, rare) == 0
    assert math.isnan(metrics.dynamic_degree(times[:0], speeds[:0]))


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (3, [(0, 3)]),
        (14.9, [(0, 14.9)]),
        (15, [(0, 10), (10, 15)]),
        (59.8, [(0, 10), (10, 20), (20, 30), (30, 40), (40, 50), (50, 59.8)]),
        (62, [(0, 10), (10, 20), (20, 30), (30, 40), (40, 50), (50, 62)]),
    ],
)
def test_segments_are_of_ten_seconds_and_cover_everything(
    length: float, expected: list[tuple[float, float]]
) -> None:
    assert list(metrics.segments(length)) == expected


def test_frames_are_sampled_in_the_middle_of_intervals(truth: Frames, tmp_path: Path) -> None:
    path = write(tmp_path / "v.mp4", truth[: 3 * FPS])
    assert [time for time, _ in metrics.sampled(path, 1.0)] == [0.5, 1.5, 2.5]
    short = write(tmp_path / "short.mp4", truth[:4])
    assert [time for time, _ in metrics.sampled(short, 1.0)] == [0.0]


def test_a_seam_is_measured_where_it_is_said_to_be(truth: Frames, tmp_path: Path) -> None:
    joined = np.concatenate([truth[: 3 * FPS], as_pixels(truth[3 * FPS : 6 * FPS] * 0.8)])
    path = write(tmp_path / "v.mp4", joined)
    seconds, seam = metrics.measure(path, seam_at=3.0).seam or (0, None)
    assert seconds == 3.0 and seam is not None
    assert seam.delta_e > 6 and seam.jump > 5 * seam.own_motion
    _, elsewhere = metrics.measure(path, seam_at=4.0).seam or (0, None)
    assert elsewhere is not None and elsewhere.delta_e < 1
    with pytest.raises(UsageError, match="not within"):
        metrics.measure(path, seam_at=6.0)


@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_the_shortest_videos_are_measured_as_far_as_they_go(
    count: int, truth: Frames, tmp_path: Path
) -> None:
    measured = metrics.measure(write(tmp_path / "v.mp4", truth[:count]))
    assert measured.frames == count
    assert math.isfinite(measured.mean("brightness")) and measured.mean("colour drift") < 1
    assert math.isnan(measured.mean("motion")) == (count < 3)
    assert measured.repetition is None and measured.jumps == ()
    values = measured.values()
    assert values["mean"]["flicker"] is None if count < 3 else values["mean"]["flicker"] < 1
    assert bool(measured.notes) == (count < 3)
    json.dumps(values, allow_nan=False)


def test_a_cut_file_is_measured_up_to_the_damage(truth: Frames, tmp_path: Path) -> None:
    whole = write(tmp_path / "v.mp4", grain(truth[: 4 * FPS]))
    data = bytearray(whole.read_bytes())
    middle = len(data) * 6 // 10
    data[middle : middle + 20_000] = bytes(20_000)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(bytes(data))
    measured = metrics.measure(broken)
    assert 10 < measured.frames <= 4 * FPS
    assert math.isfinite(measured.mean("brightness"))


def test_long_videos_are_sampled_more_thinly_and_curves_have_a_bounded_number_of_points() -> None:
    day = metrics._Collected(24 * 3600, None)
    assert 24 * 3600 / day.thumb_step <= metrics.MAX_THUMBS
    assert 24 * 3600 / day.state_step <= metrics.MAX_STATES
    curve = metrics.Curve(np.arange(5000.0), np.where(np.arange(5000) % 2, 3.0, np.nan))
    thin = curve.thinned()
    assert len(thin.times) <= metrics.MAX_POINTS
    assert thin.values == pytest.approx(np.full(len(thin.values), 3.0))
    assert thin.times[0] < 10 and thin.times[-1] > 4985


@pytest.mark.parametrize("name", metrics.MEASURES)
def test_every_measure_is_defined_with_formula_unit_and_source(name: str) -> None:
    text = metrics.definition(metrics.MEASURES[name])
    for part in ("Formula: ", "Unit: ", "Range: ", "Read it as: ", "Source: "):
        assert part in text, part
