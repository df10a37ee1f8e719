"""packforcing generate PROMPT: a long video from text."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from packforcing_cli.cli import memory_options as memory
from packforcing_cli.cli import story_options as story

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from packforcing_cli.catalog import ModelFacts
    from packforcing_cli.cli.progress import Display, MemoryReader
    from packforcing_cli.config import GenerateRequest
    from packforcing_cli.errors import MemoryFitError
    from packforcing_cli.packages import Download
    from packforcing_cli.planner import Machine, Plan
    from packforcing_cli.provenance import Provenance
    from packforcing_cli.registry import VideoModel
    from packforcing_cli.rollout import Block, Prompt, Result
    from packforcing_cli.runfolder import RunFolder
    from packforcing_cli.sampler import Schedule

SCHEMA = 1
FILE_PANEL = "File"
RUN_PANEL = "Run folder"


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
    pin_image: story.PinImage = None,
    fit: story.Fit = None,
    at: story.At = None,
    timeline: story.TimelineFile = None,
    pin: story.Pin = None,
    codec: Annotated[
        str | None,
        typer.Option(
            "--codec",
            metavar="NAME",
            rich_help_panel=FILE_PANEL,
            help="h264 (default) or hevc; h264_nvenc, hevc_nvenc on GPUs that can.",
        ),
    ] = None,
    crf: Annotated[
        int | None,
        typer.Option("--crf", rich_help_panel=FILE_PANEL, help="Quality, 0 (lossless) to 51. Default 18."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset", metavar="NAME", rich_help_panel=FILE_PANEL, help="The encoder's. Default veryfast."
        ),
    ] = None,
    frames: Annotated[
        Path | None,
        typer.Option(
            "--frames", metavar="FOLDER", rich_help_panel=FILE_PANEL, help="Write every frame as a PNG, too."
        ),
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
    quantize: memory.Quantize = None,
    quantize_text: memory.QuantizeText = None,
    offload: memory.Offload = None,
    vae: memory.Vae = None,
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
    metadata: Annotated[
        bool | None,
        typer.Option("--metadata/--no-metadata", help="Write into the file how it was made. Default: yes."),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            metavar="DIR",
            rich_help_panel=RUN_PANEL,
            help="Where to keep what resume and extend need. Default: a new folder; see `runs list`.",
        ),
    ] = None,
    no_run: Annotated[
        bool,
        typer.Option(
            "--no-run", rich_help_panel=RUN_PANEL, help="Keep nothing: the video cannot be resumed."
        ),
    ] = False,
    snapshot_every: Annotated[
        int | None,
        typer.Option(
            "--snapshot-every",
            metavar="BLOCKS",
            rich_help_panel=RUN_PANEL,
            help="Save the exact state now and then, so that resuming is instant; it is as large as the memory.",
        ),
    ] = None,
) -> None:
    """Make a video from text. Prints the path of the finished file.

    Example: packforcing generate "a red circle moving right on a blue background" --seconds 60

    Exit codes: 0 done, 1 failed, 2 usage, 4 environment, 5 does not fit in memory, 6 disk full, 7 bad weights,
    9 locked, 130 interrupted, 143 terminated. Ctrl-C once ends the video after the block, twice at once.
    """
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
        "quantize_text": quantize_text,
        "offload": offload,
        "vae": vae,
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
    shown = display.choose(progress, quiet=quiet)
    try:
        if parity not in (None, "paper"):
            raise UsageError(f"--parity {parity}: must be paper", hint="See --parity in --help.")
        given = _only_prompt(embeddings) if prompt is None else _read_prompt(prompt, shown)
        made_with = None if again is None else _provenance(again)
        if made_with is None:
            first, scenes = story.gather(given, at, timeline, pin)
            request = settings.gather(flags).generate_request(
                first, output, timeline=scenes, image=image, pin_images=tuple(pin_image or ()), frames=frames
            )
        else:
            changes: dict[str, Any] = {
                "prompt": given,
                "image": image,
                "pin_images": tuple(pin_image) if pin_image else None,
                "frames": frames,
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
        folder = _check_run_options(request, run)
        job = prepare(request, made_with, only_plan=dry_run)
        if as_json and str(job.path) == "-" and not dry_run:
            raise UsageError("video and JSON cannot both go to standard output", hint="Leave --json away.")
        if dry_run:
            _show_plan(job, shown, as_json=as_json)
            return
        job.plan.require_fit()
        _introduce(job, shown, verbose=verbose)
        outcome = run_job(job, shown, verbose=verbose, open_run=lambda model: new_run(job, model, folder))
    except PackforcingError as error:
        if shown.error(error):
            raise typer.Exit(error.exit_code) from error
        raise
    if outcome.result is not None:
        report(job, outcome, outcome.result, shown, as_json=as_json)
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)


# -- before the model is loaded ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A request with everything decided.

    place:   what `registry.open_model` is given, a name or a folder.
    device:  its name, such as cpu or cuda:0.
    why:     why this model, device and precision, in one line.
    machine: what there was when it was planned.
    image:   [H,W,3] what the video begins with.
    stills:  [H,W,3] pictures of the first blocks.
    again:   how the file was made of which this is the repetition.
    command: repeats this job.
    downloads: parts that are not on this machine; only looked for in a dry run.
    """

    request: GenerateRequest
    facts: ModelFacts
    place: str | Path
    path: Path
    device: str
    why: str
    machine: Machine
    plan: Plan
    image: NDArray[np.uint8] | None
    stills: tuple[NDArray[np.uint8], ...]
    again: Provenance | None
    command: str
    downloads: tuple[Download, ...] = ()


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
    from packforcing_cli import provenance, video

    return provenance.from_tags(video.VideoReader(path).metadata, source=str(path))


