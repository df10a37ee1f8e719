"""packforcing train RECIPE: run a recipe, or go on with it where it was stopped.

With several processes (torchrun) every one of them runs this command; the first one talks.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from packforcing_cli.cli.train_progress import Lines
    from packforcing_cli.training.data import EncodedData
    from packforcing_cli.training.recipe_kinds import CompressorDistill, Finetune
    from packforcing_cli.training.recipes import AnyRecipe

MAX_UNSEEN = 0.1  # share of the data that a recipe may leave unused
SHARED_KINDS = ("finetune", "finetune-lora", "self-forcing")


def train(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a TOML file.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder of the run. Default: runs/RECIPE."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a value of the recipe, for example train.steps=100."
        ),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(
            "--vae", metavar="DIR", help="Run folder of the trained VAE, for recipes that need one."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="DIR",
            help="Clips to finetune on, or what packforcing data encode made of them.",
        ),
    ] = None,
    fsdp: Annotated[
        bool,
        typer.Option(
            "--fsdp",
            help="Share the weights out among the processes of torchrun (FSDP2) instead of copying them.",
        ),
    ] = False,
    quantize_frozen: Annotated[
        str | None,
        typer.Option(
            "--quantize-frozen",
            metavar="MODE",
            help="Keep weights of what is not trained in 8 bits: none, int8 or fp8. Default none.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Only go on with a run: refuse to start a new one.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Accept an inference that leaves the context of training, data that a recipe cannot use whole, and"
            " a run that was begun with another recipe or other data.",
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but errors.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Say more; show tracebacks.")] = False,
) -> None:
    """Train a model by a recipe. Prints the folder of the result.

    Example: packforcing train finetune --data CLIPS. The demo from nothing: packforcing train demo-vae, then
    packforcing train demo-flow --vae runs/demo-vae

    A folder that has checkpoints is continued. Ctrl-C saves a checkpoint first; twice stops at once. A recipe whose
    result would be run in a context that it is not trained in is refused, and so is going on with another recipe.
    """
    from packforcing_cli.cli import console, train_progress
    from packforcing_cli.errors import MemoryFitError, PackforcingError, UsageError
    from packforcing_cli.training import loop, recipes

    is_first = os.environ.get("RANK", "0") == "0"
    try:
        changed = list(settings or [])
        chosen = recipes.load(recipe, changed)
        for option, key, value in (("--vae", "vae", vae), ("--data", "data.folder", data)):
            if value is None:
                continue
            if not _takes(chosen, key):
                what = "other VAE" if key == "vae" else "clips"
                raise UsageError(
                    f"{option} {value}: a {chosen.kind} recipe uses no {what}", hint=f"Leave {option} away."
                )
            changed.append(f"{key}={json.dumps(str(value))}")
        if quantize_frozen is not None:
            _require_frozen(chosen, quantize_frozen)
            changed += [f"quantize_frozen={quantize_frozen}"] * _takes(chosen, "quantize_frozen")
        chosen = recipes.load(recipe, changed)
        folder = out or Path("runs") / recipes.find(recipe).stem
        if fsdp:
            _require_sharing(chosen)
            if getattr(chosen, "quantize_frozen", "none") != "none":
                raise UsageError(
                    "--fsdp shares weights out, and --quantize-frozen makes those that are frozen small; not both",
                    hint="Leave one of them away.",
                )
        if resume and not loop.checkpoints_of(folder / "checkpoints"):
            raise UsageError(
                f"there is no run to go on with in {folder}", hint="Check --out, or leave --resume away."
            )
        _require_sources(chosen)
        _make_folder(folder)
        again = _command(recipe, folder, settings or [], vae, data, quantize_frozen, fsdp=fsdp, force=force)
        talk = train_progress.choose(chosen.train.steps, silent=quiet or not is_first)
        code, figures = _run(chosen, folder, talk, again, fsdp=fsdp, force=force, verbose=verbose)
    except PackforcingError as error:
        if is_first:
            raise
        if not isinstance(error, UsageError | MemoryFitError):  # those are the same in every process
            console.warn(f"process {os.environ.get('RANK')}: {error}")
        raise typer.Exit(error.exit_code) from error
    if code:
        raise typer.Exit(code)
    if is_first:
        _report(chosen, folder, talk, figures)


def _require_sharing(recipe: AnyRecipe) -> None:
    """Raises: UsageError for a recipe whose weights cannot be shared out, and for one process."""
    from packforcing_cli.errors import UsageError

    if recipe.kind not in SHARED_KINDS:
        raise UsageError(
            f"--fsdp: the weights of a {recipe.kind} recipe are not shared out",
            hint=f"It is for {', '.join(SHARED_KINDS)}; leave it away.",
        )
    if os.environ.get("WORLD_SIZE", "1") == "1":
        raise UsageError(
            "--fsdp shares the weights out among processes, and there is one",
            hint="Start it with torchrun --nproc-per-node N -m packforcing_cli train …, or leave it away.",
        )


def _takes(recipe: AnyRecipe, key: str) -> bool:
    """Whether a recipe has a key such as data.folder."""
    model: Any = type(recipe)
    for part in key.split("."):
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return False
        model = field.annotation
    return True


def _require_frozen(recipe: AnyRecipe, mode: str) -> None:
    """Raises: UsageError for an unknown mode, or a recipe that trains all it loads."""
    from packforcing_cli.config import FROZEN_QUANTIZATIONS
    from packforcing_cli.errors import UsageError

    if mode not in FROZEN_QUANTIZATIONS:
        raise UsageError(
            f"--quantize-frozen {mode}: unknown", hint=f"Use one of {', '.join(FROZEN_QUANTIZATIONS)}."
        )
    if mode == "none":
        return
    if not _takes(recipe, "quantize_frozen") or getattr(recipe, "trains_all", False):
        raise UsageError(
            f"--quantize-frozen {mode}: a {recipe.kind} recipe trains every weight, nothing is frozen",
            hint="Leave it away, or use a recipe with a teacher, adapters, or compressor-distill.",
        )


def _require_sources(recipe: AnyRecipe) -> None:
    """Raises: UsageError if a recipe lacks the clips or the teacher it trains with; before anything is made."""
    from packforcing_cli.errors import UsageError
    from packforcing_cli.training.recipe_kinds import CompressorDistill, Finetune
    from packforcing_cli.training.recipes import DemoDistill

    if isinstance(recipe, DemoDistill):
        from packforcing_cli.training import demo_distill

        demo_distill.teacher_of(recipe)
    if not isinstance(recipe, Finetune | CompressorDistill):
        return
    if recipe.data.folder:
        from packforcing_cli.training import data  # needs PyAV, which the demo's recipes do without

        given = Path(recipe.data.folder)
        if not data.EncodedData.is_one(given):
            data.find_clips(given)
    elif isinstance(recipe, Finetune):
        raise UsageError(
            "there are no clips to train on", hint="Give a folder: packforcing train … --data CLIPS"
        )


def _make_folder(folder: Path) -> None:
    """Raises: UsageError if there is no writing into the folder."""
    from packforcing_cli.errors import UsageError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise UsageError(
            f"cannot make the folder {folder}: {error.strerror}", hint="Choose another with --out."
        ) from error
    if not writable:
        raise UsageError(f"the folder {folder} is not writable", hint="Choose another with --out.")


def _command(
    recipe: str,
    folder: Path,
    settings: list[str],
    vae: str | None,
    data: Path | None,
    quantize_frozen: str | None,
    *,
    fsdp: bool,
    force: bool,
) -> str:
    """The command that goes on with this run, as it was started."""
    words = ["packforcing", "train", recipe, "--out", str(folder)]
    for setting in settings:
        words += ["--set", setting]
    if vae is not None:
        words += ["--vae", vae]
    if data is not None:
        words += ["--data", str(data)]
    words += [] if quantize_frozen is None else ["--quantize-frozen", quantize_frozen]
    words += ["--fsdp"] if fsdp else []
    words += ["--force"] if force else []
    count, here = os.environ.get("WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE")
    if count != "1":
        start = ["torchrun", "--nproc-per-node", here or count]
        if here and here != count:
            start += ["--nnodes", str(int(count) // int(here))]
            start += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{os.environ.get('MASTER_ADDR')}:29500"]
        words[:1] = [*start, "-m", "packforcing_cli"]
    return shlex.join(words)


def _introduce(recipe: AnyRecipe, folder: Path, talk: Lines, *, verbose: bool) -> None:
    import torch

    from packforcing_cli.training import loop

    steps = recipe.train.steps
    # The newest may be cut short by a crash; the trainer says at which step it really goes on.
    found = loop.checkpoints_of(folder / "checkpoints")
    what = {
        "demo-vae": "the demo's autoencoder",
        "demo-flow": "the demo's transformer and compressor",
        "demo-distill": "the demo as a few-step student",
        "finetune": f"{getattr(recipe, 'model', '')} on clips",
        "finetune-lora": f"adapters of {getattr(recipe, 'model', '')} on clips",
        "compressor-distill": f"the compressor of {getattr(recipe, 'model', '')}, its transformer frozen",
        "self-forcing": "a few-step student and its compressor",
    }
    where = "the GPU" if torch.cuda.is_available() else "the CPU"
    threads = recipe.train.threads or torch.get_num_threads()
    count = int(os.environ.get("WORLD_SIZE", "1"))
    processes = f" in {count} processes" if count > 1 else ""
    start = "Continuing" if found else "Starting"
    talk.say(f"{start} {recipe.kind} in {folder}: {what[recipe.kind]}, {steps} steps on {where}{processes}")
    talk.say(f"log: {folder / 'metrics.jsonl'}, a checkpoint every {recipe.train.checkpoint_minutes:g} min")
    if verbose:
        talk.say(f"{threads} CPU threads, torch {torch.__version__}")
        talk.say(recipe.model_dump_json())


class _Stop:
    """The first Ctrl-C or SIGTERM asks to stop after what is in hand, and says so; the next one stops at once.

    Under torchrun one Ctrl-C arrives twice (from the terminal and from torchrun), so only the first one counts there.
    what: is in hand.
    """

    def __init__(self, talk: Lines) -> None:
        self.code, self.what, self._talk = 0, "step", talk

    def asked(self) -> bool:
        """Whether to stop."""
        return self.code != 0

    def __enter__(self) -> _Stop:
        self._before = {s: signal.signal(s, self._caught) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, _frame: FrameType | None) -> None:
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        if self.code and alone:
            raise KeyboardInterrupt
        if not self.code:
            self.code = 128 + number
            at_once = "; Ctrl-C again stops at once" if alone else ""
            self._talk.stopping(f"Stopping after this {self.what}{at_once} …")


def _run(
    recipe: AnyRecipe, folder: Path, talk: Lines, again: str, *, fsdp: bool, force: bool, verbose: bool
) -> tuple[int, dict[str, Any]]:
    """Train. Returns: 0, or the exit code of a run that was stopped; and its figures. Raises: PackforcingError."""
    from packforcing_cli import durable
    from packforcing_cli.errors import DiskFullError, PackforcingError
    from packforcing_cli.training import loop

    is_first = os.environ.get("RANK", "0") == "0"
    with talk, _Stop(talk) as stop:
        try:
            with loop.locked(folder) if is_first else contextlib.nullcontext():
                _introduce(recipe, folder, talk, verbose=verbose)
                clips = _prepare(recipe, folder, talk, stop, fsdp=fsdp, force=force)
                stop.what = "step"
                figures = _train(recipe, folder, talk, stop, clips, fsdp=fsdp, force=force)
        except loop.Stopped:
            talk.say(f"Stopped before the first step; what is done is kept. To go on: {again}")
            return stop.code or 130, {}
        except KeyboardInterrupt:
            talk.stop()
            talk.say(f"Stopped at once; the steps since the newest checkpoint are lost. To go on: {again}")
            return stop.code or 130, {}
        except Exception as error:
            if durable.is_full_disk(error):
                raise DiskFullError(
                    f"the disk is full: {folder} could not be written",
                    hint=f"Free some space, then go on: {again}",
                ) from error
            if _is_lost_partner(error):
                raise PackforcingError(
                    "another process of this training ended",
                    hint=f"What it said is above. To go on from the newest checkpoint: {again}",
                ) from error
            raise
    talk.stop()
    if figures["steps"] < recipe.train.steps:
        talk.say(f"Stopped at step {figures['steps']}, a checkpoint is saved. To go on: {again}")
        return stop.code or 130, figures
    return 0, figures


def _is_lost_partner(error: Exception) -> bool:
    """Whether torch.distributed failed because another process is gone; it has no error of its own for that."""
    import torch

    if isinstance(error, torch.distributed.DistBackendError | torch.distributed.DistNetworkError):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and any(
        f"onnection {what} by peer" in said for what in ("closed", "reset")
    )


def _prepare(
    recipe: AnyRecipe, folder: Path, talk: Lines, stop: _Stop, *, fsdp: bool, force: bool
) -> EncodedData | None:
    """Say what the training takes, refuse what cannot go well, and encode or make clips where it is to have any.

    Raises: UsageError if inference would leave the trained context, or most of the data could not be used;
        MemoryFitError; what reading clips raises.
    """
    from packforcing_cli.training.loop import Workers
    from packforcing_cli.training.recipe_kinds import CompressorDistill, Finetune

    workers = Workers.start()
    device, processes = workers.device, workers.count if fsdp else 1
    if isinstance(recipe, CompressorDistill) and not recipe.data.folder:
        _check(
            recipe, device, None, talk, processes=processes, force=force
        )  # before videos are made: that takes long
        return _rollouts(recipe, folder, talk, stop, device)
    clips, blocks, met = None, None, ""
    if isinstance(recipe, Finetune | CompressorDistill):
        clips = _clips(recipe, folder, talk, stop, device)
        blocks = max((scene.blocks for scene in clips.scenes), default=None)
        if isinstance(recipe, Finetune):
            blocks, met = _use(recipe, clips, talk, force=force)
    _check(recipe, device, blocks, talk, met, processes=processes, force=force)
    return clips


def _check(
    recipe: AnyRecipe,
    device: torch.device,
    blocks: int | None,
    talk: Lines,
    met: str = "",
    *,
    processes: int,
    force: bool,
) -> None:
    """Say what the training takes, and how many mids it meets. Raises: as `_prepare`."""
    from packforcing_cli.training.estimate import estimate, would_fit

    found = estimate(recipe, device, scene_blocks=blocks, processes=processes)
    for line in [*found.lines(), *filter(None, [met])]:
        talk.say(line)
    if not force:
        found.require_match()
    for mismatch in found.mismatches:
        talk.say(f"warning: inference leaves what is trained: {mismatch}")
    found.require_fit(
        would_fit(recipe, device, scene_blocks=blocks, processes=processes) if found.is_too_large else ()
    )


def _rollouts(
    recipe: CompressorDistill, folder: Path, talk: Lines, stop: _Stop, device: torch.device
) -> EncodedData:
    """The model's own videos, those made now that are not there yet; the processes share them."""
    from packforcing_cli import registry
    from packforcing_cli.training import frozen, rollout_data
    from packforcing_cli.training.estimate import precision
    from packforcing_cli.training.loop import Workers
    from packforcing_cli.training.self_forcing import read_prompts

    settings = recipe.data
    prompts = read_prompts(settings.prompts)
    mode = frozen.MODES.get(recipe.quantize_frozen, "none")
    source = registry.open_model(
        recipe.model,
        device=device,
        dtype=precision(recipe, device),
        quantize=mode,
        quantize_text="none" if mode == "none" else "int8",
    )

    def made(done: int, total: int, prompt: str) -> None:
        talk.say(f"video {done}/{total}: {prompt}")

    talk.say(
        f"{settings.rollouts} videos of the model's own, {settings.rollout_blocks} blocks each, are made in"
        f" {folder / 'data'}, those that are not there yet …"
    )
    stop.what = "block"
    return rollout_data.make(
        folder / "data",
        source,
        prompts,
        count=settings.rollouts,
        blocks=settings.rollout_blocks,
        seed=settings.rollout_seed,
        workers=Workers.start(),
        quantize=recipe.quantize_frozen,
        on_video=made,
        should_stop=stop.asked,
    )


