"""Packages as a folder or one file: the same bytes each time, and nothing comes out that should not."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_packages import caches as caches
from test_packages import put_in_hub_cache, reference, write_package

from packforcing_cli import bundle, packages
from packforcing_cli.errors import DiskFullError, OfflineError, PackforcingError, UsageError, WeightsError


@pytest.fixture
def package(tmp_path: Path, caches: Path) -> Path:
    write_package(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def tar(package: Path, tmp_path: Path) -> Path:
    bundle.pack(package, tmp_path / "tiny.tar")
    return tmp_path / "tiny.tar"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_bundle_round_trips_bit_for_bit(package: Path, tar: Path) -> None:
    folder, manifest = bundle.unpack(tar)
    assert folder == packages.install_folder("tiny")
    installed = contents(folder)
    assert installed.pop("README.md").startswith(b'---\nlicense: "apache-2.0"\nlibrary_name: "packforcing"\n')
    assert installed == contents(package)
    assert manifest == packages.read_manifest(package)
    packages.verify_package(folder, manifest)


def test_a_bundle_depends_on_the_package_alone(package: Path, tar: Path, tmp_path: Path) -> None:
    for path in package.rglob("*"):
        os.utime(path, (1, 1))
    bundle.pack(Path(shutil.move(package, tmp_path / "elsewhere")), tmp_path / "second.tar")
    assert (tmp_path / "second.tar").read_bytes() == tar.read_bytes()


def test_a_folder_is_a_package_too(package: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []
    bundle.pack(package, tmp_path / "out", advance=lambda name, n: told.append((name, n)))
    packed = contents(tmp_path / "out")
    assert sum(n for _, n in told) == sum(map(len, packed.values()))
    packages.verify_package(tmp_path / "out", packages.read_manifest(tmp_path / "out"))
    (tmp_path / "out" / "README.md").write_text("my own words")
    (tmp_path / "out" / "LICENSE").write_text("mine")
    (tmp_path / "out" / "diary.txt").write_text("private")
    bundle.pack(tmp_path / "out", tmp_path / "again")
    assert contents(tmp_path / "again") == packed | {"README.md": b"my own words", "LICENSE": b"mine"}


def test_referenced_parts_stay_references_or_come_along(caches: Path, tmp_path: Path) -> None:
    manifest = write_package(tmp_path / "p", references={"vae": reference()})
    with pytest.raises(OfflineError, match="is not on this machine"):
        bundle.pack(tmp_path / "p", tmp_path / "small")
    put_in_hub_cache(caches, manifest.references["vae"])
    assert bundle.pack(tmp_path / "p", tmp_path / "small").references == manifest.references
    assert "vae" not in [p.name for p in (tmp_path / "small").iterdir()]
    whole = bundle.pack(tmp_path / "p", tmp_path / "whole.tar", with_parts=True)
    assert (whole.references, whole.parts["vae"]) == ({}, "vae")
    assert whole.part_hash("vae") == manifest.part_hash("vae")
    assert whole.provenance["parts_from"] == {"vae": f"owner/base@{manifest.references['vae'].revision}"}
    folder, _ = bundle.unpack(tmp_path / "whole.tar")
    assert (folder / "vae" / "w.safetensors").read_bytes() == b"weights"


def test_an_existing_output_is_kept_unless_allowed(package: Path, tar: Path, tmp_path: Path) -> None:
    before = tar.read_bytes()
    with pytest.raises(UsageError, match="exists"):
        bundle.pack(package, tar)
    (package / "LICENSE").write_text("new")
    bundle.pack(package, tar, overwrite=True)
    assert tar.read_bytes() != before
    bundle.pack(package, tmp_path / "out")
    bundle.pack(package, tmp_path / "out", overwrite=True)
    with pytest.raises(UsageError, match="is the package itself"):
        bundle.pack(package, package, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_a_damaged_package_is_not_given_away(package: Path, tmp_path: Path) -> None:
    (package / "transformer" / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match="is damaged"):
        bundle.pack(package, tmp_path / "x.tar")
    assert not (tmp_path / "x.tar").exists()


def test_weights_that_are_still_pickles_are_not_given_away(caches: Path, tmp_path: Path) -> None:
    write_package(tmp_path / "p", provenance={"pickled": []})
    with pytest.raises(WeightsError, match="no vae") as caught:
        bundle.pack(tmp_path / "p", tmp_path / "x.tar")
    assert "packforcing models convert tiny" in caught.value.hint


# ---------------------------------------------------------------------------------------------- hostile and broken


Members = list[tuple[tarfile.TarInfo, bytes]]


def members(tar: Path) -> Members:
    with tarfile.open(tar) as content:
        found = []
        for entry in content:
            stream = content.extractfile(entry)
            assert stream is not None
            found.append((entry, stream.read()))
        return found


def rewrite(tar: Path, entries: Members) -> None:
    with tarfile.open(tar, "w") as content:
        for entry, data in entries:
            entry.size = len(data) if entry.isreg() else 0
            content.addfile(entry, io.BytesIO(data))


def entry(name: str, kind: bytes = tarfile.REGTYPE, to: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, to
    return made


def _last_byte(found: Members) -> Members:
    info, data = found[-1]
    return [*found[:-1], (info, data[:-1] + b"?")]


HOSTILE: list[tuple[Callable[[Members], Members], str]] = [
    (lambda m: [*m, (entry("../evil"), b"x")], "holds ../evil, which its manifest does not list"),
    (lambda m: [*m, (entry("/tmp/evil"), b"x")], "holds /tmp/evil, which its manifest does not list"),
    (lambda m: [*m, (entry("more.safetensors"), b"x")], "holds more.safetensors, which its manifest"),
    (lambda m: [*m, (entry("link", tarfile.SYMTYPE, "/etc/passwd"), b"")], "link, which is not a plain file"),
    (lambda m: [*m, (entry("link", tarfile.LNKTYPE, "README.md"), b"")], "link, which is not a plain file"),
    (lambda m: [*m, (entry("pipe", tarfile.FIFOTYPE), b"")], "pipe, which is not a plain file"),
    (lambda m: [*m[:2], (entry("transformer", tarfile.SYMTYPE, "/tmp"), b""), *m[2:]], "not a plain file"),
    (lambda m: [*m, m[-1]], "transformer/w.safetensors, which its manifest does not list"),
    (lambda m: m[:-1], "lacks transformer/w.safetensors"),
    (lambda m: m[1:], "does not begin with packforcing.json"),
    (lambda m: [], "does not begin with packforcing.json"),
    (_last_byte, "transformer/w.safetensors in .* is damaged"),
    (lambda m: [(m[0][0], m[0][1][:40]), *m[1:]], "cannot be read"),
    (lambda m: [(m[0][0], m[0][1].replace(b'"schema": 1', b'"schema": 2')), *m[1:]], "has schema 2"),
    (
        lambda m: [(m[0][0], m[0][1].replace(b'"name": "tiny"', b'"name": "../x"')), *m[1:]],
        "is not a model's name",
    ),
    (lambda m: [(m[0][0], m[0][1].replace(b'"name": "tiny"', b'"name": "demo"')), *m[1:]], "is called demo"),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE)
def test_nothing_comes_out_of_a_wrong_bundle(
    tar: Path, tmp_path: Path, change: Callable[[Members], Members], message: str
) -> None:
    rewrite(tar, change(members(tar)))
    before = contents(tmp_path)
    with pytest.raises(PackforcingError, match=message) as caught:
        bundle.unpack(tar)
    assert caught.value.exit_code in (2, 7)
    assert contents(tmp_path) == before
    assert list(packages.installed()) == []


@pytest.mark.parametrize("size", [0, 100, 700, 5000, 12_000])
def test_a_cut_off_bundle_is_told(tar: Path, tmp_path: Path, size: int) -> None:
    whole = tar.read_bytes()
    tar.write_bytes(whole[:size])
    with pytest.raises(WeightsError, match=r"not a|lacks"):
        bundle.unpack(tar)
    assert list(packages.installed()) == []
    tar.write_bytes(whole)
    bundle.unpack(tar)


def test_a_file_that_is_no_tar_and_one_that_is_compressed_are_told(tar: Path) -> None:
    tar.write_bytes(b"\x1f\x8b" + b"compressed" * 99)
    with pytest.raises(WeightsError, match="is not a whole bundle"):
        bundle.unpack(tar)


def test_another_package_of_that_name_is_replaced_only_when_asked(package: Path, tar: Path) -> None:
    folder, _ = bundle.unpack(tar)
    assert bundle.unpack(tar)[0] == folder  # the same: nothing to do
    values = json.loads((package / "packforcing.json").read_text()) | {"version": "2"}
    (package / "packforcing.json").write_text(json.dumps(values))
    bundle.pack(package, tar, overwrite=True)
    with pytest.raises(UsageError, match="another package named tiny is installed") as caught:
        bundle.unpack(tar)
    assert caught.value.hint.endswith("--update")
    assert packages.read_manifest(folder).version != "2"
    bundle.unpack(tar, update=True)
    assert packages.read_manifest(folder).version == "2"
    assert [p.name for p in folder.parent.iterdir()] == ["tiny"]


@pytest.mark.parametrize("what", ["pack", "unpack"])
def test_a_full_disk_leaves_nothing_half_written(
    package: Path, tar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def run() -> Any:
        return bundle.unpack(tar) if what == "unpack" else bundle.pack(package, tmp_path / "new.tar")

    before = contents(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(bundle.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 100))
        with pytest.raises(DiskFullError, match=r"takes 0\.0 GB"):
            run()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(bundle.os, "fsync", full)
        with pytest.raises(DiskFullError, match="no space left"):
            run()
    assert contents(tmp_path) == before
    run()


def test_the_card_says_what_is_in_it_and_claims_nothing(package: Path) -> None:
    card = bundle.model_card(packages.read_manifest(package))
    assert "| transformer | in this package | 10,242 |" in card
    assert 'library_name: "packforcing"' in card
    for limit in packages.read_manifest(package).limits:
        assert f"- {limit}" in card


@pytest.mark.parametrize(
    ("license_", "keys"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("CC-BY-NC-SA-4.0", {"license": "cc-by-nc-sa-4.0"}),
        ("unknown", {"license": "other", "license_name": "unknown"}),
        (
            "not recorded; ask: where the weights # were published",
            {"license": "other", "license_name": "not-recorded-ask-where-the-weights-were-published"},
        ),
        ("\u2013", {"license": "other", "license_name": "unknown"}),
    ],
)
def test_the_card_has_a_licence_the_hub_takes(package: Path, license_: str, keys: dict[str, str]) -> None:
    from huggingface_hub import ModelCard

    manifest = packages.read_manifest(package).model_copy(
        update={"license": license_, "base_model": "a/b: c"}
    )
    read = ModelCard(bundle.model_card(manifest)).data.to_dict()
    rest = {"library_name": "packforcing", "pipeline_tag": "text-to-video", "base_model": "a/b: c"}
    assert read == keys | rest
    assert f"Licence: {license_}." in bundle.model_card(manifest)
