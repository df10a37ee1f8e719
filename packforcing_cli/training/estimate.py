"""What a recipe will take, before its first step: parameters, memory, and whether its context is that of inference.

Memory is counted on meta tensors, which have shapes and no data: weights, gradients, optimiser and average from the
parameters, what the backward pass needs from one item's forward pass with one and with two layers.
Draws nothing, reads no weights; a package's configuration files at most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from packforcing_cli import catalog, machine, packages, registry, weights
from packforcing_cli.compressor import Compressor, CompressorConfig
from packforcing_cli.errors import MemoryFitError, OfflineError, UsageError
from packforcing_cli.layout import Grid, Layout
from packforcing_cli.packages import CacheDefaults, Manifest
from packforcing_cli.planner import DECODER_PEAK
from packforcing_cli.text import TextEncoder, build_encoder, load_tokenizer
from packforcing_cli.training import frozen
from packforcing_cli.training.distill_plan import AppendedContext, DistillShape, with_bytes
from packforcing_cli.training.items import Context, Item, Shape
from packforcing_cli.training.packed import PackedItem, packed_forward
from packforcing_cli.training.recipe_kinds import (
    CompressorDistill,
    Finetune,
    FinetuneLora,
    ItemData,
    span_of,
)
from packforcing_cli.training.recipes import AnyRecipe, DemoDistill, DemoFlow, DemoVae, SelfForcing
from packforcing_cli.transformer import TextKV, TransformerConfig, WanTransformer
from packforcing_cli.vae import TinyAutoencoder, TinyAutoencoderConfig

if TYPE_CHECKING:
    from packforcing_cli.training.demo_flow import Models, Pool

HEADROOM = 0.95  # of the free memory may be planned with
CUDA_CONTEXT = 600_000_000  # bytes the driver and its libraries take
PROCESS = 450_000_000  # bytes of an interpreter with torch
TEMPORARY = 0.25  # of what the backward pass needs: the tensors in hand while it is made and used


@dataclass(frozen=True)
class Memory:
    """Bytes of one process where the model runs.

    weights:     parameters, trained or not; in float32, but for frozen ones in a smaller form.
    training:    gradients, AdamW's two moments, the moving average.
    activations: what the backward pass of one item needs, with what is in hand meanwhile.
    other:       the VAE for samples, the interpreter or the GPU's context.
    """

    weights: int
    training: int
    activations: int
    other: int

    @property
    def total(self) -> int:
        return self.weights + self.training + self.activations + self.other


@dataclass(frozen=True)
class Estimate:
    """What is known of a training before it starts.

    context, preset: what items meet, and the memory settings of the result; None where there is no memory to train.
    mismatches:      where the preset leaves the context.
    """

    kind: str
    parameters: int
    trained: int
    steps: int
    memory: Memory
    free_bytes: int
    device: str
    context: Context | None = None
    preset: CacheDefaults | None = None
    mismatches: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The figures as text for people."""
        m = self.memory
        lines = [
            f"parameters   {self.parameters:,}"
            + ("" if self.trained == self.parameters else f", {self.trained:,} of them trained"),
            f"memory       about {_gb(m.total)} of {_gb(self.free_bytes)} free on {self.device}"
            f" (weights {_gb(m.weights)}, training {_gb(m.training)}, activations {_gb(m.activations)},"
            f" other {_gb(m.other)})",
            f"steps        {self.steps:,}",
        ]
        if self.context is not None:
            lines.append(f"trained on   {self.context}")
        if self.preset is not None:
            p = self.preset
            lines.append(
                f"inference    {p.sink_blocks} sinks with 0 to {p.top_k} mids; {p.recent_blocks} recent;"
                f" slots a mid {p.mid_span}"
            )
        return lines

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        context = None
        if self.context is not None:
            context = {
                "mids": {str(s): m for s, m in self.context.mids.items()},
                "spans": [str(span) for span in self.context.spans],
                "slots": self.context.slots,
            }
        return {
            "kind": self.kind,
            "parameters": self.parameters,
            "trained": self.trained,
            "steps": self.steps,
            "memory_bytes": {**dataclasses.asdict(self.memory), "total": self.memory.total},
            "free_bytes": self.free_bytes,
            "device": self.device,
            "context": context,
            "preset": None if self.preset is None else self.preset.model_dump(mode="json"),
            "mismatches": list(self.mismatches),
        }

    def require_match(self) -> None:
        """Raises: UsageError if inference would leave the context that training meets."""
        if self.mismatches:
            raise UsageError(
                "the result would be run in a context it was not trained in: " + "; ".join(self.mismatches),
                hint="Change [preset] or [data] of the recipe, or pass --force.",
            )

    @property
    def is_too_large(self) -> bool:
        """Whether there is not enough memory."""
        return self.memory.total > self.free_bytes * HEADROOM

    def require_fit(self, would_fit: Sequence[str] = ()) -> None:
        """Raises: MemoryFitError if there is not enough memory; `would_fit`: changes that would help."""
        if self.is_too_large:
            hint = f"This would fit: {would_fit[0]}" if would_fit else "Use a machine with more memory."
            raise MemoryFitError(
                f"the training needs about {_gb(self.memory.total)} and {self.device} has"
                f" {_gb(self.free_bytes)} free",
                hint=hint,
            )


