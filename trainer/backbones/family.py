"""What a family of backbones declares: the record `FAMILY` in its own file beside this one.

Importing such a file does not import torch, since recipes are checked before that: its functions
import what they need when they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from trainer.attention.denoiser_traits import UNDECLARED, DenoiserTraits
from trainer.backbones.latent_form import LatentForm
from trainer.backbones.noise_levels import Extent, NoiseLevels
from trainer.backbones.spec import BackboneSpec, DenoiserSpec
from trainer.backbones.tool_names import ToolNames

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.attention.condition import Condition
    from trainer.backbones.folder_contents import FolderContents

# what the files of a denoiser, a scheduler and a pipeline say, to why training would spoil it
Distilled = Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]], str | None]
# a backbone and the values of one input, one for each row, to fields of the `Condition`
Encoder = Callable[[Any, Any], "Mapping[str, Tensor]"]


class Inputs(Protocol):
    def __call__(
        self, backbone: Any, x_t: Tensor, t: Tensor, condition: Condition
    ) -> dict[str, Any]:
        """The denoiser's own arguments for x_t (b, c, h, w) at timesteps t (b,)."""
        ...


class Output(Protocol):
    def __call__(self, backbone: Any, output: Any, x_t: Tensor) -> Tensor:
        """What the denoiser gave for x_t (b, c, h, w), or clips (b, c, f, h, w), in that form and
        with the sign of the target."""
        ...


class Rescale(Protocol):
    def __call__(self, output: Tensor, cond: Tensor) -> Tensor:
        """What classifier-free guidance made, and the conditional output, both (b, c, h, w), to
        what the scheduler gets."""
        ...


def _check_nothing(facts: FolderContents) -> None:
    pass


def _no_guidance(config: Mapping[str, Any]) -> bool:
    return False


def _not_distilled(
    config: Mapping[str, Any], scheduler: Mapping[str, Any], options: Mapping[str, Any]
) -> str | None:
    return None


@dataclass(frozen=True)
class ChatTemplate:
    """What a text encoder that is a language model reads around a prompt.

    text: all it reads, `{}` where the prompt is. dropped: tokens at its start whose features the
    denoiser does not get. padding: how far prompts are padded, to the `longest` of a call or to the
    number of tokens that are read, `max_length`, as tokenizers call it.
    """

    text: str
    dropped: int = 0
    padding: Literal["longest", "max_length"] = "longest"

    def around(self, prompt: str) -> str:
        return self.text.format(prompt)


