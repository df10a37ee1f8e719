"""Packages to give away: a folder or one .tar with manifest, weights, hashes and a model card; and back.

    package -> pack -> NAME/ or NAME.tar -> unpack -> the user's cache, every byte hashed on the way

A .tar depends on the package alone: names in order, no times, no owners. Parts that lie on the Hub stay references
(a fine-tuned compressor is a small bundle on a large base), or come along with `with_parts` for a machine without a
network. What comes out of a .tar is what its manifest lists and nothing else. Loads no torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import secrets
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

from packforcing_cli import durable, packages
from packforcing_cli.errors import DiskFullError, PackforcingError, UsageError, WeightsError
from packforcing_cli.packages import MANIFEST, Manifest, Part

CARD = "README.md"
NOTES = (CARD, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
"""Files beside the manifest that go along."""
CHUNK = 1 << 20
HUB_LICENSES = frozenset(
    [
        "apache-2.0",
        "mit",
        "bsd-2-clause",
        "bsd-3-clause",
        "openrail",
        "gpl-3.0",
        "lgpl-3.0",
        "agpl-3.0",
        "cc0-1.0",
        "cc-by-4.0",
        "cc-by-sa-4.0",
        "cc-by-nc-4.0",
        "cc-by-nd-4.0",
        "cc-by-nc-sa-4.0",
        "cc-by-nc-nd-4.0",
    ]
)
"""Identifiers the Hub knows, of those that weights commonly have; it refuses a card with one that it does not."""

Advance = Callable[[str, int], None]


def pack(
    folder: Path,
    out: Path,
    *,
    with_parts: bool = False,
    overwrite: bool = False,
    advance: Advance = lambda _, __: None,
) -> Manifest:
    """Write a package as a folder, or as one file if `out` ends with .tar.

    Every file is verified first. A README.md the package has is kept, else a model card is made.
    Args:
        with_parts: put parts that lie on the Hub into it.
        advance:    called with a file's name and the bytes written.
    Returns: the manifest as written.
    Raises: UsageError if `out` exists or weights are still to be converted; WeightsError; OfflineError if a
        referenced part has to come along and is not here; DiskFullError.
    """
    out = out.absolute()
    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists", hint="Choose another place, or use --overwrite.")
    if out.is_dir() and out.resolve() == folder.resolve():
        raise UsageError(f"{out} is the package itself", hint="Choose another place.")
    manifest = packages.read_manifest(folder)
    if "pickled" in manifest.provenance:
        packages.require_complete(folder, manifest)
    packages.verify_package(folder, manifest)
    sources = {name: folder / name for name in manifest.files}
    if with_parts:
        manifest, sources = _with_parts(folder, manifest, sources)
    texts = {MANIFEST: manifest.to_json().encode()}
    for name in NOTES:
        if (folder / name).is_file():
            texts[name] = (folder / name).read_bytes()
    texts.setdefault(CARD, model_card(manifest).encode())
    size = sum(path.stat().st_size for path in sources.values()) + sum(map(len, texts.values()))
    _require_space(out, size)
    write = _write_tar if out.suffix == ".tar" else _write_folder
    with _unfinished(out) as target:
        write(target, texts, sources, advance)
    return manifest


def _with_parts(
    folder: Path, manifest: Manifest, sources: dict[str, Path]
) -> tuple[Manifest, dict[str, Path]]:
    """The manifest of a package that holds all its parts, and where its files are now."""
    parts, files = dict(manifest.parts), dict(manifest.files)
    all_sources = dict(sources)
    taken: dict[Part, str] = {}
    for part, reference in manifest.references.items():
        place = packages.part_folder(folder, manifest, part)
        parts[part] = part
        taken[part] = f"{reference.repo}@{reference.revision}"
        for name, record in reference.files.items():
            files[f"{part}/{name}"] = record
            all_sources[f"{part}/{name}"] = place / name
    changes = {
        "parts": parts,
        "files": files,
        "references": {},
        "provenance": {**manifest.provenance, **({"parts_from": taken} if taken else {})},
    }
    return Manifest.model_validate(manifest.model_dump(by_alias=True) | changes), all_sources


def _write_tar(target: Path, texts: dict[str, bytes], sources: dict[str, Path], advance: Advance) -> None:
    with target.open("xb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for name, text in texts.items():  # the manifest first: it says what the rest has to be
                tar.addfile(_entry(name, len(text)), io.BytesIO(text))
                advance(name, len(text))
            for name, path in sorted(sources.items()):
                with path.open("rb") as content:
                    size = os.fstat(content.fileno()).st_size
                    tar.addfile(_entry(name, size), _Counting(content, partial(advance, name)))
        file.flush()
        os.fsync(file.fileno())


def _entry(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o644
    return entry  # time 0, owner 0, no names


class _Counting(io.RawIOBase):
    """Reads a file and tells how much."""

    def __init__(self, content: IO[bytes], told: Callable[[int], None]) -> None:
        self._content, self._told = content, told

    def read(self, size: int = -1) -> bytes:
        chunk = self._content.read(size)
        self._told(len(chunk))
        return chunk


def _write_folder(target: Path, texts: dict[str, bytes], sources: dict[str, Path], advance: Advance) -> None:
    for name, path in sorted(sources.items()):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as content, (target / name).open("xb") as file:
            while chunk := content.read(CHUNK):
                file.write(chunk)
                advance(name, len(chunk))
            _sync(file)
    for name, text in texts.items():
        with (target / name).open("xb") as file:
            file.write(text)
            _sync(file)
        advance(name, len(text))


# ----------------------------------------------------------------------------------------------------- unpacking


def unpack(
    tar: Path, *, update: bool = False, advance: Advance = lambda _, __: None
) -> tuple[Path, Manifest]:
    """Install a bundle into the user's cache.

    Args:
        update: replace an installed package of that name that is another one.
    Returns: the package's folder and its manifest.
    Raises: WeightsError for a file that is no bundle, is cut off, or holds anything but what its manifest lists;
        UsageError if another package of that name is installed; DiskFullError. Nothing is installed then.
    """
    try:
        with tarfile.open(tar, mode="r:") as content:
            return _unpack(content, str(tar), update=update, advance=advance)
    except FileNotFoundError as error:
        raise UsageError(f"there is no file {tar}", hint="Check the path.") from error
    except tarfile.TarError as error:
        raise WeightsError(
            f"{tar} is not a whole bundle: {error}",
            hint="Copy it again, or make it with packforcing models pack.",
        ) from error


def unpack_stream(stream: IO[bytes], folder: Path) -> Manifest:
    """Unpack a bundle that comes in over a stream into a folder, which is not there yet.

    Raises: WeightsError, DiskFullError as `unpack`; nothing is left then.
    """
    try:
        with tarfile.open(fileobj=stream, mode="r|") as content:
            return _unpack(content, "what was sent", update=False, advance=lambda _, __: None, folder=folder)[
                1
            ]
    except tarfile.TarError as error:
        raise WeightsError(f"what was sent is not a whole bundle: {error}", hint="Send it again.") from error


def _unpack(
    tar: tarfile.TarFile, said: str, *, update: bool, advance: Advance, folder: Path | None = None
) -> tuple[Path, Manifest]:
    first = tar.next()
    if first is None or first.name != MANIFEST or not first.isreg() or first.size > 1 << 24:
        raise WeightsError(
            f"{said} is not a bundle: it does not begin with {MANIFEST}",
            hint="Make one with packforcing models pack.",
        )
    manifest = packages.parse_manifest(_read(tar, first).decode("utf-8", "replace"), f"{said}: {MANIFEST}")
    is_installed = folder is None
    folder = folder or packages.install_folder(manifest.name)
    if manifest.name == "demo" and is_installed:
        raise UsageError(
            f"{said} is called demo, as the model that comes with packforcing", hint="Rename it."
        )
    if folder.exists():
        if (folder / MANIFEST).is_file() and packages.read_manifest(folder) == manifest:
            packages.verify_package(folder, manifest.model_copy(update={"references": {}}))
            return folder, manifest
        if not update:
            raise UsageError(
                f"another package named {manifest.name} is installed",
                hint=f"To replace it: packforcing models pull {said} --update",
            )
    _require_space(folder, sum(record.size for record in manifest.files.values()))
    with _unfinished(folder) as target:
        missing = dict(manifest.files)
        notes = set(NOTES)
        while (entry := tar.next()) is not None:
            if not entry.isreg():
                raise WeightsError(
                    f"{said} holds {entry.name}, which is not a plain file", hint="It is not installed."
                )
            if entry.name in notes and entry.size < 1 << 24:
                notes.remove(entry.name)
                (target / entry.name).write_bytes(_read(tar, entry))
                continue
            if entry.name not in missing:
                raise WeightsError(
                    f"{said} holds {entry.name}, which its manifest does not list",
                    hint="It is not installed.",
                )
            record = missing.pop(entry.name)
            path = target / entry.name
            path.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            stream = tar.extractfile(entry)
            assert stream is not None
            with path.open("xb") as file:
                while chunk := stream.read(CHUNK):
                    file.write(chunk)
                    digest.update(chunk)
                    advance(entry.name, len(chunk))
                _sync(file)
            if (path.stat().st_size, digest.hexdigest()) != (record.size, record.sha256):
                raise WeightsError(
                    f"{entry.name} in {said} is damaged: it is not what the manifest says",
                    hint="Copy the bundle again.",
                )
        if missing:
            raise WeightsError(f"{said} lacks {next(iter(missing))}", hint="Copy the bundle again.")
        (target / MANIFEST).write_text(manifest.to_json(), "utf-8")
    return folder, manifest


def _read(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(entry)
    assert stream is not None
    return stream.read()


# -------------------------------------------------------------------------------------------------------- pieces


@contextmanager
def _unfinished(place: Path) -> Iterator[Path]:
    """A new file or folder beside `place` that takes its name when all went well, and is gone when not."""
    token = secrets.token_hex(4)
    target = place.parent / f".{place.name}.new-{token}"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.suffix != ".tar":
            target.mkdir()
        yield target
        old = place.parent / f".{place.name}.old-{token}"
        if place.is_dir():
            place.rename(old)
        target.replace(place)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if durable.is_full_disk(error):
            raise DiskFullError(
                f"no space left to write {place}", hint="Free some space and try again."
            ) from error
        raise PackforcingError(f"{place} cannot be written: {error}", hint="Choose another place.") from error
    finally:
        if target.is_dir():
            shutil.rmtree(target, ignore_errors=True)
        else:
            target.unlink(missing_ok=True)


def _require_space(place: Path, size: int) -> None:
    existing = next(p for p in place.parents if p.exists())
    free = shutil.disk_usage(existing).free
    if size > free:
        raise DiskFullError(
            f"{place} takes {size / 1e9:.1f} GB and {existing} has {free / 1e9:.1f} GB free",
            hint="Free some space, or choose a place on a larger disk.",
        )


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _license_keys(text: str) -> dict[str, str]:
    """A licence as the Hub takes it: one of its own identifiers, else `other` and a name of small letters."""
    if text.lower() in HUB_LICENSES:
        return {"license": text.lower()}
    name = re.sub(r"[^a-z0-9.]+", "-", text.lower())[:60].strip("-.")
    return {"license": "other", "license_name": name or "unknown"}


def model_card(manifest: Manifest) -> str:
    """README.md of a package, as the Hub shows it."""
    m = manifest
    header = {
        **_license_keys(m.license),
        "library_name": "packforcing",
        "pipeline_tag": "text-to-video",
        **({"base_model": m.base_model} if m.base_model else {}),
    }
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in header.items()),  # quoted as YAML wants it
        "---",
        "",
        f"# {m.name}",
        "",
        f"{m.title}.",
    ]
    lines += [
        "",
        f"A model package for packforcing, version {m.version}:"
        f" {m.size[0]}x{m.size[1]} pixels at {m.fps} fps, blocks of {m.cache.frames_per_block} latent frames.",
        "",
        "```sh",
        f"packforcing models pull hf:OWNER/{m.name}      # or the .tar",
        f'packforcing generate "…" --model hf:OWNER/{m.name}',
        "```",
        "",
        "## Parts",
        "",
        "| part | where | bytes |",
        "|---|---|---|",
    ]
    for part in m.parts:
        size = sum(record.size for record in m.part_files(part).values())
        lines.append(f"| {part} | in this package | {size:,} |")
    for part, reference in m.references.items():
        size = sum(record.size for record in reference.files.values())
        where = f"{reference.repo} at {reference.revision[:12]}" + (
            f", {reference.subfolder}" if reference.subfolder else ""
        )
        lines.append(f"| {part} | {where} | {size:,} |")
    lines += ["", "`packforcing.json` has the size and SHA-256 of every file.", "", "## Limits", ""]
    lines += [f"- {limit}" for limit in m.limits] or ["None were written down."]
    lines += ["", "## Where it comes from", "", f"Licence: {m.license}.", ""]
    lines += ["```json", json.dumps(m.provenance, indent=2, ensure_ascii=False), "```", ""]
    return "\n".join(lines)
