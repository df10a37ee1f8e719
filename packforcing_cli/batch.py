"""Hundreds of videos: from the lines of a manifest to finished files, each exactly once.

    lines -> planned: seeds, identities, names -> the ledger -> workers, each with a model -> files

    FOLDER/0001-a-red-circle-7.mp4      outputs, named by a template
    FOLDER/ledger.sqlite3               what became of each job
    FOLDER/.packforcing/runs/ID         a run folder for each job
    FOLDER/.packforcing/logs            what workers said

A job is known by the hash of what it will do, never by a file's name. Workers are processes of their own, started by
`Local`, or this process itself (`generate_many`); `ray_engine` has those on other machines.
"""

from __future__ import annotations

import abc
import contextlib
import difflib
import hashlib
import json
import logging
import os
import re
import signal
import string
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from packforcing_cli import config, continuation, durable, ledger, machine, manifest, packages, runfolder
from packforcing_cli.config import GenerateRequest, MemoryOptions
from packforcing_cli.errors import DiskFullError, EnvironmentProblem, PackforcingError, UsageError
from packforcing_cli.ledger import Added, Entry, Ledger, Row
from packforcing_cli.manifest import ExtendRequest, Line
from packforcing_cli.provenance import NOT_REPEATED
from packforcing_cli.tasks import Options, Task, file_sha256, model_hash, run_folder
from packforcing_cli.timeline import Place, Problem

TEMPLATE = "{index:04d}-{slug}-{seed}"
FIELDS = ("index", "line", "slug", "seed", "id")
HIDDEN = manifest.HIDDEN
CONTAINERS = manifest.CONTAINERS
POLL_SECONDS = 0.2
_LOAD_OPTIONS = (
    *("model", "device", "dtype", "quantize", "quantize_text", "offload", "vae", "loras"),
    *("attention", "compile", "cuda_graphs", "quantize_skip", "vae_latents"),
)
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors")  # of a LoRA's folder
_MIN_STEM_BYTES = 8
_MAX_FAST_DEATHS = 3  # workers in a row that end before they began a job

_log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------------- names


@dataclass(frozen=True)
class Template:
    """How files are called: text with {index}, {line}, {slug} (of title or prompt), {seed}, {id}; "/" makes folders.

    Raises: UsageError, from the constructor, for a field that is not known, or a place outside the folder.
    """

    text: str = TEMPLATE

    def __post_init__(self) -> None:
        hint = f"For example {TEMPLATE}.mp4; the fields are {', '.join(FIELDS)}."
        try:
            parts = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise UsageError(f"the template {self.text!r} cannot be read: {error}", hint=hint) from error
        for _, name, spec, conversion in parts:
            if name is None:
                continue
            if name not in FIELDS:
                near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.0)[0]
                raise UsageError(
                    f"the template has {{{name}}}, which is not known; the nearest is {{{near}}}", hint=hint
                )
            if conversion or (spec and name in ("slug", "id")):
                raise UsageError(f"the template formats {{{name}}} in a way that is not possible", hint=hint)
            try:
                format(1, spec or "")
            except ValueError as error:
                raise UsageError(f"the template's {{{name}:{spec}}}: {error}", hint=hint) from error
        if not self.text.strip() or "\0" in self.text:
            raise UsageError("the template is empty", hint=hint)
        place = self._filled(1, 1, "slug", 1, "id")
        said = inside(place)
        if said:
            raise UsageError(f"the template {self.text!r} {said}", hint=hint)
        suffix = Path(place).suffix.lower()
        is_fixed = self.text.lower().endswith(suffix)
        if suffix in CONTAINERS and not is_fixed:
            raise UsageError(f"the template {self.text!r} has no fixed ending", hint=hint)
        if is_fixed and suffix not in CONTAINERS and re.fullmatch(r"\.[a-z][a-z0-9]{1,4}", suffix):
            raise UsageError(f"the template {self.text!r} {manifest.wrong_ending(place)}", hint=hint)

    def name(self, *, index: int, line: int, words: str, seed: int | None, id: str, more: str = "") -> str:  # noqa: A002
        """The name of a job, with folders, whatever its words are; each part fits in any file system's names.

        more: goes in front of the ending, to make it another name.
        """
        from packforcing_cli import video

        number = 0 if seed is None else seed
        suffix = next((end for end in CONTAINERS if self.text.lower().endswith(end)), "")
        ending = f"{more}{suffix or '.mp4'}"
        room = video.MAX_SAFE_NAME_BYTES
        while True:
            slug = cut(video.safe_name(words, ".mp4").removesuffix(".mp4"), room)
            full = self._filled(index, line, slug, number, id[:12]).removesuffix(suffix)
            *folders, stem = full.split("/")
            longest = max(len(part.encode()) for part in (*folders, stem + ending))
            if longest <= video.MAX_SAFE_NAME_BYTES or room <= _MIN_STEM_BYTES:
                return PurePosixPath(*folders, stem + ending).as_posix()
            room = max(_MIN_STEM_BYTES, room - (longest - video.MAX_SAFE_NAME_BYTES))

    def _filled(self, index: int, line: int, slug: str, seed: int, id: str) -> str:  # noqa: A002
        return self.text.format(index=index, line=line, slug=slug, seed=seed, id=id)


