"""Exact counts, which gate; and that `bench` measures what it says. No time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_vae import wan_module
from tiny import embeds, video_model
from typer.testing import CliRunner

from packforcing_cli import bench, bench_stream, counting, hub, packages, prompts, registry, rollout
from packforcing_cli.cache import KVCache
from packforcing_cli.cli import bench as bench_command
from packforcing_cli.cli import build_app
from packforcing_cli.config import MemoryOptions
from packforcing_cli.embeddings import EmbeddingCache
from packforcing_cli.layout import Grid, Layout
from packforcing_cli.prompts import Prompt
from packforcing_cli.registry import VideoModel
from packforcing_cli.sampler import Schedule
from packforcing_cli.timeline import Script
from packforcing_cli.transformer import TransformerConfig, attention
from packforcing_cli.vae import WanCodec

STEADY = 2 + 1 + 16 + 1


@cache
def demo() -> VideoModel:
    return registry.load_model("demo")


def prompt_of(model: VideoModel, folder: Path) -> Prompt:
    script = Script(("a red circle moving right on a blue background",))
    story = prompts.encode_script(model, script, guided=True, cache=EmbeddingCache(folder))
    return story.prompts[0]


@torch.no_grad()
def test_counted_operations_of_a_pass_equal_the_closed_form(tmp_path: Path) -> None:
    model = demo()
    stage = bench.prepare(model, prompt_of(model, tmp_path), block=STEADY)
    context = stage.cache.context(STEADY)
    closed = partial(
        counting.pass_flops,
        model.transformer.config,
        tokens=stage.grid.block_tokens,
        attended=stage.layout.tokens(STEADY).active,
        text_tokens=stage.text.layers[0][0].shape[1],
        frames=stage.grid.frames_per_block,
    )
    noisy = stage.noisy()
    alone = counting.flops_of(lambda: rollout.velocity(model, stage.text, context, noisy, 0.5))
    both = counting.flops_of(lambda: rollout.velocity(model, stage.guided, context, noisy, 0.5))
    clean = counting.flops_of(lambda: model.transformer.commit(noisy, stage.text, context))
    assert (alone, both, clean) == (closed(), closed(prompts=2), closed(is_commit=True))


def test_the_closed_form_gives_the_known_figure_of_the_1_3b_model() -> None:
    """23.527 TFLOP for 6,240 tokens alone: FlopCounterMode over diffusers' model, on meta tensors, without the text."""
    config = TransformerConfig()
    flops = counting.pass_flops(config, tokens=6240, attended=6240, text_tokens=512, frames=1)
    text_projections = 30 * 2 * 2 * 512 * 1536 * 1536 + 2 * 512 * 1536 * (4096 + 1536)
    assert flops + text_projections == pytest.approx(23.527e12, rel=1e-3)
    packed = counting.pass_flops(config, tokens=6240, attended=27_872, text_tokens=512, frames=4)
    assert packed == pytest.approx(48.25e12, rel=2e-3)


def test_early_and_late_blocks_take_the_same_operations_and_move_the_same_bytes(tmp_path: Path) -> None:
    model = demo()
    memory = 30, 300, 3600
    rows = bench.scaling(
        model,
        prompt_of(model, tmp_path),
        blocks=memory,
        policies=("packforcing", "window", "sink"),
        repeats=1,
    )
    for policy in ("packforcing", "window", "sink"):
        own = [row for row in rows if row["policy"] == policy]
        assert len({row["pass_flops"] for row in own}) == 1
        assert len({row["memory_operators"] for row in own}) == 1
        assert len({row["attended_tokens"] for row in own}) == 1
        # A bank of 256 blocks is full after block 259; until then one more key sum a block is scored.
        full = [row for row in own if row["block"] >= 300]
        assert len({row["memory_bytes_moved"] for row in full}) == 1
        assert full[0]["live_bytes"] == full[1]["live_bytes"]
    full_rows = bench.scaling(
        model, prompt_of(model, tmp_path), blocks=(30, 60), policies=("full",), repeats=1
    )
    assert full_rows[1]["pass_flops"] > 1.4 * full_rows[0]["pass_flops"]


