"""Data source `shards`: tars in webdataset layout, read by index and checked by a manifest.

    000012.jpg  000012.txt  000012.json  000012.mask.png     one sample: adjacent, with one stem

A stream reader does not notice a truncated shard or a flipped bit. Therefore the first use reads
each tar once, decodes every image, and stores the position and CRC-32 of each member. A sample is
then one seek and one read of the exact bytes, and any later change is an error. The SHA-256 of a
shard is computed again if its size or time of change differs from the last use on this machine;
`data verify` checks all shards and every sample.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from trainer.data.source import Dataset, Needs, Source
from trainer.data.source_checks import bytes_of
from trainer.data.source_options import Buckets, OnBad
from trainer.data.tars.count import count_samples
from trainer.data.tars.reader import Opening, check_usable, split
from trainer.data.tars.shard_checksums import load_manifest, tars_of


class Shards(Source):
    """Samples of .tar files in webdataset layout."""

    shards: Path = Field(
        description="a folder of .tar files, one of them, or a pattern of their names, as in "
        "./shards/shard-{000..010}.tar",
        examples=["./shards"],
    )
    validation: int = Field(
        0, ge=0, description="samples to hold out for the validation loss, the last ones"
    )
    on_bad: OnBad = "raise"
    ignore: tuple[str, ...] = Field(
        (), description="extensions of members to leave out, as in [cls, npy]"
    )
    buckets: Buckets = 0

    @field_validator("shards", mode="before")
    @classmethod
    def _is_local(cls, value: Any) -> Any:
        if re.match(r"pipe:|file:|[a-z][a-z0-9+.-]+:/", str(value), re.IGNORECASE):
            raise ValueError(
                "commands and remote addresses are not read here; copy the shards to a local disk "
                "and give the folder, or read them by data.source=remote data.url=https://..."
            )
        return value

    @field_validator("shards")
    @classmethod
    def _holds_tars(cls, shards: Path) -> Path:
        shards = shards.expanduser()
        tars_of(shards)
        return shards

    @field_validator("ignore")
    @classmethod
    def _without_dots(cls, ignore: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(extension.lower().lstrip(".") for extension in ignore)

    @cached_property
    def count(self) -> int:
        """How many samples there are, by their manifest or the names of their members."""
        return count_samples(self.shards, self.ignore)

    @property
    def captions_inside(self) -> bool:
        return True

    def stored(self) -> int:
        return bytes_of(tars_of(self.shards))

    def epoch(self) -> int:
        return max(0, self.count - self.validation)

    def open(self, needs: Needs) -> tuple[Dataset, Dataset | None]:
        """Finds or makes the manifest and checks every shard against it.

        Raises:
            ValueError: a shard is truncated, changed or missing, or has a member that is not
                allowed.
            ImageError: samples that cannot be used, all in one message.
        """
        found = load_manifest(self.shards, needs.cache, self.ignore, keep=needs.keeps)
        folder = self.shards if self.shards.is_dir() else self.shards.parent
        bad = check_usable(found, self.shards, self.on_bad)
        opening = Opening(folder=folder, skipped=bad, validation=self.validation, step=self.buckets)
        return split(found, needs, opening)
