"""What AnimateDiff's own code, and UIs that read its files, call the tensors of a motion module.

Here they have the names of diffusers' MotionAdapter, which are those of its other transformers.

    down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q.weight
    down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0
        .to_q.weight

Guo et al., arXiv 2307.04725; `animatediff/models/motion_module.py` of the released code.
"""

from __future__ import annotations

import re

MARK = ".temporal_transformer."  # in every name of theirs, and in none of ours
PLACES = "pos_embed.pe"  # sines of the frame's number: one tensor here, one an attention there
MODULE = re.compile(r"(.*\bmotion_modules\.\d+)\.(.+)")
NAMES = {
    "norm1": "norms.0", "norm2": "norms.1", "norm3": "ff_norm",
    "attn1": "attention_blocks.0", "attn2": "attention_blocks.1",
}  # fmt: skip
WRAPPED = "module."  # DistributedDataParallel, in files of its trainer


def theirs(name: str) -> tuple[str, ...]:
    """Their names of a tensor inside a motion module."""
    match = MODULE.fullmatch(name)
    assert match is not None, name
    module, inside = match.groups()
    if inside.endswith(PLACES):
        block = inside.removesuffix(PLACES)
        found = [f"{block}{NAMES[attn]}.pos_encoder.pe" for attn in ("attn1", "attn2")]
    else:
        found = [".".join(NAMES.get(part, part) for part in inside.split("."))]
    return tuple(f"{module}{MARK}{other}" for other in found)


def ours(name: str) -> str:
    """Our name of a tensor in a file of theirs; any other name as it is."""
    if MARK not in name:
        return name
    name = name.removeprefix(WRAPPED).replace(MARK, ".")
    name = re.sub(r"attention_blocks\.\d\.pos_encoder\.pe$", PLACES, name)
    for own, other in NAMES.items():
        name = name.replace(f".{other}.", f".{own}.")
    return name
