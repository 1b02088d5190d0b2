"""Tiny pipeline folders whose text encoder is a language model that is asked in a chat: Z-Image,
Qwen-Image and FLUX.2, of stock diffusers, with random weights."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from flow_folders import DYNAMIC, FLUX, VAE, stirred, tiny_vae
from tokenizers.pre_tokenizers import ByteLevel

MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QUESTION = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:"
)
WORDS = [*QUESTION.replace(",", " ").replace(":", " ").split(), "user", "assistant", "fox", "left"]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
WIDTH = 16  # of the text
DECODER: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
}
ENDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
Z_IMAGE: dict[str, Any] = {
    "in_channels": 4,
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": WIDTH,
    "axes_dims": [8, 4, 4],
    "axes_lens": [256, 64, 64],
}
QWEN_IMAGE: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": (8, 4, 4),
}
CLIP_VAE: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False],
    "latents_mean": [0.3, -0.2, 0.1, 0.0],
    "latents_std": [1.5, 0.7, 1.1, 0.9],
}


def chat_tokenizer() -> Any:
    """A byte-level tokenizer that has the words of a template as one token each, so that as many
    tokens stand before the prompt as with the published one."""
    from transformers import Qwen2Tokenizer

    merges: dict[tuple[str, str], int] = {}
    for word in [start + own for own in WORDS for start in ("", "Ġ")]:
        while len(parts := _pieces(word, merges)) > 1:
            merges[parts[0], parts[1]] = len(merges)
    tokens = [*sorted(ByteLevel.alphabet()), *dict.fromkeys("".join(pair) for pair in merges)]
    return Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate([*tokens, *MARKS])},
        merges=list(merges),
        additional_special_tokens=MARKS[1:],
        chat_template=CHAT,
        model_max_length=4096,
    )


def _pieces(word: str, merges: dict[tuple[str, str], int]) -> list[str]:
    """A word as the merges make it, the earliest first."""
    parts = list(word)
    while known := [pair for pair in pairwise(parts) if pair in merges]:
        first = min(known, key=merges.__getitem__)
        at = list(pairwise(parts)).index(first)
        parts[at : at + 2] = ["".join(first)]
    return parts


def z_image_pipeline(shift: float = 6.0, **transformer: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = chat_tokenizer()
    config = Qwen3Config(**DECODER, **ENDS, head_dim=8, vocab_size=len(tokenizer))
    return ZImagePipeline(
        transformer=stirred(ZImageTransformer2DModel(**Z_IMAGE | transformer)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=tiny_vae(),
        text_encoder=Qwen3Model(config).eval(),
        tokenizer=tokenizer,
    )


def qwen_image_pipeline(**transformer: Any) -> Any:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = chat_tokenizer()
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = DECODER | ENDS | {"vocab_size": len(tokenizer), "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
              "out_hidden_size": WIDTH, "fullatt_block_indexes": [0]}  # fmt: skip
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )
    scheduler = {"max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
    return QwenImagePipeline(
        transformer=stirred(QwenImageTransformer2DModel(**QWEN_IMAGE | transformer)),
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC | scheduler),
        vae=AutoencoderKLQwenImage(**CLIP_VAE).eval(),
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
    )


def flux2_pipeline(distilled: bool = False, **transformer: Any) -> Any:
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = chat_tokenizer()
    text = DECODER | ENDS | {"num_hidden_layers": 28}
    qwen = Qwen3ForCausalLM(Qwen3Config(**text, head_dim=8, vocab_size=len(tokenizer)))
    config = FLUX | {
        "joint_attention_dim": 3 * WIDTH, "axes_dims_rope": (4, 4, 4, 4), "guidance_embeds": False,
        "timestep_guidance_channels": 32,
    }  # fmt: skip
    own = {name: value for name, value in VAE.items() if not name.endswith("_factor")}
    vae = AutoencoderKLFlux2(**own | {"use_quant_conv": True, "use_post_quant_conv": True})
    vae.bn.running_mean.copy_(torch.linspace(-1, 1, 16))
    vae.bn.running_var.copy_(torch.linspace(0.3, 2, 16))
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        vae=vae.eval(),
        text_encoder=qwen.eval(),
        tokenizer=tokenizer,
        transformer=stirred(Flux2Transformer2DModel(**config | transformer)),
        is_distilled=distilled,
    )
