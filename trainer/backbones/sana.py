"""Sana (arXiv 2410.10629): a transformer of linear self-attention and softmax cross-attention, with
convolutions in the feed-forward layers in the place of positions, trained on a flow.

Text, scheduler and sampling are those of PixArt, from which Sana comes. The VAE is Sana's own
`AutoencoderDC` or an `AutoencoderKL`, the text encoder Gemma 2 or CLIP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, SanaPipeline, SanaTransformer2DModel
from torch import Tensor

from trainer.backbones.pipeline_folder import pipeline_folder
from trainer.backbones.pixart import PixArt, initialise_as_dit, text_class
from trainer.backbones.schedulers import flow_or_vp

if TYPE_CHECKING:
    from trainer.backbones.spec import BackboneSpec

TEXT = {
    "text_encoder": ("CLIPTextModel", "Gemma2Model"),
    "tokenizer": ("CLIPTokenizer", "GemmaTokenizer", "GemmaTokenizerFast"),
}
VAES = {"AutoencoderDC": AutoencoderDC, "AutoencoderKL": AutoencoderKL}
WIDTHS = "encoder_block_out_channels"  # what AutoencoderDC calls block_out_channels
EXACT = -30.0  # a log-variance: noise of 3e-7


class Sana(PixArt):
    """transformer(x_t, t, text) with text (b, tokens, d) and its mask, on latents of a VAE."""

    family = "sana"
    length = 300  # tokens of a prompt: the default of diffusers' pipeline

    @property
    def divisor(self) -> int:
        widths = self.vae.config.get(WIDTHS) or self.vae.config.block_out_channels
        return int(2 ** (len(widths) - 1))

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """As of every backbone; `AutoencoderDC` has no posterior, only its mean."""
        vae: Any = self.vae
        if not isinstance(self.vae, AutoencoderDC):
            return super().moments(pixels)
        latent: Tensor = vae.encode(pixels).latent
        return torch.cat([latent, torch.full_like(latent, EXACT)], dim=1)

    def inputs(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> dict[str, Any]:
        return {
            "hidden_states": x_t,
            "timestep": t * self.transformer.config.timestep_scale,
            **condition,
        }

    def pipeline(self) -> Any:
        """The stock pipeline asks any VAE for `AutoencoderDC`'s widths; its config learns them."""
        if WIDTHS not in self.vae.config:
            self.vae.register_to_config(**{WIDTHS: self.vae.config.block_out_channels})
        return SanaPipeline(
            self.tokenizer, self.text_encoder, self.vae, self.transformer, self.scheduler()
        )


def load(spec: BackboneSpec, name: str) -> Sana:
    """Loads the parts from a folder in diffusers layout, or from the hub at a pinned revision.

    Raises:
        ValueError: the folder holds another pipeline, or a text encoder or VAE of another kind, a
        part is missing, its weights are not safetensors, or the transformer is a distilled one.
    """
    folder = pipeline_folder(spec, name, ["transformer", "text_encoder", "vae"])
    index = folder.index(name, ["SanaPipeline"])
    encoder, tokenizer = (text_class(index, part, name, TEXT[part]) for part in TEXT)
    vae = (index.get("vae") or (None, None))[1]
    if vae not in VAES:
        raise ValueError(f"backbone {name}: vae is a {vae}; this family has {', '.join(VAES)}")
    transformer = folder.load("transformer", SanaTransformer2DModel)
    if transformer.config.guidance_embeds:
        raise ValueError(
            f"backbone {name}: the transformer was distilled to take its guidance as an input "
            "(Sana-Sprint), which is not trained here; choose a Sana without guidance_embeds"
        )
    if "transformer" in spec.scratch:
        initialise(transformer)
    return Sana(
        name,
        folder.path,
        transformer,
        folder.load("text_encoder", encoder),
        # a tokenizer of Gemma pads on the left, and its pipeline on the right
        tokenizer.from_pretrained(
            folder.of("tokenizer"), local_files_only=True, padding_side="right"
        ),
        folder.load("vae", VAES[vae]),
        flow_or_vp(folder.scheduler_config(), folder.of("scheduler")),
    )


def initialise(transformer: Any) -> None:
    """A start for training from nothing: Sana's own, and cross-attention and the output at 0 as in
    PixArt. Convolutions in the feed-forward layers keep PyTorch's."""
    time, caption = transformer.time_embed, transformer.caption_projection
    narrow = (time.linear, caption.linear_1, caption.linear_2)
    initialise_as_dit(transformer, transformer.patch_embed.proj, time.emb, *narrow)
