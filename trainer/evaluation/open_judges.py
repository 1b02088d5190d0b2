"""From what a user gives as `judge=` to the judges, and what their scores are called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from trainer.backbones.device import CPU, Placement
from trainer.evaluation.dino import Dino
from trainer.evaluation.judge import Judge, Pictures, judge_folder, model_type

ALIKE = {"CLIP": "CLIP-I", "DINO": "DINO"}  # what papers call the similarity to photos


class PictureJudge(Protocol):
    """What compares pictures: `Judge`, which reads texts too, or `Dino`."""

    kind: str
    folder: Path

    def features(self, pictures: Pictures) -> Tensor: ...


def open_judges(
    given: Sequence[str | Path], backbone: str | Path | None, placement: Placement = CPU
) -> list[PictureJudge]:
    """The judges in the given folders, or by default the one in the backbone's folder.

    Raises:
        ValueError: there is no such folder, it is no CLIP and no DINO, or it is named twice.
    """
    folders = [judge_folder(each, backbone, key="judge") for each in given or (None,)]
    for number, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:number]]:
            raise ValueError(f"judge names {folder} twice; name each judge once")
    return [
        Judge(folder, placement) if model_type(folder) == "clip" else Dino(folder, placement)
        for folder in folders
    ]


def reader_of(judges: Sequence[PictureJudge]) -> Judge | None:
    """The first judge that names sprites, else the first that reads texts; None where none does."""
    readers = [each for each in judges if isinstance(each, Judge)]
    return next((each for each in readers if each.names_patches), next(iter(readers), None))


def line_of(score: str, judge: PictureJudge, judges: Sequence[PictureJudge]) -> str:
    """The name of a judge's score among those of all judges: CLIP-I, DINO or CLIP-T, else as in
    `KID (DINO)`; of two judges of one kind with its folder behind it."""
    name = {"alike": ALIKE[judge.kind], "text": f"{judge.kind}-T"}.get(
        score, f"{score} ({judge.kind})"
    )
    same = [each.folder for each in judges if each.kind == judge.kind]
    if len(same) == 1:
        return name
    once = [folder.name for folder in same].count(judge.folder.name) == 1
    return f"{name}, {judge.folder.name if once else judge.folder}"
