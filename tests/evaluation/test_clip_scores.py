"""The scores of clips: high on real clips of the world, whose content is known, and low on the same
clips played backwards, shuffled, frozen and mixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from trainer.data.source import Needs
from trainer.data.sources.world_clips import WorldClips
from trainer.data.world.clips import DIRECTIONS, Clip, draw_clip, render_clip
from trainer.evaluation.clip_scores import ClipScores, Tracks, asked, named_right, tracks
from trainer.evaluation.judge import Judge
from trainer.media.images import to_tensor

CLIP = Path(__file__).parents[2] / "data" / "tiny" / "clip"
COUNT, FRAMES, SIDE = 8, 8, 64
WAYS = [list(DIRECTIONS)[i % 4] for i in range(COUNT)]


def pixels(clips: Sequence[Clip]) -> Tensor:
    return torch.stack(
        [torch.stack([to_tensor(Image.fromarray(frame)) for frame in c.frames]) for c in clips]
    )


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(CLIP)


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return [draw_clip(77, i, frames=FRAMES, motion=way) for i, way in enumerate(WAYS)]


@pytest.fixture(scope="module")
def words(clips: list[Clip]) -> list[str]:
    return [clip.plot.tracks[0].word for clip in clips]


@pytest.fixture(scope="module")
def scorer(judge: Judge, clips: list[Clip]) -> ClipScores:
    return ClipScores(judge, [clip.caption for clip in clips], pixels(clips))


def test_real_clips_are_all_right(scorer: ClipScores) -> None:
    scores = scorer.scores(scorer.real)
    assert scores["direction right"] == scores["object right"] == 1
    assert scores["frame consistency"] is not None and scores["frame consistency"] > 0.9


def test_backwards_they_all_go_the_wrong_way(scorer: ClipScores) -> None:
    forth, back = (scorer.scores(clips) for clips in (scorer.real, scorer.real.flip(1)))
    assert back["direction right"] == 0
    assert back["object right"] == 1
    assert back["frame consistency"] == pytest.approx(forth["frame consistency"])


def test_shuffled_in_time_they_go_nowhere(scorer: ClipScores) -> None:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.stack([c[torch.randperm(FRAMES, generator=generator)] for c in scorer.real])
    assert scorer.scores(mixed)["direction right"] <= 0.1


def test_stood_still_the_object_stays_and_the_direction_goes(
    scorer: ClipScores, judge: Judge, words: list[str]
) -> None:
    still = scorer.real[:, :1].expand_as(scorer.real)
    assert set(tracks(judge, still, words).directions()) == {None}
    scores = scorer.scores(still)
    assert scores["direction right"] == 0 and scores["object right"] == 1
    assert scores["frame consistency"] == pytest.approx(1)  # which by itself says nothing


def test_frames_of_unlike_clips_are_no_clip(scorer: ClipScores) -> None:
    """Frame i of every clip goes to the clip i places on."""
    apart = torch.stack([scorer.real[:, i].roll(i, 0) for i in range(FRAMES)], 1)
    scores, real = scorer.scores(apart), scorer.scores(scorer.real)
    assert scores["object right"] == scores["direction right"] == 0
    assert scores["frame consistency"] < 0.5 * real["frame consistency"]
    assert scores["CLIP-T"] < 0.7 * real["CLIP-T"]


def test_six_frames_of_eight_make_the_object_right(scorer: ClipScores) -> None:
    """And the direction, too, is that of the frames that show it."""
    for lost, right in ((2, 1), (3, 0)):
        clips = scorer.real.clone()
        clips[:, :lost] = -clips[:, :lost, :, :1, :1]  # a plain colour
        scores = scorer.scores(clips)
        assert scores["object right"] == scores["direction right"] == right


def test_tracks_are_where_the_boxes_are(
    scorer: ClipScores, judge: Judge, clips: list[Clip], words: list[str]
) -> None:
    truth = torch.tensor([[frame[0].center for frame in clip.objects] for clip in clips]) / SIDE
    found = tracks(judge, scorer.real, words)
    assert found.centers.shape == (COUNT, FRAMES, 2) and found.mass.shape == (COUNT, FRAMES)
    assert float((found.centers - truth).norm(dim=-1).mean()) < 3 / SIDE
    torch.testing.assert_close(found.moved(), truth[:, -1] - truth[:, 0], rtol=0, atol=5 / SIDE)


def test_another_object_that_moves_the_same_is_alike(
    scorer: ClipScores, judge: Judge, clips: list[Clip], words: list[str]
) -> None:
    others = ["fox" if word != "fox" else "rocket" for word in words]
    swapped = pixels(
        [
            render_clip(replace(c.plot, tracks=(replace(c.plot.tracks[0], word=word),)), FRAMES)
            for c, word in zip(clips, others, strict=True)
        ]
    )
    assert named_right(judge, swapped, others).float().mean() > 0.95
    assert not named_right(judge, swapped, words).any()
    own, other = tracks(judge, scorer.real, words), tracks(judge, swapped, others)
    alike = own.like(other)
    assert float(alike.mean()) > 0.95 and float(alike.min()) > 0.85  # of the slowest
    torch.testing.assert_close(own.like(own), torch.ones(COUNT))
    back = tracks(judge, swapped.flip(1), others)
    assert float(own.like(back).max()) < -0.85


def test_small_motion_has_no_direction_and_is_measured_by_hand() -> None:
    """Eight frames in which the object moves by so much of a frame's side, to the right or up."""
    time = torch.linspace(0, 1, 8)
    for length, named in ((0.03, None), (0.05, "moving right")):
        centers = torch.stack([0.4 + length * time, torch.full((8,), 0.5)], -1)[None]
        track = Tracks(centers, torch.full((1, 8), 4.0))
        torch.testing.assert_close(track.moved(), torch.tensor([[length, 0.0]]))
        assert track.directions() == [named]


