"""The command line: one file a command, each with its signature, help, call and exit code.

`main` is the entry point. It turns every failure into one message and an exit code:

    PackforcingError    message and next step on stderr, the error's own code (errors.py)
    wrong usage         2, by Typer
    Ctrl-C              130
    anything else       one line on stderr, 1; the traceback only with -v or PACKFORCING_DEBUG=1

A command file may import typer and rich at the top, everything else inside function bodies: that is what keeps
`packforcing --help` fast and without torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

PROGRAM = "packforcing"
DEBUG_VARIABLE = "PACKFORCING_DEBUG"

COMMANDS = (
    # (name, module in this package, what it holds: a function = a command, a typer.Typer = a group of commands)
    ("generate", "generate", "generate"),
    ("extend", "extend", "extend"),
    ("resume", "resume", "resume"),
    ("runs", "runs", "app"),
    ("batch", "batch", "app"),
    ("train", "train", "train"),
    ("recipes", "recipes", "app"),
    ("data", "data", "app"),
    ("inspect-cache", "inspect_cache", "inspect_cache"),
    ("models", "models", "app"),
    ("doctor", "doctor", "doctor"),
    ("show", "show", "show"),
    ("bench", "bench", "app"),
    ("eval", "evaluate", "evaluate"),
)


def build_app() -> typer.Typer:
    """The Typer application with every command whose module is there."""
    app = typer.Typer(
        name=PROGRAM,
        help="Make long videos from text on one GPU, with a memory that does not grow.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name, module_name, attribute in COMMANDS:
        if importlib.util.find_spec(f"{__name__}.{module_name}") is None:
            continue
        command = getattr(importlib.import_module(f"{__name__}.{module_name}"), attribute)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        from packforcing_cli import __version__

        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code.

    Args:
        arguments: without the program's name; None = sys.argv.
    """
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # nothing phones home, whichever library is loaded later
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str]) -> int:
    from packforcing_cli.cli import console
    from packforcing_cli.errors import PackforcingError

    # Read by huggingface_hub when it is imported, also by the libraries that import it by themselves.
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    debug = wants_traceback(arguments)
    try:
        code = build_app()(args=_join_at(arguments), prog_name=PROGRAM, standalone_mode=True)
    except SystemExit as stop:
        code = stop.code
    except PackforcingError as error:
        console.report(error, debug=debug)
        return error.exit_code
    except KeyboardInterrupt:
        console.say("Interrupted.")
        return 130
    except BrokenPipeError:
        # The reader of stdout is gone, as in `packforcing models list | head -1`; keep the interpreter from telling.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # the last line of defence: no traceback for people who did not ask for one
        console.report_unexpected(error, debug=debug)
        return 1
    return code if isinstance(code, int) else 0


def _join_at(arguments: Sequence[str]) -> list[str]:
    """`--at TIME PROMPT` as one value "TIME PROMPT": Typer has no repeated option of two values in all versions."""
    joined: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        joined.append(word)
        if word == "--":
            return joined + rest
        if word == "--at" and rest:
            value = rest.pop(0)
            if (
                rest
                and not value.startswith("--")
                and not rest[0].startswith("--")
                and " " not in value.strip()
            ):
                value = f"{value} {rest.pop(0)}"
            joined.append(value)
    return joined


def wants_traceback(arguments: Sequence[str]) -> bool:
    """Whether the user asked to see tracebacks: -v or --verbose before any "--", or PACKFORCING_DEBUG."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    variable = os.environ.get(DEBUG_VARIABLE, "")
    return variable not in ("", "0") or any(option in ("-v", "--verbose") for option in options)
