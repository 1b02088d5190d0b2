"""Where a run resumes, and what is said when its recipe is another than it began with."""

from __future__ import annotations

from pathlib import Path

from trainer.config.schema import Recipe
from trainer.runs.run_folder import differing_keys, note_event
from trainer.training.checkpoint import Checkpoint, newest_checkpoint
from trainer.training.console import first_rank, say


def last_checkpoint(recipe: Recipe, folder: Path) -> Checkpoint | None:
    """The checkpoint that a run resumes from. Damaged ones are reported, and so is what differs
    from the recipe that the run began with."""

    def passed_over(text: str) -> None:
        say(text, "bold red")
        if first_rank():
            note_event(folder, "fallback", reason=text)

    found = newest_checkpoint(folder / "checkpoints", passed_over, tidy=first_rank())
    if found is not None:
        say(f"{folder}: resumes after step {found.step}")
        for key in differing_keys(found.manifest["recipe"], recipe):
            say(f"{folder}: resumes with another {key} than it began with", "yellow")
    if first_rank():
        note_event(folder, "started", step=found.step if found else 0, steps=recipe.run.steps)
    return found
