"""Folders of clips: what is found in them, and their encoded form."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import damage, write_clip

from packforcing_cli import packages, registry, timeline
from packforcing_cli.catalog import DEMO_FOLDER
from packforcing_cli.errors import DiskFullError, LockedError, UsageError, WeightsError
from packforcing_cli.registry import ModelSource
from packforcing_cli.source import Source
from packforcing_cli.training import clip_run, data, loop
from packforcing_cli.training.data import EncodedData, Wanted
from packforcing_cli.training.items import Shape

torch.set_num_threads(1)


def wanted(**changes: Any) -> Wanted:
    return Wanted.by(packages.read_manifest(DEMO_FOLDER), DEMO_FOLDER, **{"scene_seconds": 3.0, **changes})


@pytest.fixture(scope="module")
def demo() -> ModelSource:
    return registry.open_model("demo", device="cpu")


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Three good clips of three blocks."""
    for n in range(3):
        write_clip(tmp_path / "clips" / f"{n}.mp4", seed=n, caption=f"a square, number {n}")
    return tmp_path / "clips"


def states(folder: Path, **changes: Any) -> dict[str, str]:
    return {clip.name: clip.state for clip in data.check(folder, wanted(**changes)).clips}


# -- checking ---------------------------------------------------------------------------------------------------


def test_every_kind_of_bad_clip_is_found_and_says_why(clips: Path) -> None:
    damage(write_clip(clips / "a damaged.mp4", seed=5))
    (clips / "b no video.mov").write_bytes(b"this is no video" * 100)
    write_clip(clips / "c captionless.mp4", seed=6, caption=None)
    write_clip(clips / "d empty caption.mp4", seed=7, caption="  ")
    write_clip(clips / "e short.mp4", seed=8, frames=20)
    write_clip(clips / "f small.mp4", seed=9, size=(64, 32))
    (clips / "g copy.mp4").write_bytes((clips / "0.mp4").read_bytes())
    (clips / "g copy.txt").write_text("the same", "utf-8")
    write_clip(clips / "below" / "h.mp4", seed=10)
    (clips / "notes.pdf").write_bytes(b"%PDF")
    found = data.check(clips, wanted())
    assert {clip.name: clip.state for clip in found.clips} == {
        "0.mp4": "used",
        "1.mp4": "used",
        "2.mp4": "used",
        "a damaged.mp4": "unreadable",
        "b no video.mov": "unreadable",
        "below/h.mp4": "used",
        "c captionless.mp4": "no caption",
        "d empty caption.mp4": "no caption",
        "e short.mp4": "too short",
        "f small.mp4": "too small",
        "g copy.mp4": "duplicate",
    }
    said = {clip.name: clip.message for clip in found.clips}
    assert said["a damaged.mp4"].startswith("damaged after ")
    assert "c captionless.txt" in said["c captionless.mp4"]
    assert said["e short.mp4"] == "1.25 s long, 1.8 s are the least"
    assert said["f small.mp4"] == "64x32, would be enlarged 2 times to 128x64"
    assert said["g copy.mp4"] == "the same as 0.mp4"
    assert found.others == ("notes.pdf",)
    assert found.stops and len(found.bad) == 6
    with pytest.raises(
        UsageError, match=r"6 of 11 clips are bad, at most 10% may be: a damaged\.mp4: damaged"
    ):
        found.require_enough()
    assert states(clips, enlarge=True)["f small.mp4"] == "used"


def test_a_tenth_may_be_bad_and_duplicates_do_not_count(clips: Path) -> None:
    for n in range(3, 9):
        write_clip(clips / f"{n}.mp4", seed=n)
    write_clip(clips / "bad.mp4", frames=5, seed=20)
    assert not data.check(clips, wanted()).stops  # 1 of 10
    (clips / "8.mp4").write_bytes((clips / "7.mp4").read_bytes())
    assert not data.check(clips, wanted()).stops
    write_clip(clips / "worse.mp4", frames=5, seed=21)
    assert data.check(clips, wanted()).stops  # 2 of 11
    assert not data.check(clips, wanted(max_bad=0.2)).stops


