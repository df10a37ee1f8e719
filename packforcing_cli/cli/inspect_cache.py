"""packforcing inspect-cache: what a video's memory will be, before anything is made; and what a run's memory did."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from packforcing_cli.cli import memory_options as memory
from packforcing_cli.cli import report_options as report

if TYPE_CHECKING:
    from packforcing_cli.planner import Plan


MAX_FPS = 240
RUN_PANEL = "A run that was made, or is being made"


def inspect_cache(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="A run's id or folder, or a video made here: show what its memory did. Without it: the plan.",
            show_default=False,
        ),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            "--at", metavar="TIME", rich_help_panel=RUN_PANEL, help="Explain the block there: 0:43, or 12.5."
        ),
    ] = None,
    block: Annotated[
        int | None, typer.Option("--block", rich_help_panel=RUN_PANEL, help="Explain this block, from 0.")
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option("--layer", rich_help_panel=RUN_PANEL, help="Of this transformer layer alone, from 0."),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare", metavar="RUN", rich_help_panel=RUN_PANEL, help="Where another run parts from it."
        ),
    ] = None,
    follow: Annotated[
        bool,
        typer.Option("--follow", rich_help_panel=RUN_PANEL, help="A line a block, until the run ends."),
    ] = False,
    html: report.Html = None,
    plot: report.Plot = None,
    overwrite: report.Overwrite = False,
    model: Annotated[str | None, typer.Option("--model", help="A model's name. Default demo.")] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", help="Length of the video. Default 10.")
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", metavar="WxH", help="Pixels. Default: the model's own size.")
    ] = None,
    fps: Annotated[
        int | None,
        typer.Option("--fps", help="Frames a second, for the plan alone. Default: the model's own."),
    ] = None,
    frames_per_block: Annotated[
        int | None,
        typer.Option("--frames-per-block", help="Latent frames a block. Default: the model's own."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="NAME", help="bf16, fp16 or fp32. Default auto (bf16).")
    ] = None,
    policy: memory.Policy = None,
    sink_blocks: memory.SinkBlocks = None,
    recent_blocks: memory.RecentBlocks = None,
    top_k: memory.TopK = None,
    bank: memory.Bank = None,
    select: memory.Select = None,
    mid_span: memory.MidSpan = None,
    compressor: memory.Compressor = None,
    compressed_context: memory.CompressedContext = None,
    rope_adjustment: memory.RopeAdjustment = None,
    kv_dtype: memory.KVDtype = None,
    bank_memory: memory.BankMemory = None,
    bank_device: memory.BankDevice = None,
    quantize: memory.Quantize = None,
    quantize_skip: memory.QuantizeSkip = None,
    quantize_text: memory.QuantizeText = None,
    offload: memory.Offload = None,
    vae: memory.Vae = None,
    vae_latents: memory.VaeLatents = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the memory of a video: what it will be, or what it was, also while the video is being made.

    Without RUN: partitions, bytes, growth and slots of a planned video. No model is loaded.
    With RUN: what it remembered, what it recalled and from when, its health and timings. Nothing is changed.

    Example: packforcing inspect-cache --model wan2.1-1.3b --frames-per-block 4 --size 832x480 --seconds 120

    Example: packforcing inspect-cache a-red-circle.mp4 --at 0:43

    Example: packforcing inspect-cache a-red-circle.mp4 --html report.html
    """
    from dataclasses import replace

    from packforcing_cli import catalog, machine, packages, planner
    from packforcing_cli.cli import console, inspect_run, settings
    from packforcing_cli.errors import UsageError

    flags = {
        "model": model,
        "seconds": seconds,
        "size": size,
        "frames_per_block": frames_per_block,
        "dtype": dtype,
        "policy": policy,
        "sink_blocks": sink_blocks,
        "recent_blocks": recent_blocks,
        "top_k": top_k,
        "bank": bank,
        "select": select,
        "mid_span": mid_span,
        "compressor": compressor,
        "compressed_context": compressed_context,
        "rope_adjustment": rope_adjustment,
        "kv_dtype": kv_dtype,
        "bank_memory": bank_memory,
        "bank_device": bank_device,
        "quantize": quantize,
        "quantize_skip": quantize_skip,
        "quantize_text": quantize_text,
        "offload": offload,
        "vae": vae,
        "vae_latents": vae_latents,
    }
    questions = {"at": at, "block": block, "layer": layer, "compare": compare, "follow": follow or None}
    questions |= report.question(html, plot, overwrite=overwrite)
    inspect_run.check(run, questions, {**flags, "fps": fps})
    if run is not None and (html is not None or plot is not None):
        report.draw(inspect_run.find(run), html=html, plot=plot, overwrite=overwrite, as_json=as_json)
    elif run is not None:
        inspect_run.show(
            run, at=at, block=block, layer=layer, compare=compare, follow=follow, as_json=as_json
        )
    if run is not None:
        return
    request = settings.gather(flags).plan_request()
    if request.model == "auto":  # what generate would take; whether it fits is not asked here
        request = request.changed(model=catalog.RECOMMENDED if machine.has_nvidia_driver() else "demo")
    facts = packages.with_compressor(packages.facts(request.model), request.memory.compressor)
    if fps is not None and not 1 <= fps <= MAX_FPS:
        raise UsageError(f"--fps {fps}: must be 1 to {MAX_FPS}", hint="For example --fps 16.")
    facts = facts if fps is None else replace(facts, fps=fps)
    plan = planner.plan(request, facts=facts)
    if as_json:
        console.result_json(plan.to_json())
        return
    for table in (
        _summary(plan, dtype_assumed=request.dtype == "auto" and not machine.has_nvidia_driver()),
        _partitions(plan),
        _bytes(plan),
        _stages(plan),
        _growth(plan),
        _slots(plan),
    ):
        console.result_table(table)
    for warning in plan.warnings:
        console.warn(warning)


