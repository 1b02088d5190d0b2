"""Sparse-linear attention: blocks of keys that matter most exactly, the rest by linear attention.

    P = softmax(mean(Q_i) mean(K_j)^T s)       over blocks of queries i and of keys j
    o_sparse   softmax attention to the `critical` largest of each row of P
    o_linear   phi(q) sum_rest phi(K_j)^T V_j / (phi(q) sum_rest phi(K_j)),   phi(x) = softmax(x)

SLA (Zhang et al., arXiv 2509.24006, equations 4 to 7): the smallest `negligible` blocks are left
out of both. Projecting o_linear and adding it to o_sparse is done by the op. Of the critical blocks
no others are touched, and the rest costs O(n).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.kernels.block_sparse import ChosenBlocks, block_sparse
from trainer.kernels.linear_attention import at_least_float32

EPS = 1e-5


@dataclass(frozen=True)
class Shares:
    """size: tokens of a block; critical: share of the blocks of keys that are exact, at least one;
    negligible: of those that are left out, rounded down."""

    size: int
    critical: float
    negligible: float

    def counts(self, blocks: int) -> tuple[int, int]:
        """How many of so many blocks are critical, and how many negligible."""
        critical = min(blocks, max(1, round(self.critical * blocks)))
        return critical, min(blocks - critical, int(self.negligible * blocks))


def sparse_and_linear(
    q: Tensor, k: Tensor, v: Tensor, *, shares: Shares, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """o_sparse and o_linear, (b, h, n, d) each, of q, k and v (b, h, n, d)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    index, rest = classified(q, k, shares, scale=scale)
    exact = block_sparse(q, k, v, chosen=ChosenBlocks(index, shares.size), scale=scale)
    return exact, _linear(q, k, v, rest=rest, size=shares.size)


@torch.no_grad()
def classified(q: Tensor, k: Tensor, shares: Shares, *, scale: float) -> tuple[Tensor, Tensor]:
    """The critical blocks of keys of each block of queries, (b h, nq, c), and which blocks are in
    the rest, (b h, nq, nk) bool."""
    rows, columns = (_means(at_least_float32(x.flatten(0, 1)), shares.size) for x in (q, k))
    order = (rows @ columns.mT * scale).softmax(-1).argsort(dim=-1, descending=True, stable=True)
    blocks = order.shape[2]
    critical, negligible = shares.counts(blocks)
    rest = torch.zeros(order.shape, dtype=torch.bool, device=q.device)
    rest.scatter_(2, order[..., critical : blocks - negligible], True)
    return order[..., :critical], rest


def _linear(q: Tensor, k: Tensor, v: Tensor, *, rest: Tensor, size: int) -> Tensor:
    """Linear attention of each block of queries to the keys of its rest, in the dtype of v."""
    phi_q, phi_k = (at_least_float32(x.flatten(0, 1)).softmax(-1) for x in (q, k))
    queries, keys, values = (
        _cut(x, size) for x in (phi_q, phi_k, at_least_float32(v.flatten(0, 1)))
    )
    weights = rest.to(keys.dtype)
    states = keys.mT @ values  # g nk d e
    summed = (weights @ states.flatten(2)).unflatten(2, states.shape[2:])
    norms = weights @ keys.sum(2)  # g nq d
    o = (queries @ summed) / ((queries @ norms[..., None]) + EPS)
    return o.flatten(1, 2)[:, : q.shape[2]].unflatten(0, q.shape[:2]).to(v.dtype)


def _means(x: Tensor, size: int) -> Tensor:
    """The mean of every block, (g, n, d) to (g, blocks, d); the last one may be shorter."""
    summed = _cut(x, size).sum(2)
    left = x.shape[1] - (summed.shape[1] - 1) * size
    counts = torch.full((summed.shape[1], 1), float(size), dtype=x.dtype, device=x.device)
    counts[-1] = left
    return summed / counts


def _cut(x: Tensor, size: int) -> Tensor:
    """(g, n, d) to (g, blocks, size, d), with zeros after the last token."""
    if left := -x.shape[1] % size:
        x = F.pad(x, (0, 0, 0, left))
    return x.unflatten(1, (-1, size))
