"""What pictures depend on beside the weights of their backbone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.backbones.retarget import retarget
from trainer.backbones.schedulers import sampled_as


def test_each_thing_that_changes_pictures_changes_it(
    tiny_folder: Path, open_folder: Callable[[Path], Any]
) -> None:
    backbone = open_folder(tiny_folder)
    seen = [sampled_as(backbone)]
    assert sampled_as(open_folder(tiny_folder)) == seen[0]
    backbone.scheduler_config["beta_end"] = 0.5
    seen.append(sampled_as(backbone))
    backbone.max_tokens = 150
    seen.append(sampled_as(backbone))
    backbone.tokenizer.add_tokens(["<v1>"])
    seen.append(sampled_as(backbone))
    retarget(backbone, {"target": "x0"})
    seen.append(sampled_as(backbone))
    retarget(backbone, {"path": "flow"})
    seen.append(sampled_as(backbone))
    assert len(set(seen)) == 6
