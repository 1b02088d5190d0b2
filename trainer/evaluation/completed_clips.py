"""Clips that a model completes, beside the true ones: how near its new frames come, and how near
the neighbours of a frame come when they are blended."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from trainer.attention.given_frames import GivenFrames
from trainer.backbones.backbone import Backbone
from trainer.diffusion.given_clip import GivenClip, complete
from trainer.diffusion.sampling_settings import Sampling

MOST = 126.0  # dB
MADE, BLENDED = "PSNR of new frames", "PSNR of neighbours blended"


def complete_all(
    model: Backbone,
    clips: Tensor,
    captions: Sequence[str],
    *,
    settings: Sampling,
    seed: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Each of the clips (n, f, 3, H, W) from those of its frames that the model is to be given, by
    its caption and a seed of its own. advance: is told of the frames of each."""
    where = model.given_frames
    assert where is not None, "only a model that completes clips is asked"
    found = []
    for number, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        given = GivenClip.of_pictures(model, clip, where)
        made = complete(model, [caption], [seed + number], given=given, settings=settings)
        found.append(made.cpu())
        advance(len(clip))
    return torch.stack(found)


def new_frames(where: GivenFrames, frames: int) -> list[int]:
    """The frames whose likeness counts: those between two given ones, or where there are none, all
    that are not given; all, where every frame is given with fewer pixels."""
    places = where.places(frames)
    others = [i for i in range(frames) if i not in places]
    return [i for i in others if places[0] < i < places[-1]] or others or list(range(frames))


def blended(clip: Tensor, places: Sequence[int], frames: Sequence[int]) -> Tensor:
    """Frames of a clip (f, 3, H, W), each as a mixture of the nearest of `places` before and after
    it, by their distance: (n, 3, H, W). Beyond the first or the last place, as that one is."""
    found = []
    for frame in frames:
        before = max((place for place in places if place <= frame), default=places[0])
        after = min((place for place in places if place >= frame), default=places[-1])
        share = (frame - before) / (after - before) if after > before else 0.0
        found.append((1 - share) * clip[before] + share * clip[after])
    return torch.stack(found)


def likeness(where: GivenFrames, made: Tensor, true: Tensor) -> dict[str, float]:
    """The mean over clips (n, f, 3, H, W) of the PSNR of `new_frames`, in dB, and of the blended
    neighbours where there are such frames."""
    chosen, places = new_frames(where, true.shape[1]), list(where.places(true.shape[1]))
    found = {MADE: mean_psnr(made[:, chosen], true[:, chosen])}
    if set(chosen) - set(places):
        mixed = torch.stack([blended(clip, places, chosen) for clip in true])
        found[BLENDED] = mean_psnr(mixed, true[:, chosen])
    return found


def mean_psnr(one: Tensor, other: Tensor) -> float:
    """In dB, of clips (n, ...) in [-1, 1]: the mean over them, of equal ones `MOST` dB."""
    axes = tuple(range(1, one.ndim))
    each = peak_signal_noise_ratio(one, other, data_range=2.0, dim=axes, reduction="none")
    return float(each.clamp(max=MOST).mean())
