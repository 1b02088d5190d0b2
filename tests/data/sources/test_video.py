"""Videos of users: cut at the right moments, turned upright, and every bad file named."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.config.schema import RecipeError
from trainer.config.value_errors import build_section
from trainer.data import latent_cache, video_clips
from trainer.data.crops import Cropped
from trainer.data.loader import Planned
from trainer.data.plan import StepPlan
from trainer.data.source import Needs
from trainer.data.sources.shards import Shards
from trainer.data.sources.video import Video
from trainer.data.tars.write_clips import write_clips
from trainer.data.tars.write_shards import write_shards, write_world
from trainer.data.world.clips import draw_clip
from trainer.media.images import ImageError
from trainer.media.read_video import examine, read_clip
from trainer.media.write_video import encode_video

av = pytest.importorskip("av")
RNG = np.random.default_rng(0)
STEP = 8  # of grey from one frame to the next: its number can be read off a frame


def greys(count: int, size: tuple[int, int] = (48, 32)) -> list[np.ndarray]:
    """Frames of (width, height), number i filled with 8 * i."""
    return [np.full((size[1], size[0], 3), STEP * i, np.uint8) for i in range(count)]


def film(
    path: Path,
    frames: Sequence[np.ndarray],
    times: Sequence[int] | None = None,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
    **stream: Any,
) -> Path:
    """A video of frames at `times` in milliseconds, 8 a second if None. stream: attributes, or
    methods and their argument, of the stream."""
    with av.open(str(path), "w", options=muxer or {}) as container:
        out = container.add_stream(codec, rate=8, options={"threads": "1", **(options or {})})
        out.height, out.width = frames[0].shape[:2]
        out.pix_fmt = pixels
        out.codec_context.time_base = Fraction(1, 1000)
        for name, value in stream.items():
            if callable(getattr(out, name)):
                getattr(out, name)(value)
            else:
                setattr(out, name, value)
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = 125 * i if times is None else times[i]
            picture.time_base = Fraction(1, 1000)
            container.mux(out.encode(picture))
        container.mux(out.encode())
    return path


def song(path: Path) -> Path:
    """An MP4 with sound alone."""
    with av.open(str(path), "w") as container:
        out = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.rate = 16000
        container.mux(out.encode(frame))
        container.mux(out.encode())
    return path


def cut(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def lose(path: Path) -> Path:
    """A fifth of the file becomes zeros, as where a copy left a hole."""
    data = bytearray(path.read_bytes())
    first = data.index(b"mdat") + len(data) // 3
    data[first : first + len(data) // 5] = bytes(len(data) // 5)
    path.write_bytes(data)
    return path


def needs(path: Path, side: int = 32) -> Needs:
    return Needs(side, 4, lambda prompts, seed, guidance: (), path / "cache", lambda: "tiny")


def source(path: Path, side: int = 32, **options: Any) -> Any:
    """Training and held-out clips of a video, or of a folder of them; 4 frames, a prompt."""
    chosen = {"video": path, "frames": 4, "prompt": "grey", **options}
    return Video(**chosen).open(needs(path.parent, side))


def numbers(clip: Any) -> list[int]:
    """Which frames of `greys` a clip (frames, 3, h, w) shows."""
    levels = [float(frame.mean()) for frame in (clip + 1) * 127.5]
    assert all(abs(level / STEP - round(level / STEP)) < 0.35 for level in levels), levels
    return [round(level / STEP) for level in levels]


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        source(path, **options)
    return str(caught.value)


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 frames at 8 a second with a key frame every 6th and frames that lean on later ones."""
    path = tmp_path_factory.mktemp("grey") / "grey.mp4"
    return film(path, greys(30), options={"g": "6", "bf": "2"})


@pytest.mark.parametrize(
    ("options", "wanted", "fps"),
    [
        ({}, [0, 1, 2, 3], 8),
        ({"stride": 3}, [0, 3, 6, 9], 8 / 3),
        ({"start": 20, "stride": 2}, [20, 22, 24, 26], 4),
        ({"start": 26}, [26, 27, 28, 29], 8),
        ({"fps": 2, "start": 1}, [1, 5, 9, 13], 2),
        ({"fps": 8, "start": 13, "frames": 1}, [13], 8),
    ],
    ids=str,
)
def test_stride_rate_and_start_choose_the_frames(
    grey: Path, options: dict[str, Any], wanted: list[int], fps: float
) -> None:
    train, held_out = source(grey, **options)
    assert (len(train), held_out, train.fixed, list(train.skipped)) == (1, None, True, [])
    sample = train.sample(0, RNG)
    assert (sample.caption, sample.key) == ("grey", "grey.mp4")
    assert sample.image.shape == (len(wanted), 3, 32, 32)
    assert numbers(sample.image) == wanted
    assert train.rates == pytest.approx([fps])
    assert train.image(0).equal(sample.image)


