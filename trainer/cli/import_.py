"""`import`: makes an adapter from a file of another tool."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.cli.options import quiet_libraries, read_options
from trainer.config.schema import RecipeError

if TYPE_CHECKING:
    pass


def run(words: list[str]) -> int:
    options = read_options(words, {"file": None, "backbone": None, "out": None, "format": "auto"})
    if not (options["file"] and options["backbone"] and options["out"]):
        raise RecipeError(
            "give file=<file or folder>, backbone=<name or folder> and out=<adapter.safetensors>"
        )
    quiet_libraries()
    from trainer.export.import_ import import_file

    source, out = Path(options["file"]).expanduser(), Path(options["out"]).expanduser()
    print(import_file(source, options["backbone"], out, options["format"]))
    return 0
