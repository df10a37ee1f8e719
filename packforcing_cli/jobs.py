"""From a request to a finished video: what `generate`, `resume`, `extend` and `batch` do alike, without any display.

    request -> prepare -> Job -> open_source -> Loading -> open a run folder -> make -> Result

`prepare` decides all that is open and refuses what cannot be done before any weights are read; torch is loaded only
where an NVIDIA driver is, or when a GPU is asked for. Knows no terminal: it returns, raises, or calls back.
"""

from __future__ import annotations

import gc
import logging
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from packforcing_cli import catalog, config, machine, packages, planner
from packforcing_cli.ahead import Ahead
from packforcing_cli.config import GenerateRequest
from packforcing_cli.errors import MemoryFitError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from packforcing_cli.catalog import ModelFacts
    from packforcing_cli.packages import Download
    from packforcing_cli.planner import Machine, Plan
    from packforcing_cli.prompts import Story
    from packforcing_cli.registry import ModelSource, VideoModel
    from packforcing_cli.rollout import Block, Result
    from packforcing_cli.runfolder import RunFolder
    from packforcing_cli.sampler import Schedule
    from packforcing_cli.source import History


_log = logging.getLogger(__name__)

FILE_SETTINGS = ("codec", "crf", "preset")
"""Of a request: how its file is encoded."""


@dataclass(frozen=True)
class Device:
    """Where a model runs, in which precision, what there is to use, and why."""

    device: str
    dtype: str
    machine: Machine
    why: str
    why_dtype: str


def choose_device(request: GenerateRequest, output_folder: Path) -> Device:
    """Take device and dtype; torch is loaded only where an NVIDIA driver is, or when a GPU is asked for.

    Raises: EnvironmentProblem for a GPU that is not there, or lacks what is
        asked for.
    """
    host = planner.host_machine(output_folder)
    why_dtype = "asked for" if request.dtype != "auto" else "as on every CPU"
    why = "asked for"
    if request.device == "auto":
        why = "there is no NVIDIA driver" if not machine.has_nvidia_driver() else ""
    if request.device == "cpu" or (request.device == "auto" and why):
        _check_cpu(request)
        return Device("cpu", "fp32" if request.dtype == "auto" else request.dtype, host, why, why_dtype)
    from packforcing_cli import attention, registry
    from packforcing_cli.graphs import require_graphs
    from packforcing_cli.quantize import require_support

    device = registry.resolve_device(request.device)
    dtype = registry.dtype_name(registry.resolve_dtype(request.dtype, device))
    require_support(request.quantize, device)
    if device.type == "cpu":
        _check_cpu(request)
        return Device("cpu", dtype, host, "PyTorch sees no GPU", why_dtype)
    if request.attention != "auto":
        attention.choose(request.attention, device=device, dtype=registry.resolve_dtype(dtype, device))
    if request.cuda_graphs:
        require_graphs(device, offload=request.offload)
    import torch

    free = torch.cuda.mem_get_info(device)[0]
    name = f"{torch.cuda.get_device_name(device)} ({device})"
    if request.dtype == "auto":
        why_dtype = "as on every GPU that has it" if dtype == "bf16" else "this GPU has no bf16"
    there = planner.Machine(free, host.disk_free_bytes, name, host.memory_bytes)
    return Device(str(device), dtype, there, why or "the GPU with most free memory", why_dtype)


def _check_cpu(request: GenerateRequest) -> None:
    catalog.check_cpu(request.quantize, request.offload, request.attention, cuda_graphs=request.cuda_graphs)


