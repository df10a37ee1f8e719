"""What a training shows of itself: lines, an estimate of the whole run, a display on a terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from packforcing_cli.cli import console, train_progress
from packforcing_cli.cli.train_progress import Lines, Live


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(train_progress, "time", made)
    return made


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(console, "say", lines.append)
    return lines


def run(display: Lines, clock: Clock, *, first: int, last: int, seconds: float, every: int = 10) -> None:
    """The log of steps of so many seconds each."""
    display({"event": "start", "step": first})
    for step in range(first + every, last + 1, every):
        clock.now += seconds * every
        display({"step": step, "seconds": 0, "loss": 0.5, "parts": {"a": 1.0}})


def test_the_first_steps_say_once_how_long_the_whole_run_takes(clock: Clock, said: list[str]) -> None:
    run(Lines(1000, silent=False), clock, first=0, last=40, seconds=3.6)
    told = [line for line in said if line.startswith("time ")]
    assert told == [
        "time         about 1:00:00 for the whole run, by its first 10 steps (3.60 s each);"
        " evaluations and samples come on top"
    ]


def test_a_resumed_run_is_estimated_from_where_it_goes_on(clock: Clock, said: list[str]) -> None:
    run(Lines(1000, silent=False), clock, first=900, last=940, seconds=2.0)
    assert said[0] == "900 of 1000 steps done already"
    assert "about 3:20 for the 100 steps from 900 on, by its first 10 steps" in said[1]


def test_lines_say_speed_and_time_left_without_the_time_of_evaluations(clock: Clock, said: list[str]) -> None:
    lines = Lines(100, silent=False)
    run(lines, clock, first=0, last=20, seconds=2.0)
    assert said[-1] == "step 20/100: loss 0.5, parts (a 1); 2.00 s a step, 2:40 left"
    clock.now += 500
    lines({"event": "evaluate", "step": 20, "seconds": 0, "psnr": 20.0})
    assert said[-1] == "step 20, evaluated: psnr 20"
    clock.now += 20
    lines({"step": 30, "seconds": 0, "loss": 0.25})
    assert said[-1] == "step 30/100: loss 0.25; 2.00 s a step, 2:20 left"


def test_a_silent_display_says_nothing(
    clock: Clock, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("packforcing_cli.cli.progress.write_at_once", said.append)
    lines = train_progress.choose(20, silent=True)
    run(lines, clock, first=0, last=20, seconds=1.0)
    lines.stopping("Stopping")
    assert not said


def test_a_terminal_gets_bar_loss_rate_memory_and_what_was_said(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    monkeypatch.setattr(console, "talk", lambda: screen)
    monkeypatch.setattr(console, "draws_in_place", lambda: True)
    display = train_progress.choose(1000, silent=False)
    assert isinstance(display, Live)
    with display:
        run(display, clock, first=0, last=20, seconds=3.6)
        display.stopping("Stopping after this step")
        plain = Console(file=io.StringIO(), width=100)
        plain.print(display._draw())
    shown = plain.file.getvalue()  # type: ignore[attr-defined]
    for text in (
        "step 20 of 1,000",
        "0.5",
        "3.60 s a step, 58:48 left",
        "host ",
        "B",
        "Stopping after this step",
    ):
        assert text in shown
    output: Any = screen.file
    assert "about 1:00:00 for the whole run" in output.getvalue()
    assert display._live is None
