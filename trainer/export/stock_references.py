"""A stock pipeline that has loaded an IP-Adapter, asked as a model of ours is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from torch import Tensor

from trainer.attention.condition import Condition
from trainer.attention.further_conditions import FurtherCondition
from trainer.data.references import REFERENCE
from trainer.media.images import to_pil

STOCK = "stock_references"


class StockReferences:
    """base: whose latents, prompts and arguments of the denoiser are asked for."""

    def __init__(self, base: Any, pipe: Any) -> None:
        self.base, self.pipe = base, pipe
        self.denoiser_name = base.denoiser_name
        own = FurtherCondition(STOCK, STOCK, (REFERENCE,), encode=_encode)
        self.further_conditions = {STOCK: own}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The U-Net's output (b, c, h, w), told of the pictures as its pipeline does."""
        arguments = self.base.inputs(x_t, t, condition)
        added = {**(arguments.get("added_cond_kwargs") or {}), **_told(condition)}
        output: Tensor = self.pipe.unet(**{**arguments, "added_cond_kwargs": added}).sample
        return output[:, : x_t.shape[1]]


def has_loaded(pipe: Any) -> bool:
    """Whether a stock pipeline has loaded an IP-Adapter."""
    projection = getattr(pipe.components.get("unet"), "encoder_hid_proj", None)
    return isinstance(projection, MultiIPAdapterImageProjection)


def _told(condition: Condition) -> dict[str, list[Tensor]]:
    return {"image_embeds": [condition.further[STOCK]]}


def _encode(model: Any, inputs: Mapping[str, Tensor], present: Tensor) -> dict[str, Tensor]:
    """As the pipeline encodes pictures (b, k, 3, H, W): (b, k, ...)."""
    pictures, pipe = inputs[REFERENCE], model.pipe
    (layer,) = pipe.unet.encoder_hid_proj.image_projection_layers
    patches = type(layer).__name__ != "ImageProjection"
    images = [to_pil(picture) for picture in pictures.flatten(0, 1)]
    seen, none = pipe.encode_image(images, pipe.device, 1, output_hidden_states=patches)
    kept = present.repeat_interleave(pictures.shape[1])
    found = torch.where(kept.view(-1, *[1] * (seen.ndim - 1)), seen, none)
    return {STOCK: found.unflatten(0, (len(pictures), -1))}
