"""EMA in a real Lightning run, against a plain loop over the weights it saw."""

from __future__ import annotations

from typing import Any

import lightning
import pytest
import torch
from torch import Tensor

from trainer.data.loader import Planned, loader
from trainer.data.plan import StepPlan
from trainer.diffusion.objective import Objective
from trainer.methods.apply import apply_methods
from trainer.methods.weight.selective import Selective
from trainer.training.callbacks.average import averaged
from trainer.training.callbacks.ema import EMA
from trainer.training.module import DiffusionModule
from trainer.training.optim import Optim
from trainer.training.tasks.denoise import Denoise


class Watch(lightning.Callback):
    """Keeps a copy of what trains, at the start and after every optimiser step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.keep(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
        if trainer.global_step == len(self.seen):
            self.keep(pl_module)

    def keep(self, module: DiffusionModule) -> None:
        self.seen.append({k: v.detach().clone() for k, v in module.trainable().items()})


def train(tiny: Any, photos: Any, ema: EMA, watch: Watch, accumulate: int) -> DiffusionModule:
    plan = apply_methods(tiny, {"selective": Selective()})
    task = Denoise(tiny, Objective(tiny.target, tiny.alphas_cumprod))
    module = DiffusionModule(tiny, task, Optim(1e-2, 4), trained=plan.names)
    groups = tuple((group.start, group.stop) for group in photos.groups)
    items = Planned(photos, StepPlan(groups, (1.0,), (1.0,), 2, 0), None, 0, 1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=4,
        accumulate_grad_batches=accumulate,
        callbacks=[ema, watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(items, 4 * accumulate, 0, 0))
    return module


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_averages_each_step_once(tiny: Any, photos: Any, accumulate: int) -> None:
    ema, watch = EMA(0.25), Watch()
    module = train(tiny, photos, ema, watch, accumulate)
    assert len(watch.seen) == 5
    wanted = watch.seen[0]
    for step, weights in enumerate(watch.seen[1:], start=1):
        decay = min(0.25, (1 + step) / (10 + step))
        wanted = {k: decay * wanted[k] + (1 - decay) * weights[k] for k in weights}
    for name, value in ema.averaged.items():
        assert torch.allclose(value, wanted[name], atol=1e-6)
    assert set(ema.averaged) == set(module.trainable())  # nothing frozen is held


def test_it_lends_the_average_and_takes_it_back(tiny: Any, photos: Any) -> None:
    ema, watch = EMA(0.9), Watch()
    module = train(tiny, photos, ema, watch, 1)
    own = {name: value.detach().clone() for name, value in module.trainable().items()}
    with pytest.raises(RuntimeError, match="inside"):
        look_inside(ema, module)
    assert all(torch.equal(value, own[name]) for name, value in module.trainable().items())
    assert any(not torch.equal(own[name], ema.averaged[name]) for name in own)


def look_inside(ema: EMA, module: DiffusionModule) -> None:
    with averaged(ema, module):
        for name, value in module.trainable().items():
            assert torch.equal(value, ema.averaged[name])
        raise RuntimeError("inside")


def test_its_state_survives_saving(tiny: Any, photos: Any) -> None:
    ema = EMA(0.9)
    module = train(tiny, photos, ema, Watch(), 1)
    again = EMA(0.9)
    again.on_fit_start(None, module)  # type: ignore[arg-type]
    again.load_state_dict(ema.state_dict())
    assert again.steps == ema.steps == 4
    assert all(torch.equal(again.averaged[name], value) for name, value in ema.averaged.items())
