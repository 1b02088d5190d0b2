"""What an adapted model adds to its base, read from the two models."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraConv2dVariant, DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from trainer.attention.insertion import insertions
from trainer.backbones.four_bits import unpacked
from trainer.export.apply_bundle import layer_at, parts
from trainer.export.bundle import Bundle, Delta, DoRADelta, Form, FullDelta, LowRankDelta
from trainer.export.lycoris import of_layer
from trainer.ops.adapters.inject import fold
from trainer.ops.adapters.token_rows import ExtendedEmbedding, relearned, relearned_words

DORA = (DoraLinearVariant, DoraConv2dVariant)


@torch.no_grad()
def extract(adapted: Any, base: Any, stored: Iterable[str]) -> Bundle:
    """The bundle that turns `base` into `adapted`, except for inserted layers.

    stored: the names of the adapter's tensors; nothing else of the model may differ.

    Raises:
        ValueError: an adapter changes a layer in a way that no weight can express.
    """
    new = inserted(adapted, base)
    left = {name for name in stored if not name.startswith(new)}
    layers: dict[str, Delta] = {}
    forms: dict[str, Form] = {}
    for path, layer in _tuner_layers(adapted):
        if path.startswith(new):
            continue
        if reason := getattr(layer, "unfoldable", None):
            raise ValueError(f"no file of weights can carry {path}: {reason}")
        own = {name for name in left if name.startswith(f"{path}.")}
        trained = any(name.startswith(f"{path}.base_layer.") for name in own)
        layers[path] = _of_tuner(layer, layer_at(base, path), trained)
        if not trained and (form := of_layer(layer)):
            forms[path] = form
        left -= own
    tokens, new_rows = _new_words(adapted)
    known, known_rows = _known_words(adapted)
    names = left - new_rows - known_rows
    bare = _bare_changes(adapted, base, names)
    full, dropped = _full_deltas(adapted, base, names - bare.keys())
    return Bundle(layers | full, tokens, known=known, forms=forms, bare=bare, dropped=dropped)


def inserted(adapted: Any, base: Any) -> tuple[str, ...]:
    """The prefixes of the names of all layers that were inserted into the denoiser and that the
    base lacks."""
    blocks = {id(found.block) for found in insertions(adapted.denoiser)}
    known = {name for name, _ in base.denoiser.named_modules()}
    return tuple(
        f"{adapted.denoiser_name}.{name}."
        for name, module in adapted.denoiser.named_modules()
        if id(module) in blocks and name not in known
    )


def _tuner_layers(model: Any) -> Iterator[tuple[str, Any]]:
    for part, module in parts(model).items():
        for name, layer in module.named_modules():
            if isinstance(layer, BaseTunerLayer):
                yield f"{part}.{name}", layer


def _of_tuner(layer: Any, plain: nn.Module, trained: bool) -> Delta:
    """A peft layer's delta: low-rank where it is plain LoRA or DoRA, else a full dW.

    trained: whether the layer's own weight was trained too.
    """
    active = [name for name in layer.active_adapters if name in getattr(layer, "lora_A", {})]
    simple = isinstance(layer, LoraLayer) and not trained and not layer.disable_adapters
    if simple and active and not any(layer.lora_bias.get(name) for name in active):
        variants = [layer.lora_variant.get(name) for name in active]
        if not any(variants):
            return _summed(layer, active)
        if len(active) == 1 and isinstance(variants[0], DORA):
            (name,) = active
            down, up = (matrix[name].weight.clone() for matrix in (layer.lora_A, layer.lora_B))
            magnitude = layer.lora_magnitude_vector[name].weight.clone()
            return DoRADelta(down, up, magnitude, scale=float(layer.scaling[name]))
    alone = nn.Sequential(copy.deepcopy(layer))
    fold(alone)
    folded: Any = alone[0]
    old: Any = unpacked(plain)
    bias = None if folded.bias is None else _changed(folded.bias, old.bias)
    return FullDelta(folded.weight - old.weight, bias)


def _summed(layer: Any, active: list[str]) -> LowRankDelta:
    """sum_i scale_i up_i down_i as one pair whose rank is the sum of the ranks. A single adapter
    keeps its matrices and its scale."""
    downs = [layer.lora_A[name].weight for name in active]
    ups = [layer.lora_B[name].weight for name in active]
    scales = [float(layer.scaling[name]) for name in active]
    if len(active) == 1:
        return LowRankDelta(downs[0].clone(), ups[0].clone(), scales[0])
    scaled = [up * scale for up, scale in zip(ups, scales, strict=True)]
    return LowRankDelta(torch.cat(downs), torch.cat(scaled, dim=1))


def _new_words(model: Any) -> tuple[dict[str, dict[str, Tensor]], set[str]]:
    """Each new word's rows by text encoder, and the names of those tensors in the adapter."""
    tokens: dict[str, dict[str, Tensor]] = {}
    stored: set[str] = set()
    for part, encoder in model.text_encoders.items():
        table = encoder.get_input_embeddings()
        if not isinstance(table, ExtendedEmbedding):
            continue
        words = model.tokenizers[part].convert_ids_to_tokens(list(table.ids))
        names = {id(parameter): name for name, parameter in encoder.named_parameters()}
        for word, row in zip(words, table.rows, strict=True):
            tokens.setdefault(word, {})[part] = row.detach().clone()
            stored.add(f"{part}.{names[id(row)]}")
    return tokens, stored


def _known_words(model: Any) -> tuple[dict[str, dict[str, Tensor]], set[str]]:
    """The trained rows of words of the vocabulary by text encoder, and the names of those tensors
    in the adapter."""
    known: dict[str, dict[str, Tensor]] = {}
    stored: set[str] = set()
    for part, encoder in model.text_encoders.items():
        if (table := relearned(encoder)) is not None:
            words = relearned_words(encoder, model.tokenizers[part])
            for word, row in zip(words, table.rows, strict=True):
                known.setdefault(word, {})[part] = row.detach().clone()
            own = {id(row) for row in table.rows}
            stored |= {f"{part}.{n}" for n, p in encoder.named_parameters() if id(p) in own}
    return known, stored


def _full_deltas(
    adapted: Any, base: Any, names: set[str]
) -> tuple[dict[str, FullDelta], tuple[str, ...]]:
    """The changes of weights and biases that were trained themselves, and those of `names` that are
    neither a weight nor a bias of the base."""
    own, old = dict(adapted.named_parameters()), dict(base.named_parameters())
    known = {name for name in names if name in old and name.endswith((".weight", ".bias"))}
    found: dict[str, FullDelta] = {}
    for path in sorted({name.rpartition(".")[0] for name in known}):
        weight, bias = (
            _changed(own[name], old[name]) if (name := f"{path}.{leaf}") in known else None
            for leaf in ("weight", "bias")
        )
        if weight is not None or bias is not None:
            found[path] = FullDelta(weight, bias)
    return found, tuple(sorted(names - known))


def _bare_changes(adapted: Any, base: Any, names: set[str]) -> dict[str, Tensor]:
    """The changes of those parameters of `names` that the base has outside its layers."""
    own, old = dict(adapted.named_parameters()), dict(base.named_parameters())
    bare = [name for name in names if name in old and not name.endswith((".weight", ".bias"))]
    changes = {name: _changed(own[name], old[name]) for name in sorted(bare)}
    return {name: change for name, change in changes.items() if change is not None}


def _changed(new: Tensor, old: Tensor) -> Tensor | None:
    return None if torch.equal(new, old) else new.detach() - old
