"""Installing a package from the Hub: what has to be fetched, fetching it, recording what came.

    name or hf:owner/repo[@revision] -> Plan (commits, files, bytes, what would change) -> files in the Hub's cache
                                                                                       -> a manifest in the user's cache

The manifest is the record: the commit and the sha256 of every file. A repository with a packforcing.json says itself
what it is; one without is a package when the catalog knows it. Prints nothing, loads no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from packforcing_cli import catalog, hub, packages
from packforcing_cli.catalog import ModelFacts, PartSource
from packforcing_cli.errors import REINSTALL, OfflineError, UsageError, WeightsError
from packforcing_cli.hub import Hub, RepoFile, Snapshot
from packforcing_cli.packages import (
    MANIFEST,
    FileRecord,
    HubReference,
    HubSource,
    Manifest,
    Part,
)


@dataclass(frozen=True)
class Wanted:
    """A file to have in the Hub's cache. name: for people."""

    repo: str
    commit: str
    file: RepoFile

    @property
    def name(self) -> str:
        return f"{self.repo}: {self.file.path}"

    @property
    def path(self) -> Path | None:
        """Where it is in the cache, whole; None if it is not."""
        path = hub.cached(self.repo, self.commit, self.file.path)
        return path if path is not None and path.stat().st_size == self.file.size else None

    @property
    def missing_bytes(self) -> int:
        """Bytes still to be downloaded."""
        return 0 if self.path else self.file.size - hub.unfinished_bytes(self.repo, self.file)


@dataclass(frozen=True)
class Plan:
    """What a pull will do.

    name:      as the person will call the model.
    folder:    the package's folder.
    wanted:    every file, whether it is there or not.
    changes:   what differs from the package that is installed, a sentence each; empty for a first pull.
    """

    name: str
    folder: Path
    license: str
    wanted: tuple[Wanted, ...]
    changes: tuple[str, ...]
    _drafts: tuple[_Draft, ...] = ()
    _manifest: Callable[[dict[Part, HubReference]], Manifest] | None = None
    _part_configs: dict[Part, dict[str, Any]] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        return sum(wanted.file.size for wanted in self.wanted)

    @property
    def download_bytes(self) -> int:
        return sum(wanted.missing_bytes for wanted in self.wanted)


@dataclass(frozen=True)
class _Draft:
    """A reference without the hashes that are known only once the files are here."""

    part: Part
    snapshot: Snapshot
    subfolder: str
    files: tuple[RepoFile, ...]


# ---------------------------------------------------------------------------------------------------- planning


def plan(name: str, at: Hub) -> Plan:
    """Find out what installing a model takes; downloads nothing but a manifest.

    Args:
        name: of the catalog, hf:owner/repo[@revision], or the folder of a package with parts on the Hub.
    Raises: UsageError for a wrong name or one that needs no pull; WeightsError for a repository that is no
        package; OfflineError.
    """
    source = HubSource.parse(name)
    known = catalog.of_repo(source.repo) if source else catalog.find(name)
    if source is None and known is None:
        return _plan_references(name)
    if known is not None and not known.parts:
        raise UsageError(f"{known.name} has nothing to download", hint=known.install + ".")
    if source is not None:
        snapshot = at.snapshot(source.repo, source.revision)
        if MANIFEST in snapshot.files:
            return _plan_package(source, snapshot, at)
        if known is None:
            raise WeightsError(
                f"{source} is not a model package: it has no {MANIFEST}, and packforcing does not know it",
                hint="Make a package of its weights with packforcing models convert, or use a model of `models list`.",
            )
        if source.revision == "main":
            source = None  # the catalog's own revision is meant
    assert known is not None
    return _plan_known(known, source, at)


def _plan_known(facts: ModelFacts, source: HubSource | None, at: Hub) -> Plan:
    """A model the catalog knows, in the catalog's revision or in the one that was asked for."""
    snapshots: dict[tuple[str, str], Snapshot] = {}

    def draft(part: Part, place: PartSource) -> _Draft:
        revision = source.revision if source and source.repo.lower() == place.repo.lower() else place.revision
        key = (place.repo, revision)
        if key not in snapshots:
            snapshots[key] = at.snapshot(*key)
        return _Draft(part, snapshots[key], place.subfolder, _matching(snapshots[key], place, at))

    parts: dict[Any, PartSource] = dict(facts.parts)
    drafts = tuple(draft(part, place) for part, place in parts.items())
    pickled = tuple(draft("transformer", place) for place in facts.pickled)
    name = facts.name if source is None else str(source)
    version = (pickled or drafts)[0].snapshot.commit[:12]

    def manifest(references: dict[Part, HubReference]) -> Manifest:
        return _known_manifest(facts, references, version, pickled)

    return _finished(
        name,
        packages.install_folder(name),
        facts.license + (f", see packforcing models show {facts.name}" if facts.license_note else ""),
        drafts,
        manifest,
        pickled=pickled,
        part_configs={part: dict(place.config) for part, place in parts.items() if place.config},
    )


