"""Manifests: read whole, checked whole, every mistake named with its line and column."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packforcing_cli import manifest
from packforcing_cli.config import GenerateRequest
from packforcing_cli.errors import UsageError
from packforcing_cli.manifest import EXTEND_KEYS, GENERATE_KEYS, ExtendRequest, Line

GOOD = '{"prompt": "a red circle", "seconds": 5, "seed": 7}'


def parse(text: str | bytes, kind: str = "jsonl", **defaults: Any) -> tuple[Line, ...]:
    data = text.encode() if isinstance(text, str) else text
    return manifest.parse(data, source="jobs", kind=kind, defaults=defaults)


def problems(text: str | bytes, kind: str = "jsonl") -> list[str]:
    """What is said about a manifest, a line each."""
    with pytest.raises(UsageError) as caught:
        parse(text, kind)
    lines = caught.value.message.splitlines()
    return lines if len(lines) == 1 else [line.strip() for line in lines[1:]]


NOT_OF_A_LINE = {
    *("run", "no_run", "again", "dry_run", "as_json", "progress", "quiet", "verbose", "force"),
}
"""Options of generate and extend that a batch has for all lines, or that do not say what is made."""
OTHER_NAMES = {
    "compile_layers": "compile",
    "start": "from",
    "no_metadata": "metadata",
    "no_rope_adjustment": "rope_adjustment",
}


@pytest.mark.parametrize(("name", "keys"), [("generate", GENERATE_KEYS), ("extend", EXTEND_KEYS)])
def test_a_line_may_have_what_the_command_has(name: str, keys: tuple[str, ...]) -> None:
    command = getattr(importlib.import_module(f"packforcing_cli.cli.{name}"), name)
    options = set(inspect.signature(command).parameters) - NOT_OF_A_LINE
    assert {OTHER_NAMES.get(option, option) for option in options} - set(keys) == set()


def test_adapters_are_texts_with_a_weight() -> None:
    (one, more) = parse('{"prompt": "a", "lora": "x:0.5"}\n{"prompt": "b", "lora": ["x", "y:2"]}')
    assert generated(one).loras == ("x:0.5",) and generated(more).loras == ("x", "y:2")
    assert "'heavy' is no weight" in problems('{"prompt": "a", "lora": "x:heavy"}')[0]
    assert "must be text" in problems('{"prompt": "a", "lora": [1]}')[0]


def test_outputs_that_are_not_possible_are_told_with_all_other_problems() -> None:
    found = problems(
        '{"prompt": "a", "output": "../x.mp4"}\n'
        '{"prompt": "a", "output": "x\\u001b[31m.mp4"}\n'
        '{"prompt": "a", "output": "x\\u202e.mp4"}\n'
        '{"promt": "a"}'
    )
    assert ["leads out" in found[0], "cannot be printed" in found[1], "cannot be printed" in found[2]] == [
        True
    ] * 3
    assert "unknown key 'promt'" in found[3] and len(found) == 4
    assert all(text.isprintable() for text in found)


@pytest.mark.parametrize("key", ["at", "pin", "title", "lora"])
def test_a_value_that_is_nested_deeply_is_one_problem(key: str) -> None:
    deep = "[" * 900 + "]" * 900
    (found,) = problems(f'{{"prompt": "a", "{key}": {deep}}}')
    assert found.startswith("jobs, line 1, column 17: ")


def generated(line: Line) -> GenerateRequest:
    assert isinstance(line.request, GenerateRequest)
    return line.request


def test_a_line_has_every_option_of_generate() -> None:
    line = (
        '{"prompt": "a", "seconds": 5, "size": "64x48", "seed": 3, "steps": 4, "guidance": 2.5, "top-k": 4, '
        '"bank": "unlimited", "mid_span": 1, "select": "fifo", "codec": "hevc", "crf": 20, "metadata": false, '
        '"image": "x.png", "at": ["0:02 b [cut]", {"time": "0:04", "prompt": "c"}], "pin": "0:00-0:01", '
        '"output": "x/y.mp4", "title": "T", "keep_run": false, "device": "cpu", "frames": "pictures"}'
    )
    (found,) = parse(line)
    request = generated(found)
    assert (request.prompt, request.seconds, request.size, request.seed) == ("a", 5.0, (64, 48), 3)
    assert (request.steps, request.guidance, request.codec, request.crf) == (4, 2.5, "hevc", 20)
    assert (request.memory.top_k, request.memory.bank, request.memory.select) == (4, None, "fifo")
    assert request.memory.model_fields_set == {"top_k", "bank", "mid_span", "select"}
    assert (request.image, request.frames, request.keep_run) == (Path("x.png"), Path("pictures"), False)
    assert [scene.prompt for scene in found.timeline.scenes] == ["b", "c"]
    assert found.timeline.scenes[0].cut
    assert found.timeline.pins[0].end == Fraction(1)
    assert (found.output, found.title, found.shown) == ("x/y.mp4", "T", "T")


def test_a_line_with_a_source_has_the_options_of_extend() -> None:
    (found,) = parse(
        '{"source": "a.mp4", "seconds": 2, "from": 1.5, "prompt": "b", "only_new": true, "fit": "pad"}'
    )
    request = found.request
    assert isinstance(request, ExtendRequest)
    assert (request.source, request.seconds, request.start) == ("a.mp4", 2.0, "1.5")
    assert (request.prompt, request.only_new, request.fit) == ("b", True, "pad")


def test_the_first_prompt_may_be_a_scene() -> None:
    (found,) = parse('{"at": ["0:00 a red circle", "0:03 a blue square"]}')
    assert generated(found).prompt == "a red circle"
    assert [scene.prompt for scene in found.timeline.scenes] == ["a blue square"]


def test_text_is_a_prompt_a_line_without_comments() -> None:
    found = parse("\ufeff# prompts\r\n a red circle \r\n\n  # more\nein blauer Würfel\n", "text", seconds=3.0)
    assert [(line.line, line.index, generated(line).prompt) for line in found] == [
        (2, 1, "a red circle"),
        (5, 2, "ein blauer Würfel"),
    ]
    assert {generated(line).seconds for line in found} == {3.0}


def test_csv_leaves_empty_cells_out_and_has_lists_as_json() -> None:
    text = 'prompt,seconds,at\r\n"a, ""b""",5,"[""0:02 c""]"\r\n,,\r\n"two\nlines",,\r\n'
    found = parse(text, "csv")
    assert [(line.line, generated(line).prompt, generated(line).seconds) for line in found] == [
        (2, 'a, "b"', 5.0),
        (4, "two\nlines", 10.0),
    ]
    assert found[0].timeline.scenes[0].prompt == "c"


