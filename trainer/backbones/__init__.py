"""Backbones: pretrained diffusion models in diffusers folder layout. One file a family, found by
its name."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.backbones.family import Family

if TYPE_CHECKING:
    from trainer.backbones.backbone import Backbone
    from trainer.backbones.spec import BackboneSpec

DECLARES = "\nFAMILY = Family("  # in the text of a family's file, and of no other


def family_names() -> list[str]:
    """The families there are: the files of this folder that declare one."""
    files = Path(__file__).parent.glob("*.py")
    return sorted(file.stem for file in files if DECLARES in file.read_text(encoding="utf-8"))


def find_family(name: str) -> Family:
    """What the file called `name` declares.

    Raises:
        ValueError: there is no such family.
    """
    if name not in family_names():
        raise ValueError(f"no family is called {name!r}; choose from {', '.join(family_names())}")
    family: Family = importlib.import_module(f"trainer.backbones.{name}").FAMILY
    return family


def family_of(folder: Path) -> str:
    """The family that loads a pipeline folder; if none does, `sd`, whose error explains why."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "sd"
    pipeline = index.get("_class_name") if isinstance(index, dict) else None
    found = (name for name in family_names() if pipeline in find_family(name).pipelines)
    return next(found, "sd")


def load_backbone(spec: BackboneSpec, name: str) -> Backbone:
    """The backbone a spec describes, with nothing frozen, in fp32.

    Raises:
        ValueError: an unknown family, a folder of another family, weights missing or not
        safetensors, or a description of a denoiser that the family does not make.
    """
    from trainer.backbones.backbone import Backbone
    from trainer.backbones.pipeline_folder import PipelineFolder

    try:
        family = find_family(spec.family)
    except ValueError as error:
        raise ValueError(f"backbone {name}: {error}") from None
    if spec.denoiser is not None and type(spec.denoiser) is not family.makes:
        raise ValueError(
            f"backbone {name}: denoiser is a {type(spec.denoiser).__name__}, which the family "
            f"{spec.family} does not make"
        )
    parts = family.load(spec, name)
    backbone = Backbone(name=name, family=spec.family, declared=family, parts=parts)
    if spec.denoiser is None:
        overlay = Path(spec.overlay) if spec.overlay else None
        folder = PipelineFolder(parts.folder, overlay, spec.scratch)
        backbone.published = folder.published(family.denoiser)
    return backbone
