"""Finetuning: the loss, exact resume, several processes, what is refused, and the package that comes out."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from clips import write_clip
from tiny import randomise
from torch import Tensor

from packforcing_cli import registry, rollout
from packforcing_cli.catalog import DEMO_FOLDER
from packforcing_cli.compressor import Compressor, CompressorConfig
from packforcing_cli.errors import MemoryFitError, UsageError, WeightsError
from packforcing_cli.layout import Grid
from packforcing_cli.training import clip_run, data, estimate, finetune, loop, recipes
from packforcing_cli.training.data import EncodedData, Wanted
from packforcing_cli.training.items import Shape
from packforcing_cli.training.packed import PackedItem, packed_forward
from packforcing_cli.training.recipe_kinds import Finetune
from packforcing_cli.transformer import TransformerConfig, WanTransformer

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with a transformer and a compressor of the smallest sizes."""
    folder = tmp_path_factory.mktemp("finetune") / "small"
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
        folder,
        manifest,
        transformer=transformer,
        compressor=compressor,
        base=DEMO_FOLDER,
        dtype=torch.float32,
    )
    return folder


@pytest.fixture(scope="module")
def encoded(package: Path, tmp_path_factory: pytest.TempPathFactory) -> EncodedData:
    """Four clips of one scene of five blocks, and one of eight."""
    clips = tmp_path_factory.mktemp("clips")
    for n in range(4):
        write_clip(clips / f"{n}.mp4", frames=77, seed=n, caption=f"a square number {n}")
    write_clip(clips / "long.mp4", frames=125, seed=9, caption="a long one")
    source = registry.open_model(package, device="cpu")
    wanted = Wanted.by(source.manifest, source.folder, scene_seconds=24.0)
    return data.encode(clips, tmp_path_factory.mktemp("encoded"), source, wanted)


@pytest.fixture(autouse=True)
def _few_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "EVALUATED_ITEMS", 1)


