"""`peft`: for each part a folder with `adapter_config.json` and `adapter_model.safetensors`, for
`PeftModel.from_pretrained`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from trainer.export import tensor_files, tokens
from trainer.export.bundle import Bundle, Delta, DoRADelta, LowRankDelta
from trainer.export.factor import factored, folded
from trainer.export.formats import Format
from trainer.export.formats.diffusers import config as config_of
from trainer.export.formats.diffusers import part_config, strength
from trainer.export.job import Job
from trainer.export.tensor_files import load_tensors, save_tensors
from trainer.export.tokens import read_tokens, write_tokens
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


def read(path: Path, base: Any) -> Bundle:
    """Reads the folders that `write` makes, or a single one, which is then the denoiser's.

    Raises:
        ValueError: there is no such folder, or an adapter is not LoRA.
    """
    single = path / CONFIG if path.is_dir() else path.parent / CONFIG
    found = [single] if single.is_file() else sorted(path.glob(f"*/{CONFIG}"))
    if not found:
        raise ValueError(f"file={path}: there is no {CONFIG} here; give the folder that holds it")
    layers: dict[str, Delta] = {}
    notes: tuple[str, ...] = ()
    for config in found:
        fields = json.loads(config.read_text(encoding="utf-8"))
        if fields.get("peft_type") != "LORA":
            kind = fields.get("peft_type")
            raise ValueError(f"file={config}: peft_type is {kind}; only LORA can be read")
        part = base.denoiser_name if config == single else config.parent.name
        tensors, _ = load_tensors(config.parent / WEIGHTS)
        named = {f"{part}.{key.removeprefix(PREFIX)}": value for key, value in tensors.items()}

        def scale(
            name: str, delta: LowRankDelta | DoRADelta, fields: dict[str, Any] = fields
        ) -> float:
            return strength(fields, name, delta.rank)

        own, more = tensor_files.deltas(named, base, scale)
        layers, notes = layers | own, notes + more
    return replace(read_tokens(tokens.files(path), base), layers=layers, notes=notes)


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