@pytest.mark.parametrize(
    ("source", "data", "kind"),
    [
        ("a.jsonl", b"", "jsonl"),
        ("a.NDJSON", b"", "jsonl"),
        ("a.csv", b"{", "csv"),
        ("a.txt", b"{}", "text"),
        ("standard input", b"\xef\xbb\xbf \n{}", "jsonl"),
        ("standard input", b"a red circle", "text"),
    ],
)
def test_the_format_is_found(source: str, data: bytes, kind: str) -> None:
    assert manifest.kind_of(source, data) == kind


def test_every_mistake_is_listed_in_one_go() -> None:
    text = "\n".join(
        [
            GOOD,
            '{"promt": "x"}',
            '{"prompt": "x", "seconds": -1, "crf": 99}',
            '{"prompt": }',
            "[1]",
            '{"prompt": "a", "prompt": "b"}',
            '{"prompt": "x", "seed": true}',
            '{"prompt": "x", "at": ["0:99 y"]}',
            '{"source": "a.mp4"}',
            '{"source": "a.mp4", "seconds": 1, "image": "b.png"}',
            '{"prompt": "x", "policy": "sinc"}',
            '{"prompt": "x", "image": "a", "pin_image": ["b"]}',
            '{"prompt": "x"} {"prompt": "y"}',
            '{"prompt": "\\ud800"}',
            '{"prompt": NaN}',
            '{"prompt": "x", "parity": "letter"}',
            GOOD,
        ]
    )
    found = problems(text)
    expected = [
        r"line 2, column 2: unknown key 'promt'; the nearest known one is 'prompt'",
        r"line 3, column 17: seconds -1: must be above 0",
        r"line 3, column 32: crf 99: ",
        r"line 4, column 12: not JSON: expecting value",
        r"line 5, column 1: not JSON: a line is one object",
        r"line 6, column 17: 'prompt' is there twice",
        r"line 7, column 17: seed true: must not be true or false",
        r"line 8, column 17: at '0:99', character 1: '0:99' is no time",
        r"line 9, column 2: seconds is missing",
        r"line 10, column 35: unknown key 'image'; it belongs to generate",
        r"line 11, column 17: policy sinc: must be one of .*; did you mean sink\?",
        r"line 12, column 31: image and pin_image both say what block 0 is",
        r"line 13, column 17: not JSON: something is behind the object",
        r"line 14, column 2: prompt: '\\\\ud800' is no text",
        r"line 15, column 1: not JSON: NaN is no JSON value",
        r"line 16, column 17: parity letter: must be paper",
    ]
    assert len(found) == len(expected)
    for said, pattern in zip(found, expected, strict=True):
        assert re.match(f"jobs, {pattern}", said), said


