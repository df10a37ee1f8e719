"""A call made by a thread of its own, while its caller does something else first.

    caller   ahead = Ahead(call) | something else ............. | ahead.result()
    thread                       | call(check) ..... its result, or its error

Knows nothing of models.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Self, TypeVar

R = TypeVar("R")
TICK_SECONDS = (
    0.1  # after so long a waiting thread looks for signals, on systems where waiting is deaf to them
)


class _GivenUpError(BaseException):
    """Nobody wants the result any more. No `Exception`: nothing between handles it."""


class Ahead(Generic[R]):
    """Use it as a context: left without a result having been taken, the call is given up and its end waited for."""

    def __init__(self, call: Callable[[Callable[[], None]], R], *, name: str) -> None:
        """Begin.

        Args:
            call: gets a function that it calls now and then; once the result is not wanted any more that raises.
            name: of the thread.
        """
        self._call = call
        self._given_up = threading.Event()
        self._results: list[R] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give_up()

    def _run(self) -> None:
        try:
            self._results.append(self._call(self._check))
        except BaseException as error:  # it is the caller's
            self._error = error

    def _check(self) -> None:
        if self._given_up.is_set():
            raise _GivenUpError

    def result(self) -> R:
        """What the call returns, once; raises what it raises. Waits for its end; Ctrl-C is heard meanwhile."""
        self._wait()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._results.pop()

    def give_up(self) -> None:
        """End the call at its next look, and drop what it made. Returns when it is over; its error is dropped, too."""
        self._given_up.set()
        self._wait()
        self._error = None
        self._results.clear()

    def _wait(self) -> None:
        while self._thread.is_alive():
            self._thread.join(TICK_SECONDS)
