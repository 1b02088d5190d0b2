"""Data source `world`: scenes of the embedded world, drawn from a seed when they are used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from trainer.data.crops import Crop, square
from trainer.data.depth import as_depth
from trainer.data.source import Dataset, Needs, Sample, Source
from trainer.data.source_options import Sprites, WorldSeed

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

HELD_OUT_SEED = (
    1_000_003  # added to the seed for validation scenes, so that they are not training scenes
)


class World(Source):
    """Scenes of sprites whose words, boxes and relations are known."""

    count: int = Field(20_000, gt=0, description="scenes to train on")
    sprites: Sprites = "known"
    seed: WorldSeed = 0
    validation: int = Field(128, ge=0, description="unseen scenes for the validation loss")

    def epoch(self) -> int:
        return self.count

    def open(self, needs: Needs) -> tuple[Dataset, Dataset | None]:
        def scenes(seed: int, count: int) -> Scenes:
            return Scenes(seed, count=count, sprites=self.sprites, side=needs.resolution)

        train = scenes(self.seed, self.count)
        if not self.validation:
            return train, None
        return train, scenes(self.seed + HELD_OUT_SEED, self.validation)


class Scenes:
    """Sample i is scene i of a seed, `side` pixels wide, with one caption."""

    shares: Sequence[float] = (1.0,)
    weights: Sequence[float] = (1.0,)
    frames: Sequence[int] = (1,)
    rates: Sequence[float] = ()
    fixed = True
    skipped: Sequence[str] = ()

    def __init__(self, seed: int, *, count: int, sprites: str, side: int) -> None:
        from trainer.data.world import sprites as table

        self.seed, self.count, self.sprites, self.side = seed, count, sprites, side
        self.names = table.SETS[sprites]
        self.groups: Sequence[range] = (range(count),)

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        image, caption = self.image(index), self.caption(index, rng)
        return Sample(image=image, caption=caption, key=self.key(index))

    def crop(self, index: int) -> Crop:
        """See `Cropped`."""
        return square(self.side)

    def key(self, index: int) -> str:
        return f"scene-{self.seed}-{index}"

    def image(self, index: int) -> Tensor:
        from PIL import Image

        from trainer.data.world.scenes import draw_scene
        from trainer.media.images import resize_cover, to_tensor

        scene = draw_scene(self.seed, index, self.names)
        image = resize_cover(Image.fromarray(scene.image), self.side)
        return to_tensor(image)

    def depth(self, index: int) -> Tensor:
        """See `Layered`."""
        from trainer.data.world.scenes import draw_scene, nearness

        scene = draw_scene(self.seed, index, self.names)
        return as_depth(nearness(scene.objects)[None], self.side)

    def caption(self, index: int, rng: np.random.Generator) -> str:
        from trainer.data.world.scenes import draw_layout

        return draw_layout(self.seed, index, self.names).caption

    def fingerprint(self) -> str:
        return f"world-1-{self.seed}-{self.count}-{self.sprites}-{self.side}"

    def identity(self) -> dict[str, str]:
        return {"scenes": self.fingerprint()}
