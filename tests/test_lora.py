# ruff: noqa: F811  (fixtures of another file are imported and then are arguments)
"""Low-rank adapters: merged equals applied, what is refused, and the recipe that makes them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_finetune import encoded, losses, package, recipe, train  # noqa: F401 (fixtures)
from torch import Tensor

from packforcing_cli import lora, registry
from packforcing_cli.errors import UsageError, WeightsError
from packforcing_cli.rope import grid_positions
from packforcing_cli.training import finetune
from packforcing_cli.training.data import EncodedData
from packforcing_cli.training.recipe_kinds import FinetuneLora
from packforcing_cli.transformer import AloneContext, WanTransformer

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _few_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "EVALUATED_ITEMS", 1)


@pytest.fixture(scope="module")
def adapters(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of rank 3 of two linears, random."""
    folder = tmp_path_factory.mktemp("lora") / "adapters"
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, rows, cols in (("blocks.0.attn1.to_q", 24, 24), ("blocks.1.ffn.net.2", 24, 32)):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(3, cols, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, 3, generator=generator)
    write(folder, tensors)
    return folder


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / lora.WEIGHTS)
    (folder / lora.CONFIG).write_text(json.dumps({"r": 3, "lora_alpha": 6.0, **config}), "utf-8")


def velocity(transformer: WanTransformer) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    text = transformer.embed_text(torch.randn(1, 12, 64, generator=generator))
    latents = torch.randn(1, 16, 4, 8, 16, generator=generator)
    with torch.no_grad():
        return transformer(
            latents, torch.full((1, 4), 500.0), text, AloneContext(grid_positions(0.0, 4, 4, 8))
        )


def test_a_merged_weight_is_the_formula(package: Path, adapters: Path) -> None:
    plain = registry.load_model(package, device="cpu").transformer.state_dict()
    merged = registry.load_model(package, device="cpu", loras=[f"{adapters}:0.5"])
    given = load_file(adapters / lora.WEIGHTS)
    for name, weight in merged.transformer.state_dict().items():
        key = "base_model.model." + name.removesuffix(".weight")
        expected = plain[name]
        if f"{key}.lora_A.weight" in given:
            expected = expected + 0.5 * 6 / 3 * given[f"{key}.lora_B.weight"] @ given[f"{key}.lora_A.weight"]
            assert not torch.equal(expected, plain[name])
        torch.testing.assert_close(weight, expected)
    assert merged.hashes["lora 1"].endswith(" x 0.5")  # a run with another LoRA is another run


