"""A sample of tests/fault_matrix.py: what must hold when the writers or the whole process break at any point.

The whole of it: python tests/fault_matrix.py writers; python tests/fault_matrix.py generate 1000.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="fork and SIGKILL")
SCRIPT = Path(__file__).parent / "fault_matrix.py"


def run(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=3000)
    assert done.stdout, done.stderr
    values: dict[str, Any] = json.loads(done.stdout)
    assert values["wrong"] == []
    assert done.returncode == 0
    return values


def test_no_write_can_fail_so_that_anything_is_lost() -> None:
    found = run("writers", "--every", "17")
    assert found["points"] >= 100
    assert found["cases"] >= 25


def test_six_kills_of_the_command_change_nothing() -> None:
    found = run("generate", "6")
    assert found["kills"] == 6 and found["inside"] >= 3


def test_nor_when_the_file_does_not_say_whose_it_is() -> None:
    assert run("writers", "--every", "61", "--no-metadata")["cases"] >= 10


def test_nor_of_a_video_that_goes_on_with_another_one() -> None:
    assert run("writers", "--every", "61", "--source")["cases"] >= 10


@pytest.mark.slow
def test_no_write_can_fail_anywhere_so_that_anything_is_lost() -> None:
    assert run("writers")["cases"] >= 500


@pytest.mark.slow
def test_a_thousand_kills_of_the_command_change_nothing() -> None:
    found = run("generate", "1000")
    assert found["kills"] == 1000 and found["inside"] >= 500
