"""The tiled kernel against a plain loop and the eager kernel, forward and gradient, at sizes that
tiles do not divide."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.kernels import tiled as module
from trainer.kernels.softmax import eager
from trainer.kernels.tiled import tiled

B, H, N, M, D = 2, 3, 13, 17, 5
TILES: dict[str, Any] = {"rows": 4, "columns": 6}


def qkv(dtype: torch.dtype = torch.float64, n: int = N, m: int = M) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, H, n, D), (B, H, m, D), (B, H, m, D)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_(True) for s in shapes]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def compare(own: Tensor, wanted: Tensor, inputs: list[Tensor], tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(own, wanted, rtol=tolerance, atol=tolerance)
    weight = draw(*own.shape).to(own.dtype)
    found = torch.autograd.grad((own * weight).sum(), inputs)
    expected = torch.autograd.grad((wanted * weight).sum(), inputs)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_equals_a_plain_loop() -> None:
    inputs = qkv()
    q, k, v = inputs
    rows = []
    for b in range(B):
        for h in range(H):
            for n in range(N):
                weights = [((q[b, h, n] * k[b, h, m]).sum() / math.sqrt(D)).exp() for m in range(M)]
                total = torch.stack(weights).sum()
                rows.append(sum(w / total * v[b, h, m] for m, w in enumerate(weights)))
    naive = torch.stack([row for row in rows if isinstance(row, Tensor)]).view(B, H, N, D)
    compare(tiled(*inputs, **TILES), naive, inputs)


@pytest.mark.parametrize("tile", [(1, 1), (4, 6), (13, 17), (5, 100), (100, 4)], ids=str)
def test_every_tile_size_gives_the_same(tile: tuple[int, int]) -> None:
    inputs = qkv()
    own = tiled(*inputs, scale=0.7, rows=tile[0], columns=tile[1])
    compare(own, eager(*inputs, scale=0.7), inputs)


@pytest.mark.parametrize("scores", [1, 50, 10**6])
def test_any_number_of_heads_in_a_tile_gives_the_same(
    scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CPU_SCORES", scores)
    inputs, mask = qkv(), draw(B, 1, N, M)
    compare(tiled(*inputs, mask, **TILES), eager(*inputs, mask), inputs)


SHAPES = [(B, H, N, M), (1, 1, N, M), (B, 1, 1, M), (1, H, N, 1), (N, M), (B, H, 1, M), (M,)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "added", "learned"])
def test_masks_broadcast(kind: str, shape: tuple[int, ...]) -> None:
    inputs, mask = qkv(), draw(*shape)
    if kind == "bool":
        mask = mask > -0.5
    wanted = [*inputs, mask.requires_grad_()] if kind == "learned" else inputs
    compare(tiled(*inputs, mask, **TILES), eager(*inputs, mask), wanted)


@pytest.mark.parametrize("added", [False, True])
def test_a_row_that_sees_nothing_gives_zeros_and_finite_gradients(added: bool) -> None:
    inputs = qkv()
    allowed = torch.ones(B, H, N, M, dtype=torch.bool)
    allowed[0, :, 2] = False
    allowed[1, 1, :, :7] = False  # the whole first tile of every row
    mask = torch.zeros(allowed.shape).double().masked_fill(~allowed, float("-inf"))
    o = tiled(*inputs, mask if added else allowed, **TILES)
    assert not o[0, :, 2].any() and o[0, :, 1].all()
    compare(o, eager(*inputs, allowed), inputs)


def test_the_lowest_finite_bias_is_no_mask() -> None:
    """A row with nothing but that is even, as in eager; only -inf hides."""
    inputs = [x.detach().float() for x in qkv()]
    mask = torch.full((1, 1, N, M), torch.finfo(torch.float32).min)
    torch.testing.assert_close(tiled(*inputs, mask, **TILES), eager(*inputs, mask))


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (x.detach().float() for x in qkv())
    own = tiled(100 * q, 100 * k, v, **TILES)
    torch.testing.assert_close(own, eager(100 * q, 100 * k, v), rtol=1e-3, atol=1e-3)


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((1, 2, 5, 2), (1, 2, 7, 2), (1, 2, 7, 3), (1, 2, 5, 7))
    )
    assert torch.autograd.gradcheck(
        lambda *x: tiled(*x, rows=2, columns=3), (q, k, v, bias), fast_mode=False
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    inputs = qkv(dtype)
    own = tiled(*inputs, **TILES)
    assert own.dtype == dtype
    exact = eager(*(x.detach().double() for x in inputs))
    error = float((own.detach().double() - exact).abs().max())
    assert error < (1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps * 2)
    assert all(g.dtype == dtype for g in torch.autograd.grad(own.sum(), inputs))


def test_autocast_does_not_reach_the_tiles() -> None:
    q, k, v = (x.detach().float() for x in qkv())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = tiled(q, k, v, **TILES)
    assert torch.equal(own, tiled(q, k, v, **TILES))


def test_no_tensor_of_all_scores_is_made() -> None:
    """Nothing that a forward and backward allocate is as large as a quarter of the scores."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            for x in found if isinstance(found, (tuple, list)) else (found,):
                if isinstance(x, Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return found

    q, k, v = (torch.randn(1, 1, 600, 8).requires_grad_() for _ in range(3))
    with Largest():
        tiled(q, k, v, rows=64, columns=64).sum().backward()
    assert largest < 4 * 600 * 600 / 4
