"""`data`: writes, indexes, verifies and inspects data sets."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, PositiveFloat, model_validator

from trainer.cli.options import (
    Count,
    Options,
    RecipeOptions,
    SeedNumber,
    quiet_libraries,
    read_options,
    split_options,
)
from trainer.common.exit_codes import DAMAGED
from trainer.config.load import load_recipe
from trainer.config.schema import RecipeError
from trainer.config.value_errors import build_section
from trainer.data.source_options import Sprites

if TYPE_CHECKING:
    from trainer.data.sources.shards import Shards


class WorldOptions(Options):
    """Writes captioned scenes of the embedded world as webdataset shards with a manifest."""

    out: Path = Field(description="the folder to write; it must not exist", examples=["./world"])
    count: Count = Field(1000, description="scenes, or clips, to write")
    seed: SeedNumber = Field(0, description="another seed gives other scenes")
    sprites: Sprites = "known"
    per_shard: Count = Field(1000, description="samples in each .tar file")


class ClipsOptions(WorldOptions):
    """Writes clips of the embedded world, sprites that move, as MP4 in webdataset shards."""

    frames: Count = Field(8, description="frames of each clip")
    fps: PositiveFloat | None = Field(
        None, description="frames a second of all clips; null draws a rate for each"
    )


class BuildOptions(RecipeOptions):
    """Reads every shard once and writes the manifest beside them; a manifest that is already there
    is never replaced, because it may be the only record of what the shards once held. With
    recipe= and out= it writes the latents of the recipe's pictures as shards instead, which
    data.source=stream reads; every key of the recipe can then be given as well."""

    shards: str | None = Field(
        None, description="a folder of .tar files, or one of them", examples=["./shards"]
    )
    out: Path | None = Field(
        None, description="with recipe=: the folder of latents to write; it must not exist"
    )
    per_shard: Count = Field(10_000, description="with recipe=: samples in each .tar file")
    ignore: tuple[str, ...] = Field(
        (), description="extensions of members to leave out, as in [cls,npy]"
    )


class VerifyOptions(Options):
    """Compares every byte of shards with their manifest, or decodes every photo of a folder, and
    names what is wrong; the exit code is 65 if anything is. shards or folder is needed."""

    shards: str | None = Field(
        None, description="a folder of .tar files, or one of them", examples=["./shards"]
    )
    ignore: tuple[str, ...] = Field(
        (), description="with shards=: extensions of members to leave out, as in [cls,npy]"
    )
    folder: Path | None = Field(None, description="a folder of photos, in place of shards")

    @model_validator(mode="after")
    def _one_of_them(self) -> VerifyOptions:
        if (self.shards is None) == (self.folder is None):
            raise ValueError("give shards=<folder or .tar>, or folder=<photos>, and not both")
        if self.folder is not None and self.ignore:
            raise ValueError("ignore= goes with shards= alone; remove it")
        return self


class InspectOptions(RecipeOptions):
    """Draws what the trainer sees: each sample as it is cut, its caption, mask and bucket; and
    counts sizes and buckets. Every key of the recipe can be given as well."""

    count: Count = Field(16, description="samples to draw")
    step: SeedNumber = Field(0, description="the first micro-batch to draw from, counted from 0")
    out: Path = Field(Path("inspect.png"), description="the PNG to write")


def run(words: list[str]) -> int:
    """`data world`, `clips`, `build`, `verify` or `inspect`, and the options of each."""
    name, rest = (words[0], words[1:]) if words else ("", [])
    if name not in COMMANDS:
        said = f"{name!r} is none of them" if name else "one of them is needed"
        raise RecipeError(f"data {', '.join(COMMANDS)}: {said}, as in data verify shards=./shards")
    command, _ = COMMANDS[name]
    return command(rest)


def _world(words: list[str]) -> int:
    from trainer.data.tars.write_shards import write_world

    return _written(write_world, read_options(words, WorldOptions))


def _clips(words: list[str]) -> int:
    options = read_options(words, ClipsOptions)
    from trainer.data.tars.write_clips import write_clips

    return _written(write_clips, options)


def _written(write: Callable[..., list[Path]], options: WorldOptions) -> int:
    for path in write(options.out.expanduser(), **options.model_dump(exclude={"out"})):
        print(path)
    return 0


def _build(words: list[str]) -> int:
    options, rest = split_options(words, BuildOptions)
    if options.out is not None or rest:
        return _build_latents(options, rest)
    if options.shards is None:
        raise RecipeError(
            "shards is missing, as in shards=./shards; or give recipe= and out= for shards of "
            "latents"
        )
    source = _shards(options.shards, options.ignore)
    from trainer.common.paths import cache_folder
    from trainer.data.tars.shard_checksums import build_manifest, kept_manifest

    if (kept := kept_manifest(source.shards, cache_folder())) is not None:
        raise ValueError(
            f"{kept[0]} is there already; `data verify shards={source.shards}` compares the shards "
            "with it, and if they are meant to differ, remove it first"
        )
    place, made = build_manifest(source.shards, cache_folder(), source.ignore)
    for shard in made:
        for reason in shard.bad:
            print(f"cannot be used: {shard.name}: {reason}", file=sys.stderr)
    samples, size = sum(len(each.samples) for each in made), sum(each.size for each in made)
    print(f"{place}: {len(made)} shards, {samples} samples, {size:,} bytes")
    return 0


def _build_latents(options: BuildOptions, words: list[str]) -> int:
    if options.out is None or options.shards is not None or options.ignore:
        raise RecipeError(
            "data build recipe=... out=./latents writes latents, without shards= and ignore=; data "
            "build shards=./shards writes a manifest, without keys of a recipe"
        )
    loaded = load_recipe(words)
    for line in loaded.said:
        print(line)
    quiet_libraries()
    from trainer.training.latent_shards import write_latents

    for path in write_latents(loaded, options.out.expanduser(), options.per_shard):
        print(path)
    return 0


def _verify(words: list[str]) -> int:
    options = read_options(words, VerifyOptions)
    from trainer.common.paths import cache_folder
    from trainer.data.tars import verify

    if options.folder is not None:
        found, summary = verify.photos(options.folder.expanduser())
    else:
        source = _shards(options.shards, options.ignore)
        found, summary = verify.shards(source.shards, cache_folder(), source.ignore)
    for reason in found:
        print(reason)
    if found:
        print(f"problems found: {len(found)}; {summary}", file=sys.stderr)
        return DAMAGED
    print(f"no problem found: {summary}")
    return 0


def _inspect(words: list[str]) -> int:
    options, rest = split_options(words, InspectOptions)
    loaded = load_recipe(rest)
    for line in loaded.said:
        print(line)
    quiet_libraries()
    from trainer.training.inspect import inspect

    for line in inspect(loaded, options.count, step=options.step, out=options.out.expanduser()):
        print(line)
    return 0


def _shards(shards: str | None, ignore: tuple[str, ...]) -> Shards:
    """The two options, checked as the data source of that name checks them."""
    from trainer.data.sources.shards import Shards

    return build_section(Shards, {"shards": shards, "ignore": list(ignore)}, "data")


COMMANDS: dict[str, tuple[Callable[[list[str]], int], type[Options]]] = {
    "world": (_world, WorldOptions),
    "clips": (_clips, ClipsOptions),
    "build": (_build, BuildOptions),
    "verify": (_verify, VerifyOptions),
    "inspect": (_inspect, InspectOptions),
}
