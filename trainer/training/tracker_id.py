"""What a tracker knows a run by: an id that is drawn when the run begins and kept in its folder, so
that two runs never share one, whatever they are called, and a resumed run keeps its own."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from trainer.runs.run_folder import write_text
from trainer.training.console import first_rank

TRACKER_ID = "tracker.id"  # the file in a run folder


def tracker_id(folder: Path, say: Callable[[str], None]) -> str:
    """The id of the run in a folder, and writes it there together with marks of that folder.

    A folder that was renamed keeps its inode, and one that was restored keeps its place. A copy has
    neither: it gets an id of its own, since two runs with one id would be mixed up. say: prints a
    line about that.
    """
    place, marks, kept = folder / TRACKER_ID, marks_of(folder), list[str]()
    with suppress(OSError):
        kept = place.read_text(encoding="utf-8").split()
    own, *before = kept or [earlier_id(folder) or uuid.uuid4().hex]
    if before and not set(before) & set(marks):
        own = uuid.uuid4().hex
        say(
            f"{folder} is a copy of another run's folder, or was moved to another disk; this run "
            f"has a new id for trackers, {own}, so that the two are not mixed up"
        )
    if first_rank() and kept != [own, *marks]:  # the others have no tracker
        with suppress(OSError):
            write_text(place, "\n".join((own, *marks)) + "\n")
    return own


def marks_of(folder: Path) -> tuple[str, str]:
    """Where a folder is, as a hash, since a run folder can be shared; and its inode with its
    disk."""
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    facts = folder.stat()
    return f"place-{place}", f"inode-{facts.st_dev}-{facts.st_ino}"


def earlier_id(folder: Path) -> str | None:
    """The id that an earlier version took, the name of the folder; None where it had no tracker."""
    return folder.name if any(folder.glob(f"wandb/*run-*-{folder.name}")) else None
