"""A recipe's methods on its backbone, set up for training. A file of its own, since a plan needs it
and nothing else of a run: importing it does not import Lightning."""

from __future__ import annotations

import torch

from trainer.backbones.backbone import Backbone
from trainer.backbones.device import Placement, place
from trainer.backbones.gradient_checkpointing import Recompute
from trainer.backbones.retarget import retarget
from trainer.config.header import file_of
from trainer.config.run_section import RunSpec
from trainer.config.schema import Recipe
from trainer.methods.apply import Plan, apply_methods
from trainer.runs.adapter import check_start, start_from
from trainer.training.device_defaults import compiles, stores_channels_last
from trainer.training.sharding import check_sharded


def adapt(recipe: Recipe, backbone: Backbone, placement: Placement) -> Plan:
    """Applies the recipe's target and methods to the base, takes over an earlier run's tensors, and
    sets up the model for training."""
    run = recipe.run
    if run.start_from is not None:
        check_start(file_of(run.start_from), backbone, recipe.objective.model_dump())
    retarget(backbone, recipe.objective.model_dump())
    plan = apply_methods(backbone, recipe.methods, run.seed, frozen=recipe.optim.frozen)
    if run.start_from is not None:
        plan = start_from(file_of(run.start_from), backbone, plan)
    dtype = placement.dtype(backbone.published)
    check_sharded(run, recipe.methods, plan, dtype=dtype)
    place(backbone, placement, plan.stored)
    if run.gradient_checkpointing:
        backbone.enable_gradient_checkpointing(recompute_of(run))
    if stores_channels_last(recipe, backbone, placement.device):
        backbone.denoiser.to(memory_format=torch.channels_last)
    if compiles(recipe, placement.device):
        backbone.compile_blocks(required=run.compile != "auto")
    return plan


def recompute_of(run: RunSpec) -> Recompute:
    """What a run with gradient checkpointing calculates again."""
    return Recompute(
        run.recompute_every,
        feed_forward=run.gradient_checkpointing == "feed_forward",
        offload=run.offload_activations,
    )


def check_new_run(plan: Plan) -> None:
    """Raises ValueError where methods cannot start a new run so; one that is resumed is not
    asked."""
    for edit in plan.edits.values():
        if edit.check_new_run is not None:
            edit.check_new_run()
