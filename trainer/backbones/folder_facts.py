"""What the small files of a pipeline folder say of a backbone before a weight is read: its path,
and which sides of pictures it takes. Importing this imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.backbones.clip_frames import ClipFrames
from trainer.backbones.families import find_family
from trainer.backbones.folder_check import is_flow

if TYPE_CHECKING:
    from trainer.backbones.spec import BackboneSpec

SCHEDULER_FILE = "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class FolderFacts:
    """flow: whether it was trained on the flow path, and not on a VP path. multiple: pixels that
    divide the sides of all pictures it takes: the VAE's per latent, times the latents of a token of
    a transformer. frames: of clips and of their latents. divisor: the VAE's pixels alone. side: of
    the pictures it was trained on, in pixels; None where no file says. distilled: why plain
    training would spoil it."""

    flow: bool
    multiple: int
    frames: ClipFrames
    divisor: int
    side: int | None = None
    distilled: str | None = None


def facts_of(spec: BackboneSpec) -> FolderFacts | None:
    """The facts; None where the files are not on this machine, or are incomplete, which loading
    then says."""
    if spec.folder is None:
        return None
    family = find_family(spec.family)
    vae = read_part(spec, "vae/config.json") if family.vae_parts else {}
    scheduler = read_part(spec, SCHEDULER_FILE)
    denoiser = (
        {} if spec.denoiser is not None else read_part(spec, f"{family.denoiser}/config.json")
    )
    if vae is None or scheduler is None or denoiser is None:
        return None
    pixels = family.latents.pixels(vae)
    if pixels is None:
        return None
    if spec.denoiser is not None:
        made = spec.denoiser.model_dump()
        denoiser = {"patch_size": made.get("patch"), "sample_size": made.get("sample_size")}
    size = family.trained_at(denoiser)
    index = read_part(spec, "model_index.json") or {}
    return FolderFacts(
        is_flow(scheduler),
        pixels * family.patch(denoiser),
        frames=family.latents.frames(vae),
        divisor=pixels,
        side=None if size is None else pixels * size,
        distilled=family.distilled(denoiser, scheduler, index),
    )


def read_part(spec: BackboneSpec, name: str) -> dict[str, Any] | None:
    """A JSON file of the folder, or of its overlay; None where there is none that can be read."""
    path = file_of_part(spec, name)
    try:
        found = None if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def file_of_part(spec: BackboneSpec, name: str) -> Path | None:
    """The path of a file of the folder; a part that the overlay has is taken from there."""
    part, *rest = Path(name).parts
    if part in spec.parts:
        return Path(spec.parts[part], *rest)
    folders = [Path(folder) for folder in (spec.overlay, spec.folder) if folder]
    return next((folder / name for folder in folders if (folder / part).exists()), None)


def check_side(key: str, side: int, multiple: int) -> None:
    """Raises ValueError unless `multiple` divides a side in pixels. key: names it."""
    if side % multiple:
        below, above = side // multiple * multiple, (side // multiple + 1) * multiple
        near = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"{key}={side}: this backbone takes sides in multiples of {multiple} pixels; "
            f"give {near}"
        )