@pytest.mark.parametrize(("frames", "attended"), [(4, 27_872), (3, 21_632)])
def test_the_memory_of_the_1_3b_model_moves_what_must_be_moved_and_no_more(
    frames: int, attended: int
) -> None:
    """At full size, on the meta device: every byte is accounted for, at block 300 as at block 500."""
    grid = Grid(frames, rows=30, cols=52, layers=30, kv_dim=1536, heads=12)
    layout = Layout(grid, mid_span="fit", trained_frames=7 * frames)
    kept = KVCache(layout, num_blocks=502, dtype=torch.bfloat16, device="meta")
    like = {"dtype": torch.bfloat16, "device": torch.device("meta")}
    full, small = (
        bench.random_kv(grid, tokens, **like)  # type: ignore[arg-type]
        for tokens in (grid.block_tokens, grid.compressed_tokens)
    )
    counts = []
    for block in (300, 500):
        bench.fill(kept, block)
        kept.context(block)  # angles are remembered from block to block
        with counting.moved_bytes() as moved:
            context = kept.context(block)
            kept.commit(block, full)
            kept.add_backup(block, small)
        assert context.is_complete
        counts.append((moved.bytes, moved.operators))
    assert counts[0] == counts[1]
    one = 1536 * 2  # bytes of a token's keys in a layer
    turns = 2 * 64 * 4  # a token's cosines and sines
    recalled, n, n_c = 16 * 182, grid.block_tokens, 182
    needed = {
        "recalled keys and values, read and written": 4 * recalled * one + recalled * turns,
        "keys of the clean block, turned": 2 * n * one,
        "its values": 2 * n * one,
        "its compressed form, and the sum of its keys": 4 * n_c * one + n_c * one,
        "scores of 256 blocks and a backup": 257 * 1536 * 4,
    }
    beside = counts[0][0] / 30 - sum(needed.values())
    assert 0 < beside < 0.005 * sum(needed.values())  # query sums, places, a block's cosines and sines
    own = layout.tokens(500)
    assert own.active == attended
    share = counts[0][0] / (5 * bench.attention_bytes(grid, attended, 2))
    assert share < 0.125  # of the five passes' attention; more than half of it is storing the block itself
    if frames == 3:  # README
        assert (f"{counts[0][0] / 1e9:.2f}", f"{share:.0%}") == ("2.98", "12%")


def test_a_policy_that_needs_more_memory_than_there_is_is_named_and_not_measured(tmp_path: Path) -> None:
    model = demo()
    (row,) = bench.scaling(
        model, prompt_of(model, tmp_path), blocks=(3600,), policies=("full",), memory_bytes=10**9
    )
    assert row["live_bytes"] > 10**9
    assert "more memory" in row["not measured"]
    assert "seconds" not in row


def test_the_buffers_of_the_memory_never_move(tmp_path: Path) -> None:
    model = demo()
    stage = bench.prepare(model, prompt_of(model, tmp_path), block=0, extra_blocks=300)
    kept = stage.cache

    def places() -> list[int]:
        return [value.data_ptr() for value in kept.tensors().values()]

    before = places()
    for block in range(40):
        kept.context(block)
        bench.fill(kept, block + 1)
        assert places() == before
    bench.fill(kept, 290)
    assert places() == before


def test_attention_allocates_its_output_and_no_copy_of_keys_or_values() -> None:
    from torch.profiler import ProfilerActivity, profile

    tokens, attended, heads, head_dim = 64, 4096, 3, 64
    buffer = torch.randn(2, 1, 2 * attended, heads, head_dim)
    query = torch.randn(1, tokens, heads, head_dim)
    keys, values = buffer[0, :, 7 : 7 + attended], buffer[1, :, 7 : 7 + attended]
    attention(query, keys, values)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        out = attention(query, keys, values)
    taken = sum(max(0, event.self_cpu_memory_usage) for event in seen.key_averages())
    # Beside the output there is work space of a tile, which does not grow with what is attended.
    assert out.nbytes <= taken < keys.nbytes // 2


