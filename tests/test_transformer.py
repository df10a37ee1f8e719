"""The transformer against diffusers' with the same weights, and block by block against one masked pass."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import randomise, transformer
from torch import Tensor, nn

from packforcing_cli import catalog
from packforcing_cli.cache import KVCache
from packforcing_cli.errors import WeightsError
from packforcing_cli.layout import Grid, Layout
from packforcing_cli.quiet import known_import_noise_dropped
from packforcing_cli.rope import grid_positions
from packforcing_cli.transformer import AloneContext, TransformerConfig, WanTransformer

torch.set_num_threads(1)

TINY = TransformerConfig(
    num_layers=3, num_attention_heads=2, attention_head_dim=20, ffn_dim=48, in_channels=5, out_channels=5,
    text_dim=24, freq_dim=32,
)  # fmt: skip
FULL_WIDTH = TransformerConfig(num_layers=2)


def theirs(config: TransformerConfig, **changes: Any) -> Any:
    """diffusers' model without weights."""
    with known_import_noise_dropped():
        from diffusers import WanTransformer3DModel
    values = {key: value for key, value in config.to_dict().items() if key != "_class_name"}
    with torch.device("meta"):
        return WanTransformer3DModel(**(values | changes))


def both(config: TransformerConfig, seed: int) -> tuple[WanTransformer, Any]:
    """Ours and diffusers' model with the same random weights; they share their tensors."""
    with torch.device("meta"):
        ours = WanTransformer(config)
    ours.to_empty(device="cpu")
    randomise(ours, seed)
    other = theirs(config)
    other.load_state_dict(ours.state_dict(), assign=True)
    other.rope = type(other.rope)(
        config.attention_head_dim, config.patch_size, 1024
    )  # its tables are no weights
    return ours.eval().requires_grad_(False), other.eval().requires_grad_(False)


def names_and_shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}


def alone(frames: int, rows: int, cols: int) -> AloneContext:
    return AloneContext(grid_positions(0.0, frames, rows, cols))


@pytest.mark.parametrize(
    ("config", "batch", "size"),
    [(TINY, 2, (3, 6, 10)), (FULL_WIDTH, 1, (2, 4, 6))],
    ids=["tiny", "full width, two layers"],
)
def test_bidirectional_output_equals_diffusers(
    config: TransformerConfig, batch: int, size: tuple[int, int, int]
) -> None:
    ours, other = both(config, seed=3)
    frames, rows, cols = size[0], size[1] // 2, size[2] // 2
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(batch, config.in_channels, *size, generator=generator)
    embeds = torch.randn(batch, 9, config.text_dim, generator=generator)
    embeds[:, 6:] = 0  # padding is attended like any other token
    one_each = torch.tensor([937.5, 41.25])[:batch]
    per_frame = torch.tensor([[0.0, 833.3333, 625.0], [1000.0, 0.0, 12.5]])[:batch, :frames]
    text = ours.embed_text(embeds)
    for mine, per_token in (
        (one_each[:, None].expand(-1, frames), one_each),
        (per_frame, per_frame.repeat_interleave(rows * cols, dim=1)),
    ):
        expected = other(latents, per_token, embeds, return_dict=False)[0]
        found = ours(latents, mine, text, alone(frames, rows, cols))
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert expected.std() > 0.1
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("name", ["wan2.1-1.3b", "wan2.1-14b"])
def test_names_and_shapes_of_the_real_sizes_equal_diffusers(name: str) -> None:
    facts = catalog.get(name)
    config = TransformerConfig(
        num_layers=facts.layers,
        num_attention_heads=facts.heads,
        attention_head_dim=facts.head_dim,
        ffn_dim=facts.ffn_dim,
    )
    with torch.device("meta"):
        ours = WanTransformer(config)
    assert names_and_shapes(ours) == names_and_shapes(theirs(config))


def test_the_default_sizes_are_those_of_the_1_3b_model() -> None:
    with torch.device("meta"):
        model = WanTransformer(TransformerConfig())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(
        1.419e9, rel=1e-3
    )  # docs/method.md 1.1


