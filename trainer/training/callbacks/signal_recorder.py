"""Records SIGTERM, SIGINT (Ctrl-C) and SIGUSR1. `nonfinite_and_signals.py` acts on them at the end
of a step, on every rank: the run is saved and ends.

Nothing is saved and no collective is called inside a signal handler: a rank that does so would wait
forever for the ranks that got no signal.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

from trainer.common.exit_codes import CODES, INTERRUPTED

if TYPE_CHECKING:
    import lightning


class Signals:
    """A context that records signals. received: the exit code of the first signal, 0 without one.

    A second SIGINT ends the process at once. speaks: whether this rank reports signals to the user.
    """

    def __init__(self, speaks: bool) -> None:
        self.received, self.speaks = 0, speaks
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._record) for number in CODES}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == INTERRUPTED:
            self._say("interrupted again: leaving at once, nothing more is saved")
            os._exit(INTERRUPTED)
        if not self.received:
            self.received = CODES[signal.Signals(number)]
            again = "; Ctrl-C again leaves at once" if number == signal.SIGINT else ""
            name = signal.Signals(number).name
            self._say(f"{name}: the run is saved and ends after this step{again}")

    def _say(self, text: str) -> None:
        if self.speaks:  # by a system call: the console may be in the middle of a line
            os.write(2, f"\n{text}\n".encode())


def keep_lightning_out(trainer: lightning.Trainer) -> None:
    """Disables Lightning's SIGTERM handler, which broadcasts from rank 0 inside the handler: a
    signal to another rank would make all ranks hang."""
    connector: Any = trainer._signal_connector
    connector.register_signal_handlers = lambda: None
