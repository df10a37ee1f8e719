from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from packforcing_cli import text, weights
from packforcing_cli.errors import UsageError, WeightsError
from packforcing_cli.quiet import known_import_noise_dropped
from packforcing_cli.text import TextEncoder
from packforcing_cli.training import world
from packforcing_cli.training.demo_text import (
    DEMO_TEXT_LENGTH,
    VOCAB_SIZE,
    WORDS,
    build_demo_tokenizer,
    demo_vocabulary,
    tiny_umt5_config,
)

DEMO_TOKENIZER = Path(text.__file__).parent / "demo" / "tokenizer"
CAPTION = "a red circle moving right on a blue background"


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    model = text.build_encoder(tiny_umt5_config().to_dict()).eval()
    return TextEncoder(model, text.load_tokenizer(DEMO_TOKENIZER), max_length=DEMO_TEXT_LENGTH)


@pytest.mark.parametrize(
    ("dirty", "expected"),
    [
        ("  a   red\n\tcircle ", "a red circle"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("&amp;lt;b&amp;gt;", "<b>"),
        ("caf\u00c3\u00a9", "café"),
        ("\u201ca\u201d\u00a0ring", '"a" ring'),
        ("", ""),
    ],
)
def test_prompts_are_cleaned_as_wan_does(dirty: str, expected: str) -> None:
    assert text.clean(dirty) == expected


def test_cleaning_equals_diffusers_on_odd_prompts() -> None:
    with known_import_noise_dropped():
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    for prompt in (
        "a  b",
        "x &amp;amp;lt; y",
        "\u00e2\u20ac\u0153hi\u00e2\u20ac\u009d ",
        "\u2019s  \u3000\uff21",
        CAPTION,
    ):
        assert text.clean(prompt) == prompt_clean(prompt)


def test_positions_beyond_the_prompt_are_exact_zeros(encoder: TextEncoder) -> None:
    embeds = encoder.encode(["a ring", CAPTION])
    assert embeds.shape == (2, DEMO_TEXT_LENGTH, 64)
    used = (embeds != 0).any(-1)
    assert used.sum(1).tolist() == [3, 10]  # the words and the end token
    assert used[0, :3].all()
    assert used[1, :10].all()


def test_padding_does_not_change_the_embedding_of_the_prompt(encoder: TextEncoder) -> None:
    """The encoder runs with its attention mask, so tokens without any padding embed the same."""
    tokens = encoder.tokenize(CAPTION)
    length = int(tokens.mask.sum())
    with torch.no_grad():
        alone = encoder.model(input_ids=tokens.ids[:, :length]).last_hidden_state
    torch.testing.assert_close(encoder.encode(CAPTION)[:, :length], alone)


def test_embeddings_equal_those_of_the_diffusers_pipeline(encoder: TextEncoder) -> None:
    with known_import_noise_dropped():
        from diffusers import WanPipeline
    pipeline = WanPipeline.__new__(WanPipeline)
    pipeline.tokenizer, pipeline.text_encoder = encoder.tokenizer, encoder.model
    with torch.no_grad():
        theirs = pipeline._get_t5_prompt_embeds(
            [CAPTION, ""], max_sequence_length=DEMO_TEXT_LENGTH, device=torch.device("cpu")
        )
    assert torch.equal(encoder.encode([CAPTION, ""]), theirs)


def test_an_empty_prompt_is_the_unconditional_text_and_no_prompt_is_refused(encoder: TextEncoder) -> None:
    assert int((encoder.encode("") != 0).any(-1).sum()) == 1
    with pytest.raises(UsageError, match="no prompt"):
        encoder.encode([])


def test_one_prompt_embeds_alike_alone_and_in_a_batch(encoder: TextEncoder) -> None:
    torch.testing.assert_close(encoder.encode(CAPTION)[0], encoder.encode(["a", CAPTION, "the ring"])[1])


def test_gradients_reach_the_encoder(encoder: TextEncoder) -> None:
    tokens = encoder.tokenize(["a ring", CAPTION])
    encoder.model.zero_grad()
    embeds = encoder.encode_tokens(tokens.ids, tokens.mask)
    embeds.square().sum().backward()
    gradients = {name: p.grad for name, p in encoder.model.named_parameters()}
    assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())
    used = gradients["shared.weight"].abs().sum(1) > 0  # type: ignore[union-attr]
    assert not used[demo_vocabulary()["square"]]
    assert used[demo_vocabulary()["ring"]]
    encoder.model.zero_grad(set_to_none=True)
    assert not encoder.encode(CAPTION).requires_grad


def test_truncation_is_counted(encoder: TextEncoder) -> None:
    assert encoder.num_dropped(CAPTION) == 0
    assert encoder.num_dropped("a " * (DEMO_TEXT_LENGTH - 1)) == 0
    assert encoder.num_dropped("a " * 20) == 21 - DEMO_TEXT_LENGTH
    tokens = encoder.tokenize("a " * 20)
    assert tokens.ids.shape == (1, DEMO_TEXT_LENGTH)
    assert tokens.ids[0, -1] == 1


def test_unknown_words_are_named_once_and_as_written(encoder: TextEncoder) -> None:
    assert encoder.unknown_words("A Red circle, moving right -- on a BLUE background!") == ()
    assert encoder.unknown_words('a "Zebra" and a zebra, an élan ... light-blue sky-blue') == (
        "Zebra",
        "zebra",
        "élan",
        "sky-blue",
    )
    assert encoder.unknown_words("a Pink circle", ["a", "red", "circle"]) == ("Pink",)


def test_case_and_punctuation_do_not_matter(encoder: TextEncoder) -> None:
    assert torch.equal(
        encoder.encode("A red circle moving RIGHT, on a blue background."), encoder.encode(CAPTION)
    )


