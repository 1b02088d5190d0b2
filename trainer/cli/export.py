"""`export`: writes an adapter for other tools, and proves the files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.cli.options import quiet_libraries, read_options
from trainer.config.schema import RecipeError

if TYPE_CHECKING:
    pass


def run(words: list[str]) -> int:
    options = read_options(
        words,
        {"run": None, "adapter": None, "out": None, "format": "merged", "dtype": "float32",
         "rank": None},
    )  # fmt: skip
    source = options["adapter"] or options["run"]
    if not source or not options["out"]:
        raise RecipeError("give run=<run folder> (or adapter=<file>) and out=<folder>")
    quiet_libraries()
    from trainer.config.header import file_of
    from trainer.export.export import export as write

    form, dtype, rank = options["format"], options["dtype"], options["rank"]
    print(write(file_of(source), Path(options["out"]), form, dtype, rank))
    return 0
