"""Prompt mixing, kept rows and columns, and the background against loops, and the refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from edit_checks import GROUPS, HEADS, apart, call_at, drawn, edited, latents, predicted, site_of
from torch import Tensor

from trainer.ops.editing.word_reader import SOURCE, TARGET, WordReader
from trainer.ops.object_shape_variations import PromptMixing, ShapeVariation, Variation

OWN = "a fox on a red background"


def test_keys_are_of_the_source_and_values_of_the_prompt_in_the_window(tiny: Any) -> None:
    op = PromptMixing(Variation("v", mix_steps=(0.25, 0.75)))
    text = drawn(4, 5, 3)
    for step in range(4):
        keys, values = op.context(text, text, call_at(site_of(tiny, "cross"), step))
        assert torch.equal(keys[3], text[2])
        assert torch.equal(values[3], text[3] if step in (1, 2) else text[2])
        assert torch.equal(keys[:3], text[:3]) and torch.equal(values[:3], text[:3])


def reader(values: Tensor) -> WordReader:
    found = WordReader("v", {SOURCE: torch.ones(1, 4), TARGET: torch.ones(1, 4)}, 64)
    for group in (SOURCE, TARGET):
        found.maps[group].add("mid", values)
    return found


def variation(**options: Any) -> ShapeVariation:
    return ShapeVariation(Variation("v", tokens=16, **options))


@pytest.mark.parametrize("words", [False, True])
def test_rows_and_columns_of_kept_objects_are_the_sources(words: bool, tiny: Any) -> None:
    op = variation(keep_threshold=0.1, keep_words=["tree"] if words else None)
    changing = torch.zeros(1, 4, 4)
    changing[0, 0] = 0.6  # summed over two steps
    op.changed = reader(changing)
    if words:
        tree = torch.zeros(1, 4, 4)
        tree[0, :2, 0] = 0.8  # one token of it is of the object that changes
        op.kept = reader(tree)
    kept = [4] if words else range(4, 16)
    probs = drawn(4, HEADS, 16, 16).softmax(-1)
    found = op.probs(probs, call_at(site_of(tiny), 1))
    assert torch.equal(found[:3], probs[:3])
    for i in range(16):
        for j in range(16):
            wanted = probs[2] if i in kept or j in kept else probs[3]
            assert torch.equal(found[3, :, i, j], wanted[:, i, j])


def test_outside_its_steps_and_on_large_grids_maps_stay(tiny: Any) -> None:
    op = variation(keep_steps=(0.0, 0.5))
    op.changed = reader(torch.zeros(1, 4, 4))
    probs = drawn(4, HEADS, 16, 16).softmax(-1)
    assert torch.equal(op.probs(probs, call_at(site_of(tiny), 2)), probs)
    assert not torch.equal(op.probs(probs, call_at(site_of(tiny), 1)), probs)
    assert not op.gate(torch.zeros(4, HEADS, 17, 4), call_at(site_of(tiny)))
    assert not op.gate(torch.zeros(1, HEADS, 16, 4), call_at(site_of(tiny), groups=GROUPS[3:]))


def test_the_background_is_the_segments_that_no_word_has_a_share_in(tiny: Any) -> None:
    """Two halves of a picture whose tokens attend to themselves: the word is in the left one."""
    op = variation(segments=2, background_at=0.5, segment_threshold=0.3, keep_steps=None)
    left = torch.arange(16) % 4 < 2
    words = torch.zeros(1, 4, 4)
    words[0, :, 0] = 1.0
    op.changed = reader(words)
    maps = (left[:, None] == left[None]).float() / 8
    op.probs(maps.expand(4, HEADS, 16, 16), call_at(site_of(tiny), 2))
    x_t, x_s = drawn(1, 3, 8, 8), drawn(1, 3, 8, 8, seed=1)
    made = predicted(x_t, x_s)
    found = op.after_step(x_t, made, call_at(site_of(tiny), 2).ctx)
    assert torch.equal(found[..., :4], x_t[..., :4]) and torch.equal(found[..., 4:], x_s[..., 4:])
    assert op.after_step(x_t, made, call_at(site_of(tiny), 3).ctx) is x_t
    assert op.shown()["background"].mean() == 0.5


def test_without_a_step_of_mixing_it_is_the_source(tiny: Any) -> None:
    options = {"mix_steps": None, "keep_steps": None, "background_at": None}
    found, _ = edited(tiny, {"object_shape_variations": options}, "a cat", source=OWN)
    assert apart(found, latents(tiny, [OWN])) < 1e-3


def test_what_does_not_fit_is_refused(tiny: Any) -> None:
    for options, says in (
        ({"keep_words": ["cow"]}, r"the word 'cow' is not in the prompt"),
        ({"mix_steps": (0.3, 0.4)}, r"mix_steps=\[0\.3,0\.4\] has none of 4 steps"),
    ):
        with pytest.raises(ValueError, match=rf"methods\.object_shape_variations: {says}"):
            edited(tiny, {"object_shape_variations": options}, "a cat", source=OWN)
