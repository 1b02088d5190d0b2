"""Z-Image (Tongyi Lab, arXiv 2511.22699): a transformer that has image and text as one sequence,
trained on a flow; Qwen3 reads the prompt, asked in a chat, and gives its last layer but one. Two by
two latents are one token. Every row has as many text tokens as its prompt, so the network takes
lists.

    v(x_t, t) = -f(x_t, 1 - t / 1000, text)      f predicts x0 - noise, and its time runs backwards

`guidance` s is that of arXiv 2207.12598, of which 1 is none; diffusers' pipeline calls s - 1 its
`guidance_scale`. Turbo was distilled to eight steps: plain training undoes that, so it samples
only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainer.attention.denoiser_traits import DenoiserTraits, JointTraits
from trainer.backbones.family import ChatTemplate, Family, Parts
from trainer.backbones.folder_check import check_channels, check_classes, check_flow, check_widths
from trainer.backbones.folder_contents import FolderContents
from trainer.backbones.noise_levels import levels_by_tokens
from trainer.backbones.spec import BackboneSpec
from trainer.backbones.tool_names import ModelNames, Scripts, ToolNames, block_names, same_names

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.attention.condition import Condition
    from trainer.backbones.backbone import Backbone

TEXT = {
    "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
    "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
}
PROMPT_LENGTH = 512  # with the template; the default of diffusers' pipeline
TEMPLATE = ChatTemplate("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n")
PATCH = 2  # latents along an edge of a token
MULTIPLE = 32  # tokens that image and text are each filled up to
TURBO_SHIFT = 3.0  # of Turbo's scheduler, by which alone it differs; that of the base model is 6


def encode_prompts(backbone: Backbone, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Prompts to tokens (b, n, d), those of the template too, and a mask (b, n)."""
    from trainer.backbones.chat_text import without_padding

    found = backbone.tokens(prompts)
    output = backbone.text_encoder(
        input_ids=found.input_ids, attention_mask=found.attention_mask, output_hidden_states=True
    )
    return without_padding(output.hidden_states[-2], found.attention_mask)


def _condition_shapes(backbone: Backbone) -> Mapping[str, tuple[int, ...]]:
    length = backbone.prompts.length
    return {"tokens": (length, int(backbone.denoiser.config.cap_feat_dim)), "mask": (length,)}


def inputs(backbone: Backbone, x_t: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    return {
        "x": list(x_t.unsqueeze(2).unbind(0)),
        "t": (1000 - t) / 1000,
        "cap_feats": captions(condition),
    }


def captions(condition: Condition) -> list[Tensor]:
    """The text of each row without its padding, (n, d)."""
    text, mask = condition.tokens, condition.mask
    assert text is not None, "this family reads text"
    if mask is None:
        return list(text.unbind(0))
    return [row[:own] for row, own in zip(text, mask.sum(1).tolist(), strict=True)]


def velocity(backbone: Backbone, output: Any, x_t: Tensor) -> Tensor:
    """Pictures of one frame, b of (c, 1, h, w) and of x0 - noise, to noise - x0 (b, c, h, w)."""
    import torch

    return -torch.stack(list(output)).squeeze(2)


def _distilled(_: object, scheduler: Mapping[str, Any], __: object) -> str | None:
    """Why Turbo is not trained: its scheduler alone tells it from the base model."""
    if scheduler.get("use_dynamic_shifting") or scheduler.get("shift", 1.0) != TURBO_SHIFT:
        return None
    return (
        "Z-Image-Turbo was distilled to eight steps, which training on it plainly undoes (its "
        f"scheduler has a shift of {TURBO_SHIFT:g}, that of the base model 6); train on z_image, "
        "whose adapters Turbo takes in `sample`"
    )


def pipeline(backbone: Backbone) -> Any:
    from trainer.backbones.stock_pipeline import stock_pipeline

    return stock_pipeline(backbone, "ZImagePipeline")


def check(facts: FolderContents) -> None:
    check_classes(facts, TEXT)
    check_flow(facts)
    check_channels(facts, "transformer", default=16)
    config = facts.configs["transformer"]
    check_widths(facts, "transformer", {"text_encoder": config.get("cap_feat_dim")})
    if config.get("siglip_feat_dim"):
        raise facts.refuse(
            "transformer",
            "also reads pictures (siglip_feat_dim, Z-Image-Omni), which is not trained here; "
            "choose the text-to-image version, Tongyi-MAI/Z-Image",
        )
    if PATCH not in config.get("all_patch_size", (PATCH,)):
        raise facts.refuse(
            "transformer",
            f"has tokens of {config['all_patch_size']} latents; this family has {PATCH}",
        )


def load(spec: BackboneSpec, name: str) -> Parts:
    """Loads the parts from a folder in diffusers layout, or from the hub at a pinned revision;
    `load_parts` says what it raises."""
    from trainer.backbones.chat_text import check_template
    from trainer.backbones.load_parts import load_parts

    text = {"text_encoder": ("Qwen3Model", "Qwen2Tokenizer")}
    lengths = {"text_encoder": PROMPT_LENGTH}
    parts = load_parts(
        spec, name, FAMILY, denoiser="ZImageTransformer2DModel", text=text, lengths=lengths
    )
    tokenizer = parts.tokenizers["text_encoder"]
    check_template(tokenizer, TEMPLATE, name, enable_thinking=True)
    return parts


# as the model's first code names its layers: one for q, k and v; musubi-tuner has the names here
ATTENTION = ("attention.to_q", "attention.to_k", "attention.to_v")
PARTS = ("layers", "noise_refiner", "context_refiner")
REST = same_names(["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"])
ORIGINAL = {
    name: layers
    for part in PARTS
    for name, layers in block_names(
        part,
        part,
        {"attention.qkv": ATTENTION, "attention.out": ("attention.to_out.0",)}
        | REST
        | same_names(["adaLN_modulation.0"]),
    ).items()
} | {
    "final_layer.linear": ("all_final_layer.2-1.linear",),
    "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
    "x_embedder": ("all_x_embedder.2-1",),
    **same_names(["cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2"]),
}
SCRIPTS = {
    name: layers
    for part in PARTS
    for name, layers in block_names(
        part, part, same_names([*ATTENTION, "attention.to_out.0", *REST])
    ).items()
}

FAMILY = Family(
    denoiser="transformer",
    pipelines=("ZImagePipeline", "ZImageImg2ImgPipeline"),
    prompt_lengths={"ZImagePipeline": PROMPT_LENGTH, "ZImageImg2ImgPipeline": PROMPT_LENGTH},
    blocks=("noise_refiner", "context_refiner", "layers"),
    load=load,
    encoders={"text": encode_prompts},
    inputs=inputs,
    pipeline=pipeline,
    shapes=_condition_shapes,
    check=check,
    output=velocity,
    sample_size=128,  # 1024 pixels, the default of diffusers' pipeline
    levels=levels_by_tokens,
    distilled=_distilled,
    template=TEMPLATE,
    tool_names={
        "ZImageTransformer2DModel": ToolNames(
            ORIGINAL,
            comfyui="diffusers",
            parameters={name: name for name in ("x_pad_token", "cap_pad_token")},
            scripts=Scripts(
                "musubi-tuner",
                SCRIPTS,
                module="networks.lora_zimage",
                model=lambda config: ModelNames("z_image", "Z-Image"),
                stock=lambda config: True,
            ),
        )
    },
    traits=DenoiserTraits(
        time_embedding="t_embedder",
        time_width="t_embedder.mlp.2",
        joint=(JointTraits("layers.*", text_first=False, counts="image", multiple=MULTIPLE),),
        patch=PATCH,
    ),
)
