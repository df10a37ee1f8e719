"""The run folder: from what is in it a video can be continued, after anything.

    run.json                what was asked for, by which model, with which numerics; written whole, seldom
    latents/000007.safetensors   block 7: latents as the commit pass read them, ids recalled by each layer, a hash;
                            written whole before the block counts as done, never changed
    trace.jsonl             a line a block: seconds of its stages, the cache. Figures only, nothing depends on them
    snapshot.safetensors    exact state after some block (cache, decoder, compressor); optional
    lock                    who is at work here: process and host; empty when nobody is

The blocks are the truth; run.json does not count them. An end torn by a power cut is dropped, a damaged or missing
block before it is refused by name. Knows neither models nor videos: it is handed tensors and plain values.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from packforcing_cli import durable
from packforcing_cli.config import GenerateRequest, SourceVideo
from packforcing_cli.errors import LockedError, PackforcingError, RunFolderError, UsageError
from packforcing_cli.layout import Lengths, Shown

try:  # Windows has none
    import fcntl
except ImportError:  # pragma: no cover
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1
HEADER = "run.json"
LATENTS = "latents"
TRACE = "trace.jsonl"
SNAPSHOT = "snapshot.safetensors"
LOCK = "lock"
_PIECE_BYTES = 1 << 24  # of a snapshot in one write
_ELSEWHERE = "Give --run a new folder, or keep no run folder with --no-run."
TORN = ".torn"  # what a block that cannot be read is called until it is made again
MOVED = ".where"  # a file of this ending in the folder of all runs says where a run with --run DIR is


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Record(_Frozen):
    """run.json.

    status:   running (also when a kill ended it), stopped (asked to end early, the file was finished), finished.
    output:   the finished video, an absolute path; `frames` are in it once the status is not running.
    closing:  frames that it has once it got its name; only while a file without tags gets it, else 0.
    blocks:   length of the whole video; `fps`, `size` and `frames_per_block` are the video's.
    request:  what was asked for, everything decided: config.GenerateRequest as JSON values.
    tags:     of the video file.
    must:     what has to be the same to go on: model and file hashes, layout, schedule, dtype, library versions.
    numerics: what has to be the same for equal bits besides: device, threads.
    parent:   id of the run whose first blocks this one began with.
    other_memory: so many first blocks were made with another memory: what they recalled is chosen anew.
    """

    schema_number: int = Field(SCHEMA, alias="schema")
    id: str = Field(pattern=r"^[a-z0-9-]{1,80}$")
    version: str
    created: datetime
    status: Literal["running", "stopped", "finished"] = "running"
    prompt: str
    output: str
    frames: int = Field(0, ge=0)
    closing: int = Field(0, ge=0)
    blocks: int = Field(ge=1)
    fps: int = Field(ge=1)
    size: tuple[int, int]
    frames_per_block: int = Field(ge=1)
    request: dict[str, Any]
    tags: dict[str, str]
    must: dict[str, Any]
    numerics: dict[str, Any]
    parent: str | None = None
    other_memory: int = Field(0, ge=0)

    @field_validator("request")
    @classmethod
    def _a_request(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            GenerateRequest.from_values(value)
        except PackforcingError as error:
            raise ValueError(error.message) from error
        return value

    @property
    def lengths(self) -> Lengths:
        """Blocks and pixel frames of the video."""
        return Lengths(self.frames_per_block)

    @property
    def shown(self) -> Shown:
        """Which blocks are in the file."""
        return Shown(self.lengths) if self.source is None else self.source.shown(self.lengths)

    @property
    def source(self) -> SourceVideo | None:
        """Somebody's video that it goes on with."""
        return GenerateRequest.from_values(self.request).source

    @property
    def model(self) -> str:
        """Name of the model."""
        return str(self.must.get("model", "unknown"))

    def to_json(self) -> str:
        """The text of run.json."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Entry:
    """One block of the journal. latents: [1,C,F,h,w]; selected: [L,K]; retry: which attempt it was, from 0."""

    index: int
    latents: Tensor
    selected: Tensor
    retry: int = 0


# ------------------------------------------------------------------------------------------------ where runs are


def default_root() -> Path:
    """Where runs are kept unless --run says otherwise; need not exist."""
    import platformdirs

    return Path(platformdirs.user_state_dir("packforcing", appauthor=False)) / "runs"


def new_id(prompt: str, *, now: datetime | None = None) -> str:
    """A short name of a run that tells when and what, safe on every file system: 20260102-150405-a-red-cir-1f3c."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:24].strip("-")
    moment = (now or datetime.now(UTC)).strftime("%Y%m%d-%H%M%S")
    return "-".join(part for part in (moment, words, secrets.token_hex(3)) if part)


