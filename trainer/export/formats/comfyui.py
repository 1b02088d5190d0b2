"""`comfyui`: what ComfyUI's "Load LoRA" node reads. U-Nets under sd-scripts' keys with `.alpha`,
full deltas as `.diff`; transformers under diffusers' keys with the scale folded in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.backbones.four_bits import unpacked
from trainer.export.apply_bundle import full_delta, layer_at
from trainer.export.bundle import Delta, DoRADelta, Form, FullDelta, LowRankDelta
from trainer.export.cannot_carry import CannotCarryError
from trainer.export.factor import folded
from trainer.export.formats import Format
from trainer.export.formats.kohya import by_rules, common_alpha, file_in, pair, read
from trainer.export.job import Job
from trainer.export.layer_names import comfy, comfy_parameters, fused_layers
from trainer.export.lycoris import file_tensors
from trainer.export.tensor_files import load_tensors, save_tensors
from trainer.export.tokens import load_stock, refuse_unnamable, token_remark, write_tokens
from trainer.export.usage import Usage, word_text

OURS = ("transformer.", "diffusion_model.")  # how the names of a transformer's layers begin


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
    tensors, inside = _fused(job, layers)
    for path, delta in layers.items():
        if path not in inside:
            tensors |= _tensors(keys[path], delta, alpha)
    bare = comfy_parameters(job.base)
    tensors |= {f"{bare[name]}.diff": change for name, change in job.bundle.bare.items()}
    if tensors:
        save_tensors(tensors, folder / f"{job.title}.safetensors", dtype=dtype)


def refuse_unnamed(job: Job, layers: Mapping[str, Delta | Form], format_name: str) -> None:
    """Raises `CannotCarryError` for a layer or a parameter that ComfyUI has no name for."""
    known = comfy(job.base).keys() | comfy_parameters(job.base).keys()
    for path in (*layers, *job.bundle.bare):
        if path not in known:
            raise CannotCarryError(
                f"format={format_name} cannot carry {path}: ComfyUI has no name for it in a "
                f"{type(job.base.denoiser).__name__}"
            )


@torch.no_grad()
def _fused(
    job: Job, layers: Mapping[str, Delta | Form]
) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Full deltas of layers that ComfyUI keeps as one, where the bias of one of them changed: its
    loader finds a slice's weight by diffusers' name, but no slice of a bias. Also the layers that
    are in them."""
    tensors: dict[str, Tensor] = {}
    inside: set[str] = set()
    for key, paths in fused_layers(job.base).items():
        own = [layers.get(path) for path in paths]
        if not any(isinstance(delta, FullDelta) and delta.bias is not None for delta in own):
            continue
        weights, biases = [], []
        for path, delta in zip(paths, own, strict=True):
            layer: Any = unpacked(layer_at(job.base, path))
            if isinstance(delta, Form):
                delta = job.bundle.layers[path]
            change = full_delta(delta or FullDelta(None), layer)
            weights.append(_or_zeros(change.weight, layer.weight))
            biases.append(_or_zeros(change.bias, layer.bias))
        tensors |= {f"{key}.diff": torch.cat(weights), f"{key}.diff_b": torch.cat(biases)}
        inside |= set(paths)
    return tensors, frozenset(inside)


def _or_zeros(change: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if change is None else change


def lora_usage(job: Job, folder: Path) -> Usage:
    """Where ComfyUI looks for the file, and for the words."""
    file = f"{job.title}.safetensors"
    place = f'In ComfyUI: copy `{file}` to `models/loras` and choose it in the node "Load LoRA".'
    text = (place,) if (folder / file).is_file() else ()
    return Usage(text=(*text, *word_text(job.card, folder)))


def _tensors(key: str, delta: Delta | Form, alpha: float) -> dict[str, Tensor]:
    if isinstance(delta, Form):
        return file_tensors(key, delta)
    if isinstance(delta, FullDelta):
        changes = {"diff": delta.weight, "diff_b": delta.bias}
        return {f"{key}.{kind}": value for kind, value in changes.items() if value is not None}
    if key.startswith(OURS):
        down, up = folded(delta)
        return {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    return pair(key, delta, alpha)


def _load_lora_weights(folder: Path, base: Any) -> Any:
    """Loads the LoRA of a transformer with diffusers; None where the files hold anything else, or
    name layers otherwise than diffusers."""
    pipeline, file = base.pipeline(), file_in(folder)
    if base.denoiser_name == "unet" or file is None or not hasattr(pipeline, "load_lora_weights"):
        return None
    own = {name for name, _ in base.denoiser.named_modules()}
    names = [key.partition(".")[2].partition(".lora_")[0] for key in load_tensors(file)[0]]
    if not own.issuperset(names):
        return None
    load_stock(folder, base)
    pipeline.load_lora_weights(folder, weight_name=file.name)
    return base


# what ComfyUI does, without its code; and diffusers, where the names are its own
READERS = {"ComfyUI's key rules": by_rules, "load_lora_weights": _load_lora_weights}
FORMAT = Format(
    write,
    readers=READERS,
    usage=lora_usage,
    read=read,
    refuse=refuse,
    one_file=True,
    carries_known_words=True,
    remark=token_remark,
)
