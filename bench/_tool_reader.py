"""Reads exports with one tool's own loader, for `readers.py`, which starts it in a process of its
own: it needs torch, safetensors and the tool, and nothing of this project.

Each reader takes a case and returns the keys it took, those of the file, and the tool's weights by
diffusers' names, `unet.` or `transformer.` and `text_encoder.` before them.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Weights = dict[str, torch.Tensor]
Case = Mapping[str, Any]
Result = tuple[int | None, int | None, Weights]
# Stable Diffusion 1.5 as ComfyUI and Forge describe it
SD15 = {
    "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
}  # fmt: skip


def main() -> None:
    tool, checkout = sys.argv[1], Path(sys.argv[2])
    cases = json.load(sys.stdin)
    reader = READERS[tool](checkout)
    for case in cases:
        print("READER " + json.dumps(_answer(reader, case)), flush=True)


@torch.no_grad()
def _answer(reader: Callable[[Case], Result], case: Case) -> dict[str, Any]:
    try:
        taken, total, found = reader(case)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:120]}"}
    wanted = load_file(case["wanted"])
    lost = [key for key in wanted if key not in found]
    if lost:
        return {"error": f"{len(lost)} weights are not in the tool's model, as {lost[0]}"}
    most = max(float((found[key].float() - wanted[key]).abs().max()) for key in wanted)
    return {"difference": most} | ({"taken": taken, "total": total} if total is not None else {})


def base_weights(case: Case) -> Weights:
    """The plain weights by diffusers' names, without the level `text_model`."""
    parts = {case["kind"]: "diffusion_pytorch_model", "text_encoder": "model"}
    return {
        f"{part}.{key.removeprefix('text_model.')}": value
        for part, stem in parts.items()
        for key, value in load_file(Path(case["base"]) / part / f"{stem}.safetensors").items()
    }


def file_of(case: Case) -> Path:
    (found,) = Path(case["folder"]).glob("*.safetensors")
    return found


def diffusers_reader(_: Path) -> Callable[[Case], Result]:
    from diffusers import DiffusionPipeline

    def read(case: Case) -> Result:
        if case["format"] == "merged":
            pipe = DiffusionPipeline.from_pretrained(case["folder"])
        else:
            pipe = DiffusionPipeline.from_pretrained(case["base"])
            pipe.load_lora_weights(case["folder"], weight_name=file_of(case).name)
            pipe.fuse_lora(components=["unet", "text_encoder"])
            pipe.unload_lora_weights()
        return None, None, _named(pipe, case["kind"])

    return read


def peft_reader(_: Path) -> Callable[[Case], Result]:
    from diffusers import DiffusionPipeline
    from peft import PeftModel

    def read(case: Case) -> Result:
        pipe = DiffusionPipeline.from_pretrained(case["base"])
        for path in Path(case["folder"]).glob("*/adapter_config.json"):
            part = path.parent.name
            adapted = PeftModel.from_pretrained(getattr(pipe, part), path.parent)
            setattr(pipe, part, adapted.merge_and_unload())
        return None, None, _named(pipe, case["kind"])

    return read


def _named(pipe: Any, kind: str) -> Weights:
    return {
        f"{part}.{key.removeprefix('text_model.')}": value
        for part in (kind, "text_encoder")
        for key, value in getattr(pipe, part).state_dict().items()
    }


class Holder:
    """What ComfyUI and Forge ask a model for: its state dict, and its configuration, which each
    looks for in a place of its own."""

    def __init__(self, tensors: Weights, config: dict[str, Any] | None = None) -> None:
        self.tensors = tensors
        self.model_config = type("Config", (), {"unet_config": config or {}})()
        self.diffusion_model = type("Network", (), {"config": config or {}})()
        self.config = type("Guess", (), {"huggingface_repo": "stable-diffusion-v1-5"})()

    def state_dict(self) -> Weights:
        return self.tensors