def test_merged_equals_applied_by_peft(
    package: Path,
    encoded: EncodedData,
    tmp_path: Path,
) -> None:
    pytest.importorskip("peft")
    chosen = recipe(package, "finetune-lora", train__steps=3, train__learning_rate=0.02, rank=2, alpha=8)
    assert isinstance(chosen, FinetuneLora)
    kept: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        from packforcing_cli.training import adapters as module

        original = module.write

        def applied(folder: Path, transformer: WanTransformer, how: FinetuneLora) -> None:
            kept.append(velocity(transformer))  # peft's own layers, adapters beside the frozen weights
            original(folder, transformer, how)

        patch.setattr(module, "write", applied)
        figures = train(chosen, tmp_path, encoded)
    assert figures["lora"] == str(tmp_path / "lora")
    base = velocity(registry.load_model(package, device="cpu").transformer)
    assert (kept[0] - base).norm() > 1e-2 * base.norm()
    packed = registry.load_model(tmp_path / "package", device="cpu").transformer
    added = registry.load_model(package, device="cpu", loras=[str(tmp_path / "lora")]).transformer
    torch.testing.assert_close(velocity(packed), kept[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(velocity(added), kept[0], rtol=1e-4, atol=1e-5)
    manifest = registry.read_manifest(tmp_path / "package")
    assert manifest.provenance["recipe"] == "finetune-lora"
    for part in ("compressor", "vae", "text_encoder"):
        assert manifest.part_hash(part) == registry.read_manifest(package).part_hash(part)  # type: ignore[arg-type]


def test_training_adapters_resumes_exactly(
    package: Path,
    encoded: EncodedData,
    tmp_path: Path,
) -> None:
    pytest.importorskip("peft")
    chosen = recipe(package, "finetune-lora", train__steps=4, rank=2)
    train(chosen, tmp_path / "whole", encoded)
    steps = iter(range(1, 100))
    train(chosen, tmp_path / "broken", encoded, should_stop=lambda: next(steps) == 2)
    checkpoint = next((tmp_path / "broken" / "checkpoints").iterdir())
    assert checkpoint.stat().st_size < 200_000  # adapters alone
    train(chosen, tmp_path / "broken", encoded)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    one, other = ((tmp_path / name / "lora" / lora.WEIGHTS).read_bytes() for name in ("whole", "broken"))
    assert one == other


def test_a_target_that_is_not_there_is_said(
    package: Path,
    encoded: EncodedData,
    tmp_path: Path,
) -> None:
    pytest.importorskip("peft")
    with pytest.raises(UsageError, match="no linear of the transformer ends with to_x"):
        train(recipe(package, "finetune-lora", targets=["to_x"]), tmp_path, encoded)


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [("a/b", "a/b", 1.0), ("a:0.5", "a", 0.5), ("a:-1", "a", -1.0), ("C:\\lora", "C:\\lora", 1.0)],
)
def test_a_path_may_have_a_weight(text: str, path: str, strength: float) -> None:
    assert lora.parse(text) == (Path(path), strength)


def test_wrong_adapters_are_refused(package: Path, adapters: Path, tmp_path: Path) -> None:
    for text in ("a:x", "a:nan"):
        with pytest.raises(UsageError, match="is no weight"):
            lora.parse(text)
    with pytest.raises(UsageError, match="there is no LoRA folder"):
        lora.read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="it has no adapter_config"):
        lora.read(tmp_path / "empty")
    a, b = torch.zeros(3, 24), torch.zeros(24, 3)
    cases = {
        "of another model": (
            {"blocks.9.attn1.to_q.lora_A.weight": a, "blocks.9.attn1.to_q.lora_B.weight": b},
            {},
        ),
        "of another width": (
            {"blocks.0.attn1.to_q.lora_A.weight": torch.zeros(3, 8), "blocks.0.attn1.to_q.lora_B.weight": b},
            {},
        ),
        "alone": ({"blocks.0.attn1.to_q.lora_A.weight": a}, {}),
        "no lora": ({"blocks.0.attn1.to_q.weight": a}, {}),
        "dora": ({"blocks.0.attn1.to_q.lora_A.weight": a}, {"use_dora": True}),
    }
    for name, (tensors, config) in cases.items():
        write(tmp_path / name, tensors, **config)
        with pytest.raises(WeightsError):
            registry.load_model(package, device="cpu", loras=[str(tmp_path / name)])
    write(tmp_path / "rs", load_file(adapters / lora.WEIGHTS), use_rslora=True)
    assert lora.read(tmp_path / "rs").scale == pytest.approx(6 / math.sqrt(3))
    with pytest.raises(UsageError, match="random weights"):
        registry.open_model("random:demo", device="cpu", loras=[str(adapters)])


def test_generate_takes_adapters_and_models_pack_merges_them(
    package: Path,
    adapters: Path,
    run_command: Any,
    tmp_path: Path,
) -> None:
    common = (
        "--seconds",
        "1",
        "--steps",
        "1",
        "--seed",
        "3",
        "--device",
        "cpu",
        "--no-run",
        "--crf",
        "0",
        "-q",
    )

    def frames(name: str, *options: str) -> bytes:
        result = run_command("generate", "a red circle", "-o", f"{name}.mkv", *common, *options)
        assert result.code == 0, result.err
        from packforcing_cli.reader import VideoReader

        return b"".join(frame.tobytes() for frame in VideoReader(tmp_path / f"{name}.mkv"))

    plain = frames("plain", "--model", str(package))
    added = frames("added", "--model", str(package), "--lora", str(adapters))
    none = frames("none", "--model", str(package), "--lora", f"{adapters}:0")
    assert none == plain != added
    result = run_command("models", "pack", str(package), "-o", "merged", "--lora", str(adapters))
    assert (result.code, result.out) == (0, "merged\n"), result.err
    assert frames("merged-video", "--model", "./merged") == added
    assert registry.read_manifest(tmp_path / "merged").provenance["merged_loras"][0]["weight"] == 1.0
    again = run_command("models", "pack", str(package), "-o", "merged", "--lora", str(adapters))
    assert (again.code, "merged exists" in again.err) == (2, True)
    wrong = run_command("generate", "x", *common, "--model", str(package), "--lora", "nowhere")
    assert (wrong.code, "there is no LoRA folder nowhere" in wrong.err) == (2, True)
