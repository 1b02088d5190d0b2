"""How close a picture comes to the true drawing: its place, size and direction do not matter, its
structure and its colour do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from trainer.data.world.scenes import Spot, background, compose
from trainer.evaluation.sprite_fidelity import Fidelity, fidelity
from trainer.media.images import to_tensor


def picture(*spots: Spot, ground: str = "blue") -> Tensor:
    image, _ = compose(spots, background(ground))
    return to_tensor(Image.fromarray(image))


FOX = picture(Spot("fox", 30, 33, 37))


def of(shown: Tensor, word: str = "fox") -> tuple[float, float]:
    """Structure and colour of one picture."""
    found = fidelity(shown[None], [word])
    return float(found.structure[0]), float(found.colour[0])


def test_the_drawing_itself_is_found_at_any_place_size_and_direction() -> None:
    shown = [
        FOX,
        picture(Spot("fox", 20, 41, 25), ground="red to green gradient"),
        FOX.flip(-1),
    ]
    found = fidelity(torch.stack(shown), ["fox"] * 3)
    assert found.structure.min() > 0.97
    assert found.colour.min() > 0.97
    for size in (20, 33, 34, 35, 47):
        assert min(of(picture(Spot("fox", 30, 33, size)))) > 0.95


def test_other_drawings_and_an_empty_picture_are_far() -> None:
    shown = torch.stack([FOX, FOX, picture()])
    assert fidelity(shown, ["whale", "penguin", "fox"]).score < 0.4


def test_a_blurred_drawing_keeps_its_colours_more_than_its_structure() -> None:
    blurred = F.avg_pool2d(FOX[None], 7, stride=1, padding=3)[0]
    structure, colour = of(blurred)
    assert structure < 0.75
    assert colour > structure


def test_a_drawing_in_other_colours_keeps_its_structure() -> None:
    structure, colour = of(FOX[[1, 0, 2]])  # red and green exchanged
    assert colour < 0.45
    assert structure > colour + 0.2


def test_the_mirror_image_of_the_palette_is_no_match_of_colour() -> None:
    dark = picture(Spot("penguin", 32, 32, 40), ground="pink")
    inverted = -dark
    assert of(dark, "penguin")[1] > 0.95
    assert of(inverted, "penguin")[1] < 0.5


def test_noise_lowers_it_step_by_step() -> None:
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=FOX.shape)).float()
    scores = [sum(of((FOX + share * noise).clamp(-1, 1))) / 2 for share in (0.0, 0.2, 0.6)]
    assert scores[0] > scores[1] + 0.05 > scores[2] + 0.1


def test_the_score_is_the_mean_of_structure_and_colour() -> None:
    assert Fidelity(torch.tensor([0.2, 0.4]), torch.tensor([0.6, 1.0])).score == pytest.approx(0.55)


def test_each_picture_has_its_own_word() -> None:
    cow = picture(Spot("cow", 32, 32, 31))
    found = fidelity(torch.stack([FOX, cow, FOX]), ["fox", "cow", "cow"])
    assert found.structure[0] > 0.97
    assert found.structure[1] > 0.97
    assert found.structure[2] < 0.6


def test_refusals() -> None:
    with pytest.raises(ValueError, match="one for each"):
        fidelity(FOX[None], ["fox", "cow"])
    with pytest.raises(ValueError, match="unknown sprite"):
        fidelity(FOX[None], ["gryphon"])
