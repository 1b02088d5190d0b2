"""FLUX.2 klein (Black Forest Labs, 2026): a transformer of joint and single blocks on a flow, that
reads three layers of Qwen3 as text. Four latents of its VAE are one of the denoiser's, normed by
the statistics of the VAE's batch norm:

    z (b, 32, 2h, 2w) -> fold -> (b, 128, h, w) -> (z - mean) / std = x0, a token each

    tokens = [layer 9, layer 18, layer 27] of the prompt in Qwen's chat template    (b, 512, 3 d)

The shift of the noise levels depends on the number of tokens and on the steps. The models without
`base` in their name were distilled to four steps, which plain training undoes: they sample only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainer.attention.denoiser_traits import DenoiserTraits, JointTraits
from trainer.backbones.family import ChatTemplate, Family, Parts
from trainer.backbones.flux1 import ATTENTION, ENDS
from trainer.backbones.folder_check import check_channels, check_classes, check_flow
from trainer.backbones.folder_contents import FolderContents
from trainer.backbones.latent_form import LatentForm
from trainer.backbones.noise_levels import Extent, NoiseLevels, even_levels
from trainer.backbones.spec import BackboneSpec
from trainer.backbones.tool_names import ModelNames, Scripts, ToolNames, block_names

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.attention.condition import Condition
    from trainer.backbones.backbone import Backbone

TEXT = {
    "text_encoder": ("Qwen3ForCausalLM",),
    "tokenizer": ("Qwen2TokenizerFast", "Qwen2Tokenizer"),
}
LENGTH = 512  # tokens of a prompt in its template, the default of diffusers' pipeline
# of Qwen3's tokenizer, which the pipeline asks for an answer without thinking
TEMPLATE = ChatTemplate(
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    padding="max_length",
)
LAYERS = (9, 18, 27)  # of Qwen3, whose outputs are the text
FOLD = 2
DISTILLED = "is_distilled"  # an option of the pipeline


def encode_prompts(backbone: Backbone, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Prompts to tokens (b, n, 3 d), padding too."""
    from diffusers import Flux2KleinPipeline

    tokens = Flux2KleinPipeline._get_qwen3_prompt_embeds(
        text_encoder=backbone.text_encoder,
        tokenizer=backbone.tokenizer,
        prompt=[backbone.prompts.as_read(text) for text in prompts],
        max_sequence_length=backbone.prompts.length,
        hidden_states_layers=list(LAYERS),
    )
    return {"tokens": tokens}


def _condition_shapes(backbone: Backbone) -> Mapping[str, tuple[int, ...]]:
    width = len(LAYERS) * int(backbone.text_encoder.config.hidden_size)
    return {"tokens": (backbone.prompts.length, width)}


