"""CLIP scores: equal to what transformers computes, from a folder or a Hub on this machine, and refused when not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_clip
import torch
from hub_server import HubServer, sha256
from numpy.typing import NDArray

from packforcing_cli import clip_score, metrics
from packforcing_cli.clip_score import ClipScorer, Preparation
from packforcing_cli.errors import OfflineError, UsageError, WeightsError
from packforcing_cli.hub import Hub
from packforcing_cli.quiet import known_import_noise_dropped

REPO = "somebody/tiny-clip"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with known_import_noise_dropped():
        return tiny_clip.save(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def scorer(folder: Path) -> ClipScorer:
    return ClipScorer.load(folder)


def pictures(count: int = 5, size: tuple[int, int] = (48, 80)) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(count)]


def direct(folder: Path, frames: list[NDArray[np.uint8]], prompt: str) -> list[float]:
    """The same figures by transformers' own processor, forward pass and logits."""
    import transformers
    from PIL import Image

    processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    pixels = processor.from_pretrained(folder)(
        [Image.fromarray(frame) for frame in frames], return_tensors="pt"
    )
    tokens = transformers.CLIPTokenizerFast.from_pretrained(folder)([prompt], return_tensors="pt")
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        found = model(pixel_values=pixels["pixel_values"], **tokens)
        return (100 * found.logits_per_image[:, 0] / model.logit_scale.exp()).tolist()


@pytest.mark.parametrize("size", [(48, 80), (90, 33), (32, 32), (20, 200)])
def test_scores_are_those_of_transformers(size: tuple[int, int], folder: Path, scorer: ClipScorer) -> None:
    frames = pictures(size=size)
    prompt = "a red circle"
    scores = scorer.score(
        ((n + 0.5, frame) for n, frame in enumerate(frames)), lambda _: prompt, [(0.0, 5.0)]
    )
    expected = direct(folder, frames, prompt)
    assert np.ptp(expected) > 1  # the model tells the pictures apart
    assert scores.values == pytest.approx(expected, abs=2e-3)
    assert scores.mean == pytest.approx(np.mean(expected), abs=2e-3)


def test_each_frame_is_scored_with_the_prompt_of_its_time_and_segments_are_means(scorer: ClipScorer) -> None:
    frames = pictures(40)  # more than a batch
    subject = metrics.Subject("x", Path("x"), prompts=((0.0, "circle"), (7.0, "a square"), (25.0, "night")))
    segments = [(0.0, 10.0), (10.0, 20.0), (20.0, 40.0), (40.0, 50.0)]
    done: list[float] = []
    scores = scorer.score(
        ((n + 0.5, frame) for n, frame in enumerate(frames)),
        subject.prompt_at,
        segments,
        progress=done.append,
    )
    images = scorer.embed_images(frames).numpy()
    words = ["circle"] * 7 + ["a square"] * 18 + ["night"] * 15
    texts = torch.cat([scorer.embed_text(word) for word in words]).numpy()
    expected = metrics.clip_score(images, texts)
    assert scores.values == pytest.approx(expected.tolist(), abs=1e-3)
    assert scores.by_segment[:3] == pytest.approx(
        [expected[:10].mean(), expected[10:20].mean(), expected[20:].mean()], abs=1e-3
    )
    assert np.isnan(scores.by_segment[3])
    assert scores.to_json()["by_segment"][3] is None
    assert done == [15.5, 31.5, 39.5]


def test_a_score_is_a_hundred_cosines() -> None:
    images, texts = np.array([[3.0, 0.0], [1.0, 1.0], [-2.0, 0.0]]), np.array([[5.0, 0.0]])
    assert metrics.clip_score(images, texts) == pytest.approx([100, 100 / np.sqrt(2), -100])


def test_a_prompt_that_is_too_long_is_cut_and_that_is_said(scorer: ClipScorer) -> None:
    prompt = "abcdefghijklmnopqrstuvwxyz"
    scores = scorer.score([(0.5, pictures(1)[0])], lambda _: prompt, [(0.0, 1.0)])
    assert scores.notes == (f"CLIP reads 16 tokens: the last 12 of {prompt!r} do not count",)
    assert torch.equal(scorer.embed_text(prompt), scorer.embed_text(prompt[:14] + "xyz"))
    assert not torch.equal(scorer.embed_text(prompt), scorer.embed_text(prompt[:13] + "xyz"))


# ---------------------------------------------------------------------------------------------------- where it is


