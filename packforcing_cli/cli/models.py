"""packforcing models: what models there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from packforcing_cli.catalog import ModelFacts

SCHEMA = 1

app = typer.Typer(help="Look at the models packforcing knows.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command("list")
def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the models: those that generate, and the families that serve planning."""
    from packforcing_cli import catalog
    from packforcing_cli.cli import console

    models = catalog.all_models()
    if as_json:
        console.result_json({"schema": SCHEMA, "models": [_entry(facts) for facts in models]})
    else:
        console.result_table(_table(models))


def _entry(facts: ModelFacts) -> dict[str, Any]:
    from packforcing_cli import catalog

    return {
        "name": facts.name,
        "kind": facts.kind,
        "title": facts.title,
        "license": facts.license,
        "installed": catalog.is_installed(facts),
        "size": list(facts.default_size),
        "fps": facts.fps,
        "frames_per_block": facts.frames_per_block,
        "params": facts.params,
        "size_bytes": facts.size_bytes,
        "install": facts.install,
    }


def _table(models: tuple[ModelFacts, ...]) -> Any:
    from rich.table import Table

    from packforcing_cli import catalog
    from packforcing_cli.cli import console

    table = Table("model", "state", "size", "frames/block", "weights", "licence", "what it is", box=None)
    for facts in models:
        if facts.kind == "family":
            state = "for planning"
        else:
            state = "installed" if catalog.is_installed(facts) else "not installed"
        table.add_row(
            facts.name,
            state,
            facts.default_size_text,
            str(facts.frames_per_block),
            console.gb(facts.size_bytes),
            facts.license,
            facts.title,
        )
    return table


def _register() -> None:
    """The commands of this group that have files of their own."""
    from packforcing_cli.cli.convert import convert
    from packforcing_cli.cli.embed import embed

    app.command("convert")(convert)
    app.command("embed")(embed)


_register()
