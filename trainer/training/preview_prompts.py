"""What previews show: the prompts of the recipe, or of a run on clips that has none, captions of
its data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    return tuple(_captioned(train))[:CAPTIONS]


def shown_samples(train: Dataset, prompts: Sequence[str]) -> list[int]:
    """The sample of the data whose further inputs, as its depth, each preview has: the one whose
    caption the prompt is, or else the first clips in turn, or pictures of data without clips."""
    most = max(train.frames)
    own, captioned = train.groups[list(train.frames).index(most)], _captioned(train)
    return [captioned.get(text, own[i % len(own)]) for i, text in enumerate(prompts)]


def _captioned(train: Dataset) -> dict[str, int]:
    """The captions of the first clips, each with the number of its sample."""
    clips = [
        number
        for group, frames in zip(train.groups, train.frames, strict=True)
        if frames > 1
        for number in group[:READ]
    ][:READ]
    found: dict[str, int] = {}
    for number in clips:
        if text := train.caption(number, np.random.default_rng(0)).strip():
            found.setdefault(text, number)
    return found
