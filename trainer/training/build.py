"""From a recipe to the objects a run needs: placement, data, objective, optimiser, module."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader

from trainer.attention.input_channels import inputs_read
from trainer.backbones.backbone import Backbone
from trainer.backbones.device import Placement, choose_placement, pictures_at_once
from trainer.backbones.folder_facts import check_side
from trainer.backbones.layer_casting import casting
from trainer.backbones.resting import SAME_MEMORY
from trainer.backbones.schedulers import sampled_as
from trainer.common.paths import cache_folder
from trainer.config.backbone_limits import check_trainable, check_weighting
from trainer.config.run_section import RunSpec
from trainer.config.schema import Recipe
from trainer.data import latent_cache
from trainer.data.buckets import Bucketed
from trainer.data.crops import CROP
from trainer.data.latent_store import LatentStore
from trainer.data.loader import Fixed, Planned, RankShare, Tried
from trainer.data.plan import StepPlan
from trainer.data.source import Dataset, Generation, HasContents, Needs, Ordered, Repeated
from trainer.diffusion.made_of import made_of
from trainer.diffusion.objective import Objective
from trainer.diffusion.sampler import evaluating, sample_many
from trainer.diffusion.sampling_settings import Sampling
from trainer.media.images import to_pil
from trainer.media.made_by import with_facts
from trainer.methods.apply import Plan
from trainer.training.adapt_backbone import adapt as adapt
from trainer.training.adapt_backbone import check_new_run
from trainer.training.module import DiffusionModule
from trainer.training.optim import Optim
from trainer.training.sharding import shard
from trainer.training.tasks.denoise import Denoise
from trainer.training.text_encodings import text_encodings

CLASS_IMAGES = 32  # generated at once, at most
PREPARING = 16  # batches that a start which depends on the data may see


def seed_everything(seed: int) -> None:
    """Seeds what draws from a global state: parts made from scratch, dropout of methods."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def placement_of(run: RunSpec) -> Placement:
    """Where a run's model goes: on the GPU that has this process's number on its machine, of
    several.

    Raises:
        ValueError: there is no such device, or one where several are wanted.
    """
    own = SLURMEnvironment().local_rank() if SLURMEnvironment.detect() else None
    rank = int(os.environ.get("LOCAL_RANK", 0)) if own is None else own
    placement = choose_placement(run.device, run.precision, rank, parts=run.base_precision)
    if run.offload_activations and placement.device.type in SAME_MEMORY:
        raise ValueError(
            "run.offload_activations=true: activations on this device are in main memory already; "
            "leave it out"
        )
    if placement.device.type == "mps" and run.devices * run.nodes > 1:
        raise ValueError(
            f"run.devices={run.devices}, run.nodes={run.nodes}: a Mac has one GPU, and PyTorch has "
            "no way for several Macs to train together; give run.devices=1 and run.nodes=1"
        )
    return placement


def prepare_methods(plan: Plan, look: Callable[[], None]) -> None:
    """The start of a new run, as far as it depends on the data; look: see `looker`."""
    check_new_run(plan)
    for edit in plan.edits.values():
        if edit.prepare is not None:
            edit.prepare(look)


def finish_methods(plan: Plan, look: Callable[[], None]) -> None:
    """What methods keep about the data after the last step; look: see `looker`."""
    for edit in plan.edits.values():
        if edit.finish is not None:
            edit.finish(look)


def module_of(
    recipe: Recipe, backbone: Backbone, plan: Plan, store: LatentStore | None = None
) -> DiffusionModule:
    """What trains: the backbone as its methods have left it, its task and the optimiser. store:
    where the latents of its batches are kept."""
    edits = plan.edits.values()
    module = DiffusionModule(
        backbone,
        task_of(recipe, backbone, store),
        optim(recipe),
        trained=plan.names,
        kept=plan.keeps,
        lrs=lrs(recipe, plan),
        extra_losses=[edit.loss for edit in edits if edit.loss is not None],
        schedules=[edit.schedule for edit in edits if edit.schedule is not None],
        at_steps=[edit.at_step for edit in edits if edit.at_step is not None],
        seed=recipe.run.seed,
    )
    if recipe.run.shards:
        module.shard = lambda: shard(backbone, recipe.run, trained=module.trainable())
    return module


def task_of(recipe: Recipe, backbone: Backbone, store: LatentStore | None = None) -> Denoise:
    """What a batch of this recipe is asked for; store: as of `module_of`."""
    return Denoise(
        backbone,
        objective(recipe, backbone),
        seed=recipe.run.seed,
        caption_dropout=recipe.objective.caption_dropout,
        as_sampled=recipe.objective.shift == "sampling",
        texts=text_encodings(backbone, cache_folder() if recipe.run.cache_text else None),
        store=store,
    )


def looker(module: DiffusionModule, batches: Planned) -> Callable[[], None]:
    """A function that runs the first training batches forward, for methods that read what their
    layers see; every rank runs the whole of every batch."""

    @torch.no_grad()
    def look() -> None:
        with evaluating(module):
            for step in range(PREPARING):
                batch = batches[step].to(module.backbone.device)
                module.task.loss(module.task.encode(batch, "prepare"))

    return look


