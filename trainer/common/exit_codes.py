"""How a run ends where it does not end well: the exit codes, and the exception that carries one."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


DAMAGED = 65  # there are checkpoints and none is whole, or `data verify` found what is wrong
NONFINITE = 70  # a loss, a gradient or a weight is no number, and the budget for that is spent
DISK = 74  # a checkpoint or the adapter could not be written
REQUEUE = 75  # SIGUSR1: saved; start the same command again
BAD_RECIPE = 78  # a recipe or an input that the user can mend
HUNG = 124  # a section took longer than run.timeouts allows
INTERRUPTED = 130  # SIGINT
TERMINATED = 143  # SIGTERM


class LeaveError(Exception):
    """Ends the program with `code`; the message says what happened and what to do."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


CODES = {
    signal.SIGTERM: TERMINATED,
    signal.SIGINT: INTERRUPTED,
    signal.SIGUSR1: REQUEUE,
}
