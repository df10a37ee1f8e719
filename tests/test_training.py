"""What every training shares: the optimiser, checkpoints that survive a kill, recipes, several processes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny import CODEC, randomise
from torch import Tensor, nn

from packforcing_cli.errors import LockedError, UsageError, WeightsError
from packforcing_cli.training import demo_flow, demo_vae, loop, recipes
from packforcing_cli.training.demo_text import build_demo_tokenizer, demo_vocabulary
from packforcing_cli.training.muon import Muon, orthogonalise
from packforcing_cli.vae import TinyAutoencoderConfig

torch.set_num_threads(1)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# -- Muon -----------------------------------------------------------------------------------------------------


def test_orthogonalising_is_a_polynomial_of_the_singular_values() -> None:
    """U p(S) V^T by a singular value decomposition, p five times a s + b s^3 + c s^5 (Jordan's coefficients)."""
    for rows, cols in ((6, 6), (4, 10), (10, 4)):
        matrices = random(3, rows, cols, seed=rows)
        u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
        s = s / s.norm(dim=1, keepdim=True)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        torch.testing.assert_close(orthogonalise(matrices), u * s[:, None] @ vh)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare with")
def test_muon_equals_that_of_torch_up_to_its_bfloat16() -> None:
    shapes = [(24, 24), (48, 24), (24, 24), (16, 40)]
    ours = [nn.Parameter(random(*shape, seed=n, dtype=torch.float32)) for n, shape in enumerate(shapes)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    mine = Muon(ours, lr=0.01, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        for n, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = random(*shapes[n], seed=100 * step + n, dtype=torch.float32)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.03 * (b - before).norm()


def test_muon_leaves_parameters_without_gradient_alone() -> None:
    still, moving = (nn.Parameter(random(4, 4, dtype=torch.float32)) for _ in range(2))
    moving.grad = random(4, 4, seed=1, dtype=torch.float32)
    before = still.detach().clone()
    Muon([still, moving], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(still, before)
    assert not torch.equal(moving, before)


# -- schedules and averages -----------------------------------------------------------------------------------


def test_learning_rate_warms_up_holds_and_decays_to_its_floor() -> None:
    factors = [
        loop.learning_rate_factor(step, 100, warmup=10, decay_fraction=0.5, floor=0.1) for step in range(101)
    ]
    assert factors[0] == 0.1 and factors[4] == 0.5 and factors[9] == 1
    assert set(factors[10:51]) == {1.0}
    assert factors[75] == pytest.approx(0.55) and factors[100] == pytest.approx(0.1)
    assert factors[50:] == sorted(factors[50:], reverse=True)


def test_the_moving_average_forgets_where_it_started() -> None:
    module = nn.Linear(1, 1, bias=False)
    average = loop.MovingAverage({"m": module}, 0.8)
    expected = float(module.weight.detach())
    for step in range(1, 60):
        nn.init.constant_(module.weight, float(step))
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        average.update({"m": module}, step)
    assert float(average.state_of("m")["weight"]) == pytest.approx(expected, rel=1e-5)
    assert expected == pytest.approx(59 - 4, abs=0.1)  # lags by 1 / (1 - decay) - 1


def test_randomness_of_a_step_depends_on_seed_step_and_rank_alone() -> None:
    def draw(*key: int) -> list[float]:
        return torch.rand(4, generator=loop.step_generator(*key)).tolist()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    keys = [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 0), (12, 3, 0), (1, 23, 0)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)


# -- checkpoints ----------------------------------------------------------------------------------------------


def training_state(seed: int) -> loop.TrainingState:
    """Two modules, two optimisers, after three steps."""
    modules: dict[str, nn.Module] = {
        "a": nn.Linear(3, 4),
        "b": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)),
    }
    for n, module in enumerate(modules.values()):
        randomise(module, seed + n)
    matrices = [p for m in modules.values() for p in m.parameters() if p.ndim == 2]
    vectors = [p for m in modules.values() for p in m.parameters() if p.ndim != 2]
    optimizers = [torch.optim.AdamW(vectors, lr=0.01), Muon(matrices, lr=0.02)]
    state = loop.TrainingState(modules, loop.MovingAverage(modules, 0.9), optimizers)
    for _ in range(3):
        advance(state)
    return state


def advance(state: loop.TrainingState) -> float:
    x = torch.randn(5, 3, generator=loop.step_generator(0, state.step))
    loss = state.modules["b"](state.modules["a"](x).tanh()).square().mean()
    for optimizer in state.optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in state.optimizers:
        optimizer.step()
    state.step += 1
    state.average.update(state.modules, state.step)
    return float(loss.detach())


def test_a_restored_state_goes_on_bit_for_bit(tmp_path: Path) -> None:
    state = training_state(0)
    loop.save_checkpoint(tmp_path, state, {"kind": "test"})
    restored = training_state(50)
    assert loop.load_checkpoint(tmp_path, restored, {"kind": "test"})
    assert restored.step == 3
    assert [advance(restored) for _ in range(5)] == [advance(state) for _ in range(5)]
    for name, value in state.average.values.items():
        assert torch.equal(restored.average.values[name], value)


def test_tied_weights_survive(tmp_path: Path) -> None:
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    modules = {"m": tied}
    optimizer = torch.optim.AdamW(tied.parameters())
    state = loop.TrainingState(modules, loop.MovingAverage(modules, 0.9), [optimizer])
    loop.save_checkpoint(tmp_path, state, {})
    assert loop.load_checkpoint(tmp_path, state, {})


def test_the_newest_two_checkpoints_are_kept_and_a_broken_one_is_passed_over(tmp_path: Path) -> None:
    state = training_state(0)
    for _ in range(3):
        advance(state)
        loop.save_checkpoint(tmp_path, state, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-0000005.safetensors",
        "step-0000006.safetensors",
    ]
    newest = tmp_path / "step-0000006.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    restored = training_state(50)
    assert loop.load_checkpoint(tmp_path, restored, {})
    assert restored.step == 5
    assert not loop.load_checkpoint(tmp_path / "none", restored, {})


def test_a_checkpoint_of_another_recipe_is_refused_by_what_differs(tmp_path: Path) -> None:
    state = training_state(0)
    loop.save_checkpoint(tmp_path, state, {"kind": "demo-vae", "seed": 1})
    with pytest.raises(UsageError, match="seed: 1 then, 2 now") as caught:
        loop.load_checkpoint(tmp_path, state, {"kind": "demo-vae", "seed": 2})
    assert "--out" in caught.value.hint
    loop.save_checkpoint(tmp_path / "more", state, {"kind": "demo-vae", "seed": 1, "rate": 0.1})
    with pytest.raises(UsageError, match=r"\(rate: 0.1 then, None now; seed: 1 then, 2 now\)"):
        loop.check_facts(tmp_path / "more", {"kind": "demo-vae", "seed": 2}, accept=False)
    with pytest.raises(UsageError, match="lr: not recorded then, 1 now"):  # of an older version
        loop.check_facts(tmp_path, {"kind": "demo-vae", "seed": 1, "lr": 1}, accept=False)
    other = training_state(0)
    other.modules = {"a": nn.Linear(3, 5), "b": other.modules["b"]}
    with pytest.raises(WeightsError, match="does not fit"):
        loop.load_checkpoint(tmp_path, other, {"kind": "demo-vae", "seed": 1})


def test_a_checkpoint_of_other_modules_is_refused_also_by_force(tmp_path: Path) -> None:
    whole = training_state(0)
    loop.save_checkpoint(tmp_path, whole, {"kind": "test"})
    less = {"b": whole.modules["b"]}
    optimizer = torch.optim.AdamW(less["b"].parameters())
    alone = loop.TrainingState(less, loop.MovingAverage(less, 0.9), [optimizer])
    with pytest.raises(WeightsError, match="the checkpoint trains a, b, this recipe b"):
        loop.load_checkpoint(tmp_path, alone, {"kind": "test"}, accept=True)


def test_an_optimisers_state_of_other_weights_is_refused(tmp_path: Path) -> None:
    """As after parameters were grouped otherwise: states are stored by position."""

    def state(order: tuple[str, ...]) -> loop.TrainingState:
        modules = {"a": torch.nn.Linear(3, 2, bias=False), "b": torch.nn.Linear(2, 4, bias=False)}
        optimizer = torch.optim.AdamW([modules[name].weight for name in order])
        for module in modules.values():
            module.weight.grad = torch.ones_like(module.weight)
        optimizer.step()
        return loop.TrainingState(modules, loop.MovingAverage(modules, 0.9), [optimizer])

    loop.save_checkpoint(tmp_path, state(("a", "b")), {"kind": "test"})
    assert loop.load_checkpoint(tmp_path, state(("a", "b")), {"kind": "test"})
    with pytest.raises(
        WeightsError, match=r"is of other weights: optimizer/0/0/exp_avg.* is \[2, 3\], its weight \[4, 2\]"
    ):
        loop.load_checkpoint(tmp_path, state(("b", "a")), {"kind": "test"}, accept=True)


def test_facts_are_all_of_a_recipe_but_how_long_and_where_it_runs() -> None:
    recipe = recipes.load("demo-flow")
    facts = loop.facts_of(recipe.model_dump(mode="json"))
    named = {f"data.{name}" for name in recipes.FlowData.model_fields} | {
        "kind",
        "vae",
        "init",
        "fresh",
        "shift",
    }
    named |= {f"train.{name}" for name in recipes.FlowTrain.model_fields} | {"precision"}
    named |= {f"model.{name}" for name in recipes.FlowModel.model_fields}
    free = {"train.steps", "train.checkpoint_minutes", "train.evaluate_every", "train.threads"}
    assert facts.keys() == named - free
    assert facts == json.loads(json.dumps(facts))


def test_what_is_changed_by_force_is_kept_with_all_later_checkpoints(tmp_path: Path) -> None:
    state = training_state(0)
    loop.save_checkpoint(tmp_path, state, {"kind": "demo-flow", "data.packed_clips": 1})
    for clips in (2, 2, 3):
        facts = {"kind": "demo-flow", "data.packed_clips": clips, "train.seed": 7}
        state = training_state(50)
        assert loop.load_checkpoint(tmp_path, state, facts, accept=True)
        advance(state)
        loop.save_checkpoint(tmp_path, state, facts)
    assert state.changes == [
        {"step": 3, "facts": {"data.packed_clips": [1, 2], "train.seed": [None, 7]}},
        {"step": 5, "facts": {"data.packed_clips": [2, 3]}},
    ]
    with pytest.raises(UsageError, match="kind: 'demo-flow' then, 'demo-vae' now") as caught:
        loop.load_checkpoint(tmp_path, state, {"kind": "demo-vae"}, accept=True)
    assert "--force" not in caught.value.hint


def test_a_refused_run_leaves_its_folder_as_it_was(tmp_path: Path) -> None:
    state = training_state(0)
    checkpoints, log = tmp_path / "checkpoints", tmp_path / "metrics.jsonl"
    loop.save_checkpoint(checkpoints, state, {"kind": "test", "seed": 1})
    advance(state)
    loop.save_checkpoint(checkpoints, state, {"kind": "test", "seed": 1})
    newest = checkpoints / "step-0000004.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    log.write_text('{"step": 3, "loss": 1}\n{"step": 4, "loss": 2}\n', "utf-8")
    before = {path: path.read_bytes() for path in (*checkpoints.iterdir(), log)}
    settings = recipes.Train(steps=9, learning_rate=0.1)

    def go(seed: int) -> None:
        with loop.Log(log) as told:
            loop.run(
                training_state(0), settings, lambda g: (torch.zeros(()), {}), out=tmp_path,
                facts={"kind": "test", "seed": seed}, workers=loop.Workers(), log=told,
                should_stop=lambda: True,
            )  # fmt: skip

    with pytest.raises(UsageError, match="seed: 1 then, 2 now"):
        go(2)
    assert {path: path.read_bytes() for path in (*checkpoints.iterdir(), log)} == before
    go(1)
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == [3, 3]  # the lost step is forgotten
    assert lines[1]["event"] == "start"
    assert (checkpoints / "step-0000004.safetensors.bad").is_file()


def test_a_log_whose_last_line_was_cut_off_goes_on_with_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 10, "loss": 1.0}\n{"step": 20, "lo')
    with loop.Log(path) as log:
        log.write(step=20, loss=2.0)
    assert [json.loads(line)["loss"] for line in path.read_text("utf-8").splitlines()] == [1.0, 2.0]


def test_one_training_at_a_time_in_a_folder(tmp_path: Path) -> None:
    with loop.locked(tmp_path):
        with pytest.raises(LockedError, match="another process trains into") as caught, loop.locked(tmp_path):
            raise AssertionError
        assert caught.value.exit_code == 9
    with loop.locked(tmp_path):
        pass


def test_a_loss_that_is_not_finite_names_the_step(tmp_path: Path) -> None:
    loop.require_finite(1.0, 3, tmp_path)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(WeightsError, match="step 7"):
            loop.require_finite(bad, 7, tmp_path)


# -- killed and resumed ---------------------------------------------------------------------------------------

STEPS, KILLED_AT = 20, 10


def write_recipe(folder: Path) -> Path:
    model = {key: json.dumps(value) for key, value in CODEC.to_dict().items()}
    path = folder / "tiny.toml"
    path.write_text(
        'kind = "demo-vae"\n[model]\n'
        + "\n".join(f"{key} = {value}" for key, value in model.items())
        + "\n[data]\nclips = 1\nframes = 5\nshrunken_clips = 1\n"
        + f"[train]\nsteps = {STEPS}\nlearning_rate = 1e-3\nwarmup = 5\nevaluate_every = 1000\nthreads = 1\n"
        + "checkpoint_minutes = 1e-6\n",  # after every step
        "utf-8",
    )
    return path


KILLED = f"""
import os, signal, sys
from pathlib import Path
from packforcing_cli.training import demo_vae, recipes

def kill(record):
    if record.get("step") == {KILLED_AT} and "loss" in record:
        os.kill(os.getpid(), signal.SIGKILL)

demo_vae.train(recipes.load(sys.argv[1]), Path(sys.argv[2]), on_log=kill)
"""


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def losses(run: Path) -> dict[int, set[float]]:
    """All losses logged for each step: those after the last checkpoint are there twice."""
    found: dict[int, set[float]] = {}
    for record in metrics(run):
        if "loss" in record:
            found.setdefault(record["step"], set()).add(record["loss"])
    return found


def test_a_run_killed_and_resumed_equals_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_vae, "write_result", lambda recipe, state, out: {})
    path, broken, whole = write_recipe(tmp_path), tmp_path / "broken", tmp_path / "whole"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), str(broken)], check=False)
    assert done.returncode == -signal.SIGKILL
    recipe = recipes.load(str(path))
    assert isinstance(recipe, recipes.DemoVae)
    for run in (broken, whole):
        demo_vae.train(recipe, run)
    starts = [record["step"] for record in metrics(broken) if record.get("event") == "start"]
    assert starts == [0, KILLED_AT - 1]
    assert losses(broken) == losses(whole)
    assert set(losses(whole)) >= {KILLED_AT, STEPS}
    last = f"checkpoints/step-{STEPS:07d}.safetensors"
    resumed, unbroken = load_file(broken / last), load_file(whole / last)
    assert resumed.keys() == unbroken.keys()
    assert all(torch.equal(resumed[name], value) for name, value in unbroken.items())


