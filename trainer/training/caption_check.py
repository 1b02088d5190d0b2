"""What the loaded backbone reads of captions, where a recipe alone could not tell: its tokenizer
was not on this machine, or the captions are inside tars, here or on a server."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from itertools import islice

import numpy as np

from trainer.backbones.prompt_reader import PromptReader
from trainer.backbones.prompt_tokens import prompt_reader
from trainer.config.captions import (
    check_counted,
    check_prompts,
    count_captions,
    said_of,
    trained_of,
)
from trainer.config.schema import Recipe
from trainer.data.mixed import Mixed
from trainer.data.source import Caption, Dataset
from trainer.data.streams.stream_data import StreamData
from trainer.data.tars.reader import Tars, read_local
from trainer.data.video_clips import VideoClips

# captions of tars that are counted: on a server each is a request of its own; on this machine all
# are where a new word is trained, which every one of them must keep
FROM_SERVER, FROM_HERE = 64, 1000


def check_captions(
    recipe: Recipe, read_by: Callable[[], PromptReader], train: Dataset
) -> list[str]:
    """Counts captions before the first step, and returns what is to be said of them; empty where
    `config.captions.check_words` has done so. read_by: gives how the backbone reads a prompt, with
    the words that methods add.

    Raises:
        RecipeError: a caption or a prompt whose new word is not read.
        ValueError: a caption cannot be read.
    """
    words, outside = trained_of(recipe), list(recipe.data.captions())
    every = bool(words.new or words.known)
    inside, total = _inside(train, every=every, known={text for _, text, _ in outside})
    if prompt_reader(recipe.backbone) is not None and not total:
        return []
    reader = read_by()
    found = count_captions([*outside, *inside], words, reader)
    whole = len(inside) == total
    check_counted(found, words.needed if whole else ())
    said = said_of(found, reader)
    if not whole:
        lacking = [word for word in words.needed if not found.holding.get(word)]
        none = f"; {' and '.join(lacking)} in none of these" if lacking else ""
        said.append(f"captions in shards: the first {len(inside)} of {total} were counted{none}")
    return [*said, *check_prompts(recipe, reader, words.new)]


def _inside(train: Dataset, *, every: bool, known: Collection[str]) -> tuple[list[Caption], int]:
    """The captions inside tars that are counted, and how many there are. every: whether all on this
    machine are to be; known: captions that opening the data did not need to tell."""
    found: list[Caption] = []
    total = 0
    for part in train.parts if isinstance(train, Mixed) else (train,):
        if isinstance(part, VideoClips):  # they are read already
            inside = [video for video in part.videos if video.digest is not None]
            own = [(each.key, each.caption, None) for each in inside if each.caption not in known]
            found, total = [*found, *own], total + len(own)
        elif isinstance(part, StreamData):
            rng = np.random.default_rng(0)
            first = part.first_captions(FROM_SERVER, rng)
            found, total = (
                [*found, *((name, text, None) for name, text in first)],
                total + len(part),
            )
        elif isinstance(part, Tars):
            here = len(part) if every else FROM_HERE
            most = here if part.read is read_local else FROM_SERVER
            found, total = [*found, *islice(_of_tars(part), most)], total + len(part)
    return found, total


def _of_tars(tars: Tars) -> Iterator[Caption]:
    rng = np.random.default_rng(0)  # they use no random numbers
    for index, (name, entry) in enumerate(tars.rows):
        yield f"{name}: {entry.key}", tars.caption(index, rng), None
