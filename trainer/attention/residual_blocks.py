"""The residual blocks of a U-Net, and what they make before their skip is added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.attention.selector import parse_selector
from trainer.attention.sites import FORWARD_ORDER, unet_block, unet_divisors, unet_place

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainer.attention.context import StepContext
    from trainer.attention.host import Host
    from trainer.attention.sites import Place

Change = Callable[["Tensor", "ResidualBlock", "StepContext"], "Tensor"]


@dataclass(frozen=True)
class ResidualBlock:
    """One block of two convolutions; the rest is as of a `Site`, and a selector chooses it alike.
    Its `depth` is its position among the residual blocks in forward order."""

    name: str
    module: nn.Module
    place: Place
    depth: float
    divisor: int | None
    kind: str = "residual"


def residual_blocks(denoiser: nn.Module, selector: str) -> list[ResidualBlock]:
    """Those that a selector chooses, in forward order.

    Raises:
        ValueError: there is none.
    """
    divisors = unet_divisors(denoiser)
    found = {
        name: module
        for name, module in denoiser.named_modules()
        if divisors and hasattr(module, "conv2") and hasattr(module, "norm2")
    }
    if not found:
        raise ValueError(
            f"{type(denoiser).__name__} has no residual blocks, as U-Nets have; leave their "
            "features out, or choose another backbone"
        )
    names = sorted(found, key=lambda name: FORWARD_ORDER.index(unet_place(name)))
    last = max(len(names) - 1, 1)
    every = [
        ResidualBlock(
            name=name,
            module=found[name],
            place=unet_place(name),
            depth=at / last,
            divisor=divisors.get(unet_block(name)),
        )
        for at, name in enumerate(names)
    ]
    chosen = [block for block in every if parse_selector(selector).matches(block)]
    if not chosen:
        raise ValueError(
            f"the selector {selector!r} matches no residual block; there are "
            f"{', '.join(block.name for block in every)}"
        )
    return chosen


def hook_residuals(host: Host, blocks: Sequence[ResidualBlock], change: Change) -> list[Any]:
    """Calls `change` with what the second convolution of each block makes (b, c, h, w), and puts
    what it returns in its place, until the handles that are returned are removed."""
    handles = []
    for block in blocks:
        layer: Any = block.module.conv2

        def hook(_: nn.Module, __: Any, made: Tensor, block: ResidualBlock = block) -> Tensor:
            return change(made, block, host.holder.ctx)

        handles.append(layer.register_forward_hook(hook))
    return handles
