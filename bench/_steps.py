"""What a method's training step costs: time beside the others', parameters, the optimiser's
state."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn

from trainer.backbones import load_backbone
from trainer.config.load import load_recipe, task_recipe
from trainer.data.loader import Planned
from trainer.methods.apply import apply_methods
from trainer.training.build import inputs_of, latents, looker, module_of, needs, step_plan

WARM = 2


class Step:
    """A whole training step of a recipe, the same batch every time: forward, backward, clipping,
    optimiser. bare: without new words, so that nothing goes through the text encoder's backward."""

    def __init__(self, words: Sequence[str], bare: bool = False) -> None:
        chosen = load_recipe(words)
        if chosen.continual.concepts:
            chosen = task_recipe(chosen, 1)  # the second: the first has nothing to remember yet
        torch.manual_seed(chosen.run.seed)
        self.backbone = load_backbone(chosen.backbone, chosen.backbone_name)
        self.backbone.eval().requires_grad_(False)
        data, _ = chosen.data.open(needs(chosen, self.backbone))
        self.plan = apply_methods(self.backbone, chosen.methods, chosen.run.seed)
        self.module = module_of(chosen, self.backbone, self.plan)
        if bare:
            self.module.trained = tuple(n for n in self.plan.names if n.split(".")[0] == "unet")
            self.backbone.text_encoder.requires_grad_(False)
        kept, reads = latents(chosen, self.backbone, data), inputs_of(self.backbone)
        batches = Planned(data, step_plan(chosen, data), kept, 0, 1, reads=reads)
        for edit in self.plan.edits.values():
            if edit.prepare is not None:
                edit.prepare(looker(self.module, batches))
        self.batch, self.clip = batches[0], chosen.optim.clip
        self.optimizer = self.module.configure_optimizers()["optimizer"]
        self.trained = list(self.module.trainable().values())

    def __call__(self) -> float:
        """Its seconds."""
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are trying to `self.log")
            self.module.training_step(self.batch, 0).backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.optimizer.step()
        return time.perf_counter() - begin

    def state_bytes(self) -> int:
        """What the optimiser holds after a step, each storage once."""
        storages = {
            value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        }
        return sum(storages.values())


def interleaved(
    steps: Mapping[str, Step], rounds: int, against: str
) -> dict[str, dict[str, float]]:
    """Every round takes each step once, so that what else the machine does falls on all alike.

    For each: milliseconds (median), and how many times faster than `against` in the same round:
    median and quartiles.
    """
    for step in steps.values():
        for _ in range(WARM):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(step())
    found = {}
    for name, own in seconds.items():
        ratios = [slow / fast for slow, fast in zip(seconds[against], own, strict=True)]
        low, _, high = quantiles(ratios, n=4)
        found[name] = {
            "step_ms": 1000 * median(own),
            "faster": median(ratios),
            "faster_low": low,
            "faster_high": high,
        }
    return found


def facts(step: Step) -> dict[str, Any]:
    """Parameters trained, as they are and of 100 of the plain U-Net's, and the optimiser's
    state."""
    return {
        "parameters": sum(value.numel() for value in step.trained),
        "optimiser_bytes": step.state_bytes(),
    }
