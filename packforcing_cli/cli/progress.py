"""Showing a generation while it runs: a live display, plain lines, one JSON event a line, or nothing. All on stderr.

A display also carries the talk around the run (`note`, `warn`, `error`), so that with --progress json every line of
stderr is an event.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from packforcing_cli.errors import PackforcingError
    from packforcing_cli.planner import Plan
    from packforcing_cli.rollout import Block, Result

MODES = ("auto", "rich", "plain", "json", "none")
PLAIN_EVERY_SECONDS = 5.0
PLAIN_EVERY_SHARE = 0.05  # of the time so far: a run of hours writes no thousands of lines
SPANS_SHOWN = 6

MemoryReader = Callable[[], tuple[int, int]]
"""-> (bytes in use on the accelerator, 0 without one; bytes of this process)."""


def choose(mode: str, *, quiet: bool, verbose: bool = False) -> Display:
    """The display of a mode; auto is rich on a terminal and plain lines otherwise, and nothing when quiet.

    verbose: plain lines also tell what was recalled, and where the scores said nothing.
    Raises: UsageError for an unknown mode.
    """
    import difflib

    from packforcing_cli.cli import console
    from packforcing_cli.errors import UsageError

    if mode not in MODES:
        near = difflib.get_close_matches(mode, MODES, n=1)
        raise UsageError(
            f"--progress {mode}: must be one of {', '.join(MODES)}"
            + (f"; did you mean {near[0]}?" if near else ""),
            hint="For example --progress plain.",
        )
    if mode == "none" or (quiet and mode == "auto"):
        return Display(quiet=quiet)
    if mode == "json":
        return _JsonLines(quiet=quiet)
    if mode == "rich" or (mode == "auto" and console.draws_in_place()):
        return _Live(quiet=quiet)
    return _Plain(quiet=quiet, verbose=verbose)


class Display:
    """Gets told what happens. This one shows no progress, only the talk, and not even that when quiet."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet

    def note(self, text: str) -> None:
        """Say one line."""
        from packforcing_cli.cli import console

        if not self.quiet:
            console.say(text)

    def warn(self, text: str) -> None:
        """Say one line of warning."""
        from packforcing_cli.cli import console

        if not self.quiet:
            console.warn(text)

    def error(self, error: PackforcingError) -> bool:
        """Show a failure. Returns: whether it was shown; if not, the caller lets it rise."""
        return False

    def stage(self, text: str) -> None:
        """What goes on before the first block."""

    def start(self, plan: Plan, memory: MemoryReader) -> None:
        """The first block begins."""

    def block(self, block: Block, seconds: float) -> None:
        """A block is there, made in so many seconds."""

    def stopping(self, text: str) -> None:
        """Say that the run will stop; called from a signal handler, so it must not touch Python's streams."""
        if not self.quiet:
            write_at_once(text)

    def done(self, result: Result) -> None:
        """The file is finished."""

    def stop(self) -> None:
        """Show nothing more; calling it again does no harm."""


