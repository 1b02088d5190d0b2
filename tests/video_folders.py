"""Tiny pipeline folders of Wan, CogVideoX and LTX-Video, of stock diffusers, with random
weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PIECES = ["▁", *LETTERS, *(f"▁{letter}" for letter in LETTERS), "▁fox", "▁moving", "▁cat"]
VAE_LEVELS = (8, 8, 8, 8)
WAN: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip
COGVIDEOX: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "in_channels": 4,
    "out_channels": 4, "time_embed_dim": 16, "text_embed_dim": 16, "max_text_seq_length": 24,
    "sample_width": 4, "sample_height": 4, "sample_frames": 9,
}  # fmt: skip
LTX: dict[str, Any] = {
    "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16,
    "cross_attention_dim": 32, "num_layers": 2, "caption_channels": 16,
}  # fmt: skip


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [(piece, -2.0 - len(PIECES) + len(piece)) for piece in PIECES]
    return T5Tokenizer(vocab=[*marks, *pieces], extra_ids=0, model_max_length=512)


def t5_encoder(kind: str = "T5") -> Any:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(t5_tokenizer()), d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return getattr(transformers, f"{kind}EncoderModel")(config).eval()


def stock_wan(**network: Any) -> Any:
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )

    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.3, -0.2, 0.1, 0.0], latents_std=[0.5, 0.8, 1.2, 0.7],
    )  # fmt: skip
    return WanPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5_encoder("UMT5"), vae=vae.eval(),
        transformer=WanTransformer3DModel(**(WAN | network)).eval(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )  # fmt: skip


def stock_cogvideox(**network: Any) -> Any:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    vae = AutoencoderKLCogVideoX(
        block_out_channels=VAE_LEVELS, layers_per_block=1, norm_num_groups=4, latent_channels=4,
        scaling_factor=0.7,
    )  # fmt: skip
    return CogVideoXPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5_encoder(), vae=vae.eval(),
        transformer=CogVideoXTransformer3DModel(**(COGVIDEOX | network)).eval(),
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0,
            timestep_spacing="trailing", clip_sample=False,
        ),
    )  # fmt: skip


def stock_ltx(**network: Any) -> Any:
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=VAE_LEVELS, decoder_block_out_channels=VAE_LEVELS,
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip
    vae.latents_mean.copy_(torch.linspace(-0.5, 0.5, 8))
    vae.latents_std.copy_(torch.linspace(0.5, 1.5, 8))
    return LTXPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5_encoder(), vae=vae.eval(),
        transformer=LTXVideoTransformer3DModel(**(LTX | network)).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024,
            max_image_seq_len=4096, shift_terminal=0.1,
        ),
    )  # fmt: skip


STOCK: dict[str, Callable[..., Any]] = {
    "wan": stock_wan,
    "cogvideox": stock_cogvideox,
    "ltx": stock_ltx,
}


def make_video_folder(family: str, folder: Path, **network: Any) -> Path:
    """The parts, seeded. Those that start as zeros are drawn too, or nothing would depend on
    them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = STOCK[family](**network)
        for part in (pipe.transformer, pipe.vae):
            for parameter in part.parameters():
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.05)
    pipe.save_pretrained(folder)
    return folder
