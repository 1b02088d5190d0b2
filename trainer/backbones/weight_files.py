"""Which files hold the weights of a part of a pipeline folder: one file or several shards, in full
precision or a variant, as in `diffusion_pytorch_model.fp16.safetensors`. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trainer.common import pickles
from trainer.common.left_by_systems import own_files

STEM = r"(?:diffusion_pytorch_model|model)"
WHOLE = re.compile(rf"{STEM}(?:\.(?P<variant>[\w-]+))?\.safetensors")
# diffusers and transformers put the variant at different places
SHARD = re.compile(
    rf"{STEM}(?:\.(?P<one>[\w-]+?))?-\d{{5}}-of-\d{{5}}(?:\.(?P<other>[\w-]+))?\.safetensors"
)
INDEX = re.compile(
    rf"{STEM}\.safetensors(?:\.(?P<one>[\w-]+))?\.index(?:\.(?P<other>[\w-]+))?\.json"
)
PREFERRED = (None, "fp32", "fp16", "bf16")  # before all other variants


@dataclass(frozen=True)
class WeightFiles:
    """The files of one part, and the variant that the libraries are told."""

    files: tuple[Path, ...]
    variant: str | None


def weight_files(where: Path) -> WeightFiles:
    """The weights in a part's folder: the plain ones where there are some, else those of a variant.

    Raises:
        ValueError: there are none, they are pickles, a shard is missing, or shards have no index.
    """
    found: dict[str | None, tuple[Path, ...]] = {}
    for path in sorted(where.glob("*.json")):
        if match := INDEX.fullmatch(path.name):
            found[match["one"] or match["other"]] = _shards(path)
    for path in sorted(where.glob("*.safetensors")):
        if (match := WHOLE.fullmatch(path.name)) and not SHARD.fullmatch(path.name):
            found[match["variant"]] = (path,)
    if not found:
        raise ValueError(_none_found(where))
    variant = _preferred(found)
    return WeightFiles(found[variant], variant)


def names_to_fetch(names: Iterable[str]) -> list[str]:
    """Of the names of a part's files on the hub, those of the weights that `weight_files` would
    take, with the index of shards; none where there are no weights in safetensors."""
    whole: dict[str | None, list[str]] = {}
    parts: dict[str | None, list[str]] = {}
    for name in sorted(names):
        if match := SHARD.fullmatch(name) or INDEX.fullmatch(name):
            parts.setdefault(match["one"] or match["other"], []).append(name)
        elif match := WHOLE.fullmatch(name):
            whole[match["variant"]] = [name]
    found = parts | whole
    return found[_preferred(found)] if found else []


def _preferred(variants: Iterable[str | None]) -> str | None:
    """The variant to take: full precision where it is, else the first known one."""
    variants = list(variants)
    known = [variant for variant in PREFERRED if variant in variants]
    return (known or sorted(map(str, variants)))[0]


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(table.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index}: not an index of shards; download it again") from None
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise ValueError(
                f"{index.parent}: {name}, one of {len(names)} shards, is missing; download it again"
            )
    return tuple(index.parent / name for name in names)


def _none_found(where: Path) -> str:
    named = [path.name for path in own_files(where, ".safetensors")]
    if shards := [name for name in named if SHARD.fullmatch(name)]:
        return (
            f"{where}: {shards[0]} is a shard, and the index that names all shards, "
            "a file that ends in .safetensors.index.json, is missing; download it too"
        )
    if named:
        return (
            f"{where}: {named[0]} is not named as weights are; the libraries look for "
            "diffusion_pytorch_model.safetensors, and of a text encoder for model.safetensors"
        )
    found = ", ".join(path.name for path in own_files(where, *pickles.SUFFIXES))
    if not found:
        return f"{where}: no safetensors file; download the part again, with its weights"
    return (
        f"{where}: no safetensors file (found {found}; pickles are never loaded); save the "
        "pipeline with safe_serialization=True where you trust it, or take a version that has one"
    )
