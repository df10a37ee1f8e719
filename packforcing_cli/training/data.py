"""Clips of people: what is in a folder, which of it can be trained on, and the encoded form that training reads.

    CLIPS/               cat.mp4 + cat.txt, or metadata.jsonl with a line {"file_name": "cat.mp4", "text": "…"} a clip;
                         a caption may be a timeline: lines "0:00 …", "0:05 … [cut]" (timeline.py), or "timeline": […]
        │  check         every clip read once: unreadable, too short, too small, duplicate, captionless, or used
        │  encode        cut into scenes, each encoded as a stream of its own
    OUT/settings.json    what all of it depends on: model, hashes of VAE and text encoder, size, fps, scene length
        journal.jsonl    a line a clip that is done, appended and synced: a kill costs the clip that was in hand
        latents/…        shards of a clip: [T,C,F,h,w] latents, [T,C,2,h/4,w/4] LR latents of its scenes, float16
        text/…           prompt embeddings, one file a caption
        dataset.json     written last: the scenes of the clips that are in CLIPS now

Shards are named by the clip's content: the same clip twice is encoded once, a changed one anew, a moved one not at all.
LR latents are made of decoded pixels, as in a rollout. Memory is bounded by a block, and by a shard of latents.
Letters: T blocks of a scene, C latent channels, F latent frames a block, h w latent size.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from packforcing_cli import durable, embeddings, packages, registry, timeline, weights
from packforcing_cli.embeddings import UNCONDITIONAL, Encoded
from packforcing_cli.errors import LockedError, PackforcingError, UsageError, WeightsError
from packforcing_cli.layout import Grid
from packforcing_cli.packages import Manifest
from packforcing_cli.past import encode_blocks
from packforcing_cli.registry import ModelSource
from packforcing_cli.source import Source
from packforcing_cli.text import TextIdentity, clean
from packforcing_cli.training import loop
from packforcing_cli.training.estimate import grid_of
from packforcing_cli.transformer import TransformerConfig
from packforcing_cli.vae import Codec, encode_lr, lr_pixels

try:  # Windows has none
    import fcntl
except ImportError:  # pragma: no cover
    fcntl = None  # type: ignore[assignment]

SCHEMA = 1
METADATA = "metadata.jsonl"
DATASET, SETTINGS, JOURNAL = "dataset.json", "settings.json", "journal.jsonl"
VIDEO_ENDINGS = frozenset(
    f".{name}"
    for name in (
        *("3gp", "asf", "avi", "flv", "gif", "m2ts", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "mts", "mxf"),
        *("ogv", "ts", "vob", "webm", "wmv", "y4m"),
    )
)
LEAST_BLOCKS = 2  # of a scene: with one there is no history to train on
SHARD_BYTES = 64_000_000
MAX_BAD = 0.1  # share of bad clips above which training does not start

_BEGINS_WITH_A_TIME = re.compile(r"(?:[^\S\n]*(?:#[^\n]*)?\n)*[^\S\n]*\d+(?::\d\d){1,2}(?:[.,]\d+)?\s")
"""Behind blank lines and comments; one way to match each line, or blank ones would take exponential time."""
BAD = ("unreadable", "no caption", "too short", "too small")
STATES = ("used", *BAD, "duplicate")


# -- a folder of clips --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """A clip of a folder.

    name:    its path below the folder, with /.
    caption: or ''; the first one of a timeline.
    scenes:  of its timeline, by time, the first at 0; empty without one.
    problem: what is wrong with its timeline, or ''.
    """

    name: str
    path: Path
    caption: str
    scenes: tuple[timeline.Scene, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Words:
    """What each block of a scene is captioned with.

    captions: one a block.
    cuts:     blocks that see no recent block, as in a rollout.
    """

    captions: tuple[str, ...]
    cuts: tuple[int, ...] = ()

    @property
    def script(self) -> timeline.Script:
        """The same as a rollout takes it."""
        new = [n for n, text in enumerate(self.captions) if not n or text != self.captions[n - 1]]
        prompts = tuple(self.captions[n] for n in new)
        return timeline.Script(prompts, tuple(new), (0,) * len(new), cuts=self.cuts)


@dataclass(frozen=True)
class Wanted:
    """What training makes of clips.

    size:         (width, height) in pixels.  scene_blocks: blocks of a whole scene.
    enlarge:      take clips that are smaller than `size`, too.
    max_bad:      share of bad clips above which nothing is started.
    """

    size: tuple[int, int]
    fps: int
    grid: Grid
    scene_blocks: int
    enlarge: bool = False
    max_bad: float = MAX_BAD

    @classmethod
    def by(
        cls,
        manifest: Manifest,
        folder: Path,
        *,
        scene_seconds: float,
        enlarge: bool = False,
        max_bad: float = MAX_BAD,
    ) -> Wanted:
        """As a model package takes them. Raises: UsageError for scenes that are too short to train on."""
        config = TransformerConfig.from_dict(
            weights.read_config(packages.part_folder(folder, manifest, "transformer"))
        )
        grid = grid_of(manifest, config)
        blocks = grid.blocks_for(scene_seconds, manifest.fps)
        if blocks < LEAST_BLOCKS:
            least = grid.frames_for(LEAST_BLOCKS) / manifest.fps
            raise UsageError(
                f"scenes of {scene_seconds:g} s have {blocks} block",
                hint=f"Use scenes of at least {least:.1f} s.",
            )
        return cls(manifest.size, manifest.fps, grid, blocks, enlarge, max_bad)

    def scenes(self, num_frames: int) -> list[int]:
        """Blocks of each scene that a clip of so many frames is cut into, from its start; a short rest is left out."""
        whole, rest = divmod(num_frames, self.grid.frames_for(self.scene_blocks))
        last = self.grid.whole_blocks(rest)
        return [self.scene_blocks] * whole + ([last] if last >= LEAST_BLOCKS else [])


@dataclass(frozen=True)
class Finding:
    """What was found of one clip.

    state:   one of STATES.  message: why it is not used; empty when it is.
    scenes:  blocks of each scene; empty if it is not used.
    words:   of the blocks of each scene, where the caption is a timeline; else empty.
    sha256:  of the file; '' if it could not be read.
    seconds, size, fps: of the file; 0 where unknown.
    """

    name: str
    state: str
    message: str = ""
    caption: str = ""
    sha256: str = ""
    seconds: float = 0.0
    size: tuple[int, int] = (0, 0)
    fps: float = 0.0
    scenes: tuple[int, ...] = ()
    words: tuple[Words, ...] = ()


@dataclass(frozen=True)
class Findings:
    """What was found in a folder. others: names of files that are no clips and no captions."""

    folder: Path
    clips: tuple[Finding, ...]
    others: tuple[str, ...]
    max_bad: float

    @property
    def counts(self) -> dict[str, int]:
        """Number of clips in each state."""
        found = Counter(clip.state for clip in self.clips)
        return {state: found[state] for state in STATES}

    @property
    def bad(self) -> list[Finding]:
        return [clip for clip in self.clips if clip.state in BAD]

    @property
    def used(self) -> list[Finding]:
        return [clip for clip in self.clips if clip.state == "used"]

    @property
    def stops(self) -> bool:
        """Whether training would stop: too many clips are bad, or none is left."""
        return not self.used or len(self.bad) > self.max_bad * len(self.clips)

    def require_enough(self) -> None:
        """Raises: UsageError if training would stop."""
        if self.stops:
            raise too_many_bad(self.bad, len(self.clips), self.max_bad)

    def to_json(self) -> dict[str, Any]:
        """The findings as JSON values."""
        return {
            "folder": str(self.folder),
            "clips": [asdict(clip) for clip in self.clips],
            "others": list(self.others),
            "counts": self.counts,
            "scenes": sum(len(clip.scenes) for clip in self.used),
            "blocks": sum(sum(clip.scenes) for clip in self.used),
            "bad_share": len(self.bad) / len(self.clips) if self.clips else 0.0,
            "stops": self.stops,
        }


def too_many_bad(bad: list[Finding], total: int, limit: float) -> UsageError:
    """The error for a folder that training does not start with."""
    first = "; ".join(f"{clip.name}: {clip.message}" for clip in bad[:3])
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    share = f"at most {limit:.0%} may be" if len(bad) < total else "none is left"
    return UsageError(
        f"{len(bad)} of {total} clips are bad, {share}: {first}{more}",
        hint="packforcing data check DIR lists them; mend or remove them, or allow more with --max-bad.",
    )


def find_clips(folder: Path) -> tuple[list[Clip], list[str]]:
    """The clips of a folder and what is below it, by name, and the names of files that are none.

    A line of metadata.jsonl decides the caption of its clip; without one it is NAME.txt beside the clip. A caption is a
    timeline if its first line begins with a time with a colon, as 0:00.
    Raises: UsageError if there is no folder, no clip or a broken metadata.jsonl.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}", hint="Give a folder with video clips.")
    listed = _read_metadata(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder))
    by_name = {path.relative_to(folder).as_posix(): path for path in files}
    names = sorted({*listed, *(n for n, path in by_name.items() if path.suffix.lower() in VIDEO_ENDINGS)})
    if not names:
        raise UsageError(
            f"there are no video clips in {folder}",
            hint="Put clips there (MP4, MKV, MOV, WebM, AVI …), each with its caption in NAME.txt.",
        )
    clips = []
    beside = set()
    for name in names:
        path = folder / name
        text = path.with_suffix(".txt")
        beside.add(text)
        found = listed.get(name) or (_read_caption(text) if text.is_file() else "")
        clips.append(_captioned(name, path, found, METADATA if listed.get(name) else str(text)))
    known = {*names, METADATA}
    others = [n for n, path in by_name.items() if n not in known and path not in beside]
    return clips, others


