"""Options of inspect-cache that draw a run: --plot and --html, and what they do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="DIR", help="Draw the run as PNG files in this folder.")
]
Html = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Draw the run as one HTML page that needs no network."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace plots and page if they exist.")]


def draw(
    folder: Path, *, plot: Path | None, html: Path | None, overwrite: bool, as_json: bool = False
) -> None:
    """Write what was asked for and print the files, one a line, or as JSON; what is not there is said.

    Raises: UsageError, RunFolderError, DiskFullError; before anything is written where that can be known.
    """
    from packforcing_cli.cli import console
    from packforcing_cli.report import page, plots, study

    if html is not None:
        page.check(html, overwrite=overwrite)
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
