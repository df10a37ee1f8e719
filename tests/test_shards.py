"""Weights shared out among two processes: the same curve as in one, checkpoints that survive a kill, failures."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from clips import write_clip
from safetensors.torch import load_file
from tiny import randomise

from packforcing_cli import registry
from packforcing_cli.catalog import DEMO_FOLDER
from packforcing_cli.compressor import Compressor, CompressorConfig
from packforcing_cli.errors import UsageError, WeightsError
from packforcing_cli.training import data, estimate, finetune, loop, recipes, self_forcing, shards
from packforcing_cli.training.data import EncodedData, Wanted
from packforcing_cli.training.recipe_kinds import Finetune
from packforcing_cli.transformer import TransformerConfig, WanTransformer

torch.set_num_threads(1)
KILLED_AT, STEPS = 3, 4

TUNED = {
    "items": 2,
    "checkpointing": True,
    "train.steps": STEPS,
    "train.warmup": 1,
    "train.learning_rate": 1e-3,
    "train.evaluate_every": 1000,
    "train.threads": 1,
    "data.held_out": 0.0,
    "samples.every": 0,
}
SAMPLED = {
    "train.evaluate_every": 4,
    "samples.every": 4,
    "samples.count": 1,
    "samples.seconds": 1.0,
    "sampling.steps": 1,
}
FORCED = {
    "rollout.timesteps": [1000, 500],
    "rollout.blocks": 4,
    "rollout.max_prefix": 1,
    "rollout.sink_blocks": [1],
    "critic_updates": 1,
    "batch": 2,
    "train.steps": 2,
    "train.compressor_alone": 1,
    "train.average_start": 1,
    "train.learning_rate": 1e-3,
    "train.checkpointing": True,
    "samples.every": 2,
    "samples.count": 1,
    "samples.seconds": 1.0,
}

WORKER = """
import errno, json, os, shutil, signal, sys
from pathlib import Path

import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from packforcing_cli.training import finetune, loop, recipes, self_forcing
from packforcing_cli.training.data import EncodedData

torch.set_num_threads(1)
rank = int(os.environ["RANK"])
given = json.loads(Path("given.json").read_text("utf-8"))
encoded = EncodedData.open(Path(given["data"]))
finetune.EVALUATED_ITEMS = 1
loop.Workers.stop = lambda self: None  # one group for all the runs
said = {}


def tune(out, name="finetune-long", **changes):
    settings = [f"{key}={json.dumps(value)}" for key, value in (given["tuned"] | changes).items()]
    chosen = recipes.load(name, settings)
    return finetune.train(chosen, Path(out), encoded, share=True, log_every=1, **options)


write = HuggingFaceStorageWriter.write_data


def dies(self, plan, planner):
    if rank and KILLED in str(self.path):
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, plan, planner)


KILLED = f"{given['killed_at']:07d}"
options = {}
often = {"train.checkpoint_minutes": 1e-9}
if sys.argv[1] == "die":
    HuggingFaceStorageWriter.write_data = dies
    tune("broken", **often)
if rank == 0:
    said["after the kill"] = sorted(path.name for path in Path("broken/checkpoints").iterdir())
tune("broken", **often)
tune("whole", **given["sampled"])
if rank == 0:
    shutil.copytree("one/checkpoints", "taken/checkpoints")
loop.Workers.start().any_wants(False)
tune("taken")
tune("adapters", "finetune-lora", **given["adapters"])
tune("alone", **given["alone"])

settings = [f"{key}={json.dumps(value)}" for key, value in given["forced"].items()]
self_forcing.train(recipes.load("self-forcing-demo", settings), Path("forced"), share=True)


def full(self, plan, planner):
    if rank:
        raise OSError(errno.ENOSPC, "No space left on device")
    return write(self, plan, planner)


HuggingFaceStorageWriter.write_data = full
try:
    tune("full", **{"train.steps": 1})
except OSError as error:
    said["full"] = [error.errno, sorted(path.name for path in Path("full/checkpoints").iterdir())]
HuggingFaceStorageWriter.write_data = write

load = EncodedData.load


def broken(self, scene, blocks):
    latents, lr = load(self, scene, blocks)
    return latents * (float("nan") if rank else 1.0), lr


EncodedData.load = broken
try:
    tune("nan", **{"train.steps": 1})
except Exception as error:
    said["nan"] = [type(error).__name__, str(error)]
