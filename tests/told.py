"""One of two processes that tell each other things over gloo; `training/test_distributed.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from trainer.training.distributed import gather_values, largest, num_ranks, value_of_first

WORLD = 2


def tell(rank: int, folder: Path) -> None:
    """Asks everything and writes the answers down, as `<rank>.json` in the folder."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD
    )
    flags = torch.tensor([float(rank), 5.0 - rank, -1.0])
    found: dict[str, Any] = {
        "ranks": num_ranks(),
        "gathered": gather_values({"rank": rank, "keys": ["a"] * rank}),
        "first": value_of_first(["the first", rank]),
        "largest": largest(flags).tolist(),
        "untouched": flags.tolist(),
    }
    torch.distributed.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(found))
