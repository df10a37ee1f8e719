"""Timelines: what parses, what is refused and where, which block gets which prompt."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from packforcing_cli import timeline
from packforcing_cli.config import GenerateRequest
from packforcing_cli.errors import UsageError
from packforcing_cli.layout import Grid
from packforcing_cli.timeline import Scene, Script, Timeline, clock, parse, parse_at, parse_pins, parse_time

GRID = Grid(frames_per_block=4, rows=8, cols=8, layers=1, kv_dim=16, heads=1)
FPS = 16  # block n begins at 0, 13/16, 29/16, 45/16 … s


def script(scenes: tuple[Scene, ...], *pins: str, blocks: int = 10) -> Script:
    return Timeline(scenes, parse_pins(pins)).script("first", GRID, fps=FPS, num_blocks=blocks)


def at(*pairs: tuple[str, str]) -> tuple[Scene, ...]:
    return parse_at(pairs)


def said(error: pytest.ExceptionInfo[UsageError]) -> str:
    assert error.value.exit_code == 2 and error.value.hint
    return error.value.message


# -- time -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0:12", "12"),
        ("12", "12"),
        ("12s", "12"),
        ("1.5s", "3/2"),
        ("90:00", "5400"),
        ("1:02:03.5", "7447/2"),
        ("00:00:12,250", "49/4"),
    ],
)
def test_times_are_exact_and_written_back(text: str, seconds: str) -> None:
    assert parse_time(text) == Fraction(seconds)
    assert parse_time(clock(Fraction(seconds))) == Fraction(seconds)


@pytest.mark.parametrize("text", ["", "0:60", "1:60:00", "-1", "0:1x", "1:2:3:4", "٣", "0:12s", "1e3", "nan"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no time"):
        parse_time(text)


@given(st.fractions(min_value=0, max_value=10**5, max_denominator=1000))
def test_a_clock_is_read_back_to_a_billionth(seconds: Fraction) -> None:
    assert abs(parse_time(clock(seconds)) - seconds) < Fraction(1, 10**8)


# -- formats --------------------------------------------------------------------------------------------------

EXPECTED = (
    Scene(Fraction(12), "a blue square", Fraction(3, 2), pin=Fraction(2)),
    Scene(Fraction(41, 2), "night, [dark] and cold", cut=True, pin=Fraction(0)),
)
FILES = {
    "scenes.txt": """
# times are minutes and seconds
0:12   a blue square [blend 1.5s] [pin 2s]
  0:20.5 night, [dark] and cold [pin] [cut]
""",
    "scenes.toml": """
[[at]]
time = "0:12"
prompt = "a blue square"
blend = 1.5
pin = "2s"

[[at]]
time = 20.5
prompt = "night, [dark] and cold"
cut = true
pin = true
""",
    "scenes.srt": """1
00:00:12,000 --> 00:00:20,000
a blue
square [blend 1.5s] [pin 2s]

