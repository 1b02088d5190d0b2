"""Linear attention: softmax(q k^T) replaced by a product of features, O(n) in the tokens.

    o_i = phi(q_i) sum_j phi(k_j)^T v_j / (phi(q_i) sum_j phi(k_j)^T)

Every query attends to every key; a mask is not possible. q is (b, h, n, d), k and v (b, h, m,
d); a feature map turns q and k into (b, h, n, f) and (b, h, m, f) without negative values. All is
computed in at least float32, under autocast too, because the sums are over all keys. A query whose
features are all zero gets zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# q, k and the scale of q k^T to phi(q), phi(k); only a map that stands for exp(q k^T) needs a scale
Features = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]

EPS = 1e-15  # of the denominator, as in Sana
# values of q that a CPU thread computes at once; more do not fit its cache
CPU_BLOCK = 2**17


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, features: Features, scale: float | None = None
) -> Tensor:
    """o (b, h, n, d) in the dtype of v."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.device.type == "cpu" and (count := _parts(q)) > 1:
        parts = zip(q.chunk(count, 1), k.chunk(count, 1), v.chunk(count, 1), strict=True)
        if torch.is_grad_enabled():
            return torch.cat([_attend(*part, features=features, scale=scale) for part in parts], 1)
        o = v.new_empty(*q.shape[:-1], v.shape[-1])
        for into, part in zip(o.chunk(count, dim=1), parts, strict=True):
            made = _attend(*part, features=features, scale=scale, into=into)
            if made is not into:
                into.copy_(made)
        return o
    return _attend(q, k, v, features=features, scale=scale)


def _parts(q: Tensor) -> int:
    """Into how many parts a CPU divides the heads: each part fits its caches, and has at least as
    many heads as there are threads."""
    threads, heads = torch.get_num_threads(), q.shape[1]
    most = max(threads, CPU_BLOCK * threads * heads // max(1, q.numel()))
    return -(-heads // most)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    features: Features,
    scale: float,
    into: Tensor | None = None,
) -> Tensor:
    """o; written into `into` if that has the dtype of the sums."""
    with torch.autocast(q.device.type, enabled=False):
        phi_q, phi_k = features(at_least_float32(q), at_least_float32(k), scale)
        # the sum of the features is a last column beside the sum of values: one pass for both
        total = phi_k.sum(dim=-2).unsqueeze(-1)
        state = torch.cat([phi_k.transpose(-2, -1) @ v.to(phi_k.dtype), total], dim=-1)  # b h f d+1
        del phi_k
        o = phi_q @ state
        into = into if into is not None and into.dtype == o.dtype else None
        o = torch.div(o[..., :-1], o[..., -1:] + EPS, out=into)
    return o.clamp(-65504, 65504).half() if v.dtype == torch.float16 else o.to(v.dtype)


def relu_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`linear_attention` with `relu`, o (b, h, n, d) in the dtype of v, to the bit as diffusers has
    it in a Sana: channels before tokens, and the sum of the features as that of one more value.

    Under autocast its products are in the lower precision, as there.
    """
    phi_q, phi_k, v32 = (at_least_float32(x) for x in (F.relu(q), F.relu(k), v))
    state = F.pad(v32.transpose(-2, -1), (0, 0, 0, 1), value=1.0) @ phi_k  # b h d+1 d
    o = state @ phi_q.transpose(-2, -1)  # b h d+1 n
    o = o[..., :-1, :] / (o[..., -1:, :] + EPS)
    return o.transpose(-2, -1).to(v.dtype)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def relu(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """max(x, 0): Sana, arXiv 2410.10629, equation 2."""
    return F.relu(q), F.relu(k)


def elu(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """elu(x) + 1: Katharopoulos et al., arXiv 2006.16236, equation 7."""
    return F.elu(q) + 1, F.elu(k) + 1


def focused(q: Tensor, k: Tensor, scale: float, power: float = 3.0) -> tuple[Tensor, Tensor]:
    """|x| / |x^p| x^p of x = ReLU, which turns vectors towards their nearest axis and keeps their
    length: FLatten, arXiv 2308.00442, equation 5, p = 3; without its learned scale."""

    def sharpen(x: Tensor) -> Tensor:
        x = F.relu(x) + 1e-6
        # by the largest entry, so that x^p cannot overflow
        x = x / (peak := x.amax(dim=-1, keepdim=True))
        raised = x**power
        return raised * (peak * x.norm(dim=-1, keepdim=True) / raised.norm(dim=-1, keepdim=True))

    return sharpen(q), sharpen(k)


def cos_weighted(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """ReLU(q_i) ReLU(k_j)^T cos(pi/2 (i - j) / M), M the longer of the two: cosFormer, arXiv
    2202.08791, equation 9. The cosine of a difference is two products, so features are 2 d."""
    longest = max(q.shape[-2], k.shape[-2])

    def weigh(x: Tensor) -> Tensor:
        position = torch.arange(x.shape[-2], device=x.device, dtype=x.dtype)
        angle = (math.pi / 2 / longest * position)[:, None]
        x = F.relu(x)
        return torch.cat([x * angle.cos(), x * angle.sin()], dim=-1)

    return weigh(q), weigh(k)


def efficient(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax over the d of a query, and over the m keys: Efficient Attention, arXiv 1812.01243,
    equation 6. The denominator is then 1."""
    return q.softmax(dim=-1), k.softmax(dim=-2)


def random_features(projection: Tensor) -> Features:
    """FAVOR+ of the Performer, arXiv 2009.14794, lemma 1: exp(w x - |x|^2 / 2) for rows w of
    `projection` (f, d), whose products have the mean exp(q k^T * scale).

    The largest exponent is subtracted, of each query and over all keys; it cancels in the fraction.
    """

    def exponents(x: Tensor, scale: float) -> Tensor:
        x = x * math.sqrt(scale)
        return x @ projection.to(x).T - x.square().sum(dim=-1, keepdim=True) / 2

    def features(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        of_q, of_k = exponents(q, scale), exponents(k, scale)
        of_q = of_q - of_q.detach().amax(dim=-1, keepdim=True)
        of_k = of_k - of_k.detach().amax(dim=(-2, -1), keepdim=True)
        return of_q.exp() + 1e-6, of_k.exp() + 1e-6

    return features


def orthogonal_gaussian(count: int, dim: int, seed: int) -> Tensor:
    """(count, dim) float32: rows distributed as standard normal vectors, orthogonal in blocks of
    `dim` (Performer, section 2.4); a function of its arguments only."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(-(-count // dim)):
        square = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        basis, upper = torch.linalg.qr(square)
        blocks.append(
            (basis * upper.diagonal().sign()).T
        )  # without the signs the distribution is not uniform
    lengths = torch.randn(count, dim, generator=generator, dtype=torch.float64).norm(dim=1)
    return (torch.cat(blocks)[:count] * lengths[:, None]).float()


FEATURES: dict[str, Features] = {
    "relu": relu,
    "elu": elu,
    "focused": focused,
    "cos": cos_weighted,
    "efficient": efficient,
}
