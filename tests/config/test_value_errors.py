"""What a message calls the place of a wrong value: keys and positions, as a user writes them."""

from __future__ import annotations

import re

import pytest
from pydantic import BaseModel

from trainer.config.schema import RecipeError
from trainer.config.value_errors import build_section


class Shape(BaseModel):
    size: int | dict[str, int] = 1
    sides: list[int | str] = []


@pytest.mark.parametrize(
    ("values", "places"),
    [
        ({"size": {"width": 2, "height": "tall"}}, ["shape.size", "shape.size.height"]),
        ({"sides": [1, None]}, ["shape.sides.1", "shape.sides.1"]),
    ],
    ids=["key", "position"],
)
def test_a_place_is_named_without_the_types_that_were_tried(
    values: dict[str, object], places: list[str]
) -> None:
    """A value of two types is tried as each of them, and each complains."""
    with pytest.raises(RecipeError) as refused:
        build_section(Shape, values, "shape")
    assert re.findall(r"(?:^|; )(shape\.[\w.]+)", str(refused.value)) == places
