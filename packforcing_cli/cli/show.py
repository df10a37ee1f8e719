"""packforcing show FILE: what a video is, and how it was made."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from packforcing_cli.provenance import Provenance
    from packforcing_cli.reader import VideoReader

SCHEMA = 1


def show(
    file: Annotated[Path, typer.Argument(help="A video file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Print how a video was made: prompts, seed, model with hashes, memory, version; and the command for it.

    Example: packforcing show circle.mp4

    Exit codes: 0 done, 1 no video, 2 no such file, or it does not say how it was made.
    """
    from packforcing_cli import provenance
    from packforcing_cli.cli import console
    from packforcing_cli.reader import VideoReader

    reader = VideoReader(file)
    made = provenance.from_tags(reader.metadata, source=str(file))
    if as_json:
        console.result_json(_values(file, reader, made))
        return
    for name, value in _rows(file, reader, made):
        console.result(f"{name:<12} {value}")


def _values(file: Path, reader: VideoReader, made: Provenance) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "path": str(file),
        "size": [reader.width, reader.height],
        "fps": float(reader.fps),
        "frames": reader.num_frames,
        "seconds": reader.num_frames / float(reader.fps),
        "chapters": [{"seconds": seconds, "title": title} for seconds, title in reader.chapters],
        "version": made.version,
        "request": made.request,
        "model": made.model.model_dump(),
        "layout": made.layout,
        "image_sha256": made.image_sha256,
        "files_sha256": made.files_sha256,
        "libraries": made.libraries,
        "command": _command(file, made),
    }


def _rows(file: Path, reader: VideoReader, made: Provenance) -> list[tuple[str, str]]:
    from packforcing_cli.timeline import Timeline, clock

    request = made.request
    rows = [
        (
            "video",
            f"{reader.width}x{reader.height}, {float(reader.fps):g} fps, {reader.num_frames} frames"
            f" = {reader.num_frames / float(reader.fps):.2f} s",
        ),
        ("prompt", str(request.get("prompt", ""))),
    ]
    timeline = request.get("timeline")
    if isinstance(timeline, dict):
        asked = Timeline.from_json(timeline)
        rows += [("at", f"{clock(scene.seconds)} {scene.text}") for scene in asked.scenes]
        rows += [("pin", span.text) for span in asked.pins]
    rows += [
        (name, str(request[name]))
        for name in ("seed", "image", "steps", "guidance", "dtype", "device", "vae")
        if request.get(name) is not None
    ]
    rows.append(("model", f"{made.model.name} {made.model.version}"))
    rows += [("", f"{name} {sha256[:12]}…") for name, sha256 in made.model.files.items()]
    rows += [("file", f"{name} {sha256[:12]}…") for name, sha256 in made.files_sha256.items()]
    layout = ", ".join(f"{name} {value}" for name, value in made.layout.items() if value not in ([], None))
    versions = ", ".join((made.version, *(f"{name} {number}" for name, number in made.libraries.items())))
    return [*rows, ("memory", layout), ("version", versions), ("command", _command(file, made))]


def _command(file: Path, made: Provenance) -> str:
    return made.extends or shlex.join(["packforcing", "generate", "--from", str(file)])
