"""What a family of models declares of its denoiser, so that the seam need not know the family.

Plain names and flags: importing this file does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

Layout = Literal["rows", "tokens"]
Kind = Literal["self", "cross", "joint", "temporal"]


@dataclass(frozen=True)
class ProcessorTraits:
    """How layers with a processor of their own compute, where that is not as diffusers' plain one.

    linear: attention is linear, as `kernels.linear.relu_attention`, and its output is clipped to
    the range of float16; norms_first: q and k are normed before they are split into heads; bare:
    the processor ignores the norms before the projections and the residual that a layer may have;
    rescales: it divides by the layer's `rescale_output_factor`; by_row: it makes an attention call
    for each row of the batch.
    """

    linear: bool = False
    norms_first: bool = False
    bare: bool = False
    rescales: bool = True
    by_row: bool = False


PLAIN = ProcessorTraits()
# diffusers' own processors of the classic `Attention`, which any family may use, and those of other
# layers that compute in another way than most
PROCESSORS = {
    "diffusers.models.attention_processor.AttnProcessor": PLAIN,
    "diffusers.models.attention_processor.AttnProcessor2_0": PLAIN,
    "diffusers.models.attention_processor.MochiAttnProcessor2_0": ProcessorTraits(by_row=True),
}


@dataclass(frozen=True)
class JointTraits:
    """Layers in which image and text attend to each other in one sequence.

    sites: a glob over the layers' names, as in `single_blocks.*`. text_first: whether text comes
    before the image in the sequence. counts: where a layer gets both as one sequence, which of the
    two numbers of tokens is known: of the `text`, from the `encoder_hidden_states` the denoiser is
    called with, or of the `image`, from the size of the latents; that is filled up to a multiple.
    """

    sites: str
    text_first: bool
    counts: Literal["text", "image"] = "text"
    multiple: int = 1


@dataclass(frozen=True)
class DenoiserTraits:
    """Where in the denoisers of a family things are, by names of modules; empty where there is no
    such module.

    processors: how layers compute, by the full name of their processor's class; each must be hosted
    bit-equal. time_embedding: the module whose output is the embedding of the timestep, (rows,
    width); time_width: the linear layer inside it whose `out_features` is that width. input: the
    convolution that reads the latent. layout: how the denoiser takes clips: as `rows`, every frame
    a row of the batch, or as `tokens` of space and time, the frames an axis (b, c, f, h, w).
    joint: the layers in which image and text share a sequence, the first that matches counts; none
    for a model that has no such layers, None where nothing is known of them. kinds: what layers
    are, by globs over their names, where their class does not tell.
    patch: latents along an edge of a token, where the model's config has another number or none.
    """

    processors: Mapping[str, ProcessorTraits] = field(default_factory=dict)
    time_embedding: str = ""
    time_width: str = ""
    input: str = ""
    layout: Layout = "rows"
    joint: tuple[JointTraits, ...] | None = None
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    patch: int | None = None

    def joint_at(self, site: str) -> JointTraits | None:
        """What is declared of the layer of this name as joint attention; None for nothing."""
        return next((item for item in self.joint or () if fnmatchcase(site, item.sites)), None)

    def kind_at(self, site: str) -> Kind | None:
        """The declared kind of the layer of this name; None for none."""
        return next((kind for glob, kind in self.kinds.items() if fnmatchcase(site, glob)), None)

    def of_processor(self, processor: object) -> ProcessorTraits | None:
        """The traits of a layer's own processor; None for one that is not declared."""
        kind = type(processor)
        name = f"{kind.__module__}.{kind.__qualname__}"
        return PROCESSORS.get(name) or self.processors.get(name)


UNDECLARED = DenoiserTraits()  # of a denoiser whose family is not known
