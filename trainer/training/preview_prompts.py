"""What previews show: the prompts of the recipe, or of a run on clips that has none, captions of
its data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trainer.config.partners import shows_captions
from trainer.config.schema import Recipe
from trainer.data.source import Dataset

CAPTIONS = 4  # shown, at most
READ = 16  # clips whose captions are read, at most


def preview_prompts(recipe: Recipe, train: Dataset, say: Callable[[str], None]) -> tuple[str, ...]:
    """The prompts of a run's previews, none for no previews. say: prints which captions are taken.
    An empty list in `preview.prompts` is there to have none."""
    preview = recipe.preview
    if not preview.every:
        return ()
    if not shows_captions(recipe):
        return preview.prompts
    found = captions_of_clips(train)
    if found:
        say(f"preview.prompts is not given; previews show captions of the data: {'; '.join(found)}")
    return found


def captions_of_clips(train: Dataset) -> tuple[str, ...]:
    """The first captions of clips that differ; none of data without clips."""
    clips = [
        number
        for group, frames in zip(train.groups, train.frames, strict=True)
        if frames > 1
        for number in group[:READ]
    ]
    texts = (train.caption(number, np.random.default_rng(0)).strip() for number in clips[:READ])
    return tuple(text for text in dict.fromkeys(texts) if text)[:CAPTIONS]
