"""The model's own videos as training data, in the form of encoded clips: no data is needed to train on them.

    OUT/settings.json    what all of it depends on: model, settings, length
        latents/…        a file a video, named by prompt and seed, written whole or not at all: latents and LR latents
                         of its blocks, float16
        text/…           prompt embeddings, one file a prompt
        dataset.json     written last; from then on `EncodedData` reads the folder as it reads clips

Videos come from the rollout of inference, with the model's own schedule and memory. A kill costs the video in hand.
Several processes share the videos, each makes every n-th. More videos of the same settings can be made later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from packforcing_cli import durable, packages, rollout
from packforcing_cli.embeddings import UNCONDITIONAL
from packforcing_cli.errors import UsageError
from packforcing_cli.prompts import Prompt
from packforcing_cli.registry import ModelSource, VideoModel
from packforcing_cli.training import data, loop
from packforcing_cli.training.data import EncodedData, Wanted
from packforcing_cli.vae import encode_lr, lr_pixels


def make(
    out: Path,
    source: ModelSource,
    prompts: Sequence[str],
    *,
    count: int,
    blocks: int,
    seed: int,
    workers: loop.Workers,
    quantize: str = "none",
    on_video: Callable[[int, int, str], None] = lambda *_: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> EncodedData:
    """Make the videos that are not in `out` yet. All processes call it; each returns when all videos are there.

    Args:
        prompts:     of which `count` are taken in an order drawn from the seed, from the start again if they run out.
        blocks:      length of a video.
        quantize:    what the source makes of its weights; videos of others are not mixed with these.
        on_video:    told the number of videos this process has made, of how many, and the prompt of the newest.
        should_stop: asked after every block; True raises loop.Stopped, what is whole is kept.
    Raises: UsageError if `out` was made with other settings; GenerationError; DiskFullError.
    """
    chosen = _chosen(prompts, count, seed)
    wanted = replace(
        Wanted.by(source.manifest, source.folder, scene_seconds=24.0), scene_blocks=blocks, enlarge=False
    )
    settings = _settings(source, wanted, quantize)
    names = [_name(settings, seed + n, chosen[n]) for n in range(count)]
    durable.make_folder(out / "latents")
    durable.make_folder(out / "text")
    if workers.rank == 0:
        _settle(out, settings)
        data.encode_text(out, source, chosen)
    workers.any_wants(False)  # the others wait here
    mine = [n for n in range(workers.rank, count, workers.count) if not _is_whole(out / "latents" / names[n])]
    model: VideoModel | None = None
    for done, n in enumerate(mine, 1):
        if model is None:
            model = source.load()
        tensors = _video(model, out, chosen[n], blocks, seed + n, should_stop)
        with durable.replacing(out / "latents" / names[n]) as part:
            save_file(tensors, part, {"prompt": chosen[n]})  # one entry: several come in any order
        on_video(done, len(mine), chosen[n])
    workers.any_wants(False)
    if workers.rank == 0:
        _write_dataset(out, settings, chosen, names, blocks)
    workers.any_wants(False)
    return EncodedData.open(out)


def _chosen(prompts: Sequence[str], count: int, seed: int) -> list[str]:
    different = list(dict.fromkeys(prompts))
    order = torch.randperm(len(different), generator=loop.step_generator(seed, -1)).tolist()
    return [different[order[n % len(order)]] for n in range(count)]


def _settings(source: ModelSource, wanted: Wanted, quantize: str) -> dict[str, Any]:
    """What all videos depend on; prompt and seed are each one's own."""
    files = dict(source.manifest.files)
    for part, reference in source.manifest.references.items():
        files |= {f"{part}/{name}": record for name, record in reference.files.items()}
    own = {
        "rollouts": True,
        "quantize_frozen": quantize,
        "weights": packages.hash_of(files),
        "cache": source.manifest.cache.model_dump(mode="json"),
        "schedule": source.manifest.schedule.model_dump(mode="json"),
    }
    result: dict[str, Any] = json.loads(json.dumps(own | data.settings_of(source, wanted)))
    return result


def _settle(out: Path, settings: dict[str, Any]) -> None:
    """Write settings.json, or compare with the one that is there."""
    path = out / data.SETTINGS
    if not path.is_file():
        durable.write(path, (json.dumps(settings, indent=2) + "\n").encode())
        return
    try:
        there = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} cannot be read: {error}", hint="Use another --out.") from error
    data.require_same(there, settings, f"{out} was made with other settings")


def _name(settings: dict[str, Any], seed: int, prompt: str) -> str:
    digest = hashlib.sha256(json.dumps([settings, seed, prompt], sort_keys=True).encode()).hexdigest()
    return f"{digest[:32]}.safetensors"


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return {*file.keys()} == {"0.latents", "0.lr"}
    except (SafetensorError, OSError):
        return False


@torch.no_grad()
def _video(
    model: VideoModel, out: Path, prompt: str, blocks: int, seed: int, should_stop: Callable[[], bool]
) -> dict[str, Tensor]:
    """A video's latents [T,C,F,h,w] and LR latents [T,C,2,h/4,w/4], float16, by their names in a shard."""
    there = EncodedData(out, {"settings": {}, "sha256": "", "counts": {}, "clips": []})
    guided = model.manifest.schedule.guidance != 1.0

    def embeds(text: str) -> Tensor:
        return there.embedding(text).to(model.device, model.dtype)

    story = Prompt(prompt, embeds(prompt), embeds(UNCONDITIONAL) if guided else None)
    decoder, previous = model.codec.decoder(), None
    latents, lr = [], []
    for block in rollout.stream_generate(model, story, num_blocks=blocks, seed=seed):
        latents.append(block.latents[0].cpu())
        pooled, previous = lr_pixels(decoder.decode(block.latents), previous)
        lr.append(encode_lr(model.codec, pooled.to(model.dtype))[0].cpu())
        if should_stop():
            raise loop.Stopped
    return {"0.latents": torch.stack(latents).half(), "0.lr": torch.stack(lr).half()}


def _write_dataset(
    out: Path, settings: dict[str, Any], chosen: Sequence[str], names: Sequence[str], blocks: int
) -> None:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    clips = []
    for n, (prompt, name) in enumerate(zip(chosen, names, strict=True)):
        content = data.file_sha256(out / "latents" / name)
        digest.update(f"{content} {prompt}\n".encode())
        shard = {"file": name, "blocks": [blocks]}
        clips.append({"name": f"rollout-{n:05d}", "sha256": content, "caption": prompt, "shards": [shard]})
    values = {
        "schema": data.SCHEMA,
        "settings": settings,
        "sha256": digest.hexdigest(),
        "counts": {"used": len(clips)},
        "clips": clips,
    }
    durable.write(out / data.DATASET, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())
