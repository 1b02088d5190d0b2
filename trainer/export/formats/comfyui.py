"""`comfyui`: what its "Load LoRA" node reads. U-Nets under sd-scripts' keys with `.alpha`, whole
deltas as `.diff`; transformers under diffusers' keys with the scale folded in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from trainer.export.bundle import Delta, DoRADelta, FullDelta
from trainer.export.factor import folded
from trainer.export.files import save_tensors
from trainer.export.formats.kohya import by_rules, common_alpha, pair, read, relearns, remark
from trainer.export.job import Job
from trainer.export.layer_names import FUSED, comfy
from trainer.export.tokens import write_tokens

__all__ = ["READERS", "read", "relearns", "remark", "save", "write"]


def write(job: Job, folder: Path, dtype: torch.dtype) -> None:
    if any(isinstance(delta, DoRADelta) for delta in job.bundle.layers.values()):
        raise ValueError(
            "format=comfyui cannot carry DoRA: ComfyUI's versions take its norm along different "
            "axes; format=diff writes the same change as whole deltas, which all of them read"
        )
    save(job, job.bundle.layers, folder, dtype, "comfyui")
    write_tokens(job.bundle, folder, dtype, known=True)


def save(
    job: Job, layers: Mapping[str, Delta], folder: Path, dtype: torch.dtype, form: str
) -> None:
    """The file under ComfyUI's names; ValueError where it has none for a layer."""
    keys = comfy(job.base)
    alpha = common_alpha(item for item in layers.values() if not isinstance(item, FullDelta))
    tensors: dict[str, Tensor] = {}
    for path, delta in layers.items():
        _refuse_nameless(path, delta, keys, form, type(job.base.denoiser).__name__)
        tensors |= _tensors(keys[path], delta, alpha)
    if tensors:
        save_tensors(tensors, folder / f"{job.title}.safetensors", dtype, {})


def _refuse_nameless(
    path: str, delta: Delta, keys: Mapping[str, str], form: str, network: str
) -> None:
    if path not in keys:
        raise ValueError(
            f"format={form} cannot carry {path}: ComfyUI has no name for it in a {network}; "
            "format=merged carries it, format=peft where it is a low-rank pair"
        )
    sliced = keys[path].startswith("transformer.") and FUSED.fullmatch(path)
    if isinstance(delta, FullDelta) and delta.bias is not None and sliced:
        raise ValueError(
            f"format={form} cannot carry the trained bias of {path}: in ComfyUI it is a slice of a "
            "larger one, which its loader cannot change; format=merged carries it"
        )


def _tensors(key: str, delta: Delta, alpha: float) -> dict[str, Tensor]:
    if isinstance(delta, FullDelta):
        whole = {"diff": delta.weight, "diff_b": delta.bias}
        return {f"{key}.{kind}": value for kind, value in whole.items() if value is not None}
    if key.startswith("transformer."):
        down, up = folded(delta)
        return {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    return pair(key, delta, alpha)


READERS = {"ComfyUI's key rules": by_rules}
