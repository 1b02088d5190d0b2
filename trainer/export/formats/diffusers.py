"""`diffusers`: `pytorch_lora_weights.safetensors` for `load_lora_weights`, DoRA in peft's style.

The scale is folded into B and alpha is the rank, so that every reader applies a factor of 1. The
header repeats this in as few fields as possible, since an older peft fails on a field it does not
know. Words of the vocabulary whose embeddings were trained have no place in such a file: a folder
with the text encoder's name holds the complete encoder, to be given to the pipeline in place of the
stock one before anything else is loaded. Motion modules that trained are a `MotionAdapter` in the
same folder; diffusers applies it to a clip of one frame too, which this toolkit treats as an image.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import MotionAdapter
from torch import Tensor

from trainer.export import motion, tokens
from trainer.export.apply_bundle import add_to
from trainer.export.bundle import Bundle, DoRADelta, LowRankDelta
from trainer.export.cannot_carry import CannotCarryError
from trainer.export.factor import factored, folded
from trainer.export.formats import Format
from trainer.export.job import Job
from trainer.export.layer_names import long_name
from trainer.export.motion import carries_motion
from trainer.export.older_readers import for_older_readers
from trainer.export.peft_fields import Fields, check_fields
from trainer.export.read_file import read_file
from trainer.export.refusal import can
from trainer.export.tensor_files import save_tensors
from trainer.export.tokens import write_tokens
from trainer.export.usage import Usage, word_lines

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
Layers = Mapping[str, LowRankDelta | DoRADelta]
MODULES = "diffusion_pytorch_model.safetensors"  # of a `MotionAdapter`


def refuse(job: Job) -> None:
    layers = factored(job.bundle, "diffusers")
    if motion.is_per_frame(job.adapted):
        raise CannotCarryError(
            "format=diffusers cannot carry motion modules that normalise each frame by itself "
            "(methods.animatediff.norm=frame): diffusers normalises the frames of a clip together; "
            "format=animatediff is for readers that do as these modules"
        )
    _refuse_unloadable(job, layers)
    config(layers)


def write(job: Job, folder: Path, dtype: torch.dtype) -> None:
    refuse(job)
    layers = factored(job.bundle, "diffusers")
    layers = {**layers, **_recognised(layers, job.base)}
    if job.inserts:
        motion.adapter(job.adapted, dtype).save_pretrained(folder, safe_serialization=True)
    tensors: dict[str, Tensor] = {}
    for path, delta in layers.items():
        key = long_name(path)
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = folded(delta)
        if isinstance(delta, DoRADelta):
            tensors[f"{key}.{magnitude_of(path)}"] = delta.magnitude
    if tensors:
        metadata = {METADATA: json.dumps(config(layers), indent=2, sort_keys=True)}
        save_tensors(tensors, folder / FILE, dtype=dtype, metadata=metadata)
    if job.bundle.known:
        _save_text_encoders(job, folder, dtype)
    write_tokens(job.bundle, folder, dtype)


def _recognised(layers: Layers, base: Any) -> Layers:
    """A change of zero on one output projection of a CLIP of which only feed-forward layers are
    adapted: diffusers recognises the spelling of a text encoder by its attention alone."""
    found: dict[str, LowRankDelta | DoRADelta] = {}
    for part, encoder in base.text_encoders.items():
        own = [path for path in layers if path.startswith(f"{part}.")]
        if not own or any("attn" in path for path in own):
            continue
        last = layers[own[0]]
        for name, layer in encoder.named_modules():
            if name.endswith("self_attn.out_proj"):
                down = torch.zeros(last.rank, layer.in_features)
                up = torch.zeros(layer.out_features, last.rank)
                dora = isinstance(last, DoRADelta)
                found[f"{part}.{name}"] = (
                    DoRADelta(down, up, layer.weight.norm(dim=1))
                    if dora
                    else LowRankDelta(down, up)
                )
                break
    return found


def _save_text_encoders(job: Job, folder: Path, dtype: torch.dtype) -> None:
    """The base's text encoders with the trained rows of known words, each in a folder."""
    known = job.bundle.known
    encoders = add_to(job.make_base(), Bundle({}, {}, known=known)).text_encoders
    for part in dict.fromkeys(part for rows in known.values() for part in rows):
        encoders[part].to(dtype).save_pretrained(folder / part, safe_serialization=True)
        for_older_readers(folder / part, encoders[part])


