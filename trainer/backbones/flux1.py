"""FLUX.1 (Black Forest Labs, 2024): a transformer of joint blocks, then of single blocks that have
image and text as one sequence, trained on a flow; CLIP, of which only the pooled text is read, and
T5. Two by two latents are one token, whose place rotary embeddings say.

    x_t (b, 16, h, w) -> tokens (b, h/2 w/2, 64) -> the network -> (b, 16, h, w)

`dev` was distilled from a guided model and has the scale of guidance as an input. It is trained at
1, as in the scripts of diffusers, and sampled at `guidance`. `schnell` was distilled to four steps:
plain training undoes that, so it samples only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainer.attention.denoiser_traits import DenoiserTraits, JointTraits
from trainer.backbones.family import Family, Parts
from trainer.backbones.folder_check import check_channels, check_classes, check_flow, check_widths
from trainer.backbones.folder_contents import FolderContents
from trainer.backbones.noise_levels import levels_by_tokens
from trainer.backbones.spec import BackboneSpec
from trainer.backbones.tool_names import ModelNames, Scripts, ToolNames, block_names

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.attention.condition import Condition
    from trainer.backbones.backbone import Backbone

CLIP, T5 = TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
TEXT = {
    CLIP: ("CLIPTextModel",),
    T5: ("T5EncoderModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("T5TokenizerFast", "T5Tokenizer"),
}
T5_LENGTH = 512  # the default of diffusers' pipeline
FOLD = 2  # latents along an edge of a token


def encode_prompts(backbone: Backbone, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Prompts to T5's tokens (b, n, d), padding too, and CLIP's pooled text (b, p), of the first 77
    tokens of it whatever T5 reads."""
    from trainer.backbones.long_prompts import Prompts

    clip, read = backbone.text_encoders[CLIP], Prompts(backbone, CLIP)
    ids = read.tokenizer(
        [read.as_read(text) for text in prompts],
        padding="max_length", truncation=True, return_tensors="pt",
    ).input_ids  # fmt: skip
    pooled = clip(ids.to(clip.device)).pooler_output
    tokens = backbone.text_encoders[T5](backbone.tokens(prompts, T5).input_ids)[0]
    return {"tokens": tokens, "pooled": pooled}


def _condition_shapes(backbone: Backbone) -> Mapping[str, tuple[int, ...]]:
    widths = {part: int(e.config.hidden_size) for part, e in backbone.text_encoders.items()}
    return {"tokens": (backbone.prompts.length, widths[T5]), "pooled": (widths[CLIP],)}


