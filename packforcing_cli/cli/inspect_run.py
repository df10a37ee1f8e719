"""What `inspect-cache RUN` prints: a run's summary, one block explained, two runs compared, a run followed.

The figures are inspection.py's; here they become tables and lines.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from packforcing_cli.cli import console

if TYPE_CHECKING:
    from packforcing_cli.inspection import Inspected
    from packforcing_cli.trace import Record

POLL_SECONDS = 0.25
LISTED = 8  # blocks named in one line
VALUE_LENGTH = 60  # of a setting, in characters

STAGES = {
    "denoise": "noise to clean latents",
    "clean": "clean pass: keys and values for the memory",
    "decode": "latents to frames",
    "compress": "the block's small form for the bank",
    "commit": "writing to the memory",
    "trace": "health, and this record",
    "journal": "latents to disk",
    "stall": "waiting for the video encoder",
}


def check(run: str | None, questions: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Refuse options that say nothing about what is shown, and questions that exclude each other.

    Raises: UsageError.
    """
    from packforcing_cli.errors import UsageError

    asked = [name for name, value in questions.items() if value is not None]
    planned = [f"--{name.replace('_', '-')}" for name, value in plan.items() if value is not None]
    if run is None and asked:
        raise UsageError(
            f"--{asked[0]} asks about a run, and none is given",
            hint="Give its id, folder or video: packforcing inspect-cache RUN. See packforcing runs list.",
        )
    if run is not None and planned:
        raise UsageError(
            f"{planned[0]} is for planning; what {run} was made with is decided",
            hint=f"Leave {' and '.join(planned)} away, or leave RUN away.",
        )
    if questions["layer"] is not None and questions["at"] is None and questions["block"] is None:
        raise UsageError("--layer tells of one block", hint="Say which one: --at 0:43, or --block 42.")
    both = [name for name in asked if name != "layer"]
    if len(both) > 1:
        raise UsageError(f"--{both[0]} and --{both[1]} exclude each other", hint="Leave one of them away.")


def show(
    run: str,
    *,
    at: str | None,
    block: int | None,
    layer: int | None,
    compare: str | None,
    follow: bool,
    as_json: bool,
) -> None:
    """Answer one question about a run. Raises: PackforcingError."""
    from packforcing_cli import inspection

    folder = find(run)
    if follow:
        _follow(folder, as_json=as_json)
        return
    seen = inspection.load(folder)
    if compare is not None:
        values = inspection.compare(seen, inspection.load(find(compare)))
        render = _compared
    elif at is not None or block is not None:
        number = block if at is None or block is not None else seen.block_at(_seconds(at))
        assert number is not None
        values = inspection.explain(seen, number, layer=layer)
        render = _explained
    else:
        values = inspection.summary(seen)
        render = _summary
    if as_json:
        console.result_json(values)
        return
    for piece in render(values):
        console.result_table(piece)
    for note in () if compare is not None else seen.trace.notes:
        console.warn(note)


def find(name: str) -> Path:
    """The run folder of a folder, an id, or a video that a run here made. Raises: UsageError, VideoError."""
    from packforcing_cli import runfolder
    from packforcing_cli.errors import UsageError

    if not os.path.isfile(name):  # noqa: PTH113  (Path's raises for a name too long)
        return runfolder.find(name)
    from packforcing_cli.continuation import run_of
    from packforcing_cli.reader import VideoReader

    video = VideoReader(name)
    folder = run_of(video)
    if folder is None:
        run_id = video.metadata.get("run", "")
        what = f"its run {run_id} is not here" if run_id else "it names no run"
        raise UsageError(
            f"{name} has no memory to look at: {what}",
            hint=f"What its pictures show: packforcing eval {shlex.quote(name)}. Runs: packforcing runs list.",
        )
    return folder


def _seconds(text: str) -> float:
    from packforcing_cli.errors import UsageError
    from packforcing_cli.timeline import parse_time

    try:
        return float(parse_time(text.strip()))
    except ValueError as error:
        raise UsageError(f"--at: {error}", hint="Write it as 0:43, or in seconds as 12.5.") from error


# ---------------------------------------------------------------------------------------------------- the whole run


