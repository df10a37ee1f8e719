"""Embeddings on disk: a prompt is encoded once, a file says whose it is, and the encoder is gone in time."""

from __future__ import annotations

import gc
import json
import os
import stat
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from packforcing_cli import embeddings, prompts, registry
from packforcing_cli.embeddings import EmbeddingCache, Encoded, encode
from packforcing_cli.errors import UsageError, WeightsError
from packforcing_cli.text import TextEncoder, TextIdentity
from packforcing_cli.timeline import Script

IDENTITY = TextIdentity(encoder="abc", length=6, width=4, numerics="fp32 cpu none", vocabulary=("a", "red"))


class Fake:
    """Encodes a text into as many positions as it has words, and one for its end."""

    def encode(self, prompt: str) -> Tensor:
        generator = torch.Generator().manual_seed(len(prompt))
        found = torch.zeros(1, 6, 4)
        words = min(6, len(prompt.split()) + 1)
        found[:, :words] = torch.randn(words, 4, generator=generator)
        return found

    def unknown_words(self, prompt: str, vocabulary: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(word for word in prompt.split() if word not in vocabulary)

    def num_dropped(self, prompt: str) -> int:
        return max(0, len(prompt.split()) - 5)


class Loads:
    """Counts how often the encoder was loaded."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> Fake:
        self.count += 1
        return Fake()


@pytest.fixture
def cache(tmp_path: Path) -> EmbeddingCache:
    return EmbeddingCache(tmp_path / "cache")


def same(a: Encoded, b: Encoded) -> bool:
    return torch.equal(a.embeds, b.embeds) and (a.text, a.unknown, a.dropped) == (
        b.text,
        b.unknown,
        b.dropped,
    )


def test_a_text_is_encoded_once_and_comes_back_bit_for_bit(cache: EmbeddingCache) -> None:
    loads = Loads()
    texts = ["a red zebra", "", "a a a a a a a a", "a red zebra"]
    first = encode(texts, IDENTITY, loads, cache=cache)
    again = encode(reversed(texts), IDENTITY, loads, cache=cache)
    assert loads.count == 1
    assert list(first) == ["a red zebra", "", "a a a a a a a a"]
    assert all(same(again[text], first[text]) for text in first)
    assert first["a red zebra"].unknown == ("zebra",)
    assert again["a a a a a a a a"].dropped == 3
    encode(["a red", "a red zebra"], IDENTITY, loads, cache=cache)
    assert loads.count == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype_survives(dtype: torch.dtype, cache: EmbeddingCache) -> None:
    embeds = torch.randn(1, 6, 4).to(dtype)
    cache.put(IDENTITY, Encoded("a", embeds))
    found = cache.get(IDENTITY, "a")
    assert found is not None
    assert found.embeds.dtype == dtype
    assert torch.equal(found.embeds, embeds)


def test_texts_that_are_cleaned_alike_share_an_entry(cache: EmbeddingCache) -> None:
    loads = Loads()
    encode(["a red\n circle"], IDENTITY, loads, cache=cache)
    found = encode(["  a   red circle"], IDENTITY, loads, cache=cache)
    assert loads.count == 1
    assert found["  a   red circle"].text == "  a   red circle"


@pytest.mark.parametrize(
    "change",
    [
        {"encoder": "abd"},
        {"length": 7},
        {"width": 5},
        {"numerics": "bf16 cpu none"},
        {"vocabulary": ("a",)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_the_embedding_changes_the_entry(
    change: dict[str, Any], cache: EmbeddingCache
) -> None:
    cache.put(IDENTITY, Encoded("a", torch.ones(1, 6, 4)))
    assert cache.get(IDENTITY, "a") is not None
    assert cache.get(replace(IDENTITY, **change), "a") is None
    assert cache.get(IDENTITY, "b") is None


DAMAGE: list[Callable[[Path], Any]] = [
    lambda p: p.write_bytes(b""),
    lambda p: p.write_bytes(p.read_bytes()[:-3]),
    lambda p: p.write_bytes(p.read_bytes()[:-1] + b"\x7f"),
    lambda p: p.write_bytes(b"\xff" * 100),
    lambda p: p.write_text("<html>"),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_computed_and_written_again(
    damage: Callable[[Path], Any], cache: EmbeddingCache
) -> None:
    loads = Loads()
    first = encode(["a red"], IDENTITY, loads, cache=cache)
    (entry,) = cache.folder.iterdir()
    whole = entry.read_bytes()
    damage(entry)
    again = encode(["a red"], IDENTITY, loads, cache=cache)
    assert loads.count == 2
    assert same(again["a red"], first["a red"])
    assert entry.read_bytes() == whole


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path)
    for text in ("t0", "t1", "t2"):
        cache.put(IDENTITY, Encoded(text, torch.ones(1, 6, 4)))
    paths = {text: cache._path(IDENTITY, text) for text in ("t0", "t1", "t2")}
    for age, text in enumerate(("t2", "t1", "t0")):
        os.utime(paths[text], (time.time() - 100 - age,) * 2)
    assert cache.get(IDENTITY, "t0") is not None  # used: now the newest
    size = paths["t0"].stat().st_size
    (tmp_path / ".x.part").write_bytes(b"1")
    (tmp_path / ".old.part").write_bytes(b"1")
    os.utime(tmp_path / ".old.part", (1, 1))
    EmbeddingCache(tmp_path, max_bytes=3 * size).put(IDENTITY, Encoded("t3", torch.ones(1, 6, 4)))
    left = {text for text in ("t0", "t1", "t2", "t3") if cache._path(IDENTITY, text).exists()}
    assert left == {"t0", "t2", "t3"}
    assert [path.name for path in tmp_path.glob(".*")] == [".x.part"]


def test_a_cache_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    found = encode(["a"], IDENTITY, Loads(), cache=EmbeddingCache(tmp_path / "file" / "cache"))
    assert found["a"].embeds.shape == (1, 6, 4)
    assert "cannot be kept in" in caplog.text


def test_nan_is_not_kept(cache: EmbeddingCache) -> None:
    cache.put(IDENTITY, Encoded("a", torch.full((1, 6, 4), torch.nan)))
    assert cache.get(IDENTITY, "a") is None


def test_nothing_is_kept_of_an_encoder_nobody_knows(cache: EmbeddingCache) -> None:
    encode(["a"], replace(IDENTITY, encoder=""), Loads(), cache=cache)
    assert not cache.folder.exists()


def test_an_encoder_of_another_width_is_refused(cache: EmbeddingCache) -> None:
    with pytest.raises(WeightsError, match="of width 4, the transformer takes 8"):
        encode(["a"], replace(IDENTITY, width=8), Loads(), cache=cache)


# ------------------------------------------------------------------------------------------------------------ files


def written(path: Path, *texts: str, identity: TextIdentity = IDENTITY) -> Path:
    embeddings.write(path, identity, encode([*texts, ""], identity, Fake, cache=None))
    return path


def test_a_file_gives_its_prompts_back(tmp_path: Path) -> None:
    path = written(tmp_path / "new" / "p.safetensors", "a red", "a zebra")
    file = embeddings.read(path)
    file.require_fit(IDENTITY, model="m")
    assert file.prompts == ("a red", "a zebra")
    chosen = file.choose(["a  zebra", ""])
    assert torch.equal(chosen["a  zebra"].embeds, Fake().encode("a zebra"))
    assert chosen["a  zebra"].unknown == ("zebra",)
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    with pytest.raises(UsageError, match="no embeddings of 'a blue'; it has 'a red', 'a zebra'"):
        file.choose(["a blue"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 8}, "have a width of 4, m takes 8"),
        ({"length": 512}, "are of 6 tokens, m takes 512"),
        ({"encoder": "other"}, "made by another text encoder than that of m"),
    ],
)
def test_embeddings_of_another_model_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = embeddings.read(written(tmp_path / "p.safetensors", "a"))
    with pytest.raises(WeightsError, match=message) as caught:
        file.require_fit(replace(IDENTITY, **change), model="m")
    assert "models embed PROMPT -o FILE --model m" in caught.value.hint
    file.require_fit(replace(IDENTITY, numerics="bf16 cuda none", vocabulary=()), model="m")


def test_a_file_that_is_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        embeddings.read(tmp_path / "p.safetensors")
    for damage in DAMAGE:
        path = written(tmp_path / "p.safetensors", "a red")
        damage(path)
        with pytest.raises(WeightsError):
            embeddings.read(path)
    weights = Path(registry.catalog.DEMO_FOLDER) / "text_encoder" / "model.safetensors"
    with pytest.raises(WeightsError, match="not a file of prompt embeddings"):
        embeddings.read(weights)
    newer = written(tmp_path / "n.safetensors", "a red")
    newer.write_bytes(newer.read_bytes().replace(b'schema\\": 1', b'schema\\": 7'))
    with pytest.raises(WeightsError, match="has schema 7"):
        embeddings.read(newer)


# -------------------------------------------------------------------------------------------------- the whole model


@pytest.fixture
def encoders(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Every text encoder that is loaded, without keeping it."""
    seen: list[weakref.ref[Any]] = []
    original = TextEncoder.load

    def load(*arguments: Any, **named: Any) -> TextEncoder:
        encoder = original(*arguments, **named)
        seen.append(weakref.ref(encoder.model.shared.weight))
        return encoder

    monkeypatch.setattr(TextEncoder, "load", load)
    return seen


def test_the_encoder_is_gone_before_the_transformer_is_read(
    encoders: list[weakref.ref[Any]], monkeypatch: pytest.MonkeyPatch, cache: EmbeddingCache
) -> None:
    order: list[str] = []
    original = registry.load_transformer

    def load_transformer(*arguments: Any, **named: Any) -> Any:
        order.append("transformer")
        assert [seen() for seen in encoders] == [None]
        return original(*arguments, **named)

    monkeypatch.setattr(registry, "load_transformer", load_transformer)
    gc.collect()
    gc.disable()  # nothing may depend on when the collector runs
    try:
        source = registry.open_model("demo", device="cpu")
        story = prompts.encode_script(source, Script(("a red circle",)), guided=True, cache=cache)
        order.append("encoded")
        model = source.load()
    finally:
        gc.enable()
    assert order == ["encoded", "transformer"]
    assert model.text == source.text
    assert story.prompts[0].unconditional is not None


def test_a_second_run_of_a_prompt_loads_no_encoder_and_makes_the_same_video(
    encoders: list[weakref.ref[Any]], run_command: Callable[..., Any], tmp_path: Path, monkeypatch: Any
) -> None:
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    words = ("generate", "a red circle moving sideways", "--no-metadata", "--seconds", "0.5", "--seed", "3")
    first = run_command(*words, "-o", "1.mp4")
    again = run_command(*words, "-o", "2.mp4")
    assert (first.code, again.code, len(encoders)) == (0, 0, 1)
    assert (tmp_path / "1.mp4").read_bytes() == (tmp_path / "2.mp4").read_bytes()
    for done in (first, again):
        assert "does not know: sideways" in done.err
    other = run_command(*words[:2], *words[2:], "--seconds", "3", "--at", "0:02 a blue square", "-o", "3.mp4")
    assert (other.code, len(encoders)) == (0, 2)


def test_a_file_of_embeddings_replaces_the_encoder(
    encoders: list[weakref.ref[Any]], run_command: Callable[..., Any], tmp_path: Path
) -> None:
    made = run_command(
        "models", "embed", "a red circle", "-o", "p.safetensors", "--model", "demo", "--device", "cpu"
    )
    said = "text encoder of demo on cpu (fp32); model: asked for; device: asked for; precision: as on every CPU\n"
    assert (made.code, made.out.strip(), made.err) == (0, "p.safetensors", said)
    assert run_command("models", "embed", "a red circle", "-o", "p.safetensors").code == 2
    loaded = len(encoders)
    options = ("--seconds", "0.5", "--seed", "3")
    by_text = run_command("generate", "a red circle", *options, "-o", "1.mp4")
    by_file = run_command("generate", "--embeddings", "p.safetensors", *options, "-o", "2.mp4", "--json")
    assert (by_text.code, by_file.code, len(encoders)) == (0, 0, loaded)
    assert "--embeddings p.safetensors" in json.loads(by_file.out)["command"]
    wrong = run_command("generate", "a blue ring", "--embeddings", "p.safetensors", "-o", "3.mp4")
    assert (wrong.code, "it has 'a red circle'" in wrong.err) == (2, True)
    assert run_command("generate", "--embeddings", "nothing.safetensors").code == 2
    assert run_command("models", "embed", " ", "-o", "q.safetensors").code == 2


def test_embed_takes_variables_as_every_command(
    run_command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACKFORCING_MODEL", "demo")
    monkeypatch.setenv("PACKFORCING_DTYPE", "bf16")
    monkeypatch.setenv("PACKFORCING_DEVICE", "cpu")
    made = run_command("models", "embed", "a red circle", "-o", "p.safetensors")
    assert (made.code, made.err) == (
        0,
        "text encoder of demo on cpu (bf16); model: asked for; device: asked for; precision: asked for\n",
    )


def test_the_identity_of_an_encoder_is_in_the_manifest_and_hashes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    demo = registry.open_model("demo", device="cpu")
    manifest = demo.manifest
    other = manifest.model_copy(
        update={
            "files": {
                name: record.model_copy(update={"sha256": "0" * 64}) if "tokenizer" in name else record
                for name, record in manifest.files.items()
            }
        }
    )
    assert manifest.part_hash("text_encoder") == other.part_hash("text_encoder")
    assert manifest.part_hash("tokenizer") != other.part_hash("tokenizer")
    half = registry.open_model("demo", device="cpu", dtype="bf16")
    assert demo.text.encoder == half.text.encoder
    assert demo.text.numerics != half.text.numerics
    assert demo.text.vocabulary == manifest.vocabulary
