"""One worker of a batch: takes jobs from a board and makes their videos, one after the other, with one loaded model.

                 job 1                 job 2                 job 3
    text thread  encode    encode 2              encode 3
    make thread            denoise …             denoise …             denoise …
    make thread                       close, hash           close, hash

While a job is denoised the prompts of the next one are encoded, and the file of the last one is finished; the model
itself works on one job at a time. Where it gets jobs from is a `Board`: the ledger on this machine, a queue under Ray.

A job is journalled in a run folder of its own, so that one which ended early for whatever reason is gone on with.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import logging
import os
import shutil
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

import av
import torch
from torch import Tensor

from packforcing_cli import continuation, finishing, jobs, planner, runfolder, sameness, video
from packforcing_cli.config import GenerateRequest
from packforcing_cli.durable import is_full_disk
from packforcing_cli.errors import (
    DiskFullError,
    EnvironmentProblem,
    GenerationError,
    LockedError,
    OfflineError,
    PackforcingError,
    RunFolderError,
    UsageError,
    VideoError,
    WeightsError,
)
from packforcing_cli.jobs import Device, Job
from packforcing_cli.manifest import ExtendRequest
from packforcing_cli.prompts import Story
from packforcing_cli.registry import ModelSource, VideoModel
from packforcing_cli.rollout import Block
from packforcing_cli.runfolder import RunFolder
from packforcing_cli.tasks import Board, Options, Task, file_sha256, model_hash
from packforcing_cli.timeline import Timeline

TICK_SECONDS = 0.1
HUNG_EXIT = 75
"""How a process ends that a job would not let go of; another one takes its place."""
HANG_SECONDS = 10.0
"""A job that does not end at its timeout has its process ended after as long again, and this."""
WARM_JOBS = 64
"""So many jobs have their prompts encoded at a time where encoder and transformer do not fit together."""
_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS = 1.0, 60.0
_LOCKED_TRIES, _LOCKED_SECONDS = 12, 5.0
_PASSING = frozenset(
    {errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY, errno.ENOLCK, errno.EMFILE}
)
"""Errors of the system that may be gone a moment later."""

_log = logging.getLogger(__name__)


class _NotHereError(Exception):
    """The model of a job cannot be had on this machine; the cause says why."""


class _EndedError(Exception):
    """A job ends before its time; why is the message."""


@dataclass
class _Loaded:
    """A model in use.

    source:   its text encoder stays loaded.
    is_roomy: whether text encoder and transformer fit in memory together.
    dtype:    the precision that was asked for.
    weights:  how its weights are, see `_weights`.
    """

    key: str
    on: Device
    source: ModelSource
    is_roomy: bool
    dtype: str
    weights: tuple[object, ...]
    model: VideoModel | None = None


@dataclass
class _Work:
    """A job that is being done.

    computed: set when the model is free again.  why: set from outside, to end it after the block.
    """

    task: Task
    job: Job
    story: Story
    seconds: dict[str, float] = field(default_factory=dict)
    computed: Event = field(default_factory=Event)
    why: str = ""


class Worker:
    """Does jobs until none is left.

    stop: asked often; why the worker should end: "" = go on, "drain" = after the job, anything else after the block.
    """

    def __init__(self, board: Board, options: Options, *, stop: Callable[[], str] = lambda: "") -> None:
        self._board, self._options, self._stop = board, options, stop
        self._loaded: _Loaded | None = None
        self._warm: dict[tuple[str, int], tuple[Job, Story, float]] = {}
        self._finishing: Future[None] | None = None
        self._held: dict[str, Task] = {}
        self._works: list[_Work] = []

    def run(self) -> Iterator[str]:
        """Do jobs; yields the id of each that came to an end.

        However it ends, it holds no job afterwards. Raises: DiskFullError, and what a board raises.
        """
        try:
            yield from self._run()
        finally:
            for task in tuple(self._held.values()):
                with contextlib.suppress(PackforcingError):
                    self._release(task, why="stop")

    def _run(self) -> Iterator[str]:
        with ThreadPoolExecutor(1, "text") as text, ThreadPoolExecutor(2, "make") as make:
            layout, ahead = "", None
            last: _Work | None = None
            try:
                while not self._stop():
                    waiting = time.perf_counter()
                    if ahead is not None:
                        ahead.result()
                    waiting = time.perf_counter() - waiting
                    loaded = self._loaded
                    task = self._board.claim(loaded.key if loaded else "", layout)
                    if task is None:
                        yield from self._finished(last)
                        last = None
                        pause = self._board.idle()
                        if pause is None:
                            return
                        time.sleep(min(pause, 1.0))
                        continue
                    self._held[task.id] = task
                    if self._loaded is None or task.load_key != self._loaded.key:
                        yield from self._finished(last)
                        last = None
                    work = self._begin(task)
                    if work is None:
                        yield task.id
                        continue
                    work.seconds["text_wait"] = waiting
                    layout = task.layout_key
                    self._works = [*self._works[-1:], work]
                    making = make.submit(self._make, work)
                    ahead = text.submit(self._encode_ahead, layout)
                    self._watch(work, making)
                    yield from self._finished(last)
                    self._finishing, last = making, work
                yield from self._finished(last)
            finally:
                for work in self._works:
                    work.why = work.why or "stop"
                for future in (ahead, self._finishing):
                    if future is not None:
                        future.cancel()

    def _finished(self, work: _Work | None) -> Iterator[str]:
        """Wait for the file of the job before. Raises: what its thread raised."""
        if self._finishing is not None and work is not None:
            finishing, self._finishing = self._finishing, None
            finishing.result()
            yield work.task.id

    # -- before

    def _begin(self, task: Task) -> _Work | None:
        """All that is needed to make a job's video, the model loaded; None if it came to an end."""
        try:
            if self._is_done_already(task):
                return None
            work = self._prepared(task)
        except _EndedError as ended:
            self._ended(task, str(ended))
            return None
        except _NotHereError as wrapped:
            error = wrapped.__cause__
            assert isinstance(error, Exception)
            self._unload()
            if self._board.refuse(task, error):
                self._held.pop(task.id, None)
            else:
                self._failed(task, error)
            return None
        except Exception as error:
            self._failed(task, error)
            return None
        return work

    def _prepared(self, task: Task) -> _Work:
        started = time.perf_counter()
        seconds: dict[str, float] = {}
        if "problem" in task.spec:
            raise UsageError(task.spec["problem"], hint="Put it right, and run the batch again.")
        task = _resolved(task)
        request = _request(task, self._options)
        loaded = self._loaded
        if loaded is not None and loaded.key != task.load_key:
            loaded = None
        warm = None if loaded is None else self._warm.pop((task.id, task.retries), None)
        if loaded is None:
            self._unload()
            with _needed_here():
                _check_model(task, self._options)
        with _needed_here():
            on = _device(task, request, loaded)
        job = warm[0] if warm is not None else _prepare(task, request, on)
        if loaded is None or loaded.weights != _weights(job):
            self._unload()
            with _needed_here():
                source = _keeping(jobs.open_source(job))
            loaded = _Loaded(task.load_key, on, source, _is_roomy(job), request.dtype, _weights(job))
            self._loaded = loaded
        beside = warm is None and loaded.model is None and loaded.is_roomy
        with (
            jobs.Loading(job, loaded.source, how="beside") if beside else contextlib.nullcontext()
        ) as loading:
            if warm is not None:
                _, story, seconds["text_ahead"] = warm
            else:
                began = time.perf_counter()
                if loaded.model is not None and not loaded.is_roomy:  # the encoder would not fit beside it
                    loaded.model = None
                    _free_memory()
                story = jobs.encode(job, loaded.source) if loading is None else loading.story()
                seconds["text"] = time.perf_counter() - began
                if not loaded.is_roomy:
                    self._encode_ahead(task.layout_key, WARM_JOBS)
            if self._stop() not in ("", "drain"):
                raise _EndedError(self._stop())
            if loaded.model is None:
                began = time.perf_counter()
                if not loaded.is_roomy:
                    loaded.source = _keeping(jobs.open_source(job))  # the encoder goes
                    _free_memory()
                with _needed_here():
                    loaded.model = loaded.source.load() if loading is None else loading.model()
                seconds["load"] = time.perf_counter() - began
        seconds["prepare"] = time.perf_counter() - started
        return _Work(task, job, story, seconds)

    def _encode_ahead(self, layout_key: str, limit: int = 1) -> None:
        """Prepare jobs that will probably come next; a failure is left to the job itself."""
        loaded = self._loaded
        if loaded is None or (loaded.model is not None and not loaded.is_roomy):
            return
        wanted: set[tuple[str, int]] = set()
        try:
            for task in self._board.upcoming(loaded.key, layout_key, limit):
                if task.load_key != loaded.key:
                    break
                name = (task.id, task.retries)
                wanted.add(name)
                if name not in self._warm:
                    began = time.perf_counter()
                    task = _resolved(task)
                    request = _request(task, self._options)
                    job = _prepare(task, request, _device(task, request, loaded))
                    if _weights(job) != loaded.weights:
                        break
                    story = jobs.encode(job, loaded.source)
                    self._warm[name] = (job, story, time.perf_counter() - began)
        except Exception as error:
            _log.debug("not prepared ahead: %s", error)
        if limit == 1:  # what another worker took is not needed any more
            self._warm = {name: found for name, found in self._warm.items() if name in wanted}

    def _unload(self) -> None:
        if self._loaded is not None:
            self._loaded = None
            self._warm.clear()
            _free_memory()

    # -- the making, in a thread of its own

    def _make(self, work: _Work) -> None:
        """Make the video of a job and say how it went."""
        task = work.task
        try:
            result = self._made(work)
        except _EndedError as ended:
            self._ended(task, str(ended))
        except Exception as error:
            self._failed(task, error, work.job)
        else:
            self._done(task, result)
        finally:
            work.computed.set()

    def _made(self, work: _Work) -> dict[str, Any]:
        task, job, loaded = work.task, work.job, self._loaded
        assert loaded is not None
        assert loaded.model is not None
        began = time.perf_counter()

        def on_block(block: Block, seconds: float) -> None:
            number, total = block.index + 1, job.plan.blocks
            if number == total:
                work.seconds["make"] = time.perf_counter() - began
                work.computed.set()  # the next job may have the model
                return
            why = "" if block.replayed else self._board.progress(task, number, total)
            if work.why or why:
                raise _EndedError(work.why or why)

        run = _open_run(task, _as_planned(task, job), loaded.model)
        try:
            made = jobs.make(job, loaded.model, work.story, run=run, on_block=on_block)
            if made.ended:
                raise GenerationError(
                    f"the guard ended the video after {made.blocks} of {job.plan.blocks} blocks: {made.ended}",
                    hint="Another seed, or guard retry, makes other noise.",
                )
            began_last = time.perf_counter()
            result = _result(task, run)
            sources = [] if job.history is None else job.history.source.warnings
            result["warnings"] = [*sources, *job.plan.warnings]
            result["figures"] = {
                "replayed": made.replayed,
                "total_seconds": round(made.total_seconds, 4),
                **made.timing,
                **{f"{name}_seconds": round(value, 4) for name, value in work.seconds.items()},
                "hash_seconds": round(time.perf_counter() - began_last, 4),
            }
        finally:
            run.close()
        _drop_run(task)
        return result

    def _watch(self, work: _Work, making: Future[None]) -> None:
        """Wait until the model is free; end the job when it is time to."""
        limit = self._options.timeout
        started = time.monotonic()
        while not work.computed.wait(TICK_SECONDS):
            why = self._stop()
            if why and why != "drain":
                work.why = why
            spent = time.monotonic() - started
            if limit is not None and spent > limit:
                work.why = work.why or "timeout"
                if self._options.may_exit and spent > 2 * limit + HANG_SECONDS:
                    self._fail(work.task, _too_long(limit))
                    os._exit(HUNG_EXIT)

    def _ended(self, task: Task, why: str) -> None:
        if why == "timeout":
            assert self._options.timeout is not None
            self._fail(task, _too_long(self._options.timeout))
        elif why != "lost":
            self._release(task, cancelled=why == "cancelled", why=why)
        else:
            self._held.pop(task.id, None)

    def _done(self, task: Task, result: Mapping[str, Any]) -> None:
        self._board.done(task, result)
        self._held.pop(task.id, None)

    def _fail(
        self,
        task: Task,
        error: BaseException,
        *,
        retry_in: float | None = None,
        fit: Mapping[str, Any] | None = None,
    ) -> None:
        self._board.fail(task, error, retry_in=retry_in, fit=fit)
        self._held.pop(task.id, None)

    def _release(self, task: Task, *, cancelled: bool = False, why: str = "") -> None:
        self._board.release(task, cancelled=cancelled, why=why)
        self._held.pop(task.id, None)

    def _failed(self, task: Task, error: Exception, job: Job | None = None) -> None:
        """Say what went wrong, and whether the job is worth another try."""
        if isinstance(error, DiskFullError) or is_full_disk(error):
            self._board.pause("disk full")
            self._release(task, why="the disk is full")
            raise error if isinstance(error, DiskFullError) else DiskFullError("the disk is full") from error
        if not isinstance(error, PackforcingError):
            _log.error("job %s\n%s", task.id[:12], "".join(traceback.format_exception(error)))
        left = self._options.retries - task.retries
        pause = min(_BACKOFF_SECONDS * 2**task.retries, _MAX_BACKOFF_SECONDS)
        if jobs.is_out_of_memory(error):
            may_change = self._options.auto_fit or task.spec["request"].get("auto_fit", False)
            fit = _smaller(task, job) if may_change and job is not None else {}
            told = error if job is None else jobs.memory_ran_out(job, "")
            self._unload_later()
            self._fail(task, told, retry_in=pause if left > 0 else None, fit={**task.fit, **fit})
            return
        if isinstance(
            error, LockedError
        ):  # a worker that a lost driver left behind ends within half a minute
            left = max(self._options.retries, _LOCKED_TRIES) - task.retries
            pause = max(pause, _LOCKED_SECONDS)
        spoiled = "CUDA error" in str(error)
        passing = spoiled or isinstance(error, LockedError) or _errno(error) in _PASSING
        self._fail(task, error, retry_in=pause if passing and left > 0 else None)
        if spoiled and self._options.may_exit:
            os._exit(HUNG_EXIT)

    def _unload_later(self) -> None:
        """Give memory back before the next job; the model in use stays."""
        self._warm.clear()
        _free_memory()

    def _is_done_already(self, task: Task) -> bool:
        """Finish a job that lacks its file's last step, or whose file is there as it was; needs no model."""
        output = Path(task.output)
        _check_place(output, task)
        if task.result and output.exists():
            if file_sha256(output) == task.result["sha256"]:
                self._done(task, task.result)
                return True
            aside = _free_name(output)
            output.rename(aside)
            _log.warning("%s is not what was made; it is %s now", output, aside)
        _let_go(task)
        if not (Path(task.run) / runfolder.HEADER).is_file():
            return False
        try:
            run = RunFolder.open(Path(task.run))
        except RunFolderError:
            return False  # begun again by _open_run
        with run:
            request = GenerateRequest.from_values(run.record.request)
            if str(request.output) != task.output or not finishing.finish(run):
                return False
            result = _result(task, run)
        _drop_run(task)
        self._done(task, {**result, "warnings": [], "figures": {"replayed": result["blocks"]}})
        return True


