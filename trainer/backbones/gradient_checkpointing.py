"""Gradient checkpointing of text encoders: the backward pass calculates a layer's activations
again, which takes less memory and more time (arXiv 1604.06174)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

CACHES = ("past_key_values", "past_key_value")


def checkpoint_layers(encoder: nn.Module) -> None:
    """Makes every layer of a text encoder of transformers keep its inputs only.

    transformers itself does so in train mode alone. A text encoder of which only a word or an
    adapter trains is in eval mode, so that its dropout is off.

    Raises:
        ValueError: the encoder has no layers that transformers can checkpoint.
    """
    layers = [each for each in encoder.modules() if isinstance(each, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"run.gradient_checkpointing: {type(encoder).__name__} has no layers that can be "
            "calculated again; leave it out"
        )
    for layer in layers:
        layer.forward = partial(_again, layer.forward)


def _again(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # language models keep keys and values for the next token; the second time they would be added
    # to those of the first
    kwargs |= {name: None for name in CACHES if name in kwargs}
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
