"""Trains the second judge, a convolutional network, on clean scenes of all 80 sprites.

python data/tiny/make_second_judge.py --steps 700 --out data/tiny/second_judge

Every cell of an 8x8 grid is told its sprite, or that it is empty. No picture is bent or blurred,
and none goes through the VAE.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from trainer.data.world.scenes import SCENE_SIDE, draw_scene
from trainer.data.world.sprites import ALL
from trainer.evaluation.second_judge import GRID, CellNamer

SEED = 47
WIDTH = 32
CELL = SCENE_SIDE // GRID
EMPTY_WEIGHT = 0.1  # most cells are empty, and soon known as such
NUMBER = {word: number for number, word in enumerate(ALL)}


def batch(start: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (size, 3, 64, 64) in [-1, 1], and the number of each cell's sprite (size, 8, 8): the
    count of sprites where it is empty, -1 where it shows only an edge."""
    scenes = [draw_scene(SEED, start + i, ALL) for i in range(size)]
    images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2)
    labels = torch.full((size, GRID, GRID), -1)
    for row, scene in enumerate(scenes):
        covered = np.zeros((GRID, GRID))
        for item in scene.objects:
            share = item.mask.reshape(GRID, CELL, GRID, CELL).mean((1, 3))
            labels[row][torch.from_numpy(share > 0.4)] = NUMBER[item.word]
            covered += share
        labels[row][torch.from_numpy(covered == 0)] = len(ALL)
    return images.float() / 127.5 - 1, labels


@torch.no_grad()
def accuracy(network: CellNamer, count: int) -> float:
    """The share of unseen scenes of one sprite that are named right among all sprites."""
    right = 0
    for start in range(0, count, 100):
        scenes = [draw_scene(SEED + 1, start + i, ALL, count=1) for i in range(100)]
        images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2)
        mass = network(images.float() / 127.5 - 1).softmax(1)[:, :-1].sum((2, 3))
        named = [ALL[number] for number in mass.argmax(1).tolist()]
        right += sum(a == scene.objects[0].word for a, scene in zip(named, scenes, strict=True))
    return right / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "second_judge")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    network = CellNamer(len(ALL), WIDTH)
    weight = torch.tensor([1.0] * len(ALL) + [EMPTY_WEIGHT])
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.lr, weight_decay=0.02)
    begin = time.time()
    for step in range(options.steps):
        rate = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1, (step + 1) / 100) * rate
        images, labels = batch(step * options.batch, options.batch)
        loss = F.cross_entropy(network(images), labels, weight=weight, ignore_index=-1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step} {time.time() - begin:.0f}s loss {loss.item():.4f}", flush=True)
        if step % 200 == 0:
            print(f"  accuracy {accuracy(network, 400):.3f}", flush=True)
    print(f"accuracy on 2000 unseen scenes {accuracy(network, 2000):.4f}")
    options.out.mkdir(parents=True, exist_ok=True)
    weights = {key: value.half().contiguous() for key, value in network.state_dict().items()}
    save_file(weights, options.out / "model.safetensors")
    facts = {"width": WIDTH, "words": list(ALL)}
    (options.out / "config.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main()
