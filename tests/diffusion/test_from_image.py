"""Image to image: the steps, the noise and the pictures of diffusers' pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention.hooks import SamplingHook
from trainer.backbones.schedulers import with_solver
from trainer.diffusion.from_image import InitialImage
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling

PROMPTS, SEEDS, STEPS = ["a fox on a red background", "a tree"], [3, 4], 7


@pytest.fixture
def pixels() -> Tensor:
    """A picture (1, 3, 32, 32) with an edge and a ramp."""
    ramp = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32).clone()
    ramp[..., 10:20, 5:18] = torch.tensor([0.9, -0.5, 0.1])[:, None, None]
    return ramp


def img2img(backbone: Any, scheduler: Any, pixels: Tensor, strength: float) -> Tensor:
    from diffusers import StableDiffusionImg2ImgPipeline

    own = backbone.pipeline()
    parts = {key: getattr(own, key) for key in ("vae", "text_encoder", "tokenizer", "unet")}
    pipeline = StableDiffusionImg2ImgPipeline(
        **parts, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    images: Tensor = pipeline(
        prompt=PROMPTS,
        negative_prompt=[""] * 2,
        image=(pixels / 2 + 0.5).repeat(2, 1, 1, 1),
        strength=strength,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="pt",
    ).images
    return images


@pytest.mark.sampled(7)
@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("name", [None, "euler", "heun", "dpmpp_2m", "pndm", "ddpm", "unipc"])
def test_equals_the_stock_pipeline(
    name: str | None, strength: float, tiny: Any, pixels: Tensor
) -> None:
    how = Sampling(STEPS, 3.0, sampler=name)
    own = sample(tiny, PROMPTS, SEEDS, settings=how, image=InitialImage(pixels, strength))
    scheduler = tiny.scheduler() if name is None else with_solver(tiny.scheduler(), name)
    wanted = img2img(tiny, scheduler, pixels, strength)
    assert float((own / 2 + 0.5 - wanted).abs().max()) <= 2 / 255


@pytest.mark.parametrize(("strength", "done"), [(0.29, 2), (0.5, 3), (0.99, 6), (1.0, 7)])
def test_the_steps_that_are_done(strength: float, done: int, tiny: Any, pixels: Tensor) -> None:
    seen: list[int] = []
    sample(
        tiny,
        PROMPTS[:1],
        SEEDS[:1],
        settings=Sampling(STEPS, 1.0),
        image=InitialImage(pixels, strength),
        on_step=lambda step, _: seen.append(step),
    )
    assert seen == list(range(STEPS - done, STEPS))


@torch.no_grad()
@pytest.mark.parametrize("name", [None, "unipc"])
def test_on_a_flow(name: str | None, dit: Any, pixels: Tensor) -> None:
    """x_t = (1 - sigma) x0 + sigma noise, and the remaining steps by hand."""
    how = Sampling(STEPS, 1.0, sampler=name)
    own = sample(dit, PROMPTS[:1], SEEDS[:1], settings=how, image=InitialImage(pixels, 0.6))
    generator = torch.Generator().manual_seed(SEEDS[0])
    drawn, noise = (torch.randn(1, 8, 8, 8, generator=generator) for _ in range(2))
    scheduler = dit.scheduler() if name is None else with_solver(dit.scheduler(), name)
    scheduler.set_timesteps(STEPS)
    first = STEPS - int(STEPS * 0.6)
    scheduler.set_begin_index(first)
    sigma = scheduler.sigmas[first]
    x = (1 - sigma) * dit.latents(dit.moments(pixels), drawn) + sigma * noise
    text = dit.encode_prompts(PROMPTS[:1])
    for t in scheduler.timesteps[first:]:
        x = scheduler.step(dit.predict(x, t.expand(1), text), t, x).prev_sample
    torch.testing.assert_close(own, dit.decode(x), rtol=0, atol=1e-4)


def test_less_strength_keeps_more_of_the_picture(tiny: Any, pixels: Tensor) -> None:
    moved = []
    for strength in (0.1, 0.4, 1.0):
        image = InitialImage(pixels, strength)
        own = sample(tiny, PROMPTS[:1], [1], settings=Sampling(10, 1.0), image=image)
        moved.append(float((own - pixels).abs().mean()))
    assert moved == sorted(moved)


@pytest.mark.parametrize("strength", [0.0, 1.5, -1.0])
def test_a_strength_out_of_range(strength: float, pixels: Tensor) -> None:
    with pytest.raises(ValueError, match="must be above 0 and at most 1"):
        InitialImage(pixels, strength)


def test_too_few_steps_for_a_strength(tiny: Any, pixels: Tensor) -> None:
    with pytest.raises(ValueError, match=r"strength=0\.1 of 7 steps is no step; give more"):
        sample(
            tiny,
            PROMPTS[:1],
            [1],
            settings=Sampling(STEPS, 1.0),
            image=InitialImage(pixels, 0.1),
        )


def test_a_method_with_its_own_start_refuses_an_image(tiny: Any, pixels: Tensor) -> None:
    tiny.sampling_hooks["own_start"] = (SamplingHook(begin=lambda x_t, sampler: (x_t, 0)),)
    with pytest.raises(ValueError, match=r"image= does not go with methods\.own_start"):
        sample(tiny, PROMPTS[:1], [1], settings=Sampling(4, 1.0), image=InitialImage(pixels, 0.5))
