"""packforcing models: what models there are; getting, checking, packing and removing them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from packforcing_cli.catalog import ModelFacts
    from packforcing_cli.install import Plan, Wanted
    from packforcing_cli.packages import Manifest

SCHEMA = 1

app = typer.Typer(help="Get, check and pack models.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but errors.")]
Name = Annotated[
    str, typer.Argument(metavar="NAME", help="A model's name, hf:owner/repo or a package folder.")
]


@app.callback()
def _group() -> None:
    pass


# -- list and show ----------------------------------------------------------------------------------------------


@app.command("list")
def list_models(as_json: Json = False) -> None:
    """List the models: those that generate, the families that serve planning, and what is installed."""
    from packforcing_cli.cli import console

    entries = _entries()
    if as_json:
        console.result_json({"schema": SCHEMA, "models": entries})
    else:
        console.result_table(_table(entries))


def _entries() -> list[dict[str, Any]]:
    """Every model and VAE of the catalog, then what else is installed."""
    from packforcing_cli import catalog, packages

    known = [*catalog.all_models(), *catalog.all_vaes()]
    entries = [_entry(facts) for facts in known]
    for folder in packages.installed():
        if folder.name not in {facts.name for facts in known}:
            entries.append(_installed_entry(folder))
    return entries


def _entry(facts: ModelFacts) -> dict[str, Any]:
    state, _ = _state(facts)
    return {
        "name": facts.name,
        "kind": facts.kind,
        "title": facts.title,
        "license": facts.license,
        "installed": state == "installed",
        "state": state,
        "size": list(facts.default_size),
        "fps": facts.fps,
        "frames_per_block": facts.frames_per_block,
        "params": facts.vae_params if facts.kind == "vae" else facts.params,
        "size_bytes": facts.vae_params * 2 if facts.kind == "vae" else facts.size_bytes,
        "download_bytes": facts.download_bytes,
        "memory_bytes": _memory(facts),
        "install": facts.install,
    }


def _installed_entry(folder: Path) -> dict[str, Any]:
    """A package that the catalog does not know, as one that it does."""
    from packforcing_cli import packages
    from packforcing_cli.errors import PackforcingError

    name = packages.name_of(folder)
    try:
        facts = packages.facts(name)
        manifest = packages.read_manifest(folder)
        state = "files missing" if packages.absent_files(manifest) else "installed"
    except PackforcingError as error:
        return {
            "name": name,
            "kind": "package",
            "title": error.message,
            "license": "",
            "installed": False,
            "state": "broken",
            "size": [],
            "fps": 0,
            "frames_per_block": 0,
            "params": 0,
            "size_bytes": 0,
            "download_bytes": 0,
            "memory_bytes": 0,
            "install": error.hint,
        }
    return {**_entry(facts), "name": name, "state": state, "installed": state == "installed"}


def _state(facts: ModelFacts) -> tuple[str, Manifest | None]:
    """What a model of the catalog is on this machine, and its manifest if there is one."""
    from packforcing_cli import catalog, packages
    from packforcing_cli.errors import PackforcingError

    if facts.kind == "family":
        return "for planning", None
    if facts.name == "demo":
        if not catalog.is_installed(facts):
            return "not installed", None
        return "installed", packages.read_manifest(catalog.DEMO_FOLDER)
    folder = packages.install_folder(facts.name)
    if not (folder / packages.MANIFEST).is_file():
        return "not installed", None
    try:
        manifest = packages.read_manifest(folder)
    except PackforcingError:
        return "broken", None
    if packages.absent_files(manifest):
        return "files missing", manifest
    if facts.kind == "package" and manifest.missing_parts:
        return "to be converted", manifest
    return "installed", manifest


def _memory(facts: ModelFacts) -> int:
    """The planner's estimate of the most memory a video of default length takes; 0 for a VAE."""
    from packforcing_cli import planner
    from packforcing_cli.config import PlanRequest

    if facts.kind == "vae":
        return 0
    return planner.plan(PlanRequest(model=facts.name), facts=facts).peak_bytes


