"""What is said of a pipeline folder that cannot be read as it is: a file that is missing or
damaged, a pipeline that no family loads, a part of another model or of a newer diffusers. Importing
this imports no torch."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from trainer.backbones.families import family_names, find_family
from trainer.backbones.family import Family, tokenizer_name
from trainer.backbones.spec import PartsSpec

CLASS, SAVED_BY = "_class_name", "_diffusers_version"
# what the denoisers of other pipelines take, by a part of the pipeline's name
OTHER_INPUTS = {
    "ControlNet": "which gives its denoiser a control picture through a ControlNet",
    "InstructPix2Pix": "whose denoiser takes a picture to edit beside the noise",
    "Depth2Img": "whose denoiser takes a depth map beside the noise",
}
OLDER_NAMES = ("Transformer2DModel",)  # of classes that have their own since
POINTER = b"version https://git-lfs"  # how a file begins that Git LFS has not fetched


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file of a folder; `ValueError` where it is none, or holds no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of its letters, its text or its depth
        raise ValueError(f"{path}: it is no JSON ({error}); download it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: it holds no JSON object, as in {{...}}; download it again")
    return found


def missing(where: Path, file: str) -> str:
    """What is wrong with a folder that lacks a file."""
    key = "denoiser" if where.name in ("unet", "transformer") else where.name
    other = f", or give parts.{key}=<folder>" if key in PartsSpec.model_fields else ""
    return (
        f"{where}: {file} is missing; the folder is not a complete pipeline, so download it "
        f"again{other}"
    )


def check_index(index: Mapping[str, Any], path: Path, *, name: str, family: Family) -> None:
    """Checks that a model_index.json, at `path`, is of a pipeline of the family, and names its
    parts as diffusers does.

    Raises:
        ValueError: it is not; the message says what could be.
    """
    kind, loads = index.get(CLASS), family.pipelines
    if kind not in loads:
        every = sorted(each for own in family_names() for each in find_family(own).pipelines)
        if kind is None:
            raise ValueError(
                f"{path}: it names no pipeline, under {CLASS}; take the model_index.json that "
                "diffusers' save_pretrained writes"
            )
        other = next((what for word, what in OTHER_INPUTS.items() if word in str(kind)), None)
        if other is not None:
            why = (
                f"{other}; only models that take noise alone are loaded here, so choose the "
                "text-to-image version"
            )
            raise ValueError(f"backbone {name}: {path.parent} is a {kind}, {why}")
        if kind in every:
            why = f"this family loads {' and '.join(loads)} folders"
        else:
            why = f"there is no family for it; choose one of {', '.join(every)}"
        raise ValueError(f"backbone {name}: {path.parent} is a {kind}; {why}")
    texts = family.text_encoders
    for part in (family.denoiser, *texts, *map(tokenizer_name, texts), "vae", "scheduler"):
        entry = index.get(part)
        if entry is not None and not (isinstance(entry, list) and len(entry) == 2):
            raise ValueError(
                f"{path}: {part} is {entry!r}; a part is named by its library and its class, as in "
                '["diffusers", "AutoencoderKL"]; download the file again'
            )


def check_config(config: Mapping[str, Any], where: Path, kind: Any) -> None:
    """Checks that the config of a part is of this class of diffusers, and has no option that a
    newer diffusers has given the class, which would be ignored.

    Raises:
        ValueError: it is not, or has one.
    """
    own, newer = config.get(CLASS), _newer(config)
    if own not in (None, kind.__name__, *OLDER_NAMES):
        raise ValueError(
            f"{where}: its config.json is of a {own}, and this family has a {kind.__name__}; "
            f"{newer or 'take the part that belongs to this pipeline'}"
        )
    known = inspect.signature(kind.__init__).parameters
    options = [key for key, value in config.items() if key[0] != "_" and value not in (None, False)]
    if newer and (unknown := [key for key in options if key not in known]):
        raise ValueError(f"{where}: its config.json has {', '.join(unknown)}; {newer}")


def _newer(config: Mapping[str, Any]) -> str:
    """What to do about a config of a newer diffusers than that which is installed; else nothing."""
    saved, here = str(config.get(SAVED_BY, "")), version("diffusers")
    if _release(saved) <= _release(here):
        return ""
    return (
        f"it was saved by diffusers {saved}, and {here} is installed, which does not know that; "
        "take a revision of the checkpoint that was saved by an older one"
    )


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


@contextmanager
def building(where: Path, config: Mapping[str, Any], kind: Any) -> Iterator[None]:
    """Around what makes a part of its config: whatever the library says of a config that it cannot
    use becomes one `ValueError` that names the folder."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(_damaged(where, error)) from None
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        says = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise ValueError(
            f"{where}: no {kind.__name__} can be made of its config.json ({says}); "
            f"{_newer(config) or 'download the part again'}"
        ) from error


@contextmanager
def opened_weights(path: Path, library: Literal["pt", "np"] = "pt") -> Iterator[Any]:
    """A safetensors file of a folder, open for torch or numpy; `ValueError` where it is damaged."""
    try:
        with safe_open(path, library) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(_damaged(path, error)) from None


def _damaged(where: Path, error: SafetensorError) -> str:
    return f"{where}: its safetensors file is damaged: {error}; download it again"


def check_files(files: Iterable[Path]) -> None:
    """Checks that files of weights are whole, by their headers and sizes.

    Raises:
        ValueError: one is damaged, or Git LFS has left a pointer in its place.
    """
    for path in files:
        with path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise ValueError(
                    f"{path}: it is a pointer of Git LFS in place of the weights; run `git lfs "
                    "pull` in the folder, or fetch it with `hf download`"
                )
        with opened_weights(path, "np"):
            pass


def check_loaded(where: Path, notes: Mapping[str, Any]) -> None:
    """Raises ValueError where weights were not used, and would silently stay random."""
    for key, stored, own in sorted(notes.get("mismatched_keys") or ()):
        raise ValueError(
            f"{where}: {key} is {tuple(stored)} in the weights and {tuple(own)} by config.json; "
            "they do not belong to each other, so download the part again"
        )
    if absent := sorted(notes["missing_keys"]):
        raise ValueError(
            f"{where}: the weights lack {', '.join(absent[:3])}, {len(absent)} in all; they do not "
            "belong to this config.json, so download the part again"
        )
