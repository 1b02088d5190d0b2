"""Writes the parts of a pipeline as a checkpoint in one file, under the names of Stable Diffusion's
own code: the tests' own table, the inverse of what loaders do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trainer.export.layer_names import ldm

ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def of_unet(unet: Any) -> dict[str, Tensor]:
    names = ldm(unet)
    found = {}
    for name, value in unet.state_dict().items():
        layer, _, kind = name.rpartition(".")
        found[f"model.diffusion_model.{names[layer]}.{kind}"] = value
    return found


def of_vae(vae: Any) -> dict[str, Tensor]:
    """Up blocks are numbered from the end there; attention is of convolutions."""
    count = len(vae.config.up_block_types)
    found = {}
    for name, value in vae.state_dict().items():
        new = name.replace("conv_norm_out", "norm_out").replace("samplers.0.conv", "sample.conv")
        new = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{count - 1 - int(m[1])}", new)
        new = re.sub(r"down_blocks\.(\d+)", r"down.\1", new)
        new = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = re.sub(r"resnets\.(\d+)", r"block.\1", new).replace("conv_shortcut", "nin_shortcut")
        match = re.fullmatch(r"(.*)mid_block\.attentions\.0\.(.+)\.(weight|bias)", new)
        if match is not None:
            new = f"{match[1]}mid.attn_1.{ATTENTION[match[2]]}.{match[3]}"
            value = value[:, :, None, None] if value.ndim == 2 else value
        found[f"first_stage_model.{new}"] = value
    return found


def of_clip(encoder: Any, prefix: str) -> dict[str, Tensor]:
    tensors = encoder.state_dict().items()
    return {f"{prefix}text_model.{name.removeprefix('text_model.')}": own for name, own in tensors}


def of_open_clip(encoder: Any, prefix: str) -> dict[str, Tensor]:
    """q, k and v are the rows of one matrix; the projection is written transposed."""
    own = {name.removeprefix("text_model."): v for name, v in encoder.state_dict().items()}
    found = {
        "positional_embedding": own["embeddings.position_embedding.weight"],
        "token_embedding.weight": own["embeddings.token_embedding.weight"],
        "ln_final.weight": own["final_layer_norm.weight"],
        "ln_final.bias": own["final_layer_norm.bias"],
    }
    projection = own.get("text_projection.weight", torch.ones(encoder.config.hidden_size, 2).T)
    found["text_projection"] = projection.T.contiguous()
    for layer in range(encoder.config.num_hidden_layers):
        here, there = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            rows = [own[f"{here}.self_attn.{role}_proj.{kind}"] for role in "qkv"]
            found[f"{there}.attn.in_proj_{kind}"] = torch.cat(rows)
            for name, other in OPEN_CLIP.items():
                found[f"{there}.{other}.{kind}"] = own[f"{here}.{name}.{kind}"]
    return {f"{prefix}{name}": value for name, value in found.items()}


def tensors_of(pipe: Any, open_clip: bool = False) -> dict[str, Tensor]:
    """All of a pipeline of Stable Diffusion 1, 2 (`open_clip`) or XL."""
    found = of_unet(pipe.unet) | of_vae(pipe.vae)
    if hasattr(pipe, "text_encoder_2"):
        found |= of_clip(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        return found | of_open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    if open_clip:
        return found | of_open_clip(pipe.text_encoder, "cond_stage_model.model.")
    return found | of_clip(pipe.text_encoder, "cond_stage_model.transformer.")


def write_checkpoint(
    pipe: Any,
    path: Path,
    *,
    open_clip: bool = False,
    add: Mapping[str, Tensor] | None = None,
    without: Sequence[str] = (),
    metadata: dict[str, str] | None = None,
) -> Path:
    """A pipeline as one file in half precision. add: further tensors; without: how names begin that
    are left out."""
    kept = {
        name: value.half().contiguous()
        for name, value in tensors_of(pipe, open_clip).items()
        if not name.startswith(tuple(without))
    }
    save_file(kept | dict(add or {}), path, metadata)
    return path
