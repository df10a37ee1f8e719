"""The demo's text side: a word-level tokenizer over the caption grammar and the sizes of a tiny UMT5.

The tokenizer's files in `packforcing_cli/demo/tokenizer/` are what `build_demo_tokenizer` writes; a test
compares them. Imports transformers and tokenizers inside functions, nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from packforcing_cli.quiet import known_import_noise_dropped

if TYPE_CHECKING:
    from transformers import UMT5Config

DEMO_TEXT_LENGTH = 16
"""Tokens of a demo prompt; a caption has 9 words, with a visitor 13, and an end token."""

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
"""Ids 0, 1, 2 as in UMT5."""

# The order is the token id of shipped weights: new words go to the end, in place of the reserved ones.
WORDS = (
    *("a", "an", "the", "moving", "on", "background", "and", "with", "is", "here", "away", "no"),
    *("left", "right", "up", "down"),
    *("circle", "square", "triangle", "ring", "cross", "star", "bar", "diamond"),
    *("red", "green", "blue", "yellow", "purple", "cyan", "magenta", "orange", "pink", "brown"),
    *("white", "black", "gray", "teal", "navy"),
    *("small", "large", "slow", "fast", "light", "dark"),
    *("visitor", "passes", "comes", "goes", "returns", "stays", "two", "static", "still", "then"),
)
VOCAB_SIZE = 64


def demo_vocabulary() -> dict[str, int]:
    """Token -> id: special tokens, words, then reserved tokens up to VOCAB_SIZE."""
    tokens = [*SPECIAL_TOKENS, *WORDS]
    tokens += [f"<reserved_{i}>" for i in range(VOCAB_SIZE - len(tokens))]
    return {token: i for i, token in enumerate(tokens)}


def build_demo_tokenizer(folder: Path, length: int = DEMO_TEXT_LENGTH) -> None:
    """Write tokenizer.json and tokenizer_config.json, byte for byte the same every time; prompts have `length` tokens.

    Upper case and punctuation do not matter; a word outside WORDS becomes <unk>; the prompt ends in </s>.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = demo_vocabulary()
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"['’]s\b|[^\w\s]+"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "padding_side": "right",
        "truncation_side": "right",
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def tiny_umt5_config() -> UMT5Config:
    """UMT5 with 2 layers of width 64: 86 k parameters; no dropout, as it trains with the transformer."""
    with known_import_noise_dropped():
        from transformers import UMT5Config

    return UMT5Config(
        vocab_size=VOCAB_SIZE,
        d_model=64,
        d_kv=32,
        d_ff=128,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
