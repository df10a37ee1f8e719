"""Passes recorded as CUDA graphs: once the context has its final length, a pass is one launch instead of a thousand.

    first block of a length    eager, as every length on the way to a full memory
    second one                 recorded on copies of its inputs, at the addresses of the memory's buffers
    from then on               inputs copied in, graph launched, outputs copied out

A recording reads and writes fixed addresses. It is used again only for a context that says, by an equal `fixed`, that
it is at the same ones; for every other context the pass is eager. The numbers are those of the eager pass. Knows no
transformer: a pass is a function of tensors.

Source: torch.cuda.graph; PERFORMANCE notes on fixed K/V slots (FlashDreams).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from packforcing_cli import catalog
from packforcing_cli.errors import EnvironmentProblem

Pass = Callable[..., tuple[Tensor, ...]]
Recorder = Callable[[Callable[[], tuple[Tensor, ...]]], tuple[Callable[[], None], tuple[Tensor, ...]]]
"""Runs a function of no arguments and returns what runs it again at the same addresses, and its outputs there."""


def require_graphs(device: torch.device, *, offload: str) -> None:
    """Raises: EnvironmentProblem if passes cannot be recorded."""
    if device.type == "cpu":
        catalog.check_cpu("none", "none", cuda_graphs=True)
    if offload == "all":
        raise EnvironmentProblem(
            "--cuda-graphs and --offload all: layers that come and go have no fixed addresses",
            hint="Leave one of them away.",
        )


@dataclass
class _Recording:
    key: Hashable
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    given: tuple[Tensor, ...]  # the constants as they were copied last
    replay: Callable[[], None]
    outputs: tuple[Tensor, ...]


class Recordings:
    """The recorded passes of one model, one a kind of pass."""

    def __init__(self, record: Recorder) -> None:
        self._record = record
        self._kept: dict[str, _Recording] = {}
        self._seen: dict[str, tuple[Hashable, weakref.ref[Any]]] = {}
        self.replays = 0  # since the beginning

    def run(
        self,
        name: str,
        function: Pass,
        inputs: Sequence[Tensor],
        constants: Sequence[Tensor],
        context: object,
    ) -> tuple[Tensor, ...]:
        """What `function(*inputs, *constants)` gives, replayed where it can be.

        Args:
            name:      kind of the pass; the last recording of each kind is kept.
            inputs:    differ from call to call.  constants: are the same objects as long as their values are.
            context:   what the pass reads beside them; its `fixed` is equal for equal addresses, None = not fixed.
        Returns: tensors of the caller's own.
        """
        fixed = getattr(context, "fixed", None)
        if fixed is None:
            return function(*inputs, *constants)
        key = (fixed, *((tuple(t.shape), t.dtype) for t in (*inputs, *constants)))
        kept = self._kept.get(name)
        if kept is None or kept.key != key:
            seen = self._seen.get(name)
            if seen is None or seen[0] != key or seen[1]() is context:
                self._seen[name] = (key, weakref.ref(context))
                return function(*inputs, *constants)
            kept = self._kept[name] = self._recorded(key, function, inputs, constants)
        _copy(kept.inputs, inputs)
        if any(new is not old for new, old in zip(constants, kept.given, strict=True)):
            _copy(kept.constants, constants)
            kept.given = tuple(constants)
        kept.replay()
        self.replays += 1
        return tuple(out.clone() for out in kept.outputs)

    def _recorded(
        self, key: Hashable, function: Pass, inputs: Sequence[Tensor], constants: Sequence[Tensor]
    ) -> _Recording:
        own, fixed = tuple(t.clone() for t in inputs), tuple(t.clone() for t in constants)
        replay, outputs = self._record(lambda: function(*own, *fixed))
        return _Recording(key, own, fixed, tuple(constants), replay, outputs)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


class CudaRecorder:
    """Records on a GPU; all recordings share one pool of memory, since their outputs are copied out at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def __call__(
        self, run: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        """Raises: EnvironmentProblem if the driver refuses what the pass does."""
        with torch.cuda.device(self._device):
            try:
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    run()  # libraries set up what they must not set up while recording
                torch.cuda.current_stream().wait_stream(side)
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                graph = torch.cuda.CUDAGraph()
                gc.collect()  # what is let go of while recording may have to wait for the GPU, which would spoil it
                # Other threads may allocate and copy meanwhile: encoding, prefetching.
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    outputs = run()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise EnvironmentProblem(
                    f"--cuda-graphs: a pass cannot be recorded ({' '.join(str(error).split())[:200]})",
                    hint="Leave --cuda-graphs away; packforcing doctor shows the versions to report.",
                ) from error
        return graph.replay, outputs
