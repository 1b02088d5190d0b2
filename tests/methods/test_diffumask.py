"""DiffuMask's maps against a loop, that it changes nothing, and its refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from edit_checks import HOW, drawn, latents, pictures

from trainer.config.load import methods_of
from trainer.diffusion.image_edit import EditJob
from trainer.methods.apply import apply_methods
from trainer.ops.diffumask import average_map

PROMPT = "a fox on a red background"


def test_maps_of_several_grids_are_averaged_at_the_finest() -> None:
    fine, coarse = drawn(2, 4, 4).abs(), drawn(2, 2, 2, seed=1).abs() * 7
    found = average_map([coarse, fine])
    for row in range(2):
        large = torch.nn.functional.interpolate(
            (coarse[row] / coarse[row].max())[None, None], size=(4, 4), mode="bicubic"
        )[0, 0].clamp(0, 1)
        wanted = (large + fine[row] / fine[row].max()) / 2
        torch.testing.assert_close(found[row], wanted)


def test_masks_are_made_beside_the_same_picture(tiny: Any, dit: Any) -> None:
    for model in (tiny, dit):
        plain = latents(model, [PROMPT])
        job = EditJob([PROMPT], None, seed=3, settings=HOW)
        made = pictures(model, {"diffumask": {"mask_words": ["fox", "background"]}}, job)
        torch.testing.assert_close(made.pictures, model.decode(plain), rtol=0, atol=1e-3)
        assert made.source is None
        maps, mask = made.shown["map of fox"], made.shown["mask of fox"]
        assert torch.equal(mask, (maps > 0.5).float()) and maps.shape[0] == 1
        assert not torch.equal(maps, made.shown["map of background"])


def test_a_word_that_is_not_there_is_refused(tiny: Any) -> None:
    apply_methods(tiny, methods_of({"diffumask": {"mask_words": ["cow"]}}), trains=False)
    with pytest.raises(ValueError, match=r"methods\.diffumask: the word 'cow' is.*mask_words says"):
        latents(tiny, [PROMPT])


def test_maps_are_those_of_the_larger_picture_not_of_one_made_on_the_way(tiny: Any) -> None:
    """`fam_diffusion` makes a small picture first, at the same layers."""
    how = replace(HOW, steps=2, size=(32, 32))
    job = EditJob([PROMPT], None, seed=3, settings=how)
    methods = {"fam_diffusion": {"sites": "self & up & /2"}, "diffumask": {"mask_words": ["fox"]}}
    made = pictures(tiny, methods, job)
    assert made.pictures.shape[-2:] == (32, 32)
    assert made.shown["map of fox"].shape == (1, 8, 8)
