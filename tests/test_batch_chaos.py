"""Every job exactly once, the same bytes, while workers and the driver are killed at random."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="SIGKILL and /proc")
SCRIPT = Path(__file__).parent / "batch_chaos.py"


def run(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=7000)
    assert done.stdout, done.stderr
    values: dict[str, Any] = json.loads(done.stdout)
    assert values["wrong"] == []
    assert done.returncode == 0
    return values


def test_forty_jobs_survive_kills_of_workers_and_driver() -> None:
    found = run("--jobs", "40", "--seed", "2", "--pause", "2", "4")
    assert found["kills"]["worker"] >= 1
    assert found["kills"]["driver"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_three_hundred_jobs_survive_kills_of_workers_and_driver() -> None:
    found = run("--jobs", "300", "--seed", "7")
    assert found["kills"]["worker"] >= 5 and found["kills"]["driver"] >= 2


@pytest.mark.slow
def test_jobs_under_ray_survive_kills_of_actors_and_driver() -> None:
    pytest.importorskip("ray")
    assert run("--jobs", "40", "--engine", "ray", "--pause", "10", "20")["kills"]["worker"] >= 1
