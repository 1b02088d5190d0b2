"""Attention by a Gaussian kernel without softmax, O(n) in the tokens through landmarks.

    K(a, b) = exp(-|a - b|^2 / 2),  o = K(q, l) K(l, l)^-1 K(l, q) v

SOFT, Lu et al., NeurIPS 2021, arXiv 2110.11945, equations 3 and 9: queries are the keys, l are m
landmarks among them, and the inverse is found by Newton's iteration (proposition 1). q is
(b, h, n, d) with its scale in it, l (b, h, m, d), v and o (b, h, n, d). The weights of a row do not
add up to 1. All is computed in at least float32, under autocast too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from trainer.kernels.linear_attention import at_least_float32

RIDGE = 0.01  # added to the diagonal, as in the authors' code: equal landmarks can be inverted
START = 0.9 * 2  # of the first guess, over the square of the largest row sum, as there


def soft_attention(q: Tensor, landmarks: Tensor, v: Tensor, iterations: int = 20) -> Tensor:
    """o (b, h, n, d) in the dtype of v."""
    with torch.autocast(q.device.type, enabled=False):
        q, landmarks, values = (at_least_float32(x) for x in (q, landmarks, v))
        to_landmarks = gaussian(q, landmarks)
        inverse = newton_inverse(gaussian(landmarks, landmarks), iterations)
        o = to_landmarks @ (inverse @ (to_landmarks.transpose(-2, -1) @ values))
    return o.clamp(-65504, 65504).half() if v.dtype == torch.float16 else o.to(v.dtype)


def dense_soft_attention(q: Tensor, v: Tensor) -> Tensor:
    """o of `q` that are their own landmarks, in the dtype of v: K(q, q) v, without an inverse."""
    with torch.autocast(q.device.type, enabled=False):
        q, values = at_least_float32(q), at_least_float32(v)
        o = gaussian(q, q) @ values
    return o.clamp(-65504, 65504).half() if v.dtype == torch.float16 else o.to(v.dtype)


def gaussian(a: Tensor, b: Tensor) -> Tensor:
    """exp(-|a_i - b_j|^2 / 2) (..., n, m) of a (..., n, d) and b (..., m, d)."""
    squares = a.square().sum(-1, keepdim=True) + b.square().sum(-1).unsqueeze(-2)
    return torch.exp((a @ b.transpose(-2, -1) - squares / 2).clamp(max=0))


def newton_inverse(matrix: Tensor, iterations: int = 20) -> Tensor:
    """The inverse of symmetric positive matrices (..., m, m) plus `RIDGE` on the diagonal."""
    found: Tensor = _NewtonInverse.apply(matrix, iterations)
    return found


class _NewtonInverse(Function):
    """Y <- 2 Y - Y P Y from Y = alpha P; its gradient is the closed form of an inverse, -Y^T G Y^T
    (arXiv 2110.11945, section 3.3), not one through the iterations."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, iterations: int) -> Tensor:
        alpha = START / matrix.sum(-1).amax(-1).square()[..., None, None]
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        matrix = matrix + RIDGE * eye
        inverse = alpha * matrix
        for _ in range(iterations):
            inverse = 2 * inverse - inverse @ matrix @ inverse
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (inverse,) = ctx.saved_tensors
        inverse = inverse.transpose(-2, -1)
        return -inverse @ gradient @ inverse, None
