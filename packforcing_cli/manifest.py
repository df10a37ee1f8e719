"""A list of videos to make: read whole and checked whole, before anything is loaded.

    JSON Lines   {"prompt": "a red circle", "seconds": 5, "seed": 7}     keys are the options of generate
                 {"source": "clip.mp4", "seconds": 5}                    or, with a source, those of extend
    CSV          the first row has the keys; an empty cell is not given, a list is written as JSON
    text         a prompt a line; empty lines and lines that begin with # are skipped

All mistakes are reported at once, with line and column. Whether files and models are there is not looked at: that is a
matter of each job alone. Knows no folders, no models and no ledger.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter, field_validator

from packforcing_cli import timeline as timelines
from packforcing_cli.config import (
    ATTENTIONS,
    BANK_DEVICES,
    CODECS,
    COMPRESSED_CONTEXTS,
    DTYPES,
    FITS,
    KV_DTYPES,
    OFFLOADS,
    QUANTIZATIONS,
    SELECTIONS,
    SETTINGS,
    TEXT_QUANTIZATIONS,
    GenerateRequest,
    MemoryOptions,
    Options,
    PlanRequest,
    parse_lora,
)
from packforcing_cli.errors import PackforcingError, UsageError
from packforcing_cli.layout import POLICIES
from packforcing_cli.timeline import Place, Problem, Timeline

FORMATS = ("auto", "jsonl", "csv", "text")
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv"}
"""Endings of manifests; any other one is text."""
MAX_BYTES = 1 << 30
MAX_LISTED = 1000  # problems in one message
HINT = "`packforcing batch schema` prints what a line may have."
_SCHEMA_URL = "https://json-schema.org/draft/2020-12/schema"

_OF_THE_BATCH = ("output", "title")
_STORY = ("at", "pin")
_PICTURES = ("image", "pin_image", "lora", "frames", "timeline", "parity")
GENERATE_KEYS = ("prompt", *SETTINGS, *_PICTURES, *_STORY, *_OF_THE_BATCH)
_LISTS = ("at", "pin", "pin_image", "lora")
HIDDEN = ".packforcing"
"""The folder, beside the videos, of run folders and logs."""
_CHOICES: Mapping[str, Sequence[str]] = {
    "policy": POLICIES,
    "select": SELECTIONS,
    "compressed_context": COMPRESSED_CONTEXTS,
    "kv_dtype": KV_DTYPES,
    "bank_device": BANK_DEVICES,
    "quantize": QUANTIZATIONS,
    "quantize_text": TEXT_QUANTIZATIONS,
    "offload": OFFLOADS,
    "attention": ATTENTIONS,
    "codec": CODECS,
    "fit": FITS,
    "dtype": DTYPES,
    "parity": ("paper",),
}


class ExtendRequest(Options):
    """What `packforcing extend` needs to know.

    source:    a run's id or folder, a video made here, or any other video file.
    seconds:   length of the new part, in whole blocks.
    start:     where to branch off, a time; None = the end.
    prompt:    what the new part shows; None = as before.
    timeline:  prompts and pins after it.
    seed:      of the new part; None = as before, or for a video made elsewhere chosen for it.
    device:    None = as before, or auto.
    output:    the new file.
    overwrite: replace an existing output.
    model:     for a video made elsewhere; one from a run keeps its own.
    size:      (width, height) in pixels, for a video made elsewhere.
    fit:       how the pictures of a video made elsewhere come to that size: crop, pad or stretch.
    from_time: use a video made elsewhere from there; None = its beginning.
    to_time:   use a video made elsewhere up to there; None = its end.
    only_new:  write the new part without a source made elsewhere.
    guard:     what happens to an unhealthy block of the new part; None = as before, or warn.
    codec:     of the new file; None = as before, or h264.
    crf:       quality of the new file, 0 (lossless) to 51; None = as before, or 18.
    preset:    of the encoder; None = as before, or its usual one.
    metadata:  write into the file how it was made; None = as before, or yes.
    frames:    folder that gets every frame as a PNG, too.
    snapshot_every: blocks between two exact snapshots in the run folder; None = as before, or none.
    """

    source: str
    seconds: float
    start: str | None = None
    prompt: str | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    device: str | None = None
    overwrite: bool = False
    model: str | None = None
    size: tuple[int, int] | None = None
    fit: str | None = None
    from_time: str | None = None
    to_time: str | None = None
    only_new: bool = False
    guard: str | None = None
    codec: str | None = None
    crf: int | None = Field(None, ge=0, le=51)
    preset: str | None = None
    metadata: bool | None = None
    frames: Path | None = None
    snapshot_every: int | None = Field(None, ge=1)

    @field_validator("source")
    @classmethod
    def _source(cls, value: str) -> str:
        if not value.strip() or "\0" in value:
            raise ValueError("is empty" if "\0" not in value else "has a NUL character in it")
        return value

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("is empty")
        return value

    @field_validator("start", "from_time", "to_time", mode="before")
    @classmethod
    def _time(cls, value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, str | int | float | None):
            raise ValueError("is no time; write 0:12, or seconds as 12.5")
        if value is not None:
            timelines.parse_time(str(value).strip())
        return None if value is None else str(value).strip()

    @field_validator("seconds", "device", "model", "size", "fit", "guard", "codec", mode="before")
    @classmethod
    def _as_in_generate(cls, value: object, info: Any) -> object:
        if value is not None:
            return getattr(GenerateRequest(prompt="x", **{info.field_name: value}), info.field_name)
        return value


EXTEND_KEYS = (
    *("from" if name == "start" else name for name in ExtendRequest.model_fields),
    *_STORY,
    *_OF_THE_BATCH,
)
_NAME_OF_FIELD = {"start": "from", "pin_images": "pin_image", "loras": "lora"}


@dataclass(frozen=True)
class Line:
    """A job as it was written, checked.

    index:   of the job, from 1.  line: where it begins in the manifest, from 1.
    values:  key -> value as written, defaults included; JSON values.
    request: what it asks for. The prompts of a `timeline` file are not in it yet.
    output:  the file's name as written; None = from the template.
    title:   what lists show and the file is called after, if it is not the prompt.
    columns: where each key stands in the line, from 1.
    problem: why it cannot be planned, found after it was read.
    """

    index: int
    line: int
    values: Mapping[str, Any]
    request: GenerateRequest | ExtendRequest
    timeline: Timeline
    output: str | None = None
    title: str | None = None
    columns: Mapping[str, int] = field(default_factory=dict)
    problem: PackforcingError | None = None

    @property
    def shown(self) -> str:
        """Title, prompt or source, printable, at most 80 characters."""
        request = self.request
        text = self.title or request.prompt or str(getattr(request, "source", ""))
        return printable(text, 80)


def printable(text: str, length: int | None = None) -> str:
    """Text that does nothing to a terminal: control and format characters as escapes, in one line.

    Args:
        length: longer text is cut there.
    """
    safe = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in " ".join(text.split(" "))
    )
    return safe if length is None or len(safe) <= length else safe[: length - 1] + "…"


def inside(name: str) -> str:
    """What is wrong with a name that must stay in a folder; empty if it does."""
    path = Path(name)
    if path.is_absolute() or name.startswith(("/", "\\", "~")) or ":" in name.split("/")[0][:2]:
        return "leads out of the folder of the batch"
    if ".." in path.parts or "\\" in name:
        return "leads out of the folder of the batch"
    if path.parts and path.parts[0].lower() == HIDDEN:
        return f"lies in {HIDDEN}, which is not for videos"
    if not name.isprintable():
        return "has a character that cannot be printed"
    return ""


def kind_of(source: str, data: bytes, *, wanted: str = "auto") -> str:
    """The format of a manifest: as wanted, by the name's ending, or for a stream by the first character.

    Raises: UsageError for an unknown format.
    """
    if wanted not in FORMATS:
        raise UsageError(f"--format {wanted}: must be one of {', '.join(FORMATS)}")
    if wanted != "auto":
        return wanted
    suffix = Path(source).suffix.lower()
    if suffix in KINDS:
        return KINDS[suffix]
    is_object = data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"
    return "jsonl" if is_object and not suffix else "text"


def parse(
    data: bytes, *, source: str, kind: str, defaults: Mapping[str, Any] | None = None
) -> tuple[Line, ...]:
    """The jobs of a manifest.

    Args:
        data:     the whole of it, UTF-8.
        source:   its name, for messages.
        kind:     jsonl, csv or text.
        defaults: key -> value for lines that do not say otherwise; keys that a line's kind does not have are left out.
    Raises: UsageError with every mistake in it, or if there is no job at all.
    """
    if len(data) > MAX_BYTES:
        raise UsageError(f"{source} has {len(data):,} bytes: that is no manifest")
    problems: list[Problem] = []
    reader = {"jsonl": _json_lines, "csv": _csv_rows, "text": _text_lines}[kind]
    lines: list[Line] = []
    for entry in reader(data.removeprefix(b"\xef\xbb\xbf"), source, problems):
        made = _line(entry, len(lines) + 1, source, defaults or {}, problems)
        if made is not None:
            lines.append(made)
    raise_if_any(problems)
    if not lines:
        raise UsageError(f"{source} has no job in it", hint="A line of text is a prompt. " + HINT)
    return tuple(lines)


def of_values(
    jobs: Sequence[Mapping[str, Any] | str], *, defaults: Mapping[str, Any] | None = None
) -> tuple[Line, ...]:
    """Jobs given as values: a prompt, or keys and values as in JSON Lines; "line" in a message is the job's number.

    Raises: UsageError with every mistake, or if there is no job.
    """
    problems: list[Problem] = []
    lines = []
    for number, values in enumerate(jobs, 1):
        entry = _Entry(number, {"prompt": values} if isinstance(values, str) else dict(values), {})
        if made := _line(entry, number, "jobs", defaults or {}, problems):
            lines.append(made)
    raise_if_any(problems)
    if not lines:
        raise UsageError("there is no job", hint='For example [{"prompt": "a red circle", "seconds": 5}].')
    return tuple(lines)


def raise_if_any(problems: Sequence[Problem]) -> None:
    """Raises: UsageError that lists the problems in the order they were written, if there are any."""
    if not problems:
        return
    ordered = [printable(str(problem)) for problem in sorted(problems, key=lambda problem: problem.place)]
    if len(ordered) == 1:
        raise UsageError(ordered[0], hint=HINT)
    more = [f"and {len(ordered) - MAX_LISTED} more"] if len(ordered) > MAX_LISTED else []
    listed = "\n  ".join([*ordered[:MAX_LISTED], *more])
    raise UsageError(f"{len(ordered)} problems, nothing was started:\n  {listed}", hint=HINT)


# ------------------------------------------------------------------------------------------------------ the formats


@dataclass(frozen=True)
class _Entry:
    """Keys and values of a line, and the column where each key stands."""

    line: int
    values: dict[str, Any]
    columns: Mapping[str, int]


def _decoded_lines(data: bytes, source: str, problems: list[Problem]) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines that are UTF-8."""
    for number, raw in enumerate(data.split(b"\n"), 1):
        try:
            yield number, raw.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            column = len(raw[: error.start].decode("utf-8", errors="replace")) + 1
            problems.append(Problem(Place(source, number, column), "not UTF-8 text"))


