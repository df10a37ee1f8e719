"""packforcing models embed PROMPT...: prompt embeddings in a file, for `generate --embeddings`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def embed(
    prompts: Annotated[list[str], typer.Argument(help="One or several prompts.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="The .safetensors file to write.")
    ],
    model: Annotated[
        str, typer.Option("--model", help="The model whose text encoder is used: a name or a package folder.")
    ] = "demo",
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="NAME", help="Of the encoder: auto, bf16, fp16 or fp32.")
    ] = "auto",
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but errors.")] = False,
) -> None:
    """Write the embeddings of prompts into a file. Prints its path.

    The file also has the embedding of the empty prompt, which guidance needs. Whoever has it can generate without the
    text encoder in memory.

    Example: packforcing models embed "a red circle" "a blue square" -o prompts.safetensors
    """
    from packforcing_cli import catalog, embeddings, registry
    from packforcing_cli.cli import console
    from packforcing_cli.errors import UsageError

    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists", hint="Choose another file, or use --overwrite.")
    if not all(prompt.strip() for prompt in prompts):
        raise UsageError("a prompt is empty", hint="Leave it out; the empty prompt is always written.")
    if catalog.of_random(model) is not None:
        raise UsageError(
            f"{model} has no text encoder", hint="Use --model demo, or a model that is installed."
        )
    source = registry.open_model(model, device=device, dtype=dtype)
    if not quiet:
        console.say(f"text encoder of {source.name} on {source.device} ({source.text.numerics.split()[0]})")
    found = embeddings.encode(
        [*prompts, embeddings.UNCONDITIONAL],
        source.text,
        source.load_text_encoder,
        cache=embeddings.EmbeddingCache.of_user(),
    )
    if not quiet:
        for entry in found.values():
            if entry.unknown:
                console.warn(f"{source.name} does not know: {', '.join(entry.unknown)}")
            if entry.dropped:
                console.warn(f"{entry.text!r} is too long: its last {entry.dropped} tokens will not be seen")
    embeddings.write(output, source.text, found)
    console.result(str(output))
