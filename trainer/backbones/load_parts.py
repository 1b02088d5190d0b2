"""Loads the parts that most pipelines have: a denoiser, text encoders with their tokenizers, a VAE
and a scheduler, that of a flow if no other is given. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from trainer.backbones.family import Family, Parts
from trainer.backbones.vae import load_vae

if TYPE_CHECKING:
    from trainer.backbones.pipeline_folder import PipelineFolder
    from trainer.backbones.spec import BackboneSpec

Scheduler = Callable[[dict[str, Any], Path], Any]
NO_LENGTHS: Mapping[str, int] = MappingProxyType({})


def _flow(config: dict[str, Any], where: Path) -> Any:
    from trainer.backbones.schedulers import flow_scheduler

    return flow_scheduler(config)


def load_parts(
    spec: BackboneSpec,
    name: str,
    family: Family,
    *,
    denoiser: str,
    text: Mapping[str, tuple[str, str]],
    lengths: Mapping[str, int] = NO_LENGTHS,
    options: Sequence[str] = (),
    scheduler: Scheduler = _flow,
) -> Parts:
    """The parts of a folder in diffusers layout, or of the hub at a pinned revision.

    denoiser: its class in diffusers; text: by the name of a text encoder its class and that of its
    tokenizer in transformers, those that the folder lacks are left out; lengths: as in `Parts`;
    options: keys that model_index.json may have; scheduler: (its config, where) -> the scheduler.

    Raises:
        ValueError: the folder holds another pipeline or a model of other inputs, a part is missing,
        or its weights are not safetensors.
    """
    import diffusers

    from trainer.backbones.folder_check import check_contents
    from trainer.backbones.pipeline_folder import encoders_in, pipeline_folder

    folder = pipeline_folder(spec, name)
    facts = check_contents(folder, name, family, made=False)
    present = {part: text[part] for part in encoders_in(facts.index, family)}
    encoders, tokenizers = _text(folder, present)
    return Parts(
        folder=folder.path,
        denoiser=folder.load(family.denoiser, getattr(diffusers, denoiser)),
        text_encoders=encoders,
        tokenizers=tokenizers,
        vae=load_vae(folder, facts),
        scheduler=scheduler(folder.scheduler_config(), folder.of("scheduler")),
        prompt_lengths=lengths,
        options={key: facts.index[key] for key in options if key in facts.index},
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
