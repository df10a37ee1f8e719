"""Distil a compressor: attention over compressed tokens shall give what attention over the whole blocks gives.

The transformer is frozen. A scene is run through the cache of inference, block by block and without graph; a later
block then asks in a context in which some mids are there at full resolution again:

    target     q_l  x  [own | sink | recent | other mids | K_l, V_l of the block, all its tokens]
    student    q_l  x  [own | sink | recent | other mids | K~_l, V~_l of its compressed tokens  ]      with a graph

Same queries, same slots, same rest; the loss is the squared difference of the two outputs, as a share of what leaving
the block out gives, at layers and queries drawn at random, plus a small match of K~, V~ with the pooled K, V before
RoPE. The gradient reaches the compressor through the compressed forward (docs/method.md 2.4, A); the transformer's
weights get none. Where a mid takes fewer slots than it has frames, its whole tokens are squeezed into the same slots.

The HR branch comes on top of the training-free LR path: a new one ends in a zero projection, so training starts from
what LR alone gives. Source: docs/method.md 7.5, 7.6 (U2's pre-training), 7.7 (T1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from packforcing_cli import packages, registry, rope, weights
from packforcing_cli.cache import CacheContext, KVCache
from packforcing_cli.compressor import Compressor, pooled_kv
from packforcing_cli.embeddings import UNCONDITIONAL
from packforcing_cli.errors import UsageError
from packforcing_cli.layout import Grid, Layout
from packforcing_cli.packages import Manifest
from packforcing_cli.registry import ModelSource
from packforcing_cli.sampler import NUM_TRAIN_TIMESTEPS, shifted
from packforcing_cli.training import estimate, finetune, frozen, loop
from packforcing_cli.training.clip_run import ClipRun, Maker, Split, averaged, write_result
from packforcing_cli.training.data import EncodedData, Scene
from packforcing_cli.training.distill_plan import AppendedContext, DistillShape, Plan, Query, with_bytes
from packforcing_cli.training.recipe_kinds import CompressorDistill
from packforcing_cli.transformer import BlockKV, TextKV, TransformerConfig, WanTransformer, attention

EVALUATED_ITEMS = 4
MEASURE = "error of attention; 1 = blocks left out"
STAND_INS = ("compressed", "lr", "pool", "none")
"""What an evaluation puts in a block's place: the trained compressor's tokens, those of LR alone, averaged keys and
values, nothing."""


@dataclass(frozen=True)
class Models:
    """The frozen transformer in its own dtype, and the compressor in float32."""

    transformer: WanTransformer
    compressor: Compressor
    grid: Grid
    shift: float
    select: str

    @property
    def device(self) -> torch.device:
        return self.transformer.patch_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.patch_embedding.weight.dtype

    def tokens(self, latents: Tensor, lr: Tensor, compressor: Compressor | None = None) -> Tensor:
        """Compressed tokens [1,N_c,d] of a block's latents [C,F,h,w] and LR latents [C,2,h/4,w/4].

        compressor: None = the one that is trained.
        """
        network = compressor or self.compressor
        wide = next(self.compressor.parameters()).dtype
        lr_tokens = self.transformer.patch(lr[None].to(self.dtype))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            tokens: Tensor = network(latents[None].to(wide), lr_tokens.to(wide))
        return tokens.to(self.dtype)

    def lr_alone(self) -> Compressor:
        """A compressor without the HR branch."""
        return Compressor(replace(self.compressor.config, branches="lr"))


# -- what is seen -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A stand-in in a layer's context: its block and the slots it takes."""

    block: int
    start: Fraction
    span: Fraction


@dataclass(frozen=True)
class Asked:
    """One layer of one asking block.

    q:      [1,n,N,D] rotated queries.
    target: [1,n,N,D] output of their attention with the stand-ins' blocks at full resolution.
    keys, values: [1,S,N,D] of everything else, keys rotated.
    """

    layer: int
    q: Tensor
    target: Tensor
    keys: Tensor
    values: Tensor
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Observation:
    """What one item has to compare, without graph.

    sinks:   context of a compressed forward.
    texts:   block -> what it reads.
    whole:   block -> its keys and values at full resolution, [L,1,S,N,D], keys un-rotated.
    latents: block -> latents and LR latents.
    """

    layout: Layout
    sinks: AppendedContext
    texts: Mapping[int, TextKV]
    whole: Mapping[int, BlockKV]
    latents: Mapping[int, tuple[Tensor, Tensor]]
    asked: tuple[Asked, ...]


