"""What every measurement shares: `BAR` lines, a result file, and the command line itself."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from trainer.evaluation.shares import Share, percent

RESULTS = Path(__file__).parent / "results"


def parser_of(
    text: str | None, parts: Sequence[str] = (), keeps: bool = False, words: bool = False
) -> argparse.ArgumentParser:
    """The options that measurements share. text: the docstring of one; parts: of --only; keeps:
    whether it makes runs that can be kept; words: whether more go to the recipes."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="short, no result file")
    if parts:
        parser.add_argument("--only", default="", help=f"parts, of {','.join(parts)}")
    if keeps:
        parser.add_argument("--keep", type=Path, help="run here and keep what it writes")
    if words:
        parser.add_argument("words", nargs="*", help="overrides of the recipes")
    return parser


def chosen_of(text: str, known: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """The words of `--only a,b`, all of the known ones without any; an unknown one is an error."""
    chosen = [word for word in text.split(",") if word]
    if unknown := sorted(set(chosen) - set(known)):
        parser.error(f"there is no {', '.join(unknown)}; there are: {', '.join(known)}")
    return chosen or list(known)


def version_of(tool: str, checkout: Path | None) -> str:
    """Of a tool that reads our files: the commit of its checkout and when it was made, or the
    package's version where there is no checkout."""
    if checkout is None:
        return version(tool)
    command = ["git", "-C", str(checkout), "log", "-1", "--format=%h %cs"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "?"


class Bars:
    """Prints `BAR <name> <measured> <bar> ok|short` for each bar and keeps them all in one JSON,
    with the commit, the date and the number of threads of each under `taken`.

    update: figures of an earlier run that this one does not take again stay in the file.
    """

    def __init__(self, name: str, quick: bool, update: bool = False) -> None:
        self.name, self.quick = name, quick
        self.path = RESULTS / f"{name}.json"
        earlier: dict[str, Any] = {}
        if update and self.path.is_file():
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
        self.found: dict[str, Any] = earlier.get("figures", {})
        self.taken: dict[str, str] = earlier.get("taken", {})

    def at_least(self, name: str, measured: float, bar: float) -> None:
        self._line(name, measured, f">={bar:.4g}", measured >= bar)

    def at_most(self, name: str, measured: float, bar: float) -> None:
        self._line(name, measured, f"<={bar:.4g}", measured <= bar)

    def exactly(self, name: str, measured: float, bar: float) -> None:
        self._line(name, measured, f"=={bar}", measured == bar)

    def note(self, name: str, value: Any) -> None:
        """A figure without a bar, for reading the others by."""
        print(f"{name}: {percent(value) if isinstance(value, Share) else value}", flush=True)
        self._keep(name, _with_intervals(value))

    def note_when(self) -> None:
        """The commit that is measured, and when, in minutes of UTC."""
        self.note("commit", _commit())
        self.note("date", _minute())

    def _keep(self, name: str, value: Any) -> None:
        self.found[name] = value
        threads = torch.get_num_threads()
        self.taken[name] = f"{_minute()}, commit {_commit()}, threads {threads}"

    def _line(self, name: str, measured: float, bar: str, reached: bool) -> None:
        verdict = "ok" if reached else "short"
        shown = str(measured) if isinstance(measured, int) else f"{measured:.4g}"
        own = interval_of(measured)
        among = f", 95 % interval {own[0]:.4g} to {own[1]:.4g}" if own else ""
        print(f"BAR {name} {shown} {bar} {verdict}{among}", flush=True)
        kept: dict[str, Any] = {"measured": measured, "bar": bar, "verdict": verdict}
        self._keep(name, kept | ({"interval": own} if own else {}))

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
        whole = {"bench": self.name, **facts, "figures": self.found, "taken": self.taken}
        text = json.dumps(whole, indent=1)
        self.path.write_text(text + "\n", encoding="utf-8")


@cache
def _commit() -> str:
    line = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.check_output(line, cwd=RESULTS.parent, text=True).strip()


def _minute() -> str:
    return datetime.now(UTC).isoformat(timespec="minutes")


def shares_of(table: dict[str, Any], column: str) -> dict[str, Any]:
    """A column of an `evaluation.json`, whose shares know of how many pictures they are."""
    counts = table.get("pictures", {})
    return {
        line: Share(value, counts[line]) if line in counts and value is not None else value
        for line, value in table[column].items()
    }


def interval_of(value: object) -> list[float] | None:
    """The 95 % interval of a share of pictures; None of another figure."""
    return [float(f"{end:.4g}") for end in value.interval] if isinstance(value, Share) else None


def _with_intervals(value: Any) -> Any:
    """A figure, or a table of some, with the interval of every share beside it."""
    if isinstance(value, Share):
        return {"share": value, "of": value.count, "interval": interval_of(value)}
    if not isinstance(value, dict):
        return value
    named = {f"{key} 95 %": own for key, each in value.items() if (own := interval_of(each))}
    return {key: each if isinstance(each, Share) else _with_intervals(each)
            for key, each in value.items()} | named  # fmt: skip


def command(verb: str, *words: str, folder: Path, cache: Path, threads: int | None = None) -> str:
    """Runs the real command line in `folder` and returns what it printed.

    Raises:
        SystemExit: it failed; the message ends as its own did.
    """
    line = [sys.executable, "-m", "trainer", verb, *words]
    environment = {**os.environ, "TRAINER_CACHE": str(cache), "TRANSFORMERS_VERBOSITY": "error"}
    environment.pop("TRAINER_RUN_ID", None)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout
