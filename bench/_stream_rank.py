"""One rank of bench/scale.py's stream, which writes the keys of its batches as they come:

    python bench/_stream_rank.py SHARDS BATCH RANK RANKS WORKERS START STEPS

Each line on stdout is a step, and the keys of the rank's part of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from trainer.data.loader import Planned, loader
from trainer.data.plan import StepPlan
from trainer.data.source import Needs
from trainer.data.sources.stream import Stream

SEED = 7


def planned(shards: str, batch: int, rank: int, *, ranks: int, side: int = 32) -> Planned:
    """A rank's batches of a stream."""
    needs = Needs(side, 4, lambda *_: (), Path("."), lambda: "", batch=batch, seed=SEED)
    data, _ = Stream(urls=(shards,), shuffle=64).open(needs)
    plan = StepPlan(
        ((0, len(data)),), (1.0,), (1.0,), batch_size=batch, seed=SEED, in_order=True
    )  # fmt: skip
    return Planned(data, plan, None, rank, ranks)


def main(shards: str, *numbers: str) -> None:
    batch, rank, ranks, workers, start, steps = map(int, numbers)
    items = planned(shards, batch, rank, ranks=ranks)
    for found in loader(items, steps, start=start, workers=workers):
        print(found.step, *found.keys, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
