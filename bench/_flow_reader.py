"""Reads adapters of transformers on a flow with one tool's own code, for `flow_readers.py`, which
starts it in a process of its own: it needs torch, safetensors and the tool, and nothing of this
project.

A case has the plain weights and the wanted ones by diffusers' names, the file, and the sizes of the
network. Each reader returns the keys it took, those of the file, and the tool's weights, by names
of its own network; `places` says which of our layers, in the order of its rows, each of these is.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Weights = dict[str, torch.Tensor]
Case = Mapping[str, Any]
Places = dict[str, list[str]]
Result = tuple[int, int, Weights, Places]


def main() -> None:
    tool, checkout = sys.argv[1], Path(sys.argv[2])
    cases = json.load(sys.stdin)
    reader = READERS[tool](checkout)
    for case in cases:
        print("READER " + json.dumps(_answer(reader, case)), flush=True)


@torch.no_grad()
def _answer(reader: Callable[[Case], Result], case: Case) -> dict[str, Any]:
    try:
        taken, total, found, places = reader(case)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:160]}"}
    wanted = load_file(case["wanted"])
    lost = set(case["layers"]) - {layer for layers in places.values() for layer in layers}
    if lost:
        return {"error": f"{len(lost)} layers are not in the tool's network, as {sorted(lost)[0]}"}
    most = max(
        float((found[key].float() - fused(wanted, layers)).abs().max())
        for key, layers in places.items()
    )
    return {"difference": most, "taken": taken, "total": total}


def fused(weights: Weights, layers: list[str]) -> torch.Tensor:
    return torch.cat([weights[f"{layer}.weight"] for layer in layers])


class Missed(logging.Handler):
    """Counts the keys that ComfyUI reports as not loaded: one each, or a list of them."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        several = "lora keys not loaded (" in text
        if several:
            self.count += int(text.partition("not loaded (")[2].partition(" ")[0])
        self.count += "lora key not loaded" in text


def comfyui_reader(checkout: Path) -> Callable[[Case], Result]:
    sys.argv = sys.argv[:1]  # it reads the command line when it is imported
    sys.path.insert(0, str(checkout))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.lora
    import comfy.lora_convert
    import comfy.model_base as kinds
    import comfy.ops
    import comfy.utils

    tables = {
        "sd3": ("mmdit_to_diffusers", kinds.SD3), "flux1": ("flux_to_diffusers", kinds.Flux),
        "chroma": ("flux_to_diffusers", kinds.Chroma),
        "flux2": ("flux_to_diffusers", getattr(kinds, "Flux2", None)),
        "z_image": ("z_image_to_diffusers", kinds.Lumina2),
    }  # fmt: skip
    others = {"qwen_image": kinds.QwenImage, "wan": kinds.WAN21, "ltx": kinds.LTXV}

    def read(case: Case) -> Result:
        base = load_file(case["base"])
        if case["family"] in tables:
            table, kind = tables[case["family"]]
            own = getattr(comfy.utils, table)(case["sizes"], output_prefix="diffusion_model.")
            places = _of_table(own, case["layers"])
        else:
            kind = others[case["family"]]
            names = _comfy_network(case).state_dict().keys()
            places = {f"diffusion_model.{key}": layers for key, layers in case["original"].items()}
            absent = [key for key in places if f"{key[16:]}.weight" not in names]
            assert not absent, f"its network has no {absent[0]}"
        text = {case["clip"][layer]: [layer] for layer in case["layers"] if layer in case["clip"]}
        places = {k: v for k, v in places.items() if set(v) & set(case["layers"])} | text
        tensors = {f"{key}.weight": fused(base, layers) for key, layers in places.items()}
        holder = type("Holder", (kind,), {"__init__": _hold, "state_dict": lambda self: tensors})
        keys = comfy.lora.model_lora_keys_unet(holder(case["sizes"]), {})
        plain = type("Clip", (), {"state_dict": lambda self: tensors})
        keys = comfy.lora.model_lora_keys_clip(plain(), keys)
        file = comfy.lora_convert.convert_lora(load_file(case["file"]))
        missed = Missed()
        logging.getLogger().addHandler(missed)
        patches = comfy.lora.load_lora(file, keys)
        logging.getLogger().removeHandler(missed)
        for key, patch in patches.items():
            name, offset = (key, None) if isinstance(key, str) else (key[0], key[1])
            function = None if isinstance(key, str) or len(key) < 3 else key[2]
            applied = [(1.0, patch, 1.0, offset, function)]
            tensors[name] = comfy.lora.calculate_weight(applied, tensors[name].clone(), name)
        found = {key: tensors[f"{key}.weight"] for key in places}
        return len(file) - missed.count, len(file), found, places

    return read


def _hold(self: Any, sizes: dict[str, Any]) -> None:
    """In the place of a model's constructor: what its loader asks of it."""
    torch.nn.Module.__init__(self)
    self.model_config = type("Config", (), {"unet_config": sizes})()


def _of_table(table: Mapping[str, Any], layers: list[str]) -> Places:
    """The places of layers by ComfyUI's table: our names to its own, and to the rows there."""
    rows: dict[str, list[tuple[int, str]]] = {}
    for layer in layers:
        place = table.get(f"{layer.removeprefix('transformer.')}.weight")
        if place is not None and layer.startswith("transformer."):
            name, offset = (place, None) if isinstance(place, str) else (place[0], place[1])
            start = 0 if offset is None else offset[1]
            rows.setdefault(name.removesuffix(".weight"), []).append((start, layer))
    return {name: [layer for _, layer in sorted(own)] for name, own in rows.items()}


def _comfy_network(case: Case) -> Any:
    """ComfyUI's network of a family whose names it has no table for."""
    import comfy.ops
    from comfy.ldm.lightricks.model import LTXVModel
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
    from comfy.ldm.wan.model import WanModel

    kinds = {"qwen_image": QwenImageTransformer2DModel, "wan": WanModel, "ltx": LTXVModel}
    with torch.device("meta"):
        return kinds[case["family"]](**case["network"], operations=comfy.ops.disable_weight_init)


def sd_scripts_reader(checkout: Path) -> Callable[[Case], Result]:
    sys.path.insert(0, str(checkout))
    from library import flux_models, sd3_models
    from networks import lora_flux, lora_sd3

    def make(case: Case) -> tuple[Any, Any]:
        if case["family"] == "sd3":
            return sd3_models.MMDiT(**case["network"]), lora_sd3
        return flux_models.Flux(flux_models.FluxParams(**case["network"])), lora_flux

    def read(case: Case) -> Result:
        network, code = make(case)
        encoders = [_encoder(path) for path in case["encoders"]]
        places = _filled(network, case)
        lora, tensors = code.create_network_from_weights(
            1.0, case["file"], None, encoders, network, for_inference=True
        )
        lora.merge_to(encoders, network, tensors, torch.float32, "cpu")
        own = [each.lora_name for each in (*lora.text_encoder_loras, *lora.unet_loras)]
        taken = sum(key.split(".")[0] in own for key in tensors)
        found = _weights(network, places)
        for part, encoder in zip(case["parts"], encoders, strict=True):
            changed = [layer for layer in case["layers"] if layer.startswith(f"{part}.")]
            for layer in changed:
                name = layer.removeprefix(f"{part}.").removeprefix("text_model.")
                name = name if _is_t5(encoder) else f"text_model.{name}"
                places[layer] = [layer]
                found[layer] = encoder.get_submodule(name).weight
        return taken, len(tensors), found, places

    return read


def _is_t5(encoder: torch.nn.Module) -> bool:
    return not hasattr(encoder, "text_model")


def _encoder(path: str) -> torch.nn.Module:
    """A text encoder; a CLIP of transformers 5 with the level of names that tools for earlier ones
    know."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

    kinds = (CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel)
    wanted = json.loads((Path(path) / "config.json").read_text())["architectures"][0]
    (kind,) = [each for each in kinds if each.__name__ == wanted]
    encoder = kind.from_pretrained(path)
    if kind is T5EncoderModel or hasattr(encoder, "text_model"):
        return encoder
    outer = torch.nn.Module()
    outer.text_model = encoder
    return outer


def musubi_reader(checkout: Path) -> Callable[[Case], Result]:
    sys.path.insert(0, str(checkout / "src"))
    from importlib import import_module

    def read(case: Case) -> Result:
        place, kind, code = MUSUBI[case["family"]]
        module = import_module(f"musubi_tuner.{place}")
        sizes = case["network"]
        if kind == "Flux2":
            sizes = {"params": module.Flux2Params(**sizes), "attn_mode": "torch"}
        network = getattr(module, kind)(**sizes)
        places = _filled(network, case)
        own = import_module(f"musubi_tuner.networks.{code}")
        tensors = load_file(case["file"])
        lora = own.create_arch_network_from_weights(1.0, tensors, None, network, for_inference=True)
        lora.merge_to(None, network, tensors, torch.float32, "cpu")
        names = [each.lora_name for each in lora.unet_loras]
        taken = sum(key.split(".")[0] in names for key in tensors)
        return taken, len(tensors), _weights(network, places), places

    return read


MUSUBI = {
    "qwen_image": (
        "qwen_image.qwen_image_model",
        "QwenImageTransformer2DModel",
        "lora_qwen_image",
    ),
    "z_image": ("zimage.zimage_model", "ZImageTransformer2DModel", "lora_zimage"),
    "flux2": ("flux_2.flux2_models", "Flux2", "lora_flux_2"),
    "wan": ("wan.modules.model", "WanModel", "lora_wan"),
}


def _filled(network: torch.nn.Module, case: Case) -> Places:
    """Puts the plain weights into a tool's network; which of its layers are which of ours."""
    base = load_file(case["base"])
    places = {
        key: layers for key, layers in case["scripts"].items() if set(layers) & set(case["layers"])
    }
    for key, layers in places.items():
        network.get_submodule(key).weight.copy_(fused(base, layers))
    return places


def _weights(network: torch.nn.Module, places: Places) -> Weights:
    found: dict[str, Any] = {key: network.get_submodule(key).weight for key in places}
    return found


READERS: dict[str, Callable[[Path], Callable[[Case], Result]]] = {
    "comfyui": comfyui_reader,
    "sd-scripts": sd_scripts_reader,
    "musubi-tuner": musubi_reader,
}

if __name__ == "__main__":
    main()
