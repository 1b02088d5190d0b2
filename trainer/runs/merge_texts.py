"""The texts of a merge of Custom Diffusion adapters: those that call a concept, and the ordinary
ones whose keys and values are to stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.data.ordinary_captions import ordinary_captions
from trainer.data.world.scenes import draw_layout

CONCEPT_PROMPTS = ("{}", "a photo of {}")  # as in the official code, which puts "<new1> cat" there
NUM_CAPTIONS = 200  # as in the official code
WHOLE_WORDS = 2.0  # tokens a word, at most, of a tokenizer that knows the words


def concept_prompts(phrase: str) -> list[str]:
    """What must give the values that the concept's own run gave. phrase: its word and its class
    word, as in "<v1> cat"."""
    return [prompt.format(phrase) for prompt in CONCEPT_PROMPTS]


def ordinary_texts(tokenizer: Any) -> Sequence[str]:
    """200 ordinary captions that fit the backbone of a tokenizer: of photographs where it knows
    their words, else of the embedded world, whose small vocabulary spells them letter by letter."""
    photographs = ordinary_captions(NUM_CAPTIONS)
    words = {word for caption in photographs for word in caption.split()}
    if sum(len(tokenizer.tokenize(word)) for word in words) <= WHOLE_WORDS * len(words):
        return photographs
    return [draw_layout(5, index).caption for index in range(NUM_CAPTIONS)]
