"""How a model is set up for training."""

from __future__ import annotations

from typing import Any

import torch

from trainer.backbones.device import CPU
from trainer.config.load import load_recipe
from trainer.training.build import adapt


def test_channels_last_is_how_the_denoiser_is_stored(tiny: Any) -> None:
    words = ["recipe=lora", "methods.new_token=null", "data.token=sks", "run.channels_last=true"]
    before = tiny.unet.conv_in.weight.clone()
    assert not before.is_contiguous(memory_format=torch.channels_last)
    adapt(load_recipe(words), tiny, CPU)
    weight = tiny.unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(weight, before)
