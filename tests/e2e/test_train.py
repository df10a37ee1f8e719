"""packforcing train, with recipes of a few steps on a few scenes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from packforcing_cli.training import demo_flow, demo_vae, loop, recipes

VAE = {
    "model.encoder_widths": "[4, 4, 4]",
    "model.decoder_widths": "[4, 4, 4]",
    "model.encoder_depths": "[0, 0]",
    "model.decoder_depths": "[0, 0]",
    "data.clips": "1",
    "data.shrunken_clips": "1",
    "data.frames": "5",
    "train.evaluate_every": "1000",
    "train.threads": "1",
    "train.steps": "20",
}
FLOW = {
    "model.layers": "1",
    "model.ffn_dim": "32",
    "model.compressor_widths": "[4, 4, 4, 4]",
    "data.first_scenes": "2",
    "data.short_scenes": "1",
    "data.long_scenes": "0",
    "data.long_clips": "0",
    "data.whole_probability": "0",
    "data.short_blocks": "3",
    "data.packed_blocks": "3",
    "data.first_clips": "1",
    "train.evaluate_every": "1000",
    "train.threads": "1",
    "train.steps": "10",
}


def settings(values: dict[str, str], **changes: str) -> list[str]:
    merged = values | {name.replace("__", "."): value for name, value in changes.items()}
    return [word for name, value in merged.items() for word in ("--set", f"{name}={value}")]


def steps(run: Path) -> list[int]:
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    return [record["step"] for record in map(json.loads, lines) if "loss" in record]


@pytest.fixture(autouse=True)
def _cheap_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latent statistics from few clips, no reconstruction figures: they are most of a short run's time."""
    measured = demo_vae.latent_statistics
    monkeypatch.setattr(demo_vae, "latent_statistics", lambda model, seed: measured(model, seed, clips=8))
    monkeypatch.setattr(demo_vae, "evaluate", lambda recipe, state: {})


@pytest.fixture(scope="module")
def vae_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished demo-vae run."""
    folder = tmp_path_factory.mktemp("train") / "vae"
    recipe = recipes.load("demo-vae", settings(VAE, train__steps="1")[1::2])
    assert recipe.kind == "demo-vae"
    demo_vae.train(recipe, folder)
    return folder


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let a signal reach this process in a step of demo-vae."""

    def set_up(step: int, number: int, times: int = 1) -> None:
        loss = demo_vae._loss
        calls: list[None] = []

        def counted(*arguments: Any) -> Any:
            calls.append(None)
            for _ in range(times if len(calls) == step else 0):
                signal.raise_signal(number)
            return loss(*arguments)

        monkeypatch.setattr(demo_vae, "_loss", counted)

    return set_up


