"""Prompt embeddings on disk: the user's cache of them, and files made on purpose. One format for both.

    key.safetensors     "0", "1", ... [n,C]: the embeddings of each text up to the last position that is not zero
                        metadata: JSON with schema, encoder, length T and, for each text, itself, words unknown,
                        tokens dropped, sha256 of its tensor

An entry of the cache is such a file with one text, named by a hash of it and of `TextIdentity`; the encoder is known by
the hashes in the package's manifest, so nothing is hashed anew. Damage is no error in the cache (the entry is computed
and written again) and always one in a file. Knows no models and no downloads.

Letters: T positions of a text, C channels of the encoder, n positions used.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from packforcing_cli import durable
from packforcing_cli.errors import REINSTALL, DiskFullError, PackforcingError, UsageError, WeightsError
from packforcing_cli.text import Encoder, TextIdentity, clean

FORMAT = "packforcing-embeddings"  # the key of the metadata, which is one JSON text: its bytes have one order
SCHEMA = 1
CACHE_BYTES = 500_000_000  # of the cache's folder; a prompt of 50 words takes about 0.6 MB with UMT5-XXL
STALE_SECONDS = 3600.0  # age of an unfinished file that nobody is writing any more
UNCONDITIONAL = ""  # the text of the unconditional pass of guidance

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoded:
    """One text.

    embeds:  [1,T,C] on the CPU or wherever the model runs.
    unknown: words the model cannot understand.  dropped: tokens at the end that did not fit.
    """

    text: str
    embeds: Tensor
    unknown: tuple[str, ...] = ()
    dropped: int = 0


def encode(
    texts: Iterable[str], identity: TextIdentity, load: Callable[[], Encoder], *, cache: EmbeddingCache | None
) -> dict[str, Encoded]:
    """Embed texts, each once, on the CPU; the encoder is loaded only for those the cache does not have.

    Args:
        load:  gives the encoder; it is dropped before this returns.
        cache: None = neither read nor written.
    """
    found: dict[str, Encoded] = {}
    missing: list[str] = []
    for text in dict.fromkeys(texts):
        entry = cache.get(identity, text) if cache is not None and identity.encoder else None
        if entry is None:
            missing.append(text)
        else:
            found[text] = entry
    if missing:
        encoder = load()
        for text in missing:
            embeds = encoder.encode(text).cpu()
            if embeds.shape[2] != identity.width:
                raise WeightsError(
                    f"the text encoder makes embeddings of width {embeds.shape[2]}, the transformer takes"
                    f" {identity.width}",
                    hint="They belong to different models.",
                )
            unknown = encoder.unknown_words(text, identity.vocabulary)
            found[text] = Encoded(text, embeds, unknown, encoder.num_dropped(text))
            if cache is not None and identity.encoder:
                cache.put(identity, found[text])
        del encoder
        gc.collect()  # transformers' models refer to themselves; gigabytes must not wait for the collector
    return found


# ------------------------------------------------------------------------------------------------------- the cache


class EmbeddingCache:
    """Embeddings of prompts in a folder of bounded size; what was not used for longest goes first.

    Several processes may use it at once: entries are written beside and renamed. It never makes a run fail; where it
    cannot be written a warning is logged.
    """

    def __init__(self, folder: Path, *, max_bytes: int = CACHE_BYTES) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    @classmethod
    def of_user(cls) -> EmbeddingCache:
        """The cache where the platform keeps such things."""
        import platformdirs

        return cls(platformdirs.user_cache_path("packforcing", appauthor=False) / "embeddings")

    def get(self, identity: TextIdentity, text: str) -> Encoded | None:
        """The entry of a text, or None if there is none or it is damaged."""
        cleaned = clean(text)
        path = self._path(identity, cleaned)
        try:
            entry = read(path).texts[cleaned]
            os.utime(path)
        except (OSError, PackforcingError, KeyError):
            return None
        return Encoded(text, entry.embeds, entry.unknown, entry.dropped)

    def put(self, identity: TextIdentity, entry: Encoded) -> None:
        """Keep an entry; then remove the oldest until the folder is within its size."""
        if not bool(entry.embeds.isfinite().all()):
            return
        cleaned = clean(entry.text)
        kept = Encoded(cleaned, entry.embeds, entry.unknown, entry.dropped)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self._path(identity, cleaned), identity, {cleaned: kept})
            self._prune()
        except (OSError, SafetensorError) as error:
            _log.warning("prompt embeddings cannot be kept in %s: %s", self.folder, error)

    def _path(self, identity: TextIdentity, cleaned: str) -> Path:
        return self.folder / f"{_key(identity, cleaned)}.safetensors"

    def _prune(self) -> None:
        entries: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # another process was faster
                state = path.stat()
                if path.suffix == ".part" and time.time() - state.st_mtime > STALE_SECONDS:
                    path.unlink()
                elif path.suffix == ".safetensors":
                    entries.append((state.st_mtime, state.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size


# ------------------------------------------------------------------------------------------------------------ files


@dataclass(frozen=True)
class EmbeddingFile:
    """What a file holds.

    encoder: hash of the encoder that made it, as `TextIdentity.encoder`.
    length:  T.
    texts:   text -> embeddings, in the order they were written; `UNCONDITIONAL` is among them in files for people.
    """

    path: Path
    encoder: str
    length: int
    texts: Mapping[str, Encoded]

    @property
    def prompts(self) -> tuple[str, ...]:
        """The texts without the unconditional one."""
        return tuple(text for text in self.texts if text != UNCONDITIONAL)

    def require_fit(self, identity: TextIdentity, *, model: str) -> None:
        """Raises: WeightsError if these embeddings are not those a model was made for."""
        again = f"Make them again: packforcing models embed PROMPT -o FILE --model {model}"
        width = next(iter(self.texts.values())).embeds.shape[2]
        if width != identity.width:
            raise WeightsError(
                f"the embeddings in {self.path} have a width of {width}, {model} takes {identity.width}",
                hint=again,
            )
        if self.length != identity.length:
            raise WeightsError(
                f"the embeddings in {self.path} are of {self.length} tokens, {model} takes {identity.length}",
                hint=again,
            )
        if self.encoder != identity.encoder:
            raise WeightsError(
                f"the embeddings in {self.path} were made by another text encoder than that of {model}",
                hint=again,
            )

    def choose(self, texts: Iterable[str]) -> dict[str, Encoded]:
        """The embeddings of these texts. Raises: UsageError naming one the file does not have."""
        by_clean = {clean(text): entry for text, entry in self.texts.items()}
        found: dict[str, Encoded] = {}
        for text in texts:
            entry = by_clean.get(clean(text))
            if entry is None:
                known = ", ".join(repr(prompt) for prompt in self.prompts[:3])
                raise UsageError(
                    f"{self.path} has no embeddings of {text!r}; it has {known}"
                    + (f" and {len(self.prompts) - 3} more" if len(self.prompts) > 3 else ""),
                    hint="Give one of its prompts, or make a file with packforcing models embed.",
                )
            found[text] = Encoded(text, entry.embeds, entry.unknown, entry.dropped)
        return found


def write(path: Path, identity: TextIdentity, texts: Mapping[str, Encoded]) -> None:
    """Write embeddings into a file, all of it or nothing. Raises: DiskFullError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, identity, texts)
    except (OSError, SafetensorError) as error:
        if durable.is_full_disk(error):
            raise DiskFullError(f"no space left to write {path}", hint="Free some space.") from error
        raise UsageError(f"{path} cannot be written: {error}", hint="Choose another file.") from error


