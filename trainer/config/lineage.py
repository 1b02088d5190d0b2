"""Which backbone a recipe names: one of ours, a folder, or the result of earlier runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.backbones import check_backbone_folder
from trainer.backbones.families import family_of, find_family
from trainer.backbones.pipeline_folder import TO_FOLDER
from trainer.backbones.single_file import is_checkpoint
from trainer.backbones.spec import BackboneSpec, DenoiserSpec, PartsSpec
from trainer.common import pickles
from trainer.common.paths import BACKBONES, DATA
from trainer.common.suggest import nearest
from trainer.config.backbone_parts import one_file, with_parts
from trainer.config.header import file_of, read_header
from trainer.config.schema import (
    RecipeError,
)
from trainer.config.sections import TextSpec
from trainer.config.tree import merge_trees, read_yaml
from trainer.config.value_errors import build_section

NO_PARTS = PartsSpec()
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # as the hub names one, owner/name


def backbone_names() -> list[str]:
    return sorted(path.stem for path in BACKBONES.glob("*.yaml"))


def read_backbone(name: str) -> dict[str, Any]:
    """The tree of a backbone of ours."""
    return read_yaml(BACKBONES / f"{name}.yaml")


def spec_of(tree: Mapping[str, Any], instead: str | None = None) -> BackboneSpec:
    """The backbone of a resolved recipe; or another, which brings a denoiser of its own."""
    name = instead or tree["backbone"]
    own = tree if name == tree["backbone"] else {}
    parts = build_section(PartsSpec, own.get("parts"), "parts")
    return read_by(backbone_spec(name, own.get("denoiser"), parts), tree)


def read_by(spec: BackboneSpec, tree: Mapping[str, Any]) -> BackboneSpec:
    """A backbone that reads prompts as the section `text` of a recipe says."""
    most = build_section(TextSpec, tree.get("text"), "text").max_tokens
    return spec if most is None else spec.model_copy(update={"max_tokens": most})


def backbone_spec(name: str, denoiser: Any = None, parts: PartsSpec = NO_PARTS) -> BackboneSpec:
    """A named backbone, a local folder in diffusers layout, a checkpoint in one file, or what an
    earlier run has made of one: its folder or adapter. denoiser: a recipe's values over those of a
    backbone whose denoiser is made from nothing; parts: those that come from elsewhere."""
    root, first, adapters = lineage_of(name)
    if adapters:
        if denoiser is not None:
            raise RecipeError(
                f"denoiser: backbone {name} has a network of its own, which denoiser=null keeps"
            )
        if parts != NO_PARTS:
            raise RecipeError(
                f"parts: backbone {name} is the result of a run, and has the parts of that run"
            )
        own_parts = build_section(PartsSpec, first.get("parts"), "parts")
        spec = backbone_spec(root, first.get("denoiser"), own_parts)
        spec = read_by(spec, _made_by(name) or {})
        return spec.model_copy(update={"adapters": adapters})
    spec, own = _named(name, parts)
    made = _denoiser(spec.family, name, own=own, given=denoiser)
    spec = with_parts(spec, name, parts)
    return _checked(spec.model_copy(update={"denoiser": made}), name)


def _named(name: str, parts: PartsSpec) -> tuple[BackboneSpec, Any]:
    """The spec of a backbone of ours, a folder or a file, and what ours says of a denoiser that is
    made from nothing."""
    own = None
    if name in backbone_names():
        tree = read_backbone(name)
        own = tree.pop("denoiser", None)
        spec = build_section(BackboneSpec, tree, f"backbone {name}")
        if spec.folder is not None:
            folders = {"folder": spec.folder, "overlay": spec.overlay}
            spec = spec.model_copy(
                update={key: str(DATA / folder) for key, folder in folders.items() if folder}
            )
    elif (Path(name).expanduser() / "model_index.json").is_file():
        folder = Path(name).expanduser()
        spec = BackboneSpec(folder=str(folder), family=family_of(folder))
    elif is_checkpoint(Path(name).expanduser()):
        spec = one_file(Path(name).expanduser(), parts)
    elif Path(name).expanduser().is_dir():
        raise RecipeError(
            f"backbone={name}: the folder has no model_index.json and no adapter.safetensors; a "
            "diffusers pipeline folder or a finished run is needed"
        )
    elif Path(name).suffix in pickles.SUFFIXES and Path(name).expanduser().is_file():
        raise RecipeError(
            f"backbone={name}: pickles are never loaded; take the checkpoint as .safetensors"
        )
    elif Path(name).expanduser().is_file():
        raise RecipeError(f"backbone={name}: one file, and a folder is needed; {TO_FOLDER}")
    else:
        hint = nearest(name, backbone_names())
        if REPOSITORY.fullmatch(name):
            hint = (
                "; if it is a repository of the hub, fetch it with `hf download "
                f"{name} --local-dir {name}`, which makes that folder"
            )
        raise RecipeError(f"backbone={name}: neither a backbone of ours nor a folder{hint}")
    if spec.folder is not None and not (Path(spec.folder) / "model_index.json").is_file():
        raise RecipeError(f"backbone={name}: {spec.folder} is missing or has no model_index.json")
    return spec, own


def _checked(spec: BackboneSpec, name: str) -> BackboneSpec:
    """Raises `RecipeError` where the spec's folder is none that its family can load."""
    try:
        check_backbone_folder(spec, name)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    return spec


def _made_by(name: str) -> dict[str, Any] | None:
    """The recipe of the run a backbone is the result of; None if it is no such."""
    file = file_of(name)
    if name in backbone_names() or file.suffix != ".safetensors" or not file.is_file():
        return None
    if is_checkpoint(file):
        return None
    try:
        return read_header(file)[0]
    except ValueError as error:
        raise RecipeError(f"backbone={name}: {error}; if it is a checkpoint, {TO_FOLDER}") from None


def family_of_backbone(name: str, parts: PartsSpec = NO_PARTS) -> str:
    """The family of what `backbone_spec` takes."""
    root, first, adapters = lineage_of(name)
    own = build_section(PartsSpec, first.get("parts"), "parts") if adapters else parts
    return _named(root, own)[0].family


def lineage_of(name: str) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """The backbone that a chain of runs began with, the first run's recipe, empty without a run,
    and the adapters of all of them, the first run's first."""
    adapters: list[str] = []
    first: dict[str, Any] = {}
    while (tree := _made_by(name)) is not None:
        file = str(file_of(name))
        if file in adapters:
            raise RecipeError(f"backbone={name}: {file} names itself as its own backbone")
        adapters.append(file)
        name, first = tree["backbone"], tree
    return name, first, tuple(reversed(adapters))


def _denoiser(family: str, name: str, own: Any, given: Any) -> DenoiserSpec | None:
    """own: what the backbone's file says; given: what the recipe does."""
    if own is None:
        if given is None:
            return None
        made = [each for each in backbone_names() if "denoiser" in read_backbone(each)]
        raise RecipeError(
            f"denoiser: backbone {name} has a network of its own, which denoiser=null keeps; one "
            f"is made from nothing with backbone={' or backbone='.join(made)}"
        )
    values = merge_trees(own, given) if isinstance(given, dict) else own if given is None else given
    makes = find_family(family).makes
    if makes is None:
        raise RecipeError(
            f"backbone {name}: the family {family} makes no network from nothing; leave out "
            "denoiser"
        )
    return build_section(makes, values, "denoiser")
