"""Score a demo package with the exact detectors of its world: held-out prompts, fixed seeds, early and late windows.

    python -m packforcing_cli.training.score --model demo --out scores.jsonl --prompts 48 --seeds 2 --seconds 60

One line a video is appended to --out as soon as it is scored, so a stopped run goes on where it was. The summary (a
share with its 95 % Wilson interval for every word and window) is printed as JSON. The suite with policies and
ablations is `packforcing eval`, which is to come.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from packforcing_cli import durable
from packforcing_cli.config import MemoryOptions
from packforcing_cli.errors import UsageError
from packforcing_cli.registry import MANIFEST, VideoModel, load_model, read_manifest
from packforcing_cli.rollout import grid_for, stream_generate
from packforcing_cli.training import detectors, world

WORDS = ("background", "colour", "direction", "shape")
WINDOW_SECONDS = 5


def held_out_prompts(count: int) -> list[str]:
    """`count` held-out captions, spread evenly over all of them."""
    captions = world.held_out_captions()
    return [captions[n * len(captions) // count] for n in range(min(count, len(captions)))]


def score_video(
    model: VideoModel, prompt: str, *, seed: int, seconds: float, memory: MemoryOptions
) -> dict[str, Any]:
    """Generate one video and read its first and last five seconds.

    Returns: for each window the words that are right, the outline quality (0..1), and for the last window the
    correlation of its background with the first window's and the background's drift in levels of 255.
    """
    grid = grid_for(model, model.manifest.size)
    num_blocks, fps = grid.blocks_for(seconds, model.manifest.fps), model.manifest.fps
    total, span = grid.frames_for(num_blocks), WINDOW_SECONDS * model.manifest.fps
    started, frames, done = time.perf_counter(), [], 0
    for block in stream_generate(model, prompt, num_blocks=num_blocks, seed=seed, memory=memory):
        if done < span or done + len(block.frames) > total - span:
            frames.append(block.frames)
        done += len(block.frames)
    clip = torch.cat(frames)
    first, last = clip[:span], clip[-span:]
    record: dict[str, Any] = {"prompt": prompt, "seed": seed, "seconds": total / fps}
    for name, window in (("first", first), ("last", last)):
        seen = detectors.detect(window)
        record[name] = {
            **detectors.score(seen, prompt),
            "outline": round(seen.outline, 3),
            "area": round(seen.area),
        }
    pictures = [detectors.background_picture(window) for window in (first, last)]
    record["background_correlation"] = round(detectors.background_correlation(*pictures), 3)
    record["background_drift"] = round(detectors.background_drift(*pictures), 2)
    record["wall_seconds"] = round(time.perf_counter() - started, 1)
    return record


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share."""
    if count == 0:
        return 0.0, 1.0
    z = 1.959964
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return middle - half, middle + half


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares with intervals by window and word, medians of the background measures."""
    summary: dict[str, Any] = {"videos": len(records)}
    for window in ("first", "last"):
        shares = {}
        for word in (*WORDS, "present", "all"):
            right = sum(bool(record[window][word]) for record in records)
            low, high = wilson(right, len(records))
            shares[word] = {
                "share": round(right / len(records), 3),
                "interval": [round(low, 3), round(high, 3)],
            }
        summary[window] = shares
        summary[window]["outline"] = round(_median(r[window]["outline"] for r in records), 3)
    for name in ("background_correlation", "background_drift", "wall_seconds"):
        summary[name] = round(_median(record[name] for record in records), 3)
    return summary


def _median(values: Iterable[float]) -> float:
    return float(torch.tensor(list(values), dtype=torch.float64).median())


def record_in_package(folder: Path, scores: dict[str, Any]) -> None:
    """Put a summary into the manifest of a package, as `provenance.scores`; nothing else in it changes."""
    manifest = read_manifest(folder)
    changed = manifest.model_copy(update={"provenance": {**manifest.provenance, "scores": scores}})
    durable.write(folder / MANIFEST, changed.to_json().encode())


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0, help="to share seeds among processes")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--policy", default="packforcing")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--record", type=Path, default=None, help="package folder whose manifest takes the summary"
    )
    values = parser.parse_args(arguments)
    if values.threads:
        torch.set_num_threads(values.threads)
    model = load_model(values.model)
    memory = MemoryOptions(policy=values.policy)
    weights = model.manifest.files["transformer/diffusion_pytorch_model.safetensors"].sha256[:16]
    setting = {"weights": weights, "policy": values.policy, "seconds": values.seconds}
    known = (
        [json.loads(line) for line in values.out.read_text("utf-8").splitlines()]
        if values.out.exists()
        else []
    )
    if any(record["setting"] != setting for record in known):
        raise UsageError(
            f"{values.out} holds scores of another setting than {setting}", hint="Use another --out."
        )
    wanted = [
        (prompt, 1000 * (seed + 1) + number)
        for seed in range(values.first_seed, values.first_seed + values.seeds)
        for number, prompt in enumerate(held_out_prompts(values.prompts))
    ]
    records = [record for record in known if (record["prompt"], record["seed"]) in wanted]
    done = {(record["prompt"], record["seed"]) for record in records}
    with values.out.open("a", encoding="utf-8") as handle:
        for prompt, seed in wanted:
            if (prompt, seed) not in done:
                record = score_video(model, prompt, seed=seed, seconds=values.seconds, memory=memory)
                records.append({"setting": setting, **record})
                handle.write(json.dumps(records[-1]) + "\n")
                handle.flush()
                print(f"{len(records)}: {prompt} -> {record['last']}", file=sys.stderr)
    summary = {**setting, **summarise(records)}
    if values.record is not None:
        record_in_package(values.record, summary)
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
