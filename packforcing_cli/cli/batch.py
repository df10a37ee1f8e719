"""packforcing batch MANIFEST: many videos, each exactly once; and what looks after such a folder."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from packforcing_cli.batch import Engine, Folder, State
    from packforcing_cli.ledger import Entry, Ledger, Row
    from packforcing_cli.manifest import Line

SCHEMA = 1
JOBS_PANEL = "Every job that does not say otherwise"
WORK_PANEL = "Workers"
CLUSTER_PANEL = "More than one machine"
FOLDER_PANEL = "Output"
SHOWN_FAILURES = 20
PLAIN_EVERY_SECONDS = 5.0


class _RunByDefault(TyperGroup):
    """A group whose command `run` need not be named: what is no command's name is its first argument."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        asks = ctx.help_option_names
        if args and args[0] not in self.commands and args[0] not in asks:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunByDefault,
    help="Make many videos, each exactly once: packforcing batch MANIFEST.",
    no_args_is_help=True,
    epilog="packforcing batch MANIFEST is packforcing batch run MANIFEST: see packforcing batch run --help.",
)

FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a batch.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Jobs = Annotated[
    list[str] | None,
    typer.Option(
        "--job",
        metavar="JOB",
        help="A job's number, file or beginning of its id; repeatable.",
        show_default=False,
    ),
]


