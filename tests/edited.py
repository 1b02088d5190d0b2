"""A JSON file of a folder that a test spoils."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def edit(path: Path, **changes: Any) -> None:
    """Writes the file anew with other values of these keys."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
