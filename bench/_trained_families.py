"""Trains the tiny folder of a family on scenes of the world, for `families.py`: how far the loss on
held-out scenes falls.

A scene is seen at 32 pixels, so that a step is cheap. What the text encoders and the VAE make of
the scenes, their noise and their timesteps are drawn once: a step is one of the network alone.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from family_folders import MAKERS
from torch import Tensor

from trainer.backbones import load_backbone
from trainer.config.lineage import backbone_spec
from trainer.config.load import methods_of
from trainer.data.loader import Batch
from trainer.data.world.scenes import draw_scene
from trainer.diffusion.objective import Objective
from trainer.methods.apply import apply_methods
from trainer.training.tasks.denoise import Denoise

STEPS, ROWS, SIDE = 300, 2, 32
RATES = {"lora": 4e-2, "text_kv": 1e-1}
BATCHES, HELD = 48, 16
TRAINING, HELD_OUT = 5, 9  # seeds of the world
FORMS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"sites": "all", "rank": 8}},
    "text_kv": {"selective": {}},
}


def share_left(family: str, form: str) -> float | None:
    """The loss on held-out scenes after training, as a share of the loss before it; None where the
    family cannot be trained so, because it reads no text."""
    with tempfile.TemporaryDirectory() as folder:
        made = MAKERS[family](Path(folder) / family)
        model = load_backbone(backbone_spec(str(made)), str(made))
    if form == "text_kv" and not model.text_encoders:
        return None
    plan = apply_methods(model, methods_of(FORMS[form]))
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [named[name] for name in plan.names], lr=RATES[form], weight_decay=0
    )
    task = Denoise(model, Objective(model.target, model.alphas_cumprod))
    held, batches = (
        _drawn(task, model, seed=seed, count=count)
        for seed, count in ((HELD_OUT, HELD), (TRAINING, BATCHES))
    )
    before = _loss(task, held)
    for step in range(STEPS):
        loss = task.loss(batches[step % BATCHES]).losses.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return _loss(task, held) / before


@torch.no_grad()
def _drawn(task: Denoise, model: Any, *, seed: int, count: int) -> list[Any]:
    torch.manual_seed(seed)
    return [task.encode(_batch(model, seed, number)) for number in range(count)]


@torch.no_grad()
def _loss(task: Denoise, states: list[Any]) -> float:
    return sum(float(task.loss(state).losses.mean()) for state in states) / len(states)


def _batch(model: Any, seed: int, number: int) -> Batch:
    """Scenes with their captions, or with the numbers of classes."""
    scenes = [draw_scene(seed, number * ROWS + row) for row in range(ROWS)]
    captions = [scene.caption for scene in scenes]
    if not model.text_encoders:
        captions = [str((number + row) % 3) for row in range(ROWS)]
    pixels = F.interpolate(torch.stack([_pixels(scene) for scene in scenes]), SIDE, mode="area")
    rows = list(range(ROWS))
    return Batch(number, rows, captions, captions, torch.ones(ROWS), pixels=pixels)


def _pixels(scene: Any) -> Tensor:
    """(3, h, w) in [-1, 1]"""
    return torch.from_numpy(scene.image.copy()).permute(2, 0, 1).float() / 127.5 - 1