def test_every_caption_of_the_world_fits_and_is_understood(encoder: TextEncoder) -> None:
    captions = [*world.training_captions(), *world.held_out_captions()]
    tokens = encoder.tokenize(captions)
    assert set(tokens.dropped) == {0}
    assert not (tokens.ids == encoder.tokenizer.unk_token_id).any()
    assert len({tuple(row) for row in tokens.ids.tolist()}) == len(set(captions))
    assert encoder.num_dropped("a yellow triangle moving right on a magenta background") == 0


def test_the_vocabulary_has_no_repeated_word() -> None:
    assert len(set(WORDS)) == len(WORDS)
    assert sorted(demo_vocabulary().values()) == list(range(VOCAB_SIZE))


def test_the_shipped_tokenizer_is_what_the_builder_writes(tmp_path: Path) -> None:
    manifest = json.loads((DEMO_TOKENIZER.parent / "packforcing.json").read_text("utf-8"))
    build_demo_tokenizer(tmp_path, manifest["text_length"])
    written = {p.name: p.read_text("utf-8") for p in tmp_path.iterdir()}
    assert written == {p.name: p.read_text("utf-8") for p in DEMO_TOKENIZER.iterdir()}


def test_an_encoder_survives_its_folder_bit_for_bit(encoder: TextEncoder, tmp_path: Path) -> None:
    weights.save(tmp_path / "encoder", *text.encoder_parts(encoder.model))
    loaded = TextEncoder.load(tmp_path / "encoder", DEMO_TOKENIZER, max_length=DEMO_TEXT_LENGTH)
    assert torch.equal(loaded.encode(CAPTION), encoder.encode(CAPTION))
    assert loaded.model.encoder.embed_tokens.weight is loaded.model.shared.weight
    half = TextEncoder.load(
        tmp_path / "encoder", DEMO_TOKENIZER, max_length=DEMO_TEXT_LENGTH, dtype=torch.bfloat16
    )
    assert half.dtype == half.encode(CAPTION).dtype == torch.bfloat16


def test_a_folder_written_by_transformers_loads_sharded_or_not(encoder: TextEncoder, tmp_path: Path) -> None:
    for size in ("1GB", "100KB"):
        folder = tmp_path / size
        encoder.model.save_pretrained(folder, max_shard_size=size)
        loaded = TextEncoder.load(folder, DEMO_TOKENIZER, max_length=DEMO_TEXT_LENGTH)
        assert torch.equal(loaded.encode(CAPTION), encoder.encode(CAPTION))
    next(folder.glob("model-00001*")).unlink()
    with pytest.raises(WeightsError, match="lacks model-00001"):
        TextEncoder.load(folder, DEMO_TOKENIZER, max_length=DEMO_TEXT_LENGTH)


def test_wrong_folders_are_named(encoder: TextEncoder, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"config\.json is missing"):
        TextEncoder.load(tmp_path, DEMO_TOKENIZER, max_length=12)
    config, tensors = text.encoder_parts(encoder.model)
    weights.save(tmp_path / "llama", config | {"model_type": "llama"}, tensors)
    with pytest.raises(WeightsError, match="unsupported text encoder 'llama'"):
        TextEncoder.load(tmp_path / "llama", DEMO_TOKENIZER, max_length=12)
    weights.save(tmp_path / "deeper", config | {"num_layers": 3}, tensors)
    with pytest.raises(WeightsError, match=r"lacks encoder\.block\.2"):
        TextEncoder.load(tmp_path / "deeper", DEMO_TOKENIZER, max_length=12)
    weights.save(tmp_path / "good", config, tensors)
    with pytest.raises(WeightsError, match="holds no tokenizer"):
        TextEncoder.load(tmp_path / "good", tmp_path, max_length=12)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Nothing"}))
    with pytest.raises(WeightsError, match="cannot be read"):
        text.load_tokenizer(tmp_path / "broken")


def test_only_known_import_noise_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    torchao, pytree = logging.getLogger("torchao"), logging.getLogger("torch.utils._pytree")
    handlers = [logger.addHandler(caplog.handler) for logger in (torchao, pytree) if not logger.propagate]
    with known_import_noise_dropped():
        torchao.warning("Failed to load /x/torchao/_C_mxfp8.cpython-310-x86_64-linux-gnu.so: no")
        torchao.warning("a real problem")
        pytree.warning("%s is an Enum subclass and is now natively supported by torch.compile as", "X")
    torchao.warning("Failed to load /x/torchao/_C_y.so: afterwards")
    assert len(handlers) <= 2
    assert [r.getMessage() for r in caplog.records] == [
        "a real problem",
        "Failed to load /x/torchao/_C_y.so: afterwards",
    ]


def test_a_warning_about_string_escapes_is_dropped_for_the_source_of_torchao_alone() -> None:
    code = r"x = '\.'"
    with known_import_noise_dropped():
        compile(code, "/site-packages/torchao/quantization/quant_api.py", "exec")
    with pytest.raises(SyntaxError, match="invalid escape sequence"):  # warnings are errors in the tests
        compile(code, "/site-packages/other/quant_api.py", "exec")


def test_encoding_a_demo_prompt_in_a_fresh_process_is_silent(encoder: TextEncoder, tmp_path: Path) -> None:
    weights.save(tmp_path / "encoder", *text.encoder_parts(encoder.model))
    program = (
        "import sys; from pathlib import Path; from packforcing_cli.text import TextEncoder\n"
        "assert 'transformers' not in sys.modules\n"
        "e = TextEncoder.load(Path(sys.argv[1]), Path(sys.argv[2]), max_length=12)\n"
        "e.encode('a ring')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "encoder", DEMO_TOKENIZER],
        cwd=Path(text.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