def _text_lines(data: bytes, source: str, problems: list[Problem]) -> Iterator[_Entry]:
    for number, text in _decoded_lines(data, source, problems):
        if text.strip() and not text.lstrip().startswith("#"):
            column = len(text) - len(text.lstrip()) + 1
            yield _Entry(number, {"prompt": text.strip()}, {"prompt": column})


def _json_lines(data: bytes, source: str, problems: list[Problem]) -> Iterator[_Entry]:
    for number, text in _decoded_lines(data, source, problems):
        if not text.strip():
            continue
        try:
            values, columns, twice = _json_object(text)
        except json.JSONDecodeError as error:
            said = error.msg[:1].lower() + error.msg[1:]
            problems.append(Problem(Place(source, number, error.pos + 1), f"not JSON: {said}"))
        except (ValueError, RecursionError) as error:
            said = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            problems.append(Problem(Place(source, number), f"not JSON: {said}"))
        else:
            problems += [
                Problem(Place(source, number, column), f"{key!r} is there twice") for key, column in twice
            ]
            yield _Entry(number, values, columns)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)
_SPACE = re.compile(r"[ \t\n\r]*")


def _json_object(text: str) -> tuple[dict[str, Any], dict[str, int], list[tuple[str, int]]]:
    """The values of a JSON object, the column of each key, and keys that are there again.

    Raises: ValueError, a JSONDecodeError where a position is known.
    """
    end = _end_of_space(text, 0)
    if text[end : end + 1] != "{":
        raise json.JSONDecodeError("a line is one object, {…}", text, end)
    values: dict[str, Any] = {}
    columns: dict[str, int] = {}
    twice: list[tuple[str, int]] = []
    end = _end_of_space(text, end + 1)
    closed = text[end : end + 1] == "}"
    while not closed:
        if text[end : end + 1] != '"':
            raise json.JSONDecodeError("a key in double quotes is expected", text, end)
        key, after = _DECODER.raw_decode(text, end)
        if key in columns:
            twice.append((key, end + 1))
        columns[key] = end + 1
        end = _end_of_space(text, after)
        if text[end : end + 1] != ":":
            raise json.JSONDecodeError("':' is expected behind a key", text, end)
        values[key], after = _DECODER.raw_decode(text, _end_of_space(text, end + 1))
        end = _end_of_space(text, after)
        closed = text[end : end + 1] == "}"
        if not closed:
            if text[end : end + 1] != ",":
                raise json.JSONDecodeError("',' or '}' is expected", text, end)
            end = _end_of_space(text, end + 1)
    rest = _end_of_space(text, end + 1)
    if rest != len(text):
        raise json.JSONDecodeError("something is behind the object; one object a line", text, rest)
    return values, columns, twice


