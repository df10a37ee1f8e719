"""packforcing generate PROMPT: a long video from text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from packforcing_cli.cli import memory_options as memory

if TYPE_CHECKING:
    from packforcing_cli.catalog import ModelFacts
    from packforcing_cli.config import GenerateRequest
    from packforcing_cli.planner import Machine, Plan
    from packforcing_cli.rollout import Prompt, Result

SCHEMA = 1


def generate(
    prompt: Annotated[str, typer.Argument(help='What the video shows; "-" reads it from standard input.')],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE.mp4", help="Default: a name made from the prompt.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", help="Length; the video has whole blocks. Default 10.")
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", metavar="WxH", help="Pixels. Default: the model's own size.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Default: random, and printed.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="A model's name or a package folder. Default demo.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Denoising steps. Default: the model's own.")] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="Classifier-free guidance, 1 = none. Default: the model's own.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="NAME", help="auto (bf16 on a GPU, fp32 on a CPU), bf16, fp16, fp32.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="NAME", help="auto (the GPU with most free memory), cpu, cuda or cuda:N."),
    ] = None,
    vae: Annotated[
        str | None, typer.Option("--vae", metavar="NAME", help="The model's own, or a folder with another VAE.")
    ] = None,
    crf: Annotated[int | None, typer.Option("--crf", help="H.264 quality, 0 to 51. Default 18.")] = None,
    policy: memory.Policy = None,
    sink_blocks: memory.SinkBlocks = None,
    recent_blocks: memory.RecentBlocks = None,
    top_k: memory.TopK = None,
    bank: memory.Bank = None,
    select: memory.Select = None,
    mid_span: memory.MidSpan = None,
    compressor: memory.Compressor = None,
    compressed_context: memory.CompressedContext = None,
    parity: Annotated[
        str | None,
        typer.Option(
            "--parity",
            metavar="paper",
            rich_help_panel=memory.PANEL,
            help="paper: select by affinity in the first pass, a compressed block takes all its slots.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and the command; make nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of the path.")] = False,
    progress: Annotated[str, typer.Option("--progress", help="auto, rich, plain, json or none.")] = "auto",
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but errors.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Say more; show tracebacks.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
) -> None:
    """Make a video from text. Prints the path of the finished file.

    Example: packforcing generate "a red circle moving right on a blue background" --seconds 60

    Exit codes: 0 done, 1 failed, 2 usage, 4 environment, 5 does not fit in memory, 6 disk full, 7 bad weights,
    9 locked, 130 interrupted, 143 terminated. Ctrl-C once ends the video after the block, twice at once.
    """
    from packforcing_cli.cli import console, settings
    from packforcing_cli.cli import progress as display
    from packforcing_cli.errors import UsageError

    flags: dict[str, Any] = {
        "model": model,
        "seconds": seconds,
        "size": size,
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "dtype": dtype,
        "device": device,
        "vae": vae,
        "crf": crf,
        "overwrite": overwrite or None,
        "policy": policy,
        "sink_blocks": sink_blocks,
        "recent_blocks": recent_blocks,
        "top_k": top_k,
        "bank": bank,
        "select": select,
        "mid_span": mid_span,
        "compressor": compressor,
        "compressed_context": compressed_context,
    }
    text = sys.stdin.read() if prompt == "-" else prompt
    request = settings.gather(flags).generate_request(text, output)
    if parity not in (None, "paper"):
        raise UsageError(f"--parity {parity}: unknown", hint="The only parity there is: --parity paper.")
    if parity == "paper":
        request = request.model_copy(update={"memory": request.memory.paper_parity()})
    shown = display.choose(progress, quiet=quiet, device_memory=_no_memory)  # a wrong mode ends here, torch not loaded
    facts = _facts(request)
    path = _output_path(request)
    request = request.model_copy(update={"seed": _seed(request), "output": path})

    from packforcing_cli import registry

    device_ = registry.resolve_device(request.device)
    dtype_ = registry.resolve_dtype(request.dtype, device_)
    plan = _plan(request, facts, path, str(device_), str(dtype_).removeprefix("torch."))
    command = _command(request, parity)
    if dry_run:
        _show_dry_run(plan, path, str(device_), command, as_json=as_json)
        return
    plan.require_fit()
    if not quiet:
        _introduce(request, plan, str(device_), verbose=verbose)
    shown = display.choose(progress, quiet=quiet, device_memory=_memory_reader(device_))
    result, stop_code = _run(request, plan, shown, path, device_, dtype_, quiet=quiet)
    _report(request, result, plan, str(device_), command, as_json=as_json, quiet=quiet, stop_code=stop_code)
    if stop_code:
        raise typer.Exit(stop_code)


# -- before the model is loaded ---------------------------------------------------------------------------------


def _facts(request: GenerateRequest) -> ModelFacts:
    """Facts of the model to run. Raises: UsageError for a family, which has no weights."""
    from packforcing_cli import catalog
    from packforcing_cli.errors import UsageError

    facts = catalog.of(request.model)
    if facts.kind == "family":
        names = ", ".join(m.name for m in catalog.all_models() if m.kind == "package")
        raise UsageError(
            f"{facts.name} is a family of models, known for planning; it has no weights to generate with",
            hint=f"Use --model {names}, or the folder of a model package.",
        )
    return facts


def _output_path(request: GenerateRequest) -> Path:
    """The given output, checked; or a free name made from the prompt in the current folder."""
    from packforcing_cli import video

    if request.output is not None:
        path = request.output if request.output.suffix else request.output.with_name(request.output.name + ".mp4")
        video.check_output(path, overwrite=request.overwrite)
        return path
    number = 1
    while True:
        path = Path(video.safe_name(request.prompt, ".mp4" if number == 1 else f"-{number}.mp4"))
        if request.overwrite or not (path.exists() or video.part_path(path).exists()):
            video.check_output(path, overwrite=request.overwrite)
            return path
        number += 1


def _seed(request: GenerateRequest) -> int:
    if request.seed is not None:
        return request.seed
    import random

    return random.SystemRandom().randrange(2**31)


def _plan(request: GenerateRequest, facts: ModelFacts, path: Path, device: str, dtype: str) -> Plan:
    from packforcing_cli import planner

    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[dtype]
    return planner.plan(request.model_copy(update={"dtype": short}), _machine(path, device), facts=facts)


def _machine(path: Path, device: str) -> Machine:
    from packforcing_cli import planner

    machine = planner.host_machine(path.absolute().parent)
    if device == "cpu":
        return machine
    import torch

    free = torch.cuda.mem_get_info(torch.device(device))[0]
    return planner.Machine(free, machine.disk_free_bytes, f"{torch.cuda.get_device_name(device)} ({device})")


def _command(request: GenerateRequest, parity: str | None) -> str:
    """The command that repeats the request exactly."""
    import shlex

    parts = ["packforcing", "generate", request.prompt]
    values = {name: getattr(request, name) for name in ("seconds", "model", "seed", "steps", "guidance", "vae")}
    values |= {"dtype": request.dtype, "device": request.device, "crf": request.crf, "output": request.output}
    if request.size is not None:
        values["size"] = f"{request.size[0]}x{request.size[1]}"
    explicit = request.memory.model_dump(include=request.memory.model_fields_set)
    if parity == "paper":
        explicit = {name: v for name, v in explicit.items() if name not in ("select", "mid_span")}
        values["parity"] = parity
    for name, value in {**values, **explicit}.items():
        if value is None and name == "bank":
            value = "unlimited"
        if value is not None:
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            parts += ["--" + name.replace("_", "-"), shown]
    return shlex.join(parts)


def _show_dry_run(plan: Plan, path: Path, device: str, command: str, *, as_json: bool) -> None:
    from packforcing_cli.cli import console

    if as_json:
        extra = {"output": str(path), "device": device, "downloads": [], "command": command}
        console.result_json({**plan.to_json(), **extra})
        return
    width, height = plan.size
    last = plan.memory
    for name, value in (
        ("model", f"{plan.model.name} on {device}, {plan.dtype}"),
        ("video", f"{width}x{height}, {plan.fps} fps, {plan.frames} frames = {plan.exact_seconds:.2f} s"),
        ("blocks", f"{plan.blocks} of {plan.frames_per_block} latent frames"),
        ("KV memory", f"{console.gb(last.live)}; a full cache: {console.gb(plan.full_history_bytes)}"),
        ("peak memory", f"about {console.gb(plan.peak_bytes)}"),
        ("disk", f"at most about {console.gb(plan.disk_bytes)} for {path}"),
        ("downloads", "none"),
        ("fits", "yes" if plan.fits else f"no; try {plan.suggestion}" if plan.suggestion else "no"),
        ("command", command),
    ):
        console.result(f"{name:<12} {value}")
    for warning in plan.warnings:
        console.warn(warning)


def _introduce(request: GenerateRequest, plan: Plan, device: str, *, verbose: bool) -> None:
    from packforcing_cli.cli import console

    width, height = plan.size
    console.say(
        f"{plan.model.name} on {device} ({plan.dtype}), seed {request.seed}: {plan.seconds:g} s are {plan.blocks} blocks"
        f" = {plan.frames} frames ({plan.exact_seconds:.2f} s at {plan.fps} fps), {width}x{height}"
    )
    if plan.model.name == "demo":
        console.say(
            "demo is a toy world of coloured shapes that needs no download. A model package in a folder runs with"
            " --model FOLDER; this version cannot fetch Wan weights yet."
        )
    for warning in plan.warnings:
        console.warn(warning)
    if verbose:
        console.say(f"memory: {request.memory!r}")


# -- the run ----------------------------------------------------------------------------------------------------


class _Stop:
    """Turns the first Ctrl-C or SIGTERM into a wish to stop after the block, the second into an exception."""

    def __init__(self) -> None:
        self.code = 0

    def __enter__(self) -> _Stop:
        import signal

        self._old = {s: signal.signal(s, self._caught) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        import signal

        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _caught(self, number: int, _frame: object) -> None:
        from packforcing_cli.cli import console

        if self.code:
            raise KeyboardInterrupt
        self.code = 128 + number
        console.say("Stopping after this block; once more stops at once.")


def _run(
    request: GenerateRequest, plan: Plan, shown: Any, path: Path, device: Any, dtype: Any, *, quiet: bool
) -> tuple[Result | None, int]:
    """Load, encode, generate. Returns: the result (None if stopped before a block) and the exit code of a stop."""
    from packforcing_cli import registry, rollout, video
    from packforcing_cli.cli import console

    with _Stop() as stop:
        try:
            model = registry.load_model(_model_place(request.model), device=device, dtype=dtype, vae=request.vae)
            schedule = rollout.schedule_for(model, steps=request.steps, guidance=request.guidance)
            prompt = rollout.encode_prompt(model, request.prompt, guided=schedule.guidance != 1.0)
            if not quiet:
                _warn_about_words(prompt, model.manifest.vocabulary)
            if stop.code:
                return None, stop.code
            shown.start(plan)
            result = rollout.generate(
                model,
                prompt,
                path,
                seconds=request.seconds,
                seed=request.seed,
                size=plan.size,
                schedule=schedule,
                memory=request.memory,
                crf=request.crf,
                overwrite=request.overwrite,
                on_block=shown.block,
                should_stop=lambda: bool(stop.code),
            )
            shown.done(result)
        except KeyboardInterrupt:
            shown.stop()
            part = video.part_path(path)
            console.say(f"Stopped at once; what was finished plays: {part}" if part.exists() else "Stopped.")
            return None, stop.code or 130
        finally:
            shown.stop()
    return result, stop.code if result.stopped else 0


def _model_place(model: str) -> str | Path:
    return Path(model) if Path(model).is_dir() and model != "demo" else model


def _warn_about_words(prompt: Prompt, vocabulary: tuple[str, ...]) -> None:
    from packforcing_cli.cli import console

    unknown = [word for word in prompt.unknown]
    if vocabulary:
        plain = prompt.text.lower().replace(",", " ").replace(".", " ").split()
        unknown += [w for w in dict.fromkeys(plain) if w not in vocabulary and w not in unknown]
    if unknown:
        knows = f" It understands: {' '.join(vocabulary)}." if vocabulary else ""
        console.warn(f"this model does not know: {', '.join(dict.fromkeys(unknown))}.{knows}")
    if prompt.dropped:
        console.warn(f"the prompt is too long: its last {prompt.dropped} tokens are not seen by the model.")


def _no_memory() -> tuple[int, int]:
    return 0, 0


def _memory_reader(device: Any) -> Any:
    """-> (bytes of the device in use by us, bytes of this process)."""
    import torch

    def read() -> tuple[int, int]:
        used = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        return used, _resident_bytes()

    return read


def _resident_bytes() -> int:
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize()
    except (OSError, ValueError, ImportError):
        return 0


# -- afterwards -------------------------------------------------------------------------------------------------


def _report(
    request: GenerateRequest,
    result: Result | None,
    plan: Plan,
    device: str,
    command: str,
    *,
    as_json: bool,
    quiet: bool,
    stop_code: int,
) -> None:
    from packforcing_cli.cli import console

    if result is None:
        return
    made = result.frames / result.fps
    spent = result.total_seconds
    if not quiet:
        console.say(
            f"{result.blocks} blocks, {result.frames} frames ({made:.2f} s) in {spent:.1f} s ="
            f" {result.frames / spent:.1f} FPS, {made / spent:.2f}x real time; KV memory"
            f" {console.gb(result.cache.bytes.live)}, peak memory {console.gb(result.peak_memory_bytes)}"
        )
        if stop_code:
            console.say(f"Interrupted: {result.blocks} of {plan.blocks} blocks. The whole video again: {command} --overwrite")
    if not as_json:
        console.result(str(result.path))
        return
    ordered = sorted(result.block_seconds)
    console.result_json(
        {
            "schema": SCHEMA,
            "path": str(result.path),
            "prompt": request.prompt,
            "seed": result.seed,
            "model": plan.model.name,
            "device": device,
            "dtype": plan.dtype,
            "size": list(plan.size),
            "fps": result.fps,
            "frames": result.frames,
            "blocks": result.blocks,
            "seconds": made,
            "interrupted": bool(stop_code),
            "command": command,
            "figures": {
                "total_seconds": round(spent, 3),
                "first_frame_seconds": round(result.first_frame_seconds, 3),
                "block_seconds_p50": round(ordered[len(ordered) // 2], 4),
                "block_seconds_p95": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 4),
                "stall_seconds": round(result.stall_seconds, 3),
                "fps": round(result.frames / spent, 3),
                "kv_bytes": result.cache.bytes.live,
                "full_cache_bytes": result.blocks * plan.layout.grid.block_tokens * plan.layout.grid.bytes_per_token,
                "peak_memory_bytes": result.peak_memory_bytes,
            },
        }
    )
