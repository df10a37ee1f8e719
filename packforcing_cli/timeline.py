"""Prompts over time: parse `--at`, `--pin` and timeline files; place them on the blocks of a video.

A timeline file is one of (by its ending; anything else is text):

    text     0:12 a blue square moving up [blend 1s] [pin]      one scene a line; # starts a comment line
             0:20.5 night falls [cut]
    .toml    [[at]]                                             time: text or seconds, prompt, and as wanted
             time = "0:12"                                      blend = "1s" or seconds, cut = true,
             prompt = "a blue square"                           pin = true or "2s"
    .srt     00:00:12,000 --> 00:00:20,000                      SubRip; the lines of a cue are one prompt, which
             a blue square [blend 1s]                           goes on until the next cue

    [blend 1s]  the embeddings move from the prompt before to this one over that time
    [cut]       recent frames are left behind, sinks and compressed memory stay
    [pin]       the first block that has the prompt alone is always recalled; [pin 2s] pins that much from there

A prompt that itself ends in brackets has a backslash before them: "a sign \\[cut]". In TOML it needs none.

A prompt takes over at the block boundary nearest to its time. Block n of a blend over N blocks (n = 1..N) reads

    (1 - w) * embeddings before + w * embeddings of this prompt,   w = n / (N + 1)

and the block after it this prompt alone. Mistakes are collected and reported together, with line and column.
Knows integers, fractions and text; no tensors.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from packforcing_cli.errors import UsageError
from packforcing_cli.layout import Lengths

HINT = (
    'For example --at 0:12 "a blue square [blend 1s]", or a line "0:12 a blue square [blend 1s]" in a file.'
)
MAX_SHOWN = 20  # problems in one message
MAX_FILE_BYTES = 10_000_000
OPTIONS = ("blend", "cut", "pin")

_CLOCK = re.compile(r"(?:(?:([0-9]{1,6}):)?([0-9]{1,6}):)?([0-9]{1,8}(?:[.,][0-9]{1,9})?)(s?)")
_LAST_OPTION = re.compile(r"(?<!\\)\[([^\[\]]*)\]\s*$")
_BRACKETS_BEHIND = re.compile(r"\[[^\[\]]*\]$")
_ARROW = re.compile(r"\s*(\S+)\s+-->\s+(\S+)")
_TOML_ENTRY = re.compile(r"^[ \t]*\[\[[ \t]*at[ \t]*\]\]", re.MULTILINE)
_TOML_PLACE = re.compile(r"\(at line ([0-9]+), column ([0-9]+)\)")


@dataclass(frozen=True, order=True)
class Place:
    """Where something was written: file or option, line and column from 1."""

    source: str
    line: int = 1
    column: int = 1


@dataclass(frozen=True)
class Problem:
    """One mistake."""

    place: Place
    text: str

    def __str__(self) -> str:
        return f"{self.place.source}, line {self.place.line}, column {self.place.column}: {self.text}"


@dataclass(frozen=True)
class Scene:
    """A prompt from some time on.

    seconds: when it takes over.
    prompt:  its text; white space of any kind and length becomes one space.
    blend:   seconds over which it does so.
    cut:     whether recent frames are left behind.
    pin:     seconds to pin from where the prompt stands alone; 0 = its first block; None = nothing.
    """

    seconds: Fraction
    prompt: str
    blend: Fraction = Fraction(0)
    cut: bool = False
    pin: Fraction | None = None
    place: Place = field(default=Place("--at"), compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", " ".join(self.prompt.split()))

    @property
    def text(self) -> str:
        """Prompt and options as they are written behind the time."""
        words = [_BRACKETS_BEHIND.sub(r"\\\g<0>", self.prompt)]
        if self.blend:
            words.append(f"[blend {clock(self.blend)}]")
        if self.cut:
            words.append("[cut]")
        if self.pin is not None:
            words.append(f"[pin {clock(self.pin)}]" if self.pin else "[pin]")
        return " ".join(words)

    def to_json(self) -> dict[str, str | bool]:
        """What a TOML timeline has under [[at]]."""
        values: dict[str, str | bool] = {"time": clock(self.seconds), "prompt": self.prompt}
        values |= {"blend": clock(self.blend)} if self.blend else {}
        values |= {"cut": True} if self.cut else {}
        values |= {} if self.pin is None else {"pin": clock(self.pin) if self.pin else True}
        return values


@dataclass(frozen=True)
class Span:
    """A stretch of the video, in seconds; the end is not part of it."""

    start: Fraction
    end: Fraction
    place: Place = field(default=Place("--pin"), compare=False)

    @property
    def text(self) -> str:
        return f"{clock(self.start)}-{clock(self.end)}"


@dataclass(frozen=True)
class Script:
    """A timeline in blocks.

    prompts: of each scene.
    starts:  first block of each scene, rising from 0.
    blends:  blocks over which the scene takes over; 0 = at once.
    cuts:    blocks that do not see the recent blocks before them.
    pins:    blocks that are recalled always.
    """

    prompts: tuple[str, ...]
    starts: tuple[int, ...] = (0,)
    blends: tuple[int, ...] = (0,)
    cuts: tuple[int, ...] = ()
    pins: frozenset[int] = frozenset()

    def scene(self, block: int) -> int:
        """Number of the scene a block belongs to, its blend included."""
        return sum(start <= block for start in self.starts) - 1

    def weight(self, block: int) -> Fraction:
        """Share of the scene's own prompt in a block; the rest is the prompt before. 1 outside of blends."""
        scene = self.scene(block)
        place = block - self.starts[scene]
        return Fraction(1) if place >= self.blends[scene] else Fraction(place + 1, self.blends[scene] + 1)

    @property
    def changes(self) -> tuple[tuple[int, str], ...]:
        """(first block, prompt) of the first prompt and of every change of it."""
        return tuple(
            (start, prompt)
            for n, (start, prompt) in enumerate(zip(self.starts, self.prompts, strict=True))
            if n == 0 or prompt != self.prompts[n - 1]
        )