def find(name: str, *, root: Path | None = None) -> Path:
    """The folder of a run given by folder, id or the beginning of an id.

    Raises: UsageError if there is none, or several ids begin like this.
    """
    hint = "See `packforcing runs list`."
    folder = Path(name).expanduser()
    if os.path.isdir(folder):  # noqa: PTH112  (Path's raises for a name too long)
        if not (folder / HEADER).is_file():
            raise UsageError(f"{folder} is not a run folder: it has no {HEADER}", hint=hint)
        return folder.absolute()
    exact = folder_of(name, root=root)
    if exact is not None:
        return exact
    ids = {_id_of(place, known): place for known, place in _places(root).items()}
    fitting = {known: place for known, place in ids.items() if known.startswith(name)}
    if name in fitting:
        return fitting[name]
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    if fitting:
        raise UsageError(f"several runs begin with {name!r}: {', '.join(sorted(fitting))}", hint=hint)
    raise UsageError(f"there is no run {name!r}", hint=hint)


def folder_of(run_id: str, *, root: Path | None = None) -> Path | None:
    """The folder of the run with this very id, None if it is not here; looks at no other run."""
    root = root or default_root()
    if not re.fullmatch(r"[a-z0-9-]{1,80}", run_id):  # it may come from a video file
        return None
    inside = root / run_id
    if _has_run(inside) and _id_of(inside, run_id) == run_id:
        return inside
    return _pointed_at(root / f"{run_id}{MOVED}")


def check_new(folder: Path) -> None:
    """Refuse a place where no new run folder can be made, before any work is done. Writes nothing.

    Raises: UsageError.
    """
    if (folder / HEADER).exists():
        raise UsageError(
            f"{folder} is the folder of another run",
            hint=f"To continue it: packforcing resume {shlex.quote(str(folder))}",
        )
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder} is there and not an empty folder", hint=_ELSEWHERE)
        above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
            raise UsageError(
                f"the run folder {folder} cannot be made: {above} is not writable", hint=_ELSEWHERE
            )
    except OSError as error:
        raise UsageError(
            f"the run folder {folder} cannot be made: {error.strerror}", hint=_ELSEWHERE
        ) from error


@dataclass(frozen=True)
class Run:
    """A run as it lies on disk, not opened.

    record:     None if run.json cannot be read; `problem` says why then.
    is_live:    whether a process is at work on it.
    size_bytes: of all its files; hard-linked ones count in every run that has them.
    """

    name: str
    folder: Path
    record: Record | None
    problem: str
    blocks: int
    is_live: bool
    size_bytes: int
    changed: datetime

    @property
    def status(self) -> str:
        """running, finished, stopped, interrupted (it can be resumed) or damaged."""
        if self.record is None:
            return "damaged"
        if self.is_live:
            return "running"
        return "interrupted" if self.record.status == "running" else self.record.status


def all_runs(root: Path | None = None) -> list[Run]:
    """Every run of the folder of all runs, and those it knows elsewhere; oldest first."""
    runs = [look(folder, name) for name, folder in _places(root).items()]
    return sorted(runs, key=lambda run: (run.record.created if run.record else run.changed, run.name))


