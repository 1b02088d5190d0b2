"""`merge`: joins concepts that were trained apart into one adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.cli.options import quiet_libraries
from trainer.config import tree as tree_
from trainer.config.overrides import parse_words
from trainer.config.schema import RecipeError

if TYPE_CHECKING:
    pass


def run(words: list[str]) -> int:
    """Captions, if given, are a text file with one ordinary caption a line."""
    given = parse_words(words)
    tree_.refuse_unknown(given, ("adapter", "out", "captions"), "")
    sources, out, captions = (given.get(key) for key in ("adapter", "out", "captions"))
    if not isinstance(sources, list) or not isinstance(out, str):
        raise RecipeError("give adapter=[<run>,<run>] and out=<adapter.safetensors>")
    lines = None
    if captions is not None:
        text = Path(str(captions)).expanduser().read_text(encoding="utf-8")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise RecipeError(f"captions={captions}: no caption in it; write one a line")
    quiet_libraries()
    from trainer.config.header import file_of
    from trainer.runs.merge import merge_concepts as write

    tokens = write([file_of(str(source)) for source in sources], Path(out).expanduser(), lines)
    print(f"{out}: {', '.join(tokens)}")
    return 0
