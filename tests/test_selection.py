"""Scores and choices of compressed blocks."""

from __future__ import annotations

import pytest
import torch

from packforcing_cli import selection
from packforcing_cli.errors import UsageError

LAYERS = 3


def ids(mode: str, candidates: list[int], active: int, **options: object) -> list[list[int]]:
    there = torch.tensor(candidates, dtype=torch.int64)
    choice = selection.choose(mode, there, active=active, layers=LAYERS, **options)  # type: ignore[arg-type]
    rows: list[list[int]] = choice.ids.tolist()
    assert rows == [[candidates[n] for n in row] for row in choice.among.tolist()]
    return rows


def test_score_equals_the_formula_over_all_queries_keys_heads_and_the_batch() -> None:
    layers, batch, heads, dim, blocks, queries, keys = 2, 2, 3, 6, 4, 5, 3
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(layers, batch, queries, heads, dim, generator=generator, dtype=torch.float64)
    k = torch.randn(layers, batch, blocks, keys, heads, dim, generator=generator, dtype=torch.float64)
    fast = selection.score(q.sum(2), k.sum(3))
    for layer in range(layers):
        for m in range(blocks):
            total = 0.0
            for j in range(keys):
                for i in range(queries):
                    for b in range(batch):
                        for h in range(heads):
                            products = q[layer, b, i, h] * k[layer, b, m, j, h]
                            total += float(products.sum()) / (batch * heads) / dim**0.5
            assert fast[layer, m].item() == pytest.approx(total, rel=1e-12, abs=1e-12)


def test_affinity_takes_the_best_in_chronological_order() -> None:
    scores = torch.tensor([[5.0, 1.0, 9.0, 3.0], [0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]])
    assert ids("affinity", [4, 6, 7, 9], 2, scores=scores) == [[4, 7], [7, 9], [4, 6]]
    assert ids("affinity-recent", [4, 6, 7, 9], 2, scores=scores) == [[4, 7], [7, 9], [4, 6]]


def test_of_equal_scores_the_newer_block_wins() -> None:
    scores = torch.tensor([[2.0, 1.0, 1.0, 1.0]]).expand(LAYERS, -1)
    assert ids("affinity", [0, 1, 2, 3], 2, scores=scores) == [[0, 3]] * LAYERS


@pytest.mark.parametrize("bad", [[1.0, float("nan"), 3.0], [2.0, 2.0, 2.0], [1.0, float("inf"), 0.0]])
def test_degenerate_scores_fall_back_to_the_newest_in_that_layer_alone(bad: list[float]) -> None:
    scores = torch.tensor([[9.0, 8.0, 7.0], bad, [9.0, 8.0, 7.0]])
    choice = selection.choose("affinity", torch.tensor([3, 4, 5]), active=2, layers=3, scores=scores)
    assert choice.ids.tolist() == [[3, 4], [4, 5], [3, 4]]
    assert choice.degenerate.tolist() == [False, True, False]


def test_a_single_candidate_is_not_degenerate() -> None:
    choice = selection.choose("affinity", torch.tensor([3]), active=1, layers=1, scores=torch.tensor([[0.5]]))
    assert not choice.degenerate.any()


def test_fifo_takes_the_newest_and_none_takes_nothing() -> None:
    assert ids("fifo", [2, 3, 5, 8], 3) == [[3, 5, 8]] * LAYERS
    assert ids("none", [2, 3, 5, 8], 3) == [[]] * LAYERS
    assert ids("fifo", [], 0) == [[]] * LAYERS


def test_random_is_a_function_of_seed_and_block() -> None:
    candidates = list(range(40))
    first = ids("random", candidates, 6, seed=1, block=50)
    torch.rand(100)
    assert ids("random", candidates, 6, seed=1, block=50) == first
    assert ids("random", candidates, 6, seed=2, block=50) != first
    assert ids("random", candidates, 6, seed=1, block=51) != first
    assert first[0] != first[1]
    assert all(row == sorted(set(row)) for row in first)


@pytest.mark.parametrize("mode", ["affinity", "fifo", "random"])
def test_pinned_blocks_come_first(mode: str) -> None:
    scores = torch.tensor([[0.0, 3.0, 9.0, 8.0]]).expand(LAYERS, -1)
    pinned = torch.tensor([True, True, False, False])
    assert ids(mode, [1, 2, 3, 4], 2, scores=scores, pinned=pinned) == [[1, 2]] * LAYERS
    chosen = ids(mode, [1, 2, 3, 4], 3, scores=scores, pinned=pinned)
    assert all({1, 2} < set(row) for row in chosen)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(UsageError, match="clever"):
        ids("clever", [1], 1)
    with pytest.raises(ValueError, match="2 active blocks wanted, 1 stored"):
        ids("fifo", [1], 2)
    with pytest.raises(ValueError, match="needs scores"):
        ids("affinity", [1, 2], 1)
    with pytest.raises(ValueError, match="needs scores"):
        ids("affinity", [1, 2], 1, scores=torch.zeros(LAYERS, 3))
