"""packforcing doctor: whether this machine can make videos, and what to do where it cannot.

A check looks at one thing and gives a Finding. Nothing is changed and no network is asked; small files are written
where videos and models go, and removed again.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

SCHEMA = 1
SELF_TEST_PROMPT = "a red circle moving right on a blue background"
SELF_TEST_SECONDS = 2.0
LOW_DISK_BYTES = 2 * 10**9  # below it a long video may not fit
TORCH_INDEX = "https://download.pytorch.org/whl/cu"
TORCH_CUDA = ((12, 6), (12, 8), (12, 9), (13, 0), (13, 2))
"""CUDA versions that PyTorch 2.8 to 2.13 has wheels for, each on an index of its own."""

Status = Literal["ok", "warning", "broken"]
Check = Callable[[], Iterator["Finding"]]
_MARKS = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "broken": "[bold red]✗[/]"}


@dataclass(frozen=True)
class Finding:
    """What a check found.

    fix: the command, or the step, that helps; empty when nothing needs help.
    """

    name: str
    status: Status
    text: str
    fix: str = ""


def doctor(
    config: Annotated[
        bool, typer.Option("--config", help="Show each setting, its value and where it comes from, instead.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine: PyTorch, GPU, codecs, folders, models, and a short video made with the demo.

    Example: packforcing doctor

    Exit codes: 0 all is well, 4 something is broken; the command that repairs it is shown.
    """
    if config:
        _show_config(as_json=as_json)
        return
    from packforcing_cli.cli import console

    findings: list[Finding] = []
    with contextlib.ExitStack() as stack:
        say = None
        if not as_json and console.draws_in_place():
            say = stack.enter_context(console.talk().status("looking …"))
        for check in CHECKS:
            name = check.__name__.removeprefix("_check_").replace("_", " ")
            if say is not None:
                say.update(f"looking at {name} …")
            findings += _run(name, check)
    broken = [finding for finding in findings if finding.status == "broken"]
    if as_json:
        console.result_json(
            {"schema": SCHEMA, "ok": not broken, "checks": [asdict(finding) for finding in findings]}
        )
    else:
        _show(findings)
    if broken:
        raise typer.Exit(4)