def test_a_clip_from_the_middle_is_that_of_the_whole(grey: Path) -> None:
    """Seeking to a key frame and decoding from the first frame on give the same pixels."""
    known = examine(grey, "grey")
    whole = read_clip(grey, "grey", video=known, times=[i / 8 for i in range(30)])
    for start in range(0, 27, 5):
        part = read_clip(grey, "grey", video=known, times=[(start + i) / 8 for i in range(3)])
        assert [each.tobytes() for each in part] == [
            each.tobytes() for each in whole[start : start + 3]
        ]


def test_variable_frame_rate_is_sampled_by_time(tmp_path: Path) -> None:
    times = [0, 100, 200, 300, 1000, 1100, 1400, 1500]  # the fourth stays for 0.7 s
    for name in ("a.mp4", "a.mkv"):
        path = film(tmp_path / name, greys(8), times)
        train, _ = source(path, fps=4, frames=7)  # 0, 0.25, 0.5, ...
        assert numbers(train.image(0)) == [0, 2, 3, 3, 4, 5, 7]
        assert train.rates == [4]
    train, _ = source(path, frames=8)  # as often as it has frames, but evenly
    assert train.rates == pytest.approx([7 / 1.5])
    assert numbers(train.image(0)) == [0, 2, 3, 3, 3, 4, 5, 7]


