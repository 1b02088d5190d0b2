"""`sample`: generates pictures or clips with an adapter or a backbone."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.cli.options import quiet_libraries, read_options
from trainer.config import lineage
from trainer.config import load as recipes
from trainer.config.overrides import parse_words
from trainer.config.schema import RecipeError
from trainer.methods.method import Method

if TYPE_CHECKING:
    pass


AT_ONCE = 16  # pictures that `sample` paints in one batch, at least one clip
INVERTING = 3  # calls of the network for each step of an inversion


def run(words: list[str]) -> int:
    """Methods that train nothing go with a backbone, by `methods.<name>={}`."""
    named = [word for word in words if word.startswith(("methods.", "methods="))]
    options = read_options(
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
    chosen = recipes.methods_of(parse_words(named)["methods"]) if named else {}
    quiet_libraries()
    kinds = set()
    for path in _sampled(options, chosen):
        print(path)
        kinds.add(path.suffix)
    if kinds == {".gif"}:
        print("no MP4 beside it: PyAV writes one, pip install 'av>=18'", file=sys.stderr)
    return 0


def _sampled(options: Mapping[str, Any], chosen: Mapping[str, Method]) -> Iterator[Path]:
    """The files of `sample`, each when it is written."""
    from trainer.config import header
    from trainer.diffusion.inversion import invert
    from trainer.diffusion.sampler import sample as paint
    from trainer.diffusion.source_clip import source_latents
    from trainer.media.write_video import PLAYED, write_clip
    from trainer.methods.apply import apply_methods
    from trainer.runs.adapter import load_adapted, load_base

    tree: dict[str, Any] = {}
    if options["adapter"]:
        backbone, tree = load_adapted(header.file_of(options["adapter"]), options["backbone"])
    else:
        backbone = load_base(lineage.backbone_spec(options["backbone"]), options["backbone"])
        if chosen:
            apply_methods(backbone, chosen, trains=False)
    look, data = tree.get("preview") or {}, tree.get("data") or {}
    steps = int(options["steps"] or look.get("steps", 25))
    guidance = look.get("guidance", 5.0) if options["guidance"] is None else options["guidance"]
    frames, fps = int(options["frames"] or data.get("frames", 1)), options["fps"]
    source = start = None
    if options["source"]:
        source = source_latents(backbone, Path(options["source"]), frames, fps, data)
        if options["start"] == "source":
            start = invert(backbone, source, [""], steps, frames, fps, INVERTING)
    out, name = Path(options["out"]), slug(options["prompt"])
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
            yield from write_clip(clip, out / f"{name}-{seed}", fps or PLAYED)


def slug(text: str) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in text).split()
    return "-".join(words)[:60] or "sample"
