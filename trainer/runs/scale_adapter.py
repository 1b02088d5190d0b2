"""An adapter at another strength than it was trained at.

    W = W0 + scale * dW    0 is the base and 1 the adapter, both to the last bit

One scale for all methods of the adapter, or one for some of them by their names; the others then
stay as trained. For methods whose change of the network is such a dW (`Method.linear`): a low-rank
product, a whole matrix, the row of a known word. A new word has no row in the base, so it is there
at every scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from trainer.backbones.backbone import Backbone
from trainer.methods.method import Method
from trainer.ops.adapters.token_rows import ExtendedEmbedding

Scale = float | Mapping[str, float]


def check_linear(path: Path, methods: Mapping[str, Method], key: str = "scale") -> None:
    """Checks that an adapter's methods can be scaled and added. key: the option that asks for it.

    Raises:
        ValueError: names the first that cannot.
    """
    for name, method in methods.items():
        if not method.linear:
            kind = getattr(method, "type", None)
            own = f" of type {kind}" if isinstance(kind, str) else ""
            raise ValueError(
                f"{key}: adapter={path} has methods.{name}{own}, whose effect is no change of "
                "weights in proportion to a scale; use it alone, with scale=1"
            )


def scale_by_method(path: Path, methods: Mapping[str, Method], scale: Scale) -> dict[str, float]:
    """The scale of each method of an adapter.

    Raises:
        ValueError: it has no method of a name, or one that is scaled cannot be.
    """
    given = scale if isinstance(scale, Mapping) else dict.fromkeys(methods, scale)
    for name in given:
        if name not in methods:
            raise ValueError(
                f"scale.{name}: adapter={path} has no methods.{name}; it has {', '.join(methods)}"
            )
    check_linear(path, {name: methods[name] for name, own in given.items() if own != 1})
    return {name: given.get(name, 1.0) for name in methods}


@torch.no_grad()
def copy_scaled(
    model: Backbone,
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    *,
    scales: Mapping[str, float],
) -> None:
    """Copies an adapter's tensors into a model to which its methods were just applied, so that it
    is W0 + scale * dW. wanted: the model's own tensors of their names; scales: of each tensor, by
    its name."""
    layers, words = tuner_layers(model), new_rows(model)
    weakened: dict[str, dict[str, float]] = {}
    for name, own in wanted.items():
        path, adapter = owner_of(name, layers)
        if adapter is not None:
            weakened.setdefault(path, {})[adapter] = scales[name]
        whole = adapter is not None or path in layers or id(own) in words or scales[name] == 1
        own.copy_(tensors[name] if whole else between(own, tensors[name], scales[name]))
    for path, adapters in weakened.items():
        _weaken(layers[path], adapters)


def between(base: Tensor, learned: Tensor, scale: float) -> Tensor:
    """base + scale * (learned - base), computed in float64."""
    start = base.detach().double()
    return start + scale * (learned.to(start) - start)


def tuner_layers(model: Backbone) -> dict[str, Any]:
    """The layers that carry adapters, by path."""
    return {
        name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)
    }


def new_rows(model: Backbone) -> set[int]:
    """The ids of the parameters that are rows of new words."""
    tables = [encoder.get_input_embeddings() for encoder in _encoders(model)]
    return {
        id(row) for table in tables if isinstance(table, ExtendedEmbedding) for row in table.rows
    }


def _encoders(model: Backbone) -> list[Any]:
    return list(model.text_encoders.values())


def owner_of(name: str, layers: Mapping[str, Any]) -> tuple[str, str | None]:
    """The layer with adapters that a tensor is of, and the adapter's name: of
    `unet.x.to_k.lora_B.lora.weight` it is `unet.x.to_k` and `lora`. None where the tensor is a
    weight of the base, or kept beside the adapters; the first is then the tensor's own parent."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        path = ".".join(parts[:end])
        if path not in layers:
            continue
        inside = parts[end:]
        if inside[0] == "base_layer":
            break
        if len(inside) > 1:
            return path, inside[1]
        return path, None
    return name, None


def _weaken(layer: Any, adapters: Mapping[str, float]) -> None:
    """One layer's own adapters, each at its scale; at 0 they are left out, so that not a bit is
    added."""
    for name, scale in adapters.items():
        layer.scaling[name] *= scale
    if 0 in adapters.values():
        rest = [name for name in layer.active_adapters if adapters.get(name) != 0]
        if rest:
            layer.set_adapter(rest)
        else:
            layer.enable_adapters(False)
