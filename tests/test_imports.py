"""Who may import whom, read from the source; and what the cheap commands must not load."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "packforcing_cli"
ROOT = Path(importlib.util.find_spec(PACKAGE).origin).parent  # type: ignore[union-attr, arg-type]

LEVELS: tuple[tuple[str, ...], ...] = (
    (
        "errors",
        "durable",
        "layout",
        "timeline",
        "catalog",
        "config",
        "machine",
        "planner",
        "provenance",
        "quiet",
        "manifest",
        "ahead",
        "mp4",
    ),
    ("turning_kernel", "staging", "ffmpeg"),
    ("turning",),
    (
        "hub",
        "rope",
        "selection",
        "sampler",
        "compressor",
        "quantize",
        "weights",
        "unpickle",
        "lora",
        "beside",
        "attention",
        "compiling",
        "graphs",
        "sound",
        "reader",
    ),
    ("packages", "transformer", "bank", "text", "vae", "video"),
    ("cache",),
    (
        "bundle",
        "install",
        "registry",
        "runfolder",
        "trace",
        "source",
        "embeddings",
        "counting",
        "ledger",
        "tasks",
    ),
    ("resolve", "prompts", "past", "health"),
    ("sameness", "finishing"),
    ("rollout", "convert", "metrics", "inspection"),
    ("clip_score",),
    ("metrics_plot", "training", "extension", "report"),
    ("jobs",),
    ("continuation",),
    ("worker", "batch_plan"),
    ("batch", "bench"),
    ("bench_stream", "bench_kernels", "bench_peer"),
    ("local_engine", "ray_engine"),
)
"""Imports go to lower levels only. On level 0 also to the left, in the given order."""
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
CLI_LIBRARIES = {"typer", "rich"}
HEAVY = ("torch", "diffusers", "transformers", "torchao", "av", "matplotlib")


@dataclass(frozen=True)
class Import:
    """One import of a module of this package or of a library.

    target:  dotted name, as deep as the statement tells.
    at_top:  runs when the module is imported: neither inside a function nor for type checkers only.
    """

    target: str
    line: int
    at_top: bool


def imports_of(path: Path) -> list[Import]:
    return list(_imports(ast.parse(path.read_text("utf-8")), at_top=True))


def _imports(node: ast.AST, *, at_top: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        inside = at_top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            inside = False
        if isinstance(child, ast.Import):
            for name in child.names:
                yield Import(name.name, child.lineno, at_top)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: imports are absolute"
            base = child.module or ""
            if base == PACKAGE or base.startswith(PACKAGE + "."):
                for name in child.names:
                    yield Import(f"{base}.{name.name}", child.lineno, at_top)
            else:
                yield Import(base, child.lineno, at_top)
        yield from _imports(child, at_top=inside)


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file; the packages' own __init__ under the package's name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def unit(dotted: str) -> str:
    """The first name below the package: cli, training, or a module."""
    return dotted.removeprefix(PACKAGE).removeprefix(".").split(".")[0]


LIBRARY = {
    name: path for name, path in modules().items() if name not in ("", "__main__") and unit(name) != "cli"
}
COMMAND_LINE = {name: path for name, path in modules().items() if unit(name) == "cli"}


def allowed(importer: str, target: str) -> bool:
    if importer == target:
        return True  # inside the training package
    if LEVEL_OF[importer] == LEVEL_OF[target] == 0:
        return LEVELS[0].index(target) < LEVELS[0].index(importer)
    return LEVEL_OF[target] < LEVEL_OF[importer]


@pytest.mark.parametrize("name", LIBRARY)
def test_imports_go_downward_only(name: str) -> None:
    importer = unit(name)
    assert importer in LEVEL_OF, f"{name} has no level; add it to the table in this file"
    for found in imports_of(LIBRARY[name]):
        target = unit(found.target)
        if not found.target.startswith(PACKAGE):
            continue
        if target == "__version__":
            continue  # the version stands in the package itself
        assert target in LEVEL_OF, f"{name}:{found.line} imports {found.target}"
        assert allowed(importer, target), f"{name}:{found.line} imports upward: {found.target}"


@pytest.mark.parametrize("name", [name for name in LIBRARY if LEVEL_OF.get(unit(name)) == 0])
def test_the_lowest_level_needs_the_standard_library_and_pydantic_only(name: str) -> None:
    for found in imports_of(LIBRARY[name]):
        top = found.target.split(".")[0]
        assert top in {*sys.stdlib_module_names, "pydantic", PACKAGE}, f"{name}:{found.line} imports {top}"


@pytest.mark.parametrize("name", COMMAND_LINE)
def test_the_command_line_imports_inside_function_bodies_only(name: str) -> None:
    for found in imports_of(COMMAND_LINE[name]):
        top = found.target.split(".")[0]
        fine = top in {*sys.stdlib_module_names, *CLI_LIBRARIES} or found.target.startswith(f"{PACKAGE}.cli")
        assert fine or not found.at_top, f"{name}:{found.line} imports {found.target} at the top"


def test_importing_the_package_loads_nothing_of_it() -> None:
    for name in ("", "__main__"):
        for found in imports_of(modules()[name]):
            at_top = found.at_top and found.target.startswith(PACKAGE)
            assert not at_top or found.target == f"{PACKAGE}.cli.main", f"{name}:{found.line}"


def test_there_is_no_drawer_for_everything() -> None:
    assert not {"utils", "common", "helpers", "misc"} & {
        part for name in modules() for part in name.split(".")
    }


def test_the_rule_catches_what_it_should(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import torch.nn\n"
        "from typing import TYPE_CHECKING\n"
        "from packforcing_cli import rollout, layout\n"
        "if TYPE_CHECKING:\n    from packforcing_cli.cache import KVCache\n"
        "def f():\n    import av\n"
        "class C:\n    import json\n",
        encoding="utf-8",
    )
    found = {(item.target, item.at_top) for item in imports_of(path)}
    assert found == {
        ("torch.nn", True),
        ("typing", True),
        ("packforcing_cli.rollout", True),
        ("packforcing_cli.layout", True),
        ("packforcing_cli.cache.KVCache", False),
        ("av", False),
        ("json", True),
    }
    assert not allowed("cache", "rollout")
    assert not allowed("transformer", "cache")
    assert not allowed("rollout", "training")
    assert not allowed("layout", "planner")
    assert allowed("cache", "layout")


# ---------------------------------------------------------------------------------------------------- at run time

CHEAP = (
    ["--help"],
    ["--version"],
    ["generate", "--help"],
    ["eval", "--help"],
    ["inspect-cache", "--model", "wan2.1-1.3b", "--seconds", "60", "--json"],
    ["inspect-cache"],
    ["models", "list"],
    ["models", "list", "--json"],
    ["resume", "--help"],
    ["runs", "list", "--json"],
    ["models", "show", "wan2.1-1.3b-longlive"],
    ["models", "verify", "demo", "--json"],
    ["models", "pull", "--help"],
    ["train", "--help"],
    ["recipes", "list", "--json"],
    ["recipes", "show", "finetune"],
    ["data", "check", "--help"],
    ["doctor", "--config"],
)


@pytest.mark.parametrize("arguments", CHEAP, ids=" ".join)
def test_cheap_commands_load_no_heavy_library(arguments: list[str], tmp_path: Path) -> None:
    if importlib.util.find_spec(f"{PACKAGE}.cli.{arguments[0]}") is None and arguments[0] in (
        "generate",
        "train",
    ):
        pytest.skip(f"there is no command {arguments[0]}")
    code = (
        "import sys\n"
        "from packforcing_cli.cli import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        f"sys.stderr.write('loaded:' + ','.join(m for m in {HEAVY!r} if m in sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert done.stderr.rsplit("loaded:", 1)[1] == ""


def test_importing_the_package_loads_no_heavy_library() -> None:
    code = (
        "import sys, packforcing_cli as p\n"
        "assert p.errors.PackforcingError and p.Layout and p.__version__\n"
        "assert set(p.__all__) <= set(dir(p))\n"
        f"assert not [m for m in {HEAVY!r} if m in sys.modules]\n"
        "try:\n    p.nothing\nexcept AttributeError as e:\n    assert 'nothing' in str(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
