"""A model that is sampled: no weight and no text changes from step to step, so what follows from
them alone is calculated once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from trainer.ops.adapters.fused_lora import adapters_folded

if TYPE_CHECKING:
    from trainer.backbones.backbone import Backbone


@contextmanager
def settled(backbone: Backbone) -> Iterator[None]:
    """Inside, adapters are folded into copies of their weights, and cross-attention makes keys and
    values of the prompts once. Compiled blocks stay as they were compiled."""
    if any(block._compiled_call_impl is not None for block in backbone.blocks()):
        yield
        return
    with adapters_folded(backbone.denoiser), backbone.host.holder.keeping_text():
        yield
