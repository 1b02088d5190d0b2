"""What a user types to start this program: `python -m trainer`, or the script that pip made."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

NAME = "attention-trainer"
MODULE = "python -m trainer"


def program() -> str:
    """As this process was started: what it prints then names a command that works here too."""
    return NAME if Path(sys.argv[0]).stem == NAME else MODULE


def command_line() -> str | None:
    """The command that this process is, as it can be pasted into a shell; None where it is another
    program that uses this one."""
    place = Path(sys.argv[0])
    if place.stem != NAME and place.parts[-2:] != ("trainer", "__main__.py"):
        return None
    return shlex.join([*program().split(), *sys.argv[1:]])


def as_started(text: str) -> str:
    """A text whose commands begin with `python -m trainer`, as `program` has them."""
    return text if program() == MODULE else text.replace(f"{MODULE} ", f"{program()} ")
