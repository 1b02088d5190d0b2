"""Layers that keep their own processor: native without an op, and each stage against the same
change made to the model itself, or written out."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from joint_models import JOINT_MODELS, TinyJoint
from torch import Tensor, nn

from trainer.attention.call import SiteCall
from trainer.attention.context import StepContext, use
from trainer.attention.denoiser_traits import DenoiserTraits, JointTraits
from trainer.attention.dispatch import HOSTED, HostedLayer
from trainer.attention.host import Host
from trainer.attention.op import Traits
from trainer.attention.sites import require, select
from trainer.attention.spans import Spans

every_model = pytest.mark.parametrize("name", JOINT_MODELS)


class Op:
    """An op of one stage, from a function of that stage's arguments."""

    def __new__(cls, stage: str, change: Callable[..., Any], **traits: Any) -> Any:
        kind = type(
            "Changed",
            (),
            {
                "name": "changed",
                "traits": Traits(scores=stage in ("scores", "probs"), **traits),
                stage: lambda self, *args, **kwargs: change(*args, **kwargs),
            },
        )
        return kind()


def half(q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> tuple[Tensor, Tensor, Tensor]:
    return q, k, v * 0.5


def by_formula(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Output and probabilities of softmax attention."""
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) * (scale or q.shape[-1] ** -0.5)
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask > -1
        scores = scores.masked_fill(~seen, float("-inf"))
    probs = scores.softmax(-1)
    return torch.einsum("bhnm,bhmd->bhnd", probs, v), probs


def hosted(name: str, op: Any = None, sites: str = "all") -> tuple[Any, Host, TinyJoint]:
    case = JOINT_MODELS[name]
    model = case.make()
    host = Host.attach(model, case.traits)
    if op is not None:
        host.install(op, require(host.sites, sites, "test"))
    return model, host, case


def native(name: str, change: Callable[[Any], None] | None = None) -> Tensor:
    """The output of the model without a host, after a change to it."""
    model = JOINT_MODELS[name].make()
    with torch.no_grad():
        if change is not None:
            change(model)
        return JOINT_MODELS[name].call(model)


def output(model: Any, case: TinyJoint) -> Tensor:
    with torch.no_grad():
        return case.call(model)


def halve_values(model: Any) -> None:
    """V of every attention layer times a half, which is exact, in the weights that make V."""
    for layer in model.modules():
        for own in ("to_v", "add_v_proj"):
            if isinstance(found := getattr(layer, own, None), nn.Linear):
                for parameter in found.parameters():
                    parameter *= 0.5
        if hasattr(layer, "to_qkv_mlp_proj"):
            fused, inner = layer.to_qkv_mlp_proj, layer.inner_dim
            fused.weight[2 * inner : 3 * inner] *= 0.5


@every_model
def test_without_an_op_the_output_is_native_and_nothing_is_in_the_way(name: str) -> None:
    model, host, case = hosted(name)
    assert torch.equal(output(model, case), native(name))
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert any(isinstance(found, HostedLayer) for found in host.processors.values())


@every_model
def test_an_op_that_halves_v_is_the_model_whose_v_is_half_at_every_site(name: str) -> None:
    model, host, case = hosted(name, Op("kv", half))
    changed = output(model, case)
    assert torch.equal(changed, native(name, halve_values))
    assert not torch.equal(changed, native(name))
    assert all(found.reached for found in host.processors.values())
    assert len(host.processors) == len(host.sites)


def without_text(q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> tuple[Tensor, Tensor, Tensor]:
    text = call.spans(k.shape[2], keys=True).text
    return q, k, torch.cat([v[:, :, : text.start], v[:, :, text] * 0, v[:, :, text.stop :]], 2)


def zero_rows(layer: Any, rows: Any) -> None:
    """The output of a layer is zero at these tokens, or at these tokens and channels."""

    def hook(_: Any, __: Any, out: Tensor) -> Tensor:
        kept = out.clone()
        kept[(slice(None), *(rows if isinstance(rows, tuple) else (rows,)))] = 0
        return kept

    layer.register_forward_hook(hook)


def zero_added(model: Any, sites: str = "transformer_blocks") -> None:
    for block in getattr(model, sites):
        for parameter in block.attn.add_v_proj.parameters():
            parameter.zero_()


def zero_text_of_flux(model: Any) -> None:
    zero_added(model)
    for block in model.single_transformer_blocks:
        zero_rows(block.attn.to_v, slice(0, 8))


def zero_text_of_flux2(model: Any) -> None:
    zero_added(model)
    for block in model.single_transformer_blocks:
        inner = block.attn.inner_dim
        columns = slice(2 * inner, 3 * inner)
        zero_rows(block.attn.to_qkv_mlp_proj, (slice(0, 8), columns))


def zero_text_of_z_image(model: Any) -> None:
    """32 image tokens, 16 of which are there to fill up, before 32 of text."""
    for layer in model.layers:
        zero_rows(layer.attention.to_v, slice(32, None))


def zero_text_of_cogvideox(model: Any) -> None:
    for block in model.transformer_blocks:
        zero_rows(block.attn1.to_v, slice(0, 8))


def zero_text_of_hunyuan(model: Any) -> None:
    zero_added(model)
    for block in model.single_transformer_blocks:
        zero_rows(block.attn.to_v, slice(64, None))


def zero_text_of_wan(model: Any) -> None:
    for block in model.blocks:
        for parameter in block.attn2.to_v.parameters():
            parameter.zero_()


ZEROED = {
    "sd3": zero_added,
    "flux": zero_text_of_flux,
    "flux2": zero_text_of_flux2,
    "chroma": zero_text_of_flux,
    "qwen_image": zero_added,
    "z_image": zero_text_of_z_image,
    "cogvideox": zero_text_of_cogvideox,
    "hunyuan_video": zero_text_of_hunyuan,
    "wan": zero_text_of_wan,
}


@pytest.mark.parametrize("name", ZEROED)
def test_the_text_span_is_where_the_model_puts_its_text(name: str) -> None:
    model, _, case = hosted(name, Op("kv", without_text), "joint | cross")
    changed = output(model, case)
    torch.testing.assert_close(changed, native(name, ZEROED[name]), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(changed, native(name), atol=1e-4)


def test_the_spans_of_queries_and_keys_cover_the_sequence() -> None:
    seen: dict[str, Any] = {}

    def look(q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> tuple[Tensor, Tensor, Tensor]:
        spans = call.spans(q.shape[2]), call.spans(k.shape[2] + 3, keys=True)
        seen[call.site.name] = [(s.image.start, s.image.stop, s.text.stop) for s in spans]
        return q, k, v

    model, _, case = hosted("flux2", Op("kv", look))
    output(model, case)
    assert set(map(str, seen.values())) == {str([(8, 24, 8), (8, 24, 8)])}
    model, _, case = hosted("sd3", Op("kv", look), "self")
    output(model, case)
    assert seen["transformer_blocks.0.attn2"] == [(0, 64, 0), (0, 67, 0)]


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen_image", "wan", "ltx", "hunyuan_video"])
def test_a_kernel_by_the_formula_is_the_native_attention(name: str) -> None:
    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Any, call: SiteCall) -> Tensor:
        return by_formula(q, k, v, mask, call.scale)[0]

    model, _, case = hosted(name, Op("kernel", kernel))
    torch.testing.assert_close(output(model, case), native(name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sd3", "flux2", "ltx"])
def test_masks_scores_and_probabilities_are_those_of_the_formula(name: str) -> None:
    """A mask that hides the first key, scores raised at the second, a third of the
    probabilities: each as a kernel written out would have it."""

    def hide(mask: Tensor | None, q: Tensor, k: Tensor, call: SiteCall) -> Tensor:
        seen = torch.ones(q.shape[0], 1, 1, k.shape[2], dtype=torch.bool)
        seen[..., 0] = False
        return seen

    def lift(scores: Tensor, call: SiteCall) -> Tensor:
        return scores + F.one_hot(torch.tensor(1), scores.shape[-1])

    def third(probs: Tensor, call: SiteCall) -> Tensor:
        return probs / 3

    def written(q: Tensor, k: Tensor, v: Tensor, mask: Any, call: SiteCall) -> Tensor:
        scores = torch.einsum("bhnd,bhmd->bhnm", q, k) * (call.scale or q.shape[-1] ** -0.5)
        scores[..., 1] += 1
        scores[..., 0] = float("-inf")
        return torch.einsum("bhnm,bhmd->bhnd", scores.softmax(-1) / 3, v)

    model, host, case = hosted(name)
    for stage, change in (("mask", hide), ("scores", lift), ("probs", third)):
        op = Op(stage, change)
        op.name = stage
        host.install(op, host.sites)
    found = output(model, case)
    model, _, _ = hosted(name, Op("kernel", written))
    torch.testing.assert_close(found, output(model, case), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, native(name), atol=1e-4)


def test_branch_and_output_come_before_the_output_projection() -> None:
    def more(o: Tensor, q: Tensor, call: SiteCall) -> Tensor:
        return o + q

    def double(o: Tensor, call: SiteCall) -> Tensor:
        return 2 * o

    def written(q: Tensor, k: Tensor, v: Tensor, mask: Any, call: SiteCall) -> Tensor:
        return 2 * (F.scaled_dot_product_attention(q, k, v, attn_mask=mask) + q)

    model, host, case = hosted("qwen_image")
    for stage, change in (("branch", more), ("output", double)):
        op = Op(stage, change)
        op.name = stage
        host.install(op, host.sites)
    found = output(model, case)
    model, _, _ = hosted("qwen_image", Op("kernel", written))
    torch.testing.assert_close(found, output(model, case))


class Shared(nn.Module):
    """A layer of four query heads and two of keys, causal, that calls as it is told."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.heads, self.head_dim = 4, 3
        self.to_q, self.to_k, self.to_v = nn.Linear(12, 12), nn.Linear(12, 6), nn.Linear(12, 6)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 3)) for f in (self.to_q, self.to_k, self.to_v))
        if self.call is F.scaled_dot_product_attention:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.7)
            return o.transpose(1, 2).flatten(2)
        return self.call(q, k, v, is_causal=True, enable_gqa=True, scale=0.7).flatten(2)