def test_a_clip_is_cut_into_scenes_and_a_short_rest_is_left(tmp_path: Path) -> None:
    grid = wanted().grid
    assert wanted().scene_blocks == 3
    three = grid.frames_for(3)
    for frames, scenes in (
        (28, []),
        (29, [2]),
        (45, [3]),
        (three + 28, [3]),
        (three + 29, [3, 2]),
        (3 * three, [3] * 3),
    ):
        assert wanted().scenes(frames) == scenes


def test_captions_of_metadata_win_and_other_sizes_and_rates_are_taken(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    write_clip(folder / "a.mp4", size=(320, 200), fps=30, frames=90, caption="beside")
    write_clip(folder / "b.mkv", seed=2, caption="beside")
    lines = ['{"file_name": "a.mp4", "text": "listed &amp; cleaned"}', "", '{"file_name": "b.mkv"}']
    (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
    found = data.check(folder, wanted())
    assert [(clip.caption, clip.state, clip.scenes) for clip in found.clips] == [
        ("listed & cleaned", "used", (3,)),
        ("beside", "used", (3,)),
    ]
    assert found.clips[0].fps == 30 and found.clips[0].size == (320, 200)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is not JSON"),
        ('{"text": "x"}', "line 2 names no file"),
        ("[1]", "line 2 names no file"),
        ('{"file_name": "../x.mp4"}', "line 2: ../x.mp4 is not a path below"),
    ],
)
def test_a_broken_line_of_metadata_is_named(clips: Path, line: str, said: str) -> None:
    (clips / "metadata.jsonl").write_text('{"file_name": "0.mp4", "text": "x"}\n' + line, "utf-8")
    with pytest.raises(UsageError, match=said):
        data.find_clips(clips)


def test_a_clip_that_is_listed_and_missing_is_unreadable(clips: Path) -> None:
    (clips / "metadata.jsonl").write_text('{"file_name": "gone.mp4", "text": "x"}\n', "utf-8")
    found = {clip.name: clip for clip in data.check(clips, wanted()).clips}
    assert found["gone.mp4"].state == "unreadable"
    assert found["gone.mp4"].message == "No such file or directory"


# -- captions over time -----------------------------------------------------------------------------------------

STORY = "# what is seen\n0:00 a red square\n0:01.9 a blue square [cut]\n0:03.5 a green square\n"


def test_a_timeline_captions_the_blocks_nearest_to_its_times(tmp_path: Path) -> None:
    """Blocks of a scene of three begin at 0, 0.81 and 1.81 s; the next scene begins at 2.81 s."""
    folder = tmp_path / "clips"
    write_clip(folder / "a.mp4", frames=90, caption=STORY)
    write_clip(folder / "b.mp4", frames=45, seed=1, caption="0:30 is no time in here [cut]\nof a caption")
    write_clip(folder / "c.mp4", frames=45, seed=2, caption=None)
    write_clip(folder / "d.mp4", frames=45, seed=3, caption="3 birds at 0:05")
    lines = [
        {"file_name": "b.mp4", "timeline": ["0:00 one", "0:01 two"]},
        {
            "file_name": "c.mp4",
            "timeline": [{"time": "0:00", "prompt": "one"}, {"time": 1.9, "prompt": "two"}],
        },
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    found = {clip.name: clip for clip in data.check(folder, wanted()).clips}
    assert {clip.state for clip in found.values()} == {"used"}
    red, blue, green = (f"a {colour} square" for colour in ("red", "blue", "green"))
    assert [(w.captions, w.cuts) for w in found["a.mp4"].words] == [
        ((red, red, blue), (2,)),
        ((blue, green, green), ()),
    ]
    assert [w.captions for w in found["b.mp4"].words] == [("one", "two", "two")]
    assert [w.captions for w in found["c.mp4"].words] == [("one", "one", "two")]
    assert (found["d.mp4"].caption, found["d.mp4"].words) == ("3 birds at 0:05", ())


def test_a_scene_is_captioned_as_a_rollout_with_the_same_timeline(tmp_path: Path) -> None:
    grid, fps = wanted().grid, wanted().fps
    scenes = timeline.parse(STORY, source="story")
    words = data.words_of(scenes, (5,), grid, fps)[0]
    script = timeline.Timeline(scenes[1:]).script(scenes[0].prompt, grid, fps=fps, num_blocks=5)
    assert words.script == script
    assert [script.prompts[script.scene(block)] for block in range(5)] == list(words.captions)
    assert words.cuts == (2,)


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("0:00 one\n0:01 two [cutt]", "line 2, column 10: unknown option '[cutt]'; did you mean [cut]?"),
        ("0:01 one", "its first caption begins at 0:01, not at 0:00"),
        ("0:00 one\n0:02 two [blend 1s]", "line 2: a clip's captions have no [blend] and no [pin]"),
        ("0:00 one\n0:01 two\n0:01.0 three", "two captions begin at 0:01"),
        ("0:00 one\n0:09 two", "0:09 is past its end: it is 0:02.812 long"),
    ],
)
def test_a_wrong_timeline_makes_a_bad_clip_and_says_why(clips: Path, caption: str, said: str) -> None:
    (clips / "1.txt").write_text(caption, "utf-8")
    found = {clip.name: clip for clip in data.check(clips, wanted()).clips}
    assert (found["1.mp4"].state, found["0.mp4"].state) == ("no caption", "used")
    assert said in found["1.mp4"].message