def _compare(before: Provenance, now: Provenance, shown: Display) -> None:
    """Say what is no longer as it was when the file was made."""
    changed = []
    if now.model.files != before.model.files:
        changed.append(f"the weights of {before.model.name} {before.model.version}")
    if before.image_sha256 is not None and now.image_sha256 not in (None, before.image_sha256):
        changed.append("the start image")
    if before.version != now.version:
        changed.append(f"packforcing {before.version}, here {now.version}")
    if changed:
        shown.warn(f"not as it was when the file was made: {', '.join(changed)}; the video may differ")


def _check_run_options(request: GenerateRequest, folder: Path | None) -> Path | None:
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


def prepare(
    request: GenerateRequest,
    again: Provenance | None = None,
    *,
    path: Path | None = None,
    blocks: int = 0,
    why: Mapping[str, str] | None = None,
    only_plan: bool = False,
) -> Job:
    """Decide all that is open.

    torch is loaded only where an NVIDIA driver is, or when a GPU is asked for.
    Args:
        path: the output where that is decided and checked already.
        blocks: how many are there already; pictures that are in them are not read again.
        why:  reasons for model, device or precision that are known already.
        only_plan: for a dry run: nothing is asked, downloaded or installed, and the model may be missing.
    Raises: PackforcingError of any kind; no weights are read for it.
    """
    from packforcing_cli import catalog, config, packages, planner
    from packforcing_cli.cli import choose, console

    fitted: tuple[str, ...] = ()
    folder_of_output = (request.output or Path()).absolute().parent
    request, on, why_model = choose.resolve_model(request, folder_of_output, only_plan=only_plan)
    downloads = _downloads(request) if only_plan else ()
    known = catalog.find(request.model) if downloads else None  # its files may be missing
    if known is not None:
        known.require_weights()
    facts = known or packages.facts(request.model)
    if not facts.is_random and not downloads:
        folder = packages.find_package(request.model)  # refused early when it is not here
        packages.require_complete(folder, packages.read_manifest(folder))
    facts = packages.with_compressor(facts, request.memory.compressor)
    _check_abilities(request, facts)
    new, path = path is None, path or _output_path(request)
    is_named = request.model.lower() in {known.name for known in catalog.all_models()}
    place = facts.name if is_named or facts.is_random else request.model
    planner.plan(
        request, facts=facts
    )  # a size or memory that is not possible is refused before torch is loaded
    on = on or choose.choose_device(request, path.absolute().parent)
    plan = planner.plan(request.model_copy(update={"dtype": on.dtype}), on.machine, facts=facts)
    if request.auto_fit and plan.change:
        said = (
            f"auto-fit: {plan.suggestion}; as asked about {console.gb(plan.peak_bytes)} would be needed, and"
            f" {on.machine.device} has {console.gb(on.machine.memory_bytes)} free"
        )
        request, fitted = request.changed(**plan.change, auto_fit=False), (said,)
    request = request.model_copy(
        update={
            "seed": config.random_seed() if request.seed is None else request.seed,
            "output": path,
            "device": on.device.partition(":")[0] if request.device == "auto" else request.device,
            "dtype": on.dtype,
        }
    )
    plan = planner.plan(request, on.machine, facts=facts)
    plan = replace(plan, warnings=(*fitted, *plan.warnings))
    if plan.size != facts.default_size:
        said = f"{facts.name} was trained at {facts.default_size_text}; other sizes may look wrong"
        plan = replace(plan, warnings=(said, *plan.warnings))
    _check_file(request, plan, new=new)
    image = None
    if request.image is not None and not blocks:
        from packforcing_cli.video import read_image

        image = read_image(request.image, plan.size, request.fit)
    stills = _stills(request, plan, blocks)
    command = _command(request)
    reasons = {"model": why_model, "device": on.why, "precision": on.why_dtype, **(why or {})}
    said = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return Job(
        request,
        facts,
        place,
        path,
        on.device,
        said,
        on.machine,
        plan,
        image,
        stills,
        again,
        command,
        downloads,
    )


