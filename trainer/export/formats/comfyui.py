"""`comfyui`: what ComfyUI's "Load LoRA" node reads. U-Nets under sd-scripts' keys with `.alpha`,
full deltas as `.diff`; transformers under diffusers' keys with the scale folded in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from trainer.export.bundle import Delta, DoRADelta, FullDelta
from trainer.export.factor import folded
from trainer.export.formats import Format
from trainer.export.formats.kohya import by_rules, common_alpha, pair, read
from trainer.export.job import Job
from trainer.export.layer_names import FUSED, comfy
from trainer.export.tensor_files import save_tensors
from trainer.export.tokens import token_remark, write_tokens


def write(job: Job, folder: Path, dtype: torch.dtype) -> None:
    if any(isinstance(delta, DoRADelta) for delta in job.bundle.layers.values()):
        raise ValueError(
            "format=comfyui cannot carry DoRA: versions of ComfyUI take its norm along different "
            "axes; format=diff writes the same change as full deltas, which all versions read"
        )
    save(job, folder, dtype, layers=job.bundle.layers, format_name="comfyui")
    write_tokens(job.bundle, folder, dtype, known=True)


def save(
    job: Job, folder: Path, dtype: torch.dtype, *, layers: Mapping[str, Delta], format_name: str
) -> None:
    """Writes layers under ComfyUI's names, into a file with the job's title.

    Raises:
        ValueError: ComfyUI has no name for a layer; the message is about `format_name`.
    """
    keys = comfy(job.base)
    alpha = common_alpha(item for item in layers.values() if not isinstance(item, FullDelta))
    tensors: dict[str, Tensor] = {}
    for path, delta in layers.items():
        if path not in keys:
            raise ValueError(
                f"format={format_name} cannot carry {path}: ComfyUI has no name for it in a "
                f"{type(job.base.denoiser).__name__}; format=merged carries it, format=peft where "
                "it is a low-rank pair"
            )
        if _is_slice_of_bias(path, delta, keys[path]):
            raise ValueError(
                f"format={format_name} cannot carry the trained bias of {path}: in ComfyUI it is a "
                "slice of a larger one, which its loader cannot change; format=merged carries it"
            )
        tensors |= _tensors(keys[path], delta, alpha)
    if tensors:
        save_tensors(tensors, folder / f"{job.title}.safetensors", dtype=dtype)


def _is_slice_of_bias(path: str, delta: Delta, key: str) -> bool:
    """Whether the bias of a layer was trained that ComfyUI's own model keeps in a larger one."""
    biased = isinstance(delta, FullDelta) and delta.bias is not None
    return biased and key.startswith("transformer.") and FUSED.fullmatch(path) is not None


def _tensors(key: str, delta: Delta, alpha: float) -> dict[str, Tensor]:
    if isinstance(delta, FullDelta):
        changes = {"diff": delta.weight, "diff_b": delta.bias}
        return {f"{key}.{kind}": value for kind, value in changes.items() if value is not None}
    if key.startswith("transformer."):
        down, up = folded(delta)
        return {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    return pair(key, delta, alpha)


READERS = {"ComfyUI's key rules": by_rules}  # what ComfyUI does, without its code
FORMAT = Format(write, READERS, read, carries_known_words=True, remark=token_remark)
