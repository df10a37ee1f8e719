"""CLIP score: how well a video still shows what its prompt says, for every ten seconds.

    frame a second --> CLIP's picture encoder --+
                                                +--> 100 * cosine --> mean over each segment
    prompt at that time --> CLIP's text encoder-+

The weights are a `transformers` CLIPModel, from a folder or the Hub, safetensors only. Pictures are prepared here, by
the numbers of the model's preprocessor_config.json, because transformers' own processors ask for torchvision in some
versions and not in others; the tests compare. Knows no run folders and no display.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from packforcing_cli import metrics, weights
from packforcing_cli.errors import OfflineError, UsageError, WeightsError
from packforcing_cli.hub import Hub, RepoFile, Snapshot, snapshot_folder
from packforcing_cli.packages import HubSource
from packforcing_cli.quiet import known_import_noise_dropped

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase

EVERY_SECONDS = 1.0  # how often a frame is looked at; the papers do not tell theirs
BATCH = 16  # frames in one call
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICTURES = "preprocessor_config.json"
REQUIRED = (weights.CONFIG, PICTURES)
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # one of these sets
OPTIONAL = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
EXAMPLE = "openai/clip-vit-large-patch14"
_ONCE_ONLINE = "Run it once with the network on, or give --clip a folder."
_OWNER_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")


@dataclass(frozen=True)
class ClipScores:
    """CLIP scores of one video.

    model:      the folder or hf:owner/name@commit they were made with.
    times, values: of every frame that was looked at; seconds, score.
    by_segment: mean of each segment; NaN where no frame fell into it.
    notes:      sentences about prompts that were cut.
    """

    model: str
    times: tuple[float, ...]
    values: tuple[float, ...]
    by_segment: tuple[float, ...]
    notes: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def drop(self) -> float:
        """First segment less the last."""
        return self.by_segment[0] - self.by_segment[-1]

    def to_json(self) -> dict[str, Any]:
        def plain(value: float) -> float | None:
            return round(value, 4) if math.isfinite(value) else None

        return {
            "model": self.model,
            "mean": plain(self.mean),
            "by_segment": [plain(value) for value in self.by_segment],
            "drop": plain(self.drop),
            "seconds": list(self.times),
            "values": [plain(value) for value in self.values],
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Preparation:
    """What a CLIP model wants a picture to be: preprocessor_config.json.

    short: px of the short side; size: (height, width) that is cut from its middle; mean, std: of RGB in 0 to 1.
    """

    short: int
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = 3

    @classmethod
    def read(cls, folder: Path) -> Preparation:
        """Raises: WeightsError if the file is missing or says something that is not CLIP's preparation."""
        path = folder / PICTURES
        try:
            values = json.loads(path.read_text("utf-8"))
            size, crop = values["size"], values["crop_size"]
            steps = ("do_resize", "do_center_crop", "do_normalize", "do_rescale")
            if not all(values.get(step, True) for step in steps):
                raise ValueError(f"not all of {', '.join(steps)}")
            if abs(values.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-6:
                raise ValueError(f"rescale_factor {values['rescale_factor']}")
            found = cls(
                short=int(size["shortest_edge"] if isinstance(size, dict) else size),
                size=(crop["height"], crop["width"]) if isinstance(crop, dict) else (int(crop), int(crop)),
                mean=tuple(float(v) for v in values["image_mean"]),
                std=tuple(float(v) for v in values["image_std"]),
                resample=int(values.get("resample", 3)),
            )
            if len(found.mean) != 3 or len(found.std) != 3 or min(*found.std, found.short, *found.size) <= 0:
                raise ValueError("numbers that are not possible")
            return found
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            said = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise WeightsError(
                f"{path} does not say how CLIP wants its pictures: {said}",
                hint="Give a CLIP model as transformers saves it, with its processor.",
            ) from error

    def __call__(self, frame: NDArray[np.uint8]) -> Tensor:
        """[H, W, 3] uint8 -> [3, h, w]: short side to its size, middle cut out, normalised."""
        from PIL import Image

        height, width = frame.shape[:2]
        scaled = (
            (self.short, int(self.short * height / width))
            if width <= height
            else (int(self.short * width / height), self.short)
        )
        image = Image.fromarray(frame).resize(scaled, Image.Resampling(self.resample))
        pixels = np.asarray(image, dtype=np.float32) / 255
        rows, cols = self.size
        # Where the picture is smaller than the cut, black is around it.
        short_of = max(0, rows - pixels.shape[0]), max(0, cols - pixels.shape[1])
        pixels = np.pad(pixels, [((n + 1) // 2, n // 2) for n in short_of] + [(0, 0)])
        top, left = (pixels.shape[0] - rows) // 2, (pixels.shape[1] - cols) // 2
        mean, std = (np.array(values, dtype=np.float32) for values in (self.mean, self.std))
        cut = (pixels[top : top + rows, left : left + cols] - mean) / std
        return torch.from_numpy(np.ascontiguousarray(cut.transpose(2, 0, 1)))


class ClipScorer:
    """A loaded CLIP model. name: what `ClipScores.model` says."""

    def __init__(
        self, model: CLIPModel, tokenizer: PreTrainedTokenizerBase, prepare: Preparation, *, name: str
    ) -> None:
        self.model, self.tokenizer, self.prepare, self.name = model.eval(), tokenizer, prepare, name
        self._length = int(model.config.text_config.max_position_embeddings)
        self._texts: dict[str, Tensor] = {}

    @classmethod
    def load(cls, folder: Path, *, name: str = "", device: torch.device | str = "cpu") -> ClipScorer:
        """Read a CLIP model, its tokenizer and its preparation from a folder; nothing is downloaded.

        Raises: WeightsError if something is missing, damaged or not CLIP.
        """
        config = weights.read_config(folder)
        if config.get("model_type") != "clip":
            raise WeightsError(
                f"{folder} is not a CLIP model (model_type {config.get('model_type')!r})",
                hint=f"Give one, for example {EXAMPLE}.",
            )
        require_safetensors(folder)
        prepare = Preparation.read(folder)
        again = "Download it again, or save it again with transformers."
        with known_import_noise_dropped():
            from transformers import CLIPModel, CLIPTokenizerFast
            from transformers.utils import logging as talk
        bars, level = talk.is_progress_bar_enabled(), talk.get_verbosity()
        talk.disable_progress_bar()
        talk.set_verbosity(logging.CRITICAL)
        try:
            model, found = CLIPModel.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
            tokenizer = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
        except (
            Exception
        ) as error:  # safetensors, tokenizers and transformers raise anything for damaged files
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise WeightsError(f"{folder} cannot be loaded as a CLIP model: {said}", hint=again) from error
        finally:
            talk.set_verbosity(level)
            if bars:
                talk.enable_progress_bar()
        wrong = sorted(found["missing_keys"]) + sorted(str(key) for key in found.get("mismatched_keys", ()))
        if wrong:
            raise WeightsError(
                f"{folder} lacks weights of CLIP: {', '.join(wrong[:3])}{' …' if len(wrong) > 3 else ''}",
                hint=again,
            )
        return cls(model.to(device), tokenizer, prepare, name=name or str(folder))

    @torch.no_grad()
    def embed_images(self, frames: Sequence[NDArray[np.uint8]]) -> Tensor:
        """[H, W, 3] uint8 each -> [n, C]."""
        pixels = torch.stack([self.prepare(frame) for frame in frames]).to(self.model.device)
        hidden = self.model.vision_model(pixel_values=pixels).pooler_output
        return self.model.visual_projection(hidden)

    @torch.no_grad()
    def embed_text(self, prompt: str) -> Tensor:
        """[1, C]; a prompt longer than the model's 77 tokens is cut there."""
        if prompt not in self._texts:
            tokens = self.tokenizer(
                [prompt], truncation=True, max_length=self._length, return_tensors="pt"
            ).to(self.model.device)
            hidden = self.model.text_model(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
            self._texts[prompt] = self.model.text_projection(hidden)
        return self._texts[prompt]

    def num_dropped(self, prompt: str) -> int:
        """Tokens at the end of a prompt that the model cannot read."""
        ids = self.tokenizer(prompt, truncation=False, verbose=False)["input_ids"]
        return max(0, len(ids) - self._length)

    def score(
        self,
        frames: Iterable[tuple[float, NDArray[np.uint8]]],
        prompt_at: Callable[[float], str],
        segments: Sequence[tuple[float, float]],
        *,
        progress: Callable[[float], None] = lambda seconds: None,
    ) -> ClipScores:
        """Score frames against the prompt of their time.

        Args:
            frames:    (seconds, [H, W, 3] uint8), rising; `metrics.sampled` with EVERY_SECONDS.
            prompt_at: the prompt that is valid at a time.
            segments:  (start, end) in seconds.
            progress:  is told the seconds that are done.
        """
        times: list[float] = []
        values: list[float] = []
        waiting: list[tuple[float, NDArray[np.uint8]]] = []

        def flush() -> None:
            texts = torch.cat([self.embed_text(prompt_at(time)) for time, _ in waiting]).float().cpu()
            images = self.embed_images([frame for _, frame in waiting]).float().cpu()
            values.extend(metrics.clip_score(images.numpy(), texts.numpy()).tolist())
            times.extend(time for time, _ in waiting)
            waiting.clear()
            progress(times[-1])

        for time, frame in frames:
            waiting.append((time, frame))
            if len(waiting) == BATCH:
                flush()
        if waiting:
            flush()
        means = []
        for start, end in segments:
            inside = [value for time, value in zip(times, values) if start <= time < end]
            means.append(float(np.mean(inside)) if inside else math.nan)
        cut = {prompt: self.num_dropped(prompt) for prompt in dict.fromkeys(map(prompt_at, times))}
        notes = tuple(
            f"CLIP reads {self._length} tokens: the last {count} of {prompt[:40]!r} do not count"
            for prompt, count in cut.items()
            if count
        )
        return ClipScores(self.name, tuple(times), tuple(values), tuple(means), notes)


# ----------------------------------------------------------------------------------------------------- the files


def require_safetensors(folder: Path) -> None:
    """Raises: WeightsError if the weights or their shards are missing, or are pickled only."""
    if (folder / INDEX).is_file():
        weights.weight_files(folder)
    elif not (folder / WEIGHTS).is_file():
        raise _no_safetensors(str(folder), pickled=any(folder.glob("*.bin")))


def find(
    place: str, hub: Hub, *, advance: Callable[[str, int], None] = lambda name, size: None
) -> tuple[Path, str]:
    """The folder of a CLIP model, downloaded if need be, and its name.

    Args:
        place:   a folder, or hf:owner/name[@revision]; owner/name alone means the latter if there is no such folder.
        advance: called with a file's name and the bytes gained.
    Returns: the folder; `place`, or hf:owner/name@commit.
    Raises: UsageError if there is no such place; OfflineError; WeightsError for a repository that is not CLIP's or has
        pickled weights only; DiskFullError.
    """
    folder = Path(place).expanduser()
    if folder.is_dir():
        return folder, place
    source = HubSource.parse(
        place if place.startswith("hf:") else f"hf:{place}" if _OWNER_NAME.fullmatch(place) else ""
    )
    if source is None:
        raise UsageError(
            f"--clip {place}: there is no such folder",
            hint=f"Give a folder or a repository of the Hub, for example --clip {EXAMPLE}.",
        )
    try:
        at = hub.snapshot(source.repo, source.revision)
    except OfflineError as error:
        if hub.offline:
            error.hint = _ONCE_ONLINE
        raise
    name = f"hf:{source.repo}@{at.commit}"
    files = wanted_files(at, name, offline=hub.offline)
    for file in files:
        hub.fetch(at.repo, at.commit, file, lambda size, name=file.path: advance(name, size))  # type: ignore[misc]
    index = next((file for file in files if file.path == INDEX), None)
    if index is not None:
        folder = snapshot_folder(at.repo, at.commit)
        try:
            shards = sorted(set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values()))
            missing = [shard for shard in shards if shard not in at.files]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise WeightsError(
                f"{INDEX} of {name} is damaged: {error}", hint="Give another model."
            ) from error
        if missing:
            raise _incomplete(name, missing, offline=hub.offline)
        for shard in shards:
            hub.fetch(at.repo, at.commit, at.files[shard], lambda size, name=shard: advance(name, size))  # type: ignore[misc]
    return snapshot_folder(at.repo, at.commit), name


def wanted_files(at: Snapshot, name: str, *, offline: bool) -> tuple[RepoFile, ...]:
    """Which files of a repository a CLIP model is read from, shards excepted.

    Raises: OfflineError if some are not on this machine; WeightsError if the repository lacks them.
    """
    missing = [path for path in REQUIRED if path not in at.files]
    tokenizer = next((names for names in TOKENIZERS if all(path in at.files for path in names)), None)
    if tokenizer is None:
        missing.append(TOKENIZERS[0][0])
    stored = next((path for path in (WEIGHTS, INDEX) if path in at.files), None)
    if stored is None and not missing and not offline:
        raise _no_safetensors(name, pickled=any(path.endswith(".bin") for path in at.files))
    if stored is None:
        missing.append(WEIGHTS)
    if missing:
        raise _incomplete(name, missing, offline=offline)
    extra = [path for path in OPTIONAL if path in at.files]
    return tuple(at.files[path] for path in (*REQUIRED, *(tokenizer or ()), *extra, stored or WEIGHTS))


def _incomplete(name: str, missing: Sequence[str], *, offline: bool) -> OfflineError | WeightsError:
    if offline:
        return OfflineError(
            f"{', '.join(missing)} of {name} is not on this machine, and the network is switched off",
            hint=_ONCE_ONLINE,
        )
    return WeightsError(
        f"{name} is not a CLIP model: it lacks {', '.join(missing)}", hint=f"For example {EXAMPLE}."
    )


def _no_safetensors(name: str, *, pickled: bool) -> WeightsError:
    what = (
        "holds pickled weights only, which can run code when they are read"
        if pickled
        else f"has no {WEIGHTS}"
    )
    return WeightsError(f"{name} {what}", hint=f"Give a CLIP model with safetensors, for example {EXAMPLE}.")
