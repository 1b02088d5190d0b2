"""Options of the data source `concept` that have no effect beside others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.data.source_options import idle_tags

# options of photos' captions; and of class images that are generated
PHOTOS = ("recursive", "caption_from", "caption_lines", "shuffle_tags", "keep_tags")
GENERATED = ("prior_prompts", "prior_seed", "prior_steps", "prior_guidance", "prior_sampler")


def idle_of(options: Mapping[str, Any], photos: bool) -> dict[str, str]:
    """Each option without effect, and what it needs. options: all by name; photos: whether some
    concept is a folder of photos."""
    found = idle_tags(options["shuffle_tags"])
    if options["prior_weight"] == 0:
        why = "prior_weight=0 uses no class images"
        found |= dict.fromkeys((*GENERATED, "prior_images", "prior_folder"), why)
    elif options["prior_folder"] is not None:
        why = "the class images are those of data.prior_folder"
        found |= dict.fromkeys((*GENERATED[1:], "prior_images"), why)
        if len(options["prior_prompts"]) > 1:
            found["prior_prompts"] = f"{why}; give one, the caption of those without a .txt"
    elif options["prior_images"] == 0:
        found |= dict.fromkeys(GENERATED, "prior_images=0 generates none")
    if not photos:
        found["validation"] = "a sprite has scenes of its own for that; it is for photos"
        found |= dict.fromkeys(PHOTOS, "a sprite has no files; it is for folders of photos")
        if options["prior_folder"] is None:
            found["on_bad"] = "no file is read; it is for folders of photos"
    return found
