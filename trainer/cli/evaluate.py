"""`evaluate`: measures a finished run beside its base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.cli.options import quiet_libraries, read_options
from trainer.config.schema import RecipeError

if TYPE_CHECKING:
    pass


def run(words: list[str]) -> int:
    options = read_options(words, {"run": None, "judge": None, "images": 32, "batch": 32})
    if not options["run"]:
        raise RecipeError("run is missing, as in run=runs/custom_diffusion/<id>")
    quiet_libraries()
    from trainer.evaluation.evaluate import evaluate as judge_run

    judge_run(
        Path(options["run"]),
        options["judge"],
        images=int(options["images"]),
        batch=int(options["batch"]),
    )
    return 0