def inputs(backbone: Backbone, x_t: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    guidance = condition.guidance if condition.guidance is not None else x_t.new_ones(len(x_t))
    return {
        **packed_inputs(x_t, t, condition),
        "guidance": guidance if embeds_guidance(backbone.denoiser.config) else None,
        "pooled_projections": condition.pooled,
    }


def packed_inputs(x_t: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    """Tokens, their places, time in [0, 1] and text, as FLUX.1 and its kin take them."""
    from diffusers import FluxPipeline

    rows, channels, height, width = x_t.shape
    text = condition.tokens
    assert text is not None, "this family reads text"
    return {
        "hidden_states": FluxPipeline._pack_latents(
            x_t, rows, num_channels_latents=channels, height=height, width=width
        ),
        "timestep": t / 1000,
        "encoder_hidden_states": text,
        "txt_ids": text.new_zeros(text.shape[1], 3),
        "img_ids": FluxPipeline._prepare_latent_image_ids(
            rows, height // FOLD, width // FOLD, device=x_t.device, dtype=x_t.dtype
        ),
    }


def from_tokens(backbone: Backbone, output: Any, x_t: Tensor) -> Tensor:
    """Tokens (b, n, 4c) to latents (b, c, h, w)."""
    from diffusers import FluxPipeline

    latents: Tensor = FluxPipeline._unpack_latents(output, *x_t.shape[-2:], vae_scale_factor=1)
    return latents


def packed_channels(config: Mapping[str, Any]) -> int:
    return int(config["in_channels"]) // FOLD**2


def embeds_guidance(config: Mapping[str, Any]) -> bool:
    return bool(config.get("guidance_embeds"))


def _distilled(config: Mapping[str, Any], scheduler: Mapping[str, Any], _: object) -> str | None:
    """Why `schnell` is not trained: its guidance is no input, and its levels are not shifted."""
    if embeds_guidance(config) or scheduler.get("use_dynamic_shifting"):
        return None
    return (
        "FLUX.1-schnell was distilled to four steps, which training on it plainly undoes; train on "
        "flux1_dev, whose adapters schnell takes in `sample`"
    )


def pipeline(backbone: Backbone) -> Any:
    from trainer.backbones.stock_pipeline import stock_pipeline

    return stock_pipeline(backbone, "FluxPipeline")


def check(facts: FolderContents) -> None:
    check_classes(facts, TEXT)
    check_flow(facts)
    check_channels(facts, "transformer", default=64, fold=FOLD)
    config = facts.configs["transformer"]
    check_widths(
        facts,
        "transformer",
        {T5: config.get("joint_attention_dim"), CLIP: config.get("pooled_projection_dim")},
    )


def load(spec: BackboneSpec, name: str) -> Parts:
    """Loads the parts from a folder in diffusers layout, or from the hub at a pinned revision;
    `load_parts` says what it raises."""
    from trainer.backbones.load_parts import load_parts

    text = {CLIP: ("CLIPTextModel", "CLIPTokenizer"), T5: ("T5EncoderModel", "T5Tokenizer")}
    return load_parts(
        spec, name, FAMILY, denoiser="FluxTransformer2DModel", text=text, lengths={T5: T5_LENGTH}
    )


# as the model's first code names its layers: one for q, k and v, in the single blocks also for the
# first of the feed-forward
ATTENTION = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
}
FEED_FORWARD = {
    f"{start}_mlp.{number}": (f"{own}.net.{layer}",)
    for start, own in (("img", "ff"), ("txt", "ff_context"))
    for number, layer in (("0", "0.proj"), ("2", "2"))
}
SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
ENDS = {
    "img_in": ("x_embedder",), "txt_in": ("context_embedder",), "final_layer.linear": ("proj_out",)
}  # fmt: skip
BLOCKS = block_names(
    "double_blocks",
    "transformer_blocks",
    ATTENTION
    | FEED_FORWARD
    | {"img_mod.lin": ("norm1.linear",), "txt_mod.lin": ("norm1_context.linear",)},
) | block_names(
    "single_blocks", "single_transformer_blocks", SINGLE | {"modulation.lin": ("norm.linear",)}
)
EMBEDDERS = {
    f"{name}_in.{end}_layer": (f"time_text_embed.{own}_embedder.linear_{number}",)
    for name, own in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
    for number, end in ((1, "in"), (2, "out"))
}


def published_width(config: Mapping[str, Any]) -> bool:
    """Whether diffusers' converter, which has the sizes of the published model in it, reads the
    files of sd-scripts."""
    return int(config["num_attention_heads"]) * int(config["attention_head_dim"]) == 3072


def _model_names(config: Mapping[str, Any]) -> ModelNames:
    return ModelNames("flux1", "flux-1-dev" if config["guidance_embeds"] else "flux-1-schnell")


FAMILY = Family(
    denoiser="transformer",
    pipelines=("FluxPipeline", "FluxImg2ImgPipeline"),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    load=load,
    encoders={"text": encode_prompts},
    prompt_lengths=dict.fromkeys(("FluxPipeline", "FluxImg2ImgPipeline"), T5_LENGTH),
    inputs=inputs,
    pipeline=pipeline,
    text_encoders=TEXT_ENCODERS,
    reader=T5,
    shapes=_condition_shapes,
    check=check,
    output=from_tokens,
    channels=packed_channels,
    sample_size=128,  # of diffusers' pipeline
    levels=levels_by_tokens,
    embeds_guidance=embeds_guidance,
    distilled=_distilled,
    tool_names={
        "FluxTransformer2DModel": ToolNames(
            BLOCKS | ENDS | EMBEDDERS,
            comfyui="diffusers",
            scripts=Scripts(
                "sd-scripts",
                BLOCKS,
                module="networks.lora_flux",
                model=_model_names,
                stock=published_width,
            ),
        )
    },
    traits=DenoiserTraits(
        time_embedding="time_text_embed",
        time_width="time_text_embed.timestep_embedder.linear_2",
        joint=(JointTraits("*", text_first=True),),
        patch=FOLD,
    ),
)
