"""Safetensors files that no method can read, by the names of their tensors: what each is, and what
to do with it."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from trainer.backbones.pipeline_folder import TO_FOLDER

PARTS = "give the folder of the whole model as backbone="
OTHER = "it acts beside the model, which no method here does"
KINDS = {
    r"(?:first_stage_model|cond_stage_model|conditioner)\..+": (
        f"a complete checkpoint; {TO_FOLDER}"
    ),
    r"model\.diffusion_model\..+\.(?:weight|bias)": f"a checkpoint's denoiser; {TO_FOLDER}",
    r"(?:control_model|controlnet_\w+|input_hint_block|lllite_\w+)\..+": f"a ControlNet; {OTHER}",
    r"(?:image_proj|ip_adapter)\..+": f"an IP-Adapter; {OTHER}",
    r"adapter\.body\..+": f"a T2I-Adapter; {OTHER}",
    r"\d+\.\d+\.linear\.\d+\.(?:weight|bias)": f"a hypernetwork; {OTHER}",
    r"(?:encoder|decoder)\.(?:conv_in|down\.0|down_blocks\.0|up_blocks\.0)\..+": f"a VAE; {PARTS}",
    r"(?:down_blocks|mid_block|up_blocks|conv_in|time_embedding|transformer_blocks|pos_embed"
    r"|input_blocks|middle_block|output_blocks)\..+\.(?:weight|bias)": (
        f"a denoiser's weights; {PARTS}"
    ),
    r"text_model\..+\.(?:weight|bias)": f"a text encoder's weights; {PARTS}",
    r".+\.vera_lambda_[bd]": "a VeRA adapter, whose matrices come from a seed",
    r".+\.trainable_tokens_delta": "trained rows of an embedding by their numbers, without words",
}
# what adapters of layers have in their names, of whatever tool
ADAPTER = re.compile(
    r"lora|hada_|lokr_|\.diff(?:_b)?$|oft_|\.magnitude$|\.[ab][12]\.|on_input|bundle_emb|set_weight"
    r"|(?:w|b)_norm$|_custom_diffusion\."
)


def refuse_others(path: Path, keys: Collection[str]) -> None:
    """Raises ValueError for a file of these keys that no method can read."""
    if what := what_it_is(keys):
        raise ValueError(f"file={path} is {what}")


def what_it_is(keys: Collection[str]) -> str | None:
    """What a file is that no method can read; None where it may be read, or nothing is known."""
    if any(ADAPTER.search(key) for key in keys):
        return None
    for pattern, what in KINDS.items():
        if any(re.fullmatch(pattern, key) for key in keys):
            return what
    return None
