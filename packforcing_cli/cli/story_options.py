"""Options about what happens when: prompts over time and pins, the same on every command that has them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from packforcing_cli.planner import Plan
    from packforcing_cli.timeline import Timeline

PANEL = "Story"

At = Annotated[
    list[str] | None,
    typer.Option(
        "--at",
        metavar="TIME PROMPT",
        rich_help_panel=PANEL,
        # A backslash, as rich would read the brackets as markup.
        help='From a time on another prompt; repeatable: --at 0:12 "a blue square \\[blend 1s]". Options behind the'
        " prompt: \\[blend 1s] moves over, \\[cut] leaves recent frames behind, \\[pin] or \\[pin 2s] pins its start.",
        show_default=False,
    ),
]
TimelineFile = Annotated[
    Path | None,
    typer.Option(
        "--timeline",
        metavar="FILE",
        rich_help_panel=PANEL,
        help="Prompts over time: lines of text like --at, .toml or .srt.",
    ),
]
Pin = Annotated[
    list[str] | None,
    typer.Option(
        "--pin",
        metavar="FROM-TO",
        rich_help_panel=PANEL,
        help="Blocks of this stretch are always recalled, for example 0:03-0:05; repeatable.",
        show_default=False,
    ),
]


PinImage = Annotated[
    list[Path] | None,
    typer.Option(
        "--pin-image",
        metavar="FILE",
        rich_help_panel=PANEL,
        help="A picture held for one block at the beginning, and always recalled; repeatable.",
        show_default=False,
    ),
]
Fit = Annotated[
    str | None,
    typer.Option(
        "--fit",
        metavar="NAME",
        rich_help_panel=PANEL,
        help="How a picture comes to the video's size: crop (default), pad or stretch.",
    ),
]


def gather(
    prompt: str | None, at: list[str] | None, timeline: Path | None, pins: list[str] | None
) -> tuple[str, Timeline]:
    """The first prompt and what happens later.

    Raises: UsageError with all mistakes of an option or file, or if there is no prompt to begin with.
    """
    from packforcing_cli import timeline as timelines
    from packforcing_cli.errors import UsageError

    scenes = [] if timeline is None else list(timelines.read(timeline))
    scenes += timelines.parse_at(value.strip().partition(" ")[::2] for value in at or ())
    first = [scene for scene in scenes if not scene.seconds]
    if prompt is None:
        if not first:
            raise UsageError(
                "there is no prompt", hint='Give one: packforcing generate "…", or a scene at 0:00.'
            )
        begin = first[0]
        if begin.blend or begin.cut or begin.pin is not None:
            raise UsageError(
                f"{begin.place.source}: the first scene has nothing before it", hint=timelines.HINT
            )
        scenes.remove(begin)
        prompt = begin.prompt
    return prompt, timelines.Timeline(tuple(scenes), timelines.parse_pins(pins or ()))


def rows(plan: Plan) -> list[tuple[str, str]]:
    """What a plan says about them: (name, value)."""
    from fractions import Fraction

    from packforcing_cli.timeline import clock

    script, grid = plan.script, plan.layout.grid
    found = []
    if len(script.prompts) > 1:
        for start, blend, prompt in zip(script.starts, script.blends, script.prompts, strict=True):
            begins = clock(Fraction(grid.frames_for(start), plan.fps))
            more = f", blended over {blend}" if blend else ""
            more += ", cut" if start in script.cuts else ""
            found.append(("prompt", f"from {begins}, block {start}{more}: {prompt}"))
    if script.pins:
        numbers = ", ".join(str(block) for block in sorted(script.pins))
        taken = len(plan.layout.mid_pins)
        found.append(
            ("pinned", f"blocks {numbers}: {taken} of {plan.layout.top_k} recalled, the rest is chosen")
        )
    return found
