"""Pictures at fixed prompts and seeds while training: one row per look, the base model's row
first."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.attention.sites import select
from trainer.attention.store import MapStore
from trainer.backbones.base import Backbone
from trainer.callbacks.ema import EMA
from trainer.callbacks.hang import HangGuard
from trainer.module import DiffusionModule
from trainer.pictures import grid, overlay
from trainer.sampler import sample


class Preview(lightning.Callback):
    """Writes `previews/grid.png` and one picture a look to every tracker; with `maps`, where that
    token looks."""

    def __init__(
        self,
        folder: Path,
        prompts: Sequence[str],
        every: int,
        steps: int,
        guidance: float,
        seed: int,
        negative: str = "",
        maps: str | None = None,
        ema: EMA | None = None,
        hang: HangGuard | None = None,
    ) -> None:
        self.folder, self.prompts, self.every = folder, list(prompts), every
        self.maps, self.ema, self.hang = maps, ema, hang
        self.options: dict[str, Any] = {"steps": steps, "guidance": guidance, "negative": negative}
        self.seeds = [seed + i for i in range(len(self.prompts))]
        self.rows: list[tuple[str, Tensor]] = []
        self.last = -1

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if trainer.global_step == 0:
            self._look(trainer, pl_module, "base")

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any, **__: Any
    ) -> None:
        step = trainer.global_step
        if step != self.last and step % self.every == 0 and step < trainer.max_steps:
            self._look(trainer, pl_module, f"step {step}")

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if self.last != trainer.global_step:
            self._look(trainer, pl_module, f"step {trainer.global_step}")

    def _look(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, label: str
    ) -> None:
        self.last = trainer.global_step
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, DiffusionModule)
        with (
            self.hang.inside("preview") if self.hang else nullcontext(),
            self.ema.swapped(pl_module) if self.ema else nullcontext(),
        ):
            pictures, maps = self._paint(pl_module.backbone)
        self.rows.append((label, pictures))
        if maps is not None and label != "base":
            self.rows.append((f"{self.maps}", overlay(pictures, maps)))
        self.folder.mkdir(parents=True, exist_ok=True)
        sheet = grid(self.rows, self.prompts)
        sheet.save(self.folder / "grid.png")
        show(trainer, "preview", grid([(label, pictures)], self.prompts), trainer.global_step)

    def _paint(self, backbone: Backbone) -> tuple[Tensor, Tensor | None]:
        where = positions(backbone, self.prompts, self.maps) if self.maps else None
        if where is None:
            return sample(backbone, self.prompts, self.seeds, **self.options).cpu(), None
        # the same columns for the unconditional half; its rows are dropped below
        store = MapStore([*where, *where] if self.options["guidance"] > 1 else where)
        sites = [site for site in select(backbone.sites, "cross") if site.divisor in (1, 2)]
        backbone.host.install(store, sites)
        try:
            pictures = sample(backbone, self.prompts, self.seeds, **self.options).cpu()
        finally:
            backbone.host.remove(store)
        maps = store.average(
            (pictures.shape[-2] // backbone.divisor, pictures.shape[-1] // backbone.divisor)
        )
        return pictures, maps[-len(self.prompts) :, 0]


def positions(backbone: Backbone, prompts: Sequence[str], token: str) -> list[list[int]] | None:
    """Where `token` stands in each tokenised prompt, or None if one lacks it."""
    wanted = backbone.tokenizer.convert_tokens_to_ids(token)
    found = []
    for prompt in prompts:
        ids = backbone.tokenizer(prompt).input_ids
        if wanted not in ids or wanted == backbone.tokenizer.unk_token_id:
            return None
        found.append([ids.index(wanted)])
    return found


def show(trainer: lightning.Trainer, name: str, image: Image.Image, step: int) -> None:
    """Hands a picture to every tracker of the run."""
    for logger in trainer.loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(logger, "log_image"):
            logger.log_image(name, [image], step=step)
        elif hasattr(experiment, "add_image"):
            experiment.add_image(
                name, torch.from_numpy(np.asarray(image).copy()), step, dataformats="HWC"
            )
