"""What a user types to start this program: `python -m trainer`, or the script that pip made."""

from __future__ import annotations

import sys
from pathlib import Path

NAME = "attention-trainer"
MODULE = "python -m trainer"


def program() -> str:
    """As this process was started: what it prints then names a command that works here too."""
    return NAME if Path(sys.argv[0]).stem == NAME else MODULE


def as_started(text: str) -> str:
    """A text whose commands begin with `python -m trainer`, as `program` has them."""
    return text if program() == MODULE else text.replace(f"{MODULE} ", f"{program()} ")
