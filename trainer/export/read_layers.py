"""Reads the layers of an adapter file in any spelling: tensors by name to what they add to each
layer of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trainer.backbones.four_bits import unpacked
from trainer.export.apply_bundle import layer_at
from trainer.export.bundle import Bundle, Delta, DoRADelta, Form, FullDelta, LowRankDelta
from trainer.export.layer_names import comfy_parameters
from trainer.export.lycoris import form_of, rank_of, weight_of
from trainer.export.peft_fields import Fields, rank_in, strength, without_start
from trainer.export.read_names import Names
from trainer.export.side_by_side import apart
from trainer.export.tensor_kinds import MERGE, check_complete, kinds_by_layer

NOWHERE = (
    "either it was made for another kind of model, then give that as backbone, or by a tool whose "
    "names are not known here; diffusers' names are, with lora_A and lora_B"
)


@dataclass(frozen=True)
class Layer:
    """A layer of the model that a file changes: where it is, itself, and its name in the file."""

    path: str
    module: Any
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.module.weight.shape)


@torch.no_grad()
def read_layers(
    tensors: Mapping[str, Tensor],
    base: Any,
    fields: Callable[[str], Fields] | None = None,
) -> Bundle:
    """What a file adds to each layer, with notes for the user on what the file leaves open.

    fields: returns the peft configuration of a layer's part by the layer's name, `{}` for none. If
    it is None, a missing `.alpha` counts as the rank, which is a factor of 1.

    Raises:
        ValueError: a tensor of an unknown kind, a pair with only one matrix, or a layer that the
            backbone does not have or has in another shape.
    """
    names = comfy_parameters(base)
    bare = {name: tensors[f"{key}.diff"] for name, key in names.items() if f"{key}.diff" in tensors}
    keys = {f"{names[name]}.diff" for name in bare}
    tensors = {key: value for key, value in tensors.items() if key not in keys}
    by_layer = kinds_by_layer(tensors)
    check_complete(by_layer)
    where = _places(by_layer, base)
    layers: dict[str, Delta] = {}
    forms: dict[str, Form] = {}
    without_alpha = 0
    for name, kinds in by_layer.items():
        own = None if fields is None else fields(name)
        found = _one(name, kinds, own)
        without_alpha += _guesses(found, kinds, own)
        for layer, part in _split(found, where[name]):
            if isinstance(part, Form):
                forms[layer.path] = part
                part = FullDelta(weight_of(part, layer.shape))
            part = _fitting(part, layer, base.name)
            if not isinstance(part, FullDelta):
                part = without_start(own or {}, part, layer.module.weight)
            if _changes(part):
                layers[layer.path] = part
    notes = _notes(without_alpha, [name for name, own in where.items() if not own])
    return Bundle(layers, {}, forms=forms, bare=bare, notes=notes)


def _notes(without_alpha: int, idle: list[str]) -> tuple[str, ...]:
    """What a file leaves open, and the layers in it that this backbone does not run."""
    found = []
    if without_alpha:
        found.append(
            f"{without_alpha} layers have no alpha: their rank is used, which is a factor of 1"
        )
    if idle:
        found.append(
            f"{len(idle)} layers are of a block of the text encoder that this backbone does not "
            f"run, as {idle[0]}: they change nothing and are left out"
        )
    return tuple(found)


def _changes(part: Delta) -> bool:
    """Whether a delta is not zero: pairs of zeros, and zeros in a fused layer, fill a file up."""
    if isinstance(part, FullDelta):
        return any(value is not None and bool(value.any()) for value in (part.weight, part.bias))
    return isinstance(part, DoRADelta) or bool(part.up.any())


def _places(by_layer: Mapping[str, object], base: Any) -> dict[str, list[Layer]]:
    """The layers of the base that each name in the file stands for."""
    names = Names(base)
    found = {name: names.find(name) for name in by_layer}
    if unknown := [name for name, paths in found.items() if paths is None]:
        raise ValueError(
            f"the file adapts {unknown[0]}, {len(unknown)} such layers of {len(by_layer)}, which "
            f"backbone {base.name} does not have: {NOWHERE}"
        )
    seen: dict[str, str] = {}
    placed: dict[str, list[Layer]] = {name: [] for name in by_layer}
    for name, paths in found.items():
        for path in paths or ():
            if path in seen:
                raise ValueError(f"the file adapts {path} twice, as {seen[path]} and as {name}")
            seen[path] = name
            layer = Layer(path, unpacked(layer_at(base, path)), name)
            if getattr(layer.module, "groups", 1) > 1:
                raise ValueError(
                    f"the file adapts {path}, a convolution in groups, whose weight cannot hold "
                    f"the product of two matrices; {MERGE}"
                )
            placed[name].append(layer)
    return placed


def _one(name: str, kinds: Mapping[str, Tensor], fields: Fields | None) -> Delta | Form:
    """What a name's tensors are, in the shapes of the file, with its strength."""
    found: DoRADelta | LowRankDelta | Form
    if form := form_of(kinds):
        if "dora" in kinds:
            raise ValueError(f"the file holds DoRA over {form.type} of {name}; {MERGE}")
        found, rank = form, rank_of(form)
    elif "down" in kinds:
        found = _pair(name, kinds, fields or {})
        rank = found.rank
    else:
        return FullDelta(kinds.get("diff"), kinds.get("diff_b"))
    if fields is not None and "alpha" not in kinds:
        rank = rank or rank_in(fields, name)
        return replace(found, scale=strength(fields, name, rank))
    if rank is None or "alpha" not in kinds:
        return found
    if kinds["alpha"].numel() != 1:
        raise ValueError(f"the file's alpha of {name} is not one number but many")
    return replace(found, scale=float(kinds["alpha"]) / rank)


