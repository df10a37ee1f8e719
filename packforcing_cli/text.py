"""Prompt -> text embeddings, by a UMT5 encoder of any size: the demo's tiny one or UMT5-XXL, in one class.

    prompt -> clean -> tokens, padded to max_length -> UMT5 with its attention mask -> zeros beyond the prompt

The diffusion transformer attends to all max_length positions without a mask, so those zeros are part of what
a model was trained on. Knows nothing of that transformer, of packages or of downloads.
Source: Wan 2.1 (wan/modules/t5.py, tokenizers.py), diffusers' WanPipeline; docs/method.md 1.1 and 1.5.

Letters: B prompts, T = max_length tokens, C channels of the encoder.
"""

from __future__ import annotations

import html
import re
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from packforcing_cli import weights
from packforcing_cli.errors import UsageError, WeightsError
from packforcing_cli.quantize import linear_weights
from packforcing_cli.quiet import known_import_noise_dropped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

_SHARED = "shared.weight"
_TIED = "encoder.embed_tokens.weight"  # the same tensor as shared.weight; files hold either name or both
TIED = (_SHARED, _TIED)


def clean(prompt: str) -> str:
    """Repair mis-decoded characters, resolve HTML entities (twice, as Wan does), collapse white space."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


@dataclass(frozen=True)
class Tokens:
    """Tokenised prompts.

    ids:     [B,T] int64, padded on the right.
    mask:    [B,T] int64, 1 on the prompt and its end token, 0 on padding.
    dropped: tokens of each prompt that did not fit into T, 0 if all did.
    """

    ids: Tensor
    mask: Tensor
    dropped: tuple[int, ...]


@dataclass(frozen=True)
class TextIdentity:
    """What embeddings depend on besides their text.

    encoder:    one hash of the files of encoder and tokenizer; "" = not known, and nothing is cached.
    length:     T.
    width:      C, which the transformer takes.
    numerics:   dtype, device and quantization of the encoder.
    vocabulary: the words a small model was trained on, which decide what is unknown to it.
    """

    encoder: str
    length: int
    width: int
    numerics: str
    vocabulary: tuple[str, ...] = ()


class Encoder(Protocol):
    """What makes embeddings of prompts."""

    def encode(self, prompts: str) -> Tensor:
        """[1,T,C] of one prompt; zeros behind it."""
        ...

    def unknown_words(self, prompt: str, vocabulary: Collection[str] = ()) -> tuple[str, ...]:
        """Words that cannot be understood."""
        ...

    def num_dropped(self, prompt: str) -> int:
        """Tokens at the end that do not fit."""
        ...


class RandomTextEncoder:
    """Embeddings that are random, the same for the same prompt: for models with random weights, in bench and tests."""

    def __init__(self, *, length: int, width: int, device: torch.device, dtype: torch.dtype) -> None:
        self._shape = (1, length, width)
        self._device, self._dtype = device, dtype

    def encode(self, prompts: str) -> Tensor:
        used = min(len(clean(prompts).split()) + 1, self._shape[1])
        generator = torch.Generator().manual_seed(zlib.crc32(clean(prompts).encode()))
        embeds = torch.randn(self._shape, generator=generator)
        embeds[:, used:] = 0
        return embeds.to(self._device, self._dtype)

    def unknown_words(self, prompt: str, vocabulary: Collection[str] = ()) -> tuple[str, ...]:
        return ()

    def num_dropped(self, prompt: str) -> int:
        return max(0, len(clean(prompt).split()) + 1 - self._shape[1])


class TextEncoder:
    """A UMT5 encoder with its tokenizer.

    Attributes: model (transformers' UMT5EncoderModel), tokenizer, max_length (T).
    """

    def __init__(
        self, model: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase, *, max_length: int
    ) -> None:
        if tokenizer.pad_token_id is None:
            raise WeightsError("the tokenizer has no padding token", hint="Download the tokenizer again.")
        if len(tokenizer) > model.config.vocab_size:
            raise WeightsError(
                f"the tokenizer has {len(tokenizer)} tokens, the text encoder only {model.config.vocab_size}",
                hint="The tokenizer and the text encoder belong to different models.",
            )
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length

    @classmethod
    def load(
        cls,
        encoder_dir: Path,
        tokenizer_dir: Path,
        *,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        quantize: Callable[[Tensor], Tensor] | None = None,
    ) -> TextEncoder:
        """Read an encoder (config.json, safetensors) and a tokenizer from folders; nothing is downloaded.

        Args:
            dtype: of the weights and of the embeddings; None keeps that of the file.
            quantize: applied to the weight of every linear of the layers (`quantize.quantizer`); None = none.
        Returns: an encoder whose weights do not ask for gradients, in eval mode; to train it further, call
            `.model.requires_grad_(True).train()`.
        Raises: WeightsError when a folder is incomplete or not UMT5.
        """
        model = build_encoder(weights.read_config(encoder_dir), on_meta=True)
        linears = linear_weights(model, "encoder.block.") if quantize is not None else frozenset[str]()
        tensors = weights.read_tensors(
            encoder_dir,
            device=torch.device(device),
            dtype=dtype,
            change=lambda name, tensor: quantize(tensor) if quantize and name in linears else tensor,
        )
        if _SHARED not in tensors and _TIED in tensors:
            tensors[_SHARED] = tensors[_TIED]
        if _SHARED in tensors:
            tensors[_TIED] = tensors[_SHARED]
        weights.assign(model, tensors, source=str(encoder_dir))
        model.encoder.embed_tokens.weight = model.shared.weight
        return cls(model, load_tokenizer(tokenizer_dir), max_length=max_length)

    @property
    def device(self) -> torch.device:
        return self.model.shared.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.shared.weight.dtype

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the encoder, in place. Returns itself."""
        self.model.to(torch.device(device))
        return self

    def tokenize(self, prompts: str | Sequence[str]) -> Tokens:
        """Clean and tokenise prompts, padded and cut to T; tensors are on the CPU.

        Raises: UsageError if there is no prompt. An empty prompt is allowed: it is the unconditional text.
        """
        texts = [clean(p) for p in ([prompts] if isinstance(prompts, str) else prompts)]
        if not texts:
            raise UsageError("there is no prompt to encode", hint="Pass at least one prompt.")
        whole = self.tokenizer(texts, add_special_tokens=True, truncation=False, verbose=False)
        batch = self.tokenizer(
            texts,
            add_special_tokens=True,
            padding="max_length",
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        dropped = tuple(max(0, len(ids) - self.max_length) for ids in whole["input_ids"])
        return Tokens(batch["input_ids"], batch["attention_mask"], dropped)

    def encode_tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embed tokens, differentiably; positions where `mask` is 0 come out as exact zeros.

        Args:
            ids:  [B,T] token ids.
            mask: [B,T] 1 on the prompt, 0 on padding.
        Returns: [B,T,C] in the encoder's dtype.
        """
        hidden: Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden.masked_fill(mask.unsqueeze(-1) == 0, 0.0)  # [B,T,C]

    @torch.no_grad()
    def encode(self, prompts: str | Sequence[str]) -> Tensor:
        """Embed prompts: [B,T,C] on the encoder's device and in its dtype, without gradient."""
        tokens = self.tokenize(prompts)
        return self.encode_tokens(tokens.ids.to(self.device), tokens.mask.to(self.device))

    def num_dropped(self, prompt: str) -> int:
        """How many tokens at the end of a prompt do not fit and are not seen by the model."""
        return self.tokenize(prompt).dropped[0]

    def unknown_words(self, prompt: str, vocabulary: Collection[str] = ()) -> tuple[str, ...]:
        """Words of a prompt that the model cannot understand, each once, in order, as they were written.

        A word is unknown when the tokenizer has no token for it or, if a vocabulary is given (the lower-case
        words a small model was trained on), when one of its tokens is not in that. Without a vocabulary a
        tokenizer of word pieces knows practically everything.
        """
        unknown: dict[str, None] = {}
        for word in clean(prompt).split():
            ids = self.tokenizer(word, add_special_tokens=False)["input_ids"]
            tokens = self.tokenizer.convert_ids_to_tokens(ids)
            if self.tokenizer.unk_token_id in ids or (vocabulary and not set(tokens) <= set(vocabulary)):
                unknown[re.sub(r"^\W+|\W+$", "", word) or word] = None
        return tuple(unknown)


def build_encoder(config: dict[str, Any], *, on_meta: bool = False) -> UMT5EncoderModel:
    """A UMT5 encoder from the values of its config.json: randomly initialised, or without storage on meta.

    Raises: WeightsError when the config is not one of UMT5.
    """
    if config.get("model_type", "umt5") != "umt5":
        raise WeightsError(
            f"unsupported text encoder {config['model_type']!r}", hint="Wan models use a UMT5 encoder."
        )
    with known_import_noise_dropped():
        from transformers import UMT5Config, UMT5EncoderModel

    values = {k: v for k, v in config.items() if not k.startswith("_")}
    try:
        parsed = UMT5Config.from_dict(values)
    except (TypeError, ValueError) as e:
        raise WeightsError(f"the text encoder's config.json is not valid: {e}") from e
    if not on_meta:
        return UMT5EncoderModel(parsed)
    with torch.device("meta"):
        return UMT5EncoderModel(parsed)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Read a tokenizer from a folder, offline. Raises: WeightsError when it cannot be read."""
    if not (folder / "tokenizer_config.json").is_file():
        raise WeightsError(f"{folder} holds no tokenizer", hint="Download or write the model again.")
    with known_import_noise_dropped():
        from transformers import AutoTokenizer
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise WeightsError(f"the tokenizer in {folder} cannot be read: {e}") from e
    return tokenizer


def encoder_parts(model: UMT5EncoderModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json values, tensors to store) of an encoder; the tied embedding is stored once."""
    config = {"_class_name": "UMT5EncoderModel", "architectures": ["UMT5EncoderModel"]}
    config |= {k: v for k, v in model.config.to_diff_dict().items() if k not in config}
    tensors = {k: v for k, v in model.state_dict().items() if k != _TIED}
    return config, tensors
