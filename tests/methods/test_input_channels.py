"""Further input channels: equal to a wider first convolution, zero at first, by name from the batch
to the denoiser in training and in sampling, trained and stored, refused where they cannot be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from joint_models import JointBackbone
from torch import Tensor, nn

from trainer.attention.context import StepContext, use
from trainer.attention.errors import TakenError
from trainer.attention.input_channels import (
    ChannelInputs,
    InputChannels,
    channel_item,
    inputs_read,
    values_of,
)
from trainer.attention.insert import insert
from trainer.config import load
from trainer.data.loader import Batch
from trainer.diffusion.objective import Objective
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.methods.apply import apply_methods, find_method, method_names
from trainer.methods.method import Method
from trainer.methods.shared.temporal import Temporal
from trainer.runs.adapter import load_adapted
from trainer.training.tasks.denoise import Denoise

PROMPTS = ["a fox", "a cat"]


def drawn(given: ChannelInputs) -> Tensor | None:
    """One channel of the input `depth`, one of a random number for each clip."""
    depth = given.inputs.get("depth")
    if depth is None:
        return None
    rows, _, height, width = given.shape
    numbers = [torch.rand((), generator=torch.manual_seed(seed % 2**31)) for seed in given.seeds]
    own = torch.stack(numbers).repeat_interleave(given.frames)[:, None, None, None]
    return torch.cat([depth.flatten(0, 1), own.expand(rows, 1, height, width)], 1)


class Deep(Temporal):
    """A method of two channels."""

    kind: ClassVar[Literal["structure"]] = "structure"
    called: str = "deep"

    @property
    def name(self) -> str:
        return self.called

    def apply(self, model: Any) -> Any:
        channels = InputChannels("depth", self.called, count=2, make=drawn, reads=("depth",))
        return self.inserted(model, [channel_item(model, channels)])


@pytest.fixture(autouse=True)
def found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method stands in this file, not in a folder of methods."""
    names = [*method_names(), "deep"]

    def find(name: str) -> type[Method]:
        return Deep if name == "deep" else find_method(name)

    monkeypatch.setattr(load, "method_names", lambda: names)
    monkeypatch.setattr(load, "find_method", find)


def predict(backbone: Any, channels: Mapping[str, Tensor], frames: int = 2) -> Tensor:
    x_t = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    condition = backbone.encode_prompts(["a fox"] * 4)
    t = torch.full((4,), 300)
    with torch.no_grad(), use(StepContext(0, 1, t, frames, channels=channels)):
        output: Tensor = backbone.predict(x_t, t, condition)
    return output


@pytest.mark.parametrize("family", ["tiny", "dit"])
@pytest.mark.parametrize("frames", [1, 2])
def test_it_is_a_wider_first_convolution(
    family: str, frames: int, request: pytest.FixtureRequest, randomise: Callable[..., None]
) -> None:
    backbone = request.getfixturevalue(family)
    plain = predict(backbone, {}, frames)
    plan = apply_methods(backbone, {"deep": Deep()})
    part, at = backbone.denoiser_name, "conv_in" if family == "tiny" else "pos_embed.proj"
    parent = at.rpartition(".")[0]
    assert plan.names == (".".join(filter(None, (part, parent, "depth_channels.conv.weight"))),)
    values = torch.randn(4, 2, 8, 8)
    assert torch.equal(predict(backbone, {"depth": values}, frames), plain)
    randomise(backbone, plan, 0.2)
    own = predict(backbone, {"depth": values}, frames)
    assert not torch.allclose(own, plain, atol=1e-3)
    assert torch.equal(predict(backbone, {}, frames), plain)
    first = backbone.denoiser.get_submodule(at)
    new = backbone.denoiser.get_submodule(f"{parent}.depth_channels".lstrip(".")).conv.weight
    # the reference: one convolution over the latents and the channels side by side
    both = torch.cat([first.weight, new], 1)
    first.forward = lambda x: nn.functional.conv2d(
        torch.cat([x, values], 1), both, first.bias, stride=first.stride, padding=first.padding
    )
    torch.testing.assert_close(predict(backbone, {}, frames), own, rtol=1e-4, atol=1e-5)