@dataclass(frozen=True)
class Job:
    """A request with everything decided.

    place:   what `registry.open_model` is given, a name or a folder.
    device:  its name, such as cpu or cuda:0.
    why:     why this model, device and precision, in one line.
    machine: what there was when it was planned.
    image:   [H,W,3] what the video begins with.
    stills:  [H,W,3] pictures of the first blocks.
    history: the video it goes on with.
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
    history: History | None
    downloads: tuple[Download, ...] = ()


def prepare(
    request: GenerateRequest,
    *,
    on: Device | None = None,
    path: Path | None = None,
    blocks: int = 0,
    why: Mapping[str, str] | None = None,
    only_plan: bool = False,
) -> Job:
    """Decide all that is open; the model is decided already.

    torch is loaded only where an NVIDIA driver is, or when a GPU is asked for.
    Args:
        on:   the device where that is decided already.
        path: the output where that is decided and checked already.
        blocks: how many are there already; pictures that are in them are not read again.
        why:  reasons for model, device or precision that are known already.
        only_plan: for a dry run: the model may be missing, and what would be downloaded is listed.
    Raises: PackforcingError of any kind; no weights are read for it.
    """
    fitted: tuple[str, ...] = ()
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
    new, path = path is None, path or output_path(request)
    if request.source is not None and path.exists() and path.samefile(request.source.path):
        raise UsageError(
            f"{path} is the video that the new one goes on with",
            hint="Give another file with -o: both are needed.",
        )
    is_named = request.model.lower() in {known.name for known in catalog.all_models()}
    place = facts.name if is_named or facts.is_random else request.model
    planner.plan(
        request, facts=facts
    )  # a size or memory that is not possible is refused before torch is loaded
    on = on or choose_device(request, path.absolute().parent)
    plan = planner.plan(request.model_copy(update={"dtype": on.dtype}), on.machine, facts=facts)
    if request.auto_fit and plan.change:
        said = (
            f"auto-fit: {plan.suggestion}; as asked about {planner.gb(plan.peak_bytes)} would be needed, and"
            f" {on.machine.device} has {planner.gb(on.machine.memory_bytes)} free"
        )
        request, fitted = request.changed(**plan.change, auto_fit=False), (said,)
        on = replace(on, dtype=plan.change.get("dtype", on.dtype))
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
        from packforcing_cli.reader import read_image

        image = read_image(request.image, plan.size, request.fit)
    stills = _stills(request, plan, blocks)
    reasons = {"model": "asked for", "device": on.why, "precision": on.why_dtype, **(why or {})}
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
        _history(request, plan),
        downloads,
    )


def _downloads(request: GenerateRequest) -> tuple[Download, ...]:
    """Parts of the model, and of the VAE that stands in for a Wan model's own, that are not on this machine."""
    own = () if catalog.of_random(request.model) else tuple(packages.downloads(request.model))
    known = catalog.find(request.model)
    other = None
    if request.vae is not None and known is not None:
        other = catalog.stand_in(known.codec, request.vae)
    return own if other is None else (*own, *packages.downloads(other))


def _stills(request: GenerateRequest, plan: Plan, blocks: int) -> tuple[NDArray[np.uint8], ...]:
    """The pinned pictures, in the size of the video; none if they all are in blocks that are there already.

    As long as one is not, all are needed: they are encoded as one stream.
    Raises: UsageError.
    """
    from packforcing_cli.reader import read_image

    if request.pin_images and request.image is not None:
        raise UsageError("--image and --pin-image both say what block 0 is", hint="Leave one of them away.")
    if len(request.pin_images) >= plan.blocks:
        raise UsageError(
            f"{len(request.pin_images)} pinned pictures take a block each, and the video has {plan.blocks}",
            hint="Make it longer with --seconds.",
        )
    if len(request.pin_images) <= blocks:
        return ()
    return tuple(read_image(path, plan.size, request.fit) for path in request.pin_images)


def _history(request: GenerateRequest, plan: Plan) -> History | None:
    if request.source is None:
        return None
    from packforcing_cli import past

    return past.open_history(request, plan.layout.grid, fps=plan.fps, size=plan.size)


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


def output_path(request: GenerateRequest) -> Path:
    """The given output, checked; or a free name made from the prompt, in the current or the given folder."""
    from packforcing_cli import video

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


def checked_output(given: Path, *, overwrite: bool = False) -> Path:
    """A given output, its ending added where it has none. Raises: UsageError as video.check_output."""
    from packforcing_cli import video

    path = given if given.suffix else given.with_name(given.name + ".mp4")
    video.check_output(path, overwrite=overwrite)
    return path


def recorded(job: Job) -> GenerateRequest:
    """The request as a run folder keeps it: valid wherever it is read again."""
    request = job.request
    changes: dict[str, Any] = {"output": job.path.absolute()}
    if job.place != job.facts.name:
        changes["model"] = str(Path(job.place).expanduser().absolute())
    is_named = request.vae is not None and catalog.stand_in(job.facts.codec, request.vae) is not None
    if request.vae is not None and not is_named and Path(request.vae).is_dir():
        changes["vae"] = str(Path(request.vae).absolute())
    compressor = request.memory.compressor
    if os.sep in compressor or compressor.startswith("~") or Path(compressor).is_dir():
        place = str(Path(compressor).expanduser().absolute())
        changes["memory"] = request.changed(compressor=place).memory
    for name in ("image", "embeddings", "frames"):
        path = getattr(request, name)
        changes |= {} if path is None else {name: path.absolute()}
    if request.source is not None:
        path = request.source.path.absolute()
        changes["source"] = request.source.model_copy(update={"path": path})
    changes["pin_images"] = tuple(path.absolute() for path in request.pin_images)
    if request.loras:
        from packforcing_cli import lora

        places = (lora.parse(text) for text in request.loras)
        changes["loras"] = tuple(f"{path.absolute()}:{strength:g}" for path, strength in places)
    return request.model_copy(update=changes)


