"""How near completed clips come: against plain loops on clips that are known, and from a run's
previews to its table."""

from __future__ import annotations

import json
from math import log10
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from trainer.__main__ import main
from trainer.attention.given_frames import GivenFrames
from trainer.evaluation.completed_clips import (
    BLENDED,
    MADE,
    blended,
    likeness,
    mean_psnr,
    new_frames,
)

CLIP = Path(__file__).parents[2] / "data" / "tiny" / "clip"


def test_neighbours_are_blended_by_their_distance() -> None:
    clip = torch.randn(7, 3, 2, 2)
    found = blended(clip, [1, 5], [0, 1, 2, 3, 4, 6])
    first, last = clip[1], clip[5]
    wanted = [
        first, first, 0.75 * first + 0.25 * last, 0.5 * first + 0.5 * last,
        0.25 * first + 0.75 * last, last,
    ]  # fmt: skip
    torch.testing.assert_close(found, torch.stack(wanted))


@pytest.mark.parametrize(
    ("where", "frames"),
    [
        (GivenFrames(between=2), [1, 2, 4, 5]),  # of 8: 6 is given, and nothing follows it
        (GivenFrames(after=5), [3, 4, 5, 6, 7]),
        (GivenFrames(), list(range(8))),
    ],
)
def test_which_frames_count(where: GivenFrames, frames: list[int]) -> None:
    assert new_frames(where, 8) == frames


def test_likeness_is_the_mean_of_decibels() -> None:
    """A frame that moves evenly is what its neighbours blend to; one that is off by 0.1 everywhere
    is 26 dB from the true one."""
    steps = torch.linspace(-0.5, 0.5, 5)[None, :, None, None, None]
    true = torch.cat([steps, -steps]).expand(2, 5, 3, 4, 4)
    off = true + torch.tensor([0.1, 0.2])[:, None, None, None, None]
    found = likeness(GivenFrames(between=3), off, true)
    assert found[MADE] == pytest.approx((10 * log10(400) + 10 * log10(100)) / 2, abs=1e-3)
    assert found[BLENDED] > 100
    assert set(likeness(GivenFrames(level=0.1), off, true)) == {MADE}
    assert mean_psnr(true, true) > 120


def test_a_run_shows_and_measures_clips_of_its_data(
    tiny_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        """
data: {source: world_clips, count: 4, frames: 5, motion: moving left, validation: 2}
methods:
  vdm: {heads: 2}
  frame_interpolation: {between: 3}
run: {batch_size: 1, steps: 1, validate_every: 0, checkpoint_every: 0}
preview: {every: 1, steps: 1, guidance: 1}
evaluate: {steps: 1, guidance: 1}
"""
    )
    run = tmp_path / "run"
    words = [f"recipe={recipe}", f"backbone={tiny_folder}", f"run={run}", "tracker=none"]
    assert main(["fit", *words]) == 0
    (sheet,) = (run / "previews").glob("step-000001.png")
    with Image.open(sheet) as picture:
        assert picture.width > 4 * picture.height / 5  # a column for each of five frames
    assert len(list((run / "previews" / "step-000001").glob("*.gif"))) == 4
    capsys.readouterr()
    assert main(["evaluate", f"run={run}", f"judge={CLIP}", "images=2"]) == 0
    printed = capsys.readouterr().out
    assert "PSNR of new frames" in printed and "PSNR of neighbours blended" in printed
    table = json.loads((run / "evaluation.json").read_text())
    assert 3 < table["adapted"][MADE] < table["adapted"][BLENDED] < 60
    assert MADE not in table["base"]
