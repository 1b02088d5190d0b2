"""A key that there is not."""

from __future__ import annotations

import pytest

from trainer.config.schema import RecipeError
from trainer.config.unknown_keys import refuse_unknown


@pytest.mark.parametrize(
    ("key", "known", "hint"),
    [
        ("stps", ("steps", "seed"), "optim.stps: no such key; did you mean optim.steps?"),
        ("learning_rate", ("lr", "name"), "did you mean optim.lr?"),
        ("zzzzzz", ("lr", "name"), "optim.zzzzzz: no such key"),
    ],
)
def test_the_nearest_is_named(key: str, known: tuple[str, ...], hint: str) -> None:
    refuse_unknown(dict.fromkeys(known), known, "optim")
    with pytest.raises(RecipeError) as refused:
        refuse_unknown({key: 1}, known, "optim")
    assert hint in str(refused.value)
