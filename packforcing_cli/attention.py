"""The attention kernel of the layers: chosen once, checked by running it, named.

    auto       what PyTorch takes; on Hopper GPUs cuDNN's kernel first, once cuDNN is right for every length
    cudnn, flash, efficient, math      that kernel of PyTorch's scaled_dot_product_attention and no other
    fa3, sage  FlashAttention 3 and SageAttention, where they are installed, through diffusers' dispatcher

`choose` runs the kernel before any weights are read: one that cannot run here, or gives other numbers than plain
matrix products, is refused. Which one ran is told by PyTorch's own decision (`taken`), or by what a profile of one call
names (`profiled`, `kind`). Knows shapes and devices, no model.

Source: torch.nn.attention.sdpa_kernel; PyTorch's own rule for cuDNN is `check_prefer_cudnn_attention`.
Letters: B batch, S tokens, N heads, D head dim.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from packforcing_cli import catalog
from packforcing_cli.errors import EnvironmentProblem, UsageError
from packforcing_cli.quiet import known_import_noise_dropped

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
HOPPER = 9  # major CUDA capability
CUDNN_VERSION = 91501  # 9.15.1; before it, lengths that are no multiple of 128 were wrong (pytorch 169849)
TOLERANCE = {"sage": 0.1}  # relative error to matrix products in float32; 8-bit scores are coarse
USUAL_TOLERANCE = 0.02


@dataclass(frozen=True)
class Package:
    """A kernel that comes with a library of its own.

    backend: its name in diffusers' attention dispatcher.  library: the distribution diffusers looks for.
    """

    backend: str
    library: str
    module: str
    install: str


PACKAGES = {
    "fa3": Package(
        "_flash_3",
        "flash_attn_3",
        "flash_attn_interface",
        "pip install flash-attn-3 --index-url https://download.pytorch.org/whl/cu{cuda}",
    ),
    "sage": Package("sage", "sageattention", "sageattention", "pip install 'sageattention>=2.1.1'"),
}

_CHOICES = {  # of PyTorch's own choice
    SDPBackend.MATH: "math",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "efficient",
    SDPBackend.CUDNN_ATTENTION: "cudnn",
}
_KINDS = (  # parts of the names of kernels and operators in a profile, lower case
    ("cuDNN", ("cudnn",)),
    ("FlashAttention 3", ("flashattnfwdsm90", "flash_fwd_sm90", "flash3", "fa3")),
    ("SageAttention", ("sage", "qk_int8", "qk_int_sv")),
    ("PyTorch's CPU kernel", ("attention_for_cpu",)),
    ("FlashAttention 2", ("flash_fwd", "flash::", "flash_attention")),
    ("memory-efficient attention", ("fmha", "efficient_attention")),
    ("plain matrix products", ("gemm", "softmax", "bmm")),
)
SLOW_ON_HOPPER = "FlashAttention 2: about half as fast on a Hopper GPU as cuDNN's kernel or FlashAttention 3"


@dataclass(frozen=True)
class Kernel:
    """How self-attention is computed.

    asked:    auto or the name that was given.  taken: what really runs, see `taken`.
    backends: PyTorch's kernels in the order they are tried; () = its own choice.
    warning:  what the person should know of it, with the step that helps; empty = nothing.
    """

    asked: str = "auto"
    taken: str = ""
    backends: tuple[SDPBackend, ...] = ()
    warning: str = ""

    def active(self) -> AbstractContextManager[object]:
        """Where PyTorch's attention takes this kernel: around a pass, since entering costs more than a small call."""
        return sdpa_kernel(list(self.backends), set_priority=True) if self.backends else nullcontext()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Unmasked attention of q [B,Sq,N,D] to k, v [B,Sk,N,D] -> [B,Sq,N,D]; inside `active`."""
        package = PACKAGES.get(self.asked)
        if package is not None:
            return _dispatched(package, q, k, v)
        return F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        ).transpose(1, 2)


def _dispatched(package: Package, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    out: Tensor = dispatch_attention_fn(q, k, v, backend=AttentionBackendName(package.backend))
    return out


def choose(
    asked: str, *, device: torch.device, dtype: torch.dtype, heads: int = 12, head_dim: int = 128
) -> Kernel:
    """The kernel a name means on a device, after it was run there.

    Raises: UsageError for an unknown name; EnvironmentProblem naming what runs here if this one does not.
    """
    if asked != "auto" and asked not in (*BACKENDS, *PACKAGES):
        raise UsageError(
            f"--attention {asked}: there is no such kernel",
            hint=f"Use auto, {', '.join((*BACKENDS, *PACKAGES))}.",
        )
    if device.type == "cpu":
        catalog.check_cpu("none", "none", asked)
    if asked in PACKAGES:
        _require_package(asked, device)
    shape: dict[str, Any] = {"device": device, "dtype": dtype, "heads": heads, "head_dim": head_dim}
    if asked != "auto":
        kernel = Kernel(asked, backends=(BACKENDS[asked],) if asked in BACKENDS else ())
        found = _tried(kernel, **shape)
        return Kernel(asked, found, kernel.backends, _warning(found, device))
    kernel, doubt = usual(device), ""
    if kernel.backends:
        try:
            _tried(kernel, **shape)
        except EnvironmentProblem as problem:
            kernel, doubt = Kernel(), f"{problem.message}; PyTorch's own choice is taken"
    found = taken(kernel, **shape)
    return Kernel(asked, found, kernel.backends, doubt or _warning(found, device))


def usual(device: torch.device) -> Kernel:
    """What `auto` means on a device; it was not run."""
    return Kernel("auto", backends=tuple(BACKENDS.values()) if prefers_cudnn(device) else ())


def prefers_cudnn(device: torch.device) -> bool:
    """Whether cuDNN's kernel is the fastest here and right for every length: Hopper, cuDNN 9.15.1 or newer."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != HOPPER:
        return False
    version = torch.backends.cudnn.version()
    return version is not None and version >= CUDNN_VERSION