def _matching(snapshot: Snapshot, place: PartSource, at: Hub) -> tuple[RepoFile, ...]:
    """Files of a part by the catalog's patterns. Raises: WeightsError if one matches nothing."""
    below = {_below(place.subfolder, path): file for path, file in snapshot.files.items()}
    found: dict[str, RepoFile] = {}
    for pattern in place.files:
        hits = {name: file for name, file in below.items() if name and fnmatchcase(name, pattern)}
        if not hits and at.offline:
            raise OfflineError(
                f"{place.subfolder}/{pattern} of {place.repo} is not on this machine, and the network is off",
                hint="Run it once with the network on, or carry a bundle over: packforcing models pack --with-parts.",
            )
        if not hits:
            raise WeightsError(
                f"{place.repo} at {snapshot.commit[:12]} has no file {pattern} in {place.subfolder or 'it'}",
                hint=f"Look at its page on the Hub; to have a packforcing that knows its new form, {REINSTALL}.",
            )
        found |= hits
    for name, pinned in place.sha256.items():
        if found[name].sha256 != pinned:
            raise WeightsError(
                f"{place.repo} has another {name} than the one packforcing knows", hint="It is not installed."
            )
    index = {n: f for n, f in below.items() if n and n.endswith(".safetensors.index.json")}
    weights = any(name.endswith(".safetensors") for name in found)
    return tuple((found | index if weights else found).values())


def _below(folder: str, path: str) -> str:
    """A path relative to a folder, empty if it is not directly in it."""
    parent, _, name = path.rpartition("/")
    return name if parent == folder else ("" if folder else path)


def _known_manifest(
    facts: ModelFacts, references: dict[Part, HubReference], version: str, pickled: Iterable[_Draft]
) -> Manifest:
    provenance: dict[str, Any] = {"catalog": facts.name}
    if pickled:
        provenance["pickled"] = [
            {
                "repo": draft.snapshot.repo,
                "revision": draft.snapshot.commit,
                "file": file.path,
                "sha256": file.sha256,
                "size": file.size,
            }
            for draft in pickled
            for file in draft.files
        ]
    return Manifest(
        **packages.records_of(facts),
        name=facts.name,
        version=version,
        base_model="Wan-AI/Wan2.1-T2V-1.3B",
        limits=(
            "Nobody has run these weights in packforcing's memory yet; what it does to their quality is unknown.",
        )
        if facts.codec != "tiny"
        else (),
        provenance=provenance,
        references=references,
    )


def _plan_package(source: HubSource, snapshot: Snapshot, at: Hub) -> Plan:
    """A repository that is a package itself: its parts become references to it."""
    path = at.fetch(snapshot.repo, snapshot.commit, snapshot.files[MANIFEST])
    theirs = packages.parse_manifest(path.read_text("utf-8"), f"{source}: {MANIFEST}")
    drafts = []
    for part, place in theirs.parts.items():
        files = []
        for name, record in theirs.part_files(part).items():
            file = snapshot.files.get(f"{place}/{name}")
            if file is None or file.size != record.size or file.sha256 not in (None, record.sha256):
                raise _inconsistent(source, f"{place}/{name}")
            files.append(file)
        drafts.append(_Draft(part, snapshot, place, tuple(files)))

    def manifest(references: dict[Part, HubReference]) -> Manifest:
        for part, place in theirs.parts.items():
            for name, record in theirs.part_files(part).items():
                if references[part].files[name] != record:
                    raise _inconsistent(source, f"{place}/{name}")
        return theirs.model_copy(
            update={"references": {**theirs.references, **references}, "parts": {}, "files": {}}
        )

    name = str(source)
    own = _finished(name, packages.install_folder(name), theirs.license, tuple(drafts), manifest)
    further = tuple(_reference_files(theirs))
    return Plan(
        own.name, own.folder, own.license, (*own.wanted, *further), own.changes, own._drafts, own._manifest
    )


