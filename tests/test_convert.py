"""Published checkpoints become packages: every format, every way it can be wrong, nothing of it run."""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import transformer
from torch import Tensor

import packforcing_cli
from packforcing_cli import catalog, convert, registry, unpickle, weights
from packforcing_cli.convert import bare_name, original_name
from packforcing_cli.errors import DiskFullError, UsageError, WeightsError
from packforcing_cli.quiet import known_import_noise_dropped
from packforcing_cli.rope import grid_positions
from packforcing_cli.transformer import AloneContext, TransformerConfig, WanTransformer

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "num_attention_heads": 1,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 64,
}

# The public names, written out once by hand from Wan 2.1's model.py; numbers of layers are put in for {}.
WAN_LAYER = (
    "modulation norm3.weight norm3.bias ffn.0.weight ffn.0.bias ffn.2.weight ffn.2.bias "
    + " ".join(
        f"{a}.{x}.{k}" for a in ("self_attn", "cross_attn") for x in "qkvo" for k in ("weight", "bias")
    )
    + " "
    + " ".join(f"{a}.norm_{x}.weight" for a in ("self_attn", "cross_attn") for x in "qk")
).split()
WAN_TOP = (
    "head.modulation "
    + " ".join(
        f"{m}.{k}"
        for m in [
            "patch_embedding",
            "text_embedding.0",
            "text_embedding.2",
            "time_embedding.0",
            "time_embedding.2",
            "time_projection.1",
            "head.head",
        ]
        for k in ("weight", "bias")
    )
).split()


def tiny(seed: int = 0, **changes: Any) -> WanTransformer:
    return transformer(seed, torch.float32, **(SIZES | changes))


def original(model: WanTransformer) -> dict[str, Tensor]:
    """A model's tensors as Wan names them, by this file's own list."""
    state = model.state_dict()
    by_name = {original_name(name): tensor for name, tensor in state.items()}
    names = [*WAN_TOP, *(f"blocks.{i}.{name}" for i in range(len(model.blocks)) for name in WAN_LAYER)]
    assert len(names) == len(state)
    return {name: by_name[name] for name in names}


@pytest.fixture(scope="module")
def model() -> WanTransformer:
    return tiny()


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpickling in this process, which is much faster; what the subprocess adds has tests of its own."""

    def extract(source: Path, target: Path, *, wanted: tuple[str, ...]) -> unpickle.Extracted:
        group, tensors, left_out = unpickle.read_group(source, wanted)
        unpickle.write(tensors, target)
        return unpickle.Extracted(group, tuple(left_out))

    monkeypatch.setattr(unpickle, "extract", extract)


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def checkpointed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as FSDP, activation checkpointing and torch.compile leave them together."""
    inner = {
        re.sub(r"^(blocks\.\d+)\.", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module.", name): tensor
        for name, tensor in tensors.items()
    }
    return prefixed("model._fsdp_wrapped_module._orig_mod.", inner)


def loaded(folder: Path) -> WanTransformer:
    return registry.load_transformer(folder / "transformer", device=torch.device("cpu"), dtype=torch.float32)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# ------------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("name", ["wan2.1-1.3b", "wan2.1-14b"])
def test_the_map_covers_exactly_the_public_names_of_the_real_sizes(name: str) -> None:
    facts = catalog.get(name)
    values = {
        "num_layers": facts.layers,
        "num_attention_heads": facts.heads,
        "attention_head_dim": facts.head_dim,
        "ffn_dim": facts.ffn_dim,
    }
    with known_import_noise_dropped():
        from diffusers import WanTransformer3DModel
    with torch.device("meta"):
        theirs = WanTransformer3DModel(**values).state_dict()
        ours = WanTransformer(TransformerConfig(**values)).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    public = {*WAN_TOP, *(f"blocks.{i}.{n}" for i in range(facts.layers) for n in WAN_LAYER)}
    mapped = [original_name(key) for key in theirs]
    assert len(mapped) == len(set(mapped))
    assert set(mapped) == public


def test_the_map_equals_the_one_of_diffusers_conversion(model: WanTransformer) -> None:
    """Applied to every public name; diffusers' single-file loader holds the same table."""
    with known_import_noise_dropped():
        from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
    theirs = convert_wan_transformer_to_diffusers(dict(original(model)))
    assert same(dict(theirs), dict(model.state_dict()))


@pytest.mark.parametrize(
    "name",
    [
        "blocks.3.self_attn.q.weight",
        "model.blocks.3.self_attn.q.weight",
        "model._fsdp_wrapped_module.blocks.3._fsdp_wrapped_module.self_attn.q.weight",
        "_orig_mod.model.blocks.3._checkpoint_wrapped_module.self_attn.q.weight",
        "module.model.blocks.3._orig_mod.self_attn.q.weight",
        "model.diffusion_model.blocks.3.self_attn.q.weight",
    ],
)
def test_wrappers_leave_no_trace_in_a_name(name: str) -> None:
    assert bare_name(name) == "blocks.3.self_attn.q.weight"


# ---------------------------------------------------------------------------------------------------------- formats

FORMATS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "self-forcing": lambda t: {"generator": prefixed("model.", t), "critic": {"model.x": torch.zeros(2)}},
    "self-forcing, ema": lambda t: {
        "generator": prefixed("model.", {k: v + 1 for k, v in t.items()}),
        "generator_ema": prefixed("model.", t),
        "step": 700,
    },
    "fsdp": lambda t: {"generator_ema": checkpointed(t)},
    "older": lambda t: {"model": prefixed("model.", t)},
    "a bare dictionary": lambda t: collections.OrderedDict(prefixed("model.", t)),
    "parameters": lambda t: {"generator": {k: torch.nn.Parameter(v) for k, v in t.items()}},
}


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("layout", FORMATS)
def test_every_layout_of_a_checkpoint_converts_bit_for_bit(
    layout: str, model: WanTransformer, tmp_path: Path
) -> None:
    torch.save(FORMATS[layout](original(model)), tmp_path / "student.pt")
    done = convert.convert(tmp_path / "student.pt", tmp_path / "out")
    found = weights.read_tensors(tmp_path / "out" / "transformer", device=torch.device("cpu"))
    assert same(found, dict(model.state_dict()))
    registry.verify_package(tmp_path / "out", done.manifest)
    assert done.manifest.schedule.kind == ("euler" if layout == "a bare dictionary" else "renoise")
    assert any("incomplete" in note and "--base" in note for note in done.notes)


