"""A tiny pipeline folder of Stable Diffusion XL, of stock diffusers, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

DATA = Path(__file__).parents[1] / "data" / "tiny"
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 32 + 48,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}
TEXT: dict[str, Any] = {
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "projection_dim": 24,
}
EULER: dict[str, Any] = {  # as the checkpoint of 1.0 has it
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def stock_pipeline(vae: Any = None, **unet: Any) -> Any:
    """The parts, seeded; both tokenizers are the shipped one, the second pads with `!` as there."""
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
    )

    first = CLIPTokenizer.from_pretrained(DATA / "tokenizer")
    second = CLIPTokenizer.from_pretrained(DATA / "tokenizer", pad_token="!</w>")
    ids = {"bos_token_id": first.bos_token_id, "eos_token_id": first.eos_token_id}
    config = TEXT | ids | {"vocab_size": len(first)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = CLIPTextModel(CLIPTextConfig(**config, hidden_size=32))
        open_clip = CLIPTextModelWithProjection(
            CLIPTextConfig(**config, hidden_size=48, hidden_act="gelu")
        )
        network = UNet2DConditionModel(**(UNET | unet))
    return StableDiffusionXLPipeline(
        vae=vae or AutoencoderKL.from_pretrained(DATA / "vae", torch_dtype=torch.float32),
        text_encoder=clip.eval(),
        text_encoder_2=open_clip.eval(),
        tokenizer=first,
        tokenizer_2=second,
        unet=network.eval(),
        scheduler=EulerDiscreteScheduler(**EULER),
        add_watermarker=False,
    )


def make_sdxl_folder(folder: Path, **unet: Any) -> Path:
    stock_pipeline(**unet).save_pretrained(folder)
    return folder
