"""packforcing models, as a person and as a program sees it: a Hub on this machine serves stand-ins of the releases."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import stand_in
from hub_server import HubServer

from packforcing_cli import catalog, hub, packages, registry
from packforcing_cli.cli import models
from packforcing_cli.convert import original_name

BASE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
STUDENT = "wlsaidhi/SFWan2.1-T2V-1.3B-Diffusers"
PICKLED = "zhuhz22/Causal-Forcing"
ADAPTED = "Efficient-Large-Model/LongLive-1.3B"
NAME = "wan2.1-1.3b-self-forcing"
CONVERTED = "wan2.1-1.3b-causal-forcing"
MERGED = "wan2.1-1.3b-longlive"
PROMPT = "a red circle moving right on a blue background"

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Repository -> files."""
    folder = tmp_path_factory.mktemp("released")
    return {
        BASE: stand_in.wan_base(folder),
        STUDENT: stand_in.transformer(folder),
        PICKLED: {"chunkwise/causal_forcing.pt": stand_in.checkpoint()},
        ADAPTED: {
            "models/longlive_base.pt": stand_in.checkpoint(averaged=False),
            "models/lora.pt": stand_in.lora(),
        },
    }


@pytest.fixture
def server(hub_server: HubServer, released: dict[str, dict[str, bytes]]) -> HubServer:
    facts = catalog.get(NAME)
    hub_server.add(BASE, released[BASE], commit=facts.parts["vae"].revision)
    hub_server.add(STUDENT, released[STUDENT], commit=facts.parts["transformer"].revision)
    hub_server.add(PICKLED, released[PICKLED])
    hub_server.add(ADAPTED, released[ADAPTED])
    return hub_server


@pytest.fixture
def pull(server: HubServer, run_command: Command) -> Command:
    return lambda name=NAME, *more: run_command("models", "pull", name, "--endpoint", server.endpoint, *more)


def generate(run_command: Command, model: str, folder: Path, *more: str) -> Any:
    return run_command(
        "generate", PROMPT, "--model", model, "--size", "64x64", "--seconds", "0.1", "--seed", "3",
        "-o", folder / "out.mp4", "--device", "cpu", "--overwrite", *more,
    )  # fmt: skip


def convert(folder: str) -> None:
    """What `models convert` does to a pulled package, without reading a pickle in a process of its own."""
    at = Path(folder.strip())
    manifest = packages.read_manifest(at)
    registry.write_package(at, manifest, transformer=stand_in.network(), base=at, overwrite=True)


def listed(run_command: Command, name: str) -> dict[str, Any]:
    entries = json.loads(run_command("models", "list", "--json").out)["models"]
    return next(entry for entry in entries if entry["name"] == name)


def test_a_pulled_model_makes_a_video(pull: Command, run_command: Command, tmp_path: Path) -> None:
    """The way of a person with a GPU, at toy size: pull, then generate."""
    before = generate(run_command, NAME, tmp_path)
    assert before.code == 8
    assert f"packforcing models pull {NAME}" in before.err
    pulled = pull()
    assert pulled.code == 0, pulled.err
    folder = Path(pulled.out.strip())
    assert [p.name for p in folder.iterdir()] == ["packforcing.json"]  # no second copy of any weights
    assert "497.6 kB to download in 15 files; licence Apache-2.0" in pulled.err
    assert f"{NAME} is installed" in pulled.err
    made = generate(run_command, NAME, tmp_path)
    assert made.code == 0, made.err
    assert (tmp_path / "out.mp4").stat().st_size > 0
    again = pull()
    assert (again.code, again.out) == (0, pulled.out)
    assert "0 B to download in 0 files, 497.6 kB are here" in again.err
    assert run_command("models", "verify", NAME, "--deep").code == 0


