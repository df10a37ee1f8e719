"""packforcing bench: time and memory on this machine, as figures of one run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from packforcing_cli.cli import memory_options as memory

if TYPE_CHECKING:
    from rich.table import Table

    from packforcing_cli.prompts import Prompt
    from packforcing_cli.registry import VideoModel

SCHEMA = 1
PROMPT = "a red circle moving right on a blue background"

app = typer.Typer(
    name="bench",
    help="Measure time and memory on this machine; figures of one run, to be compared with each other.",
    no_args_is_help=True,
)

Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="demo, an installed model, a package folder, or random:NAME: its shape with random weights, nothing"
        " downloaded.",
    ),
]
Size = Annotated[
    str | None, typer.Option("--size", metavar="WxH", help="Pixels. Default: the model's own size.")
]
Dtype = Annotated[str, typer.Option("--dtype", metavar="NAME", help="auto, bf16, fp16 or fp32.")]
Vae = Annotated[
    str | None,
    typer.Option(
        "--vae",
        help="tiny (taew2_1), wan, another VAE by its name, or a folder with one of the same latents.",
    ),
]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.")]
Attention = memory.Attention
Compile = memory.Compile
CudaGraphs = memory.CudaGraphs
VaeLatents = memory.VaeLatents
Quantize = memory.Quantize
Repeats = Annotated[int, typer.Option("--repeats", min=1, max=1000, help="Times every call is measured.")]
Force = Annotated[bool, typer.Option("--force", help="Measure on a busy machine, too.")]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help='Write the figures there; "-" = standard output.'),
]


@app.command("engine")
def engine(
    model: Model = "demo",
    size: Size = None,
    dtype: Dtype = "auto",
    vae: Vae = None,
    vae_latents: VaeLatents = None,
    device: Device = "auto",
    attention: Attention = None,
    quantize: Quantize = None,
    compile_layers: Compile = None,
    cuda_graphs: CudaGraphs = None,
    repeats: Repeats = 7,
    force: Force = False,
    json_file: JsonFile = None,
) -> None:
    """One block in a full memory, stage by stage, against the machine's own matmul rate.

    Example: packforcing bench engine --model random:wan2.1-1.3b --device cuda
    """
    how = How(attention, quantize, compile_layers, cuda_graphs, vae_latents)
    _bench(["engine"], model, size, dtype, vae, device, repeats, force, json_file, how)


@app.command("kernels")
def kernels(
    model: Model = "demo",
    size: Size = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    compile_layers: Compile = None,
    repeats: Repeats = 7,
    force: Force = False,
    json_file: JsonFile = None,
) -> None:
    """Every attention kernel that runs here, the parts of a layer, and the machine's own ceilings."""
    how = How(compile_layers=compile_layers)
    _bench(["kernels"], model, size, dtype, None, device, repeats, force, json_file, how)


@app.command("precision")
def precision(
    model: Model = "demo",
    size: Size = None,
    dtype: Dtype = "bf16",
    device: Device = "auto",
    json_file: JsonFile = None,
) -> None:
    """How far each quantization moves a pass's output; nothing is timed."""
    _bench(["precision"], model, size, dtype, None, device, 1, True, json_file)


@app.command("cache")
def cache(
    model: Model = "demo",
    size: Size = None,
    dtype: Dtype = "auto",
    vae: Vae = None,
    device: Device = "auto",
    repeats: Repeats = 7,
    force: Force = False,
    json_file: JsonFile = None,
) -> None:
    """What the memory costs beside the attention it serves, against two other ways to build the same context."""
    _bench(["cache"], model, size, dtype, vae, device, repeats, force, json_file)


@app.command("scaling")
def scaling(
    model: Model = "demo",
    size: Size = None,
    dtype: Dtype = "auto",
    vae: Vae = None,
    device: Device = "auto",
    repeats: Repeats = 7,
    force: Force = False,
    json_file: JsonFile = None,
) -> None:
    """A block early and late in a video, up to an hour, for each policy."""
    _bench(["scaling"], model, size, dtype, vae, device, repeats, force, json_file)


