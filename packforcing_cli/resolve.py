"""What a model and a person's settings are together: schedule, grid, layout, shapes, the kind of compressor.

Knows nothing of a video in the making. Source: docs/method.md 1.4, 2.1, 3.4.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from packforcing_cli import catalog
from packforcing_cli.compressor import Compressor, CompressorConfig
from packforcing_cli.config import COMPRESSORS, MemoryOptions
from packforcing_cli.errors import UsageError
from packforcing_cli.layout import Grid, Layout
from packforcing_cli.registry import ModelSource, VideoModel
from packforcing_cli.sampler import Schedule


def schedule_for(
    model: VideoModel | ModelSource, *, steps: int | None = None, guidance: float | None = None
) -> Schedule:
    """The package's schedule with the person's changes.

    Raises: UsageError for guidance, or another number of steps, on a few-step student.
    """
    own = model.manifest.schedule
    catalog.check_sampling(model.name, own.kind, own.steps, steps=steps, guidance=guidance)
    return Schedule.build(
        own.kind,
        steps=own.timesteps if own.kind == "renoise" else steps or own.steps,
        shift=own.shift,
        guidance=own.guidance if guidance is None else guidance,
    )


def grid_for(model: VideoModel, size: tuple[int, int]) -> Grid:
    """Token grid of a block. Raises: UsageError for a size (width, height) that does not fit the patches."""
    config = model.transformer.config
    multiple = model.codec.facts.spatial_stride * config.patch_size[1]
    catalog.check_size(size, multiple, name=model.name, default_size=model.manifest.size)
    return Grid(
        frames_per_block=model.manifest.cache.frames_per_block,
        rows=size[1] // multiple,
        cols=size[0] // multiple,
        layers=config.num_layers,
        kv_dim=config.dim,
        heads=config.num_attention_heads,
        dtype_bytes=model.dtype.itemsize,
    )


def layout_for(model: VideoModel, memory: MemoryOptions, grid: Grid, *, num_blocks: int) -> Layout:
    """The layout of a video without cuts and pins. Raises: LayoutError for a memory that is not possible."""
    trained = model.manifest.trained_frames
    return memory.layout(grid, num_blocks=num_blocks, trained_frames=trained, default_span="fit")


def latent_shape(model: VideoModel, layout: Layout) -> tuple[int, ...]:
    """[1,C,F,h,w] of a block."""
    grid = layout.grid
    channels = model.transformer.config.in_channels
    return (1, channels, grid.frames_per_block, grid.latent_rows, grid.latent_cols)


def compressor_kind(model: VideoModel, wanted: str) -> str:
    """The kind of compressor an option means: of weights given by name or folder, the branches they have.

    Raises: UsageError if the model was loaded without them.
    """
    if wanted in COMPRESSORS:
        return wanted
    if model.compressor is None:
        raise UsageError(
            f"{model.name} was loaded without the compressor {wanted}",
            hint="Give it to load_model(compressor=…), too.",
        )
    return model.compressor.config.branches


def branches(model: VideoModel, kind: str) -> Compressor:
    """The package's compressor with the wanted branches. LR alone needs no weights."""
    if model.compressor is not None and model.compressor.config.branches == kind:
        return model.compressor
    config = CompressorConfig(dim=model.transformer.config.dim, branches=kind)
    if model.compressor is not None:
        config = replace(model.compressor.config, branches=kind)
    with torch.device("meta"):
        network = Compressor(config)
    if network.hr is not None:
        trained = model.compressor.hr if model.compressor is not None else None
        catalog.check_compressor(model.name, "lr" if trained is None else "hr", kind)
        network.hr = trained
    return network.eval()
