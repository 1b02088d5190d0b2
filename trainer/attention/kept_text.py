"""What layers make of a text that stays the same from step to step of a sampler: made once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]


@dataclass
class KeptText:
    """Keys and values by the name of their site, made of one text."""

    text: Tensor | None = None
    version: int = 0  # of the text, which counts changes in place
    made: dict[str, Pair] = field(default_factory=dict)

    def of(self, text: Tensor) -> dict[str, Pair]:
        """What was made of this text; nothing is kept of another one."""
        if text is not self.text or text._version != self.version:
            self.text, self.version, self.made = text, text._version, {}
        return self.made


def same_every_step(layer: Any) -> bool:
    """Whether a layer makes the same of the same input at every step, and nobody watches it: a
    plain linear layer does, and one that says so."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return False
    return type(layer) is nn.Linear or getattr(layer, "same_every_step", False)


def keeps(encoder: Tensor | None, text: Tensor | None) -> bool:
    """Whether to keep what is made of the encoder's output: that is the sampler's own text, and
    nobody differentiates. Compiled code makes it every time."""
    return (
        encoder is not None
        and encoder is text
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )
