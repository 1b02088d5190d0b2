"""InFusion's features and mask against plain expressions, and its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from edit_checks import apart, call_at, drawn, edited, latents, predicted, site_of

from trainer.ops.editing.word_maps import word_mask
from trainer.ops.editing.word_reader import SOURCE, TARGET, WordReader
from trainer.ops.infusion import Fusion, InFusionEditor

OWN = "a fox on a red background"


def test_features_are_the_sources_and_a_share_of_the_difference(tiny: Any) -> None:
    editor = InFusionEditor(Fusion("infusion", "self", feature_steps=(0.0, 0.5), strength=0.3))
    made = drawn(4, 3, 2, 2)
    for step in range(4):
        found = editor.injected(made, None, call_at(site_of(tiny), step).ctx)  # type: ignore[arg-type]
        assert torch.equal(found[[0, 2]], made[[0, 2]])
        for source, own in ((0, 1), (2, 3)):
            mixed = 0.7 * made[source] + 0.3 * made[own]
            torch.testing.assert_close(found[own], mixed if step < 2 else made[own])


def test_outside_the_words_of_both_the_source_stays(tiny: Any) -> None:
    editor = InFusionEditor(Fusion("infusion", "self", fuse_from=0.5, threshold=0.9))
    editor.reader = WordReader("infusion", {SOURCE: torch.ones(1, 4), TARGET: torch.ones(1, 4)}, 64)
    maps = {group: drawn(1, 4, 4, seed=n).abs() for n, group in enumerate((SOURCE, TARGET))}
    for group, own in maps.items():
        editor.reader.maps[group].add("mid", own)
    x_t, x_s = drawn(1, 3, 8, 8), drawn(1, 3, 8, 8, seed=5)
    made = predicted(x_t, x_s)
    assert editor.after_step(x_t, made, call_at(site_of(tiny), 1).ctx) is x_t
    found = editor.after_step(x_t, made, call_at(site_of(tiny), 2).ctx)
    inside = word_mask(maps[SOURCE], (8, 8), 0.9) | word_mask(maps[TARGET], (8, 8), 0.9)
    assert inside.any() and not inside.all()
    assert torch.equal(found, torch.where(inside, x_t, x_s))


def test_at_no_strength_and_shared_keys_it_is_nearly_the_source(tiny: Any) -> None:
    """And with all of it, without any other part, the prompt alone."""
    parts = {"features": "up | mid | down", "feature_steps": (0, 1), "fuse": False, "steps": None}
    plain = latents(tiny, ["a cat"])
    whole, _ = edited(tiny, {"infusion": parts | {"strength": 1}}, "a cat", source=OWN)
    assert apart(whole, plain) < 1e-3
    some, _ = edited(tiny, {"infusion": parts | {"strength": 0}}, "a cat", source=OWN)
    source = latents(tiny, [OWN])
    assert apart(some, source) < apart(plain, source)


def test_what_does_not_fit_is_refused(tiny: Any, dit: Any) -> None:
    for model, options, says in (
        (tiny, {"fuse": ["cow"]}, r"the word 'cow' is not in the prompt"),
        (tiny, {"steps": (0.3, 0.4)}, r"steps=\[0\.3,0\.4\] has none of 4 steps"),
        (dit, {}, r"features: .* has no residual blocks.* feature_steps=null leaves them out"),
    ):
        with pytest.raises(ValueError, match=rf"methods\.infusion: .*{says}"):
            edited(model, {"infusion": options}, "a cat", source=OWN)