@pytest.mark.usefixtures("inline")
def test_the_old_file_format_converts_too(model: WanTransformer, tmp_path: Path) -> None:
    content = {"generator": prefixed("model.", original(model))}
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    convert.convert(tmp_path / "old.pt", tmp_path / "out")
    assert same(dict(loaded(tmp_path / "out").state_dict()), dict(model.state_dict()))


def test_original_and_diffusers_safetensors_convert_bit_for_bit_sharded_or_not(
    model: WanTransformer, tmp_path: Path
) -> None:
    half = {name: tensor.bfloat16() for name, tensor in original(model).items()}
    ours = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    (tmp_path / "single").mkdir()
    (tmp_path / "sharded").mkdir()
    save_file(half, tmp_path / "single" / "diffusion_pytorch_model.safetensors")
    names = sorted(half)
    shards = {"a-00001.safetensors": names[::2], "a-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: half[name] for name in part}, tmp_path / "sharded" / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "sharded" / "a.safetensors.index.json").write_text(json.dumps(index))
    save_file(ours, tmp_path / "diffusers.safetensors")
    for source in (
        "single/diffusion_pytorch_model.safetensors",
        "single",
        "sharded",
        "diffusers.safetensors",
    ):
        convert.convert(tmp_path / source, tmp_path / "out", overwrite=True)
        found = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
        assert same(found, ours)


def test_heads_and_layers_come_from_the_config_beside_original_weights(tmp_path: Path) -> None:
    two_heads = tiny(num_attention_heads=4, attention_head_dim=24)
    save_file(original(two_heads), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"_class_name": "WanModel", "model_type": "t2v", "num_heads": 4, "num_layers": 2, "eps": 1e-6}
        )
    )
    convert.convert(tmp_path / "model.safetensors", tmp_path / "out")
    assert loaded(tmp_path / "out").config == two_heads.config


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("layout", ["self-forcing", "fsdp"])
def test_a_converted_model_computes_what_diffusers_does(
    layout: str, model: WanTransformer, tmp_path: Path
) -> None:
    """diffusers gets the same public weights by its own conversion."""
    with known_import_noise_dropped():
        from diffusers import WanTransformer3DModel
        from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
    torch.save(FORMATS[layout](original(model)), tmp_path / "student.pt")
    convert.convert(tmp_path / "student.pt", tmp_path / "out")
    ours = loaded(tmp_path / "out")
    values = {k: v for k, v in ours.config.to_dict().items() if k != "_class_name"}
    theirs = WanTransformer3DModel(**values).eval()
    theirs.load_state_dict(convert_wan_transformer_to_diffusers(dict(original(model))))
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 16, 3, 4, 6, generator=generator)
    embeds = torch.randn(1, 7, 64, generator=generator)
    time = torch.tensor([833.3333])
    with torch.no_grad():
        expected = theirs(latents, time, embeds, return_dict=False)[0]
        alone = AloneContext(grid_positions(0.0, 3, 2, 3))
        found = ours(latents, time[:, None].expand(1, 3), ours.embed_text(embeds), alone)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.usefixtures("inline")
