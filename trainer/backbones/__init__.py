"""Backbones: pretrained diffusion models in diffusers folder layout. One file a family, found by
its name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.backbones.families import family_names as family_names
from trainer.backbones.families import family_of as family_of
from trainer.backbones.families import find_family as find_family

if TYPE_CHECKING:
    from trainer.backbones.backbone import Backbone
    from trainer.backbones.spec import BackboneSpec


def check_backbone_folder(spec: BackboneSpec, name: str) -> None:
    """Checks what can be known of a backbone's folder without loading it, or torch. One that is
    still to be fetched from the hub is checked when it is loaded.

    Raises:
        ValueError: a part is missing, or the family cannot load it.
    """
    if spec.folder is not None:
        from trainer.backbones.folder_check import check_contents
        from trainer.backbones.pipeline_folder import PipelineFolder

        folder = PipelineFolder.of_spec(spec, Path(spec.folder))
        made = spec.denoiser is not None
        check_contents(folder, name, find_family(spec.family), made=made)


def weights_here(spec: BackboneSpec) -> bool:
    """Whether a backbone's weights are on this machine, in a folder or in the hub's cache."""
    from trainer.backbones.pipeline_folder import kept_folder

    return spec.folder is not None or kept_folder(spec) is not None


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
    backbone.max_tokens = spec.max_tokens
    _ = backbone.text_length  # a number of tokens that does not divide is refused here
    if spec.denoiser is None:
        folder = PipelineFolder.of_spec(spec, parts.folder)
        backbone.published = folder.published(family.denoiser)
    return backbone
