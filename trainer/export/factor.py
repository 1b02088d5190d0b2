"""Full deltas as products of two matrices, for the formats that hold nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.export.apply_bundle import product
from trainer.export.bundle import Bundle, Delta, DoRADelta, FullDelta, LowRankDelta
from trainer.export.cannot_carry import CannotCarryError


def factored(bundle: Bundle, format_name: str) -> Mapping[str, LowRankDelta | DoRADelta]:
    """Every layer's delta as LoRA or DoRA; a full dW becomes a LoRA of full rank, which gives the
    same dW.

    Raises:
        CannotCarryError: a bias or a norm's weight was trained, which is no product of matrices.
    """
    refuse_bare(bundle, format_name)
    found: dict[str, LowRankDelta | DoRADelta] = {}
    for path, delta in bundle.layers.items():
        if isinstance(delta, FullDelta):
            if delta.bias is not None or delta.weight is None or delta.weight.ndim < 2:
                what = "weight" if delta.bias is None else "bias"
                raise CannotCarryError(
                    f"format={format_name} cannot carry the trained {what} of {path}: it holds "
                    "low-rank matrices only"
                )
            delta = exact(delta.weight)
        found[path] = delta
    return found


def refuse_bare(bundle: Bundle, format_name: str) -> None:
    """Raises `CannotCarryError` for a trained parameter that belongs to no layer."""
    if bundle.bare:
        raise CannotCarryError(
            f"format={format_name} cannot carry the trained {next(iter(bundle.bare))}, "
            f"{len(bundle.bare)} such: it holds what belongs to layers only"
        )


def exact(weight: Tensor) -> LowRankDelta:
    """dW (out, in, ...) as its product with the identity, on the side that gives the lower rank."""
    rows = weight.flatten(1)  # out, in * kh * kw
    out, width = rows.shape
    down = rows if out <= width else torch.eye(width, dtype=rows.dtype)
    up = torch.eye(out, dtype=rows.dtype) if out <= width else rows
    return _shaped(down, up, weight.shape)


def compact(weight: Tensor) -> LowRankDelta:
    """dW (out, in, ...) as a pair of the lowest rank that gives it in fp32: what is left out is
    below 1e-7 of its largest singular value."""
    values = torch.linalg.svdvals(weight.flatten(1).double())
    rank = max(int((values > 1e-7 * values[0]).sum()), 1)
    whole = exact(weight)
    return whole if rank >= whole.rank else _leading(weight.flatten(1), rank, weight.shape)[0]


def truncated(bundle: Bundle, rank: int) -> tuple[Bundle, float]:
    """The bundle with every dW reduced to its `rank` largest singular directions, and the smallest
    share of its energy (the sum of the squared singular values) that a layer keeps.

    DoRA, and layers whose bias was trained, stay as they are.
    """
    layers: dict[str, Delta] = {}
    least = 1.0
    for path, delta in bundle.layers.items():
        if isinstance(delta, LowRankDelta) and delta.rank > rank:
            shape = (len(delta.up), *delta.down.shape[1:])
            layers[path], kept = _leading(product(delta), rank, shape)
        elif isinstance(delta, FullDelta) and _is_matrix(delta):
            assert delta.weight is not None
            layers[path], kept = _leading(delta.weight.flatten(1), rank, delta.weight.shape)
        else:
            layers[path], kept = delta, 1.0
        least = min(least, kept)
    return dataclasses.replace(bundle, layers=layers, forms={}), least


def _is_matrix(delta: FullDelta) -> bool:
    """Whether only a weight with at least two dimensions changed."""
    return delta.weight is not None and delta.weight.ndim > 1 and delta.bias is None


def fitted(delta: LowRankDelta) -> LowRankDelta:
    """The same dW with a rank of at most its smaller side; a higher rank adds nothing."""
    shape = (len(delta.up), *delta.down.shape[1:])
    most = min(delta.up.shape[0], delta.down[0].numel())
    return delta if delta.rank <= most else _leading(product(delta), most, shape)[0]


def folded(delta: LowRankDelta | DoRADelta) -> tuple[Tensor, Tensor]:
    """down and up with the scale multiplied into up, for readers that apply a factor of 1."""
    return delta.down, delta.up * delta.scale


def _leading(matrix: Tensor, rank: int, shape: tuple[int, ...]) -> tuple[LowRankDelta, float]:
    """The `rank` largest singular directions of a matrix and the share of its energy they hold."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    energy = s.square()
    kept = float(energy[:rank].sum() / energy.sum()) if energy.sum() > 0 else 1.0
    root = s[:rank].sqrt()
    down, up = (root[:, None] * v[:rank]).to(matrix), (u[:, :rank] * root).to(matrix)
    return _shaped(down, up, shape), kept


def _shaped(down: Tensor, up: Tensor, shape: tuple[int, ...]) -> LowRankDelta:
    """A pair (r, in * kh * kw), (out, r) in the shapes of a layer whose weight has `shape`."""
    if len(shape) == 2:
        return LowRankDelta(down.clone(), up.clone())
    ones = (1,) * (len(shape) - 2)
    return LowRankDelta(down.reshape(-1, *shape[1:]), up.reshape(*up.shape, *ones))
