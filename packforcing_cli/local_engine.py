"""A batch on this machine: worker processes that `Local` starts, looks after and ends.

    this process:  ledger --counts--> State    starts those that are missing, takes back what dead ones held
                   stdin  --drain, stop-->     to each worker; its end is a stop, too
    a worker:      ledger --claim--> Worker    `work`, with a model; writes the ledger itself

Workers end after the block they are at when the process that started them is gone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from packforcing_cli import machine
from packforcing_cli.batch import HIDDEN, POLL_SECONDS, Engine, Folder, LedgerBoard, State
from packforcing_cli.errors import DiskFullError, EnvironmentProblem, PackforcingError
from packforcing_cli.ledger import Ledger
from packforcing_cli.tasks import Options

_MAX_FAST_DEATHS = 3  # workers in a row that end before they began a job

_log = logging.getLogger(__name__)


@dataclass
class _Process:
    process: subprocess.Popen[bytes]
    slot: int
    log: Path
    born: float = field(default_factory=time.monotonic)


class Local(Engine):
    """Worker processes on this machine. They end, after the block, when this process is gone."""

    def __init__(
        self,
        folder: Folder,
        options: Options,
        *,
        workers: int = 1,
        gpus: Sequence[str] = (),
        threads: int | None = None,
        max_failures: int | None = None,
    ) -> None:
        super().__init__(folder, max_failures=max_failures)
        self._options, self._count, self._gpus, self._threads = options, workers, gpus, threads
        self._processes: list[_Process] = []
        self._fast_deaths = 0

    def run(self) -> Iterator[State]:
        """Do all jobs; yields how it stands, a few times a second. Raises: PackforcingError if workers cannot work."""
        try:
            while True:
                self._look_after()
                state = self.state(len(self._processes))
                yield state
                if self.too_many(state) and not self.why:
                    self.drain("too many failures")
                if not self._processes and not self.has_work():
                    return
                time.sleep(POLL_SECONDS)
        finally:
            self.kill()

    def drain(self, why: str) -> None:
        """Let workers finish their jobs and begin no others."""
        self.why = self.why or why
        for one in self._processes:
            _tell(one.process, b"drain\n")

    def stop(self, why: str) -> None:
        """Let workers end after the block they are at."""
        self.why = why
        for one in self._processes:
            _tell(one.process, b"stop\n")

    def kill(self) -> None:
        """End all workers at once; nothing that counts is lost."""
        for one in self._processes:
            with contextlib.suppress(OSError):
                one.process.kill()
            one.process.wait()
            _close(one.process)
        if self._processes:
            self._processes.clear()
            with contextlib.suppress(PackforcingError):  # else whoever looks next does it
                self.folder.ledger.take_over()

    def _look_after(self) -> None:
        """Notice workers that ended, take their jobs back, and start those that are missing."""
        for one in [one for one in self._processes if one.process.poll() is not None]:
            self._processes.remove(one)
            _close(one.process)
            self._died(one)
        base = self.folder.ledger
        base.take_over()
        free = self._count - len(self._processes)
        if self.why or free <= 0 or base.meta("paused") is not None:
            return
        waiting = base.ready()
        slots = [n for n in range(self._count) if n not in {one.slot for one in self._processes}]
        for slot in slots[:waiting]:
            self._processes.append(self._start(slot))

    def _died(self, one: _Process) -> None:
        code = one.process.returncode
        text = one.log.read_bytes()[-4000:].decode(errors="replace").strip() if one.log.exists() else ""
        holder = f" {one.process.pid} "
        began = any(
            event["event"] == "started" and holder in event["holder"] for event in self.folder.ledger.events()
        )
        if code == 0:
            self._fast_deaths = 0
            if not text:
                one.log.unlink(missing_ok=True)
            return
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if code != DiskFullError.exit_code:  # of that the batch is told otherwise
            _log.warning("worker %d ended with %s", one.process.pid, how)
        if began:
            self._fast_deaths = 0
            return
        self._fast_deaths += 1
        if self._fast_deaths >= _MAX_FAST_DEATHS * self._count:
            last = text.splitlines()[-1] if text else "it said nothing"
            raise EnvironmentProblem(
                f"workers end before they begin a job: {how}; the last words: {last}", hint=f"See {one.log}."
            )

    def _start(self, slot: int) -> _Process:
        environment = dict(os.environ)
        if self._threads is not None:
            environment |= {"OMP_NUM_THREADS": str(self._threads), "MKL_NUM_THREADS": str(self._threads)}
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        options = replace(self._options, slot=slot, may_exit=True)
        words = [sys.executable, "-m", f"{__package__}.local_engine", str(self.folder.ledger.path)]
        log = self.folder.path / HIDDEN / "logs" / f"worker-{slot}-{time.time_ns()}.log"
        with log.open("wb") as said:
            process = subprocess.Popen(
                [*words, json.dumps(vars(options))],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                env=environment,
                start_new_session=True,  # Ctrl-C is for this process, which tells them
            )
        return _Process(process, slot, log)


def _tell(process: subprocess.Popen[bytes], said: bytes) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.write(said)
        process.stdin.flush()


def _close(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()


def visible_gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them; torch is loaded only with a driver."""
    if not machine.has_nvidia_driver():
        return []
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    names = [] if given is None else [name.strip() for name in given.split(",") if name.strip()]
    return names[:count] if names else [str(n) for n in range(count)]


def work(path: Path, options: Options) -> int:
    """What a worker process does: jobs of the ledger at `path` until none is left, or its parent says stop or is gone.

    Returns: the exit code.
    """
    told: list[str] = []
    has_begun = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            hear(line.strip())
        hear("stop")  # whoever started this process is gone

    def hear(word: str) -> None:
        told.append(word)
        if not has_begun.is_set():  # still importing: no job is held
            os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    from packforcing_cli.worker import Worker

    has_begun.set()
    signal.signal(signal.SIGTERM, lambda *_: told.append("stop"))
    with Ledger.open(path) as base:
        board = LedgerBoard(Folder(path.parent, base), slot=options.slot)
        try:
            for _ in Worker(board, options, stop=lambda: told[-1] if told else "").run():
                pass
        except DiskFullError as error:
            print(f"{error.message}", file=sys.stderr)
            with contextlib.suppress(PackforcingError):
                board.pause("disk full")
            return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1]), Options(**json.loads(sys.argv[2]))))
