"""Safetensors files of other tools: read with a clear message for everything that can be wrong with
them, and written."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.common import pickles
from trainer.export.apply_bundle import layer_at
from trainer.export.bundle import Delta, DoRADelta, FullDelta, LowRankDelta
from trainer.export.layer_names import readable
from trainer.ops.adapters.nf4 import unpacked

# the ends of tensor names, after the layer's name, as the tools spell them
TENSOR_KINDS = {
    "lora_down.weight": "down", "lora_up.weight": "up", "lora_A.weight": "down",
    "lora_B.weight": "up", "lora.down.weight": "down", "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down", "lora_linear_layer.up.weight": "up",
    "lora_A.default.weight": "down", "lora_B.default.weight": "up",
    "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
    "alpha": "alpha", "diff": "diff", "diff_b": "diff_b",
}  # fmt: skip
Scale = Callable[[str, LowRankDelta | DoRADelta], float]
KIND = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, TENSOR_KINDS))})")
OTHERS = {
    "dora_scale": "DoRA as dora_scale, whose axis differs between the tools that write it; save it "
    "again in peft style, with lora_magnitude_vector",
    "hada_": "LoHa; merge it into a model and train from that",
    "lokr_": "LoKr; merge it into a model and train from that",
    "lora_mid": "a convolution in three factors; merge it into a model and train from that",
    "oft_": "OFT; merge it into a model and train from that",
    "lora_B.bias": "a trained bias beside the matrices; merge it into a model and train from that",
}


def save_tensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    *,
    dtype: torch.dtype,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file of tensors in `dtype`; single numbers such as `.alpha` stay in fp32.

    metadata: more entries of the header.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = {
        key: value.detach().cpu().to(dtype if value.ndim else torch.float32).contiguous()
        for key, value in tensors.items()
    }
    save_file(rounded, path, {"format": "pt", **(metadata or {})})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors in fp32, and the header's entries.

    Raises:
        ValueError: there is no such file, it is a pickle or otherwise not safetensors, or it holds
            a value that is not finite.
    """
    if not path.is_file():
        raise ValueError(f"file={path}: no such file")
    if path.suffix in pickles.SUFFIXES:
        raise ValueError(f"file={path}: {pickles.refusal(path)}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = {key: value.float() for key, value in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"file={path}: not a safetensors file ({error})") from None
    broken = [key for key, value in tensors.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(
            f"file={path}: {broken[0]} holds values that are not finite, {len(broken)} such "
            "tensors in all; the file is damaged or its training diverged"
        )
    return tensors, metadata


def deltas(
    tensors: Mapping[str, Tensor],
    base: Any,
    scale: Scale | None = None,
) -> tuple[dict[str, Delta], tuple[str, ...]]:
    """What a file in any spelling adds to each layer, by module path, and notes for the user on
    what the file leaves open.

    scale: returns a layer's factor by its key and delta, for files without `.alpha`. If it is None,
    a missing `.alpha` counts as the rank, which is a factor of 1.

    Raises:
        ValueError: a tensor of an unknown kind, a pair with only one matrix, or a layer that the
            backbone does not have or has in another shape.
    """
    parts = _by_layer(tensors)
    _refuse_halves(parts)
    paths = readable(base)
    unknown = [name for name in parts if name not in paths]
    if unknown:
        raise ValueError(
            f"the file adapts {unknown[0]}, {len(unknown)} such layers of {len(parts)}, which "
            f"backbone {base.name} does not have; the file was made for another backbone"
        )
    found: dict[str, Delta] = {}
    seen: dict[str, str] = {}
    without_alpha = 0
    for name, kinds in parts.items():
        path = paths[name]
        if path in seen:
            raise ValueError(f"the file adapts {path} twice, as {seen[path]} and as {name}")
        seen[path] = name
        delta = _delta(kinds, name, scale)
        _check_shape(path, delta, layer=unpacked(layer_at(base, path)), backbone=base.name)
        without_alpha += "down" in kinds and "alpha" not in kinds and scale is None
        if not isinstance(delta, LowRankDelta) or delta.up.any():
            found[path] = delta
    note = f"{without_alpha} layers have no .alpha: their rank is used, which is a factor of 1"
    return found, (note,) if without_alpha else ()


def _by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer by kind (`TENSOR_KINDS`)."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        for mark, what in OTHERS.items():
            if mark in key:
                raise ValueError(f"the file holds {key}: {what}")
        match = KIND.fullmatch(key)
        if match is None:
            raise ValueError(f"the file holds {key}, which belongs to no kind of LoRA that is read")
        parts.setdefault(match[1], {})[TENSOR_KINDS[match[2]]] = value
    return parts


def _refuse_halves(parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    halves = [name for name, kinds in parts.items() if ("down" in kinds) != ("up" in kinds)]
    if halves:
        has, lacks = ("down", "up") if "down" in parts[halves[0]] else ("up", "down")
        raise ValueError(
            f"the file holds the {has} matrix of {halves[0]} without its {lacks} matrix; "
            f"{len(halves)} of {len(parts)} pairs are incomplete. The file was truncated or "
            "filtered; get the complete one"
        )
    bare = [name for name, kinds in parts.items() if not {"down", "diff", "diff_b"} & set(kinds)]
    if bare:
        raise ValueError(
            f"the file holds {' and '.join(parts[bare[0]])} of {bare[0]} and no matrices"
        )


def _delta(kinds: Mapping[str, Tensor], name: str, scale: Scale | None) -> Delta:
    if "down" not in kinds:
        return FullDelta(kinds.get("diff"), kinds.get("diff_b"))
    if {"diff", "diff_b"} & set(kinds):
        raise ValueError(f"the file holds low-rank matrices and a full delta of {name}")
    down, up = kinds["down"], kinds["up"]
    delta: LowRankDelta | DoRADelta = LowRankDelta(down, up)
    if "magnitude" in kinds:
        delta = DoRADelta(down, up, kinds["magnitude"])
    if "alpha" in kinds:
        return replace(delta, scale=float(kinds["alpha"]) / delta.rank)
    return replace(delta, scale=scale(name, delta)) if scale else delta


def _check_shape(path: str, delta: Delta, *, layer: Any, backbone: str) -> None:
    own = tuple(layer.weight.shape)
    if isinstance(delta, FullDelta):
        found = own if delta.weight is None else tuple(delta.weight.shape)
        if delta.bias is not None and (layer.bias is None or delta.bias.shape != layer.bias.shape):
            raise ValueError(f"the file changes a bias of {path} that {backbone} does not have")
    else:
        found = (len(delta.up), *delta.down.shape[1:])
        if delta.up.shape[1] != delta.rank:
            raise ValueError(
                f"the file's two matrices of {path} do not fit: down "
                f"{tuple(delta.down.shape)}, up {tuple(delta.up.shape)}"
            )
    if found != own:
        raise ValueError(
            f"the file changes {path} of shape {found}; in backbone {backbone} it is {own}, so the "
            "file was made for another backbone"
        )