def _end_of_space(text: str, start: int) -> int:
    found = _SPACE.match(text, start)
    assert found is not None
    return found.end()


def _csv_rows(data: bytes, source: str, problems: list[Problem]) -> Iterator[_Entry]:
    """Rows of a CSV file; "column" in a problem is the number of the field."""
    bad = len(problems)
    text = "\n".join(text for _, text in _decoded_lines(data, source, problems))
    if len(problems) > bad:
        return  # a line that is left out would move those behind it
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    before = 0
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            problems.append(Problem(Place(source, max(rows.line_num, 1)), f"not CSV: {error}"))
            return
        if row is None:
            return
        start, before = before + 1, rows.line_num
        if not any(cell.strip() for cell in row):
            continue
        if header is None:
            header = [cell.strip() for cell in row]
            for column, key in enumerate(header, 1):
                if not key or key in header[: column - 1]:
                    said = f"{key!r} is there twice" if key else "a column has no name"
                    problems.append(Problem(Place(source, start, column), said))
            continue
        if len(row) > len(header):
            said = f"{len(row)} fields, and the first row has {len(header)}"
            problems.append(Problem(Place(source, start, len(header) + 1), said))
            continue
        columns = {key: column for column, key in enumerate(header, 1)}
        values: dict[str, Any] = {}
        for key, cell in zip(header, row):
            if not cell.strip():
                continue
            values[key] = cell
            if cell.lstrip().startswith("[") and key.replace("-", "_") in (*_LISTS, "size"):
                try:
                    values[key] = json.loads(cell)
                except (ValueError, RecursionError) as error:
                    problems.append(Problem(Place(source, start, columns[key]), f"{key}: not JSON: {error}"))
        yield _Entry(start, values, columns)