def _run(name: str, check: Check) -> Iterator[Finding]:
    """What a check finds; a library that cannot be loaded and a GPU that does not answer are findings too."""
    from packforcing_cli.errors import REINSTALL, PackforcingError

    try:
        yield from check()
    except (ImportError, OSError) as error:
        yield Finding(name, "broken", _said(error), REINSTALL)
    except RuntimeError as error:  # PyTorch's, of which running out of GPU memory is one
        yield Finding(name, "broken", _said(error), "nvidia-smi shows what uses the GPU and whether it works")
    except PackforcingError as error:
        yield Finding(name, "broken", error.message, error.hint)


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _show(findings: Sequence[Finding]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from packforcing_cli.cli import console

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        table.add_row(_MARKS[finding.status], finding.name, escape(finding.text))
        if finding.fix:
            table.add_row("", "", f"[cyan]→[/] {escape(finding.fix)}")
    console.result_table(table)
    broken = sum(finding.status == "broken" for finding in findings)
    warned = sum(finding.status == "warning" for finding in findings)
    if broken:
        said = f"\n{broken} of {len(findings)} broken: see → above."
    elif warned:
        said = f"\nIt works; {warned} to know about: see ! above."
    else:
        said = "\nAll is well."
    console.result_table(said)


# -- checks -----------------------------------------------------------------------------------------------------


def _check_versions() -> Iterator[Finding]:
    from importlib.metadata import version

    from packforcing_cli import __version__

    libraries = ("diffusers", "transformers", "torchao", "huggingface_hub", "safetensors", "av")
    said = ", ".join(f"{name} {version(name)}" for name in libraries)
    yield Finding("packforcing", "ok", f"{__version__}, Python {sys.version.split()[0]}; {said}")


def _check_torch() -> Iterator[Finding]:
    import torch

    from packforcing_cli import machine

    yield torch_finding(
        torch.__version__,
        built_for=torch.version.cuda,
        driver=driver_cuda_version() if machine.has_nvidia_driver() else None,
        has_driver=machine.has_nvidia_driver(),
        sees_gpu=torch.cuda.is_available(),
    )


def torch_finding(
    torch_version: str,
    *,
    built_for: str | None,
    driver: tuple[int, int] | None,
    has_driver: bool,
    sees_gpu: bool,
) -> Finding:
    """Whether PyTorch, CUDA and the driver agree.

    Args:
        built_for: CUDA version PyTorch was built for; None = for the CPU.
        driver:    newest CUDA version the driver knows; None = it does not say.
    """
    built = f"PyTorch {torch_version}, built for {'CUDA ' + built_for if built_for else 'the CPU'}"
    if not has_driver:
        return Finding("PyTorch", "ok", f"{built}; there is no NVIDIA driver, so models run on the CPU")
    known = f"{driver[0]}.{driver[1]}" if driver else "unknown"
    said = f"{built}; the driver knows CUDA up to {known}"
    if sees_gpu:
        return Finding("PyTorch", "ok", said)
    install = torch_install_command(driver)
    if built_for is None:
        fix = install or "update the NVIDIA driver"
        return Finding("PyTorch", "broken", f"{built}, but there is an NVIDIA driver (CUDA {known})", fix)
    if driver is not None and driver[0] < int(built_for.split(".")[0]):
        fix = f"update the NVIDIA driver, or {install}" if install else "update the NVIDIA driver"
        return Finding("PyTorch", "broken", f"{said}: too old for this PyTorch", fix)
    fix = "nvidia-smi shows whether the driver sees the GPU; also look at CUDA_VISIBLE_DEVICES"
    return Finding("PyTorch", "broken", f"{said}, but PyTorch sees no GPU", fix)


def torch_install_command(driver: tuple[int, int] | None) -> str | None:
    """The command for the newest PyTorch a driver runs; None if it is too old for all of them.

    Args:
        driver: newest CUDA version it knows; None = it does not say, so the oldest is taken.
    """
    fitting = TORCH_CUDA[:1] if driver is None else [cuda for cuda in TORCH_CUDA if cuda <= driver]
    if not fitting:
        return None
    major, minor = max(fitting)
    return f"pip install --force-reinstall torch --index-url {TORCH_INDEX}{major}{minor}"


def driver_cuda_version() -> tuple[int, int] | None:
    """Newest CUDA version the driver knows; None if it does not say."""
    import ctypes

    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        number = ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return number.value // 1000, number.value % 1000 // 10


def _check_gpu() -> Iterator[Finding]:
    import torch

    from packforcing_cli.cli import console

    if not torch.cuda.is_available():
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        name = f"GPU {index}" if torch.cuda.device_count() > 1 else "GPU"
        said = (
            f"{torch.cuda.get_device_name(index)}, {console.gb(total)}, {console.gb(free)} free,"
            f" capability {major}.{minor}"
        )
        if (major, minor) < (8, 0):
            yield Finding(
                name, "warning", f"{said}: no bf16, so models run in fp32 and take twice the memory"
            )
        else:
            yield Finding(name, "ok", said)


def _check_attention() -> Iterator[Finding]:
    import torch

    from packforcing_cli import attention

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    capability = torch.cuda.get_device_capability() if device.type == "cuda" else None
    names = attention.profiled(attention.usual(device), device)
    dtype = torch.bfloat16 if capability is not None else torch.float32
    yield attention_finding(names, capability, attention.runnable(device=device, dtype=dtype))


def attention_finding(
    kernels: Sequence[str], capability: tuple[int, int] | None, runnable: Sequence[str] = ()
) -> Finding:
    """What scaled-dot-product attention ran, by the names of its kernels; capability None = on the CPU.

    Args:
        runnable: names --attention takes here.
    """
    from packforcing_cli import attention

    kind = attention.kind(kernels)
    choice = f"; --attention can be {', '.join(runnable)}" if runnable else ""
    if capability is None:
        return Finding("attention", "ok", f"{kind}, on the CPU{choice}")
    if capability[0] == attention.HOPPER and kind == "FlashAttention 2":
        return Finding("attention", "warning", f"{attention.SLOW_ON_HOPPER}{choice}", attention.hopper_fix())
    if kind in ("plain matrix products", "unknown"):
        said = f"{kind}: SDPA takes no fused kernel, which is slow and needs much memory"
        return Finding("attention", "warning", f"{said} ({', '.join(kernels[:3])}){choice}", "update PyTorch")
    return Finding("attention", "ok", f"{kind}{choice}")


def _check_memory() -> Iterator[Finding]:
    from packforcing_cli import machine
    from packforcing_cli.cli import console

    free = machine.available_memory()
    said = (
        f"{console.gb(free)} free for this process"
        if free < machine.UNKNOWN_MEMORY
        else "not told by the system"
    )
    yield Finding("host memory", "ok", said)


def _check_codecs() -> Iterator[Finding]:
    import av

    def has(name: str, mode: Literal["r", "w"]) -> bool:
        try:
            av.Codec(name, mode)
        except ValueError:
            return False
        return True

    yield codec_finding(
        av.__version__,
        writes=has("libx264", "w"),
        reads=[name for name in ("h264", "hevc", "vp9", "av1") if has(name, "r")],
    )


def codec_finding(version: str, *, writes: bool, reads: Sequence[str]) -> Finding:
    """Whether PyAV can write H.264, and what it reads."""
    said = f"PyAV {version} reads {', '.join(reads) or 'nothing'}"
    if not writes or "h264" not in reads:
        fix = "pip install --force-reinstall --only-binary av av"
        return Finding("codecs", "broken", f"{said}, and {'writes' if writes else 'cannot write'} H.264", fix)
    return Finding("codecs", "ok", f"{said}; writes H.264 (libx264)")


def _check_folders() -> Iterator[Finding]:
    from packforcing_cli import hub, packages

    yield folder_finding("this folder", Path.cwd(), "cd to a folder of yours, or give -o")
    yield folder_finding("models", packages.models_folder(), "set XDG_CACHE_HOME to a folder of yours")
    yield folder_finding("Hub cache", hub.cache_folder(), "set HF_HOME to a folder of yours")


def folder_finding(name: str, folder: Path, fix: str) -> Finding:
    """Whether files can be written to a folder, or to where it will be made, and how much room there is."""
    from packforcing_cli import machine
    from packforcing_cli.cli import console

    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Finding(name, "broken", f"{folder}: nothing can be written there ({error.strerror})", fix)
    free = machine.free_disk(existing) or 0
    said = f"{folder}, {console.gb(free)} free"
    if free < LOW_DISK_BYTES:
        return Finding(name, "warning", f"{said}: little room for models or long videos", "free some space")
    return Finding(name, "ok", said)


def _check_models() -> Iterator[Finding]:
    from packforcing_cli import catalog, packages

    for folder in (catalog.DEMO_FOLDER, *packages.installed()):
        yield model_finding("demo" if folder == catalog.DEMO_FOLDER else packages.name_of(folder), folder)


def model_finding(name: str, folder: Path) -> Finding:
    """Whether an installed model is whole. Large files that were verified before, and have not changed, count."""
    from packforcing_cli import packages
    from packforcing_cli.cli import console
    from packforcing_cli.errors import REINSTALL, PackforcingError

    again = REINSTALL if name == "demo" else f"packforcing models pull {name}"
    try:
        manifest = packages.read_manifest(folder)
        absent = packages.absent_files(manifest)
        if absent:
            count = f"{len(absent)} file" + ("" if len(absent) == 1 else "s")
            return Finding(f"model {name}", "broken", f"{count} missing in the Hub's cache", again)
        packages.verify_package(folder, manifest, trust=True)
    except PackforcingError as error:
        return Finding(f"model {name}", "broken", error.message, again)
    said = f"{console.gb(manifest.size_bytes)}, {manifest.license}, verified"
    if manifest.missing_parts and "pickled" in manifest.provenance:
        fix = f"packforcing models convert {name}"
        return Finding(f"model {name}", "warning", f"{said}, not converted yet", fix)
    return Finding(f"model {name}", "ok", said)


def _check_self_test() -> Iterator[Finding]:
    from packforcing_cli import registry, rollout
    from packforcing_cli.errors import PackforcingError
    from packforcing_cli.reader import VideoReader

    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            model = registry.load_model("demo")
            result = rollout.generate(
                model, SELF_TEST_PROMPT, Path(folder) / "test.mp4", seconds=SELF_TEST_SECONDS, seed=0
            )
            read = sum(1 for _ in VideoReader(result.path))
    except (PackforcingError, OSError, RuntimeError) as error:
        fix = (
            getattr(error, "hint", "")
            or "PACKFORCING_DEBUG=1 packforcing generate test --model demo shows where"
        )
        yield Finding("self-test", "broken", f"the demo made no video: {_said(error)}", fix)
        return
    spent = time.perf_counter() - started
    if read != result.frames:
        said = f"the demo's video has {read} frames instead of {result.frames}"
        yield Finding("self-test", "broken", said, "pip install --force-reinstall --only-binary av av")
        return
    fps = result.frames / result.total_seconds
    said = f"{result.frames} frames of the demo in {spent:.1f} s, {fps:.0f} FPS on the {model.device.type}; they play"
    yield Finding("self-test", "ok", said)


CHECKS: tuple[Check, ...] = (
    _check_versions,
    _check_torch,
    _check_gpu,
    _check_attention,
    _check_memory,
    _check_codecs,
    _check_folders,
    _check_models,
    _check_self_test,
)


# -- settings ---------------------------------------------------------------------------------------------------


def _show_config(*, as_json: bool) -> None:
    """Each setting, its value, and the flag, variable or file it comes from."""
    from rich.table import Table

    from packforcing_cli.cli import console, settings

    rows = _settings_rows()
    if as_json:
        console.result_json({"schema": SCHEMA, "settings": rows})
        return
    table = Table("setting", "value", "comes from", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        nothing = _WHEN_NOT_SET.get(row["name"], "none")
        table.add_row(row["name"], nothing if row["value"] is None else str(row["value"]), row["origin"])
    console.result_table(table)
    files = f"./{settings.FILE_NAME}, then {settings.user_file()}"
    console.say(f"Flags come first, then PACKFORCING_* variables, then {files}.")


_WHEN_NOT_SET = dict.fromkeys(
    ("size", "frames_per_block", "vae", "steps", "guidance", "mid_span"), "the model's own"
) | {"seed": "random"}


def _settings_rows() -> list[dict[str, Any]]:
    from packforcing_cli import config
    from packforcing_cli.cli import settings

    found = settings.gather({})
    request = found.generate_request("-", None)  # checks the values
    rows = []
    for name in config.SETTINGS:
        of_memory = name in config.MemoryOptions.model_fields
        value = getattr(request.memory if of_memory else request, name)
        if isinstance(value, tuple):
            value = "x".join(str(side) for side in value)
        elif isinstance(value, Path):
            value = str(value)
        elif value is None and name == "bank":
            value = config.UNLIMITED
        default = "default, unless the model has its own" if of_memory else "default"
        rows.append({"name": name, "value": value, "origin": found.sources.get(name, default)})
    return rows