def comfyui_reader(checkout: Path) -> Callable[[Case], Result]:
    sys.path.insert(0, str(checkout))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.lora
    import comfy.lora_convert
    import comfy.model_base
    import comfy.utils

    class PixArt(comfy.model_base.PixArt):  # type: ignore[misc, name-defined]
        __init__, state_dict = Holder.__init__, Holder.state_dict

    def read(case: Case) -> Result:
        base = base_weights(case)
        names = _comfy_names(comfy.utils, case["kind"], base)
        tensors = _fused(names, base)
        transformer = {"depth": 2, "hidden_size": 32}
        kind = Holder if case["kind"] == "unet" else PixArt
        model = kind(tensors, SD15 if kind is Holder else transformer)
        if kind is not Holder:
            model.__dict__.setdefault("_modules", {})
        keys = comfy.lora.model_lora_keys_unet(model, {})
        keys = comfy.lora.model_lora_keys_clip(Holder(tensors), keys)
        file = comfy.lora_convert.convert_lora(load_file(file_of(case)))
        return _patched(comfy.lora, keys, file, names=names, tensors=tensors)

    return read


def _patched(
    lora: Any, keys: Any, file: Weights, *, names: dict[str, Any], tensors: Weights
) -> Result:
    """Applies a file as `ModelPatcher` does: what the loader makes of it, on each weight."""
    missed = Missed()
    logging.getLogger().addHandler(missed)
    patches = lora.load_lora(file, keys)
    logging.getLogger().removeHandler(missed)
    for key, patch in patches.items():
        name, offset = (key, None) if isinstance(key, str) else (key[0], key[1])
        function = None if isinstance(key, str) or len(key) < 3 else key[2]
        applied = [(1.0, patch, 1.0, offset, function)]
        tensors[name] = lora.calculate_weight(applied, tensors[name].clone(), name)
    taken = len(file) - missed.count
    return taken, len(file), {own: _slice(tensors, place) for own, place in names.items()}


class Missed(logging.Handler):
    """Counts the keys that a loader reports as not loaded."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "lora key not loaded" in record.getMessage()


def _comfy_names(utils: Any, kind: str, base: Weights) -> dict[str, Any]:
    """ComfyUI's place of each weight, by its own tables: a key, or a key and a slice of it."""
    if kind == "unet":
        table = utils.unet_to_diffusers(SD15)
        places = {f"unet.{own}": f"diffusion_model.{key}" for own, key in table.items()}
    else:
        config = {"depth": 2, "hidden_size": 32}
        table = utils.pixart_to_diffusers(config, output_prefix="diffusion_model.")
        places = {f"transformer.{own}": key for own, key in table.items()}
    places |= {
        key: f"clip_l.transformer.text_model.{key.removeprefix('text_encoder.')}"
        for key in base
        if key.startswith("text_encoder.")
    }
    return {key: places.get(key, key) for key in base}


def _fused(names: Mapping[str, Any], base: Weights) -> Weights:
    """The plain weights under a tool's names; slices of one weight are put side by side."""
    found: Weights = {}
    for own, place in names.items():
        if isinstance(place, str):
            found[place] = base[own].clone()
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for own, place in names.items():
        if not isinstance(place, str):
            parts.setdefault(place[0], []).append((place[1][1], base[own]))
    for key, slices in parts.items():
        found[key] = torch.cat([value for _, value in sorted(slices, key=lambda item: item[0])])
    return found


def _slice(tensors: Weights, place: Any) -> torch.Tensor:
    return tensors[place] if isinstance(place, str) else tensors[place[0]].narrow(*place[1])