@app.command()
def run(
    manifest: Annotated[
        str,
        typer.Argument(
            metavar="MANIFEST", help='JSON Lines, CSV or a prompt a line; "-" reads it from standard input.'
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="DIR",
            rich_help_panel=FOLDER_PANEL,
            help="Folder of the videos; also with a template behind it: videos/{index:04d}-{slug}-{seed}.mp4."
            " Default: named after the manifest.",
        ),
    ] = None,
    kind: Annotated[
        str, typer.Option("--format", metavar="NAME", help="auto (by the ending), jsonl, csv or text.")
    ] = "auto",
    model: Annotated[
        str | None,
        typer.Option(
            "--model", rich_help_panel=JOBS_PANEL, help="As in generate; auto is decided once for all jobs."
        ),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", rich_help_panel=JOBS_PANEL, help="Length. Default 10.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size", metavar="WxH", rich_help_panel=JOBS_PANEL, help="Pixels. Default: the model's own."
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="NAME", rich_help_panel=JOBS_PANEL, help="auto, cpu or cuda."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            rich_help_panel=JOBS_PANEL,
            help="Any other key of a line; repeatable: --set crf=23.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            rich_help_panel=JOBS_PANEL,
            help="The seeds of lines without one come from it, each another. Default 0.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            max=1024,
            rich_help_panel=WORK_PANEL,
            help="Processes, each with its own model. Default: one for each GPU, or one.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            min=1,
            max=4096,
            rich_help_panel=WORK_PANEL,
            help="CPU threads of a worker; fixed for a folder, as results may depend on it. Default: all cores shared.",
        ),
    ] = None,
    engine_name: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="NAME",
            rich_help_panel=CLUSTER_PANEL,
            help="local: processes here; ray: actors of a Ray cluster, --out on storage all machines share.",
        ),
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="ADDRESS",
            rich_help_panel=CLUSTER_PANEL,
            help="Of the cluster: auto, HOST:PORT or ray://HOST:PORT. Default: one is started on this machine.",
        ),
    ] = None,
    cpus: Annotated[
        float | None,
        typer.Option(
            "--cpus-per-worker",
            min=0.1,
            rich_help_panel=CLUSTER_PANEL,
            help="CPU cores of an actor. Default: a GPU each, or one core where there is none.",
        ),
    ] = None,
    ship: Annotated[
        bool,
        typer.Option(
            "--ship-models",
            rich_help_panel=CLUSTER_PANEL,
            help="Send models as bundles to machines that lack them; else they must be installed there.",
        ),
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            min=0.001,
            rich_help_panel=WORK_PANEL,
            help="Seconds after which a job fails; kept so far.",
        ),
    ] = None,
    retries: Annotated[
        int,
        typer.Option(
            "--retries",
            min=0,
            max=100,
            rich_help_panel=WORK_PANEL,
            help="How often a job is tried again after what may pass: memory ran out, a locked file, a disk's error.",
        ),
    ] = 2,
    auto_fit: Annotated[
        bool,
        typer.Option(
            "--auto-fit",
            rich_help_panel=WORK_PANEL,
            help="Where memory does not suffice, or runs out, take the next smaller plan, and say so.",
        ),
    ] = False,
    max_failures: Annotated[
        int | None,
        typer.Option(
            "--max-failures",
            min=1,
            rich_help_panel=WORK_PANEL,
            help="Begin no more jobs after so many failed. Default: go on.",
        ),
    ] = None,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed", rich_help_panel=WORK_PANEL, help="Try the jobs again that failed before."
        ),
    ] = False,
    add: Annotated[
        bool,
        typer.Option(
            "--add", rich_help_panel=FOLDER_PANEL, help="Put these jobs beside those of another manifest."
        ),
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="I/N",
            rich_help_panel=CLUSTER_PANEL,
            help="Only every N-th job from the I-th on: one such command on each of N machines.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the manifest, list the files; make nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a summary as JSON instead of the paths.")
    ] = False,
    progress: Annotated[str, typer.Option("--progress", help="auto, rich, plain, json or none.")] = "auto",
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but errors.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Say more; show tracebacks.")] = False,
) -> None:
    """Make the videos of a manifest. Prints their paths.

    The same command again goes on: what is done is checked by its hash and skipped, what is half done is resumed,
    what failed waits for --retry-failed. Several of them may work on one folder at once.

    Example: packforcing batch prompts.txt --seconds 5 --out videos

    Exit codes: 0 all done, 3 some not, 2 the manifest or an option is wrong and nothing was started, 6 disk full,
    9 locked, 130 interrupted, 143 terminated. Ctrl-C once ends after the blocks at hand, twice at once.
    """
    from packforcing_cli import batch, batch_plan
    from packforcing_cli import manifest as manifests
    from packforcing_cli.errors import PackforcingError
    from packforcing_cli.tasks import Options

    shown = choose(progress, quiet=quiet)
    try:
        is_ray = _is_ray(engine_name, address, cpus, ship=ship)
        part = None if shard is None else batch.parse_shard(shard)
        place, template = _place(out, manifest)
        name, data = _read(manifest)
        defaults = _defaults(settings, model=model, seconds=seconds, size=size, device=device, seed=seed)
        base_seed = _base_seed(defaults.pop("seed", 0))
        kind = manifests.kind_of(manifest, data, wanted=kind)
        lines = _with_models(manifests.parse(data, source=name, kind=kind, defaults=defaults), place)
        entries, notes = batch_plan.plan_jobs(
            lines,
            template=template,
            seed=base_seed,
            source=name,
            there=batch.Folder.rows_of(place, shard=part),
            root=place,
        )
        entries = batch.of_shard(entries, part)
        if dry_run:
            _show_plan(entries, notes, shown, as_json=as_json)
            return
        gpus = [] if is_ray else _gpus(lines)
        count = workers or max(1, len(gpus))
        folder = batch.Folder.open(place, shard=part)
        with folder.ledger as base:
            added = folder.add(entries, source=name, add=add)
            for note in notes:
                shown.warn(note)
            if added.changed:
                shown.warn(f"the inputs of {_count(len(added.changed), 'job')} have changed: made anew")
            for note in folder.check_done():
                shown.warn(note)
            if retry_failed:
                base.retry()
            base.set_meta("paused", None)
            usual = max(1, int(cpus or 1)) if is_ray else None  # an actor's share, not the driver's machine
            fixed = batch.threads_of(folder, count, threads, usual=usual)
            how = Options(timeout=timeout, retries=retries, auto_fit=auto_fit)
            engine: Engine
            if is_ray:
                from packforcing_cli import ray_engine

                engine = ray_engine.Ray(
                    folder,
                    how,
                    address=address,
                    cpus=cpus,
                    workers=workers,
                    threads=fixed,
                    ship={
                        entry.spec["request"]["model"]: entry.spec["model"]
                        for entry in entries
                        if ship and entry.problem is None
                    },
                    max_failures=max_failures,
                )
            else:
                from packforcing_cli import local_engine

                engine = local_engine.Local(
                    folder,
                    how,
                    workers=count,
                    gpus=gpus if count > 1 else (),
                    threads=fixed,
                    max_failures=max_failures,
                )
            shown.begin(folder, engine, entries, workers if is_ray else count, fixed)
            code = _drive(engine, shown)
            rows = base.rows()
            code = code or (engine.problem.exit_code if engine.problem else _code(base, rows))
            shown.end(folder, rows, engine, code)
            _print(folder, rows, engine, code, as_json=as_json)
            if engine.problem is not None:
                raise engine.problem
    except PackforcingError as error:
        if shown.error(error):
            raise typer.Exit(error.exit_code) from error
        raise
    if code:
        raise typer.Exit(code)


