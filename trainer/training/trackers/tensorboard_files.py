"""TensorBoard, in the folder `tensorboard` of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import hparams

from trainer.media.grids import SIDE, grid

SHOWN = 512  # pixels of the longer side of a preview


class TensorBoardTracker(TensorBoardLogger):
    """Pictures are a row of up to `SHOWN` pixels each."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="", version="tensorboard")

    def log_settings(self, settings: Mapping[str, Any], metrics: Sequence[str]) -> None:
        self.hparams.update(settings)
        for summary in hparams(dict(settings), dict.fromkeys(metrics)):
            self.experiment.file_writer.add_summary(summary, 0)

    def log_pictures(
        self, name: str, pictures: Sequence[Image.Image], *, prompts: Sequence[str], step: int
    ) -> None:
        side = max(SIDE, min(SHOWN, max(max(each.size) for each in pictures)))
        row = grid([(f"step {step}", pictures)], prompts, side)
        pixels = torch.from_numpy(np.asarray(row).copy())
        self.experiment.add_image(name, pixels, global_step=step, dataformats="HWC")

    def log_clip(self, name: str, files: Sequence[Path], *, step: int) -> None:
        """The GIF as an image. TensorBoard's `add_video` would write the same record, but needs
        moviepy, whose present version it cannot import."""
        with Image.open(files[-1]) as clip:
            width, height = clip.size
        data = files[-1].read_bytes()
        shown = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        record = Summary(value=[Summary.Value(tag=name, image=shown)])
        self.experiment.file_writer.add_summary(record, step)
