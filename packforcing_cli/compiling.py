"""Regions of a layer compiled by torch.compile: what they need, where compiled code is kept, what was compiled.

A region is compiled once for each shape and serves all layers, in this process and, from the cache on disk, in later
ones. It is one graph or an error, never partly compiled. Attention stays outside: its length grows with the video at
first, and would make the compiler start again each time. Knows no transformer.

Source: PyTorch's regional compilation; TORCHINDUCTOR_CACHE_DIR.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from packforcing_cli.errors import EnvironmentProblem

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
COMPILERS = ("g++", "clang++", "c++")
MOST_SHAPES = 64  # that one region is compiled for in a process: sizes and passes of a batch

P = ParamSpec("P")
R = TypeVar("R")


def cache_folder() -> Path:
    """Where compiled code is kept between runs: $TORCHINDUCTOR_CACHE_DIR, else in the user's cache."""
    import platformdirs

    given = Path(os.environ.get(CACHE_VARIABLE) or tempfile.gettempdir() + "/torchinductor_")
    # PyTorch itself sets the variable, to a folder that does not outlive the system's temporary files.
    if given.parent == Path(tempfile.gettempdir()) and given.name.startswith("torchinductor_"):
        return Path(platformdirs.user_cache_dir("packforcing", appauthor=False)) / "compiled"
    return given


def require_compiler(device: torch.device) -> None:
    """Raises: EnvironmentProblem if what torch.compile needs for a device is not on this machine."""
    if not hasattr(torch, "compile") or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        raise EnvironmentProblem(
            "--compile: torch.compile is switched off (TORCHDYNAMO_DISABLE=1)",
            hint="Unset the variable, or leave --compile away.",
        )
    asked = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ((asked,) if asked else COMPILERS)):
        raise EnvironmentProblem(
            f"--compile needs a C++ compiler, and there is no {asked or 'g++'}",
            hint="Install one (apt install g++, or build-essential), or leave --compile away.",
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise EnvironmentProblem(
            "--compile on a GPU needs Triton, which is not installed",
            hint="pip install triton (on Windows: triton-windows), or leave --compile away.",
        )


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """The function, compiled at its first call for each shape and kept in `cache_folder`.

    Raises, when called: EnvironmentProblem if the compiler fails.
    """
    os.environ[CACHE_VARIABLE] = str(cache_folder())
    from torch._dynamo import config, exc

    config.recompile_limit = max(config.recompile_limit, MOST_SHAPES)
    fast: Callable[P, R] = torch.compile(function, fullgraph=True, dynamic=False)

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return fast(*args, **kwargs)
        except exc.TorchDynamoException as error:
            said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise EnvironmentProblem(
                f"--compile: the compiler failed ({said.strip()[:200]})",
                hint=f"Leave --compile away; or remove {cache_folder()} and try again.",
            ) from error

    return run


@dataclass(frozen=True)
class Compilations:
    """What torch.compile did in this process: graphs made, of them again for another shape; breaks of a graph."""

    graphs: int
    graph_breaks: int


def compilations() -> Compilations:
    """Counted by torch._dynamo since the process began."""
    from torch._dynamo.utils import counters

    return Compilations(
        graphs=int(counters["stats"]["unique_graphs"]), graph_breaks=sum(counters["graph_break"].values())
    )