@app.command()
def schema() -> None:
    """Print the JSON schema of a line of a manifest."""
    from packforcing_cli import manifest
    from packforcing_cli.cli import console

    console.result_json(manifest.json_schema())


@app.command()
def status(folder: FolderArgument, as_json: Json = False) -> None:
    """Say how the batch of a folder stands: what is done, at work, failed and why. Changes nothing."""
    from packforcing_cli import ledger
    from packforcing_cli.cli import console

    known: list[Row] = []
    at_work = set()
    paused = None
    with _ledgers(folder) as opened:
        for base in opened:
            known += base.rows()
            paused = paused or base.meta("paused")
            at_work |= base.holders()
    known.sort(key=lambda row: row.position)
    gone = {holder for holder in at_work if not ledger.is_alive(holder)}
    if as_json:
        console.result_json(
            {
                **_summary(folder.absolute(), known, why=paused or ""),
                "jobs": [_job(folder.absolute(), row) for row in known],
            }
        )
        return
    counts = _counts(known)
    console.result(_counted(counts) + (f"; paused: {paused}" if paused else ""))
    for row in known:
        if row.status == "started":
            more = (
                " (its process is gone: run the batch again)"
                if row.holder in gone
                else f" by {_who(row.holder)}"
            )
            console.result(
                f"at work: {row.position} {row.shown}, {row.blocks} of {row.total or '?'} blocks{more}"
            )
    if counts["failed"]:
        console.result_table(_failures(known))


@app.command()
def retry(
    folder: FolderArgument,
    jobs: Jobs = None,
    lost: Annotated[
        bool, typer.Option("--lost", help="Also jobs held by processes of other machines: they are gone.")
    ] = False,
) -> None:
    """Queue failed jobs again, or those named with --job, cancelled ones too. Makes nothing: run the batch for that."""
    from packforcing_cli.cli import console

    count = 0
    with _ledgers(folder) as opened:
        for base, chosen in _chosen(opened, jobs):
            count += base.retry(chosen, lost=lost)
    console.say(f"{_count(count, 'job')} queued again." + (" Run the batch to make them." if count else ""))


@app.command()
def cancel(folder: FolderArgument, jobs: Jobs = None) -> None:
    """Cancel jobs that are queued, and end those at work after their block: all, or those named with --job."""
    from packforcing_cli.cli import console

    cancelled = asked = 0
    with _ledgers(folder) as opened:
        for base, chosen in _chosen(opened, jobs):
            now, later = base.cancel(chosen)
            cancelled, asked = cancelled + now, asked + later
    ends = f", {asked} at work will end after the block" if asked else ""
    console.say(f"{_count(cancelled, 'job')} cancelled{ends}.")


def _is_ray(engine: str, address: str | None, cpus: float | None, *, ship: bool) -> bool:
    """Whether Ray does the work. Raises: UsageError for options that do not go together."""
    import difflib

    from packforcing_cli.errors import UsageError

    if engine not in ("local", "ray"):
        near = difflib.get_close_matches(engine, ("local", "ray"), n=1)
        raise UsageError(
            f"--engine {engine}: must be local or ray" + (f"; did you mean {near[0]}?" if near else "")
        )
    given = [
        name
        for name, value in (("--address", address), ("--cpus-per-worker", cpus), ("--ship-models", ship))
        if value
    ]
    if engine == "local" and given:
        raise UsageError(f"{given[0]} is for --engine ray", hint="Add --engine ray, or leave it away.")
    if address is not None:
        from packforcing_cli.ray_engine import parse_address

        parse_address(address)
    return engine == "ray"


