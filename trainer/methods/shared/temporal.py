"""What all methods that insert layers through time into a model of images have in common: who
trains them, and where trained ones come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from trainer.methods.method import Edit, Method

if TYPE_CHECKING:
    from torch import nn

    from trainer.attention.anatomy import InsertionPoint
    from trainer.attention.insertion import Item
    from trainer.attention.model import AttentionModel
    from trainer.attention.sites import Site


class Temporal(Method):
    """train: whether the inserted layers train; weights: where trained ones are read from, a run
    folder or adapter of ours or the folder of a diffusers MotionAdapter; null starts new ones,
    which add nothing at first.

    With train=false they stay as in `weights`, which an adapter then names and does not hold:
    another method trains beside or inside them, as LoRA on `sites=temporal` does, and `nf4` stores
    them in 4 bits. Layers that train keep their precision.
    """

    kind: ClassVar[Literal["structure"]] = "structure"
    train: bool = True
    weights: str | None = None

    @model_validator(mode="after")
    def _learns_somewhere(self) -> Temporal:
        if not self.train and self.weights is None:
            raise ValueError(
                "train=false without weights leaves layers that add nothing; name trained ones, as "
                "in weights=runs/animatediff/mine"
            )
        return self

    def inserted(
        self,
        model: AttentionModel,
        items: Sequence[Item],
        owner: str,
        op_of: Callable[[Site], Any] | None = None,
        spelling: Callable[[str], str] | None = None,
    ) -> Edit:
        """Inserts the blocks, puts `op_of(site)` on every attention inside them, and reads the
        weights, whose names `spelling` makes ours."""
        from torch import nn

        from trainer.attention.insert import ASPECT, insert
        from trainer.ops.temporal.weights import read_weights

        sites = insert(model, items, owner, self.train)
        if op_of is not None:
            for site in model.sites:
                if site.name in sites:
                    op = op_of(site)
                    if isinstance(op, nn.Module):
                        op.to(site.projection("q").weight)
                    model.host.install(op, [site])
        paths = [item.path for item in items]
        if self.weights is not None:
            read_weights(model, paths, self.weights, spelling)
        part = model.denoiser_name
        inside = tuple(f"{part}.{path}." for path in paths)
        names = [name for name, _ in model.named_parameters() if name.startswith(inside)]
        trains = tuple(names) if self.train else ()
        return Edit(
            sites=tuple(sites),
            claims=(
                *((f"{part}.{item.after}", ASPECT) for item in items),
                *((name, "weight") for name in trains),
            ),
            trains=trains,
        )


class Attending(Temporal):
    """Options of `Temporal`; heads: of the attention over frames."""

    heads: int = Field(8, gt=0)

    def check_heads(self, width: int) -> int:
        """`heads`; ValueError where they do not divide a width."""
        if width % self.heads:
            raise ValueError(
                f"heads={self.heads} does not divide {width}, the width of a block; give a divisor"
            )
        return self.heads


class Relative(Attending):
    """Options of `Attending`; relative: how this attention tells frames apart by their distance, by
    `vectors` added to keys and values or by a `bias` added to scores; reach: frames apart up to
    which distances are told apart."""

    relative: Literal["bias", "vectors"] = "vectors"
    reach: int = Field(32, gt=0)

    def distances(self, owner: str) -> Callable[[Site], nn.Module]:
        """The op of a site inside the layers."""
        from trainer.ops.temporal.relative import RELATIVE

        def op(site: Site) -> nn.Module:
            return RELATIVE[self.relative](site, self.reach, owner)

        return op


class PseudoThreeD(Attending):
    """Options of `Attending`; kernel: frames a convolution sees; max_frames: the longest clip there
    are places for.

    A convolution over frames after every spatial one, and attention over frames after every spatial
    attention.
    """

    kernel: int = Field(3, gt=0)
    max_frames: int = Field(32, gt=0)

    def layers(self, model: AttentionModel, owner: str, positions: str) -> list[Item]:
        """positions: how the attention tells frames apart."""
        from trainer.attention.anatomy import attention_points, convolution_points
        from trainer.ops.temporal.layers import TemporalAttention, TemporalConv

        items = []
        for place in convolution_points(model.denoiser):
            items.append(item(place, "temporal_convs", TemporalConv(place.width, self.kernel)))
        for place in attention_points(model.denoiser):
            heads = self.check_heads(place.width)
            block = TemporalAttention(place.width, heads, owner, positions, self.max_frames)
            items.append(item(place, "temporal", block))
        return items


def item(
    place: InsertionPoint, name: str, block: nn.Module, stills: bool = False, many: bool = True
) -> Item:
    """`block` after a place, under the module around it as `name`, or as one of a list of that name
    where several places may be in that module."""
    from trainer.attention.insertion import Item

    path = ".".join(filter(None, (place.parent, name, str(place.index) if many else "")))
    return Item(place.after, path, block, stills, checkpoint=not place.reruns)


def frame_rate(model: AttentionModel, default: float) -> Item:
    """The embedding of frames a second, added to that of the timestep."""
    from trainer.attention.anatomy import time_point
    from trainer.ops.temporal.layers import FrameRate

    place = time_point(model.denoiser, model.host.traits)
    return item(place, "frame_rate", FrameRate(place.width, default), many=False)