def cut(text: str, size_bytes: int) -> str:
    """Text of at most so many UTF-8 bytes, no character split."""
    return text.encode()[:size_bytes].decode(errors="ignore").rstrip("-. ") or "video"


inside = manifest.inside
same_name = ledger.same_name


# -------------------------------------------------------------------------------------------------------- identities


class Inputs:
    """Hashes of files and models, each looked at once."""

    def __init__(self) -> None:
        self._files: dict[Path, str] = {}
        self._models: dict[str, str] = {}

    def file(self, path: Path) -> str:
        """sha256 of a file. Raises: UsageError if it cannot be read."""
        if path not in self._files:
            try:
                self._files[path] = file_sha256(path)
            except OSError as error:
                said = "there is no file" if isinstance(error, FileNotFoundError) else "cannot read"
                raise UsageError(f"{said} {path}", hint="Check the path.") from error
        return self._files[path]

    def model(self, name: str) -> str:
        """Hash of all files of a package; of a random model its name. Raises: PackforcingError if it is not here."""
        if name not in self._models:
            self._models[name] = model_hash(name)
        return self._models[name]


def _hash(values: Any) -> str:
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def plan_jobs(
    lines: Sequence[Line],
    *,
    template: Template | None = None,
    seed: int = 0,
    source: str = "jobs",
    there: Sequence[Row] = (),
    root: Path | None = None,
) -> tuple[list[Entry], list[str]]:
    """Decide everything about jobs that does not need a model: seeds, identities, names.

    A line without a seed gets one that depends on `seed`, on what it asks for, and on how many equal lines came before:
    the same manifest gives the same seeds, whatever is added to it or moved in it.
    Args:
        lines:  with models decided.
        source: the manifest's name, for messages.
        there:  jobs of the folder; they keep their names.
        root:   the folder of the batch, in which names must lie.
    Returns: the jobs, and what a person should be told.
    Raises: UsageError with every line whose output is not possible or is another's.
    """
    template, inputs, counts = template or Template(), Inputs(), dict[str, int]()
    problems: list[Problem] = []
    earlier = _earlier_lines(lines, root, source, problems)
    made = dict[int, Entry]()
    for line in lines:
        before = made[earlier[line.index].index] if line.index in earlier else None
        made[line.index] = _any_draft(line, inputs, seed, counts, before)
    drafts = [(line, made[line.index]) for line in lines]
    ids, keys = ({getattr(draft, name) for _, draft in drafts} for name in ("id", "key"))
    gone = {row.id: row for row in there if row.id not in ids and row.key in keys and row.is_open}
    names = {row.id: row.output for row in there if row.id not in gone}
    freed = {row.key: row.output for row in gone.values()}
    used = {same_name(name): job for job, name in names.items()}
    notes, first_of = list[str](), dict[str, Entry]()
    for line, draft in drafts:
        given = None if line.output is None else manifest.given_name(line.output)
        said = "" if given is None else _leads_out(root, given)
        before = first_of.get(draft.id)
        if said:
            said = f"output {line.output!r} {said}"
        elif before is not None:
            if given is None or given == before.output:
                notes.append(f"line {line.line} asks for the same video as line {before.line}: made once")
                continue
            said = f"asks for the same video as line {before.line}, in another file; give it another seed"
        else:
            name = names.get(draft.id) or given or freed.get(draft.key, "")
            other = used.setdefault(same_name(name), draft.id) if name else draft.id
            if other in first_of:
                said = f"output {line.output!r} is that of line {first_of[other].line}, too"
            elif other != draft.id:
                said = f"output {line.output!r} is that of another job in the folder"
            first_of[draft.id] = replace(draft, output=name)
        if said:
            column = line.columns.get("output", 1)
            problems.append(Problem(Place(source, line.line, column), said))
    manifest.raise_if_any(problems)
    entries = []
    for line, draft in drafts:
        entry = first_of.pop(draft.id, None)
        if entry is None:
            continue
        name, number = entry.output, 1
        while not name:
            name = template.name(
                index=line.index,
                line=line.line,
                words=line.title or line.request.prompt or Path(getattr(line.request, "source", "")).stem,
                seed=draft.spec["request"].get("seed"),
                id=draft.id,
                more="" if number == 1 else f"-{number}",
            )
            number += 1
            name = "" if same_name(name) in used else name
        used[same_name(name)] = draft.id
        entries.append(replace(entry, output=name))
    return entries, notes


