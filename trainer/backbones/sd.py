"""Stable Diffusion 1.x and 2.x, and every pipeline of the same parts: U-Net, one CLIP text encoder,
VAE, scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from trainer.attention.denoiser_traits import DenoiserTraits
from trainer.backbones.family import Family, Parts, text_arguments
from trainer.backbones.folder_check import (
    check_channels,
    check_classes,
    check_prediction,
    check_widths,
)
from trainer.backbones.folder_contents import FolderContents
from trainer.backbones.spec import BackboneSpec, UNetSpec
from trainer.common.seeds import seed_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainer.attention.condition import Condition
    from trainer.backbones.backbone import Backbone


TEXT = {"text_encoder": ("CLIPTextModel",), "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast")}
NEEDS = {  # options of a U-Net that asks for more than noise, time and text
    "addition_embed_type": "pooled text or the size, as SDXL's does",
    "class_embed_type": "a class",
    "num_class_embeds": "a class",
    "encoder_hid_dim_type": "pictures, or a projection of the text",
}


def encode_prompts(backbone: Backbone, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Prompts to tokens (b, 77, d) of CLIP; padding is attended to, as in SD."""
    ids = backbone.tokens(prompts).input_ids
    return {"tokens": backbone.joined(backbone.text_encoder(ids).last_hidden_state)}


def inputs(backbone: Backbone, x_t: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    return {"sample": x_t, "timestep": t, **text_arguments(condition)}


def pipeline(backbone: Backbone) -> Any:
    from diffusers import StableDiffusionPipeline

    from trainer.backbones.vae import with_widths

    return StableDiffusionPipeline(
        vae=with_widths(backbone.vae), text_encoder=backbone.text_encoder,
        tokenizer=backbone.tokenizer, unet=backbone.denoiser,
        scheduler=backbone.scheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def check(facts: FolderContents) -> None:
    check_classes(facts, TEXT)
    check_prediction(facts.scheduler, facts.where)
    if "unet" not in facts.configs:
        return
    config = facts.configs["unet"]
    check_channels(facts, "unet", default=4)
    for option, what in NEEDS.items():
        if config.get(option) is not None:
            raise facts.refuse(
                "unet",
                f"asks for more than text ({option}={config[option]}: {what}), which this family "
                "does not give it",
            )
    check_widths(facts, "unet", {"text_encoder": config.get("cross_attention_dim")})


def load(spec: BackboneSpec, name: str) -> Parts:
    """Loads the parts from a folder in diffusers layout, or from the hub at a pinned revision.

    Raises:
        ValueError: the folder holds another pipeline, a part is missing, or its weights are not
        safetensors.
    """
    return load_unet(spec, name, FAMILY)


def load_unet(spec: BackboneSpec, name: str, family: Family) -> Parts:
    """`load` for a family of the same parts, with a VAE or on pixels."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from trainer.backbones.folder_check import check_contents
    from trainer.backbones.pipeline_folder import pipeline_folder
    from trainer.backbones.schedulers import vp_scheduler
    from trainer.backbones.vae import load_vae

    made = spec.denoiser
    folder = pipeline_folder(spec, name)
    facts = check_contents(folder, name, family, made=made is not None)
    if made is None:
        unet = folder.load("unet", UNet2DConditionModel)
    text_encoder = folder.load("text_encoder", CLIPTextModel)
    vae = load_vae(folder, facts, family.latents)
    if isinstance(made, UNetSpec):
        unet = make(made, vae.config.latent_channels, text_encoder.config.hidden_size)
    return Parts(
        folder=folder.path,
        denoiser=unet,
        text_encoders={"text_encoder": text_encoder},
        tokenizers={"text_encoder": folder.tokenizer(CLIPTokenizer)},
        vae=vae,
        scheduler=vp_scheduler(folder.scheduler_config(), folder.of("scheduler")),
    )


def make(spec: UNetSpec, channels: int, text_width: int) -> Any:
    """An untrained U-Net on latents of `channels` that reads text of `text_width`."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention import BasicTransformerBlock

    from trainer.backbones.backbone import seeded

    attend = {*spec.self_attention, *spec.cross_attention}
    kinds = ["CrossAttn" if grid in attend else "" for grid in spec.grids]
    with seeded(spec.seed):
        unet: Any = UNet2DConditionModel(
            sample_size=spec.sample_size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=spec.width,
            layers_per_block=spec.layers,
            norm_num_groups=spec.groups,
            attention_head_dim=spec.heads,  # diffusers' name for their number
            cross_attention_dim=text_width,
            down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
            mid_block_type="UNetMidBlock2DCrossAttn" if "mid" in attend else "UNetMidBlock2D",
            up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
        )
        stages = [
            *zip(spec.grids, unet.down_blocks, strict=True),
            *zip(reversed(spec.grids), unet.up_blocks, strict=True),
            ("mid", unet.mid_block),
        ]
        for place, stage in stages:
            for block in stage.modules():
                if isinstance(block, BasicTransformerBlock):
                    keep(block, place in spec.self_attention, place in spec.cross_attention)
        initialise(unet, spec.seed, spec.zero_init)
    return unet


def keep(block: Any, over_itself: bool, over_text: bool) -> None:
    """Removes from a transformer block, which diffusers builds with both attention layers, the one
    that is not wanted. The block's own forward supports what is left."""
    if not over_itself:
        block.attn1, block.only_cross_attention = block.attn2, True
    if not (over_itself and over_text):
        block.attn2 = block.norm2 = None


def initialise(unet: nn.Module, seed: int, zero: bool) -> None:
    """Each layer as torch starts it, from a seed of its own name. zero: but the outputs of
    attention, and of the transformer around it (as in Latent Diffusion, arXiv 2112.10752), are 0:
    the network begins as the one without them."""
    import torch
    from diffusers import Transformer2DModel
    from torch import nn

    from trainer.backbones.backbone import zero_outputs

    for name, module in unet.named_modules():
        if hasattr(module, "reset_parameters"):
            torch.manual_seed(seed_of(seed, name))
            module.reset_parameters()
    if zero:
        zero_outputs(unet)
        for module in unet.modules():
            if isinstance(module, Transformer2DModel):
                for parameter in cast("nn.Module", module.proj_out).parameters():
                    nn.init.zeros_(parameter)


FAMILY = Family(
    denoiser="unet",
    pipelines=("StableDiffusionPipeline",),
    blocks=("down_blocks", "mid_block", "up_blocks"),
    load=load,
    encoders={"text": encode_prompts},
    inputs=inputs,
    pipeline=pipeline,
    makes=UNetSpec,
    check=check,
    traits=DenoiserTraits(
        time_embedding="time_embedding", time_width="time_embedding.linear_2", input="conv_in"
    ),
)