def test_data_check_says_how_many_captions_a_clip_has(clips: Path, run_command: Any) -> None:
    (clips / "1.txt").write_text("0:00 day\n0:00.9 dusk\n0:01.9 night", "utf-8")
    shown = run_command("data", "check", str(clips), "--scene-seconds", "3").out
    assert "day (and 2 more)" in shown and "number 2 (and" not in shown


def test_many_blank_lines_are_read_at_once(clips: Path) -> None:
    """A pattern that could match blank lines in several ways would take longer than the world lasts."""
    (clips / "0.txt").write_text("\n" * 10_000 + "a square", "utf-8")
    (clips / "1.txt").write_text(" \n# later\n" * 5_000 + "0:00 day\n0:01.9 night", "utf-8")
    found = {clip.name: clip for clip in data.find_clips(clips)[0]}
    assert (found["0.mp4"].caption, found["0.mp4"].scenes) == ("a square", ())
    assert [scene.prompt for scene in found["1.mp4"].scenes] == ["day", "night"]


def test_a_timeline_that_is_no_list_is_named(clips: Path) -> None:
    (clips / "metadata.jsonl").write_text('{"file_name": "0.mp4", "timeline": "0:00 x"}\n', "utf-8")
    with pytest.raises(UsageError, match="line 1: timeline is no list of captions"):
        data.find_clips(clips)


def test_captions_of_blocks_are_encoded_and_read_back(
    clips: Path, tmp_path: Path, demo: ModelSource, counted: list[str]
) -> None:
    before = data.encode(clips, tmp_path / "out", demo, wanted())
    (clips / "1.txt").write_text("0:00 a square, number 1\n0:01.9 night falls [cut]", "utf-8")
    encoded = data.encode(clips, tmp_path / "out", demo, wanted())
    assert counted == ["0.mp4", "1.mp4", "2.mp4"]  # once: words are no pixels
    assert encoded.sha256 != before.sha256
    first, scene = sorted(encoded.scenes, key=lambda scene: scene.clip)[:2]
    assert (first.captions, first.cuts) == (("a square, number 0",) * 3, ())
    assert (scene.captions, scene.cuts) == (("a square, number 1",) * 2 + ("night falls",), (2,))
    assert not torch.equal(encoded.embedding("night falls"), encoded.embedding(scene.caption))


# -- encoding ---------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the clips that are really encoded."""
    names: list[str] = []
    encode_clip = data._encode_clip

    def count(finding: data.Finding, *rest: Any) -> Any:
        names.append(finding.name)
        return encode_clip(finding, *rest)

    monkeypatch.setattr(data, "_encode_clip", count)
    return names


def test_encoded_scenes_are_what_the_autoencoder_makes_of_the_frames(
    clips: Path, tmp_path: Path, demo: ModelSource
) -> None:
    encoded = data.encode(clips, tmp_path / "out", demo, wanted())
    assert sorted((scene.clip, scene.caption, scene.blocks) for scene in encoded.scenes) == [
        (f"{n}.mp4", f"a square, number {n}", 3) for n in range(3)
    ]
    second = next(scene for scene in encoded.scenes if scene.clip == "1.mp4")
    codec = registry.load_codec(DEMO_FOLDER / "vae", device=torch.device("cpu"), dtype=torch.float32)
    frames = np.stack(list(Source(clips / "1.mp4", fps=16, size=(128, 64)).frames()))
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 255  # all 45 frames at once
    z = codec.encoder().encode(pixels)
    latents, lr = encoded.load(second, (0, 1, 2))
    torch.testing.assert_close(latents, z[0].unflatten(1, (3, 4)).transpose(0, 1), rtol=1e-3, atol=2e-3)
    decoded = codec.decoder().decode(z)
    small = torch.nn.functional.avg_pool2d(decoded[0].transpose(0, 1), 4)  # [45,3,16,32]
    for block, (start, end) in enumerate(((0, 13), (13, 29), (29, 45))):
        # One frame before the block (block 0: its own first), then eight averages over the rest.
        before = small[max(0, start - 1)][None]
        rest = small[start + (block == 0) : end]
        cuts = [(n * len(rest) // 8, -(-(n + 1) * len(rest) // 8)) for n in range(8)]
        nine = torch.cat([before, *(rest[a:b].mean(0, keepdim=True) for a, b in cuts)])
        expected = codec.encoder().encode(nine.transpose(0, 1)[None])[0][:, 1:]
        torch.testing.assert_close(lr[block], expected, rtol=1e-3, atol=5e-3)
    picked, _ = encoded.load(second, (2, 0))
    assert torch.equal(picked, latents[[2, 0]])


def test_encoding_again_encodes_what_is_new_or_changed_only(
    clips: Path, tmp_path: Path, demo: ModelSource, counted: list[str]
) -> None:
    out = tmp_path / "out"
    first = data.encode(clips, out, demo, wanted())
    assert counted == ["0.mp4", "1.mp4", "2.mp4"]
    assert data.encode(clips, out, demo, wanted()).sha256 == first.sha256
    assert len(counted) == 3
    (clips / "0.mp4").rename(clips / "moved.mp4")
    (clips / "moved.txt").write_text("another caption", "utf-8")
    (clips / "1.mp4").unlink()
    write_clip(clips / "1.mp4", seed=11, caption="a square, number 1")
    (clips / "2.mp4").unlink()
    again = data.encode(clips, out, demo, wanted())
    assert counted[3:] == ["1.mp4"]
    assert sorted((scene.clip, scene.caption) for scene in again.scenes) == [
        ("1.mp4", "a square, number 1"),
        ("moved.mp4", "another caption"),
    ]
    assert again.sha256 != first.sha256
    assert again.embedding("another caption").shape == again.embedding("").shape


def test_renamed_clips_are_the_same_data_in_the_same_order(
    clips: Path, tmp_path: Path, demo: ModelSource
) -> None:
    first = data.encode(clips, tmp_path / "out", demo, wanted())
    for old, new in (("0", "z"), ("1", "0"), ("2", "a")):
        for ending in (".mp4", ".txt"):
            (clips / f"{old}{ending}").rename(clips / f"{new}{ending}")
    again = data.encode(clips, tmp_path / "out", demo, wanted())
    assert again.sha256 == first.sha256
    assert [scene.clip for scene in again.scenes] != [scene.clip for scene in first.scenes]
    assert [scene.content for scene in again.scenes] == [scene.content for scene in first.scenes]
    assert [scene.caption for scene in again.scenes] == [scene.caption for scene in first.scenes]
    shape = Shape("strict", 3, (1,), 1, (Fraction(1),), 0.0)
    splits = [clip_run.Split.of(encoded, shape, 0.34) for encoded in (first, again)]
    held = [[scene.content for scene in split.evaluated] for split in splits]
    assert splits[0].is_held_out and held[0] == held[1]


def test_asked_to_stop_it_ends_after_the_clip_in_hand(
    clips: Path, tmp_path: Path, demo: ModelSource, counted: list[str]
) -> None:
    with pytest.raises(loop.Stopped):
        data.encode(clips, tmp_path / "out", demo, wanted(), should_stop=lambda: len(counted) == 2)
    assert counted == ["0.mp4", "1.mp4"]
    assert len(data.encode(clips, tmp_path / "out", demo, wanted()).scenes) == 3
    assert counted == ["0.mp4", "1.mp4", "2.mp4"]


def test_a_stopped_encoding_goes_on_where_it_was(
    clips: Path, tmp_path: Path, demo: ModelSource, counted: list[str]
) -> None:
    out = tmp_path / "out"

    def stop(done: int, *_: object) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.encode(clips, out, demo, wanted(), on_clip=stop)
    with pytest.raises(UsageError, match=r"has no dataset\.json") as error:
        EncodedData.open(out)
    assert "was not finished" in error.value.hint
    with (out / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"sha256": "cut o')  # a kill within a write
    shard = next(iter((out / "latents").iterdir()))
    shard.write_bytes(shard.read_bytes()[:100])  # the disk lost the end of a file
    encoded = data.encode(clips, out, demo, wanted())
    assert len(encoded.scenes) == 3
    assert sorted(counted) in (["0.mp4", "0.mp4", "1.mp4", "2.mp4"], ["0.mp4", "1.mp4", "1.mp4", "2.mp4"])
    assert len((out / "journal.jsonl").read_text("utf-8").splitlines()) == 4


def test_a_long_clip_is_written_in_shards_of_bounded_size(
    tmp_path: Path, demo: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clip(tmp_path / "clips" / "long.mp4", frames=45 * 4 + 30)
    monkeypatch.setattr(data, "SHARD_BYTES", 100_000)  # a scene has about 50 kB
    encoded = data.encode(tmp_path / "clips", tmp_path / "out", demo, wanted())
    assert [scene.blocks for scene in encoded.scenes] == [3, 3, 3, 3, 2]
    shards = [scene.shard for scene in encoded.scenes]
    assert len(set(shards)) > 1 and all(path.stat().st_size < 200_000 for path in shards)
    loaded = [encoded.load(scene, (0, 1))[0] for scene in encoded.scenes]
    assert len({tuple(z.flatten()[:50].tolist()) for z in loaded}) == 5


def test_damage_in_the_middle_is_found_while_encoding_and_remembered(
    clips: Path, tmp_path: Path, demo: ModelSource, counted: list[str]
) -> None:
    damage(write_clip(clips / "9.mp4", seed=9))
    limits = wanted(max_bad=0.3)
    told: list[tuple[str, str]] = []
    for _ in range(2):
        encoded = data.encode(
            clips, tmp_path / "out", demo, limits, on_clip=lambda n, t, f, had: told.append((f.name, f.state))
        )
        assert len(encoded.scenes) == 3
    assert told[3] == told[7] == ("9.mp4", "unreadable")
    assert counted.count("9.mp4") == 1
    assert encoded.counts["unreadable"] == 1


def test_too_many_bad_clips_stop_at_once(
    clips: Path, tmp_path: Path, demo: ModelSource, counted: list[str]
) -> None:
    write_clip(clips / "00 short.mp4", frames=5, seed=20)
    with pytest.raises(
        UsageError, match=r"1 of 4 clips are bad, at most 10% may be: 00 short\.mp4: 0\.312 s"
    ):
        data.encode(clips, tmp_path / "out", demo, wanted())
    assert counted == ["0.mp4"]  # the clip before


def test_other_settings_do_not_mix(clips: Path, tmp_path: Path, demo: ModelSource) -> None:
    data.encode(clips, tmp_path / "out", demo, wanted())
    with pytest.raises(UsageError, match="encoded with other settings: scene_blocks 3 then, 2 now"):
        data.encode(clips, tmp_path / "out", demo, wanted(scene_seconds=2.0))


def test_one_process_at_a_time(clips: Path, tmp_path: Path, demo: ModelSource) -> None:
    pytest.importorskip("fcntl")

    def second(*_: object) -> None:
        with pytest.raises(LockedError, match="another process is encoding into"):
            data.encode(clips, tmp_path / "out", demo, wanted())

    data.encode(clips, tmp_path / "out", demo, wanted(), on_clip=second)


def test_a_full_disk_is_said_and_what_is_done_stays(
    clips: Path, tmp_path: Path, demo: ModelSource, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save: Callable[..., None] = data.save_file

    def full(tensors: Any, path: Path) -> None:
        if len(counted) == 2:
            raise OSError(28, "No space left on device")
        save(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(data, "save_file", full)
        with pytest.raises(DiskFullError, match="the disk is full"):
            data.encode(clips, tmp_path / "out", demo, wanted())
    data.encode(clips, tmp_path / "out", demo, wanted())
    assert counted == ["0.mp4", "1.mp4", "1.mp4", "2.mp4"]


def test_damaged_encoded_data_says_what_to_do(clips: Path, tmp_path: Path, demo: ModelSource) -> None:
    encoded = data.encode(clips, tmp_path / "out", demo, wanted())
    encoded.scenes[0].shard.unlink()
    with pytest.raises(WeightsError, match="cannot be read") as error:
        encoded.load(encoded.scenes[0], (0,))
    assert "data encode again" in error.value.hint
    (tmp_path / "out" / "dataset.json").write_text("{", "utf-8")
    with pytest.raises(WeightsError, match="is damaged"):
        EncodedData.open(tmp_path / "out")


# -- the command line -------------------------------------------------------------------------------------------


def test_data_check_prints_a_table_or_json(clips: Path, run_command: Any) -> None:
    arguments = ("data", "check", str(clips), "--scene-seconds", "3")
    result = run_command(*arguments)
    assert result.code == 0
    assert "a square, number 2" in result.out
    assert "3 clips: 3 used. Used: 3 scenes, 9 blocks, 8 s." in result.err
    write_clip(clips / "bad.mp4", frames=5, seed=20)
    result = run_command(*arguments, "--json", "-q")
    assert result.code == 2
    assert "1 of 4 clips are bad" in result.err
    values = json.loads(result.out)
    assert (values["schema"], values["stops"], values["bad_share"]) == (1, True, 0.25)
    assert values["counts"] == {
        "used": 3,
        "unreadable": 0,
        "no caption": 0,
        "too short": 1,
        "too small": 0,
        "duplicate": 0,
    }
    assert set(values["clips"][0]) == {
        *("name", "state", "message", "caption", "sha256", "seconds", "size", "fps", "scenes", "words")
    }
    assert run_command(*arguments, "--max-bad", "0.3").code == 0


def test_data_check_fast_reads_no_frames_behind_the_first(clips: Path, run_command: Any) -> None:
    damage(write_clip(clips / "long.mp4", frames=300, seed=4))
    arguments = ("data", "check", str(clips), "--scene-seconds", "3")
    assert run_command(*arguments).code == 2
    assert run_command(*arguments, "--fast").code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", "nowhere"], "there is no folder nowhere"),
        (["check", "."], "there are no video clips in ."),
        (["check", ".", "--scene-seconds", "1"], "scenes of 1 s have 1 block"),
        (["encode", "nowhere", "--out", "x"], "there is no folder nowhere"),
        (["check", ".", "--model", "dmeo"], "demo"),
    ],
)
def test_wrong_input_is_one_message(arguments: list[str], said: str, run_command: Any) -> None:
    result = run_command("data", *arguments)
    assert (result.code, result.out) == (2, "")
    assert said in result.err


def test_data_encode_prints_the_folder(clips: Path, run_command: Any, tmp_path: Path) -> None:
    result = run_command("data", "encode", str(clips), "--out", "made", "--scene-seconds", "3")
    assert (result.code, result.out) == (0, "made\n")
    assert "3 clips encoded, 0 were there already: 3 scenes, 9 blocks" in result.err
    assert EncodedData.open(tmp_path / "made").settings["model"] == "demo"
    assert "Train on them: packforcing train finetune --data made" in result.err
    result = run_command("data", "encode", str(clips), "--out", "long", "--max-bad", "0.5")
    assert "Train on them: packforcing train finetune-long --data long" in result.err
