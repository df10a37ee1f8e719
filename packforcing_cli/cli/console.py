"""Talking to people and programs: talk goes to stderr through rich, results go to stdout.

NO_COLOR and TERM=dumb switch colours off (rich looks at them); with CI or TERM=dumb nothing is drawn in place either.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from rich.console import RenderableType

    from packforcing_cli.errors import PackforcingError

WIDTH_WITHOUT_TERMINAL = 110


def draws_in_place(stream: TextIO | None = None) -> bool:
    """Whether progress may redraw itself on a stream (default stderr): a real terminal, and not CI."""
    stream = sys.stderr if stream is None else stream
    if os.environ.get("CI", "").lower() not in ("", "0", "false") or os.environ.get("TERM") == "dumb":
        return False
    return stream.isatty()


def talk() -> Console:
    """A console on stderr, for everything that is not the result."""
    return _console(sys.stderr)


def say(text: str) -> None:
    """One line to the person, plain text."""
    talk().print(text, markup=False, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """One warning line to the person."""
    talk().print(f"[yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True)


def report(error: PackforcingError, *, debug: bool = False) -> None:
    """Message and next step of an expected failure."""
    if debug:
        traceback.print_exception(error)
    console = talk()
    console.print(f"[bold red]error:[/] {escape(error.message)}", highlight=False, soft_wrap=True)
    if error.hint:
        console.print(f"  [cyan]→[/] {escape(error.hint)}", highlight=False, soft_wrap=True)


def report_unexpected(error: BaseException, *, debug: bool = False) -> None:
    """One line about a failure nobody foresaw, and how to see more."""
    if debug:
        traceback.print_exception(error)
    said = " ".join(str(error).split()) or "no message"
    more = "" if debug else " (set PACKFORCING_DEBUG=1 to see where)"
    talk().print(
        f"[bold red]unexpected error:[/] {type(error).__name__}: {escape(said)}{more}",
        highlight=False,
        soft_wrap=True,
    )


def result(text: str) -> None:
    """The result of a command, to stdout as it is."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def result_json(values: Mapping[str, Any]) -> None:
    """The result of a command as JSON."""
    result(json.dumps(values, indent=2, ensure_ascii=False))


def result_table(table: RenderableType) -> None:
    """A result for people to read, to stdout; without a terminal as plain text."""
    _console(sys.stdout).print(table, highlight=False)


def gb(size_bytes: int) -> str:
    """Bytes for people: 3.99 GB, 33.5 MB, 512 B (decimal units)."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size_bytes >= scale:
            value = size_bytes / scale
            return f"{value:.2f} {unit}" if value < 10 else f"{value:.1f} {unit}"
    return f"{size_bytes} B"


def duration(seconds: float) -> str:
    """Seconds for people: 45 s, 2 min, 1 h 30 min; fractions are kept below a minute."""
    if seconds < 60:
        return f"{seconds:g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours} h" if hours else "", f"{minutes} min" if minutes else "", f"{rest} s" if rest else ""]
    return " ".join(part for part in parts if part)


def _console(stream: TextIO) -> Console:
    width = None if stream.isatty() else WIDTH_WITHOUT_TERMINAL
    return Console(file=stream, width=width, force_interactive=draws_in_place(stream))