def test_rotation_in_the_metadata_is_applied(tmp_path: Path) -> None:
    frame = np.full((32, 48, 3), (20, 20, 200), np.uint8)
    frame[:, :24] = (200, 20, 20)
    # What a phone held upright writes, after the file format's x' = a x + c y, y' = b x + d y:
    # what points right comes to point down, so the red left half comes to be the upper one.
    matrix = (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    path = film(tmp_path / "a.mp4", [frame] * 4, set_display_matrix=matrix)
    known = examine(path, "a")
    assert (known.width, known.height) == (32, 48)
    image = read_clip(path, "a", video=known, times=[0.0])[0]
    assert image.size == (32, 48)
    above, below = np.asarray(image, int)[4, 16], np.asarray(image, int)[44, 16]
    assert above[0] > 150 > above[2]
    assert below[2] > 150 > below[0]
    half = film(tmp_path / "b.mp4", [frame] * 4, set_display_rotation=180)
    image = read_clip(half, "b", video=examine(half, "b"), times=[0.0])[0]
    assert image.size == (48, 32)
    assert np.asarray(image, int)[16, 44, 0] > 150


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ten.mp4", {"pixels": "yuv420p10le"}),
        ("ten.mkv", {"pixels": "yuv444p10le"}),
        ("full.mp4", {"pixels": "yuvj420p"}),
        ("old.avi", {"codec": "mpeg4", "options": {"qscale": "2"}}),
        ("web.webm", {"codec": "libvpx-vp9", "options": {"crf": "10", "b": "0"}}),
    ],
    ids=str,
)
def test_codecs_and_depths_give_the_same_colours(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    frame = np.full((32, 48, 3), (30, 200, 60), np.uint8)
    path = film(tmp_path / name, [frame] * 4, **options)
    train, _ = source(path)
    colour = (train.image(0)[2].mean(dim=(1, 2)) + 1) * 127.5
    assert np.abs(colour.numpy() - (30, 200, 60)).max() < 4


def test_odd_sizes_and_oblong_pixels(tmp_path: Path) -> None:
    odd = film(tmp_path / "odd.mp4", greys(4, (49, 35)), pixels="yuv444p")
    assert examine(odd, "odd")[:3] == (49, 35, 4)
    train, _ = source(odd, side=17)
    assert train.image(0).shape == (4, 3, 17, 17)
    assert isinstance(train, Cropped) and train.crop(0) == (35, 49, 0, 3, 17, 17)
    wide = film(tmp_path / "wide.mp4", greys(4), sample_aspect_ratio=Fraction(2, 1))
    assert examine(wide, "wide")[:2] == (96, 32)
    assert read_clip(wide, "wide", video=examine(wide, "wide"), times=[0.0])[0].size == (96, 32)


def test_what_is_see_through_is_seen_on_white(tmp_path: Path) -> None:
    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as container:
        out = container.add_stream("png", rate=8)
        out.width, out.height, out.pix_fmt = 32, 32, "rgba"
        frame = np.zeros((32, 32, 4), np.uint8)
        frame[:16] = (200, 20, 20, 255)
        container.mux(out.encode(av.VideoFrame.from_ndarray(frame, format="rgba")))
        container.mux(out.encode())
    image = read_clip(path, "a", video=examine(path, "a"), times=[0.0])[0]
    assert image.getpixel((5, 5)) == (200, 20, 20)
    assert image.getpixel((5, 25)) == (255, 255, 255)


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good video and one of every bad kind."""
    folder = tmp_path_factory.mktemp("bad") / "videos"
    folder.mkdir()
    film(folder / "good.mp4", greys(9))
    noise = list(np.random.default_rng(0).integers(0, 256, (12, 32, 48, 3), np.uint8))
    cut(film(folder / "cut_head.mp4", noise), 0.5)
    cut(film(folder / "cut_tail.mp4", noise, muxer={"movflags": "faststart"}), 0.7)
    cut(film(folder / "cut.mkv", noise), 0.5)
    lose(film(folder / "holed.mp4", noise))
    film(folder / "one.mp4", greys(1))
    film(folder / "short.mp4", greys(3))
    film(folder / "small.mp4", greys(4, (12, 12)))
    film(folder / "hdr.mp4", greys(9), pixels="yuv420p10le", color_trc=16)
    song(folder / "song.mp4")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "pointer.mp4").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (folder / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{folder}/good.mp4\n")
    still = [Image.fromarray(frame) for frame in greys(9)]
    still[0].save(folder / "moving.gif", save_all=True, append_images=still[1:])
    cut(folder / "moving.gif", 0.6)
    (folder / "gone.mp4").symlink_to(folder / "nowhere.mp4")
    (folder / "notes.md").write_text("passed over")
    return folder


REASONS = {
    "cut.mkv": "truncated, ",
    "cut_head.mp4": "truncated or damaged",
    "cut_tail.mp4": "truncated, ",
    "empty.mp4": "the file is empty; copy it again",
    "holed.mp4": "truncated or damaged",
    "gone.mp4": "no such file",
    "hdr.mp4": "high dynamic range (PQ or HLG); convert it to SDR",
    "list.mp4": "not a readable video; convert it to MP4, or remove it",
    "moving.gif": "truncated; copy it again",
    "one.mp4": "1 frames at 8 a second are too short for 4 frames at 8 from frame 0; lower",
    "pointer.mp4": "a Git LFS pointer, not the video; run `git lfs pull`",
    "short.mp4": "3 frames at 8 a second are too short",
    "small.mp4": "12x12 pixels, each side must have at least 16",
    "song.mp4": "the file has no video",
}


def test_bad_videos_are_refused_by_name_all_at_once(bad: Path) -> None:
    message = refusal(bad)
    assert "14 of 15 videos cannot be used, data.on_bad=skip leaves them out" in message
    lines = {line.partition(":")[0]: line.partition(": ")[2] for line in message.splitlines()[1:]}
    assert lines.keys() == REASONS.keys()
    for name, reason in REASONS.items():
        assert lines[name].startswith(reason), lines[name]


def test_bad_videos_are_skipped_and_counted(bad: Path) -> None:
    train, _ = source(bad, on_bad="skip")
    assert [take.key for take in train.videos] == ["good.mp4"]
    assert {line.partition(":")[0] for line in train.skipped} == REASONS.keys()
    assert "14 of 14" in refusal(_without_good(bad), on_bad="skip")
    message = refusal(bad, on_bad="skip", validation=1)
    assert "validation=1 holds out all 1 usable videos" in message


@pytest.mark.parametrize(("count", "more"), [(20, []), (21, ["... and 1 more"])])
def test_a_message_names_twenty_bad_videos(tmp_path: Path, count: int, more: list[str]) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:02}.mp4").touch()
    lines = refusal(folder).splitlines()[1:]
    assert [line.partition(":")[0] for line in lines[:20]] == [f"{i:02}.mp4" for i in range(20)]
    assert lines[20:] == more


def _without_good(bad: Path) -> Path:
    folder = bad.with_name("only_bad")
    folder.mkdir()
    for path in bad.iterdir():
        if path.name != "good.mp4":
            (folder / path.name).symlink_to(path)
    return folder


def test_damage_that_comes_later_is_an_error_too(tmp_path: Path) -> None:
    train, _ = source(film(tmp_path / "a.mp4", greys(6)))
    cut(tmp_path / "a.mp4", 0.5)
    with pytest.raises(ImageError, match=r"a\.mp4: truncated or damaged"):
        train.image(0)


def test_captions_stand_beside_or_are_given(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a10", "a2", "b"):
        film(folder / f"{name}.mp4", greys(4))
    (folder / "a10.txt").write_text("ten\n", encoding="utf-8-sig")
    (folder / "a2.json").write_text(json.dumps({"caption": " two ", "id": 7}))
    asked = f"no caption for {folder / 'b.mp4'}: write it into b.txt beside it, or set data.prompt"
    assert asked in refusal(folder, prompt=None)
    (folder / "b.json").write_text("{}")
    assert "b.json has no caption; add one, or write b.txt beside it" in refusal(
        folder, prompt=None
    )
    (folder / "b.txt").write_text("bee")
    train, held_out = source(folder, prompt=None, validation=1)
    assert [train.caption(i, RNG) for i in range(2)] == ["two", "ten"]  # 2 before 10
    assert held_out.caption(0, RNG) == "bee"
    train, _ = source(folder, prompt="all the same")
    assert {train.caption(i, RNG) for i in range(3)} == {"all the same"}


def test_mirrored_clips_are_mirrored_whole_and_never_against_their_caption(tmp_path: Path) -> None:
    frame = np.zeros((32, 32, 3), np.uint8)
    frame[:, :16] = 240
    path = film(tmp_path / "a.mp4", [frame] * 4)
    train, _ = source(path, flip=True, prompt="half white")
    assert not train.fixed
    sides = set()
    for seed in range(12):
        clip = train.sample(0, np.random.default_rng(seed)).image
        left = clip[:, :, :, :8].mean(dim=(1, 2, 3)) > 0
        assert len(set(left.tolist())) == 1
        sides.add(bool(left[0]))
    assert sides == {True, False}
    for prompt in ("White on the LEFT", "turning clockwise", "moving rightwards"):
        told, _ = source(path, flip=True, prompt=prompt)
        clips = [told.sample(0, np.random.default_rng(seed)).image for seed in range(12)]
        assert all(clip.equal(clips[0]) for clip in clips)
    bright, _ = source(path, flip=True, prompt="a bright thing")  # no side is told
    means = {
        float(bright.sample(0, np.random.default_rng(s)).image[..., 0].mean()) for s in range(9)
    }
    assert len(means) == 2


def test_a_random_start_finds_every_clip_there_is(grey: Path) -> None:
    train, held_out = source(grey, start="random", frames=26)
    assert not train.fixed
    found = [numbers(train.sample(0, np.random.default_rng(s)).image) for s in range(25)]
    assert {clip[0] for clip in found} == {0, 1, 2, 3, 4}
    assert all(clip == list(range(clip[0], clip[0] + 26)) for clip in found)
    assert numbers(train.image(0)) == list(range(26))
    assert held_out is None


def test_still_images_are_frames_of_the_clips_or_photos(grey: Path, tmp_path: Path) -> None:
    mixed, _ = source(grey, images=0.5)
    assert (len(mixed), mixed.frames, mixed.fixed) == (2, [4, 1], True)
    assert numbers(mixed.image(1)[None]) == [2]
    assert mixed.sample(1, RNG).caption == "grey"
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (40, 40), "red").save(photos / "red.png")
    with pytest.raises(ValueError, match="no caption for"):
        Video(video=grey, images=0.5, stills=photos)
    (photos / "red.txt").write_text("a red square")
    mixed, _ = source(grey, images=0.25, stills=photos)
    plan = StepPlan(((0, 1), (1, 2)), tuple(mixed.shares), (1.0, 1.0), 2, 0, tuple(mixed.frames))
    batches = [Planned(mixed, plan, None, 0, 1)[step] for step in range(12)]
    assert {(batch.frames, *batch.captions) for batch in batches} == {
        (1, "a red square", "a red square"),
        (4, "grey", "grey"),
    }
    assert {len(batch.pixels) for batch in batches if batch.pixels is not None} == {2, 8}
    moments = latent_cache.moments(mixed, lambda pixels: pixels[:, :2, ::8, ::8], "vae", tmp_path)
    assert moments.shape == (5, 2, 4, 4)


def test_bad_photos_of_stills_are_told_or_left_out(grey: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (40, 40), "red").save(photos / "red.png")
    (photos / "torn.png").write_bytes((photos / "red.png").read_bytes()[:60])
    for name in ("red", "torn"):
        (photos / f"{name}.txt").write_text(f"a {name} square")
    with pytest.raises(ValueError, match=r"torn\.png"):
        source(grey, images=0.5, stills=photos)
    mixed, _ = source(grey, images=0.5, stills=photos, on_bad="skip")
    assert len(mixed) == 2 and any("torn.png" in text for text in mixed.skipped)


def test_a_worker_gets_paths_and_a_cache_knows_what_changed(grey: Path, tmp_path: Path) -> None:
    train, _ = source(grey)
    train.image(0)
    assert len(pickle.dumps(train)) < 5000
    assert pickle.loads(pickle.dumps(train)).image(0).equal(train.image(0))
    other = film(tmp_path / "grey.mp4", greys(12))
    variants = [source(grey)[0], source(grey, stride=2)[0], source(grey, start=1)[0]]
    variants += [source(grey, side=16)[0], source(other)[0]]
    assert variants[0].fingerprint() == train.fingerprint()
    assert len({each.fingerprint() for each in variants}) == 5


@pytest.mark.parametrize("spare", [0, -1])
def test_a_clip_is_decoded_once_if_all_clips_fit_in_memory(
    grey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    monkeypatch.setattr(video_clips, "KEEP_BYTES", 4 * 32 * 32 * 3 + spare)
    path = Path(shutil.copy(grey, tmp_path))
    train, _ = source(path)
    first = train.image(0)
    path.unlink()
    if spare < 0:
        with pytest.raises(ImageError, match=r"grey\.mp4"):
            train.image(0)
    else:
        assert train.image(0).equal(first)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips 0..4 of seed 3 in two shards."""
    folder = tmp_path_factory.mktemp("shards") / "clips"
    write_clips(folder, 5, seed=3, per_shard=3)
    return folder


def test_clips_of_the_world_come_back_from_shards(shards: Path) -> None:
    train, held_out = source(shards, side=64, frames=8, prompt=None, validation=1)
    assert (len(train), len(held_out), train.rates) == (4, 1, [8.0] * 4)
    for i, sample in enumerate(
        [*(train.sample(i, RNG) for i in range(4)), held_out.sample(0, RNG)]
    ):
        clip = draw_clip(3, i)
        assert (sample.caption, sample.key) == (clip.caption, f"clip-3-{i}")
        shown = ((sample.image + 1) * 127.5).permute(0, 2, 3, 1).numpy()
        error = np.square(shown - clip.frames).mean()
        assert 10 * np.log10(255**2 / error) > 42  # dB; at 4:2:0 it is near 31
    copy = pickle.loads(pickle.dumps(train))
    assert copy.image(3).equal(train.image(3))
    one, _ = source(shards / "clips-000001.tar", frames=8, prompt="p")
    assert (len(one), one.caption(0, RNG)) == (2, "p")
    assert one.fingerprint() != train.fingerprint()


def test_shards_of_clips_are_the_same_bytes_and_tell_what_is_seen(
    shards: Path, tmp_path: Path
) -> None:
    paths = write_clips(tmp_path / "again", 5, seed=3, per_shard=3)
    for path in paths:
        assert path.read_bytes() == (shards / path.name).read_bytes()
    with tarfile.open(paths[0]) as archive:
        assert archive.getnames()[:3] == ["clip-3-0.mp4", "clip-3-0.txt", "clip-3-0.json"]
        for i in range(3):
            member = archive.extractfile(f"clip-3-{i}.json")
            assert member is not None
            known, clip = json.loads(member.read()), draw_clip(3, i)
            assert known["motions"] == [track.motion for track in clip.plot.tracks]
            boxes = [[list(item.box) for item in frame] for frame in clip.objects]
            assert [list(frame) for frame in zip(*known["boxes"], strict=True)] == boxes
    with pytest.raises(ValueError, match="count=0: write at least one clip"):
        write_clips(tmp_path / "none", 0)
    with pytest.raises(ValueError, match="sprites=some: choose one of known"):
        write_clips(tmp_path / "none", 1, sprites="some")


def test_encoded_frames_are_the_frames() -> None:
    frames = draw_clip(3, 2).frames
    for pixels, least in (("yuv444p", 42), ("yuv420p", 25)):
        data = encode_video(frames, 12.5, pixels)
        assert data == encode_video(list(frames), 12.5, pixels)
        known = examine(data, "a")
        assert (known.frames, known.rate) == (8, pytest.approx(12.5))
        shown = np.stack(read_clip(data, "a", video=known, times=[i / 12.5 for i in range(8)]))
        error = np.square(shown.astype(float) - frames).mean()
        assert 10 * np.log10(255**2 / error) > least


def test_images_and_videos_in_shards_are_told_apart(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"contains videos; read them by data\.source=video"):
        Shards(shards=shards).open(needs(tmp_path))
    write_world(tmp_path / "scenes", 2)
    assert "contains images; read them by data.source=shards" in refusal(tmp_path / "scenes")
    world = json.loads((tmp_path / "scenes" / "manifest.json").read_text())
    assert all("film" not in entry for shard in world["shards"] for entry in shard["samples"])


def test_bad_videos_in_shards_are_counted_with_their_names(tmp_path: Path) -> None:
    good, long = encode_video(greys(6), 8), encode_video(greys(12), 8)
    folder = tmp_path / "some"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name, data in (
            ("a.mp4", long), ("a.txt", b"a"), ("b.mp4", good[: len(good) // 2]), ("b.txt", b"b"),
            ("c.mp4", good), ("c.txt", b"c"), ("d.mp4", good),
        ):  # fmt: skip
            (tmp_path / "member").write_bytes(data)
            archive.add(tmp_path / "member", name)
    message = refusal(folder, frames=8)
    assert "3 of 4 videos cannot be used" in message
    assert "a.tar: b.mp4: truncated or damaged" in message
    assert "a.tar: c: 6 frames at 8 a second are too short for 8" in message
    assert "a.tar: d: " in message
    train, _ = source(folder, frames=8, on_bad="skip", prompt=None)
    assert (len(train), train.caption(0, RNG), len(train.skipped)) == (1, "a", 3)
    assert numbers(train.image(0)) == list(range(8))
    with pytest.raises(ValueError, match=r"could not be read back, such as .*a\.mp4: truncated"):
        write_shards(tmp_path / "new", [("a", {"mp4": good[:300], "txt": b"a"})], per_shard=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 2, "fps": 4.0}, "stride=2 and fps=4: give only one of them"),
        ({"frames": 1, "images": 0.5}, "set images=0"),
        ({"stills": Path("photos")}, "images=0 never uses stills"),
        ({"start": -1}, "give the number of a frame"),
        ({"prompt": " "}, "write what the video shows"),
        ({"fps": 9.0}, "8 frames a second, fewer than data.fps=9; lower it"),
        ({"start": 27}, "too short for 4 frames at 8 from frame 27"),
        ({"validation": 1}, "validation=1 holds out all 1 videos"),
    ],
    ids=str,
)
def test_refusals(grey: Path, options: dict[str, Any], message: str) -> None:
    assert message in refusal(grey, **options)