def test_a_model_comes_from_the_hub_once_and_then_from_its_cache(
    hub_server: HubServer, folder: Path, scorer: ClipScorer
) -> None:
    commit = hub_server.add(REPO, {**tiny_clip.files(folder), "pytorch_model.bin": b"x" * 5000})
    gained: dict[str, int] = {}
    there, name = clip_score.find(
        REPO,
        Hub(endpoint=hub_server.endpoint),
        advance=lambda file, size: gained.update({file: gained.get(file, 0) + size}),
    )
    assert name == f"hf:{REPO}@{commit}"
    assert not (there / "pytorch_model.bin").exists()
    assert gained["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    frames = pictures(3)
    assert torch.equal(ClipScorer.load(there).embed_images(frames), scorer.embed_images(frames))
    asked = len(hub_server.requests)
    for place in (REPO, f"hf:{REPO}", f"hf:{REPO}@{commit}"):
        assert clip_score.find(place, Hub(offline=True)) == (there, name)
    assert len(hub_server.requests) == asked


def test_a_model_in_shards_is_fetched_whole(
    hub_server: HubServer, folder: Path, tmp_path: Path, scorer: ClipScorer
) -> None:
    from safetensors.torch import load_file, save_file

    parted = tmp_path / "parted"
    shutil.copytree(folder, parted)
    tensors = load_file(parted / "model.safetensors")
    (parted / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {}
    for number, mine in enumerate((names[:20], names[20:]), start=1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({key: tensors[key] for key in mine}, parted / shard, metadata={"format": "pt"})
        where |= dict.fromkeys(mine, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (parted / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    commit = hub_server.add(REPO, tiny_clip.files(parted))
    there, _ = clip_score.find(REPO, Hub(endpoint=hub_server.endpoint))
    frames = pictures(2)
    assert torch.equal(ClipScorer.load(there).embed_images(frames), scorer.embed_images(frames))
    del commit
    hub_server.add(REPO, {k: v for k, v in tiny_clip.files(parted).items() if "00002-of" not in k})
    with pytest.raises(WeightsError, match="lacks model-00002-of-00002"):
        clip_score.find(REPO, Hub(endpoint=hub_server.endpoint))


@pytest.mark.parametrize(
    ("without", "said"),
    [
        ("model.safetensors", "holds pickled weights only"),
        ("preprocessor_config.json", "lacks preprocessor_config.json"),
        ("merges.txt", "lacks tokenizer.json"),
        ("config.json", "lacks config.json"),
    ],
)
def test_a_repository_that_lacks_a_part_is_refused_before_its_weights_are_fetched(
    without: str, said: str, hub_server: HubServer, folder: Path
) -> None:
    files = {**tiny_clip.files(folder), "pytorch_model.bin": b"x" * 5000}
    files.pop("tokenizer.json", None)
    del files[without]
    hub_server.add(REPO, files)
    with pytest.raises(WeightsError, match=said):
        clip_score.find(REPO, Hub(endpoint=hub_server.endpoint))
    assert not hub_server.asked("resolve")


def test_without_network_a_model_that_is_not_here_is_exit_8(hub_server: HubServer, folder: Path) -> None:
    with pytest.raises(OfflineError):
        clip_score.find(REPO, Hub(offline=True))
    files = tiny_clip.files(folder)
    hub_server.add(REPO, files)
    hub_server.fail(f"GET /cdn/{sha256(files['model.safetensors'])}", times=100, status=404)
    with pytest.raises(WeightsError):
        clip_score.find(REPO, Hub(endpoint=hub_server.endpoint))
    with pytest.raises(OfflineError, match=r"model\.safetensors of .* is not on this machine"):
        clip_score.find(REPO, Hub(offline=True))


def test_what_is_neither_a_folder_nor_a_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        clip_score.find(str(tmp_path / "nothing" / "here"), Hub(offline=True))
    with pytest.raises(UsageError, match="no such folder"):
        clip_score.find("clip", Hub(offline=True))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_damaged_folder_is_one_message(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    whole = (copy / "model.safetensors").read_bytes()
    tensors = load_file(copy / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"lacks weights of CLIP: visual_projection\.weight"):
        ClipScorer.load(copy)
    (copy / "model.safetensors").write_bytes(whole[:3000])
    with pytest.raises(WeightsError, match="cannot be loaded as a CLIP model"):
        ClipScorer.load(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"has no model\.safetensors"):
        ClipScorer.load(copy)
    (copy / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match="pickled weights only"):
        ClipScorer.load(copy)
    (copy / "config.json").write_text('{"model_type": "bert"}', "utf-8")
    with pytest.raises(WeightsError, match="not a CLIP model"):
        ClipScorer.load(copy)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"size": 32}', '{"size": 32, "crop_size": 32, "image_mean": [1], "image_std": [1, 1, 1]}',
     '{"size": 0, "crop_size": 32, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}',
     '{"size": 3, "crop_size": 3, "do_rescale": false, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}'],
)  # fmt: skip
def test_a_preparation_that_is_not_clips_is_refused(text: str, copy: Path) -> None:
    (copy / "preprocessor_config.json").write_text(text, "utf-8")
    with pytest.raises(WeightsError, match="how CLIP wants its pictures"):
        Preparation.read(copy)


def test_old_preparation_files_have_numbers_instead_of_tables(copy: Path, scorer: ClipScorer) -> None:
    values = json.loads((copy / "preprocessor_config.json").read_text("utf-8"))
    values |= {"size": tiny_clip.SIZE, "crop_size": tiny_clip.SIZE}
    (copy / "preprocessor_config.json").write_text(json.dumps(values), "utf-8")
    assert Preparation.read(copy) == scorer.prepare
