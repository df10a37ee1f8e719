"""The whole algorithm with random weights: what it equals, what it does not depend on, what it costs."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from tiny import embeds, video_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from packforcing_cli import past, prompts, resolve, rollout, sameness
from packforcing_cli.config import GenerateRequest, MemoryOptions
from packforcing_cli.errors import GenerationError, UsageError
from packforcing_cli.prompts import Prompt, Story
from packforcing_cli.reader import VideoReader
from packforcing_cli.registry import VideoModel
from packforcing_cli.resolve import schedule_for
from packforcing_cli.rollout import Block, stream_generate
from packforcing_cli.text import TextEncoder
from packforcing_cli.timeline import Script

torch.set_num_threads(1)

RENOISE = {"kind": "renoise", "steps": 4, "timesteps": (1000, 750, 500, 250), "shift": 5.0}
WIDE = MemoryOptions(mid_span="block", top_k=16)


@pytest.fixture(scope="module")
def model() -> VideoModel:
    return video_model()


def prompt(model: VideoModel, seed: int = 0) -> Prompt:
    return Prompt("made up", embeds(seed, model.dtype))


def stream(
    model: VideoModel, memory: MemoryOptions = WIDE, *, num_blocks: int, seed: int = 0, **options: Any
) -> Iterator[Block]:
    return stream_generate(model, prompt(model), num_blocks=num_blocks, seed=seed, memory=memory, **options)


def latents(*args: Any, **options: Any) -> Tensor:
    """Of all blocks, [T,C,F,h,w]."""
    return torch.cat([block.latents for block in stream(*args, **options)])


# -- what it equals -------------------------------------------------------------------------------------------


def test_identity_compressor_and_full_budget_equal_dense_attention(model: VideoModel) -> None:
    everything = MemoryOptions(
        compressor="identity",
        compressed_context="history",
        top_k=50,
        bank=None,
        mid_span="block",
    )
    dense = latents(model, MemoryOptions(policy="full"), num_blocks=6)
    torch.testing.assert_close(latents(model, everything, num_blocks=6), dense, rtol=1e-9, atol=1e-9)
    fewer = everything.model_copy(update={"top_k": 1})
    assert (latents(model, fewer, num_blocks=6)[-1] - dense[-1]).norm() > 1e-4 * dense[-1].norm()


def test_while_nothing_is_dropped_rope_adjustment_changes_nothing(model: VideoModel) -> None:
    everything = {"compressor": "identity", "mid_span": "block", "top_k": 3}
    adjusted = latents(model, MemoryOptions(**everything), num_blocks=8)
    plain = latents(model, MemoryOptions(**everything, rope_adjustment=False), num_blocks=8)
    assert torch.equal(plain[:7], adjusted[:7])  # sinks 0 1, mids 2 3 4, recent 5: block 6 sees all
    assert not torch.equal(plain[7], adjusted[7])


def test_a_run_names_rope_adjustment_only_when_it_is_off(model: VideoModel) -> None:
    """Runs of before the option existed had it, and are not another memory."""
    request = GenerateRequest(prompt="made up", model="tiny", seconds=5)
    usual = sameness.must_be_same(model, request)
    off = sameness.must_be_same(model, request.changed(rope_adjustment=False))
    assert "layout rope_adjustment" not in usual
    assert off["layout rope_adjustment"] is False
    assert sameness.is_other_memory(usual, off)


def test_an_untrained_compressor_equals_the_low_resolution_branch_alone_bit_for_bit() -> None:
    untrained = video_model(trained_compressor=False)
    lr = latents(untrained, WIDE.model_copy(update={"compressor": "lr"}), num_blocks=6)
    assert torch.equal(latents(untrained, WIDE, num_blocks=6), lr)
    without_any = replace(untrained, compressor=None)
    assert torch.equal(latents(without_any, WIDE.model_copy(update={"compressor": "lr"}), num_blocks=6), lr)
    trained = latents(video_model(), WIDE, num_blocks=6)
    assert torch.equal(trained[:4], lr[:4])  # nothing compressed is read before block 4
    assert not torch.equal(trained[4:], lr[4:])


def test_the_compressor_reads_the_clean_block_and_its_streamed_pixels_after_the_frame_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """docs/method.md 10.9: the last pooled frame of the block before and 8 pooled ones; the last two latents."""
    model, seen = video_model(torch.float32), []
    commit_tokens = model.transformer.commit_tokens

    def spy(tokens: Tensor, *rest: Any) -> Any:
        if tokens.shape[1] == 2:  # the compressed ones
            seen.append(tokens)
        return commit_tokens(tokens, *rest)

    monkeypatch.setattr(model.transformer, "commit_tokens", spy)
    made = [block.latents for block in stream(model, num_blocks=5)]
    assert model.compressor is not None and model.compressor.hr is not None
    pixels = model.codec.decoder().decode(torch.cat(made, dim=2))
    small = pixels.reshape(1, 3, -1, 16, 4, 16, 4).mean((4, 6))
    assert len(seen) == 3  # blocks 0 and 1 are sinks
    for block, tokens in zip((2, 3, 4), seen, strict=True):
        start = 13 + 16 * (block - 1)
        nine = [small[:, :, n : n + 2].mean(2) for n in range(start - 2, start + 16, 2)]
        lr = model.codec.encoder().encode(torch.stack(nine, 2))[:, :, 1:]
        expected = model.transformer.patch_embedding(lr) + model.compressor.hr(made[block])
        expected = expected.flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)


def test_every_compressor_makes_another_video(model: VideoModel) -> None:
    last = {
        kind: latents(model, WIDE.model_copy(update={"compressor": kind}), num_blocks=5)[-1]
        for kind in ("hr+lr", "hr", "lr", "pool", "identity")
    }
    for a, b in ((a, b) for a in last for b in last if a < b):
        assert not torch.equal(last[a], last[b])


def test_a_branch_the_package_does_not_have_is_refused(model: VideoModel) -> None:
    with pytest.raises(UsageError, match="HR"):
        next(stream(replace(model, compressor=None), WIDE, num_blocks=2))


def test_guidance_reads_the_same_context_and_swaps_only_the_text(model: VideoModel) -> None:
    schedule = schedule_for(model, guidance=3.0)
    same = Prompt("made up", embeds(0), unconditional=embeds(0))
    guided = stream_generate(model, same, num_blocks=5, seed=0, memory=WIDE, schedule=schedule)
    plain = latents(model, num_blocks=5)  # v + 3 (v - v) = v
    torch.testing.assert_close(torch.cat([b.latents for b in guided]), plain, rtol=1e-9, atol=1e-9)
    other = replace(same, unconditional=embeds(1))
    guided = stream_generate(model, other, num_blocks=1, seed=0, memory=WIDE, schedule=schedule)
    assert not torch.allclose(next(guided).latents, plain[:1])


# -- what it does not depend on -------------------------------------------------------------------------------


def test_a_seed_gives_the_same_video_whatever_was_generated_before_and_beside(model: VideoModel) -> None:
    alone = latents(model, num_blocks=5, seed=7)
    torch.manual_seed(123)
    torch.rand(10)
    other = latents(model, num_blocks=5, seed=8)
    mixed = zip(stream(model, num_blocks=5, seed=8), stream(model, num_blocks=5, seed=7), strict=True)
    pairs = [(a.latents, b.latents) for a, b in mixed]
    assert torch.equal(torch.cat([b for _, b in pairs]), alone)
    assert torch.equal(torch.cat([a for a, _ in pairs]), other)
    assert not torch.equal(alone, other)


def test_a_longer_video_starts_like_a_shorter_one(model: VideoModel) -> None:
    memory = MemoryOptions(top_k=2, bank=3, mid_span="fit")
    assert torch.equal(latents(model, memory, num_blocks=9)[:6], latents(model, memory, num_blocks=6))


def test_generation_changes_no_weight(model: VideoModel) -> None:
    before = {name: value.clone() for name, value in model.transformer.state_dict().items()}
    latents(model, num_blocks=4)
    assert all(torch.equal(before[name], value) for name, value in model.transformer.state_dict().items())


# -- what comes out -------------------------------------------------------------------------------------------


def test_blocks_have_13_frames_then_16(model: VideoModel) -> None:
    blocks = list(stream(model, num_blocks=3))
    assert [tuple(b.frames.shape) for b in blocks] == [(n, 64, 64, 3) for n in (13, 16, 16)]
    assert all(b.frames.dtype == torch.uint8 for b in blocks)
    assert [tuple(b.latents.shape) for b in blocks] == [(1, 4, 4, 8, 8)] * 3
    assert [b.index for b in blocks] == [0, 1, 2]
    assert set(blocks[-1].seconds) == {"denoise", "clean", "decode", "trace", "compress", "commit"}


def test_streamed_frames_equal_the_whole_decoded_at_once(model: VideoModel) -> None:
    blocks = list(stream(model, num_blocks=3))
    whole = model.codec.decoder().decode(torch.cat([b.latents for b in blocks], dim=2))
    expected = (whole[0].permute(1, 2, 3, 0) * 255).round().to(torch.uint8)
    assert torch.equal(torch.cat([b.frames for b in blocks]), expected)


def test_blocks_of_three_frames_and_few_step_students_run() -> None:
    student = video_model(schedule=RENOISE, cache={"frames_per_block": 3})
    assert schedule_for(student).sigmas == pytest.approx((1, 0.9375, 5 / 6, 0.625))
    blocks = list(stream(student, MemoryOptions(top_k=2), num_blocks=6))
    assert [len(b.frames) for b in blocks] == [9, 12, 12, 12, 12, 12]


def test_what_was_recalled_is_in_the_bank_and_ascending(model: VideoModel) -> None:
    for block in stream(model, MemoryOptions(top_k=2, bank=4, mid_span="1"), num_blocks=10):
        mids = range(2, block.index - 1)  # two sinks, one recent
        assert block.selected.shape == (2, min(2, len(mids)))
        assert block.cache.active == tuple(tuple(ids) for ids in block.selected.tolist())
        assert set(block.recalled) == set(block.selected.flatten().tolist()) <= set(mids[-4:])
        assert all(a < b for layer in block.selected.tolist() for a, b in pairwise(layer))


# -- mistakes -------------------------------------------------------------------------------------------------


def test_guidance_and_other_steps_are_refused_for_a_few_step_student() -> None:
    student = video_model(schedule=RENOISE)
    for wrong in ({"guidance": 3.0}, {"steps": 8}):
        with pytest.raises(UsageError, match="few-step student"):
            schedule_for(student, **cast(Any, wrong))
    assert schedule_for(student, steps=4) == schedule_for(student)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_end_in_one_message(value: float) -> None:
    broken = video_model()
    broken.transformer.proj_out.bias.fill_(value)
    with pytest.raises(GenerationError, match="block 0") as caught:
        next(stream(broken, num_blocks=2))
    assert caught.value.exit_code == 1
    assert caught.value.hint


def test_a_size_off_the_patch_grid_is_refused_before_the_first_block(model: VideoModel) -> None:
    with pytest.raises(UsageError):
        next(stream(model, num_blocks=2, size=(72, 64)))


# -- prompts --------------------------------------------------------------------------------------------------


class Words:
    """Stands in for a text encoder; every prompt has its own embedding."""

    def encode(self, text: str) -> Tensor:
        return embeds(len(text))

    def unknown_words(self, text: str, vocabulary: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(text.split()[:1])

    def num_dropped(self, text: str) -> int:
        return 3


def test_a_prompt_is_encoded_with_the_empty_one_beside_it_only_for_guidance() -> None:
    model = video_model(load_text_encoder=lambda: cast(TextEncoder, Words()))
    guided = prompts.encode_prompt(model, "a red circle", guided=True)
    assert torch.equal(guided.conditional, embeds(12))
    assert guided.unconditional is not None
    assert torch.equal(guided.unconditional, embeds(0))
    assert (guided.unknown, guided.dropped) == (("a",), 3)
    assert prompts.encode_prompt(model, "a red circle", guided=False).unconditional is None
    by_text = next(stream_generate(model, "a red circle", num_blocks=1, seed=0))
    by_embeds = next(stream_generate(model, Prompt("", embeds(12)), num_blocks=1, seed=0))
    assert torch.equal(by_text.latents, by_embeds.latents)


# -- what it costs --------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts what torch runs, by operation and shapes of what comes out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.counts: Counter[tuple[str, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outputs = out if isinstance(out, (tuple, list)) else [out]
        shapes = [str(tuple(x.shape)) for x in outputs if isinstance(x, Tensor)]
        self.counts[(str(func), *shapes)] += 1
        return out


ONE_STEP = {"kind": "euler", "steps": 1, "shift": 5.0}


def counted(blocks: Iterator[Block]) -> tuple[Block, Counter[tuple[str, ...]]]:
    """The next block and the operations it took."""
    with Operations() as operations:
        block = next(blocks)
    return block, operations.counts


def test_300_blocks_run_in_flat_memory_with_the_same_operations_for_each() -> None:
    model = video_model(torch.float32, schedule=ONE_STEP, num_layers=1)
    blocks = stream(model, MemoryOptions(bank=32, mid_span="1"), num_blocks=300)
    live, work = [], {}
    for i in range(300):
        if i in (40, 41, 150, 299):  # the bank is full at block 35
            block, work[i] = counted(blocks)
        else:
            block = next(blocks)
        live.append(block.cache.bytes.live)
    assert len(block.cache.bank) == 32 and block.cache.bank[-1] == 298
    assert set(live) == {live[0]}  # allocated once
    assert work[40] == work[41] == work[150] == work[299]
    assert sum(work[299].values()) > 100


def test_an_unlimited_bank_grows_by_one_compressed_block_a_block_and_by_nothing_else() -> None:
    model = video_model(torch.float32, schedule=ONE_STEP, num_layers=1)
    blocks = stream(model, MemoryOptions(bank=None, mid_span="1"), num_blocks=40)
    memory = [block.cache.bytes for block in blocks]
    one_block = 2 * (2 * 24 * 4)  # keys and values of 2 tokens of 24 float32; sums are there from the start
    growth = [after.bank - before.bank for before, after in pairwise(memory)]
    assert growth == [
        0,
        0,
        *[one_block] * 37,
    ]  # blocks 0 and 1 are sinks, 2 is the first to leave recent, at 3
    assert {m.live - m.bank for m in memory} == {memory[0].live - memory[0].bank}


def test_stream_generate_stays_short_enough_to_read() -> None:
    assert len(inspect.getsource(stream_generate).splitlines()) <= 95


# -- into a file ----------------------------------------------------------------------------------------------


def test_generate_writes_whole_blocks_and_stops_when_asked(model: VideoModel, tmp_path: Path) -> None:
    seen: list[int] = []
    result = rollout.generate(
        model,
        prompt(model),
        tmp_path / "a.mp4",
        seconds=2.5,
        seed=3,
        memory=WIDE,
        on_block=lambda block, _: seen.append(block.index),
        should_stop=lambda: len(seen) == 2,
    )
    assert (result.blocks, result.frames, result.stopped, result.seed) == (2, 29, True, 3)
    assert 0 < result.first_frame_seconds < result.total_seconds
    assert len(result.block_seconds) == 2
    assert result.block_percentile(50) == min(result.block_seconds)
    assert result.block_percentile(95) == max(result.block_seconds)
    process = result.process_first_frame_seconds
    assert process is None or process > result.first_frame_seconds
    assert seen == [0, 1]
    reader = VideoReader(result.path)
    assert (reader.num_frames, reader.width, reader.height) == (29, 64, 64)
    assert reader.metadata["prompt"] == "made up"


def test_ten_seconds_are_157_frames(model: VideoModel) -> None:
    grid = resolve.grid_for(model, (64, 64))
    assert (grid.blocks_for(10, 16), grid.frames_for(10)) == (10, 157)


# -- timelines and pins -----------------------------------------------------------------------------------------


def story(model: VideoModel, script: Script) -> Story:
    return Story(script, tuple(Prompt(text, embeds(len(text), model.dtype)) for text in script.prompts))


SCENES = Script(("a", "bb", "a"), starts=(0, 3, 7), blends=(0, 2, 0))


def test_each_block_reads_its_own_prompt_and_blends_are_linear(
    model: VideoModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings go in once for every prompt and blend; denoising, clean and compressed pass read the same."""
    made: list[tuple[Tensor, object]] = []
    read: list[object] = []
    embed, run = model.transformer.embed_text, model.transformer._run

    def spy_embed(given: Tensor) -> Any:
        made.append((given, embed(given)))
        return made[-1][1]

    def spy_run(name: str, function: Any, inputs: Any, text: Any, context: Any) -> Any:
        read.append(text)
        return run(name, function, inputs, text, context)

    monkeypatch.setattr(model.transformer, "embed_text", spy_embed)
    monkeypatch.setattr(model.transformer, "_run", spy_run)
    a, b = embeds(1), embeds(2)
    expected = [a, a, a, (2 * a + b) / 3, (a + 2 * b) / 3, b, b, a, a]
    blocks = stream_generate(model, story(model, SCENES), num_blocks=9, seed=0, memory=WIDE)
    for block, embedding in zip(blocks, expected, strict=True):
        (used,) = {id(text) for text in read}
        given = next(given for given, kv in made if id(kv) == used)
        torch.testing.assert_close(given, embedding, rtol=1e-12, atol=1e-12)
        assert len(read) == 3 + (block.index >= 2)  # two steps, clean, compressed (not of the sinks)
        read.clear()
    assert len(made) == 4  # a, two blends, b; the second a was kept


