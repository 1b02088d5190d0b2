"""Teaches the text encoder where the second sprite of a pair stands, before the U-Net trains on it.

    python data/tiny/make_text.py --start-from data/tiny --out made

A CLIP text encoder reads from left to right and learns from pictures that hold the same sprites
whichever way round they stand, so in "a fox left of a cat" its state at `cat` hardly knows of
`left`, and a U-Net that trains on it finds no slope towards relations. Here that state is moved by
`SHIFT` along one of two fixed directions, right-left and down-up, as the relation says; every other
state of every caption is held where it was. Text alone: no picture is drawn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from trainer.data.world.scenes import RELATIONS, Layout, draw_layout
from trainer.data.world.sprites import ALL

SEED = 31
SHIFT = 6.0  # of states whose norm is about 11


def moved(
    plan: Layout, ids: list[int], words: dict[int, str], directions: Tensor
) -> tuple[int, Tensor] | None:
    """Place of the second sprite's token and how its state is to move; None where no relation is
    stated."""
    if plan.relation is None:
        return None
    places = [place for place, token in enumerate(ids) if token in words]
    dx, dy = RELATIONS[plan.relation]
    return places[1], SHIFT * (dx * directions[0] + dy * directions[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start-from", type=Path, default=Path(__file__).parent)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()
    torch.manual_seed(SEED)
    folder = options.start_from / "text_encoder"
    teacher = CLIPTextModel.from_pretrained(folder, dtype=torch.float32).eval()
    student = CLIPTextModel.from_pretrained(folder, dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(options.start_from / "tokenizer")
    words = {tokenizer.convert_tokens_to_ids(f"{word}</w>"): word for word in ALL}
    directions = torch.linalg.qr(torch.randn(teacher.config.hidden_size, 2)).Q.T
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for step in range(options.steps):
        plans = [draw_layout(SEED, step * options.batch + i, ALL) for i in range(options.batch)]
        tokens = tokenizer(
            [plan.caption for plan in plans],
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            target = teacher(tokens.input_ids).last_hidden_state.clone()
        weight = torch.ones(target.shape[:2])
        rows = []
        for row, plan in enumerate(plans):
            found = moved(plan, tokens.input_ids[row].tolist(), words, directions)
            if found is not None:
                place, by = found
                target[row, place] += by
                weight[row, place] = target.shape[1]
                rows.append((row, place))
        state = student(tokens.input_ids).last_hidden_state
        error = (state - target).square().sum(-1)
        loss = (error * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == options.steps - 1:
            second = torch.stack([error[row, place] for row, place in rows]).mean()
            print(
                f"step {step} squared error a state: all {error.mean():.3f}, "
                f"second sprites {second:.3f} of {SHIFT**2:.0f}",
                flush=True,
            )
    student.half().save_pretrained(options.out / "text_encoder", safe_serialization=True)


if __name__ == "__main__":
    main()
