"""Figures that README gives for real weights are what the planner computes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from packforcing_cli.config import MemoryOptions, PlanRequest
from packforcing_cli.planner import Machine, plan

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
MODEL = "wan2.1-1.3b-self-forcing"
ROW = re.compile(r"^\| (?:`(--[a-z-]+) (\S+)`)? ?\| (.+?) \| (.+?) \| (.+?) \| .*\|$", re.M)


def rows() -> list[tuple[str, ...]]:
    table = README.split("| option | text | denoise | decode |")[1].split("\n\n")[0]
    return [match.groups(default="") for match in ROW.finditer(table) if "---" not in match.group(0)]


def in_gb(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.1f}"


def test_the_table_of_memory_options_has_its_rows() -> None:
    assert len(rows()) == 9


@pytest.mark.parametrize("row", rows(), ids=lambda row: " ".join(row[:2]) or "plain")
def test_the_memory_of_an_option_is_the_planners(row: tuple[str, ...]) -> None:
    option, value, *cells = row
    changes: dict[str, Any] = {option.removeprefix("--").replace("-", "_"): value} if option else {}
    gpu = Machine(10**12, device="cuda:0", host_bytes=10**12)
    stages = plan(PlanRequest(model=MODEL, seconds=60.0).changed(**changes), gpu).stages
    for cell, stage in zip(cells, stages, strict=True):
        device, _, host = cell.replace(" GB", "").rstrip(")").partition(" (")
        assert device == ("0" if stage.device_bytes == 0 else in_gb(stage.device_bytes)), stage.name
        if host:
            assert host == in_gb(stage.host_bytes), stage.name


def test_the_peaks_of_longer_videos_are_the_planners() -> None:
    text = " ".join(README.split())
    peaks = [in_gb(plan(PlanRequest(model=MODEL, seconds=s)).peak_bytes) for s in (10.0, 60.0, 300.0)]
    assert f"{peaks[0]} GB for 10 s, {peaks[1]} GB for a minute, {peaks[2]} GB for five" in text
    smaller = plan(PlanRequest(model=MODEL, seconds=300.0, memory=MemoryOptions(bank=64))).peak_bytes
    assert f"five minutes with `--bank 64` take {in_gb(smaller)} GB" in text