def _write(path: Path, identity: TextIdentity, texts: Mapping[str, Encoded]) -> None:
    tensors: dict[str, Tensor] = {}
    listed: list[dict[str, Any]] = []
    for index, entry in enumerate(texts.values()):
        used = entry.embeds[0].ne(0).any(-1).nonzero()
        tensor = entry.embeds[0, : int(used.max()) + 1 if len(used) else 0].cpu().contiguous()
        tensors[str(index)] = tensor
        listed.append(
            {
                "text": entry.text,
                "unknown": list(entry.unknown),
                "dropped": entry.dropped,
                "sha256": _hash(tensor),
            }
        )
    values = {"schema": SCHEMA, "encoder": identity.encoder, "length": identity.length, "texts": listed}
    metadata = {FORMAT: json.dumps(values, ensure_ascii=False)}
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        part.touch()
        mode = part.stat().st_mode
        save_file(tensors, part, metadata=metadata)
        part.chmod(mode)  # safetensors makes files for their owner alone
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path) -> EmbeddingFile:
    """Read a file of embeddings. Raises: UsageError if there is none; WeightsError if it is damaged or no such file."""
    if not path.is_file():
        raise UsageError(f"there is no file {path}", hint="Make one: packforcing models embed PROMPT -o FILE")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            values = json.loads((file.metadata() or {})[FORMAT])
            if values["schema"] != SCHEMA:
                raise WeightsError(
                    f"{path} has schema {values['schema']}; this program reads {SCHEMA}",
                    hint=f"{REINSTALL.capitalize()}.",
                )
            encoder, length = str(values["encoder"]), int(values["length"])
            texts: dict[str, Encoded] = {}
            for index, listed in enumerate(values["texts"]):
                tensor = file.get_tensor(str(index))
                if _hash(tensor) != listed["sha256"] or tensor.ndim != 2 or len(tensor) > length:
                    raise WeightsError(f"{path} is damaged", hint="Make it again: packforcing models embed")
                embeds = tensor.new_zeros(1, length, tensor.shape[1])
                embeds[0, : len(tensor)] = tensor
                texts[listed["text"]] = Encoded(
                    listed["text"], embeds, tuple(listed["unknown"]), int(listed["dropped"])
                )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path} is not a file of prompt embeddings: {error}", hint="Make one: packforcing models embed"
        ) from error
    if not texts:
        raise WeightsError(f"{path} holds no embeddings", hint="Make one: packforcing models embed")
    return EmbeddingFile(path, encoder, length, texts)


def _key(identity: TextIdentity, text: str) -> str:
    """Name of the cache entry of a clean text."""
    values = {"schema": SCHEMA, "text": text, **asdict(identity)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
