"""From prompts to pictures and clips, each with a seed of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer.backbones.backbone import Backbone
from trainer.diffusion.sampler_loop import Denoising
from trainer.diffusion.sampling_settings import Sampling

DEFAULT = Sampling()


@torch.no_grad()
def sample(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    settings: Sampling = DEFAULT,
    source: Tensor | None = None,
    start: Tensor | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Pictures (b, 3, H, W) in [-1, 1], one for each prompt and seed; the same pair gives the same
    picture in any batch. With `settings.frames` above 1 a clip for each, (b * frames, 3, H, W), its
    frames adjacent.

    source: clean latents (b * frames, c, h, w), for a model that keeps the structure of a source.
    start: latents (b * frames, c, h, w) instead of the seeds' noise, as `inversion.invert` returns
    them. on_step: called after each step with its number and the latents.

    Raises:
        ValueError: prompts and seeds of different lengths, or a size the model cannot make.
    """
    begun = noise_of(backbone, seeds, settings) if start is None else start
    texts = [text for group in prompts_of(prompts, seeds, settings) for text in group]
    with evaluating(backbone):
        denoising = Denoising(
            backbone,
            backbone.encode_prompts(texts),
            clips=len(prompts),
            settings=settings,
            given=start is not None,
            source=source,
            on_step=on_step,
            hooks=backbone.hooks,
        )
        x_0 = denoising.run(begun.to(backbone.device))
        if settings.frames == 1:
            return backbone.decode(x_0)
        return torch.cat([backbone.decode(clip) for clip in x_0.split(settings.frames)])


def prompts_of(
    prompts: Sequence[str], seeds: Sequence[int], settings: Sampling
) -> list[Sequence[str]]:
    """The texts of each group of rows, in the order of `settings.groups`."""
    if len(prompts) != len(seeds):
        raise ValueError(
            f"{len(prompts)} prompts and {len(seeds)} seeds; give one seed to each prompt"
        )
    return [[settings.negative] * len(prompts), prompts] if settings.guided else [prompts]


def noise_of(backbone: Backbone, seeds: Sequence[int], settings: Sampling) -> Tensor:
    """A latent (b f, c, h, w) of unit noise, each clip by its seed.

    Raises:
        ValueError: a size the model cannot make.
    """
    size = settings.size or (backbone.resolution, backbone.resolution)
    if any(side < 1 or side % backbone.multiple for side in size):
        raise ValueError(
            f"size {size[0]}x{size[1]} must be a multiple of {backbone.multiple}, and above 0"
        )
    height, width = (side // backbone.divisor for side in size)
    shape = (settings.frames, backbone.latent_channels, height, width)
    return torch.cat(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode inside the block; after it, each module is in its earlier mode."""
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
    *,
    settings: Sampling = DEFAULT,
    batch_size: int = 32,
) -> Tensor:
    """`sample` in batches of at most `batch_size` pictures or clips: (n * frames, 3, H, W) on the
    CPU."""
    spans = [slice(i, i + batch_size) for i in range(0, len(prompts), batch_size)]
    parts = [sample(backbone, prompts[at], seeds[at], settings=settings).cpu() for at in spans]
    return torch.cat(parts)
