"""What the checkpoints of a resumed run say of its start."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from trainer.config.load import load_recipe
from trainer.training.checkpoint_files import Checkpoint
from trainer.training.resume import run_facts


def test_the_adapter_that_a_run_began_with_stays_known(
    tiny: Any, photos: Any, tmp_path: Path
) -> None:
    def facts(found: Checkpoint | None, *words: str) -> dict[str, Any]:
        recipe = load_recipe(["recipe=lora", *words])
        return run_facts(recipe, tmp_path, found=found, backbone=tiny, train=photos, held_out=None)

    first = tmp_path / "first.safetensors"
    first.write_bytes(b"an adapter")
    digest = hashlib.sha256(b"an adapter").hexdigest()
    begun = facts(None, f"run.start_from={first}")
    assert begun["start_from"] == digest
    had = Checkpoint(tmp_path, {**begun, "start_from": "as it was begun"})
    assert facts(had)["start_from"] == "as it was begun"
    assert facts(had, f"run.start_from={first}")["start_from"] == digest
    assert facts(None)["start_from"] is None
