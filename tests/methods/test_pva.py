"""PVA: one softmax over the text and over reference pictures, which have queries of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention.condition import Condition
from trainer.attention.context import StepContext, use
from trainer.config.load import methods_of
from trainer.methods.apply import Plan, apply_methods
from trainer.ops.pva import TOKENS

SMALL = {"count": 3, "depth": 1, "heads": 1, "inner": 16}


def applied(backbone: Any, **options: Any) -> Plan:
    return apply_methods(backbone, methods_of({"pva": SMALL | options}))


def predicted(backbone: Any, **further: Tensor) -> Tensor:
    given = replace(backbone.encode_prompts(["a fox", ""]), further=further)
    x_t = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([20, 700])
    with torch.no_grad(), use(StepContext(0, 1, t, condition=given)):
        output: Tensor = backbone.predict(x_t, t, given)
    return output


@pytest.fixture(params=["tiny_folder", "dit_folder"])
def backbone(request: pytest.FixtureRequest, open_folder: Callable[[Path], Any]) -> Any:
    return open_folder(request.getfixturevalue(request.param))


def test_without_a_reference_it_is_the_base(backbone: Any) -> None:
    before = predicted(backbone)
    applied(backbone)
    assert torch.equal(predicted(backbone), before)
    width = backbone.extras["pva_projector"].proj_out.out_features
    assert not torch.equal(predicted(backbone, **{TOKENS: torch.randn(2, 3, width)}), before)


@pytest.mark.parametrize("masked", [False, True])
def test_a_site_computes_as_a_loop_over_tokens(masked: bool, tiny: Any, randomise: Any) -> None:
    """Forward and gradient, with 5 text tokens, of which a mask hides two, and 3 of a picture."""
    randomise(tiny, applied(tiny, sites="cross & mid"))
    (hosted,) = (p for p in tiny.host.processors.values() if p.ops)
    (op,), attention, heads = hosted.ops, hosted.site.module, hosted.site.heads
    x = torch.randn(2, 6, attention.to_q.in_features, requires_grad=True)
    text, seen = torch.randn(2, 5, 128), torch.randn(2, 3, 128)
    told = Condition(further={TOKENS: seen})
    hosted.holder.ctx = StepContext(0, 1, torch.zeros(()), condition=told)
    hidden = torch.tensor([[0.0, 0, -1e9, 0, -1e9]]).expand(2, -1) if masked else None
    mask = None if hidden is None else hidden[:, None]
    found = attention(x, encoder_hidden_states=text, attention_mask=mask)

    rows = []
    for row in range(2):
        parts = [layer(own[row]).unflatten(-1, (heads, -1)) for layer, own in (
            (attention.to_q, x), (attention.to_k, text), (attention.to_v, text),
            (op.to_q, x), (op.to_k, seen), (op.to_v, seen))]  # fmt: skip
        q, k, v, q_v, k_v, v_v = parts
        out = []
        for head in range(heads):
            of_text = q[:, head] @ k[:, head].T
            of_text = of_text if hidden is None else of_text + hidden[row]
            scores = torch.cat([of_text, q_v[:, head] @ k_v[:, head].T], 1)
            probs = (scores / q.shape[-1] ** 0.5).softmax(-1)
            out.append(probs @ torch.cat([v[:, head], v_v[:, head]]))
        rows.append(attention.to_out[0](torch.stack(out, 1).flatten(1)))
    wanted = torch.stack(rows)
    assert float((found - wanted).detach().abs().max()) < 2e-6
    own, other = (torch.autograd.grad(each.square().sum(), x)[0] for each in (found, wanted))
    assert float((own - other).abs().max()) < 1e-4 * float(other.abs().max())


def test_the_layers_begin_as_copies_of_the_texts(tiny: Any) -> None:
    applied(tiny)
    hosted = next(p for p in tiny.host.processors.values() if p.ops)
    for role in "qkv":
        own, text = (getattr(each, f"to_{role}") for each in (hosted.ops[0], hosted.site.module))
        assert torch.equal(own.weight, text.weight) and own.weight is not text.weight


def test_to_personalise_the_attention_alone_trains(tiny: Any) -> None:
    plan = applied(tiny, personalise=True)
    assert plan.names and all(".attn2.pva.to_" in name for name in plan.names)
    assert plan.keeps and all(name.startswith("extras.pva_projector.") for name in plan.keeps)


def test_self_attention_is_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"select cross-attention, as in sites=cross"):
        applied(tiny, sites="self")


def test_it_is_refused_beside_a_linear_kernel(tiny: Any) -> None:
    chosen = {"pva": SMALL, "linear_attention": {"sites": "cross"}}
    with pytest.raises(ValueError, match="pva"):
        apply_methods(tiny, methods_of(chosen))