def _new_table(title: str, *columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _summary(plan: Plan, *, dtype_assumed: bool) -> str:
    """dtype_assumed: nobody said it, and this machine would run another one."""
    from packforcing_cli.cli import console

    assumed = " assumed; a CPU runs fp32: --dtype fp32" if dtype_assumed else ""
    return (
        f"{plan.model.name}, {plan.size[0]}x{plan.size[1]}, {plan.fps} fps, {plan.dtype}{assumed},"
        f" policy {plan.options.policy}\n"
        f"{console.duration(plan.seconds)} asked: {plan.blocks:,} blocks of {plan.frames_per_block} latent frames"
        f" = {plan.frames:,} frames = {plan.exact_seconds:.2f} s\n"
        f"{plan.layout.grid.bytes_per_token:,} bytes a token: keys and values of {plan.layout.grid.layers} layers\n"
    )


def _partitions(plan: Plan) -> Any:
    from packforcing_cli.cli import console

    grid, tokens = plan.layout.grid, plan.tokens
    view = plan.layout.view(plan.blocks - 1)
    table = _new_table(
        "What the last block attends", "partition", "blocks", "tokens a block", "tokens", "bytes"
    )
    rows = (
        ("sink", len(view.sink), grid.block_tokens, tokens.sink),
        ("mid, active", view.active, grid.compressed_tokens, tokens.mid),
        ("recent", len(view.recent), grid.block_tokens, tokens.recent),
        ("current", 1, grid.block_tokens, tokens.current),
    )
    for name, blocks, each, total in rows:
        table.add_row(
            name, f"{blocks:,}", f"{each:,}", f"{total:,}", console.gb(total * grid.bytes_per_token)
        )
    blocks = sum(row[1] for row in rows)
    active = console.gb(tokens.active * grid.bytes_per_token)
    table.add_row("all", f"{blocks:,}", "", f"{tokens.active:,}", active, style="bold")
    return table


def _bytes(plan: Plan) -> Any:
    from packforcing_cli.cli import console

    used = plan.memory
    bank = len(plan.layout.view(plan.blocks - 1).mid)
    kept = "" if plan.layout.kv_dtype == "auto" else f" in {plan.layout.kv_dtype}"
    kept += ", in host memory" if plan.bank_device == "host" else ""
    table = _new_table("What the cache holds at the last block", "part", "bytes", "what it is")
    table.columns[2].justify = "left"
    for name, size, said in (
        ("stored", used.stored, "keys and values of sink, active mid and recent (the paper's count)"),
        ("current", used.current, "keys and values of the block being made"),
        ("raw keys", used.raw_keys, "keys before RoPE of recent blocks that move from slot to slot"),
        ("backups", used.backups, "compressed blocks of recent, ready for the bank"),
        ("bank", used.bank, f"{bank:,} compressed blocks{kept}, from which the active ones are taken"),
    ):
        table.add_row(name, console.gb(size), said)
    table.add_row("live", console.gb(used.live), "all of these", style="bold")
    table.add_row(
        "full history", console.gb(plan.full_history_bytes), "if nothing were compressed or dropped"
    )
    return table


def _stages(plan: Plan) -> Any:
    from packforcing_cli.cli import console

    weights = plan.weights
    beside = any(stage.host_bytes for stage in plan.stages)
    table = _new_table(
        "Memory by stage, estimated", "stage", "memory", *(["host memory"] if beside else []), "what it is"
    )
    table.columns[-1].justify = "left"
    running = weights.transformer + weights.vae + weights.compressor
    encoder = f"text encoder {console.gb(weights.text_encoder)}"
    for stage, said in zip(
        plan.stages,
        (
            f"{encoder}, on the CPU" if beside else f"{encoder}, freed afterwards",
            f"weights {console.gb(running)}, cache {console.gb(plan.capacity.live)}, activations",
            "the same, and the VAE's feature maps",
        ),
        strict=True,
    ):
        row = [stage.name, console.gb(stage.device_bytes)] + (
            [console.gb(stage.host_bytes)] if beside else []
        )
        table.add_row(*row, said)
    return table


def _growth(plan: Plan) -> Any:
    from packforcing_cli.cli import console

    table = _new_table("Growth", "video", "blocks", "full cache", "window cache", "stored", "bank")
    for point in plan.growth:
        table.add_row(
            console.duration(point.seconds),
            f"{point.blocks:,}",
            console.gb(point.full_bytes),
            console.gb(point.window_bytes),
            console.gb(point.stored_bytes),
            console.gb(point.bank_bytes),
        )
    return table


def _slots(plan: Plan) -> str:
    slots = plan.slots
    inside = "within" if slots.within_trained_range else "beyond"
    return (
        f"Slots: {float(slots.total):g} in all, {float(slots.mid_span):g} for each active mid block; largest distance"
        f" {float(slots.max_distance):g}, {inside} the trained range of {slots.trained_frames} latent frames."
    )
