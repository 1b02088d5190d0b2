"""Previews of a run on clips move: as files, in TensorBoard and in wandb. Those of a run on stills
are tested in tests/training/test_fit.py."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commands import command
from PIL import Image
from torch import Tensor

from trainer.__main__ import main
from trainer.backbones.device import pictures_at_once
from trainer.common.exit_codes import BAD_RECIPE
from trainer.common.paths import slug
from trainer.data.mixed import Mixed
from trainer.data.sources.world import Scenes
from trainer.data.sources.world_clips import DrawnClips
from trainer.diffusion.sampling_settings import Sampling
from trainer.media.grids import grid
from trainer.media.images import to_pil
from trainer.media.made_by import facts_in
from trainer.media.write_video import write_frames
from trainer.training.callbacks import preview
from trainer.training.preview_prompts import captions_of_clips, shown_samples

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


def test_a_run_that_goes_on_keeps_the_looks_it_had(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        """
data: {source: world, count: 4}
methods: {selective: {}}
run: {batch_size: 1, validate_every: 0, checkpoint_every: 1}
preview: {every: 1, steps: 1, prompts: [a fox, a cat]}
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
    _made_again(tmp_path / "run" / "previews", tiny_folder, capsys)


def _made_again(place: Path, backbone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each picture in its full size: of the result, of a checkpoint, and of no adapter yet."""
    looks = [f"step-{step:06d}" for step in (0, 1, 2)]
    found = sorted(path.relative_to(place).as_posix() for path in place.glob("*/*"))
    assert found == [f"{look}/{name}.png" for look in looks for name in ("00-a-fox", "01-a-cat")]
    base, *trained = (place / look / "01-a-cat.png" for look in looks)
    for path in trained:
        with Image.open(path) as picture:
            assert picture.size == (32, 32)
        capsys.readouterr()
        assert main(["sample", f"from={path}", f"out={place.parent / 'again'}"]) == 0
        assert "repeated, bit for bit" in capsys.readouterr().err
    assert trained[0].read_bytes() != trained[1].read_bytes()
    again = ["sample", f"from={base}", f"out={place.parent / 'base'}"]
    assert main(again) == BAD_RECIPE
    assert "before its first step, when there was no adapter" in capsys.readouterr().err
    assert main([*again, f"backbone={backbone}"]) == 0


def test_each_look_is_a_sheet_and_a_film(run: Path) -> None:
    pytest.importorskip("av", reason="MP4 needs PyAV")
    looks = ("step-000000", "step-000001", "step-000002")
    names = sorted(path.name for path in (run / "previews").iterdir())
    assert names == sorted(
        f"{look}{kind}" for look in looks for kind in ("", ".gif", ".mp4", ".png")
    )
    with Image.open(run / "previews" / "step-000002.png") as sheet:
        assert sheet.height == PROMPTS * 98
        assert FRAMES * 98 < sheet.width < FRAMES * 98 + 120
    with Image.open(run / "previews" / "step-000002.gif") as film:
        assert film.n_frames == FRAMES  # type: ignore[attr-defined]
        assert film.info["duration"] == 250  # four frames a second, as in the data
        assert all(side % 2 == 0 for side in film.size)


def test_each_clip_is_a_file_that_is_made_again(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av", reason="MP4 needs PyAV")
    own = ["00-a-fox-moving-left-on-a-blue-background", "01-a-cow-beside-a-fox"]
    for look in ("step-000000", "step-000001", "step-000002"):
        names = sorted(path.name for path in (run / "previews" / look).iterdir())
        assert names == [f"{name}.{kind}" for name in own for kind in ("gif", "mp4")]
    clip = run / "previews" / "step-000002" / f"{own[1]}.gif"
    with Image.open(clip) as film:
        assert film.size == (32, 32)  # as it is trained
        assert (film.n_frames, film.info["duration"]) == (FRAMES, 250)  # type: ignore[attr-defined]
    facts = facts_in(clip)
    assert (facts["prompt"], facts["seed"], facts["step"]) == ("a cow beside a fox", 1, 2)
    capsys.readouterr()
    assert main(["sample", f"from={clip}", f"out={tmp_path}"]) == 0
    assert "repeated, bit for bit" in capsys.readouterr().err
    for path, says in {
        run / "previews" / "step-000001" / f"{own[1]}.gif": "no checkpoint was kept",
        run / "previews" / "step-000002.gif": "give one of those beside it",
    }.items():
        assert main(["sample", f"from={path}", f"out={tmp_path}"]) == BAD_RECIPE
        assert says in capsys.readouterr().err


def test_the_mp4_shows_the_same(run: Path) -> None:
    av = pytest.importorskip("av")
    with (
        av.open(str(run / "previews" / "step-000002.mp4")) as film,
        Image.open(run / "previews" / "step-000002.gif") as loop,
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
        for look in ("step-000000", "step-000002")
        for path in (tmp_path / "w" / "previews").glob(f"{look}.*")
    }
    assert {path.read_bytes() for path in kept} <= made
    assert {path.suffix for path in kept} <= {".mp4", ".gif"}


def test_maps_stand_below_their_clip_and_every_frame_has_its_own(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[tuple[str, Tensor]]] = []

    def kept(rows: list[tuple[str, Tensor]], *titles: Any, **more: Any) -> Image.Image:
        drawn.append(rows)
        return grid(rows, *titles, **more)

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


def test_pictures_that_are_no_squares_keep_their_shape(
    tiny_folder: Path, open_folder: Callable[[Path], object], tmp_path: Path
) -> None:
    """A preview of a size, 40 pixels wide and 24 high; two at once, then one."""
    backbone = open_folder(tiny_folder)
    settings = Sampling(1, 1.0, size=(24, 40))
    looked = preview.Preview(
        tmp_path / "x" / "previews", ["a fox", "a cat"], every=1, seed=5, settings=settings
    )
    pictures, _ = looked._sample(backbone)  # type: ignore[arg-type]
    at = SimpleNamespace(global_step=300, max_steps=900)
    looked._write(backbone, pictures, trainer=at)  # type: ignore[arg-type]
    paths = sorted((tmp_path / "x" / "previews" / "step-000300").iterdir())
    assert [path.name for path in paths] == ["00-a-fox.png", "01-a-cat.png"]
    for row, path in enumerate(paths):
        with Image.open(path) as picture:
            assert picture.size == (40, 24)
            assert picture.tobytes() == to_pil(pictures[row]).tobytes()
        facts = facts_in(path)
        assert (facts["size"], facts["batch"], facts["row"]) == ("40x24", 2, row)
        assert (facts["seed"], facts["step"]) == (5 + row, 300)


def test_clips_without_prompts_are_shown_by_their_captions(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["recipe=tune_a_video", f"backbone={tiny_folder}", f"run={tmp_path / 'run'}"]
    words += ["data.source=world_clips", "data.count=1", "data.seed=12", "data.frames=2"]
    words += ["run.steps=1", "preview.steps=1", "preview.guidance=1", "tracker=none"]
    assert main(["fit", *words]) == 0
    said = " ".join(capsys.readouterr().err.split())
    clips = DrawnClips(12, count=1, sprites="known", side=16, frames=2, fps=None)
    caption = clips.caption(0, np.random.default_rng(0))
    assert f"previews show captions of the data: {caption} " in said
    (clip,) = (tmp_path / "run" / "previews" / "step-000001").glob("*.gif")
    assert clip.name == f"00-{slug(caption)}.gif" and facts_in(clip)["prompt"] == caption


def test_captions_are_those_of_clips_that_differ() -> None:
    """Not those of images among them, and no more than four."""
    clips = DrawnClips(0, count=40, sprites="known", side=16, frames=2, fps=None, motions=())
    stills = Scenes(0, count=4, sprites="known", side=16)
    rng = np.random.default_rng(0)
    wanted = list(dict.fromkeys(clips.caption(i, rng) for i in range(16)))[:4]
    assert list(captions_of_clips(Mixed(clips, stills, 0.5))) == wanted and len(wanted) == 4
    assert captions_of_clips(stills) == ()
    one = DrawnClips(0, count=1, sprites="known", side=16, frames=2, fps=None, motions=())
    assert len(captions_of_clips(one)) == 1


def test_a_preview_has_the_inputs_of_the_clip_that_its_prompt_describes() -> None:
    clips = DrawnClips(0, count=40, sprites="known", side=16, frames=2, fps=None, motions=())
    stills = Scenes(0, count=4, sprites="known", side=16)
    third = clips.caption(3, np.random.default_rng(0))
    assert shown_samples(clips, ["a fox", third, "a cow"]) == [0, 3, 2]
    assert shown_samples(Mixed(clips, stills, 0.5), [third]) == [3]
    assert shown_samples(stills, ["a"] * 6) == [0, 1, 2, 3, 0, 1]


def test_previews_of_a_model_that_reads_depth_have_that_of_the_data(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such a preview cannot be made again from its file alone, and that is said."""
    words = ["recipe=gen1", "methods.animatediff=null", "methods.gen1.heads=2", "optim.lr=0.1"]
    plain = [word for word in WORDS if "animatediff" not in word]
    run = tmp_path / "run"
    more = ["preview.prompts=[a fox]", "run.steps=2", "preview.temporal_guidance=2"]
    words = [*plain, *words, f"backbone={tiny_folder}", f"run={run}", *more]
    given = {word.partition("=")[0]: word for word in words}
    assert main(["fit", *given.values()]) == 0
    shown = run / "previews" / "step-000002" / "00-a-fox.gif"
    assert facts_in(shown)["temporal_guidance"] == 2
    again = ["sample", f"adapter={run}", "prompt=a fox", f"out={tmp_path / 'out'}", "fps=4"]
    assert main([*again, "steps=2"]) == 0  # without depth, it is another clip
    own = facts_in(tmp_path / "out" / "a-fox-0.gif")
    assert (
        own["temporal_guidance"] == 2 and own["frames_sha256"] != facts_in(shown)["frames_sha256"]
    )
    capsys.readouterr()
    assert main(["sample", f"from={shown}"]) == BAD_RECIPE
    assert "its depth came from the data of its run" in capsys.readouterr().err


def test_without_pyav_there_is_a_gif(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    images = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    assert write_frames(images, tmp_path / "x", 8.0) == [tmp_path / "x.gif"]
    with Image.open(tmp_path / "x.gif") as film:
        assert film.n_frames == 2  # type: ignore[attr-defined]


def test_previews_and_samples_take_the_scheduler_of_the_recipe(
    tmp_path: Path, tiny_folder: Path
) -> None:
    """Ancestral sampling, as DDPM's; `sample` then takes it by default, and another where told."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        """
data: {source: world, count: 4}
methods: {selective: {}}
run: {batch_size: 1, steps: 1, validate_every: 0, checkpoint_every: 0}
preview: {every: 1, steps: 3, scheduler: ddpm, prompts: [a fox]}
"""
    )
    run = tmp_path / "run"
    assert main(["fit", f"recipe={recipe}", f"backbone={tiny_folder}", f"run={run}"]) == 0
    pictures = list((run / "previews").rglob("*a-fox*.png"))
    assert pictures and {facts_in(each)["sampler"] for each in pictures} == {"DDPM"}
    for words, wanted in (([], "DDPM"), (["scheduler=ddim"], "DDIM")):
        out = tmp_path / wanted
        assert main(["sample", f"adapter={run}", "prompt=a fox", f"out={out}", *words]) == 0
        (made,) = out.rglob("*.png")
        assert facts_in(made)["sampler"] == wanted


def test_previews_are_generated_in_batches_by_their_size(tiny: Any) -> None:
    """Of few prompts and many pixels; of clips one at a time."""
    made = preview.Preview.__new__(preview.Preview)
    made.prompts, made.frames = ["a"] * 6, 1
    for side, at_once in ((64, 6), (2048, pictures_at_once(6, 2048**2))):
        made.settings = Sampling(steps=1, size=(side, side))
        assert made._at_once(tiny) == at_once
    assert at_once < 6
    made.frames = 4
    assert made._at_once(tiny) == 1
