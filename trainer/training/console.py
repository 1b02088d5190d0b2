"""Lines for the user, from the first rank alone."""

from __future__ import annotations

from lightning.fabric.utilities.rank_zero import rank_zero_only
from rich.console import Console

console = Console(stderr=True)
LONG = 200  # letters of an error in a line


def first_rank() -> bool:
    """Known from the environment, before there is a trainer."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def say(text: str, style: str | None = None) -> None:
    """A line for the user, from the first rank."""
    if first_rank():
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def problem_of(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:LONG] if text else type(error).__name__