def test_a_prompt_that_changes_changes_the_blocks_after_it_only(model: VideoModel) -> None:
    one = latents_of(stream_generate(model, story(model, Script(("a",))), num_blocks=6, seed=0, memory=WIDE))
    switched = Script(("a", "bb"), starts=(0, 4), blends=(0, 0))
    two = latents_of(stream_generate(model, story(model, switched), num_blocks=6, seed=0, memory=WIDE))
    assert torch.equal(one[:4], two[:4])
    assert not torch.allclose(one[4], two[4])


def test_a_cut_leaves_recent_blocks_unseen_and_sinks_seen(model: VideoModel) -> None:
    """Block 4 of another video, with another block 3, is the same when both cut there and recall nothing of it."""
    cut = Script(("a", "a"), starts=(0, 4), blends=(0, 0), cuts=(4,))
    options: dict[str, Any] = {"num_blocks": 6, "memory": MemoryOptions(select="none", sink_blocks=2)}
    blocks = list(stream_generate(model, story(model, cut), seed=0, **options))
    plain = list(stream_generate(model, story(model, Script(("a",))), seed=0, **options))
    assert torch.equal(blocks[3].latents, plain[3].latents)
    assert not torch.allclose(blocks[4].latents, plain[4].latents)
    assert [block.cache.recent for block in blocks[2:]] == [(2,), (), (4,), (5,)]
    assert blocks[4].cache.sink == (0, 1)


