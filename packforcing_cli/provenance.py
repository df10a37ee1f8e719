"""What a video file says of itself: the request that made it, the model's hashes, the layout, the version.

It is written as one JSON tag, `packforcing`, beside plain tags for people and other programs (prompt, seed, model,
version). `packforcing show` prints it, `packforcing generate --from FILE` makes the video again. Knows no video files:
it makes tags and reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from packforcing_cli.config import GenerateRequest
from packforcing_cli.errors import REINSTALL, UsageError
from packforcing_cli.layout import Layout

SCHEMA = 1
TAG = "packforcing"
NOT_REPEATED = (
    "output",
    "source",
    "frames",
    "overwrite",
    "metadata",
    "keep_run",
    "snapshot_every",
    "overlap",
)
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
    files_sha256: of the files that were read beside the model's, by what they are ("pinned picture 1"); the start image
                  is among them. Empty in a file of an older version.
    libraries:    versions of the libraries that results depend on; empty in a file of an older version.
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
    files_sha256: dict[str, str] = Field(default_factory=dict)
    libraries: dict[str, str] = Field(default_factory=dict)
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


FILES = {"image": "start image", "pin_images": "pinned picture", "embeddings": "embeddings"}
"""What files of a request are called, by its field."""


def files_of(request: GenerateRequest) -> dict[str, Path]:
    """The files a request reads, by what they are."""
    named = {f"{FILES['pin_images']} {n}": path for n, path in enumerate(request.pin_images, start=1)}
    for field in ("image", "embeddings"):
        path = getattr(request, field)
        named |= {} if path is None else {FILES[field]: path}
    return named


def changes(before: Provenance, now: Provenance) -> list[str]:
    """What is no longer as it was when a video was made, in words; what was asked for differently is left out.

    Args:
        before: what its file says.  now: the same of the repetition.
    """

    def same(*names: str) -> bool:
        return all(before.request.get(name) == now.request.get(name) for name in names)

    found = []
    if same("vae") and now.model.name == before.model.name and now.model.files != before.model.files:
        found.append(f"the weights of {before.model.name} {before.model.version}")
    old, new = _hashes(before), _hashes(now)
    for field, what in FILES.items():
        names = [name for name in new if name.startswith(what) and name in old and same(field)]
        found += [f"the {name}" for name in names if old[name] != new[name]]
    if now.model.name == before.model.name and same("size", "seconds", "memory", "timeline", "pin_images"):
        names = [name for name in now.layout if now.layout[name] != before.layout.get(name, now.layout[name])]
        found += [
            f"the memory's {name}: {before.layout[name]} then, {now.layout[name]} here" for name in names
        ]
    versions = (
        {"packforcing": before.version, **before.libraries},
        {"packforcing": now.version, **now.libraries},
    )
    found += [
        f"{name} {then}, here {versions[1][name]}"
        for name, then in versions[0].items()
        if versions[1].get(name, then) != then
    ]
    return found


def _hashes(made: Provenance) -> dict[str, str]:
    older = {} if made.image_sha256 is None else {FILES["image"]: made.image_sha256}
    return {**older, **made.files_sha256}


def layout_values(layout: Layout) -> dict[str, Any]:
    """The memory's numbers as JSON values."""
    return {
        "frames_per_block": layout.grid.frames_per_block,
        "sink_blocks": layout.sink_blocks,
        "recent_blocks": layout.recent_blocks,
        "top_k": layout.top_k,
        "bank": layout.bank,
        "mid_span": str(layout.mid_span),
        "rope_adjustment": layout.rope_adjustment,
        "kv_dtype": layout.kv_dtype,
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