@app.command("stream")
def stream(
    model: Model = "demo",
    size: Size = None,
    dtype: Dtype = "auto",
    vae: Vae = None,
    device: Device = "auto",
    compile_layers: Compile = None,
    repeats: Repeats = 7,
    force: Force = False,
    json_file: JsonFile = None,
) -> None:
    """Decoding in each way there is, and whole videos with blocks finished in order and beside the next one."""
    how = How(compile_layers=compile_layers)
    _bench(["stream"], model, size, dtype, vae, device, repeats, force, json_file, how)


@app.command("load")
def load(
    model: Model = "demo",
    dtype: Dtype = "auto",
    vae: Vae = None,
    device: Device = "auto",
    force: Force = False,
    json_file: JsonFile = None,
) -> None:
    """Reading a model in a fresh process: time, peak memory."""
    _bench(["load"], model, None, dtype, vae, device, 3, force, json_file)


@app.command("startup")
def startup(
    model: Model = "demo", device: Device = "auto", force: Force = False, json_file: JsonFile = None
) -> None:
    """Commands from a fresh process: time, what they import; a prompt and a model, to a video's first frames."""
    _bench(["startup"], model, None, "auto", None, device, 3, force, json_file)


@app.command("peer")
def peer(
    self_forcing: Annotated[
        Path | None,
        typer.Option(
            "--self-forcing",
            metavar="PATH",
            help="A checkout of github.com/guandeh17/Self-Forcing; its code is run.",
        ),
    ] = None,
    device: Device = "auto",
    attention: Attention = None,
    compile_layers: Compile = None,
    repeats: Repeats = 7,
    force: Force = False,
    json_file: JsonFile = None,
) -> None:
    """One cached pass of the official Self-Forcing network and ours: same weights, context and process, in turn.

    Full size on a GPU, a quarter of the tokens and two layers on a CPU. The outputs are compared first.
    """
    from packforcing_cli import attention as kernels
    from packforcing_cli import bench, bench_peer, compiling, registry
    from packforcing_cli.cli import console
    from packforcing_cli.errors import UsageError

    if self_forcing is None:
        raise UsageError(
            "there is nothing to compare with",
            hint=f"git clone {bench_peer.REPOSITORY}, then packforcing bench peer --self-forcing Self-Forcing.",
        )
    _check_json(json_file)
    bench_peer.require_checkout(self_forcing)
    where = registry.resolve_device(device)
    kernel = kernels.choose(attention or "auto", device=where, dtype=registry.resolve_dtype("bf16", where))
    if compile_layers:
        compiling.require_compiler(where)
    warning = bench.require_quiet(force=force)
    if warning:
        console.warn(warning)
    console.say("measuring peer …")
    found = {
        "schema": SCHEMA,
        "conditions": bench.conditions(where, kernel),
        "warning": warning,
        "peer": bench_peer.self_forcing(
            self_forcing, device=where, kernel=kernel, compiled=bool(compile_layers), repeats=repeats
        ),
    }
    _write(found, json_file)
    _give(found, {"peer": _peer_tables}, json_file)


@app.command("all")
def everything(
    model: Model = "demo",
    size: Size = None,
    dtype: Dtype = "auto",
    vae: Vae = None,
    vae_latents: VaeLatents = None,
    device: Device = "auto",
    attention: Attention = None,
    quantize: Quantize = None,
    compile_layers: Compile = None,
    cuda_graphs: CudaGraphs = None,
    repeats: Repeats = 7,
    force: Force = False,
    json_file: JsonFile = None,
) -> None:
    """All of them."""
    how = How(attention, quantize, compile_layers, cuda_graphs, vae_latents)
    _bench(list(_TABLES), model, size, dtype, vae, device, repeats, force, json_file, how)


@dataclass(frozen=True)
class How:
    """How the model of a measurement is loaded; None = as usual."""

    attention: str | None = None
    quantize: str | None = None
    compile_layers: bool | None = None
    cuda_graphs: bool | None = None
    vae_latents: int | None = None