def test_a_run_writes_a_codec_that_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_vae, "latent_statistics", partial(demo_vae.latent_statistics, clips=8))
    recipe = recipes.load(str(write_recipe(tmp_path)), ["train.steps=1"])
    assert isinstance(recipe, recipes.DemoVae)
    figures = demo_vae.train(recipe, tmp_path / "run")
    assert figures["steps"] == 1 and figures["psnr"] > 0
    values = json.loads((tmp_path / "run/vae/config.json").read_text("utf-8"))
    assert values.pop("_class_name") == "TinyAutoencoder"
    mean, std = tuple(values["latents_mean"]), tuple(values["latents_std"])
    expected = dataclasses.replace(CODEC, latents_mean=mean, latents_std=std)
    assert TinyAutoencoderConfig.from_dict(values) == expected
    assert len(std) == 4 and min(std) > 0


def test_asked_to_stop_it_saves_and_says_that_it_is_not_finished(tmp_path: Path) -> None:
    recipe = recipes.load(str(write_recipe(tmp_path)), ["train.checkpoint_minutes=1000"])
    assert isinstance(recipe, recipes.DemoVae)
    figures = demo_vae.train(recipe, tmp_path / "run", should_stop=lambda: True)
    assert figures == {"steps": 1}
    assert (tmp_path / "run/checkpoints/step-0000001.safetensors").is_file()


