"""Linear attention against plain loops over queries and keys, forward and gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.kernels.linear_attention import (
    EPS,
    FEATURES,
    Features,
    linear_attention,
    orthogonal_gaussian,
    random_features,
)
from trainer.kernels.softmax import sdpa

N, M, D = 5, 7, 3


def qkv(n: int = N, m: int = M, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, n, D), (2, 3, m, D), (2, 3, m, D)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def focused_length(x: Tensor) -> Tensor:
    x = x.clamp(min=0) + 1e-6
    return x**3 * (x.norm() / (x**3).norm())


# of one query and one key, and their places as shares of the longer sequence
WEIGHTS: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "relu": lambda q, k, i, j: q.clamp(min=0) @ k.clamp(min=0),
    "elu": lambda q, k, i, j: (F.elu(q) + 1) @ (F.elu(k) + 1),
    "focused": lambda q, k, i, j: focused_length(q) @ focused_length(k),
    "cos": lambda q, k, i, j: q.clamp(min=0) @ k.clamp(min=0) * math.cos(math.pi / 2 * (i - j)),
}


def naive(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = []
    n, m = q.shape[2], k.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            if name == "efficient":
                rows.append(q[b, h].softmax(1) @ (k[b, h].softmax(0).T @ v[b, h]))
                continue
            weight, most = WEIGHTS[name], max(n, m)
            for i in range(n):
                weights = torch.stack(
                    [weight(q[b, h, i], k[b, h, j], i / most, j / most) for j in range(m)]
                )
                rows.append(weights @ v[b, h] / (weights.sum() + EPS))
    return torch.cat([row.reshape(-1) for row in rows]).view(q.shape[0], q.shape[1], n, D)


@pytest.mark.parametrize(("n", "m"), [(N, M), (M, N), (1, 1), (6, 6)])
@pytest.mark.parametrize("name", sorted(FEATURES))
def test_equals_a_plain_loop(name: str, n: int, m: int) -> None:
    inputs = qkv(n, m)
    own, wanted = linear_attention(*inputs, FEATURES[name]), naive(name, *inputs)
    torch.testing.assert_close(own, wanted, atol=1e-10, rtol=1e-8)
    found = torch.autograd.grad(own.square().sum(), inputs)
    for mine, other in zip(found, torch.autograd.grad(wanted.square().sum(), inputs), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("name", [*sorted(FEATURES), "random"])
def test_gradients(name: str) -> None:
    features = features_of(name)
    assert torch.autograd.gradcheck(lambda *x: linear_attention(*x, features), qkv(3, 4))


def features_of(name: str) -> Features:
    if name == "random":
        return random_features(orthogonal_gaussian(8, D, seed=0))
    return FEATURES[name]


@pytest.mark.parametrize("name", [*sorted(FEATURES), "random"])
def test_rows_without_features_are_zeros_or_finite_and_have_finite_gradients(name: str) -> None:
    inputs = qkv(dtype=torch.float32)
    with torch.no_grad():
        inputs[0][0] = -1.0  # every ReLU of these queries is 0
        inputs[1][1] = -1.0  # and of these keys
        inputs[0][:, 1] *= 1e4
    o = linear_attention(*inputs, features_of(name))
    assert bool(o.isfinite().all())
    if name in ("relu", "cos"):
        assert not o[0].any() and not o[1].any()
    o.square().sum().backward()
    assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in inputs)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adds_up_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    """4096 ones added up in bfloat16 stay at 256."""
    q, k, v = (torch.ones(1, 1, 4096, 2, dtype=dtype) for _ in range(3))
    v[..., 2048:, :] = 3
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        o = linear_attention(q, k, v, FEATURES["relu"])
    assert o.dtype == dtype
    assert torch.equal(o, torch.full_like(o, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(FEATURES))
def test_a_few_heads_at_a_time_are_all_of_them(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = qkv(dtype=dtype)
    whole = linear_attention(q, k, v, FEATURES[name])
    wanted = torch.autograd.grad(whole.sum(), [q, k, v])
    monkeypatch.setattr("trainer.kernels.linear_attention.CPU_BLOCK", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # 2 and 1 of 3 heads
    parts = linear_attention(q, k, v, FEATURES[name])
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts.sum(), [q, k, v]), wanted)
    with torch.no_grad():
        into = linear_attention(q, k, v, FEATURES[name])
    assert into.dtype == dtype
    assert into.is_contiguous()
    torch.testing.assert_close(into, whole)


def test_random_features_come_near_softmax_attention() -> None:
    q, k, v = (x.detach().float() for x in qkv(16, 16))
    wanted = sdpa(q, k, v, scale=0.5)

    def error(count: int) -> float:
        features = random_features(orthogonal_gaussian(count, D, seed=1))
        return float((linear_attention(q, k, v, features, 0.5) - wanted).abs().mean())

    assert error(2**16) < 0.02
    assert error(2**16) < error(2**6) / 3


def test_random_features_are_orthogonal_seeded_and_of_normal_length() -> None:
    w = orthogonal_gaussian(5000, 4, seed=3).double()
    assert torch.equal(w.float(), orthogonal_gaussian(5000, 4, seed=3))
    assert not torch.equal(w.float(), orthogonal_gaussian(5000, 4, seed=4))
    gram = w.view(-1, 4, 4) @ w.view(-1, 4, 4).transpose(1, 2)
    assert float((gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))).abs().max()) < 1e-5
    torch.testing.assert_close(w.T @ w / 5000, torch.eye(4).double(), atol=0.06, rtol=0)
