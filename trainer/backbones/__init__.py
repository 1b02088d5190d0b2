"""Backbones: pretrained diffusion models in diffusers folder layout. One file a family, found by
its name."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.backbones.backbone import Backbone
    from trainer.backbones.spec import BackboneSpec

# the family of a folder by the pipeline it says it is
FAMILIES = {
    "PixArtAlphaPipeline": "pixart",
    "PixArtSigmaPipeline": "pixart",
    "SanaPipeline": "sana",
}


def family_of(folder: Path) -> str:
    """The family that loads a pipeline folder; `sd`, which says what is wrong, if none does."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "sd"
    return FAMILIES.get(str(index.get("_class_name")), "sd") if isinstance(index, dict) else "sd"


def load_backbone(spec: BackboneSpec, name: str) -> Backbone:
    """The backbone a spec describes, frozen nowhere and fp32.

    Raises:
        ValueError: an unknown family, a folder of another family, weights missing or not
        safetensors.
    """
    try:
        family: Any = importlib.import_module(f"trainer.backbones.{spec.family}")
    except ModuleNotFoundError:
        family = None
    if not hasattr(family, "load"):
        raise ValueError(f"backbone {name}: no family is called {spec.family!r}")
    backbone: Backbone = family.load(spec, name)
    return backbone
