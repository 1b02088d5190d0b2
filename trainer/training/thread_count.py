"""The number of threads of a run, which stays what it began with.

torch divides sums among its threads, so that results depend on their number in the last bits: a run
that is resumed with another number is no longer the same run. A checkpoint therefore holds it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from trainer.common.threads import hand_down, set_by_user, this_machine, thread_count


def settle_threads(
    ranks: int, machines: int, manifest: Mapping[str, Any], say: Callable[[str], None]
) -> None:
    """Sets torch's threads.

    ranks: of this run on each of its machines. manifest: of the checkpoint the run resumes from, or
    empty; its number of threads is kept, unless the user has set one or the run had another number
    of ranks, which changes sums anyway. say: hears of a number that one would not expect.
    """
    same_ranks = manifest.get("world_size") == ranks * machines
    kept = manifest.get("threads") if same_ranks else None
    if set_by_user(os.environ):
        own = torch.get_num_threads()
        if kept not in (None, own):
            say(
                f"the run began with {kept} threads and resumes with {own}, as OMP_NUM_THREADS or "
                "MKL_NUM_THREADS says: its last bits will differ"
            )
        return
    chosen = thread_count(this_machine(), os.environ, ranks)
    if kept is None:
        chosen = min(chosen, torch.get_num_threads())
    elif kept != chosen:
        say(
            f"{kept} threads, as the run began with, so that it stays the same to the last bit; "
            f"OMP_NUM_THREADS={chosen} suits this machine"
        )
        chosen = kept
    torch.set_num_threads(chosen)
    if ranks > 1:  # Lightning sets a number of its own where there is none
        hand_down(chosen, os.environ)
