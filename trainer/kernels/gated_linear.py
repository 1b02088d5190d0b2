"""Gated linear attention: a state that decays, channel by channel, as it moves over the tokens.

    S_t = Diag(exp(g_t)) S_{t-1} + k_t^T v_t,  o_t = scale * q_t S_t

GLA, Yang et al., arXiv 2312.06635, equations 3 and 4. q, k and the logarithms of the gates g <= 0
are (b, h, n, d), v is (b, h, n, e), o like v; scale = d ** -0.5 unless given. A token attends to
itself and those before it; for images, `ordered` gives scans of the grid from four sides.
"""

from __future__ import annotations

import math
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from trainer.kernels.linear_attention import at_least_float32

CHUNK, LEAST = 32, 8  # tokens between two states
SAFE = 16.0  # sums of gates up to this keep six digits of their exp in float32

ORDERS = ("row", "row_back", "column", "column_back")


def gated_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float | None = None
) -> Tensor:
    """o in the dtype of v, by fla's kernel on CUDA if fla is installed, else by `chunked`."""
    if q.is_cuda and fla_is_installed():
        return _by_fla(q, k, v, g=g, scale=scale)
    return chunked(q, k, v, g=g, scale=scale)


def recurrent(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float | None = None) -> Tensor:
    """Token by token, as in the equation; the reference in tests."""
    q, k, v32, g = (at_least_float32(x) for x in (q, k, v, g))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    state = torch.zeros((), dtype=q.dtype, device=q.device)
    rows = []
    # unbound once: the gradient of each indexing would be a tensor of full size
    for q_t, k_t, v_t, g_t in zip(*(x.unbind(-2) for x in (q, k, v32, g)), strict=True):
        here = k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        state = g_t.unsqueeze(-1).exp() * state + here  # b h d e
        rows.append(scale * (q_t.unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(rows, dim=-2).to(v.dtype)


def chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float | None = None) -> Tensor:
    """The same by matrix products, in at least float32, without overflow.

    With b the running sum of g in a chunk, key j has the weight exp(b_i - b_j) <= 1 for query i >=
    j. exp(-b_j) alone can overflow, so sums start in the middle of the chunk, in both directions,
    and `chunk_size` gives shorter chunks for stronger gates, so that both factors stay in range.
    """
    with torch.autocast(q.device.type, enabled=False):
        rows, tokens = q.shape[:2], q.shape[2]
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        g = at_least_float32(g)
        g = g.clamp(min=_floor(g.dtype))
        chunk = chunk_size(g)
        q, k, values, b = (_split(at_least_float32(x), chunk) for x in (q, k, v, g))
        values, b = (x.reshape(-1, *x.shape[-2:]) for x in (values, b))
        # in place: for many tokens, allocating memory takes most of the time
        halves = b.unflatten(1, (2, -1)).cumsum_(dim=2)
        ends = halves[:, :, -1].clone()
        halves[:, 0].sub_(ends[:, :1])  # b is now the sum from the middle, in both directions
        decay = b.unflatten(0, q.shape[:3])
        q = (decay.exp() * q).flatten(0, 2)
        k = (decay.neg().exp_() * k).flatten(0, 2)  # a quotient's gradient would overflow
        o = q @ _states(k.transpose(1, 2) @ values, ends.exp(), rows.numel())
        o.baddbmm_((q @ k.transpose(1, 2)).tril_(), values, beta=scale, alpha=scale)
    return o.view(*rows, -1, o.shape[-1])[:, :, :tokens].to(v.dtype)


def chunk_size(g: Tensor) -> int:
    """Tokens of a chunk, from `LEAST` to `CHUNK`: fewer for few tokens, or if half a chunk of the
    strongest gate would lose digits."""
    # a fake tensor, with which a plan counts memory, has no values
    strongest = 0.0 if isinstance(g, FakeTensor) else -float(g.detach().amin())
    chunk = LEAST
    while chunk < min(CHUNK, g.shape[-2]) and strongest * chunk <= SAFE:
        chunk *= 2
    return chunk


def _floor(dtype: torch.dtype) -> float:
    """Gates are clamped to this minimum: -17.7 in float32, whose exp is 2e-8 and lost in rounding.

    Half of the shortest chunk then stays in range: 4 * 17.7 < log(3.4e38) = 88.7.
    """
    return -math.log(torch.finfo(dtype).max) / 5


def _split(x: Tensor, chunk: int) -> Tensor:
    """b h n d -> b h chunks chunk d, padded with zeros, which add nothing to a state."""
    if missing := -x.shape[-2] % chunk:
        x = F.pad(x, (0, 0, 0, missing))
    return x.unflatten(-2, (-1, chunk))


def _states(added: Tensor, halves: Tensor, rows: int) -> Tensor:
    """The state at the middle of each chunk, without that chunk's own tokens.

        T_0 = 0,  T_{i+1} = enter_{i+1} (leave_i (T_i + added_i))

    added (rows * chunks, d, e): what each chunk adds, as of its middle; halves (rows * chunks, 2,
    d): enter and leave, the decay before and after the middle. They are multiplied one by one,
    because their product may underflow while the result is large.
    """
    added, halves = added.unflatten(0, (rows, -1)), halves.unflatten(0, (rows, -1))
    chunks, ends = added.unbind(1), halves.unsqueeze(-1).unbind(1)
    enter, leave = zip(*(end.unbind(1) for end in ends), strict=True)
    states = [torch.zeros_like(chunks[0])]
    for i in range(len(chunks) - 1):
        states.append(enter[i + 1] * (leave[i] * (states[-1] + chunks[i])))
    return torch.stack(states, dim=1).flatten(0, 1)


def fla_is_installed() -> bool:
    """Whether fla and triton are installed; no part of fla can be imported without triton."""
    return find_spec("fla") is not None and find_spec("triton") is not None


def _by_fla(q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, scale: float | None) -> Tensor:
    kernel = import_module("fla.ops.gla").chunk_gla
    # b h n d -> b n h d; the gates keep their own precision
    q, k, v, g = (x.transpose(1, 2).contiguous() for x in (q.to(v.dtype), k.to(v.dtype), v, g))
    o: Tensor = kernel(q, k, v, g=g.float(), scale=scale)[0]
    return o.transpose(1, 2)


def ordered(x: Tensor, order: str, grid: tuple[int, int]) -> Tensor:
    """The tokens x (..., n, d) of a grid (h, w), given row by row, in one of `ORDERS`: row by row,
    that reversed, column by column, and that reversed. These are the directions of DiG, arXiv
    2405.18428, section 3.3."""
    if order.startswith("column"):
        x = x.unflatten(-2, grid).transpose(-3, -2).flatten(-3, -2)
    return x.flip(-2) if order.endswith("back") else x


def restored(x: Tensor, order: str, grid: tuple[int, int]) -> Tensor:
    """The inverse of `ordered`."""
    x = x.flip(-2) if order.endswith("back") else x
    if order.startswith("column"):
        x = x.unflatten(-2, grid[::-1]).transpose(-3, -2).flatten(-3, -2)
    return x
