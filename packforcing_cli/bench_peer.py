"""Against somebody else's code in one process: the official Self-Forcing network's cached pass, and ours.

The network comes from a checkout on this machine (github.com/guandeh17/Self-Forcing); none of it is part of this
package. Both get the same weights, text, noise and context of pre-rotated keys, their outputs are compared first, then
they are timed in turn. What is timed is one denoising pass, each as its own pipeline calls it: theirs embeds the text
in every pass and writes into its cache, ours has the text's keys and values.

Two things of theirs are changed, and said: without flash-attn its cross-attention takes the fallback its
self-attention has, since it would stop; and what it needs beside PyTorch and diffusers is not imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packforcing_cli import attention, bench, convert, rope, weights
from packforcing_cli.attention import Kernel
from packforcing_cli.errors import EnvironmentProblem, UsageError
from packforcing_cli.quiet import known_import_noise_dropped
from packforcing_cli.transformer import TextKV, TransformerConfig, WanTransformer

REPOSITORY = "https://github.com/guandeh17/Self-Forcing"
NETWORK = Path("wan/modules/causal_model.py")
MOST_ERROR = 0.05  # of the outputs in bf16, relative; more would be another network


@dataclass(frozen=True)
class Shape:
    """Sizes of a comparison.

    rows, cols: tokens of a latent frame.  past: tokens of the context, beside the block's own.
    """

    config: TransformerConfig
    frames: int
    rows: int
    cols: int
    past: int
    text_tokens: int = 512

    @property
    def tokens(self) -> int:
        """Tokens of the block."""
        return self.frames * self.rows * self.cols


FULL = Shape(TransformerConfig(), frames=4, rows=30, cols=52, past=27_872 - 6_240)
SMALL = Shape(  # a quarter of the tokens and half the width, in the same proportions
    TransformerConfig(num_layers=2, num_attention_heads=6, ffn_dim=4480, text_dim=1024),
    frames=4,
    rows=15,
    cols=26,
    past=6_968 - 1_560,
)


@torch.no_grad()
def self_forcing(
    checkout: Path,
    *,
    device: torch.device,
    shape: Shape | None = None,
    kernel: Kernel | None = None,
    compiled: bool = False,
    repeats: int = bench.REPEATS,
) -> dict[str, Any]:
    """Seconds of one cached pass of the official network and of ours, alternating, in bf16.

    Args:
        shape:    None = full size on a GPU, the small one on a CPU.
        kernel:   of ours; None = the usual one.
        compiled: compile our layers.
    Returns: `ours`, `theirs` and on a GPU `theirs with FlashAttention 2` (Times as JSON), `again` (ours a second time:
        the spread), the error of the outputs, `ratio` (theirs over ours, medians) and `patches`.
    Raises: UsageError if there is no such checkout, EnvironmentProblem if it cannot run or gives other numbers.
    """
    require_checkout(checkout)
    shape = shape or (FULL if device.type == "cuda" else SMALL)
    dtype, kernel = torch.bfloat16, kernel or attention.usual(device)
    with imported(checkout) as peer:
        theirs = _network(peer.module, shape.config, shape.text_tokens, device, dtype)
        ours = _same_weights(theirs, shape.config, device)
        ours.use_attention(kernel)
        ours.fuse_projections()
        if compiled:
            ours.compile_layers()
        inputs = _Inputs.random(shape, device, dtype)
        run_theirs = _their_pass(theirs, shape, inputs)
        run_ours = _our_pass(ours, shape, inputs)
        error = _compare(run_ours(), run_theirs())
        calls: dict[str, Callable[[], object]] = {"ours": run_ours, "theirs": run_theirs, "again": run_ours}
        if device.type == "cuda" and not peer.has_flash_attn:
            flash = Kernel("flash", backends=(attention.BACKENDS["flash"],))

            def with_flash() -> Tensor:
                with flash.active():
                    return run_theirs()

            calls["theirs with FlashAttention 2"] = with_flash
        # Ratios on a CPU are of the work, not of what other processes leave.
        clock = time.process_time if device.type == "cpu" else time.perf_counter
        took = bench.measure(calls, device, repeats=repeats, clock=clock)
    medians = {name: times.median for name, times in took.items()}
    return {
        "peer": "Self-Forcing",
        "checkout": str(checkout),
        "dtype": "bf16",
        "clock": "CPU time" if device.type == "cpu" else "wall time",
        "layers": shape.config.num_layers,
        "dim": shape.config.dim,
        "tokens": shape.tokens,
        "attended_tokens": shape.past + shape.tokens,
        "compiled": compiled,
        "patches": peer.patches,
        "error": error,
        "seconds": {name: times.to_json() for name, times in took.items()},
        "ratios": {
            name: value / medians["ours"] for name, value in medians.items() if name not in ("ours", "again")
        },
        "again": medians["again"] / medians["ours"],
    }


def require_checkout(checkout: Path) -> None:
    """Raises: UsageError if the official network is not there."""
    if not (checkout / NETWORK).is_file():
        raise UsageError(
            f"{checkout} is no checkout of Self-Forcing: there is no {NETWORK}",
            hint=f"git clone {REPOSITORY}, and give its folder.",
        )


# -- theirs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """The module with the official causal network, what was changed for it to run, and whether flash-attn is there."""

    module: Any
    patches: list[str]
    has_flash_attn: bool


@contextmanager
def imported(checkout: Path) -> Iterator[Peer]:
    """The official causal network's module; it is forgotten afterwards.

    The packages around it are not run: they import what text encoder, VAE and image models need.
    Raises: EnvironmentProblem if it cannot be imported, or another `wan` is.
    """
    if "wan" in sys.modules:
        raise EnvironmentProblem(
            "a package named wan is imported already",
            hint="Run packforcing bench peer in a process of its own.",
        )
    for name, folder in (("wan", checkout / "wan"), ("wan.modules", checkout / "wan/modules")):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    patches = []
    absent = importlib.util.find_spec("einops") is None
    if absent:  # only their image models call it
        stub: Any = types.ModuleType("einops")
        stub.repeat = None
        sys.modules["einops"] = stub
        patches.append("einops is not installed and not needed")
    try:
        with known_import_noise_dropped():
            module = importlib.import_module("wan.modules.causal_model")
        model: Any = importlib.import_module("wan.modules.model")
        own: Any = importlib.import_module("wan.modules.attention")
        has_flash_attn = own.FLASH_ATTN_2_AVAILABLE or own.FLASH_ATTN_3_AVAILABLE
        if not has_flash_attn:
            model.flash_attention = own.attention
            patches.append(
                "flash-attn is not installed: cross-attention takes scaled_dot_product_attention, too"
            )
        yield Peer(module, patches, has_flash_attn)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise EnvironmentProblem(
            f"the network in {checkout} cannot be imported: {error}",
            hint=f"Use a fresh clone of {REPOSITORY}, and install what it names.",
        ) from error
    finally:
        for name in [name for name in sys.modules if name == "wan" or name.startswith("wan.")]:
            del sys.modules[name]
        if absent:
            del sys.modules["einops"]


def _network(
    module: Any, config: TransformerConfig, text_tokens: int, device: torch.device, dtype: torch.dtype
) -> Any:
    """The official network with random weights N(0, 0.02), those of norms around one."""
    network = module.CausalWanModel(
        text_len=text_tokens,
        in_dim=config.in_channels,
        out_dim=config.out_channels,
        dim=config.dim,
        ffn_dim=config.ffn_dim,
        freq_dim=config.freq_dim,
        text_dim=config.text_dim,
        num_heads=config.num_attention_heads,
        num_layers=config.num_layers,
        eps=config.eps,
    )
    torch.nn.Module.to(network, device, dtype)  # diffusers' own says more than is true of this one
    generator = torch.Generator(device).manual_seed(0)
    for name, value in network.named_parameters():
        scales = "norm" in name and name.endswith("weight")
        value.normal_(1.0 if scales else 0.0, weights.RANDOM_STD, generator=generator)
    return network.eval().requires_grad_(False)


def _same_weights(theirs: Any, config: TransformerConfig, device: torch.device) -> WanTransformer:
    """Our network with the official one's own tensors."""
    with torch.device("meta"):
        network = WanTransformer(config)
    found = theirs.state_dict()
    tensors = {name: found[convert.original_name(name)] for name in network.state_dict()}
    weights.assign(network, tensors, source="the official network")
    return network