class _Meter:
    """Figures of a running generation."""

    def __init__(self, plan: Plan, memory: MemoryReader) -> None:
        self.plan = plan
        self.memory = memory
        self.blocks = 0
        self.seconds = 0.0
        self._newest: list[float] = []
        self._replaying = False

    def add(self, block: Block, seconds: float) -> None:
        self.blocks = block.index + 1
        self.seconds += seconds
        if self._replaying and not block.replayed:
            self._newest.clear()  # other work than before
        self._replaying = block.replayed
        self._newest = [*self._newest, seconds][-20:]

    @property
    def block_seconds(self) -> float:
        """Mean of the newest blocks."""
        return max(sum(self._newest) / len(self._newest), 1e-9)

    @property
    def eta(self) -> float:
        return (self.plan.blocks - self.blocks) * self.block_seconds

    @property
    def fps(self) -> float:
        return self.plan.layout.grid.block_frames(1) / self.block_seconds

    @property
    def done_of_total(self) -> str:
        made, total = self.video_seconds(self.blocks), self.video_seconds(self.plan.blocks)
        return f"{clock(made)} of {clock(total)}"

    @property
    def speed(self) -> str:
        return f"{1 / self.block_seconds:.2f} blocks/s, {self.fps:.1f} FPS, {clock(self.eta)} left"

    def video_seconds(self, blocks: int) -> float:
        return self.plan.layout.frames_for(blocks) / self.plan.fps if blocks else 0.0

    def full_bytes(self, blocks: int) -> int:
        """Keys and values of so many blocks, had they all been kept at full resolution."""
        grid = self.plan.layout.grid
        return blocks * grid.block_tokens * grid.bytes_per_token

    def partitions(self, block: Block) -> str:
        from packforcing_cli.cli.console import gb

        cache, grid = block.cache, self.plan.layout.grid
        full, small = grid.block_tokens * grid.bytes_per_token, grid.compressed_tokens * grid.bytes_per_token
        active = block.selected.shape[1]
        return (
            f"sink {gb(len(cache.sink) * full)}, mid {active} of {len(cache.bank)} blocks"
            f" {gb(active * small)} / {gb(len(cache.bank) * small)}, recent {gb(len(cache.recent) * full)}"
        )

    def total(self, block: Block) -> str:
        from packforcing_cli.cli.console import gb

        full = gb(self.full_bytes(self.plan.blocks))
        return f"{gb(block.cache.bytes.live)} allocated; a full cache for this video: {full}"

    def noticed(self, block: Block, *, degenerate: bool) -> str:
        """What is out of the ordinary about a block made now, empty if nothing is.

        degenerate: also say which layers took the newest blocks because their scores said nothing.
        """
        said = [" and ".join(block.flags)] if block.flags else []
        said += [f"attempt {block.retry + 1} is kept"] if block.retry else []
        if degenerate and block.record.degenerate:
            layers = ", ".join(str(layer) for layer in block.record.degenerate)
            said.append(f"scores of layers {layers} say nothing: the newest blocks were recalled")
        if not said or block.replayed:
            return ""
        return f"block {block.index} ({clock(self.video_seconds(block.index))}): {'; '.join(said)}"

    def spans(self, recalled: tuple[int, ...]) -> str:
        """Seconds of the past that were recalled, as ranges: "0:03–0:05, 0:09–0:10"."""
        runs: list[list[int]] = []
        for block in recalled:
            if runs and block == runs[-1][1] + 1:
                runs[-1][1] = block
            else:
                runs.append([block, block])
        shown = [f"{clock(self.video_seconds(a))}–{clock(self.video_seconds(b + 1))}" for a, b in runs]
        more = f" and {len(shown) - SPANS_SHOWN} more" if len(shown) > SPANS_SHOWN else ""
        return ", ".join(shown[:SPANS_SHOWN]) + more


class _Plain(Display):
    """A line now and then, for logs and pipes; one at once for a block that is not healthy."""

    def __init__(self, *, quiet: bool, verbose: bool = False) -> None:
        super().__init__(quiet=quiet)
        self._verbose = verbose

    def start(self, plan: Plan, memory: MemoryReader) -> None:
        self._meter = _Meter(plan, memory)
        self._shown = 0.0

    def block(self, block: Block, seconds: float) -> None:
        from packforcing_cli.cli import console

        meter = self._meter
        meter.add(block, seconds)
        if noticed := meter.noticed(block, degenerate=self._verbose):
            self.warn(noticed)
        pause = max(PLAIN_EVERY_SECONDS, PLAIN_EVERY_SHARE * meter.seconds)
        if self._shown and meter.blocks < meter.plan.blocks and meter.seconds - self._shown < pause:
            return
        self._shown = meter.seconds
        console.say(
            f"block {meter.blocks}/{meter.plan.blocks}: {meter.done_of_total}, {meter.speed};"
            f" KV {meter.total(block)} ({meter.partitions(block)})"
            + (f"; recalled {meter.spans(block.recalled)}" if self._verbose and block.recalled else "")
            + (f"; pinned {meter.spans(block.cache.pinned)}" if block.cache.pinned else "")
        )


