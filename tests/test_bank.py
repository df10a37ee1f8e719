"""A bank in host memory beside a GPU: what the CPU may touch when, for which no GPU is needed."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch

from packforcing_cli import counting
from packforcing_cli.bank import DEPTH, PAGE, Bank
from packforcing_cli.errors import MemoryFitError

GPU = torch.device("cuda", 1)


class FakeHost:
    """torch.cuda of one GPU: page-locked addresses, and what happened in which order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        self.locked: dict[int, int] = {}
        self.flags: set[int] = set()
        patch.setattr(torch.cuda, "cudart", lambda: self)
        patch.setattr(torch.cuda, "synchronize", lambda device: self.said.append(f"host waits for {device}"))

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.said.append("lock")
        self.locked[address] = size
        self.flags.add(flags)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.said.append("unlock")
        del self.locked[address]  # KeyError for what is not locked
        return 0


def a_bank(kv_dtype: str = "auto", **options: Any) -> Bank:
    cpu = torch.device("cpu")
    sizes: dict[str, Any] = {"layers": 2, "batch": 1, "places": 1, "tokens": 3, "heads": 2, "head_dim": 8}
    kind = {"dtype": torch.float32, "kv_dtype": kv_dtype, "device": cpu, "far": cpu, "recalled": 1}
    return Bank(**{**sizes, **kind, **options})


def far_bank(host: FakeHost, patch: pytest.MonkeyPatch, kv_dtype: str = "auto", **options: Any) -> Bank:
    """A bank whose host memory is that of a GPU's; its near room is on the CPU."""

    names = iter([*(f"{name} {n}" for name in ("ready", "used") for n in range(DEPTH)), "written"])

    class Event:
        def __init__(self) -> None:
            self.name = next(names)

        def record(self, stream: Any) -> None:
            host.said.append(f"{self.name}: {stream}")

        def synchronize(self) -> None:
            pass

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def __str__(self) -> str:
            return self.name

        def wait_event(self, event: Event) -> None:
            host.said.append(f"{self.name} waits for {event.name}")

    patch.setattr(torch.cuda, "current_stream", lambda device=None: Stream(f"stream of {device}"))
    empty = torch.zeros
    with patch.context() as made:
        made.setattr(torch.cuda, "Stream", lambda device: Stream("copies"))
        made.setattr(torch.cuda, "Event", Event)
        made.setattr(torch, "zeros", lambda *size, **how: empty(*size, dtype=how["dtype"]))
        bank = a_bank(kv_dtype, device=GPU, **options)
    return bank


