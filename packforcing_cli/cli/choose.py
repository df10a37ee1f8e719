"""Which model a command takes, on which device, in which precision, and why; said in one line.

    --model auto    no CUDA GPU              -> demo, a toy world
                    an installed real model  -> the first whose plan fits the GPU; none fits -> demo
                    none installed           -> what to install: a question on a terminal, exit 8 elsewhere

Nothing of many GB is ever downloaded without a yes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packforcing_cli.catalog import ModelFacts
    from packforcing_cli.config import GenerateRequest
    from packforcing_cli.jobs import Device
    from packforcing_cli.planner import Machine

AUTO = "auto"
DEMO = "demo"


@dataclass(frozen=True)
class Choice:
    """A model for a request that asked for none.

    model:   its name; empty when one should be installed first.
    why:     one sentence.
    install: the model to install, when none is and its plan fits.
    """

    model: str
    why: str
    install: ModelFacts | None = None


def choose_model(
    request: GenerateRequest,
    machine: Machine,
    installed: Iterable[tuple[str, ModelFacts]],
    recommended: ModelFacts,
) -> Choice:
    """Take a model for --model auto.

    Args:
        machine:     where it will run; host_bytes is None when that is no GPU.
        installed:   names and facts of the real models that are here, the first that fits is taken.
        recommended: the model to install where none is.
    Raises: UsageError if a model cannot make what is asked for.
    """
    from packforcing_cli import planner

    machine = replace(machine, disk_free_bytes=None)  # a full disk is an error later, not another model
    if machine.host_bytes is None:
        return Choice(DEMO, "no CUDA GPU is used, so the demo, a toy world")
    best = ""
    for name, facts in installed:
        plan = planner.plan(request.changed(model=name), machine, facts=facts)
        if plan.fits or (plan.change and request.auto_fit):
            return Choice(name, "installed, and fits this GPU" + ("" if plan.fits else " after a change"))
        best = best or _too_large(name, plan.suggestion)
    if best:
        return Choice(DEMO, best)
    plan = planner.plan(request.changed(model=recommended.name), machine, facts=recommended)
    if plan.fits or (plan.change and request.auto_fit):
        return Choice("", "no real model is installed", install=recommended)
    return Choice(DEMO, _too_large(recommended.name, plan.suggestion))


def _too_large(name: str, suggestion: str) -> str:
    needs = f"with {suggestion} it would" if suggestion else "nor would it with any option"
    return f"{name} does not fit this GPU ({needs}), so the demo, a toy world"


def installed_models() -> Iterator[tuple[str, ModelFacts]]:
    """Names and facts of the complete real models on this machine: the catalog's first."""
    from packforcing_cli import catalog, packages
    from packforcing_cli.errors import PackforcingError

    folders = {folder.name: folder for folder in packages.installed()}
    known = [facts.name for facts in catalog.all_models() if facts.name in folders]
    for folder_name in (*known, *(name for name in folders if name not in known)):
        folder = folders[folder_name]
        try:
            manifest = packages.read_manifest(folder)
            if not manifest.missing_parts and not packages.absent_files(manifest):
                name = packages.name_of(folder)
                yield name, packages.facts(name)
        except PackforcingError:
            continue  # a broken package is what `models list` and `doctor` tell of; it is not chosen here


def resolve_model(
    request: GenerateRequest, output_folder: Path, *, only_plan: bool = False
) -> tuple[GenerateRequest, Device | None, str]:
    """The request with a model, the device where it mattered, and why it is that one.

    Asks, and downloads, where a person says yes; installs a bundle.
    Args:
        only_plan: neither ask nor install: the model that would be offered is taken.
    Raises: OfflineError when a real model should be installed and nobody is there to ask, or says no; UsageError for
        a bundle in a plan; as `bundle.unpack`.
    """
    if request.model.endswith(".tar") and Path(request.model).expanduser().is_file():
        return _install_bundle(request, only_plan=only_plan)
    if request.model != AUTO:
        return request, None, "asked for"
    from packforcing_cli import catalog, jobs

    on = jobs.choose_device(request, output_folder)
    planned = request.changed(dtype=on.dtype)
    choice = choose_model(planned, on.machine, installed_models(), catalog.get(catalog.RECOMMENDED))
    if choice.install is not None and only_plan:
        return request.changed(model=choice.install.name), on, f"{choice.why}; a run would offer this one"
    if choice.install is not None:
        offer(choice.install, on.machine)
        return request.changed(model=choice.install.name), on, "the real model, just installed"
    return request.changed(model=choice.model), on, choice.why


def _install_bundle(request: GenerateRequest, *, only_plan: bool) -> tuple[GenerateRequest, None, str]:
    from packforcing_cli import bundle, packages
    from packforcing_cli.errors import OfflineError, UsageError

    pull = f"packforcing models pull {request.model}"
    if only_plan:
        raise UsageError(f"{request.model} is a bundle, and a dry run installs nothing", hint=pull)
    folder, manifest = bundle.unpack(Path(request.model).expanduser())
    if packages.absent_files(manifest):
        raise OfflineError(f"parts of {request.model} lie on the Hub and are not on this machine", hint=pull)
    return request.changed(model=packages.name_of(folder)), None, f"installed from {request.model}"


def offer(facts: ModelFacts, machine: Machine) -> None:
    """Say what a model is and takes; install it if a person says yes. Raises: OfflineError if not."""
    from packforcing_cli import hub
    from packforcing_cli import machine as this_machine
    from packforcing_cli.cli import console
    from packforcing_cli.errors import OfflineError

    free = this_machine.free_disk(hub.cache_folder())
    said = (
        f"no real model is installed: {facts.name}, {console.gb(facts.download_bytes)} to download, licence"
        f" {facts.license}, needs {console.gb(facts.download_bytes)} of disk"
        + ("" if free is None else f" ({console.gb(free)} are free)")
    )
    refusal = OfflineError(
        said, hint=f"packforcing models pull {facts.name}, or --model demo for the toy world."
    )
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise refusal
    import typer

    console.say(said[0].upper() + said[1:] + ".")
    if not typer.confirm(f"Download {facts.name} now?", default=False, err=True):
        raise refusal
    _download(facts.name)


def _download(name: str) -> None:
    from packforcing_cli import install
    from packforcing_cli.cli import console
    from packforcing_cli.cli.transfers import Transfers
    from packforcing_cli.hub import Hub

    hub = Hub(note=console.say)
    plan = install.plan(name, hub)
    sizes = {one.name: one.file.size for one in plan.wanted}
    with Transfers(quiet=False, sizes=sizes) as shown:
        install.pull(plan, hub, advance=lambda one, n: shown.advance(one.name, n))