def _inconsistent(source: HubSource, name: str) -> WeightsError:
    return WeightsError(
        f"{source} has no {name} as its {MANIFEST} describes it", hint="Its author has to upload it again."
    )


def _plan_references(name: str) -> Plan:
    """A package that is on this machine: what it refers to and is not here."""
    path = Path(name).expanduser()
    here = packages.models_folder() / name
    folder = here if (here / MANIFEST).is_file() else path
    if not folder.is_dir():
        catalog.get(name, also=[p.name for p in packages.installed()])  # UsageError with the nearest names
    manifest = packages.read_manifest(folder)
    if not manifest.references:
        raise UsageError(f"{name} has everything it needs", hint=f"Use it: --model {name}")
    return Plan(name, folder, manifest.license, tuple(_reference_files(manifest)), ())


def _reference_files(manifest: Manifest) -> Iterator[Wanted]:
    for reference in manifest.references.values():
        for name, record in reference.files.items():
            path = reference.path_in_repo(name)
            file = RepoFile(path, record.size, record.sha256, record.sha256)
            yield Wanted(reference.repo, reference.revision, file)


def _finished(
    name: str,
    folder: Path,
    licence: str,
    drafts: tuple[_Draft, ...],
    manifest: Callable[[dict[Part, HubReference]], Manifest],
    *,
    pickled: tuple[_Draft, ...] = (),
    part_configs: dict[Part, dict[str, Any]] | None = None,
) -> Plan:
    wanted = tuple(
        Wanted(draft.snapshot.repo, draft.snapshot.commit, file)
        for draft in (*drafts, *pickled)
        for file in draft.files
    )
    changes = tuple(_changes(folder, drafts, pickled))
    return Plan(name, folder, licence, wanted, changes, drafts, manifest, part_configs or {})


def _changes(folder: Path, drafts: tuple[_Draft, ...], pickled: tuple[_Draft, ...]) -> Iterator[str]:
    """Files that are installed and would become others."""
    if not (folder / MANIFEST).is_file():
        return
    installed = packages.read_manifest(folder)
    for draft in drafts:
        old = installed.references.get(draft.part)
        if old is None:
            continue
        new = {_relative(draft, file): file for file in draft.files}
        for name in sorted(old.files.keys() | new.keys()):
            if name not in new:
                yield f"{draft.part}/{name} would go"
            elif name not in old.files:
                yield f"{draft.part}/{name} would be new"
            elif not _same(old, name, new[name]):
                yield f"{draft.part}/{name} would become another file"
    recorded = {entry["file"]: entry["sha256"] for entry in installed.provenance.get("pickled", ())}
    for draft in pickled:
        for file in draft.files:
            if recorded.get(file.path) != file.sha256:
                yield f"{file.path} would become another file, to be converted again"


def _same(old: HubReference, name: str, new: RepoFile) -> bool:
    record = old.files[name]
    if new.sha256 is not None:
        return new.sha256 == record.sha256
    path = hub.cached(old.repo, old.revision, old.path_in_repo(name))
    return path is not None and hub.same_content(path, new)


def _relative(draft: _Draft, file: RepoFile) -> str:
    return file.path.removeprefix(f"{draft.subfolder}/") if draft.subfolder else file.path


# ---------------------------------------------------------------------------------------------------- pulling


