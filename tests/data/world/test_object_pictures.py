"""The first object of a scene by itself, and captions that do not name it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from trainer.data.extra_inputs import extra_inputs
from trainer.data.source import Needs
from trainer.data.sources.world import World
from trainer.data.world.object_pictures import alone, first_object, without_name
from trainer.data.world.scenes import background, draw_layout

RNG = np.random.default_rng(0)


def test_the_first_object_is_the_one_the_caption_names_first() -> None:
    for index in range(60):
        layout = draw_layout(3, index)
        word = first_object(layout)
        places = [layout.caption.index(f" {spot.word}") for spot in layout.spots if
                  f" {spot.word}" in layout.caption]  # fmt: skip
        assert min(places) == layout.caption.index(f" {word}")


def test_a_caption_without_its_name_has_all_else() -> None:
    for index in range(60):
        layout = draw_layout(3, index)
        word, text = first_object(layout), without_name(layout)
        assert word not in text.split()
        assert "object" in text.replace(",", " ").split() and " a object" not in f" {text}"
        for spot in layout.spots:
            assert spot.word == word or spot.word in text
        assert text.endswith("background") == layout.caption.endswith("background")


def test_its_picture_is_on_another_colour_than_the_scene() -> None:
    for index in range(20):
        layout = draw_layout(3, index)
        shown = alone("fox", (3, index), other_than=layout.background)
        own = background(layout.background)
        assert np.abs(shown[0, 0] / 255 - own[0, 0]).max() > 0.02
        assert np.abs(shown[-1, -1] / 255 - own[-1, -1]).max() > 0.02
        assert (shown != shown[0, 0]).any(-1).mean() > 0.15  # the object itself


def test_the_world_gives_them_on_request(tmp_path: Path) -> None:
    needs = Needs(32, 4, lambda *_: [], tmp_path, lambda: "")
    plain, _ = World(count=40, validation=0).open(needs)
    told, _ = World(count=40, validation=0, reference="object", unnamed=0.5).open(needs)
    same = extra_inputs(plain, [0, 1], ("reference",))["reference"]
    assert torch.equal(same[1, 0], plain.image(1))
    own = extra_inputs(told, [0, 1], ("reference",))["reference"]
    assert own.shape == same.shape == (2, 1, 3, 32, 32) and not torch.equal(own, same)
    changed = sum(plain.caption(i, RNG) != told.caption(i, RNG) for i in range(40))
    assert 10 < changed < 30
    assert plain.fingerprint() == told.fingerprint()  # latents are the same
    assert plain.identity() != told.identity()
