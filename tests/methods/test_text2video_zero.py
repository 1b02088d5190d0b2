"""Text2Video-Zero: sampled without an adapter, the first frame a picture, the others it moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention.context import StepContext
from trainer.config.load import methods_of
from trainer.config.schema import RecipeError
from trainer.config.value_errors import build_section
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.methods.apply import apply_methods
from trainer.methods.feature.text2video_zero import Text2VideoZero
from trainer.ops.temporal.latents import GlobalMotion

STILL = Text2VideoZero(motion=(0.0, 0.0), alone=0.2, until=0.2)


def painted(backbone: Any, frames: int, steps: int = 5) -> Tensor:
    return sample(
        backbone, ["a fox"], [3], settings=Sampling(steps=steps, guidance=3, frames=frames)
    )


@pytest.fixture(params=["unet", "dit"])
def model(request: pytest.FixtureRequest, tiny: Any, dit: Any) -> Any:
    return tiny if request.param == "unet" else dit


def test_the_first_frame_is_the_picture_and_without_motion_all_are(model: Any) -> None:
    """Of every clip of a batch; the picture's noise is the first frame's."""
    x = torch.stack([
        torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(seed))[0] for seed in (3, 4)
    ])  # fmt: skip
    pictures = sample(
        model, ["a fox", "a cat"], [3, 4], settings=Sampling(steps=5, guidance=3), start=x
    )
    apply_methods(model, {"text2video_zero": STILL}, trains=False)
    clips = sample(
        model, ["a fox", "a cat"], [3, 4], settings=Sampling(steps=5, guidance=3, frames=3)
    )
    for row in range(6):
        torch.testing.assert_close(clips[row], pictures[row // 3], rtol=0, atol=1e-3)


def test_its_options_are_those_of_the_start(tiny: Any) -> None:
    """What moves left comes before what moves up, and the first frame begins alone before it is
    moved; the start itself is tested in tests/ops/temporal/test_latents.py."""
    own = Text2VideoZero(motion=(0.25, -0.125), alone=0.2, until=0.4)
    plan = apply_methods(tiny, {"text2video_zero": own}, trains=False)
    (hook,) = plan.edits["text2video_zero"].sampling
    start: Any = hook.begin
    assert start.__self__ == GlobalMotion(x=0.25, y=-0.125, alone=0.2, until=0.4)


def test_every_frame_reads_the_first(tiny: Any, looped_block: Callable[..., Tensor]) -> None:
    """Of its own clip, in every block: softmax(q_i k_0^T / sqrt(d)) v_0."""
    apply_methods(tiny, {"text2video_zero": STILL}, trains=False)
    generator = torch.Generator().manual_seed(1)
    for name in ("down_blocks.0", "mid_block", "up_blocks.1"):
        block: Any = tiny.unet.get_submodule(f"{name}.attentions.0.transformer_blocks.0")
        width = block.norm1.weight.shape[0]
        x = torch.randn(6, 5, width, generator=generator)  # two clips of three frames
        text = torch.randn(6, 4, 128, generator=generator)
        with torch.no_grad(), tiny.host.holder.holding(StepContext(0, 1, torch.zeros(()), 3)):
            own = block(x, encoder_hidden_states=text)
            wanted = looped_block(block, x, text, [[0], [0], [0], [3], [3], [3]])
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-4)


def test_motion_moves_what_is_painted(model: Any) -> None:
    """A quarter of the picture a frame: the next frame is nearer to the first one moved than to the
    first one."""
    apply_methods(
        model,
        {"text2video_zero": Text2VideoZero(motion=(0.25, 0.0), alone=0.2, until=0.2)},
        trains=False,
    )
    first, second, _ = painted(model, 3)
    moved = first[..., 8:] - second[..., :-8]
    assert float(moved.abs().mean()) < 0.7 * float((first - second).abs().mean())


def test_pictures_are_the_image_models(tiny: Any) -> None:
    base = painted(tiny, 1)
    apply_methods(tiny, {"text2video_zero": Text2VideoZero(motion=(0.2, 0))}, trains=False)
    assert torch.equal(painted(tiny, 1), base)
    assert not torch.allclose(painted(tiny, 2)[1], base[0], atol=1e-2)


def test_a_seed_gives_a_clip(tiny: Any) -> None:
    apply_methods(tiny, {"text2video_zero": Text2VideoZero()}, trains=False)
    once = painted(tiny, 3, steps=20)
    assert torch.equal(painted(tiny, 3, steps=20), once)
    assert float((once[0] - once[1]).abs().mean()) > 1e-3


def test_nothing_trains_so_fit_refuses_it(tiny: Any) -> None:
    with pytest.raises(ValueError, match="nothing would train with methods text2video_zero"):
        apply_methods(tiny, methods_of({"text2video_zero": {}}))


def test_what_trains_is_refused_where_nothing_was_trained(tiny: Any) -> None:
    tree = {"text2video_zero": {}, "lora": {}}
    with pytest.raises(ValueError, match=r"methods\.lora has weights to train, which nothing has"):
        apply_methods(tiny, methods_of(tree), trains=False)


def test_the_motion_comes_after_the_start() -> None:
    with pytest.raises(RecipeError, match=r"text2video_zero\.until=0\.05 comes before alone=0\.1"):
        build_section(Text2VideoZero, {"alone": 0.1, "until": 0.05}, "methods.text2video_zero")
