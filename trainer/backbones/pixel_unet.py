"""Denoising diffusion on pixels (DDPM, arXiv 2006.11239): a U-Net and a CLIP text encoder, and no
VAE. What the denoiser is trained on, x0, is the picture itself, (b, 3, H, W) in [-1, 1].

    x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise

The paper's networks know no text. This one reads it as Stable Diffusion's does, so that what it
generates can be asked for.
"""

from __future__ import annotations

from trainer.backbones import sd
from trainer.backbones.family import Family, Parts
from trainer.backbones.latent_form import PIXELS
from trainer.backbones.spec import BackboneSpec, UNetSpec


def load(spec: BackboneSpec, name: str) -> Parts:
    """Loads the text encoder, its tokenizer and the schedule of the noise from a folder, and a
    U-Net from there or made from nothing.

    Raises:
        ValueError: the folder holds another pipeline, a part is missing, or its weights are not
        safetensors.
    """
    return sd.load_unet(spec, name, FAMILY)


FAMILY = Family(
    denoiser="unet",
    pipelines=("PixelTextPipeline",),
    blocks=sd.FAMILY.blocks,
    load=load,
    encoders={"text": sd.encode_prompts},
    inputs=sd.inputs,
    pipeline=None,
    makes=UNetSpec,
    check=sd.check,
    traits=sd.FAMILY.traits,
    latents=PIXELS,
)
