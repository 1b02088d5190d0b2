"""`comfyui`: what ComfyUI's "Load LoRA" node reads. U-Nets under sd-scripts' keys with `.alpha`,
full deltas as `.diff`; transformers under diffusers' keys with the scale folded in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from trainer.export.bundle import Delta, DoRADelta, Form, FullDelta, LowRankDelta
from trainer.export.cannot_carry import CannotCarryError
from trainer.export.factor import folded
from trainer.export.formats import Format
from trainer.export.formats.kohya import by_rules, common_alpha, pair, read
from trainer.export.forms import file_tensors
from trainer.export.job import Job
from trainer.export.layer_names import FUSED, comfy
from trainer.export.tensor_files import save_tensors
from trainer.export.tokens import refuse_unnamable, token_remark, write_tokens
from trainer.export.usage import Usage, word_text


def refuse(job: Job) -> None:
    if any(isinstance(delta, DoRADelta) for delta in job.bundle.layers.values()):
        raise CannotCarryError(
            "format=comfyui cannot carry DoRA: versions of ComfyUI take its norm along different "
            "axes, where full deltas are read alike by all"
        )
    refuse_unnamed(job, job.bundle.layers, "comfyui")
    refuse_unnamable(job.bundle)


def write(job: Job, folder: Path, dtype: torch.dtype) -> None:
    refuse(job)
    layers = {**job.bundle.layers, **job.bundle.forms}
    save(job, folder, dtype, layers=layers, format_name="comfyui")
    write_tokens(job.bundle, folder, dtype, known=True)


def save(
    job: Job,
    folder: Path,
    dtype: torch.dtype,
    *,
    layers: Mapping[str, Delta | Form],
    format_name: str,
) -> None:
    """Writes layers under ComfyUI's names, into a file with the job's title.

    Raises:
        CannotCarryError: ComfyUI has no name for a layer; the message is about `format_name`.
    """
    refuse_unnamed(job, layers, format_name)
    keys = comfy(job.base)
    alpha = common_alpha(d for d in layers.values() if isinstance(d, LowRankDelta | DoRADelta))
    tensors: dict[str, Tensor] = {}
    for path, delta in layers.items():
        tensors |= _tensors(keys[path], delta, alpha)
    if tensors:
        save_tensors(tensors, folder / f"{job.title}.safetensors", dtype=dtype)


def refuse_unnamed(job: Job, layers: Mapping[str, Delta | Form], format_name: str) -> None:
    """Raises `CannotCarryError` for a layer that ComfyUI has no name for."""
    keys = comfy(job.base)
    for path, delta in layers.items():
        if path not in keys:
            raise CannotCarryError(
                f"format={format_name} cannot carry {path}: ComfyUI has no name for it in a "
                f"{type(job.base.denoiser).__name__}"
            )
        if _is_slice_of_bias(path, delta, keys[path]):
            raise CannotCarryError(
                f"format={format_name} cannot carry the trained bias of {path}: in ComfyUI it is a "
                "slice of a larger one, which its loader cannot change"
            )


def lora_usage(job: Job, folder: Path) -> Usage:
    """Where ComfyUI looks for the file, and for the words."""
    file = f"{job.title}.safetensors"
    place = f'In ComfyUI: copy `{file}` to `models/loras` and choose it in the node "Load LoRA".'
    text = (place,) if (folder / file).is_file() else ()
    return Usage(text=(*text, *word_text(job.card, folder)))


def _is_slice_of_bias(path: str, delta: Delta | Form, key: str) -> bool:
    """Whether the bias of a layer was trained that ComfyUI's own model keeps in a larger one."""
    biased = isinstance(delta, FullDelta) and delta.bias is not None
    return biased and key.startswith("transformer.") and FUSED.fullmatch(path) is not None


def _tensors(key: str, delta: Delta | Form, alpha: float) -> dict[str, Tensor]:
    if isinstance(delta, Form):
        return file_tensors(key, delta)
    if isinstance(delta, FullDelta):
        changes = {"diff": delta.weight, "diff_b": delta.bias}
        return {f"{key}.{kind}": value for kind, value in changes.items() if value is not None}
    if key.startswith("transformer."):
        down, up = folded(delta)
        return {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    return pair(key, delta, alpha)


READERS = {"ComfyUI's key rules": by_rules}  # what ComfyUI does, without its code
FORMAT = Format(
    write,
    readers=READERS,
    usage=lora_usage,
    read=read,
    refuse=refuse,
    carries_known_words=True,
    remark=token_remark,
)
