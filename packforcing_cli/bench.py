"""Time and memory of every part, as figures of one run: what `packforcing bench` measures.

    engine   one block in a full memory, stage by stage, against the machine's own matmul rate
    cache    what the memory costs beside attention, against two other ways to build the same context
    scaling  a block early and late in a video, for each policy
    load     reading a model: time, peak memory
    startup  commands from a fresh process: time, and what they import

The memory is filled with random keys and values, so that any block of any video is reached at once; times and counts
depend on shapes, not on values. Weights may be random too (`random:NAME`): nothing here says anything about quality.
Repeats are interleaved, the first is dropped; minimum, median and number are given. Times are figures of one machine
at one moment: compare those of one run with each other.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packforcing_cli import __version__, attention, counting, resolve, rollout, rope
from packforcing_cli.attention import Kernel
from packforcing_cli.cache import CacheContext, KVCache
from packforcing_cli.config import KV_DTYPES, MemoryOptions
from packforcing_cli.errors import EnvironmentProblem
from packforcing_cli.health import Monitor
from packforcing_cli.layout import Grid, Layout
from packforcing_cli.prompts import Prompt
from packforcing_cli.registry import VideoModel
from packforcing_cli.sampler import Schedule, block_noise, denoise_block
from packforcing_cli.timeline import Script
from packforcing_cli.transformer import BlockKV, TextKV

QUIET_LOAD = 1.0  # load average a core above which nothing is recorded
REPEATS = 7
ENOUGH_SECONDS = 10.0  # that one call is measured for
WARM_SIDE = 8192  # of the matrices a GPU is kept busy with
WARM_SECONDS = 1.0  # of work before clocks and power are read; power is an average of about so long
LIMITS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # older drivers know the latter
EARLY, MIDDLE, LATE = 30, 300, 3600  # blocks that `scaling` compares


@dataclass(frozen=True)
class Times:
    """Wall-clock seconds of repeated calls."""

    seconds: tuple[float, ...]

    @property
    def least(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def to_json(self) -> dict[str, Any]:
        """min, median and number."""
        return {"min": self.least, "median": self.median, "n": len(self.seconds)}


def conditions(device: torch.device, kernel: Kernel | None = None) -> dict[str, Any]:
    """Hardware, versions, load, and the attention kernel of a profiled call: what a figure has to be read with.

    Args:
        kernel: that models are loaded with; None = the usual one.
    """
    values: dict[str, Any] = {
        "packforcing": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "load average": load_average(),
        "device": str(device),
        "attention": attention.kind(attention.profiled(kernel or attention.usual(device), device)),
    }
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        values |= {
            "gpu": facts.name,
            "gpu memory bytes": facts.total_memory,
            "compute capability": f"{facts.major}.{facts.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **_nvidia_smi(device),
        }
    return values


def load_average() -> float | None:
    """Processes that wanted to run in the last minute; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def require_quiet(*, force: bool) -> str:
    """Refuse to measure on a loaded machine. Returns: a warning, when forced to.

    Raises: EnvironmentProblem.
    """
    load, cores = load_average(), os.cpu_count() or 1
    if load is None or load <= QUIET_LOAD * cores / 2:
        return ""
    said = f"the machine is busy: load average {load:g} on {cores} cores"
    if not force:
        raise EnvironmentProblem(said, hint="Wait until it is idle, or measure all the same with --force.")
    return f"{said}; the times are upper bounds"


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return found.group(1).strip() if found else platform.machine()


def _nvidia_smi(device: torch.device) -> dict[str, Any]:
    """Driver, and clocks and power while matrix products run, where nvidia-smi answers; {} where it does not."""
    found = _asked_of_nvidia_smi({"driver": "driver_version"}, ())
    # CUDA_VISIBLE_DEVICES renumbers what PyTorch sees and nvidia-smi does not: the GPU goes by its own name.
    name = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if not found or name is None:
        return found
    own = ("-i", f"GPU-{name}")
    with _kept_busy(device):
        clocks = {"sm clock": "clocks.sm", "memory clock": "clocks.mem", "power": "power.draw"}
        found |= _asked_of_nvidia_smi(clocks, own)
        for query in LIMITS:
            limits = _asked_of_nvidia_smi({"clock limits": query}, own)
            if limits:
                return found | limits
    return found


