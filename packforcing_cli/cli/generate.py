"""packforcing generate PROMPT: a long video from text."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from packforcing_cli.cli import file_options as files
from packforcing_cli.cli import memory_options as memory
from packforcing_cli.cli import story_options as story

if TYPE_CHECKING:
    from packforcing_cli.cli.progress import Display, MemoryReader
    from packforcing_cli.config import GenerateRequest
    from packforcing_cli.jobs import Job
    from packforcing_cli.planner import Plan
    from packforcing_cli.prompts import Prompt
    from packforcing_cli.provenance import Provenance
    from packforcing_cli.registry import VideoModel
    from packforcing_cli.rollout import Block, Result
    from packforcing_cli.runfolder import RunFolder
    from packforcing_cli.sampler import Schedule

SCHEMA = 1
LONG_SECONDS = 120.0  # of a run, above which the tip about --compile is shown
HEALTH_SHOWN = 6  # blocks named in one line
OTHER_NOISE = "Try another --seed, or --guard retry."


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(
            help='What the video shows; "-" reads it from standard input. Not needed with a scene at 0:00.',
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help='A .mp4, .mkv or .mov, or "-" for standard output. Default: a name made from the prompt.',
        ),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", help="Length; the video has whole blocks. Default 10.")
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", metavar="WxH", help="Pixels. Default: the model's own size.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Default: random, and printed.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="A model's name, a package folder, a bundle .tar, hf:owner/repo, or auto: an installed real model"
            " on a GPU that it fits, else the demo. Default auto.",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Denoising steps. Default: the model's own.")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", help="Classifier-free guidance, 1 = none. Default: the model's own."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", metavar="NAME", help="auto (bf16 on a GPU, fp32 on a CPU), bf16, fp16, fp32."
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", metavar="NAME", help="auto (the GPU with most free memory), cpu, cuda or cuda:N."
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            "--image",
            metavar="FILE",
            rich_help_panel=story.PANEL,
            help="The picture the video begins with: PNG, JPEG or WebP.",
        ),
    ] = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(
            "--embeddings",
            metavar="FILE",
            help="Prompt embeddings from packforcing models embed; the text encoder is not loaded.",
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora",
            metavar="PATH[:WEIGHT]",
            help="Adapters from packforcing train finetune-lora, added to the model; can be repeated.",
        ),
    ] = None,
    pin_image: story.PinImage = None,
    fit: story.Fit = None,
    at: story.At = None,
    timeline: story.TimelineFile = None,
    pin: story.Pin = None,
    codec: files.Codec = None,
    crf: files.Crf = None,
    preset: files.Preset = None,
    frames: files.Frames = None,
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
    attention: memory.Attention = None,
    compile_layers: memory.Compile = None,
    cuda_graphs: memory.CudaGraphs = None,
    auto_fit: memory.AutoFit = False,
    parity: Annotated[
        str | None,
        typer.Option(
            "--parity",
            metavar="paper",
            rich_help_panel=memory.PANEL,
            help="paper: select by affinity in the first pass, a compressed block takes all its slots.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and the command; make nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON instead of the path.")
    ] = False,
    progress: Annotated[str, typer.Option("--progress", help="auto, rich, plain, json or none.")] = "auto",
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but errors.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Say more; show tracebacks.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    again: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Make the video of a file again: what it was made with, and the options given here instead.",
        ),
    ] = None,
    metadata: files.Metadata = None,
    run: files.RunPlace = None,
    no_run: files.NoRun = False,
    guard: memory.Guard = None,
    overlap: memory.Overlap = None,
    snapshot_every: files.SnapshotEvery = None,
) -> None:
    """Make a video from text. Prints the path of the finished file.

    Example: packforcing generate "a red circle moving right on a blue background" --seconds 60

    Exit codes: 0 done, 1 failed, 2 usage, 4 environment, 5 does not fit in memory, 6 disk full, 7 bad weights,
    9 locked, 130 interrupted, 143 terminated. Ctrl-C once ends the video after the block, twice at once.
    """
    from packforcing_cli import jobs
    from packforcing_cli.cli import progress as display
    from packforcing_cli.cli import settings
    from packforcing_cli.errors import PackforcingError, UsageError

    flags: dict[str, Any] = {
        "model": model,
        "seconds": seconds,
        "size": size,
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "dtype": dtype,
        "device": device,
        "quantize": quantize,
        "quantize_skip": quantize_skip,
        "quantize_text": quantize_text,
        "offload": offload,
        "vae": vae,
        "vae_latents": vae_latents,
        "attention": attention,
        "compile": compile_layers,
        "cuda_graphs": cuda_graphs,
        "embeddings": embeddings,
        "auto_fit": auto_fit or None,
        "crf": crf,
        "codec": codec,
        "preset": preset,
        "fit": fit,
        "metadata": metadata,
        "overwrite": overwrite or None,
        "keep_run": False if no_run or str(output) == "-" else None,  # a stream cannot be resumed
        "snapshot_every": snapshot_every,
        "guard": guard,
        "overlap": overlap,
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
    }
    shown = display.choose(progress, quiet=quiet, verbose=verbose)
    try:
        if parity not in (None, "paper"):
            raise UsageError(f"--parity {parity}: must be paper", hint="See --parity in --help.")
        given = _only_prompt(embeddings) if prompt is None else _read_prompt(prompt, shown)
        made_with = None if again is None else _provenance(again)
        if made_with is None:
            first, scenes = story.gather(given, at, timeline, pin)
            request = settings.gather(flags).generate_request(
                first,
                output,
                timeline=scenes,
                image=image,
                pin_images=tuple(pin_image or ()),
                frames=frames,
                loras=tuple(lora or ()),
            )
        else:
            changes: dict[str, Any] = {
                "prompt": given,
                "image": image,
                "pin_images": tuple(pin_image) if pin_image else None,
                "frames": frames,
                "loras": tuple(lora) if lora else None,
                **settings.with_places(flags),
            }
            if at or timeline or pin:
                changes["prompt"], changes["timeline"] = story.gather(
                    given or made_with.request.get("prompt"), at, timeline, pin
                )
            request = made_with.generate_request(
                {"output": output, **{name: value for name, value in changes.items() if value is not None}}
            )
        if parity == "paper":
            request = request.model_copy(update={"memory": request.memory.paper_parity()})
        folder = check_run_options(request, run)
        job = prepare(request, only_plan=dry_run)
        if as_json and str(job.path) == "-" and not dry_run:
            raise UsageError("video and JSON cannot both go to standard output", hint="Leave --json away.")
        if dry_run:
            _show_plan(job, shown, as_json=as_json)
            return
        job.plan.require_fit()
        _introduce(job, shown, verbose=verbose)
        outcome = run_job(
            job,
            shown,
            verbose=verbose,
            open_run=lambda model: jobs.new_run(job, model, folder),
            again=made_with,
        )
    except PackforcingError as error:
        if shown.error(error):
            raise typer.Exit(error.exit_code) from error
        raise
    if outcome.result is not None:
        report(job, outcome, outcome.result, shown, as_json=as_json)
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)


# -- before the model is loaded ---------------------------------------------------------------------------------


def prepare(
    request: GenerateRequest,
    *,
    path: Path | None = None,
    blocks: int = 0,
    why: Mapping[str, str] | None = None,
    only_plan: bool = False,
) -> Job:
    """`jobs.prepare`, for a request that may leave the model open too; a person may be asked to install one.

    Args and raises: as there. With `only_plan` nothing is asked, downloaded or installed.
    """
    from packforcing_cli import jobs
    from packforcing_cli.cli import choose

    folder_of_output = (request.output or Path()).absolute().parent
    request, on, why_model = choose.resolve_model(request, folder_of_output, only_plan=only_plan)
    reasons = {"model": why_model, **(why or {})}
    return jobs.prepare(request, on=on, path=path, blocks=blocks, why=reasons, only_plan=only_plan)


def _read_prompt(prompt: str, shown: Display) -> str:
    """The prompt as clean text; "-" reads standard input."""
    from packforcing_cli.errors import UsageError

    if prompt == "-":
        if sys.stdin.isatty():
            shown.note("Type the prompt; Ctrl-D on an empty line ends it.")
        try:
            prompt = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise UsageError(
                f"the prompt on standard input is not {error.encoding} text",
                hint="Give the prompt as an argument, or convert it.",
            ) from error
    return prompt.encode(errors="surrogateescape").decode(errors="replace")


def _only_prompt(embeddings: Path | None) -> str | None:
    """The prompt of a file of embeddings that has just one."""
    if embeddings is None:
        return None
    from packforcing_cli.embeddings import read

    prompts = read(embeddings).prompts
    return prompts[0] if len(prompts) == 1 else None


def _provenance(path: Path) -> Provenance:
    """How a video file was made. Raises: UsageError or VideoError."""
    from packforcing_cli import provenance
    from packforcing_cli.reader import VideoReader

    return provenance.from_tags(VideoReader(path).metadata, source=str(path))


def _compare(before: Provenance, now: Provenance, shown: Display) -> None:
    """Say what is no longer as it was when the file was made."""
    from packforcing_cli import provenance

    changed = provenance.changes(before, now)
    if changed:
        shown.warn(f"not as it was when the file was made: {', '.join(changed)}; the video may differ")


def check_run_options(request: GenerateRequest, folder: Path | None) -> Path | None:
    """The given place of the run folder, checked. Raises: UsageError."""
    from packforcing_cli import runfolder
    from packforcing_cli.errors import UsageError

    if not request.keep_run:
        given = "--run" if folder else "--snapshot-every" if request.snapshot_every else ""
        if given and str(request.output) == "-":
            raise UsageError(
                f"{given} needs a run folder, and a video to standard output has none",
                hint=f"Give a file with -o, or leave {given} away.",
            )
        if given:
            raise UsageError(f"{given} needs a run folder, and --no-run forbids it", hint="Leave one away.")
        return None
    runfolder.check_new(folder or runfolder.default_root() / "new")
    return folder


def _precision(request: GenerateRequest) -> str:
    return request.dtype + ("" if request.quantize == "none" else f" with {request.quantize} linears")


def repeat_command(request: GenerateRequest) -> str:
    """The command that makes the same video again: everything the person set, and what was decided for them."""
    values: dict[str, Any] = {"output": request.output, "image": request.image}
    values |= {name: getattr(request, name) for name in ("fit", "codec") if name in request.model_fields_set}
    values["frames"] = request.frames
    if request.size is not None:
        values["size"] = f"{request.size[0]}x{request.size[1]}"
    for name in (
        "seconds",
        "seed",
        "model",
        "steps",
        "guidance",
        "dtype",
        "device",
        "vae",
        "embeddings",
        "crf",
        "preset",
    ):
        values[name] = getattr(request, name)
    for name in ("quantize", "quantize_skip", "quantize_text", "offload", "attention", "vae_latents"):
        if name in request.model_fields_set:
            values[name] = getattr(request, name)
    values |= request.memory.model_dump(include=request.memory.model_fields_set)
    if "bank" in values and values["bank"] is None:
        values["bank"] = "unlimited"
    options = request.timeline.arguments()
    for picture in request.pin_images:
        options += ["--pin-image", str(picture)]
    for adapter in request.loras:
        options += ["--lora", adapter]
    for name, value in values.items():
        if value is not None:
            shown = f"{value:.12g}" if isinstance(value, float) else str(value)
            options += ["--" + name.replace("_", "-"), shown]
    if "guard" in request.model_fields_set:
        options += ["--guard", request.guard]
    if "overlap" in request.model_fields_set:
        options += ["--overlap", request.overlap]
    if request.snapshot_every is not None:
        options += ["--snapshot-every", str(request.snapshot_every)]
    options += ["--compile"] if request.compile else []
    options += ["--cuda-graphs"] if request.cuda_graphs else []
    options += [] if request.keep_run else ["--no-run"]
    if "metadata" in request.model_fields_set:
        options += ["--metadata" if request.metadata else "--no-metadata"]
    options += ["--overwrite"] if request.overwrite else []
    prompt = ["--", request.prompt] if request.prompt.startswith("-") else [request.prompt]
    words = [*options, *prompt] if len(prompt) == 2 else [*prompt, *options]
    return shlex.join(["packforcing", "generate", *words])


def _show_plan(job: Job, shown: Display, *, as_json: bool) -> None:
    """What --dry-run prints, on stdout."""
    from packforcing_cli.cli import console

    plan = job.plan
    if as_json:
        extra: dict[str, Any] = {
            "seed": job.request.seed,
            "device": job.device,
            "output": str(job.path),
            "downloads": [asdict(part) for part in job.downloads],
            "command": repeat_command(job.request),
        }
        console.result_json({**plan.to_json(), **extra})
        return
    width, height = plan.size
    if plan.fits:
        fits = "yes"
    else:
        fits = f"no; try {plan.suggestion}" if plan.suggestion else "no"
    for name, value in (
        ("model", f"{plan.model.name} on {job.device}, {_precision(job.request)}"),
        ("video", f"{width}x{height}, {plan.fps} fps, {plan.frames} frames = {plan.exact_seconds:.2f} s"),
        ("blocks", f"{plan.blocks} of {plan.frames_per_block} latent frames"),
        ("seed", str(job.request.seed)),
        *story.rows(plan),
        ("memory", _memory_text(job)),
        ("KV memory", f"{console.gb(plan.memory.live)}; a full cache: {console.gb(plan.full_history_bytes)}"),
        ("peak memory", f"about {console.gb(plan.peak_bytes)}: {_stages_text(plan)}"),
        ("disk", _disk_text(plan)),
        ("output", str(job.path)),
        ("downloads", _downloads_text(job)),
        ("fits", fits),
        ("command", repeat_command(job.request)),
    ):
        console.result(f"{name:<12} {value}")
    for warning in plan.warnings:
        shown.warn(warning)


def _disk_text(plan: Plan) -> str:
    """Most disk space while the video is made: at most about 1.2 GB: video 0.2 GB, run folder 1.0 GB."""
    from packforcing_cli.cli import console

    video = console.gb(plan.disk_bytes - plan.run_bytes)
    parts = f"video {video}, run folder {console.gb(plan.run_bytes)}" if plan.run_bytes else "the video alone"
    return f"at most about {console.gb(plan.disk_bytes)}: {parts}"


def _downloads_text(job: Job) -> str:
    from packforcing_cli.cli import console

    if not job.downloads:
        return "none"
    parts = ", ".join(f"{part.part} {console.gb(part.size_bytes)}" for part in job.downloads)
    return f"{console.gb(sum(part.size_bytes for part in job.downloads))}: {parts}"


def _memory_text(job: Job) -> str:
    options, layout = job.plan.options, job.plan.layout
    bank = "unlimited" if layout.bank is None else layout.bank
    kept = "" if layout.kv_dtype == "auto" else f" in {layout.kv_dtype}"
    kept += ", in host memory" if job.plan.bank_device == "host" else ""
    mids = f"top-k {layout.top_k} of a bank of {bank}{kept}, {options.select}, mid-span {layout.mid_span}"
    return f"{options.policy}: sink {layout.sink_blocks}, recent {layout.recent_blocks}" + (
        f", {mids}, compressor {options.compressor}" if layout.top_k else " blocks"
    )


def _stages_text(plan: Plan) -> str:
    """Peak memory of each stage: text 12 GB, denoise 18 GB, decode 21 GB; in host memory …"""
    from packforcing_cli.cli import console

    def listed(attribute: str) -> str:
        return ", ".join(f"{stage.name} {console.gb(getattr(stage, attribute))}" for stage in plan.stages)

    beside = any(stage.host_bytes for stage in plan.stages)
    return listed("device_bytes") + (f"; in host memory {listed('host_bytes')}" if beside else "")


def _introduce(job: Job, shown: Display, *, verbose: bool) -> None:
    """What will be made, said before it is begun."""
    plan = job.plan
    width, height = plan.size
    what = (
        f"{width}x{height}, seed {job.request.seed}; {plan.seconds:g} s in whole blocks: {plan.blocks} ="
        f" {plan.frames} frames = {plan.exact_seconds:.2f} s at {plan.fps} fps"
    )
    say_model(job, shown, what)
    for warning in plan.warnings:
        shown.warn(warning)
    if verbose:
        shown.note(f"memory: {_memory_text(job)}")


def model_line(model: str, device: str, precision: str, why: str, what: str = "") -> str:
    """Which model, device and precision a command takes, and why: the same sentence for every command."""
    return f"{model} on {device} ({precision}){', ' if what else ''}{what}; {why}"


def say_model(job: Job, shown: Display, what: str = "") -> None:
    """What every command that runs a model says of it, and of the video: `what`."""
    if job.place == "demo":
        shown.note(
            "demo is a toy world of coloured shapes that ships with packforcing. For other videos, on a GPU:"
            " packforcing models list."
        )
    if job.facts.is_random:
        shown.note(
            f"{job.facts.name} has random weights and random text embeddings, for bench and tests: nothing was"
            " downloaded, and the video shows noise."
        )
    plan = job.plan
    shown.note(model_line(plan.model.name, job.device, _precision(job.request), job.why, what))
    if (
        plan.layout.top_k
        and job.facts.branches == "lr"
        and plan.options.compressor not in ("pool", "identity")
    ):
        shown.note("no trained compressor: old blocks are kept by the training-free LR path")


# -- the run ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    result:       what was made; None if it was stopped before it could be finished.
    run_id:       of its run folder; None without one.
    load_seconds: from the start of loading to the first block's start.
    exit_code:    130 or 143 for a run that was stopped, 1 for one that the guard ended, else 0.
    """

    result: Result | None
    load_seconds: float
    exit_code: int
    run_id: str | None = None