def new_run(job: Job, model: VideoModel, folder: Path | None) -> RunFolder | None:
    """The run folder of a new video, in the given place or among the others; None with --no-run."""
    from packforcing_cli import runfolder, sameness

    if not job.request.keep_run:
        return None
    record = sameness.new_record(model, recorded(job), tags=tags_of(job, model))
    return runfolder.RunFolder.create(folder or runfolder.default_root() / record.id, record)


def tags_of(job: Job, model: VideoModel, *, extends: str | None = None) -> dict[str, str]:
    """What the file is to say of itself; nothing with --no-metadata.

    Args:
        extends: the command that made it, where `generate` alone cannot make it again; of a video that goes on with
            a file it is made here.
    """

    from packforcing_cli import sameness

    if not job.request.metadata:
        return {}
    made = sameness.provenance_of(model, job.request, job.plan.layout)
    if job.request.source is not None:
        extends = extends or extend_command(job)
        late = Fraction(job.request.source.shown(job.plan.layout.grid).shift, job.plan.fps)
        told = {"prompt": job.plan.script.prompts[-1], "timeline": job.request.timeline.moved(late).to_json()}
        made = made.model_copy(update={"request": {**made.request, **told}})  # times are those of the file
    return made.model_copy(update={"extends": extends}).tags()


def extend_command(job: Job) -> str:
    """The command that makes the same continuation of a file again."""
    request, source = job.request, job.request.source
    assert source is not None
    grid = job.plan.layout.grid
    new = round((job.plan.blocks - source.blocks) * grid.block_frames(1) / job.plan.fps, 6)
    late = Fraction(source.shown(grid).late, job.plan.fps)
    values = {
        "seconds": f"{new:g}",
        "prompt": job.plan.script.prompts[0],
        "seed": request.seed,
        "model": request.model,
        "size": "x".join(str(side) for side in job.plan.size),
        "fit": request.fit,
        "from-time": source.from_time,
        "to-time": source.to_time,
    }
    usual = {name: GenerateRequest.model_fields[name].default for name in FILE_SETTINGS}
    values |= {name: getattr(request, name) for name in usual if getattr(request, name) != usual[name]}
    words = [
        word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))
    ]
    words += ["--only-new"] if source.only_new else []
    words += [] if request.metadata else ["--no-metadata"]
    words += [] if request.keep_run else ["--no-run"]
    words += [*request.timeline.moved(late).arguments(), "-o", str(job.path)]
    return shlex.join(["packforcing", "extend", str(source.path), *words])


def kept_part(job: Job) -> str:
    """One sentence about the part file of a run that ended early; empty if there is none."""
    from packforcing_cli import video

    part = video.part_path(job.path)
    return f"What was made so far plays: {part}" if part.exists() and part.stat().st_size else ""


def is_out_of_memory(error: Exception) -> bool:
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        said in str(error) for said in ("can't allocate memory", "not enough memory", "out of memory")
    )


def memory_ran_out(job: Job, kept: str) -> MemoryFitError:
    """The error of a job whose device ran out of memory, naming what would fit.

    Args:
        kept: sentences about what was kept and how to go on.
    """
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


# -- the run ----------------------------------------------------------------------------------------------------


def open_source(job: Job) -> ModelSource:
    """The model of a job, its files verified and its parts not loaded yet."""
    from packforcing_cli import registry

    request = job.request
    return registry.open_model(
        job.place,
        device=job.device,
        dtype=request.dtype,
        vae=request.vae,
        quantize=request.quantize,
        quantize_skip=config.parse_layers(request.quantize_skip),
        quantize_text=request.quantize_text,
        offload=request.offload,
        compressor=request.memory.compressor,
        loras=request.loras,
        attention=request.attention,
        compile_layers=request.compile,
        cuda_graphs=request.cuda_graphs,
        vae_latents=request.vae_latents,
    )


