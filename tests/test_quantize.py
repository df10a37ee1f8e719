"""Quantized linears: how far the transformer's output moves, and that nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from packforcing_cli import prompts, quantize, registry, weights
from packforcing_cli.embeddings import EmbeddingCache
from packforcing_cli.errors import EnvironmentProblem, UsageError
from packforcing_cli.layout import Grid, Layout
from packforcing_cli.quantize import linear_weights, quantizer
from packforcing_cli.timeline import Script
from packforcing_cli.transformer import AloneContext, TransformerConfig, WanTransformer

CPU = torch.device("cpu")
GRID = Grid(4, rows=4, cols=4, layers=2, kv_dim=192, heads=3)
CONFIG = TransformerConfig(
    num_layers=2, num_attention_heads=3, attention_head_dim=64, ffn_dim=512, text_dim=64, freq_dim=64
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stored transformer, wide enough for quantization errors to average out as in a real one."""
    network = WanTransformer(CONFIG)
    tiny.randomise(network, 0)
    place = tmp_path_factory.mktemp("quantize") / "transformer"
    weights.save(place, CONFIG.to_dict(), network.state_dict(), dtype=torch.bfloat16)
    return place


def load(
    folder: Path, mode: str = "none", dtype: torch.dtype = torch.float32, **more: bool
) -> WanTransformer:
    return registry.load_transformer(folder, device=CPU, dtype=dtype, quantize=mode, **more)


@torch.no_grad()
def output(network: WanTransformer) -> Tensor:
    """Velocity of one noisy block, in float32."""
    generator = torch.Generator().manual_seed(1)
    dtype = network.proj_out.weight.dtype
    latents = torch.randn(1, 16, 4, 8, 8, generator=generator).to(dtype)
    text = network.embed_text(torch.randn(1, 12, 64, generator=generator).to(dtype))
    layout = Layout(GRID, top_k=0)
    start = layout.slots(0).current_start
    frames = torch.arange(4, dtype=torch.float64) + float(start)
    positions = torch.cartesian_prod(frames, torch.arange(4.0).double(), torch.arange(4.0).double())
    times = torch.full((1, 4), 833.0, dtype=torch.float64)
    return network(latents, times, text, AloneContext(positions)).float()


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


ERRORS = {"int8": 0.012, "int8-dynamic": 0.015, "fp8-weight": 0.042}
"""Bounds of the relative error of the output against the same dtype, about 1.5 times what was measured."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ERRORS)
def test_the_output_stays_close_and_the_error_is_reported(
    mode: str, dtype: torch.dtype, folder: Path, record_property: Callable[[str, object], None]
) -> None:
    exact, whole = output(load(folder)), output(load(folder, dtype=dtype))
    small = output(load(folder, mode, dtype))
    error = relative_error(small, whole)
    record_property("relative_error", error)
    print(
        f"{mode} in {dtype}: relative error {error:.4f}; {dtype} against fp32 {relative_error(whole, exact):.4f}"
    )
    assert 0 < error < ERRORS[mode]
    assert relative_error(small, exact) < ERRORS[mode] + 0.01


def test_only_the_linears_of_the_layers_are_quantized_and_they_take_one_byte(folder: Path) -> None:
    network, whole = load(folder, "int8"), load(folder)
    changed = {
        name
        for name, value in network.state_dict().items()
        if type(value) is not type(whole.state_dict()[name])
    }
    assert changed == linear_weights(whole, "blocks.")
    assert len(changed) == 2 * 10  # eight of attention and two of the FFN
    assert not any("norm" in name or "embed" in name or "proj_out" in name for name in changed)
    weight = network.get_submodule("blocks.0.ffn.net.2").weight
    assert isinstance(weight, Tensor)
    assert weight.qdata.dtype == torch.int8  # type: ignore[attr-defined]
    assert weight.qdata.shape == (192, 512)  # type: ignore[attr-defined]


def fp8_scale(x: Tensor) -> Tensor:
    """One scale a row, which takes its largest number to 448, the largest of e4m3."""
    return x.double().abs().amax(-1, keepdim=True) / 448


def fake_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """To e4m3 and back: three bits of mantissa."""
    y = x.double() / scale
    exponent = torch.floor(torch.log2(y.abs().clamp(min=2**-6)))  # below 2^-6 numbers are subnormal
    step = 2.0 ** (exponent - 3)
    return (y / step).round() * step * scale  # rounds half to even


def test_fp8_weights_equal_a_reference_written_from_the_format() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    stored: Any = quantizer("fp8-weight", CPU, torch.bfloat16)(weight)
    torch.testing.assert_close(stored.scale.double(), fp8_scale(weight), rtol=2**-8, atol=0)  # it is bf16
    assert torch.equal(stored.dequantize(torch.float32), fake_fp8(weight, stored.scale.double()).float())


def fp8_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [S,in], weight [out,in] -> [S,out], both rounded to e4m3."""
    return (fake_fp8(x, fp8_scale(x)) @ fake_fp8(weight, fp8_scale(weight)).T).float()


