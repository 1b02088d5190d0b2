"""The values of a backbone's further input channels while it is sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from trainer.attention.input_channels import ChannelInputs, values_of
from trainer.backbones.backbone import Backbone
from trainer.diffusion.sampler_loop import latent_extent
from trainer.diffusion.sampling_settings import Sampling


def channels_for(
    backbone: Backbone,
    seeds: Sequence[int],
    settings: Sampling,
    *,
    inputs: Mapping[str, Tensor],
    x0: Tensor | None = None,
) -> dict[str, Tensor]:
    """What `sample` takes as `channels` for a picture or clip of each seed; none of a backbone
    whose input has no further channels.

    inputs: each (b, ...), by name, as batches have them; x0: clean latents (b f, c, h, w), for
    methods that read those of a given clip.
    """
    if not backbone.input_channels:
        return {}
    frames, height, width = latent_extent(backbone, settings)
    shape = (len(seeds) * frames, backbone.latent_channels, height, width)
    given = ChannelInputs(
        shape,
        frames=frames,
        seeds=tuple(seeds),
        inputs={name: value.to(backbone.device) for name, value in inputs.items()},
        x0=None if x0 is None else x0.to(backbone.device),
        sampling=True,
    )
    return values_of(backbone, given)