class _Restored:
    """The context of a block in which some mids are there at full resolution again.

    asked: for every layer that is wanted, what its attention had, as `attend` found it.
    """

    def __init__(
        self, models: Models, context: CacheContext, whole: Mapping[int, BlockKV], query: Query
    ) -> None:
        self._network, self._context, self._whole, self._query = models.transformer, context, whole, query
        layout = context.layout
        self._slots = layout.slots(context.block)
        self._grid = layout.grid
        self._head_dim = models.transformer.config.attention_head_dim
        self._own = rope.angles(context.positions, self._head_dim)
        tokens = layout.tokens(context.block)
        self._first_mid = tokens.current + tokens.sink + tokens.recent
        self._tokens = torch.tensor(query.tokens, device=context.positions.device)
        self.asked: list[Asked] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the block's own tokens [1,S,N,D] in the restored context."""
        turned = rope.rotate(q, *self._own)
        keys, values = self._context.layer(
            layer, rope.rotate(k, *self._own), v, q.sum(1, dtype=torch.float32)
        )
        places, rest = self._places(layer, keys.shape[1])
        keys, values = keys.index_select(1, rest), values.index_select(1, rest)
        wide = [self._whole[place.block] for place in places]
        turned_whole = [
            rope.rotate(
                kv.k[layer], *rope.angles(whole_positions(self._grid, place, q.device), self._head_dim)
            )
            for kv, place in zip(wide, places, strict=True)
        ]
        out = attention(
            turned, torch.cat((keys, *turned_whole), 1), torch.cat((values, *(kv.v[layer] for kv in wide)), 1)
        )
        if layer in self._query.layers and places:
            some, target = turned.index_select(1, self._tokens), out.index_select(1, self._tokens)
            self.asked.append(Asked(layer, some, target, keys, values, places))
        return out

    def _places(self, layer: int, num_keys: int) -> tuple[tuple[Place, ...], Tensor]:
        """Where the stand-ins are in this layer, and the numbers of all other keys."""
        width = self._grid.compressed_tokens
        keep = torch.ones(num_keys, dtype=torch.bool)
        places = []
        for n, block in enumerate(self._context.selected[layer].tolist()):
            if block in self._whole:
                places.append(Place(block, self._slots.mid_starts[n], self._slots.span))
                first = self._first_mid + n * width
                keep[first : first + width] = False
        return tuple(places), keep.nonzero().flatten().to(self._context.positions.device)


def whole_positions(grid: Grid, place: Place, device: torch.device) -> Tensor:
    """Positions [S,3] of a block's whole tokens in the slots its stand-in takes: frames squeezed, cells in place."""
    frames = grid.frames_per_block
    positions = rope.grid_positions(0.0, frames, grid.rows, grid.cols, device=device)
    times = (positions[:, 0] + 0.5) * float(place.span / frames) - 0.5 + float(place.start)
    return torch.cat((times[:, None], positions[:, 1:]), 1)


def cell_positions(grid: Grid, place: Place, device: torch.device) -> Tensor:
    """Positions [N_c,3] of a stand-in's tokens."""
    cells = [[float(x) for x in cell] for cell in grid.compressed_positions(place.start, place.span)]
    return torch.tensor(cells, dtype=torch.float64, device=device)


