"""What a video file says of itself: the request that made it, the model's hashes, the layout, the version.

It is written as one JSON tag, `packforcing`, beside plain tags for people and other programs (prompt, seed, model,
version). `packforcing show` prints it, `packforcing generate --from FILE` makes the video again. Knows no video files:
it makes tags and reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from packforcing_cli.config import GenerateRequest
from packforcing_cli.errors import REINSTALL, UsageError
from packforcing_cli.layout import Layout

SCHEMA = 1
TAG = "packforcing"
NOT_REPEATED = ("output", "source", "frames", "overwrite", "metadata", "keep_run", "snapshot_every")
"""Of a request: where files went says nothing about the video."""


class ModelRecord(BaseModel):
    """Which weights made it: name and version of the package, sha256 of its files."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    version: str
    files: dict[str, str] = Field(default_factory=dict)


class Provenance(BaseModel):
    """How a video was made.

    version:      of packforcing.
    request:      what was asked for, as JSON values; what was random or automatic is decided in it.
    layout:       the memory, in layout.py's numbers.
    image_sha256: of the start image; None without one.
    extends:      the command, for a video that goes on with somebody's file or branches off a run; `request` is then of
                  its new part.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    schema_version: int = Field(SCHEMA, alias="schema", ge=1)
    version: str
    request: dict[str, Any]
    model: ModelRecord
    layout: dict[str, Any]
    image_sha256: str | None = None
    extends: str | None = None

    def tags(self) -> dict[str, str]:
        """The tags of a video file."""
        plain = {
            "prompt": str(self.request.get("prompt", "")),
            "seed": str(self.request.get("seed", "")),
            "model": self.model.name,
            "version": self.version,
        }
        text = json.dumps(
            self.model_dump(mode="json", by_alias=True), ensure_ascii=False, separators=(",", ":")
        )
        return {**plain, TAG: text}

    def generate_request(self, changes: Mapping[str, Any] | None = None) -> GenerateRequest:
        """The request again, with changes; memory options among them may be given singly.

        Raises: ConfigError if it, or a change, is not possible in this version; UsageError if the video goes on with
            a file, which the request does not say.
        """
        if self.extends is not None:
            raise UsageError("the video goes on with another one", hint=f"Make it again: {self.extends}")
        values: dict[str, Any] = {**self.request}
        memory = values.get("memory")
        memory = {**memory} if isinstance(memory, dict) else {}
        for name, value in (changes or {}).items():
            if name in GenerateRequest.model_fields:
                values[name] = value
            else:
                memory[name] = value
        return GenerateRequest.from_values({**values, "memory": memory})


def layout_values(layout: Layout) -> dict[str, Any]:
    """The memory's numbers as JSON values."""
    return {
        "frames_per_block": layout.grid.frames_per_block,
        "sink_blocks": layout.sink_blocks,
        "recent_blocks": layout.recent_blocks,
        "top_k": layout.top_k,
        "bank": layout.bank,
        "mid_span": str(layout.mid_span),
        "trained_frames": layout.trained_frames,
        "cuts": list(layout.cuts),
        "pins": sorted(layout.pins),
    }


def from_tags(tags: Mapping[str, str], *, source: str) -> Provenance:
    """How the video with these tags was made.

    Args:
        tags:   of the file; the case of names does not matter, as containers change it.
        source: the file's name, for messages.
    Raises: UsageError if there is no such tag, it is damaged, or of a newer version.
    """
    text = next((value for name, value in tags.items() if name.lower() == TAG), None)
    if text is None:
        raise UsageError(
            f"{source} does not say how it was made",
            hint="Only videos that packforcing made, without --no-metadata, say it; converting loses it.",
        )
    try:
        values = json.loads(text)
        schema = values.get("schema") if isinstance(values, dict) else None
        if isinstance(schema, int) and schema > SCHEMA:
            raise UsageError(
                f"{source} was made by a newer packforcing (metadata of schema {schema})",
                hint=f"{REINSTALL.capitalize()}.",
            )
        return Provenance.model_validate(values)
    except (ValueError, RecursionError) as error:
        said = "not JSON" if not isinstance(error, ValidationError) else str(error.errors()[0]["msg"]).lower()
        raise UsageError(
            f"what {source} says about its making is damaged: {said}", hint="Give the options by hand."
        ) from error