@pytest.mark.parametrize("way", ["torch", "diffusers"])
def test_grouped_queries_causal_masks_and_scales_reach_ops_written_out(way: str) -> None:
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    torch.manual_seed(0)
    call = F.scaled_dot_product_attention if way == "torch" else dispatch_attention_fn
    model = nn.ModuleDict({"layer": Shared(call)})
    x = torch.randn(2, 5, 12)
    expected = model["layer"](x)
    seen: list[Tensor] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Any, call: SiteCall) -> Tensor:
        seen.extend((q, k, v))
        return by_formula(q, k, v, mask, call.scale)[0]

    host = Host.attach(model)
    host.install(Op("kernel", kernel), host.sites)
    torch.testing.assert_close(model["layer"](x), expected)
    assert [tuple(t.shape) for t in seen] == [(2, 4, 5, 3)] * 3
    assert torch.equal(seen[1][:, 0], seen[1][:, 1])
    assert not torch.equal(seen[1][:, 1], seen[1][:, 2])


def test_gradient_checkpointing_runs_the_layer_again_with_its_ops() -> None:
    grads = []
    for checkpointing in (False, True):
        model, _, case = hosted("flux", Op("kv", half))
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        with use(StepContext(3, 9, torch.tensor(0))):
            found = case.call(model)
        found.square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert all(torch.equal(grads[1][name], grad) for name, grad in grads[0].items())


