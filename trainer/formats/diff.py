"""`diff`: every change as a whole delta, W + diff, under ComfyUI's names: larger than low-rank
matrices, and the same in every version, DoRA too."""

from __future__ import annotations

from pathlib import Path

import torch

from trainer.attention.nf4 import unpacked
from trainer.formats import _tokens as tokens
from trainer.formats._apply import full, layer_at
from trainer.formats._job import Job
from trainer.formats.comfyui import READERS, read, relearns, remark, save

__all__ = ["READERS", "read", "relearns", "remark", "write"]


@torch.no_grad()
def write(job: Job, folder: Path, dtype: torch.dtype) -> None:
    layers = {
        path: full(delta, unpacked(layer_at(job.base, path)))
        for path, delta in job.bundle.layers.items()
    }
    save(job, layers, folder, dtype, "diff")
    tokens.write(job.bundle, folder, dtype, known=True)