@dataclass(frozen=True)
class Timeline:
    """What was asked for over time: scenes after the first prompt, and pins. Empty is possible."""

    scenes: tuple[Scene, ...] = ()
    pins: tuple[Span, ...] = ()

    def script(
        self,
        prompt: str,
        lengths: Lengths,
        *,
        fps: int,
        num_blocks: int,
        start: int = 0,
        late: Fraction = Fraction(0),
    ) -> Script:
        """Place everything on blocks.

        Args:
            prompt: of the first scene.
            start:  blocks before this one are given already: scenes begin in it or later.
            late:   seconds of the file before the first frame of the memory; messages name times of the file.
        Raises: UsageError naming all that is past the end or overlaps.
        """
        problems: list[Problem] = []

        def told(seconds: Fraction) -> str:
            return clock(seconds + late)

        starts, blends, prompts, pins = [0], [0], [prompt], set[int]()
        cuts: list[int] = []
        length = Fraction(lengths.frames_for(num_blocks), fps)
        free = max(1, start)  # the first block that the next scene may begin in
        for scene in sorted(self.scenes, key=lambda scene: scene.seconds):
            block = lengths.nearest_block(scene.seconds, fps)
            blend = blend_blocks(scene.blend, lengths, fps=fps)
            alone = block + blend
            if block >= num_blocks:
                last = lengths.frames_for(num_blocks - 1)
                problems.append(
                    Problem(
                        scene.place,
                        f"{told(scene.seconds)} is past the end: the video is {told(length)} long"
                        f" and its last block begins at {told(Fraction(last, fps))}",
                    )
                )
                continue
            if block < free:
                begins = told(Fraction(lengths.frames_for(free), fps))
                problems.append(
                    Problem(
                        scene.place,
                        f"{told(scene.seconds)} overlaps with what is there before: prompts change with whole"
                        f" blocks, here at {begins} at the earliest",
                    )
                )
            if alone > num_blocks:
                problems.append(Problem(scene.place, f"the blend of {clock(scene.blend)} goes past the end"))
                continue
            if scene.pin is not None:
                end = lengths.frames_for(alone) + max(1, math.ceil(scene.pin * fps))
                last = lengths.block_at(end - 1)
                if last >= num_blocks:
                    problems.append(Problem(scene.place, "the pin goes past the end"))
                    continue
                pins.update(range(alone, last + 1))
            starts.append(block)
            blends.append(blend)
            prompts.append(scene.prompt)
            if scene.cut:
                cuts.append(block)
            free = max(free, block + 1, alone)
        for span in self.pins:
            if span.end > length:
                problems.append(
                    Problem(span.place, f"{span.text} is past the end: the video is {clock(length)} long")
                )
                continue
            first = lengths.block_at(math.floor(span.start * fps))
            pins.update(range(first, lengths.block_at(math.ceil(span.end * fps) - 1) + 1))
        raise_if_any(problems)
        return Script(tuple(prompts), tuple(starts), tuple(blends), tuple(cuts), frozenset(pins))

    def until(self, end: Fraction, lengths: Lengths, *, fps: int) -> Timeline:
        """What of it happens before a time; pins that go on are cut there.

        A scene stays if the block it takes over in begins before `end`.
        """
        scenes = []
        for scene in self.scenes:
            block = lengths.nearest_block(scene.seconds, fps)
            if Fraction(lengths.frames_for(block), fps) >= end:
                continue
            alone = Fraction(lengths.frames_for(block + blend_blocks(scene.blend, lengths, fps=fps)), fps)
            if scene.pin is not None:
                pin = min(scene.pin, _written(end - alone))
                scene = replace(scene, pin=pin if alone < end else None)
            scenes.append(scene)
        pins = (replace(span, end=min(span.end, _written(end))) for span in self.pins if span.start < end)
        return Timeline(tuple(scenes), tuple(pins))

    def moved(self, by: Fraction) -> Timeline:
        """All of it so many seconds later; pins that would begin before 0 begin there."""
        return Timeline(
            tuple(replace(scene, seconds=scene.seconds + by) for scene in self.scenes),
            tuple(
                replace(span, start=max(Fraction(0), span.start + by), end=span.end + by)
                for span in self.pins
            ),
        )

    def arguments(self) -> list[str]:
        """The options of a command that say the same."""
        words: list[str] = []
        for scene in self.scenes:
            words += ["--at", clock(scene.seconds), scene.text]
        for span in self.pins:
            words += ["--pin", span.text]
        return words

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `from_json`: scenes as in a TOML timeline, pins as `--pin` takes them."""
        return {"at": [scene.to_json() for scene in self.scenes], "pins": [span.text for span in self.pins]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Timeline:
        """Read back `to_json`. Raises: UsageError if it is something else."""
        entries, pins = values.get("at", []), values.get("pins", [])
        lists = isinstance(entries, list) and isinstance(pins, list)
        if not lists or not all(isinstance(entry, dict) for entry in entries):
            raise UsageError("this is no timeline: it needs a list of scenes and a list of pins")
        problems: list[Problem] = []
        scenes = [_toml_scene(entry, Place("--at"), problems) for entry in entries]
        raise_if_any(problems)
        return cls(tuple(scene for scene in scenes if scene is not None), parse_pins(map(str, pins)))


# -------------------------------------------------------------------------------------------------------- seconds


def _written(seconds: Fraction) -> Fraction:
    """The longest time up to this one that `clock` writes exactly: a rounded one could reach into the next frame."""
    return Fraction(math.floor(seconds * 10**9), 10**9)


def blend_blocks(seconds: Fraction, lengths: Lengths, *, fps: int) -> int:
    """Blocks over which a blend of so many seconds goes; 0 without one, else at least one."""
    if not seconds:
        return 0
    return max(1, math.floor(seconds * fps / lengths.block_frames(1) + Fraction(1, 2)))


def clock(seconds: Fraction) -> str:
    """Seconds as "0:12" or "1:02:03.5": what `parse_time` reads back, to a billionth."""
    whole = math.floor(seconds)
    rest = f"{float(round(seconds - whole, 9)):.9f}".rstrip("0").rstrip(".")
    if rest.startswith("1"):
        whole, rest = whole + 1, "0"
    hours, minutes = divmod(whole // 60, 60)
    text = f"{hours}:{minutes:02}" if hours else f"{minutes}"
    return f"{text}:{whole % 60:02}{rest[1:]}"


# -------------------------------------------------------------------------------------------------------- parsing


def parse_time(text: str) -> Fraction:
    """Seconds of "1:02:03.5", "0:12", "12.5" or "12s".

    Raises: ValueError, saying what is wrong.
    """
    found = _CLOCK.fullmatch(text)
    if found is None or (found[2] is not None and found[4]):
        raise ValueError(f"{_shown(text)} is no time; write 0:12, 1:02:03.5 or 12s")
    hours, minutes, rest = found[1], found[2], Fraction(found[3].replace(",", "."))
    if (minutes is not None and rest >= 60) or (hours is not None and int(minutes) >= 60):
        raise ValueError(f"{_shown(text)} is no time: minutes and seconds go up to 59")
    return int(hours or 0) * 3600 + int(minutes or 0) * 60 + rest


def parse_scene(seconds: Fraction, text: str, place: Place, problems: list[Problem]) -> Scene | None:
    """A scene from a prompt and the options behind it; what is wrong goes to `problems`.

    Args:
        place: of the text's first character.
    """
    before = len(problems)
    found: dict[str, Fraction] = {}
    while option := _LAST_OPTION.search(text):
        at = Place(place.source, place.line, place.column + option.start())
        name, _, value = option[1].strip().partition(" ")
        if name not in OPTIONS:
            near = difflib.get_close_matches(name, OPTIONS, n=1)
            meant = f"; did you mean [{near[0]}]?" if near else "; known are [blend 1s], [cut] and [pin]"
            meant += "" if near else "; brackets that belong to the prompt are written as \\[…]"
            problems.append(Problem(at, f"unknown option {_shown(option[0])}{meant}"))
        elif name in found:
            problems.append(Problem(at, f"[{name}] is there twice"))
        elif (name == "cut" and value) or (name == "blend" and not value.strip()):
            problems.append(Problem(at, f"write it as {'[blend 1s]' if name == 'blend' else '[cut]'}"))
        else:
            try:
                found[name] = parse_time(value.strip()) if value.strip() else Fraction(0)
            except ValueError as error:
                problems.append(Problem(at, str(error)))
        text = text[: option.start()]
    if not text.strip():
        problems.append(Problem(place, "there is no prompt"))
    if found.get("blend") and "cut" in found:
        problems.append(Problem(place, "[cut] and [blend] contradict each other"))
    if len(problems) > before:
        return None
    said = re.sub(r"\\(?=\[[^\[\]]*\]\s*$)", "", text)
    return Scene(seconds, said, found.get("blend", Fraction(0)), "cut" in found, found.get("pin"), place)


def parse_at(pairs: Iterable[Sequence[str]]) -> tuple[Scene, ...]:
    """Scenes of `--at TIME PROMPT`. Raises: UsageError with every mistake."""
    scenes: list[Scene] = []
    problems: list[Problem] = []
    for time, text in pairs:
        source = f"--at {_shown(time)}"
        try:
            seconds = parse_time(time.strip())
        except ValueError as error:
            problems.append(Problem(Place(source), str(error)))
            continue
        _add(scenes, parse_scene(seconds, " ".join(text.split()), Place(source), problems))
    raise_if_any(problems)
    return tuple(scenes)


def parse_pins(texts: Iterable[str]) -> tuple[Span, ...]:
    """Spans of `--pin 0:03-0:05`. Raises: UsageError with every mistake."""
    spans, problems = [], []
    for text in texts:
        place = Place(f"--pin {_shown(text)}")
        first, dash, last = text.partition("-")
        try:
            if not dash:
                raise ValueError("a pin is a stretch of time, for example 0:03-0:05")
            span = Span(parse_time(first.strip()), parse_time(last.strip()), place)
            if span.start >= span.end:
                raise ValueError("a pin ends after it begins")
            spans.append(span)
        except ValueError as error:
            problems.append(Problem(place, str(error)))
    raise_if_any(problems, hint="For example --pin 0:03-0:05.")
    return tuple(spans)


def read(path: Path) -> tuple[Scene, ...]:
    """Scenes of a timeline file. Raises: UsageError if it cannot be read, or with every mistake in it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"the timeline {path} cannot be read: {error.strerror}", hint="Check the path."
        ) from error
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(f"the timeline {path} has {len(data):,} bytes: that is no timeline", hint=HINT)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        column = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
        raise UsageError(
            f"{path}, line {line}, column {column}: not UTF-8 text", hint="Save the file as UTF-8."
        ) from error
    return parse(text, source=str(path), kind=path.suffix.lower())


