"""`calibrate`: finds what a method is to do while sampling, and writes it to a small file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from trainer.cli.options import Count, RecipeOptions, quiet_libraries, split_options
from trainer.common.atomic import beside
from trainer.config.load import load_recipe
from trainer.config.run_section import DEVICES, Device
from trainer.config.schema import Recipe, RecipeError

if TYPE_CHECKING:
    from trainer.methods.method import Method


class CalibrateOptions(RecipeOptions):
    """Samples a few pictures with the backbone of a recipe and writes what its method has found to
    a small file. Other methods of the recipe take no part: for those of a run, give it as
    backbone=. Every key of the recipe can be given as well: preview.prompts, preview.steps and
    preview.guidance say what is sampled, and how."""

    out: Path = Field(
        description="the file to write; it must not exist yet", examples=["plan.json"]
    )
    pictures: Count = Field(4, description="of the recipe's preview.prompts, sampled at once")
    device: Device = Field("auto", description=f"where pictures are sampled: {DEVICES}")


def run(words: list[str]) -> int:
    options, rest = split_options(words, CalibrateOptions)
    recipe, out = load_recipe(rest), options.out.expanduser()
    name, method = _calibrated(recipe)
    _check_place(out)
    prompts = [prompt for prompt in recipe.preview.prompts if "{" not in prompt]
    if not prompts:
        raise RecipeError(
            "preview.prompts has no prompt without {token} or {class}, and pictures are sampled of "
            "them; give some, as in preview.prompts='[a fox on a blue background]'"
        )
    quiet_libraries()
    print(_found(recipe, {name: method}, prompts[: options.pictures], options=options))
    return 0


def _check_place(out: Path) -> None:
    """Raises RecipeError where no new file can be written there."""
    if not out.parent.is_dir():
        raise RecipeError(f"out={out}: there is no folder {out.parent}; make it first")
    part = beside(out)
    try:
        if out.exists():
            raise RecipeError(f"out={out} exists already; name another file, or remove it")
        part.touch()
        part.unlink()
    except OSError as error:
        raise RecipeError(
            f"out={out}: it cannot be written ({error.strerror}); name another file"
        ) from error


def _calibrated(recipe: Recipe) -> tuple[str, Method]:
    """The one method of a recipe that can be calibrated, without what was found before."""
    found = {name: method for name, method in recipe.methods.items() if method.calibrates}
    if len(found) != 1:
        raise RecipeError(
            f"calibrate needs a recipe with one method that is calibrated, and this one has "
            f"{len(found) or 'none'}; give one, as in recipe=ditfastattn"
        )
    name, method = next(iter(found.items()))
    return name, method.model_copy(update={"plan": None})


def _found(
    recipe: Recipe, chosen: dict[str, Method], prompts: list[str], *, options: CalibrateOptions
) -> str:
    """Samples once with the method's search, which then writes what it found."""
    from trainer.backbones.device import choose_placement
    from trainer.cli.given_adapter import load_bare
    from trainer.diffusion.sampler import sample
    from trainer.diffusion.sampling_settings import Sampling
    from trainer.methods.apply import apply_methods

    placement = choose_placement(options.device, "auto", lean=True)
    backbone = load_bare(recipe.backbone_name, {}, placement)
    (edit,) = apply_methods(backbone, chosen, trains=False).edits.values()
    assert edit.calibration is not None
    backbone.sampling_hooks["calibrate"] = (edit.calibration.hook,)
    settings = Sampling(recipe.preview.steps, recipe.preview.guidance)
    sample(backbone, prompts, range(len(prompts)), settings=settings)
    return edit.calibration.result(options.out.expanduser())
