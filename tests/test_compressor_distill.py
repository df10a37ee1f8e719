"""Distilling a compressor: what is compared with what, gradients, runs, the model's own videos, what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import pytest
import tiny
import torch
from tiny import randomise
from torch import Tensor

from packforcing_cli import registry, rollout, rope, weights
from packforcing_cli.cache import KVCache
from packforcing_cli.catalog import DEMO_FOLDER
from packforcing_cli.compressor import Compressor, CompressorConfig, pooled_kv
from packforcing_cli.errors import UsageError, WeightsError
from packforcing_cli.layout import Grid
from packforcing_cli.training import compressor_distill as distill
from packforcing_cli.training import estimate, finetune, loop, recipes, rollout_data
from packforcing_cli.training.data import EncodedData, Scene, Words
from packforcing_cli.training.distill_plan import DistillShape, Plan, Query
from packforcing_cli.training.recipe_kinds import CompressorDistill, FinetuneLora, Queries
from packforcing_cli.transformer import BlockKV, TransformerConfig, WanTransformer

torch.set_num_threads(1)
CPU = torch.device("cpu")
GRID = Grid(frames_per_block=4, rows=4, cols=8, layers=2, kv_dim=24, heads=2, dtype_bytes=8)
SCENE = Scene("clip", "content", "caption", Path(), 0, 9)


class Blocks:
    """Random latents in place of encoded clips."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.latents = torch.randn(9, 4, 4, 8, 16, generator=generator, dtype=torch.float64)
        self.lr = torch.randn(9, 4, 2, 2, 4, generator=generator, dtype=torch.float64)

    def load(self, scene: Scene, blocks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return self.latents[list(blocks)], self.lr[list(blocks)]

    def embedding(self, text: str) -> Tensor:
        return tiny.embeds(len(text))


DATA = cast(EncodedData, Blocks())


def models(seed: int = 1) -> distill.Models:
    """All of it in float64; the HR branch's projection is not zero."""
    compressor = Compressor(CompressorConfig(dim=24, in_channels=4, widths=(4, 4, 6, 8))).double()
    randomise(compressor, seed + 1)
    return distill.Models(tiny.transformer(seed), compressor, GRID, 5.0, "affinity-recent")


def plan(*stand_ins: int, span: int = 4, top_k: int = 16) -> Plan:
    shape = DistillShape("compressor-distill", 9, (2,), top_k, (Fraction(span),), 0.0)
    query = Query(7, (0, 1), tuple(range(0, 128, 5)), (0.7, 0.9))
    return Plan(shape.layout(GRID, 2, Fraction(span)), (query,), stand_ins)


def observe(made: distill.Models, wanted: Plan) -> distill.Observation:
    generator = torch.Generator().manual_seed(5)
    return distill.observe(made, DATA, SCENE, wanted, generator, clean=0.0, dropout=0.0)


def pairs(made: distill.Models, seen: distill.Observation) -> dict[int, tuple[Tensor, Tensor]]:
    found = {block: distill.compressed(made, seen, block) for block in seen.whole}
    return {block: (kv.k, kv.v) for block, kv in found.items()}


# -- what is compared -------------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by its definition."""
    weights = torch.einsum("bqnd,bknd->bnqk", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bnqk,bknd->bqnd", weights, v)


@pytest.mark.parametrize("span", [4, 1])
@torch.no_grad()
def test_the_student_sees_what_inference_sees_and_the_target_the_whole_blocks(span: int) -> None:
    """Against a stream of its own, in the first layer, whose queries do not depend on any context."""
    made, wanted = models(), plan(3, 5, span=span)
    seen = observe(made, wanted)
    network, layout = made.transformer, wanted.layout
    text = network.embed_text(DATA.embedding("caption"))
    cache = KVCache(layout, num_blocks=9, dtype=torch.float64)
    kept: list[BlockKV] = []
    backups: dict[int, BlockKV] = {}
    for i in range(7):
        kv = network.commit(DATA.load(SCENE, (i,))[0], text, cache.context(i))
        kept.append(kv)
        if cache.needs_backup(i):
            latents, lr = DATA.load(SCENE, (i,))
            tokens = made.tokens(latents[0], lr[0])
            backups[i] = network.commit_tokens(tokens, text, cache.compressed_context(i))
        cache.commit(i, kv)
        if i in backups:
            cache.add_backup(i, backups[i])
    for block in (3, 5):
        again = distill.compressed(made, seen, block)
        torch.testing.assert_close(again.k, backups[block].k)
        torch.testing.assert_close(again.v, backups[block].v)

    context, asked = cache.context(7), seen.asked[0]
    assert (asked.layer, [place.block for place in asked.places]) == (0, [3, 5])
    own = asked.keys[:, :128], asked.values[:, :128]
    keys, values = context.layer(0, own[0], own[1], torch.zeros(1, 2, 12))
    inference = attend(asked.q, keys, values)
    target = asked.target.square().mean()
    error = distill.attention_errors(seen, pairs(made, seen))[0]
    torch.testing.assert_close(error, (inference - asked.target).square().mean() / target)

    slots = layout.slots(7)

    def turned(k: Tensor, positions: Tensor) -> Tensor:
        return rope.rotate(k, *rope.angles(positions, 12))

    keys_, values_ = [own[0]], [own[1]]
    for n in (0, 1):
        keys_.append(turned(kept[n].k[0], rope.grid_positions(4.0 * n, 4, 4, 8)))
        values_.append(kept[n].v[0])
    for n, mid in enumerate(range(2, 6)):
        start = float(slots.mid_starts[n])
        if mid in (3, 5):
            positions = rope.grid_positions(0.0, 4, 4, 8)
            positions[:, 0] = start + (positions[:, 0] + 0.5) * span / 4 - 0.5
            keys_.append(turned(kept[mid].k[0], positions))
            values_.append(kept[mid].v[0])
        else:
            cells = [[float(x) for x in c] for c in layout.compressed_positions(slots.mid_starts[n], span)]
            keys_.append(turned(backups[mid].k[0], torch.tensor(cells, dtype=torch.float64)))
            values_.append(backups[mid].v[0])
    keys_.append(turned(kept[6].k[0], rope.grid_positions(float(slots.recent_starts[0]), 4, 4, 8)))
    values_.append(kept[6].v[0])
    dense = attend(asked.q, torch.cat(keys_, 1), torch.cat(values_, 1))
    torch.testing.assert_close(asked.target, dense)


@torch.no_grad()
def test_a_block_that_a_layer_does_not_recall_is_not_compared() -> None:
    seen = observe(models(), plan(2, 3, 4, 5, top_k=1))
    assert all(len(asked.places) == 1 for asked in seen.asked)
    assert all(asked.keys.shape[1] == 4 * 128 for asked in seen.asked)


def test_a_new_hr_branch_is_lr_alone_and_left_out_blocks_differ_most() -> None:
    made = models()
    assert made.compressor.hr is not None
    torch.nn.init.zeros_(made.compressor.hr.project.weight)
    torch.nn.init.zeros_(made.compressor.hr.project.bias)  # type: ignore[arg-type]
    seen = observe(made, plan(3))
    both, alone = (
        distill.compressed(made, seen, 3, compressor=network) for network in (None, made.lr_alone())
    )
    torch.testing.assert_close(both.k.detach(), alone.k)
    whole = {3: (seen.whole[3].k, seen.whole[3].v)}
    with torch.no_grad():
        assert float(distill.attention_errors(seen, {}).mean()) > 0
        assert float(distill.pooled_error(seen, {3: tuple(pooled_kv(t, 4, 4, 8) for t in whole[3])})) == 0  # type: ignore[dict-item]


# -- gradients --------------------------------------------------------------------------------------------------


def recipe(model: Path | str = "demo", **changes: Any) -> CompressorDistill:
    values = {
        "model": str(model),
        "items": 2,
        "queries.layers": 2,
        "queries.tokens": 16,
        "queries.blocks": 2,
        "data.rollouts": 3,
        "data.rollout_blocks": 7,
        "preset.top_k": 3,
        "train.steps": 4,
        "train.warmup": 1,
        "train.learning_rate": 1e-3,
        "train.evaluate_every": 1000,
        "train.threads": 1,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    chosen = recipes.load(
        "compressor-distill", [f"{key}={json.dumps(value)}" for key, value in values.items()]
    )
    assert isinstance(chosen, CompressorDistill)
    return chosen


def test_gradients_reach_the_compressor_alone_and_equal_finite_differences() -> None:
    """In scenes of five blocks, whose one mid is the stand-in: other mids move, too, and no graph goes to them."""
    asked: dict[str, Any] = {"queries__blocks": 1, "queries__stand_ins": 9}
    made, chosen = models(), recipe(pool_weight=0.1, data__caption_dropout=0.5, **asked)
    shape = DistillShape("compressor-distill", 5, (2,), 16, (Fraction(1), Fraction(4)), 0.0)

    def loss() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for n in range(3):
            generator = torch.Generator().manual_seed(n)
            total = total + distill.item_loss(made, DATA, SCENE, shape, chosen, generator)[0]
        return total

    loss().backward()
    assert all(p.grad is None for p in made.transformer.parameters())
    assert made.compressor.hr is not None
    for weight in (made.compressor.hr.time.weight, made.compressor.hr.project.weight):
        assert weight.grad is not None and bool((weight.grad != 0).any())
        flat, n, ends = weight.data.view(-1), int(weight.grad.abs().argmax()), []
        original = float(flat[n])
        for sign in (1, -1):
            flat[n] = original + sign * 1e-5
            with torch.no_grad():
                ends.append(float(loss()))
        flat[n] = original
        assert float(weight.grad.view(-1)[n]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4)


def test_running_the_compressed_forward_again_gives_equal_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        made, chosen = models(), recipe(checkpointing=checkpointing)
        shape = DistillShape.by(chosen.data, 9)
        generator = torch.Generator().manual_seed(3)
        distill.item_loss(made, DATA, SCENE, shape, chosen, generator)[0].backward()
        gradients.append([p.grad for p in made.compressor.parameters()])
    for whole, again in zip(*gradients, strict=True):
        assert whole is not None and torch.equal(whole, again)


# -- runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with a transformer and a compressor of the smallest sizes, in two steps without guidance."""
    folder = tmp_path_factory.mktemp("distill") / "small"
    transformer = WanTransformer(
        TransformerConfig(
            num_layers=2, num_attention_heads=1, attention_head_dim=24, ffn_dim=32, text_dim=64, freq_dim=16
        )
    )
    compressor = Compressor(CompressorConfig(dim=24, widths=(4, 4, 6, 8)))
    randomise(transformer, 1)
    randomise(compressor, 2)
    schedule = registry.Schedule(kind="renoise", steps=2, shift=5.0, guidance=1.0, timesteps=(1000, 500))
    manifest = registry.read_manifest(DEMO_FOLDER).model_copy(update={"name": "small", "schedule": schedule})
    registry.write_package(
        folder,
        manifest,
        transformer=transformer,
        compressor=compressor,
        base=DEMO_FOLDER,
        dtype=torch.float32,
    )
    return folder


def videos(package: Path, out: Path, **changes: Any) -> EncodedData:
    source = registry.open_model(package, device="cpu", dtype=torch.float32)
    options: dict[str, Any] = {"count": 3, "blocks": 7, "seed": 0, "workers": loop.Workers()}
    prompts = ["a red circle", "a blue square", "a green star", "a red circle"]
    return rollout_data.make(out, source, prompts, **(options | changes))


@pytest.fixture(scope="module")
def own(package: Path, tmp_path_factory: pytest.TempPathFactory) -> EncodedData:
    return videos(package, tmp_path_factory.mktemp("own"))


@pytest.fixture(autouse=True)
def _few_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "EVALUATED_ITEMS", 1)
    monkeypatch.setattr(distill, "EVALUATED_ITEMS", 2)


def train(chosen: CompressorDistill, out: Path, own: EncodedData, **options: Any) -> dict[str, Any]:
    return distill.train(chosen, out, own, log_every=1, **options)


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]


def losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in log_of(out) if "loss" in line}