# -- before ---------------------------------------------------------------------------------------------------------


def _place(out: str | None, manifest: str) -> tuple[Path, Any]:
    """The folder, and how files in it are called. Raises: UsageError."""
    from packforcing_cli import batch_plan
    from packforcing_cli.errors import UsageError

    if out is None:
        if manifest == "-":
            raise UsageError("a manifest from standard input needs --out", hint="For example --out videos.")
        stem = Path(manifest).name.removesuffix(Path(manifest).suffix)
        return Path(f"{stem}-videos"), batch_plan.Template()
    if "\0" in out or not out.strip():
        raise UsageError("--out is empty", hint="For example --out videos.")
    head, brace, _ = out.partition("{")
    if not brace:
        if Path(out).is_file():
            raise UsageError(f"--out {out} is a file", hint="Give a folder.")
        if Path(out).suffix.lower() in batch_plan.CONTAINERS and not Path(out).is_dir():
            raise UsageError(
                f"--out {out}: must be a folder; there are many videos",
                hint=f"Name them with a template, --out '{Path(out).with_suffix('')}-{{index}}{Path(out).suffix}',"
                " or one line with its output.",
            )
        return Path(out), batch_plan.Template()
    folder = head.rpartition("/")[0] if "/" in head else ""
    folder = "/" if not folder and head.startswith("/") else folder
    return Path(folder or "."), batch_plan.Template(out[len(folder) :].lstrip("/"))


def _read(manifest: str) -> tuple[str, bytes]:
    """The manifest's name and bytes. Raises: UsageError."""
    from packforcing_cli.errors import UsageError

    if manifest == "-":
        return "standard input", sys.stdin.buffer.read()
    try:
        return manifest, Path(manifest).read_bytes()
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"the manifest {manifest} cannot be read: {said}",
            hint="Give a file, - for standard input, or one of schema, status, retry, cancel.",
        ) from error


def _defaults(settings: list[str] | None, **flags: Any) -> dict[str, Any]:
    """Keys for lines that do not say otherwise: flags, then PACKFORCING_* variables and settings files.

    Raises: UsageError.
    """
    import difflib

    from packforcing_cli import config, manifest
    from packforcing_cli.cli.settings import gather
    from packforcing_cli.errors import UsageError

    given = dict(flags)
    known = (*manifest.GENERATE_KEYS, *manifest.EXTEND_KEYS)
    extra = {}
    for text in settings or ():
        key, equals, value = text.partition("=")
        name = key.strip().replace("-", "_")
        if not equals or name not in known or name in ("prompt", "source", "output", "title", "seed"):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UsageError(
                f"--set {text}: must be KEY=VALUE with a key of a line"
                + (f"; the nearest is {near}" if equals else ""),
                hint="For example --set crf=23; packforcing batch schema lists the keys.",
            )
        if name in ("at", "pin", "pin_image", "lora") and value.lstrip().startswith("["):
            with contextlib.suppress(ValueError):
                extra[name] = json.loads(value)
                continue
        if name in config.SETTINGS:
            given[name] = value
        else:
            extra[name] = value
    found = dict(gather(given).values)
    size = found.get("size")
    if isinstance(size, tuple):
        found["size"] = list(size)
    return {**found, **extra}


def _base_seed(value: object) -> int:
    """What seeds of lines without one come from; a variable or a file may say it, too. Raises: ConfigError."""
    from packforcing_cli.config import GenerateRequest

    return GenerateRequest(prompt="x", seed=value).seed or 0


