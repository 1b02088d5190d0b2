"""Further input channels of a denoiser, which methods own by name: a depth map beside the latents,
say, or the frames of a clip that are known.

    y = conv_in(x_t) + conv(s)    = conv_in of x_t and s side by side, with conv's weights for s

`conv` reads s (rows, n, h, w) as the denoiser's own first convolution reads the latents (rows, c,
h, w), and starts at zero, so that the output is bit-identical at first. It is a module of its own
after the first convolution, which stays as it is: other methods may train that, and an adapter
stores the new weights as `unet.<name>_channels.conv.weight`.

A method describes its channels in an `InputChannels` and inserts what `channel_item` returns:

    def masked(given: ChannelInputs) -> Tensor: ...    # (b f, n, h, w)
    item = channel_item(model, InputChannels("known", self.name, count=9, make=masked))

What trains or samples calls `values_of(model, given)` once for a batch and puts the result into
`StepContext.channels`. A name that is not there is read as zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from trainer.attention.anatomy import input_convolution
from trainer.attention.errors import TakenError
from trainer.attention.insertion import Item, untouched

if TYPE_CHECKING:
    from trainer.attention.context import StepContext
    from trainer.attention.further_conditions import FurtherCondition
    from trainer.attention.host import Host

ASPECT = "the input channels"


@dataclass(frozen=True, eq=False)
class ChannelInputs:
    """What the values of input channels may be calculated from, for b pictures or clips.

    shape (b f, c, h, w): of the latents, the `frames` f of a clip adjacent. seeds: a number for
    each of the b, from which all that is random is drawn; in training it differs at every step.
    inputs: each (b, ...), by the names that `InputChannels.reads` has, and those that a caller
    gives to fix what training draws. x0: the clean latents, of that shape; in training those that
    noise was added to, in sampling those of a given clip, or None. sampling: whether it is for
    sampling, where what training draws has a fixed value unless `inputs` has one.
    """

    shape: tuple[int, int, int, int]
    frames: int
    seeds: Sequence[int]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    x0: Tensor | None = None
    sampling: bool = False


@dataclass(frozen=True, eq=False)
class InputChannels:
    """`count` channels of a name, owned by the method `owner`. make: their values (b f, count, h,
    w), None for zeros. reads: the inputs of a batch, by name, that they are calculated from."""

    name: str
    owner: str
    count: int
    make: Callable[[ChannelInputs], Tensor | None]
    reads: tuple[str, ...] = ()


class HasChannels(Protocol):
    """The part of an `AttentionModel` that matters here."""

    denoiser_name: str
    input_channels: dict[str, InputChannels]
    further_conditions: dict[str, FurtherCondition]

    @property
    def denoiser(self) -> nn.Module: ...

    @property
    def host(self) -> Host: ...


class ChannelConv(nn.Module):
    """y = x + conv(s), for x that the first convolution makes of the latents and s the values of
    the channels of a name; the weights zero at first."""

    def __init__(self, first: nn.Conv2d, name: str, count: int) -> None:
        super().__init__()
        self.name, self.count = name, count
        self.conv = nn.Conv2d(
            count,
            first.out_channels,
            kernel_size=first.kernel_size,  # type: ignore[arg-type]
            stride=first.stride,  # type: ignore[arg-type]
            padding=first.padding,  # type: ignore[arg-type]
            bias=False,
        )
        nn.init.zeros_(self.conv.weight)

    def forward(self, x: Tensor, before: Tensor, ctx: StepContext) -> Tensor:
        values = ctx.channels.get(self.name)
        if values is None:
            return untouched(x, self)
        wanted = (len(before), self.count, *before.shape[2:])
        if values.shape != wanted:
            raise ValueError(
                f"the input channels {self.name!r} have the shape {tuple(values.shape)}, and these "
                f"latents need {wanted}"
            )
        return x + self.conv(values.to(x.dtype)).to(x.dtype)


def channel_item(model: HasChannels, channels: InputChannels) -> Item:
    """The block that reads these channels, to be inserted by `insert`, or as one of the items of
    `Temporal.inserted`. The model knows of the channels from now on.

    Raises:
        TakenError: another method owns channels of that name.
        ValueError: the first layer of the denoiser is no convolution that reads latents, one row
        for each frame.
    """
    other = model.input_channels.get(channels.name)
    if other is not None:
        raise TakenError(f"{model.denoiser_name}.{channels.name}", ASPECT, other.owner)
    model.host.require_rows(f"the input {channels.name!r}")
    point, first = input_convolution(model.denoiser, model.host.traits)
    model.input_channels[channels.name] = channels
    path = ".".join(filter(None, (point.parent, f"{channels.name}_channels")))
    block = ChannelConv(first, channels.name, channels.count)
    return Item(point.after, path, block, stills=True)


def values_of(model: HasChannels, given: ChannelInputs) -> dict[str, Tensor]:
    """The values (b f, n, h, w) of all input channels of a model, by name."""
    made = {name: channels.make(given) for name, channels in model.input_channels.items()}
    return {name: values for name, values in made.items() if values is not None}


def inputs_read(model: HasChannels) -> tuple[str, ...]:
    """The inputs of a batch that the channels and the further conditions of a model are made of, by
    name."""
    reads = [own.reads for own in model.input_channels.values()]
    reads += [own.reads for own in model.further_conditions.values()]
    return tuple(dict.fromkeys(name for each in reads for name in each))