def test_lines_that_are_no_text_are_named() -> None:
    text = GOOD.encode() + b'\n{"prompt": "\xff"}\n' + GOOD.encode() + b"\n{\xfe"
    found = problems(text)
    assert found == ["jobs, line 2, column 13: not UTF-8 text", "jobs, line 4, column 2: not UTF-8 text"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,prompt\na,b", "line 1, column 2: 'prompt' is there twice"),
        ("prompt,\na,b", "line 1, column 2: a column has no name"),
        ("prompt\na,b", "line 2, column 2: 2 fields, and the first row has 1"),
        ('prompt\n"a', "line 2, column 1: not CSV"),
        ("prompt,secnds\na,4", "line 2, column 2: unknown key 'secnds'; the nearest known one is 'seconds'"),
        ('prompt,at\na,"[1"', "line 2, column 2: at: not JSON"),
    ],
)
def test_csv_mistakes_have_the_number_of_the_field(text: str, said: str) -> None:
    assert said in problems(text, "csv")[0]


@pytest.mark.parametrize(("text", "kind"), [("", "jsonl"), ("# nothing\n\n", "text"), ("prompt\n", "csv")])
def test_a_manifest_without_jobs_is_refused(text: str, kind: str) -> None:
    assert problems(text, kind) == ["jobs has no job in it"]


def test_one_bad_line_among_ten_thousand_is_found() -> None:
    lines = [GOOD] * 10_000
    lines[7776] = '{"prompt": "a", "sede": 3}'
    assert problems("\n".join(lines)) == [
        "jobs, line 7777, column 17: unknown key 'sede'; the nearest known one is 'seed'"
    ]


