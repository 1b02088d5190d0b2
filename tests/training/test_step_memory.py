"""What a step takes by fake tensors is what it takes by real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_folders import MAKERS

from trainer.backbones import load_backbone
from trainer.backbones.device import CPU
from trainer.config.lineage import backbone_spec
from trainer.config.load import load_recipe, methods_of
from trainer.methods.apply import apply_methods
from trainer.training.adapt_backbone import recompute_of
from trainer.training.step_memory import LivingTensors, step_bytes
from trainer.training.without_weights import planned

WORDS = ["recipe=lora", "data.prior_weight=0", "data.token=sks", "methods.new_token=null"]


def inputs_of(tiny: Any, rows: int) -> dict[str, Any]:
    x_t = torch.randn(rows, tiny.latent_channels, 16, 16)
    condition = tiny.encode_prompts(["a fox"] * rows)
    found: dict[str, Any] = tiny.inputs(x_t, torch.zeros(rows), condition)
    return found


@pytest.mark.parametrize(
    "checkpointing",
    [
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "recompute_every": 2},
        {"gradient_checkpointing": "feed_forward"},
    ],
    ids=str,
)
def test_a_real_step_takes_what_a_fake_one_does(
    checkpointing: dict[str, Any], tiny: Any, tiny_folder: Path
) -> None:
    words = [*WORDS, f"backbone={tiny_folder}", "run.resolution=64", "run.batch_size=4"]
    recipe = load_recipe([*words, *(f"run.{key}={own}" for key, own in checkpointing.items())])
    apply_methods(tiny, recipe.methods)
    if checkpointing["gradient_checkpointing"]:
        tiny.enable_gradient_checkpointing(recompute_of(recipe.run))
    tiny.unet.train()
    estimated = step_bytes(recipe, tiny, 4)
    given = inputs_of(tiny, 4)
    known = [value.untyped_storage() for value in (*tiny.parameters(), *tiny.buffers())]
    with LivingTensors([*known, *(v.untyped_storage() for v in given.values())]) as living:
        output = tiny.unet(**given).sample
        if checkpointing["gradient_checkpointing"]:
            output.backward(torch.empty_like(output))
        grads = sum(p.grad.nbytes for p in tiny.unet.parameters() if p.grad is not None)
        real = living.peak - grads
    assert estimated == pytest.approx(real, rel=0.05)
    tiny.unet.zero_grad()


def test_every_policy_takes_less_and_inputs_elsewhere_take_none() -> None:
    """In the order in which they save; what waits in main memory is not on the device."""
    policies = (
        "false", "feed_forward", "true & run.recompute_every=2", "true",
        "true & run.offload_activations=true",
    )  # fmt: skip
    found = []
    for policy in policies:
        recipe = load_recipe([*WORDS, *f"run.gradient_checkpointing={policy}".split(" & ")])
        model, _ = planned(recipe, CPU)
        model.denoiser.train()
        found.append(step_bytes(recipe, model, 4))
    whole, feed_forward, half, all_blocks, offloaded = found
    assert whole > 1.1 * feed_forward and feed_forward > 1.1 * half
    assert half > 1.5 * all_blocks and all_blocks > 1.1 * offloaded


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
    with LivingTensors(known) as living:
        y = torch.nn.functional.conv2d(x, weight, bias, padding=1)
        assert living.now == out and living.peak == out + copies
        y.sum().backward()
    assert x.grad is not None
    # beside y its gradient, of which every value is one number, and that of x
    assert living.peak >= out + x.nbytes + out + x.nbytes + weight.nbytes + x.nbytes


@pytest.mark.sampled(4)
@pytest.mark.parametrize("family", sorted(MAKERS))
def test_a_step_of_every_family_is_counted(family: str, tmp_path: Path, tiny_folder: Path) -> None:
    """With and without checkpointing; also where a block gives nothing for one of its outputs, as
    the last one of SD 3 does."""
    folder = MAKERS[family](tmp_path / family)
    model: Any = load_backbone(backbone_spec(str(folder)), str(folder))
    words = [*WORDS, f"backbone={tiny_folder}", "run.resolution=32"]
    apply_methods(model, methods_of({"lora": {"sites": "all", "rank": 2}}))
    model.enable_gradient_checkpointing()
    model.denoiser.train()
    for again in (True, False):
        recipe = load_recipe([*words, f"run.gradient_checkpointing={again}"])
        one, two = (step_bytes(recipe, model, rows) for rows in (1, 2))
        assert 1.3 * one < two < 2.7 * one


@pytest.mark.parametrize(("family", "latent"), [(None, 5), ("wan", 2)])
def test_all_frames_of_a_clip_are_counted(
    family: str | None, latent: int, tiny: Any, tmp_path: Path
) -> None:
    """As rows, and as tokens of a VAE that makes one latent frame of four."""
    model = tiny
    if family is not None:
        folder = MAKERS[family](tmp_path / family)
        model = load_backbone(backbone_spec(str(folder)), str(folder))
    words = ["recipe=tune_a_video", "run.resolution=128"]
    still, clip = (
        step_bytes(load_recipe([*words, f"data.frames={frames}"]), model, 1) for frames in (1, 5)
    )
    assert 0.7 * latent * still < clip < 1.3 * latent * still
