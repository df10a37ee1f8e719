"""The parts every training shares: checkpoints, the moving average, schedules, the log, several processes.

Knows no model and no data. A checkpoint is one safetensors file written atomically (temporary file, fsync, rename),
or a folder of them where the weights are shared out among processes (`shards`); the last two are kept; a kill at any
moment costs at most the steps since the newest one. Every random draw of a step comes from a generator made of (seed,
step, rank), so a resumed run sees the batches and noise of an unbroken one. With a checkpoint go the facts its losses
came of; a run with others goes on from it only if it is told to, and what changed is kept with all that follows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from packforcing_cli import durable
from packforcing_cli.errors import LockedError, UsageError, WeightsError
from packforcing_cli.training import shards
from packforcing_cli.training.recipes import Train

try:  # Windows has none
    import fcntl
except ImportError:  # pragma: no cover
    fcntl = None  # type: ignore[assignment]

LOG_EVERY = 10  # steps
LOCK = ".lock"
CHANGES = "changes"  # among a checkpoint's facts: what was changed on the way
FREE = frozenset({"steps", "checkpoint_minutes", "evaluate_every", "threads"})
"""Of a recipe's [train]: what a resumed run may have otherwise. With other steps the learning rate decays otherwise."""
SHOWN_DIFFERENCES = 8
PATIENCE = timedelta(
    hours=6
)  # of processes that wait while the first one evaluates, makes samples or encodes clips
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Workers:
    """Processes that train together (started by torchrun); gradients are averaged over them."""

    rank: int = 0
    count: int = 1
    device: torch.device = CPU

    @classmethod
    def start(cls) -> Workers:
        """Join the group torchrun announced through WORLD_SIZE, or be alone; takes this process's GPU if any."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        if count == 1:
            return cls(device=device)
        if not dist.is_initialized():
            dist.init_process_group("gloo" if device.type == "cpu" else "nccl", timeout=PATIENCE)
        return cls(dist.get_rank(), count, device)

    def stop(self) -> None:
        """Leave the group."""
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def any_wants(self, wish: bool) -> bool:
        """Whether any process wishes it. All of them must ask, and all of them get the same answer."""
        if self.count == 1:
            return wish
        flag = torch.tensor(float(wish), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def mean(self, value: float) -> float:
        """The mean of a number over the processes; all of them must ask."""
        if self.count == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total) / self.count

    def gather(self, text: str) -> list[str]:
        """What every process says, in order; all of them must say something."""
        if self.count == 1:
            return [text]
        said: list[str] = [""] * self.count
        dist.all_gather_object(said, text)
        return said

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes; a missing gradient counts as zero.

        Those of weights that are shared out are means already.
        """
        parameters = [p for p in parameters if p.requires_grad]
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.count == 1 or any(shards.is_shared(p) for p in parameters):
            return
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        dist.all_reduce(flat)
        flat /= self.count
        offset = 0
        for p in parameters:
            assert p.grad is not None
            p.grad.copy_(flat[offset : offset + p.numel()].view_as(p))
            offset += p.numel()


