"""From `judge=` to judges, and what their scores are called."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from trainer.common.paths import DATA
from trainer.evaluation.dino import Dino
from trainer.evaluation.judge import Judge
from trainer.evaluation.open_judges import line_of, open_judges, reader_of

CLIP = DATA / "tiny" / "clip"


def test_each_folder_by_its_kind(dino_folder: Path) -> None:
    dino, clip = open_judges([dino_folder, CLIP], None)
    assert isinstance(dino, Dino) and isinstance(clip, Judge)
    assert reader_of([dino, clip]) is clip and reader_of([dino]) is None
    names = [line_of(score, each, [dino, clip]) for score in ("alike", "KID")
             for each in (dino, clip)]  # fmt: skip
    assert names == ["DINO", "CLIP-I", "KID (DINO)", "KID (CLIP)"]
    assert line_of("text", clip, [dino, clip]) == "CLIP-T"


def test_two_of_a_kind_are_told_apart(dino_folder: Path, tmp_path: Path) -> None:
    other, twin = tmp_path / "other", tmp_path / "dino"
    for copy in (other, twin):
        shutil.copytree(dino_folder, copy)
    judges = open_judges([dino_folder, other, CLIP], None)
    assert [line_of("alike", each, judges) for each in judges] == [
        "DINO, dino", "DINO, other", "CLIP-I"
    ]  # fmt: skip
    judges = open_judges([dino_folder, twin], None)
    assert line_of("DIV", judges[1], judges) == f"DIV (DINO), {twin}"


def test_a_judge_that_names_sprites_reads_before_others() -> None:
    plain, own = Judge(CLIP), Judge(CLIP)
    plain.empty = None
    assert reader_of([plain, own]) is own
    assert reader_of([plain]) is plain
    assert reader_of([]) is None


def test_without_a_word_the_backbones_own() -> None:
    (own,) = open_judges([], DATA / "tiny")
    assert own.folder == CLIP
    with pytest.raises(ValueError, match="the backbone has no judge of its own; give judge="):
        open_judges([], None)


def test_refusals(dino_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"judge names {dino_folder}/[.][.]/dino twice"):
        open_judges([dino_folder, dino_folder / ".." / "dino"], None)
    with pytest.raises(ValueError, match="no such folder; give judge="):
        open_judges([tmp_path / "nowhere"], None)
    with pytest.raises(
        ValueError, match=r"there is no config\.json; the folder of a CLIP or a DINO"
    ):
        open_judges([tmp_path], None)
    with pytest.raises(ValueError, match="a CLIP folder is needed here, and this model is dinov2"):
        Judge(dino_folder)
