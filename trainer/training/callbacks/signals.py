"""SIGTERM, SIGINT and SIGUSR1 are noted, and acted on where every rank can: at the end of a step.

Nothing is saved and no collective is called inside a handler: a rank that does while another is
elsewhere waits for it forever.
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
    """As a context: notes signals in `received`, the exit code of the first one, 0 for none.

    A second SIGINT leaves at once. speaks: whether this rank tells the user of the first.
    """

    def __init__(self, speaks: bool) -> None:
        self.received, self.speaks = 0, speaks
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in CODES}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == INTERRUPTED:
            self._say("interrupted again: leaving at once, nothing more is saved")
            os._exit(INTERRUPTED)
        if not self.received:
            self.received = CODES[signal.Signals(number)]
            again = "; Ctrl-C again leaves at once" if number == signal.SIGINT else ""
            name = signal.Signals(number).name
            self._say(f"{name}: the run is saved and ends after this step{again}")

    def _say(self, text: str) -> None:
        if self.speaks:  # by the system: the console may be in the middle of a line
            os.write(2, f"\n{text}\n".encode())


def keep_lightning_out(trainer: lightning.Trainer) -> None:
    """Lightning's own SIGTERM handler broadcasts from rank 0 where the signal finds it, so that a
    signal to another rank hangs all; it stays out."""
    connector: Any = trainer._signal_connector
    connector.register_signal_handlers = lambda: None
