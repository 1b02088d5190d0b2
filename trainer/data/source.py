"""What a data source is, the samples it gives, and what it may ask of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict

from trainer.common.lookup import only_class, source_files

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

    from trainer.data.crops import Crop


# the name of a caption, as of its file; its text; the word it must hold, None where it may hold any
Caption = tuple[str, str, str | None]


@dataclass(frozen=True)
class Sample:
    """image (3, H, W) float32 in [-1, 1], or uint8 as its file has it; of a clip (frames, 3, H, W);
    mask (1, H/f, W/f) of an
    image's latents that count, or None for all; key names it. inputs: further inputs by name, as
    in a depth map or a reference picture, each of one shape in all samples of a data set. crop:
    which part of its picture it shows, where augmentation drew it; else see `crops.Cropped`."""

    image: Tensor
    caption: str
    key: str
    mask: Tensor | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    crop: Crop | None = None


class Dataset(Protocol):
    """Random access to samples, in groups that share every batch by `shares` (instance and prior,
    say).

    frames: of a sample of each group, 1 for images; groups of different numbers are in turn the
    group of a batch. rates: frames a second of each clip by index, empty for images.
    """

    groups: Sequence[range]
    shares: Sequence[float]
    weights: Sequence[float]
    frames: Sequence[int]
    rates: Sequence[float]
    fixed: bool
    skipped: Sequence[str]

    def __len__(self) -> int: ...

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Sample `index`; augmentation draws from `rng` only. With `fixed` the image never depends
        on rng."""
        ...

    def image(self, index: int) -> Tensor:
        """The picture (3, H, W), or clip (frames, 3, H, W), without augmentation."""
        ...

    def caption(self, index: int, rng: np.random.Generator) -> str:
        """The caption alone, with the same random numbers; for data whose latents are cached."""
        ...

    def key(self, index: int) -> str:
        """The name of sample `index`, by its file where it has one; reads nothing."""
        ...

    def fingerprint(self) -> str:
        """Changes when any image would; keys caches."""
        ...

    def identity(self) -> dict[str, str]:
        """What each sample, or each file of several, is by its name: changes with any byte of it
        and with its captions; see `identity.py`."""
        ...


@runtime_checkable
class Repeated(Protocol):
    """A dataset some of whose samples are in an epoch several times; repeats: of each sample."""

    repeats: Sequence[int]


@runtime_checkable
class Ordered(Protocol):
    """A dataset that has an order of its own in every epoch, in which it is quick to read: sample
    `index + epoch * len(dataset)` is the one at that place of a later epoch. shards: how many files
    it is read from."""

    shards: int


@runtime_checkable
class HoldsLatents(Protocol):
    """A dataset whose pictures may be stored as latents."""

    def moments(self, index: int) -> Tensor | None:
        """The moments (frames, 2c, h, w) of sample `index`, fp16 or fp32; None of a picture."""
        ...


@runtime_checkable
class HasContents(Protocol):
    """A dataset that knows what a sample's latents depend on, beside the encoder."""

    def content(self, index: int) -> str:
        """A digest of the bytes of its picture and of how they are cut."""
        ...


def shape_of_clips(data: Dataset) -> tuple[int, float | None]:
    """Frames of its clips, and the middle one of their frames a second; 1 and None for images."""
    return max(data.frames), median_low(data.rates) if data.rates else None


def frames_asked(data: Mapping[str, Any]) -> int:
    """Frames of the clips of a stored recipe's section `data`; 1 for pictures. Where the recipe
    does not say it, the source's own default."""
    known = Source.find(data["source"]).model_fields if data.get("source") in Source.names() else {}
    found = data.get("frames", known["frames"].default if "frames" in known else None)
    return int(found or 1)


@dataclass(frozen=True)
class Generation:
    """How class images are generated: steps of the sampler, the scale of classifier-free guidance,
    and which sampler, None for the backbone's own."""

    steps: int = 25
    guidance: float = 5.0
    sampler: str | None = None


class NoAnswerError(ValueError):
    """The data is on another machine, which gives no answer now."""


@dataclass(frozen=True)
class Needs:
    """What a source may ask of the run.

    resolution: the side of an image in pixels. divisor: pixels per latent along an edge. generate:
    makes class images from prompts, the seed of the first (the next has the next seed) and how.
    cache: the folder for what is kept between runs. generator: names the weights of `generate`; it
    reads all of them, so only who needs class images asks. at_once: pictures that `generate` should
    make in one call. sampled: what else they depend on. keeps: whether what is found out about the
    data may be stored beside it.
    """

    resolution: int
    divisor: int
    generate: Callable[[Sequence[str], int, Generation], Sequence[Image]]
    cache: Path
    generator: Callable[[], str]
    at_once: int = 32
    sampled: str = ""
    keeps: bool = True
    batch: int = 1
    seed: int = 0
    encoder: Callable[[], str] | None = None


class Source(BaseModel):
    """Options of a data source. Subclasses live in one file each; importing one loads no torch."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def idle(self) -> dict[str, str]:
        """Options that have no effect beside the others, each with what it needs."""
        return {}

    @property
    def words(self) -> tuple[str, ...]:
        """The new words its captions are written with."""
        return ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """What kind of thing each of `words` is; empty where it is not said."""
        return ()

    @property
    def groups(self) -> int:
        """Groups of samples that are all in every batch, which has at least so many."""
        return 1

    @property
    def holds_out(self) -> bool:
        """Whether it keeps samples back for the validation loss."""
        return bool(getattr(self, "validation", 0))

    @property
    def captions_inside(self) -> bool:
        """Whether a caption is known when its sample is read, and not before."""
        return False

    def captions(self) -> Iterable[Caption]:
        """Every caption that can be read without opening the data, or none."""
        return ()

    def found(self) -> list[str]:
        """A sentence or more on what there is: pictures, captions by kind, masks, repeats; from
        names and captions alone. Every start prints it."""
        return []

    def epoch(self) -> float | None:
        """How many samples of a batch one pass over the training data takes; None where only
        opening the data would tell."""
        return None

    def stored(self) -> int:
        """Bytes of the files that opening it decodes; 0 where it is drawn, or on a server."""
        return 0

    def without_generated(self) -> Source:
        """The same without the samples that the backbone has to generate."""
        return self

    def remarks(self) -> list[str]:
        """A sentence for each thing in the data that a user may not expect, as in a file that is
        not read; from names alone."""
        return []

    def open(self, needs: Needs) -> tuple[Dataset, Dataset | None]:
        """The training samples, and the held-out ones for the validation loss where the source has
        some."""
        raise NotImplementedError

    @classmethod
    def lacks(cls) -> Mapping[str, str]:
        """Options of other sources that this one cannot have, each with the reason."""
        return {}

    @staticmethod
    def names() -> list[str]:
        """Every source there is, by file name."""
        return [path.stem for path in source_files()]

    @staticmethod
    def find(name: str) -> type[Source]:
        found: type[Source] = only_class(f"trainer.data.sources.{name}", Source)
        return found
