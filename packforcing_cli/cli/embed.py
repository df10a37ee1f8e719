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
        str | None,
        typer.Option(
            "--model",
            help="The model whose text encoder is used: a name, a package folder or auto. Default auto, as generate.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="NAME", help="Of the encoder: auto, bf16, fp16 or fp32.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but errors.")] = False,
) -> None:
    """Write the embeddings of prompts into a file. Prints its path.

    The file also has the embedding of the empty prompt, which guidance needs. Whoever has it can generate without the
    text encoder in memory.

    Example: packforcing models embed "a red circle" "a blue square" -o prompts.safetensors
    """
    from packforcing_cli import catalog, embeddings, jobs, registry
    from packforcing_cli.cli import choose, console, settings
    from packforcing_cli.cli import generate as runner
    from packforcing_cli.errors import UsageError

    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists", hint="Choose another file, or use --overwrite.")
    if not all(prompt.strip() for prompt in prompts):
        raise UsageError("a prompt is empty", hint="Leave it out; the empty prompt is always written.")
    flags = {"model": model, "dtype": dtype, "device": device}
    request = settings.gather(flags).generate_request(prompts[0], None)
    request, on, why_model = choose.resolve_model(request, output.absolute().parent)
    if catalog.of_random(request.model) is not None:
        raise UsageError(
            f"{request.model} has no text encoder", hint="Use --model demo, or a model that is installed."
        )
    on = on or jobs.choose_device(request, output.absolute().parent)
    source = registry.open_model(
        request.model,
        device=on.device,
        dtype=on.dtype,
        quantize_text=request.quantize_text,
        offload=request.offload,
    )
    if not quiet:
        why = f"model: {why_model}; device: {on.why}; precision: {on.why_dtype}"
        precision, kind, smaller = source.text.numerics.split()
        where = on.device if kind == source.device.type else kind
        precision += "" if smaller == "none" else f" with {smaller} linears"
        console.say(runner.model_line(f"text encoder of {source.name}", where, precision, why))
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