def _captioned(name: str, path: Path, said: str | list[Any], source: str) -> Clip:
    """A clip with its caption, or the timeline that it is."""
    try:
        if isinstance(said, list):
            if all(isinstance(entry, dict) for entry in said):
                scenes = timeline.Timeline.from_json({"at": said}).scenes
            else:
                scenes = timeline.parse("\n".join(map(str, said)), source=source)
        elif _BEGINS_WITH_A_TIME.match(said):
            scenes = timeline.parse(said, source=source)
        else:
            return Clip(name, path, clean(said))
    except UsageError as error:
        return Clip(name, path, "", problem=str(error))
    scenes = tuple(
        replace(scene, prompt=clean(scene.prompt)) for scene in sorted(scenes, key=lambda s: s.seconds)
    )
    problem = ""
    unknown = next((scene for scene in scenes if scene.blend or scene.pin is not None), None)
    twice = next((b for a, b in pairwise(scenes) if a.seconds == b.seconds), None)
    if scenes[0].seconds:
        begins = timeline.clock(scenes[0].seconds)
        problem = f"{scenes[0].place.source}: its first caption begins at {begins}, not at 0:00"
    elif unknown is not None:
        place = unknown.place
        problem = f"{place.source}, line {place.line}: a clip's captions have no [blend] and no [pin]"
    elif twice is not None:
        problem = f"{twice.place.source}: two captions begin at {timeline.clock(twice.seconds)}"
    return Clip(name, path, "" if problem else scenes[0].prompt, () if problem else scenes, problem)


