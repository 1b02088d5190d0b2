"""`sample block=` and `known=`: clips in blocks, clips that go on from a video, fill its frames in,
or are larger; what is written into the file; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.__main__ import main
from trainer.backbones import load_backbone
from trainer.cli.sample_known import KnownVideo, known_of
from trainer.common.exit_codes import BAD_RECIPE
from trainer.config.lineage import backbone_spec
from trainer.diffusion.sampling_settings import Sampling
from trainer.media.made_by import facts_in
from trainer.media.write_video import write_frames

Printed = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Four frames that differ."""
    from PIL import Image

    frames = [Image.new("RGB", (32, 32), (60 * n, 80, 200 - 60 * n)) for n in range(4)]
    found: Path = write_frames(frames, tmp_path / "clip", 8, facts={})[0]
    return found


def made(printed: Printed, *words: str) -> list[Path]:
    printed.readouterr()
    assert main(["sample", *words]) == 0, printed.readouterr().err
    return [Path(line) for line in printed.readouterr().out.split("\n") if line]


def refused(printed: Printed, *words: str) -> str:
    printed.readouterr()
    own = () if any(word.startswith("prompt") for word in words) else ("prompt=a fox",)
    assert main(["sample", "steps=1", *own, *words]) == BAD_RECIPE
    return printed.readouterr().err


def test_a_clip_in_blocks_is_repeated_bit_for_bit(
    tiny_folder: Path, video: Path, capsys: Printed
) -> None:
    """The tiny model makes frames by themselves, so known frames are only replaced."""
    words = ("steps=2", "guidance=1", f"backbone={tiny_folder}", "prompt=a fox", "frames=7")
    more = ("block=4", "overlap=1", "reconstruction=0", "corrector=1")
    path = made(capsys, *words, *more, f"known={video}", "every=3", "take=3")[0]
    facts = facts_in(path)
    wanted = {"block": 4, "overlap": 1, "reconstruction": 0, "corrector": 1, "frames": 7}
    assert {key: facts[key] for key in wanted} == wanted
    assert (facts["known"], facts["every"], facts["take"], facts["shrink"]) == (video.name, 3, 3, 1)
    assert main(["sample", f"from={path}", f"backbone={tiny_folder}", "out=again"]) == 0
    assert "repeated, bit for bit" in capsys.readouterr().err


def test_a_video_is_read_into_its_places(tiny_folder: Path, video: Path) -> None:
    backbone: Any = load_backbone(backbone_spec(str(tiny_folder)), "tiny").eval()
    settings = Sampling(steps=1, frames=7)
    whole = known_of(backbone, KnownVideo(video, take=4), settings)
    assert whole.at == (0, 1, 2, 3) and whole.latents.shape == (1, 4, 8, 8, 8)
    apart = known_of(backbone, KnownVideo(video, every=3), settings)
    assert apart.at == (0, 3, 6)
    assert torch.equal(apart.latents, whole.latents[:, :3])
    small = known_of(backbone, KnownVideo(video, take=4, shrink=4), Sampling(steps=1, frames=4))
    assert small.latents.shape == (1, 4, 8, 2, 2)
    torch.testing.assert_close(
        small.latents[..., 0, 1], whole.latents[..., :4, 4:].mean((-1, -2)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["overlap=2"], "overlap=2 has no effect: blocks have frames in common; give block= too"),
        (["corrector=1"], "corrector=1 has no effect: it is for clips in blocks, or of which a"),
        (["reconstruction=2"], "reconstruction=2 has no effect: it is for clips in blocks"),
        (["every=2"], "every=2 has no effect: it says how far the frames of a video are apart"),
        (["block=4", "frames=4"], "block=4 is for clips of more frames, and frames=4; give more"),
        (["block=4", "overlap=4", "frames=8"], "overlap=4: blocks of 4 frames have 1 to 3"),
        (["block=1", "frames=8"], "block=1: give at least 2, one frame to go on from"),
        (["known=a.mp4", "frames=8"], "known= says nothing of what is to be made: give take="),
        (["known=a.mp4", "take=2", "source=b.mp4"], "known= and source= do not go together"),
        (["known=a.mp4", "shrink=2", "reconstruction=0"], "reconstruction=0 replaces known frames"),
        (["known=a.mp4", "take=2", "frames=4"], "known=a.mp4: no such file"),
        (["block=2", "frames=4"], "makes every frame by itself, so that known frames say nothing"),
    ],
)
def test_refused(words: list[str], says: str, tiny_folder: Path, capsys: Printed) -> None:
    assert says in refused(capsys, *words, f"backbone={tiny_folder}").replace("\n", " ")


@pytest.mark.parametrize(
    ("video", "says"),
    [
        (KnownVideo(Path("a.mp4"), take=4), "all 4 frames of the clip are known; give more frames"),
        (KnownVideo(Path("a.mp4"), take=3, every=2), "take=3: a clip of frames=4 has room for 2"),
    ],
)
def test_more_is_known_than_there_is_room_for(video: KnownVideo, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        video.numbers(4)