def test_frames_that_show_an_object_in_one_clip_alone_do_not_count() -> None:
    time = torch.linspace(0, 1, 8)
    centers = torch.stack([time, torch.zeros(8)], -1)[None]
    away = centers.clone()
    away[:, 6:] = 0.0  # where the second clip does not show it
    seen = torch.full((1, 8), 4.0)
    hidden = seen.clone()
    hidden[:, 6:] = 0.0
    likeness = Tracks(centers, seen).like(Tracks(away, hidden))
    torch.testing.assert_close(likeness, torch.ones(1))
    hidden[:, 5:] = 0.0  # five frames of eight are too few
    assert Tracks(centers, seen).like(Tracks(away, hidden)).tolist() == [0.0]


@pytest.mark.parametrize(
    ("caption", "word", "way"),
    [
        ("a photo of an apple moving left slowly on a blue background", "apple", "moving left"),
        ("a fox spinning", "fox", None),
        ("a fox passing behind an apple", None, None),
        ("a fox moving left and a cow moving right on a red background", None, None),
        ("my dog, moving up", "dog", "moving up"),
        ("a man skiing", None, None),
    ],
)
def test_what_a_caption_asks_for(caption: str, word: str | None, way: str | None) -> None:
    assert asked(caption) == (word, way)


def test_a_dataset_of_few_clips_asks_again(judge: Judge, tmp_path: Path) -> None:
    def none(*_: object) -> list[Image.Image]:
        return []

    data, _ = WorldClips(count=3, frames=2, motion="growing", images=0.5, validation=0).open(
        Needs(SIDE, 4, none, tmp_path, lambda: "")
    )
    scorer = ClipScores.of(judge, data, 5)
    assert scorer.real.shape == (3, 2, 3, SIDE, SIDE)  # clips, though stills come with them
    assert scorer.captions[3:] == scorer.captions[:2]
    assert all("growing" in caption for caption in scorer.captions)
    scores = scorer.scores(scorer.real)
    assert scores["direction right"] is None and scores["object right"] == 1


def test_each_caption_has_the_inputs_of_its_clip(judge: Judge, tmp_path: Path) -> None:
    needs = Needs(SIDE, 4, lambda *_: [], tmp_path, lambda: "tiny")
    data, _ = WorldClips(count=2, frames=2, validation=0).open(needs)
    scorer = ClipScores.of(judge, data, 3)
    depth = scorer.inputs(("depth",))["depth"]
    assert depth.shape == (3, 2, 1, SIDE, SIDE) and scorer.inputs(()) == {}
    assert torch.equal(depth[0], depth[2]) and not torch.equal(depth[0], depth[1])
    assert torch.equal(depth[1], data.depth(1))  # type: ignore[attr-defined]


def test_nobody_is_asked_for_sprites_of_captions_without(judge: Judge) -> None:
    noise = torch.rand(2, 3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scores = ClipScores(judge, ["a man skiing", ""], noise).scores(noise)
    assert scores["direction right"] is None and scores["object right"] is None
    assert scores["frame consistency"] is not None and scores["CLIP-T"] is not None
