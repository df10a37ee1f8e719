"""completions/ is what the command tree of this version renders, and the shells can read it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from packforcing_cli.cli import completions

FOLDER = Path(__file__).parent.parent / "completions"
AGAIN = "run: python -m packforcing_cli.cli.completions"


def test_the_files_are_a_fresh_rendering() -> None:
    fresh = completions.render(completions.tree())
    assert sorted(fresh) == sorted(path.name for path in FOLDER.iterdir()), AGAIN
    for name, text in fresh.items():
        assert (FOLDER / name).read_text("utf-8") == text, f"{name} is stale; {AGAIN}"


@pytest.mark.parametrize(
    ("shell", "file"), [("bash", "packforcing.bash"), ("zsh", "_packforcing"), ("fish", "packforcing.fish")]
)
def test_the_shell_can_parse_its_file(shell: str, file: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([shell, "-n", FOLDER / file], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["packforcing", "insp"], ["inspect-cache"]),
        (["packforcing", "models", "l"], ["list"]),
        (["packforcing", "inspect-cache", "--mid"], ["--mid-span"]),
        (["packforcing", "inspect-cache", "--policy", "w"], ["window"]),
        (["packforcing", "inspect-cache", "--size", ""], []),
    ],
)
def test_bash_completes_commands_options_and_values(words: list[str], expected: list[str]) -> None:
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    quoted = " ".join(f"'{word}'" for word in words)
    script = (
        f"source '{FOLDER / 'packforcing.bash'}'; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1};"
        ' COMPREPLY=(); _packforcing; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert done.stdout.split() == expected