def _downloads(request: GenerateRequest) -> tuple[Download, ...]:
    """Parts of the model, and of the VAE that stands in for a Wan model's own, that are not on this machine."""
    from packforcing_cli import catalog, packages

    own = () if catalog.of_random(request.model) else tuple(packages.downloads(request.model))
    known = catalog.find(request.model)
    if request.vae == "tiny" and known is not None and known.codec == "wan":
        return (*own, *packages.downloads("taew2_1"))
    return own


def _stills(request: GenerateRequest, plan: Plan, blocks: int) -> tuple[NDArray[np.uint8], ...]:
    """The pinned pictures, in the size of the video; none if they all are in blocks that are there already.

    As long as one is not, all are needed: they are encoded as one stream.
    Raises: UsageError.
    """
    from packforcing_cli import video
    from packforcing_cli.errors import UsageError

    if request.pin_images and request.image is not None:
        raise UsageError("--image and --pin-image both say what block 0 is", hint="Leave one of them away.")
    if len(request.pin_images) >= plan.blocks:
        raise UsageError(
            f"{len(request.pin_images)} pinned pictures take a block each, and the video has {plan.blocks}",
            hint="Make it longer with --seconds.",
        )
    if len(request.pin_images) <= blocks:
        return ()
    return tuple(video.read_image(path, plan.size, request.fit) for path in request.pin_images)


def _check_file(request: GenerateRequest, plan: Plan, *, new: bool) -> None:
    """Raises: PackforcingError if the video cannot be encoded like this here, or its frames not be kept."""
    from packforcing_cli import video

    width, height = plan.size
    video.check_encoder(
        request.codec, fps=plan.fps, width=width, height=height, crf=request.crf, preset=request.preset
    )
    if request.frames is not None:
        video.check_frames(request.frames, overwrite=request.overwrite or not new)


def _check_abilities(request: GenerateRequest, facts: ModelFacts) -> None:
    """Raises: UsageError for what the model cannot do: a schedule, a branch or a VAE it was not made with."""
    from packforcing_cli import catalog
    from packforcing_cli.errors import UsageError

    schedule = facts.schedule
    catalog.check_sampling(
        facts.name, schedule.kind, schedule.num_steps, steps=request.steps, guidance=request.guidance
    )
    if request.frames_per_block not in (None, facts.frames_per_block):
        raise UsageError(
            f"frames_per_block {request.frames_per_block}: {facts.name} makes blocks of {facts.frames_per_block}"
            " latent frames",
            hint="Remove the setting; packforcing doctor --config shows where it is.",
        )
    memory = request.memory.with_defaults(facts.cache)
    if memory.top_k and memory.policy == "packforcing" and memory.select != "none":
        catalog.check_compressor(facts.name, facts.branches, memory.compressor)
    if request.vae is not None:
        catalog.check_vae(facts.name, facts.codec, request.vae)