def _leads_out(root: Path | None, name: str) -> str:
    """Whether symbolic links that are there lead out of the folder."""
    if root is None:
        return ""
    try:
        path = root / name
        bad = path.is_symlink() or not path.parent.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError) as error:
        return f"cannot be looked at: {error}"
    return "leads out of the folder of the batch through a symbolic link" if bad else ""


def _any_draft(line: Line, inputs: Inputs, seed: int, counts: dict[str, int], before: Entry | None) -> Entry:
    """The job of a line, without a name; also of one that cannot be planned at all.

    before: the job whose video it goes on with, if that is of the same manifest.
    """
    error = line.problem
    if error is None:
        try:
            if before is not None and isinstance(line.request, ExtendRequest):
                return _later_draft(line, line.request, before, inputs)
            return _draft(line, inputs, seed, counts)
        except PackforcingError as failure:
            error = failure
        except (OSError, RuntimeError, ValueError) as failure:
            said = manifest.printable(" ".join(str(failure).split()), 300)
            error = UsageError(f"cannot be planned: {said}", hint="Check the paths of the line.")
    request = line.request
    if not isinstance(request, GenerateRequest):
        request = GenerateRequest(prompt=request.prompt or "x", seconds=request.seconds)
    key = _hash(["unplanned", repr(sorted(line.values.items()))])
    return Entry(
        id=_hash([key, error.message]),
        key=key,
        position=line.index,
        line=line.line,
        shown=line.shown,
        output="",
        spec={
            "kind": "generate",
            "request": request.to_values(),
            "model": "missing",
            "problem": error.message,
        },
        load_key="",
        layout_key="",
        weight=0.0,
        problem=error,
    )


def _draft(line: Line, inputs: Inputs, seed: int, counts: dict[str, int]) -> Entry:
    """The job of a line, without a name; one that cannot be done has the reason."""
    error: PackforcingError | None = None
    whole = line
    try:
        whole = manifest.with_timeline_file(line)
    except PackforcingError as failure:
        error = failure
    request = whole.request
    if isinstance(request, GenerateRequest) and isinstance(line.request, GenerateRequest):
        request = _absolute(request.model_copy(update={"timeline": whole.timeline}))
        asked = _absolute(line.request.model_copy(update={"timeline": line.timeline})).to_values()
        asked = {name: value for name, value in asked.items() if name not in NOT_REPEATED}
        asked["timeline file"] = line.values.get("timeline")
        files = {"image": request.image, "embeddings": request.embeddings}
        files |= {f"picture {n}": path for n, path in enumerate(request.pin_images)}
        kind, values = "generate", request.to_values()
    else:
        assert isinstance(request, ExtendRequest)
        return _extension_draft(line, request, inputs, seed, counts)
    if request.seed is None:
        asked["seed"] = values["seed"] = _chosen_seed(seed, [kind, asked], counts)
    looks: list[tuple[str, Callable[[], str]]] = []
    if "timeline" in line.values:
        files["timeline"] = Path(line.values["timeline"]).expanduser().absolute()
    files |= {
        f"lora {n} {part}": (place.parent if place.name in ADAPTERS else place) / part
        for n, place in enumerate(config.parse_lora(text)[0] for text in request.loras)
        for part in ADAPTERS
    }
    for name, path in files.items():
        if path is not None:
            looks.append((name, lambda path=path: inputs.file(path)))  # type: ignore[misc]
    return _entry(line, kind, asked, request, values, {}, looks, inputs, error)


def _extension_draft(
    line: Line, request: ExtendRequest, inputs: Inputs, seed: int, counts: dict[str, int]
) -> Entry:
    """The job of a line that makes a video longer."""
    asked = {
        **request.model_dump(mode="json", exclude={"overwrite", *NOT_REPEATED}),
        "timeline": line.timeline.to_json(),
    }
    asked["source"] = source = _source_place(request.source)
    if request.frames is not None:
        request = request.model_copy(update={"frames": request.frames.expanduser().absolute()})
    chosen = request.seed
    more: dict[str, Any] = {"source": source}
    error: PackforcingError | None = None
    whole = GenerateRequest(
        prompt=request.prompt or "x", model=request.model or "demo", seconds=request.seconds
    )
    looks: list[tuple[str, Callable[[], str]]] = []
    kind = "extend"
    try:
        run = continuation.find(source)
        if run is not None:
            whole, more["blocks"], content = _branch_request(run, line, request)
            more["run"] = str(run)
            looks.append(("source", lambda: content))
        else:
            if chosen is None:
                chosen = _chosen_seed(seed, [kind, asked], counts)
            whole = _file_request(Path(source), line, request, chosen)
            looks.append(("source", lambda: inputs.file(Path(source))))
    except PackforcingError as failure:
        error = failure
        looks.append(("source", lambda: "missing"))
    values = {**whole.to_values(), "overwrite": request.overwrite}
    return _entry(line, kind, {**asked, "kind": "extend"}, whole, values, more, looks, inputs, error)


