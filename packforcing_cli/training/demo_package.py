"""Pack a trained demo into a model package that `packforcing generate --model FOLDER` runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from packforcing_cli.registry import CacheDefaults, CodecFactsRecord, Manifest, Schedule, write_package
from packforcing_cli.training import demo_text, world
from packforcing_cli.training.demo_flow import (
    DEFAULT_SPAN,
    FRAMES_PER_BLOCK,
    MAX_MIDS,
    TRAINED_FRAMES,
    Models,
)
from packforcing_cli.vae import TinyCodec

VERSION = "0.1.0"
STEPS, GUIDANCE = 8, 2.0  # at 3 shades are driven to pure colours and the landmark bar is lost


def schedule(shift: float) -> Schedule:
    """How a demo that is no few-step student is sampled."""
    return Schedule(kind="euler", steps=STEPS, shift=shift, guidance=GUIDANCE)


def manifest(
    codec: TinyCodec,
    *,
    schedule: Schedule,
    provenance: Mapping[str, Any],
    flow_schedule: Schedule | None = None,
) -> Manifest:
    """What the demo is and how it is run. `provenance`: recipe, data, steps, measured figures."""
    words = {word.strip(",") for caption in world.story_captions() for word in caption.split()}
    return Manifest(
        name="demo",
        version=VERSION,
        title="Toy world shipped with packforcing: coloured shapes moving over coloured backgrounds",
        license="Apache-2.0",
        size=(world.WIDTH, world.HEIGHT),
        fps=world.FPS,
        trained_frames=TRAINED_FRAMES,
        text_length=demo_text.DEMO_TEXT_LENGTH,
        cache=CacheDefaults(frames_per_block=FRAMES_PER_BLOCK, top_k=MAX_MIDS, mid_span=str(DEFAULT_SPAN)),
        schedule=schedule,
        flow_schedule=flow_schedule,
        codec=CodecFactsRecord.of(codec),
        vocabulary=tuple(word for word in demo_text.WORDS if word in words),
        limits=(
            "One coloured shape over one coloured background and, where the prompt says that the visitor is here, a"
            " small box of another colour; nothing else exists in this world.",
            "64x128 pixels only: it was trained at no other size.",
        ),
        provenance=dict(provenance),
    )


def write(
    folder: Path,
    models: Models,
    codec: TinyCodec,
    tokenizer_dir: Path,
    *,
    schedule: Schedule,
    provenance: Mapping[str, Any],
    flow_schedule: Schedule | None = None,
) -> Manifest:
    """Write the package folder, 16-bit weights, replacing an older one; `flow_schedule`: of a student's teacher."""
    return write_package(
        folder,
        manifest(codec, schedule=schedule, provenance=provenance, flow_schedule=flow_schedule),
        transformer=models.transformer,
        compressor=models.compressor,
        vae=codec.module,
        text_encoder=models.text,
        tokenizer_dir=tokenizer_dir,
        dtype=torch.float16,
        overwrite=True,
    )
