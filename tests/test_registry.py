from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from packforcing_cli import registry, text, weights
from packforcing_cli.compressor import Compressor, CompressorConfig
from packforcing_cli.errors import (
    DiskFullError,
    EnvironmentProblem,
    PackforcingError,
    UsageError,
    WeightsError,
)
from packforcing_cli.quiet import known_import_noise_dropped
from packforcing_cli.registry import Manifest, load_model, read_manifest, verify_package, write_package
from packforcing_cli.training.demo_text import build_demo_tokenizer, tiny_umt5_config
from packforcing_cli.transformer import TransformerConfig, WanTransformer
from packforcing_cli.vae import TinyAutoencoder, TinyAutoencoderConfig, TinyCodec, WanCodec


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "name": "tiny",
        "version": "0.1",
        "title": "Random weights",
        "license": "Apache-2.0",
        "size": (128, 64),
        "fps": 16,
        "trained_frames": 28,
        "text_length": 12,
        "cache": {"frames_per_block": 4},
        "schedule": {"kind": "euler", "steps": 8, "shift": 5.0, "guidance": 3.0},
        "codec": {
            "kind": "tiny",
            "latent_channels": 16,
            "spatial_stride": 8,
            "temporal_stride": 4,
            "pixel_range": (0.0, 1.0),
        },
        "vocabulary": ("red", "circle"),
        "provenance": {"recipe": "none", "figures": {"colour": 0.95}},
    }
    return Manifest.model_validate(values | changes)


def modules() -> dict[str, Any]:
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=2, num_attention_heads=2, attention_head_dim=16, ffn_dim=48, text_dim=64, freq_dim=32
    )
    return {
        "transformer": WanTransformer(config),
        "compressor": Compressor(CompressorConfig(dim=config.dim, widths=(4, 8, 8, 16))),
        "vae": TinyAutoencoder(TinyAutoencoderConfig.demo()),
        "text_encoder": text.build_encoder(tiny_umt5_config().to_dict()),
    }


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return modules()


@pytest.fixture(scope="module")
def pristine(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("registry")
    build_demo_tokenizer(root / "tokenizer")
    write_package(root / "tiny", manifest(), tokenizer_dir=root / "tokenizer", **parts)
    return root / "tiny"


@pytest.fixture
def package(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "tiny"))


@pytest.fixture
def no_tensor_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a tensor was read before the package was verified")

    monkeypatch.setattr(weights, "safe_open", refuse)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# ----------------------------------------------------------------------------------------------- round trip


def test_a_written_package_loads_bit_for_bit(pristine: Path, parts: dict[str, Any]) -> None:
    model = load_model(pristine, device="cpu")
    assert model.manifest == read_manifest(pristine)
    assert (model.name, model.device.type, model.dtype) == ("tiny", "cpu", torch.float32)
    assert same_weights(model.transformer, parts["transformer"])
    assert model.transformer.config == parts["transformer"].config
    assert model.compressor is not None
    assert same_weights(model.compressor, parts["compressor"])
    assert isinstance(model.codec, TinyCodec)
    stored = weights.read_tensors(pristine / "vae", device=torch.device("cpu"))
    assert all(torch.equal(stored[k], v) for k, v in parts["vae"].state_dict().items())
    encoder = model.load_text_encoder()
    assert encoder.max_length == 12
    assert same_weights(encoder.model, parts["text_encoder"])
    assert encoder.encode("a red circle").shape == (1, 12, 64)


def test_a_loaded_codec_decodes_as_the_one_that_was_written(pristine: Path, parts: dict[str, Any]) -> None:
    latents = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    codec = load_model(pristine, device="cpu").codec
    expected = TinyCodec(parts["vae"].eval()).decoder().decode(latents)
    assert torch.equal(codec.decoder().decode(latents), expected)


def test_loaded_weights_are_frozen_and_off_the_meta_device(pristine: Path) -> None:
    model = load_model(pristine, device="cpu", dtype="bf16")
    assert model.compressor is not None
    for module in (model.transformer, model.compressor, model.load_text_encoder().model):
        assert not module.training
        for tensor in (*module.parameters(), *module.buffers()):
            assert tensor.device.type == "cpu"
            assert not tensor.requires_grad
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def test_weights_are_stored_in_the_dtype_asked_for(parts: dict[str, Any], tmp_path: Path) -> None:
    write_package(tmp_path / "half", manifest(), dtype=torch.float16, **parts)
    for path in (tmp_path / "half").rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            assert {file.get_tensor(name).dtype for name in names} == {torch.float16}
    assert next(parts["transformer"].parameters()).dtype == torch.float32


def test_the_manifest_lists_every_file_of_every_part(pristine: Path) -> None:
    written = read_manifest(pristine)
    on_disk = {p.relative_to(pristine).as_posix() for p in pristine.rglob("*") if p.is_file()}
    assert set(written.files) == on_disk - {"packforcing.json"}
    for name, record in written.files.items():
        content = (pristine / name).read_bytes()
        assert (record.size, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    values = json.loads((pristine / "packforcing.json").read_text())
    assert values["schema"] == 1
    assert values["cache"]["mid_span"] == "fit"
    assert set(written.parts) == {"transformer", "compressor", "vae", "text_encoder", "tokenizer"}


def test_every_part_says_which_class_it_is(pristine: Path) -> None:
    names = {p.parent.name: json.loads(p.read_text())["_class_name"] for p in pristine.glob("*/config.json")}
    assert names == {
        "transformer": "WanTransformer3DModel",
        "compressor": "Compressor",
        "vae": "TinyAutoencoder",
        "text_encoder": "UMT5EncoderModel",
    }


def test_a_transformer_written_by_diffusers_loads_unchanged(tmp_path: Path) -> None:
    with known_import_noise_dropped():
        from diffusers import WanTransformer3DModel
    torch.manual_seed(1)
    theirs = WanTransformer3DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=16, ffn_dim=48, text_dim=64, freq_dim=32
    )
    theirs.save_pretrained(tmp_path)
    ours = registry.load_transformer(tmp_path, device=torch.device("cpu"), dtype=torch.float32)
    assert same_weights(ours, theirs)


def test_the_wan_vae_round_trips(tmp_path: Path) -> None:
    with known_import_noise_dropped():
        from diffusers import AutoencoderKLWan
    torch.manual_seed(1)
    vae = AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    write_package(tmp_path / "ours", manifest(), vae=vae)
    vae.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "ours" / "vae", tmp_path / "theirs"):
        codec = registry.load_codec(folder, device=torch.device("cpu"), dtype=torch.float32)
        assert isinstance(codec, WanCodec)
        stored = weights.read_tensors(folder, device=torch.device("cpu"))
        assert all(torch.equal(stored[k], v) for k, v in vae.state_dict().items())


def test_a_package_without_compressor_loads(parts: dict[str, Any], pristine: Path, tmp_path: Path) -> None:
    chosen = {k: v for k, v in parts.items() if k != "compressor"}
    write_package(tmp_path / "p", manifest(), tokenizer_dir=pristine / "tokenizer", **chosen)
    assert load_model(tmp_path / "p", device="cpu").compressor is None


def test_compressor_weights_of_another_place_take_the_place_of_the_models_own(
    parts: dict[str, Any], pristine: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    other = Compressor(CompressorConfig(dim=32, widths=(4, 8, 8, 16), branches="hr"))
    write_package(tmp_path / "other", manifest(), compressor=other, base=pristine)
    own = load_model(pristine, device="cpu")
    for place in (tmp_path / "other", tmp_path / "other" / "compressor"):
        model = load_model(pristine, device="cpu", compressor=str(place))
        assert model.compressor is not None
        assert same_weights(model.compressor, other)
        assert model.compressor.config.branches == "hr"
        assert model.hashes["compressor"] == read_manifest(tmp_path / "other").part_hash("compressor")
        assert model.hashes["compressor"] != own.hashes["compressor"]
        assert {k: v for k, v in model.hashes.items() if k != "compressor"} == {
            k: v for k, v in own.hashes.items() if k != "compressor"
        }


def test_compressor_weights_of_another_place_are_checked(
    parts: dict[str, Any], pristine: Path, tmp_path: Path, no_tensor_is_read: None
) -> None:
    bare = {k: v for k, v in parts.items() if k != "compressor"}
    write_package(tmp_path / "bare", manifest(), tokenizer_dir=pristine / "tokenizer", **bare)
    with pytest.raises(WeightsError, match="has no trained compressor"):
        load_model(pristine, device="cpu", compressor=str(tmp_path / "bare"))
    write_package(tmp_path / "other", manifest(), compressor=parts["compressor"], base=pristine)
    weights_file = tmp_path / "other" / "compressor" / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-1] + b"x")
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged"):
        load_model(pristine, device="cpu", compressor=str(tmp_path / "other"))


