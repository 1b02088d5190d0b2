"""Opens the data of a recipe as `fit` does, for `check`: so that too few samples for what is held
out, damaged files and captions without the word they train are found before a run. Nothing is
written beside the data. Importing this imports no torch."""

from __future__ import annotations

from trainer.backbones.folder_facts import FolderFacts, facts_of
from trainer.backbones.prompt_tokens import prompt_reader
from trainer.common.paths import cache_folder
from trainer.config.load import task_recipe
from trainer.config.schema import Recipe, RecipeError
from trainer.data.found import found_when_opened
from trainer.data.source import Needs, NoAnswerError
from trainer.training.caption_check import check_captions

MOST = 2**27  # bytes of files that are decoded; of photos about five seconds, of films a minute


def check_by_opening(recipe: Recipe) -> list[str]:
    """What is to be said of the data of a recipe, or of each of its `continual.concepts`.

    Class images are not generated. Files of more than `MOST` bytes are counted and not decoded,
    which is said. Of a backbone that is not on this machine no size is known, and nothing is
    opened.

    Raises:
        ValueError: what `fit` would say.
    """
    facts = facts_of(recipe.backbone)
    if facts is None or not (recipe.run.resolution or facts.side):
        return []
    tasks = [task_recipe(recipe, n) for n in range(len(recipe.continual.concepts))]
    said = [line for each in tasks or [recipe] for line in _check(each, facts)]
    return list(dict.fromkeys(said))


def _check(recipe: Recipe, facts: FolderFacts) -> list[str]:
    data = recipe.data.without_generated()
    if (size := data.stored()) > MOST:
        if data.epoch() == 0:
            raise RecipeError(
                "data.validation holds out every sample, and none is left to train on; give fewer"
            )
        return [
            f"data: {size / 1e6:.0f} MB of files are counted here and not decoded, which fit does "
            "before its first step"
        ]
    try:
        train, _ = data.open(_needs(recipe, facts))
    except NoAnswerError as error:
        return [f"data: its server gives no answer now, so the data is not checked ({error})"]
    said = [*found_when_opened(data, train), *(f"skipped {each}" for each in train.skipped)]
    added = [word for method in recipe.methods.values() for word in method.words]
    reader = prompt_reader(recipe.backbone, added, library=True)
    return said if reader is None else [*said, *check_captions(recipe, lambda: reader, train)]


def _needs(recipe: Recipe, facts: FolderFacts) -> Needs:
    side = recipe.run.resolution or facts.side
    assert side is not None, "asked before"

    def generate(*_: object) -> list[object]:
        raise AssertionError("data without generated samples generate none")

    return Needs(
        resolution=side,
        divisor=facts.divisor,
        generate=generate,  # type: ignore[arg-type]
        cache=cache_folder(),
        generator=lambda: "",
        keeps=False,
    )