def test_the_manifest_records_commits_and_hashes(pull: Command, server: HubServer) -> None:
    manifest = packages.read_manifest(Path(pull().out.strip()))
    facts = catalog.get(NAME)
    assert set(manifest.references) == {"transformer", "vae", "text_encoder", "tokenizer"}
    for part, reference in manifest.references.items():
        assert (reference.repo, reference.revision) == (facts.parts[part].repo, facts.parts[part].revision)
        for name, record in reference.files.items():
            content = server.repos[reference.repo].commits[reference.revision][f"{part}/{name}"]
            assert (record.size, record.sha256) == (len(content), stand_in.sha256(content))
    assert len(manifest.references["text_encoder"].files) == 7
    assert "notes.bin" not in manifest.references["vae"].files
    assert manifest.schedule.timesteps == (1000, 750, 500, 250)
    assert (manifest.cache.frames_per_block, manifest.cache.compressor, manifest.trained_frames) == (
        3,
        "lr",
        21,
    )


def test_the_program_reads_what_the_hub_served_bit_for_bit(
    pull: Command, released: dict[str, dict[str, bytes]]
) -> None:
    from safetensors.torch import load

    pull()
    model = registry.load_model(NAME, device="cpu")
    served = load(released[STUDENT]["transformer/diffusion_pytorch_model.safetensors"])
    state = model.transformer.state_dict()
    assert state.keys() == served.keys()
    assert all((state[name] == served[name]).all() for name in served)
    assert model.load_text_encoder().encode(PROMPT).shape == (1, 512, 64)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        (CONVERTED, ["chunkwise/causal_forcing.pt"]),
        (MERGED, ["models/longlive_base.pt", "models/lora.pt"]),
    ],
)
def test_pickled_weights_are_pulled_and_then_converted(
    pull: Command, run_command: Command, tmp_path: Path, name: str, files: list[str]
) -> None:
    early = run_command("models", "convert", name)
    assert (early.code, f"packforcing models pull {name}" in early.err) == (8, True)
    pulled = pull(name)
    assert pulled.code == 0, pulled.err
    assert f"packforcing models convert {name}" in pulled.err
    assert listed(run_command, name)["state"] == "to be converted"
    refused = generate(run_command, name, tmp_path)
    assert refused.code == 7
    assert f"packforcing models convert {name}" in refused.err
    converted = run_command("models", "convert", name)
    assert converted.code == 0, converted.err
    assert converted.out == pulled.out
    assert listed(run_command, name)["state"] == "installed"
    folder = Path(pulled.out.strip())
    manifest = packages.read_manifest(folder)
    assert [entry["file"] for entry in manifest.provenance["pickled"]] == files
    facts = catalog.get(name)
    assert (manifest.license, manifest.base_model) == (facts.license, "Wan-AI/Wan2.1-T2V-1.3B")
    assert manifest.schedule.timesteps == facts.schedule.steps
    made = generate(run_command, name, tmp_path)
    assert made.code == 0, made.err
    assert "0 B to download" in pull(name).err  # and what was converted stays
    assert listed(run_command, name)["state"] == "installed"
    # Causal-Forcing runs its last weights, not the averaged ones; LongLive has no other.
    assert manifest.provenance["group"] == "generator"
    expected = stand_in.network().state_dict()
    if name == MERGED:
        assert (manifest.provenance["lora"], manifest.provenance["lora_scale"]) == ("lora.pt", 1)
        pairs = stand_in.lora_pairs()
        for key in expected:
            module = "base_model.model." + original_name(key).removesuffix(".weight")
            if f"{module}.lora_A.weight" in pairs:
                a, b = pairs[f"{module}.lora_A.weight"], pairs.pop(f"{module}.lora_B.weight")
                expected[key] = expected[key] + b @ a
        assert len(pairs) == 10  # each of the ten linears was changed
    found = safetensors.torch.load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(((found[key] - expected[key]).abs() < 1e-6).all() for key in expected)


@pytest.mark.parametrize(
    "given",
    ["--output x", "--base demo", "--lora x", "--lora-alpha 2", "--kind full", "--frames-per-block 4"],
)
def test_what_the_catalog_decides_cannot_be_given_to_a_conversion(run_command: Command, given: str) -> None:
    result = run_command("models", "convert", CONVERTED, *given.split())
    assert (result.code, f"{given.split()[0]} does not go with {CONVERTED}" in result.err) == (2, True)


def test_parts_that_models_share_are_downloaded_once(pull: Command, server: HubServer) -> None:
    pull()
    before = len(server.asked("GET /cdn"))
    assert pull(CONVERTED).code == 0
    assert len(server.asked("GET /cdn")) == before + 1  # the checkpoint


