"""What a recipe asks of its backbone and the files of the backbone say it cannot do."""

from __future__ import annotations

from trainer.backbones.families import find_family
from trainer.backbones.folder_facts import check_side, facts_of
from trainer.backbones.prompt_tokens import check_max_tokens
from trainer.backbones.solvers import check_solver
from trainer.config.schema import Recipe, RecipeError
from trainer.data.buckets import check_divides

FLOW_WEIGHTINGS = ("sigma_sqrt", "cosmap")


def check_limits(recipe: Recipe) -> None:
    """Checks sides of pictures, frames of clips, the samplers of class images and previews, the
    weighting of timesteps, the tokens of prompts, that a batch holds all groups of the data, and
    that the backbone is not a distilled one. Of a backbone that is not on this machine, `fit`
    checks them.

    Raises:
        RecipeError: the backbone cannot do one of them.
    """
    check_batch(recipe)
    check_maps(recipe)
    facts = facts_of(recipe.backbone)
    if facts is None:
        return
    try:
        if recipe.run.resolution is not None:
            check_side("run.resolution", recipe.run.resolution, facts.multiple)
        if buckets := getattr(recipe.data, "buckets", 0):
            check_side("data.buckets", buckets, facts.multiple)
            if (side := recipe.run.resolution or facts.side) is not None:
                check_divides(buckets, side)
        facts.frames.check(getattr(recipe.data, "frames", 1), "data.frames")
        if sampler := getattr(recipe.data, "prior_sampler", None):
            check_solver(sampler, facts.flow)
        if solver := recipe.preview.scheduler:
            check_solver(solver, facts.flow, key="preview.scheduler")
        check_max_tokens(recipe.backbone)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    check_weighting(recipe, facts.flow)
    check_trainable(facts.distilled)


def check_maps(recipe: Recipe) -> None:
    """Raises RecipeError for maps of attention beside clips whose frames are tokens."""
    clips = getattr(recipe.data, "frames", 1) > 1 and bool(recipe.preview.every)
    layout = find_family(recipe.backbone.family).traits.layout
    if recipe.preview.maps and clips and layout == "tokens":
        raise RecipeError(
            f"preview.maps={recipe.preview.maps}: attention maps are of pictures, and this "
            "backbone has the frames of a clip in one sequence; give preview.maps=null"
        )


def check_trainable(distilled: str | None) -> None:
    """Raises RecipeError where plain training would spoil the backbone, for this reason."""
    if distilled is not None:
        raise RecipeError(f"backbone: {distilled}")


def check_batch(recipe: Recipe) -> None:
    """Raises RecipeError where a batch is too small for a sample of each group of the data."""
    most, groups = recipe.run.batch_size, recipe.data.groups
    if most < groups:
        raise RecipeError(
            f"run.batch_size={most} is too small for {groups} groups of data, as photos and class "
            f"images, which are all in every batch; give at least {groups}"
            + (", or data.prior_weight=0" if getattr(recipe.data, "has_prior", False) else "")
        )


def check_weighting(recipe: Recipe, flow: bool) -> None:
    """Raises RecipeError for a weighting or a shift of the flow path on another. flow: the path
    that the backbone was trained on."""
    chosen = recipe.objective
    on_flow = flow if chosen.path is None else chosen.path == "flow"
    if chosen.weighting in FLOW_WEIGHTINGS and not on_flow:
        raise RecipeError(
            f"objective.weighting={chosen.weighting} is for objective.path=flow, and this run adds "
            "noise on a variance-preserving path; min_snr is a weighting for it"
        )
    if chosen.shift != 1 and not on_flow:
        raise RecipeError(
            f"objective.shift={chosen.shift} is for objective.path=flow, and this run adds noise "
            "on a variance-preserving path; leave it out"
        )