def _use(recipe: Finetune, clips: EncodedData, talk: Lines, *, force: bool) -> tuple[int, str]:
    """What a recipe makes of its data. Returns: blocks of the longest scene it trains on; a line on its mids.

    Raises: UsageError if the recipe says otherwise than the data was encoded, or leaves much of it unused.
    """
    from packforcing_cli import packages, weights
    from packforcing_cli.errors import UsageError
    from packforcing_cli.training import clip_run, estimate
    from packforcing_cli.transformer import TransformerConfig

    settings, shape = recipe.data, estimate.shape_of(recipe.data)
    split = clip_run.Split.of(clips, shape, settings.held_out)
    place = packages.find_package(recipe.model)
    manifest = packages.read_manifest(place)
    config = weights.read_config(packages.part_folder(place, manifest, "transformer"))
    grid = estimate.grid_of(manifest, TransformerConfig.from_dict(config))
    lengths = [scene.blocks for scene in split.trained]
    longest, unseen = max(lengths), clip_run.unseen_share(split, settings)
    limit = grid.blocks_for(settings.scene_seconds, manifest.fps)
    said, hint = "", ""
    if unseen > 0:
        said = (
            f"{unseen:.0%} of the data would never be trained on: {shape.name} items take the first"
            f" {shape.blocks} blocks of a scene, and scenes have up to {longest}"
        )
        seconds = grid.frames_for(shape.blocks) / manifest.fps
        hint = f"Encode the clips anew with --scene-seconds {seconds:.2g}, or train finetune-long"
    elif longest > limit:
        length = grid.frames_for(longest) / manifest.fps
        said = f"scenes have up to {longest} blocks, and data.scene_seconds is {settings.scene_seconds:g}"
        hint = f"Set data.scene_seconds={length:.3g}, or encode the clips anew with that length"
    if said and not force and (not unseen or unseen > MAX_UNSEEN):
        raise UsageError(f"{clips.folder}: {said}", hint=f"{hint}; --force trains all the same.")
    if said:
        talk.say(f"warning: {said}")
    most = estimate.preset_of(recipe, manifest).top_k
    met = shape.mids_met(grid, lengths)
    share = sum(n >= most for n in met) / len(met)
    return longest, (
        f"mids         {most}, as many as inference recalls, in {share:.0%} of the items;"
        f" {sum(met) / len(met):.1f} in the mean"
    )


