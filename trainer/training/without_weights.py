"""What `fit` would refuse before its first step, and the plan of a run, found without reading a
weight: the recipe's methods are applied to its backbone, all of whose weights are 1. Of a backbone
on the hub its configuration is enough."""

from __future__ import annotations

import torch

from trainer.backbones import weights_here
from trainer.backbones.backbone import Backbone
from trainer.backbones.device import PRECISIONS, Placement, choose_placement, place
from trainer.backbones.pipeline_folder import without_values
from trainer.backbones.retarget import retarget
from trainer.backbones.small_files import cached, layout_of
from trainer.config.header import file_of
from trainer.config.schema import Recipe
from trainer.methods.apply import Plan, apply_methods
from trainer.runs.adapter import check_names, check_start, load_base
from trainer.runs.run_folder import folder_for
from trainer.training.adapt_backbone import adapt, check_new_run, recompute_of
from trainer.training.sharding import check_sharded


def refuse_unfit(recipe: Recipe) -> str | None:
    """Refuses methods that match nothing, that change the same thing, or that the backbone cannot
    have. Returns why that could not be found out; None if it was.

    Raises:
        ValueError: what `fit` would say.
    """
    spec = recipe.backbone
    if spec.hub is not None and cached(spec) is None and layout_of(spec.hub) is None:
        return f"backbone {recipe.backbone_name} is on the hub"
    try:
        with without_values():
            _check(recipe, load_base(spec, recipe.backbone_name, hold=False))
    except RuntimeError as error:  # of a method that cannot start from ones
        return f"a method reads the weights ({error})"
    return None


def _check(recipe: Recipe, backbone: Backbone) -> None:
    """What `fit` does with a backbone before it trains."""
    from trainer.training.build import module_of  # which imports Lightning

    chosen, earlier = recipe.objective.model_dump(), recipe.run.start_from
    if earlier is not None:
        check_start(file_of(earlier), backbone, chosen)
    retarget(backbone, chosen)
    plan = apply_methods(backbone, recipe.methods, recipe.run.seed, frozen=recipe.optim.frozen)
    if earlier is not None:
        plan = plan.started(check_names(file_of(earlier), backbone, plan))
    _check_new(recipe, plan)
    check_sharded(recipe.run, recipe.methods, plan)
    if parts := recipe.run.base_precision:  # which needs layers that do not train
        where = choose_placement(recipe.run.device, recipe.run.precision, parts=parts)
        place(backbone, _on_cpu(where, backbone.published), plan.stored)
    if recipe.run.gradient_checkpointing:
        backbone.enable_gradient_checkpointing(recompute_of(recipe.run))
    module = module_of(recipe, backbone, plan)
    if recipe.optim.name == "muon":  # which needs matrices
        module.configure_optimizers()


def planned(recipe: Recipe, placement: Placement) -> tuple[Backbone, Plan]:
    """The backbone with the recipe's methods, and their plan. No weight is read, unless a method
    asks for it and the weights are on this machine.

    Raises:
        ValueError: what `fit` would say; a method that reads weights which are not here; or a
        backbone of the hub whose configuration is not here either.
    """
    try:
        with without_values():
            backbone = load_base(recipe.backbone, recipe.backbone_name, hold=False)
            return backbone, _new(recipe, backbone, _on_cpu(placement, backbone.published))
    except RuntimeError as error:
        if not weights_here(recipe.backbone):
            raise ValueError(
                f"{_named(error)}: it reads the base's weights, which are not on this machine, so "
                "it cannot be planned before they are downloaded; leave it out for a plan, or "
                "start the run, which fetches them"
            ) from error
    backbone = load_base(recipe.backbone, recipe.backbone_name, placement, hold=False)
    return backbone, _new(recipe, backbone, placement)


def _new(recipe: Recipe, backbone: Backbone, placement: Placement) -> Plan:
    """The plan of a new run."""
    plan = adapt(recipe, backbone, placement)
    _check_new(recipe, plan)
    return plan


def _check_new(recipe: Recipe, plan: Plan) -> None:
    """As `fit` asks a run that has no checkpoint yet."""
    if not any((folder_for(recipe) / "checkpoints").glob("step-*")):
        check_new_run(plan)


def _on_cpu(placement: Placement, published: torch.dtype) -> Placement:
    """The precision of a placement, on the CPU, where a weight that is not read takes no memory."""
    dtype = placement.dtype(published)
    name = next(name for name, own in PRECISIONS.items() if own == dtype)
    return Placement(torch.device("cpu"), name, placement.parts)


def _named(error: RuntimeError) -> str:
    """The method that an error is of, as `apply_methods` notes it."""
    return next(iter(getattr(error, "__notes__", ())), "a method")