def pull(
    plan: Plan,
    at: Hub,
    *,
    update: bool = False,
    advance: Callable[[Wanted, int], None] = lambda _, __: None,
) -> Manifest:
    """Fetch what a plan wants and write the package's manifest.

    Args:
        update:  allow files of an installed package to become others.
        advance: called with a file and the bytes gained, those that were there included.
    Returns: the manifest; `missing_parts` is not empty for pickled weights, which are to be converted now.
    Raises: UsageError when something would change and `update` is False; DiskFullError, before anything is
        downloaded; WeightsError; OfflineError.
    """
    if plan.changes and not update:
        raise UsageError(
            f"{plan.name} has changed on the Hub since it was installed: {'; '.join(plan.changes)}",
            hint=f"To accept that: packforcing models pull {plan.name} --update",
        )
    verified = packages.Verified.read()
    paths: dict[tuple[str, str], Path] = {}
    try:
        _discard_bad(plan, at, verified)
        if not at.offline:
            hub.require_space(plan.download_bytes)
        for wanted in plan.wanted:
            path = at.fetch(wanted.repo, wanted.commit, wanted.file, lambda n, w=wanted: advance(w, n))  # type: ignore[misc]
            paths[wanted.repo, wanted.file.path] = path
            _add_good(path, wanted.file, verified)
    finally:  # what an interrupted pull has is not hashed again by the next one
        verified.write()
    if plan._manifest is None:
        return packages.read_manifest(plan.folder)
    references: dict[Part, HubReference] = {}
    for draft in plan._drafts:
        files = {
            _relative(draft, file): _record(file)
            if file.sha256
            else packages.record_of(paths[draft.snapshot.repo, file.path])
            for file in draft.files
        }
        references[draft.part] = HubReference(
            repo=draft.snapshot.repo, revision=draft.snapshot.commit, subfolder=draft.subfolder, files=files
        )
    return _write(plan, plan._manifest(references))


def _discard_bad(plan: Plan, at: Hub, verified: packages.Verified) -> None:
    """Hash what is here and was not found good before; what is damaged goes."""
    unknown = []
    for wanted in plan.wanted:
        path, file = wanted.path, wanted.file
        if path is not None and not (file.sha256 and verified.holds(path, _record(file))):
            unknown.append((path, file))
    size = sum(file.size for _, file in unknown)
    if size >= packages.REMEMBERED_FROM:
        at.note(f"checking what is here ({size / 1e9:.1f} GB) …")
    for path, file in unknown:
        if hub.same_content(path, file):
            _add_good(path, file, verified)
        else:
            hub.discard(path)


def _add_good(path: Path, file: RepoFile, verified: packages.Verified) -> None:
    if file.sha256:
        verified.add(path, _record(file))


def _record(file: RepoFile) -> FileRecord:
    assert file.sha256 is not None
    return FileRecord(sha256=file.sha256, size=file.size)


def _write(plan: Plan, manifest: Manifest) -> Manifest:
    """Put the package's folder in place; a transformer that was converted before stays unless its source changed."""
    folder = plan.folder
    for part, config in plan._part_configs.items():
        manifest = _with_own_config(folder, manifest, part, config)
    old = packages.read_manifest(folder) if (folder / MANIFEST).is_file() else None
    outdated = None
    if old is not None and "transformer" in old.parts and "transformer" in manifest.missing_parts:
        if _pickled_hashes(old) == _pickled_hashes(manifest):
            changes = {"pickled": manifest.provenance["pickled"]}
            manifest = old.model_copy(
                update={"references": manifest.references, "provenance": old.provenance | changes}
            )
        else:
            outdated = folder / old.parts["transformer"]
    packages.write_text(folder / MANIFEST, manifest.to_json())
    if outdated is not None:  # after the manifest: whatever stops this leaves a package that is whole
        shutil.rmtree(outdated)
    return manifest


def _pickled_hashes(manifest: Manifest) -> list[str]:
    return [entry["sha256"] for entry in manifest.provenance.get("pickled", ())]


def _with_own_config(folder: Path, manifest: Manifest, part: Part, config: dict[str, Any]) -> Manifest:
    """Make a part of the package itself from bare weights on the Hub and the configuration the catalog has."""
    reference = manifest.references[part]
    place = folder / part
    place.mkdir(parents=True, exist_ok=True)
    packages.write_text(place / "config.json", json.dumps(config, indent=2) + "\n")
    for name in reference.files:
        there = hub.cached(reference.repo, reference.revision, reference.path_in_repo(name))
        assert there is not None
        (place / name).unlink(missing_ok=True)
        try:
            os.link(there.resolve(), place / name)
        except OSError:  # another disk, or one without links
            shutil.copyfile(there, place / name)
    files = {f"{part}/{path.name}": packages.record_of(path) for path in sorted(place.iterdir())}
    provenance = {**manifest.provenance, part: reference.model_dump(mode="json")}
    references = {p: r for p, r in manifest.references.items() if p != part}
    return manifest.model_copy(
        update={
            "references": references,
            "parts": {**manifest.parts, part: part},
            "files": {**manifest.files, **files},
            "provenance": provenance,
        }
    )


# -------------------------------------------------------------------------------------------------- converting


