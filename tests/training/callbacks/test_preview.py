"""Previews of a run on clips move: as files, in TensorBoard and in wandb. Those of a run on stills
are tested in tests/training/test_fit.py."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import command
from PIL import Image
from torch import Tensor

from trainer.__main__ import main
from trainer.media.grids import grid
from trainer.media.write_video import write_frames
from trainer.training.callbacks import preview

FRAMES, PROMPTS = 3, 2
WORDS = [
    "recipe=animatediff",
    "methods.animatediff.heads=2",
    "methods.lora.rank=2",
    f"data.frames={FRAMES}",
    "data.fps=4",
    "data.count=2",
    "data.validation=0",
    "run.steps=2",
    "run.batch_size=1",
    "run.precision=fp32",
    "run.validate_every=0",
    "run.checkpoint_every=0",
    "preview.every=1",
    "preview.steps=2",
    "preview.prompts=[a fox moving left on a blue background, a cow beside a fox]",
]


def finished(folder: Path, backbone: Path, *words: str) -> Path:
    given = {word.partition("=")[0]: word for word in (*WORDS, *words)}  # the later of two holds
    assert main(["fit", *given.values(), f"backbone={backbone}", f"run={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    return finished(tmp_path_factory.mktemp("run") / "moving", tiny_folder)


def test_a_run_that_goes_on_keeps_the_looks_it_had(tmp_path: Path, tiny_folder: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        """
data: {source: world, count: 4}
methods: {selective: {}}
run: {batch_size: 1, validate_every: 0, checkpoint_every: 1}
preview: {every: 1, steps: 1, prompts: [a fox]}
"""
    )
    words = ["fit", f"recipe={recipe}", f"backbone={tiny_folder}", f"run={tmp_path / 'run'}"]
    place = tmp_path / "run" / "previews" / "grid.png"
    assert main([*words, "run.steps=1"]) == 0
    with Image.open(place) as first:
        before = first.copy()
    assert main([*words, "run.steps=2"]) == 0
    with Image.open(place) as both:
        assert both.height > before.height
        assert both.crop((0, 0, *before.size)).tobytes() == before.tobytes()


def test_each_look_is_a_sheet_and_a_film(run: Path) -> None:
    looks = ("base", "step-1", "step-2")
    kinds = ["gif", "png"]
    if pytest.importorskip("av", reason="MP4 needs PyAV"):
        kinds.append("mp4")
    names = sorted(path.name for path in (run / "previews").iterdir())
    assert names == sorted(f"{look}.{kind}" for look in looks for kind in kinds)
    with Image.open(run / "previews" / "step-2.png") as sheet:
        assert sheet.height == PROMPTS * 98
        assert FRAMES * 98 < sheet.width < FRAMES * 98 + 120
    with Image.open(run / "previews" / "step-2.gif") as film:
        assert film.n_frames == FRAMES  # type: ignore[attr-defined]
        assert film.info["duration"] == 250  # four frames a second, as in the data
        assert all(side % 2 == 0 for side in film.size)


def test_the_mp4_shows_the_same(run: Path) -> None:
    av = pytest.importorskip("av")
    with (
        av.open(str(run / "previews" / "step-2.mp4")) as film,
        Image.open(run / "previews" / "step-2.gif") as loop,
    ):
        shown = [frame.to_image() for frame in film.decode(video=0)]
        assert film.streams.video[0].average_rate == 4
        assert [frame.size for frame in shown] == [loop.size] * FRAMES


def test_tensorboard_gets_the_film(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((run / "tensorboard").glob("events*"))))
    events.Reload()
    looks = events.Images("preview")
    assert [look.step for look in looks] == [0, 1, 2]
    with Image.open(io.BytesIO(looks[-1].encoded_image_string)) as film:
        assert film.format == "GIF"
        assert film.n_frames == FRAMES  # type: ignore[attr-defined]
        assert film.size == (looks[-1].width, looks[-1].height)


def test_wandb_gets_the_film_offline(tmp_path: Path, tiny_folder: Path) -> None:
    pytest.importorskip("wandb")
    words = [*WORDS, f"backbone={tiny_folder}", f"run={tmp_path / 'w'}", "tracker=wandb"]
    words = [word for word in words if word != "preview.every=1"]
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("WANDB_API_KEY", None)
    done = command("fit", *words, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    kept = list((tmp_path / "w").glob("wandb/offline-run-*/files/media/videos/preview*"))
    assert len(kept) == 2  # the base and the end
    made = {
        path.read_bytes()
        for look in ("base", "step-2")
        for path in (tmp_path / "w" / "previews").glob(f"{look}.*")
    }
    assert {path.read_bytes() for path in kept} <= made
    assert {path.suffix for path in kept} <= {".mp4", ".gif"}


def test_maps_stand_below_their_clip_and_every_frame_has_its_own(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[tuple[str, Tensor]]] = []

    def kept(rows: list[tuple[str, Tensor]], *titles: list[str]) -> Image.Image:
        drawn.append(rows)
        return grid(rows, *titles)

    monkeypatch.setattr(preview, "grid", kept)
    words = ["preview.maps=fox</w>", "preview.every=99", "run.steps=1", "tracker=none"]
    finished(tmp_path / "maps", tiny_folder, *words)
    sheet = next(rows for rows in reversed(drawn) if len(rows) == 2 * PROMPTS)
    assert [label for label, _ in sheet[1::2]] == ["fox</w>"] * PROMPTS
    for (_, clip), (_, heat) in zip(sheet[::2], sheet[1::2], strict=True):
        assert clip.shape == heat.shape and len(heat) == FRAMES
        assert not torch.equal(heat[0], heat[1])


def test_a_clip_is_the_same_alone_and_among_others(
    tiny_folder: Path, open_folder: Callable[[Path], object], tmp_path: Path
) -> None:
    """And the same as `sample` paints by its prompt and seed."""
    from trainer.diffusion.sampler import sample
    from trainer.diffusion.sampling_settings import Sampling

    backbone = open_folder(tiny_folder)
    prompts = ["a fox", "a cow"]
    looked = preview.Preview(
        tmp_path, prompts, every=1, seed=5, settings=Sampling(2, 3.0, frames=2, fps=8.0)
    )
    pictures, maps = looked._sample(backbone)  # type: ignore[arg-type]
    assert maps is None
    both = sample(
        backbone, prompts, [5, 6], settings=Sampling(steps=2, guidance=3.0, frames=2, fps=8.0)
    )  # type: ignore[arg-type]
    torch.testing.assert_close(pictures, both, rtol=0, atol=1e-4)


def test_without_pyav_there_is_a_gif(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    images = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    assert write_frames(images, tmp_path / "x", 8.0) == [tmp_path / "x.gif"]
    with Image.open(tmp_path / "x.gif") as film:
        assert film.n_frames == 2  # type: ignore[attr-defined]
