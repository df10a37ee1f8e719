"""Which compressed blocks attend: scores and choices, pure functions.

    affinity         score with the queries of the last committed and of the current block (the paper)
    affinity-recent  score with those of the last committed block alone: known before the first pass
    fifo             the newest
    random           drawn from (seed, block), for each layer
    none             nothing: sink and recent only

Pinned blocks come first in every mode. Knows neither the cache nor positions: it gets sums and block numbers.

The score of the paper is a sum of dot products over all pairs of query and key tokens. It is bilinear, so one
vector per block, layer and head says as much as all its tokens: sum_ij <q_i, k_j> = <sum_i q_i, sum_j k_j>.
Queries and keys are un-rotated, so the score compares content, not place.

Source: PackForcing (arXiv 2603.25730) 3.5; docs/method.md 4.1-4.3.
Letters: L layers, B batch, M candidate blocks, K active blocks, N heads, D head dim.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from packforcing_cli import staging
from packforcing_cli.errors import UsageError

MODES = ("affinity-recent", "affinity", "fifo", "random", "none")


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    among:      [L, K] int64, which of the candidates, ascending in every layer.
    ids:        [L, K] int64, their block numbers.
    degenerate: [L] bool, True where the scores said nothing and the newest blocks were taken instead.
    """

    among: Tensor
    ids: Tensor
    degenerate: Tensor


def check_mode(mode: str) -> None:
    """Raises: UsageError if `mode` is not one of MODES."""
    if mode not in MODES:
        raise UsageError(f"unknown selection {mode!r}", hint=f"Choose one of {', '.join(MODES)}.")


def score(q_sums: Tensor, key_sums: Tensor) -> Tensor:
    """Affinity of every candidate block to the queries.

    s_m = 1/(B*N) * sum_b sum_n <q_sum[b,n], key_sum[b,m,n]> / sqrt(D), with all queries and all heads.

    Args:
        q_sums:   [L, B, N, D] sum of the un-rotated queries over tokens.
        key_sums: [L, B, M, N, D] sum of each block's un-rotated compressed keys over tokens.
    Returns: [L, M], dtype of the arguments.
    """
    batch, heads, head_dim = q_sums.shape[1:]
    keys = key_sums.transpose(1, 2).flatten(2)  # [L, M, B*N*D], for a batch of one without a copy
    # This way round a CPU is 4 to 9 times faster than with the queries as a column.
    total = torch.bmm(q_sums.flatten(1).unsqueeze(1), keys.transpose(1, 2)).squeeze(1)
    return total / (batch * heads * head_dim**0.5)


def choose(
    mode: str,
    candidates: Tensor,
    *,
    active: int,
    layers: int,
    scores: Tensor | None = None,
    seed: int = 0,
    block: int = 0,
    pinned: Tensor | None = None,
) -> Choice:
    """Choose the blocks that attend, for each layer, where the candidates are; the host learns nothing of it.

    Args:
        candidates: [M] int64 numbers of the stored compressed blocks, ascending.
        active:     K, how many to take; at most M.
        scores:     [L, M], needed by the affinity modes. Of equal scores the newer block wins. A layer whose
                    scores are not finite, or all equal, takes the newest blocks: see Choice.degenerate.
        seed, block: what `random` is a function of.
        pinned:     [M] bool, candidates taken before all others, the newest first; None = there are none.
    Raises: UsageError if the mode is unknown; ValueError if counts or shapes do not fit.
    """
    check_mode(mode)
    count, among, device = 0 if mode == "none" else active, len(candidates), candidates.device
    if count > among:
        raise ValueError(f"{count} active blocks wanted, {among} stored")
    newest = torch.arange(among, dtype=torch.float64, device=device).expand(layers, -1)
    degenerate = torch.zeros(layers, dtype=torch.bool, device=device)
    preference = newest
    if mode == "random":
        digest = hashlib.sha256(f"select {seed} {block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        drawn = torch.rand(newest.shape, generator=generator, dtype=torch.float64)
        preference = staging.to_device(drawn, device)
    elif mode in ("affinity", "affinity-recent") and count:
        if scores is None or scores.shape != newest.shape:
            shape = None if scores is None else list(scores.shape)
            raise ValueError(f"{mode} needs scores of shape {list(newest.shape)}, got {shape}")
        degenerate = ~scores.isfinite().all(1)
        if among > 1:
            degenerate = degenerate | (scores == scores[:, :1]).all(1)
        preference = torch.where(degenerate[:, None], newest, scores.to(torch.float64))
    if pinned is not None:
        preference = preference.masked_fill(pinned, float("inf"))
    order = preference.argsort(dim=1, stable=True)  # stable: of equals the newer comes later and wins
    best = order[:, among - count :].sort(dim=1).values  # [L, K]
    return Choice(best, candidates[best], degenerate)
