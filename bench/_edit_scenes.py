"""Scenes of the world to be edited, edits of them, and what a judge and masks say of those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import log10
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from trainer.backbones import load_backbone
from trainer.backbones.backbone import Backbone
from trainer.config.lineage import backbone_spec
from trainer.config.load import methods_of
from trainer.data.world.scenes import (
    POSITIONS,
    Scene,
    Spot,
    article,
    background,
    compose,
    draw_scene,
)
from trainer.data.world.sprites import ALL, KNOWN
from trainer.diffusion.image_edit import (
    EditedPictures,
    EditJob,
    Inverted,
    edit_pictures,
    invert_picture,
)
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.evaluation.judge import Judge
from trainer.media.images import to_tensor
from trainer.methods.apply import apply_methods

SEED = 616_161  # scenes that no training drew
PLAIN = ("red", "blue", "green", "yellow")  # backgrounds that captions name
FAR = 0.25  # of a pixel's distance from the background, of its range, to be of an object
Methods = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Staged:
    """A scene composed for an edit: pixels (3, H, W) in [-1, 1], its prompt, and the masks (H, W)
    of its sprites by word."""

    pixels: Tensor
    prompt: str
    masks: Mapping[str, Tensor]
    colour: str


def staged(spots: Sequence[Spot], prompt: str, colour: str) -> Staged:
    image, placed = compose(spots, background(colour))
    masks = {one.word: torch.from_numpy(one.mask) for one in placed}
    return Staged(to_tensor(Image.fromarray(image)), prompt, masks, colour)


def one_sprite(number: int, place: str | None = None) -> Staged:
    """A sprite on one colour, in a place that the prompt names where one is given."""
    rng = np.random.default_rng((SEED, number))
    word, colour = str(rng.choice(KNOWN)), str(rng.choice(PLAIN))
    x, y = POSITIONS[place or "in the middle"]
    spot = Spot(word, x=x * 64, y=y * 64, size=28 if place else 36)
    told = f"{article(word)} {place}" if place else article(word)
    return staged([spot], f"{told} on a {colour} background", colour)


def two_sprites(number: int) -> Scene:
    """Two sprites, one left of the other or above it."""
    relation = ("left of", "above")[number % 2]
    return draw_scene(SEED + 1, number, KNOWN, count=2, relation=relation)


def other_word(number: int, *words: str) -> str:
    """A sprite that is none of these."""
    free = [word for word in KNOWN if word not in words]
    return free[(number * 7 + 3) % len(free)]


@dataclass(eq=False)
class Studio:
    """The model that edits, and its judge. count: scenes of a part; steps, guidance: of all
    sampling."""

    count: int
    steps: int = 50
    guidance: float = 5.0
    name: str = "tiny"
    made: dict[tuple[str, int], Inverted] = field(default_factory=dict)

    @cached_property
    def backbone(self) -> Backbone:
        found = load_backbone(backbone_spec(self.name), self.name)
        found.eval().requires_grad_(False)
        return found

    @cached_property
    def judge(self) -> Judge:
        """The one that the world's small model ships with."""
        folder = self.backbone.folder / "clip"
        if not folder.is_dir():
            folder = load_backbone(backbone_spec("tiny"), "tiny").folder / "clip"
        return Judge(folder)

    def settings(self, guidance: float | None = None, **more: Any) -> Sampling:
        return Sampling(self.steps, self.guidance if guidance is None else guidance, **more)

    def inverted(self, pixels: Tensor, prompt: str, guidance: float = 1.0) -> Inverted:
        """Without null-text embeddings: the source's rows are not guided."""
        how = self.settings(guidance)
        return invert_picture(self.backbone, pixels[None], prompt, settings=how)

    def edited(
        self, methods: Methods, prompts: Sequence[str], source: str | None, **job: Any
    ) -> EditedPictures:
        """By methods, which the model loses again."""
        how = job.pop("settings", None) or self.settings()
        seed = job.pop("seed", 0)
        apply_methods(self.backbone, methods_of(methods), trains=False)
        try:
            told = EditJob(prompts, source, seed=seed, settings=how, **job)
            return edit_pictures(self.backbone, told)
        finally:
            self.backbone.sampling_hooks.clear()

    def plain(self, prompt: str, start: Tensor | None = None, seed: int = 0, **more: Any) -> Tensor:
        """The prompt alone, from the same noise: (3, H, W)."""
        how = more.pop("settings", None) or self.settings()
        return sample(self.backbone, [prompt], [seed], settings=how, start=start)[0]

    def vae(self, pixels: Tensor) -> Tensor:
        """A picture (3, H, W) as the VAE has it."""
        from trainer.diffusion.source_clip import mean_latents

        return self.backbone.decode(mean_latents(self.backbone, pixels[None]))[0]

    def named(self, pictures: Sequence[Tensor]) -> list[str]:
        return self.judge.named(torch.stack(list(pictures)), ALL)

    def pairs(self, pictures: Sequence[Tensor]) -> list[list[str]]:
        """The two sprites that most of each picture shows."""
        return self.judge.found(torch.stack(list(pictures)), ALL).top(2)

    def centre(self, picture: Tensor, word: str) -> tuple[float, float]:
        x, y = self.judge.found(picture[None], [word]).centers[0, 0].tolist()
        return x, y


def psnr_where(one: Tensor, other: Tensor, where: Tensor) -> float:
    """In dB, of pictures (3, H, W) in [-1, 1] where a mask (H, W) is true."""
    error = (one - other).square()[:, where].mean()
    return 10 * log10(4 / max(float(error), 1e-9))


def foreground(picture: Tensor) -> Tensor:
    """True (H, W) where a picture (3, H, W) of one object is not as most of its rim."""
    rim = torch.cat([picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]], 1)
    colour = rim.median(1).values
    unlike = ((picture - colour[:, None, None]).abs().amax(0) / 2) > FAR / 2
    # of most of the pixels around it: single ones are noise of the VAE
    return F.avg_pool2d(unlike[None].float(), 3, stride=1, padding=1)[0] > 0.5


def iou(one: Tensor, other: Tensor) -> float:
    """Of two masks; 1 where both are empty."""
    union = (one | other).sum()
    return 1.0 if not union else float((one & other).sum() / union)


def box(mask: Tensor) -> Tensor:
    """The rectangle around a mask (H, W)."""
    found = torch.zeros_like(mask)
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    if len(rows):
        found[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1] = True
    return found


def nearest_of(places: Sequence[str], x: float, y: float) -> str:
    """The place, of some in `POSITIONS`, that a point of [0, 1] is nearest to."""
    return min(places, key=lambda at: (POSITIONS[at][0] - x) ** 2 + (POSITIONS[at][1] - y) ** 2)