@pytest.fixture(scope="module")
def whole_run(package: Path, own: EncodedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run of five steps."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(recipe(package, train__steps=5), out, own)
    return out


def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(
    whole_run: Path, package: Path, own: EncodedData, tmp_path: Path
) -> None:
    chosen = recipe(package, train__steps=5)
    steps: Iterator[int] = iter(range(1, 100))
    assert train(chosen, tmp_path, own, should_stop=lambda: next(steps) == 2) == {"steps": 2}
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "checkpoints", kept)
    steps = iter(range(3, 100))
    train(chosen, tmp_path, own, should_stop=lambda: next(steps) == 4)
    shutil.rmtree(tmp_path / "checkpoints")  # as if killed before the second checkpoint
    kept.rename(tmp_path / "checkpoints")
    assert train(chosen, tmp_path, own)["steps"] == 5
    assert losses(tmp_path) == losses(whole_run)
    assert list(losses(whole_run)) == [1, 2, 3, 4, 5]
    compressors = [out / "package" / "compressor" / "model.safetensors" for out in (tmp_path, whole_run)]
    assert compressors[0].read_bytes() == compressors[1].read_bytes()


def test_two_processes_follow_the_curve_of_one(package: Path, whole_run: Path, tmp_path: Path) -> None:
    """They also share the making of the videos, which come out the same."""
    chosen = recipe(package, train__steps=5)
    (tmp_path / "run.py").write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from packforcing_cli import registry\n"
        "from packforcing_cli.training import compressor_distill, loop, rollout_data\n"
        "from packforcing_cli.training.recipe_kinds import CompressorDistill\n"
        "torch.set_num_threads(1)\n"
        "compressor_distill.EVALUATED_ITEMS = 1\n"
        "chosen = CompressorDistill.model_validate_json(sys.argv[1])\n"
        "source = registry.open_model(chosen.model, device='cpu', dtype=torch.float32)\n"
        "own = rollout_data.make(Path('own'), source, ['a red circle', 'a blue square', 'a green star'],\n"
        "    count=3, blocks=7, seed=0, workers=loop.Workers.start())\n"
        "compressor_distill.train(chosen, Path('two'), own, log_every=1)\n",
        "utf-8",
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
            *("run.py", chosen.model_dump_json()),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(whole_run), rel=1e-5)


