"""packforcing generate, as a person and as a program sees it, with a tiny package of random weights."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from packforcing_cli import health, packages, planner, registry, rollout, runfolder
from packforcing_cli.cli.generate import Outcome
from packforcing_cli.compressor import Compressor, CompressorConfig
from packforcing_cli.reader import VideoReader
from packforcing_cli.registry import (
    CacheDefaults,
    CodecFactsRecord,
    Manifest,
    Schedule,
    read_manifest,
    write_package,
)
from packforcing_cli.runfolder import RunFolder
from packforcing_cli.text import build_encoder
from packforcing_cli.training.demo_text import build_demo_tokenizer, tiny_umt5_config
from packforcing_cli.transformer import TransformerConfig, WanTransformer
from packforcing_cli.vae import TinyAutoencoder, TinyAutoencoderConfig, TinyCodec

PROMPT = "a red circle"
VOCABULARY = ("a", "red", "circle", "moving", "right")

# The frozen shape of `generate --json`, schema 1. A changed or lost key needs a new schema number.
RESULT_SHAPE: dict[str, Any] = {
    "schema": int,
    "path": str,
    "prompt": str,
    "seed": int,
    "model": str,
    "device": str,
    "dtype": str,
    "size": list,
    "fps": int,
    "frames": int,
    "blocks": int,
    "seconds": float,
    "run": str,
    "interrupted": bool,
    "health": {"unhealthy": {}, "retries": {}, "ended": str},
    "warnings": list,
    "command": str,
    "figures": {
        "load_seconds": float,
        "total_seconds": float,
        "first_frame_seconds": float,
        "block_seconds_p50": float,
        "block_seconds_p95": float,
        "stall_seconds": float,
        "process_first_frame_seconds": float,
        "fps": float,
        "realtime_factor": float,
        "kv_bytes": {
            "stored": int,
            "current": int,
            "raw_keys": int,
            "backups": int,
            "bank": int,
            "live": int,
        },
        "full_cache_bytes": int,
        "peak_memory_bytes": int,
    },
}


def write_tiny(folder: Path, *, nan: bool = False, student: bool = False) -> Path:
    """A package that makes a block of noise in a few hundredths of a second.

    student: few steps, and no compressor.
    """
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=1, num_attention_heads=1, attention_head_dim=16, ffn_dim=16, text_dim=64, freq_dim=16
    )
    transformer = WanTransformer(config)
    if nan:
        torch.nn.init.constant_(transformer.proj_out.bias, torch.nan)
    codec = TinyCodec(TinyAutoencoder(TinyAutoencoderConfig.demo()))
    manifest = Manifest(
        name="tiny",
        version="0.1",
        title="Random weights",
        license="Apache-2.0",
        size=(64, 64),
        fps=16,
        trained_frames=80,
        text_length=12,
        cache=CacheDefaults(
            frames_per_block=4, sink_blocks=1, mid_span="1", compressor="lr" if student else "hr+lr"
        ),
        schedule=Schedule(kind="renoise", steps=2, shift=5.0, timesteps=(1000, 500))
        if student
        else Schedule(kind="euler", steps=1, shift=5.0, guidance=1.0),
        codec=CodecFactsRecord.of(codec),
        vocabulary=VOCABULARY,
    )
    build_demo_tokenizer(folder.parent / "tokenizer")
    write_package(
        folder,
        manifest,
        transformer=transformer,
        compressor=None if student else Compressor(CompressorConfig(dim=config.dim, widths=(4, 8, 8, 16))),
        vae=codec.module,
        text_encoder=build_encoder(tiny_umt5_config().to_dict()),
        tokenizer_dir=folder.parent / "tokenizer",
    )
    return folder


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("generate") / "tiny")


@pytest.fixture
def generate(run_command: Any, package: Path) -> Callable[..., Any]:
    """Run `packforcing generate` with the tiny package, three blocks long unless said otherwise."""

    def run(*arguments: str, prompt: str = PROMPT) -> Any:
        return run_command("generate", prompt, "--model", str(package), "--seconds", "3", *arguments)

    return run


def num_frames(path: Path) -> int:
    return sum(1 for _ in VideoReader(path))


def assert_shape(values: Any, shape: dict[str, Any], where: str = "") -> None:
    assert list(values) == list(shape), where
    for name, kind in shape.items():
        if isinstance(kind, dict):
            assert_shape(values[name], kind, f"{where}.{name}")
        else:
            assert isinstance(values[name], kind), f"{where}.{name} is {values[name]!r}"


def assert_one_message(result: Any, code: int, said: str, next_step: str) -> None:
    """One line of error and one of what to do next are the end of the talk; stdout is empty."""
    assert (result.code, result.out) == (code, ""), result.err
    assert "Traceback" not in result.err
    error, hint = result.err.rstrip("\n").split("\n")[-2:]
    assert error.startswith("error: ")
    assert said in error
    assert next_step in hint


# ----------------------------------------------------------------------------------------------- what comes out


def test_stdout_is_the_path_and_stderr_is_the_talk(generate: Any, tmp_path: Path) -> None:
    result = generate("--seed", "7", "--progress", "plain")
    assert (result.code, result.out) == (0, "a-red-circle.mp4\n")
    said = result.err.splitlines()
    assert said[0] == (
        "tiny on cpu (fp32), 64x64, seed 7; 3 s in whole blocks: 3 = 45 frames = 2.81 s at 16 fps;"
        " model: asked for; device: there is no NVIDIA driver; precision: as on every CPU"
    )
    assert said[1].startswith("block 1/3: 0:01 of 0:03, ")
    assert said[2].startswith("block 3/3: 0:03 of 0:03, ")
    assert "sink " in said[2] and "recent " in said[2] and "a full cache for this video: " in said[2]
    assert said[3].startswith("3 blocks, 45 frames (2.81 s) in ")
    assert re.search(
        r"; first frames in the file after [\d.]+ s \([\d.]+ s from the start of the command\), a block",
        said[3],
    )
    assert len(said) == 4
    reader = VideoReader(tmp_path / "a-red-circle.mp4")
    assert (num_frames(reader.path), reader.width, reader.height, int(reader.fps)) == (45, 64, 64, 16)
    assert {**reader.metadata, "model": "tiny", "prompt": PROMPT, "seed": "7"} == reader.metadata
    assert [p.name for p in tmp_path.iterdir()] == ["a-red-circle.mp4"]


def test_the_json_is_frozen(generate: Any) -> None:
    result = generate("--json", "-q", "-o", "clip")
    assert (result.code, result.err) == (0, "")
    values = json.loads(result.out)
    assert values["schema"] == 1
    assert_shape(values, RESULT_SHAPE)
    assert (values["path"], values["frames"], values["blocks"]) == ("clip.mp4", 45, 3)
    assert (values["interrupted"], values["device"], values["dtype"]) == (False, "cpu", "fp32")


def test_every_line_of_json_progress_is_an_event(generate: Any) -> None:
    result = generate("--progress", "json", prompt="a red elephant")
    events = [json.loads(line) for line in result.err.splitlines()]
    names = [event["event"] for event in events]
    assert names == ["note", "warning", "start", "block", "block", "block", "done", "note"]
    assert events[1]["text"].startswith("this model does not know: elephant. It understands: a red circle")
    assert [event["index"] for event in events[3:6]] == [0, 1, 2]
    assert set(events[6]["figures"]) == {
        "total_seconds",
        "first_frame_seconds",
        "process_first_frame_seconds",
        "block_seconds_p50",
        "block_seconds_p95",
        "stall_seconds",
    }
    assert set(events[3]) == {
        "event",
        "index",
        "replayed",
        "seconds",
        "stages",
        "eta_seconds",
        "fps",
        "kv_bytes",
        "full_cache_bytes",
        "bank_blocks",
        "recalled",
        "pinned",
        "degenerate_layers",
        "health",
        "retry",
        "device_memory_bytes",
        "host_memory_bytes",
    }
    failed = generate("--progress", "json", "--select", "best")
    (event,) = [json.loads(line) for line in failed.err.splitlines()]
    assert (failed.code, event["event"], event["exit_code"]) == (2, "error", 2)


def test_the_live_display_shows_speed_memory_and_what_was_recalled(
    generate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    result = generate("--progress", "rich", "--seconds", "5")
    assert result.out == "a-red-circle.mp4\n"
    for text in (
        "0:05 of 0:05, block 5 of 5",
        "blocks/s",
        "FPS",
        "sink ",
        "mid 2 of 3 blocks",
        "recent ",
        "a full cache for this video",
        "host ",
        "recalled",
        "0:01–0:0",
    ):
        assert text in result.err, result.err
    assert result.err.splitlines()[-1].startswith("5 blocks, 77 frames")
    assert "\x1b[3" not in result.err  # colours


def test_quiet_says_nothing_and_progress_none_only_the_frame_of_the_run(generate: Any) -> None:
    assert generate("-q").err == ""
    said = generate("--progress", "none").err.splitlines()
    assert len(said) == 2
    assert said[0].startswith("tiny on cpu")
    assert said[1].startswith("3 blocks")


def test_verbose_tells_model_memory_and_sampler(generate: Any) -> None:
    said = generate("-v", "--seconds", "1").err
    assert (
        "memory: packforcing: sink 1, recent 1, top-k 16 of a bank of 256, affinity-recent, mid-span 1"
        in said
    )
    assert "euler, 1 steps, guidance 1" in said


def test_names_come_from_the_prompt_and_never_collide(generate: Any, tmp_path: Path) -> None:
    assert [generate("-q", "--seconds", "1").out for _ in range(2)] == [
        "a-red-circle.mp4\n",
        "a-red-circle-2.mp4\n",
    ]
    (tmp_path / "videos").mkdir()
    assert generate("-q", "--seconds", "1", "-o", "videos").out == "videos/a-red-circle.mp4\n"
    assert generate("-q", "--seconds", "1", "--overwrite").out == "a-red-circle.mp4\n"


def test_the_prompt_can_come_from_standard_input(generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a red circle\n"))
    assert generate("-q", "--seconds", "1", prompt="-").out == "a-red-circle.mp4\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    assert_one_message(generate(prompt="-"), 2, "PROMPT: is empty", "packforcing generate")


def test_another_size_than_trained_is_a_warning(generate: Any) -> None:
    result = generate("--size", "96x64", "--seconds", "1", "--json")
    assert "warning: tiny was trained at 64x64; other sizes may look wrong" in result.err
    values = json.loads(result.out)
    assert (values["size"], len(values["warnings"])) == ([96, 64], 1)


# --------------------------------------------------------------------------------------------------- the plan


def test_the_command_of_a_dry_run_repeats_the_plan(generate: Any, run_command: Any, tmp_path: Path) -> None:
    options = "--size 96x64 --seconds 12.3456 --steps 3 --guidance 1.5 --crf 20 --bank unlimited --top-k 3"
    for arguments in (
        options.split(),
        ["--policy", "window", "--seed", "3"],
        ["--parity", "paper", "-o", "x y.mp4"],
    ):
        first = generate(*arguments, "--dry-run", prompt='two "red" circles')
        assert first.code == 0
        command = first.out.splitlines()[-1].removeprefix("command").strip()
        program, *words = shlex.split(command)
        assert program == "packforcing"
        assert run_command(*words, "--dry-run").out == first.out
        as_json = json.loads(run_command(*words, "--dry-run", "--json").out)
        assert (as_json["command"], as_json["fits"]) == (command, True)
        assert as_json["downloads"] == []
    assert as_json["memory"]["select"] == "affinity"
    assert as_json["memory"]["sink_blocks"] == 1  # the package's own
    assert list(tmp_path.iterdir()) == []


def test_the_command_repeats_what_variables_set(
    generate: Any, run_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {
        "CRF": "20",
        "QUANTIZE": "none",
        "METADATA": "true",
        "BANK": "unlimited",
        "FRAMES_PER_BLOCK": "4",
    }
    for name, value in wanted.items():
        monkeypatch.setenv(f"PACKFORCING_{name}", value)
    first = generate("--dry-run")
    command = first.out.splitlines()[-1].removeprefix("command").strip()
    for name in wanted:
        monkeypatch.delenv(f"PACKFORCING_{name}")
    monkeypatch.setenv("PACKFORCING_QUANTIZE", "int8")  # what the command says is stronger
    monkeypatch.setenv("PACKFORCING_METADATA", "false")
    assert run_command(*shlex.split(command)[1:], "--dry-run").out == first.out


def test_a_block_size_the_model_does_not_make_is_refused(
    generate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACKFORCING_FRAMES_PER_BLOCK", "4")
    refused = generate("--model", "random:wan2.1-1.3b?layers=1", "--dry-run")
    assert_one_message(refused, 2, "makes blocks of 3 latent frames", "doctor --config")


def test_a_bundle_is_installed_and_used(
    package: Path, run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert run_command("models", "pack", str(package), "-o", "mine.tar", "-q").code == 0
    same = ("generate", PROMPT, "--model", "mine.tar", "--seconds", "1")
    assert_one_message(
        run_command(*same, "--dry-run"), 2, "a dry run installs nothing", "models pull mine.tar"
    )
    made = run_command(*same, "--json")
    assert made.code == 0, made.err
    assert "model: installed from mine.tar; " in made.err
    assert "--model tiny" in json.loads(made.out)["command"]
    assert packages.install_folder("tiny").is_dir()


def test_a_dry_run_shows_what_the_video_will_be_and_cost(generate: Any) -> None:
    said = generate("--seconds", "60", "--dry-run").out
    for text in ("64x64, 16 fps, 957 frames = 59.81 s", "60 of 4 latent frames", "a full cache: ", "about "):
        assert text in said
    names = [line.split("  ")[0] for line in said.splitlines()]
    assert names[:5] == ["model", "video", "blocks", "seed", "memory"]
    assert names[5:9] == ["KV memory", "peak memory", "disk", "output"]
    assert names[9:] == ["downloads", "fits", "command"]


def test_a_prompt_that_looks_like_an_option_is_repeated_safely(package: Path, run_command: Any) -> None:
    first = run_command("generate", "--model", str(package), "--dry-run", "--seed", "1", "--", "-x ray")
    words = shlex.split(first.out.splitlines()[-1].removeprefix("command"))[1:]
    assert words[-2:] == ["--", "-x ray"]
    assert run_command(words[0], "--dry-run", *words[1:]).out == first.out


def test_the_plan_of_a_folder_has_the_bytes_of_the_live_cache(
    generate: Any, run_command: Any, package: Path
) -> None:
    for options in ([], ["--top-k", "2", "--compressor", "identity"], ["--policy", "window"]):
        arguments = ("--model", str(package), "--seconds", "6", *options, "--json")
        plan = json.loads(run_command("inspect-cache", *arguments, "--dtype", "fp32").out)
        made = json.loads(run_command("generate", PROMPT, *arguments, "-o", "a.mp4", "--overwrite").out)
        assert plan["capacity_bytes"] == made["figures"]["kv_bytes"]  # after the last block
        dry = json.loads(run_command("generate", PROMPT, *arguments, "--dry-run").out)
        assert (dry["capacity_bytes"], dry["memory"]) == (plan["capacity_bytes"], plan["memory"])
    assert plan["memory"]["sink_blocks"] == 1  # the package's own
    assert plan["memory"]["compressor"] == "hr+lr"


def test_a_plan_needs_no_torch_without_an_nvidia_driver(package: Path, tmp_path: Path) -> None:
    arguments = ["generate", PROMPT, "--model", str(package), "--device", "cpu"]
    code = (
        "import sys\n"
        "from packforcing_cli import planner\n"
        "from packforcing_cli.cli import main\n"
        "memory = int(sys.argv.pop(1))\n"
        "planner.host_machine = lambda folder=None: planner.Machine(memory)\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n"
        "    assert 'torch' not in sys.modules\n    raise\n"
    )
    for memory, more, expected in (
        ("99999999999", ["--dry-run"], 0),
        ("99999999999", ["--size", "70x64"], 2),
        ("99999999999", ["--guidance", "nan"], 2),
        ("1000", [], 5),
    ):
        command = [sys.executable, "-c", code, memory, *arguments, *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert done.returncode == expected, done.stderr


def test_quantized_linears_make_a_video_and_are_part_of_the_command(generate: Any, tmp_path: Path) -> None:
    options = ("--quantize", "int8", "--quantize-text", "int8", "--dtype", "bf16", "--seed", "1")
    result = generate(*options, "-o", "a.mp4")
    assert result.code == 0
    assert "tiny on cpu (bf16 with int8 linears), 64x64" in result.err
    assert "precision: asked for" in result.err
    assert num_frames(tmp_path / "a.mp4") == 45
    dry = generate(*options, "--dry-run")
    assert "--quantize int8 --quantize-text int8" in dry.out.splitlines()[-1]


def test_auto_fit_makes_the_change_and_says_so(generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    long = ("--seconds", "20000", "--policy", "full", "--dry-run", "--json")
    need = json.loads(generate("--seconds", "20000", "--dry-run", "--json").out)["peak_bytes_estimate"]
    monkeypatch.setattr(planner, "host_machine", lambda folder=None: planner.Machine(2 * need, 10**12))
    assert json.loads(generate(*long).out)["fits"] is False
    values = json.loads(generate(*long, "--auto-fit").out)
    assert (values["fits"], values["memory"]["policy"]) == (True, "packforcing")
    assert values["warnings"][0].startswith("auto-fit: --policy packforcing; as asked about ")
    assert "--policy packforcing" in values["command"]
    assert "--auto-fit" not in values["command"]
    monkeypatch.setattr(planner, "host_machine", lambda folder=None: planner.Machine(1000))
    assert_one_message(generate("--auto-fit"), 5, "of memory are needed", "another machine")


def test_the_peak_of_every_stage_is_shown(generate: Any, package: Path, run_command: Any) -> None:
    (line,) = [line for line in generate("--dry-run").out.splitlines() if line.startswith("peak memory")]
    assert line.startswith("peak memory  about ")
    assert ": text " in line and ", denoise " in line and ", decode " in line
    said = run_command("inspect-cache", "--model", str(package), "--offload", "all").out
    assert "Memory by stage" in said
    assert "host memory" in said


# ------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("arguments", "said", "next_step"),
    [
        (["--seconds", "-5"], "--seconds -5.0: must be above 0", "--seconds 60"),
        (["--seconds", "0"], "--seconds 0.0: must be above 0", "--seconds 60"),
        (["--seconds", "nan"], "--seconds nan", "--seconds 60"),
        (["--seconds", "1e9"], "at most 86400", "--seconds 60"),
        (["--size", "70x64"], "multiples of 16", "tiny was made for 64x64"),
        (["--select", "best"], "--select best: must be one of", "--help"),
        (["--policy", "windows"], "did you mean window?", "--help"),
        (["--parity", "papers"], "--parity papers: must be paper", "--help"),
        (["--dtype", "int4"], "--dtype int4", "--help"),
        (["--device", "tpu"], "--device tpu: is unknown", "cuda:1"),
        (["--progress", "jsn"], "did you mean json?", "--progress plain"),
        (["--guidance", "nan"], "--guidance nan", "--help"),
        (["--seed", "-1"], "--seed -1", "--help"),
        (["--crf", "99"], "--crf 99", "18 looks lossless"),
        (["--vae", "wan"], "there is no 'wan'", "Leave --vae out"),
        (["--quantize", "int4"], "--quantize int4: must be one of none, int8", "--help"),
        (["--quantize-text", "fp8"], "--quantize-text fp8: must be one of none, int8", "--help"),
        (["--offload", "some"], "--offload some: must be one of none, text, all", "--help"),
        (["--offload", "all"], "keeps weights off a GPU, and the model runs on the CPU", "--quantize int8"),
        (["--vae-latents", "0"], "--vae-latents 0: ", "--help"),
        (["--vae-latents", "2"], "only the Wan VAE decodes in portions", "Leave --vae-latents away"),
        (["-o", "no/such/a.mp4"], "the folder no/such does not exist", "mkdir -p no/such"),
        (["-o", "a.avi"], "cannot write a video to a.avi", "ends in .mp4"),
        (["-o", "-", "--json"], "cannot both go to standard output", "Leave --json away"),
        (["-o", "/dev/null/a.mp4"], "/dev/null is not a folder", "-o"),
        (["--model", "dema"], "no model is named 'dema'; did you mean demo", "models list"),
        (["--model", "wan2.1-1.3b"], "is a family of models", "--model demo"),
    ],
)
def test_wrong_input_is_one_message_with_a_next_step(
    arguments: list[str], said: str, next_step: str, generate: Any, tmp_path: Path
) -> None:
    assert_one_message(generate(*arguments), 2, said, next_step)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("student") / "tiny", student=True)


@pytest.mark.parametrize(
    ("arguments", "said", "next_step"),
    [
        (["--guidance", "3"], "guidance 3 does not work with tiny: it is a few-step student", "--guidance"),
        (["--steps", "8"], "it was trained for 2 steps, not 8", "--steps"),
        (["--compressor", "hr"], "has no trained HR branch, which --compressor hr needs", "--compressor lr"),
        (["--compressor", "hr+lr"], "has no trained HR branch", "--compressor lr"),
        (["--vae", "wan"], "there is no 'wan'", "Leave --vae out"),
    ],
)
def test_what_a_package_cannot_do_is_refused_before_anything_is_loaded(
    arguments: list[str],
    said: str,
    next_step: str,
    student: Path,
    run_command: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "open_model", lambda *_, **__: 1 / 0)
    for more in ([], ["--dry-run"]):
        result = run_command("generate", PROMPT, "--model", str(student), *arguments, *more)
        assert_one_message(result, 2, said, next_step)


def test_a_few_step_package_without_a_compressor_generates(student: Path, run_command: Any) -> None:
    same = ("--steps", "2", "--guidance", "1", "--compressor", "lr")
    assert run_command("generate", PROMPT, "--model", str(student), "--seconds", "5", *same, "-q").code == 0


LR_PATH = "no trained compressor: old blocks are kept by the training-free LR path"


def test_a_model_without_a_trained_compressor_says_what_keeps_old_blocks(
    student: Path, package: Path, run_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("packforcing_cli.cli.generate.run_job", lambda *_, **__: Outcome(None, 0.0, 0))
    assert run_command("generate", PROMPT, "--model", str(student)).err.count(LR_PATH) == 1
    for other in (["--compressor", "none"], ["--compressor", "pool"], ["--policy", "window"]):
        assert LR_PATH not in run_command("generate", PROMPT, "--model", str(student), *other).err
    assert LR_PATH not in run_command("generate", PROMPT, "--model", str(package)).err
    with_weights = ["--compressor", str(package / "compressor")]
    assert LR_PATH not in run_command("generate", PROMPT, "--model", str(student), *with_weights).err


def test_a_compressor_may_be_the_name_of_an_installed_package(
    student: Path, package: Path, run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(package, packages.install_folder("mine"))
    plan = run_command(
        "generate", PROMPT, "--model", str(student), "--compressor", "mine", "--dry-run", "--json"
    )
    assert plan.code == 0, plan.err
    assert json.loads(plan.out)["weight_bytes"]["compressor"] > 0
    wrong = run_command("generate", PROMPT, "--model", str(student), "--compressor", "mien", "--dry-run")
    assert_one_message(wrong, 2, "--compressor mien: must be one of", "--compressor")


def test_compressor_none_forgets_old_blocks(generate: Any) -> None:
    plan = json.loads(generate("--compressor", "none", "--dry-run", "--json").out)
    assert plan["tokens"]["mid"] == plan["bytes"]["bank"] == 0
    assert generate("--compressor", "none", "-q").code == 0


def test_a_compressor_of_another_package_is_used_and_recorded(
    student: Path, package: Path, run_command: Any, tmp_path: Path
) -> None:
    same = ("--model", str(student), "--compressor", str(package / "compressor"))
    result = run_command("generate", PROMPT, *same, "--seconds", "5", "--seed", "1", "--json")
    assert result.code == 0, result.err
    made = json.loads(result.out)
    assert f"--compressor {package / 'compressor'}" in made["command"]
    with RunFolder.open(runfolder.find(made["run"])) as run:
        assert run.record.must["weights of compressor"] == read_manifest(package).part_hash("compressor")
        assert run.record.must["compressor"] == "hr+lr"


def test_a_compressor_that_does_not_fit_is_refused_before_anything_is_loaded(
    student: Path, run_command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(registry, "open_model", lambda *_, **__: 1 / 0)
    result = run_command("generate", PROMPT, "--model", str(student), "--compressor", "demo")
    assert_one_message(result, 7, "tiny has width 16", "--compressor lr")
    (tmp_path / "empty").mkdir()
    result = run_command("generate", PROMPT, "--model", str(student), "--compressor", "empty")
    assert_one_message(result, 7, "empty is no compressor", "--compressor")


def test_an_empty_prompt_is_refused(generate: Any) -> None:
    assert_one_message(generate(prompt=" "), 2, "is empty", 'packforcing generate "a red circle')


def test_existing_outputs_are_refused(generate: Any, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"mine")
    assert_one_message(generate("-o", "a.mp4"), 2, "a.mp4 exists", "--overwrite")
    (tmp_path / "b.part.mp4").write_bytes(b"mine")
    assert_one_message(generate("-o", "b.mp4"), 2, "an interrupted run left it", "--overwrite")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.part.mp4").read_bytes() == b"mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_writable_is_refused(generate: Any, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert_one_message(generate("-o", "locked/a.mp4"), 2, "is not writable", "-o")


def test_fp8_on_a_cpu_is_an_environment_problem(generate: Any) -> None:
    for more in ([], ["--dry-run"]):
        result = generate("--quantize", "fp8", "--device", "cpu", *more)
        assert_one_message(result, 4, "needs an NVIDIA GPU with fp8 products", "--quantize int8")


def test_a_gpu_that_is_not_there_is_an_environment_problem(generate: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert_one_message(generate("--device", "cuda"), 4, "sees no CUDA GPU", "--device cpu")


def test_a_missing_or_damaged_package_is_bad_weights(run_command: Any, package: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run_command("generate", PROMPT, "--model", "empty")
    assert_one_message(result, 7, "is not a model package", "--model demo")
    copy = tmp_path / "copy"
    for path in package.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(package)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    weights = next((copy / "transformer").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    result = run_command("generate", PROMPT, "--model", str(copy))
    assert_one_message(result, 7, "is damaged: its sha256 is", "Get the package again")
    assert not list(tmp_path.glob("*.mp4"))


# ------------------------------------------------------------------------------------------ failures on the way


def test_a_model_that_makes_nan_fails_with_one_message(
    run_command: Any, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    broken = write_tiny(tmp_path_factory.mktemp("nan") / "tiny", nan=True)
    result = run_command("generate", PROMPT, "--model", str(broken))
    assert_one_message(result, 1, "block 0 came out as NaN", "--dtype fp32")
    assert list(tmp_path.iterdir()) == []


def test_nan_in_a_later_block_keeps_what_was_made(
    generate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = health.require_finite
    monkeypatch.setattr(health, "require_finite", lambda x, i: check(x / 0 if i == 2 else x, i))
    result = generate()
    assert_one_message(
        result, 1, "block 2 came out as NaN", "What was made so far plays: a-red-circle.part.mp4"
    )
    assert num_frames(tmp_path / "a-red-circle.part.mp4") == 29


def test_a_full_disk_keeps_what_was_made(
    generate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = os.write, []

    def write_some(fd: int, data: Any) -> int:
        if len(data) > 1000:  # a block, not a line of talk
            written.append(len(data))
        if len(written) > 7:  # run.json is the first, then a block is written twice, to run folder and video
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr(os, "write", write_some)
    result = generate("--seconds", "8")
    monkeypatch.undo()
    assert_one_message(result, 6, "the disk is full", "plays: a-red-circle.part.mp4")
    assert num_frames(tmp_path / "a-red-circle.part.mp4") > 0
    assert not (tmp_path / "a-red-circle.mp4").exists()


def test_what_does_not_fit_is_refused_with_what_would(
    generate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = ("--seconds", "20000")
    fits = json.loads(generate(*long, "--dry-run", "--json").out)["peak_bytes_estimate"]
    machine = planner.Machine(2 * fits, 10**12)
    monkeypatch.setattr(planner, "host_machine", lambda folder=None: machine)
    result = generate(*long, "--policy", "full")
    assert_one_message(result, 5, "of memory are needed and this machine has", "Try --policy packforcing.")
    monkeypatch.setattr(planner, "host_machine", lambda folder=None: planner.Machine(10**12, 1000))
    assert_one_message(generate(), 6, "of disk are needed", "--output")
    dry = generate("--dry-run")
    assert dry.code == 0
    assert "fits         no" in dry.out
    assert list(tmp_path.iterdir()) == []


def test_memory_that_runs_out_says_what_would_fit(
    generate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = health.require_finite

    def run_out(x: torch.Tensor, i: int) -> None:
        if i == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        check(x, i)

    monkeypatch.setattr(health, "require_finite", run_out)
    result = generate("--policy", "full", "--seconds", "5000")
    assert_one_message(result, 5, "the memory of this machine ran out", "Try --policy packforcing")
    assert "plays: a-red-circle.part.mp4" in result.err
    assert num_frames(tmp_path / "a-red-circle.part.mp4") == 29


def test_a_failure_nobody_foresaw_is_one_line_and_keeps_what_was_made(
    generate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "open_model", lambda *_, **__: 1 / 0)
    result = generate()
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("unexpected error: ZeroDivisionError")
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- signals


def whole_blocks(path: Path) -> int:
    """Number of blocks in a file, which must hold nothing but whole ones."""
    blocks, rest = divmod(num_frames(path) + 3, 16)
    assert rest == 0
    return blocks


def send_in_block(monkeypatch: pytest.MonkeyPatch, block: int, number: int, times: int = 1) -> None:
    """Let a signal reach this process while a block is denoised."""
    check = health.require_finite

    def checked(x: torch.Tensor, i: int) -> None:
        check(x, i)
        for _ in range(times if i == block else 0):
            signal.raise_signal(number)

    monkeypatch.setattr(health, "require_finite", checked)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_finishes_block_and_file(
    number: signal.Signals, code: int, generate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_in_block(monkeypatch, 2, number)
    result = generate("--seconds", "60", "--json", "--seed", "5", "--no-run")
    assert result.code == code
    values = json.loads(result.out)
    assert (values["interrupted"], values["blocks"], values["frames"]) == (True, 3, 45)
    last = result.err.splitlines()[-1]
    assert last.startswith(
        "Stopped after 3 of 60 blocks. The whole video: packforcing generate 'a red circle' "
    )
    assert "--seed 5" in last
    assert last.endswith(" --overwrite")
    assert whole_blocks(tmp_path / "a-red-circle.mp4") == 3
    assert [p.name for p in tmp_path.iterdir()] == ["a-red-circle.mp4"]
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_a_signal_in_the_last_block_changes_nothing(generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    send_in_block(monkeypatch, 2, signal.SIGINT)
    result = generate("--json")
    assert result.code == 0
    assert json.loads(result.out)["interrupted"] is False


def test_the_second_signal_stops_at_once_and_the_part_plays(
    generate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_in_block(monkeypatch, 2, signal.SIGINT, times=2)
    result = generate("--seconds", "60", "--no-run")
    assert (result.code, result.out) == (130, "")
    said = result.err.splitlines()[-2:]
    assert said[0] == "Stopped at once. What was made so far plays: a-red-circle.part.mp4"
    assert said[1].startswith("The whole video: packforcing generate 'a red circle' ")
    assert whole_blocks(tmp_path / "a-red-circle.part.mp4") == 2
    assert not (tmp_path / "a-red-circle.mp4").exists()


def test_a_signal_while_the_model_is_loaded_stops_at_once(
    generate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "open_model", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    result = generate()
    assert (result.code, result.out) == (143, "")
    assert "Stopped at once. Nothing was written." in result.err
    assert list(tmp_path.iterdir()) == []


def start(package: Path, folder: Path) -> subprocess.Popen[str]:
    """`packforcing generate` in a process of its own, which has finished its first block."""
    long = ("--seconds", "6000", "--progress", "plain", "-o", "v.mp4")
    process = subprocess.Popen(
        [sys.executable, "-m", "packforcing_cli", "generate", PROMPT, "--model", str(package), *long],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("block 1/"):
            return process
    raise AssertionError(f"ended with {process.wait()} before the first block")


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    assert "Traceback" not in err
    return process.returncode, out, err


def test_ctrl_c_from_outside_leaves_a_finished_file(package: Path, tmp_path: Path) -> None:
    process = start(package, tmp_path)
    process.send_signal(signal.SIGINT)
    code, out, err = end(process)
    assert (code, out) == (130, "v.mp4\n")
    assert "Stopping after this block; Ctrl-C once more stops at once." in err
    assert " of 6000 blocks. To go on: packforcing resume 2" in err.splitlines()[-1]
    assert whole_blocks(tmp_path / "v.mp4") >= 1
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


def test_after_kill_9_the_part_plays(package: Path, tmp_path: Path) -> None:
    process = start(package, tmp_path)
    part = tmp_path / "v.part.mp4"
    deadline = time.monotonic() + 60
    for _ in range(2):  # when the second block begins the first one is whole
        size = part.stat().st_size
        while part.stat().st_size == size and time.monotonic() < deadline:
            time.sleep(0.01)
    process.kill()
    assert end(process)[:2] == (-signal.SIGKILL, "")
    assert whole_blocks(part) >= 1


# -- the guard --------------------------------------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch, block: int, attempts: int) -> None:
    """The first so many attempts at a block come out black."""
    look = rollout.to_uint8
    denoise, state = rollout.denoise_block, {"bad": False}

    def spoilt(*args: Any, **options: Any) -> torch.Tensor:
        state["bad"] = options["block"] == block and options["retry"] < attempts
        return denoise(*args, **options)

    monkeypatch.setattr(rollout, "denoise_block", spoilt)
    monkeypatch.setattr(rollout, "to_uint8", lambda pixels, *to: look(pixels, *to) * (not state["bad"]))


def test_guard_stop_ends_the_video_with_a_file_and_the_commands_to_go_on(
    generate: Any, run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 2, 2)
    stopped = generate("--guard", "stop", "--json", "--run", "run")
    assert stopped.code == 1
    values = json.loads(stopped.out)
    assert (values["blocks"], values["frames"], values["interrupted"]) == (2, 29, True)
    assert values["health"]["ended"].startswith("block 2 is not healthy: frozen, black")
    assert num_frames(tmp_path / "a-red-circle.mp4") == 29
    said = stopped.err.splitlines()[-1]
    assert "--guard stop: block 2 is not healthy" in said
    retry, branch = (shlex.split(command.split(";")[0]) for command in said.split("packforcing ")[1:])
    done = run_command(*retry, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["health"] == {"unhealthy": {}, "retries": {"2": 2}, "ended": ""}
    assert "made again: block 2 (0:02) 2 times" in done.err
    assert num_frames(tmp_path / "a-red-circle.mp4") == 45
    spoil(monkeypatch, 2, 0)
    branched = run_command(*branch, "-o", "branch.mp4")
    assert branched.code == 0, branched.err
    assert num_frames(tmp_path / "branch.mp4") == 45


def test_guard_warn_says_what_is_wrong_at_once_and_at_the_end(
    generate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 1, 9)
    result = generate("--progress", "plain", "-v")
    assert result.code == 0
    told = [line for line in result.err.splitlines() if line.startswith("warning:")]
    assert told[0].startswith("warning: block 1 (0:01): frozen and black")
    assert told[-1].startswith("warning: not healthy: block 1 (0:01) frozen and black")
    retried = generate("--progress", "json", "--guard", "retry", "--overwrite")
    events = [json.loads(line) for line in retried.err.splitlines()]
    assert [e["retry"] for e in events if e["event"] == "block"] == [0, 2, 0]
    assert "black" in next(e for e in events if e["event"] == "block" and e["index"] == 1)["health"]


def test_an_unknown_guard_is_refused(generate: Any) -> None:
    assert_one_message(generate("--guard", "retyr"), 2, "did you mean retry?", "--guard")


def test_the_guard_may_stand_in_a_file(
    generate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "packforcing.toml").write_text('guard = "stop"\n')
    spoil(monkeypatch, 0, 9)
    assert_one_message(generate(), 1, "block 0 is not healthy", "--guard retry")
