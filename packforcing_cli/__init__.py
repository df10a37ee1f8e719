"""packforcing: long videos from text on one GPU, with a memory that does not grow.

    from packforcing_cli import load_model, generate
    model = load_model("demo")
    generate(model, "a red circle moving right on a blue background", output="circle.mp4")

Public names are loaded on first use, so that importing the package loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from packforcing_cli import errors
    from packforcing_cli.batch import generate_many
    from packforcing_cli.layout import Layout
    from packforcing_cli.registry import VideoModel, load_model
    from packforcing_cli.rollout import generate, stream_generate

__all__ = [
    "Layout",
    "VideoModel",
    "__version__",
    "errors",
    "generate",
    "generate_many",
    "load_model",
    "stream_generate",
]

_MODULE_OF = {
    "Layout": "layout",
    "VideoModel": "registry",
    "load_model": "registry",
    "generate": "rollout",
    "generate_many": "batch",
    "stream_generate": "rollout",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use (PEP 562)."""
    if name == "errors":
        return importlib.import_module("packforcing_cli.errors")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"packforcing_cli.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