@dataclass(frozen=True)
class Pickled:
    """A model whose transformer was pulled as pickles. before: its manifest, without a transformer."""

    folder: Path
    before: Manifest
    checkpoint: Path
    lora: Path | None


def pickled(facts: ModelFacts) -> Pickled:
    """What `models convert NAME` has to read. Raises: OfflineError if it was not pulled."""
    folder = packages.install_folder(facts.name)
    before = packages.read_manifest(folder) if (folder / MANIFEST).is_file() else None
    found = [
        hub.cached(entry["repo"], entry["revision"], entry["file"])
        for entry in (before.provenance.get("pickled", ()) if before else ())
    ]
    paths = [path for path in found if path is not None]
    if before is None or len(paths) != len(facts.pickled):
        raise OfflineError(
            f"the weights of {facts.name} are not on this machine",
            hint=f"packforcing models pull {facts.name}",
        )
    for path, entry in zip(paths, before.provenance["pickled"]):
        packages.verify_file(path, FileRecord(sha256=entry["sha256"], size=entry["size"]))
    return Pickled(folder, before, paths[0], paths[1] if len(paths) > 1 else None)


def finish_conversion(source: Pickled, written: Manifest) -> Manifest:
    """Give a converted package what the catalog knows of it: title, base model, limits, where it is from."""
    before = source.before
    manifest = written.model_copy(
        update={
            "version": before.version,
            "title": before.title,
            "base_model": before.base_model,
            "limits": before.limits,
            "cache": before.cache,
            "schedule": before.schedule,
            "trained_frames": before.trained_frames,
            "provenance": {**before.provenance, **written.provenance},
        }
    )
    packages.write_text(source.folder / MANIFEST, manifest.to_json())
    return manifest


# --------------------------------------------------------------------------------------------------- removing


@dataclass(frozen=True)
class Removal:
    """What removing a package frees.

    folder:    the package's folder, with its bytes in own_bytes.
    hub_files: files in the Hub's cache that no other installed package refers to, with their bytes.
    unread:    an installed package that cannot be read; what it shares is not known, so hub_files is empty.
    """

    folder: Path
    own_bytes: int
    hub_files: tuple[Path, ...]
    hub_bytes: int
    unread: Path | None = None


def plan_removal(name: str) -> Removal:
    """Find out what removing takes away. Raises: UsageError for a package that is not installed."""
    folder = packages.install_folder(name)
    if name == "demo" or not (folder / MANIFEST).is_file():
        what = "comes with packforcing" if name == "demo" else "is not installed"
        raise UsageError(f"{name} {what}", hint="packforcing models list shows what is installed.")
    own = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    try:
        mine = _hub_paths(packages.read_manifest(folder))
    except WeightsError:  # a broken package can be removed too; what it used of the cache is not known
        mine = {}
    for other in packages.installed():
        if other != folder:
            try:
                theirs = _hub_paths(packages.read_manifest(other))
            except WeightsError:
                return Removal(folder, own, (), 0, unread=other)
            mine = {content: path for content, path in mine.items() if content not in theirs}
    size = sum(content.stat().st_size for content in mine)
    return Removal(folder, own, tuple(mine.values()), size)


def _hub_paths(manifest: Manifest) -> dict[Path, Path]:
    """Content -> name in the cache, of every file a package refers to or was made of."""
    named = [(w.repo, w.commit, w.file.path) for w in _reference_files(manifest)]
    named += [(e["repo"], e["revision"], e["file"]) for e in manifest.provenance.get("pickled", ())]
    for part in manifest.parts:  # made of bare weights, by `_with_own_config`
        with contextlib.suppress(ValidationError):  # other packages say other things of their parts
            made_of = HubReference.model_validate(manifest.provenance.get(part))
            named += [(made_of.repo, made_of.revision, made_of.path_in_repo(name)) for name in made_of.files]
    found = (hub.cached(*one) for one in named)
    return {path.resolve(): path for path in found if path is not None}


def remove(removal: Removal, *, hub_files: bool = False) -> None:
    """Remove a package's folder, and its files in the Hub's cache when asked."""
    doomed = removal.folder.with_name(f".{removal.folder.name}.removed")
    removal.folder.rename(doomed)  # a half-removed package must not look like one
    shutil.rmtree(doomed)
    if hub_files:
        for path in removal.hub_files:
            hub.discard(path)
