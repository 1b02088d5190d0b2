"""From prompts to pictures and clips: classifier-free guidance over any diffusers scheduler, each
picture or clip seeded by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer.backbones.backbone import Backbone
from trainer.diffusion.denoising import Denoising, Sampling


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
    frames: int = 1,
    fps: float | None = None,
    temporal_guidance: float = 1.0,
    source: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Pictures (b, 3, H, W) in [-1, 1], one per prompt and seed; the same pair gives the same
    picture in any batch. With `frames` above 1 a clip each, (b * frames, 3, H, W), its frames
    adjacent.

    output = uncond + guidance * (cond - uncond) (arXiv 2207.12598, equation 6); guidance 1 or less
    runs without uncond. size: height and width in pixels, multiples of the backbone's divisor. fps:
    frames a second, for a model that has learned of them. temporal_guidance: of clips, how far from
    what the frames would be as images of their own (Gen-1, arXiv 2302.03011, section 3.4),

        output = image + temporal_guidance * (uncond - image) + guidance * (cond - uncond)

    source: clean latents (b * frames, c, h, w), whose structure a model that knows how keeps.
    start: latents (b * frames, c, h, w) in the place of the seeds' noise, as of `inversion.py`.

    Raises:
        ValueError: prompts and seeds of different lengths, a size the VAE cannot make, no frame, or
        temporal guidance without guidance or without frames.
    """
    if len(prompts) != len(seeds):
        raise ValueError(
            f"{len(prompts)} prompts and {len(seeds)} seeds; give one seed to each prompt"
        )
    settings = Sampling(steps, guidance, negative, size, frames, fps, temporal_guidance)
    side = backbone.resolution
    begun = _noise(backbone, seeds, size or (side, side), frames) if start is None else start
    device = next(backbone.denoiser.parameters()).device
    texts = [*[negative] * len(prompts), *prompts] if settings.guided else prompts
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
        x_0 = denoising.run(begun.to(device))
        if frames == 1:
            return backbone.decode(x_0)
        return torch.cat([backbone.decode(clip) for clip in x_0.split(frames)])


def _noise(
    backbone: Backbone, seeds: Sequence[int], size: tuple[int, int], frames: int = 1
) -> Tensor:
    """A latent (b f, c, h, w) of unit noise, each clip by its seed; size: of the pictures, (height,
    width).

    Raises:
        ValueError: a size the VAE cannot make.
    """
    if any(side < 1 or side % backbone.divisor for side in size):
        raise ValueError(
            f"size {size[0]}x{size[1]} must be a multiple of {backbone.divisor}, and not nothing"
        )
    shape = (frames, backbone.latent_channels, *(side // backbone.divisor for side in size))
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
    frames: int = 1,
    fps: float | None = None,
    temporal_guidance: float = 1.0,
) -> Tensor:
    """`sample` in batches of at most `batch_size` pictures or clips: (n * frames, 3, H, W) on the
    CPU."""
    parts = [
        sample(
            backbone,
            prompts[i : i + batch_size],
            seeds[i : i + batch_size],
            steps,
            guidance,
            negative,
            size,
            frames=frames,
            fps=fps,
            temporal_guidance=temporal_guidance,
        ).cpu()
        for i in range(0, len(prompts), batch_size)
    ]
    return torch.cat(parts)
