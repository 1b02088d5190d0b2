"""Make-A-Video: pseudo-3D layers as 3D ones with their kernels, what is left to the image model,
the frame rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.attention.context import StepContext, use
from trainer.config.load import methods_of
from trainer.methods.apply import apply_methods
from trainer.methods.feature.make_a_video import MakeAVideo
from trainer.ops.adapters.inject import fold

CONV = "down_blocks.0.resnets.0"


def clip(backbone: Any, fps: Tensor | None = None, frames: int = 2) -> Tensor:
    x_t = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    condition = backbone.encode_prompts(["a fox"] * 4)
    t = torch.full((4,), 300)
    with torch.no_grad(), use(StepContext(0, 1, t, frames, fps=fps)):
        output: Tensor = backbone.predict(x_t, t, condition)
    return output


def test_a_convolution_is_pseudo_3d(tiny: Any, randomise: Callable[..., None]) -> None:
    """ConvP3D is a 3D convolution whose kernel is the product of a spatial and a temporal one."""
    plan = apply_methods(tiny, {"make_a_video": MakeAVideo(heads=2)})
    randomise(tiny, plan, 0.2)
    resnet: Any = tiny.unet.get_submodule(CONV)
    tiny.host.holder.ctx = StepContext(0, 1, torch.zeros(()), frames=3)
    x = torch.randn(6, 16, 4, 5)
    own = resnet.conv1(x)
    temporal = resnet.temporal_convs[0].conv
    kernel = temporal.weight + nn.init.dirac_(torch.empty_like(temporal.weight))
    spatial = F.conv2d(x, resnet.conv1.weight, resnet.conv1.bias, padding=1)
    clips = spatial.unflatten(0, (2, 3)).transpose(1, 2)
    wanted = F.conv3d(clips, kernel[..., None, None], temporal.bias, padding=(1, 0, 0))
    torch.testing.assert_close(own, wanted.transpose(1, 2).flatten(0, 1), rtol=1e-4, atol=1e-4)


def test_attention_over_frames_knows_their_order(tiny: Any, randomise: Callable[..., None]) -> None:
    """h' + W_o softmax(q k^T / sqrt(d)) v of norm(h') + sines of the frame's number, pixel by
    pixel."""
    plan = apply_methods(tiny, {"make_a_video": MakeAVideo(heads=2)})
    randomise(tiny, plan, 0.3)
    block: Any = tiny.unet.down_blocks[1].temporal[0]
    x = torch.randn(3, 32, 2, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own = block(x, x, StepContext(0, 1, torch.zeros(()), frames=3))
        places = torch.zeros(3, 32)
        for frame in range(3):
            for i in range(16):
                angle = frame * 10000 ** (-2 * i / 32)
                places[frame, 2 * i], places[frame, 2 * i + 1] = math.sin(angle), math.cos(angle)
        for row, column in ((0, 0), (1, 0), (1, 1)):
            z = block.norm(x[:, :, row, column]) + places
            q, k, v = (
                layer(z).unflatten(-1, (2, -1)).transpose(0, 1)
                for layer in (block.attn.to_q, block.attn.to_k, block.attn.to_v)
            )
            o = (q @ k.mT / 16**0.5).softmax(-1) @ v
            wanted = x[:, :, row, column] + block.attn.to_out[0](o.transpose(0, 1).flatten(1))
            torch.testing.assert_close(own[:, :, row, column], wanted, rtol=1e-4, atol=1e-4)


def test_every_layer_has_its_pair(tiny: Any, dit: Any) -> None:
    unet = set(apply_methods(tiny, {"make_a_video": MakeAVideo(heads=2)}).names)
    convs = [n for n, layer in tiny.unet.named_modules() if n.endswith((".conv1", ".conv2"))]
    assert len([n for n in unet if n.endswith(".conv.weight")]) == len(convs) == 16
    assert len([n for n in unet if n.endswith("attn.to_q.weight")]) == 7
    assert len([n for n in unet if ".frame_rate." in n]) == 4
    names = apply_methods(dit, {"make_a_video": MakeAVideo(heads=2)}).names
    assert not [n for n in names if ".conv." in n]
    assert len([n for n in names if n.endswith("attn.to_q.weight")]) == 2
    assert len([n for n in names if "adaln_single.frame_rate." in n]) == 4


def test_frames_a_second_are_told_and_images_are_the_image_models(
    tiny: Any, predict: Callable[[Any], Tensor], randomise: Callable[..., None]
) -> None:
    base = predict(tiny).detach()
    plan = apply_methods(tiny, {"make_a_video": MakeAVideo(heads=2, fps=12)})
    randomise(tiny, plan, 0.2)
    assert torch.equal(predict(tiny), base)
    slow, fast = clip(tiny, torch.tensor([12.0, 12.0])), clip(tiny, torch.tensor([12.0, 30.0]))
    assert torch.equal(clip(tiny), slow)
    torch.testing.assert_close(fast[:2], slow[:2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(fast[2:], slow[2:], atol=1e-3)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_on_a_convolution_comes_before_its_pair(
    method: str, tiny: Any, randomise: Callable[..., None]
) -> None:
    """What follows a layer follows the layer with its adapter: folding changes nothing."""
    tree = {"make_a_video": {"heads": 2}, method: {"sites": None, "layers": ["*conv1"], "rank": 2}}
    plan = apply_methods(tiny, methods_of(tree))
    randomise(tiny, plan, 0.1)
    adapted = clip(tiny)
    fold(tiny.unet)
    assert type(tiny.unet.get_submodule(f"{CONV}.conv1")) is nn.Conv2d
    torch.testing.assert_close(clip(tiny), adapted, rtol=1e-3, atol=1e-4)
    tiny.unet.get_submodule(f"{CONV}.temporal_convs.0.conv").weight.data.add_(0.1)
    assert not torch.allclose(clip(tiny), adapted, atol=1e-3)