def _table(entries: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    from packforcing_cli.cli import console

    table = Table(box=None)
    for title in ("model", "state", "download", "memory", "size", "licence"):
        table.add_column(title, no_wrap=True)
    table.add_column("what it is")
    for entry in entries:
        size = "x".join(str(side) for side in entry["size"] or ())
        table.add_row(
            entry["name"],
            entry["state"],
            console.gb(entry["download_bytes"]) if entry["download_bytes"] else "none",
            console.gb(entry["memory_bytes"]) if entry["memory_bytes"] else "",
            size if entry["kind"] != "vae" else "",
            entry["license"],
            entry["title"],
        )
    return table


@app.command("show")
def show(name: Name, as_json: Json = False) -> None:
    """Show one model: its parts, where they come from, sizes, licences, what it needs."""
    from packforcing_cli.cli import console

    values = _description(name)
    if as_json:
        console.result_json({"schema": SCHEMA, **values})
        return
    size = "x".join(str(side) for side in values["size"] or ())
    if values["kind"] == "vae":
        size = ""
    rows = [
        ("model", values["name"]),
        ("what it is", values["title"]),
        ("licence", "; ".join(filter(None, (values["license"], values["license_note"])))),
        ("state", values["state"]),
        (
            "video",
            f"{size}, {values['fps']} fps, {values['frames_per_block']} latent frames a block"
            if size
            else "",
        ),
        ("memory", f"about {console.gb(values['memory_bytes'])} for 10 s" if values["memory_bytes"] else ""),
        ("folder", values["path"] or ""),
    ]
    for part in values["parts"]:
        rows.append((part["part"], f"{console.gb(part['size_bytes'])}, {part['where']}"))
    rows += [("limit", limit) for limit in values["limits"]]
    rows.append(("next", values["next"] or ""))
    for title, text in rows:
        if text:
            console.result(f"{title:<12} {text}")


def _description(name: str) -> dict[str, Any]:
    from packforcing_cli import catalog, packages

    known = catalog.find(name)
    if known is not None:
        values = _entry(known)
        _, manifest = _state(known)
        folder = catalog.DEMO_FOLDER if known.name == "demo" else packages.install_folder(known.name)
    else:
        folder = packages.find_package(name)
        values, manifest = _installed_entry(folder), packages.read_manifest(folder)
    parts = _parts(known, manifest)
    follow = {
        "to be converted": f"packforcing models convert {values['name']}",
        "files missing": f"packforcing models pull {values['name']}",
        "not installed": values["install"],
    }
    return {
        **values,
        "license_note": known.license_note if known else "",
        "path": str(folder) if manifest is not None else None,
        "parts": parts,
        "limits": list(manifest.limits) if manifest else [],
        "next": follow.get(values["state"]),
    }


def _parts(known: ModelFacts | None, manifest: Manifest | None) -> list[dict[str, Any]]:
    """Each part: its bytes and where it is or comes from."""
    if manifest is None:
        sources = [*known.parts.items(), *(("pickled", source) for source in known.pickled)] if known else []
        return [
            {
                "part": part,
                "size_bytes": source.size_bytes,
                "where": f"hf:{source.repo}@{source.revision[:12]}"
                + (f", {source.subfolder}" if source.subfolder else f", {', '.join(source.files)}"),
                "license": source.license,
            }
            for part, source in sources
        ]
    found = []
    for part in (*manifest.parts, *manifest.references):
        size = sum(record.size for record in manifest.part_files(part).values())
        reference = manifest.references.get(part)
        where = "in the package"
        if reference is not None:
            where = f"hf:{reference.repo}@{reference.revision[:12]}"
            where += f", {reference.subfolder}" if reference.subfolder else ""
        found.append({"part": part, "size_bytes": size, "where": where})
    for entry in manifest.provenance.get("pickled", ()):
        where = f"hf:{entry['repo']}@{entry['revision'][:12]}, {entry['file']}"
        found.append({"part": "pickled", "size_bytes": entry["size"], "where": where})
    return found


# -- pull -------------------------------------------------------------------------------------------------------


@app.command("pull")
def pull(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="A model's name, hf:owner/repo[@revision], or a bundle .tar."),
    ],
    update: Annotated[
        bool, typer.Option("--update", help="Accept files that changed since it was installed.")
    ] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Use what the Hub's cache has; ask nobody.")
    ] = False,
    endpoint: Annotated[
        str | None,
        typer.Option("--endpoint", metavar="URL", help="Another Hub. Default HF_ENDPOINT or huggingface.co."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Download and install a model; prints its folder. What was interrupted goes on where it stopped.

    Example: packforcing models pull wan2.1-1.3b-self-forcing

    Weights go into the Hub's own cache (HF_HOME), shared with every program that uses it.

    Exit codes: 0 done, 2 usage, 6 disk full, 7 bad weights, 8 not to be had, 130 interrupted.
    """
    from packforcing_cli import bundle, install, packages
    from packforcing_cli.cli import console
    from packforcing_cli.cli.transfers import Transfers
    from packforcing_cli.hub import Hub

    say = (lambda _: None) if quiet else console.say
    hub = Hub(endpoint=endpoint, offline=offline, note=say)
    called, wanted = name, name
    if name.endswith(".tar"):
        with Transfers(quiet=quiet) as shown:
            folder, manifest = bundle.unpack(Path(name).expanduser(), update=update, advance=shown.advance)
        called, wanted = manifest.name, str(folder)
        if not packages.absent_files(manifest):
            _report_pull(called, folder, manifest, 0, as_json=as_json, quiet=quiet)
            return
    plan = install.plan(wanted, hub)
    called = plan.name if called == name else called
    needed = plan.download_bytes
    if not quiet:
        _introduce(called, plan, needed)
    try:
        with Transfers(quiet=quiet, sizes={one.name: one.file.size for one in plan.wanted}) as shown:
            manifest = install.pull(
                plan, hub, update=update, advance=lambda one, n: shown.advance(one.name, n)
            )
    except KeyboardInterrupt:
        say(f"What has arrived is kept; the same command goes on: packforcing models pull {name}")
        raise
    _report_pull(called, plan.folder, manifest, needed, as_json=as_json, quiet=quiet)


def _introduce(name: str, plan: Plan, needed: int) -> None:
    from packforcing_cli.cli import console

    here = plan.size_bytes - needed
    console.say(
        f"{name}: {console.gb(needed)} to download in {_count(plan.wanted)}"
        + (f", {console.gb(here)} are here" if here else "")
        + f"; licence {plan.license}"
    )


def _count(wanted: tuple[Wanted, ...]) -> str:
    missing = sum(1 for one in wanted if one.path is None)
    return f"{missing} file" + ("" if missing == 1 else "s")


def _report_pull(
    name: str, folder: Path, manifest: Manifest, downloaded: int, *, as_json: bool, quiet: bool
) -> None:
    from packforcing_cli.cli import console

    convert = None
    if "pickled" in manifest.provenance and manifest.missing_parts:
        convert = f"packforcing models convert {name}"
    if as_json:
        console.result_json(
            {
                "schema": SCHEMA,
                "name": name,
                "path": str(folder),
                "version": manifest.version,
                "license": manifest.license,
                "size_bytes": manifest.size_bytes,
                "downloaded_bytes": downloaded,
                "installed": convert is None,
                "next": convert,
            }
        )
        return
    if not quiet:
        if convert is not None:
            console.say(f"All is here. The weights of {name} are pickled; one step makes a package of them:")
            console.say(f"  {convert}")
        elif "vae" in manifest.parts and len(manifest.parts) == 1:
            console.say(f"{name} is installed. Use it with a Wan model: --vae tiny")
        else:
            console.say(f'{name} is installed. Try: packforcing generate "…" --model {name}')
    console.result(str(folder))


# -- verify, pack, remove, path -----------------------------------------------------------------------------------


@app.command("verify")
def verify(
    name: Name,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every tensor too: names, shapes, no NaN or infinity.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Hash every file of a model again and compare with its manifest.

    Exit codes: 0 all is well, 7 a file is not what it should be, 8 a file is not here.
    """
    from packforcing_cli import packages
    from packforcing_cli.cli import console

    folder = _locate(name)
    manifest = packages.read_manifest(folder)
    packages.verify_package(folder, manifest)
    tensors = None
    if deep:
        from packforcing_cli import registry

        tensors = registry.check_tensors(folder, manifest)
    files = len(manifest.files) + sum(len(r.files) for r in manifest.references.values())
    if as_json:
        console.result_json(
            {
                "schema": SCHEMA,
                "name": name,
                "path": str(folder),
                "files": files,
                "size_bytes": manifest.size_bytes,
                "tensors": tensors,
                "complete": not manifest.missing_parts,
            }
        )
    elif not quiet:
        more = f", {tensors} tensors read" if tensors is not None else ""
        console.say(f"{name}: {files} files, {console.gb(manifest.size_bytes)}, as the manifest says{more}")


@app.command("pack")
def pack(
    name: Name,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT", help="A new folder, or a file ending with .tar.")
    ],
    with_parts: Annotated[
        bool,
        typer.Option(
            "--with-parts", help="Put parts that lie on the Hub into it, for a machine without network."
        ),
    ] = False,
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", metavar="PATH[:WEIGHT]", help="Merge adapters into it; can be repeated."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    quiet: Quiet = False,
) -> None:
    """Write a model as a package to give away, with hashes, licence, provenance and a model card.

    Example: packforcing models pack runs/demo-flow/package -o my-model.tar
    """
    from packforcing_cli import bundle, packages
    from packforcing_cli.cli import console
    from packforcing_cli.cli.transfers import Transfers

    folder = _locate(name)
    if lora:
        _pack_merged(folder, lora, output, with_parts=with_parts, overwrite=overwrite)
        console.result(str(output))
        return
    manifest = packages.read_manifest(folder)
    sizes = {file: record.size for file, record in manifest.files.items()}
    if with_parts:
        for part in manifest.references:
            sizes |= {f"{part}/{file}": record.size for file, record in manifest.part_files(part).items()}
    with Transfers(quiet=quiet, sizes=sizes) as shown:
        bundle.pack(folder, output, with_parts=with_parts, overwrite=overwrite, advance=shown.advance)
    console.result(str(output))


def _pack_merged(folder: Path, loras: list[str], output: Path, *, with_parts: bool, overwrite: bool) -> None:
    """Write a package whose transformer has adapters merged into its weights."""
    import tempfile

    from packforcing_cli import bundle, registry

    if output.exists() and not overwrite:
        from packforcing_cli.errors import UsageError

        raise UsageError(f"{output} exists", hint="Choose another place, or use --overwrite.")
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=".merged-") as place:
        merged = Path(place) / "package"
        registry.write_merged(folder, loras, merged)
        bundle.pack(merged, output, with_parts=with_parts, overwrite=overwrite)