def test_the_result_is_a_package_that_generates_and_only_its_compressor_changed(
    package: Path, whole_run: Path
) -> None:
    before = {p.parent.name: p.read_bytes() for p in package.rglob("*.safetensors")}
    after = {p.parent.name: p.read_bytes() for p in (whole_run / "package").rglob("*.safetensors")}
    assert {name for name in before if before[name] != after[name]} == {"compressor"}
    model = registry.load_model(whole_run / "package", device="cpu")
    said = model.manifest.provenance
    assert (said["recipe"], said["steps"], said["data"]["clips"]) == ("compressor-distill", 5, 2)
    assert said["data"]["kind"] == "the model's own videos"
    assert set(said["metrics"]["held-out"]) == {"compressed", "lr", "pool"}
    assert (model.manifest.cache.compressor, model.manifest.trained_frames) == ("hr+lr", 80)
    frames = [b.frames for b in rollout.stream_generate(model, "a red circle", num_blocks=4, seed=0)]
    assert [len(f) for f in frames] == [13, 16, 16, 16]
    other = registry.load_model(package, device="cpu", compressor=str(whole_run / "package" / "compressor"))
    again = [b.frames for b in rollout.stream_generate(other, "a red circle", num_blocks=4, seed=0)]
    assert all(torch.equal(a, b) for a, b in zip(frames, again, strict=True))


