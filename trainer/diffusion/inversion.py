"""DDIM inversion: the noise from which the sampler generates a given picture or clip again.

A step of the deterministic sampler (arXiv 2010.02502, equation 12; on a flow path Euler's) takes
x_t to the level (alpha', sigma') below by what the network f means, x0 and noise:

    x' = alpha' x0 + sigma' noise = a x_t + b f(x_t, t)    both linear in x_t and f

and its inverse is x_t = (x' - b f(x_t, t)) / a, in which x_t stands on both sides. The usual first
guess takes f(x', t) for f(x_t, t): its error shrinks with the size of the steps. Each further
iteration puts the x_t just found into f, which makes the error smaller at any number of steps
(arXiv 2309.04907, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.attention.condition import Condition
from trainer.attention.context import StepContext
from trainer.attention.rows import Rows
from trainer.backbones.backbone import Backbone
from trainer.backbones.schedulers import set_levels
from trainer.diffusion.objective import Objective, to_noise, to_x0
from trainer.diffusion.predict import predict_groups
from trainer.diffusion.sampler import evaluating

GROUP = "source/cond"  # what is inverted is what an edit starts from


class StepLatents(Protocol):
    """Latents (b * frames, c, h, w) before each step, by its number; a dict is one."""

    def get(self, step: int, /) -> Tensor | None: ...

    def __setitem__(self, step: int, latents: Tensor, /) -> None: ...


@torch.no_grad()
def invert(
    backbone: Backbone,
    latents: Tensor,
    prompts: Sequence[str],
    *,
    steps: int = 50,
    frames: int = 1,
    fps: float | None = None,
    iterations: int = 1,
    known: StepLatents | None = None,
    channels: Mapping[str, Tensor] | None = None,
    tells: Callable[[Condition], Condition] = lambda condition: condition,
) -> Tensor:
    """Clean latents (b * frames, c, h, w), fewer where the VAE compresses time, and one prompt for
    each picture or clip, to what `sample` takes as `start`: sampling from it with the same prompts,
    in as many steps and without guidance, gives the clean latents again.

    iterations: calls of the network for each step. known: latents before each step, by its number:
    what an interrupted call has found is read from it, and every finished step is put there.
    channels: as of `sample`; tells: makes what the network is told of what the prompts are encoded
    to. Raises ValueError for fewer than one step or iteration, a number of
    latents that is not `frames` for each prompt, or a sampler that clips its latents.
    """
    scheduler, frames = backbone.scheduler(), backbone.clip_frames.latent(frames)
    _check_sampler(backbone, scheduler)
    _check_counts(latents, prompts, frames=frames, steps=steps, iterations=iterations)
    extent = (frames, latents.shape[-2], latents.shape[-1])
    levels = backbone.noise_levels(steps, extent)
    set_levels(scheduler, steps, levels=levels, device=backbone.device)
    x = latents = latents.to(backbone.device)
    ctx = _context(latents, frames=frames, steps=steps, fps=fps, channels=channels or {})
    with evaluating(backbone):
        condition = tells(backbone.encode_prompts(prompts)).per_frame(frames)
        inverse = Inverse(backbone, scheduler, condition=condition, iterations=iterations)
        stages, x = _open_stages(scheduler.timesteps, known, x)
        for step, t in stages:
            x = inverse(x, replace(ctx, step=step, timestep=t))
            if known is not None:
                known[step] = x
    return x


@dataclass(frozen=True)
class Inverse:
    """The inverse of one step of a sampler."""

    backbone: Backbone
    scheduler: Any
    condition: Condition
    iterations: int

    def __call__(self, x: Tensor, ctx: StepContext) -> Tensor:
        """Latents x (b f, c, h, w) after the step of `ctx` to those before it."""
        objective = Objective.of(self.backbone)
        a, b = step_of(objective, ctx.timestep, *below(self.scheduler, ctx.step))
        found = x
        for _ in range(self.iterations):
            outputs = predict_groups(
                self.backbone, {"source": found}, condition=self.condition, ctx=ctx
            )
            found = (x - b * outputs[GROUP]) / a
        return found


def _context(
    latents: Tensor,
    *,
    frames: int,
    steps: int,
    fps: float | None,
    channels: Mapping[str, Tensor],
) -> StepContext:
    """What the calls of every step have in common."""
    clips, device = len(latents) // frames, latents.device
    return StepContext(
        step=0,
        num_steps=steps,
        timestep=torch.zeros((), device=device),
        frames=frames,
        groups=Rows.of((GROUP,), len(latents)),
        fps=None if fps is None else torch.full((clips,), fps, device=device),
        channels={name: own.to(latents) for name, own in channels.items()},
    )


def _check_counts(
    latents: Tensor, prompts: Sequence[str], *, frames: int, steps: int, iterations: int
) -> None:
    if steps < 1 or iterations < 1:
        raise ValueError(f"steps={steps}, iterations={iterations}: give at least one of each")
    if len(latents) != len(prompts) * frames:
        raise ValueError(
            f"{len(latents)} latents for {len(prompts)} prompts and {frames} frames; give every "
            "frame of a clip a row"
        )


def _check_sampler(backbone: Backbone, scheduler: Any) -> None:
    clips = ("clip_sample", "thresholding")
    if any(getattr(scheduler.config, name, False) for name in clips):
        raise ValueError(
            f"backbone {backbone.name}: its sampler clips the latents, which has no inverse; "
            "set clip_sample and thresholding to false in its scheduler_config.json"
        )


def _open_stages(
    timesteps: Tensor, known: StepLatents | None, x: Tensor
) -> tuple[list[tuple[int, Tensor]], Tensor]:
    """The steps that are still to be inverted, the sampler's last one first, and the latents to
    begin from: x, unless some are known."""
    first = len(timesteps)
    for step in range(first if known is not None else 0):
        assert known is not None
        if (found := known.get(step)) is not None:
            first, x = step, found.to(x)
            break
    return list(reversed(list(enumerate(timesteps))[:first])), x


def below(scheduler: Any, step: int) -> tuple[float, float]:
    """alpha and sigma after a step of the sampler."""
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
        ValueError: a is 0, as in the last step of a network that predicts x0.
    """
    t, one = t.cpu(), torch.ones(1, dtype=torch.float64)  # Apple's GPUs know no float64
    parts = []
    for x_t, output in ((one, 0 * one), (0 * one, one)):
        x0 = to_x0(objective, output, x_t, t=t[None])
        noise = to_noise(objective, output, x_t, t=t[None])
        parts.append(float(alpha * x0 + sigma * noise))
    if parts[0] == 0:
        raise ValueError(
            f"the sampler's step from timestep {float(t):g} is the same for every latent, so it "
            "has no inverse; choose a backbone that predicts noise, v or the flow"
        )
    return parts[0], parts[1]