# ---------------------------------------------------------------------------------------------------------- a line


def _line(
    entry: _Entry, index: int, source: str, defaults: Mapping[str, Any], problems: list[Problem]
) -> Line | None:
    """The job of a line; what is wrong goes to `problems`."""
    before = len(problems)

    def problem(key: str, said: str) -> None:
        place = Place(source, entry.line, entry.columns.get(key, 1))
        if all((old.place, old.text) != (place, said) for old in problems[before:]):
            problems.append(Problem(place, said))

    written: dict[str, Any] = {}
    name_of: dict[str, str] = {}
    is_extension = "source" in entry.values
    known = EXTEND_KEYS if is_extension else GENERATE_KEYS
    for key, value in entry.values.items():
        name = key.replace("-", "_") if isinstance(key, str) else str(key)
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            other = GENERATE_KEYS if is_extension else EXTEND_KEYS
            of = f"; it belongs to {'generate' if is_extension else 'extend'}" if name in other else ""
            problem(key, f"unknown key {key!r}{of or f'; the nearest known one is {near!r}'}")
        elif name in written:
            problem(key, f"{name!r} is there twice")
        elif value is not None:
            text = _lone_surrogate(value)
            if text:
                problem(key, f"{name}: {text!r} is no text: half of a character")
                continue
            written[name], name_of[name] = value, key
    values = {
        **{name: value for name, value in defaults.items() if name in known and value is not None},
        **written,
    }
    plain = dict(values)
    output, title = (_text(plain, name, problem, name_of) for name in _OF_THE_BATCH)
    said = "" if output is None else inside(output)
    if said:
        problem(name_of.get("output", "output"), f"output {output!r} {said}")
    scenes = _story(plain, problem, name_of)
    if is_extension and "seconds" not in plain:
        problem("source", "seconds is missing: the length of the new part")
        plain["seconds"] = 1.0
    if not is_extension and "prompt" not in plain and "timeline" not in plain:
        if any(not scene.seconds for scene in scenes.scenes):
            plain["prompt"] = "x"
        elif len(problems) == before:
            problem("", "prompt is missing")
    request = _request(plain, is_extension, problem, name_of)
    if len(problems) > before or request is None:
        return None
    if isinstance(request, GenerateRequest):
        if "timeline" not in values:
            request, scenes, said = _first_prompt(request, scenes, "prompt" in values)
            if said:
                problem("at", said)
                return None
        if request.image is not None and request.pin_images:
            problem("pin_image", "image and pin_image both say what block 0 is")
            return None
    return Line(index, entry.line, values, request, scenes, output, title, entry.columns)