def taken(
    kernel: Kernel, *, device: torch.device, dtype: torch.dtype, heads: int = 12, head_dim: int = 128
) -> str:
    """What a call runs here: cudnn, flash, "flash (CPU)", efficient, math, fa3 or sage. The call is made.

    It is the decision of scaled_dot_product_attention itself that is asked for: a profile costs seconds on a GPU.
    """
    q, k, v = _example(device, dtype, heads, head_dim)
    with kernel.active():
        kernel(q, k, v)
        if kernel.asked in PACKAGES:
            return kernel.asked
        number = torch._fused_sdp_choice(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    found = next((name for choice, name in _CHOICES.items() if int(choice.value) == number), "unknown")
    return "flash (CPU)" if (found, device.type) == ("flash", "cpu") else found


def _example(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """Queries, keys and values of lengths that are no multiples of a kernel's tile."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 91, heads, head_dim), *((1, 364, heads, head_dim),) * 2)
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)


def _tried(kernel: Kernel, *, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> str:
    """Run a kernel that was asked for and compare its numbers. Raises: EnvironmentProblem."""
    there: dict[str, Any] = {"device": device, "dtype": dtype, "heads": heads, "head_dim": head_dim}
    q, k, v = _example(device, dtype, heads, head_dim)
    try:
        with kernel.active():
            got = kernel(q, k, v)
        found = taken(kernel, **there)
    except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
        said = " ".join(str(error).split()).split(". ")[0][:160]
        raise EnvironmentProblem(
            f"--attention {kernel.asked} cannot run here, on {_name(device)} in {_short(dtype)}: {said}",
            hint=f"What can: {', '.join(runnable(**there))}.",
        ) from error
    with sdpa_kernel(SDPBackend.MATH):
        wanted = Kernel("math")(q.float(), k.float(), v.float())
    off = float((got.float() - wanted).norm() / wanted.norm())
    if not off < TOLERANCE.get(kernel.asked, USUAL_TOLERANCE):
        raise EnvironmentProblem(
            f"--attention {kernel.asked} gives wrong numbers here: {off:.1%} off on {_name(device)},"
            f" cuDNN {torch.backends.cudnn.version()}, PyTorch {torch.__version__}",
            hint=f"What can: {', '.join(name for name in runnable(**there) if name != kernel.asked)}.",
        )
    return found


def runnable(
    *, device: torch.device, dtype: torch.dtype, heads: int = 12, head_dim: int = 128
) -> tuple[str, ...]:
    """Names `choose` takes that run here; whether their numbers are right is not looked at."""
    found = ["auto"]
    for name in (*BACKENDS, *PACKAGES):
        kernel = Kernel(name, backends=(BACKENDS[name],) if name in BACKENDS else ())
        try:
            if name in PACKAGES:
                _require_package(name, device)
            taken(kernel, device=device, dtype=dtype, heads=heads, head_dim=head_dim)
        except (RuntimeError, ValueError, NotImplementedError, AssertionError, EnvironmentProblem):
            continue
        found.append(name)
    return tuple(found)


def _require_package(name: str, device: torch.device) -> None:
    """Raises: EnvironmentProblem if the library of a kernel, or a GPU for it, is not there."""
    package = PACKAGES[name]
    if device.type == "cpu":
        catalog.check_cpu("none", "none", name)
    if importlib.util.find_spec(package.module) is None:
        cuda = (torch.version.cuda or "12.8").replace(".", "")
        raise EnvironmentProblem(
            f"--attention {name} needs {package.library}, which is not installed",
            hint=f"{package.install.format(cuda=cuda)}; or leave --attention away.",
        )
    try:
        with known_import_noise_dropped():
            from diffusers.models import attention_dispatch
        attention_dispatch._check_attention_backend_requirements(
            attention_dispatch.AttentionBackendName(package.backend)
        )
    except (ImportError, AttributeError, ValueError, RuntimeError) as error:
        version = importlib.metadata.version("diffusers")
        raise EnvironmentProblem(
            f"--attention {name}: diffusers {version} cannot use {package.library} ({error})",
            hint="pip install -U diffusers; or leave --attention away.",
        ) from error


def _warning(found: str, device: torch.device) -> str:
    """What is slow about a kernel on this device, and the step that helps; empty where nothing is."""
    if device.type != "cuda" or found != "flash" or torch.cuda.get_device_capability(device)[0] != HOPPER:
        return ""
    return f"attention takes {SLOW_ON_HOPPER}; {hopper_fix()}"


def hopper_fix() -> str:
    """The step that brings a faster kernel to a Hopper GPU."""
    version = torch.backends.cudnn.version() or 0
    if version < CUDNN_VERSION:
        have = f"{version // 10000}.{version // 100 % 100}.{version % 100}" if version else "none"
        shadowed = ", and no other cuDNN on LD_LIBRARY_PATH" if os.environ.get("LD_LIBRARY_PATH") else ""
        return (
            f"use a PyTorch with cuDNN 9.15.1 or newer (here: {have}{shadowed}),"
            " or install FlashAttention 3 and give --attention fa3"
        )
    return "leave --attention away, which takes cuDNN's"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- by profile ---------------------------------------------------------------------------------------------------


def profiled(
    kernel: Kernel, device: torch.device, *, dtype: torch.dtype | None = None, tokens: int | None = None
) -> list[str]:
    """Names of what one call at Wan's head size runs: kernels on a GPU, operators on the CPU."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
    q = torch.zeros(1, tokens or (1024 if on_gpu else 64), 12, 128, device=device, dtype=dtype)
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with kernel.active():
        kernel(q, q, q)  # the first call may build or choose something
        with _native_talk_dropped(), profile(activities=[activity]) as profiler:
            kernel(q, q, q)
            if on_gpu:
                torch.cuda.synchronize(device)
    return [event.key for event in profiler.key_averages()]


def kind(names: Sequence[str]) -> str:
    """Which implementation the kernels (or operators, on the CPU) of a profile belong to."""
    text = " ".join(names).lower()
    for found, signs in _KINDS:
        if any(sign in text for sign in signs):
            return found
    return "unknown"


@contextmanager
def _native_talk_dropped() -> Iterator[None]:
    """Without what the profiler's own library writes to stderr at start and stop. Python's errors are not touched."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
