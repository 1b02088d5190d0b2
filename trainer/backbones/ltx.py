"""LTX-Video (arXiv 2501.00103): a transformer of clips, each token one latent of a VAE that makes
one of 8 x 32 x 32 pixels; T5's text encoder; trained on a flow whose noise levels depend on the
number of tokens.

    frames (1 + 8 k, 3, H, W)  ->  latents (1 + k, 128, H / 32, W / 32)  ->  tokens of one latent
    x0 = (z - latents_mean) / latents_std * scaling_factor      of each channel

It is told the time and place of every token, in seconds and pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainer.attention.denoiser_traits import DenoiserTraits
from trainer.backbones.clip_frames import ClipFrames
from trainer.backbones.family import Family, Parts, masked_text_shapes, text_arguments
from trainer.backbones.folder_check import check_channels, check_classes, check_flow, check_widths
from trainer.backbones.folder_contents import FolderContents
from trainer.backbones.latent_form import LatentForm
from trainer.backbones.noise_levels import levels_by_tokens
from trainer.backbones.spec import BackboneSpec
from trainer.backbones.tool_names import ToolNames, same_names

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.attention.condition import Condition
    from trainer.backbones.backbone import Backbone

TEXT = {
    "text_encoder": ("T5EncoderModel",),
    "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
}
PROMPT_LENGTH = 128  # the default of diffusers' pipeline
RATE = 25.0  # frames a second of clips whose rate is not given, as the pipeline has it


def encode_prompts(backbone: Backbone, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Prompts to tokens (b, n, d), which are encoded with their padding, and their mask (b, n)."""
    tokens = backbone.tokens(prompts)
    states: Tensor = backbone.text_encoder(tokens.input_ids)[0]
    return {"tokens": backbone.joined(states), "mask": backbone.joined(tokens.attention_mask)}


def inputs(backbone: Backbone, x_t: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    """For clips x_t (b, c, f, h, w), which the transformer takes as tokens (b, f h w, c)."""
    from diffusers import LTXPipeline

    frames, height, width = x_t.shape[2:]
    return {
        "hidden_states": LTXPipeline._pack_latents(x_t),
        "timestep": t,
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": _lengths(backbone, x_t),
        **text_arguments(condition),
    }


def _lengths(backbone: Backbone, x_t: Tensor) -> tuple[Any, int, int]:
    """How long a latent is in seconds, of each clip, and how high and wide in pixels."""
    from trainer.attention.context import current

    ctx, later = current(), backbone.clip_frames.per_latent
    rates = None if ctx is None else ctx.fps
    seconds: Any = later / RATE
    if rates is not None:
        seconds = (later / rates.to(x_t)).view(-1, 1, 1, 1, 1)
    return seconds, backbone.divisor, backbone.divisor


def _output(backbone: Backbone, output: Tensor, x_t: Tensor) -> Tensor:
    """Tokens (b, f h w, c) as clips again."""
    from diffusers import LTXPipeline

    frames, height, width = x_t.shape[2:]
    size = {"num_frames": frames, "height": height, "width": width}
    found: Tensor = LTXPipeline._unpack_latents(output, **size)
    return found


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (c,) of the VAE's latents."""
    return vae.latents_mean, vae.latents_std / vae.config.scaling_factor


def _halvings(config: Mapping[str, Any]) -> int:
    pixels = config.get("spatial_compression_ratio")
    return int(pixels or config.get("patch_size", 4) * _scaled(config)).bit_length() - 1


def _frames(config: Mapping[str, Any]) -> ClipFrames:
    frames = config.get("temporal_compression_ratio")
    return ClipFrames(int(frames or config.get("patch_size_t", 1) * _scaled(config)))


def _scaled(config: Mapping[str, Any]) -> int:
    """How much smaller its blocks make a clip, in space and in time."""
    return int(2 ** sum(config.get("spatio_temporal_scaling") or (True, True, True, False)))


def pipeline(backbone: Backbone) -> Any:
    from trainer.backbones.stock_pipeline import stock_pipeline

    return stock_pipeline(backbone, "LTXPipeline")


def check(facts: FolderContents) -> None:
    check_classes(facts, TEXT)
    check_flow(facts)
    config, vae = facts.configs["transformer"], facts.configs["vae"]
    if any(config.get(key, 1) != 1 for key in ("patch_size", "patch_size_t")):
        raise facts.refuse(
            "transformer", "has tokens of several latents, which no published LTX-Video has"
        )
    if any(vae.get("decoder_inject_noise") or ()):
        raise facts.refuse(
            "vae",
            "draws noise while it decodes, so that no clip could be made again (LTX-Video 0.9.1); "
            "choose version 0.9.0, or 0.9.5 and later",
        )
    check_channels(facts, "transformer", default=128)
    check_widths(facts, "transformer", {"text_encoder": config.get("caption_channels", 4096)})


def load(spec: BackboneSpec, name: str) -> Parts:
    """Loads the parts from a folder in diffusers layout, or from the hub at a pinned revision;
    `load_parts` says what it raises."""
    from trainer.backbones.load_parts import load_parts

    text = {"text_encoder": ("T5EncoderModel", "T5Tokenizer")}
    lengths = {"text_encoder": PROMPT_LENGTH}
    return load_parts(
        spec, name, FAMILY, denoiser="LTXVideoTransformer3DModel", text=text, lengths=lengths
    )


# as LTX-Video's first code names its layers, which ComfyUI keeps
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
BLOCK = (
    *(f"{kind}.{layer}" for kind in ("attn1", "attn2") for layer in ATTENTION),
    "ff.net.0.proj",
    "ff.net.2",
)
ORIGINAL = same_names([f"transformer_blocks.{{}}.{layer}" for layer in BLOCK]) | {
    "patchify_proj": ("proj_in",),
    "adaln_single.emb.timestep_embedder.linear_1": ("time_embed.emb.timestep_embedder.linear_1",),
    "adaln_single.emb.timestep_embedder.linear_2": ("time_embed.emb.timestep_embedder.linear_2",),
    "adaln_single.linear": ("time_embed.linear",),
    "caption_projection.linear_1": ("caption_projection.linear_1",),
    "caption_projection.linear_2": ("caption_projection.linear_2",),
    "proj_out": ("proj_out",),
}
TABLES = ("transformer_blocks.{}.scale_shift_table", "scale_shift_table")

FAMILY = Family(
    denoiser="transformer",
    pipelines=("LTXPipeline",),
    blocks=("transformer_blocks",),
    load=load,
    encoders={"text": encode_prompts},
    shapes=masked_text_shapes,
    inputs=inputs,
    pipeline=pipeline,
    prompt_lengths={"LTXPipeline": PROMPT_LENGTH},
    check=check,
    output=_output,
    latents=LatentForm(
        vaes=("AutoencoderKLLTXVideo",),
        statistics=_statistics,
        halvings=_halvings,
        clips=True,
        frames=_frames,
    ),
    sample_size=16,
    levels=levels_by_tokens,
    tool_names={
        "LTXVideoTransformer3DModel": ToolNames(
            ORIGINAL, comfyui="original", parameters={name: name for name in TABLES}
        )
    },
    traits=DenoiserTraits(
        time_embedding="time_embed.emb",
        time_width="time_embed.emb.timestep_embedder.linear_2",
        layout="tokens",
        joint=(),
    ),
)
