"""The `key=value` options of a verb: one frozen record for each verb, checked by pydantic."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, TypeVar

from pydantic import Field

from trainer.common.section import Section
from trainer.config.overrides import parse_words
from trainer.config.unknown_keys import refuse_unknown
from trainer.config.validate import build_section

Count = Annotated[int, Field(ge=1)]
SeedNumber = Annotated[int, Field(ge=0)]


class Options(Section):
    """The options of one verb. A field without a default is required; its first example is what the
    message about a missing one shows."""


class RecipeOptions(Options):
    """The options of a verb that takes a recipe and its keys too."""


Some = TypeVar("Some", bound=Options)
WithRecipe = TypeVar("WithRecipe", bound=RecipeOptions)


def read_options(words: Sequence[str], options: type[Some]) -> Some:
    """The words of a verb as its record; `key=` and `key=null` are as if the key were not given.

    Raises:
        RecipeError: an unknown or missing key, or a value of the wrong type or out of range.
    """
    given = parse_words(words)
    refuse_unknown(given, options.model_fields, "")
    given = {key: value for key, value in given.items() if value not in (None, "")}
    return build_section(options, given, "")


def split_options(words: Sequence[str], options: type[WithRecipe]) -> tuple[WithRecipe, list[str]]:
    """The options of the verb, and the words that remain for the recipe."""
    own = [word for word in words if word.partition("=")[0] in options.model_fields]
    return read_options(own, options), [word for word in words if word not in own]


def quiet_libraries() -> None:
    """Silences what diffusers, transformers and Lightning print about themselves."""
    import logging
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional kernel
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)  # "GPU: no, TPU: no", and advertisements
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
