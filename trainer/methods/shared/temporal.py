"""What all methods that insert layers through time into a model of images have in common: who
trains them, and where trained ones come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from trainer.methods.method import Edit, Method

if TYPE_CHECKING:
    from torch import nn

    from trainer.attention.anatomy import InsertionPoint
    from trainer.attention.insertion import Item
    from trainer.attention.model import AttentionModel
    from trainer.attention.sites import Site


MaxFrames = Annotated[
    int, Field(gt=0, description="the longest clip, in frames, that positions are learned for")
]
KernelFrames = Annotated[int, Field(gt=0, description="frames that a convolution sees")]
DefaultRate = Annotated[
    float, Field(gt=0, description="frames a second of clips whose rate is not given")
]


class Temporal(Method):
    """Methods that insert layers through time. Layers that train keep their precision; those of
    train=false stay as in `weights`, which an adapter then names and does not hold: another method
    trains beside or inside them, as LoRA on `sites=temporal` does, and `nf4` stores them in 4
    bits."""

    inflates: ClassVar[bool] = True

    train: bool = Field(True, description="whether the inserted layers train")
    weights: str | None = Field(
        None,
        description="where trained layers are read from: a run folder, an adapter, the name of one "
        "that ships, or the folder of a diffusers MotionAdapter; null starts new ones, which add "
        "nothing at first",
    )

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
        op_of: Callable[[Site], Any] | None = None,
        spelling: Callable[[str], str] | None = None,
    ) -> Edit:
        """Inserts the blocks, installs `op_of(site)` on every attention inside them, and reads the
        weights, whose names `spelling` turns into ours."""
        from trainer.attention.insert import ASPECT, insert
        from trainer.ops.temporal.weights import read_weights

        sites = insert(model, items, owner=self.name, trains=self.train)
        if op_of is not None:
            _install(model, sites, op_of)
        paths = [item.path for item in items]
        if self.weights is not None:
            read_weights(model, paths, where=self.weights, spelling=spelling)
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


def _install(model: AttentionModel, names: Sequence[str], op_of: Callable[[Site], Any]) -> None:
    """Installs `op_of(site)` on the sites of these names, in their precision."""
    from torch import nn

    for site in model.sites:
        if site.name in names:
            op = op_of(site)
            if isinstance(op, nn.Module):
                op.to(site.projection("q").weight)
            model.host.install(op, [site])


class Attending(Temporal):
    """Methods whose inserted layers attend over frames."""

    heads: int = Field(
        8, gt=0, description="heads of the attention over frames; they divide the width of a block"
    )

    def check_heads(self, width: int) -> int:
        """`heads`; ValueError where they do not divide a width."""
        if width % self.heads:
            raise ValueError(
                f"heads={self.heads} does not divide {width}, the width of a block; give a divisor"
            )
        return self.heads


class Relative(Attending):
    """Methods whose attention over frames tells them apart by their signed distance."""

    relative: Literal["bias", "vectors"] = Field(
        "vectors",
        description="what is learned for each distance: vectors added to keys and values (Shaw et "
        "al., arXiv 1803.02155), or a bias added to the scores of each head",
    )
    reach: int = Field(
        32, gt=0, description="frames up to which distances differ; beyond it all are alike"
    )

    def distances(self) -> Callable[[Site], nn.Module]:
        """The op of a site inside the layers."""
        from trainer.ops.temporal.relative import RELATIVE

        def op(site: Site) -> nn.Module:
            return RELATIVE[self.relative](site, self.reach, self.name)

        return op


class PseudoThreeD(Attending):
    """Methods with a convolution over frames after every spatial one, and attention over frames
    after every spatial attention."""

    kernel: KernelFrames = 3
    max_frames: MaxFrames = 32

    def layers(self, model: AttentionModel, positions: str) -> list[Item]:
        """positions: how the attention tells frames apart, see `ops/temporal/layers.py`."""
        from trainer.attention.anatomy import attention_points, convolution_points
        from trainer.ops.temporal.layers import TemporalAttention, TemporalConv

        items = []
        for point in convolution_points(model.denoiser):
            items.append(item(point, "temporal_convs", TemporalConv(point.width, self.kernel)))
        for point in attention_points(model.denoiser):
            block = TemporalAttention(
                point.width,
                heads=self.check_heads(point.width),
                owner=self.name,
                positions=positions,
                max_frames=self.max_frames,
            )
            items.append(item(point, "temporal", block))
        return items


def item(
    point: InsertionPoint, name: str, block: nn.Module, stills: bool = False, many: bool = True
) -> Item:
    """`block` at an insertion point, under the module around it as `name`, or as one of a list of
    that name where several insertion points may be in that module."""
    from trainer.attention.insertion import Item

    path = ".".join(filter(None, (point.parent, name, str(point.index) if many else "")))
    return Item(point.after, path, block, stills=stills, checkpoint=not point.reruns)


def frame_rate(model: AttentionModel, default: float) -> Item:
    """The embedding of frames a second, added to that of the timestep."""
    from trainer.attention.anatomy import time_point
    from trainer.ops.temporal.layers import FrameRate

    point = time_point(model.denoiser, model.host.traits)
    return item(point, "frame_rate", FrameRate(point.width, default), many=False)
