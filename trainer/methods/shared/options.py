"""Options that several methods have, and how each is checked."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from trainer.attention.selector import parse_selector
from trainer.common.field_words import Called


def _parses(text: str) -> str:
    parse_selector(text)
    return text


# names attention sites; the grammar is that of `trainer/attention/selector.py`
SiteSelector = Annotated[str, AfterValidator(_parses), Called("site selector")]
SELECTOR = (
    "a selector is made of self, cross, joint, temporal, all; down, mid, up, block; /2 for a "
    "grid; depth>=0.5 for the later layers; and name:<glob>, joined by &, | and !, as in cross & up"
)


def _odd(size: int) -> int:
    if size and size % 2 == 0:
        raise ValueError("a convolution keeps the grid with an odd size, as in 3; 0 is none")
    return size


# of a convolution over a token grid
OddSize = Annotated[int, Field(ge=0), AfterValidator(_odd), Called("odd whole number")]
TaskNumber = Annotated[
    int,
    Field(
        ge=0,
        description="number of the task or concept that trains, counted from 0; earlier ones stay "
        "as they are. A continual recipe sets it",
    ),
]
NumTasks = Annotated[int, Field(gt=0, description="tasks in all; a continual recipe sets it")]


def check_task(task: int, num_tasks: int) -> None:
    """Raises ValueError where `num_tasks` tasks have none of number `task`."""
    if task >= num_tasks:
        raise ValueError(f"task={task} is beyond num_tasks={num_tasks}; count from 0")
