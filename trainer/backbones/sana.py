"""Sana (arXiv 2410.10629): a transformer of linear self-attention and softmax cross-attention, with
convolutions in the feed-forward layers instead of position embeddings, trained on a flow.

Text, scheduler and sampling are those of PixArt, from which Sana comes. The VAE is Sana's own
`AutoencoderDC` or an `AutoencoderKL`, the text encoder Gemma 2 or CLIP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.attention.denoiser_traits import DenoiserTraits, ProcessorTraits
from trainer.backbones.family import Family, Parts, masked_text_shapes, text_arguments
from trainer.backbones.folder_check import (
    check_channels,
    check_classes,
    check_flow_or_vp,
    check_widths,
)
from trainer.backbones.folder_contents import FolderContents
from trainer.backbones.pixart import (
    ORIGINAL_ATTENTION,
    encode_prompts,
    initialise_as_dit,
    text_classes,
)
from trainer.backbones.spec import BackboneSpec
from trainer.backbones.tool_names import ToolNames

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.attention.condition import Condition
    from trainer.backbones.backbone import Backbone

TEXT = {
    "text_encoder": ("CLIPTextModel", "Gemma2Model"),
    "tokenizer": ("CLIPTokenizer", "GemmaTokenizer", "GemmaTokenizerFast"),
}
PROMPT_LENGTH = 300  # the default of diffusers' pipeline


def inputs(backbone: Backbone, x_t: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    scale = backbone.denoiser.config.timestep_scale
    return {"hidden_states": x_t, "timestep": t * scale, **text_arguments(condition)}


def pipeline(backbone: Backbone) -> Any:
    from trainer.backbones.stock_pipeline import stock_pipeline

    return stock_pipeline(backbone, "SanaPipeline")


def load(spec: BackboneSpec, name: str) -> Parts:
    """Loads the parts from a folder in diffusers layout, or from the hub at a pinned revision.

    Raises:
        ValueError: the folder holds another pipeline, or a text encoder or VAE of another kind, a
        part is missing, its weights are not safetensors, or the transformer is a distilled one.
    """
    import diffusers

    from trainer.backbones.folder_check import check_contents
    from trainer.backbones.pipeline_folder import pipeline_folder
    from trainer.backbones.schedulers import flow_or_vp
    from trainer.backbones.vae import load_vae

    folder = pipeline_folder(spec, name)
    facts = check_contents(folder, name, FAMILY, made=False)
    encoder, tokenizer = text_classes(facts.index)
    transformer = folder.load("transformer", diffusers.SanaTransformer2DModel)
    if "transformer" in spec.scratch:
        initialise(transformer)
    return Parts(
        folder=folder.path,
        denoiser=transformer,
        text_encoders={"text_encoder": folder.load("text_encoder", encoder)},
        # a tokenizer of Gemma pads on the left, and its pipeline on the right
        tokenizers={"text_encoder": folder.tokenizer(tokenizer, padding_side="right")},
        vae=load_vae(folder, facts),
        scheduler=flow_or_vp(folder.scheduler_config(), folder.of("scheduler")),
        prompt_lengths={"text_encoder": PROMPT_LENGTH},
    )


def check(facts: FolderContents) -> None:
    check_classes(facts, TEXT)
    check_flow_or_vp(facts.scheduler, facts.where)
    check_channels(facts, "transformer", default=32)
    check_widths(
        facts, "transformer", {"text_encoder": facts.configs["transformer"].get("caption_channels")}
    )
    if facts.configs["transformer"].get("guidance_embeds"):
        raise facts.refuse(
            "transformer",
            "was distilled to take its guidance as an input (Sana-Sprint), which is not trained "
            "here; choose a Sana without guidance_embeds",
        )


def initialise(transformer: Any) -> None:
    """A start for training from nothing: Sana's own, and cross-attention and the output at 0 as in
    PixArt. Convolutions in the feed-forward layers keep PyTorch's."""
    time, caption = transformer.time_embed, transformer.caption_projection
    initialise_as_dit(
        transformer,
        patches=transformer.patch_embed.proj,
        time=time.emb,
        narrow=[time.linear, caption.linear_1, caption.linear_2],
    )


ORIGINAL = ORIGINAL_ATTENTION | {
    "blocks.{}.mlp.inverted_conv.conv": ("transformer_blocks.{}.ff.conv_inverted",),
    "blocks.{}.mlp.depth_conv.conv": ("transformer_blocks.{}.ff.conv_depth",),
    "blocks.{}.mlp.point_conv.conv": ("transformer_blocks.{}.ff.conv_point",),
    "x_embedder.proj": ("patch_embed.proj",),
    "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
    "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
    "t_embedder.mlp.0": ("time_embed.emb.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_embed.emb.timestep_embedder.linear_2",),
    "t_block.1": ("time_embed.linear",),
    "final_layer.linear": ("proj_out",),
}

FAMILY = Family(
    denoiser="transformer",
    pipelines=("SanaPipeline",),
    prompt_lengths={"SanaPipeline": PROMPT_LENGTH},
    lower_case=True,
    stock_multiple=32,
    blocks=("transformer_blocks",),
    load=load,
    encoders={"text": encode_prompts},
    shapes=masked_text_shapes,
    inputs=inputs,
    pipeline=pipeline,
    check=check,
    traits=DenoiserTraits(
        processors={
            "diffusers.models.attention_processor.SanaLinearAttnProcessor2_0": ProcessorTraits(
                linear=True, norms_first=True, bare=True, rescales=False
            ),
            "diffusers.models.transformers.sana_transformer.SanaAttnProcessor2_0": ProcessorTraits(
                norms_first=True, bare=True
            ),
        },
        time_embedding="time_embed.emb",
        time_width="time_embed.emb.timestep_embedder.linear_2",
        input="patch_embed.proj",
    ),
    tool_names={"SanaTransformer2DModel": ToolNames(ORIGINAL)},
)
