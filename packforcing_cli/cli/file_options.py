"""Options about the files that are written, the same on every command that makes a video: annotated Typer types.

None = not given: the general default, or what a run had that goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PANEL = "File"
RUN_PANEL = "Run folder"

Codec = Annotated[
    str | None,
    typer.Option(
        "--codec",
        metavar="NAME",
        rich_help_panel=PANEL,
        help="h264 (default) or hevc; h264_nvenc, hevc_nvenc on GPUs that can.",
    ),
]
Crf = Annotated[
    int | None,
    typer.Option("--crf", rich_help_panel=PANEL, help="Quality, 0 (lossless) to 51. Default 18."),
]
Preset = Annotated[
    str | None,
    typer.Option("--preset", metavar="NAME", rich_help_panel=PANEL, help="The encoder's. Default veryfast."),
]
Frames = Annotated[
    Path | None,
    typer.Option(
        "--frames", metavar="FOLDER", rich_help_panel=PANEL, help="Write every frame as a PNG, too."
    ),
]
Metadata = Annotated[
    bool | None,
    typer.Option(
        "--metadata/--no-metadata",
        rich_help_panel=PANEL,
        help="Write into the file how it was made. Default: yes.",
    ),
]
RunPlace = Annotated[
    Path | None,
    typer.Option(
        "--run",
        metavar="DIR",
        rich_help_panel=RUN_PANEL,
        help="Where to keep what resume and extend need. Default: a new folder; see `runs list`.",
    ),
]
NoRun = Annotated[
    bool,
    typer.Option("--no-run", rich_help_panel=RUN_PANEL, help="Keep nothing: the video cannot be resumed."),
]
SnapshotEvery = Annotated[
    int | None,
    typer.Option(
        "--snapshot-every",
        metavar="BLOCKS",
        rich_help_panel=RUN_PANEL,
        help="Save the exact state now and then, so that resuming is instant; it is as large as the memory.",
    ),
]