def test_a_repository_of_the_catalog_is_a_package_through_its_facts(
    pull: Command, run_command: Command, server: HubServer, released: dict[str, dict[str, bytes]]
) -> None:
    assert Path(pull(f"hf:{STUDENT}").out.strip()).name == NAME
    assert run_command("models", "path", f"hf:{STUDENT}").out == run_command("models", "path", NAME).out
    other = stand_in.changed(released[STUDENT], "transformer/diffusion_pytorch_model.safetensors")
    newer = server.add(STUDENT, other)
    at = pull(f"hf:{STUDENT}@{newer}")
    assert at.code == 0, at.err
    assert packages.read_manifest(Path(at.out.strip())).references["transformer"].revision == newer
    assert f"hf:{STUDENT}@{newer}" in {
        entry["name"] for entry in json.loads(run_command("models", "list", "--json").out)["models"]
    }


def test_an_unknown_repository_without_a_manifest_is_no_package(pull: Command, server: HubServer) -> None:
    server.add("someone/else", {"model.safetensors": b"x" * 2000})
    result = pull("hf:someone/else")
    assert result.code == 7
    assert "hf:someone/else is not a model package: it has no packforcing.json" in result.err
    assert not packages.models_folder().exists()


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("wan2.1-1.3b-self-forcng", 2, "did you mean wan2.1-1.3b-self-forcing"),
        ("hf:nobody/nothing", 2, "does not exist on"),
        (f"hf:{STUDENT}@v7", 2, "there is no such revision"),
        ("hf:no-slash", 2, "is not a Hub repository"),
        ("demo", 2, "demo has nothing to download"),
        ("wan2.1-14b", 2, "has nothing to download"),
        ("missing.tar", 2, "there is no file missing.tar"),
    ],
)
def test_wrong_names_are_one_message(pull: Command, name: str, code: int, message: str) -> None:
    result = pull(name)
    assert (result.code, result.out) == (code, "")
    assert message in result.err
    assert "Traceback" not in result.err


def test_a_gated_model_without_a_token_says_how_to_log_in(pull: Command, server: HubServer) -> None:
    server.repos[STUDENT].gated = True
    result = pull()
    assert result.code == 8
    assert "is gated" in result.err
    assert "hf auth login" in result.err
    server.repos[STUDENT].gated = False
    assert pull().code == 0


def test_no_network_is_exit_code_8(server: HubServer, run_command: Command) -> None:
    result = run_command("models", "pull", NAME, "--endpoint", "http://127.0.0.1:9")
    assert result.code == 8
    assert "cannot be reached" in result.err
    result = run_command("models", "pull", NAME, "--offline")
    assert result.code == 8
    assert "the network is switched off" in result.err
    assert not packages.models_folder().exists()


@pytest.mark.parametrize("name", [NAME, CONVERTED])  # a commit, and a branch
def test_what_the_hubs_cache_has_is_installed_without_a_network(
    pull: Command, run_command: Command, server: HubServer, name: str
) -> None:
    first = packages.read_manifest(Path(pull(name).out.strip()))
    assert run_command("models", "remove", name, "--yes").code == 0
    asked = len(server.requests)
    again = pull(name, "--offline")
    assert again.code == 0, again.err
    assert packages.read_manifest(Path(again.out.strip())) == first
    assert len(server.requests) == asked


