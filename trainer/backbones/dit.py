"""DiT (arXiv 2212.09748): a diffusion transformer that is told a class instead of a text, with
self-attention alone. There is no text encoder: a prompt is the name of a class, or its number.

    (eps, variance) = f(x_t, t, class),    the empty prompt is the class after the last one

The network's variance, in further channels, is not trained and not used: as in its pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainer.attention.denoiser_traits import DenoiserTraits
from trainer.backbones.class_names import LABELS, classes_of
from trainer.backbones.family import Family, Parts
from trainer.backbones.folder_check import check_channels, check_prediction
from trainer.backbones.folder_contents import FolderContents
from trainer.backbones.spec import BackboneSpec

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.attention.condition import Condition
    from trainer.backbones.backbone import Backbone


def encode_classes(backbone: Backbone, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Names or numbers of classes to the numbers (b,); no class for an empty prompt.

    Raises:
        ValueError: a prompt is no class of the backbone.
    """
    import torch

    names = classes_of(backbone.denoiser.config, backbone.options)
    return {"labels": torch.tensor([names.number(text) for text in prompts]).to(backbone.device)}


def inputs(backbone: Backbone, x_t: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    height, width = x_t.shape[-2:]
    if height != width:  # diffusers would arrange the tokens of its output in a square
        raise ValueError(
            f"backbone {backbone.name} makes square pictures only, and one of "
            f"{width * backbone.divisor}x{height * backbone.divisor} is asked for; give two equal "
            "sides, and crop photos to squares"
        )
    return {"hidden_states": x_t, "timestep": t, "class_labels": condition.labels}


def condition_shape(backbone: Backbone) -> Mapping[str, tuple[int, ...]]:
    return {"labels": ()}


def pipeline(backbone: Backbone) -> Any:
    from diffusers import DiTPipeline

    labels = dict(backbone.options.get(LABELS) or {})
    made: Any = DiTPipeline(
        transformer=backbone.denoiser, vae=backbone.vae, scheduler=backbone.scheduler(),
        id2label=labels,
    )  # fmt: skip
    if labels:
        made.register_to_config(id2label=labels)  # else a saved folder would lose them
    return made


def load(spec: BackboneSpec, name: str) -> Parts:
    """Loads the parts from a folder in diffusers layout, or from the hub at a pinned revision;
    `load_parts` says what it raises."""
    from trainer.backbones.load_parts import load_parts
    from trainer.backbones.schedulers import vp_scheduler

    parts = load_parts(
        spec,
        name,
        FAMILY,
        denoiser="DiTTransformer2DModel",
        text={},
        options=[LABELS],
        scheduler=vp_scheduler,
    )
    keep_labels(parts.denoiser)
    return parts


def keep_labels(transformer: Any) -> None:
    """Turns off diffusers' own dropout of labels in training, which every block draws for itself,
    so that one row would have a class in some and none in others. `objective.caption_dropout` drops
    them instead."""
    from diffusers.models.embeddings import LabelEmbedding

    for module in transformer.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0


def check(facts: FolderContents) -> None:
    check_prediction(facts.scheduler, facts.where)
    check_channels(facts, "transformer", default=4)
    config = facts.configs["transformer"]
    kind = config.get("norm_type", "ada_norm_zero")
    if kind != "ada_norm_zero" or config.get("num_embeds_ada_norm", 1000) is None:
        raise facts.refuse(
            "transformer",
            f"has norm_type={kind} and num_embeds_ada_norm={config.get('num_embeds_ada_norm')}, so "
            "it is not told a class as DiT is (ada_norm_zero and a number of classes)",
        )


FAMILY = Family(
    denoiser="transformer",
    pipelines=("DiTPipeline",),
    blocks=("transformer_blocks",),
    load=load,
    encoders={"text": encode_classes},
    inputs=inputs,
    pipeline=pipeline,
    text_encoders=(),
    shapes=condition_shape,
    check=check,
    # every block has an embedding of the timestep of its own, so there is no one to name
    traits=DenoiserTraits(input="pos_embed.proj", joint=()),
)