def _summary(found: dict[str, Any]) -> list[Any]:
    recall, memory = found["recall"], found["memory"]
    of = f" of {found['length_blocks']}" if found["blocks"] < found["length_blocks"] else ""
    head = (
        f"{found['run']}: {found['status']}\n"
        f"{found['prompt']}\n"
        f"{found['model']}, {found['select']}; {found['blocks']}{of} blocks = {clock(found['seconds'])}\n"
    )
    pieces: list[Any] = [head]
    if memory is not None:
        pieces.append(_memory(memory, f"Memory while block {memory['block']} was made"))
    pieces.append(_recalled(recall))
    if found["slots"] is not None:
        pieces.append(_slots(found["slots"]))
    pieces.append(_stages(found["stages"]))
    pieces.append(_noticed(found))
    return pieces


def _table(title: str, *columns: str) -> Any:
    from packforcing_cli.cli.inspect_cache import _new_table

    return _new_table(title, *columns)


def _memory(memory: Mapping[str, Any], title: str) -> Any:
    table = _table(title, "partition", "blocks", "tokens", "bytes")
    for part in memory["partitions"]:
        name, blocks = part["name"], f"{part['blocks']:,}"
        if name == "mid":
            name, blocks = "mid, active", f"{part['blocks']:,} of {memory['bank_blocks']:,}"
        table.add_row(name, blocks, f"{part['tokens']:,}", console.gb(part["bytes"]))
    size = memory["bytes"]
    for name in ("raw_keys", "backups", "bank"):
        table.add_row(name.replace("_", " "), "", "", console.gb(size[name]))
    table.add_row("live", "", "", console.gb(size["live"]), style="bold")
    full = memory["full_bytes"]
    times = f", {full / size['live']:.1f} times as much" if full > size["live"] else ""
    table.add_row("full cache", "", "", f"{console.gb(full)}{times}")
    return table


def _recalled(recall: Mapping[str, Any]) -> Any:
    table = _table("Recalled", "what", "value")
    table.columns[1].justify = "left"
    if not recall["most"]:
        table.add_row("nothing yet", "")
        return table
    most = ", ".join(
        f"{_span(one)} (block {one['block']}, by {one['by_blocks']} blocks)" for one in recall["most"]
    )
    age = recall["age_seconds"]
    table.add_row("most recalled", most)
    table.add_row(
        "how old",
        f"{_age(age['least'])} to {_age(age['most'])}; half of it {_age(age['p25'])} to {_age(age['p75'])}",
    )
    if recall["churn"] is not None:
        table.add_row(
            "churn",
            f"{recall['churn']:.2f} (Jaccard distance of consecutive recalls: 0 nothing changes, 1 all)",
        )
    if recall["position_diversity"] is not None:
        table.add_row(
            "diversity", f"{recall['position_diversity']:.2f} (1: drawn from the whole bank evenly)"
        )
    never = recall["never_selected"]
    listed = ", ".join(map(str, never[:LISTED])) + (" …" if len(never) > LISTED else "")
    table.add_row(
        "never recalled",
        _share(recall["share_never_selected"], "of the bank") + (f": blocks {listed}" if never else ""),
    )
    return table


def _slots(slots: Mapping[str, Any]) -> str:
    inside = "within" if slots["within_trained_range"] else "beyond"
    return (
        f"Slots: {slots['span']:g} for each recalled block; largest distance {slots['max_distance']:g}, {inside} the"
        f" trained range of {slots['trained']} latent frames.\n"
    )


def _stages(stages: Mapping[str, Any]) -> Any:
    table = _table("Time of a block, mean", "stage", "seconds", "share", "what it is")
    table.columns[-1].justify = "left"
    for name, one in stages["stages"].items():
        table.add_row(name, f"{one['seconds']:.4f}", f"{one['share']:.1%}", STAGES.get(name, ""))
    table.add_row("all", f"{stages['block_seconds']:.4f}", "", "", style="bold")
    if stages["encode_seconds"] is not None:
        table.add_row(
            "encode", f"{stages['encode_seconds']:.4f}", "beside", "frames to video, on a thread of its own"
        )
    return table


def _noticed(found: Mapping[str, Any]) -> Any:
    table = _table("Noticed", "what", "where")
    table.columns[1].justify = "left"
    peak = found["peak_memory"]
    device = f"device {console.gb(peak['device'])}, " if peak["device"] else ""
    table.add_row(
        "most memory", f"{device}process {console.gb(peak['resident'])}" if peak["resident"] else "unknown"
    )
    sick = [(one, ", ".join(one["flags"])) for one in found["health"]]
    again = [(one, f"attempt {one['attempts']} kept") for one in found["retries"]]
    unsaid = [(one, f"layers {', '.join(map(str, one['layers']))}") for one in found["degenerate"]]
    for title, rows in (("not healthy", sick), ("made again", again), ("scores said nothing", unsaid)):
        shown = "; ".join(
            f"block {one['block']} ({clock(one['start'])}) {said}" for one, said in rows[:LISTED]
        )
        more = f"; and {len(rows) - LISTED} more" if len(rows) > LISTED else ""
        table.add_row(title, f"{shown}{more}" or "nowhere")
    return table