@torch.no_grad()
def observe(
    models: Models,
    data: EncodedData,
    scene: Scene,
    plan: Plan,
    generator: torch.Generator,
    *,
    clean: float,
    dropout: float,
) -> Observation:
    """Run a scene through the cache and ask.

    Args:
        generator: draws the noise of the asking blocks, on the CPU.
        clean:     share of asking blocks without noise.
        dropout:   share of them that reads the empty prompt.
    """
    network, device, dtype = models.transformer, models.device, models.dtype
    grid = with_bytes(models.grid, dtype)
    layout = replace(plan.layout, grid=grid)
    loaded = data.load(scene, tuple(range(plan.blocks)))
    latents, lr = (t.to(device, dtype) for t in loaded)
    read: dict[str, TextKV] = {}

    def reads(text: str) -> TextKV:
        if text not in read:
            read[text] = network.embed_text(data.embedding(text).to(device, dtype))
        return read[text]

    cache = KVCache(layout, num_blocks=plan.blocks, dtype=dtype, device=device, select=models.select)
    queries = {query.block: query for query in plan.queries}
    first: list[BlockKV] = []
    whole: dict[int, BlockKV] = {}
    asked: list[Asked] = []
    for i in range(plan.blocks):
        context, x0, text = cache.context(i), latents[i : i + 1], reads(scene.captions[i])
        if i in queries:
            query = queries[i]
            noise = torch.randn(x0.shape, generator=generator).to(x0)
            dropped = float(torch.rand((), generator=generator)) < dropout
            level, die = query.dice
            sigma = 0.0 if die < clean else shifted(level, models.shift)
            restored = _Restored(models, context, whole, query)
            times = torch.full((1, 1), NUM_TRAIN_TIMESTEPS * sigma, dtype=torch.float64, device=device)
            network.run_layers(
                network.patch((1 - sigma) * x0 + sigma * noise),
                network.modulation(times),
                reads(UNCONDITIONAL) if dropped else text,
                restored.attend,
            )
            asked += restored.asked
        if i + 1 == plan.blocks:
            break  # nothing reads what it would leave
        kv = network.commit(x0, text, context)
        if i < layout.sink_blocks:
            first.append(kv)
        if i in plan.stand_ins:
            whole[i] = kv
        if cache.needs_backup(i):
            backup = network.commit_tokens(
                models.tokens(latents[i], lr[i]), text, cache.compressed_context(i)
            )
            cache.commit(i, kv)
            cache.add_backup(i, backup)
        else:
            cache.commit(i, kv)
    return Observation(
        layout,
        _sinks(network, layout, first, device),
        {i: reads(scene.captions[i]) for i in whole},
        whole,
        {i: (latents[i], lr[i]) for i in whole},
        tuple(asked),
    )


def _sinks(
    network: WanTransformer, layout: Layout, first: Sequence[BlockKV], device: torch.device
) -> AppendedContext:
    """The context of a compressed forward: the sinks at slots 0 .., the block right behind them."""
    grid, head_dim = layout.grid, network.config.attention_head_dim
    frames = layout.sink_blocks * grid.frames_per_block
    angles = rope.angles(rope.grid_positions(0.0, frames, grid.rows, grid.cols, device=device), head_dim)
    keys = [rope.rotate(torch.cat([kv.k[layer] for kv in first], 1), *angles) for layer in range(grid.layers)]
    values = [torch.cat([kv.v[layer] for kv in first], 1) for layer in range(grid.layers)]
    own = Place(-1, Fraction(layout.context_start), Fraction(grid.frames_per_block))
    return AppendedContext(cell_positions(grid, own, device), keys, values)


# -- the loss -----------------------------------------------------------------------------------------------------


def compressed(
    models: Models,
    seen: Observation,
    block: int,
    *,
    compressor: Compressor | None = None,
    again: bool = False,
) -> BlockKV:
    """Keys and values of a block's compressed tokens, with a graph to the compressor.

    Args:
        compressor: None = the one that is trained.
        again:      run the forward again in the backward pass instead of keeping what is in it.
    """
    tokens = models.tokens(*seen.latents[block], compressor)
    if again and torch.is_grad_enabled():
        made: BlockKV = checkpoint(
            models.transformer.commit_tokens,
            tokens,
            seen.texts[block],
            seen.sinks,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        return made
    return models.transformer.commit_tokens(tokens, seen.texts[block], seen.sinks)


def attention_errors(seen: Observation, stand_ins: Mapping[int, tuple[Tensor, Tensor]]) -> Tensor:
    """Squared error of each asked layer's attention output, relative to the target's mean square.

    Args:
        stand_ins: block -> keys [L,1,N_c,N,D], un-rotated, and values; a block that is not there is left out.
    Returns: [len(seen.asked)], float32 or wider.
    """
    errors = []
    for asked in seen.asked:
        keys, values = [asked.keys], [asked.values]
        for place in asked.places:
            if place.block in stand_ins:
                k, v = stand_ins[place.block]
                cells = cell_positions(seen.layout.grid, place, k.device)
                keys.append(rope.rotate(k[asked.layer], *rope.angles(cells, k.shape[-1])))
                values.append(v[asked.layer])
        out = attention(asked.q, torch.cat(keys, 1), torch.cat(values, 1))
        wide = torch.promote_types(asked.target.dtype, torch.float32)
        target = asked.target.to(wide)
        errors.append((out.to(wide) - target).square().mean() / target.square().mean())
    return torch.stack(errors)


def pooled_error(seen: Observation, stand_ins: Mapping[int, tuple[Tensor, Tensor]]) -> Tensor:
    """Mean squared difference to pooled keys and values before RoPE, relative to their mean square in each layer."""
    grid, errors = seen.layout.grid, []
    for block, pair in stand_ins.items():
        whole = seen.whole[block]
        for made, kept in zip(pair, (whole.k, whole.v), strict=True):
            wide = torch.promote_types(kept.dtype, torch.float32)
            pooled = pooled_kv(kept.to(wide), grid.frames_per_block, grid.rows, grid.cols)
            each = (made.to(wide) - pooled).square().flatten(1).mean(1) / pooled.square().flatten(1).mean(1)
            errors.append(each.mean())
    return torch.stack(errors).mean()


def item_loss(
    models: Models,
    data: EncodedData,
    scene: Scene,
    shape: DistillShape,
    recipe: CompressorDistill,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, float]]:
    """Loss of one item of a scene, and its two parts. The generator draws the item and its noise, on the CPU.

    attention: error as a share of what leaving the blocks out gives: 1 = the stand-ins are worth nothing. So an item
               counts the same whether its asking blocks look much at the past or little.
    pool:      as `pooled_error`.
    """
    plan = shape.plan(models.grid, recipe.queries, scene.blocks, generator, cuts=scene.cuts)
    settings = recipe.data
    seen = observe(
        models, data, scene, plan, generator, clean=settings.clean, dropout=settings.caption_dropout
    )
    pairs = {}
    for block in seen.whole:
        kv = compressed(models, seen, block, again=recipe.checkpointing)
        pairs[block] = (kv.k, kv.v)
    pool = pooled_error(seen, pairs)
    if not seen.asked:  # no layer recalled one of them
        return recipe.pool_weight * pool, {"pool": float(pool.detach())}
    errors = attention_errors(seen, pairs)
    with torch.no_grad():
        without = attention_errors(seen, {})
    matched = errors.sum() / without.sum()
    parts = {"attention": float(matched.detach()), "pool": float(pool.detach())}
    return matched + recipe.pool_weight * pool, parts