def test_a_result_that_was_cut_short_is_no_autoencoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_vae, "latent_statistics", partial(demo_vae.latent_statistics, clips=8))
    recipe = recipes.load(str(write_recipe(tmp_path)), ["train.steps=1"])
    assert isinstance(recipe, recipes.DemoVae)
    demo_vae.train(recipe, tmp_path / "run")

    def cut(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo_vae, "save_file", cut)
    before = (tmp_path / "run/vae/model.safetensors").read_bytes()
    with pytest.raises(OSError, match="No space"):
        demo_vae.train(recipe, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run/vae").iterdir()] == ["model.safetensors"]
    assert (tmp_path / "run/vae/model.safetensors").read_bytes() == before


# -- several processes ----------------------------------------------------------------------------------------

WORKER = """
import torch
from packforcing_cli.training.loop import Workers

workers = Workers.start()
first, second, none = (torch.nn.Parameter(torch.zeros(n, 2)) for n in (3, 1, 2))
first.grad = torch.full((3, 2), 1.0 + workers.rank)
if workers.rank:
    second.grad = torch.full((1, 2), 5.0)
workers.average_gradients([first, second, none])
state, losses = curve(workers)
print(workers.count, first.grad.unique().tolist(), second.grad.unique().tolist(), none.grad.unique().tolist(),
      workers.any_wants(workers.rank == 1), workers.any_wants(False))
print(json.dumps([p.tolist() for p in state.modules["m"].parameters()]))
workers.stop()
"""

CURVE = """
import json, sys, tempfile
from pathlib import Path
import torch
from packforcing_cli.training import loop
from packforcing_cli.training.recipe_kinds import Train

def curve(workers):
    # Six steps of two items each; every second step reaches the first weight alone.
    torch.manual_seed(1)
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    adam = torch.optim.AdamW(module.parameters(), lr=0.05, betas=(0.9, 0.99), weight_decay=0.1)
    state = loop.TrainingState({"m": module}, loop.MovingAverage({"m": module}, 0.9), [adam])
    losses = []

    def loss(generator):
        hidden = module[0](torch.randn(4, 3, generator=generator))
        return (hidden if state.step % 2 else module[1](hidden)).square().mean(), {}

    with tempfile.TemporaryDirectory() as out, loop.Log(Path(out) / "log", losses.append) as log:
        loop.run(state, Train(steps=6, learning_rate=0.05, warmup=0), loss, out=Path(out), facts={},
                 workers=workers, log=log, items=2, log_every=1)
    return state, losses
"""


def test_two_processes_average_their_gradients() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", CURVE + WORKER],
            env=shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [worker.communicate(timeout=120)[0].splitlines() for worker in workers]
    assert [lines[0] for lines in said] == ["2 [1.5] [2.5] [0.0] True False"] * 2
    # A gradient that is missing in a step counts as zero, in one process as in several: moments and decay act.
    known: dict[str, Any] = {}
    exec(CURVE, known)
    state, _ = known["curve"](loop.Workers())
    for lines in said:
        for ours, theirs in zip(state.modules["m"].parameters(), json.loads(lines[1]), strict=True):
            torch.testing.assert_close(torch.tensor(theirs), ours.detach(), rtol=1e-5, atol=1e-7)


def test_processes_wait_for_hours_while_the_first_one_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding clips or making samples takes longer than the half hour and ten minutes of torch's own."""
    asked: dict[str, Any] = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **given: asked.update(given))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    assert loop.Workers.start().count == 2
    assert asked["timeout"] >= timedelta(hours=4)


