"""packforcing models convert SOURCE: a model package from a published checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

KINDS = ("student", "full")


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A model that was pulled, a checkpoint (.pt), a .safetensors file, or a folder of sharded ones."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FOLDER", help="The package to write. A pulled model has its own place."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="MODEL", help="A package to take VAE, text encoder and tokenizer from."
        ),
    ] = None,
    ema: Annotated[
        bool | None,
        typer.Option("--ema/--no-ema", help="Averaged or last weights. Default: averaged if there are any."),
    ] = None,
    lora: Annotated[
        Path | None,
        typer.Option("--lora", metavar="FILE", help="An adapter to merge, as LongLive's lora.pt."),
    ] = None,
    lora_alpha: Annotated[
        float | None, typer.Option("--lora-alpha", help="Of the adapter. Default: its rank, a scale of 1.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--kind", metavar="NAME", help="student (few steps) or full (guidance). Default: by the source."
        ),
    ] = None,
    frames_per_block: Annotated[
        int | None,
        typer.Option("--frames-per-block", help="Latent frames the model makes together. Default 3.", min=1),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="NAME", help="Of the stored weights: keep, bf16, fp16 or fp32.")
    ] = "keep",
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the package. Default: the folder's.")
    ] = None,
    license_: Annotated[
        str | None,
        typer.Option("--license", metavar="TEXT", help="Licence of the weights, for the manifest."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing package.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but errors.")] = False,
) -> None:
    """Make a model package from published weights. Prints its folder.

    For the models packforcing knows: packforcing models pull NAME, then packforcing models convert NAME.

    Understands Self-Forcing, Causal-Forcing and LongLive checkpoints, original Wan 2.1 safetensors and those of
    diffusers. A .pt file is a program; it is read in a process of its own, and only if it holds nothing but tensors.

    Example: packforcing models convert self_forcing_dmd.pt -o self-forcing --base ./wan-package
    """
    from packforcing_cli import catalog, install, registry
    from packforcing_cli.cli import console
    from packforcing_cli.convert import convert as run
    from packforcing_cli.errors import UsageError

    if kind not in (None, *KINDS):
        raise UsageError(f"--kind {kind}: must be {' or '.join(KINDS)}", hint="See --kind in --help.")
    chosen: Any = kind
    stored = None
    if dtype != "keep":
        if dtype == "auto":
            raise UsageError("--dtype auto: must be keep, bf16, fp16 or fp32", hint="See --dtype in --help.")
        stored = registry.resolve_dtype(dtype, registry.resolve_device("cpu"))
    known = None if source.exists() else catalog.find(str(source))
    pickled = None
    if known is not None and known.pickled:
        given = {
            "--output": output,
            "--base": base,
            "--lora": lora,
            "--lora-alpha": lora_alpha,
            "--kind": kind,
            "--frames-per-block": frames_per_block,
            "--name": name,
            "--license": license_,
        }
        for option, value in given.items():
            if value is not None:
                raise UsageError(
                    f"{option} does not go with {known.name}, which decides it", hint="Leave it away."
                )
        pickled = install.pickled(known)
        source, output, base, name, license_ = (
            pickled.checkpoint, pickled.folder, str(pickled.folder), known.name, known.license
        )  # fmt: skip
        lora, overwrite = pickled.lora, True
        ema = known.ema if ema is None else ema
    if output is None:
        raise UsageError("there is no --output", hint="Name the package's folder: -o FOLDER")
    if not quiet:
        console.say(f"reading {source} …")
    done = run(
        source,
        output,
        base=base,
        ema=ema,
        lora=lora,
        lora_alpha=lora_alpha,
        kind=chosen,
        frames_per_block=frames_per_block,
        dtype=stored,
        name=name,
        license=license_,
        overwrite=overwrite,
    )
    if pickled is not None:
        install.finish_conversion(pickled, done.manifest)
    if not quiet:
        for note in done.notes:
            console.say(note)
    console.result(str(done.folder))
