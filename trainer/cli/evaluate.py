"""`evaluate`: measures a finished run beside its base model."""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import Field, model_validator

from trainer.cli.options import Count, Options, quiet_libraries, read_options
from trainer.config.run_section import Device, Precision


class EvaluateOptions(Options):
    """Prints a table of scores of the base and of the adapted model, and keeps it as
    evaluation.json in the run folder. With runs=[a,b] a column for each run, and the best run
    for each score; with every=true a column for each adapter that the run has kept along the way,
    which of them to keep, and evaluation_by_step.json and .png."""

    run: Path | None = Field(
        None,
        description="the run folder to judge, or an adapter file of it",
        examples=["runs/custom_diffusion/<id>"],
    )
    runs: tuple[Path, ...] = Field(
        (), description="several runs on one backbone to compare, in place of run"
    )
    every: bool = Field(
        False, description="every adapter of the run that run.keep_adapters has kept, by its step"
    )
    judge: str | tuple[str, ...] | None = Field(
        None,
        description="folder of the model that scores the pictures, or several as in [a,b]: a CLIP "
        "compares them with photos and texts, a DINO or DINOv2 with photos alone; null takes the "
        "one that the backbone ships with",
    )
    images: Count = Field(32, description="pictures for each group of prompts")
    batch: Count = Field(32, description="pictures generated at once, at most")
    device: Device = "auto"
    precision: Precision = "auto"

    @model_validator(mode="after")
    def _something_to_judge(self) -> EvaluateOptions:
        if self.runs and self.run is not None:
            raise ValueError("give run or runs, not both")
        if self.runs and self.every:
            raise ValueError("every=true is for one run=; of several runs, name the adapter files")
        if len(self.runs) == 1:
            raise ValueError(f"runs compares several; give run={self.runs[0]} for one")
        if not self.runs and self.run is None:
            raise ValueError("run is missing, as in run=runs/custom_diffusion/<id>")
        return self

    @property
    def judges(self) -> tuple[str, ...]:
        return self.judge if isinstance(self.judge, tuple) else (self.judge,) if self.judge else ()


def run(words: list[str]) -> int:
    options = read_options(words, EvaluateOptions)
    quiet_libraries()
    from trainer.backbones.device import choose_placement
    from trainer.config.header import file_of
    from trainer.evaluation.compare import evaluate_runs, evaluate_steps
    from trainer.evaluation.evaluate import Judging, evaluate
    from trainer.runs.page.write_page import refresh_page
    from trainer.runs.run_folder import later_checkpoint, run_of_adapter

    for run in options.runs or (options.run,):
        if run is not None and (later := later_checkpoint(file_of(run))) is not None:
            print(later, file=sys.stderr)
    placement = choose_placement(options.device, options.precision, lean=True)
    how = Judging(options.judges, options.images, options.batch, placement=placement)
    if options.run is None:
        evaluate_runs(options.runs, how)
    elif options.every:
        evaluate_steps(options.run, how)
    else:
        evaluate(options.run, how)
    for run in options.runs or (options.run,):
        if run is not None and (problem := refresh_page(run_of_adapter(file_of(run)))) is not None:
            print(problem, file=sys.stderr)
    return 0
