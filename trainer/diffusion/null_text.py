"""Null-text inversion: an unconditional embedding for each step, with which guided sampling makes
an inverted picture or clip again.

    min over e_t of mean((x_(t-1)(x_t, e_t, text; w) - z_(t-1))^2)    z: the trajectory of inversion

Mokady et al., CVPR 2023, arXiv 2211.09794, section 3.2, algorithm 1; for clips one embedding for
all frames, Video-P2P, arXiv 2303.04761, section 3.2. x_t is what the step before has made, with the
embedding found there, at which e_t begins. Adam, at most `most` steps of learning rate
1e-2 (1 - i / 100) in step i, until the error is below 1e-5 + 2e-5 i, as in the released code: i is
counted in its 50 steps, and is 50 / n times the number of a step of n.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trainer.attention.condition import Condition
from trainer.attention.context import StepContext
from trainer.attention.rows import Rows
from trainer.backbones.backbone import Backbone
from trainer.backbones.schedulers import set_levels
from trainer.diffusion.edit_source import SOURCE, SOURCE_COND, SOURCE_UNCOND
from trainer.diffusion.guidance import classifier_free
from trainer.diffusion.inversion import StepLatents, below, step_of
from trainer.diffusion.objective import Objective
from trainer.diffusion.predict import predict_groups
from trainer.diffusion.sampler import evaluating
from trainer.diffusion.sampling_settings import Sampling

STEPS = 50  # of the released code, whose constants hold for so many


def learning_rate(step: int, steps: int) -> float:
    """Of step number `step` of `steps`."""
    return 1e-2 * (1 - step * STEPS / steps / 100)


def enough(step: int, steps: int) -> float:
    """The mean squared error at which a step is done."""
    return 1e-5 + 2e-5 * step * STEPS / steps


@torch.no_grad()
def null_text(
    backbone: Backbone,
    latents: Tensor,
    trajectory: StepLatents,
    *,
    prompt: str,
    settings: Sampling,
    most: int = 10,
    channels: Mapping[str, Tensor] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Embeddings (steps, n, d) for one picture or clip, clean latents (f, c, h, w).

    trajectory: the latents before each step, by its number, of inversion by `prompt`; settings: of
    the sampling, whose guidance and negative prompt, from which the first embedding begins; most:
    steps of Adam for each; channels: as of `sample`; advance: told of each step with 1. Raises
    ValueError where the sampling is not guided, or a step of the trajectory is missing.
    """
    settings = settings.on(embeds=backbone.embeds_guidance)
    if not settings.guided:
        raise ValueError(
            "null-text embeddings are for guided sampling; give a guidance above 1, or null_text=0"
        )
    device, found = backbone.device, list[Tensor]()
    scheduler = scheduler_for(backbone, latents, settings.steps)
    with evaluating(backbone):
        told = settings.told(backbone.encode_prompts([settings.negative, prompt]))
        ctx = _context(latents.to(device), settings, channels or {})
        search = Search(backbone, scheduler, told=told, settings=settings, ctx=ctx, most=most)
        x = _known(trajectory, 0).to(device)
        assert told.tokens is not None
        embedding = told.tokens[0]
        for step in range(settings.steps):
            last = step + 1 == settings.steps
            wanted = latents if last else _known(trajectory, step + 1)
            embedding, x = search(x, wanted.to(device), embedding, step=step)
            found.append(embedding)
            advance(1)
    return torch.stack(found)


def scheduler_for(backbone: Backbone, latents: Tensor, steps: int) -> Any:
    """The backbone's own, for clean latents (f, c, h, w) of one picture or clip."""
    scheduler = backbone.scheduler()
    levels = backbone.noise_levels(steps, (len(latents), latents.shape[-2], latents.shape[-1]))
    set_levels(scheduler, steps, levels=levels, device=backbone.device)
    return scheduler


def _context(latents: Tensor, settings: Sampling, channels: Mapping[str, Tensor]) -> StepContext:
    """What the calls of every step have in common."""
    fps, device = settings.fps, latents.device
    return StepContext(
        step=0,
        num_steps=settings.steps,
        timestep=torch.zeros((), device=device),
        frames=len(latents),
        fps=None if fps is None else torch.full((1,), fps, device=device),
        channels={name: own.to(latents) for name, own in channels.items()},
    )


def _known(trajectory: StepLatents, step: int) -> Tensor:
    found = trajectory.get(step)
    if found is None:
        raise ValueError(
            f"the trajectory has no latents before step {step}; invert with as many steps as are "
            "sampled, and keep each"
        )
    return found


@dataclass(frozen=True)
class Search:
    """Looks for the embedding of one step after another. told: the condition of the negative prompt
    and of the source's, a row each; ctx: what the calls of every step have in common."""

    backbone: Backbone
    scheduler: Any
    told: Condition
    settings: Sampling
    ctx: StepContext
    most: int

    def __call__(
        self, x: Tensor, wanted: Tensor, embedding: Tensor, *, step: int
    ) -> tuple[Tensor, Tensor]:
        """From x (f, c, h, w) before a step, and what it is to be after it, the embedding (n, d)
        that comes nearest to that, and what it makes of x. embedding: of the step before."""
        steps = self.settings.steps
        ctx = replace(self.ctx, step=step, timestep=self.scheduler.timesteps[step])
        cond = self._predicted(x, SOURCE_COND, None, ctx=ctx)
        free = embedding.clone().requires_grad_()
        adam = torch.optim.Adam([free], lr=learning_rate(step, steps))
        for _ in range(self.most):
            with torch.enable_grad():
                after = self._after(x, cond, free, ctx=ctx)
                loss = (after - wanted).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            if float(loss.detach()) < enough(step, steps):
                break
        best = free.detach()
        return best, self._after(x, cond, best, ctx=ctx)

    def _after(self, x: Tensor, cond: Tensor, embedding: Tensor, *, ctx: StepContext) -> Tensor:
        """x after the sampler's step, guided from an embedding."""
        outputs = {
            SOURCE_UNCOND: self._predicted(x, SOURCE_UNCOND, embedding, ctx=ctx),
            SOURCE_COND: cond,
        }
        rescale = self.backbone.declared.rescale
        output = classifier_free(outputs, self.settings.cfg_scale, rescale, branch=SOURCE)
        objective = Objective.of(self.backbone)
        a, b = step_of(objective, ctx.timestep, *below(self.scheduler, ctx.step))
        return a * x + b * output

    def _predicted(
        self, x: Tensor, group: str, embedding: Tensor | None, *, ctx: StepContext
    ) -> Tensor:
        """The network's output for a group, told an embedding in place of its text."""
        row = 0 if group == SOURCE_UNCOND else 1
        told = self.told.rows(slice(row, row + 1))
        if embedding is not None:
            told = replace(told, tokens=embedding[None])
        ctx = replace(ctx, groups=Rows.of((group,), len(x)))
        condition = told.per_frame(len(x))
        return predict_groups(self.backbone, {SOURCE: x}, condition=condition, ctx=ctx)[group]