def _source_place(source: str) -> str:
    """The name of a source that holds wherever a worker runs: a file's or folder's place, or a run's id."""
    path = Path(source).expanduser()
    with contextlib.suppress(OSError):
        if path.exists() or path.suffix:
            return str(path.absolute())
    return source


def _branch_request(folder: Path, line: Line, request: ExtendRequest) -> tuple[GenerateRequest, int, str]:
    """What a branch of a run asks for, how many blocks it takes over, and their hash."""
    _refuse_for_elsewhere(line, request)
    with runfolder.RunFolder.open_to_read(folder) as old:
        whole, blocks = continuation.request_of_branch(old, request, line.timeline)
        digest = hashlib.sha256(old.record.id.encode())
        for entry in old.entries(0, blocks):
            digest.update(entry.latents.contiguous().flatten().float().numpy().tobytes())
        return whole, blocks, digest.hexdigest()


def _refuse_for_elsewhere(line: Line, request: ExtendRequest) -> None:
    """Raises: UsageError if a line that goes on with a run has options which that keeps."""
    wrong = [name for name in continuation.ELSEWHERE if getattr(request, name) and name in line.columns]
    if wrong:
        raise UsageError(
            f"{wrong[0]} is for videos made elsewhere; {request.source} goes on from its run",
            hint=f"Leave {wrong[0]} away.",
        )


def _file_changes(request: ExtendRequest) -> dict[str, Any]:
    """Settings of the new file, None = not given."""
    return {name: getattr(request, name) for name in continuation.FILE_CHANGES}


class _SourceProblem(UsageError):
    """The problem of a line that goes on with the video of one which has a problem. root: the first line, and why."""

    kind = UsageError.__name__
    root = ""


def _problem_of_source(before: Entry, problem: PackforcingError) -> PackforcingError:
    """The problem of a line that goes on with the video of `before`; of a chain only the first line is told."""
    root = getattr(problem, "root", "")
    said = f", comes after {root}" if root else f": {problem.message}"
    error = _SourceProblem(f"line {before.line}, whose video it goes on with{said}", hint=problem.hint)
    error.root = root or f"line {before.line}: {problem.message}"
    return error


def _later_draft(line: Line, request: ExtendRequest, before: Entry, inputs: Inputs) -> Entry:
    """The job of a line that goes on with the video of an earlier one; the rest is decided when that is made."""
    error = before.problem
    if error is not None:
        error = _problem_of_source(before, error)
    elif not before.spec["request"].get("keep_run", True):
        error = UsageError(
            f"line {before.line}, whose video it goes on with, keeps no run folder",
            hint=f"Remove keep_run from line {before.line}.",
        )
    else:
        try:
            _refuse_for_elsewhere(line, request)
        except UsageError as failure:
            error = failure
    if request.frames is not None:
        request = request.model_copy(update={"frames": request.frames.expanduser().absolute()})
    asked = {
        **request.model_dump(mode="json", exclude={"overwrite", "source", *NOT_REPEATED}),
        "timeline": line.timeline.to_json(),
        "after": before.key,
        "kind": "extend",
    }
    kept = {"frames": None, "output": None, "image": None, "keep_run": True, "overwrite": request.overwrite}
    changes = {"seed": request.seed, "device": request.device, **_file_changes(request)}
    changes = {name: value for name, value in changes.items() if value is not None}
    whole = GenerateRequest.from_values({**before.spec["request"], **kept, **changes})
    more = {
        "after": before.id,
        "asked": request.model_dump(mode="json"),
        "timeline": line.timeline.to_json(),
    }
    looks: list[tuple[str, Callable[[], str]]] = [("source", lambda: f"job {before.id}")]
    entry = _entry(line, "extend", asked, whole, whole.to_values(), more, looks, inputs, error)
    return replace(entry, after=before.id)


def _earlier_lines(
    lines: Sequence[Line], root: Path | None, source: str, problems: list[Problem]
) -> dict[int, Line]:
    """index of a line -> the earlier one whose video is its source.

    Its `output` is meant by its name in the folder of the batch, and by its path.
    """
    written = {same_name(manifest.given_name(line.output)): line for line in reversed(lines) if line.output}
    found: dict[int, Line] = {}
    for line in lines:
        if not isinstance(line.request, ExtendRequest):
            continue
        text = line.request.source
        path = Path(text).expanduser().absolute()
        names = [text] if inside(text) == "" and not text.startswith("./") else []
        if root is not None and path.is_relative_to(root.absolute()):
            names.insert(0, path.relative_to(root.absolute()).as_posix())
        first = next(
            filter(None, (written.get(same_name(manifest.given_name(name))) for name in names)), None
        )
        if first is None:
            continue
        is_here = path.exists() and (
            root is None or path != root.absolute() / manifest.given_name(first.output or "")
        )
        said = ""
        if is_here and same_name(names[0]) == same_name(text):
            said = f"is a file here, and the output of line {first.line}: write ./{text} for the file"
            if root is not None:
                said += f", {root / text} for the output"
        elif first.index == line.index:
            said = "is its own output"
        elif first.index > line.index:
            said = f"is the output of line {first.line}, which comes later: put that line first"
        if said:
            column = line.columns.get("source", 1)
            problems.append(Problem(Place(source, line.line, column), f"source {text!r} {said}"))
        else:
            found[line.index] = first
    return found


