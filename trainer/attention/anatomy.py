"""The points in a denoiser of images after which blocks for clips can be inserted: after its
blocks, its spatial attention, its convolutions, its timestep embedding. For U-Nets and transformers
of diffusers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from trainer.attention.denoiser_traits import DenoiserTraits
from trainer.attention.sites import Site, patch_size, scan, unet_divisors


@dataclass(frozen=True)
class InsertionPoint:
    """A point after the module called `after`, the `index`-th of its kind in `parent`, whose output
    has `width` channels on a grid `divisor` times coarser than the latent (None: not known).

    reruns: gradient checkpointing runs the module again together with what is inserted after it, or
    would save no memory by doing so.
    """

    after: str
    parent: str
    index: int
    width: int
    divisor: int | None
    reruns: bool


def block_points(denoiser: nn.Module) -> list[InsertionPoint]:
    """The points after every pair of a ResNet and its attention, or after the ResNet alone, of a
    U-Net; after every block of a transformer.

    Raises:
        ValueError: the denoiser is neither.
    """
    if not is_unet(denoiser):
        return _transformer_blocks(denoiser)
    divisors = unet_divisors(denoiser)
    points = []
    for name, block in _unet_blocks(denoiser):
        attentions = [a for a in getattr(block, "attentions", None) or () if a is not None]
        kind = "attentions" if attentions else "resnets"
        # a middle block has one more ResNet, before its pairs
        count = len(attentions) or (1 if name == "mid_block" else len(block.resnets))
        for index in range(count):
            width = int(block.resnets[index].out_channels)
            after = f"{name}.{kind}.{index}"
            reruns = not attentions and name != "mid_block"
            points.append(
                InsertionPoint(
                    after=after,
                    parent=name,
                    index=index,
                    width=width,
                    divisor=divisors.get(name),
                    reruns=reruns,
                )
            )
    return points


def attention_points(denoiser: nn.Module) -> list[InsertionPoint]:
    """The points after every spatial attention block; in a transformer, after every block.

    Raises:
        ValueError: there is none.
    """
    found = [point for point in block_points(denoiser) if ".resnets." not in point.after]
    if not found:
        raise ValueError(
            "this U-Net has no attention to put temporal attention after; choose another backbone"
        )
    return found


def convolution_points(denoiser: nn.Module) -> list[InsertionPoint]:
    """The points after both 3x3 convolutions of every ResNet of a U-Net; none in a transformer.
    Convolutions that resample, and those of shortcuts, are left out."""
    if not is_unet(denoiser):
        return []
    divisors = unet_divisors(denoiser)
    points = []
    for name, block in _unet_blocks(denoiser):
        for number, resnet in enumerate(block.resnets):
            for index, leaf in enumerate(("conv1", "conv2")):
                parent = f"{name}.resnets.{number}"
                width = int(getattr(resnet, leaf).out_channels)
                after = f"{parent}.{leaf}"
                reruns = name != "mid_block" or number > 0
                points.append(
                    InsertionPoint(
                        after=after,
                        parent=parent,
                        index=index,
                        width=width,
                        divisor=divisors.get(name),
                        reruns=reruns,
                    )
                )
    return points


def time_point(denoiser: nn.Module, traits: DenoiserTraits) -> InsertionPoint:
    """The point after the embedding of the timestep, (rows, width).

    Raises:
        ValueError: the denoiser's family declares none, or it is not there.
    """
    after = traits.time_embedding
    layer: Any = _module(denoiser, traits.time_width)
    if layer is None:
        raise ValueError(
            f"{type(denoiser).__name__} declares no timestep embedding that a frame rate could "
            "be added to; choose another backbone"
        )
    return InsertionPoint(
        after=after,
        parent=after.rpartition(".")[0],
        index=0,
        width=int(layer.out_features),
        divisor=None,
        reruns=True,
    )


def input_convolution(
    denoiser: nn.Module, traits: DenoiserTraits
) -> tuple[InsertionPoint, nn.Conv2d]:
    """The point after the convolution that reads the latent, and that convolution.

    Raises:
        ValueError: the denoiser's family declares none, or it is no 2-D convolution.
    """
    after = traits.input
    layer = _module(denoiser, after)
    if not isinstance(layer, nn.Conv2d):
        raise ValueError(
            f"{type(denoiser).__name__} declares no convolution that reads its input; choose "
            "another backbone"
        )
    point = InsertionPoint(
        after=after,
        parent=after.rpartition(".")[0],
        index=0,
        width=layer.out_channels,
        divisor=layer.stride[0],
        reruns=True,
    )
    return point, layer


def _module(denoiser: nn.Module, name: str) -> nn.Module | None:
    """The module called so; None where the name is empty or there is none."""
    return dict(denoiser.named_modules()).get(name) if name else None


def norm_groups(denoiser: nn.Module, width: int) -> int:
    """The number of groups of a group norm over `width` channels: a U-Net's own number, otherwise
    the greatest common divisor of the width and 32."""
    own = getattr(getattr(denoiser, "config", None), "norm_num_groups", None)
    return int(own) if is_unet(denoiser) and own else math.gcd(32, width)


def is_unet(denoiser: nn.Module) -> bool:
    return hasattr(denoiser, "down_blocks") and hasattr(denoiser, "up_blocks")


def refuse_joint(denoiser: nn.Module, sites: Iterable[Site]) -> None:
    """Raises `ValueError` where image and text share a sequence."""
    if any(site.kind == "joint" for site in sites):
        raise ValueError(
            f"the blocks of {type(denoiser).__name__} return image and text, and layers through "
            "time take images alone; choose a backbone without joint attention"
        )


def _unet_blocks(denoiser: nn.Module) -> Iterator[tuple[str, Any]]:
    unet: Any = denoiser
    for name in ("down_blocks", "up_blocks"):
        for index, block in enumerate(getattr(unet, name)):
            yield f"{name}.{index}", block
        if name == "down_blocks" and getattr(unet, "mid_block", None) is not None:
            yield "mid_block", unet.mid_block


def _transformer_blocks(denoiser: nn.Module) -> list[InsertionPoint]:
    found = getattr(denoiser, "transformer_blocks", None)
    if not isinstance(found, nn.ModuleList):
        raise ValueError(
            f"{type(denoiser).__name__} is neither a U-Net nor a transformer with one list of "
            "blocks; choose another backbone"
        )
    widths: dict[str, int] = {}
    sites = scan(denoiser)
    refuse_joint(denoiser, sites)
    for site in sites:
        block = ".".join(site.name.split(".")[:2])
        widths.setdefault(block, site.projection("q").in_features)
    divisor = patch_size(denoiser)
    names = [f"transformer_blocks.{index}" for index in range(len(found))]
    return [
        InsertionPoint(
            after=name, parent=name, index=0, width=widths[name], divisor=divisor, reruns=True
        )
        for name in names
    ]
