"""Wan 2.1 (arXiv 2503.20314): a transformer of clips whose tokens are of space and time, with self-
and cross-attention, UMT5's text encoder, a causal VAE of video, trained on a flow.

    frames (1 + 4 k, 3, H, W)  ->  latents (1 + k, 16, H / 8, W / 8)  ->  tokens of 2 x 2 latents
    x0 = (z - latents_mean) / latents_std      of each channel
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainer.attention.denoiser_traits import DenoiserTraits
from trainer.backbones.clip_frames import ClipFrames
from trainer.backbones.family import Family, Parts
from trainer.backbones.folder_check import check_channels, check_classes, check_flow, check_widths
from trainer.backbones.folder_contents import FolderContents
from trainer.backbones.latent_form import LatentForm, channel_statistics
from trainer.backbones.spec import BackboneSpec
from trainer.backbones.tool_names import ModelNames, Scripts, ToolNames

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.attention.condition import Condition
    from trainer.backbones.backbone import Backbone

TEXT = {
    "text_encoder": ("UMT5EncoderModel",),
    "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
}
PROMPT_LENGTH = 512  # the default of diffusers' pipeline


def encode_prompts(backbone: Backbone, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Prompts to tokens (b, n, d), 0 at their padding."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    tokens = backbone.tokens([prompt_clean(prompt) for prompt in prompts])
    ids, mask = tokens.input_ids, tokens.attention_mask
    states: Tensor = backbone.text_encoder(ids, attention_mask=mask).last_hidden_state
    return {"tokens": backbone.joined(states.masked_fill(mask[..., None] == 0, 0))}


def inputs(backbone: Backbone, x_t: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    return {"hidden_states": x_t, "timestep": t, "encoder_hidden_states": condition.tokens}


def _halvings(config: Mapping[str, Any]) -> int:
    return int(config.get("scale_factor_spatial") or 8).bit_length() - 1


def _frames(config: Mapping[str, Any]) -> ClipFrames:
    return ClipFrames(int(config.get("scale_factor_temporal") or 4))


def pipeline(backbone: Backbone) -> Any:
    from trainer.backbones.stock_pipeline import stock_pipeline

    return stock_pipeline(backbone, "WanPipeline")


def check(facts: FolderContents) -> None:
    check_classes(facts, TEXT)
    check_flow(facts)
    config = facts.configs["transformer"]
    if facts.index.get("boundary_ratio") or any(facts.index.get("transformer_2") or ()):
        raise facts.refuse(
            "transformer_2",
            "takes over at low noise, as in Wan 2.2 A14B, and one transformer is trained here; "
            "choose Wan 2.1",
        )
    if facts.index.get("expand_timesteps"):
        raise facts.refuse(
            "transformer",
            "has a timestep for each token, as Wan 2.2 TI2V, which is not trained here; choose "
            "Wan 2.1",
        )
    check_channels(facts, "transformer", default=16)
    check_widths(facts, "transformer", {"text_encoder": config.get("text_dim", 4096)})


def load(spec: BackboneSpec, name: str) -> Parts:
    """Loads the parts from a folder in diffusers layout, or from the hub at a pinned revision;
    `load_parts` says what it raises."""
    from trainer.backbones.load_parts import load_parts

    text = {"text_encoder": ("UMT5EncoderModel", "T5Tokenizer")}
    lengths = {"text_encoder": PROMPT_LENGTH}
    return load_parts(
        spec, name, FAMILY, denoiser="WanTransformer3DModel", text=text, lengths=lengths
    )


# as Wan's first code names its layers, which ComfyUI keeps
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
BLOCKS = {
    f"blocks.{{}}.{kind}.{name}": (f"blocks.{{}}.{own}.{layer}",)
    for kind, own in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for name, layer in ATTENTION.items()
} | {
    "blocks.{}.ffn.0": ("blocks.{}.ffn.net.0.proj",),
    "blocks.{}.ffn.2": ("blocks.{}.ffn.net.2",),
}
ORIGINAL = BLOCKS | {
    "text_embedding.0": ("condition_embedder.text_embedder.linear_1",),
    "text_embedding.2": ("condition_embedder.text_embedder.linear_2",),
    "time_embedding.0": ("condition_embedder.time_embedder.linear_1",),
    "time_embedding.2": ("condition_embedder.time_embedder.linear_2",),
    "time_projection.1": ("condition_embedder.time_proj",),
    "head.head": ("proj_out",),
}

FAMILY = Family(
    denoiser="transformer",
    pipelines=("WanPipeline",),
    blocks=("blocks",),
    load=load,
    encoders={"text": encode_prompts},
    inputs=inputs,
    pipeline=pipeline,
    prompt_lengths={"WanPipeline": PROMPT_LENGTH},
    check=check,
    latents=LatentForm(
        vaes=("AutoencoderKLWan",),
        statistics=channel_statistics,
        halvings=_halvings,
        clips=True,
        frames=_frames,
    ),
    sample_size=60,
    tool_names={
        "WanTransformer3DModel": ToolNames(
            ORIGINAL,
            comfyui="original",
            parameters={
                "blocks.{}.modulation": "blocks.{}.scale_shift_table",
                "head.modulation": "scale_shift_table",
            },
            scripts=Scripts(
                "musubi-tuner",
                BLOCKS,
                module="networks.lora_wan",
                model=lambda config: ModelNames("wan", "wan2.1"),
            ),
        )
    },
    traits=DenoiserTraits(
        time_embedding="condition_embedder.time_embedder",
        time_width="condition_embedder.time_embedder.linear_2",
        input="patch_embedding",
        layout="tokens",
        joint=(),
        patch=2,
    ),
)
