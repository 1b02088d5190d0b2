"""VDM: attention over frames with its bias against a loop, images that attend to themselves, beside
full training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer import methods
from trainer.attention.context import StepContext, use
from trainer.methods.feature.vdm import Vdm
from trainer.recipe import methods_of

PATH = "down_blocks.1.temporal.0"


def looped(block: Any, x: Tensor, frames: int) -> Tensor:
    """y = x + W_o softmax(q k^T / sqrt(d) + bias(j - i)) v, pixel by pixel and head by head."""
    heads, table = block.attn.heads, block.attn.relative_bias.table
    reach = table.shape[1] // 2
    y = x.clone()
    for clip in range(len(x) // frames):
        rows = slice(clip * frames, (clip + 1) * frames)
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                z = block.norm(x[rows, :, i, j])
                q, k, v = (
                    layer(z).unflatten(-1, (heads, -1)).transpose(0, 1)
                    for layer in (block.attn.to_q, block.attn.to_k, block.attn.to_v)
                )
                scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
                for a in range(frames):
                    for b in range(frames):
                        scores[:, a, b] += table[:, max(-reach, min(reach, b - a)) + reach]
                o = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
                y[rows, :, i, j] += block.attn.to_out[0](o)
    return y


def test_the_equation(tiny: Any, randomise: Callable[..., None]) -> None:
    plan = methods.apply(tiny, {"vdm": Vdm(heads=2, reach=1)})
    randomise(tiny, plan, 0.3)
    block: Any = tiny.unet.get_submodule(PATH)
    x = torch.randn(6, 32, 2, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    ctx = StepContext(0, 1, torch.zeros(()), frames=3)
    own, wanted = block(x, x, ctx), looped(block, x, 3)
    torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-5)
    parameters = [x, *block.parameters()]
    found = torch.autograd.grad(own.square().sum(), parameters)
    reference = torch.autograd.grad(wanted.square().sum(), parameters)
    for mine, other in zip(found, reference, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("images", ["self", "bypass"])
def test_an_image_attends_to_itself_or_passes_by(
    images: Any, tiny: Any, predict: Callable[[Any], Tensor], randomise: Callable[..., None]
) -> None:
    base = predict(tiny).detach()
    plan = methods.apply(tiny, {"vdm": Vdm(heads=2, images=images)})
    assert torch.equal(predict(tiny), base)
    randomise(tiny, plan, 0.3)
    image = predict(tiny).detach()
    assert torch.equal(image, base) == (images == "bypass")
    block: Any = tiny.unet.get_submodule(PATH)
    x = torch.randn(2, 32, 2, 2)
    v = block.attn.to_v(block.norm(x.flatten(2).transpose(1, 2)))
    alone = block.attn.to_out[0](v).transpose(1, 2).reshape(x.shape)
    one = StepContext(0, 1, torch.zeros(()))
    torch.testing.assert_close(block(x, x, one), x + alone, rtol=1e-4, atol=1e-5)


def test_images_do_not_hear_of_each_other(tiny: Any, randomise: Callable[..., None]) -> None:
    plan = methods.apply(tiny, {"vdm": Vdm(heads=2)})
    randomise(tiny, plan, 0.3)
    x_t = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    text = tiny.encode_prompts(["a fox", "a cat"])
    t = torch.tensor([3, 3])
    with torch.no_grad():
        one = tiny.predict(x_t, t, text)
        other = tiny.predict(torch.cat([x_t[:1], -x_t[1:]]), t, text)
        with use(StepContext(0, 1, t, frames=2)):
            clip = tiny.predict(x_t, t, text)
            changed = tiny.predict(torch.cat([x_t[:1], -x_t[1:]]), t, text)
    torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(clip[0], changed[0], atol=1e-2)


def test_with_full_everything_trains_once(tiny: Any, train: Callable[..., list[float]]) -> None:
    """From an image model, or from nothing, the paper trains all of the network."""
    plan = methods.apply(tiny, methods_of({"vdm": {"heads": 2}, "full": {}}))
    assert set(plan.names) == {n for n, _ in tiny.named_parameters() if n.startswith("unet.")}
    own = set(plan.edits["vdm"].trains)
    assert own and not own & set(plan.edits["full"].trains)
    assert all(".temporal." in name for name in own)
    before = {name: value.detach().clone() for name, value in tiny.named_parameters()}
    train(tiny, plan, frames=2)
    after = dict(tiny.named_parameters())
    assert {n for n, v in before.items() if not torch.equal(v, after[n])} == set(plan.names)


def test_a_linear_kernel_in_time_is_refused_for_the_bias(
    tiny: Any, open_folder: Callable[[Path], Any], tiny_folder: Path
) -> None:
    for model, tree in (
        (tiny, {"vdm": {"heads": 2}, "linear_attention": {"sites": "temporal"}, "full": {}}),
        (
            open_folder(tiny_folder),
            {"magicvideo": {"heads": 2}, "linear_attention": {"sites": "temporal"}, "full": {}},
        ),
    ):
        first = next(iter(tree))
        with pytest.raises(ValueError, match=rf"methods\.{first}.*methods\.linear_attention"):
            methods.apply(model, methods_of(tree))