def test_the_error_falls_below_that_of_lr_alone_and_of_pooling_on_blocks_not_trained_on(
    package: Path, own: EncodedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "EVALUATED_ITEMS", 4)
    chosen = recipe(package, start="lr", train__steps=40, train__learning_rate=1e-2, train__average=0.9)
    train(chosen, tmp_path, own)
    begin = next(line for line in log_of(tmp_path) if line.get("event") == "evaluate")
    errors = registry.read_manifest(tmp_path / "package").provenance["metrics"]["held-out"]
    assert begin["held-out"]["compressed"] == begin["held-out"]["lr"]  # the projection is zero
    print(begin, errors)
    assert errors["compressed"] < 0.85 * min(errors["lr"], errors["pool"])
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_bfloat16_keeps_a_float32_compressor(package: Path, own: EncodedData, tmp_path: Path) -> None:
    train(recipe(package, train__steps=2, precision="bf16"), tmp_path, own)
    train(recipe(package, train__steps=2), tmp_path / "full", own)
    assert losses(tmp_path) == pytest.approx(losses(tmp_path / "full"), rel=0.1)
    state = weights.read_file(next((tmp_path / "checkpoints").iterdir()), device=CPU)
    assert {t.dtype for name, t in state.items() if name.startswith(("module/", "average/"))} == {
        torch.float32
    }


