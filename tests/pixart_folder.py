"""Tiny pipeline folders of PixArt in the class layout of those that are published, of stock
diffusers, with random weights: T5, an AutoencoderKL, a multistep solver of a linear VP path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

DATA = Path(__file__).parents[1] / "data" / "tiny"
ALPHA, SIGMA = "PixArtAlphaPipeline", "PixArtSigmaPipeline"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PIECES = ["▁", *LETTERS, *(f"▁{letter}" for letter in LETTERS), "▁fox", "▁background", "▁cat"]
UNUSED = 7  # rows of T5's table that no token has, 28 of the published one
NETWORK: dict[str, Any] = {  # as published, but for depth and width; learned variance behind noise
    "in_channels": 8,
    "out_channels": 16,
    "num_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "attention_bias": True,
    "caption_channels": 16,
}
OWN: dict[str, dict[str, Any]] = {
    # the size is told: in three parts of its embedding, so that 18 channels divide
    ALPHA: {"sample_size": 128, "attention_head_dim": 18, "cross_attention_dim": 36},
    SIGMA: {
        "sample_size": 128,
        "interpolation_scale": 2,
        "use_additional_conditions": False,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
    },
}


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [(piece, -2.0 - len(PIECES) + len(piece)) for piece in PIECES]
    return T5Tokenizer(vocab=[*marks, *pieces], extra_ids=0, model_max_length=512)


def sentencepiece_file() -> bytes:
    """The same pieces as a `spiece.model`, the only file of the vocabulary that PixArt's folders
    have."""
    from transformers.convert_slow_tokenizer import import_protobuf

    model = import_protobuf().ModelProto()
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}
    for piece, score in t5_tokenizer()._vocab_scores:
        model.pieces.add(piece=piece, score=score, type=kinds.get(piece, 1))
    spec = model.trainer_spec
    spec.model_type, spec.pad_id, spec.eos_id, spec.unk_id, spec.bos_id = 1, 0, 1, 2, -1
    written: bytes = model.SerializeToString()
    return written


def stock_pixart(kind: str) -> Any:
    """The parts, seeded, as a stock pipeline."""
    import diffusers
    from diffusers import (
        AutoencoderKL,
        DPMSolverMultistepScheduler,
        PixArtTransformer2DModel,
    )
    from transformers import T5Config, T5EncoderModel

    tokenizer = t5_tokenizer()
    text = T5Config(
        vocab_size=len(tokenizer) + UNUSED, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = T5EncoderModel(text).eval()
        network = PixArtTransformer2DModel(**(NETWORK | OWN[kind])).eval()
    return getattr(diffusers, kind)(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=AutoencoderKL.from_pretrained(DATA / "vae", torch_dtype=torch.float32),
        transformer=network,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
    )


def make_pixart_folder(folder: Path, kind: str) -> Path:
    """A folder whose index and config name the network's class as the published ones do."""
    stock_pixart(kind).save_pretrained(folder)
    old = {"model_index.json": {"transformer": ["diffusers", "Transformer2DModel"]}}
    old["transformer/config.json"] = {"_class_name": "Transformer2DModel"}  # type: ignore[dict-item]
    for name, changes in old.items():
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder
