"""The denoiser at one step of a sampler: one call for all groups of rows, then guidance and what
hooks make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer.attention.condition import Condition
from trainer.attention.context import StepContext
from trainer.attention.hooks import Prediction, SamplingHook
from trainer.attention.rows import Rows
from trainer.diffusion.edit_source import SOURCE
from trainer.diffusion.guidance import UNCOND, classifier_free, temporal
from trainer.diffusion.objective import Objective, alpha_sigma, from_x0, to_x0
from trainer.diffusion.predict import predict_groups

if TYPE_CHECKING:
    from trainer.backbones.backbone import Backbone
    from trainer.diffusion.sampling_settings import Sampling

IMAGE = "image"  # the unconditional output for frames that do not see each other


@dataclass(frozen=True)
class Predictor:
    """The denoiser at one step of a sampler, with guidance. hooks: of methods and of the sampler,
    in order; source: the latents of the source rows."""

    backbone: Backbone
    settings: Sampling
    scheduler: Any
    condition: Condition
    ctx: StepContext
    hooks: Sequence[SamplingHook] = ()
    source: Tensor | None = None

    @property
    def objective(self) -> Objective:
        return Objective.of(self.backbone)

    def __call__(self, x_t: Tensor) -> Prediction:
        """For latents x_t (b f, c, h, w)."""
        if not any(hook.differentiates for hook in self.hooks):
            return self._predicted(x_t)
        own = torch.is_grad_enabled() and x_t.requires_grad  # of a hook that differentiates itself
        with torch.enable_grad():
            found = self._predicted(x_t if own else x_t.detach().requires_grad_())
        return found if own else found.detached()

    def _predicted(self, x_t: Tensor) -> Prediction:
        settings = self.settings
        scaled = self._scaled(x_t)
        latents = {"target": scaled}
        if self.source is not None:
            latents[SOURCE] = self._scaled(self.source)
        outputs = self._call(latents, self.condition, self.ctx)
        rescale = self.backbone.declared.rescale
        output = classifier_free(
            outputs, settings.cfg_scale, rescale, given_scale=settings.condition_guidance
        )
        source_output = None
        if self.source is not None:
            source_output = classifier_free(outputs, settings.cfg_scale, rescale, branch=SOURCE)
        if settings.temporal_guidance != 1 and self.ctx.frames > 1:
            outputs[IMAGE] = self._as_images(scaled)
            output = temporal(
                output,
                uncond=outputs[UNCOND],
                image=outputs[IMAGE],
                scale=settings.temporal_guidance,
            )
        prediction = Prediction(
            x_t,
            outputs,
            output,
            convert=self._to_x0,
            revert=self._from_x0,
            find_level=partial(self._level, x_t),
            source=self.source,
            source_output=source_output,
        )
        for hook in self.hooks:
            if hook.combine is not None:
                output = hook.combine(prediction, self.ctx)
                prediction = replace(prediction, output=output)
        return prediction

    def _call(
        self, x_t: Mapping[str, Tensor], condition: Condition, ctx: StepContext
    ) -> dict[str, Tensor]:
        return predict_groups(self.backbone, x_t, condition=condition, ctx=ctx)

    def _as_images(self, scaled: Tensor) -> Tensor:
        """The unconditional output where every frame is a picture of its own."""
        rows = self.ctx.rows(UNCOND)
        own = self.condition.rows(rows)
        alone = Rows.of((UNCOND,), len(scaled))
        channels = {name: values[rows] for name, values in self.ctx.channels.items()}
        ctx = StepContext(
            self.ctx.step,
            self.ctx.num_steps,
            self.ctx.timestep,
            groups=alone,
            channels=channels,
        )
        return self._call({"target": scaled}, own, ctx)[UNCOND]

    def _scaled(self, x_t: Tensor) -> Tensor:
        """As the scheduler wants the denoiser's input; not every one has a scale for it."""
        scale = getattr(self.scheduler, "scale_model_input", None)
        scaled: Tensor = x_t if scale is None else scale(x_t, self.ctx.timestep)
        return scaled

    def _to_x0(self, output: Tensor, x_t: Tensor) -> Tensor:
        t = self.ctx.timestep.expand(len(x_t))
        return to_x0(self.objective, output, x_t, t=t)

    def _from_x0(self, x0: Tensor, x_t: Tensor) -> Tensor:
        t = self.ctx.timestep.expand(len(x_t))
        return from_x0(self.objective, x0, x_t, t=t)

    def _level(self, x_t: Tensor) -> tuple[Tensor, Tensor]:
        return alpha_sigma(self.objective, self.ctx.timestep.expand(len(x_t)), x_t.ndim)