def recipe(package: Path, name: str = "finetune", **changes: Any) -> Finetune:
    values = {
        "model": str(package),
        "items": 2,
        "samples.every": 0,
        "train.steps": 4,
        "train.warmup": 1,
        "train.learning_rate": 1e-3,
        "train.evaluate_every": 1000,
        "data.held_out": 0.0,
        "train.threads": 1,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    chosen = recipes.load(name, [f"{key}={json.dumps(value)}" for key, value in values.items()])
    assert isinstance(chosen, Finetune)
    return chosen


def longest(encoded: EncodedData) -> data.Scene:
    return max(encoded.scenes, key=lambda scene: scene.blocks)


def train(chosen: Finetune, out: Path, encoded: EncodedData, **options: Any) -> dict[str, Any]:
    return finetune.train(chosen, out, encoded, log_every=1, **options)


def losses(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert len({line["step"] for line in lines if "loss" in line}) == sum("loss" in line for line in lines)
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def weights_of(out: Path) -> dict[str, bytes]:
    return {p.parent.name: p.read_bytes() for p in (out / "package").rglob("*.safetensors")}


# -- the loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["finetune", "finetune-long"])
def test_gradients_reach_the_compressor_and_equal_finite_differences(
    package: Path, encoded: EncodedData, name: str
) -> None:
    chosen = recipe(package, name)
    source = registry.open_model(package, device="cpu", dtype=torch.float32)
    models = finetune.load_models(chosen, source, torch.device("cpu"))
    models.transformer.double()
    models.compressor.double()
    shape, scene = estimate.shape_of(chosen.data), longest(encoded)
    assert scene.blocks == 8

    def loss() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for n in range(3):
            generator = torch.Generator().manual_seed(n)
            total = total + finetune.item_loss(models, encoded, scene, shape, chosen, generator)
        return total

    loss().backward()
    assert models.compressor.hr is not None
    transformer = models.transformer
    for weight in (
        models.compressor.hr.time.weight,
        models.compressor.hr.project.weight,
        transformer.patch_embedding.weight,
    ):
        assert weight.grad is not None and bool((weight.grad != 0).any())
        flat, n, ends = weight.data.view(-1), int(weight.grad.abs().argmax()), []
        original = float(flat[n])
        for sign in (1, -1):
            flat[n] = original + sign * 1e-5
            with torch.no_grad():
                ends.append(float(loss()))
        flat[n] = original
        assert float(weight.grad.view(-1)[n]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4)


def test_checkpointing_and_the_whole_backward_pass_give_equal_gradients(
    package: Path, encoded: EncodedData
) -> None:
    source = registry.open_model(package, device="cpu", dtype=torch.float32)
    gradients = []
    for checkpointing in (False, True):
        chosen = recipe(package, "finetune-long", checkpointing=checkpointing)
        models = finetune.load_models(chosen, source, torch.device("cpu"))
        generator = torch.Generator().manual_seed(3)
        shape = estimate.shape_of(chosen.data)
        finetune.item_loss(models, encoded, longest(encoded), shape, chosen, generator).backward()
        gradients.append([p.grad for m in (models.transformer, models.compressor) for p in m.parameters()])
    for whole, again in zip(*gradients, strict=True):
        assert (whole is None and again is None) or torch.equal(whole, again)


@pytest.mark.parametrize("name", ["finetune", "finetune-long"])
def test_every_block_of_an_item_reads_its_own_caption(
    package: Path, encoded: EncodedData, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = recipe(package, name, data__draws=2, data__caption_dropout=0.0)
    source = registry.open_model(package, device="cpu", dtype=torch.float32)
    models = finetune.load_models(chosen, source, torch.device("cpu"))
    shape, plain = estimate.shape_of(chosen.data), longest(encoded)
    texts = [scene.caption for scene in encoded.scenes[:2]]
    captions = tuple(texts[block >= 4] for block in range(plain.blocks))
    scene = dataclasses.replace(plain, words=data.Words(captions, (4,)))
    seen: dict[str, Any] = {}

    def spy(model: WanTransformer, item: PackedItem, grid: Grid, **given: Any) -> Tensor:
        seen.update(given, item=item)
        return packed_forward(model, item, grid, **given)

    monkeypatch.setattr(finetune, "packed_forward", spy)
    for n in range(4):
        finetune.item_loss(models, encoded, scene, shape, chosen, torch.Generator().manual_seed(n))
        drawn = shape.item(models.grid, scene.blocks, torch.Generator().manual_seed(n), cuts=(4,))
        assert seen["item"] == drawn.packed
        pieces = [*drawn.packed.full, *drawn.packed.compressed, *drawn.targets, *drawn.targets]
        expected = [captions[drawn.scene[piece]] for piece in pieces]
        rows = seen["prompts"][0].tolist() if seen["prompts"] is not None else [0] * len(pieces)
        assert len(rows) == len(pieces)
        keys = seen["text"].layers[0][0]
        for row, caption in zip(rows, expected, strict=True):
            own = models.transformer.embed_text(encoded.embedding(caption)).layers[0][0]
            torch.testing.assert_close(keys[row : row + 1], own)
    same = dataclasses.replace(plain, words=data.Words((plain.caption,) * plain.blocks))
    losses = [
        finetune.item_loss(models, encoded, s, shape, chosen, torch.Generator().manual_seed(1))
        for s in (plain, same)
    ]
    assert torch.equal(*losses)


def test_a_dropped_caption_leaves_the_history_its_own(
    package: Path, encoded: EncodedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As guidance does at inference: both passes see a history that was committed with its caption."""
    chosen = recipe(package, "finetune-long", data__draws=2, data__caption_dropout=0.99999)
    source = registry.open_model(package, device="cpu", dtype=torch.float32)
    models = finetune.load_models(chosen, source, torch.device("cpu"))
    seen: dict[str, Any] = {}

    def spy(model: WanTransformer, item: PackedItem, grid: Grid, **given: Any) -> Tensor:
        seen.update(given, item=item)
        return packed_forward(model, item, grid, **given)

    monkeypatch.setattr(finetune, "packed_forward", spy)
    scene = longest(encoded)
    finetune.item_loss(
        models, encoded, scene, estimate.shape_of(chosen.data), chosen, torch.Generator().manual_seed(3)
    )
    rows, keys = seen["prompts"][0].tolist(), seen["text"].layers[0][0]
    history = len(seen["item"].full) + len(seen["item"].compressed)
    assert 0 < history < len(rows)
    for n, row in enumerate(rows):
        text = scene.caption if n < history else ""
        own = models.transformer.embed_text(encoded.embedding(text)).layers[0][0]
        torch.testing.assert_close(keys[row : row + 1], own)


def test_held_out_clips_are_never_trained_on(package: Path, encoded: EncodedData) -> None:
    shape = estimate.shape_of(recipe(package).data)
    split = clip_run.Split.of(encoded, shape, 0.4)
    assert split.is_held_out and len({scene.clip for scene in split.evaluated}) == 2
    assert not {scene.clip for scene in split.evaluated} & {scene.clip for scene in split.trained}
    alone = clip_run.Split.of(encoded, shape, 0.0)
    assert not alone.is_held_out and alone.evaluated == alone.trained


def test_bfloat16_products_keep_float32_weights(package: Path, encoded: EncodedData, tmp_path: Path) -> None:
    chosen = recipe(package, train__steps=2, precision="bf16")
    train(chosen, tmp_path / "half", encoded)
    train(recipe(package, train__steps=2), tmp_path / "full", encoded)
    half, full = losses(tmp_path / "half"), losses(tmp_path / "full")
    assert half != full
    assert half == pytest.approx(full, rel=0.02)
    state = registry.weights.read_file(
        next((tmp_path / "half" / "checkpoints").iterdir()), device=torch.device("cpu")
    )
    assert {t.dtype for name, t in state.items() if name.startswith(("module/", "average/"))} == {
        torch.float32
    }


# -- runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(package: Path, encoded: EncodedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run of six steps."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(recipe(package, "finetune-long", train__steps=6, data__held_out=0.2), out, encoded)
    return out


def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(
    whole_run: Path, package: Path, encoded: EncodedData, tmp_path: Path
) -> None:
    """Stopped after step 3; then killed at step 5, before a checkpoint; then finished."""
    chosen = recipe(package, "finetune-long", train__steps=6, data__held_out=0.2)
    steps: Iterator[int] = iter(range(1, 100))
    figures = train(chosen, tmp_path, encoded, should_stop=lambda: next(steps) == 3)
    assert figures == {"steps": 3}
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "checkpoints", kept)
    steps = iter(range(4, 100))
    train(chosen, tmp_path, encoded, should_stop=lambda: next(steps) == 5)
    shutil.rmtree(tmp_path / "checkpoints")
    kept.rename(tmp_path / "checkpoints")
    with (tmp_path / "metrics.jsonl").open("ab") as log:
        log.write(b'{"step": 6, "lo')
    assert train(chosen, tmp_path, encoded)["steps"] == 6
    assert losses(tmp_path) == losses(whole_run)
    assert list(losses(whole_run)) == [1, 2, 3, 4, 5, 6]
    assert weights_of(tmp_path) == weights_of(whole_run)


def test_two_processes_follow_the_curve_of_one(package: Path, encoded: EncodedData, tmp_path: Path) -> None:
    chosen = recipe(package, train__steps=3)
    train(chosen, tmp_path / "one", encoded)
    (tmp_path / "run.py").write_text(
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from packforcing_cli.training import finetune\n"
        "from packforcing_cli.training.data import EncodedData\n"
        "from packforcing_cli.training.recipe_kinds import Finetune\n"
        "finetune.EVALUATED_ITEMS = 1\n"
        "chosen = Finetune.model_validate_json(sys.argv[1])\n"
        "finetune.train(chosen, Path('two'), EncodedData.open(Path(sys.argv[2])), log_every=1)\n",
        "utf-8",
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
            *("run.py", chosen.model_dump_json(), str(encoded.folder)),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_items_that_processes_cannot_share_are_refused(tmp_path: Path) -> None:
    with (
        loop.Log(tmp_path / "log.jsonl") as log,
        pytest.raises(UsageError, match="3 items a step cannot be shared by 2 processes"),
    ):
        loop.run(
            loop.TrainingState({}, loop.MovingAverage({}, 0.9), []),
            recipes.Train(steps=1, learning_rate=1.0),
            lambda generator: (torch.zeros(()), {}),
            out=tmp_path,
            facts={},
            workers=loop.Workers(count=2),
            log=log,
            items=3,
        )


def test_the_result_is_a_package_that_generates(whole_run: Path) -> None:
    model = registry.load_model(whole_run / "package", device="cpu")
    manifest = model.manifest
    assert (manifest.name, manifest.base_model) == ("small-finetuned", "small")
    assert (manifest.cache.sink_blocks, manifest.cache.top_k, manifest.cache.mid_span) == (2, 16, "1")
    said = manifest.provenance
    assert (said["recipe"], said["steps"], said["data"]["clips"]) == ("finetune", 6, 4)
    assert said["data"]["items"].startswith("long-memory")
    assert "held-out clips" in said["metrics"]
    assert said["from"]["model"] == "small"
    frames = [b.frames for b in rollout.stream_generate(model, "a red circle", num_blocks=4, seed=0)]
    assert [len(f) for f in frames] == [13, 16, 16, 16]


def test_training_changes_the_weights_it_should(
    package: Path, whole_run: Path, encoded: EncodedData, tmp_path: Path
) -> None:
    names = {"transformer", "compressor", "vae", "text_encoder"}
    before = {p.parent.name: p.read_bytes() for p in package.rglob("*.safetensors")}
    after = weights_of(whole_run)
    assert {name for name in names if before[name] != after[name]} == {"transformer", "compressor"}
    train(recipe(package, train_transformer=False, train__steps=2), tmp_path, encoded)
    after = weights_of(tmp_path)
    assert {name for name in names if before[name] != after[name]} == {"compressor"}


def test_a_model_without_a_compressor_starts_from_its_lr_branch(
    package: Path, encoded: EncodedData, tmp_path: Path
) -> None:
    """As released few-step students do: they become many-step models with a compressor of their own."""
    old = registry.read_manifest(package)
    schedule = registry.Schedule(
        kind="renoise", steps=4, shift=5.0, guidance=1.0, timesteps=(1000, 750, 500, 250)
    )
    bare = tmp_path / "bare"
    registry.write_package(
        bare,
        old.model_copy(update={"name": "bare", "schedule": schedule}),
        base=package,
        leave_out=("compressor",),
    )
    source = registry.open_model(bare, device="cpu", dtype=torch.float32)
    config = estimate.compressor_config(source.manifest, TransformerConfig(num_layers=1), bare)
    assert config.widths == (32, 128, 512, 2048)
    small = dataclasses.replace(config, dim=24, widths=(4, 4, 6, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "compressor_config", lambda *_: small)
        models = finetune.load_models(recipe(bare), source, torch.device("cpu"))
        again = finetune.load_models(recipe(bare), source, torch.device("cpu"))
        train(recipe(bare, train__steps=1), tmp_path / "run", encoded)
    for one, other in zip(models.compressor.parameters(), again.compressor.parameters(), strict=True):
        assert torch.equal(one, other)
    tokens = torch.randn(1, 2 * 1 * 2, 24)
    torch.testing.assert_close(models.compressor(torch.randn(1, 16, 4, 8, 16), tokens), tokens)
    written = registry.read_manifest(tmp_path / "run" / "package")
    assert (written.schedule.kind, written.schedule.steps, written.schedule.guidance) == ("euler", 40, 3.0)
    assert "compressor" in written.parts


@pytest.mark.parametrize("name", ["finetune", "finetune-lora"])
def test_a_student_becomes_what_its_teacher_was_unless_its_compressor_alone_is_trained(
    package: Path, encoded: EncodedData, name: str
) -> None:
    source = registry.open_model(package, device="cpu")
    flow = source.manifest.schedule
    student = registry.Schedule(kind="renoise", steps=2, shift=5.0, timesteps=(1000, 500))
    update = {"schedule": student, "flow_schedule": flow}
    source = dataclasses.replace(source, manifest=source.manifest.model_copy(update=update))

    def result(**settings: Any) -> registry.Manifest:
        chosen = recipe(package, name, **settings)
        shape = estimate.shape_of(chosen.data)
        split = clip_run.Split.of(encoded, shape, 0.0)
        return finetune.result_manifest(chosen, source, encoded, shape, split)

    made = result(sampling__steps=5)
    assert (made.schedule, made.flow_schedule) == (flow.model_copy(update={"steps": 5}), None)
    if name == "finetune":
        made = result(train_transformer=False)
        assert (made.schedule, made.flow_schedule) == (student, flow)
        with pytest.raises(UsageError, match="stays a few-step student") as caught:
            result(train_transformer=False, sampling__steps=5)
        assert "train_transformer=true" in (caught.value.hint or "")


def test_samples_and_curve_are_made_on_the_way(package: Path, encoded: EncodedData, tmp_path: Path) -> None:
    chosen = recipe(
        package,
        **{
            "train.steps": 3,
            "train.evaluate_every": 1,
            "samples.every": 2,
            "samples.count": 1,
            "samples.seconds": 1.0,
            "sampling.steps": 1,
        },
    )
    with_samples = train(chosen, tmp_path / "with", encoded)
    made = sorted(p.name for p in (tmp_path / "with" / "samples").glob("*.mp4"))
    assert made == ["0000000-0.mp4", "0000002-0.mp4", "0000003-0.mp4", "before-after-0.mp4"]
    first, last = ((tmp_path / "with" / "samples" / name).read_bytes() for name in (made[0], made[2]))
    assert first != last
    assert (tmp_path / "with" / "curve.png").read_bytes().startswith(b"\x89PNG")
    train(recipe(package, train__steps=3), tmp_path / "without", encoded)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")  # sampling draws nothing from training
    assert with_samples["result"] == str(tmp_path / "with" / "package")


# -- what is refused --------------------------------------------------------------------------------------------


def test_another_recipe_or_other_data_does_not_go_on(
    whole_run: Path, package: Path, encoded: EncodedData, tmp_path: Path
) -> None:
    shutil.copytree(whole_run / "checkpoints", tmp_path / "checkpoints")
    options = {"train__steps": 7, "data__held_out": 0.2}
    with pytest.raises(UsageError, match=r"\(train.learning_rate: 0.001 then, 0.002 now\)"):
        train(recipe(package, "finetune-long", **options, train__learning_rate=2e-3), tmp_path, encoded)
    fewer = json.loads((encoded.folder / "dataset.json").read_text("utf-8"))
    other = EncodedData(encoded.folder, fewer | {"sha256": "0" * 64})
    with pytest.raises(UsageError, match=f"\\(data: '{encoded.sha256}' then, '{'0' * 64}' now\\)"):
        train(recipe(package, "finetune-long", **options), tmp_path, other)
    begun = max(loop.step_of(path) for path in loop.checkpoints_of(tmp_path / "checkpoints"))
    done = train(recipe(package, "finetune-long", **options), tmp_path, other, accept=True)
    assert done["steps"] == 7
    said = registry.read_manifest(Path(done["result"])).provenance["changed on the way"]
    assert said == [{"step": begun, "facts": {"data": [encoded.sha256, "0" * 64]}}]


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("finetune", [], "11% of the data would never be trained on: strict items take the first 5 blocks"),
        ("finetune-long", ["data.scene_seconds=5"], "up to 8 blocks, and data.scene_seconds is 5"),
        ("finetune-long", ["data.enlarge=true"], "data.enlarge is true, and "),
        ("finetune-long", ["data.max_bad=0"], "1 of the 6 clips of "),
    ],
)
def test_data_that_was_encoded_otherwise_than_the_recipe_says_is_refused(
    name: str, settings: list[str], said: str, encoded: EncodedData, run_command: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    values = json.loads((encoded.folder / "dataset.json").read_text("utf-8"))
    values["counts"]["too short"] = 1
    (folder / "dataset.json").write_text(json.dumps(values), "utf-8")
    words = [word for setting in ("samples.every=0", *settings) for word in ("--set", setting)]
    result = run_command("train", name, "--data", str(folder), "--out", "run", *words)
    assert result.code == 2
    assert said in result.err
    assert not Path("run/checkpoints").exists()


def test_a_start_says_how_often_items_see_as_many_mids_as_inference_and_of_trained_scenes_alone(
    package: Path, encoded: EncodedData, run_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scene of eight blocks is held out: what is left has no more than two mids beside a sink."""
    long = longest(encoded).content

    def split(clips: list[str], share: float) -> tuple[list[int], list[int]]:
        return [n for n, clip in enumerate(clips) if clip != long], [clips.index(long)]

    monkeypatch.setattr(clip_run, "kept_evenly", split)
    chosen = ["samples.every=0", f"model={package}", "preset.top_k=3"]
    words = [word for setting in chosen for word in ("--set", setting)]
    result = run_command("train", "finetune-long", "--data", str(encoded.folder), "--out", "run", *words)
    assert result.code == 2
    assert "1 sink with 0 to 2 mids, 2 sinks with 0 to 1 mid;" in result.err
    assert "mids         3, as many as inference recalls, in 0% of the items" in result.err
    assert "3 mids: training meets at most 1 beside 2 sinks" in result.err


def test_data_of_another_model_is_refused(package: Path, encoded: EncodedData, tmp_path: Path) -> None:
    settings = encoded.settings | {"vae": "0" * 64, "fps": 8}
    other = EncodedData(encoded.folder, {"settings": settings, "sha256": "", "counts": {}, "clips": []})
    with pytest.raises(UsageError, match=r"was not encoded for small: vae .*; fps 8 then, 16 now"):
        train(recipe(package), tmp_path, other)


def test_a_loss_that_is_not_finite_names_the_clip_and_keeps_the_checkpoint(
    package: Path, encoded: EncodedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = recipe(package, train__steps=2)
    train(chosen, tmp_path, encoded)
    load = EncodedData.load

    def broken(self: EncodedData, scene: data.Scene, blocks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        latents, lr = load(self, scene, blocks)
        return latents * float("nan"), lr

    monkeypatch.setattr(EncodedData, "load", broken)
    with pytest.raises(WeightsError, match=r"the loss became nan at step 2, on scene 0 of \w+\.mp4") as error:
        train(recipe(package, train__steps=3), tmp_path, encoded)
    assert "checkpoints" in error.value.hint
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000002.safetensors"]


def test_a_gradient_that_is_not_finite_changes_no_weight(tmp_path: Path) -> None:
    layer = torch.nn.Linear(1, 1)
    state = loop.TrainingState(
        {"layer": layer},
        loop.MovingAverage({"layer": layer}, 0.9),
        [torch.optim.SGD(layer.parameters(), 0.1)],
    )
    before = [p.detach().clone() for p in layer.parameters()]
    settings = recipes.Train(steps=1, learning_rate=0.1)

    def loss(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        value = layer(torch.zeros(1, 1)).sum()
        return (value - value.detach()).abs().sqrt(), {}  # 0, and its slope is infinite

    with loop.Log(tmp_path / "log.jsonl") as log, pytest.raises(WeightsError, match="the gradient became"):
        loop.run(state, settings, loss, out=tmp_path, facts={}, workers=loop.Workers(), log=log)
    assert all(torch.equal(old, new) for old, new in zip(before, layer.parameters(), strict=True))


def test_scenes_that_are_too_short_for_the_shape_are_said(package: Path, encoded: EncodedData) -> None:
    short = EncodedData(encoded.folder, json.loads((encoded.folder / "dataset.json").read_text("utf-8")))
    short.scenes = tuple(dataclasses.replace(scene, blocks=3) for scene in encoded.scenes)
    shape = estimate.shape_of(recipe(package, "finetune-long").data)
    with pytest.raises(UsageError, match="long-memory items need scenes of 4 blocks; the longest of 5"):
        clip_run.Split.of(short, shape, 0.0)


def test_too_little_memory_is_said_with_what_would_fit(
    package: Path, run_command: Any, encoded: EncodedData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen = recipe("demo")  # type: ignore[arg-type]
    cpu = torch.device("cpu")
    needed = [
        estimate.estimate(chosen.model_copy(update={"checkpointing": c}), cpu).memory.total
        for c in (False, True)
    ]
    assert needed[1] < needed[0]
    monkeypatch.setattr(estimate, "free_memory", lambda device: (sum(needed) // 2, "this machine"))
    assert estimate.would_fit(chosen, cpu) == [
        "--set checkpointing=true",
        "--set checkpointing=true --set samples.every=0",
        "--set checkpointing=true --set samples.every=0 --set train_transformer=false",
    ]
    with pytest.raises(MemoryFitError, match="the training needs about"):
        estimate.estimate(chosen, cpu).require_fit()
    result = run_command(
        "train", "finetune", "--data", str(encoded.folder), "--set", "samples.every=0", "--force"
    )
    assert result.code == 5
    assert "This would fit: --set checkpointing=true" in result.err
    assert not (tmp_path / "runs" / "finetune" / "checkpoints").exists()


# -- the estimate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_estimated_activations_are_those_that_are_kept(checkpointing: bool) -> None:
    config = TransformerConfig(
        num_layers=5, num_attention_heads=2, attention_head_dim=12, ffn_dim=64, in_channels=4, out_channels=4,
        text_dim=8, freq_dim=16,
    )  # fmt: skip
    grid = Grid(frames_per_block=4, rows=4, cols=8, layers=5, kv_dim=24, heads=2, dtype_bytes=4)
    shape = Shape("long-memory", 5, (2,), 16, (Fraction(1),), 0.0)
    item = estimate.widest_item(shape, grid, 20)
    model = WanTransformer(config)
    if checkpointing:
        model.recompute_layers()
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    full, mids, targets = len(item.packed.full), len(item.packed.compressed), len(item.targets)
    inputs: dict[str, Tensor] = {
        "clean": torch.randn(1, full, 4, 4, 8, 16),
        "compressed": torch.randn(1, mids, grid.compressed_tokens, 24, requires_grad=True),
        "noisy": torch.randn(1, targets, 4, 4, 8, 16),
        "timesteps": torch.rand(1, targets) * 1000,
    }
    text = model.embed_text(torch.randn(1, 7, 8))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        packed_forward(model, item.packed, grid, text=text, targets=item.targets, **inputs)
    found = sum(t.untyped_storage().nbytes() for t in kept.values())
    settings: dict[str, Any] = {"draws": 1, "text_length": 7, "keeps_scores": True}
    planned = estimate.activation_bytes(config, grid, item, checkpointing=checkpointing, **settings)
    if checkpointing:  # what is kept at the end is without the layer that is run again
        assert found < planned < estimate.activation_bytes(config, grid, item, **settings)
    else:
        assert planned == pytest.approx(found, rel=0.1)
        fused = estimate.activation_bytes(config, grid, item, **(settings | {"keeps_scores": False}))
        assert fused < planned


# -- recipes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipes.names())
def test_every_shipped_recipe_is_valid_and_fits_its_inference(name: str) -> None:
    found = estimate.estimate(recipes.load(name), torch.device("cpu"))
    found.require_match()
    assert found.lines()[0].startswith("parameters   ")
    header = recipes.find(name).read_text("utf-8").split('kind = "')[0]
    assert all(f"# {word} " in header for word in ("command", "hardware", "time", "memory", "loss"))


def test_recipes_are_listed_shown_and_copied(run_command: Any, tmp_path: Path) -> None:
    listed = json.loads(run_command("recipes", "list", "--json").out)
    assert listed["schema"] == 1 and {"demo-vae", "finetune"} <= {r["name"] for r in listed["recipes"]}
    assert "finetune-long" in run_command("recipes", "list").out
    shown = run_command("recipes", "show", "finetune")
    assert shown.out.startswith("# Finetune a model on short clips")
    assert run_command("recipes", "copy", "finetune").out == "finetune.toml\n"
    assert (tmp_path / "finetune.toml").read_text("utf-8").rstrip() == shown.out.rstrip()
    again = run_command("recipes", "copy", "finetune")
    assert (again.code, "finetune.toml exists" in again.err) == (2, True)
    assert run_command("recipes", "copy", "finetune", "mine.toml").code == 0
    assert run_command("recipes", "copy", "finetune", "mine.txt").code == 2


def test_validate_says_what_a_recipe_takes_and_all_that_is_wrong(run_command: Any) -> None:
    result = run_command("recipes", "validate", "finetune-long")
    assert result.code == 0
    assert "16 mids" in result.out and "80 slots at most" in result.out
    values = json.loads(run_command("recipes", "validate", "finetune", "--json").out)
    assert values["context"] == {"mids": {"1": 2, "2": 1}, "spans": ["1", "2", "4"], "slots": 20}
    assert values["trained"] == values["parameters"] and values["mismatches"] == []
    refused = run_command("recipes", "validate", "finetune", "--set", "preset.top_k=16")
    assert refused.code == 2
    assert "16 mids: training meets at most 1 beside 2 sinks" in refused.err
    forced = run_command("recipes", "validate", "finetune", "--set", "preset.top_k=16", "--force")
    assert forced.code == 0 and "warning: inference leaves what is trained: 16 mids" in forced.err
    wrong = run_command(
        *("recipes", "validate", "finetune", "--set", "train.stepz=3", "--set", "items=0"),
        *("--set", 'data.spans=["x"]', "--set", "samples.every=7"),
    )
    assert wrong.code == 2
    for said in ("train.stepz: unknown key; nearest known: steps", "items: ", "data.spans: "):
        assert said in wrong.err
    kind = run_command("recipes", "validate", "finetune", "--set", "kind=fintune")
    assert "kind: 'fintune' is unknown; nearest known: finetune" in kind.err
