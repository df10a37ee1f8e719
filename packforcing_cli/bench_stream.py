"""What `packforcing bench stream` measures: decoding, and blocks finished in order or beside the next one.

    decode   a block through the VAE in each of the ways it can be run; how far the pixels are from the first way's
    video    the same video made twice in order and twice with `overlap`, in turn; the files must be equal byte for byte

As in bench.py, weights may be random, repeats are interleaved, and only figures of one run are compared.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packforcing_cli import bench, resolve, rollout
from packforcing_cli.bench import REPEATS, measure
from packforcing_cli.config import MemoryOptions
from packforcing_cli.prompts import Prompt
from packforcing_cli.registry import VideoModel
from packforcing_cli.sampler import Schedule, block_noise
from packforcing_cli.vae import Codec, TinyCodec, WanCodec, put_channels_last

WARM_UP = 3  # blocks of a full memory before the first that counts
ORDER = (False, True, True, False)  # overlap or not, of the videos


@torch.no_grad()
def decoding(
    model: VideoModel, *, size: tuple[int, int] | None = None, repeats: int = REPEATS
) -> list[dict[str, Any]]:
    """A block in the middle of a video, decoded.

    Returns: of each way: its name, seconds, the largest difference of a pixel value from the first way's, and the most
        memory on a GPU.
    """
    memory = MemoryOptions().with_defaults(model.manifest.cache.model_dump())
    grid = resolve.grid_for(model, size or model.manifest.size)
    shape = resolve.latent_shape(model, resolve.layout_for(model, memory, grid, num_blocks=1))
    first, second = (block_noise(0, n, 0, shape).to(model.device, model.dtype) for n in range(2))
    streams = {}
    for name, codec in _ways(model.codec).items():
        streams[name] = codec.decoder()
        streams[name].decode(first)
    states = {name: stream.state_dict() for name, stream in streams.items()}
    expected: Tensor | None = None
    rows: dict[str, dict[str, Any]] = {}
    for name, stream in streams.items():
        bench.forget_peak(model.device)
        pixels = stream.decode(second)
        expected = pixels if expected is None else expected
        rows[name] = {
            "way": name,
            "largest_difference": float((pixels - expected).abs().max()),
            "peak_memory_bytes": int(torch.cuda.max_memory_allocated(model.device))
            if model.device.type == "cuda"
            else 0,
        }
        stream.load_state_dict(states[name])
    took = measure(
        {name: lambda stream=stream: stream.decode(second) for name, stream in streams.items()},  # type: ignore[misc]
        model.device,
        repeats=repeats,
    )
    return [
        {**rows[name], "seconds": times.to_json(), "frames": grid.block_frames(1)}
        for name, times in took.items()
    ]


def _ways(codec: Codec) -> dict[str, Codec]:
    """The ways a codec can decode. Weights are copied: their layout is one of the differences."""
    ways: dict[str, Codec] = {}
    if isinstance(codec, TinyCodec):
        for name in ("first", "last"):
            autoencoder = copy.deepcopy(codec.module)
            for weight in autoencoder.parameters():
                weight.data = weight.data.contiguous()
            if name == "last":
                put_channels_last(autoencoder)
            ways[f"tiny VAE, channels {name}"] = TinyCodec(autoencoder)
        return ways
    assert isinstance(codec, WanCodec)
    for layout in (False, True):
        module = copy.deepcopy(codec.module)
        for weight in module.parameters():
            weight.data = weight.data.contiguous()
        for number in (1, 2, 4):
            name = f"Wan VAE, {'channels last' if layout else 'channels first'}, {number} a call"
            ways[name] = WanCodec(module, latents_per_call=number, channels_last=layout)
            if codec.compiled:
                ways[f"{name}, compiled"] = WanCodec(
                    module, latents_per_call=number, channels_last=layout, compiled=True
                )
    return ways


def videos(
    model: VideoModel,
    prompt: Prompt,
    *,
    size: tuple[int, int] | None = None,
    memory: MemoryOptions | None = None,
    schedule: Schedule | None = None,
    repeats: int = REPEATS,
) -> dict[str, Any]:
    """Whole videos, encoded into files, with and without `overlap`; blocks count once the memory is full.

    Returns: for each way the median and the 95th percentile of a block's seconds, frames a second, seconds to the first
        frames in the file and of waiting for the encoder; the ratio of the two ways, and of one to itself; the most
        memory of a GPU over all of them (on a CPU, of the process so far).
    """
    known = (memory or MemoryOptions()).with_defaults(model.manifest.cache.model_dump())
    grid = resolve.grid_for(model, size or model.manifest.size)
    layout = resolve.layout_for(model, known, grid, num_blocks=1)
    steady = layout.sink_blocks + layout.recent_blocks + layout.top_k + WARM_UP
    blocks = steady + max(2, repeats)
    found: dict[bool, list[rollout.Result]] = {False: [], True: []}
    files: set[bytes] = set()
    bench.forget_peak(model.device)
    with tempfile.TemporaryDirectory() as folder:
        for turn, overlap in enumerate(ORDER):
            path = Path(folder) / f"{turn}.mp4"
            result = rollout.generate(
                model,
                prompt,
                path,
                seconds=grid.frames_for(blocks) / model.manifest.fps,
                seed=0,
                size=size,
                memory=memory,
                schedule=schedule,
                metadata={},
                overlap=overlap,
            )
            found[overlap].append(result)
            files.add(path.read_bytes())

    def row(results: list[rollout.Result]) -> dict[str, Any]:
        seconds = [second for result in results for second in result.block_seconds[steady:-1]]
        median = statistics.median(seconds)
        return {
            "block_seconds": median,
            "block_seconds_p95": statistics.quantiles(seconds, n=20)[-1] if len(seconds) > 1 else median,
            "fps": grid.block_frames(1) / median,
            "first_frame_seconds": min(result.first_frame_seconds for result in results),
            "stall_seconds": max(result.stall_seconds for result in results),
            "n": len(seconds),
        }

    in_order, beside = row(found[False]), row(found[True])
    one, again = (row([result])["block_seconds"] for result in found[False])
    return {
        "blocks": blocks,
        "from_block": steady,
        "frames_per_block": grid.block_frames(1),
        "in order": in_order,
        "beside": beside,
        "ratio": beside["block_seconds"] / in_order["block_seconds"],
        "again": again / one,
        "files_are_equal": len(files) == 1,
        "peak_memory_bytes": rollout.peak_memory_bytes(model.device),
    }


def stream(
    model: VideoModel,
    prompt: Prompt,
    *,
    size: tuple[int, int] | None = None,
    memory: MemoryOptions | None = None,
    schedule: Schedule | None = None,
    repeats: int = REPEATS,
) -> dict[str, Any]:
    """`decoding` and `videos`; the latter is None without PyAV."""
    try:
        import av  # noqa: F401
    except ImportError:
        video = None
    else:
        video = videos(model, prompt, size=size, memory=memory, schedule=schedule, repeats=repeats)
    return {"decode": decoding(model, size=size, repeats=repeats), "video": video}
