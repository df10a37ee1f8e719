"""What a CUDA graph does, on the CPU: operators are noted with the tensors they ran on, and run again on the same ones.

No Python of the pass runs again. Whatever it decided is decided for good, and a tensor it made is at one place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Notes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        aliases = any(given.alias_info is not None for given in func._schema.returns)
        # Views show what they are views of; in-place operators write where they did.
        self.calls.append((func, args, kwargs or {}, [] if aliases else made))
        return out


def record(run: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """As `graphs.CudaRecorder`."""
    notes = _Notes()
    with notes:
        outputs = run()

    def replay() -> None:
        for func, args, kwargs, made in notes.calls:
            if func.is_view:
                continue
            again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for place, value in zip(made, again):
                place.copy_(value)

    return replay, outputs