def schedule_of(job: Job, model: VideoModel | ModelSource) -> Schedule:
    """The package's schedule with the request's steps and guidance."""

    from packforcing_cli import resolve

    return resolve.schedule_for(model, steps=job.request.steps, guidance=job.request.guidance)


def encode(job: Job, model: VideoModel | ModelSource) -> Story:
    """The prompts of a job, encoded. With a `ModelSource` the text encoder is gone afterwards.

    Raises: as `prompts.encode_script` and `embeddings.read`.
    """
    from packforcing_cli import embeddings, prompts

    given = None if job.request.embeddings is None else embeddings.read(job.request.embeddings)
    guided = schedule_of(job, model).guidance != 1.0
    return prompts.encode_script(model, job.plan.script, guided=guided, given=given)


class Loading:
    """The prompts of a job encoded, and its model loaded meanwhile, as far as the plan has room for both.

    Use it as a context, take the story, then the model. Left by an error or by Ctrl-C, the loading ends, too. The
    numbers are those of one after the other, which is also what is done where memory runs out all the same.
    """

    def __init__(self, job: Job, source: ModelSource, *, how: str | None = None) -> None:
        """how: as `Plan.loading`; None = as planned."""
        self._job, self._source = job, source
        self._how = job.plan.loading if how is None else how
        self._ahead: Ahead[VideoModel | None] | None = None

    def __enter__(self) -> Self:
        if self._how != "after":
            self._ahead = Ahead(self._begin, name="load model")
        return self

    def __exit__(self, *_: object) -> None:
        self._give_up()

    def _begin(self, check: Callable[[], None]) -> VideoModel | None:
        if self._how == "read":
            self._source.read_ahead(check)
            return None
        import torch

        if self._source.device.type == "cuda":
            torch.cuda.set_device(self._source.device)  # each thread has its own current one
        return self._source.load(check=check)

    def _give_up(self) -> None:
        if self._ahead is not None:
            self._ahead.give_up()
            self._ahead = None

    def story(self) -> Story:
        """The encoded prompts; the text encoder is gone. Raises: as `encode`."""
        try:
            return encode(self._job, self._source)
        except Exception as error:
            if self._ahead is None or not is_out_of_memory(error):
                raise
        _log.warning(
            "memory ran out with the model beside the text encoder; they are loaded one after the other"
        )
        self._give_up()
        _free_memory(self._source)
        return encode(self._job, self._source)

    def model(self) -> VideoModel:
        """The loaded model. Raises: as `registry.open_model(…).load`."""
        made: VideoModel | None = None
        try:
            if self._ahead is not None and self._how == "beside":
                made = (
                    self._ahead.result()
                )  # files read ahead are worth no waiting: loading goes on from there
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            _log.warning("memory ran out with the model beside the text encoder; the model is loaded again")
        finally:
            self._give_up()
        if self._how != "after":
            _free_memory(self._source)
        return made or self._source.load()


def _free_memory(source: ModelSource) -> None:
    """Give what was freed back to the device, for whoever asks next."""
    if source.device.type == "cuda":
        gc.collect()
        import torch

        torch.cuda.empty_cache()


def make(
    job: Job,
    model: VideoModel,
    story: Story,
    *,
    run: RunFolder | None,
    output: BinaryIO | None = None,
    on_block: Callable[[Block, float], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Result:
    """Generate the video of a job into its file, or go on with it where its run folder has blocks.

    Args:
        story:  of `encode`.
        run:    of `new_run`, or one that goes on; the caller closes it.
        output: a stream that gets the video instead of the job's file.
        on_block, should_stop: as `rollout.generate`.
    Raises: as `rollout.generate`.
    """
    from packforcing_cli import past, rollout
    from packforcing_cli.video import FrameFolder

    request = job.request
    return rollout.generate(
        model,
        story,
        output or job.path,
        seconds=request.seconds,
        seed=request.seed,
        size=job.plan.size,
        schedule=schedule_of(job, model),
        memory=request.memory.model_copy(update={"bank_device": job.plan.bank_device}),
        first_latent=None if job.image is None else past.encode_image(model, job.image),
        stills=job.stills,
        history=job.history,
        codec=request.codec,
        crf=request.crf,
        preset=request.preset,
        metadata=tags_of(job, model) if run is None else run.record.tags,
        overwrite=request.overwrite,
        run=run,
        snapshot_every=request.snapshot_every,
        frames=None if request.frames is None else FrameFolder(request.frames),
        guard=request.guard,
        overlap={"auto": None, "on": True, "off": False}[request.overlap],
        on_block=on_block,
        should_stop=should_stop,
    )
