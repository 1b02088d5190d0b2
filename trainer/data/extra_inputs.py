"""Inputs of a batch beside pictures and captions that a backbone or a method reads: by name, from
the samples, from what a dataset knows of them, or from their pictures."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from trainer.data.crops import CROP, Crop, Cropped, whole
from trainer.data.depth import DEPTH, Layered, depth_like
from trainer.data.latent_cache import frames_of
from trainer.data.references import REFERENCE, Referenced, itself
from trainer.media.images import in_range

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.data.source import Dataset, Sample


def extra_inputs(
    dataset: Dataset,
    indices: Sequence[int],
    reads: Collection[str],
    samples: Sequence[Sample] | None = None,
) -> dict[str, Tensor]:
    """The inputs that are read, each (b, ...), of samples by index; those that nothing is known of
    are left out. samples: as they were read; None where their latents are cached."""
    import torch

    found: dict[str, Tensor] = {}
    drawn: Sequence[Sample | None] = samples or [None] * len(indices)
    for name in reads:
        if name in READERS:
            each = [READERS[name](dataset, *one) for one in zip(indices, drawn, strict=True)]
            known = [value for value in each if value is not None]
            if len(known) == len(each):
                found[name] = torch.stack(known)
    return found


def _crop(dataset: Dataset, index: int, sample: Sample | None) -> Tensor | None:
    import torch

    if sample is not None:
        return torch.tensor(shown_by(dataset, index, sample)).float()
    known = dataset.crop(index) if isinstance(dataset, Cropped) else None
    return None if known is None else torch.tensor(known).float()


def shown_by(dataset: Dataset, index: int, sample: Sample) -> Crop:
    """Which part of its picture a sample shows: as augmentation drew it, as its dataset knows it,
    or all of it."""
    if sample.crop is not None:
        return sample.crop
    return dataset.crop(index) if isinstance(dataset, Cropped) else whole(sample.image)


def _depth(dataset: Dataset, index: int, sample: Sample | None) -> Tensor:
    known = dataset.depth(index) if isinstance(dataset, Layered) else None
    if known is not None:
        return known
    image = dataset.image(index) if sample is None else sample.image
    return depth_like(frames_of(image if image.is_floating_point() else in_range(image)))


def _reference(dataset: Dataset, index: int, sample: Sample | None) -> Tensor:
    known = dataset.reference(index) if isinstance(dataset, Referenced) else None
    if known is not None:
        return known
    image = dataset.image(index)
    return itself(image if image.is_floating_point() else in_range(image))


Reader = Callable[["Dataset", int, "Sample | None"], "Tensor | None"]
READERS: Mapping[str, Reader] = {CROP: _crop, DEPTH: _depth, REFERENCE: _reference}
