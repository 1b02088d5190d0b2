"""Whether a run may go on from a checkpoint: its manifest is compared with the recipe, key by key,
and with the data, file by file. Nothing here imports torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.config.header import file_of
from trainer.config.resume_rules import APPLIED, PLACE, REFUSED, Change, changed_keys
from trainer.config.schema import Recipe
from trainer.data.identity import changed_samples
from trainer.runs.run_folder import is_finished

NAMED = 8  # samples that a message lists
LONG = 60  # letters of a value in a message


def check_recipe(folder: Path, manifest: Mapping[str, Any], recipe: Recipe) -> list[Change]:
    """The keys whose new values are applied from the checkpoint's step on.

    manifest: of the checkpoint in the run folder `folder` that the run resumes from.

    Raises:
        ValueError: a key differs that no run may change, `run.steps` is below the checkpoint's
            step, or `run.start_from` names another start.
    """
    changes, step = changed_keys(manifest["recipe"], recipe), int(manifest["step"])
    if refused := [change for change in changes if change.settled == REFUSED]:
        raise ValueError(
            f"{folder} resumes after step {step}, and that run was begun with "
            f"{' and '.join(map(_described, refused))}; give what it was begun with, or choose "
            "another run.id"
        )
    if recipe.run.steps < step:
        raise ValueError(
            f"run.steps={recipe.run.steps} is below step {step}, which the run in {folder} has "
            f"reached; give at least {step}, or choose another run.id"
        )
    if int(manifest["micro_step"]) != step * recipe.run.accumulate:
        raise ValueError(
            f"{folder} has trained {manifest['micro_step']} batches in {step} steps, which "
            f"run.accumulate={recipe.run.accumulate} does not give; choose another run.id"
        )
    _check_start(folder, manifest, recipe)
    return [change for change in changes if change.settled == APPLIED]


def check_folder(folder: Path, recipe: Recipe) -> None:
    """Whether `fit` would go on with what lies in a run folder, as far as that is known without
    reading the data.

    Raises:
        ValueError: as `is_finished` and `check_recipe`.
    """
    if is_finished(folder, recipe):
        return
    places = (folder / "checkpoints").glob("step-*[0-9]/manifest.json")
    for place in sorted(places, key=lambda place: -int(place.parent.name.removeprefix("step-"))):
        with suppress(OSError, ValueError):  # `fit` passes damaged ones over
            manifest = json.loads(place.read_text(encoding="utf-8"))
            break
    else:
        return
    check_recipe(folder, manifest, recipe)


def check_data(
    folder: Path, manifest: Mapping[str, Any], recipe: Recipe, data: Mapping[str, str]
) -> None:
    """data: `identity.identity_of` the data now.

    Raises:
        ValueError: a sample was added, removed or rewritten since the run was begun, or its caption
            was; the message names it.
    """
    unlike = changed_samples(manifest["data"], data)
    if not unlike:
        return
    more = f" and {len(unlike) - NAMED} more" if len(unlike) > NAMED else ""
    moved = [
        change
        for change in changed_keys(manifest["recipe"], recipe)
        if change.rule == PLACE and change.key.startswith("data.")
    ]
    where = f" ({', '.join(map(_described, moved))})" if moved else ""
    raise ValueError(
        f"{folder} resumes after step {manifest['step']}, and its data have changed since"
        f"{where}: {', '.join(unlike[:NAMED])}{more}; put back what the run was begun with, or "
        "choose another run.id"
    )


def check_model(
    folder: Path, manifest: Mapping[str, Any], identity: Mapping[str, str], precision: str
) -> None:
    """identity: `Backbone.identity`; precision: that the model computes in, as bf16.

    Raises:
        ValueError: the backbone is another one than the run was begun with, or it would compute in
            another precision, which `run.precision=auto` takes from the device.
    """
    before = manifest.get("backbone", identity)
    for part, value in before.items():
        if part != "name" and identity.get(part) != value:
            raise ValueError(
                f"{folder} was begun on a backbone with {part} {value}, and that of "
                f"{identity.get('name')} is {identity.get(part)}: it was replaced; put it back, or "
                "choose another run.id"
            )
    if (had := manifest.get("precision", precision)) != precision:
        raise ValueError(
            f"{folder} was begun in {had}, and on this device run.precision is {precision}; give "
            f"run.precision={had}, or choose another run.id"
        )


def check_same_parts(folder: Path, manifest: Mapping[str, Any], parts: Mapping[str, str]) -> None:
    """parts: `digests_in_use` of the backbone now.

    Raises:
        ValueError: a file of the backbone is another one than the run was begun with, of the same
            shapes.
    """
    before = manifest.get("parts", parts)
    unlike = [name for name in before | parts if before.get(name) != parts.get(name)]
    if unlike:
        raise ValueError(
            f"{folder} resumes after step {manifest['step']}, and its backbone has changed since: "
            f"{', '.join(unlike)}; put back the files that the run was begun with, or choose "
            "another run.id"
        )


def start_identity(recipe: Recipe) -> str | None:
    """SHA-256 of the adapter that `run.start_from` names; None without one."""
    if recipe.run.start_from is None:
        return None
    with file_of(recipe.run.start_from).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def told(changes: Sequence[Change]) -> str:
    """Changed keys with their new and old values, for a line."""
    return ", ".join(
        f"{change.key}={_short(change.now)} instead of {_short(change.before)}"
        for change in changes
    )


def _check_start(folder: Path, manifest: Mapping[str, Any], recipe: Recipe) -> None:
    """A recipe that leaves `run.start_from` out resumes: what it brought is in the checkpoint."""
    if recipe.run.start_from is None or "start_from" not in manifest:
        return
    if start_identity(recipe) != manifest["start_from"]:
        had = "another adapter" if manifest["start_from"] else "no run.start_from"
        raise ValueError(
            f"{folder} was begun with {had}, so run.start_from={recipe.run.start_from} would not "
            "be read; leave it out, or choose another run.id"
        )


def _described(change: Change) -> str:
    return f"{change.key}={_short(change.before)} (now {_short(change.now)})"


def _short(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= LONG else f"{text[:LONG]}..."
