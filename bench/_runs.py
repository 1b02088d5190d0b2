"""Runs of the command line that are kept: one whose recipe has not changed is not made again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from _common import command

from trainer.config.load import load_recipe
from trainer.config.schema import Recipe

# nothing that is measured depends on these, and they cost time
PLAIN = ("preview.every=0", "run.validate_every=0", "tracker=none")
AT_ONCE = 2  # threads of all runs together, or one run of more


@dataclass(frozen=True)
class Run:
    """A `fit`, and where it is judged an `evaluate` after it. words: as on the command line."""

    name: str
    words: tuple[str, ...]
    judged: bool = True


# class images are painted once for all runs, by one that does little else
PRIOR = Run("prior", ("recipe=custom_diffusion", "run.steps=1"), judged=False)


class Runs:
    """Run folders and the cache below `folder`. words: laid over those of every run. first: made
    by itself, before those at once, for the cache they share. threads: of each run."""

    def __init__(
        self,
        folder: Path,
        words: Sequence[str],
        images: int,
        first: Run | None = PRIOR,
        threads: int = 1,
    ) -> None:
        self.folder, self.words, self.images = folder.resolve(), tuple(words), images
        self.first, self.threads = first, threads
        self.folder.mkdir(parents=True, exist_ok=True)

    def words_of(self, run: Run, *more: str) -> list[str]:
        """Later words replace earlier ones of the same key."""
        every = (*PLAIN, *run.words, *self.words, *more)
        return list({word.partition("=")[0]: word for word in every}.values())

    def recipe(self, run: Run) -> Recipe:
        return load_recipe(self.words_of(run))

    def place(self, run: Run) -> Path:
        """Its run folder, whose name changes with anything in its recipe."""
        chosen = self.recipe(run)
        text = json.dumps([chosen.name, chosen.tree], sort_keys=True)
        name = f"{run.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        return self.folder / "runs" / Path(chosen.name).stem / name

    def fitted(self, run: Run) -> bool:
        concepts = self.recipe(run).continual.concepts
        if not concepts:
            return (self.place(run) / "adapter.safetensors").is_file()
        path = self.place(run) / "continual.json"
        return path.is_file() and len(json.loads(path.read_text())["accuracy"]) == len(concepts)

    def evaluated(self, place: Path) -> bool:
        path = place / "evaluation.json"
        return path.is_file() and (place / f"judged-{self.images}").is_file()

    def finished(self, run: Run) -> bool:
        return self.fitted(run) and (not run.judged or self.evaluated(self.place(run)))

    def make(self, runs: Iterable[Run]) -> None:
        """Makes those that are not there, the longest first, on `AT_ONCE` threads."""
        missing = [run for run in dict.fromkeys(runs) if not self.finished(run)]
        unfitted = any(not self.fitted(run) for run in missing)
        if self.first is not None and unfitted and not self.fitted(self.first):
            self._make(self.first)
        missing.sort(key=lambda run: -self._steps(run))
        with ThreadPoolExecutor(max(1, AT_ONCE // self.threads)) as pool:
            for run in pool.map(self._make, missing):
                print(f"made {run.name}", flush=True)

    def _steps(self, run: Run) -> int:
        chosen = self.recipe(run)
        return chosen.run.steps * max(1, len(chosen.continual.concepts))

    def _make(self, run: Run) -> Run:
        place = self.place(run)
        if not self.fitted(run):
            self.command("fit", *self.words_of(run), f"run.id={place.name}")
        if run.judged:
            self.evaluate(place)
        return run

    def evaluate(self, place: Path) -> None:
        if not self.evaluated(place):
            self.command("evaluate", f"run={place}", f"images={self.images}")
            (place / f"judged-{self.images}").touch()

    def command(self, verb: str, *words: str) -> str:
        cache = self.folder / "cache"
        return command(verb, *words, folder=self.folder, cache=cache, threads=self.threads)

    def minutes(self, run: Run) -> float:
        """Of a fit, from its first start to its end, with all that it prepares."""
        lines = (self.place(run) / "events.jsonl").read_text(encoding="utf-8").splitlines()
        events = [json.loads(line) for line in lines]
        begin, end = (
            datetime.fromisoformat(next(each["time"] for each in found if each["event"] == event))
            for event, found in (("started", events), ("finished", reversed(events)))
        )
        return (end - begin).total_seconds() / 60

    def read(self, run: Run, file: str) -> Any:
        return json.loads((self.place(run) / file).read_text(encoding="utf-8"))
