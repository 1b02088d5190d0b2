"""What a format cannot carry, and which formats can: each is asked about this very adapter."""

from __future__ import annotations

from typing import Any

from trainer.attention.insertion import insertions
from trainer.backbones.retarget import is_retargeted
from trainer.export.cannot_carry import CannotCarryError
from trainer.export.find_format import find_format, format_names
from trainer.export.job import Job
from trainer.export.tokens import known_words

ELSE = "generate with `python -m trainer sample adapter=...`"


def refuse(job: Job, format_name: str) -> None:
    """Refuses an adapter that a format cannot carry.

    Raises:
        ValueError: says what has no place in it, and which formats carry the adapter.
    """
    try:
        _ask(job, format_name)
    except CannotCarryError as error:
        raise ValueError(f"{error}; {proposal(job, but=format_name)}") from None


def proposal(job: Job, but: str) -> str:
    """Which formats carry an adapter, other than the one named, as a clause."""
    able = [name for name in format_names() if name != but and can(job, name)]
    if not able:
        return f"no format carries this adapter; {ELSE}"
    *most, last = (f"format={name}" for name in able)
    return f"{', '.join(most)} and {last} carry it" if most else f"{last} carries it"


def can(job: Job, format_name: str) -> bool:
    """Whether a format carries an adapter."""
    try:
        _ask(job, format_name)
    except CannotCarryError:
        return False
    return True


def _ask(job: Job, format_name: str) -> None:
    _refuse_target(job.adapted, format_name)
    refuse_inserted(job.adapted, format_name)
    _refuse_known_words(job.adapted, format_name)
    find_format(format_name).refuse(job)


def _refuse_target(adapted: Any, format_name: str) -> None:
    """Refuses a network that predicts something else than its base: the tools that read an adapter
    sample as the base wants it. A whole pipeline brings its scheduler along, but no path."""
    if not is_retargeted(adapted):
        return
    target, flow = adapted.published_target
    same_path = flow == (adapted.alphas_cumprod is None)
    if not (same_path and format_name == "merged"):
        raise CannotCarryError(
            f"format={format_name} cannot carry this adapter: it was trained with "
            f"objective.target={adapted.target}, its base predicts {target}, and a tool would "
            "sample it as the base"
        )


def _refuse_known_words(adapted: Any, format_name: str) -> None:
    """Refuses words of the vocabulary whose embeddings were trained, if the format has no place for
    them."""
    words = known_words(adapted)
    if words and not find_format(format_name).carries_known_words:
        raise CannotCarryError(
            f"format={format_name} cannot carry {words[0]!r}, a word of the vocabulary whose "
            f"embedding was trained, {len(words)} in all"
        )


def refuse_inserted(adapted: Any, format_name: str) -> None:
    """Refuses a model with temporal layers if the format has no place for them.

    Raises:
        CannotCarryError: names the layers.
    """
    blocks = [type(found.block).__name__ for found in insertions(adapted.denoiser)]
    if blocks and not find_format(format_name).carries(adapted):
        raise CannotCarryError(
            f"format={format_name} cannot carry the {len(blocks)} temporal layers ({blocks[0]})"
        )
