"""`kohya`: LoRA as sd-scripts or musubi-tuner writes it, with `.alpha` and a header; most UIs read
it. Where these keep several of our layers as one, it has the matrices of all side by side."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from trainer.common.left_by_systems import own_files
from trainer.common.paths import bare_name
from trainer.export import tokens
from trainer.export.apply_bundle import add_to
from trainer.export.bundle import Bundle, DoRADelta, Form, LowRankDelta
from trainer.export.cannot_carry import CannotCarryError
from trainer.export.card import SPEC
from trainer.export.factor import factored
from trainer.export.formats import Format
from trainer.export.job import Job
from trainer.export.layer_names import kohya as keys_of
from trainer.export.layer_names import kohya_fused, tool_names
from trainer.export.lycoris import file_tensors
from trainer.export.read_file import read_file
from trainer.export.side_by_side import by_key
from trainer.export.tensor_files import save_tensors
from trainer.export.tokens import refuse_unnamable, token_remark, write_tokens
from trainer.export.usage import Usage, stock_usage, word_lines, word_text

GROWTH = 4  # the factor by which a file may grow for one rank
# by the width of the U-Net's text features: sd-scripts' name, ModelSpec's architecture, resolution
VERSIONS = {
    768: ("sd_v1", "stable-diffusion-v1", "512x512"),
    1024: ("sd_v2", "stable-diffusion-v2-512", "512x512"),
    2048: ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", "1024x1024"),
}


def refuse(job: Job) -> None:
    keys, layers = keys_of(job.base), _low_rank(job)
    fused = {path for paths in kohya_fused(job.base).values() for path in paths}
    for path in (*layers, *job.bundle.forms):
        if path not in keys.keys() | fused:
            raise CannotCarryError(f"format=kohya cannot carry {path}: {_why_not(job)}")
    if mixed := [path for path in job.bundle.forms if path in fused]:
        raise CannotCarryError(
            f"format=kohya cannot carry {job.bundle.forms[mixed[0]].type} of {mixed[0]}: "
            "sd-scripts and musubi-tuner keep it and others as one layer, which is no such product"
        )
    if any(isinstance(delta, DoRADelta) for delta in layers.values()):
        raise CannotCarryError(
            "format=kohya cannot carry DoRA: readers of dora_scale compute the norm along "
            "different axes, and diffusers ignores it"
        )
    refuse_unnamable(job.bundle)


def _why_not(job: Job) -> str:
    if job.base.denoiser_name == "unet":
        return (
            "sd-scripts adapts only layers inside the attention, residual and resampling blocks of "
            "U-Nets and inside CLIP, and would skip it"
        )
    kind = type(job.base.denoiser).__name__
    scripts = tool_names(job.base.denoiser).scripts
    if scripts is None:
        return f"neither sd-scripts nor musubi-tuner trains a {kind}"
    return f"of a {kind}, {scripts.trainer} adapts layers inside its blocks only"


def _low_rank(job: Job) -> Mapping[str, LowRankDelta | DoRADelta]:
    """The layers that are written as low-rank pairs: all but LoHa and LoKr."""
    forms = job.bundle.forms
    others = {path: d for path, d in job.bundle.layers.items() if path not in forms}
    return factored(replace(job.bundle, layers=others), "kohya")


def write(job: Job, folder: Path, dtype: torch.dtype) -> None:
    refuse(job)
    keys = keys_of(job.base)
    layers: Mapping[str, LowRankDelta | DoRADelta] = by_key(_low_rank(job), keys, job.base)
    if job.base.denoiser_name == "unet":
        layers = of_one_rank(layers)
    alpha = common_alpha(layers.values())
    tensors: dict[str, Tensor] = {}
    for path, form in job.bundle.forms.items():
        tensors |= file_tensors(keys[path], form)
    for key, delta in layers.items():
        tensors |= pair(key, delta, alpha)
    if tensors:
        tensors |= _with_out_proj(tensors)
        rounded = {k: v.to(dtype if v.ndim else torch.float32) for k, v in tensors.items()}
        metadata = _header(job, layers, alpha) | _of_lycoris(job.bundle.forms) | _hashes(rounded)
        file = folder / f"{job.title}.safetensors"
        save_tensors(rounded, file, dtype=dtype, metadata=metadata)
    write_tokens(job.bundle, folder, dtype, known=True)


def of_one_rank(
    layers: Mapping[str, LowRankDelta | DoRADelta],
) -> Mapping[str, LowRankDelta | DoRADelta]:
    """The same deltas with the largest rank of all, by rows of zeros in `down` and columns of zeros
    in `up`: older versions of diffusers take one rank and one alpha for a whole file. Left as they
    are where that would make the file more than `GROWTH` times as large."""
    if len({delta.rank for delta in layers.values()}) <= 1:
        return layers
    rank = max(delta.rank for delta in layers.values())
    sizes = {path: delta.down.numel() + delta.up.numel() for path, delta in layers.items()}
    after = sum(sizes[path] // delta.rank * rank for path, delta in layers.items())
    if after > GROWTH * sum(sizes.values()):
        return layers
    return {path: _widened(delta, rank) for path, delta in layers.items()}


def _widened(delta: LowRankDelta | DoRADelta, rank: int) -> LowRankDelta | DoRADelta:
    more = rank - delta.rank
    down = torch.cat([delta.down, delta.down.new_zeros(more, *delta.down.shape[1:])])
    columns = delta.up.new_zeros(len(delta.up), more, *delta.up.shape[2:])
    return replace(delta, down=down, up=torch.cat([delta.up, columns], dim=1))


def common_alpha(deltas: Iterable[LowRankDelta | DoRADelta]) -> float:
    """The alpha that most layers have. All layers are written with it, since diffusers applies one
    alpha of a file to all of them."""
    alphas = Counter(delta.scale * delta.rank for delta in deltas)
    return alphas.most_common(1)[0][0] if alphas else 1.0


def pair(key: str, delta: LowRankDelta | DoRADelta, alpha: float) -> dict[str, Tensor]:
    """A layer's three tensors; where its own alpha differs, `up` is scaled so that dW stays."""
    own = delta.scale * delta.rank
    return {
        f"{key}.lora_down.weight": delta.down,
        f"{key}.lora_up.weight": delta.up if own == alpha else delta.up * (own / alpha),
        f"{key}.alpha": torch.tensor(alpha),
    }