def parse(text: str, *, source: str, kind: str = "") -> tuple[Scene, ...]:
    """Scenes of a timeline file's text.

    Args:
        source: its name, for messages.
        kind:   ".toml", ".srt", or anything else for lines of text.
    Raises: UsageError with every mistake; also if there is no scene at all.
    """
    problems: list[Problem] = []
    text = text.replace("\r\n", "\n")
    known = {".toml": _parse_toml, ".srt": _parse_srt}
    scenes = known.get(kind, _parse_text)(text, source, problems)
    if not scenes and not problems:
        problems.append(Problem(Place(source), "there is no scene in it"))
    raise_if_any(problems)
    return tuple(scenes)


def raise_if_any(problems: Sequence[Problem], *, hint: str = HINT) -> None:
    """Raises: UsageError that lists the problems in the order they were written, if there are any."""
    if not problems:
        return
    ordered = [str(problem) for problem in sorted(problems, key=lambda problem: problem.place)]
    if len(ordered) == 1:
        raise UsageError(ordered[0], hint=hint)
    more = [f"and {len(ordered) - MAX_SHOWN} more"] if len(ordered) > MAX_SHOWN else []
    lines = "\n  ".join([*ordered[:MAX_SHOWN], *more])
    raise UsageError(f"{len(ordered)} problems:\n  {lines}", hint=hint)


def _parse_text(text: str, source: str, problems: list[Problem]) -> list[Scene]:
    scenes: list[Scene] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        indent = len(line) - len(line.lstrip())
        time = line.split()[0]
        place = Place(source, number, indent + 1)
        try:
            seconds = parse_time(time)
        except ValueError as error:
            problems.append(Problem(place, str(error)))
            continue
        rest = line[indent + len(time) :]
        column = indent + len(time) + len(rest) - len(rest.lstrip()) + 1
        _add(scenes, parse_scene(seconds, rest.strip(), Place(source, number, column), problems))
    return scenes


def _parse_srt(text: str, source: str, problems: list[Problem]) -> list[Scene]:
    scenes: list[Scene] = []
    ends: list[tuple[Fraction, Fraction, Place]] = []
    lines = text.split("\n")
    number = 0
    while number < len(lines):
        if not lines[number].strip():
            number += 1
            continue
        cue = number
        while number < len(lines) and lines[number].strip():
            number += 1
        cue += lines[cue].strip().isdecimal()  # the cue's own number
        arrow = _ARROW.match(lines[cue]) if cue < number else None
        if arrow is None:
            problems.append(Problem(Place(source, min(cue, number - 1) + 1), "a line with --> is expected"))
            continue
        times = []
        for group in (1, 2):
            try:
                times.append(parse_time(arrow[group]))
            except ValueError as error:
                problems.append(Problem(Place(source, cue + 1, arrow.start(group) + 1), str(error)))
        if len(times) < 2:
            continue
        place = Place(source, cue + 1, arrow.start(1) + 1)
        if times[0] >= times[1]:
            problems.append(Problem(place, "a cue ends after it begins"))
            continue
        ends.append((times[0], times[1], place))
        said = " ".join(" ".join(lines[cue + 1 : number]).split())
        _add(scenes, parse_scene(times[0], said, Place(source, min(cue + 2, len(lines))), problems))
    latest = Fraction(0)
    for start, end, place in sorted(ends):
        if start < latest:
            problems.append(
                Problem(place, f"{clock(start)} overlaps: a cue before it ends at {clock(latest)}")
            )
        latest = max(latest, end)
    return scenes


