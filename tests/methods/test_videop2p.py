"""Video-P2P: every frame reads the first alone, the rest is Tune-A-Video's; clips are edited by
their words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainer.attention.context import StepContext, use
from trainer.config.load import load_recipe, methods_of
from trainer.diffusion.edit_source import EditSource
from trainer.diffusion.inversion import invert
from trainer.diffusion.null_text import null_text
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
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


def last(model: Any, prompt: str, edited: EditSource | None, **more: Any) -> Tensor:
    """The last latents of a clip of two frames."""
    seen: list[Tensor] = []
    how = Sampling(steps=5, guidance=3.0, frames=2)
    keep = lambda _, x_t: seen.append(x_t.clone())  # noqa: E731
    sample(model, [prompt], [3], settings=how, edited=edited, on_step=keep, **more)
    return seen[-1]


def test_a_clip_is_edited_from_its_inversion(tiny: Any) -> None:
    """With its own prompt it comes back, by the mask of no word; with another, in the frames where
    the words are. A clip without a source is sampled as Tune-A-Video's is."""
    source = "a fox on a red background"
    plan = methods_of({"videop2p": {"blend": True, "threshold": 0.9}})
    apply_methods(tiny, plan)
    x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    trajectory: dict[int, Tensor] = {}
    start = invert(tiny, x, [source], steps=5, frames=2, iterations=8, known=trajectory)
    how = Sampling(steps=5, guidance=3.0, frames=2)
    uncond = null_text(tiny, x, trajectory, prompt=source, settings=how, most=40)
    told = EditSource(source, inverted=True, uncond=uncond)
    again = last(tiny, source, told, start=start)
    plain = last(tiny, source, None, start=start)
    assert float((again - x).abs().mean()) < 0.3 * float((plain - x).abs().mean())
    edit = last(tiny, "a cat on a red background", told, start=start)
    same = (edit - again).abs().amax(1) < 5e-4
    assert same.any() and not same.all()
    # only the source is told the embeddings: the edit stays without them, but for what it takes
    tiny.sampling_hooks.clear()
    apply_methods(
        tiny, methods_of({"p2p": {"cross_steps": None, "self_steps": None}}), trains=False
    )
    alone = last(tiny, source, told, start=start)
    torch.testing.assert_close(alone, plain, rtol=0, atol=5e-4)