def test_a_recipe_runs_from_start_to_result(run_command: Any, tmp_path: Path) -> None:
    result = run_command("train", "demo-vae", *settings(VAE))
    assert (result.code, result.out) == (0, "runs/demo-vae/vae\n")
    said = result.err.splitlines()
    assert said[0].startswith("Starting demo-vae in runs/demo-vae: the demo's autoencoder, 20 steps on the ")
    assert said[1].startswith("log: runs/demo-vae/metrics.jsonl")
    assert said[2].startswith("parameters   ")
    assert said[3].startswith("memory       about ")
    assert said[4] == "steps        20"
    assert any(line.startswith("step 20/20: loss ") for line in said)
    assert said[-1] == "Done. Next: packforcing train demo-flow --vae runs/demo-vae"
    assert sorted(p.name for p in (tmp_path / "runs/demo-vae/vae").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert steps(tmp_path / "runs/demo-vae") == [10, 20]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_go_on_and_goes_on(
    number: signal.Signals, code: int, run_command: Any, stop_at: Any, tmp_path: Path
) -> None:
    stop_at(12, number)
    arguments = ("train", "demo-vae", "--out", "a run", *settings(VAE))
    result = run_command(*arguments)
    assert (result.code, result.out) == (code, "")
    again = result.err.splitlines()[-1]
    assert again.startswith(
        "Stopped at step 12, a checkpoint is saved. To go on: packforcing train demo-vae --out 'a run' --set "
    )
    result = run_command(*arguments, "-v")
    assert (result.code, result.out) == (0, "a run/vae\n")
    assert result.err.startswith("Continuing demo-vae in a run")
    assert "12 of 20 steps done already" in result.err
    assert steps(tmp_path / "a run") == [10, 20]


def test_the_first_signal_is_answered_at_once(
    run_command: Any, stop_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("packforcing_cli.cli.progress.write_at_once", said.append)
    stop_at(2, signal.SIGINT)
    assert run_command("train", "demo-vae", *settings(VAE)).code == 130
    assert said == ["Stopping after this step; Ctrl-C again stops at once …"]


def test_a_signal_while_scenes_are_rendered_stops_before_the_first_step(
    run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("packforcing_cli.cli.progress.write_at_once", said.append)
    draw = demo_flow.draw_scene

    def stop(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return draw(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(demo_flow, "draw_scene", stop)
        result = run_command("train", "demo-flow", "--force", *settings(FLOW, data__first_scenes="1"))
    assert (result.code, result.out) == (130, "")
    assert said == ["Stopping after this handful of scenes; Ctrl-C again stops at once …"]
    last = result.err.splitlines()[-1]
    assert last.startswith("Stopped before the first step; what is done is kept. To go on: packforcing train")
    assert not (tmp_path / "runs/demo-flow/checkpoints").exists()
    assert not list((tmp_path / "runs/demo-flow").glob("pool/*.safetensors"))


def test_two_trainings_do_not_share_a_folder(run_command: Any, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with loop.locked(tmp_path / "one"):
        result = run_command("train", "demo-vae", "--out", "one", *settings(VAE))
    assert (result.code, result.out) == (9, "")
    assert "another process trains into one" in result.err
    assert not (tmp_path / "one/metrics.jsonl").exists()


def test_force_goes_on_with_another_recipe_and_the_log_says_so(run_command: Any, tmp_path: Path) -> None:
    assert run_command("train", "demo-vae", "-q", *settings(VAE, train__steps="1")).code == 0
    other = settings(VAE, train__steps="2", latent_noise="0.2", train__learning_rate="1e-4")
    result = run_command("train", "demo-vae", *other)
    assert result.code == 2
    assert "(latent_noise: 0.1 then, 0.2 now; train.learning_rate: 0.0012 then, 0.0001 now)" in result.err
    assert "--force goes on" in result.err
    result = run_command("train", "demo-vae", "--force", *other)
    assert result.code == 0
    assert "warning: from step 1 on other facts hold: latent_noise 0.1 then, 0.2 now" in result.err
    lines = (tmp_path / "runs/demo-vae/metrics.jsonl").read_text("utf-8").splitlines()
    changed = [record for record in map(json.loads, lines) if record.get("event") == "changed"]
    assert [(c["step"], c["facts"]["latent_noise"]) for c in changed] == [(1, [0.1, 0.2])]


def test_the_second_signal_stops_at_once(run_command: Any, stop_at: Any, tmp_path: Path) -> None:
    stop_at(3, signal.SIGINT, times=2)
    result = run_command("train", "demo-vae", "-q", *settings(VAE))
    assert (result.code, result.out, result.err) == (130, "", "")
    assert not (tmp_path / "runs/demo-vae/checkpoints").exists()


def test_quiet_says_nothing_but_the_result(run_command: Any) -> None:
    result = run_command("train", "demo-vae", "-q", *settings(VAE, train__steps="1"))
    assert (result.code, result.out, result.err) == (0, "runs/demo-vae/vae\n", "")


def test_a_recipe_file_trains_into_a_folder_of_its_name(run_command: Any, tmp_path: Path) -> None:
    text = recipes.find("demo-vae").read_text("utf-8")
    (tmp_path / "mine.toml").write_text(text, "utf-8")
    result = run_command("train", "mine.toml", "-q", *settings(VAE, train__steps="1"))
    assert (result.code, result.out) == (0, "runs/mine/vae\n")


@pytest.mark.parametrize(
    ("arguments", "said", "next_step"),
    [
        (["demo-vea"], "no recipe named 'demo-vea'", "demo-vae"),
        (["no.toml"], "recipe file no.toml does not exist", "demo-flow"),
        (["demo-vae", "--set", "train.step=3"], "nearest known: steps", ""),
        (["demo-vae", "--set", "train.steps=0"], "train.steps: ", ""),
        (["demo-vae", "--set", "steps"], "--set takes key=value", "--set train.steps=100"),
        (["demo-vae", "--vae", "x"], "uses no other VAE", "Leave --vae away"),
        (["demo-vae", "--data", "x"], "uses no clips", "Leave --data away"),
        (["demo-vae", "--resume"], "there is no run to go on with", "--out"),
        (["finetune"], "there are no clips to train on", "--data CLIPS"),
        (["finetune", "--data", "nowhere"], "there is no folder nowhere", "video clips"),
        (["demo-flow", "--set", "data.long_clips=0"], "training meets at most 1 beside 2 sinks", "--force"),
        (["demo-distill"], "demo-distill has no teacher", "--set init="),
        (["demo-distill", "--set", "init=package"], "is a student of 4 steps itself", "--set init="),
        (["demo-flow", "--vae", "nowhere"], "no trained autoencoder in nowhere", "train demo-vae"),
        (["demo-vae", "--out", "/dev/null/run"], "cannot make the folder /dev/null/run", "--out"),
    ],
)
def test_wrong_input_is_one_message(
    arguments: list[str], said: str, next_step: str, run_command: Any
) -> None:
    result = run_command("train", *arguments)
    assert (result.code, result.out) == (2, "")
    assert "Traceback" not in result.err
    message = result.err[result.err.index("error: ") :]
    assert said in message
    assert next_step in message
    if arguments[0] in ("finetune", "demo-distill"):
        assert not Path("runs").exists()


def test_another_recipe_does_not_go_on_in_the_folder(run_command: Any) -> None:
    assert run_command("train", "demo-vae", "-q", *settings(VAE, train__steps="1")).code == 0
    result = run_command("train", "demo-vae", "-q", *settings(VAE, train__seed="5"))
    assert result.code == 2
    assert "was written by another recipe (train.seed: 0 then, 5 now)" in result.err
    assert "Use another --out folder" in result.err


def test_a_full_disk_is_said_as_such(run_command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("packforcing_cli.training.loop.save_file", refuse)
    result = run_command("train", "demo-vae", *settings(VAE, train__steps="1"))
    assert result.code == 6
    assert "the disk is full: runs/demo-vae could not be written" in result.err
    assert "go on: packforcing train demo-vae" in result.err


def test_only_the_first_process_talks(run_command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    result = run_command("train", "demo-vae", *settings(VAE, train__steps="1"))
    assert (result.code, result.out, result.err) == (0, "", "")
    result = run_command("train", "no-such-recipe")
    assert (result.code, result.out, result.err) == (2, "", "")


def test_training_needs_no_diffusers_av_or_torchao(vae_run: Path, tmp_path: Path) -> None:
    arguments = ["train", "demo-flow", "--vae", str(vae_run), "--out", "run", "--force", *settings(FLOW)]
    code = (
        "import sys\n"
        "for name in ('diffusers', 'av', 'torchao'):\n"
        "    sys.modules[name] = None\n"
        "from packforcing_cli.cli import main\n"
        f"main({arguments!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (0, "run/package\n"), done.stderr
    assert "step 10/10: loss " in done.stderr
    assert "--model run/package" in done.stderr
    assert (tmp_path / "run" / "package" / "packforcing.json").is_file()


@pytest.mark.slow
def test_two_processes_train_together_and_stop_together(vae_run: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
            *("-m", "packforcing_cli", "train", "demo-flow", "--vae", str(vae_run), "--out", "run"),
            "--force",
            *settings(FLOW, train__steps="100000"),
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("step 10/"):
            process.send_signal(signal.SIGINT)
            break
    out, rest = process.communicate(timeout=300)
    text = "".join(said) + rest
    assert out == ""
    assert text.count("Starting demo-flow") == 1
    assert "in 2 processes" in text
    assert "a checkpoint is saved. To go on: torchrun --nproc-per-node 2 -m packforcing_cli train" in text
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*.safetensors"))) == 1


def test_a_process_that_lost_the_others_says_how_to_go_on(
    run_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: Any) -> Any:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer. GLHF!")

    monkeypatch.setattr(demo_vae, "_loss", lost)
    result = run_command("train", "demo-vae", *settings(VAE))
    assert result.code == 1
    assert "another process of this training ended" in result.err
    assert "packforcing train demo-vae --out runs/demo-vae" in result.err
    assert "GLHF" not in result.err