def _text(plain: dict[str, Any], name: str, problem: Any, name_of: Mapping[str, str]) -> str | None:
    value = plain.pop(name, None)
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        problem(name_of.get(name, name), f"{name} must be text that is not empty")
        return None
    return value.strip()


def _story(plain: dict[str, Any], problem: Any, name_of: Mapping[str, str]) -> Timeline:
    """Scenes and pins of `at` and `pin`."""
    scenes: list[timelines.Scene] = []
    spans: list[timelines.Span] = []
    for name in _STORY:
        values = plain.pop(name, None)
        for value in [] if values is None else values if isinstance(values, list) else [values]:
            try:
                if name == "pin" and isinstance(value, str):
                    spans += timelines.parse_pins([value])
                elif name == "at" and isinstance(value, str):
                    scenes += timelines.parse_at([value.strip().partition(" ")[::2]])
                elif name == "at" and isinstance(value, dict):
                    scenes += Timeline.from_json({"at": [value], "pins": []}).scenes
                else:
                    example = '"0:12 a blue square"' if name == "at" else '"0:03-0:05"'
                    problem(name_of.get(name, name), f"{name}: {value!r} must be text like {example}")
            except (PackforcingError, ValueError, TypeError, KeyError) as error:
                problem(name_of.get(name, name), _said(error))
    return Timeline(tuple(scenes), tuple(spans))


def _said(error: Exception) -> str:
    """A message of the command line's options as one about a key."""
    text = error.message if isinstance(error, PackforcingError) else str(error)
    text = re.sub(r"^--(at|pin) (.*?), line 1, column (\d+): ", r"\1 \2, character \3: ", text)
    found = re.match(r"--([a-z-]+) ", text)
    return text if found is None else found[1].replace("-", "_") + text[found.end(1) :]


def _request(
    plain: dict[str, Any], is_extension: bool, problem: Any, name_of: Mapping[str, str]
) -> GenerateRequest | ExtendRequest | None:
    """The request of the other keys; each wrong value is a problem of its own."""
    if is_extension:
        fields = {"start" if name == "from" else name: value for name, value in plain.items()}
        return _built(ExtendRequest, fields, {"source": "x", "seconds": 1.0}, problem, name_of)
    fields = {"prompt": "x", **plain}  # one that is missing is a problem already, or in a timeline file
    parity = fields.pop("parity", None)
    if parity not in (None, "paper"):
        problem(name_of.get("parity", ""), f"parity {parity}: must be paper")
    timeline = fields.pop("timeline", None)
    if timeline is not None and (not isinstance(timeline, str) or "\0" in timeline):
        problem(name_of.get("timeline", ""), "timeline must be the name of a file")
    if "pin_image" in fields:
        pictures = fields.pop("pin_image")
        fields["pin_images"] = tuple(pictures) if isinstance(pictures, list) else (pictures,)
    if "lora" in fields:
        fields["loras"] = _loras(fields.pop("lora"), problem, name_of)
    memory_values = {name: fields.pop(name) for name in tuple(fields) if name in MemoryOptions.model_fields}
    memory = _built(MemoryOptions, memory_values, {}, problem, name_of)
    request = _built(GenerateRequest, fields, {"prompt": "x"}, problem, name_of)
    if memory is None or request is None:
        return None
    if parity == "paper":
        memory = memory.paper_parity()
    return request.model_copy(update={"memory": memory}) if memory.model_fields_set else request


