"""Data source `stream`: shards in webdataset layout, read one after another from a disk or a
server, without an index.

    data.urls=s3://bucket/{00000..00999}.tar
    data.mixture={photos: {urls: ./photos, weight: 3}, art: {urls: hf://datasets/me/art/*.tar}}

Samples are counted once, and read in the shuffled order of the shards through a buffer. Every
sample is in an epoch once; batches are the same with any number of data workers and ranks, and a
run resumes at the sample. Where a shard is trusted less than its server, `shards` and `remote`
compare every byte with a manifest, which this source does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from trainer.common.paths import cache_folder
from trainer.data.plan import rows_of
from trainer.data.source import Dataset, Needs, Source
from trainer.data.source_checks import check_split
from trainer.data.source_options import CaptionLines
from trainer.data.streams.addresses import check_address, shards_at
from trainer.data.streams.lanes import Lanes
from trainer.data.streams.raw_sample import Reading
from trainer.data.streams.server_file import ShardFile, is_local, shard_file
from trainer.data.streams.shard_counts import AT_ONCE, Counted, counts_of
from trainer.data.streams.shard_samples import Raw, samples_of
from trainer.data.streams.stream_data import Flow, HeldRecords, StreamData
from trainer.data.streams.stream_order import StreamOrder

ELSEWHERE = (
    "; data.source=shards has it for a local disk, data.source=remote for a server, with the "
    "manifest of `data build`"
)
LACKS = {
    "buckets": f"shapes of a stream's pictures are not known before they are read{ELSEWHERE}",
    "on_bad": "a stream ends at a sample that cannot be used, and names it; its place could not be "
    f"left out without changing which samples come after it{ELSEWHERE}",
    "flip": "pictures of a stream are not mirrored; data.source=folder has it",
}
HELD_BYTES = 2**30  # of samples that are held out, in memory


def _as_list(value: Any) -> Any:
    """One address is a list of one."""
    return (value,) if isinstance(value, str) else value


Urls = Annotated[tuple[str, ...], BeforeValidator(_as_list)]


class Weighted(BaseModel):
    """One stream of a mixture."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    urls: Urls
    weight: PositiveFloat = 1.0