def words_of(
    scenes: tuple[timeline.Scene, ...], lengths: tuple[int, ...], grid: Grid, fps: int
) -> tuple[Words, ...]:
    """The captions of every block of a clip's scenes of training: each from the block boundary nearest to its time on.

    Args:
        scenes:  the clip's captions over time, rising from 0; empty gives nothing.
        lengths: blocks of each scene of training.
    """
    found, begin = [], 0
    for blocks in lengths if scenes else ():
        start, captions, cuts = Fraction(begin, fps), [""] * blocks, []
        for scene in scenes:
            block = 0 if scene.seconds <= start else grid.nearest_block(scene.seconds - start, fps)
            if block < blocks:
                captions[block:] = [scene.prompt] * (blocks - block)
                if scene.cut and block and block not in cuts:
                    cuts.append(block)
        found.append(Words(tuple(captions), tuple(cuts)))
        begin += grid.frames_for(blocks)
    return tuple(found)


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _read_caption(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the caption {path} cannot be read: {error}", hint="Save it as UTF-8.") from error


def _read_metadata(folder: Path) -> dict[str, str | list[Any]]:
    """Clip name -> caption or timeline of metadata.jsonl; '' where a line has none. Empty without that file."""
    path = folder / METADATA
    if not path.is_file():
        return {}
    found: dict[str, str | list[Any]] = {}
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}", hint="Save it as UTF-8.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        example = '{"file_name": "clip.mp4", "text": "a caption"}'
        try:
            values = json.loads(line)
        except ValueError as error:
            raise UsageError(
                f"{path}, line {number} is not JSON: {error}", hint=f"A line is {example}"
            ) from error
        name = _first(values, "file_name", "file", "video", "path") if isinstance(values, dict) else None
        if not isinstance(name, str) or not name:
            raise UsageError(f"{path}, line {number} names no file", hint=f"A line is {example}")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UsageError(f"{path}, line {number}: {name} is not a path below {folder}")
        text = _first(values, "timeline", "text", "caption", "prompt")
        if "timeline" in values and not (isinstance(text, list) and text):
            raise UsageError(
                f"{path}, line {number}: timeline is no list of captions",
                hint='For example "timeline": ["0:00 a red square", "0:05 a blue square [cut]"].',
            )
        found[Path(name).as_posix()] = text if isinstance(text, str | list) else ""
    return found


