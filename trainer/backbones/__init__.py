"""Backbones: pretrained diffusion models in diffusers folder layout. One file a family, found by
its name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.backbones.sd import StableDiffusion
    from trainer.schema import BackboneSpec


def load(spec: BackboneSpec, name: str) -> StableDiffusion:
    """The backbone a spec describes, frozen nowhere and fp32.

    Raises:
        ValueError: an unknown family, a folder of another family, weights missing or not
        safetensors.
    """
    try:
        family = importlib.import_module(f"trainer.backbones.{spec.family}")
    except ModuleNotFoundError:
        raise ValueError(f"backbone {name}: no family is called {spec.family!r}") from None
    backbone: StableDiffusion = family.load(spec, name)
    return backbone
