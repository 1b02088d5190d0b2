"""The exit code of each way in which a command can end, and what it says on stderr: a line for what
a user can mend, a traceback for what is a fault of ours."""

from __future__ import annotations

import errno
import os
import signal
import sys

from trainer.common.out_of_memory import out_of_memory
from trainer.common.program import as_started

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


_BY_NAME = {"SIGTERM": TERMINATED, "SIGINT": INTERRUPTED, "SIGUSR1": REQUEUE}
CODES: dict[signal.Signals, int] = {
    getattr(signal, name): code for name, code in _BY_NAME.items() if hasattr(signal, name)
}  # Windows has no SIGUSR1


def report(error: BaseException) -> int | None:
    """Says in a line on stderr why a command ended, and returns its exit code. None for an error
    that no user can mend, which keeps its traceback."""
    if isinstance(error, BrokenPipeError):  # the reader of the output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if (found := _code_and_line(error)) is None:
        return None
    code, line = found
    if code:  # a rank that another has started says nothing
        print(as_started(line), file=sys.stderr)
    return code


def _code_and_line(error: BaseException) -> tuple[int, str] | None:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, LeaveError):
        return error.code, str(error)
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return DISK if full else 1, f"error: {error}"
    if isinstance(error, ValueError | ModuleNotFoundError):
        return BAD_RECIPE, f"error: {error}"
    if isinstance(error, RuntimeError | MemoryError) and (text := out_of_memory(error)):
        return 1, f"error: {text}"
    return None
