"""From prompts to pictures: classifier-free guidance over any diffusers scheduler, each picture
seeded by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer.attention.context import StepContext, use
from trainer.backbones.sd import StableDiffusion


@torch.no_grad()
def sample(
    backbone: StableDiffusion,
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
    height, width = size or (backbone.resolution, backbone.resolution)
    if any(side < 1 or side % backbone.divisor for side in (height, width)):
        raise ValueError(
            f"size {height}x{width} must be a multiple of {backbone.divisor}, and not nothing"
        )
    with evaluating(backbone):
        return _sample(
            backbone, prompts, seeds, steps, guidance, negative, (height, width), on_step
        )


def _sample(
    backbone: StableDiffusion,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    negative: str,
    size: tuple[int, int],
    on_step: Callable[[int, Tensor], None] | None,
) -> Tensor:
    height, width = size
    device = next(backbone.denoiser.parameters()).device
    scheduler = backbone.scheduler()
    scheduler.set_timesteps(steps, device=device)
    shape = (1, backbone.latent_channels, height // backbone.divisor, width // backbone.divisor)
    x_t = torch.cat(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    x_t = x_t.to(device) * scheduler.init_noise_sigma
    guided = guidance > 1
    count = len(prompts)
    condition = backbone.encode_prompts([negative] * count + list(prompts) if guided else prompts)
    roles = (
        {"uncond": slice(0, count), "cond": slice(count, 2 * count)}
        if guided
        else {"cond": slice(0, count)}
    )
    for step, t in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(torch.cat([x_t, x_t]) if guided else x_t, t)
        with use(StepContext(step, steps, t, roles=roles)):
            output = backbone.predict(model_input, t.expand(len(model_input)), condition)
        if guided:
            uncond, cond = output.chunk(2)  # the order `roles` states, made three lines above
            output = uncond + guidance * (cond - uncond)
        x_t = scheduler.step(output, t, x_t).prev_sample
        if on_step is not None:
            on_step(step, x_t)
    return backbone.decode(x_t)


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
    backbone: StableDiffusion,
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
