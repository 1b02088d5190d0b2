"""The loaders of other tools that are installed, each called on a file as the tool's users do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft import LoraConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from torch import Tensor

from trainer.export import lycoris_loader
from trainer.export.bundle import Bundle
from trainer.export.formats import custom_diffusion, diffusers, kohya, peft
from trainer.export.read_tokens import read_tokens
from trainer.export.tensor_files import load_tensors
from trainer.export.tokens import files, load_stock
from trainer.ops.adapters.inject import part_of


@dataclass(frozen=True)
class Loader:
    """A loader of another tool.

    load: changes a base in place as the tool does; known_fault: how it is known to misread files of
    that format, in words.
    """

    name: str
    load: Callable[[Any], None]
    known_fault: str = ""


def loaders(format_name: str, path: Path, *, bundle: Bundle, base: Any) -> Iterator[Loader]:
    """The loaders of a file, the tool's own first."""
    pipeline = base.pipeline()
    if format_name == "peft":
        yield Loader("peft's PeftModel.from_pretrained", lambda own: _peft(path, own))
    elif format_name == "embedding":
        if hasattr(pipeline, "load_textual_inversion") and not bundle.known:
            yield Loader(
                "diffusers' load_textual_inversion", lambda own: _words([path], bundle, own)
            )
    elif format_name == "custom_diffusion":
        file = path / custom_diffusion.FILE if path.is_dir() else path
        yield Loader("diffusers' load_attn_procs", lambda own: _attn_procs(file, own))
    elif format_name in ("diffusers", "kohya", "comfyui") and not bundle.forms:
        yield from _of_lora(format_name, path, pipeline)
    if format_name in ("kohya", "diff"):
        yield from _of_lycoris(path)


def _of_lora(format_name: str, path: Path, pipeline: Any) -> Iterator[Loader]:
    file: Path | None = path
    if path.is_dir():
        file = path / diffusers.FILE if format_name == "diffusers" else kohya.file_in(path)
    if file is None or not file.is_file():
        return
    tensors, metadata = load_tensors(file)
    if any(key.endswith("dora_scale") for key in tensors):  # diffusers leaves these out
        return
    header = json.loads(metadata.get(diffusers.METADATA, "{}"))
    if hasattr(pipeline, "load_lora_weights"):
        fault = "; it is known to apply one alpha to all layers" if format_name == "kohya" else ""
        yield Loader(
            "diffusers' load_lora_weights",
            lambda own: _lora_and_words(file, path, own),
            fault,
        )
    if format_name == "kohya" and hasattr(pipeline, "lora_state_dict"):
        yield Loader("diffusers' converter of sd-scripts' names", lambda own: _converted(file, own))
    if header:
        yield Loader(
            "peft, with the configuration in the header,", lambda own: _by_header(file, own)
        )


def _of_lycoris(path: Path) -> Iterator[Loader]:
    file = kohya.file_in(path) if path.is_dir() else path
    if file is not None and lycoris_loader.reads(load_tensors(file)[0]):
        yield Loader("LyCORIS' own loader", lambda own: lycoris_loader.load(file, own))


def _lora_and_words(file: Path, path: Path, base: Any) -> None:
    """A LoRA, and the words of an export's folder, which this project writes for diffusers too."""
    if path.is_dir() and not read_tokens(files(path), base).known:
        load_stock(path, base)
    base.pipeline().load_lora_weights(file.parent, weight_name=file.name)


def _peft(path: Path, base: Any) -> None:
    """`PeftModel` changes the module that it is given."""
    for part, folder in peft.folders(path, base).items():
        PeftModel.from_pretrained(part_of(base, part), folder)


def _words(files: list[Path], bundle: Bundle, base: Any) -> None:
    for file in files:
        word = next(iter((*bundle.tokens, *bundle.known)))
        base.pipeline().load_textual_inversion(file.parent, weight_name=file.name, token=word)


def _attn_procs(file: Path, base: Any) -> None:
    """Loads the processors, and puts their matrices into the layers that they stand for."""
    pipeline = base.pipeline()
    pipeline.unet.load_attn_procs(file.parent, weight_name=file.name, _pipeline=pipeline)
    for site, processor in pipeline.unet.attn_processors.items():
        attention = pipeline.unet.get_submodule(site.removesuffix(".processor"))
        for stem in ("to_q", "to_k", "to_v", "to_out"):
            if (new := getattr(processor, f"{stem}_custom_diffusion", None)) is not None:
                getattr(attention, stem).load_state_dict(new.state_dict(), strict=False)


@torch.no_grad()
def _converted(file: Path, base: Any) -> None:
    """Adds alpha / r B A of every layer, as diffusers' converter names and pairs them."""
    tensors, alphas = base.pipeline().lora_state_dict(
        file.parent, weight_name=file.name, unet_config=base.denoiser.config
    )
    tensors = {k: _with_alpha(k, value, alphas or {}) for k, value in tensors.items()}
    for part, module in {base.denoiser_name: base.denoiser, **base.text_encoders}.items():
        own = {
            k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")
        }
        pairs = _in_peft_names(own, module is base.denoiser) if own else {}
        for key in [key for key in pairs if key.endswith(".lora_A.weight")]:
            name = key.removesuffix(".lora_A.weight")
            down, up = pairs[key], pairs[f"{name}.lora_B.weight"]
            layer = module.get_submodule(name.removeprefix("text_model."))
            layer.weight += (up.flatten(1) @ down.flatten(1)).float().view_as(layer.weight)


def _with_alpha(key: str, value: Tensor, alphas: Mapping[str, float]) -> Tensor:
    """A tensor of the converter, `down` times alpha / r, which it gives under another key: that of
    the tensor, or of the layer."""
    if ".down." not in key:
        return value
    layer = re.sub(r"\.lora(?:_linear_layer)?\.down\.weight", "", key)
    alpha = alphas.get(f"{key}.alpha", alphas.get(f"{layer}.alpha", len(value)))
    return value * (float(alpha) / len(value))


def _in_peft_names(tensors: dict[str, Tensor], denoiser: bool) -> dict[str, Tensor]:
    """Keys of a part in peft's spelling, by diffusers' own conversion."""
    convert = convert_unet_state_dict_to_peft if denoiser else convert_state_dict_to_peft
    found: dict[str, Tensor] = convert(tensors)
    return found


def _by_header(file: Path, base: Any) -> None:
    """peft's own injection into each part, with the part's configuration and tensors."""
    tensors, metadata = load_tensors(file)
    fields = json.loads(metadata[diffusers.METADATA])
    for part in dict.fromkeys(key.partition(".")[0] for key in tensors):
        start = f"{part}."
        own = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        config = {k.removeprefix(start): v for k, v in fields.items() if k.startswith(start)}
        module = part_of(base, part)
        if any(".lora." in key or "lora_linear_layer" in key for key in own):
            own = _in_peft_names(own, module is base.denoiser)
        if not hasattr(module, "text_model"):
            own = {key.removeprefix("text_model."): value for key, value in own.items()}
        inject_adapter_in_model(LoraConfig(**config), module)
        set_peft_model_state_dict(module, own)