def _asked_of_nvidia_smi(queries: Mapping[str, str], which: Sequence[str]) -> dict[str, str]:
    """Answers of the first GPU that is meant, by name; {} where one of the queries is not known."""
    command = ["nvidia-smi", f"--query-gpu={','.join(queries.values())}", "--format=csv,noheader", *which]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    first = (told.stdout.strip().splitlines() or [""])[0]
    parts = [part.strip() for part in first.split(",")]
    return dict(zip(queries, parts, strict=True)) if len(parts) == len(queries) else {}


@contextmanager
def _kept_busy(device: torch.device) -> Iterator[None]:
    """Matrix products on a thread of their own, begun WARM_SECONDS before: an idle GPU's clocks say nothing."""
    a = torch.randn(WARM_SIDE, WARM_SIDE, device=device).to(torch.bfloat16)
    out, enough = torch.empty_like(a), threading.Event()

    def work() -> None:
        while not enough.is_set():
            for _ in range(16):
                torch.mm(a, a, out=out)
            wait_for(device)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        time.sleep(WARM_SECONDS)
        yield
    finally:
        enough.set()
        worker.join()


# -- measuring ----------------------------------------------------------------------------------------------------


def forget_peak(device: torch.device) -> None:
    """Take the most memory of a GPU afresh from here on; that of a process, on a CPU, is since it began."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def wait_for(device: torch.device) -> None:
    """Let the GPU finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    repeats: int = REPEATS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Time calls in turn, back and forth (a b c, c b a, …), after one of each that is not counted.

    Args:
        clock: seconds; time.process_time leaves out what other processes take, for shares and ratios on a CPU.
    Returns: what has taken more than ENOUGH_SECONDS in all is not called again; Times has the number.
    """
    names = list(calls)
    for name in names:
        calls[name]()
    wait_for(device)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names if turn % 2 == 0 else reversed(names):
            if sum(seconds[name]) > ENOUGH_SECONDS:
                continue
            start = clock()
            calls[name]()
            wait_for(device)
            seconds[name].append(clock() - start)
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def matmul_rate(dtype: torch.dtype, device: torch.device, *, repeats: int = REPEATS) -> float:
    """Floating-point operations a second of a large square matrix product: the machine's own ceiling."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    took = measure({"matmul": lambda: a @ b}, device, repeats=repeats)["matmul"]
    return 2 * side**3 / took.median


def expected_seconds(model: VideoModel, layout: Layout, schedule: Schedule, *, blocks: int) -> float:
    """About how long the transformer will take over a video: its operations at half the machine's matmul rate."""
    grid, prompts = layout.grid, 1 if schedule.guidance == 1 else 2
    flops = partial(
        counting.pass_flops,
        model.transformer.config,
        tokens=grid.block_tokens,
        attended=layout.tokens(blocks - 1).active,
        text_tokens=model.text.length,
        frames=grid.frames_per_block,
    )
    block = schedule.passes // prompts * flops(prompts=prompts) + flops(is_commit=True)
    return 2 * blocks * block / matmul_rate(model.dtype, model.device, repeats=1)


@dataclass
class Stage:
    """A memory filled up to a block, and all that the block needs."""

    model: VideoModel
    layout: Layout
    cache: KVCache
    block: int
    text: TextKV
    guided: TextKV
    schedule: Schedule
    memory: MemoryOptions

    @property
    def grid(self) -> Grid:
        return self.layout.grid

    @property
    def device(self) -> torch.device:
        return self.model.device

    def noisy(self) -> Tensor:
        """[1,C,F,h,w] noise in the model's dtype."""
        shape = resolve.latent_shape(self.model, self.layout)
        return block_noise(0, self.block, 0, shape).to(self.device, self.model.dtype)