@torch.no_grad()
def evaluated(
    models: Models, data: EncodedData, split: Split, shape: DistillShape, recipe: CompressorDistill
) -> dict[str, Any]:
    """Error of attention for each of STAND_INS, as a share of that of "none"; the same items and noise every time."""
    count = max(EVALUATED_ITEMS, min(len(split.evaluated), 4 * EVALUATED_ITEMS))
    found: dict[str, list[Tensor]] = {name: [] for name in STAND_INS}
    lr_alone = models.lr_alone()
    for n in range(count):
        scene = split.evaluated[n % len(split.evaluated)]
        generator = loop.step_generator(recipe.train.seed, -1 - n)
        plan = shape.plan(models.grid, recipe.queries, scene.blocks, generator, cuts=scene.cuts)
        seen = observe(models, data, scene, plan, generator, clean=recipe.data.clean, dropout=0.0)
        if not seen.asked:
            continue
        for name in STAND_INS:
            pairs = {} if name == "none" else {b: _pair(models, seen, b, name, lr_alone) for b in seen.whole}
            found[name].append(attention_errors(seen, pairs))
    total = {name: float(torch.cat(each).sum()) for name, each in found.items() if each}
    errors = {name: round(value / total["none"], 4) for name, value in total.items() if name != "none"}
    return {"held-out" if split.is_held_out else "trained": errors}


def _pair(
    models: Models, seen: Observation, block: int, name: str, lr_alone: Compressor
) -> tuple[Tensor, Tensor]:
    if name == "pool":
        grid, whole = seen.layout.grid, seen.whole[block]
        shape = (grid.frames_per_block, grid.rows, grid.cols)
        return pooled_kv(whole.k, *shape), pooled_kv(whole.v, *shape)
    kv = compressed(models, seen, block, compressor=lr_alone if name == "lr" else None)
    return kv.k, kv.v


# -- the run ------------------------------------------------------------------------------------------------------


def load_models(recipe: CompressorDistill, source: ModelSource, device: torch.device) -> Models:
    """The frozen transformer, and the compressor to train: the model's own, or one that starts as its LR branch.

    Raises: UsageError for a compressed context that items cannot give; WeightsError.
    """
    folder, manifest = source.folder, source.manifest
    if manifest.cache.compressed_context != "sinks":
        raise UsageError(
            f"{source.name} compresses blocks in the context {manifest.cache.compressed_context!r}: a compressor is"
            " distilled for 'sinks'",
            hint="Choose another model.",
        )
    dtype = estimate.precision(recipe, device)
    transformer = registry.load_transformer(
        packages.part_folder(folder, manifest, "transformer"), device=device, dtype=dtype
    )
    transformer.eval().requires_grad_(False)
    frozen.shrink(transformer, recipe.quantize_frozen, registry.LAYERS)
    config = estimate.compressor_config(manifest, transformer.config, folder)
    has_one = "compressor" in manifest.parts or "compressor" in manifest.references
    if has_one and config.branches == "hr+lr" and recipe.start == "model":
        compressor = registry.load_compressor(
            packages.part_folder(folder, manifest, "compressor"), device=device, dtype=torch.float32
        )
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(finetune.COMPRESSOR_SEED)
            compressor = Compressor(replace(config, branches="hr+lr")).to(device)
    select = manifest.cache.select
    return Models(
        transformer,
        compressor.train().requires_grad_(True),
        estimate.grid_of(manifest, transformer.config),
        manifest.schedule.shift,
        "affinity-recent" if select == "none" else select,
    )