def test_an_fp8_product_of_the_reference_is_as_close_as_three_bits_of_mantissa_are() -> None:
    """What --quantize fp8 computes on a GPU (weights a row, activations a token, sums in fp32), done by hand."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 256, generator=generator), torch.randn(128, 256, generator=generator)
    error = relative_error(fp8_product(x, weight), x @ weight.T)
    # A rounded mantissa of three bits is off by at most 1/16, uniformly: 2^-4/sqrt(3) of its binade, twice.
    assert 0.02 < error < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["int8", "int8-dynamic", "fp8-weight", "fp8"])
def test_every_mode_runs_on_a_gpu(mode: str, folder: Path) -> None:
    gpu = torch.device("cuda")
    if mode == "fp8" and torch.cuda.get_device_capability() < quantize.FP8_CAPABILITY:
        pytest.skip("no fp8 products on this GPU")
    weight = torch.randn(512, 256, generator=torch.Generator().manual_seed(0)).bfloat16().to(gpu)
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).bfloat16().to(gpu)
    y = nn.functional.linear(x, quantizer(mode, gpu, torch.bfloat16)(weight))
    assert relative_error(y.float(), (x @ weight.T).float()) < 0.06
    if mode == "fp8":
        assert relative_error(y.float().cpu(), fp8_product(x.cpu(), weight.cpu())) < 0.02
    network = registry.load_transformer(folder, device=gpu, dtype=torch.bfloat16, quantize=mode)
    assert {p.device.type for p in network.parameters()} == {"cuda"}


# ------------------------------------------------------------------------------------------------- what cannot be


def test_fp8_is_refused_without_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvironmentProblem, match="runs on the CPU") as error:
        quantize.require_support("fp8", CPU)
    assert "--quantize int8" in error.value.hint
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "an old card")
    with pytest.raises(EnvironmentProblem, match=r"capability 8\.9, and an old card has 8\.6"):
        quantize.require_support("fp8", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    quantize.require_support("fp8", torch.device("cuda"))
    for mode in ("int8", "int8-dynamic", "fp8-weight"):
        quantize.require_support(mode, CPU)


def test_a_matrix_that_fp8_cannot_take_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with pytest.raises(UsageError, match="24x32"):
        quantizer("fp8", torch.device("cuda"), torch.bfloat16)(torch.zeros(24, 32))


# --------------------------------------------------------------------------------------------- streamed layers


@pytest.mark.parametrize("mode", ["none", "int8", "fp8-weight"])
def test_streamed_layers_give_the_same_output(mode: str, folder: Path) -> None:
    assert torch.equal(output(load(folder, mode, stream_layers=True)), output(load(folder, mode)))


@pytest.mark.parametrize("offload", ["text", "all"])
def test_offloading_leaves_weights_in_host_memory_and_brings_the_prompt(
    offload: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The meta device stands in for a GPU: no CPU tensor mixes with what is there."""
    gpu, stream = torch.device("meta"), weights._stream
    monkeypatch.setattr(registry, "resolve_device", lambda _: gpu)
    monkeypatch.setattr(
        weights, "_stream", lambda path, device: ((n, t.to(device)) for n, t in stream(path, CPU))
    )
    source = registry.open_model("demo", dtype="fp32", offload=offload)
    assert source.load_text_encoder().device == CPU
    cache = EmbeddingCache(tmp_path)
    prompt = prompts.encode_script(source, Script(("a red circle",)), guided=True, cache=cache).prompts[0]
    assert prompt.conditional.device == gpu
    assert prompt.unconditional is not None
    assert prompt.unconditional.device == gpu
    model = source.load()
    places = {name: p.device for name, p in model.transformer.named_parameters()}
    in_host = {name for name, device in places.items() if device == CPU}
    layers = {name for name in places if name.startswith("blocks.")}
    assert in_host == (layers if offload == "all" else set())
    assert set(places.values()) <= {CPU, gpu}


@torch.no_grad()
def test_streamed_layers_run_on_the_device_one_at_a_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, which no CPU tensor mixes with: what runs there is there."""
    network, meta = load(folder), torch.device("meta")
    layers = dict(network.blocks.named_parameters())
    for name, child in network.named_children():
        if name != "blocks":
            child.to(meta)
    network.scale_shift_table = nn.Parameter(network.scale_shift_table.to(meta), requires_grad=False)
    network.stream_layers(meta)
    copies: list[str] = []
    copy = Tensor.to

    def counted(self: Tensor, *args: object, **options: object) -> Tensor:
        if options.get("copy"):
            copies.append("")
        return copy(self, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Tensor, "to", counted)
    text = network.embed_text(torch.empty(1, 12, 64, device=meta))
    positions = torch.empty(64, 3, dtype=torch.float64, device=meta)
    copies.clear()
    made = network(
        torch.empty(1, 16, 4, 8, 8, device=meta),
        torch.empty(1, 4, dtype=torch.float64, device=meta),
        text,
        AloneContext(positions),
    )
    assert made.device == meta
    assert len(copies) == len(layers)  # every weight once a pass
    assert {p.device.type for p in network.blocks.parameters()} == {"cpu"}
    seat = network._seat
    assert seat is not None
    seated = sum(p.numel() for p in seat._layer.parameters())
    assert seated * CONFIG.num_layers == sum(p.numel() for p in layers.values())
