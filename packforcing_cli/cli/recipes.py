"""packforcing recipes: the recipes that `packforcing train` runs; what one of them will take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from packforcing_cli.training.estimate import Estimate

SCHEMA = 1

app = typer.Typer(help="Look at, copy and check the recipes of train.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or a TOML file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a value of the recipe, for example train.steps=100."
    ),
]


@app.callback()
def _group() -> None:
    pass


@app.command("list")
def list_recipes(as_json: Json = False) -> None:
    """List the shipped recipes."""
    from packforcing_cli.cli import console
    from packforcing_cli.training import recipes

    entries = [_entry(name) for name in recipes.names()]
    if as_json:
        console.result_json({"schema": SCHEMA, "recipes": entries})
        return
    from rich.table import Table

    table = Table("recipe", "steps", "what it does", box=None)
    for entry in entries:
        table.add_row(entry["name"], f"{entry['steps']:,}", entry["title"])
    console.result_table(table)
    console.say("Read one: packforcing recipes show NAME. Change one: packforcing recipes copy NAME")


def _entry(name: str) -> dict[str, Any]:
    from packforcing_cli.training import recipes

    path = recipes.find(name)
    first = path.read_text("utf-8").splitlines()[0]
    recipe = recipes.load(name)
    return {
        "name": name,
        "kind": recipe.kind,
        "title": first.lstrip("# ").rstrip("."),
        "steps": recipe.train.steps,
        "file": str(path),
    }


@app.command()
def show(recipe: Name) -> None:
    """Print a recipe: its command, hardware, time, memory and expected loss stand on top."""
    from packforcing_cli.cli import console
    from packforcing_cli.training import recipes

    console.result(_text(recipes.find(recipe)).rstrip())


@app.command()
def copy(
    recipe: Name,
    to: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="New file. Default: ./RECIPE.toml.")
    ] = None,
) -> None:
    """Copy a recipe, to change it. Prints the new file's path."""
    from packforcing_cli import durable
    from packforcing_cli.cli import console
    from packforcing_cli.errors import UsageError
    from packforcing_cli.training import recipes

    source = recipes.find(recipe)
    text = _text(source)
    target = to or Path(source.name)
    if target.is_dir():
        target = target / source.name
    if target.suffix != ".toml":
        raise UsageError(f"{target} does not end with .toml", hint=f"For example {target.name}.toml.")
    try:
        with durable.replacing(target, overwrite=False) as part:
            part.write_text(text, "utf-8")
    except FileExistsError as error:
        raise UsageError(f"{target} exists", hint="Choose another file.") from error
    except OSError as error:
        raise durable.failure(error, target, kind=UsageError, hint="Choose another place.") from error
    console.say(f"Change it, then: packforcing recipes validate {target}")
    console.result(str(target))


def _text(path: Path) -> str:
    from packforcing_cli.errors import UsageError

    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


@app.command()
def validate(
    recipe: Name,
    settings: Settings = None,
    force: Annotated[bool, typer.Option("--force", help="Accept a context that inference leaves.")] = False,
    as_json: Json = False,
) -> None:
    """Check a recipe and say what it takes: parameters, memory, steps, and the context it trains and will be run in.

    Exit code 2 if the recipe is wrong or inference would leave the trained context, 5 if it does not fit in memory.
    """
    from packforcing_cli.cli import console
    from packforcing_cli.registry import resolve_device
    from packforcing_cli.training import recipes
    from packforcing_cli.training.estimate import estimate, would_fit

    chosen = recipes.load(recipe, settings or [])
    device = resolve_device("auto")
    found = estimate(chosen, device)
    if as_json:
        console.result_json({"schema": SCHEMA, "recipe": recipes.find(recipe).stem, **found.to_json()})
    else:
        console.result("\n".join(found.lines()))
    check(found, force=force)
    found.require_fit(would_fit(chosen, device) if found.is_too_large else ())


def check(found: Estimate, *, force: bool) -> None:
    """Refuse a context that inference leaves, or warn of it. Raises: UsageError."""
    from packforcing_cli.cli import console

    if not force:
        found.require_match()
    for mismatch in found.mismatches:
        console.warn(f"inference leaves what is trained: {mismatch}")
