"""The embedded world: what a scene says of itself is what is painted."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import pytest

from trainer.data.world import scenes as module
from trainer.data.world.scenes import (
    COLOURS,
    POSITIONS,
    RELATIONS,
    SCENE_SIDE,
    Scene,
    Spot,
    article,
    background,
    compose,
    draw_layout,
    draw_scene,
)
from trainer.data.world.sprites import ALL, HELD_OUT, KNOWN, scaled, sprite, turned


@cache
def scenes() -> list[Scene]:
    return [draw_scene(3, i) for i in range(150)]


def test_there_are_64_known_sprites_and_16_more() -> None:
    assert len(KNOWN) == 64
    assert len(HELD_OUT) == 16
    assert set(KNOWN) | set(HELD_OUT) == set(ALL)
    assert len({sprite(word).tobytes() for word in ALL}) == 80


def test_a_scene_is_a_function_of_its_number() -> None:
    again = [draw_scene(3, i) for i in range(20)]
    for first, second in zip(scenes(), again, strict=False):
        assert first.caption == second.caption
        assert np.array_equal(first.image, second.image)
    assert draw_scene(4, 0).caption != draw_scene(3, 0).caption or not np.array_equal(
        draw_scene(4, 0).image, draw_scene(3, 0).image
    )


def test_the_layout_is_the_scene_before_paint() -> None:
    for number, scene in enumerate(scenes()[:30]):
        plan = draw_layout(3, number)
        assert plan.caption == scene.caption
        assert [spot.word for spot in plan.spots] == [item.word for item in scene.objects]


def test_a_sprite_is_drawn_over_the_background_by_its_alpha() -> None:
    pixels = turned("fox", 40, 0)
    height, width = pixels.shape[:2]
    spot, top, left = Spot("fox", 32.0, 32.0, 40), round(32 - height / 2), round(32 - width / 2)
    for shade in (0.0, 0.6):
        image, (placed,) = compose([spot], np.full((64, 64, 3), shade, np.float32))
        wanted = np.full((64, 64, 3), shade, np.float32)
        part = wanted[top : top + height, left : left + width]
        part[:] = part * (1 - pixels[..., 3:]) + pixels[..., :3]
        np.testing.assert_allclose(image, wanted * 255, atol=0.51)
        assert placed.mask.sum() == (pixels[..., 3] > 0.5).sum()
        assert (pixels[..., 3] > 0).sum() > placed.mask.sum()  # its edge is half transparent


def test_captions_name_what_is_there_and_nothing_else() -> None:
    for scene in scenes():
        words = re.findall(r"[a-z]+", scene.caption)
        assert {word for word in words if word in ALL} == {item.word for item in scene.objects}


def test_held_out_sprites_are_never_drawn_for_training() -> None:
    assert not {item.word for scene in scenes() for item in scene.objects} & set(HELD_OUT)


def test_stated_relations_hold() -> None:
    stated = [scene for scene in scenes() if scene.relation]
    assert len(stated) > 20
    for scene in stated:
        order = sorted(scene.objects, key=lambda item: _first(scene.caption, item.word))
        (x0, y0), (x1, y1) = order[0].center, order[1].center
        dx, dy = RELATIONS[str(scene.relation)]
        assert dx * (x1 - x0) + dy * (y1 - y0) > abs(dy * (x1 - x0)) + abs(dx * (y1 - y0))


def test_stated_places_hold() -> None:
    seen = 0
    for number in range(300):
        scene = draw_scene(9, number, count=1)
        for place in sorted(POSITIONS, key=len, reverse=True):
            if place in scene.caption:
                seen += 1
                wanted = np.array(POSITIONS[place]) * SCENE_SIDE
                assert np.abs(np.array(scene.objects[0].center) - wanted).max() < 0.15 * SCENE_SIDE
                break
    assert seen > 20


def test_masks_lie_in_their_boxes_and_do_not_overlap() -> None:
    for scene in scenes():
        total = np.zeros((SCENE_SIDE, SCENE_SIDE), int)
        for item in scene.objects:
            ys, xs = np.nonzero(item.mask)
            x0, y0, x1, y1 = item.box
            assert len(xs) > 20
            assert xs.min() >= x0
            assert xs.max() < x1
            assert ys.min() >= y0
            assert ys.max() < y1
            total += item.mask
        assert total.max() == 1


def test_ground_outside_the_boxes_is_the_background() -> None:
    for scene in scenes()[:40]:
        plain = (background(scene.background) * 255 + 0.5).astype(np.uint8)
        outside = np.ones((SCENE_SIDE, SCENE_SIDE), bool)
        for x0, y0, x1, y1 in (item.box for item in scene.objects):
            outside[y0:y1, x0:x1] = False
        assert np.array_equal(scene.image[outside], plain[outside])


def test_the_front_sprite_hides_the_one_behind() -> None:
    spots = [Spot("apple", 32, 32, 40), Spot("pizza", 32, 32, 40)]
    _, (behind, front) = compose(spots, background("white"))
    assert front.mask.sum() > behind.mask.sum()
    alone = compose(spots[:1], background("white"))[1][0]
    assert behind.mask.sum() < alone.mask.sum()


def test_a_sprite_outside_the_canvas_is_not_seen() -> None:
    _, (item,) = compose([Spot("apple", -50, 10, 20)], background("white"))
    assert item.mask.sum() == 0
    assert item.box[2] >= item.box[0]


def test_scaled_sprites_are_premultiplied_and_sized() -> None:
    pixels = scaled("fox", 30)
    assert max(pixels.shape[:2]) == 30
    assert (pixels[..., :3] <= pixels[..., 3:] + 1e-5).all()


def test_gradients_run_between_their_colours() -> None:
    ground = background("red to blue gradient")
    assert np.allclose(ground[0, 0] * 255, COLOURS["red"], atol=1)
    assert np.allclose(ground[-1, 0] * 255, COLOURS["blue"], atol=1)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("fox", "a fox"),
        ("octopus", "an octopus"),
        ("unicorn", "a unicorn"),
        ("orange", "an orange"),
    ],
)
def test_article(words: str, wanted: str) -> None:
    assert article(words) == wanted


def test_refusals() -> None:
    with pytest.raises(ValueError, match="1, 2 or 3"):
        draw_scene(0, 0, count=4)
    with pytest.raises(ValueError, match="as many names"):
        draw_scene(0, 0, names=("fox",), count=2)
    with pytest.raises(ValueError, match="unknown sprite 'foks'"):
        sprite("foks")
    with pytest.raises(ValueError, match="unknown background colour"):
        background("azure")


def _first(caption: str, word: str) -> int:
    found = re.search(rf"\b{word}\b", caption)
    assert found is not None
    return found.start()


def test_what_stands_still_has_no_speed() -> None:
    rng = np.random.default_rng(0)
    texts = [module._one(rng, "fox", 64)[1] for _ in range(3000)]
    fast = [text for text in texts if any(speed in text for speed in module.SPEEDS)]
    assert len(fast) > 50 and not any("still" in text for text in fast)
    assert any("still" in text for text in texts)