def _places(root: Path | None) -> dict[str, Path]:
    """Folders with a run in them, by the names they are known under."""
    root = root or default_root()
    folders = {}
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if path.suffix == MOVED:
            there = _pointed_at(path)
            if there is not None:
                folders[path.stem] = there
        elif path.is_dir():
            folders[path.name] = path
    return {name: folder for name, folder in folders.items() if _has_run(folder)}


def _pointed_at(pointer: Path) -> Path | None:
    """The run folder a pointer names, None if that very run is not there (any more)."""
    try:
        folder = Path(pointer.read_text("utf-8").strip())
    except (OSError, UnicodeDecodeError):
        return None
    return folder if _has_run(folder) and _id_of(folder, pointer.stem) == pointer.stem else None


def _has_run(folder: Path) -> bool:
    return (folder / HEADER).is_file()


def _id_of(folder: Path, name: str) -> str:
    """The id of the run in a folder; `name` if its run.json is damaged."""
    try:
        return read(folder).id
    except PackforcingError:
        return name


def look(folder: Path, name: str = "") -> Run:
    """What a run folder says of itself; takes no lock and never fails on damage."""
    record, problem = None, ""
    try:
        record = read(folder)
    except PackforcingError as error:
        problem = error.message
    sizes = []
    for inside, _, names in os.walk(folder):
        for file in names:
            with contextlib.suppress(OSError):  # a process at work renames and removes files meanwhile
                sizes.append(Path(inside, file).stat())
    return Run(
        name=record.id if record else name or folder.name,
        folder=folder,
        record=record,
        problem=problem,
        blocks=len(list((folder / LATENTS).glob("*.safetensors"))),
        is_live=_is_locked(folder),
        size_bytes=sum(stat.st_size for stat in sizes),
        changed=datetime.fromtimestamp(max((stat.st_mtime for stat in sizes), default=0), UTC),
    )


def read(folder: Path) -> Record:
    """run.json of a folder.

    Raises: UsageError if it is missing or of another version; RunFolderError if it is damaged.
    """
    path = folder / HEADER
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise UsageError(
            f"{folder} is not a run folder: it has no {HEADER}", hint="See `packforcing runs list`."
        ) from error
    except OSError as error:
        raise RunFolderError(
            f"{path} cannot be read: {error.strerror}", hint="Check its permissions."
        ) from error
    return parse(text, source=str(path))


def parse(text: bytes, *, source: str = HEADER) -> Record:
    """run.json from its bytes. Raises: as `read`."""
    start_again = "Its blocks cannot be used without it. Make the video again, or restore the file."
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunFolderError(f"{source} is damaged: {error}", hint=start_again) from error
    schema = values.get("schema") if isinstance(values, dict) else None
    if not isinstance(schema, int) or isinstance(schema, bool):
        raise RunFolderError(f"{source} is damaged: it has no schema number", hint=start_again)
    if schema != SCHEMA:
        raise UsageError(
            f"{source} has schema {schema}; this version of packforcing reads {SCHEMA}",
            hint=f"Use the version that made it: {str(values.get('version', 'unknown'))[:40]}.",
        )
    try:
        return Record.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise RunFolderError(f"{source} is damaged: {where}: {problem['msg']}", hint=start_again) from error


def remove(run: Run) -> None:
    """Delete a run folder and what points to it; files of somebody else in it stay.

    Raises: LockedError if a process is at work on it; RunFolderError if it cannot be removed.
    """
    lock = _Lock(run.folder)
    try:
        (run.folder / HEADER).unlink(missing_ok=True)  # first: without it the rest is no run folder any more
        (default_root() / f"{run.name}{MOVED}").unlink(missing_ok=True)
        _remove_contents(run.folder)
    except OSError as error:
        raise RunFolderError(f"{run.folder} cannot be removed: {error.strerror or error}") from error
    finally:
        lock.release()
    with contextlib.suppress(OSError):
        (run.folder / LOCK).unlink()
        run.folder.rmdir()