# ---------------------------------------------------------------------------------------------------- one block


def _explained(found: dict[str, Any]) -> list[Any]:
    again = f", attempt {found['retry'] + 1}" if found["retry"] else ""
    pieces: list[Any] = [
        f"Block {found['block']}, {_span(found)}{again}\n{found['prompt']}\n",
    ]
    if found["sees"]:
        table = _table("At full resolution", "partition", "block", "when", "slot")
        for row in found["sees"]:
            table.add_row(row["partition"], str(row["block"]), _span(row), f"{row['slot']:g}")
        pieces.append(table)
    pieces.append(found["why"] + "\n")
    if found["recalled"]:
        one = len(found["layers"]) == 1
        title = "Recalled" + (f" by layer {found['layers'][0]['layer']}" if one else "")
        last = "score" if one else "relative score"
        columns = (
            "block",
            "when",
            "ago",
            "rank" if one else "best rank",
            last,
            *(() if one else ("layers",)),
        )
        table = _table(title, *columns, "")
        for row in found["recalled"]:
            table.add_row(*_recall_row(row, one=one), "pinned" if row["pinned"] else "")
        for row in found["runners_up"]:
            ago = {
                "age_seconds": found["start"] - row["start"],
                "layers": 0,
                "of_layers": len(found["layers"]),
            }
            table.add_row(*_recall_row({**row, **ago}, one=one), "not recalled", style="dim")
        pieces.append(table)
    if found["memory"] is not None:
        pieces.append(_memory(found["memory"], "Memory"))
    slots = found["slots"]
    if slots is not None:
        inside = "within" if slots["max_distance"] < slots["trained"] else "beyond"
        pieces.append(
            f"Slots: {slots['span']:g} for each recalled block; largest distance {slots['max_distance']:g}, {inside}"
            f" the trained range of {slots['trained']}."
        )
    health = found["health"]
    if health is not None:
        said = ", ".join(health["flags"]) or "healthy"
        measures = ", ".join(
            f"{name} {health[name]:.3g}"
            for name in ("luma", "spread", "motion", "jump", "clipped")
            if health[name] is not None
        )
        pieces.append(f"Frames: {said} ({measures})")
    pieces.append("Seconds: " + ", ".join(f"{name} {value:.4f}" for name, value in found["seconds"].items()))
    return pieces


def _recall_row(row: Mapping[str, Any], *, one: bool) -> list[str]:
    score = row["score"] if one else row["relative_score"]
    cells = [
        str(row["block"]),
        _span(row),
        _age(row["age_seconds"]),
        "" if row["best_rank"] is None else str(row["best_rank"]),
        "" if score is None else (f"{score:.7g}" if one else f"{score:.2f}"),
    ]
    return cells if one else [*cells, f"{row['layers']} of {row['of_layers']}"]


# ------------------------------------------------------------------------------------------------------ two runs


def _compared(found: dict[str, Any]) -> list[Any]:
    a, b = found["runs"]
    pieces: list[Any] = [f"{a}\n{b}\n{found['common_blocks']} blocks in both\n"]
    table = _table("Where they part", "what", "value")
    table.columns[1].justify = "left"
    settings = [f"{one['name']}: {' | '.join(map(_value, one['values']))}" for one in found["settings"]]
    table.add_row("settings", "; ".join(settings[:LISTED]) or "the same")
    table.add_row("recall", _parting(found["selection"]["first_difference"]))
    overlap = found["selection"]["overlap"]
    if overlap is not None:
        table.add_row("", _share(overlap, "of what is recalled is the same"))
    table.add_row("memory", _parting(found["memory"]["first_difference"]))
    table.add_row("", "at most " + " and ".join(console.gb(size) for size in found["memory"]["live_bytes"]))
    health = found["health"]
    table.add_row("health", _parting(health["first_difference"]))
    for name, said in (
        ("unhealthy", "blocks not healthy"),
        ("retries", "attempts rejected"),
        ("degenerate", "blocks whose scores said nothing"),
    ):
        first, second = health[name]
        if first or second:
            table.add_row("", f"{said}: {first} and {second}")
    pieces.append(table)
    if found["timings"]:
        times = _table("Time of a block, mean", "stage", "first", "second", "second / first")
        for name, one in found["timings"].items():
            ratio = "" if one["ratio"] is None else f"{one['ratio']:.2f}"
            times.add_row(name, *(f"{value:.4f}" for value in one["seconds"]), ratio)
        pieces.append(times)
    pieces += [f"note: {note}" for note in found["notes"]]
    return pieces


