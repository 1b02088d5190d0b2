"""What the truth of the embedded world says of real scenes, and of none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from trainer.data.world.scenes import Spot, background, compose
from trainer.data.world.sprites import KNOWN
from trainer.evaluation.judge import Judge
from trainer.evaluation.sprite_scores import SpriteScores

CLIP = Path(__file__).parents[2] / "data" / "tiny" / "clip"


@pytest.fixture(scope="module")
def truth() -> SpriteScores:
    found = SpriteScores.beside(Judge(CLIP))
    assert found is not None
    return found


def pictures(*shown: tuple[Spot, ...]) -> Tensor:
    images = [compose(spots, background("blue"))[0] for spots in shown]
    return torch.stack([torch.from_numpy(i).permute(2, 0, 1) / 127.5 - 1 for i in images])


def test_pictures_of_one_sprite(truth: SpriteScores) -> None:
    penguin, fox = (Spot(word, 30, 34, 36) for word in ("penguin", "fox"))
    right = truth.alone(pictures((penguin,)), "penguin")
    assert right["fidelity"] > 0.95
    assert right["second judge: concept"] == 1
    half = truth.alone(pictures((penguin,), (fox,)), "penguin")
    assert half["second judge: concept"] == 0.5
    assert half["fidelity"] < 0.75


def test_a_sprite_beside_others(truth: SpriteScores) -> None:
    penguin, fox, cow = (
        Spot(word, x, 32, 28) for word, x in (("penguin", 16), ("fox", 48), ("cow", 48))
    )
    shown = pictures((penguin, fox), (penguin, cow), (penguin, cow), (fox,))
    assert truth.pair(shown, "penguin", ["fox"] * 4) == {
        "second judge: concept beside another": 3 / 4,
        "second judge: the other beside it": 2 / 4,
    }


def test_known_sprites_are_the_yardstick(truth: SpriteScores) -> None:
    words = list(KNOWN[:40])
    shown = pictures(*((Spot(word, 32, 32, 36),) for word in words))
    found = truth.known(shown, words)
    assert found["fidelity of known sprites"] > 0.95
    assert found["second judge: known sprites"] >= 0.95
    exchanged = truth.known(shown, [*words[1:], words[0]])
    assert exchanged["fidelity of known sprites"] < 0.5
    assert exchanged["second judge: known sprites"] == 0


def test_pictures_are_seen_in_the_size_of_scenes(truth: SpriteScores) -> None:
    shown = pictures((Spot("penguin", 30, 34, 36),))
    large = torch.nn.functional.interpolate(shown, scale_factor=2.0, mode="bicubic").clamp(-1, 1)
    found = truth.alone(large, "penguin")
    assert found["fidelity"] > 0.9
    assert found["second judge: concept"] == 1


def test_a_judge_of_photographs_has_none() -> None:
    judge = Judge(CLIP)
    judge.empty = None
    assert SpriteScores.beside(judge) is None
    assert SpriteScores.beside(None) is None
