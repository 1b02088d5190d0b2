"""A minimal training loop in the style of diffusers' examples: `accelerator.save_state` every so
many steps, and on going on `load_state`, the step from the folder's name and `skip_first_batches`.

    python bench/_accelerate_loop.py --data ./pictures --out ./out --steps 24 [--resume]

bench/faults.py holds it against resuming and NaN, with the model and pictures of
_plain_lightning.py.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from pathlib import Path
from typing import Any

import torch
from _plain_lightning import Denoiser, Pictures
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader


def options_of(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--stop", type=int, help="the process ends after this step's checkpoint")
    parser.add_argument("--faults", type=json.loads, default={})
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args(words)


def main(words: list[str]) -> None:
    options = options_of(words)
    accelerator = Accelerator(cpu=True)
    set_seed(0)
    module = Denoiser()
    unet, noise_scheduler = module.unet, module.scheduler
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    lr_scheduler = get_scheduler("constant", optimizer=optimizer)
    batches = DataLoader(
        Pictures(options.data), options.batch, shuffle=True, num_workers=options.workers
    )
    unet, optimizer, batches, lr_scheduler = accelerator.prepare(
        unet, optimizer, batches, lr_scheduler
    )
    per_epoch = len(batches)
    global_step = first_epoch = skipped = 0
    options.out.mkdir(parents=True, exist_ok=True)
    if options.resume:
        folders = options.out.glob("checkpoint-*")
        newest = max(folders, key=lambda path: int(path.name.split("-")[1]))
        accelerator.load_state(str(newest))
        global_step = int(newest.name.split("-")[1])
        first_epoch, skipped = divmod(global_step, per_epoch)
    for epoch in range(first_epoch, math.ceil(options.steps / per_epoch)):
        active = batches
        if epoch == first_epoch and skipped:
            active = accelerator.skip_first_batches(batches, skipped)
        for batch in active:
            spoil(options.faults, global_step, batch)
            x0 = batch["image"]
            noise = torch.randn_like(x0)
            t = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(x0),))
            x_t = noise_scheduler.add_noise(x0, noise, t)
            loss = mse_loss(unet(x_t, t).sample, noise)
            accelerator.backward(loss)
            if global_step == options.faults.get("inf", {}).get("step"):
                next(unet.parameters()).grad.view(-1)[0] = float("inf")
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            global_step += 1
            write_down(options.out, global_step, batch)
            accelerator.save_state(str(options.out / f"checkpoint-{global_step}"))
            if global_step == options.stop:
                return
            if global_step >= options.steps:
                break
    accelerator.end_training()


def spoil(faults: dict[str, dict[str, Any]], step: int, batch: dict[str, Any]) -> None:
    if step == faults.get("nan", {}).get("step"):
        batch["image"].fill_(float("nan"))


def write_down(folder: Path, step: int, batch: dict[str, Any]) -> None:
    sums = [zlib.crc32(image.numpy().tobytes()) for image in batch["image"]]
    row = {"step": step, "keys": list(batch["key"]), "pixels": sums}
    with (folder / "seen-0.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
