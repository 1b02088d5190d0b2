"""The prompts that the steps to come will bring, found without reading a picture.

A caption that draws no random number is always the same: it is asked for once, and when all samples
have such ones and each was met, no later step can bring another prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainer.backbones.backbone import Backbone
from trainer.data.loader import Planned
from trainer.data.mixed import Mixed
from trainer.data.plan import Slot
from trainer.data.source import Ordered
from trainer.data.tars.reader import Tars
from trainer.training.tasks.denoise import Denoise, kept_captions

MOST_BYTES = 16 * 10**9  # of the encodings of a run
MOST_CAPTIONS = 1_000_000  # that are looked at before the first step


class UnknownPromptsError(Exception):
    """They cannot be listed before the first step; says why."""


class CaptionsToCome:
    """The captions of a rank's batches. fixed: those that are always the same, by sample; varied:
    the samples of the others."""

    def __init__(self, batches: Planned) -> None:
        self.batches = batches
        self.fixed: dict[int, str] = {}
        self.varied: set[int] = set()

    def of(self, step: int) -> tuple[list[int], list[str]]:
        """The places and captions of a batch."""
        slots = self.batches.slots(step)
        return [slot.place for slot in slots], [self._one(slot, step) for slot in slots]

    def all(self) -> set[str] | None:
        """Every caption that any step can bring; None while that is not known."""
        if len(self.fixed) < len(self.batches.dataset):
            return None
        return set(self.fixed.values())

    def _one(self, slot: Slot, step: int) -> str:
        found = self.fixed.get(slot.index)
        if found is not None:
            return found
        rng = self.batches.generator(slot, step)
        if slot.index in self.varied:
            return self.batches.dataset.caption(slot.index, rng)
        before = rng.bit_generator.state
        caption = self.batches.dataset.caption(slot.index, rng)
        if rng.bit_generator.state == before:
            self.fixed[slot.index] = caption
        else:
            self.varied.add(slot.index)
        return caption


def coming(task: Denoise, batches: Planned, steps: Sequence[int]) -> set[str]:
    """The prompts of these steps, each once, after caption dropout.

    Raises:
        UnknownPromptsError: reading a caption means reading a shard, the prompts are more than can
            be kept, or the captions more than are looked at.
    """
    data = batches.dataset
    if any(
        isinstance(part, Tars | Ordered)
        for part in (data.parts if isinstance(data, Mixed) else (data,))
    ):
        raise UnknownPromptsError("captions in shards are not known before their pictures are read")
    captions, most = CaptionsToCome(batches), most_prompts(task.backbone)
    dropout = task.caption_dropout
    found: set[str] = set()
    every: set[str] | None = None
    seen = 0
    for step in steps:
        places, own = captions.of(step)
        seeds = [(task.seed, "train", step, place) for place in places]
        found.update(kept_captions(own, seeds, dropout))
        every = every or captions.all()
        if every is not None and found >= every and (not dropout or "" in found):
            break
        if len(found) > most:
            raise UnknownPromptsError(
                f"more than {most:,} different prompts are to come, whose encodings may take more "
                f"than {MOST_BYTES / 10**9:g} GB"
            )
        seen += len(own)
        if seen > MOST_CAPTIONS:
            raise UnknownPromptsError(
                f"the prompts of more than {MOST_CAPTIONS:,} captions would have to be looked at"
            )
    return found


def room_of_files() -> int:
    """Bytes of encodings that a run keeps in files where it does not know its prompts before."""
    return MOST_BYTES


def most_prompts(backbone: Backbone) -> int:
    """How many prompts may be kept, whose encodings take as much as they can."""
    shapes = backbone.text_shapes.values()
    return MOST_BYTES // (4 * sum(int(torch.Size(shape).numel()) for shape in shapes))
