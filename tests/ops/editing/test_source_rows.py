"""Which rows are the source's for each half of guidance, and windows of steps."""

from __future__ import annotations

import pytest
import torch

from trainer.attention.context import StepContext
from trainer.attention.rows import Rows
from trainer.ops.editing.source_rows import halves
from trainer.ops.editing.step_window import is_inside, refuse_empty


def context(*groups: str, step: int = 0) -> StepContext:
    return StepContext(step, 4, torch.zeros(()), groups=Rows.of(groups, 2))


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (
            ("source/uncond", "target/uncond", "source/cond", "target/cond"),
            [((4, 6), (6, 8)), ((0, 2), (2, 4))],
        ),
        (("target/uncond", "source/cond", "target/cond"), [((2, 4), (4, 6)), ((2, 4), (0, 2))]),
        (("source/cond", "target/cond"), [((0, 2), (2, 4))]),
        (("target/uncond", "target/cond"), []),
        (("source/cond",), []),
    ],
)
def test_each_half_has_its_source(groups: tuple[str, ...], expected: object) -> None:
    found = [tuple((rows.start, rows.stop) for rows in half) for half in halves(context(*groups))]
    assert found == expected


def test_a_window_begins_with_its_first_share_and_ends_before_its_last() -> None:
    assert [is_inside((0.25, 0.75), context(step=n)) for n in range(4)] == [
        False,
        True,
        True,
        False,
    ]
    assert not is_inside(None, context())


def test_a_window_without_a_step_is_refused_by_name() -> None:
    refuse_empty({"own_steps": None, "steps": (0.0, 1.0)}, 4)
    with pytest.raises(ValueError, match=r"own_steps=\[0\.3,0\.45\] has none of 4 steps; give a"):
        refuse_empty({"own_steps": (0.3, 0.45)}, 4)
