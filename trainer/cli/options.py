"""The `key=value` options of a verb: one frozen record for each verb, checked by pydantic."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import Field

from trainer.common.section import Section, keys_of
from trainer.config.overrides import parse_words
from trainer.config.unknown_keys import refuse_unknown
from trainer.config.value_errors import build_section

# the loggers by which Lightning says what it does
TALKERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.distributed",
)
# how the warnings of Lightning begin that no user of ours can mend
CHATTER = (
    r"`isinstance\(treespec, LeafSpec\)`",
    r"The number of training batches .* is smaller than the logging interval",
    r"Found \d+ module\(s\) in eval mode",
    r"The '\w+' does not have many workers",
    r"The `srun` command is available",
    r"(GPU|MPS) available but not used",
    r"Trying to infer the `batch_size`",
    r"It is recommended to use `self\.log",
    r"(Experiment logs|Checkpoint) directory .* exists",
    r"Consider setting `persistent_workers",
    r"Your `IterableDataset` has `__len__` defined",
    r"`max_epochs` was not set",
    r"You (defined|passed in) a `val",
    r"You are using a custom batch sampler",
    r"Using `DistributedSampler`",
)

Count = Annotated[int, Field(ge=1)]
Frames = Annotated[int, Field(ge=0)]
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
    return build_options(given_by(words, options), options)


def given_by(words: Sequence[str], options: type[Options]) -> dict[str, Any]:
    """The values of the words that a verb knows, before they are checked.

    Raises:
        RecipeError: an unknown key.
    """
    given = parse_words(words)
    refuse_unknown(given, keys_of(options), "")
    return given


def build_options(given: Mapping[str, Any], options: type[Some]) -> Some:
    """The record of a verb; raises as `read_options` does."""
    kept = {key: value for key, value in given.items() if value not in (None, "")}
    return build_section(options, kept, "")


def split_options(words: Sequence[str], options: type[WithRecipe]) -> tuple[WithRecipe, list[str]]:
    """The options of the verb, and the words that remain for the recipe."""
    own = [word for word in words if word.partition("=")[0] in keys_of(options)]
    return read_options(own, options), [word for word in words if word not in own]


def quiet_libraries() -> None:
    """Silences what libraries print about themselves, and their hints to programmers; their errors
    and all other warnings stay. Where a user asks for warnings (`python -W`, PYTHONWARNINGS) or
    sets a library's own variable, that holds."""
    import logging
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:
        for message in CHATTER:
            warnings.filterwarnings("ignore", message=message, module=r"lightning\.")
        # of times beyond the last noise level by a rounding, which it cuts back itself
        warnings.filterwarnings("ignore", message="Should have t[ab]", module=r"torchsde\.")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional kernel
    for name in TALKERS:
        logging.getLogger(name).setLevel(logging.WARNING)  # "GPU: no, TPU: no", and advertisements
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
