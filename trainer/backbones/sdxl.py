"""Stable Diffusion XL (arXiv 2307.01952), and every pipeline of the same parts: a U-Net that is
told the whole text and the picture's size and crop, two CLIP text encoders, VAE, scheduler.

    tokens = [CLIP's last layer but one, OpenCLIP's last layer but one]     (b, 77, 768 + 1280)
    pooled = OpenCLIP's projection of the end of text                       (b, 1280)
    crop   = height, width, top, left, target height, target width          section 2.2 of the paper

The VAE of 1.0 gives values beyond the range of float16: it computes in fp32 here, as all VAEs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainer.attention.denoiser_traits import DenoiserTraits
from trainer.backbones.family import Family, Parts, text_arguments
from trainer.backbones.folder_check import check_channels, check_classes, check_prediction
from trainer.backbones.folder_contents import FolderContents
from trainer.backbones.spec import BackboneSpec

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.attention.condition import Condition
    from trainer.backbones.backbone import Backbone

CLIP, OPEN_CLIP = TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
TEXT = {
    CLIP: ("CLIPTextModel",),
    OPEN_CLIP: ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
ZEROS = "force_zeros_for_empty_prompt"  # an option of the pipeline
NUMBERS = 6  # of a crop


def encode_prompts(backbone: Backbone, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Prompts to tokens (b, n, d + d') and pooled (b, p). An empty prompt is zeros where the
    pipeline's options say so, as its unconditional rows are in diffusers. Of a prompt in parts, the
    first one's pooled text counts, as in other tools."""
    import torch

    hidden, pooled = [], None
    for part, encoder in backbone.text_encoders.items():
        output = encoder(backbone.tokens(prompts, part).input_ids, output_hidden_states=True)
        hidden.append(backbone.joined(_read_last(output.hidden_states[-2], output, encoder)))
        pooled = output[0]
    assert pooled is not None, "the last text encoder projects"
    parts = len(pooled) // len(prompts)
    found = {"tokens": torch.cat(hidden, dim=-1), "pooled": pooled[::parts]}
    empty = [not prompt for prompt in prompts]
    if not (backbone.options.get(ZEROS, True) and any(empty)):
        return found
    blank = torch.tensor(empty, device=pooled.device)
    return {
        name: value.masked_fill(blank.view(-1, *[1] * (value.ndim - 1)), 0)
        for name, value in found.items()
    }


def _read_last(states: Tensor, output: Any, encoder: Any) -> Tensor:
    """The states, to which the last layer, which reads them, gives a gradient of zero. Nothing else
    reads CLIP's; training on several GPUs needs a gradient of all that trains."""
    if not any(value.requires_grad for value in encoder.parameters()):
        return states
    import torch

    never = torch.zeros((), dtype=torch.bool, device=states.device)
    return states + torch.where(never, output.last_hidden_state.mean(), 0.0)


def encode_crop(backbone: Backbone, crops: Tensor) -> dict[str, Tensor]:
    """Which part of its picture each row shows, (b, 6), as `Condition.crop` has it."""
    return {"crop": crops.to(backbone.device)}


def inputs(backbone: Backbone, x_t: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    """A picture whose crop is not known is a whole one of its size, as in the stock pipeline."""
    crop = condition.crop
    if crop is None:
        height, width = (side * backbone.divisor for side in x_t.shape[-2:])
        crop = x_t.new_tensor([[height, width, 0, 0, height, width]]).expand(len(x_t), NUMBERS)
    added = {"text_embeds": condition.pooled, "time_ids": crop}
    return {"sample": x_t, "timestep": t, "added_cond_kwargs": added, **text_arguments(condition)}


def condition_shapes(backbone: Backbone) -> Mapping[str, tuple[int, ...]]:
    configs = [encoder.config for encoder in backbone.text_encoders.values()]
    width = sum(int(config.hidden_size) for config in configs)
    return {
        "tokens": (backbone.prompts.length, width),
        "pooled": (int(configs[-1].projection_dim),),
    }


def pipeline(backbone: Backbone) -> Any:
    from trainer.backbones.stock_pipeline import stock_pipeline

    zeros = bool(backbone.options.get(ZEROS, True))
    return stock_pipeline(
        backbone,
        "StableDiffusionXLPipeline",
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )


def check(facts: FolderContents) -> None:
    check_classes(facts, TEXT)
    check_prediction(facts.scheduler, facts.where)
    if facts.configs["vae"].get("latents_mean") is not None:
        raise facts.refuse(
            "vae",
            "has latents_mean: latents of another scale (Playground), which are not known here",
        )
    config = facts.configs["unet"]
    check_channels(facts, "unet", default=4)
    if (added := config.get("addition_embed_type")) != "text_time":
        raise facts.refuse(
            "unet",
            f"has addition_embed_type={added}; one of SDXL has text_time, so that it is told the "
            "pooled text and the picture's size",
        )
    _check_widths(facts, config)


def _check_widths(facts: FolderContents, config: Mapping[str, Any]) -> None:
    """Checks that the text of both encoders together is as wide as the U-Net reads it, and that the
    pooled text and six numbers are what it is told."""
    widths = [facts.width_of(part) for part in TEXT_ENCODERS]
    wanted = config.get("cross_attention_dim")
    if None not in widths and isinstance(wanted, int):
        total = sum(width for width in widths if width is not None)
        if total != wanted:
            raise facts.refuse(
                "unet",
                f"reads text of width {wanted}, and its text encoders give {widths[0]} + "
                f"{widths[1]}; the parts are of different models",
            )
    pooled = int(facts.configs[OPEN_CLIP].get("projection_dim", 512))
    own = config.get("projection_class_embeddings_input_dim")
    told = pooled + NUMBERS * int(config.get("addition_time_embed_dim") or 0)
    if own != told:
        raise facts.refuse(
            "unet",
            f"is told {own} values beside the text, and the pooled text and six numbers are {told}:"
            " it is a refiner, or its parts are of different models; choose the base model",
        )


def load(spec: BackboneSpec, name: str) -> Parts:
    """Loads the parts from a folder in diffusers layout, or from the hub at a pinned revision;
    `load_parts` says what it raises."""
    from trainer.backbones.load_parts import load_parts
    from trainer.backbones.schedulers import vp_scheduler

    return load_parts(
        spec,
        name,
        FAMILY,
        denoiser="UNet2DConditionModel",
        text={part: (TEXT[part][0], "CLIPTokenizer") for part in TEXT_ENCODERS},
        options=[ZEROS],
        scheduler=vp_scheduler,
    )


FAMILY = Family(
    denoiser="unet",
    pipelines=("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
    blocks=("down_blocks", "mid_block", "up_blocks"),
    load=load,
    encoders={"text": encode_prompts, "crop": encode_crop},
    inputs=inputs,
    pipeline=pipeline,
    text_encoders=TEXT_ENCODERS,
    shapes=condition_shapes,
    check=check,
    traits=DenoiserTraits(
        time_embedding="time_embedding", time_width="time_embedding.linear_2", input="conv_in"
    ),
)
