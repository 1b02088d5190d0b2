"""Loads a part of a checkpoint in one file, by diffusers' own conversion of its names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import safe_open
from torch import Tensor

LEFT_OUT = ("embeddings.position_ids", "text_projection.weight")  # of a CLIP that has no use of it


def load_part(
    file: Path, prefix: str, *, kind: Any, where: Path, dtype: torch.dtype = torch.float32
) -> Any:
    """A part in `dtype`. prefix: of its tensors; kind: its class; where: the folder of its config.

    Raises:
        ValueError: tensors are missing, or of other shapes than the config says.
    """
    with safe_open(file, "pt") as opened:
        names = [name for name in opened.keys() if name.startswith(prefix)]  # noqa: SIM118
        stored = {name: opened.get_tensor(name) for name in names}
    if kind.__module__.startswith("diffusers."):
        return _of_diffusers(file, stored, kind=kind, where=where, dtype=dtype)
    return _of_transformers(file, stored, prefix, kind=kind, where=where, dtype=dtype)


def _of_diffusers(
    file: Path, stored: dict[str, Tensor], *, kind: Any, where: Path, dtype: torch.dtype
) -> Any:
    config = json.loads((where / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        model = kind.from_config(config)
    unet = kind.__name__.startswith("UNet")
    convert = convert_ldm_unet_checkpoint if unet else convert_ldm_vae_checkpoint
    own = model.state_dict()
    tensors = {
        name: _as(value.to(dtype), own.get(name))
        for name, value in convert(stored, config=config).items()
    }
    _check(file, where, found=tensors, wanted=own)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _of_transformers(
    file: Path,
    stored: dict[str, Tensor],
    prefix: str,
    *,
    kind: Any,
    where: Path,
    dtype: torch.dtype,
) -> Any:
    config = kind.config_class.from_pretrained(where)
    with torch.device("meta"):
        model = kind(config)
    if any(".resblocks." in name for name in stored):
        found = convert_open_clip_checkpoint(model, stored, prefix=prefix)
    else:
        found = convert_ldm_clip_checkpoint(stored)
    own = model.state_dict()
    wrapped = any(name.startswith("text_model.") for name in own)
    tensors = {}
    for name, value in found.items():
        short = name if wrapped else name.removeprefix("text_model.")
        if short in own or not short.endswith(LEFT_OUT):
            tensors[short] = _as(value.to(dtype), own.get(short))
    _check(file, where, found=tensors, wanted=own)
    made = kind.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    return made.eval()


def _as(value: Tensor, wanted: Tensor | None) -> Tensor:
    """Of a layer that one code has as a convolution of 1x1, (o, i, 1, 1), and the other as linear,
    (o, i), as it is wanted. `_check` refuses all other shapes."""
    if wanted is None:
        return value
    own, other = tuple(value.shape), tuple(wanted.shape)
    pointwise = other == (*own, 1, 1) or own == (*other, 1, 1)
    return value.view(other) if pointwise else value


def _check(file: Path, where: Path, *, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    absent = sorted(wanted.keys() - found.keys())
    unknown = sorted(found.keys() - wanted.keys())
    if absent or unknown:
        what = f"lacks {absent[0]}" if absent else f"has {unknown[0]} too"
        raise ValueError(
            f"{file}: its {where.name} {what}, {len(absent) + len(unknown)} tensors in all are "
            "others than the configuration says; name it by parts.config"
        )
    for name, value in found.items():
        if value.shape != wanted[name].shape:
            raise ValueError(
                f"{file}: {name} of its {where.name} is {list(value.shape)}, and the configuration "
                f"says {list(wanted[name].shape)}; name another by parts.config"
            )
