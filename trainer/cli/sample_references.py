"""`sample reference=photo.png reference_scale=0.8`: what models that read reference pictures are
told of some."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.cli.sample_source import file_facts

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.backbones.backbone import Backbone
    from trainer.cli.sample_options import SampleOptions
    from trainer.diffusion.sampling_settings import Sampling

ALIKE = 0.01  # aspect ratios that differ by less are the same
Paths = Path | tuple[Path, ...] | None


def _listed(paths: Paths) -> list[Path]:
    """One path or several as a list of those."""
    if paths is None:
        return []
    return [path.expanduser() for path in (paths if isinstance(paths, tuple) else (paths,))]


def references_of(
    backbone: Backbone, options: SampleOptions, settings: Sampling
) -> dict[str, Tensor]:
    """The inputs of one picture that its reference pictures are: the pictures (1, k, 3, S, S) in
    [-1, 1], where each counts (1, k, H, W), and how much (1,).

    Raises:
        ValueError: a model that reads none, a file that is no picture, or masks that are not as
        many as the pictures or have another shape than what is generated.
    """
    import torch

    from trainer.attention.input_channels import inputs_read
    from trainer.data.references import REFERENCE
    from trainer.ops.ip_adapter import MASKS, STRENGTH

    pictures, masks = _listed(options.reference), _listed(options.reference_mask)
    if not pictures:
        return {}
    read = inputs_read(backbone)
    if REFERENCE not in read:
        raise ValueError(
            f"reference={pictures[0]}: this model reads no reference picture; give an adapter that "
            "was trained with a method that does, as recipe=ip_adapter, or the picture as image="
        )
    _refuse_unread(options, {"reference_scale": STRENGTH, "reference_mask": MASKS}, read)
    found = {REFERENCE: _pictures(pictures)[None], STRENGTH: torch.tensor([options.strength_of])}
    if not masks:
        return found
    if len(masks) != len(pictures):
        raise ValueError(
            f"reference_mask: {len(masks)} masks for {len(pictures)} reference pictures; give one "
            "for each, in their order"
        )
    size = settings.size or (backbone.resolution, backbone.resolution)
    return found | {MASKS: torch.stack([_mask(path, size) for path in masks])[None]}


def _refuse_unread(
    options: SampleOptions, inputs: Mapping[str, str], read: Collection[str]
) -> None:
    """inputs: of options, what they become; read: the inputs that the model reads."""
    for key, name in inputs.items():
        if getattr(options, key) is not None and name not in read:
            raise ValueError(
                f"{key} has no effect: this model reads reference pictures alone; leave it out"
            )


def reference_facts(options: SampleOptions) -> dict[str, Any]:
    """What a picture's file says of its references, so that it can be made again."""
    found: dict[str, Any] = {}
    for key in ("reference", "reference_mask"):
        paths = _listed(getattr(options, key))
        each = [file_facts(key, path) for path in paths]
        for name in each[0] if each else ():
            found[name] = each[0][name] if len(each) == 1 else [own[name] for own in each]
    if options.reference is not None and options.reference_scale is not None:
        found["reference_scale"] = options.reference_scale
    return found


def _pictures(paths: list[Path]) -> Tensor:
    """The centre square of each picture, all as large as the smallest, (k, 3, S, S)."""
    import torch

    from trainer.media.images import cover, read_image, to_tensor

    images = [read_image(path) for path in paths]
    side = min(min(image.size) for image in images)
    return torch.stack([to_tensor(cover(image, (side, side))) for image in images])


def _mask(path: Path, size: tuple[int, int]) -> Tensor:
    """The mask of what is generated, (H, W) in [0, 1], 1 where it is white."""
    from PIL import Image

    from trainer.media.images import read_image, to_tensor

    height, width = size
    image = read_image(path)
    wide, tall = image.size
    if abs(wide / tall * height / width - 1) > ALIKE:
        raise ValueError(
            f"reference_mask={path}: {wide}x{tall} pixels, and the picture has {width}x{height}; "
            "give a mask of its shape, white where the reference counts"
        )
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BOX)
    return to_tensor(image).mean(0) / 2 + 0.5
