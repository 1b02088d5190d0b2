"""PixArt-alpha and -sigma (arXiv 2310.00426, 2403.04692), and every pipeline of the same parts: a
diffusion transformer with self- and cross-attention, one text encoder, VAE, scheduler.

The scheduler says what the transformer predicts: noise on a VP path as in PixArt, or the flow
noise - x0 on the path x_t = (1 - t) x0 + t noise (arXiv 2209.03003), where its timestep is 1000 t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainer.attention.denoiser_traits import DenoiserTraits
from trainer.backbones.family import Family, Parts, masked_text_shapes, text_arguments
from trainer.backbones.folder_check import (
    check_channels,
    check_classes,
    check_flow_or_vp,
    check_widths,
)
from trainer.backbones.folder_contents import FolderContents
from trainer.backbones.spec import BackboneSpec, TransformerSpec
from trainer.backbones.tool_names import ToolNames

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainer.attention.condition import Condition
    from trainer.backbones.backbone import Backbone

CLASS = "_class_name"  # in model_index.json
# tokens of a prompt: the defaults of diffusers' two pipelines
LENGTHS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
TEXT = {
    "text_encoder": ("CLIPTextModel", "T5EncoderModel"),
    "tokenizer": ("CLIPTokenizer", "T5Tokenizer", "T5TokenizerFast"),
}


def encode_prompts(backbone: Backbone, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Prompts to tokens (b, n, d) and their mask (b, n), 0 at padding."""
    tokens = backbone.tokens(prompts)
    ids, mask = tokens.input_ids, tokens.attention_mask
    states: Tensor = backbone.text_encoder(ids, attention_mask=mask)[0]
    return {"tokens": backbone.joined(states), "mask": backbone.joined(mask)}


