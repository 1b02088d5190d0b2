"""What every measurement shares: `BAR` lines and a result file."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


class Bars:
    """Prints `BAR <name> <measured> <bar> ok|short` for each bar and keeps them all in one JSON."""

    def __init__(self, name: str, quick: bool) -> None:
        self.name, self.quick = name, quick
        self.found: dict[str, Any] = {}

    def at_least(self, name: str, measured: float, bar: float) -> None:
        self._line(name, measured, f">={bar:g}", measured >= bar)

    def at_most(self, name: str, measured: float, bar: float) -> None:
        self._line(name, measured, f"<={bar:g}", measured <= bar)

    def note(self, name: str, value: Any) -> None:
        """A figure without a bar, for reading the others by."""
        print(f"{name}: {value}", flush=True)
        self.found[name] = value

    def _line(self, name: str, measured: float, bar: str, reached: bool) -> None:
        verdict = "ok" if reached else "short"
        print(f"BAR {name} {measured:.4g} {bar} {verdict}", flush=True)
        self.found[name] = {"measured": measured, "bar": bar, "verdict": verdict}

    def write(self) -> None:
        """The full run's figures, with the machine they were taken on; a quick run writes
        nothing."""
        if self.quick:
            return
        RESULTS.mkdir(exist_ok=True)
        facts = {
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        text = json.dumps({"bench": self.name, **facts, "figures": self.found}, indent=1)
        (RESULTS / f"{self.name}.json").write_text(text + "\n", encoding="utf-8")
