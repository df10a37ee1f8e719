"""A bank in host memory beside a GPU: what the CPU may touch when, for which no GPU is needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from packforcing_cli.bank import Bank

GPU = torch.device("cuda", 1)


class FakeHost:
    """torch.cuda of one GPU: page-locked addresses, and what happened in which order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        self.locked: dict[int, int] = {}
        self.flags: set[int] = set()
        patch.setattr(torch.cuda, "cudart", lambda: self)
        patch.setattr(torch.cuda, "synchronize", lambda device: self.said.append(f"host waits for {device}"))
        patch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.said.append("lock")
        self.locked[address] = size
        self.flags.add(flags)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.said.append("unlock")
        del self.locked[address]  # KeyError for what is not locked
        return 0


def far_bank(host: FakeHost, kv_dtype: str = "auto") -> Bank:
    """A bank whose host memory is that of a GPU's; its near room is on the CPU."""
    cpu = torch.device("cpu")
    bank = Bank(
        layers=2,
        batch=1,
        places=1,
        tokens=3,
        heads=2,
        head_dim=8,
        dtype=torch.float32,
        kv_dtype=kv_dtype,
        device=cpu,
        far=cpu,
        recalled=1,
    )
    bank.device = GPU
    bank._stream = SimpleNamespace()  # type: ignore[assignment]
    bank._written = SimpleNamespace(
        record=lambda *stream: host.said.append(f"written {stream}"), synchronize=lambda: None
    )  # type: ignore[assignment]
    bank._lock_pages()
    return bank


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_a_bank_grows_after_the_gpu_is_done_with_it_and_its_pages_are_let_go(
    monkeypatch: pytest.MonkeyPatch, kv_dtype: str
) -> None:
    host = FakeHost(monkeypatch)
    bank = far_bank(host, kv_dtype)
    k, v = torch.randn(2, 2, 1, 3, 2, 8)
    bank.write(0, k, v)
    before = {name: part.clone() for name, part in bank.kept(1).items()}
    parts, zeros = len(bank._parts()), torch.Tensor.new_zeros

    def new_zeros(self: torch.Tensor, *args: Any) -> torch.Tensor:
        host.said.append("grow")
        return zeros(self, *args)

    monkeypatch.setattr(torch.Tensor, "new_zeros", new_zeros)
    host.said.clear()
    bank.resize(3)
    order = [f"host waits for {GPU}", *["unlock"] * parts, *["grow"] * (parts + 1), *["lock"] * parts]
    assert host.said == order
    assert host.locked == {part.data_ptr(): part.nbytes for part in bank._parts().values()}
    assert all(torch.equal(bank.kept(1)[name], part) for name, part in before.items())


def test_several_gpus_find_the_bank_page_locked_and_its_writes_marked_on_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = FakeHost(monkeypatch)
    bank = far_bank(host)
    assert host.flags == {1}  # cudaHostRegisterPortable
    bank.write(0, *torch.zeros(2, 2, 1, 3, 2, 8))
    assert host.said[-1] == f"written ('stream of {GPU}',)"
