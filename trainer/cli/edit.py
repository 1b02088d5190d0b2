"""`edit`: edits a picture by its attention, real or generated, and writes both in one sheet."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from trainer.cli.edit_files import written_edits
from trainer.cli.edit_options import EditOptions, with_recipe
from trainer.cli.edit_repeat import compared_edits, read_edit
from trainer.cli.options import build_options, given_by, quiet_libraries
from trainer.cli.repeat_picture import RepeatedPicture, as_then
from trainer.config import load as recipes
from trainer.config.partners import idle_of_methods, refuse_idle

__all__ = ["EditOptions", "run"]


def run(words: list[str]) -> int:
    given: dict[str, Any] = given_by(words, EditOptions)
    given = {key: value for key, value in given.items() if value not in (None, "")}
    told = given.get("methods") or {}
    earlier: RepeatedPicture | None = None
    if given.get("from") is not None:
        given, earlier = read_edit(Path(str(given.pop("from"))), given)
    given = given if earlier is not None else with_recipe(given)
    options = build_options(given, EditOptions)
    chosen = recipes.methods_of(options.methods)
    refuse_idle(idle_of_methods(chosen), {"methods": told})
    quiet_libraries()
    with as_then(earlier):
        found, facts = written_edits(options, chosen, earlier)
    for path in found:
        print(path)
    if earlier is not None:
        print(compared_edits(earlier, facts), file=sys.stderr)
    return 0
