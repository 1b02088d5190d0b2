"""The command that goes on with a run which ended early, as it can be pasted into a shell."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from trainer.common.exit_codes import CODES, INTERRUPTED, LeaveError
from trainer.common.program import program
from trainer.config.schema import Recipe


def resume_command(words: Sequence[str], recipe: Recipe, folder: Path) -> str:
    """`fit` with the words it was given, and the run folder where they do not name it."""
    named = recipe.run.id is not None or any(word.startswith("run=") for word in _plain(words))
    where = [] if named else [f"run={folder}"]
    return shlex.join([*program().split(), "fit", *words, *where])


def _plain(words: Sequence[str]) -> list[str]:
    """Without a whole section, as in `run={steps: 5}`."""
    return [word for word in words if not word.startswith("run={")]


@contextmanager
def says_how_to_resume(command: str) -> Iterator[None]:
    """A run that a signal ends inside the block ends with the command that resumes it. Of several
    ranks the first one says it."""
    from trainer.training.console import first_rank

    try:
        yield
    except KeyboardInterrupt:  # before the first step, or after the last one
        if not first_rank():
            raise
        text = f"interrupted; this command goes on with the run:\n  {command}"
        raise LeaveError(INTERRUPTED, text) from None
    except LeaveError as leaving:
        if leaving.code not in CODES.values() or not first_rank():
            raise
        text = f"{leaving}; this command resumes it:\n  {command}"
        raise LeaveError(leaving.code, text) from leaving
