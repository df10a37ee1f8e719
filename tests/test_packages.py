"""Manifests, references to the Hub, names and places of packages; no tensors and no network."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from packforcing_cli import catalog, packages
from packforcing_cli.errors import OfflineError, UsageError, WeightsError
from packforcing_cli.packages import FileRecord, HubReference, HubSource, Manifest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches of this test's own: the program's, and the Hub's in the returned folder."""
    from huggingface_hub import constants

    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def values(**changes: Any) -> dict[str, Any]:
    found = json.loads((catalog.DEMO_FOLDER / "packforcing.json").read_text("utf-8"))
    return found | {"name": "tiny", "parts": {}, "files": {}} | changes


def test_what_the_catalog_says_becomes_a_manifest() -> None:
    """`models pull` and `--model random:NAME` write the same of the same facts."""
    for name, span, lookahead in (
        ("wan2.1-1.3b-self-forcing", "fit", 0),
        ("taew2_1", "fit", 3),
        ("demo", "1", 0),
    ):
        facts = catalog.get(name)
        manifest = Manifest(name=name, version="0", **packages.records_of(facts))
        assert (manifest.size, manifest.license, manifest.title) == (
            facts.default_size,
            facts.license,
            facts.title,
        )
        assert (manifest.cache.mid_span, manifest.codec.encode_lookahead) == (span, lookahead)
        assert manifest.codec.kind == facts.codec


def reference(content: bytes = b"weights", **changes: Any) -> dict[str, Any]:
    record = FileRecord(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    fields = {"repo": "owner/base", "revision": COMMIT, "subfolder": "vae"}
    return fields | {"files": {"w.safetensors": record.model_dump()}} | changes


def write_package(folder: Path, **changes: Any) -> Manifest:
    """A package of one part with a few bytes in place of weights."""
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text("{}")
    (folder / "transformer" / "w.safetensors").write_bytes(bytes(range(256)) * 40)
    files = {
        f"transformer/{path.name}": packages.record_of(path).model_dump()
        for path in sorted((folder / "transformer").iterdir())
    }
    manifest = Manifest.model_validate(values(parts={"transformer": "transformer"}, files=files) | changes)
    (folder / "packforcing.json").write_text(manifest.to_json())
    return manifest


def put_in_hub_cache(caches: Path, there: HubReference, content: bytes = b"weights") -> Path:
    path = (
        caches / f"models--{there.repo.replace('/', '--')}" / "snapshots" / there.revision / there.subfolder
    )
    path.mkdir(parents=True)
    (path / "w.safetensors").write_bytes(content)
    return path / "w.safetensors"


def test_the_packaged_manifest_is_written_as_it_is_read() -> None:
    stored = json.loads((catalog.DEMO_FOLDER / "packforcing.json").read_text("utf-8"))
    written = json.loads(packages.read_manifest(catalog.DEMO_FOLDER).to_json())
    assert {key: written[key] for key in stored} == stored
    assert "references" not in written


def test_a_manifest_with_references_round_trips() -> None:
    manifest = Manifest.model_validate(values(references={"vae": reference()}))
    again = packages.parse_manifest(manifest.to_json(), "here")
    assert again == manifest
    assert again.references["vae"].path_in_repo("w.safetensors") == "vae/w.safetensors"
    assert again.size_bytes == len(b"weights")
    assert again.missing_parts == ("transformer", "text_encoder", "tokenizer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"revision": "main"}, "references.vae.revision"),
        ({"repo": "no-slash"}, "is not a Hub repository"),
        ({"subfolder": "../elsewhere"}, "is not a path inside the package"),
        (
            {"files": {"../../etc/passwd": {"sha256": "0" * 64, "size": 1}}},
            "is not a path inside the package",
        ),
        ({"files": {"x\n": {"sha256": "0" * 64, "size": 1}}}, "a character that cannot be printed"),
        ({"files": {}}, "references.vae.files"),
        ({"subfoldr": "vae"}, "unknown key references.vae.subfoldr; did you mean subfolder"),
    ],
)
def test_a_wrong_reference_is_refused(change: dict[str, Any], message: str) -> None:
    text = json.dumps(values(references={"vae": reference(**change)}))
    with pytest.raises(WeightsError, match=message):
        packages.parse_manifest(text, "here")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vae/x\n", "a character that cannot be printed"),
        ("vae/\x1b[2Jx", "a character that cannot be printed"),
        ("packforcing.json", "is the manifest itself"),
        ("./PackForcing.json", "is the manifest itself"),
        ("packforcing.json/x", "is the manifest itself"),
    ],
)
def test_a_file_that_no_package_can_have_is_refused(name: str, message: str) -> None:
    record = {"sha256": "0" * 64, "size": 1}
    for change in ({"files": {name: record}}, {"parts": {"vae": name}}):
        with pytest.raises(WeightsError, match=message):
            packages.parse_manifest(json.dumps(values(**change)), "here")
    packages.parse_manifest(json.dumps(values(files={"vae/packforcing.json": record})), "here")


def test_a_part_is_in_the_package_or_on_the_hub(tmp_path: Path) -> None:
    both = values(references={"vae": reference()}, parts={"vae": "vae"})
    with pytest.raises(WeightsError, match="vae is both in the package and on the Hub"):
        packages.parse_manifest(json.dumps(both), "here")


def test_the_hash_of_a_part_changes_with_any_of_its_files() -> None:
    one = Manifest.model_validate(values(references={"vae": reference()}))
    same = Manifest.model_validate(values(references={"vae": reference(revision=COMMIT[::-1])}))
    other = Manifest.model_validate(values(references={"vae": reference(b"other bytes")}))
    assert one.part_hash("vae") == same.part_hash("vae") != other.part_hash("vae")