def _first(values: Mapping[str, Any], *names: str) -> Any:
    return next((values[name] for name in names if name in values), None)


def file_sha256(path: Path) -> str:
    """Hash of a file, read as a stream. Raises: OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class Inspector:
    """Looks at the clips of one folder, one after another; remembers contents to tell duplicates."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._seen: dict[str, str] = {}  # sha256 -> name of the clip that is used

    def look(self, clip: Clip) -> tuple[Finding, Source | None]:
        """What can be told of a clip without decoding more than one frame of it; its source if it may be used."""
        wanted = self._wanted
        facts: dict[str, Any] = {"caption": clip.caption}

        def found(state: str, message: str) -> tuple[Finding, None]:
            return Finding(clip.name, state, message, **facts), None

        try:
            facts["sha256"] = file_sha256(clip.path)
            source = Source(clip.path, fps=wanted.fps, size=wanted.size)
            _, first = next(source.reader.upright())
        except (OSError, PackforcingError) as error:
            return found("unreadable", _reason(error))
        height, width = first.shape[:2]
        facts |= {
            "seconds": round(float(source.end - source.start), 3),
            "size": (width, height),
            "fps": round(float(source.reader.fps), 3),
        }
        if clip.problem:
            return found("no caption", clip.problem)
        if not clip.caption:
            return found("no caption", f"it has no {Path(clip.name).stem}.txt and no text in {METADATA}")
        scenes = wanted.scenes(source.num_frames)
        if not scenes:
            least = Fraction(wanted.grid.frames_for(LEAST_BLOCKS), wanted.fps)
            return found("too short", f"{facts['seconds']:g} s long, {float(least):.2g} s are the least")
        late = next((s for s in clip.scenes if s.seconds >= source.end - source.start), None)
        if late is not None:
            length = timeline.clock(Fraction(round(1000 * (source.end - source.start)), 1000))
            return found("no caption", f"{timeline.clock(late.seconds)} is past its end: it is {length} long")
        scale = max(wanted.size[0] / width, wanted.size[1] / height)
        if scale > 1 and not wanted.enlarge:
            return found(
                "too small",
                f"{width}x{height}, would be enlarged {scale:.2g} times to {wanted.size[0]}x{wanted.size[1]}",
            )
        if facts["sha256"] in self._seen:
            return found("duplicate", f"the same as {self._seen[facts['sha256']]}")
        self._seen[facts["sha256"]] = clip.name
        words = words_of(clip.scenes, tuple(scenes), wanted.grid, wanted.fps)
        return Finding(clip.name, "used", scenes=tuple(scenes), words=words, **facts), source

    def damaged(self, finding: Finding, message: str) -> Finding:
        """The finding of a clip that turned out to be damaged while it was decoded."""
        self._seen.pop(finding.sha256, None)
        return replace(finding, state="unreadable", message=message, scenes=(), words=())


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error)


