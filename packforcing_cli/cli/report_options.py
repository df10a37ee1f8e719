"""Options of inspect-cache that draw a run: --plot and --html, and what they do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

PANEL = "Draw a run"

Html = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE",
        rich_help_panel=PANEL,
        help="As one page: what was remembered, recalled, and what it cost. Needs no network.",
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot", metavar="DIR", rich_help_panel=PANEL, help="As PNG files in this folder, which is made."
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", rich_help_panel=PANEL, help="Replace the page and plots that exist.")
]


def question(html: Path | None, plot: Path | None, *, overwrite: bool) -> dict[str, Any]:
    """Drawing as one question about a run, whichever of the two is wanted, or both.

    Raises: UsageError if nothing is drawn that could replace something.
    """
    from packforcing_cli.errors import UsageError

    if overwrite and html is None and plot is None:
        raise UsageError("--overwrite is for --html and --plot", hint="Leave it away, or say what to draw.")
    return {"plot": plot} if html is None else {"html": html}


def draw(
    folder: Path, *, plot: Path | None, html: Path | None, overwrite: bool, as_json: bool = False
) -> None:
    """Write what was asked for and print the files, one a line, or as JSON; what is not there is said.

    Raises: UsageError, RunFolderError, DiskFullError; before anything is written where that can be known.
    """
    from packforcing_cli.cli import console
    from packforcing_cli.report import page, plots, study

    if html is not None:
        page.check(html, overwrite=overwrite, run=folder)
    if plot is not None:
        plots.check(plot, overwrite=overwrite)
    found = study.collect(folder)
    for note in found.notes:
        console.warn(note)
    written = [] if plot is None else plots.write(found, plot, overwrite=overwrite)
    if html is not None:
        page.write(found, html, overwrite=overwrite)
    if as_json:
        console.result_json(
            {
                "schema": 1,
                "run": found.run.id,
                "blocks": found.blocks,
                "complete": found.is_complete,
                "html": None if html is None else str(html),
                "plots": [str(path) for path in written],
                "notes": list(found.notes),
            }
        )
        return
    for path in (*written, *([] if html is None else [html])):
        console.result(str(path))
