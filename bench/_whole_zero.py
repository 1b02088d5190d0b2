"""Text2Video-Zero's background smoothing (arXiv 2303.13439, section 3.3.3): how much the background
of a clip changes from frame to frame, with it and without."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from _common import Bars
from _runs import Runs
from torch import Tensor

from trainer.backbones import load_backbone
from trainer.config.lineage import backbone_spec
from trainer.data.world.scenes import article
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.evaluation.clip_scores import named_right
from trainer.evaluation.judge import Judge
from trainer.evaluation.shares import share
from trainer.methods.apply import apply_methods
from trainer.methods.feature.text2video_zero import Text2VideoZero

WORDS, COLOURS = ("fox", "apple", "rocket"), ("blue", "green", "gray")
LOOK = Sampling(steps=20, guidance=4, frames=6)
FAR = 0.15  # of the range of colours: what is no background
NEAR = 2  # pixels around that


def painted(word: str, **options: Any) -> Tensor:
    """Clips (n, f, 3, H, W) in [0, 1] of one word on each background."""
    model = load_backbone(backbone_spec("tiny"), "tiny").eval().requires_grad_(False)
    apply_methods(model, {"text2video_zero": Text2VideoZero(**options)}, trains=False)
    prompts = [f"{article(word)} on a {colour} background" for colour in COLOURS]
    pictures = sample(model, prompts, range(len(prompts)), settings=LOOK)
    return (pictures.unflatten(0, (-1, LOOK.frames)) / 2 + 0.5).clamp(0, 1)


def change(clips: Tensor) -> Tensor:
    """Mean distance of neighbouring frames of clips (n, f, 3, H, W), (n,), where both show
    background: near the median colour of their own edges, and not beside something else."""
    edges = torch.cat([clips[..., 0, :], clips[..., -1, :], clips[..., 0], clips[..., -1]], -1)
    colour = edges.median(-1).values[..., None, None]  # n f 3 1 1
    other = ((clips - colour).abs().amax(2) > FAR).float()  # n f h w
    free = 1 - F.max_pool2d(other, 2 * NEAR + 1, stride=1, padding=NEAR)
    both = free[:, 1:] * free[:, :-1]
    apart = clips.diff(dim=1).abs().mean(2)
    return (apart * both).sum((1, 2, 3)) / both.sum((1, 2, 3))


def background(bars: Bars, runs: Runs) -> None:
    """With both, whether the object is right in most frames."""
    judge = Judge(load_backbone(backbone_spec("tiny"), "tiny").folder / "clip")
    found: dict[str, dict[str, Any]] = {}
    words = WORDS[:1] if bars.quick else WORDS
    for name in ("plain", "smoothed"):
        every = [painted(word, object=word if name == "smoothed" else None) for word in words]
        named = [
            named_right(judge, clips * 2 - 1, [word] * len(clips)).float().mean(1) > 0.5
            for word, clips in zip(words, every, strict=True)
        ]
        moved = change(torch.cat(every))
        found[name] = {
            "background_change": float(moved.mean()),
            "by_clip": [round(float(x), 5) for x in moved],
            "object_right": share(torch.cat(named).tolist()),
        }
    bars.note("text2video_zero", found)
    ratio = found["smoothed"]["background_change"] / found["plain"]["background_change"]
    bars.note("text2video_zero_background_change_over_plain", ratio)
