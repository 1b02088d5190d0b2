"""The last step of an export: the same export gives the same bytes, every user may read them, no
file names a folder of this machine, and every file of weights carries the adapter's card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.common.atomic import beside

# entries of the libraries' JSON files that say where something was loaded from
PLACES = ("_name_or_path", "name_or_path", "is_local", "local_files_only")


def settle(folder: Path, entries: Mapping[str, str]) -> None:
    """Settles every file of an export, in place. entries: for the headers of safetensors files."""
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            rewrite_header(path, entries)
        elif path.suffix == ".json":
            _forget_places(path)
        path.chmod(0o755 if path.is_dir() else 0o644)
    folder.chmod(0o755)


def rewrite_header(path: Path, entries: Mapping[str, str]) -> None:
    """Adds entries to the header of a safetensors file, whose own stay, and sorts them:
    safetensors writes them in an order that changes from call to call."""
    part = beside(path)
    with path.open("rb") as source:
        header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        own = dict(entries) | header.pop("__metadata__", {})
        header = {"__metadata__": dict(sorted(own.items())), **header}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format aligns the tensors to 8 bytes
        try:
            with part.open("wb") as target:
                target.write(len(text).to_bytes(8, "little") + text)
                shutil.copyfileobj(source, target)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def _forget_places(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    facts = json.loads(text)
    if isinstance(facts, dict) and any(key in facts for key in PLACES):
        kept: dict[str, Any] = {key: value for key, value in facts.items() if key not in PLACES}
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
