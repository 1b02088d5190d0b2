"""Data source `world`: scenes of the embedded world, drawn from a seed when they are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from trainer.common.seeds import seed_of
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
    reference: Literal["picture", "object"] = Field(
        "picture",
        description="the reference picture of a scene, for methods that read one: the scene "
        "itself, or its first object alone on a background of another colour",
    )
    unnamed: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the captions that call that object an object, so that what it is "
        "can be learned from the reference picture alone",
    )
    validation: int = Field(128, ge=0, description="unseen scenes for the validation loss")

    def epoch(self) -> int:
        return self.count

    def open(self, needs: Needs) -> tuple[Dataset, Dataset | None]:
        def scenes(seed: int, count: int) -> Scenes:
            return Scenes(
                seed,
                count=count,
                sprites=self.sprites,
                side=needs.resolution,
                told=FirstObject(self.reference == "object", self.unnamed),
            )

        train = scenes(self.seed, self.count)
        if not self.validation:
            return train, None
        return train, scenes(self.seed + HELD_OUT_SEED, self.validation)


@dataclass(frozen=True)
class FirstObject:
    """How the first object of a scene is told. alone: its reference picture shows it alone;
    unnamed: the share of captions that do not name it."""

    alone: bool = False
    unnamed: float = 0.0

    def __str__(self) -> str:
        return "" if self == FirstObject() else f"-{self.alone}-{self.unnamed}"


class Scenes:
    """Sample i is scene i of a seed, `side` pixels wide, with one caption."""

    shares: Sequence[float] = (1.0,)
    weights: Sequence[float] = (1.0,)
    frames: Sequence[int] = (1,)
    rates: Sequence[float] = ()
    fixed = True
    skipped: Sequence[str] = ()

    def __init__(
        self, seed: int, *, count: int, sprites: str, side: int, told: FirstObject | None = None
    ) -> None:
        from trainer.data.world import sprites as table

        self.seed, self.count, self.sprites, self.side = seed, count, sprites, side
        self.told = told or FirstObject()
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

    def reference(self, index: int) -> Tensor | None:
        """See `Referenced`."""
        from PIL import Image

        from trainer.data.world.object_pictures import alone, first_object
        from trainer.data.world.scenes import draw_layout
        from trainer.media.images import resize_cover, to_tensor

        if not self.told.alone:
            return None
        layout = draw_layout(self.seed, index, self.names)
        shown = alone(first_object(layout), (self.seed, index), other_than=layout.background)
        return to_tensor(resize_cover(Image.fromarray(shown), self.side))[None]

    def caption(self, index: int, rng: np.random.Generator) -> str:
        from trainer.data.world.object_pictures import without_name
        from trainer.data.world.scenes import draw_layout

        layout = draw_layout(self.seed, index, self.names)
        hidden = seed_of(self.seed, index, "unnamed") / 2**63 < self.told.unnamed
        return without_name(layout) if hidden else layout.caption

    def fingerprint(self) -> str:
        return f"world-1-{self.seed}-{self.count}-{self.sprites}-{self.side}"

    def identity(self) -> dict[str, str]:
        return {"scenes": f"{self.fingerprint()}{self.told}"}