class Stop:
    """Ctrl-C and SIGTERM: while blocks are made the first one asks to stop after the block, the next one at once.

    code: 128 + the first signal's number, 0 without one.
    """

    def __init__(self, shown: Display) -> None:
        self.code = 0
        self.making_blocks = False
        self._shown = shown

    def __enter__(self) -> Stop:
        self._before = {s: signal.signal(s, self._caught) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, _frame: FrameType | None) -> None:
        first, self.code = self.code == 0, self.code or 128 + number
        if not (first and self.making_blocks):
            raise KeyboardInterrupt
        self._shown.stopping("Stopping after this block; Ctrl-C once more stops at once.")


def run_job(
    job: Job,
    shown: Display,
    *,
    verbose: bool,
    open_run: Callable[[VideoModel], RunFolder | None],
    run: RunFolder | None = None,
    again: Provenance | None = None,
    watch: Callable[[Block], None] | None = None,
) -> Outcome:
    """Load, encode, generate, finish the file.

    Args:
        open_run: called with the loaded model, gives the run folder to go on with; it is closed here.
        run:      that folder, where it is open already.
        again:    how the file was made of which this is the repetition: what differs now is said.
        watch:    gets every block, too.
    Raises: PackforcingError, saying what plays and how to go on.
    """
    from packforcing_cli import jobs, sameness
    from packforcing_cli.errors import GenerationError, PackforcingError

    blocks = 0

    def on_block(block: Block, seconds: float) -> None:
        nonlocal blocks
        blocks += 1
        if watch is not None:
            watch(block)
        shown.block(block, seconds)

    def kept() -> str:
        return jobs.kept_part(job) if blocks or (run is not None and run.blocks) else ""

    started = time.perf_counter()
    load_seconds = 0.0
    with Stop(shown) as stop:
        try:
            shown.stage(f"loading {job.facts.name} …")
            source = jobs.open_source(job)
            if job.image is not None and not source.manifest.start_image:
                shown.warn(
                    f"{source.name} was not trained to begin with a given picture; what follows may not match it"
                )
            with jobs.Loading(job, source) as loading:
                prompts = loading.story()
                for prompt in {prompt.text: prompt for prompt in prompts.prompts}.values():
                    warn_about_words(prompt, source.manifest.vocabulary, shown)
                model = loading.model()
            if model.attention.warning:
                shown.warn(model.attention.warning)
            if tip := _compile_tip(job, model):
                shown.note(tip)
            if again is not None:
                _compare(again, sameness.provenance_of(model, job.request, job.plan.layout), shown)
            run = open_run(model)
            load_seconds = time.perf_counter() - started
            if verbose:
                describe(model, jobs.schedule_of(job, model), load_seconds, shown)
                if run is not None:
                    shown.note(f"run folder: {run.folder}")
            shown.start(job.plan, memory_reader(job.device))
            stop.making_blocks = True
            result = jobs.make(
                job,
                model,
                prompts,
                run=run,
                output=sys.stdout.buffer if str(job.path) == "-" else None,
                on_block=on_block,
                should_stop=lambda: stop.code != 0,
            )
            shown.done(result)
        except KeyboardInterrupt:
            shown.stop()
            shown.note(f"Stopped at once. {kept() or 'Nothing was written.'}")
            shown.note(_how_to_go_on(job, run))
            return Outcome(None, load_seconds, stop.code or 130)
        except PackforcingError as error:
            shown.stop()
            more = [error.hint, "" if "plays" in error.hint else kept()]
            if run is not None and run.blocks and not isinstance(error, GenerationError):
                more.append(_how_to_go_on(job, run))
            error.hint = " ".join(part for part in more if part)
            raise
        except Exception as error:
            shown.stop()
            rest = f"{kept()} {_how_to_go_on(job, run) if run is not None and run.blocks else ''}".strip()
            if jobs.is_out_of_memory(error):
                raise jobs.memory_ran_out(job, rest) from error
            if rest:
                shown.note(rest)
            raise
        finally:
            shown.stop()
            if run is not None:
                run.discard() if run.is_new and not run.blocks else run.close()
    run_id = run.record.id if run is not None else None
    code = 1 if result.ended else stop.code if result.stopped else 0
    return Outcome(result, load_seconds, code, run_id)


