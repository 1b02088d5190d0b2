"""What each verb of the command line does with its words."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import recipe as recipes
from trainer.exits import DAMAGED
from trainer.methods import Method
from trainer.schema import RecipeError

if TYPE_CHECKING:
    from trainer.data.shards import Shards

AT_ONCE = 16  # pictures that `sample` paints in one batch, at least one clip
INVERTING = 3  # calls of the network for each step of an inversion


def fit(words: list[str]) -> int:
    """`run=<folder>` is where: a run there goes on, one that is finished is left as it is."""
    places = [word for word in words if word.startswith("run=") and word[4:5] != "{"]
    loaded = recipes.load(word for word in words if word not in places)
    if len(places) > 1 or "run=" in places:
        raise RecipeError("run=<folder> is given once, as in run=runs/custom_diffusion/<id>")
    if places and loaded.run.id is not None:
        raise RecipeError(f"{places[0]} and run.id={loaded.run.id} both name a folder; give one")
    _quiet()
    from trainer.fit import first_rank
    from trainer.fit import fit as run

    folder = run(loaded, Path(places[0].removeprefix("run=")).expanduser() if places else None)
    if first_rank():
        print(folder)
    return 0


def check(words: list[str]) -> int:
    """Validates without loading a weight; with plan=true loads the backbone and prints what would
    train."""
    plan = [word for word in words if word.startswith("plan=")]
    loaded = recipes.load(word for word in words if word not in plan)
    if plan and plan[-1] not in ("plan=true", "plan=false"):
        raise RecipeError(f"{plan[-1]}: plan is true or false")
    if "plan=true" not in plan:
        print(
            f"{loaded.name}: fine; backbone {loaded.backbone_name}, methods "
            f"{', '.join(loaded.methods)}"
        )
        return 0
    _quiet()
    from rich.console import Console

    from trainer import adapter, methods, report

    backbone = adapter.base(loaded.backbone, loaded.backbone_name)
    applied = methods.apply(backbone, loaded.methods, held=loaded.optim.held)
    if loaded.run.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    facts = report.describe(
        loaded, backbone, applied, report.peak_memory(loaded, backbone, applied)
    )
    report.show(facts, loaded.methods, Console(width=max(100, Console().width)))
    return 0


def sample(words: list[str]) -> int:
    """Methods that train nothing go with a backbone, by `methods.<name>={}`."""
    named = [word for word in words if word.startswith(("methods.", "methods="))]
    options = _options(
        [word for word in words if word not in named],
        {"adapter": None, "backbone": None, "prompt": None, "count": 1, "seed": 0, "steps": None,
        "guidance": None, "frames": None, "fps": None, "source": None, "start": "source",
         "negative": "", "out": "samples"},
    )  # fmt: skip
    if not options["prompt"]:
        raise RecipeError('prompt is missing, as in prompt="a <v1> on a blue background"')
    if not (options["adapter"] or options["backbone"]):
        raise RecipeError("give adapter=<file or run folder>, or backbone=<name or folder>")
    if named and options["adapter"]:
        raise RecipeError("an adapter brings its methods along; methods go with backbone= alone")
    if options["start"] not in ("source", "noise"):
        raise RecipeError(f"start={options['start']}: source or noise")
    if options["fps"] is not None and options["fps"] <= 0:
        raise RecipeError(f"fps={options['fps']}: frames a second, above 0")
    if options["count"] > 1 and options["source"] and options["start"] == "source":
        raise RecipeError("start=source paints the same with every seed; leave count at 1")
    chosen = recipes.methods_of(recipes.parse(named)["methods"]) if named else {}
    _quiet()
    kinds = set()
    for path in _sampled(options, chosen):
        print(path)
        kinds.add(path.suffix)
    if kinds == {".gif"}:
        print("no MP4 beside it: PyAV writes one, pip install 'av>=18'", file=sys.stderr)
    return 0


def _sampled(options: Mapping[str, Any], chosen: Mapping[str, Method]) -> Iterator[Path]:
    """The files of `sample`, each when it is written."""
    from trainer import adapter, methods
    from trainer.films import PLAYED, source_latents, write
    from trainer.inversion import invert
    from trainer.sampler import sample as paint

    tree: dict[str, Any] = {}
    if options["adapter"]:
        backbone, tree = adapter.load(adapter.file_of(options["adapter"]), options["backbone"])
    else:
        backbone = adapter.base(recipes.backbone_spec(options["backbone"]), options["backbone"])
        if chosen:
            methods.apply(backbone, chosen, trains=False)
    look, data = tree.get("preview") or {}, tree.get("data") or {}
    steps = int(options["steps"] or look.get("steps", 25))
    guidance = look.get("guidance", 5.0) if options["guidance"] is None else options["guidance"]
    frames, fps = int(options["frames"] or data.get("frames", 1)), options["fps"]
    source = start = None
    if options["source"]:
        source = source_latents(backbone, Path(options["source"]), frames, fps, data)
        if options["start"] == "source":
            start = invert(backbone, source, [""], steps, frames, fps, INVERTING)
    out, name = Path(options["out"]), _slug(options["prompt"])
    out.mkdir(parents=True, exist_ok=True)
    seeds = range(options["seed"], options["seed"] + options["count"])
    at_once = max(1, AT_ONCE // frames)
    for part in (seeds[i : i + at_once] for i in range(0, len(seeds), at_once)):
        pictures = paint(
            backbone,
            [options["prompt"]] * len(part),
            part,
            steps,
            float(guidance),
            str(options["negative"]),
            frames=frames,
            fps=fps,
            source=None if source is None else source.repeat(len(part), 1, 1, 1),
            start=start,
        )
        for seed, clip in zip(part, pictures.split(frames), strict=True):
            yield from write(clip, out / f"{name}-{seed}", fps or PLAYED)


def evaluate(words: list[str]) -> int:
    options = _options(words, {"run": None, "judge": None, "images": 32, "batch": 32})
    if not options["run"]:
        raise RecipeError("run is missing, as in run=runs/custom_diffusion/<id>")
    _quiet()
    from trainer.evaluate import evaluate as judge_run

    judge_run(Path(options["run"]), options["judge"], int(options["images"]), int(options["batch"]))
    return 0


def export(words: list[str]) -> int:
    options = _options(
        words,
        {"run": None, "adapter": None, "out": None, "format": "merged", "dtype": "float32",
         "rank": None},
    )  # fmt: skip
    source = options["adapter"] or options["run"]
    if not source or not options["out"]:
        raise RecipeError("give run=<run folder> (or adapter=<file>) and out=<folder>")
    _quiet()
    from trainer.adapter import file_of
    from trainer.export import export as write

    form, dtype, rank = options["format"], options["dtype"], options["rank"]
    print(write(file_of(source), Path(options["out"]), form, dtype, rank))
    return 0


def import_(words: list[str]) -> int:
    options = _options(words, {"file": None, "backbone": None, "out": None, "format": "auto"})
    if not (options["file"] and options["backbone"] and options["out"]):
        raise RecipeError(
            "give file=<file or folder>, backbone=<name or folder> and out=<adapter.safetensors>"
        )
    _quiet()
    from trainer.formats._import import import_file

    source, out = Path(options["file"]).expanduser(), Path(options["out"]).expanduser()
    print(import_file(source, options["backbone"], out, options["format"]))
    return 0


def merge(words: list[str]) -> int:
    """Captions, if given, are a text file with one ordinary caption a line."""
    given = recipes.parse(words)
    recipes.refuse_unknown(given, ("adapter", "out", "captions"), "")
    sources, out, captions = (given.get(key) for key in ("adapter", "out", "captions"))
    if not isinstance(sources, list) or not isinstance(out, str):
        raise RecipeError("give adapter=[<run>,<run>] and out=<adapter.safetensors>")
    lines = None
    if captions is not None:
        text = Path(str(captions)).expanduser().read_text(encoding="utf-8")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise RecipeError(f"captions={captions}: no caption in it; write one a line")
    _quiet()
    from trainer.adapter import file_of
    from trainer.merge import merge as write

    tokens = write([file_of(str(source)) for source in sources], Path(out).expanduser(), lines)
    print(f"{out}: {', '.join(tokens)}")
    return 0


def data(words: list[str]) -> int:
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
    from trainer.data.write_shards import write_world

    return _written(write_world, _options(words, WORLD))


def _data_clips(words: list[str]) -> int:
    options = _options(words, {**WORLD, "frames": 8, "fps": None})
    from trainer.data.write_clips import write_clips

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
    from trainer.data.shards import build, kept_manifest
    from trainer.resources import cache_folder

    if (kept := kept_manifest(source.shards, cache_folder())) is not None:
        raise ValueError(
            f"{kept[0]} is there already; `data verify shards={source.shards}` holds the shards "
            "against it, and if they are meant to differ, remove it first"
        )
    place, made = build(source.shards, cache_folder(), source.ignore)
    for shard in made:
        for reason in shard.bad:
            print(f"cannot be used: {shard.name}: {reason}", file=sys.stderr)
    samples, size = sum(len(each.samples) for each in made), sum(each.size for each in made)
    print(f"{place}: {len(made)} shards, {samples} samples, {size:,} bytes")
    return 0


def _data_verify(words: list[str]) -> int:
    from trainer.data import verify
    from trainer.resources import cache_folder

    given = recipes.parse(words)
    if "folder" in given:
        recipes.refuse_unknown(given, ("folder",), "")
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
    options = _options(own, {"count": 16, "step": 0, "out": "inspect.png"})
    loaded = recipes.load(word for word in words if word not in own)
    _quiet()
    from trainer.contact import inspect

    for line in inspect(loaded, options["count"], options["step"], Path(options["out"])):
        print(line)
    return 0


def _shards(words: list[str]) -> Shards:
    """`shards=` and `ignore=`, as the source of that name takes them."""
    from trainer.data.shards import Shards

    given = recipes.parse(words)
    recipes.refuse_unknown(given, ("shards", "ignore"), "")
    if "shards" not in given:
        raise RecipeError("shards is missing, as in shards=./shards, a folder of .tar files")
    return recipes.build(Shards, given, "data")


def _options(words: list[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """A verb's words over its defaults, checked; `key=null` is as if it were not given."""
    given = recipes.parse(words)
    recipes.refuse_unknown(given, defaults, "")
    given = {key: value for key, value in given.items() if value is not None}
    for key, value in given.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        least = 0 if key in ("seed", "step") else 1
        if isinstance(defaults[key], int) or key in ("steps", "rank", "frames"):
            if not whole or value < least:
                raise RecipeError(f"{key}={value!r}: a whole number is needed, at least {least}")
        elif key in ("guidance", "fps"):
            if not (whole or isinstance(value, float)):
                raise RecipeError(f"{key}={value!r}: a number is needed")
        elif not isinstance(value, str):
            raise RecipeError(f"{key}={value!r}: text is needed; quote it, as in {key}=\"'12'\"")
    return {**defaults, **given}


def _slug(text: str) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in text).split()
    return "-".join(words)[:60] or "sample"


def _quiet() -> None:
    """The libraries below talk about themselves; the run has its own lines."""
    import logging
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of an optional kernel, at import
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)  # GPU: no, TPU: no, and advertisements
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