def test_ctrl_c_says_that_the_download_goes_on(
    pull: Command, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(hub.Hub, "fetch", interrupt)
        result = pull()
    assert result.code == 130
    assert f"the same command goes on: packforcing models pull {NAME}" in result.err
    assert not packages.models_folder().exists()


def test_a_full_disk_is_told_before_anything_is_downloaded(
    pull: Command, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(hub.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 1000))
        result = pull()
    assert result.code == 6
    assert "0.5 MB have to be downloaded" in result.err
    assert "HF_HOME" in result.err
    assert server.asked("GET /cdn") == []
    assert pull().code == 0


def test_wrong_bytes_install_nothing_and_the_next_pull_succeeds(pull: Command, server: HubServer) -> None:
    server.fail("GET /cdn", replace=b"0" * 5)
    server.fail("GET /cdn", replace=b"0" * 10**6)
    result = pull()
    assert result.code == 7
    assert "arrived damaged" in result.err
    assert not packages.models_folder().exists()
    assert pull().code == 0


def test_an_interrupted_pull_goes_on_where_it_stopped(
    pull: Command, server: HubServer, run_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.fail("GET /cdn", cut=10_000)
    server.fail("GET /cdn", status=503, times=20)
    result = pull()
    assert result.code == 8
    assert "goes on from there" in result.err
    server.faults.clear()
    again = pull()
    assert again.code == 0
    assert "10.5 kB are here" in again.err
    assert [h["range"] for h in server.asked("GET /cdn") if "range" in h][-1] == "bytes=10000-"


def test_an_interrupted_pull_does_not_hash_again_what_it_finished(
    pull: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = hub.Hub.fetch
    finished: list[str] = []

    def interrupted(at: hub.Hub, repo: str, commit: str, file: hub.RepoFile, *more: Any) -> Path:
        if len(finished) == 4:
            raise KeyboardInterrupt
        finished.append(file.path)
        return fetch(at, repo, commit, file, *more)

    hashed: list[str] = []
    same_content = hub.same_content

    def counted(path: Path, file: hub.RepoFile) -> bool:
        hashed.append(file.path)
        return same_content(path, file)

    monkeypatch.setattr(packages, "REMEMBERED_FROM", 1)
    monkeypatch.setattr(hub, "same_content", counted)
    with monkeypatch.context() as patched:
        patched.setattr(hub.Hub, "fetch", interrupted)
        assert pull().code == 130
    again = pull()
    assert again.code == 0, again.err
    # Git's files are small and are hashed each time.
    assert hashed == [path for path in finished if path.endswith("config.json")]
    assert len(hashed) < len(finished)
    (packages.models_folder().parent / "verified.json").unlink()
    third = pull()
    assert "checking what is here (0.0 GB)" in third.err
    assert "checking what is here" not in pull(NAME, "--quiet").err


def test_a_newer_revision_is_told_before_it_is_taken(
    pull: Command, server: HubServer, released: dict[str, dict[str, bytes]], run_command: Command
) -> None:
    convert(pull(CONVERTED).out)
    server.add(PICKLED, {"chunkwise/causal_forcing.pt": stand_in.checkpoint(seed=9)})
    result = pull(CONVERTED)
    assert result.code == 2
    assert (
        "has changed on the Hub since it was installed: chunkwise/causal_forcing.pt would become"
        in result.err
    )
    assert f"packforcing models pull {CONVERTED} --update" in result.err
    assert listed(run_command, CONVERTED)["state"] == "installed"
    assert pull(CONVERTED, "--update").code == 0
    assert listed(run_command, CONVERTED)["state"] == "to be converted"


def test_a_converted_transformer_outlives_an_update_of_other_parts(
    pull: Command, server: HubServer, released: dict[str, dict[str, bytes]], run_command: Command
) -> None:
    convert(pull(CONVERTED).out)
    folder = packages.install_folder(CONVERTED)
    before = packages.read_manifest(folder)
    other = stand_in.changed(released[BASE], "vae/config.json")
    server.add(BASE, other, commit=catalog.get(CONVERTED).parts["vae"].revision)
    server.add(PICKLED, released[PICKLED] | {"README.md": b"new"})  # another commit, the same weights
    assert "vae/config.json would become another file" in pull(CONVERTED).err
    updated = pull(CONVERTED, "--update")
    assert updated.code == 0, updated.err
    assert listed(run_command, CONVERTED)["state"] == "installed"
    after = packages.read_manifest(folder)
    assert after.part_hash("transformer") == before.part_hash("transformer")
    assert after.part_hash("vae") != before.part_hash("vae")
    assert after.provenance["pickled"][0]["revision"] == server.repos[PICKLED].refs["main"]
    packages.verify_package(folder, after)


def test_an_update_that_cannot_be_recorded_changes_nothing(
    pull: Command, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(pull(CONVERTED).out)
    folder = packages.install_folder(CONVERTED)
    server.add(PICKLED, {"chunkwise/causal_forcing.pt": stand_in.checkpoint(seed=9)})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(packages, "write_text", full)
        assert pull(CONVERTED, "--update").code != 0
    packages.verify_package(folder, packages.read_manifest(folder))
    assert (folder / "transformer").is_dir()


def test_damage_is_found_by_verify_and_mended_by_the_next_pull(
    pull: Command, run_command: Command, tmp_path: Path
) -> None:
    pull()
    manifest = packages.read_manifest(packages.install_folder(NAME))
    reference = manifest.references["transformer"]
    folder = packages.part_folder(packages.install_folder(NAME), manifest, "transformer")
    path = (folder / next(n for n in reference.files if n.endswith(".safetensors"))).resolve()
    whole = path.read_bytes()
    for damage, message in (
        (whole[:-1] + bytes([whole[-1] ^ 1]), "is damaged: its sha256"),
        (whole[:-100], "is truncated"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><title>502</title>", "is a web page"),
    ):
        path.write_bytes(damage)
        result = run_command("models", "verify", NAME)
        assert (result.code, message in result.err) == (7, True), result.err
        assert generate(run_command, NAME, tmp_path).code == 7
    path.unlink()
    missing = run_command("models", "verify", NAME)
    assert (missing.code, f"packforcing models pull {NAME}" in missing.err) == (8, True)
    assert listed(run_command, NAME)["state"] == "files missing"
    path.write_bytes(whole[:-1] + b"?")
    assert pull().code == 0
    assert path.read_bytes() == whole
    fine = json.loads(run_command("models", "verify", NAME, "--json").out)
    assert (fine["files"], fine["complete"]) == (15, True)


def test_deep_verification_reads_every_tensor(pull: Command, run_command: Command, server: HubServer) -> None:
    pull()
    fine = json.loads(run_command("models", "verify", NAME, "--deep", "--json").out)
    assert fine["tensors"] > 100
    poisoned = stand_in.poisoned(server.repos[STUDENT].commits[server.repos[STUDENT].refs["main"]])
    commit = server.add(STUDENT, poisoned)
    name = f"hf:{STUDENT}@{commit}"
    assert pull(name).code == 0
    assert run_command("models", "verify", name).code == 0  # as its author uploaded it
    deep = run_command("models", "verify", name, "--deep")
    assert (deep.code, "is not finite" in deep.err) == (7, True)


def test_remove_frees_its_own_and_asks_first(pull: Command, run_command: Command, tmp_path: Path) -> None:
    pull()
    pull(CONVERTED)
    refused = run_command("models", "remove", NAME)
    assert (refused.code, "Add --yes" in refused.err) == (2, True)
    kept = run_command("models", "remove", NAME, "--yes")
    assert kept.code == 0
    assert "stay in the Hub's cache (--hub-files deletes them too)" in kept.err
    assert listed(run_command, NAME)["state"] == "not installed"
    assert "0 B to download" in pull().err
    assert run_command("models", "remove", NAME, "--yes", "--hub-files").code == 0
    left = {p.name for p in (tmp_path / "hub").glob("models--*/snapshots/*/*/*")}
    assert "spiece.model" in left  # the other model uses it
    assert not {p.name for p in (tmp_path / "hub").glob("models--wlsaidhi*/blobs/*")}
    assert run_command("models", "remove", NAME, "--yes").code == 2
    assert run_command("models", "remove", "demo", "--yes").code == 2


def test_a_broken_package_keeps_no_other_from_being_removed(
    pull: Command, run_command: Command, tmp_path: Path
) -> None:
    pull()
    other = packages.models_folder() / "other"
    other.mkdir()
    (other / "packforcing.json").write_text("{")
    removed = run_command("models", "remove", NAME, "--yes", "--hub-files", "--quiet")
    assert removed.code == 0, removed.err
    assert f"in the Hub's cache stay: {other} cannot be read and may share them" in removed.err
    assert listed(run_command, NAME)["state"] == "not installed"
    assert list((tmp_path / "hub").glob("models--wlsaidhi*/blobs/*"))
    assert run_command("models", "remove", "other", "--yes").code == 0
    assert not other.exists()


def test_a_bundle_with_parts_installs_where_there_is_no_network(
    pull: Command, run_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    pull()
    small = run_command("models", "pack", NAME, "-o", tmp_path / "small.tar")
    assert small.code == 0, small.err
    assert (tmp_path / "small.tar").stat().st_size < 30_000  # a manifest and a card
    packed = run_command("models", "pack", NAME, "-o", tmp_path / "model.tar", "--with-parts")
    assert packed.code == 0, packed.err
    before = registry.load_model(NAME, device="cpu").transformer.state_dict()
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "no hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    lacking = run_command("models", "pull", tmp_path / "small.tar")
    assert lacking.code == 8
    assert run_command("models", "remove", NAME, "--yes").code == 0
    installed = run_command("models", "pull", tmp_path / "model.tar")
    assert installed.code == 0, installed.err
    after = registry.load_model(NAME, device="cpu").transformer.state_dict()
    assert all((after[name] == before[name]).all() for name in before)
    assert run_command("models", "verify", NAME, "--deep").code == 0
    assert generate(run_command, NAME, tmp_path).code == 0
    assert run_command("models", "pull", tmp_path / "model.tar").code == 0  # again: nothing happens


def test_a_bundles_references_are_fetched_with_it(
    pull: Command, run_command: Command, tmp_path: Path, server: HubServer
) -> None:
    pull()
    assert run_command("models", "pack", NAME, "-o", tmp_path / "small.tar").code == 0
    assert run_command("models", "remove", NAME, "--yes", "--hub-files").code == 0
    assert pull(str(tmp_path / "small.tar")).code == 0
    assert listed(run_command, NAME)["installed"] is True


def test_a_package_on_the_hub_is_pulled_by_its_manifest(
    pull: Command, run_command: Command, server: HubServer, tmp_path: Path
) -> None:
    """A package of which one part is its own and the rest lie in other repositories, as a fine-tuned one."""
    convert(pull(CONVERTED).out)
    assert run_command("models", "pack", CONVERTED, "-o", tmp_path / "folder").code == 0
    card = (tmp_path / "folder" / "README.md").read_text("utf-8")
    assert card.startswith('---\nlicense: "apache-2.0"\n')
    assert "| vae | Wan-AI/Wan2.1-T2V-1.3B-Diffusers at 0fad780a534b, vae |" in card
    server.add("me/mine", stand_in.files_of(tmp_path / "folder"))
    pulled = pull("hf:me/mine")
    assert pulled.code == 0, pulled.err
    assert [p.name for p in Path(pulled.out.strip()).iterdir()] == ["packforcing.json"]
    assert generate(run_command, "hf:me/mine", tmp_path).code == 0
    shown = run_command("models", "show", "hf:me/mine")
    assert "hf:me/mine@" in shown.out
    assert run_command("models", "show", CONVERTED, "--json").code == 0
    wrong = stand_in.changed(stand_in.files_of(tmp_path / "folder"), "transformer/config.json")
    server.add("me/mine", wrong)
    result = pull("hf:me/mine")
    assert result.code in (2, 7)
    assert "transformer/config.json" in result.err


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"schema": 9}, 7, "has schema 9; this program reads up to 1"),
        ({"parts": {"transformer": "../x"}}, 7, "is not a path inside the package"),
    ],
)
def test_a_manifest_this_program_cannot_read_is_refused(
    pull: Command, server: HubServer, change: dict[str, Any], code: int, message: str
) -> None:
    values = json.loads((catalog.DEMO_FOLDER / "packforcing.json").read_text("utf-8"))
    server.add("me/mine", {"packforcing.json": json.dumps(values | change).encode()})
    result = pull("hf:me/mine")
    assert (result.code, message in result.err) == (code, True), result.err


def test_an_unsupported_architecture_is_refused(
    pull: Command,
    run_command: Command,
    server: HubServer,
    released: dict[str, dict[str, bytes]],
    tmp_path: Path,
) -> None:
    config = json.loads(released[STUDENT]["transformer/config.json"]) | {
        "_class_name": "FluxTransformer2DModel"
    }
    commit = server.add(STUDENT, released[STUDENT] | {"transformer/config.json": json.dumps(config).encode()})
    name = f"hf:{STUDENT}@{commit}"
    assert pull(name).code == 0
    result = generate(run_command, name, tmp_path)
    assert (result.code, "holds FluxTransformer2DModel; supported" in result.err) == (7, True)


@pytest.mark.parametrize(("vae", "name"), [("tiny", "taew2_1"), ("lighttaew2_1", "lighttaew2_1")])
def test_a_tiny_vae_stands_in_for_the_wan_vae(
    vae: str,
    name: str,
    pull: Command,
    run_command: Command,
    server: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pull()
    early = generate(run_command, NAME, tmp_path, "--vae", vae)
    assert (early.code, f"packforcing models pull {name}" in early.err) == (8, True)
    facts = stand_in.tiny_vae_facts(catalog.get(name))
    repo, revision = facts.parts["vae"].repo, facts.parts["vae"].revision
    commit = {} if revision == "main" else {"commit": revision}
    server.add(repo, {f"{name}.safetensors": stand_in.tiny_vae()}, **commit)
    assert pull(name).code == 7  # not the file the catalog pins
    known = {**catalog._load(), name: facts}
    monkeypatch.setattr(catalog, "_load", lambda: known)
    assert pull(name).code == 0
    folder = packages.install_folder(name)
    assert sorted(p.name for p in (folder / "vae").iterdir()) == ["config.json", f"{name}.safetensors"]
    made = generate(run_command, NAME, tmp_path, "--vae", vae)
    assert made.code == 0, made.err
    codec = registry.open_model(NAME, device="cpu", vae=vae).load().codec
    assert bool(codec.facts.latents_mean) == (name == "lighttaew2_1")
    assert run_command("models", "verify", name, "--deep").code == 0
    assert generate(run_command, name, tmp_path).code == 2
    blobs = tmp_path / "hub" / f"models--{repo.replace('/', '--')}" / "blobs"
    assert list(blobs.iterdir())
    assert run_command("models", "remove", name, "--yes", "--hub-files").code == 0
    assert list(blobs.iterdir()) == []


def test_json_and_quiet_are_kept(pull: Command, run_command: Command) -> None:
    pulled = pull(NAME, "--json", "--quiet")
    assert pulled.err == ""
    values = json.loads(pulled.out)
    assert list(values) == [
        "schema", "name", "path", "version", "license", "size_bytes", "downloaded_bytes", "installed", "next",
    ]  # fmt: skip
    assert (values["schema"], values["name"], values["installed"], values["next"]) == (1, NAME, True, None)
    shown = json.loads(run_command("models", "show", NAME, "--json").out)
    assert list(shown) == [
        "schema", "name", "kind", "title", "license", "installed", "state", "size", "fps", "frames_per_block",
        "params", "size_bytes", "download_bytes", "memory_bytes", "install", "license_note", "path", "parts",
        "limits", "next",
    ]  # fmt: skip
    verified = json.loads(run_command("models", "verify", NAME, "--json").out)
    assert list(verified) == ["schema", "name", "path", "files", "size_bytes", "tensors", "complete"]
    assert {part["part"] for part in shown["parts"]} == {"transformer", "vae", "text_encoder", "tokenizer"}
    assert run_command("models", "path", NAME).out.strip() == values["path"]
    assert models.SCHEMA == 1


def test_a_terminal_sees_bars(pull: Command, server: HubServer, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    read, write = pty.openpty()
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_ENDPOINT": server.endpoint,
        "TERM": "xterm",
        "COLUMNS": "120",
        "CI": "",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "packforcing_cli", "models", "pull", NAME],
        stdout=subprocess.PIPE, stderr=write, env=environment,
    )  # fmt: skip
    os.close(write)
    shown = []
    with contextlib.suppress(OSError):  # the terminal is gone when the program is
        while chunk := os.read(read, 1 << 16):
            shown.append(chunk)
    os.close(read)
    out, _ = process.communicate(timeout=60)
    seen = b"".join(shown).decode(errors="replace")
    assert process.returncode == 0, seen
    assert "all files" in seen
    assert out.decode().strip().endswith(NAME)
