"""Kernels against plain loops in float64, forward and gradient, at odd sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trainer.kernels.softmax import (
    FEW,
    KERNELS,
    SOME,
    attention_probs,
    eager,
    eager_with_probs,
    sdpa,
    softmax_attention,
)

B, H, N, M, D = 2, 3, 5, 7, 3


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    rows = []
    for b in range(B):
        for h in range(H):
            for n in range(N):
                scores = [(q[b, h, n] * k[b, h, m]).sum() * scale for m in range(M)]
                if mask is not None:
                    scores = [s + mask[b, h, n, m] for m, s in enumerate(scores)]
                peak = max(float(s.detach()) for s in scores)
                weights = [(s - peak).exp() for s in scores]
                total = sum(weights, torch.zeros((), dtype=q.dtype))
                rows.append(
                    sum(
                        (w / total * v[b, h, m] for m, w in enumerate(weights)),
                        torch.zeros(D, dtype=q.dtype),
                    )
                )
    return torch.stack(rows).view(B, H, N, D)


def qkv(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, H, N, D), (B, H, M, D), (B, H, M, D)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_(True) for s in shapes]


def bias(kind: str) -> Tensor | None:
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(1)
    added = torch.randn(B, H, N, M, generator=generator, dtype=torch.float64)
    if kind == "added":
        return added
    added[..., ::2] = float("-inf")
    return added


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("kind", ["none", "added", "infinite"])
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_kernel_equals_a_plain_loop(name: str, kind: str, scale: float | None) -> None:
    mask = bias(kind)
    tensors, reference = qkv(), qkv()
    o = KERNELS[name](*tensors, mask, scale)
    expected = naive(*reference, mask, 1 / math.sqrt(D) if scale is None else scale)
    torch.testing.assert_close(o, expected, atol=1e-12, rtol=1e-10)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(2), dtype=o.dtype)
    (o * weight).sum().backward()
    (expected * weight).sum().backward()
    for mine, theirs in zip(tensors, reference, strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_bool_mask_is_where_a_query_may_look(name: str) -> None:
    q, k, v = (t.detach() for t in qkv())
    allowed = torch.ones(1, 1, 1, M, dtype=torch.bool)
    allowed[..., 3:] = False
    o = KERNELS[name](q, k, v, allowed, None)
    torch.testing.assert_close(o, KERNELS[name](q, k[:, :, :3], v[:, :, :3], None, None))


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_a_query_that_may_look_nowhere_gets_zeros_and_finite_gradients(
    name: str, added: bool
) -> None:
    tensors = qkv()
    allowed = torch.ones(B, H, N, M, dtype=torch.bool)
    allowed[0, :, 2] = False
    mask = torch.zeros(allowed.shape).double().masked_fill(~allowed, float("-inf"))
    o = KERNELS[name](*tensors, mask if added else allowed, None)
    assert torch.equal(o[0, :, 2], torch.zeros(H, D, dtype=o.dtype))
    assert bool((o[0, :, 1] != 0).all())
    o.sum().backward()
    assert all(t.grad is not None and bool(t.grad.isfinite().all()) for t in tensors)


def test_probs_sum_to_one_and_give_the_output() -> None:
    q, k, v = (t.detach() for t in qkv())
    o, probs = eager_with_probs(q, k, v, bias("infinite"))
    assert probs.shape == (B, H, N, M)
    torch.testing.assert_close(probs.sum(-1), torch.ones(B, H, N, dtype=q.dtype))
    assert not probs[..., ::2].any()
    torch.testing.assert_close(torch.einsum("bhnm,bhmd->bhnd", probs, v), o)


def test_half_precision_scores_are_softmaxed_in_float32() -> None:
    scores = torch.linspace(-3, 3, M).to(torch.bfloat16)
    probs = attention_probs(scores)
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs, scores.float().softmax(-1))
    assert not torch.equal(probs, scores.softmax(-1).float())


@pytest.mark.parametrize("masked", ["no", "bool", "added"])
@pytest.mark.parametrize("keys", [FEW, SOME, SOME + 1])
def test_half_precision_on_a_cpu_is_softmax_attention_by_any_way(keys: int, masked: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, H, N, D), (B, H, keys, D), (B, H, keys, D)]
    exact = [torch.randn(shape, generator=generator) for shape in shapes]
    half = [x.to(torch.bfloat16).requires_grad_() for x in exact]
    exact = [x.detach().float().requires_grad_() for x in half]
    mask = None
    if masked != "no":
        allowed = torch.rand(B, 1, N, keys, generator=generator) > 0.3
        mask = allowed if masked == "bool" else (~allowed).to(torch.bfloat16) * -1e4
    with torch.autocast("cpu", torch.bfloat16):
        o = softmax_attention(*half, mask, 0.5)
    expected = eager(*exact, mask, 0.5)
    assert o.dtype == torch.bfloat16
    torch.testing.assert_close(o.float(), expected, atol=0.02, rtol=0.02)
    (o.float() ** 2).sum().backward()
    (expected**2).sum().backward()
    for mine, theirs in zip(half, exact, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        torch.testing.assert_close(mine.grad.float(), theirs.grad, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("keys", [FEW, SOME, SOME + 1])
def test_in_float32_the_attention_of_a_models_layers_is_pytorchs_to_the_last_bit(keys: int) -> None:
    q, k, v = (torch.randn(B, H, n, D) for n in (N, keys, keys))
    assert torch.equal(softmax_attention(q, k, v), sdpa(q, k, v))
