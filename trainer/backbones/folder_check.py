"""What can be known of a pipeline folder before torch is imported: whether all parts are there, and
whether they are of one kind and fit each other."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from trainer.backbones.family import tokenizer_name
from trainer.backbones.folder_contents import FolderContents
from trainer.backbones.pipeline_folder import (
    SCHEDULER,
    WITHOUT_VALUES,
    PipelineFolder,
    encoders_in,
)
from trainer.backbones.unfit_folder import missing, read_object
from trainer.backbones.unread_tokenizer import VOCABULARIES, has_vocabulary

if TYPE_CHECKING:
    from pathlib import Path

    from trainer.backbones.family import Family

PREDICTION_TYPES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
FLOW = "flow_prediction"


def check_contents(folder: PipelineFolder, name: str, family: Family, made: bool) -> FolderContents:
    """Checks a folder for a family. made: whether the denoiser is made from nothing.

    Raises:
        ValueError: says what is missing or what the family cannot load.
    """
    index = folder.index(name, family)
    own = [] if made else [family.denoiser]
    encoders = encoders_in(index, family)
    parts = [*own, *encoders, *family.vae_parts]
    for part in encoders:
        check_tokenizer(folder.of(tokenizer_name(part)))
    configs = {}
    for part in parts:
        where = folder.of(part)
        if not (where / "config.json").is_file():
            raise ValueError(missing(where, "config.json"))
        configs[part] = read_object(where / "config.json")
        folder.check_weights(part)
    where = folder.of("scheduler") / SCHEDULER
    facts = FolderContents(
        name=name,
        index=index,
        configs=configs,
        scheduler=folder.scheduler_config(),
        where=where,
    )
    known = family.latents.vaes
    if known and facts.vae not in known:
        raise facts.refuse("vae", f"is a {facts.vae}; these are known: {', '.join(known)}")
    family.check(facts)
    return facts


def check_tokenizer(where: Path) -> None:
    """Checks that a tokenizer can be read.

    Raises:
        ValueError: it has no vocabulary, without which transformers would make an empty one; or it
        is in SentencePiece's own file alone, as T5's are published, and the package that reads it
        is not installed.
    """
    if WITHOUT_VALUES.get():
        return
    if not has_vocabulary(where):
        raise ValueError(
            f"{where}: it has no vocabulary, one of {', '.join(VOCABULARIES)}; the folder is not a "
            "complete pipeline"
        )
    alone = (where / "spiece.model").is_file() and not (where / "tokenizer.json").is_file()
    if alone and find_spec("sentencepiece") is None:
        raise ValueError(
            f"{where}: spiece.model is read by sentencepiece, which is not installed: pip install "
            "'attention-trainer[t5]'"
        )


def check_channels(facts: FolderContents, part: str, default: int, fold: int = 1) -> None:
    """Checks that a denoiser takes the VAE's latents and nothing beside them. fold: latents along
    an edge that it takes as channels of one.

    Raises:
        ValueError: it takes more or fewer channels; the message says what kind that is.
    """
    latents, config = facts.latent_channels * fold**2, facts.configs[part]
    taken = int(config.get("in_channels", default))
    if taken == latents:
        return
    kinds = {
        latents + 1: "a depth map beside the noise, as a depth model",
        2 * latents: "a picture to edit beside the noise, as InstructPix2Pix",
        2 * latents
        + 1: "a mask and the masked picture beside the noise: it is an inpainting model",
    }
    kind = f", {kinds[taken]}" if taken in kinds else ""
    raise facts.refuse(
        part,
        f"takes {taken} channels{kind}, and the latents of its VAE have {latents}; only models "
        "that take noise alone are trained here, so choose the text-to-image version",
    )


def check_widths(facts: FolderContents, part: str, wanted: Mapping[str, Any]) -> None:
    """Checks that a denoiser reads text as wide as each text encoder gives it; `wanted` by their
    names, None where its config does not say."""
    for encoder, width in wanted.items():
        if isinstance(width, int) and facts.width_of(encoder) not in (None, width):
            raise facts.refuse(
                part,
                f"reads text of width {width}, and its {encoder} gives {facts.width_of(encoder)}; "
                "the parts are of different models",
            )


def check_classes(facts: FolderContents, known: Mapping[str, tuple[str, ...]]) -> None:
    """Checks the classes of transformers that the index names for parts."""
    for part, kinds in known.items():
        library, kind = facts.index.get(part) or (None, None)
        if library != "transformers" or kind not in kinds:
            raise facts.refuse(
                part, f"is a {kind} of {library}; this family has {', '.join(kinds)}"
            )


def check_prediction(config: Mapping[str, Any], where: Path) -> None:
    """Checks that a VP scheduler's file names levels and a target that are known."""
    kind = str(config.get("_class_name"))
    if kind.startswith("EDM"):
        raise ValueError(
            f"{where}: a {kind}, of a model that was trained on EDM's noise levels (as Playground "
            "2.5, CosXL), which are not known here; choose another backbone"
        )
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTION_TYPES:
        raise ValueError(
            f"{where}: prediction_type is {prediction!r}; this family has "
            f"{', '.join(PREDICTION_TYPES)}"
        )


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's file is of a flow."""
    euler = config.get("_class_name") == "FlowMatchEulerDiscreteScheduler"
    return euler or config.get("prediction_type") == FLOW


def check_flow_or_vp(config: Mapping[str, Any], where: Path) -> None:
    """Checks a scheduler's file that may be of either path."""
    if not is_flow(config):
        check_prediction(config, where)
    elif config.get("use_dynamic_shifting"):
        raise ValueError(
            f"{where}: the pipeline of this family does not know use_dynamic_shifting; set it to "
            "false and give shift"
        )


def check_flow(facts: FolderContents) -> None:
    """Checks that the scheduler is a flow's."""
    if not is_flow(facts.scheduler):
        raise facts.refuse(
            "scheduler",
            f"is a {facts.scheduler.get('_class_name')} of prediction_type="
            f"{facts.scheduler.get('prediction_type', 'epsilon')}; this family was trained on a "
            "flow and has FlowMatchEulerDiscreteScheduler, or a solver with "
            "prediction_type=flow_prediction",
        )
