"""What a piece of code makes the machine do, counted exactly: floating-point operations, bytes moved, operators.

Counts do not depend on the machine's load, so they can gate tests where times cannot. Floating-point operations are
PyTorch's own count (torch.utils.flop_counter); `pass_flops` is the closed form they must equal. Knows no cache and no
model: it is told shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from packforcing_cli.transformer import TransformerConfig

_PICKS = (
    "index_select",
    "index.Tensor",
    "gather",
    "embedding",
)  # read what they give, not all they are given
_MOVES_NOTHING = ("_unsafe_view", "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


@dataclass
class Moved:
    """What was counted.

    read, written: bytes of the tensors operators took and gave; views move nothing.
    operators:     how many ran, views left out.
    by_operator:   bytes of each.
    """

    read: int = 0
    written: int = 0
    operators: int = 0
    by_operator: dict[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return self.read + self.written


def _is_output(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _recalled(
    kept: Tensor, scale: Tensor | None, places: Tensor, cos: Tensor | None, sin: Tensor | None, out: Tensor
) -> int:
    """What `packforcing::recall_into` reads: of the kept only the places it is told, and the turns."""
    numbers = sum(tensor[:1, :, :1].nbytes for tensor in (kept, scale) if tensor is not None) * places.numel()
    return numbers + places.nbytes + len(kept) * sum(turn.nbytes for turn in (cos, sin) if turn is not None)


_READS: dict[str, Callable[..., int]] = {"recall_into.default": _recalled}


class _Counter(TorchDispatchMode):
    def __init__(self, into: Moved) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._into = into

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__
        if any(
            given.alias_info is not None and not given.alias_info.is_write for given in func._schema.returns
        ):
            return result  # a view
        base = name.partition(".")[0]
        if base in _MOVES_NOTHING:
            return result
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if base == "copy_":
            given = given[1:]
        if not made:  # it writes into what it is given
            into = [
                value for told, value in zip(func._schema.arguments, args, strict=False) if _is_output(told)
            ]
            made, given = into, [tensor for tensor in given if not any(tensor is out for out in into)]
        written = sum(tensor.nbytes for tensor in made)
        is_pick = base in _PICKS or name in _PICKS
        read = written if is_pick else sum(tensor.nbytes for tensor in given)
        if name in _READS:
            read = _READS[name](*args)
        self._into.read += read
        self._into.written += written
        self._into.operators += 1
        self._into.by_operator[base] = self._into.by_operator.get(base, 0) + read + written
        return result


@contextmanager
def moved_bytes() -> Iterator[Moved]:
    """Count what is moved inside the `with`. The operators run as usual."""
    counted = Moved()
    with _Counter(counted):
        yield counted


def _attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: object, **__: object
) -> int:
    """Of the CPU's attention operator, which PyTorch's counter does not know. Shapes [B,N,S,D]."""
    batch, heads, queries, head_dim = query
    return 2 * batch * heads * queries * key[2] * (head_dim + value[3])


_ALSO_COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def flops_of(run: Callable[[], object]) -> int:
    """Floating-point operations of a call: PyTorch's count of its matrix products, convolutions and attention."""
    with FlopCounterMode(display=False, custom_mapping=_ALSO_COUNTED) as counter:
        run()
    return int(counter.get_total_flops())


def pass_flops(
    config: TransformerConfig,
    *,
    tokens: int,
    attended: int,
    text_tokens: int,
    frames: int,
    prompts: int = 1,
    is_commit: bool = False,
) -> int:
    """Floating-point operations of one pass over a block, in closed form; a multiplication and an addition are two.

    A layer: self-attention's four projections, scores and sums; cross-attention's two (keys and values of the text are
    there already), scores and sums; the feed-forward's two. Then patches, timestep vectors and the head.

    Args:
        tokens, attended: of the block, and of what its queries attend with itself.
        text_tokens: of the prompt.
        frames:    latent frames of the block; each has its timestep.
        prompts:   under which the pass runs at once.
        is_commit: the clean pass: one timestep, no head, and of the last layer only q, k and v.
    """
    d, groups = config.dim, 1 if is_commit else frames
    projections = 2 * tokens * d * d
    attention = 4 * tokens * attended * d
    cross = 2 * projections + 4 * tokens * text_tokens * d
    feed_forward = 4 * tokens * d * config.ffn_dim
    layer = 4 * projections + attention + cross + feed_forward
    patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    time = 2 * groups * (config.freq_dim * d + d * d + 6 * d * d)
    total = prompts * config.num_layers * layer + prompts * time
    if is_commit:
        total -= layer - 3 * projections
    else:
        total += prompts * 2 * tokens * d * config.out_channels * patch
    return total + 2 * tokens * config.in_channels * patch * d
