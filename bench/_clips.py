"""What `video.py` asks of trained models: clips by captions of the world, one clip edited, and
contact sheets of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import log10
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _runs import Run, Runs
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import Tensor, nn

from trainer.backbones import load_backbone
from trainer.cli.sample_source import INVERTING
from trainer.config.schema import Recipe
from trainer.data.world.clips import DIRECTIONS, Clip, draw_clip
from trainer.data.world.scenes import article
from trainer.data.world.sprites import KNOWN
from trainer.diffusion.inversion import invert
from trainer.diffusion.sampler import sample, sample_many
from trainer.diffusion.sampling_settings import Sampling
from trainer.evaluation.clip_scores import asked, named_right, tracks
from trainer.evaluation.judge import Judge
from trainer.media.images import to_tensor
from trainer.runs.adapter import load_adapted
from trainer.training.build import needs

SEED = 424_245  # clips that no training drew
AT_ONCE = 64  # pictures


def shots(count: int, frames: int) -> list[Clip]:
    """Clips of one object each, the four directions in turn."""
    ways = list(DIRECTIONS)
    return [
        draw_clip(SEED, i, KNOWN, frames=frames, motion=ways[i % len(ways)]) for i in range(count)
    ]


def pixels(clips: Sequence[Clip]) -> Tensor:
    """(n, f, 3, H, W) in [-1, 1]"""
    return torch.stack(
        [torch.stack([to_tensor(Image.fromarray(frame)) for frame in c.frames]) for c in clips]
    )


class Model:
    """What a finished run has made of its backbone, the backbone, and the judge that goes with
    it. adapter: a file in the place of the run's own, which then need not be there."""

    def __init__(self, runs: Runs, run: Run, adapter: Path | None = None) -> None:
        self.recipe: Recipe = runs.recipe(run)
        self.adapted, _ = load_adapted(adapter or runs.place(run) / "adapter.safetensors")
        self.base = load_backbone(self.recipe.backbone, self.recipe.backbone_name).eval()
        self.judge = Judge(self.base.folder / "clip")

    def paint(
        self,
        model: Any,
        prompts: Sequence[str],
        frames: int = 1,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """As the recipe's evaluation is: (n * frames, 3, H, W), by seeds 0, 1, ... inputs: as of
        `sample_many`."""
        look, at_once = self.recipe.evaluate, max(1, AT_ONCE // frames)
        how = Sampling(look.steps, look.guidance, look.negative, frames=frames)
        return sample_many(
            model,
            prompts,
            range(len(prompts)),
            settings=how,
            batch_size=at_once,
            inputs=inputs,
        )

    def through_vae(self, clips: Tensor) -> Tensor:
        """(n, f, 3, H, W), encoded without noise and decoded."""
        parts = [self.base.decode(self.latents(part)) for part in clips.flatten(0, 1).split(64)]
        return torch.cat(parts).view_as(clips)

    def latents(self, pictures: Tensor) -> Tensor:
        moments = self.base.moments(pictures)
        return self.base.latents(moments, torch.zeros_like(moments.chunk(2, 1)[0]))


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@dataclass(frozen=True)
class Source:
    """The one clip that a run has learned, (f, 3, H, W), and its caption."""

    model: Model
    pictures: Tensor
    caption: str

    @classmethod
    def of(cls, runs: Runs, run: Run) -> Source:
        model = Model(runs, run)
        data, _ = model.recipe.data.open(needs(model.recipe, model.base))
        return cls(model, data.image(0), data.caption(0, np.random.default_rng(0)))

    @property
    def frames(self) -> int:
        return len(self.pictures)

    def inverted(self, model: Any) -> Tensor:
        """The noise it is painted from, as the verb `sample` finds it."""
        steps = self.model.recipe.evaluate.steps
        latents = self.model.latents(self.pictures)
        return invert(model, latents, [""], steps=steps, frames=self.frames, iterations=INVERTING)

    def again(self, model: Any, start: Tensor, prompts: Sequence[str], guidance: float) -> Tensor:
        """Clips (n, f, 3, H, W) from that noise."""
        how = Sampling(self.model.recipe.evaluate.steps, guidance, frames=self.frames)
        seeds, begun = range(len(prompts)), start.repeat(len(prompts), 1, 1, 1)
        painted = sample(model, prompts, seeds, settings=how, start=begun)
        return painted.unflatten(0, (-1, self.frames))

    def reconstructed(self, start: Tensor) -> tuple[dict[str, float], dict[str, Tensor]]:
        """How near to the clip, in dB, and what it looks like: through the VAE alone, which bounds
        the others; from its noise, and from that with its caption and the recipe's guidance."""
        look, model = self.model.recipe.evaluate, self.model.adapted
        found = {
            "through the VAE": self.model.through_vae(self.pictures[None])[0],
            "reconstructed": self.again(model, start, [""], 1.0)[0],
            "by its caption": self.again(model, start, [self.caption], look.guidance)[0],
        }
        return {name: psnr(each, self.pictures) for name, each in found.items()}, found

    def edited(self, model: Any, start: Tensor, words: Sequence[str]) -> Tensor:
        """The clip with each of these sprites in the place of its own."""
        own = str(asked(self.caption)[0])
        prompts = [self.caption.replace(article(own), article(word)) for word in words]
        return self.again(model, start, prompts, self.model.recipe.evaluate.guidance)

    def kept(self, edits: Tensor, words: Sequence[str]) -> dict[str, list[float]]:
        """Of each edit: correlation of the new object's track with the source's, and the share of
        frames in which it is named right."""
        judge, own = self.model.judge, [str(asked(self.caption)[0])] * len(words)
        source = tracks(judge, self.pictures.expand_as(edits), own)
        return {
            "correlation": tracks(judge, edits, words).like(source).tolist(),
            "named_right": named_right(judge, edits, words).float().mean(1).tolist(),
        }


def psnr(one: Tensor, other: Tensor) -> float:
    """In dB, of pictures in [-1, 1]."""
    return 10 * log10(4 / float((one - other).square().mean()))


def film_of(package: str, file: str) -> Path | None:
    """A video that an installed package ships; the package is not imported."""
    from importlib.util import find_spec

    spec = find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    return next(
        (path for path in (Path(folder, file) for folder in folders) if path.is_file()), None
    )
