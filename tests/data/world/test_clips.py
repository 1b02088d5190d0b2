"""Clips of the embedded world: what a clip says of itself moves as it says, and reaches a batch."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.data import latent_cache
from trainer.data.loader import Fixed, Planned
from trainer.data.plan import StepPlan
from trainer.data.source import Needs
from trainer.data.sources.world import Scenes
from trainer.data.sources.world_clips import WorldClips
from trainer.data.world import clips as module
from trainer.data.world.clips import (
    DIRECTIONS,
    STILL,
    Clip,
    Plot,
    draw_clip,
    draw_plot,
    render_clip,
)
from trainer.data.world.scenes import CROSSINGS, MOTIONS, SCENE_SIDE, SPEEDS
from trainer.data.world.sprites import ALL, HELD_OUT, scaled, turned
from trainer.data.world.watermark import mark_in

TRAVEL = {"": (20, 28), "slowly": (8, 13), "quickly": (31, 38)}  # pixels in 8 frames
RNG = np.random.default_rng(0)


def needs(side: int = 64) -> Needs:
    return Needs(side, 4, lambda prompts, seed, guidance: (), Path("cache"), lambda: "tiny")


def data(side: int = 16, **options: Any) -> Any:
    """The training clips of the source, and the held-out ones."""
    return WorldClips(**{"count": 6, "frames": 3, "validation": 0, **options}).open(needs(side))


def path_of(clip: Clip, track: int = 0) -> np.ndarray:
    """The centres (n, 2) of one object."""
    return np.array([frame[track].center for frame in clip.objects])


@functools.cache
def clips() -> list[Clip]:
    return [draw_clip(3, i) for i in range(120)]


@functools.cache
def ones(motion: str, count: int = 30) -> list[Clip]:
    return [draw_clip(11, i, motion=motion) for i in range(count)]


def steps(dataset: Any, batch_size: int = 4) -> StepPlan:
    groups = tuple((group.start, group.stop) for group in dataset.groups)
    shares, weights = tuple(dataset.shares), tuple(dataset.weights)
    return StepPlan(groups, shares, weights, batch_size, 5, tuple(dataset.frames))


def test_a_clip_is_a_function_of_its_number() -> None:
    for i in (0, 7, 31):
        again = draw_clip(3, i)
        assert (again.caption, again.plot) == (clips()[i].caption, clips()[i].plot)
        assert np.array_equal(again.frames, clips()[i].frames)
        assert draw_plot(3, i) == again.plot
    assert clips()[0].frames.shape == (8, SCENE_SIDE, SCENE_SIDE, 3)
    assert len({clip.caption for clip in clips()}) > 100
    assert draw_clip(4, 0).plot != clips()[0].plot


def test_captions_say_what_is_there_and_how_it_moves() -> None:
    for clip in clips():
        text, tracks = clip.caption, clip.plot.tracks
        assert {word for word in re.findall(r"[a-z]+", text) if word in ALL} == {
            track.word for track in tracks
        }
        if clip.plot.crossing:
            assert clip.plot.crossing in text
            continue
        said = sum(text.count(motion) for motion in MOTIONS)
        assert said == len(tracks)
        for track in tracks:
            assert f"{track.word} {track.motion} {track.speed}".strip() in text
    assert {track.motion for clip in clips() for track in clip.plot.tracks} == set(MOTIONS)
    assert {clip.plot.crossing for clip in clips()} == {None, *CROSSINGS}
    assert not {track.word for clip in clips() for track in clip.plot.tracks} & set(HELD_OUT)


@pytest.mark.parametrize("motion", DIRECTIONS)
def test_what_moves_goes_the_stated_way_at_the_stated_speed(motion: str) -> None:
    dx, dy = DIRECTIONS[motion]
    seen = set()
    for clip in ones(motion):
        centers = path_of(clip)
        low, high = TRAVEL[clip.plot.tracks[0].speed]
        seen.add(clip.plot.tracks[0].speed)
        moved = centers[-1] - centers[0]
        assert low <= moved @ (dx, dy) <= high
        assert (np.diff(centers, axis=0) @ (dx, dy) >= 0).all()
        assert abs(moved @ (dy, dx)) < 1
        sizes = {box[2] - box[0] for box in (frame[0].box for frame in clip.objects)}
        assert len(sizes) == 1  # no part of it has left the frame
    assert seen == {"", *SPEEDS}


def test_growing_and_shrinking_stay_in_place_and_in_the_frame() -> None:
    for motion, sign in (("growing", 1), ("shrinking", -1)):
        for clip in ones(motion):
            sides = [max(x1 - x0, y1 - y0) for x0, y0, x1, y1 in (f[0].box for f in clip.objects)]
            assert (sign * np.diff(sides) >= 0).all()
            assert max(sides) / min(sides) > 1.25
            assert np.abs(path_of(clip) - path_of(clip)[0]).max() <= 1


def test_turning_stays_in_place_and_spinning_turns_further() -> None:
    for motion in ("rotating", "spinning"):
        for clip in ones(motion, 12):
            assert np.abs(path_of(clip) - path_of(clip)[0]).max() <= 1
            assert all(np.diff(clip.frames.astype(int), axis=0).any(axis=(1, 2, 3)))
    slowest = min(clip.plot.tracks[0].turn for clip in ones("spinning"))
    assert slowest > max(clip.plot.tracks[0].turn for clip in ones("rotating"))


def test_what_stands_still_does_not_change() -> None:
    for clip in ones(STILL, 8):
        assert (clip.frames == clip.frames[0]).all()


def test_crossings_change_sides_and_hide_the_one_behind() -> None:
    crossing = [clip for clip in clips() if clip.plot.crossing]
    assert len(crossing) > 12
    for clip in crossing:
        back, front = clip.plot.tracks
        mover = front if clip.plot.crossing == "passing in front of" else back
        assert (back.motion == STILL) == (mover is front)
        assert clip.caption.index(mover.word) < clip.caption.index(str(clip.plot.crossing))
        between = (path_of(clip) - path_of(clip, 1)) @ np.abs(DIRECTIONS[mover.motion])
        assert between[0] * between[-1] < 0
        alone = render_clip(Plot((back,), "", clip.plot.background))
        shares = [
            seen[0].mask.sum() / whole[0].mask.sum()
            for seen, whole in zip(clip.objects, alone.objects, strict=True)
        ]
        assert min(shares) < 0.75
        assert min(shares) < shares[0] and min(shares) < shares[-1]


def test_pairs_never_meet() -> None:
    pairs = [c for c in clips() if len(c.plot.tracks) == 2 and not c.plot.crossing]
    assert len(pairs) > 5
    for clip in pairs:
        for one, other in clip.objects:
            (a, b, c, d), (e, f, g, h) = one.box, other.box
            assert c <= e or g <= a or d <= f or h <= b


def test_masks_lie_in_their_boxes_and_do_not_overlap() -> None:
    for clip in clips():
        for frame in clip.objects:
            total = np.zeros((SCENE_SIDE, SCENE_SIDE), int)
            for item in frame:
                x0, y0, x1, y1 = item.box
                assert not np.delete(item.mask, np.s_[y0:y1], axis=0).any()
                assert not np.delete(item.mask, np.s_[x0:x1], axis=1).any()
                total += item.mask
            assert total.max() == 1
            assert frame[-1].mask.sum() > 20


def test_more_frames_see_the_same_motion_more_often() -> None:
    for i in (0, 1, 5, 9):
        few, many = draw_clip(3, i, frames=8), draw_clip(3, i, frames=16)
        assert (few.fps, many.fps) == (8, 16)
        assert np.array_equal(many.frames[::2], few.frames)
        start = draw_clip(3, i, frames=4, fps=16)
        assert np.array_equal(start.frames, many.frames[:4])


def test_a_turned_sprite_keeps_its_centre_and_turns_clockwise() -> None:
    plain = scaled("rocket", 40)
    assert turned("rocket", 40, 0) is plain
    assert turned("rocket", 40, -720) is plain
    for quarters, degrees in ((1, 90), (2, 180), (3, 270)):
        there = turned("rocket", 40, degrees)
        wanted = np.rot90(plain, -quarters)
        cut = [(a - b) // 2 for a, b in zip(there.shape, wanted.shape, strict=True)]
        assert min(cut) >= 0
        middle = there[cut[0] : cut[0] + wanted.shape[0], cut[1] : cut[1] + wanted.shape[1]]
        assert np.abs(middle - wanted).mean() < 0.05
    assert max(turned("rocket", 40, 45).shape) <= 40 * 2**0.5 + 2


def test_refusals() -> None:
    with pytest.raises(ValueError, match="lasts one second; give at least one frame, and as many"):
        draw_clip(0, 0, frames=16, fps=8)
    with pytest.raises(ValueError, match="lasts one second"):
        draw_clip(0, 0, frames=0)
    with pytest.raises(ValueError, match="motion='flying': choose one of moving up"):
        draw_clip(0, 0, motion="flying")
    with pytest.raises(ValueError, match="as many names"):
        [draw_plot(0, i, names=("fox",)) for i in range(20)]
    with pytest.raises(ValueError, match="lasts one second"):
        WorldClips(frames=16, fps=8)
    with pytest.raises(ValueError, match="set images=0"):
        WorldClips(frames=1, images=0.5)


def test_the_source_gives_the_clips_of_its_seed() -> None:
    train, held_out = data(64, validation=4, fps=6)
    assert (len(train), len(held_out), train.frames, train.rates[0]) == (6, 4, (3,), 6.0)
    sample, clip = train.sample(2, RNG), draw_clip(0, 2, frames=3, fps=6)
    assert sample.image.shape == (3, 3, 64, 64)
    pixels = torch.from_numpy(clip.frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert sample.image.equal(pixels)
    assert (sample.caption, sample.key) == (clip.caption, "clip-0-2")
    captions = [part.caption(i, RNG) for part in (train, held_out) for i in range(4)]
    assert len(set(captions)) == 8
    variants = (data(64)[0], data(64, fps=6)[0], data(64, frames=4)[0], data(32)[0], train)
    assert len({each.fingerprint() for each in variants}) == 4  # the second is `train`


def test_detail_is_drawn_and_not_enlarged() -> None:
    """The same scene at twice the side: what is drawn has edges that an enlarged one lacks."""
    fine, coarse = data(128, detail=2)[0], data(128)[0]
    own, enlarged = fine.image(1), coarse.image(1)
    assert own.shape == enlarged.shape == (3, 3, 128, 128)
    assert float((own - enlarged).abs().mean()) < 0.05
    assert float(own.diff(dim=-1).abs().max()) > 1.2 * float(enlarged.diff(dim=-1).abs().max())
    assert fine.caption(1, RNG) == coarse.caption(1, RNG)
    assert len({fine.fingerprint(), coarse.fingerprint()}) == 2
    clip = draw_clip(0, 1, frames=3, detail=2)
    assert clip.frames.shape == (3, 128, 128, 3)
    for one, two in zip(clip.objects[0], draw_clip(0, 1, frames=3).objects[0], strict=True):
        assert np.abs(np.array(one.center) / 2 - np.array(two.center)).max() <= 1


def test_frames_of_a_clip_are_adjacent_in_a_batch() -> None:
    train, _ = data()
    batch = Planned(train, steps(train), None, 0, 1)[1]
    assert (batch.frames, batch.fps, len(batch.captions)) == (3, [3.0] * 4, 4)
    assert len(batch.keys) == len(batch.positions) == len(batch.weights) == 4
    assert batch.pixels is not None and batch.pixels.shape == (12, 3, 16, 16)
    for i, slot in enumerate(steps(train).batch(1)):
        assert batch.pixels[3 * i : 3 * i + 3].equal(train.image(slot.index))
        assert batch.captions[i] == train.caption(slot.index, RNG)
    scenes = Scenes(0, count=7, sprites="known", side=16)
    image = Planned(scenes, steps(scenes), None, 0, 1)[0]
    assert (image.frames, image.fps) == (1, None)


def test_motions_take_turns() -> None:
    ways = ["moving left", "growing"]
    train, held_out = data(motion=ways, validation=4)
    for each in (train, held_out):
        said = [each.caption(i, RNG) for i in range(len(each))]
        assert all(ways[i % 2] in caption for i, caption in enumerate(said))
    alone, _ = data(motion="growing")
    assert alone.image(3).equal(train.image(3))
    prints = {x.fingerprint() for x in (train, alone, data()[0], data(motion=ways[::-1])[0])}
    assert len(prints) == 4
    for wrong in ("flying", ["moving left", "flying"], []):
        with pytest.raises(ValueError, match="choose one of moving up"):
            WorldClips(motion=wrong)


def test_still_images_have_whole_batches_of_their_own() -> None:
    train, _ = data(images=0.25)
    plan = steps(train)
    batches = [Planned(train, plan, None, 0, 1)[step] for step in range(12)]
    assert {batch.frames for batch in batches} == {1, 3}
    for batch in batches:
        assert batch.pixels is not None and len(batch.pixels) == 4 * batch.frames
        assert (batch.fps is None) == (batch.frames == 1)
        kinds = {key.partition("-")[0] for key in batch.keys}
        assert kinds == {"scene" if batch.frames == 1 else "clip"}
        assert batch.weights.tolist() == [1.0] * 4
    clips = len(train) // 2  # then the scenes
    assert sum(plan.batch(step)[0].index >= clips for step in range(100)) == 25


def test_cached_latents_are_those_of_every_frame(tiny: Any, tmp_path: Path) -> None:
    train, _ = data(images=0.5)
    encoded = []

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        encoded.append(len(pixels))
        return tiny.moments(pixels)

    moments = latent_cache.moments(train, encode, "vae", tmp_path, batch_size=8)
    assert encoded == [6, 6, 8, 4]  # whole clips, then scenes
    assert moments.shape[0] == 6 * 3 + 6
    plan = steps(train)
    for step in range(8):
        cached, fresh = (Planned(train, plan, each, 0, 1)[step] for each in (moments, None))
        assert fresh.pixels is not None and cached.moments is not None
        assert (cached.frames, cached.fps) == (fresh.frames, fresh.fps)
        assert cached.captions == fresh.captions
        wanted = tiny.moments(fresh.pixels)
        assert torch.allclose(cached.moments, wanted, atol=2e-2, rtol=2e-3)
    again = latent_cache.moments(train, lambda pixels: pytest.fail("encoded anew"), "vae", tmp_path)
    assert np.array_equal(again, moments)


def test_cached_latents_of_images_lie_as_they_always_did(tiny: Any, tmp_path: Path) -> None:
    scenes = Scenes(0, count=7, sprites="known", side=16)
    moments = latent_cache.moments(scenes, tiny.moments, "vae", tmp_path, batch_size=4)
    batches = [torch.stack([scenes.image(i) for i in rows]) for rows in (range(4), range(4, 7))]
    wanted = torch.cat([tiny.moments(each) for each in batches]).half().numpy()
    assert np.array_equal(moments, wanted)
    batch = Planned(scenes, steps(scenes), moments, 0, 1)[0]
    rows = [slot.index for slot in steps(scenes).batch(0)]
    assert batch.moments is not None
    assert batch.moments.equal(torch.from_numpy(np.stack([moments[i] for i in rows])).float())


def test_held_out_clips_come_in_batches_of_as_many_frames() -> None:
    _, held_out = data(validation=5, frames=4)
    batches = [Fixed(held_out, 8, None)[i] for i in range(3)]
    assert len(Fixed(held_out, 8, None)) == 3
    assert [len(batch.keys) for batch in batches] == [2, 2, 1]
    assert [batch.positions for batch in batches] == [[0, 1], [2, 3], [4]]
    assert len(Fixed(held_out, 2, None)) == 5  # one clip at least


def test_two_objects_stay_in_their_halves() -> None:
    """Across the direction of motion they are apart; each is seen whole at the start."""
    rng, still = np.random.default_rng(0), 0
    for _ in range(400):
        tracks = module._pair(rng, ("fox", "cat"))
        dx, _ = module.DIRECTIONS[tracks[0].motion]
        own = [track.y if dx else track.x for track in tracks]
        spans = [(at - t.size / 2, at + t.size / 2) for at, t in zip(own, tracks, strict=True)]
        lower, upper = sorted(spans)
        middle, side = module.SCENE_SIDE / 2, module.SCENE_SIDE
        assert lower[0] >= 0 and lower[1] <= middle <= upper[0] and upper[1] <= side
        if tracks[1].motion == module.STILL:
            still += 1
            at, half = (tracks[1].x if dx else tracks[1].y), tracks[1].size / 2
            assert half <= at <= side - half
    assert 90 < still < 180


def test_a_defect_is_in_every_frame_and_in_no_caption() -> None:
    plain, spoiled = (data(64, validation=2, defect=defect) for defect in (None, "watermark"))
    for clean, marred in zip(plain, spoiled, strict=True):
        for i in range(2):
            assert clean.caption(i, RNG) == marred.caption(i, RNG)
            shown = (marred.image(i) / 2 + 0.5).movedim(1, -1).numpy()
            was = (clean.image(i) / 2 + 0.5).movedim(1, -1).numpy()
            assert ((mark_in(shown) - mark_in(was)) > 0.5).all()
        assert clean.fingerprint() != marred.fingerprint()


def test_a_frame_of_any_moment_is_the_clips_own() -> None:
    """Of the moment that its number gives: later than the first, and within the second."""
    train, _ = data(64, frames=1, any_moment=True, motion="moving left")
    still, _ = data(64, frames=1, motion="moving left")
    begins = [train._begin(i) for i in range(6)]
    assert len(set(begins)) == 6 and min(begins) > 0 and max(begins) < 1
    for i, begin in enumerate(begins):
        clip = draw_clip(0, i, frames=1, motion="moving left", begin=begin)
        assert torch.equal(train.image(i), data_of(clip))
        assert train.caption(i, RNG) == still.caption(i, RNG)
        (track,) = clip.plot.tracks
        (spot,) = clip.objects[0]
        assert abs(spot.center[0] - (track.x + track.velocity[0] * begin)) <= 1.5
    assert train.fingerprint() != still.fingerprint()
    with pytest.raises(ValueError, match="any_moment=true takes one frame of a clip, and frames=3"):
        WorldClips(frames=3, any_moment=True)


def data_of(clip: Clip) -> torch.Tensor:
    """(f, 3, side, side) in [-1, 1]"""
    return torch.from_numpy(clip.frames).permute(0, 3, 1, 2).float() / 127.5 - 1