def _parse_toml(text: str, source: str, problems: list[Problem]) -> list[Scene]:
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = _TOML_PLACE.search(str(error))
        last = text.rsplit("\n", 1)[-1]
        end = Place(source, text.count("\n") + 1, len(last) + 1)
        place = Place(source, int(found[1]), int(found[2])) if found else end
        problems.append(Problem(place, _TOML_PLACE.sub("", str(error)).strip()))
        return []
    except (RecursionError, ValueError) as error:  # nested beyond reason; a number or date out of range
        problems.append(Problem(Place(source), f"not TOML: {error}"))
        return []
    entries = table.pop("at", [])
    for name in table:
        problems.append(Problem(_toml_place(text, source, name), f"unknown name {_shown(name)}; use [[at]]"))
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        problems.append(Problem(_toml_place(text, source, "at"), "write scenes as [[at]]"))
        return []
    heads = [text.count("\n", 0, found.start()) + 1 for found in _TOML_ENTRY.finditer(text)]
    scenes: list[Scene] = []
    for n, entry in enumerate(entries):
        place = Place(source, heads[n] if len(heads) == len(entries) else 1)
        _add(scenes, _toml_scene(entry, place, problems))
    return scenes


def _toml_scene(entry: dict[str, Any], place: Place, problems: list[Problem]) -> Scene | None:
    before = len(problems)
    known = ("time", "prompt", *OPTIONS)
    for name in entry:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)
            problems.append(
                Problem(place, f"unknown name {_shown(name)}; the nearest known one is {near[0]}")
            )

    def seconds(name: str) -> Fraction:
        value = entry[name]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            problems.append(Problem(place, f"{name} must be a time, not {_shown(str(value))}"))
            return Fraction(0)
        try:
            return parse_time(value.strip() if isinstance(value, str) else f"{value:.9f}")
        except (ValueError, OverflowError) as error:
            problems.append(Problem(place, f"{name}: {error}"))
            return Fraction(0)

    time = Fraction(0)
    if "time" in entry:
        time = seconds("time")
    else:
        problems.append(Problem(place, "time is missing"))
    prompt = entry.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        problems.append(Problem(place, "prompt is missing or empty"))
        prompt = ""
    cut = entry.get("cut", False)
    if not isinstance(cut, bool):
        problems.append(Problem(place, "cut must be true or false"))
    blend = seconds("blend") if "blend" in entry else Fraction(0)
    pin: Fraction | None = None
    if "pin" in entry and entry["pin"] is not False:
        pin = Fraction(0) if entry["pin"] is True else seconds("pin")
    if blend and cut:
        problems.append(Problem(place, "cut and blend contradict each other"))
    if len(problems) > before:
        return None
    return Scene(time, prompt, blend, bool(cut), pin, place)


def _toml_place(text: str, source: str, name: str) -> Place:
    """Where a top-level name stands, as far as the text shows."""
    for number, line in enumerate(text.split("\n"), start=1):
        if name in line:
            return Place(source, number, line.index(name) + 1)
    return Place(source)


def _add(scenes: list[Scene], scene: Scene | None) -> None:
    if scene is not None:
        scenes.append(scene)


def _shown(text: str) -> str:
    """A piece of somebody's text in a message, cut to one line."""
    line = "".join(c if c.isprintable() else "?" for c in text)
    return f"'{line[:40]}…'" if len(line) > 40 else f"'{line}'"