def _with_out_proj(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A pair of zeros for one output projection of each text encoder that has none in the file.
    Without one, diffusers does not recognise the spelling of the other layers and raises."""
    found: dict[str, Tensor] = {}
    for prefix in ("lora_te_", "lora_te1_", "lora_te2_"):
        ups = [key for key in tensors if key.endswith(".lora_up.weight") and "_self_attn_" in key]
        layers = [key.partition(".")[0] for key in ups if key.startswith(prefix)]
        own = [key for key in tensors if key.partition(".")[0] in layers]
        if own and not any("_out_proj." in key for key in own):
            layer, _, _ = own[0].partition("_self_attn_")
            for key in own[:3]:  # one layer's three tensors
                other = f"{layer}_self_attn_out_proj.{key.partition('.')[2]}"
                found[other] = tensors[key] * (1 if key.endswith("alpha") else 0)
    return found


def _header(
    job: Job, layers: Mapping[str, LowRankDelta | DoRADelta], alpha: float
) -> dict[str, str]:
    width: Any = getattr(job.base.denoiser.config, "cross_attention_dim", None)
    scripts, module = tool_names(job.base.denoiser).scripts, "networks.lora"
    default = (bare_name(str(job.base.name)), "stable-diffusion-v1", "512x512")
    version, architecture, resolution = VERSIONS.get(width, default)
    if scripts is not None:
        version, architecture = scripts.model(job.base.denoiser.config)
        module, resolution = scripts.module, "1024x1024"
    if (version, job.base.target) == ("sd_v2", "v"):
        version, architecture, resolution = (
            "sd_v2_768_v", "stable-diffusion-v2-768-v", "768x768",
        )  # fmt: skip
    if job.card.size:
        resolution = f"{job.card.size[0]}x{job.card.size[1]}"
    ranks = {delta.rank for delta in layers.values()}
    return {
        "ss_v2": str(version.startswith("sd_v2")),
        "ss_base_model_version": version,
        "ss_network_module": module,
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alpha:g}",
        "ss_network_args": "{}",
        "ss_resolution": f"({resolution.replace('x', ', ')})",
        "modelspec.sai_model_spec": SPEC,
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": job.title,
        "modelspec.resolution": resolution,
    } | _prediction(job)


def _prediction(job: Job) -> dict[str, str]:
    """ModelSpec has no word for a flow."""
    words = {"v": "v", "eps": "epsilon"}
    word = words.get(job.base.target)
    return {"modelspec.prediction_type": word} if word else {}


def _of_lycoris(forms: Mapping[str, Form]) -> dict[str, str]:
    """What the header of a file of LoHa or LoKr says instead: whose they are."""
    kinds = sorted({form.type for form in forms.values()})
    own = {"ss_network_module": "lycoris.kohya"}
    return own | {"ss_network_args": json.dumps({"algo": kinds[0]})} if kinds else {}


def _hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The hashes by which UIs identify a network: SHA-256 of everything after the header, and the
    older hash of the 64 KiB after the first MiB."""
    data = to_bytes({key: value.contiguous() for key, value in tensors.items()})
    start = 8 + int.from_bytes(data[:8], "little")
    legacy = hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    return {
        "sshs_model_hash": hashlib.sha256(data[start:]).hexdigest(),
        "sshs_legacy_hash": legacy,
    }


def file_in(folder: Path) -> Path | None:
    """The one file of weights in an export's folder; None where only words were trained.

    Raises:
        ValueError: there are several.
    """
    found = own_files(folder, ".safetensors")
    if len(found) > 1:
        raise ValueError(
            f"file={folder} holds {', '.join(path.name for path in found)}; give one of them"
        )
    return found[0] if found else None


def _load_lora_weights(folder: Path, base: Any) -> Any:
    """Loads the files with diffusers; None where its pipeline has no loader of such files, or where
    these hold LoHa or LoKr, or words that its tokenizer already has."""
    pipeline = base.pipeline()
    if not _is_stock(read(folder, base), base):
        return None
    tokens.load_stock(folder, base)
    file = file_in(folder)
    if file is not None:
        pipeline.load_lora_weights(folder, weight_name=file.name)
    return base


def _is_stock(bundle: Bundle, base: Any) -> bool:
    """Whether diffusers reads these files: of text encoders, and for some transformers, it knows
    other names only, or other sizes."""
    scripts = tool_names(base.denoiser).scripts
    takes: Any = getattr(base.pipeline(), "_lora_loadable_modules", ())
    parts = {path.partition(".")[0] for path in bundle.layers}
    known = base.denoiser_name == "unet" or (
        scripts is not None and scripts.stock(base.denoiser.config)
    )
    loads = hasattr(base.pipeline(), "load_lora_weights")
    return loads and known and parts <= set(takes) and not (bundle.known or bundle.forms)


def by_rules(folder: Path, base: Any) -> Any:
    """Adds the files to the base by the key rules alone, without another tool's code."""
    return add_to(base, read(folder, base))


def read(path: Path, base: Any) -> Bundle:
    """Reads a file under diffusers' block names or latent diffusion's, or a folder with such a file
    and `embeddings/`."""
    return read_file(file_in(path) if path.is_dir() else path, path, base)


def usage(job: Job, folder: Path) -> Usage:
    file, stock = file_in(folder), job.base.pipeline()
    text = word_text(job.card, folder)
    if file is not None:
        text = (_place(job, file.name), *text)
    if not _is_stock(job.bundle, job.base):
        return Usage(text=text)
    lines, imports = word_lines(folder, stock)
    if file is not None:
        lines.append(f"pipe.load_lora_weights(folder, weight_name={file.name!r})")
    return stock_usage(job, text=text, call=tuple(lines), imports=tuple(imports))


def _place(job: Job, file: str) -> str:
    scripts = tool_names(job.base.denoiser).scripts
    if scripts is not None and scripts.trainer != "sd-scripts":
        return (
            f"`{file}` is as {scripts.trainer} writes it; for ComfyUI export with format=comfyui."
        )
    return (
        f"Copy `{file}` to the UI's LoRA: `models/Lora` in UIs of the A1111 family, "
        "`models/loras` in ComfyUI."
    )


FORMAT = Format(
    write,
    readers={"sd-scripts' key rules": by_rules, "load_lora_weights": _load_lora_weights},
    usage=usage,
    read=read,
    refuse=refuse,
    one_file=True,
    carries_known_words=True,
    remark=token_remark,
)
