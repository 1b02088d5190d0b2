"""Tiny pipeline folders of transformers on a flow, of stock diffusers, with random weights."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DATA = Path(__file__).parents[1] / "data" / "tiny"
VAE: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "scaling_factor": 1.5,
    "shift_factor": 0.06,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CLIP: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "projection_dim": 12,
}
SD3: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 40,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 12 + 12,
    "pos_embed_max_size": 24,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}


FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 40,
    "axes_dims_rope": (4, 4, 8),
}
DYNAMIC: dict[str, Any] = {  # as the checkpoint of dev has it
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "shift": 3.0,
}


def clip_parts(kind: str = "CLIPTextModelWithProjection", **changes: Any) -> tuple[Any, Any]:
    """A tokenizer, the shipped one, and a CLIP text encoder."""
    import transformers

    tokenizer = transformers.CLIPTokenizer.from_pretrained(DATA / "tokenizer")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.CLIPTextConfig(**CLIP | ids | {"vocab_size": len(tokenizer)} | changes)
    return tokenizer, getattr(transformers, kind)(config).eval()


def t5_parts(width: int = 40, length: int = 512) -> tuple[Any, Any]:
    """A T5 tokenizer, of letters, and its text encoder."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    tokenizer = T5TokenizerFast(
        vocab=[(piece, -float(n)) for n, piece in enumerate(pieces)],
        extra_ids=0,
        model_max_length=length,
    )
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return tokenizer, T5EncoderModel(config).eval()


def tiny_vae(**changes: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(**VAE | changes).eval()


def stirred(model: Any) -> Any:
    """The model with no parameter at zero, where diffusers starts some."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def sd3_pipeline(t5: bool = True, **transformer: Any) -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    first, one = clip_parts()
    second, other = clip_parts(hidden_act="gelu")
    third, last = t5_parts() if t5 else (None, None)
    return StableDiffusion3Pipeline(
        transformer=stirred(SD3Transformer2DModel(**SD3 | transformer)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(),
        text_encoder=one, tokenizer=first,
        text_encoder_2=other, tokenizer_2=second,
        text_encoder_3=last, tokenizer_3=third,
    )  # fmt: skip


def flux1_pipeline(schnell: bool = False, **transformer: Any) -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )

    first, clip = clip_parts("CLIPTextModel")
    second, t5 = t5_parts()
    config = FLUX | {"pooled_projection_dim": 16, "guidance_embeds": not schnell} | transformer
    return FluxPipeline(
        transformer=stirred(FluxTransformer2DModel(**config)),
        scheduler=FlowMatchEulerDiscreteScheduler(**{} if schnell else DYNAMIC),
        vae=tiny_vae(),
        text_encoder=clip, tokenizer=first,
        text_encoder_2=t5, tokenizer_2=second,
    )  # fmt: skip


def chroma_pipeline(**transformer: Any) -> Any:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    tokenizer, t5 = t5_parts()
    config = FLUX | {
        "approximator_hidden_dim": 32, "approximator_layers": 1, "approximator_num_channels": 16
    }  # fmt: skip
    return ChromaPipeline(
        transformer=stirred(ChromaTransformer2DModel(**config | transformer)),
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        vae=tiny_vae(),
        text_encoder=t5,
        tokenizer=tokenizer,
    )


def make_flow_folder(folder: Path, pipeline: Callable[..., Any], **changes: Any) -> Path:
    """A folder of one of the pipelines above, its weights seeded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline(**changes).save_pretrained(folder)
    return folder