def inputs(backbone: Backbone, x_t: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if backbone.denoiser.use_additional_conditions:  # the picture's size, in pixels
        height, width = (side * backbone.divisor for side in x_t.shape[-2:])
        size["resolution"] = x_t.new_tensor([[height, width]]).expand(len(x_t), 2)
        size["aspect_ratio"] = x_t.new_tensor([[height / width]]).expand(len(x_t), 1)
    return {
        "hidden_states": x_t,
        "timestep": t,
        "added_cond_kwargs": size,
        **text_arguments(condition),
    }


def pipeline(backbone: Backbone) -> Any:
    """As a stock pipeline of the folder's class, which decides how long prompts are; a flow is
    sampled with a solver that this pipeline can call."""
    import diffusers
    from diffusers import DPMSolverMultistepScheduler

    from trainer.backbones.folder_check import FLOW
    from trainer.backbones.vae import with_widths

    scheduler = backbone.scheduler()
    if backbone.alphas_cumprod is None:
        scheduler = DPMSolverMultistepScheduler(
            num_train_timesteps=scheduler.config.num_train_timesteps,
            prediction_type=FLOW,
            use_flow_sigmas=True,
            flow_shift=scheduler.config.shift,
        )
    return getattr(diffusers, backbone.options[CLASS])(
        tokenizer=backbone.tokenizer, text_encoder=backbone.text_encoder,
        vae=with_widths(backbone.vae),
        transformer=backbone.denoiser, scheduler=scheduler,
    )  # fmt: skip


def load(spec: BackboneSpec, name: str) -> Parts:
    """Loads the parts from a folder in diffusers layout, or from the hub at a pinned revision.

    Raises:
        ValueError: the folder holds another pipeline or a text encoder of another kind, a part is
        missing, or its weights are not safetensors.
    """
    from diffusers import PixArtTransformer2DModel

    from trainer.backbones.folder_check import check_contents
    from trainer.backbones.pipeline_folder import pipeline_folder
    from trainer.backbones.schedulers import flow_or_vp
    from trainer.backbones.vae import load_vae

    made = spec.denoiser
    folder = pipeline_folder(spec, name)
    facts = check_contents(folder, name, FAMILY, made=made is not None)
    encoder, tokenizer = text_classes(facts.index)
    kind = str(facts.index[CLASS])
    if made is None:
        transformer = folder.load("transformer", PixArtTransformer2DModel)
        if "transformer" in spec.scratch:
            initialise(transformer)
    text_encoder = folder.load("text_encoder", encoder)
    vae = load_vae(folder, facts)
    if isinstance(made, TransformerSpec):
        width = text_encoder.config.hidden_size
        transformer = make(made, vae.config.latent_channels, width)
    return Parts(
        folder=folder.path,
        denoiser=transformer,
        text_encoders={"text_encoder": text_encoder},
        tokenizers={"text_encoder": folder.tokenizer(tokenizer)},
        vae=vae,
        scheduler=flow_or_vp(folder.scheduler_config(), folder.of("scheduler")),
        prompt_lengths={"text_encoder": LENGTHS[kind]},
        options={CLASS: kind},
    )


def text_classes(index: Mapping[str, Any]) -> tuple[Any, Any]:
    """The classes of transformers that model_index.json names for the text encoder and the
    tokenizer, which `check_classes` knows."""
    import transformers

    encoder, tokenizer = (index[part][1] for part in ("text_encoder", "tokenizer"))
    return getattr(transformers, encoder), getattr(transformers, tokenizer)


def check(facts: FolderContents) -> None:
    check_classes(facts, TEXT)
    check_flow_or_vp(facts.scheduler, facts.where)
    if "transformer" in facts.configs:
        check_channels(facts, "transformer", default=4)
        check_widths(
            facts,
            "transformer",
            {"text_encoder": facts.configs["transformer"].get("caption_channels")},
        )


def make(spec: TransformerSpec, channels: int, text_width: int) -> Any:
    """An untrained transformer on latents of `channels` that reads text of `text_width`."""
    from diffusers import PixArtTransformer2DModel

    from trainer.backbones.backbone import seeded, zero_outputs

    reads = spec.cross_attention
    with seeded(spec.seed):
        transformer: Any = PixArtTransformer2DModel(
            sample_size=spec.sample_size,
            patch_size=spec.patch,
            in_channels=channels,
            out_channels=channels,
            num_layers=spec.depth,
            num_attention_heads=spec.heads,
            attention_head_dim=spec.width // spec.heads,
            # without them there is no cross-attention, and no layer that projects the text for it
            cross_attention_dim=spec.width if reads else None,
            caption_channels=text_width if reads else None,
            use_additional_conditions=False,
        )
        initialise(transformer)
    if spec.zero_init:
        zero_outputs(transformer)
    return transformer


def initialise(transformer: Any) -> None:
    """A start for training from nothing, see `initialise_as_dit`."""
    time = transformer.adaln_single
    initialise_as_dit(
        transformer, patches=transformer.pos_embed.proj, time=time.emb, narrow=[time.linear]
    )


def initialise_as_dit(
    transformer: Any, patches: Any, time: Any, narrow: Sequence[nn.Linear]
) -> None:
    """As DiT and PixArt start (arXiv 2212.09748, section 3.2): every block adds nothing of the text
    at first, and the output is 0. patches: the convolution that reads the latent; time: the
    embedding of the timestep; narrow: further layers that start as narrowly spread as it."""
    import torch
    from torch import nn

    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    with torch.no_grad():
        nn.init.xavier_uniform_(patches.weight.flatten(1))
    nn.init.zeros_(patches.bias)
    for layer in (time.timestep_embedder.linear_1, time.timestep_embedder.linear_2, *narrow):
        nn.init.normal_(layer.weight, std=0.02)
    for block in transformer.transformer_blocks:
        if block.attn2 is not None:
            nn.init.zeros_(block.attn2.to_out[0].weight)
    nn.init.zeros_(transformer.proj_out.weight)


# attention as the first code of PixArt and Sana names it
ORIGINAL_ATTENTION = {
    f"blocks.{{}}.{name}": tuple(f"transformer_blocks.{{}}.{layer}" for layer in layers)
    for name, layers in {
        "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        "attn.proj": ("attn1.to_out.0",),
        "cross_attn.q_linear": ("attn2.to_q",),
        "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
        "cross_attn.proj": ("attn2.to_out.0",),
    }.items()
}
ORIGINAL = ORIGINAL_ATTENTION | {
    "blocks.{}.mlp.fc1": ("transformer_blocks.{}.ff.net.0.proj",),
    "blocks.{}.mlp.fc2": ("transformer_blocks.{}.ff.net.2",),
    "x_embedder.proj": ("pos_embed.proj",),
    "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
    "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
    "t_embedder.mlp.0": ("adaln_single.emb.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("adaln_single.emb.timestep_embedder.linear_2",),
    "csize_embedder.mlp.0": ("adaln_single.emb.resolution_embedder.linear_1",),
    "csize_embedder.mlp.2": ("adaln_single.emb.resolution_embedder.linear_2",),
    "ar_embedder.mlp.0": ("adaln_single.emb.aspect_ratio_embedder.linear_1",),
    "ar_embedder.mlp.2": ("adaln_single.emb.aspect_ratio_embedder.linear_2",),
    "t_block.1": ("adaln_single.linear",),
    "final_layer.linear": ("proj_out",),
}

PARAMETERS = {
    "blocks.{}.scale_shift_table": "transformer_blocks.{}.scale_shift_table",
    "final_layer.scale_shift_table": "scale_shift_table",
}

FAMILY = Family(
    denoiser="transformer",
    pipelines=tuple(LENGTHS),
    blocks=("transformer_blocks",),
    load=load,
    encoders={"text": encode_prompts},
    shapes=masked_text_shapes,
    inputs=inputs,
    pipeline=pipeline,
    makes=TransformerSpec,
    prompt_lengths=LENGTHS,
    lower_case=True,  # as PixArt's own code reads them
    check=check,
    traits=DenoiserTraits(
        time_embedding="adaln_single.emb",
        time_width="adaln_single.emb.timestep_embedder.linear_2",
        input="pos_embed.proj",
    ),
    tool_names={
        "PixArtTransformer2DModel": ToolNames(ORIGINAL, comfyui="diffusers", parameters=PARAMETERS)
    },
)
