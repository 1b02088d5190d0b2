"""Which options of `methods.peft_adapter` make the layers of a LoHa or LoKr file, and the values of
their tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig
from peft.tuners.loha import layer as loha
from peft.tuners.lokr import layer as lokr
from torch import Tensor, nn

from trainer.backbones.four_bits import unpacked
from trainer.export.apply_bundle import layer_at
from trainer.export.bundle import Form
from trainer.export.lycoris import rank_of

SCALED = ("hada_w2_b", "lokr_w1", "lokr_w1_b")  # one of these takes the rest of a layer's strength
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class FormOptions:
    """type and options of the method, its ranks of single layers, and by module path the tensors
    that its layers hold."""

    type: str
    options: dict[str, Any]
    ranks: dict[str, int]
    tensors: dict[str, dict[str, Tensor]]


def options_of(forms: Mapping[str, Form], base: Any) -> FormOptions | None:
    """The options for the kind of form that most layers have; None if there is none, or if peft
    makes other tensors of these layers whatever its options."""
    if not forms:
        return None
    kind = Counter(form.type for form in forms.values()).most_common(1)[0][0]
    own = {path: form for path, form in forms.items() if form.type == kind}
    ranks = _ranks(own)
    usual = Counter(ranks.values()).most_common(1)[0][0]
    layers = {path: unpacked(layer_at(base, path)) for path in own}
    for more in _candidates(kind, own):
        if all(_shapes(layers[p], ranks[p], kind=kind, more=more) == _sizes(own[p]) for p in own):
            alpha = round(own[next(p for p in own if ranks[p] == usual)].scale * usual) or usual
            return FormOptions(
                kind,
                options={"r": usual, "alpha": alpha, **more},
                ranks={path: rank for path, rank in ranks.items() if rank != usual},
                tensors={path: _scaled(own[path], alpha / ranks[path]) for path in own},
            )
    return None


def _ranks(forms: Mapping[str, Form]) -> dict[str, int]:
    """Every layer's rank. That of a LoKr of two full matrices is not in the file: one from which on
    peft makes all of them full."""
    found = {path: rank_of(form) for path, form in forms.items()}
    sides = [
        side
        for path, form in forms.items()
        if found[path] is None
        for name in ("lokr_w1", "lokr_w2")
        for side in form.tensors[name].shape[:2]
    ]
    least = max((-(-side // 2) for side in sides), default=1)
    return {path: least if rank is None else rank for path, rank in found.items()}


def _candidates(kind: str, forms: Mapping[str, Form]) -> Iterator[dict[str, Any]]:
    """The options that a file's layers may have been made with, apart from the rank."""
    cores = any(name.endswith(("t1", "t2")) for form in forms.values() for name in form.tensors)
    if kind == "loha":
        yield {"use_effective_conv2d": cores}
        return
    firsts = {
        side
        for form in forms.values()
        for name in ("lokr_w1", "lokr_w1_a")
        if name in form.tensors
        for side in form.tensors[name].shape
    }
    both = any("lokr_w1_a" in form.tensors for form in forms.values())
    for factor in (-1, *sorted(firsts, reverse=True)):
        yield {
            "use_effective_conv2d": cores, "decompose_both": both, "decompose_factor": factor
        }  # fmt: skip


def _shapes(layer: nn.Module, rank: int, *, kind: str, more: Mapping[str, Any]) -> Shapes:
    """The tensors that peft makes of a layer."""
    module, config = (loha, LoHaConfig) if kind == "loha" else (lokr, LoKrConfig)
    kinds: dict[type, Any] = {nn.Linear: module.Linear, nn.Conv2d: module.Conv2d}
    with torch.device("meta"):
        made = kinds[type(layer)](layer, "x", config(**more), r=rank, alpha=1)
    tables = {name: getattr(made, name) for name in made.adapter_layer_names}
    return {name: tuple(table["x"].shape) for name, table in tables.items() if "x" in table}


def _sizes(form: Form) -> Shapes:
    return {name: tuple(value.shape) for name, value in form.tensors.items()}


def _scaled(form: Form, strength: float) -> dict[str, Tensor]:
    """The tensors with which a layer of that strength has the form's dW."""
    factor = form.scale / strength
    name = next(name for name in SCALED if name in form.tensors)
    return {**form.tensors, name: form.tensors[name] * factor}
