"""`sample` with clips: methods that train nothing, a video as the source, files that play."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.__main__ import main
from trainer.common.exit_codes import BAD_RECIPE
from trainer.data.video_clips import CaptionedVideo, VideoClips, Window
from trainer.data.world.clips import draw_clip
from trainer.diffusion.source_clip import source_latents
from trainer.media.read_video import examine
from trainer.media.write_video import encode_video, write_clip

pytest.importorskip("av")
WORDS = ["sample", "prompt=a fox", "steps=3"]


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_video(draw_clip(0, 0, frames=6).frames, 8))
    return path


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_method_without_training_paints_clips(
    tiny_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    words = [f"backbone={tiny_folder}", "methods.text2video_zero={motion: [0.1, 0]}", "frames=3"]
    assert main([*WORDS, *words, f"out={out}", "count=2"]) == 0
    names = ["a-fox-0.gif", "a-fox-0.mp4", "a-fox-1.gif", "a-fox-1.mp4"]
    assert files(out) == names
    printed = capsys.readouterr().out.split()
    assert sorted(Path(line).name for line in printed) == names
    with Image.open(out / "a-fox-0.gif") as film:
        assert (film.n_frames, film.size) == (3, (32, 32))


def test_a_gif_shows_its_frames_for_their_time(tmp_path: Path) -> None:
    *_, gif = write_clip(torch.linspace(-1, 1, 3)[:, None, None, None].expand(3, 3, 8, 8),
                         tmp_path / "a", 4.0)  # fmt: skip
    with Image.open(gif) as clip:
        assert clip.info["duration"] == 250  # milliseconds


def test_without_pyav_the_gif_is_there_and_what_lacks_is_said(
    tiny_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.media.write_video.find_spec", lambda name: None)
    words = [f"backbone={tiny_folder}", "frames=2", f"out={tmp_path / 'out'}"]
    assert main([*WORDS, *words]) == 0
    assert files(tmp_path / "out") == ["a-fox-0.gif"]
    assert "no MP4 beside it: PyAV writes one" in capsys.readouterr().err


def test_a_source_is_edited(tiny_folder: Path, tmp_path: Path, video: Path) -> None:
    painted = {}
    for name, more in (("edited", [f"source={video}"]), ("plain", [])):
        out = tmp_path / name
        words = [f"backbone={tiny_folder}", "frames=3", f"out={out}", *more]
        assert main([*WORDS, *words]) == 0
        with Image.open(out / "a-fox-0.gif") as film:
            painted[name] = np.asarray(film.convert("RGB"))
    assert not np.array_equal(painted["edited"], painted["plain"])


def test_one_picture_is_a_png(tmp_path: Path) -> None:
    picture = torch.zeros(1, 3, 4, 6)
    assert write_clip(picture, tmp_path / "x", 8.0) == [tmp_path / "x.png"]
    with Image.open(tmp_path / "x.png") as found:
        assert found.size == (6, 4)


def test_what_is_written_reads_as_it_was(tmp_path: Path, tiny: Any) -> None:
    steps = torch.linspace(-0.8, 0.8, 5)
    film, _ = write_clip(steps[:, None, None, None].expand(-1, 3, 32, 32), tmp_path / "greys", 8.0)
    latents = source_latents(tiny, film, frames=5, fps=None, data={})
    shown = tiny.decode(latents).mean((1, 2, 3))
    assert torch.equal(shown.argsort(), torch.arange(5))
    every_second = source_latents(
        tiny, film, frames=3, fps=None, data={"source": "video", "stride": 2}
    )
    torch.testing.assert_close(every_second, latents[::2])
    assert torch.equal(source_latents(tiny, film, frames=3, fps=4.0, data={}), every_second)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["adapter=[x,y]", "methods.pix2video={}"], "methods go with one adapter, or with backb"),
        (["backbone=tiny", "fps=0"], "fps=0: a number is needed, above 0"),
        (["backbone=tiny", "frames=0"], "frames=0: a whole number is needed, at least 1"),
        (["backbone=tiny", "source=x.mp4", "count=2"], "source= gives the same clip for"),
        (["backbone=tiny", "methods.pix2vid={}"], "methods.pix2vid: no such method; did you mean"),
        (["backbone=tiny", "methods.lora={}", "frames=2"], "methods.lora has weights to train"),
    ],
    ids=str,
)
def test_refusals(words: list[str], says: str, tmp_path: Path, capsys: Any) -> None:
    assert main([*WORDS, *words, f"out={tmp_path / 'out'}"]) == BAD_RECIPE
    assert capsys.readouterr().err.startswith(f"error: {says}")


def test_latents_of_a_video_are_the_means_of_the_vae(tiny: Any, tmp_path: Path) -> None:
    """Without its noise, so that the same video has the same latents."""
    film = tmp_path / "film.mp4"
    frames = [np.full((32, 32, 3), 40 * n, np.uint8) for n in range(3)]
    film.write_bytes(encode_video(frames, fps=8))
    found = source_latents(tiny, film, frames=3, fps=None, data={})
    video = CaptionedVideo("film.mp4", "", facts=examine(film, "film.mp4"), source=film)
    window = Window(frames=3, stride=1, fps=None, start=0)
    pixels = VideoClips([video], window, side=tiny.resolution, flip=False).image(0)
    with torch.no_grad():
        means = tiny.vae.encode(pixels).latent_dist.mean
    shift = getattr(tiny.vae.config, "shift_factor", None) or 0
    torch.testing.assert_close(found, (means - shift) * tiny.vae.config.scaling_factor)
