"""An adapter of two steps, as the tests of every family train one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer.config.load import methods_of
from trainer.data.loader import Batch
from trainer.diffusion.objective import Objective
from trainer.methods.apply import apply_methods
from trainer.runs.adapter import save_adapter
from trainer.training.tasks.denoise import Denoise


def two_steps(
    model: Any,
    tree: dict[str, Any],
    path: Path,
    *,
    folder: Path,
    batch_of: Callable[[int], Batch],
    lr: float,
    every: bool = False,
    **header: Any,
) -> Path:
    """The adapter of methods that take two steps, on the batches 0 and 1. folder: of the model;
    every: whether all tensors must get a gradient; header: what else of a recipe it carries."""
    plan = apply_methods(model, methods_of(tree))
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([named[name] for name in plan.names], lr=lr)
    task = Denoise(model, Objective(model.target, model.alphas_cumprod))
    for step in range(2):
        task.loss(task.encode(batch_of(step))).losses.mean().backward()
        grads = [named[name].grad for name in plan.names]
        assert all(grad is None or bool(grad.isfinite().all()) for grad in grads)
        assert not every or all(grad is not None for grad in grads)
        optimizer.step()
        optimizer.zero_grad()
    tensors = {name: named[name].detach() for name in plan.names}
    own = {"backbone": str(folder), "methods": tree, **header}
    save_adapter(path, tensors, tree=own, identity=model.identity())
    return path