def test_averaged_weights_are_taken_or_left_as_asked(model: WanTransformer, tmp_path: Path) -> None:
    source = tmp_path / "s.pt"
    torch.save(FORMATS["self-forcing, ema"](original(model)), source)
    averaged = convert.convert(source, tmp_path / "a", ema=True)
    last = convert.convert(source, tmp_path / "b", ema=False)
    assert "took generator_ema; left out: generator, step" in averaged.notes
    assert torch.equal(loaded(tmp_path / "b").proj_out.bias, loaded(tmp_path / "a").proj_out.bias + 1)
    assert (averaged.manifest.provenance["group"], last.manifest.provenance["group"]) == (
        "generator_ema",
        "generator",
    )
    torch.save(FORMATS["self-forcing"](original(model)), source)
    with pytest.raises(WeightsError, match=r"has no generator_ema; it holds generator \(dict\), critic"):
        convert.convert(source, tmp_path / "c", ema=True)


def test_the_dtype_of_stored_weights_is_a_choice(model: WanTransformer, tmp_path: Path) -> None:
    save_file(original(model), tmp_path / "m.safetensors")
    convert.convert(tmp_path / "m.safetensors", tmp_path / "out", dtype=torch.bfloat16)
    found = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert same(found, {k: v.bfloat16() for k, v in model.state_dict().items()})
    save_file(original(model) | {"head.head.bias": torch.full((64,), 1e6)}, tmp_path / "m.safetensors")
    with pytest.raises(WeightsError, match=r"proj_out\.bias overflows in float16"):
        convert.convert(tmp_path / "m.safetensors", tmp_path / "half", dtype=torch.float16)


# -------------------------------------------------------------------------------------------------------------- LoRA


def adapter(model: WanTransformer, rank: int = 3, prefix: str = "base_model.model.") -> dict[str, Tensor]:
    """A PEFT adapter over all linears of the layers, named as LongLive's: after Wan's modules."""
    generator = torch.Generator().manual_seed(7)
    found: dict[str, Tensor] = {}
    for name, weight in original(model).items():
        if name.startswith("blocks.") and name.endswith(".weight") and weight.ndim == 2:
            out, n_in = weight.shape
            module = prefix + name.removesuffix(".weight")
            found[f"{module}.lora_A.weight"] = torch.randn(rank, n_in, generator=generator)
            found[f"{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    return found


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (6.0, 2.0)])
def test_a_lora_is_merged_as_computed_by_hand(
    alpha: float | None, scale: float, model: WanTransformer, tmp_path: Path
) -> None:
    pairs = adapter(model)
    torch.save({"generator": prefixed("model.", original(model))}, tmp_path / "base.pt")
    torch.save({"generator_lora": pairs, "critic_lora": {}, "step": 3000}, tmp_path / "lora.pt")
    done = convert.convert(
        tmp_path / "base.pt", tmp_path / "out", lora=tmp_path / "lora.pt", lora_alpha=alpha
    )
    merged = loaded(tmp_path / "out").state_dict()
    changed = 0
    for name, before in model.state_dict().items():
        key = "base_model.model." + original_name(name).removesuffix(".weight")
        if f"{key}.lora_A.weight" in pairs:
            a, b = pairs[f"{key}.lora_A.weight"], pairs[f"{key}.lora_B.weight"]
            by_hand = before.clone()
            for i in range(len(b)):
                by_hand[i] += scale * (b[i][:, None] * a).sum(0)
            torch.testing.assert_close(merged[name], by_hand)
            changed += 1
        else:
            assert torch.equal(merged[name], before)
    assert changed == 2 * 10  # q, k, v, o twice and the two linears of the FFN, in each layer
    assert f"merged the adapter lora.pt into 20 linears, scale {scale:g}" in done.notes
    assert done.manifest.provenance["lora_scale"] == scale


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p | {"blocks.0.self_attn.q.weight": torch.zeros(2)}, "neither a lora_A nor a lora_B"),
        (
            lambda p: p | {"base_model.model.blocks.9.ffn.0.lora_A.weight": torch.zeros(3, 2)},
            "nearest name is",
        ),
        (lambda p: {k: v for k, v in p.items() if k != next(iter(p))}, "has a lora_B alone"),
        (lambda p: p | {next(iter(p)): torch.zeros(3, 5)}, "do not fit blocks.0"),
        (lambda p: p | {next(iter(p)): torch.full((3, 128), torch.nan)}, "NaN"),
        (lambda p: {}, "is empty"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
    model: WanTransformer,
    tmp_path: Path,
) -> None:
    save_file(original(model), tmp_path / "m.safetensors")
    save_file(change(adapter(model)), tmp_path / "lora.safetensors")
    with pytest.raises(WeightsError, match=message):
        convert.convert(tmp_path / "m.safetensors", tmp_path / "out", lora=tmp_path / "lora.safetensors")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------- whole packages