def test_samples_are_made_before_and_after_and_draw_nothing_from_training(
    package: Path, own: EncodedData, tmp_path: Path
) -> None:
    samples = {"samples.every": 1, "samples.count": 1, "samples.seconds": 1.0, "train.evaluate_every": 1}
    figures = train(recipe(package, train__steps=2, precision="bf16", **samples), tmp_path / "with", own)
    assert [Path(path).name for path in figures["pairs"]] == ["before-after-0.mp4"]
    made = sorted(path.name for path in (tmp_path / "with" / "samples").iterdir())
    assert made == ["0000000-0.mp4", "0000001-0.mp4", "0000002-0.mp4", "before-after-0.mp4"]
    train(recipe(package, train__steps=2, precision="bf16"), tmp_path / "without", own)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


# -- the model's own videos -------------------------------------------------------------------------------------


def test_videos_that_are_there_are_not_made_again(package: Path, own: EncodedData, tmp_path: Path) -> None:
    made: list[str] = []

    def note(done: int, total: int, prompt: str) -> None:
        made.append(prompt)

    blocks = iter([False] * 10 + [True])
    with pytest.raises(loop.Stopped):  # in the second video
        videos(package, tmp_path, on_video=note, should_stop=lambda: next(blocks))
    assert len(made) == 1 and not (tmp_path / "dataset.json").exists()
    there = next((tmp_path / "latents").iterdir())
    (tmp_path / "latents" / "cut.safetensors").write_bytes(there.read_bytes()[:100])
    stamp = there.stat().st_mtime_ns
    whole = videos(package, tmp_path, on_video=note)
    assert len(made) == 3 and there.stat().st_mtime_ns == stamp
    assert whole.sha256 == own.sha256
    for one, other in zip(whole.scenes, own.scenes, strict=True):
        assert one.caption == other.caption
        assert all(
            torch.equal(a, b) for a, b in zip(whole.load(one, (0, 6)), own.load(other, (0, 6)), strict=True)
        )
    assert len({scene.caption for scene in own.scenes}) == 3
    with pytest.raises(UsageError, match=r"was made with other settings: scene_blocks 7 then, 8 now"):
        videos(package, tmp_path, blocks=8)
    assert len(videos(package, tmp_path, count=4, on_video=note).scenes) == 4 and len(made) == 4