def random_kv(grid: Grid, tokens: int, *, dtype: torch.dtype, device: torch.device) -> BlockKV:
    """Keys, values and query sums of a block nobody made."""
    shape = (grid.layers, 1, tokens, grid.heads, grid.kv_dim // grid.heads)
    k, v = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    return BlockKV(k, v, torch.randn(*shape[:2], *shape[3:], device=device))


def fill(cache: KVCache, until: int) -> None:
    """Commit random blocks up to `until`, from where the cache is."""
    grid, like = cache.layout.grid, {"dtype": cache.dtype, "device": cache.device}
    full = random_kv(grid, grid.block_tokens, **like)  # type: ignore[arg-type]
    small = random_kv(grid, grid.compressed_tokens, **like)  # type: ignore[arg-type]
    for block in range(cache.blocks, until):
        # Fresh sums, so that selection has something to choose between.
        kv = replace(full, q_sum=torch.randn_like(full.q_sum))
        cache.commit(block, kv)
        if cache.needs_backup(block):
            cache.add_backup(block, replace(small, k=small.k.roll(block % 7 + 1, 2) * (1 + block % 5)))


def prepare(
    model: VideoModel,
    prompt: Prompt,
    *,
    block: int,
    memory: MemoryOptions | None = None,
    size: tuple[int, int] | None = None,
    schedule: Schedule | None = None,
    extra_blocks: int = 64,
) -> Stage:
    """A memory in which `block` is the next one.

    Raises: LayoutError or UsageError for a memory that is not possible.
    """
    memory = (memory or MemoryOptions()).with_defaults(model.manifest.cache.model_dump())
    grid = resolve.grid_for(model, size or model.manifest.size)
    num_blocks = block + extra_blocks
    layout = resolve.layout_for(model, memory, grid, num_blocks=num_blocks)
    cache = KVCache(
        layout,
        num_blocks=num_blocks,
        dtype=model.dtype,
        device=model.device,
        select=memory.select,
        compressed_context=memory.compressed_context,
        bank_device="cpu" if memory.bank_device == "host" else None,
    )
    fill(cache, block)
    with torch.no_grad():
        text = model.transformer.embed_text(prompt.conditional)
        guided = text
        if prompt.unconditional is not None:
            both = torch.cat((prompt.conditional, prompt.unconditional))
            guided = model.transformer.embed_text(both)
    return Stage(model, layout, cache, block, text, guided, schedule or resolve.schedule_for(model), memory)


# -- engine -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def engine(
    model: VideoModel,
    prompt: Prompt,
    *,
    size: tuple[int, int] | None = None,
    memory: MemoryOptions | None = None,
    schedule: Schedule | None = None,
    repeats: int = REPEATS,
) -> dict[str, Any]:
    """One block in a full memory, again and again: seconds of every stage, operations, memory.

    Returns: `stages` (Times by name), `block` (their sum without what runs beside), flops of a pass and of the block,
        the matmul rate, the roofline ratio and frames a second; peak memory on a GPU.
    """
    device = model.device
    plain = resolve.layout_for(
        model,
        (memory or MemoryOptions()).with_defaults(model.manifest.cache.model_dump()),
        resolve.grid_for(model, size or model.manifest.size),
        num_blocks=EARLY,
    )
    steady = plain.sink_blocks + plain.recent_blocks + plain.top_k + 1
    stage = prepare(
        model,
        prompt,
        block=steady,
        memory=memory,
        size=size,
        schedule=schedule,
        extra_blocks=repeats + 3,
    )
    cache, grid, layout = stage.cache, stage.grid, stage.layout
    decoder, script = model.codec.decoder(), Script(("",))
    monitor, compress = Monitor(script), None
    if layout.top_k:
        kind = resolve.compressor_kind(model, stage.memory.compressor)
        compress = rollout.BlockCompressor(model, kind)
    forget_peak(device)
    seconds: dict[str, list[float]] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        wait_for(device)
        start = time.perf_counter()
        yield
        wait_for(device)
        seconds.setdefault(name, []).append(time.perf_counter() - start)

    width, height = size or model.manifest.size
    encode = _encoder(model.manifest.fps, width, height)
    for turn in range(repeats + 2):
        i = cache.blocks
        with timed("select and rotate"):
            context = cache.context(i)
        with timed("denoise"):
            x0 = denoise_block(
                lambda x, sigma, context=context: rollout.velocity(  # type: ignore[misc]
                    model, stage.guided, context, x, sigma
                ),
                stage.schedule,
                seed=0,
                block=i,
                shape=resolve.latent_shape(model, layout),
                dtype=model.dtype,
                device=device,
            )
        with timed("clean pass"):
            kv = model.transformer.commit(x0, stage.text, context)
        with timed("decode"):
            pixels = decoder.decode(x0)
        with timed("to frames"):
            frames = rollout.to_uint8(pixels)
        with timed("trace"):  # a line of trace.jsonl
            health = monitor.look(i, x0, pixels, frames, given=False)
            monitor.keep()
            record = rollout.record_of(cache, context, script, health, retry=0)
            json.dumps(record.to_json())
        backup = None
        with timed("compress"):
            if compress is not None:
                backup = compress(cache, i, x0, pixels, kv, stage.text)
        with timed("write to memory"):
            cache.commit(i, kv)
            if backup is not None:
                cache.add_backup(i, backup)
        if encode is not None:
            with timed("encode"):
                encode(frames)
        if turn < 2:  # warming up; the first decoded block is shorter, too
            seconds.clear()
    stages = {name: Times(tuple(values)) for name, values in seconds.items()}
    own = sum(stages[name].median for name in stages if name != "encode")
    attended = layout.tokens(cache.blocks).active
    prompts = stage.guided.layers[0][0].shape[0]
    flops = partial(
        counting.pass_flops,
        model.transformer.config,
        tokens=grid.block_tokens,
        attended=attended,
        text_tokens=stage.text.layers[0][0].shape[1],
        frames=grid.frames_per_block,
    )
    pass_flops, commit_flops = flops(prompts=prompts), flops(is_commit=True)
    steps = stage.schedule.passes // (2 if stage.schedule.guidance != 1 else 1)
    block_flops = steps * pass_flops + commit_flops
    rate = matmul_rate(model.dtype, device)
    transformer = stages["denoise"].median + stages["clean pass"].median
    frames_made = grid.block_frames(1)
    return {
        "model": model.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.attention.taken,
        "quantize": model.quantize,
        "compiled": model.compiled,
        "cuda_graphs": model.graphs,
        "size": [width, height],
        "attended_tokens": attended,
        "passes": {"denoise": steps, "prompts": prompts, "clean": 1},
        "stages": {name: times.to_json() for name, times in stages.items()},
        "block_seconds": own,
        "frames_per_block": frames_made,
        "fps": frames_made / max(own, stages["encode"].median if encode else 0.0),
        "pass_flops": pass_flops,
        "block_flops": block_flops,
        "matmul_flops_per_second": rate,
        "roofline_ratio": block_flops / rate / transformer,
        "not measured": [] if encode else ["encode: PyAV is not installed"],
        "kv_bytes": asdict(cache.stats().bytes) | {"live": cache.stats().bytes.live},
        "peak_memory_bytes": rollout.peak_memory_bytes(device),
    }


