"""Train the demo's autoencoder on rendered scenes.

Half of what it must do is unusual: the compressor's LR branch re-encodes frames shrunk 4x, so part of every batch is
4x4-pooled scenes. After training the per-channel mean and standard deviation of raw latents are measured and stored in
the configuration, so that the transformer works on normalised latents.

Losses: L1 + 2 MSE on unclamped pixels, the same kind of error of frame differences, a small penalty on z^2, noise on z
before decoding. Without the differences the two frames that are folded together are learned as
one, and everything moves at half the frame rate for a long time.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from packforcing_cli import durable
from packforcing_cli.errors import UsageError
from packforcing_cli.training import loop, world
from packforcing_cli.training.recipes import DemoVae
from packforcing_cli.vae import TinyAutoencoder, TinyAutoencoderConfig


def build(recipe: DemoVae) -> TinyAutoencoder:
    """Model of the recipe, initialised from its seed. Raises: UsageError for impossible sizes."""
    torch.manual_seed(recipe.train.seed)
    try:
        return TinyAutoencoder(TinyAutoencoderConfig.from_dict(recipe.model))
    except ValueError as error:
        raise UsageError(f"recipe model: {error}") from error


def draw_clips(generator: torch.Generator, count: int, frames: int) -> Tensor:
    """Random windows of random training scenes. Returns: [count, 3, frames, H, W] float32 in [0, 1]."""
    scenes = [world.sample_scene(generator) for _ in range(count)]
    starts = torch.randint(0, 160, (count,), generator=generator).tolist()
    pixels = world.render_batch(scenes, starts, frames)
    return pixels.permute(0, 4, 1, 2, 3).float() / 255


def psnr(model: TinyAutoencoder, pixels: Tensor) -> float:
    """Peak signal-to-noise ratio of a round trip in dB, pixels [B,3,T,H,W] in [0, 1]."""
    with torch.no_grad():
        out = model.decode(model.encode(pixels))
    return float(-10 * torch.log10(F.mse_loss(out, pixels)))


def latent_statistics(model: TinyAutoencoder, seed: int, clips: int = 64) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of raw latents over random scenes."""
    generator = loop.step_generator(seed, -1)
    with torch.no_grad():
        z = torch.cat([model.encode(draw_clips(generator, 8, 29)) for _ in range(clips // 8)])
    return z.mean((0, 2, 3, 4)).tolist(), z.std((0, 2, 3, 4)).tolist()


def train(
    recipe: DemoVae,
    out: Path,
    *,
    accept: bool = False,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Run or resume the recipe in `out`; the result is `out/vae/` (config.json, weights).

    Args:
        accept:      go on from checkpoints of another recipe, and say so in the log.
        on_log:      told every line of the log.
        should_stop: asked after every step; True ends with a checkpoint.
    Returns: the figures; without "result" when it was stopped.
    """
    settings = recipe.train
    if settings.threads:
        torch.set_num_threads(settings.threads)
    workers = loop.Workers.start()
    model = build(recipe).to(workers.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay
    )
    modules = {"vae": model}
    state = loop.TrainingState(modules, loop.MovingAverage(modules, settings.average), [optimizer])
    own: dict[str, Any] = {"workers": workers.count}  # each draws scenes of its own
    facts = loop.facts_of(recipe.model_dump(mode="json")) | own
    with loop.Log(out / f"metrics{workers.rank or ''}.jsonl", on_log) as log:
        finished = loop.run(
            state,
            settings,
            lambda generator: _loss(model, recipe, generator),
            out=out,
            facts=facts,
            accept=accept,
            workers=workers,
            log=log,
            evaluate=lambda: evaluate(recipe, state),
            should_stop=should_stop,
        )
        figures: dict[str, Any] = {"steps": state.step}
        if finished and workers.rank == 0:
            figures |= write_result(recipe, state, out)
            log.write(event="done", **figures)
    workers.stop()
    return figures


def averaged(recipe: DemoVae, state: loop.TrainingState) -> TinyAutoencoder:
    """A copy of the model with the averaged weights."""
    model = build(recipe)
    model.load_state_dict(state.average.state_of("vae"))
    return model.eval()


def evaluate(recipe: DemoVae, state: loop.TrainingState) -> dict[str, float]:
    """PSNR of full-size and of 4x shrunken clips never drawn in training."""
    model = averaged(recipe, state)
    pixels = draw_clips(loop.step_generator(recipe.train.seed, -2), 6, 29)
    small = F.avg_pool3d(pixels, (1, 4, 4))
    return {"psnr": round(psnr(model, pixels), 2), "psnr_shrunken": round(psnr(model, small), 2)}


def write_result(recipe: DemoVae, state: loop.TrainingState, out: Path) -> dict[str, Any]:
    """Write `out/vae/` from the averaged weights, with measured latent statistics in its configuration.

    The configuration comes last: without it the folder is no autoencoder.
    """
    model = averaged(recipe, state)
    mean, std = latent_statistics(model, recipe.train.seed)
    config = dataclasses.replace(model.config, latents_mean=tuple(mean), latents_std=tuple(std))
    folder = out / "vae"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)  # its statistics are of these weights alone
    with durable.replacing(folder / "model.safetensors") as part:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, part)
    values = {"_class_name": "TinyAutoencoder", **config.to_dict()}
    durable.write(folder / "config.json", (json.dumps(values, indent=2) + "\n").encode())
    return {"result": str(folder), **evaluate(recipe, state)}


def _loss(
    model: TinyAutoencoder, recipe: DemoVae, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    data = recipe.data
    device = next(model.parameters()).device
    pixels = draw_clips(generator, data.clips + data.shrunken_clips, data.frames).to(device)
    groups = [("full", 1.0, pixels[: data.clips])]
    if data.shrunken_clips:
        groups.append(("shrunken", recipe.shrunken_weight, F.avg_pool3d(pixels[data.clips :], (1, 4, 4))))
    total = pixels.new_zeros(())
    parts: dict[str, float] = {}
    for name, weight, clips in groups:
        z = model.encode(clips)
        noise = torch.randn(z.shape, generator=generator).to(device) * recipe.latent_noise
        out = model.decode(z + noise, clamp=False)
        error = F.mse_loss(out, clips)
        loss = F.l1_loss(out, clips) + 2 * error + recipe.latent_penalty * z.square().mean()
        moved, really = out.diff(dim=2), clips.diff(dim=2)
        loss = loss + recipe.motion_weight * (F.l1_loss(moved, really) + 4 * F.mse_loss(moved, really))
        total = total + weight * loss
        parts[f"mse_{name}"] = round(float(error.detach()), 6)
    return total, parts