def _file_request(path: Path, line: Line, request: ExtendRequest, seed: int) -> GenerateRequest:
    """What going on with somebody's video asks for."""
    from packforcing_cli.reader import VideoReader

    if request.start is not None:
        raise UsageError(
            f"from is for videos whose run is here; {path} is read as pictures",
            hint="To use a part of it: from_time and to_time.",
        )

    said = request.prompt if request.prompt is not None else VideoReader(path).metadata.get("prompt", "")
    given = {
        "model": request.model or "demo",
        "size": request.size,
        "fit": request.fit,
        "device": request.device,
        "frames": request.frames,
        **_file_changes(request),
    }
    whole = GenerateRequest(
        prompt=said.strip() or f"more of {path.stem}",
        seconds=request.seconds,
        seed=seed,
        **{name: value for name, value in given.items() if value is not None},
    )
    return continuation.request_for_file(
        whole,
        path,
        prompt=said,
        asked=line.timeline,
        from_time=request.from_time,
        to_time=request.to_time,
        only_new=request.only_new,
    )


def _chosen_seed(seed: int, asked: Any, counts: dict[str, int]) -> int:
    """The seed of a job that names none."""
    known = _hash(asked)
    counts[known] = counts.get(known, 0) + 1
    return int(_hash([seed, known, counts[known]])[:8], 16) % 2**31


def _entry(
    line: Line,
    kind: str,
    asked: Mapping[str, Any],
    request: GenerateRequest,
    values: Mapping[str, Any],
    more: Mapping[str, Any],
    looks: list[tuple[str, Callable[[], str]]],
    inputs: Inputs,
    error: PackforcingError | None,
) -> Entry:
    """A job without a name.

    asked: what its key is the hash of.  values: the request.  more: what its spec has besides.
    looks: names and what hashes the contents of its inputs.
    """
    key = _hash([kind if kind == "generate" else "extend", asked])
    compressor, vae = request.memory.compressor, request.vae
    contents: dict[str, str] = {}
    looks.append(("model", lambda: inputs.model(request.model)))
    if compressor not in config.COMPRESSORS:
        looks.append(("compressor", lambda: packages.find_compressor(compressor).verify()))
    if vae is not None and Path(vae).is_dir():
        looks.append(("vae", lambda: _folder_hash(Path(vae), inputs)))
    for name, look in looks:
        try:
            contents[name] = look()
        except PackforcingError as failure:
            contents[name], error = "missing", error or failure
    weights = [contents.get(name) for name in ("model", "compressor", "vae")]
    weights += [content for name, content in contents.items() if name.startswith("lora ")]
    load = [values[name] for name in _LOAD_OPTIONS]
    return Entry(
        id=_hash([key, contents]),
        key=key,
        position=line.index,
        line=line.line,
        shown=line.shown,
        output="",
        spec={"kind": kind, "request": dict(values), "model": contents["model"], **more},
        load_key=_hash([load, compressor, weights]),
        layout_key=_hash([values["size"], values["memory"], values["frames_per_block"]]),
        weight=float(manifest.seconds_of(line)) * _pixels(request),
        problem=error,
    )


def _pixels(request: GenerateRequest) -> float:
    size = request.size
    if size is None:
        with contextlib.suppress(PackforcingError):
            size = packages.facts(request.model).default_size
    return 1.0 if size is None else size[0] * size[1] / 1e6


def _folder_hash(folder: Path, inputs: Inputs) -> str:
    return _hash({path.name: inputs.file(path) for path in sorted(folder.rglob("*")) if path.is_file()})


def _absolute(request: GenerateRequest) -> GenerateRequest:
    """The request with paths that hold wherever a worker runs."""
    changes: dict[str, Any] = {
        name: path.expanduser().absolute()
        for name in ("image", "embeddings", "frames")
        if (path := getattr(request, name)) is not None
    }
    changes["pin_images"] = tuple(path.expanduser().absolute() for path in request.pin_images)
    adapters = [config.parse_lora(text) for text in request.loras]
    changes["loras"] = tuple(f"{path.expanduser().absolute()}:{weight!r}" for path, weight in adapters)
    for name in ("model", "vae"):
        value = getattr(request, name)
        if value is not None and Path(value).expanduser().is_dir():
            changes[name] = str(Path(value).expanduser().absolute())
    compressor = request.memory.compressor
    if Path(compressor).expanduser().is_dir():
        memory = {
            **request.memory.model_dump(exclude_unset=True),
            "compressor": str(Path(compressor).absolute()),
        }
        changes["memory"] = MemoryOptions(**memory)
    return request.model_copy(update=changes)


