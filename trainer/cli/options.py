"""The `key=value` options of a verb, checked, and the quiet start of the libraries below."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from trainer.config import tree as tree_
from trainer.config.overrides import parse_words
from trainer.config.schema import RecipeError

if TYPE_CHECKING:
    pass


def read_options(words: list[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """A verb's words over its defaults, checked; `key=null` is as if it were not given."""
    given = parse_words(words)
    tree_.refuse_unknown(given, defaults, "")
    given = {key: value for key, value in given.items() if value is not None}
    for key, value in given.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        least = 0 if key in ("seed", "step") else 1
        if isinstance(defaults[key], int) or key in ("steps", "rank", "frames"):
            if not whole or value < least:
                raise RecipeError(f"{key}={value!r}: a whole number is needed, at least {least}")
        elif key in ("guidance", "fps"):
            if not (whole or isinstance(value, float)):
                raise RecipeError(f"{key}={value!r}: a number is needed")
        elif not isinstance(value, str):
            raise RecipeError(f"{key}={value!r}: text is needed; quote it, as in {key}=\"'12'\"")
    return {**defaults, **given}


def quiet_libraries() -> None:
    """The libraries below talk about themselves; the run has its own lines."""
    import logging
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of an optional kernel, at import
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)  # GPU: no, TPU: no, and advertisements
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
