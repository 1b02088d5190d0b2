"""The module: one lr for all, or one of a method's own; the task's loss and the extra losses of
methods; validation by level."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention.step_result import StepResult
from trainer.config.load import methods_of
from trainer.data.loader import Batch
from trainer.diffusion.objective import Objective
from trainer.methods.apply import apply_methods
from trainer.training.module import DiffusionModule
from trainer.training.optim import Optim
from trainer.training.tasks.denoise import Denoise

METHODS = {"selective": {"sites": "cross"}, "new_token": {"tokens": ["<v1>"], "init": "fox"}}


@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
def test_a_method_may_have_an_lr_of_its_own(own: bool, tiny: Any) -> None:
    plan = apply_methods(tiny, methods_of(METHODS))
    token = plan.edits["new_token"].trains
    lrs = dict.fromkeys(token, 1e-2) if own else {}
    objective = Objective(tiny.target, tiny.alphas_cumprod)
    optim = Optim(1e-4, 10, warmup=3)
    module = DiffusionModule(tiny, Denoise(tiny, objective), optim, trained=plan.names, lrs=lrs)
    found = module.configure_optimizers()
    groups = found["optimizer"].param_groups
    by_id = {id(p): group["lr"] for group in groups for p in group["params"]}
    factor = optim.factor(0)  # the schedule is already at its first step, for every group
    for name, parameter in module.trainable().items():
        wanted = 1e-2 if own and name in token else 1e-4
        assert by_id[id(parameter)] == pytest.approx(wanted * factor)
    assert len(groups) == 1 + own


def batch_of(count: int, frames: int, channels: int, **more: Any) -> Batch:
    words = ["a fox moving left", "a cat", "a tree"][:count]
    moments = torch.randn(count * frames, 2 * channels, 8, 8, generator=torch.manual_seed(0))
    return Batch(
        step=3,
        positions=list(range(count)),
        captions=words,
        keys=words,
        weights=torch.ones(count),
        moments=moments,
        frames=frames,
        **more,
    )


def test_extra_losses_get_what_the_step_found_and_are_added(tiny: Any) -> None:
    """To the task's losses, each sample by its weight."""
    seen: list[StepResult] = []

    def towards(result: StepResult) -> Tensor:
        seen.append(result)
        return 0.25 * result.x0_hat.square().mean()

    def constant(result: StepResult) -> Tensor:
        assert result is seen[-1]
        return torch.tensor(3.0)

    task = Denoise(tiny, Objective(tiny.target, tiny.alphas_cumprod))
    optim = Optim(1e-4, 1)
    module = DiffusionModule(tiny, task, optim, trained=[], extra_losses=[towards, constant])
    batch = batch_of(2, 1, tiny.latent_channels)
    batch.weights = torch.tensor([0.5, 2.0])
    with torch.no_grad(), warnings.catch_warnings():  # there is no `Trainer` to log to
        warnings.filterwarnings("ignore", message=".*`self.log")
        loss = module.training_step(batch, 0)
        own = task.loss(task.encode(batch))
    wanted = (0.5 * own.losses[0] + 2 * own.losses[1]) / 2
    wanted = wanted + 0.25 * own.x0_hat.square().mean() + 3
    torch.testing.assert_close(loss, wanted)
    assert seen[0].batch is batch


class Counted:
    """A task of its own kind: its loss is what the batch's captions count to."""

    def encode(self, batch: Batch, purpose: str = "train") -> Any:
        return batch, purpose

    def loss(self, state: Any) -> StepResult:
        batch, purpose = state
        assert purpose == "train"
        x = torch.tensor([float(len(caption)) for caption in batch.captions])
        return StepResult(x, x_t=x, output=x, t=x, batch=batch, convert=lambda *parts: parts[0])

    def sample(self, prompts: Any, seeds: Any, settings: Any) -> Tensor:
        return torch.zeros(len(prompts), 3, 1, 1)

    def score(self, batch: Batch, levels: Any) -> Tensor:
        return torch.tensor([[1000 * level, 3000 * level] for level in levels])


def test_the_module_knows_no_more_than_its_task(tiny: Any) -> None:
    module = DiffusionModule(tiny, Counted(), Optim(1e-4, 1), trained=[])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*`self.log")
        loss = module.training_step(batch_of(2, 1, 8), 0)
    assert float(loss) == (len("a fox moving left") + len("a cat")) / 2
    module.validation_step(batch_of(2, 1, 8), 0)
    levels = [62.5, 187.5, 312.5, 437.5, 562.5, 687.5, 812.5, 937.5]
    assert module.val_losses == {round(level): [level, 3 * level] for level in levels}


def test_every_clip_is_validated_at_every_level(tiny: Any) -> None:
    task = Denoise(tiny, Objective(tiny.target, tiny.alphas_cumprod))
    module = DiffusionModule(tiny, task, Optim(1e-4, 1), trained=[])
    asked: list[list[int]] = []
    predict = tiny.predict

    def spied(x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        asked.append(t.tolist())
        output: Tensor = predict(x_t, t, condition)
        return output

    tiny.predict = spied
    batch = batch_of(2, 2, tiny.latent_channels, fps=[8.0, 8.0])
    module.validation_step(batch, 0)
    levels = [62, 187, 312, 437, 562, 687, 812, 937]
    assert asked == [[level] * 4 for level in levels]
    assert {level: len(found) for level, found in module.val_losses.items()} == {
        62: 2, 188: 2, 312: 2, 438: 2, 562: 2, 688: 2, 812: 2, 938: 2,
    }  # fmt: skip