def estimate(
    recipe: AnyRecipe, device: torch.device, *, scene_blocks: int | None = None, processes: int = 1
) -> Estimate:
    """Estimate a recipe on a device.

    Args:
        scene_blocks: blocks of the longest scene of the data; None = as long as the recipe cuts them.
        processes:    among which the weights are shared out; the estimate is of the first one.
    Raises: UsageError or WeightsError if a model or size it names is not possible.
    """
    found = _of_one(recipe, device, scene_blocks)
    if processes > 1 and isinstance(recipe, Finetune | SelfForcing):
        return dataclasses.replace(found, memory=_shared(recipe, found.memory, processes))
    return found


def _shared(recipe: Finetune | SelfForcing, memory: Memory, processes: int) -> Memory:
    """The memory of the first of several processes that share the weights out.

    Its part of all; what is gathered at a time, two layers and what is in no layer, with their gradients; and a whole
    copy of what samples, evaluation and the result are made with.
    """
    _, config, of_compressor, _ = _described(_model_of(recipe))
    with torch.device("meta"):
        network, compressor = WanTransformer(config), Compressor(of_compressor)
    layer, whole = _count(network.blocks[0]), _count(network) + _count(compressor)
    gathered = 4 * (whole - layer * max(0, config.num_layers - 2))
    return dataclasses.replace(
        memory,
        weights=-(-memory.weights // processes) + gathered + 4 * whole,
        training=-(-memory.training // processes) + gathered,
    )


def _model_of(recipe: Finetune | SelfForcing) -> str:
    if isinstance(recipe, Finetune):
        return recipe.model
    return "demo" if recipe.student == "package" else recipe.student


def _of_one(recipe: AnyRecipe, device: torch.device, scene_blocks: int | None) -> Estimate:
    free, name = free_memory(device)
    if isinstance(recipe, DemoVae):
        return _of_vae(recipe, device, free, name)
    if isinstance(recipe, DemoFlow):
        return _of_flow(recipe, device, free, name)
    if isinstance(recipe, SelfForcing):
        return _of_self_forcing(recipe, device, free, name)
    if isinstance(recipe, CompressorDistill):
        return _of_distill(recipe, device, free, name, scene_blocks)
    return _of_finetune(recipe, device, free, name, scene_blocks)


def free_memory(device: torch.device) -> tuple[int, str]:
    """Bytes that can be taken where a model runs, and what to call that place."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_name(device)
    return machine.available_memory(), "this machine"


def _of_vae(recipe: DemoVae, device: torch.device, free: int, name: str) -> Estimate:
    try:
        shape = TinyAutoencoderConfig.from_dict(recipe.model)
    except (TypeError, ValueError) as error:
        raise UsageError(f"recipe model: {error}") from error
    from packforcing_cli.training import world

    with torch.device("meta"):
        model = TinyAutoencoder(shape)
        pixels = torch.empty(recipe.data.clips, 3, recipe.data.frames, world.HEIGHT, world.WIDTH)
    with _Saved() as saved:
        model.decode(model.encode(pixels), clamp=False)
    count = _count(model)
    # Shrunken clips are a sixteenth of the pixels each.
    activations = saved.size_bytes * (1 + recipe.data.shrunken_clips / recipe.data.clips / 16)
    memory = Memory(4 * count, 16 * count, round(activations * (1 + TEMPORARY)), _other(device))
    return Estimate(recipe.kind, count, count, recipe.train.steps, memory, free, name)


def _of_flow(recipe: DemoFlow, device: torch.device, free: int, name: str) -> Estimate:
    from packforcing_cli.training import demo_flow, demo_text, world

    text = demo_text.tiny_umt5_config()
    size, data = recipe.model, recipe.data
    config = TransformerConfig(
        num_layers=size.layers,
        num_attention_heads=size.heads,
        attention_head_dim=size.head_dim,
        ffn_dim=size.ffn_dim,
        text_dim=text.d_model,
    )
    encoder = build_encoder({"model_type": "umt5", **text.to_dict()}, on_meta=True)
    tokenizer = load_tokenizer(demo_flow.package_folder("package") / "tokenizer")
    with torch.device("meta"):
        models = demo_flow.Models(
            WanTransformer(config),
            Compressor(CompressorConfig(dim=config.dim, widths=size.compressor_widths)),
            _Shapes(encoder, tokenizer, max_length=demo_text.DEMO_TEXT_LENGTH),
            _grid(config, (world.WIDTH, world.HEIGHT), 8, demo_flow.FRAMES_PER_BLOCK),
        )
    count = trained = sum(_count(module) for module in models.modules().values())
    copies = 0
    if isinstance(recipe, DemoDistill):  # teacher and target; the text encoder does not learn
        trained -= _count(encoder)
        copies = 2 * trained
    blocks = data.first_scenes + data.short_scenes * data.short_blocks + data.long_scenes * data.long_blocks
    pool = blocks * (demo_flow.FRAMES_PER_BLOCK * 16 * 8 * 16 + 2 * 16 * 2 * 4) * 2
    weight_bytes = 4 * (count + copies)
    if isinstance(recipe, DemoDistill):
        weight_bytes -= saved_bytes(models.transformer, recipe.quantize_frozen, torch.float32)
    activations = flow_bytes(recipe, models, keeps_scores=device.type == "cpu")
    memory = Memory(weight_bytes, 16 * trained, activations, _other(device) + pool)
    mids = {demo_flow.LONG_SINKS: demo_flow.MAX_MIDS if data.long_clips else max(0, data.packed_blocks - 4)}
    context = Context(demo_flow.FRAMES_PER_BLOCK, mids, tuple(sorted(set(demo_flow.SPANS))))
    preset = CacheDefaults(
        frames_per_block=demo_flow.FRAMES_PER_BLOCK,
        top_k=demo_flow.MAX_MIDS,
        mid_span=str(demo_flow.DEFAULT_SPAN),
    )
    return Estimate(
        recipe.kind,
        count,
        trained,
        recipe.train.steps,
        memory,
        free,
        name,
        context,
        preset,
        _mismatches(context, preset),
    )


class _Shapes(TextEncoder):
    """A text encoder whose embeddings have a shape and no values; what it keeps itself is little, and not counted."""

    def encode_tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        return torch.empty(*ids.shape, self.model.config.d_model, device="meta")


def flow_bytes(recipe: DemoFlow, models: Models, *, keeps_scores: bool) -> int:
    """Bytes that the backward pass of a step of every kind of items needs, with what is in hand while it runs.

    Products are counted in float32: in bfloat16 a sixth less is kept, and the weights once more.
    Args:
        models:       on the meta device.
        keeps_scores: see `activation_bytes`.
    """
    from packforcing_cli.training import demo_flow

    data = recipe.data.model_copy(
        update={"long_probability": 1.0, "whole_probability": float(recipe.data.whole_probability > 0)}
    )
    rows, cols, frames = models.grid.latent_rows, models.grid.latent_cols, demo_flow.FRAMES_PER_BLOCK
    channels = models.transformer.config.in_channels

    def pool(blocks: int) -> Pool:
        return demo_flow.Pool(
            latents=torch.zeros(1, blocks, channels, frames, rows, cols, dtype=torch.half),
            lr=torch.zeros(1, blocks, channels, 2, rows // 4, cols // 4, dtype=torch.half),
            caption=torch.arange(blocks)[None] // demo_flow.WHOLE_BLOCKS,
            place=torch.zeros(1, rows, cols),
            here=torch.zeros(1, blocks, dtype=torch.uint8),
        )

    pools = {"first": pool(1), "short": pool(data.short_blocks), "long": pool(data.long_blocks)}

    def saved_by(layers: int) -> int:
        config = dataclasses.replace(models.transformer.config, num_layers=layers)
        with torch.device("meta"):
            fewer = dataclasses.replace(models, transformer=WanTransformer(config))
        batch = demo_flow.Batch(torch.Generator().manual_seed(0), torch.device("meta"))
        total = 0
        for _, clips, draws in demo_flow.items_of_step(fewer, batch, pools, data, mids=demo_flow.MAX_MIDS):
            lengths = set[int]()
            if not keeps_scores:
                text_length = models.text.max_length
                lengths = {text_length, clips.x0.shape[3] * models.grid.rows * models.grid.cols}
                if isinstance(clips, demo_flow.Packed):
                    lengths |= _key_lengths(models.grid, clips.item, text_length)
            with _Saved(frozenset(lengths)) as saved:
                demo_flow.flow_errors(fewer, batch, clips, recipe, draws)
            total += saved.size_bytes
        return total

    one, two = saved_by(1), saved_by(2)
    kept = one + (models.transformer.config.num_layers - 1) * (two - one)
    return round(kept * (1 + TEMPORARY))  # sizes that change from step to step leave gaps in memory


def student_context(recipe: SelfForcing, manifest: Manifest) -> Context:
    """The widest contexts that rollouts of self-forcing meet, of a student with this manifest."""
    frames, trained = Fraction(manifest.cache.frames_per_block), manifest.trained_frames
    plan = recipe.rollout
    length = plan.max_prefix + plan.blocks
    mids = {sinks: min(plan.top_k, max(0, length - sinks - 2)) for sinks in sorted({*plan.sink_blocks})}
    fixed = {min(span_of(span), frames) for span in plan.mid_spans if span != "fit"}
    fitted = {
        min(frames, Fraction(room, count))
        for sinks, most in mids.items()
        for count in range(1, most + 1)
        if "fit" in plan.mid_spans and (room := trained - (sinks + 2) * int(frames)) > 0
    }
    spans = tuple(sorted(fixed | fitted)) or (frames,)
    return Context(int(frames), mids, spans, None if fixed else trained)


def _of_self_forcing(recipe: SelfForcing, device: torch.device, free: int, name: str) -> Estimate:
    """Three networks of one shape, the VAE, and the larger of two graphs: the critic's clip, the student's rollout."""
    manifest, config, of_compressor, vae_params = _described(recipe.student)
    with torch.device("meta"):
        network = WanTransformer(config)
        compressor = Compressor(dataclasses.replace(of_compressor, branches="hr+lr"))
    network_count, compressor_count = _count(network), _count(compressor)
    count, trained = 3 * network_count + compressor_count, 2 * network_count + compressor_count
    dtype = precision(recipe, device)
    half = dtype == torch.bfloat16
    grid = with_bytes(grid_of(manifest, config), dtype)
    context = student_context(recipe, manifest)
    graphs = graph_bytes(
        config,
        grid,
        context,
        blocks=recipe.rollout.blocks,
        text_length=manifest.text_length,
        half=half,
        keeps_scores=device.type == "cpu",
        checkpointing=recipe.train.checkpointing,
    )
    # With products in bfloat16 a pass has a narrow copy of its network's weights.
    activations = max(graphs) + (2 * network_count if half else 0)
    learner = network_count + compressor_count
    # Moments of all that is trained, the averaged student, and the gradients of one step, which go with it.
    training = 8 * trained + 4 * learner + 4 * max(learner, network_count)
    other = _other(device) + dtype.itemsize * vae_params + _rollout_bytes(recipe, grid, manifest)
    weight_bytes = 4 * trained + dtype.itemsize * network_count
    weight_bytes -= saved_bytes(network, recipe.quantize_frozen, dtype)  # of the teacher
    memory = Memory(weight_bytes, training, activations, other)
    return Estimate(
        recipe.kind,
        count,
        trained,
        recipe.train.steps,
        memory,
        free,
        name,
        context,
        manifest.cache,
        _mismatches(context, manifest.cache),
    )


def _described(name: str) -> tuple[Manifest, TransformerConfig, CompressorConfig, int]:
    """Manifest and shapes of a model and the parameters of its VAE; of a known one that is not there its facts."""
    place = "demo" if name == "package" else name
    try:
        folder = packages.find_package(place)
    except OfflineError:
        facts = catalog.find(place)
        if facts is None:
            raise
        manifest = Manifest(name=facts.name, version="0", **packages.records_of(facts))
        config = TransformerConfig(
            num_layers=facts.layers,
            num_attention_heads=facts.heads,
            attention_head_dim=facts.head_dim,
            ffn_dim=facts.ffn_dim,
            in_channels=facts.latent_channels,
            out_channels=facts.latent_channels,
            text_dim=facts.text_dim,
            freq_dim=catalog.TIME_EMBEDDING,
            patch_size=facts.patch,
        )
        shape = CompressorConfig(dim=config.dim, in_channels=config.in_channels)
        return manifest, config, shape, facts.vae_params
    manifest = packages.read_manifest(folder)
    config = TransformerConfig.from_dict(
        weights.read_config(packages.part_folder(folder, manifest, "transformer"))
    )
    vae = sum(record.size for record in manifest.part_files("vae").values())
    wide = 4 if manifest.codec.kind == "wan" else 2  # bytes of a stored number: Wan's are float32
    return manifest, config, compressor_config(manifest, config, folder), vae // wide


def _rollout_bytes(recipe: SelfForcing, grid: Grid, manifest: Manifest) -> int:
    """Bytes of a rollout beside its graph: the cache, what stands still for graded blocks, the decoder at work."""
    plan = recipe.rollout
    length = plan.max_prefix + plan.blocks
    layout = Layout(
        grid=grid,
        sink_blocks=max(plan.sink_blocks),
        recent_blocks=1,
        top_k=plan.top_k,
        bank=None,
        mid_span=Fraction(1),
    )
    # Sinks once, a recent block for each graded one, and what was compressed.
    standing = (max(plan.sink_blocks) + plan.blocks) * grid.block_tokens + length * grid.compressed_tokens
    width, height = manifest.size
    decoder = width * height * DECODER_PEAK[manifest.codec.kind] * grid.dtype_bytes
    return layout.capacity_bytes(length).live + standing * grid.bytes_per_token + decoder


def graph_bytes(
    config: TransformerConfig,
    grid: Grid,
    context: Context,
    *,
    blocks: int,
    text_length: int,
    half: bool,
    keeps_scores: bool,
    checkpointing: bool,
) -> tuple[int, int]:
    """Bytes that the backward pass of the critic's clip needs, and that of the student's rollout of `blocks` blocks.

    What is inside of a layer is counted in float32, which is more than it takes with narrower products.

    Args:
        half:          the mids' keys and values are kept in bfloat16.
        keeps_scores:  attention keeps its scores, as it does on a CPU; a fused kernel does not.
        checkpointing: layers' inputs are kept and one layer is run again at a time.
    """
    heads, head_dim = config.num_attention_heads, config.attention_head_dim
    sinks, mids = max(context.mids.items(), key=lambda found: (found[1], found[0]))
    seen = (sinks + 1) * grid.block_tokens
    # What a number of layers keeps in the backward pass, and what a layer is given.
    kinds = {
        "clip": (blocks * grid.block_tokens, 0, 1),
        "block": (grid.block_tokens, seen + mids * grid.compressed_tokens, 1),
        "mids": (grid.compressed_tokens, sinks * grid.block_tokens, mids),
    }
    found: dict[str, int] = {}
    layers_alone: list[int] = []
    for kind, (tokens, past, rows) in kinds.items():
        if not rows:
            found[kind] = 0
            continue
        sizes = []
        for count in (2, 3):
            with torch.device("meta"):
                model = WanTransformer(dataclasses.replace(config, num_layers=count))
                text = torch.empty(1, text_length, config.text_dim)
                # Keys and values of mids have a graph, which their part of what is read leads to.
                kept = torch.empty(1, past, heads, head_dim, requires_grad=kind == "block")
                own = torch.empty(tokens, 3, dtype=torch.float64)
            context_read = _Beside(own, kept)
            ignored = frozenset[int]() if keeps_scores else frozenset({text_length, tokens + past})
            with _Saved(ignored - {head_dim, config.dim}) as saved:
                if kind == "mids":
                    embedded = model.embed_text(text)
                    texts = TextKV(
                        tuple(
                            (k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1))
                            for k, v in embedded.layers
                        )
                    )
                    given = torch.empty(rows, tokens, config.dim, device="meta", requires_grad=True)
                    model.commit_tokens(given, texts, context_read)
                else:
                    length = tokens // (grid.rows * grid.cols)
                    shape = (1, config.in_channels, length, grid.latent_rows, grid.latent_cols)
                    latents = torch.empty(*shape, device="meta")
                    timesteps = torch.empty(1, length, dtype=torch.float64, device="meta")
                    model(latents, timesteps, model.embed_text(text), context_read)
            sizes.append(saved.size_bytes)
        layer, rest = sizes[1] - sizes[0], max(0, 3 * sizes[0] - 2 * sizes[1])
        result = rest + config.num_layers * layer
        if checkpointing:
            result = rest + config.num_layers * rows * tokens * config.dim * 4
            layers_alone.append(layer)
        if kind == "mids":  # its keys and values, which blocks read
            result += config.num_layers * 2 * rows * tokens * config.dim * (2 if half else 4)
        found[kind] = result
        if not checkpointing:
            layers_alone.append(layer)
    widest = max(layers_alone)
    spare = (1 if checkpointing else 0) * widest + round(TEMPORARY * widest)
    return found["clip"] + spare, blocks * (found["block"] + found["mids"]) + spare


class _Beside:
    """A context of the right size, for counting. Satisfies `transformer.Context`."""

    def __init__(self, positions: Tensor, past: Tensor) -> None:
        self.positions, self._past = positions, past

    def layer(self, layer: int, k: Tensor, v: Tensor, q_sum: Tensor) -> tuple[Tensor, Tensor]:
        past = self._past.expand(k.shape[0], -1, -1, -1)
        return torch.cat((k, past), 1), torch.cat((v, past), 1)


def _of_finetune(
    recipe: Finetune, device: torch.device, free: int, name: str, scene_blocks: int | None
) -> Estimate:
    folder = packages.find_package(recipe.model)
    manifest = packages.read_manifest(folder)
    config = TransformerConfig.from_dict(
        weights.read_config(packages.part_folder(folder, manifest, "transformer"))
    )
    with torch.device("meta"):
        transformer = WanTransformer(config)
        compressor = Compressor(compressor_config(manifest, config, folder))
    count = _count(transformer) + _count(compressor)
    trained = count if recipe.train_transformer else _count(compressor)
    if isinstance(recipe, FinetuneLora):
        linears = {name: child for name, child in transformer.named_modules() if isinstance(child, nn.Linear)}
        trained = sum(
            recipe.rank * (child.in_features + child.out_features)
            for name, child in linears.items()
            if any(name.endswith(f".{target}") for target in recipe.targets)
        )
        count += trained
    grid = grid_of(manifest, config)
    shape = shape_of(recipe.data)
    blocks = scene_blocks or grid.blocks_for(recipe.data.scene_seconds, manifest.fps)
    if blocks < shape.least_blocks:
        raise UsageError(
            f"scenes of {recipe.data.scene_seconds:g} s have {blocks} blocks, {shape.name} items need"
            f" {shape.least_blocks}",
            hint="Use longer clips, or a larger data.scene_seconds.",
        )
    item = widest_item(shape, grid, blocks)
    activations = activation_bytes(
        config,
        grid,
        item,
        draws=recipe.data.draws,
        text_length=manifest.text_length,
        half=precision(recipe, device) == torch.bfloat16,
        keeps_scores=device.type == "cpu",
        checkpointing=recipe.checkpointing,
    )
    other = _other(device)
    if recipe.samples.every:
        vae = sum(record.size for record in manifest.part_files("vae").values())
        other += 2 * vae if device.type == "cpu" else vae
    weight_bytes = 4 * count - saved_bytes(transformer, recipe.quantize_frozen, torch.float32)
    memory = Memory(weight_bytes, 16 * trained, activations, other)
    context = shape.context(grid, blocks)
    preset = preset_of(recipe, manifest)
    return Estimate(
        recipe.kind,
        count,
        trained,
        recipe.train.steps,
        memory,
        free,
        name,
        context,
        preset,
        _mismatches(context, preset),
    )


def _of_distill(
    recipe: CompressorDistill, device: torch.device, free: int, name: str, scene_blocks: int | None
) -> Estimate:
    """A frozen transformer, a compressor, the cache of inference, and graphs of a few compressed forwards."""
    folder = packages.find_package(recipe.model)
    manifest = packages.read_manifest(folder)
    config = TransformerConfig.from_dict(
        weights.read_config(packages.part_folder(folder, manifest, "transformer"))
    )
    with torch.device("meta"):
        transformer = WanTransformer(config)
        compressor = Compressor(
            dataclasses.replace(compressor_config(manifest, config, folder), branches="hr+lr")
        )
    dtype = precision(recipe, device)
    grid = with_bytes(grid_of(manifest, config), dtype)
    rollouts = not recipe.data.folder
    blocks = scene_blocks or (
        recipe.data.rollout_blocks if rollouts else grid.blocks_for(recipe.data.scene_seconds, manifest.fps)
    )
    shape = DistillShape.by(recipe.data, blocks)
    if blocks < shape.least_blocks:
        raise UsageError(
            f"scenes of {blocks} blocks: with {max(shape.sinks)} sinks a block asks for a compressed one from block"
            f" {shape.least_blocks} on",
            hint="Use longer clips, a larger data.scene_seconds, or data.sinks=[1].",
        )
    count, trained = _count(transformer) + _count(compressor), _count(compressor)
    weight_bytes = dtype.itemsize * _count(transformer) + 4 * trained
    weight_bytes -= saved_bytes(transformer, recipe.quantize_frozen, dtype)
    activations = distill_bytes(
        config,
        shape.layout(grid, max(shape.sinks), max(shape.spans)),
        recipe,
        blocks,
        text_length=manifest.text_length,
        keeps_scores=device.type == "cpu",
    )
    other = _other(device)
    if recipe.samples.every:
        vae = sum(record.size for record in manifest.part_files("vae").values())
        other += 2 * vae if device.type == "cpu" else vae
    memory = Memory(weight_bytes, 16 * trained, activations, other)
    if rollouts:  # made before, with the VAE in memory; the prompts are read before that
        parts = {
            part: sum(r.size for r in manifest.part_files(part).values()) for part in ("vae", "text_encoder")
        }
        wide = 2 if device.type == "cpu" else 1  # stored in 16 bits
        cache = shape.layout(grid, max(shape.sinks), max(shape.spans)).capacity_bytes(blocks).live
        making = max(parts["text_encoder"] * wide, weight_bytes + cache + parts["vae"] * wide)
        memory = dataclasses.replace(memory, other=other + max(0, making - (memory.total - other)))
    context, preset = shape.context(grid, blocks), preset_of(recipe, manifest)
    return Estimate(
        recipe.kind,
        count,
        trained,
        recipe.train.steps,
        memory,
        free,
        name,
        context,
        preset,
        _mismatches(context, preset),
    )


def would_fit(
    recipe: AnyRecipe, device: torch.device, *, scene_blocks: int | None = None, processes: int = 1
) -> list[str]:
    """Changes of a recipe, as --set options, with which it fits; the mildest first.

    None of them takes the result's inference out of the trained context where the recipe itself does not.
    """
    own = estimate(recipe, device, scene_blocks=scene_blocks, processes=processes)
    changes: list[dict[str, Any]]
    if isinstance(recipe, DemoVae):
        whole, shrunken = recipe.data.clips, recipe.data.shrunken_clips
        changes = [
            {"data.clips": -(-whole // part), "data.shrunken_clips": shrunken // part}
            for part in (2, 4, whole)
        ]
    elif isinstance(recipe, DemoFlow):
        draws: dict[str, Any] = {"data.packed_draws": 1, "data.long_draws": 1}
        clips = {
            "data.packed_clips": min(1, recipe.data.packed_clips),
            "data.long_clips": min(1, recipe.data.long_clips),
        }
        firsts = {"data.first_clips": recipe.data.first_clips // 4}
        changes = [draws, draws | clips, draws | clips | firsts]
    elif isinstance(recipe, SelfForcing):
        changes = [{"train.checkpointing": True}]
        for more in (
            {"precision": "bf16"},
            {"quantize_frozen": "int8"},
            {"rollout.max_prefix": recipe.rollout.max_prefix // 2},
            {"rollout.max_prefix": 0, "rollout.blocks": min(3, recipe.rollout.blocks)},
        ):
            changes.append({**changes[-1], **more})
    elif isinstance(recipe, CompressorDistill):
        small = {"checkpointing": True, "queries.stand_ins": 1, "queries.blocks": 1, "queries.layers": 1}
        changes = [{"checkpointing": True}, small, {"quantize_frozen": "int8"}]
        changes += [{**small, "quantize_frozen": "int8"}]
    else:
        changes = [{"checkpointing": True}, {"checkpointing": True, "samples.every": 0}]
        if isinstance(recipe, FinetuneLora):
            changes.append({**changes[-1], "quantize_frozen": "int8"})
        else:
            changes.append({**changes[-1], "train_transformer": False})
    found = []
    for change in changes:
        values = recipe.model_dump(mode="json", exclude_unset=True)
        for key, value in change.items():
            table, _, last = key.rpartition(".")
            (values.setdefault(table, {}) if table else values)[last] = value
        smaller = estimate(
            type(recipe).model_validate(values), device, scene_blocks=scene_blocks, processes=processes
        )
        if not smaller.is_too_large and len(smaller.mismatches) <= len(own.mismatches):
            found.append(" ".join(f"--set {key}={str(value).lower()}" for key, value in change.items()))
    return found


def _mismatches(context: Context, preset: CacheDefaults) -> tuple[str, ...]:
    return context.mismatches(
        sink_blocks=preset.sink_blocks,
        recent_blocks=preset.recent_blocks,
        top_k=preset.top_k,
        mid_span=preset.mid_span,
    )


# -- what a recipe and a package say together ---------------------------------------------------------------------


def shape_of(data: ItemData) -> Shape:
    """How items are drawn."""
    return Shape(data.shape, data.blocks, data.sinks, data.max_mids, data.slot_spans, data.drop)


def grid_of(manifest: Manifest, config: TransformerConfig) -> Grid:
    """Token grid of a package's own size."""
    return _grid(config, manifest.size, manifest.codec.spatial_stride, manifest.cache.frames_per_block)


def _grid(config: TransformerConfig, size: tuple[int, int], stride: int, frames_per_block: int) -> Grid:
    multiple = stride * config.patch_size[1]
    return Grid(
        frames_per_block=frames_per_block,
        rows=size[1] // multiple,
        cols=size[0] // multiple,
        layers=config.num_layers,
        kv_dim=config.dim,
        heads=config.num_attention_heads,
        dtype_bytes=4,
    )


def compressor_config(manifest: Manifest, config: TransformerConfig, folder: Any) -> CompressorConfig:
    """The package's compressor, or the one of the paper for a model that has none."""
    if "compressor" in manifest.parts or "compressor" in manifest.references:
        values = weights.read_config(packages.part_folder(folder, manifest, "compressor"))
        return CompressorConfig.from_dict(values)
    return CompressorConfig(dim=config.dim, in_channels=config.in_channels)


def preset_of(recipe: Finetune | CompressorDistill, manifest: Manifest) -> CacheDefaults:
    """Memory settings of the result: the recipe's, else those of the model it starts from."""
    changes = recipe.preset.model_dump(exclude_none=True)
    if not isinstance(recipe, FinetuneLora):
        changes["compressor"] = "hr+lr"  # it is trained, where the model had none, too
    return manifest.cache.model_copy(update=changes)


def precision(recipe: Finetune | CompressorDistill | SelfForcing, device: torch.device) -> torch.dtype:
    """The dtype of products."""
    if recipe.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if recipe.precision == "bf16" else torch.float32


def widest_item(shape: Shape, grid: Grid, scene_blocks: int) -> Item:
    """The item with most tokens among a number of draws without drops."""
    shape = dataclasses.replace(shape, drop=0.0)
    draws = [shape.item(grid, scene_blocks, torch.Generator().manual_seed(n)) for n in range(64)]
    return max(draws, key=lambda i: (len(i.packed.full) + len(i.targets), len(i.packed.compressed)))


# -- activations --------------------------------------------------------------------------------------------------


def activation_bytes(
    config: TransformerConfig,
    grid: Grid,
    item: Item,
    *,
    draws: int,
    text_length: int,
    half: bool = False,
    keeps_scores: bool,
    checkpointing: bool = False,
) -> int:
    """Bytes that the backward pass of one item needs, with what is in hand while it runs.

    Args:
        half:          products in bfloat16.
        keeps_scores:  attention keeps its scores, as it does on a CPU; a fused kernel does not.
        checkpointing: the layers' inputs are kept and one layer is run again at a time.
    """
    one, two = (
        _saved_by(
            dataclasses.replace(config, num_layers=n), grid, item, draws, text_length, half, keeps_scores
        )
        for n in (1, 2)
    )
    layer, rest = two - one, max(0, 2 * one - two)
    tokens = (len(item.packed.full) + draws * len(item.targets)) * grid.block_tokens
    tokens += len(item.packed.compressed) * grid.compressed_tokens
    if checkpointing:
        kept = rest + layer + config.num_layers * tokens * config.dim * 4
    else:
        kept = rest + config.num_layers * layer
    return round(kept + TEMPORARY * layer)


def distill_bytes(
    config: TransformerConfig,
    layout: Layout,
    recipe: CompressorDistill,
    blocks: int,
    *,
    text_length: int,
    keeps_scores: bool,
) -> int:
    """Bytes that one item of compressor distillation needs beside the weights.

    Args:
        layout: of its context, with the bytes of its keys and values.
        blocks: of its scene.
    """
    grid, asked = layout.grid, recipe.queries
    stand_ins = min(asked.stand_ins, max(1, blocks - layout.sink_blocks - layout.recent_blocks - 1))
    tokens = layout.tokens(layout.largest_view(blocks))
    # The cache; the whole keys and values of the replaced blocks, of the sinks (rotated for the compressed forward)
    # and of the block in hand, which are stacked from their layers.
    kept = layout.capacity_bytes(blocks).live
    kept += (stand_ins + layout.sink_blocks + 2) * grid.block_tokens * grid.bytes_per_token
    # What asking leaves: for each layer that is compared the rest of the context, and the same with the stand-ins.
    layers = min(asked.layers, grid.layers) * asked.blocks
    number = grid.dtype_bytes
    keys = tokens.active + stand_ins * grid.compressed_tokens
    kept += layers * 2 * (2 * keys * grid.kv_dim * number)
    if keeps_scores:
        kept += layers * 2 * min(asked.tokens, grid.block_tokens) * keys * grid.heads * 4
    # One pass over a whole block: what is in hand in its widest layer.
    wide = max(config.ffn_dim, 4 * config.dim)
    passing = grid.block_tokens * (2 * wide + 4 * config.dim) * 4 + 4 * keys * grid.kv_dim * number
    graphs = [
        _compressed_forward(dataclasses.replace(config, num_layers=n), layout, text_length) for n in (2, 3)
    ]
    layer = graphs[1] - graphs[0]
    forward = round((graphs[0] + (config.num_layers - 2) * layer) * number / 4)
    pairs = stand_ins * grid.compressed_tokens * grid.bytes_per_token
    return kept + passing + pairs + (1 if recipe.checkpointing else stand_ins) * forward


def _compressed_forward(config: TransformerConfig, layout: Layout, text_length: int) -> int:
    """Bytes that the backward pass of one compressed forward needs, in float32."""
    grid = layout.grid
    heads, head_dim = config.num_attention_heads, config.attention_head_dim
    with torch.device("meta"):
        model = WanTransformer(config).requires_grad_(False)
        tokens = torch.empty(1, grid.compressed_tokens, config.dim, requires_grad=True)
        text = torch.empty(1, text_length, config.text_dim)
        past = torch.empty(1, layout.sink_blocks * grid.block_tokens, heads, head_dim)
    context = AppendedContext(
        torch.empty(grid.compressed_tokens, 3, dtype=torch.float64, device="meta"),
        [past] * config.num_layers,
        [past] * config.num_layers,
    )
    with _Saved() as saved:
        model.commit_tokens(tokens, model.embed_text(text), context)
    return saved.size_bytes


def saved_bytes(module: nn.Module, mode: str, dtype: torch.dtype) -> int:
    """Bytes that quantizing the linears of a frozen transformer's layers spares."""
    if mode == "none":
        return 0
    linears = [
        child
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and name.startswith(registry.LAYERS)
    ]
    return sum(
        frozen.linear_bytes(linear, "none", dtype) - frozen.linear_bytes(linear, mode, dtype)
        for linear in linears
    )


def _saved_by(
    config: TransformerConfig,
    grid: Grid,
    item: Item,
    draws: int,
    text_length: int,
    half: bool,
    keeps_scores: bool,
) -> int:
    frames, h, w = grid.frames_per_block, grid.latent_rows, grid.latent_cols
    full, targets, mids = len(item.packed.full), len(item.targets), len(item.packed.compressed)
    with torch.device("meta"):
        model = WanTransformer(config)
        clean = torch.empty(1, full, config.in_channels, frames, h, w)
        noisy = torch.empty(1, draws * targets, config.in_channels, frames, h, w)
        compressed = torch.empty(1, mids, grid.compressed_tokens, config.dim, requires_grad=True)
        text = torch.empty(1, text_length, config.text_dim)
        timesteps = torch.empty(1, draws * targets)
    ignored = frozenset[int]() if keeps_scores else frozenset(_key_lengths(grid, item.packed, text_length))
    with (
        _Saved(ignored - {config.attention_head_dim, config.dim}) as saved,
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        packed_forward(
            model,
            item.packed,
            grid,
            clean=clean,
            compressed=compressed,
            noisy=noisy,
            timesteps=timesteps,
            text=model.embed_text(text),
            targets=item.targets,
        )
    return saved.size_bytes


def _key_lengths(grid: Grid, item: PackedItem, text_length: int) -> set[int]:
    """How many keys the queries of an item attend, in all its attentions."""
    block, packed = grid.block_tokens, grid.compressed_tokens
    lengths = {text_length, len(item.sinks or ()) * block + packed}
    for view in item.views:
        lengths.add((len(view.sink) + len(view.recent) + 1) * block + len(view.mid) * packed)
    return lengths


class _Saved:
    """Counts the bytes of tensors kept for the backward pass inside a `with`; parameters are not among them.

    ignored_lengths: a last dimension of one of these is that of attention scores, which a fused kernel does not keep.
    """

    def __init__(self, ignored_lengths: frozenset[int] = frozenset()) -> None:
        self._sizes: dict[int, int] = {}
        self._kept: list[Tensor] = []  # an identity means something only as long as the tensor lives
        self._ignored = ignored_lengths
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def _pack(self, tensor: Tensor) -> Tensor:
        scores = tensor.ndim >= 3 and tensor.shape[-1] in self._ignored
        if not isinstance(tensor, nn.Parameter) and not scores:
            storage = tensor.untyped_storage()
            self._sizes[storage._cdata] = storage.nbytes()
            self._kept.append(tensor)
        return tensor

    @property
    def size_bytes(self) -> int:
        return sum(self._sizes.values())

    def __enter__(self) -> _Saved:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _other(device: torch.device) -> int:
    return CUDA_CONTEXT if device.type == "cuda" else PROCESS


def _gb(size_bytes: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes / 1e3:.0f} kB"
