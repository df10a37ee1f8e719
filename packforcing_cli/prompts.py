"""What a video shows, encoded: the prompts of a script, and the keys and values each block reads of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from packforcing_cli.embeddings import UNCONDITIONAL, EmbeddingCache, EmbeddingFile, encode
from packforcing_cli.registry import ModelSource, VideoModel
from packforcing_cli.timeline import Script
from packforcing_cli.transformer import TextKV, WanTransformer


@dataclass(frozen=True)
class Prompt:
    """An encoded prompt: embeddings [1,T,C], and what the person should know of it.

    unconditional: embeddings of the empty prompt; None when there is no guidance.
    unknown:       words the model was not trained on.  dropped: tokens at the end that did not fit.
    """

    text: str
    conditional: Tensor
    unconditional: Tensor | None = None
    unknown: tuple[str, ...] = ()
    dropped: int = 0


@dataclass(frozen=True)
class Story:
    """A script and its encoded prompts, one for each scene."""

    script: Script
    prompts: tuple[Prompt, ...]


def encode_prompt(model: VideoModel | ModelSource, text: str, *, guided: bool) -> Prompt:
    """Encode a prompt, as `encode_script` does."""
    return encode_script(model, Script((text,)), guided=guided).prompts[0]


def encode_script(
    model: VideoModel | ModelSource,
    script: Script,
    *,
    guided: bool,
    given: EmbeddingFile | None = None,
    cache: EmbeddingCache | None = None,
) -> Story:
    """Encode the prompts of a script, equal ones once.

    The text encoder is loaded only for prompts the cache does not have, and is gone from memory when this returns.

    Args:
        given: embeddings from a file; the encoder is then never loaded.
        cache: None = the user's.
    Raises: WeightsError or UsageError if `given` is of another model or lacks a prompt.
    """
    texts = [*script.prompts, *([UNCONDITIONAL] if guided else [])]
    if given is not None:
        given.require_fit(model.text, model=model.name)
        found = given.choose(texts)
    else:
        found = encode(texts, model.text, model.load_text_encoder, cache=cache or EmbeddingCache.of_user())
    embeds = {text: entry.embeds.to(model.device, model.dtype) for text, entry in found.items()}
    prompts = tuple(
        Prompt(
            text=text,
            conditional=embeds[text],
            unconditional=embeds[UNCONDITIONAL] if guided else None,
            unknown=found[text].unknown,
            dropped=found[text].dropped,
        )
        for text in script.prompts
    )
    return Story(script, prompts)


def as_story(model: VideoModel, prompt: str | Prompt | Script | Story, *, guided: bool) -> Story:
    """A story of whatever says what the video shows; text is encoded."""
    if isinstance(prompt, Story):
        return prompt
    if isinstance(prompt, Prompt):
        return Story(Script((prompt.text,)), (prompt,))
    return encode_script(model, Script((prompt,)) if isinstance(prompt, str) else prompt, guided=guided)


class StoryText:
    """Cross-attention keys and values for each block of a story.

    Those of a prompt are kept as long as a later scene may come back to it; those of a blend belong to one block.
    """

    def __init__(self, transformer: WanTransformer, story: Story) -> None:
        self._transformer, self._story = transformer, story
        self._kept: dict[str, tuple[TextKV, TextKV]] = {}

    def at(self, block: int) -> tuple[TextKV, TextKV]:
        """Keys and values of a block's text; a blend is as timeline.py says. Ask once a block, in order.

        Returns: those of the text alone, and those of both passes of classifier-free guidance, which run as one
            (the same if there is no guidance).
        """
        script, prompts = self._story.script, self._story.prompts
        scene, weight = script.scene(block), float(script.weight(block))
        prompt = prompts[scene]
        if weight < 1:
            before = prompts[scene - 1].conditional
            return self._embed((1 - weight) * before + weight * prompt.conditional)
        if prompt.text not in self._kept:
            later = {prompt.text for prompt in prompts[scene:]}
            self._kept = {text: kv for text, kv in self._kept.items() if text in later}
            self._kept[prompt.text] = self._embed(prompt.conditional)
        return self._kept[prompt.text]

    def _embed(self, embeds: Tensor) -> tuple[TextKV, TextKV]:
        text = self._transformer.embed_text(embeds)
        empty = self._story.prompts[0].unconditional
        return text, text if empty is None else self._transformer.embed_text(torch.cat((embeds, empty)))