def _value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False).strip('"')
    return text if len(text) <= VALUE_LENGTH else text[: VALUE_LENGTH - 1] + "…"


def _parting(first: Mapping[str, Any] | None) -> str:
    if first is None:
        return "the same in all blocks of both"
    said = f"from block {first['block']} ({clock(first['start'])}) on"
    if first.get("selected"):
        said += f", layer {first['layer']}: {first['selected'][0]} and {first['selected'][1]}"
    return said


# ------------------------------------------------------------------------------------------------- a run that grows


def _follow(folder: Path, *, as_json: bool) -> None:
    """A line for every block that is there and that comes, until nobody works on the run any more."""
    from packforcing_cli import inspection, runfolder, trace

    tail, shown, before = trace.Tail(folder), 0, None
    try:
        while True:
            live = runfolder.look(
                folder
            ).is_live  # asked first: what was written before the end is still read
            tail.update()
            run = runfolder.read(folder)
            found = tail.trace(blocks=run.blocks)
            if len(found.records) > shown:
                seen = inspection.Inspected(folder, "", run, inspection.script_of(run), found)
                for record in found.records[shown:]:
                    _say(seen, record, before, as_json=as_json)
                    before = record
                shown = len(found.records)
            if not live:
                break
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    known = runfolder.look(folder)
    for note in found.notes:
        console.warn(note)
    length = known.record.blocks if known.record else known.blocks
    if as_json:
        console.result(
            json.dumps({"event": "end", "status": known.status, "blocks": known.blocks, "length": length})
        )
    else:
        console.say(f"{known.name} is {known.status}: {known.blocks} of {length} blocks.")


def _say(seen: Inspected, record: Record, before: Record | None, *, as_json: bool) -> None:
    from packforcing_cli import trace

    if as_json:
        console.result(json.dumps({"event": "block", **record.to_json()}))
        return
    changed = None if before is None else trace.churn([before, record])[1]
    said = [f"block {record.block} {clock(seen.start(record.block))}"]
    if record.partitions is not None:
        spans = _spans(seen, record.recalled)
        said.append(f"recalled {spans}" if spans else "recalled nothing")
        said.append(f"{record.partitions.active} of {len(record.partitions.bank)} mid")
    if changed is not None:
        said.append(f"churn {changed:.2f}")
    if record.bytes:
        said.append(f"live {console.gb(record.bytes['live'])}")
    said.append(f"{record.made_seconds:.2f} s")
    if record.retry:
        said.append(f"attempt {record.retry + 1}")
    if record.degenerate:
        said.append(f"scores said nothing in layers {', '.join(map(str, record.degenerate))}")
    if record.health is not None and record.health.flags:
        said.append(", ".join(record.health.flags).upper())
    console.result(" | ".join(said))


def _spans(seen: Inspected, blocks: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    shown = [f"{clock(seen.start(a))}–{clock(seen.start(b + 1))}" for a, b in runs[:LISTED]]
    return ", ".join(shown) + (" …" if len(runs) > LISTED else "")


# ------------------------------------------------------------------------------------------------------------ words


def _span(row: Mapping[str, Any]) -> str:
    return f"{_precise(row['start'])}–{_precise(row['end'])}"


def clock(seconds: float) -> str:
    """0:43, or -0:03 of what was there before a video."""
    from packforcing_cli.cli import progress

    return f"-{progress.clock(-seconds)}" if seconds < 0 else progress.clock(seconds)


def _precise(seconds: float) -> str:
    """0:42.8"""
    if seconds < 0:
        return f"-{_precise(-seconds)}"
    minutes, rest = divmod(round(seconds * 10), 600)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}:{minutes:02}" if hours else f"{minutes}"
    return f"{text}:{rest // 10:02}.{rest % 10}"


def _age(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f} s"


def _share(value: float | None, of: str) -> str:
    return "unknown" if value is None else f"{value:.0%} {of}"