def _output_path(request: GenerateRequest) -> Path:
    """The given output, checked; or a free name made from the prompt, in the current or the given folder."""
    from packforcing_cli import video
    from packforcing_cli.errors import UsageError

    given = request.output
    if given is not None and str(given) == "-":
        if sys.stdout.isatty():
            raise UsageError(
                "a video cannot go to a terminal",
                hint="Give a file, -o video.mp4, or a pipe: -o - | ffplay -",
            )
        return given
    if given is not None and not os.path.isdir(given):  # noqa: PTH112  (Path's raises for a name too long)
        return checked_output(given, overwrite=request.overwrite)
    folder = given or Path()
    number = 1
    while True:
        path = folder / video.safe_name(request.prompt, ".mp4" if number == 1 else f"-{number}.mp4")
        if request.overwrite or not (path.exists() or video.part_path(path).exists()):
            video.check_output(path, overwrite=request.overwrite)
            return path
        number += 1


def _precision(request: GenerateRequest) -> str:
    return request.dtype + ("" if request.quantize == "none" else f" with {request.quantize} linears")


def checked_output(given: Path, *, overwrite: bool = False) -> Path:
    """A given output, its ending added where it has none. Raises: UsageError as video.check_output."""
    from packforcing_cli import video

    path = given if given.suffix else given.with_name(given.name + ".mp4")
    video.check_output(path, overwrite=overwrite)
    return path


def _command(request: GenerateRequest) -> str:
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
    for name in ("quantize", "quantize_text", "offload"):
        if name in request.model_fields_set:
            values[name] = getattr(request, name)
    values |= request.memory.model_dump(include=request.memory.model_fields_set)
    if "bank" in values and values["bank"] is None:
        values["bank"] = "unlimited"
    options = story.arguments(request.timeline)
    for picture in request.pin_images:
        options += ["--pin-image", str(picture)]
    for name, value in values.items():
        if value is not None:
            shown = f"{value:.12g}" if isinstance(value, float) else str(value)
            options += ["--" + name.replace("_", "-"), shown]
    if request.snapshot_every is not None:
        options += ["--snapshot-every", str(request.snapshot_every)]
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
            "command": job.command,
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
        ("disk", f"at most about {console.gb(plan.disk_bytes)}"),
        ("output", str(job.path)),
        ("downloads", _downloads_text(job)),
        ("fits", fits),
        ("command", job.command),
    ):
        console.result(f"{name:<12} {value}")
    for warning in plan.warnings:
        shown.warn(warning)


def _downloads_text(job: Job) -> str:
    from packforcing_cli.cli import console

    if not job.downloads:
        return "none"
    parts = ", ".join(f"{part.part} {console.gb(part.size_bytes)}" for part in job.downloads)
    return f"{console.gb(sum(part.size_bytes for part in job.downloads))}: {parts}"


def _memory_text(job: Job) -> str:
    options, layout = job.plan.options, job.plan.layout
    bank = "unlimited" if layout.bank is None else layout.bank
    mids = f"top-k {layout.top_k} of a bank of {bank}, {options.select}, mid-span {layout.mid_span}"
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
    exit_code:    130 or 143 for a run that was stopped, else 0.
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


def new_run(job: Job, model: VideoModel, folder: Path | None) -> RunFolder | None:
    """The run folder of a new video, in the given place or among the others; None with --no-run."""
    from packforcing_cli import rollout, runfolder

    if not job.request.keep_run:
        return None
    record = rollout.new_record(model, recorded(job), tags=tags_of(job, model))
    return runfolder.RunFolder.create(folder or runfolder.default_root() / record.id, record)


