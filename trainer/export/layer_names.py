"""The names that other tools have for the layers of a model: the key rules of sd-scripts
(networks/lora.py) and of ComfyUI (comfy/lora.py, comfy/utils.py), the block names of the original
latent-diffusion code (ldm), and what families of transformers declare."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from trainer.backbones.families import family_names, find_family
from trainer.backbones.tool_names import Table, ToolNames

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
CLIP = re.compile(
    r"(?:text_model\.)?(encoder\.layers\.\d+\.(?:self_attn\.[qkv]_proj|self_attn\.out_proj|mlp\.fc[12]))"
)
T5 = re.compile(
    r"encoder\.block\.\d+\.layer\.\d+\.(?:SelfAttention\.[qkvo]|DenseReluDense\.w(?:i|i_[01]|o))"
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
    """sd-scripts' keys by module path, for the layers that it adapts one by one: those inside a
    U-Net's transformers, residual blocks and resamplers, inside the blocks of CLIP and T5, and of
    other denoisers what its scripts, or musubi-tuner's, adapt; see `kohya_fused` too."""
    found: dict[str, str] = {}
    if model.denoiser_name == "unet":
        for name in ldm(model.denoiser):
            if BLOCK.fullmatch(name) and not name.rpartition(".")[2].startswith("norm"):
                found[f"unet.{name}"] = f"lora_unet_{underscored(name)}"
    scripts = tool_names(model.denoiser).scripts
    for key, layers in numbered(scripts.layers, model.denoiser).items() if scripts else ():
        if len(layers) == 1:
            found[_paths(model, layers)[0]] = f"lora_unet_{underscored(key)}"
    clip = _clip_keys(model)
    return found | clip | (_t5_keys(model) if clip else {})


def kohya_fused(model: Any) -> dict[str, tuple[str, ...]]:
    """The keys of sd-scripts, or musubi-tuner, of the layers that these keep as one, to their
    module paths here, in the order of its rows."""
    scripts = tool_names(model.denoiser).scripts
    named = numbered(scripts.layers, model.denoiser) if scripts else {}
    return {
        f"lora_unet_{underscored(key)}": _paths(model, layers)
        for key, layers in named.items()
        if len(layers) > 1
    }


def comfy(model: Any) -> dict[str, str]:
    """ComfyUI's keys by module path; empty, but for text encoders, for a network it has no names
    for."""
    found: dict[str, str] = {}
    names = tool_names(model.denoiser)
    if model.denoiser_name == "unet":
        found = {f"unet.{name}": f"lora_unet_{underscored(name)}" for name in ldm(model.denoiser)}
    elif names.comfyui:
        for key, layers in original_names(model.denoiser).items():
            for layer, path in zip(layers, _paths(model, layers), strict=True):
                own = f"transformer.{layer}"
                found[path] = own if names.comfyui == "diffusers" else f"diffusion_model.{key}"
    return found | _clip_keys(model) | (_t5_keys(model) if found else {})


def fused_layers(model: Any) -> dict[str, tuple[str, ...]]:
    """ComfyUI's keys of the layers that it keeps as one, to their module paths here, in the order
    of its rows."""
    return {
        f"diffusion_model.{key}": _paths(model, layers)
        for key, layers in original_names(model.denoiser).items()
        if len(layers) > 1
    }


def comfy_parameters(model: Any) -> dict[str, str]:
    """ComfyUI's keys of a denoiser's parameters that belong to no layer, by their names here."""
    known = {name for name, _ in model.denoiser.named_parameters()}
    found = {}
    for key, name in tool_names(model.denoiser).parameters.items():
        for block in range(_blocks(name, model.denoiser)):
            if (own := name.format(block)) in known:
                found[f"{model.denoiser_name}.{own}"] = f"diffusion_model.{key.format(block)}"
    return found


def original_names(denoiser: Any) -> dict[str, tuple[str, ...]]:
    """The names that a transformer's first code has for its layers, as its family declares them,
    block by block."""
    return numbered(tool_names(denoiser).original, denoiser)


def numbered(table: Table, denoiser: Any) -> dict[str, tuple[str, ...]]:
    """A table of names with the number of each block in them; what stands for layers that the
    denoiser has not is left out."""
    known = {name for name, _ in denoiser.named_modules()}
    found = {}
    for name, layers in table.items():
        for block in range(_blocks(layers[0], denoiser)):
            own = tuple(layer.format(block) for layer in layers)
            if known.issuperset(own):
                found[name.format(block)] = own
    return found


def _blocks(name: str, denoiser: Any) -> int:
    """How many blocks the `{}` of a name counts; 1 where it has none."""
    start, mark, _ = name.partition(".{}")
    return len(getattr(denoiser, start)) if mark else 1


def tool_names(denoiser: Any) -> ToolNames:
    """What other tools call the layers of a transformer, as its family declares it."""
    kind = type(denoiser).__name__
    declared = (find_family(name).tool_names for name in family_names())
    return next((names[kind] for names in declared if kind in names), ToolNames())


def _paths(model: Any, layers: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{model.denoiser_name}.{layer}" for layer in layers)


def _clip_keys(model: Any) -> dict[str, str]:
    found = {}
    for number, (part, encoder) in enumerate(model.text_encoders.items(), start=1):
        prefix = "lora_te" if len(model.text_encoders) == 1 else f"lora_te{number}"
        for name, _ in encoder.named_modules():
            if other := clip_name(part, name):
                found[f"{part}.{name}"] = f"{prefix}_{underscored(other)}"
    return found


def _t5_keys(model: Any) -> dict[str, str]:
    """The keys of T5's layers: sd-scripts and ComfyUI count it as the third text encoder, also
    beside a single CLIP, and ComfyUI as the first where it is alone."""
    found = {}
    prefix = "lora_te3" if len(model.text_encoders) > 1 else "lora_te1"
    for part, encoder in model.text_encoders.items():
        if type(encoder).__name__ != "T5EncoderModel":  # UMT5 has these names too
            continue
        for name, _ in encoder.named_modules():
            if T5.fullmatch(name):
                found[f"{part}.{name}"] = f"{prefix}_{underscored(name)}"
    return found


def underscored(name: str) -> str:
    """A dotted name joined with underscores."""
    return name.replace(".", "_")