def _bench(
    parts: list[str],
    model: str,
    size: str | None,
    dtype: str,
    vae: str | None,
    device: str,
    repeats: int,
    force: bool,
    json_file: Path | None,
    how: How = How(),
) -> None:
    """Measure, write the JSON after each part, then show the tables.

    Raises: PackforcingError; of several parts, after all of them, one that names those that failed.
    """
    from packforcing_cli import (
        attention,
        bench,
        bench_kernels,
        bench_stream,
        compiling,
        machine,
        packages,
        prompts,
        registry,
        resolve,
    )
    from packforcing_cli.cli import console
    from packforcing_cli.config import PlanRequest
    from packforcing_cli.errors import PackforcingError

    pixels = PlanRequest(size=size).size if size else None
    _check_json(json_file)
    packages.facts(model)  # refused before anything is measured when there is no such model
    where = registry.resolve_device(device)
    speed = {name: value for name, value in asdict(how).items() if value is not None}
    kernel = attention.choose(
        how.attention or "auto", device=where, dtype=registry.resolve_dtype(dtype, where)
    )
    if kernel.warning:
        console.warn(kernel.warning)
    if how.compile_layers:
        compiling.require_compiler(where)
    warning = "" if parts == ["precision"] else bench.require_quiet(force=force)
    if warning:
        console.warn(warning)
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "conditions": bench.conditions(where, kernel),
        "warning": warning,
    }
    loaded: tuple[VideoModel, Prompt] | None = None

    def ready() -> tuple[VideoModel, Prompt]:
        nonlocal loaded
        if loaded is None:
            source = registry.open_model(model, device=where, dtype=dtype, vae=vae, **speed)
            guided = resolve.schedule_for(source).guidance != 1.0
            prompt = prompts.encode_prompt(source, PROMPT, guided=guided)
            loaded = source.load(), prompt
        return loaded

    def free_bytes() -> int:
        if where.type == "cuda":
            import torch

            return int(torch.cuda.mem_get_info(where)[0] * 4 // 5)
        return machine.available_memory() // 2

    run: dict[str, Callable[[], Any]] = {
        "engine": lambda: bench.engine(*ready(), size=pixels, repeats=repeats),
        "cache": lambda: bench.cache(*ready(), size=pixels, repeats=repeats),
        "scaling": lambda: bench.scaling(*ready(), size=pixels, repeats=repeats, memory_bytes=free_bytes()),
        "stream": lambda: bench_stream.stream(*ready(), size=pixels, repeats=repeats),
        "load": lambda: bench.load(model, device=str(where), dtype=dtype, vae=vae),
        # With all the others it is the demo's: a real model's first frames take minutes where there is no GPU.
        "startup": lambda: bench.startup(model if len(parts) == 1 else "demo", device=str(where)),
        "kernels": lambda: bench_kernels.kernels(
            ready()[0], size=pixels, repeats=repeats, compiled=bool(how.compile_layers)
        ),
        "precision": lambda: bench_kernels.precision(
            model, ready()[1], device=where, dtype=dtype, size=pixels
        ),
    }
    if set(parts) - {"load", "startup"}:
        ready()  # a model that cannot be loaded ends it all, with its own error
    failed = []
    try:
        for part in parts:
            console.say(f"measuring {part} …")
            try:
                found[part] = run[part]()
            except Exception as error:  # whatever happened to one part, the figures of the others stand
                if len(parts) == 1:
                    raise
                found[part] = {"not measured": _said(error)}
                failed.append(part)
                console.warn(f"{part} was not measured: {_said(error)}")
            _write(found, json_file)
    finally:  # also when a person has seen enough
        tables = {part: _TABLES[part] for part in parts if part in found and part not in failed}
        if tables:
            _give(found, tables, json_file)
    if failed:
        raise PackforcingError(
            f"not measured: {', '.join(failed)}; the other figures are there",
            hint=f"packforcing bench {failed[0]}, with the same options, measures it alone.",
        )


def _check_json(json_file: Path | None) -> None:
    """Raises: UsageError if the figures cannot be written there."""
    from packforcing_cli.errors import UsageError

    if json_file is not None and str(json_file) != "-" and not json_file.absolute().parent.is_dir():
        raise UsageError(
            f"{json_file.parent} is no folder", hint="Give --json a file in a folder that exists."
        )


def _said(error: Exception) -> str:
    """A failure in one line."""
    message = " ".join(str(getattr(error, "message", error)).split())[:300]
    known = hasattr(error, "message")
    return message if known else f"{type(error).__name__}: {message or 'no message'}"


def _write(found: dict[str, Any], json_file: Path | None) -> None:
    """The figures so far into the file, if there is one. Raises: PackforcingError if it cannot be written."""
    from packforcing_cli import durable
    from packforcing_cli.errors import PackforcingError

    if json_file is None or str(json_file) == "-":
        return
    try:
        durable.write(json_file, json.dumps(found, indent=2).encode())
    except OSError as error:
        raise durable.failure(error, json_file, kind=PackforcingError) from error


def _give(
    found: dict[str, Any], tables: Mapping[str, Callable[[Any], list[Table]]], json_file: Path | None
) -> None:
    """The figures as tables, and as JSON where it is wanted."""
    from packforcing_cli.cli import console

    if json_file is not None and str(json_file) == "-":
        console.result_json(found)
        return
    _show_conditions(found["conditions"])
    for part, render in tables.items():
        for table in render(found[part]):
            console.result_table(table)


def _show_conditions(values: dict[str, Any]) -> None:
    from packforcing_cli.cli import console

    shown = [f"{name} {value}" for name, value in values.items() if value not in (None, "", {})]
    console.result(", ".join(shown))


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _ms(times: dict[str, Any]) -> tuple[str, str]:
    return f"{times['min'] * 1e3:.2f}", f"{times['median'] * 1e3:.2f}"


def _engine_tables(found: dict[str, Any]) -> list[Table]:
    from packforcing_cli.cli import console

    what = f"{found['model']}, {found['dtype']}, {found['size'][0]}x{found['size'][1]}"
    number = next(iter(found["stages"].values()))["n"]
    table = _table(f"one block, {what}, N = {number}", "stage", "min ms", "median ms", "share")
    for name, times in found["stages"].items():
        share = "beside" if name == "encode" else f"{times['median'] / found['block_seconds']:.1%}"
        table.add_row(name, *_ms(times), share)
    passes, kv = found["passes"], found["kv_bytes"]["live"]
    rest = _table("the block as a whole", "what", "figure")
    for name, value in (
        ("block", f"{found['block_seconds'] * 1e3:.1f} ms for {found['frames_per_block']} frames"),
        ("frames a second", f"{found['fps']:.1f}"),
        ("attended tokens", f"{found['attended_tokens']:,}"),
        ("passes", f"{passes['denoise']} of {passes['prompts']} prompts, {passes['clean']} clean"),
        ("operations", f"{found['block_flops'] / 1e12:.4g} TFLOP in the transformer"),
        ("matmul rate", f"{found['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s in this run"),
        ("roofline ratio", f"{found['roofline_ratio']:.2f}"),
        ("KV memory", console.gb(kv)),
        ("peak memory", console.gb(found["peak_memory_bytes"])),
    ):
        rest.add_row(name, value)
    for missing in found["not measured"]:
        rest.add_row("not measured", missing)
    return [table, rest]


def _cache_tables(found: dict[str, Any]) -> list[Table]:
    from packforcing_cli.cli import console

    table = _table(
        f"the memory beside attention, {found['attended_tokens']:,} tokens, {found['passes']} passes",
        "way",
        "share of attention time",
        "bytes a block",
    )
    for name, share, size in (
        ("this memory: once a block, in place", "share_of_attention", "bytes_per_block"),
        ("torch.cat in every pass", "share_with_cat_in_every_pass", "bytes_with_cat_in_every_pass"),
        (
            "rotating in every pass",
            "share_with_rotation_in_every_pass",
            "bytes_with_rotation_in_every_pass",
        ),
    ):
        table.add_row(name, f"{found[share]:.2%}", console.gb(found[size]))
    moved = found["share_of_attention_bytes"]
    table.caption = (
        f"{found['operators_per_block']} operators a block; {moved:.2%} of attention's own bytes;"
        f" the first row measured again: {found['again']:.2f} of it"
    )
    if not found["kv_dtypes"]:
        return [table]
    kinds = _table("--kv-dtype: what a compressed block takes", "kind", "bytes", "error of a pass")
    for name, row in found["kv_dtypes"].items():
        kinds.add_row(name, console.gb(row["block_bytes"]), f"{row['error']:.1e}")
    return [table, kinds]


def _scaling_tables(found: list[dict[str, Any]]) -> list[Table]:
    from packforcing_cli.cli import console

    table = _table(
        "one pass and the memory's work, early and late in a video",
        "policy",
        "block",
        "attended",
        "live memory",
        "median ms",
        "to the first",
        "moved",
        "operators",
    )
    for row in found:
        if "seconds" not in row:
            why = row.get("not measured", "")
            table.add_row(
                row["policy"], f"{row['block']:,}", "", console.gb(row["live_bytes"]), why, "", "", ""
            )
            continue
        spread = f" (again {row['again']:.2f})" if "again" in row else ""
        table.add_row(
            row["policy"],
            f"{row['block']:,}",
            f"{row['attended_tokens']:,}",
            console.gb(row["live_bytes"]),
            f"{row['seconds']['median'] * 1e3:.2f}",
            f"{row['ratio']:.2f}{spread}",
            console.gb(row["memory_bytes_moved"]),
            str(row["memory_operators"]),
        )
    table.caption = "passes are launched, not replayed"
    return [table]


def _stream_tables(found: dict[str, Any]) -> list[Table]:
    from packforcing_cli.cli import console

    decode = _table(
        f"decoding a block of {found['decode'][0]['frames']} frames",
        "way",
        "min ms",
        "median ms",
        "peak memory",
        "largest difference",
    )
    for row in found["decode"]:
        peak = console.gb(row["peak_memory_bytes"]) if row["peak_memory_bytes"] else ""
        decode.add_row(row["way"], *_ms(row["seconds"]), peak, f"{row['largest_difference']:.1e}")
    video = found["video"]
    if video is None:
        decode.caption = "whole videos were not measured: PyAV is not installed"
        return [decode]
    whole = _table(
        f"whole videos of {video['blocks']} blocks, from block {video['from_block']} on",
        "blocks finished",
        "median ms",
        "95 % ms",
        "FPS",
        "first frames s",
        "waiting s",
    )
    for way in ("in order", "beside"):
        row = video[way]
        whole.add_row(
            way if way == "in order" else "beside the next one",
            f"{row['block_seconds'] * 1e3:.1f}",
            f"{row['block_seconds_p95'] * 1e3:.1f}",
            f"{row['fps']:.1f}",
            f"{row['first_frame_seconds']:.2f}",
            f"{row['stall_seconds']:.2f}",
        )
    equal = "the files are " + ("equal byte for byte" if video["files_are_equal"] else "NOT EQUAL: a fault")
    ratio = f"beside to in order {video['ratio']:.2f} (in order again {video['again']:.2f})"
    whole.caption = f"{ratio}; {equal}"
    return [decode, whole]


def _load_tables(found: dict[str, Any]) -> list[Table]:
    from packforcing_cli.cli import console

    table = _table(f"loading {found['model']}, fresh processes", "what", "figure")
    for name, value in found.items():
        if name.endswith("_seconds"):
            table.add_row(name.removesuffix("_seconds").replace("_", " "), f"{value['median']:.2f} s")
    table.add_row("weights", console.gb(found["weight_bytes"]))
    growth = (
        f"{console.gb(found['peak_growth_bytes'])} = {found['peak_growth_of_weights']:.2f}x of the weights"
    )
    table.add_row("peak memory while loading", growth)
    if found["gpu_bytes"]:
        table.add_row("GPU memory", console.gb(found["gpu_bytes"]))
    return [table]


def _rate(flops_per_second: float) -> str:
    scale, unit = (1e12, "TFLOP/s") if flops_per_second >= 1e12 else (1e9, "GFLOP/s")
    return f"{flops_per_second / scale:.4g} {unit}"


def _kernel_tables(found: dict[str, Any]) -> list[Table]:
    top = _table(f"ceilings, {found['dtype']}", "what", "figure")
    for name, value in found["ceilings"].items():
        what, _, _ = name.partition("_per_second")
        shown = f"{value / 1e9:.4g} GB/s" if what.endswith("bytes") else _rate(value)
        top.add_row(what.rpartition("_")[0].replace("_", " "), shown)
    rows = _table(
        f"attention of {found['tokens']:,} tokens to {found['attended_tokens']:,}, one layer",
        *("--attention", "takes", "min ms", "median ms", "rate", "error"),
    )
    for row in found["attention"]:
        if "seconds" not in row:
            rows.add_row(row["kernel"], row["not measured"], "", "", "", "")
            continue
        rate = _rate(row["flops_per_second"])
        rows.add_row(row["kernel"], row["taken"], *_ms(row["seconds"]), rate, f"{row['error']:.1e}")
    parts = _table("a layer beside attention", "what", "min ms", "median ms")
    for title, values in (("q, k, v", found["projections"]), ("layer", found["layer"])):
        for name, times in values.items():
            if isinstance(times, dict):
                parts.add_row(f"{title} {name}", *_ms(times))
        if "not measured" in values:
            parts.add_row(f"{title}: {values['not measured']}", "", "")
    if "eager_operators" in found["layer"]:
        from packforcing_cli.cli import console

        parts.caption = (
            f"eager, a layer: {found['layer']['eager_operators']} operators move"
            f" {console.gb(found['layer']['eager_bytes'])}"
        )
    return [top, rows, parts]


def _precision_tables(found: dict[str, Any]) -> list[Table]:
    from packforcing_cli.cli import console

    table = _table(
        f"a pass's output against {found['dtype']}, {found['model']}",
        *("--quantize", "error", "worst", "weights"),
    )
    for row in found["rows"]:
        if "error" not in row:
            table.add_row(row["mode"], row["not measured"], "", "")
            continue
        name = row["mode"] + (f" ({row['how']})" if "how" in row else "")
        size = console.gb(row["weight_bytes"]) if "weight_bytes" in row else ""
        table.add_row(name, f"{row['error']:.2%}", f"{row['worst']:.3f} sd", size)
    return [table]


def _peer_tables(found: dict[str, Any]) -> list[Table]:
    table = _table(
        f"one pass over {found['tokens']:,} tokens that attend {found['attended_tokens']:,}, {found['layers']} layers"
        f" of {found['dim']}, bf16, {found['clock']}",
        *("whose", "min ms", "median ms", "times ours"),
    )
    for name, times in found["seconds"].items():
        ratio = found["again"] if name == "again" else found["ratios"].get(name, 1.0)
        title = {"theirs": found["peer"], "again": "ours again (the spread)"}.get(name, name)
        table.add_row(title.replace("theirs", found["peer"]), *_ms(times), f"{ratio:.2f}")
    said = [f"outputs differ by {found['error']:.1e}", *found["patches"]]
    table.caption = "; ".join(said)
    return [table]


def _startup_tables(found: dict[str, Any]) -> list[Table]:
    table = _table("from a fresh process", "command", "min s", "median s", "imports")
    for name, row in found["commands"].items():
        heavy = ", ".join(row["imports"]) or "nothing heavy" if "imports" in row else ""
        table.add_row(name, f"{row['min']:.2f}", f"{row['median']:.2f}", heavy)
    for missing in found["not measured"]:
        table.add_row("not measured", "", "", missing)
    return [table]


_TABLES: dict[str, Callable[[Any], list[Table]]] = {
    "engine": _engine_tables,
    "kernels": _kernel_tables,
    "precision": _precision_tables,
    "cache": _cache_tables,
    "scaling": _scaling_tables,
    "stream": _stream_tables,
    "load": _load_tables,
    "startup": _startup_tables,
}