def overlap(ranges: dict[int, int], page: int) -> bool:
    """Whether two ranges, address and bytes, have a page in common."""
    ends = [(at // page, (at + size - 1) // page) for at, size in sorted(ranges.items())]
    return any(end >= start for (_, end), (start, _) in pairwise(ends))


def state_of(bank: Bank) -> dict[str, torch.Tensor]:
    return bank.state(bank.places)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8"])
def test_a_growing_bank_locks_what_comes_and_touches_nothing_that_is_there(
    monkeypatch: pytest.MonkeyPatch, kv_dtype: str
) -> None:
    """Copies to and from what is there may be under way: its pages stay locked, and nothing waits."""
    host = FakeHost(monkeypatch)
    bank = far_bank(host, monkeypatch, kv_dtype, grows_to=5)
    bank.write(0, *torch.randn(2, 2, 1, 3, 2, 8))
    before, locked = state_of(bank), dict(host.locked)
    places = {name: tensor.data_ptr() for name, tensor in bank.tensors().items()}
    host.said.clear()
    bank.resize(3)
    assert host.said == ["lock", "lock"]  # a place each, with all its kinds
    assert locked.items() < host.locked.items() and len(host.locked) == 3
    assert not overlap(host.locked, PAGE)
    for name, tensor in bank.tensors().items():
        assert places.get(name, tensor.data_ptr()) == tensor.data_ptr()
        if not name.startswith("key_sums") and not name.endswith("near"):
            assert any(at <= tensor.data_ptr() < at + size for at, size in host.locked.items())
    after = state_of(bank)
    assert all(torch.equal(after[name][:, :, :1], part) for name, part in before.items())
    assert not after["v"][:, :, 1:].any()
    bank._unlock()


def test_pages_are_let_go_once_the_gpu_is_done_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    host = FakeHost(monkeypatch)
    bank = far_bank(host, monkeypatch, grows_to=5)
    bank.resize(5)
    host.said.clear()
    bank.resize(2)
    assert host.said == [f"host waits for {GPU}", *["unlock"] * 3]
    assert len(host.locked) == bank.places == 2
    host.said.clear()
    del bank
    gc.collect()
    assert host.said == [f"host waits for {GPU}", *["unlock"] * 2]
    assert not host.locked


def test_memory_that_the_system_does_not_lock_ends_with_a_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    host = FakeHost(monkeypatch)
    bank = far_bank(host, monkeypatch, grows_to=5)
    monkeypatch.setattr(host, "cudaHostRegister", lambda *_: 2)
    with pytest.raises(MemoryFitError, match="page-lock") as caught:
        bank.resize(2)
    assert "--bank-memory" in caught.value.hint
    assert bank.places == len(host.locked) == 1
    bank._unlock()


def test_several_gpus_find_the_bank_page_locked_and_its_writes_marked_on_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = FakeHost(monkeypatch)
    bank = far_bank(host, monkeypatch)
    assert host.flags == {1}  # cudaHostRegisterPortable
    bank.write(0, *torch.zeros(2, 2, 1, 3, 2, 8))
    assert host.said[-1] == f"written: stream of {GPU}"
    bank._unlock()


def test_a_fetch_waits_for_what_it_reads_and_for_its_room_and_for_no_other_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So it runs beside all that the model was given since."""
    host = FakeHost(monkeypatch)
    bank = far_bank(host, monkeypatch, "int8", layers=4)
    bank.device = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    bank.write(0, *torch.randn(2, 4, 1, 3, 2, 8))
    host.said.clear()
    turns, out = (torch.ones(3, 4), torch.zeros(3, 4)), torch.zeros(2, 1, 1, 3, 2, 8)
    bank.fetch(0, [0])
    bank.fetch(1, [0])
    bank.recall(range(1), torch.tensor([[0]]), turns, *out)
    bank.fetch(2, [0])
    assert host.said == [
        *("copies waits for written", "copies waits for used 0", "ready 0: copies"),
        *("copies waits for written", "copies waits for used 1", "ready 1: copies"),
        *("stream of cpu waits for ready 0", "used 0: stream of cpu"),
        *("copies waits for written", "copies waits for used 0", "ready 0: copies"),
    ]
    assert bank.has_near(1) and bank.has_near(2) and not bank.has_near(0)
    bank.forget_fetched()
    assert not bank.has_near(1)
    with pytest.raises(AssertionError, match="fetch comes before recall"):
        bank.recall(range(1, 2), torch.tensor([[0]]), turns, *out)
    bank._unlock()


@pytest.mark.parametrize(("kv_dtype", "far"), [("auto", None), ("int8", torch.device("cpu"))])
def test_growing_over_an_hour_moves_the_same_bytes_every_block(
    kv_dtype: str, far: torch.device | None
) -> None:
    """A block comes in and two are recalled, the newest and one of the middle; 3,600 blocks, counted every 90."""
    hour, dim = 3600, 6
    sizes: dict[str, Any] = {"layers": 1, "tokens": 1, "heads": 1, "head_dim": dim, "far": far, "recalled": 2}
    bank, fixed = a_bank(kv_dtype, places=0, grows_to=hour, **sizes), a_bank(kv_dtype, places=8, **sizes)
    k, v = torch.randn(2, 1, 1, 1, 1, dim, generator=torch.Generator().manual_seed(0))
    angle = torch.rand(2, dim // 2, generator=torch.Generator().manual_seed(1))
    out, same = torch.zeros(2, 2, 1, 1, 2, 1, dim)

    def recalled(one: Bank, places: list[int], into: torch.Tensor) -> None:
        if one.is_far:
            one.fetch(0, places)
        one.recall(range(1), torch.tensor([places]), (angle.cos(), angle.sin()), *into, on_host=places)

    def take_in(block: int) -> None:
        bank.resize(block + 1)
        bank.write(block, k * (block + 1), v - block)

    moved, addresses = set(), []
    for block in range(hour):
        if block % 90:
            take_in(block)
        else:
            with counting.moved_bytes() as counted:
                take_in(block)
                recalled(bank, [block // 2, block], out)
            moved.add((counted.bytes, counted.operators))
        addresses.append([tensor.data_ptr() for tensor in bank._slabs[-1].values()])
    assert len(moved) == 1
    assert addresses == [[tensor.data_ptr() for tensor in slab.values()] for slab in bank._slabs]
    recalled(bank, [1799, 3599], out)
    fixed.write(6, k * 1800, v - 1799)
    fixed.write(1, k * 3600, v - 3599)
    recalled(fixed, [6, 1], same)
    assert torch.equal(out, same)
    assert sum(tensor.nbytes for tensor in bank.tensors().values()) == bank.nbytes + bank.near_bytes
