"""The wider world: more sprites beside those of the shipped backbones, and words for them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from transformers import CLIPTokenizer

from trainer.data.sources.world import World
from trainer.data.world.scenes import draw_scene
from trainer.data.world.sprites import ALL, HELD_OUT, SETS, WIDE, WIDE_HELD_OUT, WIDE_KNOWN, sprite

TINY = Path(__file__).parents[3] / "data" / "tiny"


def script(name: str) -> ModuleType:
    """A script of data/tiny as a module."""
    spec = importlib.util.spec_from_file_location(name, TINY / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_384_sprites_to_know_and_32_held_out() -> None:
    assert (len(WIDE_KNOWN), len(WIDE_HELD_OUT)) == (384, 32)
    assert set(WIDE_KNOWN) | set(WIDE_HELD_OUT) == set(WIDE)
    assert WIDE[: len(ALL)] == ALL
    assert set(HELD_OUT) < set(WIDE_HELD_OUT)
    assert all(word.isalpha() and word.islower() for word in WIDE)


def test_every_word_has_a_drawing_of_its_own() -> None:
    assert len({sprite(word).tobytes() for word in WIDE}) == len(WIDE) == 416


@pytest.mark.parametrize(
    ("sprites", "words", "new"), [("wide", WIDE_KNOWN, 100), ("wide_held_out", WIDE_HELD_OUT, 10)]
)
def test_a_set_shows_its_own_words_alone(sprites: str, words: tuple[str, ...], new: int) -> None:
    drawn = {item.word for i in range(200) for item in draw_scene(1, i, SETS[sprites]).objects}
    assert drawn <= set(words)
    assert len(drawn - set(ALL)) > new


@pytest.mark.parametrize("sprites", ["wide", "wide_held_out"])
def test_the_source_draws_from_the_set_it_is_asked_for(sprites: str) -> None:
    from trainer.data.sources.world import Scenes

    assert World(sprites=sprites).sprites == sprites
    scenes = Scenes(3, count=4, sprites=sprites, side=64)
    drawn = draw_scene(3, 2, SETS[sprites])
    assert scenes.caption(2, np.random.default_rng(0)) == drawn.caption
    pixels = (scenes.image(2) + 1) * 127.5
    np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy(), drawn.image, atol=0.51)


def test_added_words_are_single_tokens_and_old_captions_are_read_as_before() -> None:
    before = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    after = script("add_words").grown(TINY / "tokenizer", WIDE)
    ids = [after(word, add_special_tokens=False).input_ids for word in WIDE]
    assert all(len(each) == 1 for each in ids)
    assert len({each[0] for each in ids}) == len(WIDE)
    for number in range(100):
        caption = draw_scene(8, number, ALL).caption
        assert after(caption).input_ids == before(caption).input_ids
    assert after("zebracorn").input_ids[1] >= len(before)  # begins with a new piece
