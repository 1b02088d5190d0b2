"""`edit from=<file>`: the options in the JSON of an earlier edit, and whether the new one is the
same."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.cli.given_adapter import given_digest
from trainer.cli.repeat_picture import PRECISION, RepeatedPicture
from trainer.common.paths import shipped
from trainer.config.tree import merge_trees

FILES = ("image", "mask", "target_mask", "reference", "adapter")


def read_edit(path: Path, given: Mapping[str, Any]) -> tuple[dict[str, Any], RepeatedPicture]:
    """The options of an earlier edit with those given over them. path: its JSON, or a picture
    beside that.

    Raises:
        ValueError: the file is none of `edit`, or a file it was made of is not here or has changed.
    """
    facts = _facts(path.expanduser())
    own = dict(facts["options"])
    own["device"] = facts.get("device", "auto")
    own["precision"] = PRECISION.get(str(facts.get("computes_in")), "auto")
    for key in FILES:
        if key in own and key not in given:
            own[key] = str(_there(path, key, str(own[key]), digest=facts.get(f"{key}_sha256")))
    if changed := {"recipe", "method", "source", "prompt"} & set(given):
        raise ValueError(
            f"from={path} is made again as it was, and {min(changed)}= would make another edit; "
            "leave from out, and give the options that its JSON lists"
        )
    return merge_trees(own, given), RepeatedPicture(path, facts, frozenset(given))


def compared_edits(earlier: RepeatedPicture, facts: Mapping[str, Any]) -> str:
    """What to say of edits that were made again."""
    if facts["edits"] == earlier.facts["edits"]:
        return f"{earlier.path}: repeated, bit for bit"
    if earlier.given - {"out"}:
        return f"{earlier.path}: made again with other options"
    then, now = earlier.facts, facts
    return (
        f"{earlier.path}: repeated, and differs; it was made with torch {then.get('torch')} on "
        f"{then.get('device')}, and this is torch {now.get('torch')} on {now.get('device')}"
    )


def _facts(path: Path) -> dict[str, Any]:
    name = re.sub(r"-edit\d+$", "", path.stem)
    file = path if path.suffix == ".json" else path.with_name(f"{name}.json")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        found = None
    if not isinstance(found, dict) or not {"options", "edits"} <= found.keys():
        raise ValueError(
            f"from={path}: there is no JSON of an edit; give the JSON that `edit` wrote, or a "
            "picture beside it"
        )
    return found


def _there(path: Path, key: str, name: str, *, digest: Any) -> Path:
    """A file of an earlier edit, where it was, or beside the JSON."""
    places = [shipped(name), path.expanduser().parent / Path(name).name]
    there = [place for place in places if given_digest(place) is not None]
    if not there:
        raise ValueError(f"from={path}: its {key} {name} is not here; give {key}=<where it is>")
    same = [place for place in there if digest is None or given_digest(place) == digest]
    if not same:
        raise ValueError(
            f"from={path}: its {key} {there[0]} has changed since the edit was made; give "
            f"{key}=<another> to use that instead"
        )
    return same[0]