def test_moved_bytes_counts_copies_and_picks_but_no_views() -> None:
    source, index = torch.zeros(100, 10), torch.tensor([3, 4])
    with counting.moved_bytes() as moved:
        source[10:20].view(-1)
    assert (moved.bytes, moved.operators) == (0, 0)
    with counting.moved_bytes() as moved:
        torch.empty(20, 10).copy_(source[:20])
    assert (moved.read, moved.written, moved.operators) == (800, 800, 1)
    with counting.moved_bytes() as moved:
        source.index_select(0, index)
    assert (moved.read, moved.written) == (80, 80)
    with counting.moved_bytes() as moved:
        torch.cat((source, source))
    assert (moved.read, moved.written) == (8000, 8000)


def test_the_stages_of_a_block_are_all_measured(tmp_path: Path) -> None:
    model = demo()
    quick = Schedule.build("euler", steps=1, shift=5.0, guidance=2.0)
    found = bench.engine(model, prompt_of(model, tmp_path), schedule=quick, repeats=2)
    assert list(found["stages"]) == [
        "select and rotate",
        "denoise",
        "clean pass",
        "decode",
        "to frames",
        "trace",
        "compress",
        "write to memory",
        "encode",
    ]
    assert all(times["n"] == 2 for times in found["stages"].values())
    assert found["passes"] == {"denoise": 1, "prompts": 2, "clean": 1}
    assert found["attended_tokens"] == 576
    window = bench.engine(
        model,
        prompt_of(model, tmp_path),
        schedule=quick,
        memory=MemoryOptions(policy="window"),
        repeats=1,
    )
    assert window["attended_tokens"] == 512


def test_a_busy_machine_is_refused_unless_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "load_average", lambda: 50.0)
    outcome = CliRunner().invoke(build_app(), ["bench", "engine"])
    assert outcome.exit_code != 0
    with pytest.raises(bench.EnvironmentProblem, match="load average 50"):
        bench.require_quiet(force=False)
    assert "upper bounds" in bench.require_quiet(force=True)
    monkeypatch.setattr(bench, "load_average", lambda: 0.1)
    assert bench.require_quiet(force=False) == ""


def test_the_command_prints_tables_or_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "load_average", lambda: 0.0)
    shown = CliRunner().invoke(
        build_app(), ["bench", "cache", "--repeats", "1", "--json", str(tmp_path / "f.json")]
    )
    assert shown.exit_code == 0, shown.output
    assert "torch.cat in every pass" in shown.output
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["schema"] == 1
    assert found["cache"]["passes"] == 5  # four steps, and the commit
    assert found["conditions"]["torch"] == torch.__version__
    kinds = found["cache"]["kv_dtypes"]
    assert (
        kinds["auto"]["error"]
        == 0
        < kinds["bf16"]["error"]
        < kinds["int8"]["error"]
        < kinds["fp8"]["error"]
        < 0.1
    )
    assert kinds["int8"]["block_bytes"] == kinds["fp8"]["block_bytes"] < kinds["auto"]["block_bytes"] / 3


def test_a_cache_without_embeddings_has_the_installed_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    installed = packages.install_folder("mine")
    installed.mkdir(parents=True)
    (installed / "packforcing.json").write_text("{}")
    (tmp_path / "fresh").mkdir()
    environment = bench._without_embeddings(str(tmp_path / "fresh"))
    assert environment["HF_HUB_CACHE"] == str(hub.cache_folder())
    monkeypatch.setenv("XDG_CACHE_HOME", environment["XDG_CACHE_HOME"])
    assert (packages.install_folder("mine") / "packforcing.json").read_text() == "{}"
    assert [p.name for p in (tmp_path / "fresh" / "packforcing").iterdir()] == ["models"]