def _clips(
    recipe: Finetune | CompressorDistill, folder: Path, talk: Lines, stop: _Stop, device: torch.device
) -> EncodedData:
    """The encoded data a recipe names, encoded now if it is a folder of clips; by the first process alone.

    Raises: loop.Stopped in every process when the first one is asked to stop.
    """
    from packforcing_cli import packages, registry
    from packforcing_cli.errors import PackforcingError
    from packforcing_cli.training import data
    from packforcing_cli.training.loop import Stopped, Workers

    settings = recipe.data
    given = Path(settings.folder)
    if data.EncodedData.is_one(given):
        found = data.EncodedData.open(given)
        _require_settings(recipe, found)
        return found
    place = packages.find_package(recipe.model)
    wanted = data.Wanted.by(
        packages.read_manifest(place),
        place,
        scene_seconds=settings.scene_seconds,
        enlarge=settings.enlarge,
        max_bad=settings.max_bad,
    )
    workers, failure = Workers.start(), None
    if workers.rank == 0:

        def told(done: int, total: int, finding: data.Finding, had: bool) -> None:
            if finding.state != "used":
                talk.say(f"warning: {finding.name}: {finding.state}, {finding.message}")

        stop.what = "clip"
        talk.say(f"encoding the clips of {given} into {folder / 'data'}, what is not there yet …")
        try:
            small = "none" if recipe.quantize_frozen == "none" else "int8"
            source = registry.open_model(recipe.model, device=device, quantize_text=small)
            data.encode(given, folder / "data", source, wanted, on_clip=told, should_stop=stop.asked)
        except (PackforcingError, Stopped) as error:
            failure = error
    failed = workers.any_wants(failure is not None)  # the others wait here
    if failure is not None:
        raise failure
    if failed:
        raise Stopped
    found = data.EncodedData.open(folder / "data")
    talk.say(f"data: {len(found.scenes)} scenes of {len({scene.clip for scene in found.scenes})} clips")
    return found


