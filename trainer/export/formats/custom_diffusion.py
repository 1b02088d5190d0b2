"""`custom_diffusion`: K and V of cross-attention as diffusers' own trainer writes them, for
`load_attn_procs`.

The call that diffusers documents loads nothing; `pipe.unet.load_attn_procs(folder,
weight_name=FILE, _pipeline=pipe)` does. The loader needs an entry for every attention layer: those
that did not train are tensors of length zero, since safetensors cannot hold `{}`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.export import tokens
from trainer.export.apply_bundle import layer_at
from trainer.export.bundle import Bundle, Delta, FullDelta
from trainer.export.cannot_carry import CannotCarryError
from trainer.export.factor import refuse_bare
from trainer.export.formats import Format
from trainer.export.job import Job
from trainer.export.read_tokens import read_beside
from trainer.export.tensor_files import load_tensors, save_tensors
from trainer.export.tokens import write_tokens
from trainer.export.usage import Usage, stock_usage, word_lines

FILE = "pytorch_custom_diffusion_weights.safetensors"
MARK = "_custom_diffusion"
KEYS = {
    "to_k": ("to_k", "weight"), "to_v": ("to_v", "weight"), "to_q": ("to_q", "weight"),
    "to_out.0": ("to_out", "0.weight"),
}  # fmt: skip


def write(job: Job, folder: Path, dtype: torch.dtype) -> None:
    tensors = _cross(job.bundle, job.base)
    if tensors:
        rest = (name for name in job.base.denoiser.attn_processors if name not in _owners(tensors))
        tensors |= {name: torch.zeros(0) for name in rest}
        save_tensors(tensors, folder / FILE, dtype=dtype)
    write_tokens(job.bundle, folder, dtype)


def _owners(tensors: dict[str, Tensor]) -> set[str]:
    return {key.partition(".processor.")[0] + ".processor" for key in tensors}


def _cross(bundle: Bundle, base: Any) -> dict[str, Tensor]:
    """The new matrices of every site that changed, under the names of diffusers' processors."""
    if not hasattr(base.denoiser, "load_attn_procs"):
        raise CannotCarryError("format=custom_diffusion is for U-Nets only")
    refuse_bare(bundle, "custom_diffusion")
    sites: dict[str, set[str]] = {}
    for path, delta in bundle.layers.items():
        name = path.removeprefix(f"{base.denoiser_name}.")
        site, _, role = name.partition(".attn2.")
        if not isinstance(delta, FullDelta) or delta.weight is None or role not in KEYS:
            raise CannotCarryError(
                f"format=custom_diffusion cannot carry {path}: it holds full matrices of "
                "cross-attention only"
            )
        sites.setdefault(f"{site}.attn2", set()).add(role)
    tensors: dict[str, Tensor] = {}
    wide = any({"to_q", "to_out.0"} & roles for roles in sites.values())
    for site in sites:
        for role in ("to_k", "to_v", *(("to_q", "to_out.0") if wide else ())):
            path = f"{base.denoiser_name}.{site}.{role}"
            layer: Any = layer_at(base, path)
            delta = bundle.layers.get(path, FullDelta(None))
            assert isinstance(delta, FullDelta)
            stem, leaf = KEYS[role]
            key = f"{site}.processor.{stem}{MARK}"
            tensors[f"{key}.{leaf}"] = _moved(layer.weight, delta.weight)
            if role == "to_out.0":
                tensors[f"{key}.0.bias"] = _moved(layer.bias, delta.bias)
    return tensors


def _moved(old: Tensor, change: Tensor | None) -> Tensor:
    return (old.detach() if change is None else old.detach() + change).clone()


def _load_attn_procs(folder: Path, base: Any) -> Any:
    tokens.load_stock(folder, base)
    if (folder / FILE).is_file():
        pipeline = base.pipeline()
        pipeline.unet.load_attn_procs(folder, weight_name=FILE, _pipeline=pipeline)
    return base


def read(path: Path, base: Any) -> Bundle:
    """Reads a file of full matrices, or a folder with `FILE` and `embeddings/`."""
    file = path / FILE if path.is_dir() else path
    layers: dict[str, Delta] = {}
    if file.is_file() or not path.is_dir():
        matrices = {key: value for key, value in load_tensors(file)[0].items() if value.numel()}
        layers = _differences(matrices, base)
    return Bundle(layers, {}) | read_beside(path, base)


def _differences(tensors: dict[str, Tensor], base: Any) -> dict[str, Delta]:
    roles = {f"{stem}{MARK}.{leaf}": role for role, (stem, leaf) in KEYS.items()}
    biases = {f"to_out{MARK}.0.bias": "to_out.0"}
    known = dict(base.named_parameters())
    found: dict[str, FullDelta] = {}
    for key, value in tensors.items():
        site, _, last = key.removeprefix(f"{base.denoiser_name}.").partition(".processor.")
        role = (roles | biases).get(last)
        leaf = "bias" if last in biases else "weight"
        path = f"{base.denoiser_name}.{site}.{role}"
        old = known.get(f"{path}.{leaf}")
        if old is None or old.shape != value.shape:
            own = "nothing" if old is None else tuple(old.shape)
            raise ValueError(
                f"the file's {key} is {tuple(value.shape)}; backbone {base.name} has {own} there, "
                "so the file was made for another backbone"
            )
        change = None if torch.equal(old, value) else value - old.detach()
        other = found.get(path, FullDelta(None))
        found[path] = (
            FullDelta(change, other.bias) if leaf == "weight" else FullDelta(other.weight, change)
        )
    return {p: d for p, d in found.items() if d.weight is not None or d.bias is not None}


def refuse(job: Job) -> None:
    _cross(job.bundle, job.base)


def usage(job: Job, folder: Path) -> Usage:
    lines, imports = word_lines(folder, job.base.pipeline())
    if (folder / FILE).is_file():
        lines.append(f"pipe.unet.load_attn_procs(folder, weight_name={FILE!r}, _pipeline=pipe)")
    text = "Without `_pipeline=pipe` diffusers loads nothing, and says nothing. UIs do not read it."
    return stock_usage(job, text=(text,), call=tuple(lines), imports=tuple(imports))


FORMAT = Format(
    write,
    readers={"load_attn_procs(_pipeline=)": _load_attn_procs},
    usage=usage,
    read=read,
    refuse=refuse,
    one_file=True,
)
