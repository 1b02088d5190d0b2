"""`data inspect`: a contact sheet of training samples, exactly as the trainer uses them, and the
number of pictures of each shape and in each bucket."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from trainer.common.version import name_and_version
from trainer.config.schema import Recipe
from trainer.data.buckets import Bucketed, Size
from trainer.data.concept_data import ConceptData
from trainer.data.folder_photos import Photos
from trainer.data.found import found_when_opened
from trainer.data.loader import Batch, Planned
from trainer.data.source import Dataset
from trainer.data.tars.reader import Tars
from trainer.media.grids import wrap
from trainer.media.images import to_pil, upright_size
from trainer.media.made_by import png_bytes, with_facts
from trainer.runs.adapter import load_base
from trainer.training.build import needs, placement_of, step_plan
from trainer.training.tasks.denoise import kept_captions, seeds_of

SIDE, PAD, LINE, COLUMNS = 192, 8, 14, 4
FRAMES = 4  # of a clip that are shown side by side
LEFT_OUT = (255, 0, 255)  # the colour over latents that the mask excludes from the loss
BAR = 40  # characters of the longest bar


def inspect(recipe: Recipe, count: int, step: int, out: Path) -> Iterator[str]:
    """Writes `count` samples, from micro-batch `step` on, to the PNG `out`; yields lines with
    histograms, skipped samples and the file."""
    placement = placement_of(recipe.run)
    backbone = load_base(recipe.backbone, recipe.backbone_name, placement, hold=False)
    train, _ = recipe.data.open(needs(recipe, backbone))
    batches = Planned(train, step_plan(recipe, train), moments=None, rank=0, world_size=1)
    cells: list[Image.Image] = []
    keys: list[str] = []
    while len(cells) < count:
        batch = batches[step].to(torch.device("cpu"))
        if batch.pixels is None:
            raise ValueError(
                "this data is stored as latents, without pictures to draw; inspect the data that "
                "the latents were made of"
            )
        captions = seen_captions(recipe, batch)
        cells += [_cell(batch, i, captions[i]) for i in range(len(batch.keys))]
        keys += batch.keys
        step += 1
    out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"recipe": recipe.name, "rows": keys[:count], "version": name_and_version()}
    out.write_bytes(png_bytes(with_facts(_sheet(cells[:count]), facts)))
    shapes = originals(train)
    if shapes:
        yield from _histogram("pictures as stored, by aspect ratio", map(_aspect, shapes))
    seen = Counter[str]()
    for group, size in zip(train.groups, _sizes(train, batch), strict=True):
        seen[f"{size[0]}x{size[1]}"] += len(group)
    yield from _histogram("buckets, width x height", seen)
    yield from found_when_opened(recipe.data, train)
    yield from (f"skipped {reason}" for reason in train.skipped)
    yield str(out)


def seen_captions(recipe: Recipe, batch: Batch) -> list[str]:
    """The captions of a training batch after dropout, as the task `denoise` encodes them."""
    seeds = seeds_of(batch, recipe.run.seed, "train")
    return kept_captions(batch.captions, seeds, recipe.objective.caption_dropout)


def originals(data: Dataset) -> list[Size]:
    """Width and height of each stored picture; empty if the source stores none."""
    if isinstance(data, Tars):
        return [(entry.width, entry.height) for _, entry in data.rows]
    if isinstance(data, Photos):
        return [upright_size(row.path) for row in data.rows]
    if isinstance(data, ConceptData):
        return [pair.shape for pair in data.pairs]
    return []


def _sizes(data: Dataset, batch: Batch) -> list[Size]:
    """The size of each group; without buckets that of the batch."""
    if isinstance(data, Bucketed):
        return list(data.sizes)
    assert batch.pixels is not None
    height, width = batch.pixels.shape[-2:]
    return [(width, height)] * len(data.groups)


def _histogram(title: str, found: Iterator[str] | Counter[str]) -> Iterator[str]:
    counts = Counter(found)
    most = max(counts.values())
    yield f"{title}:"
    for name, number in sorted(counts.items()):
        yield f"  {name:>10} {number:>7} {'#' * max(1, round(BAR * number / most))}"


def _aspect(shape: Size) -> str:
    """To the nearest tenth, as in 1.5:1 and 1:1.5."""
    wide, tall = shape
    return f"{wide / tall:.1f}:1" if wide >= tall else f"1:{tall / wide:.1f}"


def _cell(batch: Batch, index: int, caption: str) -> Image.Image:
    """One sample: its picture, scaled to fit, with excluded latents marked, and its facts."""
    assert batch.pixels is not None
    frames = batch.pixels[index * batch.frames : (index + 1) * batch.frames]
    shown = [frames[i] for i in _spread(len(frames))]
    mask = None if batch.masks is None else batch.masks[index]
    pictures = [_marked(frame, mask) for frame in shown]
    wide, tall = pictures[0].size
    scale = min(SIDE / wide / len(pictures), SIDE / tall)
    size = max(1, round(wide * scale)), max(1, round(tall * scale))
    kind = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    lines = [
        f"step {batch.step} place {batch.positions[index]}  {wide}x{tall}"
        + (f" x {batch.frames} frames" if batch.frames > 1 else ""),
        f"{batch.keys[index]}  weight {float(batch.weights[index]):g}",
        *wrap(caption or "(caption dropped)" if batch.captions[index] else "(no caption)", SIDE),
    ]
    cell = Image.new("RGB", (SIDE, SIDE + 4 + LINE * len(lines)), "white")
    for number, picture in enumerate(pictures):
        cell.paste(picture.resize(size, kind), (number * size[0], 0))
    pen = ImageDraw.Draw(cell)
    for number, line in enumerate(lines):
        fill = "red" if number > 1 and not caption else "black"
        pen.text((0, SIDE + 4 + number * LINE), line, fill=fill)
    return cell


def _spread(count: int) -> Sequence[int]:
    shown = min(FRAMES, count)
    return [round(i * (count - 1) / max(1, shown - 1)) for i in range(shown)]


def _marked(frame: Tensor, mask: Tensor | None) -> Image.Image:
    """The picture (3, H, W), half magenta where its mask of latents (1, h, w) is 0."""
    picture = to_pil(frame)
    if mask is None:
        return picture
    whole = torch.nn.functional.interpolate(mask[None].float(), frame.shape[-2:], mode="nearest")
    share = Image.fromarray(np.uint8(127 * (1 - whole[0, 0].numpy())))
    return Image.composite(Image.new("RGB", picture.size, LEFT_OUT), picture, share)


def _sheet(cells: Sequence[Image.Image]) -> Image.Image:
    rows = [cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)]
    heights = [max(cell.height for cell in row) for row in rows]
    width = PAD + min(COLUMNS, len(cells)) * (SIDE + PAD)
    sheet = Image.new("RGB", (width, PAD + sum(heights) + PAD * len(rows)), "white")
    top = PAD
    for row, height in zip(rows, heights, strict=True):
        for number, cell in enumerate(row):
            sheet.paste(cell, (PAD + number * (SIDE + PAD), top))
        top += height + PAD
    return sheet
