"""Gradient checkpointing of the text encoder."""

from __future__ import annotations

from typing import Any

import torch

from trainer.config.load import methods_of
from trainer.methods.apply import apply_methods

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
