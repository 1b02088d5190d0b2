"""The second judge on real scenes: a network unlike the first, which never saw worn pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from trainer.data.world.scenes import Spot, background, compose, draw_scene
from trainer.data.world.sprites import ALL
from trainer.evaluation.second_judge import SecondJudge
from trainer.media.images import to_tensor

FOLDER = Path(__file__).parents[2] / "data" / "tiny" / "second_judge"


@pytest.fixture(scope="module")
def judge() -> SecondJudge:
    return SecondJudge(FOLDER)


def picture(*spots: Spot) -> Tensor:
    image, _ = compose(spots, background("gray"))
    return to_tensor(Image.fromarray(image))


def test_it_names_unseen_scenes(judge: SecondJudge) -> None:
    scenes = [draw_scene(66_666, i, ALL, count=1) for i in range(120)]
    pictures = torch.stack([to_tensor(Image.fromarray(scene.image)) for scene in scenes])
    named = judge.named(pictures, ALL)
    right = sum(word == s.objects[0].word for word, s in zip(named, scenes, strict=True))
    assert right >= 0.95 * len(scenes)


def test_it_says_where(judge: SecondJudge) -> None:
    found = judge.found(picture(Spot("fox", 16, 40, 26), Spot("octopus", 48, 32, 26))[None], ALL)
    assert set(found.top(2)[0]) == {"fox", "octopus"}
    x, y = found.centers[0, ALL.index("fox")].tolist()
    assert abs(x - 0.25) < 0.1
    assert abs(y - 0.625) < 0.1


def test_it_chooses_among_the_words_it_is_asked_about(judge: SecondJudge) -> None:
    shown = picture(Spot("fox", 32, 32, 40))[None]
    assert judge.named(shown, ["whale", "fox"]) == ["fox"]
    assert judge.named(shown, ["whale", "cat"]) != ["fox"]


def test_it_is_less_sure_of_a_rough_shape(judge: SecondJudge) -> None:
    sharp = torch.stack([picture(Spot(word, 32, 32, 40)) for word in ALL[:24]])
    rough = F.interpolate(F.avg_pool2d(sharp, 8), scale_factor=8.0)
    columns = torch.arange(24)
    sure, unsure = (judge.found(each, ALL).mass[columns, columns] for each in (sharp, rough))
    assert unsure.mean() < 0.7 * sure.mean()


def test_refusals(judge: SecondJudge, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        SecondJudge(tmp_path)
    with pytest.raises(ValueError, match="does not know zebra"):
        judge.found(picture()[None], ["fox", "zebra"])