def tags_of(job: Job, model: VideoModel, *, extends: str | None = None) -> dict[str, str]:
    """What the file is to say of itself; nothing with --no-metadata.

    Args:
        extends: the command that made it, where `generate` alone cannot make it again.
    """
    from packforcing_cli import rollout

    if not job.request.metadata:
        return {}
    made = rollout.provenance_of(model, job.request, job.plan.layout)
    return made.model_copy(update={"extends": extends}).tags()


def recorded(job: Job) -> GenerateRequest:
    """The request as a run folder keeps it: valid wherever it is read again."""
    request = job.request
    changes: dict[str, Any] = {"output": job.path.absolute()}
    if job.place != job.facts.name:
        changes["model"] = str(Path(job.place).expanduser().absolute())
    if request.vae is not None and Path(request.vae).is_dir():
        changes["vae"] = str(Path(request.vae).absolute())
    compressor = request.memory.compressor
    if os.sep in compressor or compressor.startswith("~") or Path(compressor).is_dir():
        place = str(Path(compressor).expanduser().absolute())
        changes["memory"] = request.changed(compressor=place).memory
    for name in ("image", "embeddings", "frames"):
        path = getattr(request, name)
        changes |= {} if path is None else {name: path.absolute()}
    changes["pin_images"] = tuple(path.absolute() for path in request.pin_images)
    return request.model_copy(update=changes)


def run_job(
    job: Job,
    shown: Display,
    *,
    verbose: bool,
    open_run: Callable[[VideoModel], RunFolder | None],
    run: RunFolder | None = None,
) -> Outcome:
    """Load, encode, generate, finish the file.

    Args:
        open_run: called with the loaded model, gives the run folder to go on with; it is closed here.
        run:      that folder, where it is open already.
    Raises: PackforcingError, saying what plays and how to go on.
    """
    from packforcing_cli import embeddings, registry, rollout
    from packforcing_cli.errors import GenerationError, PackforcingError
    from packforcing_cli.video import FrameFolder

    request = job.request
    blocks = 0

    def on_block(block: Block, seconds: float) -> None:
        nonlocal blocks
        blocks += 1
        shown.block(block, seconds)

    def kept() -> str:
        return kept_part(job) if blocks or (run is not None and run.blocks) else ""

    started = time.perf_counter()
    load_seconds = 0.0
    with Stop(shown) as stop:
        try:
            shown.stage(f"loading {job.facts.name} …")
            given = None if request.embeddings is None else embeddings.read(request.embeddings)
            source = registry.open_model(
                job.place,
                device=job.device,
                dtype=request.dtype,
                vae=request.vae,
                quantize=request.quantize,
                quantize_text=request.quantize_text,
                offload=request.offload,
                compressor=request.memory.compressor,
            )
            if job.image is not None and not source.manifest.start_image:
                shown.warn(
                    f"{source.name} was not trained to begin with a given picture; what follows may not match it"
                )
            schedule = rollout.schedule_for(source, steps=request.steps, guidance=request.guidance)
            # The text encoder is gone before the transformer takes memory.
            prompts = rollout.encode_script(
                source, job.plan.script, guided=schedule.guidance != 1.0, given=given
            )
            for prompt in {prompt.text: prompt for prompt in prompts.prompts}.values():
                warn_about_words(prompt, source.manifest.vocabulary, shown)
            model = source.load()
            if job.again is not None:
                _compare(job.again, rollout.provenance_of(model, request, job.plan.layout), shown)
            run = open_run(model)
            load_seconds = time.perf_counter() - started
            if verbose:
                describe(model, schedule, load_seconds, shown)
                if run is not None:
                    shown.note(f"run folder: {run.folder}")
            shown.start(job.plan, memory_reader(job.device))
            stop.making_blocks = True
            result = rollout.generate(
                model,
                prompts,
                sys.stdout.buffer if str(job.path) == "-" else job.path,
                seconds=request.seconds,
                seed=request.seed,
                size=job.plan.size,
                schedule=schedule,
                memory=request.memory,
                first_latent=None if job.image is None else rollout.encode_image(model, job.image),
                stills=job.stills,
                codec=request.codec,
                crf=request.crf,
                preset=request.preset,
                metadata=tags_of(job, model) if run is None else run.record.tags,
                overwrite=request.overwrite,
                run=run,
                snapshot_every=request.snapshot_every,
                frames=None if request.frames is None else FrameFolder(request.frames),
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
            if is_out_of_memory(error):
                raise memory_ran_out(job, rest) from error
            if rest:
                shown.note(rest)
            raise
        finally:
            shown.stop()
            if run is not None:
                run.discard() if run.is_new and not run.blocks else run.close()
    run_id = run.record.id if run is not None else None
    return Outcome(result, load_seconds, stop.code if result.stopped else 0, run_id)


def _how_to_go_on(job: Job, run: RunFolder | None) -> str:
    """One sentence: the command that makes the rest, or all of it again where nothing was kept."""
    if run is not None and run.blocks:
        return f"To go on: {resume_command(run)}"
    return f"The whole video: {_again(job)}"


def resume_command(run: RunFolder) -> str:
    """packforcing resume with the run's id."""
    return f"packforcing resume {run.record.id}"


def kept_part(job: Job) -> str:
    """One sentence about the part file of a run that ended early; empty if there is none."""
    from packforcing_cli import video

    part = video.part_path(job.path)
    return f"What was made so far plays: {part}" if part.exists() and part.stat().st_size else ""


def _again(job: Job) -> str:
    return _command(job.request.model_copy(update={"overwrite": True}))


def is_out_of_memory(error: Exception) -> bool:
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        said in str(error) for said in ("can't allocate memory", "not enough memory", "out of memory")
    )


