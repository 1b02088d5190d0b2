"""What the bytes of one sample of a stream mean: its picture, cut to the square; its caption, of
which there may be several; its mask; or the latents that stand in the place of a picture."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from trainer.data.crops import Crop, central
from trainer.data.loss_mask import checked_cells
from trainer.data.streams.captions_beside import captions_beside
from trainer.data.streams.latent_member import cells_of, check_encoder, checksum_of, latents_of
from trainer.data.streams.server_file import ShardFile
from trainer.data.streams.shard_samples import Raw
from trainer.data.tags import drawn
from trainer.data.tars.manifest import (
    CAPTION,
    CELLS,
    LATENT,
    MASK,
    METADATA,
    caption_of,
    loss_weights_of,
)
from trainer.media.images import TURNED, ImageError, cover, decode_image, to_bytes
from trainer.media.read_caption import decode_caption

if TYPE_CHECKING:
    from torch import Tensor


TABLES = 32  # of captions beside shards, that are kept
CAPTIONS = "captions"  # of latents, in their .json


@dataclass
class Reading:
    """side: of the square in pixels; divisor: pixels per latent along an edge; caption_key: what
    captions are called in .json, or in the .parquet beside a shard; lines: whether each line of a
    .txt is a caption; encoder: what latents must have been made by, None where that is not known;
    files: the shards by address."""

    side: int
    divisor: int
    caption_key: str | None = None
    lines: bool = False
    encoder: str | None = None
    files: dict[str, ShardFile] = field(default_factory=dict)
    beside: dict[str, dict[str, str]] = field(default_factory=dict)

    def captions_of(self, raw: Raw) -> Sequence[str]:
        """Every caption of a sample, one at least.

        Raises:
            ImageError: it has none.
            ValueError: as `captions_beside`.
        """
        if raw.picture == LATENT:
            return self._in_json(raw, CAPTIONS)
        if self.caption_key is None:
            if self.lines and CAPTION in raw.members:
                text = decode_caption(raw.members[CAPTION], f"{raw.name}.{CAPTION}")
                return [line.strip() for line in text.splitlines() if line.strip()] or [""]
            return [caption_of(raw.members, raw.name)]
        if METADATA in raw.members:
            return self._in_json(raw, self.caption_key)
        found = self._rows(raw.shard, self.caption_key).get(raw.key.rpartition("/")[2])
        if found is None:
            raise ImageError(f"{raw.name}: no row of its key in the .parquet beside the shard")
        return [found.strip()]

    def _rows(self, shard: str, column: str) -> dict[str, str]:
        """The captions beside a shard; those of the last shards are kept."""
        if shard not in self.beside:
            self.beside[shard] = captions_beside(self.files[shard], column)
            if len(self.beside) > TABLES:
                del self.beside[next(iter(self.beside))]
        return self.beside[shard]

    def latents(self, raw: Raw) -> Tensor:
        """The moments (1, 2c, h, w); raises ValueError where another encoder made them."""
        check_encoder(raw.name, raw.metadata, self.encoder)
        if raw.metadata.get("crc32") != checksum_of(raw.members[LATENT]):
            raise ValueError(f"{raw.name}: its latents have changed; copy the shard again")
        return latents_of(raw.members[LATENT], raw.name)

    def _in_json(self, raw: Raw, name: str) -> Sequence[str]:
        found = raw.metadata.get(name)
        listed = found if isinstance(found, list) else [found]
        texts = [text.strip() for text in listed if isinstance(text, str)]
        if not texts or len(texts) < len(listed):
            raise ImageError(
                f"{raw.name}.{METADATA}: no text, or list of texts, by the name {name}; choose "
                "another by data.caption_key"
            )
        return texts


def caption_in(raw: Raw, reading: Reading, rng: np.random.Generator) -> str:
    """One of its captions."""
    return drawn(reading.captions_of(raw), rng)


def picture_in(raw: Raw, reading: Reading) -> tuple[Tensor, Crop]:
    """The picture, uint8 (3, side, side), and which part of it that is; ImageError where it
    cannot be used, or is stored as latents."""
    if raw.picture == LATENT:
        raise ImageError(
            f"{raw.name}: these shards hold latents and no pictures, which this needs; use the "
            "shards that they were made of"
        )
    name = f"{raw.name}.{raw.picture}"
    image, size = decode_image(raw.members[raw.picture], name), (reading.side, reading.side)
    return to_bytes(cover(image, size)), central(image.size, size)


def crop_in(raw: Raw, reading: Reading) -> Crop:
    """Which part of its picture a sample shows, by the header of its file."""
    if raw.picture == LATENT:
        height, width, top, left, *size = raw.metadata["crop"]
        return int(height), int(width), int(top), int(left), int(size[0]), int(size[1])
    return central(_size(raw), (reading.side, reading.side))


def mask_in(raw: Raw, reading: Reading) -> Tensor | None:
    """The weights (1, side / f, side / f) of a grey mask, None without one; ImageError where the
    cut leaves none of it."""
    if CELLS in raw.members:
        return cells_of(raw.members[CELLS], raw.name)
    if MASK not in raw.members:
        return None
    weights = loss_weights_of(raw.members[MASK], raw.name, _size(raw))
    if weights is None:
        return None
    size = (reading.side, reading.side)
    return checked_cells(weights, size, divisor=reading.divisor, name=raw.name)


def _size(raw: Raw) -> tuple[int, int]:
    """Width and height of a picture after EXIF rotation."""
    with Image.open(io.BytesIO(raw.members[raw.picture])) as image:
        width, height = image.size
        turned = image.getexif().get(0x0112) in TURNED
    return (height, width) if turned else (width, height)


def facts_json(latent: bytes, encoder: str, crop: Crop, *, captions: Sequence[str]) -> bytes:
    """What is said of latents in a shard: their checksum, what made them, of which part of a
    picture, and every caption."""
    facts = {"crc32": checksum_of(latent), "encoder": encoder, "crop": crop}
    return json.dumps({**facts, CAPTIONS: list(captions)}).encode()
