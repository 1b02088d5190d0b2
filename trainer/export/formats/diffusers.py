"""`diffusers`: `pytorch_lora_weights.safetensors` for `load_lora_weights`, DoRA in peft's style.

The scale is folded into B and alpha is the rank, so that every reader takes it at strength 1; the
header still says so in the fewest fields, since a field an older peft does not know stops it.
Known words that learned anew have no place in such files: the text encoder with their rows is whole
in a folder of its name, to give to the pipeline in place of the stock one, before all else. Motion
modules that trained are a `MotionAdapter` in the same folder. A clip of one frame meets them
in diffusers, and here it is an image, which does not.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import MotionAdapter
from peft.utils.other import get_pattern_key
from torch import Tensor

from trainer.export import files, motion, tokens
from trainer.export.apply_bundle import add_to
from trainer.export.bundle import Bundle, Delta, DoRADelta, LowRankDelta
from trainer.export.factor import factored, folded
from trainer.export.files import load_tensors, save_tensors
from trainer.export.job import Job
from trainer.export.layer_names import long_name
from trainer.export.motion import carries_motion
from trainer.export.tokens import read_tokens, write_tokens

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
MODULES = "diffusion_pytorch_model.safetensors"  # of a `MotionAdapter`
OLD = re.compile(r"\.(?:processor|self_attn)\.to_(q|k|v|out)_lora\.")

carries = carries_motion
relearns = True


def write(job: Job, folder: Path, dtype: torch.dtype) -> None:
    layers = factored(job.bundle, "diffusers")
    _refuse_unloadable(job, layers)
    if job.inserts:
        motion.adapter(job.live, dtype).save_pretrained(folder, safe_serialization=True)
    tensors: dict[str, Tensor] = {}
    for path, delta in layers.items():
        key = long_name(path)
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = folded(delta)
        if isinstance(delta, DoRADelta):
            tensors[f"{key}.{magnitude_of(path)}"] = delta.magnitude
    if tensors:
        metadata = {METADATA: json.dumps(config(layers), indent=2, sort_keys=True)}
        save_tensors(tensors, folder / FILE, dtype, metadata)
    if job.bundle.known:
        plain = add_to(job.fresh(), Bundle({}, {}, job.bundle.known)).text_encoders
        for part in dict.fromkeys(part for rows in job.bundle.known.values() for part in rows):
            plain[part].to(dtype).save_pretrained(folder / part, safe_serialization=True)
    write_tokens(job.bundle, folder, dtype)


def magnitude_of(path: str) -> str:
    """transformers 5 wants `.weight` behind it, and without it leaves the magnitudes as they are,
    in silence; peft takes both, and writes the short one."""
    name = "lora_magnitude_vector"
    return f"{name}.weight" if path.startswith("text_encoder") else name


def config(layers: Mapping[str, LowRankDelta | DoRADelta]) -> dict[str, Any]:
    """The fewest fields of a peft `LoraConfig` for each part, with the part before each."""
    fields: dict[str, Any] = {}
    for part in dict.fromkeys(path.partition(".")[0] for path in layers):
        own = {p.partition(".")[2]: d for p, d in layers.items() if p.partition(".")[0] == part}
        fields |= {f"{part}.{key}": value for key, value in part_config(part, own).items()}
    return fields


def part_config(part: str, layers: Mapping[str, LowRankDelta | DoRADelta]) -> dict[str, Any]:
    """peft tries every pattern on every layer: a denoiser's begins at the start of the name, a text
    encoder's does not, since older transformers have one more level there."""
    rank = Counter(delta.rank for delta in layers.values()).most_common(1)[0][0]
    start = "" if part.startswith("text_encoder") else "^"
    ranks = {f"{start}{re.escape(n)}": d.rank for n, d in layers.items() if d.rank != rank}
    fields: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": sorted(layers)}
    if ranks:
        fields |= {"rank_pattern": ranks, "alpha_pattern": ranks}
    dora = [isinstance(delta, DoRADelta) for delta in layers.values()]
    if any(dora) and not all(dora):
        raise ValueError(
            f"LoRA and DoRA on different layers of {part} cannot be in one peft file, which is one "
            "or the other; format=merged or format=diff carries both"
        )
    return fields | ({"use_dora": True} if any(dora) else {})


