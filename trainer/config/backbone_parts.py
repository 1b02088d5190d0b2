"""Where the parts of a backbone come from where they are not all in one folder: a checkpoint in one
file, and parts that a recipe takes from elsewhere."""

from __future__ import annotations

from pathlib import Path

from trainer.backbones.families import family_of, find_family
from trainer.backbones.single_file import layout_folder, with_vocabulary
from trainer.backbones.spec import BackboneSpec, PartsSpec
from trainer.config.schema import RecipeError


def one_file(file: Path, parts: PartsSpec) -> BackboneSpec:
    """The spec of a checkpoint in one file; raises `RecipeError` where something is not found."""
    try:
        folder = layout_folder(file, parts.config)
        overlay = with_vocabulary(folder, file, parts.tokenizer)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    over = None if overlay is None else str(overlay)
    return BackboneSpec(family=family_of(folder), folder=str(folder), overlay=over, file=str(file))


def with_parts(spec: BackboneSpec, name: str, given: PartsSpec) -> BackboneSpec:
    """The spec with the parts that a recipe takes from elsewhere."""
    if given.config is not None and spec.file is None:
        raise RecipeError(
            f"parts.config={given.config} is for a checkpoint in one file, and backbone={name} is "
            "none; leave it out"
        )
    family, found = find_family(spec.family), {}
    own = {"denoiser": family.denoiser}
    own |= {part: part for part in (*family.text_encoders, *family.vae_parts)}
    if spec.file is None and family.text_encoders:  # of one file it is in the overlay
        own["tokenizer"] = "tokenizer"
    for key, value in given.model_dump(exclude_none=True).items():
        if key in own:
            found[own[key]] = str(_folder_of(Path(value).expanduser(), own[key], key=key))
        elif key not in ("config", "tokenizer"):
            raise RecipeError(f"parts.{key}: backbone {name} has no such part; leave it out")
    return spec.model_copy(update={"parts": found}) if found else spec


def _folder_of(place: Path, part: str, *, key: str) -> Path:
    """A part's own folder: the one that is named, or the part of a pipeline there."""
    file = "tokenizer_config.json" if part == "tokenizer" else "config.json"
    found = next((each for each in (place / part, place) if (each / file).is_file()), None)
    if found is None:
        raise RecipeError(
            f"parts.{key}={place}: neither a folder of {part} nor of a pipeline with one: {file} "
            "is missing"
        )
    return found
