"""VDM: attention over frames, told apart either way, against a loop, images that attend to
themselves, beside full training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention.context import StepContext, use
from trainer.config.load import methods_of
from trainer.methods.apply import apply_methods
from trainer.methods.feature.vdm import Vdm

PATH = "down_blocks.1.temporal.0"


def looped(block: Any, x: Tensor, frames: int) -> Tensor:
    """y = x + W_o attention(x) by one of the two equations, pixel by pixel, head by head and pair
    of frames by pair of frames."""
    attn, heads, y = block.attn, block.attn.heads, x.clone()
    bias, vectors = getattr(attn, "relative_bias", None), getattr(attn, "relative_vectors", None)
    reach = (bias or vectors).reach
    for clip in range(len(x) // frames):
        rows = slice(clip * frames, (clip + 1) * frames)
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                z = block.norm(x[rows, :, i, j])
                q, k, v = (
                    layer(z).unflatten(-1, (heads, -1))
                    for layer in (attn.to_q, attn.to_k, attn.to_v)
                )
                o = torch.zeros_like(q)
                for head in range(heads):
                    for a in range(frames):
                        scores, values = [], []
                        for b in range(frames):
                            row = max(-reach, min(reach, b - a)) + reach
                            key, value, number = k[b, head], v[b, head], 0.0
                            if vectors is not None:
                                key, value = key + vectors.keys[row], value + vectors.values[row]
                            else:
                                number = bias.table[head, row]
                            scores.append(q[a, head] @ key / len(key) ** 0.5 + number)
                            values.append(value)
                        o[a, head] = torch.stack(scores).softmax(0) @ torch.stack(values)
                y[rows, :, i, j] += attn.to_out[0](o.flatten(1))
    return y


@pytest.mark.parametrize("relative", ["vectors", "bias"])
def test_the_equations(relative: Any, tiny: Any, randomise: Callable[..., None]) -> None:
    plan = apply_methods(tiny, {"vdm": Vdm(heads=2, reach=1, relative=relative)})
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


@pytest.mark.parametrize("relative", ["vectors", "bias"])
@pytest.mark.parametrize("reach", [1, 5])
def test_distances_are_told_apart_up_to_the_reach(relative: Any, reach: int, tiny: Any) -> None:
    """One entry for each signed distance from -reach to reach."""
    apply_methods(tiny, {"vdm": Vdm(heads=2, reach=reach, relative=relative)})
    attn: Any = tiny.unet.get_submodule(PATH).attn
    tables = (
        [attn.relative_bias.table.T]
        if relative == "bias"
        else [attn.relative_vectors.keys, attn.relative_vectors.values]
    )
    assert {len(table) for table in tables} == {2 * reach + 1}


@pytest.mark.parametrize(("relative", "apart"), [("vectors", True), ("bias", False)])
def test_frames_that_look_alike_are_told_apart_by_vectors_alone(
    relative: Any, apart: bool, tiny: Any, randomise: Callable[..., None]
) -> None:
    plan = apply_methods(tiny, {"vdm": Vdm(heads=2, relative=relative)})
    randomise(tiny, plan, 0.3)
    block: Any = tiny.unet.get_submodule(PATH)
    x = torch.randn(1, 32, 2, 2).expand(4, -1, -1, -1)
    with torch.no_grad():
        y = block(x, x, StepContext(0, 1, torch.zeros(()), frames=4))
    assert ((y - y[:1]).abs().max() > 1e-2) == apart


@pytest.mark.parametrize("images", ["self", "bypass"])
def test_an_image_attends_to_itself_or_passes_by(
    images: Any, tiny: Any, predict: Callable[[Any], Tensor], randomise: Callable[..., None]
) -> None:
    base = predict(tiny).detach()
    plan = apply_methods(tiny, {"vdm": Vdm(heads=2, images=images)})
    assert torch.equal(predict(tiny), base)
    randomise(tiny, plan, 0.3)
    image = predict(tiny).detach()
    assert torch.equal(image, base) == (images == "bypass")
    block: Any = tiny.unet.get_submodule(PATH)
    x = torch.randn(2, 32, 2, 2)
    v = block.attn.to_v(block.norm(x.flatten(2).transpose(1, 2)))
    v = v + block.attn.relative_vectors.values[32].repeat(2)  # of its distance to itself
    alone = block.attn.to_out[0](v).transpose(1, 2).reshape(x.shape)
    one = StepContext(0, 1, torch.zeros(()))
    torch.testing.assert_close(block(x, x, one), x + alone, rtol=1e-4, atol=1e-5)


def test_images_do_not_hear_of_each_other(tiny: Any, randomise: Callable[..., None]) -> None:
    plan = apply_methods(tiny, {"vdm": Vdm(heads=2)})
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
    plan = apply_methods(tiny, methods_of({"vdm": {"heads": 2}, "full": {}}))
    assert set(plan.names) == {n for n, _ in tiny.named_parameters() if n.startswith("unet.")}
    own = set(plan.edits["vdm"].trains)
    assert own and not own & set(plan.edits["full"].trains)
    assert all(".temporal." in name for name in own)
    before = {name: value.detach().clone() for name, value in tiny.named_parameters()}
    train(tiny, plan, frames=2)
    after = dict(tiny.named_parameters())
    assert {n for n, v in before.items() if not torch.equal(v, after[n])} == set(plan.names)


def test_a_linear_kernel_in_time_is_refused_for_the_relative_frames(
    tiny: Any, open_folder: Callable[[Path], Any], tiny_folder: Path
) -> None:
    for model, tree in (
        (tiny, {"vdm": {"heads": 2}, "linear_attention": {"sites": "temporal"}, "full": {}}),
        (
            open_folder(tiny_folder),
            {
                "vdm": {"heads": 2, "relative": "bias"},
                "linear_attention": {"sites": "temporal"},
                "full": {},
            },
        ),
        (
            open_folder(tiny_folder),
            {"magicvideo": {"heads": 2}, "linear_attention": {"sites": "temporal"}, "full": {}},
        ),
    ):
        first = next(iter(tree))
        with pytest.raises(ValueError, match=rf"methods\.{first}.*methods\.linear_attention"):
            apply_methods(model, methods_of(tree))