@dataclass(frozen=True)
class _Inputs:
    """latents [1,C,F,h,w], timesteps [1,F], text [1,T,C], keys and values of the past, a layer each [1,S,N,D]."""

    latents: Tensor
    timesteps: Tensor
    text: Tensor
    past: list[tuple[Tensor, Tensor]]

    @classmethod
    def random(cls, shape: Shape, device: torch.device, dtype: torch.dtype) -> _Inputs:
        config, generator = shape.config, torch.Generator(device).manual_seed(1)

        def noise(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, device=device).to(dtype)

        heads = (config.num_attention_heads, config.attention_head_dim)
        _, ph, pw = config.patch_size
        return cls(
            noise(1, config.in_channels, shape.frames, shape.rows * ph, shape.cols * pw),
            torch.full((1, shape.frames), 833.0, dtype=torch.float64, device=device),
            noise(1, shape.text_tokens, config.text_dim),
            [(noise(1, shape.past, *heads), noise(1, shape.past, *heads)) for _ in range(config.num_layers)],
        )


def _their_pass(network: Any, shape: Shape, inputs: _Inputs) -> Callable[[], Tensor]:
    total = shape.past + shape.tokens
    room = max(total, 21 * shape.rows * shape.cols)  # their own cache has 21 latent frames
    caches = []
    for k, v in inputs.past:
        keys, values = (t.new_zeros(1, room, *t.shape[2:]) for t in (k, v))
        keys[:, : shape.past], values[:, : shape.past] = k, v
        where = {
            name: torch.tensor([shape.past], dtype=torch.long, device=k.device)
            for name in ("global_end_index", "local_end_index")
        }
        caches.append({"k": keys, "v": values, **where})
    cross: list[dict[str, Any]] = [{"is_init": False} for _ in inputs.past]

    def run() -> Tensor:
        out: Tensor = network(
            inputs.latents,
            t=inputs.timesteps.float(),
            context=inputs.text,
            seq_len=math.prod(inputs.latents.shape[2:]),
            kv_cache=caches,
            crossattn_cache=cross,
            current_start=shape.past,
        )
        return out

    return run


