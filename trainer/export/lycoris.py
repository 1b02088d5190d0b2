"""LoHa and LoKr between LyCORIS' files, peft's layers and full deltas: the same tensors in all of
them, but for the strength of a LoKr of two full matrices, which LyCORIS takes as 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.loha import LoHaLayer
from peft.tuners.lokr import LoKrLayer
from torch import Tensor

from trainer.export.bundle import Form

PREFIXES = {"loha": "hada_", "lokr": "lokr_"}


def form_of(kinds: Mapping[str, Tensor]) -> Form | None:
    """The form that a layer's tensors by kind are; None if they are of another kind."""
    for kind, prefix in PREFIXES.items():
        own = {name: value for name, value in kinds.items() if name.startswith(prefix)}
        if own:
            return Form(kind, own)
    return None


def rank_of(form: Form) -> int | None:
    """The rank that alpha is divided by; None for a LoKr of two full matrices."""
    inner = (form.tensors.get(name) for name in ("hada_w1_b", "lokr_w1_b", "lokr_w2_b"))
    return next((len(matrix) for matrix in inner if matrix is not None), None)


def weight_of(form: Form, shape: tuple[int, ...]) -> Tensor:
    """dW in the shape of a layer's weight, (out, in) or (out, in, kh, kw).

    Raises:
        ValueError: the factors do not fit each other or the shape.
    """
    try:
        whole = _hadamard(form.tensors) if form.type == "loha" else _kronecker(form.tensors)
        return (whole * form.scale).reshape(shape)
    except RuntimeError as error:
        sizes = {name: tuple(value.shape) for name, value in form.tensors.items()}
        raise ValueError(f"{form.type} of {sizes} gives no weight of {shape}: {error}") from None


def _hadamard(own: Mapping[str, Tensor]) -> Tensor:
    halves = [
        _product(own[f"hada_w{i}_a"], own[f"hada_w{i}_b"], own.get(f"hada_t{i}")) for i in (1, 2)
    ]
    return halves[0] * halves[1]


def _kronecker(own: Mapping[str, Tensor]) -> Tensor:
    left, right = own.get("lokr_w1"), own.get("lokr_w2")
    if left is None:
        left = own["lokr_w1_a"] @ own["lokr_w1_b"]
    if right is None:
        right = _product(own["lokr_w2_a"], own["lokr_w2_b"], own.get("lokr_t2"))
    left = left.reshape(*left.shape, *[1] * (right.ndim - left.ndim))
    return torch.kron(left, right.contiguous())


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """a (out, r) b (r, in), or with a core (r, r, kh, kw) a (r, out) and b (r, in)."""
    if core is None:
        return a @ b
    return torch.einsum("ijkl,ip,jq->pqkl", *(core, a, b))


def of_layer(layer: Any) -> Form | None:
    """The form of a peft layer's adapter; None if it is neither LoHa nor LoKr, or not one alone."""
    kinds = {"loha": LoHaLayer, "lokr": LoKrLayer}
    kind = next((name for name, own in kinds.items() if isinstance(layer, own)), None)
    if kind is None or layer.disable_adapters or len(layer.active_adapters) != 1:
        return None
    (adapter,) = layer.active_adapters
    tables = {name: getattr(layer, name) for name in layer.adapter_layer_names}
    own = {name: t[adapter].detach().clone() for name, t in tables.items() if adapter in t}
    return Form(kind, own, float(layer.scaling[adapter]))


def file_tensors(key: str, form: Form) -> dict[str, Tensor]:
    """A form's tensors in a LyCORIS file under a layer's key. Readers take the strength of two full
    matrices as 1, so there it is multiplied into the second."""
    rank, own = rank_of(form), dict(form.tensors)
    if rank is None:
        own["lokr_w2"] = own["lokr_w2"] * form.scale
    alpha = torch.tensor(1.0 if rank is None else form.scale * rank)
    return {f"{key}.{name}": value for name, value in own.items()} | {f"{key}.alpha": alpha}