def step_generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """CPU generator of one training step; a function of (seed, step, rank) alone."""
    digest = hashlib.sha256(f"packforcing train {seed} {step} {rank}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))


def learning_rate_factor(step: int, steps: int, *, warmup: int, decay_fraction: float, floor: float) -> float:
    """Linear warm-up, constant, then linear decay to `floor` over the last `decay_fraction` of the steps."""
    if step < warmup:
        return (step + 1) / warmup
    start = steps * (1 - decay_fraction)
    if step <= start or decay_fraction == 0:
        return 1.0
    return floor + (1 - floor) * max(0.0, (steps - step) / (steps - start))


class MovingAverage:
    """Exponential moving average of parameters, with a start-up correction so early averages are not the init."""

    def __init__(self, modules: Mapping[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self.values = {
            f"{name}/{key}": value.detach().clone()
            for name, module in modules.items()
            for key, value in module.state_dict().items()
        }

    @torch.no_grad()
    def update(self, modules: Mapping[str, nn.Module], step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, module in modules.items():
            for key, value in module.state_dict().items():
                average = shards.own_part(self.values[f"{name}/{key}"])
                average.lerp_(shards.own_part(value.detach()), 1 - decay)

    def state_of(self, name: str) -> dict[str, Tensor]:
        """Averaged state dict of one module."""
        return {
            key.removeprefix(f"{name}/"): v for key, v in self.values.items() if key.startswith(f"{name}/")
        }


@dataclass
class TrainingState:
    """Everything a checkpoint holds.

    changed: facts that differ from those of the checkpoint it was read from: name -> [then, now].
    changes: all that were changed on the way, the oldest first: {"step": N, "facts": {name: [then, now]}}.
    """

    modules: Mapping[str, nn.Module]
    average: MovingAverage
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    changed: dict[str, list[Any]] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_shared(self) -> bool:
        """Whether the weights are shared out among the processes, so that all of them must save and load."""
        return any(shards.is_shared(p) for module in self.modules.values() for p in module.parameters())

    def tensors(self) -> dict[str, Tensor]:
        """All of it but the step, by name."""
        found: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            found |= {f"module/{name}/{key}": value for key, value in module.state_dict().items()}
        found |= {f"average/{key}": value for key, value in self.average.values.items()}
        for i, optimizer in enumerate(self.optimizers):
            for index, values in optimizer.state_dict()["state"].items():
                for key, value in values.items():
                    found[f"optimizer/{i}/{index}/{key}"] = torch.as_tensor(value)
        return found

    def parameter(self, optimizer: int, index: int) -> nn.Parameter:
        """The weight that an optimiser counts as number `index`."""
        known = [p for group in self.optimizers[optimizer].param_groups for p in group["params"]]
        found: nn.Parameter = known[index]
        return found


def checkpoints_of(folder: Path) -> list[Path]:
    """Checkpoints of a run, files and folders, the oldest first; whether they can be read is not looked at."""
    found = [path for path in folder.glob("step-*") if path.suffix in ("", ".safetensors")]
    return sorted(found, key=lambda path: step_of(path))


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-").removesuffix(".safetensors"))


def save_checkpoint(folder: Path, state: TrainingState, facts: Mapping[str, Any]) -> Path:
    """Write `folder/step-NNNNNNN.safetensors` atomically and keep the newest two.

    Where weights are shared out, all processes write a folder `step-NNNNNNN` together; otherwise one alone may ask.
    """
    tensors = state.tensors()
    facts = dict(facts) | ({CHANGES: state.changes} if state.changes else {})
    if state.is_shared:
        path = folder / f"step-{state.step:07d}"
        shards.save(path, tensors, state.step, facts)
        is_first = dist.get_rank() == 0
    else:
        path, is_first = folder / f"step-{state.step:07d}.safetensors", True
        folder.mkdir(parents=True, exist_ok=True)
        with durable.replacing(path) as part:
            save_file(
                {
                    k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()
                },  # copies: tied weights are kept twice
                part,
                {"step": str(state.step), "facts": json.dumps(facts)},
            )
    if is_first:
        for old in checkpoints_of(folder)[:-2]:
            if old.is_dir():
                shards.remove(old)
            else:
                old.unlink()
    return path


def facts_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a checkpoint: all of a recipe's values by name (train.seed), but for those in `FREE`."""
    flat: dict[str, Any] = {}
    for name, value in recipe.items():
        if isinstance(value, Mapping):
            free = FREE if name == "train" else frozenset()
            flat |= {f"{name}.{key}": inner for key, inner in value.items() if key not in free}
        else:
            flat[name] = value
    result: dict[str, Any] = json.loads(json.dumps(flat))  # as it will be read back
    return result


def differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Facts that are not the same: name -> [then, now], None where there is none."""
    names = sorted({*then, *now} - {CHANGES})
    return {name: [then.get(name), now.get(name)] for name in names if then.get(name) != now.get(name)}


def require_same(name: str, then: Mapping[str, Any], now: Mapping[str, Any], *, accept: bool) -> None:
    """Raises: UsageError if the facts of a checkpoint differ from those of now; with `accept` only if its kind does."""
    found = differing(then, now)
    if not found or (accept and "kind" not in found):
        return
    said = [f"{key}: {_then(before)}, {after!r} now" for key, (before, after) in found.items()]
    more = f"; and {len(said) - SHOWN_DIFFERENCES} more" if len(said) > SHOWN_DIFFERENCES else ""
    hint = "Use another --out folder, or the recipe of that run"
    raise UsageError(
        f"{name} was written by another recipe ({'; '.join(said[:SHOWN_DIFFERENCES])}{more})",
        hint=f"{hint}." if "kind" in found else f"{hint}; --force goes on from it with what is new.",
    )


def _then(value: Any) -> str:
    return "not recorded then" if value is None else f"{value!r} then"


def check_facts(folder: Path, facts: Mapping[str, Any], *, accept: bool) -> None:
    """Refuse at once what `load_checkpoint` would refuse: before anything is made for the run.

    Raises: UsageError as `require_same`.
    """
    for path in reversed(checkpoints_of(folder)):
        try:
            if path.is_dir():
                then = shards.describe(path)["facts"]
            else:
                with safe_open(path, framework="pt") as handle:
                    then = json.loads((handle.metadata() or {})["facts"])
        except (SafetensorError, OSError, ValueError, KeyError):
            continue  # `load_checkpoint` says so if it matters
        return require_same(path.name, then, facts, accept=accept)


def load_checkpoint(
    folder: Path, state: TrainingState, facts: Mapping[str, Any] | None, *, accept: bool = False
) -> bool:
    """Restore the newest readable checkpoint of `folder` into `state`; False if there is none.

    It may have been written by another number of processes. Where there are several, all of them must ask.

    Args:
        facts:  what must be as it was when the checkpoint was written; None = do not compare.
        accept: go on with other facts; they become `state.changed` and are added to `state.changes`.
    Raises: UsageError if it was written by another recipe (`facts` differ), naming the difference; WeightsError if
        there are checkpoints and none can be read.
    """
    unreadable: list[str] = []
    for path in reversed(checkpoints_of(folder)):
        tensors: dict[str, Tensor] = {}
        try:
            if path.is_dir():
                said = shards.describe(path)
                step, stored, shapes = int(said["step"]), said["facts"], shards.stored(path)
            else:
                with safe_open(path, framework="pt") as handle:
                    metadata = handle.metadata() or {}
                    tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (not a dict)
                step, stored = int(metadata["step"]), json.loads(metadata["facts"])
        except (SafetensorError, OSError, ValueError, KeyError):
            unreadable.append(path.name)  # the file system lost its end in a crash: use the one before
            continue
        facts = stored if facts is None else facts
        require_same(path.name, stored, facts, accept=accept)
        state.changed = differing(stored, facts)
        if path.is_dir():
            _restore_parts(state, path, shapes)
        else:
            _restore(state, tensors)
        state.step = step
        state.changes = list(stored.get(CHANGES, ()))
        if state.changed:
            state.changes.append({"step": step, "facts": state.changed})
        _set_aside(folder, unreadable)
        return True
    if unreadable:
        raise WeightsError(
            f"no checkpoint in {folder} can be read: {', '.join(unreadable)}",
            hint="Remove the folder to start again, or use another --out.",
        )
    return False


def _set_aside(folder: Path, unreadable: Sequence[str]) -> None:
    """Rename checkpoints that cannot be read, by the first process, when all have looked at them."""
    if dist.is_initialized():
        dist.barrier()
        if dist.get_rank():
            return
    for name in unreadable:
        (folder / name).rename(folder / f"{name}.bad")


def _restore(state: TrainingState, tensors: Mapping[str, Tensor]) -> None:
    """Put a checkpoint's tensors into `state`. Raises: WeightsError if it is of other modules, or of other shapes."""
    there = {key.split("/", 2)[1] for key in tensors if key.startswith("module/")}
    if there != {*state.modules}:
        raise WeightsError(
            f"the checkpoint trains {', '.join(sorted(there))}, this recipe {', '.join(sorted(state.modules))}",
            hint="Go on with the recipe of that run, or use another --out.",
        )
    for name, module in state.modules.items():
        prefix = f"module/{name}/"
        values = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if state.is_shared:
            own = module.state_dict()
            values = {k: shards.placed_like(v, own[k]) for k, v in values.items() if k in own}
        try:
            module.load_state_dict(values)
        except RuntimeError as error:
            raise WeightsError(f"the checkpoint does not fit the model: {error}") from error
    for key, value in state.average.values.items():
        value.copy_(shards.placed_like(tensors[f"average/{key}"], value))
    for i, optimizer in enumerate(state.optimizers):
        prefix = f"optimizer/{i}/"
        entries: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith(prefix):
                index, name = key.removeprefix(prefix).split("/", 1)
                try:
                    weight = state.parameter(i, int(index))
                except IndexError as error:
                    raise WeightsError(f"the checkpoint does not fit the model: it has {key}") from error
                if tensor.ndim and tensor.numel() > 1 and tensor.shape != weight.shape:
                    raise WeightsError(
                        f"the optimiser's state in the checkpoint is of other weights: {key} is "
                        f"{[*tensor.shape]}, its weight {[*weight.shape]}",
                        hint="Pack what was trained and start from it in another folder: --set init=PACKAGE --out DIR",
                    )
                if shards.is_shared(weight) and tensor.shape == weight.shape:
                    tensor = shards.placed_like(tensor, weight)
                entries.setdefault(int(index), {})[name] = tensor
        current = optimizer.state_dict()
        optimizer.load_state_dict({"state": entries, "param_groups": current["param_groups"]})


@torch.no_grad()
def _restore_parts(state: TrainingState, path: Path, shapes: Mapping[str, torch.Size]) -> None:
    """Restore a checkpoint folder: weights and averages in place, what the optimisers keep in new tensors."""
    into = {key: value for key, value in state.tensors().items() if not key.startswith("optimizer/")}
    kept: list[dict[int, dict[str, Tensor]]] = [{} for _ in state.optimizers]
    for key, shape in shapes.items():
        if not key.startswith("optimizer/"):
            continue
        _, number, index, name = key.split("/", 3)
        try:
            weight = state.parameter(int(number), int(index)).detach()
        except IndexError as error:
            raise WeightsError(f"{path} does not fit the model: it has {key}") from error
        # Numbers, such as AdamW's count of steps, are of one element there and of none here.
        value = torch.zeros_like(weight) if shape == weight.shape and weight.numel() > 1 else torch.zeros(())
        kept[int(number)].setdefault(int(index), {})[name] = into[key] = value
    missing = sorted(into.keys() - shapes.keys())
    wrong = sorted(k for k, v in into.items() if k in shapes and shapes[k] != (v.shape or torch.Size([1])))
    if missing or wrong:
        raise WeightsError(f"{path} does not fit the model: {', '.join([*missing, *wrong][:3])}")
    shards.load(path, into)
    for optimizer, entries in zip(state.optimizers, kept, strict=True):
        current = optimizer.state_dict()
        optimizer.load_state_dict({"state": entries, "param_groups": current["param_groups"]})


class Log:
    """`metrics.jsonl`: one JSON object a line, flushed as written; `listener` is told the same.

    What a kill left of a last line is dropped.
    """

    def __init__(self, path: Path, listener: Callable[[dict[str, Any]], None] | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._listener, self._path = listener, path
        self._handle = path.open("a+b")
        self._handle.seek(0)
        self._handle.truncate(self._handle.read().rfind(b"\n") + 1)
        self._start = time.monotonic()

    def go_back(self, step: int) -> None:
        """Forget the lines of steps after this one, which will be made again."""
        self._handle.close()
        forget_lost_steps(self._path, step)
        self._handle = self._path.open("a+b")

    def write(self, **values: Any) -> None:
        record = {"seconds": round(time.monotonic() - self._start, 2), **values}
        self._handle.write((json.dumps(record) + "\n").encode())
        self._handle.flush()
        if self._listener is not None:
            self._listener(record)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()


def forget_lost_steps(log: Path, last: int) -> None:
    """Drop the lines of steps after `last`: they are made again, because a kill came before their checkpoint."""
    if not log.is_file():
        return
    kept = []
    for line in log.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut off by the kill
        if int(record.get("step", 0)) <= last or record.get("event") == "start":
            kept.append(line)
    durable.write(log, b"".join(line + b"\n" for line in kept))


class Stopped(Exception):
    """Somebody asked to stop while there was no step to save yet; what is whole is kept."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other trainings out of a folder while the `with` lasts; a process that dies lets go of it.

    Raises: LockedError if another process trains into it.
    """
    try:
        fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | durable.BINARY, 0o666)
    except OSError as error:
        raise UsageError(
            f"cannot open {folder / LOCK}: {error.strerror}", hint="Mend its rights, or use another --out."
        ) from error
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise LockedError(
                        f"another process trains into {folder}", hint="Wait for it, or use another --out."
                    ) from error
        yield
    finally:
        os.close(fd)


Loss = Callable[[torch.Generator], tuple[Tensor, dict[str, float]]]
"""Generator of the step -> (loss, its parts for the log)."""


@contextmanager
def _denormals_flushed() -> Iterator[None]:
    """A unit that dies leaves denormals behind, and with them steps are 8x slower on a CPU."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@_denormals_flushed()
def run(
    state: TrainingState,
    settings: Train,
    loss: Loss,
    *,
    out: Path,
    facts: Mapping[str, Any],
    workers: Workers,
    log: Log,
    evaluate: Callable[[], dict[str, Any]] | None = None,
    should_stop: Callable[[], bool] | None = None,
    blame: Callable[[], str] | None = None,
    items: int | None = None,
    log_every: int = LOG_EVERY,
    accept: bool = False,
) -> bool:
    """Train from `state.step` to `settings.steps`, with checkpoints, log lines and evaluations.

    Args:
        out:         the run's folder; checkpoints go to `out/checkpoints/`.
        facts:       stored in checkpoints; a run with other facts goes on from them only if `accept` is True, and then
                     the log and `state.changes` say what changed.
        evaluate:    called every `settings.evaluate_every` steps by the first process, by all of them where weights are
                     shared out; the first one's figures are logged.
        should_stop: asked after every step; True saves a checkpoint and ends.
        blame:       says what a loss that is not finite came of, or ''; asked in every process.
        items:       losses a step, over all processes; the step follows their mean. The n-th of a step has the
                     generator (seed, step, n), whichever process it falls to. None = one a process.
        log_every:   steps between lines of the log.
    Returns: whether all steps are done. Raises: WeightsError if the loss is not finite, in every process.
    """
    checkpoints, saved = out / "checkpoints", time.monotonic()
    parameters = [p for module in state.modules.values() for p in module.parameters()]
    peaks = [group["lr"] for optimizer in state.optimizers for group in optimizer.param_groups]
    if items is not None and items % workers.count:
        raise UsageError(
            f"{items} items a step cannot be shared by {workers.count} processes",
            hint=f"Use a multiple of {workers.count}.",
        )
    load_checkpoint(checkpoints, state, facts, accept=accept)
    log.go_back(state.step)
    if state.changed:
        log.write(event="changed", step=state.step, facts=state.changed)
    log.write(
        event="start", step=state.step, parameters=sum(p.numel() for p in parameters), workers=workers.count
    )
    while state.step < settings.steps:
        factor = learning_rate_factor(
            state.step,
            settings.steps,
            warmup=settings.warmup,
            decay_fraction=settings.decay_fraction,
            floor=settings.floor,
        )
        groups = [group for optimizer in state.optimizers for group in optimizer.param_groups]
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * factor
        for p in parameters:
            p.grad = None
        mine = range(workers.rank, workers.count if items is None else items, workers.count)
        shown = 0.0
        parts: dict[str, float] = {}
        for item in mine:
            value, parts = loss(step_generator(settings.seed, state.step, item))
            if value.requires_grad:  # an item need not reach what is trained
                (value / len(mine)).backward()
            shown += float(value.detach()) / len(mine)
        workers.average_gradients(parameters)
        shown = workers.mean(shown)
        if not math.isfinite(shown):
            said = "; ".join(filter(None, workers.gather(blame() if blame is not None else "")))
            require_finite(shown, state.step, checkpoints, cause=said)
        norm = clip_gradients([p for p in parameters if p.grad is not None], settings.clip)
        require_finite(norm, state.step, checkpoints, what="gradient")
        for optimizer in state.optimizers:
            optimizer.step()
        state.step += 1
        state.average.update(state.modules, state.step)
        if state.step % log_every == 0:
            log.write(
                step=state.step,
                loss=float(f"{shown:.9g}"),
                norm=round(norm, 3),
                factor=round(factor, 4),
                **parts,
            )
        if evaluate is not None and state.step % settings.evaluate_every == 0:
            figures = evaluate() if workers.rank == 0 or state.is_shared else {}
            if workers.rank == 0:
                log.write(event="evaluate", step=state.step, **figures)
        stop = should_stop is not None and workers.any_wants(should_stop())
        if save_if_due(workers, checkpoints, state, facts, saved, settings.checkpoint_minutes, now=stop):
            saved = time.monotonic()
        if stop:
            return state.step >= settings.steps
    save_if_due(workers, checkpoints, state, facts, saved, settings.checkpoint_minutes, now=True)
    return True


def save_if_due(
    workers: Workers,
    checkpoints: Path,
    state: TrainingState,
    facts: Mapping[str, Any],
    saved: float,
    minutes: float,
    *,
    now: bool,
) -> bool:
    """Save a checkpoint if the last one, at `saved` by the clock, is old; with `now` in any case.

    All processes must ask, with the same `now`. Returns: whether it was due.
    """
    due = now or (workers.rank == 0 and time.monotonic() - saved > 60 * minutes)
    if state.is_shared:
        due = now or workers.any_wants(due)
        if due:
            save_checkpoint(checkpoints, state, facts)
    elif due and workers.rank == 0:
        save_checkpoint(checkpoints, state, facts)
    return due


def require_finite(
    value: float, step: int, checkpoints: Path, *, what: str = "loss", cause: str = ""
) -> None:
    """Raises: WeightsError if a loss or norm is NaN or infinite, naming the step and where the last good state is.

    Args:
        cause: what it came of, for example the clips of the batch.
    """
    if not math.isfinite(value):
        raise WeightsError(
            f"the {what} became {value} at step {step}{', on ' if cause else ''}{cause}",
            hint=f"The last good checkpoint is in {checkpoints}."
            + (
                " Look at that clip, or lower the learning rate, and resume."
                if cause
                else " Lower the learning rate and resume."
            ),
        )


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """Scale gradients to a total norm of at most `limit`; returns the norm before."""
    known = list(parameters)
    gradients = [p.grad for p in known if p.grad is not None]
    if any(shards.is_shared(gradient) for gradient in gradients):
        return shards.clip_gradients(gradients, limit)
    return float(nn.utils.clip_grad_norm_(known, limit))
