"""`diff`: every change, DoRA included, as a full delta W + diff under ComfyUI's names: larger files
than low-rank matrices, which every version of ComfyUI reads in the same way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from trainer.backbones.four_bits import unpacked
from trainer.export.apply_bundle import full_delta, layer_at
from trainer.export.formats import comfyui
from trainer.export.formats.comfyui import refuse_unnamed, save
from trainer.export.job import Job
from trainer.export.tokens import refuse_unnamable, write_tokens


@torch.no_grad()
def write(job: Job, folder: Path, dtype: torch.dtype) -> None:
    layers = {
        path: full_delta(delta, unpacked(layer_at(job.base, path)))
        for path, delta in job.bundle.layers.items()
    }
    save(job, folder, dtype, layers=layers, format_name="diff")
    write_tokens(job.bundle, folder, dtype, known=True)


def refuse(job: Job) -> None:
    refuse_unnamed(job, job.bundle.layers, "diff")
    refuse_unnamable(job.bundle)


FORMAT = replace(comfyui.FORMAT, write=write, refuse=refuse)