def test_a_part_that_fails_is_named_and_the_figures_of_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_command: Any
) -> None:
    file, kept = tmp_path / "all.json", list[set[str]]()
    row = {"min": 1.0, "median": 1.0}

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no compiled frames")

    def startup(*_: object, **__: object) -> dict[str, Any]:
        kept.append(set(json.loads(file.read_text())))  # there before the next part begins
        return {"commands": {"python": row}, "not measured": []}

    monkeypatch.setattr(bench, "load_average", lambda: 0.0)
    monkeypatch.setattr(bench, "load", fails)
    monkeypatch.setattr(bench, "startup", startup)
    monkeypatch.setattr(
        "packforcing_cli.cli.bench._TABLES",
        {name: bench_command._TABLES[name] for name in ("load", "startup")},
    )
    done = run_command("bench", "all", "--json", str(file))
    assert done.code == 1
    assert "not measured: load" in done.err
    assert "packforcing bench load" in done.err
    assert "from a fresh process" in done.out
    assert kept == [{"schema", "conditions", "warning", "load"}]
    found = json.loads(file.read_text())
    assert found["load"] == {"not measured": "RuntimeError: no compiled frames"}
    assert found["startup"]["commands"] == {"python": row}
    alone = run_command("bench", "load")
    assert (alone.code, alone.out) == (1, "")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    file.unlink()
    monkeypatch.setattr(bench, "load", lambda *_, **__: {"model": "m", "weight_bytes": 0})
    monkeypatch.setattr(bench, "startup", interrupted)
    monkeypatch.setitem(bench_command._TABLES, "load", lambda _: [])
    stopped = run_command("bench", "all", "--json", str(file))
    assert stopped.code == 130
    assert "load" in json.loads(file.read_text())


def test_clocks_are_those_of_the_right_gpu_at_work_and_an_older_driver_loses_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A driver that does not know one query answers none of that call."""
    known = {
        "driver_version": "525.60",
        "clocks.sm": "1980 MHz",
        "clocks.mem": "2619 MHz",
        "power.draw": "650 W",
        "clocks_throttle_reasons.active": "0x0",
    }
    asked: list[tuple[str, bool]] = []
    busy: list[int] = []

    def nvidia_smi(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        fields = command[1].partition("=")[2].split(",")
        asked.append((command[-1] if "-i" in command else "", bool(busy)))
        if not set(fields) <= set(known):
            raise subprocess.CalledProcessError(2, command)
        return subprocess.CompletedProcess(command, 0, ", ".join(known[name] for name in fields) + "\n", "")

    @contextmanager
    def at_work(_: torch.device) -> Iterator[None]:
        busy.append(1)
        yield
        busy.clear()

    facts = SimpleNamespace(uuid="8932f937-d72c")
    monkeypatch.setattr(bench.subprocess, "run", nvidia_smi)
    monkeypatch.setattr(bench, "_kept_busy", at_work)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    assert bench._nvidia_smi(torch.device("cuda:0")) == {
        "driver": "525.60",
        "sm clock": "1980 MHz",
        "memory clock": "2619 MHz",
        "power": "650 W",
        "clock limits": "0x0",
    }
    assert asked[0] == ("", False)  # one driver for all
    assert set(asked[1:]) == {("GPU-8932f937-d72c", True)}
    known.clear()
    assert bench._nvidia_smi(torch.device("cuda:0")) == {}


def test_the_machine_is_at_work_while_clocks_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = threading.Event()
    monkeypatch.setattr(bench, "WARM_SECONDS", 0.0)
    monkeypatch.setattr(bench, "WARM_SIDE", 8)
    monkeypatch.setattr(bench, "wait_for", lambda _: waits.set())
    before = threading.active_count()
    with bench._kept_busy(torch.device("cpu")):
        assert waits.wait(60)
        waits.clear()
        assert waits.wait(60)  # still
    assert threading.active_count() == before


def test_first_frames_are_measured_on_the_device_that_is_named(
    monkeypatch: pytest.MonkeyPatch, run_command: Any
) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], *_: object) -> str:
        ran.append(command)
        if bench._PREPARE in command:
            return json.dumps({"seconds": len(ran), "how": command[5] or "beside"})
        return json.dumps({"figures": {"process_first_frame_seconds": 1.0, "first_frame_seconds": 0.5}})

    monkeypatch.setattr(bench, "load_average", lambda: 0.0)
    monkeypatch.setattr(bench, "_run", run)
    monkeypatch.setattr(bench, "_heavy_imports", lambda _: [])
    done = run_command("bench", "startup", "--device", "cpu", "--json", "-")
    found = json.loads(done.out)
    assert found["conditions"]["device"] == "cpu"
    ways = [row for name, row in found["startup"]["commands"].items() if "prompt and model" in name]
    assert [row["n"] for row in ways] == [3, 3]
    assert ways[0]["min"] != ways[1]["min"]
    videos = [command for command in ran if "generate" in command]
    assert len(videos) == 6
    assert all(command[command.index("--device") + 1] == "cpu" for command in videos)


def test_memory_of_whole_videos_is_taken_from_their_own_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of what was measured before them."""
    model, said = video_model(torch.float32), list[str]()
    generate = rollout.generate

    def made(*values: Any, **options: Any) -> Any:
        said.append("video")
        return generate(*values, **options)

    monkeypatch.setattr(bench, "forget_peak", lambda _: said.append("forget"))
    monkeypatch.setattr(rollout, "generate", made)
    memory = MemoryOptions(policy="sink", sink_blocks=1, recent_blocks=0)
    quick = Schedule.build("euler", steps=1, shift=5.0, guidance=1.0)
    bench_stream.videos(
        model, Prompt("made up", embeds(0, model.dtype)), memory=memory, schedule=quick, repeats=1
    )
    assert said == ["forget", *["video"] * 4]


