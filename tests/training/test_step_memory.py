"""What a step takes by fake tensors is what it takes by real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.config.load import load_recipe
from trainer.methods.apply import apply_methods
from trainer.training.step_memory import _Living, step_bytes

WORDS = ["recipe=lora", "data.prior_weight=0", "data.token=sks", "methods.new_token=null"]


def inputs_of(tiny: Any, rows: int) -> dict[str, Any]:
    x_t = torch.randn(rows, tiny.latent_channels, 16, 16)
    condition = tiny.encode_prompts(["a fox"] * rows)
    found: dict[str, Any] = tiny.inputs(x_t, torch.zeros(rows), condition)
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_real_step_takes_what_a_fake_one_does(
    checkpointing: bool, tiny: Any, tiny_folder: Path
) -> None:
    words = [*WORDS, f"backbone={tiny_folder}", "run.resolution=64", "run.batch_size=4"]
    recipe = load_recipe([*words, f"run.gradient_checkpointing={checkpointing}"])
    apply_methods(tiny, recipe.methods)
    if checkpointing:
        tiny.enable_gradient_checkpointing()
    tiny.unet.train()
    estimated = step_bytes(recipe, tiny, 4)
    given = inputs_of(tiny, 4)
    known = [value.untyped_storage() for value in (*tiny.parameters(), *tiny.buffers())]
    with _Living([*known, *(v.untyped_storage() for v in given.values())]) as living:
        output = tiny.unet(**given).sample
        if checkpointing:
            output.backward(torch.empty_like(output))
        grads = sum(p.grad.nbytes for p in tiny.unet.parameters() if p.grad is not None)
        real = living.peak - grads
    assert estimated == pytest.approx(real, rel=0.05)
    tiny.unet.zero_grad()


def test_layers_that_are_calculated_again_are_not_kept(tiny: Any, tiny_folder: Path) -> None:
    found = []
    for again in (False, True):
        recipe = load_recipe(
            [*WORDS, f"backbone={tiny_folder}", f"run.gradient_checkpointing={again}"]
        )
        if not again:
            apply_methods(tiny, recipe.methods)
        else:
            tiny.enable_gradient_checkpointing()
        tiny.unet.train()
        found.append(step_bytes(recipe, tiny, 4))
    plain, less = found
    assert 0.1 * plain < less < 0.8 * plain
    assert all(value.grad is None for value in tiny.parameters())


def test_a_convolution_takes_copies_of_what_goes_in_and_comes_out() -> None:
    """In a layout of the library's own, while it runs, forward and backward."""
    x = torch.zeros(1, 8, 32, 32, requires_grad=True)
    weight, bias = torch.zeros(4, 8, 3, 3), torch.zeros(4)
    known = [value.untyped_storage() for value in (x, weight, bias)]
    out = 4 * 4 * 32 * 32  # bytes
    copies = x.nbytes + weight.nbytes + bias.nbytes + out
    with _Living(known) as living:
        y = torch.nn.functional.conv2d(x, weight, bias, padding=1)
        assert living.now == out and living.peak == out + copies
        y.sum().backward()
    assert x.grad is not None
    # beside y its gradient, of which every value is one number, and that of x
    assert living.peak >= out + x.nbytes + out + x.nbytes + weight.nbytes + x.nbytes
