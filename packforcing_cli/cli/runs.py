"""packforcing runs: the run folders that are kept, and the room they take."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from packforcing_cli.config import SourceVideo
    from packforcing_cli.runfolder import Run

SCHEMA = 1

app = typer.Typer(help="Look after run folders: what resume and extend need.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")]


@app.callback()
def _group() -> None:
    pass


@app.command("list")
def list_runs(as_json: AsJson = False) -> None:
    """List the runs, oldest first."""
    from packforcing_cli import runfolder
    from packforcing_cli.cli import console

    runs = runfolder.all_runs()
    if as_json:
        console.result_json({"schema": SCHEMA, "runs": [_entry(run) for run in runs]})
        return
    from rich.table import Table

    table = Table("run", "status", "blocks", "age", "disk", "video", box=None)
    for run in runs:
        video = run.record.output if run.record else run.problem
        table.add_row(run.name, run.status, _blocks(run), _age(run), console.gb(run.size_bytes), video)
    if runs:
        console.result_table(table)
    total = console.gb(sum(run.size_bytes for run in runs))
    console.say(f"{len(runs)} runs, {total}, in {runfolder.default_root()}")


@app.command()
def show(
    run: Annotated[str, typer.Argument(help="A run's id or the beginning of it, its folder or its video.")],
    as_json: AsJson = False,
) -> None:
    """Show what a run was asked for, how far it is, and what it depends on."""
    from packforcing_cli import runfolder
    from packforcing_cli.cli import console
    from packforcing_cli.cli.resume import find_run

    found = runfolder.look(find_run(run))
    record = found.record or runfolder.read(found.folder)  # raises what is wrong with it
    if as_json:
        console.result_json({**_entry(found), "record": record.model_dump(mode="json", by_alias=True)})
        return
    values = {
        "run": record.id,
        "status": found.status,
        "prompt": record.prompt,
        "seed": str(record.request.get("seed")),
        "blocks": _blocks(found),
        "video": record.output,
        "made": f"{record.created:%Y-%m-%d %H:%M} UTC by packforcing {record.version}",
        "model": record.model,
        "parent": record.parent or "none",
        **({} if record.source is None else {"source": _source(record.source)}),
        "numerics": ", ".join(
            f"{name} {value}" for name, value in record.numerics.items() if value is not None
        ),
        "folder": str(found.folder),
        "disk": console.gb(found.size_bytes),
        "go on": f"packforcing {'extend' if found.status == 'finished' else 'resume'} {record.id}"
        + (" --seconds 10" if found.status == "finished" else ""),
    }
    for name, value in values.items():
        console.result(f"{name:<10}{value}")


@app.command()
def remove(
    runs: Annotated[list[str], typer.Argument(help="Ids or folders.")],
    yes: Yes = False,
) -> None:
    """Remove runs; their videos stay."""
    from packforcing_cli import runfolder
    from packforcing_cli.cli.resume import find_run

    _remove([runfolder.look(find_run(name)) for name in runs], yes=yes)


@app.command()
def prune(
    older_than: Annotated[
        str | None,
        typer.Option("--older-than", metavar="AGE", help="Not written to for 30d, 12h, 90m or 2w."),
    ] = None,
    finished: Annotated[bool, typer.Option("--finished", help="Only those whose video is finished.")] = False,
    yes: Yes = False,
) -> None:
    """Remove many runs at once: old ones, finished ones, or finished ones that are old. Videos stay."""
    from packforcing_cli import runfolder
    from packforcing_cli.errors import UsageError

    if older_than is None and not finished:
        raise UsageError("say what to remove", hint="For example packforcing runs prune --older-than 30d")
    limit = _age_seconds(older_than) if older_than is not None else 0.0
    runfolder.remove_leftovers()
    now = datetime.now(UTC)
    _remove(
        [
            run
            for run in runfolder.all_runs()
            if not run.is_live
            and (now - run.changed).total_seconds() >= limit
            and (not finished or run.status == "finished")
        ],
        yes=yes,
    )


def _remove(runs: list[Run], *, yes: bool) -> None:
    import sys

    from packforcing_cli import runfolder
    from packforcing_cli.cli import console
    from packforcing_cli.errors import UsageError

    if not runs:
        console.say("Nothing to remove.")
        return
    for run in runs:
        console.say(f"{run.name}  {run.status}, {_blocks(run)} blocks, {console.gb(run.size_bytes)}")
    unfinished = sum(run.status in ("interrupted", "stopped") for run in runs)
    more = f" {unfinished} of them could still be resumed." if unfinished else ""
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("there is nobody to ask whether to remove them", hint="Pass --yes.")
        typer.confirm(f"Remove {len(runs)} runs?{more}", abort=True, err=True)
    for run in runs:
        runfolder.remove(run)
    console.say(f"Removed {len(runs)} runs, {console.gb(sum(run.size_bytes for run in runs))}.")


def _entry(run: Run) -> dict[str, Any]:
    record = run.record
    return {
        "id": run.name,
        "status": run.status,
        "blocks": run.blocks,
        "blocks_wanted": record.blocks if record else None,
        "prompt": record.prompt if record else None,
        "model": record.model if record else None,
        "created": record.created.isoformat() if record else None,
        "changed": run.changed.isoformat(),
        "size_bytes": run.size_bytes,
        "video": record.output if record else None,
        "parent": record.parent if record else None,
        "source": str(record.source.path) if record and record.source else None,
        "folder": str(run.folder),
        "problem": run.problem,
    }


def _source(source: SourceVideo) -> str:
    """The video that a run goes on with, and how much of it: phone.mp4, 3 blocks, from 0:20 to 1:05."""
    words = [f"{source.path}, {source.blocks} block{'' if source.blocks == 1 else 's'}"]
    words += [f"from {source.from_time}"] if source.from_time else []
    words += [f"to {source.to_time}"] if source.to_time else []
    words += ["not in the video"] if source.only_new else []
    return ", ".join(words)


def _blocks(run: Run) -> str:
    return f"{run.blocks}/{run.record.blocks}" if run.record else str(run.blocks)


def _age(run: Run) -> str:
    """Time since something was written, in its largest unit."""
    seconds = max(0.0, (datetime.now(UTC) - run.changed).total_seconds())
    for unit, scale in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= scale:
            return f"{int(seconds // scale)} {unit}"
    return f"{int(seconds)} s"


def _age_seconds(text: str) -> float:
    from packforcing_cli.errors import UsageError

    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)([mhdw])", text.strip().lower(), re.ASCII)
    if match is None:
        raise UsageError(f"--older-than {text}: is not an age", hint="For example 30d, 12h, 90m or 2w.")
    return float(match[1]) * {"m": 60, "h": 3600, "d": 86400, "w": 604800}[match[2]]
