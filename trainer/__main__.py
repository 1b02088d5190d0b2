"""The command line: verbs and `key=value` words. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import gc
import sys

from trainer.common.exit_codes import BAD_RECIPE, DISK, INTERRUPTED, LeaveError
from trainer.common.spinning import watched
from trainer.common.threads import limit_threads

VERBS = ("fit", "check", "sample", "evaluate", "export", "import", "merge", "data")
USAGE = """usage: python -m trainer <verb> [key=value ...]

  fit recipe=<name> [backbone=<name or folder>] [run=<folder>] [section.key=value ...]
                         train; the run folder with the adapter is printed at the end. A run that
                         is in the folder already goes on where it was
  check recipe=<name> [plan=true] [...]
                         check a recipe completely; plan=true loads the backbone and shows what
                         would train
  sample adapter=<file or run folder> | backbone=<name or folder>   prompt="..."
         [count=1 seed=0 steps=25 guidance=5 negative="" out=samples]
         [frames=1 fps=8 source=<video> start=source|noise methods.<name>={}]
                         write PNGs, or of frames=8 an MP4 and a GIF; source begins from the noise
                         of a video, which the prompt then edits; methods: those that train nothing
  evaluate run=<run folder> [judge=<CLIP folder>]
                         base beside adapted, in numbers
  export run=<run folder> | adapter=<file>   out=<folder> [format=merged dtype=float32 rank=...]
                         write for other tools, and prove it: merged, diffusers, custom_diffusion,
                         kohya, comfyui, diff, peft
  import file=<file or folder> backbone=<name or folder> out=<adapter.safetensors> [format=auto]
                         an adapter of ours from a file made elsewhere, for run.start_from
  merge adapter=[<run folder or file>,...] out=<adapter.safetensors> [captions=<text file>]
                         Custom Diffusion concepts trained apart into one adapter, in closed form
  data world out=<folder> [count=1000 seed=0 sprites=known per_shard=1000]
                         write scenes of the embedded world as webdataset shards with a manifest
       clips out=<folder> [count=1000 frames=8 fps=... seed=0 sprites=known per_shard=1000]
                         the same with sprites that move, as MP4
       build shards=<folder or .tar> [ignore=[...]]
                         read every shard once and write the manifest beside them
       verify shards=<folder or .tar> | folder=<photos>
                         hold every byte against the manifest, or decode every photo, and name what
                         is wrong; the exit code is 65 if anything is
       inspect recipe=<name> [count=16 step=0 out=inspect.png] [section.key=value ...]
                         draw what the trainer sees from a step on: the cut, the caption, the mask,
                         the bucket; and count sizes and buckets
  list [recipes|backbones|methods|data]
                         what there is

example: python -m trainer fit recipe=custom_diffusion backbone=sd15 data.concept=./my_dog
"""


def main(words: list[str]) -> int:
    verb, *rest = words or ["--help"]
    if verb in ("-h", "--help", "help") or any(word in ("-h", "--help") for word in rest):
        print(USAGE, end="")
        return 0
    if verb == "list":
        return _list(rest)
    if verb not in VERBS:
        import difflib

        near = difflib.get_close_matches(verb, [*VERBS, "list"], 1)
        print(
            f"error: no verb is called {verb!r}" + (f"; did you mean {near[0]}?" if near else ""),
            file=sys.stderr,
        )
        print(USAGE, end="", file=sys.stderr)
        return BAD_RECIPE
    try:
        import importlib

        limit_threads()
        name = "import_" if verb == "import" else verb  # a word of Python's own
        with watched():
            return int(importlib.import_module(f"trainer.cli.{name}").run(rest) or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except LeaveError as leaving:
        if leaving.code:  # a rank that another has started says nothing
            print(leaving, file=sys.stderr)
        return leaving.code
    except OSError as error:
        import errno

        print(f"error: {error}", file=sys.stderr)
        return DISK if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else 1
    except (ValueError, ModuleNotFoundError) as error:
        # what a user can mend; anything else is ours and keeps its traceback
        print(f"error: {error}", file=sys.stderr)
        return BAD_RECIPE


def _list(rest: list[str]) -> int:
    """Names and their first comment line, read as text: no YAML, no torch."""
    from trainer.common.lookup import method_files, source_files
    from trainer.common.paths import BACKBONES, RECIPES

    def first_line(path: object) -> str:
        with open(str(path), encoding="utf-8") as file:
            return file.readline().strip().lstrip('#" ').rstrip('"')

    tables = {
        "recipes": sorted(RECIPES.glob("*.yaml")),
        "backbones": sorted(BACKBONES.glob("*.yaml")),
        "methods": method_files(),
        "data": source_files(),
    }
    for wanted in rest:
        if wanted not in tables:
            print(f"error: list {wanted}: there are {', '.join(tables)}", file=sys.stderr)
            return BAD_RECIPE
    for name, paths in tables.items():
        if rest and name not in rest:
            continue
        print(f"{name}:")
        for path in paths:
            print(f"  {path.stem:20} {first_line(path)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    finally:
        gc.freeze()  # to collect what the process is about to give back takes Python seconds
