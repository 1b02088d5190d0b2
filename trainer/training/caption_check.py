"""What the loaded backbone reads of captions, where a recipe alone could not tell: its tokenizer
was not on this machine, or the captions are inside tars."""

from __future__ import annotations

import numpy as np

from trainer.backbones.backbone import Backbone
from trainer.backbones.prompt_tokens import prompt_reader
from trainer.config.captions import (
    check_counted,
    check_prompts,
    count_captions,
    said_of,
    trained_words,
)
from trainer.config.schema import Recipe
from trainer.data.source import Caption, Dataset
from trainer.data.tars.reader import Tars, read_local


def check_captions(recipe: Recipe, backbone: Backbone, train: Dataset) -> list[str]:
    """Counts captions before the first step, and returns what is to be said of them; empty where
    `config.captions.check_words` has done so. backbone: with the words that methods add.

    Raises:
        RecipeError: a caption or a prompt whose new word is not read.
    """
    words = trained_words(recipe)
    inside = _inside(train) if words else ()
    known = prompt_reader(recipe.backbone) is not None
    if known and not inside:
        return []
    reader = backbone.prompts.reader
    found = count_captions([*recipe.data.captions(), *inside], words, reader)
    check_counted(found, recipe.data.words or words)
    return [*said_of(found, reader), *check_prompts(recipe, reader, words)]


def _inside(train: Dataset) -> list[Caption]:
    """The captions of tars on this machine."""
    if not isinstance(train, Tars) or train.read is not read_local:
        return []
    rng = np.random.default_rng(0)  # they use no random numbers
    return [
        (f"{name}: {entry.key}", train.caption(i, rng), None)
        for i, (name, entry) in enumerate(train.rows)
    ]
