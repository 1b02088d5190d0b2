"""Gen-1: guidance in time as the paper's sum of three, the structure of a source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention.context import StepContext, use
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.methods.apply import apply_methods
from trainer.methods.feature.gen1 import Gen1
from trainer.ops.temporal.layers import LearnedPositions, Structure, TemporalConv

PROMPTS = ["a fox moving left", "a cat"]


def test_its_layers(tiny: Any, dit: Any) -> None:
    apply_methods(tiny, {"gen1": Gen1(heads=2)})
    kinds = [type(module) for module in tiny.unet.modules()]
    assert (kinds.count(TemporalConv), kinds.count(LearnedPositions)) == (16, 7)
    assert kinds.count(Structure) == 1
    apply_methods(dit, {"gen1": Gen1(heads=2, structure=None)})
    kinds = [type(module) for module in dit.transformer.modules()]
    assert (kinds.count(TemporalConv), kinds.count(LearnedPositions)) == (0, 2)
    assert kinds.count(Structure) == 0


def test_its_options_reach_its_layers(tiny: Any) -> None:
    apply_methods(tiny, {"gen1": Gen1(heads=4, kernel=5, max_frames=7, structure=3)})
    layers = list(tiny.unet.modules())
    assert {m.level for m in layers if isinstance(m, Structure)} == {3}
    assert {m.conv.kernel_size for m in layers if isinstance(m, TemporalConv)} == {(5,)}
    assert {len(m.table) for m in layers if isinstance(m, LearnedPositions)} == {7}
    assert {site.heads for site in tiny.sites if site.kind == "temporal"} == {4}


def predict(backbone: Any, source: Tensor | None, frames: int = 2) -> Tensor:
    x_t = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    condition = backbone.encode_prompts(["a fox"] * 4)
    t = torch.full((4,), 300)
    with torch.no_grad(), use(StepContext(0, 1, t, frames, source=source)):
        output: Tensor = backbone.predict(x_t, t, condition)
    return output


@pytest.mark.parametrize("family", ["tiny", "dit"])
def test_the_structure_of_a_source_counts_frame_by_frame(
    family: str, request: pytest.FixtureRequest, randomise: Callable[..., None]
) -> None:
    backbone = request.getfixturevalue(family)
    plan = apply_methods(backbone, {"gen1": Gen1(heads=2, structure=1)})
    source = torch.randn(4, 8, 8, 8)
    assert torch.equal(predict(backbone, source), predict(backbone, None))
    randomise(backbone, plan, 0.2)
    seen = predict(backbone, source)
    assert not torch.allclose(seen, predict(backbone, None), atol=1e-3)
    other = predict(backbone, torch.cat([source[:2], -source[2:]]))
    torch.testing.assert_close(other[:2], seen[:2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other[2:], seen[2:], atol=1e-3)
    assert torch.equal(predict(backbone, source, frames=1), predict(backbone, None, frames=1))


def test_in_training_the_structure_is_made_coarser_at_random() -> None:
    block = Structure(torch.nn.Conv2d(4, 6, 1), 3)
    torch.nn.init.ones_(block.conv.weight)
    x, source = torch.zeros(1, 6, 8, 8), torch.randn(1, 4, 8, 8)
    ctx = StepContext(0, 1, torch.zeros(()), source=source)
    block.train()
    spreads = {round(float(block(x, x, ctx).detach().std()), 5) for _ in range(40)}
    assert len(spreads) == 4  # one for each of 0, 1, 2, 3
    block.eval()
    assert {round(float(block(x, x, ctx).detach().std()), 5) for _ in range(5)} <= {min(spreads)}


def test_guidance_in_time_is_the_papers_sum(tiny: Any, randomise: Callable[..., None]) -> None:
    """eps = eps_image(null) + w_t (eps_video(null) - eps_image(null)) + w (eps_video(c) -
    eps_video(null))"""
    randomise(tiny, apply_methods(tiny, {"gen1": Gen1(heads=2)}), 0.1)
    seen: list[Tensor] = []
    own = sample(
        tiny,
        PROMPTS,
        [1, 2],
        settings=Sampling(steps=1, guidance=3, frames=2, temporal_guidance=0.5),
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
        image = tiny.predict(x_t, t.expand(4), null)
        with use(StepContext(0, 1, t, frames=2)):
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
