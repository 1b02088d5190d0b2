"""The optimisers of packages of their own, each with the options it is used with on diffusion
models. A function makes one for groups of parameters with their lr; options it does not have are
passed over, because the recipe has refused them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor

from trainer.config.optimisers import SCHEDULE_FREE

Groups = list[dict[str, Any]]
Betas = Sequence[float]


def prodigy(
    groups: Groups, *, lr: float, betas: Betas, eps: float, weight_decay: float, **_: Any
) -> torch.optim.Optimizer:
    """Prodigy (arXiv 2306.06101) with what its authors recommend for diffusion models: the bias
    correction, and an estimate that a warm-up does not mislead. All groups must have one lr."""
    from prodigyopt import Prodigy

    with redirect_stdout(io.StringIO()):  # it prints how it decays weights
        made: torch.optim.Optimizer = Prodigy(
            groups,
            lr=lr,
            betas=tuple(betas),
            eps=eps,
            weight_decay=weight_decay,
            use_bias_correction=True,
            safeguard_warmup=True,
        )
    return made


def adafactor(
    groups: Groups, *, lr: float, betas: Betas, weight_decay: float, **_: Any
) -> torch.optim.Optimizer:
    """Adafactor (arXiv 1804.04235) as trainers of diffusion models use it: lr is the step, neither
    relative to the time (`relative_step`) nor to the size of the weights (`scale_parameter`). It is
    that of transformers: PyTorch's always has both, and moves a LoRA, which begins at 0, a thousand
    times less."""
    from transformers.optimization import Adafactor

    made: torch.optim.Optimizer = Adafactor(
        groups,
        lr=lr,
        beta1=betas[0] if betas else None,
        weight_decay=weight_decay,
        scale_parameter=False,
        relative_step=False,
    )
    return made


def lion(
    groups: Groups, *, lr: float, betas: Betas, weight_decay: float, **_: Any
) -> torch.optim.Optimizer:
    """Lion (arXiv 2302.06675)."""
    from lion_pytorch import Lion

    made: torch.optim.Optimizer = Lion(groups, lr=lr, betas=tuple(betas), weight_decay=weight_decay)
    return made


def schedule_free(
    groups: Groups,
    *,
    lr: float,
    betas: Betas,
    eps: float,
    weight_decay: float,
    warmup: int,
    **_: Any,
) -> torch.optim.Optimizer:
    """Schedule-free AdamW (arXiv 2405.15682), in its mode for training: the weights are then y, and
    after `eval()` the average x; see `callbacks/schedule_free.py`."""
    from schedulefree import AdamWScheduleFree

    made = AdamWScheduleFree(
        groups,
        lr=lr,
        betas=tuple(betas),
        eps=eps,
        weight_decay=weight_decay,
        warmup_steps=warmup,
    )
    made.train()
    _count_real_steps(made)
    found: torch.optim.Optimizer = made
    return found


def _count_real_steps(optimizer: Any) -> None:
    """A step without any gradient, one that was skipped, is not counted: its share of the average
    and of the bias correction would be that of a step."""
    counted: list[dict[str, Any]] = []

    def before(*_: Any) -> None:
        counted[:] = [
            {key: group[key] for key in ("k", "weight_sum", "lr_max", "scheduled_lr")}
            for group in optimizer.param_groups
        ]

    def after(*_: Any) -> None:
        groups = optimizer.param_groups
        if all(value.grad is None for group in groups for value in group["params"]):
            for group, had in zip(groups, counted, strict=True):
                group.update(had)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def stored_average(
    weights: Mapping[str, Tensor], optimizer: Mapping[str, Any], order: Sequence[str]
) -> dict[str, Tensor]:
    """The average x of a checkpoint of schedule-free AdamW, whose weights are y = (1 - beta) z +
    beta x; nothing for another optimiser.

    optimizer: its stored state; order: the names of the parameters that the state counts.
    """
    found = {}
    for group in optimizer.get("param_groups", ()):
        if "train_mode" not in group:
            continue
        beta = group["betas"][0]
        for number in group["params"]:
            name, own = order[number], optimizer["state"].get(number, {})
            if "z" in own:
                found[name] = weights[name].lerp(own["z"].to(weights[name]), 1 - 1 / beta)
    return found


def came(
    groups: Groups, *, lr: float, betas: Betas, weight_decay: float, **_: Any
) -> torch.optim.Optimizer:
    """CAME (arXiv 2307.02047)."""
    from came_pytorch.CAME import CAME

    made: torch.optim.Optimizer = CAME(groups, lr=lr, betas=tuple(betas), weight_decay=weight_decay)
    return made


PACKAGED: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "prodigy": prodigy,
    "adafactor": adafactor,
    "lion": lion,
    SCHEDULE_FREE: schedule_free,
    "came": came,
}
