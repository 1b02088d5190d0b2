"""One call of the denoiser on ordered groups of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from trainer.attention.condition import Condition
from trainer.attention.context import StepContext, use

if TYPE_CHECKING:
    from trainer.backbones.backbone import Backbone


def predict_groups(
    backbone: Backbone, x_t: Mapping[str, Tensor], *, condition: Condition, ctx: StepContext
) -> dict[str, Tensor]:
    """The network's output for each group of `ctx.groups` by its name, (rows, c, h, w).

    x_t: latents by group name or by branch. condition: that of all rows, in their order; ops see it
    in the context. The timestep is that of `ctx`, () or one for each row.
    """
    joined = ctx.groups.join(x_t)
    with use(replace(ctx, condition=condition)):
        output = backbone.predict(joined, ctx.timestep.expand(len(joined)), condition)
    return ctx.groups.split(output)