def test_an_op_that_trains_belongs_to_the_site_and_to_the_copy() -> None:
    class Gain(nn.Module):
        name = "gain"
        traits = Traits()

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.5]))

        def output(self, o: Tensor, call: SiteCall) -> Tensor:
            return o * self.weight

    model, host, case = hosted("flux", Gain(), "name:single*")
    assert "single_transformer_blocks.0.attn.gain.weight" in dict(model.named_parameters())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.single_transformer_blocks[0].attn.gain.weight.zero_()
    before = output(model, case)
    assert not torch.equal(output(twin, case), before)
    own = Host.attach(twin)
    assert own is not host
    (site,) = select(own.sites, "name:single*")
    assert site.module is twin.single_transformer_blocks[0].attn
    own.detach()
    assert torch.equal(output(twin, case), native("flux"))
    assert torch.equal(output(model, case), before)


def test_detach_leaves_the_model_as_it_was() -> None:
    model, host, case = hosted("sd3", Op("kv", half))
    host.detach()
    assert not any({HOSTED, "forward"} & set(module.__dict__) for module in model.modules())
    assert torch.equal(output(model, case), native("sd3"))


def test_another_replacement_of_a_forward_is_called_and_put_back() -> None:
    model, host, case = hosted("flux")
    layer = model.transformer_blocks[0].attn
    plain = type(layer).forward
    layer.forward = lambda *args, **kwargs: [2 * y for y in plain(layer, *args, **kwargs)]
    own, doubled = layer.forward, output(model, case)
    op = Op("kv", lambda q, k, v, call: (q, k, v))
    host.install(op, host.sites)
    assert torch.equal(output(model, case), doubled)
    host.remove(op)
    assert layer.forward is own


