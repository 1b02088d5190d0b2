"""The report of the attention back ends that a run uses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from trainer.training.callbacks.backend_report import BackendReport


@pytest.mark.parametrize(("first_rank", "reports"), [(True, 1), (False, 0)])
def test_it_is_made_once_on_the_first_rank(first_rank: bool, reports: int) -> None:
    made: list[int] = []
    callback = BackendReport(lambda: made.append(1))
    trainer: Any = SimpleNamespace(is_global_zero=first_rank)
    for _ in range(3):
        callback.on_train_batch_end(trainer, None)  # type: ignore[arg-type]
    assert len(made) == reports
