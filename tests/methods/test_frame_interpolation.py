"""Frame interpolation: the channels of known frames against a plain loop, what is drawn in
training, and what a source does in sampling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from trainer.__main__ import main
from trainer.attention.given_frames import KNOWN, GivenFrames
from trainer.attention.input_channels import ChannelInputs
from trainer.common.exit_codes import BAD_RECIPE
from trainer.data.world.clips import draw_clip
from trainer.diffusion.given_clip import GivenClip, complete
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.media.made_by import facts_in
from trainer.media.write_video import encode_video
from trainer.methods.apply import apply_methods
from trainer.methods.feature.frame_interpolation import FrameInterpolation
from trainer.methods.feature.vdm import Vdm
from trainer.ops.frame_interpolation import Masking, known_channels, neighbour_channels

BOTH = {"vdm": {"heads": 2}, "frame_interpolation": {"between": 2}}


def given_of(clips: Tensor, seeds: list[int], **inputs: Tensor) -> ChannelInputs:
    rows = clips.flatten(0, 1)
    shape = (rows.shape[0], rows.shape[1], rows.shape[2], rows.shape[3])
    return ChannelInputs(shape, clips.shape[1], seeds, inputs=inputs, x0=rows)


def test_the_channels_are_known_frames_and_their_mask() -> None:
    """Against a loop over frames, odd sizes."""
    clips = torch.randn(2, 5, 3, 7, 9)
    known = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 1]]).bool()
    found = known_channels(clips, known).unflatten(0, (2, 5))
    assert found.shape == (2, 5, 4, 7, 9)
    for b in range(2):
        for i in range(5):
            if known[b, i]:
                assert torch.equal(found[b, i, :3], clips[b, i])
                assert torch.equal(found[b, i, 3], torch.ones(7, 9))
            else:
                assert not found[b, i].any()
    masking = Masking(between=2, extrapolate=0, blank=0)
    named = masking.channels(given_of(clips, [0, 1], **{KNOWN: known}))
    assert named is not None and torch.equal(named, found.flatten(0, 1))


def test_the_channels_are_the_known_frames_before_and_after() -> None:
    """Against a loop over frames: between known ones, before the first, after the last, and where
    none is known."""
    clips = torch.randn(3, 6, 2, 3, 5)
    known = torch.tensor([[0, 1, 0, 0, 1, 0], [1, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]]).bool()
    masking = Masking(between=3, extrapolate=0, blank=0, neighbours=True)
    named = masking.channels(given_of(clips, [0, 1, 2], **{KNOWN: known}))
    assert named is not None and named.shape[1] == masking.count(2) == 7
    assert torch.equal(named, neighbour_channels(clips, known, 4))
    found = named.unflatten(0, (3, 6))
    assert not found[2].any()
    for b in range(2):
        places = [i for i in range(6) if known[b, i]]
        for i in range(6):
            before = [place for place in places if place <= i]
            after = [place for place in places if place >= i]
            p, n = (before or after[:1])[-1], (after or before[-1:])[0]
            assert torch.equal(found[b, i, :2], clips[b, p])
            assert torch.equal(found[b, i, 2:4], clips[b, n])
            wanted = torch.tensor([(i - p) / 4, (n - i) / 4, float(i in places)])
            assert torch.equal(found[b, i, 4:], wanted[:, None, None].expand(3, 3, 5))


def test_what_is_known_is_drawn_for_each_clip() -> None:
    masking = Masking(between=3, extrapolate=0.3, blank=0.1)
    drawn = [masking.draw(9, seed) for seed in range(400)]
    texts = ["".join(map(str, known.int().tolist())) for known in drawn]
    spaced = {"101010101", "100100100", "100010001"}
    firsts = {"1" * n + "0" * (9 - n) for n in range(1, 9)}
    lasts = {"0" * (9 - n) + "1" * n for n in range(1, 9)}
    assert set(texts) == {*spaced, *firsts, *lasts, "0" * 9}
    shares = [sum(text in kind for text in texts) / 400 for kind in (spaced, firsts, lasts)]
    assert shares == pytest.approx([0.6, 0.15, 0.15], abs=0.06)
    assert texts.count("0" * 9) / 400 == pytest.approx(0.1, abs=0.05)
    for text in spaced:
        assert texts.count(text) / 400 == pytest.approx(0.2, abs=0.06)
    ahead = Masking(between=3, extrapolate=1, blank=0)
    counts = [int(ahead.draw(9, seed).sum()) for seed in range(200)]
    assert (min(counts), max(counts)) == (1, 8)
    clips = torch.randn(2, 9, 2, 3, 3)
    found = masking.channels(given_of(clips, [11, 12]))
    wanted = known_channels(clips, torch.stack([masking.draw(9, 11), masking.draw(9, 12)]))
    assert found is not None and torch.equal(found, wanted)


def test_pictures_and_clips_that_are_not_given_have_no_channels() -> None:
    masking = Masking(between=3, extrapolate=0.2, blank=0.1)
    assert masking.channels(given_of(torch.randn(2, 1, 3, 4, 4), [0, 1])) is None
    assert masking.channels(ChannelInputs((4, 3, 4, 4), 2, [0, 1])) is None


def test_places() -> None:
    assert list(GivenFrames(between=4).places(16)) == [0, 5, 10, 15]
    assert list(GivenFrames(between=3).places(16)) == [0, 4, 8, 12]
    assert list(GivenFrames(before=2, between=1, after=3).places(10)) == [2, 4, 6]
    assert list(GivenFrames(after=12).places(16)) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="before=2 and after=2 leave none of 4 frames to be given"):
        GivenFrames(before=2, after=2).places(4)


@pytest.mark.parametrize("fill", ["zeros", "neighbours"])
def test_every_other_frame_is_made_and_the_given_are_kept(
    tiny: Any, fill: Any, randomise: Callable[..., None]
) -> None:
    method = FrameInterpolation(between=1, fill=fill)
    methods = {"vdm": Vdm(heads=2), "frame_interpolation": method}
    randomise(tiny, apply_methods(tiny, methods), 0.2)
    assert tiny.given_frames == GivenFrames(between=1, kept=True)
    given = GivenClip.of(torch.randn(2, 8, 8, 8), tiny.given_frames, 4)
    assert given.known.tolist() == [True, False, True, False]
    settings = Sampling(steps=2, guidance=2, frames=4)
    made = complete(tiny, ["a fox", "a cat"], [1, 2], given=given, settings=settings)
    assert made.shape == (8, 3, 32, 32)
    clips, own = made.unflatten(0, (2, 4)), tiny.decode(given.x0[::2])
    plain = sample(tiny, ["a fox", "a cat"], [1, 2], settings=settings).unflatten(0, (2, 4))
    for clip, without in zip(clips, plain, strict=True):
        assert torch.equal(clip[::2], own)
        assert not torch.allclose(clip[1::2], without[1::2], atol=1e-3)
    other = GivenClip.of(torch.randn(2, 8, 8, 8), tiny.given_frames, 4)
    again = complete(tiny, ["a fox"], [1], given=other, settings=settings)
    assert not torch.allclose(again[1::2], clips[0, 1::2], atol=1e-3)
    with pytest.raises(ValueError, match=r"placed among 4 frames, and frames=8 are to be made"):
        complete(tiny, ["a fox"], [1], given=given, settings=Sampling(steps=1, frames=8))
    with pytest.raises(ValueError, match=r"3 frames are given, and 4 frames have 2 places"):
        GivenClip.of(torch.randn(3, 8, 8, 8), tiny.given_frames, 4)


def test_shares_above_one_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"extrapolate=0.7 and blank=0.4 are shares"):
        FrameInterpolation(extrapolate=0.7, blank=0.4)


@pytest.fixture
def adapter(tiny_folder: Path, save_trained_on: Callable[..., Path]) -> Path:
    return save_trained_on(tiny_folder, BOTH, data={"source": "world_clips", "frames": 7})


@pytest.fixture
def video(tmp_path: Path) -> Path:
    pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_video(draw_clip(0, 0, frames=4, motion="moving left").frames, 8))
    return path


def made(*words: str) -> int:
    return main(["sample", "prompt=a fox", "steps=2", "guidance=1", *words])


def shown(gif: Path) -> list[np.ndarray]:
    with Image.open(gif) as film:
        found = []
        for i in range(film.n_frames):
            film.seek(i)
            found.append(np.asarray(film.convert("RGB")).astype(int))
    return found


def test_sample_completes_a_clip(adapter: Path, video: Path, tmp_path: Path, capsys: Any) -> None:
    """Three frames become seven; two seeds have the same given frames and other new ones."""
    out = tmp_path / "out"
    assert made(f"adapter={adapter}", f"source={video}", f"out={out}", "count=2") == 0
    one, two = (shown(out / f"a-fox-{seed}.gif") for seed in (0, 1))
    assert len(one) == 7
    near = [np.abs(a - b).mean() for a, b in zip(one, two, strict=True)]
    assert max(near[::3]) < 2 < min(near[1], near[2], near[4], near[5])
    facts = facts_in(out / "a-fox-0.gif")
    assert facts["source"] == "clip.mp4" and "between" not in facts
    capsys.readouterr()
    more = ("frames=5", "before=1", "between=0", "after=2")
    assert made(f"adapter={adapter}", f"source={video}", f"out={out}", *more) == 0
    assert len(shown(out / "a-fox-0-2.gif")) == 5
    facts = facts_in(out / "a-fox-0-2.gif")
    assert [facts[key] for key in ("before", "between", "after")] == [1, 0, 2]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["source_prompt=a cat"], "source_prompt= is not read by a model that completes the clip"),
        (["before=4", "after=3"], "before=4 and after=3 leave none of 7 frames to be given"),
        (["between=0"], "clip.mp4: 4 frames at 8 a second are too short for 7 frames"),
        (["between=-1"], "between=-1: a whole number is needed, at least 0"),
    ],
    ids=str,
)
def test_refusals_of_sample(
    words: list[str], says: str, adapter: Path, video: Path, tmp_path: Path, capsys: Any
) -> None:
    assert made(f"adapter={adapter}", f"source={video}", f"out={tmp_path}", *words) == BAD_RECIPE
    assert says in capsys.readouterr().err


def test_a_model_that_completes_nothing_is_not_asked_to(
    tiny_folder: Path,
    save_trained_on: Callable[..., Path],
    video: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    plain = save_trained_on(tiny_folder, {"vdm": {"heads": 2}})
    words = (f"adapter={plain}", f"source={video}", f"out={tmp_path}", "frames=2")
    assert made(*words, "between=3") == BAD_RECIPE
    assert "between=3 is for a model that completes a given clip" in capsys.readouterr().err
    assert made(*words, "count=2") == BAD_RECIPE
    assert "source= gives the same clip for every seed" in capsys.readouterr().err
    assert made(f"adapter={plain}", f"out={tmp_path}", "between=3") == BAD_RECIPE
    assert "between=3 has no effect: it is of the clip that source=" in capsys.readouterr().err
