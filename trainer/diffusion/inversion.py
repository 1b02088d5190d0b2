"""DDIM inversion: the noise from which the sampler paints a given picture or clip again.

A step of the deterministic sampler (arXiv 2010.02502, equation 12; on a flow path Euler's) takes
x_t to the level (alpha', sigma') below by what the network f means, x0 and noise:

    x' = alpha' x0 + sigma' noise = a x_t + b f(x_t, t)    both linear in x_t and f

and its inverse is x_t = (x' - b f(x_t, t)) / a, in which x_t stands on both sides. f(x', t) in the
place of f(x_t, t), as usual, errs less the smaller the steps are; put in again, the x_t so found
errs less at any number of them (arXiv 2309.04907, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.attention.context import StepContext
from trainer.attention.rows import Rows
from trainer.backbones.backbone import Backbone
from trainer.diffusion.objective import Objective, to_noise, to_x0
from trainer.diffusion.predict import predict_groups
from trainer.diffusion.sampler import evaluating


class StepLatents(Protocol):
    """Latents (b * frames, c, h, w) before each step, by its number; a dict is one."""

    def get(self, step: int, /) -> Tensor | None: ...

    def __setitem__(self, step: int, latents: Tensor, /) -> None: ...


@torch.no_grad()
def invert(
    backbone: Backbone,
    latents: Tensor,
    prompts: Sequence[str],
    steps: int = 50,
    frames: int = 1,
    fps: float | None = None,
    iterations: int = 1,
    known: StepLatents | None = None,
) -> Tensor:
    """Clean latents (b * frames, c, h, w), one prompt a picture or clip, to what `sample` takes as
    `start` and, by the same prompts without guidance in as many steps, turns into them again. They
    are also the `source` of a model that keeps the structure of one.

    iterations: calls of the network a step. known: latents before each step, by its number: what
    an interrupted call has found is read from it, and every step that is finished is put there.

    Raises:
        ValueError: fewer than one step or iteration, a number of latents that is no clip of
        `frames` for each prompt, or a sampler that clips what it paints.
    """
    if steps < 1 or iterations < 1:
        raise ValueError(f"steps={steps}, iterations={iterations}: give one at least of each")
    if len(latents) != len(prompts) * frames:
        raise ValueError(
            f"{len(latents)} latents for {len(prompts)} prompts and {frames} frames; give every "
            "frame of a clip a row"
        )
    scheduler = backbone.scheduler()
    if getattr(scheduler.config, "clip_sample", False) or getattr(
        scheduler.config, "thresholding", False
    ):
        raise ValueError(
            f"backbone {backbone.name}: its sampler clips what it paints, which has no inverse; "
            "set clip_sample and thresholding to false in its scheduler_config.json"
        )
    device = next(backbone.denoiser.parameters()).device
    scheduler.set_timesteps(steps, device=device)
    objective = Objective(backbone.target, backbone.alphas_cumprod)
    x = latents = latents.to(device)
    rows = Rows.of(("source/cond",), len(latents))
    rate = None if fps is None else torch.full((len(prompts),), fps, device=device)
    with evaluating(backbone):
        condition = backbone.encode_prompts(prompts).per_frame(frames)
        stages, x = _open_stages(scheduler.timesteps, known, x)
        for step, t in stages:
            a, b = step_of(objective, t, *below(scheduler, step))
            ctx = StepContext(step, steps, t, frames, rows, fps=rate, source=latents)
            found = x
            for _ in range(iterations):
                output = predict_groups(backbone, {"source": found}, condition, ctx)["source/cond"]
                found = (x - b * output) / a
            x = found
            if known is not None:
                known[step] = x
    return x


def _open_stages(
    timesteps: Tensor, known: StepLatents | None, x: Tensor
) -> tuple[list[tuple[int, Tensor]], Tensor]:
    """The steps that are still to be inverted, the last of the sampler first, and the latents they
    begin from; x: those of a call that knows none."""
    first = len(timesteps)
    for step in range(first if known is not None else 0):
        assert known is not None
        if (found := known.get(step)) is not None:
            first, x = step, found.to(x)
            break
    return list(reversed(list(enumerate(timesteps))[:first])), x


def below(scheduler: Any, step: int) -> tuple[float, float]:
    """alpha and sigma that a step of the sampler ends at."""
    if not hasattr(scheduler, "alphas_cumprod"):
        sigma = float(scheduler.sigmas[step + 1])
        return 1 - sigma, sigma
    t = int(scheduler.timesteps[step])
    previous = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    squared = float(
        scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
    )
    return sqrt(squared), sqrt(1 - squared)


def step_of(objective: Objective, t: Tensor, alpha: float, sigma: float) -> tuple[float, float]:
    """a and b of x' = a x_t + b f(x_t, t), for a step from timestep t () to (alpha, sigma).

    Raises:
        ValueError: the step forgets x_t, as the last does for a network that predicts x0.
    """
    t, one = t.cpu(), torch.ones(1, dtype=torch.float64)  # Apple's GPUs know no float64
    parts = []
    for x_t, output in ((one, 0 * one), (0 * one, one)):
        x0 = to_x0(objective, output, x_t, t[None])
        noise = to_noise(objective, output, x_t, t[None])
        parts.append(float(alpha * x0 + sigma * noise))
    if parts[0] == 0:
        raise ValueError(
            f"the sampler's step from timestep {float(t):g} is the same for every latent, so it "
            "has no inverse; choose a backbone that predicts noise, v or the flow"
        )
    return parts[0], parts[1]
