"""A run folder: where it is, whether its run is finished, and what happened in it.

    recipe.yaml                the resolved recipe
    plan.json                  what its methods did to the model, and what trains
    adapter.safetensors        the result
    checkpoints/step-000120/   see `training/checkpoint.py`
    events.jsonl               a line for each start and end, each checkpoint that was skipped or
                               could not be written, and each skipped step
    metrics.jsonl              a line for each time that metrics are logged
    .lock                      the program that is training here

Previews, the tracker's files and `evaluation.json` are in the same folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainer.common.atomic import written_atomically
from trainer.config.header import read_header
from trainer.config.run_section import RunSpec
from trainer.config.schema import Recipe

WHERE = ("id", "out", "start_from")
SAME_SECTIONS = ("backbone", "denoiser", "data", "methods", "objective", "optim")
# the keys of `run` that decide which numbers are computed
SAME_RUN_KEYS = ("batch_size", "accumulate", "seed", "resolution", "precision", "cache_latents")


def folder_for(recipe: Recipe) -> Path:
    """`runs/<recipe>/<id>`, the same for every rank of a run."""
    name = recipe.run.id or os.environ.setdefault("TRAINER_RUN_ID", time.strftime("%Y%m%d-%H%M%S"))
    return recipe.run.out / Path(recipe.name).stem / name


def recipe_header(recipe: Recipe) -> dict[str, Any]:
    """The recipe as adapters and checkpoints store it: without the keys that only say where the run
    was written or started from (`WHERE`)."""
    run = {k: v for k, v in (recipe.tree.get("run") or {}).items() if k not in WHERE}
    return {"recipe": recipe.name, **recipe.tree, "run": run}


def is_finished(folder: Path, recipe: Recipe) -> bool:
    """Whether the folder holds a run that has done all the recipe's steps. A run that finished
    with fewer steps is not finished: it continues.

    Raises:
        ValueError: it holds the finished run of another recipe.
    """
    path = folder / "adapter.safetensors"
    if not path.is_file():
        return False
    tree, _ = read_header(path)
    if unlike := differing_keys(tree, recipe):
        raise ValueError(
            f"{folder} holds a finished run with another {unlike[0]}; choose another run.id"
        )
    return bool(_run(tree, "steps") >= recipe.run.steps)


def differing_keys(tree: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """The sections, and the keys of `run`, in which a stored recipe differs from this one."""
    sections = [key for key in SAME_SECTIONS if tree.get(key) != recipe.tree.get(key)]
    keys = [key for key in SAME_RUN_KEYS if _run(tree, key) != _run(recipe.tree, key)]
    return [*sections, *(f"run.{key}" for key in keys)]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other programs from training in the folder inside the block.

    The system releases the lock when the process ends, however it ends. On a file system without
    locks nothing is kept out.

    Raises:
        ValueError: another program is training there; the message names it.
    """
    with (folder / ".lock").open("ab+", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read().decode() or "another program"
            raise ValueError(
                f"{folder}: {who} is training there; wait until it ends, or choose another run.id"
            ) from None
        except OSError:
            pass
        with suppress(OSError):  # the disk may be full
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}".encode())
        try:
            yield
        finally:
            with suppress(OSError):
                file.truncate(0)


def note_event(folder: Path, event: str, **facts: Any) -> None:
    """Adds a line to `events.jsonl`."""
    append_line(folder / "events.jsonl", {"event": event, **facts})


def append_line(path: Path, facts: Mapping[str, Any]) -> None:
    """Adds a line of JSON with the time. A full disk does not end the run: the line is lost."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    with suppress(OSError), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": when, **facts}) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces a file's text. After a full disk or a kill the old file is still complete."""
    with written_atomically(path) as part:
        part.write_text(text, encoding="utf-8")


def _run(tree: Mapping[str, Any], key: str) -> Any:
    return (tree.get("run") or {}).get(key, RunSpec.model_fields[key].default)