def _how_to_go_on(job: Job, run: RunFolder | None) -> str:
    """One sentence: the command that makes the rest, or all of it again where nothing was kept."""
    if run is not None and run.blocks:
        return f"To go on: {resume_command(run)}"
    return f"The whole video: {_again(job)}"


def resume_command(run: RunFolder) -> str:
    """packforcing resume with the run's id."""
    return f"packforcing resume {run.record.id}"


def _again(job: Job) -> str:
    from packforcing_cli import jobs

    if job.request.source is not None:
        return f"{jobs.extend_command(job)} --overwrite"
    return repeat_command(job.request.model_copy(update={"overwrite": True}))


def warn_about_words(prompt: Prompt, vocabulary: Iterable[str], shown: Display) -> None:
    if prompt.unknown:
        words = " ".join(vocabulary)
        shown.warn(
            f"this model does not know: {', '.join(prompt.unknown)}."
            + (f" It understands: {words}" if words else "")
        )
    if prompt.dropped:
        shown.warn(f"the prompt is too long: its last {count(prompt.dropped, 'token')} will not be seen")


def describe(model: VideoModel, schedule: Schedule, load_seconds: float, shown: Display) -> None:
    """What -v says about the loaded model."""
    import torch

    from packforcing_cli.vae import WanCodec

    steps = len(schedule.sigmas) - (schedule.kind == "euler")
    parameters = sum(p.numel() for p in model.transformer.parameters())
    shown.note(
        f"{model.name if model.folder == Path() else model.folder}: version {model.manifest.version},"
        f" {parameters:,} parameters in the transformer,"
        f" loaded in {load_seconds:.1f} s"
    )
    shown.note(
        f"{schedule.kind}, {steps} steps, guidance {schedule.guidance:g};"
        f" torch {torch.__version__}, {torch.get_num_threads()} CPU threads"
    )
    vae = " and VAE decoder" if isinstance(model.codec, WanCodec) and model.codec.compiled else ""
    more = [f"compiled layers{vae}"] * model.compiled + ["recorded passes"] * model.graphs
    shown.note(", ".join([f"attention: {model.attention.taken}", *more]))


