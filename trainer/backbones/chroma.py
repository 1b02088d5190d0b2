"""Chroma (lodestone-rock, 2025): FLUX.1-schnell without its distillation, with T5 alone and with
classifier-free guidance. Layout, packing and noise levels are those of FLUX.1.

T5 sees the tokens of the prompt alone; the network sees them and one token of padding, which it was
trained with, and no more of the padding.

The pipeline of diffusers 0.42 means the same, but gives its mask as numbers, which attention adds
to its scores: it sees all the padding, only less than the prompt (issues 12116 and 13619 there).
Here the mask is one, as in the model's own code and in ComfyUI, in training and in sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trainer.attention.denoiser_traits import DenoiserTraits, JointTraits
from trainer.backbones.family import Family, Parts
from trainer.backbones.flux1 import (
    ATTENTION,
    ENDS,
    FEED_FORWARD,
    FOLD,
    SINGLE,
    T5_LENGTH,
    from_tokens,
    packed_channels,
    packed_inputs,
    published_width,
)
from trainer.backbones.folder_check import check_channels, check_classes, check_flow, check_widths
from trainer.backbones.folder_contents import FolderContents
from trainer.backbones.noise_levels import levels_by_tokens
from trainer.backbones.spec import BackboneSpec
from trainer.backbones.tool_names import ModelNames, Scripts, ToolNames, block_names

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.attention.condition import Condition
    from trainer.backbones.backbone import Backbone

TEXT = {"text_encoder": ("T5EncoderModel",), "tokenizer": ("T5TokenizerFast", "T5Tokenizer")}


def encode_prompts(backbone: Backbone, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Prompts to tokens (b, n, d), and a mask (b, n) that is 1 at those of the prompt and at the
    first token of padding."""
    import torch

    read = backbone.tokens(prompts)
    tokens = backbone.text_encoder(read.input_ids, attention_mask=read.attention_mask)[0]
    places = torch.arange(tokens.shape[1], device=tokens.device)
    seen = places <= read.attention_mask.sum(dim=1, keepdim=True)
    return {"tokens": tokens, "mask": seen.to(tokens.dtype)}


def inputs(backbone: Backbone, x_t: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    """The mask is of text and image in one sequence, (b, n + m)."""
    import torch

    given = packed_inputs(x_t, t, condition)
    mask = condition.mask
    if mask is not None:
        image = mask.new_ones(len(mask), given["hidden_states"].shape[1])
        given["attention_mask"] = torch.cat([mask, image], dim=1).bool()
    return given


def _condition_shapes(backbone: Backbone) -> dict[str, tuple[int, ...]]:
    length = backbone.prompts.length
    return {"tokens": (length, int(backbone.text_encoder.config.d_model)), "mask": (length,)}


def pipeline(backbone: Backbone) -> Any:
    from trainer.backbones.stock_pipeline import stock_pipeline

    return stock_pipeline(backbone, "ChromaPipeline")


def check(facts: FolderContents) -> None:
    check_classes(facts, TEXT)
    check_flow(facts)
    check_channels(facts, "transformer", default=64, fold=FOLD)
    wanted = {"text_encoder": facts.configs["transformer"].get("joint_attention_dim")}
    check_widths(facts, "transformer", wanted)


def load(spec: BackboneSpec, name: str) -> Parts:
    """Loads the parts from a folder in diffusers layout, or from the hub at a pinned revision;
    `load_parts` says what it raises."""
    from trainer.backbones.load_parts import load_parts

    text = {"text_encoder": ("T5EncoderModel", "T5Tokenizer")}
    lengths = {"text_encoder": T5_LENGTH}
    return load_parts(
        spec, name, FAMILY, denoiser="ChromaTransformer2DModel", text=text, lengths=lengths
    )


BLOCKS = block_names(
    "double_blocks", "transformer_blocks", {**ATTENTION, **FEED_FORWARD}
) | block_names("single_blocks", "single_transformer_blocks", SINGLE)

FAMILY = Family(
    denoiser="transformer",
    pipelines=("ChromaPipeline", "ChromaImg2ImgPipeline"),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    load=load,
    encoders={"text": encode_prompts},
    prompt_lengths=dict.fromkeys(("ChromaPipeline", "ChromaImg2ImgPipeline"), T5_LENGTH),
    inputs=inputs,
    pipeline=pipeline,
    shapes=_condition_shapes,
    check=check,
    output=from_tokens,
    channels=packed_channels,
    sample_size=128,  # of diffusers' pipeline
    levels=levels_by_tokens,
    tool_names={
        "ChromaTransformer2DModel": ToolNames(
            BLOCKS | ENDS,
            comfyui="diffusers",
            scripts=Scripts(
                "sd-scripts",
                BLOCKS,
                module="networks.lora_flux",
                model=lambda config: ModelNames("chroma", "chroma"),
                stock=published_width,
            ),
        )
    },
    traits=DenoiserTraits(joint=(JointTraits("*", text_first=True),), patch=FOLD),
)
