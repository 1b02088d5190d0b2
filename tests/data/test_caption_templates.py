"""New words beside the class words they were trained with."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.data.caption_templates import with_class_words

WORDS = ["<a>", "<b>", "<c>"]


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        ({"token": WORDS, "class_word": ["cat", "dog", "cup"]}, ["<a> cat", "<b> dog", "<c> cup"]),
        ({"token": WORDS, "class_word": ["cat", "", "cup"]}, ["<a> cat", "<b>", "<c> cup"]),
        ({"token": WORDS, "class_word": "cat"}, ["<a> cat", "<b>", "<c>"]),
        ({"token": "<b>", "class_word": "dog"}, ["<a>", "<b> dog", "<c>"]),
        ({"token": WORDS, "class_word": None}, WORDS),
        ({}, WORDS),
        ({"token": 3, "class_word": {"<a>": "cat"}}, WORDS),
    ],
)
def test_each_word_has_its_own_class_word(data: dict[str, Any], wanted: list[str]) -> None:
    assert with_class_words(WORDS, data) == wanted
