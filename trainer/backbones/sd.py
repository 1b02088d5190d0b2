"""Stable Diffusion 1.x and 2.x, and every pipeline of the same parts: U-Net, one CLIP text encoder,
VAE, scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from trainer.backbones.base import Backbone, folder_of, vp_scheduler

if TYPE_CHECKING:
    from trainer.schema import BackboneSpec

PARTS = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel, "vae": AutoencoderKL}


class StableDiffusion(Backbone):
    """unet(x_t, t, text) with text (b, 77, d) from CLIP, on latents (b, 4, H/8, W/8) of a VAE."""

    family = "sd"
    denoiser_name = "unet"
    unet: Any

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Prompts to encoder_hidden_states (b, tokens, d); padding is attended to, as in SD."""
        ids = self.tokens(prompts).input_ids
        return {"encoder_hidden_states": self.text_encoder(ids).last_hidden_state}

    def inputs(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> dict[str, Any]:
        return {"sample": x_t, "timestep": t, **condition}

    def blocks(self) -> list[Any]:
        return [*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks]

    def pipeline(self) -> Any:
        return StableDiffusionPipeline(
            vae=self.vae, text_encoder=self.text_encoder, tokenizer=self.tokenizer, unet=self.unet,
            scheduler=self.scheduler(), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip


def load(spec: BackboneSpec, name: str) -> StableDiffusion:
    """Loads the parts from a folder in diffusers layout, or from the hub at a pinned revision.

    Raises:
        ValueError: the folder holds another pipeline, a part is missing, or its weights are not
        safetensors.
    """
    folder = folder_of(spec, name, list(PARTS))
    folder.index(name, ["StableDiffusionPipeline"])
    unet, text_encoder, vae = (folder.load(part, kind) for part, kind in PARTS.items())
    tokenizer = CLIPTokenizer.from_pretrained(folder.of("tokenizer"), local_files_only=True)
    scheduler = vp_scheduler(folder.scheduler_config(), folder.of("scheduler"))
    return StableDiffusion(name, folder.path, unet, text_encoder, tokenizer, vae, scheduler)
