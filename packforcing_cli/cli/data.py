"""packforcing data: what is in a folder of clips, and its encoded form for training."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from packforcing_cli.training.data import Finding, Findings

SCHEMA = 1
SHOWN = 40  # clips of a table; the rest is counted

app = typer.Typer(help="Check and encode clips for training.", no_args_is_help=True)

Folder = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        help="Folder of clips, with captions or timelines in NAME.txt beside them or in metadata.jsonl.",
    ),
]
Model = Annotated[str, typer.Option("--model", metavar="NAME", help="The model that will be trained.")]
SceneSeconds = Annotated[
    float,
    typer.Option(
        "--scene-seconds",
        metavar="S",
        min=0.1,
        max=24.0,
        help="Clips are cut into scenes of at most this length: 5 for strict recipes, 24 for long memory.",
    ),
]
Enlarge = Annotated[
    bool, typer.Option("--enlarge", help="Take clips that are smaller than the model's pictures, too.")
]
MaxBad = Annotated[
    float,
    typer.Option("--max-bad", metavar="SHARE", min=0.0, max=1.0, help="Share of bad clips that is allowed."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but errors.")]


@app.callback()
def _group() -> None:
    pass


@app.command()
def check(
    folder: Folder,
    model: Model = "demo",
    scene_seconds: SceneSeconds = 24.0,
    enlarge: Enlarge = False,
    max_bad: MaxBad = 0.1,
    fast: Annotated[
        bool, typer.Option("--fast", help="Read headers and first frames only: damage behind is not found.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Look at every clip of a folder: which are used, and why the others are not.

    Exit code 0 if training would start, 2 if not: more than --max-bad of the clips are bad, or none is left.
    """
    from packforcing_cli import packages
    from packforcing_cli.cli import console
    from packforcing_cli.training import data

    place = packages.find_package(model)
    wanted = data.Wanted.by(
        packages.read_manifest(place), place, scene_seconds=scene_seconds, enlarge=enlarge, max_bad=max_bad
    )
    found = data.check(folder, wanted, decode=not fast, on_clip=_Progress(quiet))
    if as_json:
        console.result_json({"schema": SCHEMA, "model": model, **found.to_json()})
    else:
        _show(found)
        if not quiet:
            console.say(_summary(found, wanted))
    found.require_enough()


@app.command()
def encode(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the encoded data.")],
    model: Model = "demo",
    scene_seconds: SceneSeconds = 24.0,
    enlarge: Enlarge = False,
    max_bad: MaxBad = 0.1,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    quiet: Quiet = False,
) -> None:
    """Encode clips and captions once, so that training loads neither VAE nor text encoder. Prints the folder.

    A run that was stopped goes on with the same command; clips that are encoded already are not encoded again.
    """
    from packforcing_cli import packages, registry
    from packforcing_cli.cli import console
    from packforcing_cli.training import data

    place = packages.find_package(model)
    wanted = data.Wanted.by(
        packages.read_manifest(place), place, scene_seconds=scene_seconds, enlarge=enlarge, max_bad=max_bad
    )
    data.find_clips(folder)  # a wrong folder is said before the model is verified
    source = registry.open_model(model, device=device)
    progress = _Progress(quiet)
    result = data.encode(folder, out, source, wanted, on_clip=progress)
    if not quiet:
        console.say(
            f"{progress.new} clips encoded, {progress.had} were there already:"
            f" {len(result.scenes)} scenes, {sum(scene.blocks for scene in result.scenes)} blocks"
        )
        console.say(f"Train on them: {_training(wanted.scene_blocks, model)} --data {shlex.quote(str(out))}")
    console.result(str(out))


def _training(scene_blocks: int, model: str) -> str:
    """The command that trains on scenes of this length and takes all of them."""
    from packforcing_cli.training import recipes

    strict = recipes.load("finetune")
    assert isinstance(strict, recipes.Finetune)
    name = "finetune" if scene_blocks <= strict.data.blocks else "finetune-long"
    own = "" if model == "demo" else f" --set model={shlex.quote(model)}"
    return f"packforcing train {name}{own}"


class _Progress:
    """A line now and then for people who wait; every bad clip at once."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._shown = 0.0
        self.new = self.had = 0

    def __call__(self, done: int, total: int, finding: Finding, had: bool = False) -> None:
        import time

        from packforcing_cli.cli import console

        if finding.state == "used":
            self.had += had
            self.new += not had
        if self._quiet:
            return
        if finding.state != "used":
            console.warn(f"{finding.name}: {finding.state}, {finding.message}")
        if time.monotonic() - self._shown > 5 and done < total:
            if self._shown:
                console.say(f"{done} of {total} clips")
            self._shown = time.monotonic()


def _show(found: Findings) -> None:
    from rich.table import Table

    from packforcing_cli.cli import console

    table = Table("clip", "state", "length", "size", "fps", "scenes", "caption or reason", box=None)
    clips = [*found.bad, *(c for c in found.clips if c.state == "duplicate"), *found.used]
    for clip in clips[:SHOWN]:
        table.add_row(
            clip.name,
            clip.state,
            f"{clip.seconds:.2f} s" if clip.seconds else "",
            f"{clip.size[0]}x{clip.size[1]}" if clip.size[0] else "",
            f"{clip.fps:g}" if clip.fps else "",
            str(len(clip.scenes)) if clip.scenes else "",
            clip.message or _captions(clip),
        )
    console.result_table(table)
    if len(clips) > SHOWN:
        console.say(f"… and {len(clips) - SHOWN} more; --json has all of them")


def _summary(found: Findings, wanted: Any) -> str:
    counts = ", ".join(f"{number} {state}" for state, number in found.counts.items() if number)
    blocks = sum(sum(clip.scenes) for clip in found.used)
    scenes = sum(len(clip.scenes) for clip in found.used)
    seconds = sum(wanted.grid.frames_for(n) for clip in found.used for n in clip.scenes) / wanted.fps
    others = f"; {len(found.others)} other files are not looked at" if found.others else ""
    return f"{len(found.clips)} clips: {counts}. Used: {scenes} scenes, {blocks} blocks, {seconds:.0f} s{others}."


def _captions(clip: Finding) -> str:
    """The caption, of a timeline the first one and how many more its blocks have."""
    more = len({text for words in clip.words for text in words.captions} - {clip.caption})
    return _cut(clip.caption) + (f" (and {more} more)" if more else "")


def _cut(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
