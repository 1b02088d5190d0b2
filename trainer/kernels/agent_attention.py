"""Agent attention: a few agents attend to the keys, and queries attend to the agents, O(n) in the
tokens.

    o = softmax(q a^T s2 + B2) softmax(a k^T s1 + B1) v

Han et al., arXiv 2312.08874, equation 4 with the biases of section 3.3; AgentSD is the same without
training. q, k, v and o are (b, h, n, d), agents a (b, h, m, d), B1 (h, m, n), B2 (h, n, m).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.kernels.softmax import HALF, sdpa
from trainer.kernels.token_merging import Grid

SCORES = 2**20  # scores of a head that are computed at once


def agent_attention(
    q: Tensor,
    agents: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    query_scale: float | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """o (b, h, n, d); scale: s1, d ** -0.5 unless given, query_scale: s2, s1 unless given, bias: B1
    and B2."""
    to_agents, to_queries = (None, None) if bias is None else (x.to(q.dtype) for x in bias)
    query_scale = scale if query_scale is None else query_scale
    step = in_blocks if _wants_products(q) else sdpa
    found = step(agents, k, v, mask=to_agents, scale=scale)
    return step(q, agents, found, mask=to_queries, scale=query_scale)


def _wants_products(q: Tensor) -> bool:
    """Whether plain products are faster than PyTorch's kernel: in half precision on a CPU, without
    gradients. A backward would need all scores, which are n * m."""
    return q.device.type == "cpu" and q.dtype in HALF and not torch.is_grad_enabled()


def in_blocks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(q k^T * scale + mask) v by plain products, with at most `SCORES` scores of a head at
    once. mask (..., n, m) is added."""
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    k, rows = k.transpose(-2, -1), max(1, SCORES // k.shape[-2])
    blocks = []
    for start in range(0, q.shape[-2], rows):
        scores = q[..., start : start + rows, :] @ k
        if mask is not None:
            scores = scores + mask[..., start : start + rows, :]
        blocks.append(scores.softmax(-1) @ v)
    return torch.cat(blocks, dim=-2)


def pooled(q: Tensor, grid: Grid, side: int) -> Tensor:
    """Agents (b, h, side * side, d): means of the queries over side * side parts of the grid."""
    batch, heads, _, width = q.shape
    image = q.transpose(2, 3).reshape(batch, -1, *grid)  # b (h d) y x
    cells = F.adaptive_avg_pool2d(image, side)
    return cells.unflatten(1, (heads, width)).flatten(3).transpose(2, 3)
