"""What methods do before the first step and after the last, through a whole `fit`: starts that look
at the data are the principal directions of what their layers read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from trainer.config.load import load_recipe
from trainer.training.fit import fit

CAPTIONS = ["a fox on a red background", "a cat left of a tree on a white background"]
RANK = 3
WORDS = [
    "recipe=custom_diffusion", "methods.new_token=null", "methods.selective=null",
    "data.concept=null", "data.class_word=null", "data.prior_images=null", "data.augment=null",
    "data.source=folder", "run.batch_size=2", "run.workers=0", "run.steps=1",
    "run.validate_every=0", "preview.every=0", "tracker=none", "run.id=one", "optim.lr=1e-12",
    "optim.scale_lr=false", "optim.weight_decay=0",
]  # fmt: skip


@pytest.fixture
def words(tmp_path: Path, tiny_folder: Path) -> list[str]:
    """A run of one step whose every batch is the same two photos."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, caption in enumerate(CAPTIONS):
        Image.new("RGB", (32, 32), (90 * number, 20, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    own = [f"backbone={tiny_folder}", f"data.folder={folder}", f"run.out={tmp_path / 'runs'}"]
    return [*WORDS, *own]


def trained(words: list[str], method: str) -> dict[str, Tensor]:
    folder = fit(load_recipe([*words, method]))
    return load_file(folder / "adapter.safetensors")


def principal(backbone: Any) -> Tensor:
    """The projection onto the directions in which the tokens of the captions have most energy."""
    with torch.no_grad():
        tokens = backbone.encode_prompts(CAPTIONS).tokens.flatten(0, 1)
    _, _, rows = torch.linalg.svd(tokens.double(), full_matrices=False)
    return rows[:RANK].T @ rows[:RANK]


def check_rows(found: dict[str, Tensor], name: str, wanted: Tensor) -> None:
    matrices = [value.double() for key, value in found.items() if key.endswith(name)]
    assert len(matrices) == 2 * 7  # K and V of every cross-attention
    for rows in matrices:
        torch.testing.assert_close(rows @ rows.T, torch.eye(RANK).double(), rtol=0, atol=1e-4)
        torch.testing.assert_close(rows.T @ rows, wanted, rtol=0, atol=1e-3)


def test_inflora_designs_its_a_and_remembers_the_task(words: list[str], tiny: Any) -> None:
    """A_t are the leading directions of the task's inputs (arXiv 2404.00228, section 4.2), and
    after it M holds the share 0.9 of their energy."""
    options = f"{{rank: {RANK}, task: 0, num_tasks: 2, energy: [0.9, 1.0]}}"
    found = trained(words, f"methods.inflora={options}")
    check_rows(found, "lora_A.inflora-0.weight", principal(tiny))
    with torch.no_grad():
        tokens = tiny.encode_prompts(CAPTIONS).tokens.flatten(0, 1)
    energy = torch.linalg.svdvals(tokens.double()).square()
    fewest = int((energy.cumsum(0) / energy.sum() < 0.9).sum()) + 1
    memories = [value for key, value in found.items() if key.endswith("inflora_kept")]
    assert len(memories) == 2 * 7
    assert {int((kept.norm(dim=0) > 0.5).sum()) for kept in memories} == {fewest}


def test_eva_starts_from_the_inputs(words: list[str], tiny: Any) -> None:
    """A holds the right singular vectors of what a layer reads (arXiv 2410.07170, section 3)."""
    options = f"{{rank: {RANK}, init: eva, sites: cross, projections: [k, v]}}"
    found = trained(words, f"methods.lora={options}")
    check_rows(found, "lora_A.lora.weight", principal(tiny))
