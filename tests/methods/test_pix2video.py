"""Pix2Video: the decoder's attention, guidance between frames in the first half, a clip edited."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.diffusion.inversion import invert
from trainer.diffusion.sampler import sample
from trainer.methods.apply import apply_methods
from trainer.methods.feature.pix2video import Pix2Video


def painted(backbone: Any, frames: int = 3, start: Tensor | None = None) -> Tensor:
    return sample(backbone, ["a fox"], [3], 6, 3, frames=frames, start=start)


def apart(clip: Tensor) -> float:
    return float(clip.diff(dim=0).square().mean())


def test_the_decoder_reads_other_frames_and_in_a_transformer_all_does(tiny: Any, dit: Any) -> None:
    for backbone, place in ((tiny, "up"), (dit, "block")):
        plan = apply_methods(backbone, {"pix2video": Pix2Video()}, trains=False)
        own = [s.name for s in backbone.sites if s.kind == "self" and s.place == place]
        assert list(plan.edits["pix2video"].sites) == own
        assert plan.names == ()


def test_guidance_draws_frames_together(tiny: Any, tiny_folder: Any, open_folder: Any) -> None:
    other = open_folder(tiny_folder)
    apply_methods(tiny, {"pix2video": Pix2Video(weight=0)}, trains=False)
    apply_methods(other, {"pix2video": Pix2Video(weight=100)}, trains=False)
    free, drawn = painted(tiny), painted(other)
    torch.testing.assert_close(free[0], drawn[0], rtol=0, atol=1e-4)  # nothing draws the first
    assert apart(drawn) < 0.8 * apart(free)


def test_pictures_are_the_image_models(tiny: Any) -> None:
    base = painted(tiny, 1)
    apply_methods(tiny, {"pix2video": Pix2Video()}, trains=False)
    assert torch.equal(painted(tiny, 1), base)


def test_a_clip_is_edited_from_its_own_noise(tiny: Any) -> None:
    apply_methods(tiny, {"pix2video": Pix2Video(weight=0)}, trains=False)
    clip = torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(5))
    start = invert(tiny, clip, [""], 6, 3, iterations=8)
    same = sample(tiny, [""], [3], 6, 1, frames=3, start=start)
    torch.testing.assert_close(same, tiny.decode(clip), rtol=0, atol=1e-2)
    edited = painted(tiny, start=start)
    assert not torch.allclose(edited, same, atol=1e-2)