2
00:00:20,500 --> 00:00:30,000
night, [dark] and cold [cut] [pin]
""",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_the_three_formats_say_the_same(name: str, ends: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + FILES[name].replace("\n", ends).encode())
    assert timeline.read(path) == EXPECTED
    assert at(*((clock(scene.seconds), scene.text) for scene in EXPECTED)) == EXPECTED


def test_a_timeline_survives_its_json_and_a_request() -> None:
    asked = Timeline(EXPECTED, parse_pins(["0:03-0:05.25"]))
    assert Timeline.from_json(asked.to_json()) == asked
    request = GenerateRequest(prompt="a", timeline=asked)
    assert GenerateRequest(**request.model_dump()).timeline == asked
    for wrong in ({"at": 3}, {"at": [["0:12"]]}, {"at": [["0:12", 3]]}, {"pins": ["x"]}):
        with pytest.raises(UsageError):
            Timeline.from_json(wrong)


@pytest.mark.parametrize(
    ("kind", "text", "places"),
    [
        (
            "",
            "0:12 fine\nnonsense here\n 0:99 late\n0:20\n0:30 x [blnd 1s]\n0:31 y [cut] [blend 1s]\n0:3 z [cut] [cut]",
            ["line 2, column 1", "line 3, column 2", "line 4, column 5", "line 5, column 8: unknown option '[blnd 1s]';"
             " did you mean [blend]", "line 6, column 6", "line 7, column 7"],
        ),
        (
            ".srt",
            "1\n00:00:01,000 --> 00:00:0x,000\nword\n\nno arrow\n\n"
            "00:00:05,000 --> 00:00:09,000\na\n\n00:00:08,000 --> 00:00:10,000\nb [nope]\n\n"
            "4\n00:00:20 --> 00:00:19\nc",
            ["line 2, column 18", "line 5, column 1", "line 10, column 1: 0:08 overlaps", "line 11, column 3",
             "line 14, column 1: a cue ends"],
        ),
        (".toml", 'at = [\n{ time = 1', ["line 2, column 11"]),
        (
            ".toml",
            'speed = 3\n\n[[at]]\ntime = "0:12"\nprompt = "a"\nblnd = 1\n\n[[at]]\ntime = []\nprompt = ""\ncut = 1\n',
            ["line 1, column 1", "line 3, column 1: unknown name 'blnd'; the nearest known one is blend",
             "line 8, column 1: time must be", "line 8, column 1: prompt is", "line 8, column 1: cut must"],
        ),
        ("", "# nothing\n", ["line 1, column 1: there is no scene"]),
    ],
)  # fmt: skip
def test_every_mistake_is_named_with_line_and_column(kind: str, text: str, places: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text, source="scenes", kind=kind)
    message = said(caught)
    assert [line for line in message.splitlines() if "scenes, line" not in line] in (
        [],
        [f"{len(places)} problems:"],
    )
    for place in places:
        assert f"scenes, {place}" in message
    assert message.count("scenes, line") == len(places)


def test_files_that_are_no_text_are_one_message(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"0:12 abc\n0:13 caf\xe9\n")
    with pytest.raises(UsageError, match="line 2, column 9"):
        timeline.read(tmp_path / "latin")
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UsageError, match="cannot be read"):
            timeline.read(path)


@pytest.mark.parametrize(
    "prompt", ["a sign [cut]", "a poster [hello]", r"a slash \[x]", "a  blue\tsquare\u2003x"]
)
def test_a_prompt_is_the_same_wherever_it_is_kept(prompt: str) -> None:
    """In TOML brackets are just text; a run folder and a file's metadata keep it, a command line can say it."""
    (scene,) = parse(f"[[at]]\ntime = 3\nprompt = {json.dumps(prompt)}\n", source="x", kind=".toml")
    assert scene == Scene(Fraction(3), " ".join(prompt.split()))
    request = GenerateRequest(prompt="a", timeline=Timeline((scene,)))
    values = json.loads(json.dumps(request.to_values()))
    assert GenerateRequest.from_values(values).timeline.scenes == (scene,)
    assert at(("3s", scene.text)) == (scene,)
    assert parse(f"0:03 {scene.text}", source="x") == (scene,)


def test_brackets_in_a_prompt_are_written_with_a_backslash() -> None:
    assert at(("3s", r"a sign \[cut] [cut]")) == (Scene(Fraction(3), "a sign [cut]", cut=True),)
    with pytest.raises(UsageError, match=r"are written as \\\["):
        at(("3s", "a poster [hello]"))


PIECES = st.sampled_from(
    ["0:12", "12s", "-->", "00:00:01,000", " ", "\n", "\n\n", "[", "]", "[blend 1s]", "[cut]", "[pin]", "[[at]]",
     "time = ", "prompt = ", '"', '"""', "=", "a blue square", "1", "\t", "#", "[pin 2s]", "{", "}", "\r", "\0", "é",
     "1e400", "9999999999999999999", "9" * 400, "[hello]", "\\", "9999:59", "inf", "1979-05-27T07:32:00Z", "-"]
)  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=200),
    st.lists(PIECES, max_size=30).map("".join),
    st.lists(st.tuples(PIECES, PIECES, st.text(max_size=20)).map(" ".join), max_size=8).map("\n".join),
)
PROMPTS = st.lists(
    st.sampled_from(["a", "b\tc", " ", "\u2003", "[hello]", "[cut]", "\\[cut]", "[x", "]", "\\"]), min_size=1
).map("".join)
TIMES = st.integers(0, 10**8 - 1).map(str) | st.sampled_from(
    ["999999:59.123456789", "0:12.5", "9999:59:59,5", "12s"]
)
SCENES = {
    "": st.tuples(TIMES, PROMPTS).map(lambda scene: f"{scene[0]} {scene[1]}\n"),
    ".toml": st.tuples(TIMES, PROMPTS).map(
        lambda scene: f'[[at]]\ntime = "{scene[0]}"\npin = "{scene[0]}"\nprompt = {json.dumps(scene[1])}\n'
    ),
    ".srt": st.tuples(TIMES, PROMPTS).map(lambda scene: f"{scene[0]} --> 999999:00:00\n{scene[1]}\n"),
}
many = settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("kind", ["", ".toml", ".srt"])
def test_any_text_gives_scenes_or_one_usage_error(kind: str) -> None:
    """Parsed scenes can be placed on blocks; nothing else but UsageError comes out."""
    complete: list[bool] = []

    @many
    @given(TEXTS | st.lists(SCENES[kind], max_size=3).map("\n".join))
    def check(text: str) -> None:
        try:
            scenes = parse(text, source="x", kind=kind)
        except UsageError as error:
            complete.append("line " in error.message and error.hint != "")
            return
        assert scenes
        for scene in scenes:
            assert scene.seconds >= 0 and scene.prompt.strip()
            assert at((clock(scene.seconds), scene.text)) == (scene,)
        assert Timeline.from_json(json.loads(json.dumps(Timeline(scenes).to_json()))) == Timeline(scenes)
        try:
            found = script(scenes)
        except UsageError:
            return
        assert found.starts == tuple(sorted(set(found.starts)))

    check()
    assert complete and all(complete)