def _with_models(lines: Sequence[Line], folder: Path) -> list[Line]:
    """The lines with models decided: `auto` once for all that have it; a bundle is installed.

    A bundle that cannot be, or a device that is not there, is the problem of its lines.
    Raises: for `auto`, as `choose.resolve_model`; EnvironmentProblem if no line has a device that is there.
    """
    from dataclasses import replace

    from packforcing_cli.cli import choose
    from packforcing_cli.config import GenerateRequest
    from packforcing_cli.errors import DiskFullError, EnvironmentProblem, PackforcingError, UsageError

    chosen: dict[str, str] = {}
    failed: dict[str, PackforcingError] = {}
    found = []
    for line in lines:
        request = line.request
        name = request.model or choose.AUTO
        if name == choose.AUTO or name.endswith(".tar"):
            if name not in chosen and name not in failed:
                asked = (
                    request
                    if isinstance(request, GenerateRequest)
                    else GenerateRequest(prompt="x", model=name)
                )
                try:
                    chosen[name] = choose.resolve_model(asked, folder.absolute())[0].model
                except EnvironmentProblem as error:  # of the line's device: others may do without it
                    found.append(replace(line, problem=error))
                    continue
                except PackforcingError as error:
                    if name == choose.AUTO or isinstance(error, DiskFullError):
                        raise
                    failed[name] = error
                except (OSError, RuntimeError, ValueError) as error:
                    failed[name] = UsageError(f"the bundle {name} cannot be installed: {error}")
            if name in failed:
                found.append(replace(line, problem=failed[name]))
                continue
            request = request.model_copy(update={"model": chosen[name]})
        found.append(replace(line, request=request))
    errors = [line.problem for line in found if isinstance(line.problem, EnvironmentProblem)]
    if errors and len(errors) == len(found):
        raise errors[0]
    return found


def _gpus(lines: Sequence[Line]) -> list[str]:
    """GPUs that workers share, one each; none if every job asks for the CPU."""
    from packforcing_cli import local_engine

    if all(line.request.device == "cpu" for line in lines):
        return []
    return local_engine.visible_gpus()


def _show_plan(entries: Sequence[Entry], notes: Sequence[str], shown: Display, *, as_json: bool) -> None:
    """What --dry-run prints, on stdout."""
    from packforcing_cli.cli import console

    for note in notes:
        shown.warn(note)
    if as_json:
        console.result_json(
            {
                "schema": SCHEMA,
                "jobs": [
                    {
                        "id": entry.id,
                        "line": entry.line,
                        "output": entry.output,
                        "seed": entry.spec["request"].get("seed"),
                        "problem": None if entry.problem is None else entry.problem.message,
                    }
                    for entry in entries
                ],
            }
        )
        return
    for entry in entries:
        console.result(entry.output)
        if entry.problem is not None:
            shown.warn(f"line {entry.line}: {entry.problem.message}")
    shown.note(f"{_count(len(entries), 'job')}; nothing was made.")


# -- while it runs --------------------------------------------------------------------------------------------------


def _drive(engine: Engine, shown: Display) -> int:
    """Run an engine until its end; Ctrl-C once ends after the blocks at hand, twice at once. Returns: 130, 143 or 0."""
    code = 0

    def caught(number: int, _frame: FrameType | None) -> None:
        nonlocal code
        if code:
            raise KeyboardInterrupt
        code = 128 + number
        shown.stopping("Stopping after the blocks at hand; Ctrl-C once more stops at once.")

    before = {number: signal.signal(number, caught) for number in (signal.SIGINT, signal.SIGTERM)}
    told = False
    try:
        for state in engine.run():
            for note in state.notes:
                shown.warn(note)
            shown.state(state)
            if code and not told:
                told = True
                engine.stop("interrupted")
    except KeyboardInterrupt:
        pass
    finally:
        engine.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
        shown.stop()
    return code


def _code(base: Ledger, rows: Sequence[Row]) -> int:
    """The exit code of a batch that came to its end."""
    if base.meta("paused") is not None:
        return 6
    return 0 if all(row.status == "done" for row in rows) else 3


# -- afterwards -----------------------------------------------------------------------------------------------------


