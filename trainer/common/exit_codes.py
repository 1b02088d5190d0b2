"""The exit codes of a run that does not finish, and the exception that carries one."""

from __future__ import annotations

import signal

DAMAGED = 65  # no checkpoint is undamaged, or `data verify` found damage
NONFINITE = 70  # a loss, gradient or weight was NaN or infinite more often than allowed
DISK = 74  # a checkpoint or the adapter could not be written
REQUEUE = 75  # SIGUSR1: saved; start the same command again
BAD_RECIPE = 78  # a mistake in a recipe or an input, which the user can fix
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
