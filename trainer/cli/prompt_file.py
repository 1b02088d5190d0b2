"""The prompts of `sample`: from a file, one on each line, and with their places filled."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.backbones.backbone import Backbone


def read_prompts(path: Path | None) -> list[tuple[str, str]]:
    """The prompts of a file, each with its place for messages; empty lines and those that begin
    with # are passed over.

    Raises:
        ValueError: it cannot be read as UTF-8, or holds no prompt.
    """
    assert path is not None
    try:
        lines = path.expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"prompts={path}: cannot be read ({error}); give a text file in UTF-8 with a prompt on "
            "each line"
        ) from None
    texts = [(f"prompts line {n}", line.strip()) for n, line in enumerate(lines, start=1)]
    found = [(key, text) for key, text in texts if text and not text.startswith("#")]
    if not found:
        raise ValueError(f"prompts={path}: there is no prompt in it; write one on each line")
    return found


def filled(
    texts: Sequence[tuple[str, str]], backbone: Backbone, tree: Mapping[str, Any]
) -> list[str]:
    """The texts, each given with the name it has in messages, with the words of a model in their
    places; says where one is longer than what is read of it. tree: the recipe of the adapter.

    Raises:
        ValueError: a word that the model does not have, or does not read.
    """
    from trainer.config.captions import check_read
    from trainer.config.prompts import words_in

    words = words_in(tree, backbone.prompts.vocabulary)
    found = []
    for key, text in texts:
        found.append(words.prompt(text, key))
        for line in check_read(found[-1], key, words.added, reader=backbone.prompts.reader):
            print(line, file=sys.stderr)
    return found
