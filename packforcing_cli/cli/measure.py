"""packforcing eval VIDEO|RUN…: the options, the tables, the picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from packforcing_cli.clip_score import ClipScorer, ClipScores
    from packforcing_cli.metrics import Measurement, Subject

SCHEMA = 1
ENDING = ".png"

Videos = Annotated[
    list[str] | None,
    typer.Argument(metavar="VIDEO|RUN…", help="Video files of any origin, run folders, or ids of runs."),
]
Prompt = Annotated[
    str | None,
    typer.Option("--prompt", help="What the video should show, for --clip. Default: what its metadata say."),
]
Clip = Annotated[
    str | None,
    typer.Option(
        "--clip",
        metavar="MODEL",
        help="Score prompt against picture by this CLIP model: a folder, or owner/name or owner/name@revision"
        " of the Hub.",
    ),
]
Seam = Annotated[
    str | None,
    typer.Option("--seam", metavar="TIME", help="Where an extension begins. Default: what the metadata say."),
]
Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the curves, side by side.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file of --plot.")]
Explain = Annotated[
    bool, typer.Option("--explain", help="Print the definition of every measure and measure nothing.")
]
Offline = Annotated[bool, typer.Option("--offline", help="Ask no network for the CLIP model.")]


def run(
    videos: Sequence[str],
    *,
    prompt: str | None,
    clip: str | None,
    seam: str | None,
    plot: Path | None,
    overwrite: bool,
    explain: bool,
    offline: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure, then show. Everything that can be refused is refused before the first frame is read.

    Raises: PackforcingError.
    """
    from dataclasses import replace

    from packforcing_cli import metrics
    from packforcing_cli.cli import console

    if explain:
        _refuse_beside_explain(
            {
                "VIDEO": videos or None,
                "--prompt": prompt,
                "--clip": clip,
                "--seam": seam,
                "--plot": plot,
                "--overwrite": overwrite or None,
                "--offline": offline or None,
            }
        )
        _explain(as_json=as_json)
        return
    _check(videos, prompt=prompt, clip=clip, seam=seam, plot=plot, overwrite=overwrite, offline=offline)
    subjects = [metrics.find(name) for name in videos]
    if seam is not None:
        subjects = [replace(subjects[0], seam=_seconds(seam))]
    if prompt is not None:
        subjects = [replace(subjects[0], prompts=((0.0, prompt),))]
    scorer = None
    if clip is not None:
        subjects = _with_prompts(subjects)
        scorer = _load_clip(clip, offline=offline, quiet=quiet)
    found: list[Measurement] = []
    clips: list[ClipScores | None] = []
    for subject in subjects:
        with _progress(f"measuring {subject.name}", quiet=quiet) as advance:
            measured = metrics.measure(
                subject.path, seam_at=subject.seam, notes=subject.notes, progress=advance
            )
        found.append(measured)
        clips.append(_score(scorer, subject, measured, quiet=quiet))
    names = _labels(subjects)
    if plot is not None:
        from packforcing_cli import metrics_plot

        metrics_plot.plot(plot, names, found, clips)
    if as_json:
        console.result_json(_values(subjects, found, clips, plot))
        return
    console.result(
        "Mean, and from the first ten seconds to the last (what it means: packforcing eval --explain):"
    )
    console.result_table(_table(names, found, clips))
    for name, measured, scores in zip(names, found, clips):
        if measured.lags:
            console.result(f"{name}: mean difference between frames that far apart:")
            console.result_table(_distance_table(measured))
        if scores is not None:
            console.result(f"{name}: CLIP by segment, {scores.model}:")
            console.result_table(_clip_table(measured, scores))
    for name, subject, measured, scores in zip(names, subjects, found, clips):
        for line in _sentences(subject, measured, scores):
            console.result(f"{name}: {line}.")
    if plot is not None:
        console.result(str(plot))


def _refuse_beside_explain(options: Mapping[str, object]) -> None:
    from packforcing_cli.errors import UsageError

    for name, value in options.items():
        if value is not None:
            raise UsageError(
                f"{name} does not go with --explain, which measures nothing",
                hint="Leave one of the two out; --json goes with both.",
            )


def _check(
    videos: Sequence[str],
    *,
    prompt: str | None,
    clip: str | None,
    seam: str | None,
    plot: Path | None,
    overwrite: bool,
    offline: bool,
) -> None:
    from packforcing_cli.errors import UsageError

    if not videos:
        raise UsageError("there is nothing to measure", hint="For example packforcing eval circle.mp4.")
    if len(videos) > 1 and (prompt is not None or seam is not None):
        option = "--prompt" if prompt is not None else "--seam"
        raise UsageError(
            f"{option} is of one video, and there are {len(videos)}", hint="Measure it by itself."
        )
    for option, given in (("--prompt", prompt is not None), ("--offline", offline)):
        if given and clip is None:
            raise UsageError(
                f"{option} is for --clip: nothing else reads it",
                hint="Add --clip openai/clip-vit-large-patch14, or leave it out.",
            )
    if prompt is not None and not prompt.strip():
        raise UsageError("--prompt is empty", hint="Say what the video should show.")
    if seam is not None:
        _seconds(seam)
    if plot is None:
        if overwrite:
            raise UsageError("--overwrite is for --plot: nothing else is written", hint="Leave it out.")
        return
    if plot.suffix.lower() != ENDING:
        raise UsageError(
            f"--plot {plot}: a PNG is drawn", hint=f"For example --plot {plot.stem or 'eval'}.png."
        )
    if plot.is_dir() or not plot.absolute().parent.is_dir():
        raise UsageError(f"--plot {plot}: there is no such folder, or it is one", hint="Give another file.")
    if plot.exists() and not overwrite:
        raise UsageError(f"{plot} exists", hint="Give another file, or pass --overwrite.")


def _seconds(text: str) -> float:
    from packforcing_cli.errors import UsageError
    from packforcing_cli.timeline import parse_time

    try:
        return float(parse_time(text))
    except ValueError as error:
        raise UsageError(f"--seam: {error}", hint="For example --seam 0:10.") from error


def _with_prompts(subjects: list[Subject]) -> list[Subject]:
    """The same; those without a prompt say that they are not scored. One alone is refused."""
    from dataclasses import replace

    from packforcing_cli.errors import UsageError

    if not any(subject.prompts for subject in subjects):
        names = ", ".join(subject.name for subject in subjects)
        raise UsageError(
            f"--clip needs a prompt, and {names} does not say its own",
            hint='Give it: --prompt "a red circle moving right on a blue background".',
        )
    said = "its prompt is not known: CLIP did not score it"
    return [s if s.prompts else replace(s, notes=(*s.notes, said)) for s in subjects]


def _load_clip(place: str, *, offline: bool, quiet: bool) -> ClipScorer:
    from packforcing_cli import clip_score, registry
    from packforcing_cli.cli import console
    from packforcing_cli.cli.transfers import Transfers
    from packforcing_cli.hub import Hub

    hub = Hub(offline=offline, note=(lambda _: None) if quiet else console.say)
    with Transfers(quiet=quiet) as shown:
        folder, name = clip_score.find(place, hub, advance=shown.advance)
    return clip_score.ClipScorer.load(folder, name=name, device=registry.resolve_device("auto"))


def _score(
    scorer: ClipScorer | None, subject: Subject, measured: Measurement, *, quiet: bool
) -> ClipScores | None:
    if scorer is None or not subject.prompts:
        return None
    from packforcing_cli import clip_score, metrics

    with _progress(f"scoring {subject.name}", quiet=quiet) as advance:
        return scorer.score(
            metrics.sampled(subject.path, clip_score.EVERY_SECONDS),
            subject.prompt_at,
            measured.segments,
            progress=lambda seconds: advance(min(1.0, seconds / measured.seconds)),
        )


@contextmanager
def _progress(what: str, *, quiet: bool) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal, a line elsewhere; nothing with --quiet."""
    from packforcing_cli.cli import console

    if quiet:
        yield lambda share: None
    elif not console.draws_in_place():
        console.say(f"{what} …")
        yield lambda share: None
    else:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn()
        with Progress(
            *columns, TimeRemainingColumn(), console=console.talk(), redirect_stdout=False, transient=True
        ) as bar:
            task = bar.add_task(what, total=1.0)
            yield lambda share: bar.update(task, completed=share)


# ------------------------------------------------------------------------------------------------------- showing


def _explain(*, as_json: bool) -> None:
    from packforcing_cli import metrics
    from packforcing_cli.cli import console

    texts = {name: metrics.definition(measure) for name, measure in metrics.MEASURES.items()}
    if as_json:
        console.result_json({"schema": SCHEMA, "definitions": texts})
        return
    console.result(
        "small picture: at most 64 px on the short side; thumbnail: at most 32 px on the long side.\n"
    )
    for name, text in texts.items():
        console.result(name + "\n" + "\n".join(f"    {line}".rstrip() for line in text.splitlines()) + "\n")


def _labels(subjects: Sequence[Subject]) -> list[str]:
    """File names where they tell the videos apart, else what was given; a number where that is the same."""
    names = [subject.path.name for subject in subjects]
    if len(set(names)) < len(names):
        names = [subject.name for subject in subjects]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: n + 1].count(name)})"
        for n, name in enumerate(names)
    ]


def _values(
    subjects: Sequence[Subject],
    found: Sequence[Measurement],
    clips: Sequence[ClipScores | None],
    plot: Path | None,
) -> dict[str, Any]:
    videos = []
    for subject, measured, scores in zip(subjects, found, clips):
        prompts = [{"seconds": start, "prompt": text} for start, text in subject.prompts]
        videos.append(
            {
                "name": subject.name,
                **measured.values(),
                "prompts": prompts,
                "clip": None if scores is None else scores.to_json(),
            }
        )
    return {"schema": SCHEMA, "videos": videos, "plot": None if plot is None else str(plot)}


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _table(names: Sequence[str], found: Sequence[Measurement], clips: Sequence[ClipScores | None]) -> Table:
    from rich.table import Table
    from rich.text import Text

    from packforcing_cli.metrics import CURVES

    table = Table()
    table.add_column("measure")
    table.add_column("unit")
    for name in names:
        table.add_column(Text(name), justify="right", overflow="fold")

    def row(name: str, unit: str, cells: Sequence[str]) -> None:
        table.add_row(name, unit, *map(Text, cells))

    def over_time(mean: float, segments: Sequence[float]) -> str:
        trend = f"  {_number(segments[0])} → {_number(segments[-1])}" if len(segments) > 1 else ""
        return f"{_number(mean)}{trend}"

    row("length", "s", [f"{m.seconds:.1f}  {m.size[0]}x{m.size[1]}" for m in found])
    for name, unit in CURVES.items():
        if name == "change":  # what jumps are made of
            continue
        row(name, unit, [over_time(m.mean(name), m.by_segment(name)) for m in found])
        if name == "motion":
            row("dynamic degree", "% of the time", [_number(m.dynamic_degree) for m in found])
    row("repetition", "0 to 1", [_repetition(m) for m in found])
    row("jumps", "number", [str(len(m.jumps)) if m.frames > 1 else "-" for m in found])
    if any(m.seam for m in found):
        row("seam", "dE, levels", [_seam(m) for m in found])
    if any(clips):
        row("CLIP", "100 cos", ["-" if c is None else over_time(c.mean, c.by_segment) for c in clips])
    return table


def _repetition(measured: Measurement) -> str:
    found = measured.repetition
    return "-" if found is None else f"{found.strength:.2f}  every {found.period:.1f} s"


def _seam(measured: Measurement) -> str:
    if measured.seam is None:
        return "-"
    seconds, seam = measured.seam
    return f"{seam.delta_e:.1f}, {seam.jump:.1f} at {seconds:.1f} s"


def _distance_table(measured: Measurement) -> Table:
    from rich.table import Table

    table = Table()
    table.add_column("measure")
    for lag in measured.lags:
        table.add_column(f"{lag:.4g} s", justify="right")
    for row, values in measured.distances.items():
        table.add_row(row, *map(_number, values))
    return table


def _clip_table(measured: Measurement, scores: ClipScores) -> Table:
    from rich.table import Table

    table = Table()
    for start, end in measured.segments:
        table.add_column(f"{start:.0f}-{end:.0f} s", justify="right")
    table.add_column("mean", justify="right")
    table.add_column("drop", justify="right")
    cells = [*scores.by_segment, scores.mean, scores.drop]
    table.add_row(*(f"{cell:.2f}" if math.isfinite(cell) else "-" for cell in cells))
    return table


def _sentences(subject: Subject, measured: Measurement, scores: ClipScores | None) -> list[str]:
    said = measured.findings()
    changes = [start for start, _ in subject.prompts[1:]]
    if changes:
        from fractions import Fraction

        from packforcing_cli.timeline import clock

        times = ", ".join(clock(Fraction(round(start * 10), 10)) for start in changes)
        said.append(f"its prompt changes at {times}: drift and jumps there may be wanted")
    return [*said, *measured.notes, *(scores.notes if scores else ())]
