"""What a signal says to the user, and on which rank."""

from __future__ import annotations

import os
import signal

import pytest

from trainer.common.exit_codes import INTERRUPTED
from trainer.training.callbacks.signal_recorder import Signals


@pytest.mark.parametrize("speaks", [True, False])
def test_the_rank_that_speaks_says_it(speaks: bool, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with Signals(speaks) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == INTERRUPTED
    said = capfd.readouterr().err
    assert ("SIGINT: the run is saved and ends after this step; Ctrl-C again" in said) == speaks
    assert bool(said) == speaks
    assert signal.getsignal(signal.SIGINT) is before