# -- blocks ---------------------------------------------------------------------------------------------------


def test_a_prompt_takes_over_at_the_nearest_block_boundary() -> None:
    begins = [GRID.frames_for(block) for block in range(10)]
    assert begins[:4] == [0, 13, 29, 45]
    for frame in range(160):
        nearest = min(range(12), key=lambda b: (abs(GRID.frames_for(b) - frame), -b))
        assert GRID.nearest_block(Fraction(frame, FPS), FPS) == nearest
        assert begins[GRID.block_at(frame)] <= frame if frame < 157 else True
    found = script(at(("2s", "b"), ("0:05", "c")))
    assert (found.prompts, found.starts) == (("first", "b", "c"), (0, 2, 5))
    assert [found.scene(block) for block in range(7)] == [0, 0, 1, 1, 1, 2, 2]
    assert found.changes == ((0, "first"), (2, "b"), (5, "c"))


def test_a_blend_is_linear_over_its_blocks() -> None:
    found = script(at(("0:03", "b [blend 3s]"), ("0:07", "c [blend 0.1s]")))
    assert (found.starts, found.blends) == ((0, 3, 7), (0, 3, 1))
    weights = [found.weight(block) for block in range(10)]
    assert weights == [1, 1, 1, Fraction(1, 4), Fraction(1, 2), Fraction(3, 4), 1, Fraction(1, 2), 1, 1]


def test_pins_are_the_blocks_they_touch() -> None:
    assert script((), "0:03-0:05").pins == {3, 4, 5}  # 2.81 to 3.81, …, 4.81 to 5.81
    assert script((), "0:00-0:00.01").pins == {0}
    found = script(at(("0:03", "b [blend 2s] [pin]"), ("0:07", "c [pin 1.5s] [cut]")))
    assert found.pins == {5, 7, 8}
    assert found.cuts == (7,)


def test_scenes_that_return_to_the_same_prompt_make_no_chapter() -> None:
    assert script(at(("0:03", "first [cut]"))).changes == ((0, "first"),)


@pytest.mark.parametrize(
    ("scenes", "pins", "message"),
    [
        (at(("0:10", "b")), [], "0:10 is past the end: the video is 0:09.8125 long"),
        (at(("0:09.6", "b")), [], "past the end"),
        (at(("0:03", "b"), ("0:03.1", "c")), [], "overlaps"),
        (at(("0:00", "b")), [], "overlaps"),
        (at(("0:03", "b [blend 3s]"), ("0:05", "c")), [], "0:05 overlaps"),
        (at(("0:08", "b [blend 5s]")), [], "the blend of 0:05 goes past the end"),
        (at(("0:08", "b [pin 5s]")), [], "the pin goes past the end"),
        ((), ["0:08-0:11"], "0:08-0:11 is past the end"),
    ],
)
def test_what_does_not_fit_the_video_is_refused(
    scenes: tuple[Scene, ...], pins: list[str], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        script(scenes, *pins)
    assert message in said(caught)


def test_all_that_does_not_fit_is_said_at_once() -> None:
    scenes = parse("0:02 b\n0:02.1 c\n0:40 d\n", source="s.txt")
    with pytest.raises(UsageError) as caught:
        script(scenes, "0:08-0:11")
    message = said(caught)
    assert message.startswith("3 problems:")
    assert (
        "s.txt, line 2, column 8" in message and "s.txt, line 3, column 6" in message and "--pin" in message
    )


@pytest.mark.parametrize("text", ["0:05", "0:05-0:05", "0:06-0:05", "-0:05", "a-b", ""])
def test_wrong_pins_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_pins([text])
