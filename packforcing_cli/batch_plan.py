"""From a manifest's lines to planned jobs: seeds, identities, names; and why a line cannot be done.

    lines -> those that go on with an earlier one's video -> drafts: what each asks for, its seed, its identity -> names

A job is known by the hash of what it will do, never by a file's name: of what its line asks for (the key), and of that
with the contents of its inputs (the id). Nothing is queued or made here, and no model is loaded.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from packforcing_cli import config, continuation, ledger, manifest, packages, runfolder
from packforcing_cli.config import GenerateRequest, MemoryOptions
from packforcing_cli.errors import PackforcingError, UsageError
from packforcing_cli.ledger import Entry, Row
from packforcing_cli.manifest import ExtendRequest, Line
from packforcing_cli.provenance import NOT_REPEATED
from packforcing_cli.tasks import file_sha256, model_hash
from packforcing_cli.timeline import Place, Problem

TEMPLATE = "{index:04d}-{slug}-{seed}"
FIELDS = ("index", "line", "slug", "seed", "id")
CONTAINERS = manifest.CONTAINERS
_LOAD_OPTIONS = (
    *("model", "device", "dtype", "quantize", "quantize_text", "offload", "vae", "loras"),
    *("attention", "compile", "cuda_graphs", "quantize_skip", "vae_latents"),
)
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors")  # of a LoRA's folder
_MIN_STEM_BYTES = 8


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