# --------------------------------------------------------------------------------------------------------- the folder


@dataclass
class Folder:
    """The folder of a batch, its ledger open.

    Raises: UsageError, LockedError, DiskFullError.
    """

    path: Path
    ledger: Ledger

    @classmethod
    def open(cls, path: Path, *, shard: tuple[int, int] | None = None) -> Folder:
        """Open the folder, made if it is not there."""
        path = path.absolute()
        name = ledger.name_for(shard)
        others = [there.name for there in ledger.ledgers(path) if _shards(there.name) != _shards(name)]
        if others:
            raise UsageError(
                f"{path} was begun with {_said_shards(others[0])}",
                hint="Go on with the same --shard of so many, or choose another --out.",
            )
        try:
            durable.make_folder(path / HIDDEN / "runs")
            durable.make_folder(path / HIDDEN / "logs")
        except OSError as error:
            raise durable.failure(
                error, path, kind=UsageError, hint="Choose another folder with --out."
            ) from error
        return cls(path, Ledger.create(path / name, meta={"created": repr(time.time())}))

    @classmethod
    def rows_of(cls, path: Path, *, shard: tuple[int, int] | None = None) -> list[Row]:
        """The jobs of a folder; nothing is made if it is not there. Raises: UsageError, RunFolderError."""
        place = path.absolute() / ledger.name_for(shard)
        if not place.is_file():
            return []
        with Ledger.open(place) as base:
            return base.rows()

    def add(self, entries: Sequence[Entry], *, source: str, add: bool = False) -> Added:
        """Queue what is not there yet.

        Args:
            source: the manifest's name.
            add:    whether it may be another manifest than before.
        Raises: UsageError if the folder has jobs that are not among these.
        """
        found = self.ledger.add(entries, only_look=True)
        if found.elsewhere and not add:
            name = self.ledger.meta("source") or "another manifest"
            raise UsageError(
                f"{self.path} belongs to another manifest: {found.elsewhere} of its jobs (from {name}) are not in"
                f" {source}",
                hint="Choose another --out, or put these jobs beside those with --add.",
            )
        self.ledger.set_meta("source", source)
        return self.ledger.add(entries)

    def check_done(self, on_file: Callable[[int, int], None] = lambda n, total: None) -> list[str]:
        """Compare what done jobs made with its hash: what is gone is queued again, what is another file fails.

        Returns: what a person should be told.
        """
        notes = []
        rows = self.ledger.rows("done")
        for number, row in enumerate(rows, 1):
            path = self.path / row.output
            on_file(number, len(rows))
            try:
                same = (
                    path.stat().st_size == row.result["size_bytes"]
                    and file_sha256(path) == row.result["sha256"]
                )
            except FileNotFoundError:
                notes.append(f"{row.output} is gone: it is made again")
                self.ledger.again(row.id, "its file is gone")
                continue
            except OSError as error:
                self.ledger.spoiled(row.id, UsageError(f"{path} cannot be read: {error.strerror}"))
                continue
            if not same:
                self.ledger.spoiled(
                    row.id,
                    UsageError(
                        f"{row.output} is not what was made: {path.stat().st_size:,} bytes, and"
                        f" {row.result['size_bytes']:,} were written",
                        hint="packforcing batch retry makes it again, and keeps this file under another name.",
                    ),
                )
        return notes

    def task(self, row: Row, *, is_orphan: bool = False) -> Task:
        """A job as a worker gets it."""
        return Task(
            id=row.id,
            spec=row.spec,
            output=str(self.path / row.output),
            run=str(run_folder(self.path, row.id)),
            load_key=row.load_key,
            layout_key=row.layout_key,
            attempt=row.attempt,
            retries=row.retries,
            fit=row.fit,
            result=row.result,
            is_orphan=is_orphan,
        )


def _shards(name: str) -> str:
    return name.rpartition("-of-")[2] if "-of-" in name else ""


def _said_shards(name: str) -> str:
    count = _shards(name).partition(".")[0]
    return f"--shard I/{count}" if count else "no --shard"


def parse_shard(text: str) -> tuple[int, int]:
    """ "2/8" -> (2, 8). Raises: UsageError."""
    first, slash, last = text.partition("/")
    if slash and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= 100_000:
        return int(first), int(last)
    raise UsageError(f"--shard {text}: must be I/N with I from 1 to N", hint="For example --shard 3/8.")


def of_shard(entries: Sequence[Entry], shard: tuple[int, int] | None) -> list[Entry]:
    """Every N-th job, beginning with the I-th; one that goes on with another one's video stays with that."""
    if shard is None:
        return list(entries)
    part_of: dict[str, int] = {}
    for number, entry in enumerate(entries):
        part_of[entry.id] = part_of.get(entry.after, number % shard[1])
    return [entry for entry in entries if part_of[entry.id] == shard[0] - 1]


