"""`report`: writes the page of a run, or one that compares all runs of a folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, model_validator

from trainer.cli.options import Options, read_options
from trainer.config.schema import RecipeError


class ReportOptions(Options):
    """Writes report.html, a page that opens from disk in any browser: into a run folder, what its
    run is and how it went; into a folder of runs, their curves together, what differs in their
    recipes and which is best. `report runs/` is short for `report runs=runs/`. An earlier page is
    written anew, any other file of that name is left alone."""

    run: Path | None = Field(None, description="a run folder", examples=["runs/lora/<id>"])
    runs: Path | None = Field(
        None, description="a folder with runs in it and in its folders, in place of run"
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> ReportOptions:
        if (self.run is None) == (self.runs is None):
            raise ValueError(
                "give run=<a run folder> or runs=<a folder of runs>, as in report runs=runs/"
            )
        return self


def run(words: list[str]) -> int:
    options = read_options(_named(words), ReportOptions)
    from trainer.runs.page.write_page import write_comparison, write_run_page

    if options.run is not None:
        print(write_run_page(options.run.expanduser()))
        return 0
    assert options.runs is not None
    path, _, said = write_comparison(options.runs.expanduser())
    for line in said:
        print(f"passed over: {line}", file=sys.stderr)
    print(path)
    return 0


def _named(words: Sequence[str]) -> list[str]:
    """With `runs=` before a folder that stands alone."""
    alone = [word for word in words if "=" not in word or Path(word).exists()]
    if len(alone) > 1:
        raise RecipeError(f"report takes one folder, and {len(alone)} are given; name one of them")
    return [f"runs={word}" if word in alone else word for word in words]
