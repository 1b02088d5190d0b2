"""From prompts to pictures and clips: classifier-free guidance over any diffusers scheduler, each
picture or clip seeded by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from trainer.attention.context import StepContext, per_frame, use
from trainer.attention.hooks import Guide
from trainer.backbones.backbone import Backbone
from trainer.diffusion.objective import Objective, alpha_sigma, to_x0


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
    guided = guidance > 1
    _check_clip(frames, temporal_guidance, guided)
    side = backbone.resolution
    begun = _noise(backbone, seeds, size or (side, side), frames) if start is None else start
    device = next(backbone.denoiser.parameters()).device
    texts = [*[negative] * len(prompts), *prompts] if guided else prompts
    with evaluating(backbone):
        denoise = Denoising(
            backbone,
            backbone.encode_prompts(texts),
            len(prompts),
            steps,
            guidance,
            temporal_guidance,
            fps,
            source,
            on_step,
            backbone.host.guide if frames > 1 else None,
        )
        x_t, step = begun.to(device), 0
        if start is None:
            x_t = x_t * denoise.noise_scale
            if frames > 1 and backbone.host.start is not None:
                x_t, step = backbone.host.start(x_t, frames, denoise)
        x_t = denoise(x_t, step, steps)
        if frames == 1:
            return backbone.decode(x_t)
        return torch.cat([backbone.decode(clip) for clip in x_t.split(frames)])


@dataclass(frozen=True)
class Denoising:
    """A sampler at work on `clips` clips. text: of uncond and cond, or of cond alone, one row a
    clip; guide: what a method does to the latents after a step; the others as of `sample`."""

    backbone: Backbone
    text: Mapping[str, Tensor]
    clips: int
    steps: int
    guidance: float = 1.0
    temporal_guidance: float = 1.0
    fps: float | None = None
    source: Tensor | None = None
    on_step: Callable[[int, Tensor], None] | None = None
    guide: Guide | None = None

    @cached_property
    def objective(self) -> Objective:
        return Objective(self.backbone.target, self.backbone.alphas_cumprod)

    @property
    def noise_scale(self) -> float:
        """Of what sampling starts from; a flow's scheduler starts from unit noise."""
        return float(getattr(self.backbone.scheduler(), "init_noise_sigma", 1.0))

    def scheduler(self, first: int, device: torch.device) -> Any:
        """One that is at step `first`; a flow's counts its steps."""
        scheduler = self.backbone.scheduler()
        scheduler.set_timesteps(self.steps, device=device)
        if first and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        return scheduler

    def level(self, step: int) -> tuple[float, float]:
        """alpha and sigma before a step."""
        t = self.scheduler(0, torch.device("cpu")).timesteps[step]
        alpha, sigma = alpha_sigma(self.objective, t[None], 1)
        return float(alpha), float(sigma)

    def __call__(self, x_t: Tensor, first: int, last: int) -> Tensor:
        """x_t (b f, c, h, w) from before step `first` to before step `last`, for any number of
        frames."""
        rows, frames = len(x_t), len(x_t) // self.clips
        guided = self.guidance > 1
        roles = {"cond": slice(0, rows)}
        if guided:
            roles = {"uncond": slice(0, rows), "cond": slice(rows, 2 * rows)}
        scheduler = self.scheduler(first, x_t.device)
        scaled = getattr(scheduler, "scale_model_input", lambda latents, t: latents)
        fps, condition = self.fps, per_frame(self.text, frames)
        rate = None
        if fps is not None:
            rate = torch.full((self.clips * len(roles),), fps, device=x_t.device)
        kept = None
        if self.source is not None:  # of as many frames as these clips have
            clips = self.source.to(x_t).unflatten(0, (self.clips, -1))[:, :frames].flatten(0, 1)
            kept = torch.cat([clips] * len(roles))
        for step, t in list(enumerate(scheduler.timesteps))[first:last]:
            model_input = scaled(torch.cat([x_t, x_t]) if guided else x_t, t)
            with use(StepContext(step, self.steps, t, frames, roles, fps=rate, source=kept)):
                output = self.backbone.predict(model_input, t.expand(len(model_input)), condition)
            if guided:
                uncond, cond = output.chunk(2)  # the order of `roles`
                output = uncond + self.guidance * (cond - uncond)
                if self.temporal_guidance != 1 and frames > 1:
                    own = {name: value[:rows] for name, value in condition.items()}
                    with use(StepContext(step, self.steps, t, roles={"uncond": slice(0, rows)})):
                        image = self.backbone.predict(model_input[:rows], t.expand(rows), own)
                    output = output + (self.temporal_guidance - 1) * (uncond - image)
            before, x_t = x_t, scheduler.step(output, t, x_t).prev_sample
            if self.guide is not None and frames > 1:
                x0 = to_x0(self.objective, output, before, t.expand(rows))
                x_t = self.guide(x_t, x0, step, self.steps, frames)
            if self.on_step is not None:
                self.on_step(step, x_t)
        return x_t


def _check_clip(frames: int, temporal_guidance: float, guided: bool) -> None:
    if frames < 1:
        raise ValueError(f"frames={frames}: a clip has one at least, and is a picture then")
    if temporal_guidance != 1 and (frames == 1 or not guided):
        raise ValueError(
            f"temporal_guidance={temporal_guidance:g} is for clips that are guided; give frames "
            "and a guidance above 1"
        )


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