BREAKS = {
    "cut": lambda line: line[: len(line) // 2],
    "key": lambda line: line.replace('"seconds"', '"secs"'),
    "value": lambda line: line.replace("5", "-5"),
    "type": lambda line: line.replace("5", "[5]"),
    "array": lambda line: f"[{line}]",
    "twice": lambda line: line[:-1] + ', "seed": 9}',
    "behind": lambda line: line + "x",
    "empty": lambda line: "{}",
}


@settings(max_examples=2000, deadline=None)
@given(
    prompts=st.lists(st.text(min_size=1).filter(lambda text: text.strip()), min_size=1, max_size=6),
    at=st.integers(0, 5),
    how=st.sampled_from(sorted(BREAKS)),
)
def test_a_bad_line_is_named_wherever_it_stands(prompts: list[str], at: int, how: str) -> None:
    lines = [json.dumps({"prompt": prompt, "seconds": 5, "seed": 1}) for prompt in prompts]
    found = parse("\n".join(lines))
    assert [generated(line).prompt for line in found] == [prompt.strip() for prompt in prompts]
    at = min(at, len(lines) - 1)
    good = json.dumps({"prompt": "p", "seconds": 5, "seed": 1})
    lines[at] = BREAKS[how](good)
    said = problems("\n".join(lines))
    assert len(said) == 1
    assert said[0].startswith(f"jobs, line {at + 1}, column "), said
    assert said[0].isprintable()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["jsonl", "csv", "text"]))
def test_any_bytes_are_jobs_or_one_message(data: bytes, kind: str) -> None:
    try:
        found = parse(data, kind)
    except UsageError:
        return
    assert found and all(line.shown.isprintable() for line in found)


def test_control_characters_do_nothing_to_a_terminal() -> None:
    (found,) = parse('{"prompt": "a\\u001b[31m b\\u0007\\u202e", "title": "t\\u001b]0;x\\u0007"}')
    assert found.shown == r"t\x1b]0;x\x07"
    assert manifest.printable(found.request.prompt or "") == r"a\x1b[31m b\x07\u202e"
    assert manifest.printable("x" * 100, 10) == "x" * 9 + "…"
    said = problems('{"prompt": "a", "\\u001b[2J": 1}')
    assert "\x1b" not in said[0]


def test_defaults_are_for_lines_that_do_not_say_otherwise() -> None:
    lines = parse(f'{GOOD}\n{{"prompt": "b"}}\n{{"source": "a.mp4"}}', seconds=2.0, crf=30)
    assert [line.request.seconds for line in lines] == [5.0, 2.0, 2.0]
    assert [generated(line).crf for line in lines[:2]] == [30, 30]


def test_a_timeline_file_is_read_when_the_job_is_planned(tmp_path: Path) -> None:
    file = tmp_path / "story.txt"
    (line,) = parse(json.dumps({"timeline": str(file), "seconds": 9}))
    with pytest.raises(UsageError, match="cannot be read"):
        manifest.with_timeline_file(line)
    file.write_text("0:00 a red circle\n0:04 a blue square\n", encoding="utf-8")
    whole = manifest.with_timeline_file(line)
    assert generated(whole).prompt == "a red circle"
    assert [scene.prompt for scene in whole.timeline.scenes] == ["a blue square"]
    file.write_text("0:04 a blue square\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"no scene at 0:00"):
        manifest.with_timeline_file(line)


def test_jobs_of_values_are_jobs_of_lines() -> None:
    found = manifest.of_values(["a red circle", {"prompt": "b", "seconds": 3}])
    assert [(generated(line).prompt, line.request.seconds) for line in found] == [
        ("a red circle", 10),
        ("b", 3),
    ]
    with pytest.raises(UsageError, match=r"line 2, column 1: unknown key 'prompts'"):
        manifest.of_values(["a", {"prompts": "b"}])


def test_the_schema_knows_every_key_and_no_other() -> None:
    schema = manifest.json_schema()
    json.dumps(schema)
    generate, extend = schema["oneOf"]
    assert set(generate["properties"]) == set(manifest.GENERATE_KEYS)
    assert set(extend["properties"]) == set(manifest.EXTEND_KEYS)
    for branch in (generate, extend):
        assert branch["additionalProperties"] is False
        for name, value in branch["properties"].items():
            assert value.get("description"), name
    assert generate["properties"]["crf"] == {
        "type": "integer",
        "minimum": 0,
        "maximum": 51,
        "description": "quality, 0 (lossless) to 51.",
    }
    assert generate["properties"]["codec"]["enum"] == ["h264", "hevc", "h264_nvenc", "hevc_nvenc"]
