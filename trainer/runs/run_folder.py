"""A run folder: where it is, whether its run is finished, and what happened in it.

    recipe.yaml                the resolved recipe
    plan.json                  what its methods did to the model, and what trains
    adapter.safetensors        the result
    adapters/                  step_000200.safetensors and others of `run.keep_adapters`
    checkpoints/step-000120/   see `training/checkpoint_files.py`
    events.jsonl               a line for each start and end, each checkpoint that was skipped or
                               could not be written, and each skipped step
    metrics.jsonl              a line for each time that metrics are logged
    previews/                  see `training/callbacks/preview_files.py`
    tracker.id                 what wandb knows the run by, and which folder that was drawn for
    .lock                      locked by the program that is training here
    .holder                    which one that is

The tracker's files and `evaluation.json`, or `evaluation_by_step.json` and its picture, are in the
same folder.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trainer.common.atomic import written_atomically
from trainer.config.header import read_header
from trainer.config.resume_rules import FREE, changed_keys
from trainer.config.run_section import RunSpec
from trainer.config.schema import Recipe

KEPT_NAME = re.compile(r"step_(\d{6,})\.safetensors")
WHERE = ("id", "out", "start_from")
UNLISTED = (*(f"run.{key}" for key in WHERE), "run.steps")  # an adapter does not have the first


def folder_for(recipe: Recipe) -> Path:
    """`runs/<recipe>/<id>`, the same for every rank of a run."""
    name = recipe.run.id or os.environ.setdefault("TRAINER_RUN_ID", time.strftime("%Y%m%d-%H%M%S"))
    return recipe.run.out.expanduser() / Path(recipe.name).stem / name


def made(folder: Path) -> Path:
    """The run folder, made where there is none; raises ValueError as `check_place`."""
    check_place(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_place(folder: Path) -> None:
    """Raises ValueError where a file has the name of a run folder or of a folder above it."""
    found = next((place for place in (folder, *folder.parents) if place.exists()), None)
    if found is not None and not found.is_dir():
        raise ValueError(
            f"{found}: this is a file, where a run needs a folder; give another run.out, or "
            "run=<folder>"
        )


def step_name(step: int) -> str:
    """What the folders of a step's checkpoint and previews are called: step-000300."""
    return f"step-{step:06d}"


def kept_adapter(folder: Path, step: int) -> Path:
    """Where a run keeps its adapter of a step; see `run.keep_adapters`."""
    return folder / "adapters" / f"step_{step:06d}.safetensors"


def kept_adapters(folder: Path) -> dict[int, Path]:
    """The adapters that a run has kept along the way, by their steps, the first one first."""
    found = ((KEPT_NAME.fullmatch(path.name), path) for path in (folder / "adapters").glob("*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def step_of_kept(path: Path) -> int | None:
    """The step of a file of `kept_adapters`; None for any other file."""
    found = KEPT_NAME.fullmatch(path.name)
    return int(found[1]) if found and path.absolute().parent.name == "adapters" else None


def later_checkpoint(path: Path) -> str | None:
    """What is to be said of a run's adapter where the run has gone on since and has checkpoints of
    later steps; None where it has not, or where the adapter is of one step by its name."""
    run = run_of_adapter(path)
    if path.name != "adapter.safetensors" or not path.is_file():
        return None
    names = (each.name.removeprefix("step-") for each in (run / "checkpoints").glob("step-*"))
    latest, done = max((int(name) for name in names if name.isdigit()), default=0), 0
    with suppress(ValueError):  # what is wrong with its header is said when it is read
        done = steps_asked_of(read_header(path)[0])
    if not 0 < done < latest:
        return None
    return (
        f"{run}: this run goes on, and its adapter is that of step {done}; of step {latest} there "
        f"is a checkpoint, adapter={run / 'checkpoints' / step_name(latest)}"
    )


def run_of_adapter(path: Path) -> Path:
    """The run folder that an adapter file is in."""
    folder = path.absolute().parent
    return folder if step_of_kept(path) is None else folder.parent


def recipe_header(recipe: Recipe) -> dict[str, Any]:
    """The recipe as adapters and checkpoints store it: without the keys that only say where the run
    was written or started from (`WHERE`)."""
    run = {k: v for k, v in (recipe.tree.get("run") or {}).items() if k not in WHERE}
    return {"recipe": recipe.name, **recipe.tree, "run": run}


def steps_asked_of(tree: Mapping[str, Any]) -> int:
    """How many steps a run of a stored recipe has."""
    own = (tree.get("run") or {}).get("steps")
    return int(RunSpec.model_fields["steps"].default if own is None else own)


def is_finished(folder: Path, recipe: Recipe) -> bool:
    """Whether the folder holds a run that has done all the recipe's steps. One that finished with
    fewer steps is not finished: it continues from its last checkpoint.

    Raises:
        ValueError: it holds the finished run of another recipe, or one of more steps; or one of
            fewer steps without a checkpoint, whose adapter would be written over.
    """
    path = folder / "adapter.safetensors"
    if not path.is_file():
        return False
    tree, _ = read_header(path)
    done = steps_asked_of(tree)
    if done < recipe.run.steps:
        if any((folder / "checkpoints").glob("step-*")):
            return False  # its checkpoint says whether this recipe may go on with it
        raise ValueError(
            f"{folder} holds a finished run of {done} steps and no checkpoint to go on from to "
            f"run.steps={recipe.run.steps}; choose another run.id, with run.start_from={folder} to "
            "train its adapter further"
        )
    other = [change for change in changed_keys(tree, recipe) if change.rule != FREE]
    if unlike := [change.key for change in other if change.key not in UNLISTED]:
        raise ValueError(
            f"{folder} holds a finished run with another {', '.join(unlike)}; choose another run.id"
        )
    if done > recipe.run.steps:
        raise ValueError(
            f"{folder} holds a finished run of {done} steps, more than "
            f"run.steps={recipe.run.steps}; choose another run.id"
        )
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other programs from training in the folder inside the block.

    The system releases the lock when the process ends, however it ends. On a file system without
    locks nothing is kept out. Who holds it is in a file beside it, because Windows lets nobody else
    read a locked file.

    Raises:
        ValueError: another program is training there; the message names it.
    """
    lock, holder = FileLock(folder / ".lock", fallback_to_soft=False), folder / ".holder"
    try:
        lock.acquire(blocking=False)
    except Timeout:
        who = "another program"
        with suppress(OSError):
            who = holder.read_text(encoding="utf-8") or who
        raise ValueError(
            f"{folder}: {who} is training there; wait until it ends, or choose another run.id"
        ) from None
    except OSError:
        pass
    own = lock.is_locked
    with suppress(OSError):  # the disk may be full
        if own:
            holder.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
    try:
        yield
    finally:
        with suppress(OSError):
            if own:
                holder.unlink(missing_ok=True)
        with suppress(OSError):
            lock.release()


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
