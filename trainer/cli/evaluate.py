"""`evaluate`: measures a finished run beside its base model."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from trainer.cli.options import Count, Options, quiet_libraries, read_options
from trainer.config.run_section import Device, Precision


class EvaluateOptions(Options):
    """Prints a table of scores of the base and of the adapted model, and keeps it as
    evaluation.json in the run folder."""

    run: Path = Field(
        description="the run folder to judge, or its adapter.safetensors",
        examples=["runs/custom_diffusion/<id>"],
    )
    judge: str | None = Field(
        None,
        description="folder of a CLIP model that scores the pictures; null takes the one that the "
        "backbone ships with",
    )
    images: Count = Field(32, description="pictures for each group of prompts")
    batch: Count = Field(32, description="pictures generated at once, at most")
    device: Device = "auto"
    precision: Precision = "auto"


def run(words: list[str]) -> int:
    options = read_options(words, EvaluateOptions)
    quiet_libraries()
    from trainer.backbones.device import choose_placement
    from trainer.evaluation.evaluate import evaluate as judge_run

    placement = choose_placement(options.device, options.precision)
    judge_run(
        options.run,
        options.judge,
        images=options.images,
        batch=options.batch,
        placement=placement,
    )
    return 0