def damage(source: Source) -> str:
    """What is wrong with a source whose frames were read, or ''."""
    after = source.reader.damaged_after
    return "" if after is None else f"damaged after {float(after - source.start):.2f} s"


def check(
    folder: Path,
    wanted: Wanted,
    *,
    decode: bool = True,
    on_clip: Callable[[int, int, Finding], None] = lambda *_: None,
) -> Findings:
    """Look at every clip of a folder.

    Args:
        decode:  read every frame, which finds damage in the middle; False = headers and the first frame.
        on_clip: called with the number of clips looked at, of all, and the newest finding.
    Raises: UsageError as `find_clips`.
    """
    clips, others = find_clips(folder)
    inspector = Inspector(wanted)
    findings = []
    for number, clip in enumerate(clips, 1):
        finding, source = inspector.look(clip)
        if source is not None and decode:
            try:
                for _ in source.frames():
                    pass
                message = damage(source)
            except PackforcingError as error:
                message = _reason(error)
            if message:
                finding = inspector.damaged(finding, message)
        findings.append(finding)
        on_clip(number, len(clips), finding)
    return Findings(folder, tuple(findings), tuple(others), wanted.max_bad)


# -- encoding -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    """What `past.encode_blocks` needs of a model."""

    codec: Codec
    device: torch.device
    dtype: torch.dtype


def encode(
    folder: Path,
    out: Path,
    source: ModelSource,
    wanted: Wanted,
    *,
    on_clip: Callable[[int, int, Finding, bool], None] = lambda *_: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> EncodedData:
    """Encode the clips of a folder into `out`, or what is missing there.

    Args:
        on_clip:     called with the number of clips done, of all, the newest finding, and whether it was there already.
        should_stop: asked after every clip; True raises loop.Stopped, clips that are done are kept.
    Returns: the encoded data.
    Raises: UsageError if `out` was made with other settings, or too many clips are bad (at once when that is clear);
        LockedError if another process writes it; DiskFullError.
    """
    clips, others = find_clips(folder)
    try:
        durable.make_folder(out / "latents")
        durable.make_folder(out / "text")
        with _journal(out) as journal:
            _settle(out, source, wanted)
            findings = _encode_clips(clips, out, source, wanted, journal, on_clip, should_stop)
            found = Findings(folder, tuple(findings), tuple(others), wanted.max_bad)
            found.require_enough()
            texts = [text for clip in found.used for words in clip.words for text in words.captions]
            encode_text(out, source, [*(clip.caption for clip in found.used), *texts])
            _write_dataset(out, source, found, journal)
    except (OSError, SafetensorError) as error:
        if durable.is_full_disk(error):
            raise durable.failure(
                OSError(28, "no space"), out, kind=UsageError, hint="What is done is kept: run it again."
            ) from error
        if isinstance(error, SafetensorError):
            raise
        raise durable.failure(error, out, kind=UsageError, hint="Choose another --out.") from error
    return EncodedData.open(out)


def _settle(out: Path, source: ModelSource, wanted: Wanted) -> None:
    """Write settings.json, or compare with the one that is there."""
    values = settings_of(source, wanted)
    path = out / SETTINGS
    if not path.is_file():
        durable.write(path, (json.dumps(values, indent=2) + "\n").encode())
        return
    try:
        there = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} cannot be read: {error}", hint="Use another --out.") from error
    require_same(there, values, f"{out} was encoded with other settings")


def settings_of(source: ModelSource, wanted: Wanted) -> dict[str, Any]:
    """All that encoded data depends on but for the clips, as JSON values."""
    manifest = source.manifest
    values = {
        "schema": SCHEMA,
        "model": source.name,
        "vae": manifest.part_hash("vae"),
        "size": list(wanted.size),
        "fps": wanted.fps,
        "fit": "crop",
        "frames_per_block": wanted.grid.frames_per_block,
        "scene_blocks": wanted.scene_blocks,
        "enlarge": wanted.enlarge,
        "text": asdict(source.text),
    }
    result: dict[str, Any] = json.loads(json.dumps(values))
    return result