def _encoder(fps: int, width: int, height: int) -> Callable[[Tensor], None] | None:
    """Encodes the frames of a block as `generate` does, into nothing; None without PyAV."""
    try:
        from packforcing_cli.video import PipeWriter
    except ImportError:
        return None
    import io

    def encode(frames: Tensor) -> None:
        with PipeWriter(io.BytesIO(), fps=fps, width=width, height=height) as writer:
            writer.write(frames)

    return encode


# -- cache --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def cache(
    model: VideoModel,
    prompt: Prompt,
    *,
    size: tuple[int, int] | None = None,
    memory: MemoryOptions | None = None,
    repeats: int = REPEATS,
) -> dict[str, Any]:
    """What the memory costs beside the attention it serves: bytes moved, counted; seconds, as shares.

    Counted is all that the memory's code reads and writes for a block: choosing, recalling and turning mids, turning
    and storing the clean block, its compressed form. What a pass writes of the block's own keys and values beside the
    context is an input of its attention; it is `own_bytes_per_block` and not counted with the memory's.

    Compared with two other ways to give every pass the same keys and values: joining the partitions with torch.cat in
    each layer and pass, and choosing, gathering and turning them afresh in each pass.

    Returns: bytes and operators a block, seconds, shares; `again` is the same work measured a second time, over the
        first; `kv_dtypes` see `kv_dtype_errors`.
    """
    stage = prepare(model, prompt, block=EARLY, memory=memory, size=size, extra_blocks=4 * repeats + 8)
    kept, grid, layout, device = stage.cache, stage.grid, stage.layout, stage.device
    steps = stage.schedule.passes // (2 if stage.schedule.guidance != 1 else 1)
    passes = (stage.guided.layers[0][0].shape[0] * steps) + 1
    full = random_kv(grid, grid.block_tokens, dtype=model.dtype, device=device)
    small = random_kv(grid, grid.compressed_tokens, dtype=model.dtype, device=device)

    def read(context: CacheContext) -> None:
        for layer in range(grid.layers):
            context.layer(layer, full.k[layer], full.v[layer], full.q_sum[layer])

    def manage() -> None:
        i = kept.blocks
        context = kept.context(i)
        if (
            not context.is_complete
        ):  # `affinity` chooses, and a bank in host memory gives, when a layer is read
            read(context)
        kept.commit(i, full)
        if kept.needs_backup(i):
            kept.add_backup(i, small)

    manage()
    context = kept.context(kept.blocks)
    read(context)
    with counting.moved_bytes() as own:
        read(context)
    was_complete = kept.context(kept.blocks).is_complete
    with counting.moved_bytes() as moved:
        manage()
    bytes_per_block = moved.bytes - (0 if was_complete else own.bytes)
    attended = layout.tokens(kept.blocks).active
    shape = (1, attended, grid.heads, grid.kv_dim // grid.heads)
    keys, values = (torch.randn(shape, dtype=model.dtype, device=device) for _ in range(2))
    query = full.k[0]
    parts_k = [part.clone() for part in keys.split(grid.block_tokens, dim=1)]
    parts_v = [part.clone() for part in values.split(grid.block_tokens, dim=1)]
    positions = torch.zeros(attended - grid.block_tokens, 3, dtype=torch.float64, device=device)
    cos, sin = rope.angles(positions, grid.kv_dim // grid.heads)
    past = keys[:, : attended - grid.block_tokens]

    def attend() -> None:
        with model.attention.active():
            for _ in range(grid.layers):
                model.attention(query, keys, values)

    def join() -> None:
        for _ in range(grid.layers):
            torch.cat(parts_k, 1)
            torch.cat(parts_v, 1)

    def turn() -> None:
        for _ in range(grid.layers):
            torch.cat((rope.rotate(past, cos, sin), query), 1)
            torch.cat(parts_v, 1)

    calls = {"manage": manage, "attend": attend, "join": join, "turn": turn, "manage again": manage}
    took = measure(calls, device, repeats=repeats)
    with counting.moved_bytes() as by_join:
        join()
    with counting.moved_bytes() as by_turn:
        turn()
    one = attention_bytes(grid, attended, model.dtype.itemsize) * passes
    attend_seconds = took["attend"].median * passes
    return {
        "model": model.name,
        "attention": model.attention.taken,
        "attended_tokens": attended,
        "passes": passes,
        "bytes_per_block": bytes_per_block,
        "own_bytes_per_block": own.bytes * passes,
        "operators_per_block": moved.operators,
        "attention_bytes_per_block": one,
        "share_of_attention_bytes": bytes_per_block / one,
        "seconds": {name: times.to_json() for name, times in took.items()},
        "share_of_attention": took["manage"].median / attend_seconds,
        "again": took["manage again"].median / took["manage"].median,
        "share_with_cat_in_every_pass": took["join"].median * passes / attend_seconds,
        "share_with_rotation_in_every_pass": took["turn"].median * passes / attend_seconds,
        "bytes_with_cat_in_every_pass": by_join.bytes * passes,
        "bytes_with_rotation_in_every_pass": by_turn.bytes * passes,
        "kv_dtypes": kv_dtype_errors(model, prompt, size=size) if layout.top_k else {},
    }


@torch.no_grad()
def kv_dtype_errors(
    model: VideoModel, prompt: Prompt, *, size: tuple[int, int] | None = None, recalled: int = 4
) -> dict[str, dict[str, float | int]]:
    """What each kind of bank costs and saves: the same video up to a block that recalls some, then one pass over it.

    Returns: for each kv_dtype `block_bytes`, of a compressed block, and `error`: how far the velocity is off that with
        the model's own dtype, root mean square over root mean square. Values of the model's own blocks, one pass; what
        many blocks make of it is not said.
    """
    memory = MemoryOptions(top_k=recalled, mid_span="1").with_defaults(model.manifest.cache.model_dump())
    grid = resolve.grid_for(model, size or model.manifest.size)
    last = memory.sink_blocks + memory.recent_blocks + recalled
    layouts = {
        kind: resolve.layout_for(
            model, memory.model_copy(update={"kv_dtype": kind}), grid, num_blocks=last + 1
        )
        for kind in KV_DTYPES
    }
    caches = {
        kind: KVCache(layout, num_blocks=last + 1, dtype=model.dtype, device=model.device)
        for kind, layout in layouts.items()
    }
    plain, schedule, text = caches["auto"], resolve.schedule_for(model), model.transformer.embed_text
    alone, shape = text(prompt.conditional), resolve.latent_shape(model, layouts["auto"])
    guided = alone
    if prompt.unconditional is not None:
        guided = text(torch.cat((prompt.conditional, prompt.unconditional)))
    compress = rollout.BlockCompressor(model, resolve.compressor_kind(model, memory.compressor))
    decoder = model.codec.decoder()
    for i in range(last):
        context = plain.context(i)
        x0 = denoise_block(
            partial(rollout.velocity, model, guided, context),
            schedule,
            seed=0,
            block=i,
            shape=shape,
            dtype=model.dtype,
            device=model.device,
        )
        kv = model.transformer.commit(x0, alone, context)
        backup = compress(plain, i, x0, decoder.decode(x0), kv, alone)
        for cache in caches.values():
            cache.context(i)
            cache.commit(i, kv)
            if backup is not None:
                cache.add_backup(i, backup)
    noisy = block_noise(0, last, 0, shape).to(model.device, model.dtype)
    seen = {
        kind: rollout.velocity(model, alone, cache.context(last), noisy, 0.5).double()
        for kind, cache in caches.items()
    }
    size_of = seen["auto"].square().mean().sqrt()
    return {
        kind: {
            "block_bytes": layouts[kind].compressed_block_bytes,
            "error": float((velocity - seen["auto"]).square().mean().sqrt() / size_of),
        }
        for kind, velocity in seen.items()
    }


def attention_bytes(grid: Grid, attended: int, dtype_bytes: int) -> int:
    """Bytes that one pass's attention must read and write, all layers: keys, values, queries, result."""
    return grid.layers * grid.kv_dim * dtype_bytes * 2 * (attended + grid.block_tokens)


# -- scaling ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def scaling(
    model: VideoModel,
    prompt: Prompt,
    *,
    size: tuple[int, int] | None = None,
    blocks: Sequence[int] = (EARLY, MIDDLE, LATE),
    policies: Sequence[str] = ("packforcing", "window", "full"),
    repeats: int = REPEATS,
    memory_bytes: int | None = None,
) -> list[dict[str, Any]]:
    """One denoising pass and the memory's work for it, early and late in a video, for each policy.

    Passes are launched, also of a model that records them: a recording is of one memory, and here several take turns.

    Args:
        memory_bytes: what the memory of a policy may take; where it would take more, its size is said and nothing is
            measured. None = no limit.
    Returns: a row for each policy and block: seconds, bytes moved and operators of the memory's work, operations of
        the pass, live bytes; `ratio` of the times to the policy's first block. The first row is also measured a second
        time as `again`: the spread of the same against itself.
    """
    rows: list[dict[str, Any]] = []
    timed = replace(model, transformer=model.transformer.launched())
    counted = replace(model, transformer=model.transformer.launched(compiled=False))
    for policy in policies:
        stages: dict[str, Stage] = {}
        noisy: dict[str, Tensor] = {}
        for block in blocks:
            options = MemoryOptions(policy=policy)
            known = options.with_defaults(model.manifest.cache.model_dump())
            grid = resolve.grid_for(model, size or model.manifest.size)
            layout = resolve.layout_for(model, known, grid, num_blocks=block + 2)
            row: dict[str, Any] = {
                "policy": policy,
                "block": block,
                "live_bytes": layout.capacity_bytes(block).live,
            }
            rows.append(row)
            if memory_bytes is not None and row["live_bytes"] > memory_bytes:
                row["not measured"] = "more memory than this machine has free"
                continue
            stage = prepare(model, prompt, block=block, memory=options, size=size, extra_blocks=2)
            stages[str(block)] = stage
            with counting.moved_bytes() as moved:
                context = stage.cache.context(block)
            noisy[str(block)] = stage.noisy()
            row |= {
                "memory_bytes_moved": moved.bytes,
                "memory_operators": moved.operators,
                "attended_tokens": stage.layout.tokens(block).active,
                "pass_flops": counting.flops_of(
                    partial(rollout.velocity, counted, stage.text, context, noisy[str(block)], 0.9)
                ),
            }
        if not stages:
            continue
        first = next(iter(stages))

        def one(stage: Stage, noise: Tensor) -> None:
            context = stage.cache.context(stage.block)
            rollout.velocity(timed, stage.text, context, noise, 0.9)

        calls: dict[str, Callable[[], object]] = {
            name: partial(one, stage, noisy[name]) for name, stage in stages.items()
        }
        calls["again"] = calls[first]
        took = measure(calls, model.device, repeats=repeats)
        for row in rows:
            if row["policy"] == policy and str(row["block"]) in took:
                times = took[str(row["block"])]
                row |= {"seconds": times.to_json(), "ratio": times.median / took[first].median}
                if str(row["block"]) == first:
                    row["again"] = took["again"].median / took[first].median
        del stages, calls
    return rows


# -- load and startup ---------------------------------------------------------------------------------------------

_LOAD = """
import json, resource, sys, time
start = time.perf_counter()
import torch
imported = time.perf_counter()
from packforcing_cli import registry
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
ready, before = time.perf_counter(), peak()
model = registry.open_model(sys.argv[1], device=sys.argv[2], dtype=sys.argv[3], vae=sys.argv[4] or None).load()
size = sum(p.nbytes for m in (model.transformer, model.compressor) if m is not None for p in m.parameters())
if model.device.type == "cuda":
    torch.cuda.synchronize()
print(json.dumps({"import_torch_seconds": imported - start, "import_packforcing_seconds": ready - imported,
    "load_seconds": time.perf_counter() - ready, "weight_bytes": size, "peak_bytes": peak(),
    "peak_growth_bytes": peak() - before,
    "gpu_bytes": torch.cuda.max_memory_allocated() if model.device.type == "cuda" else 0}))
"""


def load(place: str, *, device: str, dtype: str, vae: str | None = None, repeats: int = 3) -> dict[str, Any]:
    """Read a model in fresh processes: seconds, and the most memory beside that of its weights.

    Raises: EnvironmentProblem with what the process said if it fails.
    """
    import json

    words = [sys.executable, "-c", _LOAD, place, device, dtype, vae or ""]
    told = [json.loads(_run(words)) for _ in range(repeats)]
    last = told[-1]
    times = {
        name: Times(tuple(one[name] for one in told)).to_json() for name in last if name.endswith("_seconds")
    }
    growth = min(one["peak_growth_bytes"] for one in told)
    return {
        "model": place,
        **times,
        **{name: value for name, value in last.items() if name.endswith("_bytes")},
        "peak_growth_bytes": growth,
        "peak_growth_of_weights": growth / last["weight_bytes"],
    }


_PROMPT = "a red circle moving right on a blue background"
_PREPARE = """
import json, sys, time
from pathlib import Path
from packforcing_cli import jobs, prompts, registry
from packforcing_cli.config import GenerateRequest
model, device, how, prompt, output = sys.argv[1:]
job = jobs.prepare(GenerateRequest(prompt=prompt, model=model, device=device, output=Path(output), seconds=1))
source = jobs.open_source(job)
start = time.perf_counter()
with jobs.Loading(job, source, how=how or None) as loading:
    loading.story()
    loaded = loading.model()
if loaded.device.type == "cuda":
    import torch
    torch.cuda.synchronize()
print(json.dumps({"seconds": time.perf_counter() - start, "how": how or job.plan.loading}))
"""


def startup(place: str = "demo", *, device: str = "auto", repeats: int = 3) -> dict[str, Any]:
    """Commands from fresh processes: seconds, and the heavy libraries each imports; then a model's first frames.

    `prompt and model` are an unknown prompt encoded and the model loaded, one after the other and as it is planned:
    side by side where both fit. `first frames` is a one-second video: from the start of the process until they are in
    the file, with the prompt's embeddings in no cache (cold) and in the cache (known prompt); and from the loaded model
    on.

    Args:
        place:  the model.
        device: that the videos are made on.
    """
    commands = {
        "python": ["-c", "pass"],
        "import torch": ["-c", "import torch"],
        "--version": ["-m", "packforcing_cli", "--version"],
        "--help": ["-m", "packforcing_cli", "--help"],
        "inspect-cache": ["-m", "packforcing_cli", "inspect-cache", "--model", "demo"],
        "models list": ["-m", "packforcing_cli", "models", "list"],
    }
    took: dict[str, list[float]] = {}
    for turn in range(repeats + 1):
        for name, words in commands.items():
            start = time.perf_counter()
            _run([sys.executable, *words])
            if turn:
                took.setdefault(name, []).append(time.perf_counter() - start)
    rows = {name: {**Times(tuple(values)).to_json()} for name, values in took.items()}
    for name, words in commands.items():
        if words[0] == "-m":
            rows[name]["imports"] = _heavy_imports(words[2:])
    for name, times in _prompt_and_model(place, device, repeats).items():
        rows[f"prompt and model, {name}"] = times.to_json()
    has_av = importlib.util.find_spec("av") is not None
    for name, times in (_first_frames(place, device, repeats) if has_av else {}).items():
        rows[f"first frames, {name}"] = times.to_json()
    return {
        "commands": rows,
        "not measured": [] if has_av else ["first frames in a file: PyAV is not installed"],
    }


def _heavy_imports(words: Sequence[str]) -> list[str]:
    code = (
        "import sys\n"
        "from packforcing_cli.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print('\\n' + ' '.join(n for n in ('torch', 'diffusers', 'transformers', 'torchao', 'av', 'matplotlib')"
        " if n in sys.modules))"
    )
    return _run([sys.executable, "-c", code, *words]).splitlines()[-1].split()


_LOADINGS = {
    "after": "one after the other",
    "read": "files read ahead",
    "beside": "side by side",
}


def _prompt_and_model(place: str, device: str, repeats: int) -> dict[str, Times]:
    """Seconds until a prompt nobody knows is encoded and the model is loaded, in fresh processes, in turn."""
    import tempfile

    took: dict[str, list[float]] = {}
    for _ in range(repeats):
        for how in ("after", ""):
            with tempfile.TemporaryDirectory() as folder:
                environment = _without_embeddings(folder)
                words = [place, device, how, _PROMPT, f"{folder}/a.mp4"]
                told = json.loads(_run([sys.executable, "-c", _PREPARE, *words], environment))
            took.setdefault(_LOADINGS[told["how"]], []).append(told["seconds"])
    return {name: Times(tuple(seconds)) for name, seconds in took.items()}


def _without_embeddings(folder: str) -> dict[str, str]:
    """An environment whose cache is in `folder`, with the installed models and what came from the Hub, and no more."""
    from packforcing_cli import hub, packages

    environment = {**os.environ, "HF_HUB_CACHE": str(hub.cache_folder()), "XDG_CACHE_HOME": folder}
    models = packages.models_folder()
    if models.is_dir():
        place = Path(folder, "packforcing", models.name)
        place.parent.mkdir()
        place.symlink_to(models.resolve(), target_is_directory=True)
    return environment


def _first_frames(place: str, device: str, repeats: int) -> dict[str, Times]:
    """Seconds until a video has frames that play, from fresh processes."""
    import tempfile

    cold, known, loaded = list[float](), list[float](), list[float]()
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            environment = _without_embeddings(folder)
            for seconds in (cold, known):
                words = ["generate", _PROMPT, "--model", place]
                words += ["--device", device, "--seconds", "1", "--no-run", "--json"]
                words += ["-o", f"{folder}/{len(cold)}{len(known)}.mp4"]
                start = time.perf_counter()
                said = _run([sys.executable, "-m", "packforcing_cli", *words], environment)
                took = time.perf_counter() - start
                figures = json.loads(said)["figures"]
                process = figures["process_first_frame_seconds"]
                if process is None:  # the system does not say when a process began
                    process = took - figures["total_seconds"] + figures["first_frame_seconds"]
                seconds.append(process)
            loaded.append(figures["first_frame_seconds"])
    return {
        "cold": Times(tuple(cold)),
        "known prompt": Times(tuple(known)),
        "from the loaded model": Times(tuple(loaded)),
    }


def _run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """What a process prints. Raises: EnvironmentProblem with its last words if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    except subprocess.CalledProcessError as error:
        words = (error.stderr or error.stdout).strip().splitlines() or ["nothing"]
        raise EnvironmentProblem(f"{command[-1]} failed: {words[-1]}", hint="packforcing doctor") from error
