"""The GPU's kernel against PyTorch's operators: in Triton's interpreter if installed, on a GPU if there is one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from packforcing_cli import bank, rope, turning

CASES = """
import torch
from packforcing_cli import bank, rope, turning

rope.turn_complex = rope.turn_real  # a GPU's way, rounded product by product
generator = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.float16):
    x = torch.randn(3, 7, 3, 24, generator=generator).to(dtype)
    room = torch.zeros(3, 12, 3, 24, dtype=dtype)
    cos, sin = (t.float() for t in rope.angles(torch.rand(12, 3, dtype=torch.float64) * 30, 24))
    turning.turn(x, room[:, 2:9], cos=cos[:7], sin=sin[:7])
    assert torch.equal(room[:, 2:9], rope.rotate(x, cos[:7], sin[:7]))
    assert not room[:, :2].any() and not room[:, 9:].any()
    places = torch.tensor([3, 0, 4])
    for kind in ("auto", "int8"):
        kept, scale = torch.randn(2, 5, 4, 3, 24, generator=generator).to(dtype), None
        if kind == "int8":
            kept, scale = bank.quantize(kept, torch.int8)
        for turns in ((cos, sin), (None, None)):
            slow, fast = torch.zeros(2, 12, 3, 24, dtype=dtype), torch.ones(2, 12, 3, 24, dtype=dtype)
            layer = (kept[None], None if scale is None else scale[None], places[None])
            bank._recall_into(*layer, *turns, slow[None])
            turning.turn(kept, fast, cos=turns[0], sin=turns[1], places=places, scale=scale)
            assert torch.equal(slow, fast), (dtype, kind)
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_gives_what_the_operators_give_when_it_is_interpreted() -> None:
    import os

    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    told = subprocess.run(
        [sys.executable, "-c", CASES], capture_output=True, text=True, env=environment, check=False
    )
    assert told.stdout == "equal\n", told.stderr


def test_other_devices_and_kinds_are_left_to_the_operators() -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.zeros(1, 2, 1, 8, dtype=dtype)
        assert not turning.can_turn(x, x)


def test_the_kernel_is_launched_on_the_gpu_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes the current one; with several GPUs that may be another."""
    current: list[object] = []
    launched: list[list[object]] = []

    @contextmanager
    def device_of(x: torch.Tensor) -> Iterator[None]:
        current.append(x)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
            return lambda *_, **__: launched.append([*current])

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setitem(
        sys.modules, "packforcing_cli.turning_kernel", types.SimpleNamespace(turn_kernel=Kernel())
    )
    x = torch.zeros(1, 2, 1, 8)
    turning.turn(x, torch.zeros_like(x))
    assert len(launched) == len(launched[0]) == 1
    assert launched[0][0] is x


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["auto", "int8", "fp8"])
def test_on_a_gpu_the_kernel_gives_what_the_operators_give(
    dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, scale = torch.randn(3, 2, 5, 182, 12, 128, device="cuda", dtype=dtype), None
    if kind != "auto":
        kept, scale = bank.quantize(kept, bank.kept_dtype(kind, dtype))
    places = torch.tensor([[3, 0, 4], [0, 1, 2], [1, 2, 4]], device="cuda")
    positions = torch.rand(3 * 182, 3, dtype=torch.float64, device="cuda") * 50
    cos, sin = (t.float() for t in rope.angles(positions, 128))
    outs = [torch.zeros(3, 2, 3 * 182, 12, 128, device="cuda", dtype=dtype) for _ in range(2)]
    assert turning.can_turn(kept, outs[0])
    bank._recall_into(kept, scale, places, cos, sin, outs[0])
    monkeypatch.setattr(turning, "can_turn", lambda x, out: False)
    bank._recall_into(kept, scale, places, cos, sin, outs[1])
    assert torch.equal(*outs)
