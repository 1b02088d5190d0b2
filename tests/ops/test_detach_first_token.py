"""DetachFirstToken against what autograd gives when the first token is a constant."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from trainer.attention.call import SiteCall
from trainer.attention.context import StepContext
from trainer.attention.host import Host
from trainer.ops.detach_first_token import DetachFirstToken


def test_first_context_token_gets_no_gradient_and_values_stay() -> None:
    torch.manual_seed(0)
    attn = Attention(16, cross_attention_dim=12, heads=2, dim_head=8)
    x, text = torch.randn(3, 5, 16), torch.randn(3, 7, 12)

    def run() -> tuple[Any, Any, Any, Any]:
        leaf = text.clone().requires_grad_(True)
        attn.zero_grad(set_to_none=True)
        output = attn(x, leaf)
        output.square().sum().backward()
        return output.detach(), leaf.grad, attn.to_k.weight.grad, attn.to_v.weight.grad

    plain, plain_text, plain_k, plain_v = run()
    host = Host.attach(nn.ModuleDict({"attn": attn}))
    host.install(DetachFirstToken(), host.sites)
    output, text_grad, k_grad, v_grad = run()
    torch.testing.assert_close(output, plain, atol=1e-6, rtol=0)
    assert not text_grad[:, 0].any()
    assert plain_text[:, 0].any()
    torch.testing.assert_close(text_grad[:, 1:], plain_text[:, 1:])

    # the missing part of the weight gradient is the one that came through the first token
    first = text[:, :1].clone()
    q = attn.to_q(x).unflatten(-1, (2, 8)).transpose(1, 2)

    def attend(weights: list[torch.Tensor]) -> torch.Tensor:
        heads = [
            torch.cat([first @ w.T, (text[:, 1:] @ fixed.T)], 1).unflatten(-1, (2, 8))
            for w, fixed in zip(weights, (attn.to_k.weight, attn.to_v.weight), strict=True)
        ]
        k, v = (h.transpose(1, 2) for h in heads)
        o = ((q @ k.mT) * 8**-0.5).softmax(-1) @ v
        return attn.to_out[0](o.transpose(1, 2).flatten(2)).square().sum()

    through_first = torch.autograd.grad(
        attend(
            leaves := [
                w.detach().clone().requires_grad_(True)
                for w in (attn.to_k.weight, attn.to_v.weight)
            ]
        ),
        leaves,
    )
    torch.testing.assert_close(k_grad + through_first[0], plain_k, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(v_grad + through_first[1], plain_v, atol=1e-5, rtol=1e-4)
    assert through_first[0].abs().max() > 1e-3


def test_kv_values_keep_every_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 4, generator=generator) for _ in range(3))
    attn = Attention(12, cross_attention_dim=12, heads=3, dim_head=4)
    (site,) = Host.attach(nn.ModuleDict({"attn": attn})).sites
    call = SiteCall(site, StepContext(0, 1, torch.tensor(0)))
    out = DetachFirstToken().kv(q, k, v, call=call)
    assert all(torch.equal(a, b) for a, b in zip(out, (q, k, v), strict=True))
