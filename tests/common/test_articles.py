"""The article before a word goes by its sound."""

from __future__ import annotations

import pytest

from trainer.common.articles import article_of

AN = "owl apple hour honest umbrella onion SUV MRI 8-bit 11 unidentified usher <owl> _ox_"
A = "dog <v1> unicorn user european one-eyed ukulele UFO 5 180 university house ewe <dog> "


@pytest.mark.parametrize(
    ("word", "article"),
    [*((word, "an") for word in AN.split()), *((word, "a") for word in A.split()), ("???", "a")],
)
def test_article(word: str, article: str) -> None:
    assert article_of(word) == article
    assert article_of(f"{word} thing") == article