def _print(folder: Folder, rows: Sequence[Row], engine: Engine, code: int, *, as_json: bool) -> None:
    from packforcing_cli.cli import console

    if as_json:
        more = {"failures": [_job(folder.path, row) for row in rows if row.status in ("failed", "cancelled")]}
        done = [_job(folder.path, row) for row in rows if row.status == "done"]
        console.result_json(
            {**_summary(folder.path, rows, why=engine.why), "exit_code": code, **more, "videos": done}
        )
        return
    for row in rows:
        if row.status == "done":
            console.result(str(folder.path / row.output))


def _summary(folder: Path, rows: Sequence[Row], *, why: str) -> dict[str, Any]:
    made = [row.result for row in rows if row.status == "done"]
    return {
        "schema": SCHEMA,
        "folder": str(folder),
        "counts": _counts(rows),
        "frames": sum(result["frames"] for result in made),
        "video_seconds": round(sum(result["frames"] / result["fps"] for result in made), 3),
        "stopped": why,
    }


def _job(folder: Path, row: Row) -> dict[str, Any]:
    return {
        "id": row.id,
        "line": row.line,
        "status": row.status,
        "path": str(folder / row.output),
        "attempt": row.attempt,
        "blocks": row.blocks,
        "total_blocks": row.total,
        "error": row.error if row.status == "failed" else None,
        "result": row.result if row.status == "done" else None,
    }


def _counts(rows: Sequence[Row]) -> dict[str, int]:
    from packforcing_cli.ledger import STATUSES

    return {status: sum(row.status == status for row in rows) for status in STATUSES}


def _counted(counts: Mapping[str, int]) -> str:
    words = {
        "done": "done",
        "started": "at work",
        "queued": "queued",
        "failed": "failed",
        "cancelled": "cancelled",
    }
    said = [
        f"{counts[status]} {word}" for status, word in words.items() if counts[status] or status == "done"
    ]
    return f"{_count(sum(counts.values()), 'job')}: {', '.join(said)}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _who(holder: str) -> str:
    host, _, pid, _ = holder.split()
    return f"process {pid} on {host}"


def _failures(rows: Sequence[Row]) -> Any:
    """A table of the jobs that failed, and why."""
    from rich.table import Table
    from rich.text import Text

    from packforcing_cli.manifest import printable

    failed = [row for row in rows if row.status == "failed"]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("job", "line", "what", "why"):
        table.add_column(name, overflow="fold")
    for row in failed[:SHOWN_FAILURES]:
        why = f"{row.error.get('kind', '')}: {row.error.get('message', '').rstrip('.')}"
        hint = row.error.get("hint", "")
        table.add_row(
            str(row.position),
            str(row.line),
            Text(row.shown[:40]),
            Text(printable(f"{why}. {hint}" if hint else why)),
        )
    if len(failed) > SHOWN_FAILURES:
        table.add_row("…", "", f"and {len(failed) - SHOWN_FAILURES} more", "see packforcing batch status")
    return table


@contextlib.contextmanager
def _ledgers(folder: Path) -> Iterator[list[Ledger]]:
    """The ledgers of a folder, open. Raises: UsageError if it has none."""
    from packforcing_cli import ledger
    from packforcing_cli.errors import UsageError

    paths = ledger.ledgers(folder) if folder.is_dir() else []
    if not paths:
        raise UsageError(
            f"{folder} is no folder of a batch: it has no {ledger.NAME}", hint="Give the folder of --out."
        )
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(ledger.Ledger.open(path)) for path in paths]


def _chosen(
    opened: Sequence[Ledger], jobs: Sequence[str] | None
) -> Iterator[tuple[Ledger, list[str] | None]]:
    """Each ledger with the ids of the named jobs in it; None = all. Raises: UsageError for a name that no job has."""
    from packforcing_cli.errors import UsageError

    if not jobs:
        yield from ((base, None) for base in opened)
        return
    found: dict[int, list[str]] = {}
    for name in jobs:
        hits = [
            (number, row.id)
            for number, base in enumerate(opened)
            for row in base.rows()
            if name in (str(row.position), row.output, Path(row.output).name)
            or (len(name) >= 6 and row.id.startswith(name))
        ]
        if not hits:
            raise UsageError(
                f"there is no job {name!r}", hint="packforcing batch status DIR --json lists them."
            )
        for number, job in hits:
            found.setdefault(number, []).append(job)
    for number, ids in found.items():
        yield opened[number], ids