def _remove_contents(folder: Path) -> None:
    if (folder / LATENTS).exists():
        shutil.rmtree(folder / LATENTS)
    for path in [folder / TRACE, folder / SNAPSHOT, *folder.glob(".*.tmp")]:
        path.unlink(missing_ok=True)


def remove_leftovers() -> int:
    """Remove what no run needs: folders without run.json, which a kill left while it made a run, an hour ago or
    longer; and pointers to runs that are gone.

    A pointer stays while the folder above its run is missing, too: a disk that is not mounted comes back.
    Returns: how many. Raises: RunFolderError.
    """
    root, count = default_root(), 0
    for folder in list(root.iterdir()) if root.is_dir() else ():
        try:
            if folder.suffix == MOVED and _is_stale(folder):
                folder.unlink()
                count += 1
            old = folder.is_dir() and time.time() - folder.stat().st_mtime > 3600
            if old and not (folder / HEADER).exists() and not _is_locked(folder):
                shutil.rmtree(folder)
                count += 1
        except OSError as error:
            raise RunFolderError(f"{folder} cannot be removed: {error.strerror or error}") from error
    return count


def _is_stale(pointer: Path) -> bool:
    """Whether the run a pointer names is gone for good, as far as can be told."""
    try:
        text = pointer.read_text("utf-8").strip()
    except UnicodeDecodeError:
        return True
    folder = Path(text)
    return not text or (folder.parent.is_dir() and _pointed_at(pointer) is None)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, one line each: "torch: 2.9 then, 2.10 now"."""

    def shown(value: Any) -> str:
        text = json.dumps(value, ensure_ascii=False).strip('"')
        return text if len(text) <= 60 else text[:57] + "…"

    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return [f"{name}: {shown(then.get(name))} then, {shown(now.get(name))} now" for name in names]


# ------------------------------------------------------------------------------------------------------ one run


class RunFolder:
    """A run folder this process works on; it holds the lock until `close`.

    Attributes: folder; record; blocks: how many it has; is_new: whether this process made it;
        dropped: name of a torn last block that was left out, empty if there was none.
        missing: name of a missing block, of a folder opened to be read whose later blocks are there.
        snapshot_problem: why the snapshot is not used, once `snapshot_blocks` has looked at it; empty if it is sound.
    """

    def __init__(self, folder: Path, record: Record, lock: _Lock) -> None:
        self.folder, self.record = folder, record
        self.blocks, self.is_new, self.dropped, self.missing = 0, False, "", ""
        self.snapshot_problem = ""
        self._lock = lock
        self._trace: int | None = None
        self._snapshot: tuple[tuple[int, int], int] | None = None

    @classmethod
    def create(
        cls, folder: Path, record: Record, *, source: RunFolder | None = None, blocks: int = 0
    ) -> Self:
        """Make a new run folder, with the first blocks of `source` in it if wanted.

        Blocks taken over are linked where the file system can, else copied; `source` stays as it is.
        Raises: UsageError if there is something there, or a name is not UTF-8; DiskFullError, RunFolderError;
            nothing is left then.
        """
        folder = folder.absolute()
        check_new(folder)
        try:
            header, place = record.to_json().encode(), str(folder).encode()
        except UnicodeEncodeError as error:  # a path that was no text comes with stand-ins for its bytes
            name = error.object[max(0, error.start - 40) : error.end + 40]
            raise UsageError(
                f"a run folder cannot keep a name that is not UTF-8 text: {name!r}", hint=_ELSEWHERE
            ) from error
        try:
            durable.make_folder(folder / LATENTS)
        except OSError as error:
            for made in (folder / LATENTS, folder):
                with contextlib.suppress(OSError):
                    made.rmdir()
            raise durable.failure(error, folder, kind=UsageError, hint=_ELSEWHERE) from error
        run = cls(folder, record, _Lock(folder))
        run.is_new = True
        try:
            if source is not None:
                run._take_over(source, blocks)
            run._write(HEADER, header)  # last: without it the folder is no run
            if folder.parent != default_root().absolute():
                durable.make_folder(default_root())
                durable.write(default_root() / f"{record.id}{MOVED}", place)
        except (OSError, PackforcingError) as error:
            run.discard()
            if isinstance(error, OSError):
                raise run._failure(error, default_root()) from error
            raise
        return run

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Take over an existing run folder, its journal checked at the end.

        Raises: UsageError, RunFolderError as `read`; RunFolderError if a block is missing or the last one cannot be
            read; LockedError if another process is at work on it.
        """
        run = cls._opened(folder, shared=False)
        try:
            run._tidy()
        except PackforcingError:
            run.close()
            raise
        return run

    @classmethod
    def open_to_read(cls, folder: Path) -> Self:
        """Open a run folder to take blocks from: nothing in it changes.

        It has the blocks from the first one on of which none is missing; a torn last one is left out.
        Raises: as `open`, but not for a missing block.
        """
        run = cls._opened(folder, shared=True)
        try:
            run._count()
            run.dropped = run._torn_last()
        except PackforcingError:
            run.close()
            raise
        return run

    @classmethod
    def _opened(cls, folder: Path, *, shared: bool) -> Self:
        folder = folder.absolute()
        read(folder)
        lock = _Lock(folder, shared=shared)
        try:
            return cls(folder, read(folder), lock)
        except PackforcingError:
            lock.release()
            raise

    def append(self, latents: Tensor, selected: Tensor, *, retry: int = 0, trace: Mapping[str, Any]) -> None:
        """Keep the next block; it is safe on disk when this returns.

        Args:
            latents:  [1,C,F,h,w] in the dtype the commit pass read.
            selected: [L,K] ids each layer recalled.
            retry:    which attempt at the block it is, from 0.
            trace:    figures for trace.jsonl; the seconds that keeping the block took join its `seconds`.
        Raises: DiskFullError, RunFolderError; the block does not count then, all before it do.
        """
        from safetensors.torch import save

        begun = time.perf_counter()
        tensors = {"latents": latents.cpu().contiguous(), "selected": selected.cpu().contiguous()}
        metadata = {"block": str(self.blocks), "retry": str(retry)}
        metadata["sha256"] = _digest(metadata, tensors)
        name = f"{LATENTS}/{_entry_name(self.blocks)}"
        self._write(name, save(tensors, metadata))
        with contextlib.suppress(OSError):
            (self.folder / (name + TORN)).unlink(missing_ok=True)
        took = {"journal": round(time.perf_counter() - begun, 6)}
        figures = {"block": self.blocks, **trace, "seconds": {**trace.get("seconds", {}), **took}}
        line = json.dumps(figures) + "\n"
        self.blocks += 1
        try:
            if self._trace is None:
                self._trace = os.open(self.folder / TRACE, os.O_RDWR | os.O_CREAT | durable.BINARY, 0o666)
            durable.append(self._trace, line.encode(), size_bytes=os.fstat(self._trace).st_size)
        except OSError as error:
            raise self._failure(error, self.folder / TRACE) from error

    def entry(self, index: int) -> Entry:
        """One block. Raises: RunFolderError, with its name, if it is missing, damaged or cannot be read."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self.folder / LATENTS / _entry_name(index)
        hint = self._way_round(index)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise RunFolderError(f"{path} is missing", hint=hint) from error
        except OSError as error:  # says nothing of the block itself
            raise RunFolderError(
                f"{path} cannot be read: {error.strerror or error}", hint="Nothing was changed; try again."
            ) from error
        try:
            tensors = load(data)
        except SafetensorError as error:
            raise _TornError(f"{path} is damaged: {error}", hint=hint) from error
        header = json.loads(
            data[8 : 8 + int.from_bytes(data[:8], "little")]
        )  # `load` has found it well formed
        metadata = dict(header.get("__metadata__", {}))
        said = metadata.pop("sha256", "")
        if metadata.get("block") != str(index) or said != _digest(metadata, tensors):
            raise _TornError(f"{path} is damaged: its contents are not what was written", hint=hint)
        return Entry(index, tensors["latents"], tensors["selected"], int(metadata["retry"]))

    def entries(self, start: int = 0, stop: int | None = None) -> Iterator[Entry]:
        """The blocks in order, read one at a time. Raises: as `entry`."""
        for index in range(start, self.blocks if stop is None else stop):
            yield self.entry(index)

    def save_snapshot(self, state: Mapping[str, Tensor]) -> None:
        """Keep the exact state after the newest block in place of an older one. Raises: as `append`."""
        path = self.folder / SNAPSHOT
        try:
            with durable.replacing(path) as temporary:
                fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | durable.BINARY, 0o666)
                try:
                    for data in _safetensors(state, _signed({"blocks": str(self.blocks)}, state)):
                        durable.write_all(fd, data)
                finally:
                    os.close(fd)
        except OSError as error:
            raise self._failure(error, path) from error

    def snapshot_blocks(self) -> int:
        """After how many blocks the snapshot was made; 0 without one that can be used.

        One that is not what was written is not used, and `snapshot_problem` says so; it is read once for that.
        """
        path = self.folder / SNAPSHOT
        try:
            stat = path.stat()
        except OSError:
            return 0
        known = (stat.st_size, stat.st_mtime_ns)
        if self._snapshot is None or self._snapshot[0] != known:
            blocks, self.snapshot_problem = _checked_snapshot(path)
            self._snapshot = known, blocks
        blocks = self._snapshot[1]
        return blocks if 0 < blocks <= self.blocks else 0

    def load_snapshot(self) -> dict[str, Tensor]:
        """The state a snapshot holds. Raises: RunFolderError if it is damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.folder / SNAPSHOT
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise RunFolderError(
                f"{path} is damaged: {error}", hint=f"rm {shlex.quote(str(path))}  # the blocks are enough"
            ) from error

    def trace(self) -> list[dict[str, Any]]:
        """The lines of trace.jsonl that can be read."""
        return [json.loads(line) for _, line in self._trace_lines()]

    def _trace_lines(self) -> list[tuple[int, bytes]]:
        """(block, line) of the lines of trace.jsonl that can be read."""
        try:
            lines = (self.folder / TRACE).read_bytes().split(b"\n")
        except OSError:
            return []
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("block"), int):
                    found.append((record["block"], line + b"\n"))
        return found

    def update(self, **values: Any) -> None:
        """Change fields of run.json. Raises: DiskFullError, RunFolderError; the old one is still there then."""
        record = self.record.model_copy(update=values)
        self._write(HEADER, record.to_json().encode())
        self.record = record

    def discard(self) -> None:
        """Remove the folder again: nothing in it is worth keeping."""
        self.close()
        remove(look(self.folder, self.record.id))

    def close(self) -> None:
        """Let others work on it; calling it again does no harm."""
        if self._trace is not None:
            with contextlib.suppress(OSError):
                os.close(self._trace)
            self._trace = None
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_over(self, source: RunFolder, blocks: int) -> None:
        for entry in source.entries(0, blocks):  # read: a damaged one must not be handed on
            old, new = (run.folder / LATENTS / _entry_name(entry.index) for run in (source, self))
            try:
                os.link(old, new)
            except OSError:  # another file system, or one without links
                self._write(f"{LATENTS}/{new.name}", old.read_bytes())
        durable.sync_folder(self.folder / LATENTS)
        taken = [line for line in source._trace_lines() if line[0] < blocks]
        if taken:
            durable.write(self.folder / TRACE, b"".join(line for _, line in taken))
        self.blocks = blocks

    def _tidy(self) -> None:
        """Count the blocks, put a torn last one aside, remove what a kill left half-written."""
        latents = self.folder / LATENTS
        try:
            for name in (HEADER, SNAPSHOT, f"{LATENTS}/x"):
                for stray in (self.folder / name).parent.glob(".*.tmp"):
                    stray.unlink()
            self._count()
            if self.missing:
                raise RunFolderError(
                    f"{latents / self.missing} is missing and later blocks are there",
                    hint=self._way_round(self.blocks),
                )
            self.dropped = self._torn_last()
            if self.dropped:
                (latents / self.dropped).replace(latents / (self.dropped + TORN))
                durable.sync_folder(latents)
            trace = self.folder / TRACE
            lines = trace.read_bytes().splitlines(keepends=True) if trace.exists() else []
            if lines and not lines[-1].endswith(b"\n"):
                durable.write(trace, b"".join(lines[:-1]))
        except OSError as error:
            raise self._failure(error, self.folder) from error

    def _count(self) -> None:
        """Find the blocks from the first one on, and whether one is `missing` before others."""
        try:
            found = {path.name for path in (self.folder / LATENTS).glob("*.safetensors")}
        except OSError as error:
            raise RunFolderError(
                f"{self.folder} cannot be read: {error.strerror or error}", hint="Check its permissions."
            ) from error
        self.blocks = next(n for n in range(len(found) + 1) if _entry_name(n) not in found)
        self.missing = _entry_name(self.blocks) if self.blocks < len(found) else ""

    def _torn_last(self) -> str:
        """Leave the last block out if it is torn, and say its name. Raises: RunFolderError if it cannot be read."""
        if self.blocks and not self.missing:
            try:
                self.entry(self.blocks - 1)
            except _TornError:
                self.blocks -= 1
                return _entry_name(self.blocks)
        return ""

    def _way_round(self, index: int) -> str:
        """What to do about a block that is missing or damaged."""
        if not index:
            return "Nothing before it is left. Make the video again, or restore the file."
        return f"`packforcing extend {shlex.quote(str(self.folder))} --from T` can branch off before it."

    def _write(self, name: str, data: bytes) -> None:
        try:
            durable.write(self.folder / name, data)
        except OSError as error:
            raise self._failure(error, self.folder / name) from error

    def _failure(self, error: OSError, path: Path) -> PackforcingError:
        hint = f"The {self.blocks} blocks before are safe." if self.blocks else ""
        return durable.failure(error, path, kind=RunFolderError, hint=hint)


