"""The contact sheet shows what the trainer sees, and the terminal how many there are of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.__main__ import main
from trainer.backbones import load_backbone
from trainer.config.load import load_recipe
from trainer.data.loader import Batch, Planned
from trainer.media.made_by import ENTRY
from trainer.methods.apply import apply_methods
from trainer.training import inspect
from trainer.training.build import needs, step_plan, task_of


def words(folder: Path, *more: str) -> list[str]:
    return [
        "recipe=custom_diffusion", f"backbone={folder}", "data.class_word=null",
        "data.prior_weight=0", "data.augment=true", "run.batch_size=3", *more,
    ]  # fmt: skip


def test_captions_are_those_the_module_encodes(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_recipe(words(tiny_folder, "objective.caption_dropout=0.5"))
    backbone = load_backbone(loaded.backbone, loaded.backbone_name)
    train, _ = loaded.data.open(needs(loaded, backbone))
    apply_methods(backbone, loaded.methods, 0)
    task, encode = task_of(loaded, backbone), backbone.encode
    encoded: list[list[str]] = []

    def recorded(inputs: Any) -> Any:
        encoded.append(list(inputs["text"]))
        return encode(inputs)

    monkeypatch.setattr(backbone, "encode", recorded)
    batches = Planned(train, step_plan(loaded, train), None, 0, 1)
    seen = []
    for step in range(4):
        seen.append(inspect.seen_captions(loaded, batches[step]))
        task.encode(batches[step])
    assert encoded == seen
    dropped = sum(text == "" for texts in seen for text in texts)
    assert 0 < dropped < 12


def test_it_draws_the_batches_and_counts_them(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "a" / "sheet.png"
    own = [f"out={sheet}", "count=5", "step=2", "objective.caption_dropout=0.5"]
    assert main(["data", "inspect", *words(tiny_folder, *own)]) == 0
    told, *out = capsys.readouterr().out.splitlines()
    assert told.startswith("captions: 25, 25 with <v1>")  # as at every start
    assert out[0] == "pictures as stored, by aspect ratio:" and out[1].split()[:2] == ["1.0:1", "5"]
    assert out[2] == "buckets, width x height:" and out[3].split()[1] == "5"
    assert out[-1] == str(sheet)
    with Image.open(sheet) as image:
        facts = json.loads(image.info[ENTRY])
        assert facts["recipe"] == "custom_diffusion" and len(facts["rows"]) == 5
        assert image.format == "PNG" and image.width == inspect.PAD + 4 * (
            inspect.SIDE + inspect.PAD
        )
        pixels = np.asarray(image.convert("RGB")).astype(int)
    # what augmentation pads is out of the loss, hence half magenta
    tinted = (pixels[..., 0] - pixels[..., 1] > 100) & (pixels[..., 2] - pixels[..., 1] > 100)
    assert tinted.sum() > 1000


def test_a_cell_says_what_became_of_the_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    true = inspect.wrap
    monkeypatch.setattr(
        inspect, "wrap", lambda text, width: shown.append(text) or true(text, width)
    )
    batch = Batch(
        step=3,
        positions=[0, 1, 2],
        captions=["a fox", "a cat", ""],
        keys=["a.png", "b.png", "c.png"],
        weights=torch.ones(3),
        pixels=torch.zeros(3, 3, 16, 32),
    )
    for index, caption in enumerate(["a fox", "", ""]):
        inspect._cell(batch, index, caption)
    assert shown == ["a fox", "(caption dropped)", "(no caption)"]


@pytest.mark.parametrize("count", [1, 3, inspect.COLUMNS, inspect.COLUMNS + 1])
def test_the_sheet_is_as_large_as_its_cells(count: int) -> None:
    sizes = [(inspect.SIDE, inspect.SIDE + 7 * n) for n in range(count)]
    cells = [Image.new("RGB", size, (10 * n + 5, 0, 0)) for n, size in enumerate(sizes)]
    sheet = inspect._sheet(cells)
    rows = [sizes[i : i + inspect.COLUMNS] for i in range(0, count, inspect.COLUMNS)]
    height = inspect.PAD + sum(max(h for _, h in row) + inspect.PAD for row in rows)
    columns = min(count, inspect.COLUMNS)
    assert sheet.size == (inspect.PAD + columns * (inspect.SIDE + inspect.PAD), height)
    seen = {red for _, (red, green, _) in sheet.getcolors(4 * 2**20) if green == 0}
    assert seen == {10 * n + 5 for n in range(count)}  # none covers another
