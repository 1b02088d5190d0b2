"""An ordinary Lightning script: a small diffusion model on pictures, as the documentation of
Lightning, diffusers and webdataset has it.

    python bench/_plain_lightning.py --data ./pictures --out ./out --steps 24
    python bench/_plain_lightning.py --data ./pictures --out ./out --steps 24 --resume

bench/faults.py holds it against the same faults as this project's trainer. `--faults` is JSON, read
as tests/faults/driver.py does; a fault is a callback, the script itself knows nothing of it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import time
import zlib
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image, ImageOps
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset

SIDE = 32


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(3, 32, 32) in [-1, 1]."""
    pixels = np.asarray(ImageOps.fit(image.convert("RGB"), (SIDE, SIDE)), np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)


class Pictures(Dataset[dict[str, Any]]):
    """The pictures of a folder; a caption beside each."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(path for path in folder.iterdir() if path.suffix not in (".txt", ".md"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        caption = path.with_suffix(".txt").read_text(encoding="utf-8")
        return {"image": to_tensor(Image.open(path)), "caption": caption, "key": path.stem}


def streamed(folder: Path) -> Any:
    """The tars of a folder, in order: without shuffling, whose seeds webdataset draws anew in every
    process."""
    import webdataset as wds

    urls = sorted(str(path) for path in folder.glob("*.tar"))
    pairs = wds.WebDataset(urls, shardshuffle=False, nodesplitter=wds.split_by_node)
    pairs = pairs.decode("pil").to_tuple("png", "txt", "__key__")
    return pairs.map(lambda each: {"image": to_tensor(each[0]), "caption": each[1], "key": each[2]})


class Denoiser(lightning.LightningModule):
    """ballast: MB of a frozen part, which Lightning's checkpoints hold too."""

    def __init__(self, ballast: int = 0) -> None:
        super().__init__()
        self.unet = UNet2DModel(
            sample_size=SIDE,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        )
        self.scheduler = DDPMScheduler()
        self.register_buffer("frozen", torch.zeros(ballast * 2**18))

    def training_step(self, batch: dict[str, Any], batch_index: int) -> torch.Tensor:
        x0 = batch["image"]
        noise = torch.randn_like(x0)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(x0),))
        x_t = self.scheduler.add_noise(x0, noise, t)
        loss = mse_loss(self.unet(x_t, t).sample, noise)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.unet.parameters(), lr=1e-3)


class Seen(Callback):
    """Writes down what is trained on, for the comparison."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, _: int
    ) -> None:
        sums = [zlib.crc32(image.numpy().tobytes()) for image in batch["image"]]
        row = {"keys": list(batch["key"]), "captions": list(batch["caption"]), "pixels": sums}
        with (self.folder / f"seen-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps({"step": trainer.global_step, **row}) + "\n")


class Fault(Callback):
    """Faults at steps counted from 0, on rank 0 or the one they name."""

    def __init__(self, faults: dict[str, dict[str, Any]]) -> None:
        self.faults = faults

    def now(self, name: str, trainer: Any) -> dict[str, Any] | None:
        where = self.faults.get(name)
        if where is None or where.get("rank", 0) != trainer.global_rank:
            return None
        first = where["step"]
        return where if first <= trainer.global_step <= where.get("last", first) else None

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if self.now("nan", trainer):
            batch["image"].fill_(float("nan"))
        if where := self.now("sleep", trainer):
            time.sleep(where["seconds"])
        if where := self.now("signal_worker", trainer):
            pid = multiprocessing.active_children()[0].pid
            assert pid is not None
            os.kill(pid, where["number"])
        for number in (self.now("signals", trainer) or {}).get("numbers", ()):
            os.kill(os.getpid(), number)
        if self.now("fail", trainer):
            raise RuntimeError(f"a fault of this rank alone, at {time.monotonic()}")

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        if self.now("inf", trainer):
            gradient = next(module.unet.parameters()).grad
            gradient.view(-1)[0] = float("inf")

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: Any) -> None:
        if where := self.now("signal_in_save", trainer):
            os.kill(os.getpid(), where["number"])


def options_of(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=-1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--keep", type=int, default=-1)
    parser.add_argument("--ballast", type=int, default=0)
    parser.add_argument("--tracker", choices=("none", "tensorboard", "wandb"), default="none")
    parser.add_argument("--faults", type=json.loads, default={})
    parser.add_argument("--tars", action="store_true")
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args(words)


def main(words: list[str]) -> None:
    options = options_of(words)
    if "largest_file" in options.faults:
        size = options.faults.pop("largest_file")["size"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    lightning.seed_everything(0, workers=True)
    data = streamed(options.data) if options.tars else Pictures(options.data)
    batches = DataLoader(data, options.batch, shuffle=not options.tars, num_workers=options.workers)
    checkpoints = ModelCheckpoint(
        options.out / "checkpoints", "{step}", every_n_train_steps=options.every,
        save_top_k=options.keep, save_last=True,
    )  # fmt: skip
    loggers = {
        "none": lambda: False,
        "tensorboard": lambda: TensorBoardLogger(options.out, name="", version="tensorboard"),
        "wandb": lambda: WandbLogger(project="plain", save_dir=options.out),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    trainer = lightning.Trainer(
        max_steps=options.steps,
        max_epochs=options.epochs,
        accelerator="cpu",
        devices=options.devices,
        strategy="ddp" if options.devices > 1 else "auto",
        callbacks=[checkpoints, Seen(options.out), Fault(options.faults)],
        logger=loggers[options.tracker](),
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Denoiser(options.ballast), batches, ckpt_path="last" if options.resume else None)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
