"""Adapters for other tools. `merged`: the whole pipeline in diffusers layout, which stock diffusers
loads by itself."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import nn

from trainer import adapter
from trainer.attention.inject import fold
from trainer.attention.tokens import ExtendedEmbedding
from trainer.backbones.sd import StableDiffusion

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def export(path: Path, out: Path, form: str = "merged", dtype: str = "float32") -> Path:
    """Writes the adapted pipeline to `out`, a folder that must not exist yet.

    Raises:
        ValueError: an unknown format or dtype, or the folder exists.
    """
    if form != "merged":
        raise ValueError(f"format={form}: no such format; there is: merged")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: no such dtype; there are: {', '.join(DTYPES)}")
    if out.exists():
        raise ValueError(f"out={out} exists; name a folder that does not, nothing is written over")
    backbone, _ = adapter.load(path)
    part = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        merge(backbone).to(DTYPES[dtype]).pipeline().save_pretrained(part, safe_serialization=True)
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def merge(backbone: StableDiffusion) -> StableDiffusion:
    """Folds everything a stock pipeline has no name for into plain layers, in place."""
    backbone.host.detach()
    fold(backbone)
    for encoder in backbone.text_encoders.values():
        table = encoder.get_input_embeddings()  # type: ignore[operator]
        if isinstance(table, ExtendedEmbedding):
            encoder.set_input_embeddings(table.merged())  # type: ignore[operator]
            encoder.config.vocab_size = table.num_embeddings  # type: ignore[union-attr]
    _refuse_foreign(backbone)
    return backbone


def _refuse_foreign(backbone: nn.Module) -> None:
    """Every module left must be one that diffusers or transformers build by themselves."""
    for name, module in backbone.named_modules():
        if name and type(module).__module__.split(".")[0] not in (
            "torch",
            "diffusers",
            "transformers",
        ):
            raise ValueError(
                f"format=merged cannot carry {name} ({type(module).__name__}): a stock pipeline "
                "has no place for it"
            )
