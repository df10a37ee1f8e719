"""Showing a training while it runs: a live display on a terminal, a line now and then elsewhere. All on stderr.

Gets told the lines of the training's log; knows no recipe.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import RenderableType

LINE_EVERY_SECONDS = 10.0
SPEED_WINDOW_SECONDS = 60.0
CALIBRATION_STEPS = 10


def choose(steps: int, *, silent: bool) -> Lines:
    """The display of a run of so many steps: it redraws itself where stderr is a terminal."""
    from packforcing_cli.cli import console

    return Live(steps) if not silent and console.draws_in_place() else Lines(steps, silent=silent)


class Meter:
    """How fast the newest steps were, and what that says of the rest."""

    def __init__(self, steps: int) -> None:
        self.steps, self.step = steps, 0
        self._begun: tuple[float, int] | None = None
        self._marks: list[tuple[float, int]] = []  # (time, step) of the newest steps
        self._told = False

    def start(self, step: int) -> None:
        """Steps begin, after so many that were done before."""
        self.step, self._begun = step, (time.monotonic(), step)
        self._marks = [self._begun]

    def add(self, step: int) -> None:
        """A step is done."""
        now = time.monotonic()
        self.step = step
        self._marks = [m for m in self._marks if now - m[0] < SPEED_WINDOW_SECONDS] or self._marks[-1:]
        self._marks.append((now, step))

    def pause(self) -> None:
        """Something else than steps was done meanwhile: its time is none of theirs."""
        self._marks = [(time.monotonic(), self.step)]

    @property
    def step_seconds(self) -> float | None:
        """Of the newest steps; None if that is not known yet."""
        if not self._marks:
            return None
        (then, first), (now, last) = self._marks[0], self._marks[-1]
        return None if last == first else (now - then) / (last - first)

    @property
    def speed(self) -> str:
        """ "4.20 s a step, 1:45:00 left"; empty if it is not known yet."""
        from packforcing_cli.cli.progress import clock

        each = self.step_seconds
        return "" if each is None else f"{each:.2f} s a step, {clock((self.steps - self.step) * each)} left"

    def calibrated(self) -> str:
        """What the first steps say of the whole run; once, else empty."""
        from packforcing_cli.cli.progress import clock

        if self._begun is None or self._told or self.step >= self.steps:
            return ""
        (then, first), done = self._begun, self.step - self._begun[1]
        if done < CALIBRATION_STEPS:
            return ""
        self._told = True
        each = (time.monotonic() - then) / done
        whole = "the whole run" if not first else f"the {self.steps - first:,} steps from {first:,} on"
        return (
            f"time         about {clock((self.steps - first) * each)} for {whole}, by its first {done} steps"
            f" ({each:.2f} s each); evaluations and samples come on top"
        )


class Lines:
    """Turns the lines of a training's log into a line for people now and then; `say` is for the talk around it."""

    def __init__(self, steps: int, *, silent: bool) -> None:
        self.silent = silent
        self._meter = Meter(steps)
        self._shown = float("-inf")

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def say(self, text: str) -> None:
        """One line to the person."""
        from packforcing_cli.cli import console

        if not self.silent:
            console.say(text)

    def stopping(self, text: str) -> None:
        """Say that the run will stop; called from a signal handler, so it must not touch Python's streams."""
        from packforcing_cli.cli.progress import write_at_once

        if not self.silent:
            write_at_once(text)

    def stop(self) -> None:
        """Show nothing more; calling it again does no harm."""

    def __call__(self, record: dict[str, Any]) -> None:
        event = record.get("event")
        if event is not None:
            self._event(str(event), {n: v for n, v in record.items() if n not in ("event", "seconds")})
            return
        step = int(record["step"])
        self._meter.add(step)
        if said := self._meter.calibrated():
            self.say(said)
        self._step(step, {name: value for name, value in record.items() if name not in ("step", "seconds")})

    def _step(self, step: int, figures: dict[str, Any]) -> None:
        now, steps = time.monotonic(), self._meter.steps
        if step < steps and now - self._shown < LINE_EVERY_SECONDS:
            return
        self._shown = now
        speed = self._meter.speed
        self.say(f"step {step}/{steps}: {figures_text(figures)}{f'; {speed}' if speed else ''}")

    def _event(self, event: str, record: dict[str, Any]) -> None:
        if event == "pool":
            self.say("scenes are rendered and encoded, once for this folder …")
        elif event == "start":
            self._meter.start(int(record["step"]))
            if record["step"]:
                self.say(f"{record['step']} of {self._meter.steps} steps done already")
        elif event == "changed":
            self.say(f"warning: from step {record['step']} on other facts hold: {_changes(record['facts'])}")
        elif event in ("evaluate", "samples"):
            step = record.pop("step")
            said = "evaluated" if event == "evaluate" else "before training" if not step else "at the end"
            self._meter.pause()
            self.say(f"step {step}, {said}: {figures_text(record)}")


class Live(Lines):
    """A display that redraws itself on a terminal: bar, loss and its parts, rate, memory, time left."""

    def __init__(self, steps: int) -> None:
        super().__init__(steps, silent=False)
        self._live: Any = None
        self._figures: dict[str, Any] = {}
        self._stopping = ""

    def say(self, text: str) -> None:
        if self._live is None:
            super().say(text)
        else:  # above the display
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stopping(self, text: str) -> None:
        if self._live is None:
            super().stopping(text)
        else:
            self._stopping = text  # drawn by the next refresh

    def stop(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _step(self, step: int, figures: dict[str, Any]) -> None:
        self._figures = figures

    def _event(self, event: str, record: dict[str, Any]) -> None:
        super()._event(event, record)
        if event == "start":
            self._open()
        elif event == "done":
            self.stop()

    def _open(self) -> None:
        from rich.live import Live as RichLive

        from packforcing_cli.cli import console

        if self._live is None:
            self._live = RichLive(
                console=console.talk(),
                get_renderable=self._draw,
                refresh_per_second=4,
                redirect_stdout=False,  # stdout is for the result
            )
            self._live.start()

    def _draw(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        meter = self._meter
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        bar.add_row(
            ProgressBar(total=meter.steps, completed=meter.step), f"step {meter.step:,} of {meter.steps:,}"
        )
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        parts = {name: value for name, value in self._figures.items() if name != "loss"}
        loss = (
            f"{self._figures['loss']:.4g}" if "loss" in self._figures else "the first steps are being made …"
        )
        table.add_row("loss", loss)
        if parts:
            table.add_row("parts", Text(figures_text(parts)))
        if meter.speed:
            table.add_row("rate", meter.speed)
        table.add_row("memory", _memory())
        if self._stopping:
            table.add_row("", Text(self._stopping, style="yellow"))
        return Group(bar, table)


def figures_text(values: dict[str, Any]) -> str:
    """Named numbers as text; a table among them in brackets."""
    return ", ".join(
        f"{name} ({figures_text(value)})" if isinstance(value, dict) else f"{name} {value:.4g}"
        for name, value in values.items()
    )


def _changes(facts: dict[str, list[Any]]) -> str:
    return "; ".join(f"{name} {then!r} then, {now!r} now" for name, (then, now) in facts.items())


def _memory() -> str:
    """What this process takes now, on the device and in host memory."""
    import torch

    from packforcing_cli.cli.console import gb
    from packforcing_cli.cli.generate import memory_reader

    device, host = memory_reader("cuda" if torch.cuda.is_available() else "cpu")()
    return (f"device {gb(device)}, " if device else "") + f"host {gb(host)}"
