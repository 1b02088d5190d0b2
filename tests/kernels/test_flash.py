"""Which backend of SDPA ran is read from what was dispatched; what cannot run is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.attention.host import Host
from trainer.attention.op import Traits
from trainer.kernels.flash import flash_attention, observed
from trainer.kernels.softmax import sdpa
from trainer.ops.flash import FlashOp


def qkv(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 9, 8, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["flash", "math"])
@pytest.mark.parametrize("grad", [False, True])
def test_the_backend_asked_for_runs_on_a_cpu(backend: str, grad: bool, dtype: torch.dtype) -> None:
    tensors = [x.requires_grad_(grad) for x in qkv(dtype)]
    o, ran = observed(*tensors, backend=backend)
    assert ran == backend
    assert torch.equal(o, flash_attention(*tensors, backend=backend))
    torch.testing.assert_close(o, sdpa(*tensors), rtol=2e-2, atol=2e-2)
    assert o.requires_grad == grad


def test_without_a_wish_it_says_what_pytorch_chose() -> None:
    q, k, v = qkv()
    assert observed(q, k, v)[1] == "flash"
    learned = torch.zeros(1, 1, 9, 9, requires_grad=True)
    assert observed(q, k, v, learned)[1] == "math"
    assert observed(q, k, v[..., :4])[1] == "math"


def test_watching_changes_nothing() -> None:
    tensors = [x.requires_grad_() for x in qkv()]
    o, _ = observed(*tensors)
    assert torch.equal(o, sdpa(*tensors))
    found = torch.autograd.grad(o.square().sum(), tensors)
    wanted = torch.autograd.grad(sdpa(*tensors).square().sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_silent_fallback_is_refused_with_the_reason() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError) as error:
        observed(q, k, v[..., :4], backend="flash")
    assert "q,k,v to have the same last dimension" in str(error.value)
    assert "v 2x3x9x4 float32 on cpu" in str(error.value)
    assert "backend=auto" in str(error.value)
    learned = torch.zeros(1, 1, 9, 9, requires_grad=True)
    with pytest.raises(ValueError, match="the mask needs a gradient"):
        observed(q, k, v, learned, backend="flash")


@pytest.mark.parametrize("backend", ["efficient", "cudnn"])
def test_a_backend_of_cuda_is_refused_on_a_cpu(backend: str) -> None:
    with pytest.raises(
        ValueError, match=rf"backend '{backend}' needs CUDA, and these tensors are on cpu"
    ):
        observed(*qkv(), backend=backend)


def test_other_errors_are_passed_on() -> None:
    q, k, v = qkv()
    with pytest.raises(RuntimeError):
        observed(q, k[..., :4], v, backend="math")


def test_every_site_reports_what_ran(tiny_unet: nn.Module, run_unet: Any) -> None:
    base = run_unet(tiny_unet)
    host = Host.attach(tiny_unet)
    op = FlashOp("flash")
    host.install(op, host.sites)
    assert op.report() == {}
    assert torch.equal(run_unet(tiny_unet), base)
    assert op.report() == {site.name: ("flash",) for site in host.sites}
    assert torch.equal(run_unet(tiny_unet), base)  # known by now, not watched


def test_a_site_that_falls_back_is_named(tiny_unet: nn.Module, run_unet: Any) -> None:
    class Narrow:
        name = "narrow"
        traits = Traits()

        def kv(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
            return q, k, v.mT.contiguous().mT

    host = Host.attach(tiny_unet)
    host.install(Narrow(), host.sites[:1])
    host.install(FlashOp("flash"), host.sites)
    with pytest.raises(ValueError) as error:
        run_unet(tiny_unet)
    assert str(error.value).startswith(f"methods.flash at {host.sites[0].name}: backend 'flash'")
    assert "last dimension" in str(error.value)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash", "efficient", "cudnn", "math"])
def test_the_backend_asked_for_runs_on_cuda(backend: str) -> None:
    tensors = [torch.randn(2, 4, 256, 64).cuda().bfloat16().requires_grad_() for _ in range(3)]
    o, ran = observed(*tensors, backend=backend)
    assert ran == backend
    o.sum().backward()


@pytest.mark.gpu
def test_a_dense_mask_takes_flash_away_on_cuda() -> None:
    q, k, v = (torch.randn(2, 4, 256, 64).cuda().bfloat16() for _ in range(3))
    mask = torch.ones(1, 1, 256, 256, dtype=torch.bool, device="cuda")
    with pytest.raises(ValueError, match="backend 'flash' cannot run here"):
        observed(q, k, v, mask, backend="flash")