def _loras(value: Any, problem: Any, name_of: Mapping[str, str]) -> tuple[str, ...]:
    """Adapters as PATH or PATH:WEIGHT; one that is not is a problem."""
    found = []
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str) or not text.strip() or "\0" in text:
            problem(name_of.get("lora", "lora"), f"lora: {text!r} must be text like RUN/lora or RUN/lora:0.8")
            continue
        try:
            parse_lora(text)
        except UsageError as error:
            problem(name_of.get("lora", "lora"), _said(error))
        except (OSError, ValueError) as error:
            problem(name_of.get("lora", "lora"), f"lora: cannot be looked at: {error}")
        else:
            found.append(text)
    return tuple(found)


def _built(
    kind: type[Any], fields: Mapping[str, Any], needed: Mapping[str, Any], problem: Any, name_of: Any
) -> Any:
    """The request of some values, or None and a problem for each that is wrong."""
    for name, value in fields.items():
        if isinstance(value, bool) and kind.model_fields[name].annotation not in (bool, bool | None):
            problem(
                name_of.get(_key(name), _key(name)),
                f"{_key(name)} {json.dumps(value)}: must not be true or false",
            )
            return None
    try:
        return kind(**fields)
    except PackforcingError as whole:
        found = False
        for name, value in fields.items():
            try:
                kind(**{**needed, name: value})
            except PackforcingError as error:
                key, found = _key(name), True
                problem(name_of.get(key, key), _said(error).replace(f"{name} ", f"{key} ", 1))
        if not found:
            problem("", _said(whole))
    return None


def _key(name: str) -> str:
    return _NAME_OF_FIELD.get(name, name)


def _first_prompt(
    request: GenerateRequest, scenes: Timeline, has_prompt: bool
) -> tuple[GenerateRequest, Timeline, str]:
    """The request with its first prompt, which may be the scene at 0:00, and what is wrong."""
    if has_prompt:
        return request, scenes, ""
    begin = next(scene for scene in scenes.scenes if not scene.seconds)
    if begin.blend or begin.cut or begin.pin is not None:
        return request, scenes, "at 0:00: the first scene has nothing before it"
    rest = tuple(scene for scene in scenes.scenes if scene is not begin)
    return request.model_copy(update={"prompt": begin.prompt}), Timeline(rest, scenes.pins), ""


def with_timeline_file(line: Line) -> Line:
    """The line with the prompts of its timeline file. Raises: UsageError if it cannot be read, or for its mistakes."""
    request = line.request
    if "timeline" not in line.values or not isinstance(request, GenerateRequest):
        return line
    scenes = (*timelines.read(Path(line.values["timeline"])), *line.timeline.scenes)
    story = Timeline(scenes, line.timeline.pins)
    if "prompt" not in line.values and all(scene.seconds for scene in scenes):
        raise UsageError(
            f"{line.values['timeline']} has no scene at 0:00, and the line no prompt",
            hint="Add one of them.",
        )
    request, story, said = _first_prompt(request, story, "prompt" in line.values)
    if said:
        raise UsageError(said)
    return replace(line, request=request, timeline=story)


def _lone_surrogate(value: Any) -> str:
    """The first text in a JSON value that cannot be written as UTF-8; empty if there is none."""
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, str):
            try:
                part.encode()
            except UnicodeEncodeError:
                return part.encode("utf-8", "backslashreplace").decode()[:40]
        elif isinstance(part, dict):
            left += [*part, *part.values()]
        elif isinstance(part, list):
            left += part
    return ""