def test_a_forward_replaced_while_ops_are_there_keeps_them_and_never_calls_itself() -> None:
    op, again = Op("kv", half), Op("kv", half)
    model, host, case = hosted("flux", op)
    layer = model.transformer_blocks[0].attn
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: inner(*args, **kwargs)  # as offloading does
    halved = output(model, case)
    assert torch.equal(halved, native("flux", halve_values))
    host.remove(op)
    assert torch.equal(output(model, case), native("flux"))
    host.install(again, host.sites)
    assert torch.equal(output(model, case), halved)


def test_another_model_in_the_same_process_is_untouched() -> None:
    other, case = JOINT_MODELS["flux"].make(), JOINT_MODELS["flux"]
    inside: list[Tensor] = []

    def nested(q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> tuple[Tensor, Tensor, Tensor]:
        inside.append(output(other, case))  # while a hosted layer runs
        return half(q, k, v, call)

    model, _, _ = hosted("flux", Op("kv", nested))
    assert torch.equal(output(model, case), native("flux", halve_values))
    assert torch.equal(output(other, case), native("flux"))
    assert len(inside) == 2
    assert all(torch.equal(found, native("flux")) for found in inside)


def test_threads_have_each_their_own_ops() -> None:
    """Two hosted models in two threads, of which each waits in its op for the other's."""
    meet, found = threading.Barrier(2), {}

    def scaled_by(factor: float) -> Any:
        def scaled(q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> Any:
            meet.wait(timeout=30)
            return q, k, v * factor

        return Op("kv", scaled)

    def run(factor: float, model: Any, given: dict[str, Any]) -> None:
        with torch.no_grad():
            found[factor] = model(**given, return_dict=False)[0]

    threads = []
    for factor in (0.5, 1.0):
        model, _, case = hosted("flux", scaled_by(factor))
        threads.append(threading.Thread(target=run, args=(factor, model, inputs(case))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found[1.0], native("flux"))
    assert torch.equal(found[0.5], native("flux", halve_values))


def inputs(case: TinyJoint) -> dict[str, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return case.inputs()


def test_an_op_that_fails_leaves_attention_as_it_was() -> None:
    def fail(q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> Any:
        raise ArithmeticError("on purpose")

    model, host, case = hosted("flux", Op("kv", fail))
    with pytest.raises(ArithmeticError, match="on purpose"):
        output(model, case)
    assert torch.overrides._get_current_function_mode_stack() == []
    host.detach()
    assert torch.equal(output(model, case), native("flux"))


def test_a_compiled_block_runs_its_ops() -> None:
    model, _, case = hosted("flux", Op("kv", half))
    model.transformer_blocks[0].compile(backend="aot_eager")
    torch.testing.assert_close(output(model, case), native("flux", halve_values))


def test_tokens_and_restore_see_the_image_of_one_stream_or_two() -> None:
    """As hooks on the native layer would: on its first argument, or the image part of it."""

    def bound(x: Tensor, call: SiteCall) -> Tensor:
        assert x.shape[1] == 16
        return 3 * x

    def times(part: slice) -> Any:
        def hook(_: Any, args: Any, kwargs: Any) -> Any:
            x = kwargs["hidden_states"].clone()
            x[:, part] *= 3
            return args, kwargs | {"hidden_states": x}

        return hook

    def change(model: Any) -> None:
        for block in model.transformer_blocks:
            block.attn.register_forward_pre_hook(times(slice(None)), with_kwargs=True)
            block.attn.register_forward_hook(lambda _, __, y: (3 * y[0], y[1]))
        for block in model.single_transformer_blocks:
            block.attn.register_forward_pre_hook(times(slice(8, None)), with_kwargs=True)

    model, host, case = hosted("flux", Op("tokens", bound))
    op = Op("restore", bound)
    op.name = "restore"
    host.install(op, select(host.sites, "!name:single*"))
    torch.testing.assert_close(output(model, case), native("flux", change), rtol=1e-6, atol=1e-6)


def test_context_is_what_text_keys_and_values_are_made_of_also_under_an_adapter() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    def change(k: Tensor, v: Tensor, call: SiteCall) -> tuple[Tensor, Tensor]:
        assert k.shape[1] == 7
        return 2 * k, 3 * v

    def by_hooks(model: Any) -> None:
        adapt(model)
        for block in model.transformer_blocks:
            block.attn.add_k_proj.register_forward_pre_hook(lambda _, x: (2 * x[0],))
            block.attn.add_v_proj.register_forward_pre_hook(lambda _, x: (3 * x[0],))

    def adapt(model: Any) -> None:
        torch.manual_seed(5)
        config = LoraConfig(target_modules=["add_k_proj", "add_v_proj"], init_lora_weights=False)
        inject_adapter_in_model(config, model)

    model, _, case = hosted("qwen_image", Op("context", change))
    adapt(model)
    found = output(model, case)
    assert torch.equal(found, native("qwen_image", by_hooks))
    assert not torch.equal(found, native("qwen_image", adapt))


def test_context_of_cross_attention_is_what_its_keys_and_values_are_made_of() -> None:
    def by_hooks(model: Any) -> None:
        for block in model.blocks:
            block.attn2.to_v.register_forward_pre_hook(lambda _, x: (3 * x[0],))

    model, _, case = hosted("wan", Op("context", lambda k, v, call: (k, 3 * v)), "cross")
    assert torch.equal(output(model, case), native("wan", by_hooks))


def test_project_changes_what_keys_and_values_are_made_to() -> None:
    """The layers with an adapter on them; the text has layers of its own, which are left alone."""
    from peft import LoraConfig, inject_adapter_in_model

    def change(made: Tensor, x: Tensor, role: str, call: SiteCall) -> Tensor:
        return 2 * made + x if role == "k" else 3 * made

    def by_hooks(model: Any) -> None:
        adapt(model)
        for block in model.transformer_blocks:
            block.attn.to_k.register_forward_hook(lambda _, x, made: 2 * made + x[0])
            block.attn.to_v.register_forward_hook(lambda _, x, made: 3 * made)

    def adapt(model: Any) -> None:
        torch.manual_seed(5)
        config = LoraConfig(target_modules=["to_k", "to_v"], init_lora_weights=False)
        inject_adapter_in_model(config, model)

    model, _, case = hosted("qwen_image", Op("project", change))
    adapt(model)
    found = output(model, case)
    assert torch.equal(found, native("qwen_image", by_hooks))
    assert not torch.equal(found, native("qwen_image", adapt))


def test_the_block_stage_comes_after_the_block() -> None:
    def by_hooks(model: Any) -> None:
        for block in model.blocks:
            block.register_forward_hook(lambda _, __, x: x + 1)

    model, _, case = hosted("wan", Op("block", lambda x, call: x + 1), "self")
    assert torch.equal(output(model, case), native("wan", by_hooks))


IDENTITY = {
    "tokens": lambda x, call: x,
    "context": lambda k, v, call: (k, v),
    "project": lambda made, x, role, call: made,
    "restore": lambda y, call: y,
    "block": lambda x, call: x,
    "kernel": lambda q, k, v, mask, call: q,
}


@pytest.mark.parametrize(
    ("name", "sites", "stage", "why"),
    [
        ("sd3", "joint", "block", "the block around it returns image and text"),
        ("flux", "name:single*", "context", "has no layers for text tokens alone"),
        ("flux2", "name:single*", "project", "one fused layer, to_qkv_mlp_proj; its role is qkv"),
        ("flux", "name:single*", "restore", "leaves its output projection to the block around"),
        ("flux2", "name:single*", "restore", "output projection fused with the feed-forward"),
        ("z_image", "joint", "context", "has no layers for text tokens alone"),
    ],
)
def test_a_stage_that_cannot_be_had_is_refused_by_name(
    name: str, sites: str, stage: str, why: str
) -> None:
    model, host, _ = hosted(name)
    chosen = require(host.sites, sites, "test")
    with pytest.raises(ValueError, match=f"has the stage {stage}, which {chosen[0].name!r}") as bad:
        host.install(Op(stage, IDENTITY[stage]), chosen)
    assert why in str(bad.value)
    assert not any(found.ops for found in host.processors.values())
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    ("traits", "why"),
    [
        ({"grid": True}, "works on tokens of the image alone, and"),
        ({"classic": True}, "computes again what classic attention computes"),
    ],
)
def test_what_an_op_assumes_is_refused_where_it_does_not_hold(traits: Any, why: str) -> None:
    _, host, _ = hosted("flux")
    with pytest.raises(ValueError, match=why):
        host.install(Op("kernel", IDENTITY["kernel"], **traits), host.sites[:1])


def test_a_family_that_declares_nothing_has_no_spans_and_no_grids() -> None:
    for kind, why in (("joint", "does not declare their order"), ("self", "may have text among")):
        case = JOINT_MODELS["sd3"]
        model = case.make()
        host = Host.attach(model)
        host.install(Op("kv", without_text), select(host.sites, kind))
        with pytest.raises(ValueError, match=why):
            output(model, case)
    with pytest.raises(ValueError, match="may have others: the model's family does not declare"):
        host.install(Op("kernel", IDENTITY["kernel"], grid=True), select(host.sites, "self"))


def test_a_grid_is_that_of_the_image_tokens_and_never_guessed() -> None:
    found: list[Any] = []

    def look(q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> tuple[Tensor, Tensor, Tensor]:
        image = call.spans(q.shape[2]).image
        found.append(call.grid(image.stop - image.start, "test"))
        with pytest.raises(ValueError, match=r"test needs a grid of image tokens, and .* has"):
            call.grid(q.shape[2], "test")
        return q, k, v

    model, _, case = hosted("sd3", Op("kv", look), "joint")
    output(model, case)
    assert found == [(8, 8)] * 2
    found.clear()
    model, _, case = hosted("flux", Op("kv", look), "joint")
    with pytest.raises(ValueError, match="cannot find the grid of 16 tokens"):
        output(model, case)
    with use(StepContext(0, 1, torch.tensor(0), latent_size=(2, 8))):
        output(model, case)
    assert found == [(2, 8)] * 2


def test_text_tokens_of_the_context_win_over_those_of_the_call() -> None:
    seen: list[int] = []

    def look(q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(call.spans(q.shape[2]).image.start)
        return q, k, v

    model, _, case = hosted("flux", Op("kv", look), "name:single*")
    with use(StepContext(0, 1, torch.tensor(0), text_tokens=9)):
        output(model, case)
    assert seen == [9]
    with (
        use(StepContext(0, 1, torch.tensor(0), text_tokens=25)),
        pytest.raises(ValueError, match="has 24 tokens of text and image, and how many are text"),
    ):
        output(model, case)


def test_a_number_of_tokens_changes_only_where_positions_allow_it() -> None:
    model, _, case = hosted("flux", Op("tokens", lambda x, call: x[:, ::2]), "!name:single*")
    with pytest.raises(ValueError, match="changes the number of tokens, and 'transformer_blocks"):
        output(model, case)


def test_positions_that_a_block_gives_by_place_are_seen() -> None:
    """Wan's blocks call self-attention as attn1(tokens, None, None, positions)."""
    model, _, case = hosted("wan", Op("tokens", lambda x, call: x[:, ::2]), "self")
    with pytest.raises(ValueError, match="its position by its number; choose other sites"):
        output(model, case)


def test_spans_are_known_before_the_first_attention_call() -> None:
    seen: list[Any] = []

    def look(x: Tensor, call: SiteCall) -> Tensor:
        seen.append((call.part, call.spans(24 if "single" in call.site.name else 16)))
        return x

    model, _, case = hosted("flux", Op("tokens", look))
    output(model, case)
    image, both = (Spans(slice(*a), slice(*b)) for a, b in (((0, 16), (0, 0)), ((8, 24), (0, 8))))
    assert seen == [(-1, image), (-1, both)]


def test_a_layer_that_no_longer_attends_is_reported() -> None:
    class Silent:
        def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
            return hidden_states

    model, _, case = hosted("flux", Op("kv", half))
    model.single_transformer_blocks[0].attn.set_processor(Silent())
    with pytest.raises(RuntimeError, match=r"never reached: single_transformer_blocks\.0\.attn\."):
        output(model, case)


def test_another_back_end_is_refused_when_the_host_comes_to_it() -> None:
    model = JOINT_MODELS["flux"].make()
    model.transformer_blocks[0].attn.processor._attention_backend = "flash"
    with pytest.raises(ValueError, match=r"FluxAttention with FluxAttnProcessor at 'transformer_b"):
        Host.attach(model)


def test_a_host_that_would_host_nothing_refuses() -> None:
    with pytest.raises(ValueError, match="Linear has no attention layer to host"):
        Host.attach(nn.Linear(2, 2))


class Plain(nn.Module):
    """Softmax attention of two heads, called with these options."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.heads, self.options = 2, options
        self.to_q, self.to_k, self.to_v = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (2, 2)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v)
        )
        return F.scaled_dot_product_attention(q, k, v, **self.options)


def test_attention_dropout_is_no_kernels_business() -> None:
    model = nn.ModuleDict({"layer": Plain(dropout_p=0.5)})
    host = Host.attach(model, DenoiserTraits(joint=()))
    before = Op("tokens", IDENTITY["tokens"], owner="before")
    before.name = "before"
    for op in (before, Op("kernel", IDENTITY["kernel"], owner="mine")):
        host.install(op, host.sites)
    why = r"methods\.mine computes attention without dropout, and 'layer' drops 0\.5 of it"
    with pytest.raises(ValueError, match=why):
        model["layer"](torch.randn(1, 3, 4))


def test_kinds_and_roles_of_the_layers() -> None:
    seen = {}
    for name in JOINT_MODELS:
        _, host, _ = hosted(name)
        seen[name] = {
            site.name.split(".")[0] + "." + site.name.split(".")[-1]: (
                site.kind,
                "".join(role[0] for role in site.projections if role in ("q", "k", "v", "out")),
                [role for role in site.projections if role not in ("q", "k", "v", "out")],
            )
            for site in host.sites
        }
    added = ["add_q", "add_k", "add_v", "add_out"]
    assert seen["flux"] == {
        "transformer_blocks.attn": ("joint", "qkvo", added),
        "single_transformer_blocks.attn": ("joint", "qkv", []),
    }
    assert seen["flux2"]["single_transformer_blocks.attn"] == ("joint", "", ["qkv"])
    assert seen["wan"] == {
        "blocks.attn1": ("self", "qkvo", []),
        "blocks.attn2": ("cross", "qkvo", []),
    }
    assert seen["sd3"]["transformer_blocks.attn2"] == ("self", "qkvo", [])
    # the last block of SD3 drops its text, which needs no output projection
    assert seen["sd3"]["transformer_blocks.attn"] == ("joint", "qkvo", added[:3])
    assert {kind for kind, *_ in seen["cogvideox"].values()} == {"joint"}
    _, host, _ = hosted("flux2")
    with pytest.raises(ValueError, match="has no layer of the role k: Flux2ParallelSelfAttention"):
        host.sites[-1].projection("k")
    assert select(host.sites, "joint & !name:single*") == host.sites[:1]


def test_a_layer_whose_projections_were_fused_since_says_so() -> None:
    model, host, case = hosted("flux")
    model.fuse_qkv_projections()
    first, single = host.sites
    for site, role in ((first, "q"), (first, "add_v"), (single, "k")):
        with pytest.raises(ValueError, match=f"has no layer of the role {role}: FluxAttention com"):
            site.projection(role)
    assert list(first.projections) == ["out", "add_out", "qkv"]
    assert list(single.projections) == ["qkv"]
    host.install(Op("kv", half), host.sites)

    def fused_and_halved(model: Any) -> None:
        halve_values(model)
        model.fuse_qkv_projections()

    assert torch.equal(output(model, case), native("flux", fused_and_halved))


def test_a_processor_that_reads_a_picture_too_is_hosted_in_both_its_calls(
    tiny_unet: nn.Module, run_unet: Callable[..., Tensor]
) -> None:
    """IP-Adapter: text and picture in two softmaxes of one layer."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    torch.manual_seed(0)
    model: Any = tiny_unet
    layer = model.mid_block.attentions[0].transformer_blocks[0].attn2
    layer.set_processor(IPAdapterAttnProcessor2_0(32, 12, num_tokens=(2,)))
    text, picture = torch.randn(2, 5, 12), [torch.randn(2, 1, 2, 12)]
    given = {"hidden_states": torch.randn(2, 4, 32), "encoder_hidden_states": (text, picture)}
    expected = layer(**given)
    host = Host.attach(model)
    (site,) = require(host.sites, "mid & cross", "test")
    assert site.keeps_processor
    assert torch.equal(layer(**given), expected)
    seen: list[tuple[int, int]] = []

    def look(q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> tuple[Tensor, Tensor, Tensor]:
        seen.append((call.part, k.shape[2]))
        if call.part:
            with pytest.raises(ValueError, match="attends several times in one run"):
                call.spans(k.shape[2], keys=True)
        return q, k, 2 * v

    host.install(Op("kv", look), [site])
    out = layer.to_out[0]
    doubled = layer(**given)
    torch.testing.assert_close(doubled - out.bias, 2 * (expected - out.bias))
    assert seen == [(0, 5), (1, 2)]


def test_keys_of_text_beside_those_of_the_image() -> None:
    """The queries are the image's, the keys text before image: the attention of unCLIP's U-Nets."""
    from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0

    torch.manual_seed(0)
    layer = Attention(
        8, 8, heads=2, dim_head=4, added_kv_proj_dim=6, norm_num_groups=2,
        processor=AttnAddedKVProcessor2_0(),
    )  # fmt: skip
    model = nn.ModuleDict({"layer": layer})
    host = Host.attach(model, DenoiserTraits(joint=(JointTraits("layer", text_first=True),)))
    (site,) = host.sites
    assert site.kind == "joint"
    found: list[Any] = []

    def look(q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> tuple[Tensor, Tensor, Tensor]:
        found.extend((call.spans(q.shape[2]), call.spans(k.shape[2], keys=True)))
        return without_text(q, k, v, call)

    x, text = torch.randn(2, 8, 3, 3), torch.randn(2, 5, 6)
    host.install(Op("kv", look), [site])
    hidden = layer(x, text)
    assert [(s.image.start, s.image.stop, s.text.stop) for s in found] == [(0, 9, 0), (5, 14, 5)]
    host.detach()
    with torch.no_grad():
        for parameter in layer.add_v_proj.parameters():
            parameter.zero_()
    torch.testing.assert_close(hidden, layer(x, text))
    host = Host.attach(model, DenoiserTraits(joint=()))
    with pytest.raises(ValueError, match="its processor norms the tokens itself"):
        host.install(Op("tokens", IDENTITY["tokens"]), host.sites)


def test_masks_of_few_axes_reach_ops_with_four() -> None:
    seen: list[int] = []

    def look(mask: Tensor | None, q: Tensor, k: Tensor, call: SiteCall) -> Tensor | None:
        assert mask is not None
        seen.append(mask.ndim)
        return mask

    layer = Plain(attn_mask=torch.ones(3, 3, dtype=torch.bool).tril())
    model, x = nn.ModuleDict({"layer": layer}), torch.randn(1, 3, 4)
    expected = model["layer"](x)
    host = Host.attach(model)
    host.install(Op("mask", look), host.sites)
    assert torch.equal(model["layer"](x), expected)
    assert seen == [4]


def test_what_a_family_declares_of_a_kind_counts() -> None:
    model = JOINT_MODELS["z_image"].make()
    own = DenoiserTraits(joint=(), kinds={"layers.1.*": "cross", "layers.*": "temporal"})
    kinds = {site.name: site.kind for site in Host.attach(model, own).sites}
    assert kinds["layers.0.attention"] == "temporal"
    assert kinds["layers.1.attention"] == "cross"
    assert kinds["noise_refiner.0.attention"] == "self"


def test_ops_on_words_refuse_keys_that_may_be_a_pictures() -> None:
    """A video model that also reads a picture attends to its tokens before those of the text."""
    from trainer.ops.detach_first_token import DetachFirstToken

    case = JOINT_MODELS["wan"]
    model = case.make(image_dim=16, added_kv_proj_dim=24)
    host = Host.attach(model, case.traits)
    sites = select(host.sites, "cross")
    assert [role for role in sites[0].projections if role.startswith("add")] == ["add_k", "add_v"]
    given = inputs(case) | {
        "encoder_hidden_states": torch.randn(1, 512, 16),
        "encoder_hidden_states_image": torch.randn(1, 3, 16),
    }
    seen: list[tuple[int, int]] = []

    def look(q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> tuple[Tensor, Tensor, Tensor]:
        seen.append((call.part, k.shape[2]))
        return q, k, v

    op = Op("kv", look)
    with torch.no_grad():
        expected = model(**given, return_dict=False)[0]
        host.install(op, sites[:1])
        assert torch.equal(model(**given, return_dict=False)[0], expected)
        assert seen == [(0, 3), (1, 512)]
        host.install(DetachFirstToken(), sites[:1])
        with pytest.raises(ValueError, match="attends several times in one run, and which of the"):
            model(**given)


def test_a_classic_layer_is_hosted_by_its_call_only_while_its_processor_is_another(
    tiny_unet: nn.Module, run_unet: Callable[..., Tensor]
) -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    class Own(AttnProcessor2_0):
        pass

    plain = run_unet(tiny_unet)
    model: Any = tiny_unet
    layer = model.mid_block.attentions[0].transformer_blocks[0].attn1
    layer.set_processor(Own())
    host = Host.attach(model)
    op = Op("kv", half)
    sites = require(host.sites, "self & mid", "test")
    host.install(op, sites)
    assert isinstance(layer.processor, Own)
    changed = run_unet(model)
    layer.set_processor(AttnProcessor2_0())
    Host.attach(model)
    assert torch.equal(run_unet(model), changed)
    host.remove(op)
    Host.attach(model)
    assert not {HOSTED, "forward"} & set(layer.__dict__)
    host.install(op, require(host.sites, "self & mid", "test"))
    torch.testing.assert_close(run_unet(model), changed)
    assert not torch.allclose(changed, plain, atol=1e-4)
