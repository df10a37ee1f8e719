"""Showing a generation while it runs: a live display, plain lines, one JSON event a line, or nothing. All on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from packforcing_cli.planner import Plan
    from packforcing_cli.rollout import Block, Result

MODES = ("auto", "rich", "plain", "json", "none")
PLAIN_EVERY_SECONDS = 5.0


class Progress(Protocol):
    """Gets told what happens; shows it."""

    def start(self, plan: Plan) -> None: ...
    def block(self, block: Block, seconds: float) -> None: ...
    def done(self, result: Result) -> None: ...
    def stop(self) -> None: ...


def choose(mode: str, *, quiet: bool, device_memory: Callable[[], tuple[int, int]]) -> Progress:
    """The display of a mode; auto is rich on a terminal and plain lines otherwise.

    Args:
        device_memory: -> (bytes in use on the device, bytes of this process), asked at every update.
    Raises: UsageError for an unknown mode.
    """
    from packforcing_cli.cli import console
    from packforcing_cli.errors import UsageError

    if mode not in MODES:
        raise UsageError(f"--progress {mode}: unknown", hint=f"Choose one of {', '.join(MODES)}.")
    if mode == "none" or (quiet and mode == "auto"):
        return _Silent()
    if mode == "json":
        return _JsonLines(device_memory)
    if mode == "rich" or (mode == "auto" and console.draws_in_place()):
        return _Live(device_memory)
    return _Plain(device_memory)


class _Silent:
    def start(self, plan: Plan) -> None: ...
    def block(self, block: Block, seconds: float) -> None: ...
    def done(self, result: Result) -> None: ...
    def stop(self) -> None: ...


class _Meter:
    """Figures of a running generation."""

    def __init__(self, plan: Plan, device_memory: Callable[[], tuple[int, int]]) -> None:
        self.plan = plan
        self.device_memory = device_memory
        self.blocks = 0
        self.seconds = 0.0
        self.steady: list[float] = []

    def add(self, seconds: float) -> None:
        self.blocks += 1
        self.seconds += seconds
        self.steady = [*self.steady, seconds][-20:]

    @property
    def block_seconds(self) -> float:
        return sum(self.steady) / len(self.steady)

    def video_seconds(self, blocks: int) -> float:
        return self.plan.layout.frames_for(blocks) / self.plan.fps if blocks else 0.0

    @property
    def eta(self) -> float:
        return (self.plan.blocks - self.blocks) * self.block_seconds

    @property
    def fps(self) -> float:
        grid = self.plan.layout.grid
        return grid.block_frames(1) / self.block_seconds

    def full_bytes(self) -> int:
        grid = self.plan.layout.grid
        return self.blocks * grid.block_tokens * grid.bytes_per_token

    def spans(self, recalled: tuple[int, ...]) -> str:
        """Seconds of the past that were recalled, as ranges: "0:03-0:05, 0:09"."""
        runs: list[list[int]] = []
        for block in recalled:
            if runs and block == runs[-1][1] + 1:
                runs[-1][1] = block
            else:
                runs.append([block, block])
        shown = [f"{_clock(self.video_seconds(a))}–{_clock(self.video_seconds(b + 1))}" for a, b in runs]
        return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")

    def memory_lines(self, block: Block) -> list[tuple[str, str]]:
        from packforcing_cli.cli.console import gb

        cache, grid = block.cache, self.plan.layout.grid
        full, small = grid.block_tokens * grid.bytes_per_token, grid.compressed_tokens * grid.bytes_per_token
        active = block.selected.shape[1]
        device, host = self.device_memory()
        used = (len(cache.sink) + len(cache.recent)) * full + active * small
        return [
            (
                "KV memory",
                f"sink {gb(len(cache.sink) * full)} · mid {active}/{len(cache.bank)} blocks"
                f" {gb(active * small)}/{gb(len(cache.bank) * small)} · recent {gb(len(cache.recent) * full)}",
            ),
            ("", f"attended {gb(used + full)}, held {gb(cache.bytes.live)}; a full cache: {gb(self.full_bytes())}"),
            ("memory", (f"device {gb(device)} · " if device else "") + f"host {gb(host)}"),
            ("recalled", self.spans(block.recalled) or "nothing compressed yet"),
        ]


class _Plain:
    def __init__(self, device_memory: Callable[[], tuple[int, int]]) -> None:
        self._device_memory = device_memory
        self._shown = 0.0

    def start(self, plan: Plan) -> None:
        self._meter = _Meter(plan, self._device_memory)

    def block(self, block: Block, seconds: float) -> None:
        from packforcing_cli.cli import console

        meter = self._meter
        meter.add(seconds)
        last = meter.blocks == meter.plan.blocks
        if not last and meter.blocks > 1 and meter.seconds - self._shown < PLAIN_EVERY_SECONDS:
            return
        self._shown = meter.seconds
        made, total = meter.video_seconds(meter.blocks), meter.video_seconds(meter.plan.blocks)
        kv = meter.memory_lines(block)
        console.say(
            f"block {meter.blocks}/{meter.plan.blocks}  {_clock(made)} of {_clock(total)}"
            f"  {1 / meter.block_seconds:.2f} blocks/s  {meter.fps:.1f} FPS  ETA {_clock(meter.eta)}"
            f"  {kv[0][1]}"
        )

    def done(self, result: Result) -> None: ...
    def stop(self) -> None: ...


class _JsonLines:
    def __init__(self, device_memory: Callable[[], tuple[int, int]]) -> None:
        self._device_memory = device_memory

    def _event(self, name: str, **values: Any) -> None:
        sys.stderr.write(json.dumps({"event": name, **values}) + "\n")
        sys.stderr.flush()

    def start(self, plan: Plan) -> None:
        self._meter = _Meter(plan, self._device_memory)
        self._event("start", blocks=plan.blocks, frames=plan.frames, fps=plan.fps, seconds=plan.exact_seconds)

    def block(self, block: Block, seconds: float) -> None:
        self._meter.add(seconds)
        device, host = self._device_memory()
        self._event(
            "block",
            index=block.index,
            seconds=round(seconds, 4),
            stages={name: round(value, 4) for name, value in block.seconds.items()},
            eta_seconds=round(self._meter.eta, 2),
            fps=round(self._meter.fps, 2),
            kv_bytes={**asdict(block.cache.bytes), "live": block.cache.bytes.live},
            full_cache_bytes=self._meter.full_bytes(),
            bank_blocks=len(block.cache.bank),
            recalled=list(block.recalled),
            device_memory_bytes=device,
            host_memory_bytes=host,
        )

    def done(self, result: Result) -> None:
        self._event("done", path=str(result.path), frames=result.frames, stopped=result.stopped)

    def stop(self) -> None: ...


class _Live:
    def __init__(self, device_memory: Callable[[], tuple[int, int]]) -> None:
        self._device_memory = device_memory

    def start(self, plan: Plan) -> None:
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn

        from packforcing_cli.cli import console

        self._meter = _Meter(plan, self._device_memory)
        self._bar = Progress(TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.fields[text]}"))
        self._task = self._bar.add_task("video", total=plan.blocks, text="first block …")
        self._live = Live(self._bar, console=console.talk(), refresh_per_second=8)
        self._live.start()

    def block(self, block: Block, seconds: float) -> None:
        from rich.console import Group
        from rich.table import Table

        meter = self._meter
        meter.add(seconds)
        made, total = meter.video_seconds(meter.blocks), meter.video_seconds(meter.plan.blocks)
        text = (
            f"{_clock(made)} of {_clock(total)} · {1 / meter.block_seconds:.2f} blocks/s · {meter.fps:.1f} FPS"
            f" · ETA {_clock(meter.eta)}"
        )
        self._bar.update(self._task, completed=meter.blocks, text=text)
        table = Table.grid(padding=(0, 2))
        for name, value in meter.memory_lines(block):
            table.add_row(f"[dim]{name}[/]", value)
        self._live.update(Group(self._bar, table))

    def done(self, result: Result) -> None: ...

    def stop(self) -> None:
        if hasattr(self, "_live"):
            self._live.stop()


def _clock(seconds: float) -> str:
    """Seconds as 0:07 or 1:02:03."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
