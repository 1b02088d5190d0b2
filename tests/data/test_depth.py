"""Depth as an input of batches: of the embedded world, guessed of other pictures, cached or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.data.depth import Layered, as_depth, depth_like, is_grey
from trainer.data.extra_inputs import extra_inputs
from trainer.data.loader import Fixed, collate
from trainer.data.mixed import Mixed, Stills
from trainer.data.plan import Slot
from trainer.data.sources.world import Scenes
from trainer.data.sources.world_clips import DrawnClips
from trainer.data.world.clips import draw_clip
from trainer.data.world.scenes import Placed, draw_scene, nearness


def clips(side: int = 64, motions: tuple[str, ...] = (), frames: int = 4) -> DrawnClips:
    return DrawnClips(
        5, count=6, sprites="known", side=side, frames=frames, fps=None, motions=motions
    )


def test_what_is_in_front_is_nearer() -> None:
    behind, front = np.zeros((3, 3), bool), np.zeros((3, 3), bool)
    behind[0], front[1, 1:] = True, True
    near = nearness([Placed("a", (0, 0, 1, 1), behind), Placed("b", (0, 0, 1, 1), front)])
    assert near.tolist() == [[0.5, 0.5, 0.5], [0, 1, 1], [0, 0, 0]]
    assert as_depth(near[None], 3).flatten().tolist() == [0, 0, 0, -1, 1, 1, -1, -1, -1]


@pytest.mark.parametrize("side", [64, 32])
def test_clips_and_scenes_of_the_world_know_it(side: int) -> None:
    data = clips(side)
    clip = draw_clip(5, 2, data.names, frames=4)
    found = data.depth(2)
    assert found.shape == (4, 1, side, side) and isinstance(data, Layered)
    assert len({frame.numpy().tobytes() for frame in found}) == 4  # it moves
    masks = [np.any([o.mask for o in shown], 0).reshape(side, 64 // side, side, 64 // side)
             for shown in clip.objects]  # fmt: skip
    for own, mask in zip(found, masks, strict=True):
        assert np.array_equal((own[0] > -1).numpy(), mask.any((1, 3)))
    scenes = Scenes(7, count=3, sprites="known", side=side)
    assert scenes.depth(1).shape == (1, 1, side, side)
    near = np.any([placed.mask for placed in draw_scene(7, 1).objects], 0)
    covered = near.reshape(side, 64 // side, side, 64 // side).any((1, 3))
    assert np.array_equal((scenes.depth(1)[0, 0] > -1).numpy(), covered)


def test_a_guess_finds_most_of_the_objects() -> None:
    """Of clips of one object on plain backgrounds and gradients: overlap of what is near."""
    data, found = clips(motions=("moving left", "moving up", "growing")), []
    for index in range(6):
        near, guessed = (own > 0 for own in (data.depth(index), depth_like(data.image(index))))
        found.append(float((near & guessed).sum() / (near | guessed).sum()))
    assert np.mean(found) > 0.75 and min(found) > 0.5, found


def test_the_background_of_a_line_is_what_both_its_ends_show_most_of_the_time() -> None:
    frames = torch.zeros(3, 3, 4, 12) + torch.linspace(-0.5, 0.5, 4)[None, None, :, None]
    frames[0, :, :, :5] = 1.0  # an object that leaves the edge, a little different in colour
    frames[1, 0, :, 4:8] += 0.45  # differs by 0.15 in the mean: half of what counts as near
    found = depth_like(frames)
    assert found.shape == (3, 1, 4, 12)
    assert (found[0, 0, :, :5] == 1).all() and (found[0, 0, :, 5:] == -1).all()
    torch.testing.assert_close(found[1, 0, :, 4:8], torch.zeros(4, 4))
    assert (found[2] == -1).all()
    frames[..., 6:] += 0.4  # another background to the right: what either end shows is far
    assert (depth_like(frames)[2] == -1).all()


def test_grey_clips_are_depth_already() -> None:
    grey = torch.rand(2, 1, 5, 5) * 2 - 1
    frames = grey.expand(2, 3, 5, 5) + torch.tensor([0.0, 0.05, 0.1])[:, None, None]
    assert is_grey(frames)
    torch.testing.assert_close(depth_like(frames), grey + 0.05)
    assert not is_grey(frames + torch.tensor([0.0, 0.0, 0.1])[:, None, None])


def batch_inputs(data: Any, index: int, moments: Any = None) -> Tensor:
    slots = [Slot(index, 0, 1.0)]
    found = collate(data, slots, step=0, seed=0, moments=moments, reads=("depth",)).inputs
    assert list(found) == ["depth"]
    return found["depth"]


def test_batches_have_what_is_read_cached_or_not() -> None:
    data = clips(32)
    cached = np.zeros((24, 4, 2, 2), np.float16)
    for moments in (None, cached):
        assert torch.equal(batch_inputs(data, 3, moments), data.depth(3)[None])
    assert collate(data, [Slot(3, 0, 1.0)], step=0, seed=0, moments=None).inputs == {}
    held_out = Fixed(data, 8, None, reads=("depth",))
    assert torch.equal(held_out[1].inputs["depth"], torch.stack([data.depth(2), data.depth(3)]))


def test_each_part_of_mixed_data_knows_its_own_or_is_guessed() -> None:
    data = clips(32)
    scenes = Scenes(7, count=3, sprites="known", side=32)
    assert torch.equal(batch_inputs(Mixed(data, scenes, 0.5), 7), scenes.depth(1)[None])
    stills = Mixed(data, Stills(data), 0.5)
    guessed = depth_like(data.image(1)[2:3])[None]
    assert torch.equal(batch_inputs(stills, 1), data.depth(1)[None])
    assert torch.equal(batch_inputs(stills, 7), guessed)
    cached = np.zeros((30, 4, 2, 2), np.float16)
    assert torch.equal(batch_inputs(stills, 7, cached), guessed)


def test_a_name_that_nothing_is_known_of_is_left_out() -> None:
    assert list(extra_inputs(clips(32), [0, 1], ("depth", "pose"))) == ["depth"]


def test_of_a_video_it_is_guessed(tmp_path: Path) -> None:
    from trainer.data.source import Needs
    from trainer.data.sources.video import Video
    from trainer.media.write_video import write_clip

    frames = clips(32).image(0)
    path = next(p for p in write_clip(frames, tmp_path / "clip", 8.0) if p.suffix == ".gif")
    source = Video(video=path, prompt="a fox", frames=4, validation=0)

    def paint(*_: Any) -> Any:
        raise AssertionError("no class images are asked for")

    data, _ = source.open(Needs(32, 4, paint, tmp_path, lambda: "tiny"))
    assert torch.equal(batch_inputs(data, 0)[0], depth_like(data.image(0)))