def test_a_compressor_for_another_width_is_refused(pristine: Path, tmp_path: Path) -> None:
    wide = Compressor(CompressorConfig(dim=48, widths=(4, 8, 8, 16)))
    write_package(tmp_path / "wide", manifest(), compressor=wide, base=pristine)
    with pytest.raises(WeightsError, match=r"is for a model of width 48 .* this one has width 32"):
        load_model(pristine, device="cpu", compressor=str(tmp_path / "wide"))


def test_a_compressor_of_the_low_resolution_branch_alone_has_no_weights(
    parts: dict[str, Any], pristine: Path, tmp_path: Path
) -> None:
    compressor = Compressor(CompressorConfig(dim=32, branches="lr"))
    write_package(tmp_path / "p", manifest(), compressor=compressor, base=pristine)
    loaded = load_model(tmp_path / "p", device="cpu").compressor
    assert loaded is not None
    assert loaded.config.branches == "lr"


def test_an_unfinished_package_says_what_it_lacks(parts: dict[str, Any], tmp_path: Path) -> None:
    write_package(tmp_path / "p", manifest(), vae=parts["vae"])
    with pytest.raises(WeightsError, match="no transformer, no text_encoder, no tokenizer"):
        load_model(tmp_path / "p")
    codec = registry.load_codec(tmp_path / "p" / "vae", device=torch.device("cpu"), dtype=torch.float32)
    assert codec.facts.latent_channels == 16


# --------------------------------------------------------------------------------------------------- damage


def _weights_of(package: Path) -> Path:
    return package / "transformer" / "diffusion_pytorch_model.safetensors"


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n")


def _page(path: Path) -> None:
    path.write_text("\n<!DOCTYPE html><html><title>503</title></html>")


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (_flip, "is damaged: its sha256"),
    (lambda p: p.write_bytes(p.read_bytes()[:-10]), "is truncated"),
    (lambda p: p.write_bytes(p.read_bytes() + b"0"), "instead of"),
    (lambda p: p.write_bytes(b""), "is truncated: 0 of"),
    (_pointer, "Git LFS pointer"),
    (_page, "is a web page"),
    (Path.unlink, "is missing"),
    (lambda p: shutil.copy(p, p.with_name("model-2.safetensors")), "is not listed"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
@pytest.mark.usefixtures("no_tensor_is_read")
def test_a_damaged_file_is_refused_before_any_tensor_is_read(
    package: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(_weights_of(package))
    with pytest.raises(WeightsError, match=message) as caught:
        load_model(package, device="cpu")
    assert caught.value.exit_code == 7
    assert "transformer" in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["compressor/config.json", "tokenizer/tokenizer.json", "vae/config.json"])
def test_configs_and_the_tokenizer_are_verified_too(package: Path, name: str) -> None:
    path = package / name
    path.write_text(path.read_text().replace("1", "2", 1))
    with pytest.raises(WeightsError, match="is damaged"):
        verify_package(package, read_manifest(package))


def _edit(package: Path, **changes: Any) -> None:
    path = package / "packforcing.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "has schema 2; this program reads up to 1"),
        ({"schema": None}, "no schema number"),
        ({"fpss": 16}, "unknown key fpss; did you mean fps"),
        ({"fps": "many"}, "fps: "),
        ({"cache": {"frames_per_block": 4, "topk": 3}}, "unknown key cache.topk; did you mean top_k"),
        ({"cache": {"frames_per_block": 4, "mid_span": "-1"}}, "mid_span"),
        ({"parts": {"transformer": "../elsewhere"}}, "not a path inside the package"),
        ({"files": {"/etc/passwd": {"sha256": "0" * 64, "size": 1}}}, "not a path inside the package"),
        ({"files": {}}, "lists no file of its part"),
    ],
)
@pytest.mark.usefixtures("no_tensor_is_read")
def test_a_bad_manifest_is_refused(package: Path, changes: dict[str, Any], message: str) -> None:
    _edit(package, **changes)
    with pytest.raises(WeightsError, match=message):
        load_model(package, device="cpu")


def test_a_newer_schema_names_the_upgrade(package: Path) -> None:
    _edit(package, schema=99, something_new=1)
    with pytest.raises(WeightsError) as caught:
        load_model(package)
    assert caught.value.hint == "Install packforcing again from a fresh checkout."


