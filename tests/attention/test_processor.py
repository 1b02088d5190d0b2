"""The hosted processor against diffusers' default, bit for bit, and its stages one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from denoisers import traits_of
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from trainer.attention.call import SiteCall
from trainer.attention.host import Host
from trainer.attention.op import Traits
from trainer.attention.processor import HostedProcessor
from trainer.kernels import softmax as kernels
from trainer.kernels.softmax import eager

Call = Callable[[nn.Module], Tensor]
Gradients = Callable[[nn.Module, Tensor], dict[str, Tensor]]

WIDTH, HEADS, CONTEXT, HEIGHT, BREADTH, KEYS = 32, 4, 12, 3, 5, 7


def layer(**options: Any) -> Attention:
    torch.manual_seed(0)
    attn = Attention(WIDTH, heads=HEADS, dim_head=8, **options)
    for parameter in attn.parameters():  # norms start at one, which would hide a lost norm
        nn.init.normal_(parameter, std=0.5)
    return attn


def data(four_d: bool, cross: bool, mask: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (2, WIDTH, HEIGHT, BREADTH) if four_d else (2, HEIGHT * BREADTH, WIDTH)
    given = {"hidden_states": torch.randn(shape, generator=generator)}
    keys = KEYS if cross else HEIGHT * BREADTH
    if cross:
        given["encoder_hidden_states"] = torch.randn(2, KEYS, CONTEXT, generator=generator)
    rows = {"rows": (2, 1), "heads": (2 * HEADS, 1), "queries": (2, HEIGHT * BREADTH)}
    if mask in rows:
        added = torch.randn(*rows[mask], keys, generator=generator)
        given["attention_mask"] = added.masked_fill(added > 1, -10_000.0)
    return given


def outcome(attn: nn.Module, given: dict[str, Tensor]) -> list[Tensor]:
    """Output, then gradients of inputs and of all parameters."""
    leaves = {name: value.clone().requires_grad_(True) for name, value in given.items()}
    attn.zero_grad(set_to_none=True)
    output = attn(**leaves)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (output * weight).sum().backward()
    grads = [leaf.grad for leaf in leaves.values()] + [p.grad for p in attn.parameters()]
    return [output, *(torch.zeros(()) if g is None else g for g in grads)]


def assert_same_bits(attn: Attention, given: dict[str, Tensor]) -> None:
    attn.set_processor(AttnProcessor2_0())
    expected = outcome(attn, given)
    host = Host.attach(nn.ModuleDict({"attn": attn}))
    assert isinstance(attn.processor, HostedProcessor)
    actual = outcome(attn, given)
    assert len(actual) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    host.detach()


@pytest.mark.parametrize("qk_norm", [None, "layer_norm", "rms_norm"])
@pytest.mark.parametrize("mask", ["none", "rows", "heads", "queries"])
def test_single_layer_is_bit_identical(mask: str, qk_norm: str | None) -> None:
    switches = product([False, True], repeat=5)
    for cross, four_d, group_norm, residual, bias in switches:
        attn = layer(
            cross_attention_dim=CONTEXT if cross else None,
            norm_num_groups=4 if group_norm else None,
            residual_connection=residual,
            rescale_output_factor=1.7 if residual else 1.0,
            bias=bias,
            qk_norm=qk_norm,
        )
        assert_same_bits(attn, data(four_d, cross, mask))


@pytest.mark.parametrize("norm", ["layer_norm", "group_norm"])
def test_cross_norm_is_bit_identical(norm: str) -> None:
    attn = layer(
        cross_attention_dim=CONTEXT, cross_attention_norm=norm, cross_attention_norm_num_groups=4
    )
    assert_same_bits(attn, data(False, True, "rows"))


@pytest.mark.parametrize("cross", [False, True])
def test_spatial_norm_gets_temb_and_is_bit_identical(cross: bool) -> None:
    attn = layer(spatial_norm_dim=6, cross_attention_dim=CONTEXT if cross else None)
    given = data(True, cross, "none")
    given["temb"] = torch.randn(2, 6, 2, 3, generator=torch.Generator().manual_seed(3))
    assert_same_bits(attn, given)


def test_channels_last_input_is_bit_identical() -> None:
    attn = layer(norm_num_groups=4, residual_connection=True)
    given = data(True, False, "none")
    given["hidden_states"] = given["hidden_states"].to(memory_format=torch.channels_last)
    assert_same_bits(attn, given)


def test_unscaled_scores_are_honoured_where_the_default_is_the_legacy_processor() -> None:
    attn = layer(scale_qk=False)
    assert isinstance(attn.processor, AttnProcessor)
    given = data(False, False, "none")
    expected = attn(**given)
    Host.attach(nn.ModuleDict({"attn": attn}))
    torch.testing.assert_close(attn(**given), expected)
    attn.set_processor(AttnProcessor2_0())
    assert not torch.allclose(attn(**given), expected, atol=1e-3)


def test_denoiser_is_bit_identical(backbone: tuple[nn.Module, Call], gradients: Gradients) -> None:
    model, call = backbone
    keys = list(model.state_dict())
    expected = call(model)
    expected_gradients = gradients(model, expected)
    host = Host.attach(model, traits_of(model))
    assert list(model.state_dict()) == keys
    output = call(model)
    assert torch.equal(output, expected)
    actual_gradients = gradients(model, output)
    assert actual_gradients.keys() == expected_gradients.keys()
    assert all(torch.equal(actual_gradients[n], g) for n, g in expected_gradients.items())
    assert all(p.reached for p in host.processors.values())
    host.detach()
    assert torch.equal(call(model), expected)


class Recorder:
    """Has every stage that can share a site, changes nothing, and notes what it was given."""

    name = "recorder"
    traits = Traits(scores=True)

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def tokens(self, x: Tensor, call: SiteCall) -> Tensor:
        self.seen["tokens"] = x.shape
        return x

    def context(self, k_ctx: Tensor, v_ctx: Tensor, call: SiteCall) -> tuple[Tensor, Tensor]:
        self.seen["context"] = (k_ctx.shape, v_ctx.shape)
        return k_ctx, v_ctx

    def kv(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> Any:
        self.seen["kv"] = (q.shape, k.shape, v.shape)
        return q, k, v

    def mask(self, mask: Tensor | None, q: Tensor, k: Tensor, call: SiteCall) -> Any:
        self.seen["mask"] = None if mask is None else mask.shape
        return mask

    def scores(self, scores: Tensor, call: SiteCall) -> Tensor:
        self.seen["scores"] = scores.shape
        return scores

    def probs(self, probs: Tensor, call: SiteCall) -> Tensor:
        self.seen["probs"] = probs
        return probs

    def branch(self, o: Tensor, q: Tensor, call: SiteCall) -> Tensor:
        self.seen["branch"] = (o.shape, q.shape)
        return o

    def output(self, o: Tensor, call: SiteCall) -> Tensor:
        self.seen["output"] = o.shape
        return o

    def restore(self, y: Tensor, call: SiteCall) -> Tensor:
        self.seen["restore"] = y.shape
        return y


def test_stages_run_in_order_with_the_documented_shapes() -> None:
    attn = layer(cross_attention_dim=CONTEXT, residual_connection=True)
    given = data(True, True, "rows")
    expected = attn(**given)
    host = Host.attach(nn.ModuleDict({"attn": attn}))
    recorder = Recorder()
    host.install(recorder, host.sites)
    output = attn(**given)
    n, per_head = HEIGHT * BREADTH, (2, HEADS, HEIGHT * BREADTH, 8)
    probs = recorder.seen["probs"]
    assert recorder.seen == {
        "tokens": (2, n, WIDTH),
        "context": ((2, KEYS, CONTEXT), (2, KEYS, CONTEXT)),
        "kv": (per_head, (2, HEADS, KEYS, 8), (2, HEADS, KEYS, 8)),
        "mask": (2, HEADS, 1, KEYS),
        "scores": (2, HEADS, n, KEYS),
        "probs": probs,
        "branch": (per_head, per_head),
        "output": per_head,
        "restore": (2, n, WIDTH),
    }
    assert list(recorder.seen) == [
        "tokens",
        "context",
        "kv",
        "mask",
        "scores",
        "probs",
        "branch",
        "output",
        "restore",
    ]
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, HEADS, n))
    torch.testing.assert_close(output, expected)  # explicit softmax, so not the same bits


class Named:
    def __init__(self, stage: str) -> None:
        self.name = f"double_{stage}"
        self.traits = Traits(scores=stage in ("scores", "probs"))


def doubling(stage: str) -> Any:
    """An op whose class has exactly one stage, and doubles its first tensor there."""

    def run(
        self: Any, first: Any, *rest: Any, call: Any = None, mask: Any = None, role: str = ""
    ) -> Any:
        if stage == "context":
            return first, 2 * rest[0]  # the call is the last
        if stage == "kv":
            return 2 * first, *rest
        if stage == "mask":
            return first * 2
        if stage == "kernel":
            return 2 * eager(first, *rest, mask)
        return 2 * first

    return type("Doubling", (Named,), {stage: run})(stage)


STAGES = [
    "tokens",
    "context",
    "project",
    "kv",
    "mask",
    "kernel",
    "scores",
    "probs",
    "branch",
    "output",
    "restore",
]


@pytest.mark.parametrize("stage", STAGES)
def test_op_changes_the_output_and_its_removal_restores_every_bit(stage: str) -> None:
    attn = layer(cross_attention_dim=CONTEXT)
    given = data(False, True, "rows")
    expected = attn(**given)
    host = Host.attach(nn.ModuleDict({"attn": attn}))
    op = doubling(stage)
    host.install(op, host.sites)
    assert not torch.allclose(attn(**given), expected, atol=1e-3)
    host.remove(op)
    assert torch.equal(attn(**given), expected)


def test_v_context_reaches_values_only() -> None:
    attn = layer(cross_attention_dim=CONTEXT, cross_attention_norm="layer_norm")
    given = data(False, True, "none")
    other = torch.randn(2, KEYS, CONTEXT, generator=torch.Generator().manual_seed(5))

    class OtherValues:
        name = "other_values"
        traits = Traits()

        def context(self, k_ctx: Tensor, v_ctx: Tensor, call: SiteCall) -> Any:
            return k_ctx, other

    host = Host.attach(nn.ModuleDict({"attn": attn}))
    host.install(OtherValues(), host.sites)
    actual = attn(**given)
    x, text = given["hidden_states"], attn.norm_cross(given["encoder_hidden_states"])
    split = [
        t.unflatten(-1, (HEADS, 8)).transpose(1, 2)
        for t in (attn.to_q(x), attn.to_k(text), attn.to_v(attn.norm_cross(other)))
    ]
    expected = attn.to_out[0](eager(*split).transpose(1, 2).flatten(2))
    torch.testing.assert_close(actual, expected)


def test_project_gets_what_keys_and_values_are_made_of() -> None:
    attn = layer(cross_attention_dim=CONTEXT, cross_attention_norm="layer_norm")
    given = data(False, True, "none")

    class Widened:
        name = "widened"
        traits = Traits()

        def project(self, made: Tensor, x: Tensor, role: str, call: SiteCall) -> Tensor:
            return made + x.mean(-1, keepdim=True) * {"k": 1, "v": 2}[role]

    host = Host.attach(nn.ModuleDict({"attn": attn}))
    host.install(Widened(), host.sites)
    actual = attn(**given)
    x, text = given["hidden_states"], attn.norm_cross(given["encoder_hidden_states"])
    mean = text.mean(-1, keepdim=True)
    split = [
        t.unflatten(-1, (HEADS, 8)).transpose(1, 2)
        for t in (attn.to_q(x), attn.to_k(text) + mean, attn.to_v(text) + 2 * mean)
    ]
    expected = attn.to_out[0](eager(*split).transpose(1, 2).flatten(2))
    torch.testing.assert_close(actual, expected)


def test_gate_keeps_the_fused_kernel() -> None:
    attn = layer()
    given = data(False, False, "none")
    expected = attn(**given)

    class Gated(Recorder):
        open = False

        def gate(self, q: Tensor, call: SiteCall) -> bool:
            return self.open

    host = Host.attach(nn.ModuleDict({"attn": attn}))
    op = Gated()
    host.install(op, host.sites)
    assert torch.equal(attn(**given), expected)
    assert not {"probs", "scores"} & op.seen.keys()
    op.open = True
    attn(**given)
    assert {"probs", "scores"} <= op.seen.keys()


def test_restore_runs_in_reverse_order() -> None:
    order: list[str] = []

    class Wrap:
        traits = Traits()

        def __init__(self, name: str) -> None:
            self.name = name

        def tokens(self, x: Tensor, call: SiteCall) -> Tensor:
            order.append(f"+{self.name}")
            return x

        def restore(self, y: Tensor, call: SiteCall) -> Tensor:
            order.append(f"-{self.name}")
            return y

    attn = layer()
    host = Host.attach(nn.ModuleDict({"attn": attn}))
    host.install(Wrap("a"), host.sites)
    host.install(Wrap("b"), host.sites)
    attn(**data(False, False, "none"))
    assert order == ["+a", "+b", "-b", "-a"]


def test_dropping_tokens_and_restoring_them_keeps_the_shape() -> None:
    class KeepHalf:
        name = "keep_half"
        traits = Traits()

        def tokens(self, x: Tensor, call: SiteCall) -> Tensor:
            call.scratch(self)["count"] = x.shape[1]
            return x[:, ::2]

        def restore(self, y: Tensor, call: SiteCall) -> Tensor:
            return y.repeat_interleave(2, dim=1)[:, : call.scratch(self)["count"]]

    attn = layer(residual_connection=True)
    given = data(True, False, "none")
    expected = attn(**given)
    host = Host.attach(nn.ModuleDict({"attn": attn}))
    host.install(KeepHalf(), host.sites)
    output = attn(**given)
    assert output.shape == expected.shape
    assert not torch.allclose(output, expected, atol=1e-3)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16(
    backbone: tuple[nn.Module, Call], autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, call = backbone
    hosted = copy.deepcopy(model)
    host = Host.attach(hosted, traits_of(hosted))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, output = call(model), call(hosted)
        recorder = Recorder()
        host.install(recorder, [site for site in host.sites if not site.native.linear])
        explicit = call(hosted)
        host.remove(recorder)
        # few keys go another way in half precision; without it the same bits
        torch.testing.assert_close(output, expected, atol=5e-2 if autocast else 0, rtol=0)
        monkeypatch.setattr(kernels, "SOME", 0)
        assert torch.equal(call(hosted), expected)
    assert explicit.dtype == expected.dtype
    torch.testing.assert_close(explicit, expected, atol=5e-2 if autocast else 1e-5, rtol=0)


class Halved:
    """Keeps every `every`-th token, and gives each one that was dropped the next one kept."""

    traits = Traits()

    def __init__(self, name: str, every: int) -> None:
        self.name, self.every = name, every

    def tokens(self, x: Tensor, call: SiteCall) -> Tensor:
        assert not call.scratch(self)  # a run of a layer starts with nothing
        call.scratch(self)["count"] = x.shape[1]
        return x[:, :: self.every]

    def restore(self, y: Tensor, call: SiteCall) -> Tensor:
        return y.repeat_interleave(self.every, dim=1)[:, : call.scratch(self)["count"]]


def test_ops_of_one_site_and_sites_of_one_op_share_no_scratch() -> None:
    """Two ops on two layers that are called with clips of different length."""
    layers = nn.ModuleDict({"a": layer(), "b": layer()})
    host = Host.attach(layers)
    ops = [Halved("twos", 2), Halved("threes", 3)]
    for op in ops:
        host.install(op, host.sites)
    for name, tokens in (("a", 13), ("b", 7), ("a", 5)):
        assert layers[name](torch.randn(1, tokens, WIDTH)).shape[1] == tokens
    assert all(set(vars(op)) == {"name", "every"} for op in ops)
