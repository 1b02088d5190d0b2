"""A stream of shards as a dataset: bytes of samples become pictures, captions, masks and latents.

`index` counts the samples of an epoch, one stream of a mixture after another; later epochs are
behind it, see `Ordered`. Random access works and is slow: what comes in the order of the plan is
read ahead.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.data.crops import Crop
from trainer.data.identity import by_name, digest_of
from trainer.data.source import Sample
from trainer.data.streams.raw_sample import Reading, caption_in, crop_in, mask_in, picture_in
from trainer.data.streams.server_file import ShardFile
from trainer.data.streams.shard_samples import Raw, samples_of
from trainer.data.streams.stream_order import StreamOrder
from trainer.data.tars.manifest import LATENT
from trainer.media.images import in_range

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass
class Flow:
    """One stream of a mixture. start: the index of its first sample."""

    order: StreamOrder
    weight: float
    start: int

    @property
    def files(self) -> Sequence[ShardFile]:
        return self.order.files

    def __len__(self) -> int:
        return self.order.lanes.total


class Records:
    """What a dataset of raw samples gives of each; `raw` reads it."""

    reading: Reading
    rates: Sequence[float] = ()
    skipped: Sequence[str] = ()

    def raw(self, index: int) -> Raw:
        raise NotImplementedError

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Raises ImageError for a picture or a caption that cannot be used, ValueError for a shard
        that is not what it was."""
        raw = self.raw(index)
        picture, crop = picture_in(raw, self.reading)
        return Sample(
            image=picture,
            caption=caption_in(raw, self.reading, rng),
            key=raw.key,
            mask=mask_in(raw, self.reading),
            crop=crop,
        )

    def image(self, index: int) -> Tensor:
        """Float32 (3, side, side) in [-1, 1]; raises as `sample`."""
        return in_range(picture_in(self.raw(index), self.reading)[0])

    def crop(self, index: int) -> Crop:
        """See `Cropped`."""
        return crop_in(self.raw(index), self.reading)

    def loss_mask(self, index: int) -> Tensor | None:
        """See `Masked`."""
        return mask_in(self.raw(index), self.reading)

    def caption(self, index: int, rng: np.random.Generator) -> str:
        return caption_in(self.raw(index), self.reading, rng)

    def captions(self, index: int) -> Sequence[str]:
        """Every caption of a sample, of which `caption` draws one."""
        return self.reading.captions_of(self.raw(index))

    def key(self, index: int) -> str:
        return self.raw(index).key

    def moments(self, index: int) -> Tensor | None:
        """See `HoldsLatents`."""
        raw = self.raw(index)
        return self.reading.latents(raw) if raw.picture == LATENT else None

    def content(self, index: int) -> str:
        """See `HasContents`."""
        raw = self.raw(index)
        digest = hashlib.sha256(raw.members[raw.picture]).hexdigest()
        return digest_of(digest, f"centre {self.reading.side}")


class StreamData(Records):
    """The training samples of one stream or of several; each is a group of the plan."""

    fixed = False  # no index of all pictures, so no array of all latents

    def __init__(self, flows: Sequence[Flow], reading: Reading, keep: int = 1) -> None:
        """keep: samples of a batch, which is asked for its latents first, say, and then for its
        captions."""
        self.flows, self.reading, self.keep = flows, reading, keep
        self.kept: OrderedDict[int, Raw] = OrderedDict()
        self.total = sum(map(len, flows))
        self.groups: Sequence[range] = [range(flow.start, flow.start + len(flow)) for flow in flows]
        whole = sum(flow.weight for flow in flows)
        self.shares: Sequence[float] = [flow.weight / whole for flow in flows]
        self.weights: Sequence[float] = self.shares
        self.frames: Sequence[int] = (1,) * len(flows)
        self.shards = sum(len(flow.files) for flow in flows)

    def __len__(self) -> int:
        return self.total

    def raw(self, index: int) -> Raw:
        if index not in self.kept:
            epoch, inside = divmod(index, self.total)
            flow = next(flow for flow in reversed(self.flows) if flow.start <= inside)
            self.kept[index] = flow.order[epoch * len(flow) + inside - flow.start]
            if len(self.kept) > self.keep:
                self.kept.popitem(last=False)
        return self.kept[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": OrderedDict()}

    def first_captions(self, most: int, rng: np.random.Generator) -> list[tuple[str, str]]:
        """Name and caption of the first samples of the first shard."""
        order = self.flows[0].order
        end = min(most, order.lanes.counts[0])
        rows = samples_of(order.files[0], 0, end, count=None, ignore=order.ignore)
        return [(row.name, caption_in(row, self.reading, rng)) for row in rows]

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(("stream-1", self.identity())).encode()).hexdigest()

    def identity(self) -> dict[str, str]:
        """Of each shard its size and how many of its samples are used. That its bytes changed and
        its size did not is found by nothing but what is wrong in them."""
        return by_name(
            (file.name, digest_of(str(file.size), str(count)))
            for flow in self.flows
            for file, count in zip(flow.files, flow.order.lanes.counts, strict=True)
        )


class HeldRecords(Records):
    """The samples that are held out, in memory."""

    def __init__(self, rows: Sequence[Raw], reading: Reading) -> None:
        self.rows, self.reading = rows, reading
        # latents are not encoded again
        self.fixed = all(row.picture != LATENT for row in rows)
        self.groups: Sequence[range] = [range(len(rows))]
        self.shares: Sequence[float] = (1.0,)
        self.weights: Sequence[float] = (1.0,)
        self.frames: Sequence[int] = (1,)

    def __len__(self) -> int:
        return len(self.rows)

    def raw(self, index: int) -> Raw:
        return self.rows[index]

    def fingerprint(self) -> str:
        every = [self.content(index) for index in range(len(self))]
        return hashlib.sha256(repr(("held-1", every)).encode()).hexdigest()

    def identity(self) -> dict[str, str]:
        return by_name(
            (row.key, digest_of(*(f"{name} {hashlib.sha256(data).hexdigest()}"
                                  for name, data in sorted(row.members.items()))))
            for row in self.rows
        )  # fmt: skip
