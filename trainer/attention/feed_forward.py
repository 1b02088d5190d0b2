"""The stages around the feed-forward layer of the block around a site: `feed` and `fed`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from trainer.attention.call import SiteCall
from trainer.attention.stages import StageHost

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class FeedRun:
    """The hooks of one feed-forward layer. Both stages of one run have the same `SiteCall`."""

    def __init__(self, hosted: StageHost) -> None:
        self.hosted = hosted
        self.call: SiteCall | None = None  # while the layer runs

    def hooks(self, layer: nn.Module) -> list[RemovableHandle]:
        return [
            layer.register_forward_pre_hook(self.before),
            layer.register_forward_hook(self.after),
        ]

    def before(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = args
        self.call = SiteCall(self.hosted.site, self.hosted.holder.ctx)
        for op in self.hosted.stages["feed"]:
            x = op.feed(x, self.call)
        return (x, *rest)

    def after(self, layer: nn.Module, args: object, output: Any) -> Any:
        call, self.call = self.call, None
        for op in self.hosted.stages["fed"]:
            output = op.fed(output, call)
        return output


def feed_forward_of(block: nn.Module) -> nn.Module | None:
    """The layer of a block that computes every token by itself, as `ff`; None where it has none, or
    one that reads neighbours, as a convolution does."""
    from diffusers.models.attention import FeedForward

    layer = getattr(block, "ff", None)
    return layer if isinstance(layer, FeedForward) else None
