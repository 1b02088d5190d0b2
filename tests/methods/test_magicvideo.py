"""MagicVideo: masks before and after the softmax, the attention stands beside the spatial one, an
adaptor for each frame."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention.context import StepContext, use
from trainer.methods.apply import apply_methods
from trainer.methods.feature.magicvideo import MagicVideo

each_family = pytest.mark.parametrize("family", ["tiny", "dit"])


@each_family
def test_no_frame_hears_of_a_later_one(
    family: str, request: pytest.FixtureRequest, randomise: Callable[..., None]
) -> None:
    """With the mask before the softmax; after it, later frames have still had their share."""
    backbone = request.getfixturevalue(family)
    plan = apply_methods(backbone, {"magicvideo": MagicVideo(heads=2, renormalise=True)})
    randomise(backbone, plan, 0.2)
    x_t = torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    condition = backbone.encode_prompts(["a fox"] * 3)
    t = torch.full((3,), 300)

    def predict(x: Tensor) -> Tensor:
        with torch.no_grad(), use(StepContext(0, 1, t, frames=3)):
            output: Tensor = backbone.predict(x, t, condition)
        return output

    base = predict(x_t)
    for frame in range(3):
        changed = x_t.clone()
        changed[frame] += 1
        apart = (predict(changed) - base).abs().amax(dim=(1, 2, 3))
        assert (apart[:frame] < 1e-5).all()
        assert (apart[frame:] > 1e-3).all()


@pytest.mark.parametrize("renormalise", [False, True])
def test_the_equation(renormalise: bool, tiny: Any, randomise: Callable[..., None]) -> None:
    plan = apply_methods(tiny, {"magicvideo": MagicVideo(heads=2, renormalise=renormalise)})
    randomise(tiny, plan, 0.3)
    block: Any = tiny.unet.down_blocks[1].temporal[0]
    generator = torch.Generator().manual_seed(1)
    x, before = (torch.randn(3, 32, 1, 1, generator=generator) for _ in range(2))
    own = block(x, before, StepContext(0, 1, torch.zeros(()), frames=3))
    z = block.norm(before[..., 0, 0]) + block.places.pe[0, :3]
    q, k, v = (
        layer(z).unflatten(-1, (2, -1)).transpose(0, 1)
        for layer in (block.attn.to_q, block.attn.to_k, block.attn.to_v)
    )
    scores = q @ k.transpose(1, 2) / 16**0.5
    seen = torch.ones(3, 3).tril()
    if renormalise:
        probs = scores.masked_fill(seen == 0, float("-inf")).softmax(-1)
    else:
        probs = scores.softmax(-1) * seen
    o = (probs @ v).transpose(0, 1).flatten(1)
    wanted = x + block.attn.to_out[0](o)[..., None, None]
    torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-5)


@each_family
def test_adaptors_follow_convolutions_or_blocks(
    family: str, request: pytest.FixtureRequest
) -> None:
    backbone = request.getfixturevalue(family)
    plan = apply_methods(backbone, {"magicvideo": MagicVideo(heads=2, max_frames=5)})
    parameters = dict(backbone.named_parameters())
    scales = [parameters[name] for name in plan.names if name.endswith(".scale")]
    assert len(scales) == (16 if family == "tiny" else 2)
    assert all(scale.shape[0] == 5 and not scale.any() for scale in scales)


def sines(fps: Tensor, width: int) -> Tensor:
    """[cos(fps w_i), sin(fps w_i)] with w_i = 10000^(-i / half), as diffusers embeds timesteps."""
    half = width // 2
    speeds = torch.tensor([10000 ** (-i / half) for i in range(half)])
    angles = fps[:, None] * speeds
    return torch.cat([angles.cos(), angles.sin()], 1)


@each_family
def test_frames_a_second_are_embedded_as_the_timestep_is(
    family: str, request: pytest.FixtureRequest, randomise: Callable[..., None]
) -> None:
    """time <- time + Linear(SiLU(Linear(sines(fps)))), section 3.2; 8 where nobody says."""
    backbone = request.getfixturevalue(family)
    plan = apply_methods(backbone, {"magicvideo": MagicVideo(heads=2)})
    randomise(backbone, plan, 0.2)
    denoiser = backbone.denoiser
    time = denoiser.time_embedding if family == "tiny" else denoiser.adaln_single.emb
    around = denoiser if family == "tiny" else denoiser.adaln_single
    inner: list[Tensor] = []
    outer: list[Tensor] = []
    last = time.linear_2 if family == "tiny" else time.timestep_embedder.linear_2
    last.register_forward_hook(lambda *given: inner.append(given[2]))
    time.register_forward_hook(lambda *given: outer.append(given[2]))
    x_t = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    condition, t = backbone.encode_prompts(["a fox"] * 4), torch.full((4,), 300)
    for given, rates in ((torch.tensor([24.0, 5.0]), [24.0, 24.0, 5.0, 5.0]), (None, [8.0] * 4)):
        with torch.no_grad(), use(StepContext(0, 1, t, frames=2, fps=given)):
            backbone.predict(x_t, t, condition)
        embedding = around.frame_rate.embedding
        with torch.no_grad():
            hidden = embedding.linear_1(sines(torch.tensor(rates), 256))
            added = embedding.linear_2(hidden * hidden.sigmoid())
        torch.testing.assert_close(outer[-1], inner[-1] + added, rtol=1e-4, atol=1e-4)