class _TornError(RunFolderError):
    """A block's file was read and is not what was written."""


def _safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """The bytes of a safetensors file in pieces, so that a large one is in memory but once.

    The library's own `save_file` tells of a full disk in words alone, and its `save` holds all of it again.
    """
    import torch

    names = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # aligned like this
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name in ordered:
        tensor = tensors[name]
        end = at + tensor.nbytes
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in ordered:
        data = tensors[name].contiguous().flatten().view(torch.uint8).numpy().data
        for start in range(0, len(data), _PIECE_BYTES):
            yield bytes(data[start : start + _PIECE_BYTES])


_UNSIGNED = "0" * 64  # stands where the hash will be while it is worked out


def _signed(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Metadata of a safetensors file that has the hash of the whole file in it."""
    digest = hashlib.sha256()
    for piece in _safetensors(tensors, {**metadata, "sha256": _UNSIGNED}):
        digest.update(piece)
    return {**metadata, "sha256": digest.hexdigest()}


def _checked_snapshot(path: Path) -> tuple[int, str]:
    """(blocks it was made after, ""), or (0, what is wrong with it). Reads all of it, a piece at a time."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            header = file.read(min(int.from_bytes(start, "little"), path.stat().st_size))
            metadata = json.loads(header)["__metadata__"]
            said = metadata.get("sha256")
            if said is None:
                return 0, f"{path} is of an older version"
            digest = hashlib.sha256(start + header.replace(said.encode(), _UNSIGNED.encode(), 1))
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
        if digest.hexdigest() == said:
            return int(metadata["blocks"]), ""
    except OSError as error:
        return 0, f"{path} cannot be read: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # no such header, which `_safetensors` never writes
    return 0, f"{path} is damaged: its contents are not what was written"


def _entry_name(index: int) -> str:
    return f"{index:06d}.safetensors"


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    import torch

    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------ the lock


_UNKNOWN = "an unknown process"


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """The right to write into any folder, for one process at a time. Raises: LockedError."""
    lock = _Lock(folder)
    try:
        yield
    finally:
        lock.release()


class _Lock:
    """The right to work on a run folder, for one process at a time.

    The file is locked by the system, which lets go when the process ends, and says who holds it for people and for
    other machines. A text that was left behind by a process of this machine is taken over; one of another machine
    cannot be judged from here, so it stands until somebody removes the file.

    shared: the right to read, for many at a time; the file is not changed.
    """

    def __init__(self, folder: Path, *, shared: bool = False) -> None:
        path, self._shared = folder / LOCK, shared
        hint = f"If that process is gone: {'del' if os.name == 'nt' else 'rm'} {shlex.quote(str(path))}"
        mode = os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT
        try:
            self._fd: int | None = os.open(path, mode | durable.BINARY, 0o666)
        except OSError as error:
            if shared and isinstance(error, FileNotFoundError):  # nobody ever worked on it
                self._fd = None
                return
            raise durable.failure(error, path, kind=RunFolderError) from error
        try:
            guarded = _flock(self._fd, shared=shared)
            holder = _holder(os.read(self._fd, 4096))
            if guarded is False:
                raise LockedError(
                    f"{holder or 'another process'} is working on {folder}", hint="Wait for it."
                )
            if holder and not (guarded and _is_here(holder)):
                raise LockedError(f"{folder} is locked by {holder}", hint=hint)
            if shared:
                return
            os.ftruncate(self._fd, 0)
            durable.append(
                self._fd,
                json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(),
                size_bytes=0,
            )
        except OSError as error:
            self._abandon()
            raise durable.failure(error, path, kind=RunFolderError) from error
        except LockedError:
            self._abandon()
            raise

    def release(self) -> None:
        if self._fd is not None:
            if not self._shared:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, 0)
            self._abandon()

    def _abandon(self) -> None:
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = None