def require_same(then: Mapping[str, Any], now: Mapping[str, Any], said: str) -> None:
    """Raises: UsageError naming what differs between two sets of settings."""
    differing = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    if differing:
        shown = "; ".join(
            f"{key} {_short(then.get(key))} then, {_short(now.get(key))} now" for key in differing
        )
        raise UsageError(f"{said}: {shown}", hint="Use another --out folder, or those settings.")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "…"


class _Journal:
    """journal.jsonl: what is done, by content. A line that a kill cut off is dropped."""

    def __init__(self, fd: int, text: bytes) -> None:
        self._fd = fd
        whole = text[: text.rfind(b"\n") + 1]
        self._size = len(whole)
        os.ftruncate(fd, self._size)
        self.done: dict[str, dict[str, Any]] = {}
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
                self.done[entry["sha256"]] = entry
            except (ValueError, KeyError, TypeError):
                continue  # a damaged line: its clip is encoded again

    def add(self, entry: dict[str, Any]) -> None:
        data = (json.dumps(entry) + "\n").encode()
        durable.append(self._fd, data, size_bytes=self._size, sync=True)
        self._size += len(data)
        self.done[entry["sha256"]] = entry


@contextmanager
def _journal(out: Path) -> Iterator[_Journal]:
    path = out / JOURNAL
    fd = os.open(path, os.O_RDWR | os.O_CREAT | durable.BINARY, 0o666)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise LockedError(
                    f"another process is encoding into {out}", hint="Wait for it, or use another --out."
                ) from error
        yield _Journal(fd, path.read_bytes())
    finally:
        os.close(fd)


def _encode_clips(
    clips: list[Clip],
    out: Path,
    source: ModelSource,
    wanted: Wanted,
    journal: _Journal,
    on_clip: Callable[[int, int, Finding, bool], None],
    should_stop: Callable[[], bool],
) -> list[Finding]:
    inspector, findings = Inspector(wanted), []
    parts: _Parts | None = None
    bad: list[Finding] = []
    for number, clip in enumerate(clips, 1):
        finding, video = inspector.look(clip)
        entry = journal.done.get(finding.sha256)
        had = entry is not None and _is_whole(out, entry)
        if video is not None:
            if not had:
                if parts is None:
                    place = packages.part_folder(source.folder, source.manifest, "vae")
                    codec = registry.load_codec(place, device=source.device, dtype=source.dtype)
                    parts = _Parts(codec, source.device, source.dtype)
                entry = _encode_clip(finding, video, out, parts, wanted)
                journal.add(entry)
            assert entry is not None
            if entry["damage"]:
                finding = inspector.damaged(finding, entry["damage"])
        findings.append(finding)
        on_clip(number, len(clips), finding, had)
        if finding.state in BAD:
            bad.append(finding)
            if len(bad) > wanted.max_bad * len(clips):
                raise too_many_bad(bad, len(clips), wanted.max_bad)
        if should_stop():
            raise loop.Stopped
    return findings


def _is_whole(out: Path, entry: Mapping[str, Any]) -> bool:
    """Whether the shards of a clip are there, with the size they had."""
    try:
        return all(
            (out / "latents" / shard["file"]).stat().st_size == shard["size"] for shard in entry["shards"]
        )
    except (OSError, KeyError, TypeError):
        return False


def _encode_clip(finding: Finding, video: Source, out: Path, parts: _Parts, wanted: Wanted) -> dict[str, Any]:
    """Write the shards of a clip. Returns: its line of the journal."""
    shards: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    blocks: list[int] = []

    def flush() -> None:
        if not tensors:
            return
        name = f"{finding.sha256[:32]}-{len(shards):04d}.safetensors"
        with durable.replacing(out / "latents" / name) as part:
            save_file(tensors, part)
        size = (out / "latents" / name).stat().st_size
        shards.append({"file": name, "size": size, "blocks": list(blocks)})
        tensors.clear()
        blocks.clear()

    frames, message = video.frames(), ""
    try:
        for count in finding.scenes:
            latents, lr = encode_scene(frames, count, parts, wanted.grid)
            tensors[f"{len(blocks)}.latents"], tensors[f"{len(blocks)}.lr"] = latents.half(), lr.half()
            blocks.append(count)
            if sum(t.nbytes for t in tensors.values()) >= SHARD_BYTES:
                flush()
        for _ in frames:  # the rest, which no scene has; damage there counts, too
            pass
        message = damage(video)
    except PackforcingError as error:
        message = _reason(error)
    if message:
        for shard in shards:
            (out / "latents" / shard["file"]).unlink(missing_ok=True)
        return {"sha256": finding.sha256, "shards": [], "damage": message}
    flush()
    return {"sha256": finding.sha256, "shards": shards, "damage": ""}