def test_a_recipe_names_a_video_that_is_there(grey: Path, tmp_path: Path) -> None:
    assert "no such file or folder; expected a video (.avi," in refusal(tmp_path / "a.mp4")
    (tmp_path / "empty").mkdir()
    assert "no video in this folder" in refusal(tmp_path / "empty")
    assert isinstance(build_section(Video, {"video": str(grey), "prompt": "grey"}, "data"), Video)
    with pytest.raises(RecipeError, match=r"data\.frmes.*frames"):
        build_section(Video, {"video": str(grey), "prompt": "grey", "frmes": 3}, "data")


def test_a_recipe_is_checked_without_the_decoder() -> None:
    code = (
        "import sys; from trainer.data.source import Source; names = Source.names();"
        "assert {'video', 'world_clips'} <= set(names) and 'decode' not in names;"
        "[Source.find(name) for name in names]; print('torch' in sys.modules, 'av' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]


def test_without_the_decoder_the_message_says_what_to_install(
    grey: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs av: pip install .*\[video\]"):
        source(grey)


def stills(folder: Path, count: int = 12) -> Path:
    folder.mkdir(parents=True)
    for i, frame in enumerate(greys(count)):
        Image.fromarray(frame).save(folder / f"{i + 1}.png")
    return folder


def test_gifs_are_clips_at_their_own_pace(tmp_path: Path) -> None:
    frames = [Image.fromarray(frame) for frame in greys(10)]
    place = tmp_path / "a.gif"
    held = [100] * 9 + [3000]  # the last one stays
    frames[0].save(place, save_all=True, append_images=frames[1:], duration=held)
    assert numbers(source(place)[0].image(0)) == [0, 1, 2, 3]
    assert numbers(source(place, stride=2, start=2)[0].image(0)) == [2, 4, 6, 8]
    assert numbers(source(place, fps=5)[0].image(0)) == [0, 2, 4, 6]
    assert examine(place, "a.gif").rate == pytest.approx(10)
    held = [100, 300] * 5  # by time, as a player shows them
    frames[0].save(place, save_all=True, append_images=frames[1:], duration=held)
    assert numbers(source(place, fps=2.5)[0].image(0)) == [0, 2, 4, 6]
    clear = [Image.new("RGBA", (32, 32), (0, 0, 0, 0)) for _ in range(2)]
    clear[1].putpixel((0, 0), (9, 9, 9, 255))
    clear[0].save(place, save_all=True, append_images=clear[1:], duration=100)
    assert float(source(place, frames=1)[0].image(0).min()) == 1.0  # white behind it


def test_folders_of_frames_are_clips(tmp_path: Path) -> None:
    folder = stills(tmp_path / "clips" / "dance.one")
    (folder.parent / "dance.one.caption").write_text("a dance")
    with pytest.raises(ValueError, match=r"no video in this folder.*data\.frame_rate=24 reads"):
        source(folder.parent)
    train, _ = source(folder.parent, frame_rate=6, prompt=None)
    sample = train.sample(0, RNG)
    assert (sample.key, sample.caption, list(train.rates)) == ("dance.one", "a dance", [6])
    assert numbers(sample.image) == [0, 1, 2, 3]
    assert numbers(source(folder.parent, frame_rate=6, stride=3, start=1)[0].image(0)) == [
        1, 4, 7, 10,
    ]  # fmt: skip
    assert numbers(source(folder, frame_rate=6, fps=2)[0].image(0)) == [0, 3, 6, 9]
    before = train.identity(), train.fingerprint()
    Image.fromarray(greys(13)[12]).save(folder / "12.png")
    now = source(folder.parent, frame_rate=6, prompt=None)[0]
    assert now.identity() != before[0] and now.fingerprint() != before[1]
    (folder / "12.png").unlink()
    with pytest.raises(ImageError, match=r"dance\.one: 11 frames, and it had 12"):
        now.image(0)
    Image.new("RGB", (20, 20)).save(folder / "7.png")
    assert "dance.one: 7.png has 20x20 pixels and 1.png 48x32" in refusal(folder, frame_rate=6)


def test_frames_beside_videos_are_read_on_request(grey: Path, tmp_path: Path) -> None:
    (tmp_path / "b.mp4").write_bytes(grey.read_bytes())
    stills(tmp_path / "a")
    alone = Video(video=tmp_path, prompt="grey")
    assert alone.found() == [
        f"{tmp_path}: 1 videos, 0 folders of frames; captions: one for all, data.prompt",
        f"{tmp_path}: folders of frames that are not read: 1, as a; data.frame_rate=24 reads them "
        "as clips of so many frames a second",
    ]
    both = Video(video=tmp_path, prompt="grey", frame_rate=8, frames=4)
    assert both.found()[0].startswith(f"{tmp_path}: 1 videos, 1 folders of frames;")
    assert [take.key for take in both.open(needs(tmp_path))[0].videos] == ["a", "b.mp4"]
    assert "has no folder of frames" in Video(video=grey, prompt="grey").idle()["frame_rate"]
    assert "frame_rate" not in both.idle()