def _refuse_unloadable(job: Job, layers: Mapping[str, object]) -> None:
    stock = type(job.base.pipeline())
    takes = getattr(stock, "_lora_loadable_modules", ())
    for part in dict.fromkeys(path.partition(".")[0] for path in layers):
        if part not in takes or not hasattr(stock, "load_lora_weights"):
            raise ValueError(
                f"format=diffusers cannot carry a LoRA of the {part}: diffusers' {stock.__name__} "
                "loads none there; format=peft or format=merged carries it"
            )
    for path in layers:
        if ".motion_modules." in path and path.rpartition(".")[2] in motion.NAMED:
            raise ValueError(
                f"format=diffusers cannot carry a LoRA of {path}: diffusers gives this layer its "
                "input by a name that peft's layer does not have; format=animatediff writes the "
                "motion modules with it folded in"
            )


def _load_text_encoders(folder: Path, base: Any) -> None:
    for part, encoder in base.text_encoders.items():
        if (folder / part).is_dir():
            given = type(encoder).from_pretrained(folder / part, dtype=torch.float32)
            setattr(base, part, given.eval().requires_grad_(False))


def _load_lora_weights(folder: Path, base: Any) -> Any:
    if _moves(folder, base):
        return None
    _load_text_encoders(folder, base)
    tokens.load_stock(folder, base)
    if (folder / FILE).is_file():
        base.pipeline().load_lora_weights(folder, weight_name=FILE)
    return base


def _moves(folder: Path, base: Any) -> bool:
    return (folder / MODULES).is_file() or bool(motion.modules(base))


def _animate(folder: Path, base: Any) -> Any:
    """The pipeline of clips with the folder's motion modules, or with those the base has; None
    where there are none."""
    if not _moves(folder, base):
        return None
    _load_text_encoders(folder, base)
    tokens.load_stock(folder, base)
    trained = (folder / MODULES).is_file()
    given = MotionAdapter.from_pretrained(folder) if trained else motion.adapter(base)
    model = motion.Stock(base, given)
    if (folder / FILE).is_file():
        model.pipeline.load_lora_weights(folder, weight_name=FILE)
    return model


READERS = {"load_lora_weights": _load_lora_weights, "AnimateDiffPipeline": _animate}


def read(path: Path, base: Any) -> Bundle:
    """A file, or a folder with `FILE` and `embeddings/`, in diffusers' present spelling or the
    former ones."""
    file = path / FILE if path.is_dir() else path
    layers: dict[str, Delta] = {}
    notes: tuple[str, ...] = ()
    if file.is_file() or not path.is_dir():
        tensors, metadata = load_tensors(file)
        known = json.loads(metadata[METADATA]) if METADATA in metadata else {}
        renamed = {_modern(key): value for key, value in tensors.items()}

        def scale(name: str, delta: LowRankDelta | DoRADelta) -> float:
            return strength(_of_part(known, name.partition(".")[0]), name, delta.rank)

        layers, notes = files.deltas(renamed, base, scale)
    if path.is_dir() and (path / MODULES).is_file():
        notes += (f"its motion modules are read by methods.animatediff.weights={path}",)
    for part in base.text_encoders if path.is_dir() else ():
        if (path / part).is_dir():
            notes += (f"{part}/, in which known words have learned anew, is not read",)
    return replace(read_tokens(tokens.files(path), base), layers=layers, notes=notes)


def strength(fields: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / r as a peft configuration says it for a layer; 1 where there is none."""
    if "lora_alpha" not in fields:
        return 1.0
    patterns = fields.get("alpha_pattern") or {}
    module = name.partition(".")[2]
    alpha = patterns.get(get_pattern_key(list(patterns), module), fields["lora_alpha"])
    return float(alpha) / (rank**0.5 if fields.get("use_rslora") else rank)


def _of_part(known: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {k.partition(".")[2]: v for k, v in known.items() if k.partition(".")[0] == part}


def _modern(key: str) -> str:
    """`attn1.processor.to_q_lora.down` and the text encoder's `self_attn.to_q_lora.down`."""
    match = OLD.search(key)
    if match is None:
        return key
    if key[match.start() :].startswith(".processor"):
        layer = "to_out.0" if match[1] == "out" else f"to_{match[1]}"
        return f"{key[: match.start()]}.{layer}.lora.{key[match.end() :]}"
    return f"{key[: match.start()]}.self_attn.{match[1]}_proj.lora.{key[match.end() :]}"
