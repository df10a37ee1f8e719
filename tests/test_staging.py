"""What crosses between the host and where the model runs: how often in a block, and that nothing waits for it.

A GPU is stood in for by the meta device. It has no values, so that reading one back is an error; and a tensor of the
host comes there by `aten::_to_copy` or `aten::copy_`, which say whether they wait, or by `torch.tensor`, which does.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import embeds, video_model
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from packforcing_cli import rollout, staging
from packforcing_cli.cache import KVCache
from packforcing_cli.config import MemoryOptions
from packforcing_cli.past import PastBlock
from packforcing_cli.prompts import Prompt
from packforcing_cli.registry import VideoModel
from packforcing_cli.rollout import stream_generate

META = torch.device("meta")
USUAL: dict[str, Any] = {"mid_span": "block", "top_k": 2, "bank": 4}
BLOCKS, STEADY = 14, 9
READ_BACK = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "is_nonzero", "equal")


class _Made(TorchFunctionMode):
    """Counts tensors made of numbers of the host, in ordinary memory, right where the model runs."""

    def __init__(self, waited: Counter[str]) -> None:
        super().__init__()
        self._waited = waited

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and out.device == META:
            self._waited["torch.tensor"] += 1
        return out


class Crossings(TorchDispatchMode):
    """Counts what goes from device to device, and what waits for the GPU, or would."""

    def __init__(self) -> None:
        super().__init__()
        self.crossed = 0
        self.waited: Counter[str] = Counter()
        self._made = _Made(self.waited)

    def __enter__(self) -> Crossings:
        self._made.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out, name = func(*args, **kwargs), func.__name__.partition(".")[0]
        given, made = (
            {leaf.device for leaf in tree_leaves(leaves) if isinstance(leaf, Tensor)}
            for leaves in ((args, kwargs), out)
        )
        if name in READ_BACK and META in given:
            self.waited[name] += 1
        if name in ("_to_copy", "copy_") and len(given | made) > 1:
            if kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,)):
                self.crossed += 1
            else:
                self.waited[name] += 1
        return out


def test_what_would_wait_is_seen() -> None:
    x = torch.zeros(2)
    with Crossings() as seen:
        x.to(META)
        torch.zeros(2, device=META).copy_(x)
        torch.tensor([1.0, 2.0], device=META)
        torch.tensor([1, 2]).to(META)
        torch.zeros(2, device=META) + 1
        x.to(torch.float64).sum().item()  # of the host alone
    assert seen.waited == {"_to_copy": 2, "copy_": 1, "torch.tensor": 1}
    assert seen.crossed == 0
    with Crossings() as seen:
        there = staging.to_device(x, META)
        staging.write(x, there)
    assert (seen.crossed, seen.waited.total()) == (2, 0)


def test_to_and_from_a_gpu_all_goes_through_page_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def noted(name: str) -> Any:
        def call(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            said.append(f"{name} {kwargs.get('non_blocking', '')}".strip())
            return self

        return call

    for name in ("pin_memory", "to", "copy_"):
        monkeypatch.setattr(Tensor, name, noted(name))
    x, gpu = torch.zeros(2), torch.zeros(2, device=META)
    staging.to_device(x, "cuda:1")
    staging.to_device(x, "cpu")
    staging.to_device(gpu, "cuda")  # it is there
    assert said == ["pin_memory", "to True", "to True", "to True"]
    said.clear()
    empty, asked = torch.empty, list[Any]()
    monkeypatch.setattr(torch, "empty", lambda *size, **how: [asked.append(how), empty(*size)][1])
    monkeypatch.setattr(Tensor, "is_cuda", True)
    staging.write(x, gpu)
    staging.to_host(gpu)
    assert said == ["pin_memory", "copy_ True", "copy_ True"]
    assert asked == [{"dtype": torch.float32, "pin_memory": True}]


def without_values(model: VideoModel) -> VideoModel:
    """The same model on the meta device."""
    assert model.compressor is not None
    return replace(
        model,
        device=META,
        transformer=model.transformer.to(META),
        compressor=model.compressor.to(META),
        codec=model.codec.to(META, model.dtype),
    )


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("memory", "crossings"),
    [
        ({}, 3),  # noise; numbers of the bank; where the compressed tokens are
        ({"select": "affinity"}, 3),
        ({"select": "fifo"}, 3),
        ({"select": "random"}, 4),  # what is drawn
        ({"recent_blocks": 2, "compressor": "lr"}, 3),
        ({"kv_dtype": "int8"}, 3),
        ({"policy": "window"}, 1),
    ],
    ids=lambda value: " ".join(f"{a}={b}" for a, b in value.items()) if isinstance(value, dict) else "",
)
def test_no_block_waits_for_a_copy_or_a_number(
    monkeypatch: pytest.MonkeyPatch, memory: dict[str, Any], crossings: int, overlap: bool
) -> None:
    model = without_values(video_model(torch.float32))
    shown, marks = [], []

    def to_host(x: Tensor) -> Tensor:
        shown.append(x)
        return torch.ones(x.shape, dtype=x.dtype)

    monkeypatch.setattr(staging, "to_host", to_host)
    monkeypatch.setattr(staging.Mark, "wait", lambda mark: marks.append(mark))
    prompt = Prompt("a", embeds(0, model.dtype).to(META))
    blocks = stream_generate(
        model,
        prompt,
        num_blocks=BLOCKS,
        seed=1,
        memory=MemoryOptions(**USUAL | memory),
        overlap=overlap,
    )
    for _ in range(STEADY):
        next(blocks)
    for _ in range(3):
        shown.clear()
        marks.clear()
        with Crossings() as seen:
            next(blocks)
        assert not seen.waited
        assert seen.crossed == crossings
        # Frames, latents, whether they are finite; what was recalled, which layers said nothing, and scores.
        assert len(shown) == 5 + (
            memory.get("select", "affinity-recent").startswith("affinity") and crossings > 1
        )
        assert len(marks) == 2  # before its frames are looked at, and before it is shown


@pytest.mark.parametrize(
    ("memory", "waits"),
    [
        ({}, 0),
        ({"select": "affinity"}, 0),
        ({"bank": None}, 1),
        ({"bank_device": "host"}, 1),
        ({"bank_device": "host", "bank": None}, 1),
        ({"rope_adjustment": False}, 1),
        ({"bank_device": "host", "select": "affinity"}, 2),  # each layer chooses with its own queries
    ],
    ids=str,
)
def test_the_host_is_told_what_is_recalled_once_a_block_and_only_where_it_has_a_part_in_it(
    monkeypatch: pytest.MonkeyPatch, memory: dict[str, Any], waits: int
) -> None:
    model = video_model(torch.float32)
    asked: list[staging.Coming] = []
    wait = staging.Coming.wait
    monkeypatch.setattr(staging.Coming, "wait", lambda self: [asked.append(self), wait(self)][1])
    options = MemoryOptions(**USUAL | memory)
    prompt = Prompt("a", embeds(0, model.dtype))
    counts = []
    for _ in stream_generate(model, prompt, num_blocks=BLOCKS, seed=1, memory=options, overlap=False):
        counts.append(len(asked))
        asked.clear()
    assert counts[STEADY:] == [waits] * (BLOCKS - STEADY)


def test_blocks_that_are_there_already_fetch_what_was_recalled_for_each() -> None:
    """A clean pass leaves what was fetched for the last layer unread: the next block must not take it for its own."""
    model, prompt = video_model(torch.float32), Prompt("a", embeds(0, torch.float32))
    options = MemoryOptions(**USUAL | {"bank_device": "host"})
    made = list(stream_generate(model, prompt, num_blocks=BLOCKS, seed=1, memory=options, overlap=False))
    past = [PastBlock(block.latents, block.selected) for block in made[:-1]]
    again = list(stream_generate(model, prompt, num_blocks=BLOCKS, seed=1, memory=options, past=past))
    assert torch.equal(again[-1].latents, made[-1].latents)


def test_a_stop_lets_go_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = video_model(torch.float32), Prompt("a", embeds(0, torch.float32))
    made: list[weakref.ref[KVCache]] = []

    def kept(*arguments: Any, **options: Any) -> KVCache:
        cache = KVCache(*arguments, **options)
        made.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(rollout, "KVCache", kept)
    options = MemoryOptions(**USUAL)
    blocks = rollout.stream_generate(model, prompt, num_blocks=BLOCKS, seed=1, memory=options, overlap=True)
    gc.collect()
    gc.disable()
    try:
        next(blocks)
        next(blocks)
        assert made[0]() is not None
        blocks.close()
        del blocks
        assert made[0]() is None
    finally:
        gc.enable()
