"""What a recipe may contain: its sections and the keys beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.backbones.spec import BackboneSpec, PartsSpec
from trainer.common.section import Section
from trainer.config.run_section import RunSpec
from trainer.config.sections import (
    ContinualSpec,
    EvaluateSpec,
    ObjectiveSpec,
    OptimSpec,
    PreviewSpec,
    TextSpec,
)
from trainer.data.source import Source
from trainer.methods.method import Method


class RecipeError(ValueError):
    """A mistake in a recipe or an override; the message names the full key and what to do."""


TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "none")
TRACKER_PACKAGES = ("wandb", "trackio", "mlflow")
SECTIONS: dict[str, type[Section]] = {
    "objective": ObjectiveSpec,
    "optim": OptimSpec,
    "run": RunSpec,
    "preview": PreviewSpec,
    "evaluate": EvaluateSpec,
    "continual": ContinualSpec,
    "text": TextSpec,
    "parts": PartsSpec,
}
KEYS = ("recipe", "backbone", "data", "methods", *SECTIONS, "tracker", "denoiser")


@dataclass(frozen=True)
class Recipe:
    """The resolved recipe; `tree` is the plain mapping it was made from, as it is written into
    adapters. said: sentences that a user is to read before it is trained."""

    name: str
    backbone_name: str
    backbone: BackboneSpec
    data: Source
    methods: dict[str, Method]
    objective: ObjectiveSpec
    optim: OptimSpec
    run: RunSpec
    preview: PreviewSpec
    evaluate: EvaluateSpec
    continual: ContinualSpec
    text: TextSpec
    parts: PartsSpec
    tracker: str
    tree: dict[str, Any]
    said: tuple[str, ...] = ()
