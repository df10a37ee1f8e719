"""--model auto: which model is taken on which machine, and that nothing is downloaded without a yes."""

from __future__ import annotations

import functools
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stand_in
from hub_server import HubServer

from packforcing_cli import catalog, hub, jobs
from packforcing_cli.cli import choose
from packforcing_cli.cli.choose import Choice, choose_model
from packforcing_cli.config import GenerateRequest
from packforcing_cli.jobs import Device
from packforcing_cli.planner import Machine

GB = 10**9
REAL = catalog.get("wan2.1-1.3b-self-forcing")
REQUEST = GenerateRequest(prompt="a fox")


def gpu(memory_gb: float) -> Machine:
    return Machine(int(memory_gb * GB), 10**12, "a GPU (cuda:0)", 64 * GB)


def test_the_demo_where_there_is_no_gpu_even_with_a_real_model() -> None:
    choice = choose_model(REQUEST, Machine(10**12), [(REAL.name, REAL)], REAL)
    assert choice == Choice("demo", "no CUDA GPU is used, so the demo, a toy world")


def test_the_first_installed_real_model_that_fits_the_gpu() -> None:
    other = replace(catalog.get("wan2.1-14b"), name="mine", kind="package")
    installed = [("mine", other), (REAL.name, REAL)]
    assert choose_model(REQUEST, gpu(140), installed, REAL).model == "mine"
    choice = choose_model(REQUEST, gpu(24), installed, REAL)
    assert (choice.model, choice.why) == (REAL.name, "installed, and fits this GPU")


def test_a_gpu_that_is_too_small_takes_the_demo_and_says_what_would_fit() -> None:
    for installed in ([(REAL.name, REAL)], []):
        choice = choose_model(REQUEST, gpu(12), installed, REAL)
        assert choice.model == "demo"
        assert choice.install is None
        assert choice.why.startswith(f"{REAL.name} does not fit this GPU (with --")
    fitted = choose_model(REQUEST.changed(auto_fit=True), gpu(12), [(REAL.name, REAL)], REAL)
    assert (fitted.model, fitted.why) == (REAL.name, "installed, and fits this GPU after a change")
    assert "nor would it with any option" in choose_model(REQUEST, gpu(0.5), [], REAL).why


def test_a_full_disk_does_not_change_the_model() -> None:
    full = replace(gpu(24), disk_free_bytes=0)
    assert choose_model(REQUEST, full, [(REAL.name, REAL)], REAL).model == REAL.name
    assert choose_model(REQUEST, full, [], REAL).install == REAL


def test_a_gpu_that_is_large_enough_is_offered_the_recommended_model() -> None:
    assert choose_model(REQUEST, gpu(24), [], REAL) == Choice("", "no real model is installed", REAL)


# ------------------------------------------------------------------------------------------------ the command line


@pytest.fixture
def large_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU, as far as plans go."""
    device = Device("cuda:0", "bf16", gpu(80), "the GPU with most free memory", "as on every GPU that has it")
    monkeypatch.setattr(jobs, "choose_device", lambda *_: device)


def test_without_a_terminal_nothing_is_downloaded(run_command: Any, large_gpu: None, tmp_path: Path) -> None:
    result = run_command("generate", "a fox")
    assert (result.code, result.out) == (8, "")
    error, hint = result.err.splitlines()
    assert error.startswith(f"error: no real model is installed: {REAL.name}, ")
    assert " GB to download, licence Apache-2.0, needs " in error
    assert " of disk (" in error
    assert f"packforcing models pull {REAL.name}, or --model demo" in hint
    assert list(tmp_path.iterdir()) == []


class Terminal(io.StringIO):
    """Somebody who types."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def released(
    hub_server: HubServer, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> HubServer:
    """A Hub with small stand-ins of the recommended model's files."""
    folder = tmp_path_factory.mktemp("stand-in")
    files = {"wan": stand_in.wan_base(folder), "student": stand_in.transformer(folder)}
    hub_server.add(REAL.parts["vae"].repo, files["wan"], commit=REAL.parts["vae"].revision)
    hub_server.add(
        REAL.parts["transformer"].repo, files["student"], commit=REAL.parts["transformer"].revision
    )
    monkeypatch.setattr(hub, "Hub", functools.partial(hub.Hub, endpoint=hub_server.endpoint))
    return hub_server


@pytest.mark.parametrize("answer", ["n\n", "\n"])
def test_a_no_at_the_terminal_downloads_nothing(
    answer: str, run_command: Any, large_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(choose, "_download", lambda name: pytest.fail("downloaded"))
    monkeypatch.setenv("TERM", "dumb")
    result = run_command("generate", "a fox")
    assert result.code == 8
    assert f"Download {REAL.name} now? [y/N]" in result.err


def test_a_yes_at_the_terminal_installs_it_and_goes_on(
    run_command: Any, large_gpu: None, released: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    on_cpu = Device("cpu", "fp32", gpu(80), "a stand-in for the GPU", "as on every CPU")
    monkeypatch.setattr(jobs, "choose_device", lambda *_: on_cpu)
    options = ("--size", "64x64", "--seconds", "1", "--json")
    first = run_command("generate", "a fox", *options)
    assert first.code == 0, first.err
    assert json.loads(first.out)["model"] == REAL.name
    assert "model: the real model, just installed; " in first.err
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    again = run_command("generate", "a fox", *options)
    assert (again.code, "Download" in again.err) == (0, False)
    assert json.loads(again.out)["model"] == REAL.name
    plan = run_command("generate", "a fox", "--size", "64x64", "--dry-run", "--json")
    assert json.loads(plan.out)["downloads"] == []


def test_a_dry_run_neither_asks_nor_downloads_and_lists_what_is_absent(
    run_command: Any, large_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(choose, "_download", lambda name: pytest.fail("downloaded"))
    for model in (["--model", "auto"], ["--model", REAL.name]):
        plan = run_command("generate", "a fox", *model, "--dry-run", "--json")
        assert plan.code == 0, plan.err
        values = json.loads(plan.out)
        assert values["model"] == REAL.name
        assert [part["part"] for part in values["downloads"]] == list(REAL.parts)
        assert sum(part["size_bytes"] for part in values["downloads"]) == REAL.download_bytes
    text = run_command("generate", "a fox", "--model", REAL.name, "--dry-run")
    (line,) = [line for line in text.out.splitlines() if line.startswith("downloads ")]
    assert f"{REAL.download_bytes / 1e9:.1f} GB: transformer " in line
    assert "Download" not in text.err
    tiny = run_command("generate", "a fox", "--model", REAL.name, "--vae", "tiny", "--dry-run", "--json")
    assert json.loads(tiny.out)["downloads"][-1]["repo"] == catalog.get("taew2_1").parts["vae"].repo
    assert run_command("generate", "a fox", "--model", REAL.name).code == 8
    assert run_command("generate", "a fox", "--model", "taew2_1", "--dry-run").code == 2
    assert list(tmp_path.iterdir()) == []


def test_on_this_machine_auto_is_the_demo_and_says_why(run_command: Any) -> None:
    from packforcing_cli import machine

    if machine.has_nvidia_driver():
        pytest.skip("there may be a GPU")
    result = run_command(
        "generate", "a red circle moving right on a blue background", "--seconds", "1", "-o", "a.mp4"
    )
    assert result.code == 0, result.err
    assert "demo is a toy world" in result.err
    said = "model: no CUDA GPU is used, so the demo, a toy world; device: there is no NVIDIA driver; precision: as"
    assert said in result.err