class _JsonLines(Display):
    """One event a line; `note`, `warning` and `error` are events too."""

    def _event(self, name: str, **values: Any) -> None:
        sys.stderr.write(json.dumps({"event": name, **values}) + "\n")
        sys.stderr.flush()

    def note(self, text: str) -> None:
        if not self.quiet:
            self._event("note", text=text)

    def warn(self, text: str) -> None:
        if not self.quiet:
            self._event("warning", text=text)

    def error(self, error: PackforcingError) -> bool:
        self._event("error", message=error.message, hint=error.hint, exit_code=error.exit_code)
        return True

    def start(self, plan: Plan, memory: MemoryReader) -> None:
        self._meter = _Meter(plan, memory)
        self._event("start", blocks=plan.blocks, frames=plan.frames, fps=plan.fps, seconds=plan.exact_seconds)

    def block(self, block: Block, seconds: float) -> None:
        meter = self._meter
        meter.add(block, seconds)
        device, host = meter.memory()
        self._event(
            "block",
            index=block.index,
            replayed=block.replayed,
            seconds=round(seconds, 4),
            stages={name: round(value, 4) for name, value in block.seconds.items()},
            eta_seconds=round(meter.eta, 2),
            fps=round(meter.fps, 2),
            kv_bytes={**asdict(block.cache.bytes), "live": block.cache.bytes.live},
            full_cache_bytes=meter.full_bytes(meter.blocks),
            bank_blocks=len(block.cache.bank),
            recalled=list(block.recalled),
            pinned=list(block.cache.pinned),
            degenerate_layers=list(block.record.degenerate),
            health=list(block.flags),
            retry=block.retry,
            device_memory_bytes=device,
            host_memory_bytes=host,
        )

    def stopping(self, text: str) -> None:
        write_at_once(json.dumps({"event": "stopping", "text": text}))

    def done(self, result: Result) -> None:
        self._event(
            "done",
            path=str(result.path),
            frames=result.frames,
            stopped=result.stopped,
            figures={
                "total_seconds": round(result.total_seconds, 3),
                **result.timing,
                **result.process_timing,
            },
        )


class _Live(Display):
    """A display that redraws itself on a terminal."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__(quiet=quiet)
        self._live: Any = None
        self._meter: _Meter | None = None
        self._last: Block | None = None
        self._noticed = ""
        self._stage = ""
        self._stopping = ""
        self._since = time.monotonic()

    def stage(self, text: str) -> None:
        self._stage = text
        self._open()

    def start(self, plan: Plan, memory: MemoryReader) -> None:
        self._meter = _Meter(plan, memory)
        self._stage = "first block …"
        self._open()

    def block(self, block: Block, seconds: float) -> None:
        assert self._meter is not None
        self._meter.add(block, seconds)
        self._last = block
        self._noticed = self._meter.noticed(block, degenerate=True) or self._noticed

    def stopping(self, text: str) -> None:
        self._stopping = text  # drawn by the next refresh

    def stop(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.transient = self._last is None  # "loading …" leaves nothing behind
            live.stop()
            if self._last is not None and (live.console.is_dumb_terminal or not live.console.is_terminal):
                live.console.line()  # there the last frame is printed without an end of line

    def _open(self) -> None:
        if self._live is not None:
            return
        from rich.live import Live

        from packforcing_cli.cli import console

        self._live = Live(
            console=console.talk(),
            get_renderable=self._draw,
            refresh_per_second=8,
            redirect_stdout=False,  # stdout is for the result
        )
        self._live.start()

    def _draw(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        from packforcing_cli.cli.console import gb

        meter, block = self._meter, self._last
        lines: list[RenderableType] = []
        if meter is None or block is None:
            lines.append(Text(f"{self._stage} {time.monotonic() - self._since:.0f} s", style="dim"))
        else:
            bar = Table.grid(padding=(0, 2), expand=True)
            bar.add_column(ratio=1)
            bar.add_column(justify="right", no_wrap=True)
            bar.add_row(
                ProgressBar(total=meter.plan.blocks, completed=meter.blocks),
                f"{meter.done_of_total}, block {meter.blocks} of {meter.plan.blocks}",
            )
            lines.append(bar)
            table = Table.grid(padding=(0, 2))
            table.add_column(style="dim", no_wrap=True)
            device, host = meter.memory()
            table.add_row("speed", meter.speed)
            table.add_row("KV memory", meter.partitions(block))
            table.add_row("", meter.total(block))
            table.add_row("memory", (f"device {gb(device)}, " if device else "") + f"host {gb(host)}")
            table.add_row("recalled", meter.spans(block.recalled) or "nothing yet")
            if block.cache.pinned:
                table.add_row("pinned", meter.spans(block.cache.pinned))
            if self._noticed:
                table.add_row("noticed", Text(self._noticed, style="yellow"))
            lines.append(table)
        if self._stopping:
            lines.append(Text(self._stopping, style="yellow"))
        return Group(*lines)


def clock(seconds: float) -> str:
    """Seconds as 0:07 or 1:02:03."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def write_at_once(text: str) -> None:
    """Write a line to stderr past Python's buffers, which a signal may have interrupted in the middle."""
    try:
        os.write(2, (text + "\n").encode())
    except OSError:  # nobody is there to read it
        return
