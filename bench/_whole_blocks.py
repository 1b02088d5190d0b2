"""VDM's guidance by reconstruction in `whole.py`: longer clips in blocks, frames filled in, larger
clips; each beside the replacement method or what needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _clips import pixels, psnr, shots
from _common import RESULTS, Bars
from _runs import Runs
from torch import Tensor
from torch.nn.functional import interpolate

from trainer.common.paths import DATA
from trainer.diffusion.blocks import RECONSTRUCTION, Blocks
from trainer.diffusion.known_frames import KnownFrames
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.evaluation.clip_scores import asked, named_right
from trainer.evaluation.judge import Judge
from trainer.media.grids import grid
from trainer.runs.adapter import load_adapted

SIZE, OVERLAP, BLOCKS = 8, 2, 2  # frames that the modules were trained on; and of a long clip
FRAMES = SIZE + (BLOCKS - 1) * (SIZE - OVERLAP)
CLIPS, STEPS, GUIDANCE = 4, 12, 4.0
FILLED, EVERY, SHRINK = 9, 4, 4  # known is every fourth frame, or a clip of a quarter of the size
SEED = 20_000


@dataclass(frozen=True)
class Maker:
    """A model of clips, and how it samples them."""

    model: Any
    steps: int
    captions: Sequence[str]

    def clips(self, frames: int, known: KnownFrames | None = None, **options: Any) -> Tensor:
        """(n, frames, 3, H, W), a clip for each caption."""
        settings = Sampling(self.steps, GUIDANCE, frames=frames, **options)
        found = []
        for row, caption in enumerate(self.captions):
            own = None
            if known is not None:
                own = KnownFrames(known.latents[row : row + 1], known.at, known.shrink)
            found.append(sample(self.model, [caption], [SEED + row], settings=settings, known=own))
        return torch.stack(found)

    def latents(self, clips: Tensor) -> Tensor:
        """(n, f, 3, H, W) to (n, f, c, h, w), the mean of the VAE's posterior."""
        moments = self.model.moments(clips.flatten(0, 1))
        mean = moments.chunk(2, 1)[0]
        return self.model.latents(moments, torch.zeros_like(mean)).unflatten(0, clips.shape[:2])


def jump(clips: Tensor, borders: Sequence[int]) -> float:
    """The distance between the frames at the borders of blocks over that inside blocks, of clips
    (n, f, 3, H, W). borders: the first frame of each block that the one before does not have."""
    apart = clips.diff(dim=1).square().mean((2, 3, 4)).sqrt()  # n (f - 1)
    across = torch.zeros(apart.shape[1], dtype=torch.bool)
    across[[border - 1 for border in borders]] = True
    return float(apart[:, across].mean() / apart[:, ~across].mean())


def borders_of(blocks: Blocks, frames: int) -> list[int]:
    spans = blocks.spans(frames)
    return [before.stop for before in spans[:-1]]


def maker_of(adapter: Path, quick: bool) -> Maker:
    model, _ = load_adapted(adapter)
    captions = [clip.caption for clip in shots(2 if quick else CLIPS, SIZE)]
    return Maker(model.eval().requires_grad_(False), 2 if quick else STEPS, captions)


def blocks(bars: Bars, runs: Runs) -> None:
    """Clips of several blocks, by guidance and by replacement, from the same noise."""
    maker = maker_of(DATA / "tiny_motion" / "adapter.safetensors", bars.quick)
    long = Blocks(SIZE, OVERLAP)
    judge, own = Judge(maker.model.folder / "clip"), [asked(text)[0] for text in maker.captions]
    found, rows = {}, []
    for name, weight in (("replacement", 0.0), ("guidance", RECONSTRUCTION)):
        clips = maker.clips(FRAMES, blocks=long, reconstruction=weight)
        right = named_right(judge, clips, [str(word) for word in own]).float().mean()
        found[name] = {
            "jump": jump(clips, borders_of(long, FRAMES)),
            "apart": float(clips.diff(dim=1).square().mean().sqrt()),
            "named_right": float(right),
        }
        rows += [
            (f"{name}: {text}", clip) for text, clip in zip(maker.captions, clips, strict=True)
        ]
    sheet = grid(rows, side=64)
    folder = runs.folder if bars.quick else RESULTS
    sheet.quantize(256).save(folder / "whole_vdm.png", optimize=True)
    settings = {"block": SIZE, "overlap": OVERLAP, "frames": FRAMES, "weight": RECONSTRUCTION}
    bars.note(
        "vdm_blocks", {"clips": len(maker.captions), "steps": maker.steps, **settings, **found}
    )
    ratio = found["guidance"]["jump"] / found["replacement"]["jump"]
    if bars.quick:
        bars.note("vdm_jump_over_replacement", ratio)
    else:
        bars.at_most("vdm_jump_over_replacement", ratio, 0.7)


def completion(bars: Bars, runs: Runs) -> None:
    """Clips of which every fourth frame, or a small version, is known, against the clips; beside
    blending, enlarging, and the VAE alone, which bounds all."""
    maker = maker_of(DATA / "tiny_motion" / "adapter.safetensors", bars.quick)
    real = pixels(shots(len(maker.captions), FILLED))
    latents, at = maker.latents(real), tuple(range(0, FILLED, EVERY))
    middle = [number for number in range(FILLED) if number not in at]
    known = KnownFrames(latents[:, list(at)], at)
    between = {
        "vae": decoded(maker.model, latents),
        "blended": blended(real, at),
        "replacement": maker.clips(FILLED, known, reconstruction=0.0),
        "guidance": maker.clips(FILLED, known),
    }
    bars.note(
        "vdm_between_db", {k: psnr(x[:, middle], real[:, middle]) for k, x in between.items()}
    )
    small = KnownFrames.shrunk(latents[:, :SIZE], tuple(range(SIZE)), SHRINK)
    whole = real[:, :SIZE]
    larger = {
        "vae": between["vae"][:, :SIZE],
        "enlarged": enlarged(whole, SHRINK),
        "free": maker.clips(SIZE),
        "guidance": maker.clips(SIZE, small),
    }
    bars.note("vdm_larger_db", {name: psnr(x, whole) for name, x in larger.items()})


def decoded(model: Any, latents: Tensor) -> Tensor:
    found: Tensor = model.decode(latents.flatten(0, 1), latents.shape[1])
    return found.unflatten(0, latents.shape[:2])


def blended(clips: Tensor, at: Sequence[int]) -> Tensor:
    """The frames between known ones as their mixture by distance."""
    found = clips.clone()
    for before, after in pairwise(at):
        for number in range(before + 1, after):
            share = (number - before) / (after - before)
            found[:, number] = (1 - share) * clips[:, before] + share * clips[:, after]
    return found


def enlarged(clips: Tensor, factor: int) -> Tensor:
    """Shrunk by means, and enlarged by cubic interpolation."""
    rows = clips.flatten(0, 1)
    small = interpolate(rows, scale_factor=1 / factor, mode="area")
    large = interpolate(small, scale_factor=factor, mode="bicubic", align_corners=False)
    return large.clamp(-1, 1).view_as(clips)


PARTS = {"vdm": blocks, "vdm_completion": completion}