@torch.no_grad()
def encode_scene(
    frames: Iterator[NDArray[np.uint8]], blocks: int, parts: _Parts, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Encode the next `blocks` blocks of frames [H,W,3] as a video of their own.

    Returns: latents [T,C,F,h,w] and LR latents [T,C,2,h/4,w/4] of decoded pixels, normalised, on the CPU.
    """
    pieces = (np.stack(list(islice(frames, grid.block_frames(n)))) for n in range(blocks))
    decoder, previous = parts.codec.decoder(), None
    latents, lr = [], []
    for z, _ in encode_blocks(parts, pieces, frames_per_block=grid.frames_per_block):
        latents.append(z[0].cpu())
        pooled, previous = lr_pixels(decoder.decode(z), previous)
        lr.append(encode_lr(parts.codec, pooled.to(parts.dtype))[0].cpu())
    return torch.stack(latents), torch.stack(lr)


def _text_path(out: Path, text: str) -> Path:
    return out / "text" / f"{hashlib.sha256(clean(text).encode()).hexdigest()[:32]}.safetensors"


def encode_text(out: Path, source: ModelSource, captions: list[str]) -> None:
    """Write the embeddings of captions and of the empty prompt that are not there."""
    texts = dict.fromkeys([UNCONDITIONAL, *captions])
    missing = [text for text in texts if not _has_text(out, source.text, text)]
    if not missing:
        return
    encoder = source.load_text_encoder()
    for text in missing:
        entry = Encoded(
            text,
            encoder.encode(text).cpu(),
            encoder.unknown_words(text, source.text.vocabulary),
            encoder.num_dropped(text),
        )
        embeddings.write(_text_path(out, text), source.text, {text: entry})


def _has_text(out: Path, identity: TextIdentity, text: str) -> bool:
    try:
        return embeddings.read(_text_path(out, text)).encoder == identity.encoder
    except PackforcingError:
        return False


def _write_dataset(out: Path, source: ModelSource, found: Findings, journal: _Journal) -> None:
    clips = [
        {
            "name": clip.name,
            "sha256": clip.sha256,
            "caption": clip.caption,
            "shards": [
                {"file": shard["file"], "blocks": shard["blocks"]}
                for shard in journal.done[clip.sha256]["shards"]
            ],
            **({"words": [asdict(words) for words in clip.words]} if clip.words else {}),
        }
        for clip in found.used
    ]
    settings = json.loads((out / SETTINGS).read_text("utf-8"))
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    said = (f"{clip['sha256']} {clip['caption']}{json.dumps(clip.get('words', ''))[1:-1]}" for clip in clips)
    for line in sorted(said):
        digest.update(line.encode() + b"\n")
    values = {
        "schema": SCHEMA,
        "settings": settings,
        "sha256": digest.hexdigest(),
        "counts": found.counts,
        "clips": clips,
    }
    durable.write(out / DATASET, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())


# -- what training reads ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """A scene of encoded data: number `index` of a shard, of one clip.

    clip:    its name, and content: the sha256 of its file.
    caption: of its first block.
    words:   of all blocks, where they have captions of their own; None = `caption` throughout.
    """

    clip: str
    content: str
    caption: str
    shard: Path
    index: int
    blocks: int
    words: Words | None = None

    @property
    def captions(self) -> tuple[str, ...]:
        """Of each block."""
        return (self.caption,) * self.blocks if self.words is None else self.words.captions

    @property
    def cuts(self) -> tuple[int, ...]:
        """Blocks that see no recent block."""
        return () if self.words is None else self.words.cuts

    @property
    def script(self) -> timeline.Script:
        """What a rollout needs to show the same."""
        return (self.words or Words((self.caption,))).script


class EncodedData:
    """Encoded clips: scenes with captions, read one at a time.

    Scenes are in the order of their clips' contents, so that a clip may be renamed: what is drawn stays the same.
    Attributes: folder; settings (of settings.json); sha256 over contents, captions and settings; scenes.
    """

    def __init__(self, folder: Path, values: Mapping[str, Any]) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = values["settings"]
        self.sha256: str = values["sha256"]
        self.counts: dict[str, int] = values["counts"]
        scenes: list[Scene] = []
        for clip in sorted(values["clips"], key=lambda clip: str(clip["sha256"])):
            words = iter(clip.get("words", ()))
            for shard in clip["shards"]:
                for index, blocks in enumerate(shard["blocks"]):
                    place = folder / "latents" / shard["file"]
                    scene = Scene(clip["name"], clip["sha256"], clip["caption"], place, index, blocks)
                    if (entry := next(words, None)) is not None:
                        own = Words(tuple(entry["captions"]), tuple(entry["cuts"]))
                        scene = replace(scene, caption=own.captions[0], words=own)
                    scenes.append(scene)
        self.scenes: tuple[Scene, ...] = tuple(scenes)

    @classmethod
    def open(cls, folder: Path) -> EncodedData:
        """Read dataset.json. Raises: UsageError if the folder has none; WeightsError if it is damaged."""
        path = folder / DATASET
        if not path.is_file():
            begun = (folder / SETTINGS).is_file()
            raise UsageError(
                f"{folder} is no encoded data: it has no {DATASET}",
                hint=(
                    "Its encoding was not finished: run that packforcing data encode command again."
                    if begun
                    else "Make it: packforcing data encode CLIPS --out DIR"
                ),
            )
        try:
            values = json.loads(path.read_text("utf-8"))
            if values["schema"] != SCHEMA:
                raise UsageError(f"{path} has schema {values['schema']}, this program reads {SCHEMA}")
            return cls(folder, values)
        except (ValueError, KeyError, TypeError) as error:
            raise WeightsError(
                f"{path} is damaged: {error}", hint="Run packforcing data encode again."
            ) from error

    @staticmethod
    def is_one(folder: Path) -> bool:
        """Whether a folder holds encoded data rather than clips, finished or not."""
        return (folder / DATASET).is_file() or (folder / SETTINGS).is_file()

    def require_fit(self, source: ModelSource) -> None:
        """Raises: UsageError if the data was encoded for another VAE, size or text encoder than a model's."""
        manifest = source.manifest
        settings = self.settings
        now = {
            "vae": manifest.part_hash("vae"),
            "size": list(manifest.size),
            "fps": manifest.fps,
            "frames_per_block": manifest.cache.frames_per_block,
            "text encoder": source.text.encoder,
            "text length": source.text.length,
        }
        text = settings["text"]
        then = {name: settings[name] for name in ("vae", "size", "fps", "frames_per_block")}
        then |= {"text encoder": text["encoder"], "text length": text["length"]}
        require_same(then, now, f"{self.folder} was not encoded for {source.name}")

    def load(self, scene: Scene, blocks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Some blocks of a scene: latents [n,C,F,h,w] and LR latents [n,C,2,h/4,w/4], float32.

        Raises: WeightsError if the shard is missing or damaged.
        """
        try:
            with safe_open(scene.shard, framework="pt") as file:
                latents = file.get_tensor(f"{scene.index}.latents")
                lr = file.get_tensor(f"{scene.index}.lr")
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{scene.shard} cannot be read: {error}", hint="Run packforcing data encode again."
            ) from error
        chosen = list(blocks)
        return latents[chosen].float(), lr[chosen].float()

    @lru_cache(maxsize=512)  # noqa: B019  (lives as long as the training)
    def embedding(self, text: str) -> Tensor:
        """Embeddings [1,T,C] of a caption or of the empty prompt. Raises: WeightsError or UsageError if it is gone."""
        found = embeddings.read(_text_path(self.folder, text))
        return next(iter(found.texts.values())).embeds.float()