def memory_ran_out(job: Job, kept: str) -> MemoryFitError:
    from packforcing_cli import planner
    from packforcing_cli.errors import MemoryFitError

    less = min(job.machine.memory_bytes, job.plan.peak_bytes) * 9 // 10
    suggestion = planner.plan(
        job.request, replace(job.machine, memory_bytes=less), facts=job.facts
    ).suggestion
    hint = (
        f"Try {suggestion}, or another --device."
        if suggestion
        else "Try a smaller --size or another --device."
    )
    return MemoryFitError(f"the memory of {job.machine.device} ran out", hint=f"{hint} {kept}".strip())


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


def memory_reader(device: str) -> MemoryReader:
    import torch

    def read() -> tuple[int, int]:
        used = 0 if device == "cpu" else torch.cuda.memory_allocated(device)
        return used, _resident_bytes()

    return read


def _resident_bytes() -> int:
    """Memory of this process; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0


# -- afterwards -------------------------------------------------------------------------------------------------


def report(job: Job, outcome: Outcome, result: Result, shown: Display, *, as_json: bool) -> None:
    """The figures on stderr, the path or the JSON on stdout."""
    from packforcing_cli.cli import console

    plan = job.plan
    before = plan.layout.frames_for(result.replayed) if result.replayed else 0
    now = max(0, result.frames - before)
    made, spent = now / result.fps, result.total_seconds
    full_bytes = result.blocks * plan.layout.grid.block_tokens * plan.layout.grid.bytes_per_token
    shown.note(
        f"{count(result.blocks - result.replayed, 'block')}, {now} frames ({made:.2f} s) in {spent:.1f} s:"
        f" {now / spent:.1f} FPS, {made / spent:.2f}x real time; KV memory"
        f" {console.gb(result.cache.bytes.live)} (a full cache: {console.gb(full_bytes)}),"
        f" peak memory {console.gb(result.peak_memory_bytes)}"
    )
    if outcome.exit_code:
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
            "warnings": list(plan.warnings),
            "command": job.command,
            "figures": {
                "load_seconds": round(outcome.load_seconds, 3),
                "total_seconds": round(spent, 3),
                "first_frame_seconds": round(result.first_frame_seconds, 3),
                "block_seconds_p50": round(_percentile(result.block_seconds, 50), 4),
                "block_seconds_p95": round(_percentile(result.block_seconds, 95), 4),
                "stall_seconds": round(result.stall_seconds, 3),
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
        }
    )


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _percentile(values: Iterable[float], percent: int) -> float:
    """The smallest value that at least `percent` of the values do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[max(0, -(-percent * len(ordered) // 100) - 1)] if ordered else 0.0
