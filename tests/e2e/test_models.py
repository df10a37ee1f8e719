"""packforcing models, as a person and as a program sees it: a Hub on this machine serves stand-ins of the releases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stand_in
from hub_server import HubServer

from packforcing_cli import catalog

BASE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
STUDENT = "wlsaidhi/SFWan2.1-T2V-1.3B-Diffusers"
NAME = "wan2.1-1.3b-self-forcing"
PROMPT = "a red circle moving right on a blue background"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Repository -> files."""
    folder = tmp_path_factory.mktemp("released")
    return {BASE: stand_in.wan_base(folder), STUDENT: stand_in.transformer(folder)}


@pytest.fixture
def hub(hub_server: HubServer, released: dict[str, dict[str, bytes]]) -> HubServer:
    facts = catalog.get(NAME)
    hub_server.add(BASE, released[BASE], commit=facts.parts["vae"].revision)
    hub_server.add(STUDENT, released[STUDENT], commit=facts.parts["transformer"].revision)
    return hub_server


def test_a_pulled_model_makes_a_video(
    hub: HubServer, run_command: Callable[..., Any], tmp_path: Path
) -> None:
    """The way of a person with a GPU, at toy size: pull, then generate."""
    before = run_command("generate", PROMPT, "--model", NAME)
    assert before.code == 8
    assert f"packforcing models pull {NAME}" in before.err
    pulled = run_command("models", "pull", NAME, "--endpoint", hub.endpoint)
    assert pulled.code == 0, pulled.err
    folder = Path(pulled.out.strip())
    assert [p.name for p in folder.iterdir()] == ["packforcing.json"]  # no second copy of any weights
    assert "is installed" in pulled.err
    made = run_command(
        "generate", PROMPT, "--model", NAME, "--size", "64x64", "--seconds", "1", "--seed", "3",
        "-o", tmp_path / "out.mp4", "--device", "cpu",
    )  # fmt: skip
    assert made.code == 0, made.err
    assert (tmp_path / "out.mp4").stat().st_size > 0
