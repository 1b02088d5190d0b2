"""Adds a bundle to a plain model by its own arithmetic: the reader that needs no other tool."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.backbones.four_bits import unpacked
from trainer.export.bundle import Bundle, Delta, DoRADelta, FullDelta, LowRankDelta
from trainer.ops.adapters.inject import part_of
from trainer.ops.adapters.token_rows import extend, known_id


def parts(model: Any) -> dict[str, nn.Module]:
    """The parts that adapters change, by name: the denoiser and the text encoders."""
    return {model.denoiser_name: model.denoiser, **model.text_encoders}


def layer_at(model: Any, path: str) -> nn.Module:
    """The layer at a module path whose first component is the part's name."""
    part, _, name = path.partition(".")
    return part_of(model, part).get_submodule(name)


def product(delta: LowRankDelta | DoRADelta) -> Tensor:
    """scale * up down as a matrix (out, in * kh * kw)."""
    return delta.scale * (delta.up.flatten(1) @ delta.down.flatten(1))


def full_delta(delta: Delta, layer: nn.Module) -> FullDelta:
    """dW and db of a delta on a plain layer, in the shapes of its weight and bias."""
    if isinstance(delta, FullDelta):
        return delta
    weight: Any = layer.weight
    if isinstance(delta, LowRankDelta):
        return FullDelta(product(delta).view_as(weight))
    moved = weight.flatten(1) + product(delta)
    rows = delta.magnitude.flatten()[:, None] * moved / moved.norm(dim=1, keepdim=True)
    return FullDelta(rows.view_as(weight) - weight)


@torch.no_grad()
def add_to(base: Any, bundle: Bundle) -> Any:
    """Adds every delta and every word of a bundle to a plain model, in place; returns the model."""
    for path, delta in bundle.layers.items():
        layer: Any = unpacked(layer_at(base, path))
        part, _, name = path.partition(".")
        part_of(base, part).set_submodule(name, layer)
        change = full_delta(delta, layer)
        if change.weight is not None:
            layer.weight.add_(change.weight)
        if change.bias is not None:
            layer.bias.add_(change.bias)
    own = dict(base.named_parameters())
    for name, moved in bundle.bare.items():
        own[name].add_(moved)
    for word, rows in bundle.known.items():
        for part, row in rows.items():
            table: Any = base.text_encoders[part].get_input_embeddings()
            table.weight[known_id(base.tokenizers[part], word)] = row
    for part, encoder in base.text_encoders.items():
        words = [word for word, own in bundle.tokens.items() if part in own]
        if words:
            module: Any = encoder
            extend(module, base.tokenizers[part], tokens=words, words=[None] * len(words))
            for row, word in zip(module.get_input_embeddings().rows, words, strict=True):
                row.copy_(bundle.tokens[word][part])
    return base