@dataclass(frozen=True)
class Parts:
    """The parts of a pipeline that a family has loaded from a folder.

    text_encoders: by the names in the folder, as in `text_encoder_2`, in the order of
    `Family.text_encoders`; tokenizers: by the names of their text encoders. prompt_lengths: by
    these names too, tokens of a prompt with padding where they are not as many as the tokenizer
    takes. options: of the pipeline itself, as its model_index.json has them.
    """

    folder: Path
    denoiser: Any
    text_encoders: Mapping[str, Any]
    tokenizers: Mapping[str, Any]
    vae: Any
    scheduler: Any
    prompt_lengths: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """All that is one family's own; `backbone` below is a `Backbone` of it.

    denoiser: the name of the denoiser among the parts of a pipeline folder. pipelines: the classes
    of the folders it loads, as model_index.json names them. blocks: the blocks of the denoiser in
    forward order, modules or lists of them. load: (spec, name) -> its parts, ValueError where the
    folder holds something else. encoders: the name of an input, as in `text`, to the function that
    encodes it, (backbone, values) -> fields of the `Condition`. inputs: (backbone, x_t, t,
    condition) -> the denoiser's own arguments. pipeline: (backbone) -> its parts as a stock
    pipeline, shared and not copied; None where diffusers has no pipeline of such parts, so that
    nothing can be exported.

    text_encoders: their names among the parts; each has a tokenizer, see `tokenizer_name`. shapes:
    (backbone) -> the shape of one row of every field of the `Condition` that text gives, None for
    `tokens` alone, as wide as the text encoder. makes: what describes a denoiser of this family
    that is made from nothing, None where it makes none. prompt_lengths: by the class of the
    pipeline, tokens of a prompt with padding where its tokenizer takes more. lower_case: whether
    prompts are read in lower case. stock_multiple: pixels that divide the sides which its stock
    pipelines take. traits: where things are in the denoiser and how it takes clips. tool_names: by
    the class of a transformer, what other tools call its layers. check: (facts of a folder) ->
    ValueError where the family cannot load it, without torch.

    optional: text encoders that a folder may lack. output: (backbone, output, x_t) -> what the
    denoiser gave in the form of x_t, for one that gives tokens, a list or another sign; None for
    one whose `sample` is that already. latents: how its latents come from the VAE's. channels:
    (config of the denoiser) -> channels of its latents, None for its `in_channels`. sample_size:
    latents along an edge that it was trained at, where its config does not say. levels: (backbone,
    steps, extent of the latents) -> what its pipeline asks of the scheduler; None for the
    scheduler's own levels, shifted by the number of image tokens where it says so. embeds_guidance:
    (config of the denoiser) -> whether the scale of guidance is an input of it, `guidance` of the
    `Condition`, as of models distilled from guided ones. reader: the text encoder whose tokens the
    denoiser gets, where it is not the first. distilled: (config of the denoiser, that of the
    scheduler, the pipeline's options) -> why plain training would spoil it, None where it does not.
    template: what its text encoder reads around a prompt, and how far prompts are then padded; None
    for nothing, and prompts are padded to the number of tokens that are read. rescale: what its
    pipeline does to the output of classifier-free guidance; None for nothing.
    """

    denoiser: str
    pipelines: tuple[str, ...]
    blocks: tuple[str, ...]
    load: Callable[[BackboneSpec, str], Parts]
    encoders: Mapping[str, Encoder]
    inputs: Inputs
    pipeline: Callable[[Any], Any] | None
    text_encoders: tuple[str, ...] = ("text_encoder",)
    shapes: Callable[[Any], Mapping[str, tuple[int, ...]]] | None = None
    makes: type[DenoiserSpec] | None = None
    prompt_lengths: Mapping[str, int] = field(default_factory=dict)
    lower_case: bool = False
    stock_multiple: int = 8
    traits: DenoiserTraits = UNDECLARED
    tool_names: Mapping[str, ToolNames] = field(default_factory=dict)
    check: Callable[[FolderContents], None] = _check_nothing
    optional: tuple[str, ...] = ()
    output: Output | None = None
    latents: LatentForm = field(default_factory=LatentForm)
    channels: Callable[[Mapping[str, Any]], int] | None = None
    sample_size: int | None = None
    levels: Callable[[Any, int, Extent], NoiseLevels] | None = None
    embeds_guidance: Callable[[Mapping[str, Any]], bool] = _no_guidance
    reader: str | None = None
    distilled: Distilled = _not_distilled
    template: ChatTemplate | None = None
    rescale: Rescale | None = None

    @property
    def vae_parts(self) -> tuple[str, ...]:
        """The parts of its folders that are a VAE: none where it works on pixels."""
        return ("vae",) if self.latents.vaes else ()

    def patch(self, config: Mapping[str, Any]) -> int:
        """Latents along an edge of an image token, by a denoiser's config; 1 for a U-Net."""
        found = self.traits.patch or config.get("patch_size") or 1
        return found if isinstance(found, int) else 1

    def trained_at(self, config: Mapping[str, Any]) -> int | None:
        """Latents along an edge that a denoiser was trained at, along the height where its config
        tells two sides; None where neither that nor the family says."""
        found = config.get("sample_size") or config.get("sample_height") or self.sample_size
        return found if isinstance(found, int) else None


def tokenizer_name(text_encoder: str) -> str:
    """The part of a pipeline folder that is a text encoder's tokenizer: `tokenizer_2` of
    `text_encoder_2`."""
    return text_encoder.replace("text_encoder", "tokenizer")


def text_arguments(condition: Condition) -> dict[str, Tensor | None]:
    """The text as most denoisers of diffusers take it, the mask where there is one."""
    masked = {} if condition.mask is None else {"encoder_attention_mask": condition.mask}
    return {"encoder_hidden_states": condition.tokens, **masked}


def masked_text_shapes(backbone: Any) -> Mapping[str, tuple[int, ...]]:
    """`Family.shapes` of a family that reads the tokens of one text encoder and their mask."""
    width, length = int(backbone.text_encoder.config.hidden_size), backbone.prompts.length
    return {"tokens": (length, width), "mask": (length,)}