def _guesses(found: Delta | Form, kinds: Mapping[str, Tensor], fields: Fields | None) -> bool:
    """Whether nothing in the file gives the strength of a layer that has one."""
    if isinstance(found, FullDelta) or (isinstance(found, Form) and rank_of(found) is None):
        return False
    return "alpha" not in kinds and not {"lora_alpha", "alpha"} & set(fields or {})


def _pair(name: str, kinds: Mapping[str, Tensor], fields: Fields) -> LowRankDelta | DoRADelta:
    down, up = kinds["down"], kinds["up"]
    if "mid" in kinds:  # up (o, r, 1, 1), mid (r, s, kh, kw), down (s, i, 1, 1)
        down = torch.einsum("rskl,si->rikl", kinds["mid"], down.flatten(1))
    if up.flatten(1).shape[1] != len(down):
        raise ValueError(
            f"the file's two matrices of {name} do not fit: down {tuple(down.shape)}, up "
            f"{tuple(up.shape)}"
        )
    if (magnitude := kinds.get("magnitude")) is None and "dora" in kinds:
        magnitude = kinds["dora"]
        if magnitude.ndim < 2:
            raise ValueError(
                f"the file holds dora_scale of {name} as {tuple(magnitude.shape)}, which does not "
                f"say whether it has norms of rows or of columns; no tool is known that writes it "
                f"so, and {MERGE}"
            )
        if magnitude.shape != (len(up), *[1] * (magnitude.ndim - 1)):
            raise ValueError(
                f"the file holds dora_scale of {name} as {tuple(magnitude.shape)}: DoRA over "
                f"inputs, the norms of columns of W0; that which is trained here, as peft's, has "
                f"the norms of rows, ({len(up)}, 1). Train with wd_on_output=True or OneTrainer's "
                f"output axis, or {MERGE}"
            )
    if magnitude is not None:
        return DoRADelta(down, up, magnitude)
    if fields.get("use_dora"):
        raise ValueError(f"the file is DoRA and lacks lora_magnitude_vector of {name}")
    return LowRankDelta(down, up)