def needs(recipe: Recipe, backbone: Backbone) -> Needs:
    """What the data may ask of the run.

    Raises:
        ValueError: sides of pictures, or frames of clips, that the backbone does not take.
    """
    check_trainable(backbone.distilled)
    side = recipe.run.resolution or backbone.resolution
    check_side("run.resolution", side, backbone.multiple)
    check_side("data.buckets", getattr(recipe.data, "buckets", 0), backbone.multiple)
    backbone.clip_frames.check(getattr(recipe.data, "frames", 1), "data.frames")

    def generate(prompts: Sequence[str], seed: int, how: Generation) -> list[Image]:
        seeds = [seed + i for i in range(len(prompts))]
        settings = Sampling(how.steps, how.guidance, size=recipe.run.size, sampler=how.sampler)
        parts = (backbone.denoiser, *backbone.text_encoders.values())
        with casting(parts, backbone.computes_in):  # layers are held only after methods are applied
            pictures = sample_many(backbone, prompts, seeds, settings=settings)
        return [
            with_facts(
                to_pil(picture),
                made_of(backbone, settings, prompt=prompt, seed=own, recipe=recipe.name),
            )
            for picture, prompt, own in zip(pictures, prompts, seeds, strict=True)
        ]

    return Needs(
        resolution=side,
        divisor=backbone.divisor,
        generate=generate,
        cache=cache_folder(),
        generator=backbone.fingerprint,
        sampled=sampled_as(backbone),
        at_once=pictures_at_once(CLASS_IMAGES, side * side),
        batch=recipe.run.batch_size,
        seed=recipe.run.seed,
        encoder=lambda: encoder_of(recipe, backbone),
    )


def step_plan(recipe: Recipe, data: Dataset) -> StepPlan:
    groups = tuple((group.start, group.stop) for group in data.groups)
    shares, weights, frames = tuple(data.shares), tuple(data.weights), tuple(data.frames)
    sizes = tuple(data.sizes) if isinstance(data, Bucketed) else ()
    repeats = tuple(data.repeats) if isinstance(data, Repeated) else ()
    return StepPlan(
        groups,
        shares,
        weights,
        batch_size=recipe.run.batch_size,
        seed=recipe.run.seed,
        frames=frames,
        sizes=sizes,
        repeats=repeats if any(times != 1 for times in repeats) else (),
        in_order=isinstance(data, Ordered),
    )


def inputs_of(backbone: Backbone) -> tuple[str, ...]:
    """The inputs of a batch, beside pictures and captions, that a backbone or its methods read:
    which part of its picture a sample shows, and what further input channels are made of."""
    crop = (CROP,) if CROP in backbone.encoders else ()
    return (*crop, *inputs_read(backbone))


def checks(
    recipe: Recipe, backbone: Backbone, held_out: Dataset | None, *, rank: int, world_size: int
) -> Any:
    """This rank's batches of the validation loss, or None."""
    if held_out is None or not recipe.run.validate_every:
        return None
    fixed = Fixed(held_out, 16, latents(recipe, backbone, held_out), reads=inputs_of(backbone))
    return DataLoader(RankShare(Tried(fixed), rank, world_size), batch_size=None)


def objective(recipe: Recipe, backbone: Backbone) -> Objective:
    """The recipe's objective, on the path and for the target of a backbone that `retarget` has
    seen."""
    chosen = recipe.objective
    check_weighting(recipe, backbone.alphas_cumprod is None)
    return Objective(
        backbone.target,
        backbone.alphas_cumprod,
        timesteps=chosen.timesteps,
        logit_mean=chosen.logit_mean,
        logit_std=chosen.logit_std,
        weighting=chosen.weighting,
        min_snr_gamma=chosen.min_snr_gamma,
        offset_noise=chosen.offset_noise,
        shift=chosen.shift if isinstance(chosen.shift, float) else 1.0,
    )


def optim(recipe: Recipe) -> Optim:
    chosen, run = recipe.optim, recipe.run
    factor = run.batch_size * run.accumulate if chosen.scale_lr else 1
    return Optim(
        chosen.lr * factor,
        run.steps,
        betas=chosen.betas,
        eps=chosen.eps,
        weight_decay=chosen.weight_decay,
        warmup=chosen.warmup,
        schedule=chosen.schedule,
        final_lr=chosen.final_lr,
        name=chosen.name,
        muon_lr=None if chosen.muon_lr is None else chosen.muon_lr * factor,
    )


def lrs(recipe: Recipe, plan: Plan) -> dict[str, float]:
    """Parameters whose method has an lr of its own, by name."""
    factor = optim(recipe).lr / recipe.optim.lr  # what scale_lr makes of every lr
    return {
        name: lr * factor
        for method, lr in recipe.optim.lrs.items()
        for name in plan.edits[method].trains
    }


def encoder_of(recipe: Recipe, backbone: Backbone) -> str:
    """What latents depend on beside their pictures: the VAE, and the side of a picture."""
    return f"{backbone.vae_fingerprint()}-{recipe.run.resolution or backbone.resolution}"


def latent_store(recipe: Recipe, backbone: Backbone, data: Dataset) -> LatentStore | None:
    """Where latents are kept by content, of data that is not read as a whole before it trains."""
    if not (recipe.run.cache_latents and isinstance(data, HasContents) and not data.fixed):
        return None
    return LatentStore(cache_folder(), encoder_of(recipe, backbone))


def latents(recipe: Recipe, backbone: Backbone, data: Dataset) -> latent_cache.Latents | None:
    """Cached VAE posteriors where the images never change and the recipe wants them."""
    if not (recipe.run.cache_latents and data.fixed):
        return None
    if data.sample(0, np.random.default_rng(0)).inputs:  # a cache of latents has no place for them
        return None
    in_time = backbone.clip_frames.in_time

    def encode(pixels: Tensor) -> Tensor:  # one clip at a time where the VAE compresses time
        return backbone.moments(pixels.to(backbone.device), len(pixels) if in_time else 1)

    return latent_cache.moments(
        data,
        encode,
        encoder_of(recipe, backbone),
        folder=cache_folder(),
        shrinks=backbone.clip_frames.per_latent,
    )
