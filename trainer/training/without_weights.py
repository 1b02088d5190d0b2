"""What `fit` would refuse before its first step, found without reading a weight: the recipe's
methods are applied to its backbone, all of whose weights are 1."""

from __future__ import annotations

from trainer.backbones.backbone import Backbone
from trainer.backbones.pipeline_folder import without_values
from trainer.backbones.retarget import retarget
from trainer.config.header import file_of
from trainer.config.schema import Recipe
from trainer.methods.apply import apply_methods
from trainer.runs.adapter import check_names, check_start, load_base
from trainer.training.build import module_of


def refuse_unfit(recipe: Recipe) -> str | None:
    """Refuses methods that match nothing, that change the same thing, or that the backbone cannot
    have. Returns why that could not be found out; None if it was.

    Raises:
        ValueError: what `fit` would say.
    """
    if recipe.backbone.hub is not None:
        return f"backbone {recipe.backbone_name} is on the hub"
    with without_values():
        backbone = load_base(recipe.backbone, recipe.backbone_name, hold=False)
    try:
        _check(recipe, backbone)
    except RuntimeError as error:  # of a method that cannot start from ones
        return f"a method reads the weights ({error})"
    return None


def _check(recipe: Recipe, backbone: Backbone) -> None:
    """What `fit` does with a backbone before it trains."""
    chosen, earlier = recipe.objective.model_dump(), recipe.run.start_from
    if earlier is not None:
        check_start(file_of(earlier), backbone, chosen)
    retarget(backbone, chosen)
    plan = apply_methods(backbone, recipe.methods, recipe.run.seed, frozen=recipe.optim.frozen)
    if earlier is not None:
        check_names(file_of(earlier), backbone, plan)
    if recipe.run.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    module = module_of(recipe, backbone, plan)
    if recipe.optim.name == "muon":  # which needs matrices
        module.configure_optimizers()