@app.command("remove")
def remove(
    name: Name,
    hub_files: Annotated[
        bool,
        typer.Option(
            "--hub-files", help="Also delete its files in the Hub's cache that no other installed model uses."
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
    quiet: Quiet = False,
) -> None:
    """Remove an installed model. Other programs may use its files in the Hub's cache: they stay unless --hub-files."""
    import sys

    from packforcing_cli import install
    from packforcing_cli.cli import console
    from packforcing_cli.errors import UsageError

    removal = install.plan_removal(name)
    size = removal.own_bytes + (removal.hub_bytes if hub_files else 0)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"removing {name} deletes {console.gb(size)}", hint="Add --yes to do it.")
        if not typer.confirm(f"Delete {console.gb(size)} of {name}?", err=True):
            raise typer.Exit(1)
    install.remove(removal, hub_files=hub_files)
    if removal.unread is not None and (hub_files or not quiet):
        console.say(
            f"The files of {name} in the Hub's cache stay: {removal.unread} cannot be read and may share them"
        )
    if not quiet:
        kept = 0 if hub_files else removal.hub_bytes
        console.say(
            f"{name} is removed, {console.gb(size)} freed"
            + (f"; {console.gb(kept)} stay in the Hub's cache (--hub-files deletes them too)" if kept else "")
        )


@app.command("path")
def path(name: Name) -> None:
    """Print the folder of an installed model."""
    from packforcing_cli.cli import console

    console.result(str(_locate(name)))


def _locate(name: str) -> Path:
    """The folder of an installed package or VAE, or a package folder."""
    from packforcing_cli import catalog, packages

    known = catalog.find(name)
    if (
        known is not None
        and known.kind == "vae"
        and (packages.install_folder(name) / packages.MANIFEST).is_file()
    ):
        return packages.install_folder(name)
    return packages.find_package(name)


def _register() -> None:
    """The commands of this group that have files of their own."""
    from packforcing_cli.cli.convert import convert
    from packforcing_cli.cli.embed import embed

    app.command("convert")(convert)
    app.command("embed")(embed)


_register()
