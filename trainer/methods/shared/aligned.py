"""What methods have in common in which frames of a clip read keys and values of other frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from trainer.methods.method import Edit
from trainer.methods.shared.options import SELECTOR, SiteSelector
from trainer.methods.shared.temporal import Temporal, item

if TYPE_CHECKING:
    from trainer.attention.insertion import Item
    from trainer.attention.model import AttentionModel

SOURCE = "the source of keys"
GUIDANCE = "guidance between frames"


def align(model: AttentionModel, selector: str, reads: Sequence[str], owner: str) -> Edit:
    """Frames of a clip read the frames that `reads` names, see `ops/temporal/frame_keys.py`,
    at the self-attention a selector chooses.

    Raises:
        ValueError: it chooses none, or attention of another kind.
    """
    from trainer.attention.sites import require
    from trainer.ops.temporal.frame_keys import FrameKeys

    sites = require(model.sites, selector, "sites")
    for site in sites:
        if site.kind != "self":
            raise ValueError(
                f"{site.name} is {site.kind} attention, which has no keys of a frame; choose "
                "sites=self"
            )
    model.host.install(FrameKeys(reads, owner), sites)
    names = tuple(site.name for site in sites)
    return Edit(names, claims=tuple((f"{model.denoiser_name}.{name}", SOURCE) for name in names))


class Inflated(Temporal):
    """An image model inflated to clips as in Tune-A-Video: frames read other frames in
    self-attention, and attention over the frames of each pixel ends every transformer block, after
    its feed-forward, with as many heads as the block has."""

    sites: SiteSelector = Field(
        "self", description=f"the self-attention whose frames read other frames: {SELECTOR}"
    )

    def inflated(self, model: AttentionModel, reads: Sequence[str]) -> Edit:
        """reads: the frames that each frame reads, see `align`."""
        aligned = align(model, self.sites, reads, owner=self.name)
        added = self.inserted(model, _after_feed_forward(model, self.name))
        return replace(
            added, sites=(*aligned.sites, *added.sites), claims=(*aligned.claims, *added.claims)
        )


def _after_feed_forward(model: AttentionModel, owner: str) -> list[Item]:
    from trainer.attention.anatomy import InsertionPoint
    from trainer.ops.temporal.layers import TemporalAttention

    items = []
    for site in model.sites:
        block = site.name.rpartition(".")[0]
        if site.kind != "self" or block.split(".")[-2:-1] != ["transformer_blocks"]:
            continue
        width = site.projection("q").in_features
        point = InsertionPoint(
            after=block, parent=block, index=0, width=width, divisor=site.divisor, reruns=True
        )
        layer = TemporalAttention(width, site.heads, owner)
        items.append(item(point, "temporal", layer, many=False))
    if not items:
        raise ValueError(
            "this backbone has no transformer block with self-attention to put temporal attention "
            "into; choose another backbone"
        )
    return items