def _compile_tip(job: Job, model: VideoModel) -> str:
    """What would make a long run on a GPU shorter; empty for a short one, or where it is done."""
    if model.device.type != "cuda" or model.compiled:
        return ""
    from packforcing_cli import bench, jobs

    schedule = jobs.schedule_of(job, model)
    return compile_tip(bench.expected_seconds(model, job.plan.layout, schedule, blocks=job.plan.blocks))


def compile_tip(seconds: float) -> str:
    """The tip for a run that is expected to take this long on a GPU; empty below two minutes."""
    if seconds < LONG_SECONDS:
        return ""
    return (
        f"this will take about {seconds / 60:.0f} minutes; --compile --cuda-graphs makes blocks faster, the first"
        " ones wait for the compiler"
    )


def memory_reader(device: str) -> MemoryReader:
    import torch

    from packforcing_cli.machine import resident_bytes

    def read() -> tuple[int, int]:
        used = 0 if device == "cpu" else torch.cuda.memory_allocated(device)
        return used, resident_bytes()

    return read


# -- afterwards -------------------------------------------------------------------------------------------------


def report(
    job: Job,
    outcome: Outcome,
    result: Result,
    shown: Display,
    *,
    as_json: bool,
    more: Mapping[str, Any] | None = None,
) -> None:
    """The figures on stderr, the path or the JSON on stdout.

    Args:
        more: for the JSON.
    """
    from packforcing_cli import jobs
    from packforcing_cli.cli import console

    plan = job.plan
    now = result.new_frames
    made, spent = now / result.fps, result.total_seconds
    full_bytes = result.blocks * plan.layout.grid.block_tokens * plan.layout.grid.bytes_per_token
    shown.note(
        f"{count(result.blocks - result.replayed, 'block')}, {now} frames ({made:.2f} s) in {spent:.1f} s:"
        f" {now / spent:.1f} FPS, {made / spent:.2f}x real time; KV memory"
        f" {console.gb(result.cache.bytes.live)} (a full cache: {console.gb(full_bytes)}),"
        f" peak memory {console.gb(result.peak_memory_bytes)}{_timing(result)}"
    )
    for line in _health(result, plan):
        shown.warn(line)
    if result.ended:
        shown.warn(f"--guard stop: {result.ended}. {_after_guard(result, outcome.run_id, plan)}")
    elif outcome.exit_code:
        rest = f"To go on: packforcing resume {outcome.run_id}" if outcome.run_id else ""
        rest = rest or f"The whole video: {_again(job)}"
        shown.note(f"Stopped after {result.blocks} of {plan.blocks} blocks. {rest}")
    if not as_json:
        if str(result.path) != "-":
            console.result(str(result.path))
        return
    kv = result.cache.bytes
    console.result_json(
        {
            "schema": SCHEMA,
            "path": str(result.path),
            "prompt": job.request.prompt,
            "seed": result.seed,
            "model": plan.model.name,
            "device": job.device,
            "dtype": plan.dtype,
            "size": list(plan.size),
            "fps": result.fps,
            "frames": result.frames,
            "blocks": result.blocks,
            "seconds": result.frames / result.fps,
            "run": outcome.run_id,
            "interrupted": bool(outcome.exit_code),
            "health": {
                "unhealthy": {str(block): list(flags) for block, flags in result.unhealthy.items()},
                "retries": {str(block): number for block, number in result.retries.items()},
                "ended": result.ended,
            },
            "warnings": list(plan.warnings),
            "command": repeat_command(job.request)
            if job.request.source is None
            else jobs.extend_command(job),
            "figures": {
                "load_seconds": round(outcome.load_seconds, 3),
                "total_seconds": round(spent, 3),
                **result.timing,
                **result.process_timing,
                "fps": round(now / spent, 3),
                "realtime_factor": round(made / spent, 3),
                "kv_bytes": {
                    "stored": kv.stored,
                    "current": kv.current,
                    "raw_keys": kv.raw_keys,
                    "backups": kv.backups,
                    "bank": kv.bank,
                    "live": kv.live,
                },
                "full_cache_bytes": full_bytes,
                "peak_memory_bytes": result.peak_memory_bytes,
            },
            **(more or {}),
        }
    )


