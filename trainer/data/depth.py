"""How near what a picture shows is, pixel by pixel: known exactly of the embedded world, and
otherwise guessed from the pictures, as an input of batches called `depth`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

DEPTH = "depth"  # the name of the input of a batch, (b, frames, 1, H, W)
GREY = 0.12  # of the range of 2: a clip whose colours differ less, as compressed ones do, is grey
DIFFERS = 0.3  # the mean difference of colours from which on a pixel is not the background's
EDGE = 2  # pixels at both ends of a line that show the background


@runtime_checkable
class Layered(Protocol):
    """A dataset that knows how near what its samples show is."""

    def depth(self, index: int) -> Tensor | None:
        """(frames, 1, H, W) in [-1, 1], near is 1, of the picture or clip `image(index)`; None
        where it is not known."""
        ...


def as_depth(near: np.ndarray, side: int) -> Tensor:
    """Nearness (frames, h, w) in [0, 1] as (frames, 1, side, side) in [-1, 1]."""
    import torch
    import torch.nn.functional as F

    maps = torch.from_numpy(near)[:, None].float() * 2 - 1
    return maps if maps.shape[-1] == side else F.interpolate(maps, (side, side), mode="area")


def is_grey(frames: Tensor) -> bool:
    """Whether frames (f, 3, H, W) in [-1, 1] have no colour, and are read as depth."""
    return bool((frames.amax(1) - frames.amin(1)).max() < GREY)


def depth_like(frames: Tensor) -> Tensor:
    """Frames (f, 3, H, W) in [-1, 1] as depth (f, 1, H, W) in [-1, 1], near is 1.

    Grey frames are depth already, bright is near: of a depth network, say. Of others what differs
    from the background is near and all else far. The background of a line is the median colour at
    its two ends in all frames, which is right for plain backgrounds and gradients from top to
    bottom, and a guess for photographs. No depth network is used.
    """
    if is_grey(frames):
        return frames.mean(1, keepdim=True)
    ends = frames[..., :EDGE], frames[..., -EDGE:]
    each = [end.permute(1, 2, 0, 3).flatten(2).median(-1).values for end in ends]  # 3 h
    differs = [(frames - colour[None, :, :, None]).abs().mean(1, keepdim=True) for colour in each]
    return (differs[0].minimum(differs[1]) / DIFFERS).clamp(max=1) * 2 - 1
