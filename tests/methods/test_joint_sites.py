"""Methods on attention of image and text in one sequence: which layers they take, and what they
refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from joint_models import JointBackbone

from trainer.attention.context import StepContext, use
from trainer.methods.apply import apply_methods, find_method, method_names

ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "dora": {"rank": 2},
    "peft_adapter": {"type": "loha", "options": {"r": 2, "alpha": 2}},
}


def applied(name: str, **methods: dict[str, Any]) -> tuple[JointBackbone, Any]:
    backbone = JointBackbone(name)
    chosen = {key: find_method(key)(**options) for key, options in methods.items()}
    return backbone, apply_methods(backbone, chosen)  # type: ignore[arg-type]


def layers(plan: Any) -> set[str]:
    """Names of the adapted layers, in the first blocks."""
    found = {name.partition(".lora_")[0].partition("transformer.")[2] for name in plan.names}
    return {name for name in found if ".0." in name}


@pytest.mark.parametrize("method", ["lora", "dora", "peft_adapter"])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_adapters_train_and_leave_the_base_as_it_was(name: str, method: str) -> None:
    options = {
        "lora": {"rank": 2},
        "dora": {"rank": 2},
        "peft_adapter": {"type": "loha", "options": {"r": 2, "alpha": 2}},
    }
    backbone, plan = applied(name, **{method: options[method]})
    before = {n: p.detach().clone() for n, p in backbone.named_parameters()}
    start = backbone.output().detach()
    assert torch.equal(start, JointBackbone(name).output()) or method == "dora"
    torch.testing.assert_close(start, JointBackbone(name).output())
    target = torch.randn(start.shape, generator=torch.Generator().manual_seed(4))
    trained = [p for _, p in backbone.named_parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = (backbone.output() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {n for n, p in backbone.named_parameters() if not torch.equal(p, before[n])}
    assert changed <= set(plan.names)
    for layer in ADDED:
        assert any(f".attn.{layer}." in name for name in changed) or layer == "to_add_out"
    if name == "flux":
        assert any("to_add_out" in n for n in changed)
        assert any("single_transformer_blocks.0.attn.to_v" in n for n in changed)


def test_which_layers_a_lora_takes_of_one_stream_and_of_two() -> None:
    _, plan = applied("flux", lora={"rank": 2})
    own = {f"to_{role}" for role in "qkv"}
    assert layers(plan) == {
        *(f"transformer_blocks.0.attn.{name}" for name in (*own, "to_out.0", *ADDED)),
        *(f"single_transformer_blocks.0.attn.{name}" for name in own),
    }
    _, plan = applied("flux2", lora={"rank": 2})
    assert "single_transformer_blocks.0.attn.to_qkv_mlp_proj" in layers(plan)
    _, plan = applied("flux", lora={"rank": 2, "projections": ["add_k", "v"]})
    assert layers(plan) == {
        "transformer_blocks.0.attn.add_k_proj",
        "transformer_blocks.0.attn.to_v",
        "single_transformer_blocks.0.attn.to_v",
    }


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("flux2", {"projections": ["q"]}, "fused layer, to_qkv_mlp_proj; its role is qkv"),
        ("wan", {"projections": ["add_k"]}, "has no layers for text tokens alone"),
        ("flux", {"sites": "name:single*", "projections": ["out"]}, "leaves its output projection"),
        ("wan", {"sites": "joint"}, "has the kinds cross, self"),
    ],
)
def test_a_role_that_is_not_there_is_refused_by_name(name: str, options: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        applied(name, lora={"rank": 2, **options})


def test_selective_trains_the_keys_and_values_of_the_text() -> None:
    backbone, plan = applied("sd3", selective={"sites": "joint", "projections": ["add_k", "add_v"]})
    assert len(plan.names) == 2 * 2 * 2
    assert all(".add_k_proj." in name or ".add_v_proj." in name for name in plan.names)
    backbone.output().sum().backward()
    assert all(
        (p.grad is not None) == (name in plan.names) for name, p in backbone.named_parameters()
    )


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        (
            "sd3",
            {"sites": "joint", "projections": ["k"]},
            r"read the image, and keys and values of the text.*\[add_k,add_v\]",
        ),
        (
            "flux2",
            {"sites": "name:single*", "projections": ["k"]},
            "fused layer, to_qkv_mlp_proj; its role is qkv",
        ),
        (
            "flux2",
            {"sites": "name:single*", "projections": ["qkv"]},
            "makes queries, keys and values of image and text by the same weights",
        ),
        ("sd3", {"projections": ["q", "k"]}, "projections=q of .* do not read the text alone"),
        ("sd3", {"sites": "joint", "detach_first_token": True}, "needs cross-attention"),
    ],
)
def test_selective_refuses_layers_that_are_not_the_texts(
    name: str, options: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        applied(name, selective=options)


CROSS = (".attn2.to_k.", ".attn2.to_v.")
OWN, BOTH = (".add_k_proj.", ".add_v_proj."), (".text_span.changes.k.", ".text_span.changes.v.")
OF_TEXT = {
    "sd3": OWN, "flux": OWN, "flux2": OWN, "chroma": OWN, "qwen_image": OWN, "z_image": BOTH,
    "cogvideox": BOTH, "wan": CROSS, "ltx": CROSS,
}  # fmt: skip


@pytest.mark.parametrize("name", OF_TEXT)
def test_selective_finds_the_keys_and_values_of_the_text_by_itself(name: str) -> None:
    """With the options of the recipe: in cross-attention, in layers of the text's own, or else in
    the text of one stream; and at first the model is the base."""
    backbone, plan = applied(name, selective={"detach_first_token": True})
    assert plan.names
    assert all(any(part in one for part in OF_TEXT[name]) for one in plan.names)
    found = {part for part in OF_TEXT[name] for one in plan.names if part in one}
    assert found == set(OF_TEXT[name])
    assert torch.equal(backbone.output(), JointBackbone(name).output())
    backbone.output().square().sum().backward()
    grads = {one: p.grad for one, p in backbone.named_parameters()}
    assert all((grads[one] is not None) == (one in plan.names) for one in grads)
    assert any(bool(grads[one].any()) for one in plan.names)


@pytest.mark.parametrize(("name", "sites"), [("flux", "name:single*"), ("z_image", "joint")])
def test_a_span_of_text_has_keys_and_values_of_its_own(name: str, sites: str) -> None:
    """k_i = (W + dW) x_i + b + db of the text alone, by a loop over the tokens; the gradients
    too."""
    backbone, plan = applied(name, selective={"sites": sites})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for one, value in backbone.named_parameters():
            if one in plan.names:
                value.add_(0.3 * torch.randn(value.shape, generator=generator))
    reference = JointBackbone(name)
    changes = {n: p.detach().clone().requires_grad_() for n, p in backbone.named_parameters()}
    for site in [each for each in reference.sites if each.name in plan.edits["selective"].sites]:
        by_loop(reference, site, changes)
    output, expected = backbone.output(), reference.output()
    torch.testing.assert_close(output, expected)
    assert not torch.allclose(output, JointBackbone(name).output(), atol=1e-3)
    own = [p for n, p in backbone.named_parameters() if n in plan.names]
    loops = [changes[n] for n, _ in backbone.named_parameters() if n in plan.names]
    for one, other in zip(
        torch.autograd.grad(output.square().sum(), own),
        torch.autograd.grad(expected.square().sum(), loops),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def by_loop(backbone: JointBackbone, site: Any, changes: dict[str, Any]) -> None:
    """Changes K and V of the text in one site: FLUX has 8 text tokens first, Z-Image the 16 of the
    image, filled up to 32, before the text."""
    first = backbone.case.traits.joint[0].text_first  # type: ignore[index]
    for role in ("k", "v"):
        path = f"transformer.{site.name}.text_span.changes.{role}"
        weight, bias = changes[f"{path}.weight"], changes.get(f"{path}.bias")

        def hook(_: Any, args: Any, made: Any, weight: Any = weight, bias: Any = bias) -> Any:
            tokens = []
            for i in range(made.shape[1]):
                own = args[0][:, i] @ weight.T + (0 if bias is None else bias)
                is_text = i < 8 if first else i >= 32
                tokens.append(made[:, i] + (own if is_text else 0))
            return torch.stack(tokens, dim=1)

        site.projection(role).register_forward_hook(hook)


def test_full_trains_all_of_it() -> None:
    backbone, plan = applied("flux2", full={})
    assert set(plan.names) == {name for name, _ in backbone.named_parameters()}


@pytest.mark.parametrize("method", ["tiled", "flash"])
def test_exact_kernels_change_nothing(method: str) -> None:
    options = {"tiled": {"rows": 4, "columns": 5}, "flash": {"backend": "math"}}
    for name in ("sd3", "flux", "qwen_image", "wan"):
        backbone, _ = applied(
            name, **{method: {"sites": "all", **options[method]}}, lora={"rank": 2}
        )
        expected = JointBackbone(name).output()
        torch.testing.assert_close(backbone.output(), expected, rtol=1e-4, atol=1e-5)


def test_linear_attention_runs_over_image_and_text() -> None:
    """relu(q) relu(k)^T v over its row sums, of all tokens together."""
    backbone, _ = applied(
        "flux", linear_attention={"sites": "joint", "features": "relu"}, lora={"rank": 2}
    )
    reference = JointBackbone("flux")

    class ByLoop:
        from trainer.attention.op import Traits

        name, traits = "by_loop", Traits(swaps=True)

        def kernel(self, q: Any, k: Any, v: Any, mask: Any, call: Any) -> Any:
            del mask, call
            weights = q.relu() @ k.relu().mT
            return weights @ v / weights.sum(-1, keepdim=True)

    reference.host.install(ByLoop(), reference.sites)
    torch.testing.assert_close(backbone.output(), reference.output(), rtol=1e-3, atol=1e-4)


REFUSED = {
    "agent_attention": {"sites": "joint"},
    "gated_linear": {"sites": "joint"},
    "flashmask": {"sites": "joint", "mask": "windows", "size": 4},
    "linear_attention": {"sites": "joint", "distill": 0.5},
    "soft": {"sites": "joint"},
    "coda_prompt": {"sites": "joint"},
    "text2video_zero": {"sites": "joint"},
}


@pytest.mark.parametrize("method", REFUSED)
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_what_needs_image_tokens_alone_is_refused_by_name(name: str, method: str) -> None:
    with pytest.raises(ValueError, match=f"methods.{method}") as caught:
        applied(name, **{method: REFUSED[method]}, lora={"rank": 2})
    assert "transformer_blocks" in str(caught.value)


@pytest.mark.parametrize("method", ["vdm", "animatediff"])
def test_layers_through_time_are_refused(method: str) -> None:
    with pytest.raises(ValueError, match="return image and text, and layers through time"):
        applied("sd3", **{method: {}})


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_every_method_runs_at_joint_sites_or_is_refused_by_name(name: str, method: str) -> None:
    from method_examples import COMPANIONS, EXAMPLES

    kind = find_method(method)
    options = {key: value for key, value in EXAMPLES[method].items() if key != "text_encoder"}
    if "sites" in kind.model_fields:
        options["sites"] = "joint"
    beside = {COMPANIONS[method]: {"rank": 2}} if method in COMPANIONS else {}
    try:
        backbone, plan = applied(name, **{method: options}, **beside)
    except ValueError as refusal:
        assert f"methods.{method}" in str(refusal) or "nothing would train" in str(refusal)
        return
    side = 4 * (backbone.sites[0].divisor or 1)
    size = (side, side) if name == "flux" else None  # packed latents, whose size a backbone says
    with use(StepContext(0, 1, torch.zeros(()), latent_size=size)):
        output = backbone.output()
    assert output.isfinite().all()
    if not output.requires_grad:  # what trains acts on a condition, which nobody gives here
        assert backbone.further_conditions
        return
    output.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in backbone.named_parameters()}
    assert plan.names
    # the last block of SD3 puts out no text, and this sees only what it puts out
    assert not [n for n in plan.names if grads[n] is None and "blocks.1." not in n]
