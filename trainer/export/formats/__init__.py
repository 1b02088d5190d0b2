"""File formats of adapters, one file each, named as in `format=`.

A format's file defines `FORMAT`, a `Format` record; the file's name is the format's. Files that
begin with `_` are not formats. Between an adapter and a format stands a `Bundle`: what the adapter
adds to its base model, in the same terms for all formats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainer.export.bundle import Bundle
    from trainer.export.job import Job
    from trainer.export.probe import Probe
    from trainer.export.usage import Usage

Reader = Callable[[Path, Any], Any]  # (folder, base) -> model, or None


def _carries_none(model: Any) -> bool:
    return False


def _refuses_none(job: Job) -> None:
    pass


def _no_remark(model: Any, probe: Probe, output: Tensor) -> str | None:
    return None


@dataclass(frozen=True)
class Format:
    """How one format is written and read.

    write: `write(job, folder, dtype)` writes an adapter's files into an empty folder. It raises
        `CannotCarryError` for an adapter that the format cannot carry.
    readers: the loaders that must read the files back, by name. `(folder, base)` returns the
        adapted model, which may be `base` itself; None where the tool has no loader for this kind
        of network.
    usage: `usage(job, folder)` returns how the files in a folder are used.
    read: `read(path, base)` returns what a file or folder of this format adds to the base. None for
        a format that is a complete pipeline.
    refuse: `refuse(job)` raises `CannotCarryError` as `write` does, and writes nothing.
    ops: names of the ops in attention that its files hold.
    one_file: whether an adapter without words and inserted layers is a single file.
    carries: whether the format can hold all layers that methods have inserted into a model's
        denoiser.
    carries_known_words: whether it can hold words of the vocabulary whose embeddings were trained.
    remark: `remark(model, probe, output)` returns what a user of the files should know, or None;
        `output` is what the adapted model answers to the probe.
    """

    write: Callable[[Job, Path, torch.dtype], None]
    readers: Mapping[str, Reader]
    usage: Callable[[Job, Path], Usage]
    read: Callable[[Path, Any], Bundle] | None = None
    refuse: Callable[[Job], None] = _refuses_none
    ops: tuple[str, ...] = ()
    one_file: bool = False
    carries: Callable[[Any], bool] = _carries_none
    carries_known_words: bool = False
    remark: Callable[[Any, Probe, Tensor], str | None] = _no_remark