# -- the display ----------------------------------------------------------------------------------------------------


def choose(mode: str, *, quiet: bool) -> Display:
    """The display of a mode, chosen as for one video. Raises: UsageError for an unknown mode."""
    from packforcing_cli.cli import console
    from packforcing_cli.cli import progress as one_video

    one_video.choose(mode, quiet=quiet)  # refuses what is no mode
    if mode == "none" or (quiet and mode == "auto"):
        return Display(quiet=quiet)
    if mode == "json":
        return _JsonLines(quiet=quiet)
    if mode == "rich" or (mode == "auto" and console.draws_in_place()):
        return _Live(quiet=quiet)
    return _Plain(quiet=quiet)


@dataclass
class _Meter:
    """How fast it goes."""

    started: float
    first: float | None = None
    eta: float | None = None

    def look(self, state: State) -> None:
        done, whole = state.work
        self.first = done if self.first is None else self.first
        made, spent = done - self.first, time.monotonic() - self.started
        self.eta = (whole - done) * spent / made if made > 0 else None


class Display:
    """Gets told what happens; this one shows the talk alone, and not even that when quiet."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.meter = _Meter(time.monotonic())

    def note(self, text: str) -> None:
        from packforcing_cli.cli import console

        if not self.quiet:
            console.say(text)

    def warn(self, text: str) -> None:
        from packforcing_cli.cli import console
        from packforcing_cli.manifest import printable

        if not self.quiet:
            console.warn(printable(text))

    def error(self, error: Any) -> bool:
        """Show a failure. Returns: whether it was shown; if not, the caller lets it rise."""
        return False

    def begin(
        self, folder: Folder, engine: Engine, entries: Sequence[Entry], workers: int | None, threads: int
    ) -> None:
        """The work begins. workers: None = as many as a cluster has room for."""
        self.meter = _Meter(time.monotonic())
        who = "as many workers as there is room for" if workers is None else _count(workers, "worker")
        self.note(
            f"{_counted(folder.ledger.counts())}, in {folder.path}; {who}, {_count(threads, 'thread')} each"
        )

    def state(self, state: State) -> None:
        """How it stands."""
        self.meter.look(state)

    def stopping(self, text: str) -> None:
        """Said from a signal handler."""
        from packforcing_cli.cli.progress import write_at_once

        if not self.quiet:
            write_at_once(text)

    def stop(self) -> None:
        """Show no more progress."""

    def end(self, folder: Folder, rows: Sequence[Row], engine: Engine, code: int) -> None:
        """It is over: what is done, what failed and why, and how to go on."""
        from packforcing_cli import ledger
        from packforcing_cli.cli import console

        counts = _counts(rows)
        self.note(f"{_counted(counts)}; {time.monotonic() - self.meter.started:.1f} s")
        if counts["failed"] and not self.quiet:
            console.talk().print(_failures(rows), highlight=False)
        paused = folder.ledger.meta("paused")
        here = ledger.host_of(ledger.this_process())
        others = {ledger.host_of(row.holder) for row in rows if row.holder} - {here}
        if paused:
            self.warn(f"paused: {paused}. Free some space, then the same command goes on.")
        elif code in (130, 143):
            self.note("To go on: the same command.")
        elif engine.why:
            self.warn(f"ended early: {engine.why}. The same command goes on.")
        if others:
            waiting = len(folder.ledger.waiting_elsewhere())
            verb = "waits" if waiting == 1 else "wait"
            wait = f", and {_count(waiting, 'job')} that {verb} for them" if waiting else ""
            self.warn(
                f"jobs are held by processes on {', '.join(sorted(others))}{wait}; if those are gone:"
                f" packforcing batch retry {folder.path} --lost"
            )
        if counts["failed"]:
            self.note("To try failed jobs again: the same command with --retry-failed.")


class _Plain(Display):
    """A line now and then."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__(quiet=quiet)
        self._last = -1e9
        self._ended = -1

    def state(self, state: State) -> None:
        super().state(state)
        now = time.monotonic()
        ended = state.counts["done"] + state.counts["failed"] + state.counts["cancelled"]
        if now - self._last < PLAIN_EVERY_SECONDS or ended == self._ended:
            return
        self._last, self._ended = now, ended
        self.note(_line(state, self.meter))


