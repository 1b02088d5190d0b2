"""What a denoiser is told besides latents and timestep, as a record of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


INTEGERS = ("labels",)  # the fields that are whole numbers
FURTHER = "further"  # the field of what methods own


@dataclass(frozen=True, eq=False)
class Condition:
    """The encoded inputs of b rows; None for what a model or a method does not use.

    tokens (b, n, d) is the text that cross-attention reads, mask (b, n) is 0 at its padding, pooled
    (b, d') the text as a whole. image_tokens (b, m, d'') are those of a reference picture, which
    ops read as `ctx.condition.image_tokens`. channels (b, c, h, w) are joined to the latents, after
    their own channels. crop (b, 6) says which part of a picture is shown: height and width of the
    whole one, top and left of the part, where the whole one is scaled to cover it, and its height
    and width, in pixels. guidance (b,) is the scale of guidance of models that have it as an input.
    labels (b,) are the numbers of classes, integers. further are conditions that methods own, by
    name, each (b, ...), see `further_conditions.py`.
    """

    tokens: Tensor | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None
    image_tokens: Tensor | None = None
    channels: Tensor | None = None
    crop: Tensor | None = None
    guidance: Tensor | None = None
    labels: Tensor | None = None
    further: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name, as a cache of texts stores them; `Condition(**tensors)` is
        the record again. Those of methods are not among them: what makes them may train."""
        names = (item.name for item in fields(self) if item.name != FURTHER)
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """The record of every tensor changed alike."""
        own = {name: change(value) for name, value in self.tensors().items()}
        further = {name: change(value) for name, value in self.further.items()}
        return Condition(**own, further=further)

    def rows(self, chosen: slice) -> Condition:
        """That of some of the rows."""
        return self.map(lambda value: value[chosen])

    def per_frame(self, frames: int) -> Condition:
        """From one row for each clip, b, to one for each frame of it, (b f)."""
        if frames == 1:
            return self
        return self.map(lambda value: value.repeat_interleave(frames, 0))

    def per_clip(self, frames: int) -> Condition:
        """From one row for each frame, (b f), to one for each clip, b: that of its first frame."""
        return self.map(lambda value: value[::frames])

    def to(self, device: torch.device) -> Condition:
        return self.map(lambda value: value.to(device))
