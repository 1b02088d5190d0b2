"""Gen-1: guidance in time as the paper's sum of three, the structure of a source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import cos, sin
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention.context import StepContext, use
from trainer.attention.input_channels import ChannelInputs, values_of
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.methods.apply import apply_methods
from trainer.methods.feature.gen1 import Gen1
from trainer.ops.gen1 import structure_channels
from trainer.ops.temporal.layers import LearnedPositions, TemporalConv

PROMPTS = ["a fox moving left", "a cat"]


def test_its_layers(tiny: Any, dit: Any) -> None:
    apply_methods(tiny, {"gen1": Gen1(heads=2)})
    kinds = [type(module) for module in tiny.unet.modules()]
    assert (kinds.count(TemporalConv), kinds.count(LearnedPositions)) == (16, 7)
    assert tiny.unet.structure_channels.conv.weight.shape[1] == 5
    apply_methods(dit, {"gen1": Gen1(heads=2, structure=None)})
    kinds = [type(module) for module in dit.transformer.modules()]
    assert (kinds.count(TemporalConv), kinds.count(LearnedPositions)) == (0, 2)
    assert not dit.input_channels


def test_its_options_reach_its_layers(tiny: Any) -> None:
    apply_methods(tiny, {"gen1": Gen1(heads=4, kernel=5, max_frames=7, structure=3)})
    layers = list(tiny.unet.modules())
    assert {m.conv.kernel_size for m in layers if isinstance(m, TemporalConv)} == {(5,)}
    assert {len(m.table) for m in layers if isinstance(m, LearnedPositions)} == {7}
    assert {site.heads for site in tiny.sites if site.kind == "temporal"} == {4}
    with pytest.raises(ValueError, match=r"structure_level=4: this model has learned .* 0.* to 3"):
        values_of(tiny, given_of(torch.randn(2, 2, 1, 8, 8), levels=[0, 4]))


def given_of(depth: Tensor | None, levels: list[int] | None = None, **more: Any) -> ChannelInputs:
    """Of two clips of two frames, 8 latents wide."""
    inputs = {} if depth is None else {"depth": depth}
    if levels is not None:
        inputs["structure_level"] = torch.tensor(levels)
    return ChannelInputs((4, 8, 8, 8), frames=2, seeds=[3, 8], inputs=inputs, **more)


def coarse(picture: list[list[float]], level: int) -> Tensor:
    """8 x 8 numbers in blocks of 2 ** level, each the mean of its own, and between the centres of
    blocks along straight lines."""
    size = 2**level
    blocks = [
        [
            sum(picture[size * y + i][size * x + j] for i in range(size) for j in range(size))
            / size**2
            for x in range(8 // size)
        ]
        for y in range(8 // size)
    ]

    def between(at: int) -> tuple[int, int, float]:
        place = min(max((at + 0.5) / size - 0.5, 0), 8 // size - 1)
        low = int(place)
        return low, min(low + 1, 8 // size - 1), place - low

    found = torch.zeros(8, 8)
    for y in range(8):
        for x in range(8):
            (a, b, down), (c, d, across) = between(y), between(x)
            upper = blocks[a][c] * (1 - across) + blocks[a][d] * across
            lower = blocks[b][c] * (1 - across) + blocks[b][d] * across
            found[y, x] = upper * (1 - down) + lower * down
    return found


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_structure_is_depth_made_coarser_and_its_level(level: int) -> None:
    """By a plain loop: 16 pixels to 8 latents, then to blocks; the level in sines and cosines."""
    depth = torch.randn(2, 2, 1, 16, 16)
    found = structure_channels(given_of(depth, levels=[level, 1]), most=3)
    assert found is not None and found.shape == (4, 5, 8, 8)
    for frame in range(2):
        own = depth[0, frame, 0]
        latents = [
            [float(own[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean()) for x in range(8)]
            for y in range(8)
        ]
        torch.testing.assert_close(found[frame, 0], coarse(latents, level))
    told = [sin(level), sin(level / 100), cos(level), cos(level / 100)]
    torch.testing.assert_close(found[:2, 1:, 3, 4], torch.tensor([told, told]))
    torch.testing.assert_close(found[:, 1:], found[:, 1:, :1, :1].expand(-1, -1, 8, 8))
    other = structure_channels(given_of(depth, levels=[level, 1]), most=7)
    assert other is not None and torch.equal(found, other)


def test_in_training_each_clip_draws_its_level() -> None:
    depth = torch.randn(1, 1, 1, 8, 8).expand(64, 1, 1, 8, 8)
    given = ChannelInputs((64, 8, 8, 8), frames=1, seeds=range(64), inputs={"depth": depth})
    found = structure_channels(given, most=3)
    assert found is not None
    spreads = [round(float(own.std()), 4) for own in found[:, 0]]
    assert sorted(map(spreads.count, set(spreads))) == [16, 16, 16, 16]  # 0 to 3 alike
    sampled = structure_channels(replace(given, sampling=True), most=3)
    assert sampled is not None and torch.equal(sampled[:, 0], depth[:, 0, 0])
    assert structure_channels(given_of(None), most=3) is None


@pytest.mark.parametrize("family", ["tiny", "dit"])
def test_the_structure_counts_frame_by_frame(
    family: str, request: pytest.FixtureRequest, randomise: Callable[..., None]
) -> None:
    """Of pictures too; without it, nothing is added."""
    backbone = request.getfixturevalue(family)
    plan = apply_methods(backbone, {"gen1": Gen1(heads=2, structure=1)})
    depth = torch.randn(2, 2, 1, 8, 8)
    channels = values_of(backbone, given_of(depth, sampling=True))
    assert torch.equal(predict(backbone, channels), predict(backbone, {}))
    randomise(backbone, plan, 0.2)
    seen = predict(backbone, channels)
    assert not torch.allclose(seen, predict(backbone, {}), atol=1e-3)
    turned = values_of(backbone, given_of(depth * torch.tensor([1, -1])[:, None, None, None, None],
                                          sampling=True))  # fmt: skip
    other = predict(backbone, turned)
    torch.testing.assert_close(other[:2], seen[:2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other[2:], seen[2:], atol=1e-3)
    assert not torch.equal(predict(backbone, channels, 1), predict(backbone, {}, 1))


def predict(backbone: Any, channels: dict[str, Tensor], frames: int = 2) -> Tensor:
    x_t = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    condition = backbone.encode_prompts(["a fox"] * 4)
    t = torch.full((4,), 300)
    with torch.no_grad(), use(StepContext(0, 1, t, frames, channels=channels)):
        output: Tensor = backbone.predict(x_t, t, condition)
    return output


def test_guidance_in_time_is_the_papers_sum(tiny: Any, randomise: Callable[..., None]) -> None:
    """eps = eps_image(null, s) + w_t (eps_video(null, s) - eps_image(null, s))
    + w (eps_video(c, s) - eps_video(null, s))"""
    randomise(tiny, apply_methods(tiny, {"gen1": Gen1(heads=2)}), 0.1)
    seen: list[Tensor] = []
    channels = values_of(tiny, given_of(torch.randn(2, 2, 1, 8, 8), sampling=True))
    own = sample(
        tiny,
        PROMPTS,
        [1, 2],
        settings=Sampling(steps=1, guidance=3, frames=2, temporal_guidance=0.5),
        channels=channels,
        on_step=lambda _, x_t: seen.append(x_t),
    )
    scheduler = tiny.scheduler()
    scheduler.set_timesteps(1)
    (t,) = scheduler.timesteps
    shape = (2, 8, 8, 8)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    x_t = torch.cat(noise)
    with torch.no_grad():
        null = tiny.encode_prompts(["", ""]).per_frame(2)
        text = tiny.encode_prompts(PROMPTS).per_frame(2)
        with use(StepContext(0, 1, t, frames=1, channels=channels)):
            image = tiny.predict(x_t, t.expand(4), null)
        with use(StepContext(0, 1, t, frames=2, channels=channels)):
            uncond, cond = (
                tiny.predict(x_t, t.expand(4), null),
                tiny.predict(x_t, t.expand(4), text),
            )
    output = image + 0.5 * (uncond - image) + 3 * (cond - uncond)
    wanted = scheduler.step(output, t, x_t).prev_sample
    torch.testing.assert_close(seen[0], wanted, rtol=1e-4, atol=1e-4)
    assert own.shape == (4, 3, 32, 32)
    assert not torch.equal(
        own, sample(tiny, PROMPTS, [1, 2], settings=Sampling(steps=1, guidance=3, frames=2))
    )
