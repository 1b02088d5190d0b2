"""Where a run resumes: from which checkpoint, whether it may, and what is said about what has
changed since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.backbones.backbone import Backbone
from trainer.backbones.device import PRECISIONS
from trainer.backbones.part_digests import digests_in_use
from trainer.common.program import command_line
from trainer.config.schema import Recipe
from trainer.data.identity import identity_of
from trainer.data.source import Dataset
from trainer.runs.resume_check import (
    check_data,
    check_model,
    check_recipe,
    check_same_parts,
    start_identity,
    told,
)
from trainer.runs.run_folder import note_event, recipe_header
from trainer.training.checkpoint_files import Checkpoint, newest_checkpoint
from trainer.training.console import first_rank, say


def last_checkpoint(recipe: Recipe, folder: Path) -> Checkpoint | None:
    """The checkpoint that a run resumes from, and says where the run is. Damaged ones are reported,
    and so are the keys whose new values are applied.

    Raises:
        ValueError: the recipe differs in a key that no run may change, see `resume_rules.py`.
    """

    def passed_over(text: str) -> None:
        say(text, "bold red")
        if first_rank():
            note_event(folder, "fallback", reason=text)

    found = newest_checkpoint(folder / "checkpoints", passed_over, tidy=first_rank())
    applied = []
    if found is not None:
        applied = check_recipe(folder, found.manifest, recipe)
        say(f"{folder}: resumes after step {found.step}")
        if applied:
            say(f"{folder}: from step {found.step + 1} on {told(applied)}", "yellow")
    else:
        say(f"run folder: {folder}")
    if first_rank():
        facts: dict[str, Any] = {"step": found.step if found else 0, "steps": recipe.run.steps}
        changed = {change.key: [change.before, change.now] for change in applied}
        command = command_line()
        if command is not None:
            facts["command"] = command
        note_event(folder, "started", **facts, **({"changed": changed} if changed else {}))
    return found


def run_facts(
    recipe: Recipe,
    folder: Path,
    *,
    found: Checkpoint | None,
    backbone: Backbone,
    train: Dataset,
    held_out: Dataset | None,
) -> dict[str, Any]:
    """What every manifest of this run says of it: recipe, data, backbone, precision, and the
    adapter that it started from. found: the checkpoint it resumes from.

    Raises:
        ValueError: the data or the backbone are not those the checkpoint was made with.
    """
    names = {dtype: name for name, dtype in PRECISIONS.items()}
    facts: dict[str, Any] = {
        "recipe": recipe_header(recipe),
        "data": identity_of(train, held_out),
        "backbone": backbone.identity(),
        "parts": digests_in_use(recipe.backbone),
        "precision": names[backbone.computes_in],
        "start_from": start_identity(recipe),
    }
    if found is None:
        return facts
    had = found.manifest
    check_model(folder, had, facts["backbone"], precision=facts["precision"])
    check_same_parts(folder, had, facts["parts"])
    if "data" in had:
        check_data(folder, had, recipe, data=facts["data"])
    else:
        say(
            f"{folder}: its checkpoint is of an earlier version, which kept no record of the data; "
            "whether they have changed is not known",
            "yellow",
        )
    if recipe.run.start_from is None:  # left out on resuming
        facts["start_from"] = had.get("start_from")
    return facts