def magnitude_of(path: str) -> str:
    """The end of the magnitude's name in the file. transformers 5 needs `.weight` after it, and
    without it silently leaves the magnitudes as they are; peft reads both and writes it without."""
    name = "lora_magnitude_vector"
    return f"{name}.weight" if path.startswith("text_encoder") else name


def config(layers: Mapping[str, LowRankDelta | DoRADelta]) -> dict[str, Any]:
    """As few fields of a peft `LoraConfig` as possible for each part, under `<part>.<field>`."""
    fields: dict[str, Any] = {}
    for part in dict.fromkeys(path.partition(".")[0] for path in layers):
        own = {p.partition(".")[2]: d for p, d in layers.items() if p.partition(".")[0] == part}
        fields |= {f"{part}.{key}": value for key, value in part_config(part, own).items()}
    return fields


def part_config(part: str, layers: Mapping[str, LowRankDelta | DoRADelta]) -> dict[str, Any]:
    """The fields for one part, whose layers are given by their names in it.

    peft tries every pattern of ranks on every layer. A denoiser's pattern is therefore tied to the
    start of the name; a text encoder's is not, since older versions of transformers have one more
    level there.

    Raises:
        CannotCarryError: some of the layers are LoRA and others DoRA.
    """
    rank = Counter(delta.rank for delta in layers.values()).most_common(1)[0][0]
    start = "" if part.startswith("text_encoder") else "^"
    ranks = {f"{start}{re.escape(n)}": d.rank for n, d in layers.items() if d.rank != rank}
    fields: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": sorted(layers)}
    if ranks:
        fields |= {"rank_pattern": ranks, "alpha_pattern": ranks}
    dora = [isinstance(delta, DoRADelta) for delta in layers.values()]
    if any(dora) and not all(dora):
        raise CannotCarryError(
            f"LoRA and DoRA on different layers of {part} cannot be in one peft file, which is one "
            "or the other"
        )
    return fields | ({"use_dora": True} if any(dora) else {})


def _refuse_unloadable(job: Job, layers: Mapping[str, object]) -> None:
    stock = type(job.base.pipeline())
    takes = getattr(stock, "_lora_loadable_modules", ())
    for part in dict.fromkeys(path.partition(".")[0] for path in layers):
        if part not in takes or not hasattr(stock, "load_lora_weights"):
            raise CannotCarryError(
                f"format=diffusers cannot carry a LoRA of the {part}: diffusers' {stock.__name__} "
                "loads none there"
            )
    for path in layers:
        if ".motion_modules." in path and path.rpartition(".")[2] in motion.NAMED:
            raise CannotCarryError(
                f"format=diffusers cannot carry a LoRA of {path}: diffusers passes this layer its "
                "input by a keyword that peft's layer does not have"
            )


def _load_text_encoders(folder: Path, base: Any) -> None:
    for part, encoder in base.text_encoders.items():
        if (folder / part).is_dir():
            loaded = type(encoder).from_pretrained(folder / part, dtype=torch.float32)
            setattr(base, part, loaded.eval().requires_grad_(False))


def _load_lora_weights(folder: Path, base: Any) -> Any:
    if _has_motion(folder, base):
        return None
    _load_text_encoders(folder, base)
    tokens.load_stock(folder, base)
    if (folder / FILE).is_file():
        base.pipeline().load_lora_weights(folder, weight_name=FILE)
    return base


def _has_motion(folder: Path, base: Any) -> bool:
    """Whether the files or the base have motion modules, which need another pipeline."""
    return (folder / MODULES).is_file() or bool(motion.modules(base))


