"""Runs the python call that an export's README prints, on the files as they were written, to a
picture."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DiffusionPipeline

from trainer.backbones import load_backbone
from trainer.backbones.family import tokenizer_name
from trainer.config.lineage import spec_of
from trainer.export import motion
from trainer.export.probe import PROOF_FRAMES
from trainer.export.stock_references import StockReferences, has_loaded
from trainer.export.usage import README, frames_of_call

CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STEPS = 2  # that the proof takes
PROOF_LATENTS = 3  # frames of latents of a clip, where the VAE compresses time


def code_of(folder: Path) -> str | None:
    """The python call of a written README; None if it prints none."""
    match = CODE.search((folder / README).read_text(encoding="utf-8"))
    return match[1] if match else None


def run_call(code: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Runs a call with other values of the settings at its head, and returns its names.

    Raises:
        ValueError: it fails, or the picture it makes is of one colour, as of values that are not
            finite.
    """
    for name, value in settings.items():
        code = _with(code, name, value)
    names: dict[str, Any] = {}
    fork = torch.random.fork_rng(devices=[])
    with TemporaryDirectory() as place, chdir(place), fork, _without_bars():
        torch.manual_seed(0)
        try:
            exec(compile(code, README, "exec"), names)
        except Exception as error:  # whatever a library raises, the user would see it too
            raise ValueError(
                f"the call that the README prints fails: {type(error).__name__}: {error}"
            ) from error
    picture = names["clip"][0] if "clip" in names else names["picture"]
    if all(low == high for low, high in picture.convert("RGB").getextrema()):
        raise ValueError("the call that the README prints gives a picture of one colour")
    return names


@contextmanager
def _without_bars() -> Iterator[None]:
    """Inside the block pipelines of diffusers show no bar of their steps."""
    pipeline: Any = DiffusionPipeline
    pipeline._progress_bar_config = {"disable": True}
    try:
        yield
    finally:
        del pipeline._progress_bar_config


def _with(code: str, name: str, value: Any) -> str:
    """The code with another value of a setting."""
    line = f"{name} = {value!r}"
    return re.sub(rf"^{name} = .*$", lambda _: line, code, flags=re.MULTILINE)


def model_of(pipe: Any, base: Any) -> Any:
    """A stock pipeline's parts in place of the backbone's, to be asked as one."""
    for name in (*base.text_encoders, "vae", *map(tokenizer_name, base.tokenizers)):
        if (part := pipe.components.get(name)) is not None:
            setattr(base, name, part.eval() if isinstance(part, torch.nn.Module) else part)
    if has_loaded(pipe):
        return StockReferences(base, pipe)
    if "motion_adapter" in pipe.components:
        return motion.AnimateDiffModel.around(pipe, base)
    setattr(base, base.denoiser_name, pipe.components[base.denoiser_name].eval())
    return base


@contextmanager
def places(tree: Mapping[str, Any], base: Any, device: torch.device) -> Iterator[dict[str, Any]]:
    """The settings under which a call is run here: the plain backbone as a folder, and the motion
    modules of `base` where it has some."""
    with TemporaryDirectory() as folder:
        plain = load_backbone(spec_of(tree), tree["backbone"])
        plain.pipeline().save_pretrained(f"{folder}/base")
        if motion.modules(base):
            motion.adapter(base).save_pretrained(f"{folder}/modules")
        del plain
        yield {
            "base": f"{folder}/base",
            "modules": f"{folder}/modules",
            "device": str(device),
            "steps": STEPS,
            "frames": frames_of_call(base, PROOF_LATENTS, PROOF_FRAMES),
        }
