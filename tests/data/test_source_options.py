"""The bounds of options that several data sources have."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from trainer.config.load import load_recipe
from trainer.config.schema import RecipeError


def test_buckets_are_not_negative(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    words = ["recipe=linear_swap", "data.source=folder", f"data.folder={tmp_path}"]
    words += ["data.count=null", "data.validation=0", "data.template=a cat"]
    assert load_recipe([*words, "data.buckets=0"]).data.buckets == 0
    with pytest.raises(RecipeError, match=r"data\.buckets=-1: a whole number .*, at least 0"):
        load_recipe([*words, "data.buckets=-1"])