def _load_animatediff(folder: Path, base: Any) -> Any:
    """The video pipeline with the folder's motion modules, or with those of the base; None where
    there are none."""
    if not _has_motion(folder, base):
        return None
    _load_text_encoders(folder, base)
    tokens.load_stock(folder, base)
    trained = (folder / MODULES).is_file()
    modules = MotionAdapter.from_pretrained(folder) if trained else motion.adapter(base)
    model = motion.AnimateDiffModel(base, modules)
    if (folder / FILE).is_file():
        model.pipeline.load_lora_weights(folder, weight_name=FILE)
    return model


def read(path: Path, base: Any) -> Bundle:
    """Reads a file, or a folder with `FILE` and `embeddings/`, in diffusers' current spelling or a
    former one."""
    file = path / FILE if path.is_dir() else path
    found = read_file(file if file.is_file() or not path.is_dir() else None, path, base, own=fields)
    notes: tuple[str, ...] = ()
    if path.is_dir() and (path / MODULES).is_file():
        notes += (f"its motion modules are read by methods.animatediff.weights={path}",)
    for part in base.text_encoders if path.is_dir() else ():
        if (path / part).is_dir():
            notes += (f"{part}/, with the trained embeddings of known words, is not read",)
    return replace(found, notes=found.notes + notes)


def fields(metadata: Mapping[str, str]) -> Callable[[str], Fields]:
    """The peft configuration of a layer's part by the layer's name, from a file's header; `{}` if
    there is none."""
    known = json.loads(metadata[METADATA]) if METADATA in metadata else {}
    parts: dict[str, dict[str, Any]] = {}
    for key, value in known.items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = value
    for own in parts.values():
        check_fields(own)
    return lambda name: parts.get(name.partition(".")[0], {})


def usage(job: Job, folder: Path) -> Usage:
    stock = job.base.pipeline()
    lines, imports = word_lines(folder, stock)
    before, arguments = [], []
    for part, encoder in job.base.text_encoders.items():
        if (folder / part).is_dir():
            kind = type(encoder).__name__
            imports.append(f"from transformers import {kind}")
            before.append(f'{part} = {kind}.from_pretrained(f"{{folder}}/{part}").to(dtype)')
            arguments.append(f"{part}={part}")
    pipeline = type(stock).__name__
    if _has_motion(folder, job.base):
        pipeline = "AnimateDiffPipeline"
        imports.append("from diffusers import MotionAdapter")
        trained = (folder / MODULES).is_file()
        if not trained:
            before.append('modules = "path/to/modules"  # the motion modules, see above')
        place = "folder" if trained else "modules"
        before.append(f"adapter = MotionAdapter.from_pretrained({place}).to(dtype)")
        arguments.append("motion_adapter=adapter")
    if (folder / FILE).is_file():
        lines.append(f"pipe.load_lora_weights(folder, weight_name={FILE!r})")
    return Usage(
        warning=_half_read(job) if (folder / FILE).is_file() else None,
        call=tuple(lines), imports=tuple(imports), before=tuple(before),
        arguments=tuple(arguments), pipeline=pipeline,
    )  # fmt: skip


def _half_read(job: Job) -> str | None:
    """What becomes of such a file in UIs; None for networks that they do not have."""
    if job.base.denoiser_name != "unet":
        return None
    able = [
        f"format={name}" for name in ("comfyui", "kohya", "diff", "animatediff") if can(job, name)
    ]
    instead = f"; for UIs export with {' or '.join(able)}" if able else ""
    return (
        "this format is for diffusers: ComfyUI and Forge load such a file by half, without the "
        f"layers of attention, and say nothing{instead}"
    )


FORMAT = Format(
    write,
    readers={"load_lora_weights": _load_lora_weights, "AnimateDiffPipeline": _load_animatediff},
    usage=usage,
    read=read,
    refuse=refuse,
    one_file=True,
    carries=carries_motion,
    carries_known_words=True,
)
