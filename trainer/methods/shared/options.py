"""Options that several methods have, and how each is checked."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from trainer.attention.selector import parse_selector


def _parses(text: str) -> str:
    parse_selector(text)
    return text


# names attention sites, as in `cross & up`; the grammar is that of `trainer/attention/selector.py`
SiteSelector = Annotated[str, AfterValidator(_parses)]


def _odd(size: int) -> int:
    if size and size % 2 == 0:
        raise ValueError("a convolution keeps the grid with an odd size, as in 3; 0 is none")
    return size


# of a convolution over a token grid
OddSize = Annotated[int, Field(ge=0), AfterValidator(_odd)]


def check_task(task: int, num_tasks: int) -> None:
    """Raises ValueError where `num_tasks` tasks have none of number `task`."""
    if task >= num_tasks:
        raise ValueError(f"task={task} is beyond num_tasks={num_tasks}; count from 0")
