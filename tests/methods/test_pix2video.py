"""Pix2Video: the decoder's attention, guidance between frames in the first half, a clip edited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainer.attention.condition import Condition
from trainer.attention.context import StepContext, use
from trainer.diffusion.inversion import invert
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.methods.apply import apply_methods
from trainer.methods.feature.pix2video import Pix2Video


def painted(backbone: Any, frames: int = 3, start: Tensor | None = None) -> Tensor:
    return sample(
        backbone, ["a fox"], [3], settings=Sampling(steps=6, guidance=3, frames=frames), start=start
    )


def apart(clip: Tensor) -> float:
    return float(clip.diff(dim=0).square().mean())


def test_the_decoder_reads_other_frames_and_in_a_transformer_all_does(tiny: Any, dit: Any) -> None:
    for backbone, place in ((tiny, "up"), (dit, "block")):
        plan = apply_methods(backbone, {"pix2video": Pix2Video()}, trains=False)
        own = [s.name for s in backbone.sites if s.kind == "self" and s.place == place]
        assert list(plan.edits["pix2video"].sites) == own
        assert plan.names == ()


def test_a_frame_of_the_decoder_reads_the_first_and_the_one_before(
    tiny: Any, looped_block: Callable[..., Tensor]
) -> None:
    apply_methods(tiny, {"pix2video": Pix2Video()}, trains=False)
    generator = torch.Generator().manual_seed(1)
    for name, reads in (
        ("up_blocks.0", [[0, 0], [0, 0], [0, 1], [0, 2]]),
        ("down_blocks.1", [[0], [1], [2], [3]]),
    ):
        block: Any = tiny.unet.get_submodule(f"{name}.attentions.0.transformer_blocks.0")
        x = torch.randn(4, 5, block.norm1.weight.shape[0], generator=generator)
        text = torch.randn(4, 4, 128, generator=generator)
        with torch.no_grad(), tiny.host.holder.holding(StepContext(0, 1, torch.zeros(()), 4)):
            own = block(x, encoder_hidden_states=text)
            wanted = looped_block(block, x, text, reads)
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-4)


def test_a_guided_step_is_what_a_loop_over_frames_gives(tiny: Any) -> None:
    """Classifier-free guidance, DDIM's step (arXiv 2010.02502, equation 12, of a network that
    predicts v), and in the first half of the steps the gradient of the distance between the x0 of
    the latents before the step and of the frame before (arXiv 2303.12688, section 3.2)."""
    steps, scale, weight = 4, 3.0, 60.0
    apply_methods(tiny, {"pix2video": Pix2Video(weight=weight)}, trains=False)
    start = torch.randn(6, 8, 8, 8, generator=torch.Generator().manual_seed(2))  # two clips
    found: list[Tensor] = []
    keep = lambda _, x_t: found.append(x_t.clone())  # noqa: E731
    prompts = ["a fox", "a cat"]
    sample(
        tiny,
        prompts,
        [3, 4],
        settings=Sampling(steps=steps, guidance=scale, frames=3),
        start=start,
        on_step=keep,
    )
    x = start.double()
    text = tiny.encode_prompts(["", "", *prompts]).tokens
    condition = Condition(text.repeat_interleave(3, 0))
    for step in range(steps):
        t = 999 - 250 * step
        now, then = (
            float(tiny.alphas_cumprod[level]) if level >= 0 else 1.0 for level in (t, t - 250)
        )
        both = torch.cat([x, x]).float()
        with torch.no_grad(), use(StepContext(step, steps, torch.tensor(t), 3)):
            uncond, cond = tiny.predict(both, torch.full((12,), t), condition).double().chunk(2)
        v = uncond + scale * (cond - uncond)
        x0 = now**0.5 * x - (1 - now) ** 0.5 * v
        noise = now**0.5 * v + (1 - now) ** 0.5 * x
        after = then**0.5 * x0 + (1 - then) ** 0.5 * noise
        for row in range(6):
            if row % 3 and step < steps / 2:
                leaf = x0[row].clone().requires_grad_()
                distance = (leaf - x0[row - 1]).square().mean()
                after[row] -= weight * torch.autograd.grad(distance, leaf)[0]
        torch.testing.assert_close(found[step].double(), after, rtol=1e-3, atol=1e-3)
        x = found[step].double()


def test_guidance_draws_frames_together(tiny: Any, tiny_folder: Any, open_folder: Any) -> None:
    other = open_folder(tiny_folder)
    apply_methods(tiny, {"pix2video": Pix2Video(weight=0)}, trains=False)
    apply_methods(other, {"pix2video": Pix2Video(weight=100)}, trains=False)
    free, drawn = painted(tiny), painted(other)
    torch.testing.assert_close(free[0], drawn[0], rtol=0, atol=1e-4)  # nothing draws the first
    assert apart(drawn) < 0.8 * apart(free)


def test_pictures_are_the_image_models(tiny: Any) -> None:
    base = painted(tiny, 1)
    apply_methods(tiny, {"pix2video": Pix2Video()}, trains=False)
    assert torch.equal(painted(tiny, 1), base)


def test_a_clip_is_edited_from_its_own_noise(tiny: Any) -> None:
    apply_methods(tiny, {"pix2video": Pix2Video(weight=0)}, trains=False)
    clip = torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(5))
    start = invert(tiny, clip, [""], steps=6, frames=3, iterations=8)
    same = sample(tiny, [""], [3], settings=Sampling(steps=6, guidance=1, frames=3), start=start)
    torch.testing.assert_close(same, tiny.decode(clip), rtol=0, atol=1e-2)
    edited = painted(tiny, start=start)
    assert not torch.allclose(edited, same, atol=1e-2)
