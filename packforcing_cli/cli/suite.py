"""`packforcing eval --suite`: the benchmark, from its options to its tables. Not a command of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from packforcing_cli.training.suite import Suite

PANEL = "Benchmark"

Name = Annotated[
    str | None,
    typer.Option(
        "--suite", metavar="demo", rich_help_panel=PANEL, help="Run a benchmark instead of measuring videos."
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        rich_help_panel=PANEL,
        help="The packaged demo (default), or the folder of a package of its world.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        rich_help_panel=PANEL,
        help="Folder of results; the same command goes on where it stopped. Default suite-demo.",
    ),
]
Quick = Annotated[
    bool,
    typer.Option(
        "--quick",
        rich_help_panel=PANEL,
        help="4 policies, 4 prompts, 1 seed, 20 s: shows in minutes that it runs, and supports no claim.",
    ),
]
Rows = Annotated[
    str | None,
    typer.Option(
        "--rows", metavar="A,B", rich_help_panel=PANEL, help="Only these rows; --dry-run lists them."
    ),
]
Prompts = Annotated[
    int | None,
    typer.Option("--prompts", rich_help_panel=PANEL, help="Held-out prompts. Default 32, quick 4."),
]
Seeds = Annotated[
    int | None, typer.Option("--seeds", rich_help_panel=PANEL, help="Seeds a prompt. Default 2, quick 1.")
]
Seconds = Annotated[
    str | None,
    typer.Option(
        "--seconds", metavar="A,B", rich_help_panel=PANEL, help="Lengths. Default 60,120, quick 20."
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", min=1, max=256, rich_help_panel=PANEL, help="Videos made at a time. Default 1."),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", rich_help_panel=PANEL, help="auto (a GPU if there is one), cpu, cuda or cuda:N."
    ),
]
Record = Annotated[
    bool,
    typer.Option(
        "--record",
        rich_help_panel=PANEL,
        help="Write the figures of its own memory into the manifest of the package --model names.",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", rich_help_panel=PANEL, help="List the rows, say how long, and end.")
]


def run(
    name: str,
    *,
    model: str | None,
    out: Path | None,
    quick: bool,
    rows: str | None,
    prompts: int | None,
    seeds: int | None,
    seconds: str | None,
    jobs: int | None,
    device: str | None,
    record: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Plan the suite, say how long it takes, make what is missing, write and print the report."""
    import contextlib
    import shlex
    import time

    from packforcing_cli import durable, runfolder
    from packforcing_cli.cli import console
    from packforcing_cli.errors import PackforcingError, UsageError
    from packforcing_cli.registry import load_model
    from packforcing_cli.resolve import layout_for
    from packforcing_cli.training import suite as suites
    from packforcing_cli.training import suite_report

    jobs = jobs or 1

    def say(text: str) -> None:
        if not quiet:
            console.say(text)

    if name != suites.NAME:
        raise UsageError(f"there is no suite {name!r}", hint=f"Use --suite {suites.NAME}.")
    folder = out or Path(f"suite-{suites.NAME}")
    source = model or suites.NAME
    if record and (quick or model is None or not Path(model).is_dir()):
        raise UsageError(
            "--record needs the folder of a package, and more than --quick",
            hint="For example --model runs/mine/package --rows packforcing --record.",
        )
    loaded = load_model(source, device=device or "auto")
    if record and suites.REFERENCE not in (_names(rows) or [suites.REFERENCE]):
        raise UsageError(f"--record needs the row {suites.REFERENCE}")
    suite = suites.plan(
        loaded,
        rows=_names(rows),
        prompts=prompts,
        seeds=seeds,
        seconds=_lengths(seconds),
        quick=quick,
    )
    if folder.exists() and (not folder.is_dir() or _is_foreign(folder, suites.VIDEOS)):
        raise UsageError(
            f"{folder} is there and holds no results of the suite", hint="Use another --out, or a new folder."
        )
    words = ["packforcing", "eval", "--suite", name]
    given = {
        "--model": model,
        "--rows": rows,
        "--prompts": prompts,
        "--seeds": seeds,
        "--seconds": seconds,
        "--device": device,
        "--jobs": jobs if jobs > 1 else None,
        "--out": out,
    }
    words += ["--quick"] if quick else []
    words += [str(word) for flag, value in given.items() if value is not None for word in (flag, value)]
    with contextlib.ExitStack() as held:
        if not dry_run:
            try:
                durable.make_folder(folder)
            except OSError as error:
                raise durable.failure(error, folder, kind=PackforcingError) from error
            held.enter_context(runfolder.hold(folder))
        journal = suites.Journal(folder / suites.VIDEOS, suite)
        for sentence in journal.dropped:
            console.warn(sentence)
        videos = suites.to_do(suite, journal)
        _introduce(suite, len(videos), say)
        if quick:
            say("--quick shows that the suite runs. It supports no claim.")
        if videos:
            pace = suites.calibrate(loaded, suite)
            times = suites.estimate(loaded, suite, videos, pace)
            beside = f" with {jobs} jobs" if jobs > 1 else ""
            said = console.duration(_rounded(sum(times) / jobs))
            say(f"About {said}{beside}, measured on this machine just now.")
        if dry_run:
            for row, why in suite_report.not_run(suite):
                say(f"  {row.name}: {why}")
            for row in suite.running:
                console.result(f"{row.name}: {row.said}")
            return
        started, stopped = time.monotonic(), False
        try:
            for number, line in enumerate(suites.run(loaded, source, suite, videos, jobs=jobs), start=1):
                journal.add(line)
                spent = time.monotonic() - started
                left = console.duration(_rounded(spent / number * (len(videos) - number)))
                result = (
                    f"broke down: {line['failed']}" if "failed" in line else f"{line['wall_seconds']:.0f} s"
                )
                rest = f", about {left} left" if number < len(videos) else ""
                say(
                    f"{number}/{len(videos)} {line['row']}: {line['prompt']}, seed {line['seed']}: {result}{rest}"
                )
        except KeyboardInterrupt:
            stopped = True
        report = suite_report.build(
            suite,
            journal,
            lambda row, blocks: layout_for(
                loaded, suites.memory_of(loaded, row.memory), suite.grid, num_blocks=blocks
            ),
            command=shlex.join(words),
        )
        written = suite_report.write(report, folder)
        if record and not stopped:
            suites.record_in_package(loaded.folder, suite_report.scores(report))
    if as_json:
        console.result_json(report)
    else:
        console.result(suite_report.markdown(report))
    say("Written: " + ", ".join(str(path) for path in written))
    if stopped:
        console.say(f"Interrupted. To go on: {shlex.join(words)}")
        raise typer.Exit(130)


def require_none(options: Mapping[str, object], why: str) -> None:
    """Raises: UsageError naming the first option that was given and means nothing here."""
    from packforcing_cli.errors import UsageError

    for name, value in options.items():
        if value is not None and value is not False and value != []:  # 0 and "" were given, too
            shown = name if name.isupper() else "--" + name.replace("_", "-")
            raise UsageError(f"{shown} {why}", hint="See packforcing eval --help.")


def _introduce(suite: Suite, missing: int, say: Callable[[str], None]) -> None:
    total = sum(1 for _ in suite.videos())
    lengths = ", ".join(f"{seconds:g}" for seconds in suite.seconds)
    say(
        f"Rows: {len(suite.running)}. Held-out prompts: {len(suite.prompts)}. Seeds: {suite.seeds}. Seconds: {lengths}."
        f" Videos: {total}, {missing} to make."
    )
    if not suite.knows_visitor:
        say(
            f"No recall test: {suite.model_name} does not know the visitor's words, so it has not learned it."
        )


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _lengths(text: str | None) -> list[float] | None:
    from packforcing_cli.errors import UsageError

    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"--seconds {text}: must be numbers with commas", hint="For example --seconds 60,120."
        ) from error


def _is_foreign(folder: Path, own: str) -> bool:
    names = {path.name for path in folder.iterdir()}
    return bool(names - {"lock"}) and own not in names


def _rounded(seconds: float) -> float:
    """To what an estimate is worth: whole seconds, from two minutes on whole minutes."""
    return float(round(seconds)) if seconds < 120 else 60.0 * round(seconds / 60)
