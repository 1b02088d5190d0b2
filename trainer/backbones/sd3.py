"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): a transformer in whose joint layers the image and
the text attend to each other, trained on a flow; two CLIP text encoders and T5, which a folder may
lack. In the first layers of 3.5 medium (MMDiT-X) the image also attends to itself alone.

    tokens = [[CLIP-L, CLIP-G, 0], T5]     last layers but one, (b, 77 + 256, 4096)
    pooled = [CLIP-L, CLIP-G]              projections of the end of text, (b, 768 + 1280)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainer.attention.denoiser_traits import DenoiserTraits, JointTraits
from trainer.backbones.family import Family, Parts
from trainer.backbones.folder_check import check_channels, check_classes, check_flow
from trainer.backbones.folder_contents import FolderContents
from trainer.backbones.spec import BackboneSpec
from trainer.backbones.tool_names import ModelNames, Scripts, ToolNames, block_names

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.attention.condition import Condition
    from trainer.backbones.backbone import Backbone

CLIP, OPEN_CLIP, T5 = TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
CLIPS = (CLIP, OPEN_CLIP)
CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
T5_TOKENIZERS = ("T5TokenizerFast", "T5Tokenizer")
TEXT = {
    CLIP: ("CLIPTextModelWithProjection",),
    OPEN_CLIP: ("CLIPTextModelWithProjection",),
    T5: ("T5EncoderModel",),
    "tokenizer": CLIP_TOKENIZERS,
    "tokenizer_2": CLIP_TOKENIZERS,
    "tokenizer_3": T5_TOKENIZERS,
}
T5_LENGTH = 256  # tokens that the stock pipeline reads with T5, and zeros where there is none


