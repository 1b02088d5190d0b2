"""CogVideoX (arXiv 2408.06072): a transformer of clips in which text and tokens of space and time
attend to each other in one sequence, T5's text encoder, a causal VAE of video, trained to predict v
on a VP path whose noise levels are shifted.

    frames (1 + 8 k, 3, H, W)  ->  latents (1 + 2 k, 16, H / 8, W / 8)  ->  tokens of 2 x 2 latents
    alpha'^2 = alpha^2 / (s + (1 - s) alpha^2)      s: snr_shift_scale, then alpha'(T) = 0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from trainer.attention.denoiser_traits import DenoiserTraits, JointTraits
from trainer.backbones.clip_frames import ClipFrames
from trainer.backbones.family import Family, Parts
from trainer.backbones.folder_check import (
    check_channels,
    check_classes,
    check_prediction,
    check_widths,
)
from trainer.backbones.folder_contents import FolderContents
from trainer.backbones.latent_form import LatentForm
from trainer.backbones.spec import BackboneSpec

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from trainer.attention.condition import Condition
    from trainer.backbones.backbone import Backbone

TEXT = {
    "text_encoder": ("T5EncoderModel",),
    "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
}
PROMPT_LENGTH = 226  # of the published models: max_text_seq_length of their transformers
SCHEDULERS = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")


def encode_prompts(backbone: Backbone, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Prompts to tokens (b, n, d), of which those of padding are read too."""
    states: Tensor = backbone.text_encoder(backbone.tokens(prompts).input_ids)[0]
    return {"tokens": backbone.joined(states)}


def inputs(backbone: Backbone, x_t: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    """For clips x_t (b, c, f, h, w), which the transformer takes as (b, f, c, h, w)."""
    return {
        "hidden_states": x_t.transpose(1, 2),
        "timestep": t,
        "encoder_hidden_states": condition.tokens,
        "image_rotary_emb": _positions(backbone, x_t),
    }


def _output(backbone: Backbone, output: Tensor, x_t: Tensor) -> Tensor:
    """From (b, f, c, h, w) to (b, c, f, h, w)."""
    return output.transpose(1, 2)


def _frames(config: Mapping[str, Any]) -> ClipFrames:
    """Its decoder makes one frame of the first latent frame only where their number is odd."""
    per_latent = int(config.get("temporal_compression_ratio") or 4)
    return ClipFrames(per_latent, step=2 * per_latent)


def _positions(backbone: Backbone, x_t: Tensor) -> Any:
    """The rotary positions of the larger models, as the stock pipeline makes them; None for those
    that add positions to the tokens."""
    if not backbone.denoiser.config.use_rotary_positional_embeddings:
        return None
    from diffusers import CogVideoXPipeline

    pipe: Any = SimpleNamespace(
        transformer=backbone.denoiser, vae_scale_factor_spatial=backbone.divisor
    )
    frames, *sides = x_t.shape[2:]
    height, width = (side * backbone.divisor for side in sides)
    make = CogVideoXPipeline._prepare_rotary_positional_embeddings
    return make(pipe, height, width, num_frames=frames, device=x_t.device)


def pipeline(backbone: Backbone) -> Any:
    from trainer.backbones.stock_pipeline import stock_pipeline

    return stock_pipeline(backbone, "CogVideoXPipeline")


def check(facts: FolderContents) -> None:
    check_classes(facts, TEXT)
    check_prediction(facts.scheduler, facts.where)
    kind = facts.scheduler.get("_class_name")
    if kind not in SCHEDULERS:
        raise facts.refuse("scheduler", f"is a {kind}; this family has {' and '.join(SCHEDULERS)}")
    config = facts.configs["transformer"]
    if config.get("patch_size_t") is not None or config.get("ofs_embed_dim") is not None:
        raise facts.refuse(
            "transformer",
            "has tokens of several latent frames, as CogVideoX 1.5, which is not trained here; "
            "choose CogVideoX-2b or -5b",
        )
    check_channels(facts, "transformer", default=16)
    check_widths(facts, "transformer", {"text_encoder": config.get("text_embed_dim", 4096)})


def load(spec: BackboneSpec, name: str) -> Parts:
    """Loads the parts from a folder in diffusers layout, or from the hub at a pinned revision;
    `load_parts` says what it raises."""
    from trainer.backbones.load_parts import load_parts

    parts = load_parts(
        spec,
        name,
        FAMILY,
        denoiser="CogVideoXTransformer3DModel",
        text={"text_encoder": ("T5EncoderModel", "T5Tokenizer")},
        scheduler=scheduler,
    )
    length = int(parts.denoiser.config.max_text_seq_length)
    return replace(parts, prompt_lengths={"text_encoder": length})


def scheduler(config: Mapping[str, Any], where: Path) -> Any:
    """The DDIM scheduler with the noise levels of either of CogVideoX's schedulers."""
    import inspect

    from diffusers import CogVideoXDDIMScheduler

    own = inspect.signature(CogVideoXDDIMScheduler.__init__).parameters
    return CogVideoXDDIMScheduler(**{key: value for key, value in config.items() if key in own})


FAMILY = Family(
    denoiser="transformer",
    pipelines=("CogVideoXPipeline",),
    blocks=("transformer_blocks",),
    load=load,
    encoders={"text": encode_prompts},
    inputs=inputs,
    pipeline=pipeline,
    prompt_lengths={"CogVideoXPipeline": PROMPT_LENGTH},
    check=check,
    output=_output,
    latents=LatentForm(vaes=("AutoencoderKLCogVideoX",), clips=True, frames=_frames),
    traits=DenoiserTraits(
        time_embedding="time_embedding",
        time_width="time_embedding.linear_2",
        layout="tokens",
        joint=(JointTraits("transformer_blocks.*.attn1", text_first=True),),
    ),
)
