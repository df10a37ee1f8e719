"""Reading weights: once in memory, whatever happens to them on the way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from packforcing_cli import catalog, weights
from packforcing_cli.transformer import TransformerConfig, WanTransformer

CPU = torch.device("cpu")

PEAK = """
import json, sys, threading, time
import torch
from packforcing_cli import registry, weights
from packforcing_cli.quantize import quantizer
from pathlib import Path

folder, dtype, mode = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
weights.MAPPED_BYTES = int(sys.argv[4])
whole = (folder / "config.json").exists()
if whole:
    registry._empty_transformer(folder)  # the first use of the meta device loads parts of torch
cpu, dtype = torch.device("cpu"), registry.resolve_dtype(dtype, torch.device("cpu"))
shrink = quantizer(mode, cpu, dtype) if mode != "none" else None
if shrink is not None:
    shrink(torch.ones(64, 64, dtype=dtype))

def status(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024

Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
before = status("VmRSS")
if whole:
    tensors = registry.load_transformer(folder, device=cpu, dtype=dtype, quantize=mode).state_dict()
else:
    tensors = weights.read_tensors(
        folder, device=cpu, dtype=dtype, change=None if shrink is None else lambda name, tensor: shrink(tensor)
    )
for tensor in tensors.values():  # a mapped file is in memory once it is looked at
    getattr(tensor, "qdata", tensor).max()
peak = status("VmHWM") - before
size = sum(
    t.qdata.nbytes + t.scale.nbytes if hasattr(t, "qdata") else t.nbytes for t in tensors.values()
)
print(json.dumps({"peak": peak, "size": size}))
"""


def peak_of_reading(folder: Path, dtype: str, mode: str, mapped: int = weights.MAPPED_BYTES) -> float:
    """Most memory while a folder is read in a process of its own, in sizes of the weights it ends with."""
    import json

    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), dtype, mode, str(mapped)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ratio: float = found["peak"] / found["size"]
    print(f"{dtype} {mode}: {found['size'] / 1e6:.0f} MB of weights, peak {ratio:.2f}")
    return ratio


def write_transformer(folder: Path, config: TransformerConfig) -> None:
    """transformer/ of a package, random weights in bf16."""
    with torch.device("meta"):
        model = WanTransformer(config)
    weights.randomise(model, device=CPU, dtype=torch.bfloat16)
    weights.save(folder, config.to_dict(), model.state_dict())


def write_random(folder: Path, *, num_tensors: int, side: int) -> None:
    """A part of bf16 matrices, in two shards."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    for shard in range(2):
        save_file(
            {
                f"{shard}.{i}": torch.randn(side, side, generator=generator).bfloat16()
                for i in range(num_tensors // 2)
            },
            folder / f"model-{shard}.safetensors",
        )


can_measure = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from /proc"
)


@can_measure
def test_reading_never_holds_weights_twice(tmp_path: Path) -> None:
    """A sample of 200 MB; a tensor, and the piece of the file that is mapped, are as small in it as in a real model."""
    write_random(tmp_path / "part", num_tensors=96, side=1024)
    for dtype, mode in (("bf16", "none"), ("fp32", "none"), ("bf16", "int8")):
        assert peak_of_reading(tmp_path / "part", dtype, mode, 4 << 20) < 1.3


@can_measure
@pytest.mark.slow
def test_reading_weights_of_full_size_takes_less_than_a_third_more(tmp_path: Path) -> None:
    """As large as Wan2.1-1.3B's transformer (2.8 GB): pytest -m slow -s tests/test_weights.py"""
    write_random(tmp_path / "part", num_tensors=600, side=1536)
    for dtype in ("bf16", "fp32"):
        assert peak_of_reading(tmp_path / "part", dtype, "none") < 1.3


@can_measure
def test_loading_never_holds_weights_twice(tmp_path: Path) -> None:
    """A sample of 200 MB. Its largest tensor, and the piece of the file that is mapped, are as small a share of it as
    they are of Wan2.1-1.3B's transformer: 1 % and 2 %."""
    config = TransformerConfig(
        num_layers=24, num_attention_heads=4, attention_head_dim=128, ffn_dim=2048, text_dim=64
    )
    write_transformer(tmp_path / "transformer", config)
    for dtype, mode in (("bf16", "none"), ("fp32", "none")):
        assert peak_of_reading(tmp_path / "transformer", dtype, mode, 4 << 20) < 1.3


@can_measure
@pytest.mark.slow
def test_loading_the_transformer_of_wan_takes_less_than_a_third_more(tmp_path: Path) -> None:
    """Random weights in the shape of Wan2.1-1.3B's, 2.8 GB: pytest -m slow -s tests/test_weights.py"""
    facts = catalog.get("wan2.1-1.3b")
    config = TransformerConfig(
        num_layers=facts.layers, num_attention_heads=facts.heads, attention_head_dim=facts.head_dim,
        ffn_dim=facts.ffn_dim, text_dim=facts.text_dim, freq_dim=catalog.TIME_EMBEDDING,
    )  # fmt: skip
    write_transformer(tmp_path / "transformer", config)
    stored = next((tmp_path / "transformer").glob("*.safetensors")).stat().st_size
    assert stored == pytest.approx(2 * facts.transformer_params, rel=1e-3)
    for dtype, mode in (("bf16", "none"), ("fp32", "none")):
        assert peak_of_reading(tmp_path / "transformer", dtype, mode) < 1.3


def test_what_is_read_is_what_was_written_however_often_the_file_is_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random(tmp_path / "part", num_tensors=6, side=64)
    whole = weights.read_tensors(tmp_path / "part", device=CPU)
    monkeypatch.setattr(weights, "MAPPED_BYTES", 1)
    pieces = weights.read_tensors(tmp_path / "part", device=CPU)
    assert list(whole) == list(pieces)
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    assert len(whole) == 6
