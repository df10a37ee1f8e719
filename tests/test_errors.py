"""The error tree: messages, hints and exit codes; what the command line does with them."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from packforcing_cli import cli, errors

EXIT_CODES = {
    "PackforcingError": 1,
    "UsageError": 2,
    "ConfigError": 2,
    "LayoutError": 2,
    "EnvironmentProblem": 4,
    "MemoryFitError": 5,
    "DiskFullError": 6,
    "WeightsError": 7,
    "OfflineError": 8,
    "LockedError": 9,
    "GenerationError": 1,
    "UnhealthyError": 1,
    "RunFolderError": 1,
    "VideoError": 1,
}


def all_errors() -> list[type[errors.PackforcingError]]:
    kinds: list[type[errors.PackforcingError]] = [errors.PackforcingError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    return [kind for kind in kinds if kind.__module__ == errors.__name__]


def test_every_error_has_its_exit_code_and_is_drawn_in_the_docstring() -> None:
    assert {kind.__name__: kind.exit_code for kind in all_errors()} == EXIT_CODES
    assert errors.__doc__
    for name, code in EXIT_CODES.items():
        drawn = next(line for line in errors.__doc__.splitlines() if f" {name} " in f" {line} ")
        assert drawn.split(name)[1].split()[0] == str(code)


@pytest.mark.parametrize("kind", all_errors())
def test_an_error_survives_pickling_with_its_hint(kind: type[errors.PackforcingError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("it broke", hint="mend it")))
    assert (type(copy), copy.message, copy.hint, str(copy)) == (kind, "it broke", "mend it", "it broke")


def an_app_that_raises(error: BaseException) -> Callable[[], typer.Typer]:
    def build() -> typer.Typer:
        app = typer.Typer(pretty_exceptions_enable=False)

        @app.command()
        def fail(verbose: bool = typer.Option(False, "--verbose", "-v")) -> None:
            raise error

        return app

    return build


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            errors.MemoryFitError("12 GB [needed]", hint="Try --bank 32."),
            5,
            "error: 12 GB [needed]\n  → Try --bank 32.\n",
        ),
        (errors.VideoError("no video"), 1, "error: no video\n"),
        (
            ValueError("odd\nvalue"),
            1,
            "unexpected error: ValueError: odd value (set PACKFORCING_DEBUG=1 to see where)\n",
        ),
        (KeyboardInterrupt(), 130, ""),
        (
            MemoryError(),
            1,
            "unexpected error: MemoryError: no message (set PACKFORCING_DEBUG=1 to see where)\n",
        ),
    ],
)
def test_a_failure_is_one_message_and_an_exit_code(
    error: BaseException, code: int, said: str, run_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "build_app", an_app_that_raises(error))
    result = run_command()
    assert (result.code, result.out, result.err) == (code, "", said)


@pytest.mark.parametrize("way", ["flag", "variable"])
def test_tracebacks_show_only_when_asked_for(
    way: str, run_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "build_app", an_app_that_raises(ValueError("odd")))
    assert "Traceback" not in run_command().err
    if way == "variable":
        monkeypatch.setenv("PACKFORCING_DEBUG", "1")
    result = run_command(*(["-v"] if way == "flag" else []))
    assert result.code == 1
    assert "Traceback (most recent call last)" in result.err
    assert "unexpected error: ValueError: odd\n" in result.err


def test_a_prompt_that_looks_like_a_flag_does_not_ask_for_tracebacks() -> None:
    assert not cli.wants_traceback(["generate", "--", "-v"])
    assert cli.wants_traceback(["generate", "-v"])


def test_no_hint_sends_a_person_to_a_package_index_for_the_program_itself() -> None:
    """It is installed from a checkout; what a person is told to do must work."""
    for path in sorted(Path(errors.__file__).parent.rglob("*")):
        if path.suffix in (".py", ".toml"):
            text = path.read_text("utf-8")
            assert not re.search(r"pip install[^\"']* packforcing|pypi\.org", text), path
            if path.suffix == ".py" and path.name != "errors.py":
                assert errors.REINSTALL not in text, f"{path}: use errors.REINSTALL"