# -- block by block -------------------------------------------------------------------------------------------


def masked_forward(
    model: WanTransformer, latents: Tensor, timesteps: Tensor, embeds: Tensor, frames_per_block: int
) -> Tensor:
    """One pass over all frames [B,C,F,h,w] in which a token attends its own block and earlier ones."""
    frames, rows, cols = latents.shape[2], latents.shape[3] // 2, latents.shape[4] // 2
    places = [(float(f), r, c) for f in range(frames) for r in range(rows) for c in range(cols)]
    frequencies = torch.tensor([10_000.0 ** (-2 * i / 4) for i in range(2)], dtype=torch.float64)
    angle = (torch.tensor(places, dtype=torch.float64)[:, :, None] * frequencies).flatten(1)
    turned = torch.polar(torch.ones_like(angle), angle)[:, None]
    block = torch.tensor([int(place[0]) // frames_per_block for place in places])
    hidden = block[:, None] < block[None, :]  # [query, key]

    def turn(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turned).flatten(-2)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bsnd,btnd->bnst", turn(q), turn(k)) / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("bnst,btnd->bsnd", weights, v)

    modulation = model.modulation(timesteps)
    x = model.run_layers(model.patch(latents), modulation, model.embed_text(embeds), attend)
    return model.unpatch(model.head(x, modulation), frames, rows, cols)


@pytest.mark.parametrize("frames_per_block", [3, 4])
def test_block_by_block_with_a_cache_equals_one_masked_pass(frames_per_block: int) -> None:
    model, blocks, batch = transformer(7), 4, 2
    rows, cols, frames = 4, 6, blocks * frames_per_block
    grid = Grid(frames_per_block, rows, cols, layers=2, kv_dim=24, heads=2, dtype_bytes=8)
    full = Layout.from_policy("full", grid=grid, num_blocks=blocks)
    cache = KVCache(full, num_blocks=blocks, dtype=torch.float64, batch=batch)
    generator = torch.Generator().manual_seed(8)
    clean, noisy = torch.randn(2, batch, 4, frames, 2 * rows, 2 * cols, generator=generator).double()
    embeds = torch.randn(batch, 5, 8, generator=generator).double()
    text = model.embed_text(embeds)
    for i in range(blocks):
        now = slice(i * frames_per_block, (i + 1) * frames_per_block)
        timesteps = 1000 * torch.rand(batch, frames_per_block, generator=generator).double()
        context = cache.context(i)
        found = model(noisy[:, :, now], timesteps, text, context)
        everything = torch.cat((clean[:, :, : now.start], noisy[:, :, now]), dim=2)
        times = torch.cat((torch.zeros(batch, now.start, dtype=torch.float64), timesteps), dim=1)
        expected = masked_forward(model, everything, times, embeds, frames_per_block)[:, :, now]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        cache.commit(i, model.commit(clean[:, :, now], text, context))


@pytest.mark.parametrize("select", ["affinity", "affinity-recent"])
def test_several_prompts_in_one_pass_equal_a_pass_for_each(select: Any) -> None:
    model, blocks = transformer(7), 5
    grid = Grid(4, 4, 4, layers=2, kv_dim=24, heads=2, dtype_bytes=8)
    layout = Layout(
        grid=grid, sink_blocks=1, recent_blocks=1, top_k=1, bank=None, mid_span=1, trained_frames=20
    )
    generator = torch.Generator().manual_seed(11)
    clean = torch.randn(blocks, 1, 4, 4, 8, 8, generator=generator).double()
    embeds = torch.randn(2, 5, 8, generator=generator).double()
    each, together = ([], [])
    for found, rows in ((each, (slice(0, 1), slice(1, 2))), (together, (slice(0, 2),))):
        cache = KVCache(layout, num_blocks=blocks, dtype=torch.float64, select=select)
        text = model.embed_text(embeds[:1])
        for i in range(blocks):
            context = cache.context(i)
            times = torch.full((1, 4), 900.0, dtype=torch.float64)
            found += [model(clean[i], times, model.embed_text(embeds[r]), context) for r in rows]
            cache.commit(i, kv := model.commit(clean[i], text, context))
            if cache.needs_backup(i):
                tokens = model.patch(clean[i])[:, : grid.compressed_tokens]
                cache.add_backup(i, model.commit_tokens(tokens, text, cache.compressed_context(i)))
            assert kv.k.shape[1] == 1
    torch.testing.assert_close(torch.cat(together), torch.cat(each), rtol=1e-10, atol=1e-10)


def test_a_commit_keeps_what_a_pass_at_timestep_0_computes() -> None:
    model, generator = transformer(9), torch.Generator().manual_seed(9)
    latents = torch.randn(1, 4, 3, 4, 8, generator=generator, dtype=torch.float64)
    text = model.embed_text(torch.randn(1, 5, 8, generator=generator, dtype=torch.float64))
    seen: list[tuple[Tensor, ...]] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((k, v, q.sum(1)))
        own = alone(3, 2, 4)
        return model._attend_in(own, model._angles(own, q.dtype), 1)(layer, q, k, v)

    model.run_layers(
        model.patch(latents), model.modulation(torch.zeros(1, 3, dtype=torch.float64)), text, attend
    )
    kv = model.commit(latents, text, alone(3, 2, 4))
    assert kv.k.shape == kv.v.shape == (2, 1, 24, 2, 12)
    for found, expected in zip((kv.k, kv.v, kv.q_sum), zip(*seen, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=1e-10)


def test_patching_equals_the_strided_convolution_also_where_a_row_is_left_over() -> None:
    model = transformer(2)
    latents = torch.randn(1, 4, 2, 15, 26, dtype=torch.float64)  # LR latents of 832x480
    expected = model.patch_embedding(latents).flatten(2).transpose(1, 2)
    assert expected.shape[1] == 2 * 7 * 13
    torch.testing.assert_close(model.patch(latents), expected)


def test_gradients_of_all_weights_are_there() -> None:
    model = transformer(6).requires_grad_(True)
    latents, embeds = torch.randn(1, 4, 2, 4, 4).double(), torch.randn(1, 3, 8).double()
    model(latents, torch.tensor([[500.0, 500.0]]), model.embed_text(embeds), alone(2, 2, 2)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_bfloat16_stays_close_to_float32() -> None:
    """Norms, modulation and residual gates are accumulated in float32, so only products are rounded."""
    sizes = {"num_layers": 3, "attention_head_dim": 24}
    exact = transformer(5, torch.float32, **sizes)
    rounded = transformer(5, torch.float32, **sizes).to(torch.bfloat16)
    latents, embeds = torch.randn(1, 4, 2, 6, 6), torch.randn(1, 5, 8)
    times = torch.tensor([[833.3333, 833.3333]])
    expected = exact(latents, times, exact.embed_text(embeds), alone(2, 3, 3))
    text = rounded.embed_text(embeds.bfloat16())
    found = rounded(latents.bfloat16(), times, text, alone(2, 3, 3))
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.05 * expected.norm()


# -- configurations -------------------------------------------------------------------------------------------


def test_a_config_written_by_diffusers_is_read(tmp_path: Path) -> None:
    theirs(TINY).save_config(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert TransformerConfig.from_dict(values) == TINY
    assert TransformerConfig.from_dict(json.loads(json.dumps(TINY.to_dict()))) == TINY


@pytest.mark.parametrize(
    "changes",
    [
        {"image_dim": 1280},
        {"added_kv_proj_dim": 1536},
        {"pos_embed_seq_len": 514},
        {"qk_norm": None},
        {"cross_attn_norm": False},
        {"patch_size": [2, 2, 2]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_kinds_of_wan_models_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match=next(iter(changes))):
        TransformerConfig.from_dict(TINY.to_dict() | changes)
