"""What `auto` comes to on each device, and what the plan says of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from trainer.config.load import load_recipe
from trainer.config.schema import Recipe
from trainer.training import device_defaults
from trainer.training.device_defaults import auto_lines, compiles, stores_channels_last

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LONG = "run.steps=3000"


def recipe(*words: str) -> Recipe:
    return load_recipe(["recipe=lora", "methods.new_token=null", "data.token=sks", *words])


@pytest.fixture(autouse=True)
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_defaults, "find_spec", lambda name: name)


def test_channels_are_last_on_cuda_in_half_precision_where_there_are_convolutions(
    tiny: Any, dit_folder: Path, open_folder: Callable[[Path], Any]
) -> None:
    transformer, auto = open_folder(dit_folder), recipe()
    for model in (tiny, transformer):
        model.computes_in = torch.bfloat16
    assert stores_channels_last(auto, tiny, CUDA)
    assert not stores_channels_last(auto, transformer, CUDA)  # one convolution makes the patches
    assert not stores_channels_last(auto, tiny, CPU)
    tiny.computes_in = torch.float32
    assert not stores_channels_last(auto, tiny, CUDA)
    assert stores_channels_last(recipe("run.channels_last=true"), tiny, CPU)
    tiny.computes_in = torch.bfloat16
    assert not stores_channels_last(recipe("run.channels_last=false"), tiny, CUDA)


@pytest.mark.parametrize(
    ("words", "device", "said"),
    [
        ((LONG,), CUDA, None),
        (("run.steps=1500", "run.accumulate=2"), CUDA, None),
        (("run.steps=2999",), CUDA, "2999 passes are fewer than the 3000"),
        ((LONG,), CPU, "no CUDA GPU"),
    ],
)
def test_what_auto_compiles(words: tuple[str, ...], device: torch.device, said: str | None) -> None:
    auto = recipe(*words)
    assert compiles(auto, device) == (said is None)
    found = device_defaults.why_uncompiled(auto, device)
    assert found is None if said is None else (found and said in found)


def test_sizes_and_a_missing_triton_keep_auto_from_compiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "photo.png")
    words = ["recipe=lora_folder", f"data.folder={tmp_path}", "data.template=a fox", LONG]
    found = device_defaults.why_uncompiled(load_recipe([*words, "data.buckets=4"]), CUDA)
    assert found is not None and "data.buckets" in found
    monkeypatch.setattr(device_defaults, "find_spec", lambda name: None)
    assert not compiles(recipe(LONG), CUDA) and compiles(recipe("run.compile=true"), CPU)


def test_the_plan_says_what_auto_does(tiny: Any) -> None:
    tiny.computes_in = torch.bfloat16
    assert list(auto_lines(recipe(), tiny, CPU)) == []
    compiled, last = auto_lines(recipe(LONG), tiny, CUDA)
    assert "blocks are compiled" in compiled and "run.compile=false" in compiled
    assert "run.channels_last=auto" in last
    own = recipe(LONG, "run.compile=false", "run.channels_last=true")
    assert list(auto_lines(own, tiny, CUDA)) == []
    (short, _) = auto_lines(recipe("run.steps=10"), tiny, CUDA)
    assert "not compiled: 10 passes" in short