def optimizer_of(models: Models, recipe: CompressorDistill) -> torch.optim.Optimizer:
    """AdamW over the compressor; only its matrices decay."""
    settings = recipe.train
    groups = [
        {
            "params": [p for p in models.compressor.parameters() if (p.ndim >= 2) == decays],
            "weight_decay": settings.weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.99))


def train(
    recipe: CompressorDistill,
    out: Path,
    data: EncodedData,
    *,
    accept: bool = False,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    log_every: int = loop.LOG_EVERY,
) -> dict[str, Any]:
    """Run or resume the recipe in `out`; the result is the model package `out/package/`.

    Its compressor alone is `out/package/compressor/`, for `generate --compressor`; the other parts are the model's.

    Args:
        data:        encoded clips, or what `rollout_data.make` made.
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
    shape = DistillShape.by(recipe.data, max((scene.blocks for scene in data.scenes), default=0))
    split = Split.of(data, shape, recipe.data.held_out)
    models = load_models(recipe, source, workers.device)
    modules = {"compressor": models.compressor}
    state = loop.TrainingState(
        modules, loop.MovingAverage(modules, settings.average), [optimizer_of(models, recipe)]
    )
    facts = finetune.facts_of(recipe, source, data)
    loop.check_facts(out / "checkpoints", facts, accept=accept)
    manifest = result_manifest(recipe, source, data, shape, split)

    def loss(scene: Scene, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        value, parts = item_loss(models, data, scene, shape, recipe, generator)
        return value, {name: float(f"{part:.6g}") for name, part in parts.items()}

    @contextmanager
    def current() -> Iterator[Models | None]:
        with averaged(state):
            yield None if workers.rank else models

    def write(result: Models, metrics: dict[str, Any]) -> dict[str, Any]:
        write_result(
            out / "package", source, manifest, None, result.compressor,
            steps=state.step, metrics=metrics, changes=state.changes,
        )  # fmt: skip
        return {}

    run = ClipRun(
        recipe=recipe,
        out=out,
        workers=workers,
        state=state,
        facts=facts,
        split=split,
        maker=Maker(recipe, source, manifest, data, split, out / "samples") if recipe.samples.every else None,
        current=current,
        item_loss=loss,
        evaluated=lambda models: evaluated(models, data, split, shape, recipe),
        write=write,
        measure=MEASURE,
        at_zero=True,
    )
    return run.train(accept=accept, on_log=on_log, should_stop=should_stop, log_every=log_every)


def result_manifest(
    recipe: CompressorDistill, source: ModelSource, data: EncodedData, shape: DistillShape, split: Split
) -> Manifest:
    """The manifest of the result, but for its figures; what the transformer was trained on stays what it was."""
    base = source.manifest
    longest = max(scene.blocks for scene in split.trained)
    transformer = packages.part_folder(source.folder, base, "transformer")
    grid = estimate.grid_of(base, TransformerConfig.from_dict(weights.read_config(transformer)))
    kind = "clips" if recipe.data.folder else "the model's own videos"
    return base.model_copy(
        update={
            "name": f"{base.name}-compressor",
            "title": f"{base.title} - compressor distilled",
            "base_model": base.base_model or base.name,
            "cache": estimate.preset_of(recipe, base),
            "provenance": {
                "recipe": recipe.kind,
                "settings": recipe.model_dump(mode="json", exclude={"data": {"folder", "prompts"}}),
                "data": {
                    "kind": kind,
                    "sha256": data.sha256,
                    "clips": len({scene.clip for scene in split.trained}),
                    "scenes": len(split.trained),
                    "longest_scene_seconds": round(grid.frames_for(longest) / base.fps, 2),
                },
                "context": str(shape.context(grid, longest)),
                "from": {"model": base.name, "version": base.version, "provenance": base.provenance},
            },
        }
    )