def encode_prompts(backbone: Backbone, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Prompts to tokens (b, n + m, d) and pooled (b, p + p'). Of a prompt in parts, the first one's
    pooled text counts. Without T5 its tokens are zeros, as in the stock pipeline."""
    import torch
    from torch.nn.functional import pad

    hidden, pooled = [], []
    for part in CLIPS:
        ids = backbone.tokens(prompts, part).input_ids
        output = backbone.text_encoders[part](ids, output_hidden_states=True)
        hidden.append(backbone.joined(output.hidden_states[-2]))
        pooled.append(output[0][:: len(ids) // len(prompts)])
    clips, width = torch.cat(hidden, dim=-1), text_width(backbone)
    clips = pad(clips, (0, width - clips.shape[-1]))
    if T5 in backbone.text_encoders:
        rest = backbone.text_encoders[T5](backbone.tokens(prompts, T5).input_ids)[0]
    else:
        rest = clips.new_zeros(len(prompts), T5_LENGTH, width)
    tokens = torch.cat([clips, rest.to(clips.dtype)], dim=1)
    return {"tokens": tokens, "pooled": torch.cat(pooled, dim=-1)}


def text_width(backbone: Backbone) -> int:
    return int(backbone.denoiser.config.joint_attention_dim)


def _condition_shapes(backbone: Backbone) -> Mapping[str, tuple[int, ...]]:
    from trainer.backbones.long_prompts import Prompts

    rest = Prompts(backbone, T5).length if T5 in backbone.text_encoders else T5_LENGTH
    pooled = sum(int(backbone.text_encoders[part].config.projection_dim) for part in CLIPS)
    return {
        "tokens": (backbone.prompts.length + rest, text_width(backbone)),
        "pooled": (pooled,),
    }


def inputs(backbone: Backbone, x_t: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    return {
        "hidden_states": x_t,
        "timestep": t,
        "encoder_hidden_states": condition.tokens,
        "pooled_projections": condition.pooled,
    }


def pipeline(backbone: Backbone) -> Any:
    from trainer.backbones.stock_pipeline import stock_pipeline

    return stock_pipeline(backbone, "StableDiffusion3Pipeline")


def check(facts: FolderContents) -> None:
    lacking = () if T5 in facts.configs else (T5, "tokenizer_3")
    check_classes(facts, {part: kinds for part, kinds in TEXT.items() if part not in lacking})
    check_flow(facts)
    check_channels(facts, "transformer", default=16)
    config = facts.configs["transformer"]
    wide, widths = config.get("joint_attention_dim", 4096), [facts.width_of(p) for p in CLIPS]
    clips = sum(width or 0 for width in widths)
    third = facts.width_of(T5) if T5 in facts.configs else None
    if clips > wide or third not in (None, wide):
        raise facts.refuse(
            "transformer",
            f"reads text of width {wide}, and its text encoders give {widths[0]} + {widths[1]}"
            f"{'' if third is None else f', then {third}'}; the parts are of different models",
        )
    pooled = sum(int(facts.configs[part].get("projection_dim", 512)) for part in CLIPS)
    if (told := config.get("pooled_projection_dim", 2048)) != pooled:
        raise facts.refuse(
            "transformer",
            f"is told {told} values of the pooled text, and its CLIP text encoders give {pooled}; "
            "the parts are of different models",
        )


def load(spec: BackboneSpec, name: str) -> Parts:
    """Loads the parts from a folder in diffusers layout, or from the hub at a pinned revision;
    `load_parts` says what it raises."""
    from trainer.backbones.load_parts import load_parts

    text = {
        part: (TEXT[part][0], "T5Tokenizer" if part == T5 else "CLIPTokenizer")
        for part in TEXT_ENCODERS
    }
    return load_parts(
        spec, name, FAMILY, denoiser="SD3Transformer2DModel", text=text, lengths={T5: T5_LENGTH}
    )


# as the model's first code names its layers: one for q, k and v; `attn2` is in the first blocks of
# 3.5 medium
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
BLOCKS = block_names(
    "joint_blocks",
    "transformer_blocks",
    {
        "x_block.attn.qkv": QKV, "x_block.attn.proj": ("attn.to_out.0",),
        "x_block.attn2.qkv": [layer.replace("attn.", "attn2.") for layer in QKV],
        "x_block.attn2.proj": ("attn2.to_out.0",),
        "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "context_block.attn.proj": ("attn.to_add_out",),
        "x_block.mlp.fc1": ("ff.net.0.proj",), "x_block.mlp.fc2": ("ff.net.2",),
        "context_block.mlp.fc1": ("ff_context.net.0.proj",),
        "context_block.mlp.fc2": ("ff_context.net.2",),
        "x_block.adaLN_modulation.1": ("norm1.linear",),
    },
)  # fmt: skip
ENDS = {
    "x_embedder.proj": ("pos_embed.proj",),
    "context_embedder": ("context_embedder",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
}


def _model_names(config: Mapping[str, Any]) -> ModelNames:
    """3 medium has no norms of queries and keys, and 3.5 medium alone attends twice in a block."""
    if config["qk_norm"] is None:
        version = "3-medium"
    else:
        version = "3-5-medium" if config["dual_attention_layers"] else "3-5-large"
    return ModelNames(version, f"stable-diffusion-3-{version}")


FAMILY = Family(
    denoiser="transformer",
    pipelines=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
    blocks=("transformer_blocks",),
    load=load,
    encoders={"text": encode_prompts},
    inputs=inputs,
    pipeline=pipeline,
    text_encoders=TEXT_ENCODERS,
    optional=(T5,),
    shapes=_condition_shapes,
    check=check,
    tool_names={
        "SD3Transformer2DModel": ToolNames(
            BLOCKS | ENDS,
            comfyui="diffusers",
            scripts=Scripts("sd-scripts", BLOCKS, module="networks.lora_sd3", model=_model_names),
        )
    },
    traits=DenoiserTraits(
        time_embedding="time_text_embed",
        time_width="time_text_embed.timestep_embedder.linear_2",
        input="pos_embed.proj",
        joint=(JointTraits("*.attn", text_first=False),),
    ),
)