Path(f"said{rank}.json").write_text(json.dumps(said), "utf-8")
"""


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def curve(run: Path, name: str = "loss") -> dict[int, float]:
    return {line["step"]: line[name] for line in metrics(run) if name in line}


def tune(out: Path, encoded: EncodedData, settings: dict[str, Any], name: str = "finetune-long") -> Finetune:
    chosen = recipes.load(name, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    assert isinstance(chosen, Finetune)
    finetune.train(chosen, out, encoded, log_every=1)
    return chosen


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> EncodedData:
    """Two clips of five blocks for a small model beside them, `small`."""
    folder = tmp_path_factory.mktemp("shards")
    transformer = WanTransformer(
        TransformerConfig(
            num_layers=2, num_attention_heads=1, attention_head_dim=24, ffn_dim=32, text_dim=64, freq_dim=16
        )
    )
    compressor = Compressor(CompressorConfig(dim=24, widths=(4, 4, 6, 8)))
    randomise(transformer, 1)
    randomise(compressor, 2)
    schedule = registry.Schedule(kind="euler", steps=8, shift=5.0, guidance=2.0)
    manifest = registry.read_manifest(DEMO_FOLDER).model_copy(
        update={"name": "small", "schedule": schedule, "flow_schedule": None}
    )
    registry.write_package(
        folder / "small", manifest,
        transformer=transformer, compressor=compressor, base=DEMO_FOLDER, dtype=torch.float32,
    )  # fmt: skip
    for n in range(2):
        write_clip(folder / "clips" / f"{n}.mp4", frames=77, seed=n, caption=f"a square number {n}")
    source = registry.open_model(folder / "small", device="cpu")
    wanted = Wanted.by(source.manifest, source.folder, scene_seconds=24.0)
    return data.encode(folder / "clips", folder / "encoded", source, wanted)


@pytest.fixture(scope="module")
def runs(encoded: EncodedData) -> Path:
    """Runs of one process, and the same of two, the first of which is killed while it saves."""
    folder = encoded.folder.parent
    prompts = folder / "prompts.txt"
    prompts.write_text("a red square moving left on a blue background\na blue circle\n", "utf-8")
    tuned = TUNED | {"model": str(folder / "small")}
    forced = FORCED | {"student": str(folder / "small"), "teacher": str(folder / "small")}
    forced |= {"prompts": str(prompts)}
    adapters = {"rank": 2, "train.steps": 2}
    alone = {"train_transformer": False, "train.steps": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "EVALUATED_ITEMS", 1)
        tune(folder / "one", encoded, tuned | SAMPLED)
        tune(folder / "one adapters", encoded, tuned | adapters, "finetune-lora")
        tune(folder / "one alone", encoded, tuned | alone)
    recipe = recipes.load("self-forcing-demo", [f"{k}={json.dumps(v)}" for k, v in forced.items()])
    assert isinstance(recipe, recipes.SelfForcing)
    self_forcing.train(recipe, folder / "one forced")
    given = {"data": str(encoded.folder), "tuned": tuned, "forced": forced, "killed_at": KILLED_AT}
    given |= {"adapters": adapters, "alone": alone, "sampled": SAMPLED}
    (folder / "given.json").write_text(json.dumps(given), "utf-8")
    (folder / "worker.py").write_text(WORKER, "utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    group = shared | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dying = [
        subprocess.Popen(
            [sys.executable, "worker.py", "die"],
            cwd=folder,
            env=group | {"RANK": str(rank)},
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    assert dying[1].wait(timeout=300) == -signal.SIGKILL
    assert dying[0].wait(timeout=300) != 0  # its partner is gone
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    done = subprocess.run(
        [*torchrun, "worker.py", "go on"],
        cwd=folder, env=shared, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def said(runs: Path, rank: int) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((runs / f"said{rank}.json").read_text("utf-8"))
    return values


def weights_of(run: Path) -> dict[str, bytes]:
    return {p.parent.name: p.read_bytes() for p in (run / "package").rglob("*.safetensors")}


def test_two_processes_that_share_the_weights_follow_the_curve_of_one(runs: Path) -> None:
    """With activation checkpointing; the figures of the averaged weights, too."""
    assert list(curve(runs / "one")) == [1, 2, 3, 4]
    for name in ("loss", "norm"):
        assert curve(runs / "whole", name) == pytest.approx(curve(runs / "one", name), rel=1e-5, abs=1e-3)
    assert curve(runs / "whole") == pytest.approx(curve(runs / "one"), rel=1e-5)
    figures = [
        [line["trained clips"] for line in metrics(runs / run) if line.get("event") == "evaluate"]
        for run in ("one", "whole")
    ]
    assert len(figures[0]) == 1
    for one, two in zip(*figures, strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    for run in ("one", "whole"):
        names = sorted(path.name for path in (runs / run / "samples").iterdir())
        assert names == ["0000000-0.mp4", "0000004-0.mp4", "before-after-0.mp4"]


def test_adapters_and_the_compressor_alone_follow_the_curve_of_one(runs: Path) -> None:
    """Without a trained transformer an item may reach nothing that is trained in one process, and does in the other."""
    for name in ("adapters", "alone"):
        assert len(curve(runs / name)) == 2
        assert curve(runs / name) == pytest.approx(curve(runs / f"one {name}"), rel=1e-5)


def test_self_forcing_that_shares_the_weights_follows_the_curve_of_one(runs: Path) -> None:
    for name in ("critic", "student", "gradient", "distance"):
        one, two = curve(runs / "one forced", name), curve(runs / "forced", name)
        assert list(one) == [1, 2]
        assert two == pytest.approx(one, rel=1e-5)
    for run in ("one forced", "forced"):
        names = sorted(path.name for path in (runs / run / "samples").iterdir())
        assert names == ["0000000-0.mp4", "0000002-0.mp4", "before-after-0.mp4"]
        figures = curve(runs / run, "samples")
        assert list(figures) == [0, 2] and {"motion", "words", "colour"} <= set(figures[2])  # type: ignore[call-overload]
    written = [
        load_file(next((runs / run / "package").glob("transformer/*.safetensors")))
        for run in ("one forced", "forced")
    ]
    for name, value in written[0].items():
        torch.testing.assert_close(written[1][name], value, rtol=1e-2, atol=1e-3)  # bfloat16


def test_a_run_killed_while_it_saves_goes_on_and_equals_the_unbroken_one(runs: Path) -> None:
    names = said(runs, 0)["after the kill"]
    assert [name for name in names if not name.startswith(".")] == ["step-0000001", "step-0000002"]
    starts = [line["step"] for line in metrics(runs / "broken") if line.get("event") == "start"]
    assert starts == [0, KILLED_AT - 1]
    assert curve(runs / "broken") == curve(runs / "whole")
    assert weights_of(runs / "broken") == weights_of(runs / "whole")
    kept = sorted(path.name for path in (runs / "broken" / "checkpoints").iterdir())
    assert kept == [f"step-{STEPS - 1:07d}", f"step-{STEPS:07d}"]
    last = runs / "broken" / "checkpoints" / kept[-1]
    for file in last.glob("*.safetensors"):
        mine, theirs = load_file(file), load_file(runs / "whole" / "checkpoints" / kept[-1] / file.name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], value) for name, value in theirs.items())


def test_one_process_reads_the_checkpoint_of_two_and_two_that_of_one(
    runs: Path, encoded: EncodedData
) -> None:
    assert weights_of(runs / "taken") == weights_of(runs / "one")
    chosen = recipes.load("finetune-long", [f'model="{runs / "small"}"'])
    assert isinstance(chosen, Finetune)
    states = []
    for run in ("one", "whole"):
        source = registry.open_model(runs / "small", device="cpu", dtype=torch.float32)
        models = finetune.load_models(chosen, source, torch.device("cpu"))
        modules = finetune.trained_modules(models, chosen)
        state = loop.TrainingState(
            modules, loop.MovingAverage(modules, 0.9), [finetune.optimizer_of(models, chosen)]
        )
        assert loop.load_checkpoint(runs / run / "checkpoints", state, None)
        assert state.step == STEPS
        states.append(state.tensors())
    assert states[0].keys() == states[1].keys()
    assert sum(name.startswith("optimizer/") for name in states[0]) > 30
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_a_checkpoint_folder_that_lost_its_end_is_set_aside(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "broken" / "checkpoints", tmp_path / "checkpoints")
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    shard = next(newest.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut short"):
        shards.describe(newest)
    layer = torch.nn.Linear(1, 1)
    state = loop.TrainingState({"layer": layer}, loop.MovingAverage({}, 0.9), [])
    with pytest.raises(WeightsError, match="step-0000003 does not fit the model"):
        loop.load_checkpoint(tmp_path / "checkpoints", state, None)  # the one before is tried


def test_a_full_disk_of_one_process_stops_all_and_leaves_no_half(runs: Path) -> None:
    assert said(runs, 0)["full"] == [28, []]  # the first process clears up
    assert said(runs, 1)["full"][0] == 28


def test_a_loss_that_is_not_finite_in_one_process_is_named_in_all(runs: Path) -> None:
    kind, message = said(runs, 0)["nan"]
    assert said(runs, 1)["nan"] == [kind, message]
    assert kind == "WeightsError"
    assert message.startswith("the loss became nan at step 0, on scene 0 of ")


def test_rollouts_that_processes_cannot_share_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loop.Workers, "start", classmethod(lambda cls: cls(0, 2)))
    recipe = recipes.load("self-forcing-demo", ["batch=3"])
    assert isinstance(recipe, recipes.SelfForcing)
    with pytest.raises(UsageError, match="3 rollouts a step cannot be shared by 2 processes"):
        self_forcing.train(recipe, tmp_path)


def test_sharing_is_refused_where_it_has_no_meaning(run_command: Any) -> None:
    one = run_command("train", "self-forcing-demo", "--fsdp")
    assert (one.code, "and there is one" in one.err) == (2, True)
    vae = run_command("train", "demo-vae", "--fsdp")
    assert (vae.code, "the weights of a demo-vae recipe are not shared out" in vae.err) == (2, True)


def test_shared_weights_need_less_memory_of_each() -> None:
    cpu, recipe = torch.device("cpu"), recipes.load("finetune-long")
    alone, *shared = (estimate.estimate(recipe, cpu, processes=n).memory for n in (1, 2, 8))
    assert alone.training > shared[0].training > shared[1].training
    assert alone.activations == shared[0].activations
