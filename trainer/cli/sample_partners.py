"""Options of `sample` that have no effect because another one is not as they need it, and a folder
that cannot be one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.cli.sample_known import refuse_idle_known

NEEDED = {
    "strength": ("image", "it is how much of a picture changes; give image= too"),
    "structure_level": ("structure", "it is how coarse a structure is made; give structure= too"),
    "reference_scale": ("reference", "it is how much a reference counts; give reference= too"),
    "reference_mask": ("reference", "it is where a reference counts; give reference= too"),
    "condition_guidance": ("reference", "it is by what reference= shows; give reference= too"),
    "before": ("source", "it is of the clip that source= gives; give source= too"),
    "between": ("source", "it is of the clip that source= gives; give source= too"),
    "after": ("source", "it is of the clip that source= gives; give source= too"),
    "null_text": ("source", "it holds what was optimised for a clip; give source= too"),
}

FILES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".mp4")


def as_folder(out: Path) -> Path:
    """`out`; raises ValueError where it is a file, or is called as one."""
    out = out.expanduser()
    if out.is_file():
        raise ValueError("this is a file; name the folder to write into")
    if out.suffix.lower() in FILES and not out.exists():
        raise ValueError(
            "pictures and clips are named by their prompts and seeds; name the folder to write "
            f"into, as in out={out.stem}"
        )
    return out


def refuse_idle_options(given: Mapping[str, Any]) -> None:
    """given: what a user has given, by name; a picture that is made again brings its own beside it.

    Raises:
        ValueError: an option has no effect; the message begins with it.
    """
    refuse_idle_known(given)
    for name, (partner, why) in NEEDED.items():
        if name in given and given.get(partner) is None:
            raise ValueError(f"{name}={given[name]} has no effect: {why}")
    scales = [given.get("guidance"), given.get("true_guidance")]
    if given.get("adapter") is None and scales[1] is None:
        scales[1] = 1.0  # with an adapter, that of its recipe
    known = [scale for scale in scales if isinstance(scale, int | float)]
    if given.get("negative") and len(known) == len(scales) and max(known) <= 1:
        raise ValueError(
            f"negative={given['negative']} has no effect: guidance={known[0]:g} does not guide; it "
            "is for more than 1"
        )
