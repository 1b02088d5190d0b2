"""Loads the parts that most pipelines have: a transformer, text encoders with their tokenizers, a
VAE and the scheduler of a flow. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainer.backbones.family import Family, Parts

if TYPE_CHECKING:
    from trainer.backbones.pipeline_folder import PipelineFolder
    from trainer.backbones.spec import BackboneSpec


def load_parts(
    spec: BackboneSpec,
    name: str,
    family: Family,
    *,
    denoiser: str,
    text: Mapping[str, tuple[str, str]],
    lengths: Mapping[str, int],
    options: Sequence[str] = (),
) -> Parts:
    """The parts of a folder in diffusers layout, or of the hub at a pinned revision.

    denoiser: its class in diffusers; text: by the name of a text encoder its class and that of its
    tokenizer in transformers, those that the folder lacks are left out; lengths: as
    `Parts.prompt_lengths`; options: keys of model_index.json that are kept.

    Raises:
        ValueError: the folder holds another pipeline or a model of other inputs, a part is missing,
        or its weights are not safetensors.
    """
    import diffusers

    from trainer.backbones.folder_check import check_contents
    from trainer.backbones.pipeline_folder import encoders_in, pipeline_folder
    from trainer.backbones.schedulers import flow_scheduler

    folder = pipeline_folder(spec, name, [family.denoiser, *text, "vae"])
    facts = check_contents(folder, name, family, made=False)
    present = encoders_in(facts.index, family)
    encoders, tokenizers = _text(folder, {part: text[part] for part in present})
    return Parts(
        folder=folder.path,
        denoiser=folder.load(family.denoiser, getattr(diffusers, denoiser)),
        text_encoders=encoders,
        tokenizers=tokenizers,
        vae=folder.load("vae", getattr(diffusers, facts.vae)),
        scheduler=flow_scheduler(folder.scheduler_config()),
        prompt_lengths=lengths,
        options={key: facts.index.get(key) for key in options},
    )


def _text(
    folder: PipelineFolder, classes: Mapping[str, tuple[str, str]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The text encoders and their tokenizers."""
    import transformers

    encoders: dict[str, Any] = {}
    tokenizers: dict[str, Any] = {}
    for part, kinds in classes.items():
        encoder, tokenizer = (getattr(transformers, kind) for kind in kinds)
        encoders[part] = folder.load(part, encoder)
        tokenizers[part] = folder.tokenizer(tokenizer, part)
        if encoder.__name__.startswith("CLIP"):
            end_at(encoders[part], tokenizers[part].eos_token_id)
    return encoders, tokenizers


def end_at(encoder: Any, eos: int) -> None:
    """Makes a CLIP pool at the end of text. Older files of it have a wrong id, 2, for which
    transformers pools at the largest id: that of a new word, where a prompt has one. Of prompts
    without one both are the same."""
    if encoder.config.eos_token_id == 2:
        encoder.config.eos_token_id = encoder.text_model.eos_token_id = eos