class _Past:
    """Our context of the same keys and values; satisfies `transformer.Context`."""

    def __init__(self, shape: Shape, inputs: _Inputs) -> None:
        frame = shape.past // (shape.rows * shape.cols)  # where the official network puts a block
        device = inputs.latents.device
        self.positions = rope.grid_positions(frame, shape.frames, shape.rows, shape.cols, device=device)
        self._own = shape.tokens
        self._buffers = []
        for k, v in inputs.past:
            room = [t.new_zeros(1, shape.tokens + shape.past, *t.shape[2:]) for t in (k, v)]
            for buffer, past in zip(room, (k, v), strict=True):
                buffer[:, shape.tokens :] = past
            self._buffers.append(room)

    def layer(self, layer: int, k: Tensor, v: Tensor, q_sum: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._buffers[layer]
        keys[:, : self._own].copy_(k)
        values[:, : self._own].copy_(v)
        return keys, values


def _our_pass(network: WanTransformer, shape: Shape, inputs: _Inputs) -> Callable[[], Tensor]:
    context, text = _Past(shape, inputs), network.embed_text(inputs.text)
    return lambda: _run(network, inputs, text, context)


def _run(network: WanTransformer, inputs: _Inputs, text: TextKV, context: _Past) -> Tensor:
    out: Tensor = network(inputs.latents, inputs.timesteps, text, context)
    return out


def _compare(ours: Tensor, theirs: Tensor) -> float:
    """Relative error of the outputs. Raises: EnvironmentProblem if they are not those of one network."""
    if ours.shape != theirs.shape:
        raise EnvironmentProblem(
            f"the official network gives {list(theirs.shape)} where ours gives {list(ours.shape)}",
            hint=f"Use a checkout of {REPOSITORY} at its main branch.",
        )
    error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
    if not error < MOST_ERROR:
        raise EnvironmentProblem(
            f"the official network gives other numbers: {error:.1%} off; the times would mean nothing",
            hint=f"Use a checkout of {REPOSITORY} at its main branch.",
        )
    return error
