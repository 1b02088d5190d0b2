"""Data source `parquet`: pictures and captions of parquet files, as the Hugging Face Hub keeps data
sets.

`tars/from_parquet.py` writes them into shards once.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from trainer.data.source import Dataset, Needs, Source
from trainer.data.source_checks import bytes_of, check_split
from trainer.data.source_options import Buckets, OnBad
from trainer.data.tars.from_parquet import as_shards, caption_column, opened, parquets_of
from trainer.data.tars.reader import Opening, check_usable, split
from trainer.data.tars.shard_checksums import load_manifest


class Parquet(Source):
    """Rows of .parquet files with a picture and a caption (the extra parquet)."""

    parquet: Path = Field(
        description="a .parquet, or a folder of them, as the Hugging Face Hub has them",
        examples=["./data/train-00000-of-00001.parquet"],
    )
    split: str | None = Field(
        None, description="which files of a folder, as train of train-00000-of-00002.parquet"
    )
    image_column: str = Field(
        "image", description="the column of pictures: {bytes, path}, or plain bytes"
    )
    caption_column: str | None = Field(
        None, description="the column of captions; null takes text or caption"
    )
    validation: int = Field(
        0, ge=0, description="rows to hold out for the validation loss, the last ones"
    )
    on_bad: OnBad = "raise"
    buckets: Buckets = 0

    @model_validator(mode="after")
    def _has_its_columns(self) -> Parquet:
        names = {path.name: self._captions(path) for path in self._paths()}
        if len(set(names.values())) > 1:
            raise ValueError(f"captions are in different columns, {names}; name one in all files")
        if self.validation:
            check_split(self.validation, self._count(), f"rows in {self.parquet}")
        return self

    def idle(self) -> dict[str, str]:
        if self.parquet.expanduser().is_dir():
            return {}
        return {"split": "it is for a folder of files"}

    def found(self) -> list[str]:
        paths = self._paths()
        return [
            f"{self.parquet}: {self._count()} rows in {len(paths)} files; pictures: column "
            f"{self.image_column}, captions: column {self._captions(paths[0])}"
        ]

    @property
    def captions_inside(self) -> bool:
        return True

    def stored(self) -> int:
        return bytes_of(self._paths())

    def epoch(self) -> int:
        return max(0, self._count() - self.validation)

    def open(self, needs: Needs) -> tuple[Dataset, Dataset | None]:
        """Writes the rows into shards at the first use, and checks those at every other.

        Raises:
            ValueError: a file is damaged.
            ImageError: rows that cannot be used, all in one message.
        """
        paths = self._paths()
        columns = self.image_column, self._captions(paths[0])
        folder = as_shards(paths, *columns, cache=needs.cache)
        shards = load_manifest(folder, needs.cache)
        bad = check_usable(shards, self.parquet, self.on_bad)
        opening = Opening(folder=folder, skipped=bad, validation=self.validation, step=self.buckets)
        return split(shards, needs, opening)

    def _paths(self) -> list[Path]:
        return parquets_of(self.parquet.expanduser(), self.split)

    def _captions(self, path: Path) -> str:
        return caption_column(path, self.image_column, self.caption_column)

    def _count(self) -> int:
        return sum(opened(path).metadata.num_rows for path in self._paths())
