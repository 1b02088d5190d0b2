"""`data`: writes, indexes, verifies and inspects data sets."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.cli.options import quiet_libraries, read_options
from trainer.common.exit_codes import DAMAGED
from trainer.config import tree as tree_
from trainer.config.load import load_recipe
from trainer.config.overrides import parse_words
from trainer.config.schema import RecipeError
from trainer.config.validate import build_section

if TYPE_CHECKING:
    from trainer.data.sources.shards import Shards


def run(words: list[str]) -> int:
    """`data world`, `clips`, `build`, `verify` or `inspect`, and what each of them takes."""
    kinds = {
        "world": _data_world, "clips": _data_clips, "build": _data_build, "verify": _data_verify,
        "inspect": _data_inspect,
    }  # fmt: skip
    kind, rest = (words[0], words[1:]) if words else ("", [])
    if kind not in kinds:
        said = f"{kind!r} is none of them" if kind else "one of them is needed"
        raise RecipeError(f"data {', '.join(kinds)}: {said}, as in data verify shards=./shards")
    return kinds[kind](rest)


WORLD = {"out": None, "count": 1000, "seed": 0, "sprites": "known", "per_shard": 1000}


def _data_world(words: list[str]) -> int:
    from trainer.data.tars.write_shards import write_world

    return _written(write_world, read_options(words, WORLD))


def _data_clips(words: list[str]) -> int:
    options = read_options(words, {**WORLD, "frames": 8, "fps": None})
    from trainer.data.tars.write_clips import write_clips

    return _written(write_clips, options)


def _written(write: Callable[..., list[Path]], options: dict[str, Any]) -> int:
    if not (out := options.pop("out")):
        raise RecipeError("out is missing, as in out=./world")
    for path in write(out, **options):
        print(path)
    return 0


def _data_build(words: list[str]) -> int:
    """Never over a manifest that is there: it may be the one witness of a damage."""
    source = _shards(words)
    from trainer.common.paths import cache_folder
    from trainer.data.tars.ledger import build_manifest, kept_manifest

    if (kept := kept_manifest(source.shards, cache_folder())) is not None:
        raise ValueError(
            f"{kept[0]} is there already; `data verify shards={source.shards}` holds the shards "
            "against it, and if they are meant to differ, remove it first"
        )
    place, made = build_manifest(source.shards, cache_folder(), source.ignore)
    for shard in made:
        for reason in shard.bad:
            print(f"cannot be used: {shard.name}: {reason}", file=sys.stderr)
    samples, size = sum(len(each.samples) for each in made), sum(each.size for each in made)
    print(f"{place}: {len(made)} shards, {samples} samples, {size:,} bytes")
    return 0


def _data_verify(words: list[str]) -> int:
    from trainer.common.paths import cache_folder
    from trainer.data.tars import verify

    given = parse_words(words)
    if "folder" in given:
        tree_.refuse_unknown(given, ("folder",), "")
        found, whole = verify.photos(Path(str(given["folder"])).expanduser())
    else:
        source = _shards(words)
        found, whole = verify.shards(source.shards, cache_folder(), source.ignore)
    for reason in found:
        print(reason)
    if found:
        print(f"{len(found)} things are wrong; {whole}", file=sys.stderr)
        return DAMAGED
    print(f"all as it should be: {whole}")
    return 0


def _data_inspect(words: list[str]) -> int:
    own = [word for word in words if word.startswith(("count=", "out=", "step="))]
    options = read_options(own, {"count": 16, "step": 0, "out": "inspect.png"})
    loaded = load_recipe(word for word in words if word not in own)
    quiet_libraries()
    from trainer.training.inspect import inspect

    for line in inspect(loaded, options["count"], options["step"], Path(options["out"])):
        print(line)
    return 0


def _shards(words: list[str]) -> Shards:
    """`shards=` and `ignore=`, as the source of that name takes them."""
    from trainer.data.sources.shards import Shards

    given = parse_words(words)
    tree_.refuse_unknown(given, ("shards", "ignore"), "")
    if "shards" not in given:
        raise RecipeError("shards is missing, as in shards=./shards, a folder of .tar files")
    return build_section(Shards, given, "data")
