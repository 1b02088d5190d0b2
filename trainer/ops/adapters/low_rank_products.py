"""The products of a low-rank change B A and its gradients, ordered for the fastest BLAS calls."""

from __future__ import annotations

from torch import Tensor


def low_rank_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    low: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    need: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradients of (W0 + s B A) x with respect to x, A and B; grad (n, d), x (..., c).

    weight is W0 if low = A x (r, n) is given, else W0 + s B A.
    """
    on_low = times_columns(b.T, grad)
    on_x = None
    if need:
        on_x = grad @ weight
        if low is not None:
            on_x.addmm_(on_low.T, a, alpha=scale)
        on_x = on_x.view(x.shape)
    if low is None:
        low = times_columns(a, x)
    on_a, on_b = on_low @ token_rows(x), (low @ grad).T
    if scale != 1:
        on_a, on_b = on_a * scale, on_b * scale
    return on_x, on_a, on_b


def is_small(weight: Tensor, a: Tensor) -> bool:
    """Whether autograd's gradient of the whole matrix, from which A's and B's follow, is cheaper
    than four thin products of r columns; BLAS is about four times slower on thin products."""
    return weight.numel() <= 4 * a.shape[0] * sum(weight.shape)


def times_columns(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix (r, c), x (..., c) -> (r, n): quicker on a CPU than its transpose."""
    return matrix @ token_rows(x).T


def token_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
