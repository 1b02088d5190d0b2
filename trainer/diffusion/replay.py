"""An inverted source seen once more: the network runs over the latents that inversion passed, so
that ops of a method keep what they see, as keys and values, in a bank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from trainer.attention.context import StepContext
from trainer.attention.rows import Rows
from trainer.diffusion.edit_source import SOURCE, SOURCE_COND, EditSource
from trainer.diffusion.predict import predict_groups

if TYPE_CHECKING:
    from trainer.backbones.backbone import Backbone


@torch.no_grad()
def replayed(
    backbone: Backbone, source: EditSource, scheduler: Any, *, steps: Sequence[int]
) -> None:
    """Calls the network at these steps of a scheduler, for one picture in rows `source/cond`.

    Raises:
        ValueError: the source was not inverted, or not in as many steps.
    """
    condition = backbone.encode_prompts([source.prompt])
    if source.tells is not None:
        condition = source.tells(condition)
    for step in steps:
        x_t = source.trajectory.get(step)
        if x_t is None:
            raise ValueError(
                f"the source has no latents before step {step}; invert it with as many steps as "
                "are sampled, as `edit` does with image="
            )
        x_t = x_t.to(backbone.device)
        ctx = StepContext(
            step,
            len(scheduler.timesteps),
            scheduler.timesteps[step],
            frames=len(x_t),
            groups=Rows.of((SOURCE_COND,), len(x_t)),
        )
        told = condition.per_frame(len(x_t))
        predict_groups(backbone, {SOURCE: x_t}, condition=told, ctx=ctx)
