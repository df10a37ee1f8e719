"""The memory options, the same on every command that has them: annotated types for Typer signatures.

A value is text or a number here; config.MemoryOptions checks it. None = not given.
"""

from __future__ import annotations

from typing import Annotated

import typer

PANEL = "Memory"
SPEED = "Speed"

Policy = Annotated[
    str | None,
    typer.Option(
        "--policy",
        metavar="NAME",
        rich_help_panel=PANEL,
        help="packforcing, sink (no compressed memory), window (newest blocks only) or full (everything).",
    ),
]
SinkBlocks = Annotated[
    int | None,
    typer.Option(
        "--sink-blocks", rich_help_panel=PANEL, help="First blocks, kept at full resolution. Default 2."
    ),
]
RecentBlocks = Annotated[
    int | None,
    typer.Option(
        "--recent-blocks", rich_help_panel=PANEL, help="Newest blocks at full resolution. Default 1."
    ),
]
TopK = Annotated[
    int | None,
    typer.Option("--top-k", rich_help_panel=PANEL, help="Compressed blocks recalled at a time. Default 16."),
]
Bank = Annotated[
    str | None,
    typer.Option(
        "--bank",
        metavar="N",
        rich_help_panel=PANEL,
        help="Compressed blocks kept, or unlimited. Default 256.",
    ),
]
Select = Annotated[
    str | None,
    typer.Option(
        "--select",
        metavar="NAME",
        rich_help_panel=PANEL,
        help="How blocks are recalled: affinity-recent (default), affinity (the paper), fifo, random or none.",
    ),
]
MidSpan = Annotated[
    str | None,
    typer.Option(
        "--mid-span",
        metavar="SLOTS",
        rich_help_panel=PANEL,
        help="Temporal slots a compressed block takes: a number or fraction, block (all of its frames) or"
        " fit (what is left of the trained range). Default: as the model was trained.",
    ),
]
Compressor = Annotated[
    str | None,
    typer.Option(
        "--compressor",
        metavar="NAME",
        rich_help_panel=PANEL,
        help="auto (the model's own), hr+lr, hr, lr (needs no training), none (old blocks are forgotten), the baselines"
        " pool and identity; or other weights: an installed model's name, or a folder.",
    ),
]
CompressedContext = Annotated[
    str | None,
    typer.Option(
        "--compressed-context",
        metavar="NAME",
        rich_help_panel=PANEL,
        help="What a block sees while it is compressed: sinks (default) or history.",
    ),
]
RopeAdjustment = Annotated[
    bool | None,
    typer.Option(
        "--rope-adjustment/--no-rope-adjustment",
        rich_help_panel=PANEL,
        help="Whether what attends takes contiguous temporal slots (default), or every block keeps those of its own"
        " time, so that distances grow with the video.",
    ),
]
KVDtype = Annotated[
    str | None,
    typer.Option(
        "--kv-dtype",
        metavar="NAME",
        rich_help_panel=PANEL,
        help="How compressed blocks are kept: auto (default, as the model computes), bf16, fp8 or int8; what is smaller"
        " lets more of them fit.",
    ),
]
BankMemory = Annotated[
    str | None,
    typer.Option(
        "--bank-memory",
        metavar="SIZE",
        rich_help_panel=PANEL,
        help="The most memory the bank of compressed blocks may take, for example 8GB; it keeps fewer blocks then.",
    ),
]
BankDevice = Annotated[
    str | None,
    typer.Option(
        "--bank-device",
        metavar="NAME",
        rich_help_panel=PANEL,
        help="Where the bank is: device, host, or auto (default): host memory where it does not fit on the GPU. The"
        " video is the same.",
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="NAME",
        rich_help_panel=PANEL,
        help="Smaller weights in the transformer: none, int8, int8-dynamic, fp8 or fp8-weight. Default none.",
    ),
]
QuantizeSkip = Annotated[
    str | None,
    typer.Option(
        "--quantize-skip",
        metavar="LAYERS",
        rich_help_panel=PANEL,
        help="Layers of the transformer that --quantize leaves as they are, for example 0,28-29. Default: none.",
    ),
]
QuantizeText = Annotated[
    str | None,
    typer.Option(
        "--quantize-text",
        metavar="NAME",
        rich_help_panel=PANEL,
        help="Smaller weights in the text encoder: none or int8. Default none.",
    ),
]
Offload = Annotated[
    str | None,
    typer.Option(
        "--offload",
        metavar="NAME",
        rich_help_panel=PANEL,
        help="What stays in host memory: none (default), text (the text encoder runs on the CPU), or all (also the"
        " transformer's layers, each copied to the GPU while it runs).",
    ),
]
Attention = Annotated[
    str | None,
    typer.Option(
        "--attention",
        metavar="NAME",
        rich_help_panel=SPEED,
        help="Kernel of attention: auto (default; cuDNN first on Hopper GPUs), cudnn, flash, efficient, math, or, where"
        " installed, fa3 (FlashAttention 3) or sage (SageAttention). What cannot run here is refused.",
    ),
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        rich_help_panel=SPEED,
        help="Compile parts of the transformer's layers, and the Wan VAE's decoder: faster on a GPU, after a wait that"
        " later runs are spared. Changes results by rounding. Default no.",
    ),
]
CudaGraphs = Annotated[
    bool | None,
    typer.Option(
        "--cuda-graphs/--no-cuda-graphs",
        rich_help_panel=SPEED,
        help="Record the passes over a full memory and replay them: less work for the CPU beside a GPU, the same"
        " results. Default no.",
    ),
]
Vae = Annotated[
    str | None,
    typer.Option(
        "--vae",
        metavar="NAME",
        rich_help_panel=PANEL,
        help="tiny (taew2_1), wan, another VAE by its name, or a folder with one of the same latents. Default: the"
        " model's own.",
    ),
]
VaeLatents = Annotated[
    int | None,
    typer.Option(
        "--vae-latents",
        metavar="N",
        rich_help_panel=SPEED,
        help="Latent frames the Wan VAE decodes at a time. More take that many times the memory of decoding, and change"
        " results by rounding; packforcing bench stream says what is gained. Default 1.",
    ),
]
Guard = Annotated[
    str | None,
    typer.Option(
        "--guard",
        metavar="NAME",
        help="What happens to a block that is frozen, black, saturated, jumps or is NaN: warn (default), retry (it is"
        " made up to three times in all, with other noise) or stop (the video ends before it).",
    ),
]
Overlap = Annotated[
    str | None,
    typer.Option(
        "--overlap",
        metavar="NAME",
        rich_help_panel=PANEL,
        help="Decode and compress a block while the next one is denoised: on, off, or auto (default: on a GPU, where it"
        " is faster and as much memory is free as is taken). The video is the same; its last block is later by one.",
    ),
]
AutoFit = Annotated[
    bool,
    typer.Option(
        "--auto-fit",
        rich_help_panel=PANEL,
        help="If it does not fit in memory, make the smallest change that fits, and say so.",
    ),
]