# --------------------------------------------------------------------------------------------------------- the schema


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a line."""
    generate = {name: _schema_of(name) for name in GENERATE_KEYS}
    extend = {name: _schema_of(name, ExtendRequest) for name in EXTEND_KEYS}
    return {
        "$schema": _SCHEMA_URL,
        "title": "a job of packforcing batch",
        "description": "One line of a JSON Lines manifest. null is the same as leaving a key away.",
        "oneOf": [
            {
                "title": "generate",
                "type": "object",
                "properties": generate,
                "anyOf": [{"required": [name]} for name in ("prompt", "timeline", "at")],
                "additionalProperties": False,
            },
            {
                "title": "extend",
                "type": "object",
                "properties": extend,
                "required": ["source", "seconds"],
                "additionalProperties": False,
            },
        ],
    }


_OWN_SCHEMAS: Mapping[str, dict[str, Any]] = {
    "size": {
        "anyOf": [
            {"type": "string", "pattern": "^ *[0-9]+ *[xX×] *[0-9]+ *$"},
            {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 2, "maxItems": 2},
        ],
        "description": "width and height in pixels: 832x480",
    },
    "mid_span": {"type": ["number", "string"], "description": "a number, a fraction, block or fit"},
    "bank_memory": {
        "anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}],
        "description": "the most memory the bank may take: bytes, or a size such as 8GB, 500MB or 2GiB",
    },
    "bank": {
        "anyOf": [{"type": "integer", "minimum": 1}, {"const": "unlimited"}],
        "description": "compressed blocks kept",
    },
    "at": {
        "type": ["array", "string"],
        "items": {"type": ["string", "object"]},
        "description": 'prompts over time: "0:12 a blue square [blend 1s]"',
    },
    "pin": {
        "type": ["array", "string"],
        "items": {"type": "string"},
        "description": 'stretches that are always recalled: "0:03-0:05"',
    },
    "pin_image": {
        "type": ["array", "string"],
        "items": {"type": "string"},
        "description": "pictures held for a block each, which the video begins with and always remembers",
    },
    "lora": {
        "type": ["array", "string"],
        "items": {"type": "string"},
        "description": "adapters as PATH or PATH:WEIGHT, added to the model's weights",
    },
    "timeline": {"type": "string", "description": "a file with prompts over time: text, TOML or SRT"},
    "parity": {"const": "paper", "description": "select by affinity in the first pass, full span"},
    "output": {"type": "string", "description": "the file's name, in the folder of the batch"},
    "title": {"type": "string", "description": "what lists show and the file is called after"},
    "from": {"type": ["string", "number"], "description": "where to branch off, 12.5 or 0:40"},
    "from_time": {"type": ["string", "number"], "description": "use the source from there"},
    "to_time": {"type": ["string", "number"], "description": "use the source up to there"},
    "seconds": {"type": "number", "exclusiveMinimum": 0, "description": "length; a video has whole blocks"},
}


def _schema_of(name: str, kind: type[Options] = GenerateRequest) -> dict[str, Any]:
    """The schema of a key, described as the request's docstring describes it."""
    if name in _OWN_SCHEMAS:
        return _OWN_SCHEMAS[name]
    owner = kind if name in kind.model_fields else MemoryOptions
    field = owner.model_fields[name]
    annotation: Any = field.annotation
    schema = TypeAdapter(annotation).json_schema()
    options = [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]
    found = dict(options[0])
    found.pop("format", None)
    for limit in field.metadata:
        for ours, theirs in (("ge", "minimum"), ("le", "maximum"), ("lt", "exclusiveMaximum")):
            if hasattr(limit, ours):
                found[theirs] = getattr(limit, ours)
    if name in _CHOICES:
        found["enum"] = list(_CHOICES[name])
    said = next(filter(None, (_described(part, name) for part in (owner, PlanRequest, GenerateRequest))), "")
    return {**found, **({"description": said} if said else {})}


def _described(kind: type[Options], name: str) -> str:
    """What a request's docstring says of a field: its lines "name: text" and those that go on."""
    found: list[str] = []
    for line in (kind.__doc__ or "").splitlines():
        key = re.match(r"\s*(\w+):\s+", line)
        if key is not None:
            if found:
                break
            found = [line[key.end() :]] if key[1] == name else []
        elif found:
            found.append(line)
    return " ".join(" ".join(found).split())


def seconds_of(line: Line) -> Fraction:
    """Length that is asked for: of the whole video, or of the new part."""
    return Fraction(line.request.seconds)