def latents_of(blocks: Iterator[Block]) -> Tensor:
    return torch.cat([block.latents for block in blocks])


@pytest.mark.parametrize("select", ["affinity-recent", "affinity", "fifo", "random"])
def test_a_pinned_block_is_recalled_by_every_later_block_and_never_dropped(
    model: VideoModel, select: str
) -> None:
    memory = MemoryOptions(top_k=2, bank=4, mid_span="1", select=select)
    made = {}
    for pins in (frozenset({3}), frozenset[int]()):
        script = Script(("a",), pins=pins)
        made[bool(pins)] = list(
            stream_generate(model, story(model, script), num_blocks=14, seed=0, memory=memory)
        )
    for block in made[True][5:]:
        assert (block.selected == 3).any(1).all()
        assert block.cache.pinned == (3,)
        assert len(block.recalled) >= 2 or block.index == 5
    unpinned = made[False]
    assert 3 not in unpinned[-1].cache.bank and 3 not in unpinned[-1].recalled
    assert not torch.equal(unpinned[-1].latents, made[True][-1].latents)
    assert torch.equal(unpinned[4].latents, made[True][4].latents)


@pytest.mark.parametrize("select", ["affinity-recent", "affinity"])
def test_a_bank_in_host_memory_gives_the_same_video(model: VideoModel, select: str) -> None:
    memory = MemoryOptions(top_k=2, bank=3, mid_span="1", select=select)
    for options in ({}, {"kv_dtype": "int8"}):
        near, far = (
            latents(model, memory.model_copy(update={**options, "bank_device": place}), num_blocks=8)
            for place in ("device", "host")
        )
        assert torch.equal(near, far)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_a_video_with_a_quantized_bank_continues_identically(model: VideoModel, kv_dtype: str) -> None:
    memory = MemoryOptions(top_k=2, bank=3, mid_span="1", kv_dtype=kv_dtype)
    whole, state = [], {}
    for block in stream(model, memory, num_blocks=8):
        whole.append(block.latents)
        if block.index == 5:
            state = block.state()
    rest = [block.latents for block in stream(model, memory, num_blocks=8, state=state)]
    assert all(torch.equal(a, b) for a, b in zip(whole[6:], rest, strict=True))
    plain = latents(model, memory.model_copy(update={"kv_dtype": "auto"}), num_blocks=8)
    assert not torch.equal(torch.cat(whole), plain)
    request = GenerateRequest(prompt="made up", model="tiny", seconds=5)
    usual = sameness.must_be_same(model, request)
    other = sameness.must_be_same(model, request.changed(kv_dtype=kv_dtype))
    assert "layout kv_dtype" not in usual and other["layout kv_dtype"] == kv_dtype
    assert sameness.is_other_memory(usual, other)
    assert sameness.must_be_same(model, request.changed(bank_device="host")) == usual


