"""`animatediff`: motion modules under the keys of AnimateDiff's own files, which UIs read.

    <name>.safetensors          the motion modules
    loras/<name>.safetensors    what changed in the image model, under ComfyUI's keys
    embeddings/                 trained words, new ones and known ones

The keys determine the widths, the layers and the number of frame positions. For the number of heads
and of the norm's groups, every reader of such files assumes 8 and the U-Net's. LoRA inside the
modules is folded in.

The proof uses diffusers' reader. There the modules normalise the frames of a clip together;
AnimateDiff's own code normalises each frame separately, and so do ComfyUI's nodes
(AnimateDiff-Evolved), except for modules with 24 frame positions and no module in the middle block.
Of modules that trained on whole clips the difference that this makes is measured and reported;
those that trained frame by frame (`norm=frame`) are proven with diffusers' modules normalised so.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import MotionAdapter
from torch import Tensor

from trainer.backbones.four_bits import unpacked
from trainer.export import motion, tokens
from trainer.export.apply_bundle import add_to, full_delta, layer_at
from trainer.export.bundle import Bundle, Delta, DoRADelta
from trainer.export.cannot_carry import CannotCarryError
from trainer.export.formats import Format, comfyui, kohya
from trainer.export.job import Job
from trainer.export.motion import carries_motion
from trainer.export.probe import Probe, difference
from trainer.export.read_tokens import read_tokens
from trainer.export.tensor_files import load_tensors, save_tensors
from trainer.export.tokens import refuse_unnamable, token_remark, write_tokens
from trainer.export.usage import Usage, word_lines, word_text
from trainer.ops.temporal.motion_names import PLACES, ours, theirs
from trainer.ops.temporal.weights import NORM, trained_per_frame

HEADS = 8
LORAS = "loras"


def refuse(job: Job) -> None:
    found = motion.modules(job.adapted)
    if not found:
        raise CannotCarryError(
            "format=animatediff is for motion modules, and this adapter has none"
        )
    for path, module in found.items():
        if module.num_attention_heads != HEADS:
            raise CannotCarryError(
                f"format=animatediff cannot carry {path} with {module.num_attention_heads} heads: "
                f"its keys do not give the number, and every reader assumes {HEADS}"
            )
    comfyui.refuse_unnamed(job, _image_layers(job), "animatediff")
    refuse_unnamable(job.bundle)


@torch.no_grad()
def write(job: Job, folder: Path, dtype: torch.dtype) -> None:
    refuse(job)
    own = motion.tensors(job.adapted)
    renamed = {other: value.clone() for name, value in own.items() for other in theirs(name)}
    facts = {NORM: "frame" if motion.is_per_frame(job.adapted) else "clip"}
    save_tensors(renamed, folder / f"{job.title}.safetensors", dtype=dtype, metadata=facts)
    made: Any = motion.adapter(job.adapted)
    made.save_config(folder)  # for diffusers, which would guess the widths
    layers = _image_layers(job)
    comfyui.save(job, folder / LORAS, dtype, layers=layers, format_name="animatediff")
    write_tokens(job.bundle, folder, dtype, known=True)


def remark(adapted: Any, probe: Probe, output: Tensor) -> str | None:
    """How far the output of readers differs that normalise each frame separately, and how UIs use
    the trained words."""
    if not motion.modules(adapted):
        return None
    if motion.is_per_frame(adapted):
        return token_remark(adapted)
    with motion.framewise(adapted):
        found = difference(probe(adapted), output)
    norms = (
        "AnimateDiff's own code and most UIs normalise each frame of a clip separately, where "
        "diffusers and this model normalise them together: there the output differs by "
        f"{found:.1e}"
    )
    words = token_remark(adapted)
    return f"{norms}\n{words}" if words else norms


def _image_layers(job: Job) -> dict[str, Delta]:
    """The deltas outside the modules; DoRA as full deltas, which every version of ComfyUI reads in
    the same way."""
    inside = tuple(f"{job.adapted.denoiser_name}.{path}." for path in motion.modules(job.adapted))
    return {
        path: full_delta(delta, unpacked(layer_at(job.base, path)))
        if isinstance(delta, DoRADelta)
        else delta
        for path, delta in job.bundle.layers.items()
        if not path.startswith(inside)
    }


def _from_single_file(folder: Path, base: Any) -> Any:
    """Loads the modules with diffusers, and the image model's changes by ComfyUI's key rules."""
    (file,) = folder.glob("*.safetensors")
    beside = list((folder / LORAS).glob("*.safetensors"))
    layers = kohya.read(beside[0], base).layers if beside else {}
    add_to(base, replace(read_tokens(tokens.files(folder), base), layers=layers))
    with TemporaryDirectory() as config:  # what a reader of the file alone would infer
        with torch.device("meta"):
            empty: Any = MotionAdapter(**_config(load_tensors(file)[0], base))
        empty.save_config(config)
        loaded = MotionAdapter.from_single_file(str(file), config=config)
    made = motion.AnimateDiffModel(base, loaded)
    if trained_per_frame(str(file)):
        motion.as_released(made.pipeline)
    return made


def _config(stored: dict[str, Tensor], base: Any) -> dict[str, Any]:
    """The arguments of a `MotionAdapter` as a reader infers them from a file and its U-Net."""
    unet = base.denoiser.config
    positions = next(value for key, value in stored.items() if ours(key).endswith(PLACES))
    return {
        "block_out_channels": list(unet.block_out_channels),
        "motion_layers_per_block": unet.layers_per_block,
        "motion_num_attention_heads": HEADS,
        "motion_norm_num_groups": unet.norm_num_groups,
        "motion_max_seq_length": positions.shape[1],
        "use_motion_mid_block": any(key.startswith("mid_block.") for key in stored),
    }


def read(path: Path, base: Any) -> Bundle:
    """Raises `ValueError`: the method that inserts motion modules reads them."""
    raise ValueError(
        f"file={path} holds motion modules, which are inserted layers; to start from them, train "
        f"with methods.animatediff.weights={path}"
    )


def usage(job: Job, folder: Path) -> Usage:
    file = f"{job.title}.safetensors"
    text = [
        f"In ComfyUI with AnimateDiff-Evolved: copy `{file}` to `models/animatediff_models` and "
        "choose it as the motion model."
    ]
    lines: list[str] = []
    per_frame = motion.is_per_frame(job.adapted)
    imports = ["from diffusers import MotionAdapter"]
    partial = per_frame or bool(job.bundle.known)
    if not partial:
        lines, more = word_lines(folder, job.base.pipeline())
        imports += more
    beside = folder / LORAS / file
    if beside.is_file():
        text.append(f'What changed in the image model is `{LORAS}/{file}`, for "Load LoRA".')
        if any(key.endswith((".diff", ".diff_b")) for key in load_tensors(beside)[0]):
            partial = True
        else:
            lines.append(f'pipe.load_lora_weights(f"{{folder}}/{LORAS}", weight_name={file!r})')
    if per_frame:
        text.append(
            "The modules normalise each frame by itself, and diffusers all frames of a clip "
            "together, so that its clips differ."
        )
    elif partial:
        text.append("diffusers reads the motion modules, and not all of the rest.")
    return Usage(
        text=(*text, *word_text(job.card, folder)),
        pipeline="AnimateDiffPipeline",
        imports=tuple(imports),
        before=(
            f'adapter = MotionAdapter.from_single_file(f"{{folder}}/" + {file!r}, config=folder)',
        ),
        arguments=("motion_adapter=adapter",),
        call=tuple(lines),
        partial=partial,
    )


FORMAT = Format(
    write,
    readers={"MotionAdapter.from_single_file": _from_single_file},
    usage=usage,
    read=read,
    refuse=refuse,
    carries=carries_motion,
    carries_known_words=True,
    remark=remark,
)