def test_a_package_on_a_base_makes_a_video(
    model: WanTransformer, tmp_path: Path, run_command: Callable[..., Any]
) -> None:
    """The demo's VAE, encoder and tokenizer under a converted transformer; its compressor is not taken over."""
    save_file(original(model), tmp_path / "m.safetensors")
    done = run_command(
        *("models", "convert", "m.safetensors", "-o", "mine", "--base", "demo"),
        *("--kind", "student", "--license", "MIT", "--name", "my student"),
    )
    assert (done.code, done.out.strip()) == (0, "mine")
    assert "a few-step student: 4 steps" in done.err
    assert "incomplete" not in done.err
    manifest = registry.read_manifest(tmp_path / "mine")
    assert set(manifest.parts) == {"transformer", "vae", "text_encoder", "tokenizer"}
    assert (manifest.name, manifest.license, manifest.cache.frames_per_block) == ("my student", "MIT", 3)
    made = run_command("generate", "a red circle", "--model", "./mine", "--seconds", "0.1", "-o", "v.mp4")
    assert made.code == 0, made.err
    assert (tmp_path / "v.mp4").stat().st_size > 1000


def test_four_frames_a_block_are_recorded_with_their_slots(model: WanTransformer, tmp_path: Path) -> None:
    save_file(original(model), tmp_path / "m.safetensors")
    made = convert.convert(tmp_path / "m.safetensors", tmp_path / "four", frames_per_block=4).manifest
    assert (made.cache.frames_per_block, made.cache.mid_span, made.trained_frames) == (4, "4", 20)
    made = convert.convert(tmp_path / "m.safetensors", tmp_path / "three").manifest
    assert (made.cache.frames_per_block, made.cache.mid_span, made.trained_frames) == (3, "fit", 21)


def test_a_base_of_another_family_is_refused(tmp_path: Path) -> None:
    for changes, message in (
        ({"text_dim": 32}, "takes text of width 32"),
        ({"in_channels": 4, "out_channels": 4}, "takes 4 latent channels"),
    ):
        save_file(original(tiny(**changes)), tmp_path / "m.safetensors")
        with pytest.raises(WeightsError, match=message):
            convert.convert(tmp_path / "m.safetensors", tmp_path / "out", base="demo")


# ------------------------------------------------------------------------------------------------- what can be wrong