def _flock(fd: int, *, shared: bool = False) -> bool | None:
    """True: this process has it now. False: another one has it. None: this system cannot tell."""
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True
    return None


def _holder(text: bytes) -> str:
    """Who wrote a lock: "process 7 on HOST"; empty if nobody."""
    if not text.strip(b"\0 \n"):
        return ""
    try:
        values = json.loads(text)
        return f"process {int(values['pid'])} on {values['host']}"
    except (ValueError, KeyError, TypeError):
        return _UNKNOWN


def remove_lock_of_elsewhere(folder: Path) -> None:
    """Remove the lock that a process of another machine left; only for who knows that it is gone.

    One of this machine stays if the system can say whether its process lives.
    Raises: RunFolderError if that is not possible.
    """
    path = folder / LOCK
    try:
        with path.open("rb+") as file:
            holder = _holder(file.read(4096))
            if not holder or (_is_here(holder) and _flock(file.fileno()) is not None):
                return
        path.unlink(missing_ok=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise durable.failure(error, path, kind=RunFolderError) from error


def _is_locked(folder: Path) -> bool:
    """Whether a process is at work on a folder, as far as can be told; changes nothing."""
    try:
        fd = os.open(folder / LOCK, os.O_RDWR | durable.BINARY)
    except OSError:
        return False
    try:
        holder = _holder(os.read(fd, 4096))
        if not holder:
            return False
        guarded = _flock(fd)
    finally:
        os.close(fd)
    return guarded is False or bool(holder and not (guarded and _is_here(holder)))


def _is_here(holder: str) -> bool:
    """Whether a holder was a process of this machine; what a kill left half-written was."""
    return holder == _UNKNOWN or holder.endswith(f" on {socket.gethostname()}")