def test_videos_are_those_of_the_rollout(package: Path, own: EncodedData) -> None:
    model = registry.load_model(package, device="cpu", dtype="fp32")
    scene = next(scene for scene in own.scenes if scene.clip == "rollout-00001")
    latents = [b.latents[0] for b in rollout.stream_generate(model, scene.caption, num_blocks=7, seed=1)]
    assert torch.equal(torch.stack(latents).half().float(), own.load(scene, tuple(range(7)))[0])


def test_adapters_learn_from_them_on_an_8_bit_base_and_are_merged_into_the_whole_weights(
    package: Path, own: EncodedData, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    settings = ["train.steps=2", "train.warmup=1", "train.learning_rate=1e-2", "samples.every=0", "items=1"]
    chosen = recipes.load(
        "finetune-lora", [f"model={package}", "rank=2", "quantize_frozen=int8", "data.held_out=0", *settings]
    )
    assert isinstance(chosen, FinetuneLora)
    figures = finetune.train(chosen, tmp_path, own)
    made = registry.load_model(tmp_path / "package", device="cpu").transformer
    applied = registry.load_model(package, device="cpu", loras=[figures["lora"]]).transformer
    whole = registry.load_model(package, device="cpu").transformer
    for name, value in applied.state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], value)
    name = "blocks.0.attn1.to_q.weight"
    assert not torch.equal(whole.state_dict()[name], made.state_dict()[name])
    with pytest.raises(UsageError, match=r"quantize_frozen: 'int8' then, None now"):
        finetune.train(chosen.model_copy(update={"quantize_frozen": "none"}), tmp_path, own)


# -- what is refused --------------------------------------------------------------------------------------------


def test_another_recipe_or_other_videos_do_not_go_on(
    whole_run: Path, package: Path, own: EncodedData, tmp_path: Path
) -> None:
    shutil.copytree(whole_run / "checkpoints", tmp_path / "checkpoints")
    for changes, said in (
        ({"train__learning_rate": 2e-3}, r"train.learning_rate: 0.001 then, 0.002 now"),
        ({"quantize_frozen": "int8"}, r"quantize_frozen: not recorded then, 'int8' now"),
        ({"queries__tokens": 8}, r"queries.tokens: 16 then, 8 now"),
    ):
        with pytest.raises(UsageError, match=said):
            train(recipe(package, **({"train__steps": 6} | changes)), tmp_path, own)