def _line(state: State, meter: _Meter) -> str:
    from packforcing_cli.cli.progress import clock

    left = f", {clock(meter.eta)} left" if meter.eta is not None else ""
    return _counted(state.counts) + left


class _JsonLines(Display):
    """One event a line on stderr."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__(quiet=quiet)
        self._known: dict[str, int] = {}
        self._folder: Folder | None = None
        self._ended: set[str] = set()

    def _event(self, name: str, **values: Any) -> None:
        sys.stderr.write(json.dumps({"event": name, **values}) + "\n")
        sys.stderr.flush()

    def note(self, text: str) -> None:
        if not self.quiet:
            self._event("note", text=text)

    def warn(self, text: str) -> None:
        if not self.quiet:
            self._event("warning", text=text)

    def error(self, error: Any) -> bool:
        self._event("error", message=error.message, hint=error.hint, exit_code=error.exit_code)
        return True

    def begin(
        self, folder: Folder, engine: Engine, entries: Sequence[Entry], workers: int | None, threads: int
    ) -> None:
        self.meter = _Meter(time.monotonic())
        self._folder = folder
        self._ended = {
            row.id for row in folder.ledger.rows() if row.status in ("done", "failed", "cancelled")
        }
        self._event(
            "start", folder=str(folder.path), counts=folder.ledger.counts(), workers=workers, threads=threads
        )

    def state(self, state: State) -> None:
        super().state(state)
        assert self._folder is not None
        if dict(state.counts) != self._known:
            self._known = dict(state.counts)
            eta = None if self.meter.eta is None else round(self.meter.eta, 1)
            self._event("state", counts=self._known, workers=state.workers, eta_seconds=eta)
            for row in self._folder.ledger.rows():
                if row.status in ("done", "failed", "cancelled") and row.id not in self._ended:
                    self._ended.add(row.id)
                    self._event("job", **_job(self._folder.path, row))

    def stopping(self, text: str) -> None:
        from packforcing_cli.cli.progress import write_at_once

        write_at_once(json.dumps({"event": "stopping", "text": text}))

    def end(self, folder: Folder, rows: Sequence[Row], engine: Engine, code: int) -> None:
        self._event("end", counts=_counts(rows), exit_code=code, stopped=engine.why)


class _Live(Display):
    """A table that redraws itself on a terminal."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__(quiet=quiet)
        self._live: Any = None
        self._state: State | None = None
        self._stopping = ""

    def begin(
        self, folder: Folder, engine: Engine, entries: Sequence[Entry], workers: int | None, threads: int
    ) -> None:
        from rich.live import Live

        from packforcing_cli.cli import console

        super().begin(folder, engine, entries, workers, threads)
        self._live = Live(
            console=console.talk(), get_renderable=self._draw, refresh_per_second=4, redirect_stdout=False
        )
        self._live.start()

    def state(self, state: State) -> None:
        super().state(state)
        self._state = state

    def stopping(self, text: str) -> None:
        self._stopping = text  # drawn by the next refresh

    def stop(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _draw(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        state = self._state
        if state is None:
            return Text("starting workers …", style="dim")
        done, whole = state.work
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        bar.add_row(ProgressBar(total=max(whole, 1e-9), completed=done), _line(state, self.meter))
        table = Table.grid(padding=(0, 2))
        for _ in range(3):
            table.add_column(no_wrap=True)
        for row in state.started[:16]:
            blocks = f"{row.blocks} of {row.total} blocks" if row.total else "first block …"
            table.add_row(Text(str(row.position), style="dim"), Text(row.shown[:60]), blocks)
        lines: list[Any] = [bar, table]
        if self._stopping:
            lines.append(Text(self._stopping, style="yellow"))
        return Group(*lines)
