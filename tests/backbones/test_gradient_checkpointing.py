"""Gradient checkpointing of the text encoder and of the denoiser: what runs again, with the same
gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from trainer.backbones.gradient_checkpointing import Recompute, checkpoint_denoiser
from trainer.config.load import load_recipe, methods_of
from trainer.methods.apply import apply_methods
from trainer.training.build import placement_of

WORD = {"new_token": {"tokens": ["<v1>"], "init": "fox"}}


def test_the_layers_of_the_text_encoder_run_again(tiny: Any) -> None:
    """In eval mode too, in which a run has it, and with the same gradients."""
    plan = apply_methods(tiny.eval(), methods_of(WORD))
    calls = {"count": 0}
    for name, module in tiny.text_encoder.named_modules():
        if name.endswith("mlp"):
            module.register_forward_pre_hook(lambda *_: calls.update(count=calls["count"] + 1))
    trained = {name: tiny.get_parameter(name) for name in plan.names}

    def gradients() -> tuple[int, dict[str, torch.Tensor]]:
        calls["count"] = 0
        for value in trained.values():
            value.grad = None
        tokens = tiny.encode_prompts(["a <v1>", "a cat"]).tokens
        tokens.square().sum().backward()
        found = {name: value.grad.clone() for name, value in trained.items()}
        return calls["count"], found

    once, wanted = gradients()
    tiny.enable_gradient_checkpointing()
    twice, found = gradients()
    assert once > 0 and twice == 2 * once
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with torch.no_grad():
        calls["count"] = 0
        tiny.encode_prompts(["a <v1>", "a cat"])
    assert calls["count"] == once


def test_a_frozen_text_encoder_is_left_alone(tiny: Any) -> None:
    layers = [module.forward for module in tiny.text_encoder.modules()]
    tiny.requires_grad_(False).enable_gradient_checkpointing()
    assert [module.forward for module in tiny.text_encoder.modules()] == layers


def stepped(tiny: Any, names: tuple[str, ...]) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """How often parts of the U-Net run in a forward and its backward, and the gradients."""
    calls: dict[str, int] = {}
    hooks = []
    for name, module in tiny.unet.named_modules():
        last = name.rpartition(".")[2]
        kind = {"ff": "feed-forward", "attn2": "attention"}.get(last, type(module).__name__)
        count = lambda *_, kind=kind: calls.update({kind: calls.get(kind, 0) + 1})  # noqa: E731
        if kind in ("attention", "ResnetBlock2D"):
            hooks.append(module.register_forward_pre_hook(count))
        if kind == "feed-forward":  # inside, since its forward may be replaced
            hooks.append(module.net[0].register_forward_pre_hook(count))
    for name in names:
        tiny.get_parameter(name).grad = None
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 8, 16, 16, generator=generator)
    text = tiny.encode_prompts(["a fox", "a cat"])
    tiny.predict(x_t, torch.tensor([10, 900]), text).square().sum().backward()
    for hook in hooks:
        hook.remove()
    return calls, {name: tiny.get_parameter(name).grad.clone() for name in names}


@pytest.mark.parametrize(
    ("how", "again"),
    [
        (Recompute(), {"feed-forward": 7, "attention": 7, "ResnetBlock2D": 6}),
        (Recompute(every=2), {"feed-forward": 4, "attention": 4, "ResnetBlock2D": 3}),
        (Recompute(feed_forward=True), {"feed-forward": 7, "attention": 0, "ResnetBlock2D": 0}),
        (Recompute(offload=True), {"feed-forward": 7, "attention": 7, "ResnetBlock2D": 6}),
    ],
    ids=["all", "every second", "feed-forward", "offloaded"],
)
def test_of_the_denoiser_runs_again_what_was_asked(
    how: Recompute, again: dict[str, int], tiny: Any
) -> None:
    names = apply_methods(tiny.train(), methods_of({"lora": {"rank": 2}})).names
    once, wanted = stepped(tiny, names)
    tiny.enable_gradient_checkpointing(how)
    for _ in range(2):  # the same blocks at every step
        twice, found = stepped(tiny, names)
        more = {kind: twice[kind] - once[kind] for kind in once}
        assert more == again
        assert all(torch.equal(found[name], wanted[name]) for name in names)


def test_what_waits_goes_through_main_memory(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []
    inner = torch.autograd.graph.save_on_cpu.__init__

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        inner(self, *args, **kwargs)
        pack = self.pack_hook
        self.pack_hook = lambda value: (moved.append(value.nbytes), pack(value))[1]

    monkeypatch.setattr(torch.autograd.graph.save_on_cpu, "__init__", watched)
    names = apply_methods(tiny.train(), methods_of({"lora": {"rank": 2}})).names
    tiny.enable_gradient_checkpointing(Recompute(offload=True))
    stepped(tiny, names)
    assert 2 * 16 * 16 * 16 * 4 in moved  # the input of a block of the highest resolution


def test_a_denoiser_without_feed_forward_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no feed-forward part called ff"):
        checkpoint_denoiser(nn.Linear(2, 2), Recompute(feed_forward=True))


def test_main_memory_has_activations_of_a_cpu_already() -> None:
    words = ["run.gradient_checkpointing=true", "run.offload_activations=true", "run.device=cpu"]
    recipe = load_recipe(["recipe=lora", *words])
    with pytest.raises(ValueError, match="in main memory already; leave it out"):
        placement_of(recipe.run)


def test_every_second_layer_of_a_text_encoder(tiny: Any) -> None:
    apply_methods(tiny.eval(), methods_of(WORD))
    layers = tiny.text_encoder.encoder.layers
    tiny.enable_gradient_checkpointing(Recompute(every=2))
    assert ["forward" in layer.__dict__ for layer in layers] == [
        number % 2 == 0 for number in range(len(layers))
    ]
