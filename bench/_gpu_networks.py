"""Denoisers of bench/gpu.py by the sizes of public models, and what they are called with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _networks import SD15, SDXL
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from trainer.attention.denoiser_traits import DenoiserTraits
from trainer.backbones import flux1, sd, sd3, sdxl

LAYOUTS = Path(__file__).parents[1] / "data" / "layouts"
# stabilityai/stable-diffusion-3.5-medium, transformer/config.json
SD35: dict[str, Any] = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
}  # fmt: skip
TINY_UNET: dict[str, Any] = SD15 | {
    "block_out_channels": (32, 64), "cross_attention_dim": 768, "layers_per_block": 1,
    "attention_head_dim": 2, "down_block_types": SD15["down_block_types"][2:],
    "up_block_types": SD15["up_block_types"][:2],
}  # fmt: skip
TINY_FLUX: dict[str, Any] = {
    "patch_size": 1, "in_channels": 64, "num_layers": 1, "num_single_layers": 1,
    "attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 4096,
    "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": [4, 6, 6],
}  # fmt: skip


@dataclass(frozen=True)
class Geometry:
    """A denoiser: how it is made, its part's name and traits, what it is called with; large: too
    large for its weights in fp32 beside a step."""

    make: Callable[[], Any]
    part: str
    traits: DenoiserTraits
    inputs: Callable[[int, int, torch.device], dict[str, Any]]
    lists: tuple[str, ...]
    large: bool = False
    tiny: bool = False

    def blocks(self, denoiser: nn.Module) -> list[Any]:
        """The blocks that are compiled."""
        found: list[Any] = []
        for name in self.lists:
            block: Any = denoiser.get_submodule(name)
            found += block if isinstance(block, nn.ModuleList) else [block]
        return found


def _unet_inputs(rows: int, side: int, device: torch.device) -> dict[str, Any]:
    drawn = _draw(device)
    return {
        "sample": drawn(rows, 4, side // 8, side // 8),
        "timestep": torch.full((rows,), 500, device=device),
        "encoder_hidden_states": drawn(rows, 77, 768),
    }


def _sdxl_inputs(rows: int, side: int, device: torch.device) -> dict[str, Any]:
    drawn = _draw(device)
    more = {"text_embeds": drawn(rows, 1280), "time_ids": drawn(rows, 6)}
    text = {"encoder_hidden_states": drawn(rows, 77, 2048), "added_cond_kwargs": more}
    return _unet_inputs(rows, side, device) | text


def _sd3_inputs(rows: int, side: int, device: torch.device) -> dict[str, Any]:
    drawn = _draw(device)
    return {
        "hidden_states": drawn(rows, 16, side // 8, side // 8),
        "timestep": torch.full((rows,), 500.0, device=device),
        "encoder_hidden_states": drawn(rows, 333, 4096),
        "pooled_projections": drawn(rows, 2048),
    }


def _flux_inputs(rows: int, side: int, device: torch.device) -> dict[str, Any]:
    drawn, tokens = _draw(device), (side // 16) ** 2
    return {
        "hidden_states": drawn(rows, tokens, 64),
        "timestep": torch.full((rows,), 0.5, device=device),
        "encoder_hidden_states": drawn(rows, 512, 4096),
        "pooled_projections": drawn(rows, 768),
        "guidance": torch.full((rows,), 3.5, device=device),
        "img_ids": torch.zeros(tokens, 3, device=device),
        "txt_ids": torch.zeros(512, 3, device=device),
    }


def _draw(device: torch.device) -> Callable[..., torch.Tensor]:
    return lambda *shape: torch.randn(shape, device=device)


def _flux() -> Any:
    text = (LAYOUTS / "flux1_dev" / "transformer" / "config.json").read_text(encoding="utf-8")
    return FluxTransformer2DModel.from_config(json.loads(text))


def _traits(family: Any) -> DenoiserTraits:
    found: DenoiserTraits = family.FAMILY.traits
    return found


UNET_LISTS = ("down_blocks", "mid_block", "up_blocks")
GEOMETRIES: dict[str, Geometry] = {
    "sd15": Geometry(
        lambda: UNet2DConditionModel(**SD15), "unet", _traits(sd), _unet_inputs, UNET_LISTS
    ),
    "sdxl": Geometry(
        lambda: UNet2DConditionModel(**SDXL), "unet", _traits(sdxl), _sdxl_inputs, UNET_LISTS
    ),
    "sd35_medium": Geometry(
        lambda: SD3Transformer2DModel(**SD35), "transformer", _traits(sd3), _sd3_inputs,
        ("transformer_blocks",),
    ),
    "flux1_dev": Geometry(
        _flux, "transformer", _traits(flux1), _flux_inputs,
        ("transformer_blocks", "single_transformer_blocks"), large=True,
    ),
    "tiny_unet": Geometry(
        lambda: UNet2DConditionModel(**TINY_UNET), "unet", _traits(sd), _unet_inputs, UNET_LISTS,
        tiny=True,
    ),
    "tiny_sd3": Geometry(
        lambda: SD3Transformer2DModel(**SD35 | {
            "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
            "caption_projection_dim": 64, "dual_attention_layers": (0,), "pos_embed_max_size": 16,
        }),
        "transformer", _traits(sd3), _sd3_inputs, ("transformer_blocks",), tiny=True,
    ),
    "tiny_flux": Geometry(
        lambda: FluxTransformer2DModel(**TINY_FLUX), "transformer", _traits(flux1), _flux_inputs,
        ("transformer_blocks", "single_transformer_blocks"), tiny=True,
    ),
}  # fmt: skip