class Stream(Source):
    """Shards in webdataset layout, streamed from a disk, s3://, gs://, hf:// or https://."""

    urls: Urls = Field(
        (),
        description="shards: an address or a list of them, with ranges {000..099}, lists {a,b}, "
        "wildcards, or a folder; local, s3://, gs://, hf:// or https://",
        examples=["./shards/{00000..00099}.tar"],
    )
    mixture: dict[str, Weighted] = Field(
        {},
        description="in place of urls: several streams by name, each with `urls` and a `weight`, "
        "its part of every batch",
    )
    shuffle: int = Field(
        1000, ge=0, description="samples in the shuffle buffers of all lanes together; 0: none"
    )
    caption_key: str | None = Field(
        None,
        description="what the caption is called in each .json, a text or a list of which one is "
        "drawn, or in the .parquet that img2dataset writes beside a shard; null takes .txt, else "
        "`caption` of the .json",
    )
    caption_lines: CaptionLines = False
    validation: int = Field(
        0,
        ge=0,
        description="samples to hold out for the validation loss, the last ones of the shards, of "
        "a mixture those of its first stream",
    )
    per_shard: PositiveInt | None = Field(
        None,
        description="use so many samples of each shard, which must have them, and count none; "
        "null counts the samples of every shard at the first use",
    )
    ignore: tuple[str, ...] = Field(
        (), description="extensions of members to leave out, as in [cls, npy]"
    )
    for_ranks: PositiveInt = Field(
        4,
        description="the order is divided so that up to so many ranks, or a divisor of it, read no "
        "sample of another's; part of the order, give a multiple of your ranks",
    )
    for_workers: PositiveInt = Field(
        4, description="the same for the data workers of each rank, run.workers"
    )

    @model_validator(mode="after")
    def _names_shards(self) -> Stream:
        if bool(self.urls) == bool(self.mixture):
            raise ValueError(
                "give urls, or a mixture of several, as in urls=./shards/{000..099}.tar"
            )
        for name, urls in self.patterns.items():
            if not urls:
                raise ValueError(f"mixture.{name}.urls is empty; give the addresses of shards")
            for each in urls:
                check_address(each)
                if is_local(each):
                    [shard_file(shard) for shard in shards_at((each,))]
        return self

    def idle(self) -> dict[str, str]:
        if self.caption_key is None:
            return {}
        return {"caption_lines": "data.caption_key takes captions from elsewhere than a .txt"}

    @property
    def patterns(self) -> dict[str, tuple[str, ...]]:
        """What the shards of each stream are called, by its name."""
        if self.urls:
            return {"": self.urls}
        return {name: each.urls for name, each in self.mixture.items()}

    @cached_property
    def files(self) -> dict[str, list[ShardFile]]:
        """The shards of each stream; raises ValueError or NoAnswerError."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return {
                name: list(pool.map(shard_file, shards_at(patterns)))
                for name, patterns in self.patterns.items()
            }

    @cached_property
    def counted(self) -> dict[str, list[Counted]]:
        """The samples and the marks of each shard, by stream; raises as `files` does."""
        return {name: self._count(files) for name, files in self.files.items()}

    @property
    def counts(self) -> dict[str, list[int]]:
        """How many samples each shard has, by stream."""
        return {name: [count for count, _ in each] for name, each in self.counted.items()}

    @property
    def captions_inside(self) -> bool:
        return True

    @classmethod
    def lacks(cls) -> Mapping[str, str]:
        return LACKS

    def epoch(self) -> int:
        return max(0, sum(map(sum, self.counts.values())) - self.validation)

    def open(self, needs: Needs) -> tuple[StreamData, Dataset | None]:
        """Lists and counts the shards; samples are read when they are used.

        Raises:
            ValueError: a shard is missing, damaged or refused by its server.
            NoAnswerError: the server gives no answer.
        """
        weights = {name: each.weight for name, each in self.mixture.items()} or {"": 1.0}
        whole = sum(weights.values())
        rows = rows_of([each / whole for each in weights.values()], max(needs.batch, len(weights)))
        used = self._used()
        flows: list[Flow] = []
        for (name, weight), own in zip(weights.items(), rows, strict=True):
            lanes = Lanes(
                tuple(used[name]), own, self.for_ranks, workers=self.for_workers, seed=needs.seed
            )
            order = StreamOrder(
                self._marked(name),
                lanes,
                whole=self._whole(name),
                buffer=self.shuffle,
                ignore=self.ignore,
            )
            flows.append(Flow(order, weight, start=sum(map(len, flows))))
        reading = Reading(
            needs.resolution,
            needs.divisor,
            self.caption_key,
            lines=self.caption_lines,
            encoder=needs.encoder() if needs.encoder is not None else None,
            files={file.address: file for files in self.files.values() for file in files},
        )
        return StreamData(flows, reading, keep=needs.batch), self._held(used, reading)

    def _marked(self, name: str) -> list[ShardFile]:
        """The shards of a stream, with their marks."""
        return [
            replace(file, marks=tuple(marks))
            for file, (_, marks) in zip(self.files[name], self.counted[name], strict=True)
        ]

    def _count(self, files: Sequence[ShardFile]) -> list[Counted]:
        if self.per_shard is not None:
            return [(self.per_shard, [])] * len(files)
        return counts_of(files, cache_folder(), self.ignore)

    def _whole(self, name: str) -> list[int | None]:
        """How many samples each shard is known to hold."""
        known: list[int | None] = list(self.counts[name])
        return known if self.per_shard is None else [None] * len(known)

    def _used(self) -> dict[str, list[int]]:
        """How many samples of each shard are trained on, by stream."""
        used = {name: list(each) for name, each in self.counts.items()}
        name, left = next(iter(used)), self.validation
        check_split(left, sum(used[name]), f"samples in {', '.join(self.patterns[name])}")
        for number in reversed(range(len(used[name]))):
            taken = min(left, used[name][number])
            used[name][number] -= taken
            left -= taken
        return used

    def _held(self, used: Mapping[str, Sequence[int]], reading: Reading) -> HeldRecords | None:
        """The samples that no training uses, read into memory."""
        name, rows = next(iter(used)), list[Raw]()
        for file, first, end in zip(
            self._marked(name), used[name], self.counts[name], strict=True
        ):  # fmt: skip
            if first < end:
                count = end if self.per_shard is None else None
                rows += samples_of(file, first, end, count=count, ignore=self.ignore)
            size = sum(len(data) for row in rows for data in row.members.values())
            if size > HELD_BYTES:
                raise ValueError(
                    f"validation={self.validation} takes more than {HELD_BYTES / 1e9:.1f} GB of "
                    "memory; hold out fewer"
                )
        return HeldRecords(rows, reading) if rows else None