# ------------------------------------------------------------------------------------ the ledger as a worker's board


_AT_WORK: set[tuple[Path, str]] = set()
"""Ledgers and jobs in them that this process claimed and that did not come to an end."""


class LedgerBoard:
    """Jobs straight from the ledger, for workers of this machine.

    only: ids of the jobs to do; None = all.
    """

    def __init__(self, folder: Folder, *, slot: int = 0, only: Sequence[str] | None = None) -> None:
        self._folder, self._slot = folder, slot
        self._holder = ledger.this_process()
        self._only = tuple(only or ())

    def release_stale(self) -> None:
        """Give back what this process claimed before and nobody in it is at work on any more."""
        base = self._folder.ledger
        for row in base.rows("started"):
            if row.holder == self._holder and (base.path, row.id) not in _AT_WORK:
                base.release(row.id, self._holder, why="left behind")

    def claim(self, load_key: str, layout_key: str) -> Task | None:
        row = self._folder.ledger.claim(
            self._holder, load_key=load_key, layout_key=layout_key, ids=self._only
        )
        if row is None:
            return None
        _AT_WORK.add((self._folder.ledger.path, row.id))
        return self._folder.task(row, is_orphan=self._folder.ledger.is_orphan(row.id))

    def upcoming(self, load_key: str, layout_key: str, limit: int) -> list[Task]:
        skip = self._slot if limit == 1 else 0  # workers that look ahead look at different jobs
        rows = self._folder.ledger.upcoming(
            load_key=load_key, layout_key=layout_key, limit=limit, skip=skip, ids=self._only
        )
        return [self._folder.task(row) for row in rows]

    def idle(self) -> float | None:
        """Waits for jobs that may be tried again, and for those of other processes of this machine.

        Not for jobs of other machines, nor for what comes after them: `batch retry --lost` is for those.
        """
        base = self._folder.ledger
        if base.meta("paused") is not None:
            return None
        later = base.next_start(self._only)
        if later is not None:
            return max(POLL_SECONDS, min(1.0, later - time.time()))
        here = [
            holder
            for holder in base.holders(self._only)
            if holder != self._holder and ledger.host_of(holder) == ledger.host_of(self._holder)
        ]
        return 2 * POLL_SECONDS if here else None

    def progress(self, task: Task, blocks: int, total: int) -> str:
        return self._folder.ledger.progress(task.id, self._holder, blocks, total)

    def done(self, task: Task, result: Mapping[str, Any]) -> None:
        with self._ends(task):
            self._folder.ledger.done(task.id, self._holder, result)

    def fail(
        self,
        task: Task,
        error: BaseException,
        *,
        retry_in: float | None = None,
        fit: Mapping[str, Any] | None = None,
    ) -> None:
        with self._ends(task):
            self._folder.ledger.fail(task.id, self._holder, error, retry_in=retry_in, fit=fit)

    def release(self, task: Task, *, cancelled: bool = False, why: str = "") -> None:
        with self._ends(task):
            self._folder.ledger.release(task.id, self._holder, cancelled=cancelled, why=why)

    @contextlib.contextmanager
    def _ends(self, task: Task) -> Iterator[None]:
        try:
            yield
        finally:
            _AT_WORK.discard((self._folder.ledger.path, task.id))

    def refuse(self, task: Task, error: BaseException) -> bool:
        return False  # all workers of a machine are alike

    def pause(self, why: str) -> None:
        self._folder.ledger.set_meta("paused", why)


# ---------------------------------------------------------------------------------------- workers on this machine


@dataclass(frozen=True)
class State:
    """How a batch stands.

    counts: of jobs by status.  work: done and whole, in the ledger's units.  started: jobs that are being made.
    new_failures: since this process began, but for jobs that failed only with their source.
    notes: what a person should be told now.
    """

    counts: Mapping[str, int]
    work: tuple[float, float]
    started: Sequence[Row]
    workers: int
    new_failures: int
    notes: Sequence[str] = ()


