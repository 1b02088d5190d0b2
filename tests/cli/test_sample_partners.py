"""Options of `sample` beside each other, before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.cli.sample_partners import refuse_idle_options

NEGATIVE = {"negative": "red", "guidance": 1}


@pytest.mark.parametrize(
    "more",
    [
        {"guidance": 4},
        {"true_guidance": 2},  # of backbones whose guidance is an input of the network
        {"adapter": "a"},  # whose recipe may have a true_guidance
    ],
)
def test_a_negative_prompt_that_may_be_read(more: dict[str, Any]) -> None:
    refuse_idle_options(NEGATIVE | more)


@pytest.mark.parametrize("more", [{}, {"true_guidance": 1}, {"adapter": "a", "true_guidance": 0.5}])
def test_a_negative_prompt_that_nothing_reads(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="negative=red has no effect: guidance=1 does not guide"):
        refuse_idle_options(NEGATIVE | more)