def _without(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


WRONG: list[tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = [
    (lambda t: _without(t, "blocks.1.ffn.2.bias"), r"lacks blocks\.1\.ffn\.2\.bias"),
    (lambda t: _without(t, "patch_embedding.weight"), r"lacks patch_embedding\.weight \(the nearest name is"),
    (
        lambda t: t | {"blocks.0.self_attn.qq.weight": torch.zeros(1)},
        r"unknown blocks\.0\.self_attn\.qq\.weight \(the nearest name is blocks\.0\.self_attn\.q\.weight",
    ),
    (
        lambda t: t | {"blocks.0.cross_attn.k_img.weight": torch.zeros(1)},
        r"unknown blocks\.0\.cross_attn\.k_img\.weight",
    ),
    (
        lambda t: t | {"blocks.1.self_attn.q.weight": torch.zeros(3, 128)},
        r"wrong shape: blocks\.1\.self_attn\.q\.weight \[3, 128\] instead of \[128, 128\]",
    ),
    (lambda t: t | {"head.head.bias": torch.full((64,), torch.nan)}, "holds NaN or infinity"),
    (lambda t: t | {"model.head.head.bias": torch.zeros(64)}, "two tensors for head.head.bias"),
    (lambda t: {"layers.0.weight": torch.zeros(2)}, "lacks patch_embedding.weight"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_weights_are_named_and_nothing_is_written(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
    model: WanTransformer,
    tmp_path: Path,
) -> None:
    save_file(change(original(model)), tmp_path / "m.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("kept")
    with pytest.raises(WeightsError, match=message) as caught:
        convert.convert(tmp_path / "m.safetensors", tmp_path / "out", overwrite=True)
    assert caught.value.exit_code == 7
    assert caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors", "out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["note"]


def test_a_layer_that_is_missing_at_the_end_is_noticed(tmp_path: Path) -> None:
    """A family is known by its width, so 29 of 30 layers are not taken for a smaller model."""
    facts = catalog.get("wan2.1-1.3b")
    with torch.device("meta"):
        whole = WanTransformer(TransformerConfig(num_layers=29, ffn_dim=facts.ffn_dim))
    names = {original_name(name): tensor for name, tensor in whole.state_dict().items()}
    config = convert._config(Path("x.pt"), names, {}, {})
    with pytest.raises(WeightsError, match=r"lacks blocks\.29\."):
        convert._named(Path("x.pt"), names, config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
    ],
)
@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
def test_what_is_no_checkpoint_at_all_is_told(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        convert.convert(tmp_path / name, tmp_path / "out")


def test_a_missing_source_and_an_existing_output_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        convert.convert(tmp_path / "m.pt", tmp_path / "out")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=r"neither a \.safetensors"):
        convert.convert(tmp_path / "m.gguf", tmp_path / "out")
    with pytest.raises(UsageError, match="exists"):
        convert.convert(tmp_path / "m.gguf", tmp_path)
    with pytest.raises(UsageError, match="needs --lora"):
        convert.convert(tmp_path / "m.gguf", tmp_path / "out", lora_alpha=2)


def test_a_full_disk_is_noticed_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.pt").write_bytes(b"x" * 100)
    monkeypatch.setattr("shutil.disk_usage", lambda _: argparse.Namespace(free=199))
    with pytest.raises(DiskFullError, match="are needed in"):
        convert.convert(tmp_path / "m.pt", tmp_path / "out")


# ------------------------------------------------------------------------------------------- pickles, not to be run


class _Touch:
    """Unpickled without protection, this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def _read(path: Path) -> Any:
    return unpickle.read_group(path, ("generator", ""))


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_program_in_a_checkpoint_is_named_and_not_run(
    new_format: bool, protocol: int, tmp_path: Path
) -> None:
    content = {"generator": {"model.a": torch.zeros(2)}, "bait": _Touch(tmp_path / "touched")}
    path = tmp_path / "evil.pt"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new_format)
    with pytest.raises(WeightsError, match=r"'bait' refers to posix\.system; nothing was run"):
        _read(path)
    assert not (tmp_path / "touched").exists()


def test_the_loader_itself_does_not_run_programs_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the look at the opcodes fooled, weights_only would still refuse."""
    torch.save({"generator": {}, "bait": _Touch(tmp_path / "touched")}, tmp_path / "evil.pt")
    monkeypatch.setattr(unpickle, "_check_names", lambda _: None)
    with pytest.raises(WeightsError, match="cannot be read as a checkpoint") as caught:
        _read(tmp_path / "evil.pt")
    assert "weights_only" not in caught.value.message  # torch's message advises to switch it off
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"generator": {"a": torch.zeros(2)}, "args": argparse.Namespace()},
            "'args' refers to argparse.Name",
        ),
        ({"generator": {"a": torch.zeros(2), "b": 3}}, r"generator\['b'\] is of type int"),
        ({"generator": {"a": {"b": torch.zeros(2)}}}, r"generator\['a'\] is of type dict"),
        ({"generator": {3: torch.zeros(2)}}, r"generator\[3\] is of type Tensor"),
        ({"generator": {"a": torch.zeros(2, dtype=torch.int64)}}, r"generator\['a'\] is a tensor of int64"),
        ({"generator": {"a": torch.zeros(1).expand(10**9)}}, r"claims 4,000,000,000 bytes and has 4"),
        ({"generator": {"a": torch.zeros(2).to_sparse()}}, "refers to torch._utils._rebuild_sparse_tensor"),
        ({"generator": {}}, "generator is empty"),
        ({"critic": {"a": torch.zeros(2)}, "step": 3}, r"has no generator; it holds critic \(dict\), step"),
        ([torch.zeros(2)], "holds a list"),
    ],
)
def test_anything_but_plain_tensors_is_refused_by_name(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(WeightsError, match=message):
        _read(tmp_path / "m.pt")


def _zip(entries: dict[str, bytes], compression: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_saved({"generator": {"a": torch.zeros(999)}})[:-300], "truncated: the end of its archive"),
        (_zip({"m/data.pkl": b"0" * 10**7}, zipfile.ZIP_DEFLATED), "its entry m/data.pkl is compressed"),
        (_zip({"m/data.pkl": b"\x80\x02}"}, zipfile.ZIP_STORED), "cannot be read as a checkpoint"),
        (_zip({"m/other": b"1"}, zipfile.ZIP_STORED), "cannot be read as a checkpoint"),
        (pickle.dumps({"a": 1}, protocol=2)[:-4], "cannot be read as a checkpoint"),
        (b"\x80\x02]q\x00.", "cannot be read as a checkpoint"),
        (b"", "cannot be read as a checkpoint"),
        (b"no pickle", "cannot be read as a checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        _read(tmp_path / "m.pt")
    assert str(tmp_path / "m.pt") in caught.value.message


def _claims(size: int) -> bytes:
    """A checkpoint of the old format, a few hundred bytes, with a tensor of `size` floats."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", size, None) if type(obj) is Storage else None

    class Claim:
        def __reduce__(self) -> tuple[Any, ...]:
            rebuild = torch._utils._rebuild_tensor_v2
            return rebuild, (Storage(), 0, (size,), (1,), False, collections.OrderedDict())

    buffer = io.BytesIO()
    for header in (
        torch.serialization.MAGIC_NUMBER,
        torch.serialization.PROTOCOL_VERSION,
        {"little_endian": 1},
    ):
        pickle.dump(header, buffer, protocol=2)
    Pickler(buffer, protocol=2).dump({"generator": {"a": Claim()}})
    pickle.dump(["0"], buffer, protocol=2)
    return buffer.getvalue()


@pytest.mark.skipif(sys.platform != "linux", reason="the address space is bounded on Linux")
def test_the_subprocess_has_a_bounded_memory_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "bomb.pt").write_bytes(_claims(10**9))
    with pytest.raises(WeightsError, match="more than 4 times its size in memory"):
        convert.convert(tmp_path / "bomb.pt", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bomb.pt"]


def test_the_subprocess_converts(model: WanTransformer, tmp_path: Path) -> None:
    torch.save(FORMATS["fsdp"](original(model)), tmp_path / "student.pt")
    convert.convert(tmp_path / "student.pt", tmp_path / "out")
    assert same(dict(loaded(tmp_path / "out").state_dict()), dict(model.state_dict()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "student.pt"]


def test_the_sealed_process_opens_no_socket_starts_no_program_and_writes_no_file(tmp_path: Path) -> None:
    code = f"""
import os, socket, subprocess
from pathlib import Path
from packforcing_cli import unpickle
unpickle._seal()
place = Path({str(tmp_path)!r})
def tried():
    yield lambda: socket.create_connection(("127.0.0.1", 9))
    yield lambda: socket.socket()
    yield lambda: os.system("true")
    yield lambda: subprocess.run(["true"])
    yield lambda: os.fork()
    yield lambda: (place / "a").write_text("x")
    yield lambda: os.open(place / "b", os.O_CREAT | os.O_WRONLY)
    yield lambda: open(place / "given", "r+")
    yield lambda: (place / "given").unlink()
    yield lambda: (place / "given").rename(place / "other")
for i, attempt in enumerate(tried()):
    try:
        attempt()
    except PermissionError as e:
        assert "a checkpoint may not" in str(e)
    else:
        raise SystemExit(f"attempt {{i}} was allowed")
assert (place / "given").read_text() == "kept"
"""
    (tmp_path / "given").write_text("kept")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_torch_load_is_called_in_one_place_and_with_weights_only() -> None:
    calls = {
        path.name: re.findall(r"torch\.load\([^)]*\)|pickle\.load\w*\(|Unpickler\(", path.read_text("utf-8"))
        for path in Path(packforcing_cli.__file__).parent.rglob("*.py")
    }
    found = {name: texts for name, texts in calls.items() if texts}
    assert list(found) == ["unpickle.py"]
    assert [("weights_only=True" in text) for text in found["unpickle.py"]] == [True]


def test_the_socket_module_of_this_process_still_works() -> None:
    with socket.socket() as unsealed:
        assert unsealed.fileno() > 0