def inputs(backbone: Backbone, x_t: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    from diffusers import Flux2KleinPipeline

    text = condition.tokens
    assert text is not None, "this family reads text"
    return {
        "hidden_states": Flux2KleinPipeline._pack_latents(x_t),
        "timestep": t / 1000,
        "guidance": None,
        "encoder_hidden_states": text,
        "txt_ids": Flux2KleinPipeline._prepare_text_ids(text[:1])[0].to(x_t.device),
        "img_ids": Flux2KleinPipeline._prepare_latent_ids(x_t[:1])[0].to(x_t.device),
    }


def _unpacked(backbone: Backbone, output: Any, x_t: Tensor) -> Tensor:
    """Tokens (b, h w, c) to latents (b, c, h, w)."""
    latents: Tensor = output.transpose(1, 2).unflatten(2, x_t.shape[-2:])
    return latents


def _levels(backbone: Backbone, steps: int, extent: Extent) -> NoiseLevels:
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    mu = compute_empirical_mu(backbone.image_tokens(extent), steps)
    return NoiseLevels(mu, even_levels(steps))


def statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's batch norm, of each folded channel (c,)."""
    norm = vae.bn
    return norm.running_mean, (norm.running_var + vae.config.batch_norm_eps).sqrt()


def _distilled(_: object, __: object, options: Mapping[str, Any]) -> str | None:
    if not options.get(DISTILLED):
        return None
    return (
        "this FLUX.2 klein was distilled to four steps, which training on it plainly undoes; train "
        "on flux2_klein, the base model, whose adapters the distilled one takes in `sample`"
    )


def pipeline(backbone: Backbone) -> Any:
    from trainer.backbones.stock_pipeline import stock_pipeline

    return stock_pipeline(
        backbone, "Flux2KleinPipeline", is_distilled=bool(backbone.options.get(DISTILLED))
    )


def check(facts: FolderContents) -> None:
    check_classes(facts, TEXT)
    check_flow(facts)
    check_channels(facts, "transformer", default=128, fold=FOLD)
    config, width = facts.configs["transformer"], facts.width_of("text_encoder")
    wanted = config.get("joint_attention_dim")
    if None not in (width, wanted) and len(LAYERS) * int(width or 0) != wanted:
        raise facts.refuse(
            "transformer",
            f"reads text of width {wanted}, and three layers of its text_encoder give "
            f"{len(LAYERS) * int(width or 0)}; the parts are of different models",
        )
    if facts.configs["text_encoder"].get("num_hidden_layers", LAYERS[-1]) < LAYERS[-1]:
        raise facts.refuse("text_encoder", f"has fewer than {LAYERS[-1]} layers, which are read")


def load(spec: BackboneSpec, name: str) -> Parts:
    """Loads the parts from a folder in diffusers layout, or from the hub at a pinned revision;
    `load_parts` says what it raises."""
    from trainer.backbones.chat_text import check_template
    from trainer.backbones.load_parts import load_parts

    text = {"text_encoder": ("Qwen3ForCausalLM", "Qwen2Tokenizer")}
    lengths = {"text_encoder": LENGTH}
    parts = load_parts(
        spec,
        name,
        FAMILY,
        denoiser="Flux2Transformer2DModel",
        text=text,
        lengths=lengths,
        options=[DISTILLED],
    )
    tokenizer = parts.tokenizers["text_encoder"]
    check_template(tokenizer, TEMPLATE, name, enable_thinking=False)
    return parts


BLOCKS = block_names(
    "double_blocks",
    "transformer_blocks",
    ATTENTION
    | {
        "img_mlp.0": ("ff.linear_in",), "img_mlp.2": ("ff.linear_out",),
        "txt_mlp.0": ("ff_context.linear_in",), "txt_mlp.2": ("ff_context.linear_out",),
    },
) | block_names(
    "single_blocks",
    "single_transformer_blocks",
    {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
)  # fmt: skip


def _model_names(config: Mapping[str, Any]) -> ModelNames:
    """klein 4B has 24 heads, 9B has 32."""
    size = "4b" if int(config["num_attention_heads"]) <= 24 else "9b"
    return ModelNames(f"flux_2_klein_{size}", f"Flux.2-klein-{size}")


FAMILY = Family(
    denoiser="transformer",
    pipelines=("Flux2KleinPipeline",),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    load=load,
    encoders={"text": encode_prompts},
    prompt_lengths={"Flux2KleinPipeline": LENGTH},
    inputs=inputs,
    pipeline=pipeline,
    shapes=_condition_shapes,
    check=check,
    output=_unpacked,
    latents=LatentForm(vaes=("AutoencoderKLFlux2",), fold=FOLD, statistics=statistics),
    sample_size=64,  # 1024 pixels
    levels=_levels,
    distilled=_distilled,
    tool_names={
        "Flux2Transformer2DModel": ToolNames(
            BLOCKS | ENDS,
            comfyui="diffusers",
            scripts=Scripts(
                "musubi-tuner",
                BLOCKS,
                module="networks.lora_flux_2",
                model=_model_names,
                stock=lambda config: True,
            ),
        )
    },
    template=TEMPLATE,
    traits=DenoiserTraits(joint=(JointTraits("*", text_first=True),), patch=1),
)