def batch_of(depth: Tensor | None, frames: int = 2) -> Batch:
    moments = torch.randn(2 * frames, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    return Batch(
        step=3,
        positions=[0, 1],
        captions=PROMPTS,
        keys=PROMPTS,
        weights=torch.ones(2),
        moments=moments,
        frames=frames,
        fps=[8.0, 8.0],
        inputs={} if depth is None else {"depth": depth},
    )


def test_a_batch_brings_the_values_of_its_clips(tiny: Any) -> None:
    apply_methods(tiny, {"deep": Deep()})
    assert inputs_read(tiny) == ("depth",)
    task = Denoise(tiny, Objective("eps", tiny.alphas_cumprod), seed=5)
    depth = torch.randn(2, 2, 1, 8, 8)
    state = task.encode(batch_of(depth))
    values = state.channels["depth"]
    assert torch.equal(values[:, :1], depth.flatten(0, 1))
    random = values[:, 1, 0, 0]
    assert random[0] == random[1] and random[2] == random[3] and random[0] != random[2]
    again = Denoise(tiny, Objective("eps", tiny.alphas_cumprod), seed=5)
    assert torch.equal(again.encode(batch_of(depth)).channels["depth"], values)
    other = task.encode(batch_of(depth), "validate").channels["depth"]
    assert not torch.equal(other, values)
    assert task.encode(batch_of(None)).channels == {}


def test_the_loss_depends_on_the_values_and_trains_them(tiny: Any) -> None:
    plan = apply_methods(tiny, {"deep": Deep()})
    weight = dict(tiny.named_parameters())[plan.names[0]]
    task = Denoise(tiny, Objective("eps", tiny.alphas_cumprod))
    task.loss(task.encode(batch_of(torch.ones(2, 2, 1, 8, 8)))).losses.mean().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    weight.grad = None  # without the input nothing is learned, and DDP still gets a gradient
    task.loss(task.encode(batch_of(None))).losses.mean().backward()
    assert weight.grad is not None and weight.grad.abs().sum() == 0


def test_in_sampling_every_group_of_rows_has_the_values_of_its_clip(
    tiny: Any, randomise: Callable[..., None]
) -> None:
    """The unconditional rows too, and those of frames that do not see each other."""
    randomise(tiny, apply_methods(tiny, {"deep": Deep()}), 0.2)
    seen: list[tuple[int, Tensor]] = []
    block = tiny.unet.depth_channels

    def spy(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append((args[2].frames, args[2].channels["depth"]))

    block.register_forward_pre_hook(spy)
    values = torch.randn(4, 2, 8, 8)
    settings = Sampling(steps=1, guidance=3, frames=2, temporal_guidance=2.0)
    sample(tiny, PROMPTS, [1, 2], settings=settings, channels={"depth": values})
    (frames, both), (alone, images) = seen
    assert (frames, alone) == (2, 1)
    assert torch.equal(both, torch.cat([values, values])) and torch.equal(images, values)


def test_values_of_another_shape_are_refused(tiny: Any) -> None:
    apply_methods(tiny, {"deep": Deep()})
    with pytest.raises(ValueError, match=r"'depth' have the shape \(4, 3, 8, 8\), and these"):
        predict(tiny, {"depth": torch.zeros(4, 3, 8, 8)})


def test_they_are_stored_and_found_again(
    tiny_folder: Path, save_trained_on: Callable[..., Path]
) -> None:
    path = save_trained_on(tiny_folder, {"deep": {}})
    loaded, _ = load_adapted(path)
    values = torch.randn(4, 2, 8, 8)
    assert list(loaded.input_channels) == ["depth"]
    assert not torch.equal(predict(loaded, {"depth": values}), predict(loaded, {}))


def test_a_name_has_one_owner(tiny: Any) -> None:
    channels = InputChannels("depth", "first", count=1, make=drawn)
    insert(tiny, [channel_item(tiny, channels)], owner="first", trains=True)
    with pytest.raises(TakenError, match=r"input channels of unet.depth belongs to methods.first"):
        channel_item(tiny, InputChannels("depth", "second", count=1, make=drawn))
    other = channel_item(tiny, InputChannels("mask", "second", count=1, make=drawn))
    with pytest.raises(TakenError, match=r"inserted after of unet.conv_in belongs to"):
        insert(tiny, [other], owner="second", trains=True)


def test_a_model_without_such_a_layer_is_refused() -> None:
    model: Any = JointBackbone("flux")
    with pytest.raises(ValueError, match="declares no convolution that reads its input; choose"):
        channel_item(model, InputChannels("depth", "deep", count=1, make=drawn))
    assert not model.input_channels


def test_no_channels_no_values(tiny: Any) -> None:
    given = ChannelInputs((2, 8, 8, 8), frames=1, seeds=(1, 2))
    assert values_of(tiny, given) == {} and inputs_read(tiny) == ()
