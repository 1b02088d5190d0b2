"""Background smoothing: its equation and its mask against loops over pixels, and clips whose
background is that of the first frame, moved."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention.sites import select
from trainer.diffusion.guidance import COND
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.methods.apply import apply_methods
from trainer.methods.feature.text2video_zero import Text2VideoZero
from trainer.ops.attention_maps import MapStore
from trainer.ops.temporal.background import Background, masked, smoothed
from trainer.ops.temporal.latents import GlobalMotion, translated

ALPHA = 0.6
HOW = Sampling(steps=5, guidance=3, frames=3)


def test_the_equation_pixel_by_pixel() -> None:
    """arXiv 2303.13439, section 3.3.3, with the first frame's object left out where it has moved
    to."""
    generator = torch.Generator().manual_seed(0)
    clips = torch.randn(2, 3, 2, 4, 5, generator=generator)
    mask = (torch.rand(2, 3, 1, 4, 5, generator=generator) < 0.4).float()
    motion = GlobalMotion(1 / 5, 1 / 4, 0.2, 0.2)
    own = smoothed(clips, mask, ALPHA, moved=partial(motion.moved, frames=3))
    for b in range(2):
        for k in range(3):
            shown, there = (translated(each, k, k) for each in (clips[b, 0], mask[b, 0]))
            for i in range(4):
                for j in range(5):
                    x, first = clips[b, k, :, i, j], shown[:, i, j]
                    wanted = ALPHA * first + (1 - ALPHA) * x
                    if mask[b, k, 0, i, j] or there[0, i, j]:
                        wanted = x
                    torch.testing.assert_close(own[b, k, :, i, j], wanted)
    torch.testing.assert_close(own[:, 0], clips[:, 0])


@pytest.mark.parametrize(("side", "reach"), [(16, 1), (64, 2), (96, 3)])
def test_a_mask_is_what_is_near_a_share_of_the_largest_value(side: int, reach: int) -> None:
    maps = torch.zeros(2, 1, side, side)
    maps[0, 0, 4, 7], maps[0, 0, 9, 12], maps[0, 0, 14, 2] = 2.0, 0.7, 0.5
    maps[1, 0, 0, 0] = 0.01  # each frame by its own largest value
    found = masked(maps, 0.3)
    for row, places in enumerate([[(4, 7), (9, 12)], [(0, 0)]]):
        for i in range(side):
            for j in range(side):
                near = any(max(abs(i - y), abs(j - x)) <= reach for y, x in places)
                assert found[row, 0, i, j] == float(near), (row, i, j)


def painted(backbone: Any, prompts: list[str], **options: Any) -> Tensor:
    apply_methods(
        backbone,
        {"text2video_zero": Text2VideoZero(alone=0.2, until=0.4, motion=(0.1, 0), **options)},
        trains=False,
    )
    return sample(backbone, prompts, list(range(len(prompts))), settings=HOW)


def test_the_first_frame_stays_and_the_others_are_smoothed(
    tiny: Any, tiny_folder: Any, open_folder: Any
) -> None:
    """Two clips at once are as each by itself; no store is left behind."""
    prompts = ["a fox on a red background", "a blue picture of a fox"]
    plain, smooth = (
        painted(open_folder(tiny_folder), prompts),
        painted(tiny, prompts, object="fox", threshold=0.999),
    )
    assert torch.equal(plain[::3], smooth[::3])
    assert not torch.allclose(plain[1::3], smooth[1::3], atol=1e-3)
    names = {op.name for processor in tiny.host.processors.values() for op in processor.ops}
    assert names == {"text2video_zero"}
    alone = painted(open_folder(tiny_folder), prompts[:1], object="fox", threshold=0.999)
    torch.testing.assert_close(alone, smooth[:3], rtol=0, atol=1e-3)


class Recorded:
    """A sampler that says what it was asked, and asks the real one."""

    def __init__(self, real: Any) -> None:
        self.real, self.calls = real, []
        self.steps, self.frames, self.given = real.steps, real.frames, real.given

    def __call__(self, x_t: Tensor, first: int, last: int) -> Tensor:
        self.calls.append((first, last))
        found: Tensor = self.real(x_t, first, last)
        return found

    def places(self, word: str) -> list[list[int]]:
        found: list[list[int]] = self.real.places(word)
        return found


def test_the_object_is_where_attention_to_its_words_is(tiny: Any, monkeypatch: Any) -> None:
    """The maps of the rest of the sampling, of the rows with the prompt, of both words."""
    seen: dict[str, Any] = {}

    def begin(self: GlobalMotion, noise: Tensor, sampler: Any) -> tuple[Tensor, int]:
        clips = noise.unflatten(0, (-1, 3))
        own, told = self.background, Recorded(sampler)
        assert own is not None
        seen["mask"], seen["calls"] = own.object_in(clips, told, 2), told.calls
        where = [[sampler.places(w)[row][0] for w in ("red", "fox")] for row in range(2)]
        store = MapStore([where[row] for row in (0, 0, 0, 1, 1, 1)], group=COND)
        sites = select(tiny.sites, "cross")
        tiny.host.install(store, sites)
        sampler(noise, 2, 5)
        tiny.host.remove(store)
        seen["maps"] = store.average((8, 8))
        return noise, 0

    monkeypatch.setattr(GlobalMotion, "begin", begin)
    painted(tiny, ["a red fox", "a photo of a red fox"], object="red fox", threshold=0.999)
    assert seen["calls"] == [(2, 5)]
    wanted = masked(seen["maps"].sum(1, keepdim=True) / 2, 0.999).unflatten(0, (2, 3))
    assert torch.equal(seen["mask"], wanted)
    assert 0 < float(wanted.mean()) < 1


def test_an_object_that_the_prompt_does_not_name_is_refused(tiny: Any) -> None:
    says = r"methods\.text2video_zero\.object=big fox: big is not in the prompt"
    with pytest.raises(ValueError, match=says):
        painted(tiny, ["a big fox", "a fox"], object="big fox")
    assert all(not p.ops or p.site.kind == "self" for p in tiny.host.processors.values())


def test_a_backbone_whose_text_is_beside_the_picture_is_refused() -> None:
    class Joint:
        sites: tuple[Any, ...] = ()

    with pytest.raises(ValueError, match="object=fox is found by cross-attention, and this backb"):
        Text2VideoZero(object="fox")._background(Joint())  # type: ignore[arg-type]


def test_the_background_has_the_options_of_the_method(tiny: Any) -> None:
    own = Text2VideoZero(object="hot balloon", smoothing=0.4, threshold=0.2)
    (hook,) = (
        apply_methods(tiny, {"text2video_zero": own}, trains=False)
        .edits["text2video_zero"]
        .sampling
    )
    start: Any = hook.begin
    found: Background = start.__self__.background
    assert (found.words, found.strength, found.threshold) == (("hot", "balloon"), 0.4, 0.2)
    assert list(found.sites) == select(tiny.sites, "cross")
    assert Text2VideoZero().smoothing == 0.6