def _require_settings(recipe: Finetune | CompressorDistill, found: EncodedData) -> None:
    """Raises: UsageError if a recipe asks for what only encoding could do, and encoded data is otherwise."""
    from packforcing_cli.errors import UsageError
    from packforcing_cli.training import data

    settings = recipe.data
    then = bool(found.settings.get("enlarge"))
    if "enlarge" in settings.model_fields_set and settings.enlarge != then:
        raise UsageError(
            f"data.enlarge is {str(settings.enlarge).lower()}, and {found.folder} was encoded with {str(then).lower()}",
            hint="Leave it away, or encode the clips anew.",
        )
    bad, total = (sum(found.counts.get(state, 0) for state in states) for states in (data.BAD, data.STATES))
    if "max_bad" in settings.model_fields_set and bad > settings.max_bad * total:
        raise UsageError(
            f"{bad} of the {total} clips of {found.folder} were bad, data.max_bad allows {settings.max_bad:.0%}",
            hint="Mend those clips and encode them anew, or allow more.",
        )


def _train(
    recipe: AnyRecipe,
    folder: Path,
    talk: Lines,
    stop: _Stop,
    clips: EncodedData | None,
    *,
    fsdp: bool,
    force: bool,
) -> dict[str, Any]:
    from packforcing_cli.training.recipe_kinds import CompressorDistill, Finetune
    from packforcing_cli.training.recipes import DemoDistill

    def told(record: dict[str, Any]) -> None:
        pool = record.get("event") == "pool"
        stop.what = "handful of scenes" if pool else "step" if "event" in record else stop.what
        talk(record)

    if recipe.kind == "demo-vae":
        from packforcing_cli.training import demo_vae

        return demo_vae.train(recipe, folder, accept=force, on_log=told, should_stop=stop.asked)
    if isinstance(recipe, Finetune):
        from packforcing_cli.training import finetune

        assert clips is not None
        return finetune.train(
            recipe, folder, clips, share=fsdp, accept=force, on_log=told, should_stop=stop.asked
        )
    if isinstance(recipe, CompressorDistill):
        from packforcing_cli.training import compressor_distill

        assert clips is not None
        return compressor_distill.train(
            recipe, folder, clips, accept=force, on_log=told, should_stop=stop.asked
        )
    if recipe.kind == "self-forcing":
        from packforcing_cli.training import self_forcing

        return self_forcing.train(
            recipe, folder, share=fsdp, accept=force, on_log=told, should_stop=stop.asked
        )
    if isinstance(recipe, DemoDistill):
        from packforcing_cli.training import demo_distill

        return demo_distill.train(recipe, folder, accept=force, on_log=told, should_stop=stop.asked)
    from packforcing_cli.training import demo_flow

    return demo_flow.train(recipe, folder, accept=force, on_log=told, should_stop=stop.asked)


