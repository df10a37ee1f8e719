"""The demo's training: pools of encoded stories, and what a step's loss is made of."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from packforcing_cli.training import demo_flow, demo_text, estimate, loop, recipes, world
from packforcing_cli.training.demo_flow import Batch, Models, Pool
from packforcing_cli.training.recipes import DemoFlow
from packforcing_cli.vae import TinyCodec

torch.set_num_threads(1)

TINY = [
    "vae=package", "model.layers=2", "model.heads=2", "model.head_dim=12", "model.ffn_dim=48",
    "model.compressor_widths=[4,4,6,8]", "data.packed_blocks=6", "data.packed_clips=1", "data.first_clips=2",
    "data.long_blocks=12", "data.long_clips=1", "data.long_probability=1", "data.recall_share=1",
]  # fmt: skip
STORIES = {"visitor_share": 1.0, "switch_share": 0.5}


def recipe(*settings: str) -> DemoFlow:
    found = recipes.load("demo-flow", [*TINY, *settings])
    assert isinstance(found, DemoFlow)
    return found


@pytest.fixture(scope="module")
def codec() -> TinyCodec:
    return demo_flow.load_codec(recipe())


@pytest.fixture(scope="module")
def pools(codec: TinyCodec, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pool]:
    folder = tmp_path_factory.mktemp("pools")
    return {
        name: demo_flow.build_pool(
            folder / f"{name}.safetensors", codec, scenes=3, blocks=blocks, seed=4, quick=quick, **STORIES
        )
        for name, blocks, quick in (("first", 1, False), ("short", 6, True), ("long", 12, True))
    }


@pytest.fixture(scope="module")
def models(codec: TinyCodec, tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("tokenizer")
    demo_text.build_demo_tokenizer(folder)
    built = demo_flow.build(recipe(), folder, codec.facts.latent_channels)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # so that every path has a gradient; some parts start as zeros
        for module in built.modules().values():
            for p in module.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return built


def test_a_pool_says_of_every_block_what_its_scene_says(pools: dict[str, Pool]) -> None:
    pool, generator = pools["short"], loop.step_generator(4, 6)
    assert pool.latents.shape == (3, 6, 16, 4, 8, 16) and pool.lr.shape == (3, 6, 16, 2, 2, 4)
    captions, seen = world.story_captions(), set()
    for n in range(3):
        scene = demo_flow.draw_scene(generator, 6, 1.0, 0.5, True)
        assert scene.visitor is not None
        assert [captions[i] for i in pool.caption[n].tolist()] == list(scene.block_captions(6))
        assert pool.here[n].tolist() == [scene.visitor.is_here(block) for block in range(6)]
        row, col = divmod(int(pool.place[n].argmax()), 16)
        assert abs(8 * col + 4 - scene.visitor.x) < 9 and abs(8 * row + 4 - scene.visitor.y) < 9
        assert float(pool.place[n].sum()) * 64 == pytest.approx(180, rel=0.02)
        seen |= set(pool.here[n].tolist())
    assert seen == {0, 1}


def test_a_pool_is_read_again_and_made_anew_for_other_stories(codec: TinyCodec, tmp_path: Path) -> None:
    path = tmp_path / "pool.safetensors"
    settings = {"scenes": 2, "blocks": 1, "seed": 1, "quick": False}
    first = demo_flow.build_pool(path, codec, **settings, **STORIES)  # type: ignore[arg-type]
    written = path.stat().st_mtime_ns
    again = demo_flow.build_pool(path, codec, **settings, **STORIES)  # type: ignore[arg-type]
    assert path.stat().st_mtime_ns == written and torch.equal(first.latents, again.latents)
    plain = demo_flow.build_pool(path, codec, **settings, visitor_share=0.0, switch_share=0.0)  # type: ignore[arg-type]
    assert path.stat().st_mtime_ns != written
    assert not bool(plain.place.any()) and not bool(plain.here.any())
    assert int(plain.caption.max()) < len(world.training_captions())


def test_a_steps_loss_reaches_every_module_and_bf16_is_near(models: Models, pools: dict[str, Pool]) -> None:
    parts = {}
    for precision in ("fp32", "bf16"):
        settings = recipe(f"precision={precision}", "data.visitor_weight=4", "data.return_weight=8")
        for module in models.modules().values():
            module.zero_grad()
        loss, parts[precision] = demo_flow.step_loss(models, pools, settings, loop.step_generator(0, 1))
        loss.backward()
        for module in models.modules().values():
            assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())
            assert sum(float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None) > 0
        assert models.compressor.hr is not None and models.compressor.hr.time.weight.grad is not None
        assert float(models.compressor.hr.time.weight.grad.abs().max()) > 0
    assert {"first", "packed", "long"} <= parts["fp32"].keys()
    for name, value in parts["fp32"].items():
        assert parts["bf16"][name] == pytest.approx(value, rel=0.03)
    assert parts["bf16"] != parts["fp32"]  # it did compute in another precision


def test_weights_apply_where_the_look_of_a_visitor_can_be_known(
    models: Models, pools: dict[str, Pool]
) -> None:
    here = torch.tensor([[0, 1, 0, 0, 1, 1]], dtype=torch.uint8)
    pool = replace(pools["short"], here=here.expand(3, -1))
    batch = Batch(torch.Generator().manual_seed(3), torch.device("cpu"))
    item = demo_flow.strict_item(models, 6, torch.Generator().manual_seed(1))
    assert 1 in item.views[4].mid  # so that block 4 is a return
    blocks = tuple(range(6))
    clips = demo_flow.packed_clips(
        batch, pool, item, [blocks], torch.tensor([0]), targets=blocks[1:], context_noise=0.15
    )
    with torch.no_grad():
        error = demo_flow.flow_errors(models, batch, clips, recipe(), 2)
    plain = clips.weighted(error, recipe().data)
    known = clips.weighted(error, recipe("data.visitor_weight=5").data)
    back = clips.weighted(error, recipe("data.return_weight=5").data)
    assert plain.shape == (1, 2, 5)
    for draw in range(2):  # block 1: it comes for the first time; block 4: it returns
        assert (known > plain)[0, draw].tolist() == [False, True, True, False, True]
        assert (back > plain)[0, draw].tolist() == [False, False, False, True, False]
    torch.testing.assert_close(plain[0, 1], error[0, 5:].mean((1, 2, 3, 4)))
    where = clips.cells[0] > 0  # [h,w]
    wanted = torch.stack([error[0, n].mean((0, 1))[where].mean() for n in (3, 8)]).mean()
    assert clips.recall(error) == pytest.approx(float(wanted))


def test_whole_clips_are_those_that_one_caption_tells(models: Models, pools: dict[str, Pool]) -> None:
    pool, batch = pools["short"], Batch(torch.Generator().manual_seed(3), torch.device("cpu"))
    captions = torch.tensor([[4, 4, 4, 4, 4, 9], [4, 4, 7, 4, 4, 4], [5, 5, 5, 5, 6, 6]])
    found = demo_flow.whole_clips(batch, replace(pool, caption=captions), 3)
    assert found is not None
    assert found.captions.tolist() == [4, 4, 4] and found.x0.shape == (3, 1, 16, 20, 8, 16)
    for block in range(5):
        assert torch.equal(found.x0[1, 0, :, 4 * block : 4 * block + 4], pool.latents[0, block].float())
    assert demo_flow.whole_clips(batch, replace(pool, caption=captions[1:]), 3) is None
    v = found.velocity(models, batch, found.x0, torch.full((3, 1), 0.5), torch.zeros(3, 1).bool())
    other = found.x0.clone()
    other[:, :, :, -1] += 1  # the last frame reaches the first: nothing is causal
    w = found.velocity(models, batch, other, torch.full((3, 1), 0.5), torch.zeros(3, 1).bool())
    assert float((v - w)[:, :, :, 0].detach().abs().max()) > 1e-6
    data = {"data.whole_probability": 1.0, "data.long_clips": 0, "data.packed_clips": 0}
    settings = recipe(*(f"{key}={value}" for key, value in data.items()))
    same = replace(pool, caption=captions)
    parts = demo_flow.step_loss(models, {**pools, "short": same}, settings, loop.step_generator(0, 1))[1]
    assert parts.keys() == {"first", "whole"}


def test_an_evaluation_is_repeatable(models: Models, pools: dict[str, Pool]) -> None:
    first = demo_flow.mean_error(models, pools, recipe(), 0.9, count=4)
    assert first == demo_flow.mean_error(models, pools, recipe(), 0.9, count=4)
    assert first.keys() >= {"first", "later"} and min(first.values()) > 0


def test_evaluations_are_of_scenes_that_no_process_trains_on(
    codec: TinyCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = ("data.first_scenes=70", "data.short_scenes=4", "data.short_blocks=6", "data.long_scenes=2")
    settings = recipe(
        *counts, "train.steps=1", "train.evaluate_every=1", "data.visitor_share=1", "data.long_blocks=10"
    )
    given: list[dict[str, Pool]] = []
    evaluate = demo_flow.mean_error

    def seen(models: Models, pools: dict[str, Pool], recipe: DemoFlow, sigma: float) -> dict[str, float]:
        given.append(pools)
        return evaluate(models, pools, recipe, sigma, count=4)

    monkeypatch.setattr(demo_flow, "mean_error", seen)
    demo_flow.train(settings, tmp_path)
    assert {name: len(pool.here) for name, pool in given[0].items()} == {"first": 64, "short": 4, "long": 2}
    for workers in (loop.Workers(0, 2, torch.device("cpu")), loop.Workers(1, 2, torch.device("cpu"))):
        trained = demo_flow.build_pools(settings, tmp_path / "two", codec, workers, lambda: False)
        for name, pool in trained.items():
            known = {scene.numpy().tobytes() for scene in pool.latents}
            assert not known & {scene.numpy().tobytes() for scene in given[0][name].latents}
    assert len(given) == len(demo_flow.EVALUATED_SIGMAS)


def test_an_evaluation_tells_whether_the_compressed_tokens_matter(
    models: Models, pools: dict[str, Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = demo_flow.mean_error(models, pools, recipe(), 0.9)
    assert found["far recall"] != found["other memory"]
    assert 0.5 < found["token scale"] < 2
    compress = demo_flow.compress
    monkeypatch.setattr(demo_flow, "compress", lambda *of: torch.zeros_like(compress(*of)))
    found = demo_flow.mean_error(models, pools, recipe(), 0.9)
    assert found["far recall"] == found["other memory"]
    assert found["token scale"] == 0


def test_parts_can_start_from_nothing_and_the_compressor_learns_at_its_own_rate(models: Models) -> None:
    settings = recipe(
        "init=package", 'fresh=["transformer", "compressor"]', "train.compressor_learning_rate=1e-4",
        "train.compressor_weight_decay=0.5",
    )  # fmt: skip
    modules = {name: copy.deepcopy(module) for name, module in models.modules().items()}
    before = {name: parameters_to_vector(module.parameters()) for name, module in modules.items()}
    demo_flow.start_from(settings, modules)
    same = [
        name
        for name, module in modules.items()
        if torch.equal(before[name], parameters_to_vector(module.parameters()))
    ]
    assert same == ["transformer", "compressor"]

    groups = [
        g for optimizer in demo_flow.optimizers_of(modules, settings.train) for g in optimizer.param_groups
    ]
    of = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert {of.pop(id(p)) for p in modules["compressor"].parameters()} == {(1e-4, 0.5)}
    assert len(of) == sum(len(list(modules[name].parameters())) for name in ("transformer", "text_encoder"))
    assert (1e-4, 0.5) not in of.values()


def test_asked_to_stop_it_leaves_no_half_a_pool(codec: TinyCodec, tmp_path: Path) -> None:
    path, asked = tmp_path / "first.safetensors", iter((False, True))
    with pytest.raises(loop.Stopped):
        demo_flow.build_pool(
            path, codec, scenes=70, blocks=1, seed=0, quick=False, should_stop=lambda: next(asked), **STORIES
        )
    assert not any(tmp_path.iterdir())


def test_the_planned_memory_is_that_of_all_kinds_of_items(models: Models, pools: dict[str, Pool]) -> None:
    """What a step keeps for the backward pass, counted as it is made, with as many far blocks as there are."""
    chosen = recipe("data.whole_probability=1", "data.whole_clips=2", "data.long_blocks=12")
    batch = demo_flow.Batch(torch.Generator().manual_seed(5), torch.device("cpu"))
    kept: dict[str, int] = {}
    plain = replace(pools["short"], caption=torch.zeros_like(pools["short"].caption))
    given = pools | {"short": plain}
    for name, clips, draws in demo_flow.items_of_step(models, batch, given, chosen.data, mids=16):
        with estimate._Saved() as saved:
            demo_flow.flow_errors(models, batch, clips, chosen, draws)
        kept[name] = saved.size_bytes
    assert set(kept) == {"first", "packed", "long", "whole"}
    count = sum(kept.values())

    def planned(*settings: str) -> int:
        changed = recipe("data.whole_probability=1", "data.whole_clips=2", "data.long_blocks=12", *settings)
        return estimate.estimate(changed, torch.device("cpu")).memory.activations

    assert count < planned() < 1.5 * count
    assert planned("data.whole_clips=4") > planned()
    assert planned("data.first_clips=8") > planned()
    assert planned("data.long_draws=6") > planned()


def test_too_large_demo_training_says_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, large = (
        torch.device("cpu"),
        recipe("data.packed_draws=6", "data.packed_clips=2", "data.first_clips=2"),
    )
    needed, less = (
        estimate.estimate(r, cpu).memory.total
        for r in (large, recipe("data.packed_draws=1", "data.long_draws=1"))
    )
    assert less < needed
    monkeypatch.setattr(estimate, "free_memory", lambda device: ((needed + less) / 2 / 0.95, "this machine"))
    found = estimate.would_fit(large, cpu)
    assert found[0].startswith("--set data.packed_draws=1 --set data.long_draws=1")
    assert estimate.estimate(large, cpu).is_too_large