# ---------------------------------------------------------------------------------------------------- parts of a job


def _resolved(task: Task) -> Task:
    """The job; of one that goes on with another job's video, which is made now, with what that decides.

    Raises: RunFolderError if the other job's run folder is gone; UsageError for prompts and times that do not suit it.
    """
    if "after" not in task.spec or "blocks" in task.spec:
        return task
    run = Path(task.run).with_name(task.spec["after"][:32])
    if not (run / runfolder.HEADER).is_file():
        raise RunFolderError(
            f"{run} is gone, the run folder of the video it goes on with",
            hint="Give the video another name, and that as the source.",
        )
    asked = {**task.spec["asked"], "source": str(run)}
    with RunFolder.open_to_read(run) as old:
        request, blocks = continuation.request_of_branch(
            old, ExtendRequest(**asked), Timeline.from_json(task.spec["timeline"])
        )
    more = {"request": request.to_values(), "blocks": blocks, "run": str(run)}
    return replace(task, spec={**task.spec, **more})


def _request(task: Task, options: Options) -> GenerateRequest:
    """What is made: the request of the manifest, changed as memory demanded, into the job's own file and run folder."""
    request = GenerateRequest.from_values(task.spec["request"])
    if task.fit:
        request = request.changed(**task.fit)
    changes = {
        "model": options.places.get(request.model, request.model),
        "output": Path(task.output),
        "auto_fit": request.auto_fit or options.auto_fit,
        "keep_run": True,
    }
    return request.model_copy(update=changes)


