"""Shapes, where a compressed cell looks, what an untrained compressor is, and the pooling baseline."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import randomise
from torch import Tensor

from packforcing_cli.compressor import Compressor, CompressorConfig, pooled_kv
from packforcing_cli.errors import WeightsError
from packforcing_cli.layout import Grid

torch.set_num_threads(1)

SMALL = CompressorConfig(dim=12, in_channels=4, widths=(3, 4, 5, 6))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(config: CompressorConfig) -> Compressor:
    compressor = Compressor(config).double()
    randomise(compressor, 1)
    return compressor.eval().requires_grad_(False)


@pytest.mark.parametrize("frames", [3, 4])
@pytest.mark.parametrize(("height", "width"), [(60, 104), (104, 60), (8, 16), (8, 8), (15, 23)])
def test_a_block_becomes_two_rows_in_time_of_exact_floors_in_space(
    frames: int, height: int, width: int
) -> None:
    with torch.device("meta"):
        compressor = Compressor(CompressorConfig(dim=1536, branches="hr"))
        tokens = compressor(torch.zeros(1, 16, frames, height, width), None)
    assert tokens.shape == (1, 2 * (height // 8) * (width // 8), 1536)


def test_832x480_makes_182_tokens_of_the_papers_widths() -> None:
    with torch.device("meta"):
        compressor = Compressor(CompressorConfig(dim=1536, branches="hr"))
        assert compressor.hr is not None
        x, shapes = torch.zeros(1, 16, 4, 60, 104), []
        for conv in (compressor.hr.time, *compressor.hr.space, compressor.hr.project):
            x = conv(x)
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [
        (32, 2, 60, 104),
        (128, 2, 30, 52),
        (512, 2, 15, 26),
        (2048, 2, 7, 13),
        (1536, 2, 7, 13),
    ]  # docs/method.md 3.1
    assert sum(p.numel() for p in compressor.parameters()) == pytest.approx(21.0e6, rel=0.01)


def test_token_count_is_the_layouts() -> None:
    for rows, cols in ((30, 52), (4, 8), (7, 9)):
        grid = Grid(frames_per_block=4, rows=rows, cols=cols, layers=1, kv_dim=12, heads=1)
        with torch.device("meta"):
            tokens = Compressor(CompressorConfig(dim=12, branches="hr"))(
                torch.zeros(1, 16, 4, 2 * rows, 2 * cols), None
            )
        assert tokens.shape[1] == grid.compressed_tokens


def test_a_cell_looks_evenly_around_its_centre() -> None:
    """Row r stands for latent rows 8r .. 8r+7; what it sees must reach as far above their middle as below."""
    compressor = Compressor(
        CompressorConfig(dim=1, in_channels=1, widths=(1, 1, 1, 1), branches="hr")
    ).double()
    with torch.no_grad():
        for parameter in compressor.parameters():
            parameter.fill_(0.1)
    latents = torch.zeros(1, 1, 4, 40, 40, dtype=torch.float64, requires_grad=True)
    tokens = compressor(latents, None).reshape(2, 5, 5)
    for row, col in ((1, 1), (2, 3)):
        (seen,) = torch.autograd.grad(tokens[0, row, col], latents, retain_graph=True)
        for axis, cell in ((3, row), (4, col)):
            others = tuple(n for n in range(5) if n != axis)
            reach = (seen.sum(others) != 0).nonzero().flatten()
            assert (reach[0] + reach[-1]) / 2 == 8 * cell + 3.5


def test_tokens_run_time_row_column() -> None:
    """A change of one corner of the last frame moves the last time row's token of that corner, no other."""
    compressor = trained(CompressorConfig(dim=12, in_channels=4, widths=(3, 4, 5, 6), branches="hr"))
    latents = random(1, 4, 4, 24, 40)
    changed = latents.clone()
    changed[:, :, 3, -1, 0] += 1  # last row of cells, first column
    moved = (compressor(changed, None) - compressor(latents, None)).abs().sum(-1)[0].nonzero().flatten()
    assert moved.tolist() == [1 * 15 + 2 * 5 + 0]


def test_an_untrained_compressor_is_the_low_resolution_branch_bit_for_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        compressor = Compressor(SMALL).to(dtype)
        latents, lr = random(2, 4, 4, 16, 16).to(dtype), random(2, 8, 12, seed=1).to(dtype)
        assert torch.equal(compressor(latents, lr), lr)


def test_both_branches_are_summed() -> None:
    both, latents, lr = trained(SMALL), random(2, 4, 4, 16, 16), random(2, 8, 12, seed=1)
    assert both.hr is not None
    high = both.hr(latents)
    found = both(latents, lr)
    for token, (time, row, col) in enumerate((t, r, c) for t in range(2) for r in range(2) for c in range(2)):
        torch.testing.assert_close(found[:, token], high[:, :, time, row, col] + lr[:, token])


def test_the_projection_learns_from_the_first_step_on() -> None:
    """It starts at zero; were anything before it zero too, it would stay there."""
    compressor = Compressor(SMALL)
    assert compressor.hr is not None
    latents, lr = random(1, 4, 4, 8, 8).float(), random(1, 2, 12).float()
    compressor(latents, lr).square().sum().backward()
    assert compressor.hr.project.weight.grad is not None
    assert bool((compressor.hr.project.weight.grad != 0).any())


def test_branches_are_as_configured() -> None:
    lr = Compressor(CompressorConfig(dim=12, branches="lr"))
    assert lr.needs_pixels and not list(lr.parameters())
    assert not Compressor(CompressorConfig(dim=12, widths=(2, 2, 2, 2), branches="hr")).needs_pixels
    with pytest.raises(WeightsError, match="hr\\+lr"):
        CompressorConfig(dim=12, branches="both")


def test_a_config_survives_json() -> None:
    assert CompressorConfig.from_dict(json.loads(json.dumps(SMALL.to_dict()))) == SMALL


@pytest.mark.parametrize(("frames", "rows", "cols"), [(4, 4, 8), (3, 4, 8), (4, 15, 6)])
def test_pooled_keys_equal_slow_loops(frames: int, rows: int, cols: int) -> None:
    kv = random(2, 1, frames * rows * cols, 2, 6)
    halves = {3: ((0, 1), (2,)), 4: ((0, 1), (2, 3))}[frames]
    expected = []
    for half in halves:
        for row in range(rows // 4):
            for col in range(cols // 4):
                cell = [
                    kv[:, :, (f * rows + r) * cols + c]
                    for f in half
                    for r in range(4 * row, 4 * row + 4)
                    for c in range(4 * col, 4 * col + 4)
                ]
                expected.append(sum(cell[1:], cell[0]) / len(cell))
    torch.testing.assert_close(pooled_kv(kv, frames, rows, cols), torch.stack(expected, dim=2))
