"""Finetune a model on encoded clips: flow matching by packed teacher forcing, with the compressor in the same loss.

    scene -> item (items.py) -> packed_forward -> squared velocity error -> AdamW -> moving average -> package

What an item's blocks see, and at which slots, is what they will see at inference (packed.py); the loss reaches the
compressor through the keys and values of the mids, and nothing is detached. Weights, optimiser state and residual
stream are float32; products may be bfloat16. Neither VAE nor text encoder is loaded, the VAE only for sample videos.
Source: docs/method.md 7.4, 7.5, 7.7; teacher forcing as in Self-Forcing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from packforcing_cli import lora, packages, registry, weights
from packforcing_cli.compressor import Compressor
from packforcing_cli.embeddings import UNCONDITIONAL
from packforcing_cli.errors import UsageError
from packforcing_cli.layout import Grid
from packforcing_cli.packages import Manifest
from packforcing_cli.registry import ModelSource
from packforcing_cli.sampler import NUM_TRAIN_TIMESTEPS, shifted
from packforcing_cli.training import adapters, estimate, frozen, loop, shards
from packforcing_cli.training.clip_run import ClipRun, Maker, Split, averaged, write_result
from packforcing_cli.training.data import EncodedData, Scene
from packforcing_cli.training.items import Item, Shape
from packforcing_cli.training.packed import packed_forward
from packforcing_cli.training.recipe_kinds import CompressorDistill, Finetune, FinetuneLora
from packforcing_cli.transformer import WanTransformer

STUDENT_STEPS, STUDENT_GUIDANCE = 40, 3.0  # where nothing tells how the teacher was sampled
EVALUATED_SIGMAS = (0.3, 0.6, 0.9)
EVALUATED_ITEMS = 8
COMPRESSOR_SEED = 0x5EED


@dataclass(frozen=True)
class Models:
    """What trains, in float32 on its device, and what is known of it."""

    transformer: WanTransformer
    compressor: Compressor
    grid: Grid
    shift: float
    precision: torch.dtype
    whole: shards.Whole | None = None
    """Gathers the weights where they are shared out among processes."""

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device


# -- the loss -----------------------------------------------------------------------------------------------------


def item_loss(
    models: Models,
    data: EncodedData,
    scene: Scene,
    shape: Shape,
    recipe: Finetune,
    generator: torch.Generator,
    *,
    sigma: float | None = None,
) -> Tensor:
    """Mean squared velocity error of the target blocks of one item of a scene.

    Args:
        generator: draws the item, the noise levels and the noise, on the CPU: the same on every device.
        sigma:     to evaluate: one noise level for all, no noise on the history, no dropped caption; None = to train.
    """
    if models.whole is not None:
        return models.whole(
            lambda: _item_loss(
                models, data, scene, shape, recipe, generator, sigma=sigma
            )  # the weights are there
        )
    return _item_loss(models, data, scene, shape, recipe, generator, sigma=sigma)


def _item_loss(
    models: Models,
    data: EncodedData,
    scene: Scene,
    shape: Shape,
    recipe: Finetune,
    generator: torch.Generator,
    *,
    sigma: float | None,
) -> Tensor:
    settings, device = recipe.data, models.device
    item = shape.item(models.grid, scene.blocks, generator, cuts=scene.cuts)
    dtype = next(models.transformer.parameters()).dtype
    latents, lr = (t[None].to(device, dtype) for t in data.load(scene, item.scene))
    draws, count = settings.draws, settings.draws * len(item.targets)
    x0 = latents[:, list(item.targets)].repeat(1, draws, 1, 1, 1, 1)
    history = latents[:, list(item.packed.full)]
    order, inside = torch.randperm(count, generator=generator), torch.rand(count, generator=generator)
    levels = [shifted(float(s), models.shift) for s in (order + inside) / count]
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    past_noise = torch.randn(history.shape, generator=generator).to(x0)
    dice = torch.rand(3, generator=generator).tolist()
    captions, level = pieces_of(item, scene, draws), 0.0
    if sigma is None:
        # Half of the items meet a slightly noisy history, as the model's own past errors will be.
        level = dice[0] * settings.context_noise if dice[1] < 0.5 else 0.0
        if dice[2] < settings.caption_dropout:
            # The history keeps its caption: so is guidance at inference, where the two passes share one history.
            captions[-count:] = [UNCONDITIONAL] * count
    else:
        levels = [sigma] * count
    sigmas = torch.tensor(levels, device=device, dtype=dtype)[None]
    wide = sigmas.view(1, count, 1, 1, 1, 1)
    texts = list(dict.fromkeys(captions))
    rows = None
    if len(texts) > 1:
        rows = torch.tensor([[texts.index(caption) for caption in captions]], device=device)
    noisy = (1 - wide) * x0 + wide * noise
    if models.whole is not None:
        noisy = shards.anchored(noisy, (models.transformer, models.compressor))
    with torch.autocast(device.type, torch.bfloat16, enabled=models.precision == torch.bfloat16):
        velocity = packed_forward(
            models.transformer,
            item.packed,
            models.grid,
            clean=(1 - level) * history + level * past_noise,
            compressed=compress(models, latents, lr, item.packed.compressed),
            noisy=noisy,
            timesteps=NUM_TRAIN_TIMESTEPS * sigmas,
            text=models.transformer.embed_text(torch.cat([data.embedding(text) for text in texts]).to(x0)),
            prompts=rows,
            targets=item.targets,
        )
    return (velocity.to(dtype) - (noise - x0)).square().mean()


def pieces_of(item: Item, scene: Scene, draws: int) -> list[str]:
    """The caption that each clean, compressed and noisy block of an item reads: its own of the scene."""
    numbers = (*item.packed.full, *item.packed.compressed, *item.targets * draws)
    return [scene.captions[item.scene[block]] for block in numbers]


def compress(models: Models, latents: Tensor, lr: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """Compressed tokens [1,K,N_c,d] of some blocks of [1,n,C,F,h,w] latents and [1,n,C,2,h/4,w/4] LR latents."""
    if not blocks:
        return latents.new_zeros(1, 0, models.grid.compressed_tokens, models.transformer.config.dim)
    chosen = list(blocks)
    tokens = models.transformer.patch(lr[0, chosen])
    return models.compressor(latents[0, chosen], tokens)[None].to(latents.dtype)


# -- the run ------------------------------------------------------------------------------------------------------


def load_models(recipe: Finetune, source: ModelSource, device: torch.device) -> Models:
    """The transformer and compressor to train; a model without a compressor gets one that starts as its LR branch.

    Raises: UsageError for a compressed context that items cannot give; WeightsError.
    """
    folder, manifest = source.folder, source.manifest
    if manifest.cache.compressed_context != "sinks":
        raise UsageError(
            f"{source.name} compresses blocks in the context {manifest.cache.compressed_context!r}: finetuning"
            " is made for 'sinks'",
            hint="Choose another model.",
        )
    transformer = registry.load_transformer(
        packages.part_folder(folder, manifest, "transformer"), device=device, dtype=torch.float32
    )
    config = estimate.compressor_config(manifest, transformer.config, folder)
    if config.branches == "hr+lr" and ("compressor" in manifest.parts or "compressor" in manifest.references):
        compressor = registry.load_compressor(
            packages.part_folder(folder, manifest, "compressor"), device=device, dtype=torch.float32
        )
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(COMPRESSOR_SEED)
            compressor = Compressor(replace(config, branches="hr+lr")).to(device)
    if recipe.checkpointing:
        transformer.recompute_layers()
    is_lora = isinstance(recipe, FinetuneLora)
    transformer.train().requires_grad_(recipe.train_transformer and not is_lora)
    compressor.train().requires_grad_(not is_lora)
    if isinstance(recipe, FinetuneLora):
        adapters.insert(transformer, recipe)
    frozen.shrink(transformer, recipe.quantize_frozen, registry.LAYERS)
    return Models(
        transformer,
        compressor,
        estimate.grid_of(manifest, transformer.config),
        manifest.schedule.shift,
        estimate.precision(recipe, device),
    )


def shared_out(models: Models, recipe: Finetune, workers: loop.Workers) -> Models:
    """The same models with their weights shared out among the processes, on their devices."""
    mesh = shards.mesh_of(workers.device, workers.count)
    root = shards.whole(mesh, models.transformer, models.compressor)
    return replace(models, whole=root, precision=estimate.precision(recipe, workers.device))


def trained_modules(models: Models, recipe: Finetune) -> dict[str, nn.Module]:
    """Name -> module whose weights change."""
    if isinstance(recipe, FinetuneLora):
        return {"adapters": adapters.Adapters(models.transformer)}
    modules: dict[str, nn.Module] = {"compressor": models.compressor}
    return {"transformer": models.transformer, **modules} if recipe.train_transformer else modules


def optimizer_of(models: Models, recipe: Finetune) -> torch.optim.Optimizer:
    """AdamW; the compressor has its own learning rate (docs/method.md 7.6 f).

    Biases and scales of one dimension do not decay; matrices, kernels and the modulation tables do.
    """
    settings = recipe.train
    groups: list[dict[str, Any]] = []
    for name, module in trained_modules(models, recipe).items():
        rate = recipe.compressor_learning_rate if name == "compressor" else settings.learning_rate
        for decays in (True, False):
            parameters = [p for p in module.parameters() if (p.ndim >= 2) == decays]
            decay = settings.weight_decay if decays else 0.0
            groups.append({"params": parameters, "lr": rate, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=(0.9, 0.99))


def facts_of(recipe: Finetune | CompressorDistill, source: ModelSource, data: EncodedData) -> dict[str, Any]:
    """What a checkpoint can only be continued with: all that the sequence of losses depends on."""
    free = {"samples", "sampling", "preset", "checkpointing"}
    if recipe.quantize_frozen == "none":
        free.add("quantize_frozen")
    values = recipe.model_dump(mode="json", exclude=free)
    for name in ("folder", "max_bad", "enlarge", "scene_seconds"):
        del values["data"][name]
    values["data"].pop("prompts", None)  # where they came from; the data's own hash says which
    own = {
        "data": data.sha256,
        "weights": packages.hash_of(source.manifest.files | _referred(source.manifest)),
    }
    return loop.facts_of(values) | own


def _referred(manifest: Manifest) -> dict[str, packages.FileRecord]:
    return {
        f"{part}/{name}": record
        for part, reference in manifest.references.items()
        for name, record in reference.files.items()
    }


def train(
    recipe: Finetune,
    out: Path,
    data: EncodedData,
    *,
    share: bool = False,
    accept: bool = False,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    log_every: int = loop.LOG_EVERY,
) -> dict[str, Any]:
    """Run or resume the recipe in `out`; the result is the model package `out/package/`.

    Args:
        share:       share the weights out among the processes (FSDP2) instead of keeping all of them in each.
        accept:      go on from checkpoints of another recipe or other data, and say so in log and package.
        on_log:      told every line of the log.
        should_stop: asked after every step; True ends with a checkpoint.
    Returns: the figures; without "result" when it was stopped.
    Raises: UsageError for data of another model, or a run of another recipe or data; WeightsError if the loss is not
        finite, naming the clip.
    """
    settings = recipe.train
    if settings.threads:
        torch.set_num_threads(settings.threads)
    workers = loop.Workers.start()
    source = registry.open_model(recipe.model, device=workers.device, dtype=torch.float32)
    data.require_fit(source)
    shape = estimate.shape_of(recipe.data)
    split = Split.of(data, shape, recipe.data.held_out)
    models = load_models(recipe, source, torch.device("cpu") if share else workers.device)
    if share:
        models = shared_out(models, recipe, workers)
    modules = trained_modules(models, recipe)
    state = loop.TrainingState(
        modules, loop.MovingAverage(modules, settings.average), [optimizer_of(models, recipe)]
    )
    facts = facts_of(recipe, source, data)
    loop.check_facts(out / "checkpoints", facts, accept=accept)
    manifest = result_manifest(recipe, source, data, shape, split)

    def loss(scene: Scene, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        return item_loss(models, data, scene, shape, recipe, generator), {}

    def write(result: Models, metrics: dict[str, Any]) -> dict[str, Any]:
        figures = {}
        network = result.transformer if recipe.train_transformer else None
        own: Compressor | None = result.compressor
        if isinstance(recipe, FinetuneLora):
            adapters.write(out / "lora", result.transformer, recipe)
            figures["lora"] = str(out / "lora")
            network, own = _with_adapters(result, recipe, source, out / "lora"), None
        write_result(
            out / "package",
            source,
            manifest,
            network,
            own,
            steps=state.step,
            metrics=metrics,
            changes=state.changes,
        )
        return figures

    run = ClipRun(
        recipe=recipe,
        out=out,
        workers=workers,
        state=state,
        facts=facts,
        split=split,
        maker=Maker(recipe, source, manifest, data, split, out / "samples") if recipe.samples.every else None,
        current=lambda: averaged_models(state, models, recipe, source),
        item_loss=loss,
        evaluated=lambda current: evaluated(current, data, split, shape, recipe),
        write=write,
    )
    return run.train(accept=accept, on_log=on_log, should_stop=should_stop, log_every=log_every)


def _with_adapters(
    models: Models, recipe: FinetuneLora, source: ModelSource, adapter: Path
) -> WanTransformer:
    """The whole weights with the adapters; a base that was trained on in 8 bits is read again."""
    if recipe.quantize_frozen == "none":
        return adapters.merged(models.transformer)
    place = packages.part_folder(source.folder, source.manifest, "transformer")
    return registry.load_transformer(
        place, device=torch.device("cpu"), dtype=torch.float32, loras=[lora.read(adapter)]
    )


@contextmanager
def averaged_models(
    state: loop.TrainingState, models: Models, recipe: Finetune, source: ModelSource
) -> Iterator[Models | None]:
    """The models with their averaged weights, as long as the `with` lasts.

    Where weights are shared out, a copy that has all of them, in the first process; None in the others, which must
    ask, too, and go on at once.
    """
    if models.whole is None:
        if dist.is_initialized() and dist.get_rank():
            yield None
            return
        with averaged(state):
            yield models
        return
    values = shards.gathered(state.average.values)
    if dist.get_rank():
        yield None
        return
    copy = replace(load_models(recipe, source, source.device), precision=models.precision)
    for name, module in trained_modules(copy, recipe).items():
        prefix = f"{name}/"
        module.load_state_dict(
            {key.removeprefix(prefix): v for key, v in values.items() if key.startswith(prefix)}
        )
    del values
    yield copy


@torch.no_grad()
def evaluated(
    models: Models, data: EncodedData, split: Split, shape: Shape, recipe: Finetune
) -> dict[str, Any]:
    """Velocity error at fixed noise levels, over the same items and noise every time."""
    count = max(EVALUATED_ITEMS, min(len(split.evaluated), 4 * EVALUATED_ITEMS))
    errors: dict[str, float] = {}
    for sigma in EVALUATED_SIGMAS:
        total = 0.0
        for n in range(count):
            scene = split.evaluated[n % len(split.evaluated)]
            generator = loop.step_generator(recipe.train.seed, -1 - n)
            total += float(item_loss(models, data, scene, shape, recipe, generator, sigma=sigma))
        errors[f"sigma {sigma:g}"] = round(total / count, 5)
    return {"held-out clips" if split.is_held_out else "trained clips": errors}


# -- the result ---------------------------------------------------------------------------------------------------


def result_manifest(
    recipe: Finetune, source: ModelSource, data: EncodedData, shape: Shape, split: Split
) -> Manifest:
    """The manifest of the result, but for its figures. Raises: UsageError for sampling that a student cannot have."""
    base = source.manifest
    longest = max(scene.blocks for scene in split.trained)
    config = estimate.grid_of(base, _config(source))
    context = shape.context(config, longest)
    schedule = base.schedule
    if schedule.kind == "renoise" and recipe.train_transformer:
        schedule = base.flow_schedule or registry.Schedule(
            kind="euler", steps=STUDENT_STEPS, shift=schedule.shift, guidance=STUDENT_GUIDANCE
        )
    wanted = recipe.sampling.model_dump(exclude_none=True)
    if wanted and schedule.kind == "renoise":
        raise UsageError(
            f"{base.name} stays a few-step student if its compressor alone is trained: it has its own steps, and no"
            " guidance",
            hint="Leave sampling out, or set train_transformer=true.",
        )
    schedule = schedule.model_copy(update=wanted)
    seconds = config.frames_for(longest) / base.fps
    item = (
        "consecutive blocks"
        if shape.name == "strict"
        else "sinks, far blocks as compressed tokens, neighbours"
    )
    return base.model_copy(
        update={
            "name": f"{base.name}-finetuned",
            "title": f"{base.title} - finetuned on clips",
            "base_model": base.base_model or base.name,
            "cache": estimate.preset_of(recipe, base),
            "schedule": schedule,
            "flow_schedule": base.flow_schedule if schedule.kind == "renoise" else None,
            "trained_frames": context.slots,
            "start_image": False,
            "provenance": {
                "recipe": recipe.kind,
                "settings": recipe.model_dump(mode="json", exclude={"data": {"folder"}}),
                "data": {
                    "sha256": data.sha256,
                    "clips": len({scene.clip for scene in split.trained}),
                    "scenes": len(split.trained),
                    "longest_scene_seconds": round(seconds, 2),
                    "items": f"{shape.name}: {item}",
                },
                "context": str(context),
                "from": {"model": base.name, "version": base.version, "provenance": base.provenance},
            },
        }
    )


def _config(source: ModelSource) -> Any:
    from packforcing_cli.transformer import TransformerConfig

    folder = packages.part_folder(source.folder, source.manifest, "transformer")
    return TransformerConfig.from_dict(weights.read_config(folder))
