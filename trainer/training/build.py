"""From a recipe to the objects a run needs: data, objective, optimiser, module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch.utils.data import DataLoader

from trainer.backbones.backbone import Backbone
from trainer.common.paths import cache_folder
from trainer.config.schema import Recipe
from trainer.data import cache
from trainer.data.buckets import Bucketed
from trainer.data.loader import Fixed, Planned
from trainer.data.plan import StepPlan
from trainer.data.source import Dataset, Needs
from trainer.diffusion.objective import Objective
from trainer.diffusion.sampler import evaluating, sample_many
from trainer.media.images import to_pil
from trainer.methods import apply
from trainer.training.console import console
from trainer.training.module import QUANTILES, DiffusionModule
from trainer.training.optim import Optim

PREPARING = 16  # batches that a start which depends on the data may see


def module_of(recipe: Recipe, backbone: Backbone, plan: apply.Plan) -> DiffusionModule:
    """What trains: the backbone as its methods have left it, the objective and the optimiser."""
    return DiffusionModule(
        backbone,
        objective(recipe, backbone),
        optim(recipe),
        plan.names,
        recipe.run.seed,
        recipe.objective.caption_dropout,
        [edit.loss for edit in plan.edits.values() if edit.loss is not None],
        plan.keeps,
        lrs(recipe, plan),
        [edit.schedule for edit in plan.edits.values() if edit.schedule is not None],
    )


def looker(module: DiffusionModule, batches: Planned) -> Callable[[], None]:
    """What methods that look at the data call: the first batches, all of every batch on every
    rank."""

    @torch.no_grad()
    def look() -> None:
        with evaluating(module):
            for step in range(PREPARING):
                module.sample_losses(batches[step], "prepare", 0.0)

    return look


def needs(recipe: Recipe, backbone: Backbone) -> Needs:
    """What the data may ask of the run; class images are painted with the recipe's preview
    sampler."""

    def paint(prompts: Sequence[str], seed: int, guidance: float | None) -> list[Image]:
        console.print(f"painting {len(prompts)} class images", highlight=False)
        seeds = [seed + i for i in range(len(prompts))]
        guidance = look.guidance if guidance is None else guidance
        size = None if recipe.run.resolution is None else (side, side)
        pictures = sample_many(backbone, prompts, seeds, 32, look.steps, guidance, size=size)
        return [to_pil(picture) for picture in pictures]

    def painter() -> str:
        return f"{backbone.fingerprint()}, {look.steps} steps, guidance {look.guidance}"

    look, side = recipe.preview, recipe.run.resolution or backbone.resolution
    return Needs(side, backbone.divisor, paint, cache_folder(), painter)


def step_plan(recipe: Recipe, data: Dataset) -> StepPlan:
    groups = tuple((group.start, group.stop) for group in data.groups)
    shares, weights, frames = tuple(data.shares), tuple(data.weights), tuple(data.frames)
    sizes = tuple(data.sizes) if isinstance(data, Bucketed) else ()
    return StepPlan(groups, shares, weights, recipe.run.batch_size, recipe.run.seed, frames, sizes)


def checks(recipe: Recipe, backbone: Backbone, held_out: Dataset | None) -> Any:
    """The batches of the validation loss, or None."""
    if held_out is None or not recipe.run.validate_every:
        return None
    fixed = Fixed(held_out, 16, QUANTILES, latents(recipe, backbone, held_out))
    return DataLoader(fixed, batch_size=None)


def objective(recipe: Recipe, backbone: Backbone) -> Objective:
    """The recipe's objective on the backbone's path; target and path default to what it was trained
    with."""
    chosen = recipe.objective
    alphas = None if chosen.path == "flow" else backbone.alphas_cumprod
    if chosen.path == "vp" and alphas is None:
        raise ValueError(
            f"objective.path=vp: {backbone.name} was trained on the flow path and says nothing of "
            "another; leave objective.path out"
        )
    target = chosen.target or ("flow" if chosen.path == "flow" else backbone.target)
    return Objective(
        target, alphas, chosen.timesteps, chosen.logit_mean, chosen.logit_std, chosen.weighting,
        chosen.min_snr_gamma, chosen.offset_noise,
    )  # fmt: skip


def optim(recipe: Recipe) -> Optim:
    chosen, run = recipe.optim, recipe.run
    factor = run.batch_size * run.accumulate if chosen.scale_lr else 1
    return Optim(
        chosen.lr * factor,
        run.steps,
        chosen.betas,
        chosen.eps,
        chosen.weight_decay,
        chosen.warmup,
        chosen.schedule,
        chosen.final_lr,
        chosen.name,
        None if chosen.muon_lr is None else chosen.muon_lr * factor,
    )


def lrs(recipe: Recipe, plan: apply.Plan) -> dict[str, float]:
    """Parameters whose method has an lr of its own, by name."""
    factor = optim(recipe).lr / recipe.optim.lr  # what scale_lr makes of every lr
    return {
        name: lr * factor
        for method, lr in recipe.optim.lrs.items()
        for name in plan.edits[method].trains
    }


def latents(recipe: Recipe, backbone: Backbone, data: Dataset) -> np.ndarray | None:
    """Cached VAE posteriors where the images never change and the recipe wants them."""
    if not (recipe.run.cache_latents and data.fixed):
        return None
    side = recipe.run.resolution or backbone.resolution
    return cache.moments(
        data, backbone.moments, f"{backbone.vae_fingerprint()}-{side}", cache_folder()
    )
