"""What a method may know of the model it edits: attention sites, text encoders, parameters. Nothing
of its family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import nn

    from trainer.attention.extras import Extras
    from trainer.attention.further_conditions import FurtherCondition
    from trainer.attention.given_frames import GivenFrames
    from trainer.attention.hooks import SamplingHook
    from trainer.attention.host import Host
    from trainer.attention.input_channels import InputChannels
    from trainer.attention.sites import Site


class AttentionModel(Protocol):
    """A backbone as methods see it. Parameter names start with the part's name, as in
    `unet.conv_in.weight`."""

    denoiser_name: str
    # modules of methods that belong to no site, see `extras.py`
    extras: Extras
    # by method, in the order in which they were applied
    sampling_hooks: dict[str, tuple[SamplingHook, ...]]
    # further channels of the denoiser's input by name, see `input_channels.py`
    input_channels: dict[str, InputChannels]
    # what it is told beside the text by name, see `further_conditions.py`
    further_conditions: dict[str, FurtherCondition]
    # where the frames of a clip are that it is given, and completes; None where it makes all
    given_frames: GivenFrames | None

    @property
    def denoiser(self) -> nn.Module: ...

    @property
    def sites(self) -> list[Site]:
        """The attention layers of the denoiser in forward order; `site.name` is relative to the
        denoiser."""
        ...

    @property
    def host(self) -> Host:
        """The hosted processors, attached at first use."""
        ...

    @property
    def text_encoders(self) -> Mapping[str, nn.Module]:
        """Part name to text encoder, as in `{"text_encoder": CLIPTextModel}`."""
        ...

    @property
    def tokenizers(self) -> Mapping[str, Any]:
        """Part name of a text encoder to its tokenizer."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def requires_grad_(self, requires_grad: bool = True) -> Any: ...


def check_reads_text(model: AttentionModel) -> None:
    """Raises ValueError where a model has no text encoder."""
    if not model.text_encoders:
        raise ValueError(
            "this backbone has no text encoder: it is told a class, and reads no words; leave this "
            "out, or choose a backbone that reads text"
        )
