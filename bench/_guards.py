"""What the guards cost: a step of the same run with and without them, and how long a save holds it
up."""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import lightning
import torch

from trainer.backbones import load_backbone
from trainer.config.load import load_recipe
from trainer.data.loader import Planned, loader
from trainer.methods.apply import apply_methods
from trainer.training.build import inputs_of, latents, module_of, needs, step_plan
from trainer.training.callbacks.backend_report import BackendReport
from trainer.training.callbacks.ema import EMA
from trainer.training.callbacks.hang import HangGuard
from trainer.training.callbacks.nonfinite_and_signals import StepChecks
from trainer.training.callbacks.progress import Bar
from trainer.training.callbacks.save_and_restore import Checkpoints
from trainer.training.callbacks.signal_recorder import Signals
from trainer.training.console import console
from trainer.training.launch import callbacks, make_trainer

GUARDS = (StepChecks, Checkpoints, HangGuard)
HOOKS = (
    "on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_train_batch_end",
)  # fmt: skip
PLAIN = (
    "data.prior_weight=0", "preview.every=0", "run.validate_every=0", "tracker=none",
    "run.batch_size=4",
)  # fmt: skip
ADAPTER = ("recipe=lora",)
FULL = ("recipe=custom_diffusion", "methods.selective=null", "methods.full={}")
WARM = 4  # steps of each run that do not count


class Clock(lightning.Callback):
    """When each batch begins; stands first."""

    def __init__(self) -> None:
        self.begins: list[float] = []

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        self.begins.append(time.perf_counter())

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.begins.append(time.perf_counter())

    def steps(self) -> list[float]:
        return [after - before for before, after in zip(self.begins, self.begins[1:], strict=False)]


class Loop:
    """A recipe that is trained again and again in this process, with its guards or without."""

    def __init__(self, steps: int, *words: str) -> None:
        self.recipe = chosen = load_recipe([*words, *PLAIN, f"run.steps={steps}"])
        torch.manual_seed(0)
        backbone = load_backbone(chosen.backbone, chosen.backbone_name)
        backbone.eval().requires_grad_(False)
        data, _ = chosen.data.open(needs(chosen, backbone))
        plan = apply_methods(backbone, chosen.methods, chosen.run.seed)
        self.module = module_of(chosen, backbone, plan)
        self.items = Planned(
            data, step_plan(chosen, data), latents(chosen, backbone, data), rank=0, world_size=1,
            reads=inputs_of(backbone),
        )  # fmt: skip

    def guarded(self, folder: Path) -> tuple[Clock, list[lightning.Callback]]:
        clock, signals = Clock(), Signals(False)
        own = self.callbacks(folder, signals)
        with signals:
            self._fit(folder, [clock, BackendReport(lambda: None), *own])
        return clock, own

    def bare(self, folder: Path) -> Clock:
        """Only what trains and the progress line; gradients are cut by Lightning."""
        clock, run, ema = Clock(), self.recipe.run, self._ema()
        bar = Bar(run.batch_size, max(1, run.steps // 20), console)
        self._fit(folder, [clock, *([ema] if ema else []), bar], self.recipe.optim.clip)
        return clock

    def callbacks(self, folder: Path, signals: Signals) -> list[lightning.Callback]:
        """Those of a run, the guards among them."""
        return callbacks(
            self.recipe,
            folder,
            average=self._ema(),
            found=None,
            signals=signals,
            scaler=None,
            train=self.items.dataset,
        )

    def _ema(self) -> EMA | None:
        return EMA(self.recipe.optim.ema) if self.recipe.optim.ema else None

    def _fit(self, folder: Path, own: list[lightning.Callback], clip: float | None = None) -> None:
        trainer = make_trainer(self.recipe, folder, torch.device("cpu"), mixed=None, callbacks=own)
        trainer.gradient_clip_val = clip
        batches = loader(self.items, self.recipe.run.steps, start=0, workers=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(self.module, batches)


def cost(pairs: int, steps: int) -> dict[str, float]:
    """Runs by turns, A B A B: percent that the guards add to the median step of a run, of each pair
    of neighbours; median and quartiles of the pairs."""
    loop = Loop(steps + WARM, *ADAPTER, "run.checkpoint_every=0")
    added, took = [], []
    with tempfile.TemporaryDirectory() as scratch, quiet():
        for pair in range(pairs):
            places = [Path(scratch, f"{pair}-{kind}") for kind in ("on", "off")]
            for place in places:
                place.mkdir()
            calls = [lambda p=places[0]: loop.guarded(p)[0], lambda p=places[1]: loop.bare(p)]
            order = (0, 1) if pair % 2 else (1, 0)  # each is the first of a pair as often
            clocks = {each: calls[each]() for each in order}  # type: ignore[operator]
            on, off = (median(clocks[each].steps()[WARM:]) for each in (0, 1))
            added.append(100 * (on / off - 1))
            took.append(1000 * off)
    low, _, high = quantiles(added, n=4)
    return {
        "percent": median(added), "low": low, "high": high, "pairs": pairs,
        "step_ms": median(took),
    }  # fmt: skip


def inside(steps: int) -> dict[str, float]:
    """Milliseconds a step that are spent in the guards' own hooks; the norm and the cutting of
    gradients, which a run without them does elsewhere, are among them."""
    loop = Loop(steps + WARM, *ADAPTER, "run.checkpoint_every=0")
    spent: list[float] = []
    with tempfile.TemporaryDirectory() as scratch, quiet():
        clock, signals = Clock(), Signals(False)
        with signals:
            chosen = loop.callbacks(Path(scratch), signals)
            for callback in chosen:
                for hook in HOOKS if isinstance(callback, GUARDS) else ():
                    setattr(callback, hook, _clocked(getattr(callback, hook), spent))
            loop._fit(Path(scratch), [clock, *chosen])
    return {
        "hooks_ms": 1000 * sum(spent) / (steps + WARM),
        "step_ms": 1000 * median(clock.steps()[WARM:]),
    }


def _clocked(hook: Any, spent: list[float]) -> Any:
    def clocked(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return hook(*arguments, **options)
        finally:
            spent.append(time.perf_counter() - began)

    return clocked


def stall(saves: int, *words: str) -> dict[str, float]:
    """Milliseconds from where a save begins to the next step's start, of a run that saves after
    every step; and the bytes of a checkpoint."""
    loop = Loop(saves + 1, *words, "run.checkpoint_every=1")
    with tempfile.TemporaryDirectory() as scratch, quiet():
        folder = Path(scratch)
        clock, signals, began = Clock(), Signals(False), []
        own = loop.callbacks(folder, signals)
        (saver,) = [each for each in own if isinstance(each, Checkpoints)]
        save = saver.on_train_batch_end

        def noted(*arguments: Any, **options: Any) -> None:
            began.append(time.perf_counter())
            save(*arguments, **options)

        saver.on_train_batch_end = noted  # type: ignore[method-assign]
        with signals:
            loop._fit(folder, [clock, *own])
        newest = max((folder / "checkpoints").glob("step-*"))
        size = sum(path.stat().st_size for path in newest.iterdir())
    waits = [1000 * (after - before) for before, after in zip(began, clock.begins[1:], strict=True)]
    waits = waits[1:-1]  # the first reads versions, the last is the end
    return {"median_ms": median(waits), "largest_ms": max(waits), "bytes": float(size)}


def quiet() -> Any:
    """Without the lines of so many runs."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return console.capture()
