"""From prompts to pictures: classifier-free guidance over any diffusers scheduler, each picture
seeded by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer.attention.context import StepContext, use
from trainer.backbones.base import Backbone


@torch.no_grad()
def sample(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = 25,
    guidance: float = 5.0,
    negative: str = "",
    size: tuple[int, int] | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Pictures (b, 3, H, W) in [-1, 1], one per prompt and seed; the same pair gives the same
    picture in any batch.

    output = uncond + guidance * (cond - uncond) (arXiv 2207.12598, equation 6); guidance 1 or less
    runs without uncond. size: height and width in pixels, multiples of the backbone's divisor.

    Raises:
        ValueError: prompts and seeds of different lengths, or a size the VAE cannot make.
    """
    if len(prompts) != len(seeds):
        raise ValueError(
            f"{len(prompts)} prompts and {len(seeds)} seeds; give one seed to each prompt"
        )
    noise = _noise(backbone, seeds, size or (backbone.resolution, backbone.resolution))
    device = next(backbone.denoiser.parameters()).device
    scheduler = backbone.scheduler()
    scheduler.set_timesteps(steps, device=device)
    # a flow's scheduler has neither of the two: it starts from unit noise and takes it as it is
    x_t = noise.to(device) * getattr(scheduler, "init_noise_sigma", 1.0)
    scaled = getattr(scheduler, "scale_model_input", lambda latents, t: latents)
    guided, count = guidance > 1, len(prompts)
    roles = {"cond": slice(0, count)}
    if guided:
        roles = {"uncond": slice(0, count), "cond": slice(count, 2 * count)}
        prompts = [*[negative] * count, *prompts]
    with evaluating(backbone):
        condition = backbone.encode_prompts(prompts)
        for step, t in enumerate(scheduler.timesteps):
            model_input = scaled(torch.cat([x_t, x_t]) if guided else x_t, t)
            with use(StepContext(step, steps, t, roles=roles)):
                output = backbone.predict(model_input, t.expand(len(model_input)), condition)
            if guided:
                uncond, cond = output.chunk(2)  # the order of `roles`
                output = uncond + guidance * (cond - uncond)
            x_t = scheduler.step(output, t, x_t).prev_sample
            if on_step is not None:
                on_step(step, x_t)
        return backbone.decode(x_t)


def _noise(backbone: Backbone, seeds: Sequence[int], size: tuple[int, int]) -> Tensor:
    """A latent (b, c, h, w) of unit noise, each row by its seed; size: of the pictures, (height,
    width).

    Raises:
        ValueError: a size the VAE cannot make.
    """
    height, width = size
    if any(side < 1 or side % backbone.divisor for side in size):
        raise ValueError(
            f"size {height}x{width} must be a multiple of {backbone.divisor}, and not nothing"
        )
    shape = (1, backbone.latent_channels, height // backbone.divisor, width // backbone.divisor)
    return torch.cat(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout inside the block; each module has its own mode again after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def sample_many(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int = 32,
    steps: int = 25,
    guidance: float = 5.0,
    negative: str = "",
    size: tuple[int, int] | None = None,
) -> Tensor:
    """`sample` in batches: (n, 3, H, W) on the CPU."""
    parts = [
        sample(
            backbone,
            prompts[i : i + batch_size],
            seeds[i : i + batch_size],
            steps,
            guidance,
            negative,
            size,
        ).cpu()
        for i in range(0, len(prompts), batch_size)
    ]
    return torch.cat(parts)
