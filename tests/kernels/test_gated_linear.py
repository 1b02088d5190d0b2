"""Gated linear attention: the chunked form against the recurrent one, with gates of any strength,
and scans of the grid."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.kernels.gated_linear import (
    CHUNK,
    LEAST,
    ORDERS,
    chunk_size,
    chunked,
    fla_is_installed,
    gated_attention,
    ordered,
    recurrent,
    restored,
)


def inputs(
    tokens: int, strength: float, dtype: torch.dtype = torch.float32, width: int = 5
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, tokens, width)
    q, k, v = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3))
    # most gates weak, some as strong as `strength`
    g = -strength * torch.rand(shape, generator=generator, dtype=dtype) ** 4
    return [x.requires_grad_() for x in (q, k, v, g)]


def naive(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Every pair by itself: o_i = d^-1/2 sum over j <= i of sum_d q k exp(sum of g after j) v."""
    rows = []
    for i in range(q.shape[2]):
        row = torch.zeros_like(v[:, :, 0])
        for j in range(i + 1):
            decay = g[:, :, j + 1 : i + 1].sum(2).exp()
            row = row + (q[:, :, i] * k[:, :, j] * decay).sum(-1, keepdim=True) * v[:, :, j]
        rows.append(row * q.shape[-1] ** -0.5)
    return torch.stack(rows, dim=2)


@pytest.mark.parametrize("form", [recurrent, chunked])
def test_equals_a_plain_loop(form: object) -> None:
    given = inputs(11, 2.0, torch.float64)
    assert callable(form)
    torch.testing.assert_close(form(*given), naive(*given), atol=1e-12, rtol=1e-10)


def fla_naive() -> Any:
    """`naive_recurrent_gla` of fla-core, the authors' package, from its file alone: what it lies in
    cannot be imported without triton."""
    spec = importlib.util.find_spec("fla")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("fla-core is not installed; it is in the extra dev")
    path = Path(spec.submodule_search_locations[0]) / "ops" / "gla" / "naive.py"
    found = importlib.util.spec_from_file_location("fla_naive", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.naive_recurrent_gla


@pytest.mark.parametrize("form", [recurrent, chunked])
@pytest.mark.parametrize("tokens", [1, 13, 67])
def test_equals_the_recurrence_of_the_authors_package(form: Any, tokens: int) -> None:
    """Forward and gradient; there tokens come before heads."""
    given = inputs(tokens, 2.0)
    swapped = (x.transpose(1, 2) for x in given)
    wanted = fla_naive()(*swapped)[0].transpose(1, 2)
    own = form(*given)
    torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)
    weight = torch.randn(own.shape, generator=torch.Generator().manual_seed(1))
    mine = torch.autograd.grad((own * weight).sum(), given)
    for one, other in zip(mine, torch.autograd.grad((wanted * weight).sum(), given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("strength", [0.1, 2.0])
def test_on_cuda_flas_kernel_is_the_recurrence(strength: float) -> None:
    """Forward and gradient of what `gated_attention` runs there where fla has triton."""
    if not fla_is_installed():
        pytest.skip("needs fla-core with triton")
    given = [x.detach().cuda().requires_grad_() for x in inputs(130, strength, width=32)]
    own, wanted = gated_attention(*given), recurrent(*given)
    torch.testing.assert_close(own, wanted, rtol=1e-2, atol=1e-2)
    weight = torch.randn(own.shape, generator=torch.Generator().manual_seed(1)).cuda()
    mine = torch.autograd.grad((own * weight).sum(), given)
    for one, other in zip(mine, torch.autograd.grad((wanted * weight).sum(), given), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * float(other.abs().max()))


@pytest.mark.parametrize("strength", [0.0, 0.1, 1.0, 10.0, 100.0, 1e4])
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 63, 64, 65, 200])
def test_chunked_is_recurrent(tokens: int, strength: float) -> None:
    given = inputs(tokens, strength)
    own, wanted = chunked(*given), recurrent(*given)
    torch.testing.assert_close(own, wanted, atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad(own.square().sum(), given)
    others = torch.autograd.grad(wanted.square().sum(), given)
    for mine, other in zip(found, others, strict=True):
        size = float(other.abs().max()) + 1e-6
        torch.testing.assert_close(mine / size, other / size, atol=1e-5, rtol=0)


def test_gradients() -> None:
    assert torch.autograd.gradcheck(chunked, inputs(10, 3.0, torch.float64, width=2))


def test_open_gates_are_causal_linear_attention() -> None:
    q, k, v, g = inputs(50, 0.0)
    wanted = (q @ k.transpose(2, 3)).tril() @ v / 5**0.5
    torch.testing.assert_close(chunked(q, k, v, g), wanted, atol=1e-5, rtol=1e-5)


def test_closed_gates_leave_each_token_to_itself() -> None:
    q, k, v, g = inputs(50, 0.0)
    wanted = (q * k).sum(-1, keepdim=True) * v / 5**0.5
    for closed in (-1e3, -float("inf")):
        torch.testing.assert_close(
            chunked(q, k, v, torch.full_like(g, closed)), wanted, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("tokens", "gate", "size"),
    [(4096, -0.1, CHUNK), (9, -0.1, 16), (4096, -5.0, LEAST), (4096, -1e4, LEAST)],
)
def test_strong_gates_make_chunks_short(tokens: int, gate: float, size: int) -> None:
    g = torch.full((1, 1, tokens, 2), -0.01)
    g[0, 0, tokens // 2, 1] = gate
    assert chunk_size(g) == size


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_runs_in_float32(autocast: bool) -> None:
    given = [x.detach() for x in inputs(70, 0.5)]
    half = [x.bfloat16() for x in given[:3]]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        own = gated_attention(*half, given[3])
    wanted = recurrent(*(x.float() for x in half), given[3])
    assert own.dtype == torch.bfloat16
    assert torch.equal(own, wanted.bfloat16()) or F.mse_loss(own.float(), wanted) < 1e-4


def test_orders_are_four_ways_through_the_grid_and_are_undone() -> None:
    x = torch.arange(6)[None, None, :, None]  # 0 1 2 / 3 4 5
    walks = {order: ordered(x, order, (2, 3)).flatten().tolist() for order in ORDERS}
    assert walks == {
        "row": [0, 1, 2, 3, 4, 5],
        "row_back": [5, 4, 3, 2, 1, 0],
        "column": [0, 3, 1, 4, 2, 5],
        "column_back": [5, 2, 4, 1, 3, 0],
    }
    for order in ORDERS:
        assert torch.equal(restored(ordered(x, order, (2, 3)), order, (2, 3)), x)