def test_a_manifest_that_is_no_json_and_a_folder_without_one_are_refused(
    package: Path, tmp_path: Path
) -> None:
    (package / "packforcing.json").write_text("{")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_model(package)
    with pytest.raises(WeightsError, match="is not a model package"):
        load_model(tmp_path)


def _reseal(package: Path) -> None:
    """Make the manifest agree with files that were edited."""
    files = {
        name: {
            "sha256": hashlib.sha256((package / name).read_bytes()).hexdigest(),
            "size": (package / name).stat().st_size,
        }
        for name in json.loads((package / "packforcing.json").read_text())["files"]
    }
    _edit(package, files=files)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("transformer", {"_class_name": "FluxTransformer2DModel"}, "holds FluxTransformer2DModel; supported"),
        ("transformer", {"num_layers": 3}, "does not match WanTransformer: it lacks blocks.2"),
        ("transformer", {"num_layers": 1}, "it has unknown blocks.1"),
        ("transformer", {"ffn_dim": 64}, "wrong shape"),
        ("vae", {"latent_chanels": 3}, "did you mean 'latent_channels'"),
        ("compressor", {"dim": 64}, "wrong shape"),
    ],
)
def test_a_config_that_does_not_fit_its_weights_is_refused(
    package: Path, part: str, change: dict[str, Any], message: str
) -> None:
    path = package / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    _reseal(package)
    with pytest.raises(WeightsError, match=message):
        load_model(package, device="cpu")


def test_parts_of_different_models_are_refused(pristine: Path, tmp_path: Path) -> None:
    compressor = Compressor(CompressorConfig(dim=48, widths=(4, 8, 8, 16)))
    write_package(tmp_path / "p", manifest(), compressor=compressor, base=pristine)
    with pytest.raises(WeightsError, match="makes tokens of width 48, its transformer has 32"):
        load_model(tmp_path / "p", device="cpu")


def test_a_vae_that_is_not_what_the_manifest_says_is_refused(pristine: Path, tmp_path: Path) -> None:
    record = manifest().codec.model_dump() | {"encode_lookahead": 3}
    write_package(tmp_path / "p", manifest(codec=record), base=pristine)
    with pytest.raises(WeightsError, match="encode_lookahead 0 instead of 3"):
        load_model(tmp_path / "p", device="cpu")
    assert registry.CodecFactsRecord.of(load_model(pristine, device="cpu").codec) == manifest().codec


def test_a_header_that_is_not_safetensors_is_refused(package: Path) -> None:
    _weights_of(package).write_bytes(b"\xff" * 64)
    _reseal(package)
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        load_model(package, device="cpu")


# -------------------------------------------------------------------------------------------------- writing


def test_an_existing_package_is_replaced_only_when_allowed(pristine: Path, package: Path) -> None:
    before = {p: p.read_bytes() for p in package.rglob("*") if p.is_file()}
    with pytest.raises(UsageError, match="exists"):
        write_package(package, manifest(), **modules())
    assert {p: p.read_bytes() for p in package.rglob("*") if p.is_file()} == before
    (package / "README.md").write_text("kept")
    write_package(package, manifest(version="0.2"), base=package, overwrite=True)
    assert read_manifest(package).version == "0.2"
    assert (package / "README.md").read_text() == "kept"
    assert read_manifest(package).files == read_manifest(pristine).files
    assert load_model(package, device="cpu").manifest.version == "0.2"
    assert [p.name for p in package.parent.iterdir()] == ["tiny"]


def test_a_tokenizer_inside_the_replaced_package_survives(parts: dict[str, Any], package: Path) -> None:
    write_package(package, manifest(), tokenizer_dir=package / "tokenizer", overwrite=True, **parts)
    assert load_model(package, device="cpu").load_text_encoder().encode("a").shape == (1, 12, 64)


@pytest.mark.parametrize(("code", "error"), [(28, DiskFullError), (5, OSError)])
def test_a_failed_write_leaves_the_old_package_and_nothing_else(
    package: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception]
) -> None:
    before = {p: p.read_bytes() for p in package.rglob("*") if p.is_file()}

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, "cannot write")

    monkeypatch.setattr(registry, "_record", fail)
    with pytest.raises(error):
        write_package(package, manifest(), overwrite=True, **modules())
    assert {p: p.read_bytes() for p in package.rglob("*") if p.is_file()} == before
    assert [p.name for p in package.parent.iterdir()] == ["tiny"]


# -------------------------------------------------------------------------------------- names, devices, VAE


