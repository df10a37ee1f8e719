"""Showing files on their way: a bar per file and one for all on a terminal, plain lines elsewhere. On stderr."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

PLAIN_EVERY_SECONDS = 10.0


class Transfers:
    """Gets told the bytes of each file as they come. Use it as a context.

    sizes: bytes of the files that are known before; others join when they begin.
    """

    def __init__(self, *, quiet: bool, sizes: Mapping[str, int] | None = None) -> None:
        from packforcing_cli.cli import console

        self._sizes = dict(sizes or {})
        self._done: dict[str, int] = {}
        self._quiet = quiet
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._said, self._done_then = time.monotonic(), 0
        self._draws = not quiet and console.draws_in_place()

    def __enter__(self) -> Self:
        if self._draws:
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            from packforcing_cli.cli import console

            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=console.talk(),
                redirect_stdout=False,
            )
            self._bars.start()
            self._tasks[""] = self._bars.add_task("all files", total=sum(self._sizes.values()) or None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def advance(self, name: str, size_bytes: int) -> None:
        """So many more bytes of a file are there; negative when it begins again."""
        self._done[name] = self._done.get(name, 0) + size_bytes
        if self._bars is not None:
            self._draw(name, size_bytes)
        elif not self._quiet:
            self._tell(name)

    def _draw(self, name: str, size_bytes: int) -> None:
        if name not in self._tasks:
            short = name if len(name) <= 50 else f"…{name[-49:]}"
            self._tasks[name] = self._bars.add_task(short, total=self._sizes.get(name))
        self._bars.advance(self._tasks[name], size_bytes)
        self._bars.advance(self._tasks[""], size_bytes)
        if self._done[name] == self._sizes.get(name):
            self._bars.remove_task(self._tasks.pop(name))

    def _tell(self, name: str) -> None:
        from packforcing_cli.cli import console

        now = time.monotonic()
        if now - self._said < PLAIN_EVERY_SECONDS:
            return
        done, total = sum(self._done.values()), sum(self._sizes.values())
        of = f" of {console.gb(total)}" if total else ""
        speed = console.gb(max(0, int((done - self._done_then) / (now - self._said))))
        console.say(f"{console.gb(done)}{of}, {speed}/s; {name}")
        self._said, self._done_then = now, done