def test_chapters_are_where_the_prompts_change(model: VideoModel, tmp_path: Path) -> None:
    result = rollout.generate(model, story(model, SCENES), tmp_path / "a.mp4", seconds=9, memory=WIDE)
    chapters = VideoReader(result.path).chapters
    assert [title for _, title in chapters] == ["a", "bb", "a"]
    # an MP4 says where chapters begin in milliseconds
    assert [start for start, _ in chapters] == pytest.approx([0, 45 / 16, 109 / 16], abs=1e-3)
    seen: list[int] = []
    result = rollout.generate(
        model,
        story(model, SCENES),
        tmp_path / "b.mp4",
        seconds=9,
        memory=WIDE,
        on_block=lambda block, _: seen.append(block.index),
        should_stop=lambda: len(seen) == 5,
    )
    assert [title for _, title in VideoReader(result.path).chapters] == ["a", "bb"]


# -- a picture to begin with ------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_first_latent_of_a_video_can_be_given(guidance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes out as it went in, at timestep 0 in every pass of block 0; the layout is the same."""
    model = video_model()
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    first = past.encode_image(model, picture)
    expected = model.codec.encoder().encode(torch.tensor(picture).permute(2, 0, 1)[None, :, None] / 255)
    torch.testing.assert_close(first, expected.double(), rtol=1e-6, atol=1e-6)
    said = Prompt("made up", embeds(0), unconditional=embeds(1) if guidance != 1 else None)
    seen: list[list[float]] = []
    forward = model.transformer.forward

    def spy(x: Tensor, timesteps: Tensor, *rest: Any) -> Tensor:
        seen.append(timesteps[0].tolist())
        return forward(x, timesteps, *rest)

    monkeypatch.setattr(model.transformer, "forward", spy)
    options: dict[str, Any] = {"num_blocks": 3, "seed": 0, "schedule": schedule_for(model, guidance=guidance)}
    blocks = list(stream_generate(model, said, first_latent=first, **options))
    assert torch.equal(blocks[0].latents[:, :, :1], first)
    assert seen[:2] == [[0, *[1000.0] * 3], [0, *[seen[1][1]] * 3]]
    assert all(len({*times}) == 1 for times in seen[2:])
    free = list(stream_generate(model, said, **options))
    assert not torch.allclose(blocks[0].latents[:, :, 1:], free[0].latents[:, :, 1:])
    assert [b.cache.bytes for b in blocks] == [b.cache.bytes for b in free]


