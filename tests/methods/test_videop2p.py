"""Video-P2P: every frame reads the first alone, the rest is Tune-A-Video's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trainer.attention.context import StepContext, use
from trainer.config.load import load_recipe
from trainer.methods.apply import apply_methods
from trainer.methods.feature.tune_a_video import TuneAVideo
from trainer.methods.feature.videop2p import VideoP2P


def test_a_frame_hears_of_the_first_and_of_no_other(tiny: Any) -> None:
    """Before anything is learned about time."""
    apply_methods(tiny, {"videop2p": VideoP2P()})
    x_t = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    condition = tiny.encode_prompts(["a fox"] * 4)
    t = torch.tensor([3] * 4)
    signs = {1: [1, -1, 1, 1], 0: [-1, 1, 1, 1]}
    with torch.no_grad(), use(StepContext(0, 1, t, frames=4)):
        base = tiny.predict(x_t, t, condition)
        for changed, sign in signs.items():
            other = tiny.predict(x_t * torch.tensor(sign)[:, None, None, None], t, condition)
            apart = (other - base).abs().amax((1, 2, 3)) > 1e-3
            assert apart.tolist() == ([True] * 4 if changed == 0 else [False, True, False, False])


def test_it_trains_the_same_as_tune_a_video(
    tiny: Any, tiny_folder: Any, open_folder: Callable[..., Any]
) -> None:
    own = apply_methods(tiny, {"videop2p": VideoP2P()})
    assert own.names == apply_methods(open_folder(tiny_folder), {"x": TuneAVideo()}).names
    assert list(load_recipe(["recipe=videop2p"]).methods) == ["selective", "videop2p"]
