"""Work that the model does not wait for: a second stream of the GPU, and stage times that stop nothing.

    model    | denoise i | clean i | denoise i+1 ............. | compress i | clean i+1 | ...
    beside               | decode i, frames i, LR branch of i |
    host                                       look at i, hand i on

What runs beside reads the clean block and nothing that the model writes, so its results are those of the serial
order. A tensor that crosses from one stream to the other is recorded in both: its memory is not given away while
the other one still reads it. Without a second stream everything runs at once, in the order it is given.
Knows nothing of blocks, caches or codecs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from packforcing_cli.staging import Mark

RUN = 3  # blocks in a row that `Faster` makes one way; the first of them overlaps the run before and is not timed
ORDER = (False, True, True, False)  # what grows evenly from block to block weighs equally on both


def memory_allows(device: torch.device) -> bool:
    """Whether a GPU has room for a second line of work, which shares no freed memory with the first.

    Asked before the first block: weights and cache are there, the work is not. At the shapes of Wan2.1-1.3B and its VAE
    both lines together take about three quarters of what is there (planner.py's figures); as much must be free.
    """
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return free >= torch.cuda.memory_allocated(device)


class Beside:
    """A second line of work.

    used: whether there is one; it takes a GPU.
    """

    def __init__(self, device: torch.device, *, used: bool) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if used and device.type == "cuda" else None

    def mark(self) -> Mark:
        """A point in the current line of work."""
        return Mark(self._device)

    @contextmanager
    def work(self, *reads: Tensor | None, since: Mark | None = None) -> Iterator[None]:
        """Give it work: what is called inside runs there, after `since`, None = all the model has been given so far.

        reads: tensors of the model's line that this work reads.
        """
        if self._stream is None:
            yield
            return
        (since or self.mark()).before(self._stream)
        for tensor in reads:
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield

    def hand_over(self, done: Mark, *tensors: Tensor | None) -> None:
        """Let the model read tensors that were made beside, before `done`."""
        if self._stream is None:
            return
        done.before(None)
        for tensor in tensors:
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(self._device))


class Stopwatch:
    """Seconds of named stages; on a GPU those of the stream a stage runs in, and nothing waits until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._open: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stage(self, name: str, *, on_host: bool = False) -> Iterator[None]:
        """Time a stage. on_host: it is work of the CPU, wherever the model is."""
        self._seconds.setdefault(name, 0.0)
        if self._device.type != "cuda" or on_host:
            start = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(torch.cuda.current_stream(self._device))
        yield
        end.record(torch.cuda.current_stream(self._device))
        self._open.append((name, begin, end))

    @property
    def seconds(self) -> dict[str, float]:
        """Of each stage so far; the host waits for the end of those that are not over."""
        for name, begin, end in self._open:
            end.synchronize()
            self._seconds[name] += begin.elapsed_time(end) / 1000
        self._open.clear()
        return dict(self._seconds)

    @property
    def rounded(self) -> dict[str, float]:
        """Seconds to the microsecond, as they are written down."""
        return {name: round(value, 6) for name, value in self.seconds.items()}


class Faster:
    """Which of two ways of making blocks takes less time here; their results are the same.

    wanted: None = measure; some blocks are made both ways in turn. Else: that way.
    """

    def __init__(self, wanted: bool | None, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._wanted, self._clock = wanted, clock
        self._took: list[list[float]] = [[]]  # of each run so far, the last one being made
        self._row: list[float] = []  # when the blocks of this run began that followed one another
        self._last: int | None = None

    @property
    def wanted(self) -> bool | None:
        """The way that is known to be wanted, None while it is being measured."""
        return self._wanted

    def choose(self, block: int, *, settled: bool = True) -> bool:
        """The way of a block; call it at the same point of every block.

        What a block took is the time to the next one; where a number is left out it is not known, and the run goes on
        after it. The median of these times counts, so that one disturbance decides nothing.
        settled: whether blocks take from now on what they will take; until then they are made in order, untimed.
        """
        if self._wanted is not None:
            return self._wanted
        if not settled:
            return False
        now = self._clock()
        if self._last != block - 1:
            self._row = []
        if len(self._row) > 1:  # the first one overlaps what was before
            self._took[-1].append(now - self._row[-1])
        if len(self._took[-1]) == RUN - 1:
            if len(self._took) == len(ORDER):
                self._wanted = self._median(True) < self._median(False)
                return self._wanted
            self._took.append([])
            self._row = []
        self._row.append(now)
        self._last = block
        return ORDER[len(self._took) - 1]

    def _median(self, way: bool) -> float:
        """Seconds of a block made this way."""
        return statistics.median(
            took for of, run in zip(ORDER, self._took, strict=True) if of is way for took in run
        )