def test_decoding_and_whole_videos_are_measured_both_ways() -> None:
    model = video_model(torch.float32)
    found = bench_stream.stream(
        model,
        Prompt("made up", embeds(0, model.dtype)),
        memory=MemoryOptions(sink_blocks=1, top_k=1, mid_span="block"),
        repeats=2,
    )
    assert [row["way"] for row in found["decode"]] == ["tiny VAE, channels first", "tiny VAE, channels last"]
    assert found["decode"][0]["largest_difference"] == 0
    assert found["decode"][1]["largest_difference"] < 1e-5
    video = found["video"]
    assert video["files_are_equal"]
    assert (video["from_block"], video["blocks"]) == (6, 8)
    assert video["in order"]["n"] == video["beside"]["n"] == 2
    assert all(video[way]["first_frame_seconds"] > 0 for way in ("in order", "beside"))


def test_the_wan_vae_is_decoded_in_each_way() -> None:
    wan = replace(video_model(torch.float32), codec=WanCodec(wan_module()))
    rows = bench_stream.decoding(wan, size=(64, 64), repeats=1)
    assert len({row["way"] for row in rows}) == len(rows) == 6
    assert rows[0]["largest_difference"] == 0
    assert all(row["largest_difference"] < 1e-5 for row in rows)


def test_the_core_needs_neither_pyav_nor_diffusers_nor_torchao_nor_transformers() -> None:
    """In one process: each of the four imports fails as it does where the library is absent."""
    words = [
        "--model",
        "random:wan2.1-1.3b?layers=1",
        "--size",
        "64x64",
        "--repeats",
        "1",
        "--force",
        "--json",
        "-",
    ]
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('av', 'diffusers', 'torchao', 'transformers')))\n"
        "from packforcing_cli.cli import main\n"
        "for part in ('engine', 'cache', 'stream'):\n"
        "    try:\n"
        f"        main(['bench', part, *{words!r}, '--vae', 'tiny'])\n"
        "    except SystemExit as stop:\n"
        "        assert not stop.code\n"
        f"main(['bench', 'engine', *{words!r}])\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert told.returncode == 4, told.stderr
    decoder, found = json.JSONDecoder(), []
    rest = told.stdout.strip()
    while rest:
        values, end = decoder.raw_decode(rest)
        found.append(values)
        rest = rest[end:].strip()
    engine, _, streamed = found
    assert engine["engine"]["not measured"] == ["encode: PyAV is not installed"]
    assert "encode" not in engine["engine"]["stages"]
    assert streamed["stream"]["video"] is None
    assert "the Wan VAE needs diffusers" in told.stderr
    assert "use --vae tiny" in told.stderr