def _prepare(task: Task, request: GenerateRequest, on: Device) -> Job:
    """`jobs.prepare` for a new job, or one that has a run folder. Raises: PackforcingError; nothing is loaded."""
    run = Path(task.run)
    there = (run / runfolder.HEADER).is_file()
    blocks = (
        len(list((run / runfolder.LATENTS).glob("*.safetensors"))) if there else task.spec.get("blocks", 0)
    )
    why = dict.fromkeys(("model", "device", "precision"), "as the batch says")
    job = jobs.prepare(request, on=on, path=request.output if there else None, blocks=blocks, why=why)
    job.plan.require_fit()
    return job


def _as_planned(task: Task, job: Job) -> Job:
    """The job with its model called as the manifest calls it, whatever folder that is in here: for records."""
    name = task.spec["request"]["model"]
    if job.request.model == name:
        return job
    return replace(job, request=job.request.model_copy(update={"model": name}), place=name)


@contextlib.contextmanager
def _needed_here() -> Iterator[None]:
    """What goes wrong inside is about this machine and its models, not about the job. Raises: _NotHereError."""
    try:
        yield
    except (EnvironmentProblem, WeightsError, OfflineError, UsageError, OSError) as error:
        if is_full_disk(error) or _errno(error) in _PASSING:
            raise
        raise _NotHereError from error
    except (MemoryError, RuntimeError) as error:
        if not jobs.is_out_of_memory(error):
            raise
        raise _NotHereError from error


