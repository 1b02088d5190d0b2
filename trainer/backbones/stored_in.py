"""What the weights of a pipeline folder's parts are stored in, and read in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from trainer.backbones.held_layers import READ_IN, only_layers_in
from trainer.backbones.unfit_folder import opened_weights
from trainer.backbones.weight_files import weight_files

HALVES: Mapping[str, torch.dtype] = {"F16": torch.float16, "BF16": torch.bfloat16}


class StoredParts(Protocol):
    """What is asked of a `PipelineFolder`."""

    @property
    def file(self) -> Path | None: ...
    @property
    def denoiser(self) -> str | None: ...
    def of(self, part: str) -> Path: ...
    def prefix(self, part: str) -> str | None: ...
    def published(self, part: str) -> torch.dtype: ...


def stored_in(folder: StoredParts, part: str) -> Counter[torch.dtype]:
    """How many tensors of a part are stored in what; those in neither half precision are read as
    fp32, and counted so."""
    prefix, whole = folder.prefix(part), folder.file
    if prefix is None or whole is None:
        files, prefix = weight_files(folder.of(part)).files, ""
    else:
        files = (whole,)
    found: Counter[torch.dtype] = Counter()
    for path in files:
        with opened_weights(path) as file:
            names = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
            kinds = [file.get_slice(key).get_dtype() for key in names]
        found.update(HALVES.get(kind, torch.float32) for kind in kinds)
    return found


def read_in(folder: StoredParts, part: str) -> torch.dtype:
    """What a part is read in: half precision where all of it is stored so and its layers will be
    held so, or in less, see `held_layers.reading`. VAEs compute in fp32."""
    read, denoiser = READ_IN.get(), folder.denoiser
    if read is None or denoiser is None or part == "vae":
        return torch.float32
    stored = set(stored_in(folder, part))
    if len(stored) != 1 or torch.float32 in stored:
        return torch.float32
    kind = "denoiser" if part == denoiser else "text_encoders"
    return read(kind, folder.published(denoiser), stored.pop())


def as_read(model: Any, dtype: torch.dtype) -> Any:
    """A part that was read in `dtype`, with all but its layers in fp32."""
    return model if dtype == torch.float32 else only_layers_in(model, dtype)