def test_one_process_alone_joins_no_group() -> None:
    workers = loop.Workers.start()
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    workers.average_gradients([parameter])
    assert (workers, parameter.grad.tolist()) == (loop.Workers(0, 1), [1.0, 1.0])
    workers.stop()


# -- starting from a package ----------------------------------------------------------------------------------


def test_known_words_keep_their_embeddings_and_new_ones_start_fresh(tmp_path: Path) -> None:
    build_demo_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text("utf-8"))
    today = demo_vocabulary()
    # An older package: other numbers, and it does not know visitors.
    words = [word for word in reversed(today) if word != "visitor"]
    values["model"]["vocab"] = {word: number for number, word in enumerate(words)}
    path.write_text(json.dumps(values), "utf-8")
    old, fresh = random(len(words), 5), random(len(today), 5, seed=1)
    rows = demo_flow.known_words(old, fresh, tmp_path)
    assert torch.equal(rows[today["red"]], old[words.index("red")])
    assert torch.equal(rows[today["visitor"]], fresh[today["visitor"]])
    assert sum(torch.equal(a, b) for a, b in zip(rows, fresh, strict=True)) == 1
    with pytest.raises(UsageError, match="no words to start from"):
        demo_flow.known_words(old, fresh, tmp_path / "none")


# -- recipes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipes.names())
def test_every_shipped_recipe_is_valid_and_says_how_it_is_run(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.kind in recipes.KINDS
    if isinstance(recipe, recipes.DemoVae):
        demo_vae.build(recipe)
    header = recipes.find(name).read_text("utf-8").split("\n\n")[0]
    for word in ("packforcing train", "hardware", "data", "result"):
        assert word in header


def test_there_are_recipes_for_both_parts_of_the_demo() -> None:
    assert {"demo-vae", "demo-flow"} <= set(recipes.names())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.stepz=3", "train.stepz: unknown key; nearest known: steps"),
        ("latent_noize=3", "latent_noize: unknown key; nearest known: latent_noise"),
        ("data.clip=3", "data.clip: unknown key; nearest known: clips"),
        ("train.steps=0", "train.steps: Input should be greater than 0"),
        ("train.learning_rate=fast", "train.learning_rate: "),
        ("kind=demo-text", "demo-text"),
        ("train", "key=value"),
        ("=3", "key=value"),
        ("kind.name=3", "kind is not a table"),
    ],
)
def test_a_wrong_setting_is_named(setting: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipes.load("demo-vae", [setting])
    assert message in str(caught.value)


def test_settings_replace_values_in_order() -> None:
    recipe = recipes.load(
        "demo-vae", ["train.steps=7", "train.steps=9", "latent_noise=0.25", "model.activation=relu"]
    )
    assert isinstance(recipe, recipes.DemoVae)
    assert (recipe.train.steps, recipe.latent_noise) == (9, 0.25)
    assert recipe.model["activation"] == "relu"
    assert recipe.train.warmup == recipes.load("demo-vae").train.warmup


def test_an_impossible_model_is_a_usage_error() -> None:
    recipe = recipes.load("demo-vae", ["model.encoder_pools=[1]"])
    assert isinstance(recipe, recipes.DemoVae)
    with pytest.raises(UsageError, match="recipe model"):
        demo_vae.build(recipe)


def test_a_recipe_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="demo-vea") as caught:
        recipes.find("demo-vea")
    assert "demo-vae" in caught.value.hint
    with pytest.raises(UsageError, match="does not exist"):
        recipes.find(str(tmp_path / "mine.toml"))
    (tmp_path / "broken.toml").write_text("kind = \n", "utf-8")
    with pytest.raises(UsageError, match="not valid TOML"):
        recipes.load(str(tmp_path / "broken.toml"))