def _split(found: Delta | Form, layers: list[Layer]) -> list[tuple[Layer, Delta | Form]]:
    """What a name's tensors are for each of its layers: a fused one's rows are those of several."""
    if len(layers) < 2:
        return [(layer, found) for layer in layers]
    sizes = [layer.shape[0] for layer in layers]
    if isinstance(found, Form):
        found = FullDelta(weight_of(found, (sum(sizes), layers[0].shape[1])))
    rows: Tensor | None
    if isinstance(found, FullDelta):
        rows = found.bias if found.weight is None else found.weight
    else:
        rows = found.up
    assert rows is not None
    if len(rows) != sum(sizes):
        raise ValueError(
            f"the file's {layers[0].name} has {len(rows)} rows, and {len(layers)} layers here have "
            f"{' + '.join(map(str, sizes))}; the file was made for another backbone"
        )
    return list(zip(layers, _slices(found, sizes), strict=True))


def _slices(found: Delta, sizes: list[int]) -> list[Delta]:
    """A delta's rows in runs of these sizes."""
    if isinstance(found, FullDelta):
        weights, biases = (
            [None] * len(sizes) if whole is None else list(whole.split(sizes))
            for whole in (found.weight, found.bias)
        )
        return [FullDelta(w, b) for w, b in zip(weights, biases, strict=True)]
    if isinstance(found, LowRankDelta):
        return list(apart(found, sizes))
    ups = found.up.split(sizes)
    lengths = found.magnitude.flatten().split(sizes)
    return [replace(found, up=up, magnitude=m) for up, m in zip(ups, lengths, strict=True)]


def _fitting(delta: Delta, layer: Layer, backbone: str) -> Delta:
    """The delta in the shapes that its layer has here. Tools write the matrices of a linear layer
    as those of a 1x1 convolution and the other way round."""
    own, bias = layer.shape, getattr(layer.module, "bias", None)
    if isinstance(delta, FullDelta):
        if delta.bias is not None and bias is None:
            raise ValueError(f"the file changes a bias of {layer.path} that {backbone} has not")
        if delta.bias is not None and bias is not None and delta.bias.shape != bias.shape:
            raise ValueError(
                f"the file changes the bias of {layer.path} by {tuple(delta.bias.shape)} values, "
                f"and in backbone {backbone} it has {tuple(bias.shape)}; the file was made for "
                "another backbone"
            )
        if delta.weight is None:
            return delta
        _check_shape(tuple(delta.weight.shape), layer, backbone)
        return replace(delta, weight=delta.weight.reshape(own))
    _check_shape((len(delta.up), *delta.down.shape[1:]), layer, backbone)
    ones = (1,) * (len(own) - 2)
    fitting = replace(
        delta,
        down=delta.down.reshape(-1, *own[1:]),
        up=delta.up.reshape(own[0], -1, *ones),
    )
    if not isinstance(fitting, DoRADelta):
        return fitting
    if fitting.magnitude.numel() != own[0]:
        raise ValueError(
            f"the file's magnitudes of {layer.path} are {tuple(fitting.magnitude.shape)}; it has "
            f"{own[0]} rows"
        )
    shape = (1, own[0], *ones) if ones else (own[0],)
    return replace(fitting, magnitude=fitting.magnitude.reshape(shape))


def _check_shape(found: tuple[int, ...], layer: Layer, backbone: str) -> None:
    own = layer.shape
    matrix = (own[0], math.prod(own[1:]))
    if _trimmed(found) != _trimmed(own) and found != matrix:
        raise ValueError(
            f"the file changes {layer.path} of shape {found}; in backbone {backbone} it is {own}, "
            "so the file was made for another backbone"
        )


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without ones at its end."""
    return _trimmed(shape[:-1]) if len(shape) > 1 and shape[-1] == 1 else shape
