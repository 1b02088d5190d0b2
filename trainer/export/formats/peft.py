"""`peft`: for each part a folder with `adapter_config.json` and `adapter_model.safetensors`, for
`PeftModel.from_pretrained`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from trainer.export import tokens
from trainer.export.bundle import Bundle, DoRADelta
from trainer.export.factor import factored, folded
from trainer.export.formats import Format
from trainer.export.formats.diffusers import config as config_of
from trainer.export.formats.diffusers import part_config
from trainer.export.job import Job
from trainer.export.peft_fields import MERGE, check_fields
from trainer.export.read_layers import read_layers
from trainer.export.read_tokens import read_beside
from trainer.export.tensor_files import load_tensors, save_tensors
from trainer.export.tokens import write_tokens
from trainer.export.usage import Usage, stock_usage, word_lines
from trainer.ops.adapters.inject import part_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def refuse(job: Job) -> None:
    config_of(factored(job.bundle, "peft"))


def write(job: Job, folder: Path, dtype: torch.dtype) -> None:
    refuse(job)
    layers = factored(job.bundle, "peft")
    for part in dict.fromkeys(path.partition(".")[0] for path in layers):
        own = {p.partition(".")[2]: d for p, d in layers.items() if p.partition(".")[0] == part}
        tensors: dict[str, Tensor] = {}
        for name, delta in own.items():
            down, up = folded(delta)
            tensors |= {f"{PREFIX}{name}.lora_A.weight": down, f"{PREFIX}{name}.lora_B.weight": up}
            if isinstance(delta, DoRADelta):
                tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = delta.magnitude
        save_tensors(tensors, folder / part / WEIGHTS, dtype=dtype)
        fields = {"peft_type": "LORA", "inference_mode": True} | part_config(part, own)
        (folder / part / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    write_tokens(job.bundle, folder, dtype)


def _peft_model(folder: Path, base: Any) -> Any:
    """Loads each part's folder. `PeftModel` changes the module that it is given."""
    tokens.load_own(folder, base)
    for path in sorted(folder.glob(f"*/{CONFIG}")):
        PeftModel.from_pretrained(part_of(base, path.parent.name), path.parent)
    return base


def folders(path: Path, base: Any) -> dict[str, Path]:
    """The folder of each part: those that `write` makes, or a single one, which is the denoiser's
    unless it has a text encoder's name.

    Raises:
        ValueError: there is none.
    """
    single = path if path.is_dir() else path.parent
    if (single / CONFIG).is_file():
        named = single.name in base.text_encoders
        return {single.name if named else base.denoiser_name: single}
    found = {config.parent.name: config.parent for config in sorted(path.glob(f"*/{CONFIG}"))}
    if not found:
        raise ValueError(f"file={path}: there is no {CONFIG} here; give the folder that holds it")
    return found


def read(path: Path, base: Any) -> Bundle:
    """Reads LoRA, DoRA, LoHa and LoKr from the folders that `write` makes, or from a single one.

    Raises:
        ValueError: there is no such folder, or an adapter is of another kind.
    """
    found = folders(path, base)
    bundle = Bundle({}, {})
    single = path if path.is_dir() else path.parent
    if single in found.values():  # its words are beside it, or beside its folder
        for near in (single / WEIGHTS, single.parent / WEIGHTS):
            bundle |= read_beside(near, base)
    else:
        bundle |= read_beside(path, base)
    for part, folder in found.items():
        bundle |= _of_part(part, folder, base)
    return bundle


def _of_part(part: str, folder: Path, base: Any) -> Bundle:
    config = folder / CONFIG
    fields = json.loads(config.read_text(encoding="utf-8"))
    if (kind := fields.get("peft_type")) not in ("LORA", "LOHA", "LOKR"):
        raise ValueError(
            f"file={config}: peft_type is {kind}; LORA, LOHA and LOKR can be read. {MERGE}"
        )
    if part != base.denoiser_name and part not in base.text_encoders:
        raise ValueError(
            f"file={config}: backbone {base.name} has no part {part}; it has "
            f"{', '.join((base.denoiser_name, *base.text_encoders))}"
        )
    check_fields(fields)
    tensors, _ = load_tensors(folder / WEIGHTS)
    named = {f"{part}.{key.removeprefix(PREFIX)}": value for key, value in tensors.items()}
    return read_layers(named, base, lambda name: fields)


def usage(job: Job, folder: Path) -> Usage:
    lines, imports = word_lines(folder, job.base.pipeline())
    for path in sorted(folder.glob(f"*/{CONFIG}")):
        part = path.parent.name
        lines.append(f'pipe.{part} = PeftModel.from_pretrained(pipe.{part}, f"{{folder}}/{part}")')
        imports.append("from peft import PeftModel")
    return stock_usage(job, call=tuple(lines), imports=tuple(imports))


FORMAT = Format(
    write,
    readers={"PeftModel.from_pretrained": _peft_model},
    usage=usage,
    read=read,
    refuse=refuse,
)