class TextModel(torch.nn.Module):
    """A CLIP of transformers 5 with the level of names that tools for earlier ones know."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.text_model = encoder


def with_text_model(encoder: Any) -> Any:
    return encoder if hasattr(encoder, "text_model") else TextModel(encoder)


def sd_scripts_reader(checkout: Path) -> Callable[[Case], Result]:
    sys.path.insert(0, str(checkout))
    from diffusers import StableDiffusionPipeline
    from networks import lora

    def read(case: Case) -> Result:
        pipe = StableDiffusionPipeline.from_pretrained(case["base"])
        encoder = with_text_model(pipe.text_encoder)
        network, tensors = lora.create_network_from_weights(
            1.0, str(file_of(case)), None, encoder, pipe.unet, for_inference=True
        )
        network.merge_to(encoder, pipe.unet, tensors, torch.float32, "cpu")
        own = [each.lora_name for each in (*network.text_encoder_loras, *network.unet_loras)]
        taken = sum(key.split(".")[0] in own for key in tensors)
        return taken, len(tensors), _named(pipe, case["kind"])

    return read


def forge_reader(checkout: Path) -> Callable[[Case], Result]:
    if not torch.cuda.is_available():
        sys.argv = [sys.argv[0], "--always-cpu"]  # it reads the command line when it is imported
    sys.path[:0] = [str(checkout), str(checkout / "packages_3rdparty")]
    from backend.patcher import lora
    from packages_3rdparty.comfyui_lora_collection import utils

    def read(case: Case) -> Result:
        base = base_weights(case)
        names = _comfy_names(utils, "unet", base)
        tensors = _fused(names, base)
        keys = lora.model_lora_keys_unet(Holder(tensors, SD15), {})
        keys = lora.model_lora_keys_clip(Holder(tensors), keys)
        return _patched(_Forge(lora), keys, load_file(file_of(case)), names=names, tensors=tensors)

    return read


class _Forge:
    """Forge's loader, which returns the patches and the keys it left, and calls the rest otherwise
    than ComfyUI."""

    def __init__(self, lora: Any) -> None:
        self.lora = lora

    def load_lora(self, file: Weights, keys: Any) -> Any:
        patches, left = self.lora.load_lora(file, keys)
        for key in left:
            logging.getLogger().warning("lora key not loaded: %s", key)
        return patches

    def calculate_weight(self, applied: Any, weight: torch.Tensor, key: str) -> torch.Tensor:
        found: torch.Tensor = self.lora.merge_lora_to_weight(applied, weight, key=key)
        return found


def invokeai_reader(checkout: Path) -> Callable[[Case], Result]:
    sys.path.insert(0, str(checkout))
    from diffusers import StableDiffusionPipeline
    from invokeai.backend.patches.layer_patcher import LayerPatcher
    from invokeai.backend.patches.lora_conversions.sd_lora_conversion_utils import (
        lora_model_from_sd_state_dict,
    )

    def read(case: Case) -> Result:
        pipe = StableDiffusionPipeline.from_pretrained(case["base"])
        patch = lora_model_from_sd_state_dict(load_file(file_of(case)))
        parts = {"lora_unet_": pipe.unet, "lora_te_": with_text_model(pipe.text_encoder)}
        with ExitStack() as patched:
            for prefix, part in parts.items():
                smart = LayerPatcher.apply_smart_model_patches(
                    part, [(patch, 1.0)], prefix, torch.float32, force_direct_patching=True
                )
                patched.enter_context(smart)
            own = _named(pipe, case["kind"])
            return None, None, {key: value.clone() for key, value in own.items()}

    return read


def animatediff_evolved_reader(checkout: Path) -> Callable[[Case], Result]:
    """Motion modules by its own loader, and a LoRA of the image model by ComfyUI's, which it is
    installed in: DIR is the one in ComfyUI/custom_nodes. Its modules have Stable Diffusion's
    widths; here each is made with the width of the narrow model."""
    image = comfyui_reader(checkout.resolve().parents[1])
    sys.path.insert(0, str(checkout))
    from animatediff import model_injection, motion_module_ad

    whole, widths = motion_module_ad.MotionModule, {320: 32, 640: 64, 1280: 64}
    motion_module_ad.MotionModule = lambda channels, *args, **options: whole(
        widths[channels], *args, **options
    )

    def read(case: Case) -> Result:
        if case["format"] != "animatediff":
            return image(case)
        file = file_of(case)
        model_injection.get_motion_model_path = lambda name: str(file)
        found = model_injection.load_motion_module_gen2(file.name).model.state_dict()
        names = load_file(file).keys()
        taken = sum(name in found for name in names)
        return taken, len(names), {f"motion.{name}": value for name, value in found.items()}

    return read


READERS: dict[str, Callable[[Path], Callable[[Case], Result]]] = {
    "diffusers": diffusers_reader,
    "peft": peft_reader,
    "comfyui": comfyui_reader,
    "sd-scripts": sd_scripts_reader,
    "forge": forge_reader,
    "invokeai": invokeai_reader,
    "animatediff-evolved": animatediff_evolved_reader,
}

if __name__ == "__main__":
    main()
