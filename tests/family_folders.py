"""A tiny pipeline folder of every family, by its name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from chat_folders import flux2_pipeline, qwen_image_pipeline, z_image_pipeline
from flow_folders import (
    chroma_pipeline,
    flux1_pipeline,
    make_flow_folder,
    sd3_pipeline,
)
from pixart_folder import SIGMA, make_pixart_folder
from sdxl_folder import make_sdxl_folder
from video_folders import STOCK, make_video_folder

DATA = Path(__file__).parents[1] / "data"


def _dit(folder: Path) -> Path:
    """Told classes, whose embeddings, and what reads them, do not start at 0."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=8, out_channels=16,
            num_layers=2, sample_size=8,
        )  # fmt: skip
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    vae = AutoencoderKL.from_pretrained(DATA / "tiny" / "vae", torch_dtype=torch.float32)
    scheduler = DDIMScheduler(beta_start=0.0001, beta_end=0.02, clip_sample=False)
    DiTPipeline(network, vae, scheduler).save_pretrained(folder)
    return folder


def _sana(folder: Path) -> Path:
    """The shipped text encoder and VAE with a seeded random transformer."""
    from diffusers import SanaTransformer2DModel

    for part in ("text_encoder", "tokenizer", "vae"):
        shutil.copytree(DATA / "tiny" / part, folder / part)
    shutil.copytree(DATA / "tiny_sana" / "scheduler", folder / "scheduler")
    shutil.copy(DATA / "tiny_sana" / "model_index.json", folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        SanaTransformer2DModel(
            sample_size=8, in_channels=8, out_channels=8, num_layers=2, num_attention_heads=4,
            attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=16,
            cross_attention_dim=32, caption_channels=128, patch_size=2,
        ).save_pretrained(folder / "transformer")  # fmt: skip
    return folder


def _flow(pipeline: Callable[..., Any]) -> Callable[[Path], Path]:
    return lambda folder: make_flow_folder(folder, pipeline)


def _video(family: str) -> Callable[[Path], Path]:
    return lambda folder: make_video_folder(family, folder)


MAKERS: dict[str, Callable[[Path], Path]] = {
    "sdxl": make_sdxl_folder,
    "pixart": lambda folder: make_pixart_folder(folder, SIGMA),
    "sana": _sana,
    "dit": _dit,
    "sd3": _flow(sd3_pipeline),
    "flux1": _flow(flux1_pipeline),
    "chroma": _flow(chroma_pipeline),
    "flux2": _flow(flux2_pipeline),
    "qwen_image": _flow(qwen_image_pipeline),
    "z_image": _flow(z_image_pipeline),
    **{family: _video(family) for family in STOCK},
}
