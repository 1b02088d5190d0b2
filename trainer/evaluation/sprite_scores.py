"""Two more scores of pictures of sprites: what a second judge sees, and how close they are to the
true drawing."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from trainer.common.score_names import FIDELITY, SECOND
from trainer.data.world.scenes import SCENE_SIDE
from trainer.data.world.sprites import ALL
from trainer.evaluation.judge import Judge
from trainer.evaluation.questions import evenly
from trainer.evaluation.second_judge import SecondJudge
from trainer.evaluation.shares import Share, share
from trainer.evaluation.sprite_fidelity import fidelity

FOLDER = "second_judge"  # beside the folder of the first
KNOWN_FIDELITY = "fidelity of known sprites"
CLOSE = 32  # known sprites whose fidelity is measured, evenly over them; each takes a while

Shares = dict[str, float]


class SpriteScores:
    """Scores of pictures (n, 3, side, side) in [-1, 1] of known or learned sprites, resized to
    64x64, the size of the world's scenes."""

    def __init__(self, second: SecondJudge) -> None:
        self.second = second

    @classmethod
    def beside(cls, judge: Judge | None) -> SpriteScores | None:
        """With the second judge that lies beside the first; None for a judge of photos."""
        if judge is None or not judge.names_patches:
            return None
        folder = judge.folder.parent / FOLDER
        return cls(SecondJudge(folder, judge.placement)) if folder.is_dir() else None

    def alone(self, pictures: Tensor, sprite: str) -> Shares:
        """Of pictures of one sprite: how close they are to it, and how many the second judge
        calls so."""
        pictures, words = in_scene_size(pictures), [sprite] * len(pictures)
        named = self.second.named(pictures, ALL)
        return {
            FIDELITY: fidelity(pictures, words).score,
            f"{SECOND}concept": share_named(named, words),
        }

    def pair(self, pictures: Tensor, sprite: str, others: Sequence[str]) -> Shares:
        """Of pictures of a sprite beside another: how many show the one, and the other."""
        seen = self.second.found(in_scene_size(pictures), ALL).top(2)
        return {
            f"{SECOND}concept beside another": share(sprite in two for two in seen),
            f"{SECOND}the other beside it": share(
                word in two for word, two in zip(others, seen, strict=True)
            ),
        }

    def known(self, pictures: Tensor, words: Sequence[str]) -> Shares:
        """Of pictures of known sprites: the same as `alone`. Their fidelity is what a new sprite's
        is compared with."""
        pictures = in_scene_size(pictures)
        named = self.second.named(pictures, ALL)
        some = evenly(len(words), CLOSE)
        chosen = [words[number] for number in some]
        return {
            KNOWN_FIDELITY: fidelity(pictures[some], chosen).score,
            f"{SECOND}known sprites": share_named(named, words),
        }


def in_scene_size(pictures: Tensor) -> Tensor:
    """Pictures (n, 3, side, side) as (n, 3, 64, 64)."""
    if pictures.shape[-1] == SCENE_SIDE:
        return pictures
    size = (SCENE_SIDE, SCENE_SIDE)
    return F.interpolate(pictures, size, mode="bicubic", antialias=True).clamp(-1, 1)


def share_named(named: Sequence[str], right: Sequence[str]) -> Share:
    """The share of pictures whose name is the right one."""
    return share(one == other for one, other in zip(named, right, strict=True))
