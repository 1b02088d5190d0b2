"""Latents kept by content: a verified file for each picture, named after its bytes, how it is cut,
and the encoder. They are made by the first step that uses a picture, and read by every later one,
also of other ranks and runs; a picture or an encoder that changes has another file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from trainer.data.kept_tensors import read_tensors, write_tensors

MOMENTS = "moments"


class LatentStore:
    """cache: the folder for what is kept between runs; encoder: names what encodes."""

    def __init__(self, cache: Path, encoder: str) -> None:
        key = hashlib.sha256(f"{encoder}|fp16".encode()).hexdigest()[:24]
        self.folder = cache / "pictures" / key

    def all(self, contents: Sequence[str]) -> Tensor | None:
        """The moments (b, 2c, h, w) in fp16 of pictures by content; None unless each is there."""
        found = []
        for content in contents:
            kept = read_tensors(self.folder, content)
            if kept is None:
                return None
            found.append(kept[MOMENTS])
        return torch.cat(found) if found else None

    def keep(self, contents: Sequence[str], moments: Tensor) -> None:
        """Stores the moments (b, 2c, h, w) of pictures, which `as_stored` has rounded.

        Raises:
            ValueError: those of a picture are not finite in fp16.
        """
        for content, row in zip(contents, moments.detach().half().cpu(), strict=True):
            if not bool(row.isfinite().all()):
                raise ValueError(
                    "the latents of a picture are not finite in fp16; give run.cache_latents=false"
                )
            write_tensors(self.folder, content, {MOMENTS: row[None].clone()})
