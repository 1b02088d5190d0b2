"""`data build recipe=... out=...`: the latents of a recipe's pictures, encoded once and written as
shards that `data.source=stream` reads on any machine, with every caption and mask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from trainer.backbones.backbone import Backbone
from trainer.common.long_work import long_work
from trainer.config.schema import Recipe
from trainer.data.crops import Cropped, whole
from trainer.data.latent_cache import as_stored
from trainer.data.loss_mask import Masked
from trainer.data.source import Dataset, Ordered
from trainer.data.streams.latent_member import npy_bytes
from trainer.data.streams.raw_sample import facts_json
from trainer.data.streams.stream_data import Records
from trainer.data.tars.manifest import CELLS, LATENT, METADATA
from trainer.data.tars.write_shards import Record, write_unlisted
from trainer.runs.adapter import load_base
from trainer.training.build import encoder_of, needs, placement_of


def write_latents(recipe: Recipe, out: Path, per_shard: int) -> list[Path]:
    """Writes the training samples of a recipe, each once; returns the shards.

    Raises:
        ValueError: `out` is there already, or pictures or captions are drawn anew at each use in a
            way that shards cannot hold.
    """
    if out.exists():
        raise ValueError(f"{out}: it is there already; give a new folder, or remove it")
    backbone = load_base(
        recipe.backbone, recipe.backbone_name, placement_of(recipe.run), hold=False
    )
    data, _ = recipe.data.open(needs(recipe, backbone))
    _check_fixed(data)
    with long_work("latents", len(data)) as advance:
        records = _records(recipe, backbone, data, advance=advance)
        return write_unlisted(out, records, per_shard=per_shard, stem="latents")


def _check_fixed(data: Dataset) -> None:
    if not (data.fixed or isinstance(data, Ordered)):
        raise ValueError(
            "latents are written of pictures that are always cut alike; leave out data.buckets, "
            "data.flip and augmentation"
        )
    if set(data.frames) != {1}:
        raise ValueError("latents are written of pictures alone, and this recipe trains on clips")


@torch.no_grad()
def _records(
    recipe: Recipe, backbone: Backbone, data: Dataset, *, advance: object
) -> Iterator[Record]:
    assert callable(advance)
    encoder = encoder_of(recipe, backbone)
    for index in range(len(data)):
        pixels = data.image(index)
        found = as_stored(backbone.moments(pixels[None].to(backbone.device), 1))
        if not bool(found.isfinite().all()):
            raise ValueError(f"{data.key(index)}: its latents are not finite in fp16")
        latent = npy_bytes(found[0].half().cpu().numpy())
        crop = data.crop(index) if isinstance(data, Cropped) else whole(pixels)
        captions = _captions(data, index)
        members = {LATENT: latent, METADATA: facts_json(latent, encoder, crop, captions=captions)}
        cells = data.loss_mask(index) if isinstance(data, Masked) else None
        if cells is not None:
            members[CELLS] = npy_bytes(cells.numpy())
        yield f"{index:09d}", members
        advance(1)


def _captions(data: Dataset, index: int) -> list[str]:
    """Every caption of a sample; ValueError where it is drawn in a way that only its source
    knows."""
    if isinstance(data, Records):
        return list(data.captions(index))
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    caption = data.caption(index, rng)
    if rng.bit_generator.state != before:
        raise ValueError(
            f"{data.key(index)}: its captions are drawn anew at each use, which latents of this "
            "source cannot keep; write the pictures into shards and read them by "
            "data.source=stream, which can"
        )
    return [caption]