def test_a_referenced_part_is_verified_where_it_lies(caches: Path, tmp_path: Path) -> None:
    manifest = write_package(tmp_path / "p", references={"vae": reference()})
    with pytest.raises(OfflineError, match=r"vae/w\.safetensors of owner/base, which tiny needs") as caught:
        packages.verify_package(tmp_path / "p", manifest)
    assert caught.value.hint == f"packforcing models pull {tmp_path / 'p'}"
    assert [name for _, name in packages.absent_files(manifest)] == ["w.safetensors"]
    path = put_in_hub_cache(caches, manifest.references["vae"])
    packages.verify_package(tmp_path / "p", manifest)
    assert packages.part_folder(tmp_path / "p", manifest, "vae") == path.parent
    path.write_bytes(b"weighty")
    with pytest.raises(WeightsError, match="is damaged"):
        packages.verify_package(tmp_path / "p", manifest)
    path.write_bytes(b"weights")
    (path.parent / "more.safetensors").write_bytes(b"not listed")
    with pytest.raises(WeightsError, match="is not listed in the manifest"):
        packages.verify_package(tmp_path / "p", manifest)


def test_a_large_file_is_hashed_once_until_it_changes(
    caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "REMEMBERED_FROM", 1000)
    manifest = write_package(tmp_path / "p")
    hashed: list[str] = []
    real = packages.hashlib.file_digest

    def counting(file: Any, name: str) -> Any:
        hashed.append(Path(file.name).name)
        return real(file, name)

    monkeypatch.setattr(packages.hashlib, "file_digest", counting)
    for trust, expected in ((True, 2), (True, 1), (False, 2)):  # the small file every time
        hashed.clear()
        packages.verify_package(tmp_path / "p", manifest, trust=trust)
        assert len(hashed) == expected
    path = tmp_path / "p" / "transformer" / "w.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"?")
    os.utime(path, ns=(1, 1))
    with pytest.raises(WeightsError, match="is damaged"):
        packages.verify_package(tmp_path / "p", manifest, trust=True)


def test_a_note_that_cannot_be_read_costs_time_only(caches: Path, tmp_path: Path) -> None:
    manifest = write_package(tmp_path / "p")
    packages.write_text(packages.models_folder().parent / "verified.json", "[broken")
    packages.verify_package(tmp_path / "p", manifest, trust=True)


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("hf:owner/name", "owner/name", "main"),
        ("hf:o-w.n/na_me.2@v1.0", "o-w.n/na_me.2", "v1.0"),
        (f"hf:owner/name@{COMMIT}", "owner/name", COMMIT),
    ],
)
def test_hub_sources_are_written_as_they_are_read(caches: Path, text: str, repo: str, revision: str) -> None:
    source = HubSource.parse(text)
    assert source == HubSource(repo, revision)
    assert str(source) == text
    folder = packages.install_folder(text)
    assert folder.parent == packages.models_folder()
    assert packages.name_of(folder) == text


@pytest.mark.parametrize(
    "text", ["hf:", "hf:name", "hf:a/b/c", "hf:owner/name@", "hf:owner/name@a/b", "hf:../x", "hf:/etc"]
)
def test_wrong_hub_sources_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        HubSource.parse(text)


def test_names_are_folders_of_the_cache_and_nothing_else(caches: Path) -> None:
    assert packages.install_folder("mine-2.0").parent == packages.models_folder()
    for name in ("../mine", "a/b", "", ".hidden", "a b"):
        with pytest.raises(UsageError, match="is not a model's name"):
            packages.install_folder(name)


def test_an_installed_package_is_found_by_name_and_offered_for_a_wrong_one(caches: Path) -> None:
    folder = packages.install_folder("mine")
    write_package(folder)
    assert packages.find_package("mine") == folder
    assert list(packages.installed()) == [folder]
    with pytest.raises(UsageError, match="did you mean mine"):
        packages.find_package("minee")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("wan2.1-1.3b-longlive", OfflineError, r"is not installed \(30.3 GB to download, unknown\)"),
        ("Wan2.1-1.3B-LongLive", OfflineError, "wan2.1-1.3b-longlive is not installed"),
        ("hf:owner/name", OfflineError, "hf:owner/name is not installed"),
        ("taew2_1", UsageError, "taew2_1 is a VAE, not a model"),
        ("wan2.1-1.3b", UsageError, "is a family of models"),
        ("bundle.tar", UsageError, "bundle.tar is a bundle"),
    ],
)
def test_what_cannot_run_says_what_to_do(
    caches: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bundle.tar").write_bytes(b"")
    with pytest.raises(error, match=message) as caught:
        packages.find_package(name)
    assert caught.value.hint  # type: ignore[attr-defined]


def test_facts_are_the_catalogs_until_a_package_is_there(caches: Path) -> None:
    assert packages.facts("wan2.1-1.3b-longlive") is catalog.get("wan2.1-1.3b-longlive")
    assert packages.facts("wan2.1-1.3b").kind == "family"
    assert packages.facts("demo").install == "installed"
    assert packages.facts(str(catalog.DEMO_FOLDER)).name == "demo"


def test_a_text_is_written_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages.write_text(tmp_path / "a" / "note", "old")

    def fail(_: int) -> None:
        raise OSError("no")

    monkeypatch.setattr(packages.os, "fsync", fail)
    with pytest.raises(OSError, match="no"):
        packages.write_text(tmp_path / "a" / "note", "new")
    assert [(p.name, p.read_text()) for p in (tmp_path / "a").iterdir()] == [("note", "old")]


def test_a_record_is_size_and_hash(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert packages.record_of(tmp_path / "f") == FileRecord(sha256=expected, size=3)
