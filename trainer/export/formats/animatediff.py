"""`animatediff`: motion modules under the keys of AnimateDiff's own files, which UIs read.

    <name>.safetensors          the motion modules
    loras/<name>.safetensors    what changed in the image model, under ComfyUI's keys
    embeddings/                 new words, and known ones that have learned anew

The keys say widths, layers and the number of places; heads and groups of the norm are what every
reader of such files takes, 8 and the U-Net's own. LoRA inside the modules is folded in.

The proof is by diffusers' reader. The modules norm the frames of a clip together there and here;
AnimateDiff's own code norms each by itself, and so do ComfyUI's nodes (AnimateDiff-Evolved) but for
modules without one in the middle and with 24 places. What that changes is measured and said.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import MotionAdapter
from torch import Tensor

from trainer.export import motion, tokens
from trainer.export.apply_bundle import add_to, full_delta, layer_at
from trainer.export.bundle import Bundle, Delta, DoRADelta
from trainer.export.files import load_tensors, save_tensors
from trainer.export.formats import comfyui, kohya
from trainer.export.job import Job
from trainer.export.motion import carries_motion
from trainer.export.proof import Probe, difference
from trainer.export.tokens import read_tokens, token_remark, write_tokens
from trainer.ops.adapters.nf4 import unpacked
from trainer.ops.temporal.motion_names import PLACES, ours, theirs

HEADS = 8
LORAS = "loras"

carries = carries_motion
relearns = True


@torch.no_grad()
def write(job: Job, folder: Path, dtype: torch.dtype) -> None:
    found = motion.modules(job.live)
    if not found:
        raise ValueError(
            "format=animatediff is for motion modules, and this adapter has none; format=comfyui "
            "writes what it changes in the image model"
        )
    for path, module in found.items():
        if module.num_attention_heads != HEADS:
            raise ValueError(
                f"format=animatediff cannot carry {path} with {module.num_attention_heads} heads: "
                f"its keys do not say how many, and every reader takes {HEADS}; format=diffusers "
                "says it"
            )
    own = motion.tensors(job.live)
    renamed = {other: value.clone() for name, value in own.items() for other in theirs(name)}
    save_tensors(renamed, folder / f"{job.title}.safetensors", dtype, {})
    comfyui.save(job, _image_layers(job), folder / LORAS, dtype, "animatediff")
    write_tokens(job.bundle, folder, dtype, known=True)


def remark(live: Any, probe: Probe, wanted: Tensor) -> str | None:
    if not motion.modules(live):
        return None
    with motion.framewise(live):
        apart = difference(probe(live), wanted)
    norms = (
        "AnimateDiff's own code and most UIs norm each frame of a clip by itself, where diffusers "
        f"and this model norm them together: there the output differs by {apart:.1e}"
    )
    words = token_remark(live)
    return f"{norms}\n{words}" if words else norms


def _image_layers(job: Job) -> dict[str, Delta]:
    """Those outside the modules; DoRA as whole deltas, which ComfyUI reads alike in any version."""
    inside = tuple(f"{job.live.denoiser_name}.{path}." for path in motion.modules(job.live))
    return {
        path: full_delta(delta, unpacked(layer_at(job.base, path)))
        if isinstance(delta, DoRADelta)
        else delta
        for path, delta in job.bundle.layers.items()
        if not path.startswith(inside)
    }


def _from_single_file(folder: Path, base: Any) -> Any:
    """diffusers' reading of the same keys; the image model by ComfyUI's key rules."""
    (file,) = folder.glob("*.safetensors")
    beside = list((folder / LORAS).glob("*.safetensors"))
    layers = kohya.read(beside[0], base).layers if beside else {}
    add_to(base, replace(read_tokens(tokens.files(folder), base), layers=layers))
    with TemporaryDirectory() as place:
        with torch.device("meta"):
            empty: Any = MotionAdapter(**_config(load_tensors(file)[0], base))
        empty.save_config(place)
        given = MotionAdapter.from_single_file(str(file), config=place)
    return motion.Stock(base, given)


def _config(stored: dict[str, Tensor], base: Any) -> dict[str, Any]:
    """What a reader concludes from the keys of a file, and knows of the U-Net it is for."""
    unet = base.denoiser.config
    places = next(value for key, value in stored.items() if ours(key).endswith(PLACES))
    return {
        "block_out_channels": list(unet.block_out_channels),
        "motion_layers_per_block": unet.layers_per_block,
        "motion_num_attention_heads": HEADS,
        "motion_norm_num_groups": unet.norm_num_groups,
        "motion_max_seq_length": places.shape[1],
        "use_motion_mid_block": any(key.startswith("mid_block.") for key in stored),
    }


READERS = {"MotionAdapter.from_single_file": _from_single_file}


def read(path: Path, base: Any) -> Bundle:
    """Raises ValueError: motion modules come in by the method that inserts them."""
    raise ValueError(
        f"file={path} holds motion modules, which insert layers; train on from them with "
        f"methods.animatediff.weights={path}"
    )