def _device(task: Task, request: GenerateRequest, loaded: _Loaded | None) -> Device:
    """Where a job is made: as the loaded model, unless another precision is asked for."""
    if loaded is not None and request.dtype == loaded.dtype:
        return loaded.on
    return jobs.choose_device(request, Path(task.output).parent)


def _weights(job: Job) -> tuple[object, ...]:
    """What auto-fit may change of a loaded model."""
    request = job.request
    names = ("dtype", "quantize", "quantize_text", "offload", "cuda_graphs", "vae_latents")
    return tuple(getattr(request, name) for name in names)


def _check_place(output: Path, task: Task) -> None:
    """Make the output's folder. Raises: UsageError if the file would come to lie outside the folder of the batch."""
    root = Path(task.run).parents[2].resolve()
    if output.is_symlink() or not output.parent.resolve().is_relative_to(root):
        raise UsageError(f"{output} leads out of {root}", hint="Remove the symbolic link.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_full_disk(error):
            raise
        raise UsageError(f"the folder {output.parent} cannot be made: {error.strerror}") from error


def _open_run(task: Task, job: Job, model: VideoModel) -> RunFolder:
    """The job's run folder: the one that is there if it can be gone on with, else a new one."""
    folder = Path(task.run)
    if (folder / runfolder.HEADER).is_file():
        try:
            run = RunFolder.open(folder)
        except RunFolderError as error:
            _log.warning("job %s begins again: %s", task.id[:12], error)
        else:
            made = {sameness.PICTURE.format(block) for block in range(run.blocks)}
            then = {name: value for name, value in run.record.must.items() if name not in made}
            now = sameness.must_be_same(model, job.request, made=run.blocks)
            changed = runfolder.differences(then, now)
            if not changed and run.record.output == str(job.path):
                run.update(status="running", frames=0 if not job.path.exists() else run.record.frames)
                return run
            run.close()
            _log.warning("job %s begins again: %s", task.id[:12], "; ".join(changed) or "it has another name")
        runfolder.remove(runfolder.look(folder))
        video.part_path(job.path).unlink(missing_ok=True)
    if folder.exists():  # a kill left it before it was a run
        shutil.rmtree(folder)
    if "blocks" in task.spec:
        return _branch(task, job, model)
    new = jobs.new_run(job, model, folder)
    assert new is not None  # keep_run is set
    return new


def _branch(task: Task, job: Job, model: VideoModel) -> RunFolder:
    """The run folder of a job that goes on with another run.

    Raises: UsageError if that was made with something else.
    """
    blocks = task.spec["blocks"]
    with RunFolder.open_to_read(Path(task.spec["run"])) as old:
        before = GenerateRequest.from_values(old.record.request)
        made = {sameness.PICTURE.format(block) for block in range(old.blocks)}
        then = {name: value for name, value in old.record.must.items() if name not in made}
        changed = runfolder.differences(then, sameness.must_be_same(model, before, made=old.blocks))
        if changed:
            raise UsageError(
                f"{old.record.id} was made with something else: {'; '.join(changed[:4])}",
                hint="Bring back what it was made with.",
            )
        other = min(old.record.other_memory, blocks)
        return continuation.branch(old, blocks, job, model, Path(task.run), other_memory=other)


def _check_model(task: Task, options: Options) -> None:
    """Raises: WeightsError if the model here is not the one the job was planned with."""
    name = task.spec["request"]["model"]
    if model_hash(options.places.get(name, name)) != task.spec["model"]:
        raise WeightsError(
            f"{name} is not the model the job was planned with",
            hint="Run the batch again, or install the same version on every machine.",
        )


def _let_go(task: Task) -> None:
    """Take away the lock of a worker on another machine that is known to be gone; one of this machine can be judged."""
    if task.is_orphan:
        runfolder.remove_lock_of_elsewhere(Path(task.run))


def _drop_run(task: Task) -> None:
    """Remove the run folder of a job that was not to keep it."""
    if not task.spec["request"].get("keep_run", True):
        runfolder.remove(runfolder.look(Path(task.run)))


def _result(task: Task, run: RunFolder) -> dict[str, Any]:
    """Hashes and facts of a finished file. Raises: VideoError if it does not have the frames it should have."""
    record = run.record
    frames = record.shown.frames_for(record.blocks)
    latents = hashlib.sha256()
    for entry in run.entries():
        latents.update(_bytes(entry.latents))
    facts = {
        "fps": record.fps,
        "blocks": record.blocks,
        "seed": record.request["seed"],
        "model": record.model,
    }
    return _facts_of_file(task, frames, latents.hexdigest(), run=record.id, **facts)


def _facts_of_file(task: Task, frames: int, latents: str, **more: Any) -> dict[str, Any]:
    output = Path(task.output)
    packets, count = packets_sha256(output)
    if count != frames:
        raise VideoError(f"{output} has {count} frames, and {frames} were made")
    return {
        "sha256": file_sha256(output),
        "size_bytes": output.stat().st_size,
        "packets_sha256": packets,
        "latents_sha256": latents,
        "frames": frames,
        **more,
        "worker": f"{socket.gethostname()} {os.getpid()}",
        "attempt": task.attempt,
        "fit": dict(task.fit),
    }


def _bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor, as a hash takes them."""
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data


def packets_sha256(path: Path) -> tuple[str, int]:
    """Hash of a video's encoded pictures, which metadata and the container do not change; and how many there are.

    Raises: VideoError if it cannot be read.
    """
    digest, count = hashlib.sha256(), 0
    try:
        with av.open(f"file:{path}") as container:
            for packet in container.demux(container.streams.video[0]):
                if packet.size:
                    digest.update(bytes(packet))
                    count += 1
    except (OSError, av.FFmpegError, IndexError) as error:
        raise VideoError(f"{path} cannot be read: {error}") from error
    return digest.hexdigest(), count


def _free_name(path: Path) -> Path:
    """A name beside a file that nothing has: NAME.changed.mp4, NAME.changed-2.mp4 …"""
    number = 1
    while True:
        aside = path.with_name(f"{path.stem}.changed{f'-{number}' if number > 1 else ''}{path.suffix}")
        if not aside.exists():
            return aside
        number += 1


def _smaller(task: Task, job: Job) -> Mapping[str, Any]:
    """Options of the next smaller plan after memory ran out; empty if there is none."""
    less = min(job.machine.memory_bytes, job.plan.peak_bytes) * 9 // 10
    plan = planner.plan(job.request, replace(job.machine, memory_bytes=less), facts=job.facts)
    return dict(plan.change)


def _too_long(seconds: float) -> TimeoutError:
    return TimeoutError(
        f"took longer than {seconds:g} s; its blocks are kept: --retry-failed with a longer --timeout goes on"
    )


def _errno(error: BaseException | None) -> int | None:
    """The system's number behind an error, however deep."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        error = error.__cause__
    return None


def _is_roomy(job: Job) -> bool:
    stages = {stage.name: stage for stage in job.plan.stages}
    peak = max(stage.device_bytes for stage in job.plan.stages)
    beside = max(stage.host_bytes for stage in job.plan.stages)
    machine = job.machine
    fits = stages["text"].device_bytes + peak <= machine.memory_bytes
    return fits and (machine.host_bytes is None or stages["text"].host_bytes + beside <= machine.host_bytes)


def _keeping(source: ModelSource) -> ModelSource:
    """A source whose text encoder is read once."""
    kept: list[Any] = []

    def load() -> Any:
        if not kept:
            kept.append(source.load_text_encoder())
        return kept[0]

    return replace(source, load_text_encoder=load)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
