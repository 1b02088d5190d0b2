"""The small files of a checkpoint of the hub, all but the weights: from the hub's cache, from the
layouts that ship, or fetched. Importing this imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.backbones.families import find_family
from trainer.backbones.single_file import LAYOUTS

if TYPE_CHECKING:
    from trainer.backbones.spec import BackboneSpec

# the files beside the weights; and those of them that are not fetched: the safety checker, which is
# not used, and indices of shards, which come with the shards
SMALL = (
    "model_index.json", "*/*.json", "*/*.jinja", "*/merges.txt", "*/vocab.json", "*/spiece.model"
)  # fmt: skip
OTHERS = ("safety_checker/*", "*.safetensors.index*")
ORIGIN = "_name_or_path"  # in a model_index.json: the repository it comes from


def fetch_small(hub: str, revision: str | None, kept: bool = False) -> Path:
    """The folder with the small files of a repository. kept: from the cache alone."""
    from huggingface_hub import snapshot_download

    found = snapshot_download(
        hub,
        revision=revision,
        allow_patterns=list(SMALL),
        ignore_patterns=list(OTHERS),
        local_files_only=kept,
    )
    return Path(found)


def small_files(spec: BackboneSpec, name: str) -> Path:
    """A folder with the small files of a checkpoint of the hub, weights or none beside them: from
    the cache, else the layout of it that ships, which has no vocabulary, else fetched.

    Raises:
        ValueError: they are not here and could not be fetched; says how to.
    """
    hub = str(spec.hub)
    if (kept := cached(spec)) is not None:
        return kept
    if (layout := layout_of(hub)) is not None:
        return layout
    try:
        return fetch_small(hub, spec.revision)
    except Exception as error:  # the hub raises a dozen kinds, all for what cannot be fetched
        included = " ".join(f"--include '{pattern}'" for pattern in SMALL)
        raise ValueError(
            f"backbone {name}: the configuration of {hub}, a few small files, is not on this "
            f"machine and could not be fetched ({type(error).__name__}); {remedy(error, spec)}; "
            f"or, where there is access, run: hf download {hub} --revision {spec.revision} "
            f"{included}"
        ) from error


def remedy(error: Exception, spec: BackboneSpec) -> str:
    """What to do about an error of the hub's client."""
    from huggingface_hub import errors

    hub = spec.hub
    if isinstance(error, errors.GatedRepoError):  # it is a RepositoryNotFoundError too
        return (
            f"it is gated: accept its terms at https://huggingface.co/{hub} and log in with `hf "
            "auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is none at https://huggingface.co/{hub}, or log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {spec.revision} any more"
    return "see whether this machine has access to the hub, and HF_HUB_OFFLINE is not set"


def cached(spec: BackboneSpec) -> Path | None:
    """The folder of a checkpoint of the hub in its cache; None where it has none of its parts."""
    try:
        folder = fetch_small(str(spec.hub), spec.revision, kept=True)
    except (OSError, ValueError):  # the library's own errors are of both kinds
        return None
    parts = find_family(spec.family).vae_parts
    needed = ("model_index.json", *(f"{part}/config.json" for part in parts))
    return folder if all((folder / name).is_file() for name in needed) else None


def layout_of(hub: str) -> Path | None:
    """The layout of a repository that ships; None where there is none."""
    for index in sorted(LAYOUTS.glob("*/model_index.json")):
        if json.loads(index.read_text(encoding="utf-8")).get(ORIGIN) == hub:
            return index.parent
    return None
