"""Where in a denoiser of images something can be inserted for clips: after its blocks, its spatial
attention, its convolutions, its embedding of time. U-Nets and transformers of diffusers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from trainer.attention.sites import patch_size, scan, unet_divisors

# where the timestep's embedding comes out, and the layer that makes it, by the model's names
TIMES = (
    ("time_embedding", "linear_2"),  # U-Nets
    ("adaln_single.emb", "timestep_embedder.linear_2"),  # PixArt
    ("time_embed.emb", "timestep_embedder.linear_2"),  # Sana
)
# the convolution that reads the latent
INPUTS = ("conv_in", "pos_embed.proj", "patch_embed.proj")


@dataclass(frozen=True)
class InsertionPoint:
    """After the module called `after`, the `index`-th of its kind in `parent`, which puts out
    `width` channels on a grid `divisor` times coarser than the latent (None: not known).

    reruns: gradient checkpointing runs it again with what is inserted after it, or would save
    nothing by that.
    """

    after: str
    parent: str
    index: int
    width: int
    divisor: int | None
    reruns: bool


def block_points(denoiser: nn.Module) -> list[InsertionPoint]:
    """After every pair of a ResNet and its attention, or the ResNet alone, of a U-Net; after every
    block of a transformer.

    Raises:
        ValueError: the denoiser is neither.
    """
    if not is_unet(denoiser):
        return _transformer_blocks(denoiser)
    divisors = unet_divisors(denoiser)
    places = []
    for name, block in _unet_blocks(denoiser):
        attentions = [a for a in getattr(block, "attentions", None) or () if a is not None]
        kind = "attentions" if attentions else "resnets"
        # a middle block has one ResNet more than pairs, before them
        count = len(attentions) or (1 if name == "mid_block" else len(block.resnets))
        for index in range(count):
            width = int(block.resnets[index].out_channels)
            after = f"{name}.{kind}.{index}"
            reruns = not attentions and name != "mid_block"
            places.append(InsertionPoint(after, name, index, width, divisors.get(name), reruns))
    return places


def attention_points(denoiser: nn.Module) -> list[InsertionPoint]:
    """After every spatial attention block; in a transformer, that is every block.

    Raises:
        ValueError: there is none.
    """
    found = [place for place in block_points(denoiser) if ".resnets." not in place.after]
    if not found:
        raise ValueError(
            "this U-Net has no attention to put temporal attention after; choose another backbone"
        )
    return found


def convolution_points(denoiser: nn.Module) -> list[InsertionPoint]:
    """After both 3x3 convolutions of every ResNet of a U-Net; none in a transformer. Those that
    resample, and the 1x1 of shortcuts, do not count."""
    if not is_unet(denoiser):
        return []
    divisors = unet_divisors(denoiser)
    places = []
    for name, block in _unet_blocks(denoiser):
        for number, resnet in enumerate(block.resnets):
            for index, leaf in enumerate(("conv1", "conv2")):
                parent = f"{name}.resnets.{number}"
                width = int(getattr(resnet, leaf).out_channels)
                after = f"{parent}.{leaf}"
                reruns = name != "mid_block" or number > 0
                places.append(
                    InsertionPoint(after, parent, index, width, divisors.get(name), reruns)
                )
    return places


def time_point(denoiser: nn.Module) -> InsertionPoint:
    """After the embedding of the timestep, (rows, width).

    Raises:
        ValueError: it is not where U-Nets, PixArt and Sana have it.
    """
    modules = dict(denoiser.named_modules())
    for after, last in TIMES:
        layer: Any = modules.get(f"{after}.{last}")
        if layer is not None:
            parent = after.rpartition(".")[0]
            return InsertionPoint(after, parent, 0, int(layer.out_features), None, reruns=True)
    raise ValueError(
        f"{type(denoiser).__name__} has no embedding of time that a frame rate could join; choose "
        "a U-Net, PixArt or Sana"
    )


def input_convolution(denoiser: nn.Module) -> tuple[InsertionPoint, nn.Conv2d]:
    """After the convolution that reads the latent, and that convolution.

    Raises:
        ValueError: it is not where U-Nets, DiT, PixArt and Sana have it.
    """
    modules = dict(denoiser.named_modules())
    for after in INPUTS:
        layer = modules.get(after)
        if isinstance(layer, nn.Conv2d):
            parent = after.rpartition(".")[0]
            return InsertionPoint(
                after, parent, 0, layer.out_channels, layer.stride[0], reruns=True
            ), layer
    raise ValueError(
        f"{type(denoiser).__name__} has no convolution for its input that is known here; choose a "
        "U-Net, DiT, PixArt or Sana"
    )


def norm_groups(denoiser: nn.Module, width: int) -> int:
    """Groups of a group norm over `width` channels: a U-Net's own number, else 32 or the most that
    divide it of those that divide 32."""
    own = getattr(getattr(denoiser, "config", None), "norm_num_groups", None)
    return int(own) if is_unet(denoiser) and own else math.gcd(32, width)


def is_unet(denoiser: nn.Module) -> bool:
    return hasattr(denoiser, "down_blocks") and hasattr(denoiser, "up_blocks")


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
    for site in scan(denoiser):
        block = ".".join(site.name.split(".")[:2])
        widths.setdefault(block, site.projection("q").in_features)
    divisor = patch_size(denoiser)
    names = [f"transformer_blocks.{index}" for index in range(len(found))]
    return [InsertionPoint(name, name, 0, widths[name], divisor, reruns=True) for name in names]
