"""Networks of public models by their sizes, without weights, and small transformers of families
that are no backbone here: what exports and counts ask of them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from trainer.attention.condition import Condition
from trainer.attention.extras import Extras
from trainer.attention.host import Host

CROSS = {"down": "CrossAttnDownBlock2D", "up": "CrossAttnUpBlock2D"}
SD15: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": (CROSS["down"],) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + (CROSS["up"],) * 3,
}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ("DownBlock2D",) + (CROSS["down"],) * 2,
    "up_block_types": (CROSS["up"],) * 2 + ("UpBlock2D",),
}


class Network(nn.Module):
    """What methods and exports ask of a backbone, around any denoiser; the text is noise."""

    name, target = "network", "eps"
    resolution, divisor, latent_channels = 64, 8, 4

    def __init__(self, denoiser: nn.Module, part: str, pipeline: Any = None) -> None:
        super().__init__()
        self.denoiser_name = part
        self.add_module(part, denoiser)
        self.stock = pipeline
        self.text_encoders: dict[str, nn.Module] = {}
        self.tokenizers: dict[str, Any] = {}
        self.extras = Extras()
        self.sampling_hooks: dict[str, Any] = {}
        self.input_channels: dict[str, Any] = {}
        self.given_frames: Any = None
        self.eval().requires_grad_(False)

    @property
    def denoiser(self) -> Any:
        return getattr(self, self.denoiser_name)

    @property
    def host(self) -> Host:
        return Host.attach(self.denoiser)

    @property
    def sites(self) -> Any:
        return self.host.sites

    def pipeline(self) -> Any:
        return self.stock(None, None, None, self.denoiser, None)

    def encode_prompts(self, prompts: list[str]) -> Condition:
        generator = torch.Generator().manual_seed(3)
        return Condition(torch.randn(len(prompts), 5, 16, generator=generator))

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        sizes = {"resolution": None, "aspect_ratio": None}
        more = {"added_cond_kwargs": sizes} if self.stock is PixArtSigmaPipeline else {}
        output: Tensor = self.denoiser(
            x_t, timestep=t, encoder_hidden_states=condition.tokens, **more
        ).sample
        return output


def unet(sizes: dict[str, Any]) -> Network:
    """A U-Net in bf16 that holds no memory."""
    with torch.device("meta"):
        return Network(UNet2DConditionModel(**sizes).to(torch.bfloat16), "unet")


def pixart() -> Network:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, cross_attention_dim=16, caption_channels=16,
    )  # fmt: skip
    nn.init.normal_(transformer.proj_out.weight)  # else it starts at nothing
    return Network(transformer, "transformer", PixArtSigmaPipeline)


def sana() -> Network:
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=16, sample_size=8, patch_size=1,
    )  # fmt: skip
    return Network(transformer, "transformer", SanaPipeline)
