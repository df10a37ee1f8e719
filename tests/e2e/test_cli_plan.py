"""packforcing inspect-cache (the plan) and models list, as a person and as a program sees them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PAPER = (
    "inspect-cache",
    "--model",
    "wan2.1-1.3b",
    "--frames-per-block",
    "4",
    "--size",
    "832x480",
    "--seconds",
    "120",
)

# The frozen shape of `inspect-cache --json`, schema 1. A changed or lost key needs a new schema number.
PLAN_SHAPE: dict[str, Any] = {
    "schema": int,
    "model": str,
    "size": list,
    "fps": int,
    "dtype": str,
    "seconds": float,
    "exact_seconds": float,
    "frames": int,
    "blocks": int,
    "frames_per_block": int,
    "latent_frames": int,
    "memory": {
        "policy": str,
        "sink_blocks": int,
        "recent_blocks": int,
        "top_k": int,
        "bank": (int, type(None)),
        "select": str,
        "mid_span": str,
        "compressor": str,
        "compressed_context": str,
        "rope_adjustment": bool,
        "kv_dtype": str,
        "bank_memory": (int, type(None)),
        "bank_device": str,
    },
    "tokens": {
        "block": int,
        "compressed_block": int,
        "sink": int,
        "mid": int,
        "recent": int,
        "current": int,
        "active": int,
    },
    "bytes_per_token": int,
    "full_history_bytes": int,
    "stored_bytes": int,
    "bytes": {
        "stored": int,
        "current": int,
        "raw_keys": int,
        "backups": int,
        "bank": int,
        "live": int,
    },
    "capacity_bytes": {
        "stored": int,
        "current": int,
        "raw_keys": int,
        "backups": int,
        "bank": int,
        "live": int,
    },
    "partition_bytes": {"sink": int, "mid": int, "recent": int, "current": int},
    "slots": {
        "mid_span": float,
        "total": float,
        "max_distance": float,
        "trained_frames": int,
        "within_trained_range": bool,
    },
    "growth": list,
    "weight_bytes": {"transformer": int, "text_encoder": int, "vae": int, "compressor": int},
    "quantize": str,
    "quantize_text": str,
    "offload": str,
    "vae": str,
    "stages": list,
    "working_bytes_estimate": int,
    "peak_bytes_estimate": int,
    "disk_bytes_estimate": int,
    "fits": bool,
    "suggestion": str,
    "warnings": list,
}
GROWTH_SHAPE = {
    "seconds": float,
    "blocks": int,
    "full_bytes": int,
    "window_bytes": int,
    "stored_bytes": int,
    "bank_bytes": int,
}
MODELS_SHAPE = {
    "name": str,
    "kind": str,
    "title": str,
    "license": str,
    "installed": bool,
    "state": str,
    "size": list,
    "fps": int,
    "frames_per_block": int,
    "params": int,
    "size_bytes": int,
    "download_bytes": int,
    "memory_bytes": int,
    "install": str,
}


def assert_shape(values: Any, shape: dict[str, Any], where: str = "") -> None:
    assert list(values) == list(shape), where
    for name, kind in shape.items():
        if isinstance(kind, dict):
            assert_shape(values[name], kind, f"{where}.{name}")
        else:
            assert isinstance(values[name], kind), f"{where}.{name} is {values[name]!r}"


@pytest.mark.parametrize(
    "options",
    [(), ("--bank", "unlimited"), ("--policy", "full"), ("--policy", "window"), ("--select", "none")],
)
def test_the_json_is_frozen(options: tuple[str, ...], run_command: Any) -> None:
    result = run_command(*PAPER, *options, "--json")
    assert (result.code, result.err) == (0, "")
    values = json.loads(result.out)
    assert values["schema"] == 1
    assert_shape(values, PLAN_SHAPE)
    assert [stage["name"] for stage in values["stages"]] == ["text", "denoise", "decode"]
    for stage in values["stages"]:
        assert_shape(stage, {"name": str, "device_bytes": int, "host_bytes": int}, "stages")
    for point in values["growth"]:
        assert_shape(point, GROWTH_SHAPE, "growth")


def test_the_json_has_the_papers_figures(run_command: Any) -> None:
    values = json.loads(run_command(*PAPER, "--json").out)
    assert list(values["tokens"].values()) == [6240, 182, 12480, 2912, 6240, 6240, 27872]
    assert (values["bytes_per_token"], values["full_history_bytes"]) == (184320, 138018816000)
    assert (values["stored_bytes"], values["bytes"]["stored"]) == (3987210240, 3987210240)
    assert (values["blocks"], values["frames"], values["latent_frames"]) == (120, 1917, 480)


def test_the_tables_show_the_same_figures(run_command: Any) -> None:
    result = run_command(*PAPER)
    assert result.code == 0
    for text in (
        "120 blocks",
        "1,917 frames",
        "12,480",
        "2,912",
        "27,872",
        "3.99 GB",
        "138.0 GB",
        "80 in all",
    ):
        assert text in result.out
    assert "beyond the trained range of 20" in " ".join(result.out.split())
    assert "warning: the context spans 80 slots" in result.err


def test_the_plan_says_which_dtype_it_assumed(run_command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from packforcing_cli import machine

    monkeypatch.setattr(machine, "has_nvidia_driver", lambda: False)
    assert "bf16 assumed; a CPU runs fp32: --dtype fp32" in run_command(*PAPER).out
    assert "assumed" not in run_command(*PAPER, "--dtype", "bf16").out
    monkeypatch.setattr(machine, "has_nvidia_driver", lambda: True)
    assert "assumed" not in run_command(*PAPER).out


def test_every_memory_option_reaches_the_plan(run_command: Any) -> None:
    options = {
        "--policy": "packforcing",
        "--sink-blocks": "1",
        "--recent-blocks": "2",
        "--top-k": "3",
        "--bank": "7",
        "--select": "fifo",
        "--mid-span": "1/2",
        "--compressor": "hr+lr",
        "--compressed-context": "history",
        "--kv-dtype": "int8",
        "--bank-memory": "2GB",
        "--bank-device": "host",
    }
    arguments = [word for pair in options.items() for word in pair]
    values = json.loads(run_command("inspect-cache", *arguments, "--seconds", "60", "--json").out)
    assert values["memory"] == {
        "policy": "packforcing",
        "sink_blocks": 1,
        "recent_blocks": 2,
        "top_k": 3,
        "bank": 7,
        "select": "fifo",
        "mid_span": "1/2",
        "compressor": "hr+lr",
        "compressed_context": "history",
        "rope_adjustment": True,
        "kv_dtype": "int8",
        "bank_memory": 2 * 10**9,
        "bank_device": "host",
    }
    assert values["tokens"]["sink"] == values["tokens"]["block"]
    assert values["tokens"]["mid"] == 3 * values["tokens"]["compressed_block"]


@pytest.mark.parametrize(
    ("arguments", "said", "next_step"),
    [
        (["--seconds", "-5"], "--seconds -5.0: must be above 0", "--seconds 60"),
        (["--seconds", "nan"], "--seconds nan", "--seconds 60"),
        (["--seconds", "1e9"], "at most 86400", "--seconds 60"),
        (["--size", "830x480"], "multiples of 16", "832x480"),
        (["--size", "big"], "WIDTHxHEIGHT", "--size 832x480"),
        (["--size", "48x48"], "no room for a compressed token", "64x64"),
        (["--model", "wann"], "no model is named 'wann'", "models list"),
        (["--select", "best"], "--select best: must be one of", "--help"),
        (["--policy", "windows"], "did you mean window?", "--help"),
        (["--bank", "-1"], "--bank -1", "--bank 256"),
        (["--mid-span", "fit", "--sink-blocks", "19"], "fit is impossible", "--mid-span 1"),
        (["--mid-span", "9"], "at most frames_per_block 4, got 9", "--mid-span"),
        (["--recent-blocks", "0"], "recent_blocks must be at least 1", "--recent-blocks 1"),
        (["--frames-per-block", "3"], "demo is not known with 3", "--frames-per-block 4"),
        (["--dtype", "int4"], "--dtype int4", "--help"),
    ],
)
def test_wrong_input_is_one_message_with_a_next_step(
    arguments: list[str], said: str, next_step: str, run_command: Any
) -> None:
    result = run_command("inspect-cache", *arguments)
    assert (result.code, result.out) == (2, "")
    error, hint = result.err.rstrip("\n").split("\n")
    assert error.startswith("error: ")
    assert said in error
    assert next_step in hint


@pytest.mark.parametrize(
    "arguments", [["inspect-cache", "--no-such"], ["inspect-cache", "--top-k", "x"], ["nothing"]]
)
def test_wrong_usage_is_exit_code_two(arguments: list[str], run_command: Any) -> None:
    result = run_command(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "Traceback" not in result.err


def test_the_project_file_and_variables_are_read(
    run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "packforcing.toml").write_text("top_k = 3\nbank = 5\n", encoding="utf-8")
    monkeypatch.setenv("PACKFORCING_BANK", "9")
    memory = json.loads(run_command("inspect-cache", "--json").out)["memory"]
    assert (memory["top_k"], memory["bank"]) == (3, 9)
    (tmp_path / "packforcing.toml").write_text("topk = 3\n", encoding="utf-8")
    result = run_command("inspect-cache", "--json")
    assert result.code == 2
    assert "unknown setting 'topk'; the nearest known one is 'top_k'" in result.err


def test_models_list_tells_what_there_is(run_command: Any) -> None:
    result = run_command("models", "list", "--json")
    assert (result.code, result.err) == (0, "")
    values = json.loads(result.out)
    assert values["schema"] == 1
    for model in values["models"]:
        assert_shape(model, MODELS_SHAPE, model["name"])
    assert [model["name"] for model in values["models"]] == [
        "demo",
        "wan2.1-1.3b-self-forcing",
        "wan2.1-1.3b-causal-forcing",
        "wan2.1-1.3b-longlive",
        "wan2.1-1.3b",
        "wan2.1-14b",
        "taew2_1",
        "lighttaew2_1",
    ]
    table = run_command("models", "list").out
    for model in values["models"]:
        assert model["name"] in table
    assert "for planning" in table


def run_process(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "packforcing_cli", *arguments],
        capture_output=True,
        timeout=300,
        cwd=folder,
        env={**os.environ, **variables},
    )


def test_colours_are_off_when_asked(tmp_path: Path) -> None:
    done = run_process(
        "inspect-cache", "--seconds", "nan", folder=tmp_path, NO_COLOR="1", TERM="dumb", CI="1"
    )
    assert done.returncode == 2
    assert b"\x1b" not in done.stderr
    assert done.stderr.startswith(b"error: --seconds nan")


def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    command = f"'{sys.executable}' -m packforcing_cli models list --json | head -c 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.stdout == "{"
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_without_rope_adjustment_the_plan_shows_the_distance_and_warns(run_command: Any) -> None:
    done = run_command("inspect-cache", "--no-rope-adjustment", "--seconds", "60", "--json")
    values = json.loads(done.out)
    assert values["memory"]["rope_adjustment"] is False
    assert values["slots"] == {
        "mid_span": 4.0,
        "total": 240.0,
        "max_distance": 239.0,
        "trained_frames": 80,
        "within_trained_range": False,
    }
    assert "it grows with the video; use --rope-adjustment" in values["warnings"][0]
    refused = run_command("inspect-cache", "--no-rope-adjustment", "--mid-span", "1")
    assert refused.code == 2
    assert "mid_span 1 contradicts no RoPE adjustment" in refused.err