def test_a_loss_that_is_not_finite_names_the_video(
    package: Path, own: EncodedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = EncodedData.load

    def broken(self: EncodedData, scene: Scene, blocks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        latents, lr = load(self, scene, blocks)
        return latents * float("nan"), lr

    monkeypatch.setattr(EncodedData, "load", broken)
    with pytest.raises(WeightsError, match=r"the loss became nan at step 0, on scene 0 of rollout-0000\d"):
        train(recipe(package), tmp_path, own)


def test_videos_too_short_for_a_compressed_block_and_contexts_left_are_refused(run_command: Any) -> None:
    short = run_command("recipes", "validate", "compressor-distill", "--set", "data.rollout_blocks=4")
    assert short.code == 2 and "no block asks for a compressed one in fewer than 5 blocks" in short.err
    left = run_command("train", "compressor-distill", "--set", "data.rollout_blocks=10")
    assert left.code == 2 and "16 mids: training meets at most 6 beside 2 sinks" in left.err
    none = run_command("train", "compressor-distill", "--set", "data.prompts=none.txt")
    assert none.code == 2 and "prompts none.txt cannot be read" in none.err


# -- the plan ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_blocks_read_their_own_captions_and_a_cut_hides_the_recent_block() -> None:
    words = Words(("caption",) * 5 + ("other",) * 4, (5,))
    scene = dataclasses.replace(SCENE, words=words)
    drawn = plan(3)
    drawn = dataclasses.replace(drawn, layout=dataclasses.replace(drawn.layout, cuts=(5,)))
    query = dataclasses.replace(drawn.queries[0], block=5)
    seen = [
        distill.observe(
            models(), DATA, which, wanted, torch.Generator().manual_seed(5), clean=0.0, dropout=0.0
        )
        for which in (SCENE, scene)
        for wanted in (dataclasses.replace(drawn, queries=(query,)), drawn)
    ]
    # Behind the cut block 4 is a mid at once, and nothing is recent.
    assert [s.asked[0].keys.shape[1] for s in seen[:2]] == [3 * 128 + 2 * 4, 4 * 128 + 3 * 4]
    assert torch.equal(seen[1].whole[3].k, seen[3].whole[3].k)
    assert torch.equal(seen[1].asked[0].q, seen[3].asked[0].q)  # before any text is read
    assert not torch.equal(seen[1].asked[1].q, seen[3].asked[1].q)


def test_plans_ask_after_their_stand_ins_are_mids() -> None:
    shape = DistillShape("compressor-distill", 20, (1, 2), 16, (Fraction(1), Fraction(4)), 0.0)
    met = set()
    for seed in range(200):
        drawn = shape.plan(
            GRID, Queries(blocks=3, layers=9, tokens=7, stand_ins=4), 12, torch.Generator().manual_seed(seed)
        )
        blocks = [query.block for query in drawn.queries]
        assert blocks == sorted(set(blocks)) and blocks[-1] < 12 and 1 <= len(drawn.stand_ins) <= 4
        assert drawn.stand_ins[0] in drawn.layout.view(blocks[0]).mid
        assert set(drawn.stand_ins) <= set(drawn.layout.view(blocks[-1]).mid)
        assert all(query.layers == (0, 1) and len(query.tokens) == 7 for query in drawn.queries)
        met.add((drawn.layout.sink_blocks, drawn.layout.mid_span, len(drawn.stand_ins)))
    assert len(met) == 2 * 2 * 4


def test_the_real_model_is_planned_and_refused_where_it_does_not_fit(
    run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its configuration files: no weight is read."""
    place = tmp_path / "real"
    manifest = registry.read_manifest(DEMO_FOLDER)
    small = WanTransformer(
        TransformerConfig(num_layers=1, num_attention_heads=1, attention_head_dim=24, ffn_dim=8)
    )
    registry.write_package(
        place,
        manifest.model_copy(update={"name": "real", "size": (832, 480)}),
        transformer=small,
        base=DEMO_FOLDER,
        leave_out=("compressor",),
    )
    config = TransformerConfig().to_dict()
    (place / "transformer" / "config.json").write_text(json.dumps(config), "utf-8")
    monkeypatch.setattr(estimate, "free_memory", lambda device: (30 * 10**9, "this machine"))
    arguments = ("--set", f"model={json.dumps(str(place))}", "--set", "precision=bf16")
    found = run_command("recipes", "validate", "compressor-distill", "--json", *arguments)
    assert found.code == 5 and "This would fit: --set " in found.err
    values = json.loads(found.out)
    assert values["parameters"] == 1_418_996_800 + values["trained"]
    assert 15_000_000 < values["trained"] < 30_000_000
    smaller = recipes.load("compressor-distill", [f"model={place}", "precision=bf16", "quantize_frozen=int8"])
    spared = values["memory_bytes"]["weights"] - estimate.estimate(smaller, CPU).memory.weights
    assert 1.2e9 < spared < 1.42e9  # a byte of two of each weight in a layer's linears
    refused = run_command("train", "compressor-distill", *arguments)
    assert refused.code == 5 and not (tmp_path / "runs" / "compressor-distill" / "data").exists()