def test_pinned_pictures_are_the_first_blocks_and_always_recalled(model: VideoModel, tmp_path: Path) -> None:
    """Each is the block that the picture, held, encodes to in one stream; without sinks it is among the recalled."""
    pictures = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    grid = resolve.grid_for(model, (64, 64))
    held = np.concatenate([np.repeat(pictures[:1], 13, 0), np.repeat(pictures[1:], 16, 0)])
    encoder = model.codec.encoder()
    parts = [encoder.encode(past.to_pixels(held, model.device)), encoder.flush()]
    expected = torch.cat([part for part in parts if part is not None], dim=2).to(model.dtype)
    stills = list(past.still_blocks(model, pictures, grid))
    torch.testing.assert_close(torch.cat([still.latents for still in stills], dim=2), expected)
    seen: list[Block] = []
    rollout.generate(
        model,
        story(model, Script(("a",), pins=frozenset({0, 1}))),
        tmp_path / "a.mp4",
        seconds=8,
        seed=0,
        memory=MemoryOptions(sink_blocks=0, top_k=3, bank=4, mid_span="1"),
        stills=pictures,
        on_block=lambda block, _: seen.append(block),
    )
    assert [block.replayed for block in seen] == [True] * 2 + [False] * 6
    assert torch.equal(torch.cat([block.latents for block in seen[:2]], dim=2), expected)
    assert all({0, 1} <= set(block.recalled) and block.cache.pinned == (0, 1) for block in seen[3:])