def test_a_family_is_refused_with_an_installable_name() -> None:
    with pytest.raises(UsageError, match="family of models") as caught:
        load_model("wan2.1-1.3b")
    assert "--model demo" in caught.value.hint
    assert caught.value.exit_code == 2


def test_an_unknown_name_and_a_missing_folder_are_usage_errors(tmp_path: Path) -> None:
    for name in ("dmo", "./nothing", str(tmp_path / "nothing"), tmp_path / "nothing"):
        with pytest.raises(UsageError):
            load_model(name)


def test_demo_is_the_folder_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert registry.find_package("demo") == Path(registry.__file__).parent / "demo"
    assert registry.find_package("./demo") == Path("demo")


def test_the_vae_option_takes_the_own_kind_or_a_folder(pristine: Path, tmp_path: Path) -> None:
    assert isinstance(load_model(pristine, device="cpu", vae="tiny").codec, TinyCodec)
    with pytest.raises(UsageError, match="there is no 'wan'"):
        load_model(pristine, device="cpu", vae="wan")
    torch.manual_seed(5)
    other = TinyAutoencoder(TinyAutoencoderConfig.demo())
    write_package(tmp_path / "other", manifest(), vae=other)
    latents = torch.zeros(1, 16, 1, 4, 4)
    codec = load_model(pristine, device="cpu", vae=tmp_path / "other" / "vae").codec
    assert torch.equal(codec.decoder().decode(latents), TinyCodec(other.eval()).decoder().decode(latents))


class FakeGpus:
    """Stands in for torch.cuda with GPUs of the given free memory."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, free: list[int], capability: tuple[int, int] = (9, 0)
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(free))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (free[i], 10**12))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)


def test_auto_takes_the_gpu_with_most_free_memory_or_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpus(monkeypatch, [1, 5, 3])
    assert registry.resolve_device("auto") == registry.resolve_device("cuda") == torch.device("cuda", 1)
    assert registry.resolve_device("cuda:2") == torch.device("cuda", 2)
    assert (
        registry.resolve_device(torch.device("cpu")) == registry.resolve_device("cpu") == torch.device("cpu")
    )
    FakeGpus(monkeypatch, [])
    assert registry.resolve_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    ("free", "device", "message", "code"),
    [
        ([], "cuda", "sees no CUDA GPU", 4),
        ([], "cuda:0", "sees no CUDA GPU", 4),
        ([1], "cuda:1", "there is 1 CUDA GPU", 4),
        ([1, 1], "cuda:2", "there are 2 CUDA GPUs", 4),
        ([1], "gpu", "unknown device", 2),
        ([1], "cuda:x", "unknown device", 2),
        ([1], "cuda:-1", "unknown device", 2),
        ([1], "cpu:0", "unknown device", 2),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, free: list[int], device: str, message: str, code: int
) -> None:
    FakeGpus(monkeypatch, free)
    with pytest.raises(PackforcingError, match=message) as caught:
        registry.resolve_device(device)
    assert caught.value.exit_code == code
    assert isinstance(caught.value, EnvironmentProblem | UsageError)


def test_the_gpu_that_is_taken_becomes_the_current_one(
    pristine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything runs on it: libraries that are not told a device work on the current one."""
    FakeGpus(monkeypatch, [1, 5, 3])
    said: list[object] = []

    def choose(asked: str, *, device: torch.device, **_: object) -> None:
        said.append(f"attention on {device}")
        raise EnvironmentProblem("no further")

    monkeypatch.setattr(torch.cuda, "set_device", said.append)
    monkeypatch.setattr(registry.kernels, "choose", choose)
    for device in ("auto", "cpu"):
        with pytest.raises(EnvironmentProblem, match="no further"):
            registry.open_model(pristine, device=device)
    assert said == [torch.device("cuda", 1), "attention on cuda:1", "attention on cpu"]


def test_auto_dtype_is_bf16_on_a_gpu_that_has_it_and_fp32_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    FakeGpus(monkeypatch, [1])
    assert registry.resolve_dtype("auto", gpu) == torch.bfloat16
    assert registry.resolve_dtype("auto", cpu) == torch.float32
    FakeGpus(monkeypatch, [1], capability=(7, 5))
    assert registry.resolve_dtype("auto", gpu) == torch.float32
    assert (
        registry.resolve_dtype("bf16", cpu) == registry.resolve_dtype(torch.bfloat16, cpu) == torch.bfloat16
    )
    with pytest.raises(UsageError, match="unknown dtype"):
        registry.resolve_dtype("int8", cpu)