class Engine(abc.ABC):
    """What all engines have: the ledger is looked at again and again until nothing is left to do.

    Attributes: why: the reason why no more jobs are begun, "" while they are.
        problem: why jobs are left that nobody can do, None while there are none.
    """

    def __init__(self, folder: Folder, *, max_failures: int | None = None) -> None:
        self.folder = folder
        self.max_failures = max_failures
        self.why = ""
        self.problem: PackforcingError | None = None
        self._notes = list[str]()
        self._failed_before = folder.ledger.failures()

    @abc.abstractmethod
    def run(self) -> Iterator[State]:
        """Do all jobs; yields how it stands, a few times a second."""

    @abc.abstractmethod
    def stop(self, why: str) -> None:
        """Let workers end after the block they are at."""

    @abc.abstractmethod
    def kill(self) -> None:
        """End all workers at once; calling it again does no harm."""

    def state(self, workers: int) -> State:
        """How it stands now."""
        base = self.folder.ledger
        counts = base.counts()
        notes, self._notes = self._notes, []
        return State(
            counts=counts,
            work=base.work(),
            started=base.rows("started"),
            workers=workers,
            new_failures=max(0, base.failures() - self._failed_before),
            notes=notes,
        )

    def has_work(self) -> bool:
        """Whether jobs are left that somebody of this machine does or will do, and this engine waits for."""
        if self.why:
            return False
        base = self.folder.ledger
        host = ledger.host_of(ledger.this_process())
        held_here = any(ledger.host_of(holder) == host for holder in base.holders())
        return held_here or (base.next_start() is not None and base.meta("paused") is None)

    def too_many(self, state: State) -> bool:
        """Whether --max-failures is reached."""
        return self.max_failures is not None and state.new_failures >= self.max_failures


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
        words = [sys.executable, "-m", f"{__package__}.batch", str(self.folder.ledger.path)]
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


def threads_of(folder: Folder, workers: int, wanted: int | None, *, usual: int | None = None) -> int:
    """Threads a worker has, the same for all that ever work on a folder: results may depend on them.

    Args:
        wanted: what a person asked for; None = nothing.
        usual:  for a folder that was not begun; None = OMP_NUM_THREADS, or a share of this machine's cores.
    Raises: UsageError if others are wanted than before.
    """
    there = folder.ledger.meta("threads")
    if there is not None:
        if wanted is not None and wanted != int(there):
            raise UsageError(
                f"{folder.path} was begun with {there} threads a worker, and results may depend on them",
                hint=f"Leave --threads away, or give --threads {there}.",
            )
        return int(there)
    given = os.environ.get("OMP_NUM_THREADS", "")
    count = wanted or usual or (int(given) if given.isdecimal() and int(given) else 0)
    count = count or max(1, (os.cpu_count() or 1) // workers)
    folder.ledger.set_meta("threads", str(count))
    return count


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


# ---------------------------------------------------------------------------------------------------------- the library


@dataclass(frozen=True)
class Made:
    """What became of a job of `generate_many`.

    number: of the job, from 0.  path: the file; None if it failed.  error: why.  result: hashes and figures.
    """

    number: int
    path: Path | None
    error: str
    result: Mapping[str, Any]


def generate_many(
    jobs: Sequence[Mapping[str, Any] | str],
    folder: Path | str,
    *,
    defaults: Mapping[str, Any] | None = None,
    name: str = TEMPLATE,
    seed: int = 0,
    timeout: float | None = None,
    retries: int = 2,
    auto_fit: bool = False,
) -> Iterator[Made]:
    """Make many videos in this process with models that are loaded once; yields each as it is done or fails.

    The same folder and jobs go on where they ended: what is done is verified and yielded again, not made again; what
    failed is tried again. What a job may say is what a line of `packforcing batch` may; a model must be named, there or
    in `defaults`, unless it is the demo.
    Args:
        jobs:     prompts, or keys and values like {"prompt": "a red circle", "seconds": 5, "seed": 7}.
        defaults: key -> value for jobs that do not say otherwise.
        name:     how files are called, see `Template`.
        seed:     of jobs without one.
        timeout, retries, auto_fit: as `worker.Options`; a job that takes too long ends after its block.
    Raises: UsageError with all mistakes in the jobs; DiskFullError; LockedError. Other failures are the job's.
    """
    from packforcing_cli.worker import Worker

    lines = manifest.of_values(jobs, defaults={"model": "demo", **(defaults or {})})
    place = Path(folder).absolute()
    entries, _ = plan_jobs(lines, template=Template(name), seed=seed, there=Folder.rows_of(place), root=place)
    opened = Folder.open(place)
    with opened.ledger as base:
        number_of = {entry.id: entry.position - 1 for entry in entries}
        board = LedgerBoard(opened, only=list(number_of))
        board.release_stale()
        base.retry(list(number_of))  # what failed or was cancelled before
        opened.add(entries, source="generate_many", add=True)
        opened.check_done()
        base.set_meta("paused", None)
        told = set[str]()
        options = Options(timeout=timeout, retries=retries, auto_fit=auto_fit)

        def ended() -> Iterator[Made]:
            for row in base.rows():
                if (
                    row.id in number_of
                    and row.id not in told
                    and row.status in ("done", "failed", "cancelled")
                ):
                    told.add(row.id)
                    path = opened.path / row.output if row.status == "done" else None
                    yield Made(number_of[row.id], path, row.error.get("message", ""), row.result)

        yield from ended()
        for _ in Worker(board, options).run():
            yield from ended()
        yield from ended()


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1]), Options(**json.loads(sys.argv[2]))))
