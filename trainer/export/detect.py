"""Recognises the format of a file or folder."""

from __future__ import annotations

from pathlib import Path

from trainer.common import pickles
from trainer.common.adapter_header import HEADER
from trainer.common.left_by_systems import own_files
from trainer.export import tokens
from trainer.export.formats.diffusers import FILE
from trainer.export.other_files import refuse_others
from trainer.export.read_tokens import is_embedding
from trainer.export.tensor_files import load_tensors

READ = (
    "these are read: LoRA, DoRA, LoHa and LoKr of diffusers, peft, sd-scripts, LyCORIS, OneTrainer "
    "and ComfyUI, Custom Diffusion of diffusers, and embeddings"
)
COMFYUI = ("diffusion_model.", "model.diffusion_model.", "text_encoders.")


def detect(path: Path) -> str:
    """The format of a file or folder, from the names of its files and tensors.

    Raises:
        ValueError: it is a complete pipeline, an adapter of this toolkit, or of no known format.
    """
    if path.is_dir():
        return _detect_folder(path)
    if (path.parent / "adapter_config.json").is_file() and path.suffix not in pickles.SUFFIXES:
        return "peft"
    loaded, metadata = load_tensors(path)
    keys = list(loaded)
    if HEADER in metadata:
        raise ValueError(
            f"file={path} is already an adapter of this toolkit; use it as run.start_from={path}"
        )
    if (added := _of_added_layers(path, keys)) is not None:
        return added
    if is_embedding(loaded):
        return "embedding"
    refuse_others(path, keys)
    if any("_custom_diffusion." in key for key in keys):
        return "custom_diffusion"
    if any(key.endswith((".diff", ".diff_b")) for key in keys):
        return "diff"
    if any(key.startswith(("lora_unet_", "lora_te", "lycoris_")) for key in keys):
        return "kohya"
    if any(key.startswith(COMFYUI) for key in keys):
        return "comfyui"
    if any(mark in key for key in keys for mark in (".hada_", ".lokr_")):
        return "kohya"
    if any("lora" in key for key in keys):
        return "diffusers"
    first = keys[0] if keys else "(none)"
    raise ValueError(f"file={path}: its keys, like {first}, are of no known format; {READ}")


def _of_added_layers(path: Path, keys: list[str]) -> str | None:
    """The format of a file of layers that a backbone does not have; None for one of changes.

    Raises:
        ValueError: it changes such layers.
    """
    if any("motion_modules." in key and "lora" in key for key in keys):
        raise ValueError(
            f"file={path} is a MotionLoRA, which changes motion modules, and a backbone has none; "
            "only complete modules are read, by methods.animatediff.weights=<file or folder>"
        )
    if any("motion_modules." in key for key in keys):
        return "animatediff"
    return "ip_adapter" if any(key.startswith("image_proj.") for key in keys) else None


def _detect_folder(path: Path) -> str:
    if (path / "model_index.json").is_file():
        raise ValueError(
            f"file={path} is a complete pipeline; train on it as it is, with backbone={path}"
        )
    if (path / "adapter_config.json").is_file() or list(path.glob("*/adapter_config.json")):
        return "peft"
    if (path / FILE).is_file():  # motion modules may be in the same folder
        return detect(path / FILE)
    weights = own_files(path, ".safetensors")
    if not weights:
        if tokens.files(path):  # an export of nothing but words
            return "diffusers"
        weights = own_files(path, *pickles.SUFFIXES)
    if len(weights) != 1:
        raise ValueError(f"file={path}: it holds {len(weights)} files of weights; give one of them")
    return detect(weights[0])
