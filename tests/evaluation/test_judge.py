"""The world's judge on real scenes, and any CLIP folder in its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from trainer.data.world.scenes import RELATIONS, Spot, article, background, compose, draw_scene
from trainer.data.world.sprites import ALL, HELD_OUT
from trainer.evaluation.feature_scores import text_alignment
from trainer.evaluation.judge import Judge, relation_holds
from trainer.media.images import to_pil, to_tensor

CLIP = Path(__file__).parents[2] / "data" / "tiny" / "clip"


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(CLIP)


def picture(*spots: Spot) -> Tensor:
    image, _ = compose(spots, background("gray"))
    return to_tensor(Image.fromarray(image))


def test_it_names_unseen_scenes(judge: Judge) -> None:
    scenes = [draw_scene(77_777, i, ALL, count=1) for i in range(120)]
    pictures = torch.stack([to_tensor(Image.fromarray(scene.image)) for scene in scenes])
    named = judge.named(pictures, ALL)
    right = sum(word == s.objects[0].word for word, s in zip(named, scenes, strict=True))
    assert right >= 0.9 * len(scenes)


def test_it_knows_the_held_out_sprites(judge: Judge) -> None:
    pictures = torch.stack([picture(Spot(word, 32, 32, 40)) for word in HELD_OUT])
    named = judge.named(pictures, ALL)
    assert sum(a == b for a, b in zip(named, HELD_OUT, strict=True)) >= 14


def test_it_says_where(judge: Judge) -> None:
    found = judge.found(picture(Spot("fox", 16, 32, 26), Spot("octopus", 48, 32, 26))[None], ALL)
    assert set(found.top(2)[0]) == {"fox", "octopus"}

    def stands(first: str, relation: str, second: str) -> bool:
        return relation_holds(found, 0, first=first, second=second, relation=RELATIONS[relation])

    assert stands("fox", "left of", "octopus")
    assert not stands("octopus", "left of", "fox")
    assert stands("octopus", "right of", "fox")
    assert not stands("fox", "above", "octopus")
    assert not stands("fox", "below", "octopus")
    x, y = found.centers[0, ALL.index("fox")].tolist()
    assert abs(x - 0.25) < 0.1
    assert abs(y - 0.5) < 0.1


def test_an_empty_picture_has_little_of_anything(judge: Judge) -> None:
    found = judge.found(torch.stack([picture(), picture(Spot("fox", 32, 32, 40))]), ALL)
    assert found.mass[0].sum() < 0.2 * found.mass[1].sum()


def test_text_alignment_is_the_models_own_logit(judge: Judge) -> None:
    """The whole CLIPModel, as transformers puts it together, gives the same cosines."""
    pictures = torch.stack([picture(Spot("fox", 32, 32, 40)), picture(Spot("cow", 20, 20, 30))])
    texts = [article("fox"), article("apple")]
    pixels = judge.processor([to_pil(each) for each in pictures], return_tensors="pt").pixel_values
    with torch.no_grad():
        found = judge.model(pixel_values=pixels, **judge.tokens(texts))
    cosines = (found.logits_per_image / judge.model.logit_scale.exp()).diag()
    assert cosines[0] > cosines[1] + 0.2
    own = text_alignment(judge.features(pictures), judge.texts(texts))
    assert own == pytest.approx(float(cosines.mean()), abs=1e-5)


def test_pictures_of_several_sizes_are_taken_as_a_list(judge: Judge) -> None:
    large = picture(Spot("fox", 32, 32, 40)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    small = picture(Spot("cow", 20, 20, 30))
    both = judge.images([large, small])
    assert both.shape == (2, 128)
    torch.testing.assert_close(both[1:], judge.images(small[None]))


def test_refusals(judge: Judge, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="safetensors"):
        Judge(tmp_path)
    plain = Judge(CLIP)
    plain.empty = None
    assert not plain.names_patches
    with pytest.raises(ValueError, match="names complete pictures only"):
        plain.found(picture()[None], ALL)
