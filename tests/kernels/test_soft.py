"""Attention by a Gaussian kernel against plain loops and an exact inverse, forward and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.kernels.soft import dense_soft_attention, gaussian, newton_inverse, soft_attention

N, M, D = 7, 3, 5


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """arXiv 2110.11945, equation 3, one pair at a time; the scale is in a and b."""
    rows = [torch.stack([torch.exp(-((x - y) ** 2).sum() / 2) for y in b]) for x in a]
    return torch.stack(rows)


def newton(matrix: Tensor, iterations: int) -> Tensor:
    """The iterations alone, written out from the paper's proposition 1 and its code's constants."""
    p = matrix + 0.01 * torch.eye(len(matrix), dtype=matrix.dtype)
    y = 1.8 / max(float(row.sum()) for row in matrix) ** 2 * p
    for _ in range(iterations):
        y = y @ (2 * torch.eye(len(matrix), dtype=matrix.dtype) - p @ y)
    return y


@pytest.mark.parametrize("iterations", [1, 5, 20])
def test_forward_equals_a_plain_loop(iterations: int) -> None:
    q, landmarks, v = drawn(2, 3, N, D), drawn(2, 3, M, D, seed=1), drawn(2, 3, N, D, seed=2)
    own = soft_attention(q, landmarks, v, iterations)
    for b in range(2):
        for h in range(3):
            x, mid = q[b, h].detach(), landmarks[b, h].detach()
            to = kernel(x, mid)
            wanted = to @ newton(kernel(mid, mid), iterations) @ to.T @ v[b, h].detach()
            torch.testing.assert_close(own[b, h].detach(), wanted, rtol=1e-9, atol=1e-9)


def test_gradients_are_those_of_the_exact_inverse() -> None:
    """After enough iterations; through each of the three inputs."""
    inputs = [drawn(1, 2, N, D), drawn(1, 2, M, D, seed=1), drawn(1, 2, N, D, seed=2)]
    own = soft_attention(*inputs, iterations=60)
    q, landmarks, v = inputs
    to, ridge = gaussian(q, landmarks), 0.01 * torch.eye(M, dtype=torch.float64)
    exact = torch.linalg.inv(gaussian(landmarks, landmarks) + ridge)
    wanted = to @ exact @ to.mT @ v
    torch.testing.assert_close(own, wanted, rtol=1e-8, atol=1e-8)
    weight = torch.randn_like(wanted)
    found = torch.autograd.grad((own * weight).sum(), inputs)
    for mine, other in zip(found, torch.autograd.grad((wanted * weight).sum(), inputs)):  # noqa: B905
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-7)


def test_the_gradient_is_the_closed_form_of_what_was_found() -> None:
    """-Y^T G Y^T of the Y that few iterations gave, as in the paper, not through them."""
    matrix = gaussian(drawn(4, D), drawn(4, D)).detach().requires_grad_()
    y, g = newton_inverse(matrix, 3), drawn(4, 4, seed=3).detach()
    (found,) = torch.autograd.grad((y * g).sum(), matrix)
    torch.testing.assert_close(found, -y.detach().T @ g @ y.detach().T)
    assert not torch.allclose(y, newton_inverse(matrix, 30), rtol=1e-3)


def test_landmarks_that_are_the_queries_give_the_dense_kernel() -> None:
    """K K^-1 K v = K v, but for the ridge, which the paper's code adds."""
    q, v = 3 * drawn(1, 1, N, D).detach(), drawn(1, 1, N, D, seed=1).detach()
    wanted = kernel(q[0, 0], q[0, 0]) @ v[0, 0]
    torch.testing.assert_close(dense_soft_attention(q, v)[0, 0], wanted)
    near = soft_attention(q, q, v, iterations=40)[0, 0]
    torch.testing.assert_close(near, wanted, rtol=0.05, atol=0.05)


def test_equal_tokens_stay_finite() -> None:
    """A matrix of ones has no inverse; with the ridge it has, and gradients too."""
    q = torch.ones(1, 2, N, D, requires_grad=True)
    o = soft_attention(q, q[:, :, :M], q)
    o.sum().backward()
    assert q.grad is not None
    assert bool(o.isfinite().all()) and bool(q.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    q, landmarks, v = (drawn(1, 1, n, D, seed=n).detach().to(dtype) for n in (64, 9, 64))
    wanted = soft_attention(q.float(), landmarks.float(), v.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = soft_attention(q, landmarks, v)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, rtol=1e-2, atol=1e-2)
