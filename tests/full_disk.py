"""A process in which no file gets larger, as on a full disk, saves an adapter."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

from trainer import __main__
from trainer.cli import fit
from trainer.runs.adapter import save_adapter

SIZE = 300_000


def save(path: Path, said: Path) -> None:
    """As `python -m trainer fit` would, which handles the error. said: the file of its stderr."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, resource.RLIM_INFINITY))
    tensors = {"x": torch.ones(200_000)}
    fit.run = lambda words: save_adapter(path, tensors, tree={}, identity={})  # type: ignore[assignment, return-value]
    sys.exit(__main__.main(["fit"]))
