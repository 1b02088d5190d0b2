"""`diff`: every change as a whole delta, W + diff, under ComfyUI's names: larger than low-rank
matrices, and the same in every version, DoRA too."""

from __future__ import annotations

from pathlib import Path

import torch

from trainer.export.apply_bundle import full_delta, layer_at
from trainer.export.formats.comfyui import READERS, save
from trainer.export.formats.kohya import read, relearns, remark
from trainer.export.job import Job
from trainer.export.tokens import write_tokens
from trainer.ops.adapters.nf4 import unpacked

__all__ = ["READERS", "read", "relearns", "remark", "write"]


@torch.no_grad()
def write(job: Job, folder: Path, dtype: torch.dtype) -> None:
    layers = {
        path: full_delta(delta, unpacked(layer_at(job.base, path)))
        for path, delta in job.bundle.layers.items()
    }
    save(job, layers, folder, dtype, "diff")
    write_tokens(job.bundle, folder, dtype, known=True)