def _timing(result: Result) -> str:
    """How soon and how steadily frames came, as the end of a line; empty if none was made now."""
    if not result.block_seconds:
        return ""
    whole = result.process_first_frame_seconds
    return (
        f"; first frames in the file after {result.first_frame_seconds:.2f} s"
        + ("" if whole is None else f" ({whole:.2f} s from the start of the command)")
        + f", a block {result.block_percentile(50):.3g} s (p95 {result.block_percentile(95):.3g} s)"
        + (
            f", {result.stall_seconds:.2f} s of waiting for the encoder"
            if result.stall_seconds >= 0.01
            else ""
        )
    )


def _health(result: Result, plan: Plan) -> list[str]:
    """What the person should know of the blocks that were made now: a line each of flags and of attempts."""
    from packforcing_cli.cli.progress import clock

    def named(block: int, what: str) -> str:
        begins = plan.layout.frames_for(block) / plan.fps if block else 0.0
        return f"block {block} ({clock(begins)}) {what}"

    lines = []
    for said, found in (
        ("not healthy", {block: " and ".join(flags) for block, flags in result.unhealthy.items()}),
        ("made again", {block: f"{count(n, 'time')}" for block, n in result.retries.items()}),
    ):
        if found:
            shown = "; ".join(named(block, what) for block, what in list(found.items())[:HEALTH_SHOWN])
            more = f"; and {len(found) - HEALTH_SHOWN} more" if len(found) > HEALTH_SHOWN else ""
            lines.append(f"{said}: {shown}{more}")
    return lines


def _after_guard(result: Result, run_id: str | None, plan: Plan) -> str:
    """What to do when the guard ended a video."""
    from packforcing_cli import config

    if run_id is None:
        return OTHER_NOISE
    start = plan.layout.frames_for(max(1, result.blocks - 1)) / plan.fps
    left = plan.exact_seconds - start
    return (
        f"To go on with other noise: packforcing resume {run_id} --guard retry; to branch off before it:"
        f" packforcing extend {run_id} --from {start:.2f} --seconds {left:.2f} --seed {config.random_seed()}"
    )


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
