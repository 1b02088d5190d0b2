"""What each verb of the command line does with its words."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from trainer import recipe as recipes
from trainer.schema import RecipeError


def fit(words: list[str]) -> int:
    loaded = recipes.load(words)
    _quiet()
    from trainer.fit import fit as run

    folder = run(loaded)
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    if getattr(rank_zero_only, "rank", 0) == 0:
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

    from trainer import backbones, methods, report

    backbone = backbones.load(loaded.backbone, loaded.backbone_name)
    applied = methods.apply(backbone, loaded.methods)
    if loaded.run.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    facts = report.describe(
        loaded, backbone, applied, report.peak_memory(loaded, backbone, applied)
    )
    report.show(facts, loaded.methods, Console(width=max(100, Console().width)))
    return 0


def sample(words: list[str]) -> int:
    options = _options(
        words,
        {"adapter": None, "backbone": None, "prompt": None, "count": 1, "seed": 0, "steps": None,
        "guidance": None,
         "negative": "", "out": "samples"},
    )  # fmt: skip
    if not options["prompt"]:
        raise RecipeError('prompt is missing, as in prompt="a <v1> on a blue background"')
    if not (options["adapter"] or options["backbone"]):
        raise RecipeError("give adapter=<file or run folder>, or backbone=<name or folder>")
    _quiet()
    from trainer import adapter, backbones
    from trainer.data.images import to_pil
    from trainer.sampler import sample_many

    look: dict[str, Any] = {}
    if options["adapter"]:
        backbone, tree = adapter.load(adapter.file_of(options["adapter"]), options["backbone"])
        look = tree.get("preview") or {}
    else:
        backbone = backbones.load(recipes.backbone_spec(options["backbone"]), options["backbone"])
    steps = options["steps"] or look.get("steps", 25)
    guidance = look.get("guidance", 5.0) if options["guidance"] is None else options["guidance"]
    seeds = [options["seed"] + i for i in range(options["count"])]
    pictures = sample_many(
        backbone,
        [options["prompt"]] * len(seeds),
        seeds,
        16,
        int(steps),
        float(guidance),
        str(options["negative"]),
    )
    out = Path(options["out"])
    out.mkdir(parents=True, exist_ok=True)
    for seed, picture in zip(seeds, pictures, strict=True):
        path = out / f"{_slug(options['prompt'])}-{seed}.png"
        to_pil(picture).save(path)
        print(path)
    return 0


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
    """`data world out=<folder>`: scenes as shards."""
    if words[:1] != ["world"]:
        raise RecipeError("data world out=<folder>: the embedded world is what can be written")
    options = _options(
        words[1:], {"out": None, "count": 1000, "seed": 0, "sprites": "known", "per_shard": 1000}
    )
    if not options["out"]:
        raise RecipeError("out is missing, as in out=./world")
    from trainer.data.write_shards import write_world

    for path in write_world(
        options["out"], options["count"], options["seed"], options["sprites"], options["per_shard"]
    ):
        print(path)
    return 0


def _options(words: list[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """A verb's words over its defaults, checked; `key=null` is as if it were not given."""
    given = recipes.parse(words)
    recipes.refuse_unknown(given, defaults, "")
    given = {key: value for key, value in given.items() if value is not None}
    for key, value in given.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        least = 0 if key == "seed" else 1
        if isinstance(defaults[key], int) or key in ("steps", "rank"):
            if not whole or value < least:
                raise RecipeError(f"{key}={value!r}: a whole number is needed, at least {least}")
        elif key == "guidance":
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
