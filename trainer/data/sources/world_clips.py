"""Data source `world_clips`: clips of the embedded world, drawn from a seed when they are used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from trainer.data.crops import Crop, square
from trainer.data.depth import as_depth
from trainer.data.source import Dataset, Needs, Sample, Source
from trainer.data.source_options import Sprites, WorldSeed
from trainer.data.sources.world import HELD_OUT_SEED

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from trainer.data.world.clips import Clip


class WorldClips(Source):
    """Clips, one second long, of sprites that move."""

    count: int = Field(4_000, gt=0, description="clips to train on")
    frames: int = Field(8, gt=0, description="frames of a clip")
    fps: float | None = Field(
        None, gt=0, description="frames a second; null spreads the frames over the whole second"
    )
    sprites: Sprites = "known"
    motion: str | tuple[str, ...] | None = Field(
        None,
        description="the motion of all clips, of one object each, as in moving left, or several "
        "motions that take turns; null for clips of every kind",
    )
    any_moment: bool = Field(
        False,
        description="with frames=1: the frame is one of a random moment of its clip, not the first",
    )
    defect: Literal["watermark"] | None = Field(
        None,
        description="what spoils the frames of all clips and no caption says: watermark is a bar "
        "of light and dark stripes across their lower part; null for nothing",
    )
    detail: int = Field(
        1,
        gt=0,
        le=4,
        description="pixels that are drawn along an edge for each of the 64 of the world: 2 for as "
        "fine a picture at run.resolution=128, which otherwise is enlarged",
    )
    seed: WorldSeed = 0
    images: float = Field(
        0.0, ge=0, lt=1, description="share of the batches that are scenes of the source world"
    )
    validation: int = Field(128, ge=0, description="unseen clips for the validation loss")

    @field_validator("motion")
    @classmethod
    def _is_a_motion(cls, motion: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        from trainer.data.world.scenes import MOTIONS

        if motion is not None and (not motion or set(_each(motion)) - set(MOTIONS)):
            raise ValueError(f"choose one of {', '.join(MOTIONS)}")
        return motion

    @model_validator(mode="after")
    def _lasts_a_second(self) -> WorldClips:
        from trainer.data.world.clips import check_rate

        check_rate(self.frames, self.fps)
        if self.images and self.frames == 1:
            raise ValueError(f"images={self.images} of clips of one frame; set images=0")
        if self.any_moment and self.frames > 1:
            raise ValueError(
                f"any_moment=true takes one frame of a clip, and frames={self.frames}; set frames=1"
            )
        return self

    def idle(self) -> dict[str, str]:
        return {} if self.frames > 1 else {"fps": "data.frames=1 takes single frames"}

    def epoch(self) -> float:
        """Every clip once, beside the share of images."""
        return self.count / (1 - self.images)

    def open(self, needs: Needs) -> tuple[Dataset, Dataset | None]:
        from trainer.data.mixed import Mixed
        from trainer.data.sources.world import Scenes

        def clips(seed: int, count: int) -> DrawnClips:
            return DrawnClips(
                seed,
                count=count,
                sprites=self.sprites,
                side=needs.resolution,
                frames=self.frames,
                fps=self.fps,
                motions=_each(self.motion),
                any_moment=self.any_moment,
                defect=self.defect,
                detail=self.detail,
            )

        train: Dataset = clips(self.seed, self.count)
        if self.images:
            scenes = Scenes(
                self.seed, count=self.count, sprites=self.sprites, side=needs.resolution
            )
            train = Mixed(train, scenes, self.images)
        held_out = clips(self.seed + HELD_OUT_SEED, self.validation) if self.validation else None
        return train, held_out


class DrawnClips:
    """Sample i is clip i of a seed, `side` pixels wide, with one caption. Clip i has motion i of
    `motions`, which repeat; without any it has a random motion."""

    shares: Sequence[float] = (1.0,)
    weights: Sequence[float] = (1.0,)
    fixed = True
    skipped: Sequence[str] = ()

    def __init__(
        self,
        seed: int,
        *,
        count: int,
        sprites: str,
        side: int,
        frames: int,
        fps: float | None,
        motions: Sequence[str] = (),
        any_moment: bool = False,
        defect: str | None = None,
        detail: int = 1,
    ) -> None:
        from trainer.data.world import sprites as table
        from trainer.data.world.clips import check_rate

        self.seed, self.count, self.sprites, self.side = seed, count, sprites, side
        self.names = table.SETS[sprites]
        self.motions, self.detail = tuple(motions), detail
        self.any_moment, self.defect = any_moment, defect
        self.groups: Sequence[range] = (range(count),)
        self.fps = check_rate(frames, fps)
        self.frames: Sequence[int] = (frames,)
        self.rates: Sequence[float] = (self.fps,) * count

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        image, caption = self.image(index), self.caption(index, rng)
        return Sample(image=image, caption=caption, key=self.key(index))

    def crop(self, index: int) -> Crop:
        """See `Cropped`."""
        return square(self.side)

    def key(self, index: int) -> str:
        return f"clip-{self.seed}-{index}"

    def image(self, index: int) -> Tensor:
        """Float32 (frames, 3, side, side) in [-1, 1]."""
        import torch
        from PIL import Image

        from trainer.data.world.watermark import marked
        from trainer.media.images import resize_cover, to_tensor

        clip = self._clip(index)
        drawn = marked(clip.frames) if self.defect else clip.frames
        frames = (resize_cover(Image.fromarray(frame), self.side) for frame in drawn)
        return torch.stack([to_tensor(frame) for frame in frames])

    def depth(self, index: int) -> Tensor:
        """See `Layered`."""
        import numpy as np

        from trainer.data.world.scenes import nearness

        objects = self._clip(index).objects
        return as_depth(np.stack([nearness(shown) for shown in objects]), self.side)

    def _clip(self, index: int) -> Clip:
        from trainer.data.world.clips import draw_clip

        return draw_clip(
            self.seed,
            index,
            names=self.names,
            frames=self.frames[0],
            fps=self.fps,
            motion=self._motion(index),
            begin=self._begin(index),
            detail=self.detail,
        )

    def caption(self, index: int, rng: np.random.Generator) -> str:
        from trainer.data.world.clips import draw_plot

        return draw_plot(self.seed, index, names=self.names, motion=self._motion(index)).caption

    def _motion(self, index: int) -> str | None:
        return self.motions[index % len(self.motions)] if self.motions else None

    def _begin(self, index: int) -> float:
        """When the first frame is shown, in seconds."""
        import numpy as np

        if not self.any_moment:
            return 0.0
        return float(np.random.default_rng((self.seed, index, 3)).random())

    def fingerprint(self) -> str:
        options = (*self.motions, *(["any"] if self.any_moment else []), self.defect)
        return (
            f"world-clips-1-{self.seed}-{self.count}-{self.sprites}-{self.side}-"
            f"{self.frames[0]}-{self.fps!r}"
            + "".join(f"-{option}" for option in options if option)
            + (f"-detail-{self.detail}" if self.detail > 1 else "")
        )

    def identity(self) -> dict[str, str]:
        return {"clips": self.fingerprint()}


def _each(motion: str | Sequence[str] | None) -> tuple[str, ...]:
    return (motion,) if isinstance(motion, str) else tuple(motion or ())
