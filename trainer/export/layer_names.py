"""The names that other tools have for the layers of a model: the key rules of sd-scripts
(networks/lora.py) and of ComfyUI (comfy/lora.py, comfy/utils.py), and the block names of the
original latent-diffusion code (ldm)."""

from __future__ import annotations

import re
from typing import Any

from trainer.backbones.families import family_names, find_family

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
TOP = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
BLOCK = re.compile(
    r"(?P<where>down_blocks|mid_block|up_blocks)\.(?:(?P<block>\d+)\.)?"
    r"(?P<kind>\w+)\.(?P<index>\d+)\.(?P<rest>.+)"
)
INSIDE = re.compile(
    r"proj_in|proj_out|norm"
    r"|transformer_blocks\.\d+\.(norm[123]|attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))"
)
BARE = re.compile(r"(?:transformer_blocks\.(\d+)\.)?scale_shift_table")
CLIP = re.compile(
    r"(?:text_model\.)?(encoder\.layers\.\d+\.(?:self_attn\.[qkv]_proj|self_attn\.out_proj|mlp\.fc[12]))"
)


def ldm(unet: Any) -> dict[str, str]:
    """The latent-diffusion name of every layer of a `UNet2DConditionModel` that has one."""
    count = len(unet.config.down_block_types)
    layers = unet.config.layers_per_block
    depths = [layers] * count if isinstance(layers, int) else list(layers)
    known = dict(unet.named_modules())
    found = {name: other for name, other in TOP.items() if name in known}
    for name in known:
        match = BLOCK.fullmatch(name)
        other = _block(depths, known, **match.groupdict()) if match else None
        if other:
            found[name] = other
    return found


def _block(
    depths: list[int],
    known: dict[str, Any],
    *,
    where: str,
    block: str | None,
    kind: str,
    index: str,
    rest: str,
) -> str | None:
    """The name of one layer. Latent diffusion numbers the steps of all down blocks, and of all up
    blocks, in one list each; within a step the residual block is `.0` and the transformer `.1`."""
    inside = RESNET.get(rest) if kind == "resnets" else rest if INSIDE.fullmatch(rest) else None
    i = int(index)
    if where == "mid_block":
        step = {"resnets": 2 * i, "attentions": 2 * i + 1}.get(kind)
        return None if inside is None or step is None else f"middle_block.{step}.{inside}"
    assert block is not None
    x = int(block)
    if where == "down_blocks":
        first = 1 + sum(depth + 1 for depth in depths[:x])
        if kind == "downsamplers" and rest == "conv":
            return f"input_blocks.{first + depths[x]}.0.op"
        step, side = first + i, "input_blocks"
    else:
        backwards = depths[::-1]
        step, side = sum(depth + 1 for depth in backwards[:x]) + i, "output_blocks"
        if kind == "upsamplers" and rest == "conv":
            position = 2 if f"up_blocks.{x}.attentions" in known else 1
            return f"output_blocks.{step + backwards[x]}.{position}.conv"
    if inside is None or kind not in ("resnets", "attentions"):
        return None
    return f"{side}.{step}.{0 if kind == 'resnets' else 1}.{inside}"


def clip_name(part: str, name: str) -> str | None:
    """The name of a layer of a CLIP text encoder before transformers 5, which dropped the level
    `text_model`; None for a layer that is not part of a CLIP block."""
    match = CLIP.fullmatch(name) if part.startswith("text_encoder") else None
    return f"text_model.{match[1]}" if match else None


def old_clip_key(key: str) -> str:
    """The name of a tensor of a CLIP text encoder before transformers 5: with the level
    `text_model`, but for the projection of its output."""
    plain = key.removeprefix("text_model.")
    return plain if plain.startswith("text_projection.") else f"text_model.{plain}"


def long_name(path: str) -> str:
    """A module path with the level `text_model` in it, which all versions of readers accept."""
    part, _, name = path.partition(".")
    return f"{part}.{clip_name(part, name) or name}"


def kohya(model: Any) -> dict[str, str]:
    """sd-scripts' keys by module path, for the layers that it adapts: those inside a U-Net's
    transformers, residual blocks and resamplers, and inside the blocks of CLIP."""
    found = {}
    if model.denoiser_name == "unet":
        for name in ldm(model.denoiser):
            if BLOCK.fullmatch(name) and not name.rpartition(".")[2].startswith("norm"):
                found[f"unet.{name}"] = f"lora_unet_{underscored(name)}"
    return found | _clip_keys(model)


def comfy(model: Any) -> dict[str, str]:
    """ComfyUI's keys by module path; empty, but for CLIP, for a network it has no names for."""
    found = {}
    rules = _comfyui_layers(type(model.denoiser).__name__)
    if model.denoiser_name == "unet":
        found = {f"unet.{name}": f"lora_unet_{underscored(name)}" for name in ldm(model.denoiser)}
    elif rules is not None:
        names = (name for name, _ in model.denoiser.named_modules())
        paths = [f"{model.denoiser_name}.{name}" for name in names if re.fullmatch(rules, name)]
        found = {path: f"transformer.{path.partition('.')[2]}" for path in paths}
    return found | _clip_keys(model)


def fused_layers(model: Any) -> dict[str, tuple[str, ...]]:
    """ComfyUI's keys of the layers that it keeps as one, to their module paths here, in the order
    of its rows."""
    part = model.denoiser_name
    names = original_names(model.denoiser)
    return {
        f"diffusion_model.{key}": tuple(f"{part}.{layer}" for layer in layers)
        for key, layers in names.items()
        if len(layers) > 1
    }


def comfy_parameters(model: Any) -> dict[str, str]:
    """ComfyUI's keys of a denoiser's parameters that belong to no layer, by their names here."""
    if model.denoiser_name == "unet" or _comfyui_layers(type(model.denoiser).__name__) is None:
        return {}
    found = {}
    for name, _ in model.denoiser.named_parameters():
        match = BARE.fullmatch(name)
        if match is not None:
            place = f"blocks.{match[1]}" if match[1] else "final_layer"
            found[f"{model.denoiser_name}.{name}"] = f"diffusion_model.{place}.scale_shift_table"
    return found


def original_names(denoiser: Any) -> dict[str, tuple[str, ...]]:
    """The names that a transformer's first code has for its layers, as its family declares them,
    block by block; `{}` in a declaration stands for the number of a block."""
    kind = type(denoiser).__name__
    declared = (find_family(name).original_layers.get(kind) for name in family_names())
    table = next((names for names in declared if names is not None), {})
    names = ("transformer_blocks", "blocks")
    blocks = range(
        next((len(getattr(denoiser, own)) for own in names if hasattr(denoiser, own)), 0)
    )
    return {
        name.format(block): tuple(layer.format(block) for layer in layers)
        for name, layers in table.items()
        for block in (blocks if "{}" in name else (0,))
    }


def _comfyui_layers(transformer: str) -> str | None:
    """The layers of a class of transformers that ComfyUI reads, as its family declares them."""
    declared = (find_family(name).comfyui_layers for name in family_names())
    return next((layers[transformer] for layers in declared if transformer in layers), None)


def _clip_keys(model: Any) -> dict[str, str]:
    found = {}
    for number, (part, encoder) in enumerate(model.text_encoders.items(), start=1):
        prefix = "lora_te" if len(model.text_encoders) == 1 else f"lora_te{number}"
        for name, _ in encoder.named_modules():
            if other := clip_name(part, name):
                found[f"{part}.{name}"] = f"{prefix}_{underscored(other)}"
    return found


def underscored(name: str) -> str:
    """A dotted name joined with underscores."""
    return name.replace(".", "_")