def _report(recipe: AnyRecipe, folder: Path, talk: Lines, figures: dict[str, Any]) -> None:
    """What was made: the path on stdout, what to do with it on stderr."""
    from packforcing_cli.cli import console
    from packforcing_cli.training.recipe_kinds import CompressorDistill, Finetune, FinetuneLora

    if recipe.kind == "demo-vae":
        result = folder / "vae"
        talk.say(f"Done. Next: packforcing train demo-flow --vae {shlex.quote(str(folder))}")
    else:
        result = folder / "package"
        for pair in figures.get("pairs", ()):
            talk.say(f"before (left) and after (right): {pair}")
        samples = getattr(recipe, "samples", None)
        if samples is not None and samples.every:
            talk.say(f"samples on the way: {folder / 'samples'}")
        if isinstance(recipe, Finetune | CompressorDistill):
            talk.say(f"curve: {folder / 'curve.png'}")
        if isinstance(recipe, FinetuneLora):
            talk.say(
                f"the adapters alone: packforcing generate … --lora {shlex.quote(str(folder / 'lora'))}"
                " (of a few-step student only the package says in how many steps it is sampled now)"
            )
        if recipe.kind == "compressor-distill":
            alone = shlex.quote(str(result / "compressor"))
            talk.say(f"the compressor alone: packforcing generate … --compressor {alone}")
        talk.say(
            'Done. Try it: packforcing generate "a red circle moving right on a blue background"'
            f" --model {shlex.quote(str(result))}"
        )
    console.result(str(result))
