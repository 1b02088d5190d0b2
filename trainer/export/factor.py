"""Whole deltas as products of two matrices, for the forms that hold nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.export.apply_bundle import product
from trainer.export.bundle import Bundle, Delta, DoRADelta, FullDelta, LowRankDelta


def factored(bundle: Bundle, form: str) -> Mapping[str, LowRankDelta | DoRADelta]:
    """Every layer as LoRA or DoRA; a whole dW becomes one of full rank, which is the same dW.

    Raises:
        ValueError: a bias or a norm's weight changed, which no product of two matrices holds.
    """
    found: dict[str, LowRankDelta | DoRADelta] = {}
    for path, delta in bundle.layers.items():
        if isinstance(delta, FullDelta):
            if delta.bias is not None or delta.weight is None or delta.weight.ndim < 2:
                what = "weight" if delta.bias is None else "bias"
                raise ValueError(
                    f"format={form} cannot carry the trained {what} of {path}: it holds low-rank "
                    "matrices only; format=merged carries it, format=diff where a UI has a name "
                    "for it"
                )
            delta = exact(delta.weight)
        found[path] = delta
    return found


def exact(weight: Tensor) -> LowRankDelta:
    """dW (out, in, ...) as itself times the identity, on the side that gives the smaller rank."""
    rows = weight.flatten(1)  # out, in * kh * kw
    out, width = rows.shape
    down = rows if out <= width else torch.eye(width, dtype=rows.dtype)
    up = torch.eye(out, dtype=rows.dtype) if out <= width else rows
    return _shaped(down, up, weight.shape)


def truncated(bundle: Bundle, rank: int) -> tuple[Bundle, float]:
    """The bundle with every dW cut to its `rank` largest singular directions (DoRA as it is), and
    the least energy, the sum of squares of the singular values, that any layer keeps."""
    layers: dict[str, Delta] = {}
    least = 1.0
    for path, delta in bundle.layers.items():
        if isinstance(delta, LowRankDelta) and delta.rank > rank:
            shape = (len(delta.up), *delta.down.shape[1:])
            layers[path], kept = _leading(product(delta), rank, shape)
        elif isinstance(delta, FullDelta) and delta.weight is not None and delta.weight.ndim > 1:
            layers[path], kept = _leading(delta.weight.flatten(1), rank, delta.weight.shape)
            if delta.bias is not None:
                layers[path], kept = delta, 1.0
        else:
            layers[path], kept = delta, 1.0
        least = min(least, kept)
    return dataclasses.replace(bundle, layers=layers), least


def fitted(delta: LowRankDelta) -> LowRankDelta:
    """The same dW at a rank its layer can have: a rank above both sides says nothing more."""
    shape = (len(delta.up), *delta.down.shape[1:])
    most = min(delta.up.shape[0], delta.down[0].numel())
    return delta if delta.rank <= most else _leading(product(delta), most, shape)[0]


def folded(delta: LowRankDelta | DoRADelta) -> tuple[Tensor, Tensor]:
    """down and up with the scale in up, which every reader takes at strength 1."""
    return delta.down, delta.up * delta.scale


def _leading(matrix: Tensor, rank: int, shape: tuple[int, ...]) -> tuple[LowRankDelta, float]:
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    energy = s.square()
    kept = float(energy[:rank].sum() / energy.sum()) if energy.sum() > 0 else 1.0
    root = s[:rank].sqrt()
    down, up = (root[:, None] * v[:rank]).to(matrix), (u[:, :rank] * root).to(matrix)
    return _shaped(down, up, shape), kept


def _shaped(down: Tensor, up: Tensor, shape: tuple[int, ...]) -> LowRankDelta:
    """The pair as a linear layer's, or a convolution's, whose weight has this shape."""
    if len(shape) == 2:
        return LowRankDelta(down.clone(), up.clone())
    ones = (1,) * (len(shape) - 2)
    return LowRankDelta(down.reshape(-1, *shape[1:]), up.reshape(*up.shape, *ones))
