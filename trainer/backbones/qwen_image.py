"""Qwen-Image (arXiv 2508.02324): a transformer in whose joint layers the image and the text attend
to each other, trained on a flow; Qwen2.5-VL reads the prompt, asked to describe an image, and its
VAE takes clips, a picture as one frame. Two by two latents are one token.

    x_t (b, 16, h, w) -> tokens (b, h/2 w/2, 64) -> the network -> (b, 16, h, w)

Guidance s is that of arXiv 2207.12598, then each token has the length it has without guidance, as
in diffusers' pipeline, where s is `true_cfg_scale`:

    g = uncond + s (cond - uncond),   output = g |cond| / |g|        over the 64 values of a token
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainer.attention.denoiser_traits import DenoiserTraits, JointTraits
from trainer.backbones.family import ChatTemplate, Family, Parts
from trainer.backbones.flux1 import FOLD, packed_channels
from trainer.backbones.folder_check import check_channels, check_classes, check_flow, check_widths
from trainer.backbones.folder_contents import FolderContents
from trainer.backbones.latent_form import LatentForm, channel_statistics
from trainer.backbones.noise_levels import levels_by_tokens
from trainer.backbones.spec import BackboneSpec
from trainer.backbones.tool_names import ModelNames, Scripts, ToolNames, same_names

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.attention.condition import Condition
    from trainer.backbones.backbone import Backbone

TEXT = {
    "text_encoder": ("Qwen2_5_VLForConditionalGeneration",),
    "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
}
# of diffusers' pipeline, whose `prompt_template_encode` this is
TEMPLATE = ChatTemplate(
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity,"
    " text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}"
    "<|im_end|>\n<|im_start|>assistant\n",
    dropped=34,
)
PROMPT_LENGTH = 1024 + TEMPLATE.dropped
OTHER_KINDS = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")


def encode_prompts(backbone: Backbone, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Prompts to tokens (b, n, d) and a mask (b, n), without the question before the prompt."""
    from trainer.backbones.chat_text import without_padding

    found = backbone.tokens(prompts)
    output = backbone.text_encoder(
        input_ids=found.input_ids,
        attention_mask=found.attention_mask,
        output_hidden_states=True,
        logits_to_keep=1,
    )
    hidden = output.hidden_states[-1]
    return without_padding(hidden, found.attention_mask, dropped=TEMPLATE.dropped)


def _condition_shapes(backbone: Backbone) -> Mapping[str, tuple[int, ...]]:
    length = backbone.prompts.length
    width = int(backbone.denoiser.config.joint_attention_dim)
    return {"tokens": (length, width), "mask": (length,)}


def inputs(backbone: Backbone, x_t: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    from diffusers import QwenImagePipeline

    rows, channels, height, width = x_t.shape
    mask = condition.mask
    return {
        "hidden_states": QwenImagePipeline._pack_latents(
            x_t, rows, num_channels_latents=channels, height=height, width=width
        ),
        "timestep": t / 1000,
        "encoder_hidden_states": condition.tokens,
        "encoder_hidden_states_mask": None if mask is None or mask.all() else mask,
        "img_shapes": [[(1, height // FOLD, width // FOLD)]] * rows,
    }


def _unpacked(backbone: Backbone, output: Any, x_t: Tensor) -> Tensor:
    """Tokens (b, n, 4c) to latents (b, c, h, w)."""
    from diffusers import QwenImagePipeline

    latents: Tensor = QwenImagePipeline._unpack_latents(output, *x_t.shape[-2:], vae_scale_factor=1)
    return latents[:, :, 0]


def rescaled(output: Tensor, cond: Tensor) -> Tensor:
    """`output` with each token as long as in `cond`, both (b, c, h, w)."""
    from torch.nn.functional import interpolate, pixel_unshuffle

    lengths = [pixel_unshuffle(x, FOLD).norm(dim=1, keepdim=True) for x in (cond, output)]
    return output * interpolate(lengths[0] / lengths[1], scale_factor=FOLD)


def _halvings(config: Mapping[str, Any]) -> int | None:
    stages = config.get("temperal_downsample")
    return len(stages) if isinstance(stages, (list, tuple)) else None


def pipeline(backbone: Backbone) -> Any:
    from trainer.backbones.stock_pipeline import stock_pipeline

    return stock_pipeline(backbone, "QwenImagePipeline")


def check(facts: FolderContents) -> None:
    check_classes(facts, TEXT)
    check_flow(facts)
    check_channels(facts, "transformer", default=64, fold=FOLD)
    config = facts.configs["transformer"]
    check_widths(facts, "transformer", {"text_encoder": config.get("joint_attention_dim")})
    if found := [name for name in OTHER_KINDS if config.get(name)]:
        raise facts.refuse(
            "transformer",
            f"has {' and '.join(found)}, as models that edit pictures or layers have; this family "
            "has the text-to-image version, Qwen/Qwen-Image",
        )


def load(spec: BackboneSpec, name: str) -> Parts:
    """Loads the parts from a folder in diffusers layout, or from the hub at a pinned revision;
    `load_parts` says what it raises."""
    from trainer.backbones.load_parts import load_parts

    text = {"text_encoder": ("Qwen2_5_VLForConditionalGeneration", "Qwen2Tokenizer")}
    lengths = {"text_encoder": PROMPT_LENGTH}
    return load_parts(
        spec, name, FAMILY, denoiser="QwenImageTransformer2DModel", text=text, lengths=lengths
    )


# other tools keep these names
BLOCKS = same_names(
    [
        f"transformer_blocks.{{}}.{layer}"
        for layer in (
            *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")),
            *(f"attn.add_{name}_proj" for name in "qkv"),
            *(f"{part}_{name}" for part in ("img", "txt") for name in ("mod.1", "mlp.net.2")),
            *(f"{part}_mlp.net.0.proj" for part in ("img", "txt")),
        )
    ]
)
ENDS = same_names(
    [
        "img_in", "txt_in", "proj_out", "norm_out.linear",
        "time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2",
    ]
)  # fmt: skip

FAMILY = Family(
    denoiser="transformer",
    pipelines=("QwenImagePipeline", "QwenImageImg2ImgPipeline"),
    prompt_lengths={"QwenImagePipeline": PROMPT_LENGTH, "QwenImageImg2ImgPipeline": PROMPT_LENGTH},
    blocks=("transformer_blocks",),
    load=load,
    encoders={"text": encode_prompts},
    inputs=inputs,
    pipeline=pipeline,
    shapes=_condition_shapes,
    check=check,
    output=_unpacked,
    latents=LatentForm(
        vaes=("AutoencoderKLQwenImage",),
        statistics=channel_statistics,
        halvings=_halvings,
        clips=True,
    ),
    channels=packed_channels,
    sample_size=128,  # of diffusers' pipeline
    levels=levels_by_tokens,
    template=TEMPLATE,
    rescale=rescaled,
    tool_names={
        "QwenImageTransformer2DModel": ToolNames(
            BLOCKS | ENDS,
            comfyui="diffusers",
            scripts=Scripts(
                "musubi-tuner",
                BLOCKS,
                module="networks.lora_qwen_image",
                model=lambda config: ModelNames("qwen_image", "Qwen-Image"),
                stock=lambda config: True,
            ),
        )
    },
    traits=DenoiserTraits(
        time_embedding="time_text_embed",
        time_width="time_text_embed.timestep_embedder.linear_2",
        joint=(JointTraits("*", text_first=True),),
        patch=FOLD,
    ),
)
