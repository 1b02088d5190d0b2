"""Eight recipes, three seeded steps each, give the losses and the adapter they gave before; see
`pinned.py`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pinned", Path(__file__).with_name("pinned.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pinned = _load()
KNOWN: dict[str, Any] = json.loads(pinned.PINNED.read_text())


@pytest.mark.parametrize("name", pinned.RUNS)
def test_a_pinned_run_is_the_same_to_the_last_bit(name: str, tmp_path: Path) -> None:
    """On a machine that computes as a recorded one does; on any other, or where a run has changed
    since and that machine was not at hand, the losses are close. The validation loss was changed
    when the first recorded machine was not at hand."""
    own = KNOWN.get(pinned.numerics(), {}).get(name)
    found = pinned.run(name, tmp_path)
    if own is not None:
        assert {"train/loss", "adapters"} <= own.keys() <= found.keys()
        assert {kind: found[kind] for kind in own} == own
        return
    wanted = next(values[name] for values in KNOWN.values() if "val/loss" in values.get(name, ()))
    assert len(found["adapters"]) == len(wanted["adapters"])
    for kind in ("train/loss", "val/loss"):
        values, others = (list(map(float.fromhex, one[kind])) for one in (found, wanted))
        assert values == pytest.approx(others, rel=0.02)
